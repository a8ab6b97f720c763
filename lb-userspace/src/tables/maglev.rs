//! Weighted Maglev tables (Eisenbud et al., "Maglev", NSDI 2016, section 3.4), with lengths that are
//! powers of two and an odd skip, so that each backend's walk still visits every slot.
//!
//! A table is a pure function of (seed, members): the order in which members are given does not
//! matter, so balancers that were configured differently agree. Changing anything here moves flows:
//! raise `TABLE_VERSION` and the golden vectors with it.

use lb_common::abi::{LONGEST_TABLE_LOG2, SHORTEST_TABLE_LOG2};
use lb_common::flow::fingerprint;

pub const TABLE_VERSION: u32 = 1;

/// Slots a backend needs so that shares stay within 1 % of the weights.
const SLOTS_PER_BACKEND: u64 = 100;

/// A backend as the table sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// Names the backend, the same on every balancer.
    pub key: u64,
    /// 0 takes no slots.
    pub weight: u8,
}

impl Member {
    /// The key of a backend: the address in its 16-byte form, keyed with the cluster seed.
    pub fn new(seed: u64, address: std::net::IpAddr, weight: u8) -> Self {
        let bytes = match address {
            std::net::IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            std::net::IpAddr::V6(v6) => v6.octets(),
        };
        Self { key: fingerprint(seed, &bytes), weight }
    }
}

/// The length class for a number of backends: 4096 x 4^k, at most 2^20.
pub fn log2_length(backends: usize) -> u32 {
    let mut log2 = SHORTEST_TABLE_LOG2;
    while log2 < LONGEST_TABLE_LOG2 && (1u64 << log2) < SLOTS_PER_BACKEND * backends as u64 {
        log2 += 2;
    }
    log2
}

/// The members' indices, slot by slot; empty where no member has weight.
///
/// The result is that of the paper's loop; how it is come by is not. Which slots are free is a bit each, so that a walk
/// stays in the cache. And once few are left, a walk does not go from slot to slot until it meets one, which takes longer
/// and longer: how far away each free slot is follows from the inverse of the skip.
pub fn build(log2_length: u32, members: &[Member]) -> Vec<u16> {
    let length = 1usize << log2_length;
    let mask = length - 1;
    let mut walks: Vec<Walk> = members
        .iter()
        .enumerate()
        .filter(|(_, member)| member.weight > 0)
        .map(|(index, member)| Walk::new(index, *member, mask))
        .collect();
    let Some(heaviest) = walks.iter().map(|walk| walk.weight).max() else { return Vec::new() };
    // The turn order must not depend on the order of the configuration.
    walks.sort_unstable_by_key(|walk| walk.key);

    let few = 1usize << (log2_length / 2);
    let mut table = vec![0; length];
    let mut free = Free::all(length);
    let mut last = Vec::new();
    let mut left = length;
    loop {
        for walk in &mut walks {
            if !walk.has_turn(heaviest) {
                continue;
            }
            if left > few {
                walk.go(&free, mask);
                free.take(walk.position);
            } else {
                if last.is_empty() {
                    last = free.slots();
                }
                walk.jump(&mut last, mask);
            }
            table[walk.position] = walk.index;
            left -= 1;
            if left == 0 {
                return table;
            }
        }
    }
}

/// The slots that nobody has, a bit for each.
struct Free(Vec<u64>);

impl Free {
    /// `length` is a power of two, 64 or more.
    fn all(length: usize) -> Self {
        Self(vec![u64::MAX; length / 64])
    }

    fn has(&self, slot: usize) -> bool {
        self.0[slot / 64] & 1 << (slot % 64) != 0
    }

    fn take(&mut self, slot: usize) {
        self.0[slot / 64] &= !(1 << (slot % 64));
    }

    fn slots(&self) -> Vec<usize> {
        (0..self.0.len() * 64).filter(|slot| self.has(*slot)).collect()
    }
}

/// A member's way through the table.
struct Walk {
    index: u16,
    key: u64,
    weight: u64,
    /// What of a turn it has come by, in parts of the heaviest weight.
    credit: u64,
    position: usize,
    skip: usize,
}

