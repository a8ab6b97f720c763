//! New frames out of others, header by header, repeatable by a seed. Knows protocols, not what becomes of a frame.

use std::collections::BTreeSet;

use super::layers::{Kind, Layer, be16, layers};
use super::repair;
use crate::fixtures::Dice;

/// The least that a program run takes.
pub const SHORTEST: usize = 14;
/// The longest frame that is made: a program run takes some 3500 bytes (6.18, pages of 4 KiB).
pub const LONGEST: usize = 3200;

/// Bytes of IP around which something changes: MTUs, and what tunnel headers leave of them.
const SIZES: [usize; 14] = [68, 576, 1232, 1240, 1280, 1352, 1360, 1372, 1380, 1400, 1452, 1460, 1472, 1500];

/// Values that mean something in a field of one byte.
const TELLING: [u8; 16] = [0, 1, 4, 5, 6, 17, 0x40, 0x41, 0x45, 0x46, 0x4f, 0x60, 0x7f, 0x80, 0xfe, 0xff];
const PROTOCOLS: [u8; 16] = [0, 1, 4, 6, 17, 41, 43, 44, 47, 50, 51, 58, 59, 60, 132, 255];
const ETHERTYPES: [u16; 8] = [0x0800, 0x86dd, 0x0806, 0x8100, 0x88a8, 0x9100, 0x88cc, 0x0600];
const MESSAGES: [u8; 20] =
    [0, 1, 2, 3, 4, 5, 8, 11, 12, 13, 100, 127, 128, 129, 133, 134, 135, 136, 137, 255];
const FRAGMENTS: [u16; 8] = [0, 0x2000, 0x4000, 0x8000, 1, 0x2001, 0x1fff, 8];
const SOURCES4: [[u8; 4]; 8] = [
    [0, 0, 0, 0],
    [0, 1, 2, 3],
    [127, 0, 0, 1],
    [224, 0, 0, 1],
    [240, 0, 0, 1],
    [255, 255, 255, 255],
    [169, 254, 1, 1],
    [223, 255, 255, 255],
];
/// First two bytes, last byte, and what stands in bytes 10 and 11.
const SOURCES6: [(u16, u8, u16); 8] = [
    (0, 0, 0),
    (0, 1, 0),
    (0, 1, 0xffff),
    (0xfe80, 1, 0),
    (0xfebf, 1, 0),
    (0xff02, 1, 0),
    (0xfec0, 1, 0),
    (0xfc00, 1, 0xffff),
];

/// Makes frames. Two with the same seed and the same frames given make the same ones.
pub struct Mutator {
    dice: Dice,
    frames: Vec<Vec<u8>>,
    addresses4: Vec<Vec<u8>>,
    addresses6: Vec<Vec<u8>>,
    ports: Vec<Vec<u8>>,
}

impl Mutator {
    /// From frames of 14 bytes or more; at least one.
    pub fn new(seed: u64, frames: Vec<Vec<u8>>) -> Self {
        let frames: Vec<_> =
            frames.into_iter().filter(|frame| (SHORTEST..=LONGEST).contains(&frame.len())).collect();
        assert!(!frames.is_empty(), "nothing to make frames of");
        let values = |kind: &[Kind], names: &[&str]| -> Vec<Vec<u8>> {
            let values: BTreeSet<_> = frames.iter().flat_map(|frame| values(frame, kind, names)).collect();
            values.into_iter().collect()
        };
        let ends = ["source", "destination"];
        Self {
            dice: Dice(seed),
            addresses4: values(&[Kind::Ipv4], &ends),
            addresses6: values(&[Kind::Ipv6], &ends),
            ports: values(&[Kind::Tcp, Kind::Udp], &["source port", "destination port"]),
            frames,
        }
    }

    /// One more frame to make others of.
    pub fn learn(&mut self, frame: &[u8]) {
        self.frames.push(frame.to_vec());
    }

