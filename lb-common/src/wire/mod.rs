//! Protocol headers as they lie on the wire. One file per protocol; nothing here knows what a VIP is.
//!
//! Every header is `repr(C, packed)` (alignment 1), made of scalars only, and valid for every bit
//! pattern, so that a checked reference into a frame is all it takes to read one. Multi-byte fields
//! have a big-endian type. MAC and IPv6 addresses are held in integers whose *memory* is the wire
//! order: they are compared, hashed and copied, never calculated with.

mod arp;
mod be;
mod ethernet;
mod icmp;
mod ipv4;
mod ipv6;
mod neighbour;
mod quic;
mod transport;
mod udp;
mod vlan;

pub use arp::Arp;
pub use be::{Be16, Be32};
pub use ethernet::{EtherType, Ethernet, Mac};
pub use icmp::Icmp;
pub use ipv4::{IPV4_DONT_FRAGMENT, Ipv4};
pub use ipv6::{Address6, Extension, Ipv6};
pub use neighbour::Neighbour;
pub use quic::{ConnectionId, QuicLong, QuicShort};
pub use transport::{Ports, TcpFlags};
pub use udp::Udp;
pub use vlan::{Tagged, TaggedTwice};

#[cfg(target_endian = "big")]
compile_error!("the wire types hold addresses in little-endian integers whose memory is the wire order");

/// Protocol numbers (IANA).
pub const PROTO_ICMP: u8 = 1;
pub const PROTO_IPIP: u8 = 4;
pub const PROTO_TCP: u8 = 6;
pub const PROTO_UDP: u8 = 17;
pub const PROTO_IPV6: u8 = 41;
pub const PROTO_ICMPV6: u8 = 58;

/// A header that may be viewed in place.
///
/// # Safety
/// The type has alignment 1, no padding, and is valid for every bit pattern.
pub unsafe trait Header: Copy {
    const LEN: usize = size_of::<Self>();
}

/// Four bytes of anything, to be summed.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct Word {
    pub bits: u32,
}

macro_rules! header {
    ($name:ty, $len:literal) => {
        const _: () = assert!(size_of::<$name>() == $len && align_of::<$name>() == 1);
        // SAFETY: packed, of the asserted size without padding, and made of integers only.
        unsafe impl $crate::wire::Header for $name {}
    };
}
pub(crate) use header;

header!(Word, 4);
