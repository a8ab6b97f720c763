//! The difference between what lies in the maps and what should, as an ordered list of writes.
//!
//! Additions come in the order in which packets read in reverse: egress, backends, slots, table
//! words, VIPs. Removals come last, after a grace, in the opposite order: what is cleared is what no
//! packet can reach any more. A next hop that is lost is a removal.

mod carry;
mod places;
mod servers;
pub mod sources;
mod vips;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use lb_common::abi::{
    BACKEND_NOBODY, BACKEND_PASS, Backend, BackendKind, Egress, MOST_BACKENDS, Path, SHORTEST_TABLE_LOG2,
    SLOTS_PER_ROW, TableWord,
};
use lb_common::slots::Slot;

use super::desired::{Desired, DesiredBackend, DesiredTable, OldFlows, Target, meet};
use super::image::Image;
use super::moves::runs;
use super::op::MapOp;
use crate::capacity::{Capacity, RESERVED_SLOT_ROWS};

pub use carry::{carried, image_of};
use places::Places;
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
    #[error(
        "{needed} server IDs of QUIC (one for each backend of each table) are more than the {limit} that fit; use fewer tables"
    )]
    Servers { needed: usize, limit: u32 },
    #[error("more than {limit} different ways out of the host (interface, MTU, source address)")]
    Egress { limit: u32 },
}

/// What a plan may count on beside the tables.
#[derive(Debug, Clone)]
pub struct Leave {
    /// Backend ids that no pin names: a whole sweep since no slot did found none.
    pub unpinned: Unpinned,
    /// Slots that may be made dirty for no other reason than a better spread. What must move moves anyway.
    pub moves: usize,
}

#[derive(Debug, Clone)]
pub enum Unpinned {
    /// There are no pins at all, as in maps that nobody used.
    All,
    Ids(HashSet<u16>),
}

impl Leave {
    /// Nothing holds anything back: for maps that carry no traffic.
    pub fn all() -> Self {
        Self { unpinned: Unpinned::All, moves: usize::MAX }
    }
}

/// An ordered list of writes, and whether something was left for later.
#[derive(Debug, Default)]
pub struct Plan {
    pub ops: Vec<MapOp>,
    /// Slots that wait until others have moved.
    pub waiting: usize,
    /// Slots that move for a better spread, of those that may.
    pub moves: usize,
    /// Whether another plan must follow at once: what it changes has to be live first.
    pub again: bool,
    /// By the id of a backend that is down: slots that its old flows leave for want of room for pins.
    pub yielded: BTreeMap<u16, usize>,
}

/// The writes that turn the image into what is desired; none if it is that already, or on its way.
pub fn plan(image: &Image, desired: &Desired, capacity: &Capacity, leave: &Leave) -> Result<Plan, PlanError> {
    let mut planner = Planner {
        image,
        desired,
        capacity,
        leave,
        moves_left: leave.moves,
        waiting: 0,
        named: HashSet::from([BACKEND_NOBODY, BACKEND_PASS]),
        add: Vec::new(),
        turn: Vec::new(),
        emptied: HashSet::new(),
        left: BTreeSet::new(),
        lose: Vec::new(),
        remove: Vec::new(),
        moved: false,
        copied: HashMap::new(),
        again: false,
        yielded: BTreeMap::new(),
    };
    let ids = planner.backends()?;
    let present = present_vips(image);
    let places = planner.tables(&ids, &present)?;
    for &id in planner.left.iter().filter(|id| planner.emptied.contains(id)) {
        planner.turn.extend([MapOp::DropPins { id }, MapOp::Grace]);
    }
    let gone = planner.servers(&ids, &places)?;
    planner.vips(&present, &places)?;
    planner.leaving(&ids);
    planner.add.extend(gone);
    let (waiting, moves) = (planner.waiting, leave.moves - planner.moves_left);
    let Planner { add: mut ops, turn, lose, mut remove, moved, again, yielded, .. } = planner;
    remove.reverse();
    // A path goes once no packet that read the old slots is at work, and its way out once none that
    // read the path is. The place that a table left is free for the next plan: after a grace, too.
    let mut groups = vec![turn, lose, remove];
    groups.retain(|group| !group.is_empty());
    if moved && groups.is_empty() {
        ops.push(MapOp::Grace);
    }
    for group in groups {
        ops.push(MapOp::Grace);
        ops.extend(group);
    }
    Ok(Plan { ops, waiting, moves, again, yielded })
}

