//! Flows of slots that are on the move, and of tables that are no hash: each has a pin, which decides.
//!
//! The invariant: every live flow that is not on the `est` of its slot has a pin. A pin that cannot be made is not
//! made: the flow goes to `est`, where it needs none, and the agent, which is told, gives the slot more time.
//!
//! Pins lie in buckets of one cache line. The lower half of the flow hash chooses the bucket, the upper half is the
//! tag. A pin is one word and changes by compare-and-exchange only, so packets on other CPUs and the agent's sweeps
//! see it whole.

use crate::abi::{
    BACKEND_NOBODY, Backend, Discipline, PINS_PER_BUCKET, Pin, PinBucket, PinState, TableState, TableWord,
    VipTarget,
};
use crate::allowance::Limited;
use crate::atomic::{add, is_zero, word};
use crate::flow::FlowHash;
use crate::outcome::Outcome;
use crate::slots::Slot;
use crate::tables::Tables;
use crate::wire::TcpFlags;

/// What a packet says of its flow: bits 0-7 TCP flags, or one of the others. A word, which the verifier knows
/// nothing of: a branch for each meaning in front of `decide` would be a verification for each.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Says(u32);

impl Says {
    /// Nothing: it is about the flow (an ICMP error) or a part of it (a fragment without a header). Makes no pin.
    pub const GLIMPSE: Self = Self(1 << 8);
    /// UDP: it may have begun long ago.
    pub const DATAGRAM: Self = Self(1 << 9);
    /// UDP, and it begins (a QUIC Initial).
    pub const NEW_DATAGRAM: Self = Self(1 << 9 | 1 << 10);

    /// Together with the others: what is hashed is a client, and its flow is all that it sends.
    const CLIENT: Self = Self(1 << 11);

    #[inline(always)]
    pub const fn tcp(flags: TcpFlags) -> Self {
        Self(flags.flags as u32)
    }

    /// What it says to a service that may hash clients. Without a branch.
    #[inline(always)]
    pub const fn to(self, target: VipTarget) -> Self {
        let client = (target.flags() & VipTarget::SOURCE_HASH) as u32 * Self::CLIENT.0;
        Self(self.0 | client)
    }

    #[inline(always)]
    pub(crate) const fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    #[inline(always)]
    pub(crate) const fn begins(self) -> bool {
        let syn = self.0 & (TcpFlags::SYN | TcpFlags::ACK | TcpFlags::FIN | TcpFlags::RST) as u32;
        syn == TcpFlags::SYN as u32 || self.0 & 1 << 10 != 0
    }

    #[inline(always)]
    const fn ends(self) -> bool {
        self.0 & (TcpFlags::FIN | TcpFlags::RST) as u32 != 0
    }
}

/// The table that is asked, and what the packet says: bits 0-15 and 16-31.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Asked(u32);

impl Asked {
    #[inline(always)]
    pub const fn new(table: u16, says: Says) -> Self {
        Self(table as u32 | says.0 << 16)
    }

    #[inline(always)]
    const fn table(self) -> u16 {
        self.0 as u16
    }

    #[inline(always)]
    const fn says(self) -> Says {
        Says(self.0 >> 16)
    }
}

/// The backend's id, or why there is none.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Verdict(u32);

impl Asked {
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    pub const fn bits(self) -> u32 {
        self.0
    }
}

impl Verdict {
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    pub const fn bits(self) -> u32 {
        self.0
    }

    const UNPINNED: Self = Self(1 << 16);
    const INCONSISTENT: Self = Self(2 << 16);
    /// Of an attempt: there is no room.
    const FULL: Self = Self(3 << 16);
    /// Of an attempt: somebody else was faster.
    const AGAIN: Self = Self(4 << 16);

    #[inline(always)]
    const fn of(id: u16) -> Self {
        Self(id as u32)
    }

    #[inline(always)]
    pub const fn backend(self) -> Result<u16, Outcome> {
        if self.0 < Self::UNPINNED.0 {
            Ok(self.0 as u16)
        } else if self.0 == Self::UNPINNED.0 {
            Err(Outcome::DropUnpinned)
        } else {
            Err(Outcome::DropInconsistent)
        }
    }
}

/// What the slow path counts, each on its own. The number is the row in `XLB_PIN_EVENTS`.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PinEvent {
    /// A packet whose slot was on the move, or whose table is no hash: a pin was looked for.
    Looked = 0,
    /// A pin for a flow that begins.
    MadeNew = 1,
    /// A pin for a flow that was there before.
    MadeOld = 2,
    /// No room or no allowance; so the flow went to `est`, or was dropped while `est` was moving.
    FailedNew = 3,
    FailedOld = 4,
}

