//! The balancer with a scene's tables, attached to nothing, and its timings.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, anyhow, ensure};
use lb_common::abi::{Interface, MOST_BACKENDS, Record, TableWord};
use lb_common::outcome::Outcome;
use lb_common::slots::Slot;
use lb_common::wire::Mac;
use lb_userspace::bpf::{Bench, BpfFs, Datapath, Round, Target, detach};
use lb_userspace::capacity::Capacity;
use lb_userspace::config;
use lb_userspace::config::model::Config;
use lb_userspace::nexthop::NextHop;
use lb_userspace::reconcile::desired::{LoadTime, World, desired};
use lb_userspace::reconcile::image::Image;
use lb_userspace::reconcile::op::MapOp;
use lb_userspace::reconcile::plan::plan_at_once;

use super::frames::{self, StandIn};
use super::lines::{Kind, Known, Line, Program, Scene, Way};
use super::order::{Order, Orders};

/// The interface that test runs come in on.
const LOOPBACK: u32 = 1;
/// More than comes: limits on ICMP and pins are asked, and say yes.
const UNLIMITED: u64 = 1_000_000_000;
/// Of new flows at a time: so few that their table stays as good as empty.
const ROUNDS_OF_NEW: u32 = 16;

pub struct Stage {
    pub scene: Scene,
    fs: BpfFs,
    run_dir: PathBuf,
    datapath: Option<Datapath>,
}

/// What fills the maps of scenes: for many services it takes seconds to plan.
#[derive(Default)]
pub struct Plans {
    made: Vec<(Scene, Rc<[MapOp]>)>,
}

impl Plans {
    /// For maps that are empty.
    fn of(&mut self, scene: Scene, config: &Config, datapath: &Datapath) -> Result<Rc<[MapOp]>> {
        // A look alone asks no map of the balancer.
        let scene =
            if scene.program == Program::Look { Scene { program: Program::Needed, ..scene } } else { scene };
        if let Some((_, plan)) = self.made.iter().find(|(known, _)| *known == scene) {
            return Ok(Rc::clone(plan));
        }
        let wanted = desired(config, &world(config));
        let plan: Rc<[MapOp]> = plan_at_once(&datapath.maps.image()?, &wanted, datapath.capacity())?.into();
        self.made.push((scene, Rc::clone(&plan)));
        Ok(plan)
    }
}

impl Stage {
    pub fn set(scene: Scene, plans: &mut Plans) -> Result<Self> {
        let config = configuration(&scene)?;
        let run_dir = std::env::temp_dir().join(format!("xlb-bench-{}", std::process::id()));
        std::fs::create_dir_all(&run_dir)?;
        let fs = BpfFs::open(&run_dir)?;
        let mut stage = Self { scene, fs: fs.clone(), run_dir, datapath: None };
        let capacity = Capacity::new(&config.limits);
        let mut load_time = LoadTime { icmp_rate: UNLIMITED, pin_rate: UNLIMITED, ..LoadTime::of(&config) };
        if scene.program == Program::Fullest {
            load_time = load_time.with(crate::program::untraced());
        }
        let mut datapath = Datapath::open(fs, capacity, load_time)?;
        for op in plans.of(scene, &config, &datapath)?.iter() {
            datapath.maps.apply(op)?;
        }
        if scene.moved {
            for op in moves(&datapath.maps.image()?) {
                datapath.maps.apply(&op)?;
            }
        }
        let mac = Mac::from_bytes([2, 0, 0, 0, 0, 1]).bits();
        datapath.maps.set_interface(LOOPBACK, Interface { mac, mtu: 1500, flags: 0 })?;
        stage.datapath = Some(datapath);
        Ok(stage)
    }

    fn datapath(&mut self) -> Result<&mut Datapath> {
        self.datapath.as_mut().context("no datapath")
    }

