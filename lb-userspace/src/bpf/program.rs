//! The balancer program: loaded with its constants, attached by bpf_link, pinned.

use std::io;
use std::path::Path;

use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::xdp::XdpLink;
use aya::programs::{ProgramError, TestRun, TestRunOptions, Xdp, XdpMode};
use aya::{Ebpf, EbpfError, EbpfLoader};
use lb_common::abi::{ABI_VERSION, Constants, Features, Interface, Meta, constant};
use lb_common::flow::{self, HASH_VERSION};
use lb_common::wire::Mac;

use super::bpffs::BpfFs;
use super::ethtool;
use super::maps::{Maps, MapsError};
use crate::capacity::Capacity;
use crate::config::model::Mode;
use crate::nexthop::Link;
use crate::tables::maglev::TABLE_VERSION;

const PROGRAM: &str = "balancer";

#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    #[error("the BPF file system at {path}")]
    BpfFs {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Maps(#[from] MapsError),
    #[error("the balancer program cannot be loaded")]
    Load(#[source] Box<EbpfError>),
    #[error("the kernel refused the balancer program")]
    Program(#[source] Box<ProgramError>),
    #[error(
        "{interface}: another XDP program is attached{holder}; xlb never replaces it: detach it, or take {interface} out of `interfaces`"
    )]
    Busy { interface: String, holder: String },
    #[error(
        "{interface}: native XDP is not possible with this MTU: a frame must fit one page, at both ends of a veth ({interface} has {mtu}); lower the larger MTU, or use mode: generic"
    )]
    Mtu { interface: String, mtu: u32 },
    #[error("{interface}: its driver has no native XDP; use mode: auto or mode: generic")]
    NoNative { interface: String },
    #[error(
        "{interface}: XDP was attached without a bpf_link, which does not survive the agent; xlb needs kernel 5.9 or newer"
    )]
    NoLink { interface: String },
    #[error("{interface}: attaching failed")]
    Attach {
        interface: String,
        #[source]
        source: Box<ProgramError>,
    },
    #[error("{interface}: its link cannot be pinned at {path}")]
    Pin {
        interface: String,
        path: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("the program's log cannot be read")]
    Trace(#[from] aya_log::Error),
    #[error("{interface}: its MAC address is not known; XDP needs an Ethernet interface")]
    NoMac { interface: String },
}

/// An interface that carries the program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    pub name: String,
    pub ifindex: u32,
    pub generic: bool,
}

/// The program with its maps.
pub struct Datapath {
    fs: BpfFs,
    capacity: Capacity,
    ebpf: Ebpf,
    pub maps: Maps,
    meta: Meta,
    /// Whether the maps were there before.
    pub adopted: bool,
}

impl std::fmt::Debug for Datapath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Datapath").field("fs", &self.fs).field("meta", &self.meta).finish_non_exhaustive()
    }
}

impl Datapath {
    /// Loads the program over the pinned maps of `fs`, which are made if there are none. It has the features that
    /// the tables of an earlier agent need as well; [`Self::refit`] takes them out when the tables have changed.
    pub fn open(fs: BpfFs, capacity: Capacity, seed: u64, features: Features) -> Result<Self, DatapathError> {
        let pinned = Maps::pinned(&fs, &capacity)?;
        let features = pinned.map_or(features, |before| features.with(Features::from_bits(before.features)));
        let meta = Meta {
            abi_version: ABI_VERSION,
            hash_version: HASH_VERSION,
            table_version: TABLE_VERSION,
            seed,
            features: features.bits(),
            ..Meta::default()
        };
        let mut ebpf = load(&fs, &capacity, &meta)?;
        let maps = Maps::take(&mut ebpf, &capacity)?;
        let adopted = pinned.is_some();
        if adopted {
            maps.set_meta(&meta);
        } else {
            maps.initialise(&meta);
        }
        Ok(Self { fs, capacity, ebpf, maps, meta, adopted })
    }

