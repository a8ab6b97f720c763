//! Tables that come due at once, as after a restart: what one look does for all of them, and what it leaves for the next.

use lb_common::abi::{BackendKind, Discipline};
use lb_common::tables::Tables;
use lb_common::wire::PROTO_TCP;

use super::*;
use crate::reconcile::memory::Held;
use crate::reconcile::tracking::{Hands, Tracking};

const T1: Duration = Duration::from_secs(10);
const VIP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
const A: u64 = 1001;
const B: u64 = 1002;

/// An agent's hold that writes down what it carries out.
pub struct Witness {
    pub held: Held,
    pub ops: Vec<MapOp>,
    /// Tables in which a pin fails during the next grace.
    failing: Vec<u16>,
    /// Operations that are carried out until one is not.
    pub fails_at: Option<usize>,
}

/// What is said of it.
pub const REFUSED: PlanError = PlanError::Egress { limit: 0 };

impl Hands for Witness {
    type Error = PlanError;

    fn now(&self) -> Instant {
        self.held.now()
    }
    fn age(&self) -> u16 {
        self.held.age()
    }
    fn image(&self) -> &Image {
        self.held.image()
    }
    fn capacity(&self) -> &Capacity {
        self.held.capacity()
    }
    fn read_states(&mut self) {
        self.held.read_states();
    }
    fn apply(&mut self, op: &MapOp) -> Result<bool, PlanError> {
        self.fails_at = match self.fails_at {
            Some(0) => {
                self.fails_at = None;
                return Err(REFUSED);
            }
            left => left.map(|left| left - 1),
        };
        if *op == MapOp::Grace {
            self.failing.drain(..).for_each(|table| self.held.memory.add_failed(table));
        }
        self.ops.push(op.clone());
        self.held.apply(op)
    }
    fn set_active(&mut self, id: u16, active: u64) {
        self.held.set_active(id, active);
    }
}

impl Witness {
    fn new(tables: u32, log2_length: u32) -> Self {
        let slots = (tables << log2_length.max(12)) + (16 << 12);
        let capacity =
            Capacity::new(&Limits { vips: tables + 16, backends: 512, slots, pins: 256, connections: 0 });
        Self::of(capacity, 16)
    }

    /// With so many ids of backends.
    pub fn of(capacity: Capacity, ids: u16) -> Self {
        Self { held: Held::new(capacity, ids), ops: Vec::new(), failing: Vec::new(), fails_at: None }
    }

    /// Until the last table was open again: a sweep has one of its own.
    fn graces(&self) -> usize {
        let opened = self.ops.iter().rposition(|op| matches!(op, MapOp::SetClosing { closing: 0, .. }));
        let until = opened.map_or(0, |last| last + 1);
        self.ops[..until].iter().filter(|op| **op == MapOp::Grace).count()
    }

    /// Tables with a slot whose old flows are still waited for.
    fn moving(&self) -> BTreeSet<u16> {
        let moving = self.held.image.live_slots().filter(|(_, slot)| slot.dirty());
        moving.map(|(table, _)| table).collect()
    }

    fn closing(&self) -> usize {
        let tables = 0..self.held.image.tables.len() as u16;
        tables.filter(|&table| self.held.memory.closing(table) != 0).count()
    }
}

fn backend(identity: u64) -> (u64, DesiredBackend) {
    let row = BackendRow {
        kind: BackendKind::Ipip4 as u8,
        flags: BackendRow::ACCEPTING,
        identity,
        ..BackendRow::default()
    };
    let (next_hop, old_flows) = (None, Default::default());
    (identity, DesiredBackend { row, next_hop, pool: [1, 0, 0], old_flows, weight: 100 })
}

