//! What the agent tells of frames that it is asked about: the packet path's decision on its tables, with the names
//! that its configuration has. Changes nothing.

use std::collections::{HashMap, HashSet};

use super::core::Core;
use crate::config::model::Backend;
use crate::lookup::{self, Explanation, Given, interfaces};
use crate::reconcile::desired::{identity_of, protocol_number};

/// Frames, in the order of the answer.
#[derive(Debug)]
pub struct Question {
    pub frames: Vec<Given>,
    /// Where they come in; by default the first interface.
    pub interface: Option<String>,
}

impl Core {
    pub fn lookup(&self, question: &Question) -> Result<Vec<Explanation>, String> {
        let ingress = self.ingress(question.interface.as_deref())?;
        let told = question.frames.iter().map(|given| lookup::explain(&self.image, given, ingress));
        let mut told: Vec<Explanation> = told.collect();
        interfaces::put_names(&mut told);
        let services = self.services_of(&told);
        for told in &mut told {
            told.service = told.service_row.and_then(|row| services.get(&row).cloned());
            self.name_backend(told);
        }
        Ok(told)
    }

    fn ingress(&self, name: Option<&str>) -> Result<u32, String> {
        let Some(name) = name else {
            return Ok(self.attached.first().map_or(0, |attached| attached.ifindex));
        };
        let found = self.attached.iter().find(|attached| attached.name == name || attached.interface == name);
        found.map(|attached| attached.ifindex).ok_or_else(|| {
            let names = interfaces::names(self.attached.iter().map(|attached| attached.ifindex));
            format!("xlb is not on an interface {name}; name one that it is on: {names}")
        })
    }

    /// Names of the services that were met, by the rows of their counters.
    fn services_of(&self, told: &[Explanation]) -> HashMap<u32, String> {
        let met: HashSet<u32> = told.iter().filter_map(|told| told.service_row).collect();
        let mut names = HashMap::new();
        if met.is_empty() {
            return names;
        }
        let index = self.index();
        for service in &self.config.services {
            for (vip, port, protocol) in service.triples() {
                let row = index.vips.get(&(vip, port, protocol_number(protocol)));
                let row = row.filter(|row| met.contains(row));
                names.extend(row.map(|row| (*row, service.name.clone())));
            }
        }
        names
    }

    fn name_backend(&self, told: &mut Explanation) {
        let row = told.backend_id.and_then(|id| self.image.backends.get(usize::from(id)));
        let Some((identity, address)) = row.map(|row| row.identity).zip(told.backend_address) else { return };
        for pool in &self.config.pools {
            let is_it =
                |backend: &&Backend| backend.address == address && identity_of(pool, backend) == identity;
            if let Some(backend) = pool.backends.iter().find(is_it) {
                (told.pool, told.backend) = (Some(pool.name.clone()), Some(backend.name.clone()));
            }
        }
    }
}
