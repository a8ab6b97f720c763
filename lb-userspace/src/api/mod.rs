//! The admin API: HTTP/JSON on a unix socket. Every command that asks a running agent is a client of it.

mod client;

use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use axum::extract::{Query as UrlQuery, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};

use crate::agent::Request;
use crate::config::model::Protocol;
use crate::lookup::Query;
use crate::owned;

pub use client::{Client, ClientError};

/// The socket's name in the run directory.
pub const SOCKET: &str = "xlb.sock";

/// Takes the socket away at the end. What is left of it is no harm: the next agent binds over it.
pub fn remove_socket(run_dir: &Path) {
    _ = std::fs::remove_file(run_dir.join(SOCKET));
}

/// An error as the API tells it.
#[derive(Debug, Serialize, Deserialize)]
pub struct ApiError {
    pub error: String,
}

/// Parameters of `GET /v1/lookup`.
#[derive(Debug, Serialize, Deserialize)]
pub struct LookupParameters {
    pub source: SocketAddr,
    pub vip: SocketAddr,
    /// `tcp` or `udp`.
    pub protocol: String,
}

/// The bound socket, readable and writable for its owner and group.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    /// Binds, over what an agent that died has left. The caller holds the lock that says there is no other.
    pub fn bind(path: &Path) -> anyhow::Result<Self> {
        match std::fs::symlink_metadata(path) {
            Ok(left) if left.file_type().is_socket() && left.uid() == owned::us() => {
                std::fs::remove_file(path)?
            }
            Ok(_) => bail!(
                "{} is in the way of the API socket and is no socket of ours; remove it",
                path.display()
            ),
            Err(_) => {}
        }
        let listener = UnixListener::bind(path).with_context(|| format!("{}", path.display()))?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Answers until the process ends.
    pub async fn serve(self, core: mpsc::Sender<Request>) {
        let router = Router::new()
            .route("/v1/status", get(status))
            .route("/v1/lookup", get(lookup))
            .fallback(|| async { failure(StatusCode::NOT_FOUND, "no such resource") })
            .with_state(core);
        if let Err(error) = axum::serve(self.listener, router).await {
            tracing::error!(socket = %self.path.display(), %error, "the API ended");
        }
    }
}

async fn status(State(core): State<mpsc::Sender<Request>>) -> Response {
    ask(&core, Request::Status).await.map_or_else(gone, |status| Json(status).into_response())
}

async fn lookup(
    State(core): State<mpsc::Sender<Request>>,
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
    match ask(&core, |reply| Request::Lookup(query, reply)).await {
        None => gone(),
        Some(Ok(explanation)) => Json(explanation).into_response(),
        Some(Err(error)) => failure(StatusCode::BAD_REQUEST, &error),
    }
}

async fn ask<T>(
    core: &mpsc::Sender<Request>,
    request: impl FnOnce(oneshot::Sender<T>) -> Request,
) -> Option<T> {
    let (reply, answer) = oneshot::channel();
    core.send(request(reply)).await.ok()?;
    answer.await.ok()
}

fn gone() -> Response {
    failure(StatusCode::SERVICE_UNAVAILABLE, "the agent is stopping")
}

fn failure(status: StatusCode, error: &str) -> Response {
    (status, Json(ApiError { error: error.to_owned() })).into_response()
}
