//! Programs for measuring: a driver that hands fresh packets of many flows to the program under test,
//! and what the measured program is compared with. The same packets as live frames: a generator that sends them, and a
//! sink that takes them.
//!
//! BPF_PROG_TEST_RUN does not reset the packet between repeats: the driver undoes what the last run
//! did to the head, writes the template back, makes it the next flow's, and calls a target as its tail.
//! The targets take turns within one run, so that what disturbs a machine disturbs them all.

#![no_std]
#![no_main]

use aya_ebpf::bindings::{BPF_F_MMAPABLE, xdp_action};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::{map, xdp};
use aya_ebpf::maps::{Array, PerCpuArray, ProgramArray};
use aya_ebpf::programs::XdpContext;
use lb_common::abi::{
    BENCH_BLOCK, BENCH_BYTES, BENCH_FIRST, BENCH_PACKETS, BENCH_TIMES, BENCH_WORDS, Bench, BenchPlace,
    BenchState, SLOTS_PER_ROW, SlotRow, bench_target,
};
use lb_common::packet::Packet;
use lb_common::wire::Header;
use lb_ebpf::Frame;

/// Whom packets go to.
#[map(name = "XLB_BENCH_TARGETS")]
static TARGETS: ProgramArray = ProgramArray::with_max_entries(3, 0);
/// One row, of the one run that there is at a time. `step`, `target` and `targets` are set before it.
#[map(name = "XLB_BENCH_STATE")]
static STATE: Array<BenchState> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// Block of a run -> when it began, nanoseconds.
#[map(name = "XLB_BENCH_TIMES")]
static TIMES: Array<u64> = Array::with_max_entries(BENCH_TIMES, BPF_F_MMAPABLE);
/// Packet -> its flow (low half) and that flow's destination. Filled before a run.
#[map(name = "XLB_BENCH_FLOWS")]
static FLOWS: Array<u64> = Array::with_max_entries(BENCH_PACKETS, BPF_F_MMAPABLE);

/// What the generator has sent.
#[map(name = "XLB_BENCH_SENT")]
static SENT: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// As much memory as a configuration's slots take; one row, where `look` is not measured.
#[map(name = "XLB_BENCH_SLOTS")]
static SLOTS: Array<SlotRow> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Replaced before the program is loaded.
#[unsafe(no_mangle)]
static BENCH: Bench = Bench {
    first: 0,
    words: [0; BENCH_WORDS],
    last: 0,
    source: BenchPlace { word: 0, shift: 0 },
    destination: BenchPlace { word: 0, shift: 0 },
    growth: 0,
    shift: 0,
};

/// A frame, in the pieces that it is written in.
#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Template {
    first_four: u32,
    next_two: u16,
    words: [u64; BENCH_WORDS],
    last: u16,
}
const _: () = assert!(size_of::<Template>() == BENCH_BYTES);
// SAFETY: packed integers.
unsafe impl Header for Template {}

#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Word(u64);
// SAFETY: a packed integer.
unsafe impl Header for Word {}

#[inline(always)]
fn load<T: Copy>(word: &T) -> T {
    // SAFETY: a reference is valid, aligned and initialised.
    unsafe { core::ptr::read_volatile(word) }
}

