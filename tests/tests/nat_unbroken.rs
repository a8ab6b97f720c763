//! Thousands of connections whose addresses are translated live through everything that is done to backends, configuration
//! and agent, beside tens of thousands that come and go; only those of a backend that dies may end.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tests::between::{self, Between, Config, Mode};
use tests::crowd::{Crowd, Dies, SOURCE, TUNNELS, Way};
use tests::lab::{LiveConnections, LiveLoad, NamingServer, Rush};
use tests::stage::{self, PATIENCE};

const CONNECTIONS: usize = 5000;

/// One crowd at a time: another one beside it would show in the stalls.
static ALONE: Mutex<()> = Mutex::new(());

fn changes(name: &str, forward: &str, top: &str) -> Result<()> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let way = Way { forward, top, ..TUNNELS };
    let Some(mut crowd) = Crowd::gather(name, 3, CONNECTIONS, way)? else { return Ok(()) };
    crowd.add_backend()?;
    crowd.config.backends.push(stage::backend(3, false));
    crowd.reload()?;
    crowd.wait_until_served_by(&[0, 1, 2, 3])?;
    crowd.tell("web4 added");

    let removed = crowd.config.backends.remove(1);
    crowd.reload()?;
    crowd.wait_until_served_by(&[0, 2, 3])?;
    crowd.tell("web2 removed");
    crowd.lives_through_its_agent()?;
    crowd.wait_until_served_by(&[0, 2, 3])?;

    // Other maps, which connections are carried over to.
    crowd.config.top = top.replace("fullnat", "limits: {connections: 524288}\nfullnat");
    if forward == "nat" {
        crowd.config.top = "limits: {connections: 524288}\n".to_owned();
    }
    crowd.reload()?;
    crowd.wait_until_all_answer()?;
    crowd.tell("more room");
    let places = crowd.places();
    ensure!(places["web2"] > CONNECTIONS / 6, "web2 keeps what it had: {places:?}");

    crowd.config.backends.push(removed);
    crowd.reload()?;
    crowd.wait_until_served_by(&[0, 1, 2, 3])?;
    crowd.tell("web2 is back");
    crowd.dies(3, Dies::Process)?;
    crowd.wait_until_all_are_served(PATIENCE)?;
    crowd.heals(3)?;
    crowd.tell("web4 killed and healed");
    crowd.dies(0, Dies::Link)?;
    crowd.wait_until_all_are_served(PATIENCE)?;
    crowd.heals(0)?;
    crowd.tell("web1 cut off and healed");
    for none in ["drop_connections_full", "drop_inconsistent"] {
        ensure!(crowd.balancer.outcome(none)? == 0, "{none}");
    }
    crowd.verdict()
}

#[test]
fn connections_of_nat_live_through_every_change_and_only_those_of_the_dead_end() -> Result<()> {
    changes("natcrowd", "nat", "")
}

#[test]
fn connections_of_fullnat_live_through_every_change_and_only_those_of_the_dead_end() -> Result<()> {
    changes("fullcrowd", "fullnat", &format!("fullnat: {{sources: [{SOURCE}]}}\n"))
}

/// How many come and go, over all VIPs.
const SET_UPS: usize = 50_000;
/// So many at a time.
const PARALLEL: usize = 100;

const PORT: u16 = 7000;

/// Of the client, in both families: each has some 28,000 ports.
const CALLERS: std::ops::Range<u8> = 200..204;

fn a_rush(name: &str, mode: Mode) -> Result<()> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(scene) = Between::set(name, mode, 3)? else { return Ok(()) };
    let servers = scene.backends.iter().map(|backend| NamingServer::start(&backend.host, PORT));
    let _servers = servers.collect::<Result<Vec<_>>>()?;
    let callers = |ipv6: bool| {
        CALLERS.map(move |last| if ipv6 { format!("fd00:120::{last}") } else { format!("10.120.0.{last}") })
    };
    let mut sources: [Vec<IpAddr>; 2] = Default::default();
    for ipv6 in [false, true] {
        for caller in callers(ipv6) {
            scene.client.add_address(&format!("{caller}/{}", if ipv6 { 64 } else { 24 }), "eth0")?;
            sources[usize::from(ipv6)].push(caller.parse()?);
        }
    }
    // Each of them keeps its port for two minutes after its end: more than one source has.
    let all = between::listed(&[between::SOURCES, between::MORE_SOURCES].concat());
    let balancer = scene.start(&Config { ports: PORT.to_string(), sources: all, ..scene.config() })?;

    let vips = mode.vips();
    let mut held = Vec::new();
    for (vip, _) in &vips {
        let load = LiveLoad {
            connections: CONNECTIONS / vips.len(),
            sources: sources[usize::from(vip.contains(':'))].clone(),
            server: SocketAddr::new(vip.parse()?, PORT),
            gap: Duration::from_secs(1)..Duration::from_secs(5),
        };
        held.push(LiveConnections::open(&scene.client, load)?);
    }
    for (vip, _) in &vips {
        let sources = &sources[usize::from(vip.contains(':'))];
        let server = SocketAddr::new(vip.parse()?, PORT);
        let rush = Rush::run(&scene.client, sources, server, SET_UPS / vips.len(), PARALLEL)?;
        println!("{mode} {vip}: {} served in {:?}", rush.served, rush.took);
        ensure!(rush.failed.is_empty(), "{vip}: {} failed: {:?}", rush.failed.len(), rush.failed.first());
        ensure!(rush.served == SET_UPS / vips.len(), "{vip}: {}", rush.served);
    }
    for live in &held {
        live.wait_until_all_answer(Instant::now(), PATIENCE)?;
        let broken = live.incidents();
        let broken: Vec<_> = broken.iter().filter(|incident| !incident.is_a_stall()).collect();
        ensure!(broken.is_empty(), "{} broke, the first: {:?}", broken.len(), broken[0]);
    }
    for none in ["drop_connections_full", "drop_no_connection", "drop_inconsistent"] {
        ensure!(balancer.outcome(none)? == 0, "{none}");
    }
    Ok(())
}

#[test]
fn nat_opens_fifty_thousand_connections_beside_five_thousand_that_stay() -> Result<()> {
    a_rush("natrush", Mode::Nat)
}

#[test]
fn fullnat_opens_fifty_thousand_connections_beside_five_thousand_that_stay() -> Result<()> {
    a_rush("fullrush", Mode::Fullnat)
}
