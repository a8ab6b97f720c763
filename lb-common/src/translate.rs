//! Packets of connections whose addresses are translated: from a client to its backend, and back.
//!
//! All flows of such a pool are connections: the table says where each goes, whatever its slot says meanwhile. Back to
//! a client a packet takes the way that the client's last one came, not the host's routes: nothing has to be configured
//! for it, and a router that takes over is followed with the next packet from there.
//!
//! In the kernel the entries are functions that the verifier goes through once, apart from what leads to them; so they
//! take and give words.

use crate::abi::{BackendKind, Interface, Path, Pin, PinState, Record, VipTarget};
use crate::classify::{self, Role};
use crate::connections::{self, Caller, Haunts, Opening, Place, Refused, Reply, seen};
use crate::encap::InnerFamily;
use crate::flow::FlowHash;
use crate::forward::volatile;
use crate::nat::{self, Ends, FAMILY_STEP, Layout};
use crate::outcome::Outcome;
use crate::packet::Packet;
use crate::pins::{self, Asked, Says};
use crate::slots;
use crate::tables::Tables;
use crate::wire::{Address6, Ethernet, Ipv4, Ipv6, Mac, PROTO_UDP, TcpFlags};

/// Where a packet lies in its frame and what it is, in one word: bits 0-15 the offset of the transport header, 16-23 the
/// protocol, 24 the family.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Shape(u64);

impl Shape {
    #[inline(always)]
    pub const fn new(at: Layout) -> Self {
        let v6 = matches!(at.family, InnerFamily::V6);
        Self(at.offset as u64 & 0xffff | (at.protocol as u64) << 16 | (v6 as u64) << 24)
    }

    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The offset is cut to what the verifier takes for one into a packet.
    #[inline(always)]
    const fn layout(self) -> Layout {
        Layout {
            family: if self.0 & 1 << 24 == 0 { InnerFamily::V4 } else { InnerFamily::V6 },
            offset: self.0 as usize & 0x3fff,
            protocol: (self.0 >> 16) as u8,
        }
    }
}

/// What became of a packet: bits 0-15 the outcome's number, 16-31 the backend, 32-63 the interface to leave by or, with
/// `AnswerTooBig`, how long the packet may be.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Passed(u64);

impl Passed {
    /// No connection, and its backend is of another kind: it goes on as any other.
    pub const NOT_HERE: Self = Self(0xffff);
    /// As `NOT_HERE`, and it begins: connections of the backend that the slot's old flows have are known.
    pub const BEGINS_ELSEWHERE: Self = Self(0xfffe);
    /// Nothing that any of these modes has to do with.
    pub const NOT_OURS: Self = Self::new(Outcome::PassNotVip, 0, 0);

    #[inline(always)]
    pub(crate) const fn new(outcome: Outcome, backend: u16, value: u32) -> Self {
        Self(outcome as u64 | (backend as u64) << 16 | (value as u64) << 32)
    }

    /// What a step has come to.
    #[inline(always)]
    pub(crate) fn of(result: Result<Self, Outcome>) -> Self {
        match result {
            Ok(passed) => passed,
            Err(outcome) => Self::new(outcome, 0, 0),
        }
    }

    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether its packet goes on as any other.
    #[inline(always)]
    pub fn is_elsewhere(self) -> bool {
        self == Self::NOT_HERE || self == Self::BEGINS_ELSEWHERE
    }

    #[inline(always)]
    pub fn outcome(self) -> Option<Outcome> {
        Outcome::ALL.get(self.0 as usize & 0xffff).copied()
    }

    #[inline(always)]
    pub const fn backend(self) -> u32 {
        (self.0 >> 16) as u32 & 0xffff
    }

    #[inline(always)]
    pub const fn value(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// A client's packet to a service with connections. Up to four steps, each a function of its own in the kernel: together
/// they would take more stack than there is.
#[inline(always)]
pub fn forward<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    target: VipTarget,
    hash: FlowHash,
    shape: Shape,
) -> Passed {
    let found = tables.find_connection(packet, target, shape);
    let found = if found == Found::NONE {
        let claimed = tables.claim_connection(packet, target, hash, shape);
        if claimed.position().is_some() {
            tables.open_connection(packet, target, claimed, shape)
        } else {
            claimed
        }
    } else {
        found
    };
    match found.position() {
        Some(position) => tables.send_translated(packet, target, position, shape),
        None => Passed(found.0),
    }
}

/// Where a connection is: bit 48, and below it the place, with the backend that it is to have in bits 32-46; bit 49 where
/// its ends are of two families. Or why it is nowhere, as in `Passed`.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found(u64);

impl Found {
    const AT: u64 = 1 << 48;
    const ACROSS: u64 = 1 << 49;
    /// Nobody knows it yet.
    pub const NONE: Self = Self(u64::MAX >> 17);

