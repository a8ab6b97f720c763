//! Whom connection IDs of QUIC name, as it is planned and as it changes.

use lb_common::quic::ServerKey;

use super::*;
use crate::reconcile::plan::{Leave, Unpinned, plan};

/// Pool `web` with these hosts of 10.0.1.0/24 and their server IDs, and a service that goes by them.
fn config(forward: &str, config_id: u8, backends: &[(u8, &str)]) -> Config {
    let list = backends.iter().map(|(host, id)| format!("{{address: 10.0.1.{host}, server_id: \"{id}\"}}"));
    let yaml = format!(
        "interfaces: [eth0]\nseed: 5f1d0c3a9be24771\nlimits: {{vips: 256, backends: 512, slots: {}, pins: 4096}}\n\
         pools:\n  web: {{forward: {forward}, health: {{type: none}}, backends: [{}]}}\nservices:\n  \
         - {{name: quic, vip: 203.0.113.10, ports: 443, protocol: udp, pool: web, quic: {{config_id: {config_id}}}}}\n",
        48 << 12,
        list.collect::<Vec<_>>().join(", ")
    );
    crate::config::parse("test", &yaml).unwrap_or_else(|problems| panic!("{problems}")).config
}

fn wanted(config: &Config) -> Desired {
    let mut world = World::default();
    for (index, backend) in config.pools[0].backends.iter().enumerate() {
        world.up.insert((0, index), true);
        Arc::make_mut(&mut world.next_hops).insert(backend.address, next_hop((INGRESS, 1500, 1)));
    }
    desired(config, &world)
}

fn apply(image: &mut Image, config: &Config, leave: &Leave) -> Vec<MapOp> {
    let ops = plan(image, &wanted(config), &capacity(), leave).expect("within the limits").ops;
    ops.iter().for_each(|op| image.apply(op));
    ops
}

/// The hosts that server IDs name.
fn named(image: &Image) -> Vec<(String, u8)> {
    let host = |id: &u16| image.backends[usize::from(*id)].address4().to_ne_bytes()[3];
    image.servers.iter().map(|(key, id)| (crate::lookup::server_id(key), host(id))).collect()
}

fn about_servers(op: &&MapOp) -> bool {
    matches!(op, MapOp::SetServer { .. } | MapOp::RemoveServer { .. } | MapOp::Grace)
}

#[test]
fn each_server_id_names_its_backend_before_a_vip_asks_for_it() {
    let mut image = fresh();
    let config = config("ipip", 2, &[(11, "0a01"), (12, "0a02")]);
    let ops = apply(&mut image, &config, &Leave::all());
    assert_eq!(named(&image), [("0a01".to_owned(), 11), ("0a02".to_owned(), 12)]);
    assert!(image.servers.keys().all(|key| (key.config_id(), key.length()) == (2, 2)));
    let place = |is: fn(&MapOp) -> bool| ops.iter().position(is).expect("an operation");
    let server = place(|op| matches!(op, MapOp::SetServer { .. }));
    assert!(place(|op| matches!(op, MapOp::WriteBackend { .. })) < server);
    assert!(server < place(|op| matches!(op, MapOp::SetVipWord4 { .. })));
    let targets = service_targets(&image);
    assert!(targets.iter().all(|target| target.server_id_bytes() == 2) && !targets.is_empty());
    assert!(apply(&mut image, &config, &Leave::all()).is_empty(), "planned again");
}

#[test]
fn a_grace_stands_between_all_entries_that_free_memory_and_those_that_take_it() {
    let mut image = fresh();
    apply(&mut image, &config("ipip", 0, &[(11, "01"), (12, "02"), (13, "03")]), &Leave::all());
    // Other rows of the same servers, one server that goes, and one that comes.
    let ops = apply(&mut image, &config("l2", 0, &[(11, "01"), (12, "02"), (14, "04")]), &Leave::all());
    let steps: Vec<&MapOp> = ops.iter().filter(about_servers).collect();
    let mut freed = false;
    let mut before: HashSet<ServerKey> = HashSet::new();
    for step in &steps {
        match step {
            MapOp::SetServer { key, .. } => {
                assert!(!freed, "takes what was just freed: {steps:?}");
                freed = !before.insert(*key) || key.bytes()[0] <= 3;
            }
            MapOp::RemoveServer { .. } => freed = true,
            _ => freed = false,
        }
    }
    assert!(!freed, "the next plan takes what this one freed: {steps:?}");
    assert_eq!(named(&image), [("01".to_owned(), 11), ("02".to_owned(), 12), ("04".to_owned(), 14)]);
}

#[test]
fn another_configuration_id_takes_the_place_of_the_first_once_vips_are_through() {
    let mut image = fresh();
    apply(&mut image, &config("ipip", 0, &[(11, "01")]), &Leave::all());
    let ops = apply(&mut image, &config("ipip", 1, &[(11, "0001")]), &Leave::all());
    let removed = ops.iter().position(|op| matches!(op, MapOp::RemoveServer { .. }));
    let vips = ops.iter().position(|op| matches!(op, MapOp::SetVipWord4 { .. }));
    assert!(vips.is_some() && vips < removed, "{ops:?}");
    assert_eq!(image.servers.keys().map(ServerKey::config_id).collect::<Vec<_>>(), [1]);
}

#[test]
fn a_backend_that_left_is_named_until_no_flow_lives_on_it() {
    let mut image = fresh();
    apply(&mut image, &config("ipip", 0, &[(11, "01"), (12, "02")]), &Leave::all());
    let left = config("ipip", 0, &[(12, "02")]);
    let busy = Leave { unpinned: Unpinned::Ids(HashSet::new()), ..Leave::all() };
    apply(&mut image, &left, &busy);
    assert_eq!(named(&image), [("01".to_owned(), 11), ("02".to_owned(), 12)]);
    // Its ID may be given to another meanwhile.
    let mut reused = image.clone();
    apply(&mut reused, &config("ipip", 0, &[(12, "02"), (13, "01")]), &busy);
    assert_eq!(named(&reused), [("01".to_owned(), 13), ("02".to_owned(), 12)]);
    let id =
        image.servers.values().copied().find(|id| image.backends[usize::from(*id)].address4() >> 24 == 11);
    let quiet = Leave { unpinned: Unpinned::Ids(id.into_iter().collect()), ..Leave::all() };
    apply(&mut image, &left, &quiet);
    assert_eq!(named(&image), [("02".to_owned(), 12)]);
}
