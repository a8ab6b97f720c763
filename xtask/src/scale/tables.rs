//! Tables, plans and writes in this process: what they take, and how well they spread.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use ::tests::lab::Lab;
use anyhow::{Context, Result};
use lb_common::abi::TableWord;
use lb_userspace::bpf::{BpfFs, Datapath};
use lb_userspace::capacity::{Capacity, possible_cpus};
use lb_userspace::config::model::Config;
use lb_userspace::nexthop::NextHop;
use lb_userspace::reconcile::desired::{LoadTime, Target, World};
use lb_userspace::reconcile::draft::Draft;
use lb_userspace::reconcile::image::Image;
use lb_userspace::reconcile::memory::Held;
use lb_userspace::reconcile::op::MapOp;
use lb_userspace::reconcile::plan::plan_at_once;
use lb_userspace::reconcile::targets::Targets;
use lb_userspace::reconcile::tracking::Tracking;
use lb_userspace::tables::maglev::{self, Member};
use serde::{Deserialize, Serialize};

use super::shape::Shape;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tables {
    /// Of all tables.
    pub slots: u32,
    /// One table of the size that each has.
    pub maglev_ms: f64,
    /// All that should lie in the kernel, from the configuration: all tables included.
    pub build_ms: f64,
    /// What is to be written into empty maps.
    pub plan_ms: f64,
    /// The same, written into maps of the kernel.
    pub write_ms: f64,
    /// One backend goes down: what should be, what differs, and its writes, into memory.
    pub change_ms: f64,
    /// Words of slots that this changes.
    pub change_words: usize,
    /// All maps together.
    pub map_bytes: u64,
    /// Slots that go from one living backend to another when one of N is down, and when it is taken out of the
    /// configuration: parts of all.
    pub disruption_down: f64,
    pub disruption_removed: f64,
    /// The largest part that a backend of the first service has of its table, by the mean.
    pub imbalance: f64,
}

/// Each time is the best of so many: what disturbs only adds.
const ROUNDS: usize = 5;

pub fn measure(shape: &Shape) -> Result<Tables> {
    let config = shape.config()?;
    let capacity = Capacity::new(&config.limits);
    let mut world = all_up(&config);
    let members: Vec<Member> = (0..shape.backends).map(|n| member(&config, n)).collect();
    let log2 = maglev::log2_length(members.len());
    let (maglev_ms, base) = best(|| Ok(maglev::build(log2, &members)))?;
    let (build_ms, _) = best(|| Ok(Draft::of(&config).desired(&config, &world)))?;
    let mut draft = Draft::of(&config);
    let up = draft.desired(&config, &world);
    let empty = Image::empty(&capacity, lb_common::abi::Meta::default());
    let (plan_ms, ops) = best(|| Ok(plan_at_once(&empty, &up, &capacity)?))?;
    let write_ms = written(&config, capacity, &ops)?;

    let mut held = Held::with_image(capacity, empty);
    let mut tracking = Tracking::begin(&mut held)?;
    tracking.reconcile(&mut held, up.clone())?;
    // A second look finds all tables at rest, as an agent has them.
    tracking.reconcile(&mut held, up.clone())?;
    let mut times = Vec::new();
    let mut change_words = 0;
    for round in 0..ROUNDS {
        let down = round % shape.backends as usize;
        world.up.insert((0, down), false);
        let before = words(&held.image);
        let begin = Instant::now();
        let wanted = draft.desired(&config, &world);
        tracking.reconcile(&mut held, wanted)?;
        times.push(milliseconds(begin));
        change_words = words(&held.image).iter().zip(&before).filter(|(now, before)| now != before).count();
        world.up.insert((0, down), true);
        tracking.reconcile(&mut held, draft.desired(&config, &world))?;
    }
    world.up.insert((0, 0), false);
    let down = draft.desired(&config, &world);
    let table = up.tables.values().find(|table| table.pools == [0]).context("no table of the first pool")?;
    let after =
        down.tables.values().find(|table| table.pools == [0]).context("no table of the first pool")?;
    let dead = lb_userspace::reconcile::desired::identity_of(&config.pools[0], &config.pools[0].backends[0]);
    Ok(Tables {
        slots: shape.slots(),
        maglev_ms,
        build_ms,
        plan_ms,
        write_ms,
        change_ms: least(&times),
        change_words,
        map_bytes: capacity.bytes(possible_cpus()),
        disruption_down: moved(&table.cur, &after.cur, Target::Backend(dead)),
        disruption_removed: removed(log2, &members, &base),
        imbalance: imbalance(&base, members.len()),
    })
}

