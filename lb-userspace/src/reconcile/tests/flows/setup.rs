//! Who is there, and what tables should say of it: in a few slots, or as a configuration does.

use lb_common::abi::{BackendKind, Discipline};
use lb_common::wire::{PROTO_TCP, PROTO_UDP};

use super::*;
use crate::config;
use crate::reconcile::desired::OldFlows;

/// How long silence is no proof.
const GRACE: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Shape {
    /// Of a few slots.
    Small,
    /// By `desired`.
    Configured,
}

impl Shape {
    pub fn capacity(self) -> Capacity {
        let slots = if self == Shape::Small { 16 << 12 } else { 32 << 12 };
        Capacity::new(&Limits { vips: 16, backends: 512, slots, pins: 256, connections: 0 })
    }

    /// For few ids, which are looked through again and again.
    pub fn empty(self) -> Image {
        static EMPTY: [OnceLock<Image>; 2] = [OnceLock::new(), OnceLock::new()];
        let empty = || {
            let mut image = Image::empty(&self.capacity(), Meta::default());
            image.backends.truncate(128);
            image.load_weights.truncate(128);
            image.egress.truncate(4);
            image
        };
        EMPTY[self as usize].get_or_init(empty).clone()
    }
}

/// Where a flow goes: to one of four services in turn. TCP, UDP, TCP in turns, TCP to the least busy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Service(u8);

impl Service {
    pub const ALL: [Self; 4] = [Self(0), Self(1), Self(2), Self(3)];

    pub fn of(flow: u8) -> Self {
        Self(flow % 4)
    }

    pub fn is_udp(self) -> bool {
        self.0 == 1
    }

    pub fn number(self) -> usize {
        usize::from(self.0)
    }

    fn port(self) -> u16 {
        [80, 80, 81, 82][self.number()]
    }

    fn protocol(self) -> u8 {
        if self.is_udp() { PROTO_UDP } else { PROTO_TCP }
    }

    /// The key of its entry.
    pub fn key(self) -> (IpAddr, u32) {
        (VIP.into(), PortKey::new(self.port(), self.protocol()).0)
    }

    fn entry(self, table: u64) -> DesiredVip {
        let counted = (IpAddr::from(VIP).into(), Ports::Port(self.port()), self.protocol());
        DesiredVip::Service(Lead { table, flags: 0, counted })
    }
}

const VIP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);

#[derive(Debug, Clone)]
struct Member {
    weight: u8,
    drained: bool,
    moved: bool,
    down: Option<Down>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Down {
    Silent { since: Duration },
    Failed,
}

const FRESH: Member = Member { weight: 100, drained: false, moved: false, down: None };

pub struct Setup {
    shape: Shape,
    members: BTreeMap<u8, Member>,
    fallback: bool,
    /// Whether the first service goes to the other pool, whatever its own backends do.
    turned: bool,
    /// Whether pins failed lately.
    crowded: bool,
}

impl Setup {
    pub fn new(shape: Shape) -> Self {
        let members = [0, 1, 2, 6, 7].map(|backend| (backend, FRESH)).into();
        Self { shape, members, fallback: false, turned: false, crowded: false }
    }

    /// Backends that come when the table grows.
    fn more(&self) -> std::ops::Range<u8> {
        if self.shape == Shape::Small { 10..16 } else { 10..51 }
    }

    pub fn apply(&mut self, change: &Change, now: Duration) {
        let down = |member: &mut Member, down| {
            if member.down != Some(Down::Failed) {
                member.down = Some(down);
            }
        };
        let near = self.members.range(..6).count();
        let mut with = |backend: &u8, act: &dyn Fn(&mut Member)| {
            if let Some(member) = self.members.get_mut(backend) {
                act(member);
            }
        };
        match change {
            Change::Add(backend) => _ = self.members.entry(*backend).or_insert(FRESH),
            // A pool has somebody.
            Change::Remove(backend) if near > 1 => {
                self.members.remove(backend);
            }
            Change::Remove(_) => {}
            Change::Drain(backend) => with(backend, &|member| member.drained = !member.drained),
            Change::Weight(backend, weight) => with(backend, &|member| member.weight = *weight),
            Change::Fail(backend) => with(backend, &|member| down(member, Down::Failed)),
            Change::Silence(backend) => with(backend, &|member| {
                if member.down.is_none() {
                    member.down = Some(Down::Silent { since: now });
                }
            }),
            Change::Heal(backend) => with(backend, &|member| member.down = None),
            Change::MoveAway(backend) => with(backend, &|member| member.moved = !member.moved),
            Change::Fallback(used) => self.fallback = *used,
            Change::Turn(turned) => self.turned = *turned,
            Change::Grow(true) => {
                let more = self.more();
                self.members.extend(more.map(|backend| (backend, FRESH)));
            }
            Change::Grow(false) => self.members.retain(|backend, _| *backend < 10),
        }
    }

