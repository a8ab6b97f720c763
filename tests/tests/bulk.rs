//! Bulk transfers through the balancer, what its packets look like on the wire, and generic mode.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::lab::{self, Capture, Host, Transport, wait_for};
use tests::stage::{self, Config, PATIENCE, Stage, URLS, VIP4, VIPS};

/// One service for iperf3, and one backend: its control connection and its streams must meet the same server.
fn iperf3_config(stage: &Stage) -> Config {
    let health = stage::PATIENT_CHECKS.replace("path:", "port: 80, path:");
    Config { health, services: vec![stage::service("bulk", &VIPS, "5201", "tcp")], ..stage.config() }
}

/// Transfers 40 MB or more within 20 s.
fn iperf3(client: &Host, arguments: &[&str]) -> Result<()> {
    let words =
        ["timeout", "20", "iperf3", "--json", "--connect-timeout", "2000", "--bytes", "40M", "--client"];
    let report = client.run(words.iter().chain(arguments))?;
    let report: serde_json::Value = serde_json::from_str(&report)?;
    // The sender stops at that many; what its sockets still hold, some megabytes each, is not waited for.
    let bytes = report["end"]["sum_received"]["bytes"].as_u64().with_context(|| format!("{report}"))?;
    ensure!(bytes >= 10 << 20, "{arguments:?}: {bytes} bytes arrived");
    Ok(())
}

#[test]
fn parallel_streams_go_up_and_down_over_both_families() -> Result<()> {
    let Some(stage) = Stage::set("iperf3", 1)? else { return Ok(()) };
    lab::iperf3_server(&stage.backends[0].host)?;
    let balancer = stage.start(&iperf3_config(&stage))?;
    for vip in VIPS {
        for direction in [&[][..], &["--reverse"]] {
            iperf3(&stage.client, &[&[vip, "--parallel", "4"], direction].concat())?;
        }
    }
    ensure!(balancer.outcome("drop_oversize")? == 0);
    Ok(())
}

#[test]
fn a_large_download_arrives_as_it_was_sent() -> Result<()> {
    let Some(stage) = Stage::set("download", 2)? else { return Ok(()) };
    let _balancer = stage.start(&stage.config())?;
    let expected: Vec<u8> = (0..8_u64 << 17).flat_map(u64::to_le_bytes).collect();
    for url in URLS {
        let output = stage.client.exec(["curl", "-qsSg", &format!("{url}big")]).output()?;
        ensure!(output.stdout == expected, "{url}: {} bytes, or others", output.stdout.len());
    }
    Ok(())
}

/// Whether an offload of a host's `eth0` is on.
fn offload(host: &Host, name: &str) -> Result<bool> {
    let list = host.run(["ethtool", "-k", "eth0"])?;
    let line = list.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(": "));
    Ok(line.with_context(|| format!("no {name}"))?.starts_with("on"))
}

const GRO: &str = "generic-receive-offload";

#[test]
fn generic_mode_takes_an_upload_because_it_turns_gro_off_until_detach() -> Result<()> {
    let Some(stage) = Stage::set("generic", 1)? else { return Ok(()) };
    lab::iperf3_server(&stage.backends[0].host)?;
    stage.balancer.run(["ethtool", "-K", "eth0", "gro", "on"])?;
    let balancer = stage.start(&Config { top: "mode: generic\n".to_owned(), ..iperf3_config(&stage) })?;
    ensure!(balancer.status()?.interfaces[0].mode == "generic");
    ensure!(balancer.xlb(&["status"])?.contains("eth0 (generic)"));
    ensure!(stage.balancer.ip("link show eth0")?.contains("xdpgeneric"));
    ensure!(!offload(&stage.balancer, GRO)?);
    for vip in VIPS {
        iperf3(&stage.client, &[vip, "--parallel", "2"])?;
    }
    ensure!(balancer.outcome("drop_super_frame")? == 0);
    balancer.process_ends()?;
    ensure!(offload(&stage.balancer, GRO)?, "GRO stays off after detach");
    Ok(())
}

#[test]
fn gro_that_was_off_stays_off_after_detach() -> Result<()> {
    let Some(stage) = Stage::set("nogro", 0)? else { return Ok(()) };
    stage.balancer.run(["ethtool", "-K", "eth0", "gro", "off"])?;
    let config = Config { top: "mode: generic\n".to_owned(), ..stage.config() };
    let config = Config { pool: "    on_empty: drop\n".to_owned(), ..config };
    let balancer = stage.start(&config)?;
    balancer.process_ends()?;
    ensure!(!offload(&stage.balancer, GRO)?);
    Ok(())
}

