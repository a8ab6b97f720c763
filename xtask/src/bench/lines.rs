//! What is measured: every line of `bench packet`, as data. Knows no kernel.

use lb_common::outcome::Outcome;

use super::order::Order;

/// One line: a packet, its way, what it meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    pub scene: Scene,
    pub packet: Kind,
    /// What is known of its flow.
    pub flow: Known,
    pub order: Order,
    /// Whether `--quick` measures it.
    pub quick: bool,
}

/// A balancer with its tables. Lines that have the same share it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scene {
    pub way: Way,
    pub v6: bool,
    /// Whether backends are of the other family than their clients.
    pub crossing: bool,
    /// Each with a VIP, and a pool for TCP and UDP.
    pub services: u32,
    pub backends: u32,
    /// Whether every slot is on the move: flows are pinned.
    pub moved: bool,
    pub program: Program,
    /// Room for this many connections, where addresses are translated.
    pub connections: u32,
    /// Room for this many pins.
    pub pins: u32,
}

/// Room for pins of a million flows, 32 MB, which is more than a core's own caches hold; and 1 MB of them.
const MANY_PINS: u32 = 1 << 22;
const FEW_PINS: u32 = 1 << 17;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Ipip,
    Gue,
    L2,
    Nat,
    Fullnat,
    /// A tunnel, with backends that connection IDs name.
    Quic,
}

/// What the program is loaded with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// What the configuration needs.
    Needed,
    /// As little as one can do with.
    Smallest,
    /// Everything but tracing, needed or not.
    Fullest,
    /// Not the balancer, but the floor with one look at as many slots.
    Look,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// In the middle of a TCP connection.
    Ack,
    Syn,
    Datagram,
    /// What a backend answers: TCP, or UDP with `Fullnat`.
    Reply,
    /// A router's, about a packet of a backend.
    Error,
    Echo,
    /// IP, to no VIP.
    Stray,
    /// Neither IPv4 nor IPv6.
    NotIp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// Nobody asks.
    Unasked,
    /// It has its pin or connection.
    Old,
    /// Each packet is the first of its flow.
    New,
}

impl Way {
    const fn name(self) -> &'static str {
        match self {
            Self::Ipip => "ipip",
            Self::Gue => "gue",
            Self::L2 => "l2",
            Self::Nat => "nat",
            Self::Fullnat => "fullnat",
            Self::Quic => "quic",
        }
    }

    pub const fn translates(self) -> bool {
        matches!(self, Self::Nat | Self::Fullnat)
    }
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Ack => "TCP ACK",
            Self::Syn => "TCP SYN",
            Self::Datagram => "UDP",
            Self::Reply => "reply",
            Self::Error => "ICMP error",
            Self::Echo => "echo request",
            Self::Stray => "not a VIP",
            Self::NotIp => "not IP",
        }
    }
}

impl Scene {
    /// Slots of its tables, and room for one more service.
    pub const fn slots(&self) -> u32 {
        (self.services * 2 + 2) * 4096
    }

    /// The family of its backends.
    pub const fn backends_v6(&self) -> bool {
        self.v6 != self.crossing
    }
}

impl Line {
    pub fn name(&self) -> String {
        let Scene { way, v6, crossing, services, moved, program, .. } = self.scene;
        let family = |v6| if v6 { "IPv6" } else { "IPv4" };
        let mut name = format!("{} {}", way.name(), family(v6));
        if crossing {
            name += &format!(" to {}", family(!v6));
        }
        name += &format!(", {}", self.packet.name());
        if moved {
            name += ", moved slots";
        }
        name += match self.flow {
            Known::Unasked => "",
            Known::Old if moved => ", pinned",
            Known::New if moved => ", new pin",
            Known::Old => "",
            Known::New => ", new connection",
        };
        name += match program {
            Program::Needed => "",
            Program::Smallest => ", smallest program",
            Program::Fullest => ", fullest program",
            Program::Look => ", one look alone",
        };
        if moved && self.scene.pins == FEW_PINS {
            name += ", 1 MB of pins";
        }
        if services > 1 {
            name += ", 1,000 services";
        }
        name
    }

    /// Bytes that the head moves by: the harness has to move it back.
    pub const fn growth(&self) -> i32 {
        let Scene { way, v6, crossing, .. } = self.scene;
        let to_backend = matches!(self.packet, Kind::Ack | Kind::Syn | Kind::Datagram | Kind::Error);
        let outer = if self.scene.backends_v6() { 40 } else { 20 };
        match way {
            Way::Ipip | Way::Quic if to_backend => outer,
            Way::Gue if to_backend => outer + 8,
            // The header of one family takes the place of the other's.
            Way::Fullnat if crossing && matches!(self.packet, Kind::Reply) => {
                if v6 {
                    20
                } else {
                    -20
                }
            }
            Way::Fullnat if crossing && to_backend => {
                if v6 {
                    -20
                } else {
                    20
                }
            }
            _ => 0,
        }
    }

