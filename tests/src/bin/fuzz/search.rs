//! The search: frames out of those that reached something new, under all subjects in turn.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use tests::fuzz::corpus::{self, Case};
use tests::fuzz::{Hunter, LONGEST, Mismatch, Mutator, Program, SHORTEST, shape};

use crate::coverage::Coverage;

const PROGRESS_EVERY: Duration = Duration::from_secs(5);
/// Frames between two looks at the clock.
const FRAMES_A_LOOK: u32 = 64;

/// What is searched for one program.
struct Field {
    program: Program,
    hunters: Vec<Hunter>,
    mutator: Mutator,
    /// What the corpus holds, and what came to it.
    corpus: Vec<Case>,
    found: usize,
}

pub struct Search {
    fields: Vec<Field>,
    coverage: Coverage,
    begin: Instant,
    frames: u64,
}

impl Search {
    /// With the corpus and the fixtures behind it: what of these reaches something new is in the corpus afterwards.
    pub fn begin(seed: u64, kernel: bool) -> Result<Self> {
        let coverage = Coverage::new();
        if !coverage.is_built_in() {
            println!(
                "built without counters of edges: outcomes alone say what is new (use `cargo xtask fuzz`)"
            );
        }
        let fields = Program::ALL.into_iter().map(|program| Field::begin(program, seed, kernel));
        let fields = fields.collect::<Result<_>>()?;
        Ok(Self { fields, coverage, begin: Instant::now(), frames: 0 })
    }

    pub fn go_on_for(&mut self, time: Duration, end: &AtomicBool) -> Result<(), Box<Mismatch>> {
        for field in &mut self.fields {
            self.frames += field.replay(&mut self.coverage)?;
        }
        self.begin = Instant::now();
        let before = self.frames;
        let mut told = Instant::now();
        while self.begin.elapsed() < time && !end.load(Ordering::Relaxed) {
            for field in &mut self.fields {
                for _ in 0..FRAMES_A_LOOK {
                    self.frames += field.step(&mut self.coverage)?;
                }
            }
            if told.elapsed() >= PROGRESS_EVERY {
                told = Instant::now();
                self.progress(self.frames - before);
            }
        }
        self.fields.iter_mut().flat_map(|field| &mut field.hunters).try_for_each(Hunter::settle)
    }

    fn progress(&self, frames: u64) {
        let seconds = self.begin.elapsed().as_secs_f64();
        let met: Vec<_> = self.met().into_values().collect();
        println!(
            "{seconds:6.0} s {frames:12} frames {:8.0}/s {:6} edges {:5} new cases {:3} of {} outcomes",
            frames as f64 / seconds,
            self.coverage.edges(),
            self.fields.iter().map(|field| field.found).sum::<usize>(),
            met.iter().filter(|frames| **frames > 0).count(),
            met.len(),
        );
    }

    /// Frames by program and outcome.
    fn met(&self) -> BTreeMap<(&'static str, &'static str), u64> {
        let mut met = BTreeMap::new();
        for field in &self.fields {
            for (outcome, frames) in field.hunters.iter().flat_map(|hunter| hunter.subject.counted()) {
                *met.entry((field.program.name(), outcome)).or_default() += frames;
            }
        }
        met
    }

    pub fn summary(&self) {
        for ((program, outcome), frames) in self.met() {
            println!("{program:10} {outcome:28} {frames:12}");
        }
        // Of the whole binary: what is not of the packet path is never taken while a frame is on its way.
        println!("{} frames, {} of {} edges", self.frames, self.coverage.edges(), self.coverage.total());
    }

    /// Adds to the corpus what reached something new.
    pub fn save(&self) -> Result<()> {
        for field in self.fields.iter().filter(|field| field.found > 0) {
            corpus::write(&field.program.corpus(), HEADING, &field.corpus)?;
            println!("{}: {} new cases", field.program.corpus().display(), field.found);
        }
        Ok(())
    }
}

pub const HEADING: &str = "Frames that together reach every edge that is known to be reached: `cargo xtask fuzz`, then with `--minimise`.";

impl Field {
    fn begin(program: Program, seed: u64, kernel: bool) -> Result<Self> {
        let seeds = program.seeds(None)?.into_iter().map(|case| case.frame).collect();
        Ok(Self {
            hunters: crate::subjects(program, kernel)?.into_iter().map(Hunter::new).collect(),
            mutator: Mutator::new(seed, seeds),
            corpus: corpus::read(&program.corpus())?,
            found: 0,
            program,
        })
    }

    /// The corpus and the fixtures under each subject.
    fn replay(&mut self, coverage: &mut Coverage) -> Result<u64, Box<Mismatch>> {
        let known: HashSet<_> = self.corpus.iter().map(|case| case.frame.clone()).collect();
        let mut cases = self.corpus.clone();
        let runs = |frame: &[u8]| (SHORTEST..=LONGEST).contains(&frame.len());
        cases.extend(self.program.fixtures().into_iter().filter(|case| runs(&case.frame)));
        let mut frames = 0;
        for case in cases {
            let mut new = false;
            for hunter in &mut self.hunters {
                new |= step(hunter, coverage, &case.frame)?.is_some();
                frames += 1;
            }
            if new && !known.contains(&case.frame) {
                self.keep(case);
            }
        }
        Ok(frames)
    }

    /// One new frame, under each subject: what is odd about it may show under one only.
    fn step(&mut self, coverage: &mut Coverage) -> Result<u64, Box<Mismatch>> {
        let frame = self.mutator.frame();
        let mut reached = None;
        for hunter in &mut self.hunters {
            reached = step(hunter, coverage, &frame)?.or(reached);
        }
        if let Some(outcome) = reached {
            self.mutator.learn(&frame);
            self.keep(Case { name: corpus::kebab(&format!("{} {outcome}", shape(&frame))), frame });
        }
        Ok(self.hunters.len() as u64)
    }

    fn keep(&mut self, case: Case) {
        self.corpus.push(Case { name: unused(&self.corpus, &case.name), frame: case.frame });
        self.found += 1;
    }
}

/// The name, or one like it that no case has yet.
pub fn unused(cases: &[Case], name: &str) -> String {
    let names: HashSet<_> = cases.iter().map(|case| case.name.as_str()).collect();
    let mut free = name.to_owned();
    let mut number = 1;
    while names.contains(free.as_str()) {
        number += 1;
        free = format!("{name}-{number}");
    }
    free
}

/// Runs a frame; its outcome, if it reached something new.
fn step(
    hunter: &mut Hunter,
    coverage: &mut Coverage,
    frame: &[u8],
) -> Result<Option<&'static str>, Box<Mismatch>> {
    coverage.begin();
    let outcome = hunter.run(frame)?;
    if coverage.is_built_in() && !coverage.is_new() {
        return Ok(None);
    }
    let (name, frames) = hunter.subject.counted()[outcome];
    Ok((coverage.is_built_in() || frames == 1).then_some(name))
}
