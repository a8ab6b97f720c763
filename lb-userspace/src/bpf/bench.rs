//! Runs the packet path in the kernel on packets of many flows, and times it.

use std::time::Duration;

use anyhow::{Context, ensure};
use aya::maps::ProgramArray;
use aya::programs::{ProgramFd, TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use lb_common::abi::{self, BENCH_WORDS, constant};

/// What is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The harness alone.
    Nothing,
    /// The head grown by an IPv4 header, and out.
    Floor,
    /// The balancer.
    Program,
}

/// Length of the frame that is sent, bytes.
pub const FRAME_BYTES: usize = BENCH_WORDS * 8;

/// The packets that are sent: one frame, and what differs from packet to packet. The number of the
/// flow is laid over the four bytes at `source_offset`, that of its destination over those at
/// `destination_offset`.
#[derive(Debug, Clone)]
pub struct Packets {
    pub frame: [u8; FRAME_BYTES],
    pub flows: u32,
    pub source_offset: u32,
    pub destinations: u32,
    pub destination_offset: u32,
}

/// The driver with its targets.
pub struct Bench {
    ebpf: Ebpf,
    targets: ProgramArray<aya::maps::MapData>,
    program: ProgramFd,
}

impl Bench {
    pub fn new(packets: &Packets, program: ProgramFd) -> anyhow::Result<Self> {
        let mut template = [0; BENCH_WORDS];
        for (word, bytes) in template.iter_mut().zip(packets.frame.as_chunks::<8>().0) {
            *word = u64::from_ne_bytes(*bytes);
        }
        let bench = abi::Bench {
            template,
            flows: u64::from(packets.flows),
            source_offset: u64::from(packets.source_offset),
            destinations: u64::from(packets.destinations),
            destination_offset: u64::from(packets.destination_offset),
        };
        let mut loader = EbpfLoader::new();
        loader.override_global(constant::BENCH, &bench, true);
        let mut ebpf = loader.load(super::BENCH)?;
        for name in ["driver", "nothing", "floor"] {
            xdp(&mut ebpf, name)?.load()?;
        }
        let targets = ebpf.take_map("XLB_BENCH_TARGET").context("the object has no target map")?;
        Ok(Self { ebpf, targets: targets.try_into()?, program })
    }

    /// The mean time of a packet over `repeat` of them, as the kernel measures it: whole nanoseconds.
    /// The call itself takes milliseconds more (kernel 6.18 waits for RCU when the program changes).
    pub fn time(&mut self, target: Target, repeat: u32) -> anyhow::Result<Duration> {
        match target {
            Target::Nothing => self.aim("nothing")?,
            Target::Floor => self.aim("floor")?,
            Target::Program => self.targets.set(0, &self.program, 0)?,
        }
        let frame = [0; FRAME_BYTES];
        let options = TestRunOptions { data_in: Some(&frame), repeat, ..TestRunOptions::new() };
        let driver = xdp(&mut self.ebpf, "driver")?;
        let result = driver.test_run(options)?;
        const XDP_ABORTED: u32 = 0;
        ensure!(result.return_value != XDP_ABORTED, "a packet was aborted");
        Ok(result.duration)
    }

    fn aim(&mut self, name: &str) -> anyhow::Result<()> {
        let fd = xdp(&mut self.ebpf, name)?.fd()?.try_clone()?;
        Ok(self.targets.set(0, &fd, 0)?)
    }
}

fn xdp<'e>(ebpf: &'e mut Ebpf, name: &str) -> anyhow::Result<&'e mut Xdp> {
    let program = ebpf.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
    Ok(program.try_into()?)
}
