//! What becomes of a frame or of a flow, and why: the packet path itself, run on a copy of the live tables, with
//! its way written down. Knows no names of the configuration; who has them puts them in.

mod given;
mod icmp;
pub mod interfaces;
mod seen;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use lb_common::abi::{
    BACKEND_NOBODY, BACKEND_PASS, Backend, BackendKind, Discipline, Features, Path, SLOTS_PER_ROW, TableWord,
    VipTarget,
};
use lb_common::forward::{IP, forward};
use lb_common::outcome::{Action, Outcome};
use lb_common::packet::{Buffer, Packet};
use lb_common::quic::{LONGEST_SERVER_ID, ServerKey};
use lb_common::slots::Slot;
use lb_common::tables::Tables;
use lb_common::wire::{Address6, EtherType, Ethernet};
use lb_common::{classify, parse, vlan};
use serde::{Deserialize, Serialize};

pub use self::given::{FrameText, Given, GivenError};
pub use self::seen::Seen;
use crate::config::model::Protocol;
use crate::reconcile::desired::protocol_number;
use crate::reconcile::image::{Image, Traced, Trail};

/// A flow.
#[derive(Debug, Clone, Copy)]
pub struct Query {
    pub source: SocketAddr,
    pub vip: SocketAddr,
    pub protocol: Protocol,
}

/// The decision with its steps.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Explanation {
    /// The frame as it came.
    pub frame: Seen,
    pub ingress_ifindex: u32,
    pub ingress: Option<String>,
    pub outcome: String,
    pub meaning: String,
    /// What an operator does about it; empty where nothing is wrong.
    pub advice: String,
    pub action: String,
    pub service: Option<String>,
    /// Row of the service's counters.
    pub service_row: Option<u32>,
    pub table: Option<u16>,
    pub table_length: Option<u32>,
    pub slot: Option<u32>,
    /// `clean`, or how the slot is on the move.
    pub slot_state: Option<String>,
    /// Why the backend is this one: `slot`, `pin`, `connection_id`; or `scheduler`, and then it is but the one of this
    /// moment: see `picks`.
    pub chosen_by: Option<String>,
    /// Of a flow that begins, where the scheduler is no hash.
    pub picks: Option<Picks>,
    /// What a QUIC packet's connection ID says, where its service goes by that.
    pub server: Option<NamedServer>,
    pub backend_id: Option<u16>,
    pub pool: Option<String>,
    pub backend: Option<String>,
    pub backend_address: Option<IpAddr>,
    /// How the packet gets there.
    pub forward: Option<String>,
    /// Index of the interface that the way to the backend leaves by.
    pub egress_ifindex: Option<u32>,
    pub egress: Option<String>,
    pub next_hop_mac: Option<String>,
    /// The longest IP packet that the way to the backend takes, bytes.
    pub mtu: Option<u32>,
    /// The longest packet of a client that fits in there.
    pub client_mtu: Option<u32>,
    /// The frame as it leaves, if it does: to the backend, or back as an answer.
    pub sent: Option<Seen>,
}

/// What a scheduler that is no hash has for a flow that begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Picks {
    /// `in turn`, `by chance` or `by load`.
    pub how: String,
    /// Backends of which the flow may get any.
    pub backends: usize,
}

impl Picks {
    fn of(image: &Image, word: TableWord) -> Option<Self> {
        let how = match word.discipline() {
            Discipline::Hash => return None,
            Discipline::RoundRobin => "in turn",
            Discipline::Random => "by chance",
            Discipline::Least => "by load",
        };
        let first = word.first_row() * SLOTS_PER_ROW;
        let mut taking = vec![false; image.backends.len()];
        for index in first..first + word.length() {
            let id = image.slot(index).cur();
            taking[usize::from(id)] |= id != BACKEND_NOBODY && id != BACKEND_PASS;
        }
        let backends = taking.into_iter().filter(|takes| *takes).count();
        Some(Self { how: how.to_owned(), backends })
    }
}

/// Whom a connection ID names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedServer {
    pub config_id: u8,
    /// In hex.
    pub server_id: String,
    /// `taken`; `unknown`: no backend has it; `down`: its backend may not get anything.
    pub state: String,
}

impl NamedServer {
    fn of(key: &ServerKey, id: Option<u16>, outcome: Outcome) -> Self {
        let state = match (id, outcome) {
            (None, _) => "unknown",
            (_, Outcome::ForwardQuicStrayTransmit | Outcome::ForwardQuicStrayRedirect) => "down",
            _ => "taken",
        };
        Self { config_id: key.config_id(), server_id: server_id(key), state: state.to_owned() }
    }
}

