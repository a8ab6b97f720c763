//! Connections told and let go: which of them are meant, and what their numbers stand for. Reads the places where they lie;
//! knows no core.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use ipnetwork::IpNetwork;
use lb_common::abi::{Backend as Row, BackendKind, Pin, PinState, Record, Source};
use lb_common::connections::{SourceEnd, seen};
use lb_common::wire::{Address6, PROTO_TCP, PROTO_UDP};
use serde::{Deserialize, Serialize};

use super::commands;
use super::snapshot::Index;
use super::status::monotonic_ns;
use crate::config::did_you_mean;
use crate::config::model::Config;
use crate::lookup;
use crate::reconcile::connections::Connections;
use crate::reconcile::desired::{backend_identity, forward_of, identity_of, protocol_number};
use crate::reconcile::pins::coarse_ns;
use crate::reconcile::plan::sources::address_of;
use crate::reconcile::sweep::UNIT;

/// What packets have shown of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConnectionState {
    /// A SYN and nothing else.
    Syn,
    Established,
    /// A FIN or a reset.
    Finishing,
    Udp,
}

impl ConnectionState {
    /// In the order of `PinState`.
    pub const ALL: [Self; 4] = [Self::Syn, Self::Established, Self::Finishing, Self::Udp];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Syn => "syn",
            Self::Established => "established",
            Self::Finishing => "finishing",
            Self::Udp => "udp",
        }
    }

    const fn of(state: PinState) -> Self {
        match state {
            PinState::Syn => Self::Syn,
            PinState::Established => Self::Established,
            PinState::Finishing => Self::Finishing,
            PinState::Datagram => Self::Udp,
        }
    }
}

impl fmt::Display for ConnectionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for ConnectionState {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|state| state.as_str() == text);
        found.ok_or_else(|| "use syn, established, finishing or udp".to_owned())
    }
}

/// Which connections are meant: those that all of it holds for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Filter {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// `POOL/NAME` or `POOL/ADDRESS`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client: Option<IpNetwork>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<ConnectionState>,
}

impl Filter {
    /// Whether it holds for all.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A filter in the numbers of the tables.
#[derive(Debug)]
struct Wanted {
    rows: Option<HashSet<u32>>,
    id: Option<Option<u16>>,
    client: Option<IpNetwork>,
    state: Option<ConnectionState>,
}

impl Wanted {
    fn has(&self, pin: Pin, words: &[u64; 8]) -> bool {
        self.state.is_none_or(|state| state == ConnectionState::of(pin.state()))
            && self.id.is_none_or(|id| id == Some(pin.backend()))
            && self.rows.as_ref().is_none_or(|rows| rows.contains(&(words[Record::ROW] as u32)))
            && self.client.is_none_or(|net| net.contains(address(words[0], words[1])))
    }
}

/// One connection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Connection {
    /// `tcp` or `udp`.
    pub protocol: String,
    pub client: SocketAddr,
    pub vip: SocketAddr,
    pub service: Option<String>,
    /// What the client's address is translated to, where it is.
    pub source: Option<SocketAddr>,
    pub pool: Option<String>,
    pub backend: Option<String>,
    pub backend_id: u16,
    pub backend_address: Option<SocketAddr>,
    pub state: ConnectionState,
    /// Since it was opened.
    pub age_seconds: f64,
    /// Since its last packet, to two seconds.
    pub idle_seconds: u64,
    /// Whether the backend has answered.
    pub answered: bool,
    /// Whether the backend has reset it.
    pub reset: bool,
}

/// What numbers in connections stand for.
struct Names {
    services: HashMap<u32, String>,
    backends: HashMap<u16, (String, String)>,
    rows: BTreeMap<u16, Row>,
    sources: Vec<Source>,
}

impl Names {
    fn of(config: Option<&Config>, index: &Index) -> Self {
        let (mut services, mut backends) = (HashMap::new(), HashMap::new());
        for service in config.into_iter().flat_map(|config| &config.services) {
            for (vip, ports, protocol) in service.triples() {
                let row = index.vips.get(&(vip, ports, protocol_number(protocol)));
                services.extend(row.map(|row| (*row, service.name.clone())));
            }
        }
        for pool in config.into_iter().flat_map(|config| &config.pools) {
            for backend in &pool.backends {
                let id = index.ids.get(&identity_of(pool, backend));
                backends.extend(id.map(|id| (*id, (pool.name.clone(), backend.name.clone()))));
            }
        }
        Self { services, backends, rows: index.translated.clone(), sources: index.sources.clone() }
    }

    fn source(&self, row: &Row, end: SourceEnd) -> Option<SocketAddr> {
        if !BackendKind::from_raw(row.kind)?.translates_source() {
            return None;
        }
        let address = address_of(&self.sources, end.index(), row.is_v4())?;
        Some(SocketAddr::new(address, port(end.port())))
    }

    fn told(&self, pin: Pin, words: &[u64; 8]) -> Connection {
        let key = words[Record::PORTS];
        let (client, vip) = (address(words[0], words[1]), address(words[2], words[3]));
        let (client_port, vip_port) = (port(key as u32), port(key as u32 >> 16));
        let row = self.rows.get(&pin.backend());
        let at = |row: &Row| {
            let of_row = row.port.get();
            let port = if of_row == 0 { vip_port } else { of_row };
            lookup::address(row).map(|address| SocketAddr::new(address, port))
        };
        let (pool, backend) = self.backends.get(&pin.backend()).cloned().unzip();
        let end = SourceEnd::from_bits((words[Record::ROW] >> 32) as u32);
        let age = Duration::from_nanos(monotonic_ns().saturating_sub(words[Record::OPENED]));
        let idle = UNIT * pin.idle(Pin::age_of(coarse_ns()));
        Connection {
            protocol: protocol((key >> 32) as u8),
            client: SocketAddr::new(client, client_port),
            vip: SocketAddr::new(vip, vip_port),
            service: self.services.get(&(words[Record::ROW] as u32)).cloned(),
            source: row.and_then(|row| self.source(row, end)),
            pool,
            backend,
            backend_id: pin.backend(),
            backend_address: row.and_then(at),
            state: ConnectionState::of(pin.state()),
            age_seconds: age.as_millis() as f64 / 1000.0,
            idle_seconds: idle.as_secs(),
            answered: key & seen::ANSWER != 0,
            reset: key & seen::RESET != 0,
        }
    }
}

