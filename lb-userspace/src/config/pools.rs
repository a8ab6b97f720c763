//! `pools:` and their backends. Knows services only as far as a warning about a pool is theirs to give.

use std::collections::HashMap;
use std::net::IpAddr;

use super::flows;
use super::health::{self, Health};
use super::leaf;
use super::model::{Backend, Flows, Forward, OnEmpty, SlowStart};
use super::problem::{Report, Spot};
use super::quic;
use super::read::{At, Fields, Wrong};
use super::tiers::{self, TiersDraft};
use super::top::Defaults;

const WANT_BACKENDS: &str = "a list of backends, such as [192.0.2.11, 192.0.2.12]";

/// A pool before it is known which port its backends are checked at. Fields that were wrong hold
/// their default; the error that was reported keeps the configuration from being used.
pub(super) struct PoolDraft {
    /// Its name's place.
    pub spot: Spot,
    pub name: String,
    pub forward: Forward,
    pub on_empty: OnEmpty,
    pub health: Health,
    pub flows: Flows,
    pub slow_start: Option<SlowStart>,
    pub tiers: TiersDraft,
    /// With the place of the address.
    pub backends: Vec<(Backend, Spot)>,
}

pub(super) fn read(fields: &Fields<'_>, defaults: &Defaults, report: &mut Report) -> Vec<PoolDraft> {
    let want = "a mapping from names to pools, such as {web: {forward: ipip, backends: [192.0.2.11]}}";
    let Some(at) = fields.get("pools") else {
        return Vec::new();
    };
    let mut pools = Vec::new();
    for (name, at) in at.entries(want, report) {
        let spot = Spot { place: at.key_place(), path: at.path.clone() };
        if let Err(wrong) = leaf::name(name) {
            report.error(spot.place, &spot.path, wrong.message, wrong.hint);
        }
        pools.push(pool(name, spot, &at, defaults, report));
    }
    tiers::resolve(&mut pools, report);
    pools
}

fn pool(name: &str, spot: Spot, at: &At<'_>, defaults: &Defaults, report: &mut Report) -> PoolDraft {
    let mut draft = PoolDraft {
        spot,
        name: name.to_owned(),
        forward: Forward::Ipip,
        on_empty: OnEmpty::Drop,
        health: Health::default(),
        flows: Flows::default(),
        slow_start: None,
        tiers: TiersDraft::default(),
        backends: Vec::new(),
    };
    let keys =
        [&["forward", "gue_port", "port", "on_empty", "health", "backends"], &flows::KEYS[..], &tiers::KEYS];
    let want = "a mapping such as {forward: ipip, backends: [192.0.2.11]}";
    let Some(fields) = at.fields(&keys.concat(), want, report) else {
        return draft;
    };

    draft.forward = forward(&fields, report).unwrap_or(draft.forward);
    let convert = |text| leaf::word(text, OnEmpty::WORDS, OnEmpty::ALL);
    let on_empty = fields.value("on_empty", "drop, pass or all", convert, report);
    draft.on_empty = on_empty.unwrap_or(draft.on_empty);
    draft.health = health::of_pool(&fields, &defaults.health, report);
    draft.flows = flows::flows(&fields, defaults.idle_timeout, report);
    draft.slow_start = flows::slow_start(&fields, report);
    draft.tiers = tiers::tiers(&fields, report);
    draft.backends = backends(&fields, report);
    warn_of_no_backends(&fields, &draft, report);
    draft
}

fn forward(fields: &Fields<'_>, report: &mut Report) -> Option<Forward> {
    let gue_port = fields.value("gue_port", "a UDP port such as 6080", port, report);
    let port = fields.value("port", "a port such as 8080", port, report);
    let want = "ipip or gue (encapsulated), l2 (backends on-link), nat or fullnat (addresses translated)";
    let at = fields.need("forward", want, report)?;
    let convert = |text| leaf::word(text, Forward::WORDS, Forward::ALL);
    let forward = at.value(want, convert, report)?;
    let mut refuse = |key, message: String, hint| {
        if let Some(at) = fields.get(key) {
            report.error(at.key_place(), &at.path, message, hint);
        }
    };
    let tunnels = matches!(forward, Forward::Gue { .. });
    let translates = matches!(forward, Forward::Nat { .. } | Forward::Fullnat { .. });
    if gue_port.is_some() && !tunnels {
        let message = format!("`forward: {forward}` sends to no UDP port");
        refuse("gue_port", message, "remove it, or set forward: gue");
    }
    if port.is_some() && !translates {
        let message = format!("`forward: {forward}` leaves the port as it is");
        refuse("port", message, "remove it, or set forward: nat or fullnat");
    }
    Some(match forward {
        Forward::Gue { port } => Forward::Gue { port: gue_port.unwrap_or(port) },
        Forward::Nat { .. } => Forward::Nat { port: port.unwrap_or(0) },
        Forward::Fullnat { .. } => Forward::Fullnat { port: port.unwrap_or(0) },
        Forward::Ipip | Forward::L2 => forward,
    })
}

