//! Which server a QUIC connection ID names: QUIC-LB (draft-ietf-quic-load-balancers-21), the form without encryption.
//!
//! A connection ID that a server gives out says at the beginning whose it is: three bits of configuration ID, five of
//! length or noise (the servers' affair, section 3.3), then the server ID, then a nonce. So a packet reaches its server
//! whatever address it comes from.
//!
//! Packets with short headers go by that. Those with long headers open a connection, from one address, and go by that:
//! the first of their connection IDs is the client's choice, and nobody is to aim at one backend.

use crate::abi::{BackendKind, VipTarget};
use crate::classify::{Flow, Role};
use crate::outcome::Outcome;
use crate::packet::Packet;
use crate::parse::Transport;
use crate::tables::Tables;
use crate::wire::{ConnectionId, Header, QuicLong, QuicShort, Udp};

/// Bytes of a server ID: 1 to 15, so that a nonce of four fits behind it (section 5.3: they sum to 19 at the most).
pub const LONGEST_SERVER_ID: usize = 15;
/// Entries of `XLB_SERVERS` that may be wanted. Its rows are twice as many: those that go are in it while others come.
pub const MOST_SERVERS: u32 = 1 << 14;
pub const SERVER_ROWS: u32 = 2 * MOST_SERVERS;
/// Says "routable by nobody" (section 3.2), and is no configuration's.
pub const UNROUTABLE: u8 = 7;
/// Key of `XLB_SERVERS`: a server ID under a configuration ID, for the backends of one table.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct ServerKey {
    /// The server ID in wire order, then zeros.
    pub id: [u64; 2],
    /// Bits 0-15 the table, 16-23 the bytes of the server ID, 24-31 the configuration ID.
    pub place: u64,
}

impl ServerKey {
    /// `None` for what no packet can name.
    pub fn new(table: u16, config_id: u8, server_id: &[u8]) -> Option<Self> {
        if server_id.is_empty() || server_id.len() > LONGEST_SERVER_ID || config_id >= UNROUTABLE {
            return None;
        }
        let mut bytes = [0; 16];
        bytes[..server_id.len()].copy_from_slice(server_id);
        let words = u128::from_le_bytes(bytes);
        Some(Self {
            id: [words as u64, (words >> 64) as u64],
            place: place(table, server_id.len() as u32, config_id),
        })
    }

    /// The key of what a connection ID names, if it may be routable; server IDs are `length` (1 to 15) bytes long.
    #[inline(always)]
    pub const fn of(connection_id: &ConnectionId, table: u16, length: u32) -> Option<Self> {
        let config_id = connection_id.first_octet >> 5;
        if config_id == UNROUTABLE {
            return None;
        }
        let id = [connection_id.low & mask(length), connection_id.high & mask(length.saturating_sub(8))];
        Some(Self { id, place: place(table, length, config_id) })
    }

    pub const fn table(&self) -> u16 {
        self.place as u16
    }

    pub const fn config_id(&self) -> u8 {
        (self.place >> 24) as u8
    }

    /// The server ID, with zeros behind it.
    pub const fn bytes(&self) -> [u8; 16] {
        (self.id[0] as u128 | (self.id[1] as u128) << 64).to_le_bytes()
    }

    /// Bytes of the server ID.
    pub const fn length(&self) -> usize {
        (self.place >> 16) as usize & 0xff
    }
}

#[inline(always)]
const fn place(table: u16, length: u32, config_id: u8) -> u64 {
    table as u64 | (length as u64) << 16 | (config_id as u64) << 24
}

/// The first bytes of a word in wire order.
#[inline(always)]
const fn mask(bytes: u32) -> u64 {
    if bytes >= 8 { u64::MAX } else { (1 << (bytes * 8)) - 1 }
}

const _: () = assert!(size_of::<ServerKey>() == 24);

/// What a packet says of its server: the backend's id, or one of the others. A word, which functions of their own give.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Named(u32);

