//! One probe of one backend: connect, perhaps ask, and put the outcome in words. It owns the mapping from
//! socket errors to [`Failure`]; it must not know thresholds or schedules.

use std::error::Error as _;
use std::fmt;
use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::pin::{Pin, pin};
use std::time::{Duration, Instant};

use hyper::body::{Body, Incoming};
use hyper::header::{CONNECTION, HOST, HeaderValue, USER_AGENT};
use hyper::{Request, Response, Uri};
use hyper_util::rt::TokioIo;
use rustix::io::Errno;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{timeout, timeout_at};

use crate::config::model::{Check, CheckKind};

/// Status line and headers together. hyper rejects limits below 8 KiB.
const MAX_HEAD_BYTES: usize = 16 * 1024;
/// What is read after the verdict, so that the close is a FIN: closing with unread data sends a reset, which
/// backends log as an error.
const MAX_DRAIN_BYTES: u64 = 64 * 1024;
/// How long a backend may take to close its side. A kinder close is not worth more.
const DRAIN_TIME: Duration = Duration::from_millis(100);

const AGENT: HeaderValue = HeaderValue::from_static(concat!("xlb/", env!("CARGO_PKG_VERSION")));

/// The outcome of one probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// From the first packet to the verdict.
    pub took: Duration,
    pub result: Result<(), Failure>,
}

/// What a probe was waiting for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    Connect,
    Response,
}

/// Why a probe failed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Failure {
    /// Nobody listens (or a firewall says so).
    Refused,
    Reset,
    TimedOut(Phase),
    HostUnreachable,
    NetworkUnreachable,
    /// A router or a route of this host prohibits it (EACCES).
    Prohibited,
    UnexpectedStatus {
        status: u16,
        /// As configured: `200-299, 404`.
        expected: String,
    },
    /// The answer is not HTTP/1, or its head is larger than 16 KiB.
    Malformed(String),
    ClosedEarly,
    /// File descriptors, memory or local ports have run out here (EMFILE, ENFILE, ENOMEM, ENOBUFS, EADDRNOTAVAIL).
    NoLocalResource(String),
    /// A packet filter of this host rejects the probe (EPERM).
    FilteredHere,
    /// No request can be made of this check's path or host.
    BadCheck(String),
    Io(String),
}

impl Failure {
    /// The cause lies on this host and says nothing about the backend.
    pub fn is_local(&self) -> bool {
        match self {
            Failure::NoLocalResource(_) | Failure::FilteredHere | Failure::BadCheck(_) => true,
            Failure::Refused
            | Failure::Reset
            | Failure::TimedOut(_)
            | Failure::HostUnreachable
            | Failure::NetworkUnreachable
            | Failure::Prohibited
            | Failure::UnexpectedStatus { .. }
            | Failure::Malformed(_)
            | Failure::ClosedEarly
            | Failure::Io(_) => false,
        }
    }

    /// The backend's host answered that the connection does not exist: established ones are dead as well.
    pub fn is_hard(&self) -> bool {
        matches!(self, Failure::Refused | Failure::Reset)
    }

