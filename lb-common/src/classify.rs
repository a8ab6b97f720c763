//! Which flow a packet to a VIP belongs to, and which service takes it.
//!
//! Most packets name their flow themselves. An ICMP error names it in the packet that it carries, seen
//! from the other end (a router on the way of a backend's direct answer to a client sends it to the
//! VIP). A fragment names no ports: where a service hashes by source, its address is enough.

use crate::abi::{Features, PortKey, VipIndex, VipTarget};
use crate::allowance::Limited;
use crate::outcome::Outcome;
use crate::packet::Packet;
use crate::parse::{self, Parsed4, Parsed6, Shape};
use crate::pins::Says;
use crate::tables::Tables;
use crate::wire::{
    Address6, Extension, Icmp, Ipv4, Ipv6, PROTO_ICMP, PROTO_ICMPV6, PROTO_IPIP, PROTO_IPV6, PROTO_TCP,
    PROTO_UDP, Ports, TcpFlags, Udp,
};
use crate::{answer, encap, vips};

/// What a packet is to its flow.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    Packet,
    /// The first fragment of a packet.
    FirstFragment,
    LaterFragment,
    /// An ICMP error about a packet of the backend.
    Error,
}

/// A flow of a client to a VIP, as the flow hash takes it.
#[derive(Clone, Copy)]
pub struct Flow<A> {
    pub client: A,
    pub vip: A,
    pub ports: u32,
    pub protocol: u8,
    pub target: VipTarget,
    pub role: Role,
}

/// The flow of an IPv4 packet, or what becomes of it.
///
/// `AnswerEcho` and `AnswerUnreachable` say that this is the answer that it should get.
#[inline(always)]
pub fn v4<P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    index: &VipIndex,
    ip: &Parsed4,
) -> Result<Flow<u32>, Outcome> {
    if !vips::may_be4(tables, index, ip.destination) {
        return Err(Outcome::PassNotVip);
    }
    let protocol = ip.transport.protocol;
    match parse::ports(packet, &ip.transport) {
        Ok(ports) => {
            let target = vips::find4(tables, index, ip.destination, PortKey::from_ports(ports, protocol));
            if !target.is_service() {
                return Err(vips::unmapped(target));
            }
            Ok(Flow { client: ip.source, vip: ip.destination, ports, protocol, target, role: Role::Packet })
        }
        Err(reason) => without_ports4(packet, tables, ip, reason),
    }
}

#[inline(always)]
fn without_ports4<P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    ip: &Parsed4,
    reason: Outcome,
) -> Result<Flow<u32>, Outcome> {
    let vip = vips::vip4(tables, ip.destination);
    if vip.is_none() || is_source(tables, vip) {
        return Err(Outcome::PassNotVip);
    }
    let protocol = ip.transport.protocol;
    match reason {
        Outcome::DropVipFragment if tables.features().has(Features::SOURCE_HASH) => {
            let target = vips::entry4(tables, ip.destination, PortKey::fragments(protocol));
            if target.is_none() {
                return Err(refuse(vip, protocol, Outcome::DropVipFragment));
            }
            parse::whole(packet, &ip.transport, 1)?;
            let role = fragment_role(ip.transport.shape);
            Ok(Flow { client: ip.source, vip: ip.destination, ports: 0, protocol, target, role })
        }
        Outcome::DropVipProtocol if protocol == PROTO_ICMP => match icmp4(packet, tables, ip, vip) {
            Err(reason) => Err(refuse(vip, protocol, reason)),
            flow => flow,
        },
        reason => Err(refuse(vip, protocol, tunnelled(protocol, reason))),
    }
}

/// Whether an entry is no VIP's, but of an address that clients' are translated to: it may be the host's own.
#[inline(always)]
fn is_source<T: Tables>(tables: &T, entry: VipTarget) -> bool {
    tables.features().has(Features::FULLNAT) && entry.source() != 0
}

/// The verdict on what no service can take: a VIP may leave it to the host. Not fragments of TCP and UDP: the
/// host would answer for the services.
#[inline(always)]
const fn refuse(vip: VipTarget, protocol: u8, reason: Outcome) -> Outcome {
    let passes = match reason {
        Outcome::DropVipProtocol | Outcome::DropVipTunnel | Outcome::DropIcmpType => true,
        Outcome::DropVipFragment => protocol != PROTO_TCP && protocol != PROTO_UDP,
        _ => false,
    };
    if passes && vip.has(VipTarget::UNMAPPED_PASS) { Outcome::PassVipUnmapped } else { reason }
}

/// A tunnel that ends at a VIP is one that a balancer or a backend sends in circles.
#[inline(always)]
const fn tunnelled(protocol: u8, reason: Outcome) -> Outcome {
    match reason {
        Outcome::DropVipProtocol if protocol == PROTO_IPIP || protocol == PROTO_IPV6 => {
            Outcome::DropVipTunnel
        }
        reason => reason,
    }
}

#[inline(always)]
const fn fragment_role(shape: Shape) -> Role {
    match shape {
        Shape::FirstFragment => Role::FirstFragment,
        _ => Role::LaterFragment,
    }
}

