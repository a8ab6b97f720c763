//! The frames that lines are measured with, and where they differ from flow to flow. Knows no balancer.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Result, anyhow};
use etherparse::{Ethernet2Header, IpHeaders, PacketBuilder, PacketBuilderStep};
use lb_common::abi::Source;
use lb_userspace::bpf::{FRAME_BYTES, Packets};

use super::lines::{Kind, Line, Scene};

/// The first VIP; the others follow it. 198.18.0.0/15 is for benchmarks (RFC 2544), 2001:2::/48 too (RFC 5180).
const VIP4: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 0);
const VIP6: Ipv6Addr = Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, 0);
const STRAY4: Ipv4Addr = Ipv4Addr::new(198, 19, 0, 0);
const STRAY6: Ipv6Addr = Ipv6Addr::new(0x2001, 2, 0, 1, 0, 0, 0, 0);
/// The first client.
const CLIENT4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 0);
const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0);
const ROUTER4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const ROUTER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1);

const ETHERNET: usize = 14;
const ICMP: usize = 8;
const CLIENT_PORT: u16 = 40000;
const VIP_PORT: u16 = 80;

pub fn vip(scene: &Scene, index: u32) -> IpAddr {
    if scene.v6 {
        Ipv6Addr::from(u128::from(VIP6) + u128::from(index)).into()
    } else {
        Ipv4Addr::from(u32::from(VIP4) + index).into()
    }
}

pub fn backend(scene: &Scene, number: u32) -> IpAddr {
    if scene.backends_v6() {
        Ipv6Addr::from(0xfd00_0001_u128 << 96 | u128::from(number)).into()
    } else {
        Ipv4Addr::from(0x0a01_0000 + number).into()
    }
}

/// What a reply is sent to: the client, or the source and the port (as it lies in the packet) that stand for it.
pub type StandIn = Option<(Source, u16)>;

/// The packets of a line.
pub fn packets(line: &Line, stand_in: StandIn) -> Result<Packets> {
    match line.packet {
        Kind::Ack | Kind::Syn | Kind::Datagram | Kind::Stray | Kind::Echo => to_vip(line),
        Kind::Reply => reply(line, stand_in),
        Kind::Error => error(line),
        Kind::NotIp => not_ip(),
    }
}

fn to_vip(line: &Line) -> Result<Packets> {
    let v6 = line.scene.v6;
    let (client, vip) = if v6 {
        (IpAddr::V6(CLIENT6), IpAddr::V6(if line.packet == Kind::Stray { STRAY6 } else { VIP6 }))
    } else {
        (IpAddr::V4(CLIENT4), IpAddr::V4(if line.packet == Kind::Stray { STRAY4 } else { VIP4 }))
    };
    let ports = Ports { from: CLIENT_PORT, to: VIP_PORT };
    let frame = filled(client, vip, line.packet, ports)?;
    let [source_offset, destination_offset] = addresses(v6, ETHERNET);
    Ok(Packets { frame, source_offset, destination_offset, growth: line.growth() })
}

fn reply(line: &Line, stand_in: StandIn) -> Result<Packets> {
    let port = stand_in.map_or(CLIENT_PORT, |(_, port)| u16::from_be(port));
    let from = backend(&line.scene, 0);
    let to = match from {
        IpAddr::V4(_) => {
            let to = stand_in.map_or(CLIENT4.octets(), |(source, _)| source.v4.to_ne_bytes());
            IpAddr::from(to)
        }
        IpAddr::V6(_) => {
            let to = stand_in.map_or(CLIENT6.octets(), |(source, _)| {
                let mut bytes = [0; 16];
                bytes[..8].copy_from_slice(&source.v6[0].to_ne_bytes());
                bytes[8..].copy_from_slice(&source.v6[1].to_ne_bytes());
                bytes
            });
            IpAddr::from(to)
        }
    };
    let frame = filled(from, to, Kind::Ack, Ports { from: VIP_PORT, to: port })?;
    // The number of the flow is laid over the client's address; that of the destination, which is 0, over the same.
    let [_, client] = addresses(from.is_ipv6(), ETHERNET);
    Ok(Packets { frame, source_offset: client, destination_offset: client, growth: line.growth() })
}

