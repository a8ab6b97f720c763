//! The balancer program, loaded with its constants over a set of maps.

use std::io;

use aya::programs::{ProgramError, TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfError, EbpfLoader};
use lb_common::abi::{ABI_VERSION, Constants, Features, Meta, constant};
use lb_common::flow::{self, HASH_VERSION};

use super::bpffs::BpfFs;
use super::generation::Generation;
use super::links;
use super::maps::{Maps, MapsError};
use super::trace::{self, Trace};
use crate::capacity::Capacity;
use crate::nexthop::Link;
use crate::reconcile::desired::LoadTime;
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

/// The program with its maps.
pub struct Datapath {
    fs: BpfFs,
    generation: Generation,
    capacity: Capacity,
    ebpf: Ebpf,
    pub maps: Maps,
    meta: Meta,
    /// Whether the maps may be taken for ours: they are filled.
    complete: bool,
    /// Whether the maps were there before.
    pub adopted: bool,
    /// The maps that packets go by until these take over, if they can be read.
    pub predecessor: Option<Maps>,
}

impl std::fmt::Debug for Datapath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Datapath").field("fs", &self.fs).field("meta", &self.meta).finish_non_exhaustive()
    }
}

impl Datapath {
    /// Loads the program over the maps of an earlier agent if they fit, else over new ones beside them. Maps that
    /// were there have the features that their tables need as well; [`Self::refit`] takes them out when the
    /// tables have changed.
    pub fn open(fs: BpfFs, capacity: Capacity, load_time: LoadTime) -> Result<Self, DatapathError> {
        let Some((generation, before)) = Maps::newest(&fs)? else {
            return Self::fresh(fs, capacity, &new_meta(load_time, 0));
        };
        match Maps::compare(&generation, &before, &capacity) {
            Ok(()) => {}
            Err(reason) if reason.is_misfit() => {
                tracing::warn!(%reason, "the maps of an earlier agent do not fit; new ones are filled beside them, then the program is swapped");
                let predecessor = Maps::of_generation(&generation, &before).ok();
                // What lies in them is carried over, if it can be read.
                let features = predecessor.as_ref().map_or(0, |_| before.features);
                let buckets = predecessor.as_ref().map_or(0, |maps| maps.connections().buckets());
                let meta =
                    new_meta(load_time.with(Features::from_bits(features)), others(buckets, &capacity));
                return Ok(Self { predecessor, ..Self::fresh(fs, capacity, &meta)? });
            }
            Err(error) => return Err(error.into()),
        }
        warn_of_moves(&before, load_time.seed);
        let meta = new_meta(load_time.with(Features::from_bits(before.features)), before.buckets_before);
        let (ebpf, maps) = load(&generation, &capacity, &meta)?;
        maps.set_meta(&meta);
        let (complete, adopted, predecessor) = (true, true, None);
        Ok(Self { fs, generation, capacity, ebpf, maps, meta, complete, adopted, predecessor })
    }

    /// Whether maps of this size are pinned, which [`Self::open`] takes over.
    pub fn has_maps(fs: &BpfFs, capacity: &Capacity) -> bool {
        let newest = Maps::newest(fs).ok().flatten();
        newest.is_some_and(|(generation, meta)| Maps::compare(&generation, &meta, capacity).is_ok())
    }

    /// The program over new, empty maps beside those in use: for other limits.
    pub fn renewed(&self, capacity: Capacity, load_time: LoadTime) -> Result<Self, DatapathError> {
        // Those of maps before these are one change too old.
        let before = others(self.capacity.connection_buckets, &capacity);
        Self::fresh(self.fs.clone(), capacity, &new_meta(load_time, before))
    }

    fn fresh(fs: BpfFs, capacity: Capacity, meta: &Meta) -> Result<Self, DatapathError> {
        let generation = fs
            .check_mounted()
            .and_then(|()| Generation::create(&fs))
            .map_err(|source| DatapathError::BpfFs { path: fs.path().display().to_string(), source })?;
        fail_point!("generation");
        let (ebpf, maps) = match load(&generation, &capacity, meta) {
            Ok(loaded) => loaded,
            Err(error) => {
                // The reason counts, not that a directory stays: the next start removes it.
                _ = generation.remove();
                return Err(error);
            }
        };
        maps.initialise();
        let (meta, complete, adopted, predecessor) = (*meta, false, false, None);
        Ok(Self { fs, generation, capacity, ebpf, maps, meta, complete, adopted, predecessor })
    }