/// Tables that lead to one of two backends.
fn leading_to(identity: u64, tables: u32, log2_length: u32) -> Desired {
    let table = DesiredTable {
        log2_length,
        cur: vec![Target::Backend(identity); 1 << log2_length].into(),
        est: None,
        discipline: Discipline::Hash,
        pools: Vec::new(),
        pool_set: [1, 0, 0],
        idle: T1,
        protocol: PROTO_TCP,
    };
    let entry = |table: u32| {
        let ports = Ports::Port(table as u16);
        let lead =
            Lead { table: u64::from(table), flags: 0, counted: (IpAddr::from(VIP).into(), ports, PROTO_TCP) };
        ((VIP.into(), PortKey::new(table as u16, PROTO_TCP).0), DesiredVip::Service(lead))
    };
    Desired {
        backends: [backend(A), backend(B)].into(),
        vips: Arc::new((1..=tables).map(entry).collect()),
        tables: (1..=u64::from(tables)).map(|identity| (identity, Arc::new(table.clone()))).collect(),
        ..Desired::default()
    }
}

/// All slots of so many tables are on the move, and have waited long enough.
fn due(tables: u32, log2_length: u32) -> (Witness, Tracking) {
    let mut hands = Witness::new(tables, log2_length);
    let mut tracking = Tracking::new(hands.now());
    for identity in [A, B] {
        let wanted = leading_to(identity, tables, log2_length);
        tracking.reconcile(&mut hands, wanted).expect("within the limits");
    }
    assert_eq!(hands.moving().len(), tables as usize);
    hands.held.memory.pass(T1 + SLACK * 2);
    hands.ops.clear();
    (hands, tracking)
}

#[test]
fn tables_that_come_due_together_wait_for_the_same_two_graces() {
    let (mut hands, mut tracking) = due(100, 4);
    tracking.look_after(&mut hands).expect("a look");
    assert_eq!(hands.moving(), BTreeSet::new());
    assert_eq!((hands.graces(), hands.closing()), (2, 0));
}

#[test]
fn a_pin_that_fails_while_tables_are_closing_keeps_est_in_its_own_table_alone() {
    let (mut hands, mut tracking) = due(20, 4);
    let all = hands.moving();
    let failing: BTreeSet<u16> = all.iter().copied().filter(|table| table % 7 == 0).collect();
    hands.failing = failing.iter().copied().collect();
    tracking.look_after(&mut hands).expect("a look");
    assert_eq!((hands.moving(), hands.closing()), (failing.clone(), 0));
    // The next look begins their wait anew.
    tracking.look_after(&mut hands).expect("a look");
    hands.held.memory.pass(T1);
    tracking.look_after(&mut hands).expect("a look");
    assert_eq!(hands.moving(), failing);
    hands.held.memory.pass(SLACK * 2);
    tracking.look_after(&mut hands).expect("a look");
    assert_eq!((hands.moving(), hands.closing()), (BTreeSet::new(), 0));
}

#[test]
fn a_look_lets_est_follow_in_so_many_slots_and_the_next_goes_on() {
    let at_once = MOST_AT_ONCE >> 16;
    let (mut hands, mut tracking) = due(at_once as u32 + 1, 16);
    // Tables that still move, and whether a plan has to follow: once, when there is no more to do.
    for expected in [(1, false), (0, false), (0, true), (0, false)] {
        let changed = tracking.look_after(&mut hands).expect("a look");
        assert_eq!((hands.moving().len(), changed), expected);
    }
}

#[test]
fn what_cannot_be_planned_is_not_what_tables_are_on_their_way_to() {
    let mut hands = Witness::new(1, 4);
    let mut tracking = Tracking::new(hands.now());
    tracking.reconcile(&mut hands, leading_to(A, 1, 4)).expect("within the limits");
    hands.ops.clear();
    let refused = tracking.reconcile(&mut hands, leading_to(B, 40, 4));
    assert!(matches!(refused, Err(PlanError::Vips { .. } | PlanError::Tables { .. })), "{refused:?}");
    assert_eq!(hands.ops, []);
    assert!(*tracking.desired == leading_to(A, 1, 4), "sweeps go by what was refused");
}
