//! The packet path: parse, look up, rewrite. A reader follows a packet from top to bottom.

use crate::abi::{Backend, BackendKind, Egress, Features, Path, VipIndex, VipTarget};
use crate::classify::{self, Flow, Role};
use crate::encap::{self, Inner, InnerFamily};
use crate::flow::FlowHash;
use crate::icmp::{self, Reason};
use crate::icmp_errors::{self, About};
use crate::nat::Layout;
use crate::outcome::Outcome;
use crate::packet::Packet;
use crate::parse::{Parsed4, Parsed6, Transport};
use crate::pins::{Asked, Says};
use crate::quic::{self, Named};
use crate::slots::{self, Steered};
use crate::tables::Tables;
use crate::translate::{self, Passed, Shape};
use crate::vlan::{self, Tags};
use crate::wire::{Address6, EtherType, Ethernet, Icmp, PROTO_ICMP, PROTO_ICMPV6};
use crate::{answer, flow, parse, vips};

/// Where the IP header begins, once VLAN tags are off.
pub const IP: usize = size_of::<Ethernet>();

/// What becomes of a frame, and of whose. Aligned, so that the compiler may move it in words of eight bytes.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decision {
    /// The interface to leave by; 0 unless the outcome's action is `Redirect`.
    pub ifindex: u32,
    /// The backend that took the packet; 0 if none did. All fields are words: narrower ones make the
    /// compiler move the struct in pieces that the verifier (6.18) calls misaligned.
    pub backend: u32,
    /// Last, so that the other two lie in one word of eight bytes.
    pub outcome: Outcome,
}

impl Decision {
    #[inline(always)]
    const fn of(outcome: Outcome) -> Self {
        Self { outcome, ifindex: 0, backend: 0 }
    }
}

/// Why a packet is not forwarded.
#[derive(Clone, Copy)]
struct Refusal {
    outcome: Outcome,
    /// What the way to the backend takes, bytes; for `AnswerTooBig`.
    mtu: u32,
}

impl From<Outcome> for Refusal {
    #[inline(always)]
    fn from(outcome: Outcome) -> Self {
        Self { outcome, mtu: 0 }
    }
}

/// `try_forward`, for callers to whom one answer is as good as another.
#[inline(always)]
pub fn forward<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Decision {
    try_forward(packet, tables).unwrap_or_else(Decision::of)
}

/// Decides on a frame, rewrites it, counts it. The one entry and the one exit of the packet path.
///
/// `Ok` is sent, by the interface that it names, or where that is 0 by the one that the frame came in on; all else is
/// `Err`. A caller that ends each on its own keeps the way to a backend from carrying what the others have to say.
#[inline(always)]
pub fn try_forward<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Result<Decision, Outcome> {
    let vlan = tables.features().has(Features::VLAN);
    let tags = if vlan { vlan::pop(packet) } else { Tags::NONE };
    if vlan {
        packet.forget();
    }
    let mut decided = decide(packet, tables);
    if vlan && vlan::push(packet, tags).is_none() {
        decided = Err(Outcome::DropHeadroom.apart());
    }
    match decided {
        Ok(decision) => tables.count_outcome(decision.outcome),
        Err(outcome) => tables.count_outcome(outcome),
    }
    decided
}

#[inline(always)]
fn decide<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Result<Decision, Outcome> {
    let features = tables.features();
    let ethernet = Outcome::PassTruncated.unless(packet.header::<Ethernet>(0))?;
    let ethertype = ethernet.ethertype;
    if ethertype == EtherType::IPV4 {
        if features.has(Features::IPV4) { ipv4(packet, tables) } else { Err(Outcome::PassFamilyOff.apart()) }
    } else if ethertype == EtherType::IPV6 {
        if features.has(Features::IPV6) { ipv6(packet, tables) } else { Err(Outcome::PassFamilyOff.apart()) }
    } else if ethertype == EtherType::ARP && features.has(Features::VIP_ARP) {
        Err(answer::arp(packet, tables))
    } else if ethertype.is_vlan() {
        Err(Outcome::PassVlan.apart())
    } else {
        Err(Outcome::PassNotIp.apart())
    }
}

