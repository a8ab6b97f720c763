//! Which server a QUIC connection ID names: QUIC-LB (draft-ietf-quic-load-balancers-21), the form without encryption.
//! Knows no maps and no backends.
//!
//! A connection ID that a server gives out says at the beginning whose it is: three bits of configuration ID, five of
//! length or noise (not looked at, section 3.3 of the draft leaves them to the server), then the server ID, then a
//! nonce. So a packet reaches its server whatever address it comes from. A connection ID that a client made up in its
//! first packets is noise and stands in long headers only: those are not looked into.

use crate::wire::QuicShort;

/// Bytes of a server ID: 1 to 15, so that a nonce of four fits behind it (section 5.3: they sum to 19 at the most).
pub const LONGEST_SERVER_ID: usize = 15;
/// Says "routable by nobody" (section 3.2), and is no configuration's.
pub const UNROUTABLE: u8 = 7;
/// Bytes that must lie behind the UDP header.
pub const LEAST_PAYLOAD: usize = size_of::<QuicShort>();

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

    /// The key of what the header names, if it is a routable one; server IDs are `length` (1 to 15) bytes long.
    #[inline(always)]
    pub const fn of(header: &QuicShort, table: u16, length: u32) -> Option<Self> {
        let config_id = header.first_octet >> 5;
        if !header.is_short() || config_id == UNROUTABLE {
            return None;
        }
        let id = [header.low & mask(length), header.high & mask(length.saturating_sub(8))];
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

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::packet::{Buffer, Packet};
    use crate::wire::QuicLong;
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

    fn key(packet: &[u8], length: usize) -> Option<ServerKey> {
        let mut bytes = packet.to_vec();
        let buffer = Buffer::new(&mut bytes, 0, 1);
        ServerKey::of(buffer.header::<QuicShort>(0)?, TABLE, length as u32)
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
        for length in 0..LEAST_PAYLOAD {
            assert_eq!(key(&whole[..length], 3), None, "{length} bytes");
        }
        for length in LEAST_PAYLOAD..=whole.len() {
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
            let packet = |version: [u8; 4]| [&[form][..], &version].concat();
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
            for cut in 0..5 {
                assert!(!is_initial(&packet([0, 0, 0, 1])[..cut]));
            }
        }
    }
}
