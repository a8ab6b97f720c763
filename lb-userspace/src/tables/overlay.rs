//! Health, drains and slow starts as an overlay on a base table: a slot whose backend does not take it walks to one that does.
//!
//! Slots of backends with a full share never move, so losing one of n moves exactly its own slots, and healing
//! it brings exactly those back. A share that grows brings slots back, one that shrinks gives slots away, and while nobody
//! has taken over as much as it may, nothing else moves. A pure function of (base, weights, shares): balancers that see the same agree.

use std::cell::LazyCell;
use std::ops::Deref;
use std::sync::Arc;

use super::maglev::Member;

/// Where a slot goes that has nobody.
pub const NOBODY: u16 = u16::MAX;

/// The share of a backend that takes all slots that are its own. One that is down, or drained, has none.
pub const FULL: u16 = 256;

/// How much more than its weighted share of what lives a backend takes over: 5/4.
const CAP_NUMERATOR: u64 = 5;
const CAP_DENOMINATOR: u64 = 4;

/// Tries before a slot stops rolling dice and takes the next backend with room.
const ROLLS: u32 = 64;

/// The number of the first roll that says whether a backend with a part of its share takes a slot: apart from those that
/// say who is asked.
const KEEPS: u32 = 1 << 16;

/// The table with every slot that its backend does not take given to another; nothing where each takes its own. `shares`
/// has a part of [`FULL`] for each member, and counts relative to the largest: where nobody is at full share, nobody is
/// spared. With nobody left every slot goes to `NOBODY`.
pub fn apply(base: &[u16], members: &[Member], shares: &[u16]) -> Option<Arc<[u16]>> {
    let Some(moved) = moved(base, &counts(base, members.len()), members, shares) else {
        return Some(vec![NOBODY; base.len()].into());
    };
    let mut table: Arc<[u16]> = (!moved.is_empty()).then(|| base.into())?;
    let slots = Arc::make_mut(&mut table);
    moved.into_iter().for_each(|(slot, heir)| slots[slot as usize] = heir);
    Some(table)
}

/// How many slots of a table each member has.
pub fn counts(base: &[u16], members: usize) -> Vec<u32> {
    let mut counts = vec![0; members];
    base.iter().for_each(|&index| counts[usize::from(index)] += 1);
    counts
}

/// Slots whose backend does not take them, in their order, and who does; nothing where nobody takes any. `counts` is what [`counts`] says
/// of the base.
pub fn moved(base: &[u16], counts: &[u32], members: &[Member], shares: &[u16]) -> Option<Vec<(u32, u16)>> {
    let takers = Takers::new(members, shares)?;
    if takers.all_take_all(members) {
        return Some(Vec::new());
    }
    // Who takes all takes what is its own; of the others, the slots are looked at.
    let room = |(index, &count): (usize, &u32)| {
        let own = if takers.shares[index] >= FULL { i64::from(count) } else { 0 };
        takers.cap(base.len(), index) - own
    };
    let mut room: Vec<i64> = counts.iter().take(members.len()).enumerate().map(room).collect();
    let mut left = Vec::new();
    for slot in takers.looked_at(base) {
        let index = base[slot];
        if takers.keeps(slot, index) {
            room[usize::from(index)] -= 1;
        } else {
            left.push(slot);
        }
    }
    // By key: the order of the configuration must not matter.
    let ranks = LazyCell::new(|| {
        let mut ranks: Vec<u16> = (0..members.len() as u16).collect();
        ranks.sort_unstable_by_key(|&index| members[usize::from(index)].key);
        ranks
    });
    let give = |slot: usize| {
        let heir = heir(base, slot, &ranks, &room, &takers);
        if let Some(room) = room.get_mut(usize::from(heir)) {
            *room -= 1;
        }
        (slot as u32, heir)
    };
    Some(left.into_iter().map(give).collect())
}

/// Backends that take slots, and how many.
struct Takers {
    /// Part of [`FULL`]; 0 without weight.
    shares: Vec<u16>,
    /// Weight by share.
    weights: Vec<u64>,
    sum: u64,
}

