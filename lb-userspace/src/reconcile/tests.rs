//! What holds for every sequence of configurations, health and next hops: the plan leads to what is
//! desired, once the flows of before are silent, a second one is empty, and no packet is lost or misled midway.

mod flows;
mod interleavings;
mod moves;
mod precedence;
mod repin;
mod room;
mod servers;
mod sweeps;
mod turns;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use lb_common::abi::{
    ABI_VERSION, BACKEND_NOBODY, BACKEND_PASS, Backend as BackendRow, Egress, MOST_BACKENDS, Meta, Path,
    PortKey, PrefixLengths, RULES_PER_ROW, SLOTS_PER_ROW, TableWord, VipTarget, VipWord,
};
use lb_common::forward::forward;
use lb_common::outcome::{Action, Outcome};
use lb_common::packet::Buffer;
use lb_common::slots::Slot;
use lb_common::wire;
use proptest::prelude::*;

use super::desired::{
    Desired, DesiredBackend, DesiredTable, Target, World, backend_identity, desired, features, forward_of,
};
use super::entries::{Counted, DesiredRule, DesiredVip, Lead, entries};
use super::image::{Image, Traced};
use super::moves::{Course, Moves, SLACK, runs};
use super::op::MapOp;
use super::plan::{
    Leave, PlanError, Unpinned, VipEntry, counter_rows, plan, plan_at_once, ports, present_vips,
};
use crate::capacity::Capacity;
use crate::config::model::{
    Api, Backend, Check, CheckKind, Config, Flows, Forward, Fragments, Icmp, Limits, Metrics, OnEmpty,
    OuterSource, Pool, Ports, Protocol, Scheduler, Service, SourcePrefix, Tiers, Unmapped, Vip,
};
use crate::nexthop::NextHop;

const LIMITS: Limits = Limits { vips: 256, backends: 512, slots: 48 << 12, pins: 4096 };
const INGRESS: u32 = 1;

// ---- States of the world -------------------------------------------------------------------------

/// A configuration with what is alive, small enough to be changed at random.
#[derive(Debug, Clone, PartialEq)]
struct State {
    pools: BTreeMap<u8, PoolState>,
    services: BTreeMap<u8, ServiceState>,
    /// Next hop of a backend's address: interface, MTU, last byte of the MAC; `None` is unresolved.
    hops: BTreeMap<u16, Option<(u32, u16, u8)>>,
}

#[derive(Debug, Clone, PartialEq)]
struct PoolState {
    /// A rename makes it another pool.
    name: u8,
    forward: Forward,
    on_empty: OnEmpty,
    /// Host part of the address -> weight, up.
    backends: BTreeMap<u16, (u8, bool)>,
}

#[derive(Debug, Clone, PartialEq)]
struct ServiceState {
    pool: u8,
    vips: BTreeSet<u8>,
    ports: BTreeSet<u16>,
    protocols: Vec<Protocol>,
    kind: Kind,
}

/// What a service has beside single ports of addresses.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Kind {
    range: bool,
    any: bool,
    scheduler: Scheduler,
    unmapped: Option<Unmapped>,
}

const PLAIN: Kind = Kind { range: false, any: false, scheduler: Scheduler::Maglev, unmapped: None };

impl State {
    fn empty() -> Self {
        Self { pools: BTreeMap::new(), services: BTreeMap::new(), hops: BTreeMap::new() }
    }

    fn hop(&self, host: u16) -> Option<(u32, u16, u8)> {
        self.hops.get(&host).copied().unwrap_or(Some((INGRESS, 1500, 1)))
    }

