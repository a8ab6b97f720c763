//! Makes a corpus small: fewest and plainest frames that together take the same edges.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use anyhow::{Result, ensure};
use tests::fuzz::corpus::{self, Case};
use tests::fuzz::{Program, Subject, plain, shape, shrunk};

use crate::coverage::{Coverage, Taken};
use crate::search::{HEADING, unused};

/// Attempts to make one frame plainer.
const MOST_ATTEMPTS: usize = 400;

pub fn minimise(program: Program) -> Result<()> {
    let coverage = Coverage::new();
    ensure!(
        coverage.is_built_in(),
        "there are no counters of edges in this build; use `cargo xtask fuzz --minimise`"
    );
    let mut subjects = crate::subjects(program, false)?;
    let mut cases = corpus::read(&program.corpus())?;
    let before = cases.len();
    cases.sort_by_key(|case| (case.frame.len(), case.name.clone()));
    let mut cases: Vec<_> =
        cases.into_iter().map(|case| (run(&mut subjects, &coverage, &case.frame).0, case)).collect();
    let all: BTreeSet<Taken> = cases.iter().flat_map(|(taken, _)| taken).copied().collect();
    let mut takers = takers(&cases);
    // The longest first: what shorter ones do as well is not needed of them.
    for index in (0..cases.len()).rev() {
        if cases[index].0.iter().all(|edge| takers[edge] > 1) {
            let (gone, _) = cases.remove(index);
            gone.iter().for_each(|edge| *takers.entry(*edge).or_default() -= 1);
        }
    }
    let fixtures: HashSet<_> = program.fixtures().into_iter().map(|case| case.name).collect();
    let mut kept = Vec::new();
    for (edges, case) in cases {
        let own = edges.iter().filter(|edge| takers[edge] == 1).copied().collect();
        let plainer =
            plainer(&case, fixtures.contains(&case.name), |frame| run(&mut subjects, &coverage, frame), &own);
        // It may no longer take all that it did: what it took alone, it still does.
        edges.iter().for_each(|edge| *takers.entry(*edge).or_default() -= 1);
        let (taken, outcomes) = run(&mut subjects, &coverage, &plainer);
        taken.iter().for_each(|edge| *takers.entry(*edge).or_default() += 1);
        let name = if fixtures.contains(&case.name) {
            case.name
        } else {
            named(&*subjects[0], &plainer, outcomes[0])
        };
        kept.push(Case { name: unused(&kept, &name), frame: plainer });
    }
    ensure!(all.iter().all(|edge| takers[edge] > 0), "{}: edges were lost", program.name());
    corpus::write(&program.corpus(), HEADING, &kept)?;
    println!("{}: {} of {before} cases are needed", program.corpus().display(), kept.len());
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

/// All that a frame takes, and the number of its outcome under each subject.
type Ran = (BTreeSet<Taken>, Vec<usize>);

fn run(subjects: &mut [Box<dyn Subject>], coverage: &Coverage, frame: &[u8]) -> Ran {
    let (mut taken, mut outcomes) = (BTreeSet::new(), Vec::new());
    for subject in subjects {
        coverage.begin();
        // On the host alone, nothing differs.
        outcomes.extend(subject.run(frame));
        taken.extend(coverage.taken());
    }
    (taken, outcomes)
}

/// A frame that ends as this one does and takes the same edges, as far as no other takes them. One of the fixtures stays
/// what its name says: only what lies behind its headers changes.
fn plainer(case: &Case, fixture: bool, mut run: impl FnMut(&[u8]) -> Ran, own: &BTreeSet<Taken>) -> Vec<u8> {
    let (_, outcomes) = run(&case.frame);
    let mut attempts = 0;
    let mut holds = |frame: &[u8]| {
        attempts += 1;
        let (taken, ends) = if attempts <= MOST_ATTEMPTS { run(frame) } else { return false };
        ends == outcomes && taken.is_superset(own)
    };
    let plain = plain(&case.frame);
    let frame = if holds(&plain) { plain } else { case.frame.clone() };
    if fixture { frame } else { shrunk(&frame, holds) }
}

fn named(subject: &dyn Subject, frame: &[u8], outcome: usize) -> String {
    corpus::kebab(&format!("{} {}", shape(frame), subject.counted()[outcome].0))
}
