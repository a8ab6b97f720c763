//! Connections over any sequence of changes, in a time that is told: the packet path's own rule, and the agent's own
//! plans, moves and sweeps. None changes its backend unless that failed, or somebody moved its flows away.

mod setup;

use std::sync::OnceLock;

use lb_common::flow::FlowHash;
use lb_common::pins::{PinEvent, Says};
use lb_common::wire::TcpFlags;

use self::setup::{Service, Setup, Shape};
use super::*;
use crate::reconcile::memory::Held;
use crate::reconcile::tracking::{Hands, Tracking};

/// How long a silent flow is protected.
const T1: Duration = Duration::from_secs(10);
/// The longest that a client is silent: 0.9 of T1.
const SILENCE: Duration = Duration::from_secs(9);
const LOOK: Duration = Duration::from_secs(1);
const FLOWS: u8 = 24;

#[derive(Debug, Clone)]
enum Step {
    /// A client begins a connection; if it has one, it has forgotten that.
    Open(u8),
    Send(u8),
    /// With a FIN.
    Close(u8),
    /// Seconds, in which clients are never silent for longer than `SILENCE`.
    Wait(u8),
    Change(Change),
    /// Whether pins can be made, for new flows and for old ones.
    Pins(bool, bool),
    /// SYNs of other flows, in tens.
    Flood(u8),
    /// The agent dies, and another takes over.
    Restart,
}

/// What operators and backends do. Backends are few: 0 to 5 in the pool, 6 and 7 in its fallback.
#[derive(Debug, Clone)]
enum Change {
    Add(u8),
    Remove(u8),
    /// It takes no new flows, or does again.
    Drain(u8),
    Weight(u8, u8),
    /// It refuses connections: its flows are lost.
    Fail(u8),
    /// It does not answer: its flows may live, for a while.
    Silence(u8),
    Heal(u8),
    /// Somebody wants its flows elsewhere, or no longer.
    MoveAway(u8),
    /// Whether the fallback is in use.
    Fallback(bool),
    /// Whether the first service is the other pool's.
    Turn(bool),
    /// More backends come, so that the table needs another length, or go.
    Grow(bool),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..FLOWS).prop_map(Step::Open),
        6 => (0..FLOWS).prop_map(Step::Send),
        2 => (0..FLOWS).prop_map(Step::Close),
        6 => (1u8..20).prop_map(Step::Wait),
        10 => change().prop_map(Step::Change),
        1 => (any::<bool>(), any::<bool>()).prop_map(|(new, old)| Step::Pins(new, old)),
        1 => Just(Step::Pins(true, true)),
        1 => (1u8..30).prop_map(Step::Flood),
        1 => Just(Step::Restart),
    ]
}

fn change() -> impl Strategy<Value = Change> {
    let backend = || 0u8..8;
    prop_oneof![
        3 => (0u8..6).prop_map(Change::Add),
        3 => (0u8..6).prop_map(Change::Remove),
        3 => backend().prop_map(Change::Drain),
        2 => (backend(), prop::sample::select(vec![0u8, 1, 50, 100])).prop_map(|(b, w)| Change::Weight(b, w)),
        2 => backend().prop_map(Change::Fail),
        2 => backend().prop_map(Change::Silence),
        4 => backend().prop_map(Change::Heal),
        1 => backend().prop_map(Change::MoveAway),
        1 => any::<bool>().prop_map(Change::Fallback),
        1 => any::<bool>().prop_map(Change::Turn),
        1 => any::<bool>().prop_map(Change::Grow),
    ]
}

struct Connection {
    /// The identity of the backend that it is with.
    home: u64,
    heard: Duration,
}

struct Model {
    held: Held,
    tracking: Tracking,
    setup: Setup,
    connections: Vec<Option<Connection>>,
    /// The table of each service.
    tables: [u16; 4],
    floods: u64,
}

impl Model {
    fn new(shape: Shape) -> Result<Self, String> {
        let held = Held::with_image(shape.capacity(), shape.empty());
        let tracking = Tracking::new(held.now());
        let connections = (0..FLOWS).map(|_| None).collect();
        let mut model =
            Self { held, tracking, setup: Setup::new(shape), connections, tables: [0; 4], floods: 0 };
        model.reconcile()?;
        Ok(model)
    }