#[inline(always)]
const fn transmitted(done: Option<()>) -> u32 {
    match done {
        Some(()) => xdp_action::XDP_TX,
        None => xdp_action::XDP_ABORTED,
    }
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
    let state = STATE.get_ptr_mut(0)?;
    // SAFETY: the map's own row; nobody else is at it while packets run.
    let state = unsafe { &mut *state };
    let step = state.step;
    if step & (BENCH_BLOCK - 1) == 0 {
        let time = TIMES.get_ptr_mut((step / BENCH_BLOCK) as u32 & (BENCH_TIMES - 1))?;
        // SAFETY: as above; the helper has no conditions.
        unsafe { *time = bpf_ktime_get_ns() };
        let next = state.target + 1;
        state.target = if next >= state.targets { 0 } else { next };
    }
    state.step = step + 1;
    state.position += 1;
    let flow = FLOWS.get_ptr(state.position as u32 & (BENCH_PACKETS - 1))?;
    // SAFETY: nobody writes while packets run.
    let flow = unsafe { *flow };
    make(&mut frame, flow)?;
    // Calls of constant rows are jumps to the target; others would be looked up, and their jumps guarded.
    // SAFETY: the targets are XDP programs; does not return if there is one.
    unsafe {
        match state.target as u32 {
            bench_target::PROGRAM => TARGETS.tail_call(context, bench_target::PROGRAM),
            bench_target::NOTHING => TARGETS.tail_call(context, bench_target::NOTHING),
            _ => TARGETS.tail_call(context, bench_target::FLOOR),
        }
    };
    None
}

/// Makes a frame of the template's length a flow's packet.
#[inline(always)]
fn make(frame: &mut Frame<'_>, flow: u64) -> Option<()> {
    let template = frame.header_mut::<Template>(0)?;
    let first = load(&BENCH.first);
    template.first_four = first as u32;
    template.next_two = (first >> 32) as u16;
    let mut i = 0;
    while i < BENCH_WORDS {
        template.words[i] = load(&BENCH.words[i]);
        i += 1;
    }
    template.last = load(&BENCH.last) as u16;
    vary(frame, &BENCH.source, flow as u32)?;
    vary(frame, &BENCH.destination, (flow >> 32) as u32)
}

/// Sends a packet out of the interface that it pretends to have come in by. The kernel gives each live frame its length
/// back, but not its bytes.
#[xdp]
pub fn generator(context: XdpContext) -> u32 {
    transmitted(generate(&context))
}

#[inline(always)]
fn generate(context: &XdpContext) -> Option<()> {
    let count = SENT.get_ptr_mut(0)?;
    // SAFETY: this CPU's own value.
    let number = unsafe {
        *count = (*count).wrapping_add(1);
        *count
    };
    let flow = FLOWS.get_ptr(number as u32 & (BENCH_PACKETS - 1))?;
    // SAFETY: nobody writes while packets run.
    make(&mut Frame::new(context), unsafe { *flow })
}

#[xdp]
pub fn sink(_: XdpContext) -> u32 {
    xdp_action::XDP_DROP
}

/// Lays a number over four bytes.
#[inline(always)]
fn vary(frame: &mut Frame<'_>, place: &BenchPlace, number: u32) -> Option<()> {
    let word = load(&place.word) as usize & (BENCH_BYTES / 8 - 1);
    let word = frame.header_mut::<Word>(BENCH_FIRST + word * 8)?;
    word.0 ^= u64::from(number.to_be()) << (load(&place.shift) & 32);
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
    transmitted(Frame::new(&context).grow_head(load(&BENCH.growth) as usize))
}

/// The floor, with one look at the slots: what no balancer can do without whose flows have more slots than the caches hold.
/// The slot follows from the packet, and the packet that leaves from the slot.
#[xdp]
pub fn look(context: XdpContext) -> u32 {
    transmitted(look_and_grow(&context))
}

#[inline(always)]
fn look_and_grow(context: &XdpContext) -> Option<()> {
    const MIX: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut frame = Frame::new(context);
    let place = load(&BENCH.source.word) as usize & (BENCH_BYTES / 8 - 1);
    let flow = frame.header::<Word>(BENCH_FIRST + place * 8)?.0;
    let index = (flow.wrapping_mul(MIX) >> 32) as u32;
    let row = SLOTS.get(index >> load(&BENCH.shift) as u32)?;
    let slot = load(&row.0[(index & (SLOTS_PER_ROW - 1)) as usize]);
    frame.grow_head(load(&BENCH.growth) as usize)?;
    frame.header_mut::<Word>(BENCH_FIRST)?.0 = u64::from(slot);
    Some(())
}
