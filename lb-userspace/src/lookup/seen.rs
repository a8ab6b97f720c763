//! What a frame is, as an independent parser reads it: for people and scripts, never for decisions.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use etherparse::{
    ArpOperation, ArpPacketSlice, IpNumber, Ipv6ExtensionSlice, LaxIpv4Slice, LaxIpv6Slice, LaxLinkExtSlice,
    LaxNetSlice, LaxSlicedPacket, LinkSlice,
};
use lb_common::wire::Mac;
use serde::{Deserialize, Serialize};

use super::icmp;

/// A frame, or the packet that an ICMP error is about. What it does not have is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Bytes of the frame; of an embedded packet, those that are there.
    pub length: usize,
    pub source_mac: Option<String>,
    pub destination_mac: Option<String>,
    /// VLAN ids, the outermost first.
    pub vlans: Vec<u16>,
    /// `ipv4`, `ipv6`, `arp`, or the EtherType in hex.
    pub family: String,
    pub source: Option<IpAddr>,
    pub destination: Option<IpAddr>,
    /// `tcp`, `udp`, `icmp`, `icmpv6`, `ipip`, `ipv6`, or a number.
    pub protocol: Option<String>,
    pub source_port: Option<u16>,
    pub destination_port: Option<u16>,
    /// TCP flags, an ICMP message, an ARP operation.
    pub message: Option<String>,
    /// TTL or hop limit.
    pub hops: Option<u8>,
    /// IPv4 options, or IPv6 extension headers, in their order.
    pub headers: Vec<String>,
    /// `first`, or `at N` with the bytes before it.
    pub fragment: Option<String>,
    /// The packet that an ICMP error is about.
    pub about: Option<Box<Seen>>,
}

impl Seen {
    pub fn of_frame(frame: &[u8]) -> Self {
        let mut seen = Self { length: frame.len(), family: "cut off".to_owned(), ..Self::default() };
        let Ok(packet) = LaxSlicedPacket::from_ethernet(frame) else { return seen };
        if let Some(LinkSlice::Ethernet2(ethernet)) = &packet.link {
            seen.source_mac = Some(Mac::from_bytes(ethernet.source()).to_string());
            seen.destination_mac = Some(Mac::from_bytes(ethernet.destination()).to_string());
        }
        let vlan = |extension: &LaxLinkExtSlice<'_>| match extension {
            LaxLinkExtSlice::Vlan(vlan) => Some(vlan.vlan_identifier().value()),
            LaxLinkExtSlice::Macsec(_) => None,
        };
        seen.vlans = packet.link_exts.iter().filter_map(vlan).collect();
        if let Some(payload) = packet.ether_payload() {
            seen.family = family(payload.ether_type.0);
        }
        seen.read(packet.net.as_ref());
        seen
    }

    /// What an ICMP error carries: mostly no more than the beginning.
    pub(super) fn of_packet(packet: &[u8]) -> Option<Self> {
        let sliced = LaxSlicedPacket::from_ip(packet).ok()?;
        let mut seen = Self { length: packet.len(), ..Self::default() };
        seen.read(sliced.net.as_ref());
        Some(seen)
    }

    fn read(&mut self, net: Option<&LaxNetSlice<'_>>) {
        match net {
            Some(LaxNetSlice::Ipv4(ip)) => self.ipv4(ip),
            Some(LaxNetSlice::Ipv6(ip)) => self.ipv6(ip),
            Some(LaxNetSlice::Arp(arp)) => self.arp(arp),
            None => {}
        }
    }

    fn ipv4(&mut self, ip: &LaxIpv4Slice<'_>) {
        let header = ip.header();
        "ipv4".clone_into(&mut self.family);
        (self.source, self.destination) =
            (Some(header.source_addr().into()), Some(header.destination_addr().into()));
        self.hops = Some(header.ttl());
        if !header.options().is_empty() {
            self.headers.push(format!("{} bytes of options", header.options().len()));
        }
        let offset = header.fragments_offset().value();
        if header.is_fragmenting_payload() {
            self.fragment = Some(fragment(offset));
        }
        self.transport(ip.payload_ip_number(), ip.payload().payload, offset);
    }

    fn ipv6(&mut self, ip: &LaxIpv6Slice<'_>) {
        let header = ip.header();
        "ipv6".clone_into(&mut self.family);
        (self.source, self.destination) =
            (Some(header.source_addr().into()), Some(header.destination_addr().into()));
        self.hops = Some(header.hop_limit());
        let mut offset = 0;
        for extension in ip.extensions().clone() {
            let name = match extension {
                Ipv6ExtensionSlice::HopByHop(_) => "hop-by-hop options",
                Ipv6ExtensionSlice::Routing(_) => "routing",
                Ipv6ExtensionSlice::DestinationOptions(_) => "destination options",
                Ipv6ExtensionSlice::Authentication(_) => "authentication",
                Ipv6ExtensionSlice::Fragment(header) => {
                    if header.is_fragmenting_payload() {
                        offset = header.fragment_offset().value();
                        self.fragment = Some(fragment(offset));
                    }
                    "fragment"
                }
            };
            self.headers.push(name.to_owned());
        }
        let payload = ip.payload();
        self.transport(payload.ip_number, payload.payload, offset);
    }

    /// A fragment that is not the first has no ports.
    fn transport(&mut self, protocol: IpNumber, payload: &[u8], fragment_offset: u16) {
        self.protocol = Some(protocol_name(protocol));
        if fragment_offset != 0 {
            return;
        }
        match (protocol, payload) {
            (IpNumber::TCP | IpNumber::UDP, [s0, s1, d0, d1, ..]) => {
                self.source_port = Some(u16::from_be_bytes([*s0, *s1]));
                self.destination_port = Some(u16::from_be_bytes([*d0, *d1]));
                if protocol == IpNumber::TCP {
                    self.message = payload.get(13).map(|flags| tcp_flags(*flags));
                }
            }
            (IpNumber::ICMP | IpNumber::IPV6_ICMP, _) => {
                let message = icmp::Message::read(payload, protocol == IpNumber::IPV6_ICMP);
                self.message = message.as_ref().map(ToString::to_string);
                let carried = message.filter(icmp::Message::is_error).and_then(|_| payload.get(8..));
                self.about = carried.and_then(Self::of_packet).map(Box::new);
            }
            _ => {}
        }
    }

    fn arp(&mut self, arp: &ArpPacketSlice<'_>) {
        "arp".clone_into(&mut self.family);
        let address = |bytes: &[u8]| <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from);
        self.source = address(arp.sender_protocol_addr());
        self.destination = address(arp.target_protocol_addr());
        let request = arp.operation() == ArpOperation::REQUEST;
        self.message = Some(if request { "request" } else { "reply" }.to_owned());
    }

    /// An end of the flow: address, and port if there is one.
    fn end(address: Option<IpAddr>, port: Option<u16>) -> String {
        match (address, port) {
            (None, _) => "?".to_owned(),
            (Some(address), None) => address.to_string(),
            (Some(address), Some(port)) => SocketAddr::new(address, port).to_string(),
        }
    }

    /// Source and destination, with ports.
    pub fn ends(&self) -> [String; 2] {
        [Self::end(self.source, self.source_port), Self::end(self.destination, self.destination_port)]
    }
}

