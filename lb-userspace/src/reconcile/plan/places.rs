//! Which row of tables each service goes by. A service that is pointed at another pool takes a private copy of the
//! table it had along, which then moves like any other; it goes by the shared table again once the two are equal.

use std::collections::{BTreeMap, HashMap, HashSet};

use lb_common::abi::{SLOTS_PER_ROW, TableState, TableWord, VipTarget};
use lb_common::flow::fingerprint;
use lb_common::slots::Slot;

use super::vips::counted_targets;
use super::{PlanError, Planner, Regions, VipMap};
use crate::reconcile::entries::{Counted, DesiredVip, Lead};
use crate::reconcile::image::Image;
use crate::reconcile::op::MapOp;

/// Rows of tables, by number.
#[derive(Debug, Default)]
pub struct Places {
    /// By identity.
    shared: HashMap<u64, u16>,
    /// Of services that do not go by the shared one.
    own: HashMap<Counted, u16>,
    /// All rows that some service goes by, with what they are.
    pub rows: Vec<(u16, u64)>,
}

impl Places {
    pub fn of(&self, lead: &Lead) -> u16 {
        self.own.get(&lead.counted).or_else(|| self.shared.get(&lead.table)).copied().unwrap_or_default()
    }

    /// Whether all services go by shared tables.
    pub fn are_shared(&self) -> bool {
        self.own.is_empty()
    }

    /// Rows that stand for an identity.
    pub fn standing_for(&self, identity: u64) -> impl Iterator<Item = u16> + '_ {
        self.rows.iter().filter(move |(_, of)| *of == identity).map(|(row, _)| *row)
    }
}

/// What of a lead's flags decides the hash of its flows.
const HASHED: u16 = VipTarget::SOURCE_HASH | VipTarget::prefix_cut(0x7f);

impl Planner<'_> {
    /// Finds or makes the rows. Tables that nobody goes by any more are removed.
    pub(super) fn places(&mut self, present: &VipMap, regions: &mut Regions) -> Result<Places, PlanError> {
        let image = self.image;
        let state = |row: u16| &image.table_states[usize::from(row)];
        let before = counted_targets(present);
        let mut places = Places::default();
        for (row, state) in (0u16..).zip(&image.table_states) {
            if state.identity != 0 && state.origin == 0 && self.desired.tables.contains_key(&state.identity) {
                places.shared.entry(state.identity).or_insert(row);
            }
        }
        let leads: BTreeMap<Counted, Lead> = leads(self.desired.vips.values());
        let by = |counted: &Counted, lead: &Lead| {
            let target = before.get(counted).filter(|target| target.flags() & HASHED == lead.flags & HASHED);
            target.map(|target| target.table()).filter(|row| state(*row).identity != 0)
        };
        // Where all rows of an identity are copies, the others join the first.
        let standing: BTreeMap<u16, u64> = leads
            .iter()
            .filter_map(|(counted, lead)| by(counted, lead).map(|row| (row, lead.table)))
            .filter(|(row, identity)| state(*row).identity == *identity)
            .collect();
        for (row, identity) in standing {
            places.shared.entry(identity).or_insert(row);
        }
        let mut free = free_rows(image);
        // By the row they come from and what they become.
        let mut copies: HashMap<(u16, u64), u16> = HashMap::new();
        let mut used: HashSet<u16> = HashSet::new();
        for (counted, lead) in &leads {
            let Some(row) = by(counted, lead) else { continue };
            let shared = places.shared.get(&lead.table).copied();
            if Some(row) == shared {
                continue;
            }
            let stands = state(row).identity == lead.table;
            if stands && shared.is_some_and(|shared| equal(image, row, shared)) {
                continue;
            }
            let own = if stands {
                row
            } else if let Some(copy) = copies.get(&(row, lead.table)) {
                *copy
            } else {
                let copy = self.copy(row, lead.table, &mut free, regions)?;
                copies.insert((row, lead.table), copy);
                copy
            };
            places.own.insert(*counted, own);
            used.insert(own);
        }
        let needed = self.desired.tables.len();
        let limit = self.capacity.tables;
        let direct: HashSet<u64> = leads
            .iter()
            .filter(|(counted, _)| !places.own.contains_key(counted))
            .map(|(_, lead)| lead.table)
            .collect();
        places.shared.retain(|identity, _| direct.contains(identity));
        for identity in direct {
            if let std::collections::hash_map::Entry::Vacant(place) = places.shared.entry(identity) {
                let row = free.pop().ok_or(PlanError::Tables { needed, limit })?;
                let pools = self.desired.tables[&identity].pool_set;
                let state = TableState { identity, pools, ..TableState::default() };
                self.add.push(MapOp::WriteTableState { table: row, state });
                place.insert(row);
            }
        }
        places.rows = places.shared.iter().map(|(identity, row)| (*row, *identity)).collect();
        for (counted, row) in &places.own {
            let row = (*row, leads[counted].table);
            if !places.rows.contains(&row) {
                places.rows.push(row);
            }
        }
        places.rows.sort_unstable();
        used.extend(places.shared.values());
        for (row, state) in (0u16..).zip(&image.table_states) {
            let empty = state.identity == 0 && image.tables[usize::from(row)] == 0;
            if !empty && !used.contains(&row) {
                self.remove.push(MapOp::WriteTableState { table: row, state: TableState::default() });
                self.remove.push(MapOp::SetTableWord { table: row, word: TableWord::default() });
            }
        }
        Ok(places)
    }

    /// An exact copy of a table, under another identity.
    fn copy(
        &mut self,
        from: u16,
        identity: u64,
        free: &mut Vec<u16>,
        regions: &mut Regions,
    ) -> Result<u16, PlanError> {
        let (limit, needed) = (self.capacity.tables, self.desired.tables.len() + 1);
        let row = free.pop().ok_or(PlanError::Tables { needed, limit })?;
        let before = &self.image.table_states[usize::from(from)];
        let wanted = &self.desired.tables[&identity];
        let pools = [0, 1, 2].map(|word| before.pools[word] | wanted.pool_set[word]);
        let origin = fingerprint(4, &before.identity.to_le_bytes()).max(1);
        let state = TableState { identity, origin, pools, ..TableState::default() };
        self.add.push(MapOp::WriteTableState { table: row, state });
        let word = TableWord::from_bits(self.image.tables[usize::from(from)]);
        let first_row = self.place(word.log2_length(), regions)?;
        self.add.push(MapOp::WriteSlots { first: first_row * SLOTS_PER_ROW, words: words(self.image, from) });
        let word = TableWord::new(first_row, word.log2_length(), wanted.discipline);
        self.add.push(MapOp::SetTableWord { table: row, word });
        self.copied.insert(row, from);
        Ok(row)
    }
}

