//! Thousands of TCP connections that live on, each with small questions at random times; it tells of every one that broke,
//! fell silent or was answered by somebody else. It knows no balancer.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{sleep, timeout};

use super::echo::serve;
use super::host::Host;
use super::incidents::{Incident, Kind};
use super::{lock_ignoring_poison, wait_for};

/// A question: the connection's number and its own.
const QUESTION_BYTES: usize = 16;
/// The server's name, filled with zeros.
const NAME_BYTES: usize = 16;
const ANSWER_BYTES: usize = QUESTION_BYTES + NAME_BYTES;

/// How long a connection may take to come about: a SYN that is lost is sent again after one second, and two more.
const CONNECT: Duration = Duration::from_secs(5);

/// After so long without an answer a connection is given up, and another one opened in its place.
const GIVE_UP: Duration = Duration::from_secs(8);

/// An answer that took so long is an incident.
pub const STALL: Duration = Duration::from_secs(1);

/// How many may be on their way at a time while all are opened: a listener's backlog is short.
const CONNECTING: usize = 128;

/// How often one that broke is replaced. What breaks more often stays away.
const REPLACEMENTS: usize = 20;
const BEFORE_A_REPLACEMENT: Range<u64> = 100..400;

/// Descriptors of the process beyond one at each end of every connection.
const OTHER_DESCRIPTORS: u64 = 4096;

/// A server that answers every question with the question and its host's name, on many connections at a time; when it is
/// dropped, it and its connections are no more.
pub struct NamingServer {
    _events: Runtime,
}

impl NamingServer {
    /// Listens on all addresses of a host.
    pub fn start(host: &Host, port: u16) -> Result<Self> {
        ensure!(host.name().len() <= NAME_BYTES, "{} is longer than {NAME_BYTES} bytes", host.name());
        let mut name = [0; NAME_BYTES];
        name[..host.name().len()].copy_from_slice(host.name().as_bytes());
        Ok(Self { _events: serve(host, port, move |stream| answer(stream, name))? })
    }
}

async fn answer(mut stream: TcpStream, name: [u8; NAME_BYTES]) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut answer = [0; ANSWER_BYTES];
    answer[QUESTION_BYTES..].copy_from_slice(&name);
    loop {
        stream.read_exact(&mut answer[..QUESTION_BYTES]).await?;
        stream.write_all(&answer).await?;
    }
}

/// Asks once. Returns who answered; an answer to another question is an error.
pub(super) async fn ask(stream: &mut TcpStream, connection: u64, number: u64) -> io::Result<String> {
    let question = [connection.to_be_bytes(), number.to_be_bytes()].concat();
    stream.write_all(&question).await?;
    let mut answer = [0; ANSWER_BYTES];
    stream.read_exact(&mut answer).await?;
    if answer[..QUESTION_BYTES] != question[..] {
        return Err(io::Error::new(ErrorKind::InvalidData, format!("the answer is {answer:02x?}")));
    }
    Ok(String::from_utf8_lossy(&answer[QUESTION_BYTES..]).trim_end_matches('\0').to_owned())
}

pub(super) async fn connect(source: IpAddr, server: SocketAddr) -> io::Result<TcpStream> {
    let socket = if server.is_ipv6() { TcpSocket::new_v6() } else { TcpSocket::new_v4() }?;
    socket.bind(SocketAddr::new(source, 0))?;
    let stream = socket.connect(server).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Work in a host's network on a thread of its own, ended when this is dropped.
pub(super) struct Loop {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Loop {
    pub(super) fn start(host: &Host, work: impl Future<Output = ()> + Send + 'static) -> Result<Self> {
        let events = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let events = events.context("an event loop")?;
        let (stop, stopped) = oneshot::channel::<()>();
        let (host, name) = (host.clone(), host.name().to_owned());
        let run = move || {
            let done = host.inside(move || {
                events.block_on(async {
                    tokio::select! {
                        _ = stopped => {}
                        () = work => {}
                    }
                });
            });
            if let Err(error) = done {
                eprintln!("host {name}: {error:#}");
            }
        };
        Ok(Self { stop: Some(stop), thread: Some(std::thread::spawn(run)) })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It panicked: what it did not do is missed by whoever waits for it.
            thread.join().ok();
        }
    }
}

/// What [`LiveConnections`] do.
#[derive(Clone, Debug)]
pub struct LiveLoad {
    pub connections: usize,
    /// Addresses of the host, taken by turns.
    pub sources: Vec<IpAddr>,
    pub server: SocketAddr,
    /// From an answer to the next question.
    pub gap: Range<Duration>,
}

/// Connections that are held open until this is dropped.
pub struct LiveConnections {
    record: Arc<Record>,
    _events: Loop,
}

struct Record {
    load: LiveLoad,
    seats: Vec<Mutex<Seat>>,
    incidents: Mutex<Vec<Incident>>,
}

/// What a connection of the moment has seen.
#[derive(Clone, Debug, Default)]
struct Seat {
    /// Its client's end and its server; nothing while there is no connection.
    open: Option<(SocketAddr, String)>,
    /// Of all connections that had this place.
    answers: u64,
    /// When the last question was asked that was answered.
    answered: Option<Instant>,
}

impl LiveConnections {
    /// Opens the connections, waits until each has had an answer, and goes on.
    pub fn open(host: &Host, load: LiveLoad) -> Result<Self> {
        raise_descriptor_limit(2 * load.connections as u64 + OTHER_DESCRIPTORS)?;
        let count = load.connections;
        let record = Arc::new(Record {
            seats: (0..count).map(|_| Mutex::default()).collect(),
            incidents: Mutex::default(),
            load,
        });
        let this = Self { record: Arc::clone(&record), _events: Loop::start(host, hold(record))? };
        let within = CONNECT + Duration::from_millis(10) * count as u32;
        wait_for(&format!("{count} connections"), within, || this.alive().len() == count)
            .with_context(|| format!("{} are open; {:?}", this.alive().len(), this.incidents().first()))?;
        Ok(this)
    }

    /// Client's end and server of every connection that is open.
    pub fn alive(&self) -> Vec<(SocketAddr, String)> {
        self.record.seats.iter().filter_map(|seat| lock_ignoring_poison(seat).open.clone()).collect()
    }

    /// Answers until now.
    pub fn answers(&self) -> u64 {
        self.record.seats.iter().map(|seat| lock_ignoring_poison(seat).answers).sum()
    }

    /// Everything that went wrong until now.
    pub fn incidents(&self) -> Vec<Incident> {
        lock_ignoring_poison(&self.record.incidents).clone()
    }

    /// Waits until every connection has had an answer to a question that it asked after `since`.
    pub fn wait_until_all_answer(&self, since: Instant, within: Duration) -> Result<()> {
        let silent = || {
            let answered =
                |seat: &Mutex<Seat>| lock_ignoring_poison(seat).answered.is_some_and(|at| at >= since);
            self.record.seats.iter().filter(|seat| !answered(seat)).count()
        };
        wait_for("an answer on every connection", within, || silent() == 0)
            .with_context(|| format!("{} are silent", silent()))
    }
}

fn raise_descriptor_limit(needed: u64) -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < needed) {
        let maximum = limit.maximum.map(|maximum| maximum.max(needed));
        setrlimit(Resource::Nofile, Rlimit { current: Some(needed), maximum })
            .with_context(|| format!("{needed} descriptors"))?;
    }
    Ok(())
}

