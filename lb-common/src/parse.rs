//! Bytes -> what is known about them, or an `Outcome` that says why not.
//!
//! Nothing is dropped before its destination is known to be a VIP: what cannot be read up to the
//! destination address passes to the host's stack. What comes after is judged by the caller.

use crate::outcome::Outcome;
use crate::packet::Packet;
use crate::wire::{Address6, Extension, Ipv4, Ipv6, PROTO_TCP, PROTO_UDP, Ports};

/// Extension headers that are walked over. Hosts send one or two; RFC 8504 (section 5.3) lets a node
/// limit how many it takes.
pub const MOST_EXTENSIONS: u32 = 6;

/// What stands between the IP header and the transport header.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shape {
    /// Nothing, or headers that were walked over.
    Whole,
    FirstFragment,
    /// No transport header follows.
    LaterFragment,
    /// More extension headers than are walked over, or a routing header that is not at its end.
    Headers,
    /// The frame ends within an extension header.
    Truncated,
}

/// Where the transport header begins, and what stands in the way of reading it.
#[derive(Clone, Copy)]
pub struct Transport {
    pub offset: usize,
    pub protocol: u8,
    /// Where the IP packet ends, by its header; behind that is padding. It may contradict `offset` and the frame: `whole`.
    pub end: usize,
    pub shape: Shape,
}

/// What an IPv4 header says. Addresses as they lie in the packet.
#[derive(Clone, Copy)]
pub struct Parsed4 {
    pub source: u32,
    pub destination: u32,
    pub tos: u8,
    pub ttl: u8,
    /// Header and payload, bytes.
    pub ip_length: u32,
    pub transport: Transport,
}

/// Reads the IPv4 header at `offset`, options skipped.
#[inline(always)]
pub fn ipv4<P: Packet>(packet: &P, offset: usize) -> Result<Parsed4, Outcome> {
    let ip = Outcome::PassTruncated.unless(packet.header::<Ipv4>(offset))?;
    let header_length = ip.header_length();
    if ip.version() != 4 || header_length < size_of::<Ipv4>() {
        return Err(Outcome::PassMalformed.apart());
    }
    let ip_length = { ip.total_length }.get();
    let shape = if !ip.is_fragment() {
        Shape::Whole
    } else if ip.is_later_fragment() {
        Shape::LaterFragment
    } else {
        Shape::FirstFragment
    };
    Ok(Parsed4 {
        source: { ip.source }.raw(),
        destination: { ip.destination }.raw(),
        tos: ip.tos,
        ttl: ip.ttl,
        ip_length: ip_length as u32,
        transport: Transport {
            offset: offset + header_length,
            protocol: ip.protocol,
            end: offset + ip_length as usize,
            shape,
        },
    })
}

/// What an IPv6 header says.
#[derive(Clone, Copy)]
pub struct Parsed6 {
    pub source: Address6,
    pub destination: Address6,
    pub tos: u8,
    pub hop_limit: u8,
    /// Header and payload, bytes.
    pub ip_length: u32,
    pub transport: Transport,
}

/// Reads the IPv6 header at `offset`, and the extension headers behind it.
#[inline(always)]
pub fn ipv6<P: Packet>(packet: &P, offset: usize) -> Result<Parsed6, Outcome> {
    let ip = Outcome::PassTruncated.unless(packet.header::<Ipv6>(offset))?;
    if ip.version() != 6 {
        return Err(Outcome::PassMalformed.apart());
    }
    let payload = { ip.payload_length }.get() as usize;
    let first = Transport {
        offset: offset + size_of::<Ipv6>(),
        protocol: ip.next_header,
        end: offset + size_of::<Ipv6>() + payload,
        shape: Shape::Whole,
    };
    Ok(Parsed6 {
        source: ip.source,
        destination: ip.destination,
        tos: ip.traffic_class(),
        hop_limit: ip.hop_limit,
        ip_length: payload as u32 + size_of::<Ipv6>() as u32,
        transport: walk(packet, first),
    })
}

const fn is_extension(protocol: u8) -> bool {
    matches!(
        protocol,
        Extension::HOP_BY_HOP | Extension::ROUTING | Extension::FRAGMENT | Extension::DESTINATION_OPTIONS
    )
}

