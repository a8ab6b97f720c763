//! Mistakes as an operator meets them: exit code and text of every command.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::balancer::{Balancer, Ended, decap};
use tests::lab::{self, Host, Lab, wait_for};
use tests::stage::{self, Config, PATIENCE, Stage, URL4, VIP4};

/// Runs an xlb command that ends by itself.
fn run(host: &Host, arguments: &[&str]) -> Result<Ended> {
    Ended::of_xlb(host, arguments)
}

/// Runs `xlb run` on a configuration that it must refuse.
fn refused(host: &Host, config: &Config) -> Result<Ended> {
    refused_text(host, &config.to_string())
}

fn refused_text(host: &Host, yaml: &str) -> Result<Ended> {
    let file = host.new_file("refused.yaml");
    std::fs::write(&file, yaml)?;
    let run_dir = host.new_file("run");
    run(host, &["run", "-c", &file.to_string_lossy(), "--run-dir", &run_dir.to_string_lossy()])
}

/// A balancer without xlb, and nothing else.
fn alone(name: &str) -> Result<Option<(Lab, Host)>> {
    if !lab::available()? {
        return Ok(None);
    }
    let lab = Lab::new(name)?;
    let host = lab.host("balancer", &["10.111.0.3/24", "fd00:111::3/64"])?;
    Ok(Some((lab, host)))
}

fn config_with(backends: &[&str]) -> Config {
    Config { backends: backends.iter().map(ToString::to_string).collect(), ..Config::default() }
}

#[test]
fn fault_26_another_xdp_program_is_explained_with_its_id_and_left_alone() -> Result<()> {
    let Some((_lab, host)) = alone("busy")? else { return Ok(()) };
    host.attach_pass("eth0")?;
    let shown = host.ip("link show eth0")?;
    let id =
        shown.split("prog/xdp id ").nth(1).and_then(|rest| rest.split(' ').next()).context(shown.clone())?;
    let ended = refused(&host, &config_with(&["10.111.0.11"]))?;
    let held = format!("(program id {id} `pass`");
    ended.expect(1, &["eth0: another XDP program is attached", &held, "ip link set dev eth0 xdp off"])?;
    ensure!(host.ip("link show eth0")?.contains(&format!("prog/xdp id {id} ")), "it was touched");
    Ok(())
}

#[test]
fn fault_26_a_program_that_a_process_holds_is_explained_with_the_process() -> Result<()> {
    let Some((_lab, host)) = alone("held")? else { return Ok(()) };
    let holder = decap(&host, &[VIP4], &["10.255.0.0/24"])?;
    let ended = refused(&host, &config_with(&["10.111.0.11"]))?;
    let process = format!("process {} (xlb)", holder.pid());
    ended.expect(1, &["eth0: another XDP program is attached", "`decap`", "attached by link", &process])?;
    ensure!(holder.exit().is_none() && host.ip("link show eth0")?.contains("xdp"), "it was touched");
    Ok(())
}

/// Native XDP needs the peer's frames in one page: MTU 9000 at the switch's end is too much.
fn jumbo(name: &str) -> Result<Option<(Lab, Host)>> {
    let Some((lab, host)) = alone(name)? else { return Ok(None) };
    let mut command = host.exec_at_switch(["ip", "link", "set", "balancer-0", "mtu", "9000"]);
    ensure!(command.status()?.success());
    Ok(Some((lab, host)))
}

#[test]
fn fault_27_native_mode_that_the_mtu_forbids_fails_and_names_the_mtu() -> Result<()> {
    let Some((_lab, host)) = jumbo("jumbo")? else { return Ok(()) };
    let config = Config { top: "mode: native\n".to_owned(), ..config_with(&["10.111.0.11"]) };
    refused(&host, &config)?
        .expect(1, &["eth0: native XDP is not possible with this MTU", "eth0 has 1600", "mode: generic"])?;
    ensure!(!host.ip("link show eth0")?.contains("xdp"));
    Ok(())
}

#[test]
fn fault_27_automatic_mode_degrades_to_generic_and_says_so() -> Result<()> {
    let Some((lab, host)) = jumbo("degraded")? else { return Ok(()) };
    let config = config_with(&["10.111.0.11"]);
    let balancer = Balancer::start(&host, &lab.dir().join("xlb"), &config.to_string())?;
    ensure!(balancer.status()?.interfaces[0].mode == "generic");
    let log = balancer.process.log();
    ensure!(log.contains("running in generic mode") && log.contains("MTU"), "{log}");
    Ok(())
}

#[test]
fn an_interface_that_does_not_exist_is_named() -> Result<()> {
    let Some((_lab, host)) = alone("nointerface")? else { return Ok(()) };
    let config = Config { interfaces: "[eth7]".to_owned(), ..config_with(&["10.111.0.11"]) };
    refused(&host, &config)?.expect(1, &["no interface eth7", "ip link"])
}

#[test]
fn a_vip_on_an_interface_of_the_balancer_is_refused() -> Result<()> {
    let Some((_lab, host)) = alone("localvip")? else { return Ok(()) };
    host.add_address(&format!("{VIP4}/32"), "lo")?;
    let ended = refused(&host, &config_with(&["10.111.0.11"]))?;
    ended.expect(1, &[VIP4, "of service www", "lo", "take it off"])?;
    ensure!(!host.ip("link show eth0")?.contains("xdp"));
    Ok(())
}

