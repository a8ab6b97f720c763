//! The part of a plan that says whom connection IDs of QUIC name.

use std::collections::{BTreeMap, HashSet};

use lb_common::quic::{MOST_SERVERS, ServerKey};

use super::{Places, PlanError, Planner, Unpinned};
use crate::reconcile::image::Ids;
use crate::reconcile::op::MapOp;

impl Planner<'_> {
    /// Entries that come, then those that name another backend. Returns what takes out those that go: packets may need
    /// them until no VIP leads to them.
    ///
    /// The kernel gives the memory of an element away again at once, and a packet may be about to read it. So a grace
    /// stands between what frees an element and what may take it, here and at the end of the plan.
    pub(super) fn servers(&mut self, ids: &Ids, places: &Places) -> Result<Vec<MapOp>, PlanError> {
        let needed = self.desired.servers.len();
        if needed > MOST_SERVERS as usize {
            return Err(PlanError::Servers { needed, limit: MOST_SERVERS });
        }
        let named = self.desired.servers.iter().flat_map(|((table, config_id, server_id), backend)| {
            let key = move |row| ServerKey::new(row, *config_id, server_id);
            places.standing_for(*table).filter_map(move |row| Some((key(row)?, *ids.get(backend)?)))
        });
        let wanted: BTreeMap<ServerKey, u16> = named.collect();
        let present = &self.image.servers;
        let differing = wanted.iter().filter(|(key, id)| present.get(key) != Some(id));
        let (others, new): (Vec<_>, Vec<_>) = differing.partition(|(key, _)| present.contains_key(key));
        let set = |(key, id): (&ServerKey, &u16)| MapOp::SetServer { key: *key, id: *id };
        self.add.extend(new.into_iter().map(set));
        for (index, other) in others.iter().enumerate() {
            if index > 0 {
                self.add.push(MapOp::Grace);
            }
            self.add.push(set(*other));
        }
        if present.is_empty() {
            return Ok(Vec::new());
        }
        let held = self.held(ids);
        let live: HashSet<u16> = places.rows.iter().map(|(row, _)| *row).collect();
        let gone: Vec<_> = present
            .iter()
            .filter(|(key, id)| {
                let stays = held.contains(id) && live.contains(&key.table());
                !wanted.contains_key(key) && !stays
            })
            .map(|(key, _)| key)
            .collect();
        self.moved |= !others.is_empty() || !gone.is_empty();
        Ok(gone.into_iter().map(|key| MapOp::RemoveServer { key: *key }).collect())
    }

    /// Backends that are in no configuration any more, and that flows may live on.
    fn held(&self, ids: &Ids) -> HashSet<u16> {
        let known: HashSet<u16> = ids.values().copied().collect();
        let rows = (0u16..).zip(&self.image.backends).filter(|(_, row)| row.identity != 0);
        let leaving = rows.map(|(id, _)| id).filter(|id| !known.contains(id));
        leaving
            .filter(|id| match &self.leave.unpinned {
                Unpinned::All => false,
                Unpinned::Ids(unpinned) => !unpinned.contains(id),
            })
            .collect()
    }
}
