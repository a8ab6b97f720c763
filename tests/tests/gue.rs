//! Tunnels through UDP: real clients over both families to backends of either, and what is on the wire.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use etherparse::{SlicedPacket, TransportSlice};
use tests::balancer::{Balancer, decap, decap_with};
use tests::lab::{self, Capture, Host, Transport};
use tests::stage::{self, Config, PATIENCE, Stage, TUNNEL_SOURCES, URL4, URLS, VIPS};

const REQUESTS: u32 = 400;

fn gue(config: Config) -> Config {
    Config { forward: "gue".to_owned(), ..config }
}

fn config(stage: &Stage, ipv6_backends: bool) -> Config {
    gue(if ipv6_backends { stage.config6() } else { stage.config() })
}

/// Requests over both families with backends of one: what is sent into tunnels is what comes out of them.
fn tunnels(name: &str, ipv6_backends: bool) -> Result<()> {
    let Some(stage) = Stage::set(name, 3)? else { return Ok(()) };
    let balancer = stage.start(&config(&stage, ipv6_backends))?;
    for url in URLS {
        stage.balances(url, REQUESTS, 3)?;
    }
    // SYN, ACK, request and FIN at the least, from every client to its backend.
    let forwarded = balancer.outcome("forward_transmit")?;
    ensure!(forwarded >= 4 * 2 * u64::from(REQUESTS), "{forwarded} packets forwarded");
    let mut decapsulated = 0;
    for backend in &stage.backends {
        decapsulated += backend.end_decap()?.get("decapsulated")?;
    }
    ensure!(decapsulated == forwarded, "{forwarded} packets forwarded, {decapsulated} decapsulated");
    let told = balancer.xlb(&["lookup", "10.111.0.2:40000", "203.0.113.10:80"])?;
    let family = if ipv6_backends { "IPv6" } else { "IPv4" };
    ensure!(told.contains(&format!("gue over {family} to port 6080")), "{told}");
    ensure!(balancer.xlb(&["backend", "list"])?.contains(" gue "));
    balancer.command(&["verify"])?.expect(0, &[])
}

#[test]
fn both_families_reach_ipv4_backends_through_udp() -> Result<()> {
    tunnels("gue4", false)
}

#[test]
fn both_families_reach_ipv6_backends_through_udp() -> Result<()> {
    tunnels("gue6", true)
}

/// Requests and DNS over both families to one backend, and what was on its wire.
fn captured(stage: &Stage, config: Config) -> Result<Capture> {
    lab::dns(&stage.backends[0].host, "web1")?;
    let mut config = config;
    config.services.push(stage::service("dns", &VIPS, "53", "udp"));
    let _balancer = stage.start(&config)?;
    let wire = Capture::at_switch(&stage.backends[0].host)?;
    for (url, vip) in URLS.into_iter().zip(VIPS) {
        stage::none_failed(&lab::http_load(&stage.client, url, 60, 2)?)?;
        ensure!(lab::dns_who(&stage.client, vip, Transport::Udp)? == "web1");
    }
    wire.end()?;
    wire.has_no_bad_checksum()?;
    Ok(wire)
}

/// The flow of a tunnelled packet by its source, and whether it is TCP.
fn flow(payload: &str) -> Result<(String, bool)> {
    let bytes: Vec<u8> = (0..payload.len() / 2)
        .map(|i| u8::from_str_radix(&payload[2 * i..2 * i + 2], 16))
        .collect::<Result<_, _>>()?;
    let packet = SlicedPacket::from_ip(&bytes)?;
    let (port, tcp) = match packet.transport.context("no ports")? {
        TransportSlice::Tcp(tcp) => (tcp.source_port(), true),
        TransportSlice::Udp(udp) => (udp.source_port(), false),
        other => anyhow::bail!("{other:?}"),
    };
    Ok((format!("{} {port}", if bytes[0] >> 4 == 4 { "IPv4" } else { "IPv6" }), tcp))
}

