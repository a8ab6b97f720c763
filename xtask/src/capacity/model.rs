//! How many balancers it takes, how much memory, how much of a core for checks: each figure with how it comes about. Pure.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_userspace::capacity::Capacity;
use lb_userspace::config::model::Limits;
use lb_userspace::tables::maglev;
use serde::Serialize;

/// What is wanted, and of what balancers are made.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub requests_per_second: f64,
    pub packets_per_request: f64,
    /// Mean length of a client's frame, bytes.
    pub frame_bytes: f64,
    pub backends: u32,
    pub pools: u32,
    pub regions: u32,
    /// Regions that may be gone at the busiest hour.
    pub regions_lost: u32,
    pub connections: f64,
    pub check_interval: Duration,
    /// The share of a balancer that the busiest hour may take.
    pub load: f64,
    /// Balancers of a region beyond those that carry it.
    pub spare: u32,
    pub cores: u32,
    pub nic_gbit: f64,
    pub way: Way,
}

/// How packets get to backends, as far as sizes go.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Way {
    /// Bytes in front of each packet on its way to a backend.
    pub header_bytes: f64,
    /// What comes back through the balancer, where addresses are translated: then connections are kept, too.
    pub answers: Option<Answers>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Answers {
    /// Of a request.
    pub packets: f64,
    /// Mean length of a frame.
    pub bytes: f64,
}

/// What was measured, or is assumed.
#[derive(Debug, Clone, Copy)]
pub struct Costs {
    /// Of the balancer.
    pub packet_ns: f64,
    /// Of the NIC's driver, around it.
    pub driver_ns: f64,
    /// Of the agent.
    pub check_us: f64,
}

/// A figure, and how it comes about.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Step {
    pub name: String,
    pub how: String,
    pub value: f64,
    pub unit: &'static str,
}

/// Preamble, checksum and gap, which every frame has on a wire of Ethernet.
const WIRE_BYTES: f64 = 24.0;

/// Some triples of VIP, port and protocol for each pool, and room to grow.
const VIPS_PER_POOL: u32 = 4;

/// All steps, each of which uses those before it.
pub fn steps(wanted: &Wanted, costs: &Costs) -> Result<Vec<Step>> {
    let w = wanted;
    ensure!(w.regions > w.regions_lost, "{} regions: {} of them cannot be lost", w.regions, w.regions_lost);
    ensure!(w.load > 0.0 && w.load <= 1.0, "a balancer's load is above 0 and at most 1");
    ensure!(w.pools > 0 && w.backends >= w.pools, "every pool needs a backend");
    let mut steps = Steps(Vec::new());
    let balancers = traffic(&mut steps, wanted, costs);
    memory(&mut steps, wanted, balancers)?;
    checks(&mut steps, wanted, costs, balancers + f64::from(w.spare));
    Ok(steps.0)
}

struct Steps(Vec<Step>);

impl Steps {
    fn add(&mut self, name: &str, how: String, value: f64, unit: &'static str) -> f64 {
        self.0.push(Step { name: name.to_owned(), how, value, unit });
        value
    }
}

/// Regions that carry everything when the worst has come.
fn carrying(wanted: &Wanted) -> f64 {
    f64::from(wanted.regions - wanted.regions_lost)
}

