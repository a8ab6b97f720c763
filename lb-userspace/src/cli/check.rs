//! `xlb check`: is this file valid, does it fit its limits, and what will it take?

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use serde_json::json;

use super::{Format, exit, output};
use crate::agent::preflight;
use crate::api;
use crate::capacity::{Capacity, possible_cpus};
use crate::config;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The configuration
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let loaded = match config::load(&arguments.config) {
        Ok(loaded) => loaded,
        Err(problems) => {
            match arguments.output {
                Format::Table => eprintln!("{problems}"),
                Format::Json => say!("{}", json!({"valid": false, "problems": problems.0})),
            }
            return Ok(ExitCode::from(exit::CONFIG));
        }
    };
    let (config, mut warnings) = (loaded.config, loaded.warnings);
    // The file may be for another host.
    warnings.extend(api::group(&config.api).err());
    let capacity = Capacity::new(&config.limits);
    if let Err(error) = preflight(&config, &capacity) {
        match arguments.output {
            Format::Table => eprintln!("{}: {error}", arguments.config.display()),
            Format::Json => {
                say!("{}", json!({"valid": false, "problems": [{"message": error.to_string()}]}))
            }
        }
        return Ok(ExitCode::from(exit::CONFIG));
    }
    let cpus = possible_cpus();
    let backends: usize = config.pools.iter().map(|pool| pool.backends.len()).sum();
    let vips: usize = config.services.iter().map(|service| service.triples().count()).sum();
    let total = capacity.bytes(cpus);
    if arguments.output == Format::Json {
        let maps: Vec<_> = capacity
            .rows()
            .iter()
            .map(|map| json!({"name": map.name, "rows": map.rows, "bytes": map.bytes(cpus)}))
            .collect();
        let value = json!({
            "valid": true, "warnings": warnings, "services": config.services.len(), "vips": vips,
            "pools": config.pools.len(), "backends": backends, "cpus": cpus, "maps": maps, "map_bytes": total,
        });
        say!("{}", serde_json::to_string_pretty(&value).context("the answer is no JSON")?);
        return Ok(ExitCode::SUCCESS);
    }
    for warning in &warnings {
        eprintln!("warning: {warning}");
    }
    say!(
        "{}: valid: {} on {} (address, port, protocol; limit {}), {} with {} (limit {})",
        arguments.config.display(),
        output::count(config.services.len(), "service"),
        output::count(vips, "VIP"),
        config.limits.vips,
        output::count(config.pools.len(), "pool"),
        output::count(backends, "backend"),
        config.limits.backends,
    );
    say!("\nThe maps take {} of kernel memory on this host ({cpus} CPUs):\n", output::bytes(total));
    let rows = capacity.rows();
    let rows = rows
        .iter()
        .map(|map| vec![map.name.to_owned(), map.rows.to_string(), output::bytes(map.bytes(cpus))]);
    say!("{}", output::table(&["MAP", "ROWS", "MEMORY"], &[1, 2], rows.collect()));
    Ok(ExitCode::SUCCESS)
}
