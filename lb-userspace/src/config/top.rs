//! The top of the file: interfaces, seed, limits and switches; and the order in which the rest is read.

use std::net::IpAddr;

use lb_common::abi::PINS_PER_BUCKET;
use lb_common::allowance::MOST_RATE;

use super::DEFAULT_SEED;
use super::health::Health;
use super::model::{Config, Forward, Icmp, IdleTimeout, Interface, Limits, Mode, Sources};
use super::places::Places;
use super::pools::PoolDraft;
use super::problem::{Place, Report, Spot};
use super::raw::Node;
use super::read::{At, Fields, Wrong};
use super::{access, cross, flows, health, leaf, nat, network, pools, services};

const KEYS: &[&str] = &[
    "interfaces",
    "mode",
    "seed",
    "outer_source",
    "fullnat",
    "timeouts",
    "vip_arp",
    "vlan",
    "icmp",
    "trace",
    "limits",
    "api",
    "metrics",
    "defaults",
    "pools",
    "services",
];

/// Most that `limits.backends` may name: a backend's number has 15 bits in a slot.
pub(super) const MOST_BACKENDS: u32 = 32_766;
pub(super) const MOST_VIPS: u32 = 32_768;
/// A cache line holds eight pins; fewer than some hundred lines are no hash table.
const LEAST_PINS: u32 = 4096;
/// 1 GiB.
const MOST_PINS: u32 = 1 << 27;

/// 64 bytes each, and 8 for its place: 4.5 GiB.
const MOST_CONNECTIONS: u32 = 1 << 26;

/// What is wrong in one place does not keep the others from being checked. The result is valid
/// only if no error was reported.
pub(super) fn config(root: &Node, report: &mut Report) -> Option<(Config, Places)> {
    let root = At::root(root);
    let want = "keys and values, such as interfaces: [eth0]";
    let fields = root.fields(KEYS, want, report)?;
    let (interfaces, spots) = interfaces(&fields, report).into_iter().unzip();
    let outer_source = network::outer_source(&fields, report);
    let sources = nat::sources(&fields, report);
    let timeouts = nat::timeouts(&fields, report);
    let mut limits = limits(&fields, report);
    let api = access::api(&fields, report);
    let metrics = access::metrics(&fields, report);
    let defaults = Defaults::read(&fields, report);
    let pools = pools::read(&fields, &defaults, report);
    let services = services::read(&fields, &pools, report);
    let vip_arp = switch(&fields, "vip_arp", report);
    let vlan = switch(&fields, "vlan", report);
    let icmp = icmp(&fields, report);
    let trace = switch(&fields, "trace", report);
    let seed = seed(&fields, report);

    health::unused_defaults(&defaults.health, &pools, report);
    access::refuse_vips(&metrics, &services, report);
    let tags = fields.get("vlan").filter(|_| vlan).map(|at| at.spot());
    nat::check(&pools, &services, (&sources, tags.as_ref()), report);
    cross::check(&pools, &services, (&outer_source, &sources), &limits, report);
    limits.model.connections = connections(limits.model.connections, &pools, &sources.model);
    let places = {
        let limits = fields.get("limits").map(|at| at.spot());
        Places::new(report.file(), (spots, sources.spot.clone(), limits), &pools, &services)
    };
    if vip_arp {
        services::warn_of_answered_prefixes(&services, report);
    }
    let (pools, services) = cross::join(pools, services, &defaults.health, report);
    services::refuse_absent(&fields, report);
    let config = Config {
        interfaces,
        seed,
        outer_source: outer_source.model(),
        sources: sources.model,
        timeouts,
        vip_arp,
        vlan,
        icmp,
        trace,
        limits: limits.model,
        api,
        metrics,
        pools,
        services,
    };
    Some((config, places))
}

/// What pools take over, key by key.
pub(super) struct Defaults {
    pub health: Health,
    pub idle_timeout: IdleTimeout,
}

impl Defaults {
    fn read(fields: &Fields<'_>, report: &mut Report) -> Self {
        let want = "a mapping such as {health: {type: tcp}}";
        let fields =
            fields.get("defaults").and_then(|at| at.fields(&["health", "idle_timeout"], want, report));
        let health = health::defaults(fields.as_ref(), report);
        let built_in = IdleTimeout::default();
        let idle_timeout = fields.map_or(built_in, |fields| flows::idle_timeout(&fields, built_in, report));
        Self { health, idle_timeout }
    }
}

