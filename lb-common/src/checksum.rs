//! The Internet checksum (RFC 1071), in the memory order of the wire: the sum is independent of byte
//! order (section 2 B), so nothing is swapped.

use crate::wire::Address6;

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

/// Both addresses of a pseudo header take part as 16-bit words.
#[inline(always)]
pub const fn address6(address: Address6) -> u32 {
    let (high, low) = (address.high, address.low);
    halves(high as u32) + halves((high >> 32) as u32) + halves(low as u32) + halves((low >> 32) as u32)
}

/// What added to `sum` gives nothing (in ones' complement: all ones).
#[inline(always)]
pub const fn negative(sum: u32) -> u32 {
    !fold(sum) as u32
}

/// The checksum after one of the words under it changed (RFC 1624, equation 3).
///
/// Never 0: all ones is as right, also where everything under it has become zero, of which the equation
/// knows nothing.
#[inline(always)]
pub const fn updated(checksum: u16, before: u16, after: u16) -> u16 {
    let checksum = !fold(!checksum as u32 + !before as u32 + after as u32);
    if checksum == 0 { 0xffff } else { checksum }
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

        #[test]
        fn a_sum_and_its_negative_make_nothing(words in proptest::collection::vec(any::<u32>(), 0..64)) {
            let sum = words.iter().map(|&w| halves(w)).sum();
            prop_assert_eq!(fold(sum + negative(sum)), 0xffff);
        }
    }

    /// Every checksum that a message can have, for the change that an echo reply makes.
    #[test]
    fn an_updated_checksum_verifies_for_all_65536_messages() {
        for content in 0..=u16::MAX {
            for (before, after) in [(0x0008, 0x0000), (0x0080, 0x0081)] {
                let checksum = !fold(u32::from(before) + u32::from(content));
                let new = updated(checksum, before, after);
                let sum = fold(u32::from(after) + u32::from(content) + u32::from(new));
                assert_eq!(sum, 0xffff, "content {content:#06x}, {before:#06x} to {after:#06x}");
            }
        }
    }
}
