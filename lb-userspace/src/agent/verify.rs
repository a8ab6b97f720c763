//! Whether the kernel has what the configuration and the world ask for, told in an operator's words. Changes nothing.
//!
//! The plan that would bring the tables in line is carried out on a copy of them; what then differs is the answer.

mod servers;
mod vips;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use lb_common::abi::{BACKEND_PASS, Backend, Features, Path as NextPath, SLOTS_PER_ROW, Source, TableWord};
use serde::{Deserialize, Serialize};

use super::adopt;
use super::commands::Held;
use super::core::keys;
use super::overrides::Store;
use super::steering::Steering;
use crate::bpf::{Attached, BpfFs, Datapath, Links, Maps, MapsError};
use crate::capacity::Capacity;
use crate::config;
use crate::config::model::Config;
use crate::health::Fsm;
use crate::lookup;
use crate::nexthop::Resolver;
use crate::reconcile::desired::{
    OldFlows, WAYS, World, desired, features, identity_of, table_identity, ways_to,
};
use crate::reconcile::image::Image;
use crate::reconcile::plan::sources::address_of;
use crate::reconcile::plan::{Leave, Unpinned, plan};

/// One thing that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    pub what: String,
    pub intended: String,
    pub found: String,
}

impl Difference {
    fn new(what: impl Into<String>, intended: impl Into<String>, found: impl Into<String>) -> Self {
        Self { what: what.into(), intended: intended.into(), found: found.into() }
    }
}

/// The kernel and an agent at one moment, to be compared at leisure.
#[derive(Debug)]
pub struct Verification {
    pub config: Arc<Config>,
    pub world: World,
    pub capacity: Capacity,
    pub image: Image,
    /// Outside of the tables.
    pub seen: Vec<Difference>,
}

impl Verification {
    pub fn differences(self) -> Vec<Difference> {
        let tables = tables(&self.config, &self.world, &self.image, &self.capacity);
        self.seen.into_iter().chain(tables).collect()
    }
}

const NONE: &str = "none";

/// The tables of an agent that is gone, against a file. Health and next hops are what the tables say; so is the
/// program's place on the interfaces.
pub async fn from_pins(run_dir: &Path, config_path: &Path) -> anyhow::Result<Vec<Difference>> {
    let file = config::load(config_path)?.config;
    let fs =
        BpfFs::existing(run_dir)?.with_context(|| format!("nothing is pinned in {}", run_dir.display()))?;
    let image = match Maps::from_pins(&fs) {
        Ok(maps) => maps.image()?,
        // The next agent could not adopt the others either.
        Err(MapsError::Partial { name }) => {
            return Ok(vec![Difference::new(format!("pin of the map {name}"), "pinned", NONE)]);
        }
        Err(error) => return Err(error.into()),
    };
    // What cannot be read, the next agent puts aside.
    let recovered = Store::new(run_dir).read().unwrap_or_default();
    let Held { overrides, config } = Held::recovered(&recovered, &file).0.only_with_rows(&image, &file);
    let health = adopt::health(&config, &image);
    let hops = adopt::next_hops(&config, &image, |_| None);
    let mut world = World::default();
    for (key, pool, backend) in keys(&config) {
        if let Some(exit) = overrides.exit(&key) {
            world.shares.insert((pool, backend), 0);
            if exit.is_over() {
                world.old_flows.insert((pool, backend), OldFlows::Move);
            }
        }
        if let Some(Ok(hop)) = hops.get(&key.address) {
            world.up.insert((pool, backend), health.get(&key).is_some_and(Fsm::is_up));
            Arc::make_mut(&mut world.next_hops).insert(key.address, hop.clone());
        }
    }
    Steering::new(&config, &adopt::levels(&config, &image)).steer(&config, &mut world);
    let mut differences = tables(&config, &world, &image, &Capacity::new(&config.limits));
    let resolver = Resolver::new().context("netlink is not to be had")?;
    differences.extend(interfaces(&config, &mut Links::new(fs), &resolver).await?);
    Ok(differences)
}

/// Interfaces of the configuration that do not carry the program that their link has.
pub async fn interfaces(
    config: &Config,
    links: &mut Links,
    resolver: &Resolver,
) -> anyhow::Result<Vec<Difference>> {
    let mut differences = Vec::new();
    for interface in &config.interfaces {
        let found = match links.place(&interface.name)? {
            None => match resolver.link(&interface.name).await {
                Ok(_) => "no link is pinned".to_owned(),
                Err(error) => error.to_string(),
            },
            Some((0, _)) => "its link is of a device that is gone".to_owned(),
            Some((ifindex, program)) => match resolver.link_of_index(ifindex).await {
                Ok(link) if link.xdp_program == Some(program) => continue,
                Ok(link) => format!("{} does not carry the program of its link", link.name),
                Err(error) => error.to_string(),
            },
        };
        let what = format!("interface {}", interface.name);
        differences.push(Difference::new(what, "carries the program", found));
    }
    Ok(differences)
}

