//! Answers for VIPs that are on-link (`vip_arp`): ARP (RFC 826) and neighbour solicitation (RFC 4861).
//!
//! A question that is not about a VIP, or that is not in the plain form that hosts send, passes to
//! the host's stack untouched.

use crate::checksum::{address6, fold, halves};
use crate::outcome::Outcome;
use crate::packet::Packet;
use crate::tables::Tables;
use crate::vips;
use crate::wire::{Address6, Arp, Be16, EtherType, Ethernet, Ipv6, Mac, Neighbour, PROTO_ICMPV6, header};

const IP: usize = size_of::<Ethernet>();

/// Answers an ARP request for an IPv4 VIP.
#[inline(always)]
pub fn arp<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Outcome {
    let Some(request) = packet.header::<Arp>(IP) else { return Outcome::PassNotIp };
    if !request.is_request() || vips::vip4(tables, { request.target }.raw()).is_none() {
        return Outcome::PassNotIp;
    }
    let Some(interface) = tables.interface(packet.ingress_ifindex()) else { return Outcome::PassNotIp };
    let ours = Mac::from_bits(interface.mac);
    let reply = Arp::reply(ours, request.target, request.sender_mac(), request.sender);
    let asker = request.sender_mac();

    let Some(ethernet) = packet.header_mut::<Ethernet>(0) else { return Outcome::PassNotIp };
    *ethernet = Ethernet::new(asker, ours, EtherType::ARP);
    let Some(arp) = packet.header_mut::<Arp>(IP) else { return Outcome::PassNotIp };
    *arp = reply;
    Outcome::AnswerArp
}

#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Question {
    ethernet: Ethernet,
    ip: Ipv6,
    message: Neighbour,
}

header!(Question, 86);

/// Answers a neighbour solicitation for an IPv6 VIP; `None` for anything else.
///
/// Solicitations shorter than one with a link-layer address option (bare duplicate address
/// detection) are left alone: the answer would not fit in place.
#[inline(always)]
pub fn neighbour<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Option<Outcome> {
    let question = packet.header::<Question>(0)?;
    let length = { question.ip.payload_length }.get() as usize;
    // RFC 4861, 7.1.1: hop limit 255 proves that the sender is on this link.
    if question.ip.next_header != PROTO_ICMPV6
        || question.ip.hop_limit != 255
        || length != size_of::<Neighbour>()
        || !question.message.is_solicitation()
    {
        return None;
    }
    let target = question.message.target;
    if vips::vip6(tables, target).is_none() {
        return None;
    }
    let ours = Mac::from_bits(tables.interface(packet.ingress_ifindex())?.mac);

    // RFC 4861, 7.2.4: an asker without an address is answered through all-nodes, not solicited.
    let asker = question.ip.source;
    let asker_mac = question.ethernet.source();
    let (to, to_mac, flags) = if asker == Address6::default() {
        (ALL_NODES, ALL_NODES_MAC, Neighbour::OVERRIDE)
    } else {
        (asker, asker_mac, Neighbour::OVERRIDE | Neighbour::SOLICITED)
    };
    let mut message = Neighbour::advertisement(target, ours, flags);
    message.checksum = Be16::from_raw(!fold(pseudo_sum(target, to) + message_sum(&message)));
    let answer = Question {
        ethernet: Ethernet::new(to_mac, ours, EtherType::IPV6),
        ip: Ipv6 {
            version_class_flow: Ipv6::first_word(0, 0),
            payload_length: Be16::new(size_of::<Neighbour>() as u16),
            next_header: PROTO_ICMPV6,
            hop_limit: 255,
            source: target,
            destination: to,
        },
        message,
    };
    *packet.header_mut::<Question>(0)? = answer;
    Some(Outcome::AnswerNeighbour)
}

const ALL_NODES: Address6 = Address6::from_bytes([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
const ALL_NODES_MAC: Mac = Mac::from_bytes([0x33, 0x33, 0, 0, 0, 1]);

/// RFC 8200, 8.1: addresses, length, next header.
#[inline(always)]
fn pseudo_sum(source: Address6, destination: Address6) -> u32 {
    let length = Be16::new(size_of::<Neighbour>() as u16).raw() as u32;
    let next_header = Be16::new(PROTO_ICMPV6 as u16).raw() as u32;
    address6(source) + address6(destination) + length + next_header
}

#[inline(always)]
fn message_sum(message: &Neighbour) -> u32 {
    let words = message.words();
    let mut sum = 0;
    let mut i = 0;
    while i < words.len() {
        sum += halves(words[i]);
        i += 1;
    }
    sum
}
