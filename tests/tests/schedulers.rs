//! Where new connections go by each scheduler that is no hash, and that live ones stay where they are, whatever happens to
//! backends, file and agent.

use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_userspace::lookup::Explanation;
use tests::held::{Held, PORT, all_live, of, service, shares};
use tests::lab::{Connections, DatagramServer, LateServer, wait_for};
use tests::stage::{self, Config, PATIENCE, Stage, VIP4};

fn with(scheduler: &str) -> impl FnOnce(Config) -> Config {
    let services = vec![service(&format!(", scheduler: {scheduler}"))];
    |config| Config { services, ..config }
}

fn weighted(scheduler: &str, weights: &'static [u8]) -> impl FnOnce(Config) -> Config {
    let with = with(scheduler);
    let backends = weights.iter().enumerate().map(|(index, weight)| stage::weighted(index, false, *weight));
    move |config| Config { backends: backends.collect(), ..with(config) }
}

fn expect(connections: &Connections, expected: &[(&str, usize)], slack: usize) -> Result<()> {
    let shares = shares(connections);
    let near = expected
        .iter()
        .all(|(name, count)| shares.get(*name).copied().unwrap_or(0).abs_diff(*count) <= slack);
    ensure!(near && shares.len() <= expected.len(), "{shares:?} instead of {expected:?}");
    Ok(())
}

/// A host more, one that is drained, and an agent that is killed: nobody who is there notices, and those who come go to
/// whom they should.
fn live_connections_stay(held: &mut Held, old: &Connections) -> Result<()> {
    held.take_in()?;
    all_live(old)?;
    held.balancer.command(&["backend", "drain", "web/web1"])?.expect(0, &[])?;
    let new = held.open(30)?;
    ensure!(of(&new, "web1") == 0, "{:?}", shares(&new));
    all_live(old)?;
    held.balancer.process.kill();
    let orphans = held.open(30)?;
    held.balancer.restart()?;
    let newest = held.open(30)?;
    let latest = stage::name(held.config.backends.len() - 1);
    for connections in [&new, &orphans, &newest] {
        let shares = shares(connections);
        ensure!(!shares.contains_key("web1") && shares.contains_key(&latest), "{shares:?}");
        all_live(connections)?;
    }
    all_live(old)
}

/// A live connection is where its pin says, whoever's turn it is; one that may come may go to anybody.
fn lookup_tells_pins_from_turns(held: &Held, old: &Connections) -> Result<()> {
    let vip = format!("{VIP4}:{PORT}");
    let told = |source: &str| -> Result<Explanation> {
        Ok(serde_json::from_str(&held.balancer.xlb(&["lookup", source, &vip, "-o", "json"])?)?)
    };
    for connection in old.all().iter().take(6) {
        let told = told(&connection.local.to_string())?;
        ensure!(told.chosen_by.as_deref() == Some("pin") && told.picks.is_none(), "{told:?}");
        ensure!(told.backend.as_deref() == Some(&connection.server), "{told:?} {connection:?}");
    }
    let other = told("10.111.0.2:1")?;
    ensure!(other.chosen_by.as_deref() == Some("scheduler"), "{other:?}");
    ensure!(other.picks.is_some_and(|picks| picks.how == "in turn" && picks.backends == 3));
    let line = held.balancer.command(&["lookup", "10.111.0.2:1", &vip])?;
    line.expect(0, &["backend   any of 3, in turn; say web/web", "a pin for each flow"])
}

#[test]
fn in_round_robin_everybody_has_its_turn_whatever_its_weight() -> Result<()> {
    let Some(mut held) = Held::set("roundrobin", 3, weighted("round-robin", &[100, 50, 1]))? else {
        return Ok(());
    };
    let old = held.open(90)?;
    expect(&old, &[("web1", 30), ("web2", 30), ("web3", 30)], 0)?;
    lookup_tells_pins_from_turns(&held, &old)?;
    held.add_host()?;
    live_connections_stay(&mut held, &old)
}

#[test]
fn in_weighted_round_robin_turns_follow_weights() -> Result<()> {
    let Some(mut held) = Held::set("weightedrobin", 4, weighted("weighted-round-robin", &[100, 50, 25, 0]))?
    else {
        return Ok(());
    };
    let old = held.open(70)?;
    expect(&old, &[("web1", 40), ("web2", 20), ("web3", 10)], 0)?;
    held.add_host()?;
    live_connections_stay(&mut held, &old)
}

