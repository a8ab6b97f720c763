//! The backend's side of a tunnel: takes the outer header off, for backends whose kernel has no
//! ipip or fou device or that want sources checked.
//!
//! A tunnel packet is believed only from the balancers' addresses, and only if what is inside is
//! for a VIP: otherwise anyone could inject packets behind the host's filters. The UDP checksum of GUE is
//! not looked at: what is inside has its own (RFC 6936, section 3.3).
//!
//! Congestion that routers marked on the outer header is told to the receiver (RFC 6040, section 4.2): the
//! balancer copied the sender's ECN outward, so a mark that stayed behind would be lost.

use crate::checksum::updated;
use crate::outcome::DecapOutcome;
use crate::packet::Packet;
use crate::wire::{
    Address6, Be16, Be32, EtherType, Ethernet, Ipv4, Ipv6, PROTO_IPIP, PROTO_IPV6, PROTO_UDP, Udp,
};

/// What `xlb decap` was told.
pub trait DecapTables {
    /// The UDP port that GUE comes to; 0 for none.
    fn gue_port(&self) -> Be16;
    /// Whether tunnel packets from this source are believed. Memory in wire order.
    fn from4(&self, source: u32) -> bool;
    fn from6(&self, source: Address6) -> bool;
    fn vip4(&self, destination: u32) -> bool;
    fn vip6(&self, destination: Address6) -> bool;
    fn count_outcome(&self, outcome: DecapOutcome);
}

const IP: usize = size_of::<Ethernet>();

/// Strips a tunnel header if there is one, and counts. The outcome's action is `Pass` or `Drop`.
#[inline(always)]
pub fn decap<P: Packet, T: DecapTables>(packet: &mut P, tables: &T) -> DecapOutcome {
    let outcome = match strip(packet, tables) {
        Ok(()) => DecapOutcome::Decapsulated,
        Err(outcome) => outcome,
    };
    tables.count_outcome(outcome);
    outcome
}

#[inline(always)]
fn strip<P: Packet, T: DecapTables>(packet: &mut P, tables: &T) -> Result<(), DecapOutcome> {
    let ethernet = packet.header::<Ethernet>(0).ok_or(DecapOutcome::PassNotTunnel)?;
    let (destination, source, ethertype) = (ethernet.destination(), ethernet.source(), ethernet.ethertype);
    let outer = match ethertype {
        EtherType::IPV4 => outer4(packet, tables)?,
        EtherType::IPV6 => outer6(packet, tables)?,
        _ => return Err(DecapOutcome::PassNotTunnel),
    };
    let at = IP + outer.bytes;
    let (ethertype, inner) = match outer.protocol {
        PROTO_IPIP => (EtherType::IPV4, inner4(packet, tables, at)?),
        _ => (EtherType::IPV6, inner6(packet, tables, at)?),
    };
    let ecn = told(outer.ecn, inner).ok_or(DecapOutcome::DropCongestion)?;
    packet.shrink_head(outer.bytes).ok_or(DecapOutcome::DropHead)?;
    let ethernet = packet.header_mut::<Ethernet>(0).ok_or(DecapOutcome::DropHead)?;
    *ethernet = Ethernet::new(destination, source, ethertype);
    if ecn != inner {
        mark(packet, ethertype, ecn ^ inner).ok_or(DecapOutcome::DropHead)?;
    }
    Ok(())
}

/// What there is in front of the inner packet.
struct Outer {
    bytes: usize,
    /// Of the inner packet.
    protocol: u8,
    ecn: u8,
}

const ECN: u8 = 3;
const CONGESTION: u8 = 3;

/// The inner packet's ECN after the tunnel (RFC 6040, figure 4); `None` where it must be dropped, for its
/// sender knows nothing of marks.
#[inline(always)]
const fn told(outer: u8, inner: u8) -> Option<u8> {
    const ECT_1: u8 = 1;
    const ECT_0: u8 = 2;
    match (outer, inner) {
        (CONGESTION, 0) => None,
        (CONGESTION, _) => Some(CONGESTION),
        (ECT_1, ECT_0) => Some(ECT_1),
        _ => Some(inner),
    }
}

/// Changes bits of the ECN of the packet behind the Ethernet header.
#[inline(always)]
fn mark<P: Packet>(packet: &mut P, ethertype: EtherType, bits: u8) -> Option<()> {
    if ethertype == EtherType::IPV6 {
        let ip = packet.header_mut::<Ipv6>(IP)?;
        let word = { ip.version_class_flow }.get() ^ (bits as u32) << 20;
        ip.version_class_flow = Be32::new(word);
        return Some(());
    }
    let ip = packet.header_mut::<Ipv4>(IP)?;
    let (first, tos) = (ip.version_ihl as u16, ip.tos);
    let new = tos ^ bits;
    let checksum = updated({ ip.checksum }.raw(), first | (tos as u16) << 8, first | (new as u16) << 8);
    ip.tos = new;
    ip.checksum = Be16::from_raw(checksum);
    Some(())
}

