//! The packet path: parse, look up, rewrite. A reader follows a packet from top to bottom.

use crate::abi::{BackendKind, Features, Path, PortKey};
use crate::encap::{self, Inner, InnerFamily};
use crate::outcome::Outcome;
use crate::packet::Packet;
use crate::slots::{self, Steered};
use crate::tables::Tables;
use crate::wire::{EtherType, Ethernet, Ipv6};
use crate::{answer, flow, parse, vips};

/// Where the IP header begins.
const IP: usize = size_of::<Ethernet>();

/// What becomes of a frame, and of whose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decision {
    pub outcome: Outcome,
    /// The interface to leave by; 0 unless the outcome's action is `Redirect`.
    pub ifindex: u32,
    /// The backend that took the packet; 0 if none did. All fields are words: narrower ones make the
    /// compiler move the struct in pieces that the verifier (6.18) calls misaligned.
    pub backend: u32,
}

impl Decision {
    #[inline(always)]
    const fn of(outcome: Outcome) -> Self {
        Self { outcome, ifindex: 0, backend: 0 }
    }
}

/// Decides on a frame, rewrites it, counts it. The one entry and the one exit of the packet path.
#[inline(always)]
pub fn forward<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Decision {
    let decision = decide(packet, tables).unwrap_or_else(Decision::of);
    tables.count_outcome(decision.outcome);
    decision
}

#[inline(always)]
fn decide<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Result<Decision, Outcome> {
    let features = tables.features();
    let ethertype = packet.header::<Ethernet>(0).ok_or(Outcome::PassTruncated)?.ethertype;
    if ethertype == EtherType::IPV4 {
        return if features.has(Features::IPV4) { ipv4(packet, tables) } else { Err(Outcome::PassFamilyOff) };
    }
    if ethertype == EtherType::IPV6 {
        return if features.has(Features::IPV6) { ipv6(packet, tables) } else { Err(Outcome::PassFamilyOff) };
    }
    if ethertype == EtherType::ARP && features.has(Features::VIP_ARP) {
        return Err(answer::arp(packet, tables));
    }
    Err(Outcome::PassNotIp)
}

#[inline(always)]
fn ipv4<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Result<Decision, Outcome> {
    let ip = parse::ipv4(packet, IP)?;
    let protocol = ip.transport.protocol;
    let found = parse::ports(packet, &ip.transport).and_then(|ports| {
        let vip = vips::find4(tables, ip.destination, PortKey::from_ports(ports, protocol));
        Ok((ports, vip.ok_or(Outcome::DropVipPort)?))
    });
    let (ports, vip) = found.map_err(|reason| vips::refuse4(tables, ip.destination, reason))?;

    let hash = flow::hash4(tables, ip.source, ip.destination, ports, protocol);
    let to = slots::steer(tables, vip.table, hash.slot())?;
    let inner = Inner { family: InnerFamily::V4, ip_length: ip.ip_length as u32, tos: ip.tos, hash };
    send(packet, tables, vip.vip, to, &inner)
}

#[inline(always)]
fn ipv6<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Result<Decision, Outcome> {
    let ip = parse::ipv6(packet, IP)?;
    let protocol = ip.transport.protocol;
    let header = packet.header::<Ipv6>(IP).ok_or(Outcome::PassTruncated)?;
    let (source, destination) = (header.source, header.destination);
    let found = parse::ports(packet, &ip.transport).and_then(|ports| {
        let vip = vips::find6(tables, destination, PortKey::from_ports(ports, protocol));
        Ok((ports, vip.ok_or(Outcome::DropVipPort)?))
    });
    let (ports, vip) = match found {
        Ok(found) => found,
        Err(Outcome::DropVipProtocol) if tables.features().has(Features::VIP_ARP) => {
            let refused = || vips::refuse6(tables, destination, Outcome::DropVipProtocol);
            return Err(answer::neighbour(packet, tables).unwrap_or_else(refused));
        }
        Err(reason) => return Err(vips::refuse6(tables, destination, reason)),
    };

    let hash = flow::hash6(tables, source, destination, ports, protocol);
    let to = slots::steer(tables, vip.table, hash.slot())?;
    let inner = Inner { family: InnerFamily::V6, ip_length: ip.ip_length, tos: ip.tos, hash };
    send(packet, tables, vip.vip, to, &inner)
}

/// Rewrites the packet for its backend and sends it off.
#[inline(always)]
fn send<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    vip: u32,
    to: Steered<'_>,
    inner: &Inner,
) -> Result<Decision, Outcome> {
    let features = tables.features();
    let backend = to.backend;
    let path = Path::from_bits(volatile(&backend.path));
    let egress = tables.egress(path.egress()).ok_or(Outcome::DropInconsistent)?;
    let kind = BackendKind::from_raw(backend.kind).ok_or(Outcome::DropInconsistent)?;
    let sent = match kind {
        BackendKind::Nobody => return Err(Outcome::DropNoBackend),
        BackendKind::Pass => return Err(Outcome::PassNoBackend),
        _ if egress.ifindex == 0 => return Err(Outcome::DropUnresolved),
        BackendKind::Ipip4 if features.has(Features::IPIP4) => {
            encap::in_ipv4(packet, backend, path, egress, inner)
        }
        BackendKind::Ipip6 if features.has(Features::IPIP6) => {
            encap::in_ipv6(packet, backend, path, egress, inner)
        }
        BackendKind::L2 if features.has(Features::L2) => encap::to_mac(packet, path, egress, inner),
        BackendKind::Ipip4 | BackendKind::Ipip6 | BackendKind::L2 => Err(Outcome::DropInconsistent),
    };
    sent.map_err(|reason| blame(packet, tables, inner, reason))?;

    tables.count_vip(vip, inner.ip_length as u64);
    tables.count_backend(to.id, inner.ip_length as u64);
    if egress.ifindex == packet.ingress_ifindex() {
        Ok(Decision { outcome: Outcome::ForwardTransmit, ifindex: 0, backend: u32::from(to.id) })
    } else {
        Ok(Decision { outcome: Outcome::ForwardRedirect, ifindex: egress.ifindex, backend: u32::from(to.id) })
    }
}

/// A frame longer than the link it came from was merged before XDP saw it: no path takes it, and
/// the cure is another one than for a path that is too narrow.
#[inline(always)]
fn blame<P: Packet, T: Tables>(packet: &P, tables: &T, inner: &Inner, reason: Outcome) -> Outcome {
    match (reason, tables.interface(packet.ingress_ifindex())) {
        (Outcome::DropOversize, Some(interface)) if inner.ip_length > interface.mtu => {
            Outcome::DropSuperFrame
        }
        _ => reason,
    }
}

/// One load of a word that the agent stores whole.
#[inline(always)]
fn volatile(word: &u64) -> u64 {
    // SAFETY: a reference is valid, aligned and initialised.
    unsafe { core::ptr::read_volatile(word) }
}
