//! What a frame consists of, header by header. Reads with code of its own, and knows neither the packet path nor what
//! becomes of a frame.

use std::fmt::Write;

/// UDP to this port holds an IP packet (GUE variant 1), as the fixtures' tunnels do.
pub const GUE_PORT: u16 = 6080;

/// More headers than any frame of the fixtures has; noise may go on for long.
const MOST_LAYERS: usize = 24;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Ethernet,
    Vlan,
    Arp,
    Ipv4,
    Ipv6,
    /// Hop-by-hop options, routing, destination options.
    Extension(u8),
    Fragment,
    Tcp,
    Udp,
    Icmp,
    Icmp6,
    /// What no header is seen in.
    Payload,
}

/// A field of a header: its name, where it begins, bytes.
pub type Field = (&'static str, usize, usize);

impl Kind {
    pub const HOP_BY_HOP: u8 = 0;
    pub const ROUTING: u8 = 43;
    pub const FRAGMENT: u8 = 44;
    pub const DESTINATION_OPTIONS: u8 = 60;

    pub fn name(self) -> &'static str {
        match self {
            Kind::Ethernet => "ethernet",
            Kind::Vlan => "vlan",
            Kind::Arp => "arp",
            Kind::Ipv4 => "ipv4",
            Kind::Ipv6 => "ipv6",
            Kind::Extension(Self::HOP_BY_HOP) => "hop-by-hop",
            Kind::Extension(Self::ROUTING) => "routing",
            Kind::Extension(_) => "options",
            Kind::Fragment => "fragment",
            Kind::Tcp => "tcp",
            Kind::Udp => "udp",
            Kind::Icmp => "icmp",
            Kind::Icmp6 => "icmp6",
            Kind::Payload => "payload",
        }
    }

    pub fn is_ip(self) -> bool {
        matches!(self, Kind::Ipv4 | Kind::Ipv6)
    }

    pub fn fields(self) -> &'static [Field] {
        match self {
            Kind::Ethernet => &[("destination", 0, 6), ("source", 6, 6), ("type", 12, 2)],
            Kind::Vlan => &[("tag", 0, 2), ("type", 2, 2)],
            Kind::Arp => &[
                ("hardware", 0, 2),
                ("type", 2, 2),
                ("sizes", 4, 2),
                ("operation", 6, 2),
                ("sender mac", 8, 6),
                ("sender", 14, 4),
                ("target mac", 18, 6),
                ("target", 24, 4),
            ],
            Kind::Ipv4 => &[
                ("version and words", 0, 1),
                ("tos", 1, 1),
                ("length", 2, 2),
                ("id", 4, 2),
                ("fragment", 6, 2),
                ("ttl", 8, 1),
                ("protocol", 9, 1),
                ("checksum", 10, 2),
                ("source", 12, 4),
                ("destination", 16, 4),
            ],
            Kind::Ipv6 => &[
                ("version, class and flow", 0, 4),
                ("length", 4, 2),
                ("protocol", 6, 1),
                ("ttl", 7, 1),
                ("source", 8, 16),
                ("destination", 24, 16),
            ],
            Kind::Extension(_) => &[("protocol", 0, 1), ("words", 1, 1), ("kind", 2, 1), ("segments", 3, 1)],
            Kind::Fragment => &[("protocol", 0, 1), ("reserved", 1, 1), ("fragment", 2, 2), ("id", 4, 4)],
            Kind::Tcp => &[
                ("source port", 0, 2),
                ("destination port", 2, 2),
                ("sequence", 4, 4),
                ("acknowledged", 8, 4),
                ("words and flags", 12, 2),
                ("window", 14, 2),
                ("checksum", 16, 2),
            ],
            Kind::Udp => {
                &[("source port", 0, 2), ("destination port", 2, 2), ("length", 4, 2), ("checksum", 6, 2)]
            }
            Kind::Icmp | Kind::Icmp6 => {
                &[("message", 0, 1), ("code", 1, 1), ("checksum", 2, 2), ("rest", 4, 4)]
            }
            Kind::Payload => &[],
        }
    }

    /// Where the number stands that says what follows: at which byte, and how many.
    pub fn next(self) -> Option<(usize, usize)> {
        match self {
            Kind::Ethernet => Some((12, 2)),
            Kind::Vlan => Some((2, 2)),
            Kind::Ipv4 => Some((9, 1)),
            Kind::Ipv6 => Some((6, 1)),
            Kind::Extension(_) | Kind::Fragment => Some((0, 1)),
            Kind::Arp | Kind::Tcp | Kind::Udp | Kind::Icmp | Kind::Icmp6 | Kind::Payload => None,
        }
    }

    /// The number by which a header like this is announced: as an EtherType, or behind IP.
    pub fn number(self, behind_ip: bool) -> u16 {
        match (self, behind_ip) {
            (Kind::Ipv4, false) => 0x0800,
            (Kind::Ipv6, false) => 0x86dd,
            (Kind::Arp, _) => 0x0806,
            (Kind::Vlan, _) => 0x8100,
            (Kind::Ipv4, true) => 4,
            (Kind::Ipv6, true) => 41,
            (Kind::Extension(number), _) => u16::from(number),
            (Kind::Fragment, _) => u16::from(Self::FRAGMENT),
            (Kind::Tcp, _) => 6,
            (Kind::Udp, _) => 17,
            (Kind::Icmp, _) => 1,
            (Kind::Icmp6, _) => 58,
            (Kind::Ethernet | Kind::Payload, _) => 59,
        }
    }
}

