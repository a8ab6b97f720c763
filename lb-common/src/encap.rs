//! Rewrites that send a packet on: IP-in-IP and a new MAC. They know nothing of maps.
//!
//! Outer IPv4: RFC 2003 (and RFC 4213 for IPv6 inside); DF set and identification 0, which RFC 6864
//! (section 4.1) allows for what is never fragmented. Outer IPv6: RFC 2473; the flow label carries
//! the flow's hash (RFC 6438). DSCP and ECN are copied outward (RFC 2983 uniform model, RFC 6040
//! section 4.1 normal mode).

use crate::abi::{Backend, Egress, Path};
use crate::checksum::{fold, halves};
use crate::flow::FlowHash;
use crate::outcome::Outcome;
use crate::packet::Packet;
use crate::wire::{
    Address6, Be16, Be32, EtherType, Ethernet, IPV4_DONT_FRAGMENT, Ipv4, Ipv6, Mac, PROTO_IPIP, PROTO_IPV6,
    header,
};

/// Hop limit of the outer header (RFC 2003 section 3.1, RFC 2473 section 6.3: the tunnel's own).
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

#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Outer4 {
    ethernet: Ethernet,
    ip: Ipv4,
}

header!(Outer4, 34);

#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Outer6 {
    ethernet: Ethernet,
    ip: Ipv6,
}

header!(Outer6, 54);

/// The checksum's sum over what is the same in every outer IPv4 header to one backend: version and
/// header length, DF, hop limit, destination. Goes into `Backend::outer_sum`.
pub const fn outer_sum(destination: u32) -> u16 {
    let version_ihl = 0x45u32;
    let hops = OUTER_HOPS as u32;
    fold(version_ihl + IPV4_DONT_FRAGMENT.raw() as u32 + hops + halves(destination))
}

/// Whether the packet, with `overhead` bytes in front, fits the way to the backend.
#[inline(always)]
fn fits(inner: &Inner, overhead: u32, egress: &Egress) -> Result<(), Outcome> {
    if inner.ip_length + overhead > egress.mtu { Err(Outcome::DropOversize) } else { Ok(()) }
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
    fits(inner, GROWTH as u32, egress)?;
    packet.grow_head(GROWTH).ok_or(Outcome::DropHeadroom)?;
    let outer = packet.header_mut::<Outer4>(0).ok_or(Outcome::DropHeadroom)?;

    let source = egress.source4 | (inner.hash.spread() & egress.source4_mask);
    // `fits` bounds the length by the MTU, which the agent keeps below 65,536.
    let total_length = Be16::new((inner.ip_length + GROWTH as u32) as u16);
    let protocol = inner.family.protocol();
    let sum = backend.outer_sum as u32
        + ((inner.tos as u32) << 8)
        + total_length.raw() as u32
        + ((protocol as u32) << 8)
        + halves(source);
    *outer = Outer4 {
        ethernet: Ethernet::new(path.mac(), Mac::from_bits(egress.source_mac), EtherType::IPV4),
        ip: Ipv4 {
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
        },
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
    const GROWTH: usize = size_of::<Ipv6>();
    fits(inner, GROWTH as u32, egress)?;
    packet.grow_head(GROWTH).ok_or(Outcome::DropHeadroom)?;
    let outer = packet.header_mut::<Outer6>(0).ok_or(Outcome::DropHeadroom)?;

    let spread = inner.hash.spread();
    // Both words of the spread: a mask may reach over all of the lower half.
    let source_low = egress.source6[1] | ((spread as u64 | (spread as u64) << 32) & egress.source6_mask);
    *outer = Outer6 {
        ethernet: Ethernet::new(path.mac(), Mac::from_bits(egress.source_mac), EtherType::IPV6),
        ip: Ipv6 {
            version_class_flow: Ipv6::first_word(inner.tos, spread),
            payload_length: Be16::new(inner.ip_length as u16),
            next_header: inner.family.protocol(),
            hop_limit: OUTER_HOPS,
            source: Address6 { high: egress.source6[0], low: source_low },
            destination: backend.address6(),
        },
    };
    Ok(())
}

/// Sends the packet to a backend on the same link, otherwise as it came.
#[inline(always)]
pub fn to_mac<P: Packet>(packet: &mut P, path: Path, egress: &Egress, inner: &Inner) -> Result<(), Outcome> {
    fits(inner, 0, egress)?;
    let ethernet = packet.header_mut::<Ethernet>(0).ok_or(Outcome::DropInconsistent)?;
    let ethertype = ethernet.ethertype;
    *ethernet = Ethernet::new(path.mac(), Mac::from_bits(egress.source_mac), ethertype);
    Ok(())
}
