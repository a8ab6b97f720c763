//! What the control plane costs, from ten backends to ten thousand: tables in this process, then the agent in a lab.

mod agent;
mod shape;
mod tables;

use std::path::PathBuf;
use std::time::Instant;

use ::tests::lab;
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use self::agent::Agent;
use self::shape::Shape;
use self::tables::Tables;
use crate::bench::report::Report;
use crate::plot::{self, Axis, Line};
use crate::{cargo, root};

#[derive(clap::Args)]
pub struct Arguments {
    /// Services and the backends of each, as 1000x10, with an agent; may be given several times
    #[arg(long, value_name = "SERVICESxBACKENDS")]
    shape: Vec<Shape>,
    /// Leave out the agent in a lab
    #[arg(long)]
    no_agent: bool,
    /// Seconds that an agent with nothing to do is watched
    #[arg(long, value_name = "SECONDS", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=3600))]
    idle: u64,
    /// Seconds between two checks of a backend, in the run with checks, which is watched for whole intervals
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    check_interval: u64,
    /// Write the result as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a plot of the times as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

const SHAPES: [(u32, u32); 9] =
    [(1, 10), (1, 100), (1, 655), (1, 2_000), (1, 10_000), (10, 10), (100, 10), (100, 100), (1_000, 10)];

/// Those of them in which an agent is measured: nothing that it does is another in between.
const WITH_AGENT: [(u32, u32); 4] = [(1, 10), (1, 655), (1, 10_000), (1_000, 10)];

/// Seconds that the tables of a shape take, about.
const TABLES: u64 = 3;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub services: u32,
    pub backends_each: u32,
    pub tables: Tables,
    pub agent: Option<Agent>,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    // Tables are written into maps of the kernel: root is needed without an agent, too.
    ensure!(lab::available()?, "labs are to be skipped; unset {}", lab::SKIP_ROOT);
    // Times are worth something of optimised code only.
    if crate::rerun_optimised()? {
        return Ok(());
    }
    if !arguments.no_agent {
        let mut command = cargo();
        command.args(["build", "--quiet", "--release", "--package", "lb-userspace"]);
        crate::run(command)?;
    }
    let begin = Instant::now();
    let shapes = arguments.shapes();
    note!("{}", arguments.intent(&shapes));
    lab::clean_up_on_signals()?;
    let mut rows = Vec::new();
    for (number, (shape, with_agent)) in (1..).zip(&shapes) {
        let what = if *with_agent { "tables, and an agent" } else { "tables" };
        note!("{number} of {}: {shape}, {what}", shapes.len());
        rows.push(measure(shape, *with_agent, arguments).with_context(|| shape.to_string())?);
        crate::progress("");
    }
    show(&rows);
    // First: what is written makes the tree another than the commit's.
    let report = Report::new("scale", rows)?;
    if let Some(path) = &arguments.json {
        report.write(path)?;
    }
    if let Some(path) = &arguments.plot {
        std::fs::write(path, picture(&report.rows)?).with_context(|| path.display().to_string())?;
    }
    say!("\n{}, {} ({})", report.machine, report.date, report.commit);
    say!("Took {:.0} s. Again: {}", begin.elapsed().as_secs_f64(), report.command);
    Ok(())
}

impl Arguments {
    /// What is measured, and in which of it an agent.
    fn shapes(&self) -> Vec<(Shape, bool)> {
        if !self.shape.is_empty() {
            return self.shape.iter().map(|shape| (shape.clone(), !self.no_agent)).collect();
        }
        let standard = SHAPES.into_iter().map(|(services, backends)| {
            let with_agent = !self.no_agent && WITH_AGENT.contains(&(services, backends));
            (Shape { services, backends }, with_agent)
        });
        standard.collect()
    }

    /// One line on what will be done, and how long it takes.
    fn intent(&self, shapes: &[(Shape, bool)]) -> String {
        let agents = shapes.iter().filter(|(_, with_agent)| *with_agent).count();
        let watched = self.idle + agent::whole_intervals(self.idle, self.check_interval);
        let seconds = shapes.len() as u64 * TABLES + agents as u64 * (watched + agent::BESIDE);
        format!(
            "sizes: {}; with an agent: {agents}, each watched for {watched} s; takes about {} min",
            shapes.len(),
            seconds.div_ceil(60)
        )
    }
}

fn measure(shape: &Shape, with_agent: bool, arguments: &Arguments) -> Result<Row> {
    crate::progress(&format!("{shape}: tables"));
    let tables = tables::measure(shape)?;
    let agent = if !with_agent {
        None
    } else {
        let binary = root().join("target/release/xlb");
        ensure!(binary.is_file(), "{} is not there", binary.display());
        let agent =
            agent::Measured { shape, binary, idle: arguments.idle, interval: arguments.check_interval };
        Some(agent.run()?)
    };
    Ok(Row { services: shape.services, backends_each: shape.backends, tables, agent })
}