    /// The next frame.
    pub fn frame(&mut self) -> Vec<u8> {
        if self.dice.below(64) == 0 {
            return self.dice.noise();
        }
        let mut frame = self.any_frame();
        let changes = self.dice.below(4);
        for _ in 0..changes {
            self.restructure(&mut frame);
        }
        if changes > 0 && self.dice.below(8) != 0 {
            repair::lengths(&mut frame);
        }
        for _ in 0..self.dice.below(if changes > 0 { 3 } else { 4 }) {
            self.edit(&mut frame);
        }
        if self.dice.below(2) == 0 {
            repair::checksums(&mut frame);
        }
        match self.dice.below(32) {
            0 | 1 => frame.truncate(SHORTEST.max(self.dice.below(frame.len() + 1))),
            2 | 3 => {
                let padding = self.dice.below(64);
                frame.extend((0..padding).map(|i| i as u8));
            }
            _ => {}
        }
        frame.truncate(LONGEST);
        frame.resize(frame.len().max(SHORTEST), 0);
        frame
    }

    /// One of the frames to make others of; those that were learnt last come more often.
    fn any_frame(&mut self) -> Vec<u8> {
        let count = self.frames.len();
        let recent = count.min(32);
        let index = if self.dice.below(4) == 0 {
            count - 1 - self.dice.below(recent)
        } else {
            self.dice.below(count)
        };
        self.frames[index].clone()
    }

