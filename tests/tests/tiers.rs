//! Pools that take each other's place, panic, and backends that get their share bit by bit: with real clients.

use std::collections::BTreeSet;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lb_userspace::agent::status::PoolStatus;
use tests::balancer::Balancer;
use tests::lab::{self, Signal, wait_for};
use tests::stage::{self, Config, PATIENCE, Stage, URL4, URLS};

const HEALTH: &str = "{type: http, path: /healthz, interval: 500ms, timeout: 500ms, rise: 1, fall: 2}";

const HOLD: Duration = Duration::from_secs(2);

/// A configuration with the first backends in `web`, and each of the others in a pool of its own, named so.
fn regions(stage: &Stage, web: usize, keys: &str, others: &[&str]) -> String {
    let config = Config { health: HEALTH.to_owned(), pool: keys.to_owned(), ..stage.config() };
    let own = Config { backends: config.backends[..web].to_vec(), ..config.clone() };
    let pools = others.iter().zip(&config.backends[web..]).map(|(name, backend)| {
        format!("  {name}: {{forward: ipip, health: {HEALTH}, backends: [{backend}]}}\n")
    });
    own.to_string().replace("services:\n", &format!("{}services:\n", pools.collect::<String>()))
}

fn web(balancer: &Balancer) -> Result<PoolStatus> {
    let pools = balancer.status()?.pools;
    pools.into_iter().find(|pool| pool.name == "web").context("a pool web")
}

fn wait_for_use_of(balancer: &Balancer, pool: &str) -> Result<Instant> {
    wait_for(&format!("{pool} is in use"), PATIENCE, || web(balancer).is_ok_and(|web| web.in_use == pool))
        .with_context(|| balancer.process.log())?;
    let then = Instant::now();
    let told = || balancer.command(&["verify"]).is_ok_and(|verified| verified.code == Some(0));
    wait_for("the kernel knows", PATIENCE, told)?;
    Ok(then)
}

/// Who answers the client.
fn answering(stage: &Stage) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for url in URLS {
        let requests = lab::http_load(&stage.client, url, 60, 4)?;
        stage::none_failed(&requests)?;
        names.extend(lab::backends(&requests).into_keys().map(str::to_owned));
    }
    Ok(names)
}

/// Waits until these answer, and nobody else; meanwhile no request fails.
///
/// The kernel does as the agent said step by step: for a moment, the backends of before may answer.
fn expect(stage: &Stage, names: &[&str]) -> Result<()> {
    let mut got = answering(stage);
    wait_for(&format!("{names:?} answer"), PATIENCE, || {
        let is_over = got.as_ref().map_or(true, |got| got.iter().eq(names));
        if !is_over {
            got = answering(stage);
        }
        is_over
    })
    .with_context(|| format!("{got:?} answer"))?;
    got.map(drop)
}

#[test]
fn a_pool_falls_back_to_the_next_region_and_returns_after_the_hold() -> Result<()> {
    let Some(stage) = Stage::set("regions", 4)? else { return Ok(()) };
    let keys = "    fallback: [near, far]\n    min_healthy: 2\n    failback_hold: 2s\n";
    let yaml = regions(&stage, 2, keys, &["near", "far"]);
    let balancer = Balancer::start(&stage.balancer, &stage.lab.dir().join("xlb"), &yaml)?;
    balancer.wait_for_backends(4, PATIENCE)?;
    wait_for_use_of(&balancer, "web")?;
    expect(&stage, &["web1", "web2"])?;

    // One of two is up, and fewer than asked for.
    stage.backends[0].nginx.set_healthy(false)?;
    wait_for_use_of(&balancer, "near")?;
    expect(&stage, &["web3"])?;
    let told = balancer.xlb(&["status"])?;
    ensure!(
        told.contains("pool web falls back to near: 1 of its 2 backends are up, and 2 must be"),
        "{told}"
    );
    stage.backends[2].nginx.set_healthy(false)?;
    wait_for_use_of(&balancer, "far")?;
    expect(&stage, &["web4"])?;

    // Better regions return in their time, the nearer one first where it has waited as long.
    let healed = Instant::now();
    stage.backends[2].nginx.set_healthy(true)?;
    let returned = wait_for_use_of(&balancer, "near")?;
    ensure!(returned - healed >= HOLD, "returned after {:?}", returned - healed);
    expect(&stage, &["web3"])?;
    let healed = Instant::now();
    stage.backends[0].nginx.set_healthy(true)?;
    let returned = wait_for_use_of(&balancer, "web")?;
    ensure!(returned - healed >= HOLD, "returned after {:?}", returned - healed);
    expect(&stage, &["web1", "web2"])?;

    // With nobody left anywhere else, one is better than none.
    for backend in [0, 2, 3] {
        stage.backends[backend].nginx.set_healthy(false)?;
    }
    balancer.wait_for_backends(1, PATIENCE)?;
    wait_for_use_of(&balancer, "web")?;
    expect(&stage, &["web2"])
}

