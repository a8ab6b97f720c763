//! Connections whose addresses are translated, as the agent sees them: places that packets change meanwhile, wherever
//! they lie.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lb_common::abi::{BACKEND_CLAIMED, PINS_PER_BUCKET, Pin, PinBucket, Record};

/// Where connections lie: whole buckets of words, and a record for each word.
pub trait ConnectionRows: Send + Sync {
    fn words(&self) -> &[AtomicU64];
    fn records(&self) -> &[Record];
}

impl ConnectionRows for (Vec<AtomicU64>, Vec<Record>) {
    fn words(&self) -> &[AtomicU64] {
        &self.0
    }

    fn records(&self) -> &[Record] {
        &self.1
    }
}

/// A view of the connections; of none, where nothing is translated.
#[derive(Clone, Default)]
pub struct Connections(Option<Arc<dyn ConnectionRows>>);

impl Connections {
    pub fn of(rows: Arc<dyn ConnectionRows>) -> Self {
        Self(Some(rows))
    }

    /// Ordinary memory for so many.
    pub fn in_memory(connections: usize) -> Self {
        let words = (0..connections).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
        let records = (0..connections).map(|_| Record::default()).collect::<Vec<_>>();
        Self::of(Arc::new((words, records)))
    }

    pub fn words(&self) -> &[AtomicU64] {
        self.0.as_ref().map_or(&[], |rows| rows.words())
    }

    pub fn records(&self) -> &[Record] {
        self.0.as_ref().map_or(&[], |rows| rows.records())
    }

    /// Places, taken or not.
    pub fn len(&self) -> usize {
        self.words().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn buckets(&self) -> u32 {
        (self.len() / PINS_PER_BUCKET) as u32
    }

    /// A copy of a bucket.
    pub fn bucket(&self, row: u32) -> Option<PinBucket> {
        let first = row as usize * PINS_PER_BUCKET;
        let words = self.words().get(first..first + PINS_PER_BUCKET)?;
        Some(PinBucket(std::array::from_fn(|way| AtomicU64::new(words[way].load(Ordering::Acquire)))))
    }

    /// A copy of a record.
    pub fn record(&self, position: u32) -> Option<Record> {
        let record = self.records().get(position as usize)?;
        Some(Record(std::array::from_fn(|word| AtomicU64::new(record.0[word].load(Ordering::Acquire)))))
    }
}

/// A place that changes under the reader's hands this often is left out: each change is a packet's.
const TRIES: u32 = 8;

impl Connections {
    /// The connection in a place and the words of its record, of one moment; nothing where there is none.
    pub fn at(&self, position: usize) -> Option<(Pin, [u64; 8])> {
        let (word, record) = (self.words().get(position)?, self.records().get(position)?);
        let mut pin = Pin::from_bits(word.load(Ordering::Acquire));
        for _ in 0..TRIES {
            if pin.is_free() || pin.backend() == BACKEND_CLAIMED {
                return None;
            }
            let words = std::array::from_fn(|index| record.0[index].load(Ordering::Acquire));
            let after = Pin::from_bits(word.load(Ordering::Acquire));
            if after == pin {
                return Some((pin, words));
            }
            pin = after;
        }
        None
    }

    /// Takes the connection out of a place, if that still is as it was seen.
    pub fn take_out(&self, position: usize, seen: Pin) -> bool {
        let Some(word) = self.words().get(position) else { return false };
        word.compare_exchange(seen.bits(), 0, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }
}

/// Tables are compared without their connections.
impl PartialEq for Connections {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl fmt::Debug for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connections({})", self.len())
    }
}

/// Takes out the connections in places of a range: compare and delete, since packets may change them meanwhile. A place
/// that is claimed is left alone: somebody is filling its record, and nobody else may.
pub fn drop_connections(words: &[AtomicU64], places: RangeInclusive<u32>) -> u64 {
    let (first, last) = (*places.start() as usize, *places.end() as usize);
    let mut dropped = 0;
    for word in words.iter().take(last.saturating_add(1)).skip(first) {
        loop {
            let pin = Pin::from_bits(word.load(Ordering::Acquire));
            if pin.is_free() || pin.backend() == BACKEND_CLAIMED {
                break;
            }
            if word.compare_exchange(pin.bits(), 0, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                dropped += 1;
                break;
            }
        }
    }
    dropped
}

/// What became of connections on their way to other maps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copied {
    pub from: u64,
    /// Their places are not there any more.
    pub dropped: u64,
}

/// Puts connections into maps that no packet goes by yet, each into the same place: where the source is translated, its
/// place is the port that its backend knows.
pub fn copy(from: &Connections, to: &Connections) -> Copied {
    let mut copied = Copied::default();
    for (place, word) in from.words().iter().enumerate() {
        let pin = Pin::from_bits(word.load(Ordering::Acquire));
        if pin.is_free() || pin.backend() == BACKEND_CLAIMED {
            continue;
        }
        copied.from += 1;
        if place < to.len() {
            put(from, to, place, pin);
        } else {
            copied.dropped += 1;
        }
    }
    copied
}

/// Takes over what packets have opened and used since it was copied, while others went by the new maps already. No packet
/// goes by `from` any more.
pub fn renew(from: &Connections, to: &Connections, now: u16) {
    for (place, word) in from.words().iter().enumerate().take(to.len()) {
        let pin = Pin::from_bits(word.load(Ordering::Acquire));
        if pin.is_free() || pin.backend() == BACKEND_CLAIMED {
            continue;
        }
        let there = &to.words()[place];
        let other = Pin::from_bits(there.load(Ordering::Acquire));
        if other.is_free() {
            // A packet may want it, too: who claims it first has it.
            let claim = Pin::new(pin.tag(), BACKEND_CLAIMED, pin.state(), now);
            if there.compare_exchange(0, claim.bits(), Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                put(from, to, place, pin);
            }
        } else if other.tag() == pin.tag()
            && other.backend() == pin.backend()
            && pin.idle(now) < other.idle(now)
        {
            // A packet may have renewed it: that one is younger still.
            _ = there.compare_exchange(other.bits(), pin.bits(), Ordering::SeqCst, Ordering::SeqCst);
        }
    }
}

fn put(from: &Connections, to: &Connections, place: usize, pin: Pin) {
    for (word, value) in to.records()[place].0.iter().zip(&from.records()[place].0) {
        word.store(value.load(Ordering::Acquire), Ordering::Release);
    }
    to.words()[place].store(pin.bits(), Ordering::SeqCst);
}
