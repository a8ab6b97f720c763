//! `cargo xtask bench`: one line for each bench, and nothing of what they measure.

mod compare;
mod figures;
mod frames;
mod lines;
mod order;
pub mod packet;
mod passes;
pub mod report;
mod stage;
pub mod table;

use anyhow::Result;
use clap::Subcommand;

use crate::{flows, lab};

#[derive(Subcommand)]
pub enum Bench {
    /// Nanoseconds a packet takes in the kernel, against a floor of the same run (needs root)
    Packet(packet::Arguments),
    /// Beside direct routing, nftables and HAProxy in network namespaces: throughput, requests, latency (needs root)
    Lab(lab::Arguments),
    /// What changes of a pool break, over ways to choose a backend, with and without memory (simulated)
    Flows(flows::Flows),
}

pub fn run(bench: Bench) -> Result<()> {
    match bench {
        Bench::Packet(arguments) => packet::run(&arguments),
        Bench::Lab(arguments) => lab::run(&arguments),
        Bench::Flows(arguments) => flows::run(&arguments),
    }
}
