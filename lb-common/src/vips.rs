//! From a destination to a VIP. The most specific entry takes the packet:
//!
//! 1. exact (address, port, protocol), in buckets of one cache line;
//! 2. the port rules of the address, or of the longest prefix that holds it: single ports, ranges, any port;
//!    then those of the next shorter prefix. The agent merges them into one list, in this order.
//!
//! The agent picks the seed so that no bucket overflows, or doubles their number: a lookup is one
//! bucket, always. Rules and prefixes cost what they cost only where the configuration has some.

use crate::abi::{
    Features, MOST_PORT_RULES, PortKey, PrefixLengths, VIP4_WAYS, VIP6_WAYS, VipIndex, VipTarget, VipWord,
};
use crate::outcome::Outcome;
use crate::tables::Tables;
use crate::wire::Address6;

const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
const SECOND: u64 = 0xc2b2_ae3d_27d4_eb4f;

/// An odd number that a seed stands for. Known before the packet is: what it takes delays none.
#[inline(always)]
const fn scale(seed: u32) -> u64 {
    (seed as u64 + 1).wrapping_mul(MULTIPLIER) | 1
}

/// The hash that places an IPv4 VIP in a bucket: one multiplication (Dietzfelbinger et al., 1997), of which the upper bits
/// count. Neighbouring addresses and ports spread more evenly than at random.
#[inline(always)]
pub const fn bucket_hash4(seed: u32, address: u32, key: PortKey) -> u32 {
    ((address as u64 | (key.0 as u64) << 32).wrapping_mul(scale(seed)) >> 32) as u32
}

/// The hash that places an IPv6 VIP in a bucket; three multiplications, none of which waits for another.
#[inline(always)]
pub const fn bucket_hash6(seed: u32, address: Address6, key: PortKey) -> u32 {
    let low = scale(seed);
    let port = low.wrapping_mul(SECOND);
    let high = port.wrapping_mul(SECOND);
    let sum = address.high.wrapping_mul(high).wrapping_add(address.low.wrapping_mul(low));
    (sum.wrapping_add((key.0 as u64).wrapping_mul(port)) >> 32) as u32
}

/// A bit of the VIP filter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FilterBit(u32);

impl FilterBit {
    /// Index of its word, below `FILTER_WORDS`.
    #[inline(always)]
    pub const fn word(self) -> usize {
        self.0 as usize >> 6
    }

    #[inline(always)]
    pub const fn mask(self) -> u64 {
        1 << (self.0 & 63)
    }
}

#[inline(always)]
pub const fn filter4(address: u32) -> FilterBit {
    FilterBit(((address as u64).wrapping_mul(MULTIPLIER) >> 32) as u32 >> 16)
}

#[inline(always)]
pub const fn filter6(address: Address6) -> FilterBit {
    let word = address.high.wrapping_mul(MULTIPLIER).rotate_left(32) ^ address.low;
    FilterBit((word.wrapping_mul(MULTIPLIER) >> 48) as u32)
}

/// The entry of exactly this address and key. Compared as a whole: a branch for each part would make the
/// verifier follow all of their combinations.
#[inline(always)]
pub fn entry4<T: Tables>(tables: &T, address: u32, key: PortKey) -> VipTarget {
    let Some(index) = tables.vip_index() else { return VipTarget::NONE };
    entry_in4(tables, index.word4(), address, key)
}

#[inline(always)]
fn entry_in4<T: Tables>(tables: &T, word: VipWord, address: u32, key: PortKey) -> VipTarget {
    let row = word.row(bucket_hash4(word.seed(), address, key));
    let Some(bucket) = tables.vip4_bucket(row) else { return VipTarget::NONE };
    let mut way = 0;
    while way < VIP4_WAYS {
        let vip = &bucket.0[way];
        if (vip.address ^ address) | (vip.key.0 ^ key.0) == 0 {
            return vip.target;
        }
        way += 1;
    }
    VipTarget::NONE
}

#[inline(always)]
pub fn entry6<T: Tables>(tables: &T, address: Address6, key: PortKey) -> VipTarget {
    let Some(index) = tables.vip_index() else { return VipTarget::NONE };
    entry_in6(tables, index.word6(), address, key)
}

