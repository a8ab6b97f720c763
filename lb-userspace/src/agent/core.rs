//! The state of the agent and what events do to it. The only owner of the maps.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use lb_common::abi::{Egress, Path, SLOTS_PER_ROW, TableWord};
use lb_common::slots::Slot;
use lb_common::wire::{Address6, Mac};
use tracing::{info, warn};

use super::interfaces::{self, Refused, Wanted, WantedLink, mode_name};
use super::reload::same_rows;
use super::status;
use crate::bpf::{Attached, BpfFs, Datapath, DatapathError, Links, MapsError, Trace};
use crate::capacity::Capacity;
use crate::config::model::{Check, CheckKind, Config, Forward};
use crate::health::{Checker, Fsm, Probe, State};
use crate::lookup::{self, Explanation, Names, Query};
use crate::nexthop::{NextHop, Resolver, Unresolved};
use crate::reconcile::desired::{World, backend_identity, desired, features};
use crate::reconcile::image::Image;
use crate::reconcile::plan::{PlanError, plan};

/// Names a backend over reloads. An outcome of another address never counts for this one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct BackendKey {
    pub pool: String,
    pub address: IpAddr,
}

pub type NextHops = HashMap<IpAddr, Result<NextHop, Unresolved>>;

/// Why the maps are not as they should be.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Maps(#[from] MapsError),
}

/// How the last reload ended.
#[derive(Debug, Clone)]
pub struct Reload {
    pub at: SystemTime,
    pub result: Result<(), String>,
}

pub struct Core {
    path: PathBuf,
    pub(super) config: Config,
    pub(super) datapath: Datapath,
    /// What has been applied. Always equal to the maps.
    pub(super) image: Image,
    pub(super) links: Links,
    pub(super) attached: Vec<Attached>,
    pub(super) refused: Refused,
    /// The interfaces as they were last attached.
    pub(super) wanted: Wanted,
    checker: Checker<BackendKey>,
    pub(super) fsms: HashMap<BackendKey, Fsm>,
    pub(super) next_hops: HashMap<IpAddr, Result<NextHop, Unresolved>>,
    /// Pools that have nobody up: said once.
    empty: HashSet<String>,
    started: Instant,
    reload: Option<Reload>,
    /// Whether the tables must be worked out again.
    pub(super) changed: bool,
}

impl Core {
    /// Loads the program and takes over what an earlier agent left. Writes no tables yet.
    pub async fn start(
        path: &std::path::Path,
        config: Config,
        fs: BpfFs,
        resolver: &Resolver,
        checker: Checker<BackendKey>,
    ) -> anyhow::Result<Self> {
        let capacity = Capacity::new(&config.limits);
        preflight(&config, &capacity)?;
        interfaces::refuse_local_vips(&config, resolver).await?;
        let mut links = Links::new(fs.clone());
        let wanted = Wanted::look_up(&config, &mut links, resolver).await?;
        let datapath = Datapath::open(fs, capacity, config.seed, features(&config))?;
        let image = datapath.maps.image()?;
        let mut core = Self {
            path: path.to_owned(),
            fsms: HashMap::new(),
            config,
            datapath,
            image,
            links,
            attached: Vec::new(),
            refused: Refused::new(),
            wanted: Wanted::default(),
            checker,
            next_hops: HashMap::new(),
            empty: HashSet::new(),
            started: Instant::now(),
            reload: None,
            changed: true,
        };
        if core.datapath.adopted {
            info!("maps of an earlier agent taken over; flows stay where they are");
            // Before the tables change: they may need what only this program can.
            core.attach(&wanted)?;
        }
        let before = match &core.datapath.predecessor {
            Some(maps) => maps.image()?,
            None => core.image.clone(),
        };
        core.fsms = core.adopt_health(&before);
        core.next_hops = core.adopt_next_hops(&before, &wanted);
        core.wanted = wanted;
        Ok(core)
    }

