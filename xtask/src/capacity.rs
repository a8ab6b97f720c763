//! `cargo xtask bench capacity`: how many balancers certain traffic takes, from what a packet was measured to cost.

pub mod checks;
mod model;

use std::path::PathBuf;
use std::time::Duration;

use ::tests::lab;
use anyhow::{Context, Result, ensure};
use lb_common::abi::BackendKind;
use serde_json::Value;

use self::model::{Answers, Costs, Step, Wanted, Way, number, steps};
use crate::bench::report::{self, Report};
use crate::root;

#[derive(clap::Args)]
pub struct Arguments {
    /// Of all regions, in the busiest hour
    #[arg(long, value_name = "N", default_value_t = 10e6, value_parser = amount)]
    requests_per_second: f64,
    /// From clients to VIPs: 6 is a request on a connection of its own (SYN, ACK, request, ACK, FIN, ACK)
    #[arg(long, value_name = "N", default_value_t = 6.0, value_parser = amount)]
    packets_per_request: f64,
    /// Mean length of a client's frame, Ethernet header included
    #[arg(long, value_name = "BYTES", default_value_t = 120.0, value_parser = amount)]
    frame_bytes: f64,
    /// From backends to clients: they meet the balancer with `nat` and `fullnat` only
    #[arg(long, value_name = "N", default_value_t = 5.0, value_parser = amount)]
    packets_per_answer: f64,
    /// Mean length of a backend's frame
    #[arg(long, value_name = "BYTES", default_value_t = 400.0, value_parser = amount)]
    answer_bytes: f64,
    /// Of all regions; a balancer has those of its own
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
    backends: u32,
    /// Pools that they are in, of each region
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    pools: u32,
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    regions: u32,
    /// Regions that may be gone while the others carry everything
    #[arg(long, value_name = "N", default_value_t = 1)]
    regions_lost: u32,
    /// Open at a time, of all regions
    #[arg(long, value_name = "N", default_value_t = 10e6, value_parser = amount)]
    connections: f64,
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = interval)]
    check_interval: Duration,
    /// Cores of a balancer that take packets
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    cores: u32,
    /// Gbit/s of a balancer's NIC
    #[arg(long, value_name = "GBIT", default_value_t = 25.0, value_parser = amount)]
    nic: f64,
    /// Share of a balancer that stays free in the busiest hour, percent
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=99))]
    headroom: u32,
    /// Balancers of a region beyond those that carry it
    #[arg(long, value_name = "N", default_value_t = 1)]
    spare: u32,
    #[arg(long, default_value = "ipip", value_parser = ["ipip", "gue", "l2", "nat", "fullnat"])]
    forward: String,
    /// Nanoseconds of a packet, in place of those that were measured
    #[arg(long, value_name = "NS", value_parser = amount)]
    ns: Option<f64>,
    /// A result of `bench packet --json`; without it the newest in docs/results
    #[arg(long, value_name = "FILE", conflicts_with = "ns")]
    results: Option<PathBuf>,
    /// Nanoseconds that the NIC's driver takes for a packet around xlb: yours to say, no bench here measures it; 100, a
    /// guess, if not said
    #[arg(long, value_name = "NS", value_parser = amount)]
    driver_ns: Option<f64>,
    /// Microseconds of a core that a health check takes; 74, of type http as docs/benchmarks.md measured it, if not said
    #[arg(long, value_name = "US", value_parser = amount)]
    check_us: Option<f64>,
    /// Measure what a check takes (needs root, and a release build, which it makes)
    #[arg(long, conflicts_with = "check_us")]
    measure_checks: bool,
    /// Write the result here, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Nobody measured it.
const DRIVER_NS: f64 = 100.0;

/// Measured: docs/benchmarks.md says how.
const CHECK_US: f64 = 74.0;

fn interval(text: &str) -> Result<Duration, String> {
    lb_userspace::config::duration(text, Duration::from_millis(100)..=Duration::from_secs(3600))
}

/// `10e6` is 10000000.
fn amount(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| format!("{text:?} is no number"))?;
    if value > 0.0 && value.is_finite() { Ok(value) } else { Err(format!("{text} is not above 0")) }
}

