//! Packets of translated connections that go step by step, as in `interleavings::machine`: the packet path's own code, from
//! the look-up of a connection to the translated frame, is told again what it read, does one thing more, and is cut off.

use std::cell::{Cell, RefCell};
use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;

use lb_common::abi::{
    BACKEND_CLAIMED, Backend as Row, BackendKind, Discipline, Egress as Way, Features, Interface, Load,
    PINS_PER_BUCKET, Path, Pin, PinBucket, PinState, PortRule, Record, Source, TableWord, Vip4Bucket,
    Vip6Bucket, VipIndex, VipTarget,
};
use lb_common::allowance::Limited;
use lb_common::connections::{Haunts, Rooms};
use lb_common::encap::InnerFamily;
use lb_common::flow::{self, FlowHash};
use lb_common::nat::Layout;
use lb_common::outcome::Action;
use lb_common::packet::Buffer;
use lb_common::pins::PinEvent;
use lb_common::quic::ServerKey;
use lb_common::tables::Tables;
use lb_common::translate::{self, Passed, Shape};
use lb_common::wire::{Address6, Be16, Mac, Ports, TcpFlags};

use super::*;

/// The age of a pin that is used now.
pub const NOW: u16 = 512;

const BUCKETS: u32 = 2;
const PLACES: usize = BUCKETS as usize * PINS_PER_BUCKET;
/// Places that are not taken by somebody who never says a word: two in the first bucket of both clients, one in the
/// second.
pub const LIVE: [u32; 3] = [0, 1, 8];
const STRANGER: u32 = 0xffff_fff0;

const VIP: [u8; 4] = [203, 0, 113, 10];
const SOURCE: [u8; 4] = [10, 0, 5, 5];
const FIRST_PORT: u16 = 60_000;
const VIP_PORT: u16 = 80;
const SERVER_PORT: u16 = 8080;
const BACK_ROW: u16 = 5;
const HERE: u32 = 1;
const IP: usize = 14;
const TCP: usize = IP + 20;

/// A client: each has its address and its router, and both talk from the same port.
pub const X: usize = 0;
pub const Y: usize = 1;

const CLIENT_PORT: u16 = 40_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    Syn,
    Data,
    /// Data that come through another router than before.
    Moved,
    /// From the backend and to the port where the client was when all began.
    Reply,
}

#[derive(Debug, Clone, Copy)]
pub struct Packet {
    pub client: usize,
    pub kind: Kind,
}

/// What the agent does, one after the other.
#[derive(Debug, Clone, Copy)]
pub enum Act {
    /// Reads a place; takes out what it read, if it is there still, or whatever is there.
    Look(u32),
    TakeOut {
        place: u32,
        compare: bool,
    },
    /// Reads a place that is claimed; all others are nothing to it.
    LookForClaim(u32),
    /// All of a source, whoever it is; or not what is claimed only.
    Drop {
        claims: bool,
    },
    /// All connections of a backend.
    DropBackend(u16),
    /// The slot of all flows leads there.
    Slot(u16),
    Grace,
    /// No connection is of this backend any more.
    Nobody(u16),
}

/// A guard of the packet path that is left out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Mutant {
    None,
    /// Who has claimed a place does not look for another of its connection.
    NobodyElseIsSeen,
    /// Nor for a claim that comes later in the buckets' order.
    LaterClaimsAreNotSeen,
    /// A claim is made whatever is there.
    ClaimsAreStored,
    /// What was found is not looked at again when the packet is sent.
    RecordsAreNotAsked,
    /// Whose the record was that a reply goes by, is not asked.
    PlacesAreReadOnce,
    /// The way back is written whatever is there.
    WaysAreStored,
}

#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Shared {
    pub words: [u64; PLACES],
    pub records: [[u64; 8]; PLACES],
    slot: u16,
}

#[derive(Clone)]
pub struct Scenario {
    pub shared: Shared,
    pub acts: Vec<Act>,
    packets: [Vec<Packet>; 2],
    pub mutant: Mutant,
    /// Where the client's connection is when all begins: its replies come from there.
    answers: [Option<Home>; 2],
    /// Whether the source is translated, too.
    pub full: bool,
}

/// Backend and place.
pub type Home = (u16, u32);

