//! `health:` of the defaults and of a pool, and how the second lies over the first.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::leaf::{self, show_duration};
use super::model::{Check, CheckKind};
use super::pools::PoolDraft;
use super::problem::{Report, Spot};
use super::read::{At, Fields, Wrong};

const KEYS: &[&str] = &["type", "port", "interval", "timeout", "rise", "fall", "path", "host", "expect"];
const WANT: &str = "a mapping such as {type: tcp, interval: 2s, timeout: 1s, rise: 2, fall: 3}";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    None,
    Tcp,
    Http,
}

const KINDS: &[Kind] = &[Kind::None, Kind::Tcp, Kind::Http];
const KIND_WORDS: &[&str] = &["none", "tcp", "http"];

/// A value and where it is written.
struct Written<T> {
    value: T,
    spot: Spot,
}

/// One `health:` block: what it says, and nothing of what it leaves out.
#[derive(Default)]
pub(super) struct Health {
    kind: Option<Written<Kind>>,
    port: Option<Written<u16>>,
    interval: Option<Written<Duration>>,
    timeout: Option<Written<Duration>>,
    rise: Option<Written<u32>>,
    fall: Option<Written<u32>>,
    path: Option<Written<String>>,
    host: Option<Written<String>>,
    expect: Option<Written<Vec<RangeInclusive<u16>>>>,
    /// The keys of the last three that are written, right or wrong.
    http_keys: Vec<(&'static str, Spot)>,
    /// What it means to say about the type, or about the times, cannot be told: something there
    /// was reported, and a rule that relies on it would guess.
    type_unclear: bool,
    times_unclear: bool,
}

/// `fields`: those of `defaults:`.
pub(super) fn defaults(fields: Option<&Fields<'_>>, report: &mut Report) -> Health {
    let health =
        fields.and_then(|fields| fields.get("health")).map_or_else(Health::default, |at| read(&at, report));
    check_times(&health, &Health::default(), report);
    health
}

pub(super) fn of_pool(fields: &Fields<'_>, defaults: &Health, report: &mut Report) -> Health {
    let Some(at) = fields.get("health") else {
        return Health::default();
    };
    let health = read(&at, report);
    check_times(&health, defaults, report);
    let kind = health.kind(defaults);
    let unclear = health.type_unclear || (defaults.type_unclear && health.kind.is_none());
    if kind != Kind::Http && !unclear {
        for (key, spot) in &health.http_keys {
            let message = format!("{key} is for type http, but the type is {}", word(kind));
            let hint = format!("set type: http, or remove {key}");
            report.error(spot.place, &spot.path, message, hint);
        }
    }
    health
}

/// Keys of the defaults that no pool can use.
pub(super) fn unused_defaults(defaults: &Health, pools: &[PoolDraft], report: &mut Report) {
    let used = |health: &Health| health.type_unclear || health.kind(defaults) == Kind::Http;
    if used(defaults) || pools.iter().any(|pool| used(&pool.health)) {
        return;
    }
    for (key, spot) in &defaults.http_keys {
        let message = format!("{key} is for type http, but neither the defaults nor a pool has it");
        report.error(spot.place, &spot.path, message, format!("set type: http, or remove {key}"));
    }
}

fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::None => "none",
        Kind::Tcp => "tcp",
        Kind::Http => "http",
    }
}

fn read(at: &At<'_>, report: &mut Report) -> Health {
    let before = report.error_count();
    let Some(fields) = at.fields(KEYS, WANT, report) else {
        return Health { type_unclear: true, times_unclear: true, ..Health::default() };
    };
    let unknown_keys = report.error_count() > before;
    let interval = Duration::from_millis(10)..=Duration::from_secs(3600);
    let timeout = Duration::from_millis(1)..=Duration::from_secs(3600);
    let count = |text: &str| leaf::number(text, 1..=255, "");
    let span = "a duration such as 2s";
    let kind = |text: &str| leaf::word(text, KIND_WORDS, KINDS);
    let mut health = Health {
        kind: written(&fields, "type", "none, tcp or http", kind, report),
        port: written(&fields, "port", "a port", leaf::port, report),
        interval: written(&fields, "interval", span, |t| leaf::duration(t, interval), report),
        timeout: written(&fields, "timeout", span, |t| leaf::duration(t, timeout), report),
        rise: written(&fields, "rise", "a number", count, report),
        fall: written(&fields, "fall", "a number", count, report),
        path: written(&fields, "path", "a path such as /healthz", leaf::http_path, report),
        host: written(&fields, "host", "a host name such as www.example.org", leaf::http_host, report),
        expect: expect(&fields, report),
        http_keys: Vec::new(),
        type_unclear: false,
        times_unclear: false,
    };
    for key in ["path", "host", "expect"] {
        health.http_keys.extend(fields.get(key).map(|at| (key, at.spot())));
    }
    let lost = |key, found: bool| !found && fields.get(key).is_some();
    health.type_unclear = unknown_keys || lost("type", health.kind.is_some());
    health.times_unclear = unknown_keys
        || lost("interval", health.interval.is_some())
        || lost("timeout", health.timeout.is_some());
    health
}

