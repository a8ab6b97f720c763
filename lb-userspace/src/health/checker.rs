//! Runs one periodic check per target and hands on what may change a verdict. It owns the targets and what is running
//! for them; it must not know what an outcome means.

mod agenda;
mod filter;

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Semaphore, SemaphorePermit, TryAcquireError, mpsc};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tracing::{debug, warn};

use self::agenda::Entry;
use self::filter::Filter;
use super::probe::{Closing, Inquiry, Probe};
use crate::config::model::Check;
use crate::descriptors;

/// Probes in flight at once, at the most: more than hang where ten thousand backends are silent, which are all asked for the
/// first time within a second.
const MOST_CONCURRENCY: usize = 16_384;

/// How many probes may be in flight at once. Each holds a file descriptor: a third of them is theirs, and with the first
/// probes of a reload two thirds.
pub fn concurrency() -> usize {
    concurrency_of(descriptors::limit())
}

fn concurrency_of(descriptors: usize) -> usize {
    (descriptors / 3).clamp(1, MOST_CONCURRENCY)
}

/// First probes are spread over this time (or over one interval, if that is shorter).
const MAX_PHASE: Duration = Duration::from_secs(1);

/// What is to be checked.
#[derive(Debug, Clone)]
pub struct Target<K> {
    pub key: K,
    pub address: IpAddr,
    pub check: Check,
    /// How long each probe takes counts, and not its verdict alone.
    pub timed: bool,
}

/// A probe that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome<K> {
    pub key: K,
    pub at: std::time::Instant,
    pub probe: Probe,
}

/// Keeps the targets. Dropping it ends all checks.
///
/// Only the monotonic clock is used: a jump of the wall clock changes nothing.
#[derive(Debug)]
pub struct Checker<K> {
    agenda: mpsc::UnboundedSender<Vec<Entry<K, Inquiry>>>,
    running: HashMap<K, Running<K>>,
    turns: Turns,
}

#[derive(Debug)]
struct Shared<K> {
    tx: mpsc::Sender<Outcome<K>>,
    permits: Arc<Semaphore>,
    concurrency: usize,
    /// Probes wait for a permit; it was warned about.
    crowded: Arc<AtomicBool>,
}

// Derived, it would ask for K: Clone where none is cloned.
impl<K> Clone for Shared<K> {
    fn clone(&self) -> Self {
        Shared {
            tx: self.tx.clone(),
            permits: self.permits.clone(),
            concurrency: self.concurrency,
            crowded: self.crowded.clone(),
        }
    }
}

/// How a target is asked.
trait Ask: Send + Sync + 'static {
    fn ask(&self) -> impl Future<Output = (Probe, Option<Closing>)> + Send;
}

impl Ask for Inquiry {
    fn ask(&self) -> impl Future<Output = (Probe, Option<Closing>)> + Send {
        Inquiry::ask(self)
    }
}

/// One target, as those know it who ask.
#[derive(Debug)]
struct Course<K, A> {
    key: K,
    interval: Duration,
    inquiry: A,
    now: Mutex<Now>,
}

#[derive(Debug)]
struct Now {
    filter: Filter,
    /// How long the last probe that was answered took.
    took: Option<Duration>,
    /// Being asked.
    task: Option<AbortHandle>,
    /// The next probe is due while this one still runs.
    late: bool,
    ended: bool,
}

#[derive(Debug)]
struct Running<K> {
    address: IpAddr,
    check: Check,
    /// `None` without a check.
    course: Option<Arc<Course<K, Inquiry>>>,
}

impl<K> Running<K> {
    /// Whether this already does what is asked for. Thresholds are no matter of the schedule, so that a change of `rise`
    /// or `fall` alone restarts nothing.
    fn serves(&self, address: IpAddr, check: &Check) -> bool {
        self.address == address
            && self.check.kind == check.kind
            && self.check.port == check.port
            && self.check.interval == check.interval
            && self.check.timeout == check.timeout
    }
}

