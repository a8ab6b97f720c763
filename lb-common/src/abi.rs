//! Map names, keys, values and sizes: what kernel and agent agree on, byte for byte.
//!
//! Everything that the packet path reads is a row of one cache line (64 bytes) in an array that the
//! agent maps into its memory, or one word that the agent stores whole. A change that alters a
//! layout here, or the meaning of a field, raises `ABI_VERSION`.

use core::sync::atomic::AtomicU64;

use crate::wire::{Address6, Be16, Mac};

/// Version of the layouts in this file. Pinned maps of another version are not adopted.
pub const ABI_VERSION: u32 = 6;

/// Names of the maps, which are their names in the object, in the kernel (15 bytes at most) and below the pin directory.
pub mod map {
    pub const META: &str = "XLB_META";
    pub const VIP_INDEX: &str = "XLB_VIP_INDEX";
    pub const VIPS4: &str = "XLB_VIPS4";
    pub const VIPS6: &str = "XLB_VIPS6";
    pub const PORT_RULES: &str = "XLB_PORT_RULES";
    pub const TABLES: &str = "XLB_TABLES";
    pub const TABLE_STATES: &str = "XLB_TABLE_STATE";
    pub const SLOTS: &str = "XLB_SLOTS";
    pub const BACKENDS: &str = "XLB_BACKENDS";
    pub const EGRESS: &str = "XLB_EGRESS";
    pub const INTERFACES: &str = "XLB_INTERFACES";
    pub const SERVERS: &str = "XLB_SERVERS";
    pub const OUTCOMES: &str = "XLB_OUTCOMES";
    pub const VIP_TRAFFIC: &str = "XLB_VIP_TRAFFIC";
    pub const BACKEND_TRAFFIC: &str = "XLB_BE_TRAFFIC";
    pub const PINS: &str = "XLB_PINS";
    pub const LOADS: &str = "XLB_LOADS";
    pub const PIN_EVENTS: &str = "XLB_PIN_EVENTS";
    pub const CONNECTIONS: &str = "XLB_CONNECTIONS";
    pub const RECORDS: &str = "XLB_RECORDS";
    pub const SOURCES: &str = "XLB_SOURCES";
    pub const REPLIES: &str = "XLB_BE_REPLIES";
    /// Not pinned: an allowance is not worth keeping over a change of the program.
    pub const ALLOWANCES: &str = "XLB_ALLOWANCES";

    /// Decapsulation on a backend.
    pub const DECAP_VIPS: &str = "XLB_DECAP_VIPS";
    pub const DECAP_FROM4: &str = "XLB_DECAP_FROM4";
    pub const DECAP_FROM6: &str = "XLB_DECAP_FROM6";
    pub const DECAP_OUTCOMES: &str = "XLB_DECAP_OUT";
}

