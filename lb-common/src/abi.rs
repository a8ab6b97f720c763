//! Map names, keys, values and sizes: what kernel and agent agree on, byte for byte.
//!
//! Everything that the packet path reads is a row of one cache line (64 bytes) in an array that the
//! agent maps into its memory, or one word that the agent stores whole. A change that alters a
//! layout here, or the meaning of a field, raises `ABI_VERSION`.

use crate::wire::{Address6, Be16, Mac};

/// Version of the layouts in this file. Pinned maps of another version are not adopted.
pub const ABI_VERSION: u32 = 1;

/// Names of the maps, which are their names in the object, in the kernel (15 bytes at most) and below the pin directory.
pub mod map {
    pub const META: &str = "XLB_META";
    pub const VIP_WORDS: &str = "XLB_VIP_WORDS";
    pub const VIPS4: &str = "XLB_VIPS4";
    pub const VIPS6: &str = "XLB_VIPS6";
    pub const TABLES: &str = "XLB_TABLES";
    pub const TABLE_STATES: &str = "XLB_TABLE_STATE";
    pub const SLOTS: &str = "XLB_SLOTS";
    pub const BACKENDS: &str = "XLB_BACKENDS";
    pub const EGRESS: &str = "XLB_EGRESS";
    pub const INTERFACES: &str = "XLB_INTERFACES";
    pub const OUTCOMES: &str = "XLB_OUTCOMES";
    pub const VIP_TRAFFIC: &str = "XLB_VIP_TRAFFIC";
    pub const BACKEND_TRAFFIC: &str = "XLB_BE_TRAFFIC";

    /// Decapsulation on a backend.
    pub const DECAP_VIPS: &str = "XLB_DECAP_VIPS";
    pub const DECAP_FROM4: &str = "XLB_DECAP_FROM4";
    pub const DECAP_FROM6: &str = "XLB_DECAP_FROM6";
    pub const DECAP_OUTCOMES: &str = "XLB_DECAP_OUT";
}

/// Names of load-time constants in the objects.
pub mod constant {
    pub const CONSTANTS: &str = "CONSTANTS";
    pub const BENCH: &str = "BENCH";
}

/// Rows of `XLB_OUTCOMES`: room for outcomes to come, so that counters survive an upgrade.
pub const OUTCOME_ROWS: u32 = 256;

/// A word that is stored and loaded whole, and read field by field.
macro_rules! word {
    ($($name:ident),*) => {
        $(impl $name {
            #[inline(always)]
            pub const fn from_bits(bits: u64) -> Self {
                Self(bits)
            }

            #[inline(always)]
            pub const fn bits(self) -> u64 {
                self.0
            }
        })*
    };
}

word!(Features, VipWord, TableWord, Path);

/// Features of a loaded program. A feature that is off costs nothing: the verifier removes it.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Features(u64);

impl Features {
    pub const IPV4: Self = Self(1 << 0);
    pub const IPV6: Self = Self(1 << 1);
    pub const IPIP4: Self = Self(1 << 2);
    pub const IPIP6: Self = Self(1 << 3);
    pub const L2: Self = Self(1 << 4);
    pub const VIP_ARP: Self = Self(1 << 5);
    pub const TRACE: Self = Self(1 << 6);
    pub const ALL: &[(Self, &str)] = &[
        (Self::IPV4, "ipv4"),
        (Self::IPV6, "ipv6"),
        (Self::IPIP4, "ipip4"),
        (Self::IPIP6, "ipip6"),
        (Self::L2, "l2"),
        (Self::VIP_ARP, "vip_arp"),
        (Self::TRACE, "trace"),
    ];

    #[inline(always)]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Load-time constants of the balancer program.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Constants {
    pub features: u64,
    /// Keys of the flow hash, derived from the cluster seed (`flow::keys`).
    pub hash_keys: [u64; HASH_KEYS],
}

/// Number of 64-bit keys of the flow hash.
pub const HASH_KEYS: usize = 10;

const _: () = assert!(size_of::<Constants>() == 88);

