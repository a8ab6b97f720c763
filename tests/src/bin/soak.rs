//! The soak: one agent, a light load, and for a long time one thing after the other that happens to it; its memory,
//! descriptors, threads and BPF objects must not grow. `scripts/soak` builds and runs it.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Parser;
use signal_hook::consts::{SIGINT, SIGTERM};
use tests::balancer::Balancer;
use tests::lab::{self, Host, HttpLoad, Lab, Request, wait_for};
use tests::soak::{self, Footprint, Sample, Tally, growth};
use tests::stage::{self, Config, Stage, URLS, VIP4};

const BACKENDS: usize = 3;

/// A backend that refuses connections is down within three of these; one that is slow on a loaded machine is not.
const CHECKS: &str = "{type: http, path: /healthz, interval: 1s, timeout: 1s, rise: 1, fall: 3}";
const OTHER_CHECKS: &str = "{type: http, path: /healthz, interval: 1200ms, timeout: 1s, rise: 1, fall: 3}";

const SAMPLES_EVERY: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_secs(3);
const TICK: Duration = Duration::from_millis(50);
const LINK_DOWN: Duration = Duration::from_secs(1);

/// Of each of the two clients, one for each VIP.
const RATE: u32 = 10;
/// Requests whose results are held in memory at a time.
const CHUNK: u32 = 100;

/// Nothing on a loaded machine takes longer.
const PATIENCE: Duration = Duration::from_secs(60);
/// How much longer than a disturbance its effects on requests may be seen.
const LATE: Duration = Duration::from_secs(1);

/// Watches an agent for a long time, and what it holds.
#[derive(Parser)]
struct Arguments {
    /// How long
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    minutes: u64,
    /// How long, for a look at how it works
    #[arg(long, conflicts_with = "minutes", value_parser = clap::value_parser!(u64).range(1..))]
    seconds: Option<u64>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let length = Duration::from_secs(arguments.seconds.unwrap_or(arguments.minutes * 60));
    match run(length) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(length: Duration) -> Result<ExitCode> {
    let interrupted = interruptions()?;
    let mut soak = Soak::begin(Lab::new("soak")?)?;
    soak.go_on_for(length, &interrupted)?;
    let verdict = soak.end()?;
    Ok(match interrupted.load(Ordering::Relaxed) {
        0 => verdict,
        signal => ExitCode::from(128 + signal as u8),
    })
}

/// The number of the signal that asks for an end. The lab goes when the turn is over: who took it away at once would
/// make the turn fail.
fn interruptions() -> Result<Arc<AtomicUsize>> {
    let interrupted = Arc::<AtomicUsize>::default();
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_usize(signal, Arc::clone(&interrupted), signal as usize)
            .context("catching signals")?;
    }
    Ok(interrupted)
}

struct Soak {
    begin: Instant,
    /// What the agent runs with just now.
    config: Config,
    load: Load,
    /// When something was broken on purpose.
    disturbances: Vec<[Instant; 2]>,
    samples: Vec<Sample>,
    sampled: Instant,
    tally: Tally,
    first_unexpected: Option<Request>,
    balancer: Balancer,
    /// Last, so that the lab is removed after everything else of it.
    stage: Stage,
}

type Turn = fn(&mut Soak, usize) -> Result<()>;

/// What happens to the agent, in turn, with the number of the round. Questions follow each.
const TURNS: [(&str, Turn); 9] = [
    ("reload without a change", |soak, _| soak.reload()),
    ("a backend is killed and healed", Soak::kill_and_heal),
    ("a service comes", |soak, _| {
        soak.config.services.push(stage::service("more", &[VIP4], "81", "tcp"));
        soak.reload()
    }),
    ("a backend's MAC address changes", Soak::change_mac),
    ("the service goes", |soak, _| {
        soak.config.services.truncate(1);
        soak.reload()
    }),
    ("the balancer's link goes down and up", |soak, _| soak.link_down_and_up()),
    ("another health interval", |soak, round| {
        soak.config.health = if round.is_multiple_of(2) { OTHER_CHECKS } else { CHECKS }.to_owned();
        soak.reload()
    }),
    // Tables of another size take other memory: back at once, so that samples compare.
    ("other limits, so new maps", |soak, _| {
        soak.config.top = "limits: {slots: 65536, vips: 64}\n".to_owned();
        soak.reload()?;
        soak.ask()?;
        soak.config.top.clear();
        soak.reload()
    }),
    ("a file that is refused", |soak, _| soak.refused()),
];

