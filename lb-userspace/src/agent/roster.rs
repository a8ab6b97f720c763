//! The backends of the configuration in effect, one after the other, with what follows from it and is asked for again and
//! again. Knows neither health nor maps.

use std::sync::Arc;

use super::core::{BackendKey, keys};
use crate::config::model::Config;
use crate::reconcile::desired::{BackendRef, Desired, World, pool_set};
use crate::reconcile::draft::Draft;

/// A backend of a configuration.
#[derive(Debug)]
pub struct Seat {
    pub key: BackendKey,
    pub at: BackendRef,
    /// The set of pools (`pool_set`) with its own.
    pub pools: [u64; 3],
}

/// In the order of [`keys`].
#[derive(Debug)]
pub struct Roster {
    config: Arc<Config>,
    pub seats: Vec<Seat>,
    /// Where the backends of each pool begin.
    firsts: Vec<usize>,
    draft: Draft,
}

impl Roster {
    pub fn of(config: &Arc<Config>) -> Self {
        Self::with(config, Draft::of(config))
    }

    /// Of another configuration: what both have is not worked out again.
    pub fn after(config: &Arc<Config>, before: &Self) -> Self {
        Self::with(config, Draft::after(config, Some(&before.draft)))
    }

    fn with(config: &Arc<Config>, draft: Draft) -> Self {
        let sets: Vec<[u64; 3]> = config.pools.iter().map(|pool| pool_set([pool.name.as_str()])).collect();
        let seat = |(key, pool, backend): (BackendKey, usize, usize)| Seat {
            key,
            at: (pool, backend),
            pools: sets[pool],
        };
        let firsts = config.pools.iter().scan(0, |next, pool| {
            let first = *next;
            *next += pool.backends.len();
            Some(first)
        });
        let seats = keys(config).map(seat).collect();
        Self { config: Arc::clone(config), seats, firsts: firsts.collect(), draft }
    }

    /// Whether it is that of this very configuration.
    pub fn is_of(&self, config: &Arc<Config>) -> bool {
        Arc::ptr_eq(&self.config, config)
    }

    /// The place among the seats of a backend.
    pub fn place(&self, (pool, backend): BackendRef) -> usize {
        self.firsts[pool] + backend
    }

    /// As many backends and tables as there are to be room for.
    pub fn least(&self) -> Desired {
        self.draft.least(&self.config)
    }

    /// The maps as they should be.
    pub fn desired(&mut self, world: &World) -> Desired {
        self.draft.desired(&self.config, world)
    }
}
