//! Nanoseconds that a packet takes on its way through the balancer.
//!
//! A driver program in the kernel hands fresh packets of many flows to the program under test. In
//! every round the harness alone, the floor (grow the head and transmit) and the balancer are timed one
//! after the other; of each the lowest tenth of all rounds counts, because what disturbs a shared
//! machine only ever adds time.

mod report;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::Subcommand;
use etherparse::PacketBuilder;
use lb_common::abi::{Interface, Record, Source};
use lb_common::wire::Mac;
use lb_userspace::bpf::{self, BpfFs, Datapath, FRAME_BYTES, Packets, Target};
use lb_userspace::capacity::Capacity;
use lb_userspace::config;
use lb_userspace::config::model::Config;
use lb_userspace::nexthop::NextHop;
use lb_userspace::reconcile::desired::{LoadTime, World, desired};
use lb_userspace::reconcile::plan::plan_at_once;

use crate::flows::{self, Flows};
use report::Report;
use serde::Serialize;

#[derive(Subcommand)]
pub enum Bench {
    /// Nanoseconds a packet takes in the kernel, against a floor of the same run: every mode, both families, from one
    /// flow to a million (needs root)
    Packet {
        /// How often each case is timed
        #[arg(long, default_value_t = 60)]
        rounds: u32,
        /// Packets in one timing
        #[arg(long, default_value_t = 100_000)]
        packets: u32,
        /// Only cases with this in their name
        #[arg(long, default_value = "")]
        only: String,
        /// Where to write the result
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// What changes of a pool break, over ways to choose a backend, with and without memory (simulated)
    Flows(Flows),
}

pub fn run(bench: Bench) -> Result<()> {
    match bench {
        Bench::Packet { rounds, packets, only, json } => packet(rounds, packets, &only, json.as_deref()),
        Bench::Flows(arguments) => flows::run(&arguments),
    }
}

fn packet(rounds: u32, packets: u32, only: &str, json: Option<&Path>) -> Result<()> {
    let mut rows = Vec::new();
    pin_to_one_cpu()?;
    println!(
        "{:44} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "ns per packet", "flows", "harness", "floor", "net", "- floor"
    );
    for scene in scenes().into_iter().filter(|scene| scene.name.contains(only)) {
        let mut stage = Stage::set(&scene)?;
        for flows in scene.flows {
            let [nothing, floor, program] = stage.time(&scene, *flows, rounds, packets)?;
            println!(
                "{:44} {flows:9} {nothing:9.1} {:9.1} {:9.1} {:9.1}",
                scene.name,
                floor - nothing,
                program - nothing,
                program - floor
            );
            rows.push(Row { scene: scene.name.to_owned(), flows: *flows, nothing, floor, program });
        }
    }
    println!(
        "\nharness: the driver alone; floor, net: beyond the harness; - floor: the balancer beyond the floor"
    );
    let report = Report::new("packet", rows)?;
    println!("{}, {}, {}", report.machine, report.commit, report.date);
    println!("again: {}", report.command);
    json.map_or(Ok(()), |path| report.write(path))
}

/// Nanoseconds of a packet, all in all.
#[derive(Serialize)]
struct Row {
    scene: String,
    flows: u32,
    nothing: f64,
    floor: f64,
    program: f64,
}

/// Timings wander when the thread does.
fn pin_to_one_cpu() -> Result<()> {
    let mut cpus = rustix::thread::CpuSet::new();
    cpus.set(0);
    rustix::thread::sched_setaffinity(None, &cpus).context("the thread cannot be bound to CPU 0")
}

const FLOWS: &[u32] = &[1, 1000, 100_000, 1_000_000];

#[derive(Clone, Copy)]
struct Scene {
    name: &'static str,
    services: u32,
    forward: &'static str,
    v6: bool,
    udp: bool,
    /// Connection IDs of QUIC name the backends.
    quic: bool,
    /// Addressed to no VIP.
    stray: bool,
    /// Of a connection whose addresses are translated.
    part: Part,
    /// Whether backends are of the other family than their clients.
    crossing: bool,
    features: Loaded,
    flows: &'static [u32],
}

/// Which packet of its connection it is, where there are connections.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// One of many.
    Any,
    /// The first.
    First,
    /// One of many of its backend.
    Reply,
}

