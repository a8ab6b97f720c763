//! Connections that were open before and a download that goes on, through everything that happens to the agent and to its links.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tests::balancer::other_build;
use tests::lab::{Signal, wait_for};
use tests::scene::Scene;
use tests::stage::{self, PATIENCE, VIP4, VIP6};

const CONNECTIONS: usize = 1000;
const DOWNLOAD: Duration = Duration::from_secs(120);

/// Nothing that the agent goes through concerns packets: what shows is the machine's load.
const UNNOTICED: Duration = Duration::from_secs(1);

/// How soon the agent follows its neighbours and links.
const FOLLOWED: Duration = Duration::from_secs(1);

/// How soon it attaches to an interface that is back.
const ATTACHED: Duration = Duration::from_secs(2);

/// Files that lead every flow where it was before.
fn harmless(scene: &Scene, number: usize) -> String {
    let mut config = scene.config.clone();
    match number % 6 {
        1 => config.health = config.health.replace("interval: 300ms", "interval: 400ms"),
        2 => config.services.push(stage::service("more", &[VIP4], "81", "tcp")),
        // Features that the program lacks, so that another one takes its place.
        3 => config.services.push(stage::service("six", &[VIP6], "80", "tcp")),
        4 => config.top.push_str("trace: true\n"),
        // Other maps.
        5 => config.top.push_str("limits: {slots: 65536, vips: 64}\n"),
        _ => {}
    }
    config.to_string()
}

#[test]
fn open_connections_survive_all_that_the_agent_goes_through() -> Result<()> {
    let Some(mut scene) = Scene::set("survive", CONNECTIONS, DOWNLOAD)? else { return Ok(()) };
    let link = scene.balancer.link_id()?;
    scene.step("kill -9 and a restart 2 s later", UNNOTICED, |scene| {
        scene.balancer.process.kill();
        sleep(Duration::from_secs(2));
        scene.balancer.restart()
    })?;
    scene.step("stopped for 3 s (SIGSTOP, SIGCONT)", UNNOTICED, |scene| {
        scene.balancer.process.signal(Signal::STOP)?;
        sleep(Duration::from_secs(3));
        scene.balancer.process.signal(Signal::CONT)
    })?;
    let own = scene.balancer.binary.clone();
    let other = other_build(&scene.stage.lab)?;
    scene.step("another build in its place", UNNOTICED, |scene| scene.balancer.upgrade(&other))?;
    scene.step("and back to the first", UNNOTICED, |scene| scene.balancer.upgrade(&own))?;
    scene.step("20 reloads", UNNOTICED, |scene| {
        (0..20).try_for_each(|number| scene.balancer.reload(&harmless(scene, number)))
    })?;
    ensure!(scene.balancer.link_id()? == link, "the interface was detached in between");
    scene.finish(DOWNLOAD)
}

/// TCP sends again after 0.2 s at the least, and waits twice as long each time.
fn retransmitted(gap: Duration) -> Duration {
    gap * 2 + Duration::from_secs(2)
}

#[test]
fn open_connections_survive_what_happens_to_links_and_neighbours() -> Result<()> {
    let Some(mut scene) = Scene::set("links", CONNECTIONS, DOWNLOAD)? else { return Ok(()) };
    let link = scene.balancer.link_id()?;
    scene.step("a backend's MAC changes", retransmitted(FOLLOWED), |scene| {
        scene.stage.backends[1].host.change_mac("eth0", [2, 0, 0, 0, 0xee, 1])
    })?;
    let down = Duration::from_millis(500);
    scene.step("the balancer's link is down for 0.5 s", retransmitted(down + FOLLOWED), |scene| {
        scene.stage.balancer.set_link("eth0", false)?;
        sleep(down);
        scene.stage.balancer.set_link("eth0", true)
    })?;
    ensure!(scene.balancer.link_id()? == link, "the interface was detached in between");
    let gone = Duration::from_secs(1);
    scene.step(
        "the balancer's NIC goes and comes back 1 s later",
        retransmitted(gone + ATTACHED),
        |scene| {
            scene.stage.balancer.delete_interface("eth0")?;
            sleep(gone);
            scene.stage.balancer.remake_interface(scene.stage.lab.lan(), "eth0")?;
            let back = Instant::now();
            wait_for("the program is on the new interface", PATIENCE, || {
                scene.balancer.program_id().is_ok()
            })?;
            let took = back.elapsed();
            println!("attached {took:?} after the NIC was back");
            ensure!(took <= ATTACHED, "attached only after {took:?}");
            Ok(())
        },
    )?;
    ensure!(scene.balancer.link_id()? != link, "the link of a device that is gone");
    scene.finish(DOWNLOAD)
}