#[inline(always)]
fn ipv4<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Result<Decision, Outcome> {
    let ip = parse::ipv4(packet, IP)?;
    let refusal = match steer4(packet, tables, &ip) {
        Ok(decision) => return Ok(decision),
        Err(refusal) => refusal,
    };
    let refusal = if tables.features().has(Features::NAT) && refusal.outcome == Outcome::PassNotVip {
        match reply4(packet, tables, &ip) {
            Ok(decision) => return Ok(decision),
            Err(refusal) => refusal,
        }
    } else {
        refusal
    };
    Err(match refusal.outcome {
        Outcome::AnswerEcho => icmp::echo4(packet, tables),
        Outcome::AnswerTooBig => icmp::error4(packet, tables, &ip, Reason::TooBig(refusal.mtu)),
        Outcome::AnswerUnreachable => icmp::error4(packet, tables, &ip, Reason::PortUnreachable),
        outcome => outcome,
    })
}

#[inline(always)]
fn steer4<P: Packet, T: Tables>(packet: &mut P, tables: &T, ip: &Parsed4) -> Result<Decision, Refusal> {
    let index = tables.vip_index().ok_or(Outcome::PassNotVip)?;
    let flow = classify::v4(packet, tables, index, ip);
    if let Err(refused) = flow
        && !refused.is_answer()
    {
        return Err(refused.into());
    }
    sane4(tables, index, ip)?;
    let flow = flow?;

    let features = tables.features();
    let hash = if features.has(Features::SOURCE_HASH) && flow.target.has(VipTarget::SOURCE_HASH) {
        let prefix = flow::prefix4(flow.client, flow.target.cut());
        flow::hash4(tables, prefix, 0, 0, 0)
    } else {
        flow::hash4(tables, flow.client, flow.vip, flow.ports, flow.protocol)
    };
    let mut begins = false;
    if features.has(Features::NAT) && flow.target.has(VipTarget::TRANSLATED) {
        let passed = connected(packet, tables, &flow, InnerFamily::V4, ip.transport.offset, hash)?;
        if !passed.is_elsewhere() {
            return translated(packet, tables, ip.ip_length, passed);
        }
        begins = passed == Passed::BEGINS_ELSEWHERE;
        packet.forget();
    }
    let (id, named) = choose(packet, tables, &flow, &ip.transport, hash, begins)?;
    let to = slots::backend(tables, id)?;
    let inner = Inner { family: InnerFamily::V4, ip_length: ip.ip_length, tos: ip.tos, hash };
    let sum = |packet: &P| classify::sum4(packet, ip, flow.role);
    let mut decision = send(packet, tables, flow.target.vip(), flow.role, to, &inner, sum)?;
    if features.has(Features::QUIC) {
        decision.outcome = named.outcome(decision.outcome);
    }
    Ok(decision)
}

/// A packet to no VIP may be a backend's to a client, or an ICMP error about one to a backend.
#[inline(always)]
fn reply4<P: Packet, T: Tables>(packet: &mut P, tables: &T, ip: &Parsed4) -> Result<Decision, Refusal> {
    let error = match parse::ports(packet, &ip.transport) {
        Ok(_) => false,
        Err(Outcome::DropVipProtocol) if is_error4(packet, &ip.transport) => true,
        Err(_) => return Err(Outcome::PassNotVip.into()),
    };
    let fullnat = tables.features().has(Features::FULLNAT);
    let source = if fullnat { vips::vip4(tables, ip.destination).source() } else { 0 };
    let passed = returned(packet, tables, InnerFamily::V4, &ip.transport, source, error);
    translated(packet, tables, ip.ip_length, passed)
}

#[inline(always)]
fn is_error4<P: Packet>(packet: &P, transport: &Transport) -> bool {
    transport.protocol == PROTO_ICMP
        && parse::whole(packet, transport, size_of::<Icmp>()).is_ok()
        && packet.header::<Icmp>(transport.offset).is_some_and(|icmp| icmp.is_error())
}

/// What no client sends to a VIP: the answer would go round in circles, or to nobody.
#[inline(always)]
fn sane4<T: Tables>(tables: &T, index: &VipIndex, ip: &Parsed4) -> Result<(), Outcome> {
    if ip.source == ip.destination {
        return Err(Outcome::DropLand.apart());
    }
    if parse::is_martian4(ip.source) {
        return Err(Outcome::DropMartian.apart());
    }
    if !vips::vip_at4(tables, index, ip.source).is_none() {
        return Err(Outcome::DropSourceVip.apart());
    }
    if ip.ttl == 0 { Err(Outcome::DropTtl.apart()) } else { Ok(()) }
}

