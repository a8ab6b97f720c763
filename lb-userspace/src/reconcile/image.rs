//! A copy of the kernel's tables in ordinary memory: what has been applied, and the same `Tables`
//! that a packet meets. Tests, `xlb lookup` and the plan all work on it.

use std::cell::{OnceCell, RefCell};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::atomic::AtomicU64;

use elsa::FrozenMap;
use lb_common::abi::{
    BACKEND_PASS, Backend, BackendKind, Egress, Features, HASH_KEYS, Interface, Load, MOST_SOURCES, Meta,
    PINS_PER_BUCKET, PREFIX_LENGTHS_V4, PREFIX_LENGTHS_V6, Path, Pin, PinBucket, PortRule, RULES_PER_ROW,
    Record, RuleRow, SLOTS_PER_ROW, SlotRow, Source, TableState, TableWord, Traffic, VIP_WORD_V4,
    VIP_WORD_V6, Vip4Bucket, Vip6Bucket, VipIndex,
};

use lb_common::allowance::Limited;
use lb_common::connections::{Reply, Rooms};
use lb_common::flow::{self, FlowHash};
use lb_common::outcome::Outcome;
use lb_common::pins::{self, Asked, PinEvent, Proposal, Verdict};
use lb_common::quic::ServerKey;
use lb_common::slots::Slot;
use lb_common::tables::Tables;
use rustc_hash::FxHashMap;

use super::connections::Connections;
use super::op::MapOp;
use super::pins::{Pins, coarse_ns};
use crate::capacity::Capacity;
use crate::lookup;

/// The id of each identity.
pub type Ids = FxHashMap<u64, u16>;

/// The tables, as they lie in the maps.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    pub meta: Meta,
    pub vip_index: Box<VipIndex>,
    pub port_rules: Vec<RuleRow>,
    pub vips4: Vec<Vip4Bucket>,
    pub vips6: Vec<Vip6Bucket>,
    pub tables: Vec<u64>,
    pub table_states: Vec<TableState>,
    pub slots: Vec<SlotRow>,
    pub backends: Vec<Backend>,
    pub egress: Vec<Egress>,
    /// `Load::weight` of each backend id.
    pub load_weights: Vec<u64>,
    /// Not a copy: they change with every packet.
    pub pins: Pins,
    /// As the pins are.
    pub connections: Connections,
    pub sources: Vec<Source>,
    pub interfaces: HashMap<u32, Interface>,
    pub servers: BTreeMap<ServerKey, u16>,
}

impl Image {
    /// Fresh maps: all zero, but for the row that stands for the host's stack.
    pub fn empty(capacity: &Capacity, meta: Meta) -> Self {
        let mut backends = vec![Backend::default(); capacity.backend_rows as usize];
        backends[usize::from(BACKEND_PASS)] =
            Backend { kind: BackendKind::Pass as u8, flags: Backend::ACCEPTING, ..Backend::default() };
        Self {
            meta,
            vip_index: Box::new(VipIndex::EMPTY),
            port_rules: vec![RuleRow::default(); capacity.rule_rows() as usize],
            vips4: vec![Vip4Bucket::default(); capacity.vip4_rows() as usize],
            vips6: vec![Vip6Bucket::default(); capacity.vip6_rows() as usize],
            tables: vec![0; capacity.tables as usize],
            table_states: vec![TableState::default(); capacity.tables as usize],
            slots: vec![SlotRow::default(); capacity.slot_rows as usize],
            backends,
            egress: vec![Egress::default(); capacity.way_rows() as usize],
            load_weights: vec![0; capacity.backend_rows as usize],
            pins: Pins::default(),
            connections: Connections::default(),
            sources: vec![Source::default(); MOST_SOURCES as usize],
            interfaces: HashMap::new(),
            servers: BTreeMap::new(),
        }
    }

    /// Neighbours that packets are sent to, by interface and MAC.
    pub fn neighbours(&self) -> HashSet<(u32, [u8; 6])> {
        let paths = self.backends.iter().map(|backend| Path::from_bits(backend.path));
        let neighbours = paths.filter_map(|path| {
            let egress = self.egress.get(usize::from(path.egress())).filter(|egress| egress.ifindex != 0)?;
            Some((egress.ifindex, path.mac().bytes()))
        });
        neighbours.collect()
    }

