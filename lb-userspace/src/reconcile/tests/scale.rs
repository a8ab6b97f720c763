//! With many pools, a change costs what it changes: tables that it does not concern are neither looked at nor written, and
//! what is worked out once says the same as all at once.

use lb_common::tables::Tables;

use super::many::{REFUSED, Witness};
use super::*;
use crate::reconcile::desired::OldFlows;
use crate::reconcile::draft::Draft;
use crate::reconcile::tracking::{Hands, Tracking};

const POOLS: usize = 40;
/// Where the time of all that becomes of their slots passes.
const FEW_POOLS: usize = 8;
const BACKENDS: usize = 5;

/// Pools with a service each; those from `edited` on have another last backend.
fn config(edited: usize, scheduler: &str) -> Config {
    config_of(POOLS, edited, scheduler, "")
}

/// So many, of which each but the last says this, too.
fn config_of(pools: usize, edited: usize, scheduler: &str, more: &str) -> Config {
    let pool = |pool: usize| {
        let hosts = (0..BACKENDS).map(|backend| {
            let last = usize::from(pool >= edited && backend + 1 == BACKENDS);
            format!("10.{pool}.0.{}", 1 + backend + last)
        });
        let hosts: Vec<_> = hosts.collect();
        let more = if pool + 1 < pools { more } else { "" };
        format!(
            "  p{pool}: {{forward: ipip, health: {{type: none}}, backends: [{}]{more}}}\n",
            hosts.join(", ")
        )
    };
    let service = |pool: usize| {
        format!(
            "- {{name: s{pool}, vip: 203.0.113.{pool}, ports: 80, protocol: tcp, pool: p{pool}, scheduler: {scheduler}}}\n"
        )
    };
    let text = format!(
        "interfaces: [eth0]\nseed: 7\nlimits: {{vips: 256, backends: 512, slots: {}, pins: 4096}}\npools:\n{}services:\n{}",
        (2 * pools) << 12,
        (0..pools).map(pool).collect::<String>(),
        (0..pools).map(service).collect::<String>()
    );
    crate::config::parse("test", &text).unwrap_or_else(|problems| panic!("{problems}")).config
}

/// Everybody is up but these.
fn world(config: &Config, down: &[(usize, usize)]) -> World {
    let mut world = World::default();
    for (index, pool) in config.pools.iter().enumerate() {
        for (place, backend) in pool.backends.iter().enumerate() {
            world.up.insert((index, place), !down.contains(&(index, place)));
            Arc::make_mut(&mut world.next_hops).insert(backend.address, next_hop((INGRESS, 1500, 1)));
        }
    }
    world
}

/// Tables as they are when all are up and nobody has anything left to do.
fn settled(config: &Config) -> (Witness, Tracking, Draft) {
    let mut hands = Witness::of(Capacity::new(&config.limits), 512);
    let mut tracking = Tracking::begin(&mut hands).expect("nothing to plan");
    let mut draft = Draft::of(config);
    for _ in 0..2 {
        let wanted = draft.desired(config, &world(config, &[]));
        tracking.reconcile(&mut hands, wanted).expect("within the limits");
    }
    hands.ops.clear();
    (hands, tracking, draft)
}

fn words_written(ops: &[MapOp]) -> usize {
    ops.iter().map(|op| if let MapOp::WriteSlots { words, .. } = op { words.len() } else { 0 }).sum()
}