#[inline(always)]
fn ipv6<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Result<Decision, Outcome> {
    let ip = parse::ipv6(packet, IP)?;
    let refusal = match steer6(packet, tables, &ip) {
        Ok(decision) => return Ok(decision),
        Err(refusal) => refusal,
    };
    let refusal = if tables.features().has(Features::NAT) && refusal.outcome == Outcome::PassNotVip {
        match reply6(packet, tables, &ip) {
            Ok(decision) => return Ok(decision),
            Err(refusal) => refusal,
        }
    } else {
        refusal
    };
    Err(match refusal.outcome {
        Outcome::AnswerEcho => icmp::echo6(packet, tables),
        Outcome::AnswerTooBig => icmp::error6(packet, tables, &ip, Reason::TooBig(refusal.mtu)),
        Outcome::AnswerUnreachable => icmp::error6(packet, tables, &ip, Reason::PortUnreachable),
        outcome => outcome,
    })
}

#[inline(always)]
fn steer6<P: Packet, T: Tables>(packet: &mut P, tables: &T, ip: &Parsed6) -> Result<Decision, Refusal> {
    let index = tables.vip_index().ok_or(Outcome::PassNotVip)?;
    let flow = classify::v6(packet, tables, index, ip);
    if let Err(refused) = flow
        && !refused.is_answer()
    {
        return Err(refused.into());
    }
    sane6(tables, index, ip)?;
    let flow = flow?;

    let features = tables.features();
    let hash = if features.has(Features::SOURCE_HASH) && flow.target.has(VipTarget::SOURCE_HASH) {
        let prefix = flow::prefix6(flow.client, flow.target.cut());
        flow::hash6(tables, prefix, Address6::default(), 0, 0)
    } else {
        flow::hash6(tables, flow.client, flow.vip, flow.ports, flow.protocol)
    };
    let mut begins = false;
    if features.has(Features::NAT) && flow.target.has(VipTarget::TRANSLATED) {
        let passed = connected(packet, tables, &flow, InnerFamily::V6, ip.transport.offset, hash)?;
        if !passed.is_elsewhere() {
            return translated(packet, tables, ip.ip_length, passed);
        }
        begins = passed == Passed::BEGINS_ELSEWHERE;
        packet.forget();
    }
    let (id, named) = choose(packet, tables, &flow, &ip.transport, hash, begins)?;
    let to = slots::backend(tables, id)?;
    let inner = Inner { family: InnerFamily::V6, ip_length: ip.ip_length, tos: ip.tos, hash };
    let sum = |packet: &P| classify::sum6(packet, ip, flow.role);
    let mut decision = send(packet, tables, flow.target.vip(), flow.role, to, &inner, sum)?;
    if features.has(Features::QUIC) {
        decision.outcome = named.outcome(decision.outcome);
    }
    Ok(decision)
}

/// A packet to no VIP may be a backend's to a client, or an ICMP error about one to a backend.
#[inline(always)]
fn reply6<P: Packet, T: Tables>(packet: &mut P, tables: &T, ip: &Parsed6) -> Result<Decision, Refusal> {
    let error = match parse::ports(packet, &ip.transport) {
        Ok(_) => false,
        Err(Outcome::DropVipProtocol) if is_error6(packet, &ip.transport) => true,
        Err(_) => return Err(Outcome::PassNotVip.into()),
    };
    let fullnat = tables.features().has(Features::FULLNAT);
    let source = if fullnat { vips::vip6(tables, ip.destination).source() } else { 0 };
    let passed = returned(packet, tables, InnerFamily::V6, &ip.transport, source, error);
    translated(packet, tables, ip.ip_length, passed)
}

#[inline(always)]
fn is_error6<P: Packet>(packet: &P, transport: &Transport) -> bool {
    transport.protocol == PROTO_ICMPV6
        && parse::whole(packet, transport, size_of::<Icmp>()).is_ok()
        && packet.header::<Icmp>(transport.offset).is_some_and(|icmp| icmp.is_error6())
}