    /// Loads the program again if it lacks a feature or has another seed; attached interfaces must be
    /// attached again then, which swaps the program on the live link.
    pub fn refit(&mut self, seed: u64, features: Features) -> Result<bool, DatapathError> {
        if self.meta.seed == seed && self.meta.features == features.bits() {
            return Ok(false);
        }
        let meta = Meta { seed, features: features.bits(), ..self.meta };
        self.ebpf = load(&self.fs, &self.capacity, &meta)?;
        self.maps.set_meta(&meta);
        self.meta = meta;
        Ok(true)
    }

    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    /// Puts the program on an interface: onto its pinned link if there is one, else on a new one.
    pub fn attach(&mut self, link: &Link, mode: Mode) -> Result<Attached, DatapathError> {
        let mac = link.mac.ok_or_else(|| DatapathError::NoMac { interface: link.name.clone() })?;
        let known = self.maps.interface(link.ifindex);
        let was_generic = known.is_some_and(|known| known.flags & Interface::GENERIC != 0);
        let fits = match mode {
            Mode::Auto => true,
            Mode::Native => !was_generic,
            Mode::Generic => was_generic,
        };
        let pinned = self.pinned_link(link)?;
        let swapped = match pinned {
            Some(pinned) if fits && known.is_some() => self.swap(link, pinned)?,
            // Of another mode, or of a device that is gone. An open link would keep the interface busy.
            other => {
                drop(other);
                false
            }
        };
        let generic = if swapped {
            was_generic
        } else {
            // With its pin the old link goes, if there is one.
            remove_file_if_there(&self.fs.link(&link.name)).map_err(|source| self.fs_error(source))?;
            self.attach_new(link, mode)?
        };
        let mut flags = known.map_or(0, |known| known.flags) & Interface::RESTORE_GRO;
        if generic {
            flags |= Interface::GENERIC;
            flags |= if turn_gro_off(&link.name) { Interface::RESTORE_GRO } else { 0 };
        } else if flags & Interface::RESTORE_GRO != 0 {
            restore_gro(&link.name);
            flags = 0;
        }
        let row = Interface { mac: Mac::from_bytes(mac).bits(), mtu: link.mtu, flags };
        self.maps.set_interface(link.ifindex, row)?;
        Ok(Attached { name: link.name.clone(), ifindex: link.ifindex, generic })
    }

    /// Takes the program off an interface that is no longer configured.
    pub fn detach(&mut self, interface: &str, ifindex: u32) -> Result<(), DatapathError> {
        let restore = self.maps.interface(ifindex).is_some_and(|row| row.flags & Interface::RESTORE_GRO != 0);
        remove_file_if_there(&self.fs.link(interface)).map_err(|source| self.fs_error(source))?;
        self.maps.remove_interface(ifindex)?;
        if restore {
            restore_gro(interface);
        }
        Ok(())
    }

    /// Interfaces whose link is pinned: they carry the program, or did before they went.
    pub fn linked_interfaces(&self) -> Result<Vec<String>, DatapathError> {
        self.fs.linked_interfaces().map_err(|source| self.fs_error(source))
    }

    pub fn fs(&self) -> &BpfFs {
        &self.fs
    }

    /// Runs the program on a frame of 14 bytes or more, as if it came in on the loopback interface:
    /// the XDP verdict, and the bytes of `out` that the frame takes afterwards. Counts like any run.
    pub fn test_run(&mut self, frame: &[u8], out: &mut [u8]) -> Result<(u32, usize), DatapathError> {
        test_run(self.program()?, frame, out).map_err(|error| DatapathError::Program(Box::new(error)))
    }

    fn fs_error(&self, source: io::Error) -> DatapathError {
        DatapathError::BpfFs { path: self.fs.path().display().to_string(), source }
    }

