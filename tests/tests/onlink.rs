//! VIPs in the clients' own prefix: who answers for them, and with which MAC address.

use std::time::Duration;

use anyhow::{Result, ensure};
use tests::balancer::decap;
use tests::lab::{self, Host};
use tests::stage::{self, Config, PATIENCE, Stage, TUNNEL_SOURCES};

const VIPS: [&str; 2] = ["10.111.0.100", "fd00:111::100"];
const URLS: [&str; 2] = ["http://10.111.0.100/", "http://[fd00:111::100]/"];

const SHORT: Duration = Duration::from_millis(400);

/// Backends for VIPs that are on-link, and the configuration without `vip_arp`.
fn on_link(name: &str) -> Result<Option<(Stage, Config)>> {
    let Some(stage) = Stage::set(name, 2)? else { return Ok(None) };
    for backend in &stage.backends {
        backend.end_decap()?;
        lab::backend_dsr(&backend.host, &VIPS)?;
        decap(&backend.host, &VIPS, &TUNNEL_SOURCES)?;
    }
    let config = Config { services: vec![stage::service("www", &VIPS, "80", "tcp")], ..stage.config() };
    Ok(Some((stage, config)))
}

/// What the client believes to know of an address's owner.
fn neighbour(client: &Host, address: &str) -> Result<String> {
    client.ip(&format!("neigh show {address} dev eth0"))
}

fn forget_neighbours(client: &Host) -> Result<()> {
    client.ip("neigh flush dev eth0 nud all").map(drop)
}

#[test]
fn only_with_vip_arp_does_the_balancer_answer_for_a_vip() -> Result<()> {
    let Some((stage, mut config)) = on_link("viparp")? else { return Ok(()) };
    let balancer = stage.start(&config)?;
    for (url, vip) in URLS.iter().zip(VIPS) {
        ensure!(lab::http_get_within(&stage.client, url, SHORT, SHORT).is_err(), "{url} is answered");
        let known = neighbour(&stage.client, vip)?;
        ensure!(!known.contains("lladdr"), "{known}");
    }
    ensure!(balancer.outcome("answer_arp")? == 0 && balancer.outcome("answer_neighbour")? == 0);

    // It is a feature of the program, which is swapped for it.
    config.top = "vip_arp: true\n".to_owned();
    balancer.reload(&config.to_string())?;
    balancer.wait_for_backends(2, PATIENCE)?;
    forget_neighbours(&stage.client)?;
    for (url, vip) in URLS.iter().zip(VIPS) {
        let requests = lab::http_load(&stage.client, url, 200, 4)?;
        stage::none_failed(&requests)?;
        ensure!(lab::backends(&requests).len() == 2, "{url}");
        let known = neighbour(&stage.client, vip)?;
        let mac = stage.balancer.mac().map(|byte| format!("{byte:02x}")).join(":");
        ensure!(known.contains(&format!("lladdr {mac}")), "{known}");
    }
    ensure!(balancer.outcome("answer_arp")? >= 1 && balancer.outcome("answer_neighbour")? >= 1);

    // Questions for the balancer's own addresses still go to its stack.
    forget_neighbours(&stage.client)?;
    for own in [stage::BALANCER4, stage::BALANCER6] {
        let address = if own.contains(':') { format!("[{own}]") } else { own.to_owned() };
        // Nobody listens there: refused at once, which only a host that was found can do.
        let told = lab::http_get_within(&stage.client, &format!("http://{address}/"), PATIENCE, PATIENCE);
        let told = format!("{:#}", told.expect_err("the balancer serves pages"));
        ensure!(told.contains("onnect") && !told.contains("imed out"), "{told}");
    }

    config.top.clear();
    balancer.reload(&config.to_string())?;
    forget_neighbours(&stage.client)?;
    for url in URLS {
        ensure!(lab::http_get_within(&stage.client, url, SHORT, SHORT).is_err(), "{url} is still answered");
    }
    Ok(())
}

#[test]
fn on_link_vips_are_served_in_generic_mode_too() -> Result<()> {
    let Some((stage, mut config)) = on_link("viparpgen")? else { return Ok(()) };
    config.top = "vip_arp: true\nmode: generic\n".to_owned();
    let balancer = stage.start(&config)?;
    for url in URLS {
        stage.balances(url, 200, 2)?;
    }
    ensure!(balancer.status()?.interfaces[0].mode == "generic");
    ensure!(balancer.outcome("answer_arp")? >= 1 && balancer.outcome("answer_neighbour")? >= 1);
    Ok(())
}
