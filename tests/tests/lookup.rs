//! `xlb lookup` of what was on the wire: it must say of each packet what the kernel counted for it, and it must name
//! what it cannot read.

use std::collections::BTreeMap;
use std::net::{IpAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use etherparse::{Icmpv4Header, Icmpv4Type, PacketBuilder, icmpv4};
use lb_userspace::lookup::Explanation;
use tests::balancer::{Balancer, Ended};
use tests::lab::{self, Capture, IcmpSocket, wait_for};
use tests::stage::{self, PATIENCE, Stage, URL4, VIP4};

/// What clients sent to the VIP: not what the balancer sent on, nor what it answered.
const TO_VIP: &str = "eth && ip.dst == 203.0.113.10 && ip.src == 10.111.0.2 && !(ip.proto == 4)";

/// "Fragmentation needed" about a packet from a port of the VIP to the client.
fn frag_needed(port: u16) -> Result<Vec<u8>> {
    let mut carried = Vec::new();
    let packet = PacketBuilder::ipv4([203, 0, 113, 10], [10, 111, 0, 2], 60).tcp(port, 40000, 1, 1000);
    packet.write(&mut carried, &[])?;
    let kind = icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: 1300 };
    let header = Icmpv4Header::with_checksum(Icmpv4Type::DestinationUnreachable(kind), &carried);
    let mut message = header.to_bytes().to_vec();
    message.extend(carried);
    Ok(message)
}

/// A page, pings, ICMP errors, fragments, and SYNs to a port that nobody has.
fn traffic(stage: &Stage) -> Result<()> {
    ensure!(lab::http_get(&stage.client, URL4)?.0 == 200);
    stage.client.run(["ping", "-n", "-q", "-c", "3", "-i", "0.01", "-W", "5", VIP4])?;
    let (socket, vip): (_, IpAddr) = (IcmpSocket::new(&stage.client, false)?, VIP4.parse()?);
    socket.send(vip, &frag_needed(80)?)?;
    socket.send(vip, &frag_needed(81)?)?;
    stage.client.inside(|| -> Result<()> {
        UdpSocket::bind("0.0.0.0:0")?.send_to(&[0; 4000], (VIP4, 53))?;
        let refused = TcpStream::connect_timeout(&format!("{VIP4}:81").parse()?, Duration::from_millis(300));
        ensure!(refused.is_err(), "somebody answers on port 81");
        Ok(())
    })?
}

/// Outcomes that count nothing but what clients send to the VIP.
const COUNTED: [&str; 6] = [
    "forward_transmit",
    "forward_error_transmit",
    "answer_echo",
    "drop_vip_port",
    "drop_vip_fragment",
    "drop_icmp_stranger",
];

fn json(ended: &Ended) -> Result<Vec<Explanation>> {
    serde_json::from_str(&ended.stdout).with_context(|| format!("{}{}", ended.stdout, ended.stderr))
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("path")
}

/// A scene where that traffic was, with what was captured of it and which of it is good.
struct Captured {
    stage: Stage,
    balancer: Balancer,
    all: PathBuf,
    good: PathBuf,
}

fn captured(name: &str) -> Result<Option<Captured>> {
    let Some(stage) = Stage::set(name, 2)? else { return Ok(None) };
    let mut config = stage.config();
    config.services.push(stage::service("dns", &[VIP4], "53", "udp"));
    let balancer = stage.start(&config)?;
    let wire = Capture::at_switch(&stage.balancer)?;
    traffic(&stage)?;
    wait_for("the last SYN is counted", PATIENCE, || balancer.outcome("drop_vip_port").is_ok_and(|n| n > 0))?;
    wire.end()?;
    let (all, good) = (stage.lab.dir().join("all.pcapng"), stage.lab.dir().join("good.pcap"));
    wire.write(TO_VIP, "pcapng", &all)?;
    wire.write(&format!("{TO_VIP} && tcp.dstport == 80 && !icmp"), "pcap", &good)?;
    Ok(Some(Captured { stage, balancer, all, good }))
}

