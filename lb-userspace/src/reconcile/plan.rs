//! The difference between what lies in the maps and what should, as an ordered list of writes.
//!
//! Additions come in the order in which packets read in reverse: egress, backends, slots, table
//! words, VIPs. Removals come last, after a grace, in the opposite order: what is cleared is what no
//! packet can reach any more. A next hop that is lost is a removal.

mod vips;

use std::collections::{BTreeMap, HashMap};

use lb_common::abi::{
    BACKEND_NOBODY, BACKEND_PASS, Backend, Discipline, Egress, MOST_BACKENDS, Path, SHORTEST_TABLE_LOG2,
    SLOTS_PER_ROW, TableState, TableWord,
};
use lb_common::slots::Slot;

use super::desired::{Desired, DesiredTable, Target};
use super::image::Image;
use super::op::MapOp;
use crate::capacity::{Capacity, RESERVED_SLOT_ROWS};

pub use vips::{VipEntry, VipMap, counter_rows, ports, present_vips};

/// Why a desired state cannot be planned. Nothing has been written then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error("{needed} VIPs are more than the limit of {limit}; raise limits.vips")]
    Vips { needed: usize, limit: u32 },
    #[error(
        "{needed} port rules (ranges, any-ports and ports of prefixes, with what VIPs inherit of them) are more than the {limit} that limits.vips makes room for; raise limits.vips"
    )]
    Rules { needed: usize, limit: u32 },
    #[error("the VIPs do not fit the buckets that limits.vips = {limit} made; raise limits.vips")]
    Buckets { limit: u32 },
    #[error(
        "{needed} tables (one for each pool, protocol and scheduler), with those they replace, are more than the limit of {limit}; raise limits.slots"
    )]
    Tables { needed: usize, limit: u32 },
    #[error("no room for a table of {slots} slots beside those in use; raise limits.slots")]
    Slots { slots: u32 },
    #[error("{needed} backends, with those just removed, are more than there are ids ({limit})")]
    Backends { needed: usize, limit: u32 },
    #[error("more than {limit} different ways out of the host (interface, MTU, source address)")]
    Egress { limit: u32 },
}

/// The writes that turn the image into what is desired; empty if it is that already.
pub fn plan(image: &Image, desired: &Desired, capacity: &Capacity) -> Result<Vec<MapOp>, PlanError> {
    let mut planner = Planner {
        image,
        desired,
        capacity,
        add: Vec::new(),
        lose: Vec::new(),
        remove: Vec::new(),
        moved: false,
    };
    let ids = planner.backends()?;
    let tables = planner.tables(&ids)?;
    planner.vips(&tables)?;
    let Planner { add: mut ops, lose, mut remove, moved, .. } = planner;
    remove.reverse();
    // A path goes once no packet that read the old slots is at work, and its way out once none that
    // read the path is. The place that a table left is free for the next plan: after a grace, too.
    if moved || !lose.is_empty() || !remove.is_empty() {
        ops.push(MapOp::Grace);
    }
    if !lose.is_empty() && !remove.is_empty() {
        ops.extend(lose);
        ops.push(MapOp::Grace);
        ops.extend(remove);
    } else {
        ops.extend(lose.into_iter().chain(remove));
    }
    Ok(ops)
}

struct Planner<'a> {
    image: &'a Image,
    desired: &'a Desired,
    capacity: &'a Capacity,
    add: Vec<MapOp>,
    /// Paths of backends that lost their next hop: slots leave them first.
    lose: Vec<MapOp>,
    /// In the order of the additions; reversed at the end.
    remove: Vec<MapOp>,
    /// Whether a table leaves its place.
    moved: bool,
}

