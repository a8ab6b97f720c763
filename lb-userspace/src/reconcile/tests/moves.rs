//! When `est` may follow: time is an argument.

use lb_common::abi::{Discipline, TableState};

use super::*;
use crate::reconcile::desired::OldFlows;

const T1: Duration = Duration::from_secs(60);
/// The coarseness of starts.
const COARSE: Duration = Duration::from_millis(100);
/// Where the one table lies.
const ROW: u32 = 256;

const A: u16 = 1;
const B: u16 = 2;
const C: u16 = 3;

/// New flows to `cur`, old ones stay.
const fn moving(cur: u16, est: u16) -> Slot {
    Slot::new(cur, est, true, false)
}

/// The old flows are pinned, or were.
const fn moved(to: u16) -> Slot {
    Slot::new(to, to, false, true)
}

fn image_of(slots: &[Slot], discipline: Discipline) -> Image {
    let mut image = fresh();
    let word = TableWord::new(ROW, slots.len().ilog2(), discipline);
    image.apply(&MapOp::WriteTableState {
        table: 0,
        state: TableState { identity: 1, ..TableState::default() },
    });
    for id in [A, B, C] {
        let backend = BackendRow { identity: u64::from(id), ..BackendRow::default() };
        image.apply(&MapOp::WriteBackend { id, backend });
    }
    write(&mut image, 0, slots);
    image.apply(&MapOp::SetTableWord { table: 0, word });
    image
}

fn write(image: &mut Image, first: u32, slots: &[Slot]) {
    let words = slots.iter().map(|slot| slot.bits()).collect();
    image.apply(&MapOp::WriteSlots { first: ROW * SLOTS_PER_ROW + first, words });
}

/// By identities that are the ids.
fn leading_to(ids: [u16; 2]) -> Targets {
    ids.into_iter().map(|id| Target::Backend(u64::from(id))).collect()
}

fn course(_: u16) -> Option<Course<'static>> {
    Some(Course { idle: T1, est: None })
}

/// Slots that may be finished, from the first of the table, with what is written there.
fn due(moves: &mut Moves, image: &Image, now: Instant) -> Vec<(u32, Slot)> {
    written(&moves.due(image, now, course))
}

fn written(due: &[Due]) -> Vec<(u32, Slot)> {
    let words = due.iter().flat_map(|due| &due.words);
    words.map(|&(index, word)| (index - ROW * SLOTS_PER_ROW, Slot::from_bits(word))).collect()
}

#[test]
fn est_follows_when_t1_and_the_slack_are_over_and_not_before() {
    let begin = Instant::now();
    let image = image_of(&[moving(B, A), Slot::clean(A)], Discipline::Hash);
    let mut moves = Moves::new(begin);
    moves.observe(&image, begin);
    for early in [Duration::ZERO, T1, T1 + SLACK] {
        assert_eq!(due(&mut moves, &image, begin + early), [], "{early:?}");
    }
    let over = begin + T1 + SLACK + COARSE;
    assert_eq!(due(&mut moves, &image, over), [(0, moved(B))]);
    let ops = [
        MapOp::SetClosing { table: 0, closing: TableState::CLOSING },
        MapOp::Grace,
        MapOp::ExpectFailed { table: 0, failed: 0 },
        MapOp::WriteSlots { first: ROW * SLOTS_PER_ROW, words: vec![moved(B).bits()] },
        MapOp::Grace,
        MapOp::SetClosing { table: 0, closing: 0 },
    ];
    assert_eq!(finish(moves.due(&image, over, course)), ops);
    assert_eq!(moves.due(&image, over, |_| None), [], "a table that nobody wants is nobody's to finish");
}

#[test]
fn a_slot_that_goes_elsewhere_while_it_moves_waits_no_longer_and_one_that_goes_back_waits_anew() {
    let begin = Instant::now();
    let mut image = image_of(&[moving(B, A), moving(B, A)], Discipline::Hash);
    let mut moves = Moves::new(begin);
    moves.observe(&image, begin);
    let half = begin + T1 / 2;
    write(&mut image, 0, &[moving(C, A), moved(A)]);
    moves.observe(&image, half);
    write(&mut image, 1, &[Slot::new(B, A, true, true)]);
    moves.observe(&image, half + COARSE);
    assert_eq!(due(&mut moves, &image, begin + T1 + SLACK + COARSE), [(0, moved(C))]);
    assert_eq!(due(&mut moves, &image, half + T1 + SLACK + COARSE * 2), [(0, moved(C)), (1, moved(B))]);
}

