//! `POST /v1/diff`: what another file would change. The file comes in the request, so that nobody has the agent read
//! what he may not.

use std::time::{Duration, Instant};

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::failure;
use super::resources::{Core, aside, ask, from_snapshot, gone, json_body};
use crate::agent::diff::rates;
use crate::agent::{Refused, Request};
use crate::config::{self, MAX_FILE_BYTES};

pub const DIFF: &str = "/v1/diff";

/// What a request for it may hold.
pub const BODY_BYTES: usize = MAX_FILE_BYTES as usize;

/// The name of the file in problems; the client knows another.
const NAMELESS: &str = "body";

/// The time between two readings of the counters.
const READINGS: Duration = Duration::from_secs(1);

pub async fn diff(State(core): State<Core>, body: Bytes) -> Response {
    let Ok(text) = String::from_utf8(body.into()) else {
        return failure(
            StatusCode::BAD_REQUEST,
            "the body is not UTF-8; send a configuration as it is in a file",
        );
    };
    let file = match aside(move || Ok(config::parse(NAMELESS, &text))).await {
        Ok(Ok(loaded)) => loaded,
        Ok(Err(problems)) => {
            return (StatusCode::UNPROCESSABLE_ENTITY, Json(Refused::from(problems))).into_response();
        }
        Err(response) => return response,
    };
    let begin = Instant::now();
    let earlier = match from_snapshot(&core, |snapshot| Ok(snapshot.backends()?)).await {
        Ok(backends) => backends,
        Err(response) => return response,
    };
    tokio::time::sleep(READINGS).await;
    let Some(comparison) = ask(&core, Request::Compare).await else { return gone() };
    let json = aside(move || {
        let rates = rates(&earlier, &comparison.statuses()?, begin.elapsed().as_secs_f64());
        Ok(serde_json::to_vec(&comparison.with(&file, &rates))?)
    });
    json.await.map_or_else(|error| error, json_body)
}