/// A header, from its first byte in the frame to its last. Never reaches behind the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layer {
    pub kind: Kind,
    pub at: usize,
    pub length: usize,
}

impl Layer {
    pub fn end(&self) -> usize {
        self.at + self.length
    }
}

pub fn be16(frame: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]))
}

/// All headers of a frame, outermost first, with those of a packet inside of a tunnel or an ICMP error.
pub fn layers(frame: &[u8]) -> Vec<Layer> {
    let mut layers: Vec<Layer> = Vec::new();
    let mut at = 0;
    let mut kind = Kind::Ethernet;
    while at < frame.len() && layers.len() < MOST_LAYERS {
        let rest = &frame[at..];
        let seen = header(kind, rest).filter(|length| *length <= rest.len());
        let Some(length) = seen.filter(|_| kind != Kind::Payload) else {
            layers.push(Layer { kind: Kind::Payload, at, length: rest.len() });
            break;
        };
        layers.push(Layer { kind, at, length });
        kind = follows(kind, rest, length);
        at += length;
    }
    layers
}

/// Bytes of a header, if it may be one.
fn header(kind: Kind, rest: &[u8]) -> Option<usize> {
    match kind {
        Kind::Ethernet => Some(14),
        Kind::Vlan => Some(4),
        Kind::Arp => Some(28),
        Kind::Ipv4 => Some(usize::from(rest[0] & 15) * 4).filter(|length| rest[0] >> 4 == 4 && *length >= 20),
        Kind::Ipv6 => Some(40).filter(|_| rest[0] >> 4 == 6),
        Kind::Extension(_) => rest.get(1).map(|words| (usize::from(*words) + 1) * 8),
        Kind::Fragment | Kind::Udp | Kind::Icmp | Kind::Icmp6 => Some(8),
        Kind::Tcp => Some(20),
        Kind::Payload => None,
    }
}

