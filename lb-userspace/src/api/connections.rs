//! Connections on the API: listed as a stream of lines, which is made while it leaves and so takes no more memory for a million
//! of them than for one, and flushed.

use std::io::Write;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query as UrlQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::commands::read;
use super::failure;
use super::resources::{Core, ask, gone};
use super::serve::Streamed;
use crate::agent::Request;
use crate::agent::connections::{ConnectionState, Filter, Listing};

pub const CONNECTIONS: &str = "/v1/connections";
pub const FLUSH: &str = "/v1/connections/flush";

const CONTENT_TYPE: &str = "application/x-ndjson";

/// Bytes that are made at a time.
const PART: usize = 64 << 10;

/// A person may read page by page.
const STALL: Duration = Duration::from_secs(600);

/// Listings at a time: those that wait for their readers leave room for other requests.
static LISTINGS: Semaphore = Semaphore::const_new(8);

/// Parameters of `GET /v1/connections`. The answer is a line of JSON for each connection.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConnectionsAsked {
    pub service: Option<String>,
    /// `POOL/NAME` or `POOL/ADDRESS`.
    pub backend: Option<String>,
    /// An address or a prefix.
    pub client: Option<IpNetwork>,
    pub state: Option<ConnectionState>,
    /// No more than so many.
    pub limit: Option<u64>,
}

/// `POST /v1/connections/flush`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlushAsked {
    #[serde(default)]
    pub filter: Filter,
    /// All of them: where the filter is empty, this must be said.
    #[serde(default)]
    pub all: bool,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Flushed {
    pub flushed: u64,
}

pub async fn list(
    State(core): State<Core>,
    asked: Result<UrlQuery<ConnectionsAsked>, QueryRejection>,
) -> Response {
    let UrlQuery(ConnectionsAsked { service, backend, client, state, limit }) = match asked {
        Ok(asked) => asked,
        Err(error) => return failure(StatusCode::BAD_REQUEST, &error.body_text()),
    };
    let Ok(permit) = LISTINGS.try_acquire() else {
        let text = "too many listings are read at a time; end one, or try again";
        return failure(StatusCode::SERVICE_UNAVAILABLE, text);
    };
    let Some(snapshot) = ask(&core, Request::Snapshot).await else { return gone() };
    let filter = Filter { service, backend, client, state };
    let (index, config) = (&snapshot.index, Some(&*snapshot.config));
    match Listing::new(snapshot.places, index, config, &filter, limit) {
        Ok(listing) => streamed(listing, permit),
        Err(error) => failure(StatusCode::BAD_REQUEST, &error),
    }
}

fn streamed(listing: Listing, permit: SemaphorePermit<'static>) -> Response {
    let parts = stream::unfold(Some((listing, permit)), |state| async {
        let (listing, permit) = state?;
        match tokio::task::spawn_blocking(|| part(listing)).await {
            Ok((lines, _)) if lines.is_empty() => None,
            Ok((lines, listing)) => Some((Ok(Bytes::from(lines)), Some((listing, permit)))),
            // The answer breaks off, which is no end of it.
            Err(panicked) => Some((Err(panicked), None)),
        }
    });
    let mut response = ([(header::CONTENT_TYPE, CONTENT_TYPE)], Body::from_stream(parts)).into_response();
    response.extensions_mut().insert(Streamed(STALL));
    response
}

/// The next lines; none at the end.
fn part(mut listing: Listing) -> (Vec<u8>, Listing) {
    let mut lines = Vec::with_capacity(PART + PART / 4);
    for connection in &mut listing {
        // Writing into memory does not fail.
        _ = serde_json::to_writer(&mut lines, &connection);
        _ = lines.write_all(b"\n");
        if lines.len() >= PART {
            break;
        }
    }
    (lines, listing)
}

pub async fn flush(State(core): State<Core>, body: Bytes) -> Response {
    let asked: FlushAsked = match read(&body, r#"{"filter": {"service": "www"}} or {"all": true}"#) {
        Ok(asked) => asked,
        Err(error) => return failure(StatusCode::BAD_REQUEST, &error),
    };
    if asked.filter.is_empty() != asked.all {
        let text = "say which connections go: a filter, or \"all\": true without one";
        return failure(StatusCode::BAD_REQUEST, text);
    }
    match ask(&core, |reply| Request::Flush(asked.filter, reply)).await {
        None => gone(),
        Some(Ok(flushed)) => Json(Flushed { flushed }).into_response(),
        Some(Err(error)) => failure(StatusCode::BAD_REQUEST, &error),
    }
}
