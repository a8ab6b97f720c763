//! The state of the agent and what events do to it. The only owner of the maps.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Instant, SystemTime};

use anyhow::Context;
use rustc_hash::{FxBuildHasher, FxHashMap};
use tracing::{info, warn};

use super::adopt;
use super::changed::Changed;
use super::changeover::inherit;
use super::commands::{Held, tell};
use super::interfaces::{self, Refused, Wanted, WantedLink};
use super::named::Named;
use super::overrides::{Cause, Overrides, Store, uptime};
use super::own;
use super::roster::{Roster, Seat};
use super::snapshot::{
    BackendState, BackendView, Index, Moving, PinsStatus, PoolView, Reloads, Snapshot, Transitions,
};
use super::steering::Steering;
use super::tracking::Tracking;
use super::verify::{self, Verification};
use super::yielded::Yielded;
use crate::bpf::{Attached, BpfFs, Datapath, DatapathError, Links, Maps, MapsError, Trace};
use crate::capacity::Capacity;
use crate::config::model::{Check, CheckKind, Config, Pool, Scheduler};
use crate::health::{Checker, Fsm, Probe, State, Target as Checked};
use crate::nexthop::{Answer, NextHop, Resolver, Unresolved};
use crate::reconcile::desired::{BackendRef, LoadTime, World, desired, table_identity};
use crate::reconcile::image::Image;
use crate::reconcile::plan::{PlanError, check_room};
use crate::ways::Judge;

/// Names a backend over reloads. An outcome of another address never counts for this one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
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

pub struct Core {
    path: PathBuf,
    /// As it was read.
    pub(super) file: Arc<Config>,
    /// The one in effect: the file, what was said beside it, and what is still leaving it. All places of pools and
    /// backends are places in it.
    pub(super) config: Arc<Config>,
    /// Of a configuration that was in effect lately: see `seat`.
    pub(super) roster: Roster,
    /// Backends that are down, by their place in the roster, as of the last look at the world.
    pub(super) down: Vec<usize>,
    /// Who is up and by which way, as of then, before policy makes something of it.
    facts: World,
    /// Backends that take flows, and all that do not leave: as of then.
    up: (usize, usize),
    /// When the next grace time of a backend that is down ends, as of then.
    grace_ends: Option<Instant>,
    pub(super) overrides: Overrides,
    pub(super) store: Store,
    /// Backends whose drain is complete: said once.
    pub(super) drained: HashSet<BackendKey>,
    pub(super) datapath: Datapath,
    /// What has been applied. Always equal to the maps.
    pub(super) image: Image,
    /// Of the image, where somebody has asked since it changed.
    pub(super) index: OnceLock<Arc<Index>>,
    pub(super) links: Links,
    pub(super) attached: Vec<Attached>,
    pub(super) refused: Refused,
    checker: Checker<BackendKey>,
    pub(super) fsms: FxHashMap<BackendKey, Fsm>,
    pub(super) next_hops: FxHashMap<IpAddr, Answer>,
    /// The way to backends on this host itself.
    pub(super) own: Option<NextHop>,
    /// Pools that have nobody up: said once.
    empty: HashSet<String>,
    pub(super) transitions: HashMap<BackendKey, Transitions>,
    pub(super) steering: Steering,
    started: Instant,
    started_at: SystemTime,
    reloads: Reloads,
    /// Whether the tables must be worked out again, and from what on.
    pub(super) changed: Changed,
    /// The first verdict that the tables do not show yet.
    pub(super) decided: Option<Instant>,
    pub(super) tracking: Tracking,
    pub(super) yielded: Yielded,
    /// Backends on their way out that connection IDs of QUIC name.
    pub(super) named: Named,
}

