//! Mistakes about flows that move, tiers, schedulers and QUIC; as in `mistakes`.

use super::mistakes::Row;
use super::{errors, warnings};

#[test]
fn every_mistake_about_steering_is_told_with_its_place_and_a_way_out() {
    for (name, text, expected) in [FLOWS, TIERS, SCHEDULERS].into_iter().flatten() {
        assert_eq!(errors(text), *expected, "{name}:\n{text}");
    }
}

#[test]
fn every_oddity_about_steering_is_a_warning_and_the_file_still_loads() {
    for (name, text, expected) in WARNINGS {
        assert_eq!(warnings(text), *expected, "{name}:\n{text}");
    }
}

/// Flows that change places, and shares that rise.
const FLOWS: &[Row] = &[
    (
        "limits of pins that are none",
        "interfaces: [eth0]\nseed: 1\nlimits: {pins: 4095}\nservices: []\n",
        &["xlb.yaml:3:16 limits.pins: 4095 is not allowed; use 4096-134217728"],
    ),
    (
        "idle timeouts that are too short, too long and of no protocol",
        "interfaces: [eth0]\nseed: 1\npools:\n  web: {forward: ipip, backends: [10.0.0.1], idle_timeout: {tcp: 500ms, udp: 13h, sctp: 1m}}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:4:66 pools.web.idle_timeout.tcp: 500ms is not allowed; use 1s-12h",
            "xlb.yaml:4:78 pools.web.idle_timeout.udp: 13h is not allowed; use 1s-12h",
            "xlb.yaml:4:83 pools.web.idle_timeout.sctp: is not a known key; use tcp or udp",
        ],
    ),
    (
        "one idle timeout for all",
        "interfaces: [eth0]\nseed: 1\npools:\n  web: {forward: ipip, backends: [10.0.0.1], idle_timeout: 15m}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:4:60 pools.web.idle_timeout: 15m is not allowed here; use a mapping such as {tcp: 15m, udp: 60s}",
        ],
    ),
    (
        "default idle timeouts that are wrong",
        "interfaces: [eth0]\nseed: 1\ndefaults: {idle_timeout: {udp: 60}, idle_timeouts: {}}\npools: {web: {forward: ipip, backends: [10.0.0.1]}}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:3:32 defaults.idle_timeout.udp: 60 has no unit; write 60s",
            "xlb.yaml:3:37 defaults.idle_timeouts: is not a known key; did you mean idle_timeout?",
        ],
    ),
    (
        "unknown words for failures and removals",
        "interfaces: [eth0]\nseed: 1\npools:\n  web: {forward: ipip, backends: [10.0.0.1], on_down: drain, on_remove: keep}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:4:55 pools.web.on_down: drain is not allowed; use auto, keep or move",
            "xlb.yaml:4:73 pools.web.on_remove: keep is not allowed; use drain or move",
        ],
    ),
    (
        "a grace for failures that have none",
        "interfaces: [eth0]\nseed: 1\npools:\n  web: {forward: ipip, backends: [10.0.0.1], on_down: move, down_grace: 5s}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:4:61 pools.web.down_grace: is for on_down: auto, but on_down is move; remove it, or set on_down: auto",
        ],
    ),
    (
        "a grace without a unit, and one that is too long",
        "interfaces: [eth0]\nseed: 1\npools:\n  web: {forward: ipip, backends: [10.0.0.1], down_grace: 30}\n  far: {forward: ipip, backends: [10.0.0.2], down_grace: 1000h}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}, {name: b, vip: 203.0.113.11, ports: 80, protocol: tcp, pool: far}]\n",
        &[
            "xlb.yaml:4:58 pools.web.down_grace: 30 has no unit; write 30s or 30ms",
            "xlb.yaml:5:58 pools.far.down_grace: 1000h is not allowed; use 0ms-12h",
        ],
    ),
    (
        "drain timeouts that are none",
        "interfaces: [eth0]\nseed: 1\npools:\n  web: {forward: ipip, backends: [10.0.0.1], drain_timeout: forever}\n  far: {forward: ipip, backends: [10.0.0.2], drain_timeout: 0s}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}, {name: b, vip: 203.0.113.11, ports: 80, protocol: tcp, pool: far}]\n",
        &[
            "xlb.yaml:4:61 pools.web.drain_timeout: forever is not allowed; use 1s-168h, such as 500ms or 2s; or use never",
            "xlb.yaml:5:61 pools.far.drain_timeout: 0s is not allowed; use 1s-168h; or use never",
        ],
    ),
    (
        "slow starts that are none",
        "interfaces: [eth0]\nseed: 1\npools:\n  web: {forward: ipip, backends: [10.0.0.1], slow_start: {curve: cubic}}\n  far: {forward: ipip, backends: [10.0.0.2], slow_start: 2h}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}, {name: b, vip: 203.0.113.11, ports: 80, protocol: tcp, pool: far}]\n",
        &[
            "xlb.yaml:4:46 pools.web.slow_start.duration: is missing; use a duration such as 30s",
            "xlb.yaml:4:66 pools.web.slow_start.curve: cubic is not allowed; use linear or square",
            "xlb.yaml:5:58 pools.far.slow_start: 2h is not allowed; use 1s-1h",
        ],
    ),
    (
        "a slow start as a list",
        "interfaces: [eth0]\nseed: 1\npools:\n  web: {forward: ipip, backends: [10.0.0.1], slow_start: [60s]}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:4:58 pools.web.slow_start: a list is not allowed here; use a duration such as 60s, or a mapping such as {duration: 60s, curve: square}",
        ],
    ),
];