    fn config(&self) -> Config {
        let order: Vec<u8> = self.pools.keys().copied().collect();
        let services = self.services.iter().filter(|(_, service)| self.pools.contains_key(&service.pool));
        let mut config = Config {
            api: Api::default(),
            metrics: Metrics::default(),
            interfaces: Vec::new(),
            seed: 7,
            outer_source: OuterSource::default(),
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

    fn world(&self) -> World {
        let mut world = World::default();
        for (index, pool) in self.pools.values().enumerate() {
            for (backend, (&host, &(_, up))) in pool.backends.iter().enumerate() {
                let hop = self.hop(host);
                // What the agent says of a backend without a next hop.
                world.up.insert((index, backend), up && hop.is_some());
                if let Some(hop) = hop {
                    world.next_hops.insert(backend_address(host), next_hop(hop));
                }
            }
        }
        world
    }

    fn desired(&self) -> Desired {
        let mut desired = desired(&self.config(), &self.world());
        // No matter of the maps.
        for table in desired.tables.values_mut() {
            table.pools.clear();
            (table.idle, table.protocol) = (Duration::ZERO, 0);
        }
        desired.backends.values_mut().for_each(|backend| backend.pool = [0; 3]);
        desired
    }
}

/// Every sixteenth slot: nothing in a plan goes by how many there are, but for the time that it takes.
fn thinned(mut desired: Desired) -> Desired {
    let thin = |targets: &mut Vec<Target>| *targets = targets.iter().copied().step_by(16).collect();
    for table in desired.tables.values_mut() {
        table.log2_length -= 4;
        thin(&mut table.cur);
        table.est.iter_mut().for_each(thin);
    }
    desired
}

/// Cases of a property, where proptest's default is 256: PROPTEST_CASES raises them all.
fn cases(of_256: u32) -> u32 {
    (ProptestConfig::default().cases * of_256).div_ceil(256)
}

impl ServiceState {
    fn model(&self, name: u8, pool: usize) -> Service {
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
    fn model(&self) -> Pool {
        let backend = |(&host, &(weight, _)): (&u16, &(u8, bool))| Backend {
            name: host.to_string(),
            address: backend_address(host),
            weight,
            server_id: None,
            leaving: false,
        };
        Pool {
            name: format!("pool-{}", self.name),
            forward: self.forward,
            check: Check {
                kind: CheckKind::None,
                port: 0,
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
fn backend_address(host: u16) -> IpAddr {
    if host.is_multiple_of(2) {
        Ipv4Addr::from(0x0a00_0000 + u32::from(host)).into()
    } else {
        Ipv6Addr::from((0x2001_0db8_u128 << 96) + u128::from(host)).into()
    }
}

/// Even ones are IPv4, odd ones IPv6; from 6 on prefixes, each within the next of its family.
fn vip(number: u8) -> Vip {
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

fn next_hop((ifindex, mtu, last): (u32, u16, u8)) -> NextHop {
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

// ---- Packets -------------------------------------------------------------------------------------

/// A packet that may meet a VIP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Probe {
    address: IpAddr,
    port: u16,
    protocol: u8,
    /// One that is not the first.
    fragment: bool,
}

/// Of a flow that begins, and of one that was there before.
const SAYS: [u8; 2] = [wire::TcpFlags::SYN, wire::TcpFlags::ACK];

/// A segment with these flags, or a datagram.
fn packet(probe: &Probe, flow: u16, flags: u8) -> Vec<u8> {
    let ports = wire::Ports::new(1024 + flow, probe.port).both.to_ne_bytes();
    let offset = u8::from(probe.fragment) * 100;
    let mut frame = vec![0; 12];
    match probe.address {
        IpAddr::V4(vip) => {
            frame.extend([
                0x08,
                0x00,
                0x45,
                0,
                0,
                40,
                0,
                0,
                0,
                offset,
                64,
                probe.protocol,
                0,
                0,
                192,
                0,
                2,
                flow as u8,
            ]);
            frame.extend(vip.octets());
        }
        IpAddr::V6(vip) => {
            let (length, next) = if probe.fragment { (28, 44) } else { (20, probe.protocol) };
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, length, next, 64]);
            frame.extend([0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, flow as u8]);
            frame.extend(vip.octets());
            if probe.fragment {
                frame.extend([probe.protocol, 0, 0, offset * 2, 0, 0, 0, 1]);
            }
        }
    }
    frame.extend(ports);
    frame.extend([0; 8]);
    frame.extend([5 << 4, flags, 0, 0, 0, 0, 0, 0]);
    frame
}

/// Where a packet ended.
struct End {
    outcome: Outcome,
    /// The row of the backend that took it.
    took: Option<BackendRow>,
    /// The slot that it met, counted over the whole map.
    slot: Option<u32>,
}

fn send(image: &Image, probe: &Probe, flow: u16, flags: u8) -> End {
    let mut bytes = vec![0; 64];
    bytes.extend(packet(probe, flow, flags));
    let tables = Traced::new(image);
    let decision = forward(&mut Buffer::new(&mut bytes, 64, INGRESS), &tables);
    let took = decision.backend as usize;
    let trail = tables.into_trail();
    let slot = trail.table.zip(trail.slot);
    End {
        outcome: decision.outcome,
        took: (took != 0).then(|| image.backends[took]),
        slot: slot.map(|((_, word), (index, _))| word.first_row() * SLOTS_PER_ROW + index),
    }
}

/// A state as packets should meet it, said without the packet path.
#[derive(Default)]
struct Ends<'d> {
    vips: BTreeMap<(IpAddr, u32), &'d DesiredVip>,
    targets: BTreeMap<u64, BTreeSet<Target>>,
}

impl<'d> Ends<'d> {
    fn of(desired: &'d Desired) -> Self {
        let targets =
            |table: &DesiredTable| table.cur.iter().chain(table.est.iter().flatten()).copied().collect();
        Self {
            vips: desired.vips.iter().map(|(key, vip)| (*key, vip)).collect(),
            targets: desired.tables.iter().map(|(identity, table)| (*identity, targets(table))).collect(),
        }
    }

    /// Whom a packet leads to.
    fn lead(&self, probe: &Probe) -> Option<Lead> {
        let key = match probe.fragment {
            true => PortKey::fragments(probe.protocol),
            false => PortKey::new(probe.port, probe.protocol),
        };
        match self.vips.get(&(probe.address, key.0)) {
            Some(DesiredVip::Service(lead)) => return Some(*lead),
            _ if probe.fragment => return None,
            _ => {}
        }
        let DesiredVip::Address { rules, .. } = self.mark(probe.address)? else { return None };
        let holds = |rule: &&DesiredRule| rule.protocol == probe.protocol && rule.ports.contains(probe.port);
        rules.iter().find(holds).map(|rule| rule.lead)
    }

    /// The entry of the address, or of the longest prefix that holds it.
    fn mark(&self, address: IpAddr) -> Option<&'d DesiredVip> {
        let prefixes = (1..128).rev().filter_map(|length| {
            let prefix = Vip::holding(address, length).filter(|vip| !vip.is_address())?;
            Some((prefix.first(), PortKey::prefix(u32::from(length)).0))
        });
        let keys = std::iter::once((address, PortKey::ADDRESS.0)).chain(prefixes);
        keys.into_iter().find_map(|key| self.vips.get(&key).copied())
    }

    /// Where a packet may end that this leads.
    fn targets(&self, lead: Option<Lead>) -> Option<&BTreeSet<Target>> {
        self.targets.get(&lead?.table)
    }

    /// A packet for every entry and every rule.
    fn probes(&self) -> BTreeSet<Probe> {
        let mut probes = BTreeSet::new();
        for ((address, key), entry) in &self.vips {
            match entry {
                DesiredVip::Service(lead) => {
                    let (_, ports, protocol) = lead.counted;
                    let fragment = PortKey(*key).is_fragments();
                    probes.insert(Probe { address: *address, port: ports.lowest(), protocol, fragment });
                }
                DesiredVip::Address { rules, .. } => {
                    let address = last_of(*address, PortKey(*key));
                    for DesiredRule { ports, protocol, .. } in rules {
                        let port = if *ports == Ports::Any { 60_000 } else { ports.highest() };
                        probes.insert(Probe { address, port, protocol: *protocol, fragment: false });
                    }
                }
            }
        }
        probes
    }
}

/// The address, or the last one of the prefix, which is in no longer one.
fn last_of(address: IpAddr, key: PortKey) -> IpAddr {
    let Some(length) = key.prefix_length() else { return address };
    match address {
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits() | u32::MAX >> length).into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() | u128::MAX >> length).into(),
    }
}

/// Whether a packet may end so where these are the targets.
fn is_right(
    desired: &Desired,
    targets: &BTreeSet<Target>,
    outcome: Outcome,
    took: Option<BackendRow>,
) -> bool {
    match outcome {
        Outcome::ForwardTransmit
        | Outcome::ForwardRedirect
        | Outcome::ForwardFragmentTransmit
        | Outcome::ForwardFragmentRedirect => {
            took.is_some_and(|row| targets.contains(&Target::Backend(row.identity)))
        }
        Outcome::DropNoBackend => targets.contains(&Target::Nobody),
        Outcome::PassNoBackend => targets.contains(&Target::Pass),
        // `on_empty: all` may name a backend that has no next hop.
        Outcome::DropUnresolved => targets.iter().any(|target| match target {
            Target::Backend(identity) => desired.backends[identity].next_hop.is_none(),
            Target::Nobody | Target::Pass => false,
        }),
        _ => false,
    }
}

/// Whether a forwarded packet went where its backend's next hop is, or was; by whatever pool or tunnel that is known.
fn knows_next_hop(desired: &Desired, row: &BackendRow, path: Path, egress: &Egress) -> bool {
    desired.backends.values().filter(|backend| backend.row.address == row.address).any(|backend| {
        backend.next_hop.as_ref().is_some_and(|(mac, way)| *mac == path.mac() && way == egress)
    })
}

// ---- Applying ------------------------------------------------------------------------------------

fn capacity() -> Capacity {
    Capacity::new(&LIMITS)
}

fn fresh() -> Image {
    let all = lb_common::abi::Features::ALL
        .iter()
        .fold(Default::default(), |all: lb_common::abi::Features, f| all.with(f.0));
    let meta = Meta {
        abi_version: ABI_VERSION,
        seed: 7,
        features: all.bits(),
        icmp_rate: 1000,
        pin_rate: 1000,
        ..Meta::default()
    };
    Image::empty(&capacity(), meta)
}

/// What the image says, in the words of `Desired`: ids and places are left out. A table may be longer than its content,
/// which is as long as `desired` says.
fn read_back(image: &Image, desired: &Desired) -> Desired {
    let mut read = Desired::default();
    for (row, weight) in image.backends.iter().zip(&image.load_weights).filter(|(row, _)| row.identity != 0) {
        let path = Path::from_bits(row.path);
        let egress = image.egress[usize::from(path.egress())];
        let backend = DesiredBackend {
            row: BackendRow { path: 0, ..*row },
            next_hop: (path != Path::default()).then(|| (path.mac(), egress)),
            pool: [0; 3],
            old_flows: Default::default(),
            weight: *weight as u8,
        };
        assert!(read.backends.insert(row.identity, backend).is_none(), "two rows of one backend");
    }
    for (word, state) in image.tables.iter().zip(&image.table_states).filter(|(_, state)| state.identity != 0)
    {
        let wanted = desired.tables.get(&state.identity);
        let table = read_table(image, TableWord::from_bits(*word), wanted.map(|table| table.log2_length));
        // Pools that it had before may be among them still.
        let pool_set = wanted.map_or(state.pools, |table| table.pool_set);
        assert!(pool_set.iter().zip(state.pools).all(|(wanted, pools)| pools & wanted == *wanted), "pools");
        let table = DesiredTable { pool_set, ..table };
        assert!(read.tables.insert(state.identity, table).is_none(), "two tables of one identity");
    }
    let present = present_vips(image);
    let counted: HashMap<u32, Counted> =
        counter_rows(&present).into_iter().map(|(counted, row)| (row, counted)).collect();
    let lead = |target: VipTarget| Lead {
        table: image.table_states[usize::from(target.table())].identity,
        flags: target.flags() & VipTarget::SOURCE_HASH,
        counted: counted[&target.vip()],
    };
    read.vips = present
        .iter()
        .map(|(key, entry)| {
            let entry = match entry {
                VipEntry::Service(target) => DesiredVip::Service(lead(*target)),
                VipEntry::Address { flags, rules } => {
                    let rule = |rule: &lb_common::abi::PortRule| DesiredRule {
                        ports: ports(rule),
                        protocol: rule.protocol as u8,
                        lead: lead(rule.target),
                    };
                    DesiredVip::Address { flags: *flags, rules: rules.iter().map(rule).collect() }
                }
            };
            (*key, entry)
        })
        .collect();
    read
}

/// A table at rest, of which `log2_length` says how long its content is.
fn read_table(image: &Image, word: TableWord, log2_length: Option<u32>) -> DesiredTable {
    let log2_length = log2_length.unwrap_or(word.log2_length()).min(word.log2_length());
    let copies = 1 << (word.log2_length() - log2_length);
    let first = word.first_row() * SLOTS_PER_ROW;
    let slots: Vec<Slot> = (first..first + word.length()).map(|index| image.slot(index)).collect();
    let pins_all = word.discipline().pins_all();
    let content: Vec<Slot> = slots
        .chunks(copies)
        .map(|slots| {
            assert!(slots.iter().all(|slot| *slot == slots[0]), "parts of one slot differ");
            assert!(if pins_all { slots[0].dirty() && slots[0].pins() } else { slots[0].is_clean() });
            slots[0]
        })
        .collect();
    let target = |id| match id {
        BACKEND_NOBODY => Target::Nobody,
        BACKEND_PASS => Target::Pass,
        id => Target::Backend(image.backends[usize::from(id)].identity),
    };
    DesiredTable {
        log2_length,
        cur: content.iter().map(|slot| target(slot.cur())).collect(),
        est: pins_all.then(|| content.iter().map(|slot| target(slot.est())).collect()),
        discipline: word.discipline(),
        pools: Vec::new(),
        pool_set: [0; 3],
        idle: Duration::ZERO,
        protocol: 0,
    }
}

/// Every service target that packets find.
fn service_targets(image: &Image) -> Vec<VipTarget> {
    let of_entry = |entry| match entry {
        VipEntry::Service(target) => vec![target],
        VipEntry::Address { rules, .. } => rules.iter().map(|rule| rule.target).collect(),
    };
    present_vips(image).into_values().flat_map(of_entry).collect()
}

/// Rows of buckets that a word names.
fn bucket_rows(word: VipWord) -> std::ops::Range<u32> {
    word.first_row()..word.first_row() + (1 << word.log2_buckets())
}

/// Targets of the entries that mark addresses and prefixes of a family, as they lie in the buckets that a word names.
fn marks(image: &Image, ipv4: bool, word: VipWord) -> Vec<(PortKey, VipTarget)> {
    let rows = bucket_rows(word).map(|row| row as usize);
    let entries: Vec<_> = match ipv4 {
        true => rows.flat_map(|row| image.vips4[row].0).map(|vip| (vip.key, vip.target)).collect(),
        false => rows.flat_map(|row| image.vips6[row].0).map(|vip| (vip.key, vip.target)).collect(),
    };
    entries.into_iter().filter(|(key, _)| key.is_address()).collect()
}

fn lengths(word: PrefixLengths) -> BTreeSet<u32> {
    (0..PrefixLengths::ROOM).map(|index| word.get(index)).filter(|length| *length != 0).collect()
}

/// Slots that tables take, by table.
fn regions(image: &Image) -> Vec<std::ops::Range<u32>> {
    let words = image
        .tables
        .iter()
        .map(|&bits| TableWord::from_bits(bits))
        .filter(|word| *word != TableWord::default());
    words
        .map(|word| word.first_row() * SLOTS_PER_ROW..word.first_row() * SLOTS_PER_ROW + word.length())
        .collect()
}

fn ids_of(slot: Slot) -> [u16; 2] {
    [slot.cur(), slot.est()]
}

/// What program runs that began before the last grace may still read: rows that were reachable at
/// some moment since. Writing any of them but by a single store misleads such a run.
#[derive(Default)]
struct Readable {
    slots: Vec<std::ops::Range<u32>>,
    backends: HashSet<u16>,
    egress: HashSet<u16>,
    buckets4: HashSet<u32>,
    buckets6: HashSet<u32>,
    rules: HashSet<u32>,
    /// Lengths that every run has, whenever it read the word: IPv4's, IPv6's.
    lengths: Option<[BTreeSet<u32>; 2]>,
}

impl Readable {
    /// What a packet that comes in now can reach.
    fn of(image: &Image) -> Self {
        let mut readable = Self::default();
        readable.note(image);
        readable
    }

    fn note_slots(&mut self, words: &[u32], image: &Image) {
        self.backends.extend(words.iter().flat_map(|&word| ids_of(Slot::from_bits(word))));
        self.note_ways_out(image);
    }

    fn note_ways_out(&mut self, image: &Image) {
        for &id in &self.backends {
            let egress = Path::from_bits(image.backends[usize::from(id)].path).egress();
            if egress != 0 {
                self.egress.insert(egress);
            }
        }
    }

    /// Adds what a packet that comes in now can reach.
    fn note(&mut self, image: &Image) {
        let tables: BTreeSet<u16> = service_targets(image).into_iter().map(VipTarget::table).collect();
        for table in tables {
            let word = TableWord::from_bits(image.tables[usize::from(table)]);
            let first = word.first_row() * SLOTS_PER_ROW;
            let region = first..first + word.length();
            let mut last = [BACKEND_NOBODY; 2];
            for index in region.clone() {
                let ids = ids_of(image.slot(index));
                if ids != last {
                    last = ids;
                    self.backends.extend(ids);
                }
            }
            if !self.slots.contains(&region) {
                self.slots.push(region);
            }
        }
        self.note_ways_out(image);
        self.buckets4.extend(bucket_rows(image.vip_word4()));
        self.buckets6.extend(bucket_rows(image.vip_word6()));
        for (ipv4, word) in [(true, image.vip_word4()), (false, image.vip_word6())] {
            for (_, target) in marks(image, ipv4, word) {
                let rules = target.first_rule()..target.first_rule() + target.rules();
                self.rules.extend(rules.map(|rule| rule / RULES_PER_ROW));
            }
        }
        let now = [lengths(image.prefix_lengths4()), lengths(image.prefix_lengths6())];
        self.lengths = Some(match self.lengths.take() {
            None => now,
            Some([v4, v6]) => [&v4 & &now[0], &v6 & &now[1]],
        });
    }

    /// Prefixes that the word brings and that a run under way would not look for.
    fn unknown_length(&self, image: &Image, ipv4: bool, word: VipWord) -> Option<String> {
        let known = &self.lengths.as_ref()?[usize::from(!ipv4)];
        let mut brought = marks(image, ipv4, word).into_iter().filter_map(|(key, _)| key.prefix_length());
        brought.find(|length| !known.contains(length)).map(|length| format!("nobody looks for /{length}"))
    }

    /// Why a run that is under way would be misled by the operation.
    fn objection(&self, image: &Image, op: &MapOp) -> Option<String> {
        match op {
            MapOp::WriteEgress { row, .. } => {
                self.egress.contains(row).then(|| format!("egress row {row} is in use"))
            }
            MapOp::WriteBackend { id, .. } => {
                self.backends.contains(id).then(|| format!("backend row {id} is in use"))
            }
            MapOp::WriteSlots { first, words } => {
                let written = *first..*first + words.len() as u32;
                // In a live table each slot changes by one store; a place that was left may not change.
                let live = regions(image);
                let stale = self.slots.iter().filter(|region| !live.contains(region));
                let hit = stale
                    .into_iter()
                    .find(|region| region.start < written.end && written.start < region.end)?;
                Some(format!("slots {written:?} were those of a table ({hit:?}) a moment ago"))
            }
            MapOp::WriteVips4 { row, buckets } => {
                let hit = (*row..*row + buckets.len() as u32).find(|row| self.buckets4.contains(row));
                hit.map(|row| format!("IPv4 bucket {row} is in use"))
            }
            MapOp::WriteVips6 { row, buckets } => {
                let hit = (*row..*row + buckets.len() as u32).find(|row| self.buckets6.contains(row));
                hit.map(|row| format!("IPv6 bucket {row} is in use"))
            }
            MapOp::WriteRules { row, rules } => {
                let hit = (*row..*row + rules.len() as u32).find(|row| self.rules.contains(row));
                hit.map(|row| format!("rule row {row} is in use"))
            }
            MapOp::SetVipWord4 { word } => self.unknown_length(image, true, *word),
            MapOp::SetVipWord6 { word } => self.unknown_length(image, false, *word),
            MapOp::SetPrefixLengths4 { lengths: word } => {
                let live = marks(image, true, image.vip_word4());
                let gone = live.iter().filter_map(|(key, _)| key.prefix_length());
                gone.into_iter().find(|l| !lengths(*word).contains(l)).map(|l| format!("/{l} is live"))
            }
            MapOp::SetPrefixLengths6 { lengths: word } => {
                let live = marks(image, false, image.vip_word6());
                let gone = live.iter().filter_map(|(key, _)| key.prefix_length());
                gone.into_iter().find(|l| !lengths(*word).contains(l)).map(|l| format!("/{l} is live"))
            }
            MapOp::SetPath { .. }
            | MapOp::ResetBackendTraffic { .. }
            | MapOp::ResetVipTraffic { .. }
            | MapOp::WriteTableState { .. }
            | MapOp::SetTableWord { .. }
            | MapOp::SetFilterWord { .. }
            | MapOp::SetClosing { .. }
            | MapOp::SetPools { .. }
            | MapOp::ExpectFailed { .. }
            | MapOp::SetFlags { .. }
            | MapOp::DropPins { .. }
            | MapOp::SetLoadWeight { .. }
            | MapOp::SetServer { .. }
            | MapOp::RemoveServer { .. }
            | MapOp::Grace => None,
        }
    }
}

/// Packets on the way from one state to the next.
struct Probes<'d> {
    old: &'d Desired,
    next: &'d Desired,
    before: Ends<'d>,
    after: Ends<'d>,
    packets: Vec<Packet>,
}

struct Packet {
    probe: Probe,
    flow: u16,
    flags: u8,
    /// Whom it is led to in the old state and in the next; nobody where its VIP goes.
    before: Option<Lead>,
    after: Option<Lead>,
    /// The one slot that it meets, as long as nothing but slots changes.
    slot: Option<u32>,
}

impl<'d> Probes<'d> {
    fn of(old: &'d Desired, next: &'d Desired, flows: &[u16]) -> Self {
        let (before, after) = (Ends::of(old), Ends::of(next));
        let mut packets = Vec::new();
        for probe in &before.probes() | &after.probes() {
            let (before, after) = (before.lead(&probe), after.lead(&probe));
            if before.is_none() {
                continue;
            }
            let flows = if after.is_none() { &flows[..1] } else { flows };
            for (flow, flags) in flows.iter().flat_map(|&flow| SAYS.map(|flags| (flow, flags))) {
                packets.push(Packet { probe, flow, flags, before, after, slot: None });
            }
        }
        Self { old, next, before, after, packets }
    }

