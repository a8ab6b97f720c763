//! What of root's power xlb needs, and whether this process has it.

use caps::{CapSet, Capability};

/// In the order of docs/service.md, each with what for.
const NEEDED: [(Capability, &str); 3] = [
    (Capability::CAP_BPF, "maps and programs"),
    (Capability::CAP_NET_ADMIN, "XDP on interfaces, neighbours, GRO"),
    (Capability::CAP_PERFMON, "a program that subtracts pointers"),
];

#[derive(Debug, thiserror::Error)]
pub enum CapabilityError {
    #[error("{missing}; run xlb as root, or with them as ambient capabilities (docs/service.md)")]
    Missing { missing: String },
    #[error("the capabilities of this process cannot be read")]
    Unknown(#[from] caps::errors::CapsError),
}

/// Refuses a process that lacks one, before it changes anything.
pub fn check() -> Result<(), CapabilityError> {
    let mut missing = Vec::new();
    for (capability, purpose) in NEEDED {
        if !caps::has_cap(None, CapSet::Effective, capability)? {
            missing.push(format!("{capability} ({purpose}) is missing"));
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(CapabilityError::Missing { missing: missing.join(", ") })
}
