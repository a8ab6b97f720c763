//! The connection table of the modes that translate addresses: who is found in it, and how a connection gets in.
//!
//! A connection has a place: a pin in `XLB_CONNECTIONS` (its backend, state and age, in one word) and the record of the
//! same number in `XLB_RECORDS` (its addresses). Places lie in buckets of one cache line, and a connection may be in
//! two of them, by the hash of the client's address, port and protocol alone: that is what a backend's answer has in
//! common with the client's packet.
//!
//! Where the source is translated, the place *is* the source's address and port: nothing else hands out ports, two
//! connections never have the same, and an answer finds its record without a search.

use core::sync::atomic::AtomicU64;

use crate::abi::{
    BACKEND_CLAIMED, Backend, BackendKind, PINS_PER_BUCKET, Path, Pin, PinBucket, Record, VipTarget,
};
use crate::atomic::is_zero;
use crate::flow::{self, FlowHash};
use crate::nat::Ends;
use crate::outcome::Outcome;
use crate::pins::tag;
use crate::tables::Tables;
use crate::wire::Address6;

/// How many buckets there are, and which ports their places stand for.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Rooms {
    pub buckets: u32,
    /// As many as there were before: connections of then lie where they lay. 0 for none.
    pub before: u32,
    /// The lowest port of a source, and how many there are.
    pub first_port: u32,
    pub ports: u32,
}

impl Rooms {
    /// From `Constants`.
    #[inline(always)]
    pub const fn new(buckets: u64, ports: u64) -> Self {
        Self {
            buckets: buckets as u32,
            before: (buckets >> 32) as u32,
            first_port: ports as u32 & 0xffff,
            ports: (ports >> 16) as u32 & 0x1_ffff,
        }
    }

    /// The address and port that a place stands for.
    #[inline(always)]
    pub const fn source(self, position: u32) -> SourceEnd {
        // A zero would be a division by it, which BPF defines and Rust does not.
        let ports = if self.ports == 0 { 1 } else { self.ports };
        let port = self.first_port.wrapping_add(position % ports) as u16;
        SourceEnd((position / ports) << 16 | port.to_be() as u32)
    }

    /// The place of a source's port (as it lies in the packet); nothing where it is not among those.
    #[inline(always)]
    pub const fn position(self, index: u32, port: u16) -> Option<u32> {
        let port = (u16::from_be(port) as u32).wrapping_sub(self.first_port);
        if port < self.ports { Some(index.wrapping_mul(self.ports).wrapping_add(port)) } else { None }
    }
}

/// One port of a source: its port as it lies in the packet in the lower half, the source's number in the upper.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct SourceEnd(u32);

impl SourceEnd {
    #[inline(always)]
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    pub const fn bits(self) -> u32 {
        self.0
    }

    #[inline(always)]
    pub const fn index(self) -> u32 {
        self.0 >> 16
    }

    /// As it lies in the packet.
    #[inline(always)]
    pub const fn port(self) -> u32 {
        self.0 & 0xffff
    }
}

/// What was seen of a connection, in `Record::PORTS`.
pub mod seen {
    /// A packet of the backend.
    pub const ANSWER: u64 = 1 << 40;
    /// A reset by the backend.
    pub const RESET: u64 = 1 << 41;
    pub const ALL: u64 = 0xff << 40;
}

/// What a backend's packet was.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Reply {
    pub bytes: u64,
    pub reset: bool,
    /// The first one came after so many nanoseconds; 0 where it is not the first.
    pub waited: u64,
}

const PROTOCOL: u32 = 32;

/// Who opened a connection, and to what: as the client's packets say it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Caller {
    pub client: Address6,
    pub vip: Address6,
    /// As `Ports::both`.
    pub ports: u32,
    pub protocol: u8,
}

impl Caller {
    #[inline(always)]
    pub const fn of(ends: &Ends, protocol: u8) -> Self {
        Self { client: ends.source, vip: ends.destination, ports: ends.ports, protocol }
    }

    #[inline(always)]
    const fn key(&self) -> u64 {
        self.ports as u64 | (self.protocol as u64) << PROTOCOL
    }
}

/// The buckets where a connection may be.
#[derive(Clone, Copy)]
pub struct Haunts {
    pub first: u32,
    pub second: u32,
    pub tag: u32,
    spread: u32,
    before: u32,
}

impl Haunts {
    /// Of a client's port (as it lies in the packet).
    #[inline(always)]
    pub fn new<T: Tables>(tables: &T, client: Address6, port: u32, protocol: u8) -> Self {
        let hash = flow::hash6(tables, client, Address6::default(), port & 0xffff, protocol);
        Self::of(hash, tables.rooms())
    }

