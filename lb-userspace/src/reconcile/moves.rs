//! Slots that are on the move, over time: when their old flows are all pinned, so that `est` may follow `cur`.
//!
//! Knows when each dirty slot began and whether a pin failed since; the words themselves lie in the image. A restart
//! knows neither, and begins anew: that delays, and breaks nothing.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use lb_common::abi::{BACKEND_NOBODY, SLOTS_PER_ROW, SlotRow, TableState, TableWord};
use lb_common::slots::Slot;

use super::desired::Desired;
use super::image::{Ids, Image};
use super::op::MapOp;
use super::targets::Targets;

/// How much longer than its idle time a flow is waited for: the clock of the pins is coarse.
pub const SLACK: Duration = Duration::from_secs(3);

/// Slots that `est` follows in at once, but for those of the first table: how long tables are closing, and a look takes.
pub const MOST_AT_ONCE: usize = 1 << 18;

/// What a table should become, as far as its moves must know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Course<'d> {
    /// How long a silent flow is protected (T1).
    pub idle: Duration,
    /// Of a table that is no hash: where flows without a pin should go, by content slot; with the logarithm of
    /// the number of content slots.
    pub est: Option<(u32, &'d Targets)>,
}

impl<'d> Course<'d> {
    /// Of a table that is desired.
    pub fn of(desired: &'d Desired, image: &Image, table: u16) -> Option<Self> {
        let wanted = desired.tables.get(&image.table_states.get(usize::from(table))?.identity)?;
        let est = wanted.est.as_ref().map(|est| (wanted.log2_length, est));
        Some(Self { idle: wanted.idle, est })
    }
}

/// What lets `est` of a table follow: its slots, with their words then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Due {
    pub table: u16,
    /// Pins that had failed when the wait was over.
    pub failed: u64,
    pub words: Vec<(u32, u32)>,
}

/// Of one table.
#[derive(Debug, Clone)]
struct Table {
    word: TableWord,
    /// Pins that had failed when the starts were last right.
    failed: u64,
    /// When a slot became dirty, in units of `TICK` since `Moves::origin`, plus one; 0 where it is not. Empty where none is.
    starts: Vec<u32>,
    dirty: u32,
    /// Slots with `P`.
    pinned: u32,
    /// The least of `starts` but for 0; 0 where no slot is dirty.
    earliest: u32,
    /// Whether every `est` of a table that is no hash was seen to be as it should, with nothing written since.
    settled: bool,
    /// Since when no pin has failed, for tables that are no hash.
    quiet: Instant,
    /// When the last pin is known to have failed.
    failed_at: Option<Instant>,
}

/// How long ago a pin may have failed for there to be no room.
const LATELY: Duration = Duration::from_secs(2);

const TICK: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub struct Moves {
    origin: Instant,
    tables: BTreeMap<u16, Table>,
    /// Whether there are slots that pins may be of, or a table that pins every flow.
    pins: bool,
}

/// How many slots of a table are on the move.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    pub slots: u32,
    /// `D`: new flows are pinned, old ones waited for.
    pub dirty: u32,
    /// Pins of flows that live elsewhere may exist.
    pub pinned: u32,
    /// How long ago the oldest move began.
    pub oldest: Option<Duration>,
}

impl Moves {
    /// `now`: nothing is known of the time before. What is dirty began now.
    pub fn new(now: Instant) -> Self {
        Self { origin: now, tables: BTreeMap::new(), pins: false }
    }

    fn ticks(&self, now: Instant) -> u32 {
        let ticks = now.saturating_duration_since(self.origin).as_millis() / TICK.as_millis();
        u32::try_from(ticks).unwrap_or(u32::MAX - 1) + 1
    }

    /// Takes in what has been written, after it was written and a grace has passed: slots that are dirty from now on
    /// begin to wait, those that no longer are end it. What is desired may be another, too. `written` says of which tables
    /// slots were written since the last look.
    pub fn observe_written(&mut self, image: &Image, now: Instant, written: impl Fn(u16) -> bool) {
        let tick = self.ticks(now);
        let before = self.tables.len();
        self.tables.retain(|table, _| image.tables.get(usize::from(*table)).is_some_and(|word| *word != 0));
        if self.tables.len() < before {
            // Its flows may go by another one now, and those that have no pin are not in that one's count.
            self.tables.values_mut().for_each(|table| table.quiet = now);
        }
        for (number, word) in (0u16..).zip(image.tables.iter().map(|&bits| TableWord::from_bits(bits))) {
            if word == TableWord::default() {
                continue;
            }
            let failed = image.table_states[usize::from(number)].failed;
            let known = self.tables.get(&number).is_some_and(|table| table.word == word);
            let table = self.tables.entry(number).or_insert_with(|| Table::new(word, failed, now));
            table.settled = false;
            table.begin_anew(failed, now, tick);
            if !known || written(number) {
                table.look(image, word, tick);
            }
        }
        let pins = |table: &Table| table.dirty > 0 || table.pinned > 0 || table.word.discipline().pins_all();
        self.pins = self.tables.values().any(pins);
    }

