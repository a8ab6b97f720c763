//! Whether connection IDs of QUIC name whom the configuration says.

use std::collections::BTreeSet;

use lb_common::quic::ServerKey;

use super::{Difference, NONE, Names};
use crate::lookup;
use crate::reconcile::image::Image;

pub(super) fn compare(intended: &Image, found: &Image, names: &Names, differences: &mut Vec<Difference>) {
    let all: BTreeSet<&ServerKey> = intended.servers.keys().chain(found.servers.keys()).collect();
    for key in all {
        let named = |image: &Image| {
            let row = image.servers.get(key).and_then(|id| image.backends.get(usize::from(*id)));
            row.map_or(NONE.to_owned(), |row| names.backend(row.identity, Some(row)))
        };
        let (to, from) = (named(intended), named(found));
        if to != from {
            let table = found.table_states.get(usize::from(key.table())).map_or(0, |row| row.identity);
            let id = lookup::server_id(key);
            let what = format!("{}: server ID {id}, configuration {}", names.table(table), key.config_id());
            differences.push(Difference::new(what, to, from));
        }
    }
}
