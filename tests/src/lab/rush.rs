//! As many short connections as the machine can open, each with one question: whether every one of them is served. It knows
//! no balancer.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::host::Host;
use super::live::{ask, connect};
use super::visits::VISIT_PATIENCE;

/// What became of them.
#[derive(Debug, Default)]
pub struct Rush {
    pub served: usize,
    /// Why not.
    pub failed: Vec<String>,
    pub took: Duration,
}

impl Rush {
    /// Opens `count` connections to a [`NamingServer`](super::NamingServer), so many at a time, from these addresses of a
    /// host by turns, and closes each after its answer.
    pub fn run(
        host: &Host,
        sources: &[IpAddr],
        server: SocketAddr,
        count: usize,
        parallel: usize,
    ) -> Result<Self> {
        ensure!(!sources.is_empty(), "no source address");
        let events = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let events = events.context("an event loop")?;
        host.inside(|| events.block_on(run(sources.into(), server, count, parallel)))
    }
}

async fn run(sources: Arc<[IpAddr]>, server: SocketAddr, count: usize, parallel: usize) -> Rush {
    let start = Instant::now();
    let next = Arc::<AtomicUsize>::default();
    let mut clients = JoinSet::new();
    for _ in 0..parallel {
        let (sources, next) = (Arc::clone(&sources), Arc::clone(&next));
        clients.spawn(async move {
            let mut rush = Rush::default();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return rush;
                }
                let visited = async {
                    let mut stream = connect(sources[number % sources.len()], server).await?;
                    ask(&mut stream, u64::MAX, number as u64).await
                };
                match timeout(VISIT_PATIENCE, visited).await {
                    Ok(Ok(_)) => rush.served += 1,
                    Ok(Err(error)) => rush.failed.push(error.to_string()),
                    Err(_) => rush.failed.push(format!("no answer within {VISIT_PATIENCE:?}")),
                }
            }
        });
    }
    let mut all = Rush::default();
    for rush in clients.join_all().await {
        all.served += rush.served;
        all.failed.extend(rush.failed);
    }
    Rush { took: start.elapsed(), ..all }
}
