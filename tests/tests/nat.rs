//! Real clients of backends that know nothing of the balancer: addresses translated on the way there (`nat`), or both
//! ways (`fullnat`), within a family and from one to the other.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::iter;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tests::balancer::{Balancer, Ended};
use tests::between::{self, Between, CLIENTS, Config, Mode, OTHER, SAME, SOURCES, url};
use tests::lab::{
    self, Capture, DatagramServer, EchoServer, Host, Transport, send_without_checksum, wait_for,
};
use tests::stage::{self, PATIENCE};

const ECHO: u16 = 5000;

/// Requests to all VIPs: everybody answers, and backends see the client they should, at the port they should.
fn everybody_is_served(name: &str, mode: Mode, port: u16) -> Result<()> {
    let Some(scene) = Between::set(name, mode, 3)? else { return Ok(()) };
    let pool = if port == 80 { String::new() } else { format!("    port: {port}\n") };
    let balancer = scene.start(&Config { pool, ..scene.config() })?;
    let captures = [Capture::at_host(&scene.client)?, Capture::at_host(&scene.backends[0].host)?];
    for (vip, ipv6) in mode.vips() {
        let requests = lab::http_load(&scene.client, &url(vip, 80, ""), 200, 4)?;
        stage::none_failed(&requests)?;
        ensure!(lab::backends(&requests).len() == 3, "{vip}: {:?}", lab::backends(&requests));
        let seen = lab::http_get(&scene.client, &url(vip, 80, "ends"))?.1;
        let [client, _, server, at] = seen.split_whitespace().collect::<Vec<_>>()[..] else {
            bail!("{vip}: {seen}")
        };
        let wanted = match mode {
            Mode::Nat => CLIENTS[usize::from(ipv6)],
            Mode::Fullnat => SOURCES[usize::from(ipv6)],
        };
        ensure!(client == wanted && at == port.to_string(), "{vip}: {seen}");
        ensure!((0..3).any(|index| server == between::address(index, ipv6)), "{vip}: {seen}");
    }
    for capture in captures {
        capture.end()?;
        capture.has_no_bad_checksum()?;
    }
    // SYN, ACK, request and FIN at the least of each request; SYN, answer and FIN.
    let requests = 200 * mode.vips().len() as u64;
    let (there, back) = (balancer.outcome("forward_redirect")?, balancer.outcome("forward_reply_redirect")?);
    ensure!(there >= 4 * requests && back >= 3 * requests, "{there} and {back} of {requests} requests");
    for none in ["drop_connections_full", "drop_no_connection", "drop_inconsistent", "drop_untranslatable"] {
        ensure!(balancer.outcome(none)? == 0, "{none}");
    }
    Ok(())
}

#[test]
fn clients_of_nat_keep_their_address() -> Result<()> {
    everybody_is_served("nat", Mode::Nat, 80)
}

#[test]
fn clients_of_nat_are_served_at_another_port() -> Result<()> {
    everybody_is_served("natport", Mode::Nat, 8080)
}

#[test]
fn clients_of_fullnat_are_seen_as_a_source_by_backends_of_either_family() -> Result<()> {
    everybody_is_served("fullnat", Mode::Fullnat, 80)
}

#[test]
fn clients_of_fullnat_are_served_at_another_port() -> Result<()> {
    everybody_is_served("fullnatport", Mode::Fullnat, 8080)
}

#[test]
fn sources_may_be_a_network_of_their_own_that_is_routed_to_the_balancer() -> Result<()> {
    let Some(scene) = Between::set("routedsrc", Mode::Fullnat, 2)? else { return Ok(()) };
    for backend in &scene.backends {
        backend.host.route(&format!("198.18.7.0/28 via {}", between::INSIDE[0]))?;
        backend.host.ip(&format!("-6 route add 2001:db8:7::/124 via {}", between::INSIDE[1]))?;
    }
    let sources = "198.18.7.0/28, \"2001:db8:7::/124\"".to_owned();
    // Enough for all sources with all of their ports.
    let top = "limits: {connections: 1048576}\n".to_owned();
    let balancer = scene.start(&Config { sources, top, ..scene.config() })?;
    let mut seen = BTreeSet::new();
    for (vip, ipv6) in Mode::Fullnat.vips() {
        for _ in 0..20 {
            let ends = lab::http_get(&scene.client, &url(vip, 80, "ends"))?.1;
            let client = ends.split(' ').next().context("no client")?;
            ensure!(client.starts_with(if ipv6 { "2001:db8:7::" } else { "198.18.7." }), "{vip}: {ends}");
            seen.insert(client.to_owned());
        }
    }
    // 80 requests over 16 sources of each family.
    ensure!(seen.len() > 16, "{seen:?}");
    ensure!(balancer.outcome("drop_connections_full")? == 0);
    Ok(())
}

