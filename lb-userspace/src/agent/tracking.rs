//! Slots on the move, as the agent lives with them: carries plans out, lets `est` follow when its time has come, sweeps
//! the pins in small steps, and says when a backend's flows go. The rules are in `reconcile`; this knows the clock.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use lb_common::abi::{BACKEND_NOBODY, BACKEND_PASS, Discipline, Pin, SLOTS_PER_ROW, TableWord};
use tracing::debug;

use super::core::{BackendKey, Core, ReconcileError, keys};
use super::overrides::uptime;
use crate::bpf::MapsError;
use crate::config::model::OnDown;
use crate::health::State;
use crate::reconcile::desired::{BackendRef, Desired, OldFlows, Target, desired, meet};
use crate::reconcile::image::Image;
use crate::reconcile::moves::{Course, Moves};
use crate::reconcile::op::MapOp;
use crate::reconcile::pins::coarse_ns;
use crate::reconcile::plan::{Leave, Unpinned, plan};
use crate::reconcile::sweep::{Found, Rules, Sweeper};
use lb_common::wire::PROTO_UDP;

/// The agent looks after slots this often.
pub const TICK: Duration = Duration::from_millis(50);

/// Buckets that one tick sweeps: well below a millisecond.
const BUCKETS_A_TICK: usize = 8192;

/// Cycles begin no oftener.
const CYCLE: Duration = Duration::from_secs(1);

/// Slots that move for no other reason than a better spread, in a second: a part of all, and at the least.
const PACE_PART: usize = 8;
const PACE_LEAST: usize = 1 << 14;
const PACE: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub struct Tracking {
    pub(super) moves: Moves,
    sweeper: Sweeper,
    /// What the last whole cycle found.
    pub(super) found: Found,
    /// When the last whole cycle ended.
    pub(super) swept: Instant,
    began: Instant,
    /// Ids that nothing named when the cycle that is under way began.
    resting: HashSet<u16>,
    unpinned: HashSet<u16>,
    /// What the tables are on their way to.
    pub(super) desired: Desired,
    paced: Instant,
    /// Slots that may still move in this second.
    moves_left: usize,
    /// Slots that wait for their turn to move.
    pub(super) waiting: usize,
    failed: u64,
}

impl Tracking {
    pub fn new(now: Instant) -> Self {
        Self {
            moves: Moves::new(now),
            sweeper: Sweeper::default(),
            found: Found::default(),
            swept: now,
            began: now,
            resting: HashSet::new(),
            unpinned: HashSet::new(),
            desired: Desired::default(),
            paced: now.checked_sub(PACE).unwrap_or(now),
            moves_left: 0,
            waiting: 0,
            failed: 0,
        }
    }
}

impl Core {
    /// Before anything is planned over maps that were there: a closing that broke off ends, and what is dirty begins to
    /// wait anew.
    pub(super) fn begin_tracking(&mut self) -> Result<(), MapsError> {
        let states = (0u16..).zip(&self.image.table_states);
        let closing: Vec<u16> =
            states.filter(|(_, state)| state.closing != 0).map(|(table, _)| table).collect();
        if !closing.is_empty() {
            let mut ops = vec![MapOp::Grace];
            ops.extend(closing.into_iter().map(|table| MapOp::SetClosing { table, closing: 0 }));
            self.carry_out(&ops)?;
        }
        self.tracking = Tracking::new(Instant::now());
        self.tracking.moves.observe(&self.image, Instant::now());
        Ok(())
    }

