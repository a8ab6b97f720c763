//! From a destination to a VIP: exact (address, port, protocol) in buckets of one cache line.
//!
//! The agent picks the seed so that no bucket overflows, or doubles their number: a lookup is one
//! bucket, always.

use crate::abi::{PortKey, VIP4_WAYS, VIP6_WAYS, VipTarget};
use crate::outcome::Outcome;
use crate::tables::Tables;
use crate::wire::Address6;

const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

#[inline(always)]
const fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 32)).wrapping_mul(MULTIPLIER);
    word ^ (word >> 29)
}

/// The hash that places an IPv4 VIP in a bucket.
#[inline(always)]
pub const fn bucket_hash4(seed: u32, address: u32, key: PortKey) -> u32 {
    let word = (address ^ seed) as u64 | (key.0 as u64) << 32;
    (mix(word.wrapping_mul(MULTIPLIER)).wrapping_mul(MULTIPLIER) >> 32) as u32
}

/// The hash that places an IPv6 VIP in a bucket.
#[inline(always)]
pub const fn bucket_hash6(seed: u32, address: Address6, key: PortKey) -> u32 {
    let high = mix(address.high ^ seed as u64);
    let low = mix(address.low.wrapping_add(high));
    (mix(low ^ key.0 as u64).wrapping_mul(MULTIPLIER) >> 32) as u32
}

#[inline(always)]
pub fn find4<T: Tables>(tables: &T, address: u32, key: PortKey) -> Option<VipTarget> {
    let word = tables.vip_word4();
    let bucket = tables.vip4_bucket(word.row(bucket_hash4(word.seed(), address, key)))?;
    let mut way = 0;
    while way < VIP4_WAYS {
        let vip = &bucket.0[way];
        if vip.address == address && vip.key == key {
            return Some(vip.target);
        }
        way += 1;
    }
    None
}

#[inline(always)]
pub fn find6<T: Tables>(tables: &T, address: Address6, key: PortKey) -> Option<VipTarget> {
    let word = tables.vip_word6();
    let bucket = tables.vip6_bucket(word.row(bucket_hash6(word.seed(), address, key)))?;
    let mut way = 0;
    while way < VIP6_WAYS {
        let vip = &bucket.0[way];
        if vip.high == { address.high } && vip.low == { address.low } && vip.key == key {
            return Some(vip.target);
        }
        way += 1;
    }
    None
}

/// The verdict on what no service takes: `reason` if the address is a VIP, else it is not ours.
#[inline(always)]
pub fn refuse4<T: Tables>(tables: &T, address: u32, reason: Outcome) -> Outcome {
    match find4(tables, address, PortKey::ADDRESS) {
        Some(_) => reason,
        None => Outcome::PassNotVip,
    }
}

#[inline(always)]
pub fn refuse6<T: Tables>(tables: &T, address: Address6, reason: Outcome) -> Outcome {
    match find6(tables, address, PortKey::ADDRESS) {
        Some(_) => reason,
        None => Outcome::PassNotVip,
    }
}
