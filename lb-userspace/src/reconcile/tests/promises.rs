//! Single promises of plans, each with the smallest state that shows it.

use super::*;

/// One service on one VIP and a pool of so many backends.
pub fn simple(backends: u16) -> State {
    let mut state = State::empty();
    let backends = (0..backends).map(|host| (host * 2, (100, true))).collect();
    let pool = PoolState { name: 0, forward: Forward::Ipip, on_empty: OnEmpty::Drop, backends };
    state.pools.insert(0, pool);
    let (vips, ports) = (BTreeSet::from([0]), BTreeSet::from([1]));
    let service = ServiceState { pool: 0, vips, ports, protocols: vec![Protocol::Tcp], kind: PLAIN };
    state.services.insert(0, service);
    state
}

pub fn applied(image: &mut Image, state: &State) -> Vec<MapOp> {
    let ops = plan_at_once(image, &state.desired(), &capacity()).expect("within the limits");
    ops.iter().for_each(|op| image.apply(op));
    ops
}

/// Applied, and all flows of before are silent.
pub fn settled(image: &mut Image, state: &State) {
    applied(image, state);
    settle(image, &state.desired()).unwrap_or_else(|error| panic!("{error}"));
}

pub fn only_vip(state: &State) -> Probe {
    *Ends::of(&state.desired()).probes().first().expect("a VIP")
}

/// Slot words of the one table.
pub fn words(image: &Image) -> Vec<Slot> {
    regions(image).into_iter().next().expect("a table").map(|index| image.slot(index)).collect()
}

pub fn identity_in_first_pool(state: &State, address: IpAddr) -> u64 {
    let pool = &state.config().pools[0];
    backend_identity(&pool.name, pool.forward, address)
}

/// Slots of a table that takes turns are never clean: its copy is given up all the same.
#[test]
pub fn a_service_that_goes_to_a_pool_in_turns_shares_its_table_once_old_flows_are_silent() {
    let (mut image, mut state) = (fresh(), simple(4));
    applied(&mut image, &state);
    apply(&mut state, &Change::AddPool(2, 1, Forward::Ipip, 0));
    let turns = Kind { scheduler: Scheduler::WeightedRoundRobin, ..PLAIN };
    let vips = BTreeSet::from([0, 2]);
    apply(&mut state, &Change::AddService(0, 2, vips, BTreeSet::from([1]), false, turns));
    applied(&mut image, &state);
    assert_eq!(image.tables.iter().filter(|word| **word != 0).count(), 2, "old flows are of one VIP alone");
    settled(&mut image, &state);
    assert!(
        read_back(&image, &state.desired()) == state.desired(),
        "{}",
        difference(&image, &state.desired())
    );
}

#[test]
pub fn losing_one_of_n_changes_its_slots_and_nothing_else() {
    for n in [2, 3, 7, 40, 41] {
        let mut state = simple(n);
        let mut image = fresh();
        applied(&mut image, &state);
        let before = words(&image);
        let identity = identity_in_first_pool(&state, backend_address(2));
        let dead = image.ids()[&identity];
        state.pools.get_mut(&0).unwrap().backends.get_mut(&2).unwrap().1 = false;
        let ops = applied(&mut image, &state);
        let (flags, slots) = ops.split_first().expect("something changes");
        assert_eq!(*flags, MapOp::SetFlags { id: dead, flags: 0 }, "{n}");
        assert!(slots.iter().all(|op| matches!(op, MapOp::WriteSlots { .. })), "{n}: {slots:?}");
        let written: usize =
            ops.iter().map(|op| if let MapOp::WriteSlots { words, .. } = op { words.len() } else { 0 }).sum();
        let after = words(&image);
        let lost = before.iter().filter(|slot| slot.cur() == dead).count();
        assert_eq!(written, lost, "{n}: slots written");
        for (old, new) in before.iter().zip(&after) {
            if old.cur() == dead {
                assert_eq!((new.est(), new.dirty()), (dead, true), "{n}: its flows stay");
                assert_ne!(new.cur(), dead, "{n}: new ones go elsewhere");
            } else {
                assert_eq!(old, new, "{n}");
            }
        }
        state.pools.get_mut(&0).unwrap().backends.get_mut(&2).unwrap().1 = true;
        applied(&mut image, &state);
        let back = words(&image);
        assert!(back.iter().all(|slot| !slot.dirty()), "{n}: back where the old flows are");
        settled(&mut image, &state);
        assert_eq!(words(&image), before, "{n}: healing brings exactly those back");
    }
}

