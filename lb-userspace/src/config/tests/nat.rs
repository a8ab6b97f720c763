//! What is said of pools that translate addresses, and mistakes about them; as in `mistakes`.

use std::time::Duration;

use super::super::model::*;
use super::mistakes::Row;
use super::{errors, loaded, warnings};

const FILE: &str = "interfaces: [eth0]
seed: 1
fullnat: {sources: [10.0.0.5, 10.0.0.8/30, '2001:db8::5', '2001:db8::8/126'], ports: 20000-29999}
timeouts: {syn: 10s, fin: 1m, reset: 5s}
limits: {connections: 30004}
pools:
  near: {forward: nat, port: 8080, health: {type: tcp}, backends: [10.0.1.11, {address: 10.0.1.12, port: 8081}]}
  far: {forward: fullnat, backends: [10.0.2.11, '2001:db8:2::11']}
services:
  - {name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: near}
  - {name: web, vip: [203.0.113.11, '2001:db8:ff::11'], ports: 80, protocol: [tcp, udp], pool: far}
";

#[test]
fn what_is_said_of_translation_arrives_in_the_model() {
    let config = loaded(FILE).config;
    assert_eq!(warnings(FILE), [""; 0]);
    let v4 = [5, 8, 9, 10, 11].map(|last| std::net::Ipv4Addr::new(10, 0, 0, last));
    assert_eq!(config.sources.v4, v4);
    assert_eq!(config.sources.v6.len(), 5);
    assert_eq!(config.sources.ports, 20000..=29999);
    let seconds = Duration::from_secs;
    assert_eq!(config.timeouts, Timeouts { syn: seconds(10), fin: seconds(60), reset: seconds(5) });
    assert_eq!(config.limits.connections, 30000, "whole buckets of 8");
    let [near, far] = [0, 1].map(|pool| &config.pools[pool]);
    let ways: Vec<Forward> = near.backends.iter().map(|backend| near.forward_to(backend)).collect();
    assert_eq!(ways, [Forward::Nat { port: 8080 }, Forward::Nat { port: 8081 }]);
    assert_eq!(far.forward_to(&far.backends[0]), Forward::Fullnat { port: 0 });
    let checked: Vec<u16> = near.backends.iter().map(|backend| near.check_of(backend).port).collect();
    assert_eq!(checked, [8080, 8081], "where packets are sent");
    assert_eq!(far.check_of(&far.backends[0]).port, 80);
}

#[test]
fn a_port_of_the_health_check_wins_over_those_that_packets_are_sent_to() {
    let config = loaded(&FILE.replace("{type: tcp}", "{port: 9000}")).config;
    let near = &config.pools[0];
    assert!(near.backends.iter().all(|backend| near.check_of(backend).port == 9000));
}

#[test]
fn there_are_as_many_connections_as_limits_and_ports_of_sources_allow() {
    let connections = |text: &str| loaded(text).config.limits.connections;
    let by_ports = FILE.replace("limits: {connections: 30004}\n", "");
    assert_eq!(connections(&by_ports), 50000, "5 sources of each family with 10,000 ports");
    let one_v6 = by_ports.replace(", '2001:db8::8/126'", "");
    assert_eq!(connections(&one_v6), 10000, "of both families as many as of one");
    let v4_only = one_v6.replace(", '2001:db8:2::11'", "");
    assert_eq!(connections(&v4_only), 50000, "no backend is IPv6");
    let nat_only = by_ports.replace("pool: far", "pool: near").replace(", '2001:db8:ff::11'", "");
    let nat_only: String =
        nat_only.lines().filter(|line| !line.contains("far:")).map(|l| format!("{l}\n")).collect();
    assert_eq!(connections(&nat_only), 262_144, "where no source is translated, ports are no limit");
    let none = nat_only.replace("forward: nat, port: 8080", "forward: ipip").replace(", port: 8081", "");
    assert_eq!(connections(&none), 0, "nothing is translated");
}

#[test]
fn every_mistake_about_translation_is_told_with_its_place_and_a_way_out() {
    for (name, text, expected) in MISTAKES {
        assert_eq!(errors(text), *expected, "{name}:\n{text}");
    }
}

#[test]
fn sources_that_are_not_used_are_a_warning() {
    let of_one_family = FILE.replace(", '2001:db8::8/126'", "");
    assert_eq!(
        warnings(&of_one_family),
        [
            "xlb.yaml:3:20 fullnat.sources: of 5 IPv4 and 1 IPv6 sources as many of each are used as there are of both; name as many of one family as of the other"
        ]
    );
    let unused = FILE.replace("forward: fullnat", "forward: ipip");
    assert_eq!(
        warnings(&unused),
        ["xlb.yaml:3:20 fullnat.sources: no pool has `forward: fullnat`; remove it, or use it in one"]
    );
}

