//! Tells a service manager how the agent fares, as sd_notify(3) has it. It knows nothing of what the agent does.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};
use tracing::{debug, warn};

/// How many signs of life are sent in the time after which the manager takes the agent for hung.
const SIGNS: u32 = 3;

/// The way to the service manager. Without one nothing is sent.
#[derive(Debug)]
pub struct Notify {
    manager: Option<Manager>,
    /// Ticks where the manager waits for signs of life.
    signs: Option<Interval>,
    /// As it was sent last.
    status: String,
}

#[derive(Debug)]
struct Manager {
    // The sender of sd-notify blocks while the manager does not read.
    socket: UnixDatagram,
    address: SocketAddr,
}

impl Notify {
    /// The manager that the environment names (`NOTIFY_SOCKET`, `WATCHDOG_USEC`).
    pub fn from_environment() -> Self {
        let manager = std::env::var_os("NOTIFY_SOCKET").and_then(|name| {
            let manager = Manager::at(&name);
            manager.inspect_err(|error| warn!(socket = %name.display(), %error, "the service manager (NOTIFY_SOCKET) cannot be told")).ok()
        });
        let signs = manager.is_some().then(sd_notify::watchdog_enabled).flatten().map(signs);
        Self { manager, signs, status: String::new() }
    }

    /// Whether anybody is told anything.
    pub fn is_heard(&self) -> bool {
        self.manager.is_some()
    }

    /// Packets are forwarded by the configuration: at the start, and after each reload.
    pub fn ready(&mut self, status: String) {
        self.send(&[NotifyState::Ready, NotifyState::Status(&status)]);
        self.status = status;
    }

    /// One line for people, sent if it is another one.
    pub fn status(&mut self, status: String) {
        if status != self.status {
            self.send(&[NotifyState::Status(&status)]);
            self.status = status;
        }
    }

    /// Another configuration is being taken over; [`Self::ready`] ends it, however it went.
    pub fn reloading(&self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => self.send(&[NotifyState::Reloading, now]),
            Err(error) => debug!(%error, "no monotonic time"),
        }
    }

    pub fn stopping(&self) {
        self.send(&[NotifyState::Stopping]);
    }

    /// Returns when a sign of life is due; never, where nobody waits for one.
    pub async fn due(&mut self) {
        match &mut self.signs {
            Some(signs) => _ = signs.tick().await,
            None => std::future::pending().await,
        }
    }

    /// For the agent's own loop alone: a loop that hangs gives no sign of life.
    pub fn alive(&self) {
        self.send(&[NotifyState::Watchdog]);
    }

    fn send(&self, states: &[NotifyState]) {
        let Some(manager) = &self.manager else { return };
        let message: String = states.iter().map(|state| format!("{state}\n")).collect();
        // Nothing of the agent's work depends on being heard.
        if let Err(error) = manager.socket.send_to_addr(message.as_bytes(), &manager.address) {
            debug!(%error, "the service manager does not listen");
        }
    }
}

impl Manager {
    fn at(name: &OsStr) -> io::Result<Self> {
        let address = match name.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(name)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, address })
    }
}

fn signs(patience: Duration) -> Interval {
    let period = (patience / SIGNS).max(Duration::from_millis(1));
    let mut signs = interval_at(Instant::now() + period, period);
    signs.set_missed_tick_behavior(MissedTickBehavior::Delay);
    signs
}
