use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use etherparse::{IpFragOffset, PacketBuilder};

use super::*;
use crate::capacity::Capacity;
use crate::config;
use crate::nexthop::NextHop;
use crate::reconcile::desired::{LoadTime, World, desired};
use crate::reconcile::pins::{Pins, coarse_ns};
use crate::reconcile::plan::plan_at_once;
use lb_common::abi::{Meta, Pin, PinState};
use lb_common::flow::{self, FlowHash};
use lb_common::pins;

const CONFIG: &str = "
interfaces: [eth0]
seed: 5f1d0c3a9be24771
vlan: true
outer_source: [10.255.0.1/32, \"fd00:255::1/128\"]
pools:
  web: {forward: ipip, backends: [10.0.0.11], health: {type: none}}
  near: {forward: l2, backends: [10.0.0.12], health: {type: none}}
  none: {forward: ipip, backends: [10.0.0.13], health: {type: none}}
  turns: {forward: ipip, backends: [10.0.0.14, 10.0.0.15], health: {type: none}}
services:
  - {name: www, vip: [203.0.113.10, \"2001:db8:113::10\"], ports: 80, protocol: tcp, pool: web}
  - {name: dns, vip: 203.0.113.10, ports: 53, protocol: udp, pool: near}
  - {name: empty, vip: 203.0.113.10, ports: 81, protocol: tcp, pool: none}
  - {name: turns, vip: 203.0.113.10, ports: 90, protocol: tcp, pool: turns, scheduler: round-robin}
";

const CLIENT: [u8; 4] = [192, 0, 2, 7];
const VIP: [u8; 4] = [203, 0, 113, 10];
const MACS: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);

/// Tables of the configuration, where all but the backend of `none` are up and reached by interface 2.
fn tables() -> Image {
    let config = config::parse("test.yaml", CONFIG).unwrap().config;
    let mut world = World::default();
    for (pool, backend, last) in [(0, 0, 11), (1, 0, 12), (2, 0, 13), (3, 0, 14), (3, 1, 15)] {
        let hop = NextHop {
            ifindex: 2,
            interface: "eth0".to_owned(),
            source_mac: MACS.1,
            mac: [2, 0xbe, 0, 0, 0, last],
            mtu: 1400,
            preferred_source: None,
            gateway: None,
            kind: None,
            redirect_target: true,
        };
        world.up.insert((pool, backend), last != 13);
        Arc::make_mut(&mut world.next_hops).insert(Ipv4Addr::new(10, 0, 0, last).into(), hop);
    }
    let capacity = Capacity::new(&config.limits);
    let LoadTime { seed, features, icmp_rate, pin_rate, source_ports: _ } = LoadTime::of(&config);
    let meta = Meta { seed, features: features.bits(), icmp_rate, pin_rate, ..Meta::default() };
    let mut image = Image::empty(&capacity, meta);
    for op in plan_at_once(&image, &desired(&config, &world), &capacity).unwrap() {
        image.apply(&op);
    }
    image
}

fn told(frame: Vec<u8>) -> Explanation {
    let length = frame.len();
    explain(&tables(), &Given::new(frame, length).unwrap(), 2)
}

fn to_vip() -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
    PacketBuilder::ethernet2(MACS.0, MACS.1).ipv4(CLIENT, VIP, 63)
}

/// The frame that a builder writes.
macro_rules! frame {
    ($builder:expr, $payload:expr) => {{
        let mut frame = Vec::new();
        $builder.write(&mut frame, $payload).unwrap();
        frame
    }};
}

/// What an ICMP error about a TCP packet of a VIP carries.
fn sent_by(vip: [u8; 4], port: u16) -> Vec<u8> {
    let whole = frame!(PacketBuilder::ipv4(vip, CLIENT, 60).tcp(port, 40000, 1, 1024), &[]);
    whole[..28].to_vec()
}

fn frag_needed() -> etherparse::Icmpv4Type {
    let next_hop_mtu = 1300;
    let header = etherparse::icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu };
    etherparse::Icmpv4Type::DestinationUnreachable(header)
}