#[test]
pub fn the_id_of_a_backend_that_left_rests_until_nothing_names_it() {
    let mut state = simple(5);
    let mut image = fresh();
    applied(&mut image, &state);
    let id_of = |image: &Image, state: &State, host| {
        image.ids().get(&identity_in_first_pool(state, backend_address(host))).copied()
    };
    let gone = id_of(&image, &state, 4).expect("a row");
    let pool = state.pools.get_mut(&0).unwrap();
    pool.backends.remove(&4);
    pool.backends.insert(100, (100, true));
    applied(&mut image, &state);
    assert_ne!(id_of(&image, &state, 100), Some(gone), "its slots have their old flows there");
    assert_eq!(id_of(&image, &state, 4), Some(gone), "the row is the reservation");
    let wanted = state.desired();
    finishing(&image, &wanted).iter().for_each(|op| image.apply(op));
    assert!(words(&image).iter().all(|slot| !ids_of(*slot).contains(&gone)));
    let pinned = Leave { unpinned: Unpinned::Ids(HashSet::new()), ..Leave::all() };
    let ops = plan(&image, &wanted, &capacity(), &pinned).expect("within the limits").ops;
    assert_eq!(ops, [], "a pin may name it");
    let unpinned = Leave { unpinned: Unpinned::Ids(HashSet::from([gone])), ..pinned };
    let ops = plan(&image, &wanted, &capacity(), &unpinned).expect("within the limits").ops;
    let free = MapOp::WriteBackend { id: gone, backend: BackendRow::default() };
    assert_eq!(ops, [MapOp::Grace, free], "nothing names it");
    ops.iter().for_each(|op| image.apply(op));
    state.pools.get_mut(&0).unwrap().backends.insert(102, (100, true));
    applied(&mut image, &state);
    assert_eq!(id_of(&image, &state, 102), Some(gone), "given away again");
}

#[test]
pub fn a_table_that_crosses_a_length_class_moves_whole_and_its_old_place_rests_for_a_grace() {
    let mut image = fresh();
    let mut state = simple(40);
    applied(&mut image, &state);
    let (short, before) = (regions(&image), words(&image));
    state.pools.get_mut(&0).unwrap().backends.insert(1000, (100, true));
    let ops = applied(&mut image, &state);
    let moved = ops.iter().position(|op| matches!(op, MapOp::SetTableWord { .. })).expect("a new place");
    assert_eq!(ops[moved + 1], MapOp::Grace, "whoever read the old word goes by the old slots");
    assert_eq!(
        *ops.last().unwrap(),
        MapOp::Grace,
        "whoever read the old word must be done before the place is used again"
    );
    let after = words(&image);
    assert_eq!(after.len(), 1 << 14);
    assert!(
        after.iter().enumerate().all(|(index, slot)| slot.est() == before[index / 4].est()),
        "flows stay"
    );
    assert!(!regions(&image).contains(&short[0]));
    settled(&mut image, &state);
    state.pools.get_mut(&0).unwrap().backends.remove(&1000);
    settled(&mut image, &state);
    assert_eq!(words(&image).len(), 1 << 14, "what has grown stays");
    assert!(words(&image).iter().enumerate().all(|(index, slot)| *slot == before[index / 4]), "as before");
}

#[test]
pub fn the_place_that_a_table_left_is_filled_anew_only_when_nobody_reads_it() {
    let mut run = Run::new();
    let mut state = simple(40);
    let mut step =
        |state: &State| run.step(state.desired(), &[1, 2, 3]).unwrap_or_else(|error| panic!("{error}"));
    step(&state);
    state.pools.get_mut(&0).unwrap().backends.insert(1000, (100, true));
    step(&state);
    // The next plan begins with a table that fits the old place.
    apply(&mut state, &Change::AddPool(1, 3, Forward::Ipip, 0));
    apply(&mut state, &Change::AddService(1, 1, BTreeSet::from([0]), BTreeSet::from([1]), false, PLAIN));
    step(&state);
}

#[test]
pub fn a_next_hop_that_goes_takes_the_slots_away_before_the_path() {
    let mut image = fresh();
    let mut state = simple(3);
    applied(&mut image, &state);
    state.hops.insert(2, None);
    let vip = only_vip(&state);
    for op in plan_at_once(&image, &state.desired(), &capacity()).unwrap() {
        image.apply(&op);
        for flow in 0..60 {
            let outcome = send(&image, &vip, flow, SAYS[0]).outcome;
            assert_eq!(outcome.action(), Action::Transmit, "after {}: {outcome:?}", brief(&op));
        }
    }
    settled(&mut image, &state);
    assert!(read_back(&image, &state.desired()) == state.desired());
}

