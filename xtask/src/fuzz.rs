//! Builds the fuzzer with counters of the packet path's edges, and runs it.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{cargo, root};

/// A counter of one byte for each edge, by LLVM's own pass: no sanitizer, no nightly compiler.
const COVERAGE: [&str; 4] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=3",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Copt-level=1",
];

pub fn run(arguments: &[String]) -> Result<()> {
    // Of this crate alone: the packet path is inlined into it, and the rest of the workspace is used as it is.
    let mut build = cargo();
    build.args(["rustc", "--locked", "--package", "tests", "--bin", "fuzz", "--"]).args(COVERAGE);
    crate::run(build)?;
    // Beside this program; `cargo run` would build it again, without.
    let fuzzer = std::env::current_exe().context("where xtask lies")?.with_file_name("fuzz");
    let mut fuzz = Command::new(fuzzer);
    fuzz.args(arguments).current_dir(root());
    say!("+ {fuzz:?}");
    let status = fuzz.status().with_context(|| format!("{fuzz:?} does not start"))?;
    ensure!(status.success(), "the fuzzer ended with {status}");
    Ok(())
}