pub fn run(arguments: &Arguments) -> Result<()> {
    if arguments.measure_checks {
        ensure!(lab::available()?, "labs are to be skipped; unset {}", lab::SKIP_ROOT);
        if crate::rerun_optimised()? {
            return Ok(());
        }
    }
    let (packet_ns, source) = packet_ns(arguments)?;
    let check_us =
        if arguments.measure_checks { checks::measure()? } else { arguments.check_us.unwrap_or(CHECK_US) };
    let costs = Costs { packet_ns, driver_ns: arguments.driver_ns.unwrap_or(DRIVER_NS), check_us };
    let steps = steps(&wanted(arguments), &costs)?;
    say!("{}", table(&steps));
    say!("balancer  {source}");
    say!("driver    {}", of_driver(arguments.driver_ns));
    say!("check     {}", of_check(arguments, check_us));
    let report = Report::new("capacity", steps)?;
    if let Some(path) = &arguments.json {
        report.write(path)?;
    }
    say!("Again: {}", report.command);
    Ok(())
}

/// Where its time is from.
fn of_driver(given: Option<f64>) -> String {
    match given {
        Some(_) => "as --driver-ns says".to_owned(),
        None => format!(
            "{DRIVER_NS} ns is a guess: no bench here measures a NIC's driver. The line \"as long as a driver takes\"\n\
             {:10}says how far off it may be. Put one balancer under load, and say --driver-ns.",
            ""
        ),
    }
}

fn of_check(arguments: &Arguments, us: f64) -> String {
    if arguments.measure_checks {
        return format!("of type http, measured just now: {us:.1} us");
    }
    match arguments.check_us {
        Some(_) => "as --check-us says".to_owned(),
        None => {
            "of type http as docs/benchmarks.md measured it; --measure-checks measures it here".to_owned()
        }
    }
}

fn wanted(arguments: &Arguments) -> Wanted {
    let translates = matches!(arguments.forward.as_str(), "nat" | "fullnat");
    // Over IPv4, as the lines of `bench packet` that are read.
    let kind = match arguments.forward.as_str() {
        "ipip" => BackendKind::Ipip4,
        "gue" => BackendKind::Gue4,
        "nat" => BackendKind::Nat4,
        "fullnat" => BackendKind::Fullnat4,
        _ => BackendKind::L2,
    };
    Wanted {
        requests_per_second: arguments.requests_per_second,
        packets_per_request: arguments.packets_per_request,
        frame_bytes: arguments.frame_bytes,
        backends: arguments.backends,
        pools: arguments.pools,
        regions: arguments.regions,
        regions_lost: arguments.regions_lost,
        connections: arguments.connections,
        check_interval: arguments.check_interval,
        load: f64::from(100 - arguments.headroom) / 100.0,
        spare: arguments.spare,
        cores: arguments.cores,
        nic_gbit: arguments.nic,
        way: Way {
            header_bytes: f64::from(kind.overhead()),
            answers: translates
                .then_some(Answers { packets: arguments.packets_per_answer, bytes: arguments.answer_bytes }),
        },
    }
}

/// What the balancer takes for a packet, and where that is from.
fn packet_ns(arguments: &Arguments) -> Result<(f64, String)> {
    if let Some(ns) = arguments.ns {
        return Ok((ns, "as --ns says".to_owned()));
    }
    let path = match &arguments.results {
        Some(path) => path.clone(),
        None => report::newest("packet")?.with_context(|| {
            "no result of `bench packet` is kept; `cargo xtask bench packet --json FILE` makes one for --results, \
             or give --ns"
        })?,
    };
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let report: Value = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    let (line, flows, ns) = slowest(&report, &arguments.forward, arguments.pools > 1)
        .with_context(|| path.display().to_string())?;
    let shown = path.strip_prefix(root()).unwrap_or(&path).display();
    let (date, cpu) = (text_of(&report["date"]), text_of(&report["machine"]["cpu"]));
    let mut source = format!("{line}, flows {flows}: {} ns, {shown} ({date}, {cpu})", number(ns));
    if arguments.pools > 1 && !knows_many_services(&report, &arguments.forward) {
        source +=
            &format!("\n{:10}with one service; slots of many may be in no cache, which --ns can say", "");
    }
    Ok((ns, source))
}

/// How lines of `bench packet` end whose flows are those of so many services.
const MANY_SERVICES: &str = ", 1,000 services";

