//! Frames with what must become of them: built and checked by etherparse, which shares no code with
//! the packet path. Host runs and program runs take the same rows.

mod balancer;
mod build;
mod check;
mod decap;
mod moving;
mod quic;
mod site;
mod translated;

pub use balancer::{Expect, Row, errors_of_flows, rows, sticky_flows};
pub use build::{Dice, Transport, packet};
pub use check::{check, xdp_verdict};
pub use decap::{DecapRow, DecapSite, check_decap, decap_rows};
pub use moving::{MovingRow, Staged, ages, moving_rows};
pub use quic::{quic_flows, quic_openings};
pub use site::{AWAY, INGRESS, PLACES, SEED, Setting, VIP4, VIP6, capacity, image, interface, meta};
pub use translated::{Heard, Place, TranslatedRow, open_all, talks, translated_rows, ways_back};

/// Room in front of a frame in host runs: what the kernel leaves (XDP_PACKET_HEADROOM).
pub const HEADROOM: usize = 256;
