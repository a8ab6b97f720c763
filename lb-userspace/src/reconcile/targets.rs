//! Where the slots of a table lead, in two bytes a slot: by places in a list of those that they may lead to. Knows nothing
//! of why.

use std::ops::Index;
use std::sync::Arc;

use super::desired::Target;

/// Equal where every slot leads to the same, however the lists are ordered. A clone shares what it is a clone of.
#[derive(Debug, Clone, Default)]
pub struct Targets {
    /// All that slots may lead to, and maybe more.
    known: Arc<[Target]>,
    /// By slot, its target's place among those.
    places: Arc<[u16]>,
}

impl Targets {
    /// # Panics
    /// Where a slot asks for a target that is not in the list.
    pub fn new(known: impl Into<Arc<[Target]>>, places: impl Into<Arc<[u16]>>) -> Self {
        let this = Self { known: known.into(), places: places.into() };
        let last = this.places.iter().copied().fold(0, u16::max);
        assert!(this.is_empty() || usize::from(last) < this.known.len(), "a slot leads nowhere");
        this
    }

    pub fn len(&self) -> usize {
        self.places.len()
    }

    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// All that slots may lead to, and maybe more: `places` counts in it.
    pub fn known(&self) -> &[Target] {
        &self.known
    }

    pub fn places(&self) -> &[u16] {
        &self.places
    }

    /// Nothing beyond the last slot.
    pub fn get(&self, slot: usize) -> Option<&Target> {
        self.places.get(slot).map(|&place| &self.known[usize::from(place)])
    }

    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Target> {
        self.places.iter().map(|&place| &self.known[usize::from(place)])
    }

    /// What some slot leads to, each once.
    pub fn used(&self) -> impl Iterator<Item = &Target> {
        let mut used = vec![false; self.known.len()];
        self.places.iter().for_each(|&place| used[usize::from(place)] = true);
        self.known.iter().zip(used).filter(|(_, used)| *used).map(|(target, _)| target)
    }
}

impl PartialEq for Targets {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.known, &other.known) && Arc::ptr_eq(&self.places, &other.places)
            || self.iter().eq(other.iter())
    }
}

impl Eq for Targets {}

impl Index<usize> for Targets {
    type Output = Target;

    fn index(&self, slot: usize) -> &Target {
        &self.known[usize::from(self.places[slot])]
    }
}

impl FromIterator<Target> for Targets {
    fn from_iter<I: IntoIterator<Item = Target>>(targets: I) -> Self {
        let mut known: Vec<Target> = Vec::new();
        let mut places = std::collections::HashMap::new();
        let place = |target: Target| {
            *places.entry(target).or_insert_with(|| {
                known.push(target);
                known.len() as u16 - 1
            })
        };
        let places: Vec<u16> = targets.into_iter().map(place).collect();
        Self { known: known.into(), places: places.into() }
    }
}

impl From<Vec<Target>> for Targets {
    fn from(targets: Vec<Target>) -> Self {
        targets.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Target = Target::Backend(1);
    const B: Target = Target::Backend(2);

    #[test]
    fn tables_are_equal_where_slots_lead_to_the_same_in_whatever_order_targets_are_known() {
        let one = Targets::new(vec![A, B, Target::Nobody], vec![0, 1, 0]);
        let other = Targets::new(vec![B, A], vec![1, 0, 1]);
        assert_eq!(one, other);
        assert_eq!(one, Targets::from(vec![A, B, A]));
        assert_ne!(one, Targets::from(vec![A, B, B]));
        assert_ne!(one, Targets::from(vec![A, B]));
        assert!(one.used().eq([&A, &B]));
        assert_eq!((one.len(), one[1], one.known().len()), (3, B, 3));
    }

    #[test]
    #[should_panic(expected = "a slot leads nowhere")]
    fn a_slot_that_leads_nowhere_is_refused() {
        Targets::new(vec![A], vec![0, 1]);
    }
}