/// Names of load-time constants in the objects.
pub mod constant {
    pub const CONSTANTS: &str = "CONSTANTS";
    pub const DECAP: &str = "DECAP";
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

word!(Features, VipWord, PrefixLengths, VipTarget, TableWord, Path);

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
    pub const GUE4: Self = Self(1 << 7);
    pub const GUE6: Self = Self(1 << 8);
    /// Frames with VLAN tags are balanced too.
    pub const VLAN: Self = Self(1 << 9);
    /// Some address has port ranges, or any port.
    pub const PORT_RULES: Self = Self(1 << 10);
    /// Some VIP is a prefix.
    pub const PREFIXES: Self = Self(1 << 11);
    /// Some service hashes by source.
    pub const SOURCE_HASH: Self = Self(1 << 12);
    /// Echo requests to VIPs are answered.
    pub const ECHO: Self = Self(1 << 13);
    /// Some service goes by QUIC connection IDs.
    pub const QUIC: Self = Self(1 << 15);
    /// Some pool translates addresses.
    pub const NAT: Self = Self(1 << 16);
    /// Some pool translates the client's address, too.
    pub const FULLNAT: Self = Self(1 << 17);
    pub const ALL: &[(Self, &str)] = &[
        (Self::IPV4, "ipv4"),
        (Self::IPV6, "ipv6"),
        (Self::IPIP4, "ipip4"),
        (Self::IPIP6, "ipip6"),
        (Self::L2, "l2"),
        (Self::VIP_ARP, "vip_arp"),
        (Self::TRACE, "trace"),
        (Self::GUE4, "gue4"),
        (Self::GUE6, "gue6"),
        (Self::VLAN, "vlan"),
        (Self::PORT_RULES, "port_rules"),
        (Self::PREFIXES, "prefixes"),
        (Self::SOURCE_HASH, "source_hash"),
        (Self::ECHO, "echo"),
        (Self::QUIC, "quic"),
        (Self::NAT, "nat"),
        (Self::FULLNAT, "fullnat"),
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
    /// ICMP messages of each kind (`allowance::Limited`) that a CPU sends in a second.
    pub icmp_rate: u64,
    /// Pins of each kind (of new flows, of old ones) that a CPU makes in a second.
    pub pin_rate: u64,
    /// Buckets of `XLB_PINS`, a power of two, minus one.
    pub pin_mask: u64,
    /// Buckets of `XLB_CONNECTIONS`, where sources are translated no more than there are ports of sources; from bit 32 on
    /// `Meta::buckets_before`.
    pub connection_buckets: u64,
    /// The lowest port of a source address, and from bit 16 on how many there are.
    pub source_ports: u64,
    /// Keys of the flow hash, derived from the cluster seed (`flow::keys`).
    pub hash_keys: [u64; HASH_KEYS],
}

/// Number of 64-bit keys of the flow hash.
pub const HASH_KEYS: usize = 10;

const _: () = assert!(size_of::<Constants>() == 128);

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
    /// As in `Constants`.
    pub icmp_rate: u64,
    /// As in `Constants`.
    pub pin_rate: u64,
    /// As in `Constants`.
    pub source_ports: u64,
    /// Buckets of `XLB_CONNECTIONS` in the maps before these: connections from there lie where they lay. 0 for none.
    pub buckets_before: u32,
    pub spare: u32,
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

/// The row of `XLB_VIP_INDEX`: what is asked of every packet, in one row, so that one look finds all of it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VipIndex {
    /// `VipWord` and `PrefixLengths` of each family.
    pub words: [u64; VIP_WORDS],
    /// Bits of addresses that may be VIPs (`vips::filter4`, `vips::filter6`). A clear bit says "no VIP". Prefixes have
    /// none. Bits are set before a VIP is live, cleared after.
    pub filter: [u64; FILTER_WORDS],
}

/// Places in `VipIndex::words`.
pub const VIP_WORD_V4: usize = 0;
pub const VIP_WORD_V6: usize = 1;
pub const PREFIX_LENGTHS_V4: usize = 2;
pub const PREFIX_LENGTHS_V6: usize = 3;
pub const VIP_WORDS: usize = 4;

pub const FILTER_WORDS: usize = 1024;

impl VipIndex {
    /// No VIP.
    pub const EMPTY: Self = Self { words: [0; VIP_WORDS], filter: [0; FILTER_WORDS] };

    /// One load: the agent stores words whole, while packets read them.
    #[inline(always)]
    fn load(word: &u64) -> u64 {
        // SAFETY: a reference is valid, aligned and initialised.
        unsafe { core::ptr::read_volatile(word) }
    }

    #[inline(always)]
    pub fn word4(&self) -> VipWord {
        VipWord::from_bits(Self::load(&self.words[VIP_WORD_V4]))
    }

    #[inline(always)]
    pub fn word6(&self) -> VipWord {
        VipWord::from_bits(Self::load(&self.words[VIP_WORD_V6]))
    }

    #[inline(always)]
    pub fn prefix_lengths4(&self) -> PrefixLengths {
        PrefixLengths::from_bits(Self::load(&self.words[PREFIX_LENGTHS_V4]))
    }

    #[inline(always)]
    pub fn prefix_lengths6(&self) -> PrefixLengths {
        PrefixLengths::from_bits(Self::load(&self.words[PREFIX_LENGTHS_V6]))
    }

    /// Word `index` of the filter.
    #[inline(always)]
    pub fn filter(&self, index: usize) -> u64 {
        Self::load(&self.filter[index & (FILTER_WORDS - 1)])
    }
}

const _: () = assert!(FILTER_WORDS.is_power_of_two());
const _: () =
    assert!(size_of::<VipIndex>() == 8224 && core::mem::offset_of!(VipIndex, filter) == VIP_WORDS * 8);

/// Lengths of the prefixes that are VIPs, one in a byte, longest first in the lowest; 0 ends them.
///
/// Grows before the VIP word that brings a new length, and shrinks after it: a length too many finds
/// nothing. So it holds twice as many as a family may have.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct PrefixLengths(u64);

impl PrefixLengths {
    pub const ROOM: u32 = 8;