    /// As if all slots had been written.
    #[cfg(test)]
    pub fn observe(&mut self, image: &Image, now: Instant) {
        self.observe_written(image, now, |_| true);
    }

    /// Whether there are slots that pins may be of, or a table that pins every flow. Asked with every event.
    pub fn has_pins(&self) -> bool {
        self.pins
    }

    /// Takes in pins that failed, where nothing was written since the last look: they begin the wait of their table anew.
    pub fn observe_failures(&mut self, image: &Image, now: Instant) {
        let tick = self.ticks(now);
        for (number, table) in &mut self.tables {
            table.begin_anew(image.table_states[usize::from(*number)].failed, now, tick);
        }
    }

    /// Tables whose flows found no room for pins lately.
    pub fn without_room(&self, now: Instant) -> impl Iterator<Item = u16> {
        let lately = move |table: &Table| table.failed_at.is_some_and(|at| now < at + LATELY);
        self.tables.iter().filter(move |(_, table)| lately(table)).map(|(number, _)| *number)
    }

    /// What lets `est` follow, for tables that have waited long enough: for as many as may go at once, the first ones. The
    /// others are still due then.
    pub fn due<'d>(
        &mut self,
        image: &Image,
        now: Instant,
        course: impl Fn(u16) -> Option<Course<'d>>,
    ) -> Vec<Due> {
        let (mut due, mut slots, mut ids) = (Vec::new(), 0, None);
        for (&number, table) in &mut self.tables {
            if table.is_at_rest() {
                continue;
            }
            let Some(course) = course(number) else { continue };
            let words = match course.est {
                None => table.finished(image, now.saturating_duration_since(self.origin), course.idle),
                Some(_) if now.saturating_duration_since(table.quiet) < course.idle + SLACK => continue,
                Some((log2, est)) => {
                    let ids = ids.get_or_insert_with(|| image.ids());
                    let words = table.turned(image, log2, est, ids);
                    table.settled = words.is_empty();
                    words
                }
            };
            if words.is_empty() {
                continue;
            }
            slots += words.len();
            if slots > MOST_AT_ONCE && !due.is_empty() {
                break;
            }
            due.push(Due { table: number, failed: table.failed, words });
        }
        due
    }

    /// Whether a slot of the table is dirty.
    pub fn is_moving(&self, number: u16) -> bool {
        self.tables.get(&number).is_some_and(|table| table.dirty > 0)
    }

    pub fn progress(&self, image: &Image, number: u16, now: Instant) -> Progress {
        let Some(table) = self.tables.get(&number) else { return Progress::default() };
        let first = table.word.first_row() * SLOTS_PER_ROW;
        let words = (first..first + table.word.length()).map(|index| image.slot(index));
        let hash = !table.word.discipline().pins_all();
        let pinned = if hash { words.filter(|slot| slot.pins() && !slot.dirty()).count() as u32 } else { 0 };
        let oldest = table.starts.iter().filter(|start| **start != 0).min();
        Progress {
            slots: table.word.length(),
            dirty: table.dirty,
            pinned,
            oldest: oldest.map(|start| now.saturating_duration_since(self.origin + TICK * (start - 1))),
        }
    }
}

impl Table {
    /// Of which no slot was looked at.
    fn new(word: TableWord, failed: u64, now: Instant) -> Self {
        Self {
            word,
            failed,
            starts: Vec::new(),
            dirty: 0,
            pinned: 0,
            earliest: 0,
            settled: false,
            quiet: now,
            failed_at: None,
        }
    }

    /// Takes in its slots, and its place if that is another.
    fn look(&mut self, image: &Image, word: TableWord, tick: u32) {
        let length = word.length() as usize;
        if self.word.log2_length() < word.log2_length() && !self.starts.is_empty() {
            // A slot's children go on where it is.
            let shift = word.log2_length() - self.word.log2_length();
            self.starts = (0..length).map(|slot| self.starts[slot >> shift]).collect();
        } else if self.word.log2_length() != word.log2_length() {
            self.starts = Vec::new();
        }
        self.word = word;
        let waits = !word.discipline().pins_all();
        (self.dirty, self.pinned, self.earliest) = (0, 0, 0);
        let rows = &image.slots[word.first_row() as usize..][..length.div_ceil(SLOTS_PER_ROW as usize)];
        for (row, words) in rows.iter().enumerate() {
            // Of most rows no slot is on the move, nor was.
            let at_rest = words.0.iter().all(|&word| Slot::from_bits(word).is_clean());
            if !at_rest || !self.starts.is_empty() {
                self.look_at_row(row * SLOTS_PER_ROW as usize, words, waits, length, tick);
            }
        }
        if self.dirty == 0 {
            self.starts = Vec::new();
        }
    }

