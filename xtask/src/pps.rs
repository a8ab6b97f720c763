//! `cargo xtask bench pps`: packets a second through the attached program, on one core and on several.
//!
//! A generator in the kernel sends frames over a veth in native mode, without socket buffers, and the CPU that sends a
//! batch takes it through xlb and back before the next. So a core's rate is that of generator, veth and xlb together;
//! beside it stand programs that do nothing, and the difference is xlb's.

mod wire;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ::tests::lab;
use anyhow::{Context, Result, ensure};
use lb_userspace::bpf::{End, FRAME_BYTES, Generator};
use serde::Serialize;

use self::wire::{CASES, Case, FLOWS, Scene, To, packets};
use crate::bench::figures::Spread;
use crate::bench::report::Report;
use crate::calm::{self, Beside};
use crate::lab::table::markdown;

#[derive(clap::Args)]
pub struct Arguments {
    /// Cores that send and balance, each number in turn
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    cores: Vec<u32>,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// How often everything is measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Write the result here, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Debug, Clone, Serialize)]
struct Row {
    case: String,
    cores: u32,
    flows: u32,
    packets_per_second: Spread,
    /// Of one core; of several, the mean.
    ns_per_packet: Spread,
    /// Beyond an empty program that also drops or also sends back, in the same round.
    #[serde(skip_serializing_if = "Option::is_none")]
    ns_beyond: Option<Spread>,
    /// Of all rounds.
    counts: Counts,
    /// Whether something else ran, however often it was tried.
    disturbed: bool,
}

/// Where packets were, one count after the other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
struct Counts {
    /// Handed over by the generator.
    sent: u64,
    /// Of these, refused: the receiver's queue was full.
    refused: u64,
    /// Seen at the receiving interface.
    received: u64,
    /// Counted by xlb, with the outcome that they had to have.
    outcome: Option<u64>,
    /// Seen again at the sender.
    came_back: u64,
}

/// One measurement.
struct Taken {
    /// Of all cores.
    packets_per_second: f64,
    ns_per_packet: f64,
    counts: Counts,
    /// The share of the machine that something else had.
    others: f64,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let begun = Instant::now();
    ensure!(lab::available()?, "labs are to be skipped; unset {}", lab::SKIP_ROOT);
    let there = u32::try_from(thread::available_parallelism()?.get())?;
    let most = arguments.cores.iter().copied().max().context("--cores names none")?;
    ensure!(
        arguments.cores.iter().all(|cores| (1..=there).contains(cores)),
        "--cores: each is 1 to {there} here; leave it out, or name fewer"
    );
    crate::run(crate::agent_build())?;
    lab::clean_up_on_signals()?;
    let scene = Scene::set(most)?;
    let mode = scene.balancer.status()?.interfaces.into_iter().map(|interface| interface.mode).next();
    let rows = measure(arguments, &scene)?;
    drop(scene);

    say!("{}", table(&rows));
    say!("Frames of {FRAME_BYTES} bytes. {LEGEND}\nXDP of xlb: {}.", mode.unwrap_or_default());
    if !PathBuf::from("/proc/net/pktgen").exists() {
        say!("The kernel has no pktgen; frames are sent by BPF_PROG_TEST_RUN with live frames.");
    }
    let report = Report::new("pps", rows)?;
    if let Some(path) = &arguments.json {
        report.write(path)?;
    }
    say!("{}, {} ({})", report.machine, report.date, report.commit);
    say!("Took {:.0} s. Again: {}", begun.elapsed().as_secs_f64(), report.command);
    Ok(())
}

fn measure(arguments: &Arguments, scene: &Scene) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for cores in &arguments.cores {
        let mut taken: Vec<Vec<Taken>> = CASES.iter().map(|_| Vec::new()).collect();
        for round in 1..=arguments.rounds {
            for (case, taken) in CASES.iter().zip(&mut taken) {
                crate::progress(&format!("{cores} cores, round {round}, {}", case.name));
                taken.push(take_calmly(scene, case, *cores, Duration::from_secs(arguments.seconds.into()))?);
            }
        }
        crate::progress("");
        for (case, own) in CASES.iter().zip(&taken) {
            let beside =
                case.to.beside().and_then(|end| CASES.iter().position(|one| one.to == To::Bare(end)));
            rows.push(Row::of(case, *cores, own, beside.map(|index| &taken[index][..])));
        }
    }
    Ok(rows)
}

fn ns(taken: &[Taken]) -> impl Iterator<Item = f64> {
    taken.iter().map(|taken| taken.ns_per_packet)
}

impl Row {
    fn of(case: &Case, cores: u32, taken: &[Taken], beside: Option<&[Taken]>) -> Self {
        let counts = taken.iter().fold(Counts::default(), |sum, taken| sum.and(&taken.counts));
        Self {
            case: case.name.to_owned(),
            cores,
            flows: FLOWS,
            packets_per_second: Spread::of(taken.iter().map(|taken| taken.packets_per_second)),
            ns_per_packet: Spread::of(ns(taken)),
            ns_beyond: beside
                .map(|beside| Spread::of(ns(taken).zip(ns(beside)).map(|(ns, floor)| ns - floor))),
            counts,
            disturbed: taken.iter().any(Taken::is_disturbed),
        }
    }
}

