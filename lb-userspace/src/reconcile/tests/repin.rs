//! Pins among another number of buckets, and tables in maps of another size.

use std::sync::atomic::{AtomicU64, Ordering};

use lb_common::abi::{PINS_PER_BUCKET, Pin, PinState, TableState};
use lb_common::flow::FlowHash;
use lb_common::pins::Says;
use lb_common::wire::TcpFlags;

use super::*;
use crate::reconcile::memory::Held;
use crate::reconcile::plan::{carried, image_of};
use crate::reconcile::repin::{Copied, Spread, copy, renew};

const NOW: u16 = 1000;

fn words(buckets: usize) -> Vec<AtomicU64> {
    (0..buckets * PINS_PER_BUCKET).map(|_| AtomicU64::new(0)).collect()
}

fn put(words: &[AtomicU64], bucket: usize, way: usize, pin: Pin) {
    words[bucket * PINS_PER_BUCKET + way].store(pin.bits(), Ordering::Relaxed);
}

fn pin(tag: u32, backend: u16, idle: u16) -> Pin {
    Pin::new(tag, backend, PinState::Established, NOW - idle)
}

/// Pins of one bucket, as (tag, backend, how long they were silent), in order.
fn held(words: &[AtomicU64], bucket: usize) -> Vec<(u32, u16, u32)> {
    let ways = &words[bucket * PINS_PER_BUCKET..][..PINS_PER_BUCKET];
    let pins = ways.iter().map(|way| Pin::from_bits(way.load(Ordering::Relaxed)));
    let mut held: Vec<_> =
        pins.filter(|pin| !pin.is_free()).map(|pin| (pin.tag(), pin.backend(), pin.idle(NOW))).collect();
    held.sort_unstable();
    held
}

#[test]
fn among_more_buckets_a_pin_is_wherever_its_flow_may_look() {
    let (from, to) = (words(2), words(8));
    put(&from, 0, 3, pin(7, 1, 5));
    put(&from, 1, 7, pin(9, 2, 0));
    let copied = copy(&from, &to, NOW);
    assert_eq!(copied, Copied { from: 2, to: 8, dropped: 0 });
    for bucket in 0..8 {
        let wanted = if bucket % 2 == 0 { (7, 1, 5) } else { (9, 2, 0) };
        assert_eq!(held(&to, bucket), [wanted], "bucket {bucket}");
    }
}

#[test]
fn among_fewer_buckets_those_that_were_silent_for_longest_make_room() {
    let (from, to) = (words(8), words(2));
    for bucket in 0..8u16 {
        for way in 0..4u16 {
            let number = bucket * 4 + way;
            put(&from, usize::from(bucket), usize::from(way), pin(100 + u32::from(number), 1, number));
        }
    }
    let copied = copy(&from, &to, NOW);
    assert_eq!(copied, Copied { from: 32, to: 16, dropped: 16 });
    for bucket in 0..2u16 {
        let of_bucket = (0..32u16).filter(|number| number / 4 % 2 == bucket);
        let mut wanted: Vec<_> =
            of_bucket.map(|number| (100 + u32::from(number), 1, u32::from(number))).collect();
        wanted.truncate(PINS_PER_BUCKET);
        assert_eq!(held(&to, usize::from(bucket)), wanted);
    }
}

#[test]
fn of_the_copies_of_a_pin_the_one_that_its_flow_used_comes_back() {
    let (few, many, again) = (words(1), words(4), words(1));
    put(&few, 0, 0, pin(7, 1, 90));
    copy(&few, &many, NOW);
    let used = many.iter().position(|word| word.load(Ordering::Relaxed) != 0).expect("it was copied");
    many[used + 2 * PINS_PER_BUCKET].store(pin(7, 1, 1).bits(), Ordering::Relaxed);
    let copied = copy(&many, &again, NOW);
    assert_eq!((held(&again, 0), copied.dropped), (vec![(7, 1, 1)], 0));
}

#[test]
fn what_was_used_after_it_was_copied_is_renewed_and_nothing_newer_is_lost() {
    for (old, new) in [(4, 4), (2, 8), (8, 2)] {
        let (from, to) = (words(old), words(new));
        put(&from, 1, 0, pin(7, 1, 50));
        put(&from, 1, 1, pin(8, 1, 50));
        copy(&from, &to, NOW);
        put(&from, 1, 0, pin(7, 1, 2));
        put(&from, 1, 1, pin(8, 1, 2));
        let newer = to.iter().position(|word| Pin::from_bits(word.load(Ordering::Relaxed)).tag() == 8);
        to[newer.expect("it was copied")].store(pin(8, 3, 0).bits(), Ordering::Relaxed);
        renew(&from, &to, NOW);
        let held = held(&to, 1);
        assert_eq!(held, [(7, 1, 2), (8, 3, 0)], "{old} to {new}");
    }
}

