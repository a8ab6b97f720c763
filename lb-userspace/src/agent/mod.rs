//! The agent: one task owns all state (`core`), everything else sends it events.
//!
//! configuration, probe results, next hops, interfaces, API requests, timers -> `Core` -> desired -> plan -> maps

mod adopt;
mod changed;
mod changeover;
mod commands;
pub mod connections;
mod core;
pub mod diff;
mod first_probes;
mod flows;
mod interfaces;
mod lookup;
mod named;
mod next_hops;
mod notify;
mod overrides;
pub mod own;
mod reload;
mod roster;
pub mod run_dir;
pub mod snapshot;
pub mod status;
mod steering;
mod tracking;
pub mod verify;
mod yielded;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, sleep_until};
use tracing::{error, info, warn};

use crate::api::{self, EndpointError, Endpoints};
use crate::bpf::{self, BpfFs, Datapath, Trace};
use crate::capabilities;
use crate::capacity::{Capacity, possible_cpus};
use crate::config;
use crate::descriptors;
use crate::health::{Checker, Outcome};
use crate::lookup::Explanation;
use crate::memory;
use crate::nexthop::{Event, Follower, Resolver};
use crate::room::Available;

pub use self::commands::{Action, Command, CommandError, Done, Timeout};
use self::connections::Filter;
use self::core::{BackendKey, Core};
pub use self::core::{keys, preflight};
use self::diff::Comparison;
use self::first_probes::first_probes;
use self::interfaces::Wanted;
pub use self::lookup::Question;
use self::notify::Notify;
use self::overrides::Store;
use self::reload::Reloader;
pub use self::reload::{Refused, Summary};
use self::snapshot::Snapshot;
use self::verify::Verification;

/// Where an agent keeps its socket, its lock and the pins.
pub const DEFAULT_RUN_DIR: &str = "/run/xlb";

/// How long the first look at next hops may take before forwarding begins without the missing ones.
const FIRST_RESOLVE: Duration = Duration::from_secs(1);

/// Interfaces and pins are looked after this often, whatever the kernel has told of them.
const LOOK_AFTER: Duration = Duration::from_secs(5);

/// Deadlines of drains and the ends of drains are looked for this often.
const LOOK_AT_EXITS: Duration = Duration::from_secs(1);

