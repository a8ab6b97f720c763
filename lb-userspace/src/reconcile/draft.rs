//! What should lie in the kernel, as far as it follows from the configuration alone, worked out once; what the world makes
//! of it is worked out anew where the world has changed. The same as `desired` all at once, and no other.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lb_common::abi::{Backend, Discipline};
use lb_common::wire::Mac;

use super::backends::Backends;
use super::desired::{
    BackendRef, Desired, DesiredBackend, DesiredSources, DesiredTable, OldFlows, Target, World, backend_row,
    egress, identity_of, pool_set, protocol_number, table_identity,
};
use rustc_hash::FxHashMap;

use super::entries::{DesiredVip, VipKey, entries};
use super::servers::{ServerName, servers};
use super::targets::Targets;
use crate::config::model::{Config, OnEmpty, Pool, Protocol, Scheduler};
use crate::nexthop::NextHop;
use crate::policy::response;
use crate::tables::maglev::{self, Member};
use crate::tables::overlay;
use crate::tables::sequence::{self, Turns};

/// A configuration, as far as it decides what lies in the kernel. Every call must be given the same one.
#[derive(Debug)]
pub struct Draft {
    /// In the order of identities, each once.
    backends: Vec<Fixed>,
    /// What was made of them last.
    made: Option<Made>,
    /// By place in the configuration.
    pools: Vec<Arc<Members>>,
    tables: Vec<TableDraft>,
    vips: Arc<BTreeMap<VipKey, DesiredVip>>,
    servers: Arc<BTreeMap<ServerName, u64>>,
    sources: DesiredSources,
}

/// A backend, but for what the world says of it.
#[derive(Debug)]
struct Fixed {
    at: BackendRef,
    address: IpAddr,
    wanted: DesiredBackend,
}

/// Backends as they were asked for last, and what the world said of them.
#[derive(Debug)]
struct Made {
    next_hops: Arc<FxHashMap<IpAddr, NextHop>>,
    /// In the order of identities, by their place in the configuration.
    said: Vec<(BackendRef, Said)>,
    backends: Backends,
}

/// What the world says of a backend, but for its next hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Said {
    up: Option<bool>,
    old_flows: OldFlows,
}

/// The backends of a pool, as tables see them, and tables of them when all are well.
#[derive(Debug)]
struct Members {
    members: Vec<Member>,
    identities: Vec<u64>,
    /// What slots lead to, by what they do where nobody takes them: nothing, or to the stack. The last of them is that.
    known: [OnceLock<Arc<[Target]>>; 2],
    /// The table when all are well, by the logarithm of its length, once somebody has asked.
    bases: [OnceLock<Targets>; 32],
}

impl Members {
    fn of(config: &Config, pool: &Pool) -> Self {
        let member = |backend: &crate::config::model::Backend| {
            Member::new(config.seed, backend.address, backend.weight)
        };
        Self {
            members: pool.backends.iter().map(member).collect(),
            identities: pool.backends.iter().map(|backend| identity_of(pool, backend)).collect(),
            known: [const { OnceLock::new() }; 2],
            bases: [const { OnceLock::new() }; 32],
        }
    }

    fn known(&self, nobody: Target) -> &Arc<[Target]> {
        self.known[usize::from(nobody == Target::Pass)].get_or_init(|| {
            let known = self.identities.iter().map(|&identity| Target::Backend(identity));
            known.chain([nobody]).collect()
        })
    }

    fn base(&self, log2_length: u32, nobody: Target) -> Targets {
        let known = self.known(nobody);
        let base = self.bases[log2_length as usize]
            .get_or_init(|| Targets::new(Arc::clone(known), maglev::build(log2_length, &self.members)));
        base.renamed(known)
    }
}

impl PartialEq for Members {
    fn eq(&self, other: &Self) -> bool {
        self.members == other.members && self.identities == other.identities
    }
}

/// A table, but for what the world makes of it.
#[derive(Debug)]
struct TableDraft {
    identity: u64,
    plot: Plot,
    /// The last that was asked for, and what it was made of.
    last: Option<(Asked, Arc<DesiredTable>)>,
}

/// What the configuration says of a table.
#[derive(Debug, PartialEq)]
struct Plot {
    own: usize,
    scheduler: Scheduler,
    log2_length: u32,
    /// Its own pool, then its fallbacks.
    pools: Vec<usize>,
    members: Vec<Arc<Members>>,
    pool_set: [u64; 3],
    nobody: Target,
    idle: Duration,
    protocol: u8,
}

