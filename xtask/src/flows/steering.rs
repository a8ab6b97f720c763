//! Ways to choose a backend that others go: the table alone, and a table of connections in front of it.

use std::num::NonZeroUsize;
use std::time::Duration;

use anyhow::Result;
use lru::LruCache;

use super::model::Pool;

/// What is seen of a packet.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    pub hash: u64,
    /// A SYN.
    pub begins: bool,
    /// A FIN.
    pub ends: bool,
    pub cpu: u32,
}

/// What a way keeps of flows, and how often it looked at that.
pub struct State {
    pub bytes: u64,
    pub reserved: u64,
    pub looked: u64,
}

/// A way to choose a backend for every packet.
pub trait Steering {
    fn name(&self) -> String;
    /// The pool is another from now on.
    fn change(&mut self, now: Duration, pool: &Pool) -> Result<()>;
    /// Every few seconds.
    fn tick(&mut self, _now: Duration) -> Result<()> {
        Ok(())
    }
    fn packet(&mut self, now: Duration, packet: Packet) -> u16;
    fn state(&self) -> State;
}

/// The slot of a hash in a table whose length is a power of two.
fn slot(table: &[u16], hash: u64) -> u16 {
    let index = ((hash >> 32) * table.len() as u64) >> 32;
    table[index as usize]
}

/// No memory: the table decides.
#[derive(Default)]
pub struct Maglev {
    table: Vec<u16>,
}

impl Steering for Maglev {
    fn name(&self) -> String {
        "Maglev, no state".to_owned()
    }

    fn change(&mut self, _: Duration, pool: &Pool) -> Result<()> {
        self.table = pool.table();
        Ok(())
    }

    fn packet(&mut self, _: Duration, packet: Packet) -> u16 {
        slot(&self.table, packet.hash)
    }

    fn state(&self) -> State {
        State { bytes: 0, reserved: 0, looked: 0 }
    }
}

/// What an entry of a connection table takes in the kernel: key, value and two list heads.
const ENTRY_BYTES: u64 = 120;

/// Every flow is remembered until others push it out, one table for all CPUs or one for each.
pub struct Lru {
    table: Vec<u16>,
    alive: Vec<bool>,
    caches: Vec<LruCache<u64, u16>>,
    entries: NonZeroUsize,
    looked: u64,
}

impl Lru {
    pub fn shared(entries: usize) -> Self {
        Self::per_cpu(entries, 1)
    }

    pub fn per_cpu(entries: usize, cpus: u32) -> Self {
        let cpus = cpus.max(1) as usize;
        let entries = NonZeroUsize::new(entries / cpus).unwrap_or(NonZeroUsize::MIN);
        let caches = (0..cpus).map(|_| LruCache::new(entries)).collect();
        Self { table: Vec::new(), alive: Vec::new(), caches, entries, looked: 0 }
    }
}

impl Steering for Lru {
    fn name(&self) -> String {
        match self.caches.len() {
            1 => format!("LRU of {}, shared, and Maglev", self.entries),
            cpus => format!("LRU of {}, one for each of {cpus} CPUs", self.entries),
        }
    }

    fn change(&mut self, _: Duration, pool: &Pool) -> Result<()> {
        self.table = pool.table();
        self.alive = pool.backends.iter().map(|backend| backend.up).collect();
        Ok(())
    }

    /// A SYN goes by the table, as in Katran; it would not find its flow anyway.
    fn packet(&mut self, _: Duration, packet: Packet) -> u16 {
        self.looked += 1;
        let count = self.caches.len();
        let cache = &mut self.caches[packet.cpu as usize % count];
        if !packet.begins
            && let Some(&backend) = cache.get(&packet.hash)
            && self.alive[usize::from(backend)]
        {
            return backend;
        }
        let backend = slot(&self.table, packet.hash);
        cache.put(packet.hash, backend);
        backend
    }

    fn state(&self) -> State {
        let entries: usize = self.caches.iter().map(LruCache::len).sum();
        let reserved = self.entries.get() * self.caches.len();
        State {
            bytes: entries as u64 * ENTRY_BYTES,
            reserved: reserved as u64 * ENTRY_BYTES,
            looked: self.looked,
        }
    }
}