fn family(ether_type: u16) -> String {
    match ether_type {
        0x0800 => "ipv4".to_owned(),
        0x86dd => "ipv6".to_owned(),
        0x0806 => "arp".to_owned(),
        other => format!("{other:#06x}"),
    }
}

fn fragment(offset: u16) -> String {
    if offset == 0 { "first".to_owned() } else { format!("at {}", u32::from(offset) * 8) }
}

fn protocol_name(protocol: IpNumber) -> String {
    match protocol {
        IpNumber::TCP => "tcp".to_owned(),
        IpNumber::UDP => "udp".to_owned(),
        IpNumber::ICMP => "icmp".to_owned(),
        IpNumber::IPV6_ICMP => "icmpv6".to_owned(),
        IpNumber::IPV4 => "ipip".to_owned(),
        IpNumber::IPV6 => "ipv6".to_owned(),
        IpNumber(other) => other.to_string(),
    }
}

/// As tcpdump's users know them.
fn tcp_flags(flags: u8) -> String {
    let names = ["FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR"];
    let set = names.iter().enumerate().filter(|(bit, _)| flags & 1 << bit != 0);
    let set: Vec<&str> = set.map(|(_, name)| *name).collect();
    if set.is_empty() { "no flags".to_owned() } else { set.join(" ") }
}

/// One line: `udp 192.0.2.7:4000 -> 203.0.113.10:53, fragment at 1480, VLAN 7`.
impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [source, destination] = self.ends();
        match (&self.protocol, self.source) {
            (Some(protocol), _) => match protocol.parse::<u8>() {
                Ok(number) => write!(f, "{} protocol {number} {source} -> {destination}", self.family)?,
                Err(_) => write!(f, "{protocol} {source} -> {destination}")?,
            },
            (None, Some(_)) => write!(f, "{} {source} -> {destination}", self.family)?,
            (None, None) if self.family.starts_with("0x") => write!(f, "EtherType {}", self.family)?,
            (None, None) => write!(f, "{}, no whole header", self.family)?,
        }
        if let Some(fragment) = &self.fragment {
            let order = if fragment == "first" { "first fragment" } else { "fragment" };
            let place = fragment.strip_prefix("first").unwrap_or(fragment);
            write!(f, ", {order}{}{place}", if place.is_empty() { "" } else { " " })?;
        }
        if let Some(message) = &self.message {
            write!(f, ", {message}")?;
        }
        for vlan in &self.vlans {
            write!(f, ", VLAN {vlan}")?;
        }
        self.about.as_ref().map_or(Ok(()), |about| write!(f, ", about {about}"))
    }
}
