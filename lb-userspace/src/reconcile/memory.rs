//! The part of the tables that decides where flows go, in ordinary memory that packets and an agent share: so the packet
//! path's own rule and the agent's own care meet without a kernel, in a time that is told. For tests and benches.

#![allow(unsafe_code, reason = "buckets of pins are seen as words, as in the map")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lb_common::abi::{
    Backend, BackendKind, Load, Meta, PINS_PER_BUCKET, Pin, PinBucket, SLOTS_PER_ROW, TableState, TableWord,
};
use lb_common::allowance::Limited;
use lb_common::flow::FlowHash;
use lb_common::outcome::Outcome;
use lb_common::pins::{Asked, PinEvent, Says};
use lb_common::slots::{self, Slot};
use lb_common::tables::Tables;

use super::image::Image;
use super::op::MapOp;
use super::pins::{PinWords, Pins};
use super::plan::PlanError;
use super::sweep::drop_pins;
use super::tracking::Hands;
use crate::capacity::Capacity;

struct Buckets(Vec<PinBucket>);

const _: () = assert!(size_of::<PinBucket>() == PINS_PER_BUCKET * size_of::<AtomicU64>());

impl PinWords for Buckets {
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: a bucket is an array of words and nothing else (repr(C), asserted above); the slice lives as long as
        // the vector, which never changes its length.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * PINS_PER_BUCKET) }
    }
}

/// Words of a `TableState` that packets read or write.
#[derive(Default)]
struct State {
    failed: AtomicU64,
    closing: AtomicU64,
    turn: AtomicU64,
}

/// A row is the same for all backends but for its flags: all that the rule asks of it.
const ROWS: [Backend; 4] = [row(0), row(1), row(2), row(3)];

const fn row(flags: u8) -> Backend {
    Backend {
        path: 0,
        kind: BackendKind::Ipip4 as u8,
        flags,
        outer_sum: 0,
        port: lb_common::wire::Be16::new(0),
        overhead: 0,
        address: [0; 2],
        identity: 0,
        spare: [0; 3],
    }
}

/// What packets meet. Every word changes as in the maps: whole, by whoever holds a reference.
pub struct Memory {
    tables: Vec<AtomicU64>,
    states: Vec<State>,
    slots: Vec<AtomicU32>,
    flags: Vec<AtomicU8>,
    loads: Vec<Load>,
    buckets: Arc<Buckets>,
    clock_ns: AtomicU64,
    /// Whether no pin of a new flow, or of an old one, may be made.
    refuses: [AtomicBool; 2],
    dice: AtomicU64,
    events: [AtomicU64; PinEvent::ALL.len()],
}

impl Memory {
    /// For so many backend ids.
    pub fn new(capacity: &Capacity, ids: u16) -> Self {
        fn of<T: Default>(count: usize) -> Vec<T> {
            (0..count).map(|_| T::default()).collect()
        }
        Self {
            tables: of(capacity.tables as usize),
            states: of(capacity.tables as usize),
            slots: of((capacity.slot_rows * SLOTS_PER_ROW) as usize),
            flags: of(usize::from(ids)),
            loads: of(usize::from(ids)),
            buckets: Arc::new(Buckets(of(capacity.pin_buckets as usize))),
            // Far from where ages wrap.
            clock_ns: AtomicU64::new(1 << 40),
            refuses: Default::default(),
            dice: AtomicU64::new(1),
            events: Default::default(),
        }
    }

    /// The backend of a packet, by the slot rule.
    pub fn steer(&self, table: u16, hash: FlowHash, says: Says) -> Result<u16, Outcome> {
        steer(self, table, hash, says)
    }

