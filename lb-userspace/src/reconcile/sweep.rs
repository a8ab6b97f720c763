//! Sweeps over the pins, then over the connections: takes out those whose flow has long been silent, counts the others by
//! backend, and finds slots that no pin holds any more. Goes in bounded steps; a cycle is one pass over all buckets.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lb_common::abi::{
    BACKEND_CLAIMED, BACKEND_PASS, BackendKind, PINS_PER_BUCKET, Pin, PinState, Record, SLOTS_PER_ROW,
    TableWord,
};
use lb_common::connections::{Rooms, SourceEnd, seen};
use lb_common::slots::Slot;
use lb_common::wire::PROTO_UDP;

use super::connections::Connections;
use super::desired::{Desired, meet};
use super::image::Image;
use super::moves::SLACK;
use super::pins::Pins;
use crate::config::model::Timeouts;

/// A pin of which only a SYN was seen is kept this long: the longest gap between repeated SYNs (Linux: 64 s).
const UNCONFIRMED: Duration = Duration::from_secs(64);

/// A place that is claimed is filled within microseconds: who claimed this one is no more.
const LEFTOVER: Duration = Duration::from_secs(5);

/// A unit of a pin's age.
pub const UNIT: Duration = Duration::from_nanos(1 << 31);

/// How long flows of TCP and of UDP are protected.
type Idle = (Duration, Duration);

/// What a sweep must know of tables and backends.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    /// By backend id: how long TCP and UDP flows are protected.
    pub idle: HashMap<u16, Idle>,
    /// Of a backend that is in no configuration.
    pub longest: Duration,
    /// How long connections are protected in states that pass.
    pub timeouts: Timeouts,
    /// By backend id: tables whose flows a pin may belong to. Of a backend that is not here: all of them.
    pub tables: HashMap<u16, Arc<[u16]>>,
}

impl Rules {
    /// What follows from what is desired, and from pools that tables had before.
    pub fn of(desired: &Desired, image: &Image) -> Self {
        let mut rules = Self { timeouts: desired.timeouts, ..Self::default() };
        let tables: Vec<(u16, [u64; 3], u8, Duration)> = (0u16..)
            .zip(&image.table_states)
            .filter_map(|(number, state)| {
                let wanted = desired.tables.get(&state.identity)?;
                let pools = [0, 1, 2].map(|word| state.pools[word] | wanted.pool_set[word]);
                Some((number, pools, wanted.protocol, wanted.idle))
            })
            .collect();
        let longest = tables.iter().map(|(.., idle)| *idle).max().unwrap_or_default();
        rules.longest = longest;
        // Backends of a pool are all alike.
        let mut alike: HashMap<[u64; 3], (Idle, Arc<[u16]>)> = HashMap::new();
        let of_pool = |pool: [u64; 3]| {
            let related = tables.iter().filter(|(_, pools, ..)| meet(*pools, pool));
            let (mut tcp, mut udp, mut of) = (Duration::ZERO, Duration::ZERO, Vec::new());
            for (number, _, protocol, idle) in related {
                let longest = if *protocol == PROTO_UDP { &mut udp } else { &mut tcp };
                *longest = (*longest).max(*idle);
                of.push(*number);
            }
            // Of a protocol that no table has any more, pins may still be there.
            let or_longest = |idle: Duration| if idle.is_zero() { longest } else { idle };
            ((or_longest(tcp), or_longest(udp)), Arc::from(of))
        };
        for (id, row) in (0u16..).zip(&image.backends).filter(|(_, row)| row.identity != 0) {
            if let Some(backend) = desired.backends.get(&row.identity) {
                let (idle, of) = alike.entry(backend.pool).or_insert_with(|| of_pool(backend.pool));
                rules.idle.insert(id, *idle);
                rules.tables.insert(id, Arc::clone(of));
            }
        }
        rules
    }

    /// Of a backend whose flows of TCP and of UDP are protected so long.
    fn limits(&self, (tcp, udp): (Duration, Duration)) -> Limits {
        let Timeouts { syn, fin, reset: _ } = self.timeouts;
        Limits {
            // An age is rounded down, twice.
            pins: [tcp.min(UNCONFIRMED), tcp, tcp, udp].map(|idle| units(idle + SLACK) + 2),
            connections: [syn, tcp, fin, udp].map(limit),
        }
    }

