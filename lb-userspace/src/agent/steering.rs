//! What `policy` makes of this agent's pools: its state from one event to the next, and what changes as log lines. Knows
//! neither tables nor who probes.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::time::Instant;

use tracing::{info, warn};

use super::core::{BackendKey, keys};
use crate::config::model::{Config, Pool, Scheduler, SlowStart};
use crate::health::{Probe, State, Transition};
use crate::policy::response::ResponseTimes;
use crate::policy::slow_start::Starts;
use crate::policy::tiers::{Choice, Level, panics};
use crate::reconcile::desired::World;

#[derive(Debug, Clone, Default)]
pub struct Steering {
    /// By the name of the pool: those with fallbacks, or with panic.
    tiers: HashMap<String, Tier>,
    starts: Starts<BackendKey>,
    /// Backends that came with a reload and are not up yet.
    fresh: HashSet<BackendKey>,
    /// By the name of the pool: those whose response times count.
    times: HashMap<String, ResponseTimes<IpAddr>>,
    /// Shares of those that start, as of the last look.
    shares: HashMap<BackendKey, u16>,
    /// When something changes that no event announces, as of then.
    due: Option<Instant>,
}

/// A pool and those that may take its place.
#[derive(Debug, Clone)]
struct Tier {
    /// Their names: a reload may name others.
    levels: Vec<String>,
    choice: Choice,
    panic: bool,
}

impl Steering {
    /// For the first configuration. `held` are levels whose backends were found in the tables of their pool.
    pub fn new(config: &Config, held: &HashMap<usize, usize>) -> Self {
        let mut steering = Self::default();
        steering.configure(config);
        for (pool, level) in held {
            if let Some(tier) = steering.tiers.get_mut(&config.pools[*pool].name) {
                tier.choice = Choice::adopted(tier.levels.len(), *level);
            }
        }
        steering
    }

    /// Another configuration: what it says of pools that stay goes on. `is_up` is what is known of its backends.
    pub fn reload(
        &mut self,
        now: Instant,
        before: &Config,
        config: &Config,
        is_up: impl Fn(&BackendKey) -> bool,
    ) {
        let known: HashSet<BackendKey> = keys(before).map(|(key, ..)| key).collect();
        let present: HashSet<BackendKey> = keys(config).map(|(key, ..)| key).collect();
        self.fresh.retain(|key| present.contains(key));
        for key in present.into_iter().filter(|key| !known.contains(key)) {
            // One that is not checked is up, and no check will say so.
            if is_up(&key) {
                self.starts.begin(key, now);
            } else {
                self.fresh.insert(key);
            }
        }
        self.configure(config);
    }

    fn configure(&mut self, config: &Config) {
        let name = |pool: usize| config.pools[pool].name.clone();
        let mut tiers = std::mem::take(&mut self.tiers);
        let mut times = std::mem::take(&mut self.times);
        for service in &config.services {
            let pool = &config.pools[service.pool];
            if !pool.tiers.fallback.is_empty() || pool.tiers.panic > 0 {
                let levels: Vec<String> = config.levels_of(service.pool).map(name).collect();
                let tier = tiers.remove(&pool.name).map(|tier| tier.with_levels(&levels));
                self.tiers
                    .entry(pool.name.clone())
                    .or_insert_with(|| tier.unwrap_or_else(|| Tier::new(levels)));
            }
            if service.scheduler == Scheduler::LeastResponseTime {
                for level in config.levels_of(service.pool) {
                    let mut known = times.remove(&name(level)).unwrap_or_default();
                    let backends = &config.pools[level].backends;
                    known.retain(|address| backends.iter().any(|backend| backend.address == *address));
                    self.times.entry(name(level)).or_insert(known);
                }
            }
        }
    }

    pub fn on_transition(&mut self, now: Instant, key: &BackendKey, transition: &Transition) {
        match transition.to {
            State::Up => {
                // Others answer for the first time to an agent that has just begun.
                if self.fresh.remove(key) || transition.from == State::Down {
                    self.starts.begin(key.clone(), now);
                }
            }
            State::Down => {
                self.starts.forget(key);
                if let Some(times) = self.times.get_mut(&key.pool) {
                    times.forget(&key.address);
                }
            }
            State::Checking => {}
        }
    }

    /// Whether weights are to be worked out again.
    pub fn on_probe(&mut self, now: Instant, key: &BackendKey, probe: &Probe) -> bool {
        let Some(times) = self.times.get_mut(&key.pool).filter(|_| probe.result.is_ok()) else {
            return false;
        };
        times.took(key.address, probe.took);
        times.due(now).is_some_and(|due| due <= now)
    }

