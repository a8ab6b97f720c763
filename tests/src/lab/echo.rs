//! TCP connections that last: each sends numbered messages to an echo server and tells of every stall and of its loss.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener as StdListener};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use super::host::Host;
use super::stalls::{Stall, WORTH_KEEPING, longest};
use super::{lock_ignoring_poison, wait_for};

/// How long all connections may take to come about.
const CONNECT: Duration = Duration::from_secs(10);

/// How many may be on their way at a time: a listener's backlog is short.
const CONNECTING: usize = 64;

/// After so long without an answer a connection is lost, whatever TCP still hopes for.
const ANSWER: Duration = Duration::from_secs(30);

/// A message: the connection's number and its own, so that an echo in the wrong place shows.
const MESSAGE_BYTES: usize = 16;

/// One event loop on one thread of its own. Its sockets belong to the namespaces that they were made in.
pub(super) fn event_loop() -> Result<Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(1).enable_all().build().context("an event loop")
}

/// Listens on all addresses of a host and handles every connection, for as long as the event loop lives.
pub(super) fn serve<H>(
    host: &Host,
    port: u16,
    handle: impl Fn(TcpStream) -> H + Send + 'static,
) -> Result<Runtime>
where
    H: Future<Output = io::Result<()>> + Send + 'static,
{
    let events = event_loop()?;
    let listener = host.inside(|| StdListener::bind(("::", port)))?;
    let listener = listener.with_context(|| format!("host {}: port {port}", host.name()))?;
    listener.set_nonblocking(true).context("a listener")?;
    events.spawn(accept(listener, handle));
    Ok(events)
}

async fn accept<H>(listener: StdListener, handle: impl Fn(TcpStream) -> H) -> io::Result<Infallible>
where
    H: Future<Output = io::Result<()>> + Send + 'static,
{
    let listener = TcpListener::from_std(listener)?;
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(handle(stream));
    }
}

/// A server that tells each connection the host's name and then sends back what it gets; it ends when it is dropped.
pub struct EchoServer {
    _events: Runtime,
}

impl EchoServer {
    /// Listens on all addresses of a host.
    pub fn start(host: &Host, port: u16) -> Result<Self> {
        let greeting = format!("{}\n", host.name());
        Ok(Self { _events: serve(host, port, move |stream| echo(stream, greeting.clone()))? })
    }
}

async fn echo(mut stream: TcpStream, greeting: String) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.write_all(greeting.as_bytes()).await?;
    let mut message = [0; MESSAGE_BYTES];
    loop {
        stream.read_exact(&mut message).await?;
        stream.write_all(&message).await?;
    }
}

/// Connections that are held open until this is dropped.
pub struct Connections {
    _events: Runtime,
    record: Arc<Record>,
}

/// One of [`Connections`].
#[derive(Clone, Debug)]
pub struct Connection {
    /// The client's end.
    pub local: SocketAddr,
    /// Who answers.
    pub server: String,
    /// Messages that came back.
    pub echoes: u64,
    /// Why it is no more.
    pub lost: Option<String>,
    /// When the message that is under way was sent.
    waiting: Option<Instant>,
    /// When the last message that came back was sent.
    answered: Option<Instant>,
}

#[derive(Default)]
struct Record {
    connections: Mutex<Vec<Option<Connection>>>,
    stalls: Mutex<Vec<Stall>>,
}

impl Connections {
    /// Connects `count` times to a server, from the given addresses of a host by turns, and begins to send a message on
    /// each connection every `interval`, evenly spread.
    pub fn open(
        host: &Host,
        sources: &[IpAddr],
        server: SocketAddr,
        count: usize,
        interval: Duration,
    ) -> Result<Self> {
        let events = event_loop()?;
        let sockets: Result<Vec<TcpSocket>> = host.inside(|| {
            let source = |index: usize| sources.get(index % sources.len().max(1)).copied();
            (0..count).map(|index| bound(server.is_ipv6(), source(index))).collect()
        })?;
        let record = Arc::new(Record { connections: Mutex::new(vec![None; count]), ..Record::default() });
        let turns = Arc::new(Semaphore::new(CONNECTING));
        for (index, socket) in sockets?.into_iter().enumerate() {
            let (record, turns) = (Arc::clone(&record), Arc::clone(&turns));
            // Evenly spread over an interval, whatever connecting took.
            let offset = interval * index as u32 / count as u32;
            events.spawn(async move {
                let connected = async {
                    let _turn = turns.acquire().await.context("closing")?;
                    record.connect(index, socket, server).await
                };
                match timeout(CONNECT, connected).await {
                    Ok(Ok(stream)) => {
                        sleep(offset).await;
                        let why = record.exchange(index, stream, interval).await;
                        record.lose(index, &why);
                    }
                    Ok(Err(error)) => record.refuse(index, server, &error),
                    Err(_) => {
                        record.refuse(index, server, &anyhow::anyhow!("no connection within {CONNECT:?}"))
                    }
                }
            });
        }
        let this = Self { _events: events, record };
        this.wait_until_connected(count)?;
        Ok(this)
    }

