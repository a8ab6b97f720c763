//! Slots on the move, pins and ids at rest, looked after as one: carries plans out, lets `est` follow when its time has
//! come, sweeps the pins in small steps. The rules are in `plan`, `moves` and `sweep`; who holds the tables tells the
//! time.

use std::collections::{BTreeMap, HashSet};
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lb_common::abi::{Discipline, SLOTS_PER_ROW, TableState, TableWord};
use lb_common::slots::Slot;
use rustc_hash::FxHashSet;
use tracing::debug;

use super::desired::{Desired, meet};
use super::image::Image;
use super::moves::{Course, Moves, finish, runs};
use super::op::MapOp;
use super::plan::{AtRest, Leave, Plan, PlanError, Unpinned, plan};
use super::repin::Spread;
use super::sweep::{Found, Places, Rules, Sweeper};
use crate::capacity::Capacity;

/// Buckets that one look sweeps: well below a millisecond.
const BUCKETS_A_LOOK: usize = 8192;

/// Cycles begin no oftener.
const CYCLE: Duration = Duration::from_secs(1);

/// Slots that move for no other reason than a better spread, in a second: a part of all, and at the least.
const PACE_PART: usize = 8;
const PACE_LEAST: usize = 1 << 14;
const PACE: Duration = Duration::from_secs(1);

/// Who holds the tables.
pub trait Hands {
    type Error: From<PlanError>;

    fn now(&self) -> Instant;
    /// The age of a pin that is used now.
    fn age(&self) -> u16;
    /// What has been applied, with what packets wrote as of the last `read_states`.
    fn image(&self) -> &Image;
    fn capacity(&self) -> &Capacity;
    /// Takes in what packets write into tables' states.
    fn read_states(&mut self);
    /// Carries one operation out, in the tables and in the image of them; false where what hangs on it must not be.
    fn apply(&mut self, op: &MapOp) -> Result<bool, Self::Error>;
    /// Sets right how many flows a backend has.
    fn set_active(&mut self, id: u16, active: u64);
}

#[derive(Debug)]
pub struct Tracking {
    pub moves: Moves,
    sweeper: Sweeper,
    /// Pins that came from fewer buckets, as long as a flow has several.
    pub spread: Option<Spread>,
    /// What the last whole cycle found.
    pub found: Found,
    /// When the last whole cycle ended.
    pub swept: Instant,
    began: Instant,
    /// Ids that nothing has named since the cycle that is under way began.
    resting: HashSet<u16>,
    /// Ids that a whole cycle found neither pins nor connections of, for the next plan.
    unpinned: HashSet<u16>,
    /// By backend id: whether no slot has named it since the cycle that is under way began.
    unnamed: Vec<bool>,
    /// The same for the last whole cycle: what it found of these is all there is.
    counted: Vec<bool>,
    /// Whether slots were written since a cycle began, or nothing was counted yet.
    recount: bool,
    /// Whether slots were written, or something else is desired, since `moves` looked at the tables.
    unseen: bool,
    /// Tables whose slots were written since then.
    written: HashSet<u16>,
    /// Which table's slots begin there.
    first_slots: BTreeMap<u32, u16>,
    /// What the next plan need not look at.
    at_rest: AtRest,
    /// Ids of backends that are in no configuration any more.
    leaving: HashSet<u16>,
    /// Whether others are wanted, or lie there, since these were found.
    others: bool,
    /// Whether `est` followed with the last look.
    followed: bool,
    /// Whether something broke off that closes tables and opens them again.
    broke_off: bool,
    /// What the tables are on their way to.
    pub desired: Arc<Desired>,
    paced: Instant,
    /// Slots that may still move in this second.
    moves_left: usize,
    /// Slots that wait for their turn to move.
    pub waiting: usize,
    /// By the identity of a backend that is down: slots that its old flows have left for want of room for pins. Whoever
    /// reports them takes them out.
    pub yielded: BTreeMap<u64, usize>,
    failed: u64,
}

