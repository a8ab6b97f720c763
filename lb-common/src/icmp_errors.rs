//! ICMP errors about packets of connections whose addresses are translated. Each goes to who sent the packet, and speaks
//! of it as that one sent it: to the client about what went to the VIP, to the backend about what went to the client
//! or to a source.
//!
//! A router's address stays where the error keeps its family; where it cannot, and where it is the backend's own, the VIP
//! or the source stands for it. Between families type, code and MTU are what RFC 7915, sections 4.2 and 5.2, makes of
//! them; extensions (RFC 4884) lose their length, and so are bytes of the packet. Checksums are updated, not computed
//! (RFC 1624). An error changes nothing of the connection that it names.

use crate::abi::{Backend, BackendKind, Egress, Path, Record};
use crate::allowance::Limited;
use crate::checksum::{address6, fold, halves, negative};
use crate::connections::{self, Caller, Haunts};
use crate::encap::InnerFamily;
use crate::forward::volatile;
use crate::icmp::SMALLEST_MTU6;
use crate::nat::{self, Checksum, Ends, FAMILY_STEP, Layout};
use crate::outcome::Outcome;
use crate::packet::Packet;
use crate::parse::is_martian6;
use crate::slots;
use crate::tables::Tables;
use crate::translate::{Found, Passed};
use crate::wire::{
    Address6, Be16, Be32, EtherType, Ethernet, Icmp, Ipv4, Ipv6, Mac, PROTO_ICMP, PROTO_ICMPV6, PROTO_TCP,
    PROTO_UDP, Ports, header,
};

const IP: usize = size_of::<Ethernet>();

/// Where an error lies in its frame and whom it is for, in one word: bits 0-15 the offset of the ICMP header, 16 the
/// family, 17 whether the client gets it.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct About(u64);

impl About {
    #[inline(always)]
    pub const fn new(family: InnerFamily, offset: usize, for_client: bool) -> Self {
        let v6 = matches!(family, InnerFamily::V6);
        Self(offset as u64 & 0xffff | (v6 as u64) << 16 | (for_client as u64) << 17)
    }

    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Of the ICMP header; cut to what the verifier takes for an offset into a packet.
    #[inline(always)]
    const fn offset(self) -> usize {
        self.0 as usize & 0x3fff
    }

    /// Of the packet that it carries.
    #[inline(always)]
    const fn carried(self) -> usize {
        self.offset() + size_of::<Icmp>()
    }

    #[inline(always)]
    const fn is_v4(self) -> bool {
        self.0 & 1 << 16 == 0
    }

    #[inline(always)]
    const fn family(self) -> InnerFamily {
        if self.is_v4() { InnerFamily::V4 } else { InnerFamily::V6 }
    }

    #[inline(always)]
    const fn for_client(self) -> bool {
        self.0 & 1 << 17 != 0
    }
}

/// The packet that an error carries, and how much of it.
#[derive(Clone, Copy)]
struct Carried {
    /// Where its transport header lies.
    offset: usize,
    protocol: u8,
    /// Where the IP packet with the error ends.
    end: usize,
}

/// Sends an error to whom it concerns; `NOT_HERE` where that is nobody of ours. `source` as `connections::find_reply`
/// takes it. Each step is a function of its own in the kernel.
#[inline(always)]
pub fn pass_on<P: Packet, T: Tables>(packet: &mut P, tables: &T, about: About, source: u32) -> Passed {
    let found = tables.find_error(packet, about, source);
    match found.position() {
        Some(position) if found.is_across() => {
            let half = tables.cross_error(packet, position, about);
            if let Some(refused) = half.refused() {
                refused
            } else if about.is_v4() {
                tables.widen_error(packet, position, about, half)
            } else {
                tables.narrow_error(packet, position, about, half)
            }
        }
        Some(position) => tables.send_error(packet, position, about),
        None if found == Found::NONE => Passed::NOT_HERE,
        None => Passed::from_bits(found.bits()),
    }
}

