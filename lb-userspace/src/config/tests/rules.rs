//! What a valid file means.

use std::net::IpAddr;
use std::time::Duration;

use super::super::model::*;
use super::*;

const MINIMAL: &str = "\
interfaces: eth0
seed: 1
pools: {web: {forward: ipip, backends: [10.0.0.1]}}
services: [{name: www, vip: 203.0.113.10, ports: 443, protocol: tcp, pool: web}]
";

fn ip(text: &str) -> IpAddr {
    text.parse().expect("a test names valid addresses")
}

fn prefix(text: &str) -> Vip {
    text.parse().expect("a test names valid prefixes")
}

/// The check of pool `web`, with `health:` of the defaults and of the pool.
fn check(defaults: &str, pool: &str) -> Check {
    let text = format!(
        "interfaces: [eth0]\nseed: 1\ndefaults: {{health: {defaults}}}\n\
         pools: {{web: {{forward: ipip, health: {pool}, backends: [10.0.0.1]}}}}\n\
         services: [{{name: www, vip: 203.0.113.10, ports: [443, 80], protocol: tcp, pool: web}}]\n"
    );
    loaded(&text).config.pools.remove(0).check
}

fn written<T>(value: T, line: u32, column: u32, path: &str) -> Written<T> {
    Written { value, file: "xlb.yaml".into(), line, column, path: path.into() }
}

