//! `xlb stats`: what is counted, as totals or as rates over an interval.

use std::time::Duration;

use serde_json::{Value, json};

use super::rates::Rate;
use super::tables::{self, Replied};
use super::{Format, RunDir, output};
use crate::agent::status::{BackendStats, RepliesStatus, ServiceStats, Stats};
use crate::api::Client;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Packets and bits a second, from two readings
    #[arg(short, long)]
    rate: bool,
    /// The time between them
    #[arg(short, long, value_name = "INTERVAL", value_parser = output::interval, default_value = "1s", requires = "rate")]
    interval: Duration,
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
    #[command(flatten)]
    run_dir: RunDir,
}

pub async fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let client = Client::new(&arguments.run_dir.run_dir);
    let mut stats: Stats = client.get("/v1/stats").await?;
    let mut earlier = None;
    if arguments.rate {
        tokio::time::sleep(arguments.interval).await;
        let later = client.get("/v1/stats").await?;
        earlier = Some(std::mem::replace(&mut stats, later));
    }
    let rates = earlier.as_ref().and_then(|earlier| Rates::new(earlier, &stats));
    match (arguments.output, rates) {
        (Format::Json, None) => say!("{}", serde_json::to_string_pretty(&stats)?),
        (Format::Json, Some(rates)) => say!("{}", serde_json::to_string_pretty(&rates.json(&stats)?)?),
        (Format::Table, rates) => say!("{}", text(&stats, rates.as_ref())),
    }
    Ok(())
}

/// What was counted before, in the order of what was counted after; zero for what is new.
struct Rates {
    rate: Rate,
    services: Vec<(u64, u64)>,
    backends: Vec<(u64, u64)>,
    replies: Vec<RepliesStatus>,
    outcomes: Vec<u64>,
}

impl Rates {
    fn new(earlier: &Stats, later: &Stats) -> Option<Self> {
        let rate = Rate::new(earlier.monotonic_ns, later.monotonic_ns)?;
        // Nearly always at the same place; a reload between the two readings may have moved it.
        fn same<T>(at: usize, all: &[T], is: impl Fn(&T) -> bool) -> Option<&T> {
            all.get(at).filter(|one| is(one)).or_else(|| all.iter().find(|one| is(one)))
        }
        let services = later.services.iter().enumerate().map(|(at, now)| {
            let is = |before: &ServiceStats| {
                (before.vip, before.port, &before.protocol) == (now.vip, now.port, &now.protocol)
            };
            same(at, &earlier.services, is).map_or((0, 0), |before| (before.packets, before.bytes))
        });
        let of_backend = |(at, now): (usize, &BackendStats)| {
            let is = |before: &BackendStats| (&before.pool, before.address) == (&now.pool, now.address);
            let before = same(at, &earlier.backends, is);
            let replies = before.and_then(|before| before.replies).unwrap_or_default();
            (before.map_or((0, 0), |before| (before.packets, before.bytes)), replies)
        };
        let (backends, replies) = later.backends.iter().enumerate().map(of_backend).unzip();
        let outcomes = later.outcomes.iter().enumerate().map(|(at, now)| {
            same(at, &earlier.outcomes, |before| before.name == now.name).map_or(0, |before| before.packets)
        });
        Some(Self { rate, services: services.collect(), backends, replies, outcomes: outcomes.collect() })
    }

