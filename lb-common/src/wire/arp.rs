//! ARP for IPv4 over Ethernet (RFC 826).

use super::{Be16, Be32, Mac, header};

#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct Arp {
    pub hardware: Be16,
    pub protocol: Be16,
    /// Lengths of the hardware and of the protocol address, bytes.
    pub lengths: Be16,
    pub operation: Be16,
    sender_mac_head: u32,
    sender_mac_tail: u16,
    pub sender: Be32,
    target_mac_head: u32,
    target_mac_tail: u16,
    pub target: Be32,
}

header!(Arp, 28);

impl Arp {
    const ETHERNET: Be16 = Be16::new(1);
    const IPV4: Be16 = Be16::new(0x0800);
    const LENGTHS: Be16 = Be16::new(0x0604);
    const REQUEST: Be16 = Be16::new(1);
    const REPLY: Be16 = Be16::new(2);

    #[inline(always)]
    pub fn is_request(&self) -> bool {
        let Self { hardware, protocol, lengths, operation, .. } = *self;
        hardware == Self::ETHERNET
            && protocol == Self::IPV4
            && lengths == Self::LENGTHS
            && operation == Self::REQUEST
    }

    #[inline(always)]
    pub const fn sender_mac(&self) -> Mac {
        Mac::from_bits(self.sender_mac_head as u64 | (self.sender_mac_tail as u64) << 32)
    }

    /// The answer to a request: `sender` is the address that was asked for.
    #[inline(always)]
    pub const fn reply(sender_mac: Mac, sender: Be32, target_mac: Mac, target: Be32) -> Self {
        Self {
            hardware: Self::ETHERNET,
            protocol: Self::IPV4,
            lengths: Self::LENGTHS,
            operation: Self::REPLY,
            sender_mac_head: sender_mac.bits() as u32,
            sender_mac_tail: (sender_mac.bits() >> 32) as u16,
            sender,
            target_mac_head: target_mac.bits() as u32,
            target_mac_tail: (target_mac.bits() >> 32) as u16,
            target,
        }
    }
}
