//! Whom two configurations send new flows to, table by table, and how many of them would go elsewhere. Knows no agent.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use super::{Rates, TableChange};
use crate::agent::core::{BackendKey, keys};
use crate::config::model::{Config, Scheduler, Service};
use crate::reconcile::desired::{Desired, DesiredTable, Target, identity_of, table_identity};

/// A table before and after, by identity, and whether flows are spread anew.
type Pair = (u64, u64, bool);

/// Services and protocols that use a table.
type Users<'a> = Vec<(&'a Service, String)>;

/// What of a flow decides about its slot; `None` where it is its turn.
pub(super) fn hashed(service: &Service) -> Option<(bool, Option<(u8, u8)>)> {
    match service.scheduler {
        Scheduler::Maglev => Some((false, None)),
        Scheduler::SourceHash => Some((true, Some((service.source_prefix.v4, service.source_prefix.v6)))),
        Scheduler::RoundRobin
        | Scheduler::WeightedRoundRobin
        | Scheduler::Random
        | Scheduler::LeastConnections
        | Scheduler::LeastResponseTime => None,
    }
}

/// The tables of two configurations, by whom they lead to.
pub(super) struct Tables<'a> {
    before: (&'a Config, &'a Desired),
    after: (&'a Config, &'a Desired),
    /// Backends of both, by identity.
    known: HashMap<u64, BackendKey>,
    /// Packets a second that a slot of each backend stands for.
    rates: HashMap<BackendKey, f64>,
}

impl<'a> Tables<'a> {
    pub fn new(before: (&'a Config, &'a Desired), after: (&'a Config, &'a Desired), rates: &Rates) -> Self {
        let known = [before.0, after.0].into_iter().flat_map(|config| {
            keys(config).map(|(key, pool, backend)| {
                let of = &config.pools[pool];
                (identity_of(of, &of.backends[backend]), key)
            })
        });
        let known: HashMap<u64, BackendKey> = known.collect();
        let mut slots: HashMap<&BackendKey, f64> = HashMap::new();
        for target in before.1.tables.values().flat_map(|table| table.cur.iter()) {
            if let Target::Backend(identity) = target
                && let Some(key) = known.get(identity)
            {
                *slots.entry(key).or_default() += 1.0;
            }
        }
        let rates = slots.into_iter().filter_map(|(key, slots)| Some((key.clone(), rates.get(key)? / slots)));
        let rates = rates.collect();
        Self { before, after, known, rates }
    }

    /// Tables of services that both have, with those of which flows would go elsewhere.
    pub fn changes(&self) -> Vec<TableChange> {
        let mut users: BTreeMap<Pair, Users<'_>> = BTreeMap::new();
        for service in &self.after.0.services {
            let Some(was) = self.before.0.services.iter().find(|was| was.name == service.name) else {
                continue;
            };
            let anew = hashed(was) != hashed(service) || self.before.0.seed != self.after.0.seed;
            for &protocol in service.protocols.iter().filter(|protocol| was.protocols.contains(protocol)) {
                let old = table_identity(self.before.0.pool_of(was), protocol, was.scheduler);
                let new = table_identity(self.after.0.pool_of(service), protocol, service.scheduler);
                let name = format!("{} {protocol}", service.name);
                users.entry((old, new, anew)).or_default().push((service, name));
            }
        }
        let change = |((old, new, anew), users): (Pair, Users<'_>)| {
            let (old, new) = (self.before.1.tables.get(&old)?, self.after.1.tables.get(&new)?);
            let service = users.first()?.0;
            let (flows, packets) = match hashed(service) {
                _ if anew => self.spread_anew(old, new),
                None => self.by_turns(old, new),
                Some(_) => self.by_slots(old, new),
            };
            (flows > 0.0).then(|| TableChange {
                services: users.iter().map(|(_, name)| name.clone()).collect(),
                pool: self.after.0.pool_of(service).name.clone(),
                scheduler: service.scheduler.to_string(),
                flows,
                packets,
            })
        };
        users.into_iter().filter_map(change).collect()
    }

    /// Whom a slot leads to: a server is the same in every pool, however packets get there.
    fn server(&self, target: Target) -> Result<IpAddr, Target> {
        match target {
            Target::Backend(identity) => self.known.get(&identity).map(|key| key.address).ok_or(target),
            Target::Nobody | Target::Pass => Err(target),
        }
    }

    fn rate(&self, target: Target) -> f64 {
        match target {
            Target::Backend(identity) => {
                self.known.get(&identity).and_then(|key| self.rates.get(key)).copied().unwrap_or(0.0)
            }
            Target::Nobody | Target::Pass => 0.0,
        }
    }

    /// A flow keeps its slot; slots of the shorter table stand for several of the longer.
    fn by_slots(&self, old: &DesiredTable, new: &DesiredTable) -> (f64, Option<f64>) {
        let length = old.cur.len().max(new.cur.len());
        let at = |table: &DesiredTable, slot: usize| table.cur[slot * table.cur.len() / length];
        let (mut moved, mut packets, mut all) = (0u32, 0.0, 0.0);
        for slot in 0..length {
            let (from, to) = (at(old, slot), at(new, slot));
            let elsewhere = self.server(from) != self.server(to);
            let rate = self.rate(from);
            moved += u32::from(elsewhere);
            packets += if elsewhere { rate } else { 0.0 };
            all += rate;
        }
        (f64::from(moved) / length as f64, (all > 0.0).then(|| packets / all))
    }

    /// The part of each server in a table, and the packets that it stands for.
    fn parts(&self, table: &DesiredTable) -> HashMap<Result<IpAddr, Target>, (f64, f64)> {
        let mut parts: HashMap<_, (f64, f64)> = HashMap::new();
        for &target in table.cur.iter() {
            let (part, rate) = parts.entry(self.server(target)).or_default();
            *part += 1.0 / table.cur.len() as f64;
            *rate += self.rate(target);
        }
        parts
    }

    /// A flow gets a slot that has nothing to do with the one it had.
    fn spread_anew(&self, old: &DesiredTable, new: &DesiredTable) -> (f64, Option<f64>) {
        let (old, new) = (self.parts(old), self.parts(new));
        let stays = |server| new.get(server).map_or(0.0, |(part, _)| *part);
        let moved = old.iter().map(|(server, (part, _))| part * (1.0 - stays(server))).sum();
        let packets: f64 = old.iter().map(|(server, (_, rate))| rate * (1.0 - stays(server))).sum();
        let all: f64 = old.values().map(|(_, rate)| rate).sum();
        (moved, (all > 0.0).then(|| packets / all))
    }

    /// New flows come by turns: what backends have less of than before goes elsewhere.
    fn by_turns(&self, old: &DesiredTable, new: &DesiredTable) -> (f64, Option<f64>) {
        let (old, new) = (self.parts(old), self.parts(new));
        let (mut moved, mut packets, mut all) = (0.0, 0.0, 0.0);
        for (server, (part, rate)) in &old {
            let less = (part - new.get(server).map_or(0.0, |(part, _)| *part)).max(0.0);
            moved += less;
            packets += rate * less / part;
            all += rate;
        }
        // What is below is rounding.
        let moved = if moved < 1e-9 { 0.0 } else { moved };
        (moved, (all > 0.0).then(|| packets / all))
    }
}
