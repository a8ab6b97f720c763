//! Reloads that take away what there was: every backend, the checks, an interface; a reload that asks
//! for a trace; and a restart that meets a silent network.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tests::balancer::Balancer;
use tests::lab::{HttpLoad, Signal, wait_for};
use tests::stage::{self, PATIENCE, Stage, URL4, VIP4};

/// State, reason and slots of a backend.
fn backend(balancer: &Balancer, name: &str) -> Result<(String, String, u64)> {
    let found = balancer.backends()?.into_iter().find(|backend| backend.name == name);
    let found = found.ok_or_else(|| anyhow::anyhow!("no backend {name}"))?;
    Ok((found.state, found.check, found.slots))
}

#[test]
fn a_reload_that_replaces_every_backend_leaves_no_gap() -> Result<()> {
    let Some(mut stage) = Stage::set("replace", 2)? else { return Ok(()) };
    let mut config = stage.config();
    let balancer = stage.start(&config)?;
    stage.add_backend()?;
    stage.add_backend()?;
    let load = HttpLoad::new(URL4, 100_000).parallel(4).rate(50).start(&stage.client)?;
    sleep(Duration::from_millis(500));

    config.backends = vec![stage::backend(2, false), stage::backend(3, false)];
    let begin = Instant::now();
    balancer.reload(&config.to_string())?;
    let end = Instant::now();
    sleep(Duration::from_millis(500));
    let requests = load.stop()?;
    stage::none_failed_but_in_flight(&requests, 4, [begin, end])?;
    let last = requests.last().and_then(|request| request.backend());
    ensure!(matches!(last, Some("web3" | "web4")), "the last request went to {last:?}");
    Ok(())
}

#[test]
fn a_backend_that_is_down_comes_up_when_checks_are_turned_off() -> Result<()> {
    let Some(stage) = Stage::set("unchecked", 2)? else { return Ok(()) };
    let mut config = stage.config();
    config.health =
        "{type: http, path: /healthz, interval: 200ms, timeout: 200ms, rise: 3, fall: 2}".to_owned();
    let balancer = stage.start(&config)?;
    stage.backends[0].nginx.set_healthy(false)?;
    wait_for("web1 is down", PATIENCE, || {
        backend(&balancer, "web1").is_ok_and(|b| b.0 == "down" && b.2 == 0)
    })?;

    config.health = "{type: none}".to_owned();
    balancer.reload(&config.to_string())?;
    let (state, check, slots) = backend(&balancer, "web1")?;
    ensure!(state == "up" && check == "not checked" && slots > 0, "{state}: {check}, {slots} slots");
    stage.balances(URL4, 200, 2)
}

#[test]
fn a_reload_that_cannot_attach_an_interface_changes_nothing() -> Result<()> {
    let Some(stage) = Stage::set("busy", 2)? else { return Ok(()) };
    let mut config = stage.config();
    let balancer = stage.start(&config)?;
    let other = stage.lab.switch("other")?;
    stage.balancer.add_interface(&other, &["10.112.0.3/24"])?;
    stage.balancer.attach_pass("eth1")?;
    let before = balancer.backends()?.iter().map(|backend| backend.slots).collect::<Vec<_>>();

    config.interfaces = "[eth0, eth1]".to_owned();
    config.top = "vip_arp: true".to_owned();
    config.backends.pop();
    let refusal = balancer.reload(&config.to_string()).expect_err("eth1 is taken");
    ensure!(format!("{refusal:#}").contains("another XDP program is attached"), "{refusal:#}");
    let status = balancer.status()?;
    ensure!(status.interfaces.len() == 1 && status.backends.len() == 2, "{status:?}");
    ensure!(status.backends.iter().map(|backend| backend.slots).eq(before), "slots moved");
    stage.balances(URL4, 200, 2)
}

/// The first look at an interface was before the program was on it; putting it back must not go by that.
#[test]
fn a_reload_that_fails_leaves_a_generic_interface_as_it_was() -> Result<()> {
    let Some(stage) = Stage::set("busygeneric", 2)? else { return Ok(()) };
    let mut config = stage.config();
    config.interfaces = "[{name: eth0, mode: generic}]".to_owned();
    let balancer = stage.start(&config)?;
    let (link, flags) = (balancer.link_id()?, balancer.tables()?.interfaces);
    let other = stage.lab.switch("other")?;
    stage.balancer.add_interface(&other, &["10.112.0.3/24"])?;
    stage.balancer.attach_pass("eth1")?;

    config.interfaces = "[{name: eth0, mode: generic}, eth1]".to_owned();
    config.top = "vip_arp: true".to_owned();
    ensure!(balancer.reload(&config.to_string()).is_err(), "eth1 is taken");
    ensure!(balancer.link_id()? == link, "attached anew");
    ensure!(balancer.tables()?.interfaces == flags, "the interface's row changed");
    ensure!(balancer.status()?.interfaces[0].mode == "generic");
    stage.balances(URL4, 200, 2)
}

