//! `cargo xtask bench packet`: nanoseconds that a packet takes on its way through the balancer.
//!
//! A driver program in the kernel hands fresh packets of many flows to the program under test. In
//! every round the balancer, the harness alone and the floor (move the head as far and transmit) get a thousand packets
//! each, one after the other; what counts is the difference within each round, and of the rounds the median.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use lb_userspace::bpf::{MOST_ROUNDS, Round};
use serde::{Deserialize, Serialize};

use super::figures::Spread;
use super::lines::{Line, lines};
use super::order::Orders;
use super::report::{Report, command_line};
use super::stage::Stage;

#[derive(clap::Args)]
pub struct Arguments {
    /// How often each line is timed, over 1024 packets each
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..i64::from(MOST_ROUNDS)))]
    rounds: u32,
    /// Only lines with this in their name; twice for those with either
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// A third of the lines, in less than a minute
    #[arg(long)]
    quick: bool,
    /// Names the lines, and measures nothing
    #[arg(long)]
    list: bool,
    /// Where to write the result
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
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
}

impl Row {
    fn of(line: &Line, rounds: &[Round]) -> Self {
        let spread = |figure: fn(&Round) -> f64| Spread::of(rounds.iter().map(figure));
        Self {
            line: line.name(),
            flows: line.order.to_string(),
            harness: spread(|round| round.harness),
            floor: spread(|round| round.floor),
            program: spread(|round| round.program),
            net: spread(|round| round.program - round.harness),
            beyond: spread(|round| round.program - round.floor),
            ratio: spread(|round| round.program / round.floor),
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
        lines.iter().for_each(|line| println!("{:56} {:>9}", line.name(), line.order.to_string()));
        return Ok(());
    }
    let report = Report::new("packet", measure(&lines, arguments)?)?;
    println!(
        "\nNanoseconds of one packet, medians of {} rounds. harness: the driver alone; floor: the head moved and the\n\
         packet sent, beyond the harness; net: the balancer beyond the harness; beyond: the balancer beyond the floor;\n\
         +-: within which half of the rounds lie; ratio: harness and balancer, of harness and floor.",
        arguments.rounds
    );
    println!("{}; {}, {}", report.machine, report.commit, report.date);
    if let Some(path) = &arguments.json {
        report.write(path)?;
    }
    println!("again: {}", command_line());
    Ok(())
}

fn measure(lines: &[Line], arguments: &Arguments) -> Result<Vec<Row>> {
    pin_to_one_cpu()?;
    let mut orders = Orders::default();
    let mut stage: Option<Stage> = None;
    let mut rows = Vec::new();
    println!(
        "{:56} {:>9} {:>8} {:>8} {:>8} {:>8} {:>6} {:>6}",
        "", "flows", "harness", "floor", "net", "beyond", "+-", "ratio"
    );
    for (number, line) in lines.iter().enumerate() {
        progress(&format!("{} of {}: {}", number + 1, lines.len(), line.name()));
        if stage.as_ref().is_none_or(|stage| stage.scene != line.scene) {
            // The one before holds the same directory.
            drop(stage.take());
            stage = Some(Stage::set(line.scene)?);
        }
        let stage = stage.as_mut().context("no stage")?;
        let row = Row::of(line, &stage.time(line, &mut orders, arguments.rounds)?);
        progress("");
        println!(
            "{:56} {:>9} {:8.1} {:8.1} {:8.1} {:8.1} {:6.1} {:6.2}",
            row.line,
            row.flows,
            row.harness.median,
            row.floor.median - row.harness.median,
            row.net.median,
            row.beyond.median,
            row.beyond.width() / 2.0,
            row.ratio.median
        );
        rows.push(row);
    }
    Ok(rows)
}

/// Says what is going on, over what was said before; nothing where nobody looks.
fn progress(text: &str) {
    let mut stderr = std::io::stderr();
    if stderr.is_terminal() {
        // What cannot be said is not missed.
        _ = write!(stderr, "\r\x1b[K{text}").and_then(|()| stderr.flush());
    }
}

/// Timings wander when the thread does.
fn pin_to_one_cpu() -> Result<()> {
    let mut cpus = rustix::thread::CpuSet::new();
    cpus.set(0);
    rustix::thread::sched_setaffinity(None, &cpus).context("the thread cannot be bound to CPU 0")
}
