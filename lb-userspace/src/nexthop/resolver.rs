//! Puts routes, links and neighbours together into next hops. Owns the order of questions and the waiting for
//! neighbours; must not know netlink's encoding.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use netlink_packet_route::neighbour::NeighbourState;
use rustix::io::Errno;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, warn};

use super::decode::Neighbour;
use super::netlink::{Care, Error, Netlink};
use super::route::{self, Path};
use super::{Link, LinkError, NextHop, Unresolved, Way};

/// A neighbour that is there answers within a round trip; one lost request costs a second.
pub const DEFAULT_WAIT: Duration = Duration::from_secs(1);

/// Requests in flight. Their answers fit into the default socket buffer many times over.
const IN_FLIGHT: usize = 32;
/// From this many neighbours on, one dump is cheaper than single questions.
const DUMP_FROM: usize = 64;
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// Asks the kernel for next hops.
///
/// It sees the network namespace of the thread that called [`Resolver::new`].
#[derive(Debug)]
pub struct Resolver {
    pub(super) netlink: Netlink,
}

/// A neighbour is an address on an interface: fe80::1 is a different one on each.
pub(super) type NeighbourKey = (u32, IpAddr);

/// A route with its interface, which can send frames of it.
#[derive(Debug, Clone)]
pub struct Leg {
    path: Path,
    link: Link,
}

impl Leg {
    pub fn way(&self) -> Way<'_> {
        Way {
            ifindex: self.link.ifindex,
            interface: &self.link.name,
            mtu: mtu(&self.path, &self.link),
            preferred_source: self.path.preferred_source,
            gateway: self.path.gateway,
            kind: self.link.kind.as_deref(),
            redirect_target: self.link.redirect_target,
        }
    }
}

/// What a neighbour entry is good for.
pub(super) enum Entry {
    Usable([u8; 6]),
    /// Usable, but unconfirmed for a while.
    Aged([u8; 6]),
    /// The link-layer address is no MAC.
    NoMac,
    Failed,
    Missing,
}

pub(super) fn entry(neighbour: Option<&Neighbour>) -> Entry {
    let Some(neighbour) = neighbour else {
        return Entry::Missing;
    };
    let mac = || neighbour.mac.as_deref().and_then(|m| m.try_into().ok());
    match (neighbour.state, mac()) {
        (NeighbourState::Stale, Some(mac)) => Entry::Aged(mac),
        (
            NeighbourState::Reachable
            | NeighbourState::Delay
            | NeighbourState::Probe
            | NeighbourState::Permanent
            | NeighbourState::Noarp,
            Some(mac),
        ) => Entry::Usable(mac),
        (
            NeighbourState::Reachable
            | NeighbourState::Stale
            | NeighbourState::Delay
            | NeighbourState::Probe
            | NeighbourState::Permanent
            | NeighbourState::Noarp,
            None,
        ) => Entry::NoMac,
        (NeighbourState::Failed, _) => Entry::Failed,
        // Incomplete, none, and what later kernels may add.
        _ => Entry::Missing,
    }
}

impl Resolver {
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new() -> io::Result<Resolver> {
        let netlink = Netlink::open()?;
        Ok(Resolver { netlink })
    }

    /// The next hop of `address`, waiting up to [`DEFAULT_WAIT`] for its neighbour.
    pub async fn resolve(&self, address: IpAddr) -> Result<NextHop, Unresolved> {
        self.resolve_within(address, DEFAULT_WAIT).await
    }

    pub async fn resolve_within(&self, address: IpAddr, wait: Duration) -> Result<NextHop, Unresolved> {
        let mut all = self.resolve_all(&[address], wait).await;
        let missing = || Err(Unresolved::Netlink("no answer".into()));
        all.remove(&address).unwrap_or_else(missing)
    }

    /// The next hops of many addresses: one answer for each. All neighbours share one `wait`.
    ///
    /// A neighbour that the kernel has not confirmed lately is used as it is, and the kernel is asked to confirm it:
    /// packets that XDP sends do not do that.
    pub async fn resolve_all(
        &self,
        addresses: &[IpAddr],
        wait: Duration,
    ) -> HashMap<IpAddr, Result<NextHop, Unresolved>> {
        let legs = self.legs(addresses).await;
        let wanted: HashMap<NeighbourKey, &str> = legs
            .iter()
            .filter_map(|(address, leg)| Some((*address, leg.as_ref().ok()?)))
            .map(|(address, Leg { path, link })| (neighbour_key(address, path), link.name.as_str()))
            .collect();
        let macs = self.macs(&wanted, wait).await;
        legs.into_iter()
            .map(|(address, leg)| (address, leg.and_then(|leg| next_hop(address, leg, &macs))))
            .collect()
    }

