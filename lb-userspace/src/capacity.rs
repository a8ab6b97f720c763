//! How many rows each map has for given limits, and what that takes. Pure: `xlb check` prints it,
//! the loader makes the maps from it, and the plan refuses what does not fit.

use lb_common::abi::{
    BACKEND_PASS, MOST_INTERFACES, MOST_SOURCES, OUTCOME_ROWS, PIN_EVENT_ROWS, PINS_PER_BUCKET,
    RULES_PER_ROW, SHORTEST_TABLE_LOG2, SLOTS_PER_ROW, VIP4_WAYS, VIP6_WAYS, VipIndex, map,
};

use crate::config::model::Limits;
use crate::tables::buckets;

/// Ways out of the host: (interface, MTU, source) combinations.
const EGRESS_ROWS: u32 = 1024;

/// Rows before the first table, so that row 0 is never part of one.
pub const RESERVED_SLOT_ROWS: u32 = (1 << SHORTEST_TABLE_LOG2) / SLOTS_PER_ROW;

/// Rows of every map whose size the limits decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Logarithm of the buckets in one of the two halves of the VIP maps.
    pub vip4_half_log2: u32,
    pub vip6_half_log2: u32,
    pub vips: u32,
    pub tables: u32,
    pub slot_rows: u32,
    /// Rows for all ids, whatever `limits.backends` says.
    pub backend_rows: u32,
    /// Ways out to next hops. Behind them lies a way back for each interface.
    pub egress_rows: u32,
    /// Buckets of pins, a power of two.
    pub pin_buckets: u32,
    /// Buckets of connections; 0 where nothing is translated.
    pub connection_buckets: u32,
}

impl Capacity {
    pub fn new(limits: &Limits) -> Self {
        let tables = (limits.slots >> SHORTEST_TABLE_LOG2).min(u32::from(u16::MAX));
        Self {
            vip4_half_log2: buckets::most_log2(limits.vips, VIP4_WAYS as u32),
            vip6_half_log2: buckets::most_log2(limits.vips, VIP6_WAYS as u32),
            vips: limits.vips,
            tables,
            slot_rows: limits.slots / SLOTS_PER_ROW + RESERVED_SLOT_ROWS,
            // The row that stands for the host's stack is the last id there is.
            backend_rows: u32::from(BACKEND_PASS) + 1,
            egress_rows: EGRESS_ROWS,
            pin_buckets: limits.pins.div_ceil(PINS_PER_BUCKET as u32).next_power_of_two(),
            connection_buckets: limits.connections / PINS_PER_BUCKET as u32,
        }
    }

    pub fn vip4_rows(&self) -> u32 {
        1 + 2 * (1 << self.vip4_half_log2)
    }

    pub fn vip6_rows(&self) -> u32 {
        1 + 2 * (1 << self.vip6_half_log2)
    }

    /// Rows of port rules in one of the two halves that each family has.
    pub fn rule_half_rows(&self) -> u32 {
        self.vips.div_ceil(RULES_PER_ROW)
    }

    pub fn rule_rows(&self) -> u32 {
        4 * self.rule_half_rows()
    }

    /// Rows of VIP counters: those of VIPs that go are still counted into while others take their place.
    pub fn vip_rows(&self) -> u32 {
        2 * self.vips
    }

    /// Rows of all ways out: to next hops, and back out of each interface.
    pub fn way_rows(&self) -> u32 {
        self.egress_rows + MOST_INTERFACES
    }

    /// Connections at a time.
    pub fn connections(&self) -> u32 {
        self.connection_buckets * PINS_PER_BUCKET as u32
    }