    /// By backend id.
    fn all_limits(&self, ids: usize) -> Vec<Limits> {
        let mut all = vec![self.limits((self.longest, self.longest)); ids];
        for (id, idle) in &self.idle {
            if let Some(limits) = all.get_mut(usize::from(*id)) {
                *limits = self.limits(*idle);
            }
        }
        all
    }
}

/// Units of age that a flow may be silent for, by `PinState`.
#[derive(Debug, Clone, Copy)]
struct Limits {
    pins: [u32; 4],
    connections: [u32; 4],
}

fn units(time: Duration) -> u32 {
    (time.as_nanos() / UNIT.as_nanos()) as u32
}

/// Of a connection. Both ages are rounded down: up to a unit of those that are between them may not have passed.
fn limit(idle: Duration) -> u32 {
    units(idle) + 1
}

fn is_reset(record: &Record) -> bool {
    record.0[Record::PORTS].load(Ordering::Acquire) & seen::RESET != 0
}

/// What names a backend, as the last cycle found it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    pub pins: u32,
    /// By `PinState`.
    pub connections: [u32; 4],
    /// Flows of both that have not ended.
    pub active: u32,
}

impl Held {
    pub fn is_empty(&self) -> bool {
        self.pins == 0 && self.connections == [0; 4]
    }
}

/// All that is swept: words that packets change meanwhile, and the records of those that are connections.
#[derive(Clone, Copy, Default)]
pub struct Places<'p> {
    pub pins: &'p [AtomicU64],
    pub connections: &'p [AtomicU64],
    pub records: &'p [Record],
}

impl<'p> Places<'p> {
    pub fn of(pins: &'p Pins, connections: &'p Connections) -> Self {
        Self { pins: pins.words(), connections: connections.words(), records: connections.records() }
    }

    fn len(&self) -> usize {
        self.pins.len() + self.connections.len()
    }
}

/// Slots of a table that have had `P` and not `D` since the cycle began.
struct Candidates {
    word: TableWord,
    slots: Vec<(u32, Slot)>,
    held: Vec<bool>,
}

/// One pass.
struct Cycle {
    /// Over pins, then connections.
    next: usize,
    began: Instant,
    held: Vec<Held>,
    pins: u64,
    connections: u64,
    expired: u64,
    candidates: HashMap<u16, Candidates>,
    /// The same by their first slot. No two tables share one.
    places: BTreeMap<u32, u16>,
    rules: Rules,
    /// By backend id.
    limits: Vec<Limits>,
    /// Of connections that were reset, and of places that were claimed.
    reset: u32,
    leftover: u32,
    /// Which ports places stand for, and by backend id, whether it knows clients by them.
    rooms: Rooms,
    knows_ports: Vec<bool>,
}

/// What a whole cycle found.
#[derive(Debug, Clone, Default)]
pub struct Found {
    /// By backend id.
    pub held: Vec<Held>,
    /// Pins that there are.
    pub pins: u64,
    /// Places of connections that are taken.
    pub connections: u64,
    pub expired: u64,
    pub took: Duration,
    /// Slots without a pin elsewhere, as words without `P`.
    pub clear: Vec<(u32, u32)>,
}

impl Found {
    pub fn of(&self, id: u16) -> Held {
        self.held.get(usize::from(id)).copied().unwrap_or_default()
    }
}

#[derive(Default)]
pub struct Sweeper {
    cycle: Option<Cycle>,
}

impl std::fmt::Debug for Sweeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sweeper({:?})", self.cycle.as_ref().map(|cycle| cycle.next))
    }
}

impl Sweeper {
    /// Whether a cycle is under way.
    pub fn is_busy(&self) -> bool {
        self.cycle.is_some()
    }

