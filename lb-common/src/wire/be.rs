//! Integers in network byte order.

/// A 16-bit field in network byte order.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Be16(u16);

/// A 32-bit field in network byte order.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Be32(u32);

macro_rules! big_endian {
    ($name:ident, $int:ty) => {
        impl $name {
            #[inline(always)]
            pub const fn new(value: $int) -> Self {
                Self(value.to_be())
            }

            #[inline(always)]
            pub const fn get(self) -> $int {
                <$int>::from_be(self.0)
            }

            /// The integer whose memory is the wire bytes: for comparing, hashing and checksums.
            #[inline(always)]
            pub const fn raw(self) -> $int {
                self.0
            }

            #[inline(always)]
            pub const fn from_raw(raw: $int) -> Self {
                Self(raw)
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, "{:#x}", self.get())
            }
        }
    };
}

big_endian!(Be16, u16);
big_endian!(Be32, u32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_in_wire_order() {
        assert_eq!(Be16::new(0x1234).raw().to_ne_bytes(), [0x12, 0x34]);
        assert_eq!(Be32::new(0x1234_5678).raw().to_ne_bytes(), [0x12, 0x34, 0x56, 0x78]);
        assert_eq!(Be16::new(0x1234).get(), 0x1234);
        assert_eq!(Be32::from_raw(Be32::new(7).raw()).get(), 7);
    }
}
