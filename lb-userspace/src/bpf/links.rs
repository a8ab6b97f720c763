//! Interfaces: attached by bpf_link, swapped on the live link, pinned. Knows nothing of tables.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::xdp::{XdpLink, XdpLinkId};
use aya::programs::{ProgramError, Xdp, XdpMode};
use lb_common::abi::Interface;
use lb_common::wire::Mac;

use super::bpffs::BpfFs;
use super::ethtool;
use super::holder::holder;
use super::program::{Datapath, DatapathError};
use crate::config::model::Mode;
use crate::nexthop::Link;

/// The kernel frees a link after an RCU grace period, in a work queue: milliseconds, more where it is busy.
const FREED_WITHIN: Duration = Duration::from_secs(1);
const FREED_STEP: Duration = Duration::from_millis(2);

/// An interface that carries the program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// As the configuration calls it; its pin is named so.
    pub name: String,
    /// As the kernel calls it.
    pub interface: String,
    pub ifindex: u32,
    pub generic: bool,
}

impl Attached {
    pub const fn mode(&self) -> &'static str {
        if self.generic { "generic" } else { "native" }
    }
}

/// The links of all interfaces. They are pinned, and held open as well: a pin that somebody removes takes the
/// program off nothing while the agent lives.
#[derive(Debug)]
pub struct Links {
    fs: BpfFs,
    held: HashMap<String, FdLink>,
}

impl Links {
    pub fn new(fs: BpfFs) -> Self {
        Self { fs, held: HashMap::new() }
    }

    /// Interfaces whose link is pinned or held: they carry the program, or did before they went.
    pub fn known(&self) -> Result<Vec<String>, DatapathError> {
        let mut names = self.fs.linked_interfaces().map_err(|source| fs_error(&self.fs, source))?;
        names.extend(self.held.keys().cloned());
        names.sort();
        names.dedup();
        Ok(names)
    }

    /// Puts the program on an interface: onto its link if it has one, else on a new one.
    pub fn attach(
        &mut self,
        datapath: &mut Datapath,
        name: &str,
        link: &Link,
        mode: Mode,
    ) -> Result<Attached, DatapathError> {
        let mac = link.mac.ok_or_else(|| DatapathError::NoMac { interface: link.name.clone() })?;
        self.adopt_alias(name, link)?;
        let fits = match mode {
            Mode::Auto => true,
            Mode::Native => !link.xdp_generic,
            Mode::Generic => link.xdp_generic,
        };
        let open = self.open(name)?;
        let carried = open.as_ref().and_then(ifindex_of) == Some(link.ifindex);
        let swapped = match open {
            Some(open) if fits && carried => self.swap(datapath.program()?, name, link, open)?,
            // Of another mode, or of a device that has gone. An open link would keep the interface busy.
            other => {
                drop(other);
                false
            }
        };
        let generic = if swapped {
            link.xdp_generic
        } else {
            // With its pin the old link goes, if there is one.
            self.unpin(name)?;
            let program = datapath.program()?;
            let attached = self.attach_new(program, name, link, mode, carried);
            if carried && attached.is_err() {
                self.attach_as_before(program, name, link);
            }
            attached?
        };
        let known = datapath.maps.interface(link.ifindex);
        let mut flags = known.map_or(0, |known| known.flags) & Interface::RESTORE_GRO;
        if generic {
            flags |= Interface::GENERIC;
            flags |= if turn_gro_off(&link.name) { Interface::RESTORE_GRO } else { 0 };
        } else if flags & Interface::RESTORE_GRO != 0 {
            restore_gro(&link.name);
            flags = 0;
        }
        let row = Interface { mac: Mac::from_bytes(mac).bits(), mtu: link.mtu, flags };
        datapath.maps.set_interface(link.ifindex, row)?;
        let (name, interface) = (name.to_owned(), link.name.clone());
        Ok(Attached { name, interface, ifindex: link.ifindex, generic })
    }

