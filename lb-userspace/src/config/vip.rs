//! What a service answers to: addresses or prefixes, and ports. Knows neither places in a file nor the kernel.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::model::Protocol;

/// An address, or a prefix whose addresses are all VIPs. No bit is set behind the prefix length, which is never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Vip(IpNetwork);

impl Vip {
    /// `None` where the network's own address is not its first, or the length is 0.
    pub fn new(network: IpNetwork) -> Option<Self> {
        (network.ip() == network.network() && network.prefix() > 0).then_some(Self(network))
    }

    /// The prefix of so many bits that `address` lies in.
    pub fn holding(address: IpAddr, length: u8) -> Option<Self> {
        let network = IpNetwork::new(address, length).ok()?;
        Self::new(IpNetwork::new(network.network(), length).ok()?)
    }

    /// The address, or the first of the prefix.
    pub fn first(self) -> IpAddr {
        self.0.network()
    }

    pub fn length(self) -> u8 {
        self.0.prefix()
    }

    pub fn is_address(self) -> bool {
        self.0.prefix() == if self.is_ipv4() { 32 } else { 128 }
    }

    pub fn is_ipv4(self) -> bool {
        self.0.is_ipv4()
    }

    pub fn contains(self, address: IpAddr) -> bool {
        self.0.contains(address)
    }

    /// Whether two of them have an address in common: one holds the other's first.
    pub fn overlaps(self, other: IpNetwork) -> bool {
        self.contains(other.network()) || other.contains(self.first())
    }

    /// As operators write it: `203.0.113.0/24:8000-8100`, `[2001:db8::10]:80`.
    pub fn with(self, ports: Ports) -> String {
        if self.is_ipv4() { format!("{self}:{ports}") } else { format!("[{self}]:{ports}") }
    }
}

impl From<IpAddr> for Vip {
    fn from(address: IpAddr) -> Self {
        Self(IpNetwork::from(address))
    }
}

impl fmt::Display for Vip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_address() { self.first().fmt(f) } else { f.pad(&self.0.to_string()) }
    }
}

impl FromStr for Vip {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let network: IpNetwork = text.parse().map_err(|_| format!("{text} is neither address nor prefix"))?;
        Self::new(network).ok_or_else(|| format!("{text} has bits set behind its prefix length"))
    }
}

impl Serialize for Vip {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Vip {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Ports of a service, the most specific first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Ports {
    Port(u16),
    /// The lowest and the highest, which differ.
    Range(u16, u16),
    /// All, 0 too.
    Any,
}

impl Ports {
    pub const fn lowest(self) -> u16 {
        match self {
            Self::Port(port) | Self::Range(port, _) => port,
            Self::Any => 0,
        }
    }

    pub const fn highest(self) -> u16 {
        match self {
            Self::Port(port) | Self::Range(_, port) => port,
            Self::Any => u16::MAX,
        }
    }

    pub fn contains(self, port: u16) -> bool {
        (self.lowest()..=self.highest()).contains(&port)
    }

    /// 0 for one port, 1 for a range, 2 for any: where several hold a port, the lowest takes it.
    pub const fn rank(self) -> u8 {
        match self {
            Self::Port(_) => 0,
            Self::Range(..) => 1,
            Self::Any => 2,
        }
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(port) => port.fmt(f),
            Self::Range(low, high) => write!(f, "{low}-{high}"),
            Self::Any => f.write_str("any"),
        }
    }
}

impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text} is neither a port, nor a range, nor any");
        let port = |text: &str| text.parse::<u16>().map_err(|_| wrong());
        match text.split_once('-') {
            _ if text == "any" => Ok(Self::Any),
            None => port(text).map(Self::Port),
            Some((low, high)) => Ok((port(low)?, port(high)?))
                .and_then(|(low, high)| if low < high { Ok(Self::Range(low, high)) } else { Err(wrong()) }),
        }
    }
}

/// A number for one port, a text for the others.
impl Serialize for Ports {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Port(port) => serializer.serialize_u16(*port),
            Self::Range(..) | Self::Any => serializer.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for Ports {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(u16),
            Text(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Number(port) => Ok(Self::Port(port)),
            Written::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

/// What is counted for itself: of a service, one of its VIPs with one of its ports or ranges and a protocol.
pub type Triple = (Vip, Ports, Protocol);

#[cfg(test)]
mod tests {
    use super::*;

    fn vip(text: &str) -> Vip {
        text.parse().expect("a test names valid VIPs")
    }

    #[test]
    fn vips_and_ports_are_told_as_they_are_written() {
        for (vip_text, ports, told) in [
            ("203.0.113.10", Ports::Port(80), "203.0.113.10:80"),
            ("203.0.113.0/24", Ports::Range(8000, 8100), "203.0.113.0/24:8000-8100"),
            ("2001:db8::10", Ports::Any, "[2001:db8::10]:any"),
            ("2001:db8::/64", Ports::Port(80), "[2001:db8::/64]:80"),
        ] {
            assert_eq!(vip(vip_text).with(ports), told);
            assert_eq!(vip(vip_text).to_string(), vip_text);
            assert_eq!(ports.to_string().parse(), Ok(ports));
            let json = serde_json::to_string(&(vip(vip_text), ports)).expect("JSON");
            assert_eq!(
                serde_json::from_str::<(Vip, Ports)>(&json).ok(),
                Some((vip(vip_text), ports)),
                "{json}"
            );
        }
        assert_eq!(serde_json::to_string(&Ports::Port(80)).ok().as_deref(), Some("80"));
    }

    #[test]
    fn a_prefix_of_full_length_is_an_address() {
        assert_eq!(vip("203.0.113.10/32"), vip("203.0.113.10"));
        assert!(vip("2001:db8::10/128").is_address() && !vip("2001:db8::10/127").is_address());
        assert_eq!(Vip::holding([203, 0, 113, 77].into(), 24), Some(vip("203.0.113.0/24")));
        assert!("203.0.113.10/24".parse::<Vip>().is_err() && "0.0.0.0/0".parse::<Vip>().is_err());
    }

    #[test]
    fn what_is_no_port_is_no_port() {
        for text in ["", "-", "80-", "90-80", "80-80", "65536", "all"] {
            assert!(text.parse::<Ports>().is_err(), "{text}");
        }
    }
}