/// `XLB_META`, row 0: what an agent compares before it adopts pinned maps.
/// Written once when the maps are made; the packet path does not read it.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Meta {
    pub abi_version: u32,
    pub hash_version: u32,
    pub table_version: u32,
    pub reserved: u32,
    pub seed: u64,
    /// Features of the program that is attached.
    pub features: u64,
    pub spare: [u64; 4],
}

const _: () = assert!(size_of::<Meta>() == 64);

/// Which set of VIP buckets is live: seed, first row, number of buckets. One store swaps the set.
///
/// Bits 0-31 the seed, 32-55 the first row, 56-63 the logarithm of the number of buckets. Zero
/// names the one bucket in row 0, which is always empty: so an absent set needs no test.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct VipWord(u64);

impl VipWord {
    pub const fn new(seed: u32, first_row: u32, log2_buckets: u32) -> Self {
        Self(seed as u64 | (first_row as u64 & 0xff_ffff) << 32 | (log2_buckets as u64) << 56)
    }

    #[inline(always)]
    pub const fn seed(self) -> u32 {
        self.0 as u32
    }

    pub const fn first_row(self) -> u32 {
        (self.0 >> 32) as u32 & 0xff_ffff
    }

    pub const fn log2_buckets(self) -> u32 {
        (self.0 >> 56) as u32
    }

    /// The row of the bucket that `hash` belongs to.
    #[inline(always)]
    pub const fn row(self, hash: u32) -> u32 {
        self.first_row() + (((hash as u64) << (self.log2_buckets() & 31)) >> 32) as u32
    }
}

/// Index of a family's word in `XLB_VIP_WORDS`.
pub const VIP_WORD_V4: u32 = 0;
pub const VIP_WORD_V6: u32 = 1;

/// A port in network byte order in the upper half, the protocol in the lowest byte.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Hash)]
pub struct PortKey(pub u32);

impl PortKey {
    /// The entry that says "this address is a VIP", whatever port and protocol: 255 is no protocol (IANA: reserved).
    pub const ADDRESS: Self = Self(255);

    pub const fn new(port: u16, protocol: u8) -> Self {
        Self((port.to_be() as u32) << 16 | protocol as u32)
    }

    /// From both ports as they lie in the packet.
    #[inline(always)]
    pub const fn from_ports(both: u32, protocol: u8) -> Self {
        Self(both & 0xffff_0000 | protocol as u32)
    }

    pub const fn port(self) -> u16 {
        u16::from_be((self.0 >> 16) as u16)
    }

    pub const fn protocol(self) -> u8 {
        self.0 as u8
    }
}

/// What a VIP leads to. All zero is an empty place: no key is zero.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Vip4 {
    /// The address, memory in wire order.
    pub address: u32,
    pub key: PortKey,
    pub target: VipTarget,
}

#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Vip6 {
    pub high: u64,
    pub low: u64,
    pub key: PortKey,
    pub spare: u32,
    pub target: VipTarget,
}

/// The table of a VIP and the row of its counters.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct VipTarget {
    pub table: u16,
    /// None is defined yet.
    pub flags: u16,
    pub vip: u32,
}

pub const VIP4_WAYS: usize = 4;
pub const VIP6_WAYS: usize = 2;

/// A row of `XLB_VIPS4`: (address, port, protocol) -> target.
///
/// Written by the agent into rows that no word names, then made live by one store of the word:
/// a packet sees the old set or the new one. Row 0 stays empty.
#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Vip4Bucket(pub [Vip4; VIP4_WAYS]);

/// A row of `XLB_VIPS6`; as `Vip4Bucket`.
#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Vip6Bucket(pub [Vip6; VIP6_WAYS]);

const _: () = assert!(size_of::<Vip4Bucket>() == 64 && size_of::<Vip6Bucket>() == 64);

/// Where a table lies: bits 0-31 its first row in `XLB_SLOTS`, 32-39 the logarithm of its length.
///
/// One store grows or moves a table. Zero names slot 0, which is never written: no table means
/// nobody, without a test.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct TableWord(u64);

