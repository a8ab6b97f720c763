//! What the verifier makes of the balancer program, for measuring a change of the packet path.

use aya::EbpfLoader;
use aya::programs::Xdp;
use lb_common::abi::{Constants, Features, constant};
use lb_common::flow;

/// Figures of a program as it was loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Figures {
    /// After the verifier took out what the constants switch off and inlined map accesses.
    pub instructions: u32,
    /// Instructions that the verifier walked through.
    pub verifier_steps: u32,
    pub jited_bytes: u32,
}

/// Loads the balancer with these features, unattached and with placeholder maps.
pub fn figures(features: Features) -> anyhow::Result<Figures> {
    let constants = Constants {
        features: features.bits(),
        icmp_rate: 1,
        pin_rate: 1,
        pin_mask: 0,
        connection_buckets: 2,
        source_ports: 0,
        hash_keys: flow::keys(0),
    };
    let mut loader = EbpfLoader::new();
    loader.override_global(constant::CONSTANTS, &constants, true);
    let mut ebpf = loader.load(super::BALANCER)?;
    let program =
        ebpf.program_mut("balancer").ok_or_else(|| anyhow::anyhow!("the object has no balancer"))?;
    let program: &mut Xdp = program.try_into()?;
    program.load()?;
    let info = program.info()?;
    Ok(Figures {
        instructions: info.size_translated().unwrap_or(0) / 8,
        verifier_steps: info.verified_instruction_count().unwrap_or(0),
        jited_bytes: info.size_jitted(),
    })
}

/// Bytes of stack that the object's entry function uses, with everything compiled in: the farthest
/// that it reaches below the frame pointer.
pub fn stack_bytes() -> anyhow::Result<u32> {
    use object::{Object, ObjectSection};
    const FRAME_POINTER: u8 = 10;
    const MOVE: u8 = 0xbf;
    const ADD_IMMEDIATE: u8 = 0x07;
    let file = object::File::parse(super::BALANCER)?;
    let section =
        file.section_by_name("xdp").ok_or_else(|| anyhow::anyhow!("the object has no section xdp"))?;
    let mut deepest = 0i32;
    let mut copied = None;
    for instruction in section.data()?.as_chunks::<8>().0 {
        let (code, destination, source) = (instruction[0], instruction[1] & 0x0f, instruction[1] >> 4);
        let offset = i32::from(i16::from_le_bytes([instruction[2], instruction[3]]));
        let immediate = i32::from_le_bytes([instruction[4], instruction[5], instruction[6], instruction[7]]);
        // The lowest three bits are the class: 1 loads through the source, 2 and 3 store through the destination.
        let base = match code & 7 {
            1 => Some(source),
            2 | 3 => Some(destination),
            _ => None,
        };
        if base == Some(FRAME_POINTER) {
            deepest = deepest.min(offset);
        }
        if code == ADD_IMMEDIATE && copied == Some(destination) {
            deepest = deepest.min(immediate);
        }
        copied = (code == MOVE && source == FRAME_POINTER).then_some(destination);
    }
    Ok(deepest.unsigned_abs())
}