impl Walk {
    fn new(index: usize, member: Member, mask: usize) -> Self {
        Self {
            index: index as u16,
            key: member.key,
            weight: u64::from(member.weight),
            credit: 0,
            position: (member.key >> 32) as usize & mask,
            // Odd: coprime to the length, so the walk visits every slot.
            skip: (member.key as usize | 1) & mask,
        }
    }

    /// A weight of half the heaviest takes a turn in every second round.
    fn has_turn(&mut self, heaviest: u64) -> bool {
        self.credit += self.weight;
        let turn = self.credit >= heaviest;
        if turn {
            self.credit -= heaviest;
        }
        turn
    }

    /// To the next free slot, step by step.
    fn go(&mut self, free: &Free, mask: usize) {
        while !free.has(self.position) {
            self.position = (self.position + self.skip) & mask;
        }
    }

    /// To the same slot, which is out of the list then.
    fn jump(&mut self, free: &mut Vec<usize>, mask: usize) {
        let inverse = inverse(self.skip);
        let steps = |slot: usize| slot.wrapping_sub(self.position).wrapping_mul(inverse) & mask;
        let nearest = (0..free.len()).min_by_key(|&place| steps(free[place]));
        if let Some(place) = nearest {
            self.position = free.swap_remove(place);
        }
    }
}

