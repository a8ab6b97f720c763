//! Runs the packet path in the kernel on packets of many flows, and times it.

use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use aya::maps::{Map, ProgramArray};
use aya::programs::{ProgramFd, TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use lb_common::abi::{self, BENCH_PACKETS, BENCH_WORDS, constant};

use super::mmap::Rows;

/// What is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The harness alone.
    Nothing,
    /// The head moved by as much as a way moves it, and out.
    Floor,
    /// The balancer.
    Program,
}

/// Length of the frame that is sent, bytes.
pub const FRAME_BYTES: usize = BENCH_WORDS * 8;

/// The packets that are sent: one frame, and where it differs from packet to packet.
#[derive(Debug, Clone)]
pub struct Packets {
    pub frame: [u8; FRAME_BYTES],
    /// The number of the flow is laid over the four bytes there.
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

/// The driver with its targets.
pub struct Bench {
    ebpf: Ebpf,
    targets: ProgramArray<aya::maps::MapData>,
    flows: Rows<u64>,
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
            source_offset: u64::from(packets.source_offset),
            destination_offset: u64::from(packets.destination_offset),
            growth: i64::from(packets.growth),
        };
        let mut loader = EbpfLoader::new();
        loader.override_global(constant::BENCH, &bench, true);
        let mut ebpf = loader.load(super::BENCH)?;
        for name in ["driver", "nothing", "floor"] {
            xdp(&mut ebpf, name)?.load()?;
        }
        let targets = ebpf.take_map("XLB_BENCH_TARGET").context("the object has no target map")?;
        let Some(Map::Array(flows)) = ebpf.take_map("XLB_BENCH_FLOWS") else {
            bail!("the object has no map of flows")
        };
        let flows = Rows::map(flows.fd().as_fd(), BENCH_PACKETS)?;
        Ok(Self { ebpf, targets: targets.try_into()?, flows, program })
    }

    /// Whose packets come from now on, in this order, over and over.
    pub fn send(&mut self, flows: &[Flow]) {
        for (row, flow) in (0..self.flows.len()).zip(flows.iter().cycle()) {
            self.flows.store_word(row, 0, u64::from(flow.number) | u64::from(flow.destination) << 32);
        }
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