#[test]
fn a_pin_that_failed_begins_the_wait_of_its_table_anew() {
    let begin = Instant::now();
    let mut image = image_of(&[moving(B, A), moving(C, A)], Discipline::Hash);
    let mut moves = Moves::new(begin);
    moves.observe(&image, begin);
    let late = begin + T1;
    image.table_states[0].failed += 1;
    moves.observe(&image, late);
    assert_eq!(due(&mut moves, &image, begin + T1 + SLACK + COARSE), []);
    let over = late + T1 + SLACK + COARSE;
    assert_eq!(due(&mut moves, &image, over), [(0, moved(B)), (1, moved(C))]);
    assert_eq!(moves.due(&image, over, course).remove(0).failed, 1);
}

#[test]
fn an_agent_that_begins_knows_of_no_time_before() {
    let begin = Instant::now();
    let image = image_of(&[moving(B, A)], Discipline::Hash);
    let mut moves = Moves::new(begin);
    moves.observe(&image, begin);
    let mut after = Moves::new(begin + T1);
    after.observe(&image, begin + T1);
    let over = begin + T1 + SLACK + COARSE;
    assert_eq!(due(&mut moves, &image, over), [(0, moved(B))]);
    assert_eq!(due(&mut after, &image, over), []);
    assert_eq!(due(&mut after, &image, over + T1), [(0, moved(B))]);
}

#[test]
fn children_of_a_slot_that_moves_go_on_where_it_is() {
    let begin = Instant::now();
    let mut image = image_of(&[moving(B, A), Slot::clean(A)], Discipline::Hash);
    let mut moves = Moves::new(begin);
    moves.observe(&image, begin);
    let later = begin + T1 / 2;
    let children = [moving(B, A), moving(B, A), moving(C, A), moving(B, A)];
    let rest = [Slot::clean(A), Slot::clean(A), moving(C, A), Slot::clean(A)];
    write(&mut image, 0, &[children, rest].concat());
    image.apply(&MapOp::SetTableWord { table: 0, word: TableWord::new(ROW, 3, Discipline::Hash) });
    moves.observe(&image, later);
    let first = [(0, moved(B)), (1, moved(B)), (2, moved(C)), (3, moved(B))];
    assert_eq!(due(&mut moves, &image, begin + T1 + SLACK + COARSE), first);
    let all = due(&mut moves, &image, later + T1 + SLACK + COARSE);
    assert_eq!(all, [first.as_slice(), &[(6, moved(C))]].concat(), "what moves since then began then");
}

#[test]
fn a_table_is_without_room_for_a_while_after_a_pin_failed_and_not_before() {
    let begin = Instant::now();
    let mut image = image_of(&[moving(B, A)], Discipline::Hash);
    image.table_states[0].failed = 7;
    let mut moves = Moves::new(begin);
    let without_room = |moves: &Moves, now| -> Vec<u16> { moves.without_room(now).collect() };
    for seconds in 0..10 {
        let now = begin + Duration::from_secs(seconds);
        moves.observe(&image, now);
        assert!(without_room(&moves, now).is_empty(), "failed before the agent began");
    }
    let late = begin + T1;
    image.table_states[0].failed += 1;
    moves.observe(&image, late);
    assert_eq!(without_room(&moves, late), [0]);
    moves.observe(&image, late + T1);
    assert!(without_room(&moves, late + T1).is_empty(), "pins can be had again");
}

#[test]
fn where_every_flow_is_pinned_est_follows_after_a_quiet_t1() {
    let begin = Instant::now();
    let slots = [Slot::new(B, A, true, true), Slot::new(B, B, true, true)];
    let mut image = image_of(&slots, Discipline::RoundRobin);
    let mut moves = Moves::new(begin);
    moves.observe(&image, begin);
    let to_c_and_b = leading_to([C, B]);
    let course = |_| Some(Course { idle: T1, est: Some((1, &to_c_and_b)) });
    let late = begin + T1;
    assert_eq!(written(&moves.due(&image, late, course)), []);
    image.table_states[0].failed += 1;
    moves.observe(&image, late);
    assert_eq!(written(&moves.due(&image, begin + T1 + SLACK, course)), []);
    let over = late + T1 + SLACK;
    assert_eq!(written(&moves.due(&image, over, course)), [(0, Slot::new(B, C, true, true))]);
}

