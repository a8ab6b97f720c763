//! One row for each kind of mistake: what it is, the file, and every line that is printed for it.

use super::{errors, warnings};

pub(super) type Row = (&'static str, &'static str, &'static [&'static str]);

#[test]
fn every_mistake_is_told_with_its_place_and_a_way_out() {
    for (name, text, expected) in [TEXT, TOP, POOLS, HEALTH, SERVICES].into_iter().flatten() {
        assert_eq!(errors(text), *expected, "{name}:\n{text}");
    }
}

#[test]
fn every_oddity_is_a_warning_and_the_file_still_loads() {
    for (name, text, expected) in WARNINGS {
        assert_eq!(warnings(text), *expected, "{name}:\n{text}");
    }
}

/// The text as such, before any rule of the configuration.
const TEXT: &[Row] = &[
    (
        "an empty file",
        "",
        &["xlb.yaml:1:1: the file holds no configuration; begin with the interfaces: interfaces: [eth0]"],
    ),
    (
        "a file of comments",
        "# nothing here\n",
        &["xlb.yaml:1:1: the file holds no configuration; begin with the interfaces: interfaces: [eth0]"],
    ),
    (
        "a document of null",
        "null\n",
        &["xlb.yaml:1:1: the file holds no configuration; begin with the interfaces: interfaces: [eth0]"],
    ),
    (
        "a tab at the start of a line",
        "interfaces: [eth0]\npools:\n\tweb: {forward: ipip}\n",
        &["xlb.yaml:3:1: a tab indents this line; indent with spaces"],
    ),
    (
        "a tab before the first key",
        "\tinterfaces: [eth0]\n",
        &["xlb.yaml:1:1: a tab indents this line; indent with spaces"],
    ),
    (
        "a file that ends within a mapping",
        "interfaces: [eth0]\npools: {web: {forward: ip",
        &[
            "xlb.yaml:3:1: the file ends within a mapping; is a } missing in the mapping that begins at line 2?",
        ],
    ),
    (
        "a file that ends within quotes",
        "interfaces: [eth0]\nseed: '5f1d",
        &[
            "xlb.yaml:2:7: is not YAML: while scanning a quoted scalar, found unexpected end of stream; look at the indentation, and put texts with special characters in quotes",
        ],
    ),
    (
        "a list without its end",
        "interfaces: [eth0\nmode: auto\n",
        &[
            "xlb.yaml:2:5: is not YAML: illegal placement of ':' indicator; is a ] missing in the list that begins at line 1?",
        ],
    ),
    (
        "a mapping on the line of a key",
        "interfaces: [eth0]\nmode: auto: native\n",
        &[
            "xlb.yaml:2:11: is not YAML: mapping values are not allowed in this context; look at the indentation, and put texts with special characters in quotes",
        ],
    ),
    (
        "a wrong indentation",
        "interfaces: [eth0]\n  mode: auto\n",
        &[
            "xlb.yaml:2:3: is not YAML: while parsing a block mapping, did not find expected key; look at the indentation, and put texts with special characters in quotes",
        ],
    ),
    (
        "a control character",
        "interfaces: [eth0] # \u{1b}[2J\n",
        &["xlb.yaml:1:22: the character U+001B is not allowed; remove it"],
    ),
    (
        "a line separator that only YAML 1.1 knows",
        "interfaces: [eth0]\u{2028}mode: auto\n",
        &["xlb.yaml:1:19: the character U+2028 is not allowed; remove it"],
    ),
    (
        "two documents",
        "interfaces: [eth0]\n---\nmode: auto\n",
        &["xlb.yaml:2:1: a second document begins here; keep one document in a file"],
    ),
    (
        "an anchor and an alias",
        "interfaces: &all [eth0]\nservices: *all\n",
        &[
            "xlb.yaml:1:13: anchors (&) and aliases (*) are not supported; write the value out; defaults.health is there to share health settings",
            "xlb.yaml:2:11: anchors (&) and aliases (*) are not supported; write the value out; defaults.health is there to share health settings",
        ],
    ),
    (
        "an alias without an anchor",
        "interfaces: *all\n",
        &[
            "xlb.yaml:1:13: anchors (&) and aliases (*) are not supported; write the value out; defaults.health is there to share health settings",
        ],
    ),
    (
        "a tag",
        "interfaces: !!seq [eth0]\n",
        &[
            "xlb.yaml:1:13: tags (!) are not supported; leave the tag out; the key decides what kind of value it is",
        ],
    ),
    (
        "a list as a key",
        "interfaces: [eth0]\n[a]: b\n",
        &["xlb.yaml:2:1: a list or a mapping cannot be a key; use a name"],
    ),
    (
        "more levels than a configuration can have",
        "interfaces: [[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]\n",
        &["xlb.yaml:1:28: is nested deeper than 16 levels; no part of a configuration needs more than 6"],
    ),
    (
        "more brackets than the parser counts",
        "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[\n",
        &["xlb.yaml:1:256: is nested deeper than 16 levels; no part of a configuration needs more than 6"],
    ),
    (
        "a key on two lines, which readers take differently",
        "interfaces: [eth0]\nlimits: {vi\nps: 1}\n",
        &[
            "xlb.yaml:3:3: YAML readers differ in what they read here; write it in another way, such as in quotes or in block style",
        ],
    ),
    (
        "a tab behind a colon",
        "interfaces: [eth0]\npools:\n  web:\n    forward:\tipip\n    - x\n",
        &[
            "xlb.yaml:4:14: is not YAML: ':' must be followed by a valid YAML whitespace; look at the indentation, and put texts with special characters in quotes",
        ],
    ),
    (
        "a directive that only one reader knows",
        "%...\n---\ninterfaces: [eth0]\n",
        &[
            "xlb.yaml:1:2: is not YAML for every reader: could not find expected directive name; write it in another way, such as in quotes or in block style",
        ],
    ),
    (
        "a list instead of a mapping",
        "- interfaces\n",
        &["xlb.yaml:1:1: a list is not allowed here; use keys and values, such as interfaces: [eth0]"],
    ),
    (
        "a text instead of a mapping",
        "interfaces eth0\n",
        &[
            "xlb.yaml:1:1: \"interfaces eth0\" is not allowed here; use keys and values, such as interfaces: [eth0]",
        ],
    ),
    (
        "a duplicate key",
        "interfaces: [eth0]\nmode: auto\nmode: native\n",
        &["xlb.yaml:3:1 mode: is already set at line 2; remove one of the two"],
    ),
    (
        "a duplicate key deep down",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, forward: l2}\n",
        &["xlb.yaml:3:24 pools.web.forward: is already set at line 3; remove one of the two"],
    ),
    (
        "a merge key",
        "interfaces: [eth0]\n<<: {mode: auto}\n",
        &[
            "xlb.yaml:2:1 <<: is not a known key; use interfaces, mode, seed, outer_source, fullnat, timeouts, vip_arp, vlan, icmp, trace, limits, api, metrics, defaults, pools or services",
        ],
    ),
    (
        "an unknown key that is near a known one",
        "interfaces: [eth0]\nservcies: []\n",
        &["xlb.yaml:2:1 servcies: is not a known key; did you mean services?"],
    ),
    (
        "an unknown key that is near none",
        "interfaces: [eth0]\nlimits: {memory: 1}\n",
        &["xlb.yaml:2:10 limits.memory: is not a known key; use vips, backends, slots, pins or connections"],
    ),
    (
        "a colon without a space",
        "interfaces: [eth0]\nlimits: {vips:1}\n",
        &["xlb.yaml:2:10 limits.vips:1: is not a known key; put a space behind the colon"],
    ),
    (
        "a key that needs escaping",
        "interfaces: [eth0]\n\"a\\eb\": 1\n",
        &[
            "xlb.yaml:2:1 \"a\\u{1b}b\": is not a known key; use interfaces, mode, seed, outer_source, fullnat, timeouts, vip_arp, vlan, icmp, trace, limits, api, metrics, defaults, pools or services",
        ],
    ),
];