    /// The tables are in the maps: from now on they may be adopted, and attached.
    pub fn complete(&mut self) {
        fail_point!("meta");
        self.maps.set_meta(&self.meta);
        self.complete = true;
    }

    /// Removes all other sets of maps. No interface may be left that goes by them.
    pub fn retire_others(&self) -> Result<(), DatapathError> {
        for other in Generation::all(&self.fs).map_err(|source| self.fs_error(source))? {
            if other != self.generation {
                fail_point!("retire");
                other.remove().map_err(|source| self.fs_error(source))?;
            }
        }
        Ok(())
    }

    /// Removes these maps, which no interface goes by.
    pub fn abandon(self) -> Result<(), DatapathError> {
        self.generation.remove().map_err(|source| self.fs_error(source))
    }

    /// Loads the program again if it was loaded with something else; attached interfaces must be
    /// attached again then, which swaps the program on the live link.
    pub fn refit(&mut self, load_time: LoadTime) -> Result<bool, DatapathError> {
        if LoadTime::of_meta(&self.meta) == load_time {
            return Ok(false);
        }
        let meta = new_meta(load_time, self.meta.buckets_before);
        // Where a pin is missing, loading would make another map.
        self.pin_again()?;
        (self.ebpf, self.maps) = load(&self.generation, &self.capacity, &meta)?;
        if self.complete {
            self.maps.set_meta(&meta);
        }
        self.meta = meta;
        Ok(true)
    }

    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    pub fn fs(&self) -> &BpfFs {
        &self.fs
    }

    pub fn capacity(&self) -> &Capacity {
        &self.capacity
    }

    /// Where a map is pinned.
    pub fn pin_of(&self, map: &str) -> std::path::PathBuf {
        self.generation.map(map)
    }

    /// Pins maps again whose pins somebody has removed. Returns their names.
    pub fn pin_again(&self) -> Result<Vec<&'static str>, DatapathError> {
        self.fs.check_mounted().map_err(|source| self.fs_error(source))?;
        Ok(self.maps.pin_again(&self.generation)?)
    }

    /// Runs the program on a frame of 14 bytes or more, as if it came in on the loopback interface:
    /// the XDP verdict, and the bytes of `out` that the frame takes afterwards. Counts like any run.
    pub fn test_run(&mut self, frame: &[u8], out: &mut [u8]) -> Result<(u32, usize), DatapathError> {
        test_run(self.program()?, frame, out).map_err(|error| DatapathError::Program(Box::new(error)))
    }

    /// As `test_run`, with less room in front of the frame: so many bytes of it hold metadata (a multiple of 4, up
    /// to 252 with 6.18). They lie in front of the frame in `out`, and count in its length.
    pub fn test_run_behind(
        &mut self,
        metadata: u8,
        frame: &[u8],
        out: &mut [u8],
    ) -> Result<(u32, usize), DatapathError> {
        let input = [&vec![0; usize::from(metadata)][..], frame].concat();
        // `struct xdp_md`: data, data_end, data_meta, then interface, queue and egress, which stay as they are.
        let words = [u32::from(metadata), input.len() as u32, 0, 0, 0, 0];
        let context: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let options = TestRunOptions {
            data_in: Some(&input),
            data_out: Some(out),
            ctx_in: Some(&context),
            ..TestRunOptions::default()
        };
        let result =
            self.program()?.test_run(options).map_err(|error| DatapathError::Program(Box::new(error)))?;
        Ok((result.return_value, result.data_size_out as usize))
    }

    fn fs_error(&self, source: io::Error) -> DatapathError {
        DatapathError::BpfFs { path: self.fs.path().display().to_string(), source }
    }

    pub(super) fn program(&mut self) -> Result<&mut Xdp, DatapathError> {
        let program = self.ebpf.program_mut(PROGRAM).ok_or(MapsError::Missing(PROGRAM))?;
        program.try_into().map_err(|error| DatapathError::Program(Box::new(error)))
    }

    /// The id of the loaded program.
    pub fn program_id(&mut self) -> Result<u32, DatapathError> {
        let info = self.program()?.info();
        Ok(info.map_err(|error| DatapathError::Program(Box::new(error)))?.id())
    }

    /// The loaded program, for running it without an interface.
    pub fn program_fd(&mut self) -> Result<aya::programs::ProgramFd, DatapathError> {
        let fd = self.program()?.fd().and_then(|fd| Ok(fd.try_clone()?));
        fd.map_err(|error| DatapathError::Program(Box::new(error)))
    }

    /// A reader of the program's log records.
    pub fn trace(&mut self) -> Result<Trace, DatapathError> {
        trace::reader(self.program_id()?)
    }
}