    /// What is wrong with where packets end. Those that meet another slot than the operation wrote end as before.
    fn look(&mut self, image: &Image, op: &MapOp) -> Result<(), String> {
        let mut packets = std::mem::take(&mut self.packets);
        for packet in &mut packets {
            if let (MapOp::WriteSlots { first, words }, Some(slot)) = (op, packet.slot)
                && !(*first..*first + words.len() as u32).contains(&slot)
            {
                continue;
            }
            let end = send(image, &packet.probe, packet.flow, packet.flags);
            packet.slot = end.slot;
            let judged = match packet.after {
                None => self.leaves(packet, &end),
                Some(_) => self.stays(packet, &end, image),
            };
            judged.map_err(|wrong| format!("{:?} {wrong}", packet.probe))?;
        }
        self.packets = packets;
        Ok(())
    }

    /// Of the old state or of the next one: a new flow's slot says where new ones go, an old one's where it was.
    fn stays(&self, packet: &Packet, end: &End, image: &Image) -> Result<(), String> {
        let Packet { before, after, .. } = *packet;
        let ends = |state, targets: Option<&BTreeSet<Target>>| {
            targets.is_some_and(|targets| is_right(state, targets, end.outcome, end.took))
        };
        // A VIP that changes its pool meets, for a moment, the new members of the old one.
        let moved = before != after;
        let at_the_old_one = self.after.targets(before);
        let lost = end.outcome == Outcome::DropUnresolved && self.loses_its_way(packet);
        let right = ends(self.old, self.before.targets(before))
            || ends(self.next, self.after.targets(after))
            || moved && ends(self.next, at_the_old_one)
            || end.took.is_some_and(|row| self.next.backends.contains_key(&row.identity) && moved);
        if !right && !lost {
            return Err(format!("ends as {:?}", end.outcome));
        }
        let Some(row) = end.took else { return Ok(()) };
        let path = Path::from_bits(row.path);
        let egress = &image.egress[usize::from(path.egress())];
        let knows = |state| knows_next_hop(state, &row, path, egress);
        if lost || knows(self.old) || knows(self.next) {
            Ok(())
        } else {
            Err("goes a way that nobody told".into())
        }
    }

