//! Packets that go step by step: the packet path's own code runs from its beginning for every step, is told again what
//! it read before, does one thing more, and is cut off there. So a state is a value, and all ways through them are gone.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::sync::atomic::AtomicU64;

use lb_common::abi::{Backend as Row, Load, Pin, PinBucket};
use lb_common::allowance::Limited;
use lb_common::flow::FlowHash;
use lb_common::pins::{PinEvent, Says};
use lb_common::tables::Tables;
use lb_common::wire::TcpFlags;

use super::*;
use crate::reconcile::memory::{slot_rule_alone, steer};

/// The age of a pin that is used now.
pub const NOW: u16 = 512;
/// Units of age from which on a pin is old.
const OLD_AGE: u32 = 300;

const IDS: usize = 4;
const WAYS: usize = 8;

/// What packets and the agent share.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Shared {
    table: u64,
    pub slots: [u32; 3 * SLOTS_PER_ROW as usize],
    pub pins: [u64; WAYS],
    flags: [u8; IDS],
    failed: u64,
    closing: u64,
}

impl Shared {
    pub fn new(table: TableWord) -> Self {
        Self {
            table: table.bits(),
            slots: [0; 3 * SLOTS_PER_ROW as usize],
            pins: [0; WAYS],
            flags: [Row::ACCEPTING; IDS],
            failed: 0,
            closing: 0,
        }
    }

    fn apply(&mut self, op: &MapOp) {
        match op {
            MapOp::WriteSlots { first, words } => {
                self.slots[*first as usize..][..words.len()].copy_from_slice(words);
            }
            MapOp::SetTableWord { word, .. } => self.table = word.bits(),
            MapOp::SetClosing { closing, .. } => self.closing = *closing,
            MapOp::SetFlags { id, flags } => self.flags[usize::from(*id)] = *flags,
            MapOp::DropPins { ids } => {
                for pin in &mut self.pins {
                    if *pin != 0 && ids.contains(&Pin::from_bits(*pin).backend()) {
                        *pin = 0;
                    }
                }
            }
            op => unreachable!("no scenario has {op:?}"),
        }
    }
}

pub const fn tag(flow: usize) -> u32 {
    flow as u32 + 1
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    Syn,
    Data,
}

#[derive(Debug, Clone, Copy)]
pub struct Packet {
    pub flow: usize,
    pub kind: Kind,
}

/// What the agent does, one after the other.
#[derive(Debug, Clone)]
pub enum Act {
    Do(MapOp),
    /// T1 is over: this CPU has been through its first packet.
    Spoken(usize),
    /// Whether a pin leads elsewhere; where `old`, of those that are not old.
    Sweep {
        est: u16,
        old: bool,
    },
    /// The slot gets this word unless the sweep found a pin.
    Clear(Slot),
    /// Reads a pin; where that is old, takes it out, or whatever is there then.
    Look(usize),
    TakeOut {
        way: usize,
        compare: bool,
    },
    /// Somebody else's pin goes.
    Free(usize),
    /// Connections with a backend are lost, until they are somewhere for good.
    Fails(u16),
    Settles,
}

/// A guard of the packet path that is left out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Mutant {
    None,
    FailuresAreNotCounted,
    /// Who has made a pin does not see another of its flow.
    NobodyElseIsSeen,
}

#[derive(Clone)]
pub struct Scenario {
    pub shared: Shared,
    pub acts: Vec<Act>,
    /// Of each CPU.
    packets: [Vec<Packet>; 2],
    pub homes: [Option<u16>; 2],
    /// Flows whose next packet says where they are.
    pub settles: [bool; 2],
    pub admits: bool,
    /// Ways that nobody changes: to read them is no step.
    pub quiet: u8,
    pub mutant: Mutant,
    pub late: bool,
    /// Whether only ways are gone on which both CPUs have made a pin before either looks whether it is alone.
    pub meet: bool,
}

impl Scenario {
    pub fn new(shared: Shared, acts: Vec<Act>, packets: Vec<(usize, Packet)>, quiet: u8) -> Self {
        let of = |cpu| packets.iter().filter(|(on, _)| *on == cpu).map(|(_, packet)| *packet).collect();
        Self {
            shared,
            acts,
            packets: [of(0), of(1)],
            homes: [None; 2],
            settles: [false; 2],
            admits: true,
            quiet,
            mutant: Mutant::None,
            late: false,
            meet: false,
        }
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Default)]
struct Cpu {
    packet: usize,
    /// What the packet under way has read.
    log: Vec<u64>,
    /// Where it goes, once that is decided: it is not there yet.
    to: Option<u16>,
    /// Whether the packet has made a pin.
    made: bool,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Machine {
    shared: Shared,
    cpus: [Cpu; 2],
    act: usize,
    /// Packets that a grace waits for.
    waits: Option<[Option<usize>; 2]>,
    /// Stores that nobody else sees yet.
    stores: VecDeque<Store>,
    seen: u64,
    held: bool,
    homes: [Option<u16>; 2],
    settles: [bool; 2],
}

/// Of `MapOp`, what is stored: it cannot be hashed.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Store {
    Slot(u32, Vec<u32>),
    Table(u64),
    Closing(u64),
    Flags(u16, u8),
}