/// A client's TSO is out of xlb's reach: its frames of many segments arrive whole over veths, as long as no
/// native XDP program is on the way, for which the kernel splits them.
#[test]
fn super_frames_of_a_sender_with_tso_are_dropped_and_counted() -> Result<()> {
    let Some(stage) = Stage::set("tso", 1)? else { return Ok(()) };
    lab::iperf3_server(&stage.backends[0].host)?;
    let balancer = stage.start(&Config { top: "mode: generic\n".to_owned(), ..iperf3_config(&stage) })?;
    let mut unload = stage.client.exec_at_switch(["ip", "link", "set", "client-0", "xdpdrv", "off"]);
    ensure!(unload.status()?.success());
    stage.client.run(["ethtool", "-K", "eth0", "tx", "on", "sg", "on", "tso", "on", "gso", "on"])?;
    ensure!(offload(&stage.client, "tcp-segmentation-offload")?);
    // How far it gets is TCP's affair.
    let upload = stage.client.spawn(["iperf3", "--time", "30", "--client", VIP4])?;
    let super_frames = || balancer.outcome("drop_super_frame");
    upload.wait_until("a dropped super-frame", PATIENCE, || super_frames().is_ok_and(|count| count > 0))?;
    upload.kill();

    // The cure: a sender that hands over what fits the link. On veth `tx off` alone leaves TSO on.
    stage.client.run(["ethtool", "-K", "eth0", "tx", "off", "tso", "off", "gso", "off"])?;
    ensure!(!offload(&stage.client, "tcp-segmentation-offload")?);
    // What the killed client still had to send.
    wait_for("an end of super-frames", PATIENCE, || {
        let before = super_frames().unwrap_or(0);
        std::thread::sleep(Duration::from_millis(500));
        super_frames().is_ok_and(|count| count == before)
    })?;
    let before = super_frames()?;
    retry(|| iperf3(&stage.client, &[VIP4]))?;
    ensure!(super_frames()? == before);
    Ok(())
}

/// Until the server has noticed that its last client is gone.
fn retry(mut work: impl FnMut() -> Result<()>) -> Result<()> {
    let mut last = Ok(());
    wait_for("success", PATIENCE, || {
        last = work();
        last.is_ok()
    })
    .and(last)
}

/// Refuses a wrong checksum in any layer of any packet.
fn has_good_checksums(capture: &Capture) -> Result<()> {
    capture.has_no_bad_checksum()?;
    // tshark looked at them, and there were some.
    let good = capture.fields("tcp.checksum.status == 1 && ip.checksum.status == 1", &["frame.number"])?;
    let good6 = capture.fields("tcp.checksum.status == 1 && ipv6", &["frame.number"])?;
    ensure!(good.len() > 200 && good6.len() > 200, "only {} and {} packets", good.len(), good6.len());
    ensure!(capture.fields("udp.checksum.status == 1 && dns", &["frame.number"])?.len() == 4);
    Ok(())
}

/// Requests, a download, an upload and DNS over both families, with captures of the backend's wire and of the client.
fn captured(stage: &Stage, config: &Config) -> Result<Capture> {
    lab::iperf3_server(&stage.backends[0].host)?;
    let mut config = config.clone();
    lab::dns(&stage.backends[0].host, "web1")?;
    config.services.push(stage::service("bulk", &VIPS, "5201", "tcp"));
    config.services.push(stage::service("dns", &VIPS, "53", "udp"));
    let _balancer = stage.start(&config)?;
    let wire = Capture::at_switch(&stage.backends[0].host)?;
    let client = Capture::at_host(&stage.client)?;
    for (url, vip) in URLS.into_iter().zip(VIPS) {
        stage::none_failed(&lab::http_load(&stage.client, url, 60, 2)?)?;
        let part = ["curl", "-qsSg", "--range", "0-999999", "--output", "/dev/null", &format!("{url}big")];
        stage.client.run(part)?;
        stage.client.run(["iperf3", "--bytes", "1M", "--client", vip])?;
        ensure!(lab::dns_who(&stage.client, vip, Transport::Udp)? == "web1");
    }
    for capture in [&wire, &client] {
        capture.end()?;
        has_good_checksums(capture)?;
    }
    Ok(wire)
}

/// Outer source of each flow: one for a flow, many for many flows.
fn check_sources(packets: &[Vec<String>], prefix: &str) -> Result<()> {
    let mut sources: BTreeMap<&[String], BTreeSet<&str>> = BTreeMap::new();
    for packet in packets {
        ensure!(packet[0].starts_with(prefix), "{packet:?}");
        // A client may use a port for several services.
        sources.entry(&packet[1..3]).or_default().insert(&packet[0]);
    }
    ensure!(sources.values().all(|of_flow| of_flow.len() == 1), "a flow changes its source: {sources:?}");
    let different: BTreeSet<_> = sources.values().collect();
    // 60 flows over 256 or more addresses: fewer than 30 different ones do not happen by chance.
    ensure!(sources.len() >= 60 && different.len() >= 30, "{} of {}", different.len(), sources.len());
    Ok(())
}

