//! What a sweep takes out, what it counts, and what may be freed after it.

mod connections;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use lb_common::abi::{BackendKind, Discipline, PINS_PER_BUCKET, Pin, PinState, TableState};
use lb_common::flow::FlowHash;
use lb_common::pins::Says;
use lb_common::wire::{PROTO_TCP, TcpFlags};

use super::*;
use crate::reconcile::desired::OldFlows;
use crate::reconcile::memory::Held;
use crate::reconcile::sweep::{Found, Places, Rules, Sweeper, drop_pins};
use crate::reconcile::tracking::{Hands, Tracking};

/// A unit of ages.
const UNIT: Duration = Duration::from_nanos(1 << 31);
const NOW: u16 = 1000;
const ROW: u32 = 256;
const A: u16 = 1;
const B: u16 = 2;

fn rules(tcp: Duration, udp: Duration) -> Rules {
    Rules { idle: HashMap::from([(A, (tcp, udp)), (B, (tcp, udp))]), longest: tcp, ..Rules::default() }
}

/// A table of two slots.
fn image_of(slots: [Slot; 2]) -> Image {
    let mut image = fresh();
    let state = TableState { identity: 1, ..TableState::default() };
    image.apply(&MapOp::WriteTableState { table: 0, state });
    write(&mut image, &slots);
    let word = TableWord::new(ROW, 1, Discipline::Hash);
    image.apply(&MapOp::SetTableWord { table: 0, word });
    image
}

fn write(image: &mut Image, slots: &[Slot]) {
    let words = slots.iter().map(|slot| slot.bits()).collect();
    image.apply(&MapOp::WriteSlots { first: ROW * SLOTS_PER_ROW, words });
}

/// A tag in the first slot, or in the second.
const fn tag(second: bool, number: u32) -> u32 {
    ((second as u32) << 31) | (number + 1)
}

fn words_of(pins: &[Pin]) -> Vec<AtomicU64> {
    let buckets = pins.len().div_ceil(PINS_PER_BUCKET).max(1);
    let mut words: Vec<AtomicU64> = pins.iter().map(|pin| AtomicU64::new(pin.bits())).collect();
    words.resize_with(buckets * PINS_PER_BUCKET, AtomicU64::default);
    words
}

fn swept(image: &Image, rules: Rules, pins: &[AtomicU64]) -> Found {
    let (mut sweeper, now) = (Sweeper::default(), Instant::now());
    sweeper.begin(image, rules, now);
    sweeper.step(places(pins), pins.len(), NOW, now).expect("a whole cycle")
}

fn places(pins: &[AtomicU64]) -> Places<'_> {
    Places { pins, ..Places::default() }
}

fn cleared(found: &Found) -> Vec<u32> {
    found.clear.iter().map(|(index, _)| index - ROW * SLOTS_PER_ROW).collect()
}

#[test]
fn pins_expire_by_what_they_know_of_their_flow() {
    let (tcp, udp) = (Duration::from_secs(900), Duration::from_secs(60));
    for (state, protected) in [
        (PinState::Syn, Duration::from_secs(64)),
        (PinState::Established, tcp),
        (PinState::Finishing, tcp),
        (PinState::Datagram, udp),
    ] {
        let idle = |time: Duration| (time.as_nanos() / UNIT.as_nanos()) as u16;
        let aged = |idle: u16| {
            let pins = words_of(&[Pin::new(tag(false, 0), A, state, NOW - idle)]);
            swept(&image_of([Slot::clean(A); 2]), rules(tcp, udp), &pins).expired
        };
        // Whatever parts of a unit the age of the pin and that of now lack.
        assert_eq!(aged(idle(protected + SLACK) + 1), 0, "{state:?}");
        assert_eq!(aged(idle(protected + SLACK) + 3), 1, "{state:?}");
    }
}

#[test]
fn a_pin_of_a_cpu_whose_clock_is_ahead_is_not_old() {
    for ahead in [1, 2, 1000] {
        let pins = words_of(&[Pin::new(tag(false, 0), A, PinState::Established, NOW + ahead)]);
        let found = swept(&image_of([Slot::clean(A); 2]), rules(Duration::from_secs(1), SLACK), &pins);
        assert_eq!((found.expired, found.pins), (0, 1), "{ahead}");
    }
}

#[test]
fn a_sweep_counts_pins_by_backend_and_those_that_have_ended_apart() {
    let pins = words_of(&[
        Pin::new(tag(false, 0), A, PinState::Established, NOW),
        Pin::new(tag(false, 1), A, PinState::Finishing, NOW),
        Pin::new(tag(true, 0), B, PinState::Syn, NOW),
    ]);
    let found = swept(&image_of([Slot::clean(A); 2]), rules(Duration::from_secs(1), SLACK), &pins);
    let of = |id| (found.of(id).pins, found.of(id).active);
    assert_eq!((found.pins, of(A), of(B), of(3)), (3, (2, 1), (1, 1), (0, 0)));
}

