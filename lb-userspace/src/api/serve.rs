//! Serves HTTP to clients that may be slow, stuck or hostile, within limits. Knows no resource.
//!
//! One request for each connection. A connection is waiting until its request has come, then at work, then writing,
//! and each of these ends in bounded time. While all places are taken, connections that wait for their request make
//! room for those that come after them; what does not fit waits in the backlog.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::serve::Listener;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::time::{Instant, sleep};
use tower::ServiceExt;

use super::Peer;

/// Connections at a time, on each listener.
const CONNECTIONS: usize = 64;

/// How long a request may take to arrive, but for its body.
const HEADER_TIME: Duration = Duration::from_secs(5);

const HEADER_BYTES: usize = 16 << 10;

/// How long an answer may take to leave.
const WRITE_TIME: Duration = Duration::from_secs(10);

/// A connection that has said nothing for this long gives way to others.
const COURTESY: Duration = Duration::from_millis(100);

/// Answers until the task is aborted; what is being answered then is answered.
pub async fn serve<L: Listener>(mut listener: L, router: Router, peer: fn(&L::Io) -> Peer) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let waiting = Arc::new(Waiting::default());
    loop {
        let (io, _) = listener.accept().await;
        let place = place(&places, &waiting).await;
        let peer = peer(&io);
        tokio::spawn(connection(io, peer, router.clone(), Arc::clone(&waiting), place));
    }
}

/// A place for one more connection, taken from the one that waits longest if there is no other.
async fn place(places: &Arc<Semaphore>, waiting: &Waiting) -> Option<OwnedSemaphorePermit> {
    loop {
        if let Ok(place) = Arc::clone(places).try_acquire_owned() {
            return Some(place);
        }
        waiting.end_longest(COURTESY);
        tokio::select! {
            // The semaphore is never closed.
            place = Arc::clone(places).acquire_owned() => return place.ok(),
            () = sleep(COURTESY) => {}
        }
    }
}

async fn connection<I>(
    io: I,
    peer: Peer,
    router: Router,
    waiting: Arc<Waiting>,
    _place: Option<OwnedSemaphorePermit>,
) where
    I: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (number, evicted) = waiting.enter();
    let (answered, mut writing) = watch::channel(false);
    let service = service_fn(|mut request: Request<Incoming>| {
        waiting.leave(number);
        request.extensions_mut().insert(peer);
        let (answer, answered) = (router.clone().oneshot(request), &answered);
        async move {
            let answer = answer.await;
            answered.send_replace(true);
            Ok::<_, Infallible>(answer.unwrap_or_else(|never| match never {}))
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME)
        .max_header_size(HEADER_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(io), service);
    let written_too_slowly = async {
        // An error is the end of the service, and with it of the connection.
        if writing.wait_for(|answered| *answered).await.is_ok() {
            sleep(WRITE_TIME).await;
        }
    };
    let given_up = async {
        if evicted.await.is_err() {
            std::future::pending().await
        }
    };
    tokio::select! {
        // Whatever a client does wrong is its own affair.
        _ = connection => {}
        () = written_too_slowly => {}
        () = given_up => {}
    }
    waiting.leave(number);
}

/// Connections whose request has not come.
#[derive(Default)]
struct Waiting(Mutex<Line>);

/// The oldest first.
#[derive(Default)]
struct Line {
    next: u64,
    waiters: BTreeMap<u64, Waiter>,
}

struct Waiter {
    since: Instant,
    /// Tells the connection to end.
    end: oneshot::Sender<()>,
}

impl Waiting {
    fn line(&self) -> MutexGuard<'_, Line> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self) -> (u64, oneshot::Receiver<()>) {
        let (end, ended) = oneshot::channel();
        let mut line = self.line();
        line.next += 1;
        let number = line.next;
        line.waiters.insert(number, Waiter { since: Instant::now(), end });
        (number, ended)
    }

    /// Its request has come, or it has gone.
    fn leave(&self, number: u64) {
        self.line().waiters.remove(&number);
    }

    fn end_longest(&self, at_least: Duration) {
        if let Some(longest) = self.line().waiters.first_entry()
            && longest.get().since.elapsed() >= at_least
        {
            // It may be ending by itself.
            _ = longest.remove().end.send(());
        }
    }
}
