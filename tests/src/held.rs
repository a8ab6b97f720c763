//! A stage whose backends have echo servers behind a service, and connections that are held open there: who has them, and
//! whether they live. It knows no change.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lb_userspace::agent::status::BackendStatus;

use crate::balancer::Balancer;
use crate::lab::{Connections, EchoServer, Host, wait_for};
use crate::stage::{self, Config, PATIENCE, Stage, VIP4};

pub const PORT: u16 = 7000;

/// One who is asked in vain is down after two seconds; a moment's pause of a loaded machine is not enough.
pub const CHECKS: &str =
    "{type: http, path: /healthz, port: 80, interval: 500ms, timeout: 500ms, rise: 1, fall: 4}";

/// Flows of moved slots are protected for a short time.
pub const SHORT_IDLE: &str = "    idle_timeout: {tcp: 2s, udp: 2s}\n";

const EVERY: Duration = Duration::from_millis(250);

pub struct Held {
    servers: Vec<EchoServer>,
    pub config: Config,
    pub balancer: Balancer,
    /// Last, so that a failed test's lab is removed after everything else of it.
    pub stage: Stage,
}

impl Held {
    /// A stage with so many backends, and xlb with what `change` makes of its configuration. Nothing where skipping was
    /// asked for.
    pub fn set(name: &str, backends: usize, change: impl FnOnce(Config) -> Config) -> Result<Option<Self>> {
        let Some(stage) = Stage::set(name, backends)? else { return Ok(None) };
        Self::on(stage, change).map(Some)
    }

    /// The same on a stage that is there.
    pub fn on(stage: Stage, change: impl FnOnce(Config) -> Config) -> Result<Self> {
        let servers = stage.backends.iter().map(|backend| EchoServer::start(&backend.host, PORT));
        let servers = servers.collect::<Result<Vec<_>>>()?;
        let services = vec![service("")];
        let health = CHECKS.to_owned();
        let config = change(Config { services, health, ..stage.config() });
        let balancer = stage.start(&config)?;
        Ok(Self { servers, config, balancer, stage })
    }

    /// One more host with its server, which the configuration does not name yet.
    pub fn add_host(&mut self) -> Result<Host> {
        let host = self.stage.add_backend()?.host.clone();
        self.servers.push(EchoServer::start(&host, PORT)?);
        Ok(host)
    }

    /// Makes the next host a backend.
    pub fn take_in(&mut self) -> Result<()> {
        self.config.backends.push(stage::backend(self.config.backends.len(), false));
        self.reload()
    }

    /// Gives the agent the configuration as it is now, and waits until all of its backends are up.
    pub fn reload(&self) -> Result<()> {
        self.balancer.reload(&self.config.to_string())?;
        let all_up = |backends: Vec<BackendStatus>| {
            let up = |backend: &&BackendStatus| backend.health == "up" && backend.exit.is_none();
            backends.iter().filter(up).count() >= self.config.backends.len()
        };
        wait_for("all backends are up", PATIENCE, || self.balancer.backends().is_ok_and(all_up))
            .with_context(|| self.balancer.process.log())
    }

    /// So many connections more, which the client talks on every now and then.
    pub fn open(&self, count: usize) -> Result<Connections> {
        let server = format!("{VIP4}:{PORT}").parse()?;
        Connections::open(&self.stage.client, &["10.111.0.2".parse()?], server, count, EVERY)
    }

    pub fn backend(&self, name: &str) -> Result<BackendStatus> {
        let found = self.balancer.backends()?.into_iter().find(|backend| backend.name == name);
        found.with_context(|| format!("no backend {name}"))
    }

    /// Waits until a backend's checks have failed.
    pub fn wait_until_down(&self, name: &str) -> Result<()> {
        wait_for(&format!("{name} is down"), PATIENCE, || {
            self.backend(name).is_ok_and(|backend| backend.health == "down")
        })
    }

    /// Waits until all flows that a backend still has are pinned to it, so many.
    pub fn wait_until_pinned(&self, name: &str, flows: usize) -> Result<()> {
        wait_for(&format!("{flows} flows are pinned to {name}"), PATIENCE, || {
            self.backend(name).is_ok_and(|backend| backend.pins == flows as u64)
        })
        .with_context(|| format!("{:?}", self.backend(name)))
    }
}

/// The service of a stage's pool, with further keys.
pub fn service(keys: &str) -> String {
    let service = stage::service("echo", &[VIP4], &PORT.to_string(), "tcp");
    service.replace("pool: web", &format!("pool: web{keys}"))
}

/// How many connections each server has, or had.
pub fn shares(connections: &Connections) -> BTreeMap<String, usize> {
    let mut shares = BTreeMap::new();
    for connection in connections.all() {
        *shares.entry(connection.server).or_default() += 1;
    }
    shares
}

/// How many connections a server has, or had.
pub fn of(connections: &Connections, server: &str) -> usize {
    shares(connections).remove(server).unwrap_or(0)
}

/// Waits until every connection has had an answer once more; none may be lost.
pub fn all_live(connections: &Connections) -> Result<()> {
    connections.wait_until_answered(Instant::now(), PATIENCE)?;
    let lost = connections.lost();
    ensure!(lost.is_empty(), "{} are lost, the first: {:?}", lost.len(), lost[0]);
    Ok(())
}

/// Waits until all connections of some servers are reset, and no others are. Whoever gets packets of a connection that he
/// does not know says so to the client.
pub fn wait_until_reset(connections: &Connections, servers: &[&str]) -> Result<()> {
    let theirs: usize = servers.iter().map(|server| of(connections, server)).sum();
    wait_for(&format!("{theirs} connections break"), PATIENCE, || connections.lost().len() >= theirs)
        .with_context(|| format!("{} are lost", connections.lost().len()))?;
    let lost = connections.lost();
    let reset = |why: &Option<String>| why.as_ref().is_some_and(|why| why.contains("reset by peer"));
    let wrong = lost.iter().find(|one| !servers.contains(&one.server.as_str()) || !reset(&one.lost));
    ensure!(wrong.is_none() && theirs > 0, "{theirs} of {servers:?} should be reset: {wrong:?}");
    Ok(())
}