    /// Whether old flows may be where no way leads any more.
    fn loses_its_way(&self, packet: &Packet) -> bool {
        let lost = |target: &Target| match target {
            Target::Backend(identity) => {
                self.next.backends.get(identity).is_some_and(|backend| backend.next_hop.is_none())
            }
            Target::Nobody | Target::Pass => false,
        };
        self.before.targets(packet.before).is_some_and(|targets| targets.iter().any(lost))
    }

    fn leaves(&self, packet: &Packet, end: &End) -> Result<(), String> {
        let gone = matches!(
            end.outcome,
            Outcome::PassNotVip
                | Outcome::DropVipPort
                | Outcome::DropVipFragment
                | Outcome::PassVipUnmapped
                | Outcome::AnswerUnreachable
        );
        // Its table may have the new state's slots already, in which nobody is up.
        let nobody = matches!(end.outcome, Outcome::DropNoBackend | Outcome::PassNoBackend);
        let targets = self.before.targets(packet.before);
        let as_before = targets.is_some_and(|targets| is_right(self.old, targets, end.outcome, end.took));
        let lost = end.outcome == Outcome::DropUnresolved && self.loses_its_way(packet);
        let fine = gone || nobody || as_before || lost || end.took.is_some();
        if fine { Ok(()) } else { Err(format!("ends as {:?}", end.outcome)) }
    }
}

fn planned(image: &Image, desired: &Desired) -> Result<Vec<MapOp>, TestCaseError> {
    plan_at_once(image, desired, &capacity())
        .map_err(|error| TestCaseError::fail(format!("refused: {error}")))
}

/// What the agent does next where flows of before have been silent for long and no pin is left: `est` follows, `P` goes,
/// then what rested is free. Nothing where all is as desired.
fn settling(image: &Image, desired: &Desired) -> Result<Vec<MapOp>, TestCaseError> {
    let mut ops = finishing(image, desired);
    if ops.is_empty() {
        ops = clearing(image);
    }
    if ops.is_empty() {
        ops = planned(image, desired)?;
    }
    Ok(ops)
}

/// Goes on until all is as desired.
fn settle(image: &mut Image, desired: &Desired) -> Result<(), TestCaseError> {
    for _ in 0..10 {
        let ops = settling(image, desired)?;
        if ops.is_empty() {
            return Ok(());
        }
        ops.iter().for_each(|op| image.apply(op));
    }
    Err(TestCaseError::fail("never at rest"))
}

/// Lets `est` follow in every table.
fn finishing(image: &Image, desired: &Desired) -> Vec<MapOp> {
    let begin = Instant::now();
    let mut moves = Moves::new(begin);
    moves.observe(image, begin);
    let ids = image.ids();
    let due = moves.due(image, begin + SLACK * 2, |table| Course::of(desired, image, &ids, table));
    due.into_iter().flat_map(|(_, ops)| ops).collect()
}

/// Takes `P` off every slot that is not on the move.
fn clearing(image: &Image) -> Vec<MapOp> {
    let words = image.tables.iter().map(|&bits| TableWord::from_bits(bits));
    let hash = words.filter(|word| *word != TableWord::default() && !word.discipline().pins_all());
    let places = hash.flat_map(|word| {
        let first = word.first_row() * SLOTS_PER_ROW;
        first..first + word.length()
    });
    let slots = places.map(|index| (index, image.slot(index)));
    let held = slots.filter(|(_, slot)| slot.pins() && !slot.dirty());
    runs(held.map(|(index, slot)| (index, Slot::clean(slot.cur()).bits())))
}

/// Where the tables are not as desired, in few words.
fn difference(image: &Image, desired: &Desired) -> String {
    let read = read_back(image, desired);
    let mut text = String::new();
    if read.backends != desired.backends {
        text += &format!("backends: {:?} instead of {:?}\n", read.backends, desired.backends);
    }
    if read.vips != desired.vips {
        text += &format!("vips: {:?} instead of {:?}\n", read.vips, desired.vips);
    }
    for identity in read.tables.keys().chain(desired.tables.keys()).collect::<BTreeSet<_>>() {
        let (read, wanted) = (read.tables.get(identity), desired.tables.get(identity));
        let cur = |table: Option<&DesiredTable>| table.map(|table| table.cur.clone()).unwrap_or_default();
        let (read_cur, wanted_cur) = (cur(read), cur(wanted));
        let differ = read_cur.iter().zip(&wanted_cur).filter(|(read, wanted)| read != wanted).count();
        if read != wanted {
            text += &format!(
                "table {identity:x}: {} slots instead of {}, {differ} differ\n",
                read_cur.len(),
                wanted_cur.len()
            );
        }
    }
    text
}

/// Balancer tables under a sequence of states.
struct Run {
    image: Image,
    state: Desired,
    readable: Readable,
}

impl Run {
    fn new() -> Self {
        let image = fresh();
        let readable = Readable::of(&image);
        Self { image, state: Desired::default(), readable }
    }