/// How many balancers of a region carry its packets, without spare ones.
fn traffic(steps: &mut Steps, w: &Wanted, costs: &Costs) -> f64 {
    let (requests, each) = (w.requests_per_second, w.packets_per_request);
    let there = steps.add(
        "packets to VIPs",
        format!("{}/s x {each} a request", number(requests)),
        requests * each,
        "/s",
    );
    let back = w.way.answers.map_or(0.0, |answers| {
        let Answers { packets, .. } = answers;
        let how = format!("{}/s x {packets} an answer", number(requests));
        steps.add("packets of answers", how, requests * packets, "/s")
    });
    let all = there + back;
    let regional = steps.add(
        "of them in a region",
        format!("{} / ({} regions - {} lost)", number(all), w.regions, w.regions_lost),
        all / carrying(w),
        "/s",
    );
    let ns = steps.add(
        "a core's time for a packet",
        format!("{:.0} ns balancer + {:.0} ns driver", costs.packet_ns, costs.driver_ns),
        costs.packet_ns + costs.driver_ns,
        "ns",
    );
    let by_cpu = steps.add(
        "a balancer takes, by its cores",
        format!("{} cores x 1e9 / {ns:.0} ns x {} load", w.cores, w.load),
        f64::from(w.cores) * 1e9 / ns * w.load,
        "/s",
    );
    let frame = (w.frame_bytes * there + w.way.answers.map_or(0.0, |answers| answers.bytes * back)) / all;
    let bits = steps.add(
        "a packet on the wire",
        format!("({frame:.0} frame + {} header + {WIRE_BYTES} gap) x 8", w.way.header_bytes),
        (frame + w.way.header_bytes + WIRE_BYTES) * 8.0,
        "bit",
    );
    let by_nic = steps.add(
        "a balancer takes, by its NIC",
        format!("{} Gbit/s / {bits} bit x {} load", w.nic_gbit, w.load),
        w.nic_gbit * 1e9 / bits * w.load,
        "/s",
    );
    let least = by_cpu.min(by_nic);
    let which = if by_cpu <= by_nic { "cores" } else { "NIC" };
    let balancers = steps.add(
        "balancers that carry a region",
        format!("{} / {} ({which}), rounded up", number(regional), number(least)),
        (regional / least).ceil(),
        "",
    );
    let each = regional / balancers;
    steps.add(
        "as long as a driver takes",
        format!(
            "at most {} cores x 1e9 x {} load / {}/s - {:.0} ns balancer",
            w.cores,
            w.load,
            number(each),
            costs.packet_ns
        ),
        f64::from(w.cores) * 1e9 * w.load / each - costs.packet_ns,
        "ns",
    );
    let with_spare = steps.add(
        "balancers of a region",
        format!("{balancers} + {} spare", w.spare),
        balancers + f64::from(w.spare),
        "",
    );
    steps.add(
        "balancers in all",
        format!("{with_spare} x {} regions", w.regions),
        with_spare * f64::from(w.regions),
        "",
    );
    balancers
}

/// What the maps of one balancer take, for the limits that it needs.
fn memory(steps: &mut Steps, w: &Wanted, balancers: f64) -> Result<()> {
    let connections = steps.add(
        "connections of a balancer",
        format!(
            "{} / ({} regions - {} lost) / {balancers}",
            number(w.connections),
            w.regions,
            w.regions_lost
        ),
        (w.connections / carrying(w) / balancers).ceil(),
        "",
    );
    let backends = steps.add(
        "backends of a region",
        format!("{} / {} regions", w.backends, w.regions),
        f64::from(w.backends.div_ceil(w.regions)),
        "",
    );
    let limits = limits(w, backends as u32, connections)?;
    steps.add(
        "limits.slots",
        format!(
            "{} pools x a table for {} backends each, twice for growth",
            w.pools,
            (backends as u32).div_ceil(w.pools)
        ),
        f64::from(limits.slots),
        "",
    );
    steps.add(
        "limits.pins",
        "twice the connections, were all pinned at once: buckets fill unevenly; a power of two".to_owned(),
        f64::from(limits.pins),
        "",
    );
    if w.way.answers.is_some() {
        steps.add("limits.connections", "at most 70 % full".to_owned(), f64::from(limits.connections), "");
    }
    let capacity = Capacity::new(&limits);
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let cpus = u64::from(w.cores);
    let mut rows = capacity.rows();
    rows.sort_by_key(|map| std::cmp::Reverse(map.bytes(cpus)));
    let largest: Vec<String> = rows
        .iter()
        .take(3)
        .map(|map| {
            format!("{} {:.0}", map.name.trim_start_matches("XLB_").to_lowercase(), mib(map.bytes(cpus)))
        })
        .collect();
    steps.add(
        "memory of a balancer's maps",
        format!("as `xlb check` has it, {cpus} CPUs; largest: {}", largest.join(", ")),
        mib(capacity.bytes(cpus)),
        "MiB",
    );
    Ok(())
}

