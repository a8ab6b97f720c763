//! Runs one periodic check per target and hands every outcome to a channel. It owns tasks, schedule and the cap
//! on concurrent probes; it must not know what an outcome means.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit, TryAcquireError, mpsc};
use tokio::task::AbortHandle;
use tokio::time::{Instant, MissedTickBehavior, interval_at};
use tracing::{debug, warn};

use super::probe::{Probe, probe};
use crate::config::model::{Check, CheckKind};

/// Probes in flight at once. Each holds one socket, and the usual limit is 1024 file descriptors.
pub const DEFAULT_CONCURRENCY: usize = 512;

/// First probes are spread over this time (or over one interval, if that is shorter).
const MAX_PHASE: Duration = Duration::from_secs(1);

/// Keeps one task per target. Dropping it ends all of them.
///
/// Only the monotonic clock is used: a jump of the wall clock changes nothing.
#[derive(Debug)]
pub struct Checker<K> {
    shared: Shared<K>,
    running: HashMap<K, Running>,
}

#[derive(Debug)]
struct Shared<K> {
    tx: mpsc::Sender<(K, Probe)>,
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

#[derive(Debug)]
struct Running {
    address: IpAddr,
    check: Check,
    task: AbortHandle,
}

impl Running {
    /// Whether this task already does what is asked for. Thresholds are no matter of the schedule, so that a
    /// change of `rise` or `fall` alone restarts nothing.
    fn serves(&self, address: IpAddr, check: &Check) -> bool {
        self.address == address
            && self.check.kind == check.kind
            && self.check.port == check.port
            && self.check.interval == check.interval
            && self.check.timeout == check.timeout
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
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

impl<K: Clone + Eq + Hash + Send + 'static> Checker<K> {
    /// Outcomes go to `tx`. While it is full, checks wait; once its receiver is gone, they end.
    pub fn new(tx: mpsc::Sender<(K, Probe)>) -> Checker<K> {
        Checker::with_concurrency(tx, DEFAULT_CONCURRENCY)
    }

    /// As [`Checker::new`], with at most `concurrency` probes in flight (1 or more).
    pub fn with_concurrency(tx: mpsc::Sender<(K, Probe)>, concurrency: usize) -> Checker<K> {
        let concurrency = concurrency.clamp(1, Semaphore::MAX_PERMITS);
        Checker {
            shared: Shared {
                tx,
                permits: Arc::new(Semaphore::new(concurrency)),
                concurrency,
                crowded: Arc::default(),
            },
            running: HashMap::new(),
        }
    }

    /// Makes the targets exactly these. A target whose address, kind, port, interval and timeout are unchanged
    /// keeps its task and its phase; others are ended or started. Of equal keys the last one counts.
    ///
    /// An outcome of an ended check may still be in the channel: a key that contains the address tells it apart.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn set(&mut self, targets: Vec<(K, IpAddr, Check)>) {
        let mut previous = std::mem::take(&mut self.running);
        let before = previous.len();
        let wanted: HashMap<K, (IpAddr, Check)> =
            targets.into_iter().map(|(key, address, check)| (key, (address, check))).collect();
        let mut kept = 0;
        for (key, (address, check)) in wanted {
            let running = match previous.remove(&key) {
                Some(running) if running.serves(address, &check) => {
                    kept += 1;
                    running
                }
                _ => self.start(key.clone(), address, check),
            };
            self.running.insert(key, running);
        }
        debug!(kept, started = self.running.len() - kept, ended = before - kept, "health checks set");
    }

    /// Targets that are checked.
    pub fn len(&self) -> usize {
        self.running.len()
    }

    pub fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    fn start(&self, key: K, address: IpAddr, check: Check) -> Running {
        let shared = self.shared.clone();
        let task = match check.kind {
            CheckKind::None => tokio::spawn(once(shared, key)),
            CheckKind::Tcp | CheckKind::Http { .. } => {
                let phase = random_phase(check.interval);
                let shape = Arc::new(check.clone());
                let prober = move || {
                    let check = shape.clone();
                    async move { probe(&check, address).await }
                };
                tokio::spawn(run(shared, key, phase, check.interval, prober))
            }
        };
        Running { address, check, task: task.abort_handle() }
    }
}

/// A target without a check is up by definition.
async fn once<K>(shared: Shared<K>, key: K) {
    let up = Probe { took: Duration::ZERO, result: Ok(()) };
    // An error means that nobody listens any more.
    let _ = shared.tx.send((key, up)).await;
}

/// Probes at `phase` and every `interval` from then on.
///
/// A period is counted from one start to the next, so that neither the probe's duration nor the phase lengthens it.
/// A probe that outlasts it is followed by the next at once, and nothing is made up for later.
async fn run<K, P, F>(shared: Shared<K>, key: K, phase: Duration, interval: Duration, mut prober: P)
where
    K: Clone,
    P: FnMut() -> F,
    F: Future<Output = Probe>,
{
    // tokio panics at a period of zero.
    let mut ticks = interval_at(Instant::now() + phase, interval.max(Duration::from_millis(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(permit) = shared.permit().await else {
            return;
        };
        let probe = prober().await;
        // A slow reader of outcomes must not hold up other targets' probes.
        drop(permit);
        if shared.tx.send((key.clone(), probe)).await.is_err() {
            return;
        }
    }
}

/// Spreads the first probes, so that a restart with a thousand backends is no burst.
fn random_phase(interval: Duration) -> Duration {
    // std seeds every RandomState differently, which is all the randomness that is needed.
    let random = RandomState::new().hash_one(());
    let unit = (random >> 11) as f64 / (1u64 << 53) as f64;
    interval.min(MAX_PHASE).mul_f64(unit)
}

#[cfg(test)]
mod tests;