/// What the world says of a table.
#[derive(Debug, Clone, PartialEq)]
struct Asked {
    /// Which of its pools is in use.
    level: usize,
    /// What each backend of that takes of its share.
    shares: Vec<u16>,
    /// Weights of those that take turns.
    turns: Vec<u32>,
}

impl Draft {
    pub fn of(config: &Config) -> Self {
        Self::after(config, None)
    }

    /// Of a configuration that takes the place of another: what has not changed is not made again.
    pub fn after(config: &Config, before: Option<&Self>) -> Self {
        let known: HashMap<&[u64], &Arc<Members>> = before
            .iter()
            .flat_map(|before| &before.pools)
            .map(|members| (members.identities.as_slice(), members))
            .collect();
        let members = |pool: &Pool| {
            let members = Members::of(config, pool);
            match known.get(members.identities.as_slice()) {
                Some(known) if ***known == members => Arc::clone(known),
                _ => Arc::new(members),
            }
        };
        let pools: Vec<_> = config.pools.iter().map(members).collect();
        let both = config.pools.iter().zip(&pools).enumerate();
        let mut backends: Vec<Fixed> =
            both.flat_map(|(index, (pool, members))| fixed(index, pool, members)).collect();
        // Stable: of two alike, the last counts.
        backends.sort_by_key(|fixed| fixed.wanted.row.identity);
        backends.reverse();
        backends.dedup_by_key(|fixed| fixed.wanted.row.identity);
        backends.reverse();
        let mut tables = tables(config, &pools);
        let mut last: HashMap<u64, &TableDraft> =
            before.iter().flat_map(|before| &before.tables).map(|table| (table.identity, table)).collect();
        for table in &mut tables {
            let same = last.remove(&table.identity).filter(|before| before.plot == table.plot);
            table.last = same.and_then(|before| before.last.clone());
        }
        Self {
            backends,
            made: None,
            pools,
            tables,
            vips: Arc::new(entries(config)),
            servers: Arc::new(servers(config)),
            sources: DesiredSources::of(config),
        }
    }

    /// The maps as they should be.
    pub fn desired(&mut self, config: &Config, world: &World) -> Desired {
        let backends = self.backends(config, world);
        let table = |table: &mut TableDraft| (table.identity, table.made(config, world));
        Desired { backends, tables: self.tables.iter_mut().map(table).collect(), ..self.constant(config) }
    }

    /// The same for a world in which nobody is up, as far as room goes by it. What was made last is not forgotten.
    pub fn least(&self, config: &Config) -> Desired {
        let world = World::default();
        let backend = |fixed: &Fixed| {
            (fixed.wanted.row.identity, fixed.wanted(config, &world, Said::of(&fixed.at, &world)))
        };
        let table = |table: &TableDraft| {
            (table.identity, Arc::new(table.plot.table(&table.plot.asked(config, &world))))
        };
        let tables = self.tables.iter().map(table).collect();
        Desired { backends: self.backends.iter().map(backend).collect(), tables, ..self.constant(config) }
    }

    /// What the world does not change.
    fn constant(&self, config: &Config) -> Desired {
        Desired {
            vips: Arc::clone(&self.vips),
            servers: Arc::clone(&self.servers),
            sources: self.sources.clone(),
            timeouts: config.timeouts,
            ..Desired::default()
        }
    }

    /// Backends, of which those are made again that the world says something else of than the last time.
    fn backends(&mut self, config: &Config, world: &World) -> Backends {
        let made = match self.made.take() {
            Some(mut made) if Arc::ptr_eq(&made.next_hops, &world.next_hops) => {
                for (place, (at, before)) in made.said.iter_mut().enumerate() {
                    let said = Said::of(at, world);
                    if said != *before {
                        made.backends.set(place, self.backends[place].wanted(config, world, said));
                        *before = said;
                    }
                }
                made
            }
            _ => {
                let said = |fixed: &Fixed| (fixed.at, Said::of(&fixed.at, world));
                let said: Vec<_> = self.backends.iter().map(said).collect();
                let both = self.backends.iter().zip(&said);
                let wanted = |(fixed, (_, said)): (&Fixed, &(BackendRef, Said))| {
                    (fixed.wanted.row.identity, fixed.wanted(config, world, *said))
                };
                let backends = both.map(wanted).collect();
                Made { next_hops: Arc::clone(&world.next_hops), said, backends }
            }
        };
        self.made.insert(made).backends.clone()
    }
}