#[test]
fn the_mark_of_pins_goes_where_no_pin_elsewhere_exists() {
    let resting = Slot::new(B, B, false, true);
    let image = image_of([resting; 2]);
    let long = Duration::from_secs(900);
    for (name, pin, expected) in [
        ("none", Pin::default(), [0, 1].as_slice()),
        ("where new flows go, too", Pin::new(tag(false, 0), B, PinState::Established, NOW), &[0, 1]),
        ("elsewhere", Pin::new(tag(false, 0), A, PinState::Established, NOW), &[1]),
        ("elsewhere, in the other slot", Pin::new(tag(true, 0), A, PinState::Established, NOW), &[0]),
        ("of a backend that is in no configuration", Pin::new(tag(true, 0), 9, PinState::Syn, NOW), &[0]),
        ("long silent", Pin::new(tag(false, 0), A, PinState::Established, NOW - 419), &[1]),
        ("taken out", Pin::new(tag(false, 0), A, PinState::Established, NOW - 430), &[0, 1]),
    ] {
        let found = swept(&image, rules(long, long), &words_of(&[pin]));
        assert_eq!(cleared(&found), expected, "{name}");
        assert!(found.clear.iter().all(|(_, word)| *word == Slot::clean(B).bits()), "{name}");
    }
    let moving = [Slot::new(B, A, true, true), Slot::clean(A)];
    assert_eq!(cleared(&swept(&image_of(moving), rules(long, long), &words_of(&[]))), [0; 0], "D stays");
}

#[test]
fn pins_of_backends_that_a_table_never_had_do_not_hold_its_slots() {
    let image = image_of([Slot::new(B, B, false, true); 2]);
    let pins = words_of(&[Pin::new(tag(false, 0), A, PinState::Established, NOW)]);
    for (tables, expected) in [(vec![0], [1].as_slice()), (vec![7], &[0, 1])] {
        let rules = Rules { tables: HashMap::from([(A, tables.into())]), ..rules(T1, T1) };
        assert_eq!(cleared(&swept(&image, rules, &pins)), expected);
    }
}

/// A slot may go and come back while the sweep is elsewhere; pins that it made meanwhile lie where the sweep has been.
#[test]
fn a_slot_that_is_written_while_a_cycle_is_under_way_keeps_its_mark() {
    let (rest, now) = (Slot::new(A, A, false, true), Instant::now());
    let mut image = image_of([rest; 2]);
    let pins: Vec<AtomicU64> = (0..2 * PINS_PER_BUCKET).map(|_| AtomicU64::default()).collect();
    let mut sweeper = Sweeper::default();
    sweeper.begin(&image, rules(T1, T1), now);
    assert!(sweeper.step(places(&pins), 1, NOW, now).is_none());
    for slot in [Slot::new(B, A, true, true), rest] {
        sweeper.written(ROW * SLOTS_PER_ROW, 1);
        write(&mut image, &[slot]);
        pins[0].store(Pin::new(tag(false, 0), B, PinState::Established, NOW).bits(), Ordering::SeqCst);
    }
    let found = sweeper.step(places(&pins), 1, NOW, now).expect("a whole cycle");
    assert_eq!(cleared(&found), [1]);
}

#[test]
fn pins_that_packets_use_again_and_again_are_taken_out_whole() {
    const FLOWS: usize = 64;
    let held = Held::new(
        Capacity::new(&Limits { vips: 1, backends: 1, slots: 2 << 12, pins: 64, connections: 0 }),
        8,
    );
    let memory = &held.memory;
    let word = TableWord::new(ROW, 1, Discipline::Hash);
    memory.apply(&MapOp::SetTableWord { table: 0, word });
    // Old flows stay at A; pins to A are to go.
    let words = [Slot::new(B, A, true, true).bits(); 2].to_vec();
    memory.apply(&MapOp::WriteSlots { first: ROW * SLOTS_PER_ROW, words });
    let data = Says::tcp(TcpFlags { data_offset: 5 << 4, flags: TcpFlags::ACK });
    let hash = |flow: usize| FlowHash::from_bits((flow as u64 + 1) << 32 | flow as u64);
    let done = AtomicBool::new(false);
    let pins = memory.pins();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                memory.pass(UNIT);
                for flow in 0..FLOWS {
                    assert_eq!(memory.steer(0, hash(flow), data), Ok(A), "pinned or not");
                }
            }
        });
        for _ in 0..2000 {
            drop_pins(pins.words(), &[A]);
        }
        done.store(true, Ordering::SeqCst);
    });
    drop_pins(pins.words(), &[A]);
    assert!(pins.words().iter().all(|word| word.load(Ordering::SeqCst) == 0));
}

// ---- Ids -----------------------------------------------------------------------------------------

const T1: Duration = Duration::from_secs(10);

