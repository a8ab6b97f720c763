//! Rules over the VIPs of all services: which of them may stand beside each other. Knows no pool but by its number.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use lb_common::abi::{MOST_PORT_RULES, MOST_PREFIX_LENGTHS};

use super::model::{Fragments, Ports, Protocol, Scheduler, SourcePrefix, Unmapped, Vip};
use super::problem::{Report, Spot};
use super::services::ServiceDraft;
use super::top::WrittenLimits;

/// Every VIP, at the first place it stands. In order, so that problems are the same in every run.
pub(super) struct Vips<'s> {
    first: BTreeMap<Vip, &'s Spot>,
    /// Of both families, longest first.
    lengths: BTreeSet<std::cmp::Reverse<u8>>,
}

impl<'s> Vips<'s> {
    pub fn of(services: &'s [ServiceDraft]) -> Self {
        let mut first = BTreeMap::new();
        for (vip, at) in services.iter().flat_map(|service| &service.vips) {
            first.entry(*vip).or_insert(at);
        }
        let lengths = first.keys().map(|vip| std::cmp::Reverse(vip.length())).collect();
        Self { first, lengths }
    }

    pub fn all(&self) -> impl Iterator<Item = (Vip, &'s Spot)> + '_ {
        self.first.iter().map(|(vip, at)| (*vip, *at))
    }

    /// The longest VIP that holds the address.
    pub fn holding(&self, address: IpAddr) -> Option<(Vip, &'s Spot)> {
        let longest = self.lengths.iter().filter_map(|length| Vip::holding(address, length.0));
        longest.into_iter().find_map(|vip| Some((vip, *self.first.get(&vip)?)))
    }

    /// The VIP itself and the prefixes that it lies in, longest first.
    fn around(&self, vip: Vip) -> impl Iterator<Item = Vip> + '_ {
        let shorter = self.lengths.iter().filter(move |length| length.0 <= vip.length());
        let around = shorter.filter_map(move |length| Vip::holding(vip.first(), length.0));
        around.filter(|vip| self.first.contains_key(vip))
    }
}

/// What to say of an address that is a VIP and should not be.
pub(super) fn taken(address: IpAddr, vip: Vip, at: &Spot) -> String {
    if vip.is_address() {
        format!("{address} is also the VIP at {at}")
    } else {
        format!("{address} is in the VIP {vip} at {at}")
    }
}

pub(super) fn triples_of(service: &ServiceDraft) -> u64 {
    // Each factor is below the values a file may hold (2^21): no overflow.
    service.vips.len() as u64 * service.ports.len() as u64 * service.protocols.len() as u64
}

/// Entries that take fragments: one for each VIP and protocol.
pub(super) fn fragment_entries_of(service: &ServiceDraft) -> u64 {
    let balanced = matches!(service.fragments, Some((Fragments::Balance, _)));
    if balanced { service.vips.len() as u64 * service.protocols.len() as u64 } else { 0 }
}

/// Triples that are compared even where the limit is lower.
const COMPARED: u32 = 100_000;

pub(super) fn check(services: &[ServiceDraft], vips: &Vips<'_>, limits: &WrittenLimits, report: &mut Report) {
    // A few lines can name a trillion triples. What is far beyond the limit is refused anyway.
    let mut budget = u64::from(limits.model.vips.max(COMPARED));
    let within = services.iter().take_while(|service| {
        let left = budget.checked_sub(triples_of(service));
        budget = left.unwrap_or(0);
        left.is_some()
    });
    let services = &services[..within.count()];
    check_lengths(services, report);
    check_triples(services, report);
    check_ranges(services, report);
    check_rules(services, vips, report);
    check_fragments(services, vips, report);
    check_unmapped(services, report);
}

/// The packet path tries one length after the other.
fn check_lengths(services: &[ServiceDraft], report: &mut Report) {
    let mut families: [BTreeSet<u8>; 2] = Default::default();
    for (vip, at) in services.iter().flat_map(|service| &service.vips) {
        let lengths = &mut families[usize::from(vip.is_ipv4())];
        if vip.is_address() || lengths.contains(&vip.length()) {
            continue;
        }
        if lengths.len() < MOST_PREFIX_LENGTHS as usize {
            lengths.insert(vip.length());
            continue;
        }
        let family = if vip.is_ipv4() { "IPv4" } else { "IPv6" };
        let known: Vec<String> = lengths.iter().rev().map(|length| format!("/{length}")).collect();
        let message = format!(
            "{vip} has a further prefix length, and {family} VIPs may have {MOST_PREFIX_LENGTHS}: {}",
            known.join(", ")
        );
        report.error(at.place, &at.path, message, "split it into prefixes of one of these lengths");
    }
}

