//! ICMP (RFC 792) and ICMPv6 (RFC 4443) at a VIP: echo is answered in place, errors say why a packet was
//! not taken, and errors of others are read for the flow that they are about.
//!
//! An answer goes back to the station that the question came from. Errors carry as much of the packet
//! as the RFCs ask for (576 bytes in all for IPv4: RFC 1812, section 4.3.2.3; 1280 for IPv6: RFC 4443,
//! section 2.4 c), in whole words.

use crate::allowance::Limited;
use crate::checksum::{address6, fold, halves, updated};
use crate::encap::OUTER_HOPS;
use crate::outcome::Outcome;
use crate::packet::Packet;
use crate::parse::{Parsed4, Parsed6};
use crate::tables::Tables;
use crate::wire::{
    Be16, Be32, EtherType, Ethernet, IPV4_DONT_FRAGMENT, Icmp, Ipv4, Ipv6, PROTO_ICMP, PROTO_ICMPV6, Word,
    header,
};

const IP: usize = size_of::<Ethernet>();

#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Frame4 {
    ethernet: Ethernet,
    ip: Ipv4,
    icmp: Icmp,
}

header!(Frame4, 42);

#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Frame6 {
    ethernet: Ethernet,
    ip: Ipv6,
    icmp: Icmp,
}

header!(Frame6, 62);

/// A path of less cannot carry IPv6 (RFC 8200, section 5).
pub const SMALLEST_MTU6: u32 = 1280;
/// Header and ICMP header of an answer.
const HEAD4: usize = size_of::<Ipv4>() + size_of::<Icmp>();
const HEAD6: usize = size_of::<Ipv6>() + size_of::<Icmp>();
/// Bytes of the packet that an error carries.
const MOST_CARRIED4: usize = 576 - HEAD4;
const MOST_CARRIED6: usize = SMALLEST_MTU6 as usize - HEAD6;

/// Why a packet is sent back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reason {
    /// Longer than the way to its backend takes: what it may be at the most, bytes.
    TooBig(u32),
    /// No service has the port.
    PortUnreachable,
}

impl Reason {
    #[inline(always)]
    const fn answer(self) -> Limited {
        match self {
            Self::TooBig(_) => Limited::TooBig,
            Self::PortUnreachable => Limited::Unreachable,
        }
    }

    #[inline(always)]
    const fn sent(self) -> Outcome {
        match self {
            Self::TooBig(_) => Outcome::AnswerTooBig,
            Self::PortUnreachable => Outcome::AnswerUnreachable,
        }
    }

    #[inline(always)]
    const fn unsent(self) -> Outcome {
        match self {
            Self::TooBig(_) => Outcome::DropOversizeLimit,
            Self::PortUnreachable => Outcome::DropVipPortLimit,
        }
    }

    /// What it is dropped as where no answer is allowed.
    #[inline(always)]
    const fn silent(self) -> Outcome {
        match self {
            Self::TooBig(_) => Outcome::DropOversize,
            Self::PortUnreachable => Outcome::DropVipPort,
        }
    }
}