    /// Begins a cycle. A grace must have passed since the slots of the image were written.
    pub fn begin(&mut self, image: &Image, rules: Rules, now: Instant) {
        let (mut candidates, mut places) = (HashMap::new(), BTreeMap::new());
        for (number, word) in (0u16..).zip(image.tables.iter().map(|&bits| TableWord::from_bits(bits))) {
            if word == TableWord::default() || word.discipline().pins_all() {
                continue;
            }
            let first = word.first_row() * SLOTS_PER_ROW;
            let slots = (first..first + word.length()).map(|index| (index, image.slot(index)));
            let slots: Vec<_> = slots.filter(|(_, slot)| slot.pins() && !slot.dirty()).collect();
            if !slots.is_empty() {
                let held = vec![false; word.length() as usize];
                places.insert(first, number);
                candidates.insert(number, Candidates { word, slots, held });
            }
        }
        self.cycle = Some(Cycle {
            next: 0,
            began: now,
            held: vec![Held::default(); image.backends.len()],
            pins: 0,
            connections: 0,
            expired: 0,
            candidates,
            places,
            limits: rules.all_limits(image.backends.len()),
            reset: limit(rules.timeouts.reset),
            leftover: limit(LEFTOVER),
            rooms: Rooms::new(0, image.meta.source_ports),
            knows_ports: image
                .backends
                .iter()
                .map(|row| BackendKind::from_raw(row.kind).is_some_and(BackendKind::translates_source))
                .collect(),
            rules,
        });
    }

    /// Slots from `first` on have been written. Those that were at rest when the cycle began have made pins, perhaps,
    /// where it has been already.
    pub fn written(&mut self, first: u32, slots: usize) {
        let Some(cycle) = &mut self.cycle else { return };
        let end = first + slots as u32;
        for (&base, number) in cycle.places.range(..end).rev() {
            let Some(table) = cycle.candidates.get_mut(number) else { continue };
            let written = first.max(base)..end.min(base + table.word.length());
            if written.is_empty() {
                break;
            }
            for index in written {
                table.held[(index - base) as usize] = true;
            }
        }
    }

    /// Goes over so many buckets; at the end of the cycle, what it found.
    pub fn step(&mut self, places: Places<'_>, buckets: usize, age: u16, now: Instant) -> Option<Found> {
        let cycle = self.cycle.as_mut()?;
        // Claimed before the grace that the cycle began with: whoever did is gone, not slow.
        cycle.leftover = limit(LEFTOVER + now.saturating_duration_since(cycle.began));
        let (pins, all) = (places.pins.len(), places.len());
        let until = all.min(cycle.next + buckets * PINS_PER_BUCKET);
        for word in &places.pins[cycle.next.min(pins)..until.min(pins)] {
            cycle.look(word, age);
        }
        let connections = cycle.next.saturating_sub(pins)..until.saturating_sub(pins);
        let words = places.connections[connections.clone()].iter().zip(&places.records[connections.clone()]);
        for (position, (word, record)) in connections.zip(words) {
            cycle.end_misplaced(position, word, record);
            cycle.look_at_connection(word, record, age);
        }
        cycle.next = until;
        if until < all {
            return None;
        }
        let cycle = self.cycle.take()?;
        let clear = cycle.candidates.into_values().flat_map(|table| {
            let first = table.word.first_row() * SLOTS_PER_ROW;
            let free = move |(index, _): &(u32, Slot)| !table.held[(index - first) as usize];
            let settled = |(index, slot): (u32, Slot)| (index, Slot::clean(slot.cur()).bits());
            table.slots.into_iter().filter(free).map(settled).collect::<Vec<_>>()
        });
        let mut clear: Vec<_> = clear.collect();
        clear.sort_unstable();
        Some(Found {
            clear,
            pins: cycle.pins,
            connections: cycle.connections,
            held: cycle.held,
            expired: cycle.expired,
            took: now.saturating_duration_since(cycle.began),
        })
    }
}

impl Cycle {
    /// What is left of a place; one that was silent for longer than the limit is free now.
    fn aged(&mut self, word: &AtomicU64, now: u16, limit: impl FnOnce(&Self, Pin) -> u32) -> Option<Pin> {
        let mut pin = Pin::from_bits(word.load(Ordering::Acquire));
        if !pin.is_free() && pin.idle(now) > limit(self, pin) {
            // A packet may just have renewed it.
            match word.compare_exchange(pin.bits(), 0, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => {
                    self.expired += 1;
                    pin = Pin::default();
                }
                Err(now) => pin = Pin::from_bits(now),
            }
        }
        (!pin.is_free()).then_some(pin)
    }

