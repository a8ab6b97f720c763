use proptest::prelude::*;

use super::*;
use crate::health::probe::Phase;

fn ok() -> Probe {
    Probe { took: Duration::from_micros(800), result: Ok(()) }
}

fn failed(failure: Failure) -> Probe {
    Probe { took: Duration::from_secs(1), result: Err(failure) }
}

fn refused() -> Probe {
    failed(Failure::Refused)
}

fn timed_out() -> Probe {
    failed(Failure::TimedOut(Phase::Connect))
}

fn no_files() -> Probe {
    failed(Failure::NoLocalResource("too many open files".into()))
}

fn feed(fsm: &mut Fsm, probes: &[Probe]) -> Vec<Option<Transition>> {
    let now = Instant::now();
    probes.iter().map(|p| fsm.on_probe(now, p)).collect()
}

#[test]
fn the_first_success_brings_a_new_backend_up() {
    let mut fsm = Fsm::new(5, 3);
    assert!(!fsm.is_up());
    let up = Transition { from: State::Checking, to: State::Up, hard: false };
    assert_eq!(feed(&mut fsm, &[ok(), ok()]), [Some(up), None]);
}

#[test]
fn the_first_success_brings_a_new_backend_up_even_after_failures() {
    let mut fsm = Fsm::new(5, 3);
    feed(&mut fsm, &[refused(), refused(), ok()]);
    assert_eq!(fsm.state(), State::Up);
}

#[test]
fn a_new_backend_that_never_answers_goes_down_after_fall_failures() {
    let mut fsm = Fsm::new(2, 3);
    let down = Transition { from: State::Checking, to: State::Down, hard: true };
    assert_eq!(feed(&mut fsm, &[refused(), refused(), refused(), refused()]), [None, None, Some(down), None]);
}

#[test]
fn a_success_in_between_starts_the_count_of_failures_anew() {
    let mut fsm = Fsm::new(2, 3);
    let probes = [ok(), refused(), refused(), ok(), refused(), refused()];
    feed(&mut fsm, &probes);
    assert_eq!(fsm.state(), State::Up);
    assert_eq!((fsm.successes(), fsm.failures()), (0, 2));
}

#[test]
fn a_backend_that_is_down_needs_rise_successes_in_a_row() {
    let mut fsm = Fsm::new(2, 1);
    feed(&mut fsm, &[refused(), ok(), refused(), ok()]);
    assert_eq!(fsm.state(), State::Down);
    feed(&mut fsm, &[ok()]);
    assert_eq!(fsm.state(), State::Up);
}

#[test]
fn the_last_failure_of_the_run_decides_whether_the_evidence_is_hard() {
    let mut fsm = Fsm::adopted(true, Instant::now(), 1, 2);
    let end = feed(&mut fsm, &[timed_out(), refused()])[1];
    assert!(end.is_some_and(|t| t.hard));
    let mut fsm = Fsm::adopted(true, Instant::now(), 1, 2);
    let end = feed(&mut fsm, &[refused(), timed_out()])[1];
    assert!(end.is_some_and(|t| !t.hard));
}

#[test]
fn a_failure_for_a_local_reason_is_no_evidence() {
    let mut fsm = Fsm::adopted(true, Instant::now(), 1, 2);
    feed(&mut fsm, &[no_files(), no_files(), no_files()]);
    assert_eq!((fsm.state(), fsm.failures()), (State::Up, 0));
    feed(&mut fsm, &[refused(), no_files(), refused()]);
    assert_eq!(fsm.state(), State::Down);
}

#[test]
fn an_adopted_state_holds_until_a_full_run_says_otherwise() {
    let mut up = Fsm::adopted(true, Instant::now(), 2, 3);
    assert_eq!(feed(&mut up, &[refused(), refused()]), [None, None]);
    assert!(up.is_up());
    let mut down = Fsm::adopted(false, Instant::now(), 2, 3);
    assert_eq!(feed(&mut down, &[ok()]), [None]);
    assert_eq!(down.state(), State::Down);
}

#[test]
fn new_thresholds_keep_the_state_and_the_run() {
    let mut fsm = Fsm::new(2, 5);
    feed(&mut fsm, &[ok(), refused(), refused(), refused()]);
    fsm.set_thresholds(2, 3);
    assert_eq!((fsm.state(), fsm.failures()), (State::Up, 3));
    feed(&mut fsm, &[refused()]);
    assert_eq!(fsm.state(), State::Down);
}

#[test]
fn thresholds_of_zero_count_as_one() {
    let mut fsm = Fsm::new(0, 0);
    feed(&mut fsm, &[refused()]);
    assert_eq!(fsm.state(), State::Down);
    feed(&mut fsm, &[ok()]);
    assert_eq!(fsm.state(), State::Up);
}

#[test]
fn a_status_line_tells_state_age_reason_and_progress() {
    let start = Instant::now();
    let at = |s| start + Duration::from_secs(s);
    let mut fsm = Fsm::new(2, 3);
    assert_eq!(fsm.describe(at(0), None), "checking");
    fsm.on_probe(at(0), &refused());
    assert_eq!(fsm.describe(at(0), None), "checking: connection refused (1 of 3)");
    fsm.on_probe(at(2), &refused());
    fsm.on_probe(at(4), &refused());
    fsm.on_probe(at(6), &refused());
    assert_eq!(fsm.describe(at(16), None), "down for 12 s: connection refused (3 of 3)");
    fsm.on_probe(at(18), &ok());
    assert_eq!(fsm.describe(at(18), None), "down for 14 s: answered in 0.8 ms (1 of 2)");
    fsm.on_probe(at(20), &ok());
    assert_eq!(fsm.describe(at(205), None), "up for 3 min 5 s: answered in 0.8 ms");
    fsm.on_probe(at(206), &no_files());
    assert_eq!(
        fsm.describe(at(20 + 7380), None),
        "up for 2 h 3 min: not probed, no local resource: too many open files"
    );
}

/// What the state must be, from the whole history at once.
fn reference(history: &[Probe], rise: u32, fall: u32) -> State {
    let mut state = State::Checking;
    for end in 1..=history.len() {
        let evidence = history[..end].iter().filter(|p| !matches!(&p.result, Err(f) if f.is_local()));
        let verdicts: Vec<bool> = evidence.map(|p| p.result.is_ok()).collect();
        let run = |of: bool| verdicts.iter().rev().take_while(|v| **v == of).count() as u32;
        state = match state {
            State::Checking if run(true) >= 1 => State::Up,
            State::Checking | State::Up if run(false) >= fall => State::Down,
            State::Down if run(true) >= rise => State::Up,
            same => same,
        };
    }
    state
}

proptest! {
    #[test]
    fn the_state_is_what_the_trailing_runs_of_the_history_say(
        rise in 1u32..5,
        fall in 1u32..5,
        kinds in prop::collection::vec(0u8..7, 0..60),
    ) {
        let history: Vec<Probe> = kinds.iter().map(|k| match k {
            0..=2 => ok(),
            3..=4 => refused(),
            5 => timed_out(),
            _ => no_files(),
        }).collect();
        let mut fsm = Fsm::new(rise, fall);
        for (i, probe) in history.iter().enumerate() {
            let before = fsm.state();
            let transition = fsm.on_probe(Instant::now(), probe);
            prop_assert_eq!(fsm.state(), reference(&history[..=i], rise, fall));
            prop_assert_eq!(transition.is_some(), before != fsm.state());
            if let Some(t) = transition {
                prop_assert_eq!((t.from, t.to), (before, fsm.state()));
            }
        }
    }
}
