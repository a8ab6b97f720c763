//! Next hops: from a backend's address to the interface, MAC addresses and MTU that a frame to it needs, as the
//! kernel's routes and neighbours say. Knows nothing of pools or maps, and writes nothing but requests
//! to resolve a neighbour, and a veth pair for packets to this host itself.

mod decode;
mod features;
mod follower;
mod netlink;
#[cfg(test)]
mod netns;
mod pair;
mod resolver;
mod route;

use std::fmt;
use std::net::IpAddr;

pub use follower::{Answer, Event, Follower, HOLD_NO_WAY, HOLD_SILENT, Known, LinkEvent};
pub use resolver::{DEFAULT_WAIT, Leg, Resolver};

/// How a frame reaches an address.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NextHop {
    pub ifindex: u32,
    pub interface: String,
    /// The interface's own.
    pub source_mac: [u8; 6],
    /// The gateway's, or the address's own where it is on-link.
    pub mac: [u8; 6],
    /// Bytes of IP packet: the least of the interface's MTU, the route's `mtu` metric and a path MTU that the host
    /// has learnt, at most 65535.
    pub mtu: u16,
    /// What the host itself would use as the source, always of the address's family.
    pub preferred_source: Option<IpAddr>,
    /// `None` where the address is on-link. May be IPv6 for an IPv4 address (RFC 5549 style routes).
    pub gateway: Option<IpAddr>,
    /// The interface's, as in [`Link`].
    pub kind: Option<String>,
    /// The interface's, as in [`Link`].
    pub redirect_target: bool,
}

impl NextHop {
    pub fn way(&self) -> Way<'_> {
        Way {
            ifindex: self.ifindex,
            interface: &self.interface,
            mtu: self.mtu,
            preferred_source: self.preferred_source,
            gateway: self.gateway,
            kind: self.kind.as_deref(),
            redirect_target: self.redirect_target,
        }
    }
}

/// What of a next hop the route and its interface tell, whoever the neighbour is. Fields as in [`NextHop`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way<'a> {
    pub ifindex: u32,
    pub interface: &'a str,
    pub mtu: u16,
    pub preferred_source: Option<IpAddr>,
    pub gateway: Option<IpAddr>,
    pub kind: Option<&'a str>,
    pub redirect_target: bool,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Link {
    pub ifindex: u32,
    pub name: String,
    /// `None` where it is not Ethernet: loopback, tun.
    pub mac: Option<[u8; 6]>,
    pub mtu: u32,
    /// Carries frames: set up, and with a carrier.
    pub up: bool,
    /// Set up by the administrator, whether or not there is a carrier.
    pub admin_up: bool,
    /// `veth`, `bridge`, ...; `None` for most physical interfaces.
    pub kind: Option<String>,
    /// The id of the XDP program that is attached, whoever attached it.
    pub xdp_program: Option<u32>,
    /// Whether it is attached in generic mode.
    pub xdp_generic: bool,
    /// The index of what it is stacked on: a VLAN's device. For a veth it is the peer's, which may be in another
    /// network namespace.
    pub lower: Option<u32>,
    /// Native XDP can send frames out of it. As the kernel says (6.3); before that by kind. On some drivers (veth: with
    /// its peer's) this comes and goes with XDP programs.
    pub redirect_target: bool,
}

/// Why there is no next hop. Says what to do, but not for which address: the caller knows.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Unresolved {
    NoRoute,
    Unreachable,
    Blackhole,
    Prohibit,
    /// The address is this host's own.
    Local,
    /// Broadcast, multicast or anycast, named in words.
    NotUnicast(&'static str),
    /// The route encapsulates (MPLS, SRv6, ...), which a frame built from a next hop does not.
    Encapsulated {
        interface: String,
    },
    InterfaceDown {
        interface: String,
        /// False: somebody has set it down. True: it has no carrier.
        admin_up: bool,
    },
    NoMac {
        interface: String,
    },
    /// Nobody has answered within the given time.
    NeighbourMissing {
        neighbour: IpAddr,
        interface: String,
    },
    /// The kernel has given up asking.
    NeighbourFailed {
        neighbour: IpAddr,
        interface: String,
    },
    NeighbourTableFull {
        neighbour: IpAddr,
    },
    Netlink(String),
}

impl fmt::Display for Unresolved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unresolved::NoRoute => f.write_str("no route; add one with `ip route add`"),
            Unresolved::Unreachable => {
                f.write_str("the route says unreachable; see `ip route show type unreachable`")
            }
            Unresolved::Blackhole => {
                f.write_str("the route says blackhole; see `ip route show type blackhole`")
            }
            Unresolved::Prohibit => f.write_str("the route says prohibit; see `ip route show type prohibit`"),
            Unresolved::Local => f.write_str(
                "the address is this host's own; use another host as a backend, or forward: fullnat",
            ),
            Unresolved::NotUnicast(kind) => {
                write!(f, "a {kind} address; use the address of one host")
            }
            Unresolved::Encapsulated { interface } => {
                write!(f, "the route through {interface} encapsulates; add a plain route")
            }
            Unresolved::InterfaceDown { interface, admin_up: false } => {
                write!(f, "{interface} is down; run `ip link set {interface} up`")
            }
            Unresolved::InterfaceDown { interface, admin_up: true } => {
                write!(f, "{interface} has no carrier; check its cable, switch port or peer")
            }
            Unresolved::NoMac { interface } => {
                write!(f, "{interface} is not Ethernet; route the address through an interface that is")
            }
            Unresolved::NeighbourMissing { neighbour, interface } => write!(
                f,
                "{neighbour} has not answered on {interface} yet; check that it is on and in the same network"
            ),
            Unresolved::NeighbourFailed { neighbour, interface } => write!(
                f,
                "{neighbour} does not answer on {interface}; check that it is on and in the same network"
            ),
            Unresolved::NeighbourTableFull { neighbour } => {
                let family = if neighbour.is_ipv4() { "ipv4" } else { "ipv6" };
                write!(
                    f,
                    "no room for neighbour {neighbour}; raise `sysctl net.{family}.neigh.default.gc_thresh3`"
                )
            }
            Unresolved::Netlink(what) => write!(f, "netlink: {what}"),
        }
    }
}

impl std::error::Error for Unresolved {}

/// Why an interface or the addresses could not be read.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum LinkError {
    NotFound { name: String },
    Netlink(String),
}

impl fmt::Display for LinkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LinkError::NotFound { name } => {
                write!(f, "no interface {name}; `ip link` lists those there are")
            }
            LinkError::Netlink(what) => write!(f, "netlink: {what}"),
        }
    }
}

impl std::error::Error for LinkError {}