/// The writes for maps that carry no traffic, or whose moves nobody waits for.
pub fn plan_at_once(image: &Image, desired: &Desired, capacity: &Capacity) -> Result<Vec<MapOp>, PlanError> {
    let first = plan(image, desired, capacity, &Leave::all())?;
    if !first.again {
        return Ok(first.ops);
    }
    let mut after = image.clone();
    first.ops.iter().for_each(|op| after.apply(op));
    let second = plan(&after, desired, capacity, &Leave::all())?;
    Ok(first.ops.into_iter().chain(second.ops).collect())
}

struct Planner<'a> {
    image: &'a Image,
    desired: &'a Desired,
    capacity: &'a Capacity,
    leave: &'a Leave,
    moves_left: usize,
    waiting: usize,
    /// Backend ids that slots name once the plan is carried out.
    named: HashSet<u16>,
    add: Vec<MapOp>,
    /// Pins of backends whose flows move: slots leave them first.
    turn: Vec<MapOp>,
    /// Backends whose pins are out, and those of them that old flows were at nevertheless: there was nobody else.
    emptied: HashSet<u16>,
    left: BTreeSet<u16>,
    /// Paths of backends that lost their next hop: slots leave them first.
    lose: Vec<MapOp>,
    /// In the order of the additions; reversed at the end.
    remove: Vec<MapOp>,
    /// Whether a table leaves its place, or an entry of a server.
    moved: bool,
    /// Tables that are copies of others with this plan.
    copied: HashMap<u16, u16>,
    again: bool,
    yielded: BTreeMap<u16, usize>,
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
        let tunnels = self.desired.backends.values().filter(|wanted| wanted.next_hop.is_some());
        let tunnels: HashMap<_, _> =
            tunnels.filter_map(|wanted| Some((tunnel_to(&wanted.row)?, path_of(&wanted.next_hop)))).collect();
        for id in 1..=MOST_BACKENDS.min(self.image.backends.len() as u32 - 2) as u16 {
            let row = &self.image.backends[usize::from(id)];
            let wanted = self.desired.backends.get(&row.identity).filter(|wanted| {
                let constant = Backend { path: 0, flags: wanted.row.flags, ..*row };
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
                    self.flags(id, row.flags, wanted);
                    self.weight(id, wanted.weight);
                }
                None if *row == Backend::default() => free.push(id),
                // Until nothing names it: see `leaving`. Its pool may reach the same backend by another tunnel now, and
                // so knows the way.
                None => {
                    let path = tunnel_to(row).and_then(|to| tunnels.get(&to)).copied();
                    let path = path.filter(|path| path.bits() != row.path);
                    self.add.extend(path.map(|path| MapOp::SetPath { id, path }));
                }
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
            self.weight(id, wanted.weight);
            ids.insert(*identity, id);
        }
        Ok(ids)
    }

    fn weight(&mut self, id: u16, weight: u8) {
        let weight = u64::from(weight);
        if self.image.load_weights[usize::from(id)] != weight {
            self.add.push(MapOp::SetLoadWeight { id, weight });
        }
    }

    /// Whether a backend takes new flows by its pins, and whether it is to have old ones.
    fn flags(&mut self, id: u16, flags: u8, wanted: &DesiredBackend) {
        let goes = match wanted.old_flows {
            OldFlows::Stay | OldFlows::Yield => false,
            // Else they would lose their pins for another that failed, and what comes back does not get them back.
            OldFlows::Fail => self.somebody_takes_from(wanted),
            OldFlows::Move => true,
        };
        let now = wanted.row.flags & Backend::ACCEPTING | flags & Backend::EMPTIED;
        if !goes {
            let now = now & !Backend::EMPTIED;
            if now != flags {
                self.add.push(MapOp::SetFlags { id, flags: now });
            }
        } else if flags != Backend::EMPTIED {
            if flags & Backend::ACCEPTING != 0 {
                self.add.push(MapOp::SetFlags { id, flags: 0 });
            }
            self.turn.push(MapOp::DropPins { id });
            self.turn.push(MapOp::Grace);
            self.turn.push(MapOp::SetFlags { id, flags: Backend::EMPTIED });
        } else {
            self.emptied.insert(id);
        }
    }

    /// Whether a table whose flows may have pins to a backend that failed leads to anybody else.
    fn somebody_takes_from(&self, failed: &DesiredBackend) -> bool {
        let takes = |target: &Target| match target {
            Target::Nobody => false,
            Target::Pass => true,
            Target::Backend(identity) => {
                let other = self.desired.backends.get(identity);
                other.is_some_and(|other| matches!(other.old_flows, OldFlows::Stay))
            }
        };
        let mut tables = self.desired.tables.values().filter(|table| meet(table.pool_set, failed.pool));
        tables.any(|table| table.cur.iter().any(takes))
    }

    /// Backends that are in no configuration any more go once nothing names them; their ways out with them.
    fn leaving(&mut self, ids: &HashMap<u64, u16>) {
        let mut removals = Vec::new();
        let mut ways: HashSet<u16> = HashSet::new();
        for id in 1..=MOST_BACKENDS.min(self.image.backends.len() as u32 - 2) as u16 {
            let row = &self.image.backends[usize::from(id)];
            if *row == Backend::default() || ids.get(&row.identity) == Some(&id) {
                continue;
            }
            let unpinned = match &self.leave.unpinned {
                Unpinned::All => true,
                Unpinned::Ids(ids) => ids.contains(&id),
            };
            if unpinned && !self.named.contains(&id) {
                removals.push(MapOp::WriteBackend { id, backend: Backend::default() });
            } else {
                ways.insert(Path::from_bits(row.path).egress());
            }
        }
        self.remove.retain(|op| !matches!(op, MapOp::WriteEgress { row, .. } if ways.contains(row)));
        // Before the tables and ways out in the order of additions.
        let egress = self.remove.iter().take_while(|op| matches!(op, MapOp::WriteEgress { .. })).count();
        self.remove.splice(egress..egress, removals);
    }

    /// A row for every different way out.
    fn egress_rows(&mut self) -> Result<BTreeMap<EgressKey, u16>, PlanError> {
        let hops = self.desired.backends.values().filter_map(|backend| backend.next_hop.as_ref());
        let wanted: BTreeMap<EgressKey, Egress> = hops.map(|(_, egress)| (key(egress), *egress)).collect();
        let mut rows = BTreeMap::new();
        let mut free = Vec::new();
        // Rows after these are ways back, and not ours.
        let ways = self.image.egress.iter().take(self.capacity.egress_rows as usize);
        for (row, egress) in ways.enumerate().skip(1) {
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

    /// Tables and their slots. Returns the rows that services go by.
    fn tables(&mut self, ids: &HashMap<u64, u16>, present: &VipMap) -> Result<Places, PlanError> {
        let mut regions = Regions::of(self.image);
        let places = self.places(present, &mut regions)?;
        for (row, identity) in &places.rows {
            // A copy that is not live yet moves with the next plan.
            if self.copied.contains_key(row) {
                let from = self.copied[row];
                let copied = places::words(self.image, from);
                self.named.extend(copied.iter().flat_map(|&word| names(Slot::from_bits(word))));
                self.again = true;
                continue;
            }
            self.table(*row, &self.desired.tables[identity], ids, &mut regions)?;
        }
        Ok(places)
    }

    /// One table: the slots that differ, in a longer place where its content outgrew the one it has.
    fn table(
        &mut self,
        table: u16,
        wanted: &DesiredTable,
        ids: &HashMap<u64, u16>,
        regions: &mut Regions,
    ) -> Result<(), PlanError> {
        let id_of = |target: &Target| target.id(ids);
        let cur: Vec<u16> = wanted.cur.iter().map(id_of).collect();
        let est: Option<Vec<u16>> = wanted.est.as_ref().map(|est| est.iter().map(id_of).collect());
        let word = TableWord::from_bits(self.image.tables[usize::from(table)]);
        let discipline = wanted.discipline;
        if word == TableWord::default() {
            let words: Vec<u32> = match &est {
                None => cur.iter().map(|&id| Slot::clean(id).bits()).collect(),
                Some(est) => {
                    cur.iter().zip(est).map(|(&cur, &est)| Slot::new(cur, est, true, true).bits()).collect()
                }
            };
            let first_row = self.place(wanted.log2_length, regions)?;
            self.named.extend(words.iter().flat_map(|&word| names(Slot::from_bits(word))));
            self.add.push(MapOp::WriteSlots { first: first_row * SLOTS_PER_ROW, words });
            let word = TableWord::new(first_row, wanted.log2_length, discipline);
            self.add.push(MapOp::SetTableWord { table, word });
            return Ok(());
        }
        let old_first = word.first_row() * SLOTS_PER_ROW;
        let grown = wanted.log2_length.saturating_sub(word.log2_length());
        let length = word.length() << grown;
        let now: Vec<Slot> = (0..length).map(|index| self.image.slot(old_first + (index >> grown))).collect();
        let mut first = old_first;
        if grown > 0 {
            // Children go on where their parent is; the parent is not changed any more.
            let log2_length = word.log2_length() + grown;
            let first_row = self.place(log2_length, regions)?;
            first = first_row * SLOTS_PER_ROW;
            let words = now.iter().map(|slot| slot.bits()).collect();
            self.add.push(MapOp::WriteSlots { first, words });
            let word = TableWord::new(first_row, log2_length, discipline);
            self.add.push(MapOp::SetTableWord { table, word });
            self.add.push(MapOp::Grace);
            self.moved = true;
        }
        let shift = length.ilog2() - wanted.log2_length;
        let taking: HashSet<u16> = cur.iter().copied().collect();
        let going = Going::of(self.desired, ids);
        let mut words = Vec::new();
        let at_rest = |(offset, slot): (usize, &Slot)| *slot == Slot::clean(cur[offset >> shift]);
        let rests = now.iter().enumerate().all(at_rest);
        for (index, slot) in (first..).zip(&now) {
            let content = ((index - first) >> shift) as usize;
            let mut next = match &est {
                None => self.turned(*slot, cur[content], &taking),
                Some(_) => Slot::new(cur[content], slot.est(), true, true),
            };
            let goes_to = est.as_ref().map_or(next.cur(), |est| est[content]);
            if going.leaves(next.est(), goes_to) || (est.is_some() && next.est() == BACKEND_NOBODY) {
                self.left.insert(next.est());
                if going.yielding.contains(&next.est()) {
                    *self.yielded.entry(next.est()).or_default() += 1;
                }
                next = Slot::new(next.cur(), goes_to, est.is_some(), true);
            }
            self.named.extend(names(next));
            if next != *slot {
                words.push((index, next.bits()));
            }
        }
        self.pools(table, wanted.pool_set, rests);
        self.add.extend(runs(words));
        Ok(())
    }

    /// A slot whose new flows go to `cur` from now on; its old flows stay where they are.
    fn turned(&mut self, slot: Slot, cur: u16, taking: &HashSet<u16>) -> Slot {
        if slot.cur() == cur {
            return slot;
        }
        let nobody = slot.cur() == BACKEND_NOBODY;
        // Who takes no new flows any more is left at once; a better spread has time.
        if taking.contains(&slot.cur()) && !nobody {
            if self.moves_left == 0 {
                self.waiting += 1;
                return slot;
            }
            self.moves_left -= 1;
        }
        if slot.est() == cur {
            // Back where the old flows are: those that went elsewhere meanwhile have pins, new ones need none.
            Slot::new(cur, cur, false, true)
        } else if nobody && slot.est() == BACKEND_NOBODY && !slot.dirty() {
            // Nobody lives here but flows with pins.
            Slot::new(cur, cur, false, slot.pins())
        } else {
            Slot::new(cur, slot.est(), true, slot.pins())
        }
    }

    fn place(&mut self, log2_length: u32, regions: &mut Regions) -> Result<u32, PlanError> {
        let length = 1 << log2_length;
        regions.take(units(length)).ok_or(PlanError::Slots { slots: length })
    }

    /// Pins of a table may be of pools that it had before: until it is at rest, they stay in the set.
    fn pools(&mut self, table: u16, wanted: [u64; 3], rests: bool) {
        let before = self.image.table_states[usize::from(table)].pools;
        let pools = if rests { wanted } else { [0, 1, 2].map(|word| before[word] | wanted[word]) };
        if pools != before {
            self.add.push(MapOp::SetPools { table, pools });
        }
    }
}

/// Backends whose old flows go.
struct Going {
    /// Failed, or with no room for pins beside them.
    failed: HashSet<u16>,
    /// The latter.
    yielding: HashSet<u16>,
    moved: HashSet<u16>,
}

impl Going {
    fn of(desired: &Desired, ids: &HashMap<u64, u16>) -> Self {
        let with = |old_flows: &[OldFlows]| {
            let backends = desired.backends.iter().filter(|(_, b)| old_flows.contains(&b.old_flows));
            backends.filter_map(|(identity, _)| ids.get(identity).copied()).collect()
        };
        Self {
            failed: with(&[OldFlows::Yield, OldFlows::Fail]),
            yielding: with(&[OldFlows::Yield]),
            moved: with(&[OldFlows::Move]),
        }
    }

    /// Whether flows on `est` go to `to`. From one that failed, only to one that did not.
    fn leaves(&self, est: u16, to: u16) -> bool {
        let better = to != BACKEND_NOBODY && !self.failed.contains(&to) && !self.moved.contains(&to);
        est != to && (self.failed.contains(&est) && better || self.moved.contains(&est))
    }
}

/// Where a row's tunnel ends: whether that is an IPv6 address, and the address.
fn tunnel_to(row: &Backend) -> Option<(bool, [u64; 2])> {
    match BackendKind::from_raw(row.kind)? {
        BackendKind::Ipip4 | BackendKind::Gue4 => Some((false, row.address)),
        BackendKind::Ipip6 | BackendKind::Gue6 => Some((true, row.address)),
        BackendKind::Nobody | BackendKind::Pass | BackendKind::L2 => None,
        // No tunnel: nobody decapsulates there.
        BackendKind::Nat4 | BackendKind::Nat6 | BackendKind::Fullnat4 | BackendKind::Fullnat6 => None,
    }
}

fn names(slot: Slot) -> [u16; 2] {
    [slot.cur(), slot.est()]
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

/// Units that a table of this length takes: one at the least.
const fn units(length: u32) -> usize {
    (length / SLOTS_PER_ROW).div_ceil(UNIT_ROWS) as usize + (length < SLOTS_PER_ROW) as usize
}

/// Which stretches of the slot map no table takes.
struct Regions {
    /// By unit of the shortest table.
    taken: Vec<bool>,
}

const UNIT_ROWS: u32 = (1 << SHORTEST_TABLE_LOG2) / SLOTS_PER_ROW;

impl Regions {
    /// Of so many rows that no table takes.
    fn empty(rows: usize) -> Self {
        let mut taken = vec![false; rows / UNIT_ROWS as usize];
        taken[..(RESERVED_SLOT_ROWS / UNIT_ROWS) as usize].fill(true);
        Self { taken }
    }

    fn of(image: &Image) -> Self {
        let Self { mut taken } = Self::empty(image.slots.len());
        for word in image.tables.iter().map(|&bits| TableWord::from_bits(bits)) {
            if word != TableWord::default() {
                let first = (word.first_row() / UNIT_ROWS) as usize;
                let units = units(word.length());
                taken[first..first + units].fill(true);
            }
        }
        Self { taken }
    }

    /// The first row of a stretch of so many units, now taken.
    fn take(&mut self, units: usize) -> Option<u32> {
        let first = (0..(self.taken.len() + 1).saturating_sub(units))
            .find(|&first| !self.taken[first..first + units].contains(&true))?;
        self.taken[first..first + units].fill(true);
        Some(first as u32 * UNIT_ROWS)
    }
}
