//! What tables say for a scheduler, for the pool in use, in panic, and of backends with a part of their share.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use super::*;
use crate::config::parse;
use crate::reconcile::entries::Lead;
use crate::reconcile::targets::Targets;
use crate::tables::overlay;

/// Pools `web` (two backends, of which one has half the weight), `near` (one) and `far` (41, which need a longer table).
fn config(pool: &str, service: &str) -> Config {
    let far: Vec<String> = (1..=41).map(|host| format!("10.0.3.{host}")).collect();
    let text = format!(
        "interfaces: [eth0]\nseed: 7\npools:\n  \
         web: {{forward: ipip, backends: [10.0.1.1, {{address: 10.0.1.2, weight: 50}}], {pool}}}\n  \
         near: {{forward: gue, on_empty: pass, backends: [10.0.2.1]}}\n  \
         far: {{forward: ipip, backends: [{}]}}\n\
         services:\n- {{name: www, vip: [203.0.113.10, '2001:db8::10'], ports: 80, protocol: tcp, pool: web, {service}}}\n",
        far.join(", ")
    );
    parse("xlb.yaml", &text).unwrap_or_else(|problems| panic!("{problems}")).config
}

/// All are up.
fn world(config: &Config) -> World {
    let mut world = World::default();
    for (index, pool) in config.pools.iter().enumerate() {
        world.up.extend((0..pool.backends.len()).map(|backend| ((index, backend), true)));
    }
    world
}

fn the_table(config: &Config, world: &World) -> Arc<DesiredTable> {
    let tables = desired(config, world).tables;
    assert_eq!(tables.len(), 1);
    tables.into_values().next().expect("one table")
}

fn identity(config: &Config, pool: usize, backend: usize) -> Target {
    let pool = &config.pools[pool];
    Target::Backend(backend_identity(&pool.name, pool.forward, pool.backends[backend].address))
}

/// Slots of each target, in parts of the table.
fn parts(slots: &Targets) -> BTreeMap<Target, f64> {
    let mut parts = BTreeMap::new();
    for slot in slots.iter() {
        *parts.entry(*slot).or_default() += 1.0 / slots.len() as f64;
    }
    parts
}

fn part(config: &Config, slots: &Targets, backend: usize) -> f64 {
    parts(slots).get(&identity(config, 0, backend)).copied().unwrap_or(0.0)
}

#[test]
fn each_scheduler_has_its_discipline_and_its_weights() {
    for (scheduler, discipline, heavy) in [
        ("maglev", Discipline::Hash, 2.0 / 3.0),
        ("source-hash", Discipline::Hash, 2.0 / 3.0),
        ("round-robin", Discipline::RoundRobin, 1.0 / 2.0),
        ("weighted-round-robin", Discipline::RoundRobin, 2.0 / 3.0),
        ("random", Discipline::Random, 2.0 / 3.0),
        ("least-connections", Discipline::Least, 2.0 / 3.0),
        ("least-response-time", Discipline::RoundRobin, 1.0 / 2.0),
    ] {
        let config = config("", &format!("scheduler: {scheduler}"));
        // The heavier one takes twice the time.
        let world = World { response_weights: [((0, 0), 50)].into_iter().collect(), ..world(&config) };
        let table = the_table(&config, &world);
        assert_eq!(
            (table.discipline, table.log2_length, &table.pools),
            (discipline, 12, &vec![0]),
            "{scheduler}"
        );
        let got = part(&config, &table.cur, 0);
        assert!((got - heavy).abs() < 0.01, "{scheduler}: {got}");
        // What nothing is known of goes by its hash, whatever takes the new ones.
        let by_hash = the_table(&config_of_maglev(&config), &world).cur.clone();
        let expected = (discipline != Discipline::Hash).then_some(by_hash);
        assert_eq!(table.est, expected, "{scheduler}");
    }
}

fn config_of_maglev(config: &Config) -> Config {
    let mut config = config.clone();
    config.services[0].scheduler = Scheduler::Maglev;
    config
}

#[test]
fn a_table_has_the_backends_of_the_pool_in_use_and_always_the_length_of_the_longest() {
    let config = config("fallback: [near, far]", "");
    for (level, backends) in [(0, 2), (1, 1), (2, 41)] {
        let world = World { levels: [(0, level)].into_iter().collect(), ..world(&config) };
        let table = the_table(&config, &world);
        assert_eq!((table.log2_length, table.cur.len(), &table.pools), (14, 1 << 14, &vec![0, 1, 2]));
        let expected: std::collections::BTreeSet<Target> =
            (0..backends).map(|backend| identity(&config, level, backend)).collect();
        assert!(parts(&table.cur).into_keys().eq(expected), "level {level}");
    }
    assert!(features(&config).has(Features::GUE4), "the program can do what a fallback needs");
}