/// Pins that an agent made and that are gone: the next agent would not find what they held.
pub fn missing_pins(datapath: &Datapath, attached: &[Attached]) -> Vec<Difference> {
    let maps = Maps::PINNED.iter().map(|name| (format!("pin of the map {name}"), datapath.pin_of(name)));
    let links = attached.iter().map(|attached| {
        (format!("pin of the link on {}", attached.interface), datapath.fs().link(&attached.name))
    });
    let gone = maps.chain(links).filter(|(_, path)| !path.exists());
    gone.map(|(what, path)| Difference::new(what, path.display().to_string(), NONE)).collect()
}

/// What lies in the tables, against what should.
pub fn tables(config: &Config, world: &World, image: &Image, capacity: &Capacity) -> Vec<Difference> {
    if !fits(image, capacity) {
        let found = "maps of other sizes; the rest cannot be compared";
        return vec![Difference::new("limits", "maps for the file's `limits`", found)];
    }
    let mut differences = constants(config, image);
    // What rests is not out of place.
    let leave = Leave { unpinned: Unpinned::Ids(HashSet::new()), ..Leave::all() };
    let ops = match plan(image, &desired(config, world), capacity, &leave) {
        Ok(plan) => plan.ops,
        Err(error) => {
            differences.push(Difference::new("tables", "what the file asks for", error.to_string()));
            return differences;
        }
    };
    let mut intended = image.clone();
    ops.iter().for_each(|op| intended.apply(op));
    let names = Names::of(config);
    let before = differences.len();
    backends(&intended, image, &names, &mut differences);
    slots(&intended, image, &names, &mut differences);
    servers::compare(&intended, image, &names, &mut differences);
    vips::compare(&intended, image, &names, config, &mut differences);
    sources(&intended, image, &mut differences);
    if !ops.is_empty() && differences.len() == before {
        let found = format!("{} rows that lead no packet astray", ops.len());
        differences.push(Difference::new("rows that nothing names", NONE, found));
    }
    differences
}

/// Addresses that clients' are translated to.
fn sources(intended: &Image, found: &Image, differences: &mut Vec<Difference>) {
    let told = |rows: &[Source], row: u32| {
        let addresses = [true, false].map(|ipv4| address_of(rows, row, ipv4));
        let addresses: Vec<String> = addresses.into_iter().flatten().map(|a| a.to_string()).collect();
        if addresses.is_empty() { NONE.to_owned() } else { addresses.join(", ") }
    };
    for row in 0..intended.sources.len() as u32 {
        let (to, from) = (told(&intended.sources, row), told(&found.sources, row));
        if to != from {
            differences.push(Difference::new(format!("source {row} of fullnat"), to, from));
        }
    }
}

fn fits(image: &Image, capacity: &Capacity) -> bool {
    image.slots.len() == capacity.slot_rows as usize
        && image.tables.len() == capacity.tables as usize
        && image.port_rules.len() == capacity.rule_rows() as usize
        && image.vips4.len() == capacity.vip4_rows() as usize
        && image.vips6.len() == capacity.vip6_rows() as usize
        && image.backends.len() == capacity.backend_rows as usize
        && image.egress.len() == capacity.way_rows() as usize
        && image.connections.len() == capacity.connections() as usize
}

fn constants(config: &Config, image: &Image) -> Vec<Difference> {
    let mut differences = Vec::new();
    if image.meta.seed != config.seed {
        // The seed is a secret.
        differences.push(Difference::new("seed", "that of the file", "another"));
    }
    if image.meta.icmp_rate != u64::from(config.icmp.rate) {
        differences.push(Difference::new(
            "icmp.rate",
            config.icmp.rate.to_string(),
            image.meta.icmp_rate.to_string(),
        ));
    }
    let (wanted, found) = (features(config), Features::from_bits(image.meta.features));
    let wanted = wanted.with(ways_to(&image.backends));
    // The last reload kept those that backends needed which are gone by now.
    let mut spare = WAYS.iter().filter(|way| found.has(**way)).fold(wanted, |all, way| all.with(*way));
    if found.has(Features::FULLNAT) {
        // Answers of those came in either family.
        let families = [Features::IPV4, Features::IPV6].into_iter().filter(|family| found.has(*family));
        spare = families.fold(spare, Features::with);
    }
    if spare != found {
        let words = |features: Features| {
            let on = Features::ALL.iter().filter(|(feature, _)| features.has(*feature));
            on.map(|(_, name)| *name).collect::<Vec<_>>().join(" ")
        };
        differences.push(Difference::new("features of the program", words(wanted), words(found)));
    }
    differences
}

/// What identities are called.
struct Names {
    backends: HashMap<u64, String>,
    tables: HashMap<u64, String>,
}