/// Pools that take the place of others.
const TIERS: &[Row] = &[
    (
        "a fallback that is no pool, one that is itself, and one twice",
        "interfaces: [eth0]\nseed: 1\npools:\n  web: {forward: ipip, backends: [10.0.0.1], fallback: [fra, web, far, far]}\n  far: {forward: ipip, backends: [10.0.0.2]}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:4:57 pools.web.fallback[0]: there is no pool fra; did you mean far?",
            "xlb.yaml:4:62 pools.web.fallback[1]: a pool cannot take its own place; name another pool, or remove it",
            "xlb.yaml:4:72 pools.web.fallback[3]: far is already listed at line 4 (pools.web.fallback[2]); remove one of the two",
        ],
    ),
    (
        "a fallback as a mapping, and an empty list of them",
        "interfaces: [eth0]\nseed: 1\npools:\n  web: {forward: ipip, backends: [10.0.0.1], fallback: {a: far}}\n  far: {forward: ipip, backends: [10.0.0.2], fallback: []}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}, {name: b, vip: 203.0.113.11, ports: 80, protocol: tcp, pool: far}]\n",
        &[
            "xlb.yaml:4:56 pools.web.fallback: a mapping is not allowed here; use the name of a pool, or a list of names",
            "xlb.yaml:5:56 pools.far.fallback: the list is empty; use the name of a pool, or a list of names",
        ],
    ),
    (
        "pools that stand for each other",
        "interfaces: [eth0]\nseed: 1\npools:\n  web: {forward: ipip, backends: [10.0.0.1], fallback: far}\n  far: {forward: ipip, backends: [10.0.0.2], fallback: web}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:5:56 pools.far.fallback: web leads back to far: pools cannot stand for each other; remove it, or name a pool of the same backends that has no fallback",
        ],
    ),
    (
        "a circle of three, and a pool that leads into it",
        "interfaces: [eth0]\nseed: 1\npools:\n  a: {forward: ipip, backends: [10.0.0.1], fallback: [x, b]}\n  b: {forward: ipip, backends: [10.0.0.2], fallback: [x, c]}\n  c: {forward: ipip, backends: [10.0.0.3], fallback: b}\n  x: {forward: ipip, backends: [10.0.0.4]}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: a}]\n",
        &[
            "xlb.yaml:6:54 pools.c.fallback: b leads back to c: pools cannot stand for each other; remove it, or name a pool of the same backends that has no fallback",
        ],
    ),
    (
        "counts and percentages that are none",
        "interfaces: [eth0]\nseed: 1\npools:\n  web: {forward: ipip, backends: [10.0.0.1], fallback: far, min_healthy: 0, panic: 20, failback_hold: 25h}\n  far: {forward: ipip, backends: [10.0.0.2]}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:4:74 pools.web.min_healthy: 0 is not allowed; use 1-32766, or 1%-100%",
            "xlb.yaml:4:84 pools.web.panic: 20 has no percent sign; write 20%",
            "xlb.yaml:4:103 pools.web.failback_hold: 25h is not allowed; use 0ms-24h",
        ],
    ),
    (
        "more counts and percentages that are none",
        "interfaces: [eth0]\nseed: 1\npools:\n  web: {forward: ipip, backends: [10.0.0.1], fallback: far, min_healthy: 101%, panic: 120%}\n  far: {forward: ipip, backends: [10.0.0.2]}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:4:74 pools.web.min_healthy: 101% is not allowed; use 1-32766, or 1%-100%",
            "xlb.yaml:4:87 pools.web.panic: 120% is not allowed; use 0%-100%",
        ],
    ),
    (
        "a percentage with a fraction, and a sign alone",
        "interfaces: [eth0]\nseed: 1\npools:\n  web: {forward: ipip, backends: [10.0.0.1], fallback: far, min_healthy: 12.5%, panic: '%'}\n  far: {forward: ipip, backends: [10.0.0.2]}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:4:74 pools.web.min_healthy: 12.5% is not allowed; use 1-32766, or 1%-100%",
            "xlb.yaml:4:88 pools.web.panic: % is not allowed; use 0%-100%",
        ],
    ),
    (
        "what is for fallbacks, without one",
        "interfaces: [eth0]\nseed: 1\npools:\n  web: {forward: ipip, backends: [10.0.0.1], min_healthy: 2, failback_hold: 10s}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:4:46 pools.web.min_healthy: is for pools with a fallback; set fallback: as well, or remove it",
            "xlb.yaml:4:62 pools.web.failback_hold: is for pools with a fallback; set fallback: as well, or remove it",
        ],
    ),
];