impl Taken {
    fn is_disturbed(&self) -> bool {
        self.others > calm::MOST_BY_OTHERS
    }
}

impl Counts {
    fn and(&self, other: &Self) -> Self {
        Self {
            sent: self.sent + other.sent,
            refused: self.refused + other.refused,
            received: self.received + other.received,
            outcome: self.outcome.map_or(other.outcome, |own| Some(own + other.outcome.unwrap_or(0))),
            came_back: self.came_back + other.came_back,
        }
    }

    fn since(&self, before: &Self) -> Self {
        Self {
            sent: self.sent - before.sent,
            refused: self.refused - before.refused,
            received: self.received - before.received,
            outcome: self.outcome.zip(before.outcome).map(|(now, then)| now - then),
            came_back: self.came_back - before.came_back,
        }
    }

    /// Whether every packet is where it has to be: what is lost would make a core look faster than it is.
    fn check(&self, to: To) -> Result<()> {
        let Self { sent, refused, received, outcome, came_back } = *self;
        let strays = (received + refused).checked_sub(sent);
        ensure!(
            strays.is_some_and(|strays| strays <= STRAYS),
            "{sent} frames sent, {refused} refused, but {received} received"
        );
        if let Some(outcome) = outcome {
            ensure!(
                outcome.abs_diff(received) <= STRAYS,
                "{received} frames received, {outcome} with the outcome that they must have"
            );
        }
        let returned = match to {
            To::Bare(end) => end == End::Return,
            To::Xlb { beside, .. } => beside == Some(End::Return),
        };
        let due = if returned { received } else { 0 };
        ensure!(
            came_back.abs_diff(due) <= STRAYS,
            "{due} of {received} frames had to come back, {came_back} did"
        );
        Ok(())
    }
}

/// The hosts say something themselves now and then (neighbour discovery), which is counted too.
const STRAYS: u64 = 8;

/// Packets of one call: some tenths of a second, so that the call itself does not count.
const PORTION: u32 = 500_000;

/// How often something is measured that others disturb.
const TRIES: u32 = 5;

/// The first measurement that nothing disturbed, or the least disturbed.
fn take_calmly(scene: &Scene, case: &Case, cores: u32, length: Duration) -> Result<Taken> {
    let mut best = take(scene, case, cores, length)?;
    for _ in 1..TRIES {
        if !best.is_disturbed() {
            break;
        }
        let next = take(scene, case, cores, length)?;
        if next.others < best.others {
            best = next;
        }
    }
    Ok(best)
}

fn take(scene: &Scene, case: &Case, cores: u32, length: Duration) -> Result<Taken> {
    let wire = scene.wire(case);
    let _end = match case.to {
        To::Bare(end) => Some(wire.attach(end)?),
        To::Xlb { .. } => None,
    };
    let (packets, flows) = packets(case)?;
    let ifindex = wire.ifindex()?;
    let mut generators = Vec::new();
    for core in 0..cores {
        // Each begins elsewhere in the same list.
        let mut flows = flows.clone();
        let part = flows.len() / cores as usize;
        flows.rotate_left(part * core as usize);
        generators.push(Generator::new(&packets, &flows)?);
    }
    let sent = AtomicU64::new(0);
    let before = counts(scene, case, 0)?;
    let all_sent = &sent;
    let beside = Beside::begin()?;
    let times = wire.sender.inside(|| {
        thread::scope(|scope| {
            let threads: Vec<_> = (0..)
                .zip(&mut generators)
                .map(|(core, generator)| {
                    scope.spawn(move || send(generator, core, ifindex, length, all_sent))
                })
                .collect();
            let join = |thread: thread::ScopedJoinHandle<'_, Result<Sent>>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().map(join).collect::<Result<Vec<Sent>>>()
        })
    })??;
    let others = beside.end(cores, times.iter().map(|one| one.waited).sum())?;
    let counts = settled(scene, case, sent.into_inner(), &before)?;
    Ok(Taken {
        packets_per_second: times.iter().map(|one| 1e9 / one.ns).sum(),
        ns_per_packet: times.iter().map(|one| one.ns).sum::<f64>() / times.len() as f64,
        counts,
        others,
    })
}

/// What came of sending on one core.
struct Sent {
    /// Of a packet, once it runs smoothly.
    ns: f64,
    /// For the CPU.
    waited: Duration,
}

