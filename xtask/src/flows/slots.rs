//! xlb's way: slots that remember flows only while they are on the move. The packet path's own rule, over memory that
//! changes as the agent changes it.

use std::time::Duration;

use lb_common::abi::{Backend, Pin};
use lb_common::flow::FlowHash;
use lb_common::pins::{PinEvent, Says};
use lb_common::slots::Slot;
use lb_common::wire::TcpFlags;

use super::memory::Memory;
use super::model::{self, Pool};
use super::steering::{Packet, State, Steering};

/// The protected idle time and what is waited beyond it: ages are counted in units of two seconds.
const PROTECTED: Duration = Duration::from_secs(15 * 60);
const SLACK: Duration = Duration::from_secs(5);

/// All pins are looked at this often.
const SWEEP: Duration = Duration::from_secs(30);

pub struct Slots {
    memory: Memory,
    /// When a slot was changed for the last time, or a pin could not be made.
    start: Duration,
    failed: u64,
    swept: Duration,
    /// Pins that are no more.
    erased: u64,
}

impl Slots {
    pub fn new(pins: usize) -> Self {
        Self {
            memory: Memory::new(model::log2_length(), pins),
            start: Duration::ZERO,
            failed: 0,
            swept: Duration::ZERO,
            erased: 0,
        }
    }

    /// What every live flow of the moved slots has said something since is pinned by now: `est` follows.
    fn finish(&mut self) {
        for slot in &mut self.memory.slots {
            if slot.dirty() {
                *slot = Slot::new(slot.cur(), slot.cur(), false, true);
            }
        }
    }

    /// Takes pins away that are too old, and lets slots rest that no pin leads elsewhere.
    fn sweep(&mut self, now: Duration) {
        let age = Pin::age_of(now.as_nanos() as u64);
        let oldest = u32::from(Pin::age_of((PROTECTED + SLACK).as_nanos() as u64));
        let mut elsewhere = vec![false; self.memory.slots.len()];
        let swept = self.memory.sweep(|pin| {
            let gone = pin.idle(age) > oldest;
            let slot = self.memory.slot_of(pin);
            elsewhere[slot] |= !gone && pin.backend() != self.memory.slots[slot].est();
            gone
        });
        self.erased += swept;
        for (slot, elsewhere) in self.memory.slots.iter_mut().zip(elsewhere) {
            if !slot.dirty() && slot.pins() && !elsewhere {
                *slot = Slot::clean(slot.cur());
            }
        }
    }

    /// Old flows of a backend that died leave at once.
    fn leave_the_dead(&mut self) {
        let dead = |id: u16| self.memory.backends.get(usize::from(id)).is_some_and(|row| row.flags == 0);
        let gone: Vec<bool> = self.memory.slots.iter().map(|slot| dead(slot.est())).collect();
        let swept = self.memory.sweep(|pin| dead(pin.backend()));
        self.erased += swept;
        for (slot, gone) in self.memory.slots.iter_mut().zip(gone) {
            if gone {
                *slot = Slot::new(slot.cur(), slot.cur(), false, true);
            }
        }
    }
}

/// The id of a backend of the pool; 0 is nobody.
const fn id(place: u16) -> u16 {
    place + 1
}

impl Steering for Slots {
    fn name(&self) -> String {
        "xlb: pins while a slot moves".to_owned()
    }

    fn change(&mut self, now: Duration, pool: &Pool) {
        let row = |up: bool| Backend { flags: u8::from(up) * Backend::ACCEPTING, ..Backend::default() };
        self.memory.backends = vec![row(false)];
        self.memory.backends.extend(pool.backends.iter().map(|backend| row(backend.up)));
        for (slot, place) in self.memory.slots.iter_mut().zip(pool.table()) {
            let (cur, est) = (id(place), slot.est());
            if slot.cur() == cur {
                continue;
            }
            *slot = match est {
                _ if est == cur => Slot::new(cur, est, false, true),
                0 => Slot::clean(cur),
                _ => Slot::new(cur, est, true, slot.pins()),
            };
            self.start = now;
        }
        self.leave_the_dead();
    }

    fn tick(&mut self, now: Duration) {
        let failed = self.memory.failed();
        if failed != self.failed {
            (self.failed, self.start) = (failed, now);
        }
        if now - self.start > PROTECTED + SLACK {
            self.finish();
        }
        if now - self.swept >= SWEEP {
            self.swept = now;
            self.sweep(now);
        }
    }

    fn packet(&mut self, now: Duration, packet: Packet) -> u16 {
        self.memory.now_ns = now.as_nanos() as u64;
        let flags = if packet.begins { TcpFlags::SYN } else { TcpFlags::ACK };
        let says = Says::tcp(TcpFlags { data_offset: 5 << 4, flags });
        self.memory.steer(FlowHash::from_bits(packet.hash), says) - 1
    }

    fn state(&self) -> State {
        let made = self.memory.count(PinEvent::MadeNew) + self.memory.count(PinEvent::MadeOld);
        State {
            bytes: (made - self.erased) * size_of::<Pin>() as u64,
            reserved: self.memory.reserved(),
            looked: self.memory.count(PinEvent::Looked),
        }
    }
}
