//! Where the slots of a table lead, in two bytes a slot: by places in a list of those that they may lead to. Knows nothing
//! of why.

use std::borrow::Cow;
use std::ops::Index;
use std::sync::Arc;

use super::desired::Target;

/// Equal where every slot leads to the same, however the lists are ordered. A clone shares what it is a clone of.
#[derive(Debug, Clone, Default)]
pub struct Targets {
    /// All that slots may lead to, and maybe more.
    known: Arc<[Target]>,
    /// By slot, its target's place among those, but for those that moved.
    base: Arc<[u16]>,
    /// Slots that lead elsewhere, and where: each once, in their order.
    moved: Arc<[(u32, u16)]>,
    /// Slots of each of those that are known.
    counts: Arc<[u32]>,
}

/// Where more than one in so many slots moved, they are no list any more.
const LISTED: usize = 8;

impl Targets {
    /// # Panics
    /// Where a slot asks for a target that is not in the list.
    pub fn new(known: impl Into<Arc<[Target]>>, places: impl Into<Arc<[u16]>>) -> Self {
        let (known, base) = (known.into(), places.into());
        let mut counts = vec![0; known.len()];
        for &place in &*base {
            let Some(count) = counts.get_mut(usize::from(place)) else { panic!("a slot leads nowhere") };
            *count += 1;
        }
        Self { known, base, moved: Arc::default(), counts: counts.into() }
    }

    /// Of the same places, to which something else is known.
    #[must_use]
    pub fn renamed(&self, known: &Arc<[Target]>) -> Self {
        debug_assert_eq!(known.len(), self.known.len());
        Self { known: Arc::clone(known), ..self.clone() }
    }

    /// With slots that lead elsewhere: each once, in their order. It must have none yet.
    ///
    /// # Panics
    /// As `new`.
    #[must_use]
    pub fn with_moved(&self, moved: Vec<(u32, u16)>) -> Self {
        debug_assert!(self.moved.is_empty());
        if moved.is_empty() {
            return self.clone();
        }
        let mut counts = self.counts.to_vec();
        for &(slot, place) in &moved {
            counts[usize::from(self.base[slot as usize])] -= 1;
            counts[usize::from(place)] += 1;
        }
        let this = Self { moved: moved.into(), counts: counts.into(), ..self.clone() };
        if this.moved.len() * LISTED <= this.len() {
            return this;
        }
        Self { base: this.places().into_owned().into(), moved: Arc::default(), ..this }
    }

    pub fn len(&self) -> usize {
        self.base.len()
    }

    pub fn is_empty(&self) -> bool {
        self.base.is_empty()
    }

    /// All that slots may lead to, and maybe more: places count in it.
    pub fn known(&self) -> &[Target] {
        &self.known
    }

    /// By slot.
    pub fn places(&self) -> Cow<'_, [u16]> {
        let mut places = Cow::Borrowed(&*self.base);
        if !self.moved.is_empty() {
            let places = places.to_mut();
            self.moved.iter().for_each(|&(slot, place)| places[slot as usize] = place);
        }
        places
    }

    /// The same for one slot.
    pub fn place(&self, slot: usize) -> Option<u16> {
        match self.moved.binary_search_by_key(&slot, |(slot, _)| *slot as usize) {
            Ok(moved) => Some(self.moved[moved].1),
            Err(_) => self.base.get(slot).copied(),
        }
    }

    /// Nothing beyond the last slot.
    pub fn get(&self, slot: usize) -> Option<&Target> {
        self.place(slot).map(|place| &self.known[usize::from(place)])
    }

    pub fn iter(&self) -> impl Iterator<Item = &Target> {
        let mut moved = self.moved.iter().peekable();
        self.base.iter().enumerate().map(move |(slot, &base)| {
            let place = moved.next_if(|(of, _)| *of as usize == slot).map_or(base, |(_, place)| *place);
            &self.known[usize::from(place)]
        })
    }

    /// How many slots lead to each of those that are known.
    pub fn counts(&self) -> &[u32] {
        &self.counts
    }

    /// What some slot leads to, each once.
    pub fn used(&self) -> impl Iterator<Item = &Target> {
        self.known.iter().zip(&*self.counts).filter(|(_, count)| **count > 0).map(|(target, _)| target)
    }

    /// Slots that lead elsewhere than before, in their order; nothing where that takes a look at all of them.
    pub fn differing(&self, before: &Self) -> Option<Vec<u32>> {
        let comparable = Arc::ptr_eq(&self.known, &before.known) && Arc::ptr_eq(&self.base, &before.base);
        comparable.then(|| {
            let mut slots: Vec<u32> =
                self.moved.iter().chain(&*before.moved).map(|(slot, _)| *slot).collect();
            slots.sort_unstable();
            slots.dedup();
            slots.retain(|&slot| self.place(slot as usize) != before.place(slot as usize));
            slots
        })
    }
}

impl PartialEq for Targets {
    fn eq(&self, other: &Self) -> bool {
        self.differing(other).is_some_and(|slots| slots.is_empty()) || self.iter().eq(other.iter())
    }
}

impl Eq for Targets {}

impl Index<usize> for Targets {
    type Output = Target;

    fn index(&self, slot: usize) -> &Target {
        let Some(target) = self.get(slot) else { panic!("there is no slot {slot}") };
        target
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
        Self::new(known, places)
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
    fn slots_that_moved_lead_elsewhere_and_all_others_where_they_led() {
        let known: Arc<[Target]> = vec![A, B, Target::Nobody].into();
        let base = Targets::new(Arc::clone(&known), [0, 0, 1, 1].repeat(8));
        for moved in
            [vec![], vec![(0, 1)], vec![(1, 2), (2, 0), (31, 1)], (0..32).map(|slot| (slot, 2)).collect()]
        {
            let targets = base.with_moved(moved.clone());
            let mut all: Vec<Target> = base.iter().copied().collect();
            moved.iter().for_each(|&(slot, place)| all[slot as usize] = known[usize::from(place)]);
            assert!(targets.iter().eq(&all), "{moved:?}");
            assert!((0..33).all(|slot| targets.get(slot) == all.get(slot)), "{moved:?}");
            assert!((0..32).all(|slot| targets[slot] == all[slot]), "{moved:?}");
            assert_eq!(targets, Targets::new(Arc::clone(&known), targets.places().into_owned()), "{moved:?}");
            assert_eq!(targets, Targets::from(all.clone()), "{moved:?}");
            assert_eq!(targets == base, all.iter().eq(base.iter()), "{moved:?}");
            let counted = |target: &Target| all.iter().filter(|other| *other == target).count() as u32;
            assert!(targets.counts().iter().copied().eq(known.iter().map(counted)), "{moved:?}");
        }
    }

    #[test]
    fn slots_that_differ_are_told_where_two_moved_away_from_the_same() {
        let base = Targets::new(vec![A, B], vec![0; 64]);
        let (one, other) =
            (base.with_moved(vec![(3, 1), (5, 1)]), base.with_moved(vec![(5, 1), (6, 0), (9, 1)]));
        assert_eq!(one.differing(&other), Some(vec![3, 9]));
        assert_eq!(one.differing(&base), Some(vec![3, 5]));
        assert_eq!(one.differing(&one.clone()), Some(Vec::new()));
        assert_eq!(one.differing(&Targets::new(vec![A, B], vec![0; 64])), None);
    }

    #[test]
    #[should_panic(expected = "a slot leads nowhere")]
    fn a_slot_that_leads_nowhere_is_refused() {
        Targets::new(vec![A], vec![0, 1]);
    }
}
