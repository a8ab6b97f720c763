//! ICMP (RFC 792) and ICMPv6 (RFC 4443): the eight bytes that all messages begin with.

use super::{Be16, Be32, header};

#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct Icmp {
    pub kind: u8,
    pub code: u8,
    pub checksum: Be16,
    /// Identifier and sequence number of an echo, the MTU of "too big", else unused.
    pub rest: Be32,
}

header!(Icmp, 8);

impl Icmp {
    pub const ECHO_REPLY: u8 = 0;
    pub const UNREACHABLE: u8 = 3;
    pub const HOST_UNREACHABLE: u8 = 1;
    pub const PROTOCOL_UNREACHABLE: u8 = 2;
    pub const PORT_UNREACHABLE: u8 = 3;
    /// "Fragmentation needed" (RFC 1191, section 4), a code of `UNREACHABLE`.
    pub const FRAGMENTATION_NEEDED: u8 = 4;
    /// "Communication with destination host administratively prohibited" (RFC 1122, section 3.2.2.1).
    pub const HOST_PROHIBITED: u8 = 10;
    pub const ECHO_REQUEST: u8 = 8;
    pub const TIME_EXCEEDED: u8 = 11;
    pub const PARAMETER_PROBLEM: u8 = 12;

    /// Whether an IPv4 message is an error about a packet, which it carries.
    #[inline(always)]
    pub const fn is_error(&self) -> bool {
        matches!(self.kind, Self::UNREACHABLE | Self::TIME_EXCEEDED | Self::PARAMETER_PROBLEM)
    }
}

/// Types of ICMPv6.
impl Icmp {
    pub const UNREACHABLE6: u8 = 1;
    pub const NO_ROUTE6: u8 = 0;
    pub const PROHIBITED6: u8 = 1;
    pub const PORT_UNREACHABLE6: u8 = 4;
    pub const PACKET_TOO_BIG6: u8 = 2;
    pub const TIME_EXCEEDED6: u8 = 3;
    pub const PARAMETER_PROBLEM6: u8 = 4;
    /// "Unrecognized next header", a code of `PARAMETER_PROBLEM6`.
    pub const NEXT_HEADER6: u8 = 1;
    pub const ECHO_REQUEST6: u8 = 128;
    pub const ECHO_REPLY6: u8 = 129;

    /// RFC 4443, section 2.1: error messages are those below 128; 1 to 4 are defined.
    #[inline(always)]
    pub const fn is_error6(&self) -> bool {
        self.kind >= 1 && self.kind <= 4
    }
}