/// Transfers 40 MB or more within 20 s, or some thousands of datagrams.
fn iperf3(client: &Host, vip: &str, words: &[&str]) -> Result<()> {
    let udp = words.contains(&"--udp");
    let fixed = ["timeout", "20", "iperf3", "--json", "--connect-timeout", "2000", "--client", vip];
    let report = client.run(fixed.iter().chain(words))?;
    let report: serde_json::Value = serde_json::from_str(&report)?;
    let number = |sum: &str, name: &str| {
        report["end"][sum][name].as_u64().with_context(|| format!("{vip} {words:?}: {report}"))
    };
    if udp {
        let (packets, lost) = (number("sum", "packets")?, number("sum", "lost_packets")?);
        ensure!(packets > 1000 && lost < packets / 10, "{vip} {words:?}: {lost} of {packets} lost");
    } else {
        // The sender stops at that many; what its sockets still hold, some megabytes each, is not waited for.
        let bytes = number("sum_received", "bytes")?;
        ensure!(bytes >= 10 << 20, "{vip} {words:?}: {bytes} bytes arrived");
    }
    Ok(())
}

fn streams(name: &str, mode: Mode) -> Result<()> {
    let Some(scene) = Between::set(name, mode, 1)? else { return Ok(()) };
    lab::iperf3_server(&scene.backends[0].host)?;
    let protocol = "[tcp, udp]".to_owned();
    let balancer = scene.start(&Config { ports: "5201".to_owned(), protocol, ..scene.config() })?;
    for (vip, _) in mode.vips() {
        for direction in [&[][..], &["--reverse"]] {
            iperf3(&scene.client, vip, &[direction, &["--bytes", "40M", "--parallel", "4"]].concat())?;
        }
        let udp = ["--udp", "--bitrate", "40M", "--length", "1200", "--bytes", "4M"];
        for direction in [&[][..], &["--reverse"]] {
            iperf3(&scene.client, vip, &[direction, &udp].concat())?;
        }
    }
    for none in ["drop_oversize", "drop_connections_full", "drop_vip_fragment"] {
        ensure!(balancer.outcome(none)? == 0, "{none}");
    }
    Ok(())
}

#[test]
fn nat_carries_streams_and_datagrams_of_iperf3_in_both_directions() -> Result<()> {
    streams("iperfnat", Mode::Nat)
}

#[test]
fn fullnat_carries_streams_and_datagrams_of_iperf3_in_both_directions() -> Result<()> {
    streams("iperffull", Mode::Fullnat)
}

fn names(name: &str, mode: Mode) -> Result<()> {
    let Some(scene) = Between::set(name, mode, 2)? else { return Ok(()) };
    for backend in &scene.backends {
        lab::dns(&backend.host, backend.host.name())?;
    }
    let protocol = "[tcp, udp]".to_owned();
    let balancer = scene.start(&Config { ports: "53".to_owned(), protocol, ..scene.config() })?;
    for (vip, _) in mode.vips() {
        for transport in [Transport::Udp, Transport::Tcp] {
            // With two backends, one in 2^24 runs would find only one of them.
            let answers: BTreeSet<String> =
                (0..25).map(|_| lab::dns_who(&scene.client, vip, transport)).collect::<Result<_>>()?;
            ensure!(answers.iter().eq(["web1", "web2"].iter()), "{vip} {transport:?}: {answers:?}");
        }
        let told = scene.client.run(["ping", "-n", "-c", "3", "-i", "0.05", "-W", "5", vip])?;
        ensure!(told.contains("3 received"), "{vip}: {told}");
    }
    // The balancer itself answers.
    ensure!(balancer.outcome("answer_echo")? == 3 * mode.vips().len() as u64);
    Ok(())
}

