//! What an operator has said of backends beside the file, and which backends have left the file and are not empty yet.
//! A pure set; time is an argument. Knows neither maps nor sockets.

mod kept;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::core::{BackendKey, keys};
use super::snapshot::Remaining;
use crate::config::model::{Backend, Config, OnRemove, Pool, Tiers};

pub use kept::{Recovered, Store};

/// Time since the host started, also while it slept: nobody sets it, and it goes on while no agent runs.
pub type Uptime = Duration;

pub fn uptime() -> Uptime {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}

/// Why a backend takes no new flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cause {
    /// `xlb backend drain`.
    Drain,
    /// `xlb backend disable`: its flows move at once.
    Disable,
    /// It left the file.
    Removed,
}

impl Cause {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Drain => "drain",
            Self::Disable => "disable",
            Self::Removed => "removed",
        }
    }
}

/// How a backend is taken out of use: no new flows come, and those it has stay until a deadline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exit {
    pub cause: Cause,
    pub since: Uptime,
    /// When the flows that it still has are moved; `None` is never.
    pub deadline: Option<Uptime>,
    /// What it still had at its deadline, once that has passed.
    pub cut: Option<Remaining>,
}

impl Exit {
    fn new(cause: Cause, now: Uptime, timeout: Option<Duration>) -> Self {
        let deadline = timeout.map(|timeout| now.saturating_add(timeout));
        Self { cause, since: now, deadline, cut: None }
    }

    fn has_passed(&self, now: Uptime) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// Its deadline has passed, and it was noted what it still had: that moves from now on.
    pub fn is_over(&self) -> bool {
        self.cut.is_some()
    }

    /// Moves the deadline. What was cut off before is told no more.
    fn until(&mut self, now: Uptime, timeout: Option<Duration>) {
        *self = Self { since: self.since, ..Self::new(self.cause, now, timeout) };
    }
}

/// A backend's entry in the file. An override ends when it changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    pub name: String,
    pub weight: u8,
    pub server_id: Option<String>,
}

impl Entry {
    pub fn of(backend: &Backend) -> Self {
        let server_id = backend.server_id.as_ref().map(ToString::to_string);
        Self { name: backend.name.clone(), weight: backend.weight, server_id }
    }
}

/// What holds for a backend instead of what the file says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Override {
    pub entry: Entry,
    pub weight: Option<u8>,
    pub exit: Option<Exit>,
}

/// Why an override has ended without anybody's `enable`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    EntryChanged,
    LeftTheFile,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    pub key: BackendKey,
    pub name: String,
    pub end: End,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    set: BTreeMap<BackendKey, Override>,
    /// Backends that no file names any more, and whose ids slots or flows still name.
    leaving: BTreeMap<BackendKey, Exit>,
}

impl Overrides {
    pub fn of(&self, key: &BackendKey) -> Option<&Override> {
        self.set.get(key)
    }

    /// How the backend leaves, if it does.
    pub fn exit(&self, key: &BackendKey) -> Option<&Exit> {
        self.leaving.get(key).or_else(|| self.set.get(key)?.exit.as_ref())
    }

    pub fn has_exits(&self) -> bool {
        self.exits().next().is_some()
    }

    pub fn exits(&self) -> impl Iterator<Item = (&BackendKey, &Exit)> {
        let set = self.set.iter().filter_map(|(key, over)| Some((key, over.exit.as_ref()?)));
        self.leaving.iter().chain(set)
    }

    pub fn leaving(&self) -> impl Iterator<Item = &BackendKey> {
        self.leaving.keys()
    }

    pub fn is_leaving(&self, key: &BackendKey) -> bool {
        self.leaving.contains_key(key)
    }

    /// No new flows; those it has may end by themselves until the timeout.
    pub fn drain(&mut self, key: &BackendKey, entry: Entry, now: Uptime, timeout: Option<Duration>) {
        self.begin_exit(key, entry, now, Cause::Drain, timeout);
    }

    /// No new flows, and none of those it has.
    pub fn disable(&mut self, key: &BackendKey, entry: Entry, now: Uptime) {
        self.begin_exit(key, entry, now, Cause::Disable, Some(Duration::ZERO));
    }

    /// One that leaves already goes on to leave, by another deadline.
    fn begin_exit(
        &mut self,
        key: &BackendKey,
        entry: Entry,
        now: Uptime,
        cause: Cause,
        timeout: Option<Duration>,
    ) {
        if let Some(exit) = self.leaving.get_mut(key) {
            return exit.until(now, timeout);
        }
        let exit = &mut self.entry(key, entry).exit;
        match exit {
            Some(exit) if exit.cause == cause => exit.until(now, timeout),
            _ => *exit = Some(Exit::new(cause, now, timeout)),
        }
    }

    /// A weight other than the file's; the file's own ends what was said of the weight.
    pub fn set_weight(&mut self, key: &BackendKey, entry: Entry, weight: u8) {
        let over = self.entry(key, entry);
        over.weight = (weight != over.entry.weight).then_some(weight);
        self.set.retain(|_, over| over.weight.is_some() || over.exit.is_some());
    }