#[test]
fn one_backend_that_goes_down_has_its_own_slots_and_its_row_written_and_nothing_else() {
    let config = config(POOLS, "maglev");
    for fails in [false, true] {
        let (mut hands, mut tracking, mut draft) = settled(&config);
        let identity = backend_identity("p3", Forward::Ipip, config.pools[3].backends[2].address);
        let id = hands.held.image.ids()[&identity];
        let own = hands.held.image.live_slots().filter(|(_, slot)| slot.cur() == id).count();
        let mut world = world(&config, &[(3, 2)]);
        if fails {
            world.old_flows.insert((3, 2), OldFlows::Fail);
        }
        let wanted = draft.desired(&config, &world);
        tracking.reconcile(&mut hands, wanted).expect("within the limits");
        assert_eq!(words_written(&hands.ops), own, "fails: {fails}");
        assert!(hands.held.image.live_slots().all(|(_, slot)| slot.cur() != id));
        let others = hands.ops.iter().filter(|op| !matches!(op, MapOp::WriteSlots { .. } | MapOp::Grace));
        for op in others {
            let of_it = match op {
                MapOp::SetFlags { id: of, .. } => *of == id,
                MapOp::DropPins { ids } => *ids == [id],
                _ => false,
            };
            assert!(of_it, "fails: {fails}: {op:?}");
        }
    }
}

#[test]
fn what_somebody_else_wrote_into_a_table_at_rest_is_undone_once_the_image_is_read_again() {
    let config = config(POOLS, "maglev");
    let (mut hands, mut tracking, mut draft) = settled(&config);
    let (table, _) = hands.held.image.live_slots().next().expect("a table");
    let first = TableWord::from_bits(hands.held.image.tables[usize::from(table)]).first_row() * SLOTS_PER_ROW;
    let before = hands.held.image.clone();
    hands.held.image.apply(&MapOp::WriteSlots { first, words: vec![Slot::clean(BACKEND_PASS).bits(); 3] });
    tracking.look_again(&hands.held.image);
    tracking.reconcile(&mut hands, draft.desired(&config, &world(&config, &[]))).expect("within the limits");
    let cur = |image: &Image| -> Vec<u16> { image.live_slots().map(|(_, slot)| slot.cur()).collect() };
    assert!(cur(&hands.held.image) == cur(&before));
}

#[test]
fn a_draft_says_the_same_as_all_at_once_whatever_came_before_it() {
    let configs = [config(POOLS, "maglev"), config(POOLS - 2, "maglev"), config(POOLS, "round-robin")];
    let mut draft: Option<Draft> = None;
    for (one, other) in (0..configs.len()).flat_map(|one| (0..configs.len()).map(move |other| (one, other))) {
        for config in [&configs[one], &configs[other]] {
            let mut next = Draft::after(config, draft.as_ref());
            for down in
                [&[][..], &[(3, 2)], &[(3, 2), (POOLS - 1, 4)], &[(0, 0), (0, 1), (0, 2), (0, 3), (0, 4)]]
            {
                let world = world(config, down);
                assert!(next.desired(config, &world) == desired(config, &world), "{one}, {other}: {down:?}");
            }
            draft = Some(next);
        }
    }
}

#[test]
fn tables_side_by_side_that_lose_their_pins_together_are_all_at_rest() {
    let config = config_of(FEW_POOLS, FEW_POOLS, "maglev", "");
    let (mut hands, mut tracking, mut draft) = settled(&config);
    let down: Vec<_> =
        (0..FEW_POOLS).flat_map(|pool| (0..BACKENDS - 1).map(move |backend| (pool, backend))).collect();
    for down in [&down[..], &[]] {
        let wanted = draft.desired(&config, &world(&config, down));
        tracking.reconcile(&mut hands, wanted).expect("within the limits");
    }
    assert!(tracking.has_to_sweep(&hands.held.image), "nothing has moved");
    for _ in 0..10_000 {
        hands.held.memory.pass(SLACK);
        if tracking.look_after(&mut hands).expect("a look") {
            let wanted = draft.desired(&config, &world(&config, &[]));
            tracking.reconcile(&mut hands, wanted).expect("within the limits");
        }
        if !tracking.has_to_sweep(&hands.held.image) {
            break;
        }
    }
    assert!(hands.held.image.live_slots().all(|(_, slot)| slot.is_clean()), "a slot is still on the move");
    assert!(
        !tracking.has_to_sweep(&hands.held.image),
        "every slot is at rest, and pins are swept all the same"
    );
}

