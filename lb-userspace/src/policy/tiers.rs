//! Which of several pools takes the packets of one: itself, or one of its fallbacks. Knows nothing but how many of each are
//! up.
//!
//! A pool is left as soon as it has too few; one that was left is taken again only after it has had enough for a while, so
//! that a pool that flaps does not take all flows with it each time.

use std::time::Instant;

use crate::config::model::Tiers;

/// Backends of a pool that may take flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Level {
    pub up: usize,
    /// With weight, and not drained.
    pub all: usize,
}

/// How well a level can take the packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Nobody,
    TooFew,
    Enough,
}

/// Of the level at a place. A fallback that has fewer backends than are asked for needs all that it has.
fn rank(place: usize, level: Level, tiers: &Tiers) -> Rank {
    let most = if place == 0 { usize::MAX } else { level.all };
    match level.up {
        0 => Rank::Nobody,
        up if up < tiers.min_healthy.of(level.all).min(most) => Rank::TooFew,
        _ => Rank::Enough,
    }
}

fn ranks(levels: &[Level], tiers: &Tiers) -> Vec<Rank> {
    levels.iter().enumerate().map(|(place, level)| rank(place, *level, tiers)).collect()
}

/// Whether so few of a level are up that its health is not to be believed.
pub fn panics(level: Level, tiers: &Tiers) -> bool {
    level.up * 100 < usize::from(tiers.panic) * level.all
}

/// The choice among a pool (level 0) and its fallbacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// None before anything is known.
    level: Option<usize>,
    /// Of each level: since when it has enough up.
    enough_since: Vec<Option<Instant>>,
    /// Of each level: whether it was left, or passed over, for having too few.
    left: Vec<bool>,
}

impl Choice {
    /// Nothing is known of any of `levels` pools.
    pub fn new(levels: usize) -> Self {
        Self { level: None, enough_since: vec![None; levels], left: vec![false; levels] }
    }

    /// A level that was in use before this agent began: those before it had been left.
    pub fn adopted(levels: usize, level: usize) -> Self {
        let left = (0..levels).map(|index| index < level).collect();
        Self { level: Some(level), left, ..Self::new(levels) }
    }

    pub fn level(&self) -> usize {
        self.level.unwrap_or(0)
    }

    /// Takes in what is up now.
    pub fn observe(&mut self, now: Instant, levels: &[Level], tiers: &Tiers) {
        let ranks = ranks(levels, tiers);
        for (since, rank) in self.enough_since.iter_mut().zip(&ranks) {
            *since = if *rank == Rank::Enough { since.or(Some(now)) } else { None };
        }
        let best = ranks.iter().copied().max().unwrap_or(Rank::Nobody);
        let first = |rank: Rank| ranks.iter().position(|other| *other == rank).unwrap_or(0);
        let before = self.level;
        let next = match before {
            Some(level) if ranks.get(level) == Some(&best) && best == Rank::Enough => {
                (0..level).find(|&better| self.may_return(now, better, tiers)).unwrap_or(level)
            }
            // Between levels that have too few there is nothing to wait for but the next change.
            Some(level) if ranks.get(level) == Some(&best) && best == Rank::TooFew => level,
            _ => first(best),
        };
        if let Some(level) = before.filter(|level| *level < next) {
            self.left[level..next].fill(true);
        }
        self.level = Some(next);
    }

    fn may_return(&self, now: Instant, level: usize, tiers: &Tiers) -> bool {
        self.return_at(level, tiers).is_some_and(|at| at <= now)
    }

    fn return_at(&self, level: usize, tiers: &Tiers) -> Option<Instant> {
        let since = self.enough_since[level]?;
        Some(if self.left[level] { since + tiers.failback_hold } else { since })
    }

