//! Bytes -> what is known about them, or an `Outcome` that says why not.
//!
//! Nothing is dropped before its destination is known to be a VIP: what cannot be read up to the
//! destination address passes to the host's stack. What comes after is judged by the caller.

use crate::outcome::Outcome;
use crate::packet::Packet;
use crate::wire::{Ipv4, Ipv6, PROTO_TCP, PROTO_UDP, Ports};

/// Where the transport header begins, and what stands in the way of reading it.
#[derive(Clone, Copy)]
pub struct Transport {
    pub offset: usize,
    pub protocol: u8,
    /// Bytes between `offset` and the end of the IP packet, by the IP header.
    pub length: usize,
    pub fragment: bool,
}

/// What an IPv4 header says. Addresses as they lie in the packet.
#[derive(Clone, Copy)]
pub struct Parsed4 {
    pub source: u32,
    pub destination: u32,
    pub tos: u8,
    /// Header and payload, bytes.
    pub ip_length: u16,
    pub transport: Transport,
}

/// Reads the IPv4 header at `offset`, options skipped.
#[inline(always)]
pub fn ipv4<P: Packet>(packet: &P, offset: usize) -> Result<Parsed4, Outcome> {
    let ip = packet.header::<Ipv4>(offset).ok_or(Outcome::PassTruncated)?;
    let header_length = ip.header_length();
    if ip.version() != 4 || header_length < size_of::<Ipv4>() {
        return Err(Outcome::PassMalformed);
    }
    let ip_length = { ip.total_length }.get();
    Ok(Parsed4 {
        source: { ip.source }.raw(),
        destination: { ip.destination }.raw(),
        tos: ip.tos,
        ip_length,
        transport: Transport {
            offset: offset + header_length,
            protocol: ip.protocol,
            length: (ip_length as usize).saturating_sub(header_length),
            fragment: ip.is_fragment(),
        },
    })
}

/// What an IPv6 header says.
#[derive(Clone, Copy)]
pub struct Parsed6 {
    pub tos: u8,
    /// Header and payload, bytes.
    pub ip_length: u32,
    pub transport: Transport,
}

/// Reads the IPv6 header at `offset`. Extension headers are not walked: to a VIP they are a protocol
/// without ports.
#[inline(always)]
pub fn ipv6<P: Packet>(packet: &P, offset: usize) -> Result<Parsed6, Outcome> {
    const FRAGMENT_HEADER: u8 = 44;
    let ip = packet.header::<Ipv6>(offset).ok_or(Outcome::PassTruncated)?;
    if ip.version() != 6 {
        return Err(Outcome::PassMalformed);
    }
    let payload = { ip.payload_length }.get();
    Ok(Parsed6 {
        tos: ip.traffic_class(),
        ip_length: payload as u32 + size_of::<Ipv6>() as u32,
        transport: Transport {
            offset: offset + size_of::<Ipv6>(),
            protocol: ip.next_header,
            length: payload as usize,
            fragment: ip.next_header == FRAGMENT_HEADER,
        },
    })
}

/// Both ports of a whole TCP or UDP packet. The errors hold if the destination is a VIP.
#[inline(always)]
pub fn ports<P: Packet>(packet: &P, transport: &Transport) -> Result<u32, Outcome> {
    if transport.fragment {
        return Err(Outcome::DropVipFragment);
    }
    if transport.protocol != PROTO_TCP && transport.protocol != PROTO_UDP {
        return Err(Outcome::DropVipProtocol);
    }
    // The IP header must not promise more than the frame has, nor less than the ports take: padding
    // of short Ethernet frames is not payload.
    let ip_end = transport.offset + transport.length;
    if transport.length < Ports::SHORTEST_TRANSPORT || ip_end > packet.length() {
        return Err(Outcome::DropVipTruncated);
    }
    let ports = packet.header::<Ports>(transport.offset).ok_or(Outcome::DropVipTruncated)?;
    Ok(ports.both)
}
