//! Which edges of the packet path a frame takes: the counters that `cargo xtask fuzz` has the compiler put into this
//! binary (LLVM's sancov). Knows nothing of frames.

use std::collections::BTreeSet;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

static COUNTERS: OnceLock<&'static [AtomicU8]> = OnceLock::new();

/// Called before `main`, by each part of the binary that has counters; all of them tell the same.
///
/// # Safety
///
/// Counters lie from `start` to `stop`, as long as the process lives.
// SAFETY: nobody else has a function of this name: it is what sancov calls, and no sanitizer is linked.
#[unsafe(no_mangle)]
unsafe extern "C" fn __sanitizer_cov_8bit_counters_init(start: *const AtomicU8, stop: *const AtomicU8) {
    // SAFETY: both point into the binary's section of counters, which is writable and never goes; a counter is a byte,
    // and only this thread counts while they are read.
    let counters = unsafe { std::slice::from_raw_parts(start, stop.offset_from_unsigned(start)) };
    COUNTERS.get_or_init(|| counters);
}

/// An edge with how often it was taken, in classes: the number of the edge times 8, plus the class.
pub type Taken = u32;

/// Edges that were ever taken.
pub struct Coverage {
    counters: &'static [AtomicU8],
    /// A bit for each class.
    seen: Vec<u8>,
}

impl Coverage {
    /// Without counters in the binary, no edge is ever taken.
    pub fn new() -> Self {
        let counters = COUNTERS.get().copied().unwrap_or_default();
        Self { counters, seen: vec![0; counters.len()] }
    }

    pub fn is_built_in(&self) -> bool {
        !self.counters.is_empty()
    }

    /// From here on, for the next frame.
    pub fn begin(&self) {
        self.counters.iter().for_each(|counter| counter.store(0, Ordering::Relaxed));
    }

    /// Whether the frame took an edge as no frame before. Notes it.
    pub fn is_new(&mut self) -> bool {
        let mut new = false;
        for (counter, seen) in self.counters.iter().zip(&mut self.seen) {
            let count = counter.load(Ordering::Relaxed);
            if count != 0 {
                let bit = 1 << class(count);
                new |= *seen & bit == 0;
                *seen |= bit;
            }
        }
        new
    }

    /// All that the frame took.
    pub fn taken(&self) -> BTreeSet<Taken> {
        let counts =
            (0u32..).zip(self.counters).map(|(edge, counter)| (edge, counter.load(Ordering::Relaxed)));
        counts.filter(|(_, count)| *count != 0).map(|(edge, count)| edge * 8 + class(count)).collect()
    }

    /// All that there are.
    pub fn total(&self) -> usize {
        self.counters.len()
    }

    /// Edges that some frame took.
    pub fn edges(&self) -> usize {
        self.seen.iter().filter(|seen| **seen != 0).count()
    }
}

/// Once, twice, three times, a few times, often: a loop that turns one time more is something new only at first.
fn class(count: u8) -> u32 {
    match count {
        0..=3 => u32::from(count),
        4..=6 => 4,
        7..=15 => 5,
        16..=127 => 6,
        128.. => 7,
    }
}
