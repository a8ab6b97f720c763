//! QUIC by connection ID: real connections whose clients move and whose servers come and go.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_userspace::config::model::Protocol;
use lb_userspace::lookup::{Explanation, Query};
use tests::balancer::{Balancer, place};
use tests::lab::{QuicClients, QuicConnection, Signal, quic_server, wait_for};
use tests::stage::{self, Config, PATIENCE, Stage, VIP4};

const CONFIG_ID: u8 = 2;
const CLIENT: [&str; 2] = ["10.111.0.2", "10.111.0.102"];

fn server_id(index: usize) -> String {
    format!("0a{index:02x}")
}

fn backend(index: usize, weight: u8) -> String {
    stage::weighted(index, false, weight).replace('}', &format!(", server_id: \"{}\"}}", server_id(index)))
}

/// The scene's backends as QUIC servers, found by connection ID.
fn config(stage: &Stage) -> Config {
    let service = stage::service("quic", &[VIP4], "443", "udp");
    Config {
        health: stage::PATIENT_CHECKS.replace('}', ", port: 80}"),
        backends: (0..stage.backends.len()).map(|index| backend(index, 100)).collect(),
        services: vec![service.replace('}', &format!(", quic: {{config_id: {CONFIG_ID}}}}}"))],
        ..Config::default()
    }
}

fn set(name: &str, backends: usize) -> Result<Option<Stage>> {
    let Some(stage) = Stage::set(name, backends)? else { return Ok(None) };
    stage.client.add_address(&format!("{}/24", CLIENT[1]), "eth0")?;
    for index in 0..backends {
        serve(&stage, index)?;
    }
    Ok(Some(stage))
}

fn serve(stage: &Stage, index: usize) -> Result<()> {
    quic_server(&stage.backends[index].host, VIP4, CONFIG_ID, &server_id(index)).map(drop)
}

fn connect(stage: &Stage, connections: usize) -> Result<QuicClients> {
    QuicClients::start(&stage.client, &CLIENT, VIP4, connections)
}

/// Every connection lives, and has met one server.
fn all_live(connections: &[QuicConnection]) -> Result<()> {
    for connection in connections {
        let fine = connection.error.is_none() && connection.answered == connection.sent;
        ensure!(fine && connection.servers.len() == 1, "{connection:?}");
    }
    Ok(())
}

/// How many ends of the connections the hash leads to another server than theirs.
fn led_elsewhere(balancer: &Balancer, connections: &[QuicConnection]) -> Result<usize> {
    let tables = balancer.tables()?;
    let names: HashMap<IpAddr, String> =
        balancer.backends()?.into_iter().map(|backend| (backend.address, backend.name)).collect();
    let mut elsewhere = 0;
    for connection in connections {
        for (address, port) in &connection.ends {
            let source = SocketAddr::new(address.parse()?, *port);
            let query = Query { source, vip: format!("{VIP4}:443").parse()?, protocol: Protocol::Udp };
            let at = place(&tables, &query)?.with_context(|| format!("nobody takes {source}"))?;
            elsewhere += usize::from(names.get(&at) != connection.servers.first());
        }
    }
    Ok(elsewhere)
}

#[test]
fn a_connection_stays_on_its_server_when_the_client_moves_and_without_quic_it_does_not() -> Result<()> {
    const CONNECTIONS: usize = 30;
    let Some(stage) = set("quicmove", 3)? else { return Ok(()) };
    let mut config = config(&stage);
    let balancer = stage.start(&config)?;
    let mut clients = connect(&stage, CONNECTIONS)?;
    for _ in 0..3 {
        clients.move_on()?;
    }
    let connections = clients.end()?;
    all_live(&connections)?;
    ensure!(connections.len() == CONNECTIONS && connections.iter().all(|one| one.ends.len() == 4));
    let mut shares: BTreeMap<&str, usize> = BTreeMap::new();
    connections.iter().for_each(|one| *shares.entry(&one.servers[0]).or_default() += 1);
    ensure!(shares.len() == 3, "{shares:?}");
    // Of three new ends each, two thirds.
    let elsewhere = led_elsewhere(&balancer, &connections)?;
    println!("{shares:?}; {elsewhere} of {} moves led elsewhere by the hash", 3 * CONNECTIONS);
    ensure!(elsewhere > CONNECTIONS, "the hash led {elsewhere} ends elsewhere");
    ensure!(balancer.outcome("forward_quic_transmit")? > balancer.outcome("forward_transmit")?);
    ensure!(balancer.outcome("forward_quic_stray_transmit")? == 0);

    config.services = vec![stage::service("quic", &[VIP4], "443", "udp")];
    balancer.reload(&config.to_string())?;
    let mut clients = connect(&stage, CONNECTIONS)?;
    clients.move_on()?;
    let connections = clients.end()?;
    let lost = connections.iter().filter(|one| one.error.is_some()).count();
    println!("without quic: {lost} of {CONNECTIONS} lost in one move");
    ensure!(lost > CONNECTIONS / 4, "{lost}: the moves show nothing");
    Ok(())
}

