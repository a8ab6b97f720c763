//! One long download at a steady pace: curl, a server that sends at that pace, every byte compared, every gap noted.

use std::io::Read;
use std::net::SocketAddr;
use std::process::{Child, ChildStdout, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::time::{MissedTickBehavior, interval};

use super::command::start;
use super::echo::serve;
use super::host::Host;
use super::lock_ignoring_poison;
use super::stalls::{Stall, longest};

/// How often a piece is sent: what a download's gaps are without a fault.
const PACE: Duration = Duration::from_millis(20);

/// Some 200 kB a second: no load for the machine, and still the megabytes of a file.
const PIECE_BYTES: usize = 4096;

/// A gap that is not longer than this is the pace.
const GAP: Duration = Duration::from_millis(22);

/// An HTTP server with one file, which it sends at a steady pace; it ends when it is dropped.
pub struct SlowServer {
    _events: Runtime,
    hurries: Arc<AtomicBool>,
}

impl SlowServer {
    /// Listens on all addresses of a host. Sending the file takes so long.
    pub fn start(host: &Host, port: u16, takes: Duration) -> Result<Self> {
        let (pieces, hurries) = (pieces(takes), Arc::<AtomicBool>::default());
        let told = Arc::clone(&hurries);
        let events = serve(host, port, move |stream| send(stream, pieces, Arc::clone(&told)))?;
        Ok(Self { _events: events, hurries })
    }

    /// Sends the rest of the file at once: nobody looks at its pace any more.
    pub fn hurry(&self) {
        self.hurries.store(true, Ordering::Relaxed);
    }
}

fn pieces(takes: Duration) -> u64 {
    (takes.as_millis() / PACE.as_millis()) as u64
}

async fn send(mut stream: TcpStream, pieces: u64, hurries: Arc<AtomicBool>) -> std::io::Result<()> {
    // The request is one segment, and what it says does not matter.
    let mut request = [0; 1024];
    if stream.read(&mut request).await? == 0 {
        return Ok(());
    }
    let length = pieces * PIECE_BYTES as u64;
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    let mut ticks = interval(PACE);
    // After a stall the pace is the same: a burst would hide the next gap.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for piece in 0..pieces {
        if !hurries.load(Ordering::Relaxed) {
            ticks.tick().await;
        }
        let words = (0..PIECE_BYTES as u64 / 8).map(|word| piece * PIECE_BYTES as u64 / 8 + word);
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        stream.write_all(&bytes).await?;
    }
    stream.shutdown().await
}

/// A download that is under way; dropping it ends it.
pub struct Download {
    curl: Child,
    reader: Option<JoinHandle<Result<u64>>>,
    progress: Arc<Mutex<Progress>>,
    expected: u64,
}

struct Progress {
    /// Nothing before the first byte: curl has to connect.
    last: Option<Instant>,
    gaps: Vec<Stall>,
}

impl Download {
    /// Starts curl in a host on a [`SlowServer`] that takes so long.
    pub fn start(host: &Host, server: SocketAddr, takes: Duration) -> Result<Self> {
        let mut curl = host.exec(["curl", "-q", "--silent", "--show-error", "--fail", "--noproxy", "*"]);
        curl.args(["--no-buffer", "--connect-timeout", "2", &format!("http://{server}/")]);
        let mut curl = start(curl.stdout(Stdio::piped()).stderr(Stdio::inherit()))?;
        let stdout = curl.stdout.take().context("curl has no stdout")?;
        let progress = Arc::new(Mutex::new(Progress { last: None, gaps: Vec::new() }));
        let seen = Arc::clone(&progress);
        let reader = std::thread::spawn(move || read(stdout, &seen));
        let expected = pieces(takes) * PIECE_BYTES as u64;
        Ok(Self { curl, reader: Some(reader), progress, expected })
    }

    /// The longest time without a byte that was under way at some moment of a window; what is no longer than the pace
    /// counts as zero.
    pub fn longest_stall(&self, begin: Instant, end: Instant) -> Duration {
        let progress = lock_ignoring_poison(&self.progress);
        let last = progress.last.filter(|_| !self.is_over());
        let now = last.map(|last| Stall::until(last, Instant::now()));
        longest(progress.gaps.iter().copied().chain(now.filter(|gap| gap.duration > GAP)), begin, end)
    }

    pub fn is_over(&self) -> bool {
        self.reader.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for the end. It is an error if curl failed, or if a byte is missing or is another.
    pub fn finish(mut self, within: Duration) -> Result<()> {
        super::wait_for("the end of the download", within, || self.is_over())?;
        let reader = self.reader.take().context("a download ends once")?;
        let bytes = reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let status = self.curl.wait().context("curl")?;
        ensure!(status.success(), "curl: {status}, after {bytes} bytes");
        ensure!(bytes == self.expected, "{bytes} of {} bytes arrived", self.expected);
        Ok(())
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        if let Ok(None) = self.curl.try_wait() {
            kill_process_group(Pid::from_child(&self.curl), Signal::KILL).ok();
            self.curl.wait().ok();
        }
    }
}

/// Reads to the end and compares. Returns how much there was.
fn read(mut stdout: ChildStdout, progress: &Mutex<Progress>) -> Result<u64> {
    let mut bytes = 0_u64;
    let mut buffer = [0; 1 << 16];
    loop {
        let count = stdout.read(&mut buffer).context("curl's output")?;
        let now = Instant::now();
        {
            let mut progress = lock_ignoring_poison(progress);
            let gap = progress.last.map(|last| Stall::until(last, now));
            progress.gaps.extend(gap.filter(|gap| gap.duration > GAP));
            progress.last = Some(now);
        }
        if count == 0 {
            return Ok(bytes);
        }
        for byte in &buffer[..count] {
            let expected = (bytes / 8).to_le_bytes()[(bytes % 8) as usize];
            ensure!(*byte == expected, "byte {bytes} is {byte:#04x}, not {expected:#04x}");
            bytes += 1;
        }
    }
}