impl TableWord {
    pub const fn new(first_row: u32, log2_length: u32) -> Self {
        Self(first_row as u64 | (log2_length as u64) << 32)
    }

    #[inline(always)]
    pub const fn first_row(self) -> u32 {
        self.0 as u32
    }

    pub const fn log2_length(self) -> u32 {
        (self.0 >> 32) as u32 & 0xff
    }

    pub const fn length(self) -> u32 {
        1 << (self.log2_length() & 31)
    }

    /// The place in the table that `hash` belongs to: its top bits, so that a slot of one length is
    /// exactly four slots of the next.
    #[inline(always)]
    pub const fn slot(self, hash: u32) -> u32 {
        (((hash as u64) << (self.log2_length() & 31)) >> 32) as u32
    }
}

/// Table lengths: 4096 x 4^k.
pub const SHORTEST_TABLE_LOG2: u32 = 12;
pub const LONGEST_TABLE_LOG2: u32 = 20;

/// `XLB_TABLE_STATE`: what the agent and the slow path keep for a table, apart from its word so that
/// writing here does not disturb the readers of the word.
#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct TableState {
    /// Fingerprint of (pool, protocol, scheduler); 0 is a free row.
    pub identity: u64,
    /// Pins that could not be made. Not written yet.
    pub failed: u64,
    /// Not 0 while the agent moves `est`. Not written yet.
    pub closing: u64,
    pub spare: [u64; 5],
}

const _: () = assert!(size_of::<TableState>() == 64);

/// Slots in a row of `XLB_SLOTS`.
pub const SLOTS_PER_ROW: u32 = 16;

/// A row of `XLB_SLOTS`: sixteen slot words (`slots::Slot`), each stored whole.
#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct SlotRow(pub [u32; SLOTS_PER_ROW as usize]);

/// Backend ids are 15 bits; 0 is nobody, the highest stands for the host's own stack.
pub const BACKEND_NOBODY: u16 = 0;
pub const BACKEND_PASS: u16 = 0x7fff;
pub const MOST_BACKENDS: u32 = 0x7ffe;

/// How packets get to a backend; the number is `Backend::kind`.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BackendKind {
    /// A free row, and the row of id 0.
    Nobody = 0,
    /// The row of `BACKEND_PASS`.
    Pass = 1,
    /// IP-in-IP to an IPv4 address.
    Ipip4 = 2,
    /// IP-in-IP to an IPv6 address.
    Ipip6 = 3,
    /// Destination MAC rewritten.
    L2 = 4,
}

impl BackendKind {
    /// `None` for a number that this version does not know.
    #[inline(always)]
    pub const fn from_raw(raw: u8) -> Option<Self> {
        match raw {
            0 => Some(Self::Nobody),
            1 => Some(Self::Pass),
            2 => Some(Self::Ipip4),
            3 => Some(Self::Ipip6),
            4 => Some(Self::L2),
            _ => None,
        }
    }
}

/// The next hop of a backend in one word, so that it changes whole: bits 0-47 the MAC, 48-63 the row
/// in `XLB_EGRESS`; 0 is unresolved.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Path(u64);

impl Path {
    pub const fn new(mac: Mac, egress: u16) -> Self {
        Self(mac.bits() | (egress as u64) << 48)
    }

    #[inline(always)]
    pub const fn mac(self) -> Mac {
        Mac::from_bits(self.0)
    }

    #[inline(always)]
    pub const fn egress(self) -> u16 {
        (self.0 >> 48) as u16
    }
}

