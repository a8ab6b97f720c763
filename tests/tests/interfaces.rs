//! Interfaces that cannot be had, or not as the file asks: what carried the program before carries it still.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::balancer::Balancer;
use tests::lab::{HttpLoad, RunningLoad, wait_for};
use tests::stage::{self, Backend, Config, PATIENCE, Stage, TUNNEL_SOURCES, URL4};

/// 100 requests a second until it is stopped.
fn traffic(stage: &Stage) -> Result<RunningLoad> {
    let load = HttpLoad::new(URL4, 100_000).parallel(2).rate(50).start(&stage.client)?;
    sleep(Duration::from_millis(300));
    Ok(load)
}

/// Gives the balancer one more interface, on a switch of its own.
fn inside(stage: &Stage) -> Result<String> {
    let switch = stage.lab.switch("inside")?;
    Ok(stage.balancer.add_interface(&switch, &["10.112.0.3/24"])?.name)
}

fn shown(stage: &Stage, interface: &str) -> Result<String> {
    stage.balancer.ip(&format!("link show {interface}"))
}

/// Starts the agent on another configuration, which it must refuse; what it says.
fn does_not_start(balancer: &mut Balancer, config: &Config) -> Result<String> {
    std::fs::write(&balancer.config, config.to_string())?;
    let told = balancer.restart().err().context("it runs")?;
    Ok(format!("{told:#}"))
}

#[test]
fn a_start_that_cannot_attach_everywhere_takes_nothing_off_an_interface_with_a_new_name() -> Result<()> {
    let Some(stage) = Stage::set("newname", 2)? else { return Ok(()) };
    let mut balancer = stage.start(&stage.config())?;
    let load = traffic(&stage)?;
    balancer.process.kill();
    stage.balancer.ip("link set eth0 name wan0")?;
    let other = inside(&stage)?;
    stage.balancer.attach_pass(&other)?;
    let config = Config { interfaces: format!("[wan0, {other}]"), ..stage.config() };
    let told = does_not_start(&mut balancer, &config)?;
    ensure!(told.contains("another XDP program is attached"), "{told}");
    ensure!(shown(&stage, "wan0")?.contains("xdp"), "the program was taken off");
    stage::none_failed(&load.stop()?)
}

#[test]
fn a_start_in_a_mode_that_cannot_be_had_leaves_the_mode_of_before() -> Result<()> {
    let Some(stage) = Stage::set("mode", 2)? else { return Ok(()) };
    ensure!(
        stage.balancer.exec_at_switch(["ip", "link", "set", "balancer-0", "mtu", "9000"]).status()?.success()
    );
    let mut balancer = stage.start(&stage.config())?;
    ensure!(shown(&stage, "eth0")?.contains("xdpgeneric"));
    balancer.process.kill();
    let config = Config { top: "mode: native\n".to_owned(), ..stage.config() };
    let told = does_not_start(&mut balancer, &config)?;
    ensure!(told.contains("native XDP is not possible with this MTU"), "{told}");
    ensure!(shown(&stage, "eth0")?.contains("xdpgeneric"), "the program was taken off");
    stage.balances(URL4, 100, 2)?;

    std::fs::write(&balancer.config, stage.config().to_string())?;
    balancer.restart()?;
    balancer.process.wait_for_log("maps of an earlier agent taken over", PATIENCE)?;
    ensure!(balancer.status()?.interfaces[0].mode == "generic");
    Ok(())
}

#[test]
fn a_reload_that_fails_leaves_an_interface_that_was_made_again_attached() -> Result<()> {
    let Some(stage) = Stage::set("madeagain", 1)? else { return Ok(()) };
    let second = inside(&stage)?;
    let config = Config { interfaces: format!("[{second}, eth0]"), ..stage.config() };
    let balancer = stage.start(&config)?;
    stage.balancer.delete_interface("eth0")?;
    balancer.process.wait_for_log("deleted", PATIENCE)?;
    stage.balancer.remake_interface(stage.lab.lan(), "eth0")?;
    balancer.process.wait_for_log("the interface is back", PATIENCE)?;
    let third = stage.balancer.add_interface(&stage.lab.switch("third")?, &["10.113.0.3/24"])?.name;
    stage.balancer.attach_pass(&third)?;
    let link = balancer.link_id()?;
    for top in ["", "limits: {backends: 5000, vips: 8192, slots: 4194304}\n"] {
        let interfaces = format!("[{second}, eth0, {third}]");
        let more = Config { interfaces, top: top.to_owned(), ..config.clone() };
        let refused = balancer.reload(&more.to_string()).expect_err("it is another's").to_string();
        ensure!(refused.contains(&format!("{third}: another XDP program is attached")), "{refused}");
        ensure!(balancer.link_id()? == link, "attached anew");
    }
    Ok(())
}