/// What a backend is chosen by.
const SCHEDULERS: &[Row] = &[
    (
        "a prefix of the source for another scheduler, and for the default",
        "interfaces: [eth0]\nseed: 1\npools: {web: {forward: ipip, backends: [10.0.0.1]}}\nservices:\n- {name: www, vip: 203.0.113.10, ports: 443, protocol: tcp, pool: web, scheduler: random, source_prefix: {v4: 24}}\n- {name: b, vip: 203.0.113.11, ports: 80, protocol: tcp, pool: web, source_prefix: {v6: 56}}\n",
        &[
            "xlb.yaml:5:91 services[0].source_prefix: is for scheduler: source-hash, but it is random; set scheduler: source-hash, or remove it",
            "xlb.yaml:6:69 services[1].source_prefix: is for scheduler: source-hash, but it is maglev; set scheduler: source-hash, or remove it",
        ],
    ),
    (
        "prefixes of the source that are none",
        "interfaces: [eth0]\nseed: 1\npools: {web: {forward: ipip, backends: [10.0.0.1]}}\nservices:\n- {name: www, vip: 203.0.113.10, ports: 443, protocol: tcp, pool: web, scheduler: source-hash, source_prefix: {v4: 33, v6: 0, v5: 1}}\n",
        &[
            "xlb.yaml:5:116 services[0].source_prefix.v4: 33 is not allowed; use 1-32 bits",
            "xlb.yaml:5:124 services[0].source_prefix.v6: 0 is not allowed; use 1-128 bits",
            "xlb.yaml:5:127 services[0].source_prefix.v5: is not a known key; did you mean v4?",
        ],
    ),
    (
        "a prefix of the source as a number, and a scheduler that is none",
        "interfaces: [eth0]\nseed: 1\npools: {web: {forward: ipip, backends: [10.0.0.1]}}\nservices:\n- {name: www, vip: 203.0.113.10, ports: 443, protocol: tcp, pool: web, scheduler: source-hash, source_prefix: 24}\n- {name: b, vip: 203.0.113.11, ports: 80, protocol: tcp, pool: web, scheduler: sorce-hash, source_prefix: {v6: 56}}\n",
        &[
            "xlb.yaml:5:111 services[0].source_prefix: 24 is not allowed here; use a mapping such as {v4: 24, v6: 56}",
            "xlb.yaml:6:80 services[1].scheduler: sorce-hash is not allowed; did you mean source-hash?",
        ],
    ),
    (
        "a misspelt scheduler",
        "interfaces: [eth0]\nseed: 1\npools: {web: {forward: ipip, backends: [10.0.0.1]}}\nservices:\n- {name: www, vip: 203.0.113.10, ports: 443, protocol: tcp, pool: web, scheduler: least-connection}\n",
        &[
            "xlb.yaml:5:83 services[0].scheduler: least-connection is not allowed; did you mean least-connections?",
        ],
    ),
    (
        "balanced fragments of a VIP with two prefixes of the source",
        "interfaces: [eth0]\nseed: 1\npools: {web: {forward: ipip, backends: [10.0.0.1]}}\nservices:\n- {name: www, vip: 203.0.113.10, ports: 443, protocol: tcp, pool: web, scheduler: source-hash, source_prefix: {v4: 24}}\n- {name: b, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web, scheduler: source-hash, fragments: balance}\n",
        &[
            "xlb.yaml:6:104 services[1].fragments: fragments of 203.0.113.10 tcp have no ports, but www at line 5 (services[0].name) has another source_prefix; send all services of the VIP and protocol to one pool with source-hash, or set fragments: drop",
        ],
    ),
    (
        "balanced fragments with a scheduler that is no hash",
        "interfaces: [eth0]\nseed: 1\npools: {web: {forward: ipip, backends: [10.0.0.1]}}\nservices:\n- {name: www, vip: 203.0.113.10, ports: 443, protocol: tcp, pool: web, scheduler: round-robin, fragments: balance}\n",
        &[
            "xlb.yaml:5:107 services[0].fragments: balance needs scheduler: source-hash, because fragments have no ports; set scheduler: source-hash, or fragments: drop",
        ],
    ),
    (
        "QUIC over TCP, of backends without server IDs",
        "interfaces: [eth0]\nseed: 1\npools: {web: {forward: ipip, backends: [10.0.0.1]}}\nservices:\n- {name: www, vip: 203.0.113.10, ports: 443, protocol: [tcp, udp], pool: web, quic: {config_id: 0}}\n",
        &[
            "xlb.yaml:5:79 services[0].quic: QUIC runs over UDP, but the service takes TCP too; give TCP a service of its own, or remove quic",
            "xlb.yaml:5:79 services[0].quic: 10.0.0.1 at line 3 (pools.web.backends[0]) has no server_id; give every backend of the pool and of its fallbacks one, or remove quic",
        ],
    ),
    (
        "a configuration of QUIC that is none",
        "interfaces: [eth0]\nseed: 1\npools: {web: {forward: ipip, backends: [{address: 10.0.0.1, server_id: '0a01'}, {address: 10.0.0.2, server_id: '0a02'}]}}\nservices:\n- {name: www, vip: 203.0.113.10, ports: 443, protocol: udp, pool: web, quic: {config_id: 7, version: 1}}\n",
        &[
            "xlb.yaml:5:90 services[0].quic.config_id: 7 is not allowed; use 0-6",
            "xlb.yaml:5:93 services[0].quic.version: is not a known key; use config_id",
        ],
    ),
    (
        "QUIC as a switch",
        "interfaces: [eth0]\nseed: 1\npools: {web: {forward: ipip, backends: [{address: 10.0.0.1, server_id: '0a01'}, {address: 10.0.0.2, server_id: '0a02'}]}}\nservices:\n- {name: www, vip: 203.0.113.10, ports: 443, protocol: udp, pool: web, quic: true}\n",
        &["xlb.yaml:5:78 services[0].quic: true is not allowed here; use a mapping such as {config_id: 0}"],
    ),
    (
        "server IDs that are none",
        "interfaces: [eth0]\nseed: 1\npools: {web: {forward: ipip, backends: [{address: 10.0.0.1, server_id: 0xa1}, {address: 10.0.0.2, server_id: a01}, {address: 10.0.0.3, server_id: web1}, {address: 10.0.0.4, server_id: '00112233445566778899aabbccddeeff'}]}}\nservices:\n- {name: www, vip: 203.0.113.10, ports: 443, protocol: udp, pool: web, quic: {}}\n",
        &[
            "xlb.yaml:3:72 pools.web.backends[0].server_id: 0xa1 is not allowed; leave out the 0x: a1",
            "xlb.yaml:3:110 pools.web.backends[1].server_id: a01 is not allowed; use 1-15 bytes in hex, such as \"0a01\"",
            "xlb.yaml:3:147 pools.web.backends[2].server_id: web1 is not allowed; use 1-15 bytes in hex, such as \"0a01\"",
            "xlb.yaml:3:185 pools.web.backends[3].server_id: 00112233445566778899aabbccddeeff is not allowed; use 1-15 bytes in hex, such as \"0a01\"",
        ],
    ),
    (
        "server IDs of two lengths, and one twice",
        "interfaces: [eth0]\nseed: 1\npools: {web: {forward: ipip, backends: [{address: 10.0.0.1, server_id: '0a01'}, {address: 10.0.0.2, server_id: '0a'}, {address: 10.0.0.3, server_id: '0A01'}]}}\nservices:\n- {name: www, vip: 203.0.113.10, ports: 443, protocol: udp, pool: web, quic: {}}\n",
        &[
            "xlb.yaml:3:91 pools.web.backends[1].address: server_id 0a has 2 digits, and 0a01 at line 3 (pools.web.backends[0].address) has 4; use the same length for all",
            "xlb.yaml:3:129 pools.web.backends[2].address: server_id 0a01 is already that of 10.0.0.1 at line 3 (pools.web.backends[0].address); choose another",
        ],
    ),
    (
        "a server ID that a fallback has too, and a fallback without",
        "interfaces: [eth0]\nseed: 1\npools:\n  web: {forward: ipip, backends: [{address: 10.0.0.1, server_id: '0a01'}], fallback: [far, off]}\n  far: {forward: ipip, backends: [{address: 10.0.0.1, server_id: '0a01'}, {address: 10.0.0.2, server_id: '0a01'}]}\n  off: {forward: ipip, backends: [10.0.0.3]}\nservices: [{name: www, vip: 203.0.113.10, ports: 443, protocol: udp, pool: web, quic: {}}]\n",
        &[
            "xlb.yaml:5:85 pools.far.backends[1].address: server_id 0a01 is already that of 10.0.0.1 at line 5 (pools.far.backends[0].address); choose another",
            "xlb.yaml:7:81 services[0].quic: 10.0.0.3 at line 6 (pools.off.backends[0]) has no server_id; give every backend of the pool and of its fallbacks one, or remove quic",
        ],
    ),
];

