//! A configuration with what is alive, small enough to be changed at random. It knows no tables.

use super::*;

/// A configuration with what is alive, small enough to be changed at random.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    pub pools: BTreeMap<u8, PoolState>,
    pub services: BTreeMap<u8, ServiceState>,
    /// Next hop of a backend's address: interface, MTU, last byte of the MAC; `None` is unresolved.
    pub hops: BTreeMap<u16, Option<(u32, u16, u8)>>,
    /// Last byte of each address that clients' are translated to, of both families: four at the most.
    pub sources: BTreeSet<u8>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct PoolState {
    /// A rename makes it another pool.
    pub name: u8,
    pub forward: Forward,
    pub on_empty: OnEmpty,
    /// Host part of the address -> weight, up.
    pub backends: BTreeMap<u16, (u8, bool)>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ServiceState {
    pub pool: u8,
    pub vips: BTreeSet<u8>,
    pub ports: BTreeSet<u16>,
    pub protocols: Vec<Protocol>,
    pub kind: Kind,
}

/// What a service has beside single ports of addresses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Kind {
    pub range: bool,
    pub any: bool,
    pub scheduler: Scheduler,
    pub unmapped: Option<Unmapped>,
}

pub const PLAIN: Kind = Kind { range: false, any: false, scheduler: Scheduler::Maglev, unmapped: None };

/// Of 4096 connections, so that there are four rows.
const PORTS_OF_ONE: RangeInclusive<u16> = 1024..=2047;

fn source6(last: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, u16::from(last))
}

impl State {
    pub fn empty() -> Self {
        Self {
            pools: BTreeMap::new(),
            services: BTreeMap::new(),
            hops: BTreeMap::new(),
            sources: BTreeSet::new(),
        }
    }

    pub fn hop(&self, host: u16) -> Option<(u32, u16, u8)> {
        self.hops.get(&host).copied().unwrap_or(Some((INGRESS, 1500, 1)))
    }

    pub fn config(&self) -> Config {
        let order: Vec<u8> = self.pools.keys().copied().collect();
        let services = self.services.iter().filter(|(_, service)| self.pools.contains_key(&service.pool));
        let mut config = Config {
            api: Api::default(),
            metrics: Metrics::default(),
            interfaces: Vec::new(),
            seed: 7,
            outer_source: OuterSource::default(),
            sources: Sources {
                v4: self.sources.iter().map(|last| Ipv4Addr::new(10, 99, 0, *last)).collect(),
                v6: self.sources.iter().map(|last| source6(*last)).collect(),
                ports: PORTS_OF_ONE,
            },
            timeouts: Timeouts::default(),
            vip_arp: false,
            trace: false,
            vlan: false,
            icmp: Icmp { echo: false, ..Icmp::default() },
            limits: LIMITS,
            pools: self.pools.values().map(PoolState::model).collect(),
            services: services
                .map(|(name, service)| {
                    let pool = order.iter().position(|pool| *pool == service.pool);
                    service.model(*name, pool.expect("filtered above"))
                })
                .collect(),
        };
        // What the rules of the configuration refuse.
        for service in &mut config.services {
            if config.pools[service.pool].forward.translates() {
                service.fragments = Fragments::Drop;
            }
        }
        let mut any = HashSet::new();
        for service in &mut config.services {
            let of_any = service.triples().filter(|(_, ports, _)| *ports == Ports::Any);
            if !of_any.collect::<Vec<_>>().into_iter().all(|triple| any.insert(triple)) {
                service.ports.retain(|ports| *ports != Ports::Any);
            }
        }
        let too_long =
            |vip: &DesiredVip| matches!(vip, DesiredVip::Address { rules, .. } if rules.len() > 16);
        while entries(&config).values().any(too_long) {
            config.services.pop();
        }
        config
    }

    pub fn world(&self) -> World {
        let mut world = World::default();
        for (index, pool) in self.pools.values().enumerate() {
            for (backend, (&host, &(_, up))) in pool.backends.iter().enumerate() {
                let hop = self.hop(host);
                // What the agent says of a backend without a next hop.
                world.up.insert((index, backend), up && hop.is_some());
                if let Some(hop) = hop {
                    Arc::make_mut(&mut world.next_hops).insert(backend_address(host), next_hop(hop));
                }
            }
        }
        world
    }