/// What the program is loaded with.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Loaded {
    /// What the configuration needs.
    Needed,
    /// As little as one can do with.
    Smallest,
    /// Everything but tracing, needed or not.
    Fullest,
}

fn scenes() -> Vec<Scene> {
    let scene = Scene {
        name: "IPv4 TCP, ipip",
        services: 1,
        forward: "ipip",
        v6: false,
        udp: false,
        quic: false,
        stray: false,
        part: Part::Any,
        crossing: false,
        features: Loaded::Needed,
        flows: FLOWS,
    };
    let nat = Scene { forward: "nat", flows: &[1, 1000, 100_000], ..scene };
    let fullnat = Scene { forward: "fullnat", udp: true, ..nat };
    let first = |scene| Scene { part: Part::First, flows: &[1_000_000], ..scene };
    // The port that stands for a client is known of one.
    let reply = |scene: Scene| Scene {
        part: Part::Reply,
        flows: if scene.forward == "nat" { scene.flows } else { &[1] },
        ..scene
    };
    let of_program = Scene { forward: "l2", flows: &[1, 1000], ..scene };
    vec![
        Scene { ..scene },
        Scene { name: "IPv4 UDP, ipip", udp: true, ..scene },
        Scene { name: "IPv6 TCP, ipip", v6: true, ..scene },
        Scene { name: "IPv4 QUIC, ipip, by connection ID", udp: true, quic: true, ..scene },
        Scene { name: "IPv6 QUIC, ipip, by connection ID", udp: true, quic: true, v6: true, ..scene },
        Scene { name: "IPv4 TCP, gue", forward: "gue", ..scene },
        Scene { name: "IPv4 UDP, gue", forward: "gue", udp: true, ..scene },
        Scene { name: "IPv6 TCP, gue", forward: "gue", v6: true, ..scene },
        Scene { name: "IPv6 UDP, gue", forward: "gue", v6: true, udp: true, ..scene },
        Scene { name: "IPv4 TCP, l2", forward: "l2", ..scene },
        Scene { name: "IPv6 TCP, l2", forward: "l2", v6: true, ..scene },
        Scene { name: "IPv4 TCP, nat", ..nat },
        Scene { name: "IPv6 TCP, nat", v6: true, ..nat },
        Scene { name: "IPv4 UDP, fullnat", ..fullnat },
        Scene { name: "IPv6 UDP, fullnat", v6: true, ..fullnat },
        Scene { name: "IPv6 to IPv4 UDP, fullnat", v6: true, crossing: true, ..fullnat },
        Scene { name: "IPv4 to IPv6 UDP, fullnat", crossing: true, ..fullnat },
        Scene { name: "IPv4 TCP, nat, new flow", ..first(nat) },
        Scene { name: "IPv6 TCP, nat, new flow", v6: true, ..first(nat) },
        Scene { name: "IPv4 UDP, fullnat, new flow", ..first(fullnat) },
        Scene { name: "IPv6 to IPv4 UDP, fullnat, new flow", v6: true, crossing: true, ..first(fullnat) },
        Scene { name: "IPv4 TCP, nat, reply", ..reply(nat) },
        Scene { name: "IPv6 TCP, nat, reply", v6: true, ..reply(nat) },
        Scene { name: "IPv4 UDP, fullnat, reply", ..reply(fullnat) },
        Scene { name: "IPv6 UDP, fullnat, reply", v6: true, ..reply(fullnat) },
        Scene { name: "IPv6 to IPv4 UDP, fullnat, reply", v6: true, crossing: true, ..reply(fullnat) },
        Scene { name: "IPv4, not a VIP, beside nat", stray: true, flows: &[1000], ..nat },
        Scene { name: "IPv4 TCP, ipip, 1,000 services x 10", services: 1000, ..scene },
        Scene { name: "IPv6 TCP, ipip, 1,000 services x 10", services: 1000, v6: true, ..scene },
        Scene { name: "IPv4 TCP, l2, smallest program", features: Loaded::Smallest, ..of_program },
        Scene { name: "IPv4 TCP, l2, fullest program", features: Loaded::Fullest, ..of_program },
        Scene { name: "IPv4, not a VIP", stray: true, flows: &[1000], ..scene },
        Scene { name: "IPv6, not a VIP", stray: true, v6: true, flows: &[1000], ..scene },
    ]
}