#[test]
fn every_key_arrives_in_the_model() {
    let Loaded { config, warnings, .. } = loaded(GOOD);
    // It answers ARP for prefixes, which is worth a word each.
    let told: Vec<_> = warnings.iter().map(|warning| warning.path.as_str()).collect();
    assert_eq!(told, ["services[2].vip[0]", "services[2].vip[1]"]);
    assert!(
        warnings.iter().all(|warning| warning.message.starts_with("vip_arp answers for every address of "))
    );
    let backend = |name: &str, address, weight| Backend {
        name: name.to_owned(),
        address: ip(address),
        weight,
        port: None,
        server_id: None,
        leaving: false,
    };
    let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
    let web_flows =
        Flows { idle_timeout: IdleTimeout { tcp: minutes(20), udp: minutes(1) }, ..Flows::default() };
    let web = Pool {
        name: "web".to_owned(),
        forward: Forward::Ipip,
        check: Check {
            kind: CheckKind::Http {
                path: "/healthz".to_owned(),
                host: Some("www.example.org".to_owned()),
                expect: vec![200..=299, 304..=304],
            },
            port: 80,
            at_own_port: true,
            interval: Duration::from_secs(2),
            timeout: Duration::from_secs(1),
            rise: 2,
            fall: 3,
        },
        on_empty: OnEmpty::Pass,
        flows: web_flows,
        slow_start: None,
        tiers: Tiers::default(),
        backends: vec![
            backend("10.0.1.11", "10.0.1.11", 100),
            backend("10.0.1.12", "10.0.1.12", 100),
            backend("web-13", "10.0.1.13", 50),
        ],
    };
    let dns = Pool {
        name: "dns".to_owned(),
        forward: Forward::L2,
        check: Check {
            kind: CheckKind::Tcp,
            port: 8053,
            at_own_port: false,
            interval: Duration::from_millis(500),
            timeout: Duration::from_millis(200),
            rise: 2,
            fall: 3,
        },
        on_empty: OnEmpty::Drop,
        flows: Flows {
            idle_timeout: IdleTimeout { tcp: Duration::from_secs(10), udp: minutes(12 * 60) },
            on_down: OnDown::Auto,
            down_grace: Duration::from_secs(5),
            on_remove: OnRemove::Move,
            drain_timeout: Some(minutes(60)),
        },
        slow_start: Some(SlowStart { duration: Duration::from_secs(90), curve: Curve::Square }),
        tiers: Tiers {
            fallback: vec![0, 2],
            min_healthy: AtLeast::Percent(50),
            panic: 20,
            failback_hold: minutes(2),
        },
        backends: vec![backend("10.0.2.1", "10.0.2.1", 100), backend("2001:db8:2::1", "2001:db8:2::1", 100)],
    };
    let with_id = |address, id: [u8; 2]| Backend {
        server_id: ServerId::new(id.to_vec()),
        ..backend(address, address, 100)
    };
    let far = Pool {
        name: "far".to_owned(),
        forward: Forward::Ipip,
        check: Check {
            kind: CheckKind::Tcp,
            port: 443,
            at_own_port: true,
            interval: Duration::from_secs(2),
            timeout: Duration::from_secs(1),
            rise: 2,
            fall: 3,
        },
        on_empty: OnEmpty::Drop,
        flows: Flows { on_down: OnDown::Keep, ..web_flows },
        slow_start: Some(SlowStart { duration: Duration::from_secs(30), curve: Curve::Linear }),
        tiers: Tiers::default(),
        backends: vec![with_id("10.0.3.1", [0x0a, 1]), with_id("10.0.3.2", [0, 0xff])],
    };
    let interface = |name: &str, mode| Interface { name: name.to_owned(), mode };
    let expected = Config {
        interfaces: vec![interface("eth0", Mode::Native), interface("eth1", Mode::Generic)],
        seed: 0x5e10_0000_0000_0000,
        outer_source: OuterSource { v4: "10.255.0.0/24".parse().ok(), v6: "2001:db8:ff::/64".parse().ok() },
        sources: Sources::default(),
        timeouts: Timeouts::default(),
        vip_arp: true,
        vlan: true,
        icmp: Icmp { echo: false, rate: 100 },
        trace: false,
        limits: Limits { vips: 100, backends: 200, slots: 65536, pins: 131_072, connections: 0 },
        api: Api { group: Some(written(Group::Name("netops".into()), 60, 14, "api.group")) },
        metrics: Metrics {
            listen: vec![
                written(([127, 0, 0, 1], 9465).into(), 61, 20, "metrics.listen[0]"),
                written(
                    ("::1".parse::<IpAddr>().expect("an address"), 9465).into(),
                    61,
                    38,
                    "metrics.listen[1]",
                ),
            ],
        },
        pools: vec![web, dns, far],
        services: vec![
            Service {
                name: "www".to_owned(),
                vips: vec![ip("203.0.113.10").into(), ip("2001:db8::10").into()],
                ports: vec![Ports::Port(80), Ports::Port(443)],
                protocols: vec![Protocol::Tcp],
                pool: 0,
                scheduler: Scheduler::Maglev,
                source_prefix: SourcePrefix::default(),
                quic: None,
                fragments: Fragments::Drop,
                unmapped: None,
            },
            Service {
                name: "dns".to_owned(),
                vips: vec![ip("203.0.113.53").into()],
                ports: vec![Ports::Port(53)],
                protocols: vec![Protocol::Udp, Protocol::Tcp],
                pool: 1,
                scheduler: Scheduler::Maglev,
                source_prefix: SourcePrefix::default(),
                quic: None,
                fragments: Fragments::Drop,
                unmapped: None,
            },
            Service {
                name: "media".to_owned(),
                vips: vec![prefix("198.51.100.0/24"), prefix("2001:db8:100::/64")],
                ports: vec![Ports::Port(554), Ports::Range(8000, 8100)],
                protocols: vec![Protocol::Tcp],
                pool: 0,
                scheduler: Scheduler::Maglev,
                source_prefix: SourcePrefix::default(),
                quic: None,
                fragments: Fragments::Drop,
                unmapped: Some(Unmapped::Reject),
            },
            Service {
                name: "all".to_owned(),
                vips: vec![ip("203.0.113.99").into()],
                ports: vec![Ports::Any],
                protocols: vec![Protocol::Udp],
                pool: 0,
                scheduler: Scheduler::SourceHash,
                source_prefix: SourcePrefix { v4: 24, v6: 56 },
                quic: None,
                fragments: Fragments::Balance,
                unmapped: Some(Unmapped::Pass),
            },
            Service {
                name: "http3".to_owned(),
                vips: vec![ip("203.0.113.98").into()],
                ports: vec![Ports::Port(443)],
                protocols: vec![Protocol::Udp],
                pool: 2,
                scheduler: Scheduler::Maglev,
                source_prefix: SourcePrefix::default(),
                quic: Some(Quic { config_id: 3 }),
                fragments: Fragments::Drop,
                unmapped: None,
            },
        ],
    };
    assert_eq!(config, expected);
    assert_eq!(config.services[0].triples().count(), 4);
    assert_eq!(config.pool_of(&config.services[1]).name, "dns");
}

