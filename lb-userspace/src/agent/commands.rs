//! What operators ask of backends, and backends that leave the file: what the core does about them, and when it is kept.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::changed::Changed;
use super::core::{BackendKey, Core, ReconcileError, keys};
use super::diff::Comparison;
use super::overrides::{self, Cause, End, Ended, Entry, Exit, Overrides, Recovered, Uptime};
use super::snapshot::{Remaining, Snapshot};
use crate::config::model::{Backend, Config, OnEmpty, Pool};
use crate::config::{did_you_mean, show_duration};
use crate::reconcile::desired::identity_of;
use crate::reconcile::image::Image;

/// What is asked of a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Drain(Timeout),
    Disable,
    Enable,
    Weight(u8),
}

/// When the flows of a draining backend move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timeout {
    /// As its pool's `drain_timeout` says.
    OfPool,
    Never,
    After(Duration),
}

/// A backend and what is asked of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// `POOL/NAME` or `POOL/ADDRESS`.
    pub backend: String,
    pub action: Action,
}

/// How the agent is after a command.
#[derive(Debug)]
pub struct Done {
    pub snapshot: Snapshot,
    /// The backend's place among those of the snapshot.
    pub place: usize,
    pub said: String,
    pub warnings: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// There is no such backend.
    #[error("{0}")]
    Unknown(String),
    /// This cannot be asked of it.
    #[error("{0}")]
    Refused(String),
    #[error("it could not be kept over a restart, so nothing was changed")]
    NotKept(#[source] anyhow::Error),
    #[error("it holds, but the tables could not be written; the agent tries again")]
    NotWritten(#[source] ReconcileError),
}

/// A backend whose deadline has passed, and what it still had then.
pub(super) struct Cut {
    key: BackendKey,
    left: Remaining,
}

/// What was said of backends, and the configuration that is in effect with it.
pub(super) struct Held {
    pub overrides: Overrides,
    pub config: Config,
}

impl Held {
    /// What an earlier agent kept, with this file.
    pub fn recovered(recovered: &Recovered, file: &Config) -> (Self, Vec<Ended>) {
        let previous = recovered.previous(file);
        let (overrides, ended) = recovered.overrides.with_file(&previous, file, overrides::uptime());
        let config = overrides.effective(&previous, file);
        (Self { overrides, config }, ended)
    }

    /// Without those who have left the file and are not in an earlier agent's tables either.
    pub fn only_with_rows(mut self, before: &Image, file: &Config) -> Self {
        let ids = before.ids();
        let has_row = |key: &BackendKey| {
            let pool = self.config.pools.iter().find(|pool| pool.name == key.pool);
            let of = |pool: &Pool| {
                pool.backends.iter().find(|b| b.address == key.address).map(|b| identity_of(pool, b))
            };
            pool.and_then(of).is_some_and(|identity| ids.contains_key(&identity))
        };
        let gone: HashSet<_> = self.overrides.leaving().filter(|key| !has_row(key)).cloned().collect();
        self.overrides.let_go(&gone);
        self.config = self.overrides.effective(&self.config, file);
        self
    }
}

impl Core {
    pub fn command(&mut self, command: &Command) -> Result<Done, CommandError> {
        let now = overrides::uptime();
        let (place, key, pool, backend) = find(&self.config, &command.backend)?;
        let name = format!("{}/{}", pool.name, backend.name);
        if backend.leaving && matches!(command.action, Action::Enable | Action::Weight(_)) {
            return Err(CommandError::Refused(format!(
                "{name} has left the file and only drains; put it back into the file, then `xlb reload`"
            )));
        }
        let file = self.file.pools.iter().find(|pool| pool.name == key.pool);
        let written = file.and_then(|pool| pool.backends.iter().find(|b| b.address == key.address));
        let entry = Entry::of(written.unwrap_or(backend));
        let mut next = self.overrides.clone();
        let said = apply(&mut next, command.action, &key, entry, now, pool);
        if next != self.overrides {
            let cut = self.cut_off(&mut next, now);
            let config = next.effective(&self.config, &self.file);
            self.store.save(&next, &config).map_err(CommandError::NotKept)?;
            info!(pool = %key.pool, backend = %backend.name, address = %key.address, "by command: {said}");
            self.drained.remove(&key);
            (self.overrides, self.config, self.changed) = (next, Arc::new(config), Changed::All);
            self.tell_cut(&cut);
        }
        self.reconcile().map_err(CommandError::NotWritten)?;
        let warnings = self.caution(&key.pool).into_iter().collect();
        Ok(Done { snapshot: self.snapshot(Instant::now()), place, said: format!("{name} {said}"), warnings })
    }

    /// For who compares it with another file.
    pub fn comparison(&self, now: Instant) -> Comparison {
        Comparison {
            file: Arc::clone(&self.file),
            overrides: self.overrides.clone(),
            world: self.world(),
            capacity: *self.datapath.capacity(),
            image: self.image.clone(),
            snapshot: self.snapshot(now),
        }
    }

    /// What an operator should know of where new flows of a pool go now.
    fn caution(&self, pool: &str) -> Option<String> {
        let own = self.file.pools.iter().position(|configured| configured.name == pool)?;
        let world = self.world();
        let level = world.levels.get(&own).copied().unwrap_or(own);
        let takes = |(backend, of): (usize, &Backend)| {
            let place = (level, backend);
            of.weight > 0 && world.shares.get(&place) != Some(&0) && world.up.get(&place) == Some(&true)
        };
        let none = format!("no backend of pool {pool} takes new flows now");
        if self.config.pools[level].backends.iter().enumerate().any(takes) {
            let in_use = &self.config.pools[level].name;
            return (level != own).then(|| format!("{none}: they go to pool {in_use}"));
        }
        Some(match self.config.pools[own].on_empty {
            OnEmpty::Drop => format!("{none}: they are dropped"),
            OnEmpty::Pass => format!("{none}: the host itself gets them"),
            OnEmpty::All => format!("{none}: those that are in use get them, up or not"),
        })
    }

    /// What holds with another file, and what is to be told once it is in effect.
    pub(super) fn with_file(&self, file: &Config) -> (Held, Vec<Ended>, Vec<Cut>) {
        let now = overrides::uptime();
        let (mut overrides, ended) = self.overrides.with_file(&self.config, file, now);
        let cut = self.cut_off(&mut overrides, now);
        let config = overrides.effective(&self.config, file);
        (Held { overrides, config }, ended, cut)
    }

    /// Another file is in effect.
    pub(super) fn file_in_effect(&mut self, ended: &[Ended], cut: &[Cut]) {
        tell(ended);
        self.tell_cut(cut);
        let overrides = &self.overrides;
        self.drained.retain(|key| overrides.exit(key).is_some());
        self.keep();
    }

    /// Keeps what holds over a restart.
    pub fn keep(&self) {
        if let Err(error) = self.store.save(&self.overrides, &self.config) {
            warn!(error = %format!("{error:#}"), "overrides are not kept over a restart");
        }
    }

    /// Notes deadlines that have passed, and drains that are complete.
    pub fn look_after_exits(&mut self) {
        self.note_named();
        if !self.overrides.has_exits() {
            return;
        }
        let now = overrides::uptime();
        let mut overrides = self.overrides.clone();
        let cut = self.cut_off(&mut overrides, now);
        if !cut.is_empty() {
            (self.overrides, self.changed) = (overrides, Changed::All);
            self.tell_cut(&cut);
            self.keep();
        }
        let complete = self.overrides.exits().filter(|(key, _)| !self.drained.contains(*key));
        let complete = complete.filter(|(key, _)| self.remaining_at(key).is_empty());
        let complete: Vec<_> = complete.map(|(key, exit)| (key.clone(), exit.since)).collect();
        for (key, since) in complete {
            let took = now.saturating_sub(since).as_secs();
            info!(pool = %key.pool, address = %key.address, seconds = took, "backend drained: no slot and no flow is left");
            self.drained.insert(key);
        }
    }

    /// Notes what backends still have whose deadline has passed.
    fn cut_off(&self, overrides: &mut Overrides, now: Uptime) -> Vec<Cut> {
        let due = overrides.due(now).into_iter();
        let cut = due.map(|key| {
            // Who may have more by now has moved before it is counted.
            let left = Remaining { uncounted: false, ..self.remaining_at(&key) };
            overrides.cut_off(&key, left);
            Cut { key, left }
        });
        cut.collect()
    }

    /// Says whose deadline has passed, once that holds.
    fn tell_cut(&self, cut: &[Cut]) {
        for Cut { key, left } in cut {
            let Remaining { pins, slots_old, .. } = *left;
            match self.overrides.exit(key) {
                Some(Exit { cause: Cause::Disable, .. }) | None => {}
                Some(_) if left.is_empty() => {}
                Some(_) => {
                    warn!(pool = %key.pool, address = %key.address, flows = pins, slots = slots_old, "the drain's deadline has passed: what is left moves");
                }
            }
        }
    }

    /// Lets go of backends that have left the file and that nothing names any more. Returns whether there were any.
    pub fn let_leavers_go(&mut self) -> Result<bool, ReconcileError> {
        // While tables are not as they should be, they do not tell.
        if self.changed.anything() {
            return Ok(false);
        }
        self.note_named();
        let gone: HashSet<BackendKey> =
            self.overrides.leaving().filter(|key| self.remaining_at(key).is_empty()).cloned().collect();
        if gone.is_empty() {
            return Ok(false);
        }
        for key in &gone {
            info!(pool = %key.pool, address = %key.address, "backend is gone: it left the file, and nothing is left of it");
        }
        self.forget(&gone);
        self.start_checks();
        self.keep();
        self.reconcile()?;
        Ok(true)
    }

    /// Notes what backends on their way out get that connection IDs of QUIC name.
    fn note_named(&mut self) {
        if self.image.servers.is_empty() || !self.overrides.has_exits() {
            return;
        }
        let named: HashSet<u16> = self.image.servers.values().copied().collect();
        let id_of = |key: &BackendKey| {
            let pool = self.config.pools.iter().find(|pool| pool.name == key.pool)?;
            let backend = pool.backends.iter().find(|backend| backend.address == key.address)?;
            let identity = identity_of(pool, backend);
            self.index().ids.get(&identity).copied().filter(|id| named.contains(id))
        };
        let ids = self.overrides.exits().filter_map(|(key, _)| id_of(key));
        let packets = ids.filter_map(|id| {
            // A count that cannot be read is no other count.
            Some((id, self.datapath.maps.counters().backend(id).ok()?.packets))
        });
        let packets: HashMap<u16, u64> = packets.collect();
        self.named.note(Instant::now(), &packets);
    }

    /// Backends that have left for good.
    pub(super) fn forget(&mut self, gone: &HashSet<BackendKey>) {
        if gone.is_empty() {
            return;
        }
        self.overrides.let_go(gone);
        self.config = Arc::new(self.overrides.effective(&self.config, &self.file));
        self.fsms.retain(|key, _| !gone.contains(key));
        self.transitions.retain(|key, _| !gone.contains(key));
        self.drained.retain(|key| !gone.contains(key));
        self.changed = Changed::All;
    }

    fn remaining_at(&self, key: &BackendKey) -> Remaining {
        let pool = self.config.pools.iter().find(|pool| pool.name == key.pool);
        let found =
            pool.and_then(|pool| Some((pool, pool.backends.iter().find(|b| b.address == key.address)?)));
        found.map_or_else(Remaining::default, |(pool, backend)| self.remaining_of(pool, backend))
    }
}

/// Does it to a copy, and says so.
fn apply(
    overrides: &mut Overrides,
    action: Action,
    key: &BackendKey,
    entry: Entry,
    now: Uptime,
    pool: &Pool,
) -> String {
    match action {
        Action::Drain(timeout) => {
            let timeout = match timeout {
                Timeout::OfPool => pool.flows.drain_timeout,
                Timeout::Never => None,
                Timeout::After(timeout) => Some(timeout),
            };
            overrides.drain(key, entry, now, timeout);
            match timeout {
                None => "drains: no new flows; those it has stay until they end".to_owned(),
                Some(timeout) if timeout.is_zero() => {
                    "drains: no new flows; those it has move now".to_owned()
                }
                Some(timeout) => {
                    format!(
                        "drains: no new flows; those it still has in {} move then",
                        show_duration(timeout)
                    )
                }
            }
        }
        Action::Disable => {
            overrides.disable(key, entry, now);
            "is disabled: no new flows, and those it has move".to_owned()
        }
        Action::Enable if overrides.enable(key) => "is as the file has it".to_owned(),
        Action::Enable => "was as the file has it already".to_owned(),
        Action::Weight(weight) => {
            let written = entry.weight;
            overrides.set_weight(key, entry, weight);
            format!("has weight {weight} (in the file: {written})")
        }
    }
}

/// The backend of this name or address, with its place among all.
pub(super) fn find<'c>(
    config: &'c Config,
    text: &str,
) -> Result<(usize, BackendKey, &'c Pool, &'c Backend), CommandError> {
    let unknown = |text: String| CommandError::Unknown(text);
    let Some((pool_name, name)) = text.split_once('/') else {
        return Err(unknown(format!("{text} names no backend; write its pool, too: POOL/BACKEND")));
    };
    let Some(pool) = config.pools.iter().find(|pool| pool.name == pool_name) else {
        let pools: Vec<&str> = config.pools.iter().map(|pool| pool.name.as_str()).collect();
        return Err(unknown(format!("no pool {pool_name}; {}", did_you_mean(pool_name, &pools))));
    };
    let by_name = pool.backends.iter().find(|backend| backend.name == name);
    let by_address = || pool.backends.iter().find(|backend| name.parse() == Ok(backend.address));
    let Some(backend) = by_name.or_else(by_address) else {
        let names: Vec<&str> = pool.backends.iter().map(|backend| backend.name.as_str()).collect();
        return Err(unknown(format!(
            "pool {pool_name} has no backend {name}; {}",
            did_you_mean(name, &names)
        )));
    };
    let wanted = BackendKey { pool: pool.name.clone(), address: backend.address };
    let place = keys(config).position(|(key, ..)| key == wanted).unwrap_or_default();
    Ok((place, wanted, pool, backend))
}

pub(super) fn tell(ended: &[Ended]) {
    for Ended { key, name, end } in ended {
        let why = match end {
            End::EntryChanged => "its entry in the file has changed",
            End::LeftTheFile => "it has left the file",
        };
        info!(pool = %key.pool, backend = %name, address = %key.address, "what was said of it by command has ended: {why}");
    }
}
