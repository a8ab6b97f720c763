//! Frames through the packet path on the host and through the program in the kernel: the corpus under every setting, then
//! a million frames made out of others. Verdict, bytes and counters are equal, and every outcome is met many times.
//!
//! Needs root and BPF; without them it fails, unless XLB_SKIP_ROOT is set. For longer: `cargo xtask fuzz --kernel`.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use lb_common::outcome::{DecapOutcome, Outcome};
use tests::fixtures::Setting;
use tests::fuzz::{Balancer, Decap, Mutator, Program, Subject, Variant, corpus, decap_host, host, hunt};
use tests::kernel::left_out;

/// Over all subjects.
const FRAMES: usize = 1_000_000;
/// Of these, for decap.
const DECAP_FRAMES: usize = 50_000;
const SEED: u64 = 0x0b5e_55ed;
/// How often every outcome must be met.
const LEAST: u64 = 100;

/// How often each outcome was met.
type Met = BTreeMap<&'static str, u64>;

/// Frames of the corpus, and then made ones.
fn frames(
    program: Program,
    setting: Option<Setting>,
    seed: u64,
    count: usize,
) -> impl Iterator<Item = Vec<u8>> {
    let corpus = corpus::read(&program.corpus()).unwrap_or_else(|error| panic!("{error:#}"));
    let seeds = program.seeds(setting).unwrap_or_else(|error| panic!("{error:#}"));
    let mut mutator = Mutator::new(seed, seeds.into_iter().map(|case| case.frame).collect());
    let made = std::iter::repeat_with(move || mutator.frame()).take(count);
    corpus.into_iter().map(|case| case.frame).chain(made)
}

/// Runs frames through a subject, and adds what they ended in.
fn run(subject: Box<dyn Subject>, frames: impl Iterator<Item = Vec<u8>>, met: &Mutex<Met>) {
    let hunter = hunt(subject, frames).unwrap_or_else(|mismatch| panic!("{mismatch}"));
    let unchanged = hunter.subject.tables_are_unchanged().unwrap_or_else(|error| panic!("{error:#}"));
    assert!(unchanged, "{}: packets changed a table", hunter.subject.name());
    let mut met = met.lock().expect("no thread has panicked with it");
    for (outcome, frames) in hunter.subject.counted() {
        *met.entry(outcome).or_default() += frames;
    }
}

fn assert_met(met: &Met, wanted: impl Iterator<Item = &'static str>) {
    let rare: Vec<_> = wanted.filter(|outcome| met.get(outcome).copied().unwrap_or(0) < LEAST).collect();
    assert!(rare.is_empty(), "met fewer than {LEAST} times: {rare:?}; of all: {met:?}");
}

/// Fragments are forwarded under one setting alone, and most of those that chance makes are not; and addresses are
/// translated under another alone.
fn parts(variant: Variant) -> usize {
    if matches!(variant.setting, Setting::Kinds | Setting::Translated) { 4 } else { 1 }
}

#[test]
fn a_million_frames_end_in_the_kernel_as_on_the_host_and_meet_every_outcome() {
    if left_out("a_million_frames_end_in_the_kernel_as_on_the_host_and_meet_every_outcome") {
        return;
    }
    let begin = Instant::now();
    let variants = Variant::all();
    let share = (FRAMES - DECAP_FRAMES).div_ceil(variants.iter().map(|variant| parts(*variant)).sum());
    let next = AtomicUsize::new(0);
    let met = Mutex::new(Met::new());
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(variant) = variants.get(index) else { break };
            let balancer = Balancer::in_kernel(*variant, host).unwrap_or_else(|error| panic!("{error:#}"));
            run(
                Box::new(balancer),
                frames(
                    Program::Balancer,
                    Some(variant.setting),
                    SEED + index as u64,
                    parts(*variant) * share,
                ),
                &met,
            );
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    let met = met.into_inner().expect("no thread has panicked with it");
    let frames: u64 = met.values().sum();
    let seconds = begin.elapsed().as_secs_f64();
    eprintln!("{frames} frames in {seconds:.1} s, {:.0} a second", frames as f64 / seconds);
    assert_met(&met, Outcome::ALL.iter().map(|outcome| outcome.counter()));
}

#[test]
fn frames_to_a_backend_end_in_the_kernel_as_on_the_host_and_meet_every_outcome() {
    if left_out("frames_to_a_backend_end_in_the_kernel_as_on_the_host_and_meet_every_outcome") {
        return;
    }
    let decap = Decap::in_kernel(decap_host).unwrap_or_else(|error| panic!("{error:#}"));
    let met = Mutex::new(Met::new());
    run(Box::new(decap), frames(Program::Decap, None, SEED, DECAP_FRAMES), &met);
    let met = met.into_inner().expect("no thread has panicked with it");
    // The kernel does not fail to take off what is there.
    let outcomes = DecapOutcome::ALL.iter().filter(|outcome| **outcome != DecapOutcome::DropHead);
    assert_met(&met, outcomes.map(|outcome| outcome.counter()));
}
