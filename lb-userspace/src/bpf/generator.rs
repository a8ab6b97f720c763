//! Sends packets of many flows out of an interface as fast as a CPU can, and takes or returns packets at the other end, for
//! measuring. It counts nothing: interfaces do.
//!
//! BPF_PROG_TEST_RUN with live frames (kernel 5.18) makes frames that the kernel then treats as received ones: what the
//! program sends goes through the interface's own XDP transmission, without a socket buffer.

use anyhow::{Context, anyhow};
use aya::Ebpf;
use aya::programs::links::FdLink;
use aya::programs::{TestRun, TestRunAttrs, TestRunOptions, XdpMode};

use lb_common::abi::{BENCH_FIRST, BENCH_PACKETS};

use super::bench::{FRAME_BYTES, Flow, Packets, object, rows, xdp};

/// Frames between two deliveries: as many as a receive queue takes off in one go.
const BATCH: u32 = 64;

/// Loaded once for each CPU that sends.
pub struct Generator {
    ebpf: Ebpf,
}

impl Generator {
    /// Sends packets of these flows, in this order, over and over.
    pub fn new(packets: &Packets, flows: &[Flow]) -> anyhow::Result<Self> {
        let mut ebpf = object(packets)?;
        xdp(&mut ebpf, "generator")?.load()?;
        let rows = rows::<u64>(&mut ebpf, "XLB_BENCH_FLOWS", BENCH_PACKETS)?;
        for (row, flow) in (0..rows.len()).zip(flows.iter().cycle()) {
            rows.store_word(row, 0, flow.word());
        }
        Ok(Self { ebpf })
    }

    /// Sends so many packets from the calling thread's CPU, out of an interface of its namespace. The interface needs an
    /// XDP program and so many receive queues; frames that its peer has no room for are dropped and counted there.
    pub fn send(&mut self, ifindex: u32, queue: u32, count: u32) -> anyhow::Result<()> {
        let frame = [0; FRAME_BYTES];
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let context: Vec<u8> = [0, FRAME_BYTES as u32, 0, ifindex, queue, 0].map(u32::to_ne_bytes).concat();
        let options = TestRunOptions {
            data_in: Some(&frame),
            ctx_in: Some(&context),
            repeat: count,
            attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
            ..TestRunOptions::new()
        };
        xdp(&mut self.ebpf, "generator")?.test_run(options).context("sending live frames (kernel 5.18)")?;
        Ok(())
    }
}

/// What becomes of packets at an interface without a balancer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Taken, and gone.
    Sink,
    /// Sent back as they are.
    Return,
}

/// An [`End`] at an interface, in native mode; dropping it detaches.
pub struct AttachedEnd {
    _link: FdLink,
    _ebpf: Ebpf,
}

impl End {
    /// At an interface of the calling thread's namespace.
    pub fn attach(self, ifindex: u32) -> anyhow::Result<AttachedEnd> {
        let offset = BENCH_FIRST as u32;
        let packets =
            Packets { frame: [0; FRAME_BYTES], source_offset: offset, destination_offset: offset, growth: 0 };
        let mut ebpf = object(&packets)?;
        let program = xdp(
            &mut ebpf,
            match self {
                Self::Sink => "sink",
                Self::Return => "nothing",
            },
        )?;
        program.load()?;
        let id = program.attach_to_if_index(ifindex, XdpMode::Driver)?;
        let link = FdLink::try_from(program.take_link(id)?)
            .map_err(|_| anyhow!("XDP was attached without a bpf_link (kernel 5.9)"))?;
        Ok(AttachedEnd { _link: link, _ebpf: ebpf })
    }
}
