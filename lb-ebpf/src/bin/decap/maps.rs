//! The maps of `xlb decap`, and `DecapTables` on them. Numbers of rows here are placeholders.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{LpmTrie, PerCpuArray};
use lb_common::abi::{Decap, DecapVip, OUTCOME_ROWS};
use lb_common::decap::DecapTables;
use lb_common::outcome::DecapOutcome;
use lb_common::wire::{Address6, Be16};

#[map(name = "XLB_DECAP_VIPS")]
static DECAP_VIPS: LpmTrie<[u64; 2], u8> = LpmTrie::with_max_entries(1, BPF_F_NO_PREALLOC);
#[map(name = "XLB_DECAP_FROM4")]
static DECAP_FROM4: LpmTrie<u32, u8> = LpmTrie::with_max_entries(1, BPF_F_NO_PREALLOC);
#[map(name = "XLB_DECAP_FROM6")]
static DECAP_FROM6: LpmTrie<[u64; 2], u8> = LpmTrie::with_max_entries(1, BPF_F_NO_PREALLOC);
#[map(name = "XLB_DECAP_OUT")]
static DECAP_OUTCOMES: PerCpuArray<u64> = PerCpuArray::with_max_entries(OUTCOME_ROWS, 0);

/// Replaced when the program is loaded, and known to the verifier from then on.
#[unsafe(no_mangle)]
static DECAP: Decap = Decap { gue_port: 0 };

/// A key whose address lies at a multiple of eight: the compiler writes it in words, which the verifier
/// (6.18) wants aligned on the stack.
#[repr(C, align(8))]
struct Aligned {
    pad: u32,
    key: Key<[u64; 2]>,
}

#[inline(always)]
fn holds(map: &LpmTrie<[u64; 2], u8>, address: [u64; 2]) -> bool {
    let lookup = Aligned { pad: 0, key: Key::new(128, address) };
    map.get(&lookup.key).is_some()
}

/// The maps of `xlb decap`.
#[derive(Clone, Copy)]
pub struct DecapMaps;

impl DecapTables for DecapMaps {
    #[inline(always)]
    fn gue_port(&self) -> Be16 {
        // SAFETY: a reference is valid, aligned and initialised. A plain read would be folded to the placeholder.
        Be16::new(unsafe { core::ptr::read_volatile(&DECAP.gue_port) } as u16)
    }

    #[inline(always)]
    fn from4(&self, source: u32) -> bool {
        DECAP_FROM4.get(Key::new(32, source)).is_some()
    }

    #[inline(always)]
    fn from6(&self, source: Address6) -> bool {
        holds(&DECAP_FROM6, [source.high, source.low])
    }

    #[inline(always)]
    fn vip4(&self, destination: u32) -> bool {
        holds(&DECAP_VIPS, DecapVip::v4(destination).0)
    }

    #[inline(always)]
    fn vip6(&self, destination: Address6) -> bool {
        holds(&DECAP_VIPS, DecapVip::v6(destination).0)
    }

    #[inline(always)]
    fn count_outcome(&self, outcome: DecapOutcome) {
        if let Some(packets) = DECAP_OUTCOMES.get_ptr_mut(outcome as u32) {
            // SAFETY: this CPU's own value; XDP runs do not nest on a CPU.
            unsafe { *packets = (*packets).wrapping_add(1) };
        }
    }
}
