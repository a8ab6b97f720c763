//! The backend's side of a tunnel: takes the outer header off, for backends whose kernel has no
//! ipip or fou device or that want sources checked.
//!
//! A tunnel packet is believed only from the balancers' addresses, and only if what is inside is
//! for a VIP: otherwise anyone could inject packets behind the host's filters. The UDP checksum of GUE is
//! not looked at: what is inside has its own (RFC 6936, section 3.3).

use crate::outcome::DecapOutcome;
use crate::packet::Packet;
use crate::wire::{Address6, Be16, EtherType, Ethernet, Ipv4, Ipv6, PROTO_IPIP, PROTO_IPV6, PROTO_UDP, Udp};

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
    let (outer, protocol) = match ethertype {
        EtherType::IPV4 => outer4(packet, tables)?,
        EtherType::IPV6 => outer6(packet, tables)?,
        _ => return Err(DecapOutcome::PassNotTunnel),
    };
    let ethertype = match protocol {
        PROTO_IPIP => inner4(packet, tables, IP + outer)?,
        _ => inner6(packet, tables, IP + outer)?,
    };
    packet.shrink_head(outer).ok_or(DecapOutcome::DropHead)?;
    let ethernet = packet.header_mut::<Ethernet>(0).ok_or(DecapOutcome::DropHead)?;
    *ethernet = Ethernet::new(destination, source, ethertype);
    Ok(())
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

/// Length and protocol of what an outer header of `length` bytes takes in front of the inner packet.
#[inline(always)]
fn tunnel<P: Packet>(packet: &P, protocol: u8, length: usize) -> Result<(usize, u8), DecapOutcome> {
    if protocol != PROTO_UDP {
        return Ok((length, protocol));
    }
    let length = length + size_of::<Udp>();
    // GUE variant 1: the IP packet follows at once. Its header is read to the end by who judges it.
    let ip = packet.header::<Ipv4>(IP + length).ok_or(DecapOutcome::DropTruncated)?;
    match ip.version() {
        4 => Ok((length, PROTO_IPIP)),
        6 => Ok((length, PROTO_IPV6)),
        _ => Err(DecapOutcome::DropVariant),
    }
}

/// Length and protocol of an outer IPv4 header that may be taken off.
#[inline(always)]
fn outer4<P: Packet, T: DecapTables>(packet: &P, tables: &T) -> Result<(usize, u8), DecapOutcome> {
    let ip = packet.header::<Ipv4>(IP).ok_or(DecapOutcome::PassNotTunnel)?;
    let length = ip.header_length();
    let protocol = ip.protocol;
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
    tunnel(packet, protocol, length)
}

#[inline(always)]
fn outer6<P: Packet, T: DecapTables>(packet: &P, tables: &T) -> Result<(usize, u8), DecapOutcome> {
    let ip = packet.header::<Ipv6>(IP).ok_or(DecapOutcome::PassNotTunnel)?;
    let protocol = ip.next_header;
    if ip.version() != 6 || !is_tunnel(packet, tables, protocol, IP + size_of::<Ipv6>()) {
        return Err(DecapOutcome::PassNotTunnel);
    }
    if !tables.from6(ip.source) {
        return Err(DecapOutcome::DropSource);
    }
    tunnel(packet, protocol, size_of::<Ipv6>())
}

#[inline(always)]
fn inner4<P: Packet, T: DecapTables>(packet: &P, tables: &T, at: usize) -> Result<EtherType, DecapOutcome> {
    let ip = packet.header::<Ipv4>(at).ok_or(DecapOutcome::DropTruncated)?;
    if ip.version() != 4 || ip.header_length() < size_of::<Ipv4>() {
        return Err(DecapOutcome::DropTruncated);
    }
    if !tables.vip4({ ip.destination }.raw()) {
        return Err(DecapOutcome::DropNotVip);
    }
    Ok(EtherType::IPV4)
}

#[inline(always)]
fn inner6<P: Packet, T: DecapTables>(packet: &P, tables: &T, at: usize) -> Result<EtherType, DecapOutcome> {
    let ip = packet.header::<Ipv6>(at).ok_or(DecapOutcome::DropTruncated)?;
    if ip.version() != 6 {
        return Err(DecapOutcome::DropTruncated);
    }
    // The mapped form of an IPv4 VIP is that VIP's key in the map (`DecapVip`).
    if { ip.destination }.is_mapped_v4() || !tables.vip6(ip.destination) {
        return Err(DecapOutcome::DropNotVip);
    }
    Ok(EtherType::IPV6)
}