#[test]
fn a_restart_that_cannot_attach_an_interface_leaves_the_others_forwarding() -> Result<()> {
    let Some(stage) = Stage::set("again", 2)? else { return Ok(()) };
    let mut config = stage.config();
    let mut balancer = stage.start(&config)?;
    let other = stage.lab.switch("other")?;
    stage.balancer.add_interface(&other, &["10.112.0.3/24"])?;
    stage.balancer.attach_pass("eth1")?;
    balancer.process.kill();

    config.interfaces = "[eth0, eth1]".to_owned();
    std::fs::write(&balancer.config, config.to_string())?;
    ensure!(balancer.restart().is_err(), "eth1 is taken");
    stage.balances(URL4, 200, 2)
}

#[test]
fn an_interface_that_was_elsewhere_for_a_while_is_attached_again() -> Result<()> {
    let Some(stage) = Stage::set("moved", 1)? else { return Ok(()) };
    let config = stage.config();
    let mut balancer = stage.start(&config)?;
    balancer.process.kill();
    // The link's device goes; one of the same name and index comes.
    let shown = stage.balancer.ip("-o link show eth0")?;
    let index = shown.split(':').next().unwrap_or_default().trim().to_owned();
    stage.balancer.ip("link del eth0")?;
    stage.balancer.ip(&format!("link add eth0 index {index} type veth peer name stub"))?;
    stage.balancer.ip("link set eth0 up")?;
    balancer.restart()?;
    let shown = stage.balancer.ip("link show eth0")?;
    ensure!(shown.contains("xdp"), "{shown}");
    Ok(())
}

#[test]
fn of_two_reloads_in_a_row_the_later_file_counts() -> Result<()> {
    let Some(stage) = Stage::set("overtake", 1)? else { return Ok(()) };
    let mut config = stage.config();
    let balancer = stage.start(&config)?;
    // Nobody has this address: the first file's reload waits for it.
    config.backends.push("{address: 10.111.0.99, name: nobody}".to_owned());
    std::fs::write(&balancer.config, config.to_string())?;
    balancer.process.signal(Signal::HUP)?;
    sleep(Duration::from_millis(200));
    config.backends.pop();
    config.services.push(stage::service("other", &[VIP4], "81", "tcp"));
    std::fs::write(&balancer.config, config.to_string())?;
    balancer.process.signal(Signal::HUP)?;
    // Longer than the first one would have waited.
    sleep(Duration::from_millis(2500));
    let status = balancer.status()?;
    ensure!(status.backends.len() == 1 && status.services.len() == 3, "{status:?}");
    Ok(())
}

#[test]
fn a_restart_keeps_a_backend_whose_neighbour_does_not_answer_just_then() -> Result<()> {
    let Some(stage) = Stage::set("silent", 2)? else { return Ok(()) };
    let mut balancer = stage.start(&stage.config())?;
    let before = backend(&balancer, "web1")?.2;
    balancer.process.kill();
    stage.backends[0].host.set_link("eth0", false)?;
    stage.balancer.ip("neigh flush dev eth0")?;
    balancer.restart()?;
    let (state, check, slots) = backend(&balancer, "web1")?;
    // Its checks, which are patient here, decide; not the first second of a restart.
    ensure!(slots == before, "{state}: {check}: {slots} of {before} slots are left");
    ensure!(balancer.process.log().contains("taken over"), "{}", balancer.process.log());
    Ok(())
}

#[test]
fn decisions_are_logged_while_a_trace_is_asked_for() -> Result<()> {
    let Some(stage) = Stage::set("trace", 1)? else { return Ok(()) };
    let mut config = stage.config();
    let balancer = stage.start(&config)?;
    let decisions = || balancer.process.log().matches("forward_transmit in=").count();
    stage.balances(URL4, 10, 1)?;
    ensure!(decisions() == 0, "traced without being asked");

    config.top = "trace: true".to_owned();
    balancer.reload(&config.to_string())?;
    stage.balances(URL4, 10, 1)?;
    // A request is at least a SYN, an ACK, the request and a FIN.
    wait_for("decisions are in the log", PATIENCE, || decisions() >= 40)?;

    // A reload that leaves the program as it is leaves the trace as it is.
    balancer.reload(&config.to_string())?;
    let before = decisions();
    stage.balances(URL4, 10, 1)?;
    wait_for("the trace goes on", PATIENCE, || decisions() >= before + 40)?;

    config.top = String::new();
    balancer.reload(&config.to_string())?;
    sleep(Duration::from_millis(300));
    let before = decisions();
    stage.balances(URL4, 10, 1)?;
    sleep(Duration::from_millis(300));
    ensure!(decisions() == before, "the trace does not end");
    Ok(())
}