#[test]
fn a_capture_is_told_as_the_kernel_counted_it() -> Result<()> {
    let Some(Captured { stage, balancer, all, good }) = captured("pcap")? else { return Ok(()) };
    let (all, good) = (text(&all)?, text(&good)?);
    let ended = balancer.command(&["lookup", "--pcap", all, "-o", "json"])?;
    ended.expect(1, &[])?;
    let told = json(&ended)?;
    let mut outcomes: BTreeMap<&str, u64> = BTreeMap::new();
    told.iter().for_each(|told| *outcomes.entry(&told.outcome).or_default() += 1);
    println!("{outcomes:?}");
    for name in COUNTED {
        let (found, counted) = (outcomes.get(name).copied().unwrap_or(0), balancer.outcome(name)?);
        ensure!(found == counted && found > 0, "{name}: {found} in the capture, {counted} counted");
    }
    ensure!(outcomes.len() == COUNTED.len(), "{outcomes:?}");
    // One of each kind, with what only it has.
    let words: Vec<String> = told.iter().map(|told| told.frame.to_string()).collect();
    for expected in [
        ":80, SYN",
        "icmp 10.111.0.2 -> 203.0.113.10, echo request",
        "fragmentation needed (MTU 1300), about tcp 203.0.113.10:80 -> 10.111.0.2:40000",
        "-> 203.0.113.10:53, first fragment",
        "udp 10.111.0.2 -> 203.0.113.10, fragment at 1480",
    ] {
        ensure!(words.iter().any(|words| words.contains(expected)), "{expected:?} is not in {words:#?}");
    }
    let error = told.iter().find(|told| told.outcome == "forward_error_transmit").context("an error")?;
    let flow = balancer.lookup("10.111.0.2:40000", "203.0.113.10:80")?;
    ensure!(error.backend.as_ref() == Some(&flow) && error.service.as_deref() == Some("www"), "{error:?}");

    let ended = balancer.command(&["lookup", "--pcap", all])?;
    println!("{}", ended.stdout);
    let advice = ["OUTCOME", "drop_vip_fragment: Have the sender", "drop_vip_port: Scanners"];
    ended.expect(1, &advice)?;
    let wide = ended.stdout.lines().find(|line| line.chars().count() > 120);
    ensure!(wide.is_none(), "{}", wide.unwrap_or_default());

    let ended = balancer.command(&["lookup", "--pcap", good, "--verbose"])?;
    println!("{}", ended.stdout);
    ended.expect(
        0,
        &["  service   www", "  slot ", "ipip over IPv4, 10.255.0.", " by eth0", "forward_transmit"],
    )?;
    let ended = balancer.command(&["lookup", "--pcap", good, "--limit", "2", "-o", "json"])?;
    ended.expect(0, &["more packets are in", "--limit"])?;
    ensure!(json(&ended)?.len() == 2);

    // Much more than one request to the agent takes.
    let many = stage.lab.dir().join("many.pcapng");
    let mut words = vec!["mergecap", "-a", "-w", text(&many)?];
    words.extend([all; 40]);
    stage.balancer.run(words)?;
    let ended = balancer.command(&["lookup", "--pcap", text(&many)?, "--limit", "100000", "-o", "json"])?;
    ended.expect(1, &[])?;
    let repeated = json(&ended)?;
    let same = |(index, other): (usize, &Explanation)| other.outcome == told[index % told.len()].outcome;
    ensure!(repeated.len() == 40 * told.len() && repeated.iter().enumerate().all(same));
    Ok(())
}

/// A SYN to port 80 from the Ethernet header on, as tcpdump -XX and people write it.
fn syn(port: u16) -> Result<String> {
    let mut frame = Vec::new();
    let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 1, 0], [2, 0, 0, 0, 2, 0]);
    let builder = builder.ipv4([10, 111, 0, 2], [203, 0, 113, 10], 64);
    builder.tcp(40000, port, 1, 1024).syn().write(&mut frame, &[])?;
    Ok(frame.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" "))
}

