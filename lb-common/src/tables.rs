//! What the packet path reads and counts, wherever it lies: maps in the kernel, copies in user space.

use crate::abi::{
    Backend, Egress, Features, Interface, PortRule, PrefixLengths, TableWord, Vip4Bucket, Vip6Bucket, VipWord,
};
use crate::allowance::Answer;
use crate::outcome::Outcome;
use crate::slots::Slot;

/// The tables of the balancer. `None` means "no such row": sizes of maps contradict each other.
pub trait Tables {
    /// Constant while a program is loaded: branches on it vanish.
    fn features(&self) -> Features;
    /// Key `index` (below `HASH_KEYS`) of the flow hash; constant while a program is loaded.
    fn hash_key(&self, index: usize) -> u64;

    fn vip_word4(&self) -> VipWord;
    fn vip_word6(&self) -> VipWord;
    fn vip4_bucket(&self, row: u32) -> Option<&Vip4Bucket>;
    fn vip6_bucket(&self, row: u32) -> Option<&Vip6Bucket>;
    /// Word `index` (below `FILTER_WORDS`) of the filter.
    fn vip_filter(&self, index: u32) -> u64;
    fn prefix_lengths4(&self) -> PrefixLengths;
    fn prefix_lengths6(&self) -> PrefixLengths;
    /// Rule `index`, counted over the whole map.
    fn port_rule(&self, index: u32) -> Option<&PortRule>;

    fn table_word(&self, table: u16) -> Option<TableWord>;
    /// Slot `index` of the table that begins at `first_row`, loaded once and whole.
    fn slot(&self, first_row: u32, index: u32) -> Option<Slot>;
    fn backend(&self, id: u16) -> Option<&Backend>;
    fn egress(&self, row: u16) -> Option<&Egress>;
    fn interface(&self, ifindex: u32) -> Option<&Interface>;

    /// Whether one more message of this kind may be sent now.
    fn admit(&self, answer: Answer) -> bool;

    fn count_outcome(&self, outcome: Outcome);
    /// One packet of `bytes` bytes of IP.
    fn count_vip(&self, vip: u32, bytes: u64);
    fn count_backend(&self, id: u16, bytes: u64);
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::abi::HASH_KEYS;

    /// Tables with keys and nothing else.
    pub struct Constant {
        keys: [u64; HASH_KEYS],
    }

    impl Constant {
        pub fn seeded(seed: u64) -> Self {
            Self { keys: crate::flow::keys(seed) }
        }
    }

    impl Tables for Constant {
        fn features(&self) -> Features {
            Features::default()
        }
        fn hash_key(&self, index: usize) -> u64 {
            self.keys[index]
        }
        fn vip_word4(&self) -> VipWord {
            VipWord::default()
        }
        fn vip_word6(&self) -> VipWord {
            VipWord::default()
        }
        fn vip4_bucket(&self, _: u32) -> Option<&Vip4Bucket> {
            None
        }
        fn vip6_bucket(&self, _: u32) -> Option<&Vip6Bucket> {
            None
        }
        fn vip_filter(&self, _: u32) -> u64 {
            0
        }
        fn prefix_lengths4(&self) -> PrefixLengths {
            PrefixLengths::default()
        }
        fn prefix_lengths6(&self) -> PrefixLengths {
            PrefixLengths::default()
        }
        fn port_rule(&self, _: u32) -> Option<&PortRule> {
            None
        }
        fn table_word(&self, _: u16) -> Option<TableWord> {
            None
        }
        fn slot(&self, _: u32, _: u32) -> Option<Slot> {
            None
        }
        fn backend(&self, _: u16) -> Option<&Backend> {
            None
        }
        fn egress(&self, _: u16) -> Option<&Egress> {
            None
        }
        fn interface(&self, _: u32) -> Option<&Interface> {
            None
        }
        fn admit(&self, _: Answer) -> bool {
            false
        }
        fn count_outcome(&self, _: Outcome) {}
        fn count_vip(&self, _: u32, _: u64) {}
        fn count_backend(&self, _: u16, _: u64) {}
    }
}