/// Walks over extension headers (RFC 8200, section 4) up to the transport header, or to what ends the way.
#[inline(always)]
fn walk<P: Packet>(packet: &P, first: Transport) -> Transport {
    let mut at = first;
    let mut walked = 0;
    while walked < MOST_EXTENSIONS {
        if !is_extension(at.protocol) {
            return at;
        }
        let Some(extension) = packet.header::<Extension>(at.offset) else {
            at.shape = Shape::Truncated;
            return at;
        };
        let kind = at.protocol;
        let bytes = if kind == Extension::FRAGMENT { size_of::<Extension>() } else { extension.bytes() };
        at.protocol = extension.next_header;
        if kind == Extension::FRAGMENT && extension.is_fragment() {
            at.shape =
                if extension.is_later_fragment() { Shape::LaterFragment } else { Shape::FirstFragment };
            return at;
        }
        if kind == Extension::ROUTING && extension.has_segments_left() {
            at.shape = Shape::Headers;
            return at;
        }
        at.offset += bytes;
        walked += 1;
    }
    if is_extension(at.protocol) {
        at.shape = Shape::Headers;
    }
    at
}

/// Both ports of a whole TCP or UDP packet. The errors hold if the destination is a VIP.
#[inline(always)]
pub fn ports<P: Packet>(packet: &P, transport: &Transport) -> Result<u32, Outcome> {
    if transport.shape != Shape::Whole {
        let outcome = match transport.shape {
            Shape::Whole | Shape::FirstFragment | Shape::LaterFragment => Outcome::DropVipFragment,
            Shape::Headers => Outcome::DropVipHeaders,
            Shape::Truncated => Outcome::DropVipTruncated,
        };
        return Err(outcome.apart());
    }
    if transport.protocol != PROTO_TCP && transport.protocol != PROTO_UDP {
        return Err(Outcome::DropVipProtocol.apart());
    }
    whole(packet, transport, Ports::SHORTEST_TRANSPORT)?;
    let ports = Outcome::DropVipTruncated.unless(packet.header::<Ports>(transport.offset))?;
    Ok(ports.both)
}

/// The IP header must not promise more than the frame has, nor less than the transport header takes:
/// padding of short Ethernet frames is not payload.
#[inline(always)]
pub fn whole<P: Packet>(packet: &P, transport: &Transport, least: usize) -> Result<(), Outcome> {
    if transport.offset + least > transport.end || transport.end > packet.length() {
        return Err(Outcome::DropVipTruncated.apart());
    }
    Ok(())
}

/// A source that no packet from afar has: "this network", loopback, multicast, reserved, broadcast
/// (RFC 1122, section 3.2.1.3; RFC 6890).
#[inline(always)]
pub const fn is_martian4(source: u32) -> bool {
    // 0 becomes the highest: two comparisons for three.
    let first = (source as u8).wrapping_sub(1);
    first == 126 || first >= 223
}

/// Unspecified, loopback, IPv4-compatible or mapped, link-local, multicast (RFC 4291; RFC 6890).
#[inline(always)]
pub const fn is_martian6(source: Address6) -> bool {
    let (high, low) = (source.high, source.low);
    let link_local = high & 0xc0ff == 0x80fe;
    let multicast = high & 0xff == 0xff;
    let holds_v4 = high == 0 && (low as u32 == 0 || low as u32 == 0xffff_0000);
    link_local || multicast || holds_v4
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use core::net::{Ipv4Addr, Ipv6Addr};

    #[test]
    fn martians_are_what_the_standard_library_calls_so() {
        for first in 0..=255u8 {
            for rest in [[0, 0, 1], [1, 2, 3], [255, 255, 255]] {
                let address = Ipv4Addr::new(first, rest[0], rest[1], rest[2]);
                let expected = first == 0 || address.is_loopback() || address.is_multicast() || first >= 240;
                assert_eq!(is_martian4(u32::from_ne_bytes(address.octets())), expected, "{address}");
            }
        }
        let martians = ["::", "::1", "fe80::1", "febf::1", "ff02::1", "::ffff:192.0.2.1", "::192.0.2.1"];
        let others = ["2001:db8::1", "fec0::1", "fc00::1", "64:ff9b::192.0.2.1", "1::", "0:0:0:1::1"];
        for (addresses, expected) in [(&martians[..], true), (&others[..], false)] {
            for text in addresses {
                let address: Ipv6Addr = text.parse().unwrap();
                assert_eq!(is_martian6(Address6::from_bytes(address.octets())), expected, "{text}");
            }
        }
    }
}
