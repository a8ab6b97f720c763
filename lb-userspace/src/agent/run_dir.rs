//! The run directory and the lock in it: made, trusted and held by one agent. It knows nothing of what agents do.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::{FileType, FlockOperation, OFlags, Stat, fchown, flock, fstat};

use crate::owned::{self, Whose};

const LOCK: &str = "lock";

/// Held while an agent runs, so that there is one. The directory is made if it is not there.
pub fn lock(run_dir: &Path) -> anyhow::Result<File> {
    // A slash at the end would follow a symbolic link.
    let run_dir: &Path = &run_dir.components().collect::<PathBuf>();
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(run_dir)
        .or_else(|error| if run_dir.is_symlink() { Ok(()) } else { Err(error) })
        .with_context(|| format!("the run directory {} cannot be made", run_dir.display()))?;
    hold(run_dir, Whose::Ours)
}

/// The lock of a run directory that is there. To root it may be another user's.
pub fn lock_existing(run_dir: &Path) -> anyhow::Result<File> {
    hold(run_dir, Whose::OursOrAny)
}

fn hold(run_dir: &Path, whose: Whose) -> anyhow::Result<File> {
    owned::way_to(run_dir)?;
    let directory = owned::directory(run_dir, whose)?;
    let mut file = open(run_dir, &directory, whose)?;
    let path = run_dir.join(LOCK);
    let path = path.display();
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut holder = String::new();
        // What it cannot tell stays empty.
        _ = file.read_to_string(&mut holder);
        bail!(
            "another xlb (process {}) runs in {}; stop it, or give this one its own --run-dir",
            holder.trim(),
            run_dir.display()
        );
    }
    let text = format!("{}\n", std::process::id());
    file.set_len(0).and_then(|()| file.write_all(text.as_bytes())).with_context(|| format!("{path}"))?;
    Ok(file)
}

/// Opens the lock, or makes it for the directory's owner. Who may read a file may lock it: nobody else may read this one.
fn open(run_dir: &Path, directory: &Stat, whose: Whose) -> anyhow::Result<File> {
    let path = run_dir.join(LOCK);
    let context = || path.display().to_string();
    let mut options = File::options();
    // A pipe in its place must not block.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    options.read(true).write(true).mode(0o600).custom_flags(flags.bits() as i32);
    let file = match options.open(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let file = options.create_new(true).open(&path).with_context(context)?;
            if directory.st_uid != owned::us() {
                fchown(&file, Some(rustix::fs::Uid::from_raw(directory.st_uid)), None)
                    .with_context(context)?;
            }
            file
        }
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
            bail!("{} is a symbolic link, and must be a file; remove it", path.display())
        }
        opened => opened.with_context(context)?,
    };
    let stat = fstat(&file).with_context(context)?;
    owned::check(&path, &stat, whose, FileType::RegularFile)?;
    if stat.st_uid != directory.st_uid {
        bail!(
            "{} belongs to user {}, its directory to user {}; remove it",
            path.display(),
            stat.st_uid,
            directory.st_uid
        );
    }
    if file.metadata().with_context(context)?.mode() & 0o777 != 0o600 {
        file.set_permissions(std::fs::Permissions::from_mode(0o600)).with_context(context)?;
    }
    Ok(file)
}