impl Names {
    fn of(config: &Config) -> Self {
        let backends = config.pools.iter().flat_map(|pool| {
            pool.backends.iter().map(|backend| {
                let identity = identity_of(pool, backend);
                (identity, format!("{}/{}", pool.name, backend.name))
            })
        });
        let tables = config.services.iter().flat_map(|service| {
            let pool = config.pool_of(service);
            service.protocols.iter().map(|&protocol| {
                let identity = table_identity(pool, protocol, service.scheduler);
                (identity, format!("table of pool {}, {protocol}", pool.name))
            })
        });
        Self { backends: backends.collect(), tables: tables.collect() }
    }

    fn backend(&self, identity: u64, row: Option<&Backend>) -> String {
        let unnamed = || match row.and_then(lookup::address) {
            Some(address) => format!("{address} (in no pool)"),
            None => "(unknown)".to_owned(),
        };
        self.backends.get(&identity).cloned().unwrap_or_else(unnamed)
    }

    fn table(&self, identity: u64) -> String {
        self.tables.get(&identity).cloned().unwrap_or_else(|| "table that no service uses".to_owned())
    }
}

fn rows(image: &Image) -> BTreeMap<u64, &Backend> {
    image.backends.iter().filter(|row| row.identity != 0).map(|row| (row.identity, row)).collect()
}

fn backends(intended: &Image, found: &Image, names: &Names, differences: &mut Vec<Difference>) {
    let (wanted, present) = (rows(intended), rows(found));
    let all: BTreeSet<u64> = wanted.keys().chain(present.keys()).copied().collect();
    for identity in all {
        let (wanted, present) = (wanted.get(&identity), present.get(&identity));
        let way = |row: Option<&&Backend>, image: &Image| row.map(|row| way(row, image));
        let (to, from) = (way(wanted, intended), way(present, found));
        if to == from {
            continue;
        }
        let name = names.backend(identity, wanted.or(present).copied());
        let words = |way: Option<Way>| way.map_or(NONE.to_owned(), |way| way.words());
        differences.push(Difference::new(format!("backend {name}"), words(to), words(from)));
    }
}

/// How a packet gets to a backend.
#[derive(PartialEq)]
struct Way {
    row: Backend,
    next: Option<(NextPath, lb_common::abi::Egress)>,
}

fn way(row: &Backend, image: &Image) -> Way {
    let path = NextPath::from_bits(row.path);
    let egress = image.egress.get(usize::from(path.egress())).filter(|_| path.egress() != 0);
    // The number of the egress row says nothing.
    let next = egress.map(|egress| (NextPath::new(path.mac(), 0), *egress));
    Way { row: Backend { path: 0, ..*row }, next }
}

impl Way {
    fn words(&self) -> String {
        let address = lookup::address(&self.row).map_or_else(String::new, |address| address.to_string());
        match &self.next {
            None => format!("{address}, no next hop"),
            Some((path, egress)) => {
                format!("{address} by {} on interface {}, MTU {}", path.mac(), egress.ifindex, egress.mtu)
            }
        }
    }
}

/// Slots of each table, by whom they lead to, in the order of the slots.
fn tables_of(image: &Image) -> BTreeMap<u64, Vec<Option<u64>>> {
    let identity = |id: u16| match id {
        BACKEND_PASS => None,
        id => image.backends.get(usize::from(id)).map(|row| row.identity),
    };
    let words = image.tables.iter().map(|&bits| TableWord::from_bits(bits)).zip(&image.table_states);
    let live = words.filter(|(word, _)| *word != TableWord::default());
    live.map(|(word, state)| {
        let first = word.first_row() * SLOTS_PER_ROW;
        let slots = (first..first + word.length()).map(|index| identity(image.slot(index).cur()));
        (state.identity, slots.collect())
    })
    .collect()
}

fn slots(intended: &Image, found: &Image, names: &Names, differences: &mut Vec<Difference>) {
    let rows = rows(found);
    let (wanted, present) = (tables_of(intended), tables_of(found));
    let all: BTreeSet<u64> = wanted.keys().chain(present.keys()).copied().collect();
    for table in all {
        let name = names.table(table);
        let (to, from) = (wanted.get(&table), present.get(&table));
        let length =
            |slots: Option<&Vec<_>>| slots.map_or(NONE.to_owned(), |slots| format!("{} slots", slots.len()));
        match (to, from) {
            (Some(to), Some(from)) if to.len() == from.len() => {
                let target = |target: &Option<u64>| match target {
                    None => "the host itself".to_owned(),
                    Some(0) => "nobody".to_owned(),
                    Some(identity) => names.backend(*identity, rows.get(identity).copied()),
                };
                let mut moved: BTreeMap<(String, String), u32> = BTreeMap::new();
                for (to, from) in to.iter().zip(from).filter(|(to, from)| to != from) {
                    *moved.entry((target(to), target(from))).or_default() += 1;
                }
                for ((to, from), count) in moved {
                    differences.push(Difference::new(format!("{name}: {count} slots"), to, from));
                }
            }
            (to, from) => differences.push(Difference::new(name, length(to), length(from))),
        }
    }
}