fn written<T>(
    fields: &Fields<'_>,
    key: &str,
    want: &str,
    convert: impl FnOnce(&str) -> Result<T, Wrong>,
    report: &mut Report,
) -> Option<Written<T>> {
    let at = fields.get(key)?;
    let value = at.value(want, convert, report)?;
    Some(Written { value, spot: at.spot() })
}

fn expect(fields: &Fields<'_>, report: &mut Report) -> Option<Written<Vec<RangeInclusive<u16>>>> {
    let want = "a status (200), a range (200-299) or a list of them";
    let at = fields.get("expect")?;
    let mut ranges = Vec::new();
    for item in at.one_or_more(want, report) {
        ranges.extend(item.value(want, leaf::statuses, report));
    }
    Some(Written { value: ranges, spot: at.spot() })
}

const INTERVAL: Duration = Duration::from_secs(2);
const TIMEOUT: Duration = Duration::from_secs(1);

/// A probe must be over before the next begins. Reported where the nearer of the two is written:
/// a pool that sets neither is not blamed for the defaults.
fn check_times(health: &Health, under: &Health, report: &mut Report) {
    let has_both = health.interval.is_some() && health.timeout.is_some();
    if health.times_unclear || (under.times_unclear && !has_both) {
        return;
    }
    let interval = health.interval.as_ref().or(under.interval.as_ref());
    let timeout = health.timeout.as_ref().or(under.timeout.as_ref());
    let lasts = timeout.map_or(TIMEOUT, |w| w.value);
    let every = interval.map_or(INTERVAL, |w| w.value);
    let place = |written: Option<&Written<Duration>>| match written {
        Some(written) => format!("line {}", written.spot.place.line),
        None => "the built-in default".to_owned(),
    };
    if lasts <= every {
        return;
    }
    let (long, short) = (show_duration(lasts), show_duration(every));
    if let Some(Written { spot, .. }) = &health.timeout {
        let message = format!("{long} is longer than the interval, {short} ({})", place(interval));
        report.error(spot.place, &spot.path, message, format!("use {short} or less"));
    } else if let Some(Written { spot, .. }) = &health.interval {
        let message = format!("{short} is shorter than the timeout, {long} ({})", place(timeout));
        report.error(spot.place, &spot.path, message, format!("set timeout: {short} or less as well"));
    }
}

impl Health {
    fn kind(&self, under: &Health) -> Kind {
        self.kind.as_ref().or(under.kind.as_ref()).map_or(Kind::Tcp, |w| w.value)
    }

    /// The check of a pool. `service_port` is the first single port of the first service that uses it:
    /// without one and without a port of its own there is nothing to probe, and the kind is none.
    pub fn check(&self, under: &Health, service_port: Option<u16>) -> Check {
        let own = pick(&self.port, &under.port);
        let port = own.or(service_port);
        let kind = match self.kind(under) {
            Kind::None => CheckKind::None,
            _ if port.is_none() => CheckKind::None,
            Kind::Tcp => CheckKind::Tcp,
            Kind::Http => CheckKind::Http {
                path: pick(&self.path, &under.path).unwrap_or_else(|| "/".to_owned()),
                host: pick(&self.host, &under.host),
                expect: pick(&self.expect, &under.expect).unwrap_or_else(|| vec![200..=299]),
            },
        };
        Check {
            kind,
            port: port.unwrap_or(0),
            at_own_port: own.is_none(),
            interval: pick(&self.interval, &under.interval).unwrap_or(INTERVAL),
            timeout: pick(&self.timeout, &under.timeout).unwrap_or(TIMEOUT),
            rise: pick(&self.rise, &under.rise).unwrap_or(2),
            fall: pick(&self.fall, &under.fall).unwrap_or(3),
        }
    }

    /// Whether a check is asked for and only a service can tell its port.
    pub fn unchecked_without_port(&self, under: &Health) -> bool {
        self.kind(under) != Kind::None && pick(&self.port, &under.port).is_none()
    }
}

fn pick<T: Clone>(over: &Option<Written<T>>, under: &Option<Written<T>>) -> Option<T> {
    over.as_ref().or(under.as_ref()).map(|written| written.value.clone())
}