    /// Brings the first tables into force: into maps that were taken over, or into new ones that are attached then.
    pub fn begin(&mut self) -> anyhow::Result<()> {
        self.reconcile().context("the first tables cannot be written")?;
        let wanted = self.wanted.clone();
        if !self.datapath.adopted {
            if let Some(before) = self.datapath.predecessor.take() {
                let (vips, backends) = same_rows(&before.image()?, &self.image);
                self.datapath.maps.inherit(&before, &vips, &backends)?;
            }
            self.datapath.complete();
            self.attach(&wanted)?;
        }
        self.datapath.retire_others()?;
        self.detach_others(&wanted)
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub fn config_path(&self) -> &std::path::Path {
        &self.path
    }

    /// Puts the program on every interface of `wanted`. On an error those that carried it before still do.
    pub(super) fn attach(&mut self, wanted: &Wanted) -> Result<(), DatapathError> {
        let carried = self.links.pinned()?;
        let mut attached: Vec<Attached> = Vec::new();
        for WantedLink { name, link, mode } in &wanted.links {
            match self.links.attach(&mut self.datapath, name, link, *mode) {
                Ok(now) => {
                    if !self.attached.contains(&now) {
                        info!(interface = %now.interface, mode = mode_name(&now), "attached");
                        interfaces::warn_of_veth(link);
                    }
                    attached.push(now);
                }
                Err(error) => {
                    for (now, wanted) in attached.iter().zip(&wanted.links) {
                        if !carried.contains(&now.name) {
                            self.links.detach(&mut self.datapath, &now.name, Some(&wanted.link))?;
                        }
                    }
                    return Err(error);
                }
            }
        }
        self.attached = attached;
        self.refused.clear();
        self.wanted = wanted.clone();
        Ok(())
    }

    /// Takes the program off interfaces that are no longer configured, and forgets those that are gone.
    pub(super) fn detach_others(&mut self, wanted: &Wanted) -> anyhow::Result<()> {
        for (name, link) in &wanted.unwanted {
            self.links.detach(&mut self.datapath, name, link.as_ref())?;
            info!(interface = %name, "detached: no longer configured");
        }
        self.read_interfaces()?;
        let rows: Vec<u32> = self.image.interfaces.keys().copied().collect();
        for ifindex in rows {
            if !self.attached.iter().any(|attached| attached.ifindex == ifindex) {
                self.datapath.maps.remove_interface(ifindex)?;
            }
        }
        self.read_interfaces()
    }

    /// The rows of interfaces are not planned: they say what the kernel has.
    pub(super) fn read_interfaces(&mut self) -> anyhow::Result<()> {
        self.image.interfaces = self.datapath.maps.interfaces()?;
        Ok(())
    }

    /// Health as the maps show it: who holds slots is up until its first verdict.
    fn adopt_health(&self, image: &Image) -> HashMap<BackendKey, Fsm> {
        let holders: HashSet<u16> = live_slots(image).map(|(_, slot)| slot.cur()).collect();
        let ids = ids(image);
        let now = Instant::now();
        let holds = |pool: &str, forward, address| {
            ids.get(&backend_identity(pool, forward, address)).is_some_and(|id| holders.contains(id))
        };
        keys(&self.config)
            .map(|(key, pool, _)| {
                // The file may name another way to a backend than the one it was reached by; its health is the same.
                let held = Forward::ALL.iter().any(|&forward| holds(&key.pool, forward, key.address));
                let pool = &self.config.pools[pool];
                let held = held || pool.check.kind == CheckKind::None;
                let (rise, fall) = (pool.check.rise, pool.check.fall);
                let fsm = if held { Fsm::adopted(true, now, rise, fall) } else { Fsm::new(rise, fall) };
                (key, fsm)
            })
            .collect()
    }

    /// Next hops as the maps show them: they hold until the kernel says otherwise.
    fn adopt_next_hops(&self, image: &Image, wanted: &Wanted) -> NextHops {
        let ids = ids(image);
        let adopt = |(key, pool, _): (BackendKey, usize, usize)| {
            let forward = self.config.pools[pool].forward;
            let id = *ids.get(&backend_identity(&key.pool, forward, key.address))?;
            let path = Path::from_bits(image.backends[usize::from(id)].path);
            let egress = image.egress.get(usize::from(path.egress())).filter(|egress| egress.ifindex != 0)?;
            Some((key.address, Ok(adopted_hop(key.address, path, egress, wanted))))
        };
        keys(&self.config).filter_map(adopt).collect()
    }

    pub fn start_checks(&mut self) {
        let targets = keys(&self.config).map(|(key, pool, _)| {
            let address = key.address;
            (key, address, self.config.pools[pool].check.clone())
        });
        self.checker.set(targets.collect());
    }

    pub fn on_probe(&mut self, now: Instant, key: &BackendKey, probe: &Probe) {
        // An outcome of a check that has been ended.
        let Some(fsm) = self.fsms.get_mut(key) else { return };
        if let Some(transition) = fsm.on_probe(now, probe) {
            self.changed = true;
            let backend = name_of(&self.config, key);
            let check = fsm.outcome().unwrap_or_default();
            let pool = self.config.pools.iter().find(|pool| pool.name == key.pool);
            let unchecked = pool.is_some_and(|pool| pool.check.kind == CheckKind::None);
            let check = if unchecked { "not checked" } else { check.as_str() };
            match transition.to {
                State::Up => info!(pool = %key.pool, %backend, address = %key.address, check, "backend up"),
                State::Down => {
                    warn!(pool = %key.pool, %backend, address = %key.address, check, fails = fsm.failures(), "backend down")
                }
                State::Checking => {}
            }
        }
    }

    /// Addresses whose next hop is missing, or all.
    pub fn addresses_to_resolve(&self, all: bool) -> Vec<IpAddr> {
        self.to_resolve(&self.config, all)
    }

    /// Addresses of a configuration whose next hop is missing, or all.
    pub fn to_resolve(&self, config: &Config, all: bool) -> Vec<IpAddr> {
        let addresses: HashSet<IpAddr> = keys(config).map(|(key, ..)| key.address).collect();
        addresses
            .into_iter()
            .filter(|address| all || !matches!(self.next_hops.get(address), Some(Ok(_))))
            .collect()
    }

    pub async fn resolve_now(&self, resolver: &Resolver, wait: Duration) -> NextHops {
        resolver.resolve_all(&self.addresses_to_resolve(true), wait).await
    }

    pub fn on_next_hops(&mut self, found: NextHops) {
        let configured: HashSet<IpAddr> = keys(&self.config).map(|(key, ..)| key.address).collect();
        self.next_hops.retain(|address, _| configured.contains(address));
        for (address, result) in found {
            // An answer that comes after its backend has gone.
            if !configured.contains(&address) {
                continue;
            }
            let known = self.next_hops.get(&address);
            // A neighbour that does not answer just now may still forward: its checks decide. And the
            // kernel calls it missing and failed by turns, which is no news.
            let keeps = match known {
                Some(Ok(_)) => is_silent(&result),
                Some(before) => is_silent(before) && is_silent(&result),
                None => false,
            };
            if keeps || known == Some(&result) {
                continue;
            }
            match &result {
                Ok(hop) => info!(%address, interface = %hop.interface, mtu = hop.mtu, "next hop"),
                Err(reason) => warn!(%address, %reason, "no next hop"),
            }
            self.next_hops.insert(address, result);
            self.changed = true;
        }
    }

    /// Brings the maps in line with what is configured and alive.
    pub fn reconcile(&mut self) -> Result<(), ReconcileError> {
        if !self.changed {
            return Ok(());
        }
        let world = self.world();
        self.say_who_is_empty(&world);
        let ops = plan(&self.image, &desired(&self.config, &world), self.datapath.capacity())?;
        for op in &ops {
            self.datapath.maps.apply(op)?;
            self.image.apply(op);
        }
        self.changed = false;
        Ok(())
    }

    pub(super) fn world(&self) -> World {
        let mut world = World::default();
        for (key, pool, backend) in keys(&self.config) {
            let Ok(hop) = self.usable_next_hop(pool, key.address) else { continue };
            let up = self.fsms.get(&key).is_some_and(Fsm::is_up);
            world.up.insert((pool, backend), up);
            world.next_hops.insert(key.address, hop);
        }
        world
    }

    /// The next hop of a backend, if packets can be sent that way in its pool's mode.
    fn usable_next_hop(&self, pool: usize, address: IpAddr) -> Result<NextHop, String> {
        let hop = match self.next_hops.get(&address) {
            None => return Err("its next hop is being looked up".into()),
            Some(Err(reason)) => return Err(reason.to_string()),
            Some(Ok(hop)) => hop,
        };
        if self.config.pools[pool].forward == Forward::L2 && hop.gateway.is_some() {
            return Err(format!(
                "it is behind a gateway, and `forward: l2` needs it on {}'s link; use ipip",
                hop.interface
            ));
        }
        let filled = match address {
            IpAddr::V4(_) => self.config.outer_source.v4.is_some(),
            IpAddr::V6(_) => self.config.outer_source.v6.is_some(),
        };
        if self.config.pools[pool].forward == Forward::Ipip && !filled {
            match hop.preferred_source {
                None => {
                    return Err(format!(
                        "{} has no address to send tunnel packets from; set outer_source",
                        hop.interface
                    ));
                }
                Some(source) if self.config.services.iter().any(|service| service.vips.contains(&source)) => {
                    return Err(format!("the route's source address {source} is a VIP; set outer_source"));
                }
                Some(_) => {}
            }
        }
        Ok(hop.clone())
    }

    fn say_who_is_empty(&mut self, world: &World) {
        for (index, pool) in self.config.pools.iter().enumerate() {
            let anyone = (0..pool.backends.len()).any(|backend| {
                pool.backends[backend].weight > 0 && world.up.get(&(index, backend)) == Some(&true)
            });
            if anyone {
                if self.empty.remove(&pool.name) {
                    info!(pool = %pool.name, "pool has backends again");
                }
            } else if self.empty.insert(pool.name.clone()) {
                warn!(pool = %pool.name, on_empty = %pool.on_empty, "pool has no backend that is up");
            }
        }
    }

    /// Backends of a configuration whose health is not known: new, or never judged.
    pub fn unknown(&self, config: &Config) -> Vec<(BackendKey, Check)> {
        let judged = |key: &BackendKey| self.fsms.get(key).is_some_and(|fsm| fsm.state() != State::Checking);
        let unknown = keys(config).filter(|(key, ..)| !judged(key));
        unknown.map(|(key, pool, _)| (key, config.pools[pool].check.clone())).collect()
    }

    pub fn note_reload(&mut self, result: Result<(), String>) {
        self.reload = Some(Reload { at: SystemTime::now(), result });
    }

    pub fn trace(&mut self) -> Option<Result<Trace, DatapathError>> {
        self.config.trace.then(|| self.datapath.trace())
    }

    pub fn lookup(&self, query: &Query) -> Result<Explanation, String> {
        let ifindex = self.attached.first().map_or(0, |attached| attached.ifindex);
        lookup::explain(&self.image, query, ifindex, &self.names())
    }

    fn names(&self) -> Names {
        let ids = ids(&self.image);
        let mut names = Names::default();
        for (key, pool, backend) in keys(&self.config) {
            let pool = &self.config.pools[pool];
            if let Some(id) = ids.get(&backend_identity(&pool.name, pool.forward, key.address)) {
                names.backends.insert(*id, (pool.name.clone(), pool.backends[backend].name.clone()));
            }
        }
        for service in &self.config.services {
            for triple in service.triples() {
                names.services.insert(triple, service.name.clone());
            }
        }
        names
    }

    /// One line on what is served by whom.
    pub fn summary(&self) -> String {
        let backends = keys(&self.config);
        let up = |(key, pool, _): &(BackendKey, usize, usize)| {
            self.fsms.get(key).is_some_and(Fsm::is_up) && self.usable_next_hop(*pool, key.address).is_ok()
        };
        let (all, up) =
            backends.fold((0, 0), |(all, ups), backend| (all + 1, ups + usize::from(up(&backend))));
        format!("services: {}, backends up: {up} of {all}", self.config.services.len())
    }

    pub fn status(&self, now: Instant) -> status::Status {
        status::View {
            config: &self.config,
            path: &self.path,
            image: &self.image,
            maps: &self.datapath.maps,
            attached: &self.attached,
            fsms: &self.fsms,
            reload: self.reload.as_ref(),
            uptime: now - self.started,
            now,
            ids: ids(&self.image),
            slots: slots_by_backend(&self.image),
            next_hop: &|pool, address| self.usable_next_hop(pool, address),
        }
        .status()
    }
}

fn adopted_hop(address: IpAddr, path: Path, egress: &Egress, wanted: &Wanted) -> NextHop {
    let link = wanted.links.iter().find(|wanted| wanted.link.ifindex == egress.ifindex);
    let [high, low] = egress.source6;
    let source = match address {
        IpAddr::V4(_) => IpAddr::from(egress.source4.to_ne_bytes()),
        IpAddr::V6(_) => IpAddr::from(Address6 { high, low }.bytes()),
    };
    NextHop {
        ifindex: egress.ifindex,
        interface: link
            .map_or_else(|| format!("interface {}", egress.ifindex), |wanted| wanted.link.name.clone()),
        source_mac: Mac::from_bits(egress.source_mac).bytes(),
        mac: path.mac().bytes(),
        mtu: egress.mtu.min(u32::from(u16::MAX)) as u16,
        preferred_source: Some(source).filter(|source| !source.is_unspecified()),
        gateway: None,
        kind: link.and_then(|wanted| wanted.link.kind.clone()),
        // It was one when the earlier agent wrote it.
        redirect_target: link.is_none_or(|wanted| wanted.link.redirect_target),
    }
}

/// Whether a neighbour does not answer, or could not be asked: no evidence against a path that worked.
fn is_silent(result: &Result<NextHop, Unresolved>) -> bool {
    matches!(
        result,
        Err(Unresolved::NeighbourMissing { .. }
            | Unresolved::NeighbourFailed { .. }
            | Unresolved::Netlink(_))
    )
}

/// All backends: key, pool, place in the pool.
pub fn keys(config: &Config) -> impl Iterator<Item = (BackendKey, usize, usize)> + '_ {
    config.pools.iter().enumerate().flat_map(|(pool_index, pool)| {
        pool.backends.iter().enumerate().map(move |(index, backend)| {
            (BackendKey { pool: pool.name.clone(), address: backend.address }, pool_index, index)
        })
    })
}