fn follows(kind: Kind, rest: &[u8], length: usize) -> Kind {
    match kind {
        Kind::Ethernet => ethertype(be16(rest, 12)),
        Kind::Vlan => ethertype(be16(rest, 2)),
        Kind::Ipv4 if be16(rest, 6).is_some_and(|fragment| fragment & 0x1fff != 0) => Kind::Payload,
        Kind::Ipv4 => protocol(rest[9]),
        Kind::Ipv6 => protocol(rest[6]),
        Kind::Extension(_) => protocol(rest[0]),
        Kind::Fragment if be16(rest, 2).is_some_and(|fragment| fragment & 0xfff8 != 0) => Kind::Payload,
        Kind::Fragment => protocol(rest[0]),
        Kind::Udp if be16(rest, 2) == Some(GUE_PORT) => match rest.get(length).map(|byte| byte >> 4) {
            Some(4) => Kind::Ipv4,
            Some(6) => Kind::Ipv6,
            _ => Kind::Payload,
        },
        Kind::Icmp if matches!(rest[0], 3 | 4 | 5 | 11 | 12) => Kind::Ipv4,
        Kind::Icmp6 if rest[0] < 128 => Kind::Ipv6,
        Kind::Arp | Kind::Tcp | Kind::Udp | Kind::Icmp | Kind::Icmp6 | Kind::Payload => Kind::Payload,
    }
}

fn ethertype(number: Option<u16>) -> Kind {
    match number {
        Some(0x0800) => Kind::Ipv4,
        Some(0x86dd) => Kind::Ipv6,
        Some(0x0806) => Kind::Arp,
        Some(0x8100 | 0x88a8) => Kind::Vlan,
        _ => Kind::Payload,
    }
}

fn protocol(number: u8) -> Kind {
    match number {
        1 => Kind::Icmp,
        4 => Kind::Ipv4,
        6 => Kind::Tcp,
        17 => Kind::Udp,
        41 => Kind::Ipv6,
        58 => Kind::Icmp6,
        Kind::FRAGMENT => Kind::Fragment,
        Kind::HOP_BY_HOP | Kind::ROUTING | Kind::DESTINATION_OPTIONS => Kind::Extension(number),
        _ => Kind::Payload,
    }
}

/// Names of the headers, `ethernet` and the payload left out where there are others: `2-vlan-ipv4-tcp`.
pub fn shape(frame: &[u8]) -> String {
    let layers = layers(frame);
    let told = layers.iter().filter(|layer| !matches!(layer.kind, Kind::Ethernet | Kind::Payload));
    let names: Vec<_> = told.map(|layer| layer.kind.name()).collect();
    let counted = names.chunk_by(|one, other| one == other).map(|equal| match equal.len() {
        1 => equal[0].to_owned(),
        count => format!("{count}-{}", equal[0]),
    });
    if names.is_empty() { "ethernet".to_owned() } else { counted.collect::<Vec<_>>().join("-") }
}

/// The frame with zeros for what no header is in, but for its first bytes.
pub fn plain(frame: &[u8]) -> Vec<u8> {
    const TOLD: usize = 8;
    let mut plain = frame.to_vec();
    for layer in layers(frame).iter().filter(|layer| layer.kind == Kind::Payload && layer.length > TOLD) {
        plain[layer.at + TOLD..].fill(0);
    }
    plain
}

/// Each header on a line with its fields, for whoever looks for a fault.
pub fn dump(frame: &[u8]) -> String {
    let mut text = String::new();
    for layer in layers(frame) {
        let bytes = &frame[layer.at..layer.end()];
        _ = write!(text, "{:5} {}", layer.at, layer.kind.name());
        for (name, at, width) in layer.kind.fields() {
            _ = write!(text, ", {name} {}", hex(&bytes[*at..*at + *width]));
        }
        let told = layer.kind.fields().iter().map(|(_, at, width)| at + width).max().unwrap_or(0);
        if told < bytes.len() {
            _ = write!(text, ", {} more: {}", bytes.len() - told, super::corpus::written(&bytes[told..]));
        }
        text.push('\n');
    }
    text
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{decap_rows, rows};

    #[test]
    fn headers_lie_one_behind_the_other_and_fill_the_frame() {
        for frame in
            rows().into_iter().map(|row| row.frame).chain(decap_rows().into_iter().map(|row| row.frame))
        {
            let layers = layers(&frame);
            let mut end = 0;
            for layer in &layers {
                assert_eq!(layer.at, end, "{layers:?}");
                end = layer.end();
            }
            assert_eq!(end, frame.len(), "{layers:?}");
            assert_eq!(dump(&frame).lines().count(), layers.len());
        }
    }
}
