//! Response times of checks as weights: who answers in half the time gets twice the flows, within bounds. Knows no probes.
//!
//! A check says how quickly a backend accepts and answers one small request, from here. So weights follow slowly, stay
//! within a factor of ten, and take what is quicker than a millisecond for equal.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// The weight of the fastest, and of those of which nothing is known.
pub const MOST: u8 = 100;
/// A tenth of the fastest's.
const LEAST: u8 = 10;

/// How much a new time counts against those before it.
const NEWEST: f64 = 0.25;
/// What is faster is as fast: below lies the noise of a network.
const FLOOR: Duration = Duration::from_millis(1);

/// Weights stay where none would change by more than this part.
const TOLERANCE: f64 = 0.15;
/// From one change to the next.
const REST: Duration = Duration::from_secs(5);

/// The response times of one pool's backends.
#[derive(Debug, Clone)]
pub struct ResponseTimes<K> {
    /// Moving averages in seconds.
    averages: HashMap<K, f64>,
    weights: HashMap<K, u8>,
    changed_at: Option<Instant>,
}

impl<K> Default for ResponseTimes<K> {
    fn default() -> Self {
        Self { averages: HashMap::new(), weights: HashMap::new(), changed_at: None }
    }
}

impl<K: Copy + Eq + Hash> ResponseTimes<K> {
    /// A check that went well.
    pub fn took(&mut self, key: K, time: Duration) {
        let time = time.max(FLOOR).as_secs_f64();
        self.averages.entry(key).and_modify(|average| *average += (time - *average) * NEWEST).or_insert(time);
    }

    /// One that is down: what it took says nothing of what it will take.
    pub fn forget(&mut self, key: &K) {
        self.averages.remove(key);
        self.weights.remove(key);
    }

    pub fn retain(&mut self, keep: impl Fn(&K) -> bool) {
        self.averages.retain(|key, _| keep(key));
        self.weights.retain(|key, _| keep(key));
    }

    /// From a tenth of [`MOST`] to all of it.
    pub fn weight(&self, key: &K) -> u8 {
        self.weights.get(key).copied().unwrap_or(MOST)
    }

    fn wanted(&self) -> HashMap<K, u8> {
        let fastest = self.averages.values().copied().fold(f64::INFINITY, f64::min);
        let weight = |average: f64| (f64::from(MOST) * fastest / average).round();
        let weight = |average| (weight(average) as u8).clamp(LEAST, MOST);
        self.averages.iter().map(|(key, average)| (*key, weight(*average))).collect()
    }

    fn differs(&self) -> bool {
        self.wanted().iter().any(|(key, wanted)| {
            let now = f64::from(self.weight(key));
            (f64::from(*wanted) - now).abs() > now * TOLERANCE
        })
    }

    /// When the weights are to change, if anything is wrong with them.
    pub fn due(&self, now: Instant) -> Option<Instant> {
        self.differs().then(|| self.changed_at.map_or(now, |at| at + REST))
    }

    /// Takes over what is due. Returns whether weights are others than before.
    pub fn update(&mut self, now: Instant) -> bool {
        let due = self.due(now).is_some_and(|due| due <= now);
        if due {
            self.weights = self.wanted();
            self.changed_at = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn times(averages: &[(u8, u64)]) -> ResponseTimes<u8> {
        let mut times = ResponseTimes::default();
        averages.iter().for_each(|(key, time)| times.took(*key, ms(*time)));
        times
    }

    #[test]
    fn weights_are_relative_to_the_fastest_and_within_bounds() {
        let mut times = times(&[(1, 10), (2, 20), (3, 10_000), (4, 10)]);
        assert!(times.update(Instant::now()));
        assert_eq!([1, 2, 3, 4, 5].map(|key| times.weight(&key)), [100, 50, 10, 100, 100]);
    }

    #[test]
    fn what_is_faster_than_a_millisecond_is_alike() {
        let mut times = ResponseTimes::default();
        times.took(1u8, Duration::from_micros(50));
        times.took(2, Duration::from_micros(900));
        assert!(!times.update(Instant::now()));
    }

    #[test]
    fn small_changes_and_changes_too_soon_are_not_made() {
        let (mut times, t0) = (times(&[(1, 100), (2, 110)]), Instant::now());
        assert_eq!(times.due(t0), None);
        times.took(2, ms(300));
        assert_eq!(times.due(t0), Some(t0));
        assert!(times.update(t0) && !times.update(t0));
        assert_eq!(times.weight(&2), 63);
        for _ in 0..20 {
            times.took(2, ms(1000));
        }
        let soon = t0 + ms(4999);
        assert_eq!(times.due(soon), Some(t0 + REST));
        assert!(!times.update(soon) && times.update(t0 + REST));
        assert_eq!(times.weight(&2), 10);
    }

    #[test]
    fn one_slow_answer_counts_for_a_quarter() {
        let mut times = times(&[(1, 10), (2, 10)]);
        times.took(2, ms(50));
        times.update(Instant::now());
        assert_eq!(times.weight(&2), 50);
    }

    #[test]
    fn one_that_was_down_begins_anew() {
        let (mut times, t0) = (times(&[(1, 10), (2, 100)]), Instant::now());
        times.update(t0);
        times.forget(&2);
        assert_eq!((times.weight(&2), times.due(t0)), (100, None));
        times.took(2, ms(10));
        assert_eq!(times.due(t0), None);
        times.retain(|key| *key == 2);
        assert_eq!(times.wanted().len(), 1);
    }

    proptest! {
        #[test]
        fn after_a_change_nothing_is_due_until_times_change(times in prop::collection::vec(1u64..60_000, 1..20)) {
            let (mut of, now) = (ResponseTimes::default(), Instant::now());
            times.iter().enumerate().for_each(|(key, time)| of.took(key, ms(*time)));
            of.update(now);
            prop_assert_eq!(of.due(now + REST * 2), None);
            prop_assert!((0..times.len()).all(|key| (LEAST..=MOST).contains(&of.weight(&key))));
        }
    }
}