impl Store {
    fn of(op: &MapOp) -> Option<Self> {
        Some(match op {
            MapOp::WriteSlots { first, words } => Self::Slot(*first, words.clone()),
            MapOp::SetTableWord { word, .. } => Self::Table(word.bits()),
            MapOp::SetClosing { closing, .. } => Self::Closing(*closing),
            MapOp::SetFlags { id, flags } => Self::Flags(*id, *flags),
            _ => return None,
        })
    }

    fn apply(self, shared: &mut Shared) {
        match self {
            Self::Slot(first, words) => shared.apply(&MapOp::WriteSlots { first, words }),
            Self::Table(bits) => shared.table = bits,
            Self::Closing(closing) => shared.closing = closing,
            Self::Flags(id, flags) => shared.flags[usize::from(id)] = flags,
        }
    }
}

/// What was seen on all ways.
pub struct Seen {
    pub states: usize,
    /// The first way on which a connection broke.
    pub broken: Option<String>,
}

pub fn explore(scenario: &Scenario) -> Seen {
    let mut seen = Seen { states: 0, broken: None };
    let first = Machine {
        shared: scenario.shared.clone(),
        cpus: Default::default(),
        act: 0,
        waits: None,
        stores: VecDeque::new(),
        seen: 0,
        held: false,
        homes: scenario.homes,
        settles: scenario.settles,
    };
    let mut known = HashSet::from([first.clone()]);
    let mut open = vec![(first, Vec::new())];
    while let Some((machine, way)) = open.pop() {
        seen.states += 1;
        let mut ends = true;
        for actor in [Actor::Cpu(0), Actor::Cpu(1), Actor::Agent, Actor::Stores] {
            let mut next = machine.clone();
            let stepped = next.step(scenario, actor);
            let Some(stepped) = stepped.transpose() else { continue };
            ends = false;
            let mut way = way.clone();
            way.push(actor);
            if let Err(broken) = stepped {
                seen.broken = Some(told(scenario, &way, &broken));
                return seen;
            }
            if known.insert(next.clone()) {
                open.push((next, way));
            }
        }
        if ends && let Err(broken) = machine.probe(scenario) {
            seen.broken = Some(told(scenario, &way, &broken));
            return seen;
        }
    }
    seen
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Actor {
    Cpu(usize),
    Agent,
    /// The agent's oldest store is seen by all.
    Stores,
}

/// A way as runs of steps.
fn told(scenario: &Scenario, way: &[Actor], broken: &str) -> String {
    let mut text = String::new();
    let mut acts = scenario.acts.iter();
    for run in way.chunk_by(|one, other| one == other && *one != Actor::Agent) {
        match run[0] {
            Actor::Cpu(cpu) => text += &format!("CPU {cpu}: {} steps; ", run.len()),
            Actor::Stores => text += &format!("{} stores seen; ", run.len()),
            Actor::Agent => text += &format!("{:?}; ", acts.next()),
        }
    }
    text + broken
}

impl Machine {
    /// Lets somebody do one thing: nothing where there is nothing to do, an error where that breaks a connection.
    fn step(&mut self, scenario: &Scenario, actor: Actor) -> Result<Option<()>, String> {
        match actor {
            Actor::Cpu(cpu) => {
                let Some(&packet) = scenario.packets[cpu].get(self.cpus[cpu].packet) else { return Ok(None) };
                if let Some(id) = self.cpus[cpu].to {
                    self.pass(cpu);
                    self.arrive(packet, id)?;
                    return Ok(Some(()));
                }
                let (this, other) = (&self.cpus[cpu], &self.cpus[1 - cpu]);
                if scenario.meet && this.made && !other.made && other.packet == this.packet {
                    return Ok(None);
                }
                let (verdict, made) = advance(&mut self.shared, &mut self.cpus[cpu].log, packet, scenario);
                self.cpus[cpu].made = made;
                match verdict {
                    None => {}
                    Some(Ok(id)) => self.cpus[cpu].to = Some(id),
                    // Dropped: it is sent again.
                    Some(Err(_)) => self.pass(cpu),
                }
                Ok(Some(()))
            }
            Actor::Stores => Ok(self.stores.pop_front().map(|store| store.apply(&mut self.shared))),
            Actor::Agent => Ok(self.act(scenario)),
        }
    }

    /// The CPU is done with its packet.
    fn pass(&mut self, cpu: usize) {
        self.cpus[cpu] = Cpu { packet: self.cpus[cpu].packet + 1, ..Cpu::default() };
    }

    fn arrive(&mut self, packet: Packet, id: u16) -> Result<(), String> {
        let home = &mut self.homes[packet.flow];
        match (*home, packet.kind) {
            (Some(home), _) if home == id => Ok(()),
            (Some(home), kind) => Err(format!("{kind:?} of flow {} of {home} came to {id}", packet.flow)),
            (None, Kind::Syn) => {
                *home = Some(id);
                Ok(())
            }
            (None, Kind::Data) => {
                if self.settles[packet.flow] {
                    *home = Some(id);
                }
                Ok(())
            }
        }
    }

    fn act(&mut self, scenario: &Scenario) -> Option<()> {
        match scenario.acts.get(self.act)? {
            Act::Do(MapOp::Grace) => return self.grace(),
            Act::Do(MapOp::ExpectFailed { failed, .. }) if *failed != self.shared.failed => {
                self.store(scenario, &MapOp::SetClosing { table: 0, closing: 0 });
                // What hangs on it is left out.
                let hangs = |act: &&Act| !matches!(act, Act::Do(MapOp::ExpectFailed { .. } | MapOp::Grace));
                self.act += 1 + scenario.acts[self.act + 1..].iter().take_while(hangs).count();
                return Some(());
            }
            Act::Do(MapOp::ExpectFailed { .. }) => {}
            Act::Do(op) => self.store(scenario, op),
            Act::Spoken(cpu) if self.cpus[*cpu].packet == 0 => return None,
            Act::Spoken(_) => {}
            Act::Sweep { est, old } => {
                self.held = self.shared.pins.iter().map(|&bits| Pin::from_bits(bits)).any(|pin| {
                    let counts = !(*old && pin.idle(NOW) > OLD_AGE);
                    !pin.is_free() && pin.tag() != 99 && pin.backend() != *est && counts
                });
            }
            Act::Clear(slot) if !self.held => self.shared.slots[SLOT as usize] = slot.bits(),
            Act::Clear(_) => {}
            Act::Look(way) => self.seen = self.shared.pins[*way],
            Act::TakeOut { way, compare } => {
                let pin = &mut self.shared.pins[*way];
                let old = Pin::from_bits(self.seen).idle(NOW) > OLD_AGE;
                if old && (!compare || *pin == self.seen) {
                    *pin = 0;
                }
            }
            Act::Free(way) => self.shared.pins[*way] = 0,
            Act::Fails(id) => {
                self.homes.iter_mut().filter(|home| **home == Some(*id)).for_each(|home| *home = None);
            }
            Act::Settles => self.settles = [true; 2],
        }
        self.act += 1;
        Some(())
    }

    fn store(&mut self, scenario: &Scenario, op: &MapOp) {
        match Store::of(op).filter(|_| scenario.late) {
            Some(store) => self.stores.push_back(store),
            None => self.shared.apply(op),
        }
    }

    /// Over once all packets are that were under way when it began, and all stores are seen.
    fn grace(&mut self) -> Option<()> {
        let under_way = |cpu: &Cpu| (!cpu.log.is_empty()).then_some(cpu.packet);
        let waits = match self.waits {
            Some(waits) => waits,
            None if self.stores.is_empty() => {
                self.waits = Some([under_way(&self.cpus[0]), under_way(&self.cpus[1])]);
                return Some(());
            }
            None => return None,
        };
        if (0..2).any(|cpu| waits[cpu] == Some(self.cpus[cpu].packet)) {
            return None;
        }
        self.waits = None;
        self.act += 1;
        Some(())
    }

    /// When all is done, every connection is still where it was.
    fn probe(&self, scenario: &Scenario) -> Result<(), String> {
        for flow in 0..2 {
            let (mut machine, mut log) = (self.clone(), Vec::new());
            let packet = Packet { flow, kind: Kind::Data };
            loop {
                match advance(&mut machine.shared, &mut log, packet, scenario).0 {
                    None => {}
                    Some(Err(_)) => break,
                    Some(Ok(id)) => {
                        machine.arrive(packet, id).map_err(|broken| format!("at the end, {broken}"))?;
                        break;
                    }
                }
            }
        }
        Ok(())
    }
}

/// One step of a packet: its verdict, if that was the last, and whether it has made a pin.
fn advance(
    shared: &mut Shared,
    log: &mut Vec<u64>,
    packet: Packet,
    scenario: &Scenario,
) -> (Option<Result<u16, Outcome>>, bool) {
    let flags = match packet.kind {
        Kind::Syn => TcpFlags::SYN,
        Kind::Data => TcpFlags::ACK,
    };
    let hash = FlowHash::from_bits(u64::from(tag(packet.flow)) << 32);
    let stepped = Stepped {
        shared: RefCell::new(shared),
        log: RefCell::new(log),
        scenario,
        bucket: PinBucket::default(),
        read: Cell::new(0),
        done: Cell::new(false),
        cut: Cell::new(false),
        made: Cell::new(None),
    };
    let verdict = steer(&stepped, 0, hash, Says::tcp(TcpFlags { data_offset: 5 << 4, flags }));
    ((!stepped.cut.get()).then_some(verdict), stepped.made.get().is_some())
}

/// The tables as a packet meets them that has done so much, and may do one thing more.
struct Stepped<'s> {
    shared: RefCell<&'s mut Shared>,
    log: RefCell<&'s mut Vec<u64>>,
    scenario: &'s Scenario,
    /// Places of pins; their words lie in `shared`.
    bucket: PinBucket,
    /// How much of the log has been told again.
    read: Cell<usize>,
    done: Cell<bool>,
    /// Whether it wanted to do more: then its verdict is none.
    cut: Cell<bool>,
    /// The way in which it has made a pin, for the scan that follows.
    made: Cell<Option<(usize, u8)>>,
}

