//! How the agent lives with slots on the move: it carries operations out in the maps, looks after the slots, seldom
//! where none is on the move, and says when a backend's flows go. The rules are in `reconcile`; this knows the clock.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use lb_common::abi::Pin;
use rustc_hash::FxHashMap;
use tracing::{debug, warn};

use super::changed::Changed;
use super::core::{BackendKey, Core, ReconcileError};
use super::roster::Roster;
use super::snapshot::Index;
use crate::bpf::Datapath;
use crate::capacity::Capacity;
use crate::config::model::{Backend, Flows, OnDown};
use crate::health::State;
use crate::reconcile::desired::{BackendRef, OldFlows, identity_of, meet};
use crate::reconcile::image::Image;
use crate::reconcile::op::MapOp;
use crate::reconcile::pins::coarse_ns;
use crate::reconcile::tracking::Hands;

pub use crate::reconcile::tracking::Tracking;

/// Slots are looked after this often while one is on the move, or has pins.
const TICK: Duration = Duration::from_millis(50);

/// And this often where there is nothing to do.
const IDLE_TICK: Duration = Duration::from_millis(500);

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
        if !self.changed.anything() && !self.tracking.is_paced(now) {
            return Ok(());
        }
        // What breaks off is tried again.
        self.changed.policy();
        let world = self.steered_world(now);
        self.say_who_is_empty(&world);
        let wanted = self.roster.desired(&world);
        let (tracking, mut hands) = self.hands();
        tracking.reconcile(&mut hands, wanted)?;
        self.changed = Changed::Nothing;
        if let Some(decided) = self.decided.take() {
            let after_us = decided.elapsed().as_micros() as u64;
            debug!(after_us, "the tables follow verdicts");
        }
        Ok(())
    }

    /// How long after a look at the slots the next one is due. Asked with every event.
    pub fn pace_of_looks(&self) -> Duration {
        let busy =
            self.changed.anything() || self.tracking.is_busy() || self.tracking.has_to_sweep(&self.image);
        if busy { TICK } else { IDLE_TICK }
    }

    /// Looks after slots on the move. Called as often as [`Self::pace_of_looks`] says.
    pub fn look_after_slots(&mut self) -> Result<(), ReconcileError> {
        if self.flows_are_due(Instant::now()) {
            self.changed.policy();
        }
        let (tracking, mut hands) = self.hands();
        let changed = tracking.look_after(&mut hands)?;
        if changed {
            self.changed.policy();
        }
        self.reconcile()?;
        self.say_who_yields(Instant::now());
        Ok(())
    }

    /// Counts slots that had to move for want of room for pins, and says so.
    fn say_who_yields(&mut self, now: Instant) {
        let slots = std::mem::take(&mut self.tracking.yielded);
        if !slots.is_empty() {
            for pool in &self.config.pools {
                let of = |backend: &Backend| identity_of(pool, backend);
                let slots = pool.backends.iter().filter_map(|backend| slots.get(&of(backend)));
                self.yielded.add(&pool.name, slots.map(|slots| *slots as u64).sum());
            }
        }
        for (pool, slots) in self.yielded.take_unsaid(now) {
            let (pins, room) = (self.tracking.found.pins, self.image.pins.words().len());
            warn!(%pool, slots, pins, room, "no room for pins while a backend is down: its old flows without a pin have moved; raise limits.pins");
        }
    }

    /// What becomes of the flows of backends that are down, by their place in the roster, or whose time is over.
    pub(super) fn old_flows(
        &self,
        roster: &Roster,
        down: &[usize],
        now: Instant,
    ) -> FxHashMap<BackendRef, OldFlows> {
        let mut old_flows = FxHashMap::default();
        let without_room = self.without_room(now);
        let most_are_down = self.most_are_down(roster, down);
        for seat in down.iter().filter_map(|place| roster.seats.get(*place)) {
            let Some(fsm) = self.fsms.get(&seat.key).filter(|fsm| fsm.state() == State::Down) else {
                continue;
            };
            let lasts = fsm.since().map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
            let is = Down { hard: fsm.is_hard(), lasts };
            let pool = seat.at.0;
            let crowded = without_room.iter().any(|pools| meet(*pools, seat.pools));
            let becomes =
                is.old_flows(&self.config.pools[pool].flows, || most_are_down.contains(&pool), crowded);
            old_flows.insert(seat.at, becomes);
        }
        let gone: HashSet<&BackendKey> =
            self.overrides.exits().filter(|(_, exit)| exit.is_over()).map(|(key, _)| key).collect();
        if !gone.is_empty() {
            let places = roster.seats.iter().filter(|seat| gone.contains(&seat.key));
            old_flows.extend(places.map(|seat| (seat.at, OldFlows::Move)));
        }
        old_flows
    }

    /// When the next backend that is down has been so for as long as its flows wait.
    pub(super) fn grace_ends_after(&self, now: Instant) -> Option<Instant> {
        let ends = |place: &usize| {
            let seat = self.roster.seats.get(*place)?;
            let (fsm, flows) = (self.fsms.get(&seat.key)?, &self.config.pools[seat.at.0].flows);
            let waits = flows.on_down == OnDown::Auto && fsm.state() == State::Down && !fsm.is_hard();
            fsm.since().filter(|_| waits)?.checked_add(flows.down_grace)
        };
        self.down.iter().filter_map(ends).filter(|ends| *ends > now).min()
    }

    /// Pools of tables whose flows found no room for pins lately.
    fn without_room(&self, now: Instant) -> Vec<[u64; 3]> {
        let tables = self.tracking.moves.without_room(now);
        tables.filter_map(|table| Some(self.image.table_states.get(usize::from(table))?.pools)).collect()
    }

    /// Pools most of whose backends are down.
    fn most_are_down(&self, roster: &Roster, down: &[usize]) -> HashSet<usize> {
        let mut by_pool: HashMap<usize, usize> = HashMap::new();
        for seat in down.iter().filter_map(|place| roster.seats.get(*place)) {
            *by_pool.entry(seat.at.0).or_default() += 1;
        }
        let most =
            by_pool.into_iter().filter(|(pool, down)| down * 2 > self.config.pools[*pool].backends.len());
        most.map(|(pool, _)| pool).collect()
    }

    /// Whether the room for pins, or a deadline, has run out since the last plan. Asked often: it goes by those who are known
    /// to be down, which changes with a plan.
    fn flows_are_due(&self, now: Instant) -> bool {
        if self.changed.anything() || self.down.is_empty() && !self.overrides.has_exits() {
            return false;
        }
        let goes_on = |((pool, backend), old_flows): (BackendRef, OldFlows)| {
            let pool = &self.config.pools[pool];
            let identity = identity_of(pool, &pool.backends[backend]);
            let known = self.tracking.desired.backends.get(&identity);
            known.is_some_and(|backend| backend.old_flows < old_flows)
        };
        self.old_flows(&self.roster, &self.down, now).into_iter().any(goes_on)
    }
}