    /// The length at `index` (below `ROOM`), or 0.
    #[inline(always)]
    pub const fn get(self, index: u32) -> u32 {
        (self.0 >> (index * 8)) as u32 & 0xff
    }
}

/// Different prefix lengths that the VIPs of a family may have.
pub const MOST_PREFIX_LENGTHS: u32 = PrefixLengths::ROOM / 2;

/// A port in network byte order in the upper half, the protocol in the lowest byte; or an entry that is
/// not about one port.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Hash)]
pub struct PortKey(pub u32);

impl PortKey {
    /// The entry that says "this address is a VIP", whatever port and protocol: 255 is no protocol (IANA: reserved).
    pub const ADDRESS: Self = Self(255);
    const PREFIX: u32 = 1 << 8;
    const FRAGMENTS: u32 = 2 << 8;

    /// The entry that says "these addresses are VIPs": the entry's address is masked to `length` bits.
    #[inline(always)]
    pub const fn prefix(length: u32) -> Self {
        Self(Self::PREFIX | length)
    }

    /// The entry that takes fragments of a protocol, which have no ports.
    #[inline(always)]
    pub const fn fragments(protocol: u8) -> Self {
        Self(Self::FRAGMENTS | protocol as u32)
    }

    /// The length of a prefix entry.
    pub const fn prefix_length(self) -> Option<u32> {
        if self.0 & !0xff == Self::PREFIX { Some(self.0 & 0xff) } else { None }
    }

    /// Whether the entry leads to rules, not to a table: it marks an address or a prefix.
    pub const fn is_address(self) -> bool {
        self.0 == Self::ADDRESS.0 || self.prefix_length().is_some()
    }

    pub const fn is_fragments(self) -> bool {
        self.0 & !0xff == Self::FRAGMENTS
    }

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

/// Where a VIP entry leads, in one word.
///
/// Of a service: bits 0-15 the table, 16-31 flags, 32-63 the row of its counters. Of an address or a
/// prefix: bits 0-15 the number of its port rules, 16-31 flags, 32-63 the first of them. Zero is none.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct VipTarget(u64);

impl VipTarget {
    /// Of a service: the flow hash is over the client's address alone.
    pub const SOURCE_HASH: u16 = 1 << 0;
    /// Of a service: packets may belong to connections whose addresses are translated.
    pub const TRANSLATED: u16 = 1 << 1;
    /// Of an address: not a VIP, but one that clients' addresses are translated to. Its number is the first rule.
    pub const SOURCE: u16 = 1 << 0;
    /// Of an address: what no service takes passes to the host's stack.
    pub const UNMAPPED_PASS: u16 = 1 << 1;
    /// Of an address: a port that no service takes is answered with an ICMP error.
    pub const UNMAPPED_REJECT: u16 = 1 << 2;
    /// Of a service: bits 3-9 are the bits that `SOURCE_HASH` cuts off the client's address.
    const PREFIX_CUT: u16 = 3;
    /// Of a service: bits 10-13 are the bytes of the server IDs in its QUIC connection IDs; 0 where it does not look into them.
    const SERVER_ID_SHIFT: u32 = 10;
    const SERVICE: u16 = 1 << 14;
    const ADDRESS: u16 = 1 << 15;
    /// No entry.
    pub const NONE: Self = Self(0);

    const fn new(low: u16, flags: u16, high: u32) -> Self {
        Self(low as u64 | (flags as u64) << 16 | (high as u64) << 32)
    }

    pub const fn service(table: u16, flags: u16, vip: u32) -> Self {
        Self::new(table, flags | Self::SERVICE, vip)
    }

    pub const fn address(rules: u16, flags: u16, first_rule: u32) -> Self {
        Self::new(rules, flags | Self::ADDRESS, first_rule)
    }

    /// The flags that say how many of the lowest bits (0 to 127) of a client's address are not hashed.
    pub const fn prefix_cut(bits: u8) -> u16 {
        (bits as u16 & 0x7f) << Self::PREFIX_CUT
    }

    /// As said by `prefix_cut`.
    #[inline(always)]
    pub const fn cut(self) -> u32 {
        (self.0 >> (16 + Self::PREFIX_CUT)) as u32 & 0x7f
    }

    #[inline(always)]
    pub const fn is_service(self) -> bool {
        self.has(Self::SERVICE)
    }

    #[inline(always)]
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }

    #[inline(always)]
    pub const fn table(self) -> u16 {
        self.0 as u16
    }