impl Soak {
    fn begin(lab: Lab) -> Result<Self> {
        let stage = Stage::set_in(lab, BACKENDS)?;
        // IPv6 addresses go with the link otherwise.
        stage.balancer.sysctl("net/ipv6/conf/eth0/keep_addr_on_down", "1")?;
        let config = Config { health: CHECKS.to_owned(), ..stage.config() };
        let balancer = stage.start(&config)?;
        println!(
            "soak: agent {}, its log: {}",
            balancer.process.pid(),
            balancer.process.log_path().display()
        );
        println!("{}", soak::HEAD);
        let now = Instant::now();
        let mut soak = Self {
            begin: now,
            config,
            load: Load::start(&stage.client),
            disturbances: Vec::new(),
            samples: Vec::new(),
            sampled: now,
            tally: Tally::default(),
            first_unexpected: None,
            balancer,
            stage,
        };
        soak.sample()?;
        Ok(soak)
    }

    /// One turn after the other; samples are taken between turns, when nothing is broken.
    fn go_on_for(&mut self, length: Duration, interrupted: &AtomicUsize) -> Result<()> {
        let end = self.begin + length;
        for number in 0.. {
            let (name, turn) = TURNS[number % TURNS.len()];
            turn(self, number / TURNS.len()).with_context(|| name.to_owned())?;
            self.ask().context("questions")?;
            if self.sampled.elapsed() >= SAMPLES_EVERY {
                self.sample()?;
            }
            let next = Instant::now() + PAUSE;
            while Instant::now() < next && interrupted.load(Ordering::Relaxed) == 0 {
                thread::sleep(TICK);
            }
            if next >= end || interrupted.load(Ordering::Relaxed) != 0 {
                break;
            }
        }
        Ok(())
    }

