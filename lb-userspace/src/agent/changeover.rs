//! Another configuration takes the place of the one in force: program, maps, interfaces, health and tables, in an order that
//! no packet notices.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use tracing::{info, warn};

use super::commands::Held;
use super::core::{BackendKey, Core, NextHops, keys, preflight};
use super::interfaces::{self, Wanted};
use crate::bpf::{Datapath, DatapathError, Maps, MapsError, RowPairs};
use crate::capacity::Capacity;
use crate::config::model::{CheckKind, Config};
use crate::health::{Fsm, Probe};
use crate::nexthop::Resolver;
use crate::reconcile::desired::{LoadTime, World, desired, ways_to};
use crate::reconcile::image::Image;
use crate::reconcile::plan::{counter_rows, plan_at_once, present_vips};

impl Core {
    /// Takes over another configuration, or leaves everything as it is. `first` is what backends said
    /// whose health was not known.
    pub async fn reload(
        &mut self,
        file: Config,
        first: &[(BackendKey, Probe)],
        found: NextHops,
        resolver: &Resolver,
    ) -> anyhow::Result<()> {
        let (Held { overrides, config }, ended) = self.with_file(&file);
        let capacity = Capacity::new(&config.limits);
        let same_maps = capacity == *self.datapath.capacity();
        preflight(&config, &capacity)?;
        if same_maps {
            // What somebody else wrote into them is undone.
            self.image = self.datapath.maps.image()?;
            self.index.take();
            // Beside what is in use there may be less room than in empty maps.
            plan_at_once(&self.image, &desired(&config, &World::default()), &capacity)?;
        }
        interfaces::refuse_local_vips(&config, resolver).await?;
        let wanted = Wanted::look_up(&config, &mut self.links, resolver).await?;
        if config.seed != self.config.seed {
            warn!("the seed changed: flows move to other backends");
        }
        if same_maps {
            self.widen(&config, &wanted, resolver).await?;
        }

        let before = (self.config.clone(), self.fsms.clone(), self.next_hops.clone(), self.steering.clone());
        let before = (before, self.file.clone(), self.overrides.clone());
        let known = std::mem::take(&mut self.fsms);
        let previous = std::mem::replace(&mut self.config, Arc::new(config));
        (self.file, self.overrides) = (Arc::new(file), overrides);
        self.fsms = self.carry_over(&previous, known);
        let is_up = |key: &BackendKey| self.fsms.get(key).is_some_and(Fsm::is_up);
        self.steering.reload(Instant::now(), &previous, &self.config, is_up);
        self.transitions.retain(|key, _| self.fsms.contains_key(key));
        self.changed = true;
        self.on_first_look(found);
        for (key, probe) in first {
            self.on_probe(Instant::now(), key, probe);
        }
        let taken = if same_maps {
            self.reconcile().context("the tables cannot be written")
        } else {
            self.turn_over(capacity, &wanted, resolver).await
        };
        if let Err(error) = taken {
            ((self.config, self.fsms, self.next_hops, self.steering), self.file, self.overrides) = before;
            self.changed = true;
            return Err(error);
        }
        self.start_checks();
        self.file_in_effect(&ended);
        if let Err(error) = self.let_leavers_go() {
            warn!(error = %format!("{:#}", anyhow::Error::from(error)), "the tables are not up to date; trying again with the next event");
        }
        // The configuration is in force: what is left of the one before does no harm, and goes with the next reload.
        if let Err(error) = self.detach_others(&wanted) {
            warn!(error = %format!("{error:#}"), "interfaces that are no longer configured stay attached");
        }
        if let Err(error) = self.settle(resolver).await {
            warn!(error = %format!("{error:#}"), "the program keeps features that nothing needs");
        }
        self.note_reload(Ok(()));
        Ok(())
    }

    /// The program that can do what the old tables and the new ones need, on every interface.
    async fn widen(
        &mut self,
        config: &Config,
        wanted: &Wanted,
        resolver: &Resolver,
    ) -> Result<(), DatapathError> {
        let old = LoadTime::of_meta(self.datapath.meta());
        self.refit(LoadTime::of(config).with(old.features))?;
        if let Err(error) = self.attach(wanted) {
            // Interfaces that were swapped already go back to the program that they had.
            let before = self.carrying(resolver).await;
            self.refit(old)?;
            self.attach(&before)?;
            return Err(error);
        }
        Ok(())
    }

