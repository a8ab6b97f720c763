//! `services:`: what is answered, and which pool it goes to. Rules over several services are in `cross`.

use std::collections::HashMap;
use std::fmt::Display;
use std::hash::Hash;

use super::leaf;
use super::model::{Fragments, Ports, Protocol, Quic, Scheduler, SourcePrefix, Unmapped, Vip};
use super::pools::PoolDraft;
use super::problem::{Place, Report, Spot, show};
use super::quic;
use super::read::{At, Fields, Wrong, did_you_mean};

const WANT: &str = "a list such as [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]";

/// A service that may not be whole: what was wrong is left out and has been reported.
pub(super) struct ServiceDraft {
    /// Its name's place.
    pub spot: Spot,
    pub name: String,
    pub vips: Vec<(Vip, Spot)>,
    pub ports: Vec<(Ports, Spot)>,
    pub protocols: Vec<Protocol>,
    pub pool: Option<usize>,
    pub scheduler: Scheduler,
    pub source_prefix: SourcePrefix,
    pub quic: Option<(Quic, Spot)>,
    pub fragments: Option<(Fragments, Spot)>,
    pub unmapped: Option<(Unmapped, Spot)>,
}

impl ServiceDraft {
    /// What to call it in a message about another.
    pub fn called(&self) -> &str {
        if self.name.is_empty() { "the service" } else { &self.name }
    }

    /// Its first single port, where its backends are checked unless the pool says otherwise.
    pub fn first_port(&self) -> Option<u16> {
        self.ports.iter().find_map(|(ports, _)| match ports {
            Ports::Port(port) => Some(*port),
            Ports::Range(..) | Ports::Any => None,
        })
    }
}

struct PoolNames<'p> {
    index: HashMap<&'p str, usize>,
    /// What a wrong name may have been meant to be. Comparing takes time, so there are not too many.
    suggested: Vec<&'p str>,
}

impl<'p> PoolNames<'p> {
    const MOST_SUGGESTED: usize = 1000;

