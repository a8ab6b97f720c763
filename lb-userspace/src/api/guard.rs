//! What holds for every request: who asks, how long it may take, how much it may send, and a log line that says so.

use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::http::{Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use tokio::net::UnixStream;
use tokio::time::timeout;
use tracing::{debug, info};

use super::diff::{self, DIFF};
use super::failure;
use super::resources::LOOKUP;

/// How long an answer may take to be made.
const DEADLINE: Duration = Duration::from_secs(10);

/// A reload asks new backends and waits for running probes; the client waits somewhat longer.
pub const RELOAD_DEADLINE: Duration = Duration::from_secs(60);

/// Characters of a resource in the log.
const LOGGED: usize = 100;

pub const BODY_BYTES: usize = 64 << 10;

/// How long a body may take to arrive.
const BODY_TIME: Duration = Duration::from_secs(5);

/// Who is at the other end of the unix socket, as the kernel says (SO_PEERCRED). Nobody is known over TCP.
#[derive(Debug, Clone, Copy)]
pub enum Peer {
    Process { pid: Option<i32>, uid: u32, gid: u32 },
    Unknown,
}

impl Peer {
    pub fn of_unix(stream: &UnixStream) -> Self {
        stream.peer_cred().map_or(Self::Unknown, |credentials| Self::Process {
            pid: credentials.pid(),
            uid: credentials.uid(),
            gid: credentials.gid(),
        })
    }
}

/// Bounds a request, and logs it: changes at `info`, reads at `debug`.
pub async fn guard(request: Request, next: Next) -> Response {
    let method = request.method().clone();
    let mut entry = Entry {
        peer: request.extensions().get::<Peer>().copied().unwrap_or(Peer::Unknown),
        resource: request.uri().path().chars().take(LOGGED).collect(),
        changes: !matches!(method, Method::GET | Method::HEAD | Method::OPTIONS)
            && ![LOOKUP, DIFF].contains(&request.uri().path()),
        method,
        result: None,
    };
    let deadline = if entry.changes { RELOAD_DEADLINE } else { DEADLINE };
    let answer = timeout(deadline, bounded(request, next)).await;
    let answer = answer.unwrap_or_else(|_| {
        let text = format!("not answered within {} s", deadline.as_secs());
        failure(StatusCode::GATEWAY_TIMEOUT, &text)
    });
    entry.result = Some(answer.status().as_u16());
    answer
}

/// The body is read here, so that no handler meets a slow or an endless one.
async fn bounded(request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let most = if parts.uri.path() == DIFF { diff::BODY_BYTES } else { BODY_BYTES };
    match timeout(BODY_TIME, to_bytes(body, most)).await {
        Ok(Ok(body)) => next.run(Request::from_parts(parts, Body::from(body))).await,
        // The limit is the only error that a client whose body comes whole can meet.
        Ok(Err(_)) => {
            let text = format!("the body is longer than {} KiB", most >> 10);
            failure(StatusCode::PAYLOAD_TOO_LARGE, &text)
        }
        Err(_) => {
            let text = format!("the body did not arrive within {} s", BODY_TIME.as_secs());
            failure(StatusCode::REQUEST_TIMEOUT, &text)
        }
    }
}

/// A line of the log, written when the request ends, also by a client that does not wait for its answer.
struct Entry {
    peer: Peer,
    method: Method,
    resource: String,
    changes: bool,
    result: Option<u16>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let Self { method, resource, result, .. } = self;
        let (pid, uid, gid) = match self.peer {
            Peer::Process { pid, uid, gid } => (pid, Some(uid), Some(gid)),
            Peer::Unknown => (None, None, None),
        };
        if self.changes {
            info!(uid, gid, pid, %method, resource, result, "API request");
        } else {
            debug!(uid, gid, pid, %method, resource, result, "API request");
        }
    }
}
