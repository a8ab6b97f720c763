//! A million connections through the real program in the real kernel (BPF_PROG_TEST_RUN), while backends come, go, fail and
//! heal, the table outgrows its place, agents follow one another and pins run out: none is moved.
//!
//! Time is real: flows are protected for one second of silence, and slots finish a few seconds after. The packets of one
//! connection come at most 0.9 s apart; where the machine is slower than that, the connection does not count, and
//! the test says how many did not. XLB_KERNEL_FLOWS sets how many there are.
//!
//! Needs root and BPF; without them it fails, unless XLB_SKIP_ROOT is set.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use lb_common::abi::{Pin, PinState};
use lb_common::pins::PinEvent;
use lb_common::wire::TcpFlags;
use lb_userspace::bpf::Datapath;
use lb_userspace::capacity::Capacity;
use lb_userspace::config::model::Config;
use lb_userspace::config::parse;
use lb_userspace::nexthop::NextHop;
use lb_userspace::reconcile::desired::{LoadTime, OldFlows, World, desired};
use lb_userspace::reconcile::image::Image;
use lb_userspace::reconcile::op::MapOp;
use lb_userspace::reconcile::pins::coarse_ns;
use lb_userspace::reconcile::tracking::{Hands, Tracking};
use tests::fixtures::{self, Dice, INGRESS};
use tests::kernel::{RunDir, left_out};

const VIP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);

/// The longest that a client is silent: 0.9 of what the configuration protects.
const SILENCE: Duration = Duration::from_millis(900);

const TICK: Duration = Duration::from_millis(50);
/// Between two changes.
const CHANGE_TICKS: u64 = 28;
const CHANGES: u64 = 50;
/// Changes from which on the table is longer, and between which no pin can be made.
const GROWTH: u64 = 20;
const FULL: std::ops::Range<u64> = 32..36;
/// Connections that live from the beginning to the end.
const LASTING: u32 = 5000;
/// Packets of the others, with a SYN and a FIN.
const PACKETS: u32 = 6;

/// Parts that pins are filled in.
const PARTS: usize = 64;

/// So many that few buckets are full at this rate of new connections: where one is, the slots of a table wait anew.
const PINS: u32 = 1 << 23;

/// The backend of pins that are in the way, which is nobody.
const STRANGER: u16 = 32_000;

/// The program, and an agent's hold of its maps.
struct Kernel {
    datapath: Datapath,
    image: Image,
    /// Times that `est` followed, and slots that it did in.
    expiries: u64,
    finished: usize,
    // Last: the maps are closed before the directory goes.
    _dir: RunDir,
}

impl Kernel {
    fn load(config: &Config) -> anyhow::Result<Self> {
        let dir = RunDir::new()?;
        let mut datapath = Datapath::open(dir.fs()?, Capacity::new(&config.limits), LoadTime::of(config))?;
        datapath.maps.set_interface(INGRESS, fixtures::interface())?;
        datapath.complete();
        let image = datapath.maps.image()?;
        Ok(Self { datapath, image, expiries: 0, finished: 0, _dir: dir })
    }
}

impl Hands for Kernel {
    type Error = anyhow::Error;