async fn hold(record: Arc<Record>) {
    let turns = Arc::new(Semaphore::new(CONNECTING));
    let mut tasks = tokio::task::JoinSet::new();
    for index in 0..record.seats.len() {
        let (record, turns) = (Arc::clone(&record), Arc::clone(&turns));
        tasks.spawn(async move { sit(&record, index, &turns).await });
    }
    tasks.join_all().await;
}

/// One connection after the other in the same place.
async fn sit(record: &Record, index: usize, turns: &Semaphore) {
    let mut random = fastrand::Rng::with_seed(index as u64);
    for _ in 0..=REPLACEMENTS {
        let begin = Instant::now();
        let opened = async {
            let _turn = turns.acquire().await;
            record.open(index).await
        };
        match opened.await {
            Ok((stream, server)) => {
                let kind = record.talk(index, stream, &server, begin, &mut random).await;
                record.note(Incident { at: Instant::now(), opened: begin, server, kind });
                record.update(index, |seat| seat.open = None);
            }
            Err(kind) => record.note(Incident { at: begin, opened: begin, server: String::new(), kind }),
        }
        sleep(Duration::from_millis(random.u64(BEFORE_A_REPLACEMENT))).await;
    }
}

impl Record {
    fn note(&self, incident: Incident) {
        lock_ignoring_poison(&self.incidents).push(incident);
    }

    fn update(&self, index: usize, change: impl FnOnce(&mut Seat)) {
        change(&mut lock_ignoring_poison(&self.seats[index]));
    }

    /// A connection and the one who gave the first answer.
    async fn open(&self, index: usize) -> std::result::Result<(TcpStream, String), Kind> {
        let source = self.load.sources[index % self.load.sources.len()];
        let opened = async {
            let mut stream = connect(source, self.load.server).await?;
            let asked = Instant::now();
            let server = ask(&mut stream, index as u64, 0).await?;
            let local = stream.local_addr()?;
            self.update(index, |seat| {
                seat.open = Some((local, server.clone()));
                seat.answers += 1;
                seat.answered = Some(asked);
            });
            Ok((stream, server))
        };
        match timeout(CONNECT, opened).await {
            Ok(opened) => opened.map_err(|error: io::Error| Kind::Unopened(error.to_string())),
            Err(_) => Err(Kind::Unopened(format!("no answer within {CONNECT:?}"))),
        }
    }

    /// Asks until the connection is no more, and says why.
    async fn talk(
        &self,
        index: usize,
        mut stream: TcpStream,
        server: &str,
        opened: Instant,
        random: &mut fastrand::Rng,
    ) -> Kind {
        let Range { start, end } = self.load.gap;
        for number in 1.. {
            sleep(start + (end - start).mul_f64(random.f64())).await;
            let asked = Instant::now();
            match timeout(GIVE_UP, ask(&mut stream, index as u64, number)).await {
                Err(_) => return Kind::Silent,
                Ok(Err(error)) => return Kind::of(&error),
                Ok(Ok(name)) if name != server => return Kind::Stranger(name),
                Ok(Ok(_)) => {}
            }
            let took = asked.elapsed();
            if took >= STALL {
                let server = server.to_owned();
                self.note(Incident { at: asked, opened, server, kind: Kind::Stalled(took) });
            }
            self.update(index, |seat| {
                seat.answers += 1;
                seat.answered = Some(asked);
            });
        }
        Kind::Ended
    }
}