impl Takers {
    /// `None` where nobody takes any.
    fn new(members: &[Member], shares: &[u16]) -> Option<Self> {
        let share = |(member, &share): (&Member, &u16)| if member.weight > 0 { share.min(FULL) } else { 0 };
        let shares: Vec<u16> = members.iter().zip(shares).map(share).collect();
        let largest = u32::from(*shares.iter().max().filter(|largest| **largest > 0)?);
        let relative = |share: u16| (u32::from(share) * u32::from(FULL)).div_ceil(largest) as u16;
        let shares: Vec<u16> = shares.into_iter().map(relative).collect();
        let weight = |(member, &share): (&Member, &u16)| u64::from(member.weight) * u64::from(share);
        let weights: Vec<u64> = members.iter().zip(&shares).map(weight).collect();
        let sum = weights.iter().sum();
        Some(Self { shares, weights, sum })
    }

    /// Whether a backend takes a slot for which these dice fall.
    fn takes(&self, index: u16, dice: impl FnOnce() -> u32) -> bool {
        match self.shares[usize::from(index)] {
            0 => false,
            FULL.. => true,
            share => dice() & 0xff < u32::from(share),
        }
    }

    /// Whether a backend takes a slot that is its own.
    fn keeps(&self, slot: usize, index: u16) -> bool {
        self.takes(index, || dice(slot as u64, KEEPS))
    }

    /// Slots of those that do not take all that is their own.
    fn looked_at(&self, base: &[u16]) -> Vec<usize> {
        let mut part = [false; 1 << 16];
        part.iter_mut().zip(&self.shares).for_each(|(part, share)| *part = *share < FULL);
        // Of most stretches there is none.
        const STRETCH: usize = 32;
        let mut slots = Vec::new();
        for (number, stretch) in base.chunks(STRETCH).enumerate() {
            if stretch.iter().fold(false, |any, &index| any | part[usize::from(index)]) {
                let of_it = (number * STRETCH..).zip(stretch);
                slots.extend(of_it.filter(|(_, index)| part[usize::from(**index)]).map(|(slot, _)| slot));
            }
        }
        slots
    }

    /// Whether no slot changes hands.
    fn all_take_all(&self, members: &[Member]) -> bool {
        members.iter().zip(&self.shares).all(|(member, share)| member.weight == 0 || *share >= FULL)
    }

    fn lives(&self, index: u16) -> bool {
        self.shares[usize::from(index)] > 0
    }

    /// Most slots that a backend takes over.
    fn cap(&self, length: usize, index: usize) -> i64 {
        (length as u64 * self.weights[index] * CAP_NUMERATOR).div_ceil(self.sum * CAP_DENOMINATOR) as i64
    }
}

