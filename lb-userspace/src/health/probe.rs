//! One probe of one backend: connect, perhaps ask, and put the outcome in words. It owns the mapping from
//! socket errors to [`Failure`]; it must not know thresholds or schedules.

use std::fmt;
use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::pin::{Pin, pin};
use std::time::{Duration, Instant};

use httparse::{ParserConfig, Status};
use hyper::Uri;
use hyper::header::HeaderValue;
use rustix::io::Errno;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep_until, timeout};

use crate::config::model::{Check, CheckKind};

/// Status line and headers together.
const MAX_HEAD_BYTES: usize = 16 * 1024;
const MAX_HEADERS: usize = 100;
/// Few answers to a check are longer. A buffer of this size is taken from and given back to the allocator's fastest bins.
const USUAL_ANSWER_BYTES: usize = 1024;
/// What is read after the verdict, so that the close is a FIN: closing with unread data sends a reset, which
/// backends log as an error.
const MAX_DRAIN_BYTES: u64 = 64 * 1024;
/// How long a backend may take to close its side. A kinder close is not worth more.
const DRAIN_TIME: Duration = Duration::from_millis(100);

const AGENT: &str = concat!("xlb/", env!("CARGO_PKG_VERSION"));

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

/// What is asked of one backend, put together once for all probes.
#[derive(Debug)]
pub struct Inquiry {
    target: SocketAddr,
    timeout: Duration,
    question: Question,
}

#[derive(Debug)]
enum Question {
    /// Whether a connection is accepted.
    Tcp,
    Http {
        request: Result<String, Failure>,
        expect: Vec<RangeInclusive<u16>>,
    },
}

/// A connection on which the verdict has been seen, and which is still to be closed.
#[derive(Debug)]
pub struct Closing {
    stream: TcpStream,
    /// Has room. What it holds has been read.
    buffer: Vec<u8>,
    /// Whether the backend is to be told that nothing follows.
    shutdown: bool,
    /// What is to come, where the backend has said.
    rest: Option<u64>,
}

impl Inquiry {
    /// `None` where there is nothing to ask.
    pub fn new(check: &Check, address: IpAddr) -> Option<Self> {
        let target = SocketAddr::new(address, check.port);
        let question = match &check.kind {
            CheckKind::None => return None,
            CheckKind::Tcp => Question::Tcp,
            CheckKind::Http { path, host, expect } => {
                Question::Http { request: request(target, path, host.as_deref()), expect: expect.clone() }
            }
        };
        Some(Self { target, timeout: check.timeout, question })
    }

    /// Asks once, and ends within the timeout. What is left of the connection is for [`Closing::close`]: the verdict need
    /// not wait for it.
    ///
    /// Dropping the future ends the probe and closes its socket.
    pub async fn ask(&self) -> (Probe, Option<Closing>) {
        let start = Instant::now();
        let mut deadline = pin!(sleep_until((start + self.timeout).into()));
        let answer = self.answer(deadline.as_mut()).await;
        let took = start.elapsed();
        match answer {
            Ok((result, closing)) => (Probe { took, result }, Some(closing)),
            Err(failure) => (Probe { took, result: Err(failure) }, None),
        }
    }

    async fn answer(&self, mut deadline: Pin<&mut Sleep>) -> Result<(Result<(), Failure>, Closing), Failure> {
        // One that cannot be asked is not bothered.
        let http = match &self.question {
            Question::Tcp => None,
            Question::Http { request, expect } => Some((request.as_ref().map_err(Failure::clone)?, expect)),
        };
        let connect = TcpStream::connect(self.target);
        let mut stream = within(Phase::Connect, deadline.as_mut(), connect).await?;
        let mut buffer = Vec::with_capacity(USUAL_ANSWER_BYTES);
        let Some((request, expect)) = http else {
            return Ok((Ok(()), Closing { stream, buffer, shutdown: true, rest: None }));
        };
        let exchange = async {
            stream.write_all(request.as_bytes()).await?;
            Head::read(&mut stream, &mut buffer).await
        };
        let head = within(Phase::Response, deadline, exchange).await??;
        Ok((judge(head.status, expect), Closing { stream, buffer, shutdown: false, rest: head.rest }))
    }
}

/// Probes `address` once. Ends within `check.timeout`, and 100 ms more where an answered connection is slow to close.
pub async fn probe(check: &Check, address: IpAddr) -> Probe {
    let Some(inquiry) = Inquiry::new(check, address) else {
        return Probe { took: Duration::ZERO, result: Ok(()) };
    };
    let (probe, closing) = inquiry.ask().await;
    if let Some(closing) = closing {
        closing.close().await;
    }
    probe
}

