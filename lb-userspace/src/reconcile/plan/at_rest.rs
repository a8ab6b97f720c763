//! What plans need not look at: earlier ones left it as it should be, and nothing has changed that could change that. Who
//! carries plans out says what changes.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::places::Places;
use crate::reconcile::backends::Backends;
use crate::reconcile::desired::{Desired, DesiredSources, DesiredTable, meet};
use crate::reconcile::entries::{DesiredVip, VipKey};
use crate::reconcile::image::{Ids, Image};

#[derive(Debug, Clone, Default)]
pub struct AtRest {
    /// Tables by row, as they should be.
    tables: HashMap<u16, Arc<DesiredTable>>,
    /// Identities of backends whose old flows have another fate since, and their pools (`pool_set`).
    turned: Vec<(u64, [u64; 3])>,
    rows: Option<Rows>,
    led: Option<Led>,
}

/// Backends as they should be and are, and no others.
#[derive(Debug, Clone)]
pub struct Rows {
    pub(super) backends: Backends,
    pub(super) ids: Arc<Ids>,
    /// Ids of those whose old flows do not stay, in their order.
    pub(super) going: Vec<u16>,
}

/// VIPs and sources, and the rows of tables that VIPs lead to.
#[derive(Debug, Clone)]
pub struct Led {
    vips: Arc<BTreeMap<VipKey, DesiredVip>>,
    sources: DesiredSources,
    places: Arc<Places>,
}

impl Led {
    pub(super) fn of(desired: &Desired, places: &Arc<Places>) -> Self {
        let (vips, sources) = (Arc::clone(&desired.vips), desired.sources.clone());
        Self { vips, sources, places: Arc::clone(places) }
    }
}

/// Each turned backend is looked for in every slot of its tables.
const MOST_TURNED: usize = 4;

impl AtRest {
    /// Whether nothing is to be done of a table, whose pins may be of these pools.
    pub(super) fn holds(&self, row: u16, wanted: &Arc<DesiredTable>, pools: [u64; 3]) -> bool {
        self.table(row).is_some_and(|known| Arc::ptr_eq(known, wanted))
            && self.turned(wanted, pools).next().is_none()
    }

    /// A table as it should have been, and is, but for slots that name one of those who `turned`.
    pub(super) fn table(&self, row: u16) -> Option<&Arc<DesiredTable>> {
        self.tables.get(&row)
    }

    /// Backends that slots of a table may name, and whose old flows have another fate now.
    pub(super) fn turned(&self, wanted: &DesiredTable, pools: [u64; 3]) -> impl Iterator<Item = u64> {
        let sets = [wanted.pool_set, pools];
        let met = self.turned.iter().filter(move |(_, of)| sets.iter().any(|set| meet(*set, *of)));
        met.map(|(identity, _)| *identity)
    }

    pub(super) fn rows(&self) -> Option<&Rows> {
        self.rows.as_ref()
    }

    /// Rows of tables that VIPs lead to, where nothing is to be done of VIPs.
    pub(super) fn led(&self, desired: &Desired) -> Option<&Arc<Places>> {
        let led = self.led.as_ref()?;
        let same = Arc::ptr_eq(&led.vips, &desired.vips) && led.sources == desired.sources;
        same.then_some(&led.places)
    }

    /// Old flows of these go elsewhere now, or stay. Takes the place of what was said before.
    pub fn turn(&mut self, turned: Vec<(u64, [u64; 3])>) {
        if turned.len() > MOST_TURNED {
            (self.tables, self.turned) = (HashMap::new(), Vec::new());
        } else {
            self.turned = turned;
        }
    }

    /// Takes in that a plan has looked: it found nothing to do of these tables and VIPs, and backends are as they should be once
    /// it is carried out.
    pub fn found(
        &mut self,
        tables: impl IntoIterator<Item = (u16, Arc<DesiredTable>)>,
        rows: Option<Rows>,
        led: Option<Led>,
    ) {
        self.turned.clear();
        self.are(tables);
        self.rows = rows;
        self.led = led.or(self.led.take());
    }

    /// These are as they should be.
    pub fn are(&mut self, tables: impl IntoIterator<Item = (u16, Arc<DesiredTable>)>) {
        self.tables.extend(tables);
    }

    /// Tables that stay as they should be when `est` follows or pins of their slots are gone: what they are by hash, with
    /// pins of no other pools than they should have.
    pub fn resting(&self, image: &Image) -> Vec<(u16, Arc<DesiredTable>)> {
        let rests = |row: u16, known: &DesiredTable| {
            let state = image.table_states.get(usize::from(row));
            known.est.is_none() && state.is_some_and(|state| state.pools == known.pool_set)
        };
        let tables = self.tables.iter().filter(|(row, known)| rests(**row, known));
        tables.map(|(row, known)| (*row, Arc::clone(known))).collect()
    }

    pub fn forget_table(&mut self, row: u16) {
        self.tables.remove(&row);
    }

    pub fn forget_vips(&mut self) {
        self.led = None;
    }
}
