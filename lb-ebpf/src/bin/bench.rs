//! Programs for measuring: a driver that hands fresh packets of many flows to the program under test,
//! and what the measured program is compared with.
//!
//! BPF_PROG_TEST_RUN does not reset the packet between repeats: the driver undoes what the last run
//! did to the head, writes the template back, makes it the next flow's, and calls the target as its tail.

#![no_std]
#![no_main]

use aya_ebpf::bindings::{BPF_F_MMAPABLE, xdp_action};
use aya_ebpf::macros::{map, xdp};
use aya_ebpf::maps::{Array, PerCpuArray, ProgramArray};
use aya_ebpf::programs::XdpContext;
use lb_common::abi::{BENCH_PACKETS, BENCH_WORDS, Bench};
use lb_common::packet::Packet;
use lb_common::wire::Header;
use lb_ebpf::Frame;

#[map(name = "XLB_BENCH_TARGET")]
static TARGET: ProgramArray = ProgramArray::with_max_entries(1, 0);
#[map(name = "XLB_BENCH_COUNT")]
static COUNT: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
/// Packet -> its flow (low half) and that flow's destination. Filled before a run.
#[map(name = "XLB_BENCH_FLOWS")]
static FLOWS: Array<u64> = Array::with_max_entries(BENCH_PACKETS, BPF_F_MMAPABLE);

/// Replaced before the program is loaded.
#[unsafe(no_mangle)]
static BENCH: Bench =
    Bench { template: [0; BENCH_WORDS], source_offset: 0, destination_offset: 0, growth: 0 };

#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Template([u64; BENCH_WORDS]);
// SAFETY: packed integers.
unsafe impl Header for Template {}

#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Word(u32);
// SAFETY: a packed integer.
unsafe impl Header for Word {}

#[inline(always)]
fn load<T: Copy>(word: &T) -> T {
    // SAFETY: a reference is valid, aligned and initialised.
    unsafe { core::ptr::read_volatile(word) }
}

#[xdp]
pub fn driver(context: XdpContext) -> u32 {
    match drive(&context) {
        Some(()) => xdp_action::XDP_PASS,
        None => xdp_action::XDP_ABORTED,
    }
}

#[inline(always)]
fn drive(context: &XdpContext) -> Option<()> {
    let mut frame = Frame::new(context);
    let grown = frame.length().wrapping_sub(size_of::<Template>());
    if grown != 0 {
        frame.shrink_head(grown)?;
    }
    let template = frame.header_mut::<Template>(0)?;
    let mut i = 0;
    while i < BENCH_WORDS {
        template.0[i] = load(&BENCH.template[i]);
        i += 1;
    }
    let count = COUNT.get_ptr_mut(0)?;
    // SAFETY: this CPU's own value.
    let number = unsafe {
        *count = (*count).wrapping_add(1);
        *count
    };
    // SAFETY: nobody writes while packets run.
    let flow = unsafe { *FLOWS.get_ptr(number as u32 & (BENCH_PACKETS - 1))? };
    vary(&mut frame, load(&BENCH.source_offset), flow as u32)?;
    vary(&mut frame, load(&BENCH.destination_offset), (flow >> 32) as u32)?;
    // SAFETY: the target is an XDP program; does not return if there is one.
    unsafe { TARGET.tail_call(context, 0) };
    None
}

/// Lays a number over the big-endian word at `offset`.
#[inline(always)]
fn vary(frame: &mut Frame<'_>, offset: u64, number: u32) -> Option<()> {
    const { assert!((BENCH_WORDS * 8).is_power_of_two()) };
    let word = frame.header_mut::<Word>(offset as usize & (BENCH_WORDS * 8 - 1))?;
    word.0 ^= number.to_be();
    Some(())
}

/// The harness alone.
#[xdp]
pub fn nothing(_: XdpContext) -> u32 {
    xdp_action::XDP_TX
}

/// What no way with another header can do without: room for it, and out.
#[xdp]
pub fn floor(context: XdpContext) -> u32 {
    match Frame::new(&context).grow_head(load(&BENCH.growth) as usize) {
        Some(()) => xdp_action::XDP_TX,
        None => xdp_action::XDP_ABORTED,
    }
}