fn name_of(config: &Config, key: &BackendKey) -> String {
    let pool = config.pools.iter().find(|pool| pool.name == key.pool);
    let backend = pool.and_then(|pool| pool.backends.iter().find(|backend| backend.address == key.address));
    backend.map_or_else(|| key.address.to_string(), |backend| backend.name.clone())
}

/// The id of each identity.
pub(super) fn ids(image: &Image) -> HashMap<u64, u16> {
    let rows = image.backends.iter().enumerate().filter(|(_, row)| row.identity != 0);
    rows.map(|(id, row)| (row.identity, id as u16)).collect()
}

/// Slots of all tables that packets can reach, with the table's number.
fn live_slots(image: &Image) -> impl Iterator<Item = (u16, Slot)> + '_ {
    let words = image.tables.iter().map(|&bits| TableWord::from_bits(bits)).enumerate();
    words.filter(|(_, word)| *word != TableWord::default()).flat_map(move |(table, word)| {
        let first = word.first_row() * SLOTS_PER_ROW;
        (first..first + word.length()).map(move |index| (table as u16, image.slot(index)))
    })
}

/// How many slots each backend holds, over all tables.
fn slots_by_backend(image: &Image) -> BTreeMap<u16, u64> {
    let mut slots = BTreeMap::new();
    for (_, slot) in live_slots(image) {
        *slots.entry(slot.cur()).or_default() += 1;
    }
    slots
}

/// Refuses what would not fit before anything is written.
pub fn preflight(config: &Config, capacity: &Capacity) -> Result<(), PlanError> {
    let empty = Image::empty(capacity, lb_common::abi::Meta::default());
    plan(&empty, &desired(config, &World::default()), capacity).map(drop)
}