    /// Takes the program off an interface: `link` is the interface, if there is one of that name.
    pub fn detach(
        &mut self,
        datapath: &mut Datapath,
        name: &str,
        link: Option<&Link>,
    ) -> Result<(), DatapathError> {
        self.held.remove(name);
        self.unpin(name)?;
        let Some(link) = link else { return Ok(()) };
        let row = datapath.maps.interface(link.ifindex);
        datapath.maps.remove_interface(link.ifindex)?;
        if row.is_some_and(|row| row.flags & Interface::RESTORE_GRO != 0) {
            restore_gro(&link.name);
        }
        Ok(())
    }

    /// Lets go of an interface that is no longer in this network namespace. Its pin stays if it was deleted,
    /// as a mark that it is to be attached when it is back. Where it has moved to another namespace, in which our
    /// tables say nothing, the program is taken off it. Returns whether it had moved.
    pub fn lose(&mut self, name: &str) -> Result<bool, DatapathError> {
        let moved = self.open(name)?.as_ref().and_then(ifindex_of).is_some();
        if moved {
            self.unpin(name)?;
        }
        Ok(moved)
    }

    /// Where the link of this name is: an index of 0 where its device has gone.
    pub fn ifindex(&mut self, name: &str) -> Result<Option<u32>, DatapathError> {
        let Some(open) = self.open(name)? else { return Ok(None) };
        let ifindex = ifindex_of(&open).unwrap_or(0);
        self.held.insert(name.to_owned(), open);
        Ok(Some(ifindex))
    }

    /// Where the link of this name is, and the id of its program.
    pub fn place(&mut self, name: &str) -> Result<Option<(u32, u32)>, DatapathError> {
        let Some(ifindex) = self.ifindex(name)? else { return Ok(None) };
        let info = self.held.get(name).and_then(|held| held.info().ok());
        Ok(info.map(|info| (ifindex, info.program_id())))
    }

    /// Pins a link again whose pin somebody has removed. Returns whether that was so.
    pub fn pin_again(&mut self, attached: &Attached) -> Result<bool, DatapathError> {
        let path = self.fs.link(&attached.name);
        if path.exists() || !self.held.contains_key(&attached.name) {
            return Ok(false);
        }
        self.fs.check_pin(&path).map_err(|source| fs_error(&self.fs, source))?;
        let Some(open) = self.held.remove(&attached.name) else { return Ok(false) };
        let pinned = open.pin(&path).map_err(|error| pin_error(&attached.interface, &path, error))?;
        self.held.insert(attached.name.clone(), pinned.into());
        Ok(true)
    }

    /// The held link, or the pinned one. The caller has to hold it again.
    fn open(&mut self, name: &str) -> Result<Option<FdLink>, DatapathError> {
        if let Some(held) = self.held.remove(name) {
            return Ok(Some(held));
        }
        let path = self.fs.link(name);
        if !path.exists() {
            return Ok(None);
        }
        match PinnedLink::from_pin(&path) {
            Ok(pinned) => Ok(Some(pinned.into())),
            Err(error) => Err(pin_error(name, &path, error)),
        }
    }

