//! What another file would change: key by key, which backends would leave, and how many flows would go elsewhere.
//! Changes nothing.

mod facts;
mod tables;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::changeover::{capacity_for, fit};
use super::core::{BackendKey, keys, preflight};
use super::has_room;
use super::overrides::{End, Exit, Overrides, Uptime};
use super::snapshot::Snapshot;
use super::status::BackendStatus;
use crate::bpf::MapsError;
use crate::capacity::Capacity;
use crate::config::model::Config;
use crate::config::{Loaded, show_duration};
use crate::reconcile::desired::{BackendRef, Desired, World, desired};
use crate::reconcile::image::Image;
use crate::reconcile::plan::plan_at_once;
use facts::{Facts, Subject};
use tables::{Tables, hashed};

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Diff {
    pub changes: Vec<Change>,
    /// Tables of which new flows would go elsewhere.
    pub tables: Vec<TableChange>,
    pub leaving: Vec<Leaver>,
    /// Backends for which what was said by command would end.
    pub ended: Vec<String>,
    pub warnings: Vec<String>,
}

impl Diff {
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// `service www`, `backend web/web1`.
    pub subject: String,
    pub kind: Kind,
    pub keys: Vec<KeyChange>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Added,
    Removed,
    Changed,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyChange {
    pub key: String,
    pub from: Option<String>,
    pub to: Option<String>,
}

/// Where new flows of some services would go.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TableChange {
    /// `www tcp`: all that use the same table, before and after.
    pub services: Vec<String>,
    pub pool: String,
    pub scheduler: String,
    /// The part of new flows that would get another backend, 0 to 1.
    pub flows: f64,
    /// The part of today's packets that such flows are, by the counters; nothing where there are none.
    pub packets: Option<f64>,
}

/// A backend that would leave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Leaver {
    pub backend: String,
    /// What becomes of its flows.
    pub flows: String,
    pub slots: u64,
    pub pins: u64,
    pub packets_per_second: Option<f64>,
}

/// The agent at one moment, to be compared with a file at leisure.
#[derive(Debug)]
pub struct Comparison {
    pub file: Arc<Config>,
    pub overrides: Overrides,
    pub world: World,
    pub capacity: Capacity,
    pub image: Image,
    /// Its configuration is the one in effect.
    pub snapshot: Snapshot,
}

/// Packets a second of each backend.
pub type Rates = HashMap<BackendKey, f64>;

/// What two readings say of the time between them.
pub fn rates(earlier: &[BackendStatus], later: &[BackendStatus], seconds: f64) -> Rates {
    let key = |status: &BackendStatus| BackendKey { pool: status.pool.clone(), address: status.address };
    let before: HashMap<BackendKey, u64> =
        earlier.iter().map(|status| (key(status), status.packets)).collect();
    let rate = |status: &BackendStatus| {
        let key = key(status);
        let packets = status.packets.saturating_sub(*before.get(&key)?);
        Some((key, packets as f64 / seconds))
    };
    later.iter().filter_map(rate).collect()
}

impl Comparison {
    pub fn statuses(&self) -> Result<Vec<BackendStatus>, MapsError> {
        self.snapshot.backends()
    }

    /// What a file would change, taken over now.
    pub fn with(&self, loaded: &Loaded, rates: &Rates) -> Diff {
        let file = &loaded.config;
        let (now, before) = (self.snapshot.at, &*self.snapshot.config);
        let (overrides, ended) = self.overrides.with_file(before, file, now);
        let after = overrides.effective(before, file);
        let world = transposed(&self.world, before, &after);
        let (old, new) = (desired(before, &self.world), desired(&after, &world));
        let named = ended.iter().filter(|ended| ended.end == End::EntryChanged);
        Diff {
            changes: changes(&self.file, file),
            tables: Tables::new((before, &old), (&after, &new), rates).changes(),
            leaving: self.leaving(&overrides, rates, now),
            ended: named.map(|ended| format!("{}/{}", ended.key.pool, ended.name)).collect(),
            warnings: self.warnings(loaded, &after, &new),
        }
    }

    fn leaving(&self, overrides: &Overrides, rates: &Rates, now: Uptime) -> Vec<Leaver> {
        let before = &self.snapshot.config;
        let all = keys(before).zip(&self.snapshot.backends);
        let new = all.filter(|((key, ..), _)| overrides.is_leaving(key) && !self.overrides.is_leaving(key));
        new.map(|((key, pool, backend), view)| Leaver {
            backend: format!("{}/{}", key.pool, before.pools[pool].backends[backend].name),
            flows: overrides.exit(&key).map_or_else(String::new, |exit| end_of_flows(exit, now)),
            slots: u64::from(view.remaining.slots_old.max(view.remaining.slots_new)),
            pins: view.remaining.pins,
            packets_per_second: rates.get(&key).copied(),
        })
        .collect()
    }