/// Backends by number, and the one who has all slots; the others take nothing.
fn wanted(backends: &[u64], taker: u64) -> Desired {
    let mut desired = Desired::default();
    for &identity in backends {
        let (kind, flags) = (BackendKind::Ipip4 as u8, BackendRow::ACCEPTING);
        let row = BackendRow { kind, flags, identity, ..BackendRow::default() };
        let (next_hop, old_flows, pool, weight) = (None, OldFlows::Stay, [1, 0, 0], 1);
        desired.backends.insert(identity, DesiredBackend { row, next_hop, pool, old_flows, weight });
    }
    let table = DesiredTable {
        log2_length: 1,
        cur: vec![Target::Backend(taker); 2].into(),
        est: None,
        discipline: Discipline::Hash,
        pools: Vec::new(),
        pool_set: [1, 0, 0],
        idle: T1,
        protocol: PROTO_TCP,
    };
    desired.tables.insert(1, table.into());
    let vip = Ipv4Addr::new(203, 0, 113, 10);
    let counted = (IpAddr::from(vip).into(), Ports::Port(80), PROTO_TCP);
    let lead = Lead { table: 1, flags: 0, counted };
    Arc::make_mut(&mut desired.vips)
        .insert((vip.into(), PortKey::new(80, PROTO_TCP).0), DesiredVip::Service(lead));
    desired
}

struct Tracked {
    held: Held,
    tracking: Tracking,
}

impl Tracked {
    fn new() -> Self {
        let held = Held::new(
            Capacity::new(&Limits { vips: 1, backends: 1, slots: 4 << 12, pins: 64, connections: 0 }),
            8,
        );
        Self { tracking: Tracking::new(held.now()), held }
    }

    fn want(&mut self, backends: &[u64], taker: u64) {
        self.tracking.reconcile(&mut self.held, wanted(backends, taker)).expect("within the limits");
    }

    /// Time passes; what rests is freed.
    fn pass(&mut self, time: Duration, backends: &[u64], taker: u64) {
        for _ in 0..time.as_millis() / 500 {
            self.held.memory.pass(Duration::from_millis(500));
            if self.tracking.look_after(&mut self.held).expect("within the limits") {
                self.want(backends, taker);
            }
        }
    }

    fn packet(&self, flow: u64, flags: u8) -> u64 {
        let says = Says::tcp(TcpFlags { data_offset: 5 << 4, flags });
        let id = self.held.memory.steer(0, FlowHash::from_bits(flow << 32 | flow), says);
        self.held.image.backends[usize::from(id.expect("a backend"))].identity
    }

    fn rows(&self) -> BTreeSet<u64> {
        self.held.image.ids().into_keys().collect()
    }
}

#[test]
fn the_id_of_a_backend_is_free_once_its_last_flow_is_over() {
    let mut tracked = Tracked::new();
    tracked.want(&[10], 10);
    assert_eq!(tracked.packet(1, TcpFlags::SYN), 10);
    tracked.want(&[11], 11);
    // The flow lives for twice as long as it takes est to follow.
    for _ in 0..5 {
        assert_eq!(tracked.packet(1, TcpFlags::ACK), 10);
        tracked.pass(T1 * 9 / 10, &[11], 11);
    }
    assert_eq!(tracked.packet(1, TcpFlags::FIN | TcpFlags::ACK), 10);
    assert_eq!(tracked.rows(), BTreeSet::from([10, 11]), "the row is the reservation");
    tracked.pass(T1 * 3, &[11], 11);
    assert_eq!(tracked.rows(), BTreeSet::from([11]));
    assert!(tracked.held.image.live_slots().all(|(_, slot)| slot.is_clean()));
}

/// What one cycle said of an id holds for one plan: who has it next may have pins before the next cycle.
#[test]
fn an_id_that_was_found_free_once_is_not_free_for_ever() {
    let mut tracked = Tracked::new();
    tracked.want(&[10, 11], 10);
    tracked.want(&[10], 10);
    tracked.pass(T1 * 3, &[10], 10);
    assert_eq!(tracked.rows(), BTreeSet::from([10]));
    // It comes, takes a flow, and goes at once.
    tracked.want(&[10, 12], 12);
    assert_eq!(tracked.packet(1, TcpFlags::SYN), 12);
    tracked.want(&[10], 10);
    assert_eq!(tracked.rows(), BTreeSet::from([10, 12]));
    tracked.pass(Duration::from_secs(5), &[10], 10);
    assert_eq!(tracked.packet(1, TcpFlags::ACK), 12);
}

#[test]
fn an_agent_that_begins_opens_what_was_closing() {
    let mut tracked = Tracked::new();
    tracked.want(&[10], 10);
    let closing = MapOp::SetClosing { table: 0, closing: TableState::CLOSING };
    tracked.held.apply(&closing).expect("carried out");
    tracked.tracking = Tracking::begin(&mut tracked.held).expect("carried out");
    assert_eq!(tracked.held.image.table_states[0].closing, 0);
    assert_eq!(lb_common::tables::Tables::closing(&*tracked.held.memory, 0), 0);
}
