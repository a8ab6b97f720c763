//! From services to the entries that the packet path looks up: exact ones, fragments', and those of addresses and
//! prefixes with their port rules. Knows neither tables nor places in maps.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use lb_common::abi::{PortKey, VipTarget};

use super::desired::{protocol_number, table_identity};
use super::servers::server_id_bytes;
use crate::config::model::{Config, Fragments, Ports, Scheduler, Service, SourcePrefix, Unmapped, Vip};

/// An address and a `PortKey`.
pub type VipKey = (IpAddr, u32);

/// What has a row of counters: VIP, ports, and the number of the protocol.
pub type Counted = (Vip, Ports, u8);

/// Whom an entry or a rule leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lead {
    /// The identity of its table.
    pub table: u64,
    /// `VipTarget::SOURCE_HASH` with what it cuts off, or 0; what `VipTarget::server_ids_of` says; and
    /// `VipTarget::TRANSLATED`, or 0.
    pub flags: u16,
    pub counted: Counted,
}

/// Ports and a protocol that lead to a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DesiredRule {
    pub ports: Ports,
    pub protocol: u8,
    pub lead: Lead,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DesiredVip {
    /// An exact entry, or that of fragments.
    Service(Lead),
    /// Marks an address or a prefix. `flags`: `VipTarget::UNMAPPED_PASS`, `UNMAPPED_REJECT` or 0.
    Address { flags: u16, rules: Vec<DesiredRule> },
    /// An address that clients' are translated to.
    Source,
}

impl DesiredVip {
    pub fn counted(&self) -> impl Iterator<Item = Counted> + '_ {
        self.leads().map(|lead| lead.counted)
    }

    pub fn leads(&self) -> impl Iterator<Item = &Lead> {
        let (service, rules) = match self {
            Self::Service(lead) => (Some(lead), &[][..]),
            Self::Address { rules, .. } => (None, rules.as_slice()),
            Self::Source => (None, &[][..]),
        };
        service.into_iter().chain(rules.iter().map(|rule| &rule.lead))
    }
}

/// The key of the entry that marks a VIP.
pub fn mark_key(vip: Vip) -> VipKey {
    let key = if vip.is_address() { PortKey::ADDRESS } else { PortKey::prefix(u32::from(vip.length())) };
    (vip.first(), key.0)
}

/// The VIP that an entry marks; nothing for other entries.
pub fn marked((address, key): VipKey) -> Option<Vip> {
    match PortKey(key) {
        PortKey::ADDRESS => Some(Vip::from(address)),
        key => Vip::holding(address, key.prefix_length()?.try_into().ok()?),
    }
}

/// What the services of one VIP ask for.
#[derive(Default)]
struct Own {
    rules: Vec<DesiredRule>,
    unmapped: Option<Unmapped>,
}

pub fn entries(config: &Config) -> BTreeMap<VipKey, DesiredVip> {
    let mut entries = BTreeMap::new();
    let mut marks: BTreeMap<Vip, Own> = BTreeMap::new();
    for service in &config.services {
        let pool = config.pool_of(service);
        let server_ids = VipTarget::server_ids_of(server_id_bytes(config, service));
        let translated = if translates(config, service) { VipTarget::TRANSLATED } else { 0 };
        let identity = |&protocol| table_identity(pool, protocol, service.scheduler);
        let tables: Vec<u64> = service.protocols.iter().map(identity).collect();
        for &vip in &service.vips {
            let flags = flags(service, vip) | server_ids | translated;
            let own = marks.entry(vip).or_default();
            own.unmapped = own.unmapped.or(service.unmapped);
            for (&protocol, &table) in service.protocols.iter().zip(&tables) {
                let protocol = protocol_number(protocol);
                for &ports in &service.ports {
                    let lead = Lead { table, flags, counted: (vip, ports, protocol) };
                    match ports {
                        Ports::Port(port) if vip.is_address() => {
                            let key = (vip.first(), PortKey::new(port, protocol).0);
                            entries.insert(key, DesiredVip::Service(lead));
                        }
                        _ => own.rules.push(DesiredRule { ports, protocol, lead }),
                    }
                    if service.fragments == Fragments::Balance && vip.is_address() {
                        let key = (vip.first(), PortKey::fragments(protocol).0);
                        entries.entry(key).or_insert(DesiredVip::Service(lead));
                    }
                }
            }
        }
    }
    // The packet path takes the first rule that holds a port.
    for own in marks.values_mut() {
        own.rules.sort_by_key(|rule| (rule.ports.rank(), rule.ports, rule.protocol));
    }
    entries.extend(merged(&marks));
    entries.extend(sources(config).map(|address| ((address, PortKey::ADDRESS.0), DesiredVip::Source)));
    entries
}

/// Whether some pool that a service may use translates addresses.
fn translates(config: &Config, service: &Service) -> bool {
    config.levels_of(service.pool).any(|pool| config.pools[pool].forward.translates())
}

/// Addresses that clients' are translated to, where any are.
fn sources(config: &Config) -> impl Iterator<Item = IpAddr> + '_ {
    let used = config.limits.connections > 0;
    config.sources.all().filter(move |_| used)
}

/// How packets to a VIP of a service are hashed.
fn flags(service: &Service, vip: Vip) -> u16 {
    match service.scheduler {
        Scheduler::SourceHash => {
            let SourcePrefix { v4, v6 } = service.source_prefix;
            let cut = if vip.is_ipv4() { 32u8.saturating_sub(v4) } else { 128u8.saturating_sub(v6) };
            VipTarget::SOURCE_HASH | VipTarget::prefix_cut(cut)
        }
        Scheduler::Maglev
        | Scheduler::RoundRobin
        | Scheduler::WeightedRoundRobin
        | Scheduler::Random
        | Scheduler::LeastConnections
        | Scheduler::LeastResponseTime => 0,
    }
}

/// The entry of every VIP, with what it inherits from the prefixes that it lies in: the packet path looks at one entry.
fn merged(marks: &BTreeMap<Vip, Own>) -> BTreeMap<VipKey, DesiredVip> {
    let prefixes = marks.keys().filter(|vip| !vip.is_address());
    let lengths: BTreeSet<Reverse<u8>> = prefixes.map(|vip| Reverse(vip.length())).collect();
    let merge = |(vip, own): (&Vip, &Own)| {
        let (mut rules, mut unmapped) = (own.rules.clone(), own.unmapped);
        let shorter = lengths.iter().filter(|length| length.0 < vip.length());
        let around = shorter.filter_map(|length| marks.get(&Vip::holding(vip.first(), length.0)?));
        for prefix in around {
            rules.extend(&prefix.rules);
            unmapped = unmapped.or(prefix.unmapped);
        }
        let flags = match unmapped {
            None | Some(Unmapped::Drop) => 0,
            Some(Unmapped::Pass) => VipTarget::UNMAPPED_PASS,
            Some(Unmapped::Reject) => VipTarget::UNMAPPED_REJECT,
        };
        (mark_key(*vip), DesiredVip::Address { flags, rules })
    };
    marks.iter().map(merge).collect()
}
