//! Whose turn it is, in tables that take turns.

use lb_common::abi::Discipline;
use lb_common::flow::FlowHash;
use lb_common::pins::Says;
use lb_common::wire::TcpFlags;

use super::*;
use crate::reconcile::memory::Memory;

const ROW: u32 = 256;

/// New flows go to 1 and 2 by turns.
fn by_turns() -> Memory {
    let memory = Memory::new(&capacity(), 4);
    let words = [1, 2, 1, 2].map(|id| Slot::new(id, 3, true, true).bits()).to_vec();
    for id in 1..4 {
        memory.apply(&MapOp::SetFlags { id, flags: BackendRow::ACCEPTING });
    }
    memory.apply(&MapOp::WriteSlots { first: ROW * SLOTS_PER_ROW, words });
    memory.apply(&MapOp::SetTableWord { table: 0, word: TableWord::new(ROW, 2, Discipline::RoundRobin) });
    memory
}

#[test]
fn a_flow_that_is_known_takes_no_turn() {
    let syn = Says::tcp(TcpFlags { data_offset: 5 << 4, flags: TcpFlags::SYN });
    for (name, says) in [("a datagram", Says::DATAGRAM), ("a SYN that is sent again", syn)] {
        let memory = by_turns();
        let home = |flow: u64| {
            let hash = FlowHash::from_bits(flow << 32 | flow);
            let homes = [(); 2].map(|()| memory.steer(0, hash, says).expect("there is room"));
            assert_eq!(homes[0], homes[1], "{name}");
            homes[0]
        };
        assert_eq!((1..=6).map(home).collect::<Vec<_>>(), [1, 2, 1, 2, 1, 2], "{name}");
    }
}

#[test]
fn services_share_a_table_that_takes_turns_whether_they_went_by_a_hash_before_or_are_new() {
    let (mut image, mut state) = (fresh(), simple(4));
    settled(&mut image, &state);
    let service = state.services.get_mut(&0).expect("a service");
    service.kind.scheduler = Scheduler::WeightedRoundRobin;
    service.vips.insert(1);
    settled(&mut image, &state);
    let tables = image.table_states.iter().filter(|state| state.identity != 0).count();
    assert_eq!(tables, 1, "a private copy stays for ever");
}