impl Stepped<'_> {
    fn step(&self, act: impl FnOnce(&mut Shared) -> u64) -> u64 {
        let mut log = self.log.borrow_mut();
        if let Some(&word) = log.get(self.read.get()) {
            self.read.set(self.read.get() + 1);
            return word;
        }
        if self.done.replace(true) {
            self.cut.set(true);
            return 0;
        }
        let word = act(&mut self.shared.borrow_mut());
        log.push(word);
        self.read.set(log.len());
        word
    }

    fn way(&self, place: &AtomicU64) -> usize {
        self.bucket.0.iter().position(|way| std::ptr::eq(way, place)).expect("a place in the one bucket")
    }

    /// Whether the scan after an insertion does not see a way, by mutation.
    fn is_blind(&self, way: usize) -> bool {
        match self.made.get().filter(|_| self.scenario.mutant == Mutant::NobodyElseIsSeen) {
            Some((made, left)) if left > 0 => {
                self.made.set(Some((made, left - 1)));
                way != made
            }
            _ => false,
        }
    }
}

const ROWS: [Row; 4] = {
    let free = Row {
        path: 0,
        kind: 0,
        flags: 0,
        outer_sum: 0,
        port: wire::Be16::new(0),
        overhead: 0,
        address: [0; 2],
        identity: 0,
        spare: [0; 3],
    };
    [free, Row { flags: 1, ..free }, Row { flags: 2, ..free }, Row { flags: 3, ..free }]
};