/// The first VIP; the others follow it. 198.18.0.0/15 is for benchmarks (RFC 2544), 2001:2::/48 too (RFC 5180).
const VIP4: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 0);
const VIP6: Ipv6Addr = Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, 0);
const STRAY4: Ipv4Addr = Ipv4Addr::new(198, 19, 0, 0);
const STRAY6: Ipv6Addr = Ipv6Addr::new(0x2001, 2, 0, 1, 0, 0, 0, 0);
/// The first client.
const CLIENT4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 0);
const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0);

/// The balancer with a scene's tables, attached to nothing.
struct Stage {
    fs: BpfFs,
    run_dir: PathBuf,
    datapath: Option<Datapath>,
}

impl Stage {
    fn set(scene: &Scene) -> Result<Self> {
        let config = configuration(scene)?;
        let run_dir = std::env::temp_dir().join(format!("xlb-bench-{}", std::process::id()));
        std::fs::create_dir_all(&run_dir)?;
        let fs = BpfFs::open(&run_dir)?;
        let mut stage = Self { fs: fs.clone(), run_dir, datapath: None };
        let capacity = Capacity::new(&config.limits);
        let mut load_time = LoadTime::of(&config);
        if scene.features == Loaded::Fullest {
            load_time = load_time.with(crate::program::untraced());
        }
        let mut datapath = Datapath::open(fs, capacity, load_time)?;
        let image = datapath.maps.image()?;
        for op in plan_at_once(&image, &desired(&config, &world(&config)), &capacity)? {
            datapath.maps.apply(&op)?;
        }
        let mac = Mac::from_bytes([2, 0, 0, 0, 0, 1]).bits();
        datapath.maps.set_interface(LOOPBACK, Interface { mac, mtu: 1500, flags: 0 })?;
        stage.datapath = Some(datapath);
        Ok(stage)
    }

    /// Nanoseconds of the harness, the floor and the balancer.
    fn time(&mut self, scene: &Scene, flows: u32, rounds: u32, packets: u32) -> Result<[f64; 3]> {
        let datapath = self.datapath.as_mut().context("no datapath")?;
        let connections = datapath.maps.connections();
        let mut bench = bpf::Bench::new(&frames(scene, flows)?, datapath.program_fd()?)?;
        if scene.part == Part::Reply {
            // Any flow follows any other: this often, nearly all have come.
            bench.time(Target::Program, flows * 8)?;
            let end = opened(datapath).filter(|_| scene.forward == "fullnat");
            bench = bpf::Bench::new(&replies(scene, flows, end)?, datapath.program_fd()?)?;
        }
        let packets = if scene.part == Part::First { packets.min(MOST_NEW) } else { packets };
        const TARGETS: [Target; 3] = [Target::Nothing, Target::Floor, Target::Program];
        let mut times: [Vec<Duration>; 3] = Default::default();
        for _ in 0..rounds {
            for (target, times) in TARGETS.into_iter().zip(&mut times) {
                if scene.part == Part::First {
                    connections.words().iter().for_each(|word| word.store(0, Ordering::SeqCst));
                }
                times.push(bench.time(target, packets)?);
            }
        }
        Ok(times.map(lowest_tenth))
    }
}