    #[inline(always)]
    pub(crate) const fn at(position: u32) -> Self {
        Self(Self::AT | position as u64)
    }

    #[inline(always)]
    const fn claimed(position: u32, backend: u16) -> Self {
        Self(Self::AT | position as u64 | (backend as u64 & 0x7fff) << 32)
    }

    #[inline(always)]
    const fn backend(self) -> u16 {
        (self.0 >> 32) as u16 & 0x7fff
    }

    /// Marked as one whose ends are of two families.
    #[inline(always)]
    pub(crate) const fn marked_across(self, across: bool) -> Self {
        if across { Self(self.0 | Self::ACROSS) } else { self }
    }

    #[inline(always)]
    pub(crate) const fn is_across(self) -> bool {
        self.0 & Self::ACROSS != 0
    }

    #[inline(always)]
    pub(crate) const fn refused(outcome: Outcome) -> Self {
        Self(Passed::new(outcome, 0, 0).0)
    }

    #[inline(always)]
    pub(crate) const fn position(self) -> Option<u32> {
        if self.0 & Self::AT == 0 { None } else { Some(self.0 as u32) }
    }

    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    pub const fn bits(self) -> u64 {
        self.0
    }
}

/// Looks a connection up, and notes that it was heard of. One that begins anew gives its place up.
#[inline(always)]
pub fn find<P: Packet, T: Tables>(packet: &P, tables: &T, target: VipTarget, shape: Shape) -> Found {
    let at = shape.layout();
    let Some(ends) = nat::ends(packet, at) else { return Found::NONE };
    let haunts = Haunts::new(tables, ends.source, ends.ports, at.protocol);
    let Some(place) = connections::find(tables, haunts, &Caller::of(&ends, at.protocol)) else {
        return Found::NONE;
    };
    let says = classify::says(packet, at.protocol, at.offset, Role::Packet);
    if renew(packet, tables, target, says, &place) { Found::at(place.position) } else { Found::NONE }
}

/// Claims a place for a connection that is not known: one that begins, or (`nat`) one whose state was lost.
#[inline(always)]
pub fn claim<P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    target: VipTarget,
    hash: FlowHash,
    shape: Shape,
) -> Found {
    match claim_or(packet, tables, target, hash, shape.layout()) {
        Ok(found) => found,
        Err(outcome) => Found::refused(outcome),
    }
}

/// Opens a connection that has a place.
#[inline(always)]
pub fn open<P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    target: VipTarget,
    claimed: Found,
    shape: Shape,
) -> Found {
    match begin(packet, tables, target, claimed, shape.layout()) {
        Ok(position) => Found::at(position),
        Err(outcome) => Found::refused(outcome),
    }
}

/// Sends a packet to the backend of its connection.
#[inline(always)]
pub fn send<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    target: VipTarget,
    position: u32,
    shape: Shape,
) -> Passed {
    Passed::of(send_or(packet, tables, target, position, shape.layout()))
}