    /// Addresses of backends, with a next hop or without.
    pub fn addresses(&self) -> HashSet<IpAddr> {
        self.backends.iter().filter_map(lookup::address).collect()
    }

    /// Rule `index`, counted over the whole map.
    pub fn port_rule(&self, index: u32) -> Option<&PortRule> {
        let row = self.port_rules.get((index / RULES_PER_ROW) as usize)?;
        Some(&row.0[(index % RULES_PER_ROW) as usize])
    }

    /// Slot `index`, counted over the whole map.
    pub fn slot(&self, index: u32) -> Slot {
        Slot::from_bits(self.slots[(index / SLOTS_PER_ROW) as usize].0[(index % SLOTS_PER_ROW) as usize])
    }

    /// The id of each identity.
    pub fn ids(&self) -> Ids {
        let rows = (0u16..).zip(&self.backends).filter(|(_, row)| row.identity != 0);
        rows.map(|(id, row)| (row.identity, id)).collect()
    }

    /// Slots of all tables that packets can reach, with the table's number.
    pub fn live_slots(&self) -> impl Iterator<Item = (u16, Slot)> + '_ {
        let words = (0u16..).zip(self.tables.iter().map(|&bits| TableWord::from_bits(bits)));
        words.filter(|(_, word)| *word != TableWord::default()).flat_map(move |(table, word)| {
            let first = word.first_row() * SLOTS_PER_ROW;
            (first..first + word.length()).map(move |index| (table, self.slot(index)))
        })
    }

    fn set_slot(&mut self, index: u32, word: u32) {
        self.slots[(index / SLOTS_PER_ROW) as usize].0[(index % SLOTS_PER_ROW) as usize] = word;
    }

    /// Does to the copy what the operation does to the maps.
    pub fn apply(&mut self, op: &MapOp) {
        match op {
            MapOp::WriteEgress { row, egress } => self.egress[usize::from(*row)] = *egress,
            MapOp::WriteBackend { id, backend } => self.backends[usize::from(*id)] = *backend,
            MapOp::SetPath { id, path } => self.backends[usize::from(*id)].path = path.bits(),
            MapOp::WriteTableState { table, state } => self.table_states[usize::from(*table)] = *state,
            MapOp::WriteSlots { first, words } => {
                for (index, word) in (*first..).zip(words) {
                    self.set_slot(index, *word);
                }
            }
            MapOp::SetTableWord { table, word } => self.tables[usize::from(*table)] = word.bits(),
            MapOp::WriteVips4 { row, buckets } => {
                self.vips4[*row as usize..][..buckets.len()].copy_from_slice(buckets);
            }
            MapOp::WriteVips6 { row, buckets } => {
                self.vips6[*row as usize..][..buckets.len()].copy_from_slice(buckets);
            }
            MapOp::SetVipWord4 { word } => self.vip_index.words[VIP_WORD_V4] = word.bits(),
            MapOp::SetVipWord6 { word } => self.vip_index.words[VIP_WORD_V6] = word.bits(),
            MapOp::WriteRules { row, rules } => {
                self.port_rules[*row as usize..][..rules.len()].copy_from_slice(rules);
            }
            MapOp::SetPrefixLengths4 { lengths } => {
                self.vip_index.words[PREFIX_LENGTHS_V4] = lengths.bits();
            }
            MapOp::SetPrefixLengths6 { lengths } => {
                self.vip_index.words[PREFIX_LENGTHS_V6] = lengths.bits();
            }
            MapOp::SetFilterWord { index, bits } => self.vip_index.filter[*index as usize] = *bits,
            MapOp::SetServer { key, id } => _ = self.servers.insert(*key, *id),
            MapOp::RemoveServer { key } => _ = self.servers.remove(key),
            MapOp::SetClosing { table, closing } => self.table_states[usize::from(*table)].closing = *closing,
            MapOp::SetPools { table, pools } => self.table_states[usize::from(*table)].pools = *pools,
            MapOp::WriteSource { row, source } => self.sources[usize::from(*row)] = *source,
            MapOp::SetFlags { id, flags } => self.backends[usize::from(*id)].flags = *flags,
            MapOp::SetLoadWeight { id, weight } => self.load_weights[usize::from(*id)] = *weight,
            MapOp::ResetBackendTraffic { .. }
            | MapOp::ResetVipTraffic { .. }
            | MapOp::ExpectFailed { .. }
            | MapOp::DropPins { .. }
            | MapOp::DropConnections { .. }
            | MapOp::Grace => {}
        }
    }
}

