//! `fullnat` and `timeouts`: the addresses that clients' are translated to, and how long silent connections are kept. Knows
//! pools only to say what one of them lacks.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::time::Duration;

use ipnetwork::IpNetwork;
use lb_common::abi::MOST_SOURCES;

use super::leaf;
use super::model::{Forward, Fragments, Sources, Timeouts, Vip};
use super::network;
use super::pools::PoolDraft;
use super::problem::{Report, Spot, show};
use super::read::{At, Fields, Wrong};
use super::services::ServiceDraft;

const WANT: &str = "addresses and prefixes, such as [10.0.0.5, 10.0.1.0/28]";

/// The addresses and ports, with the places of the prefixes.
#[derive(Default)]
pub(super) struct WrittenSources {
    pub model: Sources,
    prefixes: Vec<(IpNetwork, Spot)>,
    /// Where they are listed.
    pub spot: Option<Spot>,
}

impl WrittenSources {
    /// The prefix that has addresses in common with the VIP, and its place.
    pub fn overlapping(&self, vip: Vip) -> Option<(IpNetwork, &Spot)> {
        self.prefixes.iter().map(|(net, spot)| (*net, spot)).find(|(net, _)| vip.overlaps(*net))
    }
}

pub(super) fn sources(fields: &Fields<'_>, report: &mut Report) -> WrittenSources {
    let mut written = WrittenSources::default();
    let want = "a mapping such as {sources: [10.0.0.5], ports: 1024-65535}";
    let Some(fields) = fields.get("fullnat").and_then(|at| at.fields(&["sources", "ports"], want, report))
    else {
        return written;
    };
    if let Some(ports) = fields.value("ports", "a range such as 1024-65535", ports, report) {
        written.model.ports = ports;
    }
    let Some(list) = fields.need("sources", WANT, report) else { return written };
    written.spot = Some(list.spot());
    for at in list.one_or_more(WANT, report) {
        if let Some(net) = at.value(WANT, source, report) {
            add(&mut written, net, &at, report);
        }
    }
    written
}

fn add(written: &mut WrittenSources, net: IpNetwork, at: &At<'_>, report: &mut Report) {
    let overlaps = |other: &IpNetwork| other.contains(net.network()) || net.contains(other.network());
    if let Some((other, first)) = written.prefixes.iter().find(|(other, _)| overlaps(other)) {
        let message = format!("{net} has addresses in common with {other} at {first}");
        at.wrong(Wrong { message, hint: "name each address once".into() }, report);
        return;
    }
    let model = &mut written.model;
    let (family, there) = match net {
        IpNetwork::V4(_) => ("IPv4", model.v4.len()),
        IpNetwork::V6(_) => ("IPv6", model.v6.len()),
    };
    let more = match net {
        IpNetwork::V4(net) => 1u128 << (32 - net.prefix()),
        IpNetwork::V6(net) => 1u128.checked_shl(128 - u32::from(net.prefix())).unwrap_or(u128::MAX),
    };
    if there as u128 + more > u128::from(MOST_SOURCES) {
        let message = format!("more than {MOST_SOURCES} {family} sources");
        at.wrong(Wrong { message, hint: format!("name {MOST_SOURCES} or fewer of a family") }, report);
        return;
    }
    for address in net.iter() {
        match address {
            IpAddr::V4(address) => model.v4.push(address),
            IpAddr::V6(address) => model.v6.push(address),
        }
    }
    written.prefixes.push((net, at.spot()));
}

fn source(text: &str) -> Result<IpNetwork, Wrong> {
    match text.parse::<IpAddr>() {
        Ok(address) => network::network(&IpNetwork::from(address).to_string(), WANT, "a source"),
        Err(_) => network::network(text, WANT, "a source"),
    }
}

/// The lowest port that a client's is translated to: below are those of services.
const LOWEST_PORT: u16 = 1024;
/// Of a handful one is soon taken.
const FEWEST_PORTS: u32 = 1024;

fn ports(text: &str) -> Result<RangeInclusive<u16>, Wrong> {
    let hint = || format!("use a range of {FEWEST_PORTS} or more within {LOWEST_PORT}-65535");
    let range = text
        .split_once('-')
        .and_then(|(low, high)| Some((low.trim().parse::<u16>().ok()?, high.trim().parse::<u16>().ok()?)));
    let Some((low, high)) = range else {
        return Err(Wrong { message: format!("{} is not a range of ports", show(text)), hint: hint() });
    };
    if low < LOWEST_PORT || u32::from(high) + 1 < u32::from(low) + FEWEST_PORTS {
        return Err(Wrong { message: format!("{low}-{high} is not allowed"), hint: hint() });
    }
    Ok(low..=high)
}

pub(super) fn timeouts(fields: &Fields<'_>, report: &mut Report) -> Timeouts {
    let mut timeouts = Timeouts::default();
    let want = "a mapping such as {syn: 30s, fin: 2m, reset: 10s}";
    let Some(fields) =
        fields.get("timeouts").and_then(|at| at.fields(&["syn", "fin", "reset"], want, report))
    else {
        return timeouts;
    };
    let range = Duration::from_secs(1)..=Duration::from_secs(3600);
    let mut read = |key, timeout: &mut Duration| {
        let convert = |text| leaf::duration(text, range.clone());
        if let Some(duration) = fields.value(key, "a duration such as 30s", convert, report) {
            *timeout = duration;
        }
    };
    read("syn", &mut timeouts.syn);
    read("fin", &mut timeouts.fin);
    read("reset", &mut timeouts.reset);
    timeouts
}

