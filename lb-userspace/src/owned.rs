//! Whether a file or directory can have been put there by nobody but its owner. It knows nothing of what is in it.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, Stat, fstat, open};

/// Why a path is not to be trusted.
#[derive(Debug, thiserror::Error)]
pub enum Untrusted {
    #[error("{path} is {found}, and must be {wanted}; remove it")]
    Kind { path: PathBuf, found: &'static str, wanted: &'static str },
    #[error(
        "{path} belongs to user {owner}, and this is user {us}; run xlb as user {owner}, or with another --run-dir"
    )]
    Foreign { path: PathBuf, owner: u32, us: u32 },
    #[error(
        "{path} can be changed by others than its owner (mode {mode:04o}); look at what is in it, then `chmod go-w {path}`"
    )]
    Open { path: PathBuf, mode: u32 },
    #[error("{path} has {links} names, of which others may be anywhere; remove it")]
    Linked { path: PathBuf, links: String },
    #[error("{path}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl Untrusted {
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// Whose files are taken for ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// The files of the process's own user.
    Ours,
    /// Those of the process's own user and of root.
    OursOrRoots,
    /// Those of the process's own user; to root, those of any.
    OursOrAny,
}

impl Whose {
    fn allows(self, owner: u32) -> bool {
        let us = us();
        owner == us
            || match self {
                Self::Ours => false,
                Self::OursOrRoots => owner == 0,
                Self::OursOrAny => us == 0,
            }
    }
}

/// The process's user.
pub fn us() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// A directory that is no symbolic link, belongs to the right user and can be changed by nobody else. What it says of
/// itself.
pub fn directory(path: &Path, whose: Whose) -> Result<Stat, Untrusted> {
    let stat = look(path)?;
    check(path, &stat, whose, FileType::Directory)?;
    Ok(stat)
}

/// Refuses a path that others than root and `whose` could put something else in the place of: each directory on the way
/// must belong to root or the process's user, and be closed to others, or sticky as `/tmp`.
pub fn way_to(path: &Path) -> Result<(), Untrusted> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| Untrusted::Io { path, source }
    };
    let absolute = std::path::absolute(path).map_err(io(path))?;
    let Some(parent) = absolute.parent() else { return Ok(()) };
    let parent = parent.canonicalize().map_err(io(parent))?;
    for directory in parent.ancestors() {
        let metadata = std::fs::symlink_metadata(directory).map_err(io(directory))?;
        let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
        if owner != 0 && owner != us() {
            return Err(Untrusted::Foreign { path: directory.to_owned(), owner, us: us() });
        }
        let sticky = mode & 0o1000 != 0;
        if mode & 0o022 != 0 && !sticky {
            return Err(Untrusted::Open { path: directory.to_owned(), mode });
        }
    }
    Ok(())
}

/// Refuses what is not of this kind, of another user, or open to others.
pub fn check(path: &Path, stat: &Stat, whose: Whose, wanted: FileType) -> Result<(), Untrusted> {
    let path = path.to_owned();
    let found = FileType::from_raw_mode(stat.st_mode);
    if found != wanted {
        return Err(Untrusted::Kind { path, found: name(found), wanted: name(wanted) });
    }
    if !whose.allows(stat.st_uid) {
        return Err(Untrusted::Foreign { path, owner: stat.st_uid, us: us() });
    }
    if stat.st_mode & 0o022 != 0 {
        return Err(Untrusted::Open { path, mode: stat.st_mode & 0o7777 });
    }
    if wanted == FileType::RegularFile && stat.st_nlink > 1 {
        return Err(Untrusted::Linked { path, links: stat.st_nlink.to_string() });
    }
    Ok(())
}

/// What is at the path itself, also if it is a symbolic link.
fn look(path: &Path) -> Result<Stat, Untrusted> {
    // A slash at the end would follow a symbolic link.
    let path: PathBuf = path.components().collect();
    open(&path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        .and_then(fstat)
        .map_err(|errno| Untrusted::Io { path, source: errno.into() })
}

fn name(kind: FileType) -> &'static str {
    match kind {
        FileType::RegularFile => "a file",
        FileType::Directory => "a directory",
        FileType::Symlink => "a symbolic link",
        FileType::Socket => "a socket",
        FileType::Fifo => "a pipe",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        FileType::Unknown => "of an unknown kind",
    }
}