/// What is known of a backend that is down.
#[derive(Debug, Clone, Copy)]
struct Down {
    /// Connections to it are refused or reset.
    hard: bool,
    lasts: Duration,
}

impl Down {
    /// What becomes of its flows. `crowded`: new flows found no room for their pins lately.
    fn old_flows(self, flows: &Flows, most_are_down: impl FnOnce() -> bool, crowded: bool) -> OldFlows {
        let fails = match flows.on_down {
            OnDown::Keep => false,
            OnDown::Move => true,
            // Answered by the host itself, or silent for long while most others answer: else it may be us.
            OnDown::Auto => self.hard || self.lasts >= flows.down_grace && !most_are_down(),
        };
        match (fails, crowded) {
            (true, _) => OldFlows::Fail,
            (false, true) => OldFlows::Yield,
            (false, false) => OldFlows::Stay,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_flows_of_a_backend_that_is_down_go_as_the_pool_says() {
        const GRACE: Duration = Duration::from_secs(30);
        let soon = GRACE - Duration::from_millis(1);
        // (policy, refused, down for, most are down, no room) -> what becomes of its flows
        for (on_down, hard, lasts, most, crowded, expected) in [
            (OnDown::Auto, true, Duration::ZERO, false, false, OldFlows::Fail),
            (OnDown::Auto, true, Duration::ZERO, true, true, OldFlows::Fail),
            (OnDown::Auto, false, soon, false, false, OldFlows::Stay),
            (OnDown::Auto, false, soon, false, true, OldFlows::Yield),
            (OnDown::Auto, false, GRACE, false, false, OldFlows::Fail),
            (OnDown::Auto, false, GRACE, true, false, OldFlows::Stay),
            (OnDown::Auto, false, GRACE, true, true, OldFlows::Yield),
            (OnDown::Keep, true, GRACE, false, false, OldFlows::Stay),
            (OnDown::Keep, true, GRACE, false, true, OldFlows::Yield),
            (OnDown::Move, false, Duration::ZERO, true, false, OldFlows::Fail),
        ] {
            let flows = Flows { on_down, down_grace: GRACE, ..Flows::default() };
            let becomes = Down { hard, lasts }.old_flows(&flows, || most, crowded);
            assert_eq!(becomes, expected, "{on_down:?}, {hard}, {lasts:?}, {most}, {crowded}");
        }
    }
}