    /// Carries one operation out; false where what hangs on it must not be. A grace is for who runs packets.
    pub fn apply(&self, op: &MapOp) -> bool {
        match op {
            MapOp::SetTableWord { table, word } => set(&self.tables[usize::from(*table)], word.bits()),
            MapOp::WriteTableState { table, state } => self.write_state(*table, state),
            MapOp::SetClosing { table, closing } => set(&self.states[usize::from(*table)].closing, *closing),
            MapOp::ExpectFailed { table, failed } => return self.failed(*table) == *failed,
            MapOp::WriteSlots { first, words } => {
                for (slot, word) in self.slots[*first as usize..].iter().zip(words) {
                    slot.store(*word, Ordering::Release);
                }
            }
            MapOp::WriteBackend { id, backend } => self.set_flags(*id, backend.flags),
            MapOp::SetFlags { id, flags } => self.set_flags(*id, *flags),
            MapOp::DropPins { ids } => _ = drop_pins(self.buckets.words(), ids),
            MapOp::SetLoadWeight { id, weight } => set(&self.loads[usize::from(*id)].weight, *weight),
            MapOp::WriteEgress { .. }
            | MapOp::WriteSource { .. }
            | MapOp::DropConnections { .. }
            | MapOp::SetPath { .. }
            | MapOp::ResetBackendTraffic { .. }
            | MapOp::ResetVipTraffic { .. }
            | MapOp::SetPools { .. }
            | MapOp::SetServer { .. }
            | MapOp::RemoveServer { .. }
            | MapOp::WriteVips4 { .. }
            | MapOp::WriteVips6 { .. }
            | MapOp::WriteRules { .. }
            | MapOp::SetFilterWord { .. }
            | MapOp::SetVipWord4 { .. }
            | MapOp::SetVipWord6 { .. }
            | MapOp::SetPrefixLengths4 { .. }
            | MapOp::SetPrefixLengths6 { .. }
            | MapOp::Grace => {}
        }
        true
    }

    fn write_state(&self, table: u16, state: &TableState) {
        let words = &self.states[usize::from(table)];
        set(&words.failed, state.failed);
        set(&words.closing, state.closing);
        set(&words.turn, state.turn);
    }

    fn set_flags(&self, id: u16, flags: u8) {
        self.flags[usize::from(id)].store(flags, Ordering::Release);
    }

    /// Lets time pass.
    pub fn pass(&self, time: Duration) {
        self.clock_ns.fetch_add(time.as_nanos() as u64, Ordering::SeqCst);
    }

    /// Whether pins of new flows can be made, and those of old ones, as far as it is not for their room.
    pub fn admit_pins(&self, new: bool, old: bool) {
        self.refuses[0].store(!new, Ordering::SeqCst);
        self.refuses[1].store(!old, Ordering::SeqCst);
    }

    pub fn failed(&self, table: u16) -> u64 {
        self.states[usize::from(table)].failed.load(Ordering::SeqCst)
    }

    pub fn count(&self, event: PinEvent) -> u64 {
        self.events[event as usize].load(Ordering::Relaxed)
    }

    pub fn pins(&self) -> Pins {
        Pins::of(Arc::clone(&self.buckets) as Arc<dyn PinWords>)
    }

    /// A slot, counted over the whole map.
    pub fn slot_at(&self, index: u32) -> Slot {
        Slot::from_bits(self.slots[index as usize].load(Ordering::Acquire))
    }
}

fn set(place: &AtomicU64, word: u64) {
    place.store(word, Ordering::Release);
}

/// What `forward` does between the hash of a packet and its backend.
pub fn steer<T: Tables>(tables: &T, table: u16, hash: FlowHash, says: Says) -> Result<u16, Outcome> {
    let found = slots::find(tables, table, hash)?;
    if found.slot.is_clean() {
        return Ok(found.slot.cur());
    }
    tables.decide(found.table, Asked::new(table, says), hash, found.slot).backend()
}

/// What `Tables` asks that the slot rule does not: there is none of it.
macro_rules! slot_rule_alone {
    () => {
        fn features(&self) -> lb_common::abi::Features {
            lb_common::abi::Features::default()
        }
        fn hash_key(&self, _: usize) -> u64 {
            0
        }
        fn vip_index(&self) -> Option<&lb_common::abi::VipIndex> {
            None
        }
        fn vip4_bucket(&self, _: u32) -> Option<&lb_common::abi::Vip4Bucket> {
            None
        }
        fn vip6_bucket(&self, _: u32) -> Option<&lb_common::abi::Vip6Bucket> {
            None
        }
        fn port_rule(&self, _: u32) -> Option<&lb_common::abi::PortRule> {
            None
        }
        fn egress(&self, _: u16) -> Option<&lb_common::abi::Egress> {
            None
        }
        fn interface(&self, _: u32) -> Option<&lb_common::abi::Interface> {
            None
        }
        fn server(&self, _: &lb_common::quic::ServerKey) -> Option<u16> {
            None
        }
        fn count_outcome(&self, _: lb_common::outcome::Outcome) {}
        fn count_vip(&self, _: u32, _: u64) {}
        fn count_backend(&self, _: u16, _: u64) {}
    };
}
#[cfg(test)]
pub(crate) use slot_rule_alone;

