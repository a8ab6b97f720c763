//! The maps, and `Tables` on them. lb-common's crate documentation says for each who writes it and
//! what a packet sees meanwhile. Numbers of rows here are placeholders: the agent sets them.

use core::hint::cold_path;
use core::sync::atomic::AtomicU64;

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, xdp_md};
use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns, bpf_ktime_get_ns};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, PerCpuArray};
use aya_ebpf::programs::XdpContext;
use lb_common::abi::{
    Allowance, Backend, Constants, Egress, Features, HASH_KEYS, Interface, Load, MOST_INTERFACES,
    MOST_SOURCES, Meta, OUTCOME_ROWS, PIN_EVENT_ROWS, PinBucket, PortRule, RULES_PER_ROW, Record, Replies,
    RuleRow, SLOTS_PER_ROW, SlotRow, Source, TableState, TableWord, Traffic, Vip4Bucket, Vip6Bucket,
    VipIndex, VipTarget,
};
use lb_common::allowance::Limited;
use lb_common::atomic;
use lb_common::connections::{Reply, Rooms};
use lb_common::flow::FlowHash;
use lb_common::icmp_errors::{self, About, Half};
use lb_common::outcome::Outcome;
use lb_common::packet::Packet;
use lb_common::pins::{self, Asked, PinEvent, Proposal, Verdict};
use lb_common::quic::{SERVER_ROWS, ServerKey};
use lb_common::slots::Slot;
use lb_common::tables::Tables;
use lb_common::translate::{self, Found, Passed, Shape};
use lb_ebpf::Frame;

#[map(name = "XLB_META")]
static META: Array<Meta> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "XLB_VIP_INDEX")]
static VIP_INDEX: Array<VipIndex> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "XLB_VIPS4")]
static VIPS4: Array<Vip4Bucket> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "XLB_VIPS6")]
static VIPS6: Array<Vip6Bucket> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "XLB_PORT_RULES")]
static PORT_RULES: Array<RuleRow> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "XLB_TABLES")]
static TABLES: Array<u64> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "XLB_TABLE_STATE")]
static TABLE_STATES: Array<TableState> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "XLB_SLOTS")]
static SLOTS: Array<SlotRow> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "XLB_BACKENDS")]
static BACKENDS: Array<Backend> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "XLB_EGRESS")]
static EGRESS: Array<Egress> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "XLB_INTERFACES")]
static INTERFACES: HashMap<u32, Interface> = HashMap::with_max_entries(MOST_INTERFACES, 0);
// Takes memory for what is in it only: few configurations have any.
#[map(name = "XLB_SERVERS")]
static SERVERS: HashMap<ServerKey, u32> = HashMap::with_max_entries(SERVER_ROWS, BPF_F_NO_PREALLOC);
#[map(name = "XLB_OUTCOMES")]
static OUTCOMES: PerCpuArray<u64> = PerCpuArray::with_max_entries(OUTCOME_ROWS, 0);
#[map(name = "XLB_VIP_TRAFFIC")]
static VIP_TRAFFIC: PerCpuArray<Traffic> = PerCpuArray::with_max_entries(1, 0);
#[map(name = "XLB_BE_TRAFFIC")]
static BACKEND_TRAFFIC: PerCpuArray<Traffic> = PerCpuArray::with_max_entries(1, 0);

#[map(name = "XLB_PINS")]
static PINS: Array<PinBucket> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "XLB_LOADS")]
static LOADS: Array<Load> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "XLB_PIN_EVENTS")]
static PIN_EVENTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(PIN_EVENT_ROWS, 0);

#[map(name = "XLB_CONNECTIONS")]
static CONNECTIONS: Array<PinBucket> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "XLB_RECORDS")]
static RECORDS: Array<Record> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "XLB_SOURCES")]
static SOURCES: Array<Source> = Array::with_max_entries(MOST_SOURCES, BPF_F_MMAPABLE);
#[map(name = "XLB_BE_REPLIES")]
static REPLIES: PerCpuArray<Replies> = PerCpuArray::with_max_entries(1, 0);

