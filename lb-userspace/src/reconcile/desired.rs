//! What should lie in the kernel for a configuration and what is alive: a pure function, free of ids.

use std::collections::{BTreeMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use ipnetwork::{Ipv4Network, Ipv6Network};
use lb_common::abi::{
    BACKEND_NOBODY, BACKEND_PASS, Backend, BackendKind, Discipline, Egress, Features, Meta,
};
use lb_common::encap::outer_sum;
use lb_common::flow::fingerprint;
use lb_common::wire::{Address6, Be16, Mac, PROTO_TCP, PROTO_UDP};
use rustc_hash::FxHashMap;

use super::backends::Backends;
use super::draft::Draft;
use super::entries::{DesiredVip, VipKey};
use super::image::Ids;
use super::per_backend::PerBackend;
use super::servers::ServerName;
use super::targets::Targets;
use crate::config::model::{
    Backend as ConfiguredBackend, Config, Forward, OuterSource, Pool, Ports, Protocol, Scheduler, Sources,
    Timeouts,
};
use crate::nexthop::NextHop;

/// A backend by its place in the configuration: pool, then backend.
pub type BackendRef = (usize, usize);

/// What the world looks like just now.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct World {
    /// Backends that have a next hop that their pool can use, and whether they pass their checks.
    pub up: PerBackend<bool>,
    /// The same one as long as none has changed.
    pub next_hops: Arc<FxHashMap<IpAddr, NextHop>>,
    /// Backends that take less than their share of new flows, of [`overlay::FULL`]; 0 takes none.
    pub shares: FxHashMap<BackendRef, u16>,
    /// Pools whose packets go to another, and to which.
    pub levels: FxHashMap<usize, usize>,
    /// Pools whose packets go to all backends of the pool in use, whatever their health.
    pub panic: HashSet<usize>,
    /// For schedulers that go by response times; the most where there is none.
    pub response_weights: FxHashMap<BackendRef, u8>,
    /// Backends whose flows do not stay.
    pub old_flows: FxHashMap<BackendRef, OldFlows>,
}

/// Where a slot leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    Nobody,
    /// The host's own stack.
    Pass,
    /// A backend, by its identity.
    Backend(u64),
}

impl Target {
    /// What slots name it by, with the id of each identity.
    pub fn id(&self, ids: &Ids) -> u16 {
        match self {
            Self::Nobody => BACKEND_NOBODY,
            Self::Pass => BACKEND_PASS,
            Self::Backend(identity) => ids.get(identity).copied().unwrap_or(BACKEND_NOBODY),
        }
    }
}

/// Everything but the id and the place of the egress row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredBackend {
    /// The row, with a path of zero.
    pub row: Backend,
    pub next_hop: Option<(Mac, Egress)>,
    /// The set of pools (`pool_set`) with its own.
    pub pool: [u64; 3],
    pub old_flows: OldFlows,
    pub weight: u8,
}

/// What becomes of the flows that a backend has, once it takes no new ones.
///
/// In the order of severity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum OldFlows {
    #[default]
    Stay,
    /// It is down, and there is no room for pins of new flows: these must not go to it with those that have no pin.
    /// Those that have one stay.
    Yield,
    /// It failed: they go where new ones go, if that is somebody.
    Fail,
    /// Somebody wants them gone, or their time is over.
    Move,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredTable {
    /// Logarithm of the length of `cur` and `est`.
    pub log2_length: u32,
    /// Where new flows go: by their hash, or as the discipline picks.
    pub cur: Targets,
    /// Where a flow goes that nothing is known of, by its hash; none where `cur` says that too.
    pub est: Option<Targets>,
    pub discipline: Discipline,
    /// Pools whose backends may be in it.
    pub pools: Vec<usize>,
    /// The same as a set (`pool_set`).
    pub pool_set: [u64; 3],
    /// How long a silent flow is protected (T1).
    pub idle: Duration,
    /// The protocol's number.
    pub protocol: u8,
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Desired {
    pub backends: Backends,
    pub tables: BTreeMap<u64, Arc<DesiredTable>>,
    pub vips: Arc<BTreeMap<VipKey, DesiredVip>>,
    /// The identity of the backend that a connection ID of QUIC names.
    pub servers: Arc<BTreeMap<ServerName, u64>>,
    pub sources: DesiredSources,
    pub timeouts: Timeouts,
}

/// Addresses that clients' are translated to, and how many rows of them there are ports for.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct DesiredSources {
    pub v4: Vec<Ipv4Addr>,
    pub v6: Vec<Ipv6Addr>,
    pub rows: u32,
}

impl DesiredSources {
    pub(super) fn of(config: &Config) -> Self {
        let Sources { v4, v6, ports: _ } = &config.sources;
        let rows = config.limits.connections.div_ceil(config.sources.ports_of_one());
        Self { v4: v4.clone(), v6: v6.clone(), rows }
    }
}

/// The maps as they should be. [`Draft`] says it again at less cost.
pub fn desired(config: &Config, world: &World) -> Desired {
    Draft::of(config).desired(config, world)
}

/// Pins that a CPU makes in a second: more than it gets new flows, so that it bounds floods alone.
const PIN_RATE: u64 = 250_000;

