//! What becomes of live connections when their backend fails, leaves the file, or is no longer in their service's pool.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tests::balancer::Balancer;
use tests::held::{CHECKS, Held, PORT, SHORT_IDLE, all_live, of, service, shares, wait_until_reset};
use tests::lab::{Signal, SynFlood, wait_for};
use tests::stage::{self, BALANCER4, Config, PATIENCE, VIP4};

/// A pool with further keys.
fn with(keys: &str) -> impl FnOnce(Config) -> Config {
    let pool = keys.to_owned();
    |config| Config { pool, ..config }
}

#[test]
fn refused_connections_move_old_flows_at_once() -> Result<()> {
    let Some(held) = Held::set("downhard", 3, with("    down_grace: 1h\n"))? else { return Ok(()) };
    let old = held.open(60)?;
    held.stage.backends[0].nginx.process.kill();
    wait_until_reset(&old, &["web1"])?;
    let new = held.open(30)?;
    ensure!(of(&new, "web1") == 0, "{:?}", shares(&new));
    all_live(&new)
}

#[test]
fn wrong_answers_and_timeouts_move_old_flows_after_the_grace() -> Result<()> {
    // Whoever is asked in vain is down after two seconds.
    const GRACE: Duration = Duration::from_secs(6);
    let Some(held) = Held::set("downsoft", 4, with("    down_grace: 6s\n"))? else { return Ok(()) };
    let old = held.open(80)?;
    let begin = Instant::now();
    held.stage.backends[0].nginx.set_healthy(false)?;
    held.stage.backends[1].nginx.process.signal(Signal::STOP)?;
    held.wait_until_down("web1")?;
    held.wait_until_down("web2")?;
    let new = held.open(30)?;
    let shares = shares(&new);
    ensure!(!shares.contains_key("web1") && !shares.contains_key("web2"), "{shares:?}");
    wait_for("old flows move", PATIENCE, || !old.lost().is_empty())?;
    ensure!(begin.elapsed() >= GRACE, "after {:?}", begin.elapsed());
    wait_until_reset(&old, &["web1", "web2"])?;
    all_live(&new)
}

#[test]
fn with_on_down_keep_old_flows_stay_whatever_checks_say() -> Result<()> {
    let keys = format!("    on_down: keep\n{SHORT_IDLE}");
    let Some(held) = Held::set("downkeep", 3, with(&keys))? else { return Ok(()) };
    let old = held.open(60)?;
    held.stage.backends[0].nginx.process.kill();
    held.wait_until_down("web1")?;
    let new = held.open(30)?;
    ensure!(of(&new, "web1") == 0, "{:?}", shares(&new));
    all_live(&old)?;
    // Longer than silent flows are waited for.
    wait_for("its slots are others'", PATIENCE, || {
        held.backend("web1").is_ok_and(|backend| backend.slots_old == 0)
    })?;
    held.wait_until_pinned("web1", of(&old, "web1"))?;
    all_live(&old)?;
    all_live(&new)
}

#[test]
fn with_on_down_move_old_flows_go_whatever_failed() -> Result<()> {
    let Some(held) = Held::set("downmove", 3, with("    on_down: move\n"))? else { return Ok(()) };
    let old = held.open(60)?;
    held.stage.backends[0].nginx.set_healthy(false)?;
    wait_until_reset(&old, &["web1"])
}

#[test]
fn old_flows_of_a_backend_that_leaves_the_file_stay_or_move_as_it_says() -> Result<()> {
    let Some(mut held) = Held::set("leaving", 4, with(SHORT_IDLE))? else { return Ok(()) };
    let old = held.open(80)?;
    held.config.backends.remove(0);
    held.reload()?;
    let new = held.open(30)?;
    ensure!(of(&new, "web1") == 0, "{:?}", shares(&new));
    // Longer than silent flows are waited for: what is left are pins.
    held.wait_until_pinned("web1", of(&old, "web1"))?;
    wait_for("its slots are others'", PATIENCE, || {
        held.backend("web1").is_ok_and(|backend| backend.slots_old == 0)
    })?;
    held.balancer.command(&["status"])?.expect(0, &["draining (removed)"])?;
    all_live(&old)?;

    held.config.backends.remove(0);
    held.config.pool.push_str("    on_remove: move\n");
    held.reload()?;
    // Who is on its way out stays so.
    wait_until_reset(&old, &["web2"])?;
    old.wait_until_answered(Instant::now(), PATIENCE)?;
    wait_until_reset(&old, &["web2"])
}