async fn within<T>(
    phase: Phase,
    deadline: Pin<&mut Sleep>,
    work: impl Future<Output = io::Result<T>>,
) -> Result<T, Failure> {
    tokio::select! {
        // What is there in time counts, however late it is looked at.
        biased;
        done = work => done.map_err(|error| Failure::from_io(&error, phase)),
        // Work that always finds something ready uses up what a task may do at a time, and a timer is not looked at then.
        () = tokio::task::coop::unconstrained(deadline) => Err(Failure::TimedOut(phase)),
    }
}

impl Closing {
    /// Reads what the backend still says, for a while, so that the close is no reset.
    pub async fn close(mut self) {
        // Neither an error nor the end of the time changes the verdict.
        let _ = timeout(DRAIN_TIME, self.drain()).await;
    }

    async fn drain(&mut self) -> io::Result<()> {
        if self.shutdown {
            self.stream.shutdown().await?;
        }
        let mut left = self.rest.unwrap_or(MAX_DRAIN_BYTES).min(MAX_DRAIN_BYTES);
        while left > 0 {
            self.buffer.clear();
            let read = self.stream.read_buf(&mut self.buffer).await?;
            if read == 0 {
                return Ok(());
            }
            left = left.saturating_sub(read as u64);
        }
        // The end, if it has come with the last byte: who closes first keeps the connection's ports for a minute.
        self.buffer.clear();
        self.stream.try_read_buf(&mut self.buffer).map(drop)
    }
}

fn request(target: SocketAddr, path: &str, host: Option<&str>) -> Result<String, Failure> {
    let usable = |uri: Uri| uri.scheme().is_none() && path.starts_with('/');
    if !path.parse().is_ok_and(usable) {
        return Err(Failure::BadCheck(format!("path {path:?}; write it as /path?query")));
    }
    let host = host.map_or_else(|| target.to_string(), str::to_owned);
    if HeaderValue::from_str(&host).is_err() {
        return Err(Failure::BadCheck(format!("host {host:?}; use printable ASCII")));
    }
    // Some embedded servers match header names by case.
    Ok(format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: {AGENT}\r\nConnection: close\r\n\r\n"))
}

/// What counts of a response's head.
#[derive(Debug)]
struct Head {
    status: u16,
    /// Bytes of the body that have not been read, where the head says how many there are.
    rest: Option<u64>,
}

impl Head {
    /// Reads until the head of the response is complete. A response that cannot be used is an error of its own kind.
    async fn read(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> io::Result<Result<Self, Failure>> {
        let mut interim = 0;
        loop {
            if stream.read_buf(buffer).await? == 0 {
                return Ok(Err(Failure::ClosedEarly));
            }
            loop {
                match Self::parse(buffer) {
                    Ok(Some((head, length))) if head.is_interim() => {
                        buffer.drain(..length);
                        interim += length;
                        if interim >= MAX_HEAD_BYTES {
                            return Ok(Err(too_large()));
                        }
                    }
                    Ok(Some((mut head, length))) => {
                        let read = (buffer.len() - length) as u64;
                        head.rest = head.rest.map(|body| body.saturating_sub(read));
                        return Ok(Ok(head));
                    }
                    Ok(None) if buffer.len() < MAX_HEAD_BYTES => break,
                    Ok(None) => return Ok(Err(too_large())),
                    Err(failure) => return Ok(Err(failure)),
                }
            }
        }
    }

    /// With the length of the head; `None` while it is not complete.
    fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, Failure> {
        let mut headers = [const { MaybeUninit::uninit() }; MAX_HEADERS];
        let mut response = httparse::Response::new(&mut []);
        let parsed =
            ParserConfig::default().parse_response_with_uninit_headers(&mut response, bytes, &mut headers);
        let length = match parsed {
            Ok(Status::Complete(length)) => length,
            Ok(Status::Partial) => return Ok(None),
            Err(httparse::Error::TooManyHeaders) => return Err(too_large()),
            Err(wrong) => return Err(Failure::Malformed(wrong.to_string())),
        };
        let Some(status) = response.code else { return Ok(None) };
        let told = || {
            let header = response.headers.iter().find(|h| h.name.eq_ignore_ascii_case("content-length"))?;
            std::str::from_utf8(header.value).ok()?.trim().parse().ok()
        };
        let rest = if matches!(status, 204 | 304) { Some(0) } else { told() };
        Ok(Some((Self { status, rest }, length)))
    }

    /// Another follows (RFC 9110, 15.2); a switch of protocols is the last.
    fn is_interim(&self) -> bool {
        (100..200).contains(&self.status) && self.status != 101
    }
}

fn too_large() -> Failure {
    Failure::Malformed("message head is too large".to_owned())
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
