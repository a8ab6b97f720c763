//! Maps of another size or layout take the place of those in use while traffic flows.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_common::abi::Meta;
use lb_userspace::bpf::{BpfFs, Maps};
use tests::balancer::Balancer;
use tests::lab::{HttpLoad, RunningLoad};
use tests::stage::{self, Config, PATIENCE, Stage, URL4};

const TIGHT: &str = "limits: {backends: 50, vips: 64, slots: 65536}\n";
const WIDE: &str = "limits: {backends: 5000, vips: 8192, slots: 4194304}\n";

fn traffic(stage: &Stage) -> Result<RunningLoad> {
    let load = HttpLoad::new(URL4, 100_000).parallel(4).rate(50).start(&stage.client)?;
    sleep(Duration::from_millis(300));
    Ok(load)
}

/// Sets of pinned maps.
fn generations(balancer: &Balancer) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(balancer.run_dir.join("bpf"))?;
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names: Vec<String> = names.collect::<Result<_>>()?;
    names.retain(|name| name.starts_with("maps_"));
    names.sort();
    Ok(names)
}

#[test]
fn a_reload_with_other_limits_turns_over_to_new_maps_and_no_flow_notices() -> Result<()> {
    let Some(stage) = Stage::set("limits", 3)? else { return Ok(()) };
    let mut config = stage.config();
    let balancer = stage.start(&config)?;
    let (link, places) = (balancer.link_id()?, balancer.places()?);
    let load = traffic(&stage)?;
    for limits in [WIDE, TIGHT, ""] {
        let slots = balancer.tables()?.slots.len();
        let counted = balancer.outcome("forward_transmit")?;
        config.top = limits.to_owned();
        balancer.reload(&config.to_string())?;
        ensure!(balancer.tables()?.slots.len() != slots, "{limits}: the maps are the same");
        ensure!(generations(&balancer)?.len() == 1, "{limits}: old maps stay pinned");
        ensure!(balancer.places()? == places, "{limits}: flows moved");
        ensure!(balancer.link_id()? == link, "{limits}: attached anew");
        let now = balancer.outcome("forward_transmit")?;
        ensure!(now >= counted, "{limits}: counters went back from {counted} to {now}");
        ensure!(balancer.status()?.services[0].packets > 0, "{limits}: the service's counters are gone");
        ensure!(balancer.backends()?.iter().all(|backend| backend.state == "up"));
        sleep(Duration::from_millis(200));
    }
    stage::none_failed(&load.stop()?)
}

#[test]
fn an_agent_that_starts_with_other_limits_turns_over_to_new_maps() -> Result<()> {
    let Some(stage) = Stage::set("startlimits", 3)? else { return Ok(()) };
    let config = stage.config();
    let mut balancer = stage.start(&config)?;
    let (link, places) = (balancer.link_id()?, balancer.places()?);
    let load = traffic(&stage)?;
    balancer.process.kill();
    let counted = count(&balancer)?;
    std::fs::write(&balancer.config, Config { top: WIDE.to_owned(), ..config }.to_string())?;
    balancer.restart()?;
    balancer.process.wait_for_log("running", PATIENCE)?;
    ensure!(generations(&balancer)? == ["maps_2"], "{:?}", generations(&balancer)?);
    ensure!(balancer.places()? == places, "flows moved");
    ensure!(balancer.link_id()? == link, "attached anew");
    ensure!(count(&balancer)? >= counted, "counters went back");
    stage::none_failed(&load.stop()?)
}

/// Packets of the first VIP, from the pins.
fn count(balancer: &Balancer) -> Result<u64> {
    let fs = BpfFs::existing(&balancer.run_dir)?.context("nothing is pinned")?;
    let maps = Maps::from_pins(&fs)?;
    let counters = maps.counters();
    Ok((0..16).map(|vip| counters.vip(vip).map(|traffic| traffic.packets).unwrap_or(0)).sum())
}

/// What the old maps say cannot be read: backends are asked before the new ones are in force.
#[test]
fn fault_04_maps_of_another_layout_are_not_adopted_but_replaced_under_traffic() -> Result<()> {
    let Some(stage) = Stage::set("layout", 3)? else { return Ok(()) };
    let mut balancer = stage.start(&stage.config())?;
    let (link, places) = (balancer.link_id()?, balancer.places()?);
    let load = traffic(&stage)?;
    balancer.process.kill();
    {
        let fs = BpfFs::existing(&balancer.run_dir)?.context("nothing is pinned")?;
        let maps = Maps::from_pins(&fs)?;
        let meta = maps.image()?.meta;
        maps.set_meta(&Meta { abi_version: 4711, ..meta });
    }
    let told = balancer.xlb(&["lookup", "10.111.0.2:40000", "203.0.113.10:80"]);
    let told = format!("{:#}", told.expect_err("maps of another layout were read"));
    ensure!(told.contains("ABI version 4711"), "{told}");

    balancer.restart()?;
    balancer.process.wait_for_log("running", PATIENCE)?;
    let log = balancer.process.log();
    ensure!(log.contains("ABI version 4711") && log.contains("do not fit"), "{log}");
    ensure!(generations(&balancer)? == ["maps_2"], "{:?}", generations(&balancer)?);
    ensure!(balancer.places()? == places, "flows moved");
    ensure!(balancer.link_id()? == link, "attached anew");
    stage::none_failed(&load.stop()?)
}

/// An agent that was killed while it made its first maps leaves some that nobody goes by.
#[test]
fn maps_that_were_never_completed_are_removed_by_the_next_start() -> Result<()> {
    let Some(stage) = Stage::set("leftover", 1)? else { return Ok(()) };
    let mut balancer = stage.start(&stage.config())?;
    balancer.process.kill();
    let left = balancer.run_dir.join("bpf/maps_7");
    std::fs::create_dir(&left)?;
    balancer.restart()?;
    balancer.process.wait_for_log("running", PATIENCE)?;
    ensure!(!left.exists(), "a leftover stays");
    ensure!(generations(&balancer)? == ["maps_1"], "{:?}", generations(&balancer)?);
    Ok(())
}

/// A map that somebody took away cannot be adopted, and must not be made anew beside the others.
#[test]
fn a_missing_pin_makes_the_next_agent_fill_new_maps() -> Result<()> {
    let Some(stage) = Stage::set("missingpin", 2)? else { return Ok(()) };
    let mut balancer = stage.start(&stage.config())?;
    let places = balancer.places()?;
    let load = traffic(&stage)?;
    balancer.process.kill();
    std::fs::remove_file(balancer.run_dir.join("bpf/maps_1/XLB_SLOTS"))?;
    balancer.restart()?;
    balancer.process.wait_for_log("running", PATIENCE)?;
    ensure!(balancer.process.log().contains("XLB_SLOTS is missing"), "{}", balancer.process.log());
    ensure!(generations(&balancer)? == ["maps_2"], "{:?}", generations(&balancer)?);
    ensure!(balancer.places()? == places, "flows moved");
    stage::none_failed(&load.stop()?)
}
