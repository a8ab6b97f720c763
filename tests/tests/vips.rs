//! Kinds of VIPs with real clients: ranges, any port, prefixes, what no service takes, and fragments.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tests::balancer::decap;
use tests::lab::{self, Nginx};
use tests::stage::{self, BALANCER4, BALANCER6, Config, Stage, TUNNEL_SOURCES, URL4, VIP4};

const PREFIX4: &str = "198.51.100.0/24";
const PREFIX6: &str = "2001:db8:51::/64";
const FAR4: &str = "198.51.100.200";
const FAR6: &str = "2001:db8:51::200";

/// Two backends that answer for the prefixes too, on ports 80, 8000, 8050 and 9999: with their name, and the port
/// where it is not 80.
fn stage(name: &str) -> Result<Option<Stage>> {
    let Some(mut stage) = Stage::set(name, 2)? else { return Ok(None) };
    stage.client.route(&format!("{PREFIX4} via {BALANCER4}"))?;
    stage.client.route(&format!("{PREFIX6} via {BALANCER6}"))?;
    for backend in &mut stage.backends {
        let host = backend.host.clone();
        backend.end_decap()?;
        host.add_address(&format!("{FAR4}/32"), "lo")?;
        host.add_address(&format!("{FAR6}/128"), "lo")?;
        backend.decap = decap(&host, &[&stage::VIPS[..], &[PREFIX4, PREFIX6]].concat(), &TUNNEL_SOURCES)?;
        let ports = vec![8000, 8050, 9999];
        lab::nginx(&host, &format!("{}-more", host.name()), Nginx { ports, ..Nginx::default() })?;
    }
    Ok(Some(stage))
}

fn checked(stage: &Stage, services: &[&str]) -> Config {
    Config {
        health: stage::PATIENT_CHECKS.replace("path:", "port: 80, path:"),
        services: services.iter().map(|service| (*service).to_owned()).collect(),
        ..stage.config()
    }
}

fn answers(stage: &Stage, url: &str) -> Result<()> {
    let (status, text) = lab::http_get(&stage.client, url)?;
    ensure!(status == 200, "{url}: {status} {text}");
    Ok(())
}

/// Nobody answers within a short time, and nobody refuses.
fn is_silent(stage: &Stage, url: &str) -> Result<()> {
    let code = stage.client.exec(["curl", "-s", "-m", "1", url]).status()?.code();
    ensure!(code == Some(28), "{url}: curl ended with {code:?}");
    Ok(())
}

#[test]
fn ranges_any_port_and_prefixes_answer_and_come_and_go_by_reload_under_traffic() -> Result<()> {
    let Some(stage) = stage("vipkinds")? else { return Ok(()) };
    let plain = stage::service("www", &[VIP4], "80", "tcp");
    let balancer = stage.start(&checked(&stage, &[&plain]))?;
    let load = lab::HttpLoad::new(URL4, 100_000).parallel(2).rate(50).start(&stage.client)?;
    is_silent(&stage, "http://203.0.113.10:8050/")?;

    let range = stage::service("range", &[VIP4], "8000-8100", "tcp");
    let exact = stage::service("exact", &[VIP4], "8000", "tcp");
    let prefix = stage::service("prefix", &[PREFIX4, PREFIX6], "[80, 8000-8100]", "tcp");
    let any = stage::service("any", &[FAR4], "any", "tcp");
    balancer.reload(&checked(&stage, &[&plain, &range, &exact, &prefix, &any]).to_string())?;
    for url in [
        "http://203.0.113.10:8000/",
        "http://203.0.113.10:8050/",
        "http://198.51.100.200/",
        "http://198.51.100.200:9999/",
        "http://[2001:db8:51::200]/",
        "http://[2001:db8:51::200]:8050/",
    ] {
        answers(&stage, url)?;
    }
    is_silent(&stage, "http://[2001:db8:51::200]:9999/")?;
    let status = balancer.status()?;
    let packets = |vip: &str, port: &str| {
        let is_it = |service: &&lb_userspace::agent::status::ServiceStatus| {
            (service.vip.to_string(), service.port.to_string()) == (vip.to_owned(), port.to_owned())
        };
        status.services.iter().find(is_it).map_or(0, |service| service.packets)
    };
    // The exact port before the range, `any` of the address before the prefix.
    for (vip, port, counted) in [
        (VIP4, "8000", true),
        (VIP4, "8000-8100", true),
        (FAR4, "any", true),
        (PREFIX4, "80", false),
        (PREFIX6, "80", true),
        (PREFIX6, "8000-8100", true),
    ] {
        ensure!((packets(vip, port) > 0) == counted, "{vip}:{port} has {}", packets(vip, port));
    }

    balancer.reload(&checked(&stage, &[&plain]).to_string())?;
    is_silent(&stage, "http://203.0.113.10:8050/")?;
    stage::none_failed(&load.stop()?)
}

#[test]
fn a_port_that_no_service_takes_is_refused_at_once_where_the_vip_says_so() -> Result<()> {
    let Some(stage) = stage("unmapped")? else { return Ok(()) };
    let rejecting = |service: String| service.replace("pool: web", "pool: web, unmapped: reject");
    let www = rejecting(stage::service("www", &[VIP4, stage::VIP6], "80", "tcp"));
    stage.start(&checked(&stage, &[&www, &stage::service("far", &[PREFIX4], "80", "tcp")]))?;
    answers(&stage, URL4)?;
    for url in ["http://203.0.113.10:81/", "http://[2001:db8:113::10]:81/"] {
        let begin = Instant::now();
        let code = stage.client.exec(["curl", "-s", "-m", "20", url]).status()?.code();
        ensure!(code == Some(7), "{url}: curl ended with {code:?}");
        ensure!(begin.elapsed() < Duration::from_secs(15), "{url}: refused after {:?}", begin.elapsed());
    }
    is_silent(&stage, "http://198.51.100.200:81/")
}
