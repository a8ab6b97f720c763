//! Random changes of a state, several at once, carried out whole or broken off.

use super::*;

/// Balancer tables under a sequence of states.
pub struct Run {
    pub image: Image,
    pub state: Desired,
    pub readable: Readable,
}

impl Run {
    pub fn new() -> Self {
        let image = fresh();
        let readable = Readable::of(&image);
        Self { image, state: Desired::default(), readable }
    }

    /// Goes to the next state, looking at packets after every operation: first those of the plan, then, as if all flows
    /// had been silent for long, those that let `est` follow and free what rests.
    pub fn step(&mut self, next: Desired, flows: &[u16]) -> Result<(), TestCaseError> {
        let old = std::mem::take(&mut self.state);
        let ids_before = self.image.ids();
        let sources_before = self.image.sources.clone();
        let mut probes = Probes::of(&old, &next, flows);
        let mut all = Vec::new();
        let mut ops = planned(&self.image, &next)?;
        let mut rounds = 0;
        while !ops.is_empty() {
            self.carry_out(&ops, &mut probes)?;
            all.append(&mut ops);
            ops = settling(&self.image, &next)?;
            rounds += 1;
            prop_assert!(rounds < 10, "never at rest");
        }
        prop_assert!(read_back(&self.image, &next) == next, "{}", difference(&self.image, &next));
        prop_assert_eq!(planned(&self.image, &next)?, [], "planned twice");
        self.ids_stay(&ids_before, &next, &all)?;
        self.sources_stay(&sources_before)?;
        self.nothing_overlaps()?;
        self.state = next;
        Ok(())
    }

    pub fn carry_out(&mut self, ops: &[MapOp], probes: &mut Probes<'_>) -> Result<(), TestCaseError> {
        for (number, op) in ops.iter().enumerate() {
            let place = || format!("op {number} of {}, {}", ops.len(), brief(op));
            let objection = self.readable.objection(&self.image, op);
            prop_assert!(objection.is_none(), "{}: {}", place(), objection.unwrap());
            self.image.apply(op);
            match op {
                MapOp::Grace => self.readable = Readable::of(&self.image),
                // Of a live table or of none: `note` sees the latter when a word makes it live.
                MapOp::WriteSlots { words, .. } => self.readable.note_slots(words, &self.image),
                // What packets can reach is the same.
                MapOp::SetFlags { .. }
                | MapOp::SetClosing { .. }
                | MapOp::ExpectFailed { .. }
                | MapOp::DropPins { .. }
                | MapOp::SetLoadWeight { .. }
                | MapOp::ResetBackendTraffic { .. }
                | MapOp::ResetVipTraffic { .. } => {}
                _ => self.readable.note(&self.image),
            }
            let seen = probes.look(&self.image, op);
            seen.map_err(|wrong| TestCaseError::fail(format!("after {}: {wrong}", place())))?;
        }
        Ok(())
    }

    /// An address that is still there is where it was: connections name its row.
    fn sources_stay(&self, before: &[Source]) -> Result<(), TestCaseError> {
        let now = &self.image.sources;
        for (row, source) in before.iter().enumerate() {
            let elsewhere4 = now.iter().position(|other| source.v4 != 0 && other.v4 == source.v4);
            let elsewhere6 = now.iter().position(|other| source.v6 != [0; 2] && other.v6 == source.v6);
            prop_assert!(elsewhere4.is_none_or(|place| place == row), "{:?} has moved", source);
            prop_assert!(elsewhere6.is_none_or(|place| place == row), "{:?} has moved", source);
        }
        Ok(())
    }

    pub fn ids_stay(&self, before: &Ids, next: &Desired, ops: &[MapOp]) -> Result<(), TestCaseError> {
        let now = self.image.ids();
        for (identity, id) in before {
            if next.backends.contains_key(identity) {
                prop_assert_eq!(now.get(identity), Some(id), "the id of an unchanged backend");
            }
        }
        let freed: HashSet<u16> = before
            .iter()
            .filter(|(identity, _)| !next.backends.contains_key(identity))
            .map(|(_, id)| *id)
            .collect();
        for op in ops {
            if let MapOp::WriteBackend { id, backend } = op {
                prop_assert!(
                    *backend == BackendRow::default() || !freed.contains(id),
                    "id {} is given away while it rests",
                    id
                );
            }
        }
        Ok(())
    }

