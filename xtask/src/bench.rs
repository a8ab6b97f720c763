//! `cargo xtask bench`: one line for each bench, and nothing of what they measure.

mod compare;
pub mod figures;
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

use crate::{capacity, flows, lab, pps, scale};

#[derive(Subcommand)]
pub enum Bench {
    /// Nanoseconds a packet takes in the kernel, against a floor of the same run (needs root)
    Packet(packet::Arguments),
    /// Beside direct routing, nftables and HAProxy in network namespaces: throughput, requests, latency (needs root)
    Lab(lab::Arguments),
    /// Packets a second that one core and several take from a veth in native mode, and where they are lost (needs root)
    Pps(pps::Arguments),
    /// How many balancers certain traffic takes, how much memory, what checks cost: with the arithmetic
    Capacity(capacity::Arguments),
    /// What changes of a pool break, over ways to choose a backend, with and without memory (simulated)
    Flows(flows::Flows),
    /// What the control plane costs, from ten backends to ten thousand (needs root)
    Scale(scale::Arguments),
}

pub fn run(bench: Bench) -> Result<()> {
    match bench {
        Bench::Packet(arguments) => packet::run(&arguments),
        Bench::Lab(arguments) => lab::run(&arguments),
        Bench::Pps(arguments) => pps::run(&arguments),
        Bench::Capacity(arguments) => capacity::run(&arguments),
        Bench::Flows(arguments) => flows::run(&arguments),
        Bench::Scale(arguments) => scale::run(&arguments),
    }
}