/// An ICMP message to a VIP.
#[inline(always)]
fn icmp4<P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    ip: &Parsed4,
    vip: VipTarget,
) -> Result<Flow<u32>, Outcome> {
    parse::whole(packet, &ip.transport, size_of::<Icmp>())?;
    let at = ip.transport.offset;
    let icmp = packet.header::<Icmp>(at).ok_or(Outcome::DropVipTruncated)?;
    if icmp.kind == Icmp::ECHO_REQUEST && icmp.code == 0 && tables.features().has(Features::ECHO) {
        // Answered in place, which an option may not let happen (RFC 1122, 3.2.2.6: a source route is turned round).
        let plain = at == ECHO4;
        return Err(if plain { Outcome::AnswerEcho } else { Outcome::DropIcmpType });
    }
    if !icmp.is_error() {
        return Err(Outcome::DropIcmpType);
    }
    let flow = embedded4(packet, tables, ip, vip, at + size_of::<Icmp>())?;
    if tables.admit(Limited::Error) { Ok(flow) } else { Err(Outcome::DropIcmpLimit) }
}

const ECHO4: usize = crate::forward::IP + size_of::<Ipv4>();
const ECHO6: usize = crate::forward::IP + size_of::<Ipv6>();

/// The flow that an ICMP error is about: what it carries was sent by the VIP, or somebody made it up.
#[inline(always)]
fn embedded4<P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    ip: &Parsed4,
    vip: VipTarget,
    at: usize,
) -> Result<Flow<u32>, Outcome> {
    let sent = packet.header::<Ipv4>(at).ok_or(Outcome::DropVipTruncated)?;
    let header_length = sent.header_length();
    if sent.version() != 4 || header_length < size_of::<Ipv4>() || { sent.source }.raw() != ip.destination {
        return Err(Outcome::DropIcmpForged);
    }
    if sent.is_later_fragment() {
        return Err(Outcome::DropIcmpStranger);
    }
    let (client, protocol) = ({ sent.destination }.raw(), sent.protocol);
    // RFC 792: the header and eight bytes of what follows are there at the least.
    parse::whole(packet, &ip.transport, size_of::<Icmp>() + header_length + Ports::SHORTEST_TRANSPORT)?;
    let ports = packet.header::<Ports>(at + header_length).ok_or(Outcome::DropVipTruncated)?.both;
    let ports = ports.rotate_left(16);
    let target = vips::service4(tables, vip, ip.destination, PortKey::from_ports(ports, protocol));
    if !target.is_service() {
        return Err(Outcome::DropIcmpStranger);
    }
    Ok(Flow { client, vip: ip.destination, ports, protocol, target, role: Role::Error })
}

/// As `v4`, for IPv6; answers neighbour solicitations too.
#[inline(always)]
pub fn v6<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    index: &VipIndex,
    ip: &Parsed6,
) -> Result<Flow<Address6>, Outcome> {
    let protocol = ip.transport.protocol;
    // A neighbour's question goes to a multicast address.
    let may_ask = tables.features().has(Features::VIP_ARP) && protocol == PROTO_ICMPV6;
    if !may_ask && !vips::may_be6(tables, index, ip.destination) {
        return Err(Outcome::PassNotVip);
    }
    match parse::ports(packet, &ip.transport) {
        Ok(ports) => {
            let target = vips::find6(tables, index, ip.destination, PortKey::from_ports(ports, protocol));
            if !target.is_service() {
                return Err(vips::unmapped(target));
            }
            Ok(Flow { client: ip.source, vip: ip.destination, ports, protocol, target, role: Role::Packet })
        }
        Err(reason) => without_ports6(packet, tables, ip, reason),
    }
}

#[inline(always)]
fn without_ports6<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    ip: &Parsed6,
    reason: Outcome,
) -> Result<Flow<Address6>, Outcome> {
    let protocol = ip.transport.protocol;
    // The question goes to a multicast address, its sender may have none yet.
    if matches!(reason, Outcome::DropVipProtocol)
        && tables.features().has(Features::VIP_ARP)
        && let Some(outcome) = answer::neighbour(packet, tables)
    {
        return Err(outcome);
    }
    let vip = vips::vip6(tables, ip.destination);
    if vip.is_none() || is_source(tables, vip) {
        return Err(Outcome::PassNotVip);
    }
    match reason {
        Outcome::DropVipFragment if tables.features().has(Features::SOURCE_HASH) => {
            let target = vips::entry6(tables, ip.destination, PortKey::fragments(protocol));
            if target.is_none() {
                return Err(refuse(vip, protocol, Outcome::DropVipFragment));
            }
            // The fragment header, and what it is in front of.
            parse::whole(packet, &ip.transport, size_of::<Extension>() + 1)?;
            let role = fragment_role(ip.transport.shape);
            Ok(Flow { client: ip.source, vip: ip.destination, ports: 0, protocol, target, role })
        }
        Outcome::DropVipProtocol if protocol == PROTO_ICMPV6 => match icmp6(packet, tables, ip, vip) {
            Err(reason) => Err(refuse(vip, protocol, reason)),
            flow => flow,
        },
        reason => Err(refuse(vip, protocol, tunnelled(protocol, reason))),
    }
}