#[inline(always)]
fn sane6<T: Tables>(tables: &T, index: &VipIndex, ip: &Parsed6) -> Result<(), Outcome> {
    if ip.source == ip.destination {
        return Err(Outcome::DropLand.apart());
    }
    if parse::is_martian6(ip.source) {
        return Err(Outcome::DropMartian.apart());
    }
    if !vips::vip_at6(tables, index, ip.source).is_none() {
        return Err(Outcome::DropSourceVip.apart());
    }
    if ip.hop_limit == 0 { Err(Outcome::DropTtl.apart()) } else { Ok(()) }
}

/// The backend of a packet: that which its connection ID names, or the one of its slot, or, where that is on the move, the
/// one of its pin. `begins`: the flow does, whatever the packet says.
#[inline(always)]
fn choose<P: Packet, T: Tables, A>(
    packet: &P,
    tables: &T,
    flow: &Flow<A>,
    transport: &Transport,
    hash: FlowHash,
    begins: bool,
) -> Result<(u16, Named), Outcome> {
    let asked = tables.features().has(Features::QUIC);
    let named = if asked { quic::server(packet, tables, flow, transport) } else { Named::UNASKED };
    if let Some(id) = named.server() {
        return Ok((id, named));
    }
    let table = flow.target.table();
    let found = slots::find(tables, table, hash)?;
    if found.slot.is_clean() {
        return Ok((found.slot.cur(), named));
    }
    let says = classify::says(packet, flow.protocol, transport.offset, flow.role);
    let begins = begins || asked && quic::begins(packet, tables, flow, transport);
    let says = if begins && says.has(Says::DATAGRAM) { Says::NEW_DATAGRAM } else { says };
    let asked = Asked::new(table, says.to(flow.target));
    Ok((tables.decide(found.table, asked, hash, found.slot).backend()?, named))
}

/// A packet of a service with connections, or an error about one. Fragments have no ports: no connection is theirs.
#[inline(always)]
fn connected<P: Packet, T: Tables, A>(
    packet: &mut P,
    tables: &T,
    flow: &Flow<A>,
    family: InnerFamily,
    offset: usize,
    hash: FlowHash,
) -> Result<Passed, Outcome> {
    match flow.role {
        Role::Packet => {
            let shape = Shape::new(Layout { family, offset, protocol: flow.protocol });
            Ok(translate::forward(packet, tables, flow.target, hash, shape))
        }
        Role::Error => Ok(icmp_errors::pass_on(packet, tables, About::new(family, offset, false), 0)),
        Role::FirstFragment | Role::LaterFragment => Ok(Passed::NOT_HERE),
    }
}

/// A packet to a client or to a source, from a backend or about one.
#[inline(always)]
fn returned<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    family: InnerFamily,
    transport: &Transport,
    source: u32,
    error: bool,
) -> Passed {
    let Transport { offset, protocol, .. } = *transport;
    if !error {
        return tables.reply_translated(packet, source, Shape::new(Layout { family, offset, protocol }));
    }
    let passed = icmp_errors::pass_on(packet, tables, About::new(family, offset, true), source);
    if passed == Passed::NOT_HERE { Passed::NOT_OURS } else { passed }
}

/// What the function that translated a packet, or not, says of it.
#[inline(always)]
fn translated<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    ip_length: u32,
    passed: Passed,
) -> Result<Decision, Refusal> {
    packet.forget();
    let outcome = Outcome::DropInconsistent.unless(passed.outcome())?;
    if outcome == Outcome::AnswerTooBig {
        return Err(oversize(packet, tables, Role::Packet, ip_length, passed.value()));
    }
    if passed.backend() == 0 {
        return Err(outcome.into());
    }
    Ok(Decision { outcome, ifindex: passed.value(), backend: passed.backend() })
}