    /// Goes to the next state, looking at packets after every operation: first those of the plan, then, as if all flows
    /// had been silent for long, those that let `est` follow and free what rests.
    fn step(&mut self, next: Desired, flows: &[u16]) -> Result<(), TestCaseError> {
        let old = std::mem::take(&mut self.state);
        let ids_before = self.image.ids();
        let mut probes = Probes::of(&old, &next, flows);
        let mut all = Vec::new();
        let mut ops = planned(&self.image, &next)?;
        let mut rounds = 0;
        while !ops.is_empty() {
            self.carry_out(&ops, &mut probes)?;
            all.append(&mut ops);
            ops = settling(&self.image, &next)?;
            rounds += 1;
            prop_assert!(rounds < 10, "never at rest");
        }
        prop_assert!(read_back(&self.image, &next) == next, "{}", difference(&self.image, &next));
        prop_assert_eq!(planned(&self.image, &next)?, [], "planned twice");
        self.ids_stay(&ids_before, &next, &all)?;
        self.nothing_overlaps()?;
        self.state = next;
        Ok(())
    }

    fn carry_out(&mut self, ops: &[MapOp], probes: &mut Probes<'_>) -> Result<(), TestCaseError> {
        for (number, op) in ops.iter().enumerate() {
            let place = || format!("op {number} of {}, {}", ops.len(), brief(op));
            let objection = self.readable.objection(&self.image, op);
            prop_assert!(objection.is_none(), "{}: {}", place(), objection.unwrap());
            self.image.apply(op);
            match op {
                MapOp::Grace => self.readable = Readable::of(&self.image),
                // Of a live table or of none: `note` sees the latter when a word makes it live.
                MapOp::WriteSlots { words, .. } => self.readable.note_slots(words, &self.image),
                // What packets can reach is the same.
                MapOp::SetFlags { .. }
                | MapOp::SetClosing { .. }
                | MapOp::ExpectFailed { .. }
                | MapOp::DropPins { .. }
                | MapOp::SetLoadWeight { .. }
                | MapOp::ResetBackendTraffic { .. }
                | MapOp::ResetVipTraffic { .. } => {}
                _ => self.readable.note(&self.image),
            }
            let seen = probes.look(&self.image, op);
            seen.map_err(|wrong| TestCaseError::fail(format!("after {}: {wrong}", place())))?;
        }
        Ok(())
    }

    fn ids_stay(
        &self,
        before: &HashMap<u64, u16>,
        next: &Desired,
        ops: &[MapOp],
    ) -> Result<(), TestCaseError> {
        let now = self.image.ids();
        for (identity, id) in before {
            if next.backends.contains_key(identity) {
                prop_assert_eq!(now.get(identity), Some(id), "the id of an unchanged backend");
            }
        }
        let freed: HashSet<u16> = before
            .iter()
            .filter(|(identity, _)| !next.backends.contains_key(identity))
            .map(|(_, id)| *id)
            .collect();
        for op in ops {
            if let MapOp::WriteBackend { id, backend } = op {
                prop_assert!(
                    *backend == BackendRow::default() || !freed.contains(id),
                    "id {} is given away while it rests",
                    id
                );
            }
        }
        Ok(())
    }

