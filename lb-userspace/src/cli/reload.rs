//! `xlb reload`: has the agent read its file again, and says how that ended.

use std::process::ExitCode;

use serde_json::Value;

use super::{Format, RunDir, exit, output};
use crate::agent::{Refused, Summary};
use crate::api::{Client, ClientError};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
    #[command(flatten)]
    run_dir: RunDir,
}

pub async fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let body = match Client::new(&arguments.run_dir.run_dir).reload().await {
        Ok(summary) => {
            match arguments.output {
                Format::Json => say!("{}", serde_json::to_string_pretty(&summary)?),
                Format::Table => print(&summary),
            }
            return Ok(ExitCode::SUCCESS);
        }
        Err(ClientError::Refused { body, .. }) => body,
        Err(error) => return Err(error.into()),
    };
    let refused: Refused = serde_json::from_slice(&body)?;
    match arguments.output {
        Format::Json => say!("{}", serde_json::to_string_pretty(&serde_json::from_slice::<Value>(&body)?)?),
        Format::Table => {
            eprintln!("{}", refused.error);
            eprintln!("xlb: reload refused; the last good configuration goes on");
        }
    }
    let file_is_wrong = !refused.problems.is_empty();
    Ok(ExitCode::from(if file_is_wrong { exit::CONFIG } else { exit::FAILURE }))
}

/// Names shown of what was added or removed; the rest is counted.
const SHOWN: usize = 10;

fn print(summary: &Summary) {
    for warning in &summary.warnings {
        eprintln!("warning: {warning}");
    }
    say!(
        "{}: reloaded: {}, {} with {}",
        summary.file,
        output::count(summary.services, "service"),
        output::count(summary.pools, "pool"),
        output::count(summary.backends, "backend"),
    );
    for (what, names) in [("added", &summary.added), ("removed", &summary.removed)] {
        if !names.is_empty() {
            let shown = names[..names.len().min(SHOWN)].join(", ");
            let more = names.len().saturating_sub(SHOWN);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            say!("{what}: {shown}{more}");
        }
    }
}
