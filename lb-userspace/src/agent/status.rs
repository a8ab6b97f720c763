//! A snapshot of the agent told: what commands show, the same as JSON on the API. Reads counters; knows no core.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use lb_common::abi::{Replies, Traffic};
use lb_common::outcome::Outcome;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::core::{BackendKey, keys};
use super::overrides::{Exit, Uptime};
use super::snapshot::{
    BackendState, BackendView, ConnectionCounts, ConnectionsStatus, PinsStatus, PoolView, Reload, Remaining,
    Snapshot,
};
use crate::bpf::{Attached, MapsError};
use crate::config::model::{Pool, Ports, Vip};
use crate::reconcile::desired::{identity_of, protocol_number};
use crate::tables::overlay::FULL;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub pid: u32,
    pub uptime_seconds: u64,
    /// When the counters were read, on the clock that no one sets. Two of them make rates.
    pub monotonic_ns: u64,
    pub config_file: String,
    pub last_reload: Option<LastReload>,
    pub interfaces: Vec<InterfaceStatus>,
    pub services: Vec<ServiceStatus>,
    pub pools: Vec<PoolStatus>,
    pub backends: Vec<BackendStatus>,
    pub pins: PinsStatus,
    /// Nothing where no pool translates addresses.
    #[serde(default)]
    pub connections: Option<ConnectionsStatus>,
    /// Every verdict and drop reason, also those that never happened.
    pub outcomes: Vec<OutcomeStatus>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LastReload {
    /// Seconds since 1970.
    pub at_unix: u64,
    pub error: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct InterfaceStatus {
    pub name: String,
    /// `native` or `generic`.
    pub mode: String,
}

/// One VIP with one port, range or any-port and a protocol.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ServiceStatus {
    pub name: String,
    /// An address or a prefix.
    pub vip: Vip,
    /// A number; `8000-8100` or `any` as text.
    pub port: Ports,
    pub protocol: String,
    pub pool: String,
    pub scheduler: String,
    pub backends_up: usize,
    pub backends: usize,
    pub packets: u64,
    /// Bytes of IP, without Ethernet and tunnel headers.
    pub bytes: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PoolStatus {
    pub name: String,
    /// The pool that takes its packets: itself, or a fallback.
    pub in_use: String,
    /// Whether so few backends are up that packets go to all of the pool in use.
    pub panic: bool,
    pub backends_up: usize,
    pub backends: usize,
    /// Backends that must be up for it to be used, as a number or a percentage.
    pub min_healthy: String,
    /// Slots of its tables.
    pub slots: u32,
    /// Of these, how many are on the move: old flows stay where they are, and all are pinned.
    pub slots_moving: u32,
    /// And how many have moved, but for flows with pins.
    pub slots_pinned: u32,
    /// Flows that are pinned to its backends, and connections to them that have not ended.
    pub pins: u64,
    /// Nothing where it does not translate addresses.
    #[serde(default)]
    pub connections: Option<ConnectionCounts>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BackendStatus {
    pub pool: String,
    pub name: String,
    pub address: IpAddr,
    pub forward: String,
    /// The one in effect.
    pub weight: u8,
    /// The file's, where a command has set another.
    pub weight_in_file: Option<u8>,
    /// Its health, or `draining` or `disabled`.
    pub state: String,
    /// `up`, `down`, `checking` or `unresolved`.
    pub health: String,
    /// Why, in words.
    pub check: String,
    /// How it is taken out of use, if it is.
    pub exit: Option<ExitStatus>,
    /// Slots that lead new flows to it, over all tables.
    pub slots: u64,
    /// Slots that lead old flows to it.
    pub slots_old: u64,
    /// Flows that are pinned to it, and connections that have not ended.
    pub pins: u64,
    /// Nothing where its pool does not translate addresses.
    #[serde(default)]
    pub connections: Option<ConnectionCounts>,
    #[serde(default)]
    pub replies: Option<RepliesStatus>,
    /// Percent of its share that it gets while it starts.
    pub starting: Option<f64>,
    pub packets: u64,
    pub bytes: u64,
}

/// What came back from a backend, where addresses are translated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepliesStatus {
    pub packets: u64,
    /// Bytes of IP.
    pub bytes: u64,
    /// TCP resets.
    pub resets: u64,
    /// Connections whose first answer came.
    pub answered: u64,
    /// How long these took together, from the client's first packet to it.
    pub waited_ns: u64,
}

impl RepliesStatus {
    fn of(replies: Replies) -> Self {
        let Replies { packets, bytes, resets, answered, waited } = replies;
        Self { packets, bytes, resets, answered, waited_ns: waited }
    }
}

/// How a backend is taken out of use.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExitStatus {
    /// `drain`, `disable` or `removed`.
    pub cause: String,
    pub seconds: u64,
    /// Until the flows that it still has are moved; 0 where they are, nothing where they stay.
    pub seconds_left: Option<u64>,
    /// Nothing names it any more.
    pub complete: bool,
    /// QUIC connections, which have no pins, sent to it a short while ago.
    #[serde(default)]
    pub quic: bool,
    /// What it still had at its deadline.
    pub cut_off: Option<Remaining>,
}

