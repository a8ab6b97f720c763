//! `xlb verify`: whether the kernel has what it should, by the agent or, without one, by the pinned maps.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use super::{Format, RunDir, exit, output};
use crate::agent::verify::{self, Difference};
use crate::api::{Client, ClientError};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The configuration to compare with where no agent answers
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
    #[command(flatten)]
    run_dir: RunDir,
}

/// Ends with success if there is no difference.
pub async fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let run_dir = &arguments.run_dir.run_dir;
    let differences: Vec<Difference> = match Client::new(run_dir).get("/v1/verify").await {
        Ok(differences) => differences,
        Err(not_running @ ClientError::NotRunning { .. }) => {
            let Some(config) = &arguments.config else {
                return Err(anyhow::Error::from(not_running)
                    .context("nothing to compare the pinned maps with; name the configuration with -c"));
            };
            eprintln!("no agent answers; comparing the pinned maps with {}", config.display());
            verify::from_pins(run_dir, config).await.context("the pinned maps cannot be verified")?
        }
        Err(error) => return Err(error.into()),
    };
    match arguments.output {
        Format::Json => say!("{}", serde_json::to_string_pretty(&differences)?),
        Format::Table => {
            let rows = differences.iter().map(|d| vec![d.what.clone(), d.intended.clone(), d.found.clone()]);
            let header = ["WHAT", "INTENDED", "FOUND"];
            say!("{}", output::table_or(&header, &[], rows.collect(), "no difference"));
        }
    }
    Ok(if differences.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(exit::DIFFERENCE) })
}
