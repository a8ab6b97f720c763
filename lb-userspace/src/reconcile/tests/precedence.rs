//! Which service takes a packet: the packet path on planned tables, against the documented precedence said in a loop.

use super::*;

/// What becomes of a packet, in the words of the configuration.
#[derive(Debug, PartialEq)]
enum End {
    /// Counted for this VIP and these ports, of the service's pool.
    Service(Counted, String),
    Unmapped(Unmapped),
    NotVip,
}

/// By the precedence of docs/configuration.md: the longest VIP that has a service for the port; there, the fewest ports.
fn oracle(config: &Config, probe: &Probe) -> End {
    let mut best: Option<((u8, u8), Counted, &Service)> = None;
    let mut unmapped: Option<(u8, Unmapped)> = None;
    let mut is_vip = false;
    for service in &config.services {
        for (vip, ports, protocol) in service.triples().filter(|(vip, ..)| vip.contains(probe.address)) {
            is_vip = true;
            if let Some(said) = service.unmapped
                && unmapped.is_none_or(|(length, _)| length < vip.length())
            {
                unmapped = Some((vip.length(), said));
            }
            let number = super::super::desired::protocol_number(protocol);
            if number != probe.protocol || !ports.contains(probe.port) {
                continue;
            }
            let kind = match ports {
                Ports::Port(_) => 2,
                Ports::Range(..) => 1,
                Ports::Any => 0,
            };
            if best.as_ref().is_none_or(|(rank, ..)| *rank < (vip.length(), kind)) {
                best = Some(((vip.length(), kind), (vip, ports, number), service));
            }
        }
    }
    match best {
        Some((_, counted, service)) => End::Service(counted, config.pool_of(service).name.clone()),
        None if is_vip => End::Unmapped(unmapped.map_or(Unmapped::Drop, |(_, said)| said)),
        None => End::NotVip,
    }
}

fn found(image: &Image, counted: &HashMap<u32, Counted>, config: &Config, probe: &Probe) -> End {
    let mut bytes = vec![0; 64];
    bytes.extend(packet(probe, 7, SAYS[0]));
    let tables = Traced::new(image);
    let decision = forward(&mut Buffer::new(&mut bytes, 64, INGRESS), &tables);
    match decision.outcome {
        Outcome::ForwardTransmit | Outcome::ForwardRedirect => {
            let (row, _) = tables.into_trail().vip.expect("forwarded, so counted");
            let identity = image.backends[decision.backend as usize].identity;
            let pool = config.pools.iter().find(|pool| {
                let of = |b: &Backend| backend_identity(&pool.name, pool.forward, b.address) == identity;
                pool.backends.iter().any(of)
            });
            End::Service(counted[&row], pool.expect("a backend of some pool").name.clone())
        }
        Outcome::DropVipPort => End::Unmapped(Unmapped::Drop),
        Outcome::PassVipUnmapped => End::Unmapped(Unmapped::Pass),
        Outcome::AnswerUnreachable => End::Unmapped(Unmapped::Reject),
        Outcome::PassNotVip => End::NotVip,
        outcome => panic!("{probe:?} ends as {outcome:?}"),
    }
}

/// A random service: VIPs, single ports, the lowest port of a range, whether any port, protocols, and what it says of the
/// rest.
type Draft = (BTreeSet<u8>, BTreeSet<u16>, Option<u16>, bool, u8, Option<Unmapped>);

/// Some VIPs of the twelve there are, and ports out of few, so that they meet.
fn service() -> impl Strategy<Value = Draft> {
    let unmapped =
        prop::sample::select(vec![None, Some(Unmapped::Drop), Some(Unmapped::Pass), Some(Unmapped::Reject)]);
    (
        prop::collection::btree_set(0u8..12, 1..4),
        prop::collection::btree_set(1u16..30, 0..3),
        prop::option::of(1u16..20),
        prop::bool::weighted(0.3),
        1u8..4,
        unmapped,
    )
}

/// Three pools, and no service.
fn pools() -> State {
    let mut state = State::empty();
    for pool in 0..3u16 {
        let backends = (0..2).map(|host| (pool * 50 + host, (100, true))).collect();
        let (name, forward) = (pool as u8, Forward::Ipip);
        state.pools.insert(name, PoolState { name, forward, on_empty: OnEmpty::Drop, backends });
    }
    state
}

