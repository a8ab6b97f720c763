//! Whether a valid configuration can work on this host, as far as the kernel tells anybody. Changes nothing, and asks
//! no neighbour.

use std::collections::HashMap;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use crate::config::model::{Config, Forward, Mode, Vip};
use crate::config::{Places, Problem, Subject};
use crate::nexthop::{Leg, Link, LinkError, Resolver, Unresolved};
use crate::ways::Judge;

/// From this MTU on a frame and what the kernel keeps beside it do not fit a page of 4096 bytes, which most drivers
/// ask of native XDP.
const LONGEST_IN_A_PAGE: u32 = 3498;

/// What was found here.
#[derive(Debug, Default)]
pub struct Findings {
    /// The configuration cannot work here.
    pub errors: Vec<Problem>,
    pub warnings: Vec<Problem>,
    /// Interfaces of the configuration that are here.
    pub interfaces: Vec<String>,
}

/// The first address of this host that is in the VIP, and its interface.
pub fn local_of(vip: Vip, addresses: &HashMap<IpAddr, String>) -> Option<(IpAddr, &str)> {
    let local = if vip.is_address() {
        addresses.get_key_value(&vip.first())
    } else {
        // A few prefixes, many addresses.
        addresses.iter().filter(|(address, _)| vip.contains(**address)).min()
    };
    local.map(|(address, interface)| (*address, interface.as_str()))
}

struct Look<'c> {
    config: &'c Config,
    places: &'c Places,
    found: Findings,
    /// Addresses of this host that clients' are translated to.
    local_sources: Vec<IpAddr>,
}

/// Looks at the host. `None` if none of the configured interfaces is here, so that the file will be for another host;
/// with `insist` it is for this one.
pub async fn look(
    config: &Config,
    places: &Places,
    resolver: &Resolver,
    insist: bool,
) -> Result<Option<Findings>, LinkError> {
    let mut look = Look { config, places, found: Findings::default(), local_sources: Vec::new() };
    let links = look.interfaces(resolver, insist).await?;
    if links.is_empty() && !insist {
        return Ok(None);
    }
    let addresses = resolver.addresses().await?.into_iter().collect();
    look.local_vips(&addresses);
    look.sources(&addresses);
    look.backends(resolver, &links).await;
    Ok(Some(look.found))
}