#[test]
fn tags_are_left_alone_and_echo_is_answered_unless_the_file_says_otherwise() {
    let said = |text: &str| loaded(&format!("{MINIMAL}{text}")).config;
    let plain = said("");
    assert_eq!((plain.vlan, plain.icmp), (false, Icmp { echo: true, rate: 1000 }));
    assert!(said("vlan: true\n").vlan);
    assert_eq!(said("icmp: {echo: false}\n").icmp, Icmp { echo: false, rate: 1000 });
    for rate in [1, 1_000_000] {
        assert_eq!(said(&format!("icmp: {{rate: {rate}}}\n")).icmp, Icmp { echo: true, rate });
    }
}

/// Services before that of `MINIMAL`.
fn beside(service: &str) -> Config {
    let services = format!("services: [{service},");
    let text = MINIMAL.replace("services: [", &services).replace("ipip,", "ipip, health: {port: 80},");
    loaded(&text).config
}

#[test]
fn vips_are_addresses_or_prefixes_and_a_full_length_is_an_address() {
    let service = "{name: a, vip: [203.0.113.0/24, 198.51.100.1/32, '2001:db8::/32', '2001:db8:1::1/128'], \
                   ports: [80, 1-65535], protocol: tcp, pool: web}";
    let config = beside(service);
    let vips = ["203.0.113.0/24", "198.51.100.1", "2001:db8::/32", "2001:db8:1::1"].map(prefix);
    assert_eq!(config.services[0].vips, vips);
    assert_eq!(config.services[0].ports, [Ports::Port(80), Ports::Range(1, 65535)]);
    assert_eq!(config.services[0].triples().count(), 8);
    assert!(config.has_vip(ip("203.0.113.200")) && !config.has_vip(ip("203.0.114.0")));
}

#[test]
fn what_is_more_specific_may_stand_beside_what_is_less() {
    let services = "\
{name: any, vip: 203.0.113.10, ports: any, protocol: tcp, pool: web, unmapped: reject},
{name: range, vip: 203.0.113.10, ports: [400-500, 80-90], protocol: tcp, pool: web},
{name: other-protocol, vip: 203.0.113.10, ports: [400-500, 80-95], protocol: udp, pool: web},
{name: within, vip: 203.0.113.0/24, ports: any, protocol: tcp, pool: web, unmapped: pass},
{name: within-too, vip: 203.0.112.0/23, ports: [443, 400-500], protocol: tcp, pool: web, unmapped: reject}";
    let config = beside(services);
    assert_eq!(config.services.len(), 6);
    assert_eq!(config.services[0].unmapped, Some(Unmapped::Reject));
}

#[test]
fn backends_are_checked_at_the_first_single_port() {
    let port = |ports: &str, health: &str| {
        let text = MINIMAL.replace("ports: 443", &format!("ports: {ports}"));
        let text = text.replace("forward: ipip,", &format!("forward: ipip, health: {health},"));
        loaded(&text).config.pools.remove(0).check.port
    };
    assert_eq!(port("[8000-8100, 443, 80]", "{}"), 443);
    assert_eq!(port("any", "{port: 8080}"), 8080);
    assert_eq!(port("8000-8100", "{type: none}"), 0);
}

#[test]
fn fragments_go_where_every_service_of_the_vip_and_protocol_goes() {
    let services = "\
{name: a, vip: 198.51.100.1, ports: any, protocol: udp, pool: web, scheduler: source-hash, fragments: balance},
{name: b, vip: 198.51.100.1, ports: 53, protocol: udp, pool: web, scheduler: source-hash},
{name: c, vip: 198.51.100.1, ports: 53, protocol: tcp, pool: web}";
    let config = beside(services);
    assert_eq!(
        (config.services[0].fragments, config.services[1].fragments),
        (Fragments::Balance, Fragments::Drop)
    );
}

