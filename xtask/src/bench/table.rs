//! The table of `docs/performance.md`: a report of `bench packet`, in Markdown. Pure.

use std::fmt::Write;

use super::packet::Row;
use super::report::Report;

/// Flows of lines, as columns.
const COLUMNS: [&str; 5] = ["1", "1k", "100k", "1M", "Zipf 1M"];

/// One row for each packet and way, one column for each number of flows.
pub fn markdown(report: &Report<Row>) -> Result<String, std::fmt::Error> {
    let harness: Vec<f64> = report.rows.iter().map(|row| row.harness.median).collect();
    let least = harness.iter().copied().fold(f64::INFINITY, f64::min);
    let most = harness.iter().copied().fold(0.0, f64::max);
    let mut text = String::new();
    writeln!(
        text,
        "{}; xlb {}, {}. The harness took {least:.0} to {most:.0} ns a packet. Nanoseconds beyond the floor, each with what\n\
         half of the rounds lie within:\n",
        report.machine, report.commit, report.date
    )?;
    let mut lines: Vec<&str> = Vec::new();
    for row in &report.rows {
        if !lines.contains(&row.line.as_str()) {
            lines.push(&row.line);
        }
    }
    writeln!(text, "| packet | floor | 1 flow | 1,000 | 100,000 | 1,000,000 | Zipf |")?;
    writeln!(text, "|---|---|---|---|---|---|---|")?;
    for line in lines {
        let rows: Vec<&Row> = report.rows.iter().filter(|row| row.line == line).collect();
        let floor = rows[0].floor.median - rows[0].harness.median;
        let mut cells =
            vec![line.to_owned(), if floor == 0.0 { String::new() } else { format!("{floor:.0}") }];
        for column in COLUMNS {
            let row = rows.iter().find(|row| row.flows == column);
            cells.push(row.map_or_else(String::new, |row| {
                let mark = if row.disturbed { " ~" } else { "" };
                format!("{:.0} ± {:.0}{mark}", row.beyond.median, row.beyond.width() / 2.0)
            }));
        }
        writeln!(text, "| {} |", cells.join(" | "))?;
    }
    writeln!(text, "\nMade by `{}`.", report.command)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::figures::Spread;
    use crate::bench::report::Machine;

    fn row(line: &str, flows: &str, [harness, floor, program]: [f64; 3]) -> Row {
        let spread = |median: f64| Spread { low: median - 1.0, median, high: median + 3.0 };
        Row {
            line: line.into(),
            flows: flows.into(),
            harness: spread(harness),
            floor: spread(floor),
            program: spread(program),
            net: spread(program - harness),
            beyond: spread(program - floor),
            ratio: spread(program / floor),
            disturbed: false,
        }
    }

    #[test]
    fn a_packet_has_one_row_with_its_flows_beside_each_other() {
        let rows = vec![
            row("ipip IPv4, TCP ACK", "1", [28.0, 42.0, 80.0]),
            row("ipip IPv4, TCP ACK", "1k", [29.0, 43.0, 85.0]),
            row("l2 IPv4, TCP ACK", "Zipf 1M", [30.0, 30.0, 51.0]),
        ];
        let machine = Machine { cpu: "EPYC".into(), cores: 2, kernel: "6.18".into(), is_virtual: false };
        let report = Report {
            tool: "xlb bench packet".into(),
            command: "cargo xtask bench packet".into(),
            date: "2026-11-23".into(),
            commit: "abc".into(),
            machine,
            notes: Vec::new(),
            rows,
        };
        let text = markdown(&report).unwrap();
        assert!(
            text.starts_with("EPYC, 2 cores, kernel 6.18; xlb abc, 2026-11-23. The harness took 28 to 30 ns")
        );
        let rows: Vec<&str> = text.lines().filter(|line| line.contains("ACK")).collect();
        assert_eq!(
            rows,
            [
                "| ipip IPv4, TCP ACK | 14 | 38 ± 2 | 42 ± 2 |  |  |  |",
                "| l2 IPv4, TCP ACK |  |  |  |  |  | 21 ± 2 |"
            ]
        );
    }

    #[test]
    fn every_line_has_a_column() {
        for line in crate::bench::lines::lines() {
            assert!(COLUMNS.contains(&line.order.to_string().as_str()), "{}", line.order);
        }
    }
}