    /// Whether somebody was silent for too long, or begins to be in the way of new flows that cannot be pinned.
    pub fn pass(&mut self, now: Duration, crowded: bool) -> bool {
        let mut fails = std::mem::replace(&mut self.crowded, crowded) != crowded;
        for member in self.members.values_mut() {
            if let Some(Down::Silent { since }) = member.down
                && now >= since + GRACE
            {
                (member.down, fails) = (Some(Down::Failed), true);
            }
        }
        fails
    }

    fn member(&self, identity: u64) -> Option<&Member> {
        self.members
            .iter()
            .find(|(backend, _)| self.identity(**backend) == identity)
            .map(|(_, member)| member)
    }

    pub fn is_down(&self, identity: u64) -> bool {
        self.member(identity).is_some_and(|member| member.down.is_some())
    }

    /// Whether nobody promises anything to its flows.
    pub fn has_lost(&self, identity: u64) -> bool {
        self.member(identity).is_some_and(|member| self.old_flows(member) != OldFlows::Stay)
    }

    fn old_flows(&self, member: &Member) -> OldFlows {
        match member.down {
            _ if member.moved => OldFlows::Move,
            Some(Down::Failed) => OldFlows::Fail,
            Some(Down::Silent { .. }) if self.crowded => OldFlows::Yield,
            Some(Down::Silent { .. }) | None => OldFlows::Stay,
        }
    }

    pub fn name(&self, identity: u64) -> String {
        let known = (0u8..51).find(|backend| self.identity(*backend) == identity);
        known.map_or_else(|| format!("nobody known ({identity})"), |backend| format!("backend {backend}"))
    }

    /// Whether somebody takes new flows.
    pub fn anybody(&self, service: Service) -> bool {
        self.takers(self.fallback || self.turns(service)).next().is_some()
    }

    fn turns(&self, service: Service) -> bool {
        self.turned && service == Service::ALL[0]
    }

    fn takers(&self, level: bool) -> impl Iterator<Item = (u8, u8)> + '_ {
        let takes = move |(backend, member): &(&u8, &Member)| {
            is_fallback(**backend) == level
                && member.weight > 0
                && member.down.is_none()
                && !member.drained
                && !member.moved
        };
        self.members.iter().filter(takes).map(|(backend, member)| (*backend, member.weight))
    }

    fn identity(&self, backend: u8) -> u64 {
        match self.shape {
            Shape::Small => 1000 + u64::from(backend),
            Shape::Configured => {
                let (pool, net) = if is_fallback(backend) { ("far", 2) } else { ("web", 1) };
                backend_identity(pool, Forward::Ipip, Ipv4Addr::new(10, 0, net, backend + 1).into())
            }
        }
    }

    pub fn wanted(&self) -> Desired {
        match self.shape {
            Shape::Small => self.small(),
            Shape::Configured => {
                let (config, world) = self.configured();
                desired(&config, &world)
            }
        }
    }