    fn nothing_overlaps(&self) -> Result<(), TestCaseError> {
        let mut regions = regions(&self.image);
        regions.sort_by_key(|region| region.start);
        for pair in regions.windows(2) {
            prop_assert!(pair[0].end <= pair[1].start, "{:?} overlap", pair);
        }
        for region in regions {
            for index in region.step_by(97) {
                for id in ids_of(self.image.slot(index)) {
                    let row = &self.image.backends[usize::from(id)];
                    prop_assert!(
                        id == BACKEND_NOBODY || id == BACKEND_PASS || row.identity != 0,
                        "slot {} names a free id",
                        index
                    );
                }
            }
        }
        let rows = counter_rows(&present_vips(&self.image));
        let different: HashSet<u32> = rows.values().copied().collect();
        prop_assert_eq!(different.len(), rows.len(), "two VIPs share counters");
        for target in service_targets(&self.image) {
            prop_assert!(different.contains(&target.vip()), "what is counted in row {}?", target.vip());
        }
        Ok(())
    }
}

fn brief(op: &MapOp) -> String {
    let text = format!("{op:?}");
    text.chars().take(120).collect()
}

// ---- Random changes ------------------------------------------------------------------------------

#[derive(Debug, Clone)]
enum Change {
    AddPool(u8, u8, Forward, u8),
    RemovePool(u8),
    RenamePool(u8, u8),
    OnEmpty(u8, u8),
    AddBackends(u8, u16, u8),
    RemoveBackends(u8, u8),
    Weight(u8, u8, u8),
    Flip(u8, u8),
    FlipAll(u8, bool),
    Hop(u16, Option<(u32, u16, u8)>),
    /// Every hop of an interface becomes another, as when a gateway or an MTU changes.
    AllHops(Option<(u32, u16, u8)>),
    AddService(u8, u8, BTreeSet<u8>, BTreeSet<u16>, bool, Kind),
    RemoveService(u8),
    /// The service goes to another pool.
    MoveService(u8, u8),
    /// To 41 backends, over a length class, or back to 40.
    Class(u8, bool),
}

fn change() -> impl Strategy<Value = Change> {
    let hop = || prop::option::weighted(0.8, (1u32..4, prop::sample::select(vec![1280u16, 1500]), 1u8..4));
    let small = 0u8..5;
    let gue = [6080, 7000].map(|port| Forward::Gue { port });
    let way = prop::sample::select([&[Forward::Ipip, Forward::L2][..], &gue].concat());
    let weight = prop::sample::select(vec![0u8, 1, 50, 100]);
    let vips = prop::collection::btree_set(0u8..12, 1..4);
    let ports = prop::collection::btree_set(1u16..5, 0..3);
    prop_oneof![
        2 => (small.clone(), 1u8..6, way, 0u8..3)
            .prop_map(|(p, n, way, e)| Change::AddPool(p, n, way, e)),
        1 => small.clone().prop_map(Change::RemovePool),
        1 => (small.clone(), 0u8..10).prop_map(|(p, n)| Change::RenamePool(p, n)),
        1 => (small.clone(), 0u8..3).prop_map(|(p, e)| Change::OnEmpty(p, e)),
        3 => (small.clone(), 0u16..300, 1u8..4).prop_map(|(p, h, n)| Change::AddBackends(p, h, n)),
        2 => (small.clone(), 1u8..4).prop_map(|(p, n)| Change::RemoveBackends(p, n)),
        2 => (small.clone(), 0u8..8, weight).prop_map(|(p, b, w)| Change::Weight(p, b, w)),
        4 => (small.clone(), 0u8..8).prop_map(|(p, b)| Change::Flip(p, b)),
        1 => (small.clone(), any::<bool>()).prop_map(|(p, up)| Change::FlipAll(p, up)),
        3 => (0u16..300, hop()).prop_map(|(host, hop)| Change::Hop(host, hop)),
        1 => hop().prop_map(Change::AllHops),
        4 => (small.clone(), small.clone(), vips, ports, any::<bool>(), kind())
            .prop_map(|(s, p, v, ports, both, kind)| Change::AddService(s, p, v, ports, both, kind)),
        1 => small.clone().prop_map(Change::RemoveService),
        2 => (small.clone(), small.clone()).prop_map(|(s, p)| Change::MoveService(s, p)),
        1 => (small, any::<bool>()).prop_map(|(p, grow)| Change::Class(p, grow)),
    ]
}

fn kind() -> impl Strategy<Value = Kind> {
    let unmapped = prop::sample::select(vec![None, Some(Unmapped::Pass), Some(Unmapped::Reject)]);
    let schedulers = [Scheduler::Maglev, Scheduler::SourceHash, Scheduler::WeightedRoundRobin];
    (any::<bool>(), any::<bool>(), prop::sample::select(schedulers.to_vec()), unmapped)
        .prop_map(|(range, any, scheduler, unmapped)| Kind { range, any, scheduler, unmapped })
}

fn on_empty(number: u8) -> OnEmpty {
    [OnEmpty::Drop, OnEmpty::Pass, OnEmpty::All][usize::from(number % 3)]
}

fn apply(state: &mut State, change: &Change) {
    match change {
        Change::AddPool(pool, backends, forward, empty) => {
            state.pools.entry(*pool).or_insert_with(|| PoolState {
                name: *pool,
                forward: *forward,
                on_empty: on_empty(*empty),
                backends: (0..u16::from(*backends))
                    .map(|host| (u16::from(*pool) * 50 + host, (100, true)))
                    .collect(),
            });
        }
        Change::RemovePool(pool) => {
            state.pools.remove(pool);
            state.services.retain(|_, service| service.pool != *pool);
        }
        Change::RenamePool(pool, name) => {
            let taken = state.pools.values().any(|pool| pool.name == *name);
            if let (Some(pool), false) = (state.pools.get_mut(pool), taken) {
                pool.name = *name;
            }
        }
        Change::OnEmpty(pool, empty) => {
            if let Some(pool) = state.pools.get_mut(pool) {
                pool.on_empty = on_empty(*empty);
            }
        }
        Change::AddBackends(pool, first, count) => {
            if let Some(pool) = state.pools.get_mut(pool) {
                (0..u16::from(*count))
                    .for_each(|i| _ = pool.backends.entry(first + i).or_insert((100, true)));
            }
        }
        Change::RemoveBackends(pool, count) => {
            if let Some(pool) = state.pools.get_mut(pool) {
                (0..*count).for_each(|_| _ = pool.backends.pop_first());
            }
        }
        Change::Weight(pool, backend, weight) => {
            if let Some(backend) = nth(state, *pool, *backend) {
                backend.0 = *weight;
            }
        }
        Change::Flip(pool, backend) => {
            if let Some(backend) = nth(state, *pool, *backend) {
                backend.1 = !backend.1;
            }
        }
        Change::FlipAll(pool, up) => {
            if let Some(pool) = state.pools.get_mut(pool) {
                pool.backends.values_mut().for_each(|backend| backend.1 = *up);
            }
        }
        Change::Hop(host, hop) => _ = state.hops.insert(*host, *hop),
        Change::AllHops(hop) => {
            let hosts: Vec<u16> =
                state.pools.values().flat_map(|pool| pool.backends.keys().copied()).collect();
            state.hops.extend(hosts.into_iter().map(|host| (host, *hop)));
        }
        Change::AddService(service, pool, vips, ports, both, kind) => {
            let protocols = if *both { vec![Protocol::Tcp, Protocol::Udp] } else { vec![Protocol::Tcp] };
            if state.pools.contains_key(pool) {
                let (vips, ports) = (vips.clone(), ports.clone());
                let new = ServiceState { pool: *pool, vips, ports, protocols, kind: *kind };
                state.services.insert(*service, new);
            }
        }
        Change::RemoveService(service) => _ = state.services.remove(service),
        Change::MoveService(service, pool) => {
            if let (Some(service), true) = (state.services.get_mut(service), state.pools.contains_key(pool)) {
                service.pool = *pool;
            }
        }
        Change::Class(pool, grow) => {
            if let Some(pool) = state.pools.get_mut(pool) {
                let want = if *grow { 41 } else { 40 };
                let mut host = 1000;
                while pool.backends.len() < want {
                    pool.backends.insert(host, (100, true));
                    host += 1;
                }
                while pool.backends.len() > want {
                    pool.backends.pop_last();
                }
            }
        }
    }
}

fn nth(state: &mut State, pool: u8, backend: u8) -> Option<&mut (u8, bool)> {
    let pool = state.pools.get_mut(&pool)?;
    let count = pool.backends.len();
    pool.backends.values_mut().nth(usize::from(backend) % count.max(1))
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: cases(32),
        failure_persistence: None,
        max_shrink_iters: 500,
        ..ProptestConfig::default()
    })]

    /// Several changes may come at once, as they do in a configuration that is read again. Few tables are whole.
    #[test]
    fn every_operation_of_every_plan_leaves_packets_with_a_backend_of_the_old_or_the_new_state(
        steps in prop::collection::vec(prop::collection::vec(change(), 1..6), 1..14),
        flows in prop::collection::vec(0u16..50_000, 3),
        whole in prop::bool::weighted(0.1),
    ) {
        let wanted = |state: &State| if whole { state.desired() } else { thinned(state.desired()) };
        let mut run = Run::new();
        let mut state = State::empty();
        // Something to begin with.
        apply(&mut state, &Change::AddPool(0, 4, Forward::Ipip, 0));
        let service = Change::AddService(0, 0, BTreeSet::from([0, 1]), BTreeSet::from([1, 2]), true, PLAIN);
        apply(&mut state, &service);
        run.step(wanted(&state), &flows)?;
        for changes in &steps {
            changes.iter().for_each(|change| apply(&mut state, change));
            run.step(wanted(&state), &flows)?;
        }
        run.step(Desired::default(), &flows)?;
        prop_assert_eq!(run.image.backends, fresh().backends, "nothing is left of the backends");
        prop_assert_eq!(run.image.egress, fresh().egress, "nothing is left of the ways out");
        prop_assert_eq!((run.image.tables, run.image.vip_words), (fresh().tables, fresh().vip_words));
    }

    /// A write that fails, or an agent that dies, may stop a plan anywhere.
    #[test]
    fn a_plan_that_breaks_off_anywhere_is_completed_by_the_next(
        steps in prop::collection::vec(
            (prop::collection::vec(change(), 1..6), any::<prop::sample::Index>()),
            1..8,
        ),
    ) {
        let mut image = fresh();
        let mut state = State::empty();
        for (changes, stop) in &steps {
            changes.iter().for_each(|change| apply(&mut state, change));
            let next = thinned(state.desired());
            let Ok(ops) = plan_at_once(&image, &next, &capacity()) else { continue };
            ops[..stop.index(ops.len() + 1)].iter().for_each(|op| image.apply(op));
            // Another state comes before the first was reached, or the same is planned again.
            if stop.index(2) == 0 {
                let again = plan_at_once(&image, &next, &capacity());
                prop_assert!(again.is_ok(), "{:?}", again);
                again.unwrap().iter().for_each(|op| image.apply(op));
                settle(&mut image, &next)?;
                prop_assert!(read_back(&image, &next) == next, "{}", difference(&image, &next));
            }
        }
    }
}

// ---- Single promises -----------------------------------------------------------------------------

/// One service on one VIP and a pool of so many backends.
fn simple(backends: u16) -> State {
    let mut state = State::empty();
    let backends = (0..backends).map(|host| (host * 2, (100, true))).collect();
    let pool = PoolState { name: 0, forward: Forward::Ipip, on_empty: OnEmpty::Drop, backends };
    state.pools.insert(0, pool);
    let (vips, ports) = (BTreeSet::from([0]), BTreeSet::from([1]));
    let service = ServiceState { pool: 0, vips, ports, protocols: vec![Protocol::Tcp], kind: PLAIN };
    state.services.insert(0, service);
    state
}