    #[inline(always)]
    pub const fn has(self, flag: u16) -> bool {
        self.0 & (flag as u64) << 16 != 0
    }

    #[inline(always)]
    pub const fn flags(self) -> u16 {
        (self.0 >> 16) as u16
    }

    /// Flags of a service whose server IDs have so many bytes (`quic::LONGEST_SERVER_ID` at the most).
    pub const fn server_ids_of(bytes: u8) -> u16 {
        ((bytes & 0xf) as u16) << Self::SERVER_ID_SHIFT
    }

    /// Bytes of the service's server IDs; 0 where it has none.
    #[inline(always)]
    pub const fn server_id_bytes(self) -> u32 {
        (self.0 >> (16 + Self::SERVER_ID_SHIFT)) as u32 & 0xf
    }

    /// One more than the number of the source that the entry stands for; 0 for none.
    #[inline(always)]
    pub const fn source(self) -> u32 {
        if self.has(Self::ADDRESS) && self.has(Self::SOURCE) { self.first_rule() + 1 } else { 0 }
    }

    /// The row of the counters.
    #[inline(always)]
    pub const fn vip(self) -> u32 {
        (self.0 >> 32) as u32
    }

    #[inline(always)]
    pub const fn rules(self) -> u32 {
        self.table() as u32
    }

    #[inline(always)]
    pub const fn first_rule(self) -> u32 {
        self.vip()
    }
}

/// Ports of an address that are no exact entries: a range, or any (0 to 65535). The first rule that
/// holds a port is taken, so the agent orders them: exact, range, any.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct PortRule {
    /// Bits 0-15 the lowest port, 16-31 the highest; in host byte order.
    pub ports: u32,
    pub protocol: u32,
    pub target: VipTarget,
}

impl PortRule {
    pub const fn new(low: u16, high: u16, protocol: u8, target: VipTarget) -> Self {
        Self { ports: low as u32 | (high as u32) << 16, protocol: protocol as u32, target }
    }

    #[inline(always)]
    pub const fn low(&self) -> u32 {
        self.ports & 0xffff
    }

    #[inline(always)]
    pub const fn high(&self) -> u32 {
        self.ports >> 16
    }
}

/// Rules that one address or prefix may have.
pub const MOST_PORT_RULES: u32 = 16;
pub const RULES_PER_ROW: u32 = 4;

/// A row of `XLB_PORT_RULES`. Written before the buckets that lead to it are live, like them.
#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct RuleRow(pub [PortRule; RULES_PER_ROW as usize]);

const _: () = assert!(size_of::<PortRule>() == 16 && size_of::<RuleRow>() == 64);

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

/// How the backend of a new flow is picked in a table. The number is in its `TableWord`.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Hash)]
pub enum Discipline {
    /// By the hash of the flow: a slot at rest needs no pin.
    #[default]
    Hash = 0,
    /// In the order of the `cur` words, one after the other.
    RoundRobin = 1,
    /// A `cur` word at random.
    Random = 2,
    /// Of two `cur` words at random, that whose backend has fewer flows for its weight.
    Least = 3,
}

impl Discipline {
    pub const fn from_raw(raw: u8) -> Self {
        match raw & 3 {
            0 => Self::Hash,
            1 => Self::RoundRobin,
            2 => Self::Random,
            _ => Self::Least,
        }
    }

    /// Whether every flow has a pin.
    pub const fn pins_all(self) -> bool {
        !matches!(self, Self::Hash)
    }
}

/// Where a table lies: bits 0-31 its first row in `XLB_SLOTS`, 32-39 the logarithm of its length, 40-41 its
/// `Discipline`.
///
/// One store grows or moves a table. Zero names slot 0, which is never written: no table means
/// nobody, without a test.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct TableWord(u64);

impl TableWord {
    pub const fn new(first_row: u32, log2_length: u32, discipline: Discipline) -> Self {
        Self(first_row as u64 | (log2_length as u64) << 32 | (discipline as u64) << 40)
    }

