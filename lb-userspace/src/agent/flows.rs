//! What the core knows of flows by their backends: those that are left of one, and connections, which it takes out when it is
//! asked to.

use std::time::Instant;

use lb_common::abi::Backend as Row;
use lb_common::wire::PROTO_UDP;
use tracing::info;

use super::connections::{Filter, flush};
use super::core::Core;
use super::snapshot::{ConnectionCounts, ConnectionsStatus, Remaining};
use crate::config::model::{Backend, Pool};
use crate::reconcile::desired::identity_of;

impl Core {
    /// Takes connections out, as packets and sweeps do it.
    pub fn flush(&self, filter: &Filter) -> Result<u64, String> {
        let flushed = flush(&self.image.connections, self.index(), Some(&self.config), filter)?;
        info!(connections = flushed, ?filter, "connections flushed by command");
        Ok(flushed)
    }

    pub(super) fn connections_status(&self) -> Option<ConnectionsStatus> {
        let room = self.image.connections.len() as u64;
        (room > 0).then_some(ConnectionsStatus { connections: self.tracking.found.connections, room })
    }

    /// What still names a backend.
    pub(super) fn remaining_of(&self, pool: &Pool, backend: &Backend) -> Remaining {
        let identity = identity_of(pool, backend);
        self.index().ids.get(&identity).map_or_else(Remaining::default, |id| self.remaining(*id))
    }

    /// Connections of a backend, where its pool has any.
    pub(super) fn connections_of(&self, pool: &Pool, backend: &Backend) -> Option<ConnectionCounts> {
        let id = self.index().ids.get(&identity_of(pool, backend));
        let counts = || id.map_or([0; 4], |&id| self.tracking.found.of(id).connections);
        pool.forward.translates().then(|| ConnectionCounts::of(counts()))
    }

    /// What still names an id.
    pub fn remaining(&self, id: u16) -> Remaining {
        let (slots_new, slots_old) = self.index().slots(id);
        let pins = u64::from(self.tracking.found.of(id).active);
        let udp = self.tracking.desired.tables.values().filter(|table| table.protocol == PROTO_UDP);
        let idle = udp.map(|table| table.idle).max().unwrap_or_default();
        let emptied = self.image.backends.get(usize::from(id)).is_some_and(Row::is_emptied);
        let quic = !emptied && self.named.gets(Instant::now(), id, idle);
        Remaining { pins, slots_new, slots_old, quic, uncounted: !self.tracking.is_counted(id) }
    }
}