const SMALL: Limits = Limits { vips: 16, backends: 64, slots: 16 << 12, pins: 4096, connections: 4096 };
const LARGE: Limits =
    Limits { vips: 2000, backends: 5000, slots: 100 << 12, pins: 1 << 16, connections: 8192 };

/// Slots on the move, and a table that is not at the beginning of the map.
fn in_the_midst() -> (State, Image) {
    let mut state = simple(4);
    let mut image = fresh();
    applied(&mut image, &state);
    state.pools.get_mut(&0).expect("the pool").backends.get_mut(&2).expect("it is there").0 = 0;
    applied(&mut image, &state);
    assert!(super::words(&image).iter().any(|slot| slot.dirty()));
    (state, image)
}

#[test]
fn maps_of_another_size_hold_the_same_ids_slots_and_vips() {
    let (state, before) = in_the_midst();
    for limits in [SMALL, LIMITS, LARGE] {
        let capacity = Capacity::new(&limits);
        let ops = carried(&before, &capacity).expect("it fits");
        let mut after = image_of(&ops, &capacity, before.meta);
        assert_eq!(after.ids(), before.ids());
        assert_eq!(after.backends, before.backends);
        assert_eq!(after.load_weights, before.load_weights);
        assert_eq!(super::words(&after), super::words(&before), "slots, in order");
        let used = |image: &Image| image.table_states.iter().filter(|state| state.identity != 0).count();
        assert_eq!(used(&after), used(&before));
        for state in after.table_states.iter().filter(|state| state.identity != 0) {
            assert_eq!(state.closing, TableState::FROZEN, "a pin could be made");
        }
        after.table_states.iter_mut().for_each(|state| state.closing = 0);
        let probe = only_vip(&state);
        let ends = |image: &Image, flow, flags| {
            let End { outcome, took, .. } = send(image, &probe, flow, flags);
            (outcome, took)
        };
        for (flow, flags) in (0..200).flat_map(|flow| SAYS.map(|flags| (flow, flags))) {
            assert_eq!(ends(&after, flow, flags), ends(&before, flow, flags));
        }
        // Nothing was left to do but to thaw.
        let leave = Leave { unpinned: Unpinned::Ids(HashSet::new()), ..Leave::all() };
        let plan = plan(&after, &state.desired(), &capacity, &leave).expect("it fits");
        assert_eq!(plan.ops, []);
    }
}

#[test]
fn limits_that_what_is_in_use_does_not_fit_are_refused_by_name() {
    let (_, image) = in_the_midst();
    let refused = |limits: Limits| carried(&image, &Capacity::new(&limits)).map(drop);
    let tables = image.tables.iter().filter(|word| **word != 0).count();
    let counted = counter_rows(&present_vips(&image)).len();
    assert_eq!(refused(SMALL), Ok(()));
    let no_vips = Limits { vips: counted as u32 - 1, ..SMALL };
    assert!(counted > 0 && matches!(refused(no_vips), Err(PlanError::Vips { .. })));
    let no_slots = Limits { slots: (tables as u32 - 1) << 12, ..SMALL };
    assert!(matches!(refused(no_slots), Err(PlanError::Tables { .. } | PlanError::Slots { .. })));
}