/// The top of the file, and rules over all of it.
const TOP: &[Row] = &[
    (
        "no interfaces",
        "seed: 1\n",
        &["xlb.yaml:1:1 interfaces: is missing; use a list of interfaces, such as [eth0]"],
    ),
    (
        "interfaces without a value",
        "interfaces:\n",
        &["xlb.yaml:1:1 interfaces: has no value; use a list of interfaces, such as [eth0]"],
    ),
    (
        "an empty list of interfaces",
        "interfaces: []\n",
        &["xlb.yaml:1:13 interfaces: the list is empty; use a list of interfaces, such as [eth0]"],
    ),
    (
        "interfaces as a mapping",
        "interfaces: {eth0: native}\n",
        &[
            "xlb.yaml:1:13 interfaces: a mapping is not allowed here; use a list of interfaces, such as [eth0]",
        ],
    ),
    (
        "an interface twice",
        "interfaces:\n- eth0\n- {name: eth0, mode: native}\n",
        &[
            "xlb.yaml:3:10 interfaces[1].name: eth0 is already listed at line 2 (interfaces[0]); list an interface once",
        ],
    ),
    (
        "an interface name that is too long",
        "interfaces: [abcdefghijklmnop]\n",
        &[
            "xlb.yaml:1:14 interfaces[0]: abcdefghijklmnop is not allowed; use a name that `ip link` shows (at most 15 bytes, no / : or space)",
        ],
    ),
    (
        "an interface name with a slash and one with a space",
        "interfaces: [eth/0, 'eth 0']\n",
        &[
            "xlb.yaml:1:14 interfaces[0]: eth/0 is not allowed; use a name that `ip link` shows (at most 15 bytes, no / : or space)",
            "xlb.yaml:1:21 interfaces[1]: \"eth 0\" is not allowed; use a name that `ip link` shows (at most 15 bytes, no / : or space)",
        ],
    ),
    (
        "an interface without a name",
        "interfaces: [{mode: native}]\n",
        &["xlb.yaml:1:14 interfaces[0].name: is missing; use a name that `ip link` shows"],
    ),
    (
        "an interface with an unknown mode",
        "interfaces: [{name: eth0, mode: drv}]\n",
        &["xlb.yaml:1:33 interfaces[0].mode: drv is not allowed; use auto, native or generic"],
    ),
    (
        "a group that cannot be one",
        "interfaces: [eth0]\napi: {group: net ops}\n",
        &[
            "xlb.yaml:2:14 api.group: \"net ops\" is not allowed; use the name or the number of a group that `getent group` shows",
        ],
    ),
    (
        "the number that stands for no group",
        "interfaces: [eth0]\napi: {group: 4294967295}\n",
        &["xlb.yaml:2:14 api.group: 4294967295 is not allowed; use 0-4294967294"],
    ),
    (
        "api as a word",
        "interfaces: [eth0]\napi: netops\n",
        &["xlb.yaml:2:6 api: netops is not allowed here; use a mapping such as {group: netops}"],
    ),
    (
        "an unknown key of api",
        "interfaces: [eth0]\napi: {gruop: netops}\n",
        &["xlb.yaml:2:7 api.gruop: is not a known key; did you mean group?"],
    ),
    (
        "metrics as an address",
        "interfaces: [eth0]\nmetrics: 127.0.0.1:9465\n",
        &[
            "xlb.yaml:2:10 metrics: 127.0.0.1:9465 is not allowed here; use a mapping such as {listen: \"127.0.0.1:9465\"}",
        ],
    ),
    (
        "metrics on an address without a port, a port without an address, a name, and twice on one",
        "interfaces: [eth0]\nmetrics:\n  listen:\n  - 127.0.0.1\n  - '::1'\n  - '9465'\n  - ':9465'\n  - localhost:9465\n  - 127.0.0.1:0\n  - 127.0.0.1:1\n  - 127.0.0.1:1\n  - '[ff02::1]:1'\n  - a:b\n",
        &[
            "xlb.yaml:4:5 metrics.listen[0]: 127.0.0.1 has no port; write 127.0.0.1:9465",
            "xlb.yaml:5:5 metrics.listen[1]: ::1 has no port; write [::1]:9465",
            "xlb.yaml:6:5 metrics.listen[2]: 9465 is not allowed; write the address too: 127.0.0.1:9465",
            "xlb.yaml:7:5 metrics.listen[3]: :9465 is not allowed; write the address too: 127.0.0.1:9465",
            "xlb.yaml:8:5 metrics.listen[4]: localhost:9465 is not allowed; names are not resolved: write 127.0.0.1:9465",
            "xlb.yaml:9:5 metrics.listen[5]: 127.0.0.1:0 has no port that others could know; use an address with a port, such as 127.0.0.1:9465 or [::1]:9465",
            "xlb.yaml:11:5 metrics.listen[7]: 127.0.0.1:1 is already listed at line 10 (metrics.listen[6]); remove one of the two",
            "xlb.yaml:12:5 metrics.listen[8]: [ff02::1]:1 is a multicast address; use an address with a port, such as 127.0.0.1:9465 or [::1]:9465",
            "xlb.yaml:13:5 metrics.listen[9]: a:b is not allowed; use an address with a port, such as 127.0.0.1:9465 or [::1]:9465",
        ],
    ),
    (
        "metrics on a VIP",
        "interfaces: [eth0]\nmetrics: {listen: '203.0.113.10:9465'}\npools: {web: {forward: ipip, backends: [10.0.0.1]}}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:2:19 metrics.listen: 203.0.113.10 is also the VIP at line 4 (services[0].vip); listen on an address of the host itself",
        ],
    ),
    (
        "an interface as a list",
        "interfaces: [[eth0]]\n",
        &[
            "xlb.yaml:1:14 interfaces[0]: a list is not allowed here; use a name, or a mapping such as {name: eth0, mode: native}",
        ],
    ),
    (
        "an unknown mode",
        "interfaces: [eth0]\nmode: generc\n",
        &["xlb.yaml:2:7 mode: generc is not allowed; did you mean generic?"],
    ),
    (
        "a seed that is not hexadecimal",
        "interfaces: [eth0]\nseed: hello\n",
        &[
            "xlb.yaml:2:7 seed: hello is not allowed; use 1-16 hex digits, such as those of `openssl rand -hex 8`",
        ],
    ),
    (
        "a seed with 0x",
        "interfaces: [eth0]\nseed: 0x5f1d\n",
        &["xlb.yaml:2:7 seed: 0x5f1d is not allowed; leave out the 0x: 5f1d"],
    ),
    (
        "a seed of 17 digits",
        "interfaces: [eth0]\nseed: 5f1d0c3a9be247711\n",
        &[
            "xlb.yaml:2:7 seed: 5f1d0c3a9be247711 is not allowed; use 1-16 hex digits, such as those of `openssl rand -hex 8`",
        ],
    ),
    (
        "a seed with a sign",
        "interfaces: [eth0]\nseed: +5f1d\n",
        &[
            "xlb.yaml:2:7 seed: +5f1d is not allowed; use 1-16 hex digits, such as those of `openssl rand -hex 8`",
        ],
    ),
    (
        "a seed as a list",
        "interfaces: [eth0]\nseed: [5f1d]\n",
        &["xlb.yaml:2:7 seed: a list is not allowed here; use 1-16 hex digits"],
    ),
    (
        "a YAML 1.1 boolean",
        "interfaces: [eth0]\nvip_arp: yes\ntrace: Off\n",
        &[
            "xlb.yaml:2:10 vip_arp: yes is not allowed; use true",
            "xlb.yaml:3:8 trace: Off is not allowed; use false",
        ],
    ),
    (
        "a boolean that is none",
        "interfaces: [eth0]\ntrace: maybe\n",
        &["xlb.yaml:2:8 trace: maybe is not allowed; use true or false"],
    ),
    (
        "an outer source with host bits",
        "interfaces: [eth0]\nouter_source: 10.255.0.1/24\n",
        &[
            "xlb.yaml:2:15 outer_source: 10.255.0.1/24 has bits set behind its prefix length; write 10.255.0.0/24",
        ],
    ),
    (
        "an outer source without a length",
        "interfaces: [eth0]\nouter_source: 10.255.0.1\n",
        &[
            "xlb.yaml:2:15 outer_source: 10.255.0.1 has no prefix length; write 10.255.0.1/32 for this one address",
        ],
    ),
    (
        "an outer source that is no prefix",
        "interfaces: [eth0]\nouter_source: any\n",
        &[
            "xlb.yaml:2:15 outer_source: any is not a prefix; use a prefix such as 10.255.0.0/24, or a list with one for each family",
        ],
    ),
    (
        "outer sources whose near form is none either",
        "interfaces: [eth0]\nouter_source: [127.0.0.1, 'ff02::1/16', 0.0.0.1/0]\n",
        &[
            "xlb.yaml:2:16 outer_source[0]: 127.0.0.1/32 holds loopback addresses, which cannot be a source; use a prefix such as 10.255.0.0/24, or a list with one for each family",
            "xlb.yaml:2:27 outer_source[1]: ff02::/16 holds multicast addresses, which cannot be a source; use a prefix such as 10.255.0.0/24, or a list with one for each family",
            "xlb.yaml:2:41 outer_source[2]: 0.0.0.0/0 holds unspecified addresses, which cannot be a source; use a prefix such as 10.255.0.0/24, or a list with one for each family",
        ],
    ),
    (
        "an outer source with a length that is too long",
        "interfaces: [eth0]\nouter_source: 10.255.0.0/33\n",
        &[
            "xlb.yaml:2:15 outer_source: 10.255.0.0/33 is not a prefix; use a prefix such as 10.255.0.0/24, or a list with one for each family",
        ],
    ),
    (
        "wrong values of vlan and icmp",
        "interfaces: [eth0]\nvlan: yes\nicmp: {echo: 1, rate: 0, burst: 5}\nservices: []\n",
        &[
            "xlb.yaml:2:7 vlan: yes is not allowed; use true",
            "xlb.yaml:3:14 icmp.echo: 1 is not allowed; use true",
            "xlb.yaml:3:23 icmp.rate: 0 is not allowed; use 1-1000000 messages a second",
            "xlb.yaml:3:26 icmp.burst: is not a known key; use echo or rate",
        ],
    ),
    (
        "what lies in a VIP that is a prefix",
        "interfaces: [eth0]\nouter_source: [203.0.113.128/25, '2001:db8::/64']\npools: {web: {forward: ipip, backends: [203.0.113.9]}}\nservices:\n- {name: a, vip: [203.0.113.0/24, '2001:db8::/80'], ports: 80, protocol: tcp, pool: web}\nmetrics: {listen: '203.0.113.1:9465'}\n",
        &[
            "xlb.yaml:2:16 outer_source[0]: 203.0.113.128/25 lies in the VIP 203.0.113.0/24 of line 5 (services[0].vip[0]); use a prefix without a VIP",
            "xlb.yaml:2:34 outer_source[1]: 2001:db8::/64 contains the VIP 2001:db8::/80 of line 5 (services[0].vip[1]); use a prefix without a VIP",
            "xlb.yaml:3:41 pools.web.backends[0]: 203.0.113.9 is in the VIP 203.0.113.0/24 at line 5 (services[0].vip[0]); a backend needs an address of its own: its packets would come back to the balancer",
            "xlb.yaml:6:19 metrics.listen: 203.0.113.1 is in the VIP 203.0.113.0/24 at line 5 (services[0].vip[0]); listen on an address of the host itself",
        ],
    ),
    (
        "more ICMP messages than can be counted",
        "interfaces: [eth0]\nicmp: {rate: 1000001}\nservices: []\n",
        &["xlb.yaml:2:14 icmp.rate: 1000001 is not allowed; use 1-1000000 messages a second"],
    ),
    (
        "outer sources with other forms of a length",
        "interfaces: [eth0]\nouter_source: [10.0.0.0/255.0.0.0, '2001:db8::/032']\n",
        &[
            "xlb.yaml:2:16 outer_source[0]: 10.0.0.0/255.0.0.0 has an unusual prefix length; write 10.0.0.0/8",
            "xlb.yaml:2:36 outer_source[1]: 2001:db8::/032 has an unusual prefix length; write 2001:db8::/32",
        ],
    ),
    (
        "two outer sources of one family",
        "interfaces: [eth0]\nouter_source:\n- 10.255.0.0/24\n- 10.254.0.0/24\n",
        &[
            "xlb.yaml:4:3 outer_source[1]: a second IPv4 prefix, the first is at line 3 (outer_source[0]); keep one for each family",
        ],
    ),
    (
        "an outer source that no packet can have",
        "interfaces: [eth0]\nouter_source: [0.0.0.0/0, 'fe80::/64']\n",
        &[
            "xlb.yaml:2:16 outer_source[0]: 0.0.0.0/0 holds unspecified addresses, which cannot be a source; use a prefix such as 10.255.0.0/24, or a list with one for each family",
            "xlb.yaml:2:27 outer_source[1]: fe80::/64 holds link-local addresses, which cannot be a source; use a prefix such as 10.255.0.0/24, or a list with one for each family",
        ],
    ),
    (
        "an outer source that contains a VIP",
        "interfaces: [eth0]\npools: {web: {forward: ipip}}\nservices:\n- {name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}\nouter_source: 203.0.113.0/24\n",
        &[
            "xlb.yaml:5:15 outer_source: 203.0.113.0/24 contains the VIP 203.0.113.10 of line 4 (services[0].vip); use a prefix without a VIP",
        ],
    ),
    (
        "limits as a number",
        "interfaces: [eth0]\nlimits: 4096\n",
        &[
            "xlb.yaml:2:9 limits: 4096 is not allowed here; use a mapping such as {vips: 2048, backends: 4096, slots: 1048576, pins: 1048576}",
        ],
    ),
    (
        "limits out of range",
        "interfaces: [eth0]\nlimits: {vips: 0, backends: 32767, slots: 4096}\n",
        &[
            "xlb.yaml:2:16 limits.vips: 0 is not allowed; use 1-32768",
            "xlb.yaml:2:29 limits.backends: 32767 is not allowed; use 1-32766",
            "xlb.yaml:2:43 limits.slots: 4096 is not allowed; use 8192-134217728 in steps of 4096",
        ],
    ),
    (
        "slots that are no multiple",
        "interfaces: [eth0]\nlimits: {slots: 10000}\n",
        &["xlb.yaml:2:17 limits.slots: 10000 is not a multiple of 4096; use 12288"],
    ),
    (
        "numbers that only look like numbers",
        "interfaces: [eth0]\nlimits: {vips: 0x10, backends: 010, slots: 1e6}\n",
        &[
            "xlb.yaml:2:16 limits.vips: 0x10 is not allowed; use 1-32768",
            "xlb.yaml:2:32 limits.backends: 010 is not allowed; use 1-32766",
            "xlb.yaml:2:44 limits.slots: 1e6 is not allowed; use 8192-134217728 in steps of 4096",
        ],
    ),
    (
        "more backends than the limit",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: [10.0.0.1, 10.0.0.2, 10.0.0.3]}\nlimits: {backends: 2}\n",
        &[
            "xlb.yaml:4:20 limits.backends: 2 is the limit, but the file has 3 backends; set limits.backends: 3 or more",
        ],
    ),
    (
        "more VIPs than the limit",
        "interfaces: [eth0]\npools: {web: {forward: ipip}}\nservices:\n- {name: www, vip: [203.0.113.10, 203.0.113.11], ports: [80, 443], protocol: [tcp, udp], pool: web}\nlimits: {vips: 7}\n",
        &[
            "xlb.yaml:5:16 limits.vips: 7 is the limit, but the file has 8 (VIP, port or range, protocol) triples; set limits.vips: 8 or more",
        ],
    ),
];