    /// What sends the packets of a line of this scene, with everything known that is to be known.
    pub fn start(&mut self, line: &Line, orders: &mut Orders) -> Result<Bench> {
        self.forget()?;
        let stand_in = self.open(line, orders)?;
        let mut bench = Bench::new(&frames::packets(line, stand_in)?, &self.target()?)?;
        if line.flow == Known::Old {
            // As they are from the second packet on.
            bench.pass(&orders.flows(Order::Once(line.order.flows()), line.scene.services))?;
        }
        bench.send(&orders.flows(line.order, line.scene.services));
        Ok(bench)
    }

    /// Times some rounds of a line that was started.
    pub fn time(&mut self, line: &Line, bench: &mut Bench, rounds: u32) -> Result<Vec<Round>> {
        let before = self.outcomes()?;
        let mut times = Vec::new();
        if line.flow == Known::New {
            // To empty the tables takes longer than to fill them.
            while times.len() < (rounds as usize / 4).max(1) {
                self.forget()?;
                times.extend(bench.time(ROUNDS_OF_NEW)?);
            }
        } else {
            times = bench.time(rounds)?;
        }
        self.check(line, &before)?;
        Ok(times)
    }

    fn target(&mut self) -> Result<Target> {
        Ok(match self.scene.program {
            Program::Look => Target::Look { slots: self.scene.slots() },
            _ => Target::Balancer(self.datapath()?.program_fd()?),
        })
    }

    /// Makes flows known that are to be known. Returns what stands for the client of the only one.
    fn open(&mut self, line: &Line, orders: &mut Orders) -> Result<StandIn> {
        if line.flow != Known::Old {
            return Ok(None);
        }
        let packet = match line.packet {
            Kind::Datagram => Kind::Datagram,
            // Pins of flows that were there before.
            Kind::Ack if line.scene.moved => Kind::Ack,
            _ => Kind::Syn,
        };
        let first = Line { packet, ..*line };
        let mut bench = Bench::new(&frames::packets(&first, None)?, &self.target()?)?;
        bench.pass(&orders.flows(Order::Once(line.order.flows()), line.scene.services))?;
        if line.packet == Kind::Reply && line.scene.way == Way::Fullnat { self.stand_in() } else { Ok(None) }
    }

    /// The source and its port (as it lies in the packet) that the first connection of the table has.
    fn stand_in(&mut self) -> Result<StandIn> {
        let maps = &self.datapath()?.maps;
        let connections = maps.connections();
        let words = connections.words();
        let Some(position) = words.iter().position(|word| word.load(Ordering::SeqCst) != 0) else {
            return Err(anyhow!("no connection was made"));
        };
        let end = connections.records()[position].0[Record::ROW].load(Ordering::SeqCst) >> 32;
        let sources = maps.image()?.sources;
        let source = sources.get((end >> 16) as usize).context("a source that is not there")?;
        Ok(Some((*source, end as u16)))
    }

    /// Takes out all pins and connections.
    fn forget(&mut self) -> Result<()> {
        let scene = self.scene;
        let maps = &self.datapath()?.maps;
        if scene.moved {
            clear(maps.pins().words());
        }
        if scene.way.translates() {
            clear(maps.connections().words());
        }
        Ok(())
    }

    fn outcomes(&mut self) -> Result<Vec<u64>> {
        let counters = self.datapath()?.maps.counters();
        Outcome::ALL.iter().map(|outcome| Ok(counters.outcome(*outcome)?)).collect()
    }

    /// Whether the packets became what they should: a drop is fast, and no figure.
    fn check(&mut self, line: &Line, before: &[u64]) -> Result<()> {
        if line.scene.program == Program::Look {
            return Ok(());
        }
        let now = self.outcomes()?;
        let counts = now.iter().zip(before).map(|(now, before)| now - before);
        let (right, wrong): (Vec<_>, Vec<_>) = Outcome::ALL
            .iter()
            .zip(counts)
            .filter(|(_, count)| *count > 0)
            .partition(|(outcome, _)| **outcome == line.outcome());
        let right: u64 = right.iter().map(|(_, count)| count).sum();
        ensure!(
            right > 0 && wrong.iter().all(|(_, count)| count * 1000 <= right),
            "{}, {} flows: {right} packets were {}, but {wrong:?}",
            line.name(),
            line.order,
            line.outcome().counter()
        );
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.datapath = None;
        let removed = detach(self.fs.clone(), &[]).and_then(|_| std::fs::remove_dir_all(&self.run_dir));
        if let Err(error) = removed {
            note!("{}: {error}", self.run_dir.display());
        }
    }
}