    /// When something changes that no event announces, from the last look on. Asked with every event.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Takes in who is up now.
    pub fn observe(&mut self, now: Instant, config: &Config, world: &World) {
        let mut due = Vec::new();
        for (index, pool) in config.pools.iter().enumerate() {
            if let Some(tier) = self.tiers.get_mut(&pool.name) {
                let levels: Vec<Level> =
                    config.levels_of(index).map(|level| count(config, world, level)).collect();
                tier.observe(now, pool, &levels);
                due.extend(tier.choice.due(&pool.tiers));
            }
        }
        self.starts.retain(now, |key| slow_start(config, key));
        let share = |(key, pool, _): (BackendKey, usize, usize)| {
            let share = self.starts.share(&key, config.pools[pool].slow_start?, now)?;
            Some((key, share))
        };
        due.extend(self.starts.due(now, |key| slow_start(config, key)));
        self.due = due.into_iter().min();
        self.shares =
            if self.starts.is_empty() { HashMap::new() } else { keys(config).filter_map(share).collect() };
        for (pool, times) in &mut self.times {
            if times.update(now) {
                info!(%pool, "weights follow response times");
            }
        }
    }

    /// Puts into the world what was made of it.
    pub fn steer(&self, config: &Config, world: &mut World) {
        for (index, pool) in config.pools.iter().enumerate() {
            if let Some(tier) = self.tiers.get(&pool.name) {
                if tier.choice.level() > 0 {
                    let level = config.levels_of(index).nth(tier.choice.level());
                    world.levels.extend(level.map(|level| (index, level)));
                }
                if tier.panic {
                    world.panic.insert(index);
                }
            }
        }
        if self.shares.is_empty() && self.times.is_empty() {
            return;
        }
        for (key, pool, backend) in keys(config) {
            if let Some(&share) = self.shares.get(&key) {
                let known = world.shares.entry((pool, backend)).or_insert(share);
                *known = share.min(*known);
            }
            if let Some(times) = self.times.get(&key.pool) {
                world.response_weights.insert((pool, backend), times.weight(&key.address));
            }
        }
    }

    /// The share of one that starts.
    pub fn share(&self, key: &BackendKey) -> Option<u16> {
        self.shares.get(key).copied()
    }

    /// The name of the pool that takes the packets of another, and whether it is in panic.
    pub fn in_use<'s>(&'s self, pool: &'s str) -> (&'s str, bool) {
        match self.tiers.get(pool) {
            Some(tier) => (tier.in_use(), tier.panic),
            None => (pool, false),
        }
    }
}

impl Tier {
    fn new(levels: Vec<String>) -> Self {
        Self { choice: Choice::new(levels.len()), levels, panic: false }
    }

    /// The pool in use stays so if it is still one of them.
    fn with_levels(self, levels: &[String]) -> Self {
        if self.levels == levels {
            return self;
        }
        let kept = levels.iter().position(|level| level == self.in_use());
        let choice = match kept {
            Some(level) => Choice::adopted(levels.len(), level),
            None => Choice::new(levels.len()),
        };
        Self { levels: levels.to_vec(), choice, panic: self.panic }
    }

    fn in_use(&self) -> &str {
        &self.levels[self.choice.level()]
    }

    fn observe(&mut self, now: Instant, pool: &Pool, levels: &[Level]) {
        let before = self.choice.level();
        self.choice.observe(now, levels, &pool.tiers);
        let own = levels[0];
        let (name, level) = (&pool.name, self.choice.level());
        let in_use = self.in_use();
        let (up, of, min_healthy) = (own.up, own.all, pool.tiers.min_healthy);
        if level > before {
            warn!(pool = %name, %in_use, up, of, %min_healthy, "pool falls back: too few of its backends are up");
        } else if level < before {
            info!(pool = %name, %in_use, up, of, %min_healthy, "pool falls back no longer, or less far");
        }
        let Level { up, all: of } = levels[level];
        let panic = panics(levels[level], &pool.tiers);
        if panic && !self.panic {
            let percent = pool.tiers.panic;
            warn!(pool = %name, %in_use, up, of, percent, "panic: too few backends are up to believe it; all of them get packets");
        } else if self.panic && !panic {
            info!(pool = %name, %in_use, up, of, "panic is over");
        }
        self.panic = panic;
    }
}

/// Backends of a pool that can take flows, and that may.
fn count(config: &Config, world: &World, pool: usize) -> Level {
    let mut level = Level::default();
    for (index, backend) in config.pools[pool].backends.iter().enumerate() {
        // One that is drained is as good as not there.
        if backend.weight > 0 && world.shares.get(&(pool, index)) != Some(&0) {
            level.all += 1;
            level.up += usize::from(world.up.get(&(pool, index)) == Some(&true));
        }
    }
    level
}

fn slow_start(config: &Config, key: &BackendKey) -> Option<SlowStart> {
    config.pools.iter().find(|pool| pool.name == key.pool)?.slow_start
}