#[inline(always)]
fn entry_in6<T: Tables>(tables: &T, word: VipWord, address: Address6, key: PortKey) -> VipTarget {
    let row = word.row(bucket_hash6(word.seed(), address, key));
    let Some(bucket) = tables.vip6_bucket(row) else { return VipTarget::NONE };
    let mut way = 0;
    while way < VIP6_WAYS {
        let vip = &bucket.0[way];
        if (vip.high ^ address.high) | (vip.low ^ address.low) | (vip.key.0 ^ key.0) as u64 == 0 {
            return vip.target;
        }
        way += 1;
    }
    VipTarget::NONE
}

/// The first `length` bits of an address.
#[inline(always)]
pub const fn masked4(address: u32, length: u32) -> u32 {
    address & (u32::MAX << (32u32.wrapping_sub(length) & 31)).to_be()
}

#[inline(always)]
pub const fn masked6(address: Address6, length: u32) -> Address6 {
    let bits = (u64::MAX << (64u32.wrapping_sub(length) & 63)).to_be();
    if length <= 64 {
        Address6 { high: address.high & bits, low: 0 }
    } else {
        Address6 { high: address.high, low: address.low & bits }
    }
}

/// The first rule of an address or prefix that holds the port; else the entry itself.
#[inline(never)]
fn rule<T: Tables>(tables: &T, entry: VipTarget, key: PortKey) -> VipTarget {
    let (port, protocol) = (key.port() as u32, key.protocol() as u32);
    let mut index = 0;
    while index < MOST_PORT_RULES {
        if index >= entry.rules() {
            break;
        }
        let Some(rule) = tables.port_rule(entry.first_rule().wrapping_add(index)) else { break };
        // Differences of ports: the uppermost bit is the sign.
        let outside = port.wrapping_sub(rule.low()) | rule.high().wrapping_sub(port);
        if (rule.protocol ^ protocol) | outside >> 31 == 0 {
            return rule.target;
        }
        index += 1;
    }
    entry
}

/// What becomes of a packet that no service takes, by the entry of its VIP.
#[inline(always)]
pub const fn unmapped(entry: VipTarget) -> Outcome {
    if entry.is_none() || entry.source() != 0 {
        Outcome::PassNotVip
    } else if entry.has(VipTarget::UNMAPPED_PASS) {
        Outcome::PassVipUnmapped
    } else if entry.has(VipTarget::UNMAPPED_REJECT) {
        Outcome::AnswerUnreachable
    } else {
        Outcome::DropVipPort
    }
}

