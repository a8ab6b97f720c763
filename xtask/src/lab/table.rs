//! What `bench lab` measured, as rows, as tables and as a plot. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::Serialize;

use super::measure::{Measure, Measured};
use super::scene::Side;
use crate::bench::figures::percentile;
use crate::plot::{self, Axis, Bars};

/// One figure of one side.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    pub side: String,
    pub measure: String,
    /// Whether hosts hand over segments and checksums unfinished, as to a NIC.
    pub offloads: bool,
    pub unit: &'static str,
    /// The median of the rounds; of a latency, the percentile over all rounds' requests.
    pub value: f64,
    pub lowest: f64,
    pub highest: f64,
    /// The median over rounds of the ratio to `direct` in the same round.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
    /// What is added to `direct`, in the unit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub added: Option<f64>,
    /// Whether something else ran at the beginning of a round of it.
    pub disturbed: bool,
}

/// Percentiles of latency that are told.
const PERCENTILES: [(&str, f64); 3] = [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)];

const CPU: &str = "CPU a request";

#[derive(Default)]
pub struct Results {
    sides: Vec<String>,
    /// What was measured, in order, with whether offloads were on.
    measures: Vec<(bool, Measure)>,
    rates: BTreeMap<(String, usize), Rounds>,
    /// By round.
    times: BTreeMap<String, Vec<Vec<Duration>>>,
    cpu_us: BTreeMap<String, Rounds>,
    disturbed: BTreeSet<(String, usize)>,
}

/// A value for each round that brought one.
type Rounds = BTreeMap<u32, f64>;

impl Results {
    /// `direct` is the first side.
    pub fn new(sides: &[Side], measures: &[(bool, Measure)]) -> Self {
        Self {
            sides: sides.iter().map(|side| side.name()).collect(),
            measures: measures.to_vec(),
            ..Self::default()
        }
    }

    /// Something else ran beside this measure of a side.
    pub fn disturb(&mut self, side: Side, index: usize) {
        self.disturbed.insert((side.name(), index));
    }

    pub fn add(&mut self, side: Side, index: usize, round: u32, measured: Measured) {
        match measured {
            Measured::Rate(rate) => {
                self.rates.entry((side.name(), index)).or_default().insert(round, rate);
            }
            Measured::Latency { mut times, cpu_us } => {
                times.sort();
                self.times.entry(side.name()).or_default().push(times);
                self.cpu_us.entry(side.name()).or_default().insert(round, cpu_us);
            }
        }
    }

    pub fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        for (index, (offloads, measure)) in self.measures.iter().enumerate() {
            for side in &self.sides {
                let disturbed = self.disturbed.contains(&(side.clone(), index));
                match name_and_unit(*measure) {
                    Some((name, unit)) => {
                        let of = |side: &String| self.rates.get(&(side.clone(), index));
                        let row = (of(side)).and_then(|values| row(side, values, of(&self.sides[0])));
                        let offloads = *offloads;
                        rows.extend(row.map(|row| Row { measure: name, offloads, unit, disturbed, ..row }));
                    }
                    None => {
                        rows.extend(self.latency(side).into_iter().map(|row| Row { disturbed, ..row }));
                    }
                }
            }
        }
        rows
    }

    fn latency(&self, side: &str) -> Vec<Row> {
        let all = |side: &str| self.times.get(side).map(|rounds| sorted(rounds.concat()));
        let (Some(rounds), Some(pooled)) = (self.times.get(side), all(side)) else { return Vec::new() };
        let direct = all(&self.sides[0]);
        let mut rows = Vec::new();
        for (name, part) in PERCENTILES {
            let values = (1..).zip(rounds.iter().map(|times| percentile_us(times, part))).collect();
            let value = percentile_us(&pooled, part);
            rows.extend(row(side, &values, None).map(|row| Row {
                measure: format!("latency {name}"),
                unit: "us",
                value,
                added: direct.as_ref().map(|direct| value - percentile_us(direct, part)),
                ..row
            }));
        }
        let cpu = |side: &str| self.cpu_us.get(side);
        let row = cpu(side).and_then(|values| row(side, values, cpu(&self.sides[0])));
        rows.extend(row.map(|row| Row { measure: CPU.to_owned(), unit: "us", ..row }));
        rows
    }
}

/// A latency has several rows, with names of their own.
fn name_and_unit(measure: Measure) -> Option<(String, &'static str)> {
    let streams = |streams| if streams == 1 { "1 stream".to_owned() } else { format!("{streams} streams") };
    Some(match measure {
        Measure::Upload(count) => (format!("upload, {}", streams(count)), "Mbit/s"),
        Measure::Download(count) => (format!("download, {}", streams(count)), "Mbit/s"),
        Measure::Requests => ("requests, kept alive".to_owned(), "/s"),
        Measure::Connections => ("requests, one a connection".to_owned(), "/s"),
        Measure::Latency => return None,
    })
}

