//! xlb's way: slots that remember flows only while they are on the move. The packet path's own rule over memory that the
//! agent's own engine changes.

use std::time::{Duration, Instant};

use lb_common::abi::{BACKEND_NOBODY, Backend, Pin, SLOTS_PER_ROW};
use lb_common::flow::FlowHash;
use lb_common::pins::{PinEvent, Says};
use lb_common::slots::Slot;
use lb_common::wire::TcpFlags;
use lb_userspace::capacity::RESERVED_SLOT_ROWS;
use lb_userspace::reconcile::moves::{Course, Moves, runs};
use lb_userspace::reconcile::op::MapOp;
use lb_userspace::reconcile::sweep::{Rules, Sweeper, drop_pins};

use super::memory::{Memory, TABLE};
use super::model::{self, Pool};
use super::steering::{Packet, State, Steering};

/// The protected idle time of TCP.
pub const PROTECTED: Duration = Duration::from_secs(15 * 60);

/// All pins are looked at this often.
const SWEEP: Duration = Duration::from_secs(30);

const FIRST: u32 = RESERVED_SLOT_ROWS * SLOTS_PER_ROW;

pub struct Slots {
    memory: Memory,
    begin: Instant,
    moves: Moves,
    swept: Duration,
    pins: u64,
}

impl Slots {
    pub fn new(pins: u32) -> Self {
        let begin = Instant::now();
        Self {
            memory: Memory::new(model::log2_length(), pins),
            begin,
            moves: Moves::new(begin),
            swept: Duration::ZERO,
            pins: 0,
        }
    }

    /// The words of slots that are not as they should be.
    fn changed(&self, change: impl Fn(usize, Slot) -> Slot) -> Vec<MapOp> {
        let slots =
            (0..1 << model::log2_length()).map(|slot| (slot, self.memory.image.slot(FIRST + slot as u32)));
        let words = slots.map(|(slot, word)| (FIRST + slot as u32, word, change(slot, word)));
        runs(words.filter(|(_, old, new)| old != new).map(|(index, _, new)| (index, new.bits())))
    }

    /// Old flows of a backend that died leave at once.
    fn leave_the_dead(&mut self, id: u16) {
        let left = self.changed(|_, slot| match slot.est() {
            est if est == id => Slot::new(slot.cur(), slot.cur(), false, true),
            _ => slot,
        });
        self.memory.apply(&left);
        self.memory.with_pins(|pins| drop_pins(pins, id));
    }

    fn sweep(&mut self, now: Duration) {
        let (at, age) = (self.begin + now, Pin::age_of(now.as_nanos() as u64));
        let mut sweeper = Sweeper::default();
        sweeper.begin(&self.memory.image, Rules { longest: PROTECTED, ..Rules::default() }, at);
        let found = self.memory.with_pins(|pins| sweeper.step(pins, pins.len(), age, at));
        if let Some(found) = found {
            self.memory.apply(&runs(found.clear));
            self.pins = found.pins;
        }
    }
}

/// The id of a backend of the pool.
const fn id(place: u16) -> u16 {
    place + 1
}

/// A slot that should have another `cur`.
fn turned(slot: Slot, cur: u16) -> Slot {
    match slot.est() {
        _ if slot.cur() == cur => slot,
        BACKEND_NOBODY => Slot::clean(cur),
        est if est == cur => Slot::new(cur, est, false, true),
        est => Slot::new(cur, est, true, slot.pins()),
    }
}

impl Steering for Slots {
    fn name(&self) -> String {
        "xlb: pins while a slot moves".to_owned()
    }

    fn change(&mut self, now: Duration, pool: &Pool) {
        let table = pool.table();
        let ops = self.changed(|slot, word| turned(word, id(table[slot])));
        self.memory.apply(&ops);
        for (place, backend) in (0..).zip(&pool.backends) {
            let flags = u8::from(backend.up) * Backend::ACCEPTING;
            let died = self.memory.image.backends[usize::from(id(place))].flags != 0 && flags == 0;
            self.memory.apply(&[MapOp::SetFlags { id: id(place), flags }]);
            if died {
                self.leave_the_dead(id(place));
            }
        }
        self.memory.refresh();
        self.moves.observe(&self.memory.image, self.begin + now);
    }

    fn tick(&mut self, now: Duration) {
        let at = self.begin + now;
        self.memory.refresh();
        self.moves.observe(&self.memory.image, at);
        let course = Course { idle: PROTECTED, est: None };
        for (_, ops) in
            self.moves.due(&self.memory.image, at, |table| (table == TABLE).then(|| course.clone()))
        {
            self.memory.apply(&ops);
        }
        if now - self.swept >= SWEEP {
            self.swept = now;
            self.sweep(now);
        }
    }

    fn packet(&mut self, now: Duration, packet: Packet) -> u16 {
        self.memory.now_ns = now.as_nanos() as u64;
        let flags = match packet {
            Packet { begins: true, .. } => TcpFlags::SYN,
            Packet { ends: true, .. } => TcpFlags::FIN | TcpFlags::ACK,
            _ => TcpFlags::ACK,
        };
        let says = Says::tcp(TcpFlags { data_offset: 5 << 4, flags });
        self.memory.steer(FlowHash::from_bits(packet.hash), says) - 1
    }

    /// Of pins, what the last sweep found.
    fn state(&self) -> State {
        State {
            bytes: self.pins * size_of::<Pin>() as u64,
            reserved: self.memory.reserved(),
            looked: self.memory.count(PinEvent::Looked),
        }
    }
}
