//! Rules over several parts of the file, and the parts put together.

use super::health::Health;
use super::model::{Fragments, Pool, Service};
use super::nat::WrittenSources;
use super::network::WrittenSource;
use super::pools::PoolDraft;
use super::problem::{Place, Report};
use super::quic;
use super::services::ServiceDraft;
use super::top::{MOST_BACKENDS, MOST_VIPS, WrittenLimits};
use super::vips::{self, Vips};

pub(super) fn check(
    pools: &[PoolDraft],
    services: &[ServiceDraft],
    (source, sources): (&WrittenSource, &WrittenSources),
    limits: &WrittenLimits,
    report: &mut Report,
) {
    let vips = Vips::of(services);
    for pool in pools {
        for (backend, at) in &pool.backends {
            if let Some((vip, vip_at)) = vips.holding(backend.address) {
                let message = vips::taken(backend.address, vip, vip_at);
                let hint =
                    "a backend needs an address of its own: its packets would come back to the balancer";
                report.error(at.place, &at.path, message, hint);
            }
        }
    }
    for (vip, at) in vips.all() {
        let overlapping = source.overlapping(vip).or_else(|| sources.overlapping(vip));
        if let Some((net, source)) = overlapping {
            let how = if net.contains(vip.first()) { "contains" } else { "lies in" };
            let message = format!("{net} {how} the VIP {vip} of {at}");
            report.error(source.place, &source.path, message, "use a prefix without a VIP");
        }
    }
    check_limits(pools, services, limits, report);
    quic::check(pools, services, report);
    vips::check(services, &vips, limits, report);
}

fn check_limits(pools: &[PoolDraft], services: &[ServiceDraft], limits: &WrittenLimits, report: &mut Report) {
    let exceeded = |name: &str, limit: u32, what: &str, count: u64, most: u32| {
        let message = format!("{limit} is the limit, but the file has {count} {what}");
        let hint = if count <= u64::from(most) {
            format!("set limits.{name}: {count} or more")
        } else {
            format!("more than {most} are not possible")
        };
        (message, hint)
    };
    let backends: u64 = pools.iter().map(|pool| pool.backends.len() as u64).sum();
    let limit = limits.model.backends;
    if backends > u64::from(limit) {
        let (message, hint) = exceeded("backends", limit, "backends", backends, MOST_BACKENDS);
        let at = limits.backends.as_ref().map_or(Place::START, |spot| spot.place);
        report.error(at, "limits.backends", message, hint);
    }
    // Fragments take an entry of their own.
    let triples = services.iter().map(vips::triples_of).chain(services.iter().map(vips::fragment_entries_of));
    let triples = triples.fold(0, u64::saturating_add);
    let limit = limits.model.vips;
    if triples > u64::from(limit) {
        let what = "(VIP, port or range, protocol) triples";
        let (message, hint) = exceeded("vips", limit, what, triples, MOST_VIPS);
        let at = limits.vips.as_ref().map_or(Place::START, |spot| spot.place);
        report.error(at, "limits.vips", message, hint);
    }
}

/// The first service that uses each pool: that names it, or else one that may fall back to it.
fn users<'s>(pools: &[PoolDraft], services: &'s [ServiceDraft]) -> Vec<Option<&'s ServiceDraft>> {
    let mut named: Vec<Option<&ServiceDraft>> = vec![None; pools.len()];
    for service in services {
        if let Some(pool) = service.pool {
            named[pool].get_or_insert(service);
        }
    }
    let mut users = named.clone();
    for (pool, user) in pools.iter().zip(named) {
        let Some(user) = user else { continue };
        pool.tiers.tiers.fallback.iter().for_each(|&fallback| _ = users[fallback].get_or_insert(user));
    }
    users
}

/// Gives every pool the port its backends are checked at, and warns of pools that nobody uses.
pub(super) fn join(
    pools: Vec<PoolDraft>,
    services: Vec<ServiceDraft>,
    defaults: &Health,
    report: &mut Report,
) -> (Vec<Pool>, Vec<Service>) {
    let users = users(&pools, &services);
    let pools = pools.into_iter().zip(users).map(|(draft, user)| {
        // Where packets are sent.
        let port = Some(draft.forward.port()).filter(|port| *port != 0 && draft.forward.translates());
        let port = port.or_else(|| user.and_then(ServiceDraft::first_port));
        // Ports that are wrong have been reported.
        if let Some(user) = user.filter(|user| port.is_none() && !user.ports.is_empty())
            && draft.health.unchecked_without_port(defaults)
        {
            let path = format!("{}.health.port", draft.spot.path);
            let message = format!(
                "is missing: {}, the first service that uses this pool, has no single port to check at",
                user.called()
            );
            let hint = "set health: {port: 80}, or {type: none}";
            report.error(draft.spot.place, &path, message, hint);
        }
        if user.is_none() {
            let unchecked = if draft.health.unchecked_without_port(defaults) {
                ", and its backends are not checked"
            } else {
                ""
            };
            let message = format!("no service uses this pool{unchecked}");
            let hint = format!("name it in a service (pool: {0}) or as a fallback, or remove it", draft.name);
            report.warn(draft.spot.place, &draft.spot.path, message, hint);
        }
        Pool {
            check: draft.health.check(defaults, port),
            name: draft.name,
            forward: draft.forward,
            on_empty: draft.on_empty,
            flows: draft.flows,
            slow_start: draft.slow_start,
            tiers: draft.tiers.tiers,
            backends: draft.backends.into_iter().map(|(backend, _)| backend).collect(),
        }
    });
    let pools: Vec<Pool> = pools.collect();
    // A service without a pool was reported, so that the configuration is not used.
    let services = services.into_iter().filter_map(|draft| {
        Some(Service {
            pool: draft.pool?,
            name: draft.name,
            vips: draft.vips.into_iter().map(|(vip, _)| vip).collect(),
            ports: draft.ports.into_iter().map(|(ports, _)| ports).collect(),
            protocols: draft.protocols,
            scheduler: draft.scheduler,
            source_prefix: draft.source_prefix,
            quic: draft.quic.map(|(quic, _)| quic),
            fragments: draft.fragments.map_or(Fragments::Drop, |(fragments, _)| fragments),
            unmapped: draft.unmapped.map(|(unmapped, _)| unmapped),
        })
    });
    (pools, services.collect())
}
