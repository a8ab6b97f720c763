//! The resources by which operators take backends out of use and back, and give them weights. They read what is asked;
//! the core does it.

use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;

use super::resources::{Core, aside, ask, from_snapshot, gone, json_body};
use super::{BackendAsked, Commanded, DrainAsked, WeightAsked, failure};
use crate::agent::{Action, Command, CommandError, Done, Request, Timeout};
use crate::config;

/// How long flows may be given to end.
pub const LONGEST_TIMEOUT: Duration = Duration::from_secs(1000 * 3600);

pub const NEVER: &str = "never";

/// As `drain` takes it.
pub fn timeout(text: &str) -> Result<Timeout, String> {
    match text {
        NEVER => Ok(Timeout::Never),
        text => config::duration(text, Duration::ZERO..=LONGEST_TIMEOUT).map(Timeout::After),
    }
}

pub async fn drain(State(core): State<Core>, body: Bytes) -> Response {
    let command = read(&body, r#"{"backend": "web/web1", "timeout": "5m"}"#).and_then(|asked: DrainAsked| {
        let timeout = asked.timeout.map_or(Ok(Timeout::OfPool), |text| timeout(&text));
        let timeout = timeout.map_err(|error| format!("timeout: {error}"))?;
        Ok(Command { backend: asked.backend, action: Action::Drain(timeout) })
    });
    carry_out(&core, command).await
}

pub async fn disable(State(core): State<Core>, body: Bytes) -> Response {
    carry_out(&core, plain(&body, Action::Disable)).await
}

pub async fn enable(State(core): State<Core>, body: Bytes) -> Response {
    carry_out(&core, plain(&body, Action::Enable)).await
}

pub async fn weight(State(core): State<Core>, body: Bytes) -> Response {
    let command = read(&body, r#"{"backend": "web/web1", "weight": 50}"#).and_then(|asked: WeightAsked| {
        let weight = u8::try_from(asked.weight).ok().filter(|weight| *weight <= 100);
        let not_allowed = || format!("weight: {} is not allowed; use 0-100 (0 takes no flows)", asked.weight);
        let weight = weight.ok_or_else(not_allowed)?;
        Ok(Command { backend: asked.backend, action: Action::Weight(weight) })
    });
    carry_out(&core, command).await
}

/// One backend of those of `/v1/backends`.
pub async fn backend(State(core): State<Core>, Path((pool, name)): Path<(String, String)>) -> Response {
    let found = from_snapshot(&core, move |snapshot| match snapshot.place(&pool, &name) {
        Some(place) => Ok(serde_json::to_vec(&snapshot.backend(place)?)?),
        None => Ok(Vec::new()),
    });
    match found.await {
        Ok(json) if json.is_empty() => failure(StatusCode::NOT_FOUND, "there is no such backend"),
        Ok(json) => json_body(json),
        Err(response) => response,
    }
}

fn plain(body: &[u8], action: Action) -> Result<Command, String> {
    let asked: BackendAsked = read(body, r#"{"backend": "web/web1"}"#)?;
    Ok(Command { backend: asked.backend, action })
}

/// What is asked in the body of a request, whatever its type is said to be.
pub(super) fn read<T: DeserializeOwned>(body: &[u8], example: &str) -> Result<T, String> {
    serde_json::from_slice(body).map_err(|error| format!("the body is not like {example}: {error}"))
}

async fn carry_out(core: &Core, command: Result<Command, String>) -> Response {
    let command = match command {
        Ok(command) => command,
        Err(error) => return failure(StatusCode::BAD_REQUEST, &error),
    };
    match ask(core, |reply| Request::Command(command, reply)).await {
        None => gone(),
        Some(Ok(done)) => told(done).await,
        Some(Err(error)) => {
            let status = match error {
                CommandError::Unknown(_) => StatusCode::NOT_FOUND,
                CommandError::Refused(_) => StatusCode::CONFLICT,
                CommandError::NotKept(_) | CommandError::NotWritten(_) => StatusCode::INTERNAL_SERVER_ERROR,
            };
            failure(status, &format!("{:#}", anyhow::Error::from(error)))
        }
    }
}

async fn told(done: Done) -> Response {
    let Done { snapshot, place, said, warnings } = done;
    let backend = aside(move || Ok(snapshot.backend(place)?)).await;
    match backend {
        Ok(Some(backend)) => Json(Commanded { said, warnings, backend }).into_response(),
        Ok(None) => gone(),
        Err(response) => response,
    }
}