/// What the program is loaded with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadTime {
    pub seed: u64,
    pub features: Features,
    /// ICMP messages of a kind that a CPU sends in a second.
    pub icmp_rate: u64,
    /// Pins of new flows, and of old ones, that a CPU makes in a second.
    pub pin_rate: u64,
    /// As in `Constants`; 0 where no source is translated.
    pub source_ports: u64,
}

impl LoadTime {
    pub fn of(config: &Config) -> Self {
        Self {
            seed: config.seed,
            features: features(config),
            icmp_rate: u64::from(config.icmp.rate),
            pin_rate: PIN_RATE,
            source_ports: source_ports(config),
        }
    }

    /// What maps say of the program that goes by them.
    pub const fn of_meta(meta: &Meta) -> Self {
        let Meta { seed, features, icmp_rate, pin_rate, source_ports, .. } = *meta;
        Self { seed, features: Features::from_bits(features), icmp_rate, pin_rate, source_ports }
    }

    /// As it is, but able to do what another needs as well.
    #[must_use]
    pub const fn with(self, features: Features) -> Self {
        Self { features: self.features.with(features), ..self }
    }
}

/// The ports of sources in the form of `Constants`; 0 where there are none.
fn source_ports(config: &Config) -> u64 {
    let Sources { v4, v6, ports } = &config.sources;
    if v4.is_empty() && v6.is_empty() {
        return 0;
    }
    u64::from(*ports.start()) | u64::from(config.sources.ports_of_one()) << 16
}

/// Features that a configuration needs of the program.
pub fn features(config: &Config) -> Features {
    let mut features = Features::default();
    for service in &config.services {
        for vip in &service.vips {
            features = features.with(if vip.is_ipv4() { Features::IPV4 } else { Features::IPV6 });
            if !vip.is_address() {
                features = features.with(Features::PREFIXES).with(Features::PORT_RULES);
            }
        }
        if service.ports.iter().any(|ports| !matches!(ports, Ports::Port(_))) {
            features = features.with(Features::PORT_RULES);
        }
        if service.scheduler == Scheduler::SourceHash {
            features = features.with(Features::SOURCE_HASH);
        }
        if service.quic.is_some() {
            features = features.with(Features::QUIC);
        }
        for pool in config.levels_of(service.pool).map(|pool| &config.pools[pool]) {
            features = pool.backends.iter().fold(features, |all, backend| all.with(way_to(pool, backend)));
        }
    }
    // Their services may have gone to other pools, their flows have not.
    let all = config.pools.iter().flat_map(|pool| pool.backends.iter().map(move |backend| (pool, backend)));
    for (pool, backend) in all.filter(|(_, backend)| backend.leaving) {
        features = features.with(way_to(pool, backend));
    }
    if config.vip_arp {
        features = features.with(Features::VIP_ARP);
    }
    if config.vlan {
        features = features.with(Features::VLAN);
    }
    if config.icmp.echo && !config.services.is_empty() {
        features = features.with(Features::ECHO);
    }
    if config.trace {
        features = features.with(Features::TRACE);
    }
    features
}

/// What it takes to send to a backend.
fn way_to(pool: &Pool, backend: &ConfiguredBackend) -> Features {
    way_of(kind(pool.forward, backend.address))
}

const fn way_of(kind: BackendKind) -> Features {
    match kind {
        BackendKind::Ipip4 => Features::IPIP4,
        BackendKind::Ipip6 => Features::IPIP6,
        BackendKind::L2 => Features::L2,
        BackendKind::Gue4 => Features::GUE4,
        BackendKind::Gue6 => Features::GUE6,
        BackendKind::Nat4 | BackendKind::Nat6 => Features::NAT,
        // Answers come in the backend's family, whatever the client's is.
        BackendKind::Fullnat4 => Features::NAT.with(Features::FULLNAT).with(Features::IPV4),
        BackendKind::Fullnat6 => Features::NAT.with(Features::FULLNAT).with(Features::IPV6),
        BackendKind::Nobody | BackendKind::Pass => Features::from_bits(0),
    }
}

/// Features that only say how packets get to backends.
pub const WAYS: [Features; 7] = [
    Features::IPIP4,
    Features::IPIP6,
    Features::L2,
    Features::GUE4,
    Features::GUE6,
    Features::NAT,
    Features::FULLNAT,
];

/// What it takes to send to the backends of rows, of which slots and flows may name those that no configuration does.
pub fn ways_to(rows: &[Backend]) -> Features {
    let kinds = rows.iter().filter_map(|row| BackendKind::from_raw(row.kind));
    kinds.fold(Features::default(), |all, kind| all.with(way_of(kind)))
}

pub const fn protocol_number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => PROTO_TCP,
        Protocol::Udp => PROTO_UDP,
    }
}