/// The words of a table, in order.
pub(super) fn words(image: &Image, row: u16) -> Vec<u32> {
    let word = TableWord::from_bits(image.tables[usize::from(row)]);
    let first = word.first_row() * SLOTS_PER_ROW;
    (first..first + word.length()).map(|index| image.slot(index).bits()).collect()
}

/// Whether two tables are at rest and lead every flow to the same backend. Of tables that pin every flow no slot is ever
/// clean: they rest where new flows go to the same backends and old ones do.
fn equal(image: &Image, one: u16, other: u16) -> bool {
    let pins_all = |row: u16| TableWord::from_bits(image.tables[usize::from(row)]).discipline().pins_all();
    let both_pin_all = pins_all(one) && pins_all(other);
    let (one, other) = (words(image, one), words(image, other));
    let longest = one.len().max(other.len());
    let at = |words: &[u32], index: usize| Slot::from_bits(words[index * words.len() / longest]);
    let rests = |slot: Slot| slot.is_clean() || both_pin_all;
    !one.is_empty()
        && !other.is_empty()
        && (0..longest).all(|index| rests(at(&one, index)) && at(&one, index) == at(&other, index))
}

fn free_rows(image: &Image) -> Vec<u16> {
    let rows = (0u16..).zip(&image.table_states).zip(&image.tables);
    let free = rows.filter(|((_, state), word)| state.identity == 0 && **word == 0);
    let mut free: Vec<u16> = free.map(|((row, _), _)| row).collect();
    free.reverse();
    free
}

fn leads<'v>(vips: impl Iterator<Item = &'v DesiredVip>) -> BTreeMap<Counted, Lead> {
    let all = vips.flat_map(|vip| match vip {
        DesiredVip::Service(lead) => vec![*lead],
        DesiredVip::Address { rules, .. } => rules.iter().map(|rule| rule.lead).collect(),
        DesiredVip::Source => Vec::new(),
    });
    all.map(|lead| (lead.counted, lead)).collect()
}