/// The connection that an error is about. A client's errors count against their rate here, those of others where they
/// were read.
#[inline(always)]
pub fn find<P: Packet, T: Tables>(packet: &P, tables: &T, about: About, source: u32) -> Found {
    let Some(carried) = carried(packet, about) else { return Found::NONE };
    let Some(ends) = ends(packet, about, &carried) else { return Found::NONE };
    // Who gets the error has sent the packet, or somebody made it up.
    if addressed(packet, about).is_none_or(|(_, to)| to != ends.source) {
        return Found::NONE;
    }
    let back = ends.reversed();
    let place = if about.for_client() {
        connections::find_reply(tables, source, &back, carried.protocol)
    } else {
        let caller = Caller::of(&back, carried.protocol);
        let haunts = Haunts::new(tables, back.source, back.ports, carried.protocol);
        connections::find(tables, haunts, &caller)
    };
    let Some(place) = place else { return Found::NONE };
    if about.for_client() && !tables.admit(Limited::Error) {
        return Found::refused(Outcome::DropIcmpLimit);
    }
    let client = Address6 { high: tables.word(&place.record.0[0]), low: tables.word(&place.record.0[1]) };
    let backend = tables.backend(place.pin.backend());
    let across = backend.is_some_and(|backend| backend.is_v4() != client.is_mapped_v4());
    Found::at(place.position).marked_across(across)
}

/// Reads how the packet lies that an error carries.
#[inline(always)]
fn carried<P: Packet>(packet: &P, about: About) -> Option<Carried> {
    let at = about.carried();
    let (length, header_length, protocol) = if about.is_v4() {
        let length = { packet.header::<Ipv4>(IP)?.total_length }.get() as usize;
        let sent = packet.header::<Ipv4>(at)?;
        let header_length = sent.header_length();
        if sent.version() != 4 || header_length < size_of::<Ipv4>() || sent.is_later_fragment() {
            return None;
        }
        (length, header_length, sent.protocol)
    } else {
        let length = { packet.header::<Ipv6>(IP)?.payload_length }.get() as usize + size_of::<Ipv6>();
        let sent = packet.header::<Ipv6>(at)?;
        if sent.version() != 6 {
            return None;
        }
        (length, size_of::<Ipv6>(), sent.next_header)
    };
    let (offset, end) = (at + header_length, IP + length);
    let known = protocol == PROTO_TCP || protocol == PROTO_UDP;
    (known && offset + Ports::SHORTEST_TRANSPORT <= end).then_some(Carried { offset, protocol, end })
}

/// The ends of the packet that an error carries.
#[inline(always)]
fn ends<P: Packet>(packet: &P, about: About, carried: &Carried) -> Option<Ends> {
    let Carried { offset, protocol, .. } = *carried;
    nat::ends_at(packet, Layout { family: about.family(), offset, protocol }, about.carried())
}

/// Who sends an error, and to whom.
#[inline(always)]
fn addressed<P: Packet>(packet: &P, about: About) -> Option<(Address6, Address6)> {
    Some(if about.is_v4() {
        let ip = packet.header::<Ipv4>(IP)?;
        (Address6::mapped({ ip.source }.raw()), Address6::mapped({ ip.destination }.raw()))
    } else {
        let ip = packet.header::<Ipv6>(IP)?;
        (ip.source, ip.destination)
    })
}

/// The connection of an error, on its way to who gets it.
#[derive(Clone, Copy)]
struct Course<'t> {
    record: &'t Record,
    id: u16,
    backend: &'t Backend,
    kind: BackendKind,
    path: Path,
    egress: &'t Egress,
}

impl<'t> Course<'t> {
    #[inline(always)]
    fn of<T: Tables>(tables: &'t T, position: u32, about: About) -> Result<Self, Outcome> {
        let place = connections::at(tables, position).ok_or(Outcome::DropInconsistent)?;
        let id = place.pin.backend();
        let backend = slots::backend(tables, id)?.backend;
        let kind = BackendKind::from_raw(backend.kind).ok_or(Outcome::DropInconsistent)?;
        if !kind.translates() {
            return Err(Outcome::DropIcmpStranger);
        }
        let path = if about.for_client() {
            tables.word(&place.record.0[Record::BACK])
        } else {
            volatile(&backend.path)
        };
        let path = Path::from_bits(path);
        let egress = tables.egress(path.egress()).ok_or(Outcome::DropInconsistent)?;
        if egress.ifindex == 0 {
            return Err(Outcome::DropUnresolved);
        }
        Ok(Self { record: place.record, id, backend, kind, path, egress })
    }

