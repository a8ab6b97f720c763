//! What is known of watched addresses, their interfaces and neighbours, and what of it is yet to be told. Pure: takes
//! what the kernel says, and says what to ask; must not ask.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use netlink_packet_route::neighbour::NeighbourState;

use super::hold::{Answer, Hold, Times};
use super::{Known, LinkEvent};
use crate::nexthop::decode::Neighbour;
use crate::nexthop::netlink::Care;
use crate::nexthop::resolver::{Entry, NeighbourKey, compose, entry, neighbour_key, source_mac};
use crate::nexthop::route::Path;
use crate::nexthop::{Link, NextHop, Unresolved};

/// A neighbour is not asked for more often.
const ASK_AGAIN: Duration = Duration::from_millis(900);
/// Requests for the kernel's own care that leave no trace, after which it is taken to have none (before 5.16).
const REFUSALS: u32 = 3;

#[derive(Debug)]
struct Watched {
    path: Option<Result<Path, Unresolved>>,
    hold: Hold,
    /// What was told last, or what the watcher knew itself.
    told: Option<Answer>,
}

#[derive(Debug, Default)]
struct Met {
    entry: Option<Neighbour>,
    /// The kernel would not look for it.
    refused: Option<Unresolved>,
    users: HashSet<IpAddr>,
    /// Whether it is known if there is an entry.
    read: bool,
    /// A reading of the entry is under way, and no later event has told more.
    reading: bool,
    asked: Option<(Instant, Care)>,
}

/// One request for a neighbour.
#[derive(Debug, Clone)]
pub(super) struct Request {
    pub key: NeighbourKey,
    pub known: Option<Neighbour>,
    pub care: Care,
}

#[derive(Debug)]
pub(super) struct Table {
    times: Times,
    watched: HashMap<IpAddr, Watched>,
    links: HashMap<u32, Link>,
    neighbours: HashMap<NeighbourKey, Met>,
    told_links: HashMap<u32, Link>,
    /// Links of which something may have to be told; true: even if it is what was told last.
    news_of_links: HashMap<u32, bool>,
    news: HashSet<IpAddr>,
    /// Those whose hold has an end.
    holding: HashSet<IpAddr>,
    /// Not later than the first of these ends.
    wake: Option<Instant>,
    /// Links that were told of while all were being read.
    newer_links: HashSet<u32>,
    care_seen: bool,
    care_missed: u32,
}

/// Whom a link event concerns.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Concerns {
    /// Addresses that use the interface, where their way may have changed.
    pub users: Vec<IpAddr>,
    /// A way may have opened or closed for anybody.
    pub all: bool,
}

impl Table {
    pub(super) fn new(times: Times) -> Table {
        Table {
            times,
            watched: HashMap::new(),
            links: HashMap::new(),
            neighbours: HashMap::new(),
            told_links: HashMap::new(),
            news_of_links: HashMap::new(),
            news: HashSet::new(),
            holding: HashSet::new(),
            wake: None,
            newer_links: HashSet::new(),
            care_seen: false,
            care_missed: 0,
        }
    }