    fn now(&self) -> Duration {
        Duration::from_nanos(lb_common::tables::Tables::clock(&*self.held.memory))
    }

    fn reconcile(&mut self) -> Result<(), String> {
        let wanted = self.setup.wanted();
        self.tracking.reconcile(&mut self.held, wanted).map_err(|error| error.to_string())?;
        let present = present_vips(&self.held.image);
        for service in Service::ALL {
            let Some(VipEntry::Service(target)) = present.get(&service.key()) else {
                return Err(format!("no entry of {service:?}"));
            };
            self.tables[service.number()] = target.table();
        }
        Ok(())
    }

    fn take(&mut self, step: &Step) -> Result<(), String> {
        match step {
            Step::Open(flow) => self.open(*flow),
            Step::Send(flow) => self.send(*flow, TcpFlags::ACK),
            Step::Close(flow) => {
                self.send(*flow, TcpFlags::FIN | TcpFlags::ACK)?;
                self.connections[usize::from(*flow)] = None;
                Ok(())
            }
            Step::Wait(seconds) => self.wait(Duration::from_secs(u64::from(*seconds))),
            Step::Change(change) => {
                self.setup.apply(change, self.now());
                self.lose();
                self.reconcile()
            }
            Step::Pins(new, old) => {
                self.held.memory.admit_pins(*new, *old);
                Ok(())
            }
            Step::Flood(tens) => {
                self.flood(*tens);
                Ok(())
            }
            Step::Restart => {
                self.tracking = Tracking::begin(&mut self.held).map_err(|error| error.to_string())?;
                self.reconcile()
            }
        }
    }

    /// Clients give up on backends whose flows go.
    fn lose(&mut self) {
        let setup = &self.setup;
        for connection in &mut self.connections {
            if connection.as_ref().is_some_and(|connection| setup.has_lost(connection.home)) {
                *connection = None;
            }
        }
    }

    fn wait(&mut self, time: Duration) -> Result<(), String> {
        let until = self.now() + time;
        while self.now() < until {
            for flow in 0..FLOWS {
                let heard = self.connections[usize::from(flow)].as_ref().map(|connection| connection.heard);
                if heard.is_some_and(|heard| self.now() + LOOK > heard + SILENCE) {
                    self.send(flow, TcpFlags::ACK)?;
                }
            }
            self.held.memory.pass(LOOK);
            self.look_after()?;
        }
        Ok(())
    }

    fn look_after(&mut self) -> Result<(), String> {
        let crowded = self.tracking.moves.without_room(self.held.now()).next().is_some();
        let fails = self.setup.pass(self.now(), crowded);
        self.lose();
        let changed = self.tracking.look_after(&mut self.held).map_err(|error| error.to_string())?;
        if fails || changed || self.tracking.is_paced(self.held.now()) { self.reconcile() } else { Ok(()) }
    }

    fn steer(&self, flow: u8, flags: u8) -> Result<u64, String> {
        let (service, flags) = (Service::of(flow), TcpFlags { data_offset: 5 << 4, flags });
        let table = self.tables[service.number()];
        let says = if service.is_udp() { Says::DATAGRAM } else { Says::tcp(flags) };
        let hash = FlowHash::from_bits(mix(u64::from(flow) + 1));
        let id = self.held.memory.steer(table, hash, says).map_err(|outcome| format!("{outcome:?}"))?;
        Ok(self.held.image.backends[usize::from(id)].identity)
    }

    fn open(&mut self, flow: u8) -> Result<(), String> {
        let failed = self.held.memory.count(PinEvent::FailedNew);
        let home = self.steer(flow, TcpFlags::SYN)?;
        let pinned = self.held.memory.count(PinEvent::FailedNew) == failed;
        let service = Service::of(flow);
        if !service.is_udp() && pinned && self.setup.anybody(service) {
            let wrong = home == 0 || self.setup.is_down(home);
            if wrong {
                return Err(format!("flow {flow} begins at {}", self.setup.name(home)));
            }
        }
        let lives = home != 0 && !self.setup.has_lost(home);
        self.connections[usize::from(flow)] = lives.then(|| Connection { home, heard: self.now() });
        Ok(())
    }

