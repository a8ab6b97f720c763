//! `services:`: what is answered, and which pool it goes to. Rules over several services are in `cross`.

use std::collections::HashMap;
use std::fmt::Display;
use std::hash::Hash;
use std::net::IpAddr;

use super::leaf;
use super::model::{Protocol, Scheduler};
use super::pools::PoolDraft;
use super::problem::{Place, Report, Spot, show};
use super::read::{At, Fields, Wrong, did_you_mean};

const WANT: &str = "a list such as [{name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}]";

/// A service that may not be whole: what was wrong is left out and has been reported.
pub(super) struct ServiceDraft {
    /// Its name's place.
    pub spot: Spot,
    pub name: String,
    pub vips: Vec<(IpAddr, Spot)>,
    pub ports: Vec<u16>,
    pub protocols: Vec<Protocol>,
    pub pool: Option<usize>,
    pub scheduler: Scheduler,
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

/// A file that was cut off between two lines lacks the key. Beside other mistakes that would be one word too many.
pub(super) fn refuse_absent(fields: &Fields<'_>, report: &mut Report) {
    if fields.get("services").is_none() && !report.has_errors() {
        let hint = format!("use {WANT}, or services: [] where none are meant");
        report.error(Place::START, "services", "is missing, so the file may be cut off", hint);
    }
}

fn service(item: &At<'_>, pools: &PoolNames<'_>, report: &mut Report) -> Option<ServiceDraft> {
    let keys = &["name", "vip", "ports", "protocol", "pool", "scheduler"];
    let want = "a mapping such as {name: www, vip: 203.0.113.10, ports: 80, protocol: tcp, pool: web}";
    let fields = item.fields(keys, want, report)?;
    let name = fields.need("name", "a name such as www", report);
    let spot = name.as_ref().unwrap_or(item).spot();
    let name = name.and_then(|at| at.value("a name such as www", leaf::name, report));

    let want = "an address such as 203.0.113.10, or a list of them";
    let vips = several(&fields, "vip", want, leaf::address, report);
    let ports = several(&fields, "ports", "a port such as 80, or a list of them", leaf::port, report);
    let protocol = |text: &str| leaf::word(text, Protocol::WORDS, Protocol::ALL);
    let protocols = several(&fields, "protocol", "tcp, udp or [tcp, udp]", protocol, report);
    let scheduler = |text: &str| leaf::word(text, Scheduler::WORDS, Scheduler::ALL);
    let scheduler = fields.value("scheduler", "maglev", scheduler, report);
    let full = report.is_full();
    let pool = fields
        .need("pool", "the name of a pool", report)
        .and_then(|at| at.value("the name of a pool", |text| pool(text, pools, full), report));

    Some(ServiceDraft {
        spot,
        name: name.unwrap_or_default(),
        vips,
        ports: ports.into_iter().map(|(port, _)| port).collect(),
        protocols: protocols.into_iter().map(|(protocol, _)| protocol).collect(),
        pool,
        scheduler: scheduler.unwrap_or(Scheduler::Maglev),
    })
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