/// Whether a header announces a tunnel: IP, or UDP to the port of GUE.
#[inline(always)]
fn is_tunnel<P: Packet, T: DecapTables>(packet: &P, tables: &T, protocol: u8, at: usize) -> bool {
    match protocol {
        PROTO_IPIP | PROTO_IPV6 => true,
        PROTO_UDP => {
            let port = tables.gue_port();
            let udp = packet.header::<Udp>(at);
            port != Be16::new(0) && udp.is_some_and(|udp| { udp.destination } == port)
        }
        _ => false,
    }
}

/// What an outer header of `bytes` bytes and what belongs to it take in front of the inner packet.
#[inline(always)]
fn tunnel<P: Packet>(packet: &P, protocol: u8, bytes: usize, tos: u8) -> Result<Outer, DecapOutcome> {
    let ecn = tos & ECN;
    if protocol != PROTO_UDP {
        return Ok(Outer { bytes, protocol, ecn });
    }
    let bytes = bytes + size_of::<Udp>();
    // GUE variant 1: the IP packet follows at once. Its header is read to the end by who judges it.
    let ip = packet.header::<Ipv4>(IP + bytes).ok_or(DecapOutcome::DropTruncated)?;
    match ip.version() {
        4 => Ok(Outer { bytes, protocol: PROTO_IPIP, ecn }),
        6 => Ok(Outer { bytes, protocol: PROTO_IPV6, ecn }),
        _ => Err(DecapOutcome::DropVariant),
    }
}

/// What an outer IPv4 header that may be taken off says.
#[inline(always)]
fn outer4<P: Packet, T: DecapTables>(packet: &P, tables: &T) -> Result<Outer, DecapOutcome> {
    let ip = packet.header::<Ipv4>(IP).ok_or(DecapOutcome::PassNotTunnel)?;
    let length = ip.header_length();
    let (protocol, tos) = (ip.protocol, ip.tos);
    if ip.version() != 4 || length < size_of::<Ipv4>() {
        return Err(DecapOutcome::PassNotTunnel);
    }
    // A later fragment has no UDP header that would say whether it is GUE: it is left to the stack.
    if ip.is_later_fragment() && protocol == PROTO_UDP || !is_tunnel(packet, tables, protocol, IP + length) {
        return Err(DecapOutcome::PassNotTunnel);
    }
    if ip.is_fragment() {
        return Err(DecapOutcome::DropFragment);
    }
    if !tables.from4({ ip.source }.raw()) {
        return Err(DecapOutcome::DropSource);
    }
    tunnel(packet, protocol, length, tos)
}

#[inline(always)]
fn outer6<P: Packet, T: DecapTables>(packet: &P, tables: &T) -> Result<Outer, DecapOutcome> {
    let ip = packet.header::<Ipv6>(IP).ok_or(DecapOutcome::PassNotTunnel)?;
    let (protocol, tos) = (ip.next_header, ip.traffic_class());
    if ip.version() != 6 || !is_tunnel(packet, tables, protocol, IP + size_of::<Ipv6>()) {
        return Err(DecapOutcome::PassNotTunnel);
    }
    if !tables.from6(ip.source) {
        return Err(DecapOutcome::DropSource);
    }
    tunnel(packet, protocol, size_of::<Ipv6>(), tos)
}

/// The ECN of an inner IPv4 packet that may be let through.
#[inline(always)]
fn inner4<P: Packet, T: DecapTables>(packet: &P, tables: &T, at: usize) -> Result<u8, DecapOutcome> {
    let ip = packet.header::<Ipv4>(at).ok_or(DecapOutcome::DropTruncated)?;
    if ip.version() != 4 || ip.header_length() < size_of::<Ipv4>() {
        return Err(DecapOutcome::DropTruncated);
    }
    if !tables.vip4({ ip.destination }.raw()) {
        return Err(DecapOutcome::DropNotVip);
    }
    Ok(ip.tos & ECN)
}

#[inline(always)]
fn inner6<P: Packet, T: DecapTables>(packet: &P, tables: &T, at: usize) -> Result<u8, DecapOutcome> {
    let ip = packet.header::<Ipv6>(at).ok_or(DecapOutcome::DropTruncated)?;
    if ip.version() != 6 {
        return Err(DecapOutcome::DropTruncated);
    }
    // The mapped form of an IPv4 VIP is that VIP's key in the map (`DecapVip`).
    if { ip.destination }.is_mapped_v4() || !tables.vip6(ip.destination) {
        return Err(DecapOutcome::DropNotVip);
    }
    Ok(ip.traffic_class() & ECN)
}