/// Sends an IPv4 packet back as an error.
#[inline(always)]
pub fn error4<P: Packet, T: Tables>(packet: &mut P, tables: &T, ip: &Parsed4, reason: Reason) -> Outcome {
    let Some(ethernet) = packet.header::<Ethernet>(0) else { return reason.silent() };
    // RFC 1122, 3.2.2: never about what was sent to many.
    if ethernet.is_group() {
        return reason.silent();
    }
    if !tables.admit(reason.answer()) {
        return reason.unsent();
    }
    let ethernet = Ethernet::new(ethernet.source(), ethernet.destination(), EtherType::IPV4);
    let (code, rest) = match reason {
        Reason::TooBig(mtu) => (Icmp::FRAGMENTATION_NEEDED, mtu & 0xffff),
        Reason::PortUnreachable => (Icmp::PORT_UNREACHABLE, 0),
    };
    let icmp = Icmp { kind: Icmp::UNREACHABLE, code, checksum: Be16::new(0), rest: Be32::new(rest) };
    let length = ip.ip_length as usize;
    let words = (if length > MOST_CARRIED4 { MOST_CARRIED4 } else { length }) / 4;
    if packet.grow_head(HEAD4).is_none() || packet.truncate(IP + HEAD4 + words * 4).is_none() {
        return Outcome::DropHeadroom;
    }
    let Some(carried) = sum_words::<P, { MOST_CARRIED4 / 4 }>(packet, IP + HEAD4, words) else {
        return Outcome::DropHeadroom;
    };
    let mut header = Ipv4 {
        version_ihl: 0x45,
        // RFC 1812, 4.3.2.5: internetwork control.
        tos: 0xc0,
        total_length: Be16::new((HEAD4 + words * 4) as u16),
        identification: Be16::new(0),
        fragment: IPV4_DONT_FRAGMENT,
        ttl: OUTER_HOPS,
        protocol: PROTO_ICMP,
        checksum: Be16::new(0),
        source: Be32::from_raw(ip.destination),
        destination: Be32::from_raw(ip.source),
    };
    header.checksum = Be16::from_raw(!fold(header.sum()));
    let Some(frame) = packet.header_mut::<Frame4>(0) else { return Outcome::DropHeadroom };
    let checksum = Be16::from_raw(!fold(head_sum(&icmp) + carried));
    *frame = Frame4 { ethernet, ip: header, icmp: Icmp { checksum, ..icmp } };
    reason.sent()
}

/// Sends an IPv6 packet back as an error.
#[inline(always)]
pub fn error6<P: Packet, T: Tables>(packet: &mut P, tables: &T, ip: &Parsed6, reason: Reason) -> Outcome {
    let Some(ethernet) = packet.header::<Ethernet>(0) else { return reason.silent() };
    // RFC 4443, 2.4 e: never about what was sent to many.
    if ethernet.is_group() {
        return reason.silent();
    }
    // Hosts send packets of 1280 bytes whatever they are told (RFC 8201, section 4).
    if let Reason::TooBig(mtu) = reason
        && mtu < SMALLEST_MTU6
    {
        return reason.silent();
    }
    if !tables.admit(reason.answer()) {
        return reason.unsent();
    }
    let ethernet = Ethernet::new(ethernet.source(), ethernet.destination(), EtherType::IPV6);
    let (kind, code, rest) = match reason {
        Reason::TooBig(mtu) => (Icmp::PACKET_TOO_BIG6, 0, mtu),
        Reason::PortUnreachable => (Icmp::UNREACHABLE6, Icmp::PORT_UNREACHABLE6, 0),
    };
    let icmp = Icmp { kind, code, checksum: Be16::new(0), rest: Be32::new(rest) };
    let length = ip.ip_length as usize;
    let words = (if length > MOST_CARRIED6 { MOST_CARRIED6 } else { length }) / 4;
    if packet.grow_head(HEAD6).is_none() || packet.truncate(IP + HEAD6 + words * 4).is_none() {
        return Outcome::DropHeadroom;
    }
    let Some(carried) = sum_words::<P, { MOST_CARRIED6 / 4 }>(packet, IP + HEAD6, words) else {
        return Outcome::DropHeadroom;
    };
    let payload = Be16::new((size_of::<Icmp>() + words * 4) as u16);
    let pseudo = address6(ip.source)
        + address6(ip.destination)
        + payload.raw() as u32
        + Be16::new(PROTO_ICMPV6 as u16).raw() as u32;
    let checksum = Be16::from_raw(!fold(pseudo + head_sum(&icmp) + carried));
    let header = Ipv6 {
        version_class_flow: Ipv6::first_word(0, 0),
        payload_length: payload,
        next_header: PROTO_ICMPV6,
        hop_limit: OUTER_HOPS,
        source: ip.destination,
        destination: ip.source,
    };
    let Some(frame) = packet.header_mut::<Frame6>(0) else { return Outcome::DropHeadroom };
    *frame = Frame6 { ethernet, ip: header, icmp: Icmp { checksum, ..icmp } };
    reason.sent()
}