#[test]
fn a_table_that_is_no_hash_is_looked_at_no_more_once_it_is_as_it_should_until_something_changes() {
    let begin = Instant::now();
    let image = image_of(&[Slot::new(B, C, true, true), Slot::new(B, B, true, true)], Discipline::RoundRobin);
    let mut moves = Moves::new(begin);
    moves.observe(&image, begin);
    let over = begin + T1 + SLACK;
    let to_c_and_b = leading_to([C, B]);
    let now = |_| Some(Course { idle: T1, est: Some((1, &to_c_and_b)) });
    assert_eq!(moves.due(&image, over, now), []);
    let turned = leading_to([B, B]);
    let next = |_| Some(Course { idle: T1, est: Some((1, &turned)) });
    assert_eq!(moves.due(&image, over, next), []);
    moves.observe(&image, over);
    assert_eq!(written(&moves.due(&image, over, next)), [(0, Slot::new(B, B, true, true))]);
}

// ---- What a plan does to slots -------------------------------------------------------------------

fn flip(state: &mut State, host: u16, up: bool) {
    state.pools.get_mut(&0).unwrap().backends.get_mut(&host).unwrap().1 = up;
}

/// The plan of a state in which some backends' flows go.
fn planned_with(image: &Image, state: &State, goes: &[(u16, OldFlows)]) -> Vec<MapOp> {
    let mut desired = state.desired();
    for (host, old_flows) in goes {
        let identity = identity_in_first_pool(state, backend_address(*host));
        let backend = desired.backends.get_mut(&identity).expect("a backend");
        backend.old_flows = *old_flows;
        backend.pool = [u64::MAX; 3];
        backend.row.flags = 0;
    }
    plan_at_once(image, &desired, &capacity()).expect("within the limits")
}

fn id_of(image: &Image, state: &State, host: u16) -> u16 {
    image.ids()[&identity_in_first_pool(state, backend_address(host))]
}

#[test]
fn a_change_back_is_clean_at_once_but_for_pins_that_were_made() {
    let (mut image, mut state) = (fresh(), simple(3));
    applied(&mut image, &state);
    let before = words(&image);
    flip(&mut state, 2, false);
    applied(&mut image, &state);
    flip(&mut state, 2, true);
    applied(&mut image, &state);
    for (before, now) in before.iter().zip(words(&image)) {
        let back = moved(before.cur());
        assert!(now == *before || now == back, "{now:?}");
    }
}

#[test]
fn a_backend_that_failed_is_left_by_its_old_flows_before_its_pins_go() {
    let (mut image, mut state) = (fresh(), simple(3));
    applied(&mut image, &state);
    let (before, dead) = (words(&image), id_of(&image, &state, 2));
    flip(&mut state, 2, false);
    let ops = planned_with(&image, &state, &[(2, OldFlows::Fail)]);
    let (first, slots, end) = (&ops[0], &ops[1..ops.len() - 4], &ops[ops.len() - 4..]);
    assert_eq!(*first, MapOp::SetFlags { id: dead, flags: 0 });
    assert!(slots.iter().all(|op| matches!(op, MapOp::WriteSlots { .. })));
    let emptied = MapOp::SetFlags { id: dead, flags: BackendRow::EMPTIED };
    assert_eq!(*end, [MapOp::Grace, MapOp::DropPins { ids: vec![dead] }, MapOp::Grace, emptied]);
    ops.iter().for_each(|op| image.apply(op));
    for (before, now) in before.iter().zip(words(&image)) {
        if before.cur() == dead {
            assert!(now.cur() != dead && now == moved(now.cur()), "{now:?}");
        } else {
            assert_eq!(now, *before);
        }
    }
    assert_eq!(planned_with(&image, &state, &[(2, OldFlows::Fail)]), [], "once");
}