/// Tables lie side by side: a run of words may end one and begin the next.
#[test]
fn a_table_whose_only_pins_were_of_slots_at_its_border_is_at_rest_once_they_are_gone() {
    let config = config_of(4, 3, "maglev", "");
    let (last, first) = (u32::MAX, 0);
    for marked in [
        &[(0, last)][..],
        &[(1, first)],
        &[(0, last), (1, first)],
        &[(0, last), (1, first), (1, last), (2, first)],
        &[(3, last)],
    ] {
        let (mut hands, _, mut draft) = settled(&config);
        let mut places: Vec<TableWord> =
            hands.held.image.tables.iter().map(|&bits| TableWord::from_bits(bits)).collect();
        places.retain(|word| *word != TableWord::default());
        places.sort_by_key(|word| word.first_row());
        let side_by_side = places
            .windows(2)
            .all(|pair| (pair[1].first_row() - pair[0].first_row()) * SLOTS_PER_ROW == pair[0].length());
        assert!(side_by_side && places.len() == 4, "{places:?}");
        for &(table, slot) in marked {
            let index = places[table].first_row() * SLOTS_PER_ROW + slot.min(places[table].length() - 1);
            let cur = hands.held.image.slot(index).cur();
            let words = vec![Slot::new(cur, cur, false, true).bits()];
            hands.apply(&MapOp::WriteSlots { first: index, words }).expect("a slot");
        }
        let mut tracking = Tracking::begin(&mut hands).expect("nothing to plan");
        let wanted = draft.desired(&config, &world(&config, &[]));
        tracking.reconcile(&mut hands, wanted).expect("within the limits");
        assert!(tracking.moves.has_pins(), "{marked:?}: no slot may have pins");
        for _ in 0..100 {
            hands.held.memory.pass(SLACK);
            tracking.look_after(&mut hands).expect("a look");
        }
        assert!(hands.held.image.live_slots().all(|(_, slot)| slot.is_clean()), "{marked:?}");
        assert!(
            !tracking.moves.has_pins(),
            "{marked:?}: slots at rest are taken for such that may have pins"
        );
    }
}

/// Between two looks at slots: flows that are silent for longer than a few of them are over.
const SOON: Duration = Duration::from_secs(300);

/// Looks after slots as the agent does, until there is nothing left to do. What breaks off is tried again, what cannot
/// be looked at by the next look. Returns how often something broke off.
fn live_on(
    hands: &mut Witness,
    tracking: &mut Tracking,
    mut wanted: impl FnMut() -> Desired,
    mut changed: bool,
) -> usize {
    let mut broken = 0;
    let mut quiet = 0;
    for _ in 0..10_000 {
        let mut refused = |result: Result<bool, PlanError>| match result {
            Ok(done) => done,
            Err(error) => {
                assert_eq!(error, REFUSED);
                broken += 1;
                false
            }
        };
        if changed || tracking.is_paced(hands.now()) {
            changed = !refused(tracking.reconcile(hands, wanted()).map(|()| true));
        }
        hands.held.memory.pass(SOON);
        changed |= refused(tracking.look_after(hands));
        let busy = changed || tracking.is_busy() || tracking.has_to_sweep(&hands.held.image);
        quiet = if busy { 0 } else { quiet + 1 };
        if quiet > 3 {
            return broken;
        }
    }
    panic!("there is no end of it: {tracking:?}");
}

/// Backends leave and come in two pools, and those of a third fail, until all of that is over.
fn changed_for_good(fails_at: Option<usize>) -> (Witness, usize) {
    let [before, after] = [4, 1].map(|edited| config_of(4, edited, "maglev", ""));
    let (mut hands, mut tracking, draft) = settled(&before);
    let mut draft = Draft::after(&after, Some(&draft));
    let mut failed = world(&after, &[(0, 1)]);
    failed.old_flows.insert((0, 1), OldFlows::Fail);
    hands.fails_at = fails_at;
    let mut broken = live_on(&mut hands, &mut tracking, || draft.desired(&after, &failed), true);
    broken += live_on(&mut hands, &mut tracking, || draft.desired(&after, &world(&after, &[])), true);
    let wanted = desired(&after, &world(&after, &[]));
    let more = plan(&hands.held.image, &wanted, hands.capacity(), &Leave::all()).expect("within the limits");
    assert!(more.ops.is_empty(), "after {fails_at:?}: {:?}", more.ops);
    (hands, broken)
}

