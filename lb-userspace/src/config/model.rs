//! The validated configuration: what exists here is valid, and nothing here knows YAML.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
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
    /// What clients' addresses are translated to.
    pub sources: Sources,
    pub timeouts: Timeouts,
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

/// Addresses of the balancer, and ports of each, that stand for clients (`forward: fullnat`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sources {
    pub v4: Vec<Ipv4Addr>,
    pub v6: Vec<Ipv6Addr>,
    pub ports: RangeInclusive<u16>,
}

impl Sources {
    pub fn all(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.v4.iter().copied().map(IpAddr::from).chain(self.v6.iter().copied().map(IpAddr::from))
    }

    /// Ports of each address.
    pub fn ports_of_one(&self) -> u32 {
        u32::from(*self.ports.end()) - u32::from(*self.ports.start()) + 1
    }
}

impl Default for Sources {
    fn default() -> Self {
        Self { v4: Vec::new(), v6: Vec::new(), ports: 1024..=65535 }
    }
}

/// How long a silent connection is kept whose addresses are translated, in states of TCP that pass. In the others it is
/// [`IdleTimeout`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Timeouts {
    pub syn: Duration,
    pub fin: Duration,
    pub reset: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { syn: Duration::from_secs(30), fin: Duration::from_secs(120), reset: Duration::from_secs(10) }
    }
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
    /// Flows that can be pinned at a time, a power of two.
    pub pins: u32,
    /// Connections whose addresses are translated, at a time; 0 where no pool does that.
    pub connections: u32,
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
    pub flows: Flows,
    /// How a backend that comes up gets its share; at once where there is none.
    pub slow_start: Option<SlowStart>,
    pub tiers: Tiers,
    pub backends: Vec<Backend>,
}

impl Pool {
    /// How packets get to a backend of it.
    pub fn forward_to(&self, backend: &Backend) -> Forward {
        backend.port.map_or(self.forward, |port| self.forward.to_port(port))
    }

    /// How a backend of it is checked.
    pub fn check_of(&self, backend: &Backend) -> Check {
        let port = backend.port.filter(|_| self.check.at_own_port).unwrap_or(self.check.port);
        Check { port, ..self.check.clone() }
    }
}

/// What becomes of flows whose backend takes no new ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flows {
    pub idle_timeout: IdleTimeout,
    pub on_down: OnDown,
    /// With [`OnDown::Auto`]: from soft evidence (a timeout, a wrong answer) until flows move.
    pub down_grace: Duration,
    pub on_remove: OnRemove,
    /// When the flows of a draining backend move; never where there is none.
    pub drain_timeout: Option<Duration>,
}

impl Default for Flows {
    fn default() -> Self {
        Self {
            idle_timeout: IdleTimeout::default(),
            on_down: OnDown::Auto,
            down_grace: Duration::from_secs(30),
            on_remove: OnRemove::Drain,
            drain_timeout: None,
        }
    }
}

/// How long a silent flow is protected once its slot has moved (T1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdleTimeout {
    pub tcp: Duration,
    pub udp: Duration,
}

impl IdleTimeout {
    pub const fn of(self, protocol: Protocol) -> Duration {
        match protocol {
            Protocol::Tcp => self.tcp,
            Protocol::Udp => self.udp,
        }
    }
}

impl Default for IdleTimeout {
    fn default() -> Self {
        Self { tcp: Duration::from_secs(15 * 60), udp: Duration::from_secs(60) }
    }
}

/// What becomes of the old flows of a backend that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnDown {
    /// Hard evidence moves them at once, soft evidence after a grace.
    Auto,
    /// They stay.
    Keep,
    /// They move at once.
    Move,
}

/// What becomes of the old flows of a backend that left the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnRemove {
    /// They stay until they end, or until the drain's deadline.
    Drain,
    /// They move at once.
    Move,
}

/// A share that rises over a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlowStart {
    pub duration: Duration,
    pub curve: Curve,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Curve {
    Linear,
    /// The square of the time's part: slower at first.
    Square,
}

/// Pools that take the place of one that has too few backends up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tiers {
    /// Indices into [`Config::pools`], in order of preference.
    pub fallback: Vec<usize>,
    /// Backends that must be up for a pool to be used.
    pub min_healthy: AtLeast,
    /// Percent: with fewer up than this, packets go to all backends of the pool in use. 0 is off.
    pub panic: u8,
    /// How long a better pool must have had enough up before it is used again.
    pub failback_hold: Duration,
}

impl Default for Tiers {
    fn default() -> Self {
        let failback_hold = Duration::from_secs(60);
        Self { fallback: Vec::new(), min_healthy: AtLeast::Count(1), panic: 0, failback_hold }
    }
}

/// A number, or a part of all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtLeast {
    /// 1 or more.
    Count(u32),
    /// 1 to 100.
    Percent(u8),
}