impl<K> Drop for Running<K> {
    fn drop(&mut self) {
        if let Some(course) = &self.course {
            let mut now = course.now();
            now.ended = true;
            if let Some(task) = now.task.take() {
                task.abort();
            }
        }
    }
}

impl<K, A> Course<K, A> {
    fn new(key: K, interval: Duration, inquiry: A, filter: Filter) -> Arc<Self> {
        let now = Now { filter, took: None, task: None, late: false, ended: false };
        // Nothing is asked without a pause.
        let interval = interval.max(Duration::from_millis(1));
        Arc::new(Self { key, interval, inquiry, now: Mutex::new(now) })
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        // No holder leaves it half changed.
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Clone + Send + Sync + 'static, A: Ask> Course<K, A> {
    /// Asks now, or as soon as the probe that is running ends. Returns whether it is to be asked again.
    fn begin(self: &Arc<Self>, shared: &Shared<K>) -> bool {
        let mut now = self.now();
        if now.ended {
            return false;
        }
        if now.task.as_ref().is_some_and(|task| !task.is_finished()) {
            now.late = true;
        } else {
            now.task = Some(tokio::spawn(Arc::clone(self).run(shared.clone())).abort_handle());
        }
        true
    }

    async fn run(self: Arc<Self>, shared: Shared<K>) {
        loop {
            let Some(permit) = shared.permit().await else { return };
            let (probe, closing) = self.inquiry.ask().await;
            let unsent = self.heard(probe).and_then(|outcome| shared.tx.try_send(outcome).err());
            if let Some(closing) = closing {
                closing.close().await;
            }
            // A slow reader of outcomes must not hold up other targets' probes.
            drop(permit);
            let gone = match unsent {
                None => false,
                Some(TrySendError::Full(outcome)) => shared.tx.send(outcome).await.is_err(),
                Some(TrySendError::Closed(_)) => true,
            };
            if gone {
                return;
            }
            let mut now = self.now();
            if !std::mem::take(&mut now.late) {
                now.task = None;
                return;
            }
        }
    }

    /// What is to be handed on of it.
    fn heard(&self, probe: Probe) -> Option<Outcome<K>> {
        let mut now = self.now();
        if probe.result.is_ok() {
            now.took = Some(probe.took);
        }
        (!now.ended && now.filter.hands_on(&probe.result)).then(|| Outcome {
            key: self.key.clone(),
            at: std::time::Instant::now(),
            probe,
        })
    }
}

impl<K> Shared<K> {
    /// `None` once no more probes are to run.
    async fn permit(&self) -> Option<SemaphorePermit<'_>> {
        match self.permits.try_acquire() {
            Ok(permit) => {
                // Not at the first free permit: near the cap that would warn again with every probe.
                if self.permits.available_permits() > self.concurrency / 2 {
                    self.crowded.store(false, Ordering::Relaxed);
                }
                Some(permit)
            }
            Err(TryAcquireError::NoPermits) => {
                if !self.crowded.swap(true, Ordering::Relaxed) {
                    let cap = self.concurrency;
                    warn!(cap, "health checks run late: as many probes hang as may run");
                }
                self.permits.acquire().await.ok()
            }
            Err(TryAcquireError::Closed) => None,
        }
    }
}

