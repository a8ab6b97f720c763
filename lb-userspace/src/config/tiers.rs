//! Keys of a pool about the pools that take its place, and the rules over them. Knows no service.

use std::collections::HashMap;
use std::time::Duration;

use super::leaf;
use super::model::Tiers;
use super::pools::PoolDraft;
use super::problem::{Report, Spot, show};
use super::read::{Fields, did_you_mean};
use super::top::MOST_BACKENDS;

pub(super) const KEYS: [&str; 4] = ["fallback", "min_healthy", "panic", "failback_hold"];

/// Tiers of one pool, before the names of others are known.
#[derive(Default)]
pub(super) struct TiersDraft {
    pub tiers: Tiers,
    /// Names of pools as they are written.
    names: Vec<(String, Spot)>,
    /// Where `min_healthy` stands.
    min_healthy: Option<Spot>,
    /// Where the pools of `tiers.fallback` are named.
    fallback_spots: Vec<Spot>,
}

pub(super) fn tiers(fields: &Fields<'_>, report: &mut Report) -> TiersDraft {
    let mut draft = TiersDraft::default();
    let want = "the name of a pool, or a list of names";
    if let Some(list) = fields.get("fallback") {
        for at in list.one_or_more(want, report) {
            let name = at.value(want, |text| Ok(text.to_owned()), report);
            draft.names.extend(name.map(|name| (name, at.spot())));
        }
    }
    let built_in = Tiers::default();
    let at_least = |text| leaf::at_least(text, MOST_BACKENDS);
    let hold = |text| leaf::duration(text, Duration::ZERO..=Duration::from_secs(24 * 3600));
    let panic = |text| leaf::percent(text, 0..=100);
    draft.tiers = Tiers {
        fallback: Vec::new(),
        min_healthy: fields
            .value("min_healthy", "a number such as 2, or a percentage such as 50%", at_least, report)
            .unwrap_or(built_in.min_healthy),
        panic: fields.value("panic", "a percentage such as 20%", panic, report).unwrap_or(built_in.panic),
        failback_hold: fields
            .value("failback_hold", "a duration such as 60s", hold, report)
            .unwrap_or(built_in.failback_hold),
    };
    draft.min_healthy = fields.get("min_healthy").map(|at| at.spot());
    for key in ["min_healthy", "failback_hold"] {
        if let Some(at) = fields.get(key).filter(|_| fields.get("fallback").is_none()) {
            let message = "is for pools with a fallback";
            report.error(at.key_place(), &at.path, message, "set fallback: as well, or remove it");
        }
    }
    draft
}

/// Names to pools.
pub(super) fn resolve(pools: &mut [PoolDraft], report: &mut Report) {
    let index: HashMap<String, usize> = pools.iter().map(|pool| pool.name.clone()).zip(0..).collect();
    let suggested: Vec<String> = pools.iter().map(|pool| pool.name.clone()).take(MOST_SUGGESTED).collect();
    for (own, pool) in pools.iter_mut().enumerate() {
        let mut first: HashMap<usize, Spot> = HashMap::new();
        for (name, at) in std::mem::take(&mut pool.tiers.names) {
            let Some(&other) = index.get(&name) else {
                // Comparing names takes time, and nobody will see the hint.
                let known: Vec<&str> =
                    suggested.iter().map(String::as_str).filter(|known| *known != pool.name).collect();
                let hint = if report.is_full() { String::new() } else { did_you_mean(&name, &known) };
                report.error(at.place, &at.path, format!("there is no pool {}", show(&name)), hint);
                continue;
            };
            if other == own {
                let message = "a pool cannot take its own place";
                report.error(at.place, &at.path, message, "name another pool, or remove it");
            } else if let Some(first) = first.get(&other) {
                let message = format!("{name} is already listed at {first}");
                report.error(at.place, &at.path, message, "remove one of the two");
            } else {
                first.insert(other, at.clone());
                pool.tiers.tiers.fallback.push(other);
                pool.tiers.fallback_spots.push(at);
            }
        }
    }
    refuse_circles(pools, report);
    warn_of_too_many_wanted(pools, report);
}

/// What a wrong name may have been meant to be.
const MOST_SUGGESTED: usize = 1000;

/// Pools that stand for each other. One problem for each circle that the first fallbacks of pools make.
fn refuse_circles(pools: &[PoolDraft], report: &mut Report) {
    let looping = on_a_way_to_a_circle(pools);
    let next = |pool: usize| {
        let fallback = pools[pool].tiers.tiers.fallback.iter().zip(&pools[pool].tiers.fallback_spots);
        fallback.map(|(next, at)| (*next, at)).find(|(next, _)| looping[*next])
    };
    // The walk that met a pool first.
    let mut walks: Vec<Option<usize>> = vec![None; pools.len()];
    for start in (0..pools.len()).filter(|pool| looping[*pool]) {
        let mut at = start;
        while walks[at].is_none() {
            walks[at] = Some(start);
            let Some((next, spot)) = next(at) else { break };
            if walks[next] == Some(start) {
                let message = format!(
                    "{} leads back to {}: pools cannot stand for each other",
                    pools[next].name, pools[at].name
                );
                let hint = "remove it, or name a pool of the same backends that has no fallback";
                report.error(spot.place, &spot.path, message, hint);
            }
            at = next;
        }
    }
}

/// What is left when pools are taken away, again and again, whose fallbacks are all taken away.
fn on_a_way_to_a_circle(pools: &[PoolDraft]) -> Vec<bool> {
    let mut open: Vec<usize> = pools.iter().map(|pool| pool.tiers.tiers.fallback.len()).collect();
    let mut named_by: Vec<Vec<usize>> = vec![Vec::new(); pools.len()];
    for (pool, draft) in pools.iter().enumerate() {
        draft.tiers.tiers.fallback.iter().for_each(|&fallback| named_by[fallback].push(pool));
    }
    let mut done: Vec<usize> = (0..pools.len()).filter(|pool| open[*pool] == 0).collect();
    while let Some(pool) = done.pop() {
        for &by in &named_by[pool] {
            open[by] -= 1;
            if open[by] == 0 {
                done.push(by);
            }
        }
    }
    open.into_iter().map(|open| open > 0).collect()
}

fn warn_of_too_many_wanted(pools: &[PoolDraft], report: &mut Report) {
    for pool in pools {
        let Some(at) = &pool.tiers.min_healthy else { continue };
        let weighted = pool.backends.iter().filter(|(backend, _)| backend.weight > 0).count();
        let wanted = pool.tiers.tiers.min_healthy.of(weighted);
        if wanted > weighted && weighted > 0 {
            let message = format!(
                "{wanted} backends must be up, and the pool has only {weighted} with weight, so a fallback is always in use"
            );
            report.warn(at.place, &at.path, message, format!("use {weighted} or less"));
        }
    }
}
