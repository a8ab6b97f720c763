//! The agent's state at one moment, as the core gives it to whoever asks: what is cheap to copy, and where the rest
//! can be read. Counting, sorting and words are made of it elsewhere, while the core goes on.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::connections::ConnectionState;
use super::overrides::{Exit, Uptime};
use lb_common::abi::{Backend as Row, BackendKind, SLOTS_PER_ROW, Source, TableWord};

use crate::bpf::{Attached, Counters};
use crate::config::model::Config;
use crate::reconcile::connections::Connections;
use crate::reconcile::entries::Counted;
use crate::reconcile::image::{Ids, Image};
use crate::reconcile::plan::{counter_rows, present_vips};

/// How the last reload ended.
#[derive(Debug, Clone)]
pub struct Reload {
    pub at: SystemTime,
    pub result: Result<(), String>,
}

/// Reloads since the agent started.
#[derive(Debug, Clone)]
pub struct Reloads {
    pub last: Option<Reload>,
    pub succeeded: u64,
    pub refused: u64,
    /// When the configuration that is in force was taken over.
    pub in_force_since: SystemTime,
}

impl Reloads {
    /// The start of the agent is no reload.
    pub fn none() -> Self {
        Self { last: None, succeeded: 0, refused: 0, in_force_since: SystemTime::now() }
    }

    pub fn note(&mut self, result: Result<(), String>) {
        let at = SystemTime::now();
        if result.is_ok() {
            self.succeeded += 1;
            self.in_force_since = at;
        } else {
            self.refused += 1;
        }
        self.last = Some(Reload { at, result });
    }
}

/// What lies where in the tables. Made anew when they have changed and somebody asks.
#[derive(Debug)]
pub struct Index {
    /// The id of each identity.
    pub ids: Ids,
    /// How many slots each id holds, over all tables: for new flows, and for old ones.
    slots: Vec<(u32, u32)>,
    /// Of each table's identity.
    tables: HashMap<u64, Moving>,
    /// Rows of counters.
    pub vips: BTreeMap<Counted, u32>,
    /// Rows of backends whose connections have their addresses translated, by id.
    pub translated: BTreeMap<u16, Row>,
    /// Addresses that clients' are translated to.
    pub sources: Vec<Source>,
}

impl Index {
    pub fn new(image: &Image) -> Self {
        let mut slots = vec![(0, 0); image.backends.len()];
        for (_, slot) in image.live_slots() {
            if let Some((new, _)) = slots.get_mut(usize::from(slot.cur())) {
                *new += 1;
            }
            if let Some((_, old)) = slots.get_mut(usize::from(slot.est())) {
                *old += 1;
            }
        }
        let mut tables: HashMap<u64, Moving> = HashMap::new();
        for (row, word) in image.tables.iter().map(|&bits| TableWord::from_bits(bits)).enumerate() {
            let first = word.first_row() * SLOTS_PER_ROW;
            let slots = first..first + if word == TableWord::default() { 0 } else { word.length() };
            let pins_all = word.discipline().pins_all();
            let mut moving = Moving { slots: slots.len() as u32, ..Moving::default() };
            for slot in slots.map(|index| image.slot(index)) {
                moving.dirty += u32::from(slot.dirty() && !pins_all);
                moving.held += u32::from(slot.pins() && !slot.dirty());
            }
            if moving.slots > 0 {
                *tables.entry(image.table_states[row].identity).or_default() += moving;
            }
        }
        let translates =
            |(_, row): &(u16, &Row)| BackendKind::from_raw(row.kind).is_some_and(BackendKind::translates);
        let translated = (0u16..).zip(&image.backends).filter(translates);
        Self {
            tables,
            ids: image.ids(),
            slots,
            vips: counter_rows(&present_vips(image)),
            translated: translated.map(|(id, row)| (id, *row)).collect(),
            sources: image.sources.clone(),
        }
    }

    pub fn moving(&self, table: u64) -> Moving {
        self.tables.get(&table).copied().unwrap_or_default()
    }

    /// Slots that lead new flows to an id, and those that lead old ones there.
    pub fn slots(&self, id: u16) -> (u32, u32) {
        self.slots.get(usize::from(id)).copied().unwrap_or_default()
    }
}

/// How many slots are on the move.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moving {
    pub slots: u32,
    /// New flows go elsewhere than old ones, and both are pinned.
    pub dirty: u32,
    /// Old flows that stay elsewhere have pins.
    pub held: u32,
}

impl std::ops::AddAssign for Moving {
    fn add_assign(&mut self, other: Self) {
        self.slots += other.slots;
        self.dirty += other.dirty;
        self.held += other.held;
    }
}