/// New flows of one timing: few enough that the table stays as good as empty.
const MOST_NEW: u32 = 20_000;

/// The source and its port (as it lies in the packet) that the first connection of the table has.
fn opened(datapath: &Datapath) -> Option<(Source, u16)> {
    let connections = datapath.maps.connections();
    let position = connections.words().iter().position(|word| word.load(Ordering::SeqCst) != 0)?;
    let end = connections.records()[position].0[Record::ROW].load(Ordering::SeqCst) >> 32;
    let source = datapath.maps.image().ok()?.sources.get((end >> 16) as usize).copied()?;
    Some((source, end as u16))
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.datapath = None;
        let removed = bpf::detach(self.fs.clone(), &[]).and_then(|_| std::fs::remove_dir_all(&self.run_dir));
        if let Err(error) = removed {
            eprintln!("{}: {error}", self.run_dir.display());
        }
    }
}

/// The mean of the lowest tenth, nanoseconds.
fn lowest_tenth(mut times: Vec<Duration>) -> f64 {
    times.sort();
    let count = times.len().div_ceil(10);
    times[..count].iter().map(|time| time.as_nanos() as f64).sum::<f64>() / count as f64
}

fn vip(scene: &Scene, index: u32) -> IpAddr {
    if scene.v6 {
        Ipv6Addr::from(u128::from(VIP6) + u128::from(index)).into()
    } else {
        Ipv4Addr::from(u32::from(VIP4) + index).into()
    }
}

/// Services with a pool of ten backends each, for TCP and UDP.
fn configuration(scene: &Scene) -> Result<Config> {
    use std::fmt::Write;
    let slots = (scene.services * 2 + 2) * 4096;
    let mut yaml = format!(
        "interfaces: [lo]\nseed: 5f1d0c3a9be24771\nlimits: {{vips: {}, backends: 16384, slots: {slots}{}}}\n",
        scene.services * 2 + if scene.forward == "fullnat" { 16 } else { 0 },
        if translates(scene) { ", connections: 262144" } else { "" }
    );
    if scene.forward == "fullnat" {
        yaml += "fullnat: {sources: [10.9.0.0/29, \"fd00:9::/125\"]}\n";
    }
    if scene.features == Loaded::Smallest {
        yaml += "icmp: {echo: false}\n";
    }
    yaml += "outer_source: [10.255.0.0/24, \"fd00:255::/64\"]\ndefaults: {health: {type: none}}\npools:\n";
    for service in 0..scene.services {
        write!(yaml, "  p{service}: {{forward: {}, backends: [", scene.forward)?;
        // Replies come from one.
        for backend in 0..if scene.part == Part::Reply { 1 } else { 10 } {
            let address = backend_of(scene, service * 10 + backend);
            if scene.quic {
                write!(yaml, "{{address: \"{address}\", server_id: \"{backend:04x}\"}}, ")?;
            } else {
                write!(yaml, "\"{address}\", ")?;
            }
        }
        yaml += "]}\n";
    }
    yaml += "services:\n";
    for service in 0..scene.services {
        let vip = vip(scene, service);
        let protocol = if scene.quic { "udp, quic: {config_id: 0}" } else { "[tcp, udp]" };
        writeln!(
            yaml,
            "  - {{name: s{service}, vip: \"{vip}\", ports: 80, protocol: {protocol}, pool: p{service}}}"
        )?;
    }
    Ok(config::parse("bench", &yaml).map_err(|problems| anyhow!("{problems}"))?.config)
}

fn translates(scene: &Scene) -> bool {
    matches!(scene.forward, "nat" | "fullnat")
}

fn backend_of(scene: &Scene, number: u32) -> IpAddr {
    if scene.v6 != scene.crossing {
        Ipv6Addr::from(0xfd00_0001_u128 << 96 | u128::from(number)).into()
    } else {
        Ipv4Addr::from(0x0a01_0000 + number).into()
    }
}

