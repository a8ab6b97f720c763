//! Programs for measuring: a driver that hands fresh packets of many flows to the program under test,
//! and what the measured program is compared with.
//!
//! BPF_PROG_TEST_RUN does not reset the packet between repeats: the driver undoes what the last run
//! did to the head, writes the template back, picks a flow, and calls the target as its tail.

#![no_std]
#![no_main]

use aya_ebpf::bindings::xdp_action;
use aya_ebpf::macros::{map, xdp};
use aya_ebpf::maps::{PerCpuArray, ProgramArray};
use aya_ebpf::programs::XdpContext;
use lb_common::abi::{BENCH_WORDS, Bench};
use lb_common::packet::Packet;
use lb_common::wire::{Header, Ipv4};
use lb_ebpf::Frame;

#[map(name = "XLB_BENCH_TARGET")]
static TARGET: ProgramArray = ProgramArray::with_max_entries(1, 0);
#[map(name = "XLB_BENCH_COUNT")]
static COUNT: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// Replaced before the program is loaded.
#[unsafe(no_mangle)]
static BENCH: Bench =
    Bench { template: [0; BENCH_WORDS], flows: 0, source_offset: 0, destinations: 0, destination_offset: 0 };

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
    // Any flow may follow any other: the caches see no order.
    let dice = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let flow = dice.wrapping_mul(load(&BENCH.flows)) >> 32;
    vary(&mut frame, load(&BENCH.source_offset), flow)?;
    // Each flow keeps its destination.
    let destination =
        (flow.wrapping_mul(0x9e37_79b1) & 0xffff_ffff).wrapping_mul(load(&BENCH.destinations)) >> 32;
    vary(&mut frame, load(&BENCH.destination_offset), destination)?;
    // SAFETY: the target is an XDP program; does not return if there is one.
    unsafe { TARGET.tail_call(context, 0) };
    None
}

/// Lays a number over the big-endian word at `offset`, which is below 64.
#[inline(always)]
fn vary(frame: &mut Frame<'_>, offset: u64, number: u64) -> Option<()> {
    let word = frame.header_mut::<Word>(offset as usize & 63)?;
    word.0 ^= (number as u32).to_be();
    Some(())
}

/// The harness alone.
#[xdp]
pub fn nothing(_: XdpContext) -> u32 {
    xdp_action::XDP_TX
}

/// What no encapsulation can do without: room in front, and out.
#[xdp]
pub fn floor(context: XdpContext) -> u32 {
    match Frame::new(&context).grow_head(size_of::<Ipv4>()) {
        Some(()) => xdp_action::XDP_TX,
        None => xdp_action::XDP_ABORTED,
    }
}
