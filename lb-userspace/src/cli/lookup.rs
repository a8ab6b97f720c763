//! `xlb lookup`: asks the agent, or the pinned maps if there is none.

use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;

use super::{Format, RunDir, exit};
use crate::api::{Client, ClientError};
use crate::bpf::{BpfFs, Maps};
use crate::config::model::Protocol;
use crate::lookup::{Explanation, Names, Query, explain};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The client, as ADDRESS:PORT or [ADDRESS]:PORT
    #[arg(value_name = "SRC:PORT")]
    source: SocketAddr,
    /// The service, as ADDRESS:PORT or [ADDRESS]:PORT
    #[arg(value_name = "VIP:PORT")]
    vip: SocketAddr,
    #[arg(short, long, value_parser = protocol, default_value = "tcp", value_name = "tcp|udp")]
    protocol: Protocol,
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
    #[command(flatten)]
    run_dir: RunDir,
}

fn protocol(text: &str) -> Result<Protocol, String> {
    Protocol::ALL.iter().find(|p| p.as_str() == text).copied().ok_or_else(|| "use tcp or udp".to_owned())
}

/// Ends with success if a backend takes the flow.
pub async fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let Arguments { source, vip, protocol, .. } = arguments;
    let run_dir = &arguments.run_dir.run_dir;
    let resource = format!("/v1/lookup?source={}&vip={}&protocol={protocol}", escape(source), escape(vip));
    let explanation = match Client::new(run_dir).get(&resource).await {
        Ok(explanation) => explanation,
        Err(not_running @ ClientError::NotRunning { .. }) => {
            let query = Query { source: *source, vip: *vip, protocol: *protocol };
            from_pins(run_dir, &query).context(not_running)?
        }
        Err(error) => return Err(error.into()),
    };
    match arguments.output {
        Format::Json => say!("{}", serde_json::to_string_pretty(&explanation)?),
        Format::Table => print(arguments, &explanation),
    }
    let taken = explanation.outcome.starts_with("forward");
    Ok(if taken { ExitCode::SUCCESS } else { ExitCode::from(exit::FAILURE) })
}

/// Brackets would end the query string's validity.
fn escape(address: &SocketAddr) -> String {
    address.to_string().replace('[', "%5B").replace(']', "%5D")
}

/// The maps that a dead agent left; what things are called died with it.
fn from_pins(run_dir: &Path, query: &Query) -> anyhow::Result<Explanation> {
    let fs = BpfFs::existing(run_dir)?.context("and nothing is pinned there")?;
    let maps = Maps::from_pins(&fs)?;
    eprintln!("no agent answers; reading the pinned maps (names are not known)");
    explain(&maps.image()?, query, 0, &Names::default()).map_err(anyhow::Error::msg)
}

fn print(arguments: &Arguments, explanation: &Explanation) {
    let Explanation { outcome, meaning, .. } = explanation;
    say!("{} {} -> {}", arguments.protocol, arguments.source, arguments.vip);
    if let Some(service) = &explanation.service {
        say!("  service   {service}");
    }
    if let (Some(slot), Some(length), Some(table)) =
        (explanation.slot, explanation.table_length, explanation.table)
    {
        let state = explanation.slot_state.as_deref().unwrap_or("");
        say!("  slot      {slot} of {length} in table {table}, {state}");
    }
    if let Some(id) = explanation.backend_id {
        let name = match (&explanation.pool, &explanation.backend) {
            (Some(pool), Some(backend)) => format!("{pool}/{backend} "),
            _ => String::new(),
        };
        let address = explanation.backend_address.map_or(String::new(), |address| format!("at {address} "));
        say!("  backend   {name}{address}(id {id})");
    }
    if let (Some(forward), Some(mac), Some(ifindex)) =
        (&explanation.forward, &explanation.next_hop_mac, explanation.egress_ifindex)
    {
        say!("  sent      {forward}, to {mac} through interface {ifindex}");
    }
    say!("  outcome   {outcome}: {meaning}");
}