/// "Fragmentation needed" or "packet too big": a router's, about what the VIP sent to the client.
fn error(line: &Line) -> Result<Packets> {
    const MTU: [u8; 4] = 1400u32.to_be_bytes();
    let v6 = line.scene.v6;
    let ports = Ports { from: VIP_PORT, to: CLIENT_PORT };
    let carried_at = ETHERNET + if v6 { 40 } else { 20 } + ICMP;
    let room = FRAME_BYTES - carried_at;
    let mut bytes = Vec::new();
    if v6 {
        let carried =
            transport(PacketBuilder::ipv6(VIP6.octets(), CLIENT6.octets(), 64), v6, Kind::Ack, ports, room)?;
        let builder = from_gateway().ipv6(ROUTER6.octets(), VIP6.octets(), 64);
        builder.icmpv6_raw(2, 0, MTU).write(&mut bytes, &carried)?;
    } else {
        let carried =
            transport(PacketBuilder::ipv4(VIP4.octets(), CLIENT4.octets(), 64), v6, Kind::Ack, ports, room)?;
        let builder = from_gateway().ipv4(ROUTER4.octets(), VIP4.octets(), 64);
        builder.icmpv4_raw(3, 4, MTU).write(&mut bytes, &carried)?;
    }
    let [_, client] = addresses(v6, carried_at);
    let frame = whole(bytes)?;
    Ok(Packets { frame, source_offset: client, destination_offset: client, growth: line.growth() })
}

/// An ARP request for nobody.
fn not_ip() -> Result<Packets> {
    let mut bytes = Vec::new();
    bytes.extend([0xff; 6]);
    bytes.extend([2, 0, 0, 0, 0, 3]);
    bytes.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
    bytes.resize(FRAME_BYTES, 0);
    // The end of the sender's MAC with the beginning of its address, and the target's address.
    Ok(Packets { frame: whole(bytes)?, source_offset: 26, destination_offset: 38, growth: 0 })
}

#[derive(Clone, Copy)]
struct Ports {
    from: u16,
    to: u16,
}

fn from_gateway() -> PacketBuilderStep<Ethernet2Header> {
    PacketBuilder::ethernet2([2, 0, 0, 0, 0, 2], [2, 0, 0, 0, 0, 1])
}

/// Offsets of the last four bytes of both addresses.
const fn addresses(v6: bool, ip: usize) -> [u32; 2] {
    let ip = ip as u32;
    if v6 { [ip + 20, ip + 36] } else { [ip + 12, ip + 16] }
}

fn filled(from: IpAddr, to: IpAddr, packet: Kind, ports: Ports) -> Result<[u8; FRAME_BYTES]> {
    let builder = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => from_gateway().ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => from_gateway().ipv6(from.octets(), to.octets(), 64),
        _ => return Err(anyhow!("{from} and {to} are of different families")),
    };
    whole(transport(builder, from.is_ipv6(), packet, ports, FRAME_BYTES)?)
}

/// The packet, filled up with zeros to `length`: as QUIC, they are a short header that names the first backend.
fn transport(
    builder: PacketBuilderStep<IpHeaders>,
    v6: bool,
    packet: Kind,
    ports: Ports,
    length: usize,
) -> Result<Vec<u8>> {
    const ZEROS: [u8; FRAME_BYTES] = [0; FRAME_BYTES];
    let Ports { from, to } = ports;
    let mut bytes = Vec::with_capacity(length);
    macro_rules! fill {
        ($builder:expr) => {{
            let builder = $builder;
            let room = length.saturating_sub(builder.size(0));
            builder.write(&mut bytes, &ZEROS[..room])?;
        }};
    }
    match packet {
        Kind::Datagram => fill!(builder.udp(from, to)),
        Kind::Syn => fill!(builder.tcp(from, to, 1, 1000).syn()),
        Kind::Echo if v6 => fill!(builder.icmpv6_echo_request(1, 1)),
        Kind::Echo => fill!(builder.icmpv4_echo_request(1, 1)),
        Kind::Ack | Kind::Reply | Kind::Error | Kind::Stray | Kind::NotIp => {
            fill!(builder.tcp(from, to, 1, 1000).ack(1));
        }
    }
    Ok(bytes)
}

fn whole(bytes: Vec<u8>) -> Result<[u8; FRAME_BYTES]> {
    bytes.try_into().map_err(|bytes: Vec<u8>| anyhow!("the frame has {} bytes", bytes.len()))
}

#[cfg(test)]
mod tests {
    use lb_common::abi::BenchPlace;

    use super::*;

    #[test]
    fn one_word_of_the_driver_has_each_number_that_is_laid_over_a_frame() {
        for line in super::super::lines::lines() {
            let packets = packets(&line, None).unwrap();
            for offset in [packets.source_offset, packets.destination_offset] {
                assert!(BenchPlace::at(offset as usize).is_some(), "{}: {offset}", line.name());
            }
        }
    }
}