#[test]
fn ipv4_tunnel_headers_are_as_promised_and_all_checksums_good() -> Result<()> {
    let Some(stage) = Stage::set("wire4", 1)? else { return Ok(()) };
    let wire = captured(&stage, &stage.config())?;
    for protocol in [4, 41] {
        let filter = format!("ip.proto == {protocol} && tcp");
        let fields = ["ip.src", "tcp.srcport", "tcp.dstport", "ip.dst", "ip.ttl", "ip.flags.df", "ip.id"];
        let packets = wire.fields(&filter, &fields)?;
        check_sources(&packets, "10.255.0.")?;
        for packet in &packets {
            let constant: Vec<&str> = packet[3..].iter().map(String::as_str).collect();
            ensure!(
                matches!(constant[..], ["10.111.0.11", "64", "True" | "1", "0x0000"]),
                "protocol {protocol}: {packet:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn ipv6_tunnel_headers_are_as_promised_and_all_checksums_good() -> Result<()> {
    let Some(stage) = Stage::set("wire6", 1)? else { return Ok(()) };
    let wire = captured(&stage, &stage.config6())?;
    for protocol in [4, 41] {
        let filter = format!("ipv6.nxt == {protocol} && tcp");
        let fields = ["ipv6.src", "tcp.srcport", "tcp.dstport", "ipv6.dst", "ipv6.hlim", "ipv6.flow"];
        let packets = wire.fields(&filter, &fields)?;
        check_sources(&packets, "fd00:255:")?;
        for packet in &packets {
            ensure!(packet[3] == "fd00:111::b" || packet[3] == "fd00:111::11", "{packet:?}");
            ensure!(packet[4] == "64", "{packet:?}");
        }
        let labels: BTreeSet<&str> = packets.iter().map(|packet| packet[5].as_str()).collect();
        ensure!(labels.len() >= 50, "{} flow labels", labels.len());
    }
    Ok(())
}

/// TCP segments that a host's kernel refused for their checksum.
fn refused_segments(host: &Host) -> Result<u64> {
    let told = host.run(["nstat", "-asz", "TcpInCsumErrors"])?;
    let line = told.lines().find_map(|line| line.strip_prefix("TcpInCsumErrors"));
    let count = line.and_then(|line| line.split_whitespace().next()).context(told.clone())?;
    Ok(count.parse()?)
}

/// A sender with a NIC finishes its packets; one behind a veth leaves that to a NIC that there is not.
#[test]
fn a_veth_is_warned_about_because_xdp_loses_partial_checksums() -> Result<()> {
    let Some(stage) = Stage::set("warning", 1)? else { return Ok(()) };
    let balancer = stage.start(&stage.config())?;
    let backend = &stage.backends[0].host;
    let log = balancer.process.log();
    let warning = log.lines().find(|line| line.contains("bad checksums")).context("no warning")?;
    for words in ["WARN", "interface=eth0", "ethtool -K IF tx off"] {
        ensure!(warning.contains(words), "{words}: {warning}");
    }

    stage.client.run(["ethtool", "-K", "eth0", "tx", "on"])?;
    ensure!(offload(&stage.client, "tx-checksumming")?);
    for (vip, url) in VIPS.into_iter().zip(URLS) {
        let (wire, before) = (Capture::at_switch(backend)?, refused_segments(backend)?);
        ensure!(lab::http_get_within(&stage.client, url, SHORT, SHORT).is_err(), "{vip} answers");
        wire.end()?;
        let bad = wire.fields("tcp.checksum.status == 0 && tcp.dstport == 80", &["tcp.flags"])?;
        ensure!(!bad.is_empty(), "{vip}: the checksums are good");
        ensure!(refused_segments(backend)? > before, "{vip}: the backend took them");
        ensure!(wire.has_no_bad_checksum().is_err(), "{vip}");
    }

    // The cure as the warning says it, where the sender is.
    stage.client.run(["ethtool", "-K", "eth0", "tx", "off"])?;
    let (wire, before) = (Capture::at_switch(backend)?, refused_segments(backend)?);
    for url in URLS {
        stage::none_failed(&lab::http_load(&stage.client, url, 20, 2)?)?;
    }
    wire.end()?;
    wire.has_no_bad_checksum()?;
    ensure!(refused_segments(backend)? == before);
    Ok(())
}

const SHORT: Duration = Duration::from_millis(300);