/// What was counted, and which rows a packet met on its way.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Trail {
    pub outcomes: Vec<Outcome>,
    pub vip: Option<(u32, Traffic)>,
    pub backend: Option<(u16, Traffic)>,
    pub pins: Vec<PinEvent>,
    /// What it chose the bucket of pins by, and the pins in that as it left them.
    pub bucket: Option<(u32, [u64; PINS_PER_BUCKET])>,
    /// The table, its word, the slot in it and the slot's word.
    pub table: Option<(u16, TableWord)>,
    pub slot: Option<(u32, Slot)>,
    pub met: Option<u16>,
    /// Whether the backend is one that the discipline of the table picked.
    pub picked: bool,
    /// Whether it is the one of the flow's pin.
    pub pinned: bool,
    /// What a QUIC connection ID says, and whom it names.
    pub server: Option<(ServerKey, Option<u16>)>,
    pub reply: Option<(u16, Reply)>,
    /// Buckets of connections that it looked at, and records, as it left them.
    pub buckets: BTreeMap<u32, [u64; PINS_PER_BUCKET]>,
    pub records: BTreeMap<u32, [u64; 8]>,
}

/// An image as the packet path sees it, writing down the way.
pub struct Traced<'i> {
    image: &'i Image,
    keys: [u64; HASH_KEYS],
    /// The one bucket that a packet looks at, as it was then: what the packet writes stays here.
    bucket: OnceCell<(u32, PinBucket)>,
    /// Likewise those of connections, by row, and their records by place.
    buckets: FrozenMap<u32, Box<PinBucket>>,
    records: FrozenMap<u32, Box<Record>>,
    trail: RefCell<Trail>,
}

impl<'i> Traced<'i> {
    pub fn new(image: &'i Image) -> Self {
        Self {
            image,
            keys: flow::keys(image.meta.seed),
            bucket: OnceCell::new(),
            buckets: FrozenMap::new(),
            records: FrozenMap::new(),
            trail: RefCell::default(),
        }
    }

    pub fn into_trail(self) -> Trail {
        let bucket = self.bucket.into_inner();
        let bucket = bucket.map(|(spread, pins)| (spread, pins.0.map(AtomicU64::into_inner)));
        let buckets = self.buckets.into_map().into_iter();
        let records = self.records.into_map().into_iter();
        Trail {
            bucket,
            buckets: buckets.map(|(row, pins)| (row, pins.0.map(AtomicU64::into_inner))).collect(),
            records: records.map(|(at, record)| (at, record.0.map(AtomicU64::into_inner))).collect(),
            ..self.trail.into_inner()
        }
    }
}