    fn unpin(&self, name: &str) -> Result<(), DatapathError> {
        match std::fs::remove_file(self.fs.link(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(fs_error(&self.fs, error)),
            _ => Ok(()),
        }
    }

    /// The configuration may call an interface by another name than before.
    fn adopt_alias(&mut self, name: &str, link: &Link) -> Result<(), DatapathError> {
        if self.held.contains_key(name) || self.fs.link(name).exists() {
            return Ok(());
        }
        for other in self.known()? {
            if self.ifindex(&other)? == Some(link.ifindex) {
                std::fs::rename(self.fs.link(&other), self.fs.link(name))
                    .map_err(|source| fs_error(&self.fs, source))?;
                if let Some(held) = self.held.remove(&other) {
                    self.held.insert(name.to_owned(), held);
                }
            }
        }
        Ok(())
    }

    /// Swaps the program on a live link: not a packet is missed. False if its device has gone just now.
    fn swap(
        &mut self,
        program: &mut Xdp,
        name: &str,
        link: &Link,
        open: FdLink,
    ) -> Result<bool, DatapathError> {
        fail_point!("swap");
        let path = self.fs.link(name);
        let xdp_link =
            XdpLink::try_from(open).map_err(|error: LinkError| pin_error(&link.name, &path, error))?;
        let id = match program.attach_to_link(xdp_link) {
            Ok(id) => id,
            Err(error) if errno(&error) == Some(libc::ENOLINK) => return Ok(false),
            Err(error) => return Err(attach_error(link, Mode::Auto, error)),
        };
        // Out of the program's hands: the link outlives it.
        let owned = program.take_link(id).map_err(|error| attach_error(link, Mode::Auto, error))?;
        let open = FdLink::try_from(owned).map_err(|error: LinkError| pin_error(&link.name, &path, error))?;
        self.hold(name, link, open)?;
        Ok(true)
    }

    /// Attaches and pins. Returns whether the mode is generic. With `freed`, our own link has just been let go: the kernel
    /// frees it aside, and the interface is taken until then.
    fn attach_new(
        &mut self,
        program: &mut Xdp,
        name: &str,
        link: &Link,
        mode: Mode,
        freed: bool,
    ) -> Result<bool, DatapathError> {
        fail_point!("attach");
        let deadline = Instant::now() + if freed { FREED_WITHIN } else { Duration::ZERO };
        let (id, generic) = loop {
            match try_attach(program, link, mode) {
                Err(error) if is_busy(&error) && Instant::now() < deadline => {
                    std::thread::sleep(FREED_STEP);
                }
                Err(error) => return Err(attach_error(link, mode, error)),
                Ok(attached) => break attached,
            }
        };
        let owned = program.take_link(id).map_err(|error| attach_error(link, mode, error))?;
        let open = FdLink::try_from(owned)
            .map_err(|_: LinkError| DatapathError::NoLink { interface: link.name.clone() })?;
        fail_point!("pin");
        // Without a pin it would end with the agent.
        self.hold(name, link, open).inspect_err(|_| drop(self.held.remove(name)))?;
        Ok(generic)
    }

    /// Traffic goes on in the mode of before where another one is not to be had.
    fn attach_as_before(&mut self, program: &mut Xdp, name: &str, link: &Link) {
        let mode = if link.xdp_generic { Mode::Generic } else { Mode::Native };
        if let Err(error) = self.attach_new(program, name, link, mode, true) {
            let error = format!("{:#}", anyhow::Error::from(error));
            tracing::warn!(interface = %link.name, %error, "not attached in the mode of before either");
        }
    }

    fn hold(&mut self, name: &str, link: &Link, open: FdLink) -> Result<(), DatapathError> {
        let path = self.fs.link(name);
        let open = if path.exists() {
            open
        } else if let Err(source) = self.fs.check_pin(&path) {
            self.held.insert(name.to_owned(), open);
            return Err(fs_error(&self.fs, source));
        } else {
            open.pin(&path).map_err(|error| pin_error(&link.name, &path, error))?.into()
        };
        self.held.insert(name.to_owned(), open);
        Ok(())
    }
}

/// Removes the links' pins, which detaches, and gives interfaces back what was changed. Returns the interfaces.
pub(super) fn detach_all(
    fs: &BpfFs,
    links: &[Link],
    rows: impl Fn(u32) -> Option<Interface>,
) -> io::Result<Vec<String>> {
    let names = fs.linked_interfaces()?;
    let mut detached = Vec::new();
    for name in &names {
        let path = fs.link(name);
        let open = PinnedLink::from_pin(&path).ok().map(FdLink::from);
        let link = open.as_ref().and_then(|open| links.iter().find(|link| carries(link, open)));
        drop(open);
        std::fs::remove_file(&path)?;
        if let Some(link) = link
            && rows(link.ifindex).is_some_and(|row| row.flags & Interface::RESTORE_GRO != 0)
        {
            restore_gro(&link.name);
        }
        detached.push(link.map_or_else(|| name.clone(), |link| link.name.clone()));
    }
    Ok(detached)
}

/// Whether the interface is the link's: in another network namespace the same index is another interface.
fn carries(interface: &Link, link: &FdLink) -> bool {
    let program = link.info().ok().map(|info| info.program_id());
    ifindex_of(link) == Some(interface.ifindex) && program == interface.xdp_program
}

/// The interface of a link, nothing where its device has gone. The kernel tells by the descriptor's entry in
/// /proc (`bpf_xdp_link_show_fdinfo`, 5.9).
fn ifindex_of(link: &FdLink) -> Option<u32> {
    let id = link.info().ok()?.id().to_string();
    let entries = std::fs::read_dir("/proc/self/fdinfo").ok()?;
    let texts = entries.flatten().filter_map(|entry| std::fs::read_to_string(entry.path()).ok());
    let text = texts.into_iter().find(|text| fdinfo(text, "link_id") == Some(&id))?;
    fdinfo(&text, "ifindex")?.parse().ok().filter(|ifindex| *ifindex != 0)
}

/// A field of an entry in /proc/PID/fdinfo.
pub(super) fn fdinfo<'t>(text: &'t str, field: &str) -> Option<&'t str> {
    text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).map(str::trim)
}

