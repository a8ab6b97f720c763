//! One measurement of one side at a time, by iperf3, wrk and the client here. It compares nothing.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::client::Schedule;
use super::scene::{Scene, Side};
use crate::calm::busy;

/// What is measured, of every side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// iperf3 from the client, so many streams.
    Upload(u32),
    /// iperf3 to the client.
    Download(u32),
    /// wrk, each connection asks again and again.
    Requests,
    /// wrk, each request on a connection of its own.
    Connections,
    /// How long answers take at a fixed rate.
    Latency,
}

/// How long and how hard.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    pub seconds: u32,
    pub rate: u32,
    pub connections: u32,
}

/// What came of it.
#[derive(Debug)]
pub enum Measured {
    /// Mbit/s, or requests a second.
    Rate(f64),
    Latency {
        times: Vec<Duration>,
        /// Of all CPUs, of everything that ran, microseconds a request.
        cpu_us: f64,
    },
}

/// Connections of the client that asks at a fixed rate.
const LATENCY_CONNECTIONS: u32 = 8;

impl Measure {
    pub fn take(self, scene: &Scene, side: Side, effort: Effort) -> Result<Measured> {
        match self {
            Self::Upload(streams) => iperf3(scene, side, effort, streams, &[]),
            Self::Download(streams) => iperf3(scene, side, effort, streams, &["--reverse"]),
            Self::Requests => wrk(scene, side, effort, &[]),
            Self::Connections => wrk(scene, side, effort, &["--header", "Connection: close"]),
            Self::Latency => latency(scene, side, effort),
        }
    }
}

/// The server takes one client at a time, and notices late that the last is gone.
const TRIES: usize = 20;

fn iperf3(scene: &Scene, side: Side, effort: Effort, streams: u32, more: &[&str]) -> Result<Measured> {
    let (seconds, streams, server) = (effort.seconds.to_string(), streams.to_string(), side.bulk());
    let words = ["iperf3", "--json", "--connect-timeout", "2000", "--time", &seconds, "--parallel", &streams];
    let words = [words.as_slice(), more, &["--client", &server]].concat();
    for _ in 0..TRIES {
        let output = scene.client.exec(&words).output().context("iperf3")?;
        let report: serde_json::Value =
            serde_json::from_slice(&output.stdout).context("what iperf3 tells")?;
        if let Some(rate) =
            report["end"]["sum_received"]["bits_per_second"].as_f64().filter(|rate| *rate > 0.0)
        {
            return Ok(Measured::Rate(rate / 1e6));
        }
        let error = report["error"].as_str().unwrap_or("it tells no rate");
        ensure!(error.contains("busy"), "iperf3 to {server}: {error}");
        std::thread::sleep(Duration::from_millis(100));
    }
    bail!("iperf3 to {server}: the server was busy, {TRIES} times")
}

fn wrk(scene: &Scene, side: Side, effort: Effort, more: &[&str]) -> Result<Measured> {
    let (connections, length) = (effort.connections.to_string(), format!("{}s", effort.seconds));
    let url = format!("http://{}/", side.vip());
    let words = ["wrk", "--threads", "2", "--connections", &connections, "--duration", &length];
    let told = scene.client.run(words.iter().chain(more).chain(&[url.as_str()]))?;
    rate_of_wrk(&told).map(Measured::Rate)
}

/// Requests a second, if none failed.
fn rate_of_wrk(told: &str) -> Result<f64> {
    let value = |name| told.lines().find_map(|line| line.trim().strip_prefix(name));
    if let Some(failed) = value("Non-2xx or 3xx responses:") {
        bail!("{} answers were no success", failed.trim());
    }
    if let Some(errors) = value("Socket errors:") {
        bail!("wrk met errors: {}", errors.trim());
    }
    let rate = value("Requests/sec:").with_context(|| format!("no rate in:\n{told}"))?;
    Ok(rate.trim().parse()?)
}

fn latency(scene: &Scene, side: Side, effort: Effort) -> Result<Measured> {
    let schedule = Schedule {
        server: format!("{}:80", side.vip()).parse()?,
        rate: effort.rate,
        connections: LATENCY_CONNECTIONS,
        length: Duration::from_secs(effort.seconds.into()),
    };
    let before = busy()?;
    let times = scene.client.inside(|| schedule.run())??;
    let busy = busy()?.saturating_sub(before);
    let cpu_us = busy.as_secs_f64() * 1e6 / times.len().max(1) as f64;
    Ok(Measured::Latency { times, cpu_us })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrk_is_believed_only_without_errors() {
        let told = "  11 requests in 1.00s\nRequests/sec:   1234.56\nTransfer/sec:      1MB\n";
        assert_eq!(rate_of_wrk(told).unwrap(), 1234.56);
        let errors = "  Socket errors: connect 0, read 3, write 0, timeout 0\n";
        assert!(rate_of_wrk(&format!("{errors}{told}")).is_err());
        assert!(rate_of_wrk(&format!("  Non-2xx or 3xx responses: 7\n{told}")).is_err());
        assert!(rate_of_wrk("").is_err());
    }
}