    /// Brings the maps in line with what is configured and alive.
    pub fn reconcile(&mut self) -> Result<(), ReconcileError> {
        let now = Instant::now();
        let paced = self.tracking.waiting > 0 && now >= self.tracking.paced + PACE;
        if !self.changed && !paced {
            return Ok(());
        }
        self.read_states();
        let world = self.steered_world(now);
        self.say_who_is_empty(&world);
        let wanted = desired(&self.config, &world);
        self.pace(now);
        let unpinned = Unpinned::Ids(self.tracking.unpinned.clone());
        let leave = Leave { unpinned, moves: self.tracking.moves_left };
        let plan = plan(&self.image, &wanted, self.datapath.capacity(), &leave)?;
        if !plan.ops.is_empty() {
            self.index.take();
        }
        self.tracking.waiting = plan.waiting;
        self.tracking.moves_left -= plan.moves;
        self.tracking.desired = wanted;
        self.carry_out(&plan.ops)?;
        self.tracking.moves.observe(&self.image, Instant::now());
        self.changed = false;
        Ok(())
    }

    /// Says how many slots may move in this second for a better spread alone: none while pins fail, or are half full.
    fn pace(&mut self, now: Instant) {
        let failed = self.image.table_states.iter().map(|state| state.failed).fold(0, u64::wrapping_add);
        let failing = std::mem::replace(&mut self.tracking.failed, failed) != failed;
        let room = self.image.pins.words().len() as u64;
        if failing || self.tracking.found.pins * 2 > room {
            self.tracking.moves_left = 0;
        } else if now >= self.tracking.paced + PACE {
            self.tracking.paced = now;
            let words = self.image.tables.iter().map(|&bits| TableWord::from_bits(bits));
            let slots: usize = words.filter(|word| word.bits() != 0).map(|word| word.length() as usize).sum();
            self.tracking.moves_left = (slots / PACE_PART).max(PACE_LEAST);
        }
    }

    /// What packets write into tables' states, as it is now.
    fn read_states(&mut self) {
        for (table, word) in (0u16..).zip(&self.image.tables) {
            if *word != 0 {
                let state = &mut self.image.table_states[usize::from(table)];
                (state.failed, state.turn) = self.datapath.maps.failed_and_turn(table);
            }
        }
    }

    /// Carries operations out, in the maps and in the image of them; false where they broke off, and nothing moved.
    fn carry_out(&mut self, ops: &[MapOp]) -> Result<bool, MapsError> {
        for op in ops {
            if !self.datapath.maps.apply(op)? {
                if let MapOp::ExpectFailed { table, .. } = op {
                    let open = MapOp::SetClosing { table: *table, closing: 0 };
                    self.datapath.maps.apply(&open)?;
                    self.image.apply(&open);
                }
                return Ok(false);
            }
            self.image.apply(op);
        }
        Ok(true)
    }

    /// Looks after slots on the move. Called every `TICK`.
    pub fn look_after_slots(&mut self) -> Result<(), ReconcileError> {
        let now = Instant::now();
        if self.flows_are_due(now) {
            self.changed = true;
        }
        self.read_states();
        self.tracking.moves.observe(&self.image, now);
        let (desired, image) = (&self.tracking.desired, &self.image);
        let ids = super::adopt::ids(image);
        let due = self.tracking.moves.due(image, now, |table| course(desired, image, &ids, table));
        for (table, ops) in due {
            self.index.take();
            if !self.carry_out(&ops)? {
                debug!(table, "a flow could not be pinned; its slots wait anew");
            }
            // Ids may rest from now on.
            self.changed = true;
        }
        self.sweep(now)?;
        self.reconcile()
    }

    fn sweep(&mut self, now: Instant) -> Result<(), MapsError> {
        if !self.tracking.sweeper.is_busy() {
            if now < self.tracking.began + CYCLE || !self.has_to_sweep() {
                return Ok(());
            }
            self.begin_cycle(now)?;
        }
        let age = Pin::age_of(coarse_ns());
        let pins = self.image.pins.clone();
        let found = self.tracking.sweeper.step(pins.words(), BUCKETS_A_TICK, age, now);
        if let Some(found) = found {
            self.end_cycle(found)?;
        }
        Ok(())
    }

