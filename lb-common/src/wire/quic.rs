//! The first bytes of a QUIC packet: what all versions have in common (RFC 8999), and which packets of versions 1 and
//! 2 are Initial ones (RFC 9000, section 17.2; RFC 9369, section 3.2).

use super::{Be32, header};

/// The beginning of a destination connection ID that is routable: behind its server ID there are at least four bytes,
/// the nonce, so that this much is there whatever its length.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct ConnectionId {
    pub first_octet: u8,
    /// What follows it, in wire order.
    pub low: u64,
    pub high: u64,
}

header!(ConnectionId, 17);

const LONG: u8 = 0x80;

/// A short header (RFC 8999, section 5.2). Only the server that gave the connection ID out knows how long it is. In
/// versions 1 and 2 twenty more bytes follow (RFC 9001, section 5.4.2).
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct QuicShort {
    pub form: u8,
    pub destination: ConnectionId,
}

header!(QuicShort, 18);

impl QuicShort {
    /// Whether it is one: the rest holds only then.
    #[inline(always)]
    pub const fn is_short(&self) -> bool {
        self.form & LONG == 0
    }
}

/// A long header (RFC 8999, section 5.1). A datagram with an Initial packet of a client has 1200 bytes and more (RFC
/// 9000, section 14.1).
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct QuicLong {
    pub form: u8,
    pub version: Be32,
    /// Bytes of the destination connection ID, of which more or fewer than those of the next field may be there.
    pub destination_length: u8,
    pub destination: ConnectionId,
}

header!(QuicLong, 23);

impl QuicLong {
    const TYPE: u8 = 0x30;

    pub const VERSION_1: u32 = 1;
    pub const VERSION_2: u32 = 0x6b33_43cf;

    /// Whether a client begins a connection with such packets. The bit that versions 1 and 2 fix is not looked at: a
    /// client may clear it (RFC 9287).
    #[inline(always)]
    pub const fn is_initial(&self) -> bool {
        let kind = self.form & (LONG | Self::TYPE);
        let version = self.version.get();
        (version == Self::VERSION_1 && kind == LONG) || (version == Self::VERSION_2 && kind == LONG | 0x10)
    }
}
