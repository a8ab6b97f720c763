//! Frames with VLAN tags (IEEE 802.1Q, 802.1ad). A tag is four bytes: the EtherType that announces it,
//! then priority and VLAN id.

use super::{EtherType, header};

/// A frame with one tag.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct Tagged {
    /// Both MAC addresses.
    pub addresses: [u32; 3],
    pub tag: u32,
    pub ethertype: EtherType,
}

header!(Tagged, 18);

/// A frame with two tags.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct TaggedTwice {
    pub addresses: [u32; 3],
    pub outer: u32,
    pub inner: u32,
    pub ethertype: EtherType,
}

header!(TaggedTwice, 22);
