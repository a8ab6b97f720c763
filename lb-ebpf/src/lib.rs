//! Thin shells that give lb-common's packet path real packets and real maps. One binary per object,
//! each with its own maps (every map of a library would be in every object); this is what they share.
//!
//! On the host this compiles to unused stubs, so that clippy sees it; it runs on the BPF target only.

#![no_std]

mod frame;

pub use frame::Frame;

use aya_ebpf::bindings::xdp_action;
use lb_common::outcome::Action;

/// The XDP verdict of an action that needs no interface.
#[inline(always)]
pub const fn verdict(action: Action) -> u32 {
    match action {
        Action::Pass => xdp_action::XDP_PASS,
        Action::Drop => xdp_action::XDP_DROP,
        Action::Transmit => xdp_action::XDP_TX,
        Action::Redirect => xdp_action::XDP_REDIRECT,
    }
}

#[cfg(all(target_arch = "bpf", not(test)))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
