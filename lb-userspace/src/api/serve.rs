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
use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use axum::serve::Listener;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tower::ServiceExt;

use super::Peer;

/// Connections at a time, on each listener.
const CONNECTIONS: usize = 64;

/// How long a request may take to arrive, but for its body.
const HEADER_TIME: Duration = Duration::from_secs(5);

const HEADER_BYTES: usize = 16 << 10;

/// How long an answer may take to leave, but for those that are [`Streamed`].
const WRITE_TIME: Duration = Duration::from_secs(10);

/// Of an answer that is made while it leaves, part by part: how long its client may take no part. Put into its extensions.
#[derive(Debug, Clone, Copy)]
pub struct Streamed(pub Duration);

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
    let (answered, writing) = watch::channel(None);
    let service = service_fn(|mut request: Request<Incoming>| {
        waiting.leave(number);
        request.extensions_mut().insert(peer);
        let (answer, answered) = (router.clone().oneshot(request), answered.clone());
        async move {
            let answer = answer.await.unwrap_or_else(|never| match never {});
            Ok::<_, Infallible>(watched(answer, answered))
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME)
        .max_header_size(HEADER_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(io), service);
    let given_up = async {
        if evicted.await.is_err() {
            std::future::pending().await
        }
    };
    tokio::select! {
        // Whatever a client does wrong is its own affair.
        _ = connection => {}
        () = too_slow(writing) => {}
        () = given_up => {}
    }
    waiting.leave(number);
}

/// When something of an answer last went to be written, and how long that may take.
type Written = Option<(Instant, Duration)>;

/// An answer that says when it, or a part of it, goes to be written.
fn watched(mut answer: Response, written: watch::Sender<Written>) -> Response {
    let streamed = answer.extensions_mut().remove();
    let limit = streamed.map_or(WRITE_TIME, |Streamed(limit)| limit);
    written.send_replace(Some((Instant::now(), limit)));
    if streamed.is_none() {
        return answer;
    }
    answer.map(|body| {
        Body::new(body.map_frame(move |frame| {
            written.send_replace(Some((Instant::now(), limit)));
            frame
        }))
    })
}

/// Ends when an answer, or a part of it, takes too long to leave.
async fn too_slow(mut writing: watch::Receiver<Written>) {
    loop {
        let written = *writing.borrow_and_update();
        let limit = async {
            match written {
                Some((at, limit)) => sleep_until(at + limit).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // An error is the end of the service, and with it of the connection.
            changed = writing.changed() => if changed.is_err() { return },
            () = limit => return,
        }
    }
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