#[test]
fn a_syn_is_told_with_its_tunnel() {
    let told = told(frame!(to_vip().tcp(40000, 80, 1, 1024).syn(), &[]));
    assert_eq!(told.frame.to_string(), "tcp 192.0.2.7:40000 -> 203.0.113.10:80, SYN");
    assert_eq!((told.frame.hops, told.frame.length), (Some(63), 54));
    assert_eq!(told.outcome, "forward_transmit");
    assert_eq!(told.backend_address, Some(Ipv4Addr::new(10, 0, 0, 11).into()));
    assert_eq!((told.mtu, told.client_mtu, told.egress_ifindex), (Some(1400), Some(1380), Some(2)));
    let sent = told.sent.clone().unwrap();
    assert_eq!(sent.to_string(), "ipip 10.255.0.1 -> 10.0.0.11");
    assert_eq!(sent.length, 74);
    assert_eq!(sent.destination_mac, told.next_hop_mac);
    assert!(told.is_taken() && told.advice.is_empty());
}

#[test]
fn a_flow_and_its_first_frame_are_told_the_same() {
    let query = Query {
        source: "192.0.2.7:40000".parse().unwrap(),
        vip: "203.0.113.10:80".parse().unwrap(),
        protocol: Protocol::Tcp,
    };
    let of_flow = explain(&tables(), &first_frame(&query).unwrap(), 2);
    let of_frame = told(frame!(to_vip().tcp(40000, 80, 1, 1024).syn(), &[]));
    assert_eq!((of_flow.slot, of_flow.backend_id), (of_frame.slot, of_frame.backend_id));
    assert_eq!(of_flow.service_row, of_frame.service_row);
    assert_eq!(of_flow.frame.to_string(), of_frame.frame.to_string());
    let mixed = Query { vip: "[2001:db8:113::10]:80".parse().unwrap(), ..query };
    assert!(first_frame(&mixed).unwrap_err().contains("different address families"));
}

#[test]
fn a_service_is_known_by_its_row_also_where_nobody_is_up() {
    let row = |port| told(frame!(to_vip().tcp(40000, port, 1, 1024).syn(), &[]));
    let (web, empty, nobody) = (row(80), row(81), row(82));
    assert!(web.service_row.is_some() && empty.service_row.is_some());
    assert_ne!(web.service_row, empty.service_row);
    assert_eq!((empty.outcome.as_str(), empty.is_taken()), ("drop_no_backend", false));
    assert!(empty.advice.contains("xlb status"), "{}", empty.advice);
    assert_eq!((nobody.outcome.as_str(), nobody.service_row), ("drop_vip_port", None));
}

#[test]
fn an_icmp_error_is_told_with_the_flow_that_it_is_about() {
    let error = |carried: &[u8]| {
        told(frame!(
            PacketBuilder::ethernet2(MACS.0, MACS.1).ipv4([198, 51, 100, 1], VIP, 60).icmpv4(frag_needed()),
            carried
        ))
    };
    let about = error(&sent_by(VIP, 80));
    assert_eq!(
        about.frame.to_string(),
        "icmp 198.51.100.1 -> 203.0.113.10, fragmentation needed (MTU 1300), about tcp 203.0.113.10:80 -> 192.0.2.7:40000"
    );
    assert_eq!(about.outcome, "forward_error_transmit");
    let flow = told(frame!(to_vip().tcp(40000, 80, 1, 1024).syn(), &[]));
    assert_eq!((about.slot, about.service_row), (flow.slot, flow.service_row));

    assert_eq!(error(&sent_by([203, 0, 113, 11], 80)).outcome, "drop_icmp_forged");
    assert_eq!(error(&sent_by(VIP, 82)).outcome, "drop_icmp_stranger");
    assert_eq!(error(&sent_by(VIP, 80)[..27]).outcome, "drop_vip_truncated");
}

#[test]
fn a_ping_is_answered_and_the_answer_is_told() {
    let told = told(frame!(to_vip().icmpv4_echo_request(1, 2), b"ping"));
    assert_eq!((told.outcome.as_str(), told.is_taken()), ("answer_echo", true));
    assert_eq!(told.sent.unwrap().to_string(), "icmp 203.0.113.10 -> 192.0.2.7, echo reply");
}