/// As the rules of the configuration want it: no port twice, no ranges that overlap, lists that fit, and one word on
/// what is unmapped.
fn valid(base: &State, drafts: Vec<Draft>) -> Config {
    let mut config = base.config();
    let mut taken: Vec<(Vip, Ports, Protocol)> = Vec::new();
    let mut said: HashMap<Vip, Unmapped> = HashMap::new();
    for (index, (vips, singles, range, any, protocols, unmapped)) in drafts.into_iter().enumerate() {
        let vips: Vec<Vip> = vips.into_iter().map(vip).collect();
        let protocols = match protocols {
            1 => vec![Protocol::Tcp],
            2 => vec![Protocol::Udp],
            _ => vec![Protocol::Udp, Protocol::Tcp],
        };
        let some = !singles.is_empty() || range.is_some();
        let ports = singles.into_iter().map(Ports::Port);
        let ports = ports
            .chain(range.map(|low| Ports::Range(low, low + 8)))
            .chain((any || !some).then_some(Ports::Any));
        let mut service = Service {
            name: format!("service-{index}"),
            vips,
            ports: ports.collect(),
            protocols,
            pool: index % config.pools.len(),
            scheduler: Scheduler::Maglev,
            source_prefix: SourcePrefix::default(),
            quic: None,
            fragments: Fragments::Drop,
            unmapped,
        };
        let clash = |a: &(Vip, Ports, Protocol), b: &(Vip, Ports, Protocol)| {
            let ranges = matches!((a.1, b.1), (Ports::Range(..), Ports::Range(..)));
            let meet = a.1.lowest() <= b.1.highest() && b.1.lowest() <= a.1.highest();
            (a.0, a.2) == (b.0, b.2) && (a.1 == b.1 || ranges && meet)
        };
        if service.triples().any(|triple| taken.iter().any(|other| clash(&triple, other))) {
            continue;
        }
        if let Some(word) = unmapped
            && service.vips.iter().any(|vip| said.get(vip).is_some_and(|other| *other != word))
        {
            service.unmapped = None;
        }
        config.services.push(service);
        let too_long =
            |vip: &DesiredVip| matches!(vip, DesiredVip::Address { rules, .. } if rules.len() > 16);
        if entries(&config).values().any(too_long) {
            config.services.pop();
            continue;
        }
        let service = config.services.last().expect("pushed");
        taken.extend(service.triples());
        said.extend(service.vips.iter().filter_map(|vip| Some((*vip, service.unmapped?))));
    }
    config
}

/// Addresses in and around the VIPs, at their borders.
fn addresses() -> Vec<IpAddr> {
    let vips = (0..12).map(vip);
    let mut addresses: Vec<IpAddr> = vips
        .flat_map(|vip| {
            let key = super::super::entries::mark_key(vip);
            [vip.first(), last_of(vip.first(), PortKey(key.1))]
        })
        .collect();
    addresses.extend(
        ["203.0.113.77", "203.0.120.1", "203.0.128.0", "198.51.100.1"].map(|a| a.parse::<IpAddr>().unwrap()),
    );
    addresses.extend(
        ["2001:db8:113::77", "2001:db8:113:5::1", "2001:db8:1aa::1", "2001:db8:200::"]
            .map(|a| a.parse::<IpAddr>().unwrap()),
    );
    addresses
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(64), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_most_specific_service_takes_the_packet(
        drafts in prop::collection::vec(service(), 1..9),
        others in prop::collection::vec(service(), 1..9),
        ports in prop::collection::vec(prop::sample::select((0u16..32).chain([60_000, 65_535]).collect::<Vec<_>>()), 4),
    ) {
        let base = pools();
        let mut image = fresh();
        // The second on top of the first: also what is left of others must not be found.
        for drafts in [drafts, others] {
            let config = valid(&base, drafts);
            let mut desired = thinned(desired(&config, &base.world()));
            desired.tables.values_mut().for_each(|table| Arc::make_mut(table).idle = Duration::ZERO);
            let ops = plan_at_once(&image, &desired, &capacity());
            prop_assert!(ops.is_ok(), "{:?}", ops);
            ops.unwrap().iter().for_each(|op| image.apply(op));
            // A datagram may be of a flow of before, which stays where it was for a while.
            settle(&mut image, &desired)?;
            let rows = counter_rows(&present_vips(&image));
            let counted: HashMap<u32, Counted> =
                rows.into_iter().map(|(counted, row)| (row, counted)).collect();
            for address in addresses() {
                for &port in &ports {
                    for protocol in [6, 17] {
                        let probe = Probe { address, port, protocol, fragment: false };
                        let (met, wanted) = (found(&image, &counted, &config, &probe), oracle(&config, &probe));
                        prop_assert_eq!(met, wanted, "{:?}", probe);
                    }
                }
            }
        }
    }
}