#[test]
fn what_the_file_leaves_out_has_its_documented_default() {
    let Loaded { config, warnings, .. } = loaded(MINIMAL);
    assert_eq!(warnings, []);
    let defaults = (config.vip_arp, config.trace, config.outer_source);
    assert_eq!(defaults, (false, false, OuterSource::default()));
    assert_eq!(
        config.limits,
        Limits { vips: 2048, backends: 4096, slots: 1_048_576, pins: 1_048_576, connections: 0 }
    );
    assert_eq!((config.api, config.metrics), (Api::default(), Metrics::default()));
    assert_eq!(config.interfaces[0].mode, Mode::Auto);
    let pool = &config.pools[0];
    assert_eq!((pool.on_empty, pool.backends[0].weight), (OnEmpty::Drop, 100));
    assert_eq!((pool.flows, pool.slow_start, &pool.tiers), (Flows::default(), None, &Tiers::default()));
    let seconds = Duration::from_secs;
    assert_eq!(pool.flows.idle_timeout, IdleTimeout { tcp: seconds(900), udp: seconds(60) });
    assert_eq!((pool.flows.on_down, pool.flows.down_grace), (OnDown::Auto, seconds(30)));
    assert_eq!((pool.flows.on_remove, pool.flows.drain_timeout), (OnRemove::Drain, None));
    assert_eq!((pool.tiers.min_healthy, pool.tiers.panic), (AtLeast::Count(1), 0));
    assert_eq!(pool.tiers.failback_hold, seconds(60));
    assert_eq!(
        (config.services[0].source_prefix, config.services[0].quic),
        (SourcePrefix { v4: 32, v6: 128 }, None)
    );
    assert_eq!(config.services[0].scheduler, Scheduler::Maglev);
    let check = Check {
        kind: CheckKind::Tcp,
        port: 443,
        at_own_port: true,
        interval: Duration::from_secs(2),
        timeout: Duration::from_secs(1),
        rise: 2,
        fall: 3,
    };
    assert_eq!(pool.check, check);
}

#[test]
fn gue_goes_to_its_iana_port_unless_the_pool_names_another() {
    for (name, keys, port) in [("none", "", DEFAULT_GUE_PORT), ("another", ", gue_port: 7000", 7000)] {
        let text = MINIMAL.replace("forward: ipip", &format!("forward: gue{keys}"));
        assert_eq!(loaded(&text).config.pools[0].forward, Forward::Gue { port }, "{name}");
    }
    assert_eq!(DEFAULT_GUE_PORT, 6080);
}

#[test]
fn a_seed_is_the_text_that_is_written_and_never_a_number() {
    for (name, text, seed) in [
        ("decimal digits", "1234567890123456", 0x1234_5678_9012_3456),
        ("a float to YAML", "5e10000000000000", 0x5e10_0000_0000_0000),
        ("octal to YAML 1.1", "010", 0x10),
        ("a boolean's letters in quotes", "'fade'", 0xfade),
        ("upper case", "5F1D", 0x5f1d),
        ("all bits", "ffffffffffffffff", u64::MAX),
    ] {
        let text = MINIMAL.replace("seed: 1", &format!("seed: {text}"));
        assert_eq!(loaded(&text).config.seed, seed, "{name}");
    }
    let without = MINIMAL.replace("seed: 1\n", "");
    assert_eq!(loaded(&without).config.seed, DEFAULT_SEED);
}

#[test]
fn the_health_of_a_pool_lies_over_the_defaults_field_by_field() {
    let both = check("{interval: 10s, rise: 5, path: /up}", "{type: http, fall: 7}");
    assert_eq!((both.interval, both.rise, both.fall), (Duration::from_secs(10), 5, 7));
    let path = "/up".to_owned();
    assert_eq!(both.kind, CheckKind::Http { path, host: None, expect: vec![200..=299] });
    let other = check("{type: http, path: /up}", "{type: tcp}");
    assert_eq!(other.kind, CheckKind::Tcp);
}

#[test]
fn the_checked_port_is_the_pools_then_the_defaults_then_the_first_services() {
    assert_eq!(check("{port: 1}", "{port: 2}").port, 2);
    assert_eq!(check("{port: 1}", "{}").port, 1);
    assert_eq!(check("{}", "{}").port, 443);
    assert_eq!(check("{}", "{type: none}").port, 443);
}

