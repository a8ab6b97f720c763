//! What is asked of VIPs beside TCP and UDP: ping and traceroute, ICMP errors that somebody made up, IP options,
//! IPv6 destination options and fragments.

use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use etherparse::{Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type, PacketBuilder, icmpv4};
use tests::balancer::Balancer;
use tests::lab::{self, Capture, Host, IcmpSocket, Options, wait_for};
use tests::routed::{CORE, EDGE, Routed};
use tests::stage::{self, Config, PATIENCE, Stage, VIP4, VIP6, VIPS};

/// Pings and returns how many were sent and answered. No answer at all is no error.
fn ping(client: &Host, to: &str, words: &[&str]) -> Result<(u64, u64)> {
    let output = client.exec(["ping", "-n", "-q"].iter().chain(words).chain([&to])).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(!text.contains("wrong") && !text.contains("DUP"), "{to}: {text}");
    let line = text.lines().find(|line| line.contains("packets transmitted"));
    let line = line.with_context(|| format!("{to}: {text}{}", String::from_utf8_lossy(&output.stderr)))?;
    let numbers: Vec<u64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
    ensure!(numbers.len() >= 2, "{line}");
    Ok((numbers[0], numbers[1]))
}

#[test]
fn a_vip_answers_every_ping_of_every_size_and_nobody_else_does() -> Result<()> {
    let Some(stage) = Stage::set("ping", 1)? else { return Ok(()) };
    let balancer = stage.start(&stage.config())?;
    let wire = Capture::at_switch(&stage.balancer)?;
    let sizes = ["0", "1", "7", "8", "55", "56", "999", "1232", "1399", "1400"];
    for vip in VIPS {
        for size in sizes {
            let got = ping(&stage.client, vip, &["-c", "20", "-i", "0.002", "-W", "5", "-s", size])?;
            ensure!(got == (20, 20), "{vip}, {size} bytes: {got:?}");
        }
    }
    let answered = balancer.outcome("answer_echo")?;
    ensure!(answered == 2 * 20 * sizes.len() as u64, "{answered}");
    for (other, via) in [("203.0.113.99", stage::BALANCER4), ("2001:db8:113::99", stage::BALANCER6)] {
        stage.client.route(&format!("{other} via {via}"))?;
        let got = ping(&stage.client, other, &["-c", "3", "-i", "0.05", "-W", "0.3"])?;
        ensure!(got == (3, 0), "{other}: {got:?}");
        // The host answers for its own address.
        ensure!(ping(&stage.client, via, &["-c", "3", "-i", "0.05", "-W", "5"])? == (3, 3), "{via}");
    }
    ensure!(balancer.outcome("answer_echo")? == answered);
    wire.end()?;
    wire.has_no_bad_checksum()?;
    let replies = wire.fields("icmp.type == 0 && icmp.checksum.status == 1", &["ip.ttl"])?;
    let replies6 = wire.fields("icmpv6.type == 129 && icmpv6.checksum.status == 1", &["ipv6.hlim"])?;
    ensure!(replies.len() == 203 && replies6.len() == 203, "{} and {}", replies.len(), replies6.len());
    Ok(())
}

#[test]
fn without_echo_a_vip_is_silent_and_its_services_are_not() -> Result<()> {
    let Some(stage) = Stage::set("silent", 1)? else { return Ok(()) };
    let balancer = stage.start(&Config { top: "icmp: {echo: false}\n".to_owned(), ..stage.config() })?;
    for (vip, url) in VIPS.into_iter().zip(stage::URLS) {
        let got = ping(&stage.client, vip, &["-c", "3", "-i", "0.05", "-W", "0.3"])?;
        ensure!(got == (3, 0), "{vip}: {got:?}");
        ensure!(lab::http_get(&stage.client, url)?.1 == "web1\n", "{url}");
    }
    ensure!(balancer.outcome("drop_icmp_type")? >= 6);
    // The key is followed by a reload.
    balancer.reload(&stage.config().to_string())?;
    for vip in VIPS {
        ensure!(ping(&stage.client, vip, &["-c", "3", "-i", "0.05", "-W", "5"])? == (3, 3), "{vip}");
    }
    Ok(())
}

/// Messages of a kind that all CPUs may have sent since `begin`: a second's worth at once, and what came since.
fn allowed(rate: u64, begin: Instant) -> Result<u64> {
    let cpus = thread::available_parallelism()?.get() as u64;
    Ok(cpus * rate * (2 + begin.elapsed().as_secs()))
}