    pub fn nothing_overlaps(&self) -> Result<(), TestCaseError> {
        let mut regions = regions(&self.image);
        regions.sort_by_key(|region| region.start);
        for pair in regions.windows(2) {
            prop_assert!(pair[0].end <= pair[1].start, "{:?} overlap", pair);
        }
        for region in regions {
            for index in region.step_by(97) {
                for id in ids_of(self.image.slot(index)) {
                    let row = &self.image.backends[usize::from(id)];
                    prop_assert!(
                        id == BACKEND_NOBODY || id == BACKEND_PASS || row.identity != 0,
                        "slot {} names a free id",
                        index
                    );
                }
            }
        }
        let rows = counter_rows(&present_vips(&self.image));
        let different: HashSet<u32> = rows.values().copied().collect();
        prop_assert_eq!(different.len(), rows.len(), "two VIPs share counters");
        for target in service_targets(&self.image) {
            prop_assert!(different.contains(&target.vip()), "what is counted in row {}?", target.vip());
        }
        Ok(())
    }
}

pub fn brief(op: &MapOp) -> String {
    let text = format!("{op:?}");
    text.chars().take(120).collect()
}

// ---- Random changes ------------------------------------------------------------------------------

#[derive(Debug, Clone)]
pub enum Change {
    AddPool(u8, u8, Forward, u8),
    RemovePool(u8),
    RenamePool(u8, u8),
    OnEmpty(u8, u8),
    AddBackends(u8, u16, u8),
    RemoveBackends(u8, u8),
    Weight(u8, u8, u8),
    Flip(u8, u8),
    FlipAll(u8, bool),
    Hop(u16, Option<(u32, u16, u8)>),
    /// Every hop of an interface becomes another, as when a gateway or an MTU changes.
    AllHops(Option<(u32, u16, u8)>),
    AddService(u8, u8, BTreeSet<u8>, BTreeSet<u16>, bool, Kind),
    RemoveService(u8),
    /// The service goes to another pool.
    MoveService(u8, u8),
    /// Addresses that clients' are translated to.
    Sources(BTreeSet<u8>),
    /// To 41 backends, over a length class, or back to 40.
    Class(u8, bool),
}

pub fn change() -> impl Strategy<Value = Change> {
    let hop = || prop::option::weighted(0.8, (1u32..4, prop::sample::select(vec![1280u16, 1500]), 1u8..4));
    let small = 0u8..5;
    let gue = [6080, 7000].map(|port| Forward::Gue { port });
    let nat = [Forward::Nat { port: 0 }, Forward::Nat { port: 8080 }, Forward::Fullnat { port: 0 }];
    let way = prop::sample::select([&[Forward::Ipip, Forward::L2][..], &gue, &nat].concat());
    let weight = prop::sample::select(vec![0u8, 1, 50, 100]);
    let vips = prop::collection::btree_set(0u8..12, 1..4);
    let ports = prop::collection::btree_set(1u16..5, 0..3);
    prop_oneof![
        2 => (small.clone(), 1u8..6, way, 0u8..3)
            .prop_map(|(p, n, way, e)| Change::AddPool(p, n, way, e)),
        1 => small.clone().prop_map(Change::RemovePool),
        1 => (small.clone(), 0u8..10).prop_map(|(p, n)| Change::RenamePool(p, n)),
        1 => (small.clone(), 0u8..3).prop_map(|(p, e)| Change::OnEmpty(p, e)),
        3 => (small.clone(), 0u16..300, 1u8..4).prop_map(|(p, h, n)| Change::AddBackends(p, h, n)),
        2 => (small.clone(), 1u8..4).prop_map(|(p, n)| Change::RemoveBackends(p, n)),
        2 => (small.clone(), 0u8..8, weight).prop_map(|(p, b, w)| Change::Weight(p, b, w)),
        4 => (small.clone(), 0u8..8).prop_map(|(p, b)| Change::Flip(p, b)),
        1 => (small.clone(), any::<bool>()).prop_map(|(p, up)| Change::FlipAll(p, up)),
        3 => (0u16..300, hop()).prop_map(|(host, hop)| Change::Hop(host, hop)),
        1 => hop().prop_map(Change::AllHops),
        4 => (small.clone(), small.clone(), vips, ports, any::<bool>(), kind())
            .prop_map(|(s, p, v, ports, both, kind)| Change::AddService(s, p, v, ports, both, kind)),
        1 => small.clone().prop_map(Change::RemoveService),
        2 => (small.clone(), small.clone()).prop_map(|(s, p)| Change::MoveService(s, p)),
        1 => prop::collection::btree_set(1u8..8, 0..4).prop_map(Change::Sources),
        1 => (small, any::<bool>()).prop_map(|(p, grow)| Change::Class(p, grow)),
    ]
}

