//! Waiting until no program run that began before is still under way.

#![allow(unsafe_code, reason = "membarrier has no safe wrapper")]

use std::time::Duration;

/// Where membarrier is not to be had, this is longer than any program run by orders of magnitude.
const FALLBACK: Duration = Duration::from_millis(50);

/// Returns when every XDP run that was under way has ended.
///
/// MEMBARRIER_CMD_GLOBAL waits for an RCU grace period (kernel/sched/membarrier.c, 4.16 to 6.18), and
/// XDP programs run inside RCU read-side sections. On a kernel with nohz_full it is refused.
pub fn grace() {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: a syscall without pointer arguments.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result != 0 {
        std::thread::sleep(FALLBACK);
    }
}
