//! The command line. Each command is one file; errors are printed once, here.

/// `println!` that does not panic when nobody reads.
macro_rules! say {
    ($($text:tt)*) => { $crate::cli::output::say(format_args!($($text)*)) };
}

mod backend;
mod capture;
mod check;
mod conn;
mod decap;
mod detach;
mod diff;
mod explained;
mod list;
mod log;
mod lookup;
mod output;
mod rates;
mod reload;
mod stats;
mod status;
mod tables;
mod verify;
mod wait;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::agent::{self, DEFAULT_RUN_DIR};
use crate::api::ClientError;
use crate::config::Problems;

/// Exit codes, the same for every command.
pub mod exit {
    /// Something failed; standard error says what.
    pub const FAILURE: u8 = 1;
    /// The command line is wrong.
    pub const USAGE: u8 = 2;
    /// The configuration is wrong.
    pub const CONFIG: u8 = 3;
    /// No agent answers.
    pub const NO_AGENT: u8 = 4;
    /// `verify` found a difference, or `diff --exit-code` did.
    pub const DIFFERENCE: u8 = 5;
    /// `--wait` ended while flows were left, or by moving them.
    pub const UNFINISHED: u8 = 6;
}

/// A packet-level L4 load balancer on XDP.
#[derive(Debug, Parser)]
#[command(name = "xlb", version, propagate_version = true, after_help = AFTER)]
struct Cli {
    /// How logs and errors look on standard error; RUST_LOG filters them
    #[arg(long, global = true, value_enum, default_value = "text", value_name = "FORMAT")]
    log_format: log::LogFormat,
    #[command(subcommand)]
    command: Command,
}

const AFTER: &str = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 wrong configuration, 4 no agent answers, \
    5 verify or diff --exit-code found a difference, 6 flows were left when a drain that was waited for ended.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Balance: attach, check backends, keep the kernel in line with FILE. Stopping it leaves traffic flowing
    Run {
        /// The configuration
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
        #[command(flatten)]
        run_dir: RunDir,
    },
    /// Say whether FILE is valid, whether it can work on this host, and what it takes; needs no root
    Check(check::Arguments),
    /// Show services, backends and packet outcomes of the running agent
    Status(status::Arguments),
    /// Backends of the running agent: show them, take them out of use and back
    #[command(subcommand)]
    Backend(backend::Backend),
    /// Services of the running agent
    #[command(subcommand)]
    Service(list::Service),
    /// Connections of pools that translate addresses: show them, and end them
    #[command(subcommand)]
    Conn(conn::Conn),
    /// Show packets and bytes of services and backends, and packet outcomes, as totals or as rates
    Stats(stats::Arguments),
    /// Have the running agent read its configuration again, and say how that ended
    Reload(reload::Arguments),
    /// Say what a configuration would change, before it is taken over
    Diff(diff::Arguments),
    /// Say whether the kernel has what the agent, or without one a configuration, asks for
    Verify(verify::Arguments),
    /// Say what becomes of a flow, a frame or the packets of a capture, and why
    Lookup(lookup::Arguments),
    /// Take xlb off all interfaces and remove everything it left in the kernel; traffic stops
    Detach {
        #[command(flatten)]
        run_dir: RunDir,
    },
    /// On a backend: take tunnel headers off, for kernels that have no ipip device
    Decap(decap::Arguments),
    /// Print what makes a shell complete xlb's commands
    Completion { shell: Shell },
}

#[derive(Debug, clap::Args)]
struct RunDir {
    /// Directory of the socket, the lock and the pinned maps
    #[arg(long, value_name = "DIR", default_value = DEFAULT_RUN_DIR)]
    run_dir: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people
    Table,
    /// For scripts
    Json,
}

/// Parses the arguments and runs the command.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    log::to_stderr(cli.log_format);
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            log::fail(&format!("xlb: no runtime: {error}"));
            return ExitCode::from(exit::FAILURE);
        }
    };
    match runtime.block_on(dispatch(cli.command)) {
        Ok(code) => code,
        Err(error) => report(&error),
    }
}

async fn dispatch(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Run { config, run_dir } => {
            agent::run(agent::Options { config, run_dir: run_dir.run_dir }).await?
        }
        Command::Check(arguments) => return check::run(&arguments).await,
        Command::Status(arguments) => status::run(&arguments).await?,
        Command::Backend(command) => return backend::run(&command).await,
        Command::Service(command) => list::services(&command).await?,
        Command::Conn(command) => conn::run(&command).await?,
        Command::Stats(arguments) => stats::run(&arguments).await?,
        Command::Reload(arguments) => return reload::run(&arguments).await,
        Command::Diff(arguments) => return diff::run(&arguments).await,
        Command::Verify(arguments) => return verify::run(&arguments).await,
        Command::Lookup(arguments) => return lookup::run(&arguments).await,
        Command::Detach { run_dir } => detach::run(&run_dir.run_dir).await?,
        Command::Decap(arguments) => decap::run(arguments).await?,
        Command::Completion { shell } => completion(shell)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn completion(shell: Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "xlb", &mut script);
    say!("{}", String::from_utf8(script)?.trim_end());
    Ok(())
}

/// Prints an error with its causes, and finds its exit code.
fn report(error: &anyhow::Error) -> ExitCode {
    if let Some(problems) = error.downcast_ref::<Problems>() {
        log::fail(&problems.to_string());
        return ExitCode::from(exit::CONFIG);
    }
    log::fail(&format!("xlb: {error:#}"));
    match error.downcast_ref() {
        Some(ClientError::NotRunning { .. } | ClientError::Timeout { .. }) => ExitCode::from(exit::NO_AGENT),
        _ => ExitCode::from(exit::FAILURE),
    }
}