/// What was removed from the kernel.
#[derive(Debug)]
pub struct Detached {
    pub interfaces: Vec<String>,
    /// The bpffs is still mounted: somebody else did that, or this process may not unmount it.
    pub mount_left: bool,
}

/// Removes links, maps and the bpffs of a run directory, and gives interfaces back what was changed.
pub fn detach(fs: BpfFs, links: &[Link]) -> io::Result<Detached> {
    let maps = Maps::from_pins(&fs).ok();
    let row = |ifindex| maps.as_ref().and_then(|maps| maps.interface(ifindex));
    let interfaces = links::detach_all(&fs, links, row)?;
    let mount_left = fs.remove()?;
    Ok(Detached { interfaces, mount_left })
}

/// `buckets_before`: as in `Meta`.
fn new_meta(load_time: LoadTime, buckets_before: u32) -> Meta {
    let LoadTime { seed, features, icmp_rate, pin_rate, source_ports } = load_time;
    Meta {
        abi_version: ABI_VERSION,
        hash_version: HASH_VERSION,
        table_version: TABLE_VERSION,
        seed,
        features: features.bits(),
        icmp_rate,
        pin_rate,
        source_ports,
        buckets_before,
        ..Meta::default()
    }
}

/// `Meta::buckets_before` of maps of a capacity.
fn others(buckets: u32, capacity: &Capacity) -> u32 {
    if buckets == capacity.connection_buckets { 0 } else { buckets }
}

/// What decides where flows go must not change unnoticed.
fn warn_of_moves(before: &Meta, seed: u64) {
    let changes = [
        ("seed", before.seed != seed),
        ("hash version", before.hash_version != HASH_VERSION),
        ("table version", before.table_version != TABLE_VERSION),
    ];
    for (what, _) in changes.into_iter().filter(|(_, changed)| *changed) {
        tracing::warn!(what, "not the same as the earlier agent's: flows move to other backends");
    }
}

fn load(generation: &Generation, capacity: &Capacity, meta: &Meta) -> Result<(Ebpf, Maps), DatapathError> {
    let Meta { features, icmp_rate, pin_rate, seed, source_ports, buckets_before, .. } = meta;
    let pin_mask = u64::from(capacity.pin_buckets) - 1;
    let constants = Constants {
        features: *features,
        icmp_rate: *icmp_rate,
        pin_rate: *pin_rate,
        pin_mask,
        connection_buckets: u64::from(capacity.connection_buckets) | u64::from(*buckets_before) << 32,
        source_ports: *source_ports,
        hash_keys: flow::keys(*seed),
    };
    let rows = capacity.rows();
    let mut loader = EbpfLoader::new();
    loader.override_global(constant::CONSTANTS, &constants, true);
    for map in &rows {
        loader.map_max_entries(map.name, map.rows);
    }
    for name in Maps::PINNED {
        loader.map_pin_path(name, generation.map(name));
    }
    let mut ebpf = loader.load(super::BALANCER).map_err(|error| DatapathError::Load(Box::new(error)))?;
    let program = ebpf.program_mut(PROGRAM).ok_or(MapsError::Missing(PROGRAM))?;
    let program: &mut Xdp = program.try_into().map_err(|error| DatapathError::Program(Box::new(error)))?;
    program.load().map_err(|error| DatapathError::Program(Box::new(error)))?;
    let maps = Maps::take(&mut ebpf, generation, capacity)?;
    Ok((ebpf, maps))
}

/// One run (BPF_PROG_TEST_RUN). Repeats would begin with what the run before left of the frame.
pub(super) fn test_run(program: &Xdp, frame: &[u8], out: &mut [u8]) -> Result<(u32, usize), ProgramError> {
    let options =
        TestRunOptions { data_in: Some(frame), data_out: Some(out), repeat: 1, ..TestRunOptions::default() };
    let result = program.test_run(options)?;
    Ok((result.return_value, result.data_size_out as usize))
}