pub fn kind() -> impl Strategy<Value = Kind> {
    let unmapped = prop::sample::select(vec![None, Some(Unmapped::Pass), Some(Unmapped::Reject)]);
    let schedulers = [Scheduler::Maglev, Scheduler::SourceHash, Scheduler::WeightedRoundRobin];
    (any::<bool>(), any::<bool>(), prop::sample::select(schedulers.to_vec()), unmapped)
        .prop_map(|(range, any, scheduler, unmapped)| Kind { range, any, scheduler, unmapped })
}

pub fn on_empty(number: u8) -> OnEmpty {
    [OnEmpty::Drop, OnEmpty::Pass, OnEmpty::All][usize::from(number % 3)]
}

pub fn apply(state: &mut State, change: &Change) {
    match change {
        Change::AddPool(pool, backends, forward, empty) => {
            state.pools.entry(*pool).or_insert_with(|| PoolState {
                name: *pool,
                forward: *forward,
                on_empty: on_empty(*empty),
                backends: (0..u16::from(*backends))
                    .map(|host| (u16::from(*pool) * 50 + host, (100, true)))
                    .collect(),
            });
        }
        Change::Sources(sources) => state.sources.clone_from(sources),
        Change::RemovePool(pool) => {
            state.pools.remove(pool);
            state.services.retain(|_, service| service.pool != *pool);
        }
        Change::RenamePool(pool, name) => {
            let taken = state.pools.values().any(|pool| pool.name == *name);
            if let (Some(pool), false) = (state.pools.get_mut(pool), taken) {
                pool.name = *name;
            }
        }
        Change::OnEmpty(pool, empty) => {
            if let Some(pool) = state.pools.get_mut(pool) {
                pool.on_empty = on_empty(*empty);
            }
        }
        Change::AddBackends(pool, first, count) => {
            if let Some(pool) = state.pools.get_mut(pool) {
                (0..u16::from(*count))
                    .for_each(|i| _ = pool.backends.entry(first + i).or_insert((100, true)));
            }
        }
        Change::RemoveBackends(pool, count) => {
            if let Some(pool) = state.pools.get_mut(pool) {
                (0..*count).for_each(|_| _ = pool.backends.pop_first());
            }
        }
        Change::Weight(pool, backend, weight) => {
            if let Some(backend) = nth(state, *pool, *backend) {
                backend.0 = *weight;
            }
        }
        Change::Flip(pool, backend) => {
            if let Some(backend) = nth(state, *pool, *backend) {
                backend.1 = !backend.1;
            }
        }
        Change::FlipAll(pool, up) => {
            if let Some(pool) = state.pools.get_mut(pool) {
                pool.backends.values_mut().for_each(|backend| backend.1 = *up);
            }
        }
        Change::Hop(host, hop) => _ = state.hops.insert(*host, *hop),
        Change::AllHops(hop) => {
            let hosts: Vec<u16> =
                state.pools.values().flat_map(|pool| pool.backends.keys().copied()).collect();
            state.hops.extend(hosts.into_iter().map(|host| (host, *hop)));
        }
        Change::AddService(service, pool, vips, ports, both, kind) => {
            let protocols = if *both { vec![Protocol::Tcp, Protocol::Udp] } else { vec![Protocol::Tcp] };
            if state.pools.contains_key(pool) {
                let (vips, ports) = (vips.clone(), ports.clone());
                let new = ServiceState { pool: *pool, vips, ports, protocols, kind: *kind };
                state.services.insert(*service, new);
            }
        }
        Change::RemoveService(service) => _ = state.services.remove(service),
        Change::MoveService(service, pool) => {
            if let (Some(service), true) = (state.services.get_mut(service), state.pools.contains_key(pool)) {
                service.pool = *pool;
            }
        }
        Change::Class(pool, grow) => {
            if let Some(pool) = state.pools.get_mut(pool) {
                let want = if *grow { 41 } else { 40 };
                let mut host = 1000;
                while pool.backends.len() < want {
                    pool.backends.insert(host, (100, true));
                    host += 1;
                }
                while pool.backends.len() > want {
                    pool.backends.pop_last();
                }
            }
        }
    }
}

