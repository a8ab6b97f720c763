//! The admin API: HTTP/JSON on a unix socket, and metrics, also over TCP. Every command that asks a running agent is
//! a client of it. Knows the agent by its requests and snapshots only.

mod client;
pub mod commands;
mod connections;
mod diff;
mod endpoints;
mod guard;
pub mod metrics;
mod resources;
mod serve;
mod socket;

use std::net::SocketAddr;

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::agent::Request;
use crate::agent::status::BackendStatus;
use crate::lookup::FrameText;

pub use client::{Client, ClientError};
pub use connections::{ConnectionsAsked, FlushAsked, Flushed};
pub use endpoints::{EndpointError, Endpoints, Prepared};
use guard::Peer;
pub use socket::{SOCKET, Socket, group};

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
    /// Where the flow comes in; by default the first interface.
    pub interface: Option<String>,
}

/// `POST /v1/lookup`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LookupFrames {
    /// [`MOST_FRAMES`] at the most.
    pub frames: Vec<FrameText>,
    /// Where they come in; by default the first interface.
    #[serde(default)]
    pub interface: Option<String>,
}

/// Frames of one request. The body's limit is mostly met before.
pub const MOST_FRAMES: usize = 256;

/// `POST /v1/backends/enable` and `disable`. A backend is `POOL/NAME` or `POOL/ADDRESS`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackendAsked {
    pub backend: String,
}

/// `POST /v1/backends/drain`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrainAsked {
    pub backend: String,
    /// `never`, or a time such as `5m`; by default the pool's `drain_timeout`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<String>,
}

/// `POST /v1/backends/weight`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightAsked {
    pub backend: String,
    /// 0 to 100.
    pub weight: u64,
}

/// What a command to a backend has done.
#[derive(Debug, Serialize, Deserialize)]
pub struct Commanded {
    pub said: String,
    pub warnings: Vec<String>,
    /// As it is now.
    pub backend: BackendStatus,
}

/// `GET /v1/version`. Balancers whose versions of hash and table differ send flows to different backends.
#[derive(Debug, Serialize, Deserialize)]
pub struct Version {
    pub version: String,
    pub abi_version: u32,
    pub hash_version: u32,
    pub table_version: u32,
}

/// Answers on the unix socket until the process ends.
pub async fn serve(socket: Socket, core: mpsc::Sender<Request>) {
    serve::serve(socket.listener, resources::admin(core), Peer::of_unix).await;
}

fn failure(status: StatusCode, error: &str) -> Response {
    (status, Json(ApiError { error: error.to_owned() })).into_response()
}