impl Tables for Stepped<'_> {
    slot_rule_alone!();

    fn table_word(&self, _: u16) -> Option<TableWord> {
        Some(TableWord::from_bits(self.step(|shared| shared.table)))
    }
    fn slot(&self, first_row: u32, index: u32) -> Option<Slot> {
        let index = (first_row * SLOTS_PER_ROW + index) as usize;
        Some(Slot::from_bits(self.step(|shared| u64::from(shared.slots[index])) as u32))
    }
    fn backend(&self, id: u16) -> Option<&Row> {
        let flags = self.step(|shared| u64::from(shared.flags[usize::from(id)]));
        ROWS.get(flags as usize)
    }
    fn word(&self, place: &AtomicU64) -> u64 {
        let way = self.way(place);
        let word = if self.scenario.quiet & 1 << way != 0 {
            self.shared.borrow().pins[way]
        } else {
            self.step(|shared| shared.pins[way])
        };
        if self.is_blind(way) { 0 } else { word }
    }
    fn exchange(&self, place: &AtomicU64, old: u64, new: u64) -> bool {
        let way = self.way(place);
        let exchanged = self.step(|shared| {
            let is_old = shared.pins[way] == old;
            if is_old {
                shared.pins[way] = new;
            }
            u64::from(is_old)
        });
        if exchanged != 0 && old == 0 {
            self.made.set(Some((way, WAYS as u8)));
        }
        exchanged != 0
    }
    fn pin_bucket(&self, _: u32) -> Option<&PinBucket> {
        Some(&self.bucket)
    }
    fn clock(&self) -> u64 {
        u64::from(NOW) << 31
    }
    fn add_failed(&self, _: u16) {
        let counts = u64::from(self.scenario.mutant != Mutant::FailuresAreNotCounted);
        self.step(|shared| {
            shared.failed += counts;
            0
        });
    }
    fn closing(&self, _: u16) -> u64 {
        self.step(|shared| shared.closing)
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
        self.scenario.admits
    }
    fn count_pin(&self, _: PinEvent) {}
}