    fn program(&mut self) -> Result<&mut Xdp, DatapathError> {
        let program = self.ebpf.program_mut(PROGRAM).ok_or(MapsError::Missing(PROGRAM))?;
        program.try_into().map_err(|error| DatapathError::Program(Box::new(error)))
    }

    fn pinned_link(&self, link: &Link) -> Result<Option<FdLink>, DatapathError> {
        let path = self.fs.link(&link.name);
        if !path.exists() {
            return Ok(None);
        }
        match PinnedLink::from_pin(&path) {
            Ok(pinned) => Ok(Some(pinned.into())),
            Err(error) => Err(pin_error(link, &path, error)),
        }
    }

    /// Swaps the program on a live link: not a packet is missed. False if the link is dead: its device
    /// went away, and may be back.
    fn swap(&mut self, link: &Link, pinned: FdLink) -> Result<bool, DatapathError> {
        let path = self.fs.link(&link.name);
        let xdp_link = XdpLink::try_from(pinned).map_err(|error: LinkError| pin_error(link, &path, error))?;
        let program = self.program()?;
        let id = match program.attach_to_link(xdp_link) {
            Ok(id) => id,
            Err(error) if errno(&error) == Some(libc::ENOLINK) => return Ok(false),
            Err(error) => return Err(attach_error(link, Mode::Auto, error)),
        };
        // The pin holds the link; this handle must not detach it when it goes.
        let owned = program.take_link(id).map_err(|error| attach_error(link, Mode::Auto, error))?;
        drop(FdLink::try_from(owned).map_err(|error: LinkError| pin_error(link, &path, error))?);
        Ok(true)
    }

    /// Attaches and pins. Returns whether the mode is generic.
    fn attach_new(&mut self, link: &Link, mode: Mode) -> Result<bool, DatapathError> {
        let path = self.fs.link(&link.name);
        let program = self.program()?;
        let native = match mode {
            Mode::Auto | Mode::Native => program.attach_to_if_index(link.ifindex, XdpMode::Driver),
            Mode::Generic => program.attach_to_if_index(link.ifindex, XdpMode::Skb),
        };
        let (id, generic) = match native {
            Ok(id) => (id, mode == Mode::Generic),
            Err(error) if mode == Mode::Auto && is_native_refusal(&error) => {
                let reason = attach_error(link, Mode::Native, error);
                tracing::warn!(interface = %link.name, %reason, "native XDP is not to be had; running in generic mode, which is several times slower");
                let id = program.attach_to_if_index(link.ifindex, XdpMode::Skb);
                (id.map_err(|error| attach_error(link, mode, error))?, true)
            }
            Err(error) => return Err(attach_error(link, mode, error)),
        };
        let owned = program.take_link(id).map_err(|error| attach_error(link, mode, error))?;
        let fd_link = FdLink::try_from(owned)
            .map_err(|_: LinkError| DatapathError::NoLink { interface: link.name.clone() })?;
        fd_link.pin(&path).map_err(|error| pin_error(link, &path, error))?;
        Ok(generic)
    }

    /// The loaded program, for running it without an interface.
    pub fn program_fd(&mut self) -> Result<aya::programs::ProgramFd, DatapathError> {
        let fd = self.program()?.fd().and_then(|fd| Ok(fd.try_clone()?));
        fd.map_err(|error| DatapathError::Program(Box::new(error)))
    }

    /// A reader of the program's log records, by the program's id: the object gives its ring away once only.
    pub fn trace(&mut self) -> Result<Trace, DatapathError> {
        let refused = |error| DatapathError::Program(Box::new(error));
        let id = self.program()?.info().map_err(refused)?.id();
        Ok(aya_log::EbpfLogger::init_from_id(id)?)
    }
}

/// Decisions of the packet path as log records (`trace: true`).
pub type Trace = aya_log::EbpfLogger<&'static dyn log::Log>;