impl Tables for Traced<'_> {
    fn features(&self) -> Features {
        Features::from_bits(self.image.meta.features)
    }

    fn hash_key(&self, index: usize) -> u64 {
        self.keys[index]
    }

    fn vip_index(&self) -> Option<&VipIndex> {
        Some(&self.image.vip_index)
    }

    fn vip4_bucket(&self, row: u32) -> Option<&Vip4Bucket> {
        self.image.vips4.get(row as usize)
    }

    fn vip6_bucket(&self, row: u32) -> Option<&Vip6Bucket> {
        self.image.vips6.get(row as usize)
    }

    fn port_rule(&self, index: u32) -> Option<&PortRule> {
        self.image.port_rule(index)
    }

    fn table_word(&self, table: u16) -> Option<TableWord> {
        let word = TableWord::from_bits(*self.image.tables.get(usize::from(table))?);
        self.trail.borrow_mut().table = Some((table, word));
        Some(word)
    }

    fn slot(&self, first_row: u32, index: u32) -> Option<Slot> {
        let row = self.image.slots.get((first_row + index / SLOTS_PER_ROW) as usize)?;
        let slot = Slot::from_bits(row.0[(index % SLOTS_PER_ROW) as usize]);
        self.trail.borrow_mut().slot = Some((index, slot));
        Some(slot)
    }

    fn backend(&self, id: u16) -> Option<&Backend> {
        self.trail.borrow_mut().met = Some(id);
        self.image.backends.get(usize::from(id))
    }

    fn egress(&self, row: u16) -> Option<&Egress> {
        self.image.egress.get(usize::from(row))
    }

    fn interface(&self, ifindex: u32) -> Option<&Interface> {
        self.image.interfaces.get(&ifindex)
    }

    fn server(&self, key: &ServerKey) -> Option<u16> {
        let id = self.image.servers.get(key).copied();
        self.trail.borrow_mut().server = Some((*key, id));
        id
    }

    fn pick(&self, table: TableWord, asked: Asked, slot: Slot) -> u16 {
        self.trail.borrow_mut().picked = table.discipline().pins_all();
        pins::pick(self, table, asked, slot)
    }

    fn attempt(&self, table: TableWord, asked: Asked, hash: FlowHash, proposal: Proposal) -> Verdict {
        let ways = self.pin_bucket(hash.spread()).into_iter().flat_map(|bucket| &bucket.0);
        let mut all = ways.map(|way| Pin::from_bits(self.word(way)));
        let own = all.find(|pin| pin.tag() == pins::tag(hash));
        let now = Pin::age_of(self.clock());
        if own.is_some_and(|pin| pins::follows(self, asked, pin, now)) {
            let mut trail = self.trail.borrow_mut();
            (trail.picked, trail.pinned) = (false, true);
        }
        pins::attempt(self, table, asked, hash, proposal)
    }

    fn pin_bucket(&self, spread: u32) -> Option<&PinBucket> {
        Some(&self.bucket.get_or_init(|| (spread, self.image.pins.bucket(spread))).1)
    }

    fn rooms(&self) -> Rooms {
        let Meta { source_ports, buckets_before, .. } = self.image.meta;
        let buckets = u64::from(self.image.connections.buckets());
        Rooms::new(buckets | u64::from(buckets_before) << 32, source_ports)
    }

    fn connection_bucket(&self, index: u32) -> Option<&PinBucket> {
        if let Some(bucket) = self.buckets.get(&index) {
            return Some(bucket);
        }
        Some(self.buckets.insert(index, Box::new(self.image.connections.bucket(index)?)))
    }

    fn record(&self, position: u32) -> Option<&Record> {
        if let Some(record) = self.records.get(&position) {
            return Some(record);
        }
        Some(self.records.insert(position, Box::new(self.image.connections.record(position)?)))
    }

    fn source(&self, index: u32) -> Option<&Source> {
        self.image.sources.get(index as usize)
    }

    fn clock(&self) -> u64 {
        coarse_ns()
    }

    fn add_failed(&self, _: u16) {}

    fn closing(&self, table: u16) -> u64 {
        self.image.table_states.get(usize::from(table)).map_or(0, |state| state.closing)
    }

    /// As if nobody else came.
    fn next_turn(&self, table: u16) -> u32 {
        self.image.table_states.get(usize::from(table)).map_or(0, |state| state.turn as u32)
    }

    fn random(&self) -> u32 {
        0
    }

    fn load(&self, _: u16) -> Option<&Load> {
        None
    }

    /// As if this were the first after a quiet time.
    fn admit(&self, limited: Limited) -> bool {
        let Meta { pin_rate, icmp_rate, .. } = self.image.meta;
        if limited.is_pin() { pin_rate > 0 } else { icmp_rate > 0 }
    }

    fn count_pin(&self, event: PinEvent) {
        let mut trail = self.trail.borrow_mut();
        // A flow without room for its pin goes where it needs none.
        trail.picked &= event != PinEvent::FailedNew && event != PinEvent::FailedOld;
        trail.pins.push(event);
    }

    fn count_outcome(&self, outcome: Outcome) {
        self.trail.borrow_mut().outcomes.push(outcome);
    }

    fn count_vip(&self, vip: u32, bytes: u64) {
        self.trail.borrow_mut().vip = Some((vip, Traffic { packets: 1, bytes }));
    }

    fn count_reply(&self, id: u16, reply: Reply) {
        self.trail.borrow_mut().reply = Some((id, reply));
    }

    fn count_backend(&self, id: u16, bytes: u64) {
        self.trail.borrow_mut().backend = Some((id, Traffic { packets: 1, bytes }));
    }
}