impl Scenario {
    /// All places that are not live are taken.
    pub fn new(full: bool, acts: Vec<Act>, packets: Vec<(usize, Packet)>) -> Self {
        let mut words = [0; PLACES];
        for (place, word) in words.iter_mut().enumerate() {
            if !LIVE.contains(&(place as u32)) {
                *word = Pin::new(STRANGER, A, PinState::Established, NOW).bits();
            }
        }
        let of = |cpu| packets.iter().filter(|(on, _)| *on == cpu).map(|(_, packet)| *packet).collect();
        Self {
            shared: Shared { words, records: [[0; 8]; PLACES], slot: A },
            acts,
            packets: [of(0), of(1)],
            mutant: Mutant::None,
            answers: [None; 2],
            full,
        }
    }

    /// The client's connection is there.
    pub fn with_connection(mut self, client: usize, (backend, place): Home, age: u16) -> Self {
        let pin = Pin::new(haunts(client).tag, backend, PinState::Established, age);
        self.shared.words[place as usize] = pin.bits();
        self.shared.records[place as usize] = record(client, place);
        self.answers[client] = Some((backend, place));
        self
    }

    /// The slot of all flows leads there.
    pub fn shared_slot(mut self, id: u16) -> Self {
        self.shared.slot = id;
        self
    }

    pub fn fill(mut self, place: u32) -> Self {
        self.shared.words[place as usize] = Pin::new(STRANGER, A, PinState::Established, NOW).bits();
        self
    }
}

fn mapped(address: [u8; 4]) -> Address6 {
    Address6::mapped(u32::from_ne_bytes(address))
}

/// The clients have the same two buckets, in the same order.
fn client(client: usize) -> [u8; 4] {
    static CLIENTS: OnceLock<[[u8; 4]; 2]> = OnceLock::new();
    let found = CLIENTS.get_or_init(|| {
        let all = (1..=254).map(|last| [192, 0, 2, last]);
        let same = all.filter(|address| {
            let haunts = haunts_of(*address);
            (haunts.first, haunts.second) == (0, 1)
        });
        let mut same = same.take(2);
        [0, 1].map(|_| same.next().expect("one in four"))
    });
    found[client]
}

const KEYS: [u64; lb_common::abi::HASH_KEYS] = flow::keys(7);

fn haunts_of(address: [u8; 4]) -> Haunts {
    let tables = Quiet;
    Haunts::new(&tables, mapped(address), u32::from(CLIENT_PORT.to_be()), wire::PROTO_TCP)
}

fn haunts(of: usize) -> Haunts {
    haunts_of(client(of))
}

/// What does not change.
macro_rules! constant_tables {
    () => {
        fn features(&self) -> Features {
            Features::default()
        }
        fn hash_key(&self, index: usize) -> u64 {
            KEYS[index]
        }
        fn vip_index(&self) -> Option<&VipIndex> {
            None
        }
        fn vip4_bucket(&self, _: u32) -> Option<&Vip4Bucket> {
            None
        }
        fn vip6_bucket(&self, _: u32) -> Option<&Vip6Bucket> {
            None
        }
        fn port_rule(&self, _: u32) -> Option<&PortRule> {
            None
        }
        fn table_word(&self, _: u16) -> Option<TableWord> {
            Some(TableWord::new(1, 0, Discipline::Hash))
        }
        fn egress(&self, row: u16) -> Option<&Way> {
            [1, BACK_ROW].contains(&row).then_some(&WAY)
        }
        fn interface(&self, _: u32) -> Option<&Interface> {
            Some(&INTERFACE)
        }
        fn source(&self, _: u32) -> Option<&Source> {
            Some(&SOURCES)
        }
        fn rooms(&self) -> Rooms {
            rooms()
        }
        fn server(&self, _: &ServerKey) -> Option<u16> {
            None
        }
        fn pin_bucket(&self, _: u32) -> Option<&PinBucket> {
            None
        }
        fn clock(&self) -> u64 {
            u64::from(NOW) << 31
        }
        fn add_failed(&self, _: u16) {}
        fn closing(&self, _: u16) -> u64 {
            0
        }
        fn next_turn(&self, _: u16) -> u32 {
            0
        }
        fn random(&self) -> u32 {
            0
        }
        fn load(&self, _: u16) -> Option<&Load> {
            None
        }
        fn admit(&self, _: Limited) -> bool {
            true
        }
        fn count_outcome(&self, _: Outcome) {}
        fn count_vip(&self, _: u32, _: u64) {}
        fn count_backend(&self, _: u16, _: u64) {}
        fn count_pin(&self, _: PinEvent) {}
    };
}

