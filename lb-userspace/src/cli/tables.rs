//! What the agent tells, as tables: sorted, aligned, no wider than a terminal. Asks nobody.

use std::net::IpAddr;

use super::output;
use super::rates::Rate;
use crate::agent::snapshot::{BackendState, ConnectionsStatus};
use crate::agent::status::{BackendStatus, OutcomeStatus, PoolStatus, RepliesStatus, ServiceStatus, Status};
use crate::config::model::{Ports, Vip};

/// What to show of traffic.
#[derive(Clone, Copy)]
pub enum Traffic<'a> {
    Totals,
    /// Since another status; nothing is known yet where there is none.
    Rates(Option<&'a Status>, &'a Status),
}

impl Traffic<'_> {
    pub const fn header(self) -> [&'static str; 2] {
        match self {
            Traffic::Totals => ["PACKETS", "BYTES"],
            Traffic::Rates(..) => ["PACKETS/S", "BITS/S"],
        }
    }

    fn cells(self, packets: u64, bytes: u64, before: impl Fn(&Status) -> Option<(u64, u64)>) -> [String; 2] {
        let (earlier, later) = match self {
            Traffic::Totals => return [packets.to_string(), output::bytes(bytes)],
            Traffic::Rates(earlier, later) => (earlier, later),
        };
        let rate = earlier.and_then(|earlier| {
            let rate = Rate::new(earlier.monotonic_ns, later.monotonic_ns)?;
            let (packets_before, bytes_before) = before(earlier)?;
            Some([rate.packets(packets_before, packets), rate.bits(bytes_before, bytes)])
        });
        rate.unwrap_or_else(|| ["-".to_owned(), "-".to_owned()])
    }
}

fn service_key(service: &ServiceStatus) -> (&str, Vip, Ports, &str) {
    (&service.name, service.vip, service.port, &service.protocol)
}

fn backend_key(backend: &BackendStatus) -> (&str, IpAddr) {
    (&backend.pool, backend.address)
}

pub fn services(services: &[ServiceStatus], traffic: Traffic<'_>) -> String {
    if services.is_empty() {
        return "no services are configured".to_owned();
    }
    let mut services: Vec<_> = services.iter().collect();
    services.sort_by_key(|service| service_key(service));
    let rows = services.into_iter().map(|service| {
        let before = |status: &Status| {
            let same = status.services.iter().find(|other| service_key(other) == service_key(service))?;
            Some((same.packets, same.bytes))
        };
        let [packets, bytes] = traffic.cells(service.packets, service.bytes, before);
        vec![
            service.name.clone(),
            service.vip.with(service.port),
            service.protocol.clone(),
            service.scheduler.clone(),
            service.pool.clone(),
            format!("{}/{}", service.backends_up, service.backends),
            packets,
            bytes,
        ]
    });
    let [packets, bytes] = traffic.header();
    let header = ["SERVICE", "VIP", "PROTOCOL", "SCHEDULER", "POOL", "UP", packets, bytes];
    output::table(&header, &[5, 6, 7], rows.collect())
}

