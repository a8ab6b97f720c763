//! The kernel: maps, programs, links and where they are pinned. The only folder that knows aya.

mod bench;
mod bpffs;
mod counters;
mod decap;
pub mod ethtool;
mod figures;
mod generation;
mod generator;
mod grace;
mod holder;
mod links;
mod maps;
mod mmap;
mod mounts;
mod program;
mod trace;

pub use bench::{Bench, FRAME_BYTES, Flow, MOST_ROUNDS, Packets, Round, Target};
pub use bpffs::{BpfFs, BpfFsError};
pub use counters::Counters;
pub use decap::{Decap, DecapConfig, DecapProgram};
pub use figures::{Figures, figures, stack_bytes};
pub use generator::{AttachedEnd, End, Generator};
pub use links::{Attached, Links};
pub use maps::{Maps, MapsError, RowPairs};
pub use program::{Datapath, DatapathError, Detached, detach};
pub use trace::Trace;

/// Bytes aligned for the ELF parser.
#[repr(C, align(32))]
struct Aligned<T: ?Sized>(T);

macro_rules! object {
    ($name:ident, $file:literal) => {
        /// The object as build.rs compiled it.
        pub static $name: &[u8] = {
            static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/", $file)));
            &OBJECT.0
        };
    };
}

object!(BALANCER, "balancer");
object!(BENCH, "bench");
object!(DECAP, "decap");
object!(PASS, "pass");