    /// The ends of the packet that the error is about, as who gets it has sent it. Read anew each time: nothing of it has
    /// to be kept.
    #[inline(always)]
    fn ends<T: Tables>(&self, tables: &T, about: About) -> Result<Ends, Outcome> {
        let word = |index: usize| tables.word(&self.record.0[index]);
        let ports = word(Record::PORTS);
        let client = Address6 { high: word(0), low: word(1) };
        if about.for_client() {
            let destination = Address6 { high: word(2), low: word(3) };
            return Ok(Ends { source: client, destination, ports: ports as u32 });
        }
        let source = connections::address_of(self.backend);
        let port = connections::port_of(self.backend, ports);
        if self.kind.translates_source() {
            let (destination, its) = connections::source_of(tables, word(Record::ROW), self.backend)?;
            Ok(Ends { source, destination, ports: port | its << 16 })
        } else {
            Ok(Ends { source, destination: client, ports: port | (ports as u32) << 16 })
        }
    }

    /// What becomes of an error that is ready but for its Ethernet header; `length` as it came.
    #[inline(always)]
    fn leave<P: Packet, T: Tables>(
        &self,
        packet: &mut P,
        tables: &T,
        about: About,
        ethertype: EtherType,
        length: u32,
    ) -> Result<Passed, Outcome> {
        let ethernet = packet.header_mut::<Ethernet>(0).ok_or(Outcome::DropHeadroom)?;
        *ethernet = Ethernet::new(self.path.mac(), Mac::from_bits(self.egress.source_mac), ethertype);
        if !about.for_client() {
            tables.count_vip(tables.word(&self.record.0[Record::ROW]) as u32, length as u64);
            tables.count_backend(self.id, length as u64);
        }
        let here = self.egress.ifindex == packet.ingress_ifindex();
        let outcome = match (about.for_client(), here) {
            (true, true) => Outcome::ForwardReplyErrorTransmit,
            (true, false) => Outcome::ForwardReplyErrorRedirect,
            (false, true) => Outcome::ForwardErrorTransmit,
            (false, false) => Outcome::ForwardErrorRedirect,
        };
        Ok(Passed::new(outcome, self.id, if here { 0 } else { self.egress.ifindex }))
    }
}

/// Translates an error of a connection that keeps its family, and sends it off.
#[inline(always)]
pub fn send<P: Packet, T: Tables>(packet: &mut P, tables: &T, position: u32, about: About) -> Passed {
    Passed::of(send_or(packet, tables, position, about))
}

#[inline(always)]
fn send_or<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    position: u32,
    about: About,
) -> Result<Passed, Outcome> {
    let carried = carried(packet, about).ok_or(Outcome::DropVipTruncated)?;
    let course = Course::of(tables, position, about)?;
    let length = (carried.end - IP) as u32;
    // RFC 1122, 3.2.2; RFC 4443, 2.4 e: nobody is told about an error.
    if length > course.egress.mtu {
        return Err(Outcome::DropOversize);
    }
    let reporter = addressed(packet, about).ok_or(Outcome::DropVipTruncated)?.0;
    let sent = ends(packet, about, &carried).ok_or(Outcome::DropVipTruncated)?;
    let hidden = if about.for_client() {
        reporter == sent.destination || !about.is_v4() && is_martian6(reporter)
    } else {
        course.kind.translates_source()
    };
    let to = course.ends(tables, about)?;
    let change = transport(packet, &carried, &sent, &to)?;
    let reporter = if hidden { to.destination } else { reporter };
    let ethertype = if about.is_v4() {
        same4(packet, about, reporter, &to, change)
    } else {
        same6(packet, about, reporter, &to, change)
    }?;
    course.leave(packet, tables, about, ethertype, length)
}

/// An error between families whose carried packet has its new transport header, and everything else as before: bits 0-31
/// what that header adds to the sum over it, 32-39 the protocol. Without a protocol nothing was done: bits 0-15 why.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Half(u64);

