//! Asks a running agent over its unix socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::ApiError;

const TIMEOUT: Duration = Duration::from_secs(10);
const MAX_ANSWER: usize = 256 << 20;

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
    #[error("the agent did not answer within {} s", TIMEOUT.as_secs())]
    Timeout,
    #[error("talking to the agent failed")]
    Http(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("{0}")]
    Refused(String),
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
        tokio::time::timeout(TIMEOUT, self.ask(resource)).await.map_err(|_| ClientError::Timeout)?
    }

    async fn ask<T: DeserializeOwned>(&self, resource: &str) -> Result<T, ClientError> {
        let stream = UnixStream::connect(&self.path).await.map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => ClientError::Denied { path: self.path.clone() },
            _ => ClientError::NotRunning { path: self.path.clone(), source },
        })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
        let connection = tokio::spawn(connection);
        let request =
            hyper::Request::get(resource).header("host", "xlb").body(Empty::<Bytes>::new()).map_err(http)?;
        let response = sender.send_request(request).await.map_err(http)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(http)?.to_bytes();
        connection.abort();
        if !status.is_success() {
            let told: Result<ApiError, _> = serde_json::from_slice(&body);
            return Err(ClientError::Refused(told.map_or_else(|_| status.to_string(), |told| told.error)));
        }
        serde_json::from_slice(&body).map_err(http)
    }
}