    #[inline(always)]
    pub const fn discipline(self) -> Discipline {
        Discipline::from_raw((self.0 >> 40) as u8)
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
    /// Not 0: a private copy on its way from another table. Fingerprint of what it came from.
    pub origin: u64,
    /// Pins that could not be made. Written by the packet path.
    pub failed: u64,
    /// `CLOSING` while the agent moves `est`, `FROZEN` while all is carried to other maps, else 0.
    pub closing: u64,
    /// New flows of a table that takes turns. Written by the packet path.
    pub turn: u64,
    /// Pools whose backends pins of this table may name: a set of 192 bits by fingerprint.
    pub pools: [u64; 3],
}

const _: () = assert!(size_of::<TableState>() == 64);

impl TableState {
    /// `closing`: what cannot be pinned is dropped.
    pub const CLOSING: u64 = 1;
    /// `closing`: no pin is made or given another backend, and no slot changes: they are on their way to other maps. What
    /// would need a pin goes to `est`, where it needs none.
    pub const FROZEN: u64 = 2;
}

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
    /// IP in UDP (GUE variant 1) to an IPv4 address.
    Gue4 = 5,
    /// IP in UDP (GUE variant 1) to an IPv6 address.
    Gue6 = 6,
    /// Destination address and port rewritten; replies come back through the balancer.
    Nat4 = 7,
    Nat6 = 8,
    /// Source rewritten, too, to an address of the balancer.
    Fullnat4 = 9,
    Fullnat6 = 10,
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
            5 => Some(Self::Gue4),
            6 => Some(Self::Gue6),
            7 => Some(Self::Nat4),
            8 => Some(Self::Nat6),
            9 => Some(Self::Fullnat4),
            10 => Some(Self::Fullnat6),
            _ => None,
        }
    }

    /// Whether addresses are translated, and replies come back through the balancer.
    #[inline(always)]
    pub const fn translates(self) -> bool {
        self as u8 >= Self::Nat4 as u8
    }

    /// Whether the client's address is translated, too.
    #[inline(always)]
    pub const fn translates_source(self) -> bool {
        self as u8 >= Self::Fullnat4 as u8
    }

    /// Bytes that the kind puts in front of the client's IP packet; goes into `Backend::overhead`.
    pub const fn overhead(self) -> u16 {
        match self {
            Self::Nobody | Self::Pass | Self::L2 => 0,
            // Between families a packet changes its length, which depends on the client.
            Self::Nat4 | Self::Nat6 | Self::Fullnat4 | Self::Fullnat6 => 0,
            Self::Ipip4 => 20,
            Self::Ipip6 => 40,
            Self::Gue4 => 28,
            Self::Gue6 => 48,
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
    /// Port to send the tunnel to, or the packet, where addresses are translated; 0 where the kind has none, or the
    /// client's choice stays.
    pub port: Be16,
    /// `BackendKind::overhead`.
    pub overhead: u16,
    /// The backend's address; IPv4 in the first four bytes of memory, the rest zero.
    pub address: [u64; 2],
    /// Fingerprint of what the backend is (pool, address, kind, port): how a restart finds its id again.
    pub identity: u64,
    pub spare: [u64; 3],
}

const _: () = assert!(size_of::<Backend>() == 64);

impl Backend {
    /// It is not down: a pin to it holds for new flows too. The agent that follows takes its health from here.
    pub const ACCEPTING: u8 = 1;
    /// Its flows were moved, and its pins taken out.
    pub const EMPTIED: u8 = 2;

    /// Whether it takes new flows.
    #[inline(always)]
    pub fn accepts(&self) -> bool {
        self.has(Self::ACCEPTING)
    }

    /// Whether it is to have no flow any more, not even an old one.
    #[inline(always)]
    pub fn is_emptied(&self) -> bool {
        self.has(Self::EMPTIED)
    }

    /// The agent changes flags while packets read them.
    #[inline(always)]
    fn has(&self, flag: u8) -> bool {
        // SAFETY: a reference is valid, aligned and initialised.
        let flags = unsafe { core::ptr::read_volatile(&self.flags) };
        flags & flag != 0
    }

    /// Of a kind that translates addresses: whether its own is IPv4.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.kind == BackendKind::Nat4 as u8 || self.kind == BackendKind::Fullnat4 as u8
    }

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
/// is never filled: its interface index is 0, which is no interface, and its MTU is 0, which nothing fits. No row has
/// one of them without the other: packets ask for the MTU alone.
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
    /// Flags, and from bit 16 on the row of `XLB_EGRESS` that leads back out of it; 0 for none.
    pub flags: u32,
}

impl Interface {
    /// The program runs in generic mode.
    pub const GENERIC: u32 = 1;
    /// GRO was on before xlb turned it off, and is turned on again by `xlb detach`.
    pub const RESTORE_GRO: u32 = 2;

    /// The row of the way back out of it.
    #[inline(always)]
    pub const fn egress(&self) -> u16 {
        (self.flags >> 16) as u16
    }