fn knows_many_services(report: &Value, forward: &str) -> bool {
    let begin = format!("{forward} IPv4, ");
    let mut lines = report["rows"].as_array().into_iter().flatten().filter_map(|row| row["line"].as_str());
    lines.any(|line| line.starts_with(&begin) && line.ends_with(MANY_SERVICES))
}

fn text_of(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}

/// The dearest of the lines of an IPv4 packet in an established connection: that with the most flows, as a rule. Where
/// there are several pools, their slots may be in no cache: what many services take counts then, too.
fn slowest(report: &Value, forward: &str, several_pools: bool) -> Result<(String, String, f64)> {
    let rows = report["rows"].as_array().context("there are no rows; is it a result of `bench packet`?")?;
    let begin = format!("{forward} IPv4, ");
    let of_row = |row: &Value| {
        let line = row["line"].as_str()?;
        let kind = line.strip_prefix(&begin)?;
        let kind = kind.strip_suffix(MANY_SERVICES).filter(|_| several_pools).unwrap_or(kind);
        matches!(kind, "TCP ACK" | "UDP").then_some(())?;
        // Rounds that something else ran in.
        (row["disturbed"].as_bool() != Some(true)).then_some(())?;
        Some((line.to_owned(), text_of(&row["flows"]).to_owned(), row["net"]["median"].as_f64()?))
    };
    let dearest = rows.iter().filter_map(of_row).max_by(|one, other| one.2.total_cmp(&other.2));
    let dearest =
        dearest.with_context(|| format!("there is no line \"{begin}TCP ACK\" or \"{begin}UDP\""))?;
    ensure!(dearest.2 > 0.0, "{}: {} ns", dearest.0, dearest.2);
    Ok(dearest)
}

fn table(steps: &[Step]) -> String {
    let width = steps.iter().map(|step| step.name.len()).max().unwrap_or(0);
    let line = |step: &Step| {
        let digits = if step.value < 100.0 && step.value.fract() != 0.0 { 1 } else { 0 };
        let value = if digits == 1 { format!("{:.1}", step.value) } else { number(step.value) };
        let space = if step.unit.is_empty() || step.unit == "/s" { "" } else { " " };
        format!("{:width$}  {:>16}  = {}\n", step.name, format!("{value}{space}{}", step.unit), step.how)
    };
    steps.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dearest_established_flow_of_the_way_counts() {
        let row = |line: &str, flows: &str, ns: f64| serde_json::json!({"line": line, "flows": flows, "net": {"low": 0.0, "median": ns, "high": 0.0}});
        let disturbed = serde_json::json!({"line": "ipip IPv4, UDP", "flows": "1", "net": {"median": 700.0}, "disturbed": true});
        let report = serde_json::json!({"rows": [
            row("ipip IPv4, TCP ACK", "1", 35.0),
            row("ipip IPv4, TCP ACK", "1M", 60.0),
            row("ipip IPv4, TCP ACK, moved slots, new pin", "1M", 900.0),
            row("ipip IPv6, TCP ACK", "1M", 99.0),
            disturbed,
            row("ipip IPv4, UDP, 1,000 services", "1M", 250.0),
            row("nat IPv4, TCP ACK", "100k", 300.0),
        ]});
        let one = slowest(&report, "ipip", false).unwrap();
        assert_eq!(one, ("ipip IPv4, TCP ACK".into(), "1M".into(), 60.0));
        let many = slowest(&report, "ipip", true).unwrap();
        assert_eq!(many, ("ipip IPv4, UDP, 1,000 services".into(), "1M".into(), 250.0));
        assert_eq!(slowest(&report, "nat", true).unwrap().2, 300.0);
        assert!(knows_many_services(&report, "ipip") && !knows_many_services(&report, "nat"));
        assert!(slowest(&report, "l2", true).is_err());
        assert!(slowest(&serde_json::json!({}), "ipip", true).is_err());
    }

    #[test]
    fn amounts_are_positive_and_may_have_exponents() {
        assert_eq!(amount("10e6"), Ok(10_000_000.0));
        for wrong in ["0", "-1", "inf", "NaN", "many"] {
            assert!(amount(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn every_step_shows_how_it_comes_about() {
        let step = Step { name: "packets".into(), how: "10 x 6".into(), value: 60_000.0, unit: "/s" };
        assert_eq!(table(&[step]), "packets          60,000/s  = 10 x 6\n");
    }
}
