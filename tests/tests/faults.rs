//! Rows of the fault table that have no other place: upgrade, half-written files, full maps, neighbours, interfaces, pins.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lb_common::abi::Path;
use lb_userspace::config;
use tests::balancer::{Balancer, Ended, other_build};
use tests::lab::{self, DatagramFlows, DatagramServer, HttpLoad, RunningLoad, wait_for};
use tests::stage::{self, Config, PATIENCE, Stage, URL4, VIP4, VIPS};

/// 100 requests a second until it is stopped.
fn traffic(stage: &Stage) -> Result<RunningLoad> {
    let load = HttpLoad::new(URL4, 100_000).parallel(2).rate(50).start(&stage.client)?;
    sleep(Duration::from_millis(300));
    Ok(load)
}

/// How `xlb check` ends on a text.
fn check(stage: &Stage, yaml: &str) -> Result<Ended> {
    let file = stage.balancer.new_file("checked.yaml");
    fs::write(&file, yaml)?;
    Ended::of_xlb(&stage.balancer, &["check", "-c", &file.to_string_lossy()])
}

#[test]
fn fault_03_an_upgrade_loses_not_one_datagram_of_a_thousand_flows() -> Result<()> {
    let Some(stage) = Stage::set("datagrams", 3)? else { return Ok(()) };
    let server = SocketAddr::new(VIP4.parse()?, 7000);
    let mut servers = Vec::new();
    for backend in &stage.backends {
        servers.push(DatagramServer::start(&backend.host, server)?);
    }
    let config = Config {
        health: stage::PATIENT_CHECKS.replace("path:", "port: 80, path:"),
        services: vec![stage::service("echo", &[VIP4], "7000", "udp")],
        ..stage.config()
    };
    let mut balancer = stage.start(&config)?;
    let (own, other) = (balancer.binary.clone(), other_build(&stage.lab)?);
    let client = IpAddr::V4(Ipv4Addr::new(10, 111, 0, 2));
    let flows = DatagramFlows::start(&stage.client, &[client], server, 1000, Duration::from_millis(250))?;
    sleep(Duration::from_secs(1));
    for build in [&other, &own, &other] {
        balancer.upgrade(build)?;
        sleep(Duration::from_millis(500));
    }
    let flows = flows.end();
    let sent: u64 = flows.iter().map(|flow| flow.sent).sum();
    let lost: Vec<_> = flows.iter().filter(|flow| !flow.missing.is_empty()).collect();
    println!("{sent} datagrams");
    ensure!(sent > 8_000, "{sent} datagrams");
    ensure!(lost.is_empty(), "of {sent} datagrams some are lost, in {} flows: {:?}", lost.len(), lost[0]);
    let moved = flows.iter().filter(|flow| flow.servers.len() != 1).count();
    ensure!(moved == 0, "{moved} flows went to more than one backend");
    Ok(())
}

#[test]
fn fault_06_no_part_of_a_file_is_taken_for_the_whole() -> Result<()> {
    let path = std::env::temp_dir().join(format!("xlb-half-{}.yaml", std::process::id()));
    let load = |text: &[u8]| -> Result<_> {
        fs::write(&path, text)?;
        let loaded = config::load(&path);
        fs::remove_file(&path)?;
        Ok(loaded)
    };
    let backends = vec!["10.111.0.11".into(), "10.111.0.12".into()];
    let whole = Config { backends, ..Config::default() }.to_string();
    ensure!(load(whole.as_bytes())?.is_ok());
    for length in 0..whole.len() {
        let part = load(&whole.as_bytes()[..length])?;
        ensure!(part.is_err_and(|problems| !problems.0.is_empty()), "{length} bytes are taken for a file");
    }
    // Where lists have an entry on each line, a cut between two of them is a shorter list, and nothing else.
    for example in ["minimal", "dual-stack", "anycast-edge", "regions", "translated", "demo"] {
        let text = fs::read(format!("{}/../examples/{example}.yaml", env!("CARGO_MANIFEST_DIR")))?;
        let meant = load(&text)?.map_err(|problems| anyhow::anyhow!("{example}: {problems}"))?.config;
        for length in 0..text.len() {
            let Ok(part) = load(&text[..length])? else { continue };
            let named = part.config.services.iter().all(|service| meant.services.contains(service));
            ensure!(named && text[length - 1] == b'\n', "{example}: {length} bytes are another file");
        }
    }
    Ok(())
}

