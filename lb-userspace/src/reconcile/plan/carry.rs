//! What lies in one set of maps, put into another of another size: the same backends under the same ids, the same
//! slots and VIPs. It knows no configuration; an ordinary plan goes on from there.
//!
//! Tables and rows of counters are numbered anew, without gaps: so what fits by its count fits. Pins are not part of
//! it: they change meanwhile (`repin`).

use std::collections::{BTreeSet, HashMap};

use lb_common::abi::{
    BACKEND_NOBODY, BACKEND_PASS, Backend, Egress, Meta, PortRule, SLOTS_PER_ROW, Source, TableState,
    TableWord, VipTarget,
};
use lb_common::quic::ServerKey;

use super::places::words;
use super::vips::{lay_out, present_vips};
use super::{PlanError, Regions, VipEntry, VipMap, units};
use crate::capacity::Capacity;
use crate::reconcile::image::Image;
use crate::reconcile::op::MapOp;

/// The writes that put what lies in `from` into empty maps of `capacity`. Their tables are frozen: no packet makes a
/// pin there before the last interface goes by them.
pub fn carried(from: &Image, capacity: &Capacity) -> Result<Vec<MapOp>, PlanError> {
    let mut ops = rows(from);
    let tables = tables(from, capacity, &mut ops)?;
    let keys = from.servers.iter().filter_map(|(key, id)| Some((renumbered(key, &tables)?, *id)));
    ops.extend(keys.map(|(key, id)| MapOp::SetServer { key, id }));
    let bits = (0..).zip(&from.vip_index.filter).filter(|(_, bits)| **bits != 0);
    ops.extend(bits.map(|(index, &bits)| MapOp::SetFilterWord { index, bits }));
    ops.push(MapOp::SetPrefixLengths4 { lengths: from.vip_index.prefix_lengths4() });
    ops.push(MapOp::SetPrefixLengths6 { lengths: from.vip_index.prefix_lengths6() });
    let vips = vips(from, capacity, &tables)?;
    ops.extend(lay_out(&vips, capacity)?);
    Ok(ops)
}

/// What lies in maps of `capacity` then.
pub fn image_of(ops: &[MapOp], capacity: &Capacity, meta: Meta) -> Image {
    let mut image = Image::empty(capacity, meta);
    ops.iter().for_each(|op| image.apply(op));
    image
}

/// Ways out and backends: there are as many rows of them under all limits.
fn rows(from: &Image) -> Vec<MapOp> {
    let egress = (0u16..).zip(&from.egress).filter(|(_, egress)| **egress != Egress::default());
    let mut ops: Vec<MapOp> = egress.map(|(row, &egress)| MapOp::WriteEgress { row, egress }).collect();
    let sources = (0u16..).zip(&from.sources).filter(|(_, source)| **source != Source::default());
    ops.extend(sources.map(|(row, &source)| MapOp::WriteSource { row, source }));
    let named = |id: u16| id != BACKEND_NOBODY && id != BACKEND_PASS;
    let backends = (0u16..).zip(&from.backends);
    let backends = backends.filter(|(id, row)| named(*id) && **row != Backend::default());
    ops.extend(backends.map(|(id, &backend)| MapOp::WriteBackend { id, backend }));
    let weights = (0u16..).zip(&from.load_weights).filter(|(_, weight)| **weight != 0);
    ops.extend(weights.map(|(id, &weight)| MapOp::SetLoadWeight { id, weight }));
    ops
}

/// Tables with their slots. Returns the new number of each.
fn tables(from: &Image, capacity: &Capacity, ops: &mut Vec<MapOp>) -> Result<HashMap<u16, u16>, PlanError> {
    let rows = (0u16..).zip(&from.table_states).zip(&from.tables);
    let used: Vec<_> =
        rows.filter(|((_, state), word)| state.identity != 0 && **word != 0).map(|(row, _)| row).collect();
    let (needed, limit) = (used.len(), capacity.tables);
    if needed > limit as usize {
        return Err(PlanError::Tables { needed, limit });
    }
    let mut regions = Regions::empty(capacity.slot_rows as usize);
    let mut numbers = HashMap::new();
    for (table, (row, state)) in (0u16..).zip(used) {
        let word = TableWord::from_bits(from.tables[usize::from(row)]);
        let slots = word.length();
        let first_row = regions.take(units(slots)).ok_or(PlanError::Slots { slots })?;
        let state = TableState { closing: TableState::FROZEN, ..*state };
        ops.push(MapOp::WriteTableState { table, state });
        ops.push(MapOp::WriteSlots { first: first_row * SLOTS_PER_ROW, words: words(from, row) });
        let word = TableWord::new(first_row, word.log2_length(), word.discipline());
        ops.push(MapOp::SetTableWord { table, word });
        numbers.insert(row, table);
    }
    Ok(numbers)
}

/// A server's key, for the new number of its table.
fn renumbered(key: &ServerKey, tables: &HashMap<u16, u16>) -> Option<ServerKey> {
    let table = tables.get(&key.table())?;
    ServerKey::new(*table, key.config_id(), key.bytes().get(..key.length())?)
}

/// What packets find, leading to the new numbers.
fn vips(from: &Image, capacity: &Capacity, tables: &HashMap<u16, u16>) -> Result<VipMap, PlanError> {
    let present = present_vips(from);
    let counted: BTreeSet<u32> = present.values().flat_map(targets).map(VipTarget::vip).collect();
    let (needed, limit) = (counted.len(), capacity.vips);
    if needed > limit as usize {
        return Err(PlanError::Vips { needed, limit });
    }
    let counters: HashMap<u32, u32> = counted.into_iter().zip(0..).collect();
    let lead = |target: VipTarget| {
        if !target.is_service() {
            return None;
        }
        let vip = counters.get(&target.vip())?;
        Some(VipTarget::service(*tables.get(&target.table())?, target.flags(), *vip))
    };
    let entry = |entry: VipEntry| match entry {
        VipEntry::Service(target) => lead(target).map(VipEntry::Service),
        VipEntry::Source(row) => Some(VipEntry::Source(row)),
        VipEntry::Address { flags, rules } => {
            let rule = |rule: PortRule| Some(PortRule { target: lead(rule.target)?, ..rule });
            Some(VipEntry::Address { flags, rules: rules.into_iter().filter_map(rule).collect() })
        }
    };
    Ok(present.into_iter().filter_map(|(key, of)| Some((key, entry(of)?))).collect())
}

/// Of services.
fn targets(entry: &VipEntry) -> Vec<VipTarget> {
    match entry {
        VipEntry::Service(target) => vec![*target],
        VipEntry::Address { rules, .. } => rules.iter().map(|rule| rule.target).collect(),
        VipEntry::Source(_) => Vec::new(),
    }
}