    #[must_use]
    pub const fn with_egress(self, row: u16) -> Self {
        Self { flags: self.flags & 0xffff | (row as u32) << 16, ..self }
    }
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

/// A row of `XLB_ALLOWANCES`, per CPU: a token bucket (`allowance`).
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Allowance {
    /// When tokens were last added, nanoseconds of the coarse monotonic clock.
    pub filled: u64,
    /// Billionths of a message.
    pub tokens: u64,
}

/// What a pin knows of its flow.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PinState {
    /// A SYN was seen and nothing else.
    Syn = 0,
    Established = 1,
    /// The client has sent FIN or RST.
    Finishing = 2,
    /// UDP.
    Datagram = 3,
}

/// A pin: the backend of one flow while its slot is on the move, in one word.
///
/// Bits 0-14 backend, 15-16 `PinState`, 17-31 age (when it was last used, in units of 2^31 ns of the coarse
/// monotonic clock, wrapping), 32-63 tag: the upper half of the flow hash, so that a pin's slot is known.
/// Zero is a free place; a tag is never zero.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Pin(u64);

impl Pin {
    /// Ages count modulo this.
    pub const AGES: u32 = 1 << 15;

    #[inline(always)]
    pub const fn new(tag: u32, backend: u16, state: PinState, age: u16) -> Self {
        Self(
            (backend & 0x7fff) as u64
                | (state as u64) << 15
                | (age as u64 & 0x7fff) << 17
                | (tag as u64) << 32,
        )
    }

    /// The age of a pin that is used now, of coarse monotonic nanoseconds.
    #[inline(always)]
    pub const fn age_of(now_ns: u64) -> u16 {
        (now_ns >> 31) as u16 & 0x7fff
    }

    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    #[inline(always)]
    pub const fn bits(self) -> u64 {
        self.0
    }

    #[inline(always)]
    pub const fn is_free(self) -> bool {
        self.0 == 0
    }

    #[inline(always)]
    pub const fn backend(self) -> u16 {
        self.0 as u16 & 0x7fff
    }

    #[inline(always)]
    pub const fn state(self) -> PinState {
        match (self.0 >> 15) as u8 & 3 {
            0 => PinState::Syn,
            1 => PinState::Established,
            2 => PinState::Finishing,
            _ => PinState::Datagram,
        }
    }

    #[inline(always)]
    pub const fn age(self) -> u16 {
        (self.0 >> 17) as u16 & 0x7fff
    }

    /// Units of age since it was used; 0 where another CPU's clock was a little ahead.
    #[inline(always)]
    pub const fn idle(self, now: u16) -> u32 {
        let idle = (now.wrapping_sub(self.age()) & 0x7fff) as u32;
        if idle < Self::AGES - Self::AGES / 8 { idle } else { 0 }
    }

    #[inline(always)]
    pub const fn tag(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

pub const PINS_PER_BUCKET: usize = 8;

/// A row of `XLB_PINS`: one cache line of pins, each changed by compare-and-exchange only, by the packet path
/// and the agent alike.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub struct PinBucket(pub [AtomicU64; PINS_PER_BUCKET]);

const _: () = assert!(size_of::<PinBucket>() == 64);

/// A row of `XLB_RECORDS`: the connection whose pin lies in the same place of `XLB_CONNECTIONS`.
///
/// Written by whoever claimed that place, before the pin names a backend; then only `BACK` and `SEEN` change. Addresses
/// of IPv4 are mapped. Words: the client (2), the VIP (2), `PORTS`, `BACK`, `OPENED`, `ROW`.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub struct Record(pub [AtomicU64; 8]);

impl Record {
    /// Bits 0-31 both ports of the client's packets, 32-39 the protocol, 40-47 what was seen.
    pub const PORTS: usize = 4;
    /// The way back to the client (`Path`): where its last packet came from.
    pub const BACK: usize = 5;
    /// When it was opened, nanoseconds of the monotonic clock.
    pub const OPENED: usize = 6;
    /// Bits 0-31 the row of the VIP's counters, 32-63 the source (`connections::SourceEnd`) in its place.
    pub const ROW: usize = 7;
}

const _: () = assert!(size_of::<Record>() == 64);

/// A row of `XLB_SOURCES`: addresses that clients' are translated to.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Source {
    pub v6: [u64; 2],
    /// Memory in wire order.
    pub v4: u32,
    pub spare: u32,
}

/// Sources of a family.
pub const MOST_SOURCES: u32 = 256;

/// The backend of a place that somebody has claimed and not yet filled.
pub const BACKEND_CLAIMED: u16 = BACKEND_PASS;

/// A row of `XLB_BE_REPLIES`, by backend id, per CPU: what comes back where addresses are translated.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Replies {
    pub packets: u64,
    pub bytes: u64,
    /// TCP resets by the backend.
    pub resets: u64,
    /// Connections that were answered, and the time this took, nanoseconds.
    pub answered: u64,
    pub waited: u64,
}

