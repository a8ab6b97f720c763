//! What a report says beside an earlier one, line by line. Pure.
//!
//! Nanoseconds of two runs are of two machines, or of two moods of one: compared is what a packet takes as a multiple of
//! its floor in the same run.

use std::collections::HashMap;

use super::figures::Spread;
use super::packet::Row;

/// More than this is worth a look.
const LIMIT: f64 = 1.10;

/// A line that moved by more than the limit, and by more than its spread.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    pub line: String,
    pub flows: String,
    pub then: Spread,
    pub now: Spread,
}

#[derive(Debug, Default, PartialEq)]
pub struct Comparison {
    pub worse: Vec<Change>,
    pub better: Vec<Change>,
    /// Lines that stayed where they were.
    pub same: usize,
    /// Lines that the earlier report does not have.
    pub new: usize,
    /// Lines that a disturbed machine has measured, now or then.
    pub disturbed: usize,
}

pub fn compare(then: &[Row], now: &[Row]) -> Comparison {
    let known: HashMap<_, _> = then.iter().map(|row| ((&row.line, &row.flows), row)).collect();
    let mut comparison = Comparison::default();
    for row in now {
        let Some(then) = known.get(&(&row.line, &row.flows)) else {
            comparison.new += 1;
            continue;
        };
        if row.disturbed || then.disturbed {
            comparison.disturbed += 1;
            continue;
        }
        let then = then.ratio;
        let change = Change { line: row.line.clone(), flows: row.flows.clone(), then, now: row.ratio };
        if exceeds(&row.ratio, &then) {
            comparison.worse.push(change);
        } else if exceeds(&then, &row.ratio) {
            comparison.better.push(change);
        } else {
            comparison.same += 1;
        }
    }
    comparison
}

fn exceeds(more: &Spread, less: &Spread) -> bool {
    more.median > less.median * LIMIT && more.low > less.high
}

impl Change {
    /// How much more it takes now.
    fn percent(&self) -> f64 {
        (self.now.median / self.then.median - 1.0) * 100.0
    }
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { line, flows, then, now } = self;
        let name = format!("{line}, {flows} flows");
        write!(f, "{name:66} {:5.2} -> {:5.2}  {:+.0} %", then.median, now.median, self.percent())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(line: &str, [low, median, high]: [f64; 3]) -> Row {
        let ratio = Spread { low, median, high };
        let none = Spread { low: 0.0, median: 0.0, high: 0.0 };
        Row {
            line: line.into(),
            flows: "1k".into(),
            harness: none,
            floor: none,
            program: none,
            net: none,
            beyond: none,
            ratio,
            disturbed: false,
        }
    }

    fn names(changes: &[Change]) -> Vec<&str> {
        changes.iter().map(|change| change.line.as_str()).collect()
    }

    #[test]
    fn a_line_that_takes_more_than_a_tenth_more_is_worse_and_the_other_way_round_better() {
        let then = [row("a", [1.9, 2.0, 2.1]), row("b", [2.9, 3.0, 3.1]), row("c", [1.9, 2.0, 2.1])];
        let now = [row("a", [2.4, 2.5, 2.6]), row("b", [1.9, 2.0, 2.1]), row("c", [2.0, 2.1, 2.2])];
        let comparison = compare(&then, &now);
        assert_eq!(names(&comparison.worse), ["a"]);
        assert_eq!(names(&comparison.better), ["b"]);
        assert_eq!((comparison.same, comparison.new), (1, 0));
        assert!(comparison.worse[0].to_string().ends_with("2.00 ->  2.50  +25 %"), "{}", comparison.worse[0]);
    }

    #[test]
    fn what_the_spreads_of_both_runs_hold_is_noise() {
        let comparison = compare(&[row("a", [1.5, 2.0, 3.0])], &[row("a", [2.9, 3.5, 4.0])]);
        assert_eq!((comparison.worse.len(), comparison.same), (0, 1));
    }

    #[test]
    fn a_steady_line_that_moves_by_less_than_a_tenth_is_the_same() {
        let comparison = compare(&[row("a", [2.0, 2.0, 2.0])], &[row("a", [2.19, 2.19, 2.19])]);
        assert_eq!((comparison.worse.len(), comparison.same), (0, 1));
    }

    #[test]
    fn what_a_disturbed_machine_measured_proves_nothing() {
        let disturbed = Row { disturbed: true, ..row("a", [9.0; 3]) };
        let comparison = compare(&[row("a", [1.0; 3])], &[disturbed]);
        assert_eq!(comparison, Comparison { disturbed: 1, ..Comparison::default() });
    }

    #[test]
    fn lines_of_one_report_only_are_not_compared() {
        let comparison = compare(&[row("gone", [1.0; 3])], &[row("new", [9.0; 3])]);
        assert_eq!(comparison, Comparison { new: 1, ..Comparison::default() });
    }
}
