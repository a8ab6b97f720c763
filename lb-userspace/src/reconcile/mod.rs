//! From what is configured and alive to what lies in the kernel.
//!
//! `desired` says what should be, without ids. `plan` compares it with an [`image::Image`] of what
//! is, gives out ids and places, and yields an ordered list of [`op::MapOp`]. Both are pure; planning
//! again on the result yields nothing. `bpf::Maps` is the only place that carries operations out.

pub mod backends;
pub mod connections;
pub mod desired;
pub mod draft;
pub mod entries;
pub mod image;
pub mod memory;
pub mod moves;
pub mod op;
pub mod per_backend;
pub mod pins;
pub mod plan;
pub mod repin;
pub mod servers;
pub mod sweep;
pub mod targets;
pub mod tracking;

#[cfg(test)]
mod tests;