    /// The ways to many addresses, as far as they can be told without asking a neighbour: one answer for each.
    pub async fn legs(&self, addresses: &[IpAddr]) -> HashMap<IpAddr, Result<Leg, Unresolved>> {
        let unique: HashSet<IpAddr> = addresses.iter().copied().collect();
        let paths = self.paths(unique).await;
        let links = self.links_of(&paths).await;
        let leg = |(address, path): (IpAddr, Result<Path, _>)| (address, path.and_then(|p| leg(p, &links)));
        paths.into_iter().map(leg).collect()
    }

    /// Whether the interface's driver takes XDP programs; `None` where the kernel does not tell (before 6.3).
    pub fn takes_native_xdp(&self, ifindex: u32) -> Option<bool> {
        self.netlink.takes_native_xdp(ifindex)
    }

    /// One interface. Alternative names longer than 15 bytes are not found.
    pub async fn link(&self, name: &str) -> Result<Link, LinkError> {
        self.netlink.link_of_name(name).await.map_err(|e| match e {
            // The latter for names that no interface can have.
            Error::Kernel(Errno::NODEV | Errno::RANGE | Errno::INVAL) => {
                let name = name.to_owned();
                LinkError::NotFound { name }
            }
            other => LinkError::Netlink(format!("interface {name}: {other}")),
        })
    }

    pub async fn link_of_index(&self, ifindex: u32) -> Result<Link, LinkError> {
        self.netlink.link_of_index(ifindex).await.map_err(|error| match error {
            // The latter for 0, which no interface has.
            Error::Kernel(Errno::NODEV | Errno::INVAL) => {
                let name = format!("with index {ifindex}");
                LinkError::NotFound { name }
            }
            other => LinkError::Netlink(format!("interface {ifindex}: {other}")),
        })
    }

    pub async fn links(&self) -> Result<Vec<Link>, LinkError> {
        self.netlink.links().await.map_err(|error| LinkError::Netlink(format!("interfaces: {error}")))
    }

    /// Takes neighbours out of the kernel's care that the follower has put there: those with these MAC addresses on
    /// these interfaces, by index, and those with these addresses, who may have no MAC any more. The entries stay, and
    /// age like any other.
    pub async fn unmanage(&self, neighbours: &HashSet<(u32, [u8; 6])>, addresses: &HashSet<IpAddr>) {
        if neighbours.is_empty() && addresses.is_empty() {
            return;
        }
        let all = match self.netlink.neighbours().await {
            Ok(all) => all,
            Err(error) => {
                warn!(%error, "the neighbours are not read; the kernel goes on to confirm those that were backends'");
                return;
            }
        };
        for neighbour in all.iter().filter(|neighbour| neighbour.managed) {
            let mac = neighbour.mac.as_deref().and_then(|mac| mac.try_into().ok());
            let by_mac = mac.is_some_and(|mac| neighbours.contains(&(neighbour.ifindex, mac)));
            if by_mac || addresses.contains(&neighbour.address) {
                self.release((neighbour.ifindex, neighbour.address), Some(neighbour)).await;
            }
        }
    }

    /// Ends the kernel's own care for a neighbour.
    pub(super) async fn release(&self, key: NeighbourKey, known: Option<&Neighbour>) {
        match self.netlink.use_neighbour(key, known, Care::TakeAway).await {
            // Gone, and its interface maybe too.
            Ok(()) | Err(Error::Kernel(Errno::NOENT | Errno::NODEV)) => {}
            Err(error) => debug!(neighbour = %key.1, %error, "the kernel goes on to confirm a neighbour"),
        }
    }