macro_rules! family {
    ($address:ty, $entry:ident, $entry_in:ident, $word:ident, $masked:ident, $filter:ident, $lengths:ident,
     $find:ident, $service:ident, $vip:ident, $vip_at:ident, $near:ident, $may_be:ident, $vip_in:ident, $prefix:ident) => {
        /// Whether the address may be a VIP: most that are none end here, after one load.
        #[inline(always)]
        pub fn $may_be<T: Tables>(tables: &T, index: &VipIndex, address: $address) -> bool {
            tables.features().has(Features::PREFIXES) || $near(index, address)
        }

        /// The service that takes a packet to this address, which may be a VIP, to this port and by this protocol;
        /// where none does, the entry of the address, which says what becomes of it (`unmapped`).
        #[inline(always)]
        pub fn $find<T: Tables>(tables: &T, index: &VipIndex, address: $address, key: PortKey) -> VipTarget {
            // One word for both looks: a packet meets the old set of VIPs or the new one.
            let word = index.$word();
            let exact = $entry_in(tables, word, address, key);
            if !exact.is_none() {
                return exact;
            }
            let vip = $vip_in(tables, index, word, address);
            if tables.features().has(Features::PORT_RULES) { rule(tables, vip, key) } else { vip }
        }

        /// As above, where the entry of the address is known.
        #[inline(always)]
        pub fn $service<T: Tables>(tables: &T, vip: VipTarget, address: $address, key: PortKey) -> VipTarget {
            let exact = $entry(tables, address, key);
            if !exact.is_none() {
                return exact;
            }
            if tables.features().has(Features::PORT_RULES) { rule(tables, vip, key) } else { vip }
        }

        /// The most specific entry that makes the address a VIP.
        #[inline(always)]
        pub fn $vip<T: Tables>(tables: &T, address: $address) -> VipTarget {
            let Some(index) = tables.vip_index() else { return VipTarget::NONE };
            $vip_at(tables, index, address)
        }

        #[inline(always)]
        pub fn $vip_at<T: Tables>(tables: &T, index: &VipIndex, address: $address) -> VipTarget {
            if tables.features().has(Features::PREFIXES) {
                return $vip_in(tables, index, index.$word(), address);
            }
            if !$near(index, address) {
                return VipTarget::NONE;
            }
            $entry_in(tables, index.$word(), address, PortKey::ADDRESS)
        }

        /// Whether the address may be a VIP, apart from prefixes.
        #[inline(always)]
        fn $near(index: &VipIndex, address: $address) -> bool {
            let bit = $filter(address);
            index.filter(bit.word()) & bit.mask() != 0
        }

        #[inline(always)]
        fn $vip_in<T: Tables>(tables: &T, index: &VipIndex, word: VipWord, address: $address) -> VipTarget {
            if $near(index, address) {
                let entry = $entry_in(tables, word, address, PortKey::ADDRESS);
                if !entry.is_none() {
                    return entry;
                }
            }
            if tables.features().has(Features::PREFIXES) {
                return $prefix(tables, word, address);
            }
            VipTarget::NONE
        }

        /// The entry of the longest prefix that holds the address.
        #[inline(never)]
        fn $prefix<T: Tables>(tables: &T, word: VipWord, address: $address) -> VipTarget {
            let lengths = match tables.vip_index() {
                Some(index) => index.$lengths(),
                None => return VipTarget::NONE,
            };
            let mut index = 0;
            while index < PrefixLengths::ROOM {
                let length = lengths.get(index);
                if length == 0 {
                    break;
                }
                let entry = $entry_in(tables, word, $masked(address, length), PortKey::prefix(length));
                if !entry.is_none() {
                    return entry;
                }
                index += 1;
            }
            VipTarget::NONE
        }
    };
}

family!(
    u32,
    entry4,
    entry_in4,
    word4,
    masked4,
    filter4,
    prefix_lengths4,
    find4,
    service4,
    vip4,
    vip_at4,
    near4,
    may_be4,
    vip_in4,
    prefix4
);
family!(
    Address6,
    entry6,
    entry_in6,
    word6,
    masked6,
    filter6,
    prefix_lengths6,
    find6,
    service6,
    vip6,
    vip_at6,
    near6,
    may_be6,
    vip_in6,
    prefix6
);

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use core::net::{Ipv4Addr, Ipv6Addr};
    use std::collections::HashSet;

    #[test]
    fn masks_keep_the_leading_bits_of_every_length() {
        let all = Ipv4Addr::new(255, 255, 255, 255);
        for length in 1..=32 {
            let masked = masked4(u32::from_ne_bytes(all.octets()), length);
            let expected = ipnetwork_mask(length, 32) as u32;
            assert_eq!(u32::from(Ipv4Addr::from(masked.to_ne_bytes())), expected, "/{length}");
        }
        let all = Address6::from_bytes([0xff; 16]);
        for length in 1..=128 {
            let masked = u128::from(Ipv6Addr::from(masked6(all, length).bytes()));
            assert_eq!(masked, ipnetwork_mask(length, 128), "/{length}");
        }
    }

    /// `length` ones, then zeros, in `bits` bits.
    fn ipnetwork_mask(length: u32, bits: u32) -> u128 {
        (0..length).fold(0, |mask, i| mask | 1 << (bits - 1 - i))
    }

    #[test]
    fn neighbouring_addresses_have_bits_of_their_own() {
        let v4 = (0..256u32).map(|i| filter4(u32::from_ne_bytes([203, 0, 113, i as u8])));
        let different: HashSet<_> = v4.map(|bit| (bit.word(), bit.mask())).collect();
        assert!(different.len() > 250, "{} of 256", different.len());
        let v6 = (0..256u128).map(|i| {
            let address = Ipv6Addr::from(0x2001_0db8_u128 << 96 | i);
            filter6(Address6::from_bytes(address.octets()))
        });
        let different: HashSet<_> = v6.map(|bit| (bit.word(), bit.mask())).collect();
        assert!(different.len() > 250, "{} of 256", different.len());
    }
}
