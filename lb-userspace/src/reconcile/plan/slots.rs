//! The part of a plan that turns the slots of tables: which of them differ, where they lead from now on, and which old flows
//! leave. Knows backends by their ids only.

use std::borrow::Cow;
use std::collections::HashSet;

use lb_common::abi::{BACKEND_NOBODY, SLOTS_PER_ROW, SlotRow, TableWord};
use lb_common::slots::Slot;

use super::{PlanError, Planner, Regions, units};
use crate::reconcile::desired::{DesiredBackend, DesiredTable, OldFlows};
use crate::reconcile::image::{Ids, Image};
use crate::reconcile::moves::runs;
use crate::reconcile::op::MapOp;
use crate::reconcile::targets::Targets;

/// What slots should say, by the ids of backends.
struct Wanted<'t> {
    cur: Leads<'t>,
    est: Option<Leads<'t>>,
    /// For each target of `cur`, the word of a slot that leads all flows there and rests.
    clean: Vec<u32>,
}

/// Targets as ids.
struct Leads<'t> {
    ids: Vec<u16>,
    targets: &'t Targets,
    /// By slot, where many are looked at.
    places: Option<Cow<'t, [u16]>>,
}

impl<'t> Leads<'t> {
    fn of(targets: &'t Targets, ids: &Ids, all: bool) -> Self {
        let places = all.then(|| targets.places());
        let ids = targets.known().iter().map(|target| target.id(ids)).collect();
        Self { ids, targets, places }
    }

    fn place(&self, slot: usize) -> usize {
        usize::from(match &self.places {
            Some(places) => places[slot],
            None => self.targets.place(slot).unwrap_or_default(),
        })
    }

    fn at(&self, slot: usize) -> u16 {
        self.ids[self.place(slot)]
    }

    /// For each id, whether some slot leads to it. Ids beyond the last have none.
    fn used(&self) -> Vec<bool> {
        let last = self.ids.iter().copied().max().map_or(0, usize::from);
        let mut used = vec![false; last + 1];
        let ids = self.ids.iter().zip(self.targets.counts()).filter(|(_, count)| **count > 0);
        ids.for_each(|(&id, _)| used[usize::from(id)] = true);
        used
    }
}

impl<'t> Wanted<'t> {
    fn of(table: &'t DesiredTable, ids: &Ids, all: bool) -> Self {
        let cur = Leads::of(&table.cur, ids, all);
        let clean = cur.ids.iter().map(|&id| Slot::clean(id).bits()).collect();
        Self { cur, est: table.est.as_ref().map(|est| Leads::of(est, ids, all)), clean }
    }

    /// The word of a slot that leads all flows there and rests.
    fn clean(&self, slot: usize) -> u32 {
        self.clean[self.cur.place(slot)]
    }

    /// The word of a slot with nothing left to do, before any packet.
    fn fresh(&self, slot: usize) -> u32 {
        match &self.est {
            None => self.clean(slot),
            Some(est) => Slot::new(self.cur.at(slot), est.at(slot), true, true).bits(),
        }
    }

    /// Where flows go that nothing is known of, once new ones go to `cur`.
    fn est(&self, slot: usize, cur: u16) -> u16 {
        self.est.as_ref().map_or(cur, |est| est.at(slot))
    }
}

/// A table as it lies, with its slots as often as in a longer one.
struct Lying<'i> {
    image: &'i Image,
    first: u32,
    grown: u32,
}

impl Lying<'_> {
    fn at(&self, offset: u32) -> Slot {
        self.image.slot(self.first + (offset >> self.grown))
    }
}

