//! Another configuration takes the place of the one in force: program, maps, interfaces, health and tables, in an order that
//! no packet notices.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::Context;
use lb_common::abi::{Pin, Source, TableState};
use rustc_hash::FxHashMap;
use tracing::{info, warn};

use super::changed::Changed;
use super::commands::Held;
use super::core::{BackendKey, Core, NextHops, ReconcileError, keys, preflight};
use super::interfaces::{self, Wanted};
use super::own;
use super::roster::Roster;
use crate::bpf::{Datapath, DatapathError, Maps, MapsError, RowPairs};
use crate::capacity::Capacity;
use crate::config::model::{CheckKind, Config, Limits};
use crate::health::{Fsm, Probe};
use crate::nexthop::Resolver;
use crate::reconcile::connections;
use crate::reconcile::desired::{Desired, LoadTime, World, desired, ways_to};
use crate::reconcile::image::Image;
use crate::reconcile::op::MapOp;
use crate::reconcile::pins::coarse_ns;
use crate::reconcile::plan::sources;
use crate::reconcile::plan::{PlanError, carried, check_room, counter_rows, image_of, present_vips};
use crate::reconcile::repin::{Spread, copy, renew};

/// What the maps are for another configuration than this one, whose connections lie in the image.
pub fn capacity_for(config: &Config, before: &Config, image: &Image) -> Capacity {
    let connections = if keeps(config, image) { &before.limits } else { &config.limits }.connections;
    Capacity::new(&Limits { connections, ..config.limits })
}

/// Whether a configuration translates nothing any more while there still are connections.
fn keeps(config: &Config, image: &Image) -> bool {
    let free = |word: &AtomicU64| Pin::from_bits(word.load(Ordering::Relaxed)).is_free();
    config.limits.connections == 0 && !image.connections.words().iter().all(free)
}