const MISTAKES: &[Row] = &[
    (
        "sources that are none, twice, too many, or with a host part",
        "interfaces: [eth0]\nseed: 1\nfullnat: {sources: [10.0.0, 10.0.0.5, 10.0.0.4/31, 10.1.0.0/23, 10.0.1.1/24]}\nservices: []\n",
        &[
            "xlb.yaml:3:21 fullnat.sources[0]: 10.0.0 is not a prefix; use addresses and prefixes, such as [10.0.0.5, 10.0.1.0/28]",
            "xlb.yaml:3:39 fullnat.sources[2]: 10.0.0.4/31 has addresses in common with 10.0.0.5/32 at line 3 (fullnat.sources[1]); name each address once",
            "xlb.yaml:3:52 fullnat.sources[3]: more than 256 IPv4 sources; name 256 or fewer of a family",
            "xlb.yaml:3:65 fullnat.sources[4]: 10.0.1.1/24 has bits set behind its prefix length; write 10.0.1.0/24",
        ],
    ),
    (
        "ports that are none, too low, too few, and the wrong way round",
        "interfaces: [eth0]\nseed: 1\nfullnat: {sources: 10.0.0.5, ports: 80-2000}\nservices: []\n",
        &[
            "xlb.yaml:3:37 fullnat.ports: 80-2000 is not allowed; use a range of 1024 or more within 1024-65535",
        ],
    ),
    (
        "timeouts that are too short and of no state",
        "interfaces: [eth0]\nseed: 1\ntimeouts: {syn: 500ms, fin: 2h, established: 1m}\nservices: []\n",
        &[
            "xlb.yaml:3:17 timeouts.syn: 500ms is not allowed; use 1s-1h",
            "xlb.yaml:3:29 timeouts.fin: 2h is not allowed; use 1s-1h",
            "xlb.yaml:3:33 timeouts.established: is not a known key; use syn, fin or reset",
        ],
    ),
    (
        "a port where ports stay",
        "interfaces: [eth0]\nseed: 1\npools:\n  web: {forward: ipip, port: 8080, backends: [{address: 10.0.0.1, port: 8081}]}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:4:24 pools.web.port: `forward: ipip` leaves the port as it is; remove it, or set forward: nat or fullnat",
            "xlb.yaml:4:57 pools.web.backends[0].address: 10.0.0.1 has a `port`, and `forward: ipip` leaves the port as it is; remove it, or set forward: nat or fullnat",
        ],
    ),
    (
        "fullnat without a source of the backend's family",
        "interfaces: [eth0]\nseed: 1\nfullnat: {sources: 10.0.0.5}\npools:\n  web: {forward: fullnat, backends: [10.0.0.1, '2001:db8::1']}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:5:48 pools.web.backends[1]: `forward: fullnat` to 2001:db8::1 needs an IPv6 source; add one that is routed to the balancer, such as fullnat: {sources: [2001:db8::5]}",
        ],
    ),
    (
        "nat to the other family",
        "interfaces: [eth0]\nseed: 1\npools:\n  web: {forward: nat, backends: [10.0.0.1]}\nservices: [{name: www, vip: [203.0.113.10, '2001:db8::10'], ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:5:44 services[0].vip[1]: `forward: nat` of pool web cannot lead 2001:db8::10 to 10.0.0.1 at line 4 (pools.web.backends[0]), which is of the other family; use fullnat, or a pool for each family",
        ],
    ),
    (
        "tags, fragments and connection IDs with nat",
        "interfaces: [eth0]\nseed: 1\nvlan: true\npools:\n  web: {forward: nat, backends: [{address: 10.0.0.1, server_id: '0a'}]}\nservices:\n  - {name: www, vip: 203.0.113.10, ports: 80, protocol: udp, pool: web, fragments: balance, scheduler: source-hash}\n  - {name: h3, vip: 203.0.113.11, ports: 443, protocol: udp, pool: web, quic: {}}\n",
        &[
            "xlb.yaml:3:7 vlan: `forward: nat` of pool web cannot keep VLAN tags; list the VLAN devices in `interfaces` instead, or use ipip, gue or l2",
            "xlb.yaml:7:84 services[0].fragments: fragments have no ports, and `forward: nat` of pool web needs them; remove it, or use ipip, gue or l2",
            "xlb.yaml:8:73 services[1].quic: `forward: nat` of pool web knows connections by addresses and ports, not by their IDs; remove it, or use ipip, gue or l2",
        ],
    ),
    (
        "a VIP among the sources",
        "interfaces: [eth0]\nseed: 1\nfullnat: {sources: 203.0.113.8/29}\npools:\n  web: {forward: fullnat, backends: [10.0.0.1]}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:3:20 fullnat.sources: 203.0.113.8/29 contains the VIP 203.0.113.10 of line 6 (services[0].vip); use a prefix without a VIP",
        ],
    ),
];