/// Tables of which nothing is asked but where a connection may be.
struct Quiet;

fn mac(client: usize, moved: bool) -> [u8; 6] {
    [2, 0xc1, 0, 0, u8::from(moved), client as u8]
}

fn ports() -> u32 {
    Ports::new(CLIENT_PORT, VIP_PORT).both
}

fn record(of: usize, place: u32) -> [u64; 8] {
    let (from, vip) = (mapped(client(of)), mapped(VIP));
    let key = u64::from(ports()) | u64::from(wire::PROTO_TCP) << 32;
    let back = Path::new(Mac::from_bytes(mac(of, false)), BACK_ROW).bits();
    let row = u64::from(rooms().source(place).bits()) << 32;
    [from.high, from.low, vip.high, vip.low, key, back, 1, row]
}

fn rooms() -> Rooms {
    Rooms::new(u64::from(BUCKETS), u64::from(FIRST_PORT) | (PLACES as u64) << 16)
}

const fn address_of(backend: u16) -> [u8; 4] {
    [10, 0, 1, backend as u8]
}

const ROWS: [[Row; 4]; 2] = {
    const fn row(kind: BackendKind, id: u16) -> Row {
        Row {
            path: Path::new(Mac::from_bytes([2, 4, 0, 0, 0, id as u8]), 1).bits(),
            kind: kind as u8,
            flags: Row::ACCEPTING,
            outer_sum: 0,
            port: Be16::new(SERVER_PORT),
            overhead: 0,
            address: [u32::from_ne_bytes(address_of(id)) as u64, 0],
            identity: 0,
            spare: [0; 3],
        }
    }
    const NOBODY: Row = Row { kind: 0, port: Be16::new(0), path: 0, flags: 0, ..row(BackendKind::Nat4, 0) };
    const fn rows(kind: BackendKind) -> [Row; 4] {
        [NOBODY, row(kind, 1), row(kind, 2), row(kind, 3)]
    }
    [rows(BackendKind::Nat4), rows(BackendKind::Fullnat4)]
};

const WAY: Way = Way {
    ifindex: HERE,
    mtu: 1500,
    source_mac: 0,
    source4: 0,
    source4_mask: 0,
    source6: [0; 2],
    source6_mask: 0,
    spare: [0; 2],
};

const INTERFACE: Interface = Interface { mac: 0, mtu: 1500, flags: (BACK_ROW as u32) << 16 };
const SOURCES: Source = Source { v6: [0; 2], v4: u32::from_ne_bytes(SOURCE), spare: 0 };

/// A frame; checksums are nobody's business here.
fn frame(scenario: &Scenario, packet: Packet) -> Vec<u8> {
    let mut frame = vec![0; TCP + 20];
    let (from, to, ports, flags) = match (packet.kind, scenario.answers[packet.client]) {
        (Kind::Reply, home) => {
            let (backend, place) = home.expect("a connection that is there when all begins");
            let (to, port) = if scenario.full {
                (SOURCE, FIRST_PORT + place as u16)
            } else {
                (client(packet.client), CLIENT_PORT)
            };
            (address_of(backend), to, (SERVER_PORT, port), TcpFlags::ACK)
        }
        (Kind::Syn, _) => (client(packet.client), VIP, (CLIENT_PORT, VIP_PORT), TcpFlags::SYN),
        (Kind::Data | Kind::Moved, _) => (client(packet.client), VIP, (CLIENT_PORT, VIP_PORT), TcpFlags::ACK),
    };
    frame[6..12].copy_from_slice(&mac(packet.client, packet.kind == Kind::Moved));
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[IP] = 0x45;
    frame[IP + 3] = 40;
    frame[IP + 8..IP + 10].copy_from_slice(&[64, wire::PROTO_TCP]);
    frame[IP + 12..IP + 16].copy_from_slice(&from);
    frame[IP + 16..IP + 20].copy_from_slice(&to);
    frame[TCP..TCP + 2].copy_from_slice(&ports.0.to_be_bytes());
    frame[TCP + 2..TCP + 4].copy_from_slice(&ports.1.to_be_bytes());
    frame[TCP + 12] = 5 << 4;
    frame[TCP + 13] = flags;
    frame
}

