//! The instruments that other tests rely on: connections, datagrams and downloads notice what is done to them.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tests::lab::{
    self, Capture, Connections, DatagramFlows, DatagramServer, Download, EchoServer, Host, Kind, Lab,
    LiveConnections, LiveLoad, NamingServer, SlowServer, SynFlood, Tally, Visits, wait_for,
};
use tests::stage::PATIENCE;

const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 1, 0, 2));
const SERVER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 1, 0, 11));

const OUTAGE: Duration = Duration::from_millis(500);

fn client_and_server(name: &str) -> Result<Option<(Lab, Host, Host)>> {
    if !lab::available()? {
        return Ok(None);
    }
    let lab = Lab::new(name)?;
    let client = lab.host("client", &[&format!("{CLIENT}/24")])?;
    let server = lab.host("web1", &[&format!("{SERVER}/24")])?;
    Ok(Some((lab, client, server)))
}

/// Takes the server's link down for a while.
fn outage(server: &Host) -> Result<[Instant; 2]> {
    let begin = Instant::now();
    server.set_link("eth0", false)?;
    sleep(OUTAGE);
    server.set_link("eth0", true)?;
    Ok([begin, Instant::now()])
}

#[test]
fn connections_tell_of_a_stall_and_of_their_loss() -> Result<()> {
    let Some((_lab, client, server)) = client_and_server("connections")? else { return Ok(()) };
    let echo = EchoServer::start(&server, 7000)?;
    let every = Duration::from_millis(50);
    let held = Connections::open(&client, &[CLIENT], SocketAddr::new(SERVER, 7000), 100, every)?;
    let quiet = Instant::now();
    held.wait_until_answered(quiet, PATIENCE)?;
    let [begin, end] = outage(&server)?;
    ensure!(held.longest_stall(quiet, begin - every) < OUTAGE);
    ensure!(held.longest_stall(begin, end) >= OUTAGE / 2, "{:?}", held.longest_stall(begin, end));
    held.wait_until_answered(end, PATIENCE)?;
    ensure!(held.lost().is_empty(), "{:?}", held.lost());
    let all = held.all();
    ensure!(all.len() == 100 && all.iter().all(|one| one.server == "web1" && one.echoes >= 2), "{all:?}");

    drop(echo);
    wait_for("every loss is noticed", PATIENCE, || held.lost().len() == 100)?;
    Ok(())
}

#[test]
fn datagrams_that_do_not_come_back_are_missing() -> Result<()> {
    let Some((_lab, client, server)) = client_and_server("datagrams")? else { return Ok(()) };
    let address = SocketAddr::new(SERVER, 7000);
    let _echo = DatagramServer::start(&server, address)?;
    let every = Duration::from_millis(50);
    let flows = DatagramFlows::start(&client, &[CLIENT], address, 20, every)?;
    let sent = |least| flows.now().iter().all(|flow| flow.sent >= least);
    wait_for("datagrams are sent", PATIENCE, || sent(5))?;
    outage(&server)?;
    wait_for("more datagrams are sent", PATIENCE, || sent(30))?;
    for flow in flows.end() {
        let lost = flow.missing.len() as u32;
        ensure!(lost >= OUTAGE.div_duration_f64(every) as u32 / 2, "{flow:?}");
        ensure!(u64::from(lost) + 5 <= flow.sent && flow.servers == ["web1"], "{flow:?}");
    }
    Ok(())
}

#[test]
fn a_download_tells_of_a_gap_and_of_an_early_end() -> Result<()> {
    let Some((_lab, client, server)) = client_and_server("slow")? else { return Ok(()) };
    let (address, takes) = (SocketAddr::new(SERVER, 8000), Duration::from_secs(2));
    let slow = SlowServer::start(&server, 8000, takes)?;
    let begin = Instant::now();
    let download = Download::start(&client, address, takes)?;
    sleep(OUTAGE);
    let [gap, end] = outage(&server)?;
    ensure!(download.longest_stall(gap, end) >= OUTAGE / 2, "{:?}", download.longest_stall(gap, end));
    download.finish(PATIENCE)?;
    // The server's clock is not this one: it sends by its own beats.
    ensure!(begin.elapsed() >= takes * 9 / 10, "{:?}", begin.elapsed());

    let download = Download::start(&client, address, takes)?;
    sleep(OUTAGE);
    drop(slow);
    let told = download.finish(PATIENCE).expect_err("half a file is enough").to_string();
    ensure!(told.contains("curl"), "{told}");
    Ok(())
}

