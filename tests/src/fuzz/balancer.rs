//! The balancer as a subject: its tables on the host and in the kernel, in all ways in which a frame may meet them.

use anyhow::{Context, Result};
use lb_common::abi::{BackendKind, Features, Replies, Traffic};
use lb_common::allowance::MOST_RATE;
use lb_common::forward::forward;
use lb_common::outcome::Outcome;
use lb_common::packet::Buffer;
use lb_common::pins::PinEvent;
use lb_userspace::bpf::Datapath;
use lb_userspace::reconcile::desired::{LoadTime, desired};
use lb_userspace::reconcile::image::{Image, Traced, Trail};
use lb_userspace::reconcile::op::MapOp;
use lb_userspace::reconcile::plan::plan_at_once;

use super::{Subject, moving, translated};
use crate::fixtures::{self, HEADROOM, INGRESS, Setting, xdp_verdict};
use crate::kernel::RunDir;

/// What is other than a setting has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Nothing,
    /// Every feature but tracing.
    Full,
    /// As `Full`, and no ICMP message may be sent.
    Mute,
    /// Some backends are of a kind that does not exist.
    Spoiled,
    /// As `Full`, with less room in front of the frame than a tunnel header takes.
    Cramped,
    /// As `Full`, with slots on the move, pins, and tables that are no hash.
    Moving,
}

impl Change {
    pub const ALL: [Self; 6] =
        [Self::Nothing, Self::Full, Self::Mute, Self::Spoiled, Self::Cramped, Self::Moving];
}

/// The balancer as a frame meets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Variant {
    pub setting: Setting,
    pub change: Change,
}

/// Metadata that takes room from a frame: 256 bytes, less these, less 40 of the kernel's own (`struct xdp_frame`).
const METADATA: u8 = 200;
const CRAMPED: usize = 256 - METADATA as usize - 40;
/// No `BackendKind`.
const NO_KIND: u8 = 200;

impl Variant {
    /// Each setting in each way.
    pub fn all() -> Vec<Self> {
        let each = |setting| Change::ALL.map(|change| Self { setting, change });
        Setting::ALL.into_iter().flat_map(each).collect()
    }

    /// The allowance is so large that a flood of frames does not use it up, or there is none: what a limiter does in
    /// between depends on the clock.
    fn load_time(self) -> LoadTime {
        let load_time = self.setting.load_time();
        let all = Features::ALL.iter().filter(|(feature, _)| *feature != Features::TRACE);
        let full = all.fold(Features::default(), |all, (feature, _)| all.with(*feature));
        let (features, icmp_rate) = match self.change {
            Change::Nothing | Change::Spoiled => (load_time.features, MOST_RATE),
            Change::Full | Change::Cramped | Change::Moving => (full, MOST_RATE),
            Change::Mute => (full, 0),
        };
        LoadTime { features, icmp_rate, pin_rate: MOST_RATE, ..load_time }
    }

    fn room(self) -> usize {
        if self.change == Change::Cramped { CRAMPED } else { HEADROOM }
    }

    /// What is other than the agent would have it once all is at rest.
    fn changes(self, image: &Image) -> Vec<MapOp> {
        match self.change {
            Change::Spoiled => Self::spoils(image),
            Change::Moving => moving::stirred(image),
            Change::Nothing | Change::Full | Change::Mute | Change::Cramped => Vec::new(),
        }
    }

    /// Backend rows that are other than they should be.
    fn spoils(image: &Image) -> Vec<MapOp> {
        let rows = (0u16..).zip(&image.backends);
        let odd = rows.filter(|(id, backend)| id % 2 == 1 && backend.kind > BackendKind::Pass as u8);
        odd.map(|(id, backend)| {
            let mut backend = *backend;
            backend.kind = NO_KIND;
            MapOp::WriteBackend { id, backend }
        })
        .collect()
    }
}

/// What became of a frame on the host.
pub struct HostRun {
    pub outcome: Outcome,
    pub output: Vec<u8>,
    pub trail: Trail,
}

/// The packet path on the host. `host`, compiled where its coverage is wanted.
pub type HostWay = fn(&Image, &[u8], usize) -> HostRun;

