//! Pins on their way to another number of buckets. It knows neither slots nor tables, and no map.
//!
//! A pin knows the upper half of its flow's hash, and its bucket as many bits of the lower half as there are buckets
//! for. So among more buckets its place is one of several, and it is put into all of them: each of these is as full
//! as the one it came from, and the flow finds its own. The others go once it has, or expire. Among fewer
//! buckets several become one: of equal tags the one that was used last stays, and of more than there is room for, those
//! that were silent for longest go.

use std::sync::atomic::{AtomicU64, Ordering};

use lb_common::abi::{PINS_PER_BUCKET, Pin, PinState};

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

/// Pins that lie in several buckets, since nobody knows which of them their flows look into. A flow that speaks shows
/// its own.
#[derive(Debug)]
pub struct Spread {
    /// How many buckets there were.
    old: usize,
    /// When they were copied.
    copied: u16,
    next: usize,
    /// Flows of this pass that had several.
    several: u64,
}

impl Spread {
    /// Of pins that have just been copied from so many words to so many, by which some may have been spread already.
    pub fn of(before: Option<Self>, old_words: usize, new_words: usize, now: u16) -> Option<Self> {
        let old = old_words / PINS_PER_BUCKET;
        let old = before.map_or(old, |before| before.old.min(old));
        let is_spread = old > 0 && old * PINS_PER_BUCKET < new_words;
        is_spread.then_some(Self { old, copied: now, next: 0, several: 0 })
    }

    /// Goes over so many buckets, and takes out what flows have shown not to use. True once no flow has several pins.
    pub fn step(&mut self, pins: &[AtomicU64], count: usize, now: u16) -> bool {
        let groups = (buckets(pins) / self.old).max(1);
        let until = self.old.min(self.next + (count / groups).max(1));
        for first in self.next..until {
            self.look(pins, first, now);
        }
        self.next = until % self.old;
        self.next == 0 && std::mem::take(&mut self.several) == 0
    }

    fn look(&mut self, words: &[AtomicU64], first: usize, now: u16) {
        let since = Pin::new(0, 0, PinState::Syn, self.copied).idle(now);
        let places = (first..buckets(words)).step_by(self.old).flat_map(|number| bucket(words, number));
        let mut pins: Vec<(&AtomicU64, Pin)> =
            places.map(|place| (place, load(place))).filter(|(_, pin)| !pin.is_free()).collect();
        pins.sort_unstable_by_key(|(_, pin)| (pin.tag(), pin.idle(now)));
        for copies in pins.chunk_by(|(_, one), (_, other)| one.tag() == other.tag()) {
            let [(_, used), others @ ..] = copies else { continue };
            self.several += u64::from(!others.is_empty());
            if used.idle(now) >= since {
                continue;
            }
            for (place, pin) in others.iter().filter(|(_, pin)| pin.idle(now) >= since) {
                _ = place.compare_exchange(pin.bits(), 0, Ordering::SeqCst, Ordering::SeqCst);
            }
        }
    }
}
