//! UDP (RFC 768).

use super::{Be16, header};

#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct Udp {
    pub source: Be16,
    pub destination: Be16,
    /// Header and payload, bytes.
    pub length: Be16,
    /// 0 says that there is none.
    pub checksum: Be16,
}

header!(Udp, 8);