/// A row of `XLB_LOADS`, by backend id: how busy a backend of a table with `Discipline::Least` is.
#[repr(C, align(8))]
#[derive(Debug, Default)]
pub struct Load {
    /// Flows with a pin that have not ended. Added to by the packet path, set right by the agent's sweeps.
    pub active: AtomicU64,
    /// Written by the agent; 0 counts as 1.
    pub weight: AtomicU64,
}

const _: () = assert!(size_of::<Load>() == 16);

/// Rows of `XLB_PIN_EVENTS`: room for events to come.
pub const PIN_EVENT_ROWS: u32 = 16;

/// Data of a key of `XLB_DECAP_VIPS`: inner destinations that are let through; IPv4 as `::ffff:a.b.c.d`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DecapVip(pub [u64; 2]);

impl DecapVip {
    /// `address` as it lies in memory, in wire order.
    #[inline(always)]
    pub const fn v4(address: u32) -> Self {
        Self::v6(Address6::mapped(address))
    }

    #[inline(always)]
    pub const fn v6(address: Address6) -> Self {
        Self([address.high, address.low])
    }
}

/// Load-time constants of `xlb decap`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decap {
    /// The UDP port that GUE packets come to; 0 for none.
    pub gue_port: u64,
}

/// Length of the frame that the bench driver makes, bytes.
pub const BENCH_BYTES: usize = 128;

/// Words of eight bytes that it is written in, behind the first `BENCH_FIRST` bytes and but for the last. A load of what
/// was just written waits if two stores wrote it; no field of a header lies across two of these words.
pub const BENCH_WORDS: usize = (BENCH_BYTES - BENCH_FIRST) / 8;
pub const BENCH_FIRST: usize = 6;

/// Packets in `XLB_BENCH_FLOWS`, a power of two: after the last comes the first.
pub const BENCH_PACKETS: u32 = 1 << 20;

/// Packets that one target gets before it is the next one's turn.
pub const BENCH_BLOCK: u64 = 1024;

/// Rows of `XLB_BENCH_TIMES`.
pub const BENCH_TIMES: u32 = 1 << 13;

/// Rows of `XLB_BENCH_TARGETS`, in the order of their turns.
pub mod bench_target {
    pub const PROGRAM: u32 = 0;
    pub const NOTHING: u32 = 1;
    pub const FLOOR: u32 = 2;
}

/// Where the bench driver is.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BenchState {
    /// Packets that were sent, ever.
    pub position: u64,
    /// Packets of this run.
    pub step: u64,
    /// Whose turn it is.
    pub target: u64,
    /// How many take turns: the first, the first two, or all.
    pub targets: u64,
}

/// Four bytes of the bench driver's frame.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct BenchPlace {
    pub word: u64,
    /// 0 or 32.
    pub shift: u64,
}

impl BenchPlace {
    /// The four bytes at `offset`, if one word has them all.
    pub const fn at(offset: usize) -> Option<Self> {
        let Some(behind) = offset.checked_sub(BENCH_FIRST) else { return None };
        let (word, byte) = (behind / 8, behind % 8);
        if word >= BENCH_WORDS || byte % 4 != 0 {
            return None;
        }
        Some(Self { word: word as u64, shift: byte as u64 * 8 })
    }
}

/// Load-time constants of the bench driver.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bench {
    /// The frame: its first bytes, words of it, and its last bytes, each as it lies in memory.
    pub first: u64,
    pub words: [u64; BENCH_WORDS],
    pub last: u64,
    /// The number of the flow, shifted so far to the left, is laid over this word.
    pub source: BenchPlace,
    /// Likewise, the number of its destination.
    pub destination: BenchPlace,
    /// Bytes that the floor puts in front of the frame; takes off, where negative.
    pub growth: i64,
    /// 32, less the logarithm of the rows of `XLB_BENCH_SLOTS`.
    pub shift: u64,
}

