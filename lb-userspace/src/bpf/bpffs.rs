//! The private bpffs below the run directory: where maps and links are pinned, so that they outlive the agent.

use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Stat, major, minor, statfs};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::generation::Generation;
use super::mounts::{self, Outlives};
use crate::owned::{self, Untrusted, Whose};

/// `BPF_FS_MAGIC` of the kernel's uapi.
const BPF_FS_MAGIC: u32 = 0xcafe_4a11;

/// What xlb calls what it mounted itself. Mounts of others it leaves in place.
const SOURCE: &str = "xlb";

/// Why a bpffs cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BpfFsError {
    #[error(transparent)]
    Untrusted(#[from] Untrusted),
    #[error("{path}: mounting needs CAP_SYS_ADMIN; as root, once: {}", mount_command(path))]
    MayNotMount { path: PathBuf },
    #[error(
        "{path}: this process has mounts of its own, as `ip netns exec` and `unshare -m` make them, and what is pinned there would go with its last process, traffic with it; enter the network only (`nsenter --net=/run/netns/NAME xlb run ...`), or mount it outside before: {}",
        mount_command(path)
    )]
    Private { path: PathBuf },
    #[error("pin {path} {what}; if `xlb detach` does not remove it, unmount the bpffs (traffic stops)")]
    Planted { path: PathBuf, what: String },
    #[error("{path}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// The command that mounts a bpffs for the user of this process.
fn mount_command(path: &Path) -> String {
    let us = owned::us();
    let path = path.display();
    let owner = if us == 0 { String::new() } else { format!(" && chown {us} {path}") };
    format!("`mkdir -p {path} && mount -t bpf -o nosuid,nodev,noexec,mode=0700 bpf {path}{owner}`")
}

#[derive(Debug, Clone)]
pub struct BpfFs {
    path: PathBuf,
}

