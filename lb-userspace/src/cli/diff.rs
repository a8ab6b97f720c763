//! `xlb diff`: what another configuration would change, by the running agent.

use std::path::PathBuf;
use std::process::ExitCode;

use super::{Format, RunDir, exit, output, rates};
use crate::agent::diff::{Change, Diff, Kind, Leaver, TableChange};
use crate::agent::preflight;
use crate::api::{Client, ClientError};
use crate::capacity::Capacity;
use crate::config;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The configuration to compare with what is in force
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
    /// End with 5 if there is a difference
    #[arg(long)]
    exit_code: bool,
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
    #[command(flatten)]
    run_dir: RunDir,
}

pub async fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let (loaded, text) = config::load_with_text(&arguments.config)?;
    for warning in &loaded.warnings {
        eprintln!("warning: {warning}");
    }
    if let Err(error) = preflight(&loaded.config, &Capacity::new(&loaded.config.limits)) {
        eprintln!("{}: {error}", arguments.config.display());
        return Ok(ExitCode::from(exit::CONFIG));
    }
    let diff = match Client::new(&arguments.run_dir.run_dir).diff(text).await {
        Ok(diff) => diff,
        Err(error @ ClientError::NotRunning { .. }) => {
            let hint = "`xlb verify -c` compares a file with the tables that an agent has left";
            return Err(anyhow::Error::from(error).context(hint));
        }
        Err(error) => return Err(error.into()),
    };
    match arguments.output {
        Format::Json => say!("{}", serde_json::to_string_pretty(&diff)?),
        Format::Table => say!("{}", text_of(&diff)),
    }
    let differs = arguments.exit_code && !diff.is_empty();
    Ok(if differs { ExitCode::from(exit::DIFFERENCE) } else { ExitCode::SUCCESS })
}

fn text_of(diff: &Diff) -> String {
    if diff.is_empty() {
        return "no difference".to_owned();
    }
    let mut parts = vec![diff.changes.iter().map(change).collect::<Vec<_>>().join("\n")];
    if diff.tables.is_empty() {
        parts.push("no new flow would go to another backend".to_owned());
    } else {
        let header = ["SERVICES", "POOL", "SCHEDULER", "NEW FLOWS ELSEWHERE", "OF PACKETS NOW"];
        parts.push(output::table(&header, &[3, 4], diff.tables.iter().map(table).collect()));
    }
    if !diff.leaving.is_empty() {
        let header = ["LEAVES", "ITS FLOWS", "SLOTS", "PINS", "PACKETS/S"];
        parts.push(output::table(&header, &[2, 3, 4], diff.leaving.iter().map(leaver).collect()));
    }
    let ended = diff.ended.iter();
    let ended = ended.map(|name| format!("{name}: what was said by command ends, as its entry changes"));
    parts.extend(Some(ended.collect::<Vec<_>>().join("\n")).filter(|ended| !ended.is_empty()));
    let warnings = diff.warnings.iter().map(|warning| output::wrapped(&format!("warning: {warning}")));
    parts.extend(Some(warnings.collect::<Vec<_>>().join("\n")).filter(|warnings| !warnings.is_empty()));
    parts.join("\n\n")
}

fn change(change: &Change) -> String {
    let mut lines = Vec::new();
    match change.kind {
        Kind::Added | Kind::Removed => {
            let (sign, word) = if change.kind == Kind::Added { ("+", "added") } else { ("-", "removed") };
            lines.push(format!("{sign} {}: {word}", change.subject));
        }
        Kind::Changed => {
            lines.push(format!("~ {}", change.subject));
            let none = || "none".to_owned();
            let keys = change.keys.iter().map(|key| {
                let (from, to) = (key.from.clone().unwrap_or_else(none), key.to.clone().unwrap_or_else(none));
                format!("    {}: {from} -> {to}", key.key)
            });
            lines.extend(keys);
        }
    }
    lines.join("\n")
}

fn percent(part: f64) -> String {
    format!("{:.1} %", part * 100.0)
}

fn table(table: &TableChange) -> Vec<String> {
    /// Services that are named; the rest is counted.
    const SHOWN: usize = 4;
    let mut services = table.services[..table.services.len().min(SHOWN)].join(", ");
    if let Some(more @ 1..) = table.services.len().checked_sub(SHOWN) {
        services.push_str(&format!(" and {more} more"));
    }
    let packets = table.packets.map_or_else(|| "-".to_owned(), percent);
    vec![services, table.pool.clone(), table.scheduler.clone(), percent(table.flows), packets]
}

fn leaver(leaver: &Leaver) -> Vec<String> {
    let Leaver { backend, flows, slots, pins, packets_per_second } = leaver;
    let packets = packets_per_second.map_or_else(|| "-".to_owned(), rates::short);
    vec![backend.clone(), flows.clone(), slots.to_string(), pins.to_string(), packets]
}