    /// What must become of every packet, or it is not that which is measured.
    pub const fn outcome(&self) -> Outcome {
        match self.packet {
            Kind::Datagram if matches!(self.scene.way, Way::Quic) => Outcome::ForwardQuicTransmit,
            Kind::Ack | Kind::Syn | Kind::Datagram => Outcome::ForwardTransmit,
            Kind::Reply => Outcome::ForwardReplyTransmit,
            Kind::Error => Outcome::ForwardErrorTransmit,
            Kind::Echo => Outcome::AnswerEcho,
            Kind::Stray => Outcome::PassNotVip,
            Kind::NotIp => Outcome::PassNotIp,
        }
    }
}

const FEW: Order = Order::Uniform(1000);
const MANY: Order = Order::Uniform(1_000_000);
/// From one that is always in the caches to more than fit them.
const LADDER: [Order; 5] = [Order::Uniform(1), FEW, Order::Uniform(100_000), MANY, Order::Zipf(1_000_000)];
/// All lines; those with the same scene follow each other.
pub fn lines() -> Vec<Line> {
    let plain = Scene {
        way: Way::Ipip,
        v6: false,
        crossing: false,
        services: 1,
        backends: 10,
        moved: false,
        program: Program::Needed,
        connections: 1 << 18,
        pins: 1 << 20,
    };
    let mut all = Lines::default();
    for program in [Program::Smallest, Program::Needed, Program::Fullest] {
        let scene = Scene { program, ..plain };
        all.add(scene, Kind::Ack, Known::Unasked, &LADDER[..2]).quick();
        if program == Program::Needed {
            all.add(scene, Kind::Ack, Known::Unasked, &LADDER[2..]);
            all.others(scene);
        }
    }
    all.tunnels(plain);
    all.translated(plain);
    all.moved(plain);
    all.of_services(plain);
    all.lines
}

#[derive(Default)]
struct Lines {
    lines: Vec<Line>,
    /// How many came last.
    last: usize,
}

impl Lines {
    fn add(&mut self, scene: Scene, packet: Kind, flow: Known, orders: &[Order]) -> &mut Self {
        self.lines.extend(orders.iter().map(|&order| Line { scene, packet, flow, order, quick: false }));
        self.last = orders.len();
        self
    }

    /// What came last is measured when time is short, too.
    fn quick(&mut self) {
        let first = self.lines.len() - self.last;
        self.lines[first..].iter_mut().for_each(|line| line.quick = true);
    }

    /// All but the ACK, where no flow is remembered.
    fn others(&mut self, scene: Scene) {
        for packet in [Kind::Syn, Kind::Datagram, Kind::Error] {
            self.add(scene, packet, Known::Unasked, &[FEW]);
        }
        if scene.way == Way::Ipip && !scene.crossing {
            self.add(scene, Kind::Echo, Known::Unasked, &[FEW]).quick();
            self.add(scene, Kind::Stray, Known::Unasked, &[FEW]).quick();
            self.add(scene, Kind::NotIp, Known::Unasked, &[FEW]);
        }
    }

    fn tunnels(&mut self, plain: Scene) {
        let v6 = Scene { v6: true, ..plain };
        self.add(v6, Kind::Ack, Known::Unasked, &LADDER[1..2]).quick();
        self.add(v6, Kind::Ack, Known::Unasked, &[LADDER[0], MANY, LADDER[4]]);
        self.others(v6);
        for scene in [Scene { crossing: true, ..plain }, Scene { crossing: true, ..v6 }] {
            self.add(scene, Kind::Ack, Known::Unasked, &[FEW, MANY]);
        }
        for way in [Way::Gue, Way::L2] {
            for scene in [Scene { way, ..plain }, Scene { way, ..v6 }] {
                self.add(scene, Kind::Ack, Known::Unasked, &[FEW]).quick();
                self.add(scene, Kind::Ack, Known::Unasked, &[MANY]);
                self.others(scene);
            }
        }
        for scene in [plain, v6] {
            self.add(Scene { way: Way::Quic, ..scene }, Kind::Datagram, Known::Unasked, &[FEW]).quick();
            self.add(Scene { way: Way::Quic, ..scene }, Kind::Datagram, Known::Unasked, &[MANY]);
        }
    }