#[test]
fn a_flood_of_pings_is_answered_at_the_configured_rate_and_counted() -> Result<()> {
    let Some(stage) = Stage::set("flood", 1)? else { return Ok(()) };
    let config = Config { top: "icmp: {rate: 10}\n".to_owned(), ..stage.config() };
    let balancer = stage.start(&config)?;
    let begin = Instant::now();
    let (mut sent, mut answered) = (0, 0);
    for vip in VIPS {
        let got = ping(&stage.client, vip, &["-c", "500", "-i", "0.001", "-W", "0.5"])?;
        (sent, answered) = (sent + got.0, answered + got.1);
    }
    let most = allowed(10, begin)?;
    ensure!(sent == 1000 && (10..=most).contains(&answered), "{answered} of {sent}, {most} allowed");
    let outcomes = (balancer.outcome("answer_echo")?, balancer.outcome("drop_echo_limit")?);
    ensure!(outcomes == (answered, sent - answered), "{outcomes:?}, {answered} of {sent}");
    // A second later there is room again.
    wait_for("an answer after the flood", PATIENCE, || {
        ping(&stage.client, VIP4, &["-c", "1", "-W", "0.3"]).is_ok_and(|got| got == (1, 1))
    })
}

#[test]
fn traceroute_ends_at_the_vip() -> Result<()> {
    let Some(routed) = Routed::set("traceroute", 2, 1500)? else { return Ok(()) };
    let stage = &routed.stage;
    let mut config = stage.config();
    config.services[0] = config.services[0].replace('}', ", unmapped: reject}");
    config.services.push(stage::service("udp", &VIPS, "5000", "udp"));
    let balancer = stage.start(&config)?;
    for (index, vip) in VIPS.into_iter().enumerate() {
        // ICMP is answered by the balancer, and so are datagrams to ports of no service. A SYN is answered by nginx, and
        // a datagram to a service that nobody listens for by the backend's kernel.
        for words in [&[][..], &["-I"], &["-T", "-p", "80"], &["-U", "-p", "5000"]] {
            let hops = lab::traceroute(&stage.client, vip, words)?;
            ensure!(hops == [EDGE[index], CORE[index], vip], "{vip} {words:?}: {hops:?}");
        }
    }
    ensure!(balancer.outcome("answer_echo")? >= 2 && balancer.outcome("answer_unreachable")? >= 2);
    Ok(())
}

/// What an ICMP error carries: the first bytes of a TCP packet.
fn carried(from: IpAddr, from_port: u16, to: IpAddr) -> Result<Vec<u8>> {
    let builder = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), 60),
        (IpAddr::V6(from), IpAddr::V6(to)) => PacketBuilder::ipv6(from.octets(), to.octets(), 60),
        _ => anyhow::bail!("two families"),
    };
    let mut bytes = Vec::new();
    builder.tcp(from_port, 40000, 1, 1000).write(&mut bytes, &[0; 100])?;
    Ok(bytes)
}

/// "Fragmentation needed" or "packet too big" about a packet.
fn too_big(carried: &[u8], ipv6: bool) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if ipv6 {
        let kind = Icmpv6Type::PacketTooBig { mtu: 1300 };
        Icmpv6Header { icmp_type: kind, checksum: 0 }.write(&mut bytes)?;
    } else {
        let kind = Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::FragmentationNeeded {
            next_hop_mtu: 1300,
        });
        Icmpv4Header::with_checksum(kind, carried).write(&mut bytes)?;
    }
    bytes.extend(carried);
    Ok(bytes)
}

/// An echo reply that nobody asked for.
fn reply(ipv6: bool) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if ipv6 {
        let kind = Icmpv6Type::EchoReply(echo_header());
        Icmpv6Header { icmp_type: kind, checksum: 0 }.write(&mut bytes)?;
    } else {
        Icmpv4Header::with_checksum(Icmpv4Type::EchoReply(echo_header()), &[]).write(&mut bytes)?;
    }
    Ok(bytes)
}

fn echo_header() -> etherparse::IcmpEchoHeader {
    etherparse::IcmpEchoHeader { id: 7, seq: 7 }
}

/// Waits until a counter is so much higher than before, and refuses more.
fn counts(balancer: &Balancer, name: &str, before: u64, more: u64) -> Result<()> {
    let get = || balancer.outcome(name).unwrap_or(0) - before;
    wait_for(&format!("{more} more {name}"), PATIENCE, || get() >= more)?;
    ensure!(get() == more, "{name}: {} more, not {more}", get());
    Ok(())
}

