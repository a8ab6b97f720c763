//! `cargo xtask bench packet`: nanoseconds that a packet takes on its way through the balancer.
//!
//! A driver program in the kernel hands fresh packets of many flows to the program under test. In
//! every round the balancer, the harness alone and the floor (move the head as far and transmit) get a thousand packets
//! each, one after the other; what counts is the difference within each round, and of the rounds the median.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, ensure};
use lb_userspace::bpf::{MOST_ROUNDS, Round};
use serde::{Deserialize, Serialize};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::compare::{Comparison, compare};
use super::figures::Spread;
use super::lines::{Line, lines};
use super::passes::{self, Settled};
use super::report::{Report, kept, newest};
use crate::progress;

#[derive(clap::Args)]
pub struct Arguments {
    /// How often each line is timed in a pass, over 1024 packets each
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..i64::from(MOST_ROUNDS)))]
    rounds: u32,
    /// How often the program is loaded for that; twice, but once with --quick, if not said
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    passes: Option<u32>,
    /// Only lines with this in their name; twice for those with either
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// A quarter of the lines, once, in less than a minute
    #[arg(long)]
    quick: bool,
    /// Names the lines, and measures nothing
    #[arg(long)]
    list: bool,
    /// Where to write the result
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The result to compare with; else the newest of docs/results/packet-*.json
    #[arg(long, value_name = "FILE")]
    against: Option<PathBuf>,
    /// Fails where a line is worse than in the result that is compared with
    #[arg(long)]
    strict: bool,
    /// Keeps the result in docs/results, and writes the table of docs/performance.md
    #[arg(long, conflicts_with_all = ["only", "quick", "list"])]
    table: bool,
}

/// Nanoseconds of a packet of a line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub line: String,
    pub flows: String,
    /// The harness alone.
    pub harness: Spread,
    /// Harness and floor; the harness alone where the head does not move.
    pub floor: Spread,
    /// Harness and balancer.
    pub program: Spread,
    /// What the balancer takes beyond the harness.
    pub net: Spread,
    /// What it takes beyond the floor.
    pub beyond: Spread,
    /// `program`, of `floor`.
    pub ratio: Spread,
    /// Whether the machine was hardly ever as fast as for other lines.
    pub disturbed: bool,
}

impl Row {
    fn of(line: &Line, settled: &Settled) -> Self {
        let spread = |figure: fn(&Round) -> f64| Spread::of(settled.rounds.iter().map(figure));
        Self {
            line: line.name(),
            flows: line.order.to_string(),
            harness: spread(|round| round.harness),
            floor: spread(|round| round.floor),
            program: spread(|round| round.program),
            net: spread(|round| round.program - round.harness),
            beyond: spread(|round| round.program - round.floor),
            ratio: spread(|round| round.program / round.floor),
            disturbed: settled.disturbed,
        }
    }
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let chosen = |line: &Line| {
        let named = arguments.only.is_empty() || arguments.only.iter().any(|text| line.name().contains(text));
        named && (line.quick || !arguments.quick)
    };
    let lines: Vec<Line> = lines().into_iter().filter(chosen).collect();
    ensure!(!lines.is_empty(), "no line has that in its name; `--list` names them all");
    if arguments.list {
        let names: String =
            lines.iter().map(|line| format!("{:56} {:>9}\n", line.name(), line.order.to_string())).collect();
        // A reader that ends early is no reason to panic.
        return std::io::stdout().write_all(names.as_bytes()).context("standard output");
    }
    // Before it may be written over.
    let path = arguments.against.clone().map_or_else(|| newest(NAME), |path| Ok(Some(path)))?;
    let then = path.map(|path| Ok::<_, anyhow::Error>((Report::<Row>::read(&path)?, path))).transpose()?;
    let report = Report::new(NAME, measure(&lines, arguments)?)?;
    say!(
        "\nNanoseconds of one packet, medians. harness: the driver alone; floor: the head moved and the\n\
         packet sent, beyond the harness; net: the balancer beyond the harness; beyond: the balancer beyond the floor;\n\
         +-: within which half of the rounds lie; ratio: harness and balancer, of harness and floor; ~: the machine was\n\
         disturbed whenever the line was measured."
    );
    say!("{}; {}, {}", report.machine, report.commit, report.date);
    if let Some(path) = &arguments.json {
        report.write(path)?;
    }
    if arguments.table {
        report.write(&kept(NAME, &report.date))?;
        crate::docs::run(false)?;
    }
    say!("again: {}", report.command);
    let worse = then.map_or(0, |(then, path)| tell(&then, &report, &path));
    ensure!(worse == 0 || !arguments.strict, "{worse} lines are worse than they were");
    Ok(())
}

const NAME: &str = "packet";

/// Says what moved. Returns how many lines are worse.
fn tell(then: &Report<Row>, now: &Report<Row>, path: &Path) -> usize {
    let Comparison { worse, better, same, new, disturbed } = compare(&then.rows, &now.rows);
    let file = path.strip_prefix(crate::root()).unwrap_or(path).display();
    say!("\nAgainst {file} ({}, {}), by the ratio:", then.commit, then.date);
    if then.machine != now.machine {
        say!("another machine then: {}", then.machine);
    }
    for (what, changes) in [("worse", &worse), ("better", &better)] {
        changes.iter().for_each(|change| say!("{what:6} {change}"));
    }
    say!(
        "{} worse by more than 10 % and their spread, {} better, {same} the same, {new} new, {disturbed} disturbed",
        worse.len(),
        better.len()
    );
    worse.len()
}

fn measure(lines: &[Line], arguments: &Arguments) -> Result<Vec<Row>> {
    pin_to_one_cpu()?;
    let passes = arguments.passes.unwrap_or(if arguments.quick { 1 } else { 2 });
    let stop = signalled()?;
    let measured = passes::measure(lines, passes, arguments.rounds, &stop, &mut progress);
    progress("");
    let rows: Vec<Row> = lines.iter().zip(&measured?).map(|(line, settled)| Row::of(line, settled)).collect();
    say!(
        "{:56} {:>9} {:>8} {:>8} {:>8} {:>8} {:>6} {:>6}",
        "",
        "flows",
        "harness",
        "floor",
        "net",
        "beyond",
        "+-",
        "ratio"
    );
    for row in &rows {
        say!(
            "{:56} {:>9} {:8.1} {:8.1} {:8.1} {:8.1} {:6.1} {:6.2}{}",
            row.line,
            row.flows,
            row.harness.median,
            row.floor.median - row.harness.median,
            row.net.median,
            row.beyond.median,
            row.beyond.width() / 2.0,
            row.ratio.median,
            if row.disturbed { " ~" } else { "" }
        );
    }
    Ok(rows)
}

/// Set once somebody wants an end: maps are pinned, and have to go.
fn signalled() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}

/// Timings wander when the thread does.
fn pin_to_one_cpu() -> Result<()> {
    let mut cpus = rustix::thread::CpuSet::new();
    cpus.set(0);
    rustix::thread::sched_setaffinity(None, &cpus).context("the thread cannot be bound to CPU 0")
}
