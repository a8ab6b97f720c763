//! What a flow waited for and how long: the memory behind "the longest stall between these moments".

use std::time::{Duration, Instant};

/// Waits shorter than this are those of a quiet machine, and are not kept.
pub(super) const WORTH_KEEPING: Duration = Duration::from_millis(1);

/// A time without progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stall {
    pub start: Instant,
    pub duration: Duration,
}

impl Stall {
    pub(super) fn until(start: Instant, end: Instant) -> Self {
        Self { start, duration: end.saturating_duration_since(start) }
    }

    fn overlaps(&self, begin: Instant, end: Instant) -> bool {
        self.start <= end && self.start + self.duration >= begin
    }
}

/// The longest of the stalls that were under way at some moment from `begin` to `end`, with all of its length; zero
/// where none was.
pub(super) fn longest(stalls: impl IntoIterator<Item = Stall>, begin: Instant, end: Instant) -> Duration {
    let under_way = stalls.into_iter().filter(|stall| stall.overlaps(begin, end));
    under_way.map(|stall| stall.duration).max().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_counts_whole_for_every_window_that_it_touches() {
        let zero = Instant::now();
        let at = |ms| zero + Duration::from_millis(ms);
        let stalls = [Stall::until(at(100), at(300)), Stall::until(at(1000), at(1050))];
        let longest = |begin, end| longest(stalls, at(begin), at(end)).as_millis();
        assert_eq!(
            [longest(0, 99), longest(0, 100), longest(250, 1020), longest(301, 1020)],
            [0, 200, 200, 50]
        );
    }
}