/// A packet of an established connection, as far as the balancer can see.
fn short(config_id: u8, server_id: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x47, config_id << 5 | 17];
    packet.extend(server_id);
    packet.resize(60, 0x5a);
    packet
}

#[test]
fn connection_ids_of_nobody_go_by_their_addresses_and_are_counted() -> Result<()> {
    const PACKETS: u64 = 20;
    let Some(stage) = set("quicstray", 2)? else { return Ok(()) };
    let balancer = stage.start(&config(&stage))?;
    // One socket for all: a command that another test starts holds a closed one for a moment, and its port.
    let socket = stage.client.inside(|| UdpSocket::bind((CLIENT[0], 40000)))??;
    let send = |packet: &[u8]| -> Result<()> {
        (0..PACKETS).try_for_each(|_| socket.send_to(packet, (VIP4, 443)).map(drop))?;
        Ok(())
    };
    let counted = |name: &str, count: u64| {
        wait_for(name, PATIENCE, || balancer.outcome(name).is_ok_and(|now| now == count))
    };
    send(&short(CONFIG_ID, &[0x0a, 0x77]))?;
    counted("forward_quic_stray_transmit", PACKETS)?;
    send(&short(CONFIG_ID + 1, &[0x0a, 0]))?;
    send(&short(7, &[0x0a, 0]))?;
    counted("forward_quic_stray_transmit", 3 * PACKETS)?;
    send(&short(CONFIG_ID, &[0x0a, 0]))?;
    counted("forward_quic_transmit", PACKETS)?;
    // The address alone led all of them to one backend.
    let client = format!("{}:40000", CLIENT[0]);
    let answer = balancer.xlb(&["lookup", &client, &format!("{VIP4}:443"), "-p", "udp", "-o", "json"])?;
    let hashed = serde_json::from_str::<Explanation>(&answer)?.backend.context("no backend")?;
    let counts: BTreeMap<String, u64> =
        balancer.backends()?.into_iter().map(|backend| (backend.name, backend.packets)).collect();
    let named = PACKETS + if hashed == "web1" { 3 * PACKETS } else { 0 };
    ensure!(
        counts["web1"] == named && counts["web1"] + counts["web2"] == 4 * PACKETS,
        "{counts:?}, {hashed}"
    );

    explained(&balancer)
}

/// `xlb lookup` says what the connection ID does.
fn explained(balancer: &Balancer) -> Result<()> {
    let frame = |server_id: &[u8]| -> Result<String> {
        let mut bytes = Vec::new();
        let builder = etherparse::PacketBuilder::ethernet2([2; 6], [4; 6]);
        let builder = builder.ipv4([10, 111, 0, 2], [203, 0, 113, 10], 64).udp(40000, 443);
        builder.write(&mut bytes, &short(CONFIG_ID, server_id))?;
        Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    };
    let said = balancer.xlb(&["lookup", "--hex", &frame(&[0x0a, 1])?])?;
    for words in ["ID 0a01 of configuration 2", "web/web2", "forward_quic_transmit", "service   quic"] {
        ensure!(said.contains(words), "{words:?} is not in:\n{said}");
    }
    let said = balancer.xlb(&["lookup", "--hex", &frame(&[0x0a, 0x77])?])?;
    for words in ["ID 0a77 of configuration 2, which no backend has", "slot", "forward_quic_stray_transmit"] {
        ensure!(said.contains(words), "{words:?} is not in:\n{said}");
    }
    Ok(())
}

