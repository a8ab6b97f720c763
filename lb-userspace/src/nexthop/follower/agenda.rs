//! Which addresses are asked about again, and when: soon for a few, in proportion to what asking costs for many. Pure: is
//! given the time.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Events that come in this time share a pass.
pub(super) const COALESCE: Duration = Duration::from_millis(50);
/// A pass that took t is not repeated within this times t.
const REST: u32 = 4;
/// Questions of one batch. Between batches of a pass, urgent ones get their turn.
const BATCH: usize = 512;

/// Addresses that are watched, in order.
#[derive(Debug, Default)]
struct Sorted(Vec<IpAddr>);

impl Sorted {
    fn new(addresses: impl IntoIterator<Item = IpAddr>) -> Sorted {
        let mut sorted: Vec<IpAddr> = addresses.into_iter().collect();
        sorted.sort_unstable();
        sorted.dedup();
        Sorted(sorted)
    }

    /// Those within a prefix, which may have bits set beyond its length.
    fn covered(&self, prefix: IpAddr, length: u8) -> &[IpAddr] {
        let (first, last): (IpAddr, IpAddr) = match prefix {
            IpAddr::V4(ip) => {
                let host = u32::MAX.checked_shr(length.into()).unwrap_or(0);
                let bits = ip.to_bits();
                ((bits & !host).to_be_bytes().into(), (bits | host).to_be_bytes().into())
            }
            IpAddr::V6(ip) => {
                let host = u128::MAX.checked_shr(length.into()).unwrap_or(0);
                let bits = ip.to_bits();
                ((bits & !host).to_be_bytes().into(), (bits | host).to_be_bytes().into())
            }
        };
        let from = self.0.partition_point(|ip| *ip < first);
        let to = self.0.partition_point(|ip| *ip <= last);
        &self.0[from..to]
    }
}

#[derive(Debug, Default)]
pub(super) struct Agenda {
    watched: Sorted,
    dirty: HashSet<IpAddr>,
    dirty_since: Option<Instant>,
    urgent: HashSet<IpAddr>,
    /// What is left of the pass that runs.
    pass: Vec<IpAddr>,
    pass_took: Duration,
    pass_may_begin: Option<Instant>,
    urgent_may_begin: Option<Instant>,
    in_batch: bool,
    urgent_batch: bool,
}

impl Agenda {
    /// Replaces what there is to ask about.
    pub(super) fn watch(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        self.watched = Sorted::new(addresses);
        let watched = |address: &IpAddr| self.watched.0.binary_search(address).is_ok();
        self.dirty.retain(watched);
        self.urgent.retain(watched);
        self.pass.retain(watched);
        if self.dirty.is_empty() {
            self.dirty_since = None;
        }
    }

    /// Asked in the next pass: what a prefix covers.
    pub(super) fn mark_covered(&mut self, now: Instant, prefix: IpAddr, length: u8) {
        let covered = self.watched.covered(prefix, length);
        if !covered.is_empty() {
            self.dirty.extend(covered);
            self.dirty_since.get_or_insert(now);
        }
    }

    pub(super) fn mark(&mut self, now: Instant, addresses: impl IntoIterator<Item = IpAddr>) {
        self.dirty.extend(addresses);
        if !self.dirty.is_empty() {
            self.dirty_since.get_or_insert(now);
        }
    }

    pub(super) fn mark_all(&mut self, now: Instant) {
        if !self.all_marked() {
            self.dirty.extend(&self.watched.0);
            self.dirty_since.get_or_insert(now);
        }
    }

    /// Asked before all others.
    pub(super) fn mark_urgent(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        self.urgent.extend(addresses);
    }

    /// Nothing that is marked would change anything.
    pub(super) fn all_marked(&self) -> bool {
        self.dirty.len() >= self.watched.0.len()
    }

    /// When the next batch may begin; `None` where there is nothing to ask, or a batch is being asked.
    pub(super) fn due(&self, now: Instant) -> Option<Instant> {
        if self.in_batch {
            return None;
        }
        let not_before = |time: Option<Instant>| time.unwrap_or(now);
        let urgent = (!self.urgent.is_empty()).then(|| not_before(self.urgent_may_begin));
        let pass = if self.pass.is_empty() {
            self.dirty_since.map(|since| (since + COALESCE).max(not_before(self.pass_may_begin)))
        } else {
            Some(now)
        };
        [urgent, pass].into_iter().flatten().min()
    }

    /// What to ask now, if anything is due. [`Agenda::on_answers`] must follow.
    pub(super) fn next_batch(&mut self, now: Instant) -> Option<Vec<IpAddr>> {
        if self.due(now).is_none_or(|due| due > now) {
            return None;
        }
        self.in_batch = true;
        let may = |time: Option<Instant>| time.is_none_or(|time| time <= now);
        self.urgent_batch = !self.urgent.is_empty() && may(self.urgent_may_begin);
        if self.urgent_batch {
            let batch: Vec<IpAddr> = self.urgent.iter().take(BATCH).copied().collect();
            for address in &batch {
                self.urgent.remove(address);
            }
            return Some(batch);
        }
        if self.pass.is_empty() {
            self.pass = self.dirty.drain().collect();
            self.pass_took = Duration::ZERO;
            self.dirty_since = None;
        }
        let rest = self.pass.len().saturating_sub(BATCH);
        Some(self.pass.split_off(rest))
    }