#[test]
pub fn a_next_hop_that_changes_is_one_store_and_its_old_way_out_is_cleared_after_a_grace() {
    let mut image = fresh();
    let mut state = simple(1);
    applied(&mut image, &state);
    state.hops.insert(0, Some((2, 1280, 9)));
    let ops = applied(&mut image, &state);
    let kinds: Vec<&str> = ops
        .iter()
        .map(|op| match op {
            MapOp::WriteEgress { egress, .. } if *egress == Egress::default() => "clear egress",
            MapOp::WriteEgress { .. } => "fill egress",
            MapOp::SetPath { .. } => "path",
            MapOp::Grace => "grace",
            _ => "other",
        })
        .collect();
    assert_eq!(kinds, ["fill egress", "path", "grace", "clear egress"]);
    assert_eq!(send(&image, &only_vip(&state), 1, SAYS[0]).outcome, Outcome::ForwardRedirect);
}

/// Each is refused as a whole: a plan is all or nothing.
#[test]
pub fn limits_are_refused_before_anything_is_planned() {
    let base = simple(3);
    assert_eq!(capacity().rule_half_rows() * RULES_PER_ROW, LIMITS.vips);
    let refused = |limits: Limits, state: &State| {
        let capacity = Capacity::new(&limits);
        let image = Image::empty(&capacity, Meta::default());
        plan_at_once(&image, &state.desired(), &capacity).err()
    };
    assert_eq!(refused(LIMITS, &base), None);
    let mut ports = base.clone();
    ports.services.get_mut(&0).unwrap().ports = (1..20).collect();
    let vips = refused(Limits { vips: 10, ..LIMITS }, &ports);
    assert_eq!(vips, Some(PlanError::Vips { needed: 19, limit: 10 }));
    let mut protocols = base.clone();
    protocols.services.get_mut(&0).unwrap().protocols = vec![Protocol::Tcp, Protocol::Udp];
    let tables = refused(Limits { slots: 1 << 12, ..LIMITS }, &protocols);
    assert_eq!(tables, Some(PlanError::Tables { needed: 2, limit: 1 }));
    let slots = refused(Limits { slots: 2 << 12, ..LIMITS }, &simple(41));
    assert_eq!(slots, Some(PlanError::Slots { slots: 1 << 14 }));
    let mut capacity = Capacity::new(&LIMITS);
    capacity.egress_rows = 2;
    let image = Image::empty(&capacity, Meta::default());
    let mut hops = base.clone();
    hops.hops.insert(2, Some((2, 1500, 1)));
    let egress = plan_at_once(&image, &hops.desired(), &capacity).err();
    assert_eq!(egress, Some(PlanError::Egress { limit: 2 }));
    let mut capacity = Capacity::new(&LIMITS);
    capacity.backend_rows = 4;
    let image = Image { backends: vec![BackendRow::default(); 4], ..fresh() };
    let backends = plan_at_once(&image, &base.desired(), &capacity).err();
    assert_eq!(backends, Some(PlanError::Backends { needed: 3, limit: MOST_BACKENDS }));
}

/// What fits the limits can be reached from everything else that fits them.
#[test]
pub fn vips_up_to_the_limit_can_be_replaced_by_as_many_others() {
    let limits = Limits { vips: 8, ..LIMITS };
    let capacity = Capacity::new(&limits);
    let mut image = Image::empty(&capacity, fresh().meta);
    let mut state = simple(2);
    for (first, count) in [(1u16, 8), (9, 8), (5, 8), (1, 1), (2, 8), (40, 8)] {
        state.services.get_mut(&0).unwrap().ports = (first..first + count).collect();
        let ops = plan_at_once(&image, &state.desired(), &capacity);
        let ops = ops.unwrap_or_else(|error| panic!("ports from {first}: {error}"));
        ops.iter().for_each(|op| image.apply(op));
        let rows: Vec<u32> = counter_rows(&present_vips(&image)).into_values().collect();
        let rows_of_map =
            capacity.rows().iter().find(|map| map.name == lb_common::abi::map::VIP_TRAFFIC).unwrap().rows;
        assert!(
            rows.iter().all(|&row| row < rows_of_map),
            "counters beyond the map: {rows:?} of {rows_of_map}"
        );
    }
}

