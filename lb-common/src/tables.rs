//! What the packet path reads and counts, wherever it lies: maps in the kernel, copies in user space.

use core::sync::atomic::AtomicU64;

use crate::abi::{
    Backend, Egress, Features, Interface, Load, PinBucket, PortRule, Record, Source, TableWord, Vip4Bucket,
    Vip6Bucket, VipIndex, VipTarget,
};
use crate::allowance::Limited;
use crate::atomic;
use crate::connections::{Reply, Rooms};
use crate::flow::FlowHash;
use crate::icmp_errors::{self, About, Half};
use crate::outcome::Outcome;
use crate::packet::Packet;
use crate::pins::{self, Asked, PinEvent, Proposal, Verdict};
use crate::quic::ServerKey;
use crate::slots::Slot;
use crate::translate::{self, Found, Passed, Shape};

/// The tables of the balancer. `None` means "no such row": sizes of maps contradict each other.
pub trait Tables: Sized {
    /// Constant while a program is loaded: branches on it vanish.
    fn features(&self) -> Features;
    /// Key `index` (below `HASH_KEYS`) of the flow hash; constant while a program is loaded.
    fn hash_key(&self, index: usize) -> u64;

    fn vip_index(&self) -> Option<&VipIndex>;
    fn vip4_bucket(&self, row: u32) -> Option<&Vip4Bucket>;
    fn vip6_bucket(&self, row: u32) -> Option<&Vip6Bucket>;
    /// Rule `index`, counted over the whole map.
    fn port_rule(&self, index: u32) -> Option<&PortRule>;

    fn table_word(&self, table: u16) -> Option<TableWord>;
    /// Slot `index` of the table that begins at `first_row`, loaded once and whole.
    fn slot(&self, first_row: u32, index: u32) -> Option<Slot>;
    fn backend(&self, id: u16) -> Option<&Backend>;
    fn egress(&self, row: u16) -> Option<&Egress>;
    fn interface(&self, ifindex: u32) -> Option<&Interface>;
    /// The id of the backend that a QUIC connection ID names.
    fn server(&self, key: &ServerKey) -> Option<u16>;

    /// `pins::decide`, and two parts of it: in the kernel, functions of their own.
    fn decide(&self, table: TableWord, asked: Asked, hash: FlowHash, slot: Slot) -> Verdict {
        pins::decide(self, table, asked, hash, slot)
    }
    fn attempt(&self, table: TableWord, asked: Asked, hash: FlowHash, proposal: Proposal) -> Verdict {
        pins::attempt(self, table, asked, hash, proposal)
    }
    fn pick(&self, table: TableWord, asked: Asked, slot: Slot) -> u16 {
        pins::pick(self, table, asked, slot)
    }
    /// Words of pins and loads, which others change meanwhile: in one place, so that whoever follows a packet step by
    /// step can.
    #[inline(always)]
    fn word(&self, place: &AtomicU64) -> u64 {
        atomic::word(place)
    }
    #[inline(always)]
    fn store(&self, place: &AtomicU64, word: u64) {
        atomic::store(place, word);
    }
    #[inline(always)]
    fn exchange(&self, place: &AtomicU64, old: u64, new: u64) -> bool {
        atomic::exchange(place, old, new)
    }

    /// The bucket of pins that `spread` (of the flow hash) belongs to.
    fn pin_bucket(&self, spread: u32) -> Option<&PinBucket>;
    /// Coarse monotonic nanoseconds.
    fn clock(&self) -> u64;
    /// Says that a pin of this table could not be made. A full barrier.
    fn add_failed(&self, table: u16);
    /// `TableState::closing`.
    fn closing(&self, table: u16) -> u64;
    /// The number of this new flow in its table.
    fn next_turn(&self, table: u16) -> u32;
    fn random(&self) -> u32;
    fn load(&self, id: u16) -> Option<&Load>;

    /// Parts of `translate`: in the kernel, functions of their own.
    fn find_connection<P: Packet>(&self, packet: &P, target: VipTarget, shape: Shape) -> Found {
        translate::find(packet, self, target, shape)
    }
    fn claim_connection<P: Packet>(
        &self,
        packet: &P,
        target: VipTarget,
        hash: FlowHash,
        shape: Shape,
    ) -> Found {
        translate::claim(packet, self, target, hash, shape)
    }
    fn open_connection<P: Packet>(
        &self,
        packet: &P,
        target: VipTarget,
        claimed: Found,
        shape: Shape,
    ) -> Found {
        translate::open(packet, self, target, claimed, shape)
    }
    fn send_translated<P: Packet>(
        &self,
        packet: &mut P,
        target: VipTarget,
        position: u32,
        shape: Shape,
    ) -> Passed {
        translate::send(packet, self, target, position, shape)
    }
    fn reply_translated<P: Packet>(&self, packet: &mut P, source: u32, shape: Shape) -> Passed {
        translate::reply(packet, self, source, shape)
    }

