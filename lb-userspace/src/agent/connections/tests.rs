use std::sync::atomic::Ordering;

use lb_common::abi::{BACKEND_CLAIMED, Meta};

use super::*;
use crate::capacity::Capacity;
use crate::config;
use crate::reconcile::desired::{World, desired};
use crate::reconcile::image::Image;
use crate::reconcile::plan::plan_at_once;

const CONFIG: &str = "
interfaces: [eth0]
seed: 5f1d0c3a9be24771
outer_source: 10.255.0.1/32
limits: {connections: 4096}
fullnat: {sources: [10.0.0.5, \"2001:db8::5\"], ports: 1024-65535}
pools:
  web: {forward: nat, port: 8080, backends: [{address: 10.0.0.11, name: web1}, {address: 10.0.0.12, port: 81}], health: {type: none}}
  far: {forward: fullnat, backends: [\"2001:db8::11\"], health: {type: none}}
  old: {forward: ipip, backends: [10.0.0.13], health: {type: none}}
services:
  - {name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}
  - {name: dns, vip: 203.0.113.10, ports: 53, protocol: udp, pool: far}
  - {name: tunnel, vip: 203.0.113.10, ports: 81, protocol: tcp, pool: old}
";

struct Site {
    config: Config,
    index: Index,
    connections: Connections,
}

impl Site {
    fn new() -> Self {
        let config = config::parse("test.yaml", CONFIG).unwrap().config;
        let capacity = Capacity::new(&config.limits);
        let mut image = Image::empty(&capacity, Meta::default());
        for op in plan_at_once(&image, &desired(&config, &World::default()), &capacity).unwrap() {
            image.apply(&op);
        }
        let connections = Connections::in_memory(capacity.connections() as usize);
        let site = Self { index: Index::new(&image), connections, config };
        site.put(3, "web", 0, ("192.0.2.7:40000", "203.0.113.10:80"), PinState::Established, seen::ANSWER);
        site.put(70, "web", 1, ("192.0.2.8:40000", "203.0.113.10:80"), PinState::Syn, 0);
        let reset = seen::ANSWER | seen::RESET;
        site.put(900, "web", 1, ("198.51.100.1:9", "203.0.113.10:80"), PinState::Finishing, reset);
        site.put(901, "far", 0, ("192.0.2.7:5", "203.0.113.10:53"), PinState::Datagram, 0);
        site
    }

    fn id(&self, pool: &str, backend: usize) -> u16 {
        let pool = self.config.pools.iter().find(|of| of.name == pool).unwrap();
        self.index.ids[&identity_of(pool, &pool.backends[backend])]
    }

    fn put(
        &self,
        place: usize,
        pool: &str,
        backend: usize,
        (client, vip): (&str, &str),
        state: PinState,
        seen: u64,
    ) {
        let (client, vip): (SocketAddr, SocketAddr) = (client.parse().unwrap(), vip.parse().unwrap());
        let mapped = |address: SocketAddr| match address.ip() {
            IpAddr::V4(address) => Address6::mapped(u32::from_ne_bytes(address.octets())),
            IpAddr::V6(address) => Address6::from_bytes(address.octets()),
        };
        let protocol = if state == PinState::Datagram { PROTO_UDP } else { PROTO_TCP };
        let counted =
            self.index.vips.iter().find(|((_, ports, _), _)| ports.to_string() == vip.port().to_string());
        let ports = u64::from(client.port().to_be()) | u64::from(vip.port().to_be()) << 16;
        let source = u64::from(2000u16.to_be());
        let words = [
            { mapped(client).high },
            { mapped(client).low },
            { mapped(vip).high },
            { mapped(vip).low },
            ports | u64::from(protocol) << 32 | seen,
            0,
            monotonic_ns() - 5_000_000_000,
            u64::from(*counted.unwrap().1) | source << 32,
        ];
        for (word, value) in self.connections.records()[place].0.iter().zip(words) {
            word.store(value, Ordering::SeqCst);
        }
        let pin = Pin::new(7, self.id(pool, backend), state, Pin::age_of(coarse_ns()) - 10);
        self.connections.words()[place].store(pin.bits(), Ordering::SeqCst);
    }

    fn listing(&self, filter: &Filter, limit: Option<u64>) -> Result<Vec<Connection>, String> {
        let listing = Listing::new(self.connections.clone(), &self.index, Some(&self.config), filter, limit)?;
        Ok(listing.collect())
    }

    fn clients(&self, filter: Filter) -> Vec<String> {
        let listed = self.listing(&filter, None).unwrap_or_else(|error| panic!("{filter:?}: {error}"));
        listed.iter().map(|connection| connection.client.to_string()).collect()
    }
}

fn text(text: &str) -> Option<String> {
    Some(text.to_owned())
}

#[test]
fn a_connection_is_told_in_the_words_of_the_configuration() {
    let site = Site::new();
    let all = site.listing(&Filter::default(), None).unwrap();
    let first = &all[0];
    assert_eq!(
        (first.client.to_string(), first.vip.to_string()),
        ("192.0.2.7:40000".into(), "203.0.113.10:80".into())
    );
    assert_eq!((first.service.as_deref(), first.source), (Some("www"), None));
    assert_eq!((first.pool.as_deref(), first.backend.as_deref()), (Some("web"), Some("web1")));
    assert_eq!(first.backend_address, "10.0.0.11:8080".parse().ok());
    assert_eq!((first.state, first.protocol.as_str()), (ConnectionState::Established, "tcp"));
    assert!((first.answered, first.reset) == (true, false) && (5.0..60.0).contains(&first.age_seconds));
    assert!((21..60).contains(&first.idle_seconds), "ten units of 2.147 s: {}", first.idle_seconds);
    assert_eq!(all[1].backend_address, "10.0.0.12:81".parse().ok(), "a backend's own port");
    assert_eq!(all[2].state, ConnectionState::Finishing);
    assert!(all[2].reset);
    let datagrams = &all[3];
    assert_eq!(datagrams.source, "[2001:db8::5]:2000".parse().ok(), "of the backend's family");
    assert_eq!(datagrams.backend_address, "[2001:db8::11]:53".parse().ok(), "the client's choice");
    assert_eq!((datagrams.protocol.as_str(), datagrams.state), ("udp", ConnectionState::Udp));
}

#[test]
fn all_of_a_filter_holds_for_what_is_listed() {
    let site = Site::new();
    let of = |filter| site.clients(filter);
    let all = ["192.0.2.7:40000", "192.0.2.8:40000", "198.51.100.1:9", "192.0.2.7:5"];
    assert_eq!(of(Filter::default()), all);
    assert_eq!(of(Filter { service: text("www"), ..Filter::default() }), all[..3]);
    assert_eq!(of(Filter { service: text("dns"), ..Filter::default() }), all[3..]);
    assert_eq!(of(Filter { backend: text("web/10.0.0.12"), ..Filter::default() }), all[1..3]);
    assert_eq!(of(Filter { backend: text("web/web1"), ..Filter::default() }), all[..1]);
    let client = |net: &str| Filter { client: net.parse().ok(), ..Filter::default() };
    assert_eq!(of(client("192.0.2.7")), [all[0], all[3]]);
    assert_eq!(of(client("192.0.2.0/24")), [all[0], all[1], all[3]]);
    assert_eq!(of(client("::/0")), [""; 0]);
    let state = Some(ConnectionState::Syn);
    assert_eq!(of(Filter { state, ..client("0.0.0.0/0") }), all[1..2]);
    assert_eq!(of(Filter { state, ..client("192.0.2.7") }), [""; 0]);
    assert_eq!(site.listing(&Filter::default(), Some(2)).unwrap().len(), 2);
}

#[test]
fn names_that_are_not_known_are_said_with_those_that_are() {
    let site = Site::new();
    let with = |service: Option<&str>, backend: Option<&str>| Filter {
        service: service.map(str::to_owned),
        backend: backend.map(str::to_owned),
        ..Filter::default()
    };
    for (filter, words) in [
        (with(Some("wwww"), None), "no service wwww; did you mean www?"),
        (with(None, Some("web/web9")), "pool web has no backend web9"),
        (with(None, Some("old/10.0.0.13")), "pool old has no connections"),
    ] {
        let error = site.listing(&filter, None).expect_err("a name that is not there");
        assert!(error.contains(words), "{error}");
    }
    // Without a configuration.
    let nameless = |filter| Listing::new(site.connections.clone(), &site.index, None, &filter, None);
    for filter in [with(Some("www"), None), with(None, Some("web/web1"))] {
        let error = nameless(filter).expect_err("a name");
        assert!(error.contains("-c"), "{error}");
    }
    let error = nameless(with(None, Some("web/10.0.0.99"))).expect_err("an address of nobody");
    assert!(error.contains("no pool web has a backend 10.0.0.99"), "{error}");
    let told: Vec<_> = nameless(with(None, Some("web/10.0.0.11"))).expect("an address is known").collect();
    assert_eq!((told.len(), told[0].backend_address), (1, "10.0.0.11:8080".parse().ok()));
    assert_eq!((&told[0].pool, &told[0].service), (&None, &None));
}

#[test]
fn a_flush_takes_out_what_is_meant_and_nothing_else() {
    let site = Site::new();
    let flush = |filter: &Filter| flush(&site.connections, &site.index, Some(&site.config), filter);
    let claimed = Pin::new(1, BACKEND_CLAIMED, PinState::Syn, 0).bits();
    site.connections.words()[5].store(claimed, Ordering::SeqCst);
    assert_eq!(flush(&Filter { backend: text("web/10.0.0.12"), ..Filter::default() }), Ok(2));
    assert_eq!(site.clients(Filter::default()), ["192.0.2.7:40000", "192.0.2.7:5"]);
    assert!(flush(&Filter { service: text("none"), ..Filter::default() }).is_err());
    assert_eq!(flush(&Filter::default()), Ok(2));
    assert_eq!(flush(&Filter::default()), Ok(0));
    let left = site.connections.words().iter().filter(|word| word.load(Ordering::SeqCst) != 0).count();
    assert_eq!(left, 1, "a place that is being filled is no connection yet");
}

#[test]
fn a_flush_that_meets_packets_takes_out_all_that_was_there() {
    let site = Site::new();
    let age = std::sync::atomic::AtomicU64::new(0);
    let flushed = std::thread::scope(|scope| {
        let packets = scope.spawn(|| {
            // Each renews what is still there, until nothing is.
            loop {
                let mut there = 0;
                for word in site.connections.words() {
                    let bits = word.load(Ordering::Acquire);
                    let pin = Pin::from_bits(bits);
                    let age = age.fetch_add(1, Ordering::Relaxed) as u16;
                    let next = Pin::new(pin.tag(), pin.backend(), pin.state(), age).bits();
                    there += u32::from(bits != 0);
                    if bits != 0 {
                        _ = word.compare_exchange(bits, next, Ordering::SeqCst, Ordering::SeqCst);
                    }
                }
                if there == 0 {
                    return;
                }
            }
        });
        let filter = Filter { client: "0.0.0.0/0".parse().ok(), ..Filter::default() };
        let mut flushed = 0;
        // What changes too often to be read in one pass is there in the next.
        while flushed < 4 {
            flushed += flush(&site.connections, &site.index, Some(&site.config), &filter).expect("no names");
        }
        packets.join().expect("packets");
        flushed
    });
    assert_eq!(flushed, 4);
}