    pub fn desired(&self) -> Desired {
        let mut desired = desired(&self.config(), &self.world());
        // No matter of the maps.
        for table in desired.tables.values_mut() {
            let table = Arc::make_mut(table);
            table.pools.clear();
            (table.idle, table.protocol) = (Duration::ZERO, 0);
        }
        desired.backends.values_mut().for_each(|backend| backend.pool = [0; 3]);
        desired
    }
}

/// Every sixteenth slot: nothing in a plan goes by how many there are, but for the time that it takes.
pub fn thinned(mut desired: Desired) -> Desired {
    let thin = |targets: &mut Targets| *targets = targets.iter().copied().step_by(16).collect();
    for table in desired.tables.values_mut() {
        let table = Arc::make_mut(table);
        table.log2_length -= 4;
        thin(&mut table.cur);
        table.est.iter_mut().for_each(thin);
    }
    desired
}

/// Cases of a property, where proptest's default is 256: PROPTEST_CASES raises them all.
pub fn cases(of_256: u32) -> u32 {
    (ProptestConfig::default().cases * of_256).div_ceil(256)
}

impl ServiceState {
    pub fn model(&self, name: u8, pool: usize) -> Service {
        // Ports are the service's own: no triple appears twice.
        let own = |port: u16| u16::from(name) * 100 + port;
        // A service has some port.
        let one = [1].into_iter().filter(|_| self.ports.is_empty());
        let singles = self.ports.iter().copied().chain(one).map(|port| Ports::Port(own(port)));
        let range = self.kind.range.then(|| Ports::Range(own(50), own(60)));
        let Kind { any, scheduler, unmapped, .. } = self.kind;
        Service {
            name: format!("service-{name}"),
            vips: self.vips.iter().map(|&number| vip(number)).collect(),
            ports: singles.chain(range).chain(any.then_some(Ports::Any)).collect(),
            protocols: self.protocols.clone(),
            pool,
            scheduler,
            source_prefix: SourcePrefix::default(),
            quic: None,
            fragments: match scheduler {
                Scheduler::SourceHash => Fragments::Balance,
                _ => Fragments::Drop,
            },
            unmapped,
        }
    }
}

impl PoolState {
    pub fn model(&self) -> Pool {
        let backend = |(&host, &(weight, _)): (&u16, &(u8, bool))| Backend {
            name: host.to_string(),
            address: backend_address(host),
            weight,
            port: None,
            server_id: None,
            leaving: false,
        };
        Pool {
            name: format!("pool-{}", self.name),
            forward: self.forward,
            check: Check {
                kind: CheckKind::None,
                port: 0,
                at_own_port: false,
                interval: Duration::from_secs(1),
                timeout: Duration::from_secs(1),
                rise: 1,
                fall: 1,
            },
            on_empty: self.on_empty,
            flows: Flows::default(),
            slow_start: None,
            tiers: Tiers::default(),
            backends: self.backends.iter().map(backend).collect(),
        }
    }
}

/// Even hosts are IPv4, odd ones IPv6.
pub fn backend_address(host: u16) -> IpAddr {
    if host.is_multiple_of(2) {
        Ipv4Addr::from(0x0a00_0000 + u32::from(host)).into()
    } else {
        Ipv6Addr::from((0x2001_0db8_u128 << 96) + u128::from(host)).into()
    }
}

/// Even ones are IPv4, odd ones IPv6; from 6 on prefixes, each within the next of its family.
pub fn vip(number: u8) -> Vip {
    let address: IpAddr = if number.is_multiple_of(2) {
        Ipv4Addr::new(203, 0, 113, number).into()
    } else {
        Ipv6Addr::from((0x2001_0db8_0113_u128 << 80) + u128::from(number)).into()
    };
    let length = match number {
        6 => 28,
        7 => 64,
        8 => 24,
        9 => 48,
        10 => 20,
        11 => 40,
        _ => return address.into(),
    };
    Vip::holding(address, length).expect("a prefix")
}

pub fn next_hop((ifindex, mtu, last): (u32, u16, u8)) -> NextHop {
    NextHop {
        ifindex,
        interface: format!("if{ifindex}"),
        source_mac: [2, 0, 0, 0, 0, ifindex as u8],
        mac: [2, 0xbe, 0, 0, 0, last],
        mtu,
        preferred_source: Some(Ipv4Addr::new(10, 0, 255, 1).into()),
        gateway: None,
        kind: None,
        redirect_target: true,
    }
}