/// Pools whose packets do not go to their own backends that are up, or whose slots are on the move: a line for each.
pub fn pools(pools: &[PoolStatus]) -> String {
    let lines = pools.iter().filter_map(|pool| {
        let PoolStatus { name, in_use, panic, backends_up, backends, min_healthy, .. } = pool;
        let PoolStatus { slots, slots_moving, slots_pinned, pins, .. } = pool;
        let falls = || {
            format!(
                "pool {name} falls back to {in_use}: {backends_up} of its {backends} backends are up, and {min_healthy} must be"
            )
        };
        let panics = || {
            format!("pool {name} is in panic: packets go to all backends of {in_use}, also to those that are down")
        };
        let moves = || {
            format!(
                "pool {name} has {slots_moving} of {slots} slots on the move and {slots_pinned} with pins left behind; {pins} flows are pinned"
            )
        };
        let lines = [
            (in_use != name).then(falls),
            panic.then(panics),
            (slots_moving + slots_pinned > 0).then(moves),
        ];
        let lines: Vec<String> = lines.into_iter().flatten().collect();
        (!lines.is_empty()).then(|| lines.join("\n"))
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// How full the table of connections is, and what they are: a line for each pool that has some.
pub fn connections(status: &Status) -> String {
    let Some(ConnectionsStatus { connections, room }) = status.connections else { return String::new() };
    let part = connections as f64 * 100.0 / room.max(1) as f64;
    let mut lines = vec![format!("{connections} of {room} connections ({part:.1} %)")];
    for (pool, counts) in status.pools.iter().filter_map(|pool| Some((pool, pool.connections?))) {
        if counts.sum() > 0 {
            let counts = counts.each().map(|(state, count)| format!("{count} {state}"));
            lines.push(format!("pool {}: {}", pool.name, counts.join(", ")));
        }
    }
    lines.join("\n")
}

/// What came back from a backend, and what had come back at an earlier reading.
pub struct Replied<'b> {
    pub pool: &'b str,
    pub name: &'b str,
    pub now: RepliesStatus,
    pub before: RepliesStatus,
}

/// What came back from backends of pools that translate addresses, as totals or, where there is a rate to be had, by the
/// second; nothing where there are no such backends.
pub fn replies<'b>(replied: impl Iterator<Item = Replied<'b>>, rate: Option<Rate>) -> Option<String> {
    let rows = replied.map(|Replied { pool, name, now, before }| {
        let [packets, bytes, resets] = match rate {
            None => [now.packets.to_string(), output::bytes(now.bytes), now.resets.to_string()],
            Some(rate) => [
                rate.packets(before.packets, now.packets),
                rate.bits(before.bytes, now.bytes),
                rate.packets(before.resets, now.resets),
            ],
        };
        let since = if rate.is_some() { before } else { RepliesStatus::default() };
        vec![pool.to_owned(), name.to_owned(), packets, bytes, resets, first_answer(since, now)]
    });
    let mut rows: Vec<_> = rows.collect();
    rows.sort();
    let header = match rate {
        None => ["POOL", "BACKEND", "REPLIES", "BYTES", "RESETS", "FIRST ANSWER"],
        Some(_) => ["POOL", "BACKEND", "REPLIES/S", "BITS/S", "RESETS/S", "FIRST ANSWER"],
    };
    (!rows.is_empty()).then(|| output::table(&header, &[2, 3, 4, 5], rows))
}

/// The mean time to it between two readings.
fn first_answer(before: RepliesStatus, now: RepliesStatus) -> String {
    let answered = now.answered.checked_sub(before.answered).unwrap_or(now.answered);
    let waited_ns = now.waited_ns.checked_sub(before.waited_ns).unwrap_or(now.waited_ns);
    match answered {
        0 => "-".to_owned(),
        answered => format!("{:.2} ms", waited_ns as f64 / answered as f64 / 1e6),
    }
}

/// Those of a status.
pub fn status_replies(status: &Status, traffic: Traffic<'_>) -> Option<String> {
    let earlier = match traffic {
        Traffic::Totals => None,
        Traffic::Rates(earlier, _) => earlier,
    };
    let rate = earlier.and_then(|earlier| Rate::new(earlier.monotonic_ns, status.monotonic_ns));
    let replied = status.backends.iter().filter_map(|backend| {
        let is_it = |other: &&BackendStatus| backend_key(other) == backend_key(backend);
        let before = earlier.and_then(|earlier| earlier.backends.iter().find(is_it)?.replies);
        let before = before.unwrap_or_default();
        Some(Replied { pool: &backend.pool, name: &backend.name, now: backend.replies?, before })
    });
    replies(replied, rate)
}

/// The table, and below it in full what did not fit there of a backend that is not up.
pub fn backends(backends: &[BackendStatus], traffic: Traffic<'_>) -> String {
    if backends.is_empty() {
        return "no backends are configured".to_owned();
    }
    let mut sorted: Vec<_> = backends.iter().collect();
    sorted.sort_by_key(|backend| backend_key(backend));
    let pool_slots = |pool: &str| backends.iter().filter(|b| b.pool == pool).map(|b| b.slots).sum::<u64>();
    let leaves = backends.iter().any(|backend| backend.exit.is_some());
    let translates = backends.iter().any(|backend| backend.connections.is_some());
    let mut pool = ("", 0);
    let rows = sorted.iter().map(|backend| {
        if pool.0 != backend.pool {
            pool = (&backend.pool, pool_slots(&backend.pool));
        }
        let share = match pool.1 {
            0 => "-".to_owned(),
            slots => format!("{:.1} %", backend.slots as f64 * 100.0 / slots as f64),
        };
        let before = |status: &Status| {
            let same = status.backends.iter().find(|other| backend_key(other) == backend_key(backend))?;
            Some((same.packets, same.bytes))
        };
        let [packets, bytes] = traffic.cells(backend.packets, backend.bytes, before);
        let mut row = vec![
            backend.pool.clone(),
            backend.name.clone(),
            backend.address.to_string(),
            backend.forward.clone(),
            weight(backend),
            state(backend),
            share,
            packets,
            bytes,
        ];
        let connections = || backend.connections.map_or("-".to_owned(), |counts| counts.sum().to_string());
        row.extend(translates.then(connections));
        row.extend(leaves.then(|| backend.exit.as_ref().map_or("-".to_owned(), |_| left(backend))));
        row.push(match backend.starting {
            Some(percent) => format!("{}; starting, with {percent} % of its share", backend.check),
            None => backend.check.clone(),
        });
        row
    });
    let [packets, bytes] = traffic.header();
    let mut header =
        vec!["POOL", "BACKEND", "ADDRESS", "FORWARD", "WEIGHT", "STATE", "SHARE", packets, bytes];
    header.extend(translates.then_some("CONNECTIONS"));
    header.extend(leaves.then_some("LEFT"));
    header.push("CHECK");
    let mut rows: Vec<_> = rows.collect();
    let cut = output::cut_last(&header, &mut rows);
    let numbers: &[usize] = if translates { &[4, 6, 7, 8, 9] } else { &[4, 6, 7, 8] };
    let mut text = output::table(&header, numbers, rows);
    for (index, check) in cut {
        let BackendStatus { pool, name, state, .. } = sorted[index];
        if state == BackendState::Up.as_str() {
            continue;
        }
        text.push_str(&format!("\n{pool}/{name} is {state}: {check}"));
    }
    text
}

fn weight(backend: &BackendStatus) -> String {
    match backend.weight_in_file {
        None => backend.weight.to_string(),
        Some(written) => format!("{} (yaml {written})", backend.weight),
    }
}

fn state(backend: &BackendStatus) -> String {
    match &backend.exit {
        Some(exit) if backend.state == BackendState::Draining.as_str() => {
            format!("{} ({})", backend.state, exit.cause)
        }
        _ => backend.state.clone(),
    }
}

/// What still names a backend.
pub fn left(backend: &BackendStatus) -> String {
    match (backend.pins, backend.slots_old.max(backend.slots)) {
        (0, 0) if backend.exit.as_ref().is_some_and(|exit| exit.quic) => "QUIC connections".to_owned(),
        (0, 0) => "nothing".to_owned(),
        (pins, slots) => flows_and_slots(pins, slots),
    }
}

/// `57 flows, 1024 slots`.
pub fn flows_and_slots(flows: u64, slots: u64) -> String {
    let count = |number: u64, one| output::count(usize::try_from(number).unwrap_or(usize::MAX), one);
    format!("{}, {}", count(flows, "flow"), count(slots, "slot"))
}

/// Those that happened; below the table, what to do about packets that are lost.
pub fn outcomes(outcomes: &[OutcomeStatus], traffic: Traffic<'_>) -> String {
    let rows = outcomes.iter().filter(|outcome| outcome.packets > 0).map(|outcome| {
        let before = |status: &Status| {
            let same = status.outcomes.iter().find(|other| other.name == outcome.name)?;
            Some((same.packets, 0))
        };
        let [packets, _] = traffic.cells(outcome.packets, 0, before);
        vec![outcome.name.clone(), packets, outcome.meaning.clone()]
    });
    let mut rows: Vec<_> = rows.collect();
    if rows.is_empty() {
        return "no packet has come in on these interfaces".to_owned();
    }
    let [packets, _] = traffic.header();
    let header = ["OUTCOME", packets, "MEANING"];
    output::cut_last(&header, &mut rows);
    format!("{}{}", output::table(&header, &[1], rows), advice(outcomes, traffic))
}

/// Of those that grow, so that what is long past does not hide what is wrong now. Counters alone do not tell.
fn advice(outcomes: &[OutcomeStatus], traffic: Traffic<'_>) -> String {
    let lost = |outcome: &&OutcomeStatus| {
        let leaves = ["transmit", "redirect"].contains(&outcome.action.as_str());
        outcome.packets > 0 && !outcome.advice.is_empty() && !leaves
    };
    let mut lost = outcomes.iter().filter(lost);
    match traffic {
        Traffic::Totals if lost.next().is_none() => String::new(),
        Traffic::Totals => {
            "\n`xlb status --watch` says what to do about those that grow, docs/outcomes.md about all of them"
                .to_owned()
        }
        Traffic::Rates(earlier, _) => {
            let grows = |outcome: &&OutcomeStatus| {
                let before =
                    earlier.and_then(|status| status.outcomes.iter().find(|o| o.name == outcome.name));
                before.is_some_and(|before| outcome.packets > before.packets)
            };
            let line = |outcome: &OutcomeStatus| {
                format!("\n{}", output::wrapped(&format!("{}: {}", outcome.name, outcome.advice)))
            };
            lost.filter(grows).map(line).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(name: &str, action: &str, packets: u64, advice: &str) -> OutcomeStatus {
        let (name, action, advice) = (name.to_owned(), action.to_owned(), advice.to_owned());
        OutcomeStatus { name, action, packets, meaning: "meaning".to_owned(), advice }
    }

    fn status(outcomes: Vec<OutcomeStatus>, monotonic_ns: u64) -> Status {
        Status {
            version: String::new(),
            pid: 1,
            uptime_seconds: 1,
            monotonic_ns,
            config_file: String::new(),
            last_reload: None,
            interfaces: Vec::new(),
            services: Vec::new(),
            pools: Vec::new(),
            backends: Vec::new(),
            pins: Default::default(),
            connections: None,
            outcomes,
        }
    }

    #[test]
    fn replies_are_totals_or_what_came_between_two_readings() {
        let now = RepliesStatus { packets: 30, bytes: 3000, resets: 4, answered: 5, waited_ns: 10_000_000 };
        let before = RepliesStatus { packets: 10, bytes: 1000, resets: 4, answered: 4, waited_ns: 9_000_000 };
        let row = |rate| {
            let replied = [Replied { pool: "web", name: "web1", now, before }];
            let table = replies(replied.into_iter(), rate).expect("a table");
            table.lines().nth(1).unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(row(None), "web web1 30 2.9 KiB 4 2.00 ms");
        assert_eq!(row(Rate::new(1, 2_000_000_001)), "web web1 10.0 8.00 k 0 1.00 ms");
        assert_eq!(replies(std::iter::empty(), None), None);
    }

    #[test]
    fn fullness_is_told_where_there_are_connections() {
        let mut status = status(Vec::new(), 1);
        assert_eq!(connections(&status), "");
        status.connections = Some(ConnectionsStatus { connections: 1024, room: 4096 });
        assert_eq!(connections(&status), "1024 of 4096 connections (25.0 %)");
    }

    #[test]
    fn advice_is_given_for_losses_that_grow() {
        let then = |grown: u64| {
            vec![
                outcome("drop_old", "drop", 5, "was wrong"),
                outcome("drop_new", "drop", 5 + grown, "is wrong"),
                outcome("drop_fine", "drop", 5 + grown, ""),
                outcome("answer_too_big", "transmit", 5 + grown, "goes on"),
            ]
        };
        let (before, now) = (status(then(0), 1_000_000_000), status(then(7), 2_000_000_000));
        let text = outcomes(&now.outcomes, Traffic::Rates(Some(&before), &now));
        assert!(text.ends_with("\ndrop_new: is wrong") && !text.contains("was wrong"), "{text}");
        assert!(!outcomes(&now.outcomes, Traffic::Rates(None, &now)).contains("wrong"));
        let totals = outcomes(&now.outcomes, Traffic::Totals);
        assert!(totals.contains("docs/outcomes.md") && !totals.contains("wrong"), "{totals}");
        let good = [outcome("forward_transmit", "transmit", 5, "")];
        assert!(!outcomes(&good, Traffic::Totals).contains("docs"));
    }
}