/// What a service shares with one that stands before it.
struct Shared<'a> {
    count: usize,
    /// The first triple of them: as text, where it stands here, and where it stands there.
    triple: String,
    here: &'a Spot,
    there: &'a Spot,
}

/// No two services answer to the same VIP, ports and protocol. One problem for each pair of
/// services, however many triples they share.
fn check_triples(services: &[ServiceDraft], report: &mut Report) {
    // Many triples: in keys that are hashed quickly.
    let mut numbers: HashMap<Vip, u32> = HashMap::new();
    let mut owners: HashMap<(u32, u32, Protocol), (usize, &Spot)> = HashMap::new();
    for (i, service) in services.iter().enumerate() {
        let mut shared: BTreeMap<usize, Shared> = BTreeMap::new();
        for (vip, here) in &service.vips {
            let next = numbers.len() as u32;
            let number = *numbers.entry(*vip).or_insert(next);
            for (ports, _) in &service.ports {
                let bounds = u32::from(ports.lowest()) << 16 | u32::from(ports.highest());
                for protocol in &service.protocols {
                    let (owner, there) = *owners.entry((number, bounds, *protocol)).or_insert((i, here));
                    if owner != i {
                        let triple = || format!("{} {protocol}", vip.with(*ports));
                        let new = || Shared { count: 0, triple: triple(), here, there };
                        shared.entry(owner).or_insert_with(new).count += 1;
                    }
                }
            }
        }
        for (owner, Shared { count, triple, here, there }) in shared {
            let more = if count > 1 { format!(" (and {} more)", count - 1) } else { String::new() };
            let owner = services[owner].called();
            let message = format!("{triple}{more} already belongs to {owner} at {there}");
            report.error(here.place, &here.path, message, "remove it from one of the two services");
        }
    }
}

/// A range of a service, and where it stands.
struct Range<'a> {
    low: u16,
    high: u16,
    service: usize,
    at: &'a Spot,
}

/// Of two ranges of a VIP that overlap, neither goes before the other. One problem for each pair of places.
fn check_ranges(services: &[ServiceDraft], report: &mut Report) {
    let mut ranges: BTreeMap<(Vip, Protocol), Vec<Range<'_>>> = BTreeMap::new();
    for (service, draft) in services.iter().enumerate() {
        for (ports, at) in &draft.ports {
            let Ports::Range(low, high) = *ports else { continue };
            for (vip, _) in &draft.vips {
                for protocol in &draft.protocols {
                    let range = Range { low, high, service, at };
                    ranges.entry((*vip, *protocol)).or_default().push(range);
                }
            }
        }
    }
    let mut told = HashSet::new();
    for ((vip, protocol), mut ranges) in ranges {
        ranges.sort_by_key(|range| (range.low, range.high, range.service));
        let mut highest: Option<Range<'_>> = None;
        for range in ranges {
            if let Some(before) = &highest
                && range.low <= before.high
                // The same range is the same triple.
                && (range.low, range.high) != (before.low, before.high)
            {
                let mut pair = [&range, before];
                pair.sort_by_key(|range| range.at.place);
                let [there, here] = pair;
                if told.insert((there.at.place, here.at.place)) {
                    let message = format!(
                        "{}-{} overlaps {}-{} of {} at {}, on {vip} {protocol}",
                        here.low,
                        here.high,
                        there.low,
                        there.high,
                        services[there.service].called(),
                        there.at
                    );
                    let hint = "split the ranges so that each port is in one";
                    report.error(here.at.place, &here.at.path, message, hint);
                }
            }
            if highest.as_ref().is_none_or(|before| before.high < range.high) {
                highest = Some(range);
            }
        }
    }
}