impl Core {
    /// Loads the program and takes over what an earlier agent left. Writes no tables yet. Also returns the interfaces
    /// as it found them, for [`Self::begin`].
    pub async fn start(
        path: &std::path::Path,
        mut file: Config,
        store: Store,
        fs: BpfFs,
        resolver: &Resolver,
        checker: Checker<BackendKey>,
    ) -> anyhow::Result<(Self, Wanted)> {
        let capacity = Capacity::new(&file.limits);
        preflight(&file, &capacity)?;
        interfaces::refuse_local_vips(&file, resolver).await?;
        let own = own::prepare(&mut file, resolver).await?;
        let mut links = Links::new(fs.clone());
        let wanted = Wanted::look_up(&file, &mut links, resolver).await?;
        let (held, ended) = Held::recovered(&store.recover(), &file);
        tell(&ended);
        let datapath = Datapath::open(fs, capacity, LoadTime::of(&held.config))?;
        let image = datapath.maps.image()?;
        let earlier = datapath.predecessor.as_ref().map(Maps::image).transpose()?;
        let Held { overrides, config } = held.only_with_rows(earlier.as_ref().unwrap_or(&image), &file);
        let config = Arc::new(config);
        let mut core = Self {
            path: path.to_owned(),
            fsms: FxHashMap::default(),
            file: Arc::new(file),
            roster: Roster::of(&config),
            config,
            down: Vec::new(),
            up: (0, 0),
            grace_ends: None,
            overrides,
            store,
            drained: HashSet::new(),
            datapath,
            image,
            index: OnceLock::new(),
            links,
            attached: Vec::new(),
            refused: Refused::new(),
            checker,
            next_hops: FxHashMap::default(),
            own,
            empty: HashSet::new(),
            transitions: HashMap::new(),
            steering: Steering::default(),
            started: Instant::now(),
            started_at: SystemTime::now(),
            reloads: Reloads::none(),
            changed: Changed::All,
            decided: None,
            facts: World::default(),
            tracking: Tracking::new(Instant::now()),
            yielded: Yielded::default(),
            named: Named::default(),
        };
        core.begin_tracking()?;
        if core.datapath.adopted {
            info!("maps of an earlier agent taken over; flows stay where they are");
            // Before the tables change: they may need what only this program can.
            core.attach(&wanted)?;
        }
        let before = earlier.as_ref().unwrap_or(&core.image);
        let fsms = adopt::health(&core.config, before);
        core.steering = Steering::new(&core.config, &adopt::levels(&core.config, before));
        let known = |ifindex| wanted.links.iter().map(|wanted| &wanted.link).find(|l| l.ifindex == ifindex);
        let held = |hop| Answer { hop, doubt: None };
        let adopted = adopt::next_hops(&core.config, before, known);
        core.next_hops = adopted.into_iter().map(|(address, hop)| (address, held(hop))).collect();
        core.fsms = fsms;
        Ok((core, wanted))
    }

    /// Brings the first tables into force: into maps that were taken over, or into new ones that are attached then.
    pub async fn begin(&mut self, wanted: &Wanted, resolver: &Resolver) -> anyhow::Result<()> {
        let backends = |image: &Image| (image.neighbours(), image.addresses());
        let before = self.datapath.predecessor.take();
        let mut before = before.map(|maps| Ok::<_, MapsError>((maps.image()?, maps))).transpose()?;
        let (neighbours, addresses) = backends(before.as_ref().map_or(&self.image, |(image, _)| image));
        let carried = match &mut before {
            Some((image, maps)) => self.begin_as_before(image, maps, wanted)?,
            None => false,
        };
        self.reconcile().context("the first tables cannot be written")?;
        self.let_leavers_go()?;
        if !self.datapath.adopted && !carried {
            if let Some((image, maps)) = &before {
                inherit(&mut self.datapath, maps, image, &self.image)?;
            }
            self.datapath.complete();
            self.attach(wanted)?;
        }
        self.datapath.retire_others()?;
        // Which next hops can be used depends on the interfaces that are attached.
        self.changed = Changed::All;
        // Those of backends that have left the file: nobody else knows of them.
        let (neighbours_now, addresses_now) = backends(&self.image);
        resolver.unmanage(&(&neighbours - &neighbours_now), &(&addresses - &addresses_now)).await;
        self.detach_others(wanted)
    }

