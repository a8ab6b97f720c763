//! How the agent lives with slots on the move: it carries operations out in the maps, looks after the slots at a steady
//! pace, and says when a backend's flows go. The rules are in `reconcile`; this knows the clock.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use lb_common::abi::Pin;

use super::core::{BackendKey, Core, ReconcileError, keys};
use super::snapshot::Index;
use crate::bpf::Datapath;
use crate::capacity::Capacity;
use crate::config::model::OnDown;
use crate::health::State;
use crate::reconcile::desired::{BackendRef, OldFlows, desired, meet, pool_set};
use crate::reconcile::image::Image;
use crate::reconcile::op::MapOp;
use crate::reconcile::pins::coarse_ns;
use crate::reconcile::tracking::Hands;

pub use crate::reconcile::tracking::Tracking;

/// The agent looks after slots this often.
pub const TICK: Duration = Duration::from_millis(50);

/// The maps, and what goes by them.
struct CoreHands<'c> {
    datapath: &'c mut Datapath,
    image: &'c mut Image,
    index: &'c mut OnceLock<Arc<Index>>,
}

impl Hands for CoreHands<'_> {
    type Error = ReconcileError;

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn age(&self) -> u16 {
        Pin::age_of(coarse_ns())
    }

    fn image(&self) -> &Image {
        self.image
    }

    fn capacity(&self) -> &Capacity {
        self.datapath.capacity()
    }

    fn read_states(&mut self) {
        for (table, word) in (0u16..).zip(&self.image.tables) {
            if *word != 0 {
                let state = &mut self.image.table_states[usize::from(table)];
                (state.failed, state.turn) = self.datapath.maps.failed_and_turn(table);
            }
        }
    }

    fn apply(&mut self, op: &MapOp) -> Result<bool, ReconcileError> {
        if *op != MapOp::Grace {
            self.index.take();
        }
        let goes_on = self.datapath.maps.apply(op)?;
        if goes_on {
            self.image.apply(op);
        }
        Ok(goes_on)
    }

    fn set_active(&mut self, id: u16, active: u64) {
        self.datapath.maps.set_active(id, active);
    }
}

impl Core {
    fn hands(&mut self) -> (&mut Tracking, CoreHands<'_>) {
        let Self { datapath, image, index, tracking, .. } = self;
        (tracking, CoreHands { datapath, image, index })
    }

    /// Before anything is planned over maps that were there.
    pub(super) fn begin_tracking(&mut self) -> Result<(), ReconcileError> {
        let (tracking, mut hands) = self.hands();
        *tracking = Tracking::begin(&mut hands)?;
        Ok(())
    }

    /// Brings the maps in line with what is configured and alive.
    pub fn reconcile(&mut self) -> Result<(), ReconcileError> {
        let now = Instant::now();
        if !self.changed && !self.tracking.is_paced(now) {
            return Ok(());
        }
        let world = self.steered_world(now);
        self.say_who_is_empty(&world);
        let wanted = desired(&self.config, &world);
        let (tracking, mut hands) = self.hands();
        tracking.reconcile(&mut hands, wanted)?;
        self.changed = false;
        Ok(())
    }

    /// Looks after slots on the move. Called every `TICK`.
    pub fn look_after_slots(&mut self) -> Result<(), ReconcileError> {
        self.changed |= self.flows_are_due(Instant::now());
        let (tracking, mut hands) = self.hands();
        let changed = tracking.look_after(&mut hands)?;
        self.changed |= changed;
        self.reconcile()
    }

    /// What becomes of the flows of backends that are down, or whose time is over.
    pub(super) fn old_flows(&self, now: Instant) -> HashMap<BackendRef, OldFlows> {
        let mut old_flows = HashMap::new();
        let (without_room, most_are_down) = (self.without_room(now), self.most_are_down());
        for (key, pool, backend) in keys(&self.config) {
            let Some(fsm) = self.fsms.get(&key).filter(|fsm| fsm.state() == State::Down) else { continue };
            let flows = &self.config.pools[pool].flows;
            let down_for = fsm.since().map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
            let fails = match flows.on_down {
                OnDown::Keep => false,
                OnDown::Move => true,
                // Answered by the host itself, or silent for long while most others answer: else it may be us.
                OnDown::Auto => fsm.is_hard() || down_for >= flows.down_grace && !most_are_down[pool],
            };
            let set = pool_set([self.config.pools[pool].name.as_str()]);
            if fails {
                old_flows.insert((pool, backend), OldFlows::Fail);
            } else if without_room.iter().any(|pools| meet(*pools, set)) {
                old_flows.insert((pool, backend), OldFlows::Yield);
            }
        }
        let gone = self.overrides.exits().filter(|(_, exit)| exit.is_over());
        let gone: HashSet<&BackendKey> = gone.map(|(key, _)| key).collect();
        if !gone.is_empty() {
            let places = keys(&self.config).filter(|(key, ..)| gone.contains(key));
            old_flows.extend(places.map(|(_, pool, backend)| ((pool, backend), OldFlows::Move)));
        }
        old_flows
    }

    /// Pools of tables whose flows found no room for pins lately.
    fn without_room(&self, now: Instant) -> Vec<[u64; 3]> {
        let tables = self.tracking.moves.without_room(now);
        tables.filter_map(|table| Some(self.image.table_states.get(usize::from(table))?.pools)).collect()
    }

    /// By pool.
    fn most_are_down(&self) -> Vec<bool> {
        let mut down = vec![0; self.config.pools.len()];
        for (key, pool, _) in keys(&self.config) {
            down[pool] += usize::from(self.fsms.get(&key).is_some_and(|fsm| fsm.state() == State::Down));
        }
        down.iter().zip(&self.config.pools).map(|(down, pool)| down * 2 > pool.backends.len()).collect()
    }

    /// Whether a grace time, or the room for pins, has run out since the last plan.
    fn flows_are_due(&self, now: Instant) -> bool {
        let goes_on = |((pool, backend), old_flows): (BackendRef, OldFlows)| {
            let pool = &self.config.pools[pool];
            let address = pool.backends[backend].address;
            let identity = crate::reconcile::desired::backend_identity(&pool.name, pool.forward, address);
            let known = self.tracking.desired.backends.get(&identity);
            known.is_some_and(|backend| backend.old_flows < old_flows)
        };
        self.old_flows(now).into_iter().any(goes_on)
    }
}
