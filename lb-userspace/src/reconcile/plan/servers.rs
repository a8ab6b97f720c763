//! The part of a plan that says whom connection IDs of QUIC name.

use std::collections::{BTreeMap, HashMap};

use lb_common::quic::{MOST_SERVERS, ServerKey};

use super::{Places, PlanError, Planner};
use crate::reconcile::op::MapOp;

impl Planner<'_> {
    /// Entries that come, then those that name another backend. Returns what takes out those that go: packets may need
    /// them until no VIP leads to them.
    ///
    /// The kernel gives the memory of an element away again at once, and a packet may be about to read it. So a grace
    /// stands between what frees an element and what may take it, here and at the end of the plan.
    pub(super) fn servers(
        &mut self,
        ids: &HashMap<u64, u16>,
        places: &Places,
    ) -> Result<Vec<MapOp>, PlanError> {
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
        let gone: Vec<_> = present.keys().filter(|key| !wanted.contains_key(key)).collect();
        self.moved |= !others.is_empty() || !gone.is_empty();
        Ok(gone.into_iter().map(|key| MapOp::RemoveServer { key: *key }).collect())
    }
}
