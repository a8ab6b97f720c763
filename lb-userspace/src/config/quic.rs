//! `quic` of services and `server_id` of backends: who can be found by a connection ID. Knows nothing of what a connection ID
//! looks like.

use std::collections::{BTreeSet, HashMap};

use super::leaf;
use super::model::{Backend, Protocol, Quic, ServerId};
use super::pools::PoolDraft;
use super::problem::{Report, Spot};
use super::read::Fields;
use super::services::ServiceDraft;

/// With the place of the key.
pub(super) fn of_service(
    fields: &Fields<'_>,
    protocols: &[Protocol],
    report: &mut Report,
) -> Option<(Quic, Spot)> {
    let at = fields.get("quic")?;
    let spot = Spot { place: at.key_place(), path: at.path.clone() };
    let own = at.fields(&["config_id"], "a mapping such as {config_id: 0}", report)?;
    let id = |text| leaf::number(text, 0..=6, "").map(|id| u8::try_from(id).unwrap_or(0));
    let config_id = own.value("config_id", "a number", id, report).unwrap_or(0);
    if protocols.contains(&Protocol::Tcp) {
        let hint = "give TCP a service of its own, or remove quic";
        report.error(spot.place, &spot.path, "QUIC runs over UDP, but the service takes TCP too", hint);
    }
    Some((Quic { config_id }, spot))
}

/// Of one pool: all of one length, none twice.
pub(super) fn check_server_ids(backends: &[(Backend, Spot)], report: &mut Report) {
    let mut ids = Ids::default();
    for (backend, at) in backends {
        if let Some(clash) = ids.add(0, backend, at) {
            report.error(at.place, &at.path, clash.message, clash.hint);
        }
    }
}

/// Server IDs that have to be told apart.
#[derive(Default)]
struct Ids<'p> {
    first: Option<Owner<'p>>,
    owners: HashMap<&'p ServerId, Owner<'p>>,
}

#[derive(Clone, Copy)]
struct Owner<'p> {
    level: usize,
    id: &'p ServerId,
    backend: &'p Backend,
    at: &'p Spot,
}

struct Clash {
    /// Level of the other.
    level: usize,
    message: String,
    hint: &'static str,
}

impl<'p> Ids<'p> {
    /// What keeps the server ID of one more backend from being told apart. One server may be in several pools.
    fn add(&mut self, level: usize, backend: &'p Backend, at: &'p Spot) -> Option<Clash> {
        let id = backend.server_id.as_ref()?;
        let owner = Owner { level, id, backend, at };
        let first = *self.first.get_or_insert(owner);
        let length = |id: &ServerId| id.bytes().len();
        if length(first.id) != length(id) {
            let message = format!(
                "server_id {id} has {} digits, and {} at {} has {}",
                length(id) * 2,
                first.id,
                first.at,
                length(first.id) * 2
            );
            return Some(Clash { level: first.level, message, hint: "use the same length for all" });
        }
        let other = *self.owners.entry(id).or_insert(owner);
        if other.backend.address == backend.address {
            return None;
        }
        let message = format!("server_id {id} is already that of {} at {}", other.backend.name, other.at);
        Some(Clash { level: other.level, message, hint: "choose another" })
    }
}

/// Every backend that a service with `quic` may meet has a server ID, and these tell them apart.
pub(super) fn check(pools: &[PoolDraft], services: &[ServiceDraft], report: &mut Report) {
    let mut checked = vec![false; pools.len()];
    for service in services {
        let (Some((_, at)), Some(pool)) = (&service.quic, service.pool) else { continue };
        let first = !std::mem::replace(&mut checked[pool], true);
        let fallback = &pools[pool].tiers.tiers.fallback;
        let levels: Vec<usize> = std::iter::once(pool).chain(fallback.iter().copied()).collect();
        let backends = || levels.iter().flat_map(|level| pools[*level].backends.iter());
        if let Some((backend, backend_at)) = backends().find(|(backend, _)| backend.server_id.is_none()) {
            let message = format!("{} at {backend_at} has no server_id", backend.name);
            let hint = "give every backend of the pool and of its fallbacks one, or remove quic";
            report.error(at.place, &at.path, message, hint);
        }
        // Several services may share a pool, and what is wrong within one pool has been reported.
        if first && levels.len() > 1 {
            check_levels(pools, &levels, report);
        }
    }
    warn_of_unused(pools, services, report);
}

fn check_levels(pools: &[PoolDraft], levels: &[usize], report: &mut Report) {
    let mut ids = Ids::default();
    for &level in levels {
        let mut own = Ids::default();
        for (backend, at) in &pools[level].backends {
            if own.add(level, backend, at).is_some() {
                continue;
            }
            let Some(clash) = ids.add(level, backend, at) else { continue };
            if clash.level != level {
                report.error(at.place, &at.path, clash.message, clash.hint);
                return;
            }
        }
    }
}

fn warn_of_unused(pools: &[PoolDraft], services: &[ServiceDraft], report: &mut Report) {
    let mut used = vec![false; pools.len()];
    let own: BTreeSet<usize> =
        services.iter().filter(|service| service.quic.is_some()).filter_map(|service| service.pool).collect();
    for pool in own {
        used[pool] = true;
        pools[pool].tiers.tiers.fallback.iter().for_each(|&fallback| used[fallback] = true);
    }
    for (pool, _) in pools.iter().zip(used).filter(|(_, used)| !used) {
        if let Some((_, at)) = pool.backends.iter().find(|(backend, _)| backend.server_id.is_some()) {
            let message = "no service with quic uses this pool, so server_id does nothing";
            report.warn(at.place, &at.path, message, "set quic: {config_id: 0} in its service, or remove it");
        }
    }
}