#[test]
fn a_wrong_configuration_ends_with_code_3_and_all_its_places() -> Result<()> {
    let Some((_lab, host)) = alone("wrong")? else { return Ok(()) };
    let mut config = config_with(&["10.111.0.11", "{address: 10.111.0.12, weight: 101}"]);
    config.services = vec![stage::service("www", &[VIP4], "80", "tcp").replace("pool: web", "pool: wep")];
    let ended = refused(&host, &config)?;
    ended.expect(3, &["refused.yaml:", "pools.web.backends[1].weight", "101", "services[0].pool", "web"])?;
    for line in ended.stderr.lines() {
        let mut parts = line.split(':').skip(1);
        let mut number = || parts.next().and_then(|part| part.split(' ').next()?.parse::<u32>().ok());
        ensure!(number().is_some() && number().is_some(), "no line and column in: {line}");
    }
    refused_text(&host, "interfaces: [eth0\n")?.expect(3, &["refused.yaml:"])?;
    run(&host, &["run", "-c", "/nonexistent.yaml"])?.expect(3, &["/nonexistent.yaml"])?;
    run(&host, &["run"])?.expect(2, &["--config"])
}

#[test]
fn a_command_without_an_agent_says_how_to_start_one() -> Result<()> {
    let Some((lab, host)) = alone("noagent")? else { return Ok(()) };
    let run_dir = lab.dir().join("nobody");
    let run_dir = run_dir.to_string_lossy();
    run(&host, &["status", "--run-dir", &run_dir])?
        .expect(4, &["no agent answers at", "xlb run -c FILE", "--run-dir"])?;
    run(&host, &["lookup", "192.0.2.1:1", "203.0.113.10:80", "--run-dir", &run_dir])?
        .expect(4, &["no agent answers at", "nothing is pinned"])?;
    run(&host, &["detach", "--run-dir", &run_dir])?.expect(0, &["nothing is pinned"])
}

#[test]
fn fault_33_a_second_agent_in_the_same_place_names_the_first() -> Result<()> {
    let Some((lab, host)) = alone("twice")? else { return Ok(()) };
    let yaml = config_with(&["10.111.0.11"]).to_string();
    let balancer = Balancer::start(&host, &lab.dir().join("xlb"), &yaml)?;
    let (config, run_dir) = (balancer.config.to_string_lossy(), balancer.run_dir.to_string_lossy());
    let holder = format!("another xlb (process {}) runs in", balancer.process.pid());
    run(&host, &["run", "-c", &config, "--run-dir", &run_dir])?.expect(1, &[&holder])?;
    // In a directory of its own it finds the interface taken.
    let other = lab.dir().join("other");
    run(&host, &["run", "-c", &config, "--run-dir", &other.to_string_lossy()])?
        .expect(1, &["another XDP program is attached", "`balancer`"])?;
    run(&host, &["detach", "--run-dir", &run_dir])?.expect(1, &["another xlb", "runs in", "stop it"])?;
    ensure!(balancer.status().is_ok());
    Ok(())
}

#[test]
fn fault_24_an_address_that_nobody_has_is_unresolved_and_the_others_serve() -> Result<()> {
    let Some(stage) = Stage::set("nobody", 1)? else { return Ok(()) };
    let mut config = stage.config();
    config.backends.push("{address: 10.111.0.99, name: ghost}".to_owned());
    let balancer = Balancer::start(&stage.balancer, &stage.lab.dir().join("xlb"), &config.to_string())?;
    balancer.wait_for_backends(1, PATIENCE)?;
    let unresolved = || balancer.backends().is_ok_and(|backends| backends[1].state == "unresolved");
    wait_for("ghost is unresolved", PATIENCE, unresolved)?;
    let ghost = balancer.backends()?.remove(1);
    ensure!(ghost.check.contains("10.111.0.99") && ghost.check.contains("answer"), "{ghost:?}");
    ensure!(balancer.xlb(&["status"])?.contains("unresolved"));
    stage.balances(URL4, 100, 1)?;

    // It comes to life late.
    stage.backends[0].host.add_address("10.111.0.99/32", "eth0")?;
    balancer.wait_for_backends(2, PATIENCE)
}

#[test]
fn a_backend_behind_a_gateway_is_not_reached_by_l2_and_status_says_why() -> Result<()> {
    let Some(stage) = Stage::set("gateway", 1)? else { return Ok(()) };
    stage.balancer.route("10.113.0.0/24 via 10.111.0.11")?;
    stage.backends[0].host.add_address("10.113.0.7/24", "eth0")?;
    let mut config = Config { forward: "l2".to_owned(), ..config_with(&["10.113.0.7"]) };
    let balancer = Balancer::start(&stage.balancer, &stage.lab.dir().join("xlb"), &config.to_string())?;
    let unresolved = || balancer.backends().is_ok_and(|backends| backends[0].state == "unresolved");
    wait_for("the backend is unresolved", PATIENCE, unresolved)?;
    let why = balancer.backends()?.remove(0).check;
    ensure!(why.contains("gateway") && why.contains("forward: l2") && why.contains("ipip"), "{why}");
    // What it says is the way out.
    config.forward = "ipip".to_owned();
    balancer.reload(&config.to_string())?;
    balancer.wait_for_backends(1, PATIENCE)?;
    ensure!(lab::http_get_within(&stage.client, URL4, Duration::from_secs(1), PATIENCE)?.1 == "web1\n");
    Ok(())
}