/// Runs a frame through the packet path with so much room in front of it. Always inlined, with all of the packet path:
/// so it is compiled, and instrumented, with the crate that calls it.
#[inline(always)]
pub fn host(image: &Image, frame: &[u8], room: usize) -> HostRun {
    let mut bytes = vec![0xa5; room];
    bytes.extend_from_slice(frame);
    let mut packet = Buffer::new(&mut bytes, room, INGRESS);
    let tables = Traced::new(image);
    let decision = forward(&mut packet, &tables);
    let output = packet.frame().to_vec();
    HostRun { outcome: decision.outcome, output, trail: tables.into_trail() }
}

/// The program in the kernel.
struct Kernel {
    datapath: Datapath,
    out: Vec<u8>,
    // Last: the maps are closed before the directory goes.
    _dir: RunDir,
}

pub struct Balancer {
    variant: Variant,
    image: Image,
    way: HostWay,
    kernel: Option<Kernel>,
    /// Of the host, over all frames.
    ended: Vec<u64>,
    /// What the kernel's counters should show.
    outcomes: Vec<u64>,
    vips: Vec<Traffic>,
    backends: Vec<Traffic>,
    pin_events: [u64; PinEvent::ALL.len()],
    heard: translated::Heard,
    table: translated::Table,
}

impl Balancer {
    /// On the host only.
    pub fn on_host(variant: Variant, way: HostWay) -> Self {
        let mut image = fixtures::image(variant.setting);
        image.meta = fixtures::meta(variant.load_time());
        for op in variant.changes(&image) {
            image.apply(&op);
        }
        image.pins = moving::room();
        Self::over(variant, image, way, None)
    }

    /// On the host and in the kernel.
    pub fn in_kernel(variant: Variant, way: HostWay) -> Result<Self> {
        let dir = RunDir::new()?;
        let capacity = fixtures::capacity();
        let mut datapath = Datapath::open(dir.fs()?, capacity, variant.load_time())?;
        datapath.maps.set_interface(INGRESS, fixtures::interface())?;
        for op in fixtures::ways_back() {
            datapath.maps.apply(&op)?;
        }
        let desired = desired(&variant.setting.config(), &variant.setting.world());
        for op in plan_at_once(&datapath.maps.image()?, &desired, &capacity)? {
            datapath.maps.apply(&op)?;
        }
        for op in variant.changes(&datapath.maps.image()?) {
            datapath.maps.apply(&op)?;
        }
        datapath.complete();
        let image = datapath.maps.image()?;
        let kernel = Kernel { datapath, out: vec![0; 4096], _dir: dir };
        Ok(Self::over(variant, image, way, Some(kernel)))
    }

    fn over(variant: Variant, image: Image, way: HostWay, kernel: Option<Kernel>) -> Self {
        if variant.change == Change::Moving {
            moving::pin_fixtures(&image, way);
        }
        Self {
            ended: vec![0; Outcome::ALL.len()],
            outcomes: vec![0; Outcome::ALL.len()],
            vips: vec![Traffic::default(); fixtures::capacity().vips as usize],
            backends: vec![Traffic::default(); image.backends.len()],
            pin_events: [0; PinEvent::ALL.len()],
            heard: translated::Heard::default(),
            table: translated::Table::new(&image),
            variant,
            image,
            way,
            kernel,
        }
    }

    fn note(&mut self, run: &HostRun) {
        self.ended[run.outcome as usize] += 1;
        self.outcomes[run.outcome as usize] += 1;
        if let Some((vip, traffic)) = run.trail.vip {
            add(&mut self.vips[vip as usize], traffic);
        }
        if let Some((id, traffic)) = run.trail.backend {
            add(&mut self.backends[usize::from(id)], traffic);
        }
        self.heard.note(&run.trail);
        run.trail.pins.iter().for_each(|event| self.pin_events[*event as usize] += 1);
    }

    /// Takes in whose turn it is, and sees to it that host and kernel are asked at the same time.
    fn catch_up(&mut self) {
        let Some(kernel) = &self.kernel else { return };
        if self.variant.change != Change::Moving {
            return;
        }
        for (table, state) in (0u16..).zip(&mut self.image.table_states) {
            if state.identity != 0 {
                state.turn = kernel.datapath.maps.failed_and_turn(table).1;
            }
        }
        moving::avoid_the_next_age();
    }
}