#[inline(always)]
fn send_or<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    target: VipTarget,
    position: u32,
    at: Layout,
) -> Result<Passed, Outcome> {
    let ends = nat::ends(packet, at).ok_or(Outcome::DropVipTruncated)?;
    let place = connections::at(tables, position).ok_or(Outcome::DropInconsistent)?;
    let id = place.pin.backend();
    let backend = slots::backend(tables, id)?.backend;
    let kind = BackendKind::from_raw(backend.kind).ok_or(Outcome::DropInconsistent)?;
    let path = Path::from_bits(volatile(&backend.path));
    let egress = tables.egress(path.egress()).ok_or(Outcome::DropInconsistent)?;
    // The place may have changed hands since it was found.
    if !kind.translates() || !connections::is_of(tables, place.record, &Caller::of(&ends, at.protocol)) {
        return Err(Outcome::DropConnectionsFull);
    }
    if egress.ifindex == 0 {
        return Err(Outcome::DropUnresolved);
    }
    let length = ip_length(packet, at).ok_or(Outcome::DropVipTruncated)?;
    if let Some(most) = too_long(length, egress.mtu, at.family, backend.is_v4()) {
        return Ok(Passed::new(Outcome::AnswerTooBig, id, most));
    }
    let port = connections::port_of(backend, ends.ports as u64);
    let mut to = Ends {
        source: ends.source,
        destination: connections::address_of(backend),
        ports: ends.ports & 0xffff | port << 16,
    };
    if kind.translates_source() {
        let row = tables.word(&place.record.0[Record::ROW]);
        let (source, source_port) = connections::source_of(tables, row, backend)?;
        to.source = source;
        to.ports = source_port | port << 16;
    }
    nat::rewrite(packet, at, &ends, &to, (path.mac(), Mac::from_bits(egress.source_mac)))?;
    tables.count_vip(target.vip(), length as u64);
    tables.count_backend(id, length as u64);
    let here = egress.ifindex == packet.ingress_ifindex();
    let outcome = if here { Outcome::ForwardTransmit } else { Outcome::ForwardRedirect };
    Ok(Passed::new(outcome, id, if here { 0 } else { egress.ifindex }))
}

/// How long a packet may be whose translation is longer than `mtu`.
#[inline(always)]
fn too_long(length: u32, mtu: u32, family: InnerFamily, to_v4: bool) -> Option<u32> {
    let most = match (family, to_v4) {
        (InnerFamily::V4, false) => mtu.wrapping_sub(FAMILY_STEP),
        (InnerFamily::V6, true) => mtu.wrapping_add(FAMILY_STEP),
        _ => mtu,
    };
    if length > most { Some(most) } else { None }
}

#[inline(always)]
fn ip_length<P: Packet>(packet: &P, at: Layout) -> Option<u32> {
    const IP: usize = size_of::<Ethernet>();
    Some(match at.family {
        InnerFamily::V4 => { packet.header::<Ipv4>(IP)?.total_length }.get() as u32,
        InnerFamily::V6 => {
            { packet.header::<Ipv6>(IP)?.payload_length }.get() as u32 + size_of::<Ipv6>() as u32
        }
    })
}

/// A packet of a connection that is known; false where it begins another one of the same ends, whose backend is to be
/// chosen anew.
#[inline(always)]
fn renew<P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    target: VipTarget,
    says: Says,
    place: &Place<'_>,
) -> bool {
    let (pin, age) = (place.pin, Pin::age_of(tables.clock()));
    if says.begins() && !pins::holds(tables, says, pin, age) {
        let ended = Pin::new(pin.tag(), pin.backend(), PinState::Finishing, pin.age());
        // Whoever was faster has seen to it.
        if tables.exchange(place.word, pin.bits(), 0) {
            weigh(tables, target, pin, ended);
        }
        return false;
    }
    let next = Pin::new(pin.tag(), pin.backend(), pins::next_state(pin.state(), says), age);
    if next != pin && tables.exchange(place.word, pin.bits(), next.bits()) {
        weigh(tables, target, pin, next);
    }
    if matches!(next.state(), PinState::Syn) && !matches!(pin.state(), PinState::Syn) {
        // The same ports again: how long its first answer takes is of interest again, too.
        let key = tables.word(&place.record.0[Record::PORTS]);
        tables.store(&place.record.0[Record::OPENED], tables.precise_clock());
        tables.exchange(&place.record.0[Record::PORTS], key, key & !seen::ALL);
    }
    follow(packet, tables, place);
    true
}

#[inline(always)]
fn weigh<T: Tables>(tables: &T, target: VipTarget, pin: Pin, next: Pin) {
    if let Some(table) = tables.table_word(target.table()) {
        pins::weigh(tables, table, pin, next);
    }
}

