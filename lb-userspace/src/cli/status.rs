//! `xlb status`: what the agent knows, as tables or as JSON; with `--watch` again and again.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use super::tables::{self, Traffic};
use super::{Format, RunDir, output};
use crate::agent::status::Status;
use crate::api::{Client, ClientError};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Show it again every so often, with rates, until Ctrl-C
    #[arg(
        short, long, value_name = "INTERVAL", value_parser = output::interval,
        num_args = 0..=1, default_missing_value = "2s"
    )]
    watch: Option<Duration>,
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
    #[command(flatten)]
    run_dir: RunDir,
}

pub async fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let client = Client::new(&arguments.run_dir.run_dir);
    let status: Status = client.get("/v1/status").await?;
    let Some(interval) = arguments.watch else {
        match arguments.output {
            Format::Json => say!("{}", serde_json::to_string_pretty(&status)?),
            Format::Table => say!("{}", text(&status, Traffic::Totals)),
        }
        return Ok(());
    };
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        watched = watch(&client, interval, arguments.output, status) => watched,
        _ = interrupt.recv() => Ok(()),
    }
}

/// An agent that is being restarted answers again soon; what it counts goes on meanwhile.
async fn watch(client: &Client, interval: Duration, format: Format, first: Status) -> anyhow::Result<()> {
    let (mut earlier, mut status) = (None, first);
    let mut screen = output::Screen::default();
    loop {
        match format {
            Format::Json => say!("{}", serde_json::to_string(&status)?),
            Format::Table => screen.show(&text(&status, Traffic::Rates(earlier.as_ref(), &status))),
        }
        tokio::time::sleep(interval).await;
        let next = loop {
            match client.get("/v1/status").await {
                Ok(next) => break next,
                Err(error @ (ClientError::NotRunning { .. } | ClientError::Timeout { .. })) => {
                    screen.note(&format!("{error}\ntrying again every {}", output::short(interval)));
                }
                // It went away while it answered.
                Err(ClientError::Http(_)) => {}
                Err(error) => return Err(error.into()),
            }
            tokio::time::sleep(interval).await;
        };
        earlier = Some(std::mem::replace(&mut status, next));
    }
}

fn text(status: &Status, traffic: Traffic<'_>) -> String {
    let interfaces: Vec<String> =
        status.interfaces.iter().map(|i| format!("{} ({})", i.name, i.mode)).collect();
    let on = if interfaces.is_empty() { "no interface".to_owned() } else { interfaces.join(", ") };
    let mut parts = vec![format!(
        "xlb {} on {on}, up {}, process {}, {}",
        status.version,
        output::duration(status.uptime_seconds),
        status.pid,
        status.config_file
    )];
    if let Some(error) = status.last_reload.as_ref().and_then(|reload| reload.error.as_ref()) {
        parts.push(format!("The last reload was refused, the configuration before it is in force:\n{error}"));
    }
    parts.push(tables::services(&status.services, traffic));
    parts.extend(Some(tables::pools(&status.pools)).filter(|lines| !lines.is_empty()));
    parts.push(tables::backends(&status.backends, traffic));
    parts.extend(tables::status_replies(status, traffic));
    parts.extend(Some(tables::connections(status)).filter(|lines| !lines.is_empty()));
    parts.push(tables::outcomes(&status.outcomes, traffic));
    parts.join("\n\n")
}