fn interfaces(fields: &Fields<'_>, report: &mut Report) -> Vec<(Interface, Spot)> {
    let want = "a list of interfaces, such as [eth0]";
    let mode = |at: &Fields<'_>, report: &mut Report| {
        let convert = |text| leaf::word(text, Mode::WORDS, Mode::ALL);
        at.value("mode", "auto, native or generic", convert, report)
    };
    let default = mode(fields, report).unwrap_or(Mode::Auto);
    let Some(list) = fields.need("interfaces", want, report) else {
        return Vec::new();
    };
    let mut found: Vec<(Interface, Spot)> = Vec::new();
    for item in list.one_or_more(want, report) {
        let (at, mode) = if item.is_scalar() {
            (Some(item), default)
        } else {
            let want = "a name, or a mapping such as {name: eth0, mode: native}";
            let Some(fields) = item.fields(&["name", "mode"], want, report) else {
                continue;
            };
            let at = fields.need("name", "a name that `ip link` shows", report);
            (at, mode(&fields, report).unwrap_or(default))
        };
        let Some(at) = at else { continue };
        let Some(name) = at.value("the name of an interface", leaf::interface_name, report) else {
            continue;
        };
        if let Some((_, first)) = found.iter().find(|(other, _)| other.name == name) {
            let message = format!("{name} is already listed at {first}");
            at.wrong(Wrong { message, hint: "list an interface once".into() }, report);
        } else {
            found.push((Interface { name, mode }, at.spot()));
        }
    }
    found
}

fn switch(fields: &Fields<'_>, key: &str, report: &mut Report) -> bool {
    fields.value(key, "true or false", leaf::boolean, report).unwrap_or(false)
}

fn icmp(fields: &Fields<'_>, report: &mut Report) -> Icmp {
    let mut icmp = Icmp::default();
    let want = "a mapping such as {echo: true, rate: 1000}";
    let Some(fields) = fields.get("icmp").and_then(|at| at.fields(&["echo", "rate"], want, report)) else {
        return icmp;
    };
    icmp.echo = fields.value("echo", "true or false", leaf::boolean, report).unwrap_or(icmp.echo);
    let rate = |text| leaf::number(text, 1..=MOST_RATE as u32, " messages a second");
    icmp.rate = fields.value("rate", "a number", rate, report).unwrap_or(icmp.rate);
    icmp
}

fn seed(fields: &Fields<'_>, report: &mut Report) -> u64 {
    match fields.get("seed") {
        Some(at) => at.value("1-16 hex digits", leaf::seed, report).unwrap_or(DEFAULT_SEED),
        None => {
            let message =
                "is missing, so a public one is used: anyone can compute which flow meets which backend";
            let hint =
                "set the same on every balancer of the group, such as the output of `openssl rand -hex 8`";
            report.warn(Place::START, "seed", message, hint);
            DEFAULT_SEED
        }
    }
}

/// The limits, and where those that are written stand.
pub(super) struct WrittenLimits {
    pub model: Limits,
    pub vips: Option<Spot>,
    pub backends: Option<Spot>,
}

fn limits(fields: &Fields<'_>, report: &mut Report) -> WrittenLimits {
    let model =
        Limits { vips: 2048, backends: 4096, slots: 1_048_576, pins: 1_048_576, connections: 262_144 };
    let mut limits = WrittenLimits { model, vips: None, backends: None };
    let want = "a mapping such as {vips: 2048, backends: 4096, slots: 1048576, pins: 1048576}";
    let keys = &["vips", "backends", "slots", "pins", "connections"];
    let Some(fields) = fields.get("limits").and_then(|at| at.fields(keys, want, report)) else {
        return limits;
    };
    let vips = |text| leaf::number(text, 1..=MOST_VIPS, "");
    let backends = |text| leaf::number(text, 1..=MOST_BACKENDS, "");
    if let Some(n) = fields.value("vips", "a number", vips, report) {
        limits.model.vips = n;
        limits.vips = fields.get("vips").map(|at| at.spot());
    }
    if let Some(n) = fields.value("backends", "a number", backends, report) {
        limits.model.backends = n;
        limits.backends = fields.get("backends").map(|at| at.spot());
    }
    if let Some(n) = fields.value("slots", "a number", leaf::slots, report) {
        limits.model.slots = n;
    }
    let pins = |text| leaf::number(text, LEAST_PINS..=MOST_PINS, "");
    if let Some(n) = fields.value("pins", "a number", pins, report) {
        limits.model.pins = n.next_power_of_two();
    }
    let connections = |text| leaf::number(text, LEAST_PINS..=MOST_CONNECTIONS, "");
    if let Some(n) = fields.value("connections", "a number", connections, report) {
        limits.model.connections = n;
    }
    limits
}

/// Connections that there can be: none where no pool has any, and no more than clients can be told apart by ports of
/// sources, where those are translated.
fn connections(limit: u32, pools: &[PoolDraft], sources: &Sources) -> u32 {
    let any = |is: fn(Forward) -> bool| pools.iter().any(|pool| is(pool.forward));
    if !any(|forward| matches!(forward, Forward::Nat { .. } | Forward::Fullnat { .. })) {
        return 0;
    }
    let full = pools.iter().filter(|pool| matches!(pool.forward, Forward::Fullnat { .. }));
    let families = full.flat_map(|pool| &pool.backends).map(|(backend, _)| match backend.address {
        IpAddr::V4(_) => sources.v4.len(),
        IpAddr::V6(_) => sources.v6.len(),
    });
    let most = families
        .min()
        .map_or(limit, |addresses| sources.ports_of_one().saturating_mul(addresses as u32).min(limit));
    most / PINS_PER_BUCKET as u32 * PINS_PER_BUCKET as u32
}