/// The interface that test runs come in on.
const LOOPBACK: u32 = 1;

/// Everybody is up, behind one gateway on the interface that test runs come in on.
fn world(config: &Config) -> World {
    let mut world = World::default();
    for (pool_index, pool) in config.pools.iter().enumerate() {
        for (index, backend) in pool.backends.iter().enumerate() {
            let hop = NextHop {
                ifindex: LOOPBACK,
                interface: "lo".to_owned(),
                source_mac: [2, 0, 0, 0, 0, 1],
                mac: [2, 0, 0, 0, 0, 2],
                mtu: 1500,
                preferred_source: None,
                gateway: None,
                kind: None,
                redirect_target: true,
            };
            world.up.insert((pool_index, index), true);
            world.next_hops.insert(backend.address, hop);
        }
    }
    world
}

/// A TCP ACK or a datagram of the scene.
fn frames(scene: &Scene, flows: u32) -> Result<Packets> {
    let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 3], [2, 0, 0, 0, 0, 1]);
    let v6 = if scene.stray { STRAY6 } else { VIP6 };
    let v4 = if scene.stray { STRAY4 } else { VIP4 };
    let builder = if scene.v6 {
        builder.ipv6(CLIENT6.octets(), v6.octets(), 64)
    } else {
        builder.ipv4(CLIENT4.octets(), v4.octets(), 64)
    };
    // Offsets of the last four bytes of the addresses.
    let (source_offset, destination_offset) = if scene.v6 { (34, 50) } else { (26, 30) };
    let headers = 14 + if scene.v6 { 40 } else { 20 } + if scene.udp { 8 } else { 20 };
    // Zeros are the short header of a packet of QUIC that names the first backend.
    let payload = vec![0; FRAME_BYTES - headers];
    let mut bytes = Vec::new();
    if scene.udp {
        builder.udp(40000, 80).write(&mut bytes, &payload)?;
    } else {
        builder.tcp(40000, 80, 1, 1000).ack(1).write(&mut bytes, &payload)?;
    }
    let frame = bytes.try_into().map_err(|_| anyhow!("the frame has another length"))?;
    Ok(Packets { frame, flows, source_offset, destinations: scene.services, destination_offset })
}

/// What the backend answers, to its clients or to the source and port that stand for the one that there is.
fn replies(scene: &Scene, flows: u32, end: Option<(Source, u16)>) -> Result<Packets> {
    let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 2], [2, 0, 0, 0, 0, 1]);
    let port = end.map_or(40000, |(_, port)| u16::from_be(port));
    let (builder, destination_offset, header) = match backend_of(scene, 0) {
        IpAddr::V4(backend) => {
            let to = end.map_or(CLIENT4.octets(), |(source, _)| source.v4.to_ne_bytes());
            (builder.ipv4(backend.octets(), to, 64), 30, 20)
        }
        IpAddr::V6(backend) => {
            let to = end.map_or(CLIENT6.octets(), |(source, _)| {
                let mut bytes = [0; 16];
                bytes[..8].copy_from_slice(&source.v6[0].to_ne_bytes());
                bytes[8..].copy_from_slice(&source.v6[1].to_ne_bytes());
                bytes
            });
            (builder.ipv6(backend.octets(), to, 64), 50, 40)
        }
    };
    let payload = vec![0; FRAME_BYTES - 14 - header - if scene.udp { 8 } else { 20 }];
    let mut bytes = Vec::new();
    if scene.udp {
        builder.udp(80, port).write(&mut bytes, &payload)?;
    } else {
        builder.tcp(80, port, 1, 1000).ack(1).write(&mut bytes, &payload)?;
    }
    let frame = bytes.try_into().map_err(|_| anyhow!("the frame has another length"))?;
    // The number of the flow is laid over the client's address; that of the destination, which is 0, over the same.
    Ok(Packets { frame, flows, source_offset: destination_offset, destinations: 1, destination_offset })
}
