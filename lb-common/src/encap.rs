//! Rewrites that send a packet on: IP-in-IP, IP in UDP (GUE), and a new MAC. They know nothing of maps.
//!
//! Outer IPv4: RFC 2003 (and RFC 4213 for IPv6 inside); DF set and identification 0, which RFC 6864
//! (section 4.1) allows for what is never fragmented. Outer IPv6: RFC 2473; the flow label carries
//! the flow's hash (RFC 6438). DSCP and ECN are copied outward (RFC 2983 uniform model, RFC 6040
//! section 4.1 normal mode). The hop limit of the outer header is the tunnel's own (RFC 2003 section 3.1,
//! RFC 2473 section 6.3).
//!
//! GUE is its variant 1 (draft-ietf-intarea-gue-09, section 4): the IP packet follows the UDP header at
//! once, and its version says what it is. The source port is filled from the flow's hash, within the
//! dynamic ports (RFC 6335), so that receivers spread flows as they do other UDP.
//!
//! Its UDP checksum is 0 over IPv4 (RFC 768). Over IPv6 (RFC 8200, section 8.1) it is computed, from the
//! headers alone: what a transport checksum covers sums up to a number that the headers give. Only where
//! no such checksum vouches for the packet inside (a fragment, UDP without one, extension headers) it is 0,
//! which RFC 6935 allows for tunnels and RFC 6936 (section 5) asks the receiver to have enabled.

use crate::abi::{Backend, Egress, Path};
use crate::checksum::{address6, fold, halves, negative};
use crate::flow::FlowHash;
use crate::outcome::Outcome;
use crate::packet::Packet;
use crate::wire::{
    Address6, Be16, Be32, EtherType, Ethernet, IPV4_DONT_FRAGMENT, Ipv4, Ipv6, Mac, PROTO_IPIP, PROTO_IPV6,
    PROTO_UDP, Udp, header,
};

/// Hop limit of the outer header, and of what xlb itself sends.
pub const OUTER_HOPS: u8 = 64;

/// What a tunnel header takes from the packet inside.
#[derive(Clone, Copy)]
pub struct Inner {
    pub family: InnerFamily,
    /// Header and payload, bytes.
    pub ip_length: u32,
    /// DSCP and ECN.
    pub tos: u8,
    pub hash: FlowHash,
}

/// No checksum vouches for the packet.
pub const UNKNOWN_SUM: u32 = u32::MAX;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InnerFamily {
    V4,
    V6,
}

impl InnerFamily {
    #[inline(always)]
    const fn protocol(self) -> u8 {
        match self {
            InnerFamily::V4 => PROTO_IPIP,
            InnerFamily::V6 => PROTO_IPV6,
        }
    }
}

macro_rules! outer {
    ($($name:ident { $($field:ident: $type:ty),* } $bytes:literal;)*) => {$(
        #[repr(C, packed)]
        #[derive(Clone, Copy)]
        struct $name {
            ethernet: Ethernet,
            $($field: $type,)*
        }

        header!($name, $bytes);
    )*};
}

outer! {
    Outer4 { ip: Ipv4 } 34;
    Outer6 { ip: Ipv6 } 54;
    OuterGue4 { ip: Ipv4, udp: Udp } 42;
    OuterGue6 { ip: Ipv6, udp: Udp } 62;
}

/// The checksum's sum over what is the same in every outer IPv4 header to one backend: version and
/// header length, DF, hop limit, destination. Goes into `Backend::outer_sum`.
pub const fn outer_sum(destination: u32) -> u16 {
    let version_ihl = 0x45u32;
    let hops = OUTER_HOPS as u32;
    fold(version_ihl + IPV4_DONT_FRAGMENT.raw() as u32 + hops + halves(destination))
}

#[inline(always)]
fn outer_ethernet(path: Path, egress: &Egress, ethertype: EtherType) -> Ethernet {
    Ethernet::new(path.mac(), Mac::from_bits(egress.source_mac), ethertype)
}

