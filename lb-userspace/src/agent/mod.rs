//! The agent: one task owns all state (`core`), everything else sends it events.
//!
//! configuration, probe results, next hops, API requests, timers -> `Core` -> desired -> plan -> maps

mod core;
mod interfaces;
mod notify;
mod reload;
pub mod run_dir;
pub mod status;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use futures_util::{StreamExt, stream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{error, info, warn};

use crate::api;
use crate::bpf::{self, BpfFs, Trace};
use crate::capabilities;
use crate::config;
use crate::config::model::{Check, CheckKind, Config};
use crate::health::{Checker, Probe, checker::DEFAULT_CONCURRENCY, probe};
use crate::lookup::{Explanation, Query};
use crate::nexthop::Resolver;

pub use self::core::preflight;
use self::core::{BackendKey, Core, NextHops};
use self::notify::Notify;
use self::status::Status;

/// Where an agent keeps its socket, its lock and the pins.
pub const DEFAULT_RUN_DIR: &str = "/run/xlb";

/// Next hops that are missing are looked for this often; all are looked at again more rarely.
const RESOLVE_MISSING: Duration = Duration::from_secs(1);
const RESOLVE_ALL: u32 = 5;

/// How long the first look at next hops may take before forwarding begins without the missing ones.
const FIRST_RESOLVE: Duration = Duration::from_secs(1);

/// How long a backend whose health is not known may take to answer before tables are made without it.
const FIRST_PROBE: Duration = Duration::from_secs(1);

/// Traced decisions wait this long in their ring at the most.
const FLUSH_TRACE: Duration = Duration::from_millis(50);

#[derive(Debug, Clone)]
pub struct Options {
    pub config: PathBuf,
    pub run_dir: PathBuf,
}

/// What others ask of the core.
#[derive(Debug)]
pub enum Request {
    Status(oneshot::Sender<Status>),
    Lookup(Query, oneshot::Sender<Result<Explanation, String>>),
}

/// Runs until a signal ends it. Forwarding goes on after that.
pub async fn run(options: Options) -> anyhow::Result<()> {
    // First of all: a signal that comes while the agent starts waits until it can be handled.
    let mut hangup = signal(SignalKind::hangup())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut notify = Notify::from_environment();
    let loaded = config::load(&options.config)?;
    for warning in &loaded.warnings {
        warn!("{warning}");
    }
    capabilities::check()?;
    let lock = run_dir::lock(&options.run_dir)?;
    let resolver = Arc::new(Resolver::new().context("netlink is not to be had")?);
    let socket = api::Socket::bind(&options.run_dir.join(api::SOCKET))?;
    let fs = BpfFs::open(&options.run_dir).inspect_err(|_| api::remove_socket(&options.run_dir))?;

    let (probe_tx, mut probes) = mpsc::channel(1024);
    let (hops_tx, mut hops) = mpsc::channel(4);
    let (request_tx, mut requests) = mpsc::channel(64);
    let (reload_tx, mut reloads) = mpsc::channel(1);
    let checker: Checker<BackendKey> = Checker::new(probe_tx);
    let fresh = !fs.is_used()?;
    let mut core = match Core::start(&options.config, loaded.config, fs.clone(), &resolver, checker).await {
        Ok(core) => core,
        Err(error) => {
            give_up(&options.run_dir, fs, fresh);
            return Err(error);
        }
    };
    tokio::spawn(socket.serve(request_tx));

    // Nothing is forwarded yet, or by the tables of an earlier agent: time to ask before the first tables.
    let unknown = core.unknown(core.config());
    let (found, first) = tokio::join!(core.resolve_now(&resolver, FIRST_RESOLVE), first_probes(unknown));
    core.on_next_hops(found);
    for (key, probe) in &first {
        core.on_probe(Instant::now(), key, probe);
    }
    if let Err(error) = core.begin() {
        drop(core);
        give_up(&options.run_dir, fs, fresh);
        return Err(error);
    }
    core.settle(&resolver).await?;
    let mut trace = tracer(&mut core);
    core.start_checks();
    info!(
        services = core.config().services.len(),
        backends = core.config().pools.iter().map(|pool| pool.backends.len()).sum::<usize>(),
        "running"
    );
    notify.ready(core.summary());

    let mut ticks = interval(RESOLVE_MISSING);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut flushes = interval(FLUSH_TRACE);
    flushes.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut tick = 0u32;
    let mut resolving = false;
    let mut asking: Option<JoinHandle<()>> = None;
    loop {
        tokio::select! {
            Some((key, probe)) = probes.recv() => {
                core.on_probe(Instant::now(), &key, &probe);
                drain(&mut probes, |(key, probe): (BackendKey, Probe)| core.on_probe(Instant::now(), &key, &probe));
            }
            Some(found) = hops.recv() => {
                resolving = false;
                core.on_next_hops(found);
            }
            () = notify.due() => {
                notify.alive();
                continue;
            }
            _ = ticks.tick() => {
                notify.status(core.summary());
                tick += 1;
                let all = tick >= RESOLVE_ALL;
                if all && let Err(error) = core.check_interfaces(&resolver).await {
                    warn!(error = %format!("{error:#}"), "interfaces cannot be looked at");
                }
                let wanted = core.addresses_to_resolve(all);
                if !resolving && !wanted.is_empty() {
                    resolving = true;
                    tick = if all { 0 } else { tick };
                    resolve_aside(Arc::clone(&resolver), wanted, hops_tx.clone());
                }
            }
            Some(request) = requests.recv() => {
                answer(&mut core, request);
                continue;
            }
            _ = hangup.recv() => {
                notify.reloading();
                let config = read_again(&mut core);
                if config.is_none() {
                    if let Some(overtaken) = asking.take() {
                        overtaken.abort();
                    }
                    notify.ready(core.summary());
                }
                if let Some(config) = config {
                    // The loop goes on meanwhile: health and requests do not wait for a reload. A later
                    // file overtakes one whose backends are still being asked.
                    let (unknown, missing) = (core.unknown(&config), core.to_resolve(&config, false));
                    let (resolver, to) = (Arc::clone(&resolver), reload_tx.clone());
                    if let Some(overtaken) = asking.replace(tokio::spawn(async move {
                        let hops = resolver.resolve_all(&missing, FIRST_RESOLVE);
                        let (hops, first) = tokio::join!(hops, first_probes(unknown));
                        _ = to.send((config, first, hops)).await;
                    })) {
                        overtaken.abort();
                    }
                }
                continue;
            }
            Some((config, first, found)) = reloads.recv() => {
                reload(&mut core, config, &first, found, &resolver).await;
                notify.ready(core.summary());
                // The program may have been loaded again, with another ring, also by a reload that failed.
                trace = tracer(&mut core);
            }
            _ = flushes.tick(), if trace.is_some() => {
                if let Some(trace) = &mut trace {
                    trace.flush();
                }
                continue;
            }
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
        if let Err(error) = core.reconcile() {
            error!(error = %format!("{:#}", anyhow::Error::from(error)), "the tables are not up to date; trying again with the next event");
        }
    }
    notify.stopping();
    api::remove_socket(&options.run_dir);
    lock.set_len(0)?;
    info!("stopping; forwarding goes on with the tables as they are (`xlb detach` ends it)");
    Ok(())
}

/// A first start that fails leaves nothing; what an earlier agent left goes on.
fn give_up(run_dir: &Path, fs: BpfFs, fresh: bool) {
    api::remove_socket(run_dir);
    if fresh && let Err(left) = bpf::detach(fs, &[]) {
        warn!(error = %left, "what this start has pinned is left; `xlb detach` removes it");
    }
}

/// Handles what else has arrived, so that many events make one plan.
fn drain<T>(events: &mut mpsc::Receiver<T>, mut handle: impl FnMut(T)) {
    while let Ok(event) = events.try_recv() {
        handle(event);
    }
}

fn answer(core: &mut Core, request: Request) {
    // An asker that has gone away needs no answer.
    match request {
        Request::Status(reply) => _ = reply.send(core.status(Instant::now())),
        Request::Lookup(query, reply) => _ = reply.send(core.lookup(&query)),
    }
}

/// Asks backends once, all at the same time, so that a table is not made before they could answer. One
/// that does not answer in this time is asked again by its checks.
async fn first_probes(unknown: Vec<(BackendKey, Check)>) -> Vec<(BackendKey, Probe)> {
    let probes = unknown.into_iter().filter(|(_, check)| check.kind != CheckKind::None).map(
        |(key, check)| async move {
            let probe = tokio::time::timeout(FIRST_PROBE, probe(&check, key.address)).await.ok()?;
            Some((key, probe))
        },
    );
    let answers = stream::iter(probes).buffer_unordered(DEFAULT_CONCURRENCY).filter_map(std::future::ready);
    answers.collect().await
}

/// Reads the file again. A bad file changes nothing.
fn read_again(core: &mut Core) -> Option<Config> {
    match config::load(core.config_path()) {
        Ok(loaded) => {
            for warning in &loaded.warnings {
                warn!("{warning}");
            }
            Some(loaded.config)
        }
        Err(problems) => {
            for problem in &problems.0 {
                error!("{problem}");
            }
            error!(problems = problems.0.len(), "reload refused; the last good configuration goes on");
            core.note_reload(Err(problems.to_string()));
            None
        }
    }
}

/// Takes over a configuration that is valid.
async fn reload(
    core: &mut Core,
    config: Config,
    first: &[(BackendKey, Probe)],
    found: NextHops,
    resolver: &Resolver,
) {
    match core.reload(config, first, found, resolver).await {
        Ok(()) => info!(file = %core.config_path().display(), "reloaded"),
        Err(error) => {
            error!(error = %format!("{error:#}"), "reload refused; the last good configuration goes on");
            core.note_reload(Err(format!("{error:#}")));
        }
    }
}

fn resolve_aside(resolver: Arc<Resolver>, wanted: Vec<std::net::IpAddr>, to: mpsc::Sender<NextHops>) {
    tokio::spawn(async move {
        let found = resolver.resolve_all(&wanted, RESOLVE_MISSING).await;
        // The core is gone only at the end of the process.
        _ = to.send(found).await;
    });
}

/// The reader of decisions, where the configuration asks for them.
fn tracer(core: &mut Core) -> Option<Trace> {
    let refused = |error| warn!(error = %format!("{:#}", anyhow::Error::from(error)), "decisions cannot be traced; that takes CAP_SYS_ADMIN, too");
    core.trace()?.map_err(refused).ok()
}
