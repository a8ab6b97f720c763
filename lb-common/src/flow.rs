//! The flow hash: seeded, versioned, the same on every balancer of a group.
//!
//! 32-bit words of the tuple are combined by pair-multiply-shift (Thorup, "High Speed Hashing for
//! Integers and Strings", 2015, section 3.2: strongly universal under secret keys, one
//! 64-bit multiplication per two words), so that nobody without the keys can pick tuples that
//! collide; then the 64-bit finaliser of MurmurHash3, a bijection, breaks the linearity that
//! sequential ports would show. The upper half chooses the slot, the lower half fills whatever else
//! wants to vary by flow (outer source address, flow label).
//!
//! Input words are taken as they lie in memory, read little-endian. Changing anything here moves
//! every flow: raise `HASH_VERSION` and the golden vectors with it.

use crate::abi::HASH_KEYS;
use crate::tables::Tables;
use crate::wire::Address6;

pub const HASH_VERSION: u32 = 1;

/// A hashed flow.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlowHash(u64);

impl FlowHash {
    /// Chooses the slot.
    #[inline(always)]
    pub const fn slot(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Independent of the slot: varies the tunnel's source and label.
    #[inline(always)]
    pub const fn spread(self) -> u32 {
        self.0 as u32
    }

    pub const fn bits(self) -> u64 {
        self.0
    }

    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

/// MurmurHash3's 64-bit finaliser.
#[inline(always)]
const fn finish(mut h: u64) -> u64 {
    h ^= h >> 33;
    h = h.wrapping_mul(0xff51_afd7_ed55_8ccd);
    h ^= h >> 33;
    h = h.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ (h >> 33)
}

/// The next of a sequence of well-mixed numbers from one seed (SplitMix64: Steele, Lea, Flood, 2014).
const fn split_mix(state: u64) -> u64 {
    let mut z = state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The keys of the hash for a cluster seed.
pub const fn keys(seed: u64) -> [u64; HASH_KEYS] {
    let mut keys = [0; HASH_KEYS];
    let mut i = 0;
    while i < HASH_KEYS {
        keys[i] = split_mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15u64.wrapping_mul(i as u64 + 1)));
        i += 1;
    }
    keys
}

/// One product over two words, each with its key.
#[inline(always)]
const fn pair(key_a: u64, a: u32, key_b: u64, b: u32) -> u64 {
    key_a.wrapping_add(b as u64).wrapping_mul(key_b.wrapping_add(a as u64))
}

/// Hashes an IPv4 flow. `ports` and addresses as they lie in the packet.
#[inline(always)]
pub fn hash4<T: Tables>(t: &T, source: u32, destination: u32, ports: u32, protocol: u8) -> FlowHash {
    let addresses = pair(t.hash_key(0), source, t.hash_key(1), destination);
    let transport = pair(t.hash_key(2), ports, t.hash_key(3), protocol as u32);
    FlowHash(finish(addresses.wrapping_add(transport)))
}

/// Hashes an IPv6 flow.
#[inline(always)]
pub fn hash6<T: Tables>(
    t: &T,
    source: Address6,
    destination: Address6,
    ports: u32,
    protocol: u8,
) -> FlowHash {
    let half = |i, word: u64| pair(t.hash_key(i), word as u32, t.hash_key(i + 1), (word >> 32) as u32);
    let transport = pair(t.hash_key(0), ports, t.hash_key(1), protocol as u32);
    let source = half(2, source.high).wrapping_add(half(4, source.low));
    let destination = half(6, destination.high).wrapping_add(half(8, destination.low));
    FlowHash(finish(transport.wrapping_add(source).wrapping_add(destination)))
}

/// An IPv4 address without its lowest `cut` bits (0 to 31). Addresses as they lie in the packet.
#[inline(always)]
pub const fn prefix4(address: u32, cut: u32) -> u32 {
    address & (u32::MAX << (cut & 31)).swap_bytes()
}

/// An IPv6 address without its lowest `cut` bits (0 to 127).
#[inline(always)]
pub const fn prefix6(address: Address6, cut: u32) -> Address6 {
    let Address6 { high, low } = address;
    let mask = (u64::MAX << (cut & 63)).swap_bytes();
    if cut & 64 == 0 { Address6 { high, low: low & mask } } else { Address6 { high: high & mask, low: 0 } }
}

/// A hash for the agent's own fingerprints and permutations: bytes under a seed, 64 bits.
/// Part of the table builder's version, not of the packet path.
pub fn fingerprint(seed: u64, bytes: &[u8]) -> u64 {
    let mut h = split_mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15u64.wrapping_mul(bytes.len() as u64 + 1)));
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        h = finish(h ^ u64::from_le_bytes(word)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    }
    finish(h)
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::tables::tests::Constant;
    use crate::wire::Ports;
    use core::net::{Ipv4Addr, Ipv6Addr};
    use std::vec;

    fn v4(seed: u64, source: &str, sport: u16, destination: &str, dport: u16, protocol: u8) -> u64 {
        let word = |a: &str| u32::from_ne_bytes(a.parse::<Ipv4Addr>().unwrap().octets());
        let tables = Constant::seeded(seed);
        hash4(&tables, word(source), word(destination), Ports::new(sport, dport).both, protocol).bits()
    }

    fn v6(seed: u64, source: &str, sport: u16, destination: &str, dport: u16, protocol: u8) -> u64 {
        let word = |a: &str| Address6::from_bytes(a.parse::<Ipv6Addr>().unwrap().octets());
        let tables = Constant::seeded(seed);
        hash6(&tables, word(source), word(destination), Ports::new(sport, dport).both, protocol).bits()
    }

    /// Two builds, or two balancers, agree on these or they do not agree at all.
    #[test]
    fn golden_vectors_of_hash_version_1() {
        assert_eq!(HASH_VERSION, 1);
        let rows = [
            (v4(0, "192.0.2.1", 40000, "203.0.113.10", 80, 6), GOLDEN[0]),
            (v4(0x5f1d_0c3a_9be2_4771, "192.0.2.1", 40000, "203.0.113.10", 80, 6), GOLDEN[1]),
            (v4(0x5f1d_0c3a_9be2_4771, "192.0.2.1", 40001, "203.0.113.10", 80, 6), GOLDEN[2]),
            (v4(0x5f1d_0c3a_9be2_4771, "192.0.2.1", 40000, "203.0.113.10", 80, 17), GOLDEN[3]),
            (v6(0, "2001:db8::1", 40000, "2001:db8:1::10", 443, 6), GOLDEN[4]),
            (v6(0x5f1d_0c3a_9be2_4771, "2001:db8::1", 40000, "2001:db8:1::10", 443, 6), GOLDEN[5]),
            (v6(0x5f1d_0c3a_9be2_4771, "2001:db8::2", 40000, "2001:db8:1::10", 443, 6), GOLDEN[6]),
            (fingerprint(0, b""), GOLDEN[7]),
            (fingerprint(1, b"10.0.1.11"), GOLDEN[8]),
        ];
        for (index, (got, expected)) in rows.into_iter().enumerate() {
            assert_eq!(got, expected, "vector {index}: {got:#018x}");
        }
    }

    /// Computed by a second implementation, in another language, from the description above.
    const GOLDEN: [u64; 9] = [
        0xc8c7_ab67_9269_7abf,
        0x9669_bccb_7b20_0258,
        0x6c9f_2ea7_5483_6bcf,
        0xc83d_530f_be08_ec55,
        0x2e26_12ec_acf3_cf1d,
        0x3455_3979_a078_f3fe,
        0x9c14_8427_c5e4_5b0d,
        0x9474_f0eb_06d7_9fd8,
        0xebb9_90c0_9fc9_19c0,
    ];

    #[test]
    fn a_prefix_is_what_the_standard_library_makes_of_it() {
        let v4 = Ipv4Addr::new(203, 0, 113, 77);
        for cut in 0..32 {
            let expected = Ipv4Addr::from_bits(v4.to_bits() >> cut << cut);
            let got = prefix4(u32::from_ne_bytes(v4.octets()), cut);
            assert_eq!(got, u32::from_ne_bytes(expected.octets()), "cut {cut}");
        }
        let v6: Ipv6Addr = "2001:db8:1234:5678:9abc:def0:1234:5677".parse().unwrap();
        for cut in 0..128 {
            let expected = Ipv6Addr::from_bits(v6.to_bits() >> cut << cut);
            let got = prefix6(Address6::from_bytes(v6.octets()), cut);
            assert_eq!(got, Address6::from_bytes(expected.octets()), "cut {cut}");
        }
    }

    /// Chi-square over `cells` equal cells; the 0.999 quantile by Wilson and Hilferty (1931).
    fn assert_uniform(name: &str, hashes: impl Iterator<Item = u32>, cells: usize) {
        let mut counts = vec![0u32; cells];
        let mut total = 0u32;
        for hash in hashes {
            counts[((hash as u64 * cells as u64) >> 32) as usize] += 1;
            total += 1;
        }
        let expected = f64::from(total) / cells as f64;
        let chi2: f64 = counts.iter().map(|&c| (f64::from(c) - expected).powi(2) / expected).sum();
        let df = (cells - 1) as f64;
        let limit = df * (1.0 - 2.0 / (9.0 * df) + 3.090 * (2.0 / (9.0 * df)).sqrt()).powi(3);
        assert!(chi2 < limit, "{name}: chi-square {chi2:.1} over the limit {limit:.1}");
    }

    /// The shapes that real traffic has: one client with running ports, neighbours with one port.
    #[test]
    fn structured_tuples_spread_evenly_in_both_halves() {
        let vip = u32::from_ne_bytes([203, 0, 113, 10]);
        let vip6 = Address6::from_bytes([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        for seed in [0, 1, 0x5f1d_0c3a_9be2_4771] {
            let t = Constant::seeded(seed);
            let ports = |port: u32| Ports::new(port as u16, 80).both;
            let client = |i: u32| u32::from_ne_bytes((0x0a00_0000 + i).to_be_bytes());
            let running = |i: u32| hash4(&t, client(1), vip, ports(i), 6);
            let neighbours = |i: u32| hash4(&t, client(i), vip, ports(40000), 6);
            let v6 =
                |i: u32| hash6(&t, Address6 { high: 1, low: (i as u64).to_be() }, vip6, ports(40000), 17);
            assert_uniform("running ports", (0..65536).map(|i| running(i).slot()), 1024);
            assert_uniform("neighbours", (0..100_000).map(|i| neighbours(i).slot()), 1024);
            assert_uniform("v6 neighbours", (0..100_000).map(|i| v6(i).slot()), 1024);
            assert_uniform("running ports, spread", (0..65536).map(|i| running(i).spread()), 256);
            assert_uniform("neighbours, spread", (0..100_000).map(|i| neighbours(i).spread()), 256);
        }
    }
}
