//! What a configuration says, key by key, in an operator's words, so that two can be compared. A key that is added to
//! the model does not compile until it is said here.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::time::Duration;

use crate::agent::own;
use crate::config::model::{
    Api, Backend, Check, CheckKind, Config, Flows, Forward, Group, Icmp, IdleTimeout, Interface, Limits,
    Metrics, OuterSource, Pool, Service, SlowStart, Tiers, Timeouts,
};
use crate::config::show_duration;

/// What is said of something, by key.
pub type Facts = BTreeMap<&'static str, String>;

/// What something is, over all changes of what is said of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    Top,
    Interface(String),
    Service(String),
    Pool(String),
    /// By its address, which its name may leave.
    Backend {
        pool: String,
        address: String,
    },
}

pub fn of(config: &Config) -> BTreeMap<Subject, Facts> {
    let mut facts = BTreeMap::from([(Subject::Top, top(config))]);
    // The agent's own is in no file.
    let configured = config.interfaces.iter().filter(|interface| interface.name != own::PROGRAM_END);
    for Interface { name, mode } in configured {
        facts.insert(Subject::Interface(name.clone()), said([("mode", mode.to_string())]));
    }
    for item in &config.services {
        facts.insert(Subject::Service(item.name.clone()), service(config, item));
    }
    for item in &config.pools {
        facts.insert(Subject::Pool(item.name.clone()), pool(config, item));
        for member in &item.backends {
            let (pool, address) = (item.name.clone(), member.address.to_string());
            facts.insert(Subject::Backend { pool, address }, backend(member));
        }
    }
    facts
}

fn said<const N: usize>(facts: [(&'static str, String); N]) -> Facts {
    Facts::from(facts)
}

const NONE: &str = "none";

fn or_none(value: Option<impl Display>) -> String {
    value.map_or_else(|| NONE.to_owned(), |value| value.to_string())
}

fn list(values: impl IntoIterator<Item = impl Display>) -> String {
    let values: Vec<String> = values.into_iter().map(|value| value.to_string()).collect();
    if values.is_empty() { NONE.to_owned() } else { values.join(", ") }
}

fn time(time: Duration) -> String {
    show_duration(time)
}

fn top(config: &Config) -> Facts {
    let Config {
        interfaces: _,
        // A secret: that it changes is told apart.
        seed: _,
        outer_source: OuterSource { v4, v6 },
        sources,
        timeouts: Timeouts { syn, fin, reset },
        vip_arp,
        vlan,
        icmp: Icmp { echo, rate },
        trace,
        limits: Limits { vips, backends, slots, pins, connections },
        api: Api { group },
        metrics: Metrics { listen },
        pools: _,
        services: _,
    } = config;
    let group = group.as_ref().map(|group| match &group.value {
        Group::Name(name) => name.clone(),
        Group::Id(id) => id.to_string(),
    });
    said([
        (
            "outer_source",
            list([v4.map(|v4| v4.to_string()), v6.map(|v6| v6.to_string())].into_iter().flatten()),
        ),
        (
            "fullnat.sources",
            list(
                sources.v4.iter().map(ToString::to_string).chain(sources.v6.iter().map(ToString::to_string)),
            ),
        ),
        ("fullnat.ports", format!("{}-{}", sources.ports.start(), sources.ports.end())),
        ("timeouts.syn", time(*syn)),
        ("timeouts.fin", time(*fin)),
        ("timeouts.reset", time(*reset)),
        ("vip_arp", vip_arp.to_string()),
        ("vlan", vlan.to_string()),
        ("icmp.echo", echo.to_string()),
        ("icmp.rate", rate.to_string()),
        ("trace", trace.to_string()),
        ("limits.vips", vips.to_string()),
        ("limits.backends", backends.to_string()),
        ("limits.slots", slots.to_string()),
        ("limits.pins", pins.to_string()),
        ("limits.connections", connections.to_string()),
        ("api.group", or_none(group)),
        ("metrics.listen", list(listen.iter().map(|listen| listen.value))),
    ])
}

fn service(config: &Config, service: &Service) -> Facts {
    let Service {
        name: _,
        vips,
        ports,
        protocols,
        pool,
        scheduler,
        source_prefix,
        quic,
        fragments,
        unmapped,
    } = service;
    said([
        ("vip", list(vips)),
        ("ports", list(ports)),
        ("protocol", list(protocols)),
        ("pool", config.pools[*pool].name.clone()),
        ("scheduler", scheduler.to_string()),
        ("source_prefix.v4", source_prefix.v4.to_string()),
        ("source_prefix.v6", source_prefix.v6.to_string()),
        ("quic.config_id", or_none(quic.map(|quic| quic.config_id))),
        ("fragments", fragments.to_string()),
        ("unmapped", or_none(*unmapped)),
    ])
}

fn pool(config: &Config, pool: &Pool) -> Facts {
    let Pool { name: _, forward, check, on_empty, flows, slow_start, tiers, backends: _ } = pool;
    let gue_port = matches!(forward, Forward::Gue { .. }).then(|| forward.port());
    let port = (gue_port.is_none() && forward.port() != 0).then(|| forward.port());
    let Flows { idle_timeout: IdleTimeout { tcp, udp }, on_down, down_grace, on_remove, drain_timeout } =
        flows;
    let Tiers { fallback, min_healthy, panic, failback_hold } = tiers;
    let slow_start = slow_start.map(|SlowStart { duration, curve }| format!("{} {curve}", time(duration)));
    let mut facts = said([
        ("forward", forward.to_string()),
        ("gue_port", or_none(gue_port)),
        ("port", or_none(port)),
        ("on_empty", on_empty.to_string()),
        ("idle_timeout.tcp", time(*tcp)),
        ("idle_timeout.udp", time(*udp)),
        ("on_down", on_down.to_string()),
        ("down_grace", time(*down_grace)),
        ("on_remove", on_remove.to_string()),
        ("drain_timeout", drain_timeout.map_or_else(|| "never".to_owned(), time)),
        ("slow_start", or_none(slow_start)),
        ("fallback", list(fallback.iter().map(|pool| &config.pools[*pool].name))),
        ("min_healthy", min_healthy.to_string()),
        ("panic", format!("{panic}%")),
        ("failback_hold", time(*failback_hold)),
    ]);
    facts.extend(health(check));
    facts
}

fn health(check: &Check) -> Facts {
    let Check { kind, port, at_own_port: _, interval, timeout, rise, fall } = check;
    let (path, host, expect) = match kind {
        CheckKind::None | CheckKind::Tcp => (NONE.to_owned(), NONE.to_owned(), NONE.to_owned()),
        CheckKind::Http { path, host, expect } => {
            let expect = expect.iter().map(|codes| format!("{}-{}", codes.start(), codes.end()));
            (path.clone(), or_none(host.as_ref()), list(expect))
        }
    };
    said([
        ("health.type", kind.as_str().to_owned()),
        ("health.port", port.to_string()),
        ("health.interval", time(*interval)),
        ("health.timeout", time(*timeout)),
        ("health.rise", rise.to_string()),
        ("health.fall", fall.to_string()),
        ("health.path", path),
        ("health.host", host),
        ("health.expect", expect),
    ])
}

fn backend(backend: &Backend) -> Facts {
    let Backend { name, address: _, weight, port, server_id, leaving: _ } = backend;
    said([
        ("port", or_none(*port)),
        ("name", name.clone()),
        ("weight", weight.to_string()),
        ("server_id", or_none(server_id.as_ref())),
    ])
}
