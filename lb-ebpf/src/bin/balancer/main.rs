//! The balancer: `lb_common::forward` on XDP.

#![no_std]
#![no_main]

mod maps;

use aya_ebpf::bindings::xdp_action;
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use aya_log_ebpf::info;
use lb_common::abi::Features;
use lb_common::forward::{Decision, forward};
use lb_common::outcome::Action;
use lb_common::tables::Tables;
use lb_ebpf::{Frame, verdict};

use crate::maps::KernelTables;

#[xdp]
#[inline(always)]
pub fn balancer(context: XdpContext) -> u32 {
    let tables = KernelTables;
    let decision = forward(&mut Frame::new(&context), &tables);
    if tables.features().has(Features::TRACE) {
        trace(&context, &decision);
    }
    match decision.outcome.action() {
        // SAFETY: a helper without pointer arguments. It returns XDP_REDIRECT, or XDP_ABORTED.
        Action::Redirect => unsafe { bpf_redirect(decision.ifindex, 0) as u32 & 7 },
        action => verdict(action),
    }
}

/// One log record a frame; the agent prints it. Off, the verifier removes the call. Not `cold`: that
/// would move it to a section in which aya 0.14 does not find the target of the call.
#[inline(never)]
fn trace(context: &XdpContext, decision: &Decision) -> u32 {
    info!(
        context,
        "outcome={} in={} out={} backend={} bytes={}",
        decision.outcome as u32,
        context.ingress_ifindex(),
        decision.ifindex,
        decision.backend,
        context.data_end() - context.data(),
    );
    xdp_action::XDP_PASS
}