    /// Pins come from slots on the move, and from tables that pin every flow.
    fn has_to_sweep(&self) -> bool {
        let moving = |(number, word): (u16, TableWord)| {
            let first = word.first_row() * SLOTS_PER_ROW;
            word.bits() != 0
                && (word.discipline().pins_all()
                    || self.tracking.moves.is_moving(number)
                    || (first..first + word.length()).any(|index| self.image.slot(index).pins()))
        };
        let words = self.image.tables.iter().map(|&bits| TableWord::from_bits(bits));
        self.tracking.found.pins > 0
            || self.image.backends.len() > self.tracking.desired.backends.len()
                && !self.leaving_ids().is_empty()
            || (0u16..).zip(words).any(moving)
    }

    /// Ids of backends that are in no configuration any more.
    fn leaving_ids(&self) -> HashSet<u16> {
        let rows = (0u16..).zip(&self.image.backends);
        let gone = rows.filter(|(_, row)| {
            row.identity != 0 && !self.tracking.desired.backends.contains_key(&row.identity)
        });
        gone.map(|(id, _)| id).collect()
    }

    fn begin_cycle(&mut self, now: Instant) -> Result<(), MapsError> {
        self.tracking.began = now;
        let mut resting = self.leaving_ids();
        if !resting.is_empty() {
            for (_, slot) in super::adopt::live_slots(&self.image) {
                resting.remove(&slot.cur());
                resting.remove(&slot.est());
            }
        }
        self.tracking.resting = resting;
        // No packet is at work with words from before.
        self.carry_out(&[MapOp::Grace])?;
        let rules = rules(&self.tracking.desired, &self.image);
        self.tracking.sweeper.begin(&self.image, rules, now);
        Ok(())
    }

    fn end_cycle(&mut self, found: Found) -> Result<(), MapsError> {
        let still = |(index, word): &(u32, u32)| {
            let slot = self.image.slot(*index);
            slot.pins() && !slot.dirty() && u32::from(slot.cur()) | u32::from(slot.cur()) << 15 == *word
        };
        let clear: Vec<_> = found.clear.iter().filter(|clear| still(clear)).copied().collect();
        if !clear.is_empty() {
            self.index.take();
            self.carry_out(&crate::reconcile::moves::runs(clear))?;
        }
        let resting = std::mem::take(&mut self.tracking.resting);
        let unpinned: HashSet<u16> = resting.into_iter().filter(|&id| found.of(id).pins == 0).collect();
        if !unpinned.is_empty() {
            self.changed = true;
        }
        self.tracking.unpinned = unpinned;
        self.set_loads(&found);
        self.tracking.found = found;
        self.tracking.swept = Instant::now();
        Ok(())
    }

    /// How busy backends are whose tables go by it.
    fn set_loads(&mut self, found: &Found) {
        let least = self.tracking.desired.tables.values().filter(|t| t.discipline == Discipline::Least);
        let sets: Vec<[u64; 3]> = least.map(|table| table.pool_set).collect();
        if sets.is_empty() {
            return;
        }
        let ids = super::adopt::ids(&self.image);
        for (identity, backend) in &self.tracking.desired.backends {
            if let Some(&id) = ids.get(identity)
                && sets.iter().any(|set| meet(*set, backend.pool))
            {
                self.datapath.maps.set_active(id, u64::from(found.of(id).active));
            }
        }
    }