    fn one_of<'a, T>(&mut self, values: &'a [T]) -> Option<&'a T> {
        if values.is_empty() { None } else { values.get(self.dice.below(values.len())) }
    }

    fn any_layer(&mut self, frame: &[u8], wanted: impl Fn(Kind) -> bool) -> Option<Layer> {
        let layers: Vec<_> = layers(frame).into_iter().filter(|layer| wanted(layer.kind)).collect();
        self.one_of(&layers).copied()
    }

    /// Headers come, go, or change places.
    fn restructure(&mut self, frame: &mut Vec<u8>) {
        match self.dice.below(12) {
            0 => self.insert_tag(frame),
            1 => self.options(frame),
            2 => self.insert_extension(frame),
            3 => self.remove(frame),
            4 => self.wrap_in_error(frame),
            5 => self.wrap_in_tunnel(frame),
            6 => self.splice(frame),
            7 => self.resize(frame),
            8 => self.turn_round(frame),
            9 => self.other_transport(frame),
            10 => self.fragment(frame),
            _ => self.unwrap(frame),
        }
    }

    fn insert_tag(&mut self, frame: &mut Vec<u8>) {
        let Some(ethertype) = frame.get(12..14).map(<[u8]>::to_vec) else { return };
        let announced: u16 = if self.dice.below(4) == 0 { 0x88a8 } else { 0x8100 };
        let tag = self.dice.roll() as u16;
        repair::set16(frame, 12, usize::from(announced));
        insert(frame, 14, &[&tag.to_be_bytes()[..], &ethertype].concat());
    }

    /// Other options of an IPv4 header: of another length.
    fn options(&mut self, frame: &mut Vec<u8>) {
        let Some(ip) = self.any_layer(frame, |kind| kind == Kind::Ipv4) else { return };
        let words = self.dice.below(11);
        let kind = self.one_of(&[0u8, 1, 7, 68, 131, 137, 148]).copied().unwrap_or(0);
        let mut options = vec![0; words * 4];
        if let [first, length, pointer, ..] = &mut options[..] {
            (*first, *length, *pointer) = (kind, (words * 4) as u8, 4);
        }
        frame.splice(ip.at + 20..ip.end(), options);
        frame[ip.at] = 0x45 + words as u8;
    }

    fn insert_extension(&mut self, frame: &mut Vec<u8>) {
        let before =
            self.any_layer(frame, |kind| matches!(kind, Kind::Ipv6 | Kind::Extension(_) | Kind::Fragment));
        let Some(before) = before else { return };
        let Some((at, _)) = before.kind.next() else { return };
        let kinds = [Kind::HOP_BY_HOP, Kind::ROUTING, Kind::FRAGMENT, Kind::DESTINATION_OPTIONS];
        let number = self.one_of(&kinds).copied().unwrap_or(0);
        let words = if number == Kind::FRAGMENT || self.dice.below(2) == 0 { 0 } else { self.dice.below(4) };
        let mut header = vec![0; 8 * (words + 1)];
        header[0] = frame[before.at + at];
        header[1] = words as u8;
        if self.dice.below(3) == 0 {
            header[3] = 1 << self.dice.below(8);
        }
        frame[before.at + at] = number;
        insert(frame, before.end(), &header);
    }

    /// Takes a header out; what was in front of it announces what is behind it.
    fn remove(&mut self, frame: &mut Vec<u8>) {
        let layers = layers(frame);
        if layers.len() < 3 {
            return;
        }
        let index = 1 + self.dice.below(layers.len() - 2);
        let (before, gone, behind) = (layers[index - 1], layers[index], layers[index + 1]);
        repair::announce(frame, &before, behind.kind);
        frame.drain(gone.at..gone.end());
    }

    /// An ICMP error about the packet, sent to where the packet says that it is from: its ends change places first,
    /// so that it becomes an answer of the VIP that it was sent to.
    fn wrap_in_error(&mut self, frame: &mut Vec<u8>) {
        let Some(ip) = layers(frame).into_iter().find(|layer| layer.kind.is_ip()) else { return };
        if self.dice.below(8) != 0 {
            swap_ends(frame, &ip);
        }
        let mut carried = frame[ip.at..].to_vec();
        if self.dice.below(2) == 0 {
            let most = ip.length + 8 + self.dice.below(64);
            carried.truncate(most);
        }
        let (version, ours) = (ip.kind, field(&frame[ip.at..], ip.kind, "source"));
        let message = match (version, self.dice.below(4)) {
            (Kind::Ipv4, 0) => [11, 0, 0, 0, 0, 0, 0, 0],
            (Kind::Ipv4, _) => [3, 4, 0, 0, 0, 0, 5, 0x50],
            (_, 0) => [1, 4, 0, 0, 0, 0, 0, 0],
            (..) => [2, 0, 0, 0, 0, 0, 5, 0x50],
        };
        let router = self.address(version);
        let header = ip_header(version, if version == Kind::Ipv4 { 1 } else { 58 }, &router, &ours);
        frame.truncate(ip.at);
        frame.extend([&header[..], &message, &carried].concat());
    }

    /// In IP, or in IP and UDP, from and to addresses that other frames have.
    fn wrap_in_tunnel(&mut self, frame: &mut Vec<u8>) {
        let layers = layers(frame);
        let Some(index) = layers.iter().position(|layer| layer.kind.is_ip()) else { return };
        let Some(before) = index.checked_sub(1).map(|index| layers[index]) else { return };
        let ip = layers[index];
        let outer = if self.dice.below(2) == 0 { Kind::Ipv4 } else { Kind::Ipv6 };
        let gue = self.dice.below(2) == 0;
        let protocol = if gue { 17 } else { ip.kind.number(true) as u8 };
        let (source, destination) = (self.address(outer), self.address(outer));
        let mut header = ip_header(outer, protocol, &source, &destination);
        if gue {
            header.extend([0xc0, 1, 0x17, 0xc0, 0, 0, 0, 0]);
        }
        insert(frame, ip.at, &header);
        repair::announce(frame, &before, outer);
    }

    /// What is inside of a tunnel or an error.
    fn unwrap(&mut self, frame: &mut Vec<u8>) {
        let layers = layers(frame);
        let ips: Vec<_> = (1..layers.len()).filter(|index| layers[*index].kind.is_ip()).collect();
        let [outer, inner, ..] = ips[..] else { return };
        let (before, kind) = (layers[outer - 1], layers[inner].kind);
        frame.drain(layers[outer].at..layers[inner].at);
        repair::announce(frame, &before, kind);
    }

    /// The head of this frame with the tail of another, where a header ends in one and begins in the other.
    fn splice(&mut self, frame: &mut Vec<u8>) {
        let other = self.any_frame();
        let heads = layers(frame);
        let Some(head) = self.one_of(&heads).copied() else { return };
        let Some(tail) = self.any_layer(&other, |kind| kind != Kind::Ethernet) else { return };
        frame.truncate(head.end());
        repair::announce(frame, &head, tail.kind);
        frame.extend_from_slice(&other[tail.at..]);
    }

    /// As long as some way takes, or a little more or less.
    fn resize(&mut self, frame: &mut Vec<u8>) {
        let Some(bytes) = repair::ip_bytes(frame) else { return };
        let size = if self.dice.below(4) == 0 {
            self.dice.below(LONGEST)
        } else {
            self.one_of(&SIZES).copied().unwrap_or(0) + self.dice.below(5) - 2
        };
        let headers = frame.len() - bytes;
        frame.resize(headers + size.max(20), 0);
    }

    /// Source and destination change places, or become one.
    fn turn_round(&mut self, frame: &mut [u8]) {
        let Some(ip) = self.any_layer(frame, Kind::is_ip) else { return };
        if self.dice.below(3) > 0 {
            return swap_ends(frame, &ip);
        }
        let destination = field(&frame[ip.at..], ip.kind, "destination");
        let at = ip.at + if ip.kind == Kind::Ipv4 { 12 } else { 8 };
        frame[at..at + destination.len()].copy_from_slice(&destination);
    }

    /// Another header behind IP: TCP or UDP to a port that other frames have, an echo request, or something else.
    fn other_transport(&mut self, frame: &mut Vec<u8>) {
        let layers = layers(frame);
        let Some(index) = layers.iter().rposition(|layer| layer.kind.is_ip()) else { return };
        let kind = layers[index].kind;
        let (source, destination) = (self.port(), self.port());
        let ports = [source, destination].concat();
        let (protocol, header) = match self.dice.below(4) {
            0 => (6, [&ports[..], &[0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xfa, 0xf0, 0, 0, 0, 0]].concat()),
            1 => (17, [&ports[..], &[0, 16, 0, 0], &[7; 8]].concat()),
            2 if kind == Kind::Ipv4 => (1, vec![8, 0, 0, 0, 0x12, 0x34, 0, 1, 1, 2, 3, 4]),
            2 => (58, vec![128, 0, 0, 0, 0x12, 0x34, 0, 1, 1, 2, 3, 4]),
            _ => (self.one_of(&PROTOCOLS).copied().unwrap_or(59), vec![0; 24]),
        };
        let Some((next, _)) = kind.next() else { return };
        frame[layers[index].at + next] = protocol;
        frame.truncate(layers[index].end());
        frame.extend(header);
    }

    fn fragment(&mut self, frame: &mut Vec<u8>) {
        let Some(ip) = self.any_layer(frame, |kind| matches!(kind, Kind::Ipv4 | Kind::Fragment)) else {
            return self.insert_extension(frame);
        };
        let bits = self.one_of(&FRAGMENTS).copied().unwrap_or(0);
        repair::set16(frame, ip.at + if ip.kind == Kind::Ipv4 { 6 } else { 2 }, usize::from(bits));
    }

    /// Another value in one field, or another byte anywhere near the head.
    fn edit(&mut self, frame: &mut [u8]) {
        let layer = self.any_layer(frame, |kind| kind != Kind::Payload);
        let picked = layer.and_then(|layer| Some((layer, *self.one_of(layer.kind.fields())?)));
        let Some((layer, (name, at, width))) = picked.filter(|_| self.dice.below(8) != 0) else {
            let at = self.dice.below(frame.len().min(160));
            frame[at] = self.byte(frame[at]);
            return;
        };
        let at = layer.at + at;
        let before = frame[at..at + width].to_vec();
        let value = self.value(layer.kind, name, &before);
        if value.len() == width {
            frame[at..at + width].copy_from_slice(&value);
        }
    }

    fn value(&mut self, kind: Kind, name: &str, before: &[u8]) -> Vec<u8> {
        match (name, before.len()) {
            ("source" | "destination", _) if kind.is_ip() => self.address(kind),
            ("sender" | "target", 4) => self.address(Kind::Ipv4),
            ("source port" | "destination port", _) => self.port().to_vec(),
            ("type", 2) => {
                self.one_of(&ETHERTYPES).map(|number| number.to_be_bytes().to_vec()).unwrap_or_default()
            }
            ("protocol", 1) => self.one_of(&PROTOCOLS).map(|number| vec![*number]).unwrap_or_default(),
            ("message", 1) => self.one_of(&MESSAGES).map(|number| vec![*number]).unwrap_or_default(),
            ("ttl", 1) => vec![self.dice.below(3) as u8],
            ("fragment", 2) => {
                self.one_of(&FRAGMENTS).map(|bits| bits.to_be_bytes().to_vec()).unwrap_or_default()
            }
            (_, 6) => self.mac(before),
            (_, 1) => vec![self.byte(before[0])],
            (_, 2) => self.word(before).to_be_bytes().to_vec(),
            _ => (0..before.len()).map(|_| self.dice.roll() as u8).collect(),
        }
    }

    fn byte(&mut self, before: u8) -> u8 {
        match self.dice.below(4) {
            0 => before.wrapping_add(1),
            1 => before.wrapping_sub(1),
            2 => self.one_of(&TELLING).copied().unwrap_or(0),
            _ => self.dice.roll() as u8,
        }
    }

    /// Lengths and checksums: near what it was, an end of the range, or anything.
    fn word(&mut self, before: &[u8]) -> u16 {
        let before = be16(before, 0).unwrap_or(0);
        match self.dice.below(4) {
            0 => before.wrapping_add(1 + self.dice.below(9) as u16),
            1 => before.wrapping_sub(1 + self.dice.below(9) as u16),
            2 => self.one_of(&[0, 1, 7, 8, 19, 20, 28, 40, 0x7fff, 0xffff]).copied().unwrap_or(0),
            _ => self.dice.roll() as u16,
        }
    }

    fn mac(&mut self, before: &[u8]) -> Vec<u8> {
        let mut mac = before.to_vec();
        match self.dice.below(3) {
            0 => mac.fill(0xff),
            1 => mac[0] ^= 1,
            _ => mac = (0..6).map(|_| self.dice.roll() as u8).collect(),
        }
        mac
    }

    fn port(&mut self) -> [u8; 2] {
        let known = if self.dice.below(8) == 0 { None } else { self.dice_from_ports() };
        known.unwrap_or_else(|| (self.dice.roll() as u16).to_be_bytes())
    }

    fn dice_from_ports(&mut self) -> Option<[u8; 2]> {
        let index = self.dice.below(self.ports.len().max(1));
        self.ports.get(index).and_then(|port| port[..].try_into().ok())
    }

    /// An address that other frames have, one with a meaning of its own, or any.
    fn address(&mut self, kind: Kind) -> Vec<u8> {
        let known = if kind == Kind::Ipv4 { &self.addresses4 } else { &self.addresses6 };
        let (index, way) = (self.dice.below(known.len().max(1)), self.dice.below(8));
        match (way, known.get(index)) {
            (0, _) | (_, None) => self.random_address(kind),
            (1, _) => self.special_address(kind),
            (2, Some(address)) => {
                let mut near = address.clone();
                let last = near.len() - 1;
                near[last] = self.byte(near[last]);
                near
            }
            (_, Some(address)) => address.clone(),
        }
    }

    fn random_address(&mut self, kind: Kind) -> Vec<u8> {
        let length = if kind == Kind::Ipv4 { 4 } else { 16 };
        (0..length).map(|_| self.dice.roll() as u8).collect()
    }

    fn special_address(&mut self, kind: Kind) -> Vec<u8> {
        if kind == Kind::Ipv4 {
            return self.one_of(&SOURCES4).map(|address| address.to_vec()).unwrap_or_default();
        }
        let (first, last, mapped) = self.one_of(&SOURCES6).copied().unwrap_or_default();
        let mut address = vec![0; 16];
        address[..2].copy_from_slice(&first.to_be_bytes());
        address[10..12].copy_from_slice(&mapped.to_be_bytes());
        address[15] = last;
        address
    }
}

