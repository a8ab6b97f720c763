//! The follower against real namespaces: neighbours and routes here, interfaces and load below.

mod links;
mod load;

use std::sync::atomic::Ordering;
use std::time::Instant;

use tokio::time::timeout;

use super::*;
use crate::nexthop::netns::{FAR_MAC, Lab, in_lab};

/// Long enough for a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(20);
const SHORT: Times = Times {
    silent: Duration::from_millis(400),
    no_way: Duration::from_millis(200),
    first: Duration::from_millis(100),
};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A follower, and what it has told.
struct Told {
    follower: Follower,
    events: mpsc::Receiver<Event>,
    resolver: Arc<Resolver>,
    hops: HashMap<IpAddr, Answer>,
    links: HashMap<u32, Link>,
    gone: Vec<String>,
    /// How often each link was told.
    link_events: HashMap<u32, usize>,
}

impl Told {
    fn start(times: Times) -> Told {
        Told::start_with(Settings { times, receive_buffer: RECEIVE_BUFFER })
    }

    fn start_with(settings: Settings) -> Told {
        let resolver = Arc::new(Resolver::new().unwrap());
        let (follower, events) = Follower::start_with(Arc::clone(&resolver), settings).unwrap();
        let (hops, links, link_events) = Default::default();
        Told { follower, events, resolver, hops, links, gone: Vec::new(), link_events }
    }

    /// Watches, and waits until there is an answer for each.
    async fn watch(&mut self, addresses: &[&str]) {
        let known = addresses.iter().map(|address| (ip(address), None)).collect();
        self.follower.watch(known);
        self.until("first answers", |told| {
            addresses.iter().all(|address| told.hops.contains_key(&ip(address)))
        })
        .await;
    }

    /// Takes events until what they tell is so.
    async fn until(&mut self, what: &str, so: impl Fn(&Told) -> bool) -> Duration {
        let start = Instant::now();
        while !so(self) {
            let left = PATIENCE.saturating_sub(start.elapsed());
            match timeout(left, self.events.recv()).await {
                Ok(event) => self.take(event.expect("the follower goes on")),
                Err(_) => panic!("never: {what}; hops {:?}, links {:?}", self.hops, self.links),
            }
        }
        start.elapsed()
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::NextHops(hops) => self.hops.extend(hops),
            Event::Links(links) => {
                for link in links {
                    match link {
                        LinkEvent::Changed(link) => {
                            *self.link_events.entry(link.ifindex).or_default() += 1;
                            self.links.insert(link.ifindex, link);
                        }
                        LinkEvent::Gone { ifindex, name } => {
                            self.links.remove(&ifindex);
                            self.gone.push(name);
                        }
                    }
                }
            }
        }
    }

    /// What is told within a while.
    async fn quiet(&mut self, time: Duration) -> Vec<Event> {
        let mut events = Vec::new();
        let end = Instant::now() + time;
        while let Ok(Some(event)) =
            timeout(end.saturating_duration_since(Instant::now()), self.events.recv()).await
        {
            events.push(event);
        }
        events
    }

    fn hop(&self, address: &str) -> Option<&NextHop> {
        self.hops.get(&ip(address))?.hop.as_ref().ok()
    }

    fn reason(&self, address: &str) -> Option<&Unresolved> {
        self.hops.get(&ip(address))?.hop.as_ref().err()
    }

    fn doubt(&self, address: &str) -> Option<&Unresolved> {
        self.hops.get(&ip(address))?.doubt.as_ref()
    }

    fn is_sure(&self, address: &str) -> bool {
        self.hop(address).is_some() && self.doubt(address).is_none()
    }

    fn link(&self, name: &str) -> Option<&Link> {
        self.links.values().find(|link| link.name == name)
    }

    fn route_questions(&self) -> usize {
        self.resolver.netlink.route_questions.load(Ordering::Relaxed)
    }
}

