//! What tests share that load programs without a lab: whether they may, and a run directory of their own.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use lb_userspace::bpf::{BpfFs, detach};

/// Whether a test is left out that loads programs. Says so, or why it cannot run.
pub fn left_out(test: &str) -> bool {
    if std::env::var_os("XLB_SKIP_ROOT").is_some() {
        eprintln!("{test}: left out, XLB_SKIP_ROOT is set");
        return true;
    }
    assert!(
        rustix::process::geteuid().is_root(),
        "{test} loads BPF programs and mounts a bpffs: run it as root, or set XLB_SKIP_ROOT"
    );
    false
}

/// A run directory of its own, with its bpffs; gone when it is dropped, also in a panic.
pub struct RunDir(PathBuf);

impl RunDir {
    pub fn new() -> std::io::Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("xlb-program-run-{}-{number}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }

    pub fn fs(&self) -> anyhow::Result<BpfFs> {
        use anyhow::Context;
        BpfFs::open(&self.0).context("a bpffs cannot be mounted (are CAP_SYS_ADMIN and CAP_BPF there?)")
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // Whatever happened, nothing stays mounted; a second panic here would abort and hide the first.
        let removed = match BpfFs::existing(&self.0) {
            Ok(Some(fs)) => detach(fs, &[]).map(drop),
            Ok(None) => Ok(()),
            Err(error) => Err(std::io::Error::other(error)),
        };
        if let Err(error) = removed.and_then(|()| std::fs::remove_dir(&self.0)) {
            eprintln!("{} stays behind: {error}", self.0.display());
        }
    }
}
