//! The balancer's maps: sizes, adoption of pinned ones, and the only place that writes them.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::mem::offset_of;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use aya::Ebpf;
use aya::maps::{HashMap as BpfHashMap, Map, MapData, MapType, PerCpuArray};
use lb_common::abi::{
    ABI_VERSION, BACKEND_PASS, Backend, BackendKind, Egress, Interface, MOST_INTERFACES, Meta, OUTCOME_ROWS,
    PREFIX_LENGTHS_V4, PREFIX_LENGTHS_V6, Record, Replies, RuleRow, SLOTS_PER_ROW, SlotRow, Source,
    TableState, Traffic, VIP_WORD_V4, VIP_WORD_V6, VIP_WORDS, Vip4Bucket, Vip6Bucket, VipIndex, map,
};

use lb_common::quic::{SERVER_ROWS, ServerKey};

use super::bpffs::BpfFs;
use super::counters::Counters;
use super::generation::Generation;
use super::grace::grace;
use super::mmap::{LoadRow, PinRow, RecordRow, Row, Rows};
use crate::capacity::Capacity;
use crate::reconcile::connections::{ConnectionRows, Connections, drop_connections};
use crate::reconcile::image::Image;
use crate::reconcile::op::MapOp;
use crate::reconcile::pins::{PinWords, Pins};
use crate::reconcile::sweep::drop_pins;