impl Tracking {
    pub fn new(now: Instant) -> Self {
        Self {
            moves: Moves::new(now),
            sweeper: Sweeper::default(),
            spread: None,
            found: Found::default(),
            swept: now,
            began: now,
            resting: HashSet::new(),
            unpinned: HashSet::new(),
            unnamed: Vec::new(),
            counted: Vec::new(),
            recount: true,
            unseen: true,
            written: HashSet::new(),
            first_slots: BTreeMap::new(),
            at_rest: AtRest::default(),
            leaving: HashSet::new(),
            others: true,
            followed: false,
            broke_off: false,
            desired: Arc::default(),
            paced: now.checked_sub(PACE).unwrap_or(now),
            moves_left: 0,
            waiting: 0,
            yielded: BTreeMap::new(),
            failed: 0,
        }
    }

    /// Before anything is planned over tables that were there: a closing that broke off ends, and what is dirty begins
    /// to wait anew.
    pub fn begin<H: Hands>(hands: &mut H) -> Result<Self, H::Error> {
        let mut tracking = Self::new(hands.now());
        tracking.look_again(hands.image());
        tracking.open(hands)?;
        // What failed until now is no sign of what is to come.
        hands.read_states();
        tracking.observe(hands);
        Ok(tracking)
    }

    /// Ends a closing that broke off: its slots are dirty, or `est` has followed.
    fn open<H: Hands>(&mut self, hands: &mut H) -> Result<(), H::Error> {
        let states = (0u16..).zip(&hands.image().table_states);
        let closing: Vec<u16> =
            states.filter(|(_, state)| state.closing != 0).map(|(table, _)| table).collect();
        if !closing.is_empty() {
            let mut ops = vec![MapOp::Grace];
            ops.extend(closing.into_iter().map(|table| MapOp::SetClosing { table, closing: 0 }));
            ops.push(MapOp::Grace);
            self.carry_out(hands, &ops)?;
        }
        Ok(())
    }

    /// The image is another, for a reason that is not known here: the next plan looks at everything.
    pub fn look_again(&mut self, image: &Image) {
        let words = (0u16..).zip(image.tables.iter().map(|&bits| TableWord::from_bits(bits)));
        let words = words.filter(|(_, word)| *word != TableWord::default());
        self.first_slots = words.map(|(table, word)| (first_slot(word), table)).collect();
        self.at_rest = AtRest::default();
        self.written.extend(self.first_slots.values());
        self.leaving = leaving_ids(&self.desired, image);
    }

    /// Whether slots that waited may move now.
    pub fn is_paced(&self, now: Instant) -> bool {
        self.waiting > 0 && now >= self.paced + PACE
    }

    /// Whether something is under way that the next look at slots goes on with.
    pub fn is_busy(&self) -> bool {
        self.unseen
            || self.followed
            || self.broke_off
            || self.waiting > 0
            || self.recount
            || self.spread.is_some()
            || self.sweeper.is_busy()
            || !self.unpinned.is_empty()
    }

    /// Brings the tables in line with what is desired, or on their way there. What cannot be planned is not desired.
    pub fn reconcile<H: Hands>(
        &mut self,
        hands: &mut H,
        wanted: impl Into<Arc<Desired>>,
    ) -> Result<(), H::Error> {
        let wanted = wanted.into();
        self.look_at_turned(&wanted);
        // What a plan changes may have to be live before the next can go on from there.
        loop {
            let plan = self.plan(hands, &wanted)?;
            self.desired = Arc::clone(&wanted);
            let (image, tables) = (hands.image(), &wanted.tables);
            let wanted = |row: u16| {
                let state = &image.table_states[usize::from(row)];
                let table = tables.get(&state.identity)?;
                // Pools that it had before go once all of it rests: until then all of it is looked at.
                (state.pools == table.pool_set).then(|| (row, Arc::clone(table)))
            };
            let idle = plan.idle.iter().filter_map(|row| wanted(*row));
            self.at_rest.found(idle, plan.rows.clone(), plan.led.clone());
            let written: Vec<_> = plan.written.iter().filter_map(|row| wanted(*row)).collect();
            match self.carry_out_plan(hands, plan) {
                Ok(true) => {}
                Ok(false) => {
                    self.at_rest.are(written);
                    return Ok(());
                }
                Err(error) => {
                    self.at_rest = AtRest::default();
                    return Err(error);
                }
            }
        }
    }