/// Keeps the way back in step with where the client's packets come from.
#[inline(always)]
fn follow<P: Packet, T: Tables>(packet: &P, tables: &T, place: &Place<'_>) {
    let Some(ethernet) = packet.header::<Ethernet>(0) else { return };
    let word = &place.record.0[Record::BACK];
    let back = Path::from_bits(tables.word(word));
    let here = match tables.egress(back.egress()) {
        Some(egress) => egress.ifindex == packet.ingress_ifindex(),
        None => false,
    };
    if back.mac() == ethernet.source() && here {
        return;
    }
    // The place may have changed hands: then this is the way to another, or will be.
    let pin = Pin::from_bits(tables.word(place.word));
    if pin.tag() == place.pin.tag() {
        tables.exchange(word, back.bits(), way_back(packet, tables).bits());
    }
}

/// Where a packet came from.
#[inline(always)]
fn way_back<P: Packet, T: Tables>(packet: &P, tables: &T) -> Path {
    let Some(ethernet) = packet.header::<Ethernet>(0) else { return Path::default() };
    let row = tables.interface(packet.ingress_ifindex()).map_or(0, Interface::egress);
    Path::new(ethernet.source(), row)
}

/// The backend of a connection that is not known, and whether it begins. A datagram's does where old flows would be
/// known; elsewhere nothing but a pin may say so.
#[inline(always)]
fn pick<T: Tables>(
    tables: &T,
    target: VipTarget,
    hash: FlowHash,
    says: Says,
) -> Result<(u16, bool), Outcome> {
    let found = slots::find(tables, target.table(), hash)?;
    let new = says.begins()
        || says.has(Says::DATAGRAM)
            && (found.table.discipline().pins_all() || !has_other_flows(tables, found.slot.est())?);
    let asked = Asked::new(target.table(), says.to(target));
    let moves = new && !pins::is_of_old_client(tables, asked, found.slot);
    let own = if moves { found.slot.cur() } else { found.slot.est() };
    // Where that is of another kind, it takes its turn on its own way.
    let kind = BackendKind::from_raw(slots::backend(tables, own)?.backend.kind);
    if !moves || !kind.is_some_and(BackendKind::translates) {
        return Ok((own, new));
    }
    Ok((tables.pick(found.table, asked, found.slot), new))
}

/// Whether a backend may have flows that no connection tells of.
#[inline(always)]
fn has_other_flows<T: Tables>(tables: &T, id: u16) -> Result<bool, Outcome> {
    let kind = BackendKind::from_raw(slots::backend(tables, id)?.backend.kind);
    Ok(!matches!(kind, None | Some(BackendKind::Nobody | BackendKind::Pass))
        && !kind.is_some_and(BackendKind::translates))
}

#[inline(always)]
fn claim_or<P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    target: VipTarget,
    hash: FlowHash,
    at: Layout,
) -> Result<Found, Outcome> {
    let says = classify::says(packet, at.protocol, at.offset, Role::Packet);
    let (backend, new) = pick(tables, target, hash, says)?;
    let row = slots::backend(tables, backend)?.backend;
    let Some(kind) = BackendKind::from_raw(row.kind) else { return Err(Outcome::DropInconsistent) };
    if !kind.translates() {
        return Ok(Found(if new { Passed::BEGINS_ELSEWHERE } else { Passed::NOT_HERE }.0));
    }
    if kind.translates_source() && !new {
        return Err(Outcome::DropNoConnection);
    }
    let ends = nat::ends(packet, at).ok_or(Outcome::DropVipTruncated)?;
    if !kind.translates_source() && row.is_v4() != ends.source.is_mapped_v4() {
        return Err(Outcome::DropUntranslatable);
    }
    let haunts = Haunts::new(tables, ends.source, ends.ports, at.protocol);
    let pin = Pin::new(haunts.tag, backend, pins::first_state(says), Pin::age_of(tables.clock()));
    match connections::claim(tables, haunts, pin) {
        Ok(position) => Ok(Found::claimed(position, backend)),
        Err(refused) => Err(refused.outcome()),
    }
}