    fn translated(&mut self, plain: Scene) {
        for v6 in [false, true] {
            let nat = Scene { way: Way::Nat, v6, ..plain };
            self.connections(nat, Kind::Ack, Kind::Syn);
            self.add(nat, Kind::Stray, Known::Unasked, &[FEW]);
            self.add(Scene { backends: 1, ..nat }, Kind::Reply, Known::Old, &LADDER[..3]);
            let fullnat = Scene { way: Way::Fullnat, ..nat };
            self.connections(fullnat, Kind::Ack, Kind::Syn);
            self.add(Scene { backends: 1, ..fullnat }, Kind::Reply, Known::Old, &LADDER[..1]);
        }
        for v6 in [false, true] {
            let crossing = Scene { way: Way::Fullnat, v6, crossing: true, ..plain };
            self.add(crossing, Kind::Ack, Known::Old, &[FEW]);
            self.add(crossing, Kind::Datagram, Known::Old, &[FEW]);
            self.add(crossing, Kind::Syn, Known::New, &[Order::Once(1_000_000)]);
            self.add(Scene { backends: 1, ..crossing }, Kind::Reply, Known::Old, &LADDER[..1]);
        }
        // A million connections, in tables with room for two.
        for way in [Way::Nat, Way::Fullnat] {
            let scene = Scene { way, connections: 1 << 21, ..plain };
            self.add(scene, Kind::Ack, Known::Old, &LADDER[3..]);
        }
    }

    fn connections(&mut self, scene: Scene, old: Kind, new: Kind) {
        self.add(scene, old, Known::Old, &[FEW]).quick();
        self.add(scene, old, Known::Old, &[LADDER[0], LADDER[2]]);
        self.add(scene, Kind::Datagram, Known::Old, &[FEW]);
        self.add(scene, Kind::Error, Known::Old, &[FEW]);
        self.add(scene, new, Known::New, &[Order::Once(1_000_000)]).quick();
    }

    /// Slots that move: flows have pins, or get them.
    fn moved(&mut self, plain: Scene) {
        for v6 in [false, true] {
            let scene = Scene { moved: true, pins: MANY_PINS, v6, ..plain };
            self.add(scene, Kind::Ack, Known::Old, &[FEW]).quick();
            self.add(scene, Kind::Ack, Known::Old, if v6 { &[] } else { &LADDER[2..] });
            self.add(scene, Kind::Ack, Known::New, &[Order::Once(1_000_000)]);
            self.add(scene, Kind::Syn, Known::New, &[Order::Once(1_000_000)]).quick();
            self.add(scene, Kind::Datagram, Known::Old, &[FEW]);
            self.add(scene, Kind::Datagram, Known::New, &[Order::Once(1_000_000)]);
        }
        let hot = Scene { moved: true, pins: FEW_PINS, ..plain };
        self.add(hot, Kind::Syn, Known::New, &[Order::Once(1_000_000)]).quick();
    }

    /// A thousand services with ten backends each.
    fn of_services(&mut self, plain: Scene) {
        for v6 in [false, true] {
            let scene = Scene { services: 1000, v6, ..plain };
            let orders = self.add(scene, Kind::Ack, Known::Unasked, &LADDER);
            // It takes seconds to fill so many tables.
            if !v6 {
                orders.quick();
            }
            self.add(scene, Kind::Datagram, Known::Unasked, &[FEW, LADDER[2], MANY]);
        }
        let look = Scene { services: 1000, program: Program::Look, ..plain };
        self.add(look, Kind::Ack, Known::Unasked, &LADDER).quick();
        let nat = Scene { services: 1000, way: Way::Nat, ..plain };
        self.add(nat, Kind::Ack, Known::Old, &[FEW, LADDER[2]]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_two_lines_have_the_same_name_and_flows() {
        let mut seen = HashSet::new();
        for line in lines() {
            assert!(seen.insert((line.name(), line.order.to_string())), "{}, {}", line.name(), line.order);
        }
    }

    #[test]
    fn each_scene_is_set_once() {
        let lines = lines();
        let mut scenes: Vec<Scene> = Vec::new();
        for line in &lines {
            if scenes.last() != Some(&line.scene) {
                assert!(!scenes.contains(&line.scene), "{} comes back to its scene", line.name());
                scenes.push(line.scene);
            }
        }
    }

    #[test]
    fn what_is_grown_is_the_outer_header() {
        let growth = |name: &str| {
            let line = lines().into_iter().find(|line| line.name() == name);
            line.unwrap_or_else(|| panic!("no line {name}")).growth()
        };
        assert_eq!(growth("ipip IPv4, TCP ACK"), 20);
        assert_eq!(growth("ipip IPv6, TCP ACK"), 40);
        assert_eq!(growth("ipip IPv6 to IPv4, TCP ACK"), 20);
        assert_eq!(growth("gue IPv4, UDP"), 28);
        assert_eq!(growth("gue IPv6, ICMP error"), 48);
        assert_eq!(growth("l2 IPv4, TCP ACK"), 0);
        assert_eq!(growth("ipip IPv4, echo request"), 0);
        assert_eq!(growth("fullnat IPv6 to IPv4, UDP"), -20);
        assert_eq!(growth("fullnat IPv6 to IPv4, reply"), 20);
    }
}
