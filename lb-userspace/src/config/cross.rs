//! Rules over several parts of the file, and the parts put together.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};

use super::health::Health;
use super::model::{Pool, Protocol, Service};
use super::network::WrittenSource;
use super::pools::PoolDraft;
use super::problem::{Place, Report, Spot};
use super::services::ServiceDraft;
use super::top::{MOST_BACKENDS, MOST_VIPS, WrittenLimits};

pub(super) fn check(
    pools: &[PoolDraft],
    services: &[ServiceDraft],
    source: &WrittenSource,
    limits: &WrittenLimits,
    report: &mut Report,
) {
    let vips = vips(services);
    for pool in pools {
        for (backend, at) in &pool.backends {
            if let Some(vip) = vips.get(&backend.address) {
                let message = format!("{} is also the VIP at {vip}", backend.address);
                let hint =
                    "a backend needs an address of its own: its packets would come back to the balancer";
                report.error(at.place, &at.path, message, hint);
            }
        }
    }
    for (vip, at) in &vips {
        if let Some((net, source)) = source.holds(*vip) {
            let message = format!("{net} contains the VIP {vip} of {at}");
            report.error(source.place, &source.path, message, "use a prefix without a VIP");
        }
    }
    check_limits(pools, services, limits, report);
    check_triples(services, limits, report);
}

/// Every VIP, at the first place it stands. In order, so that problems are the same in every run.
fn vips(services: &[ServiceDraft]) -> BTreeMap<IpAddr, &Spot> {
    let mut vips = BTreeMap::new();
    for (vip, at) in services.iter().flat_map(|service| &service.vips) {
        vips.entry(*vip).or_insert(at);
    }
    vips
}

fn triples_of(service: &ServiceDraft) -> u64 {
    // Each factor is below the values a file may hold (2^21): no overflow.
    service.vips.len() as u64 * service.ports.len() as u64 * service.protocols.len() as u64
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
    let triples = services.iter().map(triples_of).fold(0, u64::saturating_add);
    let limit = limits.model.vips;
    if triples > u64::from(limit) {
        let what = "(VIP, port, protocol) triples";
        let (message, hint) = exceeded("vips", limit, what, triples, MOST_VIPS);
        let at = limits.vips.as_ref().map_or(Place::START, |spot| spot.place);
        report.error(at, "limits.vips", message, hint);
    }
}

/// Triples that are compared even where the limit is lower.
const COMPARED: u32 = 100_000;

/// What a service shares with one that stands before it.
struct Shared<'a> {
    count: usize,
    /// The first triple of them: as text, where it stands here, and where it stands there.
    triple: String,
    here: &'a Spot,
    there: &'a Spot,
}

/// No two services answer to the same address, port and protocol. One problem for each pair of
/// services, however many triples they share.
fn check_triples(services: &[ServiceDraft], limits: &WrittenLimits, report: &mut Report) {
    // A few lines can name a trillion triples. What is far beyond the limit is refused anyway.
    let mut budget = u64::from(limits.model.vips.max(COMPARED));
    let mut owners: HashMap<(IpAddr, u16, Protocol), (usize, &Spot)> = HashMap::new();
    for (i, service) in services.iter().enumerate() {
        let Some(left) = budget.checked_sub(triples_of(service)) else {
            return;
        };
        budget = left;
        let mut shared: BTreeMap<usize, Shared> = BTreeMap::new();
        for (vip, port, protocol, here) in triples(service) {
            let (owner, there) = *owners.entry((vip, port, protocol)).or_insert((i, here));
            if owner != i {
                let triple = || format!("{} {protocol}", SocketAddr::new(vip, port));
                let new = || Shared { count: 0, triple: triple(), here, there };
                shared.entry(owner).or_insert_with(new).count += 1;
            }
        }
        for (owner, Shared { count, triple, here, there }) in shared {
            let more = if count > 1 { format!(" (and {} more)", count - 1) } else { String::new() };
            let owner = services[owner].name.as_str();
            let owner = if owner.is_empty() { "the service" } else { owner };
            let message = format!("{triple}{more} already belongs to {owner} at {there}");
            report.error(here.place, &here.path, message, "remove it from one of the two services");
        }
    }
}

fn triples(service: &ServiceDraft) -> impl Iterator<Item = (IpAddr, u16, Protocol, &Spot)> {
    service.vips.iter().flat_map(move |(vip, at)| {
        service
            .ports
            .iter()
            .flat_map(move |port| service.protocols.iter().map(move |protocol| (*vip, *port, *protocol, at)))
    })
}

/// Gives every pool the port its backends are checked at, and warns of pools that nobody uses.
pub(super) fn join(
    pools: Vec<PoolDraft>,
    services: Vec<ServiceDraft>,
    defaults: &Health,
    report: &mut Report,
) -> (Vec<Pool>, Vec<Service>) {
    let mut users: Vec<Option<Option<u16>>> = vec![None; pools.len()];
    for service in &services {
        if let Some(pool) = service.pool {
            users[pool].get_or_insert(service.ports.first().copied());
        }
    }
    let pools = pools.into_iter().zip(users).map(|(draft, user)| {
        if user.is_none() {
            let unchecked = if draft.health.unchecked_without_service(defaults) {
                ", and its backends are not checked"
            } else {
                ""
            };
            let message = format!("no service uses this pool{unchecked}");
            let hint = format!("name it in a service (pool: {}), or remove it", draft.name);
            report.warn(draft.spot.place, &draft.spot.path, message, hint);
        }
        Pool {
            check: draft.health.check(defaults, user.flatten()),
            name: draft.name,
            forward: draft.forward,
            on_empty: draft.on_empty,
            backends: draft.backends.into_iter().map(|(backend, _)| backend).collect(),
        }
    });
    let pools = pools.collect();
    // A service without a pool was reported, so that the configuration is not used.
    let services = services.into_iter().filter_map(|draft| {
        Some(Service {
            pool: draft.pool?,
            name: draft.name,
            vips: draft.vips.into_iter().map(|(vip, _)| vip).collect(),
            ports: draft.ports,
            protocols: draft.protocols,
            scheduler: draft.scheduler,
        })
    });
    (pools, services.collect())
}
