//! Makes headers agree with each other again after a frame was changed: numbers of what follows, lengths, checksums.

use super::layers::{Kind, Layer, layers};

/// Lengths of the packet itself: what it holds ends where the frame does.
pub fn lengths(frame: &mut [u8]) {
    let layers = layers(frame);
    let end = frame.len();
    for layer in &layers {
        match layer.kind {
            Kind::Ipv4 => set16(frame, layer.at + 2, end - layer.at),
            Kind::Ipv6 => set16(frame, layer.at + 4, end - layer.end()),
            Kind::Udp => set16(frame, layer.at + 4, end - layer.at),
            // What an error carries is cut off: its lengths are those of the packet that it is about.
            Kind::Icmp | Kind::Icmp6 => break,
            Kind::Ethernet
            | Kind::Vlan
            | Kind::Arp
            | Kind::Extension(_)
            | Kind::Fragment
            | Kind::Tcp
            | Kind::Payload => {}
        }
    }
}

/// Checksums of all headers, innermost first: the outer ones are over the inner ones.
pub fn checksums(frame: &mut [u8]) {
    let layers = layers(frame);
    for (index, layer) in layers.iter().enumerate().rev() {
        let ip = layers[..index].iter().rfind(|layer| layer.kind.is_ip());
        match (layer.kind, ip) {
            (Kind::Ipv4, _) => {
                set16(frame, layer.at + 10, 0);
                let sum = !folded(sum(&frame[layer.at..layer.end()]));
                set16(frame, layer.at + 10, usize::from(sum));
            }
            (Kind::Icmp, _) => transport(frame, layer, 2, 0),
            (Kind::Icmp6, Some(ip)) => transport(frame, layer, 2, pseudo(frame, ip, layer, 58)),
            (Kind::Tcp, Some(ip)) => transport(frame, layer, 16, pseudo(frame, ip, layer, 6)),
            (Kind::Udp, Some(ip)) => transport(frame, layer, 6, pseudo(frame, ip, layer, 17)),
            _ => {}
        }
    }
}

fn transport(frame: &mut [u8], layer: &Layer, field: usize, pseudo: u64) {
    set16(frame, layer.at + field, 0);
    let sum = !folded(pseudo + sum(&frame[layer.at..]));
    set16(frame, layer.at + field, usize::from(sum));
}

fn pseudo(frame: &[u8], ip: &Layer, layer: &Layer, protocol: u64) -> u64 {
    let addresses = if ip.kind == Kind::Ipv4 { 12..20 } else { 8..40 };
    sum(&frame[ip.at..][addresses]) + protocol + (frame.len() - layer.at) as u64
}

fn sum(bytes: &[u8]) -> u64 {
    let word = |pair: &[u8]| u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0));
    bytes.chunks(2).map(word).sum()
}

fn folded(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

/// A length that its field has no room for stands there cut off: no check of it may go wrong.
pub fn set16(frame: &mut [u8], at: usize, value: usize) {
    if let Some(field) = frame.get_mut(at..at + 2) {
        field.copy_from_slice(&(value as u16).to_be_bytes());
    }
}

/// Bytes of IP that a frame holds, from its first IP header on.
pub fn ip_bytes(frame: &[u8]) -> Option<usize> {
    layers(frame).iter().find(|layer| layer.kind.is_ip()).map(|layer| frame.len() - layer.at)
}

/// Says in front of a header that it is one of its kind, if something in front of it can say so.
pub fn announce(frame: &mut [u8], before: &Layer, kind: Kind) {
    let Some((at, width)) = before.kind.next() else { return };
    let number = kind.number(width == 1);
    let at = before.at + at;
    if width == 2 {
        set16(frame, at, usize::from(number));
    } else if let Some(byte) = frame.get_mut(at) {
        *byte = number as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{Transport, VIP4, VIP6, packet};
    use etherparse::{IpHeaders, IpNumber, Ipv4Header, Ipv6Header};

    #[test]
    fn lengths_and_checksums_of_a_builder_come_back() {
        let four = Ipv4Header::new(0, 9, IpNumber::TCP, [192, 0, 2, 1], VIP4.octets()).expect("no payload");
        let six = Ipv6Header { hop_limit: 9, destination: VIP6.octets(), ..Ipv6Header::default() };
        for ip in [IpHeaders::Ipv4(four, Default::default()), IpHeaders::Ipv6(six, Default::default())] {
            for transport in [Transport::Tcp, Transport::Udp] {
                let whole = packet(ip.clone(), transport, (4000, 80), 33);
                let mut frame = whole.clone();
                for layer in layers(&whole) {
                    for (name, at, width) in layer.kind.fields() {
                        if matches!(*name, "length" | "checksum") {
                            frame[layer.at + at..][..*width].fill(0x5a);
                        }
                    }
                }
                assert_ne!(frame, whole);
                lengths(&mut frame);
                checksums(&mut frame);
                assert_eq!(frame, whole);
            }
        }
    }
}
