//! What the verifier made of the programs: the figures that every change of the packet path shows.

use anyhow::Result;
use lb_common::abi::Features;
use lb_userspace::bpf;

/// Feature sets worth looking at, between the smallest and the fullest.
const SETS: [(&str, &[Features]); 6] = [
    ("smallest: IPv4, l2", &[Features::IPV4, Features::L2]),
    ("IPv4, ipip over IPv4", &[Features::IPV4, Features::IPIP4]),
    ("IPv6, ipip over IPv6", &[Features::IPV6, Features::IPIP6]),
    ("IPv4, gue over IPv4", &[Features::IPV4, Features::GUE4]),
    ("IPv6, gue over IPv6", &[Features::IPV6, Features::GUE6]),
    ("both families, ipip over IPv4", &[Features::IPV4, Features::IPV6, Features::IPIP4]),
];

pub fn run() -> Result<()> {
    say!("{:32} {:>12} {:>14} {:>11}", "FEATURES", "INSTRUCTIONS", "VERIFIER STEPS", "JITED BYTES");
    let of = |features: &[Features]| features.iter().fold(Features::default(), |all, one| all.with(*one));
    let fullest = ("fullest: everything but trace", untraced());
    for (name, features) in SETS.map(|(name, features)| (name, of(features))).into_iter().chain([fullest]) {
        let bpf::Figures { instructions, verifier_steps, jited_bytes } = bpf::figures(features)?;
        say!("{name:32} {instructions:12} {verifier_steps:14} {jited_bytes:11}");
    }
    say!("");
    without_each()?;
    say!("\nstack: {} of 512 bytes, with everything compiled in", bpf::stack_bytes()?);
    Ok(())
}

fn everything() -> Features {
    Features::ALL.iter().fold(Features::default(), |all, (feature, _)| all.with(*feature))
}

/// Everything that an operator may run with.
pub fn untraced() -> Features {
    Features::from_bits(everything().bits() & !Features::TRACE.bits())
}

/// Each load-time constant is shown to bite: what the program would lose without it.
fn without_each() -> Result<()> {
    let everything = everything();
    let with = bpf::figures(everything)?.instructions;
    say!("{:32} {:>12} {:>14} {:>11}", "EVERYTHING BUT", "INSTRUCTIONS", "EVERYTHING", "DIFFERENCE");
    for (feature, name) in Features::ALL {
        let rest = Features::from_bits(everything.bits() & !feature.bits());
        let without = bpf::figures(rest)?.instructions;
        say!("{name:32} {without:12} {with:14} {:11}", i64::from(without) - i64::from(with));
    }
    Ok(())
}
