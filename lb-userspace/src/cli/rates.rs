//! What two readings of counters say of the time between them.

/// The time between two readings.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    seconds: f64,
}

impl Rate {
    /// None where no time has passed, or the readings are of two lives of the host.
    pub fn new(earlier_ns: u64, later_ns: u64) -> Option<Self> {
        let ns = later_ns.checked_sub(earlier_ns).filter(|ns| *ns > 0)?;
        Some(Self { seconds: ns as f64 / 1e9 })
    }

    pub fn seconds(self) -> f64 {
        self.seconds
    }

    /// A second. A counter that began anew, as that of a backend which left and came back does, counts from zero.
    pub fn of(self, earlier: u64, later: u64) -> f64 {
        later.checked_sub(earlier).unwrap_or(later) as f64 / self.seconds
    }

    pub fn packets(self, earlier: u64, later: u64) -> String {
        short(self.of(earlier, later))
    }

    pub fn bits(self, earlier_bytes: u64, later_bytes: u64) -> String {
        short(8.0 * self.of(earlier_bytes, later_bytes))
    }
}

/// Three digits that count, and a power of a thousand.
pub fn short(value: f64) -> String {
    let units = ["", " k", " M", " G", " T"];
    let (mut value, mut unit) = (value, 0);
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = match value {
        v if v == 0.0 || v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        _ => 2,
    };
    format!("{value:.digits$}{}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_by_the_second_and_short() {
        let rate = Rate::new(1_000_000_000, 3_000_000_000).expect("time has passed");
        assert_eq!(rate.packets(100, 300), "100");
        assert_eq!(rate.packets(100, 101), "0.50");
        assert_eq!(rate.packets(0, 0), "0");
        assert_eq!(rate.packets(0, 2_469_000), "1.23 M");
        assert_eq!(rate.packets(0, 1999), "1.00 k");
        assert_eq!(rate.bits(0, 250_000_000), "1.00 G");
        assert_eq!(rate.bits(0, 31_250), "125 k");
    }

    #[test]
    fn a_counter_that_began_anew_counts_from_zero() {
        let rate = Rate::new(0, 1_000_000_000).expect("time has passed");
        assert_eq!(rate.packets(1000, 7), "7.00");
    }

    #[test]
    fn no_time_and_no_rate() {
        assert!(Rate::new(5, 5).is_none() && Rate::new(6, 5).is_none());
    }
}
