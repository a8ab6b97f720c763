//! Thousands of connections live through everything that is done to backends, configuration and agent, in peace and
//! under a SYN flood; only those of a backend that dies may end.

use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use tests::crowd::{Crowd, Dies, IDLE, TUNNELS, Way};
use tests::lab::Signal;
use tests::stage::{self, PATIENCE};

const CONNECTIONS: usize = 5000;
const FEW: usize = 600;

/// One crowd at a time: another one beside it would show in the stalls.
static ALONE: Mutex<()> = Mutex::new(());

/// SYNs a second, far more than there is room for pins.
const FLOOD: u32 = 10_000;
const FLOOD_LASTS: Duration = Duration::from_secs(60);
const FEW_PINS: Way<'_> = Way { top: "limits: {pins: 16384}\n", ..TUNNELS };

#[test]
fn connections_live_through_every_change_and_only_those_of_the_dead_end() -> Result<()> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut crowd) = Crowd::gather("unbroken", 4, CONNECTIONS, TUNNELS)? else { return Ok(()) };
    backends_come_and_go(&mut crowd)?;
    twenty_reloads(&mut crowd)?;
    crowd.balancer.xlb(&["backend", "drain", "web/web1"])?;
    crowd.wait_until_served_by(&[1, 2, 3, 4])?;
    crowd.tell("web1 drained by command");
    crowd.lives_through_its_agent()?;
    crowd.wait_until_served_by(&[1, 2, 3, 4])?;
    crowd.balancer.xlb(&["backend", "enable", "web/web1"])?;
    crowd.wait_until_served_by(&[0, 1, 2, 3, 4])?;
    crowd.tell("web1 enabled");

    crowd.dies(3, Dies::Process)?;
    crowd.heals(3)?;
    crowd.tell("web4 killed and healed");
    crowd.dies(4, Dies::Link)?;
    crowd.heals(4)?;
    crowd.tell("web5 cut off and healed");
    crowd.settles()?;
    crowd.verdict()
}

fn backends_come_and_go(crowd: &mut Crowd) -> Result<()> {
    changes(crowd, |crowd, step| match step {
        Step::Added => crowd.wait_until_served_by(&[0, 1, 2, 3, 4]),
        Step::Reweighted => Ok(()),
        Step::Drained => crowd.wait_until_served_by(&[0, 2, 3, 4]),
        Step::Removed => crowd.wait_until_served_by(&[0, 3, 4]),
    })?;
    // Nothing but pins holds those of web2 and web3 there from now on.
    crowd.settles()?;
    crowd.tell("all slots moved");
    drained_ones_keep_theirs(crowd)?;
    crowd.config.backends = (0..5).map(|index| stage::backend(index, false)).collect();
    crowd.reload()?;
    crowd.wait_until_served_by(&[0, 1, 2, 3, 4])?;
    crowd.tell("all back");
    Ok(())
}

enum Step {
    Added,
    Reweighted,
    Drained,
    Removed,
}

/// A backend comes, one takes less, one is drained, one leaves the file; `then` sees each.
fn changes(crowd: &mut Crowd, then: impl Fn(&mut Crowd, Step) -> Result<()>) -> Result<()> {
    crowd.add_backend()?;
    crowd.config.backends.push(stage::backend(4, false));
    crowd.reload()?;
    then(crowd, Step::Added)?;
    crowd.tell("web5 added");

    crowd.config.backends[0] = stage::weighted(0, false, 30);
    crowd.reload()?;
    then(crowd, Step::Reweighted)?;
    crowd.tell("web1 has less weight");

    crowd.config.backends[1] = stage::weighted(1, false, 0);
    crowd.reload()?;
    then(crowd, Step::Drained)?;
    crowd.tell("web2 drained");

    crowd.config.backends.remove(2);
    crowd.reload()?;
    then(crowd, Step::Removed)?;
    crowd.tell("web3 removed");
    Ok(())
}

