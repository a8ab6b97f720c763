//! Health as an overlay on a base table: a slot whose backend is down walks to one that is up.
//!
//! Slots of living backends never move, so losing one of n moves exactly its own slots, and healing
//! it brings exactly those back. A pure function of (base, weights, who is up): balancers that see
//! the same health agree.

use super::maglev::Member;

/// Where a slot goes that has nobody.
pub const NOBODY: u16 = u16::MAX;

/// How much more than its weighted share of what lives a backend takes over: 5/4.
const CAP_NUMERATOR: u64 = 5;
const CAP_DENOMINATOR: u64 = 4;

/// Tries before a slot stops rolling dice and takes the next backend with room.
const ROLLS: u32 = 64;

/// The table with every slot of a dead backend given to a living one. With nobody up, or an empty
/// base, every slot goes to `NOBODY`.
pub fn apply(base: &[u16], length: usize, members: &[Member], up: &[bool]) -> Vec<u16> {
    let weight = |index: usize| u64::from(members[index].weight);
    let lives = |index: usize| up[index] && weight(index) > 0;
    let living_weight: u64 = (0..members.len()).filter(|&i| lives(i)).map(weight).sum();
    if living_weight == 0 || base.is_empty() {
        return vec![NOBODY; length];
    }
    let mut room: Vec<i64> = (0..members.len())
        .map(|i| if lives(i) { cap(length as u64, weight(i), living_weight) } else { 0 })
        .collect();
    // By key: the order of the configuration must not matter.
    let mut ranks: Vec<u16> = (0..members.len() as u16).collect();
    ranks.sort_unstable_by_key(|&index| members[usize::from(index)].key);
    for &index in base {
        room[usize::from(index)] -= 1;
    }
    let mut table = base.to_vec();
    for (slot, index) in table.iter_mut().enumerate() {
        if !lives(usize::from(*index)) {
            *index = heir(base, slot, &ranks, &room, lives);
            room[usize::from(*index)] -= 1;
        }
    }
    table
}

/// Most slots that a backend of this weight may hold.
fn cap(length: u64, weight: u64, living_weight: u64) -> i64 {
    (length * weight * CAP_NUMERATOR).div_ceil(living_weight * CAP_DENOMINATOR) as i64
}

/// Who takes over a slot. Rolling on the base table gives each backend chances by its weight.
fn heir(base: &[u16], slot: usize, ranks: &[u16], room: &[i64], lives: impl Fn(usize) -> bool) -> u16 {
    for roll in 0..ROLLS {
        let candidate = base[dice(slot as u64, roll) as usize & (base.len() - 1)];
        if lives(usize::from(candidate)) && room[usize::from(candidate)] > 0 {
            return candidate;
        }
    }
    // Few of many are up. The caps add up to more than the table, so somebody has room.
    let start = dice(slot as u64, ROLLS) as usize % ranks.len();
    let (before, after) = ranks.split_at(start);
    let mut round = after.iter().chain(before).copied();
    round.find(|&index| lives(usize::from(index)) && room[usize::from(index)] > 0).unwrap_or(NOBODY)
}

/// A well-mixed number for a slot and a roll (SplitMix64's finaliser).
fn dice(slot: u64, roll: u32) -> u32 {
    let mut z = (slot << 32 | u64::from(roll)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables::maglev::{build, log2_length};
    use proptest::prelude::*;

    fn members(weights: &[u8]) -> Vec<Member> {
        let address = |i: usize| std::net::Ipv4Addr::from(0x0a00_0100 + i as u32).into();
        weights.iter().enumerate().map(|(i, &weight)| Member::new(7, address(i), weight)).collect()
    }

    fn base(members: &[Member]) -> Vec<u16> {
        build(log2_length(members.len()), members)
    }

    #[test]
    fn losing_one_of_n_moves_only_its_slots_and_healing_brings_them_back() {
        for n in [2, 3, 10, 41] {
            let weights = vec![100; n];
            let members = members(&weights);
            let base = base(&members);
            for dead in 0..n {
                let mut up = vec![true; n];
                up[dead] = false;
                let table = apply(&base, base.len(), &members, &up);
                for (before, after) in base.iter().zip(&table) {
                    assert_ne!(usize::from(*after), dead);
                    if usize::from(*before) != dead {
                        assert_eq!(before, after);
                    }
                }
                assert_eq!(apply(&base, base.len(), &members, &vec![true; n]), base);
            }
        }
    }

    #[test]
    fn nobody_up_leaves_nobody() {
        let weights = [100, 100];
        let members = members(&weights);
        let base = base(&members);
        assert!(apply(&base, base.len(), &members, &[false, false]).iter().all(|&i| i == NOBODY));
        assert!(apply(&[], 4096, &[], &[]).iter().all(|&i| i == NOBODY));
    }

    #[test]
    fn one_of_many_up_takes_everything() {
        let weights = vec![100; 200];
        let members = members(&weights);
        let base = base(&members);
        let mut up = vec![false; 200];
        up[17] = true;
        assert!(apply(&base, base.len(), &members, &up).iter().all(|&i| i == 17));
    }

    #[test]
    fn the_order_of_members_does_not_matter_when_few_of_many_are_up() {
        let weights = vec![100; 200];
        let ordered = members(&weights);
        let turned: Vec<Member> = ordered.iter().rev().copied().collect();
        let mut up = vec![false; 200];
        (up[17], up[170]) = (true, true);
        let up_turned: Vec<bool> = up.iter().rev().copied().collect();
        let keys = |of: &[Member], up: &[bool]| -> Vec<u64> {
            let base = base(of);
            apply(&base, base.len(), of, up).iter().map(|&index| of[usize::from(index)].key).collect()
        };
        assert_eq!(keys(&ordered, &up), keys(&turned, &up_turned));
    }

    proptest! {
        #[test]
        fn every_slot_is_with_the_living_and_nobody_is_over_its_cap(
            parts in prop::collection::vec((0u8..=100, any::<bool>()), 1..60),
        ) {
            let weights: Vec<u8> = parts.iter().map(|m| m.0).collect();
            let up: Vec<bool> = parts.iter().map(|m| m.1).collect();
            let members = members(&weights);
            let base = base(&members);
            let length = 1 << log2_length(weights.len());
            let table = apply(&base, length, &members, &up);
            let living: u64 = weights.iter().zip(&up).filter(|(_, up)| **up).map(|(w, _)| u64::from(*w)).sum();
            prop_assert_eq!(table.len(), length);
            let mut counts = vec![0i64; weights.len()];
            for &index in &table {
                if living == 0 {
                    prop_assert_eq!(index, NOBODY);
                } else {
                    prop_assert!(up[usize::from(index)] && weights[usize::from(index)] > 0);
                    counts[usize::from(index)] += 1;
                }
            }
            if living > 0 {
                for (count, &weight) in counts.iter().zip(&weights) {
                    // Its own share of the base may round up by one on a small table.
                    prop_assert!(*count <= cap(length as u64, u64::from(weight), living).max(1));
                }
            }
        }
    }
}