impl PinEvent {
    pub const ALL: [Self; 5] = [Self::Looked, Self::MadeNew, Self::MadeOld, Self::FailedNew, Self::FailedOld];

    /// The name in metrics and in `xlb status`.
    pub const fn counter(self) -> &'static str {
        match self {
            Self::Looked => "looked",
            Self::MadeNew => "made_new",
            Self::MadeOld => "made_old",
            Self::FailedNew => "failed_new",
            Self::FailedOld => "failed_old",
        }
    }
}

/// A packet that saw its pin change under its hands this often takes it as it is.
const TRIES: u32 = 3;

/// Ways of a bucket that pins of new flows may take: a flood of SYNs leaves the others to flows that live.
const NEW_WAYS: u64 = 0xf0;

/// A SYN on a flow that was alive so short a time ago (60 s) is of that flow, or finds its TIME-WAIT there.
const FRESH: u32 = (60_000_000_000u64 >> 31) as u32;

/// The tag of a flow. Slots of all table lengths follow from it.
#[inline(always)]
pub const fn tag(hash: FlowHash) -> u32 {
    if hash.slot() == 0 { 1 } else { hash.slot() }
}

/// A proposal to `attempt`: bits 0-31 the slot, 32-46 the backend for a flow without a pin, 48-63 the age of now.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Proposal(u64);

impl Proposal {
    const fn new(slot: Slot, id: u16, now: u16) -> Self {
        Self(slot.bits() as u64 | (id as u64) << 32 | (now as u64) << 48)
    }

    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    pub const fn bits(self) -> u64 {
        self.0
    }

    const fn slot(self) -> Slot {
        Slot::from_bits(self.0 as u32)
    }

    const fn id(self) -> u16 {
        (self.0 >> 32) as u16 & 0x7fff
    }

    const fn now(self) -> u16 {
        (self.0 >> 48) as u16 & 0x7fff
    }
}

/// Picks the backend of a packet whose slot has pins or makes them. This, `attempt` and `pick` take and give words only:
/// in the kernel they are functions that are verified once, not on every way that leads to them (`Tables::decide`).
#[inline(always)]
pub fn decide<T: Tables>(tables: &T, table: TableWord, asked: Asked, hash: FlowHash, slot: Slot) -> Verdict {
    tables.count_pin(PinEvent::Looked);
    let now = Pin::age_of(tables.clock());
    let begins = is_new(table, asked.says())
        && !is_of_old_client(tables, asked, slot)
        && !is_known(tables, table, asked, hash, now);
    let id = if begins { tables.pick(table, asked, slot) } else { slot.est() };
    let proposal = Proposal::new(slot, id, now);
    let mut tries = 0;
    while tries < TRIES {
        tries += 1;
        let verdict = tables.attempt(table, asked, hash, proposal);
        if verdict.0 < Verdict::FULL.0 {
            return verdict;
        }
        if verdict == Verdict::FULL {
            break;
        }
    }
    follow_or_fail(tables, table, asked, hash, slot)
}

/// Whether the flow of a packet without a pin begins. Without a hash, nothing but a pin could say that a datagram's
/// does not.
#[inline(always)]
const fn is_new(table: TableWord, says: Says) -> bool {
    says.begins() || says.has(Says::DATAGRAM) && table.discipline().pins_all()
}

/// A connection that begins says nothing of the client's others: they may be silent ones to `est`. So while that takes
/// connections, this one goes there, too.
#[inline(always)]
pub(crate) fn is_of_old_client<T: Tables>(tables: &T, asked: Asked, slot: Slot) -> bool {
    asked.says().has(Says::CLIENT) && tables.backend(slot.est()).is_some_and(Backend::accepts)
}

/// Whether a flow of a table that pins every flow has its pin already: such a flow takes nobody's turn. A pin that goes
/// between this look and the next leaves the flow where one goes of which nothing is known.
#[inline(always)]
fn is_known<T: Tables>(tables: &T, table: TableWord, asked: Asked, hash: FlowHash, now: u16) -> bool {
    if !table.discipline().pins_all() {
        return false;
    }
    let Some(bucket) = tables.pin_bucket(hash.spread()) else { return false };
    let (matching, _) = scan(tables, bucket, tag(hash));
    let pin = Pin::from_bits(tables.word(&bucket.0[lowest(matching)]));
    pin.tag() == tag(hash) && follows(tables, asked, pin, now)
}