/// The sum of an ICMP header whose checksum is 0.
#[inline(always)]
const fn head_sum(icmp: &Icmp) -> u32 {
    icmp.kind as u32 + ((icmp.code as u32) << 8) + halves(icmp.rest.raw())
}

/// The sum of `words` words at an offset, `MOST` at the most.
#[inline(always)]
fn sum_words<P: Packet, const MOST: usize>(packet: &P, offset: usize, words: usize) -> Option<u32> {
    let mut sum = 0;
    let mut index = 0;
    while index < MOST {
        if index >= words {
            break;
        }
        sum += halves(packet.header::<Word>(offset + index * 4)?.bits);
        index += 1;
    }
    Some(sum)
}

/// Whether the frame was sent to many: who answers such a one is used against its sender.
#[inline(always)]
fn is_group<P: Packet>(packet: &P) -> bool {
    match packet.header::<Ethernet>(0) {
        Some(ethernet) => ethernet.is_group(),
        None => true,
    }
}

/// Answers an echo request to an IPv4 VIP, in place (RFC 1122, section 3.2.2.6).
#[inline(always)]
pub fn echo4<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Outcome {
    if is_group(packet) {
        return Outcome::DropIcmpType;
    }
    if !tables.admit(Limited::Echo) {
        return Outcome::DropEchoLimit;
    }
    let Some(frame) = packet.header_mut::<Frame4>(0) else { return Outcome::DropVipTruncated };
    let (asker, asked) = (frame.ethernet.source(), frame.ethernet.destination());
    let mut ip = frame.ip;
    (ip.source, ip.destination) = (ip.destination, ip.source);
    ip.ttl = OUTER_HOPS;
    ip.checksum = Be16::from_raw(!fold(ip.sum()));
    let icmp = frame.icmp;
    let code = (icmp.code as u16) << 8;
    let before = Icmp::ECHO_REQUEST as u16 | code;
    let checksum = updated({ icmp.checksum }.raw(), before, Icmp::ECHO_REPLY as u16 | code);
    *frame = Frame4 {
        ethernet: Ethernet::new(asker, asked, EtherType::IPV4),
        ip,
        icmp: Icmp { kind: Icmp::ECHO_REPLY, checksum: Be16::from_raw(checksum), ..icmp },
    };
    Outcome::AnswerEcho
}

/// Answers an echo request to an IPv6 VIP, in place (RFC 4443, section 4.2).
#[inline(always)]
pub fn echo6<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Outcome {
    if is_group(packet) {
        return Outcome::DropIcmpType;
    }
    if !tables.admit(Limited::Echo) {
        return Outcome::DropEchoLimit;
    }
    let Some(frame) = packet.header_mut::<Frame6>(0) else { return Outcome::DropVipTruncated };
    let (asker, asked) = (frame.ethernet.source(), frame.ethernet.destination());
    let Ipv6 { version_class_flow, payload_length, next_header, source, destination, .. } = frame.ip;
    let icmp = frame.icmp;
    let code = (icmp.code as u16) << 8;
    let before = Icmp::ECHO_REQUEST6 as u16 | code;
    let checksum = updated({ icmp.checksum }.raw(), before, Icmp::ECHO_REPLY6 as u16 | code);
    *frame = Frame6 {
        ethernet: Ethernet::new(asker, asked, EtherType::IPV6),
        ip: Ipv6 {
            version_class_flow,
            payload_length,
            next_header,
            hop_limit: OUTER_HOPS,
            source: destination,
            destination: source,
        },
        icmp: Icmp { kind: Icmp::ECHO_REPLY6, checksum: Be16::from_raw(checksum), ..icmp },
    };
    Outcome::AnswerEcho
}
