//! Asks a running agent over its unix socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::SendRequest;
use hyper::{Method, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

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
        self.post(resource, body).await
    }

    pub async fn post<B: Serialize, T: DeserializeOwned>(
        &self,
        resource: &str,
        body: &B,
    ) -> Result<T, ClientError> {
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

    /// Has each line of an answer handled as it comes, however many there are.
    pub async fn lines(
        &self,
        resource: &str,
        mut handle: impl FnMut(&[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let too_late = |_| ClientError::Timeout { seconds: TIMEOUT.as_secs() };
        let begun = self.begin(Method::GET, resource, Bytes::new());
        let mut answer = tokio::time::timeout(TIMEOUT, begun).await.map_err(too_late)??;
        let mut rest = Vec::new();
        loop {
            let part = answer.response.frame();
            let Some(part) = tokio::time::timeout(TIMEOUT, part).await.map_err(too_late)? else { break };
            let Ok(part) = part.map_err(http)?.into_data() else { continue };
            rest.extend_from_slice(&part);
            let mut from = 0;
            while let Some(length) = rest[from..].iter().position(|byte| *byte == b'\n') {
                handle(&rest[from..from + length])?;
                from += length + 1;
            }
            rest.drain(..from);
        }
        Ok(())
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
        let body = self.begin(method, resource, body).await?.whole().await?;
        serde_json::from_slice(&body).map_err(http)
    }

    /// Sends a request, and waits for the head of its answer; an error where that is one.
    async fn begin(&self, method: Method, resource: &str, body: Bytes) -> Result<Answer, ClientError> {
        let stream = UnixStream::connect(&self.path).await.map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => ClientError::Denied { path: self.path.clone() },
            // The backlog is full.
            io::ErrorKind::WouldBlock => ClientError::Busy,
            _ => ClientError::NotRunning { path: self.path.clone(), source },
        })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
        let connection = Connection(tokio::spawn(connection));
        let request = hyper::Request::builder().method(method).uri(resource).header("host", "xlb");
        let request = request.body(Full::new(body)).map_err(http)?;
        let response = sender.send_request(request).await.map_err(http)?;
        Answer { response, _sender: sender, _connection: connection }.accepted().await
    }
}

/// Ends with who asked.
struct Connection(JoinHandle<hyper::Result<()>>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// An answer whose body is still to come.
struct Answer {
    response: Response<Incoming>,
    _sender: SendRequest<Full<Bytes>>,
    _connection: Connection,
}

impl Answer {
    async fn accepted(self) -> Result<Self, ClientError> {
        let status = self.response.status();
        if status.is_success() {
            return Ok(self);
        }
        let body = self.whole().await?;
        let told: Result<ApiError, _> = serde_json::from_slice(&body);
        let error = told.map_or_else(|_| status.to_string(), |told| told.error);
        Err(ClientError::Refused { error, status, body })
    }

    async fn whole(self) -> Result<Bytes, ClientError> {
        let body = Limited::new(self.response.into_body(), MAX_ANSWER).collect().await;
        Ok(body.map_err(http)?.to_bytes())
    }
}