    fn look_at_row(&mut self, first: usize, words: &SlotRow, waits: bool, length: usize, tick: u32) {
        for (index, slot) in (first..length).zip(words.0.map(Slot::from_bits)) {
            self.pinned += u32::from(slot.pins());
            if waits && slot.dirty() {
                self.dirty += 1;
                if self.starts.is_empty() {
                    self.starts = vec![0; length];
                }
                let start = &mut self.starts[index];
                *start = if *start == 0 { tick } else { *start };
                self.earliest = if self.earliest == 0 { *start } else { self.earliest.min(*start) };
            } else if let Some(start) = self.starts.get_mut(index) {
                *start = 0;
            }
        }
    }

    /// Where pins have failed, every wait begins now.
    fn begin_anew(&mut self, failed: u64, now: Instant, tick: u32) {
        if self.failed == failed {
            return;
        }
        self.failed = failed;
        self.quiet = now;
        self.failed_at = Some(now);
        self.starts.iter_mut().filter(|start| **start != 0).for_each(|start| *start = tick);
        if self.earliest != 0 {
            self.earliest = tick;
        }
    }

    fn is_at_rest(&self) -> bool {
        if self.word.discipline().pins_all() { self.settled } else { self.dirty == 0 }
    }

    /// Slots whose flows are all pinned, or on what is `cur` now. `now`: since `Moves::origin`.
    fn finished(&self, image: &Image, now: Duration, idle: Duration) -> Vec<(u32, u32)> {
        // A tick is rounded down.
        let waited = |start: u32| start != 0 && now.saturating_sub(TICK * (start - 1)) >= idle + SLACK + TICK;
        if !waited(self.earliest) {
            return Vec::new();
        }
        let first = self.word.first_row() * SLOTS_PER_ROW;
        let slots = (first..).zip(&self.starts).filter(|(_, start)| waited(**start));
        let finished = slots.map(|(index, _)| {
            let cur = image.slot(index).cur();
            (index, Slot::new(cur, cur, false, true).bits())
        });
        finished.collect()
    }

    /// Slots of a table that pins every flow, whose `est` is not what it should be. No flow may be without a pin.
    fn turned(&self, image: &Image, log2: u32, est: &Targets, ids: &Ids) -> Vec<(u32, u32)> {
        let shift = self.word.log2_length().saturating_sub(log2);
        let first = self.word.first_row() * SLOTS_PER_ROW;
        let mut words = Vec::new();
        for offset in 0..self.word.length() {
            let slot = image.slot(first + offset);
            let wanted = est.get((offset >> shift) as usize).map_or(BACKEND_NOBODY, |target| target.id(ids));
            if slot.est() != wanted {
                words.push((first + offset, Slot::new(slot.cur(), wanted, true, true).bits()));
            }
        }
        words
    }
}

/// Lets `est` of these tables follow, all at once. A flow that could not be pinned meanwhile is on the old `est`: then
/// nothing is stored in its table. While one is `closing`, such a flow's packets are dropped.
pub fn finish(due: Vec<Due>) -> Vec<MapOp> {
    let tables: Vec<u16> = due.iter().map(|due| due.table).collect();
    let close = |closing| tables.iter().map(move |&table| MapOp::SetClosing { table, closing });
    let mut ops: Vec<MapOp> = close(TableState::CLOSING).collect();
    ops.push(MapOp::Grace);
    for Due { table, failed, words } in due {
        ops.push(MapOp::ExpectFailed { table, failed });
        ops.extend(runs(words));
    }
    ops.push(MapOp::Grace);
    ops.extend(close(0));
    ops
}

/// Words by their place, in as few operations as there are runs.
pub fn runs(words: impl IntoIterator<Item = (u32, u32)>) -> Vec<MapOp> {
    let mut runs: Vec<(u32, Vec<u32>)> = Vec::new();
    for (index, word) in words {
        match runs.last_mut() {
            Some((start, run)) if *start + run.len() as u32 == index => run.push(word),
            _ => runs.push((index, vec![word])),
        }
    }
    runs.into_iter().map(|(first, words)| MapOp::WriteSlots { first, words }).collect()
}