/// Where a packet came, or that it came nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Arrived {
    AtBackend(Home),
    AtClient { address: [u8; 4], router: [u8; 6] },
    Nowhere,
}

fn read4(frame: &[u8], at: usize) -> [u8; 4] {
    std::array::from_fn(|byte| frame[at + byte])
}

fn arrived(scenario: &Scenario, packet: Packet, passed: Passed, frame: &[u8]) -> Arrived {
    let sent =
        passed.outcome().is_some_and(|outcome| outcome.action() != Action::Drop && passed.backend() != 0);
    if !sent {
        return Arrived::Nowhere;
    }
    let (from, to) = (read4(frame, IP + 12), read4(frame, IP + 16));
    if packet.kind == Kind::Reply {
        return Arrived::AtClient { address: to, router: std::array::from_fn(|byte| frame[byte]) };
    }
    let port = u16::from_be_bytes([frame[TCP], frame[TCP + 1]]);
    let place = if scenario.full { u32::from(port.wrapping_sub(FIRST_PORT)) } else { 0 };
    let ours = if scenario.full { SOURCE } else { client(packet.client) };
    assert_eq!(from, ours, "from whom");
    Arrived::AtBackend((u16::from(to[3]), place))
}

#[derive(Clone, PartialEq, Eq, Hash, Default)]
struct Cpu {
    packet: usize,
    log: Vec<u64>,
    /// Where it goes, once that is decided: it is not there yet.
    to: Option<Arrived>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Machine {
    shared: Shared,
    cpus: [Cpu; 2],
    act: usize,
    waits: Option<[Option<usize>; 2]>,
    seen: u64,
    /// Where the client was before its connection was taken out: packets under way may still come there.
    before: [Vec<Home>; 2],
    /// The backend that no connection is of.
    gone: u16,
}

/// What was seen on all ways.
#[derive(Default)]
pub struct Seen {
    pub states: usize,
    /// Packets of both sides that arrived, on any way.
    pub arrived: usize,
    /// The first way on which something went wrong.
    pub broken: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Actor {
    Cpu(usize),
    Agent,
}

pub fn explore(scenario: &Scenario) -> Seen {
    let first = Machine {
        shared: scenario.shared.clone(),
        cpus: Default::default(),
        act: 0,
        waits: None,
        seen: 0,
        before: Default::default(),
        gone: 0,
    };
    let mut seen = Seen::default();
    let mut known = HashSet::from([first.clone()]);
    let mut open = vec![(first, Vec::new())];
    while let Some((machine, way)) = open.pop() {
        seen.states += 1;
        for actor in [Actor::Cpu(0), Actor::Cpu(1), Actor::Agent] {
            let mut next = machine.clone();
            let stepped = next.step(scenario, actor, &mut seen.arrived);
            let Some(stepped) = stepped.transpose() else { continue };
            let mut way = way.clone();
            way.push(actor);
            if let Err(broken) = stepped.and_then(|()| next.sound(scenario)) {
                seen.broken = Some(told(scenario, &way, &broken));
                return seen;
            }
            if known.insert(next.clone()) {
                open.push((next, way));
            }
        }
    }
    seen
}

/// A way as runs of steps.
fn told(scenario: &Scenario, way: &[Actor], broken: &str) -> String {
    let mut text = String::new();
    let mut acts = scenario.acts.iter();
    for run in way.chunk_by(|one, other| one == other && *one != Actor::Agent) {
        match run[0] {
            Actor::Cpu(cpu) => text += &format!("CPU {cpu}: {} steps; ", run.len()),
            Actor::Agent => text += &format!("{:?}; ", acts.next()),
        }
    }
    text + broken
}

fn is_claimed(pin: Pin) -> bool {
    pin.backend() == BACKEND_CLAIMED
}

/// Whose connection a pin is of; nobody's where it is a stranger's or free.
fn owner(pin: Pin) -> Option<usize> {
    [X, Y].into_iter().find(|client| !pin.is_free() && haunts(*client).tag == pin.tag())
}

impl Machine {
    /// Lets somebody do one thing: nothing where there is nothing to do, an error where that is wrong.
    fn step(&mut self, scenario: &Scenario, actor: Actor, count: &mut usize) -> Result<Option<()>, String> {
        let Actor::Cpu(cpu) = actor else { return self.act(scenario) };
        let Some(&packet) = scenario.packets[cpu].get(self.cpus[cpu].packet) else { return Ok(None) };
        if let Some(arrived) = self.cpus[cpu].to {
            self.cpus[cpu] = Cpu { packet: self.cpus[cpu].packet + 1, ..Cpu::default() };
            *count += usize::from(arrived != Arrived::Nowhere);
            self.arrive(scenario, packet, arrived)?;
            return Ok(Some(()));
        }
        self.cpus[cpu].to = advance(&mut self.shared, &mut self.cpus[cpu].log, packet, scenario);
        Ok(Some(()))
    }