    #[inline(always)]
    pub const fn of(hash: FlowHash, rooms: Rooms) -> Self {
        let (spread, tag) = (hash.spread(), tag(hash));
        Self {
            first: Self::row(spread, rooms.buckets),
            second: Self::row(Self::other(tag), rooms.buckets),
            tag,
            spread,
            before: rooms.before,
        }
    }

    /// One bucket of so many.
    #[inline(always)]
    const fn row(word: u32, buckets: u32) -> u32 {
        ((word as u64).wrapping_mul(buckets as u64) >> 32) as u32
    }

    /// A word that says of the second bucket what `FlowHash::spread` says of the first.
    #[inline(always)]
    const fn other(tag: u32) -> u32 {
        tag.wrapping_mul(0x9e37_79b1)
    }

    /// The bucket of the nth look, of which there are `looks`: those where a connection of the maps before may lie last.
    #[inline(always)]
    const fn look(&self, nth: u32) -> u32 {
        match nth {
            0 => self.first,
            1 => self.second,
            2 => Self::row(self.spread, self.before),
            _ => Self::row(Self::other(self.tag), self.before),
        }
    }

    #[inline(always)]
    const fn looks(&self) -> u32 {
        if self.before == 0 { 2 } else { 4 }
    }
}

/// A connection, or a place for one.
#[derive(Clone, Copy)]
pub struct Place<'t> {
    pub position: u32,
    pub word: &'t AtomicU64,
    pub pin: Pin,
    pub record: &'t Record,
}

/// The place at a position of the table.
#[inline(always)]
pub fn at<T: Tables>(tables: &T, position: u32) -> Option<Place<'_>> {
    let bucket = tables.connection_bucket(position / PINS_PER_BUCKET as u32)?;
    let word = &bucket.0[position as usize % PINS_PER_BUCKET];
    let record = tables.record(position)?;
    Some(Place { position, word, pin: Pin::from_bits(tables.word(word)), record })
}

/// The connection of a client's packet.
#[inline(always)]
pub fn find<'t, T: Tables>(tables: &'t T, haunts: Haunts, caller: &Caller) -> Option<Place<'t>> {
    search(tables, haunts, |place| is_of(tables, place.record, caller))
}

/// The connection of a packet from a backend. `source` is one more than the number of the source that the packet is to,
/// or 0 where it is to the client itself.
#[inline(always)]
pub fn find_reply<'t, T: Tables>(tables: &'t T, source: u32, ends: &Ends, protocol: u8) -> Option<Place<'t>> {
    let port = ends.ports >> 16;
    if source == 0 {
        let haunts = Haunts::new(tables, ends.destination, port, protocol);
        return find_answered(tables, haunts, ends, protocol);
    }
    let place = at(tables, tables.rooms().position(source - 1, port as u16)?)?;
    let key = tables.word(&place.record.0[Record::PORTS]);
    if place.pin.is_free() || (key >> PROTOCOL) as u8 != protocol {
        return None;
    }
    is_from(tables, &place, ends, true).then_some(place)
}

/// The connection of a packet from `ends.source` to a client, whose own address it has.
#[inline(always)]
fn find_answered<'t, T: Tables>(
    tables: &'t T,
    haunts: Haunts,
    ends: &Ends,
    protocol: u8,
) -> Option<Place<'t>> {
    search(tables, haunts, |place| {
        let key = tables.word(&place.record.0[Record::PORTS]);
        let wanted = (ends.ports >> 16) as u64 | (protocol as u64) << PROTOCOL;
        let other = (tables.word(&place.record.0[0]) ^ { ends.destination.high })
            | (tables.word(&place.record.0[1]) ^ { ends.destination.low })
            | ((key ^ wanted) & (0xff << PROTOCOL | 0xffff));
        other == 0 && is_from(tables, place, ends, false)
    })
}

/// Whether a packet comes from the backend of a connection, which has its source translated or not.
#[inline(always)]
fn is_from<T: Tables>(tables: &T, place: &Place<'_>, ends: &Ends, translated: bool) -> bool {
    let Some(backend) = tables.backend(place.pin.backend()) else { return false };
    let Some(kind) = BackendKind::from_raw(backend.kind) else { return false };
    let key = tables.word(&place.record.0[Record::PORTS]);
    let address = address_of(backend);
    let port = port_of(backend, key);
    let other = (address.high ^ { ends.source.high })
        | (address.low ^ { ends.source.low })
        | (port ^ (ends.ports & 0xffff)) as u64;
    other == 0 && kind.translates() && kind.translates_source() == translated
}