    /// A batch has been answered and took that long.
    pub(super) fn on_answers(&mut self, now: Instant, took: Duration) {
        self.in_batch = false;
        if self.urgent_batch {
            self.urgent_may_begin = Some(now + took);
            return;
        }
        self.pass_took += took;
        if self.pass.is_empty() {
            self.pass_may_begin = Some(now + REST * self.pass_took);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| ip(text)).collect()
    }

    #[test]
    fn a_prefix_covers_its_addresses_of_its_own_family_and_no_others() {
        let all = ["10.0.0.0", "10.0.0.255", "10.0.1.0", "192.0.2.1", "255.255.255.255"];
        let all6 = ["::", "2001:db8::1", "2001:db8::ffff", "2001:db9::", "ffff::1"];
        let sorted = Sorted::new(ips(&all6).into_iter().chain(ips(&all)));
        let rows: [(&str, u8, &[&str]); 11] = [
            ("10.0.0.0", 24, &["10.0.0.0", "10.0.0.255"]),
            ("10.0.0.77", 24, &["10.0.0.0", "10.0.0.255"]),
            ("10.0.0.255", 32, &["10.0.0.255"]),
            ("10.0.0.254", 32, &[]),
            ("10.0.0.0", 8, &["10.0.0.0", "10.0.0.255", "10.0.1.0"]),
            ("0.0.0.0", 0, &all),
            ("255.255.255.255", 32, &["255.255.255.255"]),
            ("::", 0, &all6),
            ("2001:db8::", 32, &["2001:db8::1", "2001:db8::ffff"]),
            ("2001:db8::1", 128, &["2001:db8::1"]),
            ("fe80::", 10, &[]),
        ];
        for (prefix, length, expected) in rows {
            assert_eq!(sorted.covered(ip(prefix), length), ips(expected), "{prefix}/{length}");
        }
    }

    #[test]
    fn a_prefix_longer_than_an_address_is_one_address() {
        let sorted = Sorted::new(ips(&["10.0.0.1", "10.0.0.2"]));
        assert_eq!(sorted.covered(ip("10.0.0.1"), 200), ips(&["10.0.0.1"]));
    }

    #[test]
    fn events_within_50_milliseconds_share_a_pass() {
        let start = Instant::now();
        let mut agenda = Agenda::default();
        assert_eq!(agenda.due(start), None);
        agenda.mark(start, ips(&["10.0.0.1"]));
        agenda.mark(start + COALESCE / 2, ips(&["10.0.0.2", "10.0.0.1"]));
        assert_eq!(agenda.next_batch(start + COALESCE / 2), None);
        let mut batch = agenda.next_batch(start + COALESCE).unwrap();
        batch.sort();
        assert_eq!(batch, ips(&["10.0.0.1", "10.0.0.2"]));
        assert_eq!(agenda.due(start + COALESCE), None);
    }

    #[test]
    fn a_pass_rests_four_times_as_long_as_it_took() {
        let start = Instant::now();
        let mut agenda = Agenda::default();
        agenda.mark(start, ips(&["10.0.0.1"]));
        let now = start + COALESCE;
        agenda.next_batch(now).unwrap();
        agenda.mark(now, ips(&["10.0.0.1"]));
        let took = Duration::from_secs(1);
        agenda.on_answers(now + took, took);
        assert_eq!(agenda.due(now + took), Some(now + 5 * took));
        assert_eq!(agenda.next_batch(now + 4 * took), None);
        assert!(agenda.next_batch(now + 5 * took).is_some());
    }

    #[test]
    fn a_long_pass_is_asked_in_batches_without_a_rest_and_urgent_ones_go_in_between() {
        let start = Instant::now();
        let many: Vec<IpAddr> = (0..2 * BATCH as u32).map(|n| n.to_be_bytes().into()).collect();
        let mut agenda = Agenda::default();
        agenda.mark(start, many.clone());
        let now = start + COALESCE;
        assert_eq!(agenda.next_batch(now).unwrap().len(), BATCH);
        agenda.on_answers(now, Duration::from_millis(10));
        agenda.mark_urgent(ips(&["10.0.0.1"]));
        assert_eq!(agenda.next_batch(now).unwrap(), ips(&["10.0.0.1"]));
        agenda.on_answers(now, Duration::from_millis(1));
        assert_eq!(agenda.next_batch(now).unwrap().len(), BATCH);
        agenda.on_answers(now, Duration::from_millis(10));
        agenda.mark(now, many.clone());
        assert_eq!(agenda.due(now), Some(now + Duration::from_millis(80)));
    }

    #[test]
    fn an_urgent_address_waits_neither_to_share_a_pass_nor_for_a_pass_to_rest() {
        let start = Instant::now();
        let mut agenda = Agenda::default();
        agenda.mark(start, ips(&["10.0.0.1"]));
        let now = start + COALESCE;
        agenda.next_batch(now).unwrap();
        agenda.on_answers(now, Duration::from_secs(9));
        agenda.mark_urgent(ips(&["10.0.0.2"]));
        assert_eq!(agenda.next_batch(now).unwrap(), ips(&["10.0.0.2"]));
    }

    #[test]
    fn what_is_no_longer_watched_is_not_asked() {
        let start = Instant::now();
        let mut agenda = Agenda::default();
        agenda.mark(start, ips(&["10.0.0.1"]));
        agenda.mark_urgent(ips(&["10.0.0.2"]));
        agenda.watch([]);
        assert_eq!(agenda.due(start), None);
    }
}