fn applied(image: &mut Image, state: &State) -> Vec<MapOp> {
    let ops = plan_at_once(image, &state.desired(), &capacity()).expect("within the limits");
    ops.iter().for_each(|op| image.apply(op));
    ops
}

/// Applied, and all flows of before are silent.
fn settled(image: &mut Image, state: &State) {
    applied(image, state);
    settle(image, &state.desired()).unwrap_or_else(|error| panic!("{error}"));
}

fn only_vip(state: &State) -> Probe {
    *Ends::of(&state.desired()).probes().first().expect("a VIP")
}

/// Slot words of the one table.
fn words(image: &Image) -> Vec<Slot> {
    regions(image).into_iter().next().expect("a table").map(|index| image.slot(index)).collect()
}

fn identity_in_first_pool(state: &State, address: IpAddr) -> u64 {
    let pool = &state.config().pools[0];
    backend_identity(&pool.name, pool.forward, address)
}

/// Slots of a table that takes turns are never clean: its copy is given up all the same.
#[test]
fn a_service_that_goes_to_a_pool_in_turns_shares_its_table_once_old_flows_are_silent() {
    let (mut image, mut state) = (fresh(), simple(4));
    applied(&mut image, &state);
    apply(&mut state, &Change::AddPool(2, 1, Forward::Ipip, 0));
    let turns = Kind { scheduler: Scheduler::WeightedRoundRobin, ..PLAIN };
    let vips = BTreeSet::from([0, 2]);
    apply(&mut state, &Change::AddService(0, 2, vips, BTreeSet::from([1]), false, turns));
    applied(&mut image, &state);
    assert_eq!(image.tables.iter().filter(|word| **word != 0).count(), 2, "old flows are of one VIP alone");
    settled(&mut image, &state);
    assert!(
        read_back(&image, &state.desired()) == state.desired(),
        "{}",
        difference(&image, &state.desired())
    );
}

#[test]
fn losing_one_of_n_changes_its_slots_and_nothing_else() {
    for n in [2, 3, 7, 40, 41] {
        let mut state = simple(n);
        let mut image = fresh();
        applied(&mut image, &state);
        let before = words(&image);
        let identity = identity_in_first_pool(&state, backend_address(2));
        let dead = image.ids()[&identity];
        state.pools.get_mut(&0).unwrap().backends.get_mut(&2).unwrap().1 = false;
        let ops = applied(&mut image, &state);
        let (flags, slots) = ops.split_first().expect("something changes");
        assert_eq!(*flags, MapOp::SetFlags { id: dead, flags: 0 }, "{n}");
        assert!(slots.iter().all(|op| matches!(op, MapOp::WriteSlots { .. })), "{n}: {slots:?}");
        let written: usize =
            ops.iter().map(|op| if let MapOp::WriteSlots { words, .. } = op { words.len() } else { 0 }).sum();
        let after = words(&image);
        let lost = before.iter().filter(|slot| slot.cur() == dead).count();
        assert_eq!(written, lost, "{n}: slots written");
        for (old, new) in before.iter().zip(&after) {
            if old.cur() == dead {
                assert_eq!((new.est(), new.dirty()), (dead, true), "{n}: its flows stay");
                assert_ne!(new.cur(), dead, "{n}: new ones go elsewhere");
            } else {
                assert_eq!(old, new, "{n}");
            }
        }
        state.pools.get_mut(&0).unwrap().backends.get_mut(&2).unwrap().1 = true;
        applied(&mut image, &state);
        let back = words(&image);
        assert!(back.iter().all(|slot| !slot.dirty()), "{n}: back where the old flows are");
        settled(&mut image, &state);
        assert_eq!(words(&image), before, "{n}: healing brings exactly those back");
    }
}

#[test]
fn the_id_of_a_backend_that_left_rests_until_nothing_names_it() {
    let mut state = simple(5);
    let mut image = fresh();
    applied(&mut image, &state);
    let id_of = |image: &Image, state: &State, host| {
        image.ids().get(&identity_in_first_pool(state, backend_address(host))).copied()
    };
    let gone = id_of(&image, &state, 4).expect("a row");
    let pool = state.pools.get_mut(&0).unwrap();
    pool.backends.remove(&4);
    pool.backends.insert(100, (100, true));
    applied(&mut image, &state);
    assert_ne!(id_of(&image, &state, 100), Some(gone), "its slots have their old flows there");
    assert_eq!(id_of(&image, &state, 4), Some(gone), "the row is the reservation");
    let wanted = state.desired();
    finishing(&image, &wanted).iter().for_each(|op| image.apply(op));
    assert!(words(&image).iter().all(|slot| !ids_of(*slot).contains(&gone)));
    let pinned = Leave { unpinned: Unpinned::Ids(HashSet::new()), moves: usize::MAX };
    let ops = plan(&image, &wanted, &capacity(), &pinned).expect("within the limits").ops;
    assert_eq!(ops, [], "a pin may name it");
    let unpinned = Leave { unpinned: Unpinned::Ids(HashSet::from([gone])), ..pinned };
    let ops = plan(&image, &wanted, &capacity(), &unpinned).expect("within the limits").ops;
    let free = MapOp::WriteBackend { id: gone, backend: BackendRow::default() };
    assert_eq!(ops, [MapOp::Grace, free], "nothing names it");
    ops.iter().for_each(|op| image.apply(op));
    state.pools.get_mut(&0).unwrap().backends.insert(102, (100, true));
    applied(&mut image, &state);
    assert_eq!(id_of(&image, &state, 102), Some(gone), "given away again");
}

#[test]
fn a_table_that_crosses_a_length_class_moves_whole_and_its_old_place_rests_for_a_grace() {
    let mut image = fresh();
    let mut state = simple(40);
    applied(&mut image, &state);
    let (short, before) = (regions(&image), words(&image));
    state.pools.get_mut(&0).unwrap().backends.insert(1000, (100, true));
    let ops = applied(&mut image, &state);
    let moved = ops.iter().position(|op| matches!(op, MapOp::SetTableWord { .. })).expect("a new place");
    assert_eq!(ops[moved + 1], MapOp::Grace, "whoever read the old word goes by the old slots");
    assert_eq!(
        *ops.last().unwrap(),
        MapOp::Grace,
        "whoever read the old word must be done before the place is used again"
    );
    let after = words(&image);
    assert_eq!(after.len(), 1 << 14);
    assert!(
        after.iter().enumerate().all(|(index, slot)| slot.est() == before[index / 4].est()),
        "flows stay"
    );
    assert!(!regions(&image).contains(&short[0]));
    settled(&mut image, &state);
    state.pools.get_mut(&0).unwrap().backends.remove(&1000);
    settled(&mut image, &state);
    assert_eq!(words(&image).len(), 1 << 14, "what has grown stays");
    assert!(words(&image).iter().enumerate().all(|(index, slot)| *slot == before[index / 4]), "as before");
}

#[test]
fn the_place_that_a_table_left_is_filled_anew_only_when_nobody_reads_it() {
    let mut run = Run::new();
    let mut state = simple(40);
    let mut step =
        |state: &State| run.step(state.desired(), &[1, 2, 3]).unwrap_or_else(|error| panic!("{error}"));
    step(&state);
    state.pools.get_mut(&0).unwrap().backends.insert(1000, (100, true));
    step(&state);
    // The next plan begins with a table that fits the old place.
    apply(&mut state, &Change::AddPool(1, 3, Forward::Ipip, 0));
    apply(&mut state, &Change::AddService(1, 1, BTreeSet::from([0]), BTreeSet::from([1]), false, PLAIN));
    step(&state);
}

#[test]
fn a_next_hop_that_goes_takes_the_slots_away_before_the_path() {
    let mut image = fresh();
    let mut state = simple(3);
    applied(&mut image, &state);
    state.hops.insert(2, None);
    let vip = only_vip(&state);
    for op in plan_at_once(&image, &state.desired(), &capacity()).unwrap() {
        image.apply(&op);
        for flow in 0..60 {
            let outcome = send(&image, &vip, flow, SAYS[0]).outcome;
            assert_eq!(outcome.action(), Action::Transmit, "after {}: {outcome:?}", brief(&op));
        }
    }
    settled(&mut image, &state);
    assert!(read_back(&image, &state.desired()) == state.desired());
}

