//! The balancer: `lb_common::forward` on XDP.

#![no_std]
#![no_main]

mod maps;

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{xdp_action, xdp_md};
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use aya_log_ebpf::info;
use lb_common::abi::Features;
use lb_common::forward::{Decision, try_forward};
use lb_common::tables::Tables;
use lb_ebpf::{Frame, verdict};

use crate::maps::KernelTables;

#[xdp]
#[inline(always)]
pub fn balancer(context: XdpContext) -> u32 {
    let tables = KernelTables;
    let traced = || tables.features().has(Features::TRACE);
    match try_forward(&mut Frame::new(&context), &tables) {
        Ok(Decision { outcome, ifindex, backend }) => {
            if traced() {
                trace(context.as_ptr().cast(), outcome as u32, ifindex, backend);
            }
            if ifindex == 0 {
                xdp_action::XDP_TX
            } else {
                // SAFETY: a helper without pointer arguments. It returns XDP_REDIRECT, or XDP_ABORTED.
                unsafe { bpf_redirect(ifindex, 0) as u32 & 7 }
            }
        }
        Err(outcome) => {
            if traced() {
                trace(context.as_ptr().cast(), outcome as u32, 0, 0);
            }
            verdict(outcome.action())
        }
    }
}

/// One log record a frame; the agent prints it. Off, the verifier removes the call. Not `cold`: that
/// would move it to a section in which aya 0.14 does not find the target of the call.
#[inline(never)]
fn trace(context: *mut xdp_md, outcome: u32, ifindex: u32, backend: u32) -> u32 {
    let context = XdpContext::new(context);
    info!(
        &context,
        "outcome={} in={} out={} backend={} bytes={}",
        outcome,
        context.ingress_ifindex(),
        ifindex,
        backend,
        context.data_end() - context.data(),
    );
    xdp_action::XDP_PASS
}