impl Half {
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    pub const fn bits(self) -> u64 {
        self.0
    }

    #[inline(always)]
    const fn refused(self) -> Option<Passed> {
        if self.protocol() == 0 { Some(Passed::from_bits(self.0 & 0xffff)) } else { None }
    }

    #[inline(always)]
    const fn change(self) -> u32 {
        self.0 as u32
    }

    #[inline(always)]
    const fn protocol(self) -> u8 {
        (self.0 >> 32) as u8
    }
}

/// Begins to translate an error of a connection between families.
#[inline(always)]
pub fn cross<P: Packet, T: Tables>(packet: &mut P, tables: &T, position: u32, about: About) -> Half {
    match cross_or(packet, tables, position, about) {
        Ok(half) => half,
        Err(outcome) => Half(outcome as u64),
    }
}

#[inline(always)]
fn cross_or<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    position: u32,
    about: About,
) -> Result<Half, Outcome> {
    let carried = carried(packet, about).ok_or(Outcome::DropVipTruncated)?;
    // No options: hosts send none. No fragments: none were sent.
    let (ip, plain) = if about.is_v4() {
        (size_of::<Ipv4>(), size_of::<Frame4>())
    } else {
        (size_of::<Ipv6>(), size_of::<Frame6>())
    };
    if about.offset() != IP + ip || carried.offset != plain {
        return Err(Outcome::DropUntranslatable);
    }
    let course = Course::of(tables, position, about)?;
    // RFC 1122, 3.2.2; RFC 4443, 2.4 e: nobody is told about an error.
    let length = (carried.end - IP) as u32;
    let room = course.egress.mtu;
    let most = if about.is_v4() { room.wrapping_sub(2 * FAMILY_STEP) } else { room + 2 * FAMILY_STEP };
    if length > most {
        return Err(Outcome::DropOversize);
    }
    let to = course.ends(tables, about)?;
    let sent = ends(packet, about, &carried).ok_or(Outcome::DropVipTruncated)?;
    let change = transport(packet, &carried, &sent, &to)?;
    Ok(Half(change as u64 | (carried.protocol as u64) << 32))
}

/// The rest of an error that goes from IPv4 to IPv6.
#[inline(always)]
pub fn widen<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    position: u32,
    about: About,
    half: Half,
) -> Passed {
    Passed::of(widen_or(packet, tables, position, about, half))
}

#[inline(always)]
fn widen_or<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    position: u32,
    about: About,
    half: Half,
) -> Result<Passed, Outcome> {
    // The course is found anew for each step: there is no room to keep all of it.
    let mtu = Course::of(tables, position, about)?.egress.mtu;
    let frame = packet.header::<Frame4>(0).ok_or(Outcome::DropVipTruncated)?;
    // Of all of the error, and, as the carried header grows, of what will be behind the first one.
    let length = { frame.ip.total_length };
    let head = counterpart4(Head::of(&frame.icmp), mtu).ok_or(Outcome::DropUntranslatable)?;
    let gone = Head::of(&frame.icmp).sum() + frame.sent.sum() + { frame.sent.checksum }.raw() as u32;
    let change = half.change() + negative(gone) + head.sum();
    let before = frame.icmp.checksum;
    let (tos, hop_limit) = (frame.ip.tos, frame.ip.ttl);
    let (sent_tos, sent_ttl, sent_length) = (frame.sent.tos, frame.sent.ttl, { frame.sent.total_length });
    packet.grow_head(2 * FAMILY_STEP as usize).ok_or(Outcome::DropHeadroom)?;
    let to = Course::of(tables, position, about)?.ends(tables, about)?;
    let frame = packet.header_mut::<Frame6>(0).ok_or(Outcome::DropHeadroom)?;
    frame.ip = Ipv6 {
        version_class_flow: Ipv6::first_word(tos, 0),
        payload_length: length,
        next_header: PROTO_ICMPV6,
        hop_limit,
        source: to.destination,
        destination: to.source,
    };
    frame.sent = Ipv6 {
        version_class_flow: Ipv6::first_word(sent_tos, 0),
        payload_length: Be16::new(sent_length.get().wrapping_sub(size_of::<Ipv4>() as u16)),
        next_header: half.protocol(),
        hop_limit: sent_ttl,
        source: to.source,
        destination: to.destination,
    };
    let checksum = changed(before, change + sum6(&frame.sent) + pseudo6(&frame.ip));
    frame.icmp = head.with(checksum);
    Course::of(tables, position, about)?.leave(packet, tables, about, EtherType::IPV6, length.get() as u32)
}