#[test]
pub fn features_follow_what_is_configured() {
    use lb_common::abi::Features;
    let mut state = simple(1);
    assert_eq!(features(&state.config()), Features::IPV4.with(Features::IPIP4));
    state.pools.get_mut(&0).unwrap().backends.insert(1, (100, true));
    assert_eq!(features(&state.config()), Features::IPV4.with(Features::IPIP4).with(Features::IPIP6));
    state.services.get_mut(&0).unwrap().vips.insert(1);
    state.pools.get_mut(&0).unwrap().forward = Forward::L2;
    assert_eq!(features(&state.config()), Features::IPV4.with(Features::IPV6).with(Features::L2));
    state.pools.get_mut(&0).unwrap().forward = Forward::Gue { port: 6080 };
    let gue = Features::GUE4.with(Features::GUE6);
    assert_eq!(features(&state.config()), Features::IPV4.with(Features::IPV6).with(gue));
    let ways = Features::IPV4.with(Features::IPV6).with(gue);
    let service = state.services.get_mut(&0).unwrap();
    service.kind.any = true;
    let rules = ways.with(Features::PORT_RULES);
    assert_eq!(features(&state.config()), rules);
    state.services.get_mut(&0).unwrap().kind = Kind { scheduler: Scheduler::SourceHash, ..PLAIN };
    assert_eq!(features(&state.config()), ways.with(Features::SOURCE_HASH));
    let service = state.services.get_mut(&0).unwrap();
    (service.kind, service.vips) = (PLAIN, BTreeSet::from([1, 8]));
    assert_eq!(features(&state.config()), rules.with(Features::PREFIXES));
    assert_eq!(features(&State::empty().config()), Features::default());
}

#[test]
pub fn the_row_of_a_backend_says_all_of_its_tunnel() {
    let gue = Forward::Gue { port: 7000 };
    let rows = [
        ("ipip over IPv4", Forward::Ipip, 0, BackendKind::Ipip4, 0, true),
        ("ipip over IPv6", Forward::Ipip, 1, BackendKind::Ipip6, 0, false),
        ("gue over IPv4", gue, 0, BackendKind::Gue4, 7000, true),
        ("gue over IPv6", gue, 1, BackendKind::Gue6, 7000, false),
        ("nat to an IPv4 address", Forward::Nat { port: 8080 }, 0, BackendKind::Nat4, 8080, true),
        ("fullnat to an IPv6 address", Forward::Fullnat { port: 0 }, 1, BackendKind::Fullnat6, 0, false),
        ("l2 to an IPv4 address", Forward::L2, 0, BackendKind::L2, 0, false),
        ("l2 to an IPv6 address", Forward::L2, 1, BackendKind::L2, 0, false),
    ];
    for (name, forward, host, kind, port, has_outer_sum) in rows {
        let mut state = simple(0);
        let pool = state.pools.get_mut(&0).unwrap();
        pool.forward = forward;
        pool.backends.insert(host, (100, true));
        let desired = state.desired();
        let row = desired.backends.values().next().unwrap().row;
        assert_eq!((row.kind, row.port.get(), row.overhead), (kind as u8, port, kind.overhead()), "{name}");
        assert_eq!(row.outer_sum != 0, has_outer_sum, "{name}");
        assert_eq!(forward_of(&row), Some(forward), "{name}");
    }
}

#[test]
pub fn another_port_of_the_tunnel_is_another_backend() {
    let mut image = fresh();
    let mut state = simple(1);
    let mut ids_met = BTreeSet::new();
    for forward in [Forward::Ipip, Forward::Gue { port: 6080 }, Forward::Gue { port: 7000 }] {
        state.pools.get_mut(&0).unwrap().forward = forward;
        settled(&mut image, &state);
        assert!(read_back(&image, &state.desired()) == state.desired(), "{forward:?}");
        let id = words(&image)[0].cur();
        assert_eq!(forward_of(&image.backends[usize::from(id)]), Some(forward));
        assert!(ids_met.insert(*state.desired().backends.keys().next().unwrap()), "{forward:?}");
    }
}

#[test]
fn services_that_come_to_a_new_table_from_different_ones_share_it_in_the_end() {
    let mut state = State::empty();
    let service = |id, pool, vip| {
        Change::AddService(id, pool, BTreeSet::from([vip]), BTreeSet::from([1]), false, PLAIN)
    };
    for change in [
        Change::AddPool(0, 4, Forward::Ipip, 0),
        Change::AddPool(1, 1, Forward::Ipip, 0),
        service(0, 0, 0),
        service(2, 1, 1),
    ] {
        apply(&mut state, &change);
    }
    let mut image = fresh();
    settled(&mut image, &state);
    // Both bring a table of their own along, and nobody goes by the shared one yet.
    apply(&mut state, &Change::MoveService(2, 0));
    apply(&mut state, &Change::RenamePool(0, 2));
    settled(&mut image, &state);
    let tables = image.table_states.iter().filter(|state| state.identity != 0).count();
    assert_eq!(tables, 1, "copies stay for ever");
}