impl Look<'_> {
    fn error(&mut self, subject: Subject, message: impl Into<String>, hint: impl Into<String>) {
        self.found.errors.push(self.places.problem(subject, message, hint));
    }

    fn warn(&mut self, subject: Subject, message: impl Into<String>, hint: impl Into<String>) {
        self.found.warnings.push(self.places.problem(subject, message, hint));
    }

    /// The configured interfaces that are here, and whether native XDP is to be expected on each.
    async fn interfaces(
        &mut self,
        resolver: &Resolver,
        insist: bool,
    ) -> Result<Vec<(Link, bool)>, LinkError> {
        let mut links: Vec<(Link, bool)> = Vec::new();
        for (index, interface) in self.config.interfaces.iter().enumerate() {
            let (subject, name) = (Subject::Interface(index), &interface.name);
            let link = match resolver.link(name).await {
                Ok(link) => link,
                Err(LinkError::NotFound { .. }) => {
                    let (message, hint) =
                        (format!("this host has no interface {name}"), "`ip link` lists those there are");
                    if insist {
                        self.error(subject, message, hint)
                    } else {
                        self.warn(subject, message, hint)
                    }
                    continue;
                }
                Err(error) => return Err(error),
            };
            if let Some((known, _)) = links.iter().find(|(known, _)| known.ifindex == link.ifindex) {
                let message = format!("{name} is another name of {}, which is listed already", known.name);
                self.error(subject, message, "list an interface once");
                continue;
            }
            let native = self.interface(subject, &link, interface.mode, resolver);
            self.found.interfaces.push(link.name.clone());
            links.push((link, native));
        }
        Ok(links)
    }

    /// Judges one interface. Returns whether native XDP is to be expected on it.
    fn interface(&mut self, subject: Subject, link: &Link, mode: Mode, resolver: &Resolver) -> bool {
        let name = &link.name;
        if link.mac.is_none() {
            self.error(subject, format!("{name} is not Ethernet"), "list an interface that is");
            return false;
        }
        if !link.admin_up {
            self.warn(subject, format!("{name} is down"), format!("run `ip link set {name} up`"));
        }
        let takes_native = resolver.takes_native_xdp(link.ifindex);
        match (mode, takes_native) {
            (Mode::Generic, _) => return false,
            (Mode::Native, Some(false)) => {
                let message = format!("the driver of {name} has no native XDP");
                self.error(subject, message, "use mode: auto or mode: generic");
                return false;
            }
            (Mode::Auto, Some(false)) => {
                let message = format!(
                    "the driver of {name} has no native XDP; generic mode will do, several times slower"
                );
                self.warn(subject, message, "say so with mode: generic, or use another interface");
                return false;
            }
            (Mode::Native | Mode::Auto, Some(true) | None) => {}
        }
        if link.mtu > LONGEST_IN_A_PAGE {
            let message =
                format!("{name} has an MTU of {}, and many drivers refuse native XDP then", link.mtu);
            let hint = format!("set it to {LONGEST_IN_A_PAGE} or less, or use mode: generic");
            self.warn(subject, message, hint);
        }
        mode == Mode::Native || takes_native == Some(true)
    }

    /// As `xlb run` refuses them.
    fn local_vips(&mut self, addresses: &HashMap<IpAddr, String>) {
        for (index, service) in self.config.services.iter().enumerate() {
            for (place, vip) in service.vips.iter().enumerate() {
                let Some((address, interface)) = local_of(*vip, addresses) else { continue };
                let (message, hint) = if vip.is_address() {
                    (
                        format!(
                            "the VIP {vip} is an address of {interface} on this host, which exposes the host's own ports on it"
                        ),
                        format!("take it off {interface}; route it to this host, or set vip_arp: true"),
                    )
                } else {
                    (
                        format!("the VIP {vip} holds {address} of {interface} on this host"),
                        format!("give {interface} an address outside of it, or split the prefix"),
                    )
                };
                self.error(Subject::Vip(index, place), message, hint);
            }
        }
    }

    /// Those that are addresses of this host share their ports with its own sockets.
    fn sources(&mut self, addresses: &HashMap<IpAddr, String>) {
        if self.config.limits.connections == 0 {
            return;
        }
        self.local_sources =
            self.config.sources.all().filter(|source| addresses.contains_key(source)).collect();
        let ports = &self.config.sources.ports;
        let (Some(source), Some(own)) = (self.local_sources.first(), local_ports()) else { return };
        if ports.start() <= own.end() && own.start() <= ports.end() {
            let message = format!(
                "{source} is an address of this host, whose own connections use ports {}-{}: an answer to one of them may be taken for a client's",
                own.start(),
                own.end()
            );
            let hint = format!(
                "use other ports (fullnat.ports), narrow net.ipv4.ip_local_port_range, or a source that is no address of this host but routed to it (now {}-{})",
                ports.start(),
                ports.end()
            );
            self.warn(Subject::Sources, message, hint);
        }
    }

    async fn backends(&mut self, resolver: &Resolver, links: &[(Link, bool)]) {
        let addresses: Vec<IpAddr> =
            self.config.pools.iter().flat_map(|pool| pool.backends.iter().map(|b| b.address)).collect();
        let legs = resolver.legs(&addresses).await;
        let native = links.iter().filter(|(_, native)| *native);
        let judge = Judge::new(self.config, native.map(|(link, _)| (link.ifindex, link.name.as_str())));
        let widest = links.iter().map(|(link, _)| link.mtu).max();
        for pool in 0..self.config.pools.len() {
            self.pool(pool, &judge, &legs, widest);
        }
    }

    fn pool(
        &mut self,
        pool: usize,
        judge: &Judge<'_>,
        legs: &HashMap<IpAddr, Result<Leg, Unresolved>>,
        widest: Option<u32>,
    ) {
        let config = self.config;
        let mut narrow: Option<Narrow> = None;
        for (index, backend) in config.pools[pool].backends.iter().enumerate() {
            let (address, subject) = (backend.address, Subject::Backend(pool, index));
            let way = match legs.get(&address) {
                Some(Ok(leg)) => leg.way(),
                Some(Err(reason)) => {
                    let fullnat = matches!(config.pools[pool].forward, Forward::Fullnat { .. });
                    self.unresolved(subject, (address, fullnat), reason);
                    continue;
                }
                None => continue,
            };
            // A device may learn to with its own program, which xlb has yet to load.
            let may_learn = way.kind.is_none() && config.interfaces.iter().any(|i| i.name == way.interface);
            let way = crate::nexthop::Way { redirect_target: way.redirect_target || may_learn, ..way };
            if let Err(obstacle) = judge.passes(pool, address, &way) {
                self.error(subject, format!("{address}: {}", obstacle.reason), obstacle.remedy);
                continue;
            }
            let (room, overhead) = judge.room(pool, address, &way);
            if widest.is_some_and(|widest| u32::from(room) < widest) {
                let this = Narrow { subject, address, room, overhead, others: 0 };
                narrow = Some(narrow.map_or(this, |known| known.and(this)));
            }
        }
        if let (Some(narrow), Some(widest)) = (narrow, widest) {
            self.narrow(&narrow, widest, judge.served(pool));
        }
    }

    fn unresolved(&mut self, subject: Subject, (address, fullnat): (IpAddr, bool), reason: &Unresolved) {
        let told = reason.to_string();
        let (message, hint) = told.split_once("; ").unwrap_or((&told, ""));
        let message = format!("{address}: {message}");
        match reason {
            // By the veth pair that the agent makes.
            Unresolved::Local if fullnat => {
                if let Some(source) = self.local_sources.first() {
                    let message = format!(
                        "{address} is on this host, and so is the source {source} of fullnat: its answers would not leave the host"
                    );
                    self.error(
                        subject,
                        message,
                        "use sources that are routed to this host and no addresses of it",
                    );
                }
            }
            Unresolved::Local => {
                let message = format!("{address} is an address of this host: its packets would come back");
                self.error(subject, message, hint);
            }
            Unresolved::NotUnicast(_) | Unresolved::Encapsulated { .. } | Unresolved::NoMac { .. } => {
                self.error(subject, message, hint);
            }
            // May be another when the agent runs, which follows it.
            Unresolved::NoRoute
            | Unresolved::Unreachable
            | Unresolved::Blackhole
            | Unresolved::Prohibit
            | Unresolved::InterfaceDown { .. }
            | Unresolved::NeighbourMissing { .. }
            | Unresolved::NeighbourFailed { .. }
            | Unresolved::NeighbourTableFull { .. }
            | Unresolved::Netlink(_) => self.warn(subject, message, hint),
        }
    }

    /// It works, by path MTU discovery.
    fn narrow(&mut self, narrow: &Narrow, widest: u32, served: crate::ways::Served) {
        let Narrow { subject, address, room, overhead, others } = narrow;
        let others = if *others > 0 { format!(" (and {others} more)") } else { String::new() };
        let message = format!(
            "{room} bytes of a client's packet get to {address}{others}, and {widest} come in: longer ones are answered with ICMP, which costs a round trip"
        );
        let advmss = |on: bool, headers: u16| on.then(|| format!("advmss {}", room - headers));
        let v4 = advmss(served.v4, 40);
        let v6 = advmss(served.v6, 60).map(|words| format!("{words} (IPv6)"));
        let advmss: Vec<String> = [v4, v6].into_iter().flatten().collect();
        let mut hint = format!("give all links to the backends an MTU of {}", widest + u32::from(*overhead));
        if !advmss.is_empty() {
            hint += &format!(", or set {} on the backends' routes to the clients", advmss.join(" and "));
        }
        self.warn(*subject, message, hint);
    }
}

/// Ports that the kernel picks for connections of this host.
fn local_ports() -> Option<RangeInclusive<u16>> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
    let mut ports = text.split_whitespace().map(str::parse);
    Some(ports.next()?.ok()?..=ports.next()?.ok()?)
}

/// The narrowest way of a pool.
#[derive(Clone, Copy)]
struct Narrow {
    subject: Subject,
    address: IpAddr,
    room: u16,
    overhead: u16,
    /// Other backends with too narrow ways.
    others: usize,
}

impl Narrow {
    fn and(self, other: Self) -> Self {
        let others = self.others + 1;
        if other.room < self.room { Self { others, ..other } } else { Self { others, ..self } }
    }
}