    /// The file's entry holds again. Returns whether anything else did.
    pub fn enable(&mut self, key: &BackendKey) -> bool {
        self.set.remove(key).is_some()
    }

    fn entry(&mut self, key: &BackendKey, entry: Entry) -> &mut Override {
        self.set.entry(key.clone()).or_insert(Override { entry, weight: None, exit: None })
    }

    /// What holds with another file. Backends of `previous`, which is the configuration in effect, that the file does not
    /// name begin to leave.
    pub fn with_file(&self, previous: &Config, file: &Config, now: Uptime) -> (Self, Vec<Ended>) {
        let entries: HashMap<BackendKey, &Backend> =
            keys(file).map(|(key, pool, backend)| (key, &file.pools[pool].backends[backend])).collect();
        let mut ended = Vec::new();
        let mut set = self.set.clone();
        set.retain(|key, over| {
            let end = match entries.get(key) {
                Some(backend) if Entry::of(backend) == over.entry => return true,
                Some(_) => End::EntryChanged,
                None => End::LeftTheFile,
            };
            ended.push(Ended { key: key.clone(), name: over.entry.name.clone(), end });
            false
        });
        let pools: HashMap<&str, &Pool> = file.pools.iter().map(|pool| (pool.name.as_str(), pool)).collect();
        let gone = keys(previous).filter(|(key, ..)| !entries.contains_key(key));
        let leaving = gone.map(|(key, pool, _)| {
            let exit = self.leaving.get(&key).cloned().unwrap_or_else(|| {
                let pool = pools.get(key.pool.as_str()).copied().unwrap_or(&previous.pools[pool]);
                let mut exit = Exit::new(Cause::Removed, now, removal_timeout(pool));
                // What was said of it before does not last longer for that it left.
                let said = self.exit(&key).and_then(|exit| exit.deadline);
                exit.deadline = exit.deadline.into_iter().chain(said).min();
                exit
            });
            (key, exit)
        });
        (Self { set, leaving: leaving.collect() }, ended)
    }

    /// The file with everything that holds beside it. What leaves is taken from `previous`: it follows its pool's other
    /// backends, and pools of which nothing else is left follow the file's, so that places in the file stay.
    pub fn effective(&self, previous: &Config, file: &Config) -> Config {
        let mut config = file.clone();
        for pool in &mut config.pools {
            for backend in &mut pool.backends {
                let key = BackendKey { pool: pool.name.clone(), address: backend.address };
                if let Some(weight) = self.set.get(&key).and_then(|over| over.weight) {
                    backend.weight = weight;
                }
            }
        }
        let mut places: HashMap<String, usize> =
            config.pools.iter().enumerate().map(|(place, pool)| (pool.name.clone(), place)).collect();
        for (key, pool, backend) in keys(previous).filter(|(key, ..)| self.is_leaving(key)) {
            let of = &previous.pools[pool];
            let place = *places.entry(key.pool).or_insert_with(|| {
                config.pools.push(remains_of(of));
                config.pools.len() - 1
            });
            let pool = &mut config.pools[place];
            let backend = leaving(&of.backends[backend], pool);
            pool.backends.push(backend);
        }
        config
    }

    /// Backends whose deadline has passed, and of which nobody has noted yet what they still had then.
    pub fn due(&self, now: Uptime) -> Vec<BackendKey> {
        let due = self.exits().filter(|(_, exit)| exit.cut.is_none() && exit.has_passed(now));
        due.map(|(key, _)| key.clone()).collect()
    }

    /// Notes what a backend still had at its deadline.
    pub fn cut_off(&mut self, key: &BackendKey, remaining: Remaining) {
        let set = self.set.get_mut(key).and_then(|over| over.exit.as_mut());
        if let Some(exit) = self.leaving.get_mut(key).or(set) {
            exit.cut = Some(remaining);
        }
    }

    /// Forgets backends that have left and that nothing names any more.
    pub fn let_go(&mut self, gone: &HashSet<BackendKey>) {
        self.leaving.retain(|key, _| !gone.contains(key));
    }
}

/// How long the flows of a backend that leaves the file stay where they are.
fn removal_timeout(pool: &Pool) -> Option<Duration> {
    match pool.flows.on_remove {
        OnRemove::Drain => pool.flows.drain_timeout,
        OnRemove::Move => Some(Duration::ZERO),
    }
}

/// A pool that has left the file, without its backends: no service uses it, and it uses no other pool.
fn remains_of(pool: &Pool) -> Pool {
    Pool { backends: Vec::new(), tiers: Tiers::default(), ..pool.clone() }
}

/// A backend as it is among those of a pool that it has left. A name belongs to whom the file gives it.
fn leaving(backend: &Backend, pool: &Pool) -> Backend {
    let taken = pool.backends.iter().any(|other| other.name == backend.name);
    let name = if taken { backend.address.to_string() } else { backend.name.clone() };
    Backend { name, weight: 0, leaving: true, ..backend.clone() }
}