impl Planner<'_> {
    /// One table: the slots that differ, in a longer place where its content outgrew the one it has.
    pub(super) fn table(
        &mut self,
        table: u16,
        table_wanted: &DesiredTable,
        ids: &Ids,
        regions: &mut Regions,
    ) -> Result<Left, PlanError> {
        let word = TableWord::from_bits(self.image.tables[usize::from(table)]);
        let (discipline, log2_wanted) = (table_wanted.discipline, table_wanted.log2_length);
        if self.measures {
            if word == TableWord::default() || log2_wanted > word.log2_length() {
                self.place(log2_wanted, regions)?;
            }
            return Ok(Left::More);
        }
        if word == TableWord::default() {
            let wanted = Wanted::of(table_wanted, ids, true);
            let words: Vec<u32> = (0..1 << log2_wanted).map(|slot| wanted.fresh(slot)).collect();
            let first_row = self.place(log2_wanted, regions)?;
            self.name(words.iter().map(|&word| Slot::from_bits(word)));
            self.add.push(MapOp::WriteSlots { first: first_row * SLOTS_PER_ROW, words });
            let word = TableWord::new(first_row, log2_wanted, discipline);
            self.add.push(MapOp::SetTableWord { table, word });
            return Ok(Left::More);
        }
        let old_first = word.first_row() * SLOTS_PER_ROW;
        let grown = log2_wanted.saturating_sub(word.log2_length());
        let length = word.length() << grown;
        let now = Lying { image: self.image, first: old_first, grown };
        let mut first = old_first;
        if grown > 0 {
            // Children go on where their parent is; the parent is not changed any more.
            let log2_length = word.log2_length() + grown;
            let first_row = self.place(log2_length, regions)?;
            first = first_row * SLOTS_PER_ROW;
            let words = (0..length).map(|offset| now.at(offset).bits()).collect();
            self.add.push(MapOp::WriteSlots { first, words });
            let word = TableWord::new(first_row, log2_length, discipline);
            self.add.push(MapOp::SetTableWord { table, word });
            self.add.push(MapOp::Grace);
            self.moved = true;
        }
        let shift = length.ilog2() - log2_wanted;
        let some = if grown == 0 && shift == 0 {
            self.at_rest_but_for(table, table_wanted, ids, &now)
        } else {
            None
        };
        let wanted = Wanted::of(table_wanted, ids, some.is_none());
        // Of the others it is not known.
        let all = some.is_none();
        let looked_at = some.unwrap_or_else(|| self.unlike(&now, length, shift, &wanted));
        let waiting = self.waiting;
        let (words, rests) = self.turns(&now, looked_at, shift, &wanted);
        let same = !self.pools(table, table_wanted.pool_set, rests && all) && words.is_empty();
        self.add.extend(runs(words.into_iter().map(|(offset, word)| (first + offset, word))));
        Ok(match () {
            () if grown > 0 || self.waiting > waiting => Left::More,
            () if same => Left::Nothing,
            () => Left::ToWrite,
        })
    }

    /// The slots that change of those that are looked at, by offset, and whether these lie at rest where they should.
    fn turns(
        &mut self,
        now: &Lying<'_>,
        looked_at: Vec<u32>,
        shift: u32,
        wanted: &Wanted<'_>,
    ) -> (Vec<(u32, u32)>, bool) {
        let (mut words, mut rests) = (Vec::new(), true);
        let mut taking: Option<Vec<bool>> = None;
        for offset in looked_at {
            let (slot, content) = (now.at(offset), (offset >> shift) as usize);
            rests &= slot.bits() == wanted.clean(content);
            if slot.bits() == wanted.fresh(content) {
                self.name([slot]);
                continue;
            }
            let cur = wanted.cur.at(content);
            let taking = taking.get_or_insert_with(|| wanted.cur.used());
            let mut next = match &wanted.est {
                None => self.turned(slot, cur, taking),
                Some(_) => Slot::new(cur, slot.est(), true, true),
            };
            let goes_to = wanted.est(content, next.cur());
            let pins_all = wanted.est.is_some();
            if self.going.leaves(next.est(), goes_to) || (pins_all && next.est() == BACKEND_NOBODY) {
                self.left.insert(next.est());
                if self.going.yielding.contains(&next.est()) {
                    *self.yielded.entry(next.est()).or_default() += 1;
                }
                next = Slot::new(next.cur(), goes_to, pins_all, true);
            }
            self.name([next]);
            if next != slot {
                words.push((offset, next.bits()));
            }
        }
        (words, rests)
    }

    /// Slots that have to be looked at, by offset: all but the rows that rest as they should.
    fn unlike(&self, now: &Lying<'_>, length: u32, shift: u32, wanted: &Wanted<'_>) -> Vec<u32> {
        // Whoever asks for names asks all.
        let rows = shift == 0 && now.grown == 0 && !self.names && wanted.est.is_none();
        let Some(places) = wanted.cur.places.as_deref().filter(|_| rows) else {
            return (0..length).collect();
        };
        let first = (now.first / SLOTS_PER_ROW) as usize;
        let rows = self.image.slots[first..].iter().zip(places.chunks(SLOTS_PER_ROW as usize));
        let differs = |(row, places): &(&SlotRow, &[u16])| {
            let unlike = |(word, place): (&u32, &u16)| word ^ wanted.clean[usize::from(*place)];
            row.0.iter().zip(*places).map(unlike).fold(0, |all, one| all | one) != 0
        };
        let differing = (0..).step_by(SLOTS_PER_ROW as usize).zip(rows).filter(|(_, row)| differs(row));
        differing.flat_map(|(offset, (_, places))| offset..offset + places.len() as u32).collect()
    }

    /// Slots that have to be looked at, by offset, of a table that an earlier plan left as it should have been; nothing
    /// where all of them do.
    fn at_rest_but_for(
        &self,
        table: u16,
        wanted: &DesiredTable,
        ids: &Ids,
        now: &Lying<'_>,
    ) -> Option<Vec<u32>> {
        let known = self.leave.at_rest.table(table).filter(|_| !self.names)?;
        let alike = known.pool_set == wanted.pool_set
            && (known.discipline, known.log2_length) == (wanted.discipline, wanted.log2_length);
        if !alike || known.est.is_some() || wanted.est.is_some() {
            return None;
        }
        let mut slots = wanted.cur.differing(&known.cur)?;
        let pools = self.image.table_states[usize::from(table)].pools;
        let turned = self.leave.at_rest.turned(wanted, pools).filter_map(|identity| ids.get(&identity));
        let turned: Vec<u32> = turned.map(|id| u32::from(*id)).collect();
        let names = |word: u32| {
            let slot = Slot::from_bits(word);
            turned
                .iter()
                .fold(false, |any, id| any | (u32::from(slot.cur()) == *id) | (u32::from(slot.est()) == *id))
        };
        if !turned.is_empty() {
            let first = (now.first / SLOTS_PER_ROW) as usize;
            let rows = &self.image.slots[first..][..wanted.cur.len().div_ceil(SLOTS_PER_ROW as usize)];
            for (offset, row) in (0..).step_by(SLOTS_PER_ROW as usize).zip(rows) {
                if row.0.iter().fold(false, |any, word| any | names(*word)) {
                    let end = (offset + SLOTS_PER_ROW).min(wanted.cur.len() as u32);
                    slots.extend(offset..end);
                }
            }
            slots.sort_unstable();
            slots.dedup();
        }
        Some(slots)
    }

    /// Slots that there are once the plan is carried out.
    pub(super) fn name(&mut self, slots: impl IntoIterator<Item = Slot>) {
        if self.names {
            self.named.extend(slots.into_iter().flat_map(|slot| [slot.cur(), slot.est()]));
        }
    }

    /// A slot whose new flows go to `cur` from now on; its old flows stay where they are.
    fn turned(&mut self, slot: Slot, cur: u16, taking: &[bool]) -> Slot {
        if slot.cur() == cur {
            return slot;
        }
        let nobody = slot.cur() == BACKEND_NOBODY;
        // Who takes no new flows any more is left at once; a better spread has time.
        let takes = taking.get(usize::from(slot.cur())).is_some_and(|takes| *takes);
        if takes && !nobody {
            if self.moves_left == 0 {
                self.waiting += 1;
                return slot;
            }
            self.moves_left -= 1;
        }
        if slot.est() == cur {
            // Back where the old flows are: those that went elsewhere meanwhile have pins, new ones need none.
            Slot::new(cur, cur, false, true)
        } else if nobody && slot.est() == BACKEND_NOBODY && !slot.dirty() {
            // Nobody lives here but flows with pins.
            Slot::new(cur, cur, false, slot.pins())
        } else {
            Slot::new(cur, slot.est(), true, slot.pins())
        }
    }

    pub(super) fn place(&mut self, log2_length: u32, regions: &mut Regions) -> Result<u32, PlanError> {
        let length = 1 << log2_length;
        regions.take(units(length)).ok_or(PlanError::Slots { slots: length })
    }

    /// Pins of a table may be of pools that it had before: until it is at rest, they stay in the set. Whether that changes.
    fn pools(&mut self, table: u16, wanted: [u64; 3], rests: bool) -> bool {
        let before = self.image.table_states[usize::from(table)].pools;
        let pools = if rests { wanted } else { [0, 1, 2].map(|word| before[word] | wanted[word]) };
        if pools != before {
            self.add.push(MapOp::SetPools { table, pools });
        }
        pools != before
    }
}

