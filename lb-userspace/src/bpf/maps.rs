//! The balancer's maps: sizes, adoption of pinned ones, and the only place that writes them.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;

use aya::Ebpf;
use aya::maps::{HashMap as BpfHashMap, Map, MapData, MapType, PerCpuArray};
use lb_common::abi::{
    ABI_VERSION, BACKEND_PASS, Backend, BackendKind, Egress, Interface, Meta, SlotRow, TableState, Traffic,
    VIP_WORD_V4, VIP_WORD_V6, Vip4Bucket, Vip6Bucket, map,
};
use lb_common::outcome::Outcome;

use super::bpffs::BpfFs;
use super::grace::grace;
use super::mmap::{Row, Rows};
use crate::capacity::Capacity;
use crate::reconcile::image::Image;
use crate::reconcile::op::MapOp;

/// Why maps could not be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum MapsError {
    #[error("the program object has no map {0}")]
    Missing(&'static str),
    #[error("map {0} cannot be mapped into memory")]
    Mmap(&'static str, #[source] io::Error),
    #[error("map {0}")]
    Map(&'static str, #[source] aya::maps::MapError),
    #[error(
        "pinned map {name} has {what} {found}, this xlb needs {expected}; `xlb detach` removes the old maps (traffic stops until the next `xlb run`)"
    )]
    Mismatch { name: &'static str, what: &'static str, found: u32, expected: u32 },
    #[error(
        "pinned map {name} is missing while others are there; `xlb detach` removes them (traffic stops until the next `xlb run`)"
    )]
    Partial { name: &'static str },
    #[error(
        "pinned maps have ABI version {found}, this xlb speaks {ABI_VERSION}; `xlb detach` removes them (traffic stops until the next `xlb run`)"
    )]
    Abi { found: u32 },
}

/// All maps of the balancer, open.
pub struct Maps {
    meta: Rows<Meta>,
    vip_words: Rows<u64>,
    vips4: Rows<Vip4Bucket>,
    vips6: Rows<Vip6Bucket>,
    tables: Rows<u64>,
    table_states: Rows<TableState>,
    slots: Rows<SlotRow>,
    backends: Rows<Backend>,
    egress: Rows<Egress>,
    interfaces: BpfHashMap<MapData, u32, Interface>,
    outcomes: PerCpuArray<MapData, u64>,
    vip_traffic: PerCpuArray<MapData, Traffic>,
    backend_traffic: PerCpuArray<MapData, Traffic>,
}

/// Maps that the program pins, in the order of `Maps`.
const PINNED: [&str; 13] = [
    map::META,
    map::VIP_WORDS,
    map::VIPS4,
    map::VIPS6,
    map::TABLES,
    map::TABLE_STATES,
    map::SLOTS,
    map::BACKENDS,
    map::EGRESS,
    map::INTERFACES,
    map::OUTCOMES,
    map::VIP_TRAFFIC,
    map::BACKEND_TRAFFIC,
];

impl Maps {
    pub const PINNED: [&str; 13] = PINNED;

    /// What pinned maps say of themselves, after comparing them with what this build and these limits need; nothing
    /// where there are none.
    ///
    /// aya takes a pinned map without comparing type or sizes.
    pub fn pinned(fs: &BpfFs, capacity: &Capacity) -> Result<Option<Meta>, MapsError> {
        let present: Vec<bool> = PINNED.iter().map(|name| fs.map(name).exists()).collect();
        if !present.contains(&true) {
            return Ok(None);
        }
        for (name, present) in PINNED.into_iter().zip(present) {
            if !present {
                return Err(MapsError::Partial { name });
            }
        }
        for rows in capacity.rows() {
            let kind = if rows.per_cpu { MapType::PerCpuArray } else { MapType::Array };
            compare(fs, rows.name, kind, rows.rows, rows.value_bytes)?;
        }
        compare(
            fs,
            map::INTERFACES,
            MapType::Hash,
            lb_common::abi::MOST_INTERFACES,
            size_of::<Interface>() as u32,
        )?;
        let error = |source| MapsError::Map(map::META, source);
        let meta = MapData::from_pin(fs.map(map::META)).map_err(error)?;
        let meta = Map::from_map_data(meta).map_err(error)?;
        let meta = aya::maps::Array::<_, Meta>::try_from(meta).map_err(error)?.get(&0, 0).map_err(error)?;
        if meta.abi_version != ABI_VERSION {
            return Err(MapsError::Abi { found: meta.abi_version });
        }
        Ok(Some(meta))
    }

    /// Takes the maps out of a loaded object.
    pub fn take(ebpf: &mut Ebpf, capacity: &Capacity) -> Result<Self, MapsError> {
        let mut source = |name| ebpf.take_map(name).ok_or(MapsError::Missing(name));
        Self::open(&mut source, capacity)
    }

