//! `cargo xtask bench lab`: xlb beside what else balances on Linux, in network namespaces of one machine.
//!
//! All sides are there at the same time, with the same client, router and backends ([`scene`]). Rounds are interleaved:
//! each measures everything of every side, and a ratio is that to `direct` in the same round.

mod client;
mod measure;
mod scene;
pub mod table;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use ::tests::lab;
use anyhow::{Context, Result, ensure};
use clap::Args;

use self::measure::{Effort, Measure};
use self::scene::{SIDES, Scene, Side};
use self::table::Results;
use crate::bench::report::Report;
use crate::calm;

#[derive(Args, Clone)]
pub struct Arguments {
    /// Seconds of each measurement
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=50))]
    seconds: u32,
    /// How often everything is measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Only these sides (nftables, haproxy, xlb-ipip, xlb-l2, xlb-nat, xlb-fullnat), beside direct
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Requests a second at which latency is measured
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: u32,
    /// Connections of wrk
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(2..=1000))]
    connections: u32,
    /// Write the result here, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// Draw the result here, as SVG
    #[arg(long)]
    plot: Option<PathBuf>,
}

/// What is measured, in this order, and whether with offloads.
const PROGRAMME: [(bool, Measure); 8] = [
    (false, Measure::Upload(1)),
    (false, Measure::Upload(4)),
    (false, Measure::Download(4)),
    (false, Measure::Requests),
    (false, Measure::Connections),
    (false, Measure::Latency),
    (true, Measure::Upload(1)),
    (true, Measure::Upload(4)),
];

/// How long a run waits in all for others to end.
const PATIENCE: Duration = Duration::from_secs(90);

/// What went not as it should, of how many measurements.
#[derive(Default)]
struct Troubles {
    all: usize,
    /// Beside which something else ran at the beginning.
    disturbed: usize,
    /// That brought nothing, and why.
    failed: Vec<String>,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let begun = Instant::now();
    ensure!(lab::available()?, "labs are to be skipped; unset {}", lab::SKIP_ROOT);
    let (sides, mut notes) = sides(&arguments.only)?;
    let programme = programme(&mut notes);
    notes.iter().for_each(|note| note!("bench lab: {note}"));
    ensure!(
        sides.len() > 1,
        "nothing is left to compare with direct routing; name a side of xlb with --only, or install the others"
    );
    crate::run(crate::agent_build())?;
    lab::clean_up_on_signals()?;
    let scene = Scene::set(&sides)?;
    let modes = scene.modes()?;
    let mut troubles = Troubles::default();
    let results = measure_all(arguments, &scene, &sides, &programme, &mut troubles)?;
    let (drops, versions) = (scene.drops()?, scene.versions.clone());
    drop(scene);

    let rows = results.rows();
    say!("{}", table::tables(&rows));
    say!("XDP of xlb: {}. {}", modes.join(", "), versions.join(". "));
    for (side, outcome, packets) in drops {
        say!("{side} dropped {packets} packets: {outcome}");
    }
    let Troubles { all, disturbed, failed } = troubles;
    if disturbed > 0 {
        say!(
            "Something else ran before {disturbed} of {all} measurements: figures are worth little, those of the CPU \
             nothing. Run it again alone."
        );
    }
    // First: what is written makes the tree another than the commit's.
    let mut report = Report::new("lab", rows)?;
    let Arguments { rounds, seconds, .. } = arguments;
    report.notes.push(format!("{rounds} rounds, {seconds} s each"));
    report.notes.extend(versions);
    report.notes.extend(failed.iter().map(|failed| format!("failed: {failed}")));
    if let Some(path) = &arguments.json {
        report.write(path)?;
    }
    if let Some(path) = &arguments.plot {
        std::fs::write(path, table::plot(&report.rows)?).with_context(|| path.display().to_string())?;
    }
    say!("{}, {} ({})", report.machine, report.date, report.commit);
    say!("Took {:.0} s. Again: {}", begun.elapsed().as_secs_f64(), report.command);
    let told = failed.join("\n  ");
    ensure!(
        failed.is_empty(),
        "{} of {all} measurements failed, and the rest is above:\n  {told}",
        failed.len()
    );
    Ok(())
}

/// The sides that were asked for and can be there, and why others cannot.
fn sides(only: &[String]) -> Result<(Vec<Side>, Vec<String>)> {
    let names: Vec<String> = SIDES.iter().map(|side| side.name()).collect();
    for name in only {
        ensure!(names.contains(name), "--only {name}: there are {}", names.join(", "));
    }
    let mut notes = Vec::new();
    let sides = SIDES.into_iter().filter(|side| {
        let program = match side {
            Side::Nftables => Some("nft"),
            Side::Haproxy => Some("haproxy"),
            Side::Direct | Side::Xlb(_) => None,
        };
        let wanted = only.is_empty() || only.contains(&side.name()) || *side == Side::Direct;
        let missing = program.filter(|program| wanted && !lab::has_program(program));
        notes.extend(missing.map(|program| format!("{} is left out: {}", side.name(), not_there(program))));
        wanted && missing.is_none()
    });
    Ok((sides.collect(), notes))
}

/// What can be measured here.
fn programme(notes: &mut Vec<String>) -> Vec<(bool, Measure)> {
    let wrk = lab::has_program("wrk");
    if !wrk {
        notes.push(format!("requests a second are left out: {}", not_there("wrk")));
    }
    let of_wrk = |measure| matches!(measure, Measure::Requests | Measure::Connections);
    PROGRAMME.into_iter().filter(|(_, measure)| wrk || !of_wrk(*measure)).collect()
}

fn not_there(program: &str) -> String {
    format!("no {program}; scripts/setup --bench installs it")
}

fn measure_all(
    arguments: &Arguments,
    scene: &Scene,
    sides: &[Side],
    programme: &[(bool, Measure)],
    troubles: &mut Troubles,
) -> Result<Results> {
    let effort =
        Effort { seconds: arguments.seconds, rate: arguments.rate, connections: arguments.connections };
    let mut results = Results::new(sides, programme);
    troubles.all = arguments.rounds as usize * programme.len() * sides.len();
    let mut done = 0;
    let mut patience = PATIENCE;
    for round in 1..=arguments.rounds {
        let mut offloads = None;
        for (index, (with_offloads, measure)) in programme.iter().enumerate() {
            if offloads.replace(*with_offloads) != Some(*with_offloads) {
                scene.set_offloads(*with_offloads)?;
            }
            for side in sides {
                done += 1;
                let (all, name) = (troubles.all, side.name());
                crate::progress(&format!("{done} of {all}: round {round}, {measure:?}, {name}"));
                let others = calm::wait(&mut patience)?;
                if others > calm::MOST_BY_OTHERS {
                    troubles.disturbed += 1;
                    results.disturb(*side, index);
                }
                match measure.take(scene, *side, effort) {
                    Ok(measured) => results.add(*side, index, round, measured),
                    // The others are worth as much without it.
                    Err(error) => {
                        let failed = format!("round {round}, {measure:?} of {name}: {error:#}");
                        troubles.failed.push(failed);
                    }
                }
            }
        }
    }
    crate::progress("");
    Ok(results)
}
