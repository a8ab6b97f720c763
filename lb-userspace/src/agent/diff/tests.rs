use std::time::Duration;

use super::*;
use crate::agent::overrides::Cause;
use crate::config;

const FILE: &str = "interfaces: [eth0]
seed: 1
pools:
  web:
    forward: ipip
    health: {type: tcp, interval: 2s}
    backends: [{address: 10.0.0.1, name: web1}, {address: 10.0.0.2, name: web2}, {address: 10.0.0.3, name: web3}]
services:
  - {name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}
  - {name: dns, vip: 203.0.113.11, ports: 53, protocol: [udp, tcp], pool: web}
";

fn parsed(text: &str) -> Config {
    config::parse("xlb.yaml", text).map(|loaded| loaded.config).unwrap_or_else(|wrong| panic!("{wrong}"))
}

/// The file with a text replaced that is in it.
fn changed(from: &str, to: &str) -> Config {
    assert!(FILE.contains(from), "{from}");
    parsed(&FILE.replace(from, to))
}

fn lines(changes: &[Change]) -> Vec<String> {
    let line = |change: &Change| {
        let keys = change.keys.iter().map(|key| {
            let [from, to] = [&key.from, &key.to].map(|value| value.as_deref().unwrap_or("-"));
            format!(" {}: {from} -> {to}", key.key)
        });
        format!("{:?} {}{}", change.kind, change.subject, keys.collect::<String>())
    };
    changes.iter().map(line).collect()
}

#[test]
fn each_key_that_differs_is_told_with_both_values() {
    for (from, to, told) in [
        ("seed: 1", "seed: 1", &[][..]),
        ("seed: 1", "seed: 2", &["Changed top of the file seed: one -> another"]),
        ("seed: 1", "seed: 1\nvlan: true", &["Changed top of the file vlan: false -> true"]),
        ("[eth0]", "[eth0, eth1]", &["Added interface eth1 mode: - -> auto"]),
        ("[eth0]", "[{name: eth0, mode: native}]", &["Changed interface eth0 mode: auto -> native"]),
        ("interval: 2s", "interval: 5s", &["Changed pool web health.interval: 2s -> 5s"]),
        ("health:", "drain_timeout: 5m\n    health:", &["Changed pool web drain_timeout: never -> 5m"]),
        ("name: web2", "name: two", &["Changed backend web/web2 name: web2 -> two"]),
        ("name: web2", "name: web2, weight: 7", &["Changed backend web/web2 weight: 100 -> 7"]),
        ("ports: 80,", "ports: [80, 443],", &["Changed service www ports: 80 -> 80, 443"]),
        (
            ", {address: 10.0.0.3, name: web3}",
            "",
            &[
                "Removed backend web/web3 name: web3 -> - port: none -> - server_id: none -> - weight: 100 -> -",
            ],
        ),
    ] {
        assert_eq!(lines(&changes(&parsed(FILE), &changed(from, to))), told, "{from} -> {to}");
    }
    let names = |text: &str| -> Vec<String> {
        let changes = changes(&parsed(FILE), &parsed(text));
        changes.iter().map(|change| format!("{:?} {}", change.kind, change.subject)).collect()
    };
    let without_dns: String =
        FILE.lines().filter(|line| !line.contains("dns")).map(|l| format!("{l}\n")).collect();
    assert_eq!(names(&without_dns), ["Removed service dns"]);
    let order = FILE.replace("  - {name: www", "  - {name: xxx").replace("  - {name: dns", "  - {name: www");
    let order = parsed(&order.replace("xxx", "dns"));
    assert!(!changes(&parsed(FILE), &order).is_empty(), "services swapped what they say");
}

/// What would change, with everybody up, and so many packets a second of each backend.
fn tables(after: &Config, rates: &[(&str, f64)]) -> Vec<TableChange> {
    let before = parsed(FILE);
    let up = |config: &Config| World {
        up: keys(config).map(|(_, pool, backend)| ((pool, backend), true)).collect(),
        ..World::default()
    };
    let rates = rates.iter().map(|(address, rate)| {
        (BackendKey { pool: "web".to_owned(), address: address.parse().unwrap() }, *rate)
    });
    let rates: Rates = rates.collect();
    let (old, new) = (desired(&before, &up(&before)), desired(after, &up(after)));
    Tables::new((&before, &old), (after, &new), &rates).changes()
}