#[test]
fn an_agent_that_is_killed_leaves_and_finds_the_pool_in_use() -> Result<()> {
    let Some(stage) = Stage::set("regionskept", 2)? else { return Ok(()) };
    let yaml = regions(&stage, 1, "    fallback: far\n    failback_hold: 1h\n", &["far"]);
    let mut balancer = Balancer::start(&stage.balancer, &stage.lab.dir().join("xlb"), &yaml)?;
    balancer.wait_for_backends(2, PATIENCE)?;
    stage.backends[0].nginx.set_healthy(false)?;
    wait_for_use_of(&balancer, "far")?;
    stage.backends[0].nginx.set_healthy(true)?;
    balancer.wait_for_backends(2, PATIENCE)?;

    balancer.process.signal(Signal::KILL)?;
    balancer.process.wait_exit(PATIENCE)?;
    expect(&stage, &["web2"])?;
    balancer.restart()?;
    balancer.wait_for_backends(2, PATIENCE)?;
    ensure!(web(&balancer)?.in_use == "far", "{}", balancer.process.log());
    expect(&stage, &["web2"])?;
    let told = balancer.command(&["verify"])?;
    told.expect(0, &[])?;

    // A reload that leaves the pools alone leaves them where they are; one that takes the fallback away does not.
    balancer.reload(&yaml.replace("failback_hold: 1h", "failback_hold: 2h"))?;
    ensure!(web(&balancer)?.in_use == "far", "{}", balancer.process.log());
    balancer.reload(&yaml.replace("    fallback: far\n    failback_hold: 1h\n", ""))?;
    ensure!(web(&balancer)?.in_use == "web");
    expect(&stage, &["web1"])
}

#[test]
fn in_panic_all_backends_get_packets_until_enough_are_up() -> Result<()> {
    let Some(stage) = Stage::set("panic", 3)? else { return Ok(()) };
    let yaml = regions(&stage, 3, "    panic: 50%\n", &[]);
    let balancer = Balancer::start(&stage.balancer, &stage.lab.dir().join("xlb"), &yaml)?;
    balancer.wait_for_backends(3, PATIENCE)?;
    stage.backends[0].nginx.set_healthy(false)?;
    balancer.wait_for_backends(2, PATIENCE)?;
    expect(&stage, &["web2", "web3"])?;
    ensure!(!web(&balancer)?.panic);

    stage.backends[1].nginx.set_healthy(false)?;
    balancer.wait_for_backends(1, PATIENCE)?;
    wait_for("panic", PATIENCE, || web(&balancer).is_ok_and(|web| web.panic))?;
    // They fail their checks and answer all the same.
    expect(&stage, &["web1", "web2", "web3"])?;
    ensure!(balancer.process.log().contains("panic: too few backends are up"));
    let told = balancer.xlb(&["status"])?;
    ensure!(told.contains("pool web is in panic"), "{told}");

    stage.backends[1].nginx.set_healthy(true)?;
    balancer.wait_for_backends(2, PATIENCE)?;
    wait_for("its end", PATIENCE, || web(&balancer).is_ok_and(|web| !web.panic))?;
    expect(&stage, &["web2", "web3"])
}

/// Percent of a pool's slots that a backend holds, and percent of its share while it starts.
fn shares(balancer: &Balancer, name: &str) -> Result<(f64, Option<f64>)> {
    let backends = balancer.backends()?;
    let all: u64 = backends.iter().map(|backend| backend.slots).sum();
    let backend = backends.into_iter().find(|backend| backend.name == name).context("the backend")?;
    Ok((backend.slots as f64 * 100.0 / all as f64, backend.starting))
}

/// The shares of a backend until it has started.
fn starts(balancer: &Balancer, name: &str) -> Result<Vec<f64>> {
    let (mut seen, begin) = (Vec::new(), Instant::now());
    loop {
        let (share, starting) = shares(balancer, name)?;
        if starting.is_none() && share > 0.0 {
            return Ok(seen);
        }
        seen.extend((share > 0.0).then_some(share));
        ensure!(begin.elapsed() < PATIENCE + PATIENCE, "{name} still starts: {seen:?}");
        sleep(Duration::from_millis(200));
    }
}

#[test]
fn a_backend_that_comes_up_gets_its_share_bit_by_bit() -> Result<()> {
    let Some(mut stage) = Stage::set("slowstart", 2)? else { return Ok(()) };
    let with = |stage: &Stage, web| regions(stage, web, "    slow_start: 6s\n", &[]);
    let balancer = Balancer::start(&stage.balancer, &stage.lab.dir().join("xlb"), &with(&stage, 2))?;
    balancer.wait_for_backends(2, PATIENCE)?;
    // The start of the agent is not theirs.
    for name in ["web1", "web2"] {
        let (share, starting) = shares(&balancer, name)?;
        ensure!(starting.is_none() && (share - 50.0).abs() < 1.0, "{name}: {share} %, {starting:?}");
    }
    let before = balancer.places()?;

    stage.backends[1].nginx.set_healthy(false)?;
    balancer.wait_for_backends(1, PATIENCE)?;
    expect(&stage, &["web1"])?;
    stage.backends[1].nginx.set_healthy(true)?;
    balancer.wait_for_backends(2, PATIENCE)?;
    let seen = starts(&balancer, "web2")?;
    ensure!(seen.is_sorted(), "{seen:?}");
    let steps: BTreeSet<u64> = seen.iter().map(|share| share.round() as u64).collect();
    ensure!(steps.len() >= 3 && seen[0] < 30.0, "not bit by bit: {seen:?}");
    wait_for("flows where they were", PATIENCE, || balancer.places().is_ok_and(|places| places == before))?;
    stage.balances(URL4, 200, 2)?;

    // One that comes with a reload starts, too; the others do not notice.
    stage.add_backend()?;
    balancer.reload(&with(&stage, 3))?;
    balancer.wait_for_backends(3, PATIENCE)?;
    let (_, starting) = shares(&balancer, "web1")?;
    ensure!(starting.is_none());
    let seen = starts(&balancer, "web3")?;
    ensure!(seen.is_sorted() && seen[0] < 20.0, "{seen:?}");
    stage.balances(URL4, 300, 3)
}