impl Kernel {
    /// The verdict; the frame afterwards is in `out`.
    fn run(&mut self, variant: Variant, frame: &[u8]) -> Result<(u32, &[u8])> {
        let (verdict, bytes) = match variant.change {
            Change::Cramped => {
                let (verdict, length) = self.datapath.test_run_behind(METADATA, frame, &mut self.out)?;
                (verdict, usize::from(METADATA)..length)
            }
            Change::Nothing | Change::Full | Change::Mute | Change::Spoiled | Change::Moving => {
                let (verdict, length) = self.datapath.test_run(frame, &mut self.out)?;
                (verdict, 0..length)
            }
        };
        Ok((verdict, self.out.get(bytes).context("a frame longer than any that is made")?))
    }
}

impl Subject for Balancer {
    fn name(&self) -> String {
        format!("{:?}/{:?}", self.variant.setting, self.variant.change)
    }

    fn run(&mut self, frame: &[u8]) -> Result<usize, String> {
        self.catch_up();
        self.table.refresh(&self.image);
        let run = (self.way)(&self.image, frame, self.variant.room());
        self.note(&run);
        let HostRun { outcome, output, trail } = run;
        if let Some(kernel) = &mut self.kernel {
            let (verdict, out) = kernel.run(self.variant, frame).map_err(|error| format!("{error:#}"))?;
            let expected = xdp_verdict(outcome.action());
            if verdict != expected {
                return Err(format!(
                    "XDP verdict {verdict} in the kernel, {expected} on the host, which says {outcome:?}"
                ));
            }
            if out != output {
                return Err(super::hunt::differing(out, &output, &format!("{outcome:?}")));
            }
            translated::compared(&self.image, &trail)?;
            if let Some(bucket) = trail.bucket {
                moving::compared(&self.image, bucket)?;
            }
        }
        Ok(outcome as usize)
    }

    fn settle(&mut self) -> Result<(), String> {
        let Some(kernel) = &self.kernel else { return Ok(()) };
        let mut wrong = Vec::new();
        let unread = |error| format!("a counter cannot be read: {error}");
        let counters = kernel.datapath.maps.counters();
        for (outcome, expected) in Outcome::ALL.iter().zip(&mut self.outcomes) {
            let found = counters.outcome(*outcome).map_err(unread)?;
            compare(&mut wrong, outcome.counter(), found, expected);
        }
        for (vip, expected) in (0..).zip(&mut self.vips) {
            compare(&mut wrong, &format!("VIP {vip}"), counters.vip(vip).map_err(unread)?, expected);
        }
        for (id, expected) in (0..).zip(&mut self.backends) {
            compare(&mut wrong, &format!("backend {id}"), counters.backend(id).map_err(unread)?, expected);
        }
        for (event, expected) in PinEvent::ALL.into_iter().zip(&mut self.pin_events) {
            compare(&mut wrong, event.counter(), counters.pin_event(event).map_err(unread)?, expected);
        }
        for (id, expected) in &mut self.heard.0 {
            let found = counters.replies(*id).map_err(unread)?.unwrap_or_default();
            compare(&mut wrong, &format!("answers of {id}"), Replies { waited: 0, ..found }, expected);
        }
        if wrong.is_empty() { Ok(()) } else { Err(wrong.join("; ")) }
    }

    fn counted(&self) -> Vec<(&'static str, u64)> {
        Outcome::ALL.iter().map(|outcome| outcome.counter()).zip(self.ended.iter().copied()).collect()
    }

    fn tables_are_unchanged(&self) -> Result<bool> {
        let Some(kernel) = &self.kernel else { return Ok(true) };
        Ok(moving::settled(&kernel.datapath.maps.image()?) == moving::settled(&self.image))
    }
}

fn compare<T: PartialEq + Copy + std::fmt::Debug>(
    wrong: &mut Vec<String>,
    name: &str,
    found: T,
    expected: &mut T,
) {
    if found != *expected {
        wrong.push(format!("{name}: {found:?} in the kernel, {expected:?} on the host"));
        *expected = found;
    }
}

fn add(sum: &mut Traffic, traffic: Traffic) {
    sum.packets += traffic.packets;
    sum.bytes += traffic.bytes;
}
