//! The resources of the API and their handlers. What they show comes from snapshots; only the core changes anything.

use axum::body::Bytes;
use axum::extract::{Query as UrlQuery, State};
use axum::http::{StatusCode, Uri, header};
use axum::middleware::from_fn;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use lb_common::abi::ABI_VERSION;
use lb_common::flow::HASH_VERSION;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

use super::connections::{CONNECTIONS, FLUSH};
use super::diff::{DIFF, diff};
use super::guard::guard;
use super::{LookupFrames, LookupParameters, MOST_FRAMES, Version, commands, connections, failure, metrics};
use crate::agent::snapshot::Snapshot;
use crate::agent::{Question, Refused, Request};
use crate::bpf::MapsError;
use crate::config::model::Protocol;
use crate::lookup::{Explanation, Given, Query, first_frame};
use crate::tables::maglev::TABLE_VERSION;

pub(super) type Core = mpsc::Sender<Request>;

/// Its `POST` changes nothing: frames are too long for a query.
pub(super) const LOOKUP: &str = "/v1/lookup";

const COMMANDS: [&str; 4] =
    ["/v1/backends/drain", "/v1/backends/disable", "/v1/backends/enable", "/v1/backends/weight"];

/// Everything, for the unix socket.
pub fn admin(core: Core) -> Router {
    let router = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/services", get(services))
        .route("/v1/backends", get(backends))
        .route("/v1/backends/{pool}/{backend}", get(commands::backend))
        .route("/v1/backends/drain", post(commands::drain))
        .route("/v1/backends/disable", post(commands::disable))
        .route("/v1/backends/enable", post(commands::enable))
        .route("/v1/backends/weight", post(commands::weight))
        .route(CONNECTIONS, get(connections::list))
        .route(FLUSH, post(connections::flush))
        .route("/v1/stats", get(stats))
        .route(LOOKUP, get(lookup).post(lookup_frames))
        .route("/v1/verify", get(verify))
        .route(DIFF, post(diff))
        .route("/v1/version", get(version))
        .route("/v1/reload", post(reload))
        .route("/metrics", get(metrics));
    let all = "/v1/status, services, backends, backends/POOL/NAME, backends/drain, disable, enable and weight, \
        connections, connections/flush, stats, lookup, verify, diff, version, reload, and /metrics";
    finish(router, all, core)
}

/// What anybody may read who reaches the port: metrics, and a page that names them.
pub fn public(core: Core) -> Router {
    let index = || async { "xlb: metrics are at /metrics\n" };
    finish(Router::new().route("/", get(index)).route("/metrics", get(metrics)), "/metrics", core)
}

fn finish(router: Router<Core>, all: &'static str, core: Core) -> Router {
    router
        .fallback(move |uri: Uri| async move { unknown(&uri, all) })
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn(guard))
        .with_state(core)
}

fn unknown(uri: &Uri, all: &str) -> Response {
    let path: String = uri.path().chars().take(100).collect();
    failure(StatusCode::NOT_FOUND, &format!("there is no {path}; there are {all}"))
}

async fn wrong_method(uri: Uri) -> Response {
    let use_instead = match uri.path() {
        "/v1/reload" => "POST",
        path if path == DIFF || path == FLUSH || COMMANDS.contains(&path) => "POST",
        LOOKUP => "GET or POST",
        _ => "GET",
    };
    failure(StatusCode::METHOD_NOT_ALLOWED, &format!("{} takes {use_instead}", uri.path()))
}

async fn status(State(core): State<Core>) -> Response {
    told(&core, |snapshot| snapshot.status()).await
}

async fn services(State(core): State<Core>) -> Response {
    told(&core, |snapshot| snapshot.services()).await
}

async fn backends(State(core): State<Core>) -> Response {
    told(&core, |snapshot| snapshot.backends()).await
}

async fn stats(State(core): State<Core>) -> Response {
    told(&core, |snapshot| snapshot.stats()).await
}

async fn metrics(State(core): State<Core>) -> Response {
    match from_snapshot(&core, metrics::text).await {
        Ok(text) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(response) => response,
    }
}

async fn version() -> Response {
    let version = env!("CARGO_PKG_VERSION").to_owned();
    Json(Version {
        version,
        abi_version: ABI_VERSION,
        hash_version: HASH_VERSION,
        table_version: TABLE_VERSION,
    })
    .into_response()
}

async fn verify(State(core): State<Core>) -> Response {
    match ask(&core, Request::Verify).await {
        None => gone(),
        Some(verification) => {
            let json = aside(move || Ok(serde_json::to_vec(&verification?.differences())?)).await;
            json.map_or_else(|error| error, json_body)
        }
    }
}

