//! Runs the packet path in the kernel on packets of many flows, and times it.

use std::os::fd::AsFd;

use anyhow::{Context, bail, ensure};
use aya::maps::{Map, ProgramArray};
use aya::programs::{ProgramFd, TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use lb_common::abi::{
    self, BENCH_BLOCK, BENCH_BYTES, BENCH_FIRST, BENCH_PACKETS, BENCH_TIMES, BenchPlace, BenchState,
    SLOTS_PER_ROW, bench_target, constant,
};

use super::mmap::{Row, Rows};

/// Length of the frame that is sent, bytes.
pub const FRAME_BYTES: usize = BENCH_BYTES;

/// Packets that each target gets in a round.
pub const PACKETS_OF_A_ROUND: u32 = BENCH_BLOCK as u32;

/// Rounds of one call.
pub const MOST_ROUNDS: u32 = (BENCH_TIMES - 1) / 3;

/// The packets that are sent: one frame, and where it differs from packet to packet.
#[derive(Debug, Clone)]
pub struct Packets {
    pub frame: [u8; FRAME_BYTES],
    /// The number of the flow is laid over the four bytes there: an address's in every header, as
    /// `BenchPlace::at` asks.
    pub source_offset: u32,
    /// Likewise, the number of its destination.
    pub destination_offset: u32,
    /// Bytes that their way puts in front of them, or takes off.
    pub growth: i32,
}

/// Whose packet one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    pub number: u32,
    pub destination: u32,
}

impl Flow {
    /// As it lies in the map.
    pub(super) fn word(self) -> u64 {
        u64::from(self.number) | u64::from(self.destination) << 32
    }
}

/// What a packet took in a round, nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Round {
    /// The harness alone.
    pub harness: f64,
    /// The harness, the head moved as the packet's way moves it, and out.
    pub floor: f64,
    /// The harness and the balancer.
    pub program: f64,
}

/// What is measured.
pub enum Target {
    Balancer(ProgramFd),
    /// The floor, with one look at one of so many slots.
    Look {
        slots: u32,
    },
}

/// The driver with its targets.
pub struct Bench {
    ebpf: Ebpf,
    state: Rows<BenchState>,
    times: Rows<u64>,
    flows: Rows<u64>,
    /// Held so that calls lead somewhere.
    _targets: ProgramArray<aya::maps::MapData>,
    moves: bool,
}

impl Bench {
    /// What takes packets is the balancer, or a program that does nothing but look at one of so many slots.
    pub fn new(packets: &Packets, target: &Target) -> anyhow::Result<Self> {
        let slots = match target {
            Target::Balancer(_) => SLOTS_PER_ROW,
            Target::Look { slots } => *slots,
        };
        let mut ebpf = object_with(packets, slots)?;
        let targets = ebpf.take_map("XLB_BENCH_TARGETS").context("the object has no target map")?;
        let mut targets = ProgramArray::try_from(targets)?;
        match target {
            Target::Balancer(program) => targets.set(bench_target::PROGRAM, program, 0)?,
            Target::Look { .. } => {
                let look = xdp(&mut ebpf, "look")?;
                look.load()?;
                targets.set(bench_target::PROGRAM, look.fd()?, 0)?;
            }
        }
        for (row, name) in [(bench_target::NOTHING, "nothing"), (bench_target::FLOOR, "floor")] {
            let target = xdp(&mut ebpf, name)?;
            target.load()?;
            targets.set(row, target.fd()?, 0)?;
        }
        xdp(&mut ebpf, "driver")?.load()?;
        Ok(Self {
            state: rows(&mut ebpf, "XLB_BENCH_STATE", 1)?,
            times: rows(&mut ebpf, "XLB_BENCH_TIMES", BENCH_TIMES)?,
            flows: rows(&mut ebpf, "XLB_BENCH_FLOWS", BENCH_PACKETS)?,
            ebpf,
            _targets: targets,
            moves: packets.growth != 0,
        })
    }

    /// Whose packets come from now on, in this order, over and over.
    pub fn send(&mut self, flows: &[Flow]) {
        for (row, flow) in (0..self.flows.len()).zip(flows.iter().cycle()) {
            self.flows.store_word(row, 0, flow.word());
        }
    }

