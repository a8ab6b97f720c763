//! One write to the kernel's tables, as data.

use lb_common::abi::{
    Backend, Egress, Path, PrefixLengths, RuleRow, Source, TableState, TableWord, Vip4Bucket, Vip6Bucket,
    VipWord,
};
use lb_common::quic::ServerKey;

/// Operations are carried out in order. Each leaves the tables in a state that is right for every
/// packet, so a sequence may break off anywhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MapOp {
    /// Fills or clears a row that no path names.
    WriteEgress {
        row: u16,
        egress: Egress,
    },
    /// Fills or clears a row that no slot names.
    WriteBackend {
        id: u16,
        backend: Backend,
    },
    /// Turns a backend in use to another next hop.
    SetPath {
        id: u16,
        path: Path,
    },
    /// Counters of a row that is given away begin at zero.
    ResetBackendTraffic {
        id: u16,
    },
    ResetVipTraffic {
        vip: u32,
    },
    WriteTableState {
        table: u16,
        state: TableState,
    },
    /// Slot words from `first` on (counted over the whole map), each stored whole.
    WriteSlots {
        first: u32,
        words: Vec<u32>,
    },
    SetTableWord {
        table: u16,
        word: TableWord,
    },
    /// `TableState::closing`.
    SetClosing {
        table: u16,
        closing: u64,
    },
    /// The set of pools that pins of the table may be of.
    SetPools {
        table: u16,
        pools: [u64; 3],
    },
    /// What stands between it and the next of its kind, or the next grace, is left out if a pin of the table has failed
    /// since.
    ExpectFailed {
        table: u16,
        failed: u64,
    },
    /// `Backend::flags`.
    SetFlags {
        id: u16,
        flags: u8,
    },
    /// Takes out the pins that name these backends.
    DropPins {
        ids: Vec<u16>,
    },
    /// Takes out the connections in places from `first` to `last`.
    DropConnections {
        first: u32,
        last: u32,
    },
    /// An address that clients' are translated to, with no connection that uses the row.
    WriteSource {
        row: u16,
        source: Source,
    },
    /// How much a backend takes beside others (`Load::weight`).
    SetLoadWeight {
        id: u16,
        weight: u64,
    },
    /// Buckets that no word names.
    WriteVips4 {
        row: u32,
        buckets: Vec<Vip4Bucket>,
    },
    WriteVips6 {
        row: u32,
        buckets: Vec<Vip6Bucket>,
    },
    /// Port rules that no entry names.
    WriteRules {
        row: u32,
        rules: Vec<RuleRow>,
    },
    /// A word of the VIP filter.
    SetFilterWord {
        index: u32,
        bits: u64,
    },
    SetVipWord4 {
        word: VipWord,
    },
    SetVipWord6 {
        word: VipWord,
    },
    SetPrefixLengths4 {
        lengths: PrefixLengths,
    },
    SetPrefixLengths6 {
        lengths: PrefixLengths,
    },
    /// Whom a QUIC connection ID names. What it takes the place of is free once every packet that read it is done:
    /// a grace stands before the next of these.
    SetServer {
        key: ServerKey,
        id: u16,
    },
    RemoveServer {
        key: ServerKey,
    },
    /// Waits until no packet is still at work with what it read before.
    Grace,
}