#[track_caller]
fn near(found: f64, wanted: f64) {
    assert!((found - wanted).abs() < 0.03, "{found} is not {wanted}");
}

#[test]
fn the_part_of_new_flows_that_would_go_elsewhere_is_that_of_the_slots() {
    assert_eq!(tables(&parsed(FILE), &[]), []);
    assert_eq!(tables(&changed("interval: 2s", "interval: 5s"), &[]), []);
    // The same servers, by another way.
    assert_eq!(tables(&changed("forward: ipip", "forward: gue"), &[]), []);

    let one_more = changed("name: web3}", "name: web3}, {address: 10.0.0.4, name: web4}");
    let told = tables(&one_more, &[]);
    let services: Vec<_> = told.iter().map(|table| table.services.join(" ")).collect();
    assert!(told.len() == 2 && services.contains(&"www tcp dns tcp".to_owned()), "{services:?}");
    for table in &told {
        assert!((0.25..0.40).contains(&table.flows), "{table:?}");
        assert_eq!(table.packets, None);
    }

    let one_less = changed(", {address: 10.0.0.3, name: web3}", "");
    for table in tables(&one_less, &[("10.0.0.1", 10.0), ("10.0.0.2", 10.0), ("10.0.0.3", 980.0)]) {
        assert!((0.33..0.45).contains(&table.flows), "{table:?}");
        assert!(table.packets.is_some_and(|packets| packets > 0.98), "{table:?}");
    }
}

#[test]
fn what_spreads_flows_anew_leaves_one_of_n_where_it_was() {
    for after in [
        changed("seed: 1", "seed: 2"),
        changed("pool: web}\n  - {name: dns", "pool: web, scheduler: source-hash}\n  - {name: dns"),
    ] {
        let told = tables(&after, &[("10.0.0.1", 1.0), ("10.0.0.2", 1.0), ("10.0.0.3", 1.0)]);
        assert!(!told.is_empty());
        for table in told {
            near(table.flows, 2.0 / 3.0);
            near(table.packets.unwrap(), 2.0 / 3.0);
        }
    }
}

#[test]
fn rates_are_of_backends_that_both_readings_have() {
    let reading = |rows: &[(&str, u64)]| -> Vec<BackendStatus> {
        let status = |(address, packets): &(&str, u64)| BackendStatus {
            pool: "web".to_owned(),
            name: (*address).to_owned(),
            address: address.parse().unwrap(),
            forward: "ipip".to_owned(),
            weight: 100,
            weight_in_file: None,
            state: "up".to_owned(),
            health: "up".to_owned(),
            check: String::new(),
            exit: None,
            slots: 1,
            slots_old: 1,
            pins: 0,
            connections: None,
            replies: None,
            starting: None,
            packets: *packets,
            bytes: 0,
        };
        rows.iter().map(status).collect()
    };
    let found = rates(
        &reading(&[("10.0.0.1", 5), ("10.0.0.2", 5)]),
        &reading(&[("10.0.0.1", 25), ("10.0.0.3", 9)]),
        2.0,
    );
    let key = BackendKey { pool: "web".to_owned(), address: "10.0.0.1".parse().unwrap() };
    assert_eq!(found, Rates::from([(key, 10.0)]));
}

#[test]
fn what_becomes_of_flows_is_said_by_the_time_that_is_left() {
    let now = Duration::from_secs(100);
    let exit = |deadline| Exit { cause: Cause::Removed, since: now, deadline, cut: None };
    for (deadline, said) in [
        (None, "stay until they end"),
        (Some(now), "move at once"),
        (Some(now + Duration::from_millis(299_001)), "stay until they end, for 5m at the most"),
    ] {
        assert_eq!(end_of_flows(&exit(deadline), now), said);
    }
}