#[test]
fn where_nobody_is_left_the_pools_own_word_counts() {
    for (on_empty, expected) in [("drop", Target::Nobody), ("pass", Target::Pass)] {
        for scheduler in ["maglev", "random"] {
            let config =
                config(&format!("fallback: near, on_empty: {on_empty}"), &format!("scheduler: {scheduler}"));
            let world = World { levels: [(0, 1)].into_iter().collect(), ..World::default() };
            let table = the_table(&config, &world);
            assert!(table.cur.iter().all(|slot| *slot == expected), "{on_empty} {scheduler}");
        }
    }
    let config = config("on_empty: all", "");
    assert_eq!(parts(&the_table(&config, &World::default()).cur).len(), 2);
}

#[test]
fn in_panic_packets_go_to_all_that_can_be_reached() {
    let config = config("panic: 50%", "");
    let down = |up: &[(usize, bool)]| World {
        up: up.iter().map(|(backend, up)| ((0, *backend), *up)).collect(),
        panic: HashSet::from([0]),
        ..World::default()
    };
    for (name, world, parts_of) in [
        ("one is down", down(&[(0, true), (1, false)]), [2.0 / 3.0, 1.0 / 3.0]),
        ("both are", down(&[(0, false), (1, false)]), [2.0 / 3.0, 1.0 / 3.0]),
        ("no way to one", down(&[(1, false)]), [0.0, 1.0]),
        ("no way to either", down(&[]), [2.0 / 3.0, 1.0 / 3.0]),
    ] {
        let table = the_table(&config, &world);
        for (backend, expected) in parts_of.into_iter().enumerate() {
            let got = part(&config, &table.cur, backend);
            assert!((got - expected).abs() < 0.01, "{name}: {got}");
        }
    }
    let drained = World { shares: [((0, 1), 0)].into_iter().collect(), ..down(&[(0, false), (1, true)]) };
    assert_eq!(part(&config, &the_table(&config, &drained).cur, 0), 1.0, "panic brings no drained one back");
}

#[test]
fn a_share_is_that_part_of_what_a_backend_takes() {
    for (scheduler, full) in [("maglev", 2.0 / 3.0), ("weighted-round-robin", 2.0 / 3.0)] {
        let config = config("", &format!("scheduler: {scheduler}"));
        let with = |share| {
            let world = World { shares: [((0, 0), share)].into_iter().collect(), ..world(&config) };
            part(&config, &the_table(&config, &world).cur, 0)
        };
        assert!((with(overlay::FULL) - full).abs() < 0.01, "{scheduler}");
        assert_eq!(with(0), 0.0, "{scheduler}");
        let half = with(overlay::FULL / 2);
        assert!((full / 2.0 - 0.03..=0.53).contains(&half), "{scheduler}: {half}");
    }
}

#[test]
fn a_prefix_of_the_source_is_told_by_what_it_cuts_off() {
    let flags = |service: &str| -> Vec<u16> {
        let config = config("", service);
        let vips = desired(&config, &world(&config)).vips;
        let lead = |vip: &DesiredVip| match vip {
            DesiredVip::Service(Lead { flags, .. }) => Some(*flags),
            DesiredVip::Address { .. } | DesiredVip::Source => None,
        };
        vips.values().filter_map(lead).collect()
    };
    use lb_common::abi::VipTarget;
    let hashed = |cut| VipTarget::SOURCE_HASH | VipTarget::prefix_cut(cut);
    assert_eq!(flags("scheduler: source-hash"), [hashed(0), hashed(0)]);
    assert_eq!(flags("scheduler: source-hash, source_prefix: {v4: 24, v6: 56}"), [hashed(8), hashed(72)]);
    assert_eq!(flags("scheduler: source-hash, source_prefix: {v6: 1}"), [hashed(0), hashed(127)]);
    assert_eq!(flags("scheduler: random"), [0, 0]);
}

#[test]
fn backends_of_fallbacks_have_rows_before_they_are_needed() {
    let config = config("fallback: near", "");
    let hop = Ipv4Addr::new(10, 0, 2, 1);
    let rows = desired(&config, &World::default()).backends;
    let near = backend_identity("near", config.pools[1].forward, hop.into());
    assert!(rows.contains_key(&near));
}