/// The packet path goes through one list for each VIP: its own ranges and those of the prefixes that it lies in. Reported
/// at the service that makes a list too long.
fn check_rules(services: &[ServiceDraft], vips: &Vips<'_>, report: &mut Report) {
    let mut own: HashMap<Vip, Vec<(usize, usize)>> = HashMap::new();
    for (index, service) in services.iter().enumerate() {
        let singles = service.ports.iter().filter(|(ports, _)| matches!(ports, Ports::Port(_))).count();
        for (vip, _) in &service.vips {
            // Single ports of an address are found without a list.
            let ports = service.ports.len() - if vip.is_address() { singles } else { 0 };
            own.entry(*vip).or_default().push((index, ports * service.protocols.len()));
        }
    }
    let mut told = HashSet::new();
    for (vip, _) in vips.all() {
        let mut rules: Vec<(usize, usize)> =
            vips.around(vip).filter_map(|vip| own.get(&vip)).flatten().copied().collect();
        rules.sort_unstable();
        let mut sum = 0;
        let Some((index, _)) = rules.into_iter().find(|(_, count)| {
            sum += count;
            sum > MOST_PORT_RULES as usize
        }) else {
            continue;
        };
        let service = &services[index];
        if let Some((_, at)) = service.ports.first().filter(|_| told.insert(index)) {
            let message = format!(
                "with these, {vip} has {sum} ranges, any-ports and ports of prefixes, and {MOST_PORT_RULES} are possible (each protocol counts)"
            );
            report.error(at.place, &at.path, message, "use fewer and wider ranges, or any");
        }
    }
}

/// Fragments have no ports: who takes them must not depend on ports.
fn check_fragments(services: &[ServiceDraft], vips: &Vips<'_>, report: &mut Report) {
    // Of each VIP and protocol, the first service of each table, and way to choose in it, that packets go to.
    type Tables = BTreeMap<(Option<usize>, Scheduler, SourcePrefix), usize>;
    let mut tables: HashMap<(Vip, Protocol), Tables> = HashMap::new();
    for (index, service) in services.iter().enumerate() {
        for (vip, _) in &service.vips {
            for protocol in &service.protocols {
                let tables = tables.entry((*vip, *protocol)).or_default();
                tables.entry((service.pool, service.scheduler, service.source_prefix)).or_insert(index);
            }
        }
    }
    for service in services {
        let Some((Fragments::Balance, at)) = &service.fragments else { continue };
        if service.scheduler != Scheduler::SourceHash {
            let message = "balance needs scheduler: source-hash, because fragments have no ports";
            report.error(at.place, &at.path, message, "set scheduler: source-hash, or fragments: drop");
            continue;
        }
        if let Some((vip, _)) = service.vips.iter().find(|(vip, _)| !vip.is_address()) {
            let message = format!("balance is for addresses, and the VIP {vip} is a prefix");
            report.error(at.place, &at.path, message, "list its addresses in a service of their own");
            continue;
        }
        let wanted = (service.pool, service.scheduler, service.source_prefix);
        let others = service
            .vips
            .iter()
            .flat_map(|(vip, _)| vips.around(*vip))
            .flat_map(|vip| service.protocols.iter().map(move |protocol| (vip, *protocol)));
        let other = others.filter_map(|key| Some((key, tables.get(&key)?))).find_map(|(key, tables)| {
            let other = tables.iter().find(|(table, _)| table.0.is_some() && **table != wanted)?;
            Some((key, *other.0, *other.1))
        });
        if let Some(((vip, protocol), (pool, scheduler, _), other)) = other.filter(|_| service.pool.is_some())
        {
            let differs = match pool == service.pool {
                false => "goes to another pool",
                true if scheduler == service.scheduler => "has another source_prefix",
                true => "has another scheduler",
            };
            let other = &services[other];
            let message = format!(
                "fragments of {vip} {protocol} have no ports, but {} at {} {differs}",
                other.called(),
                other.spot
            );
            let hint = "send all services of the VIP and protocol to one pool with source-hash, or set fragments: drop";
            report.error(at.place, &at.path, message, hint);
        }
    }
}

/// What no service takes is no service's alone: those of one VIP agree.
fn check_unmapped(services: &[ServiceDraft], report: &mut Report) {
    let mut first: HashMap<Vip, (Unmapped, usize)> = HashMap::new();
    for (index, service) in services.iter().enumerate() {
        let Some((unmapped, at)) = &service.unmapped else { continue };
        for (vip, _) in &service.vips {
            let (said, owner) = *first.entry(*vip).or_insert((*unmapped, index));
            if said == *unmapped {
                continue;
            }
            let owner = &services[owner];
            let there = owner.unmapped.as_ref().map_or(&owner.spot, |(_, there)| there);
            let message = format!("{unmapped}, but {} says {said} of {vip} at {there}", owner.called());
            report.error(at.place, &at.path, message, "say the same in both, or leave it out in one");
            break;
        }
    }
}