/// An outer IPv4 header over `length` bytes, itself included. The agent keeps MTUs below 65,536, and the
/// packet fits its way.
#[inline(always)]
fn outer4(backend: &Backend, egress: &Egress, inner: &Inner, length: u32, protocol: u8) -> Ipv4 {
    let source = egress.source4 | (inner.hash.spread() & egress.source4_mask);
    let total_length = Be16::new(length as u16);
    let sum = backend.outer_sum as u32
        + ((inner.tos as u32) << 8)
        + total_length.raw() as u32
        + ((protocol as u32) << 8)
        + halves(source);
    Ipv4 {
        version_ihl: 0x45,
        tos: inner.tos,
        total_length,
        identification: Be16::new(0),
        fragment: IPV4_DONT_FRAGMENT,
        ttl: OUTER_HOPS,
        protocol,
        checksum: Be16::from_raw(!fold(sum)),
        source: Be32::from_raw(source),
        destination: Be32::from_raw(backend.address4()),
    }
}

/// An outer IPv6 header in front of `payload` bytes.
#[inline(always)]
fn outer6(backend: &Backend, egress: &Egress, inner: &Inner, payload: u32, protocol: u8) -> Ipv6 {
    let spread = inner.hash.spread();
    // Both words of the spread: a mask may reach over all of the lower half.
    let source_low = egress.source6[1] | ((spread as u64 | (spread as u64) << 32) & egress.source6_mask);
    Ipv6 {
        version_class_flow: Ipv6::first_word(inner.tos, spread),
        payload_length: Be16::new(payload as u16),
        next_header: protocol,
        hop_limit: OUTER_HOPS,
        source: Address6 { high: egress.source6[0], low: source_low },
        destination: backend.address6(),
    }
}

/// The UDP header in front of `payload` bytes, its checksum still 0.
#[inline(always)]
fn outer_udp(backend: &Backend, inner: &Inner, payload: u32) -> Udp {
    const DYNAMIC: u16 = 0xc000;
    Udp {
        source: Be16::new(DYNAMIC | inner.hash.spread() as u16),
        destination: backend.port,
        length: Be16::new((size_of::<Udp>() as u32 + payload) as u16),
        checksum: Be16::new(0),
    }
}

/// Puts an IPv4 header in front.
#[inline(always)]
pub fn in_ipv4<P: Packet>(
    packet: &mut P,
    backend: &Backend,
    path: Path,
    egress: &Egress,
    inner: &Inner,
) -> Result<(), Outcome> {
    const GROWTH: usize = size_of::<Ipv4>();
    Outcome::DropHeadroom.unless(packet.grow_head(GROWTH))?;
    let outer = Outcome::DropHeadroom.unless(packet.header_mut::<Outer4>(0))?;
    *outer = Outer4 {
        ethernet: outer_ethernet(path, egress, EtherType::IPV4),
        ip: outer4(backend, egress, inner, inner.ip_length + GROWTH as u32, inner.family.protocol()),
    };
    Ok(())
}

/// Puts an IPv6 header in front.
#[inline(always)]
pub fn in_ipv6<P: Packet>(
    packet: &mut P,
    backend: &Backend,
    path: Path,
    egress: &Egress,
    inner: &Inner,
) -> Result<(), Outcome> {
    Outcome::DropHeadroom.unless(packet.grow_head(size_of::<Ipv6>()))?;
    let outer = Outcome::DropHeadroom.unless(packet.header_mut::<Outer6>(0))?;
    *outer = Outer6 {
        ethernet: outer_ethernet(path, egress, EtherType::IPV6),
        ip: outer6(backend, egress, inner, inner.ip_length, inner.family.protocol()),
    };
    Ok(())
}