/// A row without its name and unit.
fn row(side: &str, rounds: &Rounds, direct: Option<&Rounds>) -> Option<Row> {
    let ratio = |direct: &Rounds| {
        let of_round = |(round, value): (&u32, &f64)| Some(value / direct.get(round)?);
        rounds.iter().filter_map(of_round).collect::<Vec<f64>>()
    };
    let ratios = direct.map(ratio);
    let values: Vec<f64> = rounds.values().copied().collect();
    Some(Row {
        side: side.to_owned(),
        measure: String::new(),
        offloads: false,
        unit: "",
        value: median(&values)?,
        lowest: values.iter().copied().reduce(f64::min)?,
        highest: values.iter().copied().reduce(f64::max)?,
        ratio: ratios.as_deref().and_then(median),
        added: None,
        disturbed: false,
    })
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

fn sorted(mut times: Vec<Duration>) -> Vec<Duration> {
    times.sort();
    times
}

/// Microseconds that this part of the sorted times is not above.
fn percentile_us(sorted: &[Duration], part: f64) -> f64 {
    percentile(sorted, part).map_or(0.0, |time| time.as_secs_f64() * 1e6)
}

/// A table for each kind of measure: a line for each side, a column for each measure.
pub fn tables(rows: &[Row]) -> String {
    let throughput = |row: &&Row| row.unit != "us";
    let (with, without): (Vec<&Row>, Vec<&Row>) =
        rows.iter().filter(throughput).partition(|row| row.offloads);
    let latency: Vec<&Row> = rows.iter().filter(|row| !throughput(row)).collect();
    let parts = [
        (
            "Offloads off: every packet of 1500 bytes or less on its own. In brackets: the ratio to direct.",
            without,
        ),
        (
            "Latency at a fixed rate, and what all CPUs worked for a request. In brackets: added to direct, or the ratio.",
            latency,
        ),
        (
            "Offloads on: where no XDP is on the way, segments of 64 KB travel as one. In brackets: the ratio to direct.",
            with,
        ),
    ];
    let shown = parts.into_iter().filter(|(_, rows)| !rows.is_empty());
    shown.map(|(title, rows)| format!("{title}\n\n{}", table(&rows))).collect::<Vec<_>>().join("\n")
}

/// In the form of Markdown, so that the docs can take it over.
fn table(rows: &[&Row]) -> String {
    let mut columns: Vec<(&str, &str)> = Vec::new();
    let mut sides: Vec<&str> = Vec::new();
    for row in rows {
        let column = (row.measure.as_str(), row.unit);
        if !columns.contains(&column) {
            columns.push(column);
        }
        if !sides.contains(&row.side.as_str()) {
            sides.push(&row.side);
        }
    }
    let title = |(measure, unit): &(&str, &str)| match *unit {
        "/s" => format!("{measure}/s"),
        unit => format!("{measure}, {unit}"),
    };
    let mut lines = vec![std::iter::once("side".to_owned()).chain(columns.iter().map(title)).collect()];
    for side in sides {
        let of = |column: &(&str, &str)| {
            let found =
                rows.iter().find(|row| row.side == side && (row.measure.as_str(), row.unit) == *column);
            found.map_or_else(|| "-".to_owned(), |row| cell(row))
        };
        lines.push(std::iter::once(side.to_owned()).chain(columns.iter().map(of)).collect());
    }
    markdown(&lines)
}

/// Lines of cells, the first of them the head; columns are as wide as they have to be.
pub fn markdown(lines: &[Vec<String>]) -> String {
    let columns = lines.first().map_or(0, Vec::len);
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (index, line) in lines.iter().enumerate() {
        let cells = line.iter().zip(&widths).enumerate().map(|(column, (cell, width))| {
            if column == 0 { format!(" {cell:width$} |") } else { format!(" {cell:>width$} |") }
        });
        text += &format!("|{}\n", cells.collect::<String>());
        if index == 0 {
            let rules = widths.iter().enumerate().map(|(column, width)| {
                if column == 0 {
                    format!("{}|", "-".repeat(width + 2))
                } else {
                    format!("{}:|", "-".repeat(width + 1))
                }
            });
            text += &format!("|{}\n", rules.collect::<String>());
        }
    }
    text
}

fn cell(row: &Row) -> String {
    let digits = usize::from(row.unit == "us");
    match (row.added, row.ratio) {
        (Some(added), _) => format!("{:.digits$} ({added:+.digits$})", row.value),
        (None, Some(ratio)) => format!("{:.digits$} ({ratio:.2})", row.value),
        (None, None) => format!("{:.digits$}", row.value),
    }
}

/// Every ratio to direct, as bars: a group for each measure, a colour for each other side. Latency and CPU are no rates,
/// and left out.
pub fn plot(rows: &[Row]) -> anyhow::Result<String> {
    let direct = Side::Direct.name();
    let is_shown = |row: &&Row| row.unit != "us" && !row.offloads && row.side != direct;
    let shown: Vec<&Row> = rows.iter().filter(is_shown).collect();
    let mut groups: Vec<String> = Vec::new();
    let mut sides: Vec<&str> = Vec::new();
    for row in &shown {
        if !groups.contains(&row.measure) {
            groups.push(row.measure.clone());
        }
        if !sides.contains(&row.side.as_str()) {
            sides.push(&row.side);
        }
    }
    let bars = sides.into_iter().map(|side| {
        let of = |group: &String| {
            let found = shown.iter().find(|row| row.side == side && row.measure == *group);
            found.and_then(|row| row.ratio)
        };
        Bars { name: side.to_owned(), values: groups.iter().map(of).collect() }
    });
    let title = "Share of what direct routing carries, offloads off (more is better)";
    plot::bars(title, &Axis::linear("ratio to direct"), &groups, &bars.collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn millis(times: &[u64]) -> Vec<Duration> {
        times.iter().map(|time| Duration::from_millis(*time)).collect()
    }

    fn results() -> Results {
        let (direct, nat) = (Side::Direct, Side::Xlb("nat"));
        let mut results = Results::new(
            &[direct, nat],
            &[(false, Measure::Upload(1)), (false, Measure::Latency), (true, Measure::Upload(1))],
        );
        for (round, (one, other)) in (1..).zip([(100.0, 50.0), (200.0, 160.0), (50.0, 35.0)]) {
            results.add(direct, 0, round, Measured::Rate(one));
            results.add(nat, 0, round, Measured::Rate(other));
            results.add(direct, 2, round, Measured::Rate(1000.0));
            results.add(nat, 2, round, Measured::Rate(100.0));
            let late = 10 * u64::from(round - 1);
            results.add(direct, 1, round, Measured::Latency { times: millis(&[2, 1, 3]), cpu_us: 10.0 });
            results.add(nat, 1, round, Measured::Latency { times: millis(&[3, 2, 5 + late]), cpu_us: 15.0 });
        }
        results
    }

    #[test]
    fn a_round_without_a_value_is_compared_with_nothing() {
        let (direct, nat) = (Side::Direct, Side::Xlb("nat"));
        let mut results =
            Results::new(&[direct, nat], &[(false, Measure::Upload(1)), (false, Measure::Latency)]);
        results.add(direct, 0, 2, Measured::Rate(100.0));
        results.add(nat, 0, 1, Measured::Rate(90.0));
        results.add(nat, 0, 2, Measured::Rate(50.0));
        results.add(nat, 1, 2, Measured::Latency { times: millis(&[1]), cpu_us: 1.0 });
        results.disturb(nat, 0);
        let rows = results.rows();
        let row = |side: &str| rows.iter().find(|row| row.side == side).unwrap();
        assert_eq!((row("xlb-nat").ratio, row("xlb-nat").value), (Some(0.5), 70.0));
        assert!(row("xlb-nat").disturbed && !row("direct").disturbed);
        let latency = rows.iter().find(|row| row.measure == "latency p50").unwrap();
        assert_eq!((latency.added, latency.disturbed), (None, false));
        assert!(tables(&rows).contains("1000.0 |"), "{}", tables(&rows));
    }

    #[test]
    fn ratios_are_of_one_round_and_values_are_medians() {
        let rows = results().rows();
        let row = rows.iter().find(|row| row.side == "xlb-nat" && !row.offloads).unwrap();
        assert_eq!((row.value, row.lowest, row.highest), (50.0, 35.0, 160.0));
        // 0.5, 0.8 and 0.7; of the medians it would be 0.5.
        assert_eq!(row.ratio, Some(0.7));
    }

    #[test]
    fn latency_is_of_all_rounds_and_told_as_what_is_added() {
        let rows = results().rows();
        let row =
            |measure: &str| rows.iter().find(|row| row.side == "xlb-nat" && row.measure == measure).unwrap();
        assert_eq!((row("latency p50").value, row("latency p50").added), (3000.0, Some(1000.0)));
        assert_eq!((row("latency p99.9").value, row("latency p99.9").lowest), (25_000.0, 5000.0));
        assert_eq!(row(CPU).ratio, Some(1.5));
    }

    #[test]
    fn tables_have_a_line_for_each_side_and_keep_offloads_apart() {
        let text = tables(&results().rows());
        assert!(text.contains("| xlb-nat |                50 (0.70) |"), "{text}");
        assert!(text.contains("3000.0 (+1000.0)"), "{text}");
        assert!(text.contains("100 (0.10)"), "{text}");
        assert_eq!(text.lines().filter(|line| line.starts_with("| direct")).count(), 3, "{text}");
    }
}
