//! Waits until a backend is drained, and shows what is left of it meanwhile. Changes nothing.

use std::time::{Duration, Instant};

use hyper::StatusCode;
use tokio::signal::unix::{SignalKind, signal};

use super::rates::Rate;
use super::{Format, output, tables};
use crate::agent::status::BackendStatus;
use crate::api::{Client, ClientError};

/// What is left is looked for this often.
const LOOK: Duration = Duration::from_secs(1);

/// Where lines are not rewritten, one is shown this often.
const LINE: Duration = Duration::from_secs(10);

/// How the waiting ended.
#[derive(Debug)]
pub struct End {
    /// Nothing is left, and no flow was moved that could have ended by itself.
    pub complete: bool,
    pub words: String,
}

/// `backend` is as it was when it began, and as it was seen last in the end.
pub async fn until_drained(
    client: &Client,
    backend: &mut BackendStatus,
    format: Format,
) -> anyhow::Result<End> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut line = output::Line::new(LINE);
    let end = tokio::select! {
        end = watch(client, backend, &mut line, format) => Some(end?),
        _ = interrupt.recv() => None,
    };
    line.end();
    let name = format!("{}/{}", backend.pool, backend.name);
    Ok(end.unwrap_or_else(|| End {
        complete: false,
        words: format!("{name} drains on: {}; `xlb backend enable {name}` ends it", tables::left(backend)),
    }))
}

async fn watch(
    client: &Client,
    backend: &mut BackendStatus,
    line: &mut output::Line,
    format: Format,
) -> anyhow::Result<End> {
    let name = format!("{}/{}", backend.pool, backend.name);
    let resource = format!("/v1/backends/{}/{}", backend.pool, backend.address);
    let begin = Instant::now();
    let mut seen = (0, backend.packets);
    loop {
        if let Some(end) = end(&name, backend) {
            return Ok(end);
        }
        tokio::time::sleep(LOOK).await;
        match client.get::<BackendStatus>(&resource).await {
            Ok(now) => *backend = now,
            // It had left the file, and the agent has let go of it.
            Err(ClientError::Refused { status: StatusCode::NOT_FOUND, .. }) => {
                return Ok(End { complete: true, words: format!("{name} is gone: nothing is left of it") });
            }
            Err(error @ (ClientError::NotRunning { .. } | ClientError::Timeout { .. })) => {
                eprintln!("{error}\ntrying again every {}", output::short(LOOK));
                continue;
            }
            // It went away while it answered.
            Err(ClientError::Http(_)) => continue,
            Err(error) => return Err(error.into()),
        }
        let now = (begin.elapsed().as_nanos() as u64, backend.packets);
        if let Some(rate) = Rate::new(seen.0, now.0).filter(|_| format == Format::Table) {
            let packets = rate.packets(seen.1, now.1);
            line.show(&format!(
                "{name}: {}, {packets} packets/s{}",
                tables::left(backend),
                deadline(backend)
            ));
        }
        seen = now;
    }
}

fn deadline(backend: &BackendStatus) -> String {
    match backend.exit.as_ref().and_then(|exit| exit.seconds_left) {
        None => String::new(),
        Some(0) => ", which moves now".to_owned(),
        Some(seconds) => format!(", what is left in {} moves then", output::duration(seconds)),
    }
}

/// How it ended, if it has.
fn end(name: &str, backend: &BackendStatus) -> Option<End> {
    let Some(exit) = &backend.exit else {
        let words =
            format!("{name} is in use again: somebody has enabled it, or changed its entry in the file");
        return Some(End { complete: false, words });
    };
    if !exit.complete {
        return None;
    }
    let cut = exit.cut_off.filter(|cut| !cut.is_empty() && exit.cause != "disable");
    let took = output::duration(exit.seconds);
    Some(match cut {
        None => {
            End { complete: true, words: format!("{name} is drained: nothing is left of it after {took}") }
        }
        Some(cut) => End {
            complete: false,
            words: format!(
                "{name} is empty after {took}, by its deadline: {} were left then and have moved, which breaks connections",
                tables::flows_and_slots(cut.pins, u64::from(cut.slots_old)),
            ),
        },
    })
}
