//! What a packet of one table meets: slots, pins and backends in ordinary memory, for the packet path's own rule. It knows
//! neither changes nor time.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

use lb_common::abi::{
    BACKEND_NOBODY, Backend, Discipline, Egress, Features, Interface, Load, PINS_PER_BUCKET, Pin, PinBucket,
    PortRule, PrefixLengths, TableWord, Vip4Bucket, Vip6Bucket, VipWord,
};
use lb_common::allowance::Limited;
use lb_common::flow::FlowHash;
use lb_common::outcome::Outcome;
use lb_common::pins::{self, Asked, PinEvent, Says};
use lb_common::slots::{self, Slot};
use lb_common::tables::Tables;

/// The number of the one table.
const TABLE: u16 = 0;

pub struct Memory {
    pub slots: Vec<Slot>,
    pub backends: Vec<Backend>,
    buckets: Vec<PinBucket>,
    word: TableWord,
    pub now_ns: u64,
    failed: Cell<u64>,
    events: [Cell<u64>; PinEvent::ALL.len()],
}

impl Memory {
    /// Slots that lead to nobody, and room for pins, rounded up to a power of two.
    pub fn new(log2_length: u32, pins: usize) -> Self {
        let buckets = pins.div_ceil(PINS_PER_BUCKET).next_power_of_two();
        Self {
            slots: vec![Slot::clean(BACKEND_NOBODY); 1 << log2_length],
            backends: Vec::new(),
            buckets: (0..buckets).map(|_| PinBucket::default()).collect(),
            word: TableWord::new(0, log2_length, Discipline::Hash),
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

    /// Pins that could not be made.
    pub fn failed(&self) -> u64 {
        self.failed.get()
    }

    pub fn reserved(&self) -> u64 {
        (self.buckets.len() * size_of::<PinBucket>()) as u64
    }

    /// The slot that a pin belongs to.
    pub fn slot_of(&self, pin: Pin) -> usize {
        self.word.slot(pin.tag()) as usize
    }

    /// Shows all pins and takes away those that `gone` picks. Returns how many these were.
    pub fn sweep(&self, mut gone: impl FnMut(Pin) -> bool) -> u64 {
        let mut swept = 0;
        for place in self.buckets.iter().flat_map(|bucket| &bucket.0) {
            let pin = Pin::from_bits(place.load(Ordering::Relaxed));
            if !pin.is_free() && gone(pin) {
                AtomicU64::store(place, 0, Ordering::Relaxed);
                swept += 1;
            }
        }
        swept
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
        Some(self.word)
    }
    fn slot(&self, _: u32, index: u32) -> Option<Slot> {
        self.slots.get(index as usize).copied()
    }
    fn backend(&self, id: u16) -> Option<&Backend> {
        self.backends.get(usize::from(id))
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
