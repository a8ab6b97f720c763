//! Backends that fail and heal under traffic: how long requests fail, whose flows move, and what becomes of a
//! pool that has nobody.

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tests::balancer::Balancer;
use tests::lab::{self, HttpLoad, wait_for};
use tests::stage::{self, Config, PATIENCE, Stage, URL4, URLS, VIP4, VIP6};

const HEALTH: &str = "{type: http, path: /healthz, interval: 300ms, timeout: 300ms, rise: 2, fall: 3}";

/// fall x interval + timeout of [`HEALTH`], and 0.2 s of slack.
const DETECTION_WINDOW: Duration = Duration::from_millis(3 * 300 + 300 + 200);

const SHORT: Duration = Duration::from_millis(400);

/// Where the packet path sends some flows just now. No client's own connections have these ports, and pins.
fn places(balancer: &Balancer) -> Result<BTreeMap<u16, String>> {
    (2000..2100)
        .map(|port| Ok((port, balancer.lookup(&format!("10.111.0.2:{port}"), &format!("{VIP4}:80"))?)))
        .collect()
}

/// As many requests as one client of a modest rate sends until it is stopped.
fn steady() -> HttpLoad {
    HttpLoad::new(URL4, 100_000).parallel(4).rate(50).timeouts(SHORT, Duration::from_secs(3))
}

#[test]
fn a_killed_backend_fails_requests_no_longer_than_its_detection_takes() -> Result<()> {
    let Some(mut stage) = Stage::set("killed", 3)? else { return Ok(()) };
    let balancer = stage.start(&Config { health: HEALTH.to_owned(), ..stage.config() })?;
    let before = places(&balancer)?;

    let load = steady().start(&stage.client)?;
    sleep(Duration::from_millis(300));
    let killed = Instant::now();
    stage.backends[1].nginx.process.kill();
    balancer.wait_for_backends(2, PATIENCE)?;
    sleep(DETECTION_WINDOW.saturating_sub(killed.elapsed()) + Duration::from_millis(400));
    let after = places(&balancer)?;
    let requests = load.stop()?;

    let failed = lab::failures(&requests);
    ensure!(!failed.is_empty(), "the kill was not noticed by clients: nothing is proved");
    for request in &failed {
        ensure!(request.start + request.duration >= killed, "failed before the kill: {request:?}");
        let late = request.start.saturating_duration_since(killed);
        ensure!(late <= DETECTION_WINDOW, "failed {late:?} after the kill: {request:?}");
    }
    for (port, place) in &before {
        let now = &after[port];
        ensure!(if place == "web2" { now != "web2" } else { now == place }, "{port}: {place} to {now}");
    }
    let down = balancer.backends()?.remove(1);
    ensure!(down.state == "down" && down.slots == 0 && down.check.contains("refused"), "{down:?}");

    stage.backends[1].heal()?;
    balancer.wait_for_backends(3, PATIENCE)?;
    ensure!(places(&balancer)? == before, "healing does not bring back exactly what was lost");
    stage.balances(URL4, 300, 3)
}

#[test]
fn a_backend_that_answers_503_leaves_without_a_failed_request() -> Result<()> {
    let Some(stage) = Stage::set("drained", 3)? else { return Ok(()) };
    let balancer = stage.start(&Config { health: HEALTH.to_owned(), ..stage.config() })?;
    let load = steady().start(&stage.client)?;
    sleep(Duration::from_millis(300));
    let begin = Instant::now();
    stage.backends[1].nginx.set_healthy(false)?;
    balancer.wait_for_backends(2, PATIENCE)?;
    let end = Instant::now();
    sleep(Duration::from_millis(500));
    let requests = load.stop()?;
    stage::none_failed_but_in_flight(&requests, 4, [begin, end])?;
    let status = balancer.backends()?.remove(1);
    ensure!(status.state == "down" && status.check.contains("503"), "{status:?}");
    stage.balances(URL4, 200, 2)?;

    stage.backends[1].nginx.set_healthy(true)?;
    balancer.wait_for_backends(3, PATIENCE)?;
    stage.balances(URL4, 300, 3)
}

#[test]
fn a_pool_without_a_living_backend_drops_until_one_heals() -> Result<()> {
    let Some(mut stage) = Stage::set("empty", 2)? else { return Ok(()) };
    let balancer = stage.start(&Config { health: HEALTH.to_owned(), ..stage.config() })?;
    stage.balances(URL4, 100, 2)?;
    let said_empty = || balancer.process.log().matches("pool has no backend that is up").count();
    let said_before = said_empty();
    for backend in &stage.backends {
        backend.nginx.process.kill();
    }
    balancer.wait_for_backends(0, PATIENCE)?;
    let before = balancer.outcome("drop_no_backend")?;
    for url in URLS {
        ensure!(lab::http_get_within(&stage.client, url, SHORT, SHORT).is_err(), "{url} is answered");
    }
    ensure!(balancer.outcome("drop_no_backend")? >= before + 2);
    ensure!(said_empty() == said_before + 1, "{}", balancer.process.log());
    // Nobody is a decision, and the command's exit code says that nobody takes the flow.
    let told = balancer.xlb(&["lookup", "10.111.0.2:40000", &format!("{VIP4}:80")]);
    ensure!(told.is_err(), "{told:?}");

    stage.backends[0].heal()?;
    balancer.wait_for_backends(1, PATIENCE)?;
    for url in URLS {
        ensure!(lab::http_get(&stage.client, url)?.1 == "web1\n", "{url}");
    }
    stage.backends[1].heal()?;
    balancer.wait_for_backends(2, PATIENCE)?;
    stage.balances(URL4, 200, 2)
}

#[test]
fn on_empty_all_sends_to_every_backend_as_if_it_were_up() -> Result<()> {
    let Some(stage) = Stage::set("emptyall", 2)? else { return Ok(()) };
    for backend in &stage.backends {
        backend.nginx.set_healthy(false)?;
    }
    let config =
        Config { health: HEALTH.to_owned(), pool: "    on_empty: all\n".to_owned(), ..stage.config() };
    let balancer = Balancer::start(&stage.balancer, &stage.lab.dir().join("xlb"), &config.to_string())?;
    wait_for("both down", PATIENCE, || {
        balancer.backends().is_ok_and(|backends| backends.iter().all(|backend| backend.state == "down"))
    })?;
    stage.balances(URL4, 200, 2)
}

#[test]
fn a_port_that_hangs_is_down_after_its_timeouts() -> Result<()> {
    let Some(stage) = Stage::set("hangs", 2)? else { return Ok(()) };
    let balancer = stage.start(&Config { health: HEALTH.to_owned(), ..stage.config() })?;
    let stopped = Instant::now();
    // The kernel still accepts connections for it; only an answer tells.
    stage.backends[0].nginx.process.signal(lab::Signal::STOP)?;
    balancer.wait_for_backends(1, PATIENCE)?;
    let took = stopped.elapsed();
    ensure!(took >= Duration::from_millis(600), "down after {took:?}: before three checks can have failed");
    let status = balancer.backends()?.remove(0);
    ensure!(status.state == "down" && status.check.contains("timed out"), "{status:?}");
    for vip in [VIP4, VIP6] {
        let (client, vip) = if vip == VIP4 {
            ("10.111.0.2:40000".to_owned(), format!("{vip}:80"))
        } else {
            ("[fd00:111::2]:40000".to_owned(), format!("[{vip}]:80"))
        };
        ensure!(balancer.lookup(&client, &vip)? == "web2");
    }
    stage.backends[0].nginx.process.signal(lab::Signal::CONT)?;
    balancer.wait_for_backends(2, PATIENCE)
}