/// The rest of an error that goes from IPv6 to IPv4.
#[inline(always)]
pub fn narrow<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    position: u32,
    about: About,
    half: Half,
) -> Passed {
    Passed::of(narrow_or(packet, tables, position, about, half))
}

#[inline(always)]
fn narrow_or<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    position: u32,
    about: About,
    half: Half,
) -> Result<Passed, Outcome> {
    // The course is found anew for each step: there is no room to keep all of it.
    let mtu = Course::of(tables, position, about)?.egress.mtu;
    let frame = packet.header::<Frame6>(0).ok_or(Outcome::DropVipTruncated)?;
    // Of what is behind the first header, and, as the carried one shrinks, of all that there will be.
    let length = { frame.ip.payload_length }.get() as u32;
    let head = counterpart6(Head::of(&frame.icmp), mtu).ok_or(Outcome::DropUntranslatable)?;
    let gone = Head::of(&frame.icmp).sum() + sum6(&frame.sent) + pseudo6(&frame.ip);
    // The carried header sums up to nothing now, with its checksum.
    let checksum = changed(frame.icmp.checksum, half.change() + negative(gone) + head.sum());
    let hops = (frame.ip.traffic_class(), frame.ip.hop_limit);
    let sent_hops = (frame.sent.traffic_class(), frame.sent.hop_limit);
    let sent_length = { frame.sent.payload_length }.get() as u32 + size_of::<Ipv4>() as u32;
    packet.shrink_head(2 * FAMILY_STEP as usize).ok_or(Outcome::DropHeadroom)?;
    let to = Course::of(tables, position, about)?.ends(tables, about)?;
    let frame = packet.header_mut::<Frame4>(0).ok_or(Outcome::DropHeadroom)?;
    frame.ip = nat::header4(hops, length, checksum, PROTO_ICMP, to.destination, to.source);
    frame.icmp = head.with(checksum);
    frame.sent =
        nat::header4(sent_hops, sent_length, Be16::new(0), half.protocol(), to.source, to.destination);
    Course::of(tables, position, about)?.leave(
        packet,
        tables,
        about,
        EtherType::IPV4,
        length + size_of::<Ipv6>() as u32,
    )
}

/// Gives the carried packet other ports, and the checksum that it had with them if that is there. What this adds to the
/// sum over it.
#[inline(always)]
fn transport<P: Packet>(packet: &mut P, carried: &Carried, sent: &Ends, to: &Ends) -> Result<u32, Outcome> {
    let at = carried.offset + nat::checksum_at(carried.protocol);
    let mut change = negative(halves(sent.ports)) + halves(to.ports);
    if at + size_of::<Checksum>() <= carried.end
        && let Some(checksum) = packet.header_mut::<Checksum>(at)
        && let before = { checksum.sum }.raw()
        && let Some(after) = nat::checksum_after(before, sent.sum(), to.sum(), carried.protocol)
    {
        checksum.sum = Be16::from_raw(after);
        change += negative(before as u32) + after as u32;
    }
    packet.header_mut::<Ports>(carried.offset).ok_or(Outcome::DropVipTruncated)?.both = to.ports;
    Ok(change)
}

/// An ICMP header and the packet behind it.
#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Error4 {
    icmp: Icmp,
    sent: Ipv4,
}

header!(Error4, 28);

#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Error6 {
    icmp: Icmp,
    sent: Ipv6,
}

header!(Error6, 48);

