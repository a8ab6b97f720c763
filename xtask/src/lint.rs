//! Formatting, clippy, generated docs.

use anyhow::Result;

use crate::{cargo, docs};

/// Debian's compiler comes without clippy and rustfmt: what is not there is skipped, and said.
fn run_if_there(tool: &str, arguments: &[&str]) -> Result<()> {
    let there = cargo().args([tool, "--version"]).output().is_ok_and(|output| output.status.success());
    if !there {
        say!("skipped: cargo {tool} is not installed");
        return Ok(());
    }
    let mut command = cargo();
    command.arg(tool).args(arguments);
    crate::run(command)
}

pub fn run() -> Result<()> {
    run_if_there("fmt", &["--all", "--check"])?;
    run_if_there("clippy", &["--locked", "--workspace", "--all-targets", "--", "--deny", "warnings"])?;
    docs::run(true)
}