#[test]
fn the_pins_of_all_backends_that_fail_together_go_in_one_look() {
    let (mut image, mut state) = (fresh(), simple(6));
    applied(&mut image, &state);
    let dead = [2, 4, 6].map(|index| id_of(&image, &state, index));
    [2, 4, 6].into_iter().for_each(|index| flip(&mut state, index, false));
    let fail = [2, 4, 6].map(|index| (index, OldFlows::Fail));
    let ops = planned_with(&image, &state, &fail);
    let drops: Vec<_> = ops.iter().filter(|op| matches!(op, MapOp::DropPins { .. })).collect();
    let [MapOp::DropPins { ids }] = drops[..] else { panic!("{drops:?}") };
    assert_eq!(BTreeSet::from_iter(ids), BTreeSet::from_iter(&dead));
    assert_eq!(ops.iter().filter(|op| **op == MapOp::Grace).count(), 2, "{ops:?}");
    ops.iter().for_each(|op| image.apply(op));
    let emptied = |id: &u16| image.backends[usize::from(*id)].flags & BackendRow::EMPTIED != 0;
    assert!(dead.iter().all(emptied));
}

#[test]
fn old_flows_do_not_leave_a_failed_backend_for_nobody_nor_for_another_that_failed() {
    let (mut image, mut state) = (fresh(), simple(2));
    applied(&mut image, &state);
    let before = words(&image);
    let all = [(0, OldFlows::Fail), (2, OldFlows::Fail)];
    for on_empty in [OnEmpty::Drop, OnEmpty::All] {
        let mut image = image.clone();
        flip(&mut state, 0, false);
        flip(&mut state, 2, false);
        state.pools.get_mut(&0).unwrap().on_empty = on_empty;
        let ops = planned_with(&image, &state, &all);
        assert!(!ops.iter().any(|op| matches!(op, MapOp::DropPins { .. })), "{on_empty:?}");
        ops.iter().for_each(|op| image.apply(op));
        for (before, now) in before.iter().zip(words(&image)) {
            assert_eq!(now.est(), before.est(), "{on_empty:?}");
        }
        // The first that is up again takes all.
        flip(&mut state, 0, true);
        planned_with(&image, &state, &all[1..]).iter().for_each(|op| image.apply(op));
        let up = id_of(&image, &state, 0);
        assert!(words(&image).iter().all(|slot| slot.est() == up && slot.cur() == up), "{on_empty:?}");
    }
    applied(&mut image, &state);
}

#[test]
fn pins_to_a_failed_backend_that_were_made_while_nobody_was_up_go_once_somebody_is() {
    let (mut image, mut state) = (fresh(), simple(2));
    applied(&mut image, &state);
    let dead = id_of(&image, &state, 2);
    let all = [(0, OldFlows::Fail), (2, OldFlows::Fail)];
    flip(&mut state, 0, false);
    flip(&mut state, 2, false);
    planned_with(&image, &state, &all).iter().for_each(|op| image.apply(op));
    flip(&mut state, 0, true);
    let ops = planned_with(&image, &state, &all[1..]);
    let drop = ops
        .iter()
        .position(|op| *op == MapOp::DropPins { ids: vec![dead] })
        .expect("old flows were pinned there");
    assert_eq!(ops[drop - 1], MapOp::Grace, "first nobody finds it in a slot");
}

#[test]
fn a_table_forgets_the_pools_that_it_had_before_when_it_is_at_rest() {
    let (mut image, state) = (fresh(), simple(2));
    applied(&mut image, &state);
    let all = [u64::MAX; 3];
    let pools = image.table_states[0].pools;
    assert_ne!(pools, all);
    image.apply(&MapOp::SetPools { table: 0, pools: all });
    let mut moving = image.clone();
    let forgets = [MapOp::SetPools { table: 0, pools }];
    assert_eq!(planned_with(&image, &state, &[]), forgets);
    let slots = words(&moving);
    let first = TableWord::from_bits(moving.tables[0]).first_row() * SLOTS_PER_ROW;
    for slot in [Slot::new(slots[0].cur(), slots[0].cur(), false, true), Slot::clean(slots[0].cur())] {
        moving.apply(&MapOp::WriteSlots { first, words: vec![slot.bits()] });
        let expected = if slot.is_clean() { &forgets[..] } else { &[] };
        assert_eq!(planned_with(&moving, &state, &[]), expected, "{slot:?}");
    }
}

#[test]
fn a_service_that_takes_turns_goes_by_the_shared_table_again_after_it_changed_its_pool() {
    let mut state = simple(2);
    let mut other = state.pools[&0].clone();
    other.name = 1;
    other.backends = BTreeMap::from([(50, (100, true)), (51, (100, true))]);
    state.pools.insert(1, other);
    let first = state.services.get_mut(&0).expect("a service");
    first.kind.scheduler = Scheduler::WeightedRoundRobin;
    let mut second = first.clone();
    second.pool = 1;
    state.services.insert(1, second);
    let mut run = Run::new();
    run.step(state.desired(), &[0]).expect("the first tables");
    state.services.get_mut(&0).expect("a service").pool = 1;
    run.step(state.desired(), &[0]).expect("tables that others share");
    assert_eq!(run.image.table_states.iter().filter(|state| state.identity != 0).count(), 1);
}

