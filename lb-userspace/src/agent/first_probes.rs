//! Asks backends once whose health is not known, before tables are made. Knows no core.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::time::{Instant, sleep_until, timeout};

use super::core::BackendKey;
use crate::config::model::{Check, CheckKind};
use crate::health::{Probe, checker, probe};

/// How long a backend may take to answer before tables are made without it.
const FIRST_PROBE: Duration = Duration::from_secs(1);

/// So many are asked at once, and each of the others so much after the one before: no burst that a network would lose.
const AT_ONCE: u32 = 512;
const PACE: Duration = Duration::from_micros(50);

/// Asks all of them, so that a table is not made before they could answer. One that does not answer in time is asked again by
/// its checks.
pub async fn first_probes(unknown: Vec<(BackendKey, Check)>) -> Vec<(BackendKey, Probe)> {
    let checked = unknown.into_iter().filter(|(_, check)| check.kind != CheckKind::None);
    let probes = checked.map(|(key, check)| async move {
        let probe = timeout(FIRST_PROBE, probe(&check, key.address)).await.ok()?;
        Some((key, probe))
    });
    paced(probes, checker::concurrency()).await.into_iter().flatten().collect()
}

/// Has all of it done, with so much of it going on at once.
async fn paced<F: Future>(all: impl Iterator<Item = F>, concurrency: usize) -> Vec<F::Output> {
    let begin = Instant::now();
    let all = (0u32..).zip(all).map(|(turn, work)| async move {
        if let Some(later @ 1..) = turn.checked_sub(AT_ONCE) {
            sleep_until(begin + PACE * later).await;
        }
        work.await
    });
    stream::iter(all).buffer_unordered(concurrency).collect().await
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn ten_thousand_backends_that_do_not_answer_are_given_up_within_seconds() {
        let begin = Instant::now();
        let (asked, in_flight, most) = (Cell::new(0), Cell::new(0), Cell::new(0));
        let silent = (0..10_000).map(|_| async {
            asked.set(asked.get() + 1);
            in_flight.set(in_flight.get() + 1);
            most.set(most.get().max(in_flight.get()));
            // In 10 ms, 200 others, and as many as at first.
            let due = AT_ONCE as f64 + begin.elapsed().as_secs_f64() / PACE.as_secs_f64();
            assert!(f64::from(asked.get()) <= due + 100.0, "{} after {:?}", asked.get(), begin.elapsed());
            tokio::time::sleep(FIRST_PROBE).await;
            in_flight.set(in_flight.get() - 1);
        });
        assert_eq!(paced(silent, 16_384).await.len(), 10_000);
        assert!(begin.elapsed() <= FIRST_PROBE + Duration::from_millis(600), "{:?}", begin.elapsed());
        assert!(most.get() > 9000, "{}", most.get());
    }
}