fn show(rows: &[Row]) {
    say!(
        "\n{:>12} {:>9} {:>8} {:>8} {:>8} {:>8} {:>8} {:>7} {:>9} {:>8} {:>8} {:>6}",
        "services x",
        "slots",
        "maglev",
        "build",
        "plan",
        "write",
        "change",
        "words",
        "maps",
        "down",
        "removed",
        "worst"
    );
    say!(
        "{:>12} {:>9} {:>8} {:>8} {:>8} {:>8} {:>8} {:>7} {:>9} {:>8} {:>8} {:>6}",
        "backends",
        "",
        "ms",
        "ms",
        "ms",
        "ms",
        "ms",
        "",
        "MiB",
        "%",
        "%",
        ""
    );
    for Row { services, backends_each, tables: of, .. } in rows {
        say!(
            "{:>12} {:>9} {:8.2} {:8.2} {:8.2} {:8.2} {:8.2} {:>7} {:9.1} {:8.3} {:8.3} {:6.3}",
            format!("{services} x {backends_each}"),
            of.slots,
            of.maglev_ms,
            of.build_ms,
            of.plan_ms,
            of.write_ms,
            of.change_ms,
            of.change_words,
            of.map_bytes as f64 / f64::from(1 << 20),
            100.0 * of.disruption_down,
            100.0 * of.disruption_removed,
            of.imbalance
        );
    }
    if rows.iter().all(|row| row.agent.is_none()) {
        return;
    }
    say!(
        "\n{:>12} {:>9} {:>9} {:>9} {:>8} {:>8} {:>8} {:>9} {:>9} {:>8} {:>8} {:>9}",
        "services x",
        "start",
        "change",
        "most",
        "loaded",
        "p99",
        "most",
        "reload",
        "RssAnon",
        "idle",
        "checks",
        "checks"
    );
    say!(
        "{:>12} {:>9} {:>9} {:>9} {:>8} {:>8} {:>8} {:>9} {:>9} {:>8} {:>8} {:>9}",
        "backends",
        "ms",
        "ms",
        "ms",
        "ms",
        "ms",
        "ms",
        "ms",
        "MiB",
        "%",
        "%",
        "/s"
    );
    for Row { services, backends_each, agent, .. } in rows {
        let Some(agent) = agent else { continue };
        say!(
            "{:>12} {:9.0} {:9.2} {:9.2} {:8.2} {:8.2} {:8.2} {:9.0} {:9.1} {:8.2} {:8.2} {:9.1}",
            format!("{services} x {backends_each}"),
            agent.start_ms,
            agent.change_ms,
            agent.change_most_ms,
            agent.loaded_ms,
            agent.loaded_p99_ms,
            agent.loaded_most_ms,
            agent.reload_ms,
            agent.rss_anon_bytes as f64 / f64::from(1 << 20),
            agent.idle_percent,
            agent.checks_percent,
            agent.checks_per_second
        );
    }
}

/// Times over the number of backends of one service.
fn picture(rows: &[Row]) -> Result<String> {
    let single: Vec<&Row> = rows.iter().filter(|row| row.services == 1).collect();
    let line = |name: &str, value: &dyn Fn(&Row) -> Option<f64>| Line {
        name: name.to_owned(),
        points: single
            .iter()
            .filter_map(|row| Some((f64::from(row.backends_each), value(row).filter(|ms| *ms > 0.0)?)))
            .collect(),
    };
    let lines = [
        line("Maglev table", &|row| Some(row.tables.maglev_ms)),
        line("first plan", &|row| Some(row.tables.plan_ms)),
        line("first writes", &|row| Some(row.tables.write_ms)),
        line("one backend down, to the maps (agent)", &|row| Some(row.agent.as_ref()?.change_ms)),
        line("reload with one change (agent)", &|row| Some(row.agent.as_ref()?.reload_ms)),
        line("start to the first packet (agent)", &|row| Some(row.agent.as_ref()?.start_ms)),
    ];
    let shown: Vec<Line> = lines.into_iter().filter(|line| !line.points.is_empty()).collect();
    plot::lines("Control plane, one service", &Axis::log("backends"), &Axis::log("milliseconds"), &shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(shape: &[&str], no_agent: bool) -> Arguments {
        let shape = shape.iter().map(|text| text.parse().unwrap()).collect();
        Arguments { shape, no_agent, idle: 20, check_interval: 2, json: None, plot: None }
    }

    #[test]
    fn the_bench_says_what_it_will_do_and_how_long_that_takes() {
        let standard = arguments(&[], false);
        let shapes = standard.shapes();
        assert_eq!(shapes.iter().filter(|(_, with_agent)| *with_agent).count(), WITH_AGENT.len());
        let intent = "sizes: 9; with an agent: 4, each watched for 40 s; takes about 6 min";
        assert_eq!(standard.intent(&shapes), intent);
        let some = arguments(&["1000x10"], false);
        let intent = "sizes: 1; with an agent: 1, each watched for 40 s; takes about 2 min";
        assert_eq!(some.intent(&some.shapes()), intent);
        let tables = arguments(&["1000x10", "7x7"], true);
        assert!(tables.shapes().iter().all(|(_, with_agent)| !with_agent));
    }
}