    /// Parts of `icmp_errors`: in the kernel, functions of their own.
    fn find_error<P: Packet>(&self, packet: &P, about: About, source: u32) -> Found {
        icmp_errors::find(packet, self, about, source)
    }
    fn send_error<P: Packet>(&self, packet: &mut P, position: u32, about: About) -> Passed {
        icmp_errors::send(packet, self, position, about)
    }
    fn cross_error<P: Packet>(&self, packet: &mut P, position: u32, about: About) -> Half {
        icmp_errors::cross(packet, self, position, about)
    }
    fn widen_error<P: Packet>(&self, packet: &mut P, position: u32, about: About, half: Half) -> Passed {
        icmp_errors::widen(packet, self, position, about, half)
    }
    fn narrow_error<P: Packet>(&self, packet: &mut P, position: u32, about: About, half: Half) -> Passed {
        icmp_errors::narrow(packet, self, position, about, half)
    }

    /// Rooms for connections; constant while a program is loaded.
    fn rooms(&self) -> Rooms {
        Rooms::default()
    }
    fn connection_bucket(&self, _index: u32) -> Option<&PinBucket> {
        None
    }
    /// The record that belongs to a place.
    fn record(&self, _position: u32) -> Option<&Record> {
        None
    }
    /// An address that clients' are translated to.
    fn source(&self, _index: u32) -> Option<&Source> {
        None
    }
    /// Monotonic nanoseconds; dear.
    fn precise_clock(&self) -> u64 {
        self.clock()
    }

    /// Whether one more of this kind may be sent or made now.
    fn admit(&self, answer: Limited) -> bool;

    fn count_outcome(&self, outcome: Outcome);
    /// One packet of `bytes` bytes of IP.
    fn count_vip(&self, vip: u32, bytes: u64);
    fn count_backend(&self, id: u16, bytes: u64);
    fn count_pin(&self, event: PinEvent);
    /// A packet of a backend to a client.
    fn count_reply(&self, _id: u16, _reply: Reply) {}
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::abi::HASH_KEYS;

    /// Tables with keys and nothing else.
    pub struct Constant {
        keys: [u64; HASH_KEYS],
    }

    impl Constant {
        pub fn seeded(seed: u64) -> Self {
            Self { keys: crate::flow::keys(seed) }
        }
    }

    impl Tables for Constant {
        fn features(&self) -> Features {
            Features::default()
        }
        fn hash_key(&self, index: usize) -> u64 {
            self.keys[index]
        }
        fn vip_index(&self) -> Option<&VipIndex> {
            None
        }
        fn vip4_bucket(&self, _: u32) -> Option<&Vip4Bucket> {
            None
        }
        fn vip6_bucket(&self, _: u32) -> Option<&Vip6Bucket> {
            None
        }
        fn port_rule(&self, _: u32) -> Option<&PortRule> {
            None
        }
        fn table_word(&self, _: u16) -> Option<TableWord> {
            None
        }
        fn slot(&self, _: u32, _: u32) -> Option<Slot> {
            None
        }
        fn backend(&self, _: u16) -> Option<&Backend> {
            None
        }
        fn egress(&self, _: u16) -> Option<&Egress> {
            None
        }
        fn interface(&self, _: u32) -> Option<&Interface> {
            None
        }
        fn server(&self, _: &ServerKey) -> Option<u16> {
            None
        }
        fn admit(&self, _: Limited) -> bool {
            false
        }
        fn count_outcome(&self, _: Outcome) {}
        fn count_vip(&self, _: u32, _: u64) {}
        fn count_backend(&self, _: u16, _: u64) {}
        fn pin_bucket(&self, _: u32) -> Option<&PinBucket> {
            None
        }
        fn clock(&self) -> u64 {
            0
        }
        fn add_failed(&self, _: u16) {}
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
        fn count_pin(&self, _: PinEvent) {}
    }
}