#[test]
fn random_follows_weights_roughly() -> Result<()> {
    let Some(mut held) = Held::set("random", 3, weighted("random", &[100, 100, 50]))? else { return Ok(()) };
    let old = held.open(250)?;
    // Six standard deviations.
    expect(&old, &[("web1", 100), ("web2", 100), ("web3", 50)], 46)?;
    held.add_host()?;
    live_connections_stay(&mut held, &old)
}

#[test]
fn least_connections_prefers_who_has_fewer_and_ended_ones_do_not_count() -> Result<()> {
    let Some(mut held) = Held::set("leastconn", 1, with("least-connections"))? else { return Ok(()) };
    let old = held.open(200)?;
    held.add_host()?;
    held.take_in()?;
    // The idle one is taken whenever it is one of the two: three times of four. By chance alone it would get half, and
    // 125 is more than three standard deviations from both.
    let new = held.open(200)?;
    ensure!(of(&new, "web2") > 125, "{:?}", shares(&new));
    all_live(&old)?;

    drop(old);
    let counted = |name: &str| held.backend(name).map(|backend| backend.pins);
    wait_for("their ends are counted", PATIENCE, || counted("web1").is_ok_and(|pins| pins < 100))?;
    let later = held.open(60)?;
    ensure!(of(&later, "web1") > of(&later, "web2"), "{:?} {:?}", shares(&new), shares(&later));
    drop(later);
    held.add_host()?;
    live_connections_stay(&mut held, &new)
}

#[test]
fn least_response_time_sends_fewer_to_one_who_answers_checks_slowly() -> Result<()> {
    let Some(stage) = Stage::set("leasttime", 3)? else { return Ok(()) };
    let after = [20, 150, 20].map(Duration::from_millis);
    let late = stage.backends.iter().zip(after);
    let late = late.map(|(backend, after)| LateServer::start(&backend.host, 8080, after));
    let mut late = late.collect::<Result<Vec<_>>>()?;
    let change = |config: Config| {
        let health = config.health.replace("port: 80", "port: 8080");
        with("least-response-time")(Config { health, ..config })
    };
    let mut held = Held::on(stage, change)?;
    let slots = |name: &str| held.backend(name).map(|backend| backend.slots);
    wait_for("weights follow", PATIENCE, || {
        let all = ["web1", "web2", "web3"].map(|name| slots(name).unwrap_or(0));
        all[1] > 0 && all[1] * 3 < all[0] && all[1] * 3 < all[2]
    })
    .with_context(|| held.balancer.process.log())?;
    let old = held.open(60)?;
    let slow = of(&old, "web2");
    ensure!((1..15).contains(&slow), "{:?}", shares(&old));
    late.push(LateServer::start(&held.add_host()?, 8080, after[0])?);
    live_connections_stay(&mut held, &old)
}

/// Asks twice on each of so many flows, one flow after the other: who answered each. All stay open: a port that comes a
/// second time would be a flow that is known.
fn ask_twice(stage: &Stage, flows: usize) -> Result<Vec<[String; 2]>> {
    let ask = |socket: &UdpSocket| -> Result<String> {
        let mut answer = [0; 64];
        socket.send(b"who?")?;
        let length = socket.recv(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer[4..length]).into_owned())
    };
    let flow = |_| -> Result<(UdpSocket, [String; 2])> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.connect((VIP4, 5353))?;
        let answers = [ask(&socket)?, ask(&socket)?];
        Ok((socket, answers))
    };
    let flows: Vec<_> = stage.client.inside(|| (0..flows).map(flow).collect::<Result<_>>())??;
    Ok(flows.into_iter().map(|(_, answers)| answers).collect())
}

#[test]
fn datagrams_of_a_flow_that_is_known_take_no_turn() -> Result<()> {
    let Some(stage) = Stage::set("udprobin", 2)? else { return Ok(()) };
    let address = format!("{VIP4}:5353").parse()?;
    let servers = stage.backends.iter().map(|backend| DatagramServer::start(&backend.host, address));
    let _servers = servers.collect::<Result<Vec<_>>>()?;
    let service = stage::service("echo", &[VIP4], "5353", "udp");
    let services = vec![service.replace("pool: web", "pool: web, scheduler: round-robin")];
    let health = stage::PATIENT_CHECKS.replace("type: http,", "type: http, port: 80,");
    let _balancer = stage.start(&Config { services, health, ..stage.config() })?;
    let mut shares: BTreeMap<String, usize> = BTreeMap::new();
    for [first, second] in ask_twice(&stage, 40)? {
        ensure!(first == second, "{first}, then {second}");
        *shares.entry(first).or_default() += 1;
    }
    ensure!(shares.values().eq(&[20, 20]), "{shares:?}");
    Ok(())
}