#[test]
fn nat_carries_dns_and_its_vips_answer_pings() -> Result<()> {
    names("dnsnat", Mode::Nat)
}

#[test]
fn fullnat_carries_dns_and_its_vips_answer_pings() -> Result<()> {
    names("dnsfull", Mode::Fullnat)
}

const BIG: u32 = 64;

/// 64 MB there and back, byte by byte.
fn long_transfers(name: &str, mode: Mode) -> Result<()> {
    let Some(scene) = Between::set(name, mode, 1)? else { return Ok(()) };
    let backend = &scene.backends[0].host;
    let nginx = lab::Nginx { ports: vec![81], big_megabytes: BIG, ..lab::Nginx::default() };
    let server = lab::nginx(backend, "big", nginx)?;
    let big = scene.lab.dir().join(format!("big-{BIG}"));
    let _balancer = scene.start(&Config { pool: "    port: 81\n".to_owned(), ..scene.config() })?;
    for (vip, _) in mode.vips() {
        let down = scene.client.new_file("down");
        let words = ["curl", "-qsSgf", "--max-time", "50"];
        let get = url(vip, 80, "big");
        scene.client.run(words.iter().copied().chain(["--output", &down.to_string_lossy(), &get]))?;
        ensure!(fs::read(&down)? == fs::read(&big)?, "{vip}: the download is another");
        fs::remove_file(down)?;
        let put = url(vip, 80, "up/file");
        scene.client.run(words.iter().copied().chain(["--upload-file", &big.to_string_lossy(), &put]))?;
        let up = server.uploads.join("file");
        ensure!(fs::read(&up)? == fs::read(&big)?, "{vip}: the upload is another");
        fs::remove_file(up)?;
    }
    Ok(())
}

#[test]
fn nat_carries_long_downloads_and_uploads_byte_by_byte() -> Result<()> {
    long_transfers("longnat", Mode::Nat)
}

#[test]
fn fullnat_carries_long_downloads_and_uploads_byte_by_byte() -> Result<()> {
    long_transfers("longfull", Mode::Fullnat)
}

/// A socket of the client's that is connected to a VIP.
fn datagrams(client: &Host, vip: &str) -> Result<UdpSocket> {
    let server = SocketAddr::new(vip.parse()?, ECHO);
    let any: IpAddr = if server.is_ipv6() { "::".parse()? } else { "0.0.0.0".parse()? };
    let socket = client.inside(|| -> std::io::Result<UdpSocket> {
        let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
        socket.connect(server)?;
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        Ok(socket)
    })?;
    socket.context("a socket")
}

/// Whether a datagram comes back.
fn echoes(socket: &UdpSocket, datagram: &[u8]) -> Result<bool> {
    socket.send(datagram)?;
    let mut answer = [0; 2048];
    Ok(socket
        .recv(&mut answer)
        .is_ok_and(|length| answer[..length].starts_with(&datagram[..datagram.len().min(64)])))
}

fn with_datagrams(scene: &Between) -> Result<(Vec<DatagramServer>, Config)> {
    let mut servers = Vec::new();
    for (index, backend) in scene.backends.iter().enumerate() {
        for ipv6 in [false, true] {
            let address = SocketAddr::new(between::address(index, ipv6).parse()?, ECHO);
            servers.push(DatagramServer::start(&backend.host, address)?);
        }
    }
    Ok((servers, Config { ports: ECHO.to_string(), protocol: "udp".to_owned(), ..scene.config() }))
}

#[test]
fn fragments_have_no_ports_and_are_dropped() -> Result<()> {
    for (name, mode) in [("fragnat", Mode::Nat), ("fragfull", Mode::Fullnat)] {
        let Some(scene) = Between::set(name, mode, 1)? else { return Ok(()) };
        let (_servers, config) = with_datagrams(&scene)?;
        let balancer = scene.start(&config)?;
        for (vip, _) in mode.vips() {
            let socket = datagrams(&scene.client, vip)?;
            ensure!(echoes(&socket, &[7; 1200])?, "{mode} {vip}");
            let before = balancer.outcome("drop_vip_fragment")?;
            ensure!(!echoes(&socket, &[7; 2000])?, "{mode} {vip}: fragments arrived");
            ensure!(balancer.outcome("drop_vip_fragment")? == before + 2, "{mode} {vip}");
        }
    }
    Ok(())
}