    fn arrive(&mut self, scenario: &Scenario, packet: Packet, arrived: Arrived) -> Result<(), String> {
        let Packet { client: own, kind } = packet;
        match arrived {
            Arrived::Nowhere => Ok(()),
            Arrived::AtClient { address, router } => {
                let routers = [mac(own, false), mac(own, true)];
                if address == client(own) && routers.contains(&router) {
                    return Ok(());
                }
                Err(format!("a reply to {own} came to {address:?} through {router:x?}"))
            }
            Arrived::AtBackend(home) => {
                let now = self.home(scenario, own);
                if now == Some(home) || self.before[own].contains(&home) {
                    return Ok(());
                }
                Err(format!("{kind:?} of {own} at {now:?} came to {home:?}"))
            }
        }
    }

    /// Where the client's connection is.
    fn home(&self, scenario: &Scenario, client: usize) -> Option<Home> {
        let pins = LIVE.map(|place| (Pin::from_bits(self.shared.words[place as usize]), place));
        let own = pins.into_iter().find(|(pin, _)| owner(*pin) == Some(client) && !is_claimed(*pin));
        own.map(|(pin, place)| (pin.backend(), if scenario.full { place } else { 0 }))
    }

    /// What holds whenever nobody is in the middle of a step.
    fn sound(&self, scenario: &Scenario) -> Result<(), String> {
        let mut places = [0; 2];
        for place in LIVE {
            let pin = Pin::from_bits(self.shared.words[place as usize]);
            let Some(owner) = owner(pin).filter(|_| !is_claimed(pin)) else { continue };
            places[owner] += 1;
            if pin.backend() == self.gone {
                return Err(format!("place {place} is still of {}", self.gone));
            }
            let found = self.shared.records[place as usize];
            let expected = record(owner, place);
            let back = Path::from_bits(found[Record::BACK]).mac().bytes();
            let ports = |record: &[u64; 8]| record[Record::PORTS] as u32;
            if found[..4] != expected[..4]
                || ports(&found) != ports(&expected)
                || found[Record::ROW] != expected[Record::ROW]
                || ![mac(owner, false), mac(owner, true)].contains(&back)
            {
                return Err(format!("place {place} of {owner} has the record {found:x?}"));
            }
        }
        if places.iter().any(|count| *count > 1) {
            return Err(format!("connections have {places:?} places; full: {}", scenario.full));
        }
        Ok(())
    }

    fn act(&mut self, scenario: &Scenario) -> Result<Option<()>, String> {
        let Some(&act) = scenario.acts.get(self.act) else { return Ok(None) };
        match act {
            Act::Grace => return Ok(self.grace()),
            Act::Look(place) => self.seen = self.shared.words[place as usize],
            Act::LookForClaim(place) => {
                let pin = Pin::from_bits(self.shared.words[place as usize]);
                self.seen = if is_claimed(pin) { pin.bits() } else { 0 };
            }
            Act::TakeOut { place, compare } => {
                let (seen, now) = (Pin::from_bits(self.seen), self.shared.words[place as usize]);
                let due = is_claimed(seen) || !seen.is_free() && seen.idle(NOW) > 300;
                if due && (!compare || now == seen.bits()) {
                    let now = Pin::from_bits(now);
                    if owner(now).is_some() && !is_claimed(now) && now.idle(NOW) <= 300 {
                        return Err(format!("a connection at {place} ends that has just spoken"));
                    }
                    self.end(scenario, place);
                }
            }
            Act::Drop { claims } => {
                for place in LIVE {
                    let pin = Pin::from_bits(self.shared.words[place as usize]);
                    if claims || !is_claimed(pin) {
                        self.end(scenario, place);
                    }
                }
            }
            Act::DropBackend(id) => {
                for place in LIVE {
                    if Pin::from_bits(self.shared.words[place as usize]).backend() == id {
                        self.end(scenario, place);
                    }
                }
            }
            Act::Slot(id) => self.shared.slot = id,
            Act::Nobody(id) => self.gone = id,
        }
        self.act += 1;
        Ok(Some(()))
    }

