//! Makes a corpus small: fewest and plainest frames that together take the same edges.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, ensure};
use tests::fuzz::corpus::{self, Case};
use tests::fuzz::{Program, Subject, shrunk};

use crate::coverage::{Coverage, Taken};
use crate::search::HEADING;

/// Attempts to make one frame plainer.
const MOST_ATTEMPTS: usize = 400;

pub fn minimise(program: Program) -> Result<()> {
    let coverage = Coverage::new();
    ensure!(
        coverage.is_built_in(),
        "there are no counters of edges in this build; use `cargo xtask fuzz --minimise`"
    );
    let mut subjects = crate::subjects(program, false)?;
    let mut taken = |frame: &[u8]| taken(&mut subjects, &coverage, frame);
    let mut cases = corpus::read(&program.corpus())?;
    let before = cases.len();
    cases.sort_by_key(|case| (case.frame.len(), case.name.clone()));
    let mut cases: Vec<_> = cases.into_iter().map(|case| (taken(&case.frame), case)).collect();
    let all: BTreeSet<Taken> = cases.iter().flat_map(|(taken, _)| taken).copied().collect();
    let mut takers = takers(&cases);
    // The longest first: what shorter ones do as well is not needed of them.
    for index in (0..cases.len()).rev() {
        if cases[index].0.iter().all(|edge| takers[edge] > 1) {
            let (gone, _) = cases.remove(index);
            gone.iter().for_each(|edge| *takers.entry(*edge).or_default() -= 1);
        }
    }
    for (edges, case) in &mut cases {
        let own: BTreeSet<_> = edges.iter().filter(|edge| takers[edge] == 1).copied().collect();
        plainer(case, &own, &mut taken);
        // It no longer takes all that it did: what it took alone, it still does.
        edges.iter().for_each(|edge| *takers.entry(*edge).or_default() -= 1);
        *edges = taken(&case.frame);
        edges.iter().for_each(|edge| *takers.entry(*edge).or_default() += 1);
    }
    let left: BTreeSet<Taken> = cases.iter().flat_map(|(taken, _)| taken).copied().collect();
    ensure!(left.is_superset(&all), "{}: edges were lost", program.name());
    let cases: Vec<_> = cases.into_iter().map(|(_, case)| case).collect();
    corpus::write(&program.corpus(), HEADING, &cases)?;
    println!("{}: {} of {before} cases are needed", program.corpus().display(), cases.len());
    Ok(())
}

/// How many cases take an edge.
fn takers(cases: &[(BTreeSet<Taken>, Case)]) -> BTreeMap<Taken, usize> {
    let mut takers = BTreeMap::new();
    for edge in cases.iter().flat_map(|(taken, _)| taken) {
        *takers.entry(*edge).or_default() += 1;
    }
    takers
}

/// All that a frame takes under all subjects.
fn taken(subjects: &mut [Box<dyn Subject>], coverage: &Coverage, frame: &[u8]) -> BTreeSet<Taken> {
    let mut taken = BTreeSet::new();
    for subject in subjects {
        coverage.begin();
        // On the host alone, nothing differs.
        _ = subject.run(frame);
        taken.extend(coverage.taken());
    }
    taken
}

fn plainer(case: &mut Case, own: &BTreeSet<Taken>, taken: &mut impl FnMut(&[u8]) -> BTreeSet<Taken>) {
    let mut attempts = 0;
    case.frame = shrunk(&case.frame, |frame| {
        attempts += 1;
        attempts <= MOST_ATTEMPTS && taken(frame).is_superset(own)
    });
}
