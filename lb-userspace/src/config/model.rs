//! The validated configuration: what exists here is valid, and nothing here knows YAML.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::time::Duration;

use ipnetwork::{Ipv4Network, Ipv6Network};
use serde::{Serialize, Serializer};

use super::problem::Problem;
pub use super::vip::{Ports, Triple, Vip};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub interfaces: Vec<Interface>,
    /// The same on every balancer of an ECMP group. Keys the flow hash and the tables.
    pub seed: u64,
    pub outer_source: OuterSource,
    /// Answer ARP and neighbour solicitation for VIPs that are on-link.
    pub vip_arp: bool,
    /// Balance frames with VLAN tags too, and keep the tags.
    pub vlan: bool,
    pub icmp: Icmp,
    /// Log every decision of the packet path (debugging; slow).
    pub trace: bool,
    pub limits: Limits,
    pub api: Api,
    pub metrics: Metrics,
    pub pools: Vec<Pool>,
    pub services: Vec<Service>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Interface {
    pub name: String,
    pub mode: Mode,
}

/// How the XDP program is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Native where the driver can, otherwise generic, and says so.
    Auto,
    Native,
    Generic,
}

/// Where the source address of tunnel packets comes from, per family: a prefix whose host
/// bits are filled from the flow hash, or (None) the route's preferred source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OuterSource {
    pub v4: Option<Ipv4Network>,
    pub v6: Option<Ipv6Network>,
}

/// What xlb itself says to clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Icmp {
    /// Answer echo requests to VIPs.
    pub echo: bool,
    /// Messages of each kind (echo replies, delivered errors, too big, unreachable) that a CPU sends in a second.
    pub rate: u32,
}

impl Default for Icmp {
    fn default() -> Self {
        Self { echo: true, rate: 1000 }
    }
}

/// Capacities of the kernel maps, which cannot grow while they are in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// (VIP, port or range, protocol) triples, over both families.
    pub vips: u32,
    pub backends: u32,
    /// Slots of all tables together.
    pub slots: u32,
    /// Flows that can be pinned at a time.
    pub pins: u32,
}

/// The admin API on the unix socket.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Api {
    /// Whose members may use it, besides the agent's own user and group.
    pub group: Option<Written<Group>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Group {
    Name(String),
    Id(u32),
}

/// Where metrics are served over TCP.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Metrics {
    pub listen: Vec<Written<SocketAddr>>,
}

/// A value that only the host can find fault with, with the place where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written<T> {
    pub value: T,
    pub(super) file: String,
    pub(super) line: u32,
    pub(super) column: u32,
    pub(super) path: String,
}

impl<T> Written<T> {
    /// What is wrong with it, and the way out.
    pub fn problem(&self, message: impl Into<String>, hint: impl Into<String>) -> Problem {
        Problem {
            file: self.file.clone(),
            line: Some(self.line),
            column: Some(self.column),
            path: self.path.clone(),
            message: message.into(),
            hint: Some(hint.into()),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    pub name: String,
    pub forward: Forward,
    pub check: Check,
    pub on_empty: OnEmpty,
    pub backends: Vec<Backend>,
}

/// How a packet reaches its backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Forward {
    /// IP-in-IP, any family in any family (RFC 2003, RFC 2473, RFC 4213).
    Ipip,
    /// IP in UDP to a port (GUE variant 1, draft-ietf-intarea-gue), any family in any family.
    Gue { port: u16 },
    /// Rewritten destination MAC; the backend is on-link.
    L2,
}

/// The UDP port of GUE (IANA: gue).
pub const DEFAULT_GUE_PORT: u16 = 6080;

/// What becomes of packets while no backend of the pool is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnEmpty {
    Drop,
    /// To the host's own stack.
    Pass,
    /// To all configured backends as if they were up.
    All,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Backend {
    /// Unique in its pool; the address where YAML gives no name.
    pub name: String,
    pub address: IpAddr,
    /// 0 to 100; 0 takes no new flows.
    pub weight: u8,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    pub kind: CheckKind,
    /// The port that is probed; where YAML gives none, the first single port of the first service that uses
    /// the pool. 0 only where `kind` is `None`.
    pub port: u16,
    pub interval: Duration,
    pub timeout: Duration,
    /// Consecutive successes that bring a backend up, 1 or more.
    pub rise: u32,
    /// Consecutive failures that take a backend down, 1 or more.
    pub fall: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckKind {
    /// Always up.
    None,
    /// A TCP connection is accepted.
    Tcp,
    /// A GET is answered with an expected status.
    Http { path: String, host: Option<String>, expect: Vec<RangeInclusive<u16>> },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    pub name: String,
    pub vips: Vec<Vip>,
    pub ports: Vec<Ports>,
    pub protocols: Vec<Protocol>,
    /// Index into `Config::pools`.
    pub pool: usize,
    pub scheduler: Scheduler,
    pub fragments: Fragments,
    /// What it says of its VIPs. All services of a VIP that say it agree.
    pub unmapped: Option<Unmapped>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    Tcp,
    Udp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scheduler {
    /// Over addresses and ports.
    Maglev,
    /// Over the client's address alone: all that a client sends goes to one backend.
    SourceHash,
}

/// What becomes of fragments, which have no ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fragments {
    Drop,
    /// To the backend of the client's address.
    Balance,
}

/// What becomes of packets to a VIP that no service takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unmapped {
    Drop,
    /// To the host's own stack.
    Pass,
    /// Dropped and answered, with ICMP: port unreachable.
    Reject,
}

/// The words an operator meets in YAML, in output, in metrics and in logs: one place for each.
macro_rules! words {
    ($($name:ident { $($variant:ident $({ $field:ident: $default:expr })? = $word:literal),+ })+) => {$(
        impl $name {
            /// In the order in which messages list them; with their defaults.
            pub const ALL: &'static [$name] = &[$($name::$variant $({ $field: $default })?),+];
            pub const WORDS: &'static [&'static str] = &[$($word),+];

            pub fn as_str(self) -> &'static str {
                match self { $($name::$variant { .. } => $word),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }
    )+};
}

words! {
    Mode { Auto = "auto", Native = "native", Generic = "generic" }
    Forward { Ipip = "ipip", Gue { port: DEFAULT_GUE_PORT } = "gue", L2 = "l2" }
    OnEmpty { Drop = "drop", Pass = "pass", All = "all" }
    Protocol { Tcp = "tcp", Udp = "udp" }
    Scheduler { Maglev = "maglev", SourceHash = "source-hash" }
    Fragments { Drop = "drop", Balance = "balance" }
    Unmapped { Drop = "drop", Pass = "pass", Reject = "reject" }
}

impl CheckKind {
    /// The word of `health.type`.
    pub fn as_str(&self) -> &'static str {
        match self {
            CheckKind::None => "none",
            CheckKind::Tcp => "tcp",
            CheckKind::Http { .. } => "http",
        }
    }
}

impl Service {
    /// Everything the service answers to. No triple appears twice in a configuration.
    pub fn triples(&self) -> impl Iterator<Item = Triple> + '_ {
        self.vips.iter().flat_map(move |&vip| {
            self.ports
                .iter()
                .flat_map(move |&ports| self.protocols.iter().map(move |&protocol| (vip, ports, protocol)))
        })
    }
}

impl Config {
    /// The pool a service sends to.
    pub fn pool_of(&self, service: &Service) -> &Pool {
        &self.pools[service.pool]
    }

    /// Whether packets to the address belong to a service.
    pub fn has_vip(&self, address: IpAddr) -> bool {
        self.services.iter().flat_map(|service| &service.vips).any(|vip| vip.contains(address))
    }
}