/// Pools and backends.
const POOLS: &[Row] = &[
    (
        "pools as a list",
        "interfaces: [eth0]\npools: [web]\n",
        &[
            "xlb.yaml:2:8 pools: a list is not allowed here; use a mapping from names to pools, such as {web: {forward: ipip, backends: [192.0.2.11]}}",
        ],
    ),
    (
        "a pool name with a space",
        "interfaces: [eth0]\npools:\n  web farm: {forward: ipip}\n",
        &[
            "xlb.yaml:3:3 pools.\"web farm\": \"web farm\" is not allowed; use 1-63 letters, digits, dots, dashes or underscores",
        ],
    ),
    (
        "a pool that is a text",
        "interfaces: [eth0]\npools:\n  web: ipip\n",
        &[
            "xlb.yaml:3:8 pools.web: ipip is not allowed here; use a mapping such as {forward: ipip, backends: [192.0.2.11]}",
        ],
    ),
    (
        "a pool without forward",
        "interfaces: [eth0]\npools:\n  web: {}\n",
        &[
            "xlb.yaml:3:3 pools.web.forward: is missing; use ipip or gue (encapsulated), l2 (backends on-link), nat or fullnat (addresses translated)",
        ],
    ),
    (
        "a forward without a value",
        "interfaces: [eth0]\npools:\n  web: {forward: }\n",
        &[
            "xlb.yaml:3:9 pools.web.forward: has no value; use ipip or gue (encapsulated), l2 (backends on-link), nat or fullnat (addresses translated)",
        ],
    ),
    (
        "an unknown forward",
        "interfaces: [eth0]\npools:\n  web: {forward: vxlan}\n",
        &["xlb.yaml:3:18 pools.web.forward: vxlan is not allowed; use ipip, gue, l2, nat or fullnat"],
    ),
    (
        "a port of GUE for another mode",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, gue_port: 6080}\n  near: {gue_port: 6080, forward: l2}\n",
        &[
            "xlb.yaml:3:24 pools.web.gue_port: `forward: ipip` sends to no UDP port; remove it, or set forward: gue",
            "xlb.yaml:4:10 pools.near.gue_port: `forward: l2` sends to no UDP port; remove it, or set forward: gue",
        ],
    ),
    (
        "a port of GUE that is none, and no mode to blame it on",
        "interfaces: [eth0]\npools:\n  web: {forward: gue, gue_port: 0}\n  far: {forward: geu, gue_port: 6080}\n",
        &[
            "xlb.yaml:3:33 pools.web.gue_port: 0 is not allowed; use 1-65535",
            "xlb.yaml:4:18 pools.far.forward: geu is not allowed; did you mean gue?",
        ],
    ),
    (
        "a misspelt forward",
        "interfaces: [eth0]\npools:\n  web: {forward: ipp}\n",
        &["xlb.yaml:3:18 pools.web.forward: ipp is not allowed; did you mean ipip?"],
    ),
    (
        "an unknown on_empty",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, on_empty: reject}\n",
        &["xlb.yaml:3:34 pools.web.on_empty: reject is not allowed; use drop, pass or all"],
    ),
    (
        "backends as a mapping",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: {a: 10.0.0.1}}\n",
        &[
            "xlb.yaml:3:34 pools.web.backends: a mapping is not allowed here; use a list of backends, such as [192.0.2.11, 192.0.2.12]",
        ],
    ),
    (
        "backends as one address",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: 10.0.0.1}\n",
        &[
            "xlb.yaml:3:34 pools.web.backends: 10.0.0.1 is not allowed here; use a list of backends, such as [192.0.2.11, 192.0.2.12]",
        ],
    ),
    (
        "a weight above 100",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: [{address: 10.0.0.1, weight: 101}]}\n",
        &["xlb.yaml:3:63 pools.web.backends[0].weight: 101 is not allowed; use 0-100 (0 takes no flows)"],
    ),
    (
        "a weight below 0",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: [{address: 10.0.0.1, weight: -1}]}\n",
        &["xlb.yaml:3:63 pools.web.backends[0].weight: -1 is not allowed; use 0-100 (0 takes no flows)"],
    ),
    (
        "a weight with a fraction",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: [{address: 10.0.0.1, weight: 0.5}]}\n",
        &["xlb.yaml:3:63 pools.web.backends[0].weight: 0.5 is not allowed; use 0-100 (0 takes no flows)"],
    ),
    (
        "a backend without an address",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: [{weight: 5}]}\n",
        &["xlb.yaml:3:35 pools.web.backends[0].address: is missing; use an address such as 192.0.2.11"],
    ),
    (
        "a backend without a value",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: [~]}\n",
        &[
            "xlb.yaml:3:35 pools.web.backends[0]: has no value; use an address, or a mapping such as {address: 192.0.2.11, weight: 50}",
        ],
    ),
    (
        "a backend as a list",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: [[10.0.0.1]]}\n",
        &[
            "xlb.yaml:3:35 pools.web.backends[0]: a list is not allowed here; use an address, or a mapping such as {address: 192.0.2.11, weight: 50}",
        ],
    ),
    (
        "a misspelt key of a backend",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: [{adress: 10.0.0.1}]}\n",
        &[
            "xlb.yaml:3:35 pools.web.backends[0].address: is missing; use an address such as 192.0.2.11",
            "xlb.yaml:3:36 pools.web.backends[0].adress: is not a known key; did you mean address?",
        ],
    ),
    (
        "a backend by name",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: [web1.example.org]}\n",
        &[
            "xlb.yaml:3:35 pools.web.backends[0]: web1.example.org is not an IP address; use an address such as 192.0.2.10 or 2001:db8::10 (names are not resolved)",
        ],
    ),
    (
        "a backend with a port",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: [10.0.0.1:80]}\n",
        &[
            "xlb.yaml:3:35 pools.web.backends[0]: 10.0.0.1:80 is not an IP address; write the address alone: 10.0.0.1",
        ],
    ),
    (
        "a backend with a prefix length",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: [10.0.0.1/32]}\n",
        &[
            "xlb.yaml:3:35 pools.web.backends[0]: 10.0.0.1/32 is not an IP address; write the address alone: 10.0.0.1",
        ],
    ),
    (
        "a backend in brackets",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: ['[2001:db8::1]']}\n",
        &[
            "xlb.yaml:3:35 pools.web.backends[0]: [2001:db8::1] is not an IP address; write the address alone: 2001:db8::1",
        ],
    ),
    (
        "an address with an octal part",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: [010.0.0.1]}\n",
        &[
            "xlb.yaml:3:35 pools.web.backends[0]: 010.0.0.1 is not an IP address; use an address such as 192.0.2.10 or 2001:db8::10 (names are not resolved)",
        ],
    ),
    (
        "the unspecified addresses",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: [0.0.0.0, '::']}\n",
        &[
            "xlb.yaml:3:35 pools.web.backends[0]: 0.0.0.0 is the unspecified address; use an address that packets can be sent to",
            "xlb.yaml:3:44 pools.web.backends[1]: :: is the unspecified address; use an address that packets can be sent to",
        ],
    ),
    (
        "the multicast addresses",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: [224.0.0.5, 'ff02::1']}\n",
        &[
            "xlb.yaml:3:35 pools.web.backends[0]: 224.0.0.5 is a multicast address; use an address that packets can be sent to",
            "xlb.yaml:3:46 pools.web.backends[1]: ff02::1 is a multicast address; use an address that packets can be sent to",
        ],
    ),
    (
        "the loopback addresses",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: [127.0.0.1, '::1']}\n",
        &[
            "xlb.yaml:3:35 pools.web.backends[0]: 127.0.0.1 is a loopback address; use an address that packets can be sent to",
            "xlb.yaml:3:46 pools.web.backends[1]: ::1 is a loopback address; use an address that packets can be sent to",
        ],
    ),
    (
        "a link-local address",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: ['fe80::1']}\n",
        &[
            "xlb.yaml:3:35 pools.web.backends[0]: fe80::1 is a link-local address; use an address that packets can be sent to",
        ],
    ),
    (
        "the broadcast address",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: [255.255.255.255]}\n",
        &[
            "xlb.yaml:3:35 pools.web.backends[0]: 255.255.255.255 is the broadcast address; use an address that packets can be sent to",
        ],
    ),
    (
        "an IPv4-mapped address",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: ['::ffff:10.0.0.1']}\n",
        &["xlb.yaml:3:35 pools.web.backends[0]: ::ffff:10.0.0.1 is an IPv4-mapped address; write 10.0.0.1"],
    ),
    (
        "addresses whose near form is none either",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: ['fe80::1%eth0', '127.0.0.1:80', '::ffff:127.0.0.1']}\n",
        &[
            "xlb.yaml:3:35 pools.web.backends[0]: fe80::1 is a link-local address; use an address that packets can be sent to",
            "xlb.yaml:3:51 pools.web.backends[1]: 127.0.0.1 is a loopback address; use an address that packets can be sent to",
            "xlb.yaml:3:67 pools.web.backends[2]: 127.0.0.1 is a loopback address; use an address that packets can be sent to",
        ],
    ),
    (
        "a backend twice",
        "interfaces: [eth0]\npools:\n  web: \n    forward: ipip\n    backends:\n    - 2001:db8::1\n    - {address: 2001:db8:0::1, name: other}\n",
        &[
            "xlb.yaml:7:17 pools.web.backends[1].address: 2001:db8::1 is already a backend of this pool at line 6 (pools.web.backends[0]); remove one of the two",
        ],
    ),
    (
        "a backend name twice",
        "interfaces: [eth0]\npools:\n  web: \n    forward: ipip\n    backends:\n    - {address: 10.0.0.1, name: a}\n    - {address: 10.0.0.2, name: a}\n",
        &[
            "xlb.yaml:7:33 pools.web.backends[1].name: a is already the name of a backend at line 6 (pools.web.backends[0].name); choose another name",
        ],
    ),
    (
        "a backend named as the address of another",
        "interfaces: [eth0]\npools:\n  web: \n    forward: ipip\n    backends:\n    - 10.0.0.1\n    - {address: 10.0.0.2, name: 10.0.0.1}\n",
        &[
            "xlb.yaml:7:33 pools.web.backends[1].name: 10.0.0.1 is already the name of a backend at line 6 (pools.web.backends[0]); choose another name",
        ],
    ),
    (
        "a backend name with a space",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: [{address: 10.0.0.1, name: web 1}]}\n",
        &[
            "xlb.yaml:3:61 pools.web.backends[0].name: \"web 1\" is not allowed; use 1-63 letters, digits, dots, dashes or underscores",
        ],
    ),
    (
        "a backend that is a VIP of two services",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: [203.0.113.10]}\nservices:\n- {name: a, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}\n- {name: b, vip: 203.0.113.10, ports: 81, protocol: tcp, pool: web}\n",
        &[
            "xlb.yaml:3:35 pools.web.backends[0]: 203.0.113.10 is also the VIP at line 5 (services[0].vip); a backend needs an address of its own: its packets would come back to the balancer",
        ],
    ),
    (
        "a backend that is also a VIP",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, backends: [203.0.113.10]}\nservices:\n- {name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}\n",
        &[
            "xlb.yaml:3:35 pools.web.backends[0]: 203.0.113.10 is also the VIP at line 5 (services[0].vip); a backend needs an address of its own: its packets would come back to the balancer",
        ],
    ),
];