    /// The totals with the rates beside them.
    fn json(&self, stats: &Stats) -> anyhow::Result<Value> {
        let mut value = serde_json::to_value(stats)?;
        value["interval_seconds"] = json!(self.rate.seconds());
        let later = [
            (
                "services",
                stats.services.iter().map(|s| (s.packets, s.bytes)).collect::<Vec<_>>(),
                &self.services,
            ),
            ("backends", stats.backends.iter().map(|b| (b.packets, b.bytes)).collect(), &self.backends),
        ];
        for (kind, later, earlier) in later {
            for (place, ((packets, bytes), before)) in later.into_iter().zip(earlier).enumerate() {
                value[kind][place]["packets_per_second"] = json!(self.rate.of(before.0, packets));
                value[kind][place]["bits_per_second"] = json!(8.0 * self.rate.of(before.1, bytes));
            }
        }
        for (place, (backend, before)) in stats.backends.iter().zip(&self.replies).enumerate() {
            if let Some(now) = backend.replies {
                let replies = &mut value["backends"][place]["replies"];
                replies["packets_per_second"] = json!(self.rate.of(before.packets, now.packets));
                replies["bits_per_second"] = json!(8.0 * self.rate.of(before.bytes, now.bytes));
                replies["resets_per_second"] = json!(self.rate.of(before.resets, now.resets));
            }
        }
        for (place, (outcome, before)) in stats.outcomes.iter().zip(&self.outcomes).enumerate() {
            let rate = self.rate.of(*before, outcome.packets);
            value["outcomes"][place]["packets_per_second"] = json!(rate);
        }
        Ok(value)
    }
}

/// Backends of pools that translate addresses.
fn replied<'s>(stats: &'s Stats, rates: Option<&'s Rates>) -> impl Iterator<Item = Replied<'s>> {
    stats.backends.iter().enumerate().filter_map(move |(place, backend)| {
        let before = rates.map_or_else(RepliesStatus::default, |rates| rates.replies[place]);
        Some(Replied { pool: &backend.pool, name: &backend.name, now: backend.replies?, before })
    })
}

fn text(stats: &Stats, rates: Option<&Rates>) -> String {
    let [packets_header, bytes_header] = match rates {
        None => ["PACKETS", "BYTES"],
        Some(_) => ["PACKETS/S", "BITS/S"],
    };
    let cells = |before: fn(&Rates) -> &Vec<(u64, u64)>, place: usize, packets: u64, bytes: u64| match rates {
        None => [packets.to_string(), output::bytes(bytes)],
        Some(rates) => {
            let earlier = before(rates)[place];
            [rates.rate.packets(earlier.0, packets), rates.rate.bits(earlier.1, bytes)]
        }
    };
    let mut parts = Vec::new();
    let mut order: Vec<_> = stats.services.iter().enumerate().collect();
    order.sort_by_key(|(_, service)| (&service.name, service.vip, service.port, &service.protocol));
    let services = order.into_iter().map(|(place, s)| {
        let vip = s.vip.with(s.port);
        let [packets, bytes] = cells(|rates| &rates.services, place, s.packets, s.bytes);
        vec![s.name.clone(), vip, s.protocol.clone(), packets, bytes]
    });
    let header = ["SERVICE", "VIP", "PROTOCOL", packets_header, bytes_header];
    parts.push(output::table_or(&header, &[3, 4], services.collect(), "no services are configured"));

    let mut order: Vec<_> = stats.backends.iter().enumerate().collect();
    order.sort_by_key(|(_, backend)| (&backend.pool, backend.address));
    let backends = order.into_iter().map(|(place, b)| {
        let [packets, bytes] = cells(|rates| &rates.backends, place, b.packets, b.bytes);
        vec![b.pool.clone(), b.name.clone(), b.address.to_string(), packets, bytes]
    });
    let header = ["POOL", "BACKEND", "ADDRESS", packets_header, bytes_header];
    parts.push(output::table_or(&header, &[3, 4], backends.collect(), "no backends are configured"));

    parts.extend(tables::replies(replied(stats, rates), rates.map(|rates| rates.rate)));

    let outcomes = stats.outcomes.iter().enumerate().filter(|(_, outcome)| outcome.packets > 0);
    let outcomes = outcomes.map(|(place, outcome)| {
        let packets = match rates {
            None => outcome.packets.to_string(),
            Some(rates) => rates.rate.packets(rates.outcomes[place], outcome.packets),
        };
        vec![outcome.name.clone(), outcome.action.clone(), packets]
    });
    let none = "no packet has come in on these interfaces";
    parts.push(output::table_or(&["OUTCOME", "ACTION", packets_header], &[2], outcomes.collect(), none));
    parts.join("\n\n")
}