impl ExitStatus {
    fn new(exit: &Exit, remaining: Remaining, now: Uptime) -> Self {
        Self {
            cause: exit.cause.as_str().to_owned(),
            seconds: now.saturating_sub(exit.since).as_secs(),
            seconds_left: exit
                .deadline
                .map(|deadline| deadline.saturating_sub(now).as_millis().div_ceil(1000) as u64),
            complete: remaining.is_empty(),
            quic: remaining.quic,
            cut_off: exit.cut,
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OutcomeStatus {
    pub name: String,
    pub action: String,
    pub packets: u64,
    pub meaning: String,
    /// What an operator does about many of them; empty where nothing is wrong.
    pub advice: String,
}

/// Everything that is counted, at one time. Two of them make rates.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Stats {
    pub monotonic_ns: u64,
    pub services: Vec<ServiceStats>,
    pub backends: Vec<BackendStats>,
    pub outcomes: Vec<OutcomeStats>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ServiceStats {
    pub name: String,
    /// An address or a prefix.
    pub vip: Vip,
    /// A number; `8000-8100` or `any` as text.
    pub port: Ports,
    pub protocol: String,
    pub packets: u64,
    pub bytes: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BackendStats {
    pub pool: String,
    pub name: String,
    pub address: IpAddr,
    pub packets: u64,
    pub bytes: u64,
    /// Nothing where its pool does not translate addresses.
    #[serde(default)]
    pub replies: Option<RepliesStatus>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OutcomeStats {
    pub name: String,
    pub action: String,
    pub packets: u64,
}

impl Snapshot {
    pub fn status(&self) -> Result<Status, MapsError> {
        Ok(Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_seconds: self.uptime.as_secs(),
            monotonic_ns: monotonic_ns(),
            config_file: self.path.display().to_string(),
            last_reload: self.reloads.last.as_ref().map(last_reload),
            interfaces: self.attached.iter().map(interface).collect(),
            services: self.services()?,
            pools: self.pools(),
            backends: self.backends()?,
            pins: self.pins,
            connections: self.connections,
            outcomes: self.outcomes()?,
        })
    }

    fn pools(&self) -> Vec<PoolStatus> {
        let counts = self.backends_up();
        let mut flows = vec![(0, ConnectionCounts::default()); self.config.pools.len()];
        for ((_, pool, _), view) in keys(&self.config).zip(&self.backends) {
            flows[pool].0 += view.remaining.pins;
            flows[pool].1 += view.connections.unwrap_or_default();
        }
        let status = |(index, (pool, view)): (usize, (&Pool, &PoolView))| {
            let (backends_up, backends) = counts.get(&index).copied().unwrap_or_default();
            PoolStatus {
                name: pool.name.clone(),
                in_use: view.in_use.clone(),
                panic: view.panic,
                backends_up,
                backends,
                min_healthy: pool.tiers.min_healthy.to_string(),
                slots: view.moving.slots,
                slots_moving: view.moving.dirty,
                slots_pinned: view.moving.held,
                pins: flows[index].0,
                connections: pool.forward.translates().then_some(flows[index].1),
            }
        };
        self.config.pools.iter().zip(&self.pools).enumerate().map(status).collect()
    }

    pub fn backends(&self) -> Result<Vec<BackendStatus>, MapsError> {
        let all = keys(&self.config).zip(&self.backends);
        all.map(|((_, pool, backend), view)| self.told(&self.config.pools[pool], backend, view)).collect()
    }

    /// The place of a backend among all, by its pool and its name or address.
    pub fn place(&self, pool: &str, name: &str) -> Option<usize> {
        let is_it = |(_, of, backend): &(BackendKey, usize, usize)| {
            let (of, address) = (&self.config.pools[*of], name.parse());
            let backend = &of.backends[*backend];
            of.name == pool && (backend.name == name || address == Ok(backend.address))
        };
        keys(&self.config).position(|all| is_it(&all))
    }

    /// The backend at a place among all.
    pub fn backend(&self, place: usize) -> Result<Option<BackendStatus>, MapsError> {
        let found = keys(&self.config).zip(&self.backends).nth(place);
        found.map(|((_, pool, backend), view)| self.told(&self.config.pools[pool], backend, view)).transpose()
    }

    fn told(&self, pool: &Pool, backend: usize, view: &BackendView) -> Result<BackendStatus, MapsError> {
        let backend = &pool.backends[backend];
        let identity = identity_of(pool, backend);
        let id = self.index.ids.get(&identity).copied();
        let traffic = id.map_or(Ok(Traffic::default()), |id| self.counters.backend(id))?;
        let replies =
            id.filter(|_| pool.forward.translates()).map(|id| self.counters.replies(id)).transpose()?;
        let replies = pool.forward.translates().then(|| replies.flatten().unwrap_or_default());
        let Remaining { pins, slots_new, slots_old, quic: _, uncounted: _ } = view.remaining;
        Ok(BackendStatus {
            pool: pool.name.clone(),
            name: backend.name.clone(),
            address: backend.address,
            forward: pool.forward.to_string(),
            weight: backend.weight,
            weight_in_file: view.file_weight,
            state: view.state.as_str().to_owned(),
            health: view.health.as_str().to_owned(),
            check: view.check.clone(),
            exit: view.exit.as_ref().map(|exit| ExitStatus::new(exit, view.remaining, self.at)),
            slots: u64::from(slots_new),
            slots_old: u64::from(slots_old),
            pins,
            connections: view.connections,
            replies: replies.map(RepliesStatus::of),
            starting: view.starting.map(percent),
            packets: traffic.packets,
            bytes: traffic.bytes,
        })
    }

    pub fn services(&self) -> Result<Vec<ServiceStatus>, MapsError> {
        let counts = self.backends_up();
        let mut services = Vec::new();
        for service in &self.config.services {
            let pool = self.config.pool_of(service);
            let (backends_up, backends) = counts.get(&service.pool).copied().unwrap_or_default();
            for (vip, port, protocol) in service.triples() {
                let row = self.index.vips.get(&(vip, port, protocol_number(protocol))).copied();
                let traffic = row.map_or(Ok(Traffic::default()), |row| self.counters.vip(row))?;
                services.push(ServiceStatus {
                    name: service.name.clone(),
                    vip,
                    port,
                    protocol: protocol.to_string(),
                    pool: pool.name.clone(),
                    scheduler: service.scheduler.to_string(),
                    backends_up,
                    backends,
                    packets: traffic.packets,
                    bytes: traffic.bytes,
                });
            }
        }
        Ok(services)
    }

    /// By pool: how many backends are up and take flows, and how many the file has.
    fn backends_up(&self) -> HashMap<usize, (usize, usize)> {
        let mut counts: HashMap<usize, (usize, usize)> = HashMap::new();
        for ((_, pool, backend), view) in keys(&self.config).zip(&self.backends) {
            let (up, all) = counts.entry(pool).or_default();
            *up += usize::from(view.state == BackendState::Up);
            *all += usize::from(!self.config.pools[pool].backends[backend].leaving);
        }
        counts
    }

    pub fn outcomes(&self) -> Result<Vec<OutcomeStatus>, MapsError> {
        let status = |outcome: &Outcome| {
            Ok(OutcomeStatus {
                name: outcome.counter().to_owned(),
                action: outcome.action().name().to_owned(),
                packets: self.counters.outcome(*outcome)?,
                meaning: outcome.meaning().to_owned(),
                advice: outcome.advice().to_owned(),
            })
        };
        Outcome::ALL.iter().map(status).collect()
    }

    pub fn stats(&self) -> Result<Stats, MapsError> {
        let monotonic_ns = monotonic_ns();
        let services = self.services()?.into_iter().map(|service| ServiceStats {
            name: service.name,
            vip: service.vip,
            port: service.port,
            protocol: service.protocol,
            packets: service.packets,
            bytes: service.bytes,
        });
        let backends = self.backends()?.into_iter().map(|backend| BackendStats {
            pool: backend.pool,
            name: backend.name,
            address: backend.address,
            packets: backend.packets,
            bytes: backend.bytes,
            replies: backend.replies,
        });
        let outcomes = self.outcomes()?.into_iter().map(|outcome| OutcomeStats {
            name: outcome.name,
            action: outcome.action,
            packets: outcome.packets,
        });
        Ok(Stats {
            monotonic_ns,
            services: services.collect(),
            backends: backends.collect(),
            outcomes: outcomes.collect(),
        })
    }
}

/// The same clock for all processes since the host started.
pub(super) fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// Seconds since 1970.
pub fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// With one digit behind the point.
fn percent(share: u16) -> f64 {
    (f64::from(share) * 1000.0 / f64::from(FULL)).round() / 10.0
}

fn last_reload(reload: &Reload) -> LastReload {
    LastReload { at_unix: unix_seconds(reload.at), error: reload.result.clone().err() }
}

fn interface(attached: &Attached) -> InterfaceStatus {
    InterfaceStatus { name: attached.name.clone(), mode: attached.mode().to_owned() }
}
