//! The scene that most tests of xlb play in: a client, a balancer and some nginx backends on one switch,
//! and the configuration that joins them. It knows no test.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::balancer::{Balancer, decap};
use crate::lab::{self, Host, Lab, Nginx, NginxServer, Process, Request};

pub const VIP4: &str = "203.0.113.10";
pub const VIP6: &str = "2001:db8:113::10";
pub const VIPS: [&str; 2] = [VIP4, VIP6];
pub const URL4: &str = "http://203.0.113.10/";
pub const URL6: &str = "http://[2001:db8:113::10]/";
pub const URLS: [&str; 2] = [URL4, URL6];

/// Where tunnel packets come from.
pub const TUNNEL_SOURCES: [&str; 2] = ["10.255.0.0/24", "fd00:255::/64"];

/// The balancer's addresses on `lan`.
pub const BALANCER4: &str = "10.111.0.3";
pub const BALANCER6: &str = "fd00:111::3";

/// How long anything may take that has no promised time: long, for a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A client with routes to the VIPs, a balancer without xlb, and backends.
pub struct Stage {
    pub client: Host,
    pub balancer: Host,
    pub backends: Vec<Backend>,
    /// Last, so that a failed test's lab is removed after everything else of it.
    pub lab: Lab,
}

/// A host that answers for the VIPs.
pub struct Backend {
    pub host: Host,
    /// Takes tunnel headers off.
    pub decap: Process,
    /// The last one that was started.
    pub nginx: NginxServer,
}

impl Stage {
    /// A scene with so many backends, `web1` and on; nothing where skipping was asked for.
    pub fn set(name: &str, backends: usize) -> Result<Option<Self>> {
        if !lab::available()? {
            return Ok(None);
        }
        Self::set_in(Lab::new(name)?, backends).map(Some)
    }

    pub fn set_in(lab: Lab, backends: usize) -> Result<Self> {
        let client = lab.host("client", &["10.111.0.2/24", "fd00:111::2/64"])?;
        // Leaves a tunnel header room on links of `lab::MTU`.
        client.set_mtu("eth0", 1500)?;
        client.route(&format!("{VIP4}/32 via {BALANCER4}"))?;
        client.route(&format!("{VIP6}/128 via {BALANCER6}"))?;
        let balancer = lab.host("balancer", &[&format!("{BALANCER4}/24"), &format!("{BALANCER6}/64")])?;
        let mut stage = Self { client, balancer, backends: Vec::new(), lab };
        for _ in 0..backends {
            stage.add_backend()?;
        }
        Ok(stage)
    }

    /// One more backend, which no configuration knows yet.
    pub fn add_backend(&mut self) -> Result<&Backend> {
        let index = self.backends.len();
        let host = self.lab.host(
            &name(index),
            &[&format!("{}/24", address(index, false)), &format!("{}/64", address(index, true))],
        )?;
        self.backends.push(Backend::on(&host, &TUNNEL_SOURCES)?);
        Ok(&self.backends[index])
    }

    /// The configuration of this scene: one service on both VIPs, port 80, tunnels to IPv4 addresses.
    pub fn config(&self) -> Config {
        Config {
            backends: (0..self.backends.len()).map(|index| backend(index, false)).collect(),
            ..Config::default()
        }
    }

    /// The same with IPv6 addresses.
    pub fn config6(&self) -> Config {
        Config {
            backends: (0..self.backends.len()).map(|index| backend(index, true)).collect(),
            ..Config::default()
        }
    }

    /// Starts xlb and waits until as many backends are up as the configuration lists.
    pub fn start(&self, config: &Config) -> Result<Balancer> {
        let balancer = Balancer::start(&self.balancer, &self.lab.dir().join("xlb"), &config.to_string())?;
        balancer.wait_for_backends(config.backends.len(), PATIENCE)?;
        Ok(balancer)
    }

    /// Sends requests from four clients at a time, of which none may fail, and each of the backends must
    /// get its share of them.
    pub fn balances(&self, url: &str, requests: u32, backends: usize) -> Result<()> {
        let requests = lab::http_load(&self.client, url, requests, 4)?;
        none_failed(&requests)?;
        let shares = lab::backends(&requests);
        ensure!(shares.len() == backends, "{url}: {shares:?}");
        // Six standard deviations of a binomial share: one run in 10^8 is beyond them.
        let (count, share) = (requests.len() as f64, 1.0 / backends as f64);
        let slack = 6.0 * (count * share * (1.0 - share)).sqrt();
        for (name, got) in &shares {
            ensure!((*got as f64 - count * share).abs() <= slack, "{url}: {name} is out of line: {shares:?}");
        }
        Ok(())
    }
}

impl Backend {
    /// Makes a host a backend: VIPs on `lo`, decapsulation, nginx that answers with the host's name.
    pub fn on(host: &Host, tunnel_sources: &[&str]) -> Result<Self> {
        lab::backend_dsr(host, &VIPS)?;
        let decap = decap(host, &VIPS, tunnel_sources)?;
        let nginx = lab::nginx(host, host.name(), Nginx::default())?;
        Ok(Self { host: host.clone(), decap, nginx })
    }

