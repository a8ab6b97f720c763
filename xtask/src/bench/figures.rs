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

/// The least value that so many of the sorted values are not above: a part of all. None of nothing.
pub fn percentile<T: Copy>(sorted: &[T], part: f64) -> Option<T> {
    let place = (sorted.len() as f64 * part).ceil() as usize;
    sorted.get(place.max(1) - 1).or(sorted.last()).copied()
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
    fn percentiles_are_values_that_were_measured() {
        let values: Vec<u32> = (1..=200).collect();
        assert_eq!([0.0, 0.5, 0.99, 1.0].map(|part| percentile(&values, part).unwrap()), [1, 100, 198, 200]);
        assert_eq!([0.5, 0.999].map(|part| percentile(&[1, 2, 3, 4], part).unwrap()), [2, 4]);
        assert_eq!(percentile(&[7], 0.5), Some(7));
        assert_eq!(percentile::<u32>(&[], 0.5), None);
    }

    #[test]
    fn one_value_is_its_own_spread_and_none_is_no_number() {
        assert_eq!(Spread::of([7.0]), Spread { low: 7.0, median: 7.0, high: 7.0 });
        assert!(Spread::of([]).median.is_nan());
    }
}