    /// All addresses of this host, with the interface of each.
    ///
    /// A failure is an error and not an empty list, which would read as "none of them is mine".
    pub async fn addresses(&self) -> Result<Vec<(IpAddr, String)>, LinkError> {
        let failed = |e| LinkError::Netlink(format!("addresses: {e}"));
        let links = self.netlink.links().await.map_err(failed)?;
        let names: HashMap<u32, String> = links.into_iter().map(|l| (l.ifindex, l.name)).collect();
        let addresses = self.netlink.addresses().await.map_err(failed)?;
        Ok(addresses
            .into_iter()
            .map(|(ip, ifindex)| {
                // An interface that appeared in between.
                let number = || ifindex.to_string();
                (ip, names.get(&ifindex).cloned().unwrap_or_else(number))
            })
            .collect())
    }

    pub(super) async fn paths(
        &self,
        addresses: impl IntoIterator<Item = IpAddr>,
    ) -> Vec<(IpAddr, Result<Path, Unresolved>)> {
        let lookups = addresses.into_iter().map(async |address| {
            let answer = self.netlink.route(address).await;
            let path = match &answer {
                Ok(message) => route::path(message),
                Err(error) => Err(route::refusal(error)),
            };
            (address, path)
        });
        stream::iter(lookups).buffer_unordered(IN_FLIGHT).collect().await
    }

    /// The interfaces that the paths leave through. They are few, however many the paths.
    async fn links_of(
        &self,
        paths: &[(IpAddr, Result<Path, Unresolved>)],
    ) -> HashMap<u32, Result<Link, Unresolved>> {
        let mut links = HashMap::new();
        for path in paths.iter().filter_map(|(_, path)| path.as_ref().ok()) {
            if links.contains_key(&path.ifindex) {
                continue;
            }
            let link = self.netlink.link_of_index(path.ifindex).await;
            let failed = |e| Unresolved::Netlink(format!("interface {}: {e}", path.ifindex));
            links.insert(path.ifindex, link.map_err(failed));
        }
        links
    }

    /// MAC addresses of exactly the neighbours in `wanted`, which gives each one's interface by name.
    async fn macs(
        &self,
        wanted: &HashMap<NeighbourKey, &str>,
        wait: Duration,
    ) -> HashMap<NeighbourKey, Result<[u8; 6], Unresolved>> {
        let deadline = Instant::now() + wait;
        let keys: Vec<NeighbourKey> = wanted.keys().copied().collect();
        let mut done = HashMap::new();
        let mut pending = Vec::new();
        for (key, answer) in self.look_up(keys).await {
            let interface = || wanted[&key].to_owned();
            let known = answer.as_ref().ok().and_then(Option::as_ref);
            match answer.as_ref().map(|n| entry(n.as_ref())) {
                Ok(Entry::Usable(mac)) => {
                    done.insert(key, Ok(mac));
                }
                Ok(Entry::Aged(mac)) => {
                    done.insert(key, Ok(mac));
                    if known.is_some_and(|known| known.validated) {
                        continue;
                    }
                    if let Err(error) = self.netlink.use_neighbour(key, known, Care::Keep).await {
                        debug!(neighbour = %key.1, %error, "stale neighbour not confirmed");
                    }
                }
                Ok(Entry::NoMac) => {
                    let interface = interface();
                    done.insert(key, Err(Unresolved::NoMac { interface }));
                }
                Ok(Entry::Failed | Entry::Missing) => {
                    match self.netlink.use_neighbour(key, known, Care::Keep).await {
                        Ok(()) => pending.push(key),
                        Err(error) => {
                            done.insert(key, Err(not_asked(key.1, &error)));
                        }
                    }
                }
                Err(error) => {
                    done.insert(key, Err(not_asked(key.1, error)));
                }
            }
        }
        self.await_answers(wanted, pending, deadline, &mut done).await;
        done
    }