/// Waits for what the follower does without a word.
async fn shows(lab: &Lab, args: &str, so: impl Fn(&str) -> bool) {
    let start = Instant::now();
    loop {
        let shown = lab.near_shows(args);
        if so(&shown) {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "{args}: {shown}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[test]
fn links_and_answers_of_both_families_are_told_at_first() {
    in_lab(async |_| {
        let mut told = Told::start(TIMES);
        let took = told.until("links", |told| told.link("near0").is_some()).await;
        assert!(told.link("lo").is_some());
        told.watch(&["10.77.0.2", "fd77::2", "192.0.2.1", "10.77.0.1"]).await;
        for address in ["10.77.0.2", "fd77::2"] {
            assert_eq!(told.hop(address).unwrap().mac, FAR_MAC);
            let asked = told.resolver.resolve(ip(address)).await.unwrap();
            assert_eq!(told.hop(address), Some(&asked));
        }
        assert_eq!(told.reason("192.0.2.1"), Some(&Unresolved::NoRoute));
        assert_eq!(told.reason("10.77.0.1"), Some(&Unresolved::Local));
        assert!(took < PATIENCE);
    });
}

#[test]
fn what_the_watcher_knows_is_not_told_again() {
    in_lab(async |_| {
        let mut told = Told::start(TIMES);
        let known = told.resolver.resolve(ip("10.77.0.2")).await;
        told.follower.watch([(ip("10.77.0.2"), Some(known)), (ip("192.0.2.1"), None)].into());
        told.until("the other", |told| told.reason("192.0.2.1").is_some()).await;
        assert!(!told.hops.contains_key(&ip("10.77.0.2")));
        // What it knows may be wrong.
        let wrong = Some(Err(Unresolved::NoRoute));
        told.follower.watch([(ip("10.77.0.2"), wrong)].into());
        told.until("the right answer", |told| told.is_sure("10.77.0.2")).await;
    });
}

#[test]
fn a_neighbour_that_announces_another_mac_is_followed_within_a_second() {
    in_lab(async |lab: &Lab| {
        lab.near_ip("route add 10.88.0.0/16 via 10.77.0.2");
        let mut told = Told::start(TIMES);
        told.watch(&["10.77.0.2", "10.88.1.1"]).await;
        lab.far_moves_to("02:00:00:00:00:99");
        let mac = [2, 0, 0, 0, 0, 0x99];
        let start = Instant::now();
        for address in ["10.77.0.2", "10.88.1.1"] {
            told.until("the new MAC", |told| told.hop(address).is_some_and(|hop| hop.mac == mac)).await;
        }
        let took = start.elapsed();
        println!("followed in {took:?}");
        assert!(took < Duration::from_secs(1), "{took:?}");
        assert!(told.is_sure("10.77.0.2") && told.is_sure("10.88.1.1"));
    });
}

#[test]
fn neighbours_are_in_the_kernels_care_while_they_are_watched() {
    in_lab(async |lab: &Lab| {
        lab.near_ip("route add 10.88.0.0/16 via 10.77.0.2");
        lab.near_ip("neigh add 10.77.0.50 lladdr 02:00:00:00:00:50 dev near0 nud permanent");
        lab.near_ip("neigh add 10.77.0.51 lladdr 02:00:00:00:00:51 dev near0 nud noarp");
        let mut told = Told::start(TIMES);
        told.watch(&["10.88.1.1", "fd77::2", "10.77.0.50", "10.77.0.51"]).await;
        for address in ["10.77.0.2", "fd77::2"] {
            shows(lab, &format!("neigh show {address}"), |shown| shown.contains("managed")).await;
        }
        told.follower.watch([(ip("10.88.1.1"), None)].into());
        shows(lab, "neigh show fd77::2", |shown| !shown.contains("managed")).await;
        assert!(lab.near_shows("neigh show 10.77.0.2").contains("managed"));
        for (address, state) in [("10.77.0.50", "PERMANENT"), ("10.77.0.51", "NOARP")] {
            let shown = lab.near_shows(&format!("neigh show {address} nud all"));
            assert!(shown.contains(state) && !shown.contains("managed"), "{shown}");
        }
        told.follower.watch(Known::new());
        shows(lab, "neigh show 10.77.0.2", |shown| !shown.contains("managed")).await;
        assert!(lab.near_shows("neigh show 10.77.0.2").contains("02:00:00:00:00:02"));
    });
}

#[test]
fn care_that_somebody_takes_away_is_put_back() {
    in_lab(async |lab: &Lab| {
        let mut told = Told::start(TIMES);
        told.watch(&["10.77.0.2"]).await;
        shows(lab, "neigh show 10.77.0.2", |shown| shown.contains("managed")).await;
        lab.near_ip("neigh replace 10.77.0.2 lladdr 02:00:00:00:00:02 dev near0 nud stale");
        shows(lab, "neigh show 10.77.0.2", |shown| shown.contains("managed")).await;
    });
}

#[test]
fn a_stale_neighbour_is_used_and_confirmed() {
    in_lab(async |lab: &Lab| {
        lab.near_sysctl("ipv4/neigh/near0/delay_first_probe_time", "0");
        lab.near_ip("neigh add 10.77.0.2 lladdr 02:00:00:00:00:02 dev near0 nud stale");
        let mut told = Told::start(TIMES);
        told.watch(&["10.77.0.2"]).await;
        shows(lab, "neigh show 10.77.0.2", |shown| shown.contains("REACHABLE")).await;
    });
}

#[test]
fn the_kernels_own_probes_of_a_neighbour_are_no_news() {
    in_lab(async |lab: &Lab| {
        for (name, value) in [
            ("delay_first_probe_time", "0"),
            ("base_reachable_time_ms", "100"),
            ("interval_probe_time_ms", "50"),
        ] {
            // Some of these are read only when the entry is made.
            lab.near_sysctl(&format!("ipv4/neigh/near0/{name}"), value);
        }
        let mut told = Told::start(TIMES);
        told.watch(&["10.77.0.2"]).await;
        for state in ["stale", "delay", "probe", "stale", "reachable"] {
            lab.near_ip(&format!("neigh replace 10.77.0.2 lladdr 02:00:00:00:00:02 dev near0 nud {state}"));
            let events = told.quiet(Duration::from_millis(100)).await;
            let hops: Vec<_> = events.iter().filter(|e| matches!(e, Event::NextHops(_))).collect();
            assert!(hops.is_empty(), "{state}: {hops:?}");
        }
    });
}

#[test]
fn a_neighbour_that_falls_silent_is_held_then_told_then_found_again() {
    in_lab(async |lab: &Lab| {
        for (name, value) in [("mcast_solicit", "1"), ("retrans_time_ms", "20")] {
            lab.near_sysctl(&format!("ipv4/neigh/near0/{name}"), value);
        }
        let mut told = Told::start(SHORT);
        told.watch(&["10.77.0.2"]).await;
        lab.far_ip("address del 10.77.0.2/24 dev far0");
        lab.near_ip("neigh del 10.77.0.2 dev near0");
        told.until("doubt", |told| told.doubt("10.77.0.2").is_some()).await;
        assert_eq!(told.hop("10.77.0.2").unwrap().mac, FAR_MAC);
        let took = told.until("an end of the hold", |told| told.reason("10.77.0.2").is_some()).await;
        assert!(took > SHORT.silent / 2, "{took:?}");
        assert_eq!(told.doubt("10.77.0.2"), None);
        lab.far_ip("address add 10.77.0.2/24 dev far0");
        let took = told.until("recovery", |told| told.is_sure("10.77.0.2")).await;
        assert!(took < Duration::from_secs(10), "{took:?}");
    });
}

#[test]
fn a_neighbour_that_never_answered_is_told_once_and_found_when_it_comes() {
    in_lab(async |lab: &Lab| {
        let mut told = Told::start(SHORT);
        told.watch(&["10.77.0.5", "fd77::5"]).await;
        for address in ["10.77.0.5", "fd77::5"] {
            let reason = told.reason(address);
            assert!(matches!(reason, Some(Unresolved::NeighbourMissing { .. })), "{reason:?}");
        }
        lab.far_ip("address add 10.77.0.5/24 dev far0");
        lab.far_ip("address add fd77::5/64 dev far0 nodad");
        told.until("both", |told| told.is_sure("10.77.0.5") && told.is_sure("fd77::5")).await;
    });
}

#[test]
fn routes_that_change_are_followed() {
    in_lab(async |lab: &Lab| {
        lab.far_ip("address add 10.77.0.3/24 dev far0");
        lab.near_ip("route add 10.88.0.0/16 via 10.77.0.2");
        lab.near_ip("route add 10.99.0.0/16 via 10.77.0.2");
        let mut told = Told::start(SHORT);
        told.watch(&["10.88.1.1", "10.99.1.1"]).await;
        let via =
            |told: &Told, gateway| told.hop("10.88.1.1").is_some_and(|h| h.gateway == Some(ip(gateway)));
        lab.near_ip("route replace 10.88.0.0/16 via 10.77.0.3");
        told.until("the other gateway", |told| via(told, "10.77.0.3")).await;
        lab.near_ip("route add 10.88.1.0/24 via 10.77.0.2 mtu 1400");
        told.until("the longer prefix", |told| via(told, "10.77.0.2")).await;
        assert_eq!(told.hop("10.88.1.1").unwrap().mtu, 1400);
        lab.near_ip("route del 10.88.1.0/24");
        told.until("the shorter prefix", |told| via(told, "10.77.0.3")).await;
        lab.near_ip("route del 10.88.0.0/16");
        told.until("doubt", |told| told.doubt("10.88.1.1") == Some(&Unresolved::NoRoute)).await;
        told.until("no route", |told| told.reason("10.88.1.1") == Some(&Unresolved::NoRoute)).await;
        lab.near_ip("route add blackhole 10.88.0.0/16");
        told.until("a decision", |told| told.reason("10.88.1.1") == Some(&Unresolved::Blackhole)).await;
        lab.near_ip("rule add to 10.88.0.0/16 table 77");
        lab.near_ip("route add 10.88.0.0/16 via 10.77.0.3 table 77");
        told.until("a rule's table", |told| via(told, "10.77.0.3")).await;
        lab.near_ip("rule del to 10.88.0.0/16 table 77");
        told.until("no rule", |told| told.reason("10.88.1.1") == Some(&Unresolved::Blackhole)).await;
        assert!(told.is_sure("10.99.1.1"));
    });
}

#[test]
fn a_blackhole_counts_at_once() {
    in_lab(async |lab: &Lab| {
        lab.near_ip("route add 10.88.0.0/16 via 10.77.0.2");
        let mut told = Told::start(TIMES);
        told.watch(&["10.88.1.1"]).await;
        lab.near_ip("route replace blackhole 10.88.0.0/16");
        let took = told.until("it", |told| told.reason("10.88.1.1") == Some(&Unresolved::Blackhole)).await;
        assert!(took < TIMES.no_way, "{took:?}");
    });
}

#[test]
fn a_next_hop_object_that_changes_is_followed() {
    in_lab(async |lab: &Lab| {
        lab.far_ip("address add 10.77.0.3/24 dev far0");
        // As routing daemons have it that do not want a message for each route.
        lab.near_sysctl("ipv4/nexthop_compat_mode", "0");
        lab.near_ip("nexthop add id 1 via 10.77.0.2 dev near0");
        lab.near_ip("route add 10.88.0.0/16 nhid 1");
        let mut told = Told::start(TIMES);
        told.watch(&["10.88.1.1"]).await;
        lab.near_ip("nexthop replace id 1 via 10.77.0.3 dev near0");
        let via = ip("10.77.0.3");
        told.until("it", |told| told.hop("10.88.1.1").is_some_and(|hop| hop.gateway == Some(via))).await;
    });
}

#[test]
fn the_source_address_follows_the_interfaces_addresses() {
    in_lab(async |lab: &Lab| {
        lab.near_ip("route add 10.88.0.0/16 via 10.77.0.2");
        let mut told = Told::start(TIMES);
        told.watch(&["10.88.1.1"]).await;
        lab.near_ip("address add 10.77.0.9/24 dev near0");
        lab.near_sysctl("ipv4/conf/near0/promote_secondaries", "1");
        lab.near_ip("address del 10.77.0.1/24 dev near0");
        let source = Some(ip("10.77.0.9"));
        lab.near_ip("route replace 10.88.0.0/16 via 10.77.0.2");
        told.until("it", |told| told.hop("10.88.1.1").is_some_and(|hop| hop.preferred_source == source))
            .await;
    });
}

#[test]
fn a_follower_that_is_dropped_ends() {
    in_lab(async |_| {
        let Told { follower, mut events, resolver, .. } = Told::start(TIMES);
        drop(follower);
        while timeout(PATIENCE, events.recv()).await.expect("an end").is_some() {}
        let (follower, events) = Follower::start(resolver).unwrap();
        drop(events);
        timeout(PATIENCE, follower.addresses.closed()).await.expect("an end");
    });
}