impl Named {
    /// Nothing: its service does not go by connection IDs, or it has a long header, or it is none of QUIC.
    pub const UNASKED: Self = Self(1 << 16);
    /// It is of an established connection, but of nobody's who may get it.
    const STRANGER: Self = Self(2 << 16);

    #[inline(always)]
    pub const fn server(self) -> Option<u16> {
        if self.0 < Self::UNASKED.0 { Some(self.0 as u16) } else { None }
    }

    /// What became of the packet, for the counters: `sent` says which way it went.
    #[inline(always)]
    pub const fn outcome(self, sent: Outcome) -> Outcome {
        let here = matches!(sent, Outcome::ForwardTransmit);
        match self {
            Self::UNASKED => sent,
            Self::STRANGER if here => Outcome::ForwardQuicStrayTransmit,
            Self::STRANGER => Outcome::ForwardQuicStrayRedirect,
            _ if here => Outcome::ForwardQuicTransmit,
            _ => Outcome::ForwardQuicRedirect,
        }
    }
}

/// The backend that a packet names. Who names none is balanced like any other.
#[inline(always)]
pub fn server<P: Packet, T: Tables, A>(
    packet: &P,
    tables: &T,
    flow: &Flow<A>,
    transport: &Transport,
) -> Named {
    match payload(flow, transport) {
        0 => Named::UNASKED,
        at => named(packet, tables, flow.target, at, transport.end),
    }
}

/// Whether a packet opens a connection. A client also answers its server in an Initial packet: that names the server,
/// and the connection is there.
#[inline(always)]
pub fn begins<P: Packet, T: Tables, A>(
    packet: &P,
    tables: &T,
    flow: &Flow<A>,
    transport: &Transport,
) -> bool {
    match payload(flow, transport) {
        0 => false,
        at => opens(packet, tables, flow.target, at, transport.end),
    }
}

/// Where the payload of a whole packet to a service that goes by connection IDs begins; 0 for others.
#[inline(always)]
const fn payload<A>(flow: &Flow<A>, transport: &Transport) -> usize {
    let asked = flow.target.server_id_bytes() != 0 && matches!(flow.role, Role::Packet);
    if asked { transport.offset + size_of::<Udp>() } else { 0 }
}

/// What lies at `at`, before `end`: behind that is padding.
#[inline(always)]
fn header<P: Packet, H: Header>(packet: &P, at: usize, end: usize) -> Option<&H> {
    if at + H::LEN > end { None } else { packet.header::<H>(at) }
}

/// A function of its own in the kernel too, so that programs that are loaded without it do not differ.
#[inline(never)]
fn named<P: Packet, T: Tables>(packet: &P, tables: &T, target: VipTarget, at: usize, end: usize) -> Named {
    match header::<P, QuicShort>(packet, at, end) {
        Some(short) if short.is_short() => match alive(tables, target, &short.destination) {
            Some(id) => Named(id as u32),
            None => Named::STRANGER,
        },
        _ => Named::UNASKED,
    }
}

#[inline(never)]
fn opens<P: Packet, T: Tables>(packet: &P, tables: &T, target: VipTarget, at: usize, end: usize) -> bool {
    match header::<P, QuicLong>(packet, at, end) {
        Some(long) if long.is_initial() => {
            let routable = long.destination_length as u32 > target.server_id_bytes();
            !routable || alive(tables, target, &long.destination).is_none()
        }
        _ => false,
    }
}