    /// Fills new maps of another size beside those in use and turns the interfaces over to them, one after the other: a
    /// packet meets the old tables or the new ones, which lead it to the same backends.
    async fn turn_over(
        &mut self,
        capacity: Capacity,
        wanted: &Wanted,
        resolver: &Resolver,
    ) -> anyhow::Result<()> {
        let mut next = self.datapath.renewed(capacity, LoadTime::of(&self.config))?;
        let world = self.steered_world(Instant::now());
        let image = match self.fill(&mut next, &world) {
            Ok(image) => image,
            Err(error) => {
                next.abandon()?;
                return Err(error);
            }
        };
        let old = std::mem::replace(&mut self.datapath, next);
        if let Err(error) = self.attach(wanted) {
            let failed = std::mem::replace(&mut self.datapath, old);
            let before = self.carrying(resolver).await;
            self.attach(&before)?;
            failed.abandon()?;
            return Err(error.into());
        }
        self.image = image;
        self.index.take();
        self.begin_tracking()?;
        // Which next hops can be used depends on the interfaces that are attached now.
        self.changed = true;
        self.datapath.retire_others()?;
        info!("new maps are in force; counters go on, flows stay where they are");
        Ok(())
    }

    /// Puts tables and counters into new maps. Returns what lies there then.
    fn fill(&self, next: &mut Datapath, world: &World) -> anyhow::Result<Image> {
        let mut image = next.maps.image()?;
        for op in plan_at_once(&image, &desired(&self.config, world), next.capacity())? {
            next.maps.apply(&op)?;
            image.apply(&op);
        }
        inherit(next, &self.datapath.maps, &self.image, &image)?;
        next.complete();
        Ok(Image { meta: *next.meta(), ..image })
    }

    /// Takes features out of the program that only the tables of before needed.
    pub async fn settle(&mut self, resolver: &Resolver) -> anyhow::Result<()> {
        if self.refit(LoadTime::of(&self.config).with(ways_to(&self.image.backends)))? {
            let wanted = Wanted::look_up(&self.config, &mut self.links, resolver).await?;
            self.attach(&wanted)?;
        }
        Ok(())
    }

    fn refit(&mut self, load_time: LoadTime) -> Result<bool, DatapathError> {
        let refitted = self.datapath.refit(load_time)?;
        self.image.meta = *self.datapath.meta();
        Ok(refitted)
    }

    /// Health of backends that stay; a new backend has to answer first.
    fn carry_over(&self, previous: &Config, mut known: HashMap<BackendKey, Fsm>) -> HashMap<BackendKey, Fsm> {
        let old_kinds: HashMap<&str, &CheckKind> =
            previous.pools.iter().map(|pool| (pool.name.as_str(), &pool.check.kind)).collect();
        let now = Instant::now();
        keys(&self.config)
            .map(|(key, pool, _)| {
                let check = &self.config.pools[pool].check;
                let mut fsm = known.remove(&key).unwrap_or_else(|| Fsm::new(check.rise, check.fall));
                fsm.set_thresholds(check.rise, check.fall);
                // Not checked is up; what another kind of check then says counts from anew.
                let unchecked_before = old_kinds.get(key.pool.as_str()) == Some(&&CheckKind::None);
                if check.kind == CheckKind::None {
                    fsm = Fsm::adopted(true, now, check.rise, check.fall);
                } else if unchecked_before {
                    fsm = Fsm::adopted(fsm.is_up(), now, check.rise, check.fall);
                }
                (key, fsm)
            })
            .collect()
    }
}

/// Gives new maps, in which `to` lies, what the maps before, with `from` in them, have counted.
pub(super) fn inherit(next: &mut Datapath, before: &Maps, from: &Image, to: &Image) -> Result<(), MapsError> {
    let (vips, backends) = same_rows(from, to);
    next.maps.inherit(before, &vips, &backends)
}

/// Counter rows that stand for the same in two sets of tables: of VIPs, and of backends, from and to.
fn same_rows(from: &Image, to: &Image) -> (RowPairs, RowPairs) {
    let rows = |image| counter_rows(&present_vips(image));
    let (old_vips, new_vips) = (rows(from), rows(to));
    let vips = new_vips.iter().filter_map(|(counted, row)| Some((*old_vips.get(counted)?, *row)));
    let old_ids = from.ids();
    let new_ids = to.ids();
    let backends = new_ids.iter().filter_map(|(identity, id)| {
        let old = old_ids.get(identity)?;
        Some((u32::from(*old), u32::from(*id)))
    });
    (vips.collect(), backends.collect())
}
