//! What a lab leaves on the machine, found by its id alone: run directory, mounts, namespaces, processes in them.
//!
//! Every lab has `/run/xlb-lab/<id>/`, made before anything else and removed after everything else, with a file `lock`
//! that its process holds. A directory whose lock is free is a dead lab. A second lock covers making and sweeping, so
//! that no lab is taken for dead before it holds its own.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};

use super::command::{NETNS, ip_batch};
use super::wait_for;

/// Where run directories are. Short, because unix sockets in them have paths of at most 107 bytes.
const RUN: &str = "/run/xlb-lab";

/// A file in the run directory: this lab stays although its process ends.
pub(super) const KEEP: &str = "keep";

const LOCK: &str = "lock";

/// Removes labs whose process has ended, but for kept ones. What cannot be removed is reported on stderr and left to the
/// next sweep.
pub fn sweep() -> Result<()> {
    sweep_locked(&lock_run_dir()?)
}

/// The directories of labs that were asked to stay, whether their process has ended or not.
pub fn kept() -> Result<Vec<PathBuf>> {
    let _guard = lock_run_dir()?;
    Ok(run_dirs()?.into_iter().filter(|dir| dir.join(KEEP).exists()).collect())
}

/// Removes a kept lab, given its directory; it is an error if its process still runs.
pub fn remove_kept(dir: &Path) -> Result<()> {
    let _guard = lock_run_dir()?;
    ensure!(run_dirs()?.iter().any(|known| known == dir), "{} is no lab", dir.display());
    ensure!(remove_if_dead(dir)?, "the process of lab {} still runs", dir.display());
    Ok(())
}

/// Sweeps, then makes a run directory for a new lab and takes its lock.
pub(super) fn claim(id: &str) -> Result<(PathBuf, File)> {
    let guard = lock_run_dir()?;
    sweep_locked(&guard)?;
    let dir = Path::new(RUN).join(id);
    fs::create_dir(&dir).with_context(|| dir.display().to_string())?;
    let lock = create(&dir.join(LOCK))?;
    lock.lock().with_context(|| format!("locking {}", dir.display()))?;
    Ok((dir, lock))
}

/// Excludes others from making and sweeping as long as the file lives.
fn lock_run_dir() -> Result<File> {
    fs::create_dir_all(RUN).context(RUN)?;
    let file = create(&Path::new(RUN).join(LOCK))?;
    file.lock().with_context(|| format!("locking {RUN}"))?;
    Ok(file)
}

fn create(path: &Path) -> Result<File> {
    File::options().create(true).append(true).open(path).with_context(|| path.display().to_string())
}

fn sweep_locked(_guard: &File) -> Result<()> {
    for dir in run_dirs()?.iter().filter(|dir| !dir.join(KEEP).exists()) {
        if let Err(error) = remove_if_dead(dir) {
            eprintln!("lab {}, left by a dead process: {error:#}", dir.display());
        }
    }
    Ok(())
}

fn run_dirs() -> Result<Vec<PathBuf>> {
    let mut dirs = Vec::new();
    for entry in fs::read_dir(RUN).context(RUN)? {
        let path = entry.context(RUN)?.path();
        if path.is_dir() {
            dirs.push(path);
        }
    }
    Ok(dirs)
}

/// Whether the lab is gone now; one whose process lives is left alone.
fn remove_if_dead(dir: &Path) -> Result<bool> {
    // Held until the lab is gone, so that sweepers exclude each other.
    let lock = match create(&dir.join(LOCK)) {
        // Its own process is just removing it.
        Err(_) if !dir.exists() => return Ok(true),
        lock => lock?,
    };
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(false),
        Err(TryLockError::Error(error)) => {
            return Err(error).with_context(|| format!("locking {}", dir.display()));
        }
    }
    let id = dir.file_name().context("a run directory has a name")?;
    remove(&id.to_string_lossy())?;
    Ok(true)
}

/// What the names of a lab's namespaces begin with. It ends in a dash, so that lab 7-1 does not claim those of 7-10.
pub(super) fn namespace_prefix(id: &str) -> String {
    format!("xlb-{id}-")
}

/// Removes everything that belongs to a lab, its directory last.
pub(super) fn remove(id: &str) -> Result<()> {
    let namespaces = namespaces(id)?;
    kill_processes_in(&namespaces)?;
    if !namespaces.is_empty() {
        let lines: Vec<String> = namespaces.iter().map(|name| format!("netns del {name}")).collect();
        ip_batch(None, &lines)?;
    }
    let dir = Path::new(RUN).join(id);
    for mount in mounts_below(&dir)?.iter().rev() {
        unmount(mount, UnmountFlags::DETACH).with_context(|| format!("unmounting {}", mount.display()))?;
    }
    // Removing a directory with a mount in it would remove the files of what is mounted.
    ensure!(mounts_below(&dir)?.is_empty(), "{} still has mounts", dir.display());
    let mut removed = fs::remove_dir_all(&dir);
    // A sweeper that looks whether this lab is dead makes the lock file anew, in between.
    for _ in 0..50 {
        match &removed {
            Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => {
                std::thread::sleep(Duration::from_millis(10));
                removed = fs::remove_dir_all(&dir);
            }
            _ => break,
        }
    }
    match removed {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", dir.display()))
        }
        _ => Ok(()),
    }
}

fn namespaces(id: &str) -> Result<Vec<String>> {
    let entries = match fs::read_dir(NETNS) {
        // `ip` makes it with the first namespace.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.context(NETNS)?,
    };
    let prefix = namespace_prefix(id);
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.context(NETNS)?.file_name().to_string_lossy().into_owned();
        if name.starts_with(&prefix) {
            names.push(name);
        }
    }
    Ok(names)
}

/// Kills what runs in the namespaces and waits until it is gone: children of killed servers, and programs that a dead
/// lab started.
fn kill_processes_in(namespaces: &[String]) -> Result<()> {
    let inodes: Vec<(u64, u64)> =
        namespaces.iter().filter_map(|name| inode(&Path::new(NETNS).join(name))).collect();
    wait_for("the end of killed processes", Duration::from_secs(5), || {
        let pids = processes_in(&inodes);
        for pid in &pids {
            // It may have ended meanwhile.
            kill_process(*pid, Signal::KILL).ok();
        }
        pids.is_empty()
    })
}

/// Device and inode identify a namespace; the links of zombies and of ended processes lead nowhere.
fn inode(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

fn processes_in(inodes: &[(u64, u64)]) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| pid.unsigned_abs() != std::process::id())
        .filter(|pid| {
            inode(&PathBuf::from(format!("/proc/{pid}/ns/net"))).is_some_and(|inode| inodes.contains(&inode))
        })
        .filter_map(Pid::from_raw)
        .collect()
}

/// Mount points in a directory, in the order of mounting.
fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let path = "/proc/self/mountinfo";
    let text = fs::read_to_string(path).context(path)?;
    let points = text.lines().filter_map(|line| line.split(' ').nth(4));
    Ok(points.map(PathBuf::from).filter(|point| point.starts_with(dir)).collect())
}
