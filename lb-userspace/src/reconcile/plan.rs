//! The difference between what lies in the maps and what should, as an ordered list of writes.
//!
//! Additions come in the order in which packets read in reverse: egress, backends, slots, table
//! words, VIPs. Removals come last, after a grace, in the opposite order: what is cleared is what no
//! packet can reach any more. A next hop that is lost is a removal.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use lb_common::abi::{
    BACKEND_NOBODY, BACKEND_PASS, Backend, Egress, FILTER_WORDS, MOST_BACKENDS, Path, PortKey,
    SHORTEST_TABLE_LOG2, SLOTS_PER_ROW, TableState, TableWord, VipTarget, VipWord,
};
use lb_common::slots::Slot;
use lb_common::vips::{FilterBit, filter4, filter6};
use lb_common::wire::Address6;

use super::desired::{Desired, DesiredTable, Target};
use super::image::Image;
use super::op::MapOp;
use crate::capacity::{Capacity, RESERVED_SLOT_ROWS};
use crate::tables::buckets::{self, Bucket};

/// Why a desired state cannot be planned. Nothing has been written then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error("{needed} VIPs are more than the limit of {limit}; raise limits.vips")]
    Vips { needed: usize, limit: u32 },
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
        let words = wanted.slots.iter().map(|target| {
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
        self.add.push(MapOp::SetTableWord { table, word: TableWord::new(first_row, wanted.log2_length) });
        self.moved |= word != TableWord::default();
        Ok(())
    }

    /// VIP buckets: written anew into the half that is not live, if anything differs.
    fn vips(&mut self, tables: &HashMap<u64, u16>) -> Result<(), PlanError> {
        let present = present_vips(self.image);
        let services = self.desired.vips.values().filter(|vip| vip.table.is_some()).count();
        let limit = self.capacity.vips;
        if services > limit as usize {
            return Err(PlanError::Vips { needed: services, limit });
        }
        let mut used: HashSet<u32> = HashSet::new();
        let mut wanted: BTreeMap<VipKey, VipTarget> = BTreeMap::new();
        let mut fresh: BTreeSet<(VipKey, u16)> = BTreeSet::new();
        for (key, vip) in &self.desired.vips {
            let Some(table) = vip.table.map(|identity| tables[&identity]) else {
                wanted.insert(*key, VipTarget::address(0, 0, 0));
                continue;
            };
            match present.get(key) {
                Some(target) => {
                    used.insert(target.vip());
                    wanted.insert(*key, VipTarget::service(table, 0, target.vip()));
                }
                None => _ = fresh.insert((*key, table)),
            }
        }
        // Counter rows of entries that are about to go are still counted into: not given away yet.
        // Entries that mark an address have none.
        let counted = present.iter().filter(|(key, _)| PortKey(key.1) != PortKey::ADDRESS);
        let resting: HashSet<u32> = counted.map(|(_, target)| target.vip()).collect();
        let mut free = (0..self.capacity.vip_rows())
            .filter(|vip| !used.contains(vip) && !resting.contains(vip))
            .collect::<Vec<_>>()
            .into_iter();
        for (key, table) in fresh {
            let vip = free.next().ok_or(PlanError::Vips { needed: services, limit })?;
            self.add.push(MapOp::ResetVipTraffic { vip });
            wanted.insert(key, VipTarget::service(table, 0, vip));
        }
        self.filter(wanted.keys());
        if wanted == present {
            return Ok(());
        }
        let half = self.capacity.vip4_half_log2;
        let v4 = |(key, target): (&VipKey, &VipTarget)| match key.0 {
            IpAddr::V4(address) => Some(buckets::vip4(address, PortKey(key.1), *target)),
            IpAddr::V6(_) => None,
        };
        let write = |row, buckets| MapOp::WriteVips4 { row, buckets };
        if let Some(word) = self.family(&wanted, &present, v4, self.image.vip_word4(), half, write)? {
            self.add.push(MapOp::SetVipWord4 { word });
        }
        let half = self.capacity.vip6_half_log2;
        let v6 = |(key, target): (&VipKey, &VipTarget)| match key.0 {
            IpAddr::V6(address) => Some(buckets::vip6(address, PortKey(key.1), *target)),
            IpAddr::V4(_) => None,
        };
        let write = |row, buckets| MapOp::WriteVips6 { row, buckets };
        if let Some(word) = self.family(&wanted, &present, v6, self.image.vip_word6(), half, write)? {
            self.add.push(MapOp::SetVipWord6 { word });
        }
        Ok(())
    }

    /// Bits of addresses that come are set before they are live, bits of those that go are cleared after.
    fn filter<'k>(&mut self, keys: impl Iterator<Item = &'k VipKey>) {
        let mut wanted = vec![0; FILTER_WORDS as usize];
        for (address, key) in keys {
            if PortKey(*key) == PortKey::ADDRESS {
                let bit = filter_bit(*address);
                wanted[bit.word() as usize] |= bit.mask();
            }
        }
        for ((index, &bits), wanted) in (0..).zip(&self.image.vip_filter).zip(wanted) {
            let both = bits | wanted;
            if both != bits {
                self.add.push(MapOp::SetFilterWord { index, bits: both });
            }
            if both != wanted {
                self.remove.push(MapOp::SetFilterWord { index, bits: wanted });
            }
        }
    }

    /// Writes the buckets of one family into the half that is not live. Returns the word that makes
    /// them live, or nothing where no entry of the family differs.
    fn family<B: Bucket<Entry: PartialEq>>(
        &mut self,
        wanted: &VipMap,
        present: &VipMap,
        entry: impl Fn((&VipKey, &VipTarget)) -> Option<B::Entry>,
        live: VipWord,
        half_log2: u32,
        write: impl Fn(u32, Vec<B>) -> MapOp,
    ) -> Result<Option<VipWord>, PlanError> {
        let wanted: Vec<B::Entry> = wanted.iter().filter_map(&entry).collect();
        if wanted.iter().eq(present.iter().filter_map(&entry).collect::<Vec<_>>().iter()) {
            return Ok(None);
        }
        let layout =
            buckets::lay_out(&wanted, half_log2).ok_or(PlanError::Buckets { limit: self.capacity.vips })?;
        // The half that was live before may still be read by who loaded its word.
        self.add.push(MapOp::Grace);
        let row = idle_half(live, half_log2);
        self.add.push(write(row, layout.buckets));
        let word = VipWord::new(layout.seed, row, layout.log2_buckets);
        Ok(Some(if wanted.is_empty() { VipWord::default() } else { word }))
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

type VipKey = (IpAddr, u32);
type VipMap = BTreeMap<VipKey, VipTarget>;

/// The VIPs that packets find now.
pub fn present_vips(image: &Image) -> VipMap {
    let live = |word: VipWord| {
        let first = word.first_row() as usize;
        first..first + (1 << word.log2_buckets())
    };
    let mut vips = VipMap::new();
    for vip in image.vips4[live(image.vip_word4())].iter().flat_map(|bucket| bucket.0) {
        if vip.key != PortKey::default() {
            vips.insert((Ipv4Addr::from(vip.address.to_ne_bytes()).into(), vip.key.0), vip.target);
        }
    }
    for vip in image.vips6[live(image.vip_word6())].iter().flat_map(|bucket| bucket.0) {
        if vip.key != PortKey::default() {
            let address = Address6 { high: vip.high, low: vip.low };
            vips.insert((Ipv6Addr::from(address.bytes()).into(), vip.key.0), vip.target);
        }
    }
    vips
}

fn filter_bit(address: IpAddr) -> FilterBit {
    match address {
        IpAddr::V4(v4) => filter4(u32::from_ne_bytes(v4.octets())),
        IpAddr::V6(v6) => filter6(Address6::from_bytes(v6.octets())),
    }
}

/// The first row of the half that the live word does not name.
fn idle_half(live: VipWord, half_log2: u32) -> u32 {
    if live.first_row() == 1 { 1 + (1 << half_log2) } else { 1 }
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
