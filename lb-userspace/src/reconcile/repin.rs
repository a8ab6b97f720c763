//! Pins on their way to another number of buckets. It knows neither slots nor tables, and no map.
//!
//! A pin knows the upper half of its flow's hash, and its bucket as many bits of the lower half as there are buckets
//! for. So among more buckets its place is one of several, and it is put into all of them: each of these is as full
//! as the one it came from, and the flow finds its own. The others are never used again and expire. Among fewer
//! buckets several become one: of equal tags the one that was used last stays, and of more than there is room for, those
//! that were silent for longest go.

use std::sync::atomic::{AtomicU64, Ordering};

use lb_common::abi::{PINS_PER_BUCKET, Pin};

/// What became of the pins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copied {
    /// In the buckets that they came from, and in those that they went to.
    pub from: u64,
    pub to: u64,
    /// Without room.
    pub dropped: u64,
}

/// Puts the pins of whole buckets into others that are empty; both numbers of buckets are powers of two. No packet
/// makes a pin meanwhile, on either side.
pub fn copy(from: &[AtomicU64], to: &[AtomicU64], now: u16) -> Copied {
    let mut copied = Copied::default();
    let (old, new) = (buckets(from), buckets(to));
    let mut pins = Vec::new();
    for number in 0..new {
        pins.clear();
        for source in sources(number, old, new) {
            pins.extend(bucket(from, source).iter().map(load).filter(|pin| !pin.is_free()));
        }
        let came = pins.len();
        pins.sort_by_key(|pin| pin.idle(now));
        let mut kept = 0;
        for pin in &pins {
            let ways = &bucket(to, number)[..kept];
            if ways.iter().any(|way| load(way).tag() == pin.tag()) {
                continue;
            }
            if kept == PINS_PER_BUCKET {
                copied.dropped += 1;
                continue;
            }
            bucket(to, number)[kept].store(pin.bits(), Ordering::Release);
            kept += 1;
        }
        copied.to += kept as u64;
        // Of more buckets, several have one source.
        if number < old {
            copied.from += came as u64;
        }
    }
    copied
}

/// Takes over what was used after it was copied, as far as it is newer than what packets have written there since.
/// No packet writes the pins of `from` any more.
pub fn renew(from: &[AtomicU64], to: &[AtomicU64], now: u16) {
    let (old, new) = (buckets(from), buckets(to));
    for number in 0..new {
        for way in bucket(to, number) {
            let pin = load(way);
            if pin.is_free() {
                continue;
            }
            let same = |other: &Pin| other.tag() == pin.tag() && other.backend() == pin.backend();
            let others = sources(number, old, new).flat_map(|source| bucket(from, source)).map(load);
            let last = others.filter(same).min_by_key(|other| other.idle(now));
            if let Some(last) = last.filter(|last| last.idle(now) < pin.idle(now)) {
                // A packet that was faster has written something newer still.
                _ = way.compare_exchange(pin.bits(), last.bits(), Ordering::SeqCst, Ordering::SeqCst);
            }
        }
    }
}

fn buckets(words: &[AtomicU64]) -> usize {
    words.len() / PINS_PER_BUCKET
}

fn bucket(words: &[AtomicU64], number: usize) -> &[AtomicU64] {
    &words[number * PINS_PER_BUCKET..][..PINS_PER_BUCKET]
}

fn load(word: &AtomicU64) -> Pin {
    Pin::from_bits(word.load(Ordering::Acquire))
}

/// Buckets, of `old`, whose pins may belong into this one of `new`.
fn sources(number: usize, old: usize, new: usize) -> impl Iterator<Item = usize> {
    let first = if new > old { number & old.wrapping_sub(1) } else { number };
    (first..old).step_by(new.max(1))
}