#[test]
fn the_servers_change_under_live_connections_and_none_is_lost() -> Result<()> {
    const CONNECTIONS: usize = 60;
    let Some(mut stage) = set("quicset", 3)? else { return Ok(()) };
    let mut config = config(&stage);
    let mut balancer = stage.start(&config)?;
    let mut clients = connect(&stage, CONNECTIONS)?;
    clients.move_on()?;

    stage.add_backend()?;
    serve(&stage, 3)?;
    config.backends.push(backend(3, 100));
    balancer.reload(&config.to_string())?;
    balancer.wait_for_backends(4, PATIENCE)?;
    clients.move_on()?;
    // One is drained, and the others get other shares.
    config.backends[0] = backend(0, 0);
    config.backends[1] = backend(1, 30);
    balancer.reload(&config.to_string())?;
    clients.move_on()?;
    balancer.process.signal(Signal::KILL)?;
    balancer.process.wait_exit(PATIENCE)?;
    clients.move_on()?;
    balancer.restart()?;
    balancer.wait_for_backends(4, PATIENCE)?;
    // Its row is another one, its server the same.
    config.forward = "l2".to_owned();
    balancer.reload(&config.to_string())?;
    clients.move_on()?;
    config.forward = "ipip".to_owned();
    balancer.reload(&config.to_string())?;
    clients.move_on()?;
    ensure!(balancer.xlb(&["verify"])?.contains("no difference"));

    // Who comes now meets the new server too, and the drained one never.
    let newcomers = connect(&stage, CONNECTIONS)?.end()?;
    all_live(&newcomers)?;
    let met = |name: &str| newcomers.iter().filter(|one| one.servers == [name]).count();
    ensure!(met("web4") > 0 && met("web1") == 0, "{newcomers:?}");

    let connections = clients.end()?;
    all_live(&connections)?;
    let on_drained = connections.iter().filter(|one| one.servers == ["web1"]).count();
    println!("{} connections live, {on_drained} of them on the drained server", connections.len());
    ensure!(connections.len() == CONNECTIONS && on_drained > 0);
    ensure!(led_elsewhere(&balancer, &connections)? > CONNECTIONS);
    Ok(())
}

#[test]
fn a_server_that_left_the_file_keeps_its_connections_until_they_end() -> Result<()> {
    const IDLE: Duration = Duration::from_secs(2);
    let Some(stage) = set("quicleave", 3)? else { return Ok(()) };
    let mut config = config(&stage);
    config.pool = format!("    idle_timeout: {{udp: {}s}}\n", IDLE.as_secs());
    let balancer = stage.start(&config)?;
    let mut clients = connect(&stage, 30)?;
    config.backends.remove(0);
    balancer.reload(&config.to_string())?;
    // No slot and no pin names it any more after a while; its connections are there.
    for _ in 0..4 {
        std::thread::sleep(IDLE);
        clients.move_on()?;
    }
    let newcomers = connect(&stage, 30)?.end()?;
    all_live(&newcomers)?;
    ensure!(newcomers.iter().all(|one| one.servers != ["web1"]), "{newcomers:?}");
    let connections = clients.end()?;
    all_live(&connections)?;
    ensure!(connections.iter().any(|one| one.servers == ["web1"]), "{connections:?}");
    let named = || balancer.tables().is_ok_and(|tables| tables.servers.len() == 2);
    wait_for("nobody names the server that left", PATIENCE, named)
}

#[test]
fn a_dead_server_loses_its_connections_alone() -> Result<()> {
    let Some(stage) = set("quicdead", 3)? else { return Ok(()) };
    let mut config = config(&stage);
    config.pool = "    on_down: move\n".to_owned();
    config.health =
        "{type: http, path: /healthz, port: 80, interval: 100ms, timeout: 100ms, rise: 1, fall: 2}".into();
    let balancer = stage.start(&config)?;
    let clients = connect(&stage, 30)?;
    stage.backends[0].host.set_link("eth0", false)?;
    balancer.wait_for_backends(2, PATIENCE)?;
    let strays = || balancer.outcome("forward_quic_stray_transmit").is_ok_and(|strays| strays > 0);
    wait_for("packets to the dead server go by their addresses", PATIENCE, strays)?;
    std::thread::sleep(Duration::from_millis(300));
    let newcomers = connect(&stage, 30)?.end()?;
    all_live(&newcomers)?;
    ensure!(newcomers.iter().all(|one| one.servers != ["web1"]));
    let connections = clients.end()?;
    let (dead, live): (Vec<_>, Vec<_>) = connections.into_iter().partition(|one| one.servers[0] == "web1");
    ensure!(!dead.is_empty() && dead.iter().all(|one| one.error.is_some()), "{dead:?}");
    all_live(&live)
}
