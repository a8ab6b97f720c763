//! The API's unix socket: where it is, and who may open it.

use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use nix::unistd::{Gid, Group as HostGroup};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use tokio::net::UnixListener;

use crate::config::Problem;
use crate::config::model::{Api, Group};
use crate::owned;

/// The socket's name in the run directory.
pub const SOCKET: &str = "xlb.sock";

/// Connections that wait to be accepted; more are refused (EAGAIN).
const BACKLOG: i32 = 1024;

/// The bound socket, readable and writable for its owner and group.
#[derive(Debug)]
pub struct Socket {
    pub(super) listener: UnixListener,
    pub(super) path: PathBuf,
}

impl Socket {
    /// Binds, over what an agent that died has left. The caller holds the lock that says there is no other. Only the
    /// owner may open the socket until it is given to a group.
    pub fn bind(path: &Path) -> anyhow::Result<Self> {
        match std::fs::symlink_metadata(path) {
            Ok(left) if left.file_type().is_socket() && left.uid() == owned::us() => {
                std::fs::remove_file(path)?;
            }
            Ok(_) => {
                bail!(
                    "{} is in the way of the API socket and is no socket of ours; remove it",
                    path.display()
                )
            }
            Err(_) => {}
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // The file that bind makes has the mode of the socket, whatever the umask leaves of it: there is no moment in
        // which others may open it (kernel 6.18, `unix_bind_bsd`).
        rustix::fs::fchmod(&socket, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)?;
        bind(&socket, &SocketAddrUnix::new(path)?).with_context(|| format!("{}", path.display()))?;
        listen(&socket, BACKLOG)?;
        let listener = UnixListener::from_std(socket.into())?;
        Ok(Self { listener, path: path.to_owned() })
    }
}

/// Gives the socket to a group.
pub(super) fn give(path: &Path, group: Gid) -> anyhow::Result<()> {
    let give = || {
        // A mode for a group that is about to be replaced would be for the wrong one.
        if std::fs::symlink_metadata(path)?.gid() != group.as_raw() {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
            chown(path, None, Some(group.as_raw()))?;
        }
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))
    };
    give().with_context(|| format!("{} cannot be given to group {group}", path.display()))
}

/// The group of the configuration as this host knows it; the process's own where none is written.
pub fn group(api: &Api) -> Result<Gid, Problem> {
    let Some(written) = &api.group else { return Ok(nix::unistd::getegid()) };
    let (found, name) = match &written.value {
        // A number needs no entry.
        Group::Id(id) => return Ok(Gid::from_raw(*id)),
        Group::Name(name) => (HostGroup::from_name(name), name),
    };
    match found {
        Ok(Some(group)) => Ok(group.gid),
        Ok(None) => Err(written.problem(
            format!("this host has no group {name}"),
            format!("make it (`groupadd {name}`), or name one that `getent group` shows"),
        )),
        Err(error) => Err(written.problem(
            format!("the group {name} cannot be looked up: {error}"),
            "write its number".to_owned(),
        )),
    }
}