#[test]
fn a_program_of_somebody_else_in_the_place_of_ours_is_not_shown_as_ours() -> Result<()> {
    let Some(stage) = Stage::set("replaced", 1)? else { return Ok(()) };
    let second = inside(&stage)?;
    let config = Config { interfaces: format!("[eth0, {second}]"), ..stage.config() };
    let balancer = stage.start(&config)?;
    // Between the two looks of the agent at the interface there is time for another program.
    let pin = balancer.run_dir.join(format!("bpf/link_{second}"));
    let pin = pin.to_string_lossy();
    let swapped = || {
        stage.balancer.run(["bpftool", "link", "detach", "pinned", &pin]).is_ok()
            && stage.balancer.attach_pass(&second).is_ok()
    };
    wait_for("another program is attached", PATIENCE, swapped)?;
    balancer.process.wait_for_log("another XDP program is attached", PATIENCE)?;
    let interfaces = balancer.status()?.interfaces;
    ensure!(interfaces.len() == 1 && interfaces[0].name == "eth0", "{interfaces:?}");
    balancer.command(&["verify"])?.expect(5, &[&second])?;

    stage.balancer.ip(&format!("link set dev {second} xdp off"))?;
    let again = || balancer.status().is_ok_and(|status| status.interfaces.len() == 2);
    wait_for("it is attached again", PATIENCE, again)
}

/// The links are held open; it is the agent itself that could take the program off.
#[test]
fn fault_37_a_bpffs_that_is_unmounted_under_a_living_agent_costs_no_packet() -> Result<()> {
    let Some(stage) = Stage::set("unmounted", 2)? else { return Ok(()) };
    let mut balancer = stage.start(&stage.config())?;
    let load = traffic(&stage)?;
    let bpf = balancer.run_dir.join("bpf");
    let bpf = bpf.to_str().context("path")?;
    stage.balancer.run(["umount", bpf])?;
    balancer.process.wait_for_log("no longer mounted", PATIENCE)?;
    ensure!(shown(&stage, "eth0")?.contains("xdp"), "the program was taken off");
    // A program of other features has to be pinned, too: refused, and nothing changes.
    let other = Config { top: "vip_arp: true\n".to_owned(), ..stage.config() };
    let refused = balancer.reload(&other.to_string()).expect_err("what would it pin?").to_string();
    ensure!(refused.contains("no longer mounted"), "{refused}");
    ensure!(shown(&stage, "eth0")?.contains("xdp"), "the program was taken off");

    stage.balancer.run(["mount", "-t", "bpf", "-o", "mode=0700", "xlb", bpf])?;
    let pinned = || balancer.tables().is_ok() && balancer.link_id().is_ok();
    wait_for("everything is pinned again", PATIENCE, pinned)?;
    balancer.process.kill();
    balancer.restart()?;
    balancer.process.wait_for_log("maps of an earlier agent taken over", PATIENCE)?;
    stage::none_failed(&load.stop()?)
}

#[test]
fn a_reload_of_mode_and_limits_together_leaves_no_backend_behind_a_device_that_cannot_send() -> Result<()> {
    let Some(stage) = Stage::set("modelimits", 0)? else { return Ok(()) };
    let switch = stage.lab.switch("inside")?;
    stage.balancer.add_interface(&switch, &[])?;
    for words in [
        "link add br0 type bridge",
        "link set eth1 master br0",
        "link set br0 up",
        "address add 10.112.0.3/24 dev br0",
    ] {
        stage.balancer.ip(words)?;
    }
    let web = stage.lab.host_on("web1", &[(&switch, &["10.112.0.11/24"])])?;
    let _web = Backend::on(&web, &TUNNEL_SOURCES)?;
    let config = Config {
        top: "mode: generic\n".to_owned(),
        backends: vec!["{address: 10.112.0.11, name: web1}".to_owned()],
        ..stage.config()
    };
    let balancer = stage.start(&config)?;
    let top = "mode: native\nlimits: {backends: 5000, vips: 8192, slots: 4194304}\n".to_owned();
    balancer.reload(&Config { top, ..config }.to_string())?;
    let backend = balancer.backends()?.remove(0);
    ensure!(backend.state == "unresolved" && backend.check.contains("br0 (bridge)"), "{backend:?}");
    balancer.command(&["verify"])?.expect(0, &[])
}

#[test]
fn a_backend_that_left_the_file_while_no_agent_ran_is_left_alone_by_the_kernel() -> Result<()> {
    let Some(stage) = Stage::set("uncared", 2)? else { return Ok(()) };
    let pool = "    idle_timeout: {tcp: 1s, udp: 1s}\n".to_owned();
    let mut config = Config { pool, ..stage.config() };
    let mut balancer = stage.start(&config)?;
    let managed = |index| -> Result<bool> {
        let shown = stage.balancer.ip(&format!("neigh show {}", stage::address(index, false)))?;
        Ok(shown.contains("managed"))
    };
    let both = || managed(0).unwrap_or(false) && managed(1).unwrap_or(false);
    wait_for("the kernel cares for both", PATIENCE, both)?;
    balancer.process.kill();
    config.backends.pop();
    std::fs::write(&balancer.config, config.to_string())?;
    balancer.restart()?;
    balancer.process.wait_for_log("running", PATIENCE)?;
    wait_for("the kernel cares for one", PATIENCE, || managed(1).is_ok_and(|managed| !managed))?;
    ensure!(managed(0)?);
    Ok(())
}