/// Health checks.
const HEALTH: &[Row] = &[
    (
        "health as a word",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, health: tcp}\n",
        &[
            "xlb.yaml:3:32 pools.web.health: tcp is not allowed here; use a mapping such as {type: tcp, interval: 2s, timeout: 1s, rise: 2, fall: 3}",
        ],
    ),
    (
        "an unknown type",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, health: {type: htttp}}\n",
        &["xlb.yaml:3:39 pools.web.health.type: htttp is not allowed; did you mean http?"],
    ),
    (
        "a port of 0",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, health: {port: 0}}\n",
        &["xlb.yaml:3:39 pools.web.health.port: 0 is not allowed; use 1-65535"],
    ),
    (
        "an interval without a unit",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, health: {interval: 2}}\n",
        &["xlb.yaml:3:43 pools.web.health.interval: 2 has no unit; write 2s"],
    ),
    (
        "an interval without a unit that can only be milliseconds",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, health: {interval: 5000}}\n",
        &["xlb.yaml:3:43 pools.web.health.interval: 5000 has no unit; write 5000ms"],
    ),
    (
        "an interval with a fraction",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, health: {interval: 0.5s}}\n",
        &["xlb.yaml:3:43 pools.web.health.interval: 0.5s is not allowed; use 10ms-1h, such as 500ms or 2s"],
    ),
    (
        "an interval with an unknown unit",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, health: {interval: 2d}}\n",
        &["xlb.yaml:3:43 pools.web.health.interval: 2d is not allowed; use 10ms-1h, such as 500ms or 2s"],
    ),
    (
        "an interval that is too short",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, health: {interval: 9ms, timeout: 1ms}}\n",
        &["xlb.yaml:3:43 pools.web.health.interval: 9ms is not allowed; use 10ms-1h"],
    ),
    (
        "an interval that is too long",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, health: {interval: 2h}}\n",
        &["xlb.yaml:3:43 pools.web.health.interval: 2h is not allowed; use 10ms-1h"],
    ),
    (
        "a timeout of 0",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, health: {timeout: 0ms}}\n",
        &["xlb.yaml:3:42 pools.web.health.timeout: 0ms is not allowed; use 1ms-1h"],
    ),
    (
        "a duration beyond all numbers",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, health: {interval: 99999999999999999999h}}\n",
        &[
            "xlb.yaml:3:43 pools.web.health.interval: 99999999999999999999h is not allowed; use 10ms-1h, such as 500ms or 2s",
        ],
    ),
    (
        "a timeout longer than the interval",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, health: {interval: 1s, timeout: 1500ms}}\n",
        &[
            "xlb.yaml:3:56 pools.web.health.timeout: 1500ms is longer than the interval, 1s (line 3); use 1s or less",
        ],
    ),
    (
        "a timeout longer than the default interval",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, health: {timeout: 3s}}\n",
        &[
            "xlb.yaml:3:42 pools.web.health.timeout: 3s is longer than the interval, 2s (the built-in default); use 2s or less",
        ],
    ),
    (
        "an interval shorter than the timeout of the defaults",
        "interfaces: [eth0]\ndefaults: {health: {timeout: 2s}}\npools:\n  a: {forward: ipip, health: {interval: 500ms}}\n",
        &[
            "xlb.yaml:4:41 pools.a.health.interval: 500ms is shorter than the timeout, 2s (line 2); set timeout: 500ms or less as well",
        ],
    ),
    (
        "defaults that contradict themselves, reported once",
        "interfaces: [eth0]\ndefaults: {health: {timeout: 5s}}\npools:\n  a: {forward: ipip}\n  b: {forward: ipip, health: {rise: 3}}\n",
        &[
            "xlb.yaml:2:30 defaults.health.timeout: 5s is longer than the interval, 2s (the built-in default); use 2s or less",
        ],
    ),
    (
        "rise and fall out of range",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, health: {rise: 0, fall: 256}}\n",
        &[
            "xlb.yaml:3:39 pools.web.health.rise: 0 is not allowed; use 1-255",
            "xlb.yaml:3:48 pools.web.health.fall: 256 is not allowed; use 1-255",
        ],
    ),
    (
        "http keys with tcp",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, health: {path: /x, host: a.example, expect: 200}}\n",
        &[
            "xlb.yaml:3:39 pools.web.health.path: path is for type http, but the type is tcp; set type: http, or remove path",
            "xlb.yaml:3:49 pools.web.health.host: host is for type http, but the type is tcp; set type: http, or remove host",
            "xlb.yaml:3:68 pools.web.health.expect: expect is for type http, but the type is tcp; set type: http, or remove expect",
        ],
    ),
    (
        "http keys with none",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, health: {type: none, path: /x}}\n",
        &[
            "xlb.yaml:3:51 pools.web.health.path: path is for type http, but the type is none; set type: http, or remove path",
        ],
    ),
    (
        "http keys in defaults that no pool can use",
        "interfaces: [eth0]\ndefaults: {health: {path: /x}}\npools: {a: {forward: ipip}}\n",
        &[
            "xlb.yaml:2:27 defaults.health.path: path is for type http, but neither the defaults nor a pool has it; set type: http, or remove path",
        ],
    ),
    (
        "mistakes of the defaults next to those of a pool",
        "interfaces: [eth0]\ndefaults: {health: {interval: 2, typ: http}}\npools:\n  a: {forward: ipip, health: {type: tcp, path: /x}}\n  b: {forward: ipip, health: {interval: 1s, timeout: 2s}}\n",
        &[
            "xlb.yaml:2:31 defaults.health.interval: 2 has no unit; write 2s",
            "xlb.yaml:2:34 defaults.health.typ: is not a known key; did you mean type?",
            "xlb.yaml:4:48 pools.a.health.path: path is for type http, but the type is tcp; set type: http, or remove path",
            "xlb.yaml:5:54 pools.b.health.timeout: 2s is longer than the interval, 1s (line 5); use 1s or less",
        ],
    ),
    (
        "a path without a slash",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, health: {type: http, path: healthz}}\n",
        &["xlb.yaml:3:51 pools.web.health.path: healthz is not allowed; begin with a slash: /healthz"],
    ),
    (
        "a path with a space",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, health: {type: http, path: /a b}}\n",
        &[
            "xlb.yaml:3:51 pools.web.health.path: \"/a b\" is not allowed; percent-encode spaces and other special characters (%20 is a space)",
        ],
    ),
    (
        "a path with a fragment",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, health: {type: http, path: /a#b}}\n",
        &[
            "xlb.yaml:3:51 pools.web.health.path: /a#b is not allowed; a fragment (#) is never sent to a server, leave it out",
        ],
    ),
    (
        "a host with a scheme",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, health: {type: http, host: 'http://a.example'}}\n",
        &[
            "xlb.yaml:3:51 pools.web.health.host: http://a.example is not allowed; use a host name such as www.example.org",
        ],
    ),
    (
        "a status that is none",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, health: {type: http, expect: 20x}}\n",
        &[
            "xlb.yaml:3:53 pools.web.health.expect: 20x is not allowed; use a status (200) or a range (200-299) within 100-599",
        ],
    ),
    (
        "a status range that is reversed",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, health: {type: http, expect: 299-200}}\n",
        &["xlb.yaml:3:53 pools.web.health.expect: 299-200 is an empty range; write 200-299"],
    ),
    (
        "statuses out of range in a list",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, health: {type: http, expect: [200, 600, 99-200]}}\n",
        &[
            "xlb.yaml:3:59 pools.web.health.expect[1]: 600 is not allowed; use a status (200) or a range (200-299) within 100-599",
            "xlb.yaml:3:64 pools.web.health.expect[2]: 99-200 is not allowed; use a status (200) or a range (200-299) within 100-599",
        ],
    ),
    (
        "an empty list of statuses",
        "interfaces: [eth0]\npools:\n  web: {forward: ipip, health: {type: http, expect: []}}\n",
        &[
            "xlb.yaml:3:53 pools.web.health.expect: the list is empty; use a status (200), a range (200-299) or a list of them",
        ],
    ),
    (
        "an unknown key of the defaults",
        "interfaces: [eth0]\ndefaults: {helth: {type: tcp}}\n",
        &["xlb.yaml:2:12 defaults.helth: is not a known key; did you mean health?"],
    ),
];