    /// The one in effect.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The configuration as it was read.
    pub fn file(&self) -> &Config {
        &self.file
    }

    pub fn config_path(&self) -> &std::path::Path {
        &self.path
    }

    /// Puts the program on every interface of `wanted`. On an error those that carried it before still do.
    pub(super) fn attach(&mut self, wanted: &Wanted) -> Result<(), DatapathError> {
        // By what they are: the configuration may have another name for one.
        let mut carried = Vec::new();
        for name in self.links.known()? {
            carried.extend(self.links.place(&name)?);
        }
        let mut attached: Vec<Attached> = Vec::new();
        for WantedLink { name, link, mode } in &wanted.links {
            match self.links.attach(&mut self.datapath, name, link, *mode) {
                Ok(now) => {
                    if !self.attached.contains(&now) {
                        info!(interface = %now.interface, mode = now.mode(), "attached");
                        interfaces::warn_of_veth(link);
                    }
                    attached.push(now);
                }
                Err(error) => {
                    for (now, wanted) in attached.iter().zip(&wanted.links) {
                        let before = wanted.link.xdp_program.map(|program| (now.ifindex, program));
                        if before.is_none_or(|before| !carried.contains(&before)) {
                            self.links.detach(&mut self.datapath, &now.name, Some(&wanted.link))?;
                        }
                    }
                    return Err(error);
                }
            }
        }
        if self.attached != attached {
            // Next hops may be usable now that were not, or no longer.
            (self.attached, self.changed) = (attached, Changed::All);
        }
        self.refused.clear();
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
        for (row, egress) in self.datapath.maps.ways_back() {
            self.image.egress[usize::from(row)] = egress;
        }
        Ok(())
    }

    pub fn start_checks(&mut self) {
        let config = &self.config;
        let by_time = config.services.iter().filter(|s| s.scheduler == Scheduler::LeastResponseTime);
        let timed: HashSet<usize> = by_time.flat_map(|service| config.levels_of(service.pool)).collect();
        let targets = keys(config).map(|(key, at, backend)| {
            let (address, pool) = (key.address, &config.pools[at]);
            let check = pool.check_of(&pool.backends[backend]);
            Checked { key, address, check, timed: timed.contains(&at) }
        });
        self.checker.set(targets.collect());
    }

    pub fn on_probe(&mut self, now: Instant, key: &BackendKey, probe: &Probe) {
        // An outcome of a check that has been ended.
        let Some(fsm) = self.fsms.get_mut(key) else { return };
        let was_hard = fsm.is_hard();
        let transition = fsm.on_probe(now, probe);
        if fsm.is_hard() != was_hard {
            // Its old flows need not wait any more.
            self.changed.policy();
        }
        if self.steering.on_probe(now, key, probe) {
            self.changed.policy();
        }
        if let Some(transition) = transition {
            self.decided.get_or_insert(now);
            let place = place_of(&self.config, key);
            match place {
                Some(at) => self.changed.health(at),
                None => self.changed = Changed::All,
            }
            self.steering.on_transition(now, key, &transition);
            let transitions = self.transitions.entry(key.clone()).or_default();
            let pool = |(pool, _): BackendRef| &self.config.pools[pool];
            let backend = place
                .map_or_else(|| key.address.to_string(), |place| pool(place).backends[place.1].name.clone());
            let check = fsm.outcome().unwrap_or_default();
            let unchecked = place.is_some_and(|place| pool(place).check.kind == CheckKind::None);
            let check = if unchecked { "not checked" } else { check.as_str() };
            match transition.to {
                State::Up => {
                    transitions.up += 1;
                    info!(pool = %key.pool, %backend, address = %key.address, check, "backend up");
                }
                State::Down => {
                    transitions.down += 1;
                    warn!(pool = %key.pool, %backend, address = %key.address, check, fails = fsm.failures(), "backend down")
                }
                State::Checking => {}
            }
        }
    }