/// Headers with checksums sum up to the same whatever their addresses are.
#[inline(always)]
fn same4<P: Packet>(
    packet: &mut P,
    about: About,
    reporter: Address6,
    to: &Ends,
    change: u32,
) -> Result<EtherType, Outcome> {
    let ip = packet.header_mut::<Ipv4>(IP).ok_or(Outcome::DropVipTruncated)?;
    nat::readdress4(ip, reporter, to.source);
    let error = packet.header_mut::<Error4>(about.offset()).ok_or(Outcome::DropVipTruncated)?;
    nat::readdress4(&mut error.sent, to.source, to.destination);
    error.icmp.checksum = changed(error.icmp.checksum, change);
    Ok(EtherType::IPV4)
}

#[inline(always)]
fn same6<P: Packet>(
    packet: &mut P,
    about: About,
    reporter: Address6,
    to: &Ends,
    change: u32,
) -> Result<EtherType, Outcome> {
    let ip = packet.header_mut::<Ipv6>(IP).ok_or(Outcome::DropVipTruncated)?;
    let outer = readdress6(ip, reporter, to.source);
    let error = packet.header_mut::<Error6>(about.offset()).ok_or(Outcome::DropVipTruncated)?;
    let inner = readdress6(&mut error.sent, to.source, to.destination);
    error.icmp.checksum = changed(error.icmp.checksum, change + outer + inner);
    Ok(EtherType::IPV6)
}

/// Other addresses. What this adds to the sum over the header.
#[inline(always)]
fn readdress6(ip: &mut Ipv6, source: Address6, destination: Address6) -> u32 {
    let before = address6(ip.source) + address6(ip.destination);
    (ip.source, ip.destination) = (source, destination);
    negative(before) + address6(source) + address6(destination)
}

#[inline(always)]
const fn changed(checksum: Be16, change: u32) -> Be16 {
    Be16::from_raw(!fold(!checksum.raw() as u32 + change))
}

/// All in front of the carried packet's transport header.
#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Frame4 {
    ethernet: Ethernet,
    ip: Ipv4,
    icmp: Icmp,
    sent: Ipv4,
}

header!(Frame4, 62);

#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Frame6 {
    ethernet: Ethernet,
    ip: Ipv6,
    icmp: Icmp,
    sent: Ipv6,
}

header!(Frame6, 102);

/// An ICMP header without its checksum, in one word whose memory is that of the header: the compiler moves structs in
/// pieces that the verifier (6.18) calls misaligned.
#[derive(Clone, Copy)]
struct Head(u64);

impl Head {
    #[inline(always)]
    const fn new(kind: u8, code: u8, rest: u32) -> Self {
        Self(kind as u64 | (code as u64) << 8 | (rest.to_be() as u64) << 32)
    }

    #[inline(always)]
    const fn of(icmp: &Icmp) -> Self {
        Self(icmp.kind as u64 | (icmp.code as u64) << 8 | (icmp.rest.raw() as u64) << 32)
    }

    #[inline(always)]
    const fn kind(self) -> u8 {
        self.0 as u8
    }

    #[inline(always)]
    const fn code(self) -> u8 {
        (self.0 >> 8) as u8
    }

    #[inline(always)]
    const fn rest(self) -> u32 {
        u32::from_be((self.0 >> 32) as u32)
    }

    #[inline(always)]
    const fn sum(self) -> u32 {
        (self.0 & 0xffff) as u32 + halves((self.0 >> 32) as u32)
    }

    #[inline(always)]
    const fn with(self, checksum: Be16) -> Icmp {
        Icmp { kind: self.kind(), code: self.code(), checksum, rest: Be32::from_raw((self.0 >> 32) as u32) }
    }
}

#[inline(always)]
fn sum6(ip: &Ipv6) -> u32 {
    halves({ ip.version_class_flow }.raw())
        + { ip.payload_length }.raw() as u32
        + ip.next_header as u32
        + ((ip.hop_limit as u32) << 8)
        + address6(ip.source)
        + address6(ip.destination)
}

/// The pseudo header of ICMPv6 behind this header (RFC 8200, section 8.1).
#[inline(always)]
fn pseudo6(ip: &Ipv6) -> u32 {
    address6(ip.source)
        + address6(ip.destination)
        + { ip.payload_length }.raw() as u32
        + Be16::new(PROTO_ICMPV6 as u16).raw() as u32
}

