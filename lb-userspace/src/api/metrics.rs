//! Metrics in the text format of OpenMetrics, which Prometheus scrapes: one table of families, and their samples from
//! a snapshot. Keeps nothing between two scrapes.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use lb_common::abi::ABI_VERSION;
use lb_common::flow::HASH_VERSION;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use crate::agent::keys;
use crate::agent::snapshot::{BackendState, ConnectionCounts, PoolView, Snapshot};
use crate::agent::status::{BackendStatus, RepliesStatus, ServiceStatus};
use crate::tables::maglev::TABLE_VERSION;
use lb_common::pins::PinEvent;

pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

const PREFIX: &str = "xlb";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
        }
    }

    fn encode(self, value: f64, encoder: MetricEncoder<'_>) -> fmt::Result {
        match self {
            // Only seconds are no whole numbers. Prometheus keeps no more than the 53 bits of a float either.
            Self::Counter if value.fract() == 0.0 => ConstCounter::new(value as u64).encode(encoder),
            Self::Counter => ConstCounter::new(value).encode(encoder),
            Self::Gauge => ConstGauge::new(value).encode(encoder),
        }
    }

    fn metric_type(self) -> MetricType {
        match self {
            Self::Counter => MetricType::Counter,
            Self::Gauge => MetricType::Gauge,
        }
    }
}

/// What a metric is called and what it says; the reference in the docs is made from it.
#[derive(Debug)]
pub struct Family {
    /// Without prefix, unit and `_total`.
    stem: &'static str,
    unit: Option<Unit>,
    pub kind: Kind,
    pub labels: &'static [&'static str],
    pub help: &'static str,
}

impl Family {
    /// As it is queried.
    pub fn name(&self) -> String {
        let unit = self.unit.as_ref().map_or(String::new(), |unit| format!("_{}", unit.as_str()));
        let total = if self.kind == Kind::Counter { "_total" } else { "" };
        format!("{PREFIX}_{}{unit}{total}", self.stem)
    }
}

macro_rules! families {
    ($($name:ident $kind:ident $stem:literal $unit:expr, [$($label:literal),*] $help:literal;)*) => {
        $(static $name: Family =
            Family { stem: $stem, unit: $unit, kind: Kind::$kind, labels: &[$($label),*], help: $help };)*

        /// In the order in which they are served.
        pub static FAMILIES: &[&Family] = &[$(&$name),*];
    };
}