    /// When something changes that no event announces.
    pub fn due(&self) -> Option<Instant> {
        self.steering.due().into_iter().chain(self.grace_ends).min()
    }

    pub fn on_time(&mut self, now: Instant) {
        if self.due().is_some_and(|due| due <= now) {
            self.changed.policy();
        }
    }

    /// Seats of the configuration in effect.
    pub(super) fn seat(&mut self) {
        if !self.roster.is_of(&self.config) {
            self.roster = Roster::after(&self.config, &self.roster);
            self.changed = Changed::All;
        }
    }

    /// The world with what is made of it now.
    pub(super) fn steered_world(&mut self, now: Instant) -> World {
        self.seat();
        self.look_at_facts(now);
        self.grace_ends = self.grace_ends_after(now);
        let mut world = self.facts.clone();
        self.up = self.count(&world);
        self.steering.observe(now, &self.config, &world);
        self.steering.steer(&self.config, &mut world);
        world
    }

    /// Brings what is known of the world up to date.
    fn look_at_facts(&mut self, now: Instant) {
        let judged = match &self.changed {
            Changed::Nothing => &[][..],
            Changed::Health(of) => of,
            Changed::All => {
                self.down = self.who_is_down(&self.roster);
                self.facts = self.bare_world(&self.roster, &self.down, now);
                return;
            }
        };
        for at in judged {
            let place = self.roster.place(*at);
            let Some(fsm) = self.fsms.get(&self.roster.seats[place].key) else { continue };
            // One without a way is not up, whatever it says.
            if self.facts.up.contains_key(at) {
                self.facts.up.insert(*at, fsm.is_up());
            }
            let known = self.down.binary_search(&place);
            match (known, fsm.state() == State::Down) {
                (Ok(known), false) => _ = self.down.remove(known),
                (Err(before), true) => self.down.insert(before, place),
                (Ok(_), true) | (Err(_), false) => {}
            }
        }
        self.facts.old_flows = self.old_flows(&self.roster, &self.down, now);
        debug_assert!(
            self.down == self.who_is_down(&self.roster)
                && self.facts == self.bare_world(&self.roster, &self.down, now),
            "more has changed than was said"
        );
    }

    /// The same as of the last time.
    pub(super) fn world(&self) -> World {
        let made = (!self.roster.is_of(&self.config)).then(|| Roster::after(&self.config, &self.roster));
        let roster = made.as_ref().unwrap_or(&self.roster);
        let mut world = self.bare_world(roster, &self.who_is_down(roster), Instant::now());
        self.steering.steer(&self.config, &mut world);
        world
    }

    fn who_is_down(&self, roster: &Roster) -> Vec<usize> {
        let is_down = |seat: &Seat| self.fsms.get(&seat.key).is_some_and(|fsm| fsm.state() == State::Down);
        (0..).zip(&roster.seats).filter(|(_, seat)| is_down(seat)).map(|(place, _)| place).collect()
    }

    /// Who is up, and by which way.
    fn bare_world(&self, roster: &Roster, down: &[usize], now: Instant) -> World {
        let (mut world, judge) = (World::default(), self.judge());
        let (has_exits, all) = (self.overrides.has_exits(), roster.seats.len());
        let mut next_hops = FxHashMap::with_capacity_and_hasher(all, FxBuildHasher);
        for Seat { key, at, .. } in &roster.seats {
            if has_exits && self.overrides.exit(key).is_some() {
                world.shares.insert(*at, 0);
            }
            let Ok(hop) = self.usable_next_hop(&judge, at.0, key.address) else { continue };
            let up = self.fsms.get(key).is_some_and(Fsm::is_up);
            world.up.insert(*at, up);
            next_hops.insert(key.address, hop.clone());
        }
        // Backends are worked out again where these are others.
        world.next_hops = if next_hops == *self.facts.next_hops {
            Arc::clone(&self.facts.next_hops)
        } else {
            next_hops.into()
        };
        world.old_flows = self.old_flows(roster, down, now);
        world
    }