/// Where slots lead, by what their table and the backends are.
fn leads(image: &Image) -> BTreeMap<u64, Vec<u64>> {
    let mut leads = BTreeMap::<u64, Vec<u64>>::new();
    for (table, slot) in image.live_slots() {
        let identity = image.backends[usize::from(slot.cur())].identity;
        leads.entry(image.table_states[usize::from(table)].identity).or_default().push(identity);
    }
    leads
}

#[test]
fn whichever_operation_fails_what_comes_next_is_tried_again_and_ends_as_if_none_had() {
    let (undisturbed, broken) = changed_for_good(None);
    assert_eq!(broken, 0);
    let (ops, image) = (&undisturbed.ops, &undisturbed.held.image);
    // Of slots that are written one after the other, the first, the second and the last.
    let is_slots = |at: usize| matches!(ops.get(at), Some(MapOp::WriteSlots { .. }));
    let is_within = |at: usize| at > 1 && (at - 2..=at + 1).all(is_slots);
    let tried: Vec<usize> = (0..ops.len()).filter(|&at| !is_within(at)).collect();
    assert!((40..200).contains(&tried.len()), "{} of {}", tried.len(), ops.len());
    for at in tried {
        let what = format!("after {:?}, operation {at} of {}", ops[at], ops.len());
        let (hands, broken) = changed_for_good(Some(at));
        assert_eq!(broken, 1, "{what}");
        let ended = &hands.held.image;
        assert!(ended.live_slots().all(|(_, slot)| slot.is_clean()), "{what}: a slot is on the move");
        assert!(ended.table_states.iter().all(|state| state.closing == 0), "{what}: a table is closing");
        let known = |image: &Image| image.ids().into_keys().collect::<BTreeSet<u64>>();
        assert_eq!(known(ended), known(image), "{what}: others have rows");
        assert!(leads(ended) == leads(image), "{what}: slots lead elsewhere");
        // What packets meet is what the agent takes for it.
        for (index, bits) in (0..).zip(ended.slots.iter().flat_map(|row| row.0)) {
            assert_eq!(hands.held.memory.slot_at(index).bits(), bits, "{what}: slot {index}");
        }
    }
}

#[test]
fn a_table_forgets_the_pools_that_it_had_once_the_pins_of_its_slots_are_gone() {
    let [before, after] = [", fallback: p3", ""].map(|more| config_of(4, 3, "maglev", more));
    let (mut hands, mut tracking, mut draft) = settled(&before);
    // Flows of a moment are at the fallback, and the file does without it.
    let mut fallen_back = world(&before, &[]);
    fallen_back.levels = [(1, 3)].into_iter().collect();
    tracking.reconcile(&mut hands, draft.desired(&before, &fallen_back)).expect("within the limits");
    let mut draft = Draft::after(&after, Some(&draft));
    live_on(&mut hands, &mut tracking, || draft.desired(&after, &world(&after, &[])), true);
    assert!(hands.held.image.live_slots().all(|(_, slot)| slot.is_clean()));
    let wanted = desired(&after, &world(&after, &[]));
    let more = plan(&hands.held.image, &wanted, hands.capacity(), &Leave::all()).expect("within the limits");
    assert!(more.ops.is_empty(), "left undone: {:?}", more.ops);
}