families! {
    BUILD_INFO Gauge "build_info" None, ["version", "abi_version", "hash_version", "table_version"]
        "1. Balancers whose hash_version or table_version differ send flows to different backends";
    START_TIME Gauge "start_time" Some(Unit::Seconds), []
        "When the agent started, in seconds since 1970";
    RELOAD_SUCCESSFUL Gauge "config_last_reload_successful" None, []
        "1 if the last reload was taken over, or none was asked for; 0 if it was refused";
    RELOAD_TIMESTAMP Gauge "config_last_reload_success_timestamp" Some(Unit::Seconds), []
        "When the configuration in force was taken over, in seconds since 1970";
    RELOADS Counter "reloads" None, ["result"]
        "Reloads since the agent started: succeeded, refused";
    ATTACHED Gauge "interface_attached" None, ["interface", "mode"]
        "1 if the interface carries the program; mode is native or generic, or what is configured where it is 0";
    SERVICES Gauge "services" None, []
        "Configured services";
    BACKENDS Gauge "backends" None, ["pool", "state"]
        "Backends that take flows or might (up, down, checking, unresolved), and those that are taken out of use: draining, disabled";
    BACKEND_UP Gauge "backend_up" None, ["pool", "backend", "address"]
        "1 if the backend is up, whether it is in use or not";
    BACKEND_WEIGHT Gauge "backend_weight" None, ["pool", "backend", "address"]
        "The weight in effect, 0 to 100: the file's, or the one that a command has set";
    BACKEND_IN_USE Gauge "backend_in_use" None, ["pool", "backend", "address"]
        "0 while the backend is drained or disabled by command, or drains because it left the file; else 1";
    BACKEND_SLOTS Gauge "backend_slots" None, ["pool", "backend", "address"]
        "Slots that the backend holds: its part of the pool's sum is its share of new flows";
    BACKEND_SLOTS_OLD Gauge "backend_slots_old" None, ["pool", "backend", "address"]
        "Slots whose old flows go to the backend";
    BACKEND_PINS Gauge "backend_pins" None, ["pool", "backend", "address"]
        "Flows that are pinned to the backend, and connections to it that have not ended. Without these, and without slots of either kind, it is drained";
    BACKEND_STARTING Gauge "backend_starting_percent" None, ["pool", "backend", "address"]
        "Percent of its share that the backend gets: less than 100 while it starts slowly (slow_start)";
    POOL_LEVEL Gauge "pool_level" None, ["pool"]
        "Which pool takes its packets: 0 the pool itself, 1 the first of its fallbacks, and so on";
    POOL_PANIC Gauge "pool_panic" None, ["pool"]
        "1 while so few backends are up that packets go to all of the pool in use (panic)";
    POOL_SLOTS_MOVING Gauge "pool_slots_moving" None, ["pool"]
        "Slots of the pool's tables that are on the move: old flows stay where they are, and all are pinned";
    POOL_SLOTS_PINNED Gauge "pool_slots_pinned" None, ["pool"]
        "Slots that have moved, but for flows with pins";
    POOL_SLOTS_YIELDED Counter "pool_slots_yielded" None, ["pool"]
        "Slots of backends that are down whose old flows without a pin moved at once, for there was no room for pins of new ones: raise limits.pins";
    PINS Gauge "pins" None, []
        "Flows that are pinned, as the last sweep found them";
    PINS_ROOM Gauge "pins_room" None, []
        "Flows that can be pinned (limits.pins). While pins are half full, slots move for failures and drains only";
    PIN_EVENTS Counter "pin_events" None, ["event"]
        "Packets that looked for a pin (looked), pins made (made_new, made_old), pins for which there was no room (failed_new, failed_old)";
    CONNECTIONS Gauge "connections" None, ["pool", "state"]
        "Connections to backends of a pool that translates addresses (nat, fullnat), as the last sweep found them: syn, established, finishing, udp";
    CONNECTIONS_ROOM Gauge "connections_room" None, []
        "Connections that there is room for (limits.connections, for fullnat no more than ports of sources). New ones that find none are drop_connections_full";
    SWEEP_LAG Gauge "sweep_lag" Some(Unit::Seconds), []
        "Seconds since all pins and connections were last looked at; 0 while there is nothing to look for";
    SWEEP Gauge "sweep_duration" Some(Unit::Seconds), []
        "Seconds that the last look at all pins and connections took";
    TRANSITIONS Counter "health_transitions" None, ["pool", "backend", "to"]
        "How often checks brought the backend up or took it down since the agent started";
    BACKEND_PACKETS Counter "backend_packets" None, ["pool", "backend", "address"]
        "Packets sent to the backend";
    BACKEND_BYTES Counter "backend" Some(Unit::Bytes), ["pool", "backend", "address"]
        "Bytes of clients' IP packets sent to the backend, without Ethernet and tunnel headers";
    REPLY_PACKETS Counter "backend_reply_packets" None, ["pool", "backend", "address"]
        "Packets of the backend to clients, where its pool translates addresses";
    REPLY_BYTES Counter "backend_reply" Some(Unit::Bytes), ["pool", "backend", "address"]
        "Bytes of the backend's IP packets to clients, where its pool translates addresses";
    RESETS Counter "backend_resets" None, ["pool", "backend", "address"]
        "TCP resets by the backend, where its pool translates addresses";
    ANSWERED Counter "backend_answered" None, ["pool", "backend", "address"]
        "Connections that the backend has answered, where its pool translates addresses";
    ANSWER_TIME Counter "backend_answer" Some(Unit::Seconds), ["pool", "backend", "address"]
        "Seconds from the opening of these connections to their first answer, together: divided by xlb_backend_answered_total, the mean time to first answer";
    SERVICE_PACKETS Counter "service_packets" None, ["service", "vip", "port", "protocol"]
        "Packets that the service took";
    SERVICE_BYTES Counter "service" Some(Unit::Bytes), ["service", "vip", "port", "protocol"]
        "Bytes of clients' IP packets that the service took";
    PACKETS Counter "packets" None, ["outcome", "action"]
        "Frames on the listed interfaces, each counted once, under what became of it";
    DROPS Counter "drop_packets" None, ["reason"]
        "Frames that were dropped: those of xlb_packets_total whose action is drop";
}

/// Everything that is served.
pub fn text(snapshot: &Snapshot) -> anyhow::Result<String> {
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register_collector(Box::new(Scrape::of(snapshot)?));
    let mut text = String::new();
    text::encode(&mut text, &registry)?;
    Ok(text)
}