#[test]
fn where_a_table_was_left_for_another_the_other_has_no_quiet_behind_it() {
    let begin = Instant::now();
    let mut image = image_of(&[Slot::new(B, A, true, true); 2], Discipline::RoundRobin);
    image.apply(&MapOp::SetTableWord { table: 1, word: TableWord::from_bits(image.tables[0]) });
    let mut moves = Moves::new(begin);
    moves.observe(&image, begin);
    let late = begin + T1;
    image.apply(&MapOp::SetTableWord { table: 1, word: TableWord::default() });
    moves.observe(&image, late);
    let to_c_and_b = leading_to([C, B]);
    let course = |_| Some(Course { idle: T1, est: Some((1, &to_c_and_b)) });
    assert_eq!(moves.due(&image, begin + T1 + SLACK, course), []);
    assert_eq!(moves.due(&image, late + T1 + SLACK, course).len(), 1);
}

#[test]
fn flows_that_are_left_in_another_tunnel_follow_the_next_hop_of_their_backend() {
    let (mut image, mut state) = (fresh(), simple(2));
    applied(&mut image, &state);
    let before = id_of(&image, &state, 2);
    state.pools.get_mut(&0).unwrap().forward = Forward::Gue { port: 6080 };
    let ops = |image: &Image, state: &State| {
        let leave = Leave { unpinned: Unpinned::Ids(HashSet::new()), ..Leave::all() };
        plan(image, &state.desired(), &capacity(), &leave).expect("within the limits").ops
    };
    ops(&image, &state).iter().for_each(|op| image.apply(op));
    assert!(words(&image).iter().any(|slot| slot.est() == before), "old flows stay in their tunnel");
    state.hops.insert(2, Some((INGRESS + 1, 1400, 9)));
    let now = ops(&image, &state);
    now.iter().for_each(|op| image.apply(op));
    let path = |id: u16| image.backends[usize::from(id)].path;
    assert_eq!(path(before), path(id_of(&image, &state, 2)), "{now:?}");
    assert_eq!(ops(&image, &state), []);
    // A next hop that is lost may come back.
    state.hops.insert(2, None);
    ops(&image, &state)
        .iter()
        .for_each(|op| assert!(!matches!(op, MapOp::SetPath { id, .. } if *id == before)));
}

#[test]
fn a_backend_whose_flows_are_moved_is_left_even_for_nobody() {
    let (mut image, state) = (fresh(), simple(1));
    applied(&mut image, &state);
    let mut empty = state.clone();
    flip(&mut empty, 0, false);
    planned_with(&image, &empty, &[(0, OldFlows::Move)]).iter().for_each(|op| image.apply(op));
    assert!(words(&image).iter().all(|slot| *slot == moved(BACKEND_NOBODY)));
}

#[test]
fn slots_that_move_for_a_better_spread_alone_wait_for_their_turn_and_others_do_not() {
    let (mut image, mut state) = (fresh(), simple(3));
    applied(&mut image, &state);
    let leave = |moves| Leave { unpinned: Unpinned::Ids(HashSet::new()), moves, ..Leave::all() };
    let planned = |image: &Image, state: &State, moves| {
        plan(image, &state.desired(), &capacity(), &leave(moves)).expect("within the limits")
    };
    state.pools.get_mut(&0).unwrap().backends.insert(100, (100, true));
    let all = planned(&image, &state, usize::MAX);
    let few = planned(&image, &state, 10);
    assert_eq!((all.waiting, few.moves, few.moves + few.waiting), (0, 10, all.moves));
    few.ops.iter().for_each(|op| image.apply(op));
    assert_eq!(words(&image).iter().filter(|slot| slot.dirty()).count(), 10);
    flip(&mut state, 2, false);
    let dead = id_of(&image, &state, 2);
    planned(&image, &state, 0).ops.iter().for_each(|op| image.apply(op));
    assert!(words(&image).iter().all(|slot| slot.cur() != dead), "who is down is left at once");
}
