//! The backend's side of a tunnel: takes the outer header off, for backends whose kernel has no
//! ipip device or that want sources checked.
//!
//! A tunnel packet is believed only from the balancers' addresses, and only if what is inside is
//! for a VIP: otherwise anyone could inject packets behind the host's filters.

use crate::outcome::DecapOutcome;
use crate::packet::Packet;
use crate::wire::{Address6, EtherType, Ethernet, Ipv4, Ipv6, PROTO_IPIP, PROTO_IPV6};

/// What `xlb decap` was told.
pub trait DecapTables {
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

const fn is_tunnel(protocol: u8) -> bool {
    protocol == PROTO_IPIP || protocol == PROTO_IPV6
}

/// Length and protocol of an outer IPv4 header that may be taken off.
#[inline(always)]
fn outer4<P: Packet, T: DecapTables>(packet: &P, tables: &T) -> Result<(usize, u8), DecapOutcome> {
    let ip = packet.header::<Ipv4>(IP).ok_or(DecapOutcome::PassNotTunnel)?;
    let length = ip.header_length();
    if ip.version() != 4 || length < size_of::<Ipv4>() || !is_tunnel(ip.protocol) {
        return Err(DecapOutcome::PassNotTunnel);
    }
    if ip.is_fragment() {
        return Err(DecapOutcome::DropFragment);
    }
    if !tables.from4({ ip.source }.raw()) {
        return Err(DecapOutcome::DropSource);
    }
    Ok((length, ip.protocol))
}

#[inline(always)]
fn outer6<P: Packet, T: DecapTables>(packet: &P, tables: &T) -> Result<(usize, u8), DecapOutcome> {
    let ip = packet.header::<Ipv6>(IP).ok_or(DecapOutcome::PassNotTunnel)?;
    if ip.version() != 6 || !is_tunnel(ip.next_header) {
        return Err(DecapOutcome::PassNotTunnel);
    }
    if !tables.from6(ip.source) {
        return Err(DecapOutcome::DropSource);
    }
    Ok((size_of::<Ipv6>(), ip.next_header))
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
