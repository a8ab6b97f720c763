//! A stream of short connections, each with one question: where new clients are sent, and whether they are served.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::host::Host;
use super::live::{Loop, ask, connect};
use super::lock_ignoring_poison;

/// A visit that takes longer has failed: time for two SYNs that are lost.
pub const VISIT_PATIENCE: Duration = Duration::from_secs(4);

/// One short connection.
#[derive(Clone, Debug)]
pub struct Visit {
    pub start: Instant,
    pub took: Duration,
    /// Who answered, or why nobody did.
    pub server: std::result::Result<String, String>,
}

/// Short connections that go on until this is dropped, or `most` were made.
pub struct Visits {
    done: Arc<Mutex<Vec<Visit>>>,
    _events: Loop,
}

impl Visits {
    pub fn start(
        host: &Host,
        sources: &[IpAddr],
        server: SocketAddr,
        every: Duration,
        most: usize,
    ) -> Result<Self> {
        ensure!(!sources.is_empty(), "no source address");
        let done = Arc::<Mutex<Vec<Visit>>>::default();
        let work = visit_on(sources.to_vec(), server, every, most, Arc::clone(&done));
        Ok(Self { done, _events: Loop::start(host, work)? })
    }

    /// Those that ended until now and started in a window.
    pub fn between(&self, begin: Instant, end: Instant) -> Vec<Visit> {
        let done = lock_ignoring_poison(&self.done);
        done.iter().filter(|visit| (begin..end).contains(&visit.start)).cloned().collect()
    }

    /// How many were served by whom, and those that failed.
    pub fn shares(visits: &[Visit]) -> (BTreeMap<&str, usize>, Vec<&Visit>) {
        let mut shares = BTreeMap::new();
        for server in visits.iter().filter_map(|visit| visit.server.as_deref().ok()) {
            *shares.entry(server).or_default() += 1;
        }
        (shares, visits.iter().filter(|visit| visit.server.is_err()).collect())
    }
}

async fn visit_on(
    sources: Vec<IpAddr>,
    server: SocketAddr,
    every: Duration,
    most: usize,
    done: Arc<Mutex<Vec<Visit>>>,
) {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut visits = JoinSet::new();
    for number in 0..most {
        ticks.tick().await;
        let (source, done) = (sources[number % sources.len()], Arc::clone(&done));
        visits.spawn(async move {
            let start = Instant::now();
            let visited = async {
                let mut stream = connect(source, server).await?;
                ask(&mut stream, u64::MAX, number as u64).await
            };
            let server = match timeout(VISIT_PATIENCE, visited).await {
                Ok(answer) => answer.map_err(|error| error.to_string()),
                Err(_) => Err(format!("no answer within {VISIT_PATIENCE:?}")),
            };
            lock_ignoring_poison(&done).push(Visit { start, took: start.elapsed(), server });
        });
        while visits.try_join_next().is_some() {}
    }
    visits.join_all().await;
}
