//! Shares that rise: a backend that comes up gets its part of the flows over a time. Knows no tables.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

use crate::config::model::{Curve, SlowStart};
use crate::tables::overlay::FULL;

/// Steps of a start. Each is a change of the tables.
const STEPS: u32 = 32;
const SHORTEST_STEP: Duration = Duration::from_secs(1);

fn step(start: SlowStart) -> Duration {
    (start.duration / STEPS).max(SHORTEST_STEP)
}

/// The share after a time, from 1 to [`FULL`]: that of the middle of the step.
pub fn share(start: SlowStart, elapsed: Duration) -> u16 {
    if elapsed >= start.duration {
        return FULL;
    }
    let step = step(start);
    let begun = elapsed.as_nanos() / step.as_nanos();
    let middle = (begun as f64 + 0.5) * step.as_secs_f64();
    let part = (middle / start.duration.as_secs_f64()).min(1.0);
    let part = match start.curve {
        Curve::Linear => part,
        Curve::Square => part * part,
    };
    ((part * f64::from(FULL)).ceil() as u16).clamp(1, FULL)
}

/// After which time the share is another; none where it is full.
fn next_step(start: SlowStart, elapsed: Duration) -> Option<Duration> {
    if elapsed >= start.duration {
        return None;
    }
    let step = step(start);
    let begun = u32::try_from(elapsed.as_nanos() / step.as_nanos()).unwrap_or(u32::MAX);
    Some(step.saturating_mul(begun.saturating_add(1)).min(start.duration))
}

/// Who is starting, and since when.
#[derive(Debug, Clone)]
pub struct Starts<K> {
    began: HashMap<K, Instant>,
}

impl<K> Default for Starts<K> {
    fn default() -> Self {
        Self { began: HashMap::new() }
    }
}

impl<K: Eq + Hash> Starts<K> {
    pub fn begin(&mut self, key: K, now: Instant) {
        self.began.insert(key, now);
    }

    pub fn forget(&mut self, key: &K) {
        self.began.remove(key);
    }

    pub fn is_empty(&self) -> bool {
        self.began.is_empty()
    }

    /// Ends the starts of those that are not wanted any more, or over.
    pub fn retain(&mut self, now: Instant, start: impl Fn(&K) -> Option<SlowStart>) {
        self.began.retain(|key, began| start(key).is_some_and(|start| now < *began + start.duration));
    }

    /// Of one that starts; nothing for others.
    pub fn share(&self, key: &K, start: SlowStart, now: Instant) -> Option<u16> {
        let began = self.began.get(key)?;
        Some(share(start, now.saturating_duration_since(*began))).filter(|share| *share < FULL)
    }

    /// When the next share of anybody changes.
    pub fn due(&self, now: Instant, start: impl Fn(&K) -> Option<SlowStart>) -> Option<Instant> {
        let next = |(key, began): (&K, &Instant)| {
            let elapsed = now.saturating_duration_since(*began);
            // One that is over is due at once, to be forgotten.
            Some(*began + start(key).and_then(|start| next_step(start, elapsed)).unwrap_or(elapsed))
        };
        self.began.iter().filter_map(next).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    fn start(duration: f64, curve: Curve) -> SlowStart {
        SlowStart { duration: seconds(duration), curve }
    }

    #[test]
    fn a_share_rises_in_a_line_or_slower_at_first() {
        let minute = |curve, at| share(start(64.0, curve), seconds(at));
        for (at, linear, square) in
            [(0.0, 4, 1), (16.0, 68, 19), (32.0, 132, 69), (63.9, 252, 249), (64.0, 256, 256)]
        {
            assert_eq!((minute(Curve::Linear, at), minute(Curve::Square, at)), (linear, square), "{at} s");
        }
    }

    #[test]
    fn a_start_has_at_most_32_steps_of_at_least_a_second() {
        for (duration, steps) in [(1.0, 1), (10.0, 10), (32.0, 32), (33.0, 32), (600.0, 32), (3600.0, 32)] {
            let start = start(duration, Curve::Linear);
            let (mut now, mut count) = (Duration::ZERO, 0);
            while let Some(next) = next_step(start, now) {
                assert!(next > now && (next - now >= SHORTEST_STEP || next == start.duration));
                assert_eq!(share(start, now), share(start, next - Duration::from_nanos(1)));
                (now, count) = (next, count + 1);
            }
            assert!(count == steps || count == steps + 1, "{duration} s: {count}");
            assert_eq!(now, start.duration);
        }
    }

    #[test]
    fn a_start_ends_and_is_forgotten() {
        let slow = start(4.0, Curve::Linear);
        let of = |_: &u8| Some(slow);
        let (mut starts, t0) = (Starts::default(), Instant::now());
        assert_eq!((starts.due(t0, of), starts.share(&1, slow, t0)), (None, None));
        starts.begin(1u8, t0);
        assert_eq!((starts.due(t0, of), starts.share(&1, slow, t0)), (Some(t0 + seconds(1.0)), Some(32)));
        let t3 = t0 + seconds(3.5);
        assert_eq!((starts.due(t3, of), starts.share(&1, slow, t3)), (Some(t0 + seconds(4.0)), Some(224)));
        let t4 = t0 + seconds(4.0);
        assert_eq!((starts.due(t4, of), starts.share(&1, slow, t4)), (Some(t4), None));
        starts.retain(t4, of);
        assert_eq!(starts.due(t4, of), None);
    }

    #[test]
    fn a_start_that_is_not_wanted_any_more_ends() {
        let (mut starts, t0) = (Starts::default(), Instant::now());
        starts.begin(1u8, t0);
        starts.begin(2u8, t0);
        starts.forget(&2);
        starts.retain(t0, |_| None);
        assert_eq!(starts.due(t0, |_| Some(start(4.0, Curve::Linear))), None);
    }

    proptest! {
        #[test]
        fn a_share_never_falls_and_never_is_nothing(
            (duration, square) in (1u64..3600, any::<bool>()),
            (a, b) in (0f64..1.1, 0f64..1.1),
        ) {
            let start = start(duration as f64, if square { Curve::Square } else { Curve::Linear });
            let at = |part: f64| share(start, seconds(part * duration as f64));
            prop_assert!((1..=FULL).contains(&at(a)));
            prop_assert!(at(a.min(b)) <= at(a.max(b)));
        }
    }
}