/// Services.
const SERVICES: &[Row] = &[
    (
        "services as a mapping",
        "interfaces: [eth0]\nservices:\n  www: {vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}\n",
        &[
            "xlb.yaml:3:3 services: a mapping is not allowed here; use a list such as [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]",
        ],
    ),
    (
        "a service that is a text",
        "interfaces: [eth0]\nservices: [www]\n",
        &[
            "xlb.yaml:2:12 services[0]: www is not allowed here; use a mapping such as {name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}",
        ],
    ),
    (
        "a service without anything",
        "interfaces: [eth0]\nservices: [{}]\n",
        &[
            "xlb.yaml:2:12 services[0].name: is missing; use a name such as www",
            "xlb.yaml:2:12 services[0].pool: is missing; use the name of a pool",
            "xlb.yaml:2:12 services[0].ports: is missing; use a port such as 80, a range such as 8000-8100, a list of them, or any",
            "xlb.yaml:2:12 services[0].protocol: is missing; use tcp, udp or [tcp, udp]",
            "xlb.yaml:2:12 services[0].vip: is missing; use an address such as 203.0.113.10, a prefix, or a list of them",
        ],
    ),
    (
        "a service name with a space",
        "interfaces: [eth0]\npools: {web: {forward: ipip}}\nservices: [{name: w w, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:3:19 services[0].name: \"w w\" is not allowed; use 1-63 letters, digits, dots, dashes or underscores",
        ],
    ),
    (
        "a service name twice",
        "interfaces: [eth0]\npools: {web: {forward: ipip}}\nservices:\n- {name: a, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}\n- {name: a, vip: 203.0.113.11, ports: 80, protocol: tcp, pool: web}\n",
        &[
            "xlb.yaml:5:10 services[1].name: a is already the name of a service at line 4 (services[0].name); choose another name",
        ],
    ),
    (
        "an unknown pool near a known one",
        "interfaces: [eth0]\npools: {web: {forward: ipip}}\nservices:\n- {name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: wbe}\n",
        &["xlb.yaml:4:66 services[0].pool: there is no pool wbe; did you mean web?"],
    ),
    (
        "an unknown pool near none",
        "interfaces: [eth0]\npools: {web: {forward: ipip}}\nservices:\n- {name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: database}\n",
        &["xlb.yaml:4:66 services[0].pool: there is no pool database; use web"],
    ),
    (
        "an unknown pool where there are none",
        "interfaces: [eth0]\nservices: [{name: a, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:2:73 services[0].pool: there is no pool web; add it, such as pools: {web: {forward: ipip, backends: [192.0.2.11]}}",
        ],
    ),
    (
        "port instead of ports",
        "interfaces: [eth0]\npools: {web: {forward: ipip}}\nservices:\n- {name: www, vip: 203.0.113.10, port: 80, protocol: tcp, pool: web}\n",
        &[
            "xlb.yaml:4:3 services[0].ports: is missing; use a port such as 80, a range such as 8000-8100, a list of them, or any",
            "xlb.yaml:4:34 services[0].port: is not a known key; did you mean ports?",
        ],
    ),
    (
        "a port of 0 and one of 65536",
        "interfaces: [eth0]\npools: {web: {forward: ipip}}\nservices:\n- {name: www, vip: 203.0.113.10, ports: [0, 65536], protocol: tcp, pool: web}\n",
        &[
            "xlb.yaml:4:42 services[0].ports[0]: 0 is not allowed; use 1-65535, a range such as 8000-8100, or any",
            "xlb.yaml:4:45 services[0].ports[1]: 65536 is not allowed; use 1-65535, a range such as 8000-8100, or any",
        ],
    ),
    (
        "ranges that are none",
        "interfaces: [eth0]\npools: {web: {forward: ipip, health: {port: 80}}, dns: {forward: ipip, health: {port: 80}}}\nservices:\n- {name: www, vip: 203.0.113.10, ports: [8010-8000, 80-80, 80-, 70000-70001], protocol: tcp, pool: web}\n",
        &[
            "xlb.yaml:4:42 services[0].ports[0]: 8010-8000 is an empty range; write 8000-8010",
            "xlb.yaml:4:53 services[0].ports[1]: 80-80 is one port; write 80",
            "xlb.yaml:4:60 services[0].ports[2]: 80- is not allowed; use 1-65535, a range such as 8000-8100, or any",
            "xlb.yaml:4:65 services[0].ports[3]: 70000-70001 is not allowed; use 1-65535, a range such as 8000-8100, or any",
        ],
    ),
    (
        "any beside other ports",
        "interfaces: [eth0]\npools: {web: {forward: ipip, health: {port: 80}}, dns: {forward: ipip, health: {port: 80}}}\nservices:\n- {name: www, vip: 203.0.113.10, ports: [80, any], protocol: tcp, pool: web}\n",
        &[
            "xlb.yaml:4:46 services[0].ports[1]: any stands beside other ports, and holds them; write ports: any",
        ],
    ),
    (
        "prefixes that are none",
        "interfaces: [eth0]\npools: {web: {forward: ipip, health: {port: 80}}, dns: {forward: ipip, health: {port: 80}}}\nservices:\n- {name: www, vip: [203.0.113.10/24, 203.0.113.0/33, 10.0.0.0/255.0.0.0, web/24, '2001:db8::1/64', 0.0.0.0/0, 224.0.0.0/8, '::/0'], ports: 80, protocol: tcp, pool: web}\n",
        &[
            "xlb.yaml:4:21 services[0].vip[0]: 203.0.113.10/24 has bits set behind its prefix length; write 203.0.113.0/24",
            "xlb.yaml:4:38 services[0].vip[1]: 203.0.113.0/33 is not a prefix; use an address, or a prefix such as 203.0.113.0/24",
            "xlb.yaml:4:54 services[0].vip[2]: 10.0.0.0/255.0.0.0 has an unusual prefix length; write 10.0.0.0/8",
            "xlb.yaml:4:74 services[0].vip[3]: web/24 is not an IP address; use an address such as 192.0.2.10 or 2001:db8::10 (names are not resolved)",
            "xlb.yaml:4:82 services[0].vip[4]: 2001:db8::1/64 has bits set behind its prefix length; write 2001:db8::/64",
            "xlb.yaml:4:100 services[0].vip[5]: 0.0.0.0/0 holds unspecified addresses, which cannot be VIPs; use an address, or a prefix such as 203.0.113.0/24",
            "xlb.yaml:4:111 services[0].vip[6]: 224.0.0.0/8 holds multicast addresses, which cannot be VIPs; use an address, or a prefix such as 203.0.113.0/24",
            "xlb.yaml:4:124 services[0].vip[7]: ::/0 holds unspecified or loopback addresses, which cannot be VIPs; use an address, or a prefix such as 203.0.113.0/24",
        ],
    ),
    (
        "more prefix lengths than the packet path tries",
        "interfaces: [eth0]\npools: {web: {forward: ipip, health: {port: 80}}, dns: {forward: ipip, health: {port: 80}}}\nservices:\n- {name: www, vip: [10.0.0.0/24, 10.1.0.0/25, 10.2.0.0/26, 10.3.0.0/24, 10.4.0.0/27, 10.5.0.0/28, '2001:db8::/64'], ports: 80, protocol: tcp, pool: web}\n",
        &[
            "xlb.yaml:4:86 services[0].vip[5]: 10.5.0.0/28 has a further prefix length, and IPv4 VIPs may have 4: /27, /26, /25, /24; split it into prefixes of one of these lengths",
        ],
    ),
    (
        "ranges that overlap",
        "interfaces: [eth0]\npools: {web: {forward: ipip, health: {port: 80}}, dns: {forward: ipip, health: {port: 80}}}\nservices:\n- {name: a, vip: 203.0.113.10, ports: 8000-8100, protocol: tcp, pool: web}\n- {name: b, vip: [203.0.113.11, 203.0.113.10], ports: [9000-9100, 8050-8200], protocol: [tcp, udp], pool: web}\n",
        &[
            "xlb.yaml:5:67 services[1].ports[1]: 8050-8200 overlaps 8000-8100 of a at line 4 (services[0].ports), on 203.0.113.10 tcp; split the ranges so that each port is in one",
        ],
    ),
    (
        "ranges of one service that overlap",
        "interfaces: [eth0]\npools: {web: {forward: ipip, health: {port: 80}}, dns: {forward: ipip, health: {port: 80}}}\nservices:\n- {name: a, vip: 203.0.113.0/24, ports: [8000-8100, 8100-8200], protocol: tcp, pool: web}\n",
        &[
            "xlb.yaml:4:53 services[0].ports[1]: 8100-8200 overlaps 8000-8100 of a at line 4 (services[0].ports[0]), on 203.0.113.0/24 tcp; split the ranges so that each port is in one",
        ],
    ),
    (
        "two services for any port, and two for one port of a prefix",
        "interfaces: [eth0]\npools: {web: {forward: ipip, health: {port: 80}}, dns: {forward: ipip, health: {port: 80}}}\nservices:\n- {name: a, vip: [203.0.113.10, 203.0.113.0/24], ports: any, protocol: tcp, pool: web}\n- {name: b, vip: 203.0.113.10, ports: any, protocol: tcp, pool: web}\n- {name: c, vip: 203.0.113.0/24, ports: 80, protocol: tcp, pool: web}\n- {name: d, vip: 203.0.113.0/24, ports: [80, 443], protocol: tcp, pool: web}\n- {name: e, vip: 203.0.113.0/24, ports: any, protocol: tcp, pool: web}\n",
        &[
            "xlb.yaml:5:18 services[1].vip: 203.0.113.10:any tcp already belongs to a at line 4 (services[0].vip[0]); remove it from one of the two services",
            "xlb.yaml:7:18 services[3].vip: 203.0.113.0/24:80 tcp already belongs to c at line 6 (services[2].vip); remove it from one of the two services",
            "xlb.yaml:8:18 services[4].vip: 203.0.113.0/24:any tcp already belongs to a at line 4 (services[0].vip[1]); remove it from one of the two services",
        ],
    ),
    (
        "more port rules than one list holds",
        "interfaces: [eth0]\npools: {web: {forward: ipip, health: {port: 80}}, dns: {forward: ipip, health: {port: 80}}}\nservices:\n- {name: a, vip: 203.0.113.0/24, ports: [1, 2, 3, 4, 5, 6, 7], protocol: [tcp, udp], pool: web}\n- {name: b, vip: 203.0.113.10, ports: [80, 443, 8000-8100, 9000-9100], protocol: [tcp, udp], pool: web}\n- {name: c, vip: 203.0.113.11, ports: [80, 443], protocol: [tcp, udp], pool: web}\n",
        &[
            "xlb.yaml:5:40 services[1].ports[0]: with these, 203.0.113.10 has 18 ranges, any-ports and ports of prefixes, and 16 are possible (each protocol counts); use fewer and wider ranges, or any",
        ],
    ),
    (
        "balanced fragments without source-hash",
        "interfaces: [eth0]\npools: {web: {forward: ipip, health: {port: 80}}, dns: {forward: ipip, health: {port: 80}}}\nservices:\n- {name: a, vip: 203.0.113.10, ports: any, protocol: udp, pool: web, fragments: balance}\n",
        &[
            "xlb.yaml:4:81 services[0].fragments: balance needs scheduler: source-hash, because fragments have no ports; set scheduler: source-hash, or fragments: drop",
        ],
    ),
    (
        "balanced fragments of a prefix",
        "interfaces: [eth0]\npools: {web: {forward: ipip, health: {port: 80}}, dns: {forward: ipip, health: {port: 80}}}\nservices:\n- {name: a, vip: 203.0.113.0/24, ports: any, protocol: udp, pool: web, scheduler: source-hash, fragments: balance}\n",
        &[
            "xlb.yaml:4:107 services[0].fragments: balance is for addresses, and the VIP 203.0.113.0/24 is a prefix; list its addresses in a service of their own",
        ],
    ),
    (
        "balanced fragments of a VIP with two pools",
        "interfaces: [eth0]\npools: {web: {forward: ipip, health: {port: 80}}, dns: {forward: ipip, health: {port: 80}}}\nservices:\n- {name: a, vip: 203.0.113.10, ports: 53, protocol: udp, pool: dns}\n- {name: b, vip: 203.0.113.10, ports: any, protocol: udp, pool: web, scheduler: source-hash, fragments: balance}\n",
        &[
            "xlb.yaml:5:105 services[1].fragments: fragments of 203.0.113.10 udp have no ports, but a at line 4 (services[0].name) goes to another pool; send all services of the VIP and protocol to one pool with source-hash, or set fragments: drop",
        ],
    ),
    (
        "balanced fragments of a VIP with two schedulers",
        "interfaces: [eth0]\npools: {web: {forward: ipip, health: {port: 80}}, dns: {forward: ipip, health: {port: 80}}}\nservices:\n- {name: a, vip: 203.0.113.0/24, ports: 53, protocol: udp, pool: web}\n- {name: b, vip: 203.0.113.10, ports: any, protocol: udp, pool: web, scheduler: source-hash, fragments: balance}\n",
        &[
            "xlb.yaml:5:105 services[1].fragments: fragments of 203.0.113.0/24 udp have no ports, but a at line 4 (services[0].name) has another scheduler; send all services of the VIP and protocol to one pool with source-hash, or set fragments: drop",
        ],
    ),
    (
        "two words on what is unmapped",
        "interfaces: [eth0]\npools: {web: {forward: ipip, health: {port: 80}}, dns: {forward: ipip, health: {port: 80}}}\nservices:\n- {name: a, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web, unmapped: pass}\n- {name: b, vip: 203.0.113.10, ports: 443, protocol: tcp, pool: web}\n- {name: c, vip: [203.0.113.11, 203.0.113.10], ports: 53, protocol: udp, pool: web, unmapped: drop}\n",
        &[
            "xlb.yaml:6:95 services[2].unmapped: drop, but a says pass of 203.0.113.10 at line 4 (services[0].unmapped); say the same in both, or leave it out in one",
        ],
    ),
    (
        "unknown words for fragments and the unmapped",
        "interfaces: [eth0]\npools: {web: {forward: ipip, health: {port: 80}}, dns: {forward: ipip, health: {port: 80}}}\nservices:\n- {name: a, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web, fragments: pass, unmapped: refuse}\n",
        &[
            "xlb.yaml:4:80 services[0].fragments: pass is not allowed; use drop or balance",
            "xlb.yaml:4:96 services[0].unmapped: refuse is not allowed; use drop, pass or reject",
        ],
    ),
    (
        "a pool whose first service has no single port",
        "interfaces: [eth0]\npools: {web: {forward: ipip}, dns: {forward: ipip}}\nservices:\n- {name: a, vip: 203.0.113.10, ports: 8000-8100, protocol: tcp, pool: web}\n- {name: b, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}\n- {name: c, vip: 203.0.113.11, ports: 80, protocol: tcp, pool: dns}\n",
        &[
            "xlb.yaml:2:9 pools.web.health.port: is missing: a, the first service that uses this pool, has no single port to check at; set health: {port: 80}, or {type: none}",
        ],
    ),
    (
        "an empty list of ports",
        "interfaces: [eth0]\npools: {web: {forward: ipip}}\nservices:\n- {name: www, vip: 203.0.113.10, ports: [], protocol: tcp, pool: web}\n",
        &[
            "xlb.yaml:4:41 services[0].ports: the list is empty; use a port such as 80, a range such as 8000-8100, a list of them, or any",
        ],
    ),
    (
        "a port twice",
        "interfaces: [eth0]\npools: {web: {forward: ipip}}\nservices:\n- {name: www, vip: 203.0.113.10, ports: [80, 80], protocol: tcp, pool: web}\n",
        &[
            "xlb.yaml:4:46 services[0].ports[1]: 80 is already listed at line 4 (services[0].ports[0]); remove one of the two",
        ],
    ),
    (
        "a VIP twice in one service",
        "interfaces: [eth0]\npools: {web: {forward: ipip}}\nservices:\n- {name: www, vip: [203.0.113.10, 203.0.113.10], ports: 80, protocol: tcp, pool: web}\n",
        &[
            "xlb.yaml:4:35 services[0].vip[1]: 203.0.113.10 is already listed at line 4 (services[0].vip[0]); remove one of the two",
        ],
    ),
    (
        "a protocol twice",
        "interfaces: [eth0]\npools: {web: {forward: ipip}}\nservices:\n- {name: www, vip: 203.0.113.10, ports: 80, protocol: [tcp, tcp], pool: web}\n",
        &[
            "xlb.yaml:4:61 services[0].protocol[1]: tcp is already listed at line 4 (services[0].protocol[0]); remove one of the two",
        ],
    ),
    (
        "an unknown protocol",
        "interfaces: [eth0]\npools: {web: {forward: ipip}}\nservices:\n- {name: www, vip: 203.0.113.10, ports: 80, protocol: sctp, pool: web}\n",
        &["xlb.yaml:4:55 services[0].protocol: sctp is not allowed; use tcp or udp"],
    ),
    (
        "an unknown scheduler",
        "interfaces: [eth0]\npools: {web: {forward: ipip}}\nservices:\n- {name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web, scheduler: rr}\n",
        &[
            "xlb.yaml:4:82 services[0].scheduler: rr is not allowed; use maglev, source-hash, round-robin, weighted-round-robin, random, least-connections or least-response-time",
        ],
    ),
    (
        "a VIP that is multicast",
        "interfaces: [eth0]\npools: {web: {forward: ipip}}\nservices:\n- {name: www, vip: 224.0.0.1, ports: 80, protocol: tcp, pool: web}\n",
        &[
            "xlb.yaml:4:20 services[0].vip: 224.0.0.1 is a multicast address; use an address that packets can be sent to",
        ],
    ),
    (
        "a VIP with a port",
        "interfaces: [eth0]\npools: {web: {forward: ipip}}\nservices:\n- {name: www, vip: '[2001:db8::1]:80', ports: 80, protocol: tcp, pool: web}\n",
        &[
            "xlb.yaml:4:20 services[0].vip: [2001:db8::1]:80 is not an IP address; write the address alone: 2001:db8::1",
        ],
    ),
    (
        "two services on one triple",
        "interfaces: [eth0]\npools: {web: {forward: ipip}}\nservices:\n- {name: a, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}\n- {name: b, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}\n",
        &[
            "xlb.yaml:5:18 services[1].vip: 203.0.113.10:80 tcp already belongs to a at line 4 (services[0].vip); remove it from one of the two services",
        ],
    ),
    (
        "two services that share several triples",
        "interfaces: [eth0]\npools: {web: {forward: ipip}}\nservices:\n- {name: a, vip: 203.0.113.10, ports: [80, 443], protocol: tcp, pool: web}\n- {name: b, vip: [2001:db8::1, 203.0.113.10], ports: [443, 80], protocol: [udp, tcp], pool: web}\n",
        &[
            "xlb.yaml:5:32 services[1].vip[1]: 203.0.113.10:443 tcp (and 1 more) already belongs to a at line 4 (services[0].vip); remove it from one of the two services",
        ],
    ),
    (
        "no services",
        "interfaces: [eth0]\nseed: 1\n",
        &[
            "xlb.yaml:1:1 services: is missing, so the file may be cut off; use a list such as [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}], or services: [] where none are meant",
        ],
    ),
];

