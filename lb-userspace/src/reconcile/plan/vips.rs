//! The VIP part of a plan: buckets and port rules in the half that is not live, prefix lengths and the filter around
//! them, and rows of counters. Knows backends and slots by the numbers of tables only.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use lb_common::abi::{
    BackendKind, FILTER_WORDS, MOST_PORT_RULES, PortKey, PortRule, PrefixLengths, RULES_PER_ROW, RuleRow,
    Vip4, Vip4Bucket, Vip6, Vip6Bucket, VipTarget, VipWord,
};
use lb_common::vips::{FilterBit, filter4, filter6};
use lb_common::wire::Address6;

use super::{Places, PlanError, Planner, sources};
use crate::capacity::Capacity;
use crate::config::model::Ports;
use crate::reconcile::entries::{Counted, DesiredRule, DesiredVip, Lead, VipKey, marked};
use crate::reconcile::image::Image;
use crate::reconcile::op::MapOp;
use crate::tables::buckets::{self, Bucket};

/// An entry as packets find it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VipEntry {
    /// An exact entry, or that of fragments.
    Service(VipTarget),
    /// Marks an address or a prefix; with its flags.
    Address { flags: u16, rules: Vec<PortRule> },
    /// An address that clients' are translated to, by its row.
    Source(u32),
}

pub type VipMap = BTreeMap<VipKey, VipEntry>;

/// The entries that packets find now.
pub fn present_vips(image: &Image) -> VipMap {
    let live = |word: VipWord| {
        let first = word.first_row() as usize;
        first..first + (1 << word.log2_buckets())
    };
    let v4 = image.vips4[live(image.vip_index.word4())].iter().flat_map(|bucket| bucket.0).map(|vip| {
        let address = Ipv4Addr::from(vip.address.to_ne_bytes()).into();
        (address, vip.key, vip.target)
    });
    let v6 = image.vips6[live(image.vip_index.word6())].iter().flat_map(|bucket| bucket.0).map(|vip| {
        let address = Ipv6Addr::from(Address6 { high: vip.high, low: vip.low }.bytes()).into();
        (address, vip.key, vip.target)
    });
    let found = v4.chain(v6).filter(|(_, key, _)| *key != PortKey::default());
    found.map(|(address, key, target)| ((address, key.0), entry(image, key, target))).collect()
}

fn entry(image: &Image, key: PortKey, target: VipTarget) -> VipEntry {
    if !key.is_address() || target.is_service() || target.is_none() {
        return VipEntry::Service(target);
    }
    if let Some(row) = target.source().checked_sub(1) {
        return VipEntry::Source(row);
    }
    let first = target.first_rule();
    let rules = (first..first.saturating_add(target.rules().min(MOST_PORT_RULES)))
        .map_while(|index| image.port_rule(index).copied());
    let flags = target.flags() & (VipTarget::UNMAPPED_PASS | VipTarget::UNMAPPED_REJECT);
    VipEntry::Address { flags, rules: rules.collect() }
}

/// The row of everything that is counted.
pub fn counter_rows(vips: &VipMap) -> BTreeMap<Counted, u32> {
    counted_targets(vips).into_iter().map(|(counted, target)| (counted, target.vip())).collect()
}

/// Where everything leads that is counted.
///
/// A rule is also in the lists of the VIPs that inherit it: it belongs to the shortest prefix that has it.
pub fn counted_targets(vips: &VipMap) -> BTreeMap<Counted, VipTarget> {
    let mut targets = BTreeMap::new();
    let mut known = HashSet::new();
    let mut marks = Vec::new();
    for (key, entry) in vips {
        match entry {
            VipEntry::Address { rules, .. } => marks.extend(marked(*key).map(|vip| (vip, rules))),
            VipEntry::Source(_) => {}
            VipEntry::Service(_) if PortKey(key.1).is_fragments() || PortKey(key.1).is_address() => {}
            VipEntry::Service(target) => {
                let port = PortKey(key.1);
                targets.insert((key.0.into(), Ports::Port(port.port()), port.protocol()), *target);
            }
        }
    }
    marks.sort_by_key(|(vip, _)| vip.length());
    for (vip, rules) in marks {
        for rule in rules {
            if known.insert(rule.target.vip()) {
                targets.insert((vip, ports(rule), rule.protocol as u8), rule.target);
            }
        }
    }
    targets
}