/// What gives 1, multiplied by an odd number, modulo any power of two: by Newton's iteration, each round of which doubles the
/// bits that are right (three to begin with).
fn inverse(odd: usize) -> usize {
    let mut inverse = odd;
    for _ in 0..5 {
        inverse = inverse.wrapping_mul(2usize.wrapping_sub(odd.wrapping_mul(inverse)));
    }
    inverse
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn members(weights: &[u8]) -> Vec<Member> {
        let address = |i: usize| std::net::Ipv4Addr::from(0x0a00_0100 + i as u32).into();
        weights.iter().enumerate().map(|(i, &weight)| Member::new(7, address(i), weight)).collect()
    }

    fn shares(table: &[u16], n: usize) -> Vec<u32> {
        let mut counts = vec![0; n];
        table.iter().for_each(|&index| counts[usize::from(index)] += 1);
        counts
    }

    /// As the paper has it: what `build` comes to, and slowly.
    fn plain(log2_length: u32, members: &[Member]) -> Vec<u16> {
        let (length, mask) = (1usize << log2_length, (1usize << log2_length) - 1);
        let mut walks: Vec<(Walk, u64)> = members
            .iter()
            .enumerate()
            .filter(|(_, member)| member.weight > 0)
            .map(|(index, member)| (Walk::new(index, *member, mask), u64::from(member.weight)))
            .collect();
        let Some(heaviest) = walks.iter().map(|(_, weight)| *weight).max() else { return Vec::new() };
        walks.sort_unstable_by_key(|(walk, _)| walk.key);
        let (mut table, mut filled) = (vec![u16::MAX; length], 0);
        for round in 0u64.. {
            for (walk, weight) in &mut walks {
                if (round + 1) * *weight / heaviest == round * *weight / heaviest {
                    continue;
                }
                while table[walk.position] != u16::MAX {
                    walk.position = (walk.position + walk.skip) & mask;
                }
                table[walk.position] = walk.index;
                filled += 1;
                if filled == length {
                    return table;
                }
            }
        }
        table
    }

    #[test]
    fn a_table_is_that_of_the_paper_in_every_length_class() {
        for (log2, backends) in [(12, 1), (12, 2), (12, 40), (14, 163), (16, 655), (18, 700)] {
            let weights: Vec<u8> = (0..backends).map(|index| [100, 99, 50, 1][index % 4]).collect();
            for weights in [vec![100; backends], weights] {
                assert!(
                    build(log2, &members(&weights)) == plain(log2, &members(&weights)),
                    "{log2}, {backends}"
                );
            }
        }
    }

    #[test]
    fn an_inverse_gives_one() {
        for odd in [1, 3, 5, 0xffff_ffff, 0x9e37_79b9_7f4a_7c15, usize::MAX] {
            assert_eq!(odd.wrapping_mul(inverse(odd)), 1, "{odd}");
        }
    }

    #[test]
    fn length_classes_keep_the_spread_within_one_percent() {
        let rows = [
            (0, 12),
            (1, 12),
            (40, 12),
            (41, 14),
            (163, 14),
            (164, 16),
            (655, 16),
            (2621, 18),
            (10485, 20),
            (32766, 20),
        ];
        for (backends, log2) in rows {
            assert_eq!(log2_length(backends), log2, "{backends} backends");
        }
    }

    #[test]
    fn the_largest_share_is_at_most_two_percent_over_the_mean() {
        for n in [1, 2, 3, 7, 40, 163, 655] {
            let table = build(log2_length(n), &members(&vec![100; n]));
            let mean = table.len() as f64 / n as f64;
            let most = f64::from(*shares(&table, n).iter().max().unwrap());
            assert!(most / mean <= 1.02, "{n} backends: {most} over {mean}");
        }
    }

    #[test]
    fn shares_follow_weights() {
        let weights = [100, 50, 25, 0, 1];
        let counts = shares(&build(14, &members(&weights)), weights.len());
        let total: u32 = weights.iter().map(|&w| u32::from(w)).sum();
        for (count, weight) in counts.iter().zip(weights) {
            let ideal = f64::from(weight) / f64::from(total) * 16384.0;
            assert!(
                (f64::from(*count) - ideal).abs() <= ideal * 0.02 + 1.0,
                "weight {weight}: {count} for {ideal}"
            );
        }
    }

    #[test]
    fn a_pool_without_weight_has_no_table() {
        assert!(build(12, &[]).is_empty());
        assert!(build(12, &members(&[0, 0])).is_empty());
    }

    /// Two builds, or two balancers, agree on these or they do not agree at all.
    #[test]
    fn golden_vectors_of_table_version_1() {
        assert_eq!(TABLE_VERSION, 1);
        let digest = |log2, weights: &[u8]| {
            let bytes: Vec<u8> =
                build(log2, &members(weights)).iter().flat_map(|i| i.to_le_bytes()).collect();
            fingerprint(0, &bytes)
        };
        let rows = [
            (digest(12, &[100, 100, 100]), GOLDEN[0]),
            (digest(12, &[100, 50, 1]), GOLDEN[1]),
            (digest(14, &[100; 41]), GOLDEN[2]),
        ];
        for (index, (got, expected)) in rows.into_iter().enumerate() {
            assert_eq!(got, expected, "vector {index}: {got:#018x}");
        }
        assert_eq!(build(12, &members(&[100, 100, 100]))[..16], GOLDEN_HEAD);
    }

    /// Computed by a second implementation, in another language.
    const GOLDEN: [u64; 3] = [0xa0eb_157c_421c_3251, 0xbf6f_f056_c538_d0f3, 0xaed1_8325_80a5_9f1d];
    const GOLDEN_HEAD: [u16; 16] = [1, 0, 1, 1, 2, 1, 0, 1, 1, 2, 1, 0, 1, 1, 2, 1];

    proptest! {
        #[test]
        fn any_table_is_that_of_the_paper(weights in prop::collection::vec(0u8..=100, 1..60), log2 in 12u32..14) {
            prop_assert!(build(log2, &members(&weights)) == plain(log2, &members(&weights)));
        }

        #[test]
        fn the_order_of_members_does_not_matter(weights in prop::collection::vec(0u8..=100, 1..30), turn in 0usize..30) {
            let ordered = members(&weights);
            let mut turned = ordered.clone();
            turned.rotate_left(turn % weights.len());
            let keys = |table: Vec<u16>, of: &[Member]| -> Vec<u64> {
                table.iter().map(|&i| of[usize::from(i)].key).collect()
            };
            prop_assert_eq!(keys(build(12, &ordered), &ordered), keys(build(12, &turned), &turned));
        }
    }
}
