//! VIPs laid out in buckets of one cache line, under a seed with which no bucket overflows.

use std::net::{Ipv4Addr, Ipv6Addr};

use lb_common::abi::{PortKey, VIP4_WAYS, VIP6_WAYS, Vip4, Vip4Bucket, Vip6, Vip6Bucket, VipTarget};
use lb_common::vips::{bucket_hash4, bucket_hash6};
use lb_common::wire::Address6;

/// Seeds tried before the number of buckets is doubled.
const SEEDS: u32 = 256;
/// Of those that no bucket overflows with, so many are compared.
const COMPARED: usize = 32;

/// A row of buckets, an entry that goes in, and the hash that says where.
pub trait Bucket: Copy + Default {
    type Entry: Copy;
    const WAYS: u8;
    fn hash(seed: u32, entry: &Self::Entry) -> u32;
    /// Whether packets to a service look for it; the others are asked for where there is none.
    fn is_service(entry: &Self::Entry) -> bool;
    /// Puts the entry into the first free way, of which there is one.
    fn insert(&mut self, entry: Self::Entry);
}

/// Buckets with the seed they were laid out under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout<B> {
    pub seed: u32,
    pub log2_buckets: u32,
    pub buckets: Vec<B>,
}

/// Lays the entries out in at most `2^most_log2` buckets; `None` where that is not enough.
/// Deterministic in the order of the entries.
///
/// As many buckets as entries, where there is room for them; services before the rest, and the seed with which most of them
/// are the first of their bucket. For a CPU guesses how often the packet path looks further, and a wrong guess is dearer
/// than a look: with a thousand services it made 5 to 8 ns of a packet.
pub fn lay_out<B: Bucket>(entries: &[B::Entry], most_log2: u32) -> Option<Layout<B>> {
    let least_log2 = entries.len().next_power_of_two().trailing_zeros().min(most_log2);
    let hits = &mut Vec::new();
    let (log2_buckets, seed) = (least_log2..=most_log2).find_map(|log2| {
        let fitting = (0..SEEDS).filter_map(|seed| Some((behind::<B>(entries, log2, seed, hits)?, seed)));
        fitting.take(COMPARED).min().map(|(_, seed)| (log2, seed))
    })?;
    let mut buckets = vec![B::default(); 1 << log2_buckets];
    let (services, others): (Vec<&B::Entry>, _) = entries.iter().partition(|entry| B::is_service(entry));
    for entry in services.into_iter().chain(others) {
        buckets[index::<B>(entry, log2_buckets, seed)].insert(*entry);
    }
    Some(Layout { seed, log2_buckets, buckets })
}

fn index<B: Bucket>(entry: &B::Entry, log2_buckets: u32, seed: u32) -> usize {
    ((u64::from(B::hash(seed, entry)) << log2_buckets) >> 32) as usize
}

/// How many services are not the first of their bucket; `None` where a bucket gets more entries than it has ways.
fn behind<B: Bucket>(
    entries: &[B::Entry],
    log2_buckets: u32,
    seed: u32,
    hits: &mut Vec<[u8; 2]>,
) -> Option<usize> {
    hits.clear();
    hits.resize(1 << log2_buckets, [0; 2]);
    let mut behind = 0;
    for entry in entries {
        let [all, services] = &mut hits[index::<B>(entry, log2_buckets, seed)];
        *all += 1;
        if *all > B::WAYS {
            return None;
        }
        if B::is_service(entry) {
            *services += 1;
            behind += usize::from(*services > 1);
        }
    }
    Some(behind)
}

/// Buckets that `vips` entries of a family may need at the most: from the odds that some bucket gets
/// one entry too many, n^(w+1) / ((w+1)! b^w) for n entries in b buckets of w ways, with room to spare.
pub fn most_log2(vips: u32, ways: u32) -> u32 {
    // Every address takes an entry of its own beside those of its ports.
    let entries = f64::from(vips) * 2.0;
    let overflow_ways = f64::from(ways + 1);
    let factorial: f64 = (1..=ways + 1).map(f64::from).product();
    let buckets = (entries.powf(overflow_ways) / (factorial * 4.0)).powf(1.0 / f64::from(ways));
    (buckets.max(entries / f64::from(ways)).max(1.0).log2().ceil()) as u32
}

impl Bucket for Vip4Bucket {
    type Entry = Vip4;
    const WAYS: u8 = VIP4_WAYS as u8;

    fn hash(seed: u32, entry: &Vip4) -> u32 {
        bucket_hash4(seed, entry.address, entry.key)
    }

    fn is_service(entry: &Vip4) -> bool {
        entry.target.is_service()
    }

    fn insert(&mut self, entry: Vip4) {
        if let Some(way) = self.0.iter_mut().find(|way| way.key == PortKey::default()) {
            *way = entry;
        }
    }
}