/// Packets meet the same backends while the tables of both are frozen, and no pin is made or turned.
#[test]
fn while_tables_are_frozen_pins_hold_and_what_has_none_goes_where_it_needs_none() {
    let (flows, ids, row) = (64u64, 4, 256);
    let capacity = Capacity::new(&LIMITS);
    let hash = |flow: u64| FlowHash::from_bits(flow.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let ops = |closing| {
        let state = TableState { identity: 1, closing, ..TableState::default() };
        let flags = BackendRow::ACCEPTING;
        let mut ops = vec![MapOp::WriteTableState { table: 0, state }];
        ops.push(MapOp::WriteSlots {
            first: row * SLOTS_PER_ROW,
            words: vec![Slot::new(2, 1, true, false).bits(); 1 << 12],
        });
        let word = TableWord::new(row, 12, Default::default());
        ops.push(MapOp::SetTableWord { table: 0, word });
        ops.extend((1..ids).map(|id| MapOp::SetFlags { id, flags }));
        ops
    };
    let old = Held::new(capacity, ids).memory;
    ops(0).iter().for_each(|op| assert!(old.apply(op)));
    let says = |flags| Says::tcp(TcpFlags { data_offset: 5 << 4, flags });
    let (syn, ack) = (says(TcpFlags::SYN), says(TcpFlags::ACK));
    for flow in 0..flows {
        let says = if flow % 2 == 0 { syn } else { ack };
        assert_eq!(old.steer(0, hash(flow), says), Ok(if flow % 2 == 0 { 2 } else { 1 }));
    }
    old.apply(&MapOp::SetClosing { table: 0, closing: TableState::FROZEN });
    // Its backend takes none any more: else a SYN would turn its pin to another.
    old.apply(&MapOp::SetFlags { id: 1, flags: 0 });
    let more = Capacity { pin_buckets: capacity.pin_buckets * 4, ..capacity };
    let new = Held::new(more, ids).memory;
    ops(TableState::FROZEN).iter().for_each(|op| assert!(new.apply(op)));
    let copied = copy(old.pins().words(), new.pins().words(), Pin::age_of(1 << 40));
    assert_eq!((copied.from, copied.to, copied.dropped), (flows, flows * 4, 0));
    for memory in [&old, &new] {
        for flow in 0..flows {
            for says in [syn, ack] {
                assert_eq!(memory.steer(0, hash(flow), says), Ok(if flow % 2 == 0 { 2 } else { 1 }));
            }
        }
        for says in [syn, ack] {
            assert_eq!(memory.steer(0, hash(flows + 1), says), Ok(1), "without a pin it is on `est`");
        }
    }
    new.apply(&MapOp::SetClosing { table: 0, closing: 0 });
    assert_eq!(new.steer(0, hash(flows + 1), syn), Ok(2));
}

#[test]
fn a_flow_that_speaks_shows_which_of_its_copies_it_uses_and_a_silent_one_keeps_all() {
    let (from, to) = (words(2), words(16));
    put(&from, 0, 0, pin(7, 1, 90));
    put(&from, 0, 1, pin(8, 1, 90));
    put(&from, 1, 0, pin(9, 1, 0));
    copy(&from, &to, NOW);
    let mut spread = Spread::of(None, from.len(), to.len(), NOW).expect("there are more buckets");
    let later = NOW + 3;
    let use_it = |tag: u32, bucket: usize| {
        let used = Pin::new(tag, 1, PinState::Established, later);
        let ways = &to[bucket * PINS_PER_BUCKET..][..PINS_PER_BUCKET];
        let way = ways.iter().find(|way| Pin::from_bits(way.load(Ordering::Relaxed)).tag() == tag);
        way.expect("it was copied").store(used.bits(), Ordering::Relaxed);
    };
    let places = |tag: u32| -> Vec<usize> {
        (0..16).filter(|&bucket| held(&to, bucket).iter().any(|(of, ..)| *of == tag)).collect()
    };
    use_it(7, 4);
    // In a step or in many.
    assert!(!spread.step(&to, 8, later) && !spread.step(&to, 100, later));
    assert_eq!(places(7), [4]);
    assert_eq!((places(8).len(), places(9).len()), (8, 8));
    use_it(8, 14);
    use_it(9, 3);
    assert!(!spread.step(&to, 100, later), "two had several");
    assert_eq!((places(7), places(8), places(9)), (vec![4], vec![14], vec![3]));
    assert!(spread.step(&to, 100, later));
    assert!(Spread::of(None, to.len(), from.len(), NOW).is_none());
    // Back to fewer, but to more than there were first.
    assert!(Spread::of(Some(spread), to.len(), to.len() / 2, NOW).is_some());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Also where a plan broke off.
    #[test]
    fn whatever_lies_in_maps_leads_packets_the_same_way_in_others_and_plans_go_on_from_there(
        steps in prop::collection::vec(
            (prop::collection::vec(change(), 1..6), any::<prop::sample::Index>()),
            1..6,
        ),
        flow in 0u16..50_000,
    ) {
        let (mut image, mut state) = (fresh(), State::empty());
        for (changes, stop) in &steps {
            changes.iter().for_each(|change| apply(&mut state, change));
            let Ok(ops) = plan_at_once(&image, &state.desired(), &capacity()) else { continue };
            ops[..stop.index(ops.len() + 1)].iter().for_each(|op| image.apply(op));
        }
        let thawed = |capacity: &Capacity| {
            let ops = carried(&image, capacity).map_err(|error| TestCaseError::fail(error.to_string()))?;
            let connections = Connections::in_memory(capacity.connections() as usize);
            let mut after = Image { connections, ..image_of(&ops, capacity, image.meta) };
            after.table_states.iter_mut().for_each(|state| state.closing = 0);
            Ok::<_, TestCaseError>(after)
        };
        let desired = state.desired();
        let probes = Ends::of(&desired).probes();
        for limits in [LIMITS, LARGE] {
            let after = thawed(&Capacity::new(&limits))?;
            for (probe, flags) in probes.iter().flat_map(|probe| SAYS.map(|flags| (probe, flags))) {
                let (one, other) = (send(&image, probe, flow, flags), send(&after, probe, flow, flags));
                prop_assert_eq!((one.outcome, one.took), (other.outcome, other.took), "{:?}", probe);
            }
            prop_assert_eq!(counter_rows(&present_vips(&after)).len(), counter_rows(&present_vips(&image)).len());
        }
        let mut after = thawed(&capacity())?;
        planned(&after, &desired)?.iter().for_each(|op| after.apply(op));
        settle(&mut after, &desired)?;
        prop_assert!(read_back(&after, &desired) == desired, "{}", difference(&after, &desired));
    }
}
