//! The private bpffs below the run directory: where maps and links are pinned, so that they outlive the agent.

use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::statfs;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::generation::Generation;

/// `BPF_FS_MAGIC` of the kernel's uapi.
const BPF_FS_MAGIC: u32 = 0xcafe_4a11;

#[derive(Debug, Clone)]
pub struct BpfFs {
    path: PathBuf,
}

impl BpfFs {
    /// The bpffs of a run directory, mounted if it is not yet.
    pub fn open(run_dir: &Path) -> io::Result<Self> {
        let this = Self::at(run_dir);
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&this.path)?;
        if !this.is_mounted()? {
            mount(
                "xlb",
                &this.path,
                "bpf",
                MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOSUID,
                c"mode=0700",
            )?;
        }
        let owner = std::fs::metadata(&this.path)?.uid();
        if owner != rustix::process::geteuid().as_raw() {
            let text = format!("it belongs to user {owner}; remove it, or start xlb as that user");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        Ok(this)
    }

    /// The bpffs of a run directory if one is mounted there.
    pub fn existing(run_dir: &Path) -> io::Result<Option<Self>> {
        let this = Self::at(run_dir);
        match this.is_mounted() {
            Ok(mounted) => Ok(mounted.then_some(this)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn at(run_dir: &Path) -> Self {
        Self { path: run_dir.join("bpf") }
    }

    fn is_mounted(&self) -> io::Result<bool> {
        Ok(statfs(&self.path)?.f_type as u32 == BPF_FS_MAGIC)
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

    /// Removes all pins, the mount and its directory.
    pub fn remove(self) -> io::Result<()> {
        for interface in self.linked_interfaces()? {
            std::fs::remove_file(self.link(&interface))?;
        }
        Generation::all(&self)?.iter().try_for_each(Generation::remove)?;
        unmount(&self.path, UnmountFlags::empty())?;
        std::fs::remove_dir(&self.path)
    }
}

const LINK: &str = "link_";