/// Finds the pin of a flow or makes it: one look at the bucket, one exchange.
#[inline(always)]
pub fn attempt<T: Tables>(
    tables: &T,
    table: TableWord,
    asked: Asked,
    hash: FlowHash,
    proposal: Proposal,
) -> Verdict {
    let Some(bucket) = tables.pin_bucket(hash.spread()) else { return Verdict::INCONSISTENT };
    let (tag, now, says, id) = (tag(hash), proposal.now(), asked.says(), proposal.id());
    let (matching, free) = scan(tables, bucket, tag);
    if matching == 0 {
        let pinless = !table.discipline().pins_all() && !proposal.slot().dirty();
        if pinless || says.has(Says::GLIMPSE) || id == BACKEND_NOBODY {
            return Verdict::of(id);
        }
        return insert(tables, table, asked, bucket, free, Pin::new(tag, id, first_state(says), now));
    }
    let place = &bucket.0[lowest(matching)];
    let pin = Pin::from_bits(tables.word(place));
    if pin.tag() != tag {
        return Verdict::AGAIN;
    }
    if says.has(Says::GLIMPSE) {
        return Verdict::of(pin.backend());
    }
    let next = if !follows(tables, asked, pin, now) {
        if id == BACKEND_NOBODY {
            return Verdict::of(id);
        }
        if tables.closing(asked.table()) == TableState::FROZEN {
            // Followed as it is.
            return Verdict::FULL;
        }
        Pin::new(tag, id, first_state(says), now)
    } else {
        Pin::new(tag, pin.backend(), next_state(pin.state(), says), now)
    };
    if next != pin && !tables.exchange(place, pin.bits(), next.bits()) {
        return Verdict::AGAIN;
    }
    weigh(tables, table, pin, next);
    Verdict::of(next.backend())
}

/// Makes a pin in one of the `free` ways.
#[inline(always)]
fn insert<T: Tables>(
    tables: &T,
    table: TableWord,
    asked: Asked,
    bucket: &PinBucket,
    free: u64,
    pin: Pin,
) -> Verdict {
    let new = is_new(table, asked.says());
    let room = if new { free & NEW_WAYS } else { free };
    let kind = if new { Limited::NewPin } else { Limited::OldPin };
    if room == 0 || tables.closing(asked.table()) == TableState::FROZEN || !tables.admit(kind) {
        return Verdict::FULL;
    }
    let way = lowest(room);
    if !tables.exchange(&bucket.0[way], 0, pin.bits()) {
        return Verdict::AGAIN;
    }
    // Another CPU may have pinned this flow in another way: the lowest wins.
    if lowest(scan(tables, bucket, pin.tag()).0) != way {
        tables.exchange(&bucket.0[way], pin.bits(), 0);
        return Verdict::AGAIN;
    }
    tables.count_pin(if new { PinEvent::MadeNew } else { PinEvent::MadeOld });
    weigh(tables, table, Pin::default(), pin);
    Verdict::of(pin.backend())
}

/// There is no room for a pin, or it changes without end: a pin that is there is followed as it is. A flow that cannot
/// be pinned goes where it needs no pin. The agent hears of it before it moves `est`: the addition is a full barrier,
/// and `closing` is read after it. In a frozen table no `est` moves.
#[inline(always)]
fn follow_or_fail<T: Tables>(
    tables: &T,
    table: TableWord,
    asked: Asked,
    hash: FlowHash,
    slot: Slot,
) -> Verdict {
    let Some(bucket) = tables.pin_bucket(hash.spread()) else { return Verdict::INCONSISTENT };
    let (matching, _) = scan(tables, bucket, tag(hash));
    let pin = Pin::from_bits(tables.word(&bucket.0[lowest(matching)]));
    if pin.tag() == tag(hash) {
        return Verdict::of(pin.backend());
    }
    let new = is_new(table, asked.says());
    tables.count_pin(if new { PinEvent::FailedNew } else { PinEvent::FailedOld });
    tables.add_failed(asked.table());
    if tables.closing(asked.table()) == TableState::CLOSING {
        Verdict::UNPINNED
    } else {
        Verdict::of(slot.est())
    }
}

#[inline(always)]
pub(crate) const fn first_state(says: Says) -> PinState {
    if says.has(Says::DATAGRAM) {
        PinState::Datagram
    } else if says.has(Says::CLIENT) {
        // One of its connections ends or begins, the client does not.
        PinState::Established
    } else if says.ends() {
        PinState::Finishing
    } else if says.begins() {
        PinState::Syn
    } else {
        PinState::Established
    }
}

