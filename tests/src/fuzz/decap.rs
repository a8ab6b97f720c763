//! The program of backends (`xlb decap`) as a subject.

use anyhow::Result;
use lb_common::decap::decap;
use lb_common::outcome::DecapOutcome;
use lb_common::packet::Buffer;
use lb_userspace::bpf::DecapProgram;

use super::Subject;
use crate::fixtures::{DecapSite, INGRESS, xdp_verdict};

/// The packet path on the host. `decap_host`, compiled where its coverage is wanted.
pub type DecapWay = fn(&[u8]) -> (DecapOutcome, Vec<u8>);

/// As `host` for the balancer.
#[inline(always)]
pub fn decap_host(frame: &[u8]) -> (DecapOutcome, Vec<u8>) {
    let site = DecapSite::default();
    let mut bytes = frame.to_vec();
    let mut packet = Buffer::new(&mut bytes, 0, INGRESS);
    let outcome = decap(&mut packet, &site);
    (outcome, packet.frame().to_vec())
}

pub struct Decap {
    way: DecapWay,
    kernel: Option<DecapProgram>,
    out: Vec<u8>,
    /// Of the host, over all frames.
    ended: Vec<u64>,
    /// What the kernel's counters should show.
    outcomes: Vec<u64>,
}

impl Decap {
    pub fn on_host(way: DecapWay) -> Self {
        let nothing = vec![0; DecapOutcome::ALL.len()];
        Self { way, kernel: None, out: vec![0; 4096], ended: nothing.clone(), outcomes: nothing }
    }

    pub fn in_kernel(way: DecapWay) -> Result<Self> {
        Ok(Self { kernel: Some(DecapProgram::load(&DecapSite::config())?), ..Self::on_host(way) })
    }
}

impl Subject for Decap {
    fn name(&self) -> String {
        "decap".to_owned()
    }

    fn run(&mut self, frame: &[u8]) -> Result<usize, String> {
        let (outcome, output) = (self.way)(frame);
        self.ended[outcome as usize] += 1;
        self.outcomes[outcome as usize] += 1;
        if let Some(kernel) = &mut self.kernel {
            let (verdict, length) =
                kernel.test_run(frame, &mut self.out).map_err(|error| format!("{error:#}"))?;
            let expected = xdp_verdict(outcome.action());
            if verdict != expected {
                return Err(format!(
                    "XDP verdict {verdict} in the kernel, {expected} on the host, which says {outcome:?}"
                ));
            }
            let out = self.out.get(..length).unwrap_or_default();
            if out != output {
                return Err(super::hunt::differing(out, &output, &format!("{outcome:?}")));
            }
        }
        Ok(outcome as usize)
    }

    fn settle(&mut self) -> Result<(), String> {
        let Some(kernel) = &self.kernel else { return Ok(()) };
        let mut wrong = Vec::new();
        for (outcome, expected) in DecapOutcome::ALL.iter().zip(&mut self.outcomes) {
            let found =
                kernel.outcome(*outcome).map_err(|error| format!("a counter cannot be read: {error}"))?;
            if found != *expected {
                wrong.push(format!("{}: {found} in the kernel, {expected} on the host", outcome.counter()));
                *expected = found;
            }
        }
        if wrong.is_empty() { Ok(()) } else { Err(wrong.join("; ")) }
    }

    fn counted(&self) -> Vec<(&'static str, u64)> {
        DecapOutcome::ALL.iter().map(|outcome| outcome.counter()).zip(self.ended.iter().copied()).collect()
    }
}
