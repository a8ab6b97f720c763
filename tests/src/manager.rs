//! A service manager as sd_notify(3) sees it: the socket that a service tells how it fares. It starts no service.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::lab::wait_for;

/// Collects what services send, until it is dropped.
pub struct Manager {
    path: PathBuf,
    messages: Arc<Mutex<Vec<String>>>,
}

impl Manager {
    /// Listens at a path that services are given as `NOTIFY_SOCKET`.
    pub fn at(path: &Path) -> Result<Self> {
        let socket = UnixDatagram::bind(path).with_context(|| path.display().to_string())?;
        let messages = Arc::new(Mutex::new(Vec::new()));
        let received = Arc::downgrade(&messages);
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Some(messages) = received.upgrade() {
                if let Ok(length) = socket.recv(&mut buffer) {
                    let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
                    messages.lock().unwrap_or_else(PoisonError::into_inner).push(text);
                }
            }
        });
        Ok(Self { path: path.to_owned(), messages })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All messages until now, each with its lines.
    pub fn messages(&self) -> Vec<String> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many messages have this line.
    pub fn count(&self, line: &str) -> usize {
        self.messages().iter().filter(|message| message.lines().any(|one| one == line)).count()
    }

    /// Waits until so many messages have had this line.
    pub fn wait_for(&self, line: &str, count: usize, timeout: Duration) -> Result<()> {
        let what = format!("{count} times {line}");
        wait_for(&what, timeout, || self.count(line) >= count)
            .with_context(|| format!("{:?}", self.messages()))
    }
}