fn drained_ones_keep_theirs(crowd: &Crowd) -> Result<()> {
    let places = crowd.places();
    ensure!(["web2", "web3"].iter().all(|name| places[*name] > CONNECTIONS / 8), "{places:?}");
    Ok(())
}

fn twenty_reloads(crowd: &mut Crowd) -> Result<()> {
    for round in 0..20 {
        crowd.config.backends[round % 5] = stage::weighted(round % 5, false, 40 + 3 * round as u8);
        crowd.reload()?;
    }
    crowd.tell("20 reloads");
    Ok(())
}

/// Connections that a drained backend keeps in dirty slots, then by their pins alone.
#[test]
fn connections_live_through_other_limits_in_the_midst_of_a_drain_and_after_it() -> Result<()> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut crowd) = Crowd::gather("otherlimits", 4, FEW, FEW_PINS)? else { return Ok(()) };
    crowd.config.backends[0] = stage::weighted(0, false, 0);
    crowd.reload()?;
    crowd.wait_until_served_by(&[1, 2, 3])?;
    let (more, less) =
        ("slots: 4194304, backends: 8000, pins: 131072", "slots: 65536, vips: 64, pins: 65536");
    other_limits(&mut crowd, more, Crowd::reload)?;
    other_limits(&mut crowd, less, Crowd::reload)?;
    crowd.settles()?;
    // Nothing but pins holds those of web1 from now on.
    other_limits(&mut crowd, "pins: 8192", Crowd::reload)?;
    other_limits(&mut crowd, "", Crowd::reload)?;
    other_limits(&mut crowd, less, begins_anew)?;
    crowd.wait_until_served_by(&[1, 2, 3])?;
    crowd.verdict()
}

fn begins_anew(crowd: &mut Crowd) -> Result<()> {
    crowd.balancer.process.signal(Signal::KILL)?;
    crowd.balancer.process.wait_exit(PATIENCE)?;
    std::fs::write(&crowd.balancer.config, crowd.config.to_string())?;
    crowd.balancer.restart()?;
    crowd.balancer.process.wait_for_log("running", PATIENCE)
}

fn other_limits(crowd: &mut Crowd, limits: &str, take: fn(&mut Crowd) -> Result<()>) -> Result<()> {
    let rows = crowd.balancer.tables()?.pins.words().len();
    crowd.config.top = format!("limits: {{{limits}}}\n");
    take(crowd)?;
    ensure!(crowd.balancer.tables()?.pins.words().len() != rows, "{limits}: the maps are the same");
    crowd.wait_until_all_answer()?;
    crowd.tell(limits);
    let places = crowd.places();
    ensure!(places.get("web1").is_some_and(|kept| *kept > FEW / 8), "{limits}: {places:?}");
    Ok(())
}

/// Most SYNs find no room for a pin: new clients go where old ones go, drained or not, and drains take longer.
#[test]
fn fault_11_a_syn_flood_during_changes_breaks_nothing_and_new_clients_are_served() -> Result<()> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut crowd) = Crowd::gather("synflood", 4, CONNECTIONS, FEW_PINS)? else { return Ok(()) };
    let flood = crowd.flood(FLOOD, FLOOD_LASTS)?;
    changes(&mut crowd, |_, _| Ok(()))?;
    crowd.lives_through_its_agent()?;
    sleep(IDLE * 2);
    drained_ones_keep_theirs(&crowd)?;
    crowd.tell("flooded for longer than the idle time");
    // Its old flows stay with it for a while, as it may only be slow; new ones must not.
    crowd.dies(3, Dies::Link)?;
    crowd.tell("web4 cut off");
    crowd.wait_until_all_are_served(PATIENCE)?;
    let sent = flood.stop()?;
    println!("{sent} SYNs");
    ensure!(sent > u64::from(FLOOD), "{sent} SYNs are no flood");
    crowd.heals(3)?;
    crowd.verdict()
}