/// A row of `XLB_BACKENDS`, by backend id.
///
/// Written by the agent before any slot names the id. While a slot does, only `path` and `flags`
/// change, each by one store; everything else is the backend's identity, and another identity is
/// another id. The row is also the reservation of its id across restarts.
#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Backend {
    pub path: u64,
    /// `BackendKind`.
    pub kind: u8,
    /// `Backend::ACCEPTING` and others to come.
    pub flags: u8,
    /// Sum over the outer IPv4 header's constant fields (`encap::outer_sum`), not complemented.
    pub outer_sum: u16,
    /// Port to rewrite or to send the tunnel to; 0 where the kind has none.
    pub port: Be16,
    pub reserved: u16,
    /// The backend's address; IPv4 in the first four bytes of memory, the rest zero.
    pub address: [u64; 2],
    /// Fingerprint of what the backend is (pool, address, kind): how a restart finds its id again.
    pub identity: u64,
    pub spare: [u64; 3],
}

const _: () = assert!(size_of::<Backend>() == 64);

impl Backend {
    /// Takes new flows. Always set in this version, which makes no pins that would ask.
    pub const ACCEPTING: u8 = 1;

    #[inline(always)]
    pub const fn address4(&self) -> u32 {
        self.address[0] as u32
    }

    #[inline(always)]
    pub const fn address6(&self) -> Address6 {
        Address6 { high: self.address[0], low: self.address[1] }
    }
}

/// A row of `XLB_EGRESS`: one way out of the host, shared by all backends behind it.
///
/// Immutable while a backend's path names it: a change fills another row and moves the paths. Row 0
/// is never filled: its interface index is 0, which is no interface.
#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Egress {
    pub ifindex: u32,
    /// Longest IP packet on this way, bytes.
    pub mtu: u32,
    /// Source MAC (`Mac` bits).
    pub source_mac: u64,
    /// Outer IPv4 source; bits of the mask come from the flow hash. Memory in wire order.
    pub source4: u32,
    pub source4_mask: u32,
    /// Outer IPv6 source; the mask is for the lower half.
    pub source6: [u64; 2],
    pub source6_mask: u64,
    pub spare: [u64; 2],
}

const _: () = assert!(size_of::<Egress>() == 64);

/// `XLB_INTERFACES`, interface index -> what xlb knows of an interface it is attached to.
/// Written when a program is attached; read to answer for VIPs and to judge oversize frames.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Interface {
    pub mac: u64,
    pub mtu: u32,
    pub flags: u32,
}

impl Interface {
    /// The program runs in generic mode.
    pub const GENERIC: u32 = 1;
    /// GRO was on before xlb turned it off, and is turned on again by `xlb detach`.
    pub const RESTORE_GRO: u32 = 2;
}

/// Interfaces that one host can attach.
pub const MOST_INTERFACES: u32 = 64;

/// Packets, and bytes of IP as they came from the client (no Ethernet, no tunnel header).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Traffic {
    pub packets: u64,
    pub bytes: u64,
}

/// A pin: the backend of one flow while its slot is on the move, in one word. The layout is laid
/// down; this version makes no pins.
///
/// Bits 0-14 backend, 15 confirmed (something but a SYN was seen), 16-31 age (seconds, wrapping),
/// 32-63 tag of the flow. Zero is a free place; a tag is never zero.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Pin(u64);

impl Pin {
    pub const fn new(tag: u32, backend: u16, confirmed: bool, age: u16) -> Self {
        Self((backend & 0x7fff) as u64 | (confirmed as u64) << 15 | (age as u64) << 16 | (tag as u64) << 32)
    }

    pub const fn bits(self) -> u64 {
        self.0
    }

    pub const fn backend(self) -> u16 {
        self.0 as u16 & 0x7fff
    }

    pub const fn confirmed(self) -> bool {
        self.0 & 1 << 15 != 0
    }

    pub const fn age(self) -> u16 {
        (self.0 >> 16) as u16
    }

