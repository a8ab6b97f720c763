//! IPv6 (RFC 8200).

use super::{Be16, Be32, header};

/// An address as two words whose memory is the wire order.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Address6 {
    pub high: u64,
    pub low: u64,
}

impl Address6 {
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        let mut high = [0; 8];
        let mut low = [0; 8];
        let mut i = 0;
        while i < 8 {
            high[i] = bytes[i];
            low[i] = bytes[i + 8];
            i += 1;
        }
        Self { high: u64::from_ne_bytes(high), low: u64::from_ne_bytes(low) }
    }

    /// An IPv4 address (memory in wire order) as it is written in IPv6 (RFC 4291, section 2.5.5.2).
    #[inline(always)]
    pub const fn mapped(address: u32) -> Self {
        Self { high: 0, low: 0xffff_0000 | (address as u64) << 32 }
    }

    /// The IPv4 address that `mapped` wrote.
    #[inline(always)]
    pub const fn v4(self) -> u32 {
        (self.low >> 32) as u32
    }

    /// `::ffff:0:0/96` (RFC 4291, 2.5.5.2): a way to write IPv4 addresses, never one on the wire.
    #[inline(always)]
    pub const fn is_mapped_v4(self) -> bool {
        self.high == 0 && self.low as u32 == 0xffff_0000
    }

    pub const fn bytes(self) -> [u8; 16] {
        let high = self.high.to_ne_bytes();
        let low = self.low.to_ne_bytes();
        let mut bytes = [0; 16];
        let mut i = 0;
        while i < 8 {
            bytes[i] = high[i];
            bytes[i + 8] = low[i];
            i += 1;
        }
        bytes
    }
}

impl core::fmt::Debug for Address6 {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}", core::net::Ipv6Addr::from(self.bytes()))
    }
}

/// The fixed header; extension headers follow it.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct Ipv6 {
    /// Version (4 bits), traffic class (8), flow label (20).
    pub version_class_flow: Be32,
    /// Everything after this header, bytes.
    pub payload_length: Be16,
    pub next_header: u8,
    pub hop_limit: u8,
    pub source: Address6,
    pub destination: Address6,
}

header!(Ipv6, 40);

impl Ipv6 {
    #[inline(always)]
    pub const fn version(&self) -> u8 {
        (self.version_class_flow.get() >> 28) as u8
    }

    /// DSCP and ECN (RFC 2474, RFC 3168).
    #[inline(always)]
    pub const fn traffic_class(&self) -> u8 {
        (self.version_class_flow.get() >> 20) as u8
    }

    #[inline(always)]
    pub const fn first_word(traffic_class: u8, flow_label: u32) -> Be32 {
        Be32::new(6 << 28 | (traffic_class as u32) << 20 | (flow_label & 0xf_ffff))
    }
}

/// The first eight bytes of an extension header (RFC 8200, section 4).
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct Extension {
    pub next_header: u8,
    /// Of all of it, in units of eight bytes, the first not counted. Not of a fragment header.
    pub length: u8,
    /// Of a routing header, its type and how many addresses are still to be visited; of a fragment
    /// header, offset (13 bits) and more-fragments (the last bit).
    pub word: Be16,
    pub rest: Be32,
}

header!(Extension, 8);

impl Extension {
    pub const HOP_BY_HOP: u8 = 0;
    pub const ROUTING: u8 = 43;
    pub const FRAGMENT: u8 = 44;
    pub const DESTINATION_OPTIONS: u8 = 60;

    /// Bytes of the header, 8 to 2048.
    #[inline(always)]
    pub const fn bytes(&self) -> usize {
        (self.length as usize + 1) * 8
    }

    /// Whether a routing header sends the packet on from here (RFC 8200, section 4.4).
    #[inline(always)]
    pub const fn has_segments_left(&self) -> bool {
        self.word.get() & 0xff != 0
    }

    /// Of a fragment header: an atomic fragment (RFC 6946) is none.
    #[inline(always)]
    pub const fn is_fragment(&self) -> bool {
        self.word.get() & 0xfff9 != 0
    }

    #[inline(always)]
    pub const fn is_later_fragment(&self) -> bool {
        self.word.get() & 0xfff8 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_word_holds_version_class_and_label() {
        let word = Ipv6::first_word(0xb9, 0xfff1_2345).get();
        assert_eq!(word, 0x6b91_2345);
    }

    #[test]
    fn mapped_addresses_are_told_apart() {
        let mapped = core::net::Ipv4Addr::new(192, 0, 2, 7).to_ipv6_mapped();
        assert!(Address6::from_bytes(mapped.octets()).is_mapped_v4());
        for near in ["::192.0.2.7", "::1:ffff:192.0.2.7", "1::ffff:192.0.2.7", "::ffff:0:192.0.2.7"] {
            let near: core::net::Ipv6Addr = near.parse().unwrap();
            assert!(!Address6::from_bytes(near.octets()).is_mapped_v4(), "{near}");
        }
    }

    #[test]
    fn address_bytes_round_trip() {
        let bytes = core::array::from_fn(|i| i as u8);
        assert_eq!(Address6::from_bytes(bytes).bytes(), bytes);
    }
}
