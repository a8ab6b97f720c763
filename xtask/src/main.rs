//! `cargo xtask`: what a person would otherwise type by hand.

#![deny(clippy::print_stdout, clippy::print_stderr)]

#[macro_use]
mod say;

mod bench;
mod calm;
mod capacity;
mod docs;
mod flows;
mod fuzz;
mod lab;
mod lint;
mod plot;
mod pps;
mod program;
mod scale;
mod test;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Exactly what CI runs: the demo, lint, and all tests
    Ci,
    /// Build everything and run all tests; further arguments go to `cargo test`
    Test {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Frames that nobody thought of, guided by coverage; arguments go to the fuzzer (`-- --help` shows them)
    Fuzz {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Formatting, clippy with warnings denied, generated docs up to date
    Lint,
    /// Write the generated parts of the docs
    Docs {
        /// Fail if they are out of date, and write nothing
        #[arg(long)]
        check: bool,
    },
    /// What packets, changes and the control plane cost, alone and beside other balancers
    Bench {
        #[command(subcommand)]
        bench: bench::Bench,
    },
    /// Instructions, verifier steps and stack depth of the loaded programs (needs root)
    Program,
}

/// The exit code where nobody reads on: what a shell says of a command that SIGPIPE has ended.
const UNREAD: u8 = 128 + 13;

/// Errors are told in a line: a backtrace would push the closing lines of the tests out of sight.
fn main() -> ExitCode {
    match say::while_read(|| dispatch(Cli::parse().task)) {
        Some(Ok(())) => ExitCode::SUCCESS,
        Some(Err(error)) => {
            say::while_read(|| note!("xtask: {error:#}"));
            ExitCode::FAILURE
        }
        None => ExitCode::from(UNREAD),
    }
}

fn dispatch(task: Task) -> Result<()> {
    match task {
        Task::Ci => {
            run(Command::new("./scripts/demo"))?;
            lint::run()?;
            run(Command::new("./scripts/test"))
        }
        Task::Test { arguments } => test::run(&arguments),
        Task::Fuzz { arguments } => fuzz::run(&arguments),
        Task::Lint => lint::run(),
        Task::Docs { check } => docs::run(check),
        Task::Bench { bench } => bench::run(bench),
        Task::Program => program::run(),
    }
}

/// The workspace's directory.
fn root() -> &'static Path {
    static ROOT: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    ROOT.get_or_init(|| Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new(".")).to_owned())
}

fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

const OPTIMISED: bool = !cfg!(debug_assertions);

/// Runs this command in an optimised build, to its end; `false` if this is one.
fn rerun_optimised() -> Result<bool> {
    if OPTIMISED {
        return Ok(false);
    }
    let mut command = cargo();
    command.args(["run", "--quiet", "--release", "--package", "xtask", "--"]);
    command.args(std::env::args().skip(1));
    run(command)?;
    Ok(true)
}

/// What makes the `xlb` beside this program: labs start it.
fn agent_build() -> Command {
    let mut command = cargo();
    command.args(["build", "--quiet", "--package", "lb-userspace", "--package", "tests"]);
    if OPTIMISED {
        command.arg("--release");
    }
    command
}

/// Runs a command in the workspace, saying which.
fn run(mut command: Command) -> Result<()> {
    say!("+ {command:?}");
    let status =
        command.current_dir(root()).status().with_context(|| format!("{command:?} does not start"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

/// Says what is going on, over what was said before; nothing where nobody looks.
fn progress(text: &str) {
    let mut stderr = std::io::stderr();
    if stderr.is_terminal() {
        // What cannot be said is not missed.
        _ = write!(stderr, "\r\x1b[K{text}").and_then(|()| stderr.flush());
    }
}
