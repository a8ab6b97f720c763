//! Every interleaving of packets on two CPUs with an agent, in small scenarios. Each guard of the slot rule is left out
//! once: with it no connection breaks in any interleaving, without it one does. So none is there for nothing.

mod machine;

use lb_common::abi::{Discipline, Pin, PinState, TableState};

use self::machine::{Act, Kind, Mutant, Packet, Scenario, Shared, explore};
use super::*;

const A: u16 = 1;
const B: u16 = 2;
const C: u16 = 3;

/// Where the slot of the one table lies, and another place for it.
const SLOT: u32 = SLOTS_PER_ROW;
const ELSEWHERE: u32 = 2 * SLOTS_PER_ROW;

/// Ways that pins are in which nobody touches: two are left, one of which new flows may take.
const TAKEN: u8 = 0b1110_1110;

/// A flow that begins, and one that was there before.
const NEW: usize = 0;
const OLD: usize = 1;

const fn moving(cur: u16, est: u16) -> Slot {
    Slot::new(cur, est, true, false)
}

const fn moved(to: u16) -> Slot {
    Slot::new(to, to, false, true)
}

fn write(first: u32, slots: &[Slot]) -> Act {
    Act::Do(MapOp::WriteSlots { first, words: slots.iter().map(|slot| slot.bits()).collect() })
}

fn store(slot: Slot) -> Act {
    write(SLOT, &[slot])
}

fn grace() -> Act {
    Act::Do(MapOp::Grace)
}

fn flags(id: u16, flags: u8) -> Act {
    Act::Do(MapOp::SetFlags { id, flags })
}

fn on(cpu: usize, flow: usize, kinds: &[Kind]) -> Vec<(usize, Packet)> {
    kinds.iter().map(|&kind| (cpu, Packet { flow, kind })).collect()
}

/// A connection begins and sends.
fn begins(cpu: usize) -> Vec<(usize, Packet)> {
    on(cpu, NEW, &[Kind::Syn, Kind::Data])
}

/// The slot as it is, with room for two pins.
fn scenario(slot: Slot, acts: Vec<Act>, packets: Vec<(usize, Packet)>) -> Scenario {
    let mut shared = Shared::new(TableWord::new(1, 0, Discipline::Hash));
    shared.slots[SLOT as usize] = slot.bits();
    for way in (0..8).filter(|way| TAKEN & 1 << way != 0) {
        shared.pins[way] = Pin::new(99, C, PinState::Established, machine::NOW).bits();
    }
    Scenario::new(shared, acts, packets, TAKEN)
}

/// As `scenario`, without room.
fn crowded(slot: Slot, acts: Vec<Act>, packets: Vec<(usize, Packet)>) -> Scenario {
    let mut scenario = scenario(slot, acts, packets);
    scenario.admits = false;
    scenario
}

impl Scenario {
    /// The old flow is with A, by a pin of this age or without one.
    fn old_at_a(mut self, pinned: Option<u16>) -> Self {
        self.homes[OLD] = Some(A);
        if let Some(age) = pinned {
            self.shared.pins[0] = Pin::new(machine::tag(OLD), A, PinState::Established, age).bits();
        }
        self
    }

    fn without(mut self, act: usize) -> Self {
        self.acts.remove(act);
        self
    }

    fn with(mut self, mutant: Mutant) -> Self {
        self.mutant = mutant;
        self
    }

    /// The agent's stores come late, as on a CPU that keeps them to itself for a while.
    fn late(mut self) -> Self {
        self.late = true;
        self
    }
}

/// With the guard no interleaving breaks a connection, without it some do.
fn guards(guarded: Scenario, unguarded: Scenario) {
    let with = explore(&guarded);
    assert_eq!(with.broken, None, "with the guard, of {} states", with.states);
    assert!(with.states > 15, "little was interleaved: {} states", with.states);
    let without = explore(&unguarded);
    assert!(without.broken.is_some(), "nothing breaks without the guard, in {} states", without.states);
    eprintln!("{} states with the guard, {} without", with.states, without.states);
}

/// `est` follows: closing, grace, check, store, grace, open.
fn finishing() -> Vec<Act> {
    following(moved(B))
}

fn following(slot: Slot) -> Vec<Act> {
    let due = Due { table: 0, failed: 0, words: vec![(SLOT, slot.bits())] };
    finish(vec![due]).into_iter().map(Act::Do).collect()
}

#[test]
fn the_wait_for_t1_lets_every_old_flow_be_pinned() {
    let spoken = [vec![Act::Spoken(0)], finishing()].concat();
    let data = || on(0, OLD, &[Kind::Data]);
    let guarded = scenario(moving(B, A), spoken, data()).old_at_a(None);
    guards(guarded, scenario(moving(B, A), finishing(), data()).old_at_a(None));
}

#[test]
fn the_check_of_failed_keeps_est_where_an_unpinned_flow_is() {
    let guarded = crowded(moving(B, A), finishing(), begins(0));
    guards(guarded, crowded(moving(B, A), finishing(), begins(0)).without(2));
}

#[test]
fn a_grace_before_the_check_of_failed_lets_closing_be_seen() {
    let late = || crowded(moving(B, A), finishing(), begins(0)).late();
    guards(late(), late().without(1));
}

#[test]
fn closing_refuses_flows_that_cannot_be_pinned_while_est_follows() {
    let guarded = crowded(moving(B, A), finishing(), begins(0));
    guards(guarded, crowded(moving(B, A), finishing(), begins(0)).without(0));
}

