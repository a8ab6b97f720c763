//! The pins as the agent sees them: words that packets change meanwhile, wherever they lie.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lb_common::abi::{PINS_PER_BUCKET, PinBucket};
use rustix::time::{ClockId, clock_gettime};

/// Where pins lie: whole buckets, a power of two of them.
pub trait PinWords: Send + Sync {
    fn words(&self) -> &[AtomicU64];
}

impl PinWords for Vec<AtomicU64> {
    fn words(&self) -> &[AtomicU64] {
        self
    }
}

/// A view of the pins; of none, where there are no maps.
#[derive(Clone, Default)]
pub struct Pins(Option<Arc<dyn PinWords>>);

impl Pins {
    pub fn of(words: Arc<dyn PinWords>) -> Self {
        Self(Some(words))
    }

    pub fn words(&self) -> &[AtomicU64] {
        self.0.as_ref().map_or(&[], |pins| pins.words())
    }

    /// A copy of the bucket that `spread` belongs to.
    pub fn bucket(&self, spread: u32) -> PinBucket {
        let words = self.words();
        let mask = (words.len() / PINS_PER_BUCKET).saturating_sub(1);
        let first = (spread as usize & mask) * PINS_PER_BUCKET;
        let copy =
            |way: usize| words.get(first + way).map_or(0, |word: &AtomicU64| word.load(Ordering::Relaxed));
        PinBucket(std::array::from_fn(|way| AtomicU64::new(copy(way))))
    }
}

/// Tables are compared without their pins.
impl PartialEq for Pins {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl fmt::Debug for Pins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pins({})", self.words().len())
    }
}

/// The clock of the pins' ages.
pub fn coarse_ns() -> u64 {
    let now = clock_gettime(ClockId::MonotonicCoarse);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}