#[test]
fn a_next_hop_that_changes_is_one_store_and_its_old_way_out_is_cleared_after_a_grace() {
    let mut image = fresh();
    let mut state = simple(1);
    applied(&mut image, &state);
    state.hops.insert(0, Some((2, 1280, 9)));
    let ops = applied(&mut image, &state);
    let kinds: Vec<&str> = ops
        .iter()
        .map(|op| match op {
            MapOp::WriteEgress { egress, .. } if *egress == Egress::default() => "clear egress",
            MapOp::WriteEgress { .. } => "fill egress",
            MapOp::SetPath { .. } => "path",
            MapOp::Grace => "grace",
            _ => "other",
        })
        .collect();
    assert_eq!(kinds, ["fill egress", "path", "grace", "clear egress"]);
    assert_eq!(send(&image, &only_vip(&state), 1, SAYS[0]).outcome, Outcome::ForwardRedirect);
}

/// Each is refused as a whole: a plan is all or nothing.
#[test]
fn limits_are_refused_before_anything_is_planned() {
    let base = simple(3);
    assert_eq!(capacity().rule_half_rows() * RULES_PER_ROW, LIMITS.vips);
    let refused = |limits: Limits, state: &State| {
        let capacity = Capacity::new(&limits);
        let image = Image::empty(&capacity, Meta::default());
        plan_at_once(&image, &state.desired(), &capacity).err()
    };
    assert_eq!(refused(LIMITS, &base), None);
    let mut ports = base.clone();
    ports.services.get_mut(&0).unwrap().ports = (1..20).collect();
    let vips = refused(Limits { vips: 10, ..LIMITS }, &ports);
    assert_eq!(vips, Some(PlanError::Vips { needed: 19, limit: 10 }));
    let mut protocols = base.clone();
    protocols.services.get_mut(&0).unwrap().protocols = vec![Protocol::Tcp, Protocol::Udp];
    let tables = refused(Limits { slots: 1 << 12, ..LIMITS }, &protocols);
    assert_eq!(tables, Some(PlanError::Tables { needed: 2, limit: 1 }));
    let slots = refused(Limits { slots: 2 << 12, ..LIMITS }, &simple(41));
    assert_eq!(slots, Some(PlanError::Slots { slots: 1 << 14 }));
    let mut capacity = Capacity::new(&LIMITS);
    capacity.egress_rows = 2;
    let image = Image::empty(&capacity, Meta::default());
    let mut hops = base.clone();
    hops.hops.insert(2, Some((2, 1500, 1)));
    let egress = plan_at_once(&image, &hops.desired(), &capacity).err();
    assert_eq!(egress, Some(PlanError::Egress { limit: 2 }));
    let mut capacity = Capacity::new(&LIMITS);
    capacity.backend_rows = 4;
    let image = Image { backends: vec![BackendRow::default(); 4], ..fresh() };
    let backends = plan_at_once(&image, &base.desired(), &capacity).err();
    assert_eq!(backends, Some(PlanError::Backends { needed: 3, limit: MOST_BACKENDS }));
}

/// What fits the limits can be reached from everything else that fits them.
#[test]
fn vips_up_to_the_limit_can_be_replaced_by_as_many_others() {
    let limits = Limits { vips: 8, ..LIMITS };
    let capacity = Capacity::new(&limits);
    let mut image = Image::empty(&capacity, fresh().meta);
    let mut state = simple(2);
    for (first, count) in [(1u16, 8), (9, 8), (5, 8), (1, 1), (2, 8), (40, 8)] {
        state.services.get_mut(&0).unwrap().ports = (first..first + count).collect();
        let ops = plan_at_once(&image, &state.desired(), &capacity);
        let ops = ops.unwrap_or_else(|error| panic!("ports from {first}: {error}"));
        ops.iter().for_each(|op| image.apply(op));
        let rows: Vec<u32> = counter_rows(&present_vips(&image)).into_values().collect();
        let rows_of_map =
            capacity.rows().iter().find(|map| map.name == lb_common::abi::map::VIP_TRAFFIC).unwrap().rows;
        assert!(
            rows.iter().all(|&row| row < rows_of_map),
            "counters beyond the map: {rows:?} of {rows_of_map}"
        );
    }
}

#[test]
fn features_follow_what_is_configured() {
    use lb_common::abi::Features;
    let mut state = simple(1);
    assert_eq!(features(&state.config()), Features::IPV4.with(Features::IPIP4));
    state.pools.get_mut(&0).unwrap().backends.insert(1, (100, true));
    assert_eq!(features(&state.config()), Features::IPV4.with(Features::IPIP4).with(Features::IPIP6));
    state.services.get_mut(&0).unwrap().vips.insert(1);
    state.pools.get_mut(&0).unwrap().forward = Forward::L2;
    assert_eq!(features(&state.config()), Features::IPV4.with(Features::IPV6).with(Features::L2));
    state.pools.get_mut(&0).unwrap().forward = Forward::Gue { port: 6080 };
    let gue = Features::GUE4.with(Features::GUE6);
    assert_eq!(features(&state.config()), Features::IPV4.with(Features::IPV6).with(gue));
    let ways = Features::IPV4.with(Features::IPV6).with(gue);
    let service = state.services.get_mut(&0).unwrap();
    service.kind.any = true;
    let rules = ways.with(Features::PORT_RULES);
    assert_eq!(features(&state.config()), rules);
    state.services.get_mut(&0).unwrap().kind = Kind { scheduler: Scheduler::SourceHash, ..PLAIN };
    assert_eq!(features(&state.config()), ways.with(Features::SOURCE_HASH));
    let service = state.services.get_mut(&0).unwrap();
    (service.kind, service.vips) = (PLAIN, BTreeSet::from([1, 8]));
    assert_eq!(features(&state.config()), rules.with(Features::PREFIXES));
    assert_eq!(features(&State::empty().config()), Features::default());
}

#[test]
fn the_row_of_a_backend_says_all_of_its_tunnel() {
    use lb_common::abi::BackendKind;
    let gue = Forward::Gue { port: 7000 };
    let rows = [
        ("ipip over IPv4", Forward::Ipip, 0, BackendKind::Ipip4, 0, true),
        ("ipip over IPv6", Forward::Ipip, 1, BackendKind::Ipip6, 0, false),
        ("gue over IPv4", gue, 0, BackendKind::Gue4, 7000, true),
        ("gue over IPv6", gue, 1, BackendKind::Gue6, 7000, false),
        ("l2 to an IPv4 address", Forward::L2, 0, BackendKind::L2, 0, false),
        ("l2 to an IPv6 address", Forward::L2, 1, BackendKind::L2, 0, false),
    ];
    for (name, forward, host, kind, port, has_outer_sum) in rows {
        let mut state = simple(0);
        let pool = state.pools.get_mut(&0).unwrap();
        pool.forward = forward;
        pool.backends.insert(host, (100, true));
        let desired = state.desired();
        let row = desired.backends.values().next().unwrap().row;
        assert_eq!((row.kind, row.port.get(), row.overhead), (kind as u8, port, kind.overhead()), "{name}");
        assert_eq!(row.outer_sum != 0, has_outer_sum, "{name}");
        assert_eq!(forward_of(&row), Some(forward), "{name}");
    }
}

#[test]
fn another_port_of_the_tunnel_is_another_backend() {
    let mut image = fresh();
    let mut state = simple(1);
    let mut ids_met = BTreeSet::new();
    for forward in [Forward::Ipip, Forward::Gue { port: 6080 }, Forward::Gue { port: 7000 }] {
        state.pools.get_mut(&0).unwrap().forward = forward;
        settled(&mut image, &state);
        assert!(read_back(&image, &state.desired()) == state.desired(), "{forward:?}");
        let id = words(&image)[0].cur();
        assert_eq!(forward_of(&image.backends[usize::from(id)]), Some(forward));
        assert!(ids_met.insert(state.desired().backends.into_keys().next().unwrap()), "{forward:?}");
    }
}