    fn limit(&self, pin: Pin) -> u32 {
        self.limits.get(usize::from(pin.backend())).map_or(u32::MAX, |of| of.pins[pin.state() as usize])
    }

    /// What has been silent for so long that its record is asked has not changed hands since its word was read: with
    /// another owner it has another age, and stays.
    fn limit_of_connection(&self, pin: Pin, record: &Record) -> u32 {
        if pin.backend() == BACKEND_CLAIMED {
            return self.leftover;
        }
        if pin.state() == PinState::Finishing && is_reset(record) {
            return self.reset;
        }
        let limits = self.limits.get(usize::from(pin.backend()));
        limits.map_or(u32::MAX, |of| of.connections[pin.state() as usize])
    }

    /// Frees a place whose connection has another port than the place stands for (`fullnat.ports` has changed): answers
    /// do not find it, and its port is another place's.
    fn end_misplaced(&mut self, position: usize, word: &AtomicU64, record: &Record) {
        let pin = Pin::from_bits(word.load(Ordering::Acquire));
        let knows_ports = self.knows_ports.get(usize::from(pin.backend())).is_some_and(|knows| *knows);
        if pin.is_free() || pin.backend() == BACKEND_CLAIMED || !knows_ports {
            return;
        }
        let end = SourceEnd::from_bits((record.0[Record::ROW].load(Ordering::Acquire) >> 32) as u32);
        if end != self.rooms.source(position as u32)
            && word.compare_exchange(pin.bits(), 0, Ordering::SeqCst, Ordering::SeqCst).is_ok()
        {
            self.expired += 1;
        }
    }

    /// Connections hold no slot: where theirs leads is nothing to them.
    fn look_at_connection(&mut self, word: &AtomicU64, record: &Record, now: u16) {
        let limit = |cycle: &Self, pin| cycle.limit_of_connection(pin, record);
        let Some(pin) = self.aged(word, now, limit) else { return };
        self.connections += 1;
        if let Some(held) = self.held.get_mut(usize::from(pin.backend()))
            && pin.backend() != BACKEND_CLAIMED
        {
            held.connections[pin.state() as usize] += 1;
            held.active += u32::from(pin.state() != PinState::Finishing);
        }
    }

    fn look(&mut self, word: &AtomicU64, now: u16) {
        let Some(pin) = self.aged(word, now, Self::limit) else { return };
        self.pins += 1;
        if let Some(held) = self.held.get_mut(usize::from(pin.backend())) {
            held.pins += 1;
            held.active += u32::from(pin.state() != PinState::Finishing);
        }
        match self.rules.tables.get(&pin.backend()) {
            Some(tables) => {
                for table in tables.iter() {
                    if let Some(candidates) = self.candidates.get_mut(table) {
                        candidates.mark(pin);
                    }
                }
            }
            None => self.candidates.values_mut().for_each(|candidates| candidates.mark(pin)),
        }
    }
}

impl Candidates {
    /// A pin elsewhere holds its slot, however old it is. Of slots that are no candidates nobody asks.
    fn mark(&mut self, pin: Pin) {
        let slot = self.word.slot(pin.tag()) as usize;
        let first = self.word.first_row() * SLOTS_PER_ROW;
        let place = self.slots.binary_search_by_key(&(first + slot as u32), |(index, _)| *index);
        if let Ok(place) = place
            && self.slots[place].1.est() != pin.backend()
        {
            self.held[slot] = true;
        }
    }
}

/// Takes out all pins that name one of the backends: compare and delete, since packets may change them meanwhile.
pub fn drop_pins(pins: &[AtomicU64], ids: &[u16]) -> u64 {
    let mut named = vec![false; usize::from(BACKEND_PASS) + 1];
    ids.iter().for_each(|&id| named[usize::from(id)] = true);
    let mut dropped = 0;
    for word in pins {
        loop {
            let pin = Pin::from_bits(word.load(Ordering::Acquire));
            if pin.is_free() || !named[usize::from(pin.backend())] {
                break;
            }
            if word.compare_exchange(pin.bits(), 0, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                dropped += 1;
                break;
            }
        }
    }
    dropped
}