fn clear(words: &[AtomicU64]) {
    words.iter().for_each(|word| word.store(0, Ordering::SeqCst));
}

/// Gives every slot of every table another target: that of the next slot that has another. Old flows stay.
fn moves(image: &Image) -> Vec<MapOp> {
    let words = image.tables.iter().map(|&bits| TableWord::from_bits(bits));
    let tables = words.filter(|word| *word != TableWord::default());
    tables
        .map(|table| {
            let first = table.first_row() * lb_common::abi::SLOTS_PER_ROW;
            let slot = |index: u32| image.slot(first + index % table.length());
            let words = (0..table.length()).map(|index| {
                let est = slot(index).cur();
                let other = (1..table.length()).map(|step| slot(index + step).cur()).find(|cur| *cur != est);
                Slot::new(other.unwrap_or(est), est, true, true).bits()
            });
            MapOp::WriteSlots { first, words: words.collect() }
        })
        .collect()
}

/// Services with a pool each, for TCP and UDP.
fn configuration(scene: &Scene) -> Result<Config> {
    use std::fmt::Write;
    let slots = scene.slots();
    let backends = (scene.services * scene.backends).min(MOST_BACKENDS);
    let mut yaml = format!(
        "interfaces: [lo]\nseed: 5f1d0c3a9be24771\nlimits: {{vips: {}, backends: {backends}, slots: {slots}, pins: {}{}}}\n",
        scene.services * 2 + if scene.way == Way::Fullnat { 64 } else { 0 },
        scene.pins,
        if scene.way.translates() { format!(", connections: {}", scene.connections) } else { String::new() }
    );
    if scene.way == Way::Fullnat {
        yaml += "fullnat: {sources: [10.9.0.0/27, \"fd00:9::/123\"]}\n";
    }
    if scene.program == Program::Smallest {
        yaml += "icmp: {echo: false}\n";
    }
    yaml += "outer_source: [10.255.0.0/24, \"fd00:255::/64\"]\ndefaults: {health: {type: none}}\npools:\n";
    let forward = match scene.way {
        Way::Ipip | Way::Quic => "ipip",
        Way::Gue => "gue",
        Way::L2 => "l2",
        Way::Nat => "nat",
        Way::Fullnat => "fullnat",
    };
    for service in 0..scene.services {
        write!(yaml, "  p{service}: {{forward: {forward}, backends: [")?;
        for number in 0..scene.backends {
            let address = frames::backend(scene, service * scene.backends + number);
            if scene.way == Way::Quic {
                write!(yaml, "{{address: \"{address}\", server_id: \"{number:04x}\"}}, ")?;
            } else {
                write!(yaml, "\"{address}\", ")?;
            }
        }
        yaml += "]}\n";
    }
    yaml += "services:\n";
    let protocol = if scene.way == Way::Quic { "udp, quic: {config_id: 0}" } else { "[tcp, udp]" };
    for service in 0..scene.services {
        let vip = frames::vip(scene, service);
        writeln!(
            yaml,
            "  - {{name: s{service}, vip: \"{vip}\", ports: 80, protocol: {protocol}, pool: p{service}}}"
        )?;
    }
    Ok(config::parse("bench", &yaml).map_err(|problems| anyhow!("{problems}"))?.config)
}

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
            Arc::make_mut(&mut world.next_hops).insert(backend.address, hop);
        }
    }
    world
}
