//! What many timings of one thing come to. Knows nothing of what was timed.

use serde::{Deserialize, Serialize};

/// The middle of several values, and where the middle half of them lies.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    pub low: f64,
    pub median: f64,
    pub high: f64,
}

impl Spread {
    /// Quartiles; between two values, in proportion. Of nothing: not a number.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        Self { low: quantile(&values, 0.25), median: quantile(&values, 0.5), high: quantile(&values, 0.75) }
    }

    /// Half of the values lie within so much.
    pub fn width(&self) -> f64 {
        self.high - self.low
    }
}

fn quantile(sorted: &[f64], share: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = last as f64 * share;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    let value = below + (above - below) * at.fract();
    // More digits say nothing, and are many in a file.
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_lies_between_the_two_in_the_middle() {
        assert_eq!(Spread::of([4.0, 1.0, 3.0, 2.0]).median, 2.5);
        assert_eq!(Spread::of([3.0, 1.0, 2.0]).median, 2.0);
    }

    #[test]
    fn one_value_that_is_far_out_moves_neither_median_nor_quartiles() {
        let quiet = Spread::of([10.0, 11.0, 12.0, 13.0, 14.0]);
        let disturbed = Spread::of([10.0, 11.0, 12.0, 13.0, 9000.0]);
        assert_eq!(quiet, Spread { low: 11.0, median: 12.0, high: 13.0 });
        assert_eq!(disturbed, quiet);
        assert_eq!(quiet.width(), 2.0);
    }

    #[test]
    fn one_value_is_its_own_spread_and_none_is_no_number() {
        assert_eq!(Spread::of([7.0]), Spread { low: 7.0, median: 7.0, high: 7.0 });
        assert!(Spread::of([]).median.is_nan());
    }
}