/// Source ports of the tunnel: one for a flow, many for many flows; and from how many of each family.
fn check_ports(packets: &[Vec<String>]) -> Result<()> {
    let mut ports: BTreeMap<String, BTreeSet<u16>> = BTreeMap::new();
    for packet in packets {
        let (flow, _) = flow(&packet[1])?;
        ports.entry(flow).or_default().insert(packet[0].parse()?);
    }
    ensure!(ports.values().all(|of_flow| of_flow.len() == 1), "a flow changes its port: {ports:?}");
    let different: BTreeSet<u16> = ports.values().flatten().copied().collect();
    ensure!(different.iter().all(|port| *port >= 0xc000), "not all are dynamic ports: {different:?}");
    for family in ["IPv4", "IPv6"] {
        let flows = ports.keys().filter(|flow| flow.starts_with(family)).count();
        ensure!(flows >= 61, "{flows} flows of {family}");
    }
    // 122 flows over 16384 ports: more than a few that share one do not happen by chance.
    ensure!(different.len() >= 115, "{} ports", different.len());
    Ok(())
}

#[test]
fn udp_over_ipv4_has_a_port_for_each_flow_and_no_checksum() -> Result<()> {
    let Some(stage) = Stage::set("guewire4", 1)? else { return Ok(()) };
    let wire = captured(&stage, config(&stage, false))?;
    let fields = ["udp.srcport", "udp.payload", "udp.checksum", "ip.ttl", "ip.flags.df", "ip.id", "ip.dst"];
    let packets = wire.fields("udp.dstport == 6080", &fields)?;
    check_ports(&packets)?;
    for packet in &packets {
        let constant: Vec<&str> = packet[2..].iter().map(String::as_str).collect();
        ensure!(
            matches!(constant[..], ["0x0000", "64", "True" | "1", "0x0000", "10.111.0.11"]),
            "{packet:?}"
        );
    }
    ensure!(wire.fields("udp.dstport == 6080 && ip.checksum.status != 1", &["ip.src"])?.is_empty());
    Ok(())
}

#[test]
fn udp_over_ipv6_has_a_port_for_each_flow_and_a_good_checksum() -> Result<()> {
    let Some(stage) = Stage::set("guewire6", 1)? else { return Ok(()) };
    let wire = captured(&stage, config(&stage, true))?;
    let fields = ["udp.srcport", "udp.payload", "udp.checksum.status", "ipv6.hlim", "ipv6.flow"];
    let packets = wire.fields("ipv6 && udp.dstport == 6080", &fields)?;
    check_ports(&packets)?;
    for packet in &packets {
        ensure!(packet[2] == "1" && packet[3] == "64", "{packet:?}");
    }
    let labels: BTreeSet<&str> = packets.iter().map(|packet| packet[4].as_str()).collect();
    ensure!(labels.len() >= 100, "{} flow labels", labels.len());
    let of_tcp = |packet: &&Vec<String>| flow(&packet[1]).is_ok_and(|(_, tcp)| tcp);
    ensure!(packets.iter().filter(of_tcp).count() >= 4 * 120);
    Ok(())
}

#[test]
fn another_port_is_another_tunnel_and_keeps_what_is_known_of_the_backends() -> Result<()> {
    let Some(stage) = Stage::set("gueport", 2)? else { return Ok(()) };
    let balancer = stage.start(&config(&stage, false))?;
    stage.balances(URL4, 100, 2)?;
    for backend in &stage.backends {
        backend.end_decap()?;
        decap_with(&backend.host, "eth0", &VIPS, &TUNNEL_SOURCES, &["--gue-port", "7000"])?;
    }
    let short = std::time::Duration::from_millis(300);
    ensure!(lab::http_get_within(&stage.client, URL4, short, short).is_err(), "6080 is no tunnel any more");
    let other = Config { pool: "    gue_port: 7000\n".to_owned(), ..config(&stage, false) };
    balancer.reload(&other.to_string())?;
    ensure!(balancer.backends()?.iter().all(|backend| backend.state == "up"));
    for url in URLS {
        stage.balances(url, REQUESTS, 2)?;
    }
    let told = balancer.xlb(&["lookup", "10.111.0.2:40000", "203.0.113.10:80"])?;
    ensure!(told.contains("gue over IPv4 to port 7000"), "{told}");
    Ok(())
}