impl Said {
    fn of(at: &BackendRef, world: &World) -> Self {
        Self {
            up: world.up.get(at).copied(),
            old_flows: world.old_flows.get(at).copied().unwrap_or_default(),
        }
    }
}

impl Fixed {
    fn wanted(&self, config: &Config, world: &World, Said { up, old_flows }: Said) -> DesiredBackend {
        let mut wanted = self.wanted.clone();
        // Another pool may reach the same address in a way that this one cannot use.
        let hop = up.and_then(|_| world.next_hops.get(&self.address));
        wanted.next_hop = hop.map(|hop| (Mac::from_bytes(hop.mac), egress(hop, &config.outer_source)));
        wanted.old_flows = old_flows;
        if up == Some(true) && old_flows == OldFlows::Stay {
            wanted.row.flags |= Backend::ACCEPTING;
        }
        wanted
    }
}

fn fixed<'p>(index: usize, pool: &'p Pool, members: &'p Members) -> impl Iterator<Item = Fixed> + 'p {
    let set = pool_set([pool.name.as_str()]);
    let backends = pool.backends.iter().zip(&members.identities).enumerate();
    backends.map(move |(place, (backend, &identity))| {
        let row = backend_row(pool.forward_to(backend), backend.address, identity);
        let wanted = DesiredBackend {
            row,
            next_hop: None,
            pool: set,
            old_flows: OldFlows::Stay,
            weight: backend.weight,
        };
        Fixed { at: (index, place), address: backend.address, wanted }
    })
}

/// One for each pool, protocol and scheduler that services use.
fn tables(config: &Config, pools: &[Arc<Members>]) -> Vec<TableDraft> {
    let mut tables = BTreeMap::new();
    for service in &config.services {
        let pool = config.pool_of(service);
        for &protocol in &service.protocols {
            let identity = table_identity(pool, protocol, service.scheduler);
            tables.entry(identity).or_insert_with(|| TableDraft {
                identity,
                plot: Plot::of(config, pools, service.pool, protocol, service.scheduler),
                last: None,
            });
        }
    }
    tables.into_values().collect()
}

impl Plot {
    fn of(
        config: &Config,
        members: &[Arc<Members>],
        own: usize,
        protocol: Protocol,
        scheduler: Scheduler,
    ) -> Self {
        let pools: Vec<usize> = config.levels_of(own).collect();
        // By those of the file, so that balancers agree whatever is still leaving. A fallback changes no lengths.
        let named =
            |pool: usize| config.pools[pool].backends.iter().filter(|backend| !backend.leaving).count();
        let longest = pools.iter().map(|&pool| named(pool)).max().unwrap_or(0);
        Self {
            own,
            scheduler,
            log2_length: maglev::log2_length(longest),
            members: pools.iter().map(|&pool| Arc::clone(&members[pool])).collect(),
            pool_set: pool_set(pools.iter().map(|&pool| config.pools[pool].name.as_str())),
            pools,
            nobody: match config.pools[own].on_empty {
                OnEmpty::Drop | OnEmpty::All => Target::Nobody,
                OnEmpty::Pass => Target::Pass,
            },
            idle: config.pools[own].flows.idle_timeout.of(protocol),
            protocol: protocol_number(protocol),
        }
    }

