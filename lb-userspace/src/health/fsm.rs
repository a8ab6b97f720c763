//! The health of one backend as a pure state machine: probes go in, transitions come out. It owns the verdict
//! and its history; it must not know sockets, clocks or tables.

use std::fmt;
use std::time::{Duration, Instant};

use super::probe::{Failure, Probe};

/// What is believed about a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// Never judged. Takes no traffic.
    Checking,
    Up,
    Down,
}

impl State {
    pub fn is_up(self) -> bool {
        self == State::Up
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            State::Checking => "checking",
            State::Up => "up",
            State::Down => "down",
        })
    }
}

/// A change of state, reported once, by the probe that caused it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transition {
    pub from: State,
    pub to: State,
    /// The probe that completed the run of failures was refused or reset: connections to this backend are dead,
    /// not merely slow. Always false on the way up.
    pub hard: bool,
}

/// The most recent probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Last {
    pub at: Instant,
    pub took: Duration,
    pub result: Result<(), Failure>,
}

/// Health of one backend.
///
/// | state    | becomes | after                                          |
/// |----------|---------|------------------------------------------------|
/// | Checking | Up      | one success, so that a cold start is quick     |
/// | Checking | Down    | `fall` failures in a row                       |
/// | Up       | Down    | `fall` failures in a row                       |
/// | Down     | Up      | `rise` successes in a row                      |
///
/// A probe that failed for a local reason ([`Failure::is_local`]) is no evidence: it is remembered as the last
/// outcome, but it neither extends nor breaks a run. A balancer that runs out of file descriptors keeps
/// its verdicts instead of taking every backend down.
#[derive(Debug, Clone)]
pub struct Fsm {
    rise: u32,
    fall: u32,
    state: State,
    since: Option<Instant>,
    /// At most one of the two is above zero: a success ends a run of failures and the reverse.
    successes: u32,
    failures: u32,
    last: Option<Last>,
    hard: bool,
}

impl Fsm {
    /// A backend of which nothing is known. Thresholds below 1 count as 1.
    pub fn new(rise: u32, fall: u32) -> Fsm {
        Fsm {
            rise: rise.max(1),
            fall: fall.max(1),
            state: State::Checking,
            since: None,
            successes: 0,
            failures: 0,
            last: None,
            hard: false,
        }
    }

    /// A backend whose health was learnt from the kernel's maps after a restart. It holds until a full run of
    /// probes says otherwise. `since` is when it was adopted, or when it changed where that is known.
    pub fn adopted(up: bool, since: Instant, rise: u32, fall: u32) -> Fsm {
        Fsm { state: if up { State::Up } else { State::Down }, since: Some(since), ..Fsm::new(rise, fall) }
    }

    /// New thresholds after a reload. State and runs stay; a run that is already long enough counts when the next
    /// probe of its kind arrives, because only a probe changes the state.
    pub fn set_thresholds(&mut self, rise: u32, fall: u32) {
        self.rise = rise.max(1);
        self.fall = fall.max(1);
    }

    /// Takes in one probe that ended at `now`.
    pub fn on_probe(&mut self, now: Instant, probe: &Probe) -> Option<Transition> {
        self.last = Some(Last { at: now, took: probe.took, result: probe.result.clone() });
        match &probe.result {
            Ok(()) => {
                self.failures = 0;
                self.successes = self.successes.saturating_add(1);
                match self.state {
                    State::Checking => self.enter(now, State::Up, false),
                    State::Down if self.successes >= self.rise => self.enter(now, State::Up, false),
                    State::Down | State::Up => None,
                }
            }
            Err(failure) if failure.is_local() => None,
            Err(failure) => {
                self.successes = 0;
                self.failures = self.failures.saturating_add(1);
                // What was silent may be refused later.
                self.hard |= self.state == State::Down && failure.is_hard();
                match self.state {
                    State::Checking | State::Up if self.failures >= self.fall => {
                        self.enter(now, State::Down, failure.is_hard())
                    }
                    State::Checking | State::Up | State::Down => None,
                }
            }
        }
    }

    fn enter(&mut self, now: Instant, to: State, hard: bool) -> Option<Transition> {
        let from = std::mem::replace(&mut self.state, to);
        self.since = Some(now);
        self.hard = hard;
        Some(Transition { from, to, hard })
    }

    /// Down, by hard evidence (see [`Transition::hard`]).
    pub fn is_hard(&self) -> bool {
        self.hard && self.state == State::Down
    }

    pub fn state(&self) -> State {
        self.state
    }

    pub fn is_up(&self) -> bool {
        self.state.is_up()
    }

    /// When the state was entered; `None` while nothing was ever judged.
    pub fn since(&self) -> Option<Instant> {
        self.since
    }

    pub fn last(&self) -> Option<&Last> {
        self.last.as_ref()
    }

    /// Successes in a row; 0 after a failure.
    pub fn successes(&self) -> u32 {
        self.successes
    }

    /// Failures in a row; 0 after a success.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    pub fn rise(&self) -> u32 {
        self.rise
    }

    pub fn fall(&self) -> u32 {
        self.fall
    }

    /// The last probe's outcome in words; `None` before the first probe.
    pub fn outcome(&self) -> Option<String> {
        self.outcome_in(None)
    }

    fn outcome_in(&self, took: Option<Duration>) -> Option<String> {
        let last = self.last.as_ref()?;
        Some(match &last.result {
            Ok(()) => format!("answered in {}", Took(took.unwrap_or(last.took))),
            Err(failure) => failure.to_string(),
        })
    }

    /// One line for a status view: `down for 12 s: connection refused (3 of 3)`.
    ///
    /// The count in brackets is how far the current run is towards a verdict. It is left out where
    /// there is nothing to reach: a success of a backend that is up, a failure for a local reason.
    ///
    /// `took`: of a later probe with the same outcome, where there was one.
    pub fn describe(&self, now: Instant, took: Option<Duration>) -> String {
        let mut line = self.state.to_string();
        if let Some(since) = self.since {
            line += &format!(" for {}", Age(now.saturating_duration_since(since)));
        }
        if let Some(outcome) = self.outcome_in(took) {
            line += &format!(": {outcome}");
        }
        if let Some((count, of)) = self.progress() {
            line += &format!(" ({} of {of})", count.min(of));
        }
        line
    }

    fn progress(&self) -> Option<(u32, u32)> {
        match &self.last.as_ref()?.result {
            Ok(()) if self.state == State::Up => None,
            Ok(()) => Some((self.successes, self.rise)),
            Err(failure) if failure.is_local() => None,
            Err(_) => Some((self.failures, self.fall)),
        }
    }
}

/// A probe's duration, at the resolution that matters for one: `0.8 ms`, `1.2 s`.
struct Took(Duration);

impl fmt::Display for Took {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 < Duration::from_secs(1) {
            write!(f, "{:.1} ms", self.0.as_secs_f64() * 1e3)
        } else {
            write!(f, "{:.1} s", self.0.as_secs_f64())
        }
    }
}

/// An age in its two largest units: `12 s`, `3 min 5 s`, `2 h 3 min`, `4 d 1 h`.
struct Age(Duration);

impl fmt::Display for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = self.0.as_secs();
        match s {
            0..60 => write!(f, "{s} s"),
            60..3600 => write!(f, "{} min {} s", s / 60, s % 60),
            3600..86400 => write!(f, "{} h {} min", s / 3600, s % 3600 / 60),
            _ => write!(f, "{} d {} h", s / 86400, s % 86400 / 3600),
        }
    }
}

#[cfg(test)]
mod tests;