    /// Rows of each map by name, with the bytes of a value and whether every CPU has its own.
    pub fn rows(&self) -> Vec<MapRows> {
        let row =
            |limit, name, rows, value_bytes, per_cpu| MapRows { name, rows, value_bytes, per_cpu, limit };
        let (fixed, vips, slots) = (None, Some("vips"), Some("slots"));
        let (pins, connections) = (Some("pins"), Some("connections"));
        vec![
            row(fixed, map::META, 1, 64, false),
            row(fixed, map::VIP_INDEX, 1, size_of::<VipIndex>() as u32, false),
            row(vips, map::PORT_RULES, self.rule_rows(), 64, false),
            row(vips, map::VIPS4, self.vip4_rows(), 64, false),
            row(vips, map::VIPS6, self.vip6_rows(), 64, false),
            row(slots, map::TABLES, self.tables, 8, false),
            row(slots, map::TABLE_STATES, self.tables, 64, false),
            row(slots, map::SLOTS, self.slot_rows, 64, false),
            row(fixed, map::BACKENDS, self.backend_rows, 64, false),
            row(fixed, map::EGRESS, self.way_rows(), 64, false),
            row(pins, map::PINS, self.pin_buckets, 64, false),
            row(fixed, map::LOADS, self.backend_rows, 16, false),
            // A map has one row at the least.
            row(connections, map::CONNECTIONS, self.connection_buckets.max(1), 64, false),
            row(connections, map::RECORDS, self.connections().max(1), 64, false),
            row(fixed, map::SOURCES, MOST_SOURCES, 24, false),
            row(
                connections,
                map::REPLIES,
                if self.connection_buckets == 0 { 1 } else { self.backend_rows },
                40,
                true,
            ),
            row(fixed, map::PIN_EVENTS, PIN_EVENT_ROWS, 8, true),
            row(fixed, map::OUTCOMES, OUTCOME_ROWS, 8, true),
            row(vips, map::VIP_TRAFFIC, self.vip_rows(), 16, true),
            row(fixed, map::BACKEND_TRAFFIC, self.backend_rows, 16, true),
        ]
    }

    /// Bytes that the maps take on a host with this many CPUs.
    pub fn bytes(&self, cpus: u64) -> u64 {
        self.rows().iter().map(|map| map.bytes(cpus)).sum()
    }
}

impl Capacity {
    /// The sizes of maps that are there already, for reading them without the configuration.
    pub fn of_maps(rows: impl Fn(&'static str) -> Option<u32>) -> Option<Self> {
        // A half holds a power of two of buckets, and there is one row before both.
        let half_log2 = |name| rows(name).map(|rows| (rows / 2).ilog2());
        Some(Self {
            vip4_half_log2: half_log2(map::VIPS4)?,
            vip6_half_log2: half_log2(map::VIPS6)?,
            vips: rows(map::VIP_TRAFFIC)? / 2,
            tables: rows(map::TABLES)?,
            slot_rows: rows(map::SLOTS)?,
            backend_rows: rows(map::BACKENDS)?,
            egress_rows: rows(map::EGRESS)?.checked_sub(MOST_INTERFACES)?,
            pin_buckets: rows(map::PINS)?,
            connection_buckets: rows(map::RECORDS)? / PINS_PER_BUCKET as u32,
        })
    }
}

/// The size of one map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapRows {
    pub name: &'static str,
    pub rows: u32,
    pub value_bytes: u32,
    pub per_cpu: bool,
    /// The key of `limits` that decides how many rows; the others are as they are.
    pub limit: Option<&'static str>,
}

impl MapRows {
    /// Values, and for values per CPU the pointer that leads to them (kernel 6.18, `bpf_array.pptrs`).
    pub fn bytes(&self, cpus: u64) -> u64 {
        let copies = if self.per_cpu { cpus } else { 1 };
        let pointers = if self.per_cpu { 8 } else { 0 };
        u64::from(self.rows) * (u64::from(self.value_bytes) * copies + pointers)
    }
}

/// Bytes in the unit that keeps them short (IEC).
pub fn bytes(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", units[unit]) }
}

/// CPUs that the kernel keeps counters for.
pub fn possible_cpus() -> u64 {
    aya::util::nr_cpus().map_or(1, |cpus| cpus as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_decides_the_rows_of_its_maps_and_of_no_others() {
        let least = Limits { vips: 1, backends: 1, slots: 8192, pins: 4096, connections: 4096 };
        // Most that each may be in a file.
        for (key, limits) in [
            ("vips", Limits { vips: 1 << 15, ..least }),
            ("slots", Limits { slots: 1 << 27, ..least }),
            ("pins", Limits { pins: 1 << 27, ..least }),
            ("connections", Limits { connections: 1 << 26, ..least }),
        ] {
            for (less, more) in Capacity::new(&least).rows().iter().zip(Capacity::new(&limits).rows()) {
                let grows = more.rows > less.rows;
                // There are replies of every id, or none.
                let may = more.limit == Some(key) || !grows;
                assert!(may, "{}: {} rows with {key}", more.name, more.rows);
            }
            assert!(Capacity::new(&limits).bytes(1) > Capacity::new(&least).bytes(1), "{key}");
        }
    }

    #[test]
    fn sizes_are_told_in_the_unit_that_fits() {
        for (size, text) in
            [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (9 << 29, "4.5 GiB")]
        {
            assert_eq!(bytes(size), text);
        }
    }
}