/// Services that go by these pools; web3 is in `other`, where somebody else is at home.
fn two_pools(config: &Config, pool: &str) -> String {
    let (web, other) = config.backends.split_at(2);
    let resident = stage::service("resident", &[VIP4], "7001", "tcp").replace("pool: web", "pool: other");
    let services = vec![service("").replace("pool: web", &format!("pool: {pool}")), resident];
    let pools = format!("  other: {{forward: ipip, health: {CHECKS}, backends: [{}]}}\n", other.join(", "));
    let config = Config { backends: web.to_vec(), services, pool: SHORT_IDLE.to_owned(), ..config.clone() };
    config.to_string().replace("services:\n", &format!("{pools}services:\n"))
}

/// Tables that are private copies of others.
fn copies(balancer: &Balancer) -> Result<usize> {
    Ok(balancer.tables()?.table_states.iter().filter(|state| state.origin != 0).count())
}

#[test]
fn a_service_that_is_pointed_at_another_pool_takes_new_flows_there_and_leaves_old_ones() -> Result<()> {
    let Some(held) = Held::set("otherpool", 3, |config| config)? else { return Ok(()) };
    let balancer = &held.balancer;
    let idle = |pool| {
        let yaml = two_pools(&held.config, pool);
        yaml.replace("  other: {", "  other: {idle_timeout: {tcp: 2s}, ")
    };
    balancer.reload(&idle("web"))?;
    balancer.wait_for_backends(3, PATIENCE)?;
    wait_for("old flows of the first change are pinned", PATIENCE, || balancer.xlb(&["verify"]).is_ok())?;
    let old = held.open(60)?;
    ensure!(of(&old, "web3") == 0, "{:?}", shares(&old));

    balancer.reload(&idle("other"))?;
    ensure!(copies(balancer)? == 1, "no private copy");
    let new = held.open(30)?;
    ensure!(of(&new, "web3") == 30, "{:?}", shares(&new));
    all_live(&old)?;
    balancer.command(&["verify"])?.expect(0, &["no difference"])?;
    // With its two tables, web3 has all slots of both; those of the copy still lead old flows to where they are.
    let flows = old.all().len() as u64;
    let pinned = || -> Result<u64> { Ok(held.backend("web1")?.pins + held.backend("web2")?.pins) };
    wait_for("old flows are pinned", PATIENCE, || pinned().is_ok_and(|pins| pins == flows))?;
    wait_for("and need no slots", PATIENCE, || {
        ["web1", "web2"].iter().all(|name| held.backend(name).is_ok_and(|backend| backend.slots_old == 0))
    })?;
    balancer.command(&["status"])?.expect(0, &["pool other has 0 of 8192 slots on the move"])?;
    all_live(&old)?;

    drop(old);
    wait_for("the copy goes", PATIENCE, || copies(balancer).is_ok_and(|copies| copies == 0))?;
    all_live(&new)?;
    ensure!(held.backend("web3")?.slots == 4096);
    let told = balancer.xlb(&["status"])?;
    ensure!(!told.contains("on the move"), "{told}");
    balancer.command(&["verify"])?.expect(0, &["no difference"])
}

fn yielded(balancer: &Balancer) -> Result<u64> {
    let socket = balancer.run_dir.join("xlb.sock");
    let socket = socket.to_string_lossy();
    let text = balancer.host.run(["curl", "--silent", "--unix-socket", &*socket, "http://xlb/metrics"])?;
    let value =
        text.lines().find_map(|line| line.strip_prefix("xlb_pool_slots_yielded_total{pool=\"web\"} "));
    Ok(value.map_or(Ok(0), str::parse)?)
}

#[test]
fn without_room_for_pins_new_clients_do_not_go_to_a_backend_that_is_down() -> Result<()> {
    let change =
        |config| Config { top: "limits: {pins: 4096}".to_owned(), ..with("    down_grace: 1h\n")(config) };
    let Some(held) = Held::set("noroom", 3, change)? else { return Ok(()) };
    let flooder = held.stage.lab.host("flooder", &["10.111.0.99/24"])?;
    flooder.route(&format!("{VIP4}/32 via {BALANCER4}"))?;
    let old = held.open(60)?;
    held.stage.backends[0].nginx.set_healthy(false)?;
    held.wait_until_down("web1")?;
    held.wait_until_pinned("web1", of(&old, "web1"))?;
    let slots_old = || held.backend("web1").map(|backend| backend.slots_old);
    ensure!(slots_old()? > 1000 && yielded(&held.balancer)? == 0, "while there is room");

    let vip = format!("{VIP4}:{PORT}").parse()?;
    let flood = SynFlood::start(&flooder, vip, 5000, PATIENCE)?;
    wait_for("its slots are others'", PATIENCE, || slots_old().is_ok_and(|slots| slots == 0))?;
    flood.stop()?;
    ensure!(yielded(&held.balancer)? > 1000);
    held.balancer.process.wait_for_log("raise limits.pins", PATIENCE)?;
    let said = held.balancer.process.log().matches("raise limits.pins").count();
    ensure!(said == 1, "said {said} times");
    // Who has a pin stays.
    all_live(&old)
}