/// The ports of a rule, in the words of the configuration.
pub fn ports(rule: &PortRule) -> Ports {
    match (rule.low() as u16, rule.high() as u16) {
        (0, u16::MAX) => Ports::Any,
        (low, high) if low == high => Ports::Port(low),
        (low, high) => Ports::Range(low, high),
    }
}

impl Planner<'_> {
    /// Entries and rules, written anew into the half that is not live, if anything of the family differs.
    pub(super) fn vips(&mut self, present: &VipMap, places: &Places) -> Result<(), PlanError> {
        let sources = sources::place(self.image, self.desired);
        self.add.extend(sources::writes(self.image, &sources));
        let rows = self.counters(present)?;
        let translated = self.still_translated(present);
        let target = |lead: &Lead| {
            let flags =
                lead.flags | if translated.contains(&lead.counted) { VipTarget::TRANSLATED } else { 0 };
            VipTarget::service(places.of(lead), flags, rows[&lead.counted])
        };
        let rule = |rule: &DesiredRule| {
            PortRule::new(rule.ports.lowest(), rule.ports.highest(), rule.protocol, target(&rule.lead))
        };
        let wanted: VipMap = self
            .desired
            .vips
            .iter()
            .filter_map(|(key, vip)| {
                let entry = match vip {
                    DesiredVip::Service(lead) => VipEntry::Service(target(lead)),
                    DesiredVip::Address { flags, rules } => {
                        VipEntry::Address { flags: *flags, rules: rules.iter().map(rule).collect() }
                    }
                    DesiredVip::Source => VipEntry::Source(sources::row_of(&sources, key.0)?),
                };
                Some((*key, entry))
            })
            .collect();
        self.filter(wanted.keys());
        self.lengths(present, &wanted);
        self.family::<V4>(present, &wanted)?;
        self.family::<V6>(present, &wanted)
    }

    /// What led to translated connections, and may still: packets look for them as long as there are backends of this kind.
    fn still_translated(&self, present: &VipMap) -> HashSet<Counted> {
        let kinds = self.image.backends.iter().filter_map(|row| BackendKind::from_raw(row.kind));
        if !kinds.into_iter().any(BackendKind::translates) {
            return HashSet::new();
        }
        let targets = counted_targets(present).into_iter();
        targets.filter(|(_, target)| target.has(VipTarget::TRANSLATED)).map(|(counted, _)| counted).collect()
    }

    /// A row for everything that is counted.
    fn counters(&mut self, present: &VipMap) -> Result<BTreeMap<Counted, u32>, PlanError> {
        let counted: BTreeSet<Counted> = self.desired.vips.values().flat_map(DesiredVip::counted).collect();
        let limit = self.capacity.vips;
        let needed = counted.len();
        if needed > limit as usize {
            return Err(PlanError::Vips { needed, limit });
        }
        let before = counter_rows(present);
        let mut rows: BTreeMap<Counted, u32> =
            counted.iter().filter_map(|counted| Some((*counted, *before.get(counted)?))).collect();
        // Rows of those that are about to go are still counted into: not given away yet.
        let resting: HashSet<u32> = before.values().copied().collect();
        let mut free = (0..self.capacity.vip_rows()).filter(|row| !resting.contains(row));
        for counted in counted {
            if let std::collections::btree_map::Entry::Vacant(place) = rows.entry(counted) {
                let vip = free.next().ok_or(PlanError::Vips { needed, limit })?;
                self.add.push(MapOp::ResetVipTraffic { vip });
                place.insert(vip);
            }
        }
        Ok(rows)
    }

    /// Bits of addresses that come are set before they are live, bits of those that go are cleared after.
    fn filter<'k>(&mut self, keys: impl Iterator<Item = &'k VipKey>) {
        let mut wanted = vec![0; FILTER_WORDS];
        for (address, key) in keys {
            if PortKey(*key) == PortKey::ADDRESS {
                let bit = filter_bit(*address);
                wanted[bit.word()] |= bit.mask();
            }
        }
        for ((index, &bits), wanted) in (0..).zip(&self.image.vip_index.filter).zip(wanted) {
            let both = bits | wanted;
            if both != bits {
                self.add.push(MapOp::SetFilterWord { index, bits: both });
            }
            if both != wanted {
                self.remove.push(MapOp::SetFilterWord { index, bits: wanted });
            }
        }
    }

    /// Lengths of prefixes that come are there a grace before these are live, those of prefixes that go leave a grace
    /// after: whichever of the two words a packet has read, it tries all lengths that its set of VIPs has.
    fn lengths(&mut self, present: &VipMap, wanted: &VipMap) {
        for (ipv4, now) in
            [(true, self.image.vip_index.prefix_lengths4()), (false, self.image.vip_index.prefix_lengths6())]
        {
            let set = |lengths| match ipv4 {
                true => MapOp::SetPrefixLengths4 { lengths },
                false => MapOp::SetPrefixLengths6 { lengths },
            };
            let after = lengths_of(wanted, ipv4);
            let both: BTreeSet<u8> = lengths_of(present, ipv4).union(&after).copied().collect();
            let held: BTreeSet<u8> = (0..PrefixLengths::ROOM).map(|index| now.get(index) as u8).collect();
            let mut reached = now;
            if !both.is_subset(&held) {
                reached = word_of(&both);
                self.add.push(set(reached));
            }
            if reached != word_of(&after) {
                self.remove.push(set(word_of(&after)));
            }
        }
    }

    fn family<F: Family>(&mut self, present: &VipMap, wanted: &VipMap) -> Result<(), PlanError> {
        let of_family = |map: &VipMap| -> VipMap {
            map.iter()
                .filter(|(key, _)| key.0.is_ipv4() == F::IPV4)
                .map(|(key, entry)| (*key, entry.clone()))
                .collect()
        };
        let (present, wanted) = (of_family(present), of_family(wanted));
        if present == wanted {
            return Ok(());
        }
        // The half that was live before may still be read by who loaded its word.
        self.add.push(MapOp::Grace);
        self.add.extend(written::<F>(&wanted, F::live(self.image), self.capacity)?);
        Ok(())
    }
}

