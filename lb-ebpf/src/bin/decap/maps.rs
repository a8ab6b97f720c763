//! The maps of `xlb decap`, and `DecapTables` on them. Numbers of rows here are placeholders.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{HashMap, LpmTrie, PerCpuArray};
use lb_common::abi::{DecapVip, OUTCOME_ROWS};
use lb_common::decap::DecapTables;
use lb_common::outcome::DecapOutcome;
use lb_common::wire::Address6;

#[map(name = "XLB_DECAP_VIPS")]
static DECAP_VIPS: HashMap<DecapVip, u8> = HashMap::with_max_entries(1, 0);
#[map(name = "XLB_DECAP_FROM4")]
static DECAP_FROM4: LpmTrie<u32, u8> = LpmTrie::with_max_entries(1, BPF_F_NO_PREALLOC);
#[map(name = "XLB_DECAP_FROM6")]
static DECAP_FROM6: LpmTrie<[u64; 2], u8> = LpmTrie::with_max_entries(1, BPF_F_NO_PREALLOC);
#[map(name = "XLB_DECAP_OUT")]
static DECAP_OUTCOMES: PerCpuArray<u64> = PerCpuArray::with_max_entries(OUTCOME_ROWS, 0);

/// A key whose address lies at a multiple of eight: the compiler writes it in words, which the verifier
/// (6.18) wants aligned on the stack.
#[repr(C, align(8))]
struct Aligned {
    pad: u32,
    key: Key<[u64; 2]>,
}

/// The maps of `xlb decap`.
#[derive(Clone, Copy)]
pub struct DecapMaps;

impl DecapTables for DecapMaps {
    #[inline(always)]
    fn from4(&self, source: u32) -> bool {
        DECAP_FROM4.get(Key::new(32, source)).is_some()
    }

    #[inline(always)]
    fn from6(&self, source: Address6) -> bool {
        let lookup = Aligned { pad: 0, key: Key::new(128, [source.high, source.low]) };
        DECAP_FROM6.get(&lookup.key).is_some()
    }

    #[inline(always)]
    fn vip4(&self, destination: u32) -> bool {
        // SAFETY: only the presence is used.
        unsafe { DECAP_VIPS.get(DecapVip::v4(destination)) }.is_some()
    }

    #[inline(always)]
    fn vip6(&self, destination: Address6) -> bool {
        // SAFETY: only the presence is used.
        unsafe { DECAP_VIPS.get(DecapVip::v6(destination)) }.is_some()
    }

    #[inline(always)]
    fn count_outcome(&self, outcome: DecapOutcome) {
        if let Some(packets) = DECAP_OUTCOMES.get_ptr_mut(outcome as u32) {
            // SAFETY: this CPU's own value; XDP runs do not nest on a CPU.
            unsafe { *packets = (*packets).wrapping_add(1) };
        }
    }
}