/// One look at everything.
#[derive(Debug, Default)]
struct Scrape(Vec<(&'static Family, Vec<Sample>)>);

/// The values of the family's labels, and the metric's.
type Sample = (Vec<String>, f64);

impl Scrape {
    fn of(snapshot: &Snapshot) -> anyhow::Result<Self> {
        let mut scrape = Self::default();
        scrape.agent(snapshot);
        scrape.backends(snapshot)?;
        scrape.traffic(snapshot)?;
        Ok(scrape)
    }

    fn add(&mut self, family: &'static Family, samples: impl IntoIterator<Item = Sample>) {
        self.0.push((family, samples.into_iter().collect()));
    }

    fn agent(&mut self, snapshot: &Snapshot) {
        let reloads = &snapshot.reloads;
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let versions = [ABI_VERSION, HASH_VERSION, TABLE_VERSION].map(|version| version.to_string());
        let versions = [version].into_iter().chain(versions).collect();
        self.add(&BUILD_INFO, [(versions, 1.0)]);
        self.add(&START_TIME, [(vec![], seconds(snapshot.started))]);
        let succeeded = reloads.last.as_ref().is_none_or(|reload| reload.result.is_ok());
        self.add(&RELOAD_SUCCESSFUL, [(vec![], one_if(succeeded))]);
        self.add(&RELOAD_TIMESTAMP, [(vec![], seconds(reloads.in_force_since))]);
        let counts = [("succeeded", reloads.succeeded), ("refused", reloads.refused)];
        self.add(&RELOADS, counts.map(|(result, count)| (vec![result.to_owned()], count as f64)));
        let attached = snapshot.config.interfaces.iter().map(|wanted| {
            let carries = snapshot.attached.iter().find(|attached| attached.name == wanted.name);
            let mode = carries.map_or(wanted.mode.as_str(), |attached| attached.mode());
            (vec![wanted.name.clone(), mode.to_owned()], one_if(carries.is_some()))
        });
        self.add(&ATTACHED, attached);
        self.add(&SERVICES, [(vec![], snapshot.config.services.len() as f64)]);
    }

    fn backends(&mut self, snapshot: &Snapshot) -> anyhow::Result<()> {
        let backends = snapshot.backends()?;
        let labels = |backend: &BackendStatus| {
            vec![backend.pool.clone(), backend.name.clone(), backend.address.to_string()]
        };
        let of_each = |value: fn(&BackendStatus) -> f64| -> Vec<Sample> {
            backends.iter().map(|backend| (labels(backend), value(backend))).collect()
        };
        let mut counts = vec![[0u32; BackendState::ALL.len()]; snapshot.config.pools.len()];
        for ((_, pool, _), view) in keys(&snapshot.config).zip(&snapshot.backends) {
            counts[pool][view.state as usize] += 1;
        }
        let pools = snapshot.config.pools.iter().zip(counts).flat_map(|(pool, counts)| {
            BackendState::ALL.map(|state| {
                (vec![pool.name.clone(), state.as_str().to_owned()], f64::from(counts[state as usize]))
            })
        });
        self.add(&BACKENDS, pools);
        self.add(&BACKEND_UP, of_each(|backend| one_if(backend.health == BackendState::Up.as_str())));
        self.add(&BACKEND_WEIGHT, of_each(|backend| f64::from(backend.weight)));
        self.add(&BACKEND_IN_USE, of_each(|backend| one_if(backend.exit.is_none())));
        self.add(&BACKEND_SLOTS, of_each(|backend| backend.slots as f64));
        self.add(&BACKEND_SLOTS_OLD, of_each(|backend| backend.slots_old as f64));
        self.add(&BACKEND_PINS, of_each(|backend| backend.pins as f64));
        let transitions = backends.iter().zip(&snapshot.backends).flat_map(|(backend, view)| {
            [("up", view.transitions.up), ("down", view.transitions.down)].map(|(to, count)| {
                (vec![backend.pool.clone(), backend.name.clone(), to.to_owned()], count as f64)
            })
        });
        self.add(&BACKEND_STARTING, of_each(|backend| backend.starting.unwrap_or(100.0)));
        self.pools(snapshot);
        self.pins(snapshot)?;
        self.connections(snapshot, &backends);
        self.add(&TRANSITIONS, transitions);
        self.add(&BACKEND_PACKETS, of_each(|backend| backend.packets as f64));
        self.add(&BACKEND_BYTES, of_each(|backend| backend.bytes as f64));
        let replies = |value: fn(&RepliesStatus) -> f64| -> Vec<Sample> {
            let translated = backends.iter().filter_map(|backend| Some((backend, backend.replies.as_ref()?)));
            translated.map(|(backend, replies)| (labels(backend), value(replies))).collect()
        };
        self.add(&REPLY_PACKETS, replies(|replies| replies.packets as f64));
        self.add(&REPLY_BYTES, replies(|replies| replies.bytes as f64));
        self.add(&RESETS, replies(|replies| replies.resets as f64));
        self.add(&ANSWERED, replies(|replies| replies.answered as f64));
        self.add(&ANSWER_TIME, replies(|replies| replies.waited_ns as f64 / 1e9));
        Ok(())
    }

    /// No sample where no pool translates addresses.
    fn connections(&mut self, snapshot: &Snapshot, backends: &[BackendStatus]) {
        let mut pools: BTreeMap<&str, ConnectionCounts> = BTreeMap::new();
        for (backend, counts) in backends.iter().filter_map(|b| Some((b, b.connections?))) {
            *pools.entry(&backend.pool).or_default() += counts;
        }
        let samples = pools.into_iter().flat_map(|(pool, counts)| {
            counts.each().map(|(state, count)| (vec![pool.to_owned(), state.to_string()], count as f64))
        });
        self.add(&CONNECTIONS, samples);
        let room = snapshot.connections.map(|connections| (vec![], connections.room as f64));
        self.add(&CONNECTIONS_ROOM, room);
    }

    fn pools(&mut self, snapshot: &Snapshot) {
        let config = &snapshot.config;
        let of_each = |value: &dyn Fn(usize, &PoolView) -> f64| -> Vec<Sample> {
            let pools = config.pools.iter().zip(&snapshot.pools).enumerate();
            pools.map(|(index, (pool, view))| (vec![pool.name.clone()], value(index, view))).collect()
        };
        let level = |index: usize, view: &PoolView| {
            let place = config.levels_of(index).position(|level| config.pools[level].name == view.in_use);
            place.unwrap_or(0) as f64
        };
        self.add(&POOL_LEVEL, of_each(&level));
        self.add(&POOL_PANIC, of_each(&|_, view| one_if(view.panic)));
        self.add(&POOL_SLOTS_MOVING, of_each(&|_, view| f64::from(view.moving.dirty)));
        self.add(&POOL_SLOTS_PINNED, of_each(&|_, view| f64::from(view.moving.held)));
        self.add(&POOL_SLOTS_YIELDED, of_each(&|_, view| view.yielded as f64));
    }

    fn pins(&mut self, snapshot: &Snapshot) -> anyhow::Result<()> {
        let pins = &snapshot.pins;
        self.add(&PINS, [(vec![], pins.pins as f64)]);
        self.add(&PINS_ROOM, [(vec![], pins.room as f64)]);
        let event = |event: PinEvent| {
            let times = snapshot.counters.pin_event(event)?;
            Ok((vec![event.counter().to_owned()], times as f64))
        };
        let events: anyhow::Result<Vec<Sample>> = PinEvent::ALL.into_iter().map(event).collect();
        self.add(&PIN_EVENTS, events?);
        let lag = if pins.sweeping { pins.swept_seconds_ago } else { 0.0 };
        self.add(&SWEEP_LAG, [(vec![], lag)]);
        self.add(&SWEEP, [(vec![], pins.sweep_seconds)]);
        Ok(())
    }

    fn traffic(&mut self, snapshot: &Snapshot) -> anyhow::Result<()> {
        let services = snapshot.services()?;
        let of_each = |value: fn(&ServiceStatus) -> f64| -> Vec<Sample> {
            let labels = |service: &ServiceStatus| {
                let (vip, port) = (service.vip.to_string(), service.port.to_string());
                vec![service.name.clone(), vip, port, service.protocol.clone()]
            };
            services.iter().map(|service| (labels(service), value(service))).collect()
        };
        self.add(&SERVICE_PACKETS, of_each(|service| service.packets as f64));
        self.add(&SERVICE_BYTES, of_each(|service| service.bytes as f64));
        let outcomes = snapshot.outcomes()?;
        let packets = outcomes
            .iter()
            .map(|outcome| (vec![outcome.name.clone(), outcome.action.clone()], outcome.packets as f64));
        self.add(&PACKETS, packets);
        let drops = outcomes.iter().filter_map(|outcome| {
            let reason = outcome.name.strip_prefix("drop_")?;
            Some((vec![reason.to_owned()], outcome.packets as f64))
        });
        self.add(&DROPS, drops);
        Ok(())
    }
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for (family, samples) in &self.0 {
            let (unit, kind) = (family.unit.as_ref(), family.kind.metric_type());
            let mut encoder = encoder.encode_descriptor(family.stem, family.help, unit, kind)?;
            for (values, value) in samples {
                let labels: Vec<_> =
                    family.labels.iter().copied().zip(values.iter().map(String::as_str)).collect();
                if labels.is_empty() {
                    family.kind.encode(*value, encoder)?;
                    break;
                }
                family.kind.encode(*value, encoder.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

fn one_if(condition: bool) -> f64 {
    f64::from(u8::from(condition))
}

fn seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
