//! ICMP and ICMPv6 messages in words. Knows no packet around them.

use std::fmt;

/// The first eight bytes of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    v6: bool,
    kind: u8,
    code: u8,
    rest: [u8; 4],
}

impl Message {
    /// Nothing where it is shorter than its header.
    pub fn read(bytes: &[u8], v6: bool) -> Option<Self> {
        let [kind, code, _, _, a, b, c, d, ..] = *bytes else { return None };
        Some(Self { v6, kind, code, rest: [a, b, c, d] })
    }

    /// Whether it carries the packet that it is about (RFC 1122, 3.2.2; RFC 4443, 2.1).
    pub const fn is_error(&self) -> bool {
        if self.v6 { self.kind < 128 } else { matches!(self.kind, 3 | 4 | 5 | 11 | 12) }
    }
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, code, rest, .. } = *self;
        let words = match (self.v6, kind, code) {
            (false, 8, 0) | (true, 128, 0) => "echo request",
            (false, 0, 0) | (true, 129, 0) => "echo reply",
            (false, 3, 0) | (true, 1, 0) => "network unreachable",
            (false, 3, 1) | (true, 1, 3) => "host unreachable",
            (false, 3, 2) => "protocol unreachable",
            (false, 3, 3) | (true, 1, 4) => "port unreachable",
            (false, 3, 4) => {
                let mtu = u16::from_be_bytes([rest[2], rest[3]]);
                return write!(f, "fragmentation needed (MTU {mtu})");
            }
            (true, 2, _) => return write!(f, "packet too big (MTU {})", u32::from_be_bytes(rest)),
            (false, 3, 9 | 10 | 13) | (true, 1, 1) => "administratively prohibited",
            (false, 5, _) => "redirect",
            (false, 11, _) | (true, 3, _) => "time exceeded",
            (false, 12, _) | (true, 4, _) => "parameter problem",
            (true, 133, _) => "router solicitation",
            (true, 134, _) => "router advertisement",
            (true, 135, _) => "neighbour solicitation",
            (true, 136, _) => "neighbour advertisement",
            _ => return write!(f, "type {kind} code {code}"),
        };
        f.write_str(words)
    }
}
