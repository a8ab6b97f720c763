//! `xlb backend`: shows backends, and takes them out of use and back.

use std::process::ExitCode;

use clap::Subcommand;
use clap::builder::RangedU64ValueParser;
use serde::Serialize;

use super::{Format, RunDir, exit, list, wait};
use crate::api::commands::timeout;
use crate::api::{BackendAsked, Client, Commanded, DrainAsked, WeightAsked};

#[derive(Debug, Subcommand)]
pub enum Backend {
    /// Show backends: state, share of new flows, traffic
    List {
        /// Of this pool only
        #[arg(short, long, value_name = "POOL")]
        pool: Option<String>,
        #[arg(short, long, value_enum, default_value = "table")]
        output: Format,
        #[command(flatten)]
        run_dir: RunDir,
    },
    /// Send a backend no new flows; those it has stay until they end
    Drain {
        #[command(flatten)]
        which: Which,
        /// Move what is left of its flows after this time, such as 5m; `never` by default, or what the pool's
        /// `drain_timeout` says
        #[arg(short, long, value_name = "TIME", value_parser = a_timeout)]
        timeout: Option<String>,
        /// Show what is left until nothing is
        #[arg(short, long)]
        wait: bool,
    },
    /// Send a backend no flows at all: those it has move at once
    Disable {
        #[command(flatten)]
        which: Which,
        /// Show what is left until nothing is
        #[arg(short, long)]
        wait: bool,
    },
    /// Have a backend as the file has it again, weight and all
    Enable {
        #[command(flatten)]
        which: Which,
    },
    /// Give a backend another weight than the file's
    Weight {
        #[command(flatten)]
        which: Which,
        /// 0 to 100; 0 takes no new flows
        #[arg(value_parser = RangedU64ValueParser::<u64>::new().range(0..=100))]
        weight: u64,
    },
}

#[derive(Debug, clap::Args)]
pub struct Which {
    /// Its pool, and its name or address
    #[arg(value_name = "POOL/BACKEND", value_parser = a_backend)]
    backend: String,
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
    #[command(flatten)]
    run_dir: RunDir,
}

pub(super) fn a_backend(text: &str) -> Result<String, String> {
    let whole = text.split_once('/').is_some_and(|(pool, name)| !pool.is_empty() && !name.is_empty());
    whole.then(|| text.to_owned()).ok_or_else(|| "write its pool, too, such as web/web1".to_owned())
}

/// The agent reads the text; what it would refuse is wrong usage.
fn a_timeout(text: &str) -> Result<String, String> {
    timeout(text).map(|_| text.to_owned())
}

pub async fn run(command: &Backend) -> anyhow::Result<ExitCode> {
    match command {
        Backend::List { pool, output, run_dir } => {
            list::backends(pool.as_deref(), *output, run_dir).await?;
            Ok(ExitCode::SUCCESS)
        }
        Backend::Drain { which, timeout, wait } => {
            let asked = DrainAsked { backend: which.backend.clone(), timeout: timeout.clone() };
            ask(which, "/v1/backends/drain", &asked, *wait).await
        }
        Backend::Disable { which, wait } => ask(which, "/v1/backends/disable", &which.asked(), *wait).await,
        Backend::Enable { which } => ask(which, "/v1/backends/enable", &which.asked(), false).await,
        Backend::Weight { which, weight } => {
            let asked = WeightAsked { backend: which.backend.clone(), weight: *weight };
            ask(which, "/v1/backends/weight", &asked, false).await
        }
    }
}

impl Which {
    fn asked(&self) -> BackendAsked {
        BackendAsked { backend: self.backend.clone() }
    }
}

async fn ask<B: Serialize>(which: &Which, resource: &str, asked: &B, wait: bool) -> anyhow::Result<ExitCode> {
    let client = Client::new(&which.run_dir.run_dir);
    let mut done: Commanded = client.command(resource, asked).await?;
    if which.output == Format::Table {
        say!("{}", done.said);
        done.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
    }
    let mut code = ExitCode::SUCCESS;
    if wait {
        let end = wait::until_drained(&client, &mut done.backend, which.output).await?;
        match which.output {
            Format::Table if end.complete => say!("{}", end.words),
            Format::Table => eprintln!("{}", end.words),
            Format::Json => done.said = end.words,
        }
        if !end.complete {
            code = ExitCode::from(exit::UNFINISHED);
        }
    }
    if which.output == Format::Json {
        say!("{}", serde_json::to_string_pretty(&done)?);
    }
    Ok(code)
}