/// The writes of entries into maps that have none.
pub fn lay_out(vips: &VipMap, capacity: &Capacity) -> Result<Vec<MapOp>, PlanError> {
    let mut ops = Vec::new();
    let (v4, v6): (VipMap, VipMap) =
        vips.clone().into_iter().partition(|((address, _), _)| address.is_ipv4());
    if !v4.is_empty() {
        ops.extend(written::<V4>(&v4, VipWord::default(), capacity)?);
    }
    if !v6.is_empty() {
        ops.extend(written::<V6>(&v6, VipWord::default(), capacity)?);
    }
    Ok(ops)
}

/// The writes of a family's entries into the half that is not live, and of the word that makes it live.
fn written<F: Family>(wanted: &VipMap, live: VipWord, capacity: &Capacity) -> Result<Vec<MapOp>, PlanError> {
    let half_log2 = F::half_log2(capacity);
    let row = idle_half(live, half_log2);
    let rule_row = rule_half::<F>(capacity, row);
    let rules = RuleList::of(wanted, capacity.rule_half_rows())?;
    let entries: Vec<_> = wanted
        .iter()
        .filter_map(|(key, entry)| {
            let target = match entry {
                VipEntry::Service(target) => *target,
                VipEntry::Source(row) => VipTarget::address(0, VipTarget::SOURCE, *row),
                VipEntry::Address { flags, rules: own } => {
                    VipTarget::address(own.len() as u16, *flags, rules.first(own, rule_row * RULES_PER_ROW))
                }
            };
            F::entry(key.0, PortKey(key.1), target)
        })
        .collect();
    let layout = buckets::lay_out(&entries, half_log2).ok_or(PlanError::Buckets { limit: capacity.vips })?;
    let mut ops = Vec::new();
    if let Some(rules) = rules.rows() {
        ops.push(MapOp::WriteRules { row: rule_row, rules });
    }
    let word = VipWord::new(layout.seed, row, layout.log2_buckets);
    ops.push(F::write(row, layout.buckets));
    ops.push(F::set(if entries.is_empty() { VipWord::default() } else { word }));
    Ok(ops)
}

/// Rules of all entries of a family, one list after the other; equal lists once.
struct RuleList {
    rules: Vec<PortRule>,
    first: HashMap<Vec<[u64; 2]>, u32>,
}

impl RuleList {
    fn of(wanted: &VipMap, rows: u32) -> Result<Self, PlanError> {
        let mut this = Self { rules: Vec::new(), first: HashMap::new() };
        for entry in wanted.values() {
            let VipEntry::Address { rules, .. } = entry else { continue };
            if let (false, std::collections::hash_map::Entry::Vacant(place)) =
                (rules.is_empty(), this.first.entry(words(rules)))
            {
                place.insert(this.rules.len() as u32);
                this.rules.extend(rules);
            }
        }
        let limit = rows * RULES_PER_ROW;
        let needed = this.rules.len();
        if needed > limit as usize {
            return Err(PlanError::Rules { needed, limit });
        }
        Ok(this)
    }