impl Planner<'_> {
    /// Backend rows and the egress rows they name. Returns the id of each identity.
    fn backends(&mut self) -> Result<HashMap<u64, u16>, PlanError> {
        let egress_rows = self.egress_rows()?;
        let path_of = |next_hop: &Option<(_, Egress)>| {
            next_hop
                .as_ref()
                .map_or(Path::default(), |(mac, egress)| Path::new(*mac, egress_rows[&key(egress)]))
        };
        let mut ids: HashMap<u64, u16> = HashMap::new();
        let mut free = Vec::new();
        for id in 1..=MOST_BACKENDS.min(self.image.backends.len() as u32 - 2) as u16 {
            let row = &self.image.backends[usize::from(id)];
            let wanted = self.desired.backends.get(&row.identity).filter(|wanted| {
                let constant = Backend { path: 0, ..*row };
                constant == wanted.row && !ids.contains_key(&row.identity)
            });
            match wanted {
                Some(wanted) => {
                    ids.insert(row.identity, id);
                    let path = path_of(&wanted.next_hop);
                    if path.bits() != row.path {
                        let list = if path == Path::default() { &mut self.lose } else { &mut self.add };
                        list.push(MapOp::SetPath { id, path });
                    }
                }
                None if *row == Backend::default() => free.push(id),
                None => self.remove.push(MapOp::WriteBackend { id, backend: Backend::default() }),
            }
        }
        let mut free = free.into_iter();
        for (identity, wanted) in &self.desired.backends {
            if ids.contains_key(identity) {
                continue;
            }
            let limit = MOST_BACKENDS;
            let needed = self.desired.backends.len();
            let id = free.next().ok_or(PlanError::Backends { needed, limit })?;
            let backend = Backend { path: path_of(&wanted.next_hop).bits(), ..wanted.row };
            self.add.push(MapOp::ResetBackendTraffic { id });
            self.add.push(MapOp::WriteBackend { id, backend });
            ids.insert(*identity, id);
        }
        Ok(ids)
    }

    /// A row for every different way out.
    fn egress_rows(&mut self) -> Result<BTreeMap<EgressKey, u16>, PlanError> {
        let hops = self.desired.backends.values().filter_map(|backend| backend.next_hop.as_ref());
        let wanted: BTreeMap<EgressKey, Egress> = hops.map(|(_, egress)| (key(egress), *egress)).collect();
        let mut rows = BTreeMap::new();
        let mut free = Vec::new();
        for (row, egress) in self.image.egress.iter().enumerate().skip(1) {
            let row = row as u16;
            if *egress == Egress::default() {
                free.push(row);
            } else if wanted.contains_key(&key(egress)) && !rows.contains_key(&key(egress)) {
                rows.insert(key(egress), row);
            } else {
                self.remove.push(MapOp::WriteEgress { row, egress: Egress::default() });
            }
        }
        let mut free = free.into_iter();
        for (key, egress) in wanted {
            if let std::collections::btree_map::Entry::Vacant(entry) = rows.entry(key) {
                let row = free.next().ok_or(PlanError::Egress { limit: self.capacity.egress_rows })?;
                self.add.push(MapOp::WriteEgress { row, egress });
                entry.insert(row);
            }
        }
        Ok(rows)
    }

    /// Tables and their slots. Returns the number of each identity.
    fn tables(&mut self, ids: &HashMap<u64, u16>) -> Result<HashMap<u64, u16>, PlanError> {
        let image = self.image;
        let limit = self.capacity.tables;
        let needed = self.desired.tables.len();
        let mut regions = Regions::of(image);
        let mut tables = HashMap::new();
        let mut free = Vec::new();
        for (table, state) in image.table_states.iter().enumerate() {
            let table = table as u16;
            if self.desired.tables.contains_key(&state.identity) && !tables.contains_key(&state.identity) {
                tables.insert(state.identity, table);
            } else if state.identity == 0 && image.tables[usize::from(table)] == 0 {
                free.push(table);
            } else {
                self.remove.push(MapOp::WriteTableState { table, state: TableState::default() });
                self.remove.push(MapOp::SetTableWord { table, word: TableWord::default() });
            }
        }
        let mut free = free.into_iter();
        for (identity, wanted) in &self.desired.tables {
            let table = match tables.get(identity) {
                Some(table) => *table,
                None => {
                    let table = free.next().ok_or(PlanError::Tables { needed, limit })?;
                    let state = TableState { identity: *identity, ..TableState::default() };
                    self.add.push(MapOp::WriteTableState { table, state });
                    tables.insert(*identity, table);
                    table
                }
            };
            self.table(table, wanted, ids, &mut regions)?;
        }
        Ok(tables)
    }

    /// One table: the slots that differ, or a new place where its length changes.
    fn table(
        &mut self,
        table: u16,
        wanted: &DesiredTable,
        ids: &HashMap<u64, u16>,
        regions: &mut Regions,
    ) -> Result<(), PlanError> {
        let words = wanted.cur.iter().map(|target| {
            let id = match target {
                Target::Nobody => BACKEND_NOBODY,
                Target::Pass => BACKEND_PASS,
                Target::Backend(identity) => ids.get(identity).copied().unwrap_or(BACKEND_NOBODY),
            };
            Slot::clean(id).bits()
        });
        let word = TableWord::from_bits(self.image.tables[usize::from(table)]);
        if word != TableWord::default() && word.log2_length() == wanted.log2_length {
            let first = word.first_row() * SLOTS_PER_ROW;
            self.add.extend(differing_runs(self.image, first, words));
            return Ok(());
        }
        let length = 1 << wanted.log2_length;
        let first_row = regions.take(length / SLOTS_PER_ROW).ok_or(PlanError::Slots { slots: length })?;
        self.add.push(MapOp::WriteSlots { first: first_row * SLOTS_PER_ROW, words: words.collect() });
        self.add.push(MapOp::SetTableWord {
            table,
            word: TableWord::new(first_row, wanted.log2_length, Discipline::Hash),
        });
        self.moved |= word != TableWord::default();
        Ok(())
    }
}

