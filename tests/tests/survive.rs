//! Connections that were open before and a download that goes on, through everything that happens to the agent.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use tests::balancer::other_build;
use tests::lab::Signal;
use tests::scene::Scene;
use tests::stage::{self, VIP4, VIP6};

const CONNECTIONS: usize = 1000;
const DOWNLOAD: Duration = Duration::from_secs(60);

/// Nothing that the agent goes through concerns packets: what shows is the machine's load.
const UNNOTICED: Duration = Duration::from_secs(1);

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