async fn reload(State(core): State<Core>) -> Response {
    match ask(&core, Request::Reload).await {
        None => failure(StatusCode::CONFLICT, "a later reload overtook this one, or the agent is stopping"),
        Some(Ok(summary)) => Json(summary).into_response(),
        Some(Err(refused)) => (refusal(&refused), Json(refused)).into_response(),
    }
}

/// Whether the file is wrong, or the host does not let it be.
fn refusal(refused: &Refused) -> StatusCode {
    if refused.problems.is_empty() { StatusCode::CONFLICT } else { StatusCode::UNPROCESSABLE_ENTITY }
}

async fn lookup(
    State(core): State<Core>,
    parameters: Result<UrlQuery<LookupParameters>, axum::extract::rejection::QueryRejection>,
) -> Response {
    let UrlQuery(parameters) = match parameters {
        Ok(parameters) => parameters,
        Err(error) => return failure(StatusCode::BAD_REQUEST, &error.body_text()),
    };
    let Some(protocol) = Protocol::ALL.iter().find(|p| p.as_str() == parameters.protocol).copied() else {
        return failure(StatusCode::BAD_REQUEST, "protocol is tcp or udp");
    };
    let query = Query { source: parameters.source, vip: parameters.vip, protocol };
    let frame = match first_frame(&query) {
        Ok(frame) => frame,
        Err(error) => return failure(StatusCode::BAD_REQUEST, &error),
    };
    let question = Question { frames: vec![frame], interface: parameters.interface };
    match explained(&core, question).await {
        Ok(told) => Json(told.into_iter().next()).into_response(),
        Err(response) => response,
    }
}

async fn lookup_frames(State(core): State<Core>, body: Bytes) -> Response {
    match given(&body) {
        Err(error) => failure(StatusCode::BAD_REQUEST, &error),
        Ok(question) => {
            let told = explained(&core, question).await;
            told.map_or_else(|error| error, |told| Json(told).into_response())
        }
    }
}

/// The question in the body of a request, whatever its type is said to be.
fn given(body: &[u8]) -> Result<Question, String> {
    let asked: LookupFrames = serde_json::from_slice(body)
        .map_err(|error| format!(r#"the body is not {{"frames": [{{"hex": "..."}}]}}: {error}"#))?;
    if asked.frames.is_empty() || asked.frames.len() > MOST_FRAMES {
        return Err(format!(
            "{} frames are not 1 to {MOST_FRAMES}; send others in other requests",
            asked.frames.len()
        ));
    }
    let frames = asked
        .frames
        .iter()
        .enumerate()
        .map(|(index, text)| Given::from_text(text).map_err(|error| format!("frames[{index}]: {error}")));
    Ok(Question { frames: frames.collect::<Result<_, _>>()?, interface: asked.interface })
}

async fn explained(core: &Core, question: Question) -> Result<Vec<Explanation>, Response> {
    let told = ask(core, |reply| Request::Lookup(question, reply)).await.ok_or_else(gone)?;
    told.map_err(|error| failure(StatusCode::BAD_REQUEST, &error))
}

/// What a snapshot says, as JSON.
async fn told<T: Serialize + Send + 'static>(
    core: &Core,
    tell: impl FnOnce(&Snapshot) -> Result<T, MapsError> + Send + 'static,
) -> Response {
    let json = from_snapshot(core, |snapshot| Ok(serde_json::to_vec(&tell(snapshot)?)?)).await;
    json.map_or_else(|error| error, json_body)
}

pub(super) fn json_body(json: Vec<u8>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], json).into_response()
}

pub(super) async fn from_snapshot<T: Send + 'static>(
    core: &Core,
    work: impl FnOnce(&Snapshot) -> anyhow::Result<T> + Send + 'static,
) -> Result<T, Response> {
    let snapshot = ask(core, Request::Snapshot).await.ok_or_else(gone)?;
    aside(move || work(&snapshot)).await
}

/// Works where it blocks nobody: counters are read by a system call each, and there may be many of everything.
pub(super) async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> Result<T, Response> {
    // A panic has told its own story on standard error.
    let worked = tokio::task::spawn_blocking(work).await;
    let worked = worked.unwrap_or_else(|_| Err(anyhow::anyhow!("the answer could not be made")));
    worked.map_err(|error| failure(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error:#}")))
}

pub(super) async fn ask<T>(core: &Core, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Option<T> {
    let (reply, answer) = oneshot::channel();
    core.send(request(reply)).await.ok()?;
    answer.await.ok()
}

pub(super) fn gone() -> Response {
    failure(StatusCode::SERVICE_UNAVAILABLE, "the agent is stopping")
}