#[test]
fn fault_06_a_half_written_file_is_refused_by_check_and_by_a_living_agent() -> Result<()> {
    let Some(stage) = Stage::set("half", 2)? else { return Ok(()) };
    let config = stage.config().to_string();
    let balancer = stage.start(&stage.config())?;
    let before = balancer.tables()?;
    let load = traffic(&stage)?;
    for part in 0..20 {
        let half = &config[..(config.len() - 1) * part / 19];
        check(&stage, half)?.expect(3, &["checked.yaml"]).with_context(|| format!("{} bytes", half.len()))?;
        ensure!(balancer.reload(half).is_err(), "{} bytes were taken", half.len());
    }
    ensure!(balancer.tables()? == before, "a refused file changed the tables");
    balancer.reload(&config)?;
    ensure!(balancer.tables()? == before, "the same file changed the tables");
    stage::none_failed(&load.stop()?)
}

/// Each limit, a configuration that is just beyond it, and who says so.
fn beyond(stage: &Stage) -> [(&'static str, Config); 3] {
    let with = |limits: &str| Config { top: format!("limits: {limits}\n"), ..stage.config() };
    let service = |ports: &str, protocol: &str| stage::service(protocol, &VIPS, ports, protocol);
    [
        ("limits.vips", Config { services: vec![service("[80, 81]", "tcp")], ..with("{vips: 3}") }),
        ("limits.backends", with("{backends: 1}")),
        (
            "limits.slots",
            Config {
                health: stage::PATIENT_CHECKS.replace("path:", "port: 80, path:"),
                services: vec![service("80", "tcp"), service("80", "udp")],
                ..with("{slots: 4096}")
            },
        ),
    ]
}

#[test]
fn fault_10_what_does_not_fit_is_refused_before_anything_is_written() -> Result<()> {
    let Some(stage) = Stage::set("full", 2)? else { return Ok(()) };
    for (limit, config) in beyond(&stage) {
        check(&stage, &config.to_string())?.expect(3, &[limit])?;
        let run_dir = stage.lab.dir().join("full");
        let started = Balancer::start(&stage.balancer, &run_dir, &config.to_string());
        let told = format!("{:#}", started.err().with_context(|| format!("{limit}: it runs"))?);
        ensure!(told.contains(limit), "{told}");
        ensure!(!stage.balancer.ip("link show eth0")?.contains("xdp"), "{limit}: attached");
        let pins = fs::read_dir(run_dir.join("bpf")).map_or(0, Iterator::count);
        ensure!(pins == 0, "{limit}: something is pinned");
    }

    let balancer = stage.start(&stage.config())?;
    let (before, link) = (balancer.tables()?, balancer.link_id()?);
    let load = traffic(&stage)?;
    for (limit, config) in beyond(&stage) {
        let refused = balancer.reload(&config.to_string()).expect_err("beyond a limit").to_string();
        ensure!(refused.contains(limit), "{refused}");
        ensure!(balancer.tables()? == before, "{limit}: a part of it was written");
    }
    ensure!(balancer.link_id()? == link);
    stage::none_failed(&load.stop()?)
}

/// Packets take the MAC address from the tables; the kernel's neighbours are where it comes from.
#[test]
fn fault_24_a_neighbour_that_the_kernel_forgets_is_asked_for_again_and_no_packet_waits() -> Result<()> {
    let Some(stage) = Stage::set("forgets", 2)? else { return Ok(()) };
    let balancer = stage.start(&stage.config())?;
    let (before, load) = (balancer.tables()?, traffic(&stage)?);
    for _ in 0..5 {
        stage.balancer.ip("neigh flush dev eth0 nud all")?;
        sleep(Duration::from_millis(200));
    }
    let address = stage::address(0, false);
    wait_for("the neighbour is known again", PATIENCE, || {
        stage.balancer.ip(&format!("neigh show {address}")).is_ok_and(|shown| shown.contains("lladdr"))
    })?;
    ensure!(balancer.tables()? == before, "the tables changed");
    stage::none_failed(&load.stop()?)
}

/// How soon the agent follows its neighbours and links.
const FOLLOWED: Duration = Duration::from_secs(1);

#[test]
fn fault_24_a_neighbour_that_changes_its_mac_address_is_followed_within_a_second() -> Result<()> {
    let Some(stage) = Stage::set("newmac", 2)? else { return Ok(()) };
    let balancer = stage.start(&stage.config())?;
    let host = &stage.backends[0].host;
    for last in 1..=3 {
        let mac = [2, 0, 0, 0, 0xee, last];
        let leads_there = || {
            let told = balancer.tables().map(|tables| {
                tables.backends.iter().any(|row| Path::from_bits(row.path).mac().bytes() == mac)
            });
            told.unwrap_or(false)
        };
        ensure!(!leads_there());
        let changed = Instant::now();
        host.change_mac("eth0", mac)?;
        wait_for("packets go to the new address", PATIENCE, leads_there)?;
        let took = changed.elapsed();
        println!("followed after {took:?}");
        ensure!(took <= FOLLOWED, "followed only after {took:?}");
        // The kernel takes no news of a neighbour within a second of the last (locktime).
        sleep(Duration::from_millis(1100));
    }
    stage.balances(URL4, 100, 2)
}

/// How soon it attaches to an interface that is back.
const ATTACHED: Duration = Duration::from_secs(2);

#[test]
fn fault_25_an_interface_that_was_deleted_is_attached_when_it_is_back() -> Result<()> {
    let Some(stage) = Stage::set("deleted", 2)? else { return Ok(()) };
    let balancer = stage.start(&stage.config())?;
    let (places, link) = (balancer.places()?, balancer.link_id()?);
    stage.balancer.delete_interface("eth0")?;
    balancer.process.wait_for_log("deleted", PATIENCE)?;
    stage.balancer.remake_interface(stage.lab.lan(), "eth0")?;
    let back = Instant::now();
    wait_for("it is attached", PATIENCE, || balancer.program_id().is_ok())?;
    let took = back.elapsed();
    println!("attached after {took:?}");
    ensure!(took <= ATTACHED, "attached only after {took:?}");
    ensure!(balancer.link_id()? != link, "the link of a device that is gone");
    balancer.wait_for_backends(2, PATIENCE)?;
    ensure!(balancer.places()? == places, "flows moved");
    stage.balances(URL4, 200, 2)
}

#[test]
fn fault_25_an_interface_that_was_down_forwards_as_soon_as_it_is_up() -> Result<()> {
    let Some(stage) = Stage::set("downup", 2)? else { return Ok(()) };
    let balancer = stage.start(&stage.config())?;
    let (places, link) = (balancer.places()?, balancer.link_id()?);
    for down in [Duration::ZERO, Duration::from_millis(700)] {
        stage.balancer.set_link("eth0", false)?;
        sleep(down);
        stage.balancer.set_link("eth0", true)?;
        let short = Duration::from_millis(300);
        let served = || lab::http_get_within(&stage.client, URL4, short, short).is_ok();
        wait_for("a request is served", PATIENCE, served)?;
        ensure!(balancer.link_id()? == link, "attached anew");
    }
    balancer.wait_for_backends(2, PATIENCE)?;
    ensure!(balancer.places()? == places, "flows moved");
    stage.balances(URL4, 200, 2)
}

#[test]
fn fault_25_a_renamed_interface_forwards_on_under_its_new_name() -> Result<()> {
    let Some(stage) = Stage::set("renamed", 2)? else { return Ok(()) };
    let mut balancer = stage.start(&stage.config())?;
    let (before, link) = (balancer.tables()?, balancer.link_id()?);
    let load = traffic(&stage)?;
    stage.balancer.ip("link set eth0 name wan0")?;
    balancer.process.wait_for_log("renamed", PATIENCE)?;
    let log = balancer.process.log();
    let told = log.lines().find(|line| line.contains("renamed")).context("no line")?;
    ensure!(told.contains("wan0") && told.contains("eth0"), "{told}");
    ensure!(balancer.tables()? == before, "the tables changed");

    // The file still says eth0.
    balancer.process.kill();
    balancer.restart()?;
    ensure!(balancer.link_id()? == link, "attached anew");
    ensure!(balancer.tables()? == before, "the tables changed with a restart");

    let renamed = Config { interfaces: "[wan0]".to_owned(), ..stage.config() };
    balancer.reload(&renamed.to_string())?;
    let held = stage.balancer.ip("link show wan0")?;
    ensure!(held.contains("xdp"), "{held}");
    ensure!(balancer.status()?.interfaces[0].name == "wan0", "{:?}", balancer.status()?.interfaces);
    stage::none_failed(&load.stop()?)
}

#[test]
fn fault_25_an_interface_that_moves_to_another_namespace_is_let_go_and_taken_again() -> Result<()> {
    let Some(stage) = Stage::set("movesaway", 1)? else { return Ok(()) };
    let inside = stage.lab.switch("inside")?;
    stage.balancer.add_interface(&inside, &["10.112.0.3/24"])?;
    let elsewhere = stage.lab.host("elsewhere", &[])?;
    let config = Config { interfaces: "[eth0, eth1]".to_owned(), ..stage.config() };
    let balancer = stage.start(&config)?;
    let load = traffic(&stage)?;
    stage.balancer.ip(&format!("link set eth1 netns {}", elsewhere.namespace()))?;
    balancer.process.wait_for_log("moved to another network namespace", PATIENCE)?;
    // The kernel frees a link aside.
    let bare = || elsewhere.ip("link show eth1").is_ok_and(|shown| !shown.contains("xdp"));
    wait_for("the program, whose tables mean nothing there, goes", PATIENCE, bare)?;
    ensure!(balancer.status()?.interfaces.len() == 1);

    let back =
        ["ip", "-n", elsewhere.namespace(), "link", "set", "eth1", "netns", stage.balancer.namespace()];
    stage.balancer.run(back)?;
    stage.balancer.set_link("eth1", true)?;
    let carries = || stage.balancer.ip("link show eth1").is_ok_and(|shown| shown.contains("xdp"));
    wait_for("it is attached again", PATIENCE, carries)?;
    stage::none_failed(&load.stop()?)
}

/// How soon the agent has pinned again what was removed.
const PINNED_AGAIN: Duration = Duration::from_secs(10);

#[test]
fn fault_37_a_removed_pin_costs_no_packet_while_the_agent_lives_and_comes_back() -> Result<()> {
    let Some(stage) = Stage::set("unpinned", 2)? else { return Ok(()) };
    let mut balancer = stage.start(&stage.config())?;
    let (before, program) = (balancer.tables()?, balancer.program_id()?);
    let load = traffic(&stage)?;
    let pins = ["link_eth0", "maps_1/XLB_SLOTS", "maps_1/XLB_META"]
        .map(|pin| balancer.run_dir.join("bpf").join(pin));
    for pin in &pins {
        fs::remove_file(pin).with_context(|| pin.display().to_string())?;
    }
    let removed = Instant::now();
    wait_for("everything is pinned again", PATIENCE, || pins.iter().all(|pin| pin.exists()))?;
    let took = removed.elapsed();
    println!("pinned again after {took:?}");
    ensure!(took <= PINNED_AGAIN, "pinned again only after {took:?}");
    for what in ["the pin of its link was removed", "XLB_SLOTS", "XLB_META"] {
        balancer.process.wait_for_log(what, PATIENCE)?;
    }
    ensure!(balancer.program_id()? == program, "the program is another");
    ensure!(balancer.tables()? == before, "the tables are others");
    // What is pinned again is what was pinned: the next agent finds everything.
    balancer.process.kill();
    balancer.restart()?;
    balancer.process.wait_for_log("maps of an earlier agent taken over", PATIENCE)?;
    ensure!(balancer.tables()? == before, "the tables changed with a restart");
    stage::none_failed(&load.stop()?)
}

#[test]
fn fault_37_verify_tells_of_a_removed_pin_where_no_agent_runs() -> Result<()> {
    for (pin, what) in [("link_eth0", "interface eth0"), ("maps_1/XLB_SLOTS", "pin of the map XLB_SLOTS")] {
        let Some(stage) = Stage::set("verify", 1)? else { return Ok(()) };
        let balancer = stage.start(&stage.config())?;
        let config = balancer.config.to_string_lossy();
        let verify = || balancer.command(&["verify", "-c", &*config]);
        verify()?.expect(0, &["no difference"])?;
        balancer.process.kill();
        verify()?.expect(0, &["no difference"])?;
        fs::remove_file(balancer.run_dir.join("bpf").join(pin))?;
        verify()?.expect(5, &[what])?;
    }
    Ok(())
}

#[test]
fn fault_37_a_program_that_was_taken_off_by_force_is_attached_again() -> Result<()> {
    let Some(stage) = Stage::set("forced", 1)? else { return Ok(()) };
    let balancer = stage.start(&stage.config())?;
    let pin = balancer.run_dir.join("bpf/link_eth0");
    stage.balancer.run(["bpftool", "link", "detach", "pinned", &pin.to_string_lossy()])?;
    let detached = Instant::now();
    let carries = || stage.balancer.ip("link show eth0").is_ok_and(|shown| shown.contains("xdp"));
    ensure!(!carries(), "nothing was detached");
    wait_for("it is attached again", PATIENCE, carries)?;
    let took = detached.elapsed();
    println!("attached again after {took:?}");
    ensure!(took <= PINNED_AGAIN, "attached again only after {took:?}");
    ensure!(balancer.process.log().contains("the program was taken off"), "{}", balancer.process.log());
    stage.balances(URL4, 100, 1)
}
