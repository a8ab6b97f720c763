//! What a packet of one table meets: slots, pins and backends in ordinary memory, for the packet path's own rule. It knows
//! neither changes nor time.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

use lb_common::abi::{
    BACKEND_NOBODY, Backend, Egress, Features, Interface, Load, Meta, PinBucket, PortRule, PrefixLengths,
    SLOTS_PER_ROW, TableWord, Vip4Bucket, Vip6Bucket, VipWord,
};
use lb_common::allowance::Limited;
use lb_common::flow::FlowHash;
use lb_common::outcome::Outcome;
use lb_common::pins::{self, Asked, PinEvent, Says};
use lb_common::quic::ServerKey;
use lb_common::slots::{self, Slot};
use lb_common::tables::Tables;
use lb_userspace::capacity::Capacity;
use lb_userspace::config::model::Limits;
use lb_userspace::reconcile::image::Image;
use lb_userspace::reconcile::op::MapOp;
use lb_userspace::reconcile::sweep::drop_pins;

/// The number of the one table.
pub const TABLE: u16 = 0;

pub struct Memory {
    pub capacity: Capacity,
    /// Everything but pins.
    pub image: Image,
    buckets: Vec<PinBucket>,
    pub now_ns: u64,
    failed: Cell<u64>,
    events: [Cell<u64>; PinEvent::ALL.len()],
}

impl Memory {
    /// Nobody, room for so many slots, and for pins, rounded up to a power of two.
    pub fn new(slots: u32, pins: u32) -> Self {
        let capacity = Capacity::new(&Limits { vips: 1, backends: 1, slots, pins });
        Self {
            capacity,
            image: Image::empty(&capacity, Meta::default()),
            buckets: (0..capacity.pin_buckets).map(|_| PinBucket::default()).collect(),
            now_ns: 0,
            failed: Cell::default(),
            events: Default::default(),
        }
    }

    /// The backend of a packet, by the slot rule.
    pub fn steer(&self, hash: FlowHash, says: Says) -> u16 {
        let Ok(found) = slots::find(self, TABLE, hash) else { return BACKEND_NOBODY };
        if found.slot.is_clean() {
            return found.slot.cur();
        }
        let verdict = pins::decide(self, found.table, Asked::new(TABLE, says), hash, found.slot);
        verdict.backend().unwrap_or(BACKEND_NOBODY)
    }

    pub fn count(&self, event: PinEvent) -> u64 {
        self.events[event as usize].get()
    }

    pub fn reserved(&self) -> u64 {
        (self.buckets.len() * size_of::<PinBucket>()) as u64
    }

    /// What the agent reads of the maps before it judges.
    pub fn refresh(&mut self) {
        self.image.table_states[usize::from(TABLE)].failed = self.failed.get();
    }

    /// Carries operations out, in order. No packet comes in between: a grace is over at once.
    pub fn apply(&mut self, ops: &[MapOp]) {
        for op in ops {
            match op {
                MapOp::ExpectFailed { failed, .. } if *failed != self.failed.get() => return,
                MapOp::DropPins { id } => {
                    self.with_pins(|pins| drop_pins(pins, *id));
                }
                op => self.image.apply(op),
            }
        }
    }

    /// Lets somebody work on all pins, as the agent does on the map.
    pub fn with_pins<T>(&mut self, work: impl FnOnce(&[AtomicU64]) -> T) -> T {
        let words = || self.buckets.iter().flat_map(|bucket| &bucket.0);
        let copy: Vec<AtomicU64> = words().map(|word| AtomicU64::new(word.load(Ordering::Relaxed))).collect();
        let result = work(&copy);
        for (word, copy) in words().zip(copy) {
            word.store(copy.into_inner(), Ordering::Relaxed);
        }
        result
    }
}

impl Tables for Memory {
    fn features(&self) -> Features {
        Features::default()
    }
    fn hash_key(&self, _: usize) -> u64 {
        0
    }
    fn vip_word4(&self) -> VipWord {
        VipWord::default()
    }
    fn vip_word6(&self) -> VipWord {
        VipWord::default()
    }
    fn vip4_bucket(&self, _: u32) -> Option<&Vip4Bucket> {
        None
    }
    fn vip6_bucket(&self, _: u32) -> Option<&Vip6Bucket> {
        None
    }
    fn vip_filter(&self, _: u32) -> u64 {
        0
    }
    fn prefix_lengths4(&self) -> PrefixLengths {
        PrefixLengths::default()
    }
    fn prefix_lengths6(&self) -> PrefixLengths {
        PrefixLengths::default()
    }
    fn port_rule(&self, _: u32) -> Option<&PortRule> {
        None
    }
    fn table_word(&self, _: u16) -> Option<TableWord> {
        self.image.tables.get(usize::from(TABLE)).map(|&bits| TableWord::from_bits(bits))
    }
    fn slot(&self, first_row: u32, index: u32) -> Option<Slot> {
        Some(self.image.slot(first_row * SLOTS_PER_ROW + index))
    }
    fn backend(&self, id: u16) -> Option<&Backend> {
        self.image.backends.get(usize::from(id))
    }
    fn egress(&self, _: u16) -> Option<&Egress> {
        None
    }
    fn interface(&self, _: u32) -> Option<&Interface> {
        None
    }
    fn pin_bucket(&self, spread: u32) -> Option<&PinBucket> {
        self.buckets.get(spread as usize & (self.buckets.len() - 1))
    }
    fn clock(&self) -> u64 {
        self.now_ns
    }
    fn add_failed(&self, _: u16) {
        self.failed.set(self.failed.get() + 1);
    }
    fn closing(&self, _: u16) -> u64 {
        0
    }
    fn next_turn(&self, _: u16) -> u32 {
        0
    }
    fn random(&self) -> u32 {
        0
    }
    fn server(&self, _: &ServerKey) -> Option<u16> {
        None
    }

    fn load(&self, _: u16) -> Option<&Load> {
        None
    }
    fn admit(&self, _: Limited) -> bool {
        true
    }
    fn count_outcome(&self, _: Outcome) {}
    fn count_vip(&self, _: u32, _: u64) {}
    fn count_backend(&self, _: u16, _: u64) {}
    fn count_pin(&self, event: PinEvent) {
        let count = &self.events[event as usize];
        count.set(count.get() + 1);
    }
}