    fn new(pools: &'p [PoolDraft]) -> PoolNames<'p> {
        let names = || pools.iter().map(|pool| pool.name.as_str());
        // A name that is itself wrong is no way out.
        let valid = names().filter(|name| leaf::name(name).is_ok());
        PoolNames { index: names().zip(0..).collect(), suggested: valid.take(Self::MOST_SUGGESTED).collect() }
    }
}

pub(super) fn read(fields: &Fields<'_>, pools: &[PoolDraft], report: &mut Report) -> Vec<ServiceDraft> {
    let items = match fields.get("services") {
        Some(at) => {
            let items = at.items(WANT, report);
            if items.is_empty() {
                let hint = format!("use {WANT}");
                report.warn(at.place(), "services", "there are none, so nothing is balanced", hint);
            }
            items
        }
        None => Vec::new(),
    };
    let names_of_pools = PoolNames::new(pools);
    let mut services: Vec<ServiceDraft> = Vec::new();
    let mut names = HashMap::new();
    for item in items {
        let Some(service) = service(&item, &names_of_pools, report) else {
            continue;
        };
        if let Some(first) = names.get(&service.name) {
            let message = format!("{} is already the name of a service at {first}", service.name);
            report.error(service.spot.place, &service.spot.path, message, "choose another name");
        } else if !service.name.is_empty() {
            names.insert(service.name.clone(), service.spot.clone());
        }
        services.push(service);
    }
    services
}

/// A prefix on the link may hold addresses that are others'.
pub(super) fn warn_of_answered_prefixes(services: &[ServiceDraft], report: &mut Report) {
    for (vip, at) in services.iter().flat_map(|service| &service.vips).filter(|(vip, _)| !vip.is_address()) {
        let message =
            format!("vip_arp answers for every address of {vip}, and takes those that other hosts have");
        report.warn(at.place, &at.path, message, "route the prefix to the balancer, or list the addresses");
    }
}

/// A file that was cut off between two lines lacks the key. Beside other mistakes that would be one word too many.
pub(super) fn refuse_absent(fields: &Fields<'_>, report: &mut Report) {
    if fields.get("services").is_none() && !report.has_errors() {
        let hint = format!("use {WANT}, or services: [] where none are meant");
        report.error(Place::START, "services", "is missing, so the file may be cut off", hint);
    }
}

fn service(item: &At<'_>, pools: &PoolNames<'_>, report: &mut Report) -> Option<ServiceDraft> {
    let keys = &[
        "name",
        "vip",
        "ports",
        "protocol",
        "pool",
        "scheduler",
        "source_prefix",
        "quic",
        "fragments",
        "unmapped",
    ];
    let want = "a mapping such as {name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}";
    let fields = item.fields(keys, want, report)?;
    let name = fields.need("name", "a name such as www", report);
    let spot = name.as_ref().unwrap_or(item).spot();
    let name = name.and_then(|at| at.value("a name such as www", leaf::name, report));

    let want = "an address such as 203.0.113.10, a prefix, or a list of them";
    let vips = several(&fields, "vip", want, leaf::vip, report);
    let ports = ports(&fields, report);
    let protocol = |text: &str| leaf::word(text, Protocol::WORDS, Protocol::ALL);
    let protocols = several(&fields, "protocol", "tcp, udp or [tcp, udp]", protocol, report);
    let scheduler = |text: &str| leaf::word(text, Scheduler::WORDS, Scheduler::ALL);
    let scheduler = fields.value("scheduler", "a word such as maglev or round-robin", scheduler, report);
    let source_prefix = source_prefix(&fields, scheduler, report);
    let fragments = |text: &str| leaf::word(text, Fragments::WORDS, Fragments::ALL);
    let fragments = placed(&fields, "fragments", "drop or balance", fragments, report);
    let unmapped = |text: &str| leaf::word(text, Unmapped::WORDS, Unmapped::ALL);
    let unmapped = placed(&fields, "unmapped", "drop, pass or reject", unmapped, report);
    let full = report.is_full();
    let pool = fields
        .need("pool", "the name of a pool", report)
        .and_then(|at| at.value("the name of a pool", |text| pool(text, pools, full), report));

    let protocols: Vec<Protocol> = protocols.into_iter().map(|(protocol, _)| protocol).collect();
    let quic = quic::of_service(&fields, &protocols, report);
    Some(ServiceDraft {
        spot,
        name: name.unwrap_or_default(),
        vips,
        ports,
        protocols,
        pool,
        scheduler: scheduler.unwrap_or(Scheduler::Maglev),
        source_prefix,
        quic,
        fragments,
        unmapped,
    })
}

/// `scheduler` is none where it is not written, or wrong.
fn source_prefix(fields: &Fields<'_>, scheduler: Option<Scheduler>, report: &mut Report) -> SourcePrefix {
    let whole = SourcePrefix::default();
    let want = "a mapping such as {v4: 24, v6: 56}";
    let Some(at) = fields.get("source_prefix") else { return whole };
    let wrong_scheduler = scheduler.is_none() && fields.get("scheduler").is_some();
    if scheduler != Some(Scheduler::SourceHash) && !wrong_scheduler {
        let message =
            format!("is for scheduler: source-hash, but it is {}", scheduler.unwrap_or(Scheduler::Maglev));
        report.error(at.key_place(), &at.path, message, "set scheduler: source-hash, or remove it");
    }
    let Some(fields) = at.fields(&["v4", "v6"], want, report) else { return whole };
    let bits = |most: u8| {
        move |text: &str| {
            leaf::number(text, 1..=u32::from(most), " bits").map(|n| u8::try_from(n).unwrap_or(most))
        }
    };
    SourcePrefix {
        v4: fields.value("v4", "a number of bits", bits(whole.v4), report).unwrap_or(whole.v4),
        v6: fields.value("v6", "a number of bits", bits(whole.v6), report).unwrap_or(whole.v6),
    }
}

fn ports(fields: &Fields<'_>, report: &mut Report) -> Vec<(Ports, Spot)> {
    let want = "a port such as 80, a range such as 8000-8100, a list of them, or any";
    let ports = several(fields, "ports", want, leaf::ports, report);
    if ports.len() > 1
        && let Some((_, at)) = ports.iter().find(|(ports, _)| *ports == Ports::Any)
    {
        report.error(at.place, &at.path, "any stands beside other ports, and holds them", "write ports: any");
    }
    ports
}

/// The value of an optional key, and where it stands.
fn placed<T>(
    fields: &Fields<'_>,
    key: &str,
    want: &str,
    convert: impl FnOnce(&str) -> Result<T, Wrong>,
    report: &mut Report,
) -> Option<(T, Spot)> {
    let at = fields.get(key)?;
    Some((at.value(want, convert, report)?, at.spot()))
}

/// `full`: nobody will see the hint.
fn pool(text: &str, pools: &PoolNames<'_>, full: bool) -> Result<usize, Wrong> {
    if let Some(index) = pools.index.get(text) {
        return Ok(*index);
    }
    let hint = match pools.suggested.as_slice() {
        _ if full => String::new(),
        [] => "add it, such as pools: {web: {forward: ipip, backends: [192.0.2.11]}}".to_owned(),
        suggested => did_you_mean(text, suggested),
    };
    Err(Wrong { message: format!("there is no pool {}", show(text)), hint })
}

/// One value or a list of them, none of them twice.
fn several<T: Copy + Eq + Hash + Display>(
    fields: &Fields<'_>,
    key: &str,
    want: &str,
    convert: impl Fn(&str) -> Result<T, Wrong>,
    report: &mut Report,
) -> Vec<(T, Spot)> {
    let Some(list) = fields.need(key, want, report) else {
        return Vec::new();
    };
    let mut first: HashMap<T, Spot> = HashMap::new();
    let mut found = Vec::new();
    for at in list.one_or_more(want, report) {
        let Some(value) = at.value(want, &convert, report) else {
            continue;
        };
        if let Some(first) = first.get(&value) {
            let message = format!("{value} is already listed at {first}");
            at.wrong(Wrong { message, hint: "remove one of the two".into() }, report);
        } else {
            first.insert(value, at.spot());
            found.push((value, at.spot()));
        }
    }
    found
}
