//! The maps, and `Tables` on them. lb-common's crate documentation says for each who writes it and
//! what a packet sees meanwhile. Numbers of rows here are placeholders: the agent sets them.

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, PerCpuArray};
use lb_common::abi::{
    Allowance, Backend, Constants, Egress, FILTER_WORDS, Features, HASH_KEYS, Interface, MOST_INTERFACES,
    Meta, OUTCOME_ROWS, PREFIX_LENGTHS_V4, PREFIX_LENGTHS_V6, PortRule, PrefixLengths, RULES_PER_ROW,
    RuleRow, SLOTS_PER_ROW, SlotRow, TableState, TableWord, Traffic, VIP_WORD_V4, VIP_WORD_V6,
    VIP_WORDS as WORDS, Vip4Bucket, Vip6Bucket, VipWord,
};
use lb_common::allowance::Answer;
use lb_common::outcome::Outcome;
use lb_common::slots::Slot;
use lb_common::tables::Tables;

#[map(name = "XLB_META")]
static META: Array<Meta> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "XLB_VIP_WORDS")]
static VIP_WORDS: Array<u64> = Array::with_max_entries(WORDS, BPF_F_MMAPABLE);
#[map(name = "XLB_VIPS4")]
static VIPS4: Array<Vip4Bucket> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "XLB_VIPS6")]
static VIPS6: Array<Vip6Bucket> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "XLB_VIP_FILTER")]
static VIP_FILTER: Array<u64> = Array::with_max_entries(FILTER_WORDS, BPF_F_MMAPABLE);
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
#[map(name = "XLB_OUTCOMES")]
static OUTCOMES: PerCpuArray<u64> = PerCpuArray::with_max_entries(OUTCOME_ROWS, 0);
#[map(name = "XLB_VIP_TRAFFIC")]
static VIP_TRAFFIC: PerCpuArray<Traffic> = PerCpuArray::with_max_entries(1, 0);
#[map(name = "XLB_BE_TRAFFIC")]
static BACKEND_TRAFFIC: PerCpuArray<Traffic> = PerCpuArray::with_max_entries(1, 0);

#[map(name = "XLB_ALLOWANCES")]
static ALLOWANCES: PerCpuArray<Allowance> = PerCpuArray::with_max_entries(Answer::ALL.len() as u32, 0);

/// Replaced by the agent before the program is loaded, and known to the verifier from then on.
#[unsafe(no_mangle)]
static CONSTANTS: Constants = Constants { features: 0, icmp_rate: 0, hash_keys: [0; HASH_KEYS] };

/// The balancer's maps.
#[derive(Clone, Copy)]
pub struct KernelTables;

/// A word that another party stores whole: one load, never repeated or split.
#[inline(always)]
fn load<T: Copy>(word: &T) -> T {
    // SAFETY: a reference is valid, aligned and initialised.
    unsafe { core::ptr::read_volatile(word) }
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
    fn vip_word4(&self) -> VipWord {
        VipWord::from_bits(VIP_WORDS.get(VIP_WORD_V4).map_or(0, load))
    }

    #[inline(always)]
    fn vip_word6(&self) -> VipWord {
        VipWord::from_bits(VIP_WORDS.get(VIP_WORD_V6).map_or(0, load))
    }

    #[inline(always)]
    fn vip4_bucket(&self, row: u32) -> Option<&Vip4Bucket> {
        VIPS4.get(row)
    }

    #[inline(always)]
    fn vip6_bucket(&self, row: u32) -> Option<&Vip6Bucket> {
        VIPS6.get(row)
    }

    #[inline(always)]
    fn vip_filter(&self, index: u32) -> u64 {
        VIP_FILTER.get(index).map_or(0, load)
    }

    #[inline(always)]
    fn prefix_lengths4(&self) -> PrefixLengths {
        PrefixLengths::from_bits(VIP_WORDS.get(PREFIX_LENGTHS_V4).map_or(0, load))
    }

    #[inline(always)]
    fn prefix_lengths6(&self) -> PrefixLengths {
        PrefixLengths::from_bits(VIP_WORDS.get(PREFIX_LENGTHS_V6).map_or(0, load))
    }

    #[inline(always)]
    fn port_rule(&self, index: u32) -> Option<&PortRule> {
        let row = PORT_RULES.get(index / RULES_PER_ROW)?;
        Some(&row.0[(index % RULES_PER_ROW) as usize])
    }

    #[inline(always)]
    fn table_word(&self, table: u16) -> Option<TableWord> {
        TABLES.get(u32::from(table)).map(|word| TableWord::from_bits(load(word)))
    }

    #[inline(always)]
    fn slot(&self, first_row: u32, index: u32) -> Option<Slot> {
        let row = SLOTS.get(first_row + index / SLOTS_PER_ROW)?;
        Some(Slot::from_bits(load(&row.0[(index % SLOTS_PER_ROW) as usize])))
    }

    #[inline(always)]
    fn backend(&self, id: u16) -> Option<&Backend> {
        BACKENDS.get(u32::from(id))
    }

    #[inline(always)]
    fn egress(&self, row: u16) -> Option<&Egress> {
        EGRESS.get(u32::from(row))
    }

    #[inline(always)]
    fn interface(&self, ifindex: u32) -> Option<&Interface> {
        // SAFETY: rows are replaced whole, and elements of a preallocated hash map stay mapped.
        unsafe { INTERFACES.get(ifindex) }
    }

    #[inline(always)]
    fn admit(&self, answer: Answer) -> bool {
        let Some(allowance) = ALLOWANCES.get_ptr_mut(answer as u32) else { return false };
        // SAFETY: a helper without arguments.
        let now = unsafe { bpf_ktime_get_coarse_ns() };
        // SAFETY: this CPU's own value; XDP runs do not nest on a CPU.
        unsafe { &mut *allowance }.take(now, load(&CONSTANTS.icmp_rate))
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
}