#[cfg(feature = "user")]
mod user {
    macro_rules! pod {
        ($($name:ty),*) => {
            // SAFETY: repr(C) or transparent, integers only, no padding (sizes are asserted above).
            $(unsafe impl aya::Pod for $name {})*
        };
    }
    pod!(crate::quic::ServerKey);
    pod!(super::Bench, super::Meta, super::Constants, super::Decap, super::Interface, super::Traffic);
    pod!(super::Replies);
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;

    #[test]
    fn words_hold_their_fields_apart() {
        let word = VipWord::new(0xffff_ffff, 0xab_cdef, 20);
        assert_eq!((word.seed(), word.first_row(), word.log2_buckets()), (0xffff_ffff, 0xab_cdef, 20));
        let word = TableWord::new(0xffff_fff0, 20, Discipline::Least);
        assert_eq!((word.first_row(), word.log2_length(), word.length()), (0xffff_fff0, 20, 1 << 20));
        assert_eq!(word.discipline(), Discipline::Least);
        let mac = Mac::from_bytes([0xff; 6]);
        let path = Path::new(mac, 0xffff);
        assert_eq!((path.mac(), path.egress()), (mac, 0xffff));
        assert_eq!(Path::new(mac, 0).egress(), 0);
        for state in [PinState::Syn, PinState::Established, PinState::Finishing, PinState::Datagram] {
            let pin = Pin::new(0xdead_beef, 0x7abc, state, 0x7fff);
            assert_eq!((pin.tag(), pin.backend(), pin.age()), (0xdead_beef, 0x7abc, 0x7fff));
            assert_eq!(pin.state(), state);
            assert_eq!((pin.idle(3), pin.idle(0x7ffe)), (4, 0));
        }
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
                let shorter = TableWord::new(0, log2, Discipline::Hash).slot(hash);
                let longer = TableWord::new(0, log2 + 2, Discipline::Hash).slot(hash);
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
    fn targets_and_lengths_give_back_what_was_put_in() {
        let target = VipTarget::service(0xabcd, VipTarget::UNMAPPED_REJECT, 0xdead_beef);
        assert_eq!((target.table(), target.vip()), (0xabcd, 0xdead_beef));
        assert!(target.has(VipTarget::UNMAPPED_REJECT) && !target.has(VipTarget::UNMAPPED_PASS));
        for bits in [0, 8, 32, 127] {
            for bytes in 0..=15 {
                let source = VipTarget::prefix_cut(bits) | VipTarget::SOURCE_HASH;
                let target = VipTarget::service(7, source | VipTarget::server_ids_of(bytes), 9);
                assert_eq!((target.cut(), target.server_id_bytes()), (u32::from(bits), u32::from(bytes)));
                assert_eq!((target.table(), target.vip()), (7, 9));
                assert!(target.is_service() && target.has(VipTarget::SOURCE_HASH));
                assert!(!target.has(VipTarget::UNMAPPED_PASS) && !target.has(VipTarget::UNMAPPED_REJECT));
            }
        }
        let lengths = PrefixLengths::from_bits(0x08_18_20);
        assert_eq!([0, 1, 2, 3].map(|i| lengths.get(i)), [32, 24, 8, 0]);
        let rule = PortRule::new(1024, 65535, 6, target);
        assert_eq!((rule.low(), rule.high()), (1024, 65535));
    }

    #[test]
    fn entries_that_are_not_about_one_port_are_told_apart() {
        assert!(PortKey::ADDRESS.is_address() && PortKey::prefix(64).is_address());
        assert_eq!(PortKey::prefix(64).prefix_length(), Some(64));
        assert!(PortKey::fragments(17).is_fragments() && !PortKey::fragments(17).is_address());
        for port in [0, 1, 443, 65535] {
            let key = PortKey::new(port, 17);
            assert!(!key.is_address() && !key.is_fragments() && key.prefix_length().is_none());
        }
    }

    #[test]
    fn a_v4_decap_key_is_the_mapped_v6_address() {
        let address = u32::from_ne_bytes([192, 0, 2, 7]);
        let mapped = core::net::Ipv4Addr::new(192, 0, 2, 7).to_ipv6_mapped().octets();
        assert_eq!(DecapVip::v4(address), DecapVip::v6(Address6::from_bytes(mapped)));
    }

    #[test]
    fn map_names_fit_the_kernel() {
        for name in [
            map::ALLOWANCES,
            map::META,
            map::VIP_INDEX,
            map::TABLE_STATES,
            map::BACKEND_TRAFFIC,
            map::DECAP_FROM4,
            map::PIN_EVENTS,
        ] {
            assert!(name.len() <= 15, "{name}");
        }
    }
}