#[inline(always)]
fn begin<P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    target: VipTarget,
    claimed: Found,
    at: Layout,
) -> Result<u32, Outcome> {
    let position = claimed.position().ok_or(Outcome::DropInconsistent)?;
    let ends = nat::ends(packet, at).ok_or(Outcome::DropVipTruncated)?;
    let caller = Caller::of(&ends, at.protocol);
    let haunts = Haunts::new(tables, ends.source, ends.ports, at.protocol);
    let backend = slots::backend(tables, claimed.backend())?.backend;
    let alone = if connections::is_nat(backend) { Some(backend) } else { None };
    let opening = Opening { backend: claimed.backend(), back: way_back(packet, tables), target };
    match connections::open(tables, position, haunts, &caller, &opening, alone) {
        Ok(pin) => {
            weigh(tables, target, Pin::default(), pin);
            Ok(position)
        }
        // Another packet of it may be through by now.
        Err(Refused::Busy) => match connections::find(tables, haunts, &caller) {
            Some(place) => Ok(place.position),
            None => Err(Refused::Busy.outcome()),
        },
        Err(refused) => Err(refused.outcome()),
    }
}

/// A packet that is to no VIP: a backend's to a client, or none of ours (`PassNotVip`). `source` is one more than the
/// number of the source that it is to, or 0.
#[inline(always)]
pub fn reply<P: Packet, T: Tables>(packet: &mut P, tables: &T, source: u32, shape: Shape) -> Passed {
    reply_or(packet, tables, source, shape.layout()).map_or(Passed::NOT_OURS, Passed::of)
}

#[inline(always)]
fn reply_or<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    source: u32,
    at: Layout,
) -> Option<Result<Passed, Outcome>> {
    let ends = nat::ends(packet, at)?;
    let place = connections::find_reply(tables, source, &ends, at.protocol)?;
    let word = |index: usize| tables.word(&place.record.0[index]);
    let to = Ends {
        source: Address6 { high: word(2), low: word(3) },
        destination: Address6 { high: word(0), low: word(1) },
        ports: (word(Record::PORTS) as u32).rotate_left(16),
    };
    let back = Path::from_bits(word(Record::BACK));
    // The place may have changed hands while its record was read.
    let pin = Pin::from_bits(tables.word(place.word));
    if pin.tag() != place.pin.tag() || pin.backend() != place.pin.backend() {
        return None;
    }
    let egress = tables.egress(back.egress())?;
    if egress.ifindex == 0 {
        return Some(Err(Outcome::DropUnresolved));
    }
    let length = ip_length(packet, at)?;
    if let Some(most) = too_long(length, egress.mtu, at.family, to.destination.is_mapped_v4()) {
        return Some(Ok(Passed::new(Outcome::AnswerTooBig, pin.backend(), most)));
    }
    hear(packet, tables, at, &place, pin, length);
    let station = (back.mac(), Mac::from_bits(egress.source_mac));
    if let Err(outcome) = nat::rewrite(packet, at, &ends, &to, station) {
        return Some(Err(outcome));
    }
    let here = egress.ifindex == packet.ingress_ifindex();
    let outcome = if here { Outcome::ForwardReplyTransmit } else { Outcome::ForwardReplyRedirect };
    Some(Ok(Passed::new(outcome, pin.backend(), if here { 0 } else { egress.ifindex })))
}

/// What a backend's packet tells of its connection.
#[inline(always)]
fn hear<P: Packet, T: Tables>(packet: &P, tables: &T, at: Layout, place: &Place<'_>, pin: Pin, length: u32) {
    let flags = match packet.header::<TcpFlags>(at.offset + TcpFlags::OFFSET) {
        Some(flags) if at.protocol != PROTO_UDP => flags.flags,
        _ => 0,
    };
    let reset = flags & TcpFlags::RST != 0;
    let ends = flags & (TcpFlags::FIN | TcpFlags::RST) != 0;
    let state = if ends { PinState::Finishing } else { pin.state() };
    let next = Pin::new(pin.tag(), pin.backend(), state, Pin::age_of(tables.clock()));
    if next != pin {
        // Another packet was faster: that one's age will do.
        tables.exchange(place.word, pin.bits(), next.bits());
    }
    let key = tables.word(&place.record.0[Record::PORTS]);
    let more = seen::ANSWER | if reset { seen::RESET } else { 0 };
    let mut waited = 0;
    if key & more != more
        && tables.exchange(&place.record.0[Record::PORTS], key, key | more)
        && key & seen::ANSWER == 0
    {
        waited = tables.precise_clock().wrapping_sub(tables.word(&place.record.0[Record::OPENED]));
    }
    tables.count_reply(pin.backend(), Reply { bytes: length as u64, reset, waited });
}