    /// Polls until each of `pending` is in `done`.
    async fn await_answers(
        &self,
        wanted: &HashMap<NeighbourKey, &str>,
        mut pending: Vec<NeighbourKey>,
        deadline: Instant,
        done: &mut HashMap<NeighbourKey, Result<[u8; 6], Unresolved>>,
    ) {
        let mut pause = FIRST_PAUSE;
        while !pending.is_empty() {
            let last_look = Instant::now() + pause >= deadline;
            sleep_until(deadline.min(Instant::now() + pause)).await;
            pause = LONGEST_PAUSE.min(pause * 2);
            for (key, answer) in self.look_up(std::mem::take(&mut pending)).await {
                let (neighbour, interface) = (key.1, wanted[&key].to_owned());
                let result = match answer.as_ref().map(|n| entry(n.as_ref())) {
                    Ok(Entry::Usable(mac) | Entry::Aged(mac)) => Ok(mac),
                    Ok(Entry::NoMac) => Err(Unresolved::NoMac { interface }),
                    Ok(Entry::Failed) => Err(Unresolved::NeighbourFailed { neighbour, interface }),
                    Ok(Entry::Missing) if last_look => {
                        Err(Unresolved::NeighbourMissing { neighbour, interface })
                    }
                    Ok(Entry::Missing) => {
                        pending.push(key);
                        continue;
                    }
                    Err(error) => Err(not_asked(neighbour, error)),
                };
                done.insert(key, result);
            }
        }
    }

    pub(super) async fn look_up(
        &self,
        keys: Vec<NeighbourKey>,
    ) -> Vec<(NeighbourKey, Result<Option<Neighbour>, Error>)> {
        if keys.len() < DUMP_FROM {
            let questions = keys.into_iter().map(async |key| {
                let answer = self.netlink.neighbour(key.0, key.1).await;
                (key, answer)
            });
            return stream::iter(questions).buffer_unordered(IN_FLIGHT).collect().await;
        }
        match self.netlink.neighbours().await {
            Ok(all) => {
                let mut all: HashMap<NeighbourKey, Neighbour> =
                    all.into_iter().map(|n| ((n.ifindex, n.address), n)).collect();
                keys.into_iter().map(|key| (key, Ok(all.remove(&key)))).collect()
            }
            Err(error) => keys.into_iter().map(|key| (key, Err(error.clone()))).collect(),
        }
    }
}

pub(super) fn neighbour_key(address: IpAddr, path: &Path) -> NeighbourKey {
    (path.ifindex, path.gateway.unwrap_or(address))
}

fn leg(path: Path, links: &HashMap<u32, Result<Link, Unresolved>>) -> Result<Leg, Unresolved> {
    let link = match links.get(&path.ifindex) {
        Some(link) => link.clone()?,
        None => return Err(Unresolved::Netlink(format!("interface {} was not read", path.ifindex))),
    };
    source_mac(&path, &link)?;
    Ok(Leg { path, link })
}

/// The MAC address to send from, if the interface can send frames of this path.
pub(super) fn source_mac(path: &Path, link: &Link) -> Result<[u8; 6], Unresolved> {
    let interface = link.name.clone();
    if path.encapsulates {
        Err(Unresolved::Encapsulated { interface })
    } else if !link.up {
        let admin_up = link.admin_up;
        Err(Unresolved::InterfaceDown { interface, admin_up })
    } else {
        link.mac.ok_or(Unresolved::NoMac { interface })
    }
}

fn next_hop(
    address: IpAddr,
    Leg { path, link }: Leg,
    macs: &HashMap<NeighbourKey, Result<[u8; 6], Unresolved>>,
) -> Result<NextHop, Unresolved> {
    let neighbour = neighbour_key(address, &path);
    match macs.get(&neighbour) {
        Some(mac) => compose(&path, &link, mac.clone()?),
        None => Err(Unresolved::Netlink(format!("neighbour {} was not read", neighbour.1))),
    }
}

fn mtu(path: &Path, link: &Link) -> u16 {
    let mtu = link.mtu.min(path.mtu.unwrap_or(u32::MAX));
    u16::try_from(mtu).unwrap_or(u16::MAX)
}

pub(super) fn compose(path: &Path, link: &Link, mac: [u8; 6]) -> Result<NextHop, Unresolved> {
    Ok(NextHop {
        ifindex: link.ifindex,
        interface: link.name.clone(),
        source_mac: source_mac(path, link)?,
        mac,
        mtu: mtu(path, link),
        preferred_source: path.preferred_source,
        gateway: path.gateway,
        kind: link.kind.clone(),
        redirect_target: link.redirect_target,
    })
}

pub(super) fn not_asked(neighbour: IpAddr, error: &Error) -> Unresolved {
    match error {
        Error::Kernel(Errno::NOBUFS) => Unresolved::NeighbourTableFull { neighbour },
        other => Unresolved::Netlink(format!("neighbour {neighbour}: {other}")),
    }
}

#[cfg(test)]
mod tests;
