//! Programs that run in the background of a lab, their logs and their end.

use std::fmt;
use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use super::{lock_ignoring_poison, wait_for};

/// A running program; it is killed with its lab. Clones are the same program.
#[derive(Clone)]
pub struct Process {
    inner: Arc<Inner>,
}

struct Inner {
    what: String,
    log: PathBuf,
    pid: Pid,
    child: Mutex<Child>,
}

impl Process {
    /// `child` leads a process group of its own.
    pub(super) fn new(what: String, log: PathBuf, child: Child) -> Self {
        let pid = Pid::from_child(&child);
        Self { inner: Arc::new(Inner { what, log, pid, child: Mutex::new(child) }) }
    }

    pub fn pid(&self) -> u32 {
        self.inner.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Sends a signal to the program, not to its children.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        // With the child locked and not yet waited for, its pid is nobody else's.
        let mut child = lock_ignoring_poison(&self.inner.child);
        if let Some(status) = child.try_wait().with_context(|| self.to_string())? {
            return Err(anyhow!("{self}: has ended: {status}"));
        }
        kill_process(self.inner.pid, signal).with_context(|| format!("{self}: signal {signal:?}"))
    }

    /// Kills the program and its process group, and waits for its end. Nothing happens if it has ended.
    pub fn kill(&self) {
        let mut child = lock_ignoring_poison(&self.inner.child);
        if let Ok(None) = child.try_wait() {
            kill_process_group(self.inner.pid, Signal::KILL).ok();
            child.wait().ok();
        }
    }

    /// How the program ended, if it has.
    pub fn exit(&self) -> Option<ExitStatus> {
        lock_ignoring_poison(&self.inner.child).try_wait().ok().flatten()
    }

    /// Waits for the program's own end.
    pub fn wait_exit(&self, timeout: Duration) -> Result<ExitStatus> {
        wait_for(&format!("{self}: its end"), timeout, || self.exit().is_some())?;
        self.exit().with_context(|| self.to_string())
    }

    /// What the program wrote to stdout and stderr until now.
    pub fn log(&self) -> String {
        fs::read(&self.inner.log)
            .map_or_else(|_| String::new(), |bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Bytes of it.
    pub fn log_length(&self) -> u64 {
        fs::metadata(&self.inner.log).map_or(0, |file| file.len())
    }

    /// What it wrote from that byte on.
    pub fn log_from(&self, offset: u64) -> String {
        let read = || {
            let (mut file, mut bytes) = (fs::File::open(&self.inner.log)?, Vec::new());
            file.seek(SeekFrom::Start(offset))?;
            file.read_to_end(&mut bytes).map(|_| bytes)
        };
        read().map_or_else(|_: io::Error| String::new(), |bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    pub fn log_path(&self) -> &Path {
        &self.inner.log
    }

    /// Waits until the log contains `text`; the end of the program ends the wait, with its log as the error.
    pub fn wait_for_log(&self, text: &str, timeout: Duration) -> Result<()> {
        self.wait_until(&format!("{text:?} in its log"), timeout, || self.log().contains(text))
    }

    /// Waits for a condition that the running program brings about; its end or the timeout is an error with its log.
    pub fn wait_until(
        &self,
        what: &str,
        timeout: Duration,
        mut condition: impl FnMut() -> bool,
    ) -> Result<()> {
        let mut holds = false;
        let waited = wait_for(what, timeout, || {
            let ended = self.exit().is_some();
            holds = condition();
            holds || ended
        });
        match (holds, waited) {
            (true, _) => Ok(()),
            (false, Ok(())) => Err(anyhow!("{self}: ended before {what}; its log:\n{}", self.log())),
            (false, Err(error)) => Err(anyhow!("{self}: {error:#}; its log:\n{}", self.log())),
        }
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.inner.what, self.pid())
    }
}