/// Pins, as the last sweep found them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct PinsStatus {
    pub pins: u64,
    pub room: u64,
    /// Seconds since the last whole sweep; without slots on the move nothing is swept.
    pub swept_seconds_ago: f64,
    /// Seconds that it took.
    pub sweep_seconds: f64,
    /// Whether there is anything to sweep.
    pub sweeping: bool,
}

/// Connections whose addresses are translated, as the last sweep found them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionsStatus {
    pub connections: u64,
    pub room: u64,
}

/// Connections by their state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionCounts {
    pub syn: u64,
    pub established: u64,
    pub finishing: u64,
    pub udp: u64,
}

impl ConnectionCounts {
    /// By `PinState`.
    pub fn of([syn, established, finishing, udp]: [u32; 4]) -> Self {
        let [syn, established, finishing, udp] = [syn, established, finishing, udp].map(u64::from);
        Self { syn, established, finishing, udp }
    }

    /// With the names of the states.
    pub fn each(self) -> [(ConnectionState, u64); 4] {
        let Self { syn, established, finishing, udp } = self;
        let counts = [syn, established, finishing, udp];
        std::array::from_fn(|state| (ConnectionState::ALL[state], counts[state]))
    }

    pub fn sum(self) -> u64 {
        self.each().iter().map(|(_, count)| count).sum()
    }
}

impl std::ops::AddAssign for ConnectionCounts {
    fn add_assign(&mut self, other: Self) {
        self.syn += other.syn;
        self.established += other.established;
        self.finishing += other.finishing;
        self.udp += other.udp;
    }
}

/// What still names a backend. Nothing of it is left of one that is drained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remaining {
    /// Flows that are pinned to it, and connections that have not ended.
    pub pins: u64,
    /// Slots that lead new flows to it.
    pub slots_new: u32,
    /// Slots that lead old flows to it.
    pub slots_old: u32,
    /// QUIC connections, which have no pins, sent to it a short while ago.
    #[serde(default)]
    pub quic: bool,
    /// Flows may have been pinned to it since pins were counted.
    #[serde(default)]
    pub uncounted: bool,
}

impl Remaining {
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }
}

/// What a backend can be found in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendState {
    Up,
    Down,
    /// New, not answered yet.
    Checking,
    /// No packet can be sent to it.
    Unresolved,
    /// Takes no new flows and keeps those it has.
    Draining,
    /// Takes no flows.
    Disabled,
}

impl BackendState {
    pub const ALL: [Self; 6] =
        [Self::Up, Self::Down, Self::Checking, Self::Unresolved, Self::Draining, Self::Disabled];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Down => "down",
            Self::Checking => "checking",
            Self::Unresolved => "unresolved",
            Self::Draining => "draining",
            Self::Disabled => "disabled",
        }
    }
}

/// How often the checks of a backend brought it up or took it down.
#[derive(Debug, Clone, Copy, Default)]
pub struct Transitions {
    pub up: u64,
    pub down: u64,
}

/// Of one backend, in the order of [`super::core::keys`].
#[derive(Debug, Clone)]
pub struct BackendView {
    pub state: BackendState,
    /// The state without what an operator or the file says.
    pub health: BackendState,
    /// Why, in words.
    pub check: String,
    pub transitions: Transitions,
    /// The share of one that starts, of `overlay::FULL`.
    pub starting: Option<u16>,
    pub exit: Option<Exit>,
    /// The file's weight, where another holds.
    pub file_weight: Option<u8>,
    pub remaining: Remaining,
    /// Nothing where its pool does not translate addresses.
    pub connections: Option<ConnectionCounts>,
}

/// Of one pool, in the order of the configuration.
#[derive(Debug, Clone)]
pub struct PoolView {
    /// The name of the pool that takes its packets: its own, or that of a fallback.
    pub in_use: String,
    pub panic: bool,
    /// Of its tables.
    pub moving: Moving,
    /// Slots that its backends, being down, lost with their old flows for want of room for pins.
    pub yielded: u64,
}

#[derive(Debug)]
pub struct Snapshot {
    /// The one in effect.
    pub config: Arc<Config>,
    /// The clock of exits, when this was taken.
    pub at: Uptime,
    pub path: PathBuf,
    pub attached: Vec<Attached>,
    pub reloads: Reloads,
    pub uptime: Duration,
    pub started: SystemTime,
    pub pools: Vec<PoolView>,
    pub backends: Vec<BackendView>,
    pub pins: PinsStatus,
    /// Nothing where no pool translates addresses.
    pub connections: Option<ConnectionsStatus>,
    /// Those that there are now.
    pub places: Connections,
    pub index: Arc<Index>,
    pub counters: Arc<Counters>,
}
