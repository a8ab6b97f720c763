//! The Internet checksum (RFC 1071), in the memory order of the wire: the sum is independent of byte
//! order (section 2 B), so nothing is swapped.

/// Adds the carries back until 16 bits are left.
#[inline(always)]
pub const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// Both halves of a word.
#[inline(always)]
pub const fn halves(word: u32) -> u32 {
    (word & 0xffff) + (word >> 16)
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_folded_sum_equals_the_textbook_one(words in proptest::collection::vec(any::<u32>(), 0..64)) {
            let sum = words.iter().map(|&w| halves(w)).sum();
            let mut textbook: u64 = words.iter().map(|&w| u64::from(w & 0xffff) + u64::from(w >> 16)).sum();
            while textbook > 0xffff {
                textbook = (textbook & 0xffff) + (textbook >> 16);
            }
            prop_assert_eq!(u64::from(fold(sum)), textbook);
        }
    }
}
