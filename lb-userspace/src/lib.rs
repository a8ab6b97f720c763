//! The xlb agent and command line, as a library so that tests reach every part.
//!
//! Configuration (`config`), health (`health`) and next hops (`nexthop`) flow into one task (`agent`),
//! which works out who takes flows (`policy`) and what should lie in the kernel (`reconcile`, `tables`) and writes the difference
//! (`bpf`). `api` shows its state on a unix socket; `cli` asks there.

#![deny(unsafe_code)]

#[macro_use]
mod failpoint;

pub mod agent;
pub mod api;
pub mod bpf;
mod capabilities;
pub mod capacity;
pub mod cli;
pub mod config;
mod descriptors;
pub mod health;
pub mod host;
pub mod lookup;
pub mod memory;
pub mod nexthop;
mod owned;
pub mod policy;
pub mod reconcile;
mod room;
pub mod tables;
pub mod ways;