fn fs_error(fs: &BpfFs, source: io::Error) -> DatapathError {
    DatapathError::BpfFs { path: fs.path().display().to_string(), source }
}

fn pin_error(
    interface: &str,
    path: &Path,
    error: impl std::error::Error + Send + Sync + 'static,
) -> DatapathError {
    DatapathError::Pin {
        interface: interface.to_owned(),
        path: path.display().to_string(),
        source: Box::new(error),
    }
}

fn errno(error: &ProgramError) -> Option<i32> {
    match error {
        ProgramError::SyscallError(error) => error.io_error.raw_os_error(),
        _ => None,
    }
}

/// In the mode that is asked for, or in the one that is to be had. Returns whether it is generic.
fn try_attach(program: &mut Xdp, link: &Link, mode: Mode) -> Result<(XdpLinkId, bool), ProgramError> {
    let wanted = if mode == Mode::Generic { XdpMode::Skb } else { XdpMode::Driver };
    match program.attach_to_if_index(link.ifindex, wanted) {
        Err(error) if mode == Mode::Auto && is_native_refusal(&error) => {
            let reason = attach_error(link, Mode::Native, error);
            tracing::warn!(interface = %link.name, %reason, "native XDP is not to be had; running in generic mode, which is several times slower");
            Ok((program.attach_to_if_index(link.ifindex, XdpMode::Skb)?, true))
        }
        attached => Ok((attached?, mode == Mode::Generic)),
    }
}

fn is_busy(error: &ProgramError) -> bool {
    matches!(errno(error), Some(libc::EBUSY | libc::EEXIST))
}

/// The driver says no to native XDP, not to XDP.
fn is_native_refusal(error: &ProgramError) -> bool {
    matches!(errno(error), Some(libc::EOPNOTSUPP | libc::ERANGE | libc::EINVAL | libc::ENOSPC | libc::E2BIG))
}

fn attach_error(link: &Link, mode: Mode, error: ProgramError) -> DatapathError {
    let interface = link.name.clone();
    match errno(&error) {
        _ if is_busy(&error) => DatapathError::Busy { holder: holder(link), interface },
        Some(libc::ERANGE) => DatapathError::Mtu { interface, mtu: link.mtu },
        Some(libc::EOPNOTSUPP) if mode == Mode::Native => DatapathError::NoNative { interface },
        _ => DatapathError::Attach { interface, source: Box::new(error) },
    }
}

/// Turns GRO off. Whether it was on, and is to be turned on again.
fn turn_gro_off(interface: &str) -> bool {
    match ethtool::gro(interface) {
        Ok(true) => match ethtool::set_gro(interface, false) {
            Ok(()) => {
                tracing::info!(interface, "GRO turned off: generic XDP would see merged frames");
                true
            }
            Err(error) => {
                tracing::warn!(interface, %error, "GRO cannot be turned off; merged frames will be dropped as drop_super_frame");
                false
            }
        },
        Ok(false) => false,
        Err(error) => {
            tracing::warn!(interface, %error, "the state of GRO cannot be read");
            false
        }
    }
}

fn restore_gro(interface: &str) {
    if let Err(error) = ethtool::set_gro(interface, true) {
        tracing::warn!(interface, %error, "GRO cannot be turned on again");
    }
}
