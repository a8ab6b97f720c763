//! Whom the connection IDs of QUIC name: a server ID under a configuration ID, for each table of a service that goes by
//! them. Knows neither numbers of tables nor ids of backends.

use std::collections::BTreeMap;

use super::desired::{identity_of, table_identity};
use crate::config::model::{Backend, Config, Pool, Service};

/// The identity of a table, a configuration ID, and a server ID.
pub type ServerName = (u64, u8, Vec<u8>);

/// The identity of the backend that each names.
pub fn servers(config: &Config) -> BTreeMap<ServerName, u64> {
    let mut servers = BTreeMap::new();
    for service in &config.services {
        let Some(quic) = service.quic else { continue };
        let pool = config.pool_of(service);
        for &protocol in &service.protocols {
            let table = table_identity(pool, protocol, service.scheduler);
            for (pool, backend) in met(config, service) {
                let Some(id) = &backend.server_id else { continue };
                // A server that is in several of the pools is met by the way of the first.
                servers
                    .entry((table, quic.config_id, id.bytes().to_vec()))
                    .or_insert_with(|| identity_of(pool, backend));
            }
        }
    }
    servers
}

/// Bytes of the server IDs that a service's packets are looked into for; 0 for none.
pub fn server_id_bytes(config: &Config, service: &Service) -> u8 {
    let id = || met(config, service).find_map(|(_, backend)| backend.server_id.as_ref());
    service.quic.and_then(|_| id()).map_or(0, |id| id.bytes().len() as u8)
}

/// Backends that the service's packets may meet, its own pool's first.
fn met<'c>(config: &'c Config, service: &Service) -> impl Iterator<Item = (&'c Pool, &'c Backend)> {
    config.levels_of(service.pool).flat_map(|level| {
        let pool = &config.pools[level];
        pool.backends.iter().map(move |backend| (pool, backend))
    })
}
