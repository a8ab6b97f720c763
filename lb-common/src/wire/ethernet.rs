//! Ethernet II (IEEE 802.3).

use super::{Be16, header};

/// A MAC address in the low 48 bits, the first byte on the wire lowest.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Mac(u64);

impl Mac {
    const MASK: u64 = (1 << 48) - 1;
    pub const BROADCAST: Self = Self(Self::MASK);

    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits & Self::MASK)
    }

    #[inline(always)]
    pub const fn bits(self) -> u64 {
        self.0
    }

    pub const fn from_bytes(b: [u8; 6]) -> Self {
        Self(u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], 0, 0]))
    }

    pub const fn bytes(self) -> [u8; 6] {
        let b = self.0.to_le_bytes();
        [b[0], b[1], b[2], b[3], b[4], b[5]]
    }
}

impl core::fmt::Display for Mac {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let b = self.bytes();
        write!(f, "{:02x}:{:02x}:{:02x}:{:02x}:{:02x}:{:02x}", b[0], b[1], b[2], b[3], b[4], b[5])
    }
}

impl core::fmt::Debug for Mac {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(self, f)
    }
}

/// The type of the payload (IEEE 802 numbers).
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EtherType(Be16);

impl EtherType {
    pub const IPV4: Self = Self(Be16::new(0x0800));
    pub const ARP: Self = Self(Be16::new(0x0806));
    pub const IPV6: Self = Self(Be16::new(0x86dd));
    /// A VLAN tag (802.1Q), and the outer one of two (802.1ad).
    pub const VLAN: Self = Self(Be16::new(0x8100));
    pub const QINQ: Self = Self(Be16::new(0x88a8));

    /// The EtherType whose bytes on the wire lie so in memory.
    #[inline(always)]
    pub const fn from_raw(raw: u16) -> Self {
        Self(Be16::from_raw(raw))
    }

    #[inline(always)]
    pub const fn raw(self) -> u16 {
        self.0.raw()
    }

    #[inline(always)]
    pub fn is_vlan(self) -> bool {
        self == Self::VLAN || self == Self::QINQ
    }
}

/// The header: both addresses as two wide words, so that a rewrite is three stores.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct Ethernet {
    /// Destination, then the first two bytes of the source.
    destination_source: u64,
    /// The last four bytes of the source.
    source_tail: u32,
    pub ethertype: EtherType,
}

header!(Ethernet, 14);

impl Ethernet {
    #[inline(always)]
    pub const fn new(destination: Mac, source: Mac, ethertype: EtherType) -> Self {
        Self {
            destination_source: destination.bits() | source.bits() << 48,
            source_tail: (source.bits() >> 16) as u32,
            ethertype,
        }
    }

    #[inline(always)]
    pub const fn destination(&self) -> Mac {
        Mac::from_bits(self.destination_source)
    }

    /// Whether it was sent to more than one station (the group bit of the destination).
    #[inline(always)]
    pub const fn is_group(&self) -> bool {
        self.destination_source & 1 != 0
    }

    #[inline(always)]
    pub const fn source(&self) -> Mac {
        Mac::from_bits(self.destination_source >> 48 | (self.source_tail as u64) << 16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_split_into_two_words() {
        let destination = Mac::from_bytes([1, 2, 3, 4, 5, 6]);
        let source = Mac::from_bytes([0xf7, 8, 9, 10, 11, 0xfc]);
        let header = Ethernet::new(destination, source, EtherType::IPV6);
        assert_eq!(header.destination(), destination);
        assert_eq!(header.source(), source);
    }
}