fn member(config: &Config, number: u32) -> Member {
    Member::new(config.seed, Shape::backend(number).into(), 100)
}

/// Everybody answers, behind one gateway.
fn all_up(config: &Config) -> World {
    let mut world = World::default();
    for (index, pool) in config.pools.iter().enumerate() {
        for (place, backend) in pool.backends.iter().enumerate() {
            world.up.insert((index, place), true);
            Arc::make_mut(&mut world.next_hops).insert(backend.address, hop());
        }
    }
    world
}

fn hop() -> NextHop {
    NextHop {
        ifindex: 1,
        interface: "eth0".into(),
        source_mac: [2, 0, 0, 0, 0, 1],
        mac: [2, 0, 0, 0, 0, 2],
        mtu: 1500,
        preferred_source: Some(IpAddr::from([10, 200, 0, 2])),
        gateway: Some(IpAddr::from([10, 200, 0, 1])),
        kind: None,
        redirect_target: true,
    }
}

/// Milliseconds that the writes take into fresh maps that no packet meets.
fn written(config: &Config, capacity: Capacity, ops: &[MapOp]) -> Result<f64> {
    // Pins and their bpffs go with it, whatever happens.
    let lab = Lab::new("tables")?;
    let fs = BpfFs::open(&lab.dir().join("xlb"))?;
    let mut datapath = Datapath::open(fs, capacity, LoadTime::of(config))?;
    let begin = Instant::now();
    for op in ops {
        datapath.maps.apply(op)?;
    }
    Ok(milliseconds(begin))
}

/// Slots of all tables, word by word.
fn words(image: &Image) -> Vec<u32> {
    let words = image.tables.iter().map(|&bits| TableWord::from_bits(bits));
    let live = words.filter(|word| *word != TableWord::default());
    live.flat_map(|word| {
        let first = word.first_row() * lb_common::abi::SLOTS_PER_ROW;
        (first..first + word.length()).map(|index| image.slot(index).bits())
    })
    .collect()
}

/// The part of the slots that leave one who lives.
fn moved(before: &Targets, after: &Targets, dead: Target) -> f64 {
    let moved = before.iter().zip(after.iter()).filter(|(one, other)| **one != dead && one != other);
    moved.count() as f64 / before.len() as f64
}

/// The same for a table of the others alone.
fn removed(log2: u32, members: &[Member], base: &[u16]) -> f64 {
    let others = &members[1..];
    if others.is_empty() {
        return 0.0;
    }
    // Places of the others count from the second on.
    let shorter = maglev::build(log2, others);
    let moved = base.iter().zip(&shorter).filter(|(one, other)| **one != 0 && **one != **other + 1);
    moved.count() as f64 / base.len() as f64
}

fn imbalance(table: &[u16], members: usize) -> f64 {
    let mut slots = vec![0u32; members];
    table.iter().for_each(|&owner| slots[usize::from(owner)] += 1);
    let most = slots.into_iter().max().unwrap_or_default();
    f64::from(most) * members as f64 / table.len() as f64
}

fn best<T>(mut work: impl FnMut() -> Result<T>) -> Result<(f64, T)> {
    let mut times = Vec::new();
    let mut last = None;
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        let made = work()?;
        times.push(milliseconds(begin));
        last = Some(made);
    }
    Ok((least(&times), last.context("no round")?))
}

pub fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

fn least(times: &[f64]) -> f64 {
    times.iter().copied().fold(f64::INFINITY, f64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_and_disruption_are_parts_of_the_table() {
        assert_eq!(imbalance(&[0, 0, 1, 0], 2), 1.5);
        let [a, b, c] = [1, 2, 3].map(Target::Backend);
        let (before, after) = (Targets::from(vec![a, b, c, a]), Targets::from(vec![b, b, a, c]));
        assert_eq!(moved(&before, &after, a), 0.25);
        let members: Vec<Member> = (0..3)
            .map(|n| Member { key: 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(n + 1), weight: 100 })
            .collect();
        let base = maglev::build(12, &members);
        let part = removed(12, &members, &base);
        assert!((0.0..0.5).contains(&part), "{part}");
    }
}