    fn now(&self) -> Instant {
        Instant::now()
    }
    fn age(&self) -> u16 {
        Pin::age_of(coarse_ns())
    }
    fn image(&self) -> &Image {
        &self.image
    }
    fn capacity(&self) -> &Capacity {
        self.datapath.capacity()
    }
    fn read_states(&mut self) {
        for (table, _) in (0u16..).zip(&self.image.tables).filter(|(_, word)| **word != 0) {
            let state = &mut self.image.table_states[usize::from(table)];
            (state.failed, state.turn) = self.datapath.maps.failed_and_turn(table);
        }
    }
    fn apply(&mut self, op: &MapOp) -> anyhow::Result<bool> {
        let goes_on = self.datapath.maps.apply(op)?;
        if goes_on {
            self.image.apply(op);
            match op {
                MapOp::ExpectFailed { .. } => self.expiries += 1,
                MapOp::WriteSlots { words, .. } if self.image.table_states[0].closing != 0 => {
                    self.finished += words.len();
                }
                _ => {}
            }
        }
        Ok(goes_on)
    }
    fn set_active(&mut self, id: u16, active: u64) {
        self.datapath.maps.set_active(id, active);
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Health {
    Up,
    /// Its flows may live.
    Silent,
    /// Its flows are lost.
    Failed,
}

#[derive(Debug, Clone, Copy)]
struct Backend {
    weight: u8,
    drained: bool,
    health: Health,
}

/// Who is configured, and how they are.
struct Site {
    backends: BTreeMap<u8, Backend>,
    /// How often flows of a backend were lost.
    losses: [u16; 256],
}

impl Site {
    fn new() -> Self {
        let backend = Backend { weight: 100, drained: false, health: Health::Up };
        Self { backends: (1..=30).map(|host| (host, backend)).collect(), losses: [0; 256] }
    }

    fn config(&self) -> anyhow::Result<Config> {
        let backend = |(host, backend): (&u8, &Backend)| {
            format!("{{address: 10.0.1.{host}, weight: {}}}", backend.weight)
        };
        let backends: Vec<String> = self.backends.iter().map(backend).collect();
        let text = format!(
            "interfaces: [lo]\nseed: 7\nlimits: {{pins: {PINS}}}\npools:\n  \
             web: {{forward: ipip, idle_timeout: {{tcp: 1s}}, backends: [{}]}}\n\
             services:\n- {{name: www, vip: {VIP}, ports: 80, protocol: tcp, pool: web}}\n",
            backends.join(", ")
        );
        let loaded = parse("xlb.yaml", &text).map_err(|problems| anyhow::anyhow!("{problems}"))?;
        Ok(loaded.config)
    }

    fn world(&self) -> World {
        let mut world = World::default();
        for (place, (host, backend)) in self.backends.iter().enumerate() {
            world.up.insert((0, place), backend.health == Health::Up);
            Arc::make_mut(&mut world.next_hops).insert(Ipv4Addr::new(10, 0, 1, *host).into(), next_hop());
            if backend.drained {
                world.shares.insert((0, place), 0);
            }
            if backend.health == Health::Failed {
                world.old_flows.insert((0, place), OldFlows::Fail);
            }
        }
        world
    }

    /// Something else each time. Returns what.
    fn change(&mut self, number: u64, dice: &mut Dice) -> String {
        let fresh = Backend { weight: 100, drained: false, health: Health::Up };
        if number == GROWTH {
            self.backends.extend((200..220).map(|host| (host, fresh)));
            return "20 more".to_owned();
        }
        let hosts: Vec<u8> = self.backends.keys().copied().collect();
        let host = hosts[dice.below(hosts.len())];
        let Some(backend) = self.backends.get_mut(&host) else { return String::new() };
        match dice.below(8) {
            0 => {
                let next = (31..200).find(|host| !self.backends.contains_key(host)).unwrap_or(host);
                self.backends.insert(next, fresh);
                format!("{next} comes")
            }
            1 | 2 if hosts.len() > 20 && backend.health == Health::Up => {
                self.backends.remove(&host);
                format!("{host} leaves")
            }
            3 => {
                backend.weight = [1, 25, 50, 100][dice.below(4)];
                format!("{host} has weight {}", backend.weight)
            }
            4 => {
                backend.drained = !backend.drained;
                format!("{host} is drained: {}", backend.drained)
            }
            5 => {
                backend.health = if backend.health == Health::Up { Health::Silent } else { Health::Up };
                format!("{host}: {:?}", backend.health)
            }
            6 => {
                if backend.health != Health::Failed {
                    self.losses[usize::from(host)] += 1;
                }
                backend.health = Health::Failed;
                format!("{host}: {:?}", backend.health)
            }
            _ => {
                for backend in self.backends.values_mut() {
                    (backend.health, backend.drained) = (Health::Up, false);
                }
                "all are well".to_owned()
            }
        }
    }
}

fn next_hop() -> NextHop {
    NextHop {
        ifindex: INGRESS,
        interface: "lo".to_owned(),
        source_mac: [2, 0, 0, 0, 0, 1],
        mac: [2, 0, 0, 0, 0, 2],
        mtu: 1500,
        preferred_source: Some(Ipv4Addr::new(10, 0, 0, 1).into()),
        gateway: None,
        kind: None,
        redirect_target: true,
    }
}

/// A connection: which packet is next, where it is and since when it is silent.
#[derive(Clone, Copy, Default)]
struct Connection {
    next: u16,
    /// The last byte of its backend's address.
    home: u8,
    loss: u16,
    /// Microseconds since the beginning.
    heard: u32,
}

/// What became of packets and connections.
#[derive(Debug, Default)]
struct Tally {
    packets: u64,
    ended: u64,
    moved: u64,
    /// Of backends that failed.
    lost: u64,
    /// Silent for longer than a client is here: the machine was slow.
    late: u64,
}

struct Traffic {
    frame: [u8; 54],
    connections: Vec<Connection>,
    /// Connections by the tick at which they speak next.
    wheel: Vec<Vec<u32>>,
    began: Instant,
    dice: Dice,
    tally: Tally,
    ends_at: u64,
}

/// Ticks that a wheel goes around in.
const WHEEL: u64 = 32;

impl Traffic {
    fn new(flows: u32, ends_at: u64) -> Self {
        let mut frame = [0; 54];
        frame[12..14].copy_from_slice(&[0x08, 0x00]);
        frame[14..34].copy_from_slice(&[0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        frame[30..34].copy_from_slice(&VIP.octets());
        frame[34..38].copy_from_slice(&[0x9c, 0x40, 0, 80]);
        frame[46] = 5 << 4;
        Self {
            frame,
            connections: vec![Connection::default(); flows as usize],
            wheel: vec![Vec::new(); WHEEL as usize],
            began: Instant::now(),
            dice: Dice(0x0f10_a5ed),
            tally: Tally::default(),
            ends_at,
        }
    }

    /// The backend of one packet, by the last byte of its address.
    fn send(&mut self, kernel: &mut Kernel, flow: u32, flags: u8) -> anyhow::Result<u8> {
        self.frame[26..30].copy_from_slice(&(0x1400_0000 + flow).to_be_bytes());
        self.frame[47] = flags;
        self.frame[24..26].fill(0);
        let words = self.frame[14..34].chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
        let sum: u32 = words.sum();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        self.frame[24..26].copy_from_slice(&sum.to_be_bytes());
        let mut out = [0; 128];
        let (verdict, length) = kernel.datapath.test_run(&self.frame, &mut out)?;
        self.tally.packets += 1;
        // XDP_TX, with an IPv4 header in front.
        anyhow::ensure!((verdict, length) == (3, 74), "flow {flow}: verdict {verdict}, {length} bytes");
        Ok(out[33])
    }

    fn micros(&self) -> u32 {
        self.began.elapsed().as_micros() as u32
    }

    /// The next packet of a connection, and when it speaks again.
    fn speak(&mut self, kernel: &mut Kernel, site: &Site, flow: u32, tick: u64) -> anyhow::Result<()> {
        let connection = self.connections[flow as usize];
        let lasts = flow < LASTING;
        let last =
            if lasts { tick + WHEEL > self.ends_at } else { u32::from(connection.next) + 1 == PACKETS };
        if connection.next == 0 {
            let home = self.send(kernel, flow, TcpFlags::SYN)?;
            let well = site.backends.get(&home).is_none_or(|backend| backend.health != Health::Failed);
            anyhow::ensure!(well, "flow {flow} begins at {home}, which has failed");
            let (loss, heard) = (site.losses[usize::from(home)], self.micros());
            self.connections[flow as usize] = Connection { next: 1, home, loss, heard };
        } else {
            if site.losses[usize::from(connection.home)] != connection.loss {
                self.tally.lost += 1;
                return Ok(());
            }
            let flags = if last { TcpFlags::FIN | TcpFlags::ACK } else { TcpFlags::ACK };
            let silent = Duration::from_micros(u64::from(self.micros() - connection.heard));
            let home = self.send(kernel, flow, flags)?;
            if silent > SILENCE {
                self.tally.late += 1;
                return Ok(());
            }
            if home != connection.home {
                self.tally.moved += 1;
                eprintln!("flow {flow} of {} is at {home}, after {silent:?}", connection.home);
                return Ok(());
            }
            let heard = self.micros();
            self.connections[flow as usize] =
                Connection { next: connection.next.saturating_add(1), heard, ..connection };
            if last {
                self.tally.ended += 1;
                return Ok(());
            }
        }
        // 0.1 to 0.8 s, and what this machine takes; what lasts is silent for long.
        let gap = if lasts { 12 + self.dice.below(5) } else { 2 + self.dice.below(15) } as u64;
        self.wheel[((tick + gap) % WHEEL) as usize].push(flow);
        Ok(())
    }
}

/// Puts a pin into every free place of a part, as a flood would; or takes those out.
fn crowd(kernel: &Kernel, dice: &mut Dice, on: bool, part: std::ops::Range<usize>) {
    let age = Pin::age_of(coarse_ns());
    let words = kernel.image.pins.words();
    for word in &words[words.len() * part.start / PARTS..words.len() * part.end / PARTS] {
        let bits = word.load(Ordering::Relaxed);
        let change = if on {
            let stranger = Pin::new(dice.roll() as u32 | 1, STRANGER, PinState::Established, age);
            (bits == 0).then_some(stranger.bits())
        } else {
            (Pin::from_bits(bits).backend() == STRANGER).then_some(0)
        };
        if let Some(change) = change {
            // A packet may have been faster.
            _ = word.compare_exchange(bits, change, Ordering::SeqCst, Ordering::SeqCst);
        }
    }
}

#[test]
fn no_connection_of_a_million_is_moved_by_fifty_changes() {
    if left_out("no_connection_of_a_million_is_moved_by_fifty_changes") {
        return;
    }
    let flows = std::env::var("XLB_KERNEL_FLOWS").ok().and_then(|flows| flows.parse().ok());
    run(flows.unwrap_or(1_000_000)).unwrap_or_else(|error| panic!("{error:#}"));
}

fn run(flows: u32) -> anyhow::Result<()> {
    let (mut site, mut dice) = (Site::new(), Dice(0x5eed));
    let config = site.config()?;
    let mut kernel = Kernel::load(&config)?;
    let mut tracking = Tracking::begin(&mut kernel)?;
    tracking.reconcile(&mut kernel, desired(&config, &site.world()))?;
    let ticks = (CHANGES + 2) * CHANGE_TICKS;
    let mut traffic = Traffic::new(flows, ticks);
    let mut changed = false;
    for tick in 0..ticks {
        let number = tick / CHANGE_TICKS;
        if tick % CHANGE_TICKS == 0 && (1..=CHANGES).contains(&number) {
            let what = site.change(number, &mut dice);
            if number % 10 == 5 {
                tracking = Tracking::begin(&mut kernel)?;
            }
            changed = true;
            eprintln!(
                "{:.1} s: change {number}: {what}; {} pins, {} failed, est followed {} times",
                traffic.began.elapsed().as_secs_f64(),
                tracking.found.pins,
                kernel.image.table_states[0].failed,
                kernel.expiries,
            );
        }
        changed |= tracking.look_after(&mut kernel)?;
        if changed || tracking.is_paced(kernel.now()) {
            tracking.reconcile(&mut kernel, desired(&site.config()?, &site.world()))?;
            changed = false;
        }
        if FULL.contains(&number) {
            // All at first; then what has become free, in turn.
            let part = tick as usize % PARTS;
            let parts = if tick == FULL.start * CHANGE_TICKS { 0..PARTS } else { part..part + 1 };
            crowd(&kernel, &mut dice, true, parts);
        } else if tick == FULL.end * CHANGE_TICKS {
            crowd(&kernel, &mut dice, false, 0..PARTS);
        }
        // Those that last begin first; the others in equal parts, so that they are over at the end.
        let part = |tick: u64| {
            let begins = u64::from(flows.saturating_sub(LASTING)) * tick / (ticks - 5 * WHEEL);
            LASTING.min(flows) + (begins as u32).min(flows.saturating_sub(LASTING))
        };
        let first = if tick == 0 { 0 } else { part(tick) };
        for flow in first..part(tick + 1) {
            traffic.speak(&mut kernel, &site, flow, tick)?;
        }
        for flow in std::mem::take(&mut traffic.wheel[(tick % WHEEL) as usize]) {
            traffic.speak(&mut kernel, &site, flow, tick)?;
        }
        let next = TICK * (tick as u32 + 1);
        std::thread::sleep(next.saturating_sub(traffic.began.elapsed()));
    }
    report(&kernel, &traffic, flows)
}

fn report(kernel: &Kernel, traffic: &Traffic, flows: u32) -> anyhow::Result<()> {
    let tally = &traffic.tally;
    let count = |event| kernel.datapath.maps.counters().pin_event(event);
    let events: Vec<(&str, u64)> = PinEvent::ALL
        .into_iter()
        .map(|event| Ok((event.counter(), count(event)?)))
        .collect::<Result<_, lb_userspace::bpf::MapsError>>()?;
    let looked = events[PinEvent::Looked as usize].1;
    eprintln!(
        "{flows} connections, {} packets in {:.0} s: {} moved; {} of backends that failed, {} late; {:.1} % of packets looked for a pin",
        tally.packets,
        traffic.began.elapsed().as_secs_f64(),
        tally.moved,
        tally.lost,
        tally.late,
        looked as f64 * 100.0 / tally.packets as f64,
    );
    eprintln!("est followed {} times, in {} slots; pins: {events:?}", kernel.expiries, kernel.finished);
    anyhow::ensure!(tally.moved == 0, "{} connections were moved", tally.moved);
    anyhow::ensure!(kernel.expiries >= 10, "est followed {} times only", kernel.expiries);
    anyhow::ensure!(events[PinEvent::FailedNew as usize].1 > 0, "pins were never short");
    let longest =
        kernel.image.tables.iter().map(|&bits| lb_common::abi::TableWord::from_bits(bits).length()).max();
    anyhow::ensure!(longest == Some(1 << 14), "the table did not grow");
    anyhow::ensure!(tally.late * 2 < u64::from(flows), "the machine is too slow to say anything");
    let told = tally.ended + tally.lost + tally.late;
    anyhow::ensure!(told == u64::from(flows), "{told} connections of {flows} are accounted for");
    Ok(())
}
