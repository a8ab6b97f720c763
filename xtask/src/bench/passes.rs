//! Measures every line more than once, and leaves out what a machine in another mood has measured.
//!
//! Virtual machines share their CPU: for seconds on end everything takes a quarter more, and the balancer more than the
//! harness. The harness is the same for all lines, and so tells. And a program that is loaded anew lies elsewhere in
//! memory, which alone is worth some per cent: each pass loads it again.

use anyhow::{Context, Result};
use lb_userspace::bpf::Round;

use super::figures::Spread;
use super::lines::Line;
use super::order::Orders;
use super::stage::Stage;

/// A harness that takes this much more than at its best is that of a disturbed machine.
const CALM: f64 = 1.15;
/// Passes over lines that were never measured calmly.
const SECOND_TRIES: u32 = 2;

/// All rounds of one line in one pass.
type Measured = Vec<Round>;

/// What the passes came to for one line.
pub struct Settled {
    pub rounds: Vec<Round>,
    /// Whether the machine was never calm.
    pub disturbed: bool,
}

/// Rounds of all lines; `tell` hears of each line before it is measured.
pub fn measure(lines: &[Line], passes: u32, rounds: u32, tell: &mut dyn FnMut(&str)) -> Result<Vec<Settled>> {
    let mut orders = Orders::default();
    let mut measured: Vec<Vec<Measured>> = vec![Vec::new(); lines.len()];
    for pass in 1..=passes + SECOND_TRIES {
        let best = best(&measured);
        let disturbed = |taken: &[Measured]| settle(taken, best).disturbed;
        let due: Vec<usize> =
            (0..lines.len()).filter(|&line| pass <= passes || disturbed(&measured[line])).collect();
        let mut stage: Option<Stage> = None;
        for (number, &index) in due.iter().enumerate() {
            let line = &lines[index];
            tell(&format!("pass {pass}, {} of {}: {}", number + 1, due.len(), line.name()));
            if stage.as_ref().is_none_or(|stage| stage.scene != line.scene) {
                // The one before holds the same directory.
                drop(stage.take());
                stage = Some(Stage::set(line.scene)?);
            }
            let stage = stage.as_mut().context("no stage")?;
            measured[index].push(stage.time(line, &mut orders, rounds)?);
        }
    }
    let best = best(&measured);
    Ok(measured.iter().map(|taken| settle(taken, best)).collect())
}

/// What the harness took when it took least.
fn best(measured: &[Vec<Measured>]) -> f64 {
    measured.iter().flatten().map(|rounds| harness(rounds)).fold(f64::INFINITY, f64::min)
}

fn harness(rounds: &[Round]) -> f64 {
    Spread::of(rounds.iter().map(|round| round.harness)).median
}

/// The rounds of the calm passes; where there is none, of the calmest.
fn settle(taken: &[Measured], best: f64) -> Settled {
    let calm: Vec<Round> =
        taken.iter().filter(|rounds| harness(rounds) <= best * CALM).flatten().copied().collect();
    if !calm.is_empty() {
        return Settled { rounds: calm, disturbed: false };
    }
    let calmest = taken.iter().min_by(|one, other| harness(one).total_cmp(&harness(other)));
    Settled { rounds: calmest.cloned().unwrap_or_default(), disturbed: true }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(harness: f64, program: f64) -> Measured {
        vec![Round { harness, floor: harness, program }; 3]
    }

    fn programs(settled: &Settled) -> Vec<f64> {
        let mut programs: Vec<f64> = settled.rounds.iter().map(|round| round.program).collect();
        programs.dedup();
        programs
    }

    #[test]
    fn passes_of_a_disturbed_machine_are_left_out() {
        let taken = [rounds(36.0, 80.0), rounds(46.0, 120.0), rounds(35.0, 82.0)];
        let settled = settle(&taken, best(&[taken.to_vec(), vec![rounds(34.0, 50.0)]]));
        assert_eq!(programs(&settled), [80.0, 82.0]);
        assert!(!settled.disturbed);
    }

    #[test]
    fn a_line_that_was_never_measured_calmly_says_so_and_has_the_calmest() {
        let settled = settle(&[rounds(47.0, 130.0), rounds(45.0, 120.0)], 35.0);
        assert_eq!(programs(&settled), [120.0]);
        assert!(settled.disturbed);
    }

    #[test]
    fn what_was_not_measured_is_disturbed() {
        assert!(settle(&[], best(&[])).disturbed);
    }
}