    /// Backends that take flows, and all that do not leave.
    fn count(&self, world: &World) -> (usize, usize) {
        let drained = world.shares.values().filter(|share| **share == 0).count();
        let draining = |at: &BackendRef| drained > 0 && world.shares.get(at) == Some(&0);
        let up = world.up.iter().filter(|(at, up)| **up && !draining(at)).count();
        (up, self.roster.seats.len() - self.overrides.leaving().count())
    }

    pub(super) fn say_who_is_empty(&mut self, world: &World) {
        // Nobody waits for a pool that has left.
        for (index, pool) in self.config.pools.iter().enumerate().take(self.file.pools.len()) {
            let anyone = (0..pool.backends.len()).any(|backend| {
                pool.backends[backend].weight > 0
                    && world.shares.get(&(index, backend)) != Some(&0)
                    && world.up.get(&(index, backend)) == Some(&true)
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
        unknown
            .map(|(key, pool, backend)| {
                (key, config.pools[pool].check_of(&config.pools[pool].backends[backend]))
            })
            .collect()
    }

    pub fn note_reload(&mut self, result: Result<(), String>) {
        self.reloads.note(result);
    }

    pub fn trace(&mut self) -> Option<Result<Trace, DatapathError>> {
        self.config.trace.then(|| self.datapath.trace())
    }

    /// One line on what is served by whom.
    pub fn summary(&self) -> String {
        let (up, all) = self.up;
        format!("services: {}, backends up: {up} of {all}", self.config.services.len())
    }

    /// What the kernel has, and what this agent would have it have.
    pub async fn verification(&mut self, resolver: &Resolver) -> anyhow::Result<Verification> {
        let mut seen = verify::missing_pins(&self.datapath, &self.attached);
        seen.extend(verify::interfaces(&self.config, &mut self.links, resolver).await?);
        Ok(Verification {
            seen,
            config: Arc::clone(&self.config),
            world: self.world(),
            capacity: *self.datapath.capacity(),
            image: self.datapath.maps.image()?,
        })
    }

    pub fn snapshot(&self, now: Instant) -> Snapshot {
        let judge = self.judge();
        let view =
            |(key, pool, backend): (BackendKey, usize, usize)| self.view(&judge, &key, (pool, backend), now);
        let index = self.index();
        let pool = |(place, pool): (usize, &Pool)| {
            let (in_use, panic) = self.steering.in_use(&pool.name);
            let users = self.config.services.iter().filter(|service| service.pool == place);
            let tables: HashSet<u64> = users
                .flat_map(|service| {
                    service
                        .protocols
                        .iter()
                        .map(|&protocol| table_identity(pool, protocol, service.scheduler))
                })
                .collect();
            let mut moving = Moving::default();
            tables.into_iter().for_each(|table| moving += index.moving(table));
            let yielded = self.yielded.of(&pool.name);
            PoolView { in_use: in_use.to_owned(), panic, moving, yielded }
        };
        Snapshot {
            config: Arc::clone(&self.config),
            at: uptime(),
            path: self.path.clone(),
            attached: self.attached.clone(),
            reloads: self.reloads.clone(),
            uptime: now - self.started,
            started: self.started_at,
            pools: self.config.pools.iter().enumerate().map(pool).collect(),
            backends: keys(&self.config).map(view).collect(),
            pins: PinsStatus {
                pins: self.tracking.found.pins,
                room: self.image.pins.words().len() as u64,
                swept_seconds_ago: now.saturating_duration_since(self.tracking.swept).as_secs_f64(),
                sweep_seconds: self.tracking.found.took.as_secs_f64(),
                sweeping: self.tracking.has_to_sweep(&self.image),
            },
            connections: self.connections_status(),
            places: self.image.connections.clone(),
            index: Arc::clone(index),
            counters: Arc::clone(self.datapath.maps.counters()),
        }
    }

    pub(super) fn index(&self) -> &Arc<Index> {
        self.index.get_or_init(|| Arc::new(Index::new(&self.image)))
    }

    fn view(
        &self,
        judge: &Judge<'_>,
        key: &BackendKey,
        (pool, backend): BackendRef,
        now: Instant,
    ) -> BackendView {
        let backend = &self.config.pools[pool].backends[backend];
        let (health, check) = self.state(judge, key, pool, now);
        let exit = self.overrides.exit(key);
        let state = match exit.map(|exit| exit.cause) {
            None => health,
            Some(Cause::Drain | Cause::Removed) => BackendState::Draining,
            Some(Cause::Disable) => BackendState::Disabled,
        };
        let said = self.overrides.of(key);
        BackendView {
            state,
            health,
            // Otherwise the state has a column of its own.
            check: if exit.is_some() { format!("{} {check}", health.as_str()) } else { check },
            transitions: self.transitions.get(key).copied().unwrap_or_default(),
            exit: exit.cloned(),
            file_weight: said.filter(|said| said.weight.is_some()).map(|said| said.entry.weight),
            starting: self.steering.share(key),
            remaining: self.remaining_of(&self.config.pools[pool], backend),
            connections: self.connections_of(&self.config.pools[pool], backend),
        }
    }

    fn state(
        &self,
        judge: &Judge<'_>,
        key: &BackendKey,
        pool: usize,
        now: Instant,
    ) -> (BackendState, String) {
        if let Err(reason) = self.usable_next_hop(judge, pool, key.address) {
            return (BackendState::Unresolved, reason);
        }
        let doubt = self.next_hops.get(&key.address).and_then(|answer| answer.doubt.as_ref());
        let doubt = doubt.map_or_else(String::new, |reason| format!("; next hop kept for now: {reason}"));
        if self.config.pools[pool].check.kind == CheckKind::None {
            return (BackendState::Up, format!("not checked{doubt}"));
        }
        let Some(fsm) = self.fsms.get(key) else { return (BackendState::Checking, String::new()) };
        let state = match fsm.state() {
            State::Up => BackendState::Up,
            State::Down => BackendState::Down,
            State::Checking => BackendState::Checking,
        };
        let words = fsm.describe(now, self.checker.took(key));
        // The state has a column of its own.
        let words = words.strip_prefix(state.as_str()).map_or(words.as_str(), str::trim_start);
        (state, format!("{words}{doubt}"))
    }
}

/// All backends: key, pool, place in the pool.
pub fn keys(config: &Config) -> impl Iterator<Item = (BackendKey, usize, usize)> + '_ {
    config.pools.iter().enumerate().flat_map(|(pool_index, pool)| {
        pool.backends.iter().enumerate().map(move |(index, backend)| {
            (BackendKey { pool: pool.name.clone(), address: backend.address }, pool_index, index)
        })
    })
}

fn place_of(config: &Config, key: &BackendKey) -> Option<BackendRef> {
    let pool = config.pools.iter().position(|pool| pool.name == key.pool)?;
    let backend = config.pools[pool].backends.iter().position(|backend| backend.address == key.address)?;
    Some((pool, backend))
}

/// Refuses what would not fit before anything is written.
pub fn preflight(config: &Config, capacity: &Capacity) -> Result<(), PlanError> {
    // Without the rows of maps that nothing lies in yet.
    let least = Capacity { vip4_half_log2: 0, vip6_half_log2: 0, slot_rows: 0, ..*capacity };
    let empty = Image::empty(&least, lb_common::abi::Meta::default());
    check_room(&empty, &desired(config, &World::default()), capacity)
}