/// The backend that a connection ID names, if it may get anything. One that is drained may, and one that is down until
/// its flows go (`on_down`): nobody else knows the connection.
#[inline(always)]
fn alive<T: Tables>(tables: &T, target: VipTarget, connection_id: &ConnectionId) -> Option<u16> {
    let key = ServerKey::of(connection_id, target.table(), target.server_id_bytes())?;
    let id = tables.server(&key)?;
    let backend = tables.backend(id)?;
    if backend.kind > BackendKind::Pass as u8 && !backend.is_emptied() { Some(id) } else { None }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::packet::Buffer;
    use crate::parse::Shape;
    use crate::wire::PROTO_UDP;
    use std::vec::Vec;

    const TABLE: u16 = 0xabcd;

    fn short(connection_id: &[u8]) -> Vec<u8> {
        // Spin bit and packet number length as they may be.
        let mut packet = std::vec![0x63];
        packet.extend_from_slice(connection_id);
        // Packet number, payload, and what the cipher adds: never less than 20 bytes.
        packet.extend_from_slice(&[0xa5; 20]);
        packet
    }

    fn service(length: usize) -> Flow<u32> {
        let target = VipTarget::service(TABLE, VipTarget::server_ids_of(length as u8), 0);
        Flow { client: 1, vip: 2, ports: 3, protocol: PROTO_UDP, target, role: Role::Packet }
    }

    /// Behind a UDP header at the beginning.
    fn transport(payload: &[u8]) -> Transport {
        Transport { offset: 0, protocol: PROTO_UDP, end: 8 + payload.len(), shape: Shape::Whole }
    }

    /// What a packet names.
    fn key(packet: &[u8], length: usize) -> Option<ServerKey> {
        let mut bytes = [&[0; 8], packet].concat();
        let buffer = Buffer::new(&mut bytes, 0, 1);
        let transport = transport(packet);
        let header = header::<_, QuicShort>(&buffer, payload(&service(length), &transport), transport.end)?;
        let key = ServerKey::of(&header.destination, TABLE, length as u32);
        key.filter(|_| header.is_short())
    }

    fn is_initial(packet: &[u8]) -> bool {
        let mut bytes = packet.to_vec();
        Buffer::new(&mut bytes, 0, 1).header::<QuicLong>(0).is_some_and(QuicLong::is_initial)
    }

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().map(|digit| (digit as char).to_digit(16).unwrap() as u8).collect();
        digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
    }

    /// Appendix B.1, "Unencrypted CIDs". The draft prints the second with a nonce of nine digits and a first octet of
    /// three; taken as what they stand for, a length of ten behind configuration 1, and a nonce of five bytes.
    #[test]
    fn the_vectors_of_draft_21_without_encryption_name_their_servers() {
        for (connection_id, config_id, server_id) in
            [("07c4605e4504cc4f", 0, "c4605e"), ("2a350d28b42003487d970b", 1, "350d28b420")]
        {
            let server_id = hex(server_id);
            let found = key(&short(&hex(connection_id)), server_id.len());
            assert_eq!(found, ServerKey::new(TABLE, config_id, &server_id), "{connection_id}");
            let found = found.unwrap();
            assert_eq!(
                (found.config_id(), found.table(), found.length()),
                (config_id, TABLE, server_id.len())
            );
            assert_eq!(&found.bytes()[..found.length()], server_id);
        }
    }

    #[test]
    fn a_server_id_of_every_length_is_read_and_nothing_of_the_nonce() {
        let id: Vec<u8> = (1..=LONGEST_SERVER_ID as u8).map(|i| i * 0x11).collect();
        for length in 1..=LONGEST_SERVER_ID {
            for noise in [0, 0xff] {
                let mut connection_id = std::vec![0x5f];
                connection_id.extend_from_slice(&id[..length]);
                connection_id.extend_from_slice(&[noise; 4]);
                let expected = ServerKey::new(TABLE, 2, &id[..length]);
                assert!(expected.is_some());
                assert_eq!(
                    key(&short(&connection_id), length),
                    expected,
                    "{length} bytes, {noise:#x} behind"
                );
            }
        }
    }

    #[test]
    fn equal_bytes_of_another_length_configuration_or_table_are_another_server() {
        let one = ServerKey::new(1, 0, &[0, 0]);
        let others =
            [ServerKey::new(1, 0, &[0]), ServerKey::new(1, 1, &[0, 0]), ServerKey::new(2, 0, &[0, 0])];
        assert!(one.is_some() && others.iter().all(|other| other.is_some() && *other != one));
    }

    #[test]
    fn a_cut_packet_names_nobody() {
        let whole = short(&hex("07c4605e4504cc4f"));
        for length in 0..18 {
            assert_eq!(key(&whole[..length], 3), None, "{length} bytes");
        }
        for length in 18..=whole.len() {
            assert_eq!(key(&whole[..length], 3), ServerKey::new(TABLE, 0, &hex("c4605e")), "{length} bytes");
        }
    }

    #[test]
    fn long_headers_name_nobody() {
        for form in 0x80..=0xff {
            let mut packet = short(&hex("07c4605e4504cc4f"));
            packet[0] = form;
            assert_eq!(key(&packet, 3), None, "{form:#x}");
        }
    }

    #[test]
    fn the_fixed_bit_and_the_five_bits_of_length_do_not_matter() {
        for form in 0..0x80 {
            for low in 0..0x20 {
                let mut packet = short(&hex("07c4605e4504cc4f"));
                (packet[0], packet[1]) = (form, 3 << 5 | low);
                assert_eq!(key(&packet, 3), ServerKey::new(TABLE, 3, &hex("c4605e")), "{form:#x} {low:#x}");
            }
        }
    }

    #[test]
    fn nothing_but_whole_packets_to_services_that_go_by_them_is_looked_into() {
        let packet = short(&hex("07c4605e4504cc4f"));
        let mut bytes = [&[0; 8], packet.as_slice()].concat();
        let buffer = Buffer::new(&mut bytes, 0, 1);
        let looked = |flow: &Flow<u32>, transport: &Transport| {
            let at = payload(flow, transport);
            at != 0 && header::<_, QuicShort>(&buffer, at, transport.end).is_some()
        };
        assert!(looked(&service(3), &transport(&packet)));
        assert!(!looked(&service(0), &transport(&packet)));
        for role in [Role::FirstFragment, Role::LaterFragment, Role::Error] {
            assert!(!looked(&Flow { role, ..service(3) }, &transport(&packet)));
        }
        // What the IP header does not promise is padding.
        assert!(!looked(&service(3), &transport(&packet[..17])));
    }

    #[test]
    fn configuration_7_says_that_nobody_is_named() {
        for first_octet in 0xe0..=0xff {
            let mut packet = short(&hex("07c4605e4504cc4f"));
            packet[1] = first_octet;
            assert_eq!(key(&packet, 3), None, "{first_octet:#x}");
        }
        assert_eq!(ServerKey::new(TABLE, UNROUTABLE, &[1]), None);
        assert_eq!(ServerKey::new(TABLE, 0, &[]), None);
        assert_eq!(ServerKey::new(TABLE, 0, &[1; LONGEST_SERVER_ID + 1]), None);
    }

    #[test]
    fn initial_packets_of_both_versions_are_known() {
        for form in 0..=0xffu8 {
            let packet = |version: [u8; 4]| [&[form][..], &version, &[8], &[0x55; 17]].concat();
            let long = form & 0x80 != 0;
            let kind = form >> 4 & 3;
            assert_eq!(is_initial(&packet([0, 0, 0, 1])), long && kind == 0, "version 1, {form:#x}");
            assert_eq!(
                is_initial(&packet([0x6b, 0x33, 0x43, 0xcf])),
                long && kind == 1,
                "version 2, {form:#x}"
            );
            for other in [[0; 4], [0xff, 0, 0, 29], [1, 0, 0, 0], [0x0a, 0x0a, 0x0a, 0x0a]] {
                assert!(!is_initial(&packet(other)), "{other:?}, {form:#x}");
            }
            for cut in 0..23 {
                assert!(!is_initial(&packet([0, 0, 0, 1])[..cut]));
            }
        }
    }
}