    fn wait_until_connected(&self, count: usize) -> Result<()> {
        let open = || self.all().len();
        wait_for(&format!("{count} connections"), CONNECT * 2, || open() == count)
            .with_context(|| format!("{} are open", open()))?;
        let lost = self.lost();
        ensure!(lost.is_empty(), "{} connections failed, the first with: {:?}", lost.len(), lost[0].lost);
        Ok(())
    }

    /// All connections, lost ones too.
    pub fn all(&self) -> Vec<Connection> {
        lock_ignoring_poison(&self.record.connections).iter().flatten().cloned().collect()
    }

    pub fn lost(&self) -> Vec<Connection> {
        self.all().into_iter().filter(|connection| connection.lost.is_some()).collect()
    }

    /// The longest time that a message was or has been under way at some moment of a window; short ones count as zero.
    pub fn longest_stall(&self, begin: Instant, end: Instant) -> Duration {
        let now = Instant::now();
        let waiting: Vec<Stall> = self
            .all()
            .iter()
            .filter(|connection| connection.lost.is_none())
            .filter_map(|connection| connection.waiting.map(|since| Stall::until(since, now)))
            .filter(|stall| stall.duration >= WORTH_KEEPING)
            .collect();
        let over = lock_ignoring_poison(&self.record.stalls).clone();
        longest(over.into_iter().chain(waiting), begin, end)
    }

    /// Waits until every connection that is not lost has had an answer to a message that it sent after `since`.
    pub fn wait_until_answered(&self, since: Instant, within: Duration) -> Result<()> {
        let silent = || {
            let silent = |connection: &Connection| {
                connection.lost.is_none() && connection.answered.is_none_or(|sent| sent < since)
            };
            self.all().iter().filter(|connection| silent(connection)).count()
        };
        wait_for("an answer on every connection", within, || silent() == 0)
            .with_context(|| format!("{} are silent", silent()))
    }
}

fn bound(ipv6: bool, source: Option<IpAddr>) -> Result<TcpSocket> {
    let socket = if ipv6 { TcpSocket::new_v6() } else { TcpSocket::new_v4() }.context("a socket")?;
    if let Some(source) = source {
        socket.bind(SocketAddr::new(source, 0)).with_context(|| format!("binding to {source}"))?;
    }
    Ok(socket)
}

impl Record {
    async fn connect(
        &self,
        index: usize,
        socket: TcpSocket,
        server: SocketAddr,
    ) -> Result<BufReader<TcpStream>> {
        let stream = socket.connect(server).await?;
        stream.set_nodelay(true)?;
        let local = stream.local_addr()?;
        let mut stream = BufReader::new(stream);
        let mut name = String::new();
        stream.read_line(&mut name).await?;
        ensure!(name.ends_with('\n'), "the server told no name");
        let connection = Connection {
            local,
            server: name.trim_end().to_owned(),
            echoes: 0,
            lost: None,
            waiting: None,
            answered: None,
        };
        lock_ignoring_poison(&self.connections)[index] = Some(connection);
        Ok(stream)
    }

    /// Sends messages until one does not come back as it was, and says why.
    async fn exchange(&self, index: usize, mut stream: BufReader<TcpStream>, interval: Duration) -> String {
        for number in 0_u64.. {
            let sent = Instant::now();
            self.update(index, |connection| connection.waiting = Some(sent));
            let mut message = [0; MESSAGE_BYTES];
            message[..8].copy_from_slice(&(index as u64).to_be_bytes());
            message[8..].copy_from_slice(&number.to_be_bytes());
            match timeout(ANSWER, round_trip(&mut stream, message)).await {
                Err(_) => return format!("message {number}: no answer within {ANSWER:?}"),
                Ok(Err(error)) => return format!("message {number}: {error:#}"),
                Ok(Ok(())) => {}
            }
            let stall = Stall::until(sent, Instant::now());
            self.update(index, |connection| {
                connection.waiting = None;
                connection.answered = Some(sent);
                connection.echoes = number + 1;
            });
            if stall.duration >= WORTH_KEEPING {
                lock_ignoring_poison(&self.stalls).push(stall);
            }
            sleep(interval.saturating_sub(stall.duration)).await;
        }
        "the numbers are used up".to_owned()
    }

    fn update(&self, index: usize, change: impl FnOnce(&mut Connection)) {
        if let Some(connection) = &mut lock_ignoring_poison(&self.connections)[index] {
            change(connection);
        }
    }

    fn lose(&self, index: usize, why: &str) {
        self.update(index, |connection| connection.lost = Some(why.to_owned()));
    }

    /// A connection that never was.
    fn refuse(&self, index: usize, server: SocketAddr, why: &anyhow::Error) {
        lock_ignoring_poison(&self.connections)[index] = Some(Connection {
            local: server,
            server: String::new(),
            echoes: 0,
            lost: Some(format!("{why:#}")),
            waiting: None,
            answered: None,
        });
    }
}

async fn round_trip(stream: &mut BufReader<TcpStream>, message: [u8; MESSAGE_BYTES]) -> Result<()> {
    stream.write_all(&message).await?;
    let mut echo = [0; MESSAGE_BYTES];
    stream.read_exact(&mut echo).await?;
    if echo != message {
        bail!("the echo is {echo:02x?}, not {message:02x?}");
    }
    Ok(())
}