/// UDP over IPv4 may do without a checksum, over IPv6 it may not, and a balancer that made one would vouch for what it does
/// not know.
#[test]
fn datagrams_without_a_checksum_stay_in_their_family() -> Result<()> {
    for (name, mode) in [("sumnat", Mode::Nat), ("sumfull", Mode::Fullnat)] {
        let Some(scene) = Between::set(name, mode, 1)? else { return Ok(()) };
        let (_servers, config) = with_datagrams(&scene)?;
        let balancer = scene.start(&config)?;
        let socket = datagrams(&scene.client, SAME[0])?;
        send_without_checksum(&socket)?;
        let wire = Capture::at_host(&scene.backends[0].host)?;
        ensure!(echoes(&socket, b"none")?, "{mode}: within its family");
        wire.end()?;
        let sums = wire.fields(&format!("udp.dstport == {ECHO}"), &["udp.checksum"])?;
        ensure!(sums == [["0x0000"]], "{mode}: {sums:?}");
        if mode == Mode::Fullnat {
            let socket = datagrams(&scene.client, OTHER[0])?;
            ensure!(echoes(&socket, b"with one")?);
            send_without_checksum(&socket)?;
            ensure!(!echoes(&socket, b"none")?, "it arrived in the other family");
            ensure!(balancer.outcome("drop_no_checksum")? == 1);
        }
    }
    Ok(())
}

/// How long a client waits that may have no place: one lost SYN is sent again after a second.
const WAITS: Duration = Duration::from_millis(2500);

/// Tries to connect so many times, as many at a time as a listener has room for; what came about.
fn connect(client: &Host, server: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    const THREADS: usize = 64;
    let left = AtomicUsize::new(count);
    let one_more =
        || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).ok();
    let some = || {
        let streams = iter::from_fn(one_more).filter_map(|_| TcpStream::connect_timeout(&server, WAITS).ok());
        streams.collect::<Vec<_>>()
    };
    client.inside(|| {
        thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS.min(count)).map(|_| scope.spawn(some)).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap_or_default()).collect()
        })
    })
}

/// Asks an echo server on each connection; an error if one has no answer.
fn all_answer(streams: &[TcpStream]) -> Result<()> {
    for mut stream in streams {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"are you there?!\n")?;
    }
    for mut stream in streams {
        let mut answer = String::new();
        while !answer.ends_with("are you there?!\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).with_context(|| format!("after {answer:?}"))?;
            answer.push(char::from(byte[0]));
        }
    }
    Ok(())
}

/// One source with few ports.
#[test]
fn when_all_ports_are_taken_new_clients_are_refused_old_ones_stay_and_another_source_gives_room() -> Result<()>
{
    let Some(scene) = Between::set("exhausted", Mode::Fullnat, 2)? else { return Ok(()) };
    let _servers: Vec<_> =
        scene.backends.iter().map(|one| EchoServer::start(&one.host, ECHO)).collect::<Result<_>>()?;
    let mut config = Config { ports: ECHO.to_string(), ..scene.config() };
    let written = |config: &Config| config.to_string().replace("]}\npools", "], ports: 20000-21023}\npools");
    let file = scene.client.new_file("exhausted.yaml");
    fs::write(&file, written(&config))?;
    let checked = Ended::of_xlb(&scene.balancer, &["check", "--no-host", "-c", &file.to_string_lossy()])?;
    checked.expect(0, &["1024 connections can be translated at a time", "1 source of 1024 ports"])?;
    let balancer = Balancer::start(&scene.balancer, &scene.lab.dir().join("xlb"), &written(&config))?;
    balancer.wait_for_backends(4, PATIENCE)?;

    let server = SocketAddr::new(SAME[0].parse()?, ECHO);
    let many = connect(&scene.client, server, 1600)?;
    println!("{} of 1600 came about", many.len());
    ensure!((900..=1024).contains(&many.len()), "{} came about", many.len());
    ensure!(balancer.outcome("drop_connections_full")? >= 400);
    all_answer(&many)?;
    let told = balancer.xlb(&["status"])?;
    for words in ["of 1024 connections", "drop_connections_full"] {
        ensure!(told.contains(words), "{words:?} is not in:\n{told}");
    }
    let listed = balancer.xlb(&["conn", "list", "--limit", "5000"])?;
    ensure!(listed.matches(between::SOURCES[0]).count() >= many.len(), "{listed}");

    config.sources = between::listed(&[SOURCES, between::MORE_SOURCES].concat());
    balancer.reload(&written(&config))?;
    all_answer(&many)?;
    // One in four looks for a place among the old ones only, half of all, until some of them end.
    let more = connect(&scene.client, server, 320)?;
    println!("{} of 320 more came about with another source", more.len());
    ensure!(more.len() > 192, "{} of 320", more.len());
    all_answer(&many)?;
    all_answer(&more)
}

