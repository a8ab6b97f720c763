//! Slots whose old flows had to leave a backend that is down, because there is no room for pins of new ones: counted by
//! pool, and said once in a while. Moves nothing itself.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// From one line in the log to the next.
const QUIET: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub struct Yielded {
    /// By the name of the pool, since the agent started.
    pools: BTreeMap<String, Slots>,
    said: Option<Instant>,
}

#[derive(Debug, Default)]
struct Slots {
    all: u64,
    unsaid: u64,
}

impl Yielded {
    pub fn add(&mut self, pool: &str, slots: u64) {
        let of_pool = self.pools.entry(pool.to_owned()).or_default();
        of_pool.all += slots;
        of_pool.unsaid += slots;
    }

    pub fn of(&self, pool: &str) -> u64 {
        self.pools.get(pool).map_or(0, |slots| slots.all)
    }

    /// Pools with slots that nobody has been told of, if it is time to.
    pub fn take_unsaid(&mut self, now: Instant) -> Vec<(String, u64)> {
        let early = self.said.is_some_and(|said| now.saturating_duration_since(said) < QUIET);
        if early || self.pools.values().all(|slots| slots.unsaid == 0) {
            return Vec::new();
        }
        self.said = Some(now);
        let unsaid =
            self.pools.iter_mut().map(|(pool, slots)| (pool.clone(), std::mem::take(&mut slots.unsaid)));
        unsaid.filter(|(_, slots)| *slots > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_said_at_once_and_then_summed_up_once_a_minute() {
        let (mut yielded, begin) = (Yielded::default(), Instant::now());
        assert_eq!(yielded.take_unsaid(begin), []);
        yielded.add("web", 5);
        assert_eq!(yielded.take_unsaid(begin), [("web".to_owned(), 5)]);
        yielded.add("web", 2);
        yielded.add("dns", 1);
        yielded.add("web", 1);
        assert_eq!(yielded.take_unsaid(begin + QUIET / 2), []);
        assert_eq!(yielded.take_unsaid(begin + QUIET), [("dns".to_owned(), 1), ("web".to_owned(), 3)]);
        assert_eq!(yielded.take_unsaid(begin + QUIET * 3), []);
        assert_eq!(["web", "dns", "other"].map(|pool| yielded.of(pool)), [8, 1, 0]);
    }
}