    /// Opens the pinned maps of an agent that may be running or dead, whatever its limits are.
    pub fn from_pins(fs: &BpfFs) -> Result<Self, MapsError> {
        let rows = |name: &'static str| MapData::from_pin(fs.map(name)).and_then(|map| map.info()).ok();
        let capacity = Capacity::of_maps(|name| rows(name).map(|info| info.max_entries()))
            .ok_or(MapsError::Partial { name: map::META })?;
        Self::pinned(fs, &capacity)?;
        let mut source = |name| {
            MapData::from_pin(fs.map(name))
                .and_then(Map::from_map_data)
                .map_err(|error| MapsError::Map(name, error))
        };
        Self::open(&mut source, &capacity)
    }

    fn open(
        source: &mut dyn FnMut(&'static str) -> Result<Map, MapsError>,
        capacity: &Capacity,
    ) -> Result<Self, MapsError> {
        let rows: HashMap<_, _> = capacity.rows().into_iter().map(|map| (map.name, map.rows)).collect();
        let hash = |map: Map, name| BpfHashMap::try_from(map).map_err(|error| MapsError::Map(name, error));
        Ok(Self {
            meta: rows_of(source(map::META)?, map::META, rows[map::META])?,
            vip_words: rows_of(source(map::VIP_WORDS)?, map::VIP_WORDS, rows[map::VIP_WORDS])?,
            vips4: rows_of(source(map::VIPS4)?, map::VIPS4, rows[map::VIPS4])?,
            vips6: rows_of(source(map::VIPS6)?, map::VIPS6, rows[map::VIPS6])?,
            tables: rows_of(source(map::TABLES)?, map::TABLES, rows[map::TABLES])?,
            table_states: rows_of(source(map::TABLE_STATES)?, map::TABLE_STATES, rows[map::TABLE_STATES])?,
            slots: rows_of(source(map::SLOTS)?, map::SLOTS, rows[map::SLOTS])?,
            backends: rows_of(source(map::BACKENDS)?, map::BACKENDS, rows[map::BACKENDS])?,
            egress: rows_of(source(map::EGRESS)?, map::EGRESS, rows[map::EGRESS])?,
            interfaces: hash(source(map::INTERFACES)?, map::INTERFACES)?,
            outcomes: per_cpu(source(map::OUTCOMES)?, map::OUTCOMES)?,
            vip_traffic: per_cpu(source(map::VIP_TRAFFIC)?, map::VIP_TRAFFIC)?,
            backend_traffic: per_cpu(source(map::BACKEND_TRAFFIC)?, map::BACKEND_TRAFFIC)?,
        })
    }

    /// Makes fresh maps known as ours.
    pub fn initialise(&self, meta: &Meta) {
        let pass = Backend { kind: BackendKind::Pass as u8, ..Backend::default() };
        self.backends.store(usize::from(BACKEND_PASS), &pass);
        self.meta.store(0, meta);
    }

    pub fn set_meta(&self, meta: &Meta) {
        self.meta.store(0, meta);
    }

    /// A copy of what lies in the maps.
    pub fn image(&self) -> Result<Image, MapsError> {
        let words = self.vip_words.to_vec();
        let interfaces = self.interfaces.iter().collect::<Result<_, _>>();
        Ok(Image {
            meta: self.meta.to_vec()[0],
            vip_words: [words[VIP_WORD_V4 as usize], words[VIP_WORD_V6 as usize]],
            vips4: self.vips4.to_vec(),
            vips6: self.vips6.to_vec(),
            tables: self.tables.to_vec(),
            table_states: self.table_states.to_vec(),
            slots: self.slots.to_vec(),
            backends: self.backends.to_vec(),
            egress: self.egress.to_vec(),
            interfaces: interfaces.map_err(|error| MapsError::Map(map::INTERFACES, error))?,
        })
    }

    /// Carries out one operation. Only the resets of counters can fail.
    pub fn apply(&mut self, op: &MapOp) -> Result<(), MapsError> {
        match op {
            MapOp::WriteEgress { row, egress } => self.egress.store(usize::from(*row), egress),
            MapOp::WriteBackend { id, backend } => self.backends.store(usize::from(*id), backend),
            MapOp::SetPath { id, path } => self.backends.store_word(usize::from(*id), 0, path.bits()),
            MapOp::ResetBackendTraffic { id } => {
                reset(&mut self.backend_traffic, map::BACKEND_TRAFFIC, u32::from(*id))?;
            }
            MapOp::ResetVipTraffic { vip } => reset(&mut self.vip_traffic, map::VIP_TRAFFIC, *vip)?,
            MapOp::WriteTableState { table, state } => self.table_states.store(usize::from(*table), state),
            MapOp::WriteSlots { first, words } => {
                for (index, word) in (*first as usize..).zip(words) {
                    self.slots.store_half(index, *word);
                }
            }
            MapOp::SetTableWord { table, word } => {
                self.tables.store_word(usize::from(*table), 0, word.bits())
            }
            MapOp::WriteVips4 { row, buckets } => store_all(&self.vips4, *row, buckets),
            MapOp::WriteVips6 { row, buckets } => store_all(&self.vips6, *row, buckets),
            MapOp::SetVipWord4 { word } => self.vip_words.store_word(VIP_WORD_V4 as usize, 0, word.bits()),
            MapOp::SetVipWord6 { word } => self.vip_words.store_word(VIP_WORD_V6 as usize, 0, word.bits()),
            MapOp::Grace => grace(),
        }
        Ok(())
    }

    pub fn interface(&self, ifindex: u32) -> Option<Interface> {
        self.interfaces.get(&ifindex, 0).ok()
    }

    pub fn set_interface(&mut self, ifindex: u32, interface: Interface) -> Result<(), MapsError> {
        self.interfaces.insert(ifindex, interface, 0).map_err(|error| MapsError::Map(map::INTERFACES, error))
    }

    pub fn remove_interface(&mut self, ifindex: u32) -> Result<(), MapsError> {
        match self.interfaces.remove(&ifindex) {
            Ok(()) | Err(aya::maps::MapError::KeyNotFound) => Ok(()),
            Err(error) => Err(MapsError::Map(map::INTERFACES, error)),
        }
    }

    /// Packets of an outcome, over all CPUs.
    pub fn outcome(&self, outcome: Outcome) -> Result<u64, MapsError> {
        let values = self.outcomes.get(&(outcome as u32), 0);
        Ok(values.map_err(|error| MapsError::Map(map::OUTCOMES, error))?.iter().sum())
    }

    pub fn vip_traffic(&self, vip: u32) -> Result<Traffic, MapsError> {
        total(&self.vip_traffic, map::VIP_TRAFFIC, vip)
    }

    pub fn backend_traffic(&self, id: u16) -> Result<Traffic, MapsError> {
        total(&self.backend_traffic, map::BACKEND_TRAFFIC, u32::from(id))
    }
}

fn compare(
    fs: &BpfFs,
    name: &'static str,
    kind: MapType,
    rows: u32,
    value_bytes: u32,
) -> Result<(), MapsError> {
    let error = |source| MapsError::Map(name, source);
    let info = MapData::from_pin(fs.map(name)).map_err(error)?.info().map_err(error)?;
    let checks = [
        ("type", info.map_type().map_err(error)? as u32, kind as u32),
        ("max_entries", info.max_entries(), rows),
        ("value_size", info.value_size(), value_bytes),
    ];
    for (what, found, expected) in checks {
        if found != expected {
            return Err(MapsError::Mismatch { name, what, found, expected });
        }
    }
    Ok(())
}

fn rows_of<T: Row>(map: Map, name: &'static str, rows: u32) -> Result<Rows<T>, MapsError> {
    let Map::Array(data) = map else { return Err(MapsError::Missing(name)) };
    Rows::map(data.fd().as_fd(), rows).map_err(|error| MapsError::Mmap(name, error))
}

fn per_cpu<T: aya::Pod>(map: Map, name: &'static str) -> Result<PerCpuArray<MapData, T>, MapsError> {
    PerCpuArray::try_from(map).map_err(|error| MapsError::Map(name, error))
}

fn store_all<T: Row>(rows: &Rows<T>, first: u32, values: &[T]) {
    for (row, value) in (first as usize..).zip(values) {
        rows.store(row, value);
    }
}

fn reset(map: &mut PerCpuArray<MapData, Traffic>, name: &'static str, row: u32) -> Result<(), MapsError> {
    let error = |source| MapsError::Map(name, source);
    let cpus = aya::util::nr_cpus().map_err(|(_, source)| error(source.into()))?;
    let zero = aya::maps::PerCpuValues::try_from(vec![Traffic::default(); cpus])
        .map_err(|source| error(source.into()))?;
    map.set(row, zero, 0).map_err(error)
}

fn total(map: &PerCpuArray<MapData, Traffic>, name: &'static str, row: u32) -> Result<Traffic, MapsError> {
    let values = map.get(&row, 0).map_err(|error| MapsError::Map(name, error))?;
    Ok(values.iter().fold(Traffic::default(), |sum, value| Traffic {
        packets: sum.packets + value.packets,
        bytes: sum.bytes + value.bytes,
    }))
}
