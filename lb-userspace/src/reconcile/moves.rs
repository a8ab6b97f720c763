//! Slots that are on the move, over time: when their old flows are all pinned, so that `est` may follow `cur`.
//!
//! Knows when each dirty slot began and whether a pin failed since; the words themselves lie in the image. A restart
//! knows neither, and begins anew: that delays, and breaks nothing.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use lb_common::abi::{BACKEND_NOBODY, BACKEND_PASS, SLOTS_PER_ROW, TableState, TableWord};
use lb_common::slots::Slot;

use super::desired::{Desired, Target};
use super::image::Image;
use super::op::MapOp;

/// How much longer than its idle time a flow is waited for: the clock of the pins is coarse.
pub const SLACK: Duration = Duration::from_secs(3);

/// What a table should become, as far as its moves must know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Course {
    /// How long a silent flow is protected (T1).
    pub idle: Duration,
    /// Of a table that is no hash: where flows without a pin should go, by content slot; with the logarithm of
    /// the number of content slots.
    pub est: Option<(u32, Vec<u16>)>,
}

impl Course {
    /// Of a table that is desired.
    pub fn of(desired: &Desired, image: &Image, ids: &HashMap<u64, u16>, table: u16) -> Option<Self> {
        let wanted = desired.tables.get(&image.table_states.get(usize::from(table))?.identity)?;
        let id_of = |target: &Target| match target {
            Target::Nobody => BACKEND_NOBODY,
            Target::Pass => BACKEND_PASS,
            Target::Backend(identity) => ids.get(identity).copied().unwrap_or(BACKEND_NOBODY),
        };
        let est = wanted.est.as_ref().map(|est| (wanted.log2_length, est.iter().map(id_of).collect()));
        Some(Self { idle: wanted.idle, est })
    }
}

/// Of one table.
#[derive(Debug, Clone)]
struct Table {
    word: TableWord,
    /// Pins that had failed when the starts were last right.
    failed: u64,
    /// When a slot became dirty, in units of `TICK` since `Moves::origin`, plus one; 0 where it is not.
    starts: Vec<u32>,
    dirty: u32,
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
    tables: HashMap<u16, Table>,
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
        Self { origin: now, tables: HashMap::new() }
    }

    fn ticks(&self, now: Instant) -> u32 {
        let ticks = now.saturating_duration_since(self.origin).as_millis() / TICK.as_millis();
        u32::try_from(ticks).unwrap_or(u32::MAX - 1) + 1
    }

    /// Takes in what has been written, after it was written and a grace has passed: slots that are dirty from now on
    /// begin to wait, those that no longer are end it. Pins that failed begin everything anew.
    pub fn observe(&mut self, image: &Image, now: Instant) {
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
            let length = word.length() as usize;
            let table = self.tables.entry(number).or_insert_with(|| Table {
                word,
                failed,
                starts: vec![0; length],
                dirty: 0,
                quiet: now,
                failed_at: None,
            });
            if table.word.log2_length() < word.log2_length() {
                // A slot's children go on where it is.
                let shift = word.log2_length() - table.word.log2_length();
                table.starts = (0..length).map(|slot| table.starts[slot >> shift]).collect();
            } else if table.word.log2_length() != word.log2_length() {
                table.starts = vec![0; length];
            }
            table.word = word;
            if table.failed != failed {
                table.failed = failed;
                table.quiet = now;
                table.failed_at = Some(now);
                table.starts.iter_mut().filter(|start| **start != 0).for_each(|start| *start = tick);
            }
            let waits = !word.discipline().pins_all();
            let first = word.first_row() * SLOTS_PER_ROW;
            table.dirty = 0;
            for (slot, start) in (first..).zip(&mut table.starts) {
                let dirty = waits && image.slot(slot).dirty();
                table.dirty += u32::from(dirty);
                match (dirty, *start) {
                    (true, 0) => *start = tick,
                    (false, _) => *start = 0,
                    _ => {}
                }
            }
        }
    }

    /// Tables whose flows found no room for pins lately.
    pub fn without_room(&self, now: Instant) -> impl Iterator<Item = u16> {
        let lately = move |table: &Table| table.failed_at.is_some_and(|at| now < at + LATELY);
        self.tables.iter().filter(move |(_, table)| lately(table)).map(|(number, _)| *number)
    }

    /// What lets `est` follow, for each table that has waited long enough: to be carried out one after the other.
    pub fn due(
        &self,
        image: &Image,
        now: Instant,
        course: impl Fn(u16) -> Option<Course>,
    ) -> Vec<(u16, Vec<MapOp>)> {
        let mut due = Vec::new();
        for (&number, table) in &self.tables {
            if table.dirty == 0 && !table.word.discipline().pins_all() {
                continue;
            }
            let Some(course) = course(number) else { continue };
            let words = match &course.est {
                None => self.finished(image, table, now, course.idle),
                Some((log2, est)) => turned(image, table, now, course.idle, *log2, est),
            };
            if !words.is_empty() {
                due.push((number, finish(number, table.failed, words)));
            }
        }
        due.sort_by_key(|(number, _)| *number);
        due
    }

    /// Slots whose flows are all pinned, or on what is `cur` now.
    fn finished(&self, image: &Image, table: &Table, now: Instant, idle: Duration) -> Vec<(u32, u32)> {
        let waited = |start: u32| {
            let began = self.origin + TICK * (start - 1);
            // A tick is rounded down.
            now.saturating_duration_since(began) >= idle + SLACK + TICK
        };
        let first = table.word.first_row() * SLOTS_PER_ROW;
        let slots = (first..).zip(&table.starts).filter(|(_, start)| **start != 0 && waited(**start));
        let finished = slots.map(|(index, _)| {
            let cur = image.slot(index).cur();
            (index, Slot::new(cur, cur, false, true).bits())
        });
        finished.collect()
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

/// Slots of a table that pins every flow, whose `est` is not what it should be, once no flow can be without a pin.
fn turned(
    image: &Image,
    table: &Table,
    now: Instant,
    idle: Duration,
    log2: u32,
    est: &[u16],
) -> Vec<(u32, u32)> {
    if now.saturating_duration_since(table.quiet) < idle + SLACK {
        return Vec::new();
    }
    let shift = table.word.log2_length().saturating_sub(log2);
    let first = table.word.first_row() * SLOTS_PER_ROW;
    let mut words = Vec::new();
    for offset in 0..table.word.length() {
        let slot = image.slot(first + offset);
        let wanted = est.get((offset >> shift) as usize).copied().unwrap_or(BACKEND_NOBODY);
        if slot.est() != wanted {
            words.push((first + offset, Slot::new(slot.cur(), wanted, true, true).bits()));
        }
    }
    words
}

/// Lets `est` of these slots move. A flow that could not be pinned meanwhile is on the old `est`: then nothing is
/// stored. While it is `closing`, such a flow's packets are dropped.
pub fn finish(table: u16, failed: u64, words: Vec<(u32, u32)>) -> Vec<MapOp> {
    let mut ops = vec![
        MapOp::SetClosing { table, closing: TableState::CLOSING },
        MapOp::Grace,
        MapOp::ExpectFailed { table, failed },
    ];
    ops.extend(runs(words));
    ops.extend([MapOp::Grace, MapOp::SetClosing { table, closing: 0 }]);
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