/// The `limits:` that hold it.
fn limits(w: &Wanted, backends: u32, connections: f64) -> Result<Limits> {
    let table = 1_u64 << maglev::log2_length(backends.div_ceil(w.pools) as usize);
    let slots = table * u64::from(w.pools) * 2;
    ensure!(slots <= 134_217_728, "{} pools take {slots} slots, and limits.slots ends at 134217728", w.pools);
    ensure!(backends <= 32_766, "{backends} backends of a region: a balancer has at most 32766");
    ensure!(
        w.pools.saturating_mul(VIPS_PER_POOL) <= 32_768,
        "{} pools: a balancer has room for 32768 VIPs and ports, {VIPS_PER_POOL} a pool",
        w.pools
    );
    // A pin has the eight places of one bucket: where half of all places are taken, one flow in a hundred finds none.
    let pins = (connections as u64).saturating_mul(2).max(4096).checked_next_power_of_two();
    let pins = pins.filter(|pins| *pins <= 134_217_728).with_context(|| {
        format!(
            "{connections} connections of a balancer: limits.pins ends at 134217728, and half of it is of use"
        )
    })?;
    let table_of_connections = if w.way.answers.is_some() { connections / 0.7 } else { 0.0 };
    ensure!(
        table_of_connections <= 67_108_864.0,
        "{connections} connections of a balancer: limits.connections ends at 67108864, and 70 % of it is of use"
    );
    Ok(Limits {
        vips: w.pools * VIPS_PER_POOL,
        backends,
        slots: slots as u32,
        pins: pins as u32,
        connections: (table_of_connections.ceil() as u32).next_multiple_of(8),
    })
}

fn checks(steps: &mut Steps, w: &Wanted, costs: &Costs, balancers: f64) {
    let backends = f64::from(w.backends.div_ceil(w.regions));
    let interval = w.check_interval.as_secs_f64();
    let rate = steps.add(
        "checks of a balancer",
        format!("{backends} backends / {interval} s"),
        backends / interval,
        "/s",
    );
    steps.add(
        "a core's share for checks",
        format!("{rate:.0}/s x {} us", costs.check_us),
        rate * costs.check_us / 1e6 * 100.0,
        "%",
    );
    steps.add(
        "checks that a backend answers",
        format!("{balancers} balancers / {interval} s"),
        balancers / interval,
        "/s",
    );
}