/// A server ID in hex.
pub fn server_id(key: &ServerKey) -> String {
    key.bytes()[..key.length().min(LONGEST_SERVER_ID)].iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Explanation {
    /// Whether a backend takes the frame, or its sender gets an answer.
    pub fn is_taken(&self) -> bool {
        self.sent.is_some()
    }
}

/// What XDP leaves in front of a frame.
const HEADROOM: usize = 256;

/// Runs the packet path on a frame, as if it came in on an interface and were the first of its flow.
pub fn explain(image: &Image, given: &Given, ingress: u32) -> Explanation {
    // Without an agent the interface may not be known; most hosts have one.
    let ingress = if ingress == 0 { image.interfaces.keys().min().copied().unwrap_or(0) } else { ingress };
    let mut bytes = given.padded(HEADROOM);
    let frame = Seen::of_frame(&bytes[HEADROOM..]);
    let service = target(image, bytes[HEADROOM..].to_vec(), ingress);
    let tables = Traced::new(image);
    let mut packet = Buffer::new(&mut bytes, HEADROOM, ingress);
    let outcome = forward(&mut packet, &tables).outcome;
    let leaves = matches!(outcome.action(), Action::Transmit | Action::Redirect);
    let sent = leaves.then(|| Seen::of_frame(packet.frame()));
    let trail = tables.into_trail();

    let met = trail.met.filter(|id| *id != 0);
    let row = met.and_then(|id| image.backends.get(usize::from(id)));
    let path = row.map(|row| Path::from_bits(row.path)).filter(|path| path.egress() != 0);
    let egress = path.and_then(|path| image.egress.get(usize::from(path.egress())));
    let egress = egress.filter(|egress| egress.ifindex != 0);
    Explanation {
        frame,
        ingress_ifindex: ingress,
        ingress: None,
        outcome: outcome.counter().to_owned(),
        meaning: outcome.meaning().to_owned(),
        advice: outcome.advice().to_owned(),
        action: outcome.action().name().to_owned(),
        service: None,
        service_row: service.map(VipTarget::vip),
        table: trail.table.map(|(table, _)| table),
        table_length: trail.table.map(|(_, word)| word.length()),
        slot: trail.slot.map(|(slot, _)| slot),
        slot_state: trail.table.zip(trail.slot).map(|((_, word), (_, slot))| slot_state(word, slot)),
        chosen_by: met.map(|_| chosen_by(&trail).to_owned()),
        picks: trail
            .table
            .filter(|_| trail.picked && met.is_some())
            .and_then(|(_, word)| Picks::of(image, word)),
        server: trail.server.map(|(key, id)| NamedServer::of(&key, id, outcome)),
        backend_id: met,
        pool: None,
        backend: None,
        backend_address: row.and_then(address),
        forward: row.and_then(forward_name),
        egress_ifindex: egress.map(|egress| egress.ifindex),
        egress: None,
        next_hop_mac: path.map(|path| path.mac().to_string()),
        mtu: egress.map(|egress| egress.mtu),
        client_mtu: egress.zip(row).map(|(egress, row)| egress.mtu.saturating_sub(u32::from(row.overhead))),
        sent,
    }
}

/// The service of a frame, also of one that reaches no backend: the packet path's classification, once more.
fn target(image: &Image, mut frame: Vec<u8>, ingress: u32) -> Option<VipTarget> {
    let tables = Traced::new(image);
    let mut packet = Buffer::new(&mut frame, 0, ingress);
    let features = tables.features();
    let index = tables.vip_index()?;
    if features.has(Features::VLAN) {
        vlan::pop(&mut packet);
    }
    let ethertype = packet.header::<Ethernet>(0)?.ethertype;
    if ethertype == EtherType::IPV4 && features.has(Features::IPV4) {
        let ip = parse::ipv4(&packet, IP).ok()?;
        return Some(classify::v4(&packet, &tables, index, &ip).ok()?.target);
    }
    if ethertype == EtherType::IPV6 && features.has(Features::IPV6) {
        let ip = parse::ipv6(&packet, IP).ok()?;
        return Some(classify::v6(&mut packet, &tables, index, &ip).ok()?.target);
    }
    None
}

fn chosen_by(trail: &Trail) -> &'static str {
    match trail {
        // A connection ID that is followed is asked for no slot.
        Trail { slot: None, .. } => "connection_id",
        Trail { pinned: true, .. } => "pin",
        Trail { picked: true, .. } => "scheduler",
        _ => "slot",
    }
}

fn slot_state(word: TableWord, slot: Slot) -> String {
    if slot.is_clean() {
        return "clean".to_owned();
    }
    if word.discipline().pins_all() {
        return format!("a pin for each flow, est {} without", slot.est());
    }
    format!("moving: cur {} est {} D={} P={}", slot.cur(), slot.est(), slot.dirty(), slot.pins())
}

fn forward_name(row: &Backend) -> Option<String> {
    let port = row.port.get();
    let to_port = |name: &str| if port == 0 { name.to_owned() } else { format!("{name} to port {port}") };
    Some(match BackendKind::from_raw(row.kind)? {
        BackendKind::Nobody => "nobody".to_owned(),
        BackendKind::Pass => "pass".to_owned(),
        BackendKind::Ipip4 => "ipip over IPv4".to_owned(),
        BackendKind::Ipip6 => "ipip over IPv6".to_owned(),
        BackendKind::L2 => "l2".to_owned(),
        BackendKind::Gue4 => format!("gue over IPv4 to port {port}"),
        BackendKind::Gue6 => format!("gue over IPv6 to port {port}"),
        BackendKind::Nat4 | BackendKind::Nat6 => to_port("nat"),
        BackendKind::Fullnat4 | BackendKind::Fullnat6 => to_port("fullnat"),
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
        BackendKind::Ipip4 | BackendKind::Gue4 | BackendKind::Nat4 | BackendKind::Fullnat4 => Some(v4()),
        BackendKind::Ipip6 | BackendKind::Gue6 | BackendKind::Nat6 | BackendKind::Fullnat6 => Some(v6()),
        BackendKind::L2 if row.address[1] == 0 && row.address[0] >> 32 == 0 => Some(v4()),
        BackendKind::L2 => Some(v6()),
    }
}

/// The shortest frame of a flow: a SYN, or an empty datagram.
pub fn first_frame(query: &Query) -> Result<Given, String> {
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
    let length = frame.len();
    Given::new(frame, length).map_err(|error| error.to_string())
}
