//! Real clients of backends that know nothing of the balancer: addresses translated on the way there (`nat`), or both
//! ways (`fullnat`), within a family and from one to the other.

use anyhow::{Result, ensure};
use tests::between::{self, Between, CLIENTS, Config, Mode, SOURCES, url};
use tests::lab;
use tests::stage;

/// Requests to all VIPs: everybody answers, and backends see the client they should, at the port they should.
fn everybody_is_served(name: &str, mode: Mode, port: u16) -> Result<()> {
    let Some(scene) = Between::set(name, mode, 3)? else { return Ok(()) };
    let pool = if port == 80 { String::new() } else { format!("    port: {port}\n") };
    let balancer = scene.start(&Config { pool, ..scene.config() })?;
    for (vip, ipv6) in mode.vips() {
        let requests = lab::http_load(&scene.client, &url(vip, 80, ""), 200, 4)?;
        stage::none_failed(&requests)?;
        ensure!(lab::backends(&requests).len() == 3, "{vip}: {:?}", lab::backends(&requests));
        let seen = lab::http_get(&scene.client, &url(vip, 80, "ends"))?.1;
        let [client, _, server, at] = seen.split_whitespace().collect::<Vec<_>>()[..] else {
            anyhow::bail!("{vip}: {seen}")
        };
        let wanted = match mode {
            Mode::Nat => CLIENTS[usize::from(ipv6)],
            Mode::Fullnat => SOURCES[usize::from(ipv6)],
        };
        ensure!(client == wanted && at == port.to_string(), "{vip}: {seen}");
        ensure!((0..3).any(|index| server == between::address(index, ipv6)), "{vip}: {seen}");
    }
    let (there, back) = (balancer.outcome("forward_redirect")?, balancer.outcome("forward_reply_redirect")?);
    println!("{there} {back}");
    Ok(())
}

#[test]
fn clients_of_nat_keep_their_address() -> Result<()> {
    everybody_is_served("nat", Mode::Nat, 80)
}

#[test]
fn clients_of_nat_are_served_at_another_port() -> Result<()> {
    everybody_is_served("natport", Mode::Nat, 8080)
}

#[test]
fn clients_of_fullnat_are_seen_as_a_source_by_backends_of_either_family() -> Result<()> {
    everybody_is_served("fullnat", Mode::Fullnat, 80)
}

#[test]
fn clients_of_fullnat_are_served_at_another_port() -> Result<()> {
    everybody_is_served("fullnatport", Mode::Fullnat, 8080)
}