/// Puts IPv4 and UDP in front.
#[inline(always)]
pub fn gue_in_ipv4<P: Packet>(
    packet: &mut P,
    backend: &Backend,
    path: Path,
    egress: &Egress,
    inner: &Inner,
) -> Result<(), Outcome> {
    const GROWTH: usize = size_of::<Ipv4>() + size_of::<Udp>();
    Outcome::DropHeadroom.unless(packet.grow_head(GROWTH))?;
    let outer = Outcome::DropHeadroom.unless(packet.header_mut::<OuterGue4>(0))?;
    *outer = OuterGue4 {
        ethernet: outer_ethernet(path, egress, EtherType::IPV4),
        ip: outer4(backend, egress, inner, inner.ip_length + GROWTH as u32, PROTO_UDP),
        udp: outer_udp(backend, inner, inner.ip_length),
    };
    Ok(())
}

/// Puts IPv6 and UDP in front. `sum`: what the whole packet sums up to, as its own checksums promise; `UNKNOWN_SUM` if
/// they promise nothing.
#[inline(always)]
pub fn gue_in_ipv6<P: Packet>(
    packet: &mut P,
    backend: &Backend,
    path: Path,
    egress: &Egress,
    inner: &Inner,
    sum: u32,
) -> Result<(), Outcome> {
    Outcome::DropHeadroom.unless(packet.grow_head(size_of::<Ipv6>() + size_of::<Udp>()))?;
    let ip = outer6(backend, egress, inner, inner.ip_length + size_of::<Udp>() as u32, PROTO_UDP);
    let mut udp = outer_udp(backend, inner, inner.ip_length);
    if sum != UNKNOWN_SUM {
        udp.checksum = checksum6(&ip, &udp, sum);
    }
    let outer = Outcome::DropHeadroom.unless(packet.header_mut::<OuterGue6>(0))?;
    *outer = OuterGue6 { ethernet: outer_ethernet(path, egress, EtherType::IPV6), ip, udp };
    Ok(())
}

/// The UDP checksum over a payload of a known sum (RFC 768: what comes out as 0 is sent as all ones).
#[inline(always)]
fn checksum6(ip: &Ipv6, udp: &Udp, payload: u32) -> Be16 {
    let pseudo = address6(ip.source) + address6(ip.destination) + ((PROTO_UDP as u32) << 8);
    let header = { udp.source }.raw() as u32 + { udp.destination }.raw() as u32;
    // The length counts twice: in the pseudo header, and in the UDP header.
    let sum = fold(pseudo + header + 2 * { udp.length }.raw() as u32 + payload);
    Be16::from_raw(if sum == 0xffff { sum } else { !sum })
}

/// What an IPv4 packet sums up to whose transport checksum covers `length` bytes: its own header sums up
/// to nothing, and the transport with its checksum to what the pseudo header lacks (RFC 1071).
#[inline(always)]
pub const fn sum4(source: u32, destination: u32, protocol: u8, length: usize) -> u32 {
    let length = Be16::new(length as u16).raw() as u32;
    negative(halves(source) + halves(destination) + ((protocol as u32) << 8) + length)
}

/// What an IPv6 packet without extension headers sums up to: addresses and length stand in the header and
/// in the pseudo header, and cancel out.
#[inline(always)]
pub const fn sum6(first_word: u32, hop_limit: u8, protocol: u8) -> u32 {
    let next_and_hops = protocol as u32 | (hop_limit as u32) << 8;
    halves(first_word) + next_and_hops + negative((protocol as u32) << 8)
}

/// Sends the packet to a backend on the same link, otherwise as it came.
#[inline(always)]
pub fn to_mac<P: Packet>(packet: &mut P, path: Path, egress: &Egress) -> Result<(), Outcome> {
    let ethernet = Outcome::DropInconsistent.unless(packet.header_mut::<Ethernet>(0))?;
    let ethertype = ethernet.ethertype;
    *ethernet = Ethernet::new(path.mac(), Mac::from_bits(egress.source_mac), ethertype);
    Ok(())
}