    pub const fn tag(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

pub const PINS_PER_BUCKET: usize = 8;

/// One cache line of pins.
#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct PinBucket(pub [Pin; PINS_PER_BUCKET]);

const _: () = assert!(size_of::<PinBucket>() == 64);

/// Key of `XLB_DECAP_VIPS`: an inner destination that is let through; IPv4 as `::ffff:a.b.c.d`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DecapVip(pub [u64; 2]);

impl DecapVip {
    /// `address` as it lies in memory, in wire order.
    #[inline(always)]
    pub const fn v4(address: u32) -> Self {
        Self([0, 0xffff_0000 | (address as u64) << 32])
    }

    #[inline(always)]
    pub const fn v6(address: Address6) -> Self {
        Self([address.high, address.low])
    }
}

/// Words of the frame that the bench driver restores.
pub const BENCH_WORDS: usize = 10;

/// Load-time constants of the bench driver.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bench {
    /// The frame, in wire order.
    pub template: [u64; BENCH_WORDS],
    /// Different flows: their number is laid over the four bytes at `source_offset`.
    pub flows: u64,
    pub source_offset: u64,
    /// Different destinations, likewise. 1 leaves the template's.
    pub destinations: u64,
    pub destination_offset: u64,
}

#[cfg(feature = "user")]
mod user {
    macro_rules! pod {
        ($($name:ty),*) => {
            // SAFETY: repr(C) or transparent, integers only, no padding (sizes are asserted above).
            $(unsafe impl aya::Pod for $name {})*
        };
    }
    pod!(super::Bench, super::Meta, super::Constants, super::Interface, super::Traffic, super::DecapVip);
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;

    #[test]
    fn words_hold_their_fields_apart() {
        let word = VipWord::new(0xffff_ffff, 0xab_cdef, 20);
        assert_eq!((word.seed(), word.first_row(), word.log2_buckets()), (0xffff_ffff, 0xab_cdef, 20));
        let word = TableWord::new(0xffff_fff0, 20);
        assert_eq!((word.first_row(), word.log2_length(), word.length()), (0xffff_fff0, 20, 1 << 20));
        let mac = Mac::from_bytes([0xff; 6]);
        let path = Path::new(mac, 0xffff);
        assert_eq!((path.mac(), path.egress()), (mac, 0xffff));
        assert_eq!(Path::new(mac, 0).egress(), 0);
        let pin = Pin::new(0xdead_beef, 0x7abc, true, 0x1234);
        assert_eq!(
            (pin.tag(), pin.backend(), pin.confirmed(), pin.age()),
            (0xdead_beef, 0x7abc, true, 0x1234)
        );
    }

    #[test]
    fn zero_words_name_the_reserved_first_place() {
        for hash in [0, 1, u32::MAX] {
            assert_eq!(VipWord::default().row(hash), 0);
            assert_eq!(TableWord::default().slot(hash), 0);
        }
    }

    #[test]
    fn a_slot_of_one_length_is_four_of_the_next() {
        for hash in [0, 0x1234_5678, 0x8000_0000, u32::MAX] {
            let mut log2 = SHORTEST_TABLE_LOG2;
            while log2 < LONGEST_TABLE_LOG2 {
                let shorter = TableWord::new(0, log2).slot(hash);
                let longer = TableWord::new(0, log2 + 2).slot(hash);
                assert_eq!(longer >> 2, shorter);
                log2 += 2;
            }
        }
    }

    #[test]
    fn port_keys_from_the_packet_and_from_the_agent_are_equal() {
        let ports = crate::wire::Ports::new(40000, 443);
        assert_eq!(PortKey::from_ports(ports.both, 6), PortKey::new(443, 6));
        assert_eq!(PortKey::new(443, 17).port(), 443);
        assert_eq!(PortKey::new(443, 17).protocol(), 17);
    }

    #[test]
    fn a_v4_decap_key_is_the_mapped_v6_address() {
        let address = u32::from_ne_bytes([192, 0, 2, 7]);
        let mapped = core::net::Ipv4Addr::new(192, 0, 2, 7).to_ipv6_mapped().octets();
        assert_eq!(DecapVip::v4(address), DecapVip::v6(Address6::from_bytes(mapped)));
    }

    #[test]
    fn map_names_fit_the_kernel() {
        for name in [map::META, map::VIP_WORDS, map::TABLE_STATES, map::BACKEND_TRAFFIC, map::DECAP_FROM4] {
            assert!(name.len() <= 15, "{name}");
        }
    }
}
