//! What `xlb status` shows: a picture of the agent's state, the same as JSON on the API.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant, UNIX_EPOCH};

use lb_common::abi::PortKey;
use lb_common::outcome::Outcome;
use serde::{Deserialize, Serialize};

use super::core::{BackendKey, Reload};
use crate::bpf::{Attached, Maps};
use crate::config::model::{CheckKind, Config};
use crate::health::{Fsm, State};
use crate::nexthop::NextHop;
use crate::reconcile::desired::{backend_identity, protocol_number};
use crate::reconcile::image::Image;
use crate::reconcile::plan::present_vips;

#[derive(Debug, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub pid: u32,
    pub uptime_seconds: u64,
    pub config_file: String,
    pub last_reload: Option<LastReload>,
    pub interfaces: Vec<InterfaceStatus>,
    pub services: Vec<ServiceStatus>,
    pub backends: Vec<BackendStatus>,
    /// Every verdict and drop reason, also those that never happened.
    pub outcomes: Vec<OutcomeStatus>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct LastReload {
    /// Seconds since 1970.
    pub at_unix: u64,
    pub error: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct InterfaceStatus {
    pub name: String,
    /// `native` or `generic`.
    pub mode: String,
}

/// One (VIP, port, protocol).
#[derive(Debug, Serialize, Deserialize)]
pub struct ServiceStatus {
    pub name: String,
    pub vip: IpAddr,
    pub port: u16,
    pub protocol: String,
    pub pool: String,
    pub scheduler: String,
    pub backends_up: usize,
    pub backends: usize,
    pub packets: u64,
    /// Bytes of IP, without Ethernet and tunnel headers.
    pub bytes: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct BackendStatus {
    pub pool: String,
    pub name: String,
    pub address: IpAddr,
    pub forward: String,
    pub weight: u8,
    /// `up`, `down`, `checking` or `unresolved`.
    pub state: String,
    /// Why, in words.
    pub check: String,
    /// Slots it holds, over all tables.
    pub slots: u64,
    pub packets: u64,
    pub bytes: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct OutcomeStatus {
    pub name: String,
    pub action: String,
    pub packets: u64,
    pub meaning: String,
}

/// Everything that a status is made of.
pub struct View<'a> {
    pub config: &'a Config,
    pub path: &'a Path,
    pub image: &'a Image,
    pub maps: &'a Maps,
    pub attached: &'a [Attached],
    pub fsms: &'a HashMap<BackendKey, Fsm>,
    pub reload: Option<&'a Reload>,
    pub uptime: Duration,
    pub now: Instant,
    pub ids: HashMap<u64, u16>,
    pub slots: BTreeMap<u16, u64>,
    pub next_hop: &'a dyn Fn(usize, IpAddr) -> Result<NextHop, String>,
}

impl View<'_> {
    pub fn status(&self) -> Status {
        let backends = self.backends();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_seconds: self.uptime.as_secs(),
            config_file: self.path.display().to_string(),
            last_reload: self.reload.map(|reload| LastReload {
                at_unix: reload.at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
                error: reload.result.clone().err(),
            }),
            interfaces: self.attached.iter().map(interface).collect(),
            services: self.services(&backends),
            outcomes: Outcome::ALL.iter().map(|outcome| self.outcome(*outcome)).collect(),
            backends,
        }
    }

    fn backends(&self) -> Vec<BackendStatus> {
        super::core::keys(self.config)
            .map(|(key, pool_index, index)| {
                let pool = &self.config.pools[pool_index];
                let backend = &pool.backends[index];
                let id = self.ids.get(&backend_identity(&pool.name, pool.forward, backend.address)).copied();
                let traffic = id.and_then(|id| self.maps.backend_traffic(id).ok()).unwrap_or_default();
                let (state, check) = self.state(&key, pool_index);
                BackendStatus {
                    pool: pool.name.clone(),
                    name: backend.name.clone(),
                    address: backend.address,
                    forward: pool.forward.to_string(),
                    weight: backend.weight,
                    state,
                    check,
                    slots: id.and_then(|id| self.slots.get(&id)).copied().unwrap_or(0),
                    packets: traffic.packets,
                    bytes: traffic.bytes,
                }
            })
            .collect()
    }

    fn state(&self, key: &BackendKey, pool: usize) -> (String, String) {
        if let Err(reason) = (self.next_hop)(pool, key.address) {
            return ("unresolved".into(), reason);
        }
        if self.config.pools[pool].check.kind == CheckKind::None {
            return ("up".into(), "not checked".into());
        }
        let Some(fsm) = self.fsms.get(key) else { return ("checking".into(), String::new()) };
        let state = match fsm.state() {
            State::Up => "up",
            State::Down => "down",
            State::Checking => "checking",
        };
        let words = fsm.describe(self.now);
        // The state has a column of its own.
        let words = words.strip_prefix(state).map_or(words.as_str(), str::trim_start);
        (state.into(), words.to_owned())
    }

    fn services(&self, backends: &[BackendStatus]) -> Vec<ServiceStatus> {
        let vips = present_vips(self.image);
        let mut counts: HashMap<&str, (usize, usize)> = HashMap::new();
        for backend in backends {
            let (up, all) = counts.entry(&backend.pool).or_default();
            *up += usize::from(backend.state == "up");
            *all += 1;
        }
        let mut services = Vec::new();
        for service in &self.config.services {
            let pool = self.config.pool_of(service);
            let (backends_up, backends) = counts.get(pool.name.as_str()).copied().unwrap_or_default();
            for (vip, port, protocol) in service.triples() {
                let key = PortKey::new(port, protocol_number(protocol));
                let traffic = vips
                    .get(&(vip, key.0))
                    .and_then(|target| self.maps.vip_traffic(target.vip).ok())
                    .unwrap_or_default();
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
        services
    }

    fn outcome(&self, outcome: Outcome) -> OutcomeStatus {
        OutcomeStatus {
            name: outcome.counter().to_owned(),
            action: outcome.action().name().to_owned(),
            packets: self.maps.outcome(outcome).unwrap_or(0),
            meaning: outcome.meaning().to_owned(),
        }
    }
}

fn interface(attached: &Attached) -> InterfaceStatus {
    let mode = if attached.generic { "generic" } else { "native" };
    InterfaceStatus { name: attached.name.clone(), mode: mode.to_owned() }
}
