//! IPv4 (RFC 791).

use super::{Be16, Be32, header};
use crate::checksum::halves;

/// The fixed part of the header; options follow it.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct Ipv4 {
    /// Version in the upper, header length in 32-bit words in the lower four bits.
    pub version_ihl: u8,
    /// DSCP and ECN (RFC 2474, RFC 3168).
    pub tos: u8,
    /// Header and payload, bytes.
    pub total_length: Be16,
    pub identification: Be16,
    /// Three flags, then the offset of the fragment in units of eight bytes.
    pub fragment: Be16,
    pub ttl: u8,
    pub protocol: u8,
    pub checksum: Be16,
    pub source: Be32,
    pub destination: Be32,
}

header!(Ipv4, 20);

pub const IPV4_DONT_FRAGMENT: Be16 = Be16::new(0x4000);

/// More-fragments and the offset: neither is set in a packet that is whole.
const FRAGMENT_MASK: Be16 = Be16::new(0x3fff);
const FRAGMENT_OFFSET: Be16 = Be16::new(0x1fff);

impl Ipv4 {
    /// Bytes of the header with its options; 0 to 60, below 20 is malformed.
    #[inline(always)]
    pub const fn header_length(&self) -> usize {
        ((self.version_ihl & 0x0f) as usize) << 2
    }

    #[inline(always)]
    pub const fn version(&self) -> u8 {
        self.version_ihl >> 4
    }

    /// Whether this is a fragment, the first one included.
    #[inline(always)]
    pub const fn is_fragment(&self) -> bool {
        self.fragment.raw() & FRAGMENT_MASK.raw() != 0
    }

    /// Whether this is a fragment, and not the first: what follows is no transport header.
    #[inline(always)]
    pub const fn is_later_fragment(&self) -> bool {
        self.fragment.raw() & FRAGMENT_OFFSET.raw() != 0
    }

    /// The checksum's sum over a header without options, its checksum left out.
    #[inline(always)]
    pub const fn sum(&self) -> u32 {
        let first = self.version_ihl as u32 | (self.tos as u32) << 8;
        let hops = self.ttl as u32 | (self.protocol as u32) << 8;
        first
            + self.total_length.raw() as u32
            + self.identification.raw() as u32
            + self.fragment.raw() as u32
            + hops
            + halves(self.source.raw())
            + halves(self.destination.raw())
    }
}
