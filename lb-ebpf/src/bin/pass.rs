//! Lets everything through. A veth end receives frames that its peer sends from XDP only while it
//! has a program of its own (kernel 6.18): labs put this one there.

#![no_std]
#![no_main]

use aya_ebpf::bindings::xdp_action;
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
// The panic handler.
use lb_ebpf as _;

#[xdp]
pub fn pass(_: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}