/// With its thousands apart.
pub fn number(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const IPIP: Way = Way { header_bytes: 20.0, answers: None };
    const ANSWERS: Answers = Answers { packets: 6.0, bytes: 506.0 };
    const COSTS: Costs = Costs { packet_ns: 60.0, driver_ns: 40.0, check_us: 50.0 };

    fn wanted() -> Wanted {
        Wanted {
            requests_per_second: 10e6,
            packets_per_request: 6.0,
            frame_bytes: 106.0,
            backends: 10_000,
            pools: 10,
            regions: 5,
            regions_lost: 1,
            connections: 10e6,
            check_interval: Duration::from_secs(5),
            load: 0.5,
            spare: 1,
            cores: 2,
            nic_gbit: 25.0,
            way: IPIP,
        }
    }

    fn value(steps: &[Step], name: &str) -> f64 {
        steps.iter().find(|step| step.name == name).map_or(f64::NAN, |step| step.value)
    }

    #[test]
    fn balancers_carry_what_lost_regions_leave_to_the_others() {
        let steps = steps(&wanted(), &COSTS).unwrap();
        assert_eq!(value(&steps, "packets to VIPs"), 60e6);
        assert_eq!(value(&steps, "of them in a region"), 15e6);
        // 2 cores x 10 million x half.
        assert_eq!(value(&steps, "a balancer takes, by its cores"), 10e6);
        assert_eq!(value(&steps, "balancers that carry a region"), 2.0);
        assert_eq!(value(&steps, "balancers in all"), 15.0);
    }

    #[test]
    fn a_slow_nic_decides_where_it_is_the_narrower() {
        let narrow = Wanted { nic_gbit: 10.0, frame_bytes: 1456.0, ..wanted() };
        let steps = steps(&narrow, &COSTS).unwrap();
        // 1500 bytes: 12,000 bits; 10 Gbit/s: 833,333 a second, of which half.
        assert_eq!(value(&steps, "a packet on the wire"), 12_000.0);
        assert_eq!(value(&steps, "balancers that carry a region"), 36.0);
    }

    #[test]
    fn balancers_are_as_many_up_to_the_slowest_driver_that_is_named() {
        let named = value(&steps(&wanted(), &COSTS).unwrap(), "as long as a driver takes");
        // 2 balancers with 7.5 million each, 133 ns for one packet at half load.
        assert!((named - 73.3).abs() < 0.1, "{named}");
        let balancers = |driver_ns: f64| {
            let steps = steps(&wanted(), &Costs { driver_ns, ..COSTS }).unwrap();
            value(&steps, "balancers that carry a region")
        };
        assert_eq!((balancers(named - 0.1), balancers(named + 0.1)), (2.0, 3.0));
    }

    #[test]
    fn memory_is_what_the_agents_own_arithmetic_says() {
        let steps = steps(&wanted(), &COSTS).unwrap();
        // 10 million / 4 / 2 balancers; 200 backends a pool.
        assert_eq!(value(&steps, "connections of a balancer"), 1_250_000.0);
        let limits = Limits { vips: 40, backends: 2000, slots: 20 * 65_536, pins: 1 << 22, connections: 0 };
        let bytes = Capacity::new(&limits).bytes(2);
        assert_eq!(value(&steps, "memory of a balancer's maps"), bytes as f64 / f64::from(1 << 20));
    }

    #[test]
    fn connections_take_memory_only_where_they_are_translated() {
        let nat = Wanted { way: Way { header_bytes: 0.0, answers: Some(ANSWERS) }, ..wanted() };
        let (with, without) = (steps(&nat, &COSTS).unwrap(), steps(&wanted(), &COSTS).unwrap());
        let memory = |steps: &[Step]| value(steps, "memory of a balancer's maps");
        // 72 bytes each, and 8 of a pin: with answers to carry, there are more balancers, and fewer pins on each.
        let mib = |steps: &[Step], limit: &str, bytes: f64| value(steps, limit) * bytes / f64::from(1 << 20);
        let connections = mib(&with, "limits.connections", 72.0);
        assert!(memory(&with) - mib(&with, "limits.pins", 8.0) > connections);
        assert!(memory(&without) - mib(&without, "limits.pins", 8.0) < connections);
        assert!(value(&without, "limits.connections").is_nan());
    }

    #[test]
    fn answers_meet_the_balancer_where_addresses_are_translated() {
        let nat = Wanted { way: Way { header_bytes: 0.0, answers: Some(ANSWERS) }, ..wanted() };
        let steps = steps(&nat, &COSTS).unwrap();
        assert_eq!(value(&steps, "of them in a region"), 30e6);
        // As many of 106 as of 506 bytes.
        assert_eq!(value(&steps, "a packet on the wire"), (306.0 + 24.0) * 8.0);
    }

    #[test]
    fn checks_are_those_of_the_own_region() {
        let steps = steps(&wanted(), &COSTS).unwrap();
        assert_eq!(value(&steps, "checks of a balancer"), 400.0);
        assert_eq!(value(&steps, "a core's share for checks"), 2.0);
        assert_eq!(value(&steps, "checks that a backend answers"), 0.6);
    }

    #[test]
    fn what_no_balancer_can_hold_is_refused_with_its_limit() {
        for (wanted, words) in [
            (Wanted { regions: 1, regions_lost: 1, ..wanted() }, "cannot be lost"),
            (Wanted { backends: 200_000, ..wanted() }, "at most 32766"),
            (Wanted { pools: 9000, ..wanted() }, "32768"),
            (Wanted { connections: 1e12, ..wanted() }, "limits.pins"),
            (Wanted { connections: 1e30, ..wanted() }, "limits.pins"),
            (Wanted { load: 0.0, ..wanted() }, "load"),
        ] {
            let error = steps(&wanted, &COSTS).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn numbers_have_their_thousands_apart() {
        for (value, text) in [(0.0, "0"), (999.0, "999"), (1000.0, "1,000"), (1_234_567.0, "1,234,567")] {
            assert_eq!(number(value), text);
        }
    }
}