    /// Has the balancer take a packet of each of these, up to as many as there are rows. They come in place of what was sent.
    pub fn pass(&mut self, flows: &[Flow]) -> anyhow::Result<()> {
        let position = self.state.load_word(0, 0) as usize;
        let rows = self.flows.len();
        for (step, flow) in flows.iter().take(rows).enumerate() {
            self.flows.store_word((position + 1 + step) % rows, 0, flow.word());
        }
        self.run(1, flows.len().min(rows) as u32)
    }

    /// Times rounds in which each target takes [`PACKETS_OF_A_ROUND`], up to [`MOST_ROUNDS`]. One more goes before them,
    /// which is not counted: it finds the caches cold.
    pub fn time(&mut self, rounds: u32) -> anyhow::Result<Vec<Round>> {
        // Where the head does not move, the harness is the floor.
        let targets = if self.moves { 3 } else { 2 };
        let blocks = targets * (rounds.min(MOST_ROUNDS - 1) + 1);
        // The one that ends the last block begins another.
        self.run(u64::from(targets), blocks * PACKETS_OF_A_ROUND + 1)?;
        let began: Vec<u64> = (0..=blocks as usize).map(|block| self.times.load_word(block, 0)).collect();
        let times: Vec<f64> =
            began.windows(2).map(|pair| (pair[1] - pair[0]) as f64 / BENCH_BLOCK as f64).collect();
        let of_round =
            |times: &[f64]| Round { program: times[0], harness: times[1], floor: times[times.len() - 1] };
        Ok(times.chunks(targets as usize).skip(1).map(of_round).collect())
    }

    /// The first of the targets gets the first block.
    fn run(&mut self, targets: u64, packets: u32) -> anyhow::Result<()> {
        let position = self.state.load_word(0, 0);
        self.state.store(0, &BenchState { position, step: 0, target: targets - 1, targets });
        let frame = [0; FRAME_BYTES];
        let options = TestRunOptions { data_in: Some(&frame), repeat: packets, ..TestRunOptions::new() };
        let result = xdp(&mut self.ebpf, "driver")?.test_run(options)?;
        const XDP_ABORTED: u32 = 0;
        ensure!(result.return_value != XDP_ABORTED, "a packet was aborted");
        Ok(())
    }
}

pub(super) fn rows<T: Row>(ebpf: &mut Ebpf, name: &'static str, rows: u32) -> anyhow::Result<Rows<T>> {
    let Some(Map::Array(map)) = ebpf.take_map(name) else { bail!("the object has no array {name}") };
    Ok(Rows::map(map.fd().as_fd(), rows)?)
}

/// The object, with the packets that it makes; no program of it is loaded yet.
pub(super) fn object(packets: &Packets) -> anyhow::Result<Ebpf> {
    object_with(packets, SLOTS_PER_ROW)
}

fn object_with(packets: &Packets, slots: u32) -> anyhow::Result<Ebpf> {
    let rows = (slots / SLOTS_PER_ROW).next_power_of_two();
    let place = |offset: u32| {
        BenchPlace::at(offset as usize)
            .with_context(|| format!("no word of the frame has the bytes at {offset}"))
    };
    let (first, rest) = packets.frame.split_at(BENCH_FIRST);
    let (words, last) = rest.as_chunks::<8>();
    let bench = abi::Bench {
        first: padded(first),
        words: std::array::from_fn(|word| u64::from_le_bytes(words[word])),
        last: padded(last),
        source: place(packets.source_offset)?,
        destination: place(packets.destination_offset)?,
        growth: i64::from(packets.growth),
        shift: u64::from(32 - rows.ilog2()),
    };
    let mut loader = EbpfLoader::new();
    loader.override_global(constant::BENCH, &bench, true);
    loader.map_max_entries("XLB_BENCH_SLOTS", rows);
    Ok(loader.load(super::BENCH)?)
}

/// At most eight bytes as they lie in memory.
fn padded(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

pub(super) fn xdp<'e>(ebpf: &'e mut Ebpf, name: &str) -> anyhow::Result<&'e mut Xdp> {
    let program = ebpf.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
    Ok(program.try_into()?)
}
