//! Every interleaving of packets of translated connections on two CPUs with an agent, in small scenarios: as in
//! `interleavings`, each guard is left out once. With it no packet goes to a backend or a client that is not its own, no two
//! connections have one source port, and none has two places; without it, one does.

mod machine;

use self::machine::{Act, Kind, LIVE, Mutant, NOW, Packet, Scenario, X, Y, explore};
use super::*;

const A: u16 = 1;
const B: u16 = 2;

/// Silent for so long that a sweep takes it out.
const OLD: u16 = NOW - 400;

fn on(cpu: usize, client: usize, kinds: &[Kind]) -> Vec<(usize, Packet)> {
    kinds.iter().map(|&kind| (cpu, Packet { client, kind })).collect()
}

impl Scenario {
    fn with(mut self, mutant: Mutant) -> Self {
        self.mutant = mutant;
        self
    }

    fn without(mut self, act: usize) -> Self {
        self.acts.remove(act);
        self
    }
}

/// With the guard nothing goes wrong in any interleaving, without it something does.
fn guards(guarded: Scenario, unguarded: Scenario) {
    let with = explore(&guarded);
    assert_eq!(with.broken, None, "with the guard, of {} states", with.states);
    assert!(with.states > 15 && with.arrived > 0, "{} states, {} arrived", with.states, with.arrived);
    let without = explore(&unguarded);
    assert!(without.broken.is_some(), "nothing goes wrong without the guard, in {} states", without.states);
    eprintln!("{} states with the guard, {} without: {:?}", with.states, without.states, without.broken);
}

/// A sweep that finds a place old.
fn sweep(place: u32, compare: bool) -> Vec<Act> {
    vec![Act::Look(place), Act::TakeOut { place, compare }]
}

#[test]
fn of_two_cpus_that_open_a_connection_at_once_one_gives_way() {
    for full in [true, false] {
        let twice = [on(0, X, &[Kind::Syn, Kind::Data]), on(1, X, &[Kind::Syn])].concat();
        let scenario = |mutant| Scenario::new(full, Vec::new(), twice.clone()).with(mutant);
        guards(scenario(Mutant::None), scenario(Mutant::NobodyElseIsSeen));
    }
}

/// A place that becomes free meanwhile lets the later opener be the earlier one in the buckets' order.
#[test]
fn who_opens_gives_way_to_a_claim_wherever_it_is() {
    let twice = [on(0, X, &[Kind::Syn]), on(1, X, &[Kind::Syn])].concat();
    let scenario = |mutant| {
        let scenario = Scenario::new(true, sweep(LIVE[0], true), twice.clone());
        scenario.with_connection(Y, (A, LIVE[0]), OLD).with(mutant)
    };
    guards(scenario(Mutant::None), scenario(Mutant::LaterClaimsAreNotSeen));
}

#[test]
fn of_two_clients_that_want_the_last_place_one_gets_it() {
    let both = [on(0, X, &[Kind::Syn, Kind::Data]), on(1, Y, &[Kind::Syn, Kind::Data])].concat();
    let scenario = |mutant| {
        let scenario = Scenario::new(true, Vec::new(), both.clone()).with(mutant);
        scenario.fill(LIVE[1]).fill(LIVE[2])
    };
    guards(scenario(Mutant::None), scenario(Mutant::ClaimsAreStored));
}

#[test]
fn a_sweep_takes_out_only_the_connection_that_it_has_looked_at() {
    let scenario = |compare| {
        let packets = [on(0, X, &[Kind::Data, Kind::Data]), on(1, Y, &[Kind::Syn])].concat();
        let scenario = Scenario::new(true, sweep(LIVE[0], compare), packets);
        scenario.with_connection(X, (A, LIVE[0]), OLD).shared_slot(B)
    };
    guards(scenario(true), scenario(false));
}

/// A packet has found its connection; then that is taken out, and another client opens there.
#[test]
fn a_packet_is_not_sent_by_a_connection_that_took_the_place_of_its_own() {
    let scenario = |mutant| {
        let packets = [on(0, X, &[Kind::Data]), on(1, Y, &[Kind::Syn])].concat();
        let scenario = Scenario::new(true, vec![Act::Drop { claims: false }], packets);
        scenario.with_connection(X, (A, LIVE[0]), NOW).shared_slot(B).with(mutant)
    };
    guards(scenario(Mutant::None), scenario(Mutant::RecordsAreNotAsked));
}

#[test]
fn a_reply_does_not_go_by_a_record_that_changed_hands_while_it_was_read() {
    for full in [true, false] {
        let scenario = |mutant| {
            let packets = [on(0, X, &[Kind::Reply]), on(1, Y, &[Kind::Syn])].concat();
            let scenario = Scenario::new(full, vec![Act::Drop { claims: false }], packets);
            scenario.with_connection(X, (A, LIVE[0]), NOW).shared_slot(B).with(mutant)
        };
        guards(scenario(Mutant::None), scenario(Mutant::PlacesAreReadOnce));
    }
}

#[test]
fn the_way_back_of_a_connection_that_took_a_place_is_not_that_of_the_one_before() {
    let scenario = |mutant| {
        let packets = [on(0, X, &[Kind::Moved]), on(1, Y, &[Kind::Syn])].concat();
        let scenario = Scenario::new(true, vec![Act::Drop { claims: false }], packets);
        scenario.with_connection(X, (A, LIVE[0]), NOW).shared_slot(B).with(mutant)
    };
    guards(scenario(Mutant::None), scenario(Mutant::WaysAreStored));
}

/// What somebody is filling would be filled by two.
#[test]
fn places_that_are_claimed_are_left_alone_when_a_source_goes() {
    let scenario = |claims| {
        let packets = [on(0, X, &[Kind::Syn]), on(1, Y, &[Kind::Syn])].concat();
        Scenario::new(true, vec![Act::Drop { claims }], packets).fill(LIVE[1]).fill(LIVE[2])
    };
    guards(scenario(false), scenario(true));
}

#[test]
fn a_grace_tells_a_claim_that_is_left_over_from_one_that_is_slow() {
    let scenario = || {
        let place = LIVE[0];
        let acts = vec![Act::LookForClaim(place), Act::Grace, Act::TakeOut { place, compare: true }];
        let packets = [on(0, X, &[Kind::Syn]), on(1, Y, &[Kind::Syn])].concat();
        Scenario::new(true, acts, packets).fill(LIVE[1]).fill(LIVE[2])
    };
    guards(scenario(), scenario().without(1));
}

/// A backend fails: slots leave it, then its connections go.
#[test]
fn a_grace_before_connections_of_a_failed_backend_go_lets_all_of_them_be_opened() {
    let failing = || {
        let acts = vec![Act::Slot(B), Act::Grace, Act::DropBackend(A), Act::Nobody(A)];
        Scenario::new(true, acts, on(0, X, &[Kind::Syn, Kind::Syn, Kind::Data]))
    };
    guards(failing(), failing().without(1));
}
