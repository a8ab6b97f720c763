//! The mechanics of the soak, in a short run: no word on growth.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tests::{lab, soak};

fn start(length: [&str; 2]) -> Result<Child> {
    Ok(Command::new(env!("CARGO_BIN_EXE_soak")).args(length).stdout(Stdio::piped()).spawn()?)
}

/// Whether the lab of a process is still there, or a namespace of it.
fn has_lab(pid: u32) -> Result<bool> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir("/run/netns").context("/run/netns")? {
        names.push(entry?.file_name());
    }
    let prefix = format!("xlb-{pid}-");
    let named = names.iter().any(|name| name.to_string_lossy().starts_with(&prefix));
    Ok(named || Path::new("/run/xlb-lab").join(format!("{pid}-1")).exists())
}

#[test]
fn a_short_soak_fills_its_table_and_leaves_nothing_behind() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let soak = start(["--seconds", "20"])?;
    let pid = soak.id();
    let ended = soak.wait_with_output()?;
    let told = String::from_utf8(ended.stdout)?;
    ensure!(ended.status.success(), "{}: {told}", ended.status);
    ensure!(!has_lab(pid)?, "its lab stays");
    let lines: Vec<&str> = told.lines().collect();
    ensure!(lines.contains(&soak::HEAD), "{told}");
    // One at the start and one at the end at least.
    let rows: Vec<Vec<&str>> = lines
        .iter()
        .filter(|line| line.len() == soak::HEAD.len() && **line != soak::HEAD)
        .map(|line| line.split_whitespace().collect())
        .collect();
    ensure!(rows.len() >= 2, "{told}");
    let columns =
        soak::HEAD.replace("RSS ANON KIB", "anon").replace("RSS KIB", "rss").replace("CPU %", "cpu");
    let columns: Vec<&str> = columns.split_whitespace().collect();
    let last = rows.last().context("a row")?;
    for (name, value) in columns.iter().zip(last) {
        let number: f64 = value.parse().with_context(|| format!("{name}: {value}"))?;
        let may_be_zero = ["cpu", "FAILED", "UNEXPECTED"].contains(name);
        ensure!(may_be_zero || number > 0.0, "{name}: {value}");
    }
    ensure!(told.contains("soak: too short to tell"), "{told}");
    ensure!(!told.contains("soak: flat"), "{told}");
    Ok(())
}

#[test]
fn a_soak_that_is_interrupted_leaves_nothing_behind() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut soak = start(["--minutes", "60"])?;
    let pid = soak.id();
    let mut lines = BufReader::new(soak.stdout.take().context("stdout")?).lines();
    let begun = lines.any(|line| line.is_ok_and(|line| line == soak::HEAD));
    ensure!(has_lab(pid)?, "where is its lab?");
    kill_process(Pid::from_child(&soak), Signal::INT)?;
    let status = soak.wait()?;
    ensure!(begun && status.code() == Some(130), "{status}");
    ensure!(!has_lab(pid)?, "its lab stays");
    Ok(())
}