fn port(text: &str) -> Result<u16, Wrong> {
    leaf::number(text, 1..=65535, "").map(|port| u16::try_from(port).unwrap_or(u16::MAX))
}

fn warn_of_no_backends(fields: &Fields<'_>, draft: &PoolDraft, report: &mut Report) {
    let Spot { place, path } = &draft.spot;
    let path = format!("{path}.backends");
    let place = fields.get("backends").map_or(*place, |at| at.place());
    let what_happens = match draft.on_empty {
        OnEmpty::Drop => "all its packets are dropped",
        OnEmpty::Pass => "all its packets go to the host itself",
        OnEmpty::All => "none of its packets finds a backend",
    };
    if draft.backends.is_empty() {
        let message = format!("the pool has no backends, so {what_happens}");
        report.warn(place, &path, message, format!("use {WANT_BACKENDS}"));
    } else if draft.backends.iter().all(|(backend, _)| backend.weight == 0) {
        let message = "every backend has weight 0, so none takes a new flow";
        report.warn(place, &path, message, "give one of them a weight of 1-100");
    }
}

fn backends(fields: &Fields<'_>, report: &mut Report) -> Vec<(Backend, Spot)> {
    let Some(list) = fields.get("backends") else {
        return Vec::new();
    };
    let mut found = Vec::new();
    let mut addresses: HashMap<IpAddr, Spot> = HashMap::new();
    let mut names: HashMap<String, Spot> = HashMap::new();
    for item in list.items(WANT_BACKENDS, report) {
        let Some((backend, at, name_at)) = backend(&item, report) else {
            continue;
        };
        if let Some(first) = addresses.get(&backend.address) {
            let message = format!("{} is already a backend of this pool at {first}", backend.address);
            report.error(at.place, &at.path, message, "remove one of the two");
        } else if let Some(first) = names.get(&backend.name) {
            let message = format!("{} is already the name of a backend at {first}", backend.name);
            report.error(name_at.place, &name_at.path, message, "choose another name");
        } else {
            addresses.insert(backend.address, at.clone());
            names.insert(backend.name.clone(), name_at);
            found.push((backend, at));
        }
    }
    quic::check_server_ids(&found, report);
    found
}

/// A backend, where its address stands, and where its name does.
fn backend(item: &At<'_>, report: &mut Report) -> Option<(Backend, Spot, Spot)> {
    let want = "an address, or a mapping such as {address: 192.0.2.11, weight: 50}";
    if item.is_scalar() {
        let address = item.value(want, leaf::address, report)?;
        let backend = Backend {
            name: address.to_string(),
            address,
            weight: 100,
            port: None,
            server_id: None,
            leaving: false,
        };
        return Some((backend, item.spot(), item.spot()));
    }
    let fields = item.fields(&["address", "weight", "name", "port", "server_id"], want, report)?;
    let weight = fields.value("weight", "a number", leaf::weight, report).unwrap_or(100);
    let name = fields.value("name", "a name", leaf::name, report);
    let port = fields.value("port", "a port such as 8080", port, report);
    let at = fields.need("address", "an address such as 192.0.2.11", report)?;
    let address = at.value("an address such as 192.0.2.11", leaf::address, report)?;
    let name_at = fields.get("name").unwrap_or_else(|| at.clone()).spot();
    let name = name.unwrap_or_else(|| address.to_string());
    // Without its server ID it would be blamed for having none.
    let server_id = match fields.get("server_id") {
        Some(at) => Some(at.value("bytes in hex such as \"0a01\"", leaf::server_id, report)?),
        None => None,
    };
    Some((Backend { name, address, weight, port, server_id, leaving: false }, at.spot(), name_at))
}