/// The last one: of another that leaves, the last takes the place, with less room than before.
#[test]
fn a_source_that_leaves_the_file_ends_its_connections_and_no_others() -> Result<()> {
    let Some(scene) = Between::set("lesssrc", Mode::Fullnat, 1)? else { return Ok(()) };
    let _server = EchoServer::start(&scene.backends[0].host, ECHO)?;
    let both = between::listed(&[SOURCES, between::MORE_SOURCES].concat());
    let config = Config { ports: ECHO.to_string(), sources: both, ..scene.config() };
    let balancer = scene.start(&config)?;
    let streams = connect(&scene.client, SocketAddr::new(SAME[0].parse()?, ECHO), 96)?;
    ensure!(streams.len() == 96);
    let listed = balancer.xlb(&["conn", "list"])?;
    let (leaving, staying): (Vec<_>, Vec<_>) = streams.into_iter().partition(|stream| {
        let port = stream.local_addr().map_or(0, |local| local.port());
        let mut lines = listed.lines();
        let line = lines.find(|line| line.contains(&format!("{}:{port} ", CLIENTS[0])));
        line.is_some_and(|line| line.contains(&format!("{}:", between::MORE_SOURCES[0])))
    });
    ensure!(leaving.len() > 16 && staying.len() > 16, "{} and {}", leaving.len(), staying.len());

    balancer.reload(&Config { sources: between::listed(&SOURCES), ..config }.to_string())?;
    all_answer(&staying)?;
    let lost = balancer.outcome("drop_no_connection")?;
    for mut stream in &leaving {
        stream.set_read_timeout(Some(Duration::from_millis(50)))?;
        stream.write_all(b"are you there?!\n")?;
    }
    wait_for("drops of what is not known", PATIENCE, || {
        balancer.outcome("drop_no_connection").is_ok_and(|now| now >= lost + leaving.len() as u64)
    })
}

/// Places stand for ports, and connections in them would be sent what is another's.
#[test]
fn other_ports_end_connections_and_leave_nothing_of_them() -> Result<()> {
    let Some(scene) = Between::set("otherports", Mode::Fullnat, 1)? else { return Ok(()) };
    let _server = EchoServer::start(&scene.backends[0].host, ECHO)?;
    let config = Config { ports: ECHO.to_string(), ..scene.config() }.to_string();
    let with_ports = |ports: &str| config.replace("]}\npools", &format!("], ports: {ports}}}\npools"));
    let balancer =
        Balancer::start(&scene.balancer, &scene.lab.dir().join("xlb"), &with_ports("20000-21023"))?;
    balancer.wait_for_backends(2, PATIENCE)?;
    let server = SocketAddr::new(SAME[0].parse()?, ECHO);
    let old = connect(&scene.client, server, 96)?;
    all_answer(&old)?;
    // Half of the ports are the same, at other places.
    for ports in ["20512-21535", "20512-22559", "20000-21023"] {
        balancer.reload(&with_ports(ports))?;
        wait_for("the old ones are gone", PATIENCE, || {
            balancer.xlb(&["conn", "list"]).is_ok_and(|list| list.contains("no connections"))
        })?;
        let new = connect(&scene.client, server, 96)?;
        ensure!(new.len() == 96, "{ports}: {}", new.len());
        all_answer(&new)?;
        balancer.xlb(&["conn", "flush", "--all"])?;
    }
    Ok(())
}