pub fn nth(state: &mut State, pool: u8, backend: u8) -> Option<&mut (u8, bool)> {
    let pool = state.pools.get_mut(&pool)?;
    let count = pool.backends.len();
    pool.backends.values_mut().nth(usize::from(backend) % count.max(1))
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: cases(32),
        failure_persistence: None,
        max_shrink_iters: 500,
        ..ProptestConfig::default()
    })]

    /// Several changes may come at once, as they do in a configuration that is read again. Few tables are whole.
    #[test]
    fn every_operation_of_every_plan_leaves_packets_with_a_backend_of_the_old_or_the_new_state(
        steps in prop::collection::vec(prop::collection::vec(change(), 1..6), 1..14),
        flows in prop::collection::vec(0u16..50_000, 3),
        whole in prop::bool::weighted(0.1),
    ) {
        let wanted = |state: &State| if whole { state.desired() } else { thinned(state.desired()) };
        let mut run = Run::new();
        let mut state = State::empty();
        // Something to begin with.
        apply(&mut state, &Change::AddPool(0, 4, Forward::Ipip, 0));
        let service = Change::AddService(0, 0, BTreeSet::from([0, 1]), BTreeSet::from([1, 2]), true, PLAIN);
        apply(&mut state, &service);
        run.step(wanted(&state), &flows)?;
        for changes in &steps {
            changes.iter().for_each(|change| apply(&mut state, change));
            run.step(wanted(&state), &flows)?;
        }
        run.step(Desired::default(), &flows)?;
        prop_assert_eq!(run.image.backends, fresh().backends, "nothing is left of the backends");
        prop_assert_eq!(run.image.egress, fresh().egress, "nothing is left of the ways out");
        prop_assert_eq!((run.image.tables, run.image.vip_index), (fresh().tables, fresh().vip_index));
    }

    /// A write that fails, or an agent that dies, may stop a plan anywhere.
    #[test]
    fn a_plan_that_breaks_off_anywhere_is_completed_by_the_next(
        steps in prop::collection::vec(
            (prop::collection::vec(change(), 1..6), any::<prop::sample::Index>()),
            1..8,
        ),
    ) {
        let mut image = fresh();
        let mut state = State::empty();
        for (changes, stop) in &steps {
            changes.iter().for_each(|change| apply(&mut state, change));
            let next = thinned(state.desired());
            let Ok(ops) = plan_at_once(&image, &next, &capacity()) else { continue };
            ops[..stop.index(ops.len() + 1)].iter().for_each(|op| image.apply(op));
            // Another state comes before the first was reached, or the same is planned again.
            if stop.index(2) == 0 {
                let again = plan_at_once(&image, &next, &capacity());
                prop_assert!(again.is_ok(), "{:?}", again);
                again.unwrap().iter().for_each(|op| image.apply(op));
                settle(&mut image, &next)?;
                prop_assert!(read_back(&image, &next) == next, "{}", difference(&image, &next));
            }
        }
    }
}
