//! Decapsulation on a backend: `lb_common::decap` on XDP.

#![no_std]
#![no_main]

mod maps;

use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use lb_ebpf::{Frame, verdict};

use crate::maps::DecapMaps;

#[xdp]
pub fn decap(context: XdpContext) -> u32 {
    verdict(lb_common::decap::decap(&mut Frame::new(&context), &DecapMaps).action())
}