#[test]
fn a_frame_in_hex_is_told_by_the_agent_and_by_the_pins_alike() -> Result<()> {
    let Some(stage) = Stage::set("hex", 2)? else { return Ok(()) };
    let balancer = stage.start(&stage.config())?;
    let (good, bad) = (syn(80)?, syn(81)?);
    let ended = balancer.command(&["lookup", "--hex", &good])?;
    println!("{}", ended.stdout);
    let way = ["tcp 10.111.0.2:40000 -> 203.0.113.10:80, SYN", "service   www", "backend   web/web", "way "];
    ended.expect(0, &way)?;
    let advice = ["drop_vip_port", "advice    Scanners cause some"];
    balancer.command(&["lookup", "--hex", &bad, "--interface", "eth0"])?.expect(1, &advice)?;
    let frame = json(&balancer.command(&["lookup", "--hex", &good, "-o", "json"])?)?.remove(0);
    let flow = balancer.xlb(&["lookup", "10.111.0.2:40000", "203.0.113.10:80", "-o", "json"])?;
    let flow: Explanation = serde_json::from_str(&flow)?;
    ensure!(frame.backend == flow.backend && frame.slot == flow.slot, "{frame:?} {flow:?}");
    let (xlb, run_dir) = (balancer.binary.to_string_lossy(), balancer.run_dir.to_string_lossy());
    let piped = format!("echo '{}' | {xlb} lookup --hex - --run-dir {run_dir}", good.replace(' ', ":\n"));
    Ended::of(&mut stage.balancer.exec(["sh", "-c", &piped]))?.expect(0, &["forward_transmit"])?;

    let nowhere = ["xlb is not on an interface eth7", "eth0"];
    balancer.command(&["lookup", "--hex", &good, "--interface", "eth7"])?.expect(1, &nowhere)?;
    balancer.process.kill();
    let ended = balancer.command(&["lookup", "--hex", &good, "-o", "json"])?;
    ended.expect(0, &["names are not known"])?;
    let pinned = json(&ended)?.remove(0);
    ensure!((pinned.slot, pinned.backend_id) == (frame.slot, frame.backend_id), "{pinned:?} {frame:?}");
    ensure!(pinned.backend_address == frame.backend_address && pinned.egress.as_deref() == Some("eth0"));
    balancer.command(&["lookup", "--hex", &bad])?.expect(1, &["drop_vip_port"])?;
    // The agent's end is told before the wrong name.
    balancer.command(&["lookup", "--hex", &good, "-i", "eth7"])?.expect(4, &nowhere)?;
    Ok(())
}

#[test]
fn what_lookup_cannot_read_is_named_with_a_way_out() -> Result<()> {
    let Some(Captured { stage, balancer, all, .. }) = captured("unread")? else { return Ok(()) };
    let whole = std::fs::read(&all)?;
    let file = |name: &str, bytes: &[u8]| -> Result<String> {
        let path = stage.lab.dir().join(name);
        std::fs::write(&path, bytes)?;
        Ok(path.to_string_lossy().into_owned())
    };
    // The last block is the interface's statistics.
    let cut = file("cut.pcapng", &whole[..whole.len() * 2 / 3])?;
    let notes = file("notes.txt", b"what I saw last night, and more\n")?;
    let empty = file("empty.pcap", b"")?;
    let (all, long) = (text(&all)?, "00".repeat(60_000));
    let rows: [(&[&str], i32, &[&str]); 16] = [
        (&["--hex", "02 zz"], 1, &["--hex: character 4, `z`, is no hex digit"]),
        (&["--hex", "020"], 1, &["3 hex digits make no whole bytes"]),
        (&["--hex", ""], 1, &["the frame is empty"]),
        (&["--hex", &long], 1, &["pass_not_ip"]),
        (&["--pcap", &cut], 1, &["cut.pcapng ends within packet", "forward_transmit"]),
        (&["--pcap", &notes], 1, &["notes.txt: it is neither pcap nor pcapng", "tcpdump"]),
        (&["--pcap", &empty], 1, &["empty.pcap: it is empty"]),
        (&["--pcap", "/nowhere.pcap"], 1, &["/nowhere.pcap cannot be opened", "No such file"]),
        (&["192.0.2.1:1", "[2001:db8:113::10]:80"], 1, &["different address families"]),
        (&[], 2, &["SRC:PORT"]),
        (&["192.0.2.1:1"], 2, &["VIP:PORT"]),
        (&["--hex", "00", "--pcap", all], 2, &["--pcap"]),
        (&["--hex", "00", "192.0.2.1:1", "203.0.113.10:80"], 2, &["--hex"]),
        (&["--pcap", all, "--protocol", "udp"], 2, &["--protocol"]),
        (&["--pcap", all, "--limit", "0"], 2, &["--limit"]),
        (&["--hex", "00", "--limit", "5"], 2, &["--limit"]),
    ];
    for (arguments, code, words) in rows {
        let ended = balancer.command(&[&["lookup"], arguments].concat())?;
        let shown = arguments.iter().map(|word| &word[..word.len().min(40)]).collect::<Vec<_>>();
        ended.expect(code, words).with_context(|| format!("{shown:?}"))?;
    }
    Ok(())
}
