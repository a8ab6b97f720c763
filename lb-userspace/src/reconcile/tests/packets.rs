//! Packets, where they end, and where a state says that they may; said without the packet path.

use super::*;

/// A packet that may meet a VIP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Probe {
    pub address: IpAddr,
    pub port: u16,
    pub protocol: u8,
    /// One that is not the first.
    pub fragment: bool,
}

/// Of a flow that begins, and of one that was there before.
pub const SAYS: [u8; 2] = [wire::TcpFlags::SYN, wire::TcpFlags::ACK];

/// A segment with these flags, or a datagram.
pub fn packet(probe: &Probe, flow: u16, flags: u8) -> Vec<u8> {
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
pub struct End {
    pub outcome: Outcome,
    /// The row of the backend that took it.
    pub took: Option<BackendRow>,
    /// The slot that it met, counted over the whole map.
    pub slot: Option<u32>,
}

pub fn send(image: &Image, probe: &Probe, flow: u16, flags: u8) -> End {
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
pub struct Ends<'d> {
    pub vips: BTreeMap<(IpAddr, u32), &'d DesiredVip>,
    pub targets: BTreeMap<u64, BTreeSet<Target>>,
}

impl<'d> Ends<'d> {
    pub fn of(desired: &'d Desired) -> Self {
        let targets = |table: &DesiredTable| {
            table.cur.used().chain(table.est.iter().flat_map(Targets::used)).copied().collect()
        };
        Self {
            vips: desired.vips.iter().map(|(key, vip)| (*key, vip)).collect(),
            targets: desired.tables.iter().map(|(identity, table)| (*identity, targets(table))).collect(),
        }
    }

    /// Whom a packet leads to.
    pub fn lead(&self, probe: &Probe) -> Option<Lead> {
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
    pub fn mark(&self, address: IpAddr) -> Option<&'d DesiredVip> {
        let prefixes = (1..128).rev().filter_map(|length| {
            let prefix = Vip::holding(address, length).filter(|vip| !vip.is_address())?;
            Some((prefix.first(), PortKey::prefix(u32::from(length)).0))
        });
        let keys = std::iter::once((address, PortKey::ADDRESS.0)).chain(prefixes);
        keys.into_iter().find_map(|key| self.vips.get(&key).copied())
    }

    /// Where a packet may end that this leads.
    pub fn targets(&self, lead: Option<Lead>) -> Option<&BTreeSet<Target>> {
        self.targets.get(&lead?.table)
    }

    /// A packet for every entry and every rule.
    pub fn probes(&self) -> BTreeSet<Probe> {
        let mut probes = BTreeSet::new();
        for ((address, key), entry) in &self.vips {
            match entry {
                DesiredVip::Service(lead) => {
                    let (_, ports, protocol) = lead.counted;
                    let fragment = PortKey(*key).is_fragments();
                    probes.insert(Probe { address: *address, port: ports.lowest(), protocol, fragment });
                }
                DesiredVip::Source => {}
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
pub fn last_of(address: IpAddr, key: PortKey) -> IpAddr {
    let Some(length) = key.prefix_length() else { return address };
    match address {
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits() | u32::MAX >> length).into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() | u128::MAX >> length).into(),
    }
}

/// Whether a packet may end so where these are the targets.
pub fn is_right(
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
        // In the middle of a connection that nobody knows.
        Outcome::DropNoConnection => targets.iter().any(|target| is_fullnat(desired, target)),
        // A datagram of IPv4 has none, which IPv6 does not allow.
        Outcome::DropNoChecksum => targets.iter().any(|target| is_fullnat(desired, target)),
        // To the other family, which the configuration's rules refuse.
        Outcome::DropUntranslatable => targets.iter().any(|target| is_nat(desired, target)),
        // `on_empty: all` may name a backend that has no next hop; and there may be fewer sources than rows.
        Outcome::DropUnresolved => targets.iter().any(|target| match target {
            Target::Backend(identity) => {
                desired.backends[identity].next_hop.is_none()
                    || is_fullnat(desired, target) && desired.sources.v4.len() < desired.sources.rows as usize
            }
            Target::Nobody | Target::Pass => false,
        }),
        _ => false,
    }
}

fn kind_of(desired: &Desired, target: &Target) -> Option<BackendKind> {
    let Target::Backend(identity) = target else { return None };
    BackendKind::from_raw(desired.backends[identity].row.kind)
}

fn is_fullnat(desired: &Desired, target: &Target) -> bool {
    kind_of(desired, target).is_some_and(BackendKind::translates_source)
}

fn is_nat(desired: &Desired, target: &Target) -> bool {
    matches!(kind_of(desired, target), Some(BackendKind::Nat4 | BackendKind::Nat6))
}

/// Whether a forwarded packet went where its backend's next hop is, or was; by whatever pool or tunnel that is known.
pub fn knows_next_hop(desired: &Desired, row: &BackendRow, path: Path, egress: &Egress) -> bool {
    desired.backends.values().filter(|backend| backend.row.address == row.address).any(|backend| {
        backend.next_hop.as_ref().is_some_and(|(mac, way)| *mac == path.mac() && way == egress)
    })
}