#[test]
fn a_packet_that_is_too_long_is_answered_also_if_only_its_head_was_captured() {
    let frame = frame!(to_vip().tcp(40000, 80, 1, 1024).ack(1), &[0; 1400]);
    let whole = told(frame.clone());
    assert_eq!(whole.outcome, "answer_too_big");
    let sent = whole.sent.unwrap();
    let expected = "icmp 203.0.113.10 -> 192.0.2.7, fragmentation needed (MTU 1380), about tcp 192.0.2.7:40000 -> 203.0.113.10:80, ACK";
    assert_eq!(sent.to_string(), expected);
    let head = explain(&tables(), &Given::new(frame[..96].to_vec(), frame.len()).unwrap(), 2);
    assert_eq!((head.outcome.as_str(), head.frame.length), ("answer_too_big", frame.len()));
}

#[test]
fn a_vlan_tag_is_told_and_leaves_with_the_frame() {
    let vlan = PacketBuilder::ethernet2(MACS.0, MACS.1).single_vlan(7.try_into().unwrap());
    let told = told(frame!(vlan.ipv4(CLIENT, VIP, 63).udp(40000, 53), b"?"));
    assert_eq!(told.frame.to_string(), "udp 192.0.2.7:40000 -> 203.0.113.10:53, VLAN 7");
    assert_eq!(told.forward.as_deref(), Some("l2"));
    let sent = told.sent.unwrap();
    assert_eq!(
        (sent.vlans.as_slice(), sent.destination_mac.as_deref()),
        (&[7][..], Some("02:be:00:00:00:0c"))
    );
}

#[test]
fn fragments_have_no_ports_but_the_first() {
    let fragment = |offset: u16, more| {
        let mut ip = etherparse::Ipv4Header::new(8, 63, etherparse::IpNumber::UDP, CLIENT, VIP).unwrap();
        (ip.dont_fragment, ip.more_fragments) = (false, more);
        ip.fragment_offset = IpFragOffset::try_new(offset).unwrap();
        ip.header_checksum = ip.calc_header_checksum();
        let mut frame = [&MACS.1[..], &MACS.0, &[8, 0]].concat();
        frame.extend(ip.to_bytes());
        frame.extend([0x9c, 0x40, 0, 53, 0, 8, 0, 0]);
        told(frame)
    };
    let first = fragment(0, true);
    assert_eq!(first.frame.to_string(), "udp 192.0.2.7:40000 -> 203.0.113.10:53, first fragment");
    let later = fragment(185, false);
    assert_eq!(later.frame.to_string(), "udp 192.0.2.7 -> 203.0.113.10, fragment at 1480");
    for told in [first, later] {
        assert_eq!(told.outcome, "drop_vip_fragment");
        assert!(!told.advice.is_empty());
    }
}

#[test]
fn extension_headers_are_told_in_their_order() {
    let (client, vip) = ([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7], "2001:db8:113::10");
    let vip: std::net::Ipv6Addr = vip.parse().unwrap();
    let tcp = frame!(PacketBuilder::ipv6(client, vip.octets(), 9).tcp(40000, 80, 1, 1024).syn(), &[]);
    let mut frame = [&MACS.1[..], &MACS.0, &[0x86, 0xdd], &tcp[..40]].concat();
    // Hop-by-hop options, then destination options, each of eight bytes of padding.
    frame.extend([60, 0, 1, 4, 0, 0, 0, 0]);
    frame.extend([6, 0, 1, 4, 0, 0, 0, 0]);
    frame.extend(&tcp[40..]);
    (frame[14 + 6], frame[14 + 5]) = (0, 20 + 16);
    let told = told(frame);
    assert_eq!(told.frame.to_string(), "tcp [2001:db8::7]:40000 -> [2001:db8:113::10]:80, SYN");
    assert_eq!(told.frame.headers, ["hop-by-hop options", "destination options"]);
    assert_eq!((told.outcome.as_str(), told.frame.hops), ("forward_transmit", Some(9)));
}

