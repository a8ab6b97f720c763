//! The difference between what lies in the maps and what should, as an ordered list of writes.
//!
//! Additions come in the order in which packets read in reverse: egress, backends, slots, table
//! words, VIPs. Removals come last, after a grace, in the opposite order: what is cleared is what no
//! packet can reach any more. A next hop that is lost is a removal.

mod at_rest;
mod carry;
mod places;
mod servers;
mod slots;
pub mod sources;
mod vips;

use std::cell::{Cell, OnceCell};
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::RangeInclusive;
use std::sync::Arc;

use lb_common::abi::{
    BACKEND_NOBODY, BACKEND_PASS, Backend, BackendKind, Egress, MOST_BACKENDS, Path, SHORTEST_TABLE_LOG2,
    SLOTS_PER_ROW, TableWord,
};
use lb_common::slots::Slot;
use lb_common::wire::Mac;
use rustc_hash::{FxBuildHasher, FxHashMap};

use super::desired::{Desired, DesiredBackend, DesiredTable, OldFlows, Target, meet};
use super::image::{Ids, Image};
use super::op::MapOp;
use crate::capacity::{Capacity, RESERVED_SLOT_ROWS};

pub use at_rest::{AtRest, Led, Rows};
pub use carry::{carried, image_of};
use places::Places;
use slots::{Going, Left};
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
    /// What needs no look.
    pub at_rest: AtRest,
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
        Self { unpinned: Unpinned::All, moves: usize::MAX, at_rest: AtRest::default() }
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
    /// Rows of tables that there was nothing to do of, of those that were looked at.
    pub idle: Vec<u16>,
    /// Rows of tables that are as they should be once the plan is carried out.
    pub written: Vec<u16>,
    /// Backends as they are once the plan is carried out, if they are as they should be then.
    pub rows: Option<Rows>,
    /// VIPs, if there was nothing to do of them.
    pub led: Option<Led>,
}