#[inline(always)]
pub(crate) const fn next_state(state: PinState, says: Says) -> PinState {
    match first_state(says) {
        PinState::Datagram => PinState::Datagram,
        PinState::Finishing => PinState::Finishing,
        // A client may use its port again while the server is in TIME-WAIT.
        PinState::Syn if matches!(state, PinState::Finishing) => PinState::Syn,
        PinState::Established if matches!(state, PinState::Syn) => PinState::Established,
        PinState::Syn | PinState::Established => state,
    }
}

/// Whether a packet goes where the pin of its flow says.
#[inline(always)]
pub fn follows<T: Tables>(tables: &T, asked: Asked, pin: Pin, now: u16) -> bool {
    let says = asked.says();
    !says.begins() || holds(tables, says, pin, now)
}

/// Whether a pin is right for a flow that begins.
#[inline(always)]
pub(crate) fn holds<T: Tables>(tables: &T, says: Says, pin: Pin, now: u16) -> bool {
    (says.has(Says::CLIENT) || matches!(pin.state(), PinState::Syn) || pin.idle(now) < FRESH)
        && tables.backend(pin.backend()).is_some_and(Backend::accepts)
}

/// The backend of a new flow.
#[inline(always)]
pub fn pick<T: Tables>(tables: &T, table: TableWord, asked: Asked, slot: Slot) -> u16 {
    match table.discipline() {
        Discipline::Hash => slot.cur(),
        Discipline::RoundRobin => cur_at(tables, table, tables.next_turn(asked.table())),
        Discipline::Random => cur_at(tables, table, tables.random()),
        Discipline::Least => {
            let (one, other) =
                (cur_at(tables, table, tables.random()), cur_at(tables, table, tables.random()));
            if busier(tables, one, other) { other } else { one }
        }
    }
}

#[inline(always)]
fn cur_at<T: Tables>(tables: &T, table: TableWord, index: u32) -> u16 {
    match tables.slot(table.first_row(), index & (table.length() - 1)) {
        Some(slot) => slot.cur(),
        None => BACKEND_NOBODY,
    }
}

/// Whether `one` has more flows for its weight than `other`.
#[inline(always)]
fn busier<T: Tables>(tables: &T, one: u16, other: u16) -> bool {
    let (Some(one), Some(other)) = (tables.load(one), tables.load(other)) else { return false };
    let weight = |bits: u64| if bits == 0 { 1 } else { bits };
    let scaled = |a: u64, b: u64| a.wrapping_mul(weight(b));
    scaled(word(&one.active), word(&other.weight)) > scaled(word(&other.active), word(&one.weight))
}

/// Keeps count of the flows of busy backends, where a table asks for it. A free pin is no flow.
#[inline(always)]
pub(crate) fn weigh<T: Tables>(tables: &T, table: TableWord, pin: Pin, next: Pin) {
    if !matches!(table.discipline(), Discipline::Least) {
        return;
    }
    let was = !pin.is_free() && !matches!(pin.state(), PinState::Finishing);
    let is = !matches!(next.state(), PinState::Finishing);
    if was && let Some(load) = tables.load(pin.backend()) {
        add(&load.active, u64::MAX);
    }
    if is && let Some(load) = tables.load(next.backend()) {
        add(&load.active, 1);
    }
}

/// Bits of the ways that hold the tag, and of those that are free. Without branches: the verifier would follow
/// each of them.
#[inline(always)]
fn scan<T: Tables>(tables: &T, bucket: &PinBucket, tag: u32) -> (u64, u64) {
    let (mut matching, mut free) = (0, 0);
    let mut way = 0;
    while way < PINS_PER_BUCKET {
        let bits = tables.word(&bucket.0[way]);
        matching |= is_zero(bits >> 32 ^ tag as u64) << way;
        free |= is_zero(bits) << way;
        way += 1;
    }
    (matching, free)
}

/// The number of the lowest bit of eight that is set.
#[inline(always)]
pub(crate) fn lowest(bits: u64) -> usize {
    let bit = bits & bits.wrapping_neg();
    let (ones, twos, fours) = (is_zero(bit & 0xaa), is_zero(bit & 0xcc), is_zero(bit & 0xf0));
    (7 ^ (ones | twos << 1 | fours << 2)) as usize & (PINS_PER_BUCKET - 1)
}
