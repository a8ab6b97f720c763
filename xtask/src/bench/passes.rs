//! Measures every line more than once, and leaves out what a machine in another mood has measured.
//!
//! Virtual machines share their CPU: for a while everything takes a quarter more, and the balancer more than the
//! harness. The harness is the same for all lines, and so tells. And a program that is loaded anew lies elsewhere in
//! memory, which alone is worth some per cent: each pass loads it again.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use lb_userspace::bpf::Round;

use super::figures::Spread;
use super::lines::Line;
use super::order::Orders;
use super::stage::{Plans, Stage};

/// A harness that takes this much more than at its best is that of a disturbed machine.
const CALM: f64 = 1.15;
/// How often more rounds of a line are asked for, in one pass, while the machine is disturbed.
const TRIES: u32 = 3;
/// Further passes, over lines that the machine was disturbed for in all others.
const SECOND_TRIES: u32 = 2;

/// What the passes came to for one line.
pub struct Settled {
    pub rounds: Vec<Round>,
    /// Whether the machine was hardly ever calm.
    pub disturbed: bool,
}

/// Rounds of all lines; `tell` hears of each line before it is measured. Ends early, with nothing left behind, if told to
/// `stop`.
pub fn measure(
    lines: &[Line],
    passes: u32,
    rounds: u32,
    stop: &AtomicBool,
    tell: &mut dyn FnMut(&str),
) -> Result<Vec<Settled>> {
    let (mut orders, mut plans) = (Orders::default(), Plans::default());
    let mut taken: Vec<Vec<Round>> = vec![Vec::new(); lines.len()];
    let mut best = f64::INFINITY;
    for pass in 1..=passes + SECOND_TRIES {
        let mut stage: Option<Stage> = None;
        let is_due = |rounds: &[Round]| pass <= passes || is_disturbed(rounds, best);
        let due: Vec<usize> = (0..lines.len()).filter(|&index| is_due(&taken[index])).collect();
        for (number, &index) in due.iter().enumerate() {
            ensure!(!stop.load(Ordering::Relaxed), "stopped");
            let line = &lines[index];
            tell(&format!("pass {pass}, {} of {}: {}", number + 1, due.len(), line.name()));
            if stage.as_ref().is_none_or(|stage| stage.scene != line.scene) {
                // The one before holds the same directory.
                drop(stage.take());
                stage = Some(Stage::set(line.scene, &mut plans)?);
            }
            let stage = stage.as_mut().context("no stage")?;
            let mut bench = stage.start(line, &mut orders)?;
            for _ in 0..TRIES {
                let new = stage.time(line, &mut bench, rounds)?;
                best = best.min(Spread::of(new.iter().map(|round| round.harness)).low);
                let most_are_calm = calm(&new, best).count() * 2 >= new.len();
                taken[index].extend(new);
                if most_are_calm {
                    break;
                }
            }
        }
    }
    Ok(taken.into_iter().map(|rounds| settle(rounds, best)).collect())
}

fn calm(rounds: &[Round], best: f64) -> impl Iterator<Item = &Round> {
    rounds.iter().filter(move |round| round.harness <= best * CALM)
}

fn is_disturbed(rounds: &[Round], best: f64) -> bool {
    calm(rounds, best).count() * 10 < rounds.len().max(1)
}

/// The calm rounds; where they are few, all.
fn settle(rounds: Vec<Round>, best: f64) -> Settled {
    if is_disturbed(&rounds, best) {
        Settled { rounds, disturbed: true }
    } else {
        Settled { rounds: calm(&rounds, best).copied().collect(), disturbed: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(count: usize, harness: f64, program: f64) -> Vec<Round> {
        vec![Round { harness, floor: harness, program }; count]
    }

    #[test]
    fn rounds_of_a_disturbed_machine_are_left_out() {
        let taken = [rounds(30, 36.0, 80.0), rounds(70, 46.0, 120.0)].concat();
        let settled = settle(taken, 35.0);
        assert_eq!(settled.rounds, rounds(30, 36.0, 80.0));
        assert!(!settled.disturbed);
    }

    #[test]
    fn a_line_with_hardly_a_calm_round_says_so_and_has_them_all() {
        let taken = [rounds(1, 36.0, 80.0), rounds(70, 46.0, 120.0)].concat();
        let settled = settle(taken.clone(), 35.0);
        assert_eq!(settled.rounds, taken);
        assert!(settled.disturbed);
    }

    #[test]
    fn what_was_not_measured_is_disturbed() {
        assert!(settle(Vec::new(), f64::INFINITY).disturbed);
    }
}
