//! SYNs from addresses that nobody has, at a steady rate and no more than so many of them; it knows nothing of who gets them.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use etherparse::PacketBuilder;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, ipproto, sendto, socket_with};

use super::host::Host;

/// For benchmarks (RFC 2544): 198.18.0.0/15, to which no host of a lab has a route.
const SOURCES: u32 = u32::from_be_bytes([198, 18, 0, 0]);
const SOURCE_BITS: u32 = 17;

/// How often some are sent.
const BEAT: Duration = Duration::from_millis(2);

/// What a sender that was not scheduled for longer than this has missed is not made up for: a flood, not a burst.
const MOST_BEHIND: Duration = Duration::from_millis(50);

/// A flood that is under way; dropping it ends it.
pub struct SynFlood {
    sent: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl SynFlood {
    /// Begins to send `per_second` SYNs to a server that the host has a route to, for so long at most.
    pub fn start(host: &Host, to: SocketAddrV4, per_second: u32, lasts: Duration) -> Result<Self> {
        let raw = || {
            // The packets have IP headers: the kernel adds addresses of the link and the checksum only.
            socket_with(AddressFamily::INET, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::RAW))
        };
        let socket = host.inside(raw)?.with_context(|| format!("host {}: a raw socket", host.name()))?;
        let (sent, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let (counter, stopped) = (Arc::clone(&sent), Arc::clone(&stop));
        let thread = std::thread::spawn(move || send(&socket, to, per_second, lasts, &counter, &stopped));
        Ok(Self { sent, stop, thread: Some(thread) })
    }

    /// SYNs until now.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Ends it. How many SYNs there were; an error if one could not be sent.
    pub fn stop(mut self) -> Result<u64> {
        self.join()?;
        Ok(self.sent())
    }

    fn join(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else { return Ok(()) };
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for SynFlood {
    fn drop(&mut self) {
        if let Err(error) = self.join() {
            eprintln!("a SYN flood: {error:#}");
        }
    }
}

fn send(
    socket: &OwnedFd,
    to: SocketAddrV4,
    per_second: u32,
    lasts: Duration,
    sent: &AtomicU64,
    stopped: &AtomicBool,
) -> Result<()> {
    let mut random = fastrand::Rng::with_seed(u64::from(per_second));
    let end = Instant::now() + lasts;
    let mut paid = Instant::now();
    while Instant::now() < end && !stopped.load(Ordering::Relaxed) {
        std::thread::sleep(BEAT);
        let now = Instant::now();
        paid = paid.max(now - MOST_BEHIND);
        let due = ((now - paid).as_secs_f64() * f64::from(per_second)) as u32;
        paid += Duration::from_secs(1) * due / per_second.max(1);
        for _ in 0..due {
            let syn = syn(to, &mut random)?;
            sendto(socket, &syn, SendFlags::empty(), &SocketAddr::V4(to)).context("sending a SYN")?;
            sent.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

fn syn(to: SocketAddrV4, random: &mut fastrand::Rng) -> Result<Vec<u8>> {
    let source = Ipv4Addr::from(SOURCES | random.u32(..1 << SOURCE_BITS));
    let builder = PacketBuilder::ipv4(source.octets(), to.ip().octets(), 64)
        .tcp(random.u16(1024..), to.port(), random.u32(..), 64240)
        .syn();
    let mut bytes = Vec::with_capacity(builder.size(0));
    builder.write(&mut bytes, &[])?;
    Ok(bytes)
}