/// The values of fields in the headers of a kind.
fn values(frame: &[u8], kinds: &[Kind], names: &[&str]) -> Vec<Vec<u8>> {
    let wanted = layers(frame).into_iter().filter(|layer| kinds.contains(&layer.kind));
    wanted
        .flat_map(|layer| names.iter().map(move |name| field(&frame[layer.at..], layer.kind, name)))
        .collect()
}

/// A field of a header that begins with `bytes`; empty if the header has none of this name.
fn field(bytes: &[u8], kind: Kind, name: &str) -> Vec<u8> {
    let field = kind.fields().iter().find(|(other, ..)| *other == name);
    field.and_then(|(_, at, width)| bytes.get(*at..at + width)).map(<[u8]>::to_vec).unwrap_or_default()
}

fn insert(frame: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    frame.splice(at..at, bytes.iter().copied());
}

/// Addresses, and ports behind them, change places.
fn swap_ends(frame: &mut [u8], ip: &Layer) {
    let (at, width) = if ip.kind == Kind::Ipv4 { (12, 4) } else { (8, 16) };
    let (left, right) = frame[ip.at + at..ip.at + at + 2 * width].split_at_mut(width);
    left.swap_with_slice(right);
    let behind = layers(frame).into_iter().find(|layer| layer.at >= ip.end());
    if let Some(transport) = behind.filter(|layer| matches!(layer.kind, Kind::Tcp | Kind::Udp)) {
        let (left, right) = frame[transport.at..transport.at + 4].split_at_mut(2);
        left.swap_with_slice(right);
    }
}