/// Why maps could not be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum MapsError {
    #[error("the program object has no map {0}")]
    Missing(&'static str),
    #[error("map {0} cannot be mapped into memory")]
    Mmap(&'static str, #[source] io::Error),
    #[error("map {0}")]
    Map(&'static str, #[source] aya::maps::MapError),
    #[error("pinned map {name} has {what} {found}, needed is {expected}")]
    Mismatch { name: &'static str, what: &'static str, found: u32, expected: u32 },
    #[error("pinned map {name} is missing")]
    Partial { name: &'static str },
    #[error("pinned maps have ABI version {found}, this xlb speaks {ABI_VERSION}")]
    Abi { found: u32 },
    #[error("no complete set of maps is pinned in {0}")]
    Nothing(String),
    #[error("the pinned maps in {0}")]
    Directory(String, #[source] io::Error),
    #[error("map {0} cannot be pinned")]
    Pin(&'static str, #[source] aya::pin::PinError),
}

impl MapsError {
    /// Whether pinned maps are sound, but not what is needed here: of another size or layout, or not all there.
    pub fn is_misfit(&self) -> bool {
        matches!(self, Self::Mismatch { .. } | Self::Partial { .. } | Self::Abi { .. })
    }
}

/// Rows of two sets of maps that stand for the same: from and to.
pub type RowPairs = Vec<(u32, u32)>;

/// Of arrays that the agent has in its memory (kernel uapi).
const BPF_F_MMAPABLE: u32 = 1 << 10;
/// Of hash maps that take memory element by element (kernel uapi).
const BPF_F_NO_PREALLOC: u32 = 1;

/// Words of `TableState`, and a byte of `Backend`.
const STATE_FAILED: usize = offset_of!(TableState, failed) / 8;
const STATE_CLOSING: usize = offset_of!(TableState, closing) / 8;
const STATE_TURN: usize = offset_of!(TableState, turn) / 8;
const STATE_POOLS: usize = offset_of!(TableState, pools) / 8;
const FLAGS: usize = offset_of!(Backend, flags);

/// All maps of the balancer, open.
pub struct Maps {
    meta: Rows<Meta>,
    vip_index: Rows<VipIndex>,
    port_rules: Rows<RuleRow>,
    vips4: Rows<Vip4Bucket>,
    vips6: Rows<Vip6Bucket>,
    tables: Rows<u64>,
    table_states: Rows<TableState>,
    slots: Rows<SlotRow>,
    backends: Rows<Backend>,
    egress: Rows<Egress>,
    pins: Arc<Rows<PinRow>>,
    loads: Rows<LoadRow>,
    connections: Arc<ConnectionMaps>,
    /// None of those are used where nothing is translated.
    translates: bool,
    sources: Rows<Source>,
    interfaces: BpfHashMap<MapData, u32, Interface>,
    servers: BpfHashMap<MapData, ServerKey, u32>,
    counters: Arc<Counters>,
    outcomes: PerCpuArray<MapData, u64>,
    vip_traffic: PerCpuArray<MapData, Traffic>,
    backend_traffic: PerCpuArray<MapData, Traffic>,
    replies: PerCpuArray<MapData, Replies>,
    /// Handles of their own, to pin again what somebody has removed.
    handles: Vec<(&'static str, MapData)>,
}

/// Maps that the program pins, in the order of `Maps`.
const PINNED: [&str; 22] = [
    map::META,
    map::VIP_INDEX,
    map::PORT_RULES,
    map::VIPS4,
    map::VIPS6,
    map::TABLES,
    map::TABLE_STATES,
    map::SLOTS,
    map::BACKENDS,
    map::EGRESS,
    map::INTERFACES,
    map::SERVERS,
    map::OUTCOMES,
    map::VIP_TRAFFIC,
    map::BACKEND_TRAFFIC,
    map::PINS,
    map::LOADS,
    map::PIN_EVENTS,
    map::CONNECTIONS,
    map::RECORDS,
    map::SOURCES,
    map::REPLIES,
];

/// Connections: a word for each place, and its record.
struct ConnectionMaps {
    words: Rows<PinRow>,
    records: Rows<RecordRow>,
}

impl ConnectionRows for ConnectionMaps {
    fn words(&self) -> &[AtomicU64] {
        self.words.words()
    }

    fn records(&self) -> &[Record] {
        self.records.records()
    }
}

impl Maps {
    pub const PINNED: [&str; 22] = PINNED;

    /// What the newest complete set of pinned maps says of itself; nothing where there is none.
    pub fn newest(fs: &BpfFs) -> Result<Option<(Generation, Meta)>, MapsError> {
        let failed = |source| MapsError::Directory(fs.path().display().to_string(), source);
        for generation in Generation::all(fs).map_err(failed)?.into_iter().rev() {
            // Filled before it was called complete, or made by somebody else.
            if let Some(meta) = meta(&generation)?
                && meta.abi_version != 0
            {
                return Ok(Some((generation, meta)));
            }
        }
        Ok(None)
    }

    /// Whether pinned maps are what this build and these limits need: an error says what is not.
    ///
    /// aya takes a pinned map without comparing type, sizes or flags.
    pub fn compare(generation: &Generation, meta: &Meta, capacity: &Capacity) -> Result<(), MapsError> {
        if meta.abi_version != ABI_VERSION {
            return Err(MapsError::Abi { found: meta.abi_version });
        }
        for map in capacity.rows() {
            let (kind, flags) =
                if map.per_cpu { (MapType::PerCpuArray, 0) } else { (MapType::Array, BPF_F_MMAPABLE) };
            compare(generation, map.name, kind, [map.rows, 4, map.value_bytes, flags])?;
        }
        let value = size_of::<Interface>() as u32;
        compare(generation, map::INTERFACES, MapType::Hash, [MOST_INTERFACES, 4, value, 0])?;
        let key = size_of::<ServerKey>() as u32;
        compare(generation, map::SERVERS, MapType::Hash, [SERVER_ROWS, key, 4, BPF_F_NO_PREALLOC])
    }

    /// Takes the maps out of a loaded object that has pinned them.
    pub fn take(ebpf: &mut Ebpf, generation: &Generation, capacity: &Capacity) -> Result<Self, MapsError> {
        let mut source = |name| ebpf.take_map(name).ok_or(MapsError::Missing(name));
        Self::open(&mut source, generation, capacity)
    }

    /// Opens the pinned maps of an agent that may be running or dead, whatever its limits are.
    pub fn from_pins(fs: &BpfFs) -> Result<Self, MapsError> {
        let nothing = || MapsError::Nothing(fs.path().display().to_string());
        let (generation, meta) = Self::newest(fs)?.ok_or_else(nothing)?;
        Self::of_generation(&generation, &meta)
    }

    /// Opens a set of pinned maps of this ABI.
    pub fn of_generation(generation: &Generation, meta: &Meta) -> Result<Self, MapsError> {
        if meta.abi_version != ABI_VERSION {
            return Err(MapsError::Abi { found: meta.abi_version });
        }
        let capacity = capacity_of(generation)?;
        Self::compare(generation, meta, &capacity)?;
        let mut source = |name| {
            MapData::from_pin(generation.map(name))
                .and_then(Map::from_map_data)
                .map_err(|error| MapsError::Map(name, error))
        };
        Self::open(&mut source, generation, &capacity)
    }

    fn open(
        source: &mut dyn FnMut(&'static str) -> Result<Map, MapsError>,
        generation: &Generation,
        capacity: &Capacity,
    ) -> Result<Self, MapsError> {
        let rows: HashMap<_, _> = capacity.rows().into_iter().map(|map| (map.name, map.rows)).collect();
        let (outcomes, vips, backends) =
            (source(map::OUTCOMES)?, source(map::VIP_TRAFFIC)?, source(map::BACKEND_TRAFFIC)?);
        let replies = source(map::REPLIES)?;
        let of = |name| move |error| MapsError::Map(name, error);
        let handle = |name| {
            let data = MapData::from_pin(generation.map(name));
            Ok((name, data.map_err(|error| MapsError::Map(name, error))?))
        };
        Ok(Self {
            handles: PINNED.into_iter().map(handle).collect::<Result<_, MapsError>>()?,
            meta: rows_of(source(map::META)?, map::META, rows[map::META])?,
            vip_index: rows_of(source(map::VIP_INDEX)?, map::VIP_INDEX, rows[map::VIP_INDEX])?,
            port_rules: rows_of(source(map::PORT_RULES)?, map::PORT_RULES, rows[map::PORT_RULES])?,
            vips4: rows_of(source(map::VIPS4)?, map::VIPS4, rows[map::VIPS4])?,
            vips6: rows_of(source(map::VIPS6)?, map::VIPS6, rows[map::VIPS6])?,
            tables: rows_of(source(map::TABLES)?, map::TABLES, rows[map::TABLES])?,
            table_states: rows_of(source(map::TABLE_STATES)?, map::TABLE_STATES, rows[map::TABLE_STATES])?,
            slots: rows_of(source(map::SLOTS)?, map::SLOTS, rows[map::SLOTS])?,
            backends: rows_of(source(map::BACKENDS)?, map::BACKENDS, rows[map::BACKENDS])?,
            egress: rows_of(source(map::EGRESS)?, map::EGRESS, rows[map::EGRESS])?,
            pins: Arc::new(rows_of(source(map::PINS)?, map::PINS, rows[map::PINS])?),
            loads: rows_of(source(map::LOADS)?, map::LOADS, rows[map::LOADS])?,
            connections: Arc::new(ConnectionMaps {
                words: rows_of(source(map::CONNECTIONS)?, map::CONNECTIONS, rows[map::CONNECTIONS])?,
                records: rows_of(source(map::RECORDS)?, map::RECORDS, rows[map::RECORDS])?,
            }),
            translates: capacity.connection_buckets > 0,
            sources: rows_of(source(map::SOURCES)?, map::SOURCES, rows[map::SOURCES])?,
            interfaces: BpfHashMap::try_from(source(map::INTERFACES)?).map_err(of(map::INTERFACES))?,
            servers: BpfHashMap::try_from(source(map::SERVERS)?).map_err(of(map::SERVERS))?,
            counters: Arc::new(Counters::of(
                &outcomes,
                &vips,
                &backends,
                &source(map::PIN_EVENTS)?,
                &replies,
            )?),
            outcomes: per_cpu(outcomes, map::OUTCOMES)?,
            vip_traffic: per_cpu(vips, map::VIP_TRAFFIC)?,
            backend_traffic: per_cpu(backends, map::BACKEND_TRAFFIC)?,
            replies: per_cpu(replies, map::REPLIES)?,
        })
    }

    /// What fresh maps begin with: the row that stands for the host's stack.
    pub fn initialise(&self) {
        let (kind, flags) = (BackendKind::Pass as u8, Backend::ACCEPTING);
        let pass = Backend { kind, flags, ..Backend::default() };
        self.backends.store(usize::from(BACKEND_PASS), &pass);
    }

    /// Makes the maps known as ours, and complete.
    pub fn set_meta(&self, meta: &Meta) {
        self.meta.store(0, meta);
    }

    /// Pins again what somebody has removed. Returns the names.
    pub fn pin_again(&self, generation: &Generation) -> Result<Vec<&'static str>, MapsError> {
        let missing: Vec<_> =
            self.handles.iter().filter(|(name, _)| !generation.map(name).exists()).collect();
        if !missing.is_empty() {
            let failed = |source| MapsError::Directory(generation.dir().display().to_string(), source);
            std::fs::create_dir_all(generation.dir()).map_err(failed)?;
        }
        for (name, data) in &missing {
            data.pin(generation.map(name)).map_err(|error| MapsError::Pin(name, error))?;
        }
        Ok(missing.into_iter().map(|(name, _)| *name).collect())
    }

    /// Takes over what an earlier set of maps has counted, and its rows of interfaces: `vips` and `backends` are
    /// pairs of rows, from and to. What the earlier set counts after that is lost.
    pub fn inherit(&mut self, before: &Maps, vips: &RowPairs, backends: &RowPairs) -> Result<(), MapsError> {
        for outcome in 0..OUTCOME_ROWS {
            copy(&before.outcomes, &mut self.outcomes, map::OUTCOMES, outcome, outcome)?;
        }
        for (from, to) in vips {
            copy(&before.vip_traffic, &mut self.vip_traffic, map::VIP_TRAFFIC, *from, *to)?;
        }
        for (from, to) in backends {
            copy(&before.backend_traffic, &mut self.backend_traffic, map::BACKEND_TRAFFIC, *from, *to)?;
        }
        if before.translates && self.translates {
            for (from, to) in backends {
                copy(&before.replies, &mut self.replies, map::REPLIES, *from, *to)?;
            }
        }
        for (ifindex, row) in before.interfaces()? {
            self.set_interface(ifindex, row)?;
        }
        Ok(())
    }

    /// A copy of what lies in the maps.
    pub fn image(&self) -> Result<Image, MapsError> {
        Ok(Image {
            meta: self.meta.to_vec()[0],
            vip_index: Box::new(self.vip_index.to_vec()[0]),
            port_rules: self.port_rules.to_vec(),
            vips4: self.vips4.to_vec(),
            vips6: self.vips6.to_vec(),
            tables: self.tables.to_vec(),
            table_states: self.table_states.to_vec(),
            slots: self.slots.to_vec(),
            backends: self.backends.to_vec(),
            egress: self.egress.to_vec(),
            load_weights: (0..self.loads.len()).map(|id| self.loads.load_word(id, 1)).collect(),
            pins: self.pins(),
            connections: self.connections(),
            sources: self.sources.to_vec(),
            interfaces: self.interfaces()?,
            servers: self.servers()?,
        })
    }

    pub fn interfaces(&self) -> Result<HashMap<u32, Interface>, MapsError> {
        let rows = self.interfaces.iter().collect::<Result<_, _>>();
        rows.map_err(|error| MapsError::Map(map::INTERFACES, error))
    }

    fn servers(&self) -> Result<BTreeMap<ServerKey, u16>, MapsError> {
        let rows = self.servers.iter().map(|row| row.map(|(key, id)| (key, id as u16)));
        rows.collect::<Result<_, _>>().map_err(|error| MapsError::Map(map::SERVERS, error))
    }

    /// A view of the pins.
    pub fn pins(&self) -> Pins {
        Pins::of(Arc::clone(&self.pins) as Arc<dyn PinWords>)
    }

    /// A view of the connections.
    pub fn connections(&self) -> Connections {
        if self.translates {
            Connections::of(Arc::clone(&self.connections) as Arc<dyn ConnectionRows>)
        } else {
            Connections::default()
        }
    }

    /// A slot as it is now, counted over the whole map.
    pub fn slot_word(&self, index: u32) -> u32 {
        let per_row = SLOTS_PER_ROW;
        let pair = self.slots.load_word((index / per_row) as usize, (index % per_row / 2) as usize);
        let halves: [u32; 2] = [pair as u32, (pair >> 32) as u32];
        halves[(index % 2) as usize ^ usize::from(cfg!(target_endian = "big"))]
    }

    /// What packets write into the state of a table: pins that failed, turns taken.
    pub fn failed_and_turn(&self, table: u16) -> (u64, u64) {
        let word = |word| self.table_states.load_word(usize::from(table), word);
        (word(STATE_FAILED), word(STATE_TURN))
    }

    /// How many flows a backend has, where its table goes by it.
    pub fn active(&self, id: u16) -> u64 {
        self.loads.load_word(usize::from(id), 0)
    }

    /// Sets right how many flows a backend has, by a count of its pins.
    pub fn set_active(&self, id: u16, active: u64) {
        self.loads.store_word(usize::from(id), 0, active);
    }

    /// Carries out one operation; false where what hangs on it must not be. Only the resets of counters and entries of
    /// servers can fail.
    pub fn apply(&mut self, op: &MapOp) -> Result<bool, MapsError> {
        fail_point!("apply");
        match op {
            MapOp::SetClosing { table, closing } => {
                self.table_states.store_word(usize::from(*table), STATE_CLOSING, *closing);
            }
            MapOp::SetPools { table, pools } => {
                for (word, bits) in (STATE_POOLS..).zip(pools) {
                    self.table_states.store_word(usize::from(*table), word, *bits);
                }
            }
            MapOp::ExpectFailed { table, failed } => return Ok(self.failed_and_turn(*table).0 == *failed),
            MapOp::SetFlags { id, flags } => self.backends.store_byte(usize::from(*id), FLAGS, *flags),
            MapOp::DropPins { ids } => {
                drop_pins(self.pins.words(), ids);
                drop_pins(self.connections.words.words(), ids);
            }
            MapOp::DropConnections { first, last } => {
                drop_connections(self.connections.words.words(), *first..=*last);
            }
            MapOp::WriteSource { row, source } => self.sources.store(usize::from(*row), source),
            MapOp::SetLoadWeight { id, weight } => self.loads.store_word(usize::from(*id), 1, *weight),
            MapOp::WriteEgress { row, egress } => self.egress.store(usize::from(*row), egress),
            MapOp::WriteBackend { id, backend } => self.backends.store(usize::from(*id), backend),
            MapOp::SetPath { id, path } => self.backends.store_word(usize::from(*id), 0, path.bits()),
            MapOp::ResetBackendTraffic { id } => {
                reset(&mut self.backend_traffic, map::BACKEND_TRAFFIC, u32::from(*id))?;
                if self.translates {
                    reset(&mut self.replies, map::REPLIES, u32::from(*id))?;
                }
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
            MapOp::WriteRules { row, rules } => store_all(&self.port_rules, *row, rules),
            MapOp::SetPrefixLengths4 { lengths } => {
                self.vip_index.store_word(0, PREFIX_LENGTHS_V4, lengths.bits());
            }
            MapOp::SetPrefixLengths6 { lengths } => {
                self.vip_index.store_word(0, PREFIX_LENGTHS_V6, lengths.bits());
            }
            MapOp::SetFilterWord { index, bits } => {
                self.vip_index.store_word(0, VIP_WORDS + *index as usize, *bits)
            }
            MapOp::SetVipWord4 { word } => self.vip_index.store_word(0, VIP_WORD_V4, word.bits()),
            MapOp::SetVipWord6 { word } => self.vip_index.store_word(0, VIP_WORD_V6, word.bits()),
            MapOp::SetServer { key, id } => {
                let set = self.servers.insert(key, u32::from(*id), 0);
                set.map_err(|error| MapsError::Map(map::SERVERS, error))?;
            }
            MapOp::RemoveServer { key } => match self.servers.remove(key) {
                Ok(()) | Err(aya::maps::MapError::KeyNotFound) => {}
                Err(error) => return Err(MapsError::Map(map::SERVERS, error)),
            },
            MapOp::Grace => grace(),
        }
        Ok(true)
    }

    pub fn interface(&self, ifindex: u32) -> Option<Interface> {
        self.interfaces.get(&ifindex, 0).ok()
    }

    /// An interface, and the way back out of it. That keeps its row, for connections name it.
    pub fn set_interface(&mut self, ifindex: u32, interface: Interface) -> Result<(), MapsError> {
        let known = self.interface(ifindex).map(|known| known.egress()).filter(|row| *row != 0);
        let given = Some(interface.egress()).filter(|row| *row != 0);
        let interface = interface.with_egress(known.or(given).unwrap_or_else(|| self.free_way_back()));
        if interface.egress() != 0 {
            let Interface { mac: source_mac, mtu, .. } = interface;
            let egress = Egress { ifindex, mtu, source_mac, ..Egress::default() };
            self.egress.store(usize::from(interface.egress()), &egress);
        }
        self.interfaces.insert(ifindex, interface, 0).map_err(|error| MapsError::Map(map::INTERFACES, error))
    }

    /// The rows of ways back, of interfaces or of none.
    pub fn ways_back(&self) -> Vec<(u16, Egress)> {
        let first = self.egress.len() - MOST_INTERFACES as usize;
        (0u16..).zip(self.egress.to_vec()).skip(first).collect()
    }

    /// The row of a way back that no interface has: there are as many as interfaces.
    fn free_way_back(&self) -> u16 {
        let first = self.egress.len() - MOST_INTERFACES as usize;
        let free = (first..self.egress.len()).find(|row| self.egress.load_word(*row, 0) as u32 == 0);
        free.map_or(0, |row| row as u16)
    }

    pub fn remove_interface(&mut self, ifindex: u32) -> Result<(), MapsError> {
        if let Some(row) = self.interface(ifindex).map(|known| known.egress()).filter(|row| *row != 0) {
            self.egress.store(usize::from(row), &Egress::default());
        }
        match self.interfaces.remove(&ifindex) {
            Ok(()) | Err(aya::maps::MapError::KeyNotFound) => Ok(()),
            Err(error) => Err(MapsError::Map(map::INTERFACES, error)),
        }
    }

    /// Reads what is counted, for whoever asks.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }
}

impl PinWords for Rows<PinRow> {
    fn words(&self) -> &[AtomicU64] {
        Rows::words(self)
    }
}

/// Row 0 of `XLB_META`, whose size and place no ABI version changes. Nothing where it is no such map.
fn meta(generation: &Generation) -> Result<Option<Meta>, MapsError> {
    let path = generation.map(map::META);
    if !path.exists() {
        return Ok(None);
    }
    let error = |source| MapsError::Map(map::META, source);
    let data = MapData::from_pin(path).and_then(Map::from_map_data).map_err(error)?;
    let Ok(array) = aya::maps::Array::<_, Meta>::try_from(data) else { return Ok(None) };
    Ok(Some(array.get(&0, 0).map_err(error)?))
}

fn capacity_of(generation: &Generation) -> Result<Capacity, MapsError> {
    let rows = |name: &'static str| {
        MapData::from_pin(generation.map(name)).and_then(|map| map.info()).map(|info| info.max_entries()).ok()
    };
    for name in PINNED {
        if !generation.map(name).exists() {
            return Err(MapsError::Partial { name });
        }
    }
    Capacity::of_maps(rows).ok_or(MapsError::Partial { name: map::META })
}

fn compare(
    generation: &Generation,
    name: &'static str,
    kind: MapType,
    [rows, key_bytes, value_bytes, flags]: [u32; 4],
) -> Result<(), MapsError> {
    let error = |source| MapsError::Map(name, source);
    if !generation.map(name).exists() {
        return Err(MapsError::Partial { name });
    }
    let info = MapData::from_pin(generation.map(name)).map_err(error)?.info().map_err(error)?;
    let checks = [
        ("type", info.map_type().map_err(error)? as u32, kind as u32),
        ("max_entries", info.max_entries(), rows),
        ("key_size", info.key_size(), key_bytes),
        ("value_size", info.value_size(), value_bytes),
        ("flags", info.map_flags(), flags),
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

fn copy<T: aya::Pod>(
    from: &PerCpuArray<MapData, T>,
    to: &mut PerCpuArray<MapData, T>,
    name: &'static str,
    from_row: u32,
    to_row: u32,
) -> Result<(), MapsError> {
    let error = |source| MapsError::Map(name, source);
    let values = from.get(&from_row, 0).map_err(error)?;
    to.set(to_row, values, 0).map_err(error)
}

fn reset<T: aya::Pod + Default>(
    map: &mut PerCpuArray<MapData, T>,
    name: &'static str,
    row: u32,
) -> Result<(), MapsError> {
    let error = |source| MapsError::Map(name, source);
    let cpus = aya::util::nr_cpus().map_err(|(_, source)| error(source.into()))?;
    let zero =
        aya::maps::PerCpuValues::try_from(vec![T::default(); cpus]).map_err(|source| error(source.into()))?;
    map.set(row, zero, 0).map_err(error)
}
