//! The first four bytes that TCP (RFC 9293) and UDP (RFC 768) share, and the flags of TCP.

use super::header;

/// Both ports as one word: the source port in the lower, the destination port in the upper half,
/// each in network byte order.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    pub both: u32,
}

header!(Ports, 4);

impl Ports {
    /// The shortest transport header that carries ports (UDP), bytes.
    pub const SHORTEST_TRANSPORT: usize = 8;

    pub const fn new(source: u16, destination: u16) -> Self {
        Self { both: source.to_be() as u32 | (destination.to_be() as u32) << 16 }
    }

    pub const fn source(self) -> u16 {
        u16::from_be(self.both as u16)
    }

    pub const fn destination(self) -> u16 {
        u16::from_be((self.both >> 16) as u16)
    }
}

/// Data offset and flags of a TCP header (RFC 9293, section 3.1).
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TcpFlags {
    pub data_offset: u8,
    pub flags: u8,
}

header!(TcpFlags, 2);

impl TcpFlags {
    /// Where they lie in the header.
    pub const OFFSET: usize = 12;
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 1 << 1;
    pub const RST: u8 = 1 << 2;
    pub const ACK: u8 = 1 << 4;
}