/// A header whose lengths and checksum are still to be filled in.
fn ip_header(kind: Kind, protocol: u8, source: &[u8], destination: &[u8]) -> Vec<u8> {
    let head: &[u8] = if kind == Kind::Ipv4 {
        &[0x45, 0, 0, 0, 0, 7, 0, 0, 61, protocol, 0, 0]
    } else {
        &[0x60, 0, 0, 0, 0, 0, protocol, 61]
    };
    [head, source, destination].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::rows;

    #[test]
    fn a_seed_makes_the_same_frames_again_and_all_of_them_can_be_run() {
        let frames = || rows().into_iter().map(|row| row.frame).collect();
        let (mut one, mut same) = (Mutator::new(7, frames()), Mutator::new(7, frames()));
        let mut kinds = BTreeSet::new();
        for _ in 0..100_000 {
            let frame = one.frame();
            assert_eq!(frame, same.frame());
            assert!((SHORTEST..=LONGEST).contains(&frame.len()));
            kinds.insert(super::super::layers::shape(&frame));
        }
        for shape in
            ["2-vlan-ipv6-tcp", "ipv4-icmp-ipv4-tcp", "ipv6-udp-ipv4-udp", "ipv6-hop-by-hop-routing-udp"]
        {
            assert!(kinds.contains(shape), "{shape} in {} shapes", kinds.len());
        }
    }
}