pub fn kind(forward: Forward, address: IpAddr) -> BackendKind {
    match (forward, address) {
        (Forward::L2, _) => BackendKind::L2,
        (Forward::Ipip, IpAddr::V4(_)) => BackendKind::Ipip4,
        (Forward::Ipip, IpAddr::V6(_)) => BackendKind::Ipip6,
        (Forward::Gue { .. }, IpAddr::V4(_)) => BackendKind::Gue4,
        (Forward::Gue { .. }, IpAddr::V6(_)) => BackendKind::Gue6,
        (Forward::Nat { .. }, IpAddr::V4(_)) => BackendKind::Nat4,
        (Forward::Nat { .. }, IpAddr::V6(_)) => BackendKind::Nat6,
        (Forward::Fullnat { .. }, IpAddr::V4(_)) => BackendKind::Fullnat4,
        (Forward::Fullnat { .. }, IpAddr::V6(_)) => BackendKind::Fullnat6,
    }
}

/// How packets get to the backend of a row; `None` where it is nobody's.
pub fn forward_of(row: &Backend) -> Option<Forward> {
    match BackendKind::from_raw(row.kind)? {
        BackendKind::Nobody | BackendKind::Pass => None,
        BackendKind::Ipip4 | BackendKind::Ipip6 => Some(Forward::Ipip),
        BackendKind::Gue4 | BackendKind::Gue6 => Some(Forward::Gue { port: row.port.get() }),
        BackendKind::L2 => Some(Forward::L2),
        BackendKind::Nat4 | BackendKind::Nat6 => Some(Forward::Nat { port: row.port.get() }),
        BackendKind::Fullnat4 | BackendKind::Fullnat6 => Some(Forward::Fullnat { port: row.port.get() }),
    }
}

/// What a backend is: the same in every run and on every balancer. Everything in its row but the path follows from it.
pub fn backend_identity(pool: &str, forward: Forward, address: IpAddr) -> u64 {
    let kind = kind(forward, address) as u8;
    let text = match forward {
        Forward::Ipip | Forward::L2 => format!("{pool}/{address}/{kind}"),
        Forward::Gue { port } | Forward::Nat { port } | Forward::Fullnat { port } => {
            format!("{pool}/{address}/{kind}/{port}")
        }
    };
    // Never 0, which is a free row.
    fingerprint(1, text.as_bytes()).max(1)
}

/// What a backend of a pool is.
pub fn identity_of(pool: &Pool, backend: &ConfiguredBackend) -> u64 {
    backend_identity(&pool.name, pool.forward_to(backend), backend.address)
}

pub fn table_identity(pool: &Pool, protocol: Protocol, scheduler: Scheduler) -> u64 {
    fingerprint(2, format!("{}/{}/{scheduler}", pool.name, protocol_number(protocol)).as_bytes()).max(1)
}

/// Pools as a set of 192 bits, by their names: two may share a bit, which keeps a little more than need be.
pub fn pool_set<'n>(names: impl IntoIterator<Item = &'n str>) -> [u64; 3] {
    let mut set = [0; 3];
    for name in names {
        let bit = fingerprint(3, name.as_bytes()) % 192;
        set[(bit / 64) as usize] |= 1 << (bit % 64);
    }
    set
}

/// Whether two sets of pools have one in common.
pub fn meet(one: [u64; 3], other: [u64; 3]) -> bool {
    one.iter().zip(other).any(|(one, other)| one & other != 0)
}

pub(super) fn backend_row(forward: Forward, address: IpAddr, identity: u64) -> Backend {
    let kind = kind(forward, address);
    let (words, sum) = match address {
        IpAddr::V4(v4) => {
            let word = u32::from_ne_bytes(v4.octets());
            ([u64::from(word), 0], outer_sum(word))
        }
        IpAddr::V6(v6) => {
            let Address6 { high, low } = Address6::from_bytes(v6.octets());
            ([high, low], 0)
        }
    };
    Backend {
        kind: kind as u8,
        outer_sum: if forward == Forward::L2 { 0 } else { sum },
        port: Be16::new(forward.port()),
        overhead: kind.overhead(),
        address: words,
        identity,
        ..Backend::default()
    }
}

/// The way out to a next hop, with the tunnel's source.
pub(super) fn egress(hop: &NextHop, outer: &OuterSource) -> Egress {
    let preferred4 = match hop.preferred_source {
        Some(IpAddr::V4(source)) => Some(Ipv4Network::from(source)),
        _ => None,
    };
    let preferred6 = match hop.preferred_source {
        Some(IpAddr::V6(source)) => Some(Ipv6Network::from(source)),
        _ => None,
    };
    let source4 = outer.v4.or(preferred4);
    let source6 = outer.v6.or(preferred6);
    Egress {
        ifindex: hop.ifindex,
        mtu: u32::from(hop.mtu),
        source_mac: Mac::from_bytes(hop.source_mac).bits(),
        source4: source4.map_or(0, |network| u32::from_ne_bytes(network.network().octets())),
        source4_mask: source4.map_or(0, |network| !u32::from_ne_bytes(network.mask().octets())),
        source6: source6.map_or([0; 2], |network| {
            let Address6 { high, low } = Address6::from_bytes(network.network().octets());
            [high, low]
        }),
        source6_mask: source6.map_or(0, |network| !Address6::from_bytes(network.mask().octets()).low),
        spare: [0; 2],
    }
}

#[cfg(test)]
mod tests;