    /// What becomes of the flows of backends that are down, or whose time is over.
    pub(super) fn old_flows(&self, now: Instant) -> HashMap<BackendRef, OldFlows> {
        let mut old_flows = HashMap::new();
        for (key, pool, backend) in keys(&self.config) {
            let Some(fsm) = self.fsms.get(&key).filter(|fsm| fsm.state() == State::Down) else { continue };
            let flows = &self.config.pools[pool].flows;
            let down_for = fsm.since().map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
            let fails = match flows.on_down {
                OnDown::Keep => false,
                OnDown::Move => true,
                // Answered by the host itself, or silent for long while most others answer: else it may be us.
                OnDown::Auto => fsm.is_hard() || down_for >= flows.down_grace && !self.most_are_down(pool),
            };
            if fails {
                old_flows.insert((pool, backend), OldFlows::Fail);
            }
        }
        let now = uptime();
        let gone = self.overrides.exits().filter(|(_, exit)| exit.has_passed(now));
        let gone: HashSet<&BackendKey> = gone.map(|(key, _)| key).collect();
        if !gone.is_empty() {
            let places = keys(&self.config).filter(|(key, ..)| gone.contains(key));
            old_flows.extend(places.map(|(_, pool, backend)| ((pool, backend), OldFlows::Move)));
        }
        old_flows
    }

    fn most_are_down(&self, pool: usize) -> bool {
        let states = keys(&self.config)
            .filter(|(_, of, _)| *of == pool)
            .map(|(key, ..)| self.fsms.get(&key).is_some_and(|fsm| fsm.state() == State::Down));
        let (down, all) = states.fold((0, 0), |(down, all), is_down| (down + usize::from(is_down), all + 1));
        down * 2 > all
    }

    /// Whether a grace time has run out since the last plan.
    fn flows_are_due(&self, now: Instant) -> bool {
        let identity_goes = |(pool, backend): BackendRef| {
            let pool = &self.config.pools[pool];
            let address = pool.backends[backend].address;
            let identity = crate::reconcile::desired::backend_identity(&pool.name, pool.forward, address);
            let known = self.tracking.desired.backends.get(&identity);
            known.is_some_and(|backend| backend.old_flows == OldFlows::Stay)
        };
        self.old_flows(now).into_keys().any(identity_goes)
    }
}

/// What a table should become.
fn course(desired: &Desired, image: &Image, ids: &HashMap<u64, u16>, table: u16) -> Option<Course> {
    let wanted = desired.tables.get(&image.table_states[usize::from(table)].identity)?;
    let id_of = |target: &Target| match target {
        Target::Nobody => BACKEND_NOBODY,
        Target::Pass => BACKEND_PASS,
        Target::Backend(identity) => ids.get(identity).copied().unwrap_or(BACKEND_NOBODY),
    };
    let est = wanted.est.as_ref().map(|est| (wanted.log2_length, est.iter().map(id_of).collect()));
    Some(Course { idle: wanted.idle, est })
}

/// What a sweep must know.
fn rules(desired: &Desired, image: &Image) -> Rules {
    let mut rules = Rules::default();
    let tables: Vec<(u16, [u64; 3], u8, Duration)> = (0u16..)
        .zip(&image.table_states)
        .filter_map(|(number, state)| {
            let wanted = desired.tables.get(&state.identity)?;
            let pools = [0, 1, 2].map(|word| state.pools[word] | wanted.pool_set[word]);
            Some((number, pools, wanted.protocol, wanted.idle))
        })
        .collect();
    rules.longest = tables.iter().map(|(.., idle)| *idle).max().unwrap_or_default();
    for (id, row) in (0u16..).zip(&image.backends) {
        let Some(backend) = desired.backends.get(&row.identity).filter(|_| row.identity != 0) else {
            continue;
        };
        let related = tables.iter().filter(|(_, pools, ..)| meet(*pools, backend.pool));
        let (mut tcp, mut udp, mut of) = (Duration::ZERO, Duration::ZERO, Vec::new());
        for (number, _, protocol, idle) in related {
            let longest = if *protocol == PROTO_UDP { &mut udp } else { &mut tcp };
            *longest = (*longest).max(*idle);
            of.push(*number);
        }
        // Of a protocol that no table has any more, pins may still be there.
        let or_longest = |idle: Duration| if idle.is_zero() { rules.longest } else { idle };
        rules.idle.insert(id, (or_longest(tcp), or_longest(udp)));
        rules.tables.insert(id, of);
    }
    rules
}