    fn send(&mut self, flow: u8, flags: u8) -> Result<(), String> {
        let Some(home) = self.connections[usize::from(flow)].as_ref().map(|connection| connection.home)
        else {
            return Ok(());
        };
        let identity = self.steer(flow, flags)?;
        if identity != home {
            let (is, was) = (self.setup.name(identity), self.setup.name(home));
            return Err(format!("flow {flow} of {was} is at {is}"));
        }
        self.connections[usize::from(flow)] = Some(Connection { home, heard: self.now() });
        Ok(())
    }

    fn flood(&mut self, tens: u8) {
        for table in [self.tables[0], self.tables[2]] {
            for _ in 0..u64::from(tens) * 10 {
                self.floods += 1;
                let hash = FlowHash::from_bits(mix(self.floods << 32));
                let syn = TcpFlags { data_offset: 5 << 4, flags: TcpFlags::SYN };
                // Where it goes is its own matter.
                _ = self.held.memory.steer(table, hash, Says::tcp(syn));
            }
        }
    }

    /// Once the connections are over, everything is at rest, as desired, and ids that nobody names are free.
    fn rest(&mut self) -> Result<(), String> {
        self.held.memory.admit_pins(true, true);
        self.connections.iter_mut().for_each(|connection| *connection = None);
        self.wait(Duration::from_secs(60))?;
        let image = &self.held.image;
        let wanted = self.setup.wanted();
        for (number, slot) in image.live_slots() {
            let all = TableWord::from_bits(image.tables[usize::from(number)]).discipline().pins_all();
            if !all && !slot.is_clean() {
                return Err(format!("table {number}: {slot:?} never comes to rest"));
            }
        }
        let rows: BTreeSet<u64> = image.ids().into_keys().collect();
        if !rows.iter().eq(wanted.backends.keys()) {
            return Err("rows of backends that nobody wants".to_owned());
        }
        let lies = |(index, slot): (u32, Slot)| self.held.memory.slot_at(index) != slot;
        let words =
            image.tables.iter().map(|&bits| TableWord::from_bits(bits)).filter(|word| word.bits() != 0);
        let mut places = words.flat_map(|word| {
            let first = word.first_row() * SLOTS_PER_ROW;
            (first..first + word.length()).map(|index| (index, image.slot(index)))
        });
        if places.any(lies) { Err("the image is not what lies there".to_owned()) } else { Ok(()) }
    }
}

/// A well-mixed number (SplitMix64's finaliser).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn run(shape: Shape, steps: &[Step]) -> Result<(), TestCaseError> {
    let mut model = Model::new(shape).map_err(TestCaseError::fail)?;
    for (number, step) in steps.iter().enumerate() {
        let wrong = |wrong| TestCaseError::fail(format!("step {number}, {step:?}: {wrong}"));
        model.take(step).map_err(wrong)?;
    }
    model.rest().map_err(|wrong| TestCaseError::fail(format!("at the end: {wrong}")))
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: cases(512),
        failure_persistence: None,
        max_shrink_iters: 20_000,
        ..ProptestConfig::default()
    })]

    /// Tables of 16 and 64 slots: nothing in the rule goes by their length.
    #[test]
    fn no_connection_changes_its_backend_whatever_happens_to_others(
        steps in prop::collection::vec(step(), 1..40),
    ) {
        run(Shape::Small, &steps)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: cases(6),
        failure_persistence: None,
        max_shrink_iters: 200,
        ..ProptestConfig::default()
    })]

    /// What tables say comes from a configuration and the state of its world, as in the agent.
    #[test]
    fn no_connection_changes_its_backend_in_tables_of_a_configuration(
        steps in prop::collection::vec(step(), 1..30),
    ) {
        run(Shape::Configured, &steps)?;
    }
}