    /// A place is taken back.
    fn end(&mut self, scenario: &Scenario, place: u32) {
        let pin = Pin::from_bits(std::mem::take(&mut self.shared.words[place as usize]));
        if let Some(owner) = owner(pin).filter(|_| !is_claimed(pin)) {
            self.before[owner].push((pin.backend(), if scenario.full { place } else { 0 }));
        }
    }

    /// Over once all packets are that were under way when it began.
    fn grace(&mut self) -> Option<()> {
        let under_way = |cpu: &Cpu| (!cpu.log.is_empty()).then_some(cpu.packet);
        let Some(waits) = self.waits else {
            self.waits = Some([under_way(&self.cpus[0]), under_way(&self.cpus[1])]);
            return Some(());
        };
        if (0..2).any(|cpu| waits[cpu] == Some(self.cpus[cpu].packet)) {
            return None;
        }
        self.waits = None;
        self.act += 1;
        Some(())
    }
}

/// One step of a packet: where it came, if that was the last.
fn advance(shared: &mut Shared, log: &mut Vec<u64>, packet: Packet, scenario: &Scenario) -> Option<Arrived> {
    let mut bytes = frame(scenario, packet);
    let mut buffer = Buffer::new(&mut bytes, 0, HERE);
    let tables = Stepped {
        shared: RefCell::new(shared),
        log: RefCell::new(log),
        scenario,
        client: packet.client,
        kind: packet.kind,
        buckets: Default::default(),
        records: Default::default(),
        read: Cell::new(0),
        done: Cell::new(false),
        cut: Cell::new(false),
        phase: Cell::new(Phase::Finding),
        first: Cell::new(None),
    };
    let shape = Shape::new(Layout { family: InnerFamily::V4, offset: TCP, protocol: wire::PROTO_TCP });
    let passed = match packet.kind {
        Kind::Reply => translate::reply(&mut buffer, &tables, u32::from(scenario.full), shape),
        Kind::Syn | Kind::Data | Kind::Moved => {
            let target = VipTarget::service(0, VipTarget::TRANSLATED, 0);
            translate::forward(&mut buffer, &tables, target, FlowHash::from_bits(0), shape)
        }
    };
    (!tables.cut.get()).then(|| arrived(scenario, packet, passed, buffer.frame()))
}

/// What a packet is about.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Phase {
    Finding,
    /// It has claimed this place and looks for others of its connection.
    Claimed(usize),
    Filling,
    Sending,
}

/// The tables as a packet meets them that has done so much, and may do one thing more.
struct Stepped<'s> {
    shared: RefCell<&'s mut Shared>,
    log: RefCell<&'s mut Vec<u64>>,
    scenario: &'s Scenario,
    client: usize,
    kind: Kind,
    /// Places; what lies in them is in `shared`.
    buckets: [PinBucket; BUCKETS as usize],
    records: [Record; PLACES],
    read: Cell<usize>,
    done: Cell<bool>,
    /// Whether it wanted to do more: then it has come nowhere yet.
    cut: Cell<bool>,
    phase: Cell<Phase>,
    /// The first word that a reply saw of its connection.
    first: Cell<Option<u64>>,
}

/// A word, by the place that it belongs to.
#[derive(Clone, Copy)]
enum At {
    Pin(usize),
    Record(usize, usize),
}