/// Removes links, maps and the bpffs of a run directory, and gives interfaces back what was changed.
/// Returns the interfaces that were detached.
pub fn detach(fs: BpfFs, links: &[Link]) -> io::Result<Vec<String>> {
    let names = fs.linked_interfaces()?;
    let interfaces = aya::maps::MapData::from_pin(fs.map(lb_common::abi::map::INTERFACES))
        .ok()
        .and_then(|data| aya::maps::Map::from_map_data(data).ok())
        .and_then(|map| aya::maps::HashMap::<_, u32, Interface>::try_from(map).ok());
    for name in &names {
        std::fs::remove_file(fs.link(name))?;
        let row = links
            .iter()
            .find(|link| link.name == *name)
            .zip(interfaces.as_ref())
            .and_then(|(link, interfaces)| interfaces.get(&link.ifindex, 0).ok());
        if row.is_some_and(|row| row.flags & Interface::RESTORE_GRO != 0) {
            restore_gro(name);
        }
    }
    fs.remove()?;
    Ok(names)
}

fn load(fs: &BpfFs, capacity: &Capacity, meta: &Meta) -> Result<Ebpf, DatapathError> {
    let constants = Constants { features: meta.features, hash_keys: flow::keys(meta.seed) };
    let rows = capacity.rows();
    let mut loader = EbpfLoader::new();
    loader.override_global(constant::CONSTANTS, &constants, true);
    for map in &rows {
        loader.map_max_entries(map.name, map.rows);
    }
    for name in Maps::PINNED {
        loader.map_pin_path(name, fs.map(name));
    }
    let mut ebpf = loader.load(super::BALANCER).map_err(|error| DatapathError::Load(Box::new(error)))?;
    let program = ebpf.program_mut(PROGRAM).ok_or(MapsError::Missing(PROGRAM))?;
    let program: &mut Xdp = program.try_into().map_err(|error| DatapathError::Program(Box::new(error)))?;
    program.load().map_err(|error| DatapathError::Program(Box::new(error)))?;
    Ok(ebpf)
}

/// One run (BPF_PROG_TEST_RUN). Repeats would begin with what the run before left of the frame.
pub(super) fn test_run(program: &Xdp, frame: &[u8], out: &mut [u8]) -> Result<(u32, usize), ProgramError> {
    let options =
        TestRunOptions { data_in: Some(frame), data_out: Some(out), repeat: 1, ..TestRunOptions::default() };
    let result = program.test_run(options)?;
    Ok((result.return_value, result.data_size_out as usize))
}

fn pin_error(
    link: &Link,
    path: &Path,
    error: impl std::error::Error + Send + Sync + 'static,
) -> DatapathError {
    DatapathError::Pin {
        interface: link.name.clone(),
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

/// The driver says no to native XDP, not to XDP.
fn is_native_refusal(error: &ProgramError) -> bool {
    matches!(errno(error), Some(libc::EOPNOTSUPP | libc::ERANGE | libc::EINVAL | libc::ENOSPC | libc::E2BIG))
}

fn attach_error(link: &Link, mode: Mode, error: ProgramError) -> DatapathError {
    let interface = link.name.clone();
    match errno(&error) {
        Some(libc::EBUSY | libc::EEXIST) => DatapathError::Busy { holder: holder(link), interface },
        Some(libc::ERANGE) => DatapathError::Mtu { interface, mtu: link.mtu },
        Some(libc::EOPNOTSUPP) if mode == Mode::Native => DatapathError::NoNative { interface },
        _ => DatapathError::Attach { interface, source: Box::new(error) },
    }
}

/// The program that has the interface, in words.
fn holder(link: &Link) -> String {
    let Some(id) = link.xdp_program else { return String::new() };
    let name = aya::programs::loaded_programs()
        .filter_map(Result::ok)
        .find(|program| program.id() == id)
        .and_then(|program| program.name_as_str().map(|name| format!(" `{name}`")));
    format!(" (program id {id}{})", name.unwrap_or_default())
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

fn remove_file_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