impl Tables for Memory {
    slot_rule_alone!();

    fn table_word(&self, table: u16) -> Option<TableWord> {
        let word = self.tables.get(usize::from(table))?;
        Some(TableWord::from_bits(word.load(Ordering::Acquire)))
    }
    fn slot(&self, first_row: u32, index: u32) -> Option<Slot> {
        let word = self.slots.get((first_row * SLOTS_PER_ROW + index) as usize)?;
        Some(Slot::from_bits(word.load(Ordering::Acquire)))
    }
    fn backend(&self, id: u16) -> Option<&Backend> {
        let flags = self.flags.get(usize::from(id))?.load(Ordering::Acquire);
        ROWS.get(usize::from(flags))
    }
    fn pin_bucket(&self, spread: u32) -> Option<&PinBucket> {
        let buckets = &self.buckets.0;
        buckets.get(spread as usize & (buckets.len() - 1))
    }
    fn clock(&self) -> u64 {
        self.clock_ns.load(Ordering::SeqCst)
    }
    fn add_failed(&self, table: u16) {
        self.states[usize::from(table)].failed.fetch_add(1, Ordering::SeqCst);
    }
    fn closing(&self, table: u16) -> u64 {
        self.states[usize::from(table)].closing.load(Ordering::SeqCst)
    }
    fn next_turn(&self, table: u16) -> u32 {
        self.states[usize::from(table)].turn.fetch_add(1, Ordering::Relaxed) as u32
    }
    /// The next of a sequence that is always the same.
    fn random(&self) -> u32 {
        let turn = self.dice.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        (turn.wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 32) as u32
    }
    fn load(&self, id: u16) -> Option<&Load> {
        self.loads.get(usize::from(id))
    }
    fn admit(&self, limited: Limited) -> bool {
        let kind = usize::from(limited == Limited::OldPin);
        limited.is_pin() && !self.refuses[kind].load(Ordering::SeqCst)
    }
    fn count_pin(&self, event: PinEvent) {
        self.events[event as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// An agent's hold of a memory: what it has applied, and the memory's own time.
pub struct Held {
    pub memory: Arc<Memory>,
    pub image: Image,
    capacity: Capacity,
    origin: Instant,
}

impl Held {
    /// Of an empty memory, for so many backend ids.
    pub fn new(capacity: Capacity, ids: u16) -> Self {
        let mut image = Image::empty(&capacity, Meta::default());
        image.backends.truncate(usize::from(ids));
        image.load_weights.truncate(usize::from(ids));
        Self::with_image(capacity, image)
    }

    /// Of an empty memory, with an image of it.
    pub fn with_image(capacity: Capacity, mut image: Image) -> Self {
        let memory = Memory::new(&capacity, image.backends.len() as u16);
        image.pins = memory.pins();
        Self { memory: Arc::new(memory), image, capacity, origin: Instant::now() }
    }
}

impl Hands for Held {
    type Error = PlanError;

    fn now(&self) -> Instant {
        self.origin + Duration::from_nanos(self.memory.clock())
    }
    fn age(&self) -> u16 {
        Pin::age_of(self.memory.clock())
    }
    fn image(&self) -> &Image {
        &self.image
    }
    fn capacity(&self) -> &Capacity {
        &self.capacity
    }
    fn read_states(&mut self) {
        for (state, words) in self.image.table_states.iter_mut().zip(&self.memory.states) {
            state.failed = words.failed.load(Ordering::SeqCst);
            state.turn = words.turn.load(Ordering::SeqCst);
        }
    }
    fn apply(&mut self, op: &MapOp) -> Result<bool, PlanError> {
        let goes_on = self.memory.apply(op);
        if goes_on {
            self.image.apply(op);
        }
        Ok(goes_on)
    }
    fn set_active(&mut self, id: u16, active: u64) {
        set(&self.memory.loads[usize::from(id)].active, active);
    }
}
