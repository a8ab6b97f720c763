//! UDP flows that send numbered datagrams to an echo server and tell of every one that did not come back.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket as StdSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use tokio::net::UdpSocket;
use tokio::runtime::Runtime;
use tokio::time::{MissedTickBehavior, interval, sleep};

use super::echo::event_loop;
use super::host::Host;
use super::{lock_ignoring_poison, wait_for};

/// What a server's socket holds while its thread waits for a CPU: no datagram is lost there.
const RECEIVE_BYTES: usize = 32 << 20;

/// How long the last answers may take.
const LAST: Duration = Duration::from_secs(3);

/// Sends datagrams back with the host's name after what was in them; it ends when it is dropped.
pub struct DatagramServer {
    _events: Runtime,
}

impl DatagramServer {
    /// Listens on one address of a host, the VIP say, which it answers from.
    pub fn start(host: &Host, address: SocketAddr) -> Result<Self> {
        let socket = host.inside(|| StdSocket::bind(address))?;
        let socket = socket.with_context(|| format!("host {}: {address}", host.name()))?;
        set_socket_recv_buffer_size_force(&socket, RECEIVE_BYTES).context("a receive buffer")?;
        socket.set_nonblocking(true).context("a socket")?;
        let events = event_loop()?;
        events.spawn(echo(socket, host.name().to_owned()));
        Ok(Self { _events: events })
    }
}

async fn echo(socket: StdSocket, name: String) -> io::Result<Infallible> {
    let socket = UdpSocket::from_std(socket)?;
    let mut datagram = [0; 64];
    loop {
        let (length, from) = socket.recv_from(&mut datagram).await?;
        let answer = [&datagram[..length], name.as_bytes()].concat();
        // A client that has gone refuses its answer.
        socket.send_to(&answer, from).await.ok();
    }
}

/// Flows that send until they are ended.
pub struct DatagramFlows {
    _events: Runtime,
    flows: Arc<Vec<Mutex<Flow>>>,
    ended: Arc<AtomicBool>,
}

/// What became of one flow.
#[derive(Clone, Debug, Default)]
pub struct Flow {
    pub sent: u64,
    /// Numbers of datagrams that have not come back, in the end the lost ones.
    pub missing: Vec<u64>,
    /// Who answered, each change once.
    pub servers: Vec<String>,
}

impl DatagramFlows {
    /// Begins to send from `count` sockets of a host, from the given addresses by turns: on each a datagram every
    /// `every`, evenly spread.
    pub fn start(
        host: &Host,
        sources: &[IpAddr],
        server: SocketAddr,
        count: usize,
        every: Duration,
    ) -> Result<Self> {
        let sockets: Result<Vec<StdSocket>> = host.inside(|| {
            (0..count)
                .map(|index| {
                    let socket = StdSocket::bind(SocketAddr::new(sources[index % sources.len()], 0))?;
                    socket.connect(server)?;
                    socket.set_nonblocking(true)?;
                    Ok(socket)
                })
                .collect()
        })?;
        let flows: Arc<Vec<Mutex<Flow>>> = Arc::new((0..count).map(|_| Mutex::default()).collect());
        let ended = Arc::new(AtomicBool::new(false));
        let events = event_loop()?;
        for (index, socket) in sockets?.into_iter().enumerate() {
            let socket = {
                let _inside = events.enter();
                Arc::new(UdpSocket::from_std(socket).context("a socket")?)
            };
            let (sender, sending) = (Arc::clone(&socket), (Arc::clone(&flows), Arc::clone(&ended)));
            let offset = every * index as u32 / count as u32;
            events.spawn(async move {
                sleep(offset).await;
                send(&sender, &sending.0[index], &sending.1, every).await;
            });
            let flows = Arc::clone(&flows);
            events.spawn(async move { receive(&socket, &flows[index]).await });
        }
        Ok(Self { _events: events, flows, ended })
    }

    /// What every flow has sent and not got back by now; what is under way is among it.
    pub fn now(&self) -> Vec<Flow> {
        self.flows.iter().map(|flow| lock_ignoring_poison(flow).clone()).collect()
    }

    /// Ends sending and waits a moment for the last answers.
    pub fn end(self) -> Vec<Flow> {
        self.ended.store(true, Ordering::Relaxed);
        // What has not come back by then is lost, and the caller sees it.
        wait_for("the last answers", LAST, || {
            self.flows.iter().all(|flow| lock_ignoring_poison(flow).missing.is_empty())
        })
        .ok();
        self.now()
    }
}

async fn send(socket: &UdpSocket, flow: &Mutex<Flow>, ended: &AtomicBool, every: Duration) {
    let mut ticks = interval(every);
    // Catching up would send bursts, which overrun queues that a steady sender does not fill.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if ended.load(Ordering::Relaxed) {
            return;
        }
        let number = {
            let mut flow = lock_ignoring_poison(flow);
            flow.sent += 1;
            let number = flow.sent;
            flow.missing.push(number);
            number
        };
        // One that is not sent does not come back, and counts for that.
        socket.send(&number.to_be_bytes()).await.ok();
    }
}

async fn receive(socket: &UdpSocket, flow: &Mutex<Flow>) {
    let mut datagram = [0; 64];
    loop {
        // An error is an ICMP answer to an earlier datagram: that one is missing.
        let Ok(length) = socket.recv(&mut datagram).await else { continue };
        let Some((number, server)) = datagram[..length].split_first_chunk() else { continue };
        let number = u64::from_be_bytes(*number);
        let server = String::from_utf8_lossy(server);
        let mut flow = lock_ignoring_poison(flow);
        flow.missing.retain(|missing| *missing != number);
        if flow.servers.last().is_none_or(|last| *last != server) {
            flow.servers.push(server.into_owned());
        }
    }
}
