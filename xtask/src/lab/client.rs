//! An HTTP client that asks at a fixed rate and tells how long each answer took. It knows nothing of balancers.
//!
//! The schedule is open: a request is due at its time, whether or not the one before was answered. A connection that
//! still waits for an answer asks late, and the wait counts from when the request was due. So a stall is felt by all that
//! were due in it ("coordinated omission" hides them).

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::num::NonZeroU64;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// What is asked, and how.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    pub server: SocketAddr,
    /// Requests a second, of all connections together.
    pub rate: u32,
    pub connections: u32,
    pub length: Duration,
}

/// Requests of each connection that are not counted.
const WARM_UP: u32 = 3;

/// How long an answer may take before the run is given up.
const PATIENCE: Duration = Duration::from_secs(5);

impl Schedule {
    /// How long each answer took. Called in the client's namespace.
    pub fn run(&self) -> Result<Vec<Duration>> {
        // Before anything is due: what connecting takes is no answer's time.
        let streams = (0..self.connections).map(|_| self.connect()).collect::<Result<Vec<TcpStream>>>()?;
        let begin = Instant::now() + Duration::from_millis(50);
        thread::scope(|scope| {
            let threads: Vec<_> = (0..)
                .zip(streams)
                .map(|(number, stream)| scope.spawn(move || self.connection(number, stream, begin)))
                .collect();
            let mut all = Vec::new();
            for thread in threads {
                all.extend(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
            }
            Ok(all)
        })
    }

    /// A connection that has answered before.
    fn connect(&self) -> Result<TcpStream> {
        let mut stream = TcpStream::connect_timeout(&self.server, PATIENCE)
            .with_context(|| format!("connecting to {}", self.server))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        for _ in 0..WARM_UP {
            ask(&mut stream, self.server)?;
        }
        Ok(stream)
    }

    /// Each connection's requests lie between those of the others.
    fn connection(&self, number: u32, mut stream: TcpStream, begin: Instant) -> Result<Vec<Duration>> {
        // Sleeps are rounded up by 50 us otherwise.
        rustix::thread::set_current_timer_slack(NonZeroU64::new(1)).context("setting the timer's slack")?;
        let gap = Duration::from_secs(1) / self.rate;
        let mut times = Vec::new();
        for turn in (number..).step_by(self.connections as usize) {
            let offset = gap * turn;
            if offset >= self.length {
                break;
            }
            let due = begin + offset;
            let late = Instant::now() > due;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            // The client's own alarm clock is not the balancer's affair.
            let from = if late { due } else { Instant::now() };
            ask(&mut stream, self.server)?;
            times.push(from.elapsed());
        }
        Ok(times)
    }
}

/// One request and its whole answer.
fn ask(stream: &mut TcpStream, server: SocketAddr) -> Result<()> {
    // In one piece: each write is a packet.
    stream.write_all(format!("GET / HTTP/1.1\r\nHost: {server}\r\n\r\n").as_bytes())?;
    let mut buffer = [0; 4096];
    let mut length = 0;
    loop {
        ensure!(length < buffer.len(), "{server}: the answer is too long");
        let read = stream.read(&mut buffer[length..]).with_context(|| format!("an answer of {server}"))?;
        if read == 0 {
            bail!("{server} closed the connection");
        }
        length += read;
        if is_whole(&buffer[..length])? {
            return Ok(());
        }
    }
}

/// Whether this is an answer to its end.
fn is_whole(answer: &[u8]) -> Result<bool> {
    const END: &[u8] = b"\r\n\r\n";
    let Some(end) = answer.windows(END.len()).position(|bytes| bytes == END) else { return Ok(false) };
    let head = std::str::from_utf8(&answer[..end]).context("the answer's head")?;
    ensure!(head.starts_with("HTTP/1.1 200 "), "the answer is {}", head.lines().next().unwrap_or_default());
    let body: usize = head
        .lines()
        .find_map(|line| line.strip_prefix("Content-Length: "))
        .context("the answer tells no length")?
        .parse()?;
    Ok(answer.len() >= end + END.len() + body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_whole_with_its_last_byte() {
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nweb1\n";
        for length in 0..answer.len() {
            assert!(!is_whole(&answer[..length]).unwrap(), "{length}");
        }
        assert!(is_whole(answer).unwrap());
    }

    #[test]
    fn an_answer_that_is_no_success_is_an_error() {
        assert!(is_whole(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n").is_err());
        assert!(is_whole(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
    }

    #[test]
    fn a_stall_is_felt_by_every_request_that_was_due_in_it() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut count = 0;
            let mut buffer = [0; 1024];
            while stream.read(&mut buffer).is_ok_and(|read| read > 0) {
                count += 1;
                // Once, in the middle.
                if count == 10 {
                    thread::sleep(Duration::from_millis(200));
                }
                let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
                stream.write_all(answer).unwrap();
            }
        });
        let schedule = Schedule { server, rate: 100, connections: 1, length: Duration::from_millis(400) };
        let times = schedule.run().unwrap();
        assert_eq!(times.len(), 40);
        // 200 ms at 10 ms each: some twenty were due, and felt 200, 190, 180, ... ms.
        let felt = times.iter().filter(|time| **time > Duration::from_millis(45)).count();
        assert!(felt >= 15, "{times:?}");
    }
}
