//! What health checks take of a core: an agent with many backends, all of them addresses of one nginx, and nothing to
//! balance.

use std::time::Duration;

use ::tests::balancer::Balancer;
use ::tests::lab::{self, Host, Lab, Nginx};
use anyhow::{Context, Result, ensure};

const BACKENDS: usize = 100;
/// Short, so that the rest of what the agent does is little beside it.
const INTERVAL: &str = "100ms";
const LENGTH: Duration = Duration::from_secs(10);

/// A tick of /proc is 10 ms wherever Linux runs (USER_HZ).
const TICK_US: f64 = 10_000.0;

/// Microseconds of the agent's time, user and system, for each check of type http. It is worth something of optimised code
/// only.
pub fn measure() -> Result<f64> {
    crate::run(crate::agent_build())?;
    lab::clean_up_on_signals()?;
    let lab = Lab::new("checks")?;
    let web = lab.host("web", &["10.111.0.11/16"])?;
    let mut backends = Vec::new();
    for number in 1..=BACKENDS {
        let address = format!("10.111.1.{number}");
        web.add_address(&format!("{address}/16"), "eth0")?;
        backends.push(address);
    }
    lab::nginx(&web, "web", Nginx::default())?;
    let host = lab.host("balancer", &["10.111.0.3/16"])?;
    let configuration = format!(
        "interfaces: [eth0]
seed: 5f1d0c3a9be24771
pools:
  web:
    forward: l2
    health: {{type: http, path: /healthz, interval: {INTERVAL}, timeout: {INTERVAL}, rise: 1, fall: 20}}
    backends: [{}]
services:
  - {{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}}
",
        backends.join(", ")
    );
    let balancer = Balancer::start(&host, &lab.dir().join("xlb"), &configuration)?;
    balancer.wait_for_backends(BACKENDS, Duration::from_secs(20))?;
    let (checks, time) = (connections(&web)?, time_us(balancer.process.pid())?);
    crate::progress(&format!("checking {BACKENDS} backends for {LENGTH:?}"));
    std::thread::sleep(LENGTH);
    crate::progress("");
    let (checks, time) = (connections(&web)? - checks, time_us(balancer.process.pid())? - time);
    ensure!(checks > 0, "nobody checked");
    // More digits say nothing.
    Ok((10.0 * time / checks as f64).round() / 10.0)
}

/// Connections that a host has taken: one for each check.
pub fn connections(host: &Host) -> Result<u64> {
    let told = host.run(["nstat", "-asz", "TcpPassiveOpens"])?;
    let line = told.lines().find_map(|line| line.strip_prefix("TcpPassiveOpens"));
    let count = line.and_then(|line| line.split_whitespace().next()).with_context(|| told.clone())?;
    Ok(count.parse()?)
}

fn time_us(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let stat = std::fs::read_to_string(&path).context(path)?;
    time_of(&stat).context("/proc tells no time of the agent")
}

/// User and system time. The program's name may hold anything but ends at the last parenthesis.
fn time_of(stat: &str) -> Option<f64> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    // The 14th and 15th field of all, of which two are gone.
    let ticks = |index: usize| fields.get(index)?.parse::<f64>().ok();
    Some((ticks(11)? + ticks(12)?) * TICK_US)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_that_of_user_and_system() {
        let stat = "7 (a ) b) S 1 7 7 0 -1 4194560 100 0 0 0 30 12 5 6 20 0 1 0 55 1000 10";
        assert_eq!(time_of(stat), Some(420_000.0));
        assert_eq!(time_of("7 (xlb) S 1"), None);
    }
}
