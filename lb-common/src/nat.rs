//! Network address translation of one packet: addresses, ports, and, between families, the IP header. Knows nothing
//! of maps and connections.
//!
//! Addresses are IPv6 here; those of IPv4 are mapped (RFC 4291, section 2.5.5.2), which costs the Internet checksum
//! nothing: the prefix sums up to zero. Checksums are updated, not computed (RFC 1624), so that a packet that came with
//! a wrong one leaves with a wrong one. Between families the header is made anew (RFC 7915, sections 4.1 and 5.1). The hop
//! limit stays: the balancer is no hop in the other modes either.

use crate::checksum::{address6, fold, halves, negative};
use crate::encap::InnerFamily;
use crate::outcome::Outcome;
use crate::packet::Packet;
use crate::wire::{
    Address6, Be16, Be32, EtherType, Ethernet, IPV4_DONT_FRAGMENT, Ipv4, Ipv6, Mac, PROTO_UDP, Ports, header,
};

const IP: usize = size_of::<Ethernet>();
const AFTER4: usize = IP + size_of::<Ipv4>();
const AFTER6: usize = IP + size_of::<Ipv6>();

/// Bytes that an IP packet grows or shrinks by in the other family.
pub const FAMILY_STEP: u32 = (AFTER6 - AFTER4) as u32;

/// Longest IPv4 packet that routers may fragment where its IPv6 sender knows of no IPv4 path (RFC 7915, section 5.1).
const FRAGMENTABLE: u32 = 1260;

/// A transport checksum.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub(crate) struct Checksum {
    pub sum: Be16,
}

header!(Checksum, 2);

const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;

/// Where the checksum lies in a transport header.
#[inline(always)]
pub(crate) const fn checksum_at(protocol: u8) -> usize {
    if protocol == PROTO_UDP { UDP_CHECKSUM } else { TCP_CHECKSUM }
}

/// Both ends of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ends {
    pub source: Address6,
    pub destination: Address6,
    /// As `Ports::both`.
    pub ports: u32,
}

impl Ends {
    /// What the ends add to the sum under a transport checksum.
    #[inline(always)]
    pub(crate) fn sum(&self) -> u32 {
        address6(self.source) + address6(self.destination) + halves(self.ports)
    }

    #[inline(always)]
    pub fn family(&self) -> InnerFamily {
        if self.destination.is_mapped_v4() { InnerFamily::V4 } else { InnerFamily::V6 }
    }

    /// As the packets of the other side have them.
    #[inline(always)]
    pub fn reversed(&self) -> Self {
        Self { source: self.destination, destination: self.source, ports: self.ports.rotate_left(16) }
    }
}

/// What a checksum becomes when the sum of the ends under it goes from one to another (RFC 1624, equation 3); nothing
/// where a datagram has none.
#[inline(always)]
pub(crate) fn checksum_after(before: u16, from: u32, to: u32, protocol: u8) -> Option<u16> {
    let is_udp = protocol == PROTO_UDP;
    if is_udp && before == 0 {
        return None;
    }
    let after = !fold(!before as u32 + negative(from) + to);
    // RFC 768: 0 says that there is none.
    Some(if is_udp && after == 0 { 0xffff } else { after })
}

/// Where a whole TCP or UDP packet has its transport header.
#[derive(Clone, Copy)]
pub struct Layout {
    pub family: InnerFamily,
    pub offset: usize,
    pub protocol: u8,
}

/// Both ends of a packet as it came. None with mapped addresses: those are never on the wire, and stand for IPv4 here.
#[inline(always)]
pub fn ends<P: Packet>(packet: &P, at: Layout) -> Option<Ends> {
    ends_at(packet, at, IP)
}

/// As `ends`, of the packet whose IP header lies at `ip_offset`.
#[inline(always)]
pub(crate) fn ends_at<P: Packet>(packet: &P, at: Layout, ip_offset: usize) -> Option<Ends> {
    let ports = packet.header::<Ports>(at.offset)?.both;
    match at.family {
        InnerFamily::V4 => {
            let ip = packet.header::<Ipv4>(ip_offset)?;
            let (source, destination) = ({ ip.source }.raw(), { ip.destination }.raw());
            Some(Ends { source: Address6::mapped(source), destination: Address6::mapped(destination), ports })
        }
        InnerFamily::V6 => {
            let ip = packet.header::<Ipv6>(ip_offset)?;
            let (source, destination) = (ip.source, ip.destination);
            if source.is_mapped_v4() || destination.is_mapped_v4() {
                return None;
            }
            Some(Ends { source, destination, ports })
        }
    }
}

/// Gives a packet other ends, and sends it to another station.
#[inline(always)]
pub fn rewrite<P: Packet>(
    packet: &mut P,
    at: Layout,
    from: &Ends,
    to: &Ends,
    station: (Mac, Mac),
) -> Result<(), Outcome> {
    let family = to.family();
    transport(packet, at, from, to, family)?;
    let ethertype = match (at.family, family) {
        (InnerFamily::V4, InnerFamily::V4) => same4(packet, to),
        (InnerFamily::V6, InnerFamily::V6) => same6(packet, to),
        (InnerFamily::V4, InnerFamily::V6) => widen(packet, at, to),
        (InnerFamily::V6, InnerFamily::V4) => narrow(packet, at, to),
    }?;
    let ethernet = packet.header_mut::<Ethernet>(0).ok_or(Outcome::DropHeadroom)?;
    *ethernet = Ethernet::new(station.0, station.1, ethertype);
    Ok(())
}