    /// When a better level may be taken again if it goes on as it does.
    pub fn due(&self, tiers: &Tiers) -> Option<Instant> {
        (0..self.level()).filter_map(|level| self.return_at(level, tiers)).min()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::model::AtLeast;
    use proptest::prelude::*;

    const HOLD: Duration = Duration::from_secs(60);

    fn tiers(min_healthy: AtLeast, panic: u8) -> Tiers {
        Tiers { fallback: Vec::new(), min_healthy, panic, failback_hold: HOLD }
    }

    fn levels(up: &[usize]) -> Vec<Level> {
        up.iter().map(|&up| Level { up, all: 4 }).collect()
    }

    /// What is up from a second on -> the level from then on.
    type Story = &'static [(u64, &'static [usize], usize)];

    fn told(name: &str, min_healthy: u32, mut choice: Choice, story: Story) {
        let (tiers, begin) = (tiers(AtLeast::Count(min_healthy), 0), Instant::now());
        for (second, up, expected) in story {
            choice.observe(begin + Duration::from_secs(*second), &levels(up), &tiers);
            assert_eq!(choice.level(), *expected, "{name}: after {second} s, with {up:?} up");
        }
    }

    #[test]
    fn a_level_is_left_at_once_and_taken_again_after_the_hold() {
        let stories: &[(&str, u32, Story)] = &[
            ("all is well", 1, &[(0, &[4, 4], 0), (100, &[1, 4], 0)]),
            ("the pool fails", 1, &[(0, &[4, 4], 0), (1, &[0, 4], 1)]),
            ("too few", 2, &[(0, &[2, 4], 0), (1, &[1, 4], 1)]),
            (
                "it returns",
                1,
                &[(0, &[4, 4], 0), (1, &[0, 4], 1), (5, &[4, 4], 1), (64, &[4, 4], 1), (65, &[4, 4], 0)],
            ),
            (
                "it flaps",
                1,
                &[
                    (0, &[4, 4], 0),
                    (1, &[0, 4], 1),
                    (5, &[4, 4], 1),
                    (50, &[0, 4], 1),
                    (51, &[4, 4], 1),
                    (110, &[4, 4], 1),
                    (111, &[4, 4], 0),
                ],
            ),
            (
                "the fallback fails before the hold is over",
                1,
                &[(0, &[4, 4], 0), (1, &[0, 4], 1), (5, &[4, 4], 1), (6, &[4, 0], 0)],
            ),
            (
                "past a fallback that is down",
                1,
                &[(0, &[4, 0, 4], 0), (1, &[0, 0, 4], 2), (2, &[0, 4, 4], 2), (62, &[0, 4, 4], 1)],
            ),
            (
                "a fallback in between that had been left waits, too",
                1,
                &[(0, &[0, 4, 4], 1), (1, &[0, 0, 4], 2), (2, &[0, 4, 4], 2), (62, &[0, 4, 4], 1)],
            ),
            (
                "nobody has enough",
                2,
                &[(0, &[4, 4], 0), (1, &[1, 1], 0), (2, &[0, 1], 1), (3, &[1, 1], 1), (4, &[2, 1], 0)],
            ),
            ("nobody at all, then the fallback", 1, &[(0, &[4, 4], 0), (1, &[0, 0], 0), (2, &[0, 1], 1)]),
            (
                "a pool that comes late is taken as soon as it is there",
                1,
                &[(0, &[0, 4], 1), (3, &[2, 4], 0)],
            ),
        ];
        for (name, min_healthy, story) in stories {
            told(name, *min_healthy, Choice::new(story[0].1.len()), story);
        }
    }

    #[test]
    fn a_level_that_was_adopted_is_kept_for_the_hold() {
        told("restart", 1, Choice::adopted(2, 1), &[(0, &[4, 4], 1), (59, &[4, 4], 1), (60, &[4, 4], 0)]);
        told("restart while it fails", 1, Choice::adopted(2, 1), &[(0, &[4, 0], 0)]);
        told("restart on the pool itself", 1, Choice::adopted(2, 0), &[(0, &[4, 4], 0)]);
    }

    #[test]
    fn the_end_of_the_hold_is_known_before() {
        let (tiers, t0) = (tiers(AtLeast::Count(1), 0), Instant::now());
        let mut choice = Choice::new(2);
        let mut told = |now, up: &[usize]| {
            choice.observe(now, &levels(up), &tiers);
            (choice.level(), choice.due(&tiers))
        };
        assert_eq!(told(t0, &[4, 4]), (0, None));
        assert_eq!(told(t0, &[0, 4]), (1, None));
        assert_eq!(told(t0, &[1, 4]), (1, Some(t0 + HOLD)));
        assert_eq!(told(t0 + HOLD, &[1, 4]), (0, None));
    }

    #[test]
    fn panic_is_for_fewer_than_the_percentage() {
        for (name, up, all, percent, expected) in [
            ("off", 0, 10, 0, false),
            ("fewer", 1, 10, 20, true),
            ("just enough", 2, 10, 20, false),
            ("nobody", 0, 10, 20, true),
            ("no backends", 0, 0, 20, false),
            ("all are wanted", 9, 10, 100, true),
        ] {
            let tiers = tiers(AtLeast::Count(1), percent);
            assert_eq!(panics(Level { up, all }, &tiers), expected, "{name}");
        }
    }

    #[test]
    fn a_small_fallback_needs_all_its_backends_and_no_more() {
        let tiers = tiers(AtLeast::Count(3), 0);
        let rank = |place, up, all| rank(place, Level { up, all }, &tiers);
        assert_eq!((rank(1, 2, 2), rank(1, 1, 2)), (Rank::Enough, Rank::TooFew));
        assert_eq!((rank(0, 2, 2), rank(0, 0, 0), rank(1, 0, 0)), (Rank::TooFew, Rank::Nobody, Rank::Nobody));
    }

    #[test]
    fn a_percentage_of_backends_is_rounded_up() {
        let tiers = tiers(AtLeast::Percent(50), 0);
        let enough = |up, all| rank(0, Level { up, all }, &tiers) == Rank::Enough;
        assert!(
            enough(2, 4) && !enough(1, 4) && enough(2, 3) && !enough(1, 3) && enough(1, 1) && !enough(0, 0)
        );
    }

    proptest! {
        #[test]
        fn the_level_in_use_is_never_worse_than_another(
            steps in prop::collection::vec((0u64..40, prop::collection::vec(0usize..=4, 3)), 1..30),
            least in 1u32..=4,
        ) {
            let tiers = tiers(AtLeast::Count(least), 0);
            let (mut choice, mut now) = (Choice::new(3), Instant::now());
            for (wait, up) in steps {
                now += Duration::from_secs(wait);
                let levels = levels(&up);
                choice.observe(now, &levels, &tiers);
                let ranks = ranks(&levels, &tiers);
                prop_assert_eq!(ranks.get(choice.level()), ranks.iter().max());
                // What is due is in the future, and then it happens.
                if let Some(at) = choice.due(&tiers) {
                    prop_assert!(at > now);
                    let mut later = choice.clone();
                    later.observe(at, &levels, &tiers);
                    prop_assert!(later.level() < choice.level());
                }
            }
        }
    }
}