#[test]
fn live_connections_tell_of_stalls_and_losses_and_come_anew() -> Result<()> {
    let Some((_lab, client, server)) = client_and_server("live")? else { return Ok(()) };
    let naming = NamingServer::start(&server, 7000)?;
    let address = SocketAddr::new(SERVER, 7000);
    let gap = Duration::from_millis(20)..Duration::from_millis(200);
    let load = LiveLoad { connections: 100, sources: vec![CLIENT], server: address, gap };
    let live = LiveConnections::open(&client, load)?;
    let quiet = Instant::now();
    live.wait_until_all_answer(quiet, PATIENCE)?;
    ensure!(live.alive().iter().all(|(_, server)| server == "web1"));

    server.set_link("eth0", false)?;
    sleep(lab::STALL + OUTAGE);
    server.set_link("eth0", true)?;
    live.wait_until_all_answer(Instant::now(), PATIENCE)?;
    let tally = Tally::since(quiet, &live.incidents(), &[]);
    ensure!(tally.stalls >= 90 && tally.broken() == 0, "{tally}");

    drop(naming);
    wait_for("every loss is noticed", PATIENCE, || live.alive().is_empty())?;
    let tally = Tally::since(quiet, &live.incidents(), &[]);
    ensure!(tally.broken() >= 100, "{tally}");
    let _naming = NamingServer::start(&server, 7000)?;
    wait_for("all are there again", PATIENCE, || live.alive().len() == 100)?;
    ensure!(live.incidents().iter().any(|incident| matches!(incident.kind, Kind::Unopened(_))));
    Ok(())
}

#[test]
fn visits_tell_who_served_them_and_when_nobody_did() -> Result<()> {
    let Some((_lab, client, server)) = client_and_server("visits")? else { return Ok(()) };
    let naming = NamingServer::start(&server, 7000)?;
    let begin = Instant::now();
    let every = Duration::from_millis(10);
    let visits = Visits::start(&client, &[CLIENT], SocketAddr::new(SERVER, 7000), every, 400)?;
    let counts = || {
        let all = visits.between(begin, Instant::now());
        let (shares, failed) = Visits::shares(&all);
        (shares.get("web1").copied().unwrap_or(0), failed.len())
    };
    wait_for("visits are served", PATIENCE, || counts().0 >= 100)?;
    ensure!(counts().1 == 0, "{:?}", counts());
    drop(naming);
    wait_for("all visits are over", PATIENCE, || counts().0 + counts().1 == 400)?;
    ensure!(counts().1 > 100, "{:?}", counts());
    Ok(())
}

#[test]
fn a_flood_is_of_its_rate_and_ends() -> Result<()> {
    let Some((_lab, client, server)) = client_and_server("flood")? else { return Ok(()) };
    let capture = Capture::at_host(&server)?;
    let to = SocketAddrV4::new(Ipv4Addr::new(10, 1, 0, 11), 7000);
    let begin = Instant::now();
    let flood = SynFlood::start(&client, to, 2000, Duration::from_secs(1))?;
    wait_for("SYNs", PATIENCE, || flood.sent() > 0)?;
    sleep(Duration::from_secs(1).saturating_sub(begin.elapsed()));
    let sent = flood.stop()?;
    ensure!((200..=2200).contains(&sent), "{sent}");
    capture.end()?;
    capture.has_no_bad_checksum()?;
    let seen = capture.fields("ip.src == 198.18.0.0/15 && tcp.flags == 2", &["frame.number"])?;
    ensure!(seen.len() as u64 == sent, "{} of {sent} arrived", seen.len());
    Ok(())
}