/// The writes that turn the image into what is desired; none if it is that already, or on its way.
pub fn plan(image: &Image, desired: &Desired, capacity: &Capacity, leave: &Leave) -> Result<Plan, PlanError> {
    let mut planner = Planner::new(image, desired, capacity, leave);
    planner.look()?;
    let (waiting, moves) = (planner.waiting, leave.moves - planner.moves_left);
    let turn = planner.turn();
    let Planner { add: mut ops, lose, mut remove, moved, again, yielded, idle, written, rows, led, .. } =
        planner;
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
    Ok(Plan { ops, waiting, moves, again, yielded, idle, written, rows, led })
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

/// Whether what is desired fits beside what lies in the image. What slots say takes no room: that is left out.
pub fn check_room(image: &Image, desired: &Desired, capacity: &Capacity) -> Result<(), PlanError> {
    let leave = Leave::all();
    let mut planner = Planner { measures: true, ..Planner::new(image, desired, capacity, &leave) };
    planner.look()?;
    // Copies of tables are places for more than this plan.
    if planner.again { plan_at_once(image, desired, capacity).map(drop) } else { Ok(()) }
}

struct Planner<'a> {
    image: &'a Image,
    desired: &'a Desired,
    capacity: &'a Capacity,
    leave: &'a Leave,
    /// Only room is asked for: what slots say is left out.
    measures: bool,
    moves_left: usize,
    waiting: usize,
    /// Backend ids that slots name once the plan is carried out; only where `names` says that somebody asks.
    named: HashSet<u16>,
    names: bool,
    going: Going,
    /// Tables, and whether they lead to anybody who takes flows, once somebody has asked.
    takers: OnceCell<Vec<(&'a DesiredTable, OnceCell<bool>)>>,
    /// As in `Plan`.
    idle: Vec<u16>,
    written: Vec<u16>,
    rows: Option<Rows>,
    led: Option<Led>,
    add: Vec<MapOp>,
    /// Backends whose flows move: slots leave them first, then their pins go.
    failing: Vec<u16>,
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

impl<'a> Planner<'a> {
    fn new(image: &'a Image, desired: &'a Desired, capacity: &'a Capacity, leave: &'a Leave) -> Self {
        Self {
            image,
            desired,
            capacity,
            leave,
            measures: false,
            moves_left: leave.moves,
            waiting: 0,
            named: HashSet::from([BACKEND_NOBODY, BACKEND_PASS]),
            names: false,
            going: Going::default(),
            takers: OnceCell::new(),
            idle: Vec::new(),
            written: Vec::new(),
            rows: None,
            led: None,
            add: Vec::new(),
            failing: Vec::new(),
            emptied: HashSet::new(),
            left: BTreeSet::new(),
            lose: Vec::new(),
            remove: Vec::new(),
            moved: false,
            copied: HashMap::new(),
            again: false,
            yielded: BTreeMap::new(),
        }
    }

    /// Works everything out.
    fn look(&mut self) -> Result<(), PlanError> {
        let ids = match self.backends_at_rest() {
            Some(ids) => ids,
            None => self.backends()?,
        };
        let mut regions = Regions::of(self.image, self.capacity);
        let (places, present) = match self.leave.at_rest.led(self.desired) {
            Some(places) => (Arc::clone(places), None),
            None => {
                let (present, before) = (present_vips(self.image), self.writes());
                let places = Arc::new(self.places(&present, &mut regions)?);
                // Copies wait for slots to be equal.
                if self.writes() == before && places.are_shared() {
                    self.led = Some(Led::of(self.desired, &places));
                }
                (places, Some(present))
            }
        };
        self.tables(&ids, &places, &mut regions)?;
        let gone = self.servers(&ids, &places)?;
        if let Some(present) = present {
            let before = self.writes();
            self.vips(&present, &places)?;
            if self.writes() != before {
                self.led = None;
            }
        }
        self.leaving(&ids);
        self.add.extend(gone);
        Ok(())
    }

    fn writes(&self) -> usize {
        self.add.len() + self.remove.len()
    }

    /// Backend rows where an earlier plan left all as they should have been, by those that are to be something else now.
    /// Returns the id of each identity; nothing where all have to be looked at.
    fn backends_at_rest(&mut self) -> Option<Arc<Ids>> {
        let (desired, Rows { backends, ids, going }) = (self.desired, self.leave.at_rest.rows()?);
        let changed = desired.backends.changed_since(backends)?;
        let alike = |now: &DesiredBackend, before: &DesiredBackend| {
            let constant = Backend { flags: before.row.flags, ..now.row };
            constant == before.row && now.next_hop == before.next_hop
        };
        if !changed.iter().all(|(now, before)| alike(now, before)) {
            return None;
        }
        let changed = changed.iter().filter_map(|(now, _)| ids.get(&now.row.identity));
        let looked_at: BTreeSet<u16> = changed.chain(going).copied().collect();
        let row = |id: u16| &self.image.backends[usize::from(id)];
        let wanted: Vec<(u16, &DesiredBackend)> = looked_at
            .into_iter()
            .map(|id| Some((id, desired.backends.get(&row(id).identity)?)))
            .collect::<Option<_>>()?;
        for &(id, wanted) in &wanted {
            self.flags(id, self.image.backends[usize::from(id)].flags, wanted);
            self.weight(id, wanted.weight);
        }
        self.going = Going::of(wanted);
        self.rows =
            Some(Rows { backends: desired.backends.clone(), ids: Arc::clone(ids), going: self.going.ids() });
        Some(Arc::clone(ids))
    }

    /// Backend rows and the egress rows they name. Returns the id of each identity.
    fn backends(&mut self) -> Result<Arc<Ids>, PlanError> {
        let egress_rows = self.egress_rows()?;
        let path_of = |next_hop: &Option<(_, Egress)>| {
            let Some((mac, egress)) = next_hop else { return Path::default() };
            Path::new(*mac, egress_rows.row(egress))
        };
        let desired = self.desired;
        let wanted: FxHashMap<u64, &DesiredBackend> =
            desired.backends.iter().map(|(identity, wanted)| (*identity, wanted)).collect();
        let mut ids = Ids::with_capacity_and_hasher(wanted.len(), FxBuildHasher);
        let (mut free, mut leaving) = (Vec::new(), Vec::new());
        for id in self.backend_ids() {
            let row = &self.image.backends[usize::from(id)];
            if *row == Backend::default() {
                free.push(id);
                continue;
            }
            let wanted = wanted.get(&row.identity).filter(|wanted| {
                let constant = Backend { path: 0, flags: wanted.row.flags, ..*row };
                constant == wanted.row && !ids.contains_key(&row.identity)
            });
            let Some(wanted) = wanted else {
                leaving.push(id);
                continue;
            };
            ids.insert(row.identity, id);
            let path = path_of(&wanted.next_hop);
            if path.bits() != row.path {
                let list = if path == Path::default() { &mut self.lose } else { &mut self.add };
                list.push(MapOp::SetPath { id, path });
            }
            self.flags(id, row.flags, wanted);
            self.weight(id, wanted.weight);
        }
        self.names = !leaving.is_empty();
        self.lead_leaving(&leaving, path_of);
        let mut free = free.into_iter();
        for (identity, wanted) in desired.backends.iter() {
            if ids.contains_key(identity) {
                continue;
            }
            let limit = MOST_BACKENDS;
            let needed = desired.backends.len();
            let id = free.next().ok_or(PlanError::Backends { needed, limit })?;
            let backend = Backend { path: path_of(&wanted.next_hop).bits(), ..wanted.row };
            self.add.push(MapOp::ResetBackendTraffic { id });
            self.add.push(MapOp::WriteBackend { id, backend });
            // One may be new and have failed.
            self.flags(id, wanted.row.flags, wanted);
            self.weight(id, wanted.weight);
            ids.insert(*identity, id);
        }
        let id_of = |(identity, wanted): (&u64, &'a DesiredBackend)| Some((*ids.get(identity)?, wanted));
        self.going = Going::of(desired.backends.iter().filter_map(id_of));
        let ids = Arc::new(ids);
        if !self.names {
            let (backends, ids) = (desired.backends.clone(), Arc::clone(&ids));
            self.rows = Some(Rows { backends, ids, going: self.going.ids() });
        }
        Ok(ids)
    }

    /// Backends that are in no configuration any more stay until nothing names them: see `leaving`. A pool may reach the
    /// same backend by another tunnel now, and so knows the way.
    fn lead_leaving(&mut self, leaving: &[u16], path_of: impl Fn(&Option<(Mac, Egress)>) -> Path) {
        if leaving.is_empty() {
            return;
        }
        let reached = self.desired.backends.values().filter(|wanted| wanted.next_hop.is_some());
        let tunnels: HashMap<_, _> =
            reached.filter_map(|wanted| Some((tunnel_to(&wanted.row)?, path_of(&wanted.next_hop)))).collect();
        for &id in leaving {
            let row = &self.image.backends[usize::from(id)];
            let path = tunnel_to(row).and_then(|to| tunnels.get(&to)).copied();
            let path = path.filter(|path| path.bits() != row.path);
            self.add.extend(path.map(|path| MapOp::SetPath { id, path }));
        }
    }

    /// Ids that a backend may have.
    fn backend_ids(&self) -> RangeInclusive<u16> {
        1..=MOST_BACKENDS.min(self.image.backends.len() as u32 - 2) as u16
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
            self.failing.push(id);
        } else {
            self.emptied.insert(id);
        }
    }

    /// The pins of backends whose flows move, all in one look at the pins: hundreds may fail at once.
    fn turn(&self) -> Vec<MapOp> {
        let left = self.left.iter().filter(|id| self.emptied.contains(id));
        let ids: Vec<u16> = self.failing.iter().chain(left).copied().collect();
        if ids.is_empty() {
            return Vec::new();
        }
        let emptied = self.failing.iter().map(|&id| MapOp::SetFlags { id, flags: Backend::EMPTIED });
        [MapOp::DropPins { ids }, MapOp::Grace].into_iter().chain(emptied).collect()
    }

    /// Whether a table whose flows may have pins to a backend that failed leads to anybody else.
    fn somebody_takes_from(&self, failed: &DesiredBackend) -> bool {
        let desired = self.desired;
        let takes = |target: &Target| match target {
            Target::Nobody => false,
            Target::Pass => true,
            Target::Backend(identity) => {
                let other = desired.backends.get(identity);
                other.is_some_and(|other| matches!(other.old_flows, OldFlows::Stay))
            }
        };
        let tables = || desired.tables.values().map(|table| (&**table, OnceCell::new())).collect();
        let takers = self.takers.get_or_init(tables);
        let leads_to_some = |table: &DesiredTable| table.cur.used().any(takes);
        takers.iter().any(|(table, takes)| {
            meet(table.pool_set, failed.pool) && *takes.get_or_init(|| leads_to_some(table))
        })
    }

    /// Backends that are in no configuration any more go once nothing names them; their ways out with them.
    fn leaving(&mut self, ids: &Ids) {
        if !self.names {
            return;
        }
        let mut removals = Vec::new();
        let mut ways: HashSet<u16> = HashSet::new();
        for id in self.backend_ids() {
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
    fn egress_rows(&mut self) -> Result<EgressRows, PlanError> {
        let hops = self.desired.backends.values().filter_map(|backend| backend.next_hop.as_ref());
        let mut wanted: BTreeMap<EgressKey, Egress> = BTreeMap::new();
        let mut last = None;
        // Of many backends, most go the same way.
        for (_, egress) in hops {
            if last != Some(egress) {
                wanted.insert(key(egress), *egress);
                last = Some(egress);
            }
        }
        let mut rows = EgressRows::default();
        let mut free = Vec::new();
        // Rows after these are ways back, and not ours.
        let ways = self.image.egress.iter().take(self.capacity.egress_rows as usize);
        for (row, egress) in ways.enumerate().skip(1) {
            let row = row as u16;
            if *egress == Egress::default() {
                free.push(row);
            } else if wanted.contains_key(&key(egress)) && !rows.rows.contains_key(&key(egress)) {
                rows.rows.insert(key(egress), row);
            } else {
                self.remove.push(MapOp::WriteEgress { row, egress: Egress::default() });
            }
        }
        let mut free = free.into_iter();
        for (key, egress) in wanted {
            if let Entry::Vacant(entry) = rows.rows.entry(key) {
                let row = free.next().ok_or(PlanError::Egress { limit: self.capacity.egress_rows })?;
                self.add.push(MapOp::WriteEgress { row, egress });
                entry.insert(row);
            }
        }
        Ok(rows)
    }

    /// Tables and their slots.
    fn tables(&mut self, ids: &Ids, places: &Places, regions: &mut Regions) -> Result<(), PlanError> {
        for (row, identity) in &places.rows {
            // A copy that is not live yet moves with the next plan.
            if self.copied.contains_key(row) {
                let from = self.copied[row];
                let copied = places::words(self.image, from);
                self.name(copied.into_iter().map(Slot::from_bits));
                self.again = true;
                continue;
            }
            let wanted = &self.desired.tables[identity];
            let pools = self.image.table_states[usize::from(*row)].pools;
            // What is leaving goes once no slot names it: then all are looked at.
            if self.names || !self.leave.at_rest.holds(*row, wanted, pools) {
                match self.table(*row, wanted, ids, regions)? {
                    Left::Nothing => self.idle.push(*row),
                    Left::ToWrite => self.written.push(*row),
                    Left::More => {}
                }
            }
        }
        Ok(())
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

/// Rows of ways out.
#[derive(Default)]
struct EgressRows {
    rows: FxHashMap<EgressKey, u16>,
    /// Who was asked for last: of many backends, most go the same way.
    last: Cell<Option<(Egress, u16)>>,
}

impl EgressRows {
    fn row(&self, egress: &Egress) -> u16 {
        if let Some((last, row)) = self.last.get()
            && last == *egress
        {
            return row;
        }
        let row = self.rows[&key(egress)];
        self.last.set(Some((*egress, row)));
        row
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

    fn of(image: &Image, capacity: &Capacity) -> Self {
        let Self { mut taken } = Self::empty(capacity.slot_rows as usize);
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