/// Slots that could not be looked after are left alone so long: what is wrong may last, and all else goes on.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// The service manager hears of changes this often.
const TELL_STATUS: Duration = Duration::from_secs(1);

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
    Snapshot(oneshot::Sender<Snapshot>),
    Lookup(Question, oneshot::Sender<Result<Vec<Explanation>, String>>),
    Verify(oneshot::Sender<anyhow::Result<Verification>>),
    Compare(oneshot::Sender<Comparison>),
    Command(Command, oneshot::Sender<Result<Done, CommandError>>),
    /// The connections go; an error says what is not known.
    Flush(Filter, oneshot::Sender<Result<u64, String>>),
    Reload(oneshot::Sender<Result<Summary, Refused>>),
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
    descriptors::take_all();
    let lock = run_dir::lock(&options.run_dir)?;
    let resolver = Arc::new(Resolver::new().context("netlink is not to be had")?);

    let (probe_tx, mut probes) = mpsc::channel(1024);
    let (request_tx, mut requests) = mpsc::channel(64);
    let checker: Checker<BackendKey> = Checker::on_own_thread(probe_tx).context("no thread for checks")?;
    let socket = api::Socket::bind(&options.run_dir.join(api::SOCKET))?;
    // From here on, the socket goes with the endpoints.
    let mut endpoints = Endpoints::new(&socket, request_tx.clone());
    let prepared = endpoints.prepare(&loaded.config).map_err(endpoint_error)?;
    endpoints.apply(prepared)?;
    let store = Store::new(&options.run_dir);
    let fs = BpfFs::open(&options.run_dir)?;
    let fresh = !fs.is_used()?;
    let capacity = Capacity::new(&loaded.config.limits);
    if !Datapath::has_maps(&fs, &capacity) {
        has_room(&capacity, &loaded.places)?;
    }
    let started = Core::start(&options.config, loaded.config, store, fs.clone(), &resolver, checker).await;
    let (mut core, wanted) = match started {
        Ok(started) => started,
        Err(error) => {
            give_up(&fs, fresh, &resolver).await;
            return Err(error);
        }
    };
    tokio::spawn(api::serve(socket, request_tx));
    if let Err(error) = begin(&mut core, &wanted, &resolver).await {
        drop(core);
        give_up(&fs, fresh, &resolver).await;
        return Err(error);
    }

    let (follower, mut network) =
        Follower::start(Arc::clone(&resolver)).context("netlink is not to be had")?;
    follower.watch(core.known_next_hops());
    let mut trace = tracer(&mut core);
    core.start_checks();
    core.keep();
    info!(
        services = core.file().services.len(),
        backends = core.file().pools.iter().map(|pool| pool.backends.len()).sum::<usize>(),
        "running"
    );
    notify.ready(core.summary());
    memory::return_free_blocks();

    let (mut reloader, mut reloads) = Reloader::new(Arc::clone(&resolver));
    let mut look_after = every(LOOK_AFTER);
    let mut tell_status = every(TELL_STATUS);
    let mut look_at_exits = every(LOOK_AT_EXITS);
    let mut flushes = every(FLUSH_TRACE);
    // Only now and then where nothing is to be done: each time costs more than what is looked at.
    let mut slots_rested = Instant::now();
    let slots = sleep_until(slots_rested.into());
    tokio::pin!(slots);
    loop {
        let slots_due = (slots_rested + core.pace_of_looks()).into();
        if slots.deadline() != slots_due {
            slots.as_mut().reset(slots_due);
        }
        tokio::select! {
            first = probes.recv() => {
                // Nobody would be found to be down any more. Packets go on as they do, and a manager starts another agent.
                let first = first.context("the thread of the checks has ended")?;
                let mut heard = |Outcome { key, at, probe }| core.on_probe(at, &key, &probe);
                heard(first);
                drain(&mut probes, heard);
            }
            Some(event) = network.recv() => match event {
                Event::NextHops(answers) => core.on_next_hops(answers),
                Event::Links(_) => look_after_interfaces(&mut core, &resolver).await,
            },
            () = until(core.due()) => core.on_time(Instant::now()),
            _ = look_after.tick() => look_after_interfaces(&mut core, &resolver).await,
            _ = look_at_exits.tick(), if core.overrides.has_exits() => core.look_after_exits(),
            () = notify.due() => {
                notify.alive();
                continue;
            }
            _ = tell_status.tick(), if notify.is_heard() => {
                notify.status(core.summary());
                continue;
            }
            Some(request) = requests.recv() => {
                if let Some(reply) = answer(&mut core, request, &resolver).await {
                    notify.reloading();
                    if !reloader.begin(&mut core, Some(reply)) {
                        notify.ready(core.summary());
                    }
                }
                continue;
            }
            _ = hangup.recv() => {
                notify.reloading();
                if !reloader.begin(&mut core, None) {
                    notify.ready(core.summary());
                }
                continue;
            }
            Some(read) = reloads.recv() => {
                reloader.finish(&mut core, read, &mut endpoints).await;
                notify.ready(core.summary());
                memory::return_free_blocks();
                follower.watch(core.known_next_hops());
                // The program may have been loaded again, with another ring, also by a reload that failed.
                trace = tracer(&mut core);
            }
            () = &mut slots => {
                let looked_after = core.look_after_slots();
                slots_rested = Instant::now();
                if let Err(error) = looked_after {
                    slots_rested += TRY_AGAIN;
                    error!(error = %format!("{:#}", anyhow::Error::from(error)), "tables and slots on the move are not up to date; trying again");
                }
                continue;
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
        match core.reconcile().and_then(|()| core.let_leavers_go()) {
            Ok(false) => {}
            Ok(true) => follower.watch(core.known_next_hops()),
            Err(error) => {
                let error = format!("{:#}", anyhow::Error::from(error));
                error!(%error, "the tables are not up to date; trying again with the next event");
            }
        }
    }
    notify.stopping();
    drop(endpoints);
    lock.set_len(0)?;
    info!("stopping; forwarding goes on with the tables as they are (`xlb detach` ends it)");
    Ok(())
}

/// Refuses maps that this host has no memory for, before any is made.
fn has_room(capacity: &Capacity, places: &config::Places) -> Result<(), NoRoom> {
    let available = Available::here();
    let fits = available.map_or(Ok(()), |available| available.check(capacity, possible_cpus(), places));
    fits.map_err(NoRoom)
}

/// There is nothing wrong with the file: with more memory, or at another time, it works.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct NoRoom(config::Problem);

/// The first tables. Nothing is forwarded yet, or by the tables of an earlier agent: time to ask before.
async fn begin(core: &mut Core, wanted: &Wanted, resolver: &Resolver) -> anyhow::Result<()> {
    let unknown = core.unknown(core.config());
    let addresses = core.to_resolve(core.config(), true);
    let hops = resolver.resolve_all(&addresses, FIRST_RESOLVE);
    let (found, first) = tokio::join!(hops, first_probes(unknown));
    core.on_first_look(found);
    for (key, probe) in &first {
        core.on_probe(Instant::now(), key, probe);
    }
    core.begin(wanted, resolver).await?;
    core.settle(resolver).await
}

/// A first start that fails leaves nothing; what an earlier agent left goes on.
async fn give_up(fs: &BpfFs, fresh: bool, resolver: &Resolver) {
    if !fresh {
        return;
    }
    if let Err(left) = bpf::detach(fs.clone(), &[]) {
        warn!(error = %left, "what this start has pinned is left; `xlb detach` removes it");
    }
    if let Err(left) = resolver.remove_link(own::HOST_END).await {
        warn!(error = %left, "the veth pair for backends on this host is left; `xlb detach` removes it");
    }
}

fn every(period: Duration) -> tokio::time::Interval {
    let mut interval = interval(period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

/// Never, where nothing is due.
async fn until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}

/// Handles what else has arrived, so that many events make one plan.
fn drain<T>(events: &mut mpsc::Receiver<T>, mut handle: impl FnMut(T)) {
    while let Ok(event) = events.try_recv() {
        handle(event);
    }
}

async fn look_after_interfaces(core: &mut Core, resolver: &Resolver) {
    if let Err(error) = core.check_interfaces(resolver).await {
        warn!(error = %format!("{error:#}"), "interfaces cannot be looked after; trying again");
    }
}

/// Answers at once, but for a reload, which takes its time.
async fn answer(
    core: &mut Core,
    request: Request,
    resolver: &Resolver,
) -> Option<oneshot::Sender<Result<Summary, Refused>>> {
    // An asker that has gone away needs no answer.
    match request {
        Request::Snapshot(reply) => _ = reply.send(core.snapshot(Instant::now())),
        Request::Lookup(question, reply) => _ = reply.send(core.lookup(&question)),
        Request::Verify(reply) => _ = reply.send(core.verification(resolver).await),
        Request::Compare(reply) => _ = reply.send(core.comparison(Instant::now())),
        Request::Command(command, reply) => _ = reply.send(core.command(&command)),
        Request::Flush(filter, reply) => _ = reply.send(core.flush(&filter)),
        Request::Reload(reply) => return Some(reply),
    }
    None
}

fn endpoint_error(error: EndpointError) -> anyhow::Error {
    match error {
        EndpointError::Config(problem) => config::Problems(vec![problem]).into(),
        EndpointError::Bind(_) => error.into(),
    }
}

/// The reader of decisions, where the configuration asks for them.
fn tracer(core: &mut Core) -> Option<Trace> {
    let refused = |error| warn!(error = %format!("{:#}", anyhow::Error::from(error)), "decisions cannot be traced; that takes CAP_SYS_ADMIN, too");
    core.trace()?.map_err(refused).ok()
}