    fn from_io(error: &io::Error, phase: Phase) -> Failure {
        // Errno comes first: several of these have no ErrorKind of their own.
        let local = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS, Errno::ADDRNOTAVAIL];
        match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(errno) if local.contains(&errno) => {
                return Failure::NoLocalResource(words(error));
            }
            Some(Errno::PERM) => return Failure::FilteredHere,
            Some(Errno::ACCESS) => return Failure::Prohibited,
            _ => {}
        }
        match error.kind() {
            ErrorKind::ConnectionRefused => Failure::Refused,
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => Failure::Reset,
            ErrorKind::TimedOut => Failure::TimedOut(phase),
            ErrorKind::HostUnreachable => Failure::HostUnreachable,
            ErrorKind::NetworkUnreachable => Failure::NetworkUnreachable,
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionAborted => Failure::ClosedEarly,
            _ => Failure::Io(words(error)),
        }
    }

    fn from_hyper(error: &hyper::Error) -> Failure {
        if let Some(io) = error.source().and_then(|s| s.downcast_ref::<io::Error>()) {
            return Failure::from_io(io, Phase::Response);
        }
        if error.is_parse() {
            return Failure::Malformed(error.to_string());
        }
        if error.is_incomplete_message() || error.is_canceled() || error.is_closed() {
            return Failure::ClosedEarly;
        }
        Failure::Io(error.to_string())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Refused => f.write_str("connection refused"),
            Failure::Reset => f.write_str("connection reset"),
            Failure::TimedOut(Phase::Connect) => f.write_str("timed out connecting"),
            Failure::TimedOut(Phase::Response) => f.write_str("timed out waiting for the response"),
            Failure::HostUnreachable => f.write_str("host unreachable"),
            Failure::NetworkUnreachable => f.write_str("network unreachable"),
            Failure::Prohibited => f.write_str("administratively prohibited"),
            Failure::UnexpectedStatus { status, expected } => {
                write!(f, "status {status}, expected {expected}")
            }
            Failure::Malformed(what) => write!(f, "malformed response: {what}"),
            Failure::ClosedEarly => f.write_str("closed before an answer"),
            Failure::NoLocalResource(what) => {
                write!(f, "not probed, no local resource: {what}")
            }
            Failure::FilteredHere => f.write_str("not probed, a packet filter of this host rejects it"),
            Failure::BadCheck(what) => write!(f, "not probed, bad check: {what}"),
            Failure::Io(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for Failure {}

/// The system's words without std's `(os error 24)`, in lower case as part of a longer line.
fn words(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_lowercase().chain(chars).collect(),
        None => String::new(),
    }
}

/// Probes `address` once. Ends within `check.timeout`, and 100 ms more where an answered connection is slow to close.
///
/// Dropping the future ends the probe and closes its socket.
pub async fn probe(check: &Check, address: IpAddr) -> Probe {
    let start = Instant::now();
    let end = |result| Probe { took: start.elapsed(), result };
    let deadline = start + check.timeout;
    let target = SocketAddr::new(address, check.port);
    match &check.kind {
        CheckKind::None => Probe { took: Duration::ZERO, result: Ok(()) },
        CheckKind::Tcp => match connect(target, deadline).await {
            Ok(stream) => {
                let probe = end(Ok(()));
                close(stream).await;
                probe
            }
            Err(failure) => end(Err(failure)),
        },
        CheckKind::Http { path, host, expect } => match get(target, deadline, path, host.as_deref()).await {
            Ok(exchange) => {
                let probe = end(judge(exchange.response.status().as_u16(), expect));
                exchange.close().await;
                probe
            }
            Err(failure) => end(Err(failure)),
        },
    }
}

async fn connect(target: SocketAddr, deadline: Instant) -> Result<TcpStream, Failure> {
    match timeout_at(deadline.into(), TcpStream::connect(target)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(Failure::from_io(&error, Phase::Connect)),
        Err(_) => Err(Failure::TimedOut(Phase::Connect)),
    }
}

/// Sends FIN and waits for the backend's, reading what it still says.
async fn close(mut stream: TcpStream) {
    let drain = async {
        stream.shutdown().await?;
        let mut rest = (&mut stream).take(MAX_DRAIN_BYTES);
        tokio::io::copy(&mut rest, &mut tokio::io::sink()).await
    };
    // Neither an error nor the end of the time changes the verdict.
    let _ = timeout(DRAIN_TIME, drain).await;
}

type Connection = hyper::client::conn::http1::Connection<TokioIo<TcpStream>, String>;

/// A response of which only the head is read.
struct Exchange {
    response: Response<Incoming>,
    /// `None` once the backend has closed it.
    connection: Option<Connection>,
}

impl Exchange {
    /// Reads a short body to its end, so that the close is not a reset.
    async fn close(self) {
        let mut body = self.response.into_body();
        let drain = async {
            let mut bytes = 0;
            while bytes < MAX_DRAIN_BYTES
                && let Some(Ok(frame)) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await
            {
                bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
            }
        };
        if let Some(connection) = self.connection {
            let both = async {
                tokio::select! {
                    () = drain => {}
                    _ = connection => {}
                }
            };
            let _ = timeout(DRAIN_TIME, both).await;
        }
    }
}

async fn get(
    target: SocketAddr,
    deadline: Instant,
    path: &str,
    host: Option<&str>,
) -> Result<Exchange, Failure> {
    let request = request(target, path, host)?;
    let stream = connect(target, deadline).await?;
    match timeout_at(deadline.into(), exchange(stream, request)).await {
        Ok(result) => result,
        Err(_) => Err(Failure::TimedOut(Phase::Response)),
    }
}

fn request(target: SocketAddr, path: &str, host: Option<&str>) -> Result<Request<String>, Failure> {
    let uri: Uri = path
        .parse()
        .ok()
        .filter(|uri: &Uri| uri.scheme().is_none() && path.starts_with('/'))
        .ok_or_else(|| Failure::BadCheck(format!("path {path:?}; write it as /path?query")))?;
    let host = host.map_or_else(|| target.to_string(), str::to_owned);
    let value = HeaderValue::from_str(&host)
        .map_err(|_| Failure::BadCheck(format!("host {host:?}; use printable ASCII")))?;
    // An empty body of known length adds no header to a GET.
    let mut request = Request::new(String::new());
    *request.uri_mut() = uri;
    let headers = request.headers_mut();
    headers.insert(HOST, value);
    headers.insert(USER_AGENT, AGENT);
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    Ok(request)
}

async fn exchange(stream: TcpStream, request: Request<String>) -> Result<Exchange, Failure> {
    let (mut sender, mut connection) = hyper::client::conn::http1::Builder::new()
        // Some embedded servers match header names by case.
        .title_case_headers(true)
        .max_buf_size(MAX_HEAD_BYTES)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|e| Failure::from_hyper(&e))?;
    let mut response = pin!(sender.send_request(request));
    // The connection moves only while it is polled here, so that dropping the probe leaves nothing behind.
    let (response, connection) = tokio::select! {
        biased;
        response = &mut response => (response, Some(connection)),
        // Its own error, if any, has been handed to the response.
        _ = &mut connection => (response.await, None),
    };
    let response = response.map_err(|e| Failure::from_hyper(&e))?;
    Ok(Exchange { response, connection })
}

fn judge(status: u16, expect: &[RangeInclusive<u16>]) -> Result<(), Failure> {
    if expect.iter().any(|range| range.contains(&status)) {
        return Ok(());
    }
    let ranges = expect.iter().map(|range| match (range.start(), range.end()) {
        (first, last) if first == last => first.to_string(),
        (first, last) => format!("{first}-{last}"),
    });
    Err(Failure::UnexpectedStatus { status, expected: ranges.collect::<Vec<_>>().join(", ") })
}

#[cfg(test)]
mod tests;