#[test]
fn what_is_no_ip_or_no_frame_is_told_too() {
    let ethertype = |ethertype: [u8; 2]| [&MACS.1[..], &MACS.0, &ethertype, &[0; 46]].concat();
    for (frame, words, outcome) in [
        (ethertype([0x88, 0xcc]), "EtherType 0x88cc", "pass_not_ip"),
        (ethertype([0x08, 0x00]), "ipv4, no whole header", "pass_malformed"),
        (vec![0; 5], "cut off, no whole header", "pass_truncated"),
    ] {
        let told = told(frame);
        assert_eq!((told.frame.to_string().as_str(), told.outcome.as_str()), (words, outcome));
        assert!(!told.is_taken());
    }
}

/// What comes in may be anything; nothing here may panic.
#[test]
fn every_beginning_of_a_frame_is_told() {
    let error = frame!(
        PacketBuilder::ethernet2(MACS.0, MACS.1).ipv4([198, 51, 100, 1], VIP, 60).icmpv4(frag_needed()),
        &sent_by(VIP, 80)
    );
    let image = tables();
    for length in 1..error.len() {
        explain(&image, &Given::new(error[..length].to_vec(), 0).unwrap(), 2);
    }
}

/// The hash of a packet's flow.
fn hash_of(image: &Image, mut frame: Vec<u8>) -> FlowHash {
    let tables = Traced::new(image);
    let packet = Buffer::new(&mut frame, 0, 2);
    let ip = parse::ipv4(&packet, IP).ok().unwrap();
    let flow = classify::v4(&packet, &tables, tables.vip_index().unwrap(), &ip).ok().unwrap();
    flow::hash4(&tables, flow.client, flow.vip, flow.ports, flow.protocol)
}

#[test]
fn a_flow_that_begins_may_get_any_backend_of_a_scheduler_that_is_no_hash() {
    let mut image = tables();
    let told = |image: &Image, frame: &[u8]| explain(image, &Given::new(frame.to_vec(), 0).unwrap(), 2);
    let syn = frame!(to_vip().tcp(40000, 90, 1, 1024).syn(), &[]);
    let told_syn = told(&image, &syn);
    let picks = Picks { how: "in turn".to_owned(), backends: 2 };
    assert_eq!((told_syn.chosen_by.as_deref(), told_syn.picks.clone()), (Some("scheduler"), Some(picks)));

    // What is no beginning goes by its hash, or by its pin.
    let ack = frame!(to_vip().tcp(40000, 90, 1, 1024).ack(1), &[]);
    let told_ack = told(&image, &ack);
    assert_eq!((told_ack.chosen_by.as_deref(), told_ack.picks), (Some("slot"), None));
    let age = Pin::age_of(coarse_ns());
    for id in [told_syn.backend_id, told_ack.backend_id].into_iter().flatten() {
        let pin = Pin::new(pins::tag(hash_of(&image, syn.clone())), id, PinState::Established, age);
        let bucket = [pin.bits(), 0, 0, 0, 0, 0, 0, 0].map(AtomicU64::new);
        image.pins = Pins::of(Arc::new(Vec::from(bucket)));
        for frame in [&syn, &ack] {
            let told = told(&image, frame);
            assert_eq!((told.chosen_by.as_deref(), told.picks), (Some("pin"), None));
            assert_eq!(told.backend_id, Some(id));
        }
    }
    // A SYN on a flow that has long been silent begins anew.
    let old = age.wrapping_sub(1000) & 0x7fff;
    let pin = Pin::new(pins::tag(hash_of(&image, syn.clone())), 1, PinState::Established, old);
    let bucket = [pin.bits(), 0, 0, 0, 0, 0, 0, 0].map(AtomicU64::new);
    image.pins = Pins::of(Arc::new(Vec::from(bucket)));
    assert_eq!(told(&image, &syn).chosen_by.as_deref(), Some("scheduler"));
    // Without room for its pin a flow goes by its hash.
    image.pins = Pins::of(Arc::new((1..=8).map(|tag| AtomicU64::new(tag << 32 | 1)).collect::<Vec<_>>()));
    assert_eq!(told(&image, &syn).chosen_by.as_deref(), Some("slot"));
}