#[test]
fn health_is_adopted_by_an_agent_whose_file_names_another_tunnel() -> Result<()> {
    let Some(stage) = Stage::set("gueadopt", 1)? else { return Ok(()) };
    let mut balancer = stage.start(&stage.config())?;
    // Nobody answers checks any more: what is up was so before.
    stage.backends[0].nginx.process.kill();
    for pool in ["", "    gue_port: 7000\n"] {
        balancer.process.kill();
        let config = Config { pool: pool.to_owned(), ..config(&stage, false) };
        std::fs::write(&balancer.config, config.to_string())?;
        balancer.restart()?;
        ensure!(balancer.backends()?[0].state == "up", "{:?}", balancer.backends()?);
    }
    Ok(())
}

#[test]
fn udp_tunnels_from_elsewhere_do_not_get_through() -> Result<()> {
    let Some(stage) = Stage::set("guerogue", 1)? else { return Ok(()) };
    let web = &stage.backends[0];
    let short = std::time::Duration::from_millis(300);
    let outer_source = "[10.254.0.0/24, \"fd00:254::/64\"]".to_owned();
    for (name, ipv6_backends) in [("outer4", false), ("outer6", true)] {
        let config = Config { outer_source: outer_source.clone(), ..config(&stage, ipv6_backends) };
        let balancer = Balancer::start(&stage.balancer, &stage.lab.dir().join(name), &config.to_string())?;
        balancer.wait_for_backends(1, PATIENCE)?;
        for url in URLS {
            let result = lab::http_get_within(&stage.client, url, short, short);
            ensure!(result.is_err(), "{url} got through: {result:?}");
        }
        balancer.process_ends()?;
    }
    let counts = web.end_decap()?;
    // A SYN over both families inside of both families.
    ensure!(counts.get("drop_source")? >= 4 && counts.get("decapsulated")? == 0, "{counts:?}");
    // The tunnel's end is what refused them: with these sources allowed, the same packets arrive.
    decap(&web.host, &VIPS, &["10.254.0.0/24", "fd00:254::/64"])?;
    let _balancer = stage.start(&Config { outer_source, ..config(&stage, false) })?;
    ensure!(lab::http_get(&stage.client, URL4)?.1 == "web1\n");
    Ok(())
}

/// Has the kernel take tunnel headers off; what is missing, where it cannot.
fn kernel_takes_tunnels(host: &Host) -> Result<Option<String>> {
    for words in ["fou add port 6080 gue", "-6 fou add port 6080 gue"] {
        if let Err(error) = host.ip(words) {
            return Ok(Some(format!("`ip {words}`: {error:#}")));
        }
    }
    for device in ["tunl0", "sit0", "ip6tnl0"] {
        if let Err(error) = host.set_link(device, true) {
            return Ok(Some(format!("{device}: {error:#}")));
        }
        host.sysctl(&format!("net.ipv4.conf.{device}.rp_filter"), "0")?;
    }
    Ok(None)
}

#[test]
fn the_kernels_own_fou_takes_the_tunnels_where_it_has_one() -> Result<()> {
    let Some(stage) = Stage::set("fou", 1)? else { return Ok(()) };
    let web = &stage.backends[0];
    web.end_decap()?;
    if let Some(missing) = kernel_takes_tunnels(&web.host)? {
        eprintln!("SKIPPED: this kernel has no fou, so nobody but xlb decap was tried: {missing}");
        return Ok(());
    }
    for (name, ipv6_backends) in [("outer4", false), ("outer6", true)] {
        let config = config(&stage, ipv6_backends);
        let balancer = Balancer::start(&stage.balancer, &stage.lab.dir().join(name), &config.to_string())?;
        balancer.wait_for_backends(1, PATIENCE)?;
        for url in URLS {
            ensure!(lab::http_get(&stage.client, url)?.1 == "web1\n", "{url}");
        }
        balancer.process_ends()?;
    }
    Ok(())
}
