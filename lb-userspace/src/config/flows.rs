//! Keys of a pool about flows that change places: idle times, failures, drains, slow start. Knows neither backends nor
//! other pools.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::leaf;
use super::model::{Curve, Flows, IdleTimeout, OnDown, OnRemove, SlowStart};
use super::problem::Report;
use super::read::{Fields, Wrong};

pub(super) const KEYS: [&str; 6] =
    ["idle_timeout", "on_down", "down_grace", "on_remove", "drain_timeout", "slow_start"];

const HOUR: Duration = Duration::from_secs(3600);
const SPAN: &str = "a duration such as 30s";

/// `idle_timeout`, of the defaults or of a pool, over what lies under it.
pub(super) fn idle_timeout(fields: &Fields<'_>, under: IdleTimeout, report: &mut Report) -> IdleTimeout {
    let want = "a mapping such as {tcp: 15m, udp: 60s}";
    let Some(fields) = fields.get("idle_timeout").and_then(|at| at.fields(&["tcp", "udp"], want, report))
    else {
        return under;
    };
    let time = |text| leaf::duration(text, Duration::from_secs(1)..=12 * HOUR);
    IdleTimeout {
        tcp: fields.value("tcp", SPAN, time, report).unwrap_or(under.tcp),
        udp: fields.value("udp", SPAN, time, report).unwrap_or(under.udp),
    }
}

pub(super) fn flows(fields: &Fields<'_>, idle: IdleTimeout, report: &mut Report) -> Flows {
    let built_in = Flows { idle_timeout: idle_timeout(fields, idle, report), ..Flows::default() };
    let on_down = |text| leaf::word(text, OnDown::WORDS, OnDown::ALL);
    let on_down = fields.value("on_down", "auto, keep or move", on_down, report);
    let on_remove = |text| leaf::word(text, OnRemove::WORDS, OnRemove::ALL);
    let grace = |text| leaf::duration(text, Duration::ZERO..=12 * HOUR);
    let flows = Flows {
        on_down: on_down.unwrap_or(built_in.on_down),
        down_grace: fields.value("down_grace", SPAN, grace, report).unwrap_or(built_in.down_grace),
        on_remove: fields
            .value("on_remove", "drain or move", on_remove, report)
            .unwrap_or(built_in.on_remove),
        drain_timeout: fields
            .value("drain_timeout", "a duration such as 1h, or never", drain_timeout, report)
            .unwrap_or(built_in.drain_timeout),
        ..built_in
    };
    if let (Some(at), Some(word @ (OnDown::Keep | OnDown::Move))) = (fields.get("down_grace"), on_down) {
        let message = format!("is for on_down: auto, but on_down is {word}");
        report.error(at.key_place(), &at.path, message, "remove it, or set on_down: auto");
    }
    flows
}

fn drain_timeout(text: &str) -> Result<Option<Duration>, Wrong> {
    leaf::duration_or_never(text, Duration::from_secs(1)..=168 * HOUR)
}

pub(super) fn slow_start(fields: &Fields<'_>, report: &mut Report) -> Option<SlowStart> {
    const LENGTHS: RangeInclusive<Duration> = Duration::from_secs(1)..=HOUR;
    let length = |text: &str| leaf::duration(text, LENGTHS);
    let want = "a duration such as 60s, or a mapping such as {duration: 60s, curve: square}";
    let at = fields.get("slow_start")?;
    if at.is_scalar() {
        let duration = at.value(want, length, report)?;
        return Some(SlowStart { duration, curve: Curve::Linear });
    }
    let fields = at.fields(&["duration", "curve"], want, report)?;
    let curve = |text| leaf::word(text, Curve::WORDS, Curve::ALL);
    let curve = fields.value("curve", "linear or square", curve, report).unwrap_or(Curve::Linear);
    let duration = fields.need("duration", SPAN, report)?.value(SPAN, length, report)?;
    Some(SlowStart { duration, curve })
}