impl AtLeast {
    /// How many of `all` it asks for; never none.
    pub fn of(self, all: usize) -> usize {
        match self {
            Self::Count(count) => count as usize,
            Self::Percent(percent) => (all * usize::from(percent)).div_ceil(100).max(1),
        }
    }
}

impl fmt::Display for AtLeast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => write!(f, "{count}"),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
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
    /// Rewritten destination; the backend answers through the balancer. Port 0 leaves the client's choice.
    Nat { port: u16 },
    /// Rewritten destination and source, any family to any family.
    Fullnat { port: u16 },
}

impl Forward {
    /// Whether addresses are translated, and answers come back this way.
    pub const fn translates(self) -> bool {
        matches!(self, Self::Nat { .. } | Self::Fullnat { .. })
    }

    /// The same way, to another port where that is a matter of it.
    #[must_use]
    pub const fn to_port(self, port: u16) -> Self {
        match self {
            Self::Gue { .. } => Self::Gue { port },
            Self::Nat { .. } => Self::Nat { port },
            Self::Fullnat { .. } => Self::Fullnat { port },
            Self::Ipip | Self::L2 => self,
        }
    }

    /// The port that packets are sent to; 0 where that is no matter of this way.
    pub const fn port(self) -> u16 {
        match self {
            Self::Gue { port } | Self::Nat { port } | Self::Fullnat { port } => port,
            Self::Ipip | Self::L2 => 0,
        }
    }
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
    /// What packets are sent to instead of the pool's port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// What names it in the connection IDs of QUIC.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_id: Option<ServerId>,
    /// No file names it any more, and it still has flows. Never set by a file.
    #[serde(skip)]
    pub leaving: bool,
}

/// 1 to 15 bytes (draft-ietf-quic-load-balancers, section 3).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ServerId(Vec<u8>);

impl ServerId {
    /// `None` where these are not 1 to 15 bytes.
    pub fn new(bytes: Vec<u8>) -> Option<Self> {
        (1..=15).contains(&bytes.len()).then_some(Self(bytes))
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for ServerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Serialize for ServerId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    pub kind: CheckKind,
    /// The port that is probed; where YAML gives none, the first single port of the first service that uses
    /// the pool. 0 only where `kind` is `None`.
    pub port: u16,
    /// Whether a backend with a port of its own is probed at that.
    pub at_own_port: bool,
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
    /// With [`Scheduler::SourceHash`]: how much of the client's address counts.
    pub source_prefix: SourcePrefix,
    /// Packets of QUIC go by their connection IDs.
    pub quic: Option<Quic>,
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
    /// New flows one after the other to all backends that take any.
    RoundRobin,
    /// The same, by weight.
    WeightedRoundRobin,
    /// New flows by chance, by weight.
    Random,
    /// New flows to the one of two backends with fewer flows for its weight; the two by chance, by weight.
    LeastConnections,
    /// New flows in turn, by weight and by how quickly checks are answered.
    LeastResponseTime,
}

/// Bits of a client's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourcePrefix {
    pub v4: u8,
    pub v6: u8,
}

impl Default for SourcePrefix {
    /// All.
    fn default() -> Self {
        Self { v4: 32, v6: 128 }
    }
}

/// Connection IDs whose server ID is in plain text (draft-ietf-quic-load-balancers).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quic {
    /// 0 to 6: the first three bits of a connection ID.
    pub config_id: u8,
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
    Forward {
        Ipip = "ipip", Gue { port: DEFAULT_GUE_PORT } = "gue", L2 = "l2",
        Nat { port: 0 } = "nat", Fullnat { port: 0 } = "fullnat"
    }
    OnEmpty { Drop = "drop", Pass = "pass", All = "all" }
    Protocol { Tcp = "tcp", Udp = "udp" }
    OnDown { Auto = "auto", Keep = "keep", Move = "move" }
    OnRemove { Drain = "drain", Move = "move" }
    Curve { Linear = "linear", Square = "square" }
    Scheduler {
        Maglev = "maglev", SourceHash = "source-hash", RoundRobin = "round-robin",
        WeightedRoundRobin = "weighted-round-robin", Random = "random", LeastConnections = "least-connections",
        LeastResponseTime = "least-response-time"
    }
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

    /// The pools whose backends packets to a pool may meet: itself, then its fallbacks in order.
    pub fn levels_of(&self, pool: usize) -> impl Iterator<Item = usize> + '_ {
        std::iter::once(pool).chain(self.pools[pool].tiers.fallback.iter().copied())
    }

    /// Whether packets to the address belong to a service.
    pub fn has_vip(&self, address: IpAddr) -> bool {
        self.services.iter().flat_map(|service| &service.vips).any(|vip| vip.contains(address))
    }
}