impl Stepped<'_> {
    fn at(&self, word: &AtomicU64) -> At {
        let is = |other: &AtomicU64| std::ptr::eq(other, word);
        let words = |(number, bucket): (usize, &PinBucket)| {
            Some(number * PINS_PER_BUCKET + bucket.0.iter().position(is)?)
        };
        if let Some(place) = self.buckets.iter().enumerate().find_map(words) {
            return At::Pin(place);
        }
        let within =
            |(place, record): (usize, &Record)| Some(At::Record(place, record.0.iter().position(is)?));
        self.records.iter().enumerate().find_map(within).expect("a word of the tables")
    }

    fn step(&self, act: impl FnOnce(&mut Shared) -> u64) -> u64 {
        let mut log = self.log.borrow_mut();
        if let Some(&word) = log.get(self.read.get()) {
            self.read.set(self.read.get() + 1);
            return word;
        }
        if self.done.replace(true) {
            self.cut.set(true);
            return 0;
        }
        let word = act(&mut self.shared.borrow_mut());
        log.push(word);
        self.read.set(log.len());
        word
    }

    /// What a mutant sees of a pin.
    fn seen(&self, place: usize, bits: u64) -> u64 {
        let Phase::Claimed(own) = self.phase.get() else { return bits };
        let blind = match self.scenario.mutant {
            Mutant::NobodyElseIsSeen => place != own,
            Mutant::LaterClaimsAreNotSeen => place > own && is_claimed(Pin::from_bits(bits)),
            _ => false,
        };
        if blind { 0 } else { bits }
    }

    fn pin(&self, place: usize) -> u64 {
        if !LIVE.contains(&(place as u32)) {
            return self.shared.borrow().words[place];
        }
        if self.scenario.mutant == Mutant::PlacesAreReadOnce
            && self.kind == Kind::Reply
            && let Some(first) = self.first.get()
        {
            return first;
        }
        let bits = self.step(|shared| shared.words[place]);
        if !Pin::from_bits(bits).is_free() {
            self.first.set(Some(bits));
        }
        self.seen(place, bits)
    }
}

impl Tables for Stepped<'_> {
    fn send_translated<P: lb_common::packet::Packet>(
        &self,
        packet: &mut P,
        target: VipTarget,
        position: u32,
        shape: Shape,
    ) -> Passed {
        self.phase.set(Phase::Sending);
        translate::send(packet, self, target, position, shape)
    }
    fn word(&self, word: &AtomicU64) -> u64 {
        match self.at(word) {
            At::Pin(place) => self.pin(place),
            At::Record(place, word) => {
                let sending = self.phase.get() == Phase::Sending;
                if sending && self.scenario.mutant == Mutant::RecordsAreNotAsked && word <= Record::PORTS {
                    return record(self.client, place as u32)[word];
                }
                self.step(|shared| shared.records[place][word])
            }
        }
    }
    fn store(&self, word: &AtomicU64, bits: u64) {
        let At::Record(place, word) = self.at(word) else { panic!("a pin is exchanged") };
        self.phase.set(Phase::Filling);
        self.step(|shared| {
            shared.records[place][word] = bits;
            0
        });
    }
    fn exchange(&self, word: &AtomicU64, old: u64, new: u64) -> bool {
        let at = self.at(word);
        let stored = match (at, self.scenario.mutant) {
            (At::Pin(_), Mutant::ClaimsAreStored) => old == 0,
            (At::Record(_, word), Mutant::WaysAreStored) => word == Record::BACK,
            _ => false,
        };
        let exchanged = self.step(|shared| {
            let bits = match at {
                At::Pin(place) => &mut shared.words[place],
                At::Record(place, word) => &mut shared.records[place][word],
            };
            let is_old = *bits == old || stored;
            if is_old {
                *bits = new;
            }
            u64::from(is_old)
        });
        if let At::Pin(place) = at
            && exchanged != 0
            && old == 0
        {
            self.phase.set(Phase::Claimed(place));
        }
        exchanged != 0
    }
    fn slot(&self, _: u32, _: u32) -> Option<Slot> {
        Some(Slot::clean(self.step(|shared| u64::from(shared.slot)) as u16))
    }
    fn backend(&self, id: u16) -> Option<&Row> {
        ROWS[usize::from(self.scenario.full)].get(usize::from(id))
    }
    fn connection_bucket(&self, index: u32) -> Option<&PinBucket> {
        self.buckets.get(index as usize)
    }
    fn record(&self, position: u32) -> Option<&Record> {
        self.records.get(position as usize)
    }
    constant_tables!();
}

impl Tables for Quiet {
    fn slot(&self, _: u32, _: u32) -> Option<Slot> {
        None
    }
    fn backend(&self, _: u16) -> Option<&Row> {
        None
    }
    constant_tables!();
}
