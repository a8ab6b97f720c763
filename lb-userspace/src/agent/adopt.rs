//! What the tables of an agent that is gone say of the world: who was up, and by which way it was reached.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::time::Instant;

use lb_common::abi::{Egress, Path};
use lb_common::wire::{Address6, Mac};
use rustc_hash::FxHashMap;

use super::core::{BackendKey, NextHops, keys};
use crate::config::model::{CheckKind, Config, Forward, Service};
use crate::health::Fsm;
use crate::nexthop::{Link, NextHop};
use crate::reconcile::desired::{backend_identity, forward_of, identity_of, table_identity};
use crate::reconcile::image::Image;

/// Who was not down is up until its first verdict.
pub fn health(config: &Config, image: &Image) -> FxHashMap<BackendKey, Fsm> {
    let ids = image.ids();
    let ways: HashSet<Forward> = image.backends.iter().filter_map(forward_of).collect();
    let now = Instant::now();
    let accepts = |pool: &str, forward, address| {
        let id = ids.get(&backend_identity(pool, forward, address));
        id.is_some_and(|id| image.backends[usize::from(*id)].accepts())
    };
    keys(config)
        .map(|(key, pool, _)| {
            // The file may name another way to a backend than the one it was reached by; its health is the same.
            let up = ways.iter().any(|&forward| accepts(&key.pool, forward, key.address));
            let pool = &config.pools[pool];
            let up = up || pool.check.kind == CheckKind::None;
            let (rise, fall) = (pool.check.rise, pool.check.fall);
            let fsm = if up { Fsm::adopted(true, now, rise, fall) } else { Fsm::new(rise, fall) };
            (key, fsm)
        })
        .collect()
}

/// Pools whose packets went to a fallback: its place among the pools that may take them. Who holds most of the slots
/// is in use.
pub fn levels(config: &Config, image: &Image) -> HashMap<usize, usize> {
    let fall_back = |service: &&Service| !config.pool_of(service).tiers.fallback.is_empty();
    if !config.services.iter().any(|service| fall_back(&service)) {
        return HashMap::new();
    }
    let ids = image.ids();
    let mut tables: FxHashMap<u64, FxHashMap<u16, u32>> = FxHashMap::default();
    for (table, slot) in image.live_slots() {
        let identity = image.table_states[usize::from(table)].identity;
        *tables.entry(identity).or_default().entry(slot.cur()).or_default() += 1;
    }
    let held = |service: &Service, level: usize| -> u32 {
        let pool = &config.pools[level];
        let backends = pool.backends.iter();
        let holders = backends.filter_map(|b| ids.get(&identity_of(pool, b)));
        let tables = service.protocols.iter().filter_map(|&protocol| {
            tables.get(&table_identity(config.pool_of(service), protocol, service.scheduler))
        });
        let holders: Vec<u16> = holders.copied().collect();
        tables.flat_map(|held| holders.iter().filter_map(|id| held.get(id))).sum()
    };
    let level = |service: &Service| {
        let levels = config.levels_of(service.pool).enumerate();
        let (level, slots) =
            levels.map(|(place, pool)| (place, held(service, pool))).max_by_key(|held| held.1)?;
        (slots > 0).then_some((service.pool, level))
    };
    config.services.iter().filter(fall_back).filter_map(level).collect()
}

/// Next hops hold until the kernel says otherwise. `known` are the interfaces that are there, by their index.
pub fn next_hops<'l>(config: &Config, image: &Image, known: impl Fn(u32) -> Option<&'l Link>) -> NextHops {
    let ids = image.ids();
    let adopt = |(key, pool, backend): (BackendKey, usize, usize)| {
        let pool = &config.pools[pool];
        let id = *ids.get(&identity_of(pool, &pool.backends[backend]))?;
        let path = Path::from_bits(image.backends[usize::from(id)].path);
        let egress = image.egress.get(usize::from(path.egress())).filter(|egress| egress.ifindex != 0)?;
        Some((key.address, Ok(next_hop(key.address, path, egress, known(egress.ifindex)))))
    };
    keys(config).filter_map(adopt).collect()
}

fn next_hop(address: IpAddr, path: Path, egress: &Egress, link: Option<&Link>) -> NextHop {
    let [high, low] = egress.source6;
    let source = match address {
        IpAddr::V4(_) => IpAddr::from(egress.source4.to_ne_bytes()),
        IpAddr::V6(_) => IpAddr::from(Address6 { high, low }.bytes()),
    };
    NextHop {
        ifindex: egress.ifindex,
        interface: link.map_or_else(|| format!("interface {}", egress.ifindex), |link| link.name.clone()),
        source_mac: Mac::from_bits(egress.source_mac).bytes(),
        mac: path.mac().bytes(),
        mtu: egress.mtu.min(u32::from(u16::MAX)) as u16,
        preferred_source: Some(source).filter(|source| !source.is_unspecified()),
        gateway: None,
        kind: link.and_then(|link| link.kind.clone()),
        // It was one when the earlier agent wrote it.
        redirect_target: link.is_none_or(|link| link.redirect_target),
    }
}