/// Rewrites the packet for its backend and sends it off.
#[inline(always)]
fn send<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    vip: u32,
    role: Role,
    to: Steered<'_>,
    inner: &Inner,
    sum: impl FnOnce(&P) -> u32,
) -> Result<Decision, Refusal> {
    let features = tables.features();
    let backend = to.backend;
    let path = Path::from_bits(volatile(&backend.path));
    let egress = Outcome::DropInconsistent.unless(tables.egress(path.egress()))?;
    // Nothing fits a way that leads nowhere: its MTU is 0.
    let fits = inner.ip_length + backend.overhead as u32 <= egress.mtu;
    let by = |feature, kind: BackendKind| features.has(feature) && backend.kind == kind as u8;
    if !fits {
        return Err(unsent(packet, tables, role, backend, egress, inner.ip_length));
    } else if by(Features::IPIP4, BackendKind::Ipip4) {
        encap::in_ipv4(packet, backend, path, egress, inner)?;
    } else if by(Features::IPIP6, BackendKind::Ipip6) {
        encap::in_ipv6(packet, backend, path, egress, inner)?;
    } else if by(Features::L2, BackendKind::L2) {
        encap::to_mac(packet, path, egress)?;
    } else if by(Features::GUE4, BackendKind::Gue4) {
        encap::gue_in_ipv4(packet, backend, path, egress, inner)?;
    } else if by(Features::GUE6, BackendKind::Gue6) {
        let sum = sum(packet);
        encap::gue_in_ipv6(packet, backend, path, egress, inner, sum)?;
    } else {
        return Err(unsent(packet, tables, role, backend, egress, inner.ip_length));
    }

    tables.count_vip(vip, inner.ip_length as u64);
    tables.count_backend(to.id, inner.ip_length as u64);
    let backend = u32::from(to.id);
    if egress.ifindex == packet.ingress_ifindex() {
        Ok(Decision { outcome: transmitted(role), ifindex: 0, backend })
    } else {
        Ok(Decision { outcome: redirected(role), ifindex: egress.ifindex, backend })
    }
}

#[inline(always)]
fn transmitted(role: Role) -> Outcome {
    match role {
        Role::Packet => Outcome::ForwardTransmit,
        Role::Error => Outcome::ForwardErrorTransmit.apart(),
        Role::FirstFragment | Role::LaterFragment => Outcome::ForwardFragmentTransmit.apart(),
    }
}

#[inline(always)]
fn redirected(role: Role) -> Outcome {
    match role {
        Role::Packet => Outcome::ForwardRedirect,
        Role::Error => Outcome::ForwardErrorRedirect.apart(),
        Role::FirstFragment | Role::LaterFragment => Outcome::ForwardFragmentRedirect.apart(),
    }
}

/// Why no way takes the packet.
#[inline(always)]
fn unsent<P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    role: Role,
    backend: &Backend,
    egress: &Egress,
    length: u32,
) -> Refusal {
    let Some(kind) = BackendKind::from_raw(backend.kind) else { return Outcome::DropInconsistent.into() };
    let overhead = backend.overhead as u32;
    match kind {
        // Its packets have a connection, so this is a fragment, or an error about one that is gone.
        _ if tables.features().has(Features::NAT) && kind.translates() => match role {
            Role::FirstFragment | Role::LaterFragment => Outcome::DropVipFragment.into(),
            Role::Packet | Role::Error => Outcome::DropIcmpStranger.into(),
        },
        BackendKind::Nobody => Outcome::DropNoBackend.into(),
        BackendKind::Pass => Outcome::PassNoBackend.into(),
        _ if egress.ifindex == 0 => Outcome::DropUnresolved.into(),
        _ if length + overhead > egress.mtu => {
            oversize(packet, tables, role, length, egress.mtu.wrapping_sub(overhead))
        }
        // A way that the program was loaded without.
        _ => Outcome::DropInconsistent.into(),
    }
}

/// A packet that is longer than the `mtu` of its way takes. A frame longer than the link it came from was
/// merged before XDP saw it: no path takes it, its sender cannot help it, and the cure is another one.
#[inline(always)]
fn oversize<P: Packet, T: Tables>(packet: &P, tables: &T, role: Role, length: u32, mtu: u32) -> Refusal {
    let super_frame = match tables.interface(packet.ingress_ifindex()) {
        Some(interface) => length > interface.mtu,
        None => false,
    };
    if super_frame {
        return Outcome::DropSuperFrame.into();
    }
    match role {
        // RFC 1122, 3.2.2; RFC 4443, 2.4 e: never about an error, nor about a fragment that is not the first.
        Role::Error | Role::LaterFragment => Outcome::DropOversize.into(),
        Role::Packet | Role::FirstFragment => Refusal { outcome: Outcome::AnswerTooBig, mtu },
    }
}

/// One load of a word that the agent stores whole.
#[inline(always)]
pub(crate) fn volatile(word: &u64) -> u64 {
    // SAFETY: a reference is valid, aligned and initialised.
    unsafe { core::ptr::read_volatile(word) }
}
