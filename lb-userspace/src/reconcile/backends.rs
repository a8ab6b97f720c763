//! Backends as they should be, in the order of their identities. Knows nothing of what they are.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::desired::DesiredBackend;

/// As many lie side by side.
const STRETCH: usize = 32;

/// A clone shares what it is a clone of, but for the stretches in which something changes later: what differs is found
/// without looking at the others.
#[derive(Debug, Clone, Default)]
pub struct Backends {
    stretches: Vec<Arc<[(u64, DesiredBackend)]>>,
    /// The first identity of each.
    begins: Arc<[u64]>,
}

impl Backends {
    pub fn len(&self) -> usize {
        self.stretches.iter().map(|stretch| stretch.len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.stretches.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&u64, &DesiredBackend)> {
        self.stretches
            .iter()
            .flat_map(|stretch| stretch.iter())
            .map(|(identity, backend)| (identity, backend))
    }

    pub fn keys(&self) -> impl Iterator<Item = &u64> {
        self.iter().map(|(identity, _)| identity)
    }

    pub fn values(&self) -> impl Iterator<Item = &DesiredBackend> {
        self.iter().map(|(_, backend)| backend)
    }

    pub fn get(&self, identity: &u64) -> Option<&DesiredBackend> {
        let (stretch, place) = self.find(identity)?;
        self.stretches[stretch].get(place).map(|(_, backend)| backend)
    }

    #[cfg(test)]
    pub fn get_mut(&mut self, identity: &u64) -> Option<&mut DesiredBackend> {
        let (stretch, place) = self.find(identity)?;
        Arc::make_mut(&mut self.stretches[stretch]).get_mut(place).map(|(_, backend)| backend)
    }

    #[cfg(test)]
    pub fn contains_key(&self, identity: &u64) -> bool {
        self.find(identity).is_some()
    }

    /// Returns what it takes the place of.
    #[cfg(test)]
    pub fn insert(&mut self, identity: u64, backend: DesiredBackend) -> Option<DesiredBackend> {
        let before = self.get(&identity).cloned();
        let all = self.iter().map(|(identity, backend)| (*identity, backend.clone()));
        *self = all.chain([(identity, backend)]).collect();
        before
    }

    #[cfg(test)]
    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut DesiredBackend> {
        let stretches = self.stretches.iter_mut().flat_map(|stretch| Arc::make_mut(stretch).iter_mut());
        stretches.map(|(_, backend)| backend)
    }

    /// Where one lies.
    fn find(&self, identity: &u64) -> Option<(usize, usize)> {
        let stretch = self.begins.partition_point(|first| first <= identity).checked_sub(1)?;
        let place = self.stretches[stretch].binary_search_by_key(identity, |(identity, _)| *identity);
        Some((stretch, place.ok()?))
    }

    /// Puts another in the place of one, counted over all, without a change of its identity.
    pub fn set(&mut self, place: usize, backend: DesiredBackend) {
        Arc::make_mut(&mut self.stretches[place / STRETCH])[place % STRETCH].1 = backend;
    }

    /// Those that differ from what they were before, and what they were; nothing if there are others than before.
    pub fn changed_since<'b>(
        &'b self,
        before: &'b Self,
    ) -> Option<Vec<(&'b DesiredBackend, &'b DesiredBackend)>> {
        let mut changed = Vec::new();
        if self.stretches.len() != before.stretches.len() {
            return None;
        }
        let both = self.stretches.iter().zip(&before.stretches);
        for (now, before) in both.filter(|(now, before)| !Arc::ptr_eq(now, before)) {
            if now.len() != before.len() {
                return None;
            }
            for ((identity, now), (was, before)) in now.iter().zip(before.iter()) {
                if identity != was {
                    return None;
                }
                if now != before {
                    changed.push((now, before));
                }
            }
        }
        Some(changed)
    }
}

/// However they lie.
impl PartialEq for Backends {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for Backends {}

#[cfg(test)]
impl std::ops::Index<&u64> for Backends {
    type Output = DesiredBackend;

    fn index(&self, identity: &u64) -> &DesiredBackend {
        self.get(identity).expect("no such backend")
    }
}

/// Of two alike, the last counts.
impl FromIterator<(u64, DesiredBackend)> for Backends {
    fn from_iter<I: IntoIterator<Item = (u64, DesiredBackend)>>(all: I) -> Self {
        let all: BTreeMap<u64, DesiredBackend> = all.into_iter().collect();
        let mut all = all.into_iter();
        let stretches = std::iter::from_fn(|| {
            let stretch: Arc<[_]> = all.by_ref().take(STRETCH).collect();
            (!stretch.is_empty()).then_some(stretch)
        });
        let stretches: Vec<Arc<[(u64, DesiredBackend)]>> = stretches.collect();
        let begins = stretches.iter().map(|stretch| stretch[0].0).collect();
        Self { stretches, begins }
    }
}

impl<const N: usize> From<[(u64, DesiredBackend); N]> for Backends {
    fn from(all: [(u64, DesiredBackend); N]) -> Self {
        all.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lb_common::abi::Backend;

    fn backend(identity: u64, weight: u8) -> (u64, DesiredBackend) {
        let row = Backend { identity, ..Backend::default() };
        let (next_hop, pool, old_flows) = (None, [1, 0, 0], Default::default());
        (identity, DesiredBackend { row, next_hop, pool, old_flows, weight })
    }

    fn all(count: u64) -> Backends {
        (1..=count).rev().map(|identity| backend(identity * 2, 1)).collect()
    }

    #[test]
    fn every_backend_is_found_by_its_identity_and_no_other() {
        for count in [0, 1, 2, 31, 32, 33, 100] {
            let backends = all(count);
            assert_eq!((backends.len() as u64, backends.is_empty()), (count, count == 0));
            assert!(backends.keys().copied().eq((1..=count).map(|place| place * 2)));
            for place in 1..=count {
                assert_eq!(backends[&(place * 2)].row.identity, place * 2);
                assert_eq!(backends.get(&(place * 2 - 1)), None);
            }
            assert_eq!(backends.get(&(count * 2 + 2)), None);
        }
        assert_eq!(Backends::from([backend(5, 1), backend(5, 2)])[&5].weight, 2);
    }

    #[test]
    fn what_changed_is_told_with_what_it_was_and_who_else_came_or_went_is_not_a_change() {
        let before = all(100);
        let mut now = before.clone();
        assert_eq!(now.changed_since(&before), Some(Vec::new()));
        now.set(40, backend(82, 7).1);
        // To what it was: another stretch, and nothing changed.
        now.set(99, backend(200, 1).1);
        assert_eq!(now.changed_since(&before), Some(vec![(&now[&82], &before[&82])]));
        assert_eq!((now[&82].weight, before[&82].weight), (7, 1));
        assert_ne!(now, before);
        assert_eq!(now.changed_since(&all(99)), None);
        assert_eq!(now.changed_since(&(1..=100).map(|identity| backend(identity, 1)).collect()), None);
    }
}
