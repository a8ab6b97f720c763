//! QUIC servers with routable connection IDs and clients that move (`tests/quic`), in aioquic.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::Signal;
use super::host::Host;
use super::process::Process;

/// A connection takes some milliseconds; Python on a loaded machine more.
const HANDSHAKES: Duration = Duration::from_secs(60);
const START: Duration = Duration::from_secs(30);

/// What a connection has seen.
#[derive(Clone, Debug, Deserialize)]
pub struct QuicConnection {
    /// The client's ends, one after the other: address and port.
    pub ends: Vec<(String, u16)>,
    /// Who answered, each change once.
    pub servers: Vec<String>,
    pub sent: u64,
    pub answered: u64,
    /// How it was lost.
    pub error: Option<String>,
}

/// The environment that `scripts/setup` makes, and a program of `tests/quic`.
fn program(name: &str) -> Result<[PathBuf; 2]> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = root.join("../target/aioquic/bin/python");
    ensure!(python.exists(), "aioquic is not installed; run ./scripts/setup, which installs it");
    Ok([python, root.join("quic").join(name)])
}

fn start(host: &Host, name: &str, arguments: &[&str]) -> Result<Process> {
    let [python, script] = program(name)?;
    let words = [python.as_os_str(), script.as_os_str()];
    host.spawn(words.into_iter().chain(arguments.iter().map(AsRef::as_ref)))
}

/// Starts a QUIC server on an address of a host, the VIP say, that answers with the host's name; its connection IDs
/// have the server ID, in hex.
pub fn quic_server(host: &Host, address: &str, config_id: u8, server_id: &str) -> Result<Process> {
    let config_id = config_id.to_string();
    let arguments =
        ["--address", address, "--name", host.name(), "--config-id", &config_id, "--server-id", server_id];
    let process = start(host, "server.py", &arguments)?;
    process.wait_for_log("listening", START)?;
    Ok(process)
}

/// Connections that talk until they are ended.
pub struct QuicClients {
    process: Process,
    moves: usize,
}

impl QuicClients {
    /// Connects so many times, from the host's addresses by turns, and waits until all have had an answer.
    pub fn start(host: &Host, from: &[&str], server: &str, connections: usize) -> Result<Self> {
        let count = connections.to_string();
        let mut arguments = vec!["--server", server, "--connections", &count];
        from.iter().for_each(|address| arguments.extend(["--from", address]));
        let process = start(host, "client.py", &arguments)?;
        process.wait_for_log("connected", HANDSHAKES)?;
        Ok(Self { process, moves: 0 })
    }

    /// All connections go on from another port, and another address if there is one.
    pub fn move_on(&mut self) -> Result<()> {
        self.moves += 1;
        self.process.signal(Signal::USR1)?;
        let moved = || self.process.log().matches("moved").count() >= self.moves;
        self.process.wait_until("all connections moved", START, moved)
    }

    /// What became of them, once each has had the answer that it waited for or has waited for long.
    pub fn end(self) -> Result<Vec<QuicConnection>> {
        self.process.signal(Signal::TERM)?;
        self.process.wait_exit(START)?;
        let log = self.process.log();
        let reports = log.lines().filter(|line| line.starts_with('{'));
        reports.map(|line| serde_json::from_str(line).with_context(|| log.clone())).collect()
    }
}
