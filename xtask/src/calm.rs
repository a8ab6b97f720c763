//! Whether something else runs on the machine while a bench measures. Knows no bench.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// The share of the machine that others may take; what was measured beside more is worth little.
pub const MOST_BY_OTHERS: f64 = 0.1;

/// Looks, and waits for others to end, as long as there is patience left. The share that they take then.
pub fn wait(patience: &mut Duration) -> Result<f64> {
    const LOOK: Duration = Duration::from_millis(100);
    loop {
        let (begin, before) = (Instant::now(), busy()?);
        thread::sleep(LOOK);
        let share = share(busy()?.saturating_sub(before), begin.elapsed())?;
        if share <= MOST_BY_OTHERS || patience.is_zero() {
            return Ok(share);
        }
        *patience = patience.saturating_sub(begin.elapsed());
    }
}

/// Of all CPUs.
fn share(busy: Duration, elapsed: Duration) -> Result<f64> {
    Ok(busy.as_secs_f64() / elapsed.as_secs_f64() / thread::available_parallelism()?.get() as f64)
}

/// What runs beside threads that are never idle and have a CPU each.
pub struct Beside {
    begin: Instant,
    busy: Duration,
}

impl Beside {
    pub fn begin() -> Result<Self> {
        Ok(Self { begin: Instant::now(), busy: busy()? })
    }

    /// The share of the machine that others had since, beside so many threads, and from them: `waited` in all.
    pub fn end(self, threads: u32, waited: Duration) -> Result<f64> {
        let elapsed = self.begin.elapsed();
        let others = (busy()?.saturating_sub(self.busy) + waited).saturating_sub(elapsed * threads);
        share(others, elapsed)
    }
}

/// How long the calling thread has been ready and not running. Kernels can be built without telling it.
pub fn waited() -> Duration {
    let told = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    waited_of(&told).unwrap_or_default()
}

/// Nanoseconds on a CPU, nanoseconds in front of one, how often.
fn waited_of(told: &str) -> Option<Duration> {
    told.split_whitespace().nth(1)?.parse().ok().map(Duration::from_nanos)
}

/// How long the machine's CPUs have not been idle.
pub fn busy() -> Result<Duration> {
    let stat = std::fs::read_to_string("/proc/stat").context("/proc/stat")?;
    busy_of(&stat).context("/proc/stat has no line for all CPUs")
}

/// A tick of /proc/stat is 10 ms wherever Linux runs (USER_HZ).
fn busy_of(stat: &str) -> Option<Duration> {
    let fields: Vec<u64> =
        stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace().flat_map(str::parse).collect();
    // user nice system idle iowait irq softirq steal
    let ticks: u64 = [0, 1, 2, 5, 6].into_iter().map(|field| fields.get(field).copied().unwrap_or(0)).sum();
    Some(Duration::from_millis(ticks * 10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_waiting_and_stolen_time_is_not_busy() {
        assert_eq!(busy_of("cpu  1 2 3 1000 500 4 5 900 0 0\ncpu0 1\n"), Some(Duration::from_millis(150)));
    }

    #[test]
    fn a_thread_waits_when_it_is_ready_and_another_runs() {
        assert_eq!(waited_of("700 42 3\n"), Some(Duration::from_nanos(42)));
        assert_eq!(waited_of(""), None);
    }
}