    /// The table, with the backends of the pool in use: a Maglev table over what is configured, with what takes flows
    /// laid over it; or turns by weight, with such a table below.
    fn table(&self, asked: &Asked) -> DesiredTable {
        let members = &self.members[asked.level];
        let known = members.known(self.nobody);
        let length = 1usize << self.log2_length;
        let nowhere = || Targets::new(Arc::clone(known), vec![known.len() as u16 - 1; length]);
        let takes = |(member, &share): (&Member, &u16)| member.weight > 0 && share > 0;
        let by_hash = if members.members.iter().zip(&asked.shares).any(takes) {
            let base = members.base(self.log2_length, self.nobody);
            let moved = overlay::moved(&base.places(), base.counts(), &members.members, &asked.shares);
            moved.map_or_else(nowhere, |moved| base.with_moved(moved))
        } else {
            nowhere()
        };
        let discipline = discipline(self.scheduler);
        let (cur, est) = if discipline == Discipline::Hash {
            (by_hash, None)
        } else {
            let turn = |(member, &weight): (&Member, &u32)| Turns { key: member.key, weight };
            let turns: Vec<_> = members.members.iter().zip(&asked.turns).map(turn).collect();
            let turns = sequence::build(length, &turns);
            let turns = if turns.is_empty() { nowhere() } else { Targets::new(Arc::clone(known), turns) };
            (turns, Some(by_hash))
        };
        DesiredTable {
            log2_length: self.log2_length,
            cur,
            est,
            discipline,
            pools: self.pools.clone(),
            pool_set: self.pool_set,
            idle: self.idle,
            protocol: self.protocol,
        }
    }

    fn asked(&self, config: &Config, world: &World) -> Asked {
        let in_use = world.levels.get(&self.own).copied().unwrap_or(self.own);
        // A pool that is no fallback is in use nowhere.
        let level = self.pools.iter().position(|pool| *pool == in_use).unwrap_or_default();
        let pool = self.pools[level];
        let shares = shares(config, world, self.own, pool);
        let turns = if discipline(self.scheduler) == Discipline::Hash {
            Vec::new()
        } else {
            let members = self.members[level].members.iter().zip(&shares).enumerate();
            let turn = |(index, (member, &share)): (usize, (&Member, &u16))| {
                let weight = turn_weight(self.scheduler, member.weight, || {
                    world.response_weights.get(&(pool, index)).copied().unwrap_or(response::MOST)
                });
                weight * u32::from(share)
            };
            members.map(turn).collect()
        };
        Asked { level, shares, turns }
    }
}

impl TableDraft {
    fn made(&mut self, config: &Config, world: &World) -> Arc<DesiredTable> {
        let asked = self.plot.asked(config, world);
        match &self.last {
            Some((last, table)) if *last == asked => Arc::clone(table),
            _ => {
                let table = Arc::new(self.plot.table(&asked));
                self.last = Some((asked, Arc::clone(&table)));
                table
            }
        }
    }
}

/// What each backend of the pool in use takes of its share.
fn shares(config: &Config, world: &World, own: usize, level: usize) -> Vec<u16> {
    let backends = &config.pools[level].backends;
    let healthy = |backend| world.up.get(&(level, backend)) == Some(&true);
    // Where health is not believed, packets still need a way.
    let reachable = |backend| world.up.contains_key(&(level, backend));
    let shares_of = |takes: &dyn Fn(usize) -> bool| -> Vec<u16> {
        let share = |backend| world.shares.get(&(level, backend)).copied().unwrap_or(overlay::FULL);
        (0..backends.len()).map(|backend| if takes(backend) { share(backend) } else { 0 }).collect()
    };
    let anyone =
        |shares: &[u16]| shares.iter().zip(backends).any(|(&share, backend)| share > 0 && backend.weight > 0);
    let panic = world.panic.contains(&own);
    let shares = if panic { shares_of(&reachable) } else { shares_of(&healthy) };
    if anyone(&shares) || !(panic || config.pools[own].on_empty == OnEmpty::All) {
        return shares;
    }
    shares_of(&|_| true)
}

const fn discipline(scheduler: Scheduler) -> Discipline {
    match scheduler {
        Scheduler::Maglev | Scheduler::SourceHash => Discipline::Hash,
        Scheduler::RoundRobin | Scheduler::WeightedRoundRobin | Scheduler::LeastResponseTime => {
            Discipline::RoundRobin
        }
        Scheduler::Random => Discipline::Random,
        Scheduler::LeastConnections => Discipline::Least,
    }
}

/// A backend's weight among those that take turns.
fn turn_weight(scheduler: Scheduler, weight: u8, by_response: impl Fn() -> u8) -> u32 {
    match scheduler {
        Scheduler::RoundRobin => u32::from(weight.min(1)),
        Scheduler::LeastResponseTime => u32::from(weight) * u32::from(by_response()),
        Scheduler::Maglev
        | Scheduler::SourceHash
        | Scheduler::WeightedRoundRobin
        | Scheduler::Random
        | Scheduler::LeastConnections => u32::from(weight),
    }
}
