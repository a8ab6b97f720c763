//! The demo: clients, a balancer and backends in network namespaces, real HTTP through the VIP, a
//! backend killed and healed. `scripts/demo` builds and runs it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use tests::balancer::{Balancer, xlb};
use tests::lab::{self, HttpLoad, Lab, Request};
use tests::stage::{self, Stage, URL4, URLS, VIP4};

const BACKENDS: usize = 3;
const KILLED: usize = 1;

/// fall x interval + timeout of examples/demo.yaml, and 0.2 s of slack.
const DETECTION_WINDOW: Duration = Duration::from_millis(2 * 500 + 300 + 200);

/// Shows xlb at work in network namespaces.
#[derive(Parser)]
struct Arguments {
    /// The balancer's configuration
    #[arg(default_value = "examples/demo.yaml")]
    config: PathBuf,
    /// Leave the lab running and say how to play with it
    #[arg(long)]
    keep: bool,
    /// Remove labs that --keep left
    #[arg(long, conflicts_with = "keep")]
    remove: bool,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    if arguments.remove {
        for dir in lab::kept()? {
            lab::remove_kept(&dir)?;
            println!("removed {}", dir.display());
        }
        return Ok(());
    }
    lab::clean_up_on_signals()?;
    let lab = Lab::new("demo")?;
    let mut demo = Demo::begin(lab, &arguments.config)?;
    demo.balance()?;
    demo.kill_and_heal()?;
    println!("\n== xlb status\n\n{}", demo.balancer.xlb(&["status"])?);
    if arguments.keep {
        demo.stage.lab.keep()?;
        return demo.say_how_to_play();
    }
    println!("{}", demo.balancer.process_ends()?);
    demo.stage.lab.close()?;
    println!("== done; namespaces, processes, maps and pins are removed");
    Ok(())
}

/// Everything that plays a part.
struct Demo {
    stage: Stage,
    balancer: Balancer,
}

impl Demo {
    fn begin(lab: Lab, config: &Path) -> Result<Self> {
        println!("== a client, a balancer and {BACKENDS} nginx backends, each in a network namespace");
        let stage = Stage::set_in(lab, BACKENDS)?;
        let yaml = std::fs::read_to_string(config).with_context(|| config.display().to_string())?;
        println!("== xlb run -c {}", config.display());
        let balancer = Balancer::start(&stage.balancer, &stage.lab.dir().join("xlb"), &yaml)?;
        balancer.wait_for_backends(BACKENDS, Duration::from_secs(15))?;
        for interface in balancer.status()?.interfaces {
            println!(
                "   {} carries the program in {} mode; all backends are up",
                interface.name, interface.mode
            );
        }
        Ok(Self { stage, balancer })
    }

    /// Real requests over both families; each backend's share.
    fn balance(&self) -> Result<()> {
        for url in URLS {
            let begin = Instant::now();
            let requests = lab::http_load(&self.stage.client, url, 1500, 4)?;
            let failed = lab::failures(&requests);
            println!(
                "\n== {} requests to {url} in {:.1} s, one connection each; {} failed",
                requests.len(),
                begin.elapsed().as_secs_f32(),
                failed.len()
            );
            let shares = lab::backends(&requests);
            for (backend, count) in &shares {
                println!("   {backend}  {count:5}  {:4.1} %", *count as f32 * 100.0 / requests.len() as f32);
            }
            ensure!(failed.is_empty(), "first failure: {:?}", failed[0].result);
            ensure!(shares.len() == BACKENDS, "not every backend got requests");
        }
        Ok(())
    }

    /// Kills one backend under load, measures how long requests fail, heals it.
    fn kill_and_heal(&mut self) -> Result<()> {
        let name = &stage::name(KILLED);
        let before = self.places()?;
        let load = HttpLoad::new(URL4, 100_000)
            .parallel(4)
            .rate(100)
            .timeouts(Duration::from_millis(500), Duration::from_secs(2))
            .start(&self.stage.client)?;
        std::thread::sleep(Duration::from_millis(500));
        println!("\n== nginx on {name} is killed, under 400 requests a second");
        let killed = Instant::now();
        self.stage.backends[KILLED].nginx.process.kill();
        std::thread::sleep(Duration::from_secs(3));
        let moved = moved(&before, &self.places()?, name);
        let requests = load.stop()?;
        report_outage(&requests, killed)?;
        println!("   of {} flows that {name} did not hold, {} moved", moved.others, moved.others_moved);
        ensure!(moved.others_moved == 0, "flows of living backends moved");

        let healed = Instant::now();
        self.stage.backends[KILLED].heal()?;
        self.balancer.wait_for_backends(BACKENDS, Duration::from_secs(10))?;
        println!("\n== nginx on {name} is started again; up after {:.1} s", healed.elapsed().as_secs_f32());
        let requests = lab::http_load(&self.stage.client, URL4, 500, 4)?;
        let failed = lab::failures(&requests);
        ensure!(failed.is_empty(), "a request failed after {name} was healed: {:?}", failed[0].result);
        ensure!(lab::backends(&requests).contains_key(name.as_str()), "{name} gets no requests");
        println!("   500 requests, none failed, {name} takes part again");
        Ok(())
    }

    /// Where the packet path sends some flows just now.
    fn places(&self) -> Result<BTreeMap<u16, String>> {
        let place = |port: u16| {
            let backend = self.balancer.lookup(&format!("10.111.0.2:{port}"), &format!("{VIP4}:80"))?;
            Ok((port, backend))
        };
        (2000..2060).map(place).collect()
    }

    fn say_how_to_play(&self) -> Result<()> {
        let run_dir = self.balancer.run_dir.display();
        let xlb = xlb()?;
        let xlb = xlb.display();
        let on_balancer = self.balancer.host.enter_command();
        println!("== the lab keeps running. Try:");
        println!("   {} curl {}", self.stage.client.enter_command(), URL4);
        println!("   {on_balancer} {xlb} lookup 10.111.0.2:40000 203.0.113.10:80 --run-dir {run_dir}");
        println!("   {on_balancer} {xlb} status --watch --run-dir {run_dir}");
        println!("   edit {}, then: {xlb} reload --run-dir {run_dir}", self.balancer.config.display());
        println!("   the agent's log: {}", self.balancer.process.log_path().display());
        println!("   remove it all: ./scripts/demo --remove");
        Ok(())
    }
}

/// How flows fared between two looks.
struct Moved {
    others: usize,
    others_moved: usize,
}

fn moved(before: &BTreeMap<u16, String>, after: &BTreeMap<u16, String>, killed: &str) -> Moved {
    let others: Vec<_> = before.iter().filter(|(_, backend)| *backend != killed).collect();
    let others_moved = others.iter().filter(|(port, backend)| after.get(*port) != Some(*backend)).count();
    Moved { others: others.len(), others_moved }
}

/// Says how long requests failed, and refuses failures outside of the detection window.
fn report_outage(requests: &[Request], killed: Instant) -> Result<()> {
    let failed = lab::failures(requests);
    let last = failed.iter().map(|request| request.start).max();
    let outage = last.map_or(Duration::ZERO, |last| last.saturating_duration_since(killed));
    println!(
        "   {} of {} requests failed, the last one {:.2} s after the kill (allowed: {:.2} s)",
        failed.len(),
        requests.len(),
        outage.as_secs_f32(),
        DETECTION_WINDOW.as_secs_f32()
    );
    ensure!(outage <= DETECTION_WINDOW, "requests failed outside of the detection window");
    let early = failed.iter().filter(|request| request.start + request.duration < killed).count();
    ensure!(early == 0, "{early} requests failed before the kill");
    Ok(())
}