impl Bucket for Vip6Bucket {
    type Entry = Vip6;
    const WAYS: u8 = VIP6_WAYS as u8;

    fn hash(seed: u32, entry: &Vip6) -> u32 {
        bucket_hash6(seed, Address6 { high: entry.high, low: entry.low }, entry.key)
    }

    fn is_service(entry: &Vip6) -> bool {
        entry.target.is_service()
    }

    fn insert(&mut self, entry: Vip6) {
        if let Some(way) = self.0.iter_mut().find(|way| way.key == PortKey::default()) {
            *way = entry;
        }
    }
}

/// An entry for an IPv4 VIP.
pub fn vip4(address: Ipv4Addr, key: PortKey, target: VipTarget) -> Vip4 {
    Vip4 { address: u32::from_ne_bytes(address.octets()), key, target }
}

/// An entry for an IPv6 VIP.
pub fn vip6(address: Ipv6Addr, key: PortKey, target: VipTarget) -> Vip6 {
    let Address6 { high, low } = Address6::from_bytes(address.octets());
    Vip6 { high, low, key, spare: 0, target }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries4(n: u32) -> Vec<Vip4> {
        let ports = [PortKey::ADDRESS, PortKey::new(80, 6), PortKey::new(443, 17)];
        (0..n)
            .map(|i| vip4(Ipv4Addr::from(0xcb00_7100 + i / 3), ports[i as usize % 3], VipTarget::default()))
            .collect()
    }

    fn entries6(n: u32) -> Vec<Vip6> {
        let ports = [PortKey::ADDRESS, PortKey::new(443, 6)];
        let address = |i: u32| Ipv6Addr::from(0x2001_0db8_u128 << 96 | u128::from(i / 2));
        (0..n).map(|i| vip6(address(i), ports[i as usize % 2], VipTarget::default())).collect()
    }

    #[test]
    fn the_computed_capacity_is_enough_for_full_limits() {
        for vips in [1, 2, 10, 100, 1000, 2048] {
            let v4 = lay_out::<Vip4Bucket>(&entries4(vips * 2), most_log2(vips, 4));
            assert!(v4.is_some(), "{vips} IPv4 VIPs in 2^{}", most_log2(vips, 4));
            let v6 = lay_out::<Vip6Bucket>(&entries6(vips * 2), most_log2(vips, 2));
            assert!(v6.is_some(), "{vips} IPv6 VIPs in 2^{}", most_log2(vips, 2));
        }
    }

    #[test]
    fn every_entry_lies_in_the_bucket_its_hash_names() {
        let entries = entries4(500);
        let layout = lay_out::<Vip4Bucket>(&entries, 16).unwrap();
        for entry in &entries {
            let index = index::<Vip4Bucket>(entry, layout.log2_buckets, layout.seed);
            assert!(layout.buckets[index].0.contains(entry));
        }
        let placed = layout.buckets.iter().flat_map(|b| b.0).filter(|v| v.key != PortKey::default()).count();
        assert_eq!(placed, entries.len());
    }

    /// At random there would be 2^12 and 2^14 buckets to find a seed for: some bucket always gets one too many.
    #[test]
    fn neighbouring_addresses_need_few_buckets() {
        let v4 = lay_out::<Vip4Bucket>(&entries4(2000), 10);
        let v6 = lay_out::<Vip6Bucket>(&entries6(2000), 11);
        assert!(v4.is_some() && v6.is_some());
    }

    /// A thousand addresses with a service for TCP and one for UDP.
    #[test]
    fn where_there_is_room_most_services_are_the_first_of_their_bucket() {
        let services = || {
            (0..1000u32).flat_map(|i| {
                [PortKey::ADDRESS, PortKey::new(80, 6), PortKey::new(80, 17)].map(|key| (i, key))
            })
        };
        let target = |key: PortKey| match key.is_address() {
            true => VipTarget::address(0, 0, 0),
            false => VipTarget::service(1, 0, 1),
        };
        let v4: Vec<_> =
            services().map(|(i, key)| vip4(Ipv4Addr::from(0xcb00_7100 + i), key, target(key))).collect();
        let v6: Vec<_> = services()
            .map(|(i, key)| vip6(Ipv6Addr::from(0x2001_0db8_u128 << 96 | u128::from(i)), key, target(key)))
            .collect();
        let (v4, v6) = (lay_out::<Vip4Bucket>(&v4, 16).unwrap(), lay_out::<Vip6Bucket>(&v6, 16).unwrap());
        let first = [
            v4.buckets.iter().filter(|bucket| bucket.0[0].target.is_service()).count(),
            v6.buckets.iter().filter(|bucket| bucket.0[0].target.is_service()).count(),
        ];
        assert!(first.iter().all(|first| *first > 1900), "{first:?} of 2000");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(lay_out::<Vip6Bucket>(&entries6(100), 3).is_none());
        assert!(lay_out::<Vip4Bucket>(&[], 0).is_some());
    }
}