    /// Slots that name backends whose flows have another fate now are no longer at rest.
    fn look_at_turned(&mut self, wanted: &Desired) {
        let Some(changed) = wanted.backends.changed_since(&self.desired.backends) else {
            self.at_rest = AtRest::default();
            self.others = true;
            return;
        };
        let turned = changed.into_iter().filter(|(now, before)| before.old_flows != now.old_flows);
        self.at_rest.turn(turned.map(|(now, _)| (now.row.identity, now.pool)).collect());
    }

    fn plan<H: Hands>(&mut self, hands: &mut H, wanted: &Desired) -> Result<Plan, H::Error> {
        hands.read_states();
        // Good for one plan: an id that is free may be given away, and have pins.
        let unpinned = std::mem::take(&mut self.unpinned);
        self.pace(hands);
        let at_rest = std::mem::take(&mut self.at_rest);
        let leave = Leave { unpinned: Unpinned::Ids(unpinned), moves: self.moves_left, at_rest };
        let plan = plan(hands.image(), wanted, hands.capacity(), &leave);
        self.at_rest = leave.at_rest;
        Ok(plan?)
    }

    /// One plan. Returns whether another must follow at once.
    fn carry_out_plan<H: Hands>(&mut self, hands: &mut H, plan: Plan) -> Result<bool, H::Error> {
        self.unseen = true;
        self.waiting = plan.waiting;
        self.moves_left -= plan.moves;
        // One that comes back may have pins that the sweep has passed.
        if !self.resting.is_empty() && self.others {
            let leaving = leaving_ids(&self.desired, hands.image());
            self.resting.retain(|id| leaving.contains(id));
        }
        self.carry_out(hands, &plan.ops)?;
        if std::mem::take(&mut self.others) {
            self.leaving = leaving_ids(&self.desired, hands.image());
        }
        for (id, slots) in plan.yielded {
            let identity = hands.image().backends[usize::from(id)].identity;
            *self.yielded.entry(identity).or_default() += slots;
        }
        self.observe(hands);
        Ok(plan.again)
    }

    /// Takes in what was written, with what packets wrote as of the last `read_states`.
    fn observe<H: Hands>(&mut self, hands: &H) {
        let now = hands.now();
        if std::mem::take(&mut self.unseen) {
            self.moves.observe_written(hands.image(), now, |table| self.written.contains(&table));
            self.written.clear();
        } else {
            self.moves.observe_failures(hands.image(), now);
        }
    }

    /// Lets `est` follow where its time has come, and sweeps. Whether a plan may find something to do then.
    pub fn look_after<H: Hands>(&mut self, hands: &mut H) -> Result<bool, H::Error> {
        hands.read_states();
        if self.broke_off {
            self.open(hands)?;
            self.broke_off = false;
        }
        self.observe(hands);
        let (desired, image, now) = (&self.desired, hands.image(), hands.now());
        let due = self.moves.due(image, now, |table| Course::of(desired, image, table));
        let followed = std::mem::replace(&mut self.followed, !due.is_empty());
        // Ids may rest from now on. Not before the last table has its turn: where a backend leaves, a plan looks at all of them.
        let mut changed = followed && due.is_empty();
        if !due.is_empty() {
            self.carry_out_at_rest(hands, &finish(due))?;
        }
        changed |= self.sweep(hands)?;
        Ok(changed)
    }

    /// Carries operations out that change nothing of where new flows go.
    fn carry_out_at_rest<H: Hands>(&mut self, hands: &mut H, ops: &[MapOp]) -> Result<(), H::Error> {
        let resting = self.at_rest.resting(hands.image());
        self.broke_off = true;
        self.carry_out(hands, ops)?;
        self.broke_off = false;
        self.at_rest.are(resting);
        Ok(())
    }

    /// Carries operations out. A table whose pin has failed is open again at once, and its slots wait anew.
    fn carry_out<H: Hands>(&mut self, hands: &mut H, ops: &[MapOp]) -> Result<(), H::Error> {
        let mut failed = false;
        for op in ops {
            failed &= !matches!(op, MapOp::ExpectFailed { .. } | MapOp::Grace);
            if failed {
                continue;
            }
            self.note(hands.image(), op);
            if !hands.apply(op)?
                && let MapOp::ExpectFailed { table, .. } = op
            {
                debug!(table, "a flow could not be pinned; its slots wait anew");
                hands.apply(&MapOp::SetClosing { table: *table, closing: 0 })?;
                failed = true;
            }
        }
        Ok(())
    }

