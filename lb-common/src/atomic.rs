//! Words that packets on several CPUs and the agent change at the same time, and sums without branches.
//!
//! `core` has no atomic operations for the BPF target, and LLVM (22) cannot select atomic loads there; the kernel has
//! what is needed since 5.12 (instruction set v3).

use core::sync::atomic::AtomicU64;

/// One load of a word that others change.
#[inline(always)]
pub fn word(place: &AtomicU64) -> u64 {
    #[cfg(target_arch = "bpf")]
    // SAFETY: a reference is valid, aligned and initialised.
    return unsafe { core::ptr::read_volatile(place.as_ptr()) };
    #[cfg(not(target_arch = "bpf"))]
    place.load(core::sync::atomic::Ordering::Acquire)
}

/// One store of a word that others read.
#[inline(always)]
pub fn store(place: &AtomicU64, word: u64) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: a reference is valid and aligned, and atomics may be written through a shared one.
    unsafe {
        core::ptr::write_volatile(place.as_ptr(), word);
    }
    #[cfg(not(target_arch = "bpf"))]
    place.store(word, core::sync::atomic::Ordering::Release);
}

/// Stores `new` where `old` lies, in one step; whether it did. A full barrier.
#[inline(always)]
pub fn exchange(place: &AtomicU64, old: u64, new: u64) -> bool {
    #[cfg(target_arch = "bpf")]
    {
        let before: u64;
        // SAFETY: an aligned word that stays mapped; everybody changes it in one step.
        unsafe {
            core::arch::asm!(
                "r0 = cmpxchg_64({place} + 0, r0, {new})",
                place = in(reg) place.as_ptr(),
                new = in(reg) new,
                inlateout("r0") old => before,
            );
        }
        before == old
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        use core::sync::atomic::Ordering::SeqCst;
        place.compare_exchange(old, new, SeqCst, SeqCst).is_ok()
    }
}

/// Adds, wrapping, in one step; what was there before. A full barrier.
#[inline(always)]
pub fn add(place: &AtomicU64, n: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut word = n;
        // SAFETY: as in `exchange`.
        unsafe {
            core::arch::asm!(
                "{word} = atomic_fetch_add((u64 *)({place} + 0), {word})",
                place = in(reg) place.as_ptr(),
                word = inout(reg) word,
            );
        }
        word
    }
    #[cfg(not(target_arch = "bpf"))]
    place.fetch_add(n, core::sync::atomic::Ordering::SeqCst)
}

/// 1 for zero, 0 for anything else. LLVM makes a branch of any other spelling, and the verifier follows each.
#[inline(always)]
pub fn is_zero(x: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut result = x;
        // SAFETY: arithmetic on registers.
        unsafe {
            core::arch::asm!(
                "{less} = {result}",
                "{less} += -1",
                "{result} ^= -1",
                "{result} &= {less}",
                "{result} >>= 63",
                result = inout(reg) result,
                less = out(reg) _,
                options(pure, nomem, nostack),
            );
        }
        result
    }
    #[cfg(not(target_arch = "bpf"))]
    u64::from(x == 0)
}