    /// Where a list begins, counted over the whole map; 0 for an empty one.
    fn first(&self, list: &[PortRule], of_half: u32) -> u32 {
        self.first.get(&words(list)).map_or(0, |first| of_half + first)
    }

    fn rows(&self) -> Option<Vec<RuleRow>> {
        let row = |rules: &[PortRule]| {
            let mut row = RuleRow::default();
            row.0[..rules.len()].copy_from_slice(rules);
            row
        };
        (!self.rules.is_empty()).then(|| self.rules.chunks(RULES_PER_ROW as usize).map(row).collect())
    }
}

/// A list in a form that can be looked up.
fn words(rules: &[PortRule]) -> Vec<[u64; 2]> {
    let word = |rule: &PortRule| [u64::from(rule.ports) << 32 | u64::from(rule.protocol), rule.target.bits()];
    rules.iter().map(word).collect()
}

/// What differs between IPv4 and IPv6.
trait Family {
    const IPV4: bool;
    type Bucket: Bucket;
    fn half_log2(capacity: &Capacity) -> u32;
    fn live(image: &Image) -> VipWord;
    fn entry(address: IpAddr, key: PortKey, target: VipTarget) -> Option<<Self::Bucket as Bucket>::Entry>;
    fn write(row: u32, buckets: Vec<Self::Bucket>) -> MapOp;
    fn set(word: VipWord) -> MapOp;
}

struct V4;

impl Family for V4 {
    const IPV4: bool = true;
    type Bucket = Vip4Bucket;

    fn half_log2(capacity: &Capacity) -> u32 {
        capacity.vip4_half_log2
    }

    fn live(image: &Image) -> VipWord {
        image.vip_index.word4()
    }

    fn entry(address: IpAddr, key: PortKey, target: VipTarget) -> Option<Vip4> {
        match address {
            IpAddr::V4(address) => Some(buckets::vip4(address, key, target)),
            IpAddr::V6(_) => None,
        }
    }

    fn write(row: u32, buckets: Vec<Vip4Bucket>) -> MapOp {
        MapOp::WriteVips4 { row, buckets }
    }

    fn set(word: VipWord) -> MapOp {
        MapOp::SetVipWord4 { word }
    }
}

struct V6;

impl Family for V6 {
    const IPV4: bool = false;
    type Bucket = Vip6Bucket;

    fn half_log2(capacity: &Capacity) -> u32 {
        capacity.vip6_half_log2
    }

    fn live(image: &Image) -> VipWord {
        image.vip_index.word6()
    }

    fn entry(address: IpAddr, key: PortKey, target: VipTarget) -> Option<Vip6> {
        match address {
            IpAddr::V6(address) => Some(buckets::vip6(address, key, target)),
            IpAddr::V4(_) => None,
        }
    }

    fn write(row: u32, buckets: Vec<Vip6Bucket>) -> MapOp {
        MapOp::WriteVips6 { row, buckets }
    }

    fn set(word: VipWord) -> MapOp {
        MapOp::SetVipWord6 { word }
    }
}

fn lengths_of(vips: &VipMap, ipv4: bool) -> BTreeSet<u8> {
    let keys = vips.keys().filter(|key| key.0.is_ipv4() == ipv4);
    keys.filter_map(|key| PortKey(key.1).prefix_length()).map(|length| length as u8).collect()
}

/// Longest first, in the lowest byte.
fn word_of(lengths: &BTreeSet<u8>) -> PrefixLengths {
    let bytes = lengths.iter().rev().zip((0..u64::BITS).step_by(8));
    PrefixLengths::from_bits(bytes.fold(0, |bits, (length, shift)| bits | u64::from(*length) << shift))
}

fn filter_bit(address: IpAddr) -> FilterBit {
    match address {
        IpAddr::V4(v4) => filter4(u32::from_ne_bytes(v4.octets())),
        IpAddr::V6(v6) => filter6(Address6::from_bytes(v6.octets())),
    }
}

/// The first row of the half that the live word does not name.
fn idle_half(live: VipWord, half_log2: u32) -> u32 {
    if live.first_row() == 1 { 1 + (1 << half_log2) } else { 1 }
}

/// The first row of the rules that belong to a half of buckets.
fn rule_half<F: Family>(capacity: &Capacity, bucket_row: u32) -> u32 {
    let family = if F::IPV4 { 0 } else { 2 };
    let half = if bucket_row == 1 { 0 } else { 1 };
    (family + half) * capacity.rule_half_rows()
}