    /// What follows from an operation that is about to be carried out.
    fn note(&mut self, image: &Image, op: &MapOp) {
        let tables = match op {
            MapOp::WriteSlots { first, words } => {
                self.sweeper.written(*first, words.len());
                self.name(words);
                self.tables_at(*first, words.len())
            }
            MapOp::SetTableWord { table, word } => {
                let before = TableWord::from_bits(image.tables[usize::from(*table)]);
                if self.first_slots.get(&first_slot(before)) == Some(table) {
                    self.first_slots.remove(&first_slot(before));
                }
                if *word != TableWord::default() {
                    self.first_slots.insert(first_slot(*word), *table);
                }
                self.at_rest.forget_vips();
                vec![*table]
            }
            MapOp::WriteTableState { table, .. } | MapOp::SetPools { table, .. } => {
                self.at_rest.forget_table(*table);
                self.at_rest.forget_vips();
                return;
            }
            // Its identity may have another id from now on.
            MapOp::WriteBackend { .. } => {
                self.at_rest = AtRest::default();
                self.others = true;
                return;
            }
            MapOp::WriteSource { .. }
            | MapOp::WriteVips4 { .. }
            | MapOp::WriteVips6 { .. }
            | MapOp::WriteRules { .. }
            | MapOp::SetFilterWord { .. }
            | MapOp::SetVipWord4 { .. }
            | MapOp::SetVipWord6 { .. }
            | MapOp::SetPrefixLengths4 { .. }
            | MapOp::SetPrefixLengths6 { .. } => {
                self.at_rest.forget_vips();
                return;
            }
            MapOp::WriteEgress { .. }
            | MapOp::SetPath { .. }
            | MapOp::ResetBackendTraffic { .. }
            | MapOp::ResetVipTraffic { .. }
            | MapOp::SetClosing { .. }
            | MapOp::ExpectFailed { .. }
            | MapOp::SetFlags { .. }
            | MapOp::DropPins { .. }
            | MapOp::DropConnections { .. }
            | MapOp::SetLoadWeight { .. }
            | MapOp::SetServer { .. }
            | MapOp::RemoveServer { .. }
            | MapOp::Grace => return,
        };
        (self.recount, self.unseen) = (true, true);
        for table in &tables {
            self.at_rest.forget_table(*table);
        }
        self.written.extend(tables);
    }

    /// The tables that so many slots are of: tables lie side by side. A place that no table has yet may count for the one before.
    fn tables_at(&self, first: u32, slots: usize) -> Vec<u16> {
        let end = first.saturating_add(slots as u32);
        let begun = self.first_slots.range(..=first).next_back();
        let within = self.first_slots.range((Bound::Excluded(first), Bound::Excluded(end.max(first + 1))));
        begun.into_iter().chain(within).map(|(_, table)| *table).collect()
    }

    /// From now on slots name these, and packets make pins to them.
    fn name(&mut self, words: &[u32]) {
        for id in words.iter().map(|&word| Slot::from_bits(word)).flat_map(|slot| [slot.cur(), slot.est()]) {
            for free in [&mut self.unnamed, &mut self.counted] {
                if let Some(free) = free.get_mut(usize::from(id)) {
                    *free = false;
                }
            }
        }
    }

    /// Whether `found` has all pins of an id that no slot names: none was made since it was counted.
    pub fn is_counted(&self, id: u16) -> bool {
        self.counted.get(usize::from(id)).copied().unwrap_or_default()
    }

    /// Says how many slots may move in this second for a better spread alone: none while pins fail, or are half full.
    fn pace<H: Hands>(&mut self, hands: &H) {
        let (image, now) = (hands.image(), hands.now());
        let failed = image.table_states.iter().map(|state| state.failed).fold(0, u64::wrapping_add);
        let failing = std::mem::replace(&mut self.failed, failed) != failed;
        let room = image.pins.words().len() as u64;
        if failing || self.found.pins * 2 > room {
            self.moves_left = 0;
        } else if now >= self.paced + PACE {
            self.paced = now;
            let words = image.tables.iter().map(|&bits| TableWord::from_bits(bits));
            let slots: usize = words.filter(|word| word.bits() != 0).map(|word| word.length() as usize).sum();
            self.moves_left = (slots / PACE_PART).max(PACE_LEAST);
        }
    }