impl Core {
    /// Takes over another configuration, or leaves everything as it is. `first` is what backends said
    /// whose health was not known.
    pub async fn reload(
        &mut self,
        mut file: Config,
        first: &[(BackendKey, Probe)],
        found: NextHops,
        resolver: &Resolver,
    ) -> anyhow::Result<()> {
        let own = own::prepare(&mut file, resolver).await?;
        let (Held { overrides, mut config }, ended, cut) = self.with_file(&file);
        self.keep_connections(&mut config);
        let capacity = Capacity::new(&config.limits);
        let same_maps = capacity == *self.datapath.capacity();
        let config = Arc::new(config);
        let roster = Roster::after(&config, &self.roster);
        let asked = roster.least();
        // What somebody else wrote into them is undone, or left behind.
        self.image = self.datapath.maps.image()?;
        self.tracking.look_again(&self.image);
        self.index.take();
        // Beside what is in use there may be less room than in empty maps.
        if same_maps {
            // What does not fit into empty maps either is told as that.
            check_room(&self.image, &asked, &capacity)
                .or_else(|error| preflight(&config, &capacity).and(Err(error)))?;
        } else {
            preflight(&config, &capacity)?;
            fit(&self.image, &asked, &capacity).context(NO_ROOM)?;
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
        let before = (before, self.file.clone(), self.overrides.clone(), self.own.clone());
        let known = std::mem::take(&mut self.fsms);
        let previous = std::mem::replace(&mut self.config, config);
        self.roster = roster;
        (self.file, self.overrides, self.own) = (Arc::new(file), overrides, own);
        self.fsms = self.carry_over(&previous, known);
        let is_up = |key: &BackendKey| self.fsms.get(key).is_some_and(Fsm::is_up);
        self.steering.reload(Instant::now(), &previous, &self.config, is_up);
        self.transitions.retain(|key, _| self.fsms.contains_key(key));
        self.changed = Changed::All;
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
            ((self.config, self.fsms, self.next_hops, self.steering), self.file, self.overrides, self.own) =
                before;
            self.changed = Changed::All;
            return Err(error);
        }
        self.start_checks();
        self.file_in_effect(&ended, &cut);
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

    /// A configuration that translates nothing any more still has what its connections need, as long as there are any.
    fn keep_connections(&self, config: &mut Config) {
        if keeps(config, &self.image) {
            config.limits.connections = self.config.limits.connections;
            config.sources = self.config.sources.clone();
        }
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

    /// Carries everything over to new maps of another size and turns the interfaces over to them, one after the other; then
    /// brings in what differs. No pin is made from before the first pin is copied until after the last interface: a packet
    /// meets the old tables or the new ones, which lead it to the same backend.
    async fn turn_over(
        &mut self,
        capacity: Capacity,
        wanted: &Wanted,
        resolver: &Resolver,
    ) -> anyhow::Result<()> {
        let old = LoadTime::of_meta(self.datapath.meta());
        let mut next = self.datapath.renewed(capacity, LoadTime::of(&self.config).with(old.features))?;
        let image = match carry(&mut next, &mut self.datapath.maps, &self.image) {
            Ok(image) => with_sources(&mut next, image, &desired(&self.config, &World::default()))?,
            Err(error) => {
                set_closing(&mut self.datapath.maps, &self.image, 0)?;
                self.begin_tracking()?;
                next.abandon()?;
                return Err(error);
            }
        };
        let mut old = std::mem::replace(&mut self.datapath, next);
        if let Err(error) = self.attach(wanted) {
            let failed = std::mem::replace(&mut self.datapath, old);
            let before = self.carrying(resolver).await;
            let attached = self.attach(&before);
            set_closing(&mut self.datapath.maps, &self.image, 0)?;
            self.begin_tracking()?;
            attached?;
            failed.abandon()?;
            return Err(error.into());
        }
        self.take_over(image, &mut old.maps)?;
        self.datapath.retire_others()?;
        self.reconcile().context("the tables cannot be written")
    }

    /// All interfaces go by new maps, in which `image` lies: their tables thaw.
    pub(super) fn take_over(&mut self, image: Image, before: &mut Maps) -> Result<(), ReconcileError> {
        // Of packets that began with the old program.
        before.apply(&MapOp::Grace)?;
        let (old, now) = (before.pins(), Pin::age_of(coarse_ns()));
        renew(old.words(), image.pins.words(), now);
        connections::renew(&before.connections(), &image.connections, now);
        let spread =
            Spread::of(self.tracking.spread.take(), old.words().len(), image.pins.words().len(), now);
        self.image = Image { meta: *self.datapath.meta(), ..image };
        self.index.take();
        // Ids are the same.
        let found = std::mem::take(&mut self.tracking.found);
        self.begin_tracking()?;
        (self.tracking.found, self.tracking.spread) = (found, spread);
        self.changed = Changed::All;
        info!("new maps are in force; counters go on, flows stay where they are");
        Ok(())
    }

    /// Goes on, over new maps, where the tables of an earlier agent are; false where these do not fit, and nothing is done.
    pub(super) fn begin_as_before(
        &mut self,
        image: &Image,
        maps: &mut Maps,
        wanted: &Wanted,
    ) -> anyhow::Result<bool> {
        let asked = desired(&self.config, &World::default());
        if let Err(reason) = fit(image, &asked, self.datapath.capacity()) {
            warn!(%reason, "the earlier agent's tables do not fit the new limits; flows that are pinned go where their slots lead");
            return Ok(false);
        }
        let carried = carry(&mut self.datapath, maps, image)?;
        if let Err(error) = self.attach(wanted) {
            set_closing(maps, image, 0)?;
            set_closing(&mut self.datapath.maps, &carried, 0)?;
            return Err(error.into());
        }
        self.take_over(carried, maps)?;
        Ok(true)
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
    fn carry_over(
        &self,
        previous: &Config,
        mut known: FxHashMap<BackendKey, Fsm>,
    ) -> FxHashMap<BackendKey, Fsm> {
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

const NO_ROOM: &str = "the new limits must hold what is in use now as well; raise them, or take it out of the file and reload before they change";

/// Whether what is desired fits beside what lies in an image, in maps of this size.
pub(super) fn fit(image: &Image, wanted: &Desired, capacity: &Capacity) -> Result<(), PlanError> {
    let beside = image_of(&carried(image, capacity)?, capacity, image.meta);
    check_room(&beside, wanted, capacity)
}

/// Puts what lies in the maps before, with `from` in them, into new ones beside them, and freezes the tables of both. Returns
/// what lies in the new ones then.
pub(super) fn carry(next: &mut Datapath, before: &mut Maps, from: &Image) -> anyhow::Result<Image> {
    let ops = carried(from, next.capacity())?;
    for op in &ops {
        next.maps.apply(op)?;
    }
    let (pins, connections) = (next.maps.pins(), next.maps.connections());
    let image = Image { pins, connections, ..image_of(&ops, next.capacity(), *next.meta()) };
    inherit(next, before, from, &image)?;
    set_closing(before, from, TableState::FROZEN)?;
    let copied = copy(before.pins().words(), image.pins.words(), Pin::age_of(coarse_ns()));
    if copied.dropped > 0 {
        warn!(
            pins = copied.from,
            dropped = copied.dropped,
            "there is no room for all pins; those that were silent for longest are gone, and their flows go where their slots lead"
        );
    }
    let moved = connections::copy(&before.connections(), &image.connections);
    if moved.dropped > 0 {
        let connections::Copied { from, dropped } = moved;
        warn!(
            connections = from,
            dropped, "there are fewer places for connections than before; those beyond them end"
        );
    }
    for (_, id) in image.ids() {
        next.maps.set_active(id, before.active(id));
    }
    next.complete();
    Ok(image)
}

/// Fills rows of sources that are new: packets take their ports from the first on.
fn with_sources(next: &mut Datapath, mut image: Image, wanted: &Desired) -> Result<Image, MapsError> {
    let rows = sources::place(&image, wanted);
    for (row, source) in (0u16..).zip(rows) {
        if image.sources[usize::from(row)] == Source::default() && source != Source::default() {
            let op = MapOp::WriteSource { row, source };
            next.maps.apply(&op)?;
            image.apply(&op);
        }
    }
    Ok(image)
}

/// Freezes all tables, or thaws them. No packet goes by what was before.
pub(super) fn set_closing(maps: &mut Maps, image: &Image, closing: u64) -> Result<(), MapsError> {
    for (table, _) in (0u16..).zip(&image.tables).filter(|(_, word)| **word != 0) {
        maps.apply(&MapOp::SetClosing { table, closing })?;
    }
    maps.apply(&MapOp::Grace)?;
    Ok(())
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
