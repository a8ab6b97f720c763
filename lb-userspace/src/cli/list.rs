//! `xlb backend list` and `xlb service list`.

use anyhow::bail;
use clap::Subcommand;

use super::tables::{self, Traffic};
use super::{Format, RunDir};
use crate::agent::status::{BackendStatus, ServiceStatus};
use crate::api::Client;

#[derive(Debug, Subcommand)]
pub enum Service {
    /// Show services: one line for each VIP, port and protocol
    List {
        #[arg(short, long, value_enum, default_value = "table")]
        output: Format,
        #[command(flatten)]
        run_dir: RunDir,
    },
}

pub async fn backends(pool: Option<&str>, output: Format, run_dir: &RunDir) -> anyhow::Result<()> {
    let client = Client::new(&run_dir.run_dir);
    let mut backends: Vec<BackendStatus> = client.get("/v1/backends").await?;
    if let Some(pool) = pool {
        let mut pools: Vec<String> = backends.iter().map(|backend| backend.pool.clone()).collect();
        pools.dedup();
        backends.retain(|backend| backend.pool == pool);
        if backends.is_empty() {
            bail!("no pool {pool} has backends; there are {}", list(&pools));
        }
    }
    match output {
        Format::Json => say!("{}", serde_json::to_string_pretty(&backends)?),
        Format::Table => say!("{}", tables::backends(&backends, Traffic::Totals)),
    }
    Ok(())
}

fn list(pools: &[String]) -> String {
    if pools.is_empty() { "none".to_owned() } else { pools.join(", ") }
}

pub async fn services(command: &Service) -> anyhow::Result<()> {
    let Service::List { output, run_dir } = command;
    let services: Vec<ServiceStatus> = Client::new(&run_dir.run_dir).get("/v1/services").await?;
    match output {
        Format::Json => say!("{}", serde_json::to_string_pretty(&services)?),
        Format::Table => say!("{}", tables::services(&services, Traffic::Totals)),
    }
    Ok(())
}