#[test]
fn fault_13_forged_icmp_errors_are_refused_by_name_and_the_others_limited() -> Result<()> {
    let Some(stage) = Stage::set("forged", 2)? else { return Ok(()) };
    let balancer = stage.start(&Config { top: "icmp: {rate: 10}\n".to_owned(), ..stage.config() })?;
    let mut delivered = 0;
    for (ipv6, vip, elsewhere) in [(false, VIP4, "198.51.100.1"), (true, VIP6, "2001:db8:51::1")] {
        let socket = IcmpSocket::new(&stage.client, ipv6)?;
        let (to, elsewhere): (IpAddr, IpAddr) = (vip.parse()?, elsewhere.parse()?);
        let client: IpAddr = stage.client.address(ipv6)?.parse()?;
        let messages = [
            ("drop_icmp_forged", too_big(&carried(elsewhere, 80, client)?, ipv6)?),
            ("drop_icmp_stranger", too_big(&carried(to, 81, client)?, ipv6)?),
            ("drop_icmp_type", reply(ipv6)?),
            ("drop_vip_truncated", too_big(&carried(to, 80, client)?[..20], ipv6)?),
            ("forward_error_transmit", too_big(&carried(to, 80, client)?, ipv6)?),
        ];
        for (outcome, message) in &messages {
            let before = balancer.outcome(outcome)?;
            socket.send(to, message)?;
            counts(&balancer, outcome, before, 1).with_context(|| vip)?;
        }
        delivered += 1;
    }
    let (begin, before) = (Instant::now(), balancer.outcome("drop_icmp_limit")?);
    let socket = IcmpSocket::new(&stage.client, false)?;
    let client: IpAddr = stage.client.address(false)?.parse()?;
    let message = too_big(&carried(VIP4.parse()?, 80, client)?, false)?;
    for _ in 0..500 {
        socket.send(VIP4.parse()?, &message)?;
    }
    let counted = || -> Result<(u64, u64)> {
        let sent = balancer.outcome("forward_error_transmit")? - delivered;
        Ok((sent, balancer.outcome("drop_icmp_limit")? - before))
    };
    wait_for("all errors counted", PATIENCE, || {
        counted().is_ok_and(|(sent, limited)| sent + limited >= 500)
    })?;
    let ((sent, limited), most) = (counted()?, allowed(10, begin)?);
    ensure!(sent + limited == 500 && sent <= most, "{sent} sent, {limited} not, {most} allowed");
    // No harm was done.
    stage::none_failed(&lab::http_load(&stage.client, stage::URL4, 20, 2)?)
}

/// No-operations, and a record route that each hop writes into.
const NOPS: [u8; 4] = [1; 4];
const RECORD_ROUTE: [u8; 40] = {
    let mut bytes = [0; 40];
    (bytes[0], bytes[1], bytes[2], bytes[3]) = (1, 7, 39, 4);
    bytes
};

/// A destination options header of padding, and one with an experimental option that who does not know it skips.
const PADDING: [u8; 8] = [0, 0, 1, 4, 0, 0, 0, 0];
const EXPERIMENT: [u8; 24] = {
    let mut bytes = [0; 24];
    (bytes[1], bytes[2], bytes[3]) = (2, 0x1e, 20);
    bytes
};

#[test]
fn ip_options_and_destination_options_reach_the_backend() -> Result<()> {
    let Some(routed) = Routed::set("options", 2, 1500)? else { return Ok(()) };
    let stage = &routed.stage;
    for (name, config) in [("xlb4", stage.config()), ("xlb6", stage.config6())] {
        let run_dir = stage.lab.dir().join(name);
        let balancer = Balancer::start(&stage.balancer, &run_dir, &config.to_string())?;
        balancer.wait_for_backends(2, PATIENCE)?;
        let wire = Capture::at_switch(&stage.balancer)?;
        for (vip, options) in [
            (VIP4, Options::Ipv4(&NOPS)),
            (VIP4, Options::Ipv4(&RECORD_ROUTE)),
            (VIP6, Options::Destination(&PADDING)),
            (VIP6, Options::Destination(&EXPERIMENT)),
        ] {
            let before = balancer.outcome("forward_transmit")?;
            let server = SocketAddr::new(vip.parse()?, 80);
            for _ in 0..4 {
                let answer = lab::http_get_with_options(&stage.client, server, options)?;
                ensure!(answer.starts_with("HTTP/1.1 200") && answer.contains("web"), "{answer}");
            }
            ensure!(balancer.outcome("forward_transmit")? >= before + 4 * 4, "{options:?}");
        }
        wire.end()?;
        wire.has_no_bad_checksum()?;
        for filter in ["ip.opt.type.number == 7", "ip.opt.type.number == 1", "ipv6.dstopts"] {
            // On their way to the balancer, and from it in a tunnel.
            ensure!(wire.fields(filter, &["frame.number"])?.len() >= 2 * 16, "{filter}");
        }
        balancer.process_ends()?;
    }
    Ok(())
}

#[test]
fn fault_15_fragments_of_a_datagram_are_dropped_and_counted() -> Result<()> {
    let Some(stage) = Stage::set("fragments", 1)? else { return Ok(()) };
    let mut config = stage.config();
    config.services.push(stage::service("udp", &VIPS, "5000", "udp"));
    let balancer = stage.start(&config)?;
    for vip in VIPS {
        let before = balancer.outcome("drop_vip_fragment")?;
        let server = SocketAddr::new(vip.parse()?, 5000);
        stage.client.inside(|| -> Result<()> {
            let any: IpAddr = if server.is_ipv6() { "::".parse()? } else { "0.0.0.0".parse()? };
            let socket = std::net::UdpSocket::bind(SocketAddr::new(any, 0))?;
            // Three fragments of at most 1480 bytes.
            socket.send_to(&[7; 4000], server)?;
            Ok(())
        })??;
        counts(&balancer, "drop_vip_fragment", before, 3).with_context(|| vip)?;
    }
    Ok(())
}