impl BpfFs {
    /// The bpffs of a run directory, mounted if it is not yet. Nobody but the process's user can have put something
    /// there, and it stays when this process has ended.
    pub fn open(run_dir: &Path) -> Result<Self, BpfFsError> {
        let this = Self::at(run_dir);
        let error = |source| BpfFsError::Io { path: this.path.clone(), source };
        match std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&this.path) {
            // Something else is there: a look at it says what.
            Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.map_err(error)?,
        }
        // What is mounted over a directory of root's hides it.
        owned::directory(&this.path, Whose::OursOrRoots)?;
        let mounts = !this.is_mounted().map_err(error)?;
        if mounts {
            this.mount()?;
        }
        let stat = owned::directory(&this.path, Whose::Ours)?;
        if let Err(refused) = this.refuse_private(&stat) {
            if mounts {
                unmount(&this.path, UnmountFlags::empty()).map_err(|errno| error(errno.into()))?;
                std::fs::remove_dir(&this.path).map_err(error)?;
            }
            return Err(refused);
        }
        check_pins(&this.path, stat.st_dev)?;
        Ok(this)
    }

    /// The bpffs of a run directory if one is mounted there. To root it may be another user's.
    pub fn existing(run_dir: &Path) -> Result<Option<Self>, BpfFsError> {
        let this = Self::at(run_dir);
        match owned::directory(&this.path, Whose::OursOrAny) {
            Err(error) if error.is_not_found() => return Ok(None),
            looked => looked?,
        };
        match this.is_mounted() {
            Ok(mounted) => Ok(mounted.then_some(this)),
            Err(source) => Err(BpfFsError::Io { path: this.path, source }),
        }
    }

    fn mount(&self) -> Result<(), BpfFsError> {
        let flags = MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOSUID;
        mount(SOURCE, &self.path, "bpf", flags, c"mode=0700").map_err(|errno| match errno {
            rustix::io::Errno::PERM | rustix::io::Errno::ACCESS => {
                BpfFsError::MayNotMount { path: self.path.clone() }
            }
            _ => BpfFsError::Io { path: self.path.clone(), source: errno.into() },
        })
    }

    /// Refuses a mount that goes with the mount namespace of this process.
    fn refuse_private(&self, stat: &Stat) -> Result<(), BpfFsError> {
        let path = &self.path;
        match mounts::outlives((major(stat.st_dev), minor(stat.st_dev))) {
            Ok(Outlives::Yes) => Ok(()),
            Ok(Outlives::No) => Err(BpfFsError::Private { path: path.clone() }),
            Ok(Outlives::Unknown(reason)) => {
                tracing::warn!(
                    path = %path.display(),
                    %reason,
                    "it cannot be seen whether this mount outlives the agent, and traffic with it; see if root finds it in /proc/1/mountinfo"
                );
                Ok(())
            }
            Err(source) => Err(BpfFsError::Io { path: "/proc/self/mountinfo".into(), source }),
        }
    }

    fn at(run_dir: &Path) -> Self {
        Self { path: run_dir.join("bpf") }
    }

    fn is_mounted(&self) -> io::Result<bool> {
        Ok(statfs(&self.path)?.f_type as u32 == BPF_FS_MAGIC)
    }

    /// Whether it is still there: somebody may have unmounted it.
    pub fn check_mounted(&self) -> io::Result<()> {
        match self.is_mounted() {
            Ok(true) => Ok(()),
            _ => Err(io::Error::other(format!(
                "no longer mounted; interfaces that are attached forward while this agent lives; mount it again: {}",
                mount_command(&self.path)
            ))),
        }
    }

    /// Whether something can be pinned at a path. A link that is pinned in vain is closed, and with it its program is off:
    /// a directory is tried first.
    pub fn check_pin(&self, path: &Path) -> io::Result<()> {
        self.check_mounted()?;
        std::fs::create_dir(path)?;
        std::fs::remove_dir(path)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the link of an interface is pinned, by the name that the configuration gives it. Pins may not
    /// contain dots (kernel 6.18, `bpf_lookup`).
    pub fn link(&self, interface: &str) -> PathBuf {
        self.path.join(format!("{LINK}{}", interface.replace('.', "%2E")))
    }

    /// Interfaces whose link is pinned here, by those names.
    pub fn linked_interfaces(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path)? {
            if let Some(name) = entry?.file_name().to_str().and_then(|name| name.strip_prefix(LINK)) {
                names.push(name.replace("%2E", "."));
            }
        }
        names.sort();
        Ok(names)
    }

    /// Whether anything of ours is pinned here.
    pub fn is_used(&self) -> io::Result<bool> {
        Ok(!self.linked_interfaces()?.is_empty() || !Generation::all(self)?.is_empty())
    }

    /// Removes all pins, and the mount with its directory where xlb mounted it. Whether the mount is left.
    pub fn remove(self) -> io::Result<bool> {
        for interface in self.linked_interfaces()? {
            std::fs::remove_file(self.link(&interface))?;
        }
        Generation::all(&self)?.iter().try_for_each(Generation::remove)?;
        if !self.is_own_mount()? {
            return Ok(true);
        }
        match unmount(&self.path, UnmountFlags::empty()) {
            Ok(()) => std::fs::remove_dir(&self.path).map(|()| false),
            Err(rustix::io::Errno::PERM) => Ok(true),
            Err(errno) => Err(errno.into()),
        }
    }

    fn is_own_mount(&self) -> io::Result<bool> {
        let device = std::fs::metadata(&self.path)?.dev();
        let mountinfo = std::fs::read_to_string("/proc/self/mountinfo")?;
        let mount = mounts::find_bpf(&mountinfo, (major(device), minor(device)));
        Ok(mount.is_some_and(|mount| mount.source == SOURCE))
    }
}

const LINK: &str = "link_";
/// What the kernel itself puts into each bpffs, as root, ends so.
const KERNELS: &str = ".debug";

/// Refuses what another user has pinned, and what is no pin of this file system.
fn check_pins(directory: &Path, device: u64) -> Result<(), BpfFsError> {
    let error = |path: &Path, source| BpfFsError::Io { path: path.to_owned(), source };
    for entry in std::fs::read_dir(directory).map_err(|source| error(directory, source))? {
        let entry = entry.map_err(|source| error(directory, source))?;
        let path = entry.path();
        // Of the entry itself, also if it is a symbolic link.
        let found = entry.metadata().map_err(|source| error(&path, source))?;
        let planted = |what: String| BpfFsError::Planted { path: path.clone(), what };
        if entry.file_name().to_str().is_some_and(|name| name.ends_with(KERNELS)) {
            continue;
        }
        if found.uid() != owned::us() {
            return Err(planted(format!(
                "belongs to user {}, and this is user {}",
                found.uid(),
                owned::us()
            )));
        }
        if found.dev() != device {
            return Err(planted("is of another file system".to_owned()));
        }
        if found.mode() & 0o022 != 0 && !found.is_symlink() {
            return Err(planted("can be changed by others than its owner".to_owned()));
        }
        if found.is_dir() {
            check_pins(&path, device)?;
        } else if !found.is_file() {
            return Err(planted("is a symbolic link".to_owned()));
        }
    }
    Ok(())
}