    /// The verdict.
    fn end(mut self) -> Result<ExitCode> {
        self.load.stop();
        self.sample()?;
        let mut wrong = Vec::new();
        let grown = growth(&self.samples);
        if grown.is_none() {
            println!("soak: too short to tell what grows; {} samples do", soak::FEWEST_SAMPLES);
        }
        let flat = grown.is_some();
        wrong.extend(grown.unwrap_or_default());
        if let Some(request) = &self.first_unexpected {
            wrong.push(format!(
                "{} requests failed for no reason, the first: {request:?}",
                self.tally.unexpected
            ));
        }
        let verified = self.balancer.command(&["verify"])?;
        if verified.code != Some(0) {
            wrong.push(format!("verify: {}{}", verified.stdout.trim_end(), verified.stderr.trim_end()));
        }
        self.balancer.process_ends()?;
        self.stage.lab.close()?;
        wrong.iter().for_each(|line| println!("soak: {line}"));
        if flat && wrong.is_empty() {
            println!("soak: flat");
        }
        Ok(if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    fn sample(&mut self) -> Result<()> {
        let process = &self.balancer.process;
        ensure!(process.exit().is_none(), "the agent ended:\n{}", process.log());
        let backends_up = self.up()?;
        let footprint = Footprint::of(process.pid(), &self.balancer.run_dir.join("bpf"))?;
        self.count_requests()?;
        let after = self.sampled.elapsed();
        let cpu_percent =
            self.samples.last().map_or(0.0, |last| footprint.cpu_percent(&last.footprint, after));
        let sample =
            Sample { at: self.begin.elapsed(), footprint, cpu_percent, tally: self.tally, backends_up };
        println!("{sample}");
        self.sampled = Instant::now();
        self.samples.push(sample);
        Ok(())
    }

    /// A request that fails is expected to if anything was broken while it was under way.
    fn count_requests(&mut self) -> Result<()> {
        let (done, failed) = self.load.take()?;
        self.tally.done += done;
        for request in failed {
            let end = request.start + request.duration;
            if self.disturbances.iter().any(|[from, to]| request.start <= *to + LATE && end + LATE >= *from) {
                self.tally.expected += 1;
            } else {
                self.tally.unexpected += 1;
                self.first_unexpected.get_or_insert(request);
            }
        }
        Ok(())
    }

    fn up(&self) -> Result<usize> {
        Ok(self.balancer.backends()?.iter().filter(|backend| backend.state == "up").count())
    }

    /// Everything that an operator and a scraper ask.
    fn ask(&self) -> Result<()> {
        for question in [&["status"][..], &["backend", "list"], &["service", "list"], &["stats"]] {
            self.balancer.command(question)?.expect(0, &["www"][..usize::from(question[0] == "status")])?;
        }
        self.balancer.command(&["verify"])?.expect(0, &["no difference"])?;
        let socket = self.balancer.run_dir.join("xlb.sock");
        let socket = socket.to_str().context("path")?;
        let metrics = ["curl", "-q", "--silent", "--fail", "--unix-socket", socket, "http://xlb/metrics"];
        ensure!(self.stage.balancer.run(metrics)?.ends_with("# EOF\n"), "metrics without an end");
        Ok(())
    }

    fn reload(&self) -> Result<()> {
        std::fs::write(&self.balancer.config, self.config.to_string())?;
        self.balancer.command(&["reload"])?.expect(0, &["reloaded"])
    }

    fn refused(&self) -> Result<()> {
        let bad = Config { top: "limits: {backends: 1}\n".to_owned(), ..self.config.clone() };
        std::fs::write(&self.balancer.config, bad.to_string())?;
        let refused = self.balancer.command(&["reload"])?;
        ensure!(refused.code != Some(0) && refused.stderr.contains("limits.backends"), "{refused:?}");
        self.reload()
    }

    fn kill_and_heal(&mut self, round: usize) -> Result<()> {
        let killed = round % BACKENDS;
        let begin = Instant::now();
        self.stage.backends[killed].nginx.process.kill();
        self.balancer.wait_for_backends(BACKENDS - 1, PATIENCE)?;
        self.stage.backends[killed].heal()?;
        self.balancer.wait_for_backends(BACKENDS, PATIENCE)?;
        self.disturbances.push([begin, Instant::now()]);
        Ok(())
    }

    fn change_mac(&mut self, round: usize) -> Result<()> {
        let index = round % BACKENDS;
        let mac = [2, 0, 0, 1, (round >> 8) as u8, round as u8];
        let text = mac.map(|byte: u8| format!("{byte:02x}")).join(":");
        let begin = Instant::now();
        self.stage.backends[index].host.change_mac("eth0", mac)?;
        let neighbour = format!("neigh show {}", stage::address(index, false));
        wait_for("the balancer knows the new MAC address", PATIENCE, || {
            self.stage.balancer.ip(&neighbour).is_ok_and(|shown| shown.contains(&text))
        })?;
        self.balancer.wait_for_backends(BACKENDS, PATIENCE)?;
        self.disturbances.push([begin, Instant::now()]);
        Ok(())
    }

    fn link_down_and_up(&mut self) -> Result<()> {
        let begin = Instant::now();
        self.stage.balancer.set_link("eth0", false)?;
        thread::sleep(LINK_DOWN);
        self.stage.balancer.set_link("eth0", true)?;
        self.balancer.wait_for_backends(BACKENDS, PATIENCE)?;
        wait_for("both VIPs answer again", PATIENCE, || {
            let short = Duration::from_secs(1);
            URLS.iter().all(|url| lab::http_get_within(&self.stage.client, url, short, short).is_ok())
        })?;
        self.disturbances.push([begin, Instant::now()]);
        Ok(())
    }
}

/// Requests to both VIPs, some at a time, until it is stopped.
struct Load {
    stop: Arc<AtomicBool>,
    results: Arc<Mutex<Results>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Results {
    done: u64,
    failed: Vec<Request>,
    error: Option<anyhow::Error>,
}

impl Load {
    fn start(client: &Host) -> Self {
        let (stop, results) = (Arc::<AtomicBool>::default(), Arc::<Mutex<Results>>::default());
        let (client, stopped, sink) = (client.clone(), Arc::clone(&stop), Arc::clone(&results));
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let chunk = chunk(&client, &stopped);
                let mut results = sink.lock().unwrap_or_else(PoisonError::into_inner);
                match chunk {
                    Ok(requests) => {
                        results.done += requests.len() as u64;
                        results.failed.extend(lab::failures(&requests).into_iter().cloned());
                    }
                    Err(error) => {
                        results.error = Some(error);
                        return;
                    }
                }
            }
        });
        Self { stop, results, thread: Some(thread) }
    }

    /// Requests that were done since the last call, and those of them that failed.
    fn take(&self) -> Result<(u64, Vec<Request>)> {
        let results = std::mem::take(&mut *self.results.lock().unwrap_or_else(PoisonError::into_inner));
        results.error.map_or(Ok((results.done, results.failed)), |error| Err(error.context("the load")))
    }

    /// Gives up the requests that have not been sent.
    fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            self.results.lock().unwrap_or_else(PoisonError::into_inner).error = Some(anyhow!("it panicked"));
        }
    }
}

/// Some requests to both VIPs; fewer if they are to stop.
fn chunk(client: &Host, stopped: &AtomicBool) -> Result<Vec<Request>> {
    let start = |url: &str| {
        HttpLoad::new(url, CHUNK)
            .rate(RATE)
            .timeouts(Duration::from_secs(3), Duration::from_secs(5))
            .start(client)
    };
    let mut requests = Vec::new();
    for load in URLS.map(start) {
        let mut load = load?;
        while !load.is_done() && !stopped.load(Ordering::Relaxed) {
            thread::sleep(TICK);
        }
        // Stopped, there may be no result yet, which `stop` calls an error.
        requests.extend(if load.is_done() { load.finish()? } else { load.stop().unwrap_or_default() });
    }
    Ok(requests)
}