/// The address and port (as it lies in the packet) that a backend sees in place of the client's; `row` is
/// `Record::ROW`.
#[inline(always)]
pub fn source_of<T: Tables>(tables: &T, row: u64, backend: &Backend) -> Result<(Address6, u32), Outcome> {
    let end = SourceEnd::from_bits((row >> 32) as u32);
    let source = tables.source(end.index()).ok_or(Outcome::DropInconsistent)?;
    let address = if backend.is_v4() {
        Address6::mapped(source.v4)
    } else {
        Address6 { high: source.v6[0], low: source.v6[1] }
    };
    // The row is to be filled.
    let none = if backend.is_v4() { Address6::mapped(0) } else { Address6::default() };
    if address == none { Err(Outcome::DropUnresolved) } else { Ok((address, end.port())) }
}

/// A backend's address; of IPv4, mapped.
#[inline(always)]
pub fn address_of(backend: &Backend) -> Address6 {
    if backend.is_v4() { Address6::mapped(backend.address4()) } else { backend.address6() }
}

/// The port that a backend is spoken to at, as it lies in the packet; `key` is `Record::PORTS`.
#[inline(always)]
pub fn port_of(backend: &Backend, key: u64) -> u32 {
    let port = backend.port.raw() as u32;
    if port == 0 { (key as u32) >> 16 } else { port }
}

/// Whether a record is of this connection.
#[inline(always)]
pub fn is_of<T: Tables>(tables: &T, record: &Record, caller: &Caller) -> bool {
    let word = |index: usize| tables.word(&record.0[index]);
    (word(0) ^ { caller.client.high })
        | (word(1) ^ { caller.client.low })
        | (word(2) ^ { caller.vip.high })
        | (word(3) ^ { caller.vip.low })
        | ((word(Record::PORTS) ^ caller.key()) & ((1 << (PROTOCOL + 8)) - 1))
        == 0
}

/// The first place, in the order of both buckets, that has the tag and is the one. Places that are only claimed are not.
#[inline(always)]
fn search<'t, T: Tables>(
    tables: &'t T,
    haunts: Haunts,
    is: impl Fn(&Place<'t>) -> bool,
) -> Option<Place<'t>> {
    let mut look = 0;
    while look < haunts.looks() {
        let row = haunts.look(look);
        look += 1;
        // There may be fewer buckets than before.
        let Some(bucket) = tables.connection_bucket(row) else { continue };
        let mut way = 0;
        while way < PINS_PER_BUCKET {
            let word = &bucket.0[way];
            let pin = Pin::from_bits(tables.word(word));
            if pin.tag() == haunts.tag && pin.backend() != BACKEND_CLAIMED {
                let position = row.wrapping_mul(PINS_PER_BUCKET as u32).wrapping_add(way as u32);
                let place = Place { position, word, pin, record: tables.record(position)? };
                if is(&place) {
                    return Some(place);
                }
            }
            way += 1;
        }
    }
    None
}

/// Why a connection was not opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    Full,
    /// Another packet of the same client's port is at it, or has done it.
    Busy,
    /// Replies to it could not be told from those to another connection of the same client's port.
    Clash,
    Inconsistent,
}

impl Refused {
    #[inline(always)]
    pub(crate) const fn outcome(self) -> Outcome {
        match self {
            Self::Full | Self::Busy => Outcome::DropConnectionsFull,
            Self::Clash => Outcome::DropReplyClash,
            Self::Inconsistent => Outcome::DropInconsistent,
        }
    }
}

/// Claims a place for a connection: `pin` is what it will have. Until it is opened nobody finds it there.
#[inline(always)]
pub fn claim<T: Tables>(tables: &T, haunts: Haunts, pin: Pin) -> Result<u32, Refused> {
    let Some(position) = free(tables, haunts) else { return Err(Refused::Full) };
    let Some(place) = at(tables, position) else { return Err(Refused::Inconsistent) };
    let claim = Pin::new(pin.tag(), BACKEND_CLAIMED, pin.state(), pin.age());
    if tables.exchange(place.word, 0, claim.bits()) { Ok(position) } else { Err(Refused::Busy) }
}

/// What goes into a place besides the caller.
#[derive(Clone, Copy)]
pub struct Opening {
    pub backend: u16,
    pub back: Path,
    pub target: VipTarget,
}

