//! Looks for frames that reach what no frame of the corpus does, and with `--kernel` for frames that end otherwise in the
//! kernel than on the host. `cargo xtask fuzz` builds it with coverage and runs it.

mod coverage;
mod minimise;
mod search;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use lb_common::outcome::DecapOutcome;
use lb_userspace::reconcile::image::Image;
use signal_hook::consts::{SIGINT, SIGTERM};
use tests::fuzz::{Balancer, Decap, HostRun, Mismatch, Program, Subject, Variant, corpus, decap_host, host};

use search::Search;

/// Frames through the packet path, until time is up.
#[derive(Parser)]
#[command(name = "cargo xtask fuzz")]
struct Arguments {
    /// How long
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Another number makes other frames
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// In the kernel too, and compare (needs root)
    #[arg(long)]
    kernel: bool,
    /// Only take out of the corpus what is not needed, and make plain what is left
    #[arg(long, conflicts_with_all = ["kernel", "replay"])]
    minimise: bool,
    /// Only run the frames of a file in the form of the corpus
    #[arg(long, value_name = "FILE")]
    replay: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fuzz: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    if let Some(file) = &arguments.replay {
        return replay(file, arguments.kernel);
    }
    if arguments.minimise {
        return Program::ALL.into_iter().try_for_each(minimise::minimise);
    }
    let end = Arc::<AtomicBool>::default();
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&end)).context("catching signals")?;
    }
    let mut search = Search::begin(arguments.seed, arguments.kernel)?;
    let found = search.go_on_for(Duration::from_secs(arguments.seconds), &end);
    search.summary();
    search.save()?;
    found.or_else(|mismatch| report(&mismatch))
}

/// The packet path, compiled here: with the counters of its edges.
fn balancer_here(image: &Image, frame: &[u8], room: usize) -> HostRun {
    host(image, frame, room)
}

fn decap_here(frame: &[u8]) -> (DecapOutcome, Vec<u8>) {
    decap_host(frame)
}

/// All subjects of a program.
fn subjects(program: Program, kernel: bool) -> Result<Vec<Box<dyn Subject>>> {
    let balancer = |variant| -> Result<Box<dyn Subject>> {
        if kernel {
            let balancer = Balancer::in_kernel(variant, balancer_here)?;
            return Ok(Box::new(balancer));
        }
        Ok(Box::new(Balancer::on_host(variant, balancer_here)))
    };
    let decap = || -> Result<Box<dyn Subject>> {
        if kernel {
            return Ok(Box::new(Decap::in_kernel(decap_here)?));
        }
        Ok(Box::new(Decap::on_host(decap_here)))
    };
    match program {
        Program::Balancer => Variant::all().into_iter().map(balancer).collect(),
        Program::Decap => Ok(vec![decap()?]),
    }
}

/// Each frame under each subject, with what becomes of it.
fn replay(file: &Path, kernel: bool) -> Result<()> {
    let cases = corpus::read(file)?;
    if cases.is_empty() {
        bail!("{}: no frames; each is a line of a name and of bytes in hex", file.display());
    }
    let mut wrong = 0;
    for program in Program::ALL {
        for mut subject in subjects(program, kernel)? {
            for case in &cases {
                let ended = subject.run(&case.frame).map(|outcome| subject.counted()[outcome].0.to_owned());
                let (ended, settled) =
                    (ended.unwrap_or_else(|what| mismatch(&mut wrong, &what)), subject.settle());
                println!("{:28} {}: {ended}", subject.name(), case.name);
                if let Err(what) = settled {
                    println!("{:28} {}: {}", subject.name(), case.name, mismatch(&mut wrong, &what));
                }
            }
        }
    }
    if wrong > 0 { bail!("{wrong} times the kernel and the host differ") } else { Ok(()) }
}

fn mismatch(wrong: &mut u32, what: &str) -> String {
    *wrong += 1;
    format!("MISMATCH: {what}")
}

/// Writes the frame down, and says how to see it again.
fn report(mismatch: &Mismatch) -> Result<()> {
    println!("{mismatch}");
    let name = corpus::kebab(&format!("mismatch {}", mismatch.subject));
    let path = std::env::current_dir()?.join(format!("{name}.hex"));
    let case = |name: &str, frame: &[u8]| corpus::Case { name: name.to_owned(), frame: frame.to_vec() };
    let cases = [case("shrunk", &mismatch.frame), case("as-found", &mismatch.found)];
    corpus::write(&path, &format!("{}: {}", mismatch.subject, mismatch.what), &cases)?;
    bail!("kernel and host differ; to see it again: cargo xtask fuzz --kernel --replay {}", path.display())
}