    fn small(&self) -> Desired {
        let mut desired = Desired::default();
        for (backend, member) in &self.members {
            let old_flows = self.old_flows(member);
            let up = member.down.is_none() && old_flows == OldFlows::Stay;
            let row = BackendRow {
                kind: BackendKind::Ipip4 as u8,
                flags: if up { BackendRow::ACCEPTING } else { 0 },
                identity: self.identity(*backend),
                ..BackendRow::default()
            };
            let pool = [1 << u8::from(is_fallback(*backend)), 0, 0];
            let (next_hop, weight) = (None, member.weight);
            desired.backends.insert(row.identity, DesiredBackend { row, next_hop, pool, old_flows, weight });
        }
        let many = self.members.range(10..).next().is_some();
        let log2_length = if many { 6 } else { 4 };
        let hashed =
            |level| -> Targets { (0..1 << log2_length).map(|slot| self.taker(slot, level)).collect() };
        let by_hash = hashed(self.fallback);
        let takers: Vec<Target> =
            self.takers(self.fallback).map(|(backend, _)| Target::Backend(self.identity(backend))).collect();
        let turns: Targets = (0..1 << log2_length)
            .map(|slot: usize| *takers.get(slot % takers.len().max(1)).unwrap_or(&Target::Nobody))
            .collect();
        let disciplines = [Discipline::Hash, Discipline::Hash, Discipline::RoundRobin, Discipline::Least];
        for (service, discipline) in Service::ALL.into_iter().zip(disciplines) {
            let turned = self.turns(service);
            let identity = u64::from(service.0) + if turned { 101 } else { 1 };
            let all = discipline.pins_all();
            let table = DesiredTable {
                log2_length,
                cur: match (turned, all) {
                    (true, _) => hashed(true),
                    (false, true) => turns.clone(),
                    (false, false) => by_hash.clone(),
                },
                est: all.then(|| by_hash.clone()),
                discipline,
                pools: Vec::new(),
                pool_set: [if turned { 2 } else { 3 }, 0, 0],
                idle: T1,
                protocol: service.protocol(),
            };
            desired.tables.insert(identity, table.into());
            Arc::make_mut(&mut desired.vips).insert(service.key(), service.entry(identity));
        }
        desired
    }

    /// By weighted chance, so that a change moves few slots.
    fn taker(&self, slot: u64, level: bool) -> Target {
        let chance = |(backend, weight): &(u8, u8)| {
            mix(slot << 8 | u64::from(*backend) | 1 << 40) % 1000 * u64::from(*weight)
        };
        let best = self.takers(level).max_by_key(chance);
        best.map_or(Target::Nobody, |(backend, _)| Target::Backend(self.identity(backend)))
    }

    fn configured(&self) -> (Config, World) {
        let pool = |fallback: bool| -> (String, Vec<&Member>) {
            let net = if fallback { 2 } else { 1 };
            let members = || self.members.iter().filter(|(backend, _)| is_fallback(**backend) == fallback);
            let line = |(backend, member): (&u8, &Member)| {
                format!("{{address: 10.0.{net}.{}, weight: {}}}", backend + 1, member.weight)
            };
            let lines: Vec<String> = members().map(line).collect();
            (lines.join(", "), members().map(|(_, member)| member).collect())
        };
        let (near, far) = (pool(false), pool(true));
        let service = |name: &str, port, protocol: &str, scheduler: &str| {
            let pool = if name == "tcp" && self.turned { "far" } else { "web" };
            format!(
                "- {{name: {name}, vip: {VIP}, ports: {port}, protocol: {protocol}, pool: {pool}, scheduler: {scheduler}}}\n"
            )
        };
        let text = format!(
            "interfaces: [eth0]\nseed: 7\npools:\n  web: {{forward: ipip, fallback: [far], idle_timeout: {{tcp: 10s, udp: 10s}}, backends: [{}]}}\n  far: {{forward: ipip, idle_timeout: {{tcp: 10s, udp: 10s}}, backends: [{}]}}\nservices:\n{}{}{}{}",
            near.0,
            far.0,
            service("tcp", 80, "tcp", "maglev"),
            service("udp", 80, "udp", "maglev"),
            service("turns", 81, "tcp", "weighted-round-robin"),
            service("least", 82, "tcp", "least-connections"),
        );
        let config = config::parse("xlb.yaml", &text).unwrap_or_else(|problems| panic!("{problems}")).config;
        let mut world = World::default();
        world.levels.insert(0, usize::from(self.fallback));
        for (pool, members) in [near.1, far.1].into_iter().enumerate() {
            for (place, member) in members.into_iter().enumerate() {
                world.up.insert((pool, place), member.down.is_none());
                if member.drained || member.moved {
                    world.shares.insert((pool, place), 0);
                }
                if self.old_flows(member) != OldFlows::Stay {
                    world.old_flows.insert((pool, place), self.old_flows(member));
                }
            }
        }
        (config, world)
    }
}

const fn is_fallback(backend: u8) -> bool {
    matches!(backend, 6 | 7)
}