#[test]
fn a_table_that_comes_back_from_nobody_is_looked_at_until_it_forgot_the_pools_that_it_had() {
    let config = config_of(4, 3, "maglev", "");
    let (mut hands, _, mut draft) = settled(&config);
    let word = TableWord::from_bits(hands.held.image.tables[0]);
    let (first, words) = (word.first_row() * SLOTS_PER_ROW, vec![0; word.length() as usize]);
    hands.held.image.apply(&MapOp::SetPools { table: 0, pools: [u64::MAX; 3] });
    hands.held.image.apply(&MapOp::WriteSlots { first, words });
    let mut tracking = Tracking::begin(&mut hands).expect("nothing to plan");
    let wanted = draft.desired(&config, &world(&config, &[]));
    for _ in 0..2 {
        tracking.reconcile(&mut hands, wanted.clone()).expect("within the limits");
    }
    assert_ne!(hands.held.image.table_states[0].pools, [u64::MAX; 3]);
    let more = plan(&hands.held.image, &wanted, hands.capacity(), &Leave::all()).expect("within the limits");
    assert!(more.ops.is_empty(), "{:?}", more.ops);
}

/// What becomes of a backend, in the order of the numbers that are made up for it.
fn befall(world: &mut World, at: (usize, usize), what: u8) {
    world.old_flows.remove(&at);
    world.shares.remove(&at);
    world.up.insert(at, what < 3);
    match what {
        0 => {}
        1 => _ = world.shares.insert(at, 0),
        2 => _ = world.shares.insert(at, 100),
        3 => {}
        4 => _ = world.old_flows.insert(at, OldFlows::Yield),
        5 => _ = world.old_flows.insert(at, OldFlows::Fail),
        _ => _ = world.old_flows.insert(at, OldFlows::Move),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn a_plan_that_looks_at_everything_finds_no_more_than_one_that_knows_what_changed(
        steps in prop::collection::vec(
            (
                prop::collection::vec((0..3usize, 0..BACKENDS, 0..7u8), 0..4),
                0..4usize,
                any::<[bool; 3]>(),
                prop::option::weighted(0.2, 0..2usize),
            ),
            1..24,
        ),
        takes_turns in any::<bool>(),
    ) {
        const TIMES: [Duration; 4] =
            [Duration::ZERO, Duration::from_millis(300), Duration::from_secs(2), Duration::from_secs(1000)];
        let scheduler = if takes_turns { "round-robin" } else { "maglev" };
        let configs = [3, 2].map(|edited| config_of(4, edited, scheduler, ", fallback: p3"));
        let (mut hands, mut tracking, mut draft) = settled(&configs[0]);
        let mut config = &configs[0];
        let mut world = world(config, &[]);
        for (changes, passes, [falls_back, hop, pins_fail], reloads) in steps {
            if let Some(other) = reloads {
                config = &configs[other];
                draft = Draft::after(config, Some(&draft));
                let address = config.pools[2].backends[BACKENDS - 1].address;
                Arc::make_mut(&mut world.next_hops).insert(address, next_hop((INGRESS, 1500, 1)));
            }
            if pins_fail {
                // What would only be a better spread waits.
                hands.held.memory.add_failed(0);
            }
            changes.into_iter().for_each(|(pool, backend, what)| befall(&mut world, (pool, backend), what));
            world.levels = if falls_back { [(1, 3)].into_iter().collect() } else { Default::default() };
            if hop {
                let other = next_hop((INGRESS, 1400 + passes as u16, 1));
                Arc::make_mut(&mut world.next_hops).insert(config.pools[1].backends[0].address, other);
            }
            hands.held.memory.pass(TIMES[passes]);
            // `est` follows, a sweep begins and ends.
            for _ in 0..3 {
                tracking.look_after(&mut hands).expect("a look");
            }
            let wanted = draft.desired(config, &world);
            tracking.reconcile(&mut hands, wanted.clone()).expect("within the limits");
            let leave = Leave { unpinned: Unpinned::Ids(HashSet::new()), moves: 0, ..Leave::all() };
            let more = plan(&hands.held.image, &wanted, hands.capacity(), &leave).expect("within the limits");
            prop_assert_eq!(more.waiting, tracking.waiting);
            prop_assert!(more.ops.is_empty(), "{:?}", more.ops);
        }
        prop_assert!(draft.desired(config, &world) == desired(config, &world));
    }
}
