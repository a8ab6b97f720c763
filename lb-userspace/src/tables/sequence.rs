//! The order in which backends take turns: smooth weighted round robin, laid out over a table.
//!
//! Each turn goes to the backend whose next one is due first, where the turns of a weight of w are due at (k + 1/2) / w: the
//! same evenness as adding weights up and taking the largest, in a time that does not grow with backends times slots. A
//! pure function of (keys, weights), whatever the order they are given in.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A backend that takes turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turns {
    /// Names the backend, the same on every balancer.
    pub key: u64,
    /// 0 takes none; at most [`MOST_WEIGHT`].
    pub weight: u32,
}

/// What a weight, its parts by slow start and by response time may come to.
pub const MOST_WEIGHT: u32 = 1 << 24;

/// Turns are counted in this unit; the last of the longest table fits 64 bits.
const UNIT_LOG2: u32 = 40;

/// The members' indices, turn by turn; empty where no member has weight.
pub fn build(length: usize, members: &[Turns]) -> Vec<u16> {
    let due = |turn: u64, weight: u32| (((2 * turn + 1) << UNIT_LOG2) / u64::from(weight), turn + 1);
    let takers = members.iter().enumerate().filter(|(_, member)| member.weight > 0);
    let first = takers.map(|(index, member)| {
        let (at, next) = due(0, member.weight.min(MOST_WEIGHT));
        Reverse((at, member.key, index as u16, next))
    });
    let mut waiting: BinaryHeap<_> = first.collect();
    let mut table = Vec::with_capacity(length);
    while table.len() < length {
        let Some(mut first) = waiting.peek_mut() else { return Vec::new() };
        let Reverse((_, key, index, turn)) = *first;
        table.push(index);
        let (at, next) = due(turn, members[usize::from(index)].weight.min(MOST_WEIGHT));
        *first = Reverse((at, key, index, next));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn members(weights: &[u32]) -> Vec<Turns> {
        // Keys that do not follow the order.
        let key = |index: usize| (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        weights.iter().enumerate().map(|(index, &weight)| Turns { key: key(index), weight }).collect()
    }

    #[test]
    fn equal_weights_take_strict_turns() {
        let table = build(4096, &members(&[7, 7, 7]));
        let (turn, _) = table.split_at(3);
        assert_eq!(turn.iter().collect::<std::collections::BTreeSet<_>>().len(), 3);
        assert!(table.chunks(3).all(|chunk| turn.starts_with(chunk)));
    }

    #[test]
    fn heavy_backends_do_not_take_their_turns_in_a_row() {
        let table = build(4096, &members(&[5, 1, 1]));
        let longest = table.chunk_by(|a, b| a == b).map(<[u16]>::len).max();
        // Between two turns of the light ones, at the most.
        assert!(longest <= Some(5), "{longest:?}");
        let table = build(4096, &members(&[2, 1]));
        assert!(table.chunks_exact(3).all(|chunk| chunk.iter().filter(|index| **index == 0).count() == 2));
    }

    #[test]
    fn nobody_with_weight_takes_no_turn() {
        assert!(build(4096, &[]).is_empty() && build(4096, &members(&[0, 0])).is_empty());
    }

    #[test]
    fn the_longest_table_of_the_lightest_weight_is_laid_out() {
        assert!(build(1 << 20, &members(&[1])).iter().all(|index| *index == 0));
        assert_eq!(build(1 << 20, &members(&[MOST_WEIGHT, 1])).len(), 1 << 20);
    }

    proptest! {
        #[test]
        fn at_any_time_everybody_has_had_its_turns(
            weights in prop::collection::vec(0u32..=100, 1..30),
            length in 1usize..2000,
        ) {
            let sum: u32 = weights.iter().sum();
            let table = build(length, &members(&weights));
            prop_assert_eq!(table.len(), if sum > 0 { length } else { 0 });
            let mut turns = vec![0f64; weights.len()];
            for (time, index) in table.iter().enumerate() {
                turns[usize::from(*index)] += 1.0;
                for (had, weight) in turns.iter().zip(&weights) {
                    let ideal = (time + 1) as f64 * f64::from(*weight) / f64::from(sum.max(1));
                    prop_assert!((had - ideal).abs() <= 1.0 + weights.len() as f64 / 2.0 * f64::from(*weight) / f64::from(sum.max(1)) + 1e-9);
                }
            }
        }

        #[test]
        fn the_order_of_members_does_not_matter(weights in prop::collection::vec(0u32..=100, 1..30), turn in 0usize..30) {
            let ordered = members(&weights);
            let mut turned = ordered.clone();
            turned.rotate_left(turn % weights.len());
            let keys = |of: &[Turns]| -> Vec<u64> {
                build(500, of).iter().map(|&index| of[usize::from(index)].key).collect()
            };
            prop_assert_eq!(keys(&ordered), keys(&turned));
        }
    }
}