/// What is allowed and hardly meant.
const WARNINGS: &[Row] = &[
    (
        "no seed",
        "interfaces: [eth0]\npools: {web: {forward: ipip, backends: [10.0.0.1]}}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:1:1 seed: is missing, so a public one is used: anyone can compute which flow meets which backend; set the same on every balancer of the group, such as the output of `openssl rand -hex 8`",
        ],
    ),
    (
        "an empty list of services",
        "interfaces: [eth0]\nseed: 1\nservices: []\n",
        &[
            "xlb.yaml:3:11 services: there are none, so nothing is balanced; use a list such as [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]",
        ],
    ),
    (
        "a pool without backends that drops",
        "interfaces: [eth0]\nseed: 1\npools: {web: {forward: ipip}}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:3:9 pools.web.backends: the pool has no backends, so all its packets are dropped; use a list of backends, such as [192.0.2.11, 192.0.2.12]",
        ],
    ),
    (
        "a pool with an empty list of backends that passes",
        "interfaces: [eth0]\nseed: 1\npools: {web: {forward: ipip, on_empty: pass, backends: []}}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:3:56 pools.web.backends: the pool has no backends, so all its packets go to the host itself; use a list of backends, such as [192.0.2.11, 192.0.2.12]",
        ],
    ),
    (
        "a pool whose backends all have weight 0",
        "interfaces: [eth0]\nseed: 1\npools: {web: {forward: ipip, backends: [{address: 10.0.0.1, weight: 0}]}}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:3:40 pools.web.backends: every backend has weight 0, so none takes a new flow; give one of them a weight of 1-100",
        ],
    ),
    (
        "a pool that no service uses",
        "interfaces: [eth0]\nseed: 1\npools:\n  web: {forward: ipip, backends: [10.0.0.1]}\n  old: {forward: ipip, backends: [10.0.0.2]}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:5:3 pools.old: no service uses this pool, and its backends are not checked; name it in a service (pool: old) or as a fallback, or remove it",
        ],
    ),
    (
        "an unused pool with a port of its own",
        "interfaces: [eth0]\nseed: 1\npools:\n  web: {forward: ipip, backends: [10.0.0.1]}\n  old: {forward: ipip, health: {port: 80}, backends: [10.0.0.2]}\nservices: [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]\n",
        &[
            "xlb.yaml:5:3 pools.old: no service uses this pool; name it in a service (pool: old) or as a fallback, or remove it",
        ],
    ),
];