/// Who takes over a slot. Rolling on the base table gives each backend chances by its weight.
fn heir(
    base: &[u16],
    slot: usize,
    ranks: &impl Deref<Target = Vec<u16>>,
    room: &[i64],
    takers: &Takers,
) -> u16 {
    let has_room = |index: u16| room[usize::from(index)] > 0;
    for roll in 0..ROLLS {
        let candidate = base[dice(slot as u64, roll) as usize & (base.len() - 1)];
        let other = candidate != base[slot];
        let takes = || takers.takes(candidate, || dice(slot as u64, KEEPS + 1 + roll));
        if other && has_room(candidate) && takes() {
            return candidate;
        }
    }
    // Few of many are up. The caps add up to more than the table, so somebody has room.
    let start = dice(slot as u64, ROLLS) as usize % ranks.len();
    let (before, after) = ranks.split_at(start);
    let mut round = after.iter().chain(before).copied();
    round.find(|&index| takers.lives(index) && has_room(index)).unwrap_or(NOBODY)
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
    use lb_common::flow::fingerprint;
    use proptest::prelude::*;

    fn members(weights: &[u8]) -> Vec<Member> {
        let address = |i: usize| std::net::Ipv4Addr::from(0x0a00_0100 + i as u32).into();
        weights.iter().enumerate().map(|(i, &weight)| Member::new(7, address(i), weight)).collect()
    }

    /// With the table as it is where nothing changes hands, and one of that length where there is none.
    fn apply(base: &[u16], length: usize, members: &[Member], shares: &[u16]) -> Vec<u16> {
        if base.is_empty() {
            return vec![NOBODY; length];
        }
        super::apply(base, members, shares).map_or_else(|| base.to_vec(), |table| table.to_vec())
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
                let mut shares = vec![FULL; n];
                shares[dead] = 0;
                let table = apply(&base, base.len(), &members, &shares);
                for (before, after) in base.iter().zip(&table) {
                    assert_ne!(usize::from(*after), dead);
                    if usize::from(*before) != dead {
                        assert_eq!(before, after);
                    }
                }
                assert_eq!(apply(&base, base.len(), &members, &vec![FULL; n]), base);
            }
        }
    }

    #[test]
    fn nobody_up_leaves_nobody() {
        let weights = [100, 100];
        let members = members(&weights);
        let base = base(&members);
        assert!(apply(&base, base.len(), &members, &[0, 0]).iter().all(|&i| i == NOBODY));
        assert!(apply(&[], 4096, &[], &[]).iter().all(|&i| i == NOBODY));
    }

    #[test]
    fn one_of_many_up_takes_everything() {
        let weights = vec![100; 200];
        let members = members(&weights);
        let base = base(&members);
        let mut shares = vec![0; 200];
        shares[17] = FULL;
        assert!(apply(&base, base.len(), &members, &shares).iter().all(|&i| i == 17));
    }

    #[test]
    fn the_order_of_members_does_not_matter_when_few_of_many_are_up() {
        let weights = vec![100; 200];
        let ordered = members(&weights);
        let turned: Vec<Member> = ordered.iter().rev().copied().collect();
        let mut shares = vec![0; 200];
        (shares[17], shares[170]) = (FULL, FULL);
        let shares_turned: Vec<u16> = shares.iter().rev().copied().collect();
        let keys = |of: &[Member], shares: &[u16]| -> Vec<u64> {
            let base = base(of);
            apply(&base, base.len(), of, shares).iter().map(|&index| of[usize::from(index)].key).collect()
        };
        assert_eq!(keys(&ordered, &shares), keys(&turned, &shares_turned));
    }

    /// Whether some backend has taken over as much as it may: then others are asked, and slots of more than one move.
    fn crowded(table: &[u16], members: &[Member], shares: &[u16]) -> bool {
        let Some(takers) = Takers::new(members, shares) else { return false };
        (0..members.len()).any(|index| count(table, index) >= takers.cap(table.len(), index))
    }

    fn count(table: &[u16], index: usize) -> i64 {
        table.iter().filter(|&&holder| usize::from(holder) == index).count() as i64
    }

    #[test]
    fn a_backend_with_a_part_of_its_share_holds_that_part_of_its_slots() {
        let members = members(&[100; 10]);
        let base = base(&members);
        for share in [1, 8, 64, 128, 200, 255] {
            let mut shares = vec![FULL; 10];
            shares[3] = share;
            let held = count(&apply(&base, base.len(), &members, &shares), 3) as f64;
            let ideal = count(&base, 3) as f64 * f64::from(share) / f64::from(FULL);
            // Five standard deviations of a binomial share.
            let slack = 5.0 * (ideal * (1.0 - f64::from(share) / f64::from(FULL))).sqrt() + 1.0;
            assert!((held - ideal).abs() <= slack, "share {share}: {held} for {ideal}");
        }
    }

    #[test]
    fn where_all_start_alike_nobody_is_spared() {
        let members = members(&[100, 50, 100]);
        let base = base(&members);
        assert_eq!(apply(&base, base.len(), &members, &[5, 5, 5]), base);
        let halves = apply(&base, base.len(), &members, &[FULL / 2, FULL / 4, FULL / 2]);
        assert_eq!(halves, apply(&base, base.len(), &members, &[FULL, FULL / 2, FULL]));
    }

    /// Two builds, or two balancers, agree on these or they do not agree at all.
    #[test]
    fn golden_vectors_of_the_overlay() {
        let digest = |weights: &[u8], shares: &[u16]| {
            let members = members(weights);
            let base = base(&members);
            let table = apply(&base, base.len(), &members, shares);
            fingerprint(0, &table.iter().flat_map(|i| i.to_le_bytes()).collect::<Vec<u8>>())
        };
        let rows = [
            digest(&[100, 100, 100], &[FULL, 0, FULL]),
            digest(&[100, 50, 1], &[0, FULL, FULL]),
            digest(&[100; 41], &[[0; 20].as_slice(), &[FULL; 21]].concat()),
            digest(&[100, 100, 100], &[FULL, 16, FULL]),
        ];
        assert!(rows == GOLDEN, "{rows:#018x?}");
    }

    const GOLDEN: [u64; 4] =
        [0x913d_54c1_c0cb_419e, 0x69b7_b2d1_77f9_60e6, 0x9a81_ca17_d139_376c, 0x1a59_aea2_af1c_7a7a];

    proptest! {
        #[test]
        fn every_slot_is_with_the_living_and_nobody_is_over_its_cap(
            parts in prop::collection::vec((0u8..=100, prop_oneof![Just(0), Just(FULL), 0u16..=FULL]), 1..60),
        ) {
            let weights: Vec<u8> = parts.iter().map(|m| m.0).collect();
            let shares: Vec<u16> = parts.iter().map(|m| m.1).collect();
            let members = members(&weights);
            let base = base(&members);
            let length = 1 << log2_length(weights.len());
            let table = apply(&base, length, &members, &shares);
            let takers = Takers::new(&members, &shares);
            prop_assert_eq!(table.len(), length);
            for &index in &table {
                match &takers {
                    None => prop_assert_eq!(index, NOBODY),
                    Some(takers) => prop_assert!(takers.lives(index)),
                }
            }
            if let Some(takers) = takers {
                let (mut held, mut kept) = (vec![0; weights.len()], vec![0; weights.len()]);
                for (before, now) in base.iter().zip(&table) {
                    held[usize::from(*now)] += 1;
                    kept[usize::from(*now)] += i64::from(before == now);
                }
                for (index, (held, kept)) in held.into_iter().zip(kept).enumerate() {
                    // What it keeps of its own may be more on a small table.
                    prop_assert!(held <= takers.cap(length, index).max(kept).max(1));
                }
            }
        }

        #[test]
        fn slots_of_backends_with_a_full_share_never_move(
            parts in prop::collection::vec((1u8..=100, prop_oneof![Just(FULL), 0u16..=FULL]), 2..40),
        ) {
            let weights: Vec<u8> = parts.iter().map(|m| m.0).collect();
            let shares: Vec<u16> = parts.iter().map(|m| m.1).collect();
            let members = members(&weights);
            let base = base(&members);
            let table = apply(&base, base.len(), &members, &shares);
            for (before, after) in base.iter().zip(&table) {
                if shares[usize::from(*before)] == FULL {
                    prop_assert_eq!(before, after);
                }
            }
        }

        #[test]
        fn a_share_that_grows_only_brings_slots_back(
            parts in prop::collection::vec((1u8..=100, any::<bool>()), 2..40),
            (less, more) in (0u16..=FULL, 0u16..=FULL).prop_map(|(a, b)| (a.min(b), a.max(b))),
            who in any::<prop::sample::Index>(),
        ) {
            let who = who.index(parts.len());
            let weights: Vec<u8> = parts.iter().map(|m| m.0).collect();
            // Somebody else is at full share, others are down.
            let full = |index: usize| parts[index].1 || index == (who + 1) % parts.len();
            let shares = |share| -> Vec<u16> {
                (0..parts.len()).map(|i| if i == who { share } else if full(i) { FULL } else { 0 }).collect()
            };
            let members = members(&weights);
            let base = base(&members);
            let before = apply(&base, base.len(), &members, &shares(less));
            let after = apply(&base, base.len(), &members, &shares(more));
            // Beside those that it keeps, it may hold some that a crowd of others has no room for.
            if let Some(takers) = Takers::new(&members, &shares(less)) {
                for (slot, owner) in base.iter().enumerate().filter(|(_, owner)| usize::from(**owner) == who) {
                    if takers.keeps(slot, *owner) {
                        prop_assert_eq!(usize::from(before[slot]), who);
                        prop_assert_eq!(usize::from(after[slot]), who);
                    }
                }
            }
            if !crowded(&before, &members, &shares(less)) && !crowded(&after, &members, &shares(more)) {
                for (before, after) in before.iter().zip(&after) {
                    prop_assert!(before == after || usize::from(*after) == who);
                }
            }
        }

        #[test]
        fn the_order_of_members_does_not_matter(
            parts in prop::collection::vec((0u8..=100, prop_oneof![Just(0), Just(FULL), 0u16..=FULL]), 1..40),
            turn in 0usize..40,
        ) {
            let keys = |parts: &[(Member, u16)]| -> Vec<Option<u64>> {
                let (members, shares): (Vec<Member>, Vec<u16>) = parts.iter().copied().unzip();
                let length = 1 << log2_length(members.len());
                let table = apply(&base(&members), length, &members, &shares);
                table.iter().map(|&index| members.get(usize::from(index)).map(|member| member.key)).collect()
            };
            let weights: Vec<u8> = parts.iter().map(|m| m.0).collect();
            let mut parts: Vec<(Member, u16)> =
                members(&weights).into_iter().zip(parts.iter().map(|m| m.1)).collect();
            let ordered = keys(&parts);
            parts.rotate_left(turn % weights.len());
            prop_assert_eq!(ordered, keys(&parts));
        }
    }
}