impl<K: Clone + Eq + Hash + Send + Sync + 'static> Checker<K> {
    /// Checks on a thread of their own: however many are due, nobody else waits for them. Outcomes go to `tx`. While it is
    /// full, checks wait; once its receiver is gone, they end.
    pub fn on_own_thread(tx: mpsc::Sender<Outcome<K>>) -> io::Result<Checker<K>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (checker, agenda) = Checker::with_concurrency(tx, concurrency());
        let work = move || runtime.block_on(agenda);
        std::thread::Builder::new().name("xlb-checks".to_owned()).spawn(work)?;
        Ok(checker)
    }

    /// With at most `concurrency` probes in flight (1 or more). The future does the work, until the checker is dropped.
    fn with_concurrency(
        tx: mpsc::Sender<Outcome<K>>,
        concurrency: usize,
    ) -> (Checker<K>, impl Future<Output = ()> + Send + 'static) {
        let shared = Shared::new(tx, concurrency);
        let (agenda, entries) = mpsc::unbounded_channel();
        let work = agenda::run(shared, entries);
        (Checker { agenda, running: HashMap::new(), turns: Turns::new() }, work)
    }

    /// Makes the targets exactly these. A target whose address, kind, port, interval and timeout are unchanged keeps its
    /// phase; others are ended or started. Of equal keys the last one counts.
    ///
    /// What the reader knows of a target may be other than what it was told: so much is handed on again as decides alone.
    ///
    /// An outcome of an ended check may still be in the channel: a key that contains the address tells it apart.
    pub fn set(&mut self, targets: Vec<Target<K>>) {
        let mut previous = std::mem::take(&mut self.running);
        let before = previous.len();
        let wanted: HashMap<K, Target<K>> =
            targets.into_iter().map(|target| (target.key.clone(), target)).collect();
        let (mut kept, mut entries) = (0, Vec::new());
        for (key, target) in wanted {
            let running = match previous.remove(&key) {
                Some(running) if running.serves(target.address, &target.check) => {
                    kept += 1;
                    if let Some(course) = &running.course {
                        course.now().filter = Filter::new(&target.check, target.timed);
                    }
                    running
                }
                _ => self.start(target, &mut entries),
            };
            self.running.insert(key, running);
        }
        // Before the agenda looks for those that ended.
        drop(previous);
        // One that ends has taken the checks with it.
        let _ = self.agenda.send(entries);
        debug!(kept, started = self.running.len() - kept, ended = before - kept, "health checks set");
    }

    /// How long the last probe of a target took that was answered.
    pub fn took(&self, key: &K) -> Option<Duration> {
        self.running.get(key)?.course.as_ref()?.now().took
    }

    /// Targets that are checked.
    pub fn len(&self) -> usize {
        self.running.len()
    }

    pub fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    fn start(&mut self, target: Target<K>, entries: &mut Vec<Entry<K, Inquiry>>) -> Running<K> {
        let Target { key, address, check, timed } = target;
        let course = Inquiry::new(&check, address)
            .map(|inquiry| Course::new(key.clone(), check.interval, inquiry, Filter::new(&check, timed)));
        let entry = match &course {
            Some(course) => Entry::first(Instant::now(), self.turns.next(), Arc::clone(course)),
            None => Entry::Unchecked(key),
        };
        entries.push(entry);
        Running { address, check, course }
    }
}

impl<K> Shared<K> {
    fn new(tx: mpsc::Sender<Outcome<K>>, concurrency: usize) -> Self {
        let concurrency = concurrency.clamp(1, Semaphore::MAX_PERMITS);
        let permits = Arc::new(Semaphore::new(concurrency));
        Shared { tx, permits, concurrency, crowded: Arc::default() }
    }
}

/// Parts of an interval, one for each check: however many there are, they lie evenly over it.
#[derive(Debug)]
struct Turns {
    last: f64,
}

impl Turns {
    /// Balancers of a group begin elsewhere, so that they do not ask a backend at the same time.
    fn new() -> Self {
        // std seeds every RandomState differently, which is all the randomness that is needed.
        let random = RandomState::new().hash_one(());
        Self { last: (random >> 11) as f64 / (1u64 << 53) as f64 }
    }

    /// From 0 to below 1.
    fn next(&mut self) -> f64 {
        // Multiples of the golden section lie further apart than those of any other number.
        self.last = (self.last + 0.618_033_988_749_894_9).fract();
        self.last
    }
}

#[cfg(test)]
mod tests;
