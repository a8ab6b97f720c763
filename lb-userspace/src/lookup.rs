//! Which backend takes a flow, and why: the packet path itself, run on a frame made up for the
//! question and on a copy of the live tables, with its way written down.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use lb_common::abi::{Backend, BackendKind};
use lb_common::forward::forward;
use lb_common::packet::Buffer;
use lb_common::wire::Address6;
use serde::{Deserialize, Serialize};

use crate::config::model::Protocol;
use crate::reconcile::desired::protocol_number;
use crate::reconcile::image::{Image, Traced};

/// A flow.
#[derive(Debug, Clone, Copy)]
pub struct Query {
    pub source: SocketAddr,
    pub vip: SocketAddr,
    pub protocol: Protocol,
}

/// What things are called; empty where no agent could be asked.
#[derive(Debug, Default)]
pub struct Names {
    /// Pool and name by id.
    pub backends: HashMap<u16, (String, String)>,
    pub services: HashMap<(IpAddr, u16, Protocol), String>,
}

/// The decision with its steps.
#[derive(Debug, Serialize, Deserialize)]
pub struct Explanation {
    pub outcome: String,
    pub meaning: String,
    pub action: String,
    pub service: Option<String>,
    pub table: Option<u16>,
    pub table_length: Option<u32>,
    pub slot: Option<u32>,
    /// `clean`, or how the slot is on the move.
    pub slot_state: Option<String>,
    pub backend_id: Option<u16>,
    pub pool: Option<String>,
    pub backend: Option<String>,
    pub backend_address: Option<IpAddr>,
    /// How the packet gets there.
    pub forward: Option<String>,
    /// Index of the interface it leaves by.
    pub egress_ifindex: Option<u32>,
    pub next_hop_mac: Option<String>,
}

const HEADROOM: usize = 64;

/// Runs the packet path for a flow, as if the first packet of it came in on an interface.
pub fn explain(image: &Image, query: &Query, ingress: u32, names: &Names) -> Result<Explanation, String> {
    // Without an agent the interface is not known; most hosts have one.
    let ingress = if ingress == 0 { image.interfaces.keys().min().copied().unwrap_or(0) } else { ingress };
    let mut bytes = vec![0; HEADROOM];
    bytes.extend(frame(query)?);
    let tables = Traced::new(image);
    let mut packet = Buffer::new(&mut bytes, HEADROOM, ingress);
    let decision = forward(&mut packet, &tables);
    let trail = tables.into_trail();

    let outcome = decision.outcome;
    let met = trail.met.filter(|id| *id != 0);
    let row = met.and_then(|id| image.backends.get(usize::from(id)));
    let named = met.and_then(|id| names.backends.get(&id));
    let path = row.map(|row| lb_common::abi::Path::from_bits(row.path));
    let egress = path.and_then(|path| image.egress.get(usize::from(path.egress())));
    Ok(Explanation {
        outcome: outcome.counter().to_owned(),
        meaning: outcome.meaning().to_owned(),
        action: outcome.action().name().to_owned(),
        service: names.services.get(&(query.vip.ip(), query.vip.port(), query.protocol)).cloned(),
        table: trail.table.map(|(table, _)| table),
        table_length: trail.table.map(|(_, word)| word.length()),
        slot: trail.slot.map(|(slot, _)| slot),
        slot_state: trail.slot.map(|(_, slot)| slot_state(slot)),
        backend_id: met,
        pool: named.map(|(pool, _)| pool.clone()),
        backend: named.map(|(_, name)| name.clone()),
        backend_address: row.and_then(address),
        forward: row.and_then(forward_name),
        egress_ifindex: egress.map(|egress| egress.ifindex).filter(|ifindex| *ifindex != 0),
        next_hop_mac: path.filter(|path| path.egress() != 0).map(|path| path.mac().to_string()),
    })
}

fn slot_state(slot: lb_common::slots::Slot) -> String {
    if slot.is_clean() {
        return "clean".to_owned();
    }
    format!("moving: cur {} est {} D={} P={}", slot.cur(), slot.est(), slot.dirty(), slot.pins())
}

fn forward_name(row: &Backend) -> Option<String> {
    let port = row.port.get();
    Some(match BackendKind::from_raw(row.kind)? {
        BackendKind::Nobody => "nobody".to_owned(),
        BackendKind::Pass => "pass".to_owned(),
        BackendKind::Ipip4 => "ipip over IPv4".to_owned(),
        BackendKind::Ipip6 => "ipip over IPv6".to_owned(),
        BackendKind::L2 => "l2".to_owned(),
        BackendKind::Gue4 => format!("gue over IPv4 to port {port}"),
        BackendKind::Gue6 => format!("gue over IPv6 to port {port}"),
    })
}

/// A backend's address. For `l2` the family shows in what is filled.
pub fn address(row: &Backend) -> Option<IpAddr> {
    let v4 = || Ipv4Addr::from(row.address4().to_ne_bytes()).into();
    let v6 = || -> IpAddr {
        let Address6 { high, low } = row.address6();
        std::net::Ipv6Addr::from(Address6 { high, low }.bytes()).into()
    };
    match BackendKind::from_raw(row.kind)? {
        BackendKind::Nobody | BackendKind::Pass => None,
        BackendKind::Ipip4 | BackendKind::Gue4 => Some(v4()),
        BackendKind::Ipip6 | BackendKind::Gue6 => Some(v6()),
        BackendKind::L2 if row.address[1] == 0 && row.address[0] >> 32 == 0 => Some(v4()),
        BackendKind::L2 => Some(v6()),
    }
}

/// The shortest frame of the flow: a SYN, or an empty datagram.
fn frame(query: &Query) -> Result<Vec<u8>, String> {
    let transport_bytes: u16 = match query.protocol {
        Protocol::Tcp => 20,
        Protocol::Udp => 8,
    };
    let mut frame = vec![0u8; 12];
    match (query.source.ip(), query.vip.ip()) {
        (IpAddr::V4(source), IpAddr::V4(vip)) => {
            frame.extend([0x08, 0x00, 0x45, 0]);
            frame.extend((20 + transport_bytes).to_be_bytes());
            frame.extend([0, 0, 0x40, 0, 64, protocol_number(query.protocol), 0, 0]);
            frame.extend(source.octets());
            frame.extend(vip.octets());
        }
        (IpAddr::V6(source), IpAddr::V6(vip)) => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(transport_bytes.to_be_bytes());
            frame.extend([protocol_number(query.protocol), 64]);
            frame.extend(source.octets());
            frame.extend(vip.octets());
        }
        _ => return Err("source and VIP are of different address families".to_owned()),
    }
    frame.extend(query.source.port().to_be_bytes());
    frame.extend(query.vip.port().to_be_bytes());
    let mut rest = vec![0u8; usize::from(transport_bytes) - 4];
    if query.protocol == Protocol::Tcp {
        // Data offset 5 words, SYN.
        rest[8] = 0x50;
        rest[9] = 0x02;
    }
    frame.extend(rest);
    Ok(frame)
}