type EgressKey = [u8; 48];

/// An egress row's content in an order.
fn key(egress: &Egress) -> EgressKey {
    let Egress { ifindex, mtu, source_mac, source4, source4_mask, source6, source6_mask, spare: _ } = *egress;
    let words = [
        u64::from(ifindex) | u64::from(mtu) << 32,
        source_mac,
        u64::from(source4) | u64::from(source4_mask) << 32,
        source6[0],
        source6[1],
        source6_mask,
    ];
    let mut key = [0; 48];
    key.chunks_mut(8).zip(words).for_each(|(chunk, word)| chunk.copy_from_slice(&word.to_ne_bytes()));
    key
}

/// Runs of slots whose words differ from the image's.
fn differing_runs(image: &Image, first: u32, words: impl Iterator<Item = u32>) -> Vec<MapOp> {
    let mut runs: Vec<(u32, Vec<u32>)> = Vec::new();
    for (index, word) in (first..).zip(words) {
        if image.slot(index).bits() == word {
            continue;
        }
        match runs.last_mut() {
            Some((start, run)) if *start + run.len() as u32 == index => run.push(word),
            _ => runs.push((index, vec![word])),
        }
    }
    runs.into_iter().map(|(first, words)| MapOp::WriteSlots { first, words }).collect()
}

/// Which stretches of the slot map no table takes.
struct Regions {
    /// By unit of the shortest table.
    taken: Vec<bool>,
}

const UNIT_ROWS: u32 = (1 << SHORTEST_TABLE_LOG2) / SLOTS_PER_ROW;

impl Regions {
    fn of(image: &Image) -> Self {
        let mut taken = vec![false; image.slots.len() / UNIT_ROWS as usize];
        taken[..(RESERVED_SLOT_ROWS / UNIT_ROWS) as usize].fill(true);
        for word in image.tables.iter().map(|&bits| TableWord::from_bits(bits)) {
            if word != TableWord::default() {
                let first = (word.first_row() / UNIT_ROWS) as usize;
                let units = (word.length() / SLOTS_PER_ROW / UNIT_ROWS) as usize;
                taken[first..first + units].fill(true);
            }
        }
        Self { taken }
    }

    /// The first row of a stretch of `rows` rows, now taken.
    fn take(&mut self, rows: u32) -> Option<u32> {
        let units = (rows / UNIT_ROWS) as usize;
        let first = (0..(self.taken.len() + 1).saturating_sub(units))
            .find(|&first| !self.taken[first..first + units].contains(&true))?;
        self.taken[first..first + units].fill(true);
        Some(first as u32 * UNIT_ROWS)
    }
}