/// Ports and checksum, which lie the same in both families.
#[inline(always)]
fn transport<P: Packet>(
    packet: &mut P,
    at: Layout,
    from: &Ends,
    to: &Ends,
    family: InnerFamily,
) -> Result<(), Outcome> {
    let checksum_at = at.offset + checksum_at(at.protocol);
    let checksum = packet.header_mut::<Checksum>(checksum_at).ok_or(Outcome::DropVipTruncated)?;
    match checksum_after({ checksum.sum }.raw(), from.sum(), to.sum(), at.protocol) {
        Some(after) => checksum.sum = Be16::from_raw(after),
        // IPv4 knows datagrams without a checksum, hosts of IPv6 refuse them (RFC 8200, section 8.1).
        None if at.family == InnerFamily::V4 && family == InnerFamily::V6 => {
            return Err(Outcome::DropNoChecksum);
        }
        None => {}
    }
    let ports = packet.header_mut::<Ports>(at.offset).ok_or(Outcome::DropVipTruncated)?;
    ports.both = to.ports;
    Ok(())
}

#[inline(always)]
fn same4<P: Packet>(packet: &mut P, to: &Ends) -> Result<EtherType, Outcome> {
    let ip = packet.header_mut::<Ipv4>(IP).ok_or(Outcome::DropVipTruncated)?;
    readdress4(ip, to.source, to.destination);
    Ok(EtherType::IPV4)
}

/// Other addresses. The header sums up to the same as before.
#[inline(always)]
pub(crate) fn readdress4(ip: &mut Ipv4, source: Address6, destination: Address6) {
    let before = halves({ ip.source }.raw()) + halves({ ip.destination }.raw());
    let after = halves(source.v4()) + halves(destination.v4());
    let checksum = !{ ip.checksum }.raw() as u32 + negative(before) + after;
    ip.checksum = Be16::from_raw(!fold(checksum));
    ip.source = Be32::from_raw(source.v4());
    ip.destination = Be32::from_raw(destination.v4());
}

#[inline(always)]
fn same6<P: Packet>(packet: &mut P, to: &Ends) -> Result<EtherType, Outcome> {
    let ip = packet.header_mut::<Ipv6>(IP).ok_or(Outcome::DropVipTruncated)?;
    ip.source = to.source;
    ip.destination = to.destination;
    Ok(EtherType::IPV6)
}

/// IPv4 to IPv6. Options are not translated, and the packets of hosts have none.
#[inline(always)]
fn widen<P: Packet>(packet: &mut P, at: Layout, to: &Ends) -> Result<EtherType, Outcome> {
    if at.offset != AFTER4 {
        return Err(Outcome::DropUntranslatable);
    }
    let ip = packet.header::<Ipv4>(IP).ok_or(Outcome::DropVipTruncated)?;
    let (tos, hop_limit, length) = (ip.tos, ip.ttl, { ip.total_length }.get());
    packet.grow_head(FAMILY_STEP as usize).ok_or(Outcome::DropHeadroom)?;
    let ip = packet.header_mut::<Ipv6>(IP).ok_or(Outcome::DropHeadroom)?;
    *ip = Ipv6 {
        version_class_flow: Ipv6::first_word(tos, 0),
        payload_length: Be16::new(length.wrapping_sub(size_of::<Ipv4>() as u16)),
        next_header: at.protocol,
        hop_limit,
        source: to.source,
        destination: to.destination,
    };
    Ok(EtherType::IPV6)
}

/// IPv6 to IPv4. What is short may be fragmented on its way, and takes its checksum for an identification.
#[inline(always)]
fn narrow<P: Packet>(packet: &mut P, at: Layout, to: &Ends) -> Result<EtherType, Outcome> {
    if at.offset != AFTER6 {
        return Err(Outcome::DropUntranslatable);
    }
    let ip = packet.header::<Ipv6>(IP).ok_or(Outcome::DropVipTruncated)?;
    let (tos, ttl, payload) = (ip.traffic_class(), ip.hop_limit, { ip.payload_length }.get());
    let checksum_at = at.offset + checksum_at(at.protocol);
    let identification = packet.header::<Checksum>(checksum_at).ok_or(Outcome::DropVipTruncated)?.sum;
    packet.shrink_head(FAMILY_STEP as usize).ok_or(Outcome::DropHeadroom)?;
    let length = payload as u32 + size_of::<Ipv4>() as u32;
    let header = header4((tos, ttl), length, identification, at.protocol, to.source, to.destination);
    let ip = packet.header_mut::<Ipv4>(IP).ok_or(Outcome::DropHeadroom)?;
    *ip = header;
    Ok(EtherType::IPV4)
}

/// The IPv4 header of a packet that comes from IPv6, of `length` bytes.
#[inline(always)]
pub(crate) fn header4(
    (tos, ttl): (u8, u8),
    length: u32,
    identification: Be16,
    protocol: u8,
    source: Address6,
    destination: Address6,
) -> Ipv4 {
    let whole = length > FRAGMENTABLE;
    let mut header = Ipv4 {
        version_ihl: 0x45,
        tos,
        total_length: Be16::new(length as u16),
        identification: if whole { Be16::new(0) } else { identification },
        fragment: if whole { IPV4_DONT_FRAGMENT } else { Be16::new(0) },
        ttl,
        protocol,
        checksum: Be16::new(0),
        source: Be32::from_raw(source.v4()),
        destination: Be32::from_raw(destination.v4()),
    };
    header.checksum = Be16::from_raw(!fold(header.sum()));
    header
}
