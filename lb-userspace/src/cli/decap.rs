//! `xlb decap`: the backend's side of a tunnel, for kernels without an ipip or fou device.

use anyhow::Context;
use ipnetwork::IpNetwork;
use lb_common::outcome::DecapOutcome;
use tokio::signal::unix::{SignalKind, signal};
use tracing::info;

use crate::bpf::{Decap, DecapConfig};
use crate::capabilities;
use crate::config::model::{DEFAULT_GUE_PORT, Mode};
use crate::nexthop::Resolver;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The interface that tunnel packets come in on
    #[arg(long, value_name = "IF")]
    interface: String,
    /// Inner destinations that are let through: the VIPs that this backend serves, addresses or prefixes
    #[arg(long = "vip", value_name = "VIP", required = true, num_args = 1..)]
    vips: Vec<IpNetwork>,
    /// Sources that tunnel packets are believed from: the balancers' addresses, or their outer_source
    #[arg(long, value_name = "PREFIX", required = true, num_args = 1..)]
    from: Vec<IpNetwork>,
    /// The UDP port that GUE comes to: the pool's `gue_port`; 0 takes no GUE
    #[arg(long, default_value_t = DEFAULT_GUE_PORT, value_name = "PORT")]
    gue_port: u16,
    /// How to attach
    #[arg(long, value_parser = mode, default_value = "auto", value_name = "auto|native|generic")]
    mode: Mode,
}

fn mode(text: &str) -> Result<Mode, String> {
    Mode::ALL
        .iter()
        .find(|m| m.as_str() == text)
        .copied()
        .ok_or_else(|| "use auto, native or generic".to_owned())
}

/// Attached until a signal ends the process; then prints what was counted.
pub async fn run(arguments: Arguments) -> anyhow::Result<()> {
    capabilities::check()?;
    let link = Resolver::new()?.link(&arguments.interface).await?;
    let Arguments { vips, from, gue_port, mode, .. } = arguments;
    let config = DecapConfig { vips, from, gue_port };
    let decap = Decap::attach(link.ifindex, mode, &config)
        .with_context(|| format!("{} cannot decapsulate", arguments.interface))?;
    info!(interface = %arguments.interface, mode = if decap.generic { "generic" } else { "native" }, "decapsulating");

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        _ = hangup.recv() => {}
    }
    for outcome in DecapOutcome::ALL {
        say!("{} {}", outcome.counter(), decap.outcome(*outcome)?);
    }
    Ok(())
}
