//! The first bytes of a QUIC packet: what all versions have in common (RFC 8999), and which packets of versions 1 and
//! 2 are Initial ones (RFC 9000, section 17.2; RFC 9369, section 3.2).

use super::{Be32, header};

/// A short header (RFC 8999, section 5.2) with the beginning of its destination connection ID, of which only the
/// server that gave it out knows the length.
///
/// Where the connection ID is routable there are at least four bytes behind its server ID (the nonce), and in versions
/// 1 and 2 twenty more (RFC 9001, section 5.4.2): 18 are there.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct QuicShort {
    pub form: u8,
    /// The first octet of the connection ID.
    pub first_octet: u8,
    /// What follows it, in wire order.
    pub low: u64,
    pub high: u64,
}

header!(QuicShort, 18);

impl QuicShort {
    /// Whether it is one: the rest holds only then.
    #[inline(always)]
    pub const fn is_short(&self) -> bool {
        self.form & QuicLong::FORM == 0
    }
}

/// How a long header begins (RFC 8999, section 5.1).
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct QuicLong {
    pub form: u8,
    pub version: Be32,
}

header!(QuicLong, 5);

impl QuicLong {
    const FORM: u8 = 0x80;
    const TYPE: u8 = 0x30;

    pub const VERSION_1: u32 = 1;
    pub const VERSION_2: u32 = 0x6b33_43cf;

    /// Whether a client opens a connection with it. The bit that versions 1 and 2 fix is not looked at: a client may
    /// clear it (RFC 9287).
    #[inline(always)]
    pub const fn is_initial(&self) -> bool {
        let kind = self.form & (Self::FORM | Self::TYPE);
        let version = self.version.get();
        (version == Self::VERSION_1 && kind == Self::FORM)
            || (version == Self::VERSION_2 && kind == Self::FORM | 0x10)
    }
}