/// What is left to do of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    Nothing,
    /// What the plan writes.
    ToWrite,
    /// What another plan has to find.
    More,
}

/// Backends whose old flows go.
#[derive(Debug, Default)]
pub(super) struct Going {
    /// Failed, or with no room for pins beside them.
    failed: HashSet<u16>,
    /// The latter.
    yielding: HashSet<u16>,
    moved: HashSet<u16>,
}

impl Going {
    pub fn of<'d>(backends: impl IntoIterator<Item = (u16, &'d DesiredBackend)>) -> Self {
        let mut going = Self::default();
        for (id, backend) in backends {
            match backend.old_flows {
                OldFlows::Stay => {}
                OldFlows::Yield => _ = (going.failed.insert(id), going.yielding.insert(id)),
                OldFlows::Fail => _ = going.failed.insert(id),
                OldFlows::Move => _ = going.moved.insert(id),
            }
        }
        going
    }

    /// All of them, in the order of their ids.
    pub fn ids(&self) -> Vec<u16> {
        let mut ids: Vec<u16> = self.failed.union(&self.moved).copied().collect();
        ids.sort_unstable();
        ids
    }

    /// Whether flows on `est` go to `to`. From one that failed, only to one that did not.
    fn leaves(&self, est: u16, to: u16) -> bool {
        let better = to != BACKEND_NOBODY && !self.failed.contains(&to) && !self.moved.contains(&to);
        est != to && (self.failed.contains(&est) && better || self.moved.contains(&est))
    }
}