#[inline(always)]
fn icmp6<P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    ip: &Parsed6,
    vip: VipTarget,
) -> Result<Flow<Address6>, Outcome> {
    parse::whole(packet, &ip.transport, size_of::<Icmp>())?;
    let at = ip.transport.offset;
    let icmp = packet.header::<Icmp>(at).ok_or(Outcome::DropVipTruncated)?;
    if icmp.kind == Icmp::ECHO_REQUEST6 && icmp.code == 0 && tables.features().has(Features::ECHO) {
        let plain = at == ECHO6;
        return Err(if plain { Outcome::AnswerEcho } else { Outcome::DropIcmpType });
    }
    if !icmp.is_error6() {
        return Err(Outcome::DropIcmpType);
    }
    let flow = embedded6(packet, tables, ip, vip, at + size_of::<Icmp>())?;
    if tables.admit(Limited::Error) { Ok(flow) } else { Err(Outcome::DropIcmpLimit) }
}

/// As `embedded4`. Of extension headers, backends send that of fragments, where a datagram is long.
#[inline(always)]
fn embedded6<P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    ip: &Parsed6,
    vip: VipTarget,
    at: usize,
) -> Result<Flow<Address6>, Outcome> {
    let sent = packet.header::<Ipv6>(at).ok_or(Outcome::DropVipTruncated)?;
    if sent.version() != 6 || sent.source != ip.destination {
        return Err(Outcome::DropIcmpForged);
    }
    let client = sent.destination;
    let (protocol, length) = if sent.next_header == Extension::FRAGMENT {
        let fragment = packet.header::<Extension>(at + size_of::<Ipv6>()).ok_or(Outcome::DropVipTruncated)?;
        if fragment.is_later_fragment() {
            return Err(Outcome::DropIcmpStranger);
        }
        (fragment.next_header, size_of::<Ipv6>() + size_of::<Extension>())
    } else {
        (sent.next_header, size_of::<Ipv6>())
    };
    parse::whole(packet, &ip.transport, size_of::<Icmp>() + length + Ports::SHORTEST_TRANSPORT)?;
    let ports = packet.header::<Ports>(at + length).ok_or(Outcome::DropVipTruncated)?.both;
    let ports = ports.rotate_left(16);
    let target = vips::service6(tables, vip, ip.destination, PortKey::from_ports(ports, protocol));
    if !target.is_service() {
        return Err(Outcome::DropIcmpStranger);
    }
    Ok(Flow { client, vip: ip.destination, ports, protocol, target, role: Role::Error })
}

/// What a packet says of its flow; asked only where its slot has pins or makes them.
#[inline(always)]
pub fn says<P: Packet>(packet: &P, protocol: u8, at: usize, role: Role) -> Says {
    if !matches!(role, Role::Packet | Role::FirstFragment) {
        return Says::GLIMPSE;
    }
    if protocol == PROTO_UDP {
        return Says::DATAGRAM;
    }
    match packet.header::<TcpFlags>(at + TcpFlags::OFFSET) {
        Some(flags) => Says::tcp(*flags),
        None => Says::GLIMPSE,
    }
}

/// What the packet sums up to, as its transport checksum promises (`encap::gue_in_ipv6`). Asked for GUE over IPv6 only.
#[inline(always)]
pub fn sum4<P: Packet>(packet: &P, ip: &Parsed4, role: Role) -> u32 {
    match role {
        Role::Packet if has_checksum(packet, ip.transport.protocol, ip.transport.offset) => {
            let length = ip.transport.end.wrapping_sub(ip.transport.offset);
            encap::sum4(ip.source, ip.destination, ip.transport.protocol, length)
        }
        // ICMP sums up to nothing, and so does the header.
        Role::Error => 0,
        _ => encap::UNKNOWN_SUM,
    }
}

#[inline(always)]
pub fn sum6<P: Packet>(packet: &P, ip: &Parsed6, role: Role) -> u32 {
    let protocol = ip.transport.protocol;
    let vouched = match role {
        Role::Packet => has_checksum(packet, protocol, ip.transport.offset),
        Role::Error => true,
        Role::FirstFragment | Role::LaterFragment => false,
    };
    match packet.header::<Ipv6>(crate::forward::IP) {
        Some(header) if vouched && ip.transport.offset == ECHO6 => {
            encap::sum6({ header.version_class_flow }.raw(), ip.hop_limit, protocol)
        }
        _ => encap::UNKNOWN_SUM,
    }
}

/// UDP may come without one.
#[inline(always)]
fn has_checksum<P: Packet>(packet: &P, protocol: u8, at: usize) -> bool {
    protocol != PROTO_UDP || packet.header::<Udp>(at).is_some_and(|udp| { udp.checksum }.raw() != 0)
}