    /// Takes the set of addresses; gives those that are new, and the neighbours that are no longer needed.
    pub(super) fn watch(&mut self, addresses: Known) -> (Vec<IpAddr>, Vec<Request>) {
        let gone: Vec<IpAddr> =
            self.watched.keys().filter(|address| !addresses.contains_key(address)).copied().collect();
        for address in &gone {
            self.leave_neighbour(*address);
            self.watched.remove(address);
            self.news.remove(address);
            self.holding.remove(address);
        }
        let mut new = Vec::new();
        for (address, known) in addresses {
            match self.watched.get_mut(&address) {
                Some(watched) => {
                    // What was told may be on its way still, and be taken for newer than what the watcher knows now.
                    watched.told = None;
                    if watched.hold.answer().is_none() {
                        watched.hold = Hold::new(known);
                    }
                }
                None => {
                    new.push(address);
                    let told = known.clone().map(|hop| Answer { hop, doubt: None });
                    self.watched.insert(address, Watched { path: None, hold: Hold::new(known), told });
                }
            }
            self.note_news(address);
        }
        (new, self.drop_unused())
    }

    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.watched.keys().copied()
    }

    /// Addresses whose way leads out of an interface, or whose source address this is.
    pub(super) fn users(&self, ifindex: u32, source: Option<IpAddr>) -> Vec<IpAddr> {
        let uses = |watched: &Watched| match &watched.path {
            Some(Ok(path)) => path.ifindex == ifindex || source.is_some() && path.preferred_source == source,
            _ => false,
        };
        self.watched.iter().filter(|(_, watched)| uses(watched)).map(|(address, _)| *address).collect()
    }

    pub(super) fn on_path(&mut self, now: Instant, address: IpAddr, path: Result<Path, Unresolved>) {
        let Some(watched) = self.watched.get(&address) else { return };
        if watched.path.as_ref() != Some(&path) {
            self.leave_neighbour(address);
            if let Some(watched) = self.watched.get_mut(&address) {
                watched.path = Some(path);
            }
            if let Some(key) = self.neighbour_of(address) {
                self.neighbours.entry(key).or_default().users.insert(address);
            }
        }
        self.judge(now, address);
    }

    fn neighbour_of(&self, address: IpAddr) -> Option<NeighbourKey> {
        match self.watched.get(&address)?.path.as_ref()? {
            Ok(path) if !path.encapsulates => Some(neighbour_key(address, path)),
            _ => None,
        }
    }

    fn leave_neighbour(&mut self, address: IpAddr) {
        if let Some(key) = self.neighbour_of(address)
            && let Some(met) = self.neighbours.get_mut(&key)
        {
            met.users.remove(&address);
        }
    }

    /// Forgets neighbours that nobody uses; gives those to take out of the kernel's care.
    pub(super) fn drop_unused(&mut self) -> Vec<Request> {
        let unused = self.neighbours.extract_if(|_, met| met.users.is_empty());
        unused
            .filter_map(|(key, met)| {
                let known = met.entry.filter(|entry| entry.managed)?;
                Some(Request { key, known: Some(known), care: Care::TakeAway })
            })
            .collect()
    }

    // ---- Links ---------------------------------------------------------------------------------------

    pub(super) fn on_link(&mut self, now: Instant, link: Link) -> Concerns {
        self.newer_links.insert(link.ifindex);
        self.take_link(now, link)
    }

    pub(super) fn on_link_gone(&mut self, ifindex: u32) -> Concerns {
        self.newer_links.insert(ifindex);
        self.drop_link(ifindex)
    }

    fn take_link(&mut self, now: Instant, link: Link) -> Concerns {
        let ifindex = link.ifindex;
        let before = self.links.insert(ifindex, link.clone());
        if before.as_ref() == Some(&link) {
            return Concerns::default();
        }
        let users = self.users(ifindex, None);
        self.news_of_links.entry(ifindex).or_default();
        let flips = |before: &Link| (before.up, before.admin_up) != (link.up, link.admin_up);
        if before.as_ref().is_some_and(flips) {
            // Judged when their way is known anew: it may lead elsewhere now.
            return Concerns { users, all: true };
        }
        for address in &users {
            self.judge(now, *address);
        }
        match before {
            // The way of its users is newer than this message.
            None => Concerns { users: Vec::new(), all: true },
            Some(before) if (before.mtu, before.mac) == (link.mtu, link.mac) => Concerns::default(),
            Some(_) => Concerns { users, all: false },
        }
    }

    fn drop_link(&mut self, ifindex: u32) -> Concerns {
        if self.links.remove(&ifindex).is_none() {
            return Concerns::default();
        }
        self.news_of_links.entry(ifindex).or_default();
        Concerns { users: self.users(ifindex, None), all: true }
    }

    pub(super) fn begin_reading_links(&mut self) {
        self.newer_links.clear();
    }

    /// Takes all links at once. What was told of one in the meantime is newer.
    pub(super) fn on_links(&mut self, now: Instant, links: Vec<Link>, tell_again: bool) -> Concerns {
        // What is read first opens no way that was closed.
        let first = self.links.is_empty();
        let mut concerns = Concerns::default();
        let mut add = |more: Concerns| {
            concerns.users.extend(more.users);
            concerns.all |= more.all && !first;
        };
        let read: HashSet<u32> = links.iter().map(|link| link.ifindex).collect();
        for link in links {
            if !self.newer_links.contains(&link.ifindex) {
                add(self.take_link(now, link));
            }
        }
        let vanished: Vec<u32> = self
            .links
            .keys()
            .filter(|ifindex| !read.contains(ifindex) && !self.newer_links.contains(ifindex))
            .copied()
            .collect();
        for ifindex in vanished {
            add(self.drop_link(ifindex));
        }
        self.judge_links_unknown(now);
        if tell_again {
            self.news_of_links.extend(self.links.keys().map(|ifindex| (*ifindex, true)));
        }
        concerns
    }

    /// Of an interface that has just appeared or gone there is a message to come. One that is still not known when all
    /// have been read will stay so.
    fn judge_links_unknown(&mut self, now: Instant) {
        let mut unknown = Vec::new();
        for (address, watched) in &mut self.watched {
            if let Some(Ok(path)) = &watched.path
                && !self.links.contains_key(&path.ifindex)
            {
                let what = format!("interface {} is not to be read", path.ifindex);
                watched.hold.on_look(now, Err(Unresolved::Netlink(what)));
                unknown.push(*address);
            }
        }
        for address in unknown {
            self.note_news(address);
        }
    }

    // ---- Neighbours ----------------------------------------------------------------------------------

    pub(super) fn on_neighbour(&mut self, now: Instant, key: NeighbourKey, entry: Option<Neighbour>) {
        let Some(met) = self.neighbours.get_mut(&key) else { return };
        met.reading = false;
        self.take_neighbour(now, key, Ok(entry));
    }

    /// Neighbours that are not known yet, to be read.
    pub(super) fn unread(&mut self) -> Vec<NeighbourKey> {
        let unread = self.neighbours.iter_mut().filter(|(_, met)| !met.read && !met.reading);
        unread
            .map(|(key, met)| {
                met.reading = true;
                *key
            })
            .collect()
    }

    /// Has all neighbours read again.
    pub(super) fn forget_readings(&mut self) {
        for met in self.neighbours.values_mut() {
            (met.read, met.reading) = (false, false);
        }
    }

    pub(super) fn on_reading(
        &mut self,
        now: Instant,
        key: NeighbourKey,
        entry: Result<Option<Neighbour>, Unresolved>,
    ) {
        let Some(met) = self.neighbours.get_mut(&key) else { return };
        if std::mem::take(&mut met.reading) {
            self.take_neighbour(now, key, entry);
        }
    }

    fn take_neighbour(
        &mut self,
        now: Instant,
        key: NeighbourKey,
        entry: Result<Option<Neighbour>, Unresolved>,
    ) {
        let Some(met) = self.neighbours.get_mut(&key) else { return };
        met.read = true;
        match entry {
            Ok(entry) => {
                self.care_seen |= entry.as_ref().is_some_and(|entry| entry.managed);
                met.entry = entry;
                met.refused = None;
            }
            Err(reason) => met.refused = Some(reason),
        }
        self.judge_users(now, key);
    }

    /// A request has been answered: the kernel would not look for a neighbour, or does again. Gives what to undo, if
    /// nobody needs the neighbour any more.
    pub(super) fn on_request(
        &mut self,
        now: Instant,
        request: Request,
        refused: Option<Unresolved>,
    ) -> Option<Request> {
        let Some(met) = self.neighbours.get_mut(&request.key) else {
            let cared = request.care == Care::Set && refused.is_none();
            return cared.then_some(Request { care: Care::TakeAway, ..request });
        };
        if met.refused != refused {
            met.refused = refused;
            self.judge_users(now, request.key);
        }
        None
    }

    fn judge_users(&mut self, now: Instant, key: NeighbourKey) {
        let users: Vec<IpAddr> =
            self.neighbours.get(&key).into_iter().flat_map(|met| met.users.iter().copied()).collect();
        for address in users {
            self.judge(now, address);
        }
    }

    /// Neighbours to ask for now: silent ones, unconfirmed ones, and those not in the kernel's care yet.
    pub(super) fn requests(&mut self, now: Instant) -> Vec<Request> {
        let care = self.care_seen || self.care_missed < REFUSALS;
        let mut missed = false;
        let mut requests = Vec::new();
        for (key, met) in &mut self.neighbours {
            if !met.read || met.reading {
                continue;
            }
            let sends = self.links.get(&key.0).is_some_and(|link| link.up && link.mac.is_some());
            let again = |wish: &Care| {
                met.asked.is_none_or(|(asked, before)| before != *wish || now >= asked + ASK_AGAIN)
            };
            if let Some(wish) = wish(met.entry.as_ref(), care).filter(again).filter(|_| sends) {
                missed |= met.asked.is_some_and(|(_, before)| (before, wish) == (Care::Set, Care::Set));
                met.asked = Some((now, wish));
                requests.push(Request { key: *key, known: met.entry.clone(), care: wish });
            }
        }
        self.care_missed += u32::from(missed && !self.care_seen);
        requests
    }

    // ---- What to tell --------------------------------------------------------------------------------

    fn judge(&mut self, now: Instant, address: IpAddr) {
        let Some(found) = self.found(address) else { return };
        if let Some(watched) = self.watched.get_mut(&address) {
            watched.hold.on_look(now, found);
        }
        self.note_news(address);
    }

    /// `None` while not enough is known to say anything.
    fn found(&self, address: IpAddr) -> Option<Result<NextHop, Unresolved>> {
        let path = match self.watched.get(&address)?.path.as_ref()? {
            Ok(path) => path,
            Err(reason) => return Some(Err(reason.clone())),
        };
        let link = self.links.get(&path.ifindex)?;
        if let Err(reason) = source_mac(path, link) {
            return Some(Err(reason));
        }
        let key = neighbour_key(address, path);
        let met = self.neighbours.get(&key).filter(|met| met.read)?;
        let interface = || link.name.clone();
        Some(match (entry(met.entry.as_ref()), &met.refused) {
            (Entry::Usable(mac) | Entry::Aged(mac), _) => compose(path, link, mac),
            (Entry::NoMac, _) => Err(Unresolved::NoMac { interface: interface() }),
            (Entry::Failed | Entry::Missing, Some(refused)) => Err(refused.clone()),
            (Entry::Failed, None) => {
                Err(Unresolved::NeighbourFailed { neighbour: key.1, interface: interface() })
            }
            (Entry::Missing, None) => {
                Err(Unresolved::NeighbourMissing { neighbour: key.1, interface: interface() })
            }
        })
    }

    fn note_news(&mut self, address: IpAddr) {
        let Some(watched) = self.watched.get(&address) else { return };
        if watched.hold.answer() != watched.told {
            self.news.insert(address);
        }
        match watched.hold.deadline(&self.times) {
            Some(deadline) => {
                self.holding.insert(address);
                self.wake = Some(self.wake.map_or(deadline, |wake| wake.min(deadline)));
            }
            None => _ = self.holding.remove(&address),
        }
    }

    /// When [`Table::on_time`] has something to do, at the earliest.
    pub(super) fn wake(&self) -> Option<Instant> {
        self.wake
    }

    pub(super) fn on_time(&mut self, now: Instant) {
        if self.wake.is_none_or(|wake| wake > now) {
            return;
        }
        self.wake = None;
        for address in self.holding.iter().copied().collect::<Vec<_>>() {
            if let Some(watched) = self.watched.get_mut(&address) {
                watched.hold.on_time(now, &self.times);
            }
            self.note_news(address);
        }
    }

    pub(super) fn has_news(&self) -> bool {
        !self.news.is_empty() || !self.news_of_links.is_empty()
    }

    /// What differs from what was told last. What has changed and changed back in between is not told.
    pub(super) fn take_link_news(&mut self) -> Vec<LinkEvent> {
        let mut events = Vec::new();
        for (ifindex, again) in std::mem::take(&mut self.news_of_links) {
            let Some(link) = self.links.get(&ifindex) else {
                let gone = self.told_links.remove(&ifindex);
                events.extend(gone.map(|told| LinkEvent::Gone { ifindex, name: told.name }));
                continue;
            };
            let told = self.told_links.insert(ifindex, link.clone());
            if again || told.as_ref() != Some(link) {
                events.push(LinkEvent::Changed(link.clone()));
            }
        }
        events
    }

    pub(super) fn take_news(&mut self) -> HashMap<IpAddr, Answer> {
        let mut news = HashMap::new();
        for address in std::mem::take(&mut self.news) {
            let Some(watched) = self.watched.get_mut(&address) else { continue };
            let answer = watched.hold.answer();
            if answer != watched.told {
                watched.told.clone_from(&answer);
                news.extend(answer.map(|answer| (address, answer)));
            }
        }
        news
    }
}

/// What to ask of the kernel for a neighbour, if anything.
fn wish(known: Option<&Neighbour>, care: bool) -> Option<Care> {
    let unclaimed = known.is_none_or(|known| !known.learnt && !known.validated);
    match entry(known) {
        // What is not permanent yet may become so where the device has no neighbour discovery: care comes later.
        Entry::Missing | Entry::Failed => known.is_none_or(|known| !known.validated).then_some(Care::Keep),
        Entry::NoMac => None,
        Entry::Aged(_) | Entry::Usable(_) if !unclaimed => None,
        Entry::Aged(_) if !care => Some(Care::Keep),
        Entry::Aged(_) | Entry::Usable(_) => {
            let known = known?;
            let fixed = matches!(known.state, NeighbourState::Permanent | NeighbourState::Noarp);
            (care && !known.managed && !fixed).then_some(Care::Set)
        }
    }
}

#[cfg(test)]
mod tests;