fn send(
    generator: &mut Generator,
    core: u32,
    ifindex: u32,
    length: Duration,
    sent: &AtomicU64,
) -> Result<Sent> {
    let waited = calm::waited();
    let mut cpus = rustix::thread::CpuSet::new();
    cpus.set(core as usize);
    rustix::thread::sched_setaffinity(None, &cpus).with_context(|| format!("CPU {core}"))?;
    let mut portion = || -> Result<()> {
        generator.send(ifindex, core, PORTION)?;
        sent.fetch_add(u64::from(PORTION), Ordering::Relaxed);
        Ok(())
    };
    portion()?;
    let begin = Instant::now();
    let mut portions = 0;
    while begin.elapsed() < length {
        portion()?;
        portions += 1;
    }
    let ns = begin.elapsed().as_nanos() as f64 / (f64::from(portions) * f64::from(PORTION));
    Ok(Sent { ns, waited: calm::waited().saturating_sub(waited) })
}

/// What was counted since, once every packet has arrived: the last may still be on their way.
fn settled(scene: &Scene, case: &Case, sent: u64, before: &Counts) -> Result<Counts> {
    const PATIENCE: Duration = Duration::from_secs(2);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let counts = counts(scene, case, sent)?.since(before);
        match counts.check(case.to) {
            Ok(()) => return Ok(counts),
            Err(error) if Instant::now() > deadline => return Err(error.context(case.name)),
            Err(_) => thread::sleep(Duration::from_millis(10)),
        }
    }
}

fn counts(scene: &Scene, case: &Case, sent: u64) -> Result<Counts> {
    let wire = scene.wire(case);
    let (came_back, refused) = wire.sender_counts()?;
    let outcome = match case.to {
        To::Bare(_) => None,
        To::Xlb { outcome, .. } => Some(scene.balancer.outcome(outcome)?),
    };
    Ok(Counts { sent, refused, received: wire.received()?, outcome, came_back })
}

const LEGEND: &str = "\
A core generates, receives, balances and takes back. beyond: what a core takes beyond the empty
program that drops or sends back as well. sent: by the generator; refused: the veth was full; received: at the balancer's interface;
outcome: counted by xlb as what it had to become; came back: at the sender's interface; ~: something else ran on the machine
whenever it was measured.";

fn table(rows: &[Row]) -> String {
    let head = [
        "",
        "cores",
        "Mpps",
        "Mpps a core",
        "ns a packet",
        "beyond",
        "sent",
        "refused",
        "received",
        "outcome",
        "came back",
    ];
    let mut lines = vec![head.map(str::to_owned).to_vec()];
    for row in rows {
        let Counts { sent, refused, received, outcome, came_back } = row.counts;
        let mpps = row.packets_per_second.median / 1e6;
        lines.push(vec![
            format!("{}{}", row.case, if row.disturbed { " ~" } else { "" }),
            row.cores.to_string(),
            format!("{mpps:.2}"),
            format!("{:.2}", mpps / f64::from(row.cores)),
            format!("{:.0}", row.ns_per_packet.median),
            row.ns_beyond.map_or_else(|| "-".to_owned(), |beyond| format!("{:.0}", beyond.median)),
            sent.to_string(),
            refused.to_string(),
            received.to_string(),
            outcome.map_or_else(|| "-".to_owned(), |outcome| outcome.to_string()),
            came_back.to_string(),
        ]);
    }
    markdown(&lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(ns_per_packet: f64, sent: u64) -> Taken {
        Taken {
            packets_per_second: 2e9 / ns_per_packet,
            ns_per_packet,
            counts: Counts { sent, outcome: Some(sent), ..Counts::default() },
            others: 0.0,
        }
    }

    #[test]
    fn rates_are_of_all_cores_and_costs_of_one_beyond_the_same_round() {
        let beside = [60.0, 100.0, 90.0].map(|ns| taken(ns, 0));
        let row = Row::of(&CASES[3], 2, &[taken(100.0, 5), taken(300.0, 7), taken(200.0, 1)], Some(&beside));
        assert_eq!(row.packets_per_second.median, 1e7);
        assert_eq!(row.ns_beyond.unwrap().median, 110.0);
        assert_eq!((row.counts.sent, row.counts.outcome), (13, Some(13)));
    }

    #[test]
    fn packets_that_are_nowhere_are_an_error() {
        let all = Counts { sent: 9000, refused: 2000, received: 7000, outcome: Some(7000), came_back: 7000 };
        let forwards = CASES[3].to;
        all.check(forwards).unwrap();
        let gone = Counts { came_back: 0, ..all };
        gone.check(CASES[2].to).unwrap();
        Counts { outcome: None, ..gone }.check(To::Bare(End::Sink)).unwrap();
        Counts { received: 7001, ..all }.check(forwards).expect("one that a host sent by itself");
        let lost = Counts { received: 6999, ..all };
        let others = Counts { received: 7100, outcome: Some(7100), came_back: 7100, ..all };
        let other_outcome = Counts { outcome: Some(6900), ..all };
        let twice = Counts { came_back: 14000, ..all };
        for wrong in [lost, others, other_outcome, twice, gone] {
            assert!(wrong.check(forwards).is_err(), "{wrong:?}");
        }
    }
}
