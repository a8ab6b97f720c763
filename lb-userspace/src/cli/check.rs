//! `xlb check`: is this file valid, does it fit its limits, can it work on this host, and what will it take?

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use serde_json::{Value, json};

use super::{Format, exit, output};
use crate::agent::{DEFAULT_RUN_DIR, preflight};
use crate::api;
use crate::bpf::{BpfFs, Datapath};
use crate::capacity::{Capacity, possible_cpus};
use crate::config::model::{Config, Forward};
use crate::config::{self, Loaded, Problem};
use crate::host::{self, Findings};
use crate::nexthop::Resolver;
use crate::room::Available;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The configuration
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
    /// The file is for this host: its interfaces must be here
    #[arg(long, conflicts_with = "no_host")]
    host: bool,
    /// Leave out what this host's interfaces, routes and addresses say
    #[arg(long)]
    no_host: bool,
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

pub async fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let Loaded { config, mut warnings, places } = match config::load(&arguments.config) {
        Ok(loaded) => loaded,
        Err(problems) => {
            match arguments.output {
                Format::Table => eprintln!("{problems}"),
                Format::Json => say!("{}", json!({"valid": false, "problems": problems.0})),
            }
            return Ok(ExitCode::from(exit::CONFIG));
        }
    };
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
    let sight = Sight::of(arguments, &config, &places).await?;
    if let Sight::LookedAt(Findings { errors, warnings: more, .. }) = &sight {
        warnings.extend(more.iter().cloned());
        if !errors.is_empty() {
            refuse(arguments, &warnings, errors, &sight);
            return Ok(ExitCode::from(exit::CONFIG));
        }
    }
    let cpus = possible_cpus();
    let memory = Memory { available: Available::here(), cpus };
    if let (Some(available), false) = (&memory.available, arguments.no_host)
        && let Err(problem) = available.check(&capacity, cpus, &places)
        && !is_in_use(&capacity)
    {
        // Others than root cannot see whether maps of this size are there already.
        if rustix::process::geteuid().is_root() {
            refuse(arguments, &warnings, &[problem], &sight);
            return Ok(ExitCode::from(exit::CONFIG));
        }
        warnings.push(problem);
    }
    match arguments.output {
        Format::Table => show(arguments, &config, &capacity, &memory, &warnings, &sight),
        Format::Json => {
            let value = as_json(&config, &capacity, &memory, &warnings, &sight);
            say!("{}", serde_json::to_string_pretty(&value).context("the answer is no JSON")?);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether the host was looked at, or why not.
enum Sight {
    LookedAt(Findings),
    LeftOut(String),
}

impl Sight {
    async fn of(arguments: &Arguments, config: &Config, places: &config::Places) -> anyhow::Result<Self> {
        if arguments.no_host {
            return Ok(Self::LeftOut("--no-host".to_owned()));
        }
        let asked = async {
            let resolver = Resolver::new().context("netlink is not to be had")?;
            anyhow::Ok(host::look(config, places, &resolver, arguments.host).await?)
        };
        match asked.await {
            Ok(Some(findings)) => Ok(Self::LookedAt(findings)),
            Ok(None) => Ok(Self::LeftOut("it has none of the file's interfaces; --host insists".to_owned())),
            Err(error) if arguments.host => Err(error),
            Err(error) => Ok(Self::LeftOut(format!("{error:#}"))),
        }
    }

    fn words(&self) -> String {
        match self {
            Self::LookedAt(found) => {
                let interfaces = found.interfaces.join(", ");
                format!("looked at: interfaces ({interfaces}), addresses, and the ways to the backends")
            }
            Self::LeftOut(why) => format!("not looked at: {why}"),
        }
    }

    fn as_json(&self) -> Value {
        json!({"looked_at": matches!(self, Self::LookedAt(_)), "words": self.words()})
    }
}

/// The file is valid, and cannot work here.
fn refuse(arguments: &Arguments, warnings: &[Problem], errors: &[Problem], sight: &Sight) {
    if arguments.output == Format::Json {
        let value = json!({
            "valid": false, "problems": errors, "warnings": warnings, "host": sight.as_json(),
        });
        say!("{value}");
        return;
    }
    for warning in warnings {
        eprintln!("warning: {warning}");
    }
    for error in errors {
        eprintln!("{error}");
    }
    eprintln!("valid, but it cannot work on this host; --no-host leaves out what this host says");
}

/// What maps are measured by.
struct Memory {
    available: Option<Available>,
    cpus: u64,
}

/// Whether maps of this size are there: an agent goes on with them.
fn is_in_use(capacity: &Capacity) -> bool {
    let fs = BpfFs::existing(Path::new(DEFAULT_RUN_DIR)).ok().flatten();
    fs.is_some_and(|fs| Datapath::has_maps(&fs, capacity))
}

fn as_json(
    config: &Config,
    capacity: &Capacity,
    memory: &Memory,
    warnings: &[Problem],
    sight: &Sight,
) -> Value {
    let cpus = memory.cpus;
    let maps: Vec<_> = capacity
        .rows()
        .iter()
        .map(|map| json!({"name": map.name, "rows": map.rows, "bytes": map.bytes(cpus), "limit": map.limit}))
        .collect();
    json!({
        "valid": true, "warnings": warnings, "host": sight.as_json(), "services": config.services.len(),
        "vips": vips(config), "connections": config.limits.connections, "pools": config.pools.len(), "backends": backends(config), "cpus": cpus,
        "maps": maps, "map_bytes": capacity.bytes(cpus),
        "most_map_bytes": memory.available.as_ref().map(Available::for_maps),
    })
}

fn show(
    arguments: &Arguments,
    config: &Config,
    capacity: &Capacity,
    memory: &Memory,
    warnings: &[Problem],
    sight: &Sight,
) {
    for warning in warnings {
        eprintln!("warning: {warning}");
    }
    say!(
        "{}: valid: {} on {} (address, port, protocol; limit {}), {} with {} (limit {})",
        arguments.config.display(),
        output::count(config.services.len(), "service"),
        output::count(vips(config), "VIP"),
        config.limits.vips,
        output::count(config.pools.len(), "pool"),
        output::count(backends(config), "backend"),
        config.limits.backends,
    );
    if let Some(words) = connections(config) {
        say!("{words}");
    }
    say!("This host was {}", sight.words());
    let cpus = memory.cpus;
    let total = capacity.bytes(cpus);
    let most = memory.available.as_ref().map_or_else(String::new, |available| {
        format!("; up to {} may be taken here ({})", output::bytes(available.for_maps()), available.by)
    });
    say!("\nThe maps take {} of kernel memory on this host ({cpus} CPUs){most}:\n", output::bytes(total));
    let rows = capacity.rows();
    let rows = rows.iter().map(|map| {
        let limit = map.limit.map_or_else(String::new, |key| format!("limits.{key}"));
        vec![map.name.to_owned(), map.rows.to_string(), output::bytes(map.bytes(cpus)), limit]
    });
    say!("{}", output::table(&["MAP", "ROWS", "MEMORY", "SIZED BY"], &[1, 2], rows.collect()));
}

/// How many connections there may be, and what decides it.
fn connections(config: &Config) -> Option<String> {
    let connections = config.limits.connections;
    if connections == 0 {
        return None;
    }
    let of_one = config.sources.ports_of_one();
    let full = config.pools.iter().any(|pool| matches!(pool.forward, Forward::Fullnat { .. }));
    let used = connections.div_ceil(of_one) as usize;
    let sources = if full {
        format!("; {} of {of_one} ports each", output::count(used, "source"))
    } else {
        String::new()
    };
    Some(format!("{connections} connections can be translated at a time (limits.connections{sources})"))
}

fn backends(config: &Config) -> usize {
    config.pools.iter().map(|pool| pool.backends.len()).sum()
}

fn vips(config: &Config) -> usize {
    config.services.iter().map(|service| service.triples().count()).sum()
}
