//! Asks a running agent over its unix socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::diff::DIFF;
use super::guard::{BODY_BYTES, RELOAD_DEADLINE};
use super::{ApiError, Commanded, LookupFrames, MOST_FRAMES, resources};
use crate::agent::Summary;
use crate::agent::diff::Diff;
use crate::lookup::{Explanation, Given};

const TIMEOUT: Duration = Duration::from_secs(10);

/// A reload asks new backends; the agent gives it up sooner than this.
const RELOAD_TIMEOUT: Duration = RELOAD_DEADLINE.saturating_add(Duration::from_secs(5));
const MAX_ANSWER: usize = 256 << 20;

/// What JSON puts around a frame's digits, and what else is in a request, bytes; an interface's name has at most 15.
const EACH: usize = 64;
const OTHERS: usize = 256;

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(
        "no agent answers at {path}; start one with `xlb run -c FILE`, or name its directory with --run-dir"
    )]
    NotRunning {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} may not be opened; run as root, or as a member of the socket's group")]
    Denied { path: PathBuf },
    #[error("too many connections wait for the agent; try again")]
    Busy,
    #[error("the agent did not answer within {seconds} s; its log may tell why")]
    Timeout { seconds: u64 },
    #[error("talking to the agent failed")]
    Http(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The agent's words, and the whole answer.
    #[error("{error}")]
    Refused { error: String, status: StatusCode, body: Bytes },
}

fn http(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
    ClientError::Http(error.into())
}

#[derive(Debug)]
pub struct Client {
    path: PathBuf,
}

impl Client {
    pub fn new(run_dir: &Path) -> Self {
        Self { path: run_dir.join(super::SOCKET) }
    }

    /// Gets a resource as JSON.
    pub async fn get<T: DeserializeOwned>(&self, resource: &str) -> Result<T, ClientError> {
        self.ask_within(TIMEOUT, Method::GET, resource, Bytes::new()).await
    }

    /// Has frames explained, in as many requests as it takes.
    pub async fn lookup(
        &self,
        frames: &[Given],
        interface: Option<&str>,
    ) -> Result<Vec<Explanation>, ClientError> {
        let mut told = Vec::new();
        let mut rest = frames.iter().map(Given::to_text).peekable();
        while rest.peek().is_some() {
            let mut frames = Vec::new();
            let mut room = BODY_BYTES - OTHERS;
            while let Some(frame) = rest.next_if(|frame| frame.hex.len() + EACH <= room) {
                room -= frame.hex.len() + EACH;
                frames.push(frame);
                if frames.len() == MOST_FRAMES {
                    break;
                }
            }
            let asked = LookupFrames { frames, interface: interface.map(str::to_owned) };
            let body = serde_json::to_vec(&asked).map_err(http)?.into();
            let answer: Vec<_> = self.ask_within(TIMEOUT, Method::POST, resources::LOOKUP, body).await?;
            told.extend(answer);
        }
        Ok(told)
    }

    /// Asks something of a backend.
    pub async fn command<B: Serialize>(&self, resource: &str, body: &B) -> Result<Commanded, ClientError> {
        let body = serde_json::to_vec(body).map_err(http)?.into();
        self.ask_within(TIMEOUT, Method::POST, resource, body).await
    }

    /// Has another configuration compared with the one in force.
    pub async fn diff(&self, text: String) -> Result<Diff, ClientError> {
        self.ask_within(TIMEOUT, Method::POST, DIFF, text.into()).await
    }

    /// Has the agent read its file again.
    pub async fn reload(&self) -> Result<Summary, ClientError> {
        self.ask_within(RELOAD_TIMEOUT, Method::POST, "/v1/reload", Bytes::new()).await
    }

    async fn ask_within<T: DeserializeOwned>(
        &self,
        limit: Duration,
        method: Method,
        resource: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        let answer = tokio::time::timeout(limit, self.ask(method, resource, body)).await;
        answer.map_err(|_| ClientError::Timeout { seconds: limit.as_secs() })?
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        resource: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        let stream = UnixStream::connect(&self.path).await.map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => ClientError::Denied { path: self.path.clone() },
            // The backlog is full.
            io::ErrorKind::WouldBlock => ClientError::Busy,
            _ => ClientError::NotRunning { path: self.path.clone(), source },
        })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
        let connection = tokio::spawn(connection);
        let request = hyper::Request::builder().method(method).uri(resource).header("host", "xlb");
        let request = request.body(Full::new(body)).map_err(http)?;
        let response = sender.send_request(request).await.map_err(http)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(http)?.to_bytes();
        connection.abort();
        if !status.is_success() {
            let told: Result<ApiError, _> = serde_json::from_slice(&body);
            let error = told.map_or_else(|_| status.to_string(), |told| told.error);
            return Err(ClientError::Refused { error, status, body });
        }
        serde_json::from_slice(&body).map_err(http)
    }
}
