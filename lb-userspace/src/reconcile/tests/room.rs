//! What a plan does where there is no room for pins.

use super::super::desired::OldFlows;
use super::super::plan::{Leave, Unpinned, plan};
use super::*;

#[test]
fn without_room_for_pins_a_dead_backend_keeps_its_pins_and_nothing_else() {
    let mut state = simple(4);
    let mut image = fresh();
    applied(&mut image, &state);
    let identity = identity_in_first_pool(&state, backend_address(2));
    let dead = image.ids()[&identity];
    state.pools.get_mut(&0).unwrap().backends.get_mut(&2).unwrap().1 = false;
    let leave = Leave { unpinned: Unpinned::Ids(HashSet::new()), ..Leave::all() };
    let mut planned = |old_flows| {
        let mut desired = state.desired();
        desired.backends.get_mut(&identity).expect("it is configured").old_flows = old_flows;
        let plan = plan(&image, &desired, &capacity(), &leave).expect("within the limits");
        plan.ops.iter().for_each(|op| image.apply(op));
        (plan.ops, words(&image), plan.yielded)
    };
    let of_dead = |slots: Vec<Slot>| -> Vec<Slot> {
        slots.into_iter().filter(|slot| slot.cur() == dead || slot.est() == dead).collect()
    };
    let drops = |ops: &[MapOp]| ops.iter().any(|op| matches!(op, MapOp::DropPins { .. }));

    let (_, slots, yielded) = planned(OldFlows::Stay);
    let left = of_dead(slots);
    assert!(yielded.is_empty(), "while pins can be had: {yielded:?}");
    assert!(!left.is_empty() && left.iter().all(|slot| slot.cur() != dead && slot.dirty()), "{left:?}");
    let (ops, slots, yielded) = planned(OldFlows::Yield);
    assert_eq!(yielded, BTreeMap::from([(dead, left.len())]));
    assert!(slots.iter().any(|slot| slot.pins() && !slot.dirty()), "nobody looks for pins");
    assert!(of_dead(slots).is_empty() && !drops(&ops), "{ops:?}");
    let (ops, _, yielded) = planned(OldFlows::Yield);
    assert!(ops.is_empty() && yielded.is_empty(), "once: {ops:?} {yielded:?}");
}