    fn warnings(&self, loaded: &Loaded, after: &Config, new: &Desired) -> Vec<String> {
        let (mut warnings, file) = (Vec::new(), &loaded.config);
        let capacity = capacity_for(file, &self.snapshot.config, &self.image);
        let fits = preflight(file, &capacity).and_then(|()| {
            if capacity != self.capacity {
                warnings
                    .push("limits: new maps are filled beside those in use, and take their place".to_owned());
                return fit(&self.image, new, &capacity);
            }
            plan_at_once(&self.image, new, &capacity).map(drop)
        });
        warnings.extend(fits.err().map(|error| format!("it would be refused: {error}")));
        // As a reload does: maps that are there go on.
        if capacity != self.capacity
            && let Err(no_room) = has_room(&capacity, &loaded.places)
        {
            warnings.push(format!("it would be refused: {no_room}"));
        }
        if self.file.seed != file.seed {
            warnings.push("seed: it must be the same on every balancer; flows move".to_owned());
        }
        for service in &file.services {
            let was = self.file.services.iter().find(|was| was.name == service.name);
            if let Some(was) = was.filter(|was| hashed(was) != hashed(service)) {
                let (from, to) = (was.scheduler, service.scheduler);
                let name = &service.name;
                warnings.push(if from == to {
                    format!("service {name}: another source_prefix spreads flows anew")
                } else {
                    format!("service {name}: flows that {from} spread, {to} spreads anew")
                });
            }
        }
        for pool in &after.pools {
            let was = self.file.pools.iter().find(|was| was.name == pool.name);
            if let Some(was) = was.filter(|was| was.forward != pool.forward) {
                let (name, from, to) = (&pool.name, was.forward, pool.forward);
                warnings
                    .push(format!("pool {name}: its backends get packets by {to} and no longer by {from}"));
            }
        }
        warnings
    }
}

fn end_of_flows(exit: &Exit, now: Uptime) -> String {
    match exit.deadline.map(|deadline| deadline.saturating_sub(now)) {
        None => "stay until they end".to_owned(),
        Some(left) if left.is_zero() => "move at once".to_owned(),
        // To the second: a part of the time may have gone.
        Some(left) => {
            let left = std::time::Duration::from_secs(left.as_millis().div_ceil(1000) as u64);
            format!("stay until they end, for {} at the most", show_duration(left))
        }
    }
}

fn changes(before: &Config, after: &Config) -> Vec<Change> {
    let (old, new) = (facts::of(before), facts::of(after));
    let subjects: BTreeSet<&Subject> = old.keys().chain(new.keys()).collect();
    let none = Facts::new();
    let mut changes: Vec<Change> = subjects
        .into_iter()
        .filter_map(|subject| {
            let (was, is) = (old.get(subject), new.get(subject));
            let kind = match (was, is) {
                (None, _) => Kind::Added,
                (_, None) => Kind::Removed,
                _ => Kind::Changed,
            };
            let keys = key_changes(was.unwrap_or(&none), is.unwrap_or(&none));
            let subject = named(subject, was.or(is).unwrap_or(&none));
            (kind != Kind::Changed || !keys.is_empty()).then_some(Change { subject, kind, keys })
        })
        .collect();
    if before.seed != after.seed {
        let seed = |text: &str| Some(text.to_owned());
        let keys = vec![KeyChange { key: "seed".to_owned(), from: seed("one"), to: seed("another") }];
        changes.insert(0, Change { subject: TOP.to_owned(), kind: Kind::Changed, keys });
    }
    changes
}

const TOP: &str = "top of the file";

fn named(subject: &Subject, facts: &Facts) -> String {
    match subject {
        Subject::Top => TOP.to_owned(),
        Subject::Interface(name) => format!("interface {name}"),
        Subject::Service(name) => format!("service {name}"),
        Subject::Pool(name) => format!("pool {name}"),
        Subject::Backend { pool, address } => {
            format!("backend {pool}/{}", facts.get("name").unwrap_or(address))
        }
    }
}

fn key_changes(was: &Facts, is: &Facts) -> Vec<KeyChange> {
    let keys: BTreeSet<&str> = was.keys().chain(is.keys()).copied().collect();
    let differing = keys.into_iter().filter(|key| was.get(key) != is.get(key));
    differing
        .map(|key| KeyChange { key: key.to_owned(), from: was.get(key).cloned(), to: is.get(key).cloned() })
        .collect()
}

/// The same world, by the places of another configuration. Backends that are new count as up, and pools that may fall
/// back do as they do now.
fn transposed(world: &World, before: &Config, after: &Config) -> World {
    let World { up, next_hops, shares, levels, panic, response_weights, old_flows } = world;
    let old: HashMap<BackendKey, BackendRef> =
        keys(before).map(|(key, pool, backend)| (key, (pool, backend))).collect();
    let mut next = World { next_hops: next_hops.clone(), ..World::default() };
    for (key, pool, backend) in keys(after) {
        let place = (pool, backend);
        let Some(was) = old.get(&key) else {
            next.up.insert(place, true);
            continue;
        };
        // One that leaves takes nothing by its weight, which is 0.
        next.up.extend(up.get(was).map(|up| (place, *up)));
        next.shares.extend(shares.get(was).map(|share| (place, *share)));
        next.response_weights.extend(response_weights.get(was).map(|weight| (place, *weight)));
        next.old_flows.extend(old_flows.get(was).map(|flows| (place, *flows)));
    }
    let pools: HashMap<&str, usize> =
        after.pools.iter().enumerate().map(|(place, pool)| (pool.name.as_str(), place)).collect();
    let now = |pool: &usize| pools.get(before.pools[*pool].name.as_str()).copied();
    next.panic = panic.iter().filter_map(now).collect();
    let levels = levels.iter().filter_map(|(pool, level)| Some((now(pool)?, now(level)?)));
    next.levels = levels.filter(|(pool, level)| after.levels_of(*pool).any(|of| of == *level)).collect();
    next
}
