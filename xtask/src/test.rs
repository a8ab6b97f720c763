//! Builds everything and runs all tests, with one closing line over all test programs.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};

use crate::{cargo, root};

/// Tests that need root are skipped, not failed, where this is set.
const SKIP_ROOT: &str = "XLB_SKIP_ROOT";

/// How many tests of a program run at a time.
const TEST_THREADS: &str = "RUST_TEST_THREADS";

pub fn run(arguments: &[String]) -> Result<()> {
    // The namespace tests start the xlb binary, which `cargo test` alone does not build.
    let mut build = cargo();
    build.args(["build", "--locked"]);
    crate::run(build)?;
    // Another build, which dies where a test wants it to. Features of one cargo call are those of all its programs.
    let mut failing = cargo();
    failing.args([
        "build",
        "--locked",
        "--package",
        "tests",
        "--features",
        "fail-points",
        "--bin",
        "xlb-failing",
    ]);
    crate::run(failing)?;
    let mut test = cargo();
    test.args(["test", "--locked", "--no-fail-fast"])
        .args(arguments)
        .current_dir(root())
        .stdout(Stdio::piped());
    // Most of what tests with a lab do is waiting; those that must be alone see to it themselves.
    if std::env::var_os(TEST_THREADS).is_none() {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        test.env(TEST_THREADS, (2 * cores).to_string());
    }
    say!("+ {test:?}");
    let mut child = test.spawn().context("cargo test does not start")?;
    let stdout = child.stdout.take().context("cargo test has no output")?;
    let (mut passed, mut failed, mut ignored) = (0, 0, 0);
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        say!("{line}");
        if line.starts_with("test result:") {
            passed += count(&line, "passed");
            failed += count(&line, "failed");
            ignored += count(&line, "ignored");
        }
    }
    let status = child.wait()?;
    say!("");
    if std::env::var_os(SKIP_ROOT).is_some() {
        say!("{SKIP_ROOT} is set: program runs and network namespaces were skipped where root was missing");
    }
    say!("{passed} passed, {failed} failed, {ignored} skipped");
    ensure!(status.success(), "cargo test: {status}");
    Ok(())
}

/// The number before a word in cargo's closing line.
fn count(line: &str, word: &str) -> u32 {
    let words: Vec<&str> = line.split(&[' ', ';', '.'][..]).filter(|word| !word.is_empty()).collect();
    words.windows(2).find(|pair| pair[1] == word).and_then(|pair| pair[0].parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::count;

    #[test]
    fn cargos_closing_line_is_read() {
        let line = "test result: FAILED. 105 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 5.64s";
        assert_eq!((count(line, "passed"), count(line, "failed"), count(line, "ignored")), (105, 2, 1));
    }
}