    fn sweep<H: Hands>(&mut self, hands: &mut H) -> Result<bool, H::Error> {
        let now = hands.now();
        if !self.sweeper.is_busy() {
            if now < self.began + CYCLE || !(self.recount || self.has_to_sweep(hands.image())) {
                return Ok(false);
            }
            self.begin_cycle(hands, now)?;
        }
        let (pins, connections) = (hands.image().pins.clone(), hands.image().connections.clone());
        let age = hands.age();
        self.spread.take_if(|spread| spread.step(pins.words(), BUCKETS_A_LOOK, age));
        match self.sweeper.step(Places::of(&pins, &connections), BUCKETS_A_LOOK, age, now) {
            Some(found) => self.end_cycle(hands, found),
            None => Ok(false),
        }
    }

    /// Pins come from slots on the move, and from tables that pin every flow; connections whenever addresses are
    /// translated.
    pub fn has_to_sweep(&self, image: &Image) -> bool {
        self.found.pins > 0
            || !image.connections.is_empty()
            || !self.leaving.is_empty()
            || self.moves.has_pins()
    }

    fn begin_cycle<H: Hands>(&mut self, hands: &mut H, now: Instant) -> Result<(), H::Error> {
        self.began = now;
        let image = hands.image();
        let mut unnamed = vec![true; image.backends.len()];
        for (_, slot) in image.live_slots() {
            for id in [slot.cur(), slot.est()] {
                unnamed[usize::from(id)] = false;
            }
        }
        self.resting = self.leaving.iter().copied().filter(|&id| unnamed[usize::from(id)]).collect();
        self.unnamed = unnamed;
        // No packet is at work with words from before.
        self.carry_out(hands, &[MapOp::Grace])?;
        self.recount = false;
        let rules = Rules::of(&self.desired, hands.image());
        self.sweeper.begin(hands.image(), rules, now);
        Ok(())
    }

    /// Whether ids may be freed.
    fn end_cycle<H: Hands>(&mut self, hands: &mut H, found: Found) -> Result<bool, H::Error> {
        if !found.clear.is_empty() {
            self.carry_out_at_rest(hands, &runs(found.clear.iter().copied()))?;
        }
        self.counted = std::mem::take(&mut self.unnamed);
        let resting = std::mem::take(&mut self.resting);
        self.unpinned = resting.into_iter().filter(|&id| found.of(id).is_empty()).collect();
        self.set_loads(hands, &found);
        self.found = found;
        self.swept = hands.now();
        Ok(!self.unpinned.is_empty() || !self.found.clear.is_empty() && self.is_behind(hands.image()))
    }

    /// Whether a plan may have waited for slots to be at rest: copies are equal to what they stand for then, and tables
    /// forget the pools that they had.
    fn is_behind(&self, image: &Image) -> bool {
        let forgets = |state: &TableState| {
            let table = self.desired.tables.get(&state.identity);
            table.is_some_and(|table| table.pool_set != state.pools)
        };
        image.table_states.iter().any(|state| state.origin != 0 || forgets(state))
    }

    /// How busy backends are whose tables go by it.
    fn set_loads<H: Hands>(&self, hands: &mut H, found: &Found) {
        let least = self.desired.tables.values().filter(|t| t.discipline == Discipline::Least);
        let sets: Vec<[u64; 3]> = least.map(|table| table.pool_set).collect();
        if sets.is_empty() {
            return;
        }
        let ids = hands.image().ids();
        for (identity, backend) in self.desired.backends.iter() {
            if let Some(&id) = ids.get(identity)
                && sets.iter().any(|set| meet(*set, backend.pool))
            {
                hands.set_active(id, u64::from(found.of(id).active));
            }
        }
    }
}

/// Ids of backends that are in no configuration any more.
fn leaving_ids(desired: &Desired, image: &Image) -> HashSet<u16> {
    let wanted: FxHashSet<u64> = desired.backends.keys().copied().collect();
    let rows = (0u16..).zip(&image.backends);
    let gone = rows.filter(|(_, row)| row.identity != 0 && !wanted.contains(&row.identity));
    gone.map(|(id, _)| id).collect()
}

fn first_slot(word: TableWord) -> u32 {
    word.first_row() * SLOTS_PER_ROW
}
