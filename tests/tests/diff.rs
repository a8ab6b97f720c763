//! `xlb diff` against what then happens.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use lb_common::abi::{SLOTS_PER_ROW, TableWord};
use lb_userspace::agent::diff::Diff;
use lb_userspace::lookup::address;
use lb_userspace::reconcile::image::Image;
use tests::lab::wait_for;
use tests::stage::{self, Config, PATIENCE, Stage};

/// The next configuration, in a file that the agent does not read.
fn next(stage: &Stage, config: &Config) -> Result<String> {
    let file = stage.balancer.new_file("next.yaml");
    std::fs::write(&file, config.to_string())?;
    Ok(file.to_string_lossy().into_owned())
}

/// Whom each slot of the only table leads new flows to.
fn slots(image: &Image) -> Vec<Option<IpAddr>> {
    let words = image.tables.iter().map(|&bits| TableWord::from_bits(bits));
    let live = words.filter(|word| *word != TableWord::default());
    let slots = live.flat_map(|word| {
        let first = word.first_row() * SLOTS_PER_ROW;
        first..first + word.length()
    });
    slots.map(|slot| address(&image.backends[usize::from(image.slot(slot).cur())])).collect()
}

#[test]
fn a_diff_says_what_a_reload_then_does_and_changes_nothing_itself() -> Result<()> {
    let Some(mut stage) = Stage::set("diff", 3)? else { return Ok(()) };
    let mut config = stage.config();
    let balancer = stage.start(&config)?;
    let file = next(&stage, &config)?;
    balancer.command(&["diff", "-c", &file])?.expect(0, &["no difference"])?;
    balancer.command(&["diff", "-c", &file, "--exit-code"])?.expect(0, &["no difference"])?;
    balancer.command(&["backend", "weight", "web/web2", "50"])?.expect(0, &[])?;
    let before = balancer.tables()?;

    stage.add_backend()?;
    config.backends.push(stage::backend(3, false));
    config.backends[1] = stage::weighted(1, false, 60);
    config.backends.remove(0);
    let file = next(&stage, &config)?;
    let words = [
        "- backend web/web1: removed",
        "+ backend web/web4: added",
        "~ backend web/web2",
        "weight: 100 -> 60",
        "NEW FLOWS ELSEWHERE",
        "stay until they end",
        "web/web2: what was said by command ends",
    ];
    balancer.command(&["diff", "-c", &file])?.expect(0, &words)?;
    let ended = balancer.command(&["diff", "-c", &file, "--exit-code", "-o", "json"])?;
    ended.expect(5, &[])?;
    let diff: Diff = serde_json::from_str(&ended.stdout).with_context(|| ended.stdout)?;
    ensure!(diff.changes.len() == 3 && diff.leaving.len() == 1 && diff.ended == ["web/web2"], "{diff:?}");
    ensure!(diff.warnings.is_empty(), "{diff:?}");
    ensure!(balancer.tables()? == before, "a diff changed the tables");

    balancer.reload(&config.to_string())?;
    balancer.wait_for_backends(3, PATIENCE)?;
    // A better spread takes its time.
    wait_for("nothing is left to move", PATIENCE, || balancer.xlb(&["verify"]).is_ok())?;
    let after = balancer.tables()?;
    let (old, new) = (slots(&before), slots(&after));
    ensure!(old.len() == new.len() && !old.is_empty(), "{} and {} slots", old.len(), new.len());
    let moved = old.iter().zip(&new).filter(|(old, new)| old != new).count() as f64 / old.len() as f64;
    let told = diff.tables.first().context("no table")?.flows;
    ensure!((moved - told).abs() < 0.001, "{told} was told, {moved} of the slots lead elsewhere");
    balancer.command(&["diff", "-c", &file])?.expect(0, &["no difference"])
}
