//! The decapsulation program on a backend: attached while the process lives.

use std::io;

use anyhow::{Context, anyhow};
use aya::maps::lpm_trie::Key;
use aya::maps::{LpmTrie, MapData, PerCpuArray};
use aya::programs::links::FdLink;
use aya::programs::{Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader};
use ipnetwork::IpNetwork;
use lb_common::abi::{self, DecapVip, constant, map};
use lb_common::outcome::DecapOutcome;
use lb_common::wire::Address6;

use crate::config::model::Mode;

const PROGRAM: &str = "decap";

/// What is let through.
#[derive(Debug, Clone)]
pub struct DecapConfig {
    pub vips: Vec<IpNetwork>,
    pub from: Vec<IpNetwork>,
    /// The UDP port that GUE comes to; 0 for none.
    pub gue_port: u16,
}

/// The attached program; dropping it detaches.
pub struct Decap {
    outcomes: PerCpuArray<MapData, u64>,
    pub generic: bool,
    _link: FdLink,
    _ebpf: Ebpf,
}

impl Decap {
    pub fn attach(ifindex: u32, mode: Mode, config: &DecapConfig) -> anyhow::Result<Self> {
        let DecapProgram { mut ebpf, outcomes } = DecapProgram::load(config)?;
        let program = program(&mut ebpf)?;
        let first = match mode {
            Mode::Generic => XdpMode::Skb,
            Mode::Auto | Mode::Native => XdpMode::Driver,
        };
        let (id, generic) = match program.attach_to_if_index(ifindex, first) {
            Ok(id) => (id, mode == Mode::Generic),
            Err(error) if mode == Mode::Auto => {
                tracing::warn!(%error, "native XDP is not to be had; running in generic mode");
                (program.attach_to_if_index(ifindex, XdpMode::Skb)?, true)
            }
            Err(error) => return Err(error.into()),
        };
        let link = FdLink::try_from(program.take_link(id)?)
            .map_err(|_| anyhow!("XDP was attached without a bpf_link; xlb needs kernel 5.9 or newer"))?;
        Ok(Self { outcomes, generic, _link: link, _ebpf: ebpf })
    }

    /// Packets of an outcome, over all CPUs.
    pub fn outcome(&self, outcome: DecapOutcome) -> io::Result<u64> {
        count(&self.outcomes, outcome)
    }
}

/// The program, loaded and told what to let through, but on no interface.
pub struct DecapProgram {
    ebpf: Ebpf,
    outcomes: PerCpuArray<MapData, u64>,
}

impl DecapProgram {
    pub fn load(config: &DecapConfig) -> anyhow::Result<Self> {
        let DecapConfig { vips, from, gue_port } = config;
        let constants = abi::Decap { gue_port: u64::from(*gue_port) };
        let mut loader = EbpfLoader::new();
        loader.override_global(constant::DECAP, &constants, true);
        loader.map_max_entries(map::DECAP_VIPS, vips.len().max(1) as u32);
        for name in [map::DECAP_FROM4, map::DECAP_FROM6] {
            loader.map_max_entries(name, from.len().max(1) as u32);
        }
        let mut ebpf = loader.load(super::DECAP).context("the decap program cannot be loaded")?;
        // Before maps are taken out of the object: that closes their descriptors.
        program(&mut ebpf)?.load().context("the kernel refused the decap program")?;
        fill(&mut ebpf, vips, from).context("the decap program's maps cannot be filled")?;
        let outcomes = PerCpuArray::try_from(take(&mut ebpf, map::DECAP_OUTCOMES)?)?;
        Ok(Self { ebpf, outcomes })
    }

    /// As `Datapath::test_run`.
    pub fn test_run(&mut self, frame: &[u8], out: &mut [u8]) -> anyhow::Result<(u32, usize)> {
        Ok(super::program::test_run(program(&mut self.ebpf)?, frame, out)?)
    }

    /// Packets of an outcome, over all CPUs.
    pub fn outcome(&self, outcome: DecapOutcome) -> io::Result<u64> {
        count(&self.outcomes, outcome)
    }
}

fn program(ebpf: &mut Ebpf) -> anyhow::Result<&mut Xdp> {
    Ok(ebpf.program_mut(PROGRAM).context("the object has no decap program")?.try_into()?)
}

fn count(outcomes: &PerCpuArray<MapData, u64>, outcome: DecapOutcome) -> io::Result<u64> {
    let values = outcomes.get(&(outcome as u32), 0).map_err(io::Error::other)?;
    Ok(values.iter().sum())
}

fn take(ebpf: &mut Ebpf, name: &'static str) -> anyhow::Result<aya::maps::Map> {
    ebpf.take_map(name).with_context(|| format!("the object has no map {name}"))
}

fn fill(ebpf: &mut Ebpf, accepted: &[IpNetwork], from: &[IpNetwork]) -> anyhow::Result<()> {
    let mut vips = LpmTrie::<_, [u64; 2], u8>::try_from(take(ebpf, map::DECAP_VIPS)?)?;
    for prefix in accepted {
        let (length, DecapVip(key)) = match prefix {
            IpNetwork::V4(v4) => (96 + v4.prefix(), DecapVip::v4(u32::from_ne_bytes(v4.network().octets()))),
            IpNetwork::V6(v6) => (v6.prefix(), DecapVip::v6(Address6::from_bytes(v6.network().octets()))),
        };
        vips.insert(&Key::new(u32::from(length), key), 1, 0)?;
    }
    let mut from4 = LpmTrie::<_, u32, u8>::try_from(take(ebpf, map::DECAP_FROM4)?)?;
    let mut from6 = LpmTrie::<_, [u64; 2], u8>::try_from(take(ebpf, map::DECAP_FROM6)?)?;
    for prefix in from {
        let length = u32::from(prefix.prefix());
        match prefix {
            IpNetwork::V4(v4) => {
                let address = u32::from_ne_bytes(v4.network().octets());
                from4.insert(&Key::new(length, address), 1, 0)?;
            }
            IpNetwork::V6(v6) => {
                let Address6 { high, low } = Address6::from_bytes(v6.network().octets());
                from6.insert(&Key::new(length, [high, low]), 1, 0)?;
            }
        }
    }
    Ok(())
}