#[test]
fn closing_lasts_until_nobody_is_at_work_with_the_old_slot() {
    let guarded = crowded(moving(B, A), finishing(), begins(0));
    guards(guarded, crowded(moving(B, A), finishing(), begins(0)).without(4));
}

#[test]
fn a_new_flow_that_could_not_be_pinned_is_counted() {
    let guarded = crowded(moving(B, A), finishing(), begins(0));
    guards(guarded, crowded(moving(B, A), finishing(), begins(0)).with(Mutant::FailuresAreNotCounted));
}

#[test]
fn the_mark_of_pins_stays_when_est_follows() {
    let with = |acts| scenario(moving(B, A), acts, on(0, OLD, &[Kind::Data, Kind::Data]));
    let pinned = Some(machine::NOW);
    guards(with(following(moved(B))).old_at_a(pinned), with(following(Slot::clean(B))).old_at_a(pinned));
}

#[test]
fn the_mark_of_pins_stays_when_a_slot_goes_back() {
    let there_and = |back| scenario(Slot::clean(A), vec![store(moving(B, A)), store(back)], begins(0));
    guards(there_and(moved(A)), there_and(Slot::clean(A)));
}

#[test]
fn a_grace_before_a_sweep_lets_pins_of_the_last_slot_be_seen() {
    let acts = vec![store(moved(A)), grace(), Act::Sweep { est: A, old: false }, Act::Clear(Slot::clean(A))];
    let sweep = || scenario(moving(B, A), acts.clone(), begins(0));
    guards(sweep(), sweep().without(1));
}

/// A pin that is long silent may be of the next connection's addresses.
#[test]
fn a_pin_elsewhere_holds_its_slot_however_old_it_is() {
    let with = |old| {
        let next = Slot::new(C, B, true, true);
        let acts = vec![Act::Sweep { est: B, old }, Act::Clear(Slot::clean(B)), store(next)];
        let mut scenario = scenario(moved(B), acts, begins(0));
        let silent = Pin::new(machine::tag(NEW), A, PinState::Established, machine::NOW - 400);
        scenario.shared.pins[0] = silent.bits();
        scenario
    };
    guards(with(false), with(true));
}

#[test]
fn a_sweep_takes_out_only_what_it_has_looked_at() {
    let with = |compare| {
        let acts = vec![Act::Look(0), Act::TakeOut { way: 0, compare }];
        let mut scenario = scenario(moved(B), acts, on(0, OLD, &[Kind::Data, Kind::Data]))
            .old_at_a(Some(machine::NOW - 400));
        // Silent for so long that it may be moved, before it speaks.
        scenario.homes[OLD] = None;
        scenario.settles[OLD] = true;
        scenario
    };
    guards(with(true), with(false));
}

/// The same SYN twice, on two CPUs, across a change, while ways become free. Where one of them is done before the other
/// makes its pin, in a lower way, they may differ: that is a SYN repeated across a change.
#[test]
fn of_two_cpus_that_pin_a_flow_at_once_the_lowest_way_wins() {
    let twice = [on(0, NEW, &[Kind::Syn]), on(1, NEW, &[Kind::Syn]), on(0, NEW, &[Kind::Data])].concat();
    let with = |mutant| {
        let acts = vec![Act::Free(4), store(moving(C, A))];
        let mut scenario = scenario(moving(B, A), acts, twice.clone()).with(mutant);
        scenario.shared.pins[4] = scenario.shared.pins[1];
        scenario.shared.pins[5] = 0;
        (scenario.quiet, scenario.meet) = (0b1100_1111, true);
        scenario
    };
    guards(with(Mutant::None), with(Mutant::NobodyElseIsSeen));
}

/// Slots leave a backend that failed; then its pins go; then it may take flows again.
fn failing() -> Scenario {
    let acts = vec![
        Act::Fails(A),
        flags(A, 0),
        store(moved(B)),
        grace(),
        Act::Do(MapOp::DropPins { ids: vec![A] }),
        grace(),
        Act::Settles,
        flags(A, BackendRow::ACCEPTING),
    ];
    let packets = [on(0, OLD, &[Kind::Data, Kind::Data]), on(1, OLD, &[Kind::Data])].concat();
    scenario(moving(B, A), acts, packets).old_at_a(None)
}

#[test]
fn a_grace_before_pins_of_a_failed_backend_go_lets_all_of_them_be_made() {
    guards(failing(), failing().without(3));
}

#[test]
fn a_grace_after_pins_of_a_failed_backend_went_lets_nobody_follow_them() {
    guards(failing(), failing().without(5));
}

#[test]
fn the_place_that_a_table_left_rests_until_nobody_reads_it() {
    let acts = vec![
        write(ELSEWHERE, &[Slot::clean(A); 4]),
        Act::Do(MapOp::SetTableWord { table: 0, word: TableWord::new(2, 2, Discipline::Hash) }),
        grace(),
        write(ELSEWHERE, &[moving(B, A)]),
        // Another table comes there.
        store(Slot::clean(C)),
    ];
    let grown = || scenario(Slot::clean(A), acts.clone(), begins(0));
    guards(grown(), grown().without(2));
}

#[test]
fn an_agent_that_dies_while_est_follows_leaves_nothing_that_breaks_a_flow() {
    // Another begins with a grace and opens what was closing; the wait begins anew, for ever here.
    for done in 0..=finishing().len() {
        let open = Act::Do(MapOp::SetClosing { table: 0, closing: 0 });
        let acts = [finishing()[..done].to_vec(), vec![grace(), open]].concat();
        let seen = explore(&crowded(moving(B, A), acts, begins(0)).late());
        assert_eq!(seen.broken, None, "after {done} operations");
    }
    assert_eq!(TableState::CLOSING, 1);
}