/// What is allowed and hardly meant.
const WARNINGS: &[Row] = &[
    (
        "more backends asked for than there are",
        "interfaces: [eth0]\nseed: 1\npools:\n  web: {forward: ipip, backends: [10.0.0.1], fallback: far, min_healthy: 2}\n  far: {forward: ipip, backends: [10.0.0.2]}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:4:74 pools.web.min_healthy: 2 backends must be up, and the pool has only 1 with weight, so a fallback is always in use; use 1 or less",
        ],
    ),
    (
        "server IDs that nobody uses",
        "interfaces: [eth0]\nseed: 1\npools: {web: {forward: ipip, backends: [{address: 10.0.0.1, server_id: '0a01'}, {address: 10.0.0.2, server_id: '0a02'}]}}\nservices:\n- {name: www, vip: 203.0.113.10, ports: 443, protocol: udp, pool: web, unmapped: drop}\n",
        &[
            "xlb.yaml:3:51 pools.web.backends[0].address: no service with quic uses this pool, so server_id does nothing; set quic: {config_id: 0} in its service, or remove it",
        ],
    ),
    (
        "a pool that only falls back to one that is used",
        "interfaces: [eth0]\nseed: 1\npools:\n  web: {forward: ipip, backends: [10.0.0.1]}\n  old: {forward: ipip, backends: [10.0.0.2], fallback: web}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:5:3 pools.old: no service uses this pool, and its backends are not checked; name it in a service (pool: old) or as a fallback, or remove it",
        ],
    ),
];
