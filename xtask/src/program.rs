//! What the verifier made of the programs: the figures that every change of the packet path shows.

use anyhow::Result;
use lb_common::abi::Features;
use lb_userspace::bpf;

/// Feature sets worth looking at, from the smallest to the fullest.
const SETS: [(&str, &[Features]); 5] = [
    ("IPv4, l2", &[Features::IPV4, Features::L2]),
    ("IPv4, ipip over IPv4", &[Features::IPV4, Features::IPIP4]),
    ("IPv6, ipip over IPv6", &[Features::IPV6, Features::IPIP6]),
    ("both families, ipip over IPv4", &[Features::IPV4, Features::IPV6, Features::IPIP4]),
    (
        "everything but trace",
        &[Features::IPV4, Features::IPV6, Features::IPIP4, Features::IPIP6, Features::L2, Features::VIP_ARP],
    ),
];

pub fn run() -> Result<()> {
    println!("{:32} {:>12} {:>14} {:>11}", "FEATURES", "INSTRUCTIONS", "VERIFIER STEPS", "JITED BYTES");
    for (name, features) in SETS {
        let features = features.iter().fold(Features::default(), |all, feature| all.with(*feature));
        let bpf::Figures { instructions, verifier_steps, jited_bytes } = bpf::figures(features)?;
        println!("{name:32} {instructions:12} {verifier_steps:14} {jited_bytes:11}");
    }
    println!();
    without_each()?;
    println!("\nstack: {} of 512 bytes, with everything compiled in", bpf::stack_bytes()?);
    Ok(())
}

/// Each load-time constant is shown to bite: what the program would lose without it.
fn without_each() -> Result<()> {
    let everything = Features::ALL.iter().fold(Features::default(), |all, (feature, _)| all.with(*feature));
    let with = bpf::figures(everything)?.instructions;
    println!("{:32} {:>12} {:>14} {:>11}", "EVERYTHING BUT", "INSTRUCTIONS", "EVERYTHING", "DIFFERENCE");
    for (feature, name) in Features::ALL {
        let rest = Features::from_bits(everything.bits() & !feature.bits());
        let without = bpf::figures(rest)?.instructions;
        println!("{name:32} {without:12} {with:14} {:11}", i64::from(without) - i64::from(with));
    }
    Ok(())
}