/// Fills the record of a place that was claimed, then lets its pin name the backend. `alone` is that backend where no
/// other connection of the client's port may go to it.
///
/// Two CPUs may open the same connection, or two that clash. Each looks for the other once its own claim is there, so at
/// least one sees the other, and who sees a claim gives way: it may be of somebody who has looked before. If both do, the
/// client sends again.
#[inline(always)]
pub fn open<T: Tables>(
    tables: &T,
    position: u32,
    haunts: Haunts,
    caller: &Caller,
    opening: &Opening,
    alone: Option<&Backend>,
) -> Result<Pin, Refused> {
    let Some(Place { word, pin: claim, record, .. }) = at(tables, position) else {
        return Err(Refused::Inconsistent);
    };
    if claim.tag() != haunts.tag || claim.backend() != BACKEND_CLAIMED {
        return Err(Refused::Busy);
    }
    if let Some(refused) = rival(tables, haunts, caller, position, alone) {
        tables.exchange(word, claim.bits(), 0);
        return Err(refused);
    }
    let source = tables.rooms().source(position);
    let store = |index: usize, value: u64| tables.store(&record.0[index], value);
    store(0, caller.client.high);
    store(1, caller.client.low);
    store(2, caller.vip.high);
    store(3, caller.vip.low);
    store(Record::PORTS, caller.key());
    store(Record::BACK, opening.back.bits());
    store(Record::OPENED, tables.precise_clock());
    store(Record::ROW, opening.target.vip() as u64 | (source.bits() as u64) << 32);
    let pin = Pin::new(claim.tag(), opening.backend, claim.state(), claim.age());
    // A full barrier: whoever sees the backend sees the record.
    if tables.exchange(word, claim.bits(), pin.bits()) { Ok(pin) } else { Err(Refused::Busy) }
}

/// A free place in the bucket that has more of them: if the first were filled before the second, the earliest connections
/// would be refused with a third of all places taken; so it is seven of ten.
#[inline(always)]
fn free<T: Tables>(tables: &T, haunts: Haunts) -> Option<u32> {
    let (first, second) = (tables.connection_bucket(haunts.first)?, tables.connection_bucket(haunts.second)?);
    let (one, other) = (free_ways(tables, first), free_ways(tables, second));
    let second = one.count_ones() < other.count_ones();
    let row = if second { haunts.second } else { haunts.first };
    let ways = if second { other } else { one };
    if ways == 0 {
        return None;
    }
    Some(row.wrapping_mul(PINS_PER_BUCKET as u32).wrapping_add(crate::pins::lowest(ways) as u32))
}

#[inline(always)]
fn free_ways<T: Tables>(tables: &T, bucket: &PinBucket) -> u64 {
    let (mut free, mut way) = (0, 0);
    while way < PINS_PER_BUCKET {
        free |= is_zero(tables.word(&bucket.0[way])) << way;
        way += 1;
    }
    free
}

/// Whether another place has the same connection, or one that clashes, or may be about to.
#[inline(always)]
fn rival<T: Tables>(
    tables: &T,
    haunts: Haunts,
    caller: &Caller,
    position: u32,
    alone: Option<&Backend>,
) -> Option<Refused> {
    let mut look = 0;
    while look < haunts.looks() {
        let row = haunts.look(look);
        look += 1;
        let Some(bucket) = tables.connection_bucket(row) else { continue };
        let mut way = 0;
        while way < PINS_PER_BUCKET {
            let at = row.wrapping_mul(PINS_PER_BUCKET as u32).wrapping_add(way as u32);
            let pin = Pin::from_bits(tables.word(&bucket.0[way]));
            if at != position && pin.tag() == haunts.tag {
                if pin.backend() == BACKEND_CLAIMED {
                    return Some(Refused::Busy);
                }
                let record = tables.record(at)?;
                if is_of(tables, record, caller) {
                    return Some(Refused::Busy);
                }
                if let Some(backend) = alone
                    && clashes(tables, record, pin, caller, backend)
                {
                    return Some(Refused::Clash);
                }
            }
            way += 1;
        }
    }
    None
}

/// Whether replies of `backend` to a caller could be replies to the connection of a record: of the same client's port,
/// by another row of the same backend and port, or by the same row.
#[inline(always)]
fn clashes<T: Tables>(tables: &T, record: &Record, pin: Pin, caller: &Caller, backend: &Backend) -> bool {
    let Some(other) = tables.backend(pin.backend()) else { return false };
    let word = |index: usize| tables.word(&record.0[index]);
    let key = word(Record::PORTS);
    let (address, its) = (address_of(backend), address_of(other));
    let different = (word(0) ^ { caller.client.high })
        | (word(1) ^ { caller.client.low })
        | ((key ^ caller.key()) & (0xff << PROTOCOL | 0xffff))
        | (address.high ^ its.high)
        | (address.low ^ its.low)
        | (port_of(backend, caller.ports as u64) ^ port_of(other, key)) as u64;
    different == 0 && is_nat(other)
}

/// Whether a backend's packets are to the client itself.
#[inline(always)]
pub(crate) fn is_nat(backend: &Backend) -> bool {
    BackendKind::from_raw(backend.kind).is_some_and(|kind| kind.translates() && !kind.translates_source())
}