    /// Starts nginx again after it was killed.
    pub fn heal(&mut self) -> Result<()> {
        self.nginx = lab::nginx(&self.host, self.host.name(), Nginx::default())?;
        Ok(())
    }

    /// Ends decapsulation; what it had counted.
    pub fn end_decap(&self) -> Result<DecapCounts> {
        self.decap.signal(lab::Signal::TERM)?;
        self.decap.wait_exit(PATIENCE)?;
        Ok(DecapCounts(self.decap.log()))
    }
}

/// What `xlb decap` prints at its end.
#[derive(Debug)]
pub struct DecapCounts(String);

impl DecapCounts {
    /// Packets of an outcome; an error where none has the name.
    pub fn get(&self, name: &str) -> Result<u64> {
        let line = self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(line.ok_or_else(|| anyhow::anyhow!("no {name} in:\n{}", self.0))?.parse()?)
    }
}

/// `web1` and on.
pub fn name(index: usize) -> String {
    format!("web{}", index + 1)
}

/// A backend's address on `lan`.
pub fn address(index: usize, ipv6: bool) -> String {
    let prefix = if ipv6 { "fd00:111::" } else { "10.111.0." };
    format!("{prefix}{}", 11 + index)
}

/// A backend as the configuration names it.
pub fn backend(index: usize, ipv6: bool) -> String {
    weighted(index, ipv6, 100)
}

pub fn weighted(index: usize, ipv6: bool, weight: u8) -> String {
    format!("{{address: \"{}\", name: {}, weight: {weight}}}", address(index, ipv6), name(index))
}

/// A configuration as text, in parts that tests change.
#[derive(Clone, Debug)]
pub struct Config {
    /// Lines at the top, `mode: generic` say.
    pub top: String,
    pub interfaces: String,
    pub outer_source: String,
    pub health: String,
    pub forward: String,
    /// Further keys of the pool, each on a line with four spaces before it.
    pub pool: String,
    pub backends: Vec<String>,
    pub services: Vec<String>,
}

/// A backend that hangs for a moment on a loaded machine stays up.
pub const PATIENT_CHECKS: &str =
    "{type: http, path: /healthz, interval: 300ms, timeout: 300ms, rise: 1, fall: 20}";

impl Default for Config {
    fn default() -> Self {
        Self {
            top: String::new(),
            interfaces: "[eth0]".to_owned(),
            outer_source: "[10.255.0.0/24, \"fd00:255::/64\"]".to_owned(),
            health: PATIENT_CHECKS.to_owned(),
            forward: "ipip".to_owned(),
            pool: String::new(),
            backends: Vec::new(),
            services: vec![service("www", &VIPS, "80", "tcp")],
        }
    }
}

/// A service of the pool, as the configuration names it.
pub fn service(name: &str, vips: &[&str], ports: &str, protocol: &str) -> String {
    let vips: Vec<String> = vips.iter().map(|vip| format!("\"{vip}\"")).collect();
    format!("{{name: {name}, vip: [{}], ports: {ports}, protocol: {protocol}, pool: web}}", vips.join(", "))
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "interfaces: {}\nseed: 5f1d0c3a9be24771\n{}", self.interfaces, self.top)?;
        if !self.outer_source.is_empty() {
            writeln!(f, "outer_source: {}", self.outer_source)?;
        }
        writeln!(f, "pools:\n  web:\n    forward: {}\n    health: {}", self.forward, self.health)?;
        writeln!(f, "{}    backends:", self.pool)?;
        self.backends.iter().try_for_each(|backend| writeln!(f, "      - {backend}"))?;
        writeln!(f, "services:")?;
        self.services.iter().try_for_each(|service| writeln!(f, "  - {service}"))
    }
}

/// An error that shows the first failure, if there is one.
pub fn none_failed(requests: &[Request]) -> Result<()> {
    let failed = lab::failures(requests);
    ensure!(
        failed.is_empty(),
        "{} of {} requests failed, the first with {:?}",
        failed.len(),
        requests.len(),
        failed[0].result
    );
    Ok(())
}

/// How late a report of curl may be read on a loaded machine.
const LATE: Duration = Duration::from_millis(500);

/// For a change that gives slots to other backends: what was under way at that moment may break, at most
/// one request of each client, everything before and after must go well.
///
/// Slots move at once, their connections are not pinned: a request that lasts a millisecond meets that now and
/// then.
pub fn none_failed_but_in_flight(requests: &[Request], clients: usize, change: [Instant; 2]) -> Result<()> {
    let failed = lab::failures(requests);
    let [begin, end] = change;
    for request in &failed {
        let in_flight = request.start <= end + LATE && request.start + request.duration + LATE >= begin;
        ensure!(in_flight, "a request failed that was not under way at the change: {request:?}");
    }
    ensure!(failed.len() <= clients, "{} requests failed: {failed:?}", failed.len());
    println!("{} of {} requests were under way and failed", failed.len(), requests.len());
    Ok(())
}
