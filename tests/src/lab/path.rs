//! What a host learns of the way to another: hops and path MTU; it knows nothing of what lies on it.

use anyhow::{Context, Result};

use super::host::Host;

/// The hops that traceroute shows, `*` for a silent one.
pub fn traceroute(client: &Host, to: &str, words: &[&str]) -> Result<Vec<String>> {
    let family = if to.contains(':') { "-6" } else { "-4" };
    let fixed = ["traceroute.db", family, "-n", "-q", "1", "-w", "2", "-m", "8"];
    let text = client.run(fixed.iter().chain(words).chain([&to]))?;
    Ok(text.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1)).map(str::to_owned).collect())
}

/// What a host has learnt of the path to an address.
pub fn learnt_mtu(host: &Host, to: &str) -> Result<Option<u32>> {
    let route = host.ip(&format!("route get {to}"))?;
    let mtu = route.split_whitespace().skip_while(|word| *word != "mtu").nth(1);
    mtu.map(|mtu| mtu.parse().with_context(|| route.clone())).transpose()
}
