//! Neighbour solicitation and advertisement with one link-layer address option (RFC 4861, 4.3, 4.4, 4.6.1).

use super::{Address6, Be16, Be32, Mac, header};

/// The ICMPv6 message and the one option that Ethernet hosts send with it.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct Neighbour {
    pub kind: u8,
    pub code: u8,
    pub checksum: Be16,
    /// Advertisement: router, solicited and override in the top three bits.
    pub flags: Be32,
    pub target: Address6,
    pub option_kind: u8,
    /// In units of eight bytes.
    pub option_length: u8,
    mac_head: u32,
    mac_tail: u16,
}

header!(Neighbour, 32);

impl Neighbour {
    const SOLICITATION: u8 = 135;
    const ADVERTISEMENT: u8 = 136;
    const TARGET_LINK_LAYER_ADDRESS: u8 = 2;
    pub const SOLICITED: u32 = 1 << 30;
    pub const OVERRIDE: u32 = 1 << 29;

    #[inline(always)]
    pub const fn is_solicitation(&self) -> bool {
        self.kind == Self::SOLICITATION && self.code == 0
    }

    /// An advertisement whose checksum is still zero.
    #[inline(always)]
    pub const fn advertisement(target: Address6, mac: Mac, flags: u32) -> Self {
        Self {
            kind: Self::ADVERTISEMENT,
            code: 0,
            checksum: Be16::from_raw(0),
            flags: Be32::new(flags),
            target,
            option_kind: Self::TARGET_LINK_LAYER_ADDRESS,
            option_length: 1,
            mac_head: mac.bits() as u32,
            mac_tail: (mac.bits() >> 32) as u16,
        }
    }

    /// The words that a checksum is summed over, in wire memory order.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 8] {
        let target_high = self.target.high;
        let target_low = self.target.low;
        [
            self.kind as u32 | (self.code as u32) << 8 | (self.checksum.raw() as u32) << 16,
            self.flags.raw(),
            target_high as u32,
            (target_high >> 32) as u32,
            target_low as u32,
            (target_low >> 32) as u32,
            self.option_kind as u32 | (self.option_length as u32) << 8 | self.mac_head << 16,
            self.mac_head >> 16 | (self.mac_tail as u32) << 16,
        ]
    }
}