/// What pools that translate need, and what others cannot have.
pub(super) fn check(
    pools: &[PoolDraft],
    services: &[ServiceDraft],
    (sources, vlan): (&WrittenSources, Option<&Spot>),
    report: &mut Report,
) {
    for pool in pools {
        if pool.forward.translates() {
            refuse_tags(pool, vlan, report);
        } else {
            refuse_ports(pool, report);
        }
        if matches!(pool.forward, Forward::Fullnat { .. }) {
            ask_for_sources(pool, sources, report);
        }
    }
    for service in services {
        let Some(own) = service.pool else { continue };
        let levels = std::iter::once(own).chain(pools[own].tiers.tiers.fallback.iter().copied());
        let translating: Vec<&PoolDraft> =
            levels.map(|level| &pools[level]).filter(|pool| pool.forward.translates()).collect();
        if let Some(pool) = translating.first() {
            refuse_what_has_no_ports(service, pool, report);
        }
        for pool in translating.iter().filter(|pool| matches!(pool.forward, Forward::Nat { .. })) {
            refuse_other_family(service, pool, report);
        }
    }
    warn_of_unused(pools, sources, report);
}

/// A packet that comes back knows nothing of the tag that the client's had.
fn refuse_tags(pool: &PoolDraft, vlan: Option<&Spot>, report: &mut Report) {
    if let Some(at) = vlan {
        let message = format!("`forward: {}` of pool {} cannot keep VLAN tags", pool.forward, pool.name);
        let hint = "list the VLAN devices in `interfaces` instead, or use ipip, gue or l2";
        report.error(at.place, &at.path, message, hint);
    }
}

fn refuse_ports(pool: &PoolDraft, report: &mut Report) {
    for (backend, at) in pool.backends.iter().filter(|(backend, _)| backend.port.is_some()) {
        let message = format!(
            "{} has a `port`, and `forward: {}` leaves the port as it is",
            backend.name, pool.forward
        );
        report.error(at.place, &at.path, message, "remove it, or set forward: nat or fullnat");
    }
}

/// Sources of the backends' families.
fn ask_for_sources(pool: &PoolDraft, sources: &WrittenSources, report: &mut Report) {
    for (backend, at) in &pool.backends {
        let (family, none, example) = match backend.address {
            IpAddr::V4(_) => ("IPv4", sources.model.v4.is_empty(), Ipv4Addr::new(10, 0, 0, 5).into()),
            IpAddr::V6(_) => {
                let example = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 5);
                ("IPv6", sources.model.v6.is_empty(), IpAddr::V6(example))
            }
        };
        if none {
            let message = format!("`forward: fullnat` to {} needs an {family} source", backend.address);
            let hint =
                format!("add one that is routed to the balancer, such as fullnat: {{sources: [{example}]}}");
            report.error(at.place, &at.path, message, hint);
            return;
        }
    }
}

/// Connections are known by their ports.
fn refuse_what_has_no_ports(service: &ServiceDraft, pool: &PoolDraft, report: &mut Report) {
    let forward = pool.forward;
    if let Some((Fragments::Balance, at)) = &service.fragments {
        let message =
            format!("fragments have no ports, and `forward: {forward}` of pool {} needs them", pool.name);
        report.error(at.place, &at.path, message, "remove it, or use ipip, gue or l2");
    }
    if let Some((_, at)) = &service.quic {
        let message = format!(
            "`forward: {forward}` of pool {} knows connections by addresses and ports, not by their IDs",
            pool.name
        );
        report.error(at.place, &at.path, message, "remove it, or use ipip, gue or l2");
    }
}

/// A client's address stays, and has to be of its backend's family.
fn refuse_other_family(service: &ServiceDraft, pool: &PoolDraft, report: &mut Report) {
    for (vip, at) in &service.vips {
        let other = pool.backends.iter().find(|(backend, _)| backend.address.is_ipv4() != vip.is_ipv4());
        if let Some((backend, backend_at)) = other {
            let message = format!(
                "`forward: nat` of pool {} cannot lead {vip} to {} at {backend_at}, which is of the other family",
                pool.name, backend.address
            );
            report.error(at.place, &at.path, message, "use fullnat, or a pool for each family");
            return;
        }
    }
}

fn warn_of_unused(pools: &[PoolDraft], sources: &WrittenSources, report: &mut Report) {
    let Some(at) = &sources.spot else { return };
    let used = |v4| {
        let full = pools.iter().filter(|pool| matches!(pool.forward, Forward::Fullnat { .. }));
        full.flat_map(|pool| &pool.backends).any(|(backend, _)| backend.address.is_ipv4() == v4)
    };
    let Sources { v4, v6, ports: _ } = &sources.model;
    match (used(true), used(false)) {
        (false, false) => {
            report.warn(at.place, &at.path, "no pool has `forward: fullnat`", "remove it, or use it in one");
        }
        (true, true) if v4.len() != v6.len() => {
            let message = format!(
                "of {} IPv4 and {} IPv6 sources as many of each are used as there are of both",
                v4.len(),
                v6.len()
            );
            report.warn(at.place, &at.path, message, "name as many of one family as of the other");
        }
        _ => {}
    }
}