/// The ICMPv6 header for an error of ICMP (RFC 7915, section 4.2); nothing where there is none.
#[inline(always)]
fn counterpart4(head: Head, mtu: u32) -> Option<Head> {
    let code = head.code();
    let (kind, code, rest) = match head.kind() {
        Icmp::UNREACHABLE if code == Icmp::FRAGMENTATION_NEEDED => {
            // A router that does not say how much (0) gets the least, as one that says less than IPv6 can.
            let most = (head.rest() & 0xffff) + FAMILY_STEP;
            let most = if most > mtu { mtu } else { most };
            (Icmp::PACKET_TOO_BIG6, 0, if most < SMALLEST_MTU6 { SMALLEST_MTU6 } else { most })
        }
        Icmp::UNREACHABLE => match code {
            0 | 1 | 5 | 6 | 7 | 8 | 11 | 12 => (Icmp::UNREACHABLE6, Icmp::NO_ROUTE6, 0),
            2 => (Icmp::PARAMETER_PROBLEM6, Icmp::NEXT_HEADER6, 6),
            Icmp::PORT_UNREACHABLE => (Icmp::UNREACHABLE6, Icmp::PORT_UNREACHABLE6, 0),
            9 | 10 | 13 | 15 => (Icmp::UNREACHABLE6, Icmp::PROHIBITED6, 0),
            _ => return None,
        },
        Icmp::TIME_EXCEEDED => (Icmp::TIME_EXCEEDED6, code, 0),
        Icmp::PARAMETER_PROBLEM if code == 0 || code == 2 => {
            (Icmp::PARAMETER_PROBLEM6, 0, pointer4(head.rest() >> 24)?)
        }
        _ => return None,
    };
    Some(Head::new(kind, code, rest))
}

/// Where the field of an IPv4 header lies in one of IPv6 (RFC 7915, figure 3).
#[inline(always)]
const fn pointer4(pointer: u32) -> Option<u32> {
    Some(match pointer {
        0 | 1 => pointer,
        2 | 3 => 4,
        8 => 7,
        9 => 6,
        12..=15 => 8,
        16..=19 => 24,
        _ => return None,
    })
}

/// The ICMP header for an error of ICMPv6 (RFC 7915, section 5.2); nothing where there is none.
#[inline(always)]
fn counterpart6(head: Head, mtu: u32) -> Option<Head> {
    let code = head.code();
    let (kind, code, rest) = match head.kind() {
        Icmp::UNREACHABLE6 => match code {
            Icmp::NO_ROUTE6 | 2 | 3 => (Icmp::UNREACHABLE, Icmp::HOST_UNREACHABLE, 0),
            Icmp::PROHIBITED6 => (Icmp::UNREACHABLE, Icmp::HOST_PROHIBITED, 0),
            Icmp::PORT_UNREACHABLE6 => (Icmp::UNREACHABLE, Icmp::PORT_UNREACHABLE, 0),
            _ => return None,
        },
        Icmp::PACKET_TOO_BIG6 => {
            let most = head.rest().saturating_sub(FAMILY_STEP);
            (Icmp::UNREACHABLE, Icmp::FRAGMENTATION_NEEDED, if most > mtu { mtu } else { most } & 0xffff)
        }
        Icmp::TIME_EXCEEDED6 => (Icmp::TIME_EXCEEDED, code, 0),
        Icmp::PARAMETER_PROBLEM6 if code == 0 => (Icmp::PARAMETER_PROBLEM, 0, pointer6(head.rest())? << 24),
        Icmp::PARAMETER_PROBLEM6 if code == Icmp::NEXT_HEADER6 => {
            (Icmp::UNREACHABLE, Icmp::PROTOCOL_UNREACHABLE, 0)
        }
        _ => return None,
    };
    Some(Head::new(kind, code, rest))
}

/// Where the field of an IPv6 header lies in one of IPv4 (RFC 7915, figure 6).
#[inline(always)]
const fn pointer6(pointer: u32) -> Option<u32> {
    Some(match pointer {
        0 | 1 => pointer,
        4 | 5 => 2,
        6 => 9,
        7 => 8,
        8..=23 => 12,
        24..=39 => 16,
        _ => return None,
    })
}