#[test]
fn an_unused_pool_without_a_port_has_no_check() {
    let text =
        "interfaces: [eth0]\nseed: 1\npools: {old: {forward: l2, backends: [10.0.0.1]}}\nservices: []\n";
    let check = &loaded(text).config.pools[0].check;
    assert_eq!((&check.kind, check.port), (&CheckKind::None, 0));
}

#[test]
fn durations_take_every_unit() {
    for (text, ms) in [("10ms", 10), ("1500ms", 1500), ("90s", 90_000), ("2m", 120_000)] {
        let found = check("{}", &format!("{{interval: {text}, timeout: 10ms}}")).interval;
        assert_eq!(found, Duration::from_millis(ms), "{text}");
    }
    assert_eq!(check("{}", "{interval: 1h}").interval, Duration::from_secs(3600));
}

#[test]
fn one_value_and_a_list_of_one_are_the_same() {
    let list = MINIMAL
        .replace("eth0", "[eth0]")
        .replace("203.0.113.10", "[203.0.113.10]")
        .replace("443", "[443]")
        .replace("tcp", "[tcp]");
    assert_eq!(loaded(&list).config, loaded(MINIMAL).config);
}

#[test]
fn a_byte_order_mark_and_other_line_ends_change_nothing() {
    let windows = format!("\u{feff}{}", GOOD.replace('\n', "\r\n"));
    assert_eq!(loaded(&windows), loaded(GOOD));
}

#[test]
fn one_backend_may_be_in_several_pools_and_one_vip_in_several_services() {
    let text = "\
interfaces: [eth0]
seed: 1
pools:
  a: {forward: ipip, backends: [10.0.0.1]}
  b: {forward: ipip, backends: [10.0.0.1]}
services:
- {name: a, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: a}
- {name: b, vip: 203.0.113.10, ports: 80, protocol: udp, pool: b}
";
    assert_eq!(loaded(text).warnings, []);
}

#[test]
fn words_are_the_same_in_display_and_in_json() {
    assert_eq!(format!("{:<6}|", Protocol::Udp), "udp   |");
    let limits = serde_yaml::to_string(&Interface { name: "eth0".into(), mode: Mode::Native });
    assert_eq!(limits.ok().as_deref(), Some("name: eth0\nmode: native\n"));
}

#[test]
fn every_bound_itself_is_allowed() {
    for limits in ["{vips: 1, backends: 1, slots: 8192}", "{vips: 32768, backends: 32766, slots: 134217728}"]
    {
        let text = format!("{MINIMAL}limits: {limits}\n");
        assert_eq!(loaded(&text).warnings, [], "{limits}");
    }
    for health in [
        "{interval: 10ms, timeout: 10ms, rise: 1, fall: 255, port: 1}",
        "{interval: 1h, timeout: 1ms, rise: 255, fall: 1, port: 65535}",
        "{type: http, path: /, expect: [100, 599, 100-599]}",
    ] {
        check("{}", health);
    }
}

#[test]
fn a_key_without_a_value_is_the_same_as_no_key() {
    let text = format!("{MINIMAL}mode:\nouter_source: ~\nlimits: null\ndefaults: {{health: }}\n");
    assert_eq!(loaded(&text), loaded(MINIMAL));
}

#[test]
fn what_the_host_finds_fault_with_is_told_with_its_place() {
    let Loaded { places, .. } = loaded(GOOD);
    for (subject, expected) in [
        (Subject::Interface(1), "xlb.yaml:2:27 interfaces[1].name: m; h"),
        (Subject::Backend(0, 2), "xlb.yaml:20:19 pools.web.backends[2].address: m; h"),
        (Subject::Backend(1, 1), "xlb.yaml:34:26 pools.dns.backends[1]: m; h"),
        (Subject::Vip(0, 1), "xlb.yaml:45:25 services[0].vip[1]: m; h"),
        (Subject::Vip(1, 0), "xlb.yaml:51:10 services[1].vip: m; h"),
    ] {
        assert_eq!(places.problem(subject, "m", "h").to_string(), expected);
    }
}