#[map(name = "XLB_ALLOWANCES")]
static ALLOWANCES: PerCpuArray<Allowance> = PerCpuArray::with_max_entries(Limited::ALL.len() as u32, 0);

/// Replaced by the agent before the program is loaded, and known to the verifier from then on.
#[unsafe(no_mangle)]
static CONSTANTS: Constants = Constants {
    features: 0,
    icmp_rate: 0,
    pin_rate: 0,
    pin_mask: 0,
    connection_buckets: 0,
    source_ports: 0,
    hash_keys: [0; HASH_KEYS],
};

// Global functions: the verifier goes through each once, for any arguments, and knows nothing of what they give back.

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn decide(table: u64, asked: u32, hash: u64, slot: u32) -> u32 {
    let (table, asked) = (TableWord::from_bits(table), Asked::from_bits(asked));
    let (hash, slot) = (FlowHash::from_bits(hash), Slot::from_bits(slot));
    pins::decide(&KernelTables, table, asked, hash, slot).bits()
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn attempt(table: u64, asked: u32, hash: u64, proposal: u64) -> u32 {
    let (table, asked) = (TableWord::from_bits(table), Asked::from_bits(asked));
    let (hash, proposal) = (FlowHash::from_bits(hash), Proposal::from_bits(proposal));
    pins::attempt(&KernelTables, table, asked, hash, proposal).bits()
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn pick(table: u64, asked: u32, slot: u32) -> u32 {
    let (table, asked) = (TableWord::from_bits(table), Asked::from_bits(asked));
    u32::from(pins::pick(&KernelTables, table, asked, Slot::from_bits(slot)))
}

// These read the frame anew, and some move its head: afterwards the caller knows nothing of it.

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn find_connection(context: *mut xdp_md, target: u64, shape: u64) -> u64 {
    let context = XdpContext::new(context);
    let (target, shape) = (VipTarget::from_bits(target), Shape::from_bits(shape));
    translate::find(&Frame::new(&context), &KernelTables, target, shape).bits()
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn claim_connection(context: *mut xdp_md, target: u64, hash: u64, shape: u64) -> u64 {
    let context = XdpContext::new(context);
    let (target, shape) = (VipTarget::from_bits(target), Shape::from_bits(shape));
    translate::claim(&Frame::new(&context), &KernelTables, target, FlowHash::from_bits(hash), shape).bits()
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn open_connection(context: *mut xdp_md, target: u64, claimed: u64, shape: u64) -> u64 {
    let context = XdpContext::new(context);
    let (target, shape) = (VipTarget::from_bits(target), Shape::from_bits(shape));
    translate::open(&Frame::new(&context), &KernelTables, target, Found::from_bits(claimed), shape).bits()
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn send_translated(context: *mut xdp_md, target: u64, position: u32, shape: u64) -> u64 {
    let context = XdpContext::new(context);
    let (target, shape) = (VipTarget::from_bits(target), Shape::from_bits(shape));
    translate::send(&mut Frame::new(&context), &KernelTables, target, position, shape).bits()
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn reply_translated(context: *mut xdp_md, source: u32, shape: u64) -> u64 {
    let context = XdpContext::new(context);
    translate::reply(&mut Frame::new(&context), &KernelTables, source, Shape::from_bits(shape)).bits()
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn find_error(context: *mut xdp_md, about: u64, source: u32) -> u64 {
    let context = XdpContext::new(context);
    icmp_errors::find(&Frame::new(&context), &KernelTables, About::from_bits(about), source).bits()
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn send_error(context: *mut xdp_md, position: u32, about: u64) -> u64 {
    let context = XdpContext::new(context);
    icmp_errors::send(&mut Frame::new(&context), &KernelTables, position, About::from_bits(about)).bits()
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cross_error(context: *mut xdp_md, position: u32, about: u64) -> u64 {
    let context = XdpContext::new(context);
    icmp_errors::cross(&mut Frame::new(&context), &KernelTables, position, About::from_bits(about)).bits()
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn widen_error(context: *mut xdp_md, position: u32, about: u64, half: u64) -> u64 {
    let context = XdpContext::new(context);
    let (about, half) = (About::from_bits(about), Half::from_bits(half));
    icmp_errors::widen(&mut Frame::new(&context), &KernelTables, position, about, half).bits()
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn narrow_error(context: *mut xdp_md, position: u32, about: u64, half: u64) -> u64 {
    let context = XdpContext::new(context);
    let (about, half) = (About::from_bits(about), Half::from_bits(half));
    icmp_errors::narrow(&mut Frame::new(&context), &KernelTables, position, about, half).bits()
}

/// The balancer's maps.
#[derive(Clone, Copy)]
pub struct KernelTables;

/// A word that another party stores whole: one load, never repeated or split.
#[inline(always)]
fn load<T: Copy>(word: &T) -> T {
    // SAFETY: a reference is valid, aligned and initialised.
    unsafe { core::ptr::read_volatile(word) }
}

/// A row that is hardly ever missing.
#[inline(always)]
fn at<T>(map: &Array<T>, index: u32) -> Option<&T> {
    let found = map.get(index);
    if found.is_none() {
        cold_path();
    }
    found
}

#[inline(always)]
fn count(map: &PerCpuArray<Traffic>, row: u32, bytes: u64) {
    if let Some(traffic) = map.get_ptr_mut(row) {
        // SAFETY: this CPU's own value; XDP runs do not nest on a CPU.
        let traffic = unsafe { &mut *traffic };
        traffic.packets = traffic.packets.wrapping_add(1);
        traffic.bytes = traffic.bytes.wrapping_add(bytes);
    }
}

impl Tables for KernelTables {
    #[inline(always)]
    fn features(&self) -> Features {
        // A plain read would be folded to the placeholder by the compiler.
        Features::from_bits(load(&CONSTANTS.features))
    }

    #[inline(always)]
    fn hash_key(&self, index: usize) -> u64 {
        load(&CONSTANTS.hash_keys[index])
    }

    #[inline(always)]
    fn vip_index(&self) -> Option<&VipIndex> {
        at(&VIP_INDEX, 0)
    }

    #[inline(always)]
    fn vip4_bucket(&self, row: u32) -> Option<&Vip4Bucket> {
        at(&VIPS4, row)
    }

    #[inline(always)]
    fn vip6_bucket(&self, row: u32) -> Option<&Vip6Bucket> {
        at(&VIPS6, row)
    }

    #[inline(always)]
    fn port_rule(&self, index: u32) -> Option<&PortRule> {
        let row = PORT_RULES.get(index / RULES_PER_ROW)?;
        Some(&row.0[(index % RULES_PER_ROW) as usize])
    }

    #[inline(always)]
    fn table_word(&self, table: u16) -> Option<TableWord> {
        at(&TABLES, u32::from(table)).map(|word| TableWord::from_bits(load(word)))
    }

    #[inline(always)]
    fn slot(&self, first_row: u32, index: u32) -> Option<Slot> {
        let row = at(&SLOTS, first_row + index / SLOTS_PER_ROW)?;
        Some(Slot::from_bits(load(&row.0[(index % SLOTS_PER_ROW) as usize])))
    }

    #[inline(always)]
    fn backend(&self, id: u16) -> Option<&Backend> {
        at(&BACKENDS, u32::from(id))
    }

    #[inline(always)]
    fn egress(&self, row: u16) -> Option<&Egress> {
        at(&EGRESS, u32::from(row))
    }

    #[inline(always)]
    fn interface(&self, ifindex: u32) -> Option<&Interface> {
        // SAFETY: rows are replaced whole, and elements of a preallocated hash map stay mapped.
        unsafe { INTERFACES.get(ifindex) }
    }

    #[inline(always)]
    fn server(&self, key: &ServerKey) -> Option<u16> {
        // SAFETY: copied out at once. The agent waits for a grace between what frees an element and what takes one.
        unsafe { SERVERS.get(key) }.map(|id| load(id) as u16)
    }

    #[inline(always)]
    fn admit(&self, limited: Limited) -> bool {
        let Some(allowance) = ALLOWANCES.get_ptr_mut(limited as u32) else { return false };
        // SAFETY: a helper without arguments.
        let now = unsafe { bpf_ktime_get_coarse_ns() };
        // SAFETY: this CPU's own value; XDP runs do not nest on a CPU.
        let allowance = unsafe { &mut *allowance };
        let rate = if limited.is_pin() { load(&CONSTANTS.pin_rate) } else { load(&CONSTANTS.icmp_rate) };
        allowance.take(now, rate)
    }

    #[inline(always)]
    fn count_outcome(&self, outcome: Outcome) {
        if let Some(packets) = OUTCOMES.get_ptr_mut(outcome as u32) {
            // SAFETY: this CPU's own value; XDP runs do not nest on a CPU.
            unsafe { *packets = (*packets).wrapping_add(1) };
        }
    }

    #[inline(always)]
    fn count_vip(&self, vip: u32, bytes: u64) {
        count(&VIP_TRAFFIC, vip, bytes);
    }

    #[inline(always)]
    fn count_backend(&self, id: u16, bytes: u64) {
        count(&BACKEND_TRAFFIC, u32::from(id), bytes);
    }

    #[inline(always)]
    fn decide(&self, table: TableWord, asked: Asked, hash: FlowHash, slot: Slot) -> Verdict {
        Verdict::from_bits(decide(table.bits(), asked.bits(), hash.bits(), slot.bits()))
    }

    #[inline(always)]
    fn attempt(&self, table: TableWord, asked: Asked, hash: FlowHash, proposal: Proposal) -> Verdict {
        Verdict::from_bits(attempt(table.bits(), asked.bits(), hash.bits(), proposal.bits()))
    }

    #[inline(always)]
    fn pick(&self, table: TableWord, asked: Asked, slot: Slot) -> u16 {
        pick(table.bits(), asked.bits(), slot.bits()) as u16
    }

    #[inline(always)]
    fn find_connection<P: Packet>(&self, packet: &P, target: VipTarget, shape: Shape) -> Found {
        let context = packet.context().cast();
        Found::from_bits(find_connection(context, target.bits(), shape.bits()))
    }

    #[inline(always)]
    fn claim_connection<P: Packet>(
        &self,
        packet: &P,
        target: VipTarget,
        hash: FlowHash,
        shape: Shape,
    ) -> Found {
        let context = packet.context().cast();
        Found::from_bits(claim_connection(context, target.bits(), hash.bits(), shape.bits()))
    }

    #[inline(always)]
    fn open_connection<P: Packet>(
        &self,
        packet: &P,
        target: VipTarget,
        claimed: Found,
        shape: Shape,
    ) -> Found {
        let context = packet.context().cast();
        Found::from_bits(open_connection(context, target.bits(), claimed.bits(), shape.bits()))
    }

    #[inline(always)]
    fn send_translated<P: Packet>(
        &self,
        packet: &mut P,
        target: VipTarget,
        position: u32,
        shape: Shape,
    ) -> Passed {
        let context = packet.context().cast();
        Passed::from_bits(send_translated(context, target.bits(), position, shape.bits()))
    }

    #[inline(always)]
    fn reply_translated<P: Packet>(&self, packet: &mut P, source: u32, shape: Shape) -> Passed {
        Passed::from_bits(reply_translated(packet.context().cast(), source, shape.bits()))
    }

    #[inline(always)]
    fn find_error<P: Packet>(&self, packet: &P, about: About, source: u32) -> Found {
        Found::from_bits(find_error(packet.context().cast(), about.bits(), source))
    }

    #[inline(always)]
    fn send_error<P: Packet>(&self, packet: &mut P, position: u32, about: About) -> Passed {
        Passed::from_bits(send_error(packet.context().cast(), position, about.bits()))
    }

    #[inline(always)]
    fn cross_error<P: Packet>(&self, packet: &mut P, position: u32, about: About) -> Half {
        Half::from_bits(cross_error(packet.context().cast(), position, about.bits()))
    }

    #[inline(always)]
    fn widen_error<P: Packet>(&self, packet: &mut P, position: u32, about: About, half: Half) -> Passed {
        let context = packet.context().cast();
        Passed::from_bits(widen_error(context, position, about.bits(), half.bits()))
    }

    #[inline(always)]
    fn narrow_error<P: Packet>(&self, packet: &mut P, position: u32, about: About, half: Half) -> Passed {
        let context = packet.context().cast();
        Passed::from_bits(narrow_error(context, position, about.bits(), half.bits()))
    }

    #[inline(always)]
    fn rooms(&self) -> Rooms {
        Rooms::new(load(&CONSTANTS.connection_buckets), load(&CONSTANTS.source_ports))
    }

    #[inline(always)]
    fn connection_bucket(&self, index: u32) -> Option<&PinBucket> {
        CONNECTIONS.get(index)
    }

    #[inline(always)]
    fn record(&self, position: u32) -> Option<&Record> {
        RECORDS.get(position)
    }

    #[inline(always)]
    fn source(&self, index: u32) -> Option<&Source> {
        SOURCES.get(index)
    }

    #[inline(always)]
    fn precise_clock(&self) -> u64 {
        // SAFETY: a helper without arguments.
        unsafe { bpf_ktime_get_ns() }
    }

    #[inline(always)]
    fn count_reply(&self, id: u16, reply: Reply) {
        let Some(replies) = REPLIES.get_ptr_mut(u32::from(id)) else { return };
        // SAFETY: this CPU's own value; XDP runs do not nest on a CPU.
        let replies = unsafe { &mut *replies };
        replies.packets = replies.packets.wrapping_add(1);
        replies.bytes = replies.bytes.wrapping_add(reply.bytes);
        replies.resets = replies.resets.wrapping_add(u64::from(reply.reset));
        if reply.waited != 0 {
            replies.answered = replies.answered.wrapping_add(1);
            replies.waited = replies.waited.wrapping_add(reply.waited);
        }
    }

    #[inline(always)]
    fn pin_bucket(&self, spread: u32) -> Option<&PinBucket> {
        PINS.get(spread & load(&CONSTANTS.pin_mask) as u32)
    }

    #[inline(always)]
    fn clock(&self) -> u64 {
        // SAFETY: a helper without arguments.
        unsafe { bpf_ktime_get_coarse_ns() }
    }

    #[inline(always)]
    fn add_failed(&self, table: u16) {
        if let Some(state) = TABLE_STATES.get_ptr_mut(u32::from(table)) {
            // SAFETY: an aligned word of a row that stays mapped; others change it atomically too.
            atomic::add(unsafe { AtomicU64::from_ptr(&raw mut (*state).failed) }, 1);
        }
    }

    #[inline(always)]
    fn closing(&self, table: u16) -> u64 {
        TABLE_STATES.get(u32::from(table)).map_or(0, |state| load(&state.closing))
    }

    #[inline(always)]
    fn next_turn(&self, table: u16) -> u32 {
        match TABLE_STATES.get_ptr_mut(u32::from(table)) {
            // SAFETY: as in `add_failed`.
            Some(state) => atomic::add(unsafe { AtomicU64::from_ptr(&raw mut (*state).turn) }, 1) as u32,
            None => 0,
        }
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: a helper without arguments.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn load(&self, id: u16) -> Option<&Load> {
        LOADS.get(u32::from(id))
    }

    #[inline(always)]
    fn count_pin(&self, event: PinEvent) {
        if let Some(times) = PIN_EVENTS.get_ptr_mut(event as u32) {
            // SAFETY: this CPU's own value; XDP runs do not nest on a CPU.
            unsafe { *times = (*times).wrapping_add(1) };
        }
    }
}