/// As it lies in a record: IPv4 mapped.
fn address(high: u64, low: u64) -> IpAddr {
    let address = Address6 { high, low };
    if address.is_mapped_v4() {
        Ipv4Addr::from(address.v4().to_ne_bytes()).into()
    } else {
        Ipv6Addr::from(address.bytes()).into()
    }
}

/// As it lies in the packet, in the lower half.
fn port(word: u32) -> u16 {
    u16::from_be(word as u16)
}

fn protocol(number: u8) -> String {
    match number {
        PROTO_TCP => "tcp".to_owned(),
        PROTO_UDP => "udp".to_owned(),
        other => other.to_string(),
    }
}

/// The connections that are meant, place by place, each as it is when its turn comes.
pub struct Listing {
    connections: Connections,
    names: Names,
    wanted: Wanted,
    next: usize,
    left: u64,
}

impl fmt::Debug for Listing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Listing({} of {})", self.next, self.connections.len())
    }
}

impl Listing {
    /// `config`: none where nobody knows it. An error says what it does not know.
    pub fn new(
        connections: Connections,
        index: &Index,
        config: Option<&Config>,
        filter: &Filter,
        limit: Option<u64>,
    ) -> Result<Self, String> {
        let wanted = wanted(filter, index, config)?;
        let names = Names::of(config, index);
        Ok(Self { connections, names, wanted, next: 0, left: limit.unwrap_or(u64::MAX) })
    }
}

impl Iterator for Listing {
    type Item = Connection;

    fn next(&mut self) -> Option<Connection> {
        while self.left > 0 && self.next < self.connections.len() {
            let place = self.next;
            self.next += 1;
            let Some((pin, words)) = self.connections.at(place) else { continue };
            if self.wanted.has(pin, &words) {
                self.left -= 1;
                return Some(self.names.told(pin, &words));
            }
        }
        None
    }
}

/// Takes out the connections that are meant. Returns how many went.
pub fn flush(
    connections: &Connections,
    index: &Index,
    config: Option<&Config>,
    filter: &Filter,
) -> Result<u64, String> {
    let wanted = wanted(filter, index, config)?;
    let goes = |place: usize| {
        // A packet may change it meanwhile: then it is looked at again.
        while let Some((pin, _)) = connections.at(place).filter(|(pin, words)| wanted.has(*pin, words)) {
            if connections.take_out(place, pin) {
                return true;
            }
        }
        false
    };
    Ok((0..connections.len()).filter(|place| goes(*place)).count() as u64)
}

fn wanted(filter: &Filter, index: &Index, config: Option<&Config>) -> Result<Wanted, String> {
    let rows = filter.service.as_ref().map(|name| rows_of(name, index, config)).transpose()?;
    let id = filter.backend.as_ref().map(|name| id_of(name, index, config)).transpose()?;
    Ok(Wanted { rows, id, client: filter.client, state: filter.state })
}

const NAMELESS: &str = "no agent answers, and the tables know no names; name the configuration with -c";

/// Rows of counters of a service.
fn rows_of(name: &str, index: &Index, config: Option<&Config>) -> Result<HashSet<u32>, String> {
    let config = config.ok_or(NAMELESS)?;
    let Some(service) = config.services.iter().find(|service| service.name == name) else {
        let names: Vec<&str> = config.services.iter().map(|service| service.name.as_str()).collect();
        return Err(format!("no service {name}; {}", did_you_mean(name, &names)));
    };
    let rows = service.triples().filter_map(|(vip, ports, protocol)| {
        index.vips.get(&(vip, ports, protocol_number(protocol))).copied()
    });
    Ok(rows.collect())
}

/// The id of a backend; nothing where it has none yet.
fn id_of(text: &str, index: &Index, config: Option<&Config>) -> Result<Option<u16>, String> {
    let Some(config) = config else { return id_by_address(text, index) };
    let (_, _, pool, backend) = commands::find(config, text).map_err(|error| error.to_string())?;
    if !pool.forward.translates() {
        return Err(format!(
            "pool {} has no connections, for it translates no addresses (forward: {}); its flows are pinned where they must be",
            pool.name, pool.forward
        ));
    }
    Ok(index.ids.get(&identity_of(pool, backend)).copied())
}

/// The fingerprint of a row tells whether the pool is right.
fn id_by_address(text: &str, index: &Index) -> Result<Option<u16>, String> {
    let named = text.split_once('/').and_then(|(pool, address)| Some((pool, address.parse().ok()?)));
    let (pool, address): (&str, IpAddr) = named.ok_or(NAMELESS)?;
    let is_it = |(_, row): &(&u16, &Row)| {
        lookup::address(row) == Some(address)
            && forward_of(row).is_some_and(|way| backend_identity(pool, way, address) == row.identity)
    };
    let found = index.translated.iter().find(is_it);
    found
        .map(|(id, _)| Some(*id))
        .ok_or_else(|| format!("no pool {pool} has a backend {address} in the tables"))
}

#[cfg(test)]
mod tests;
