//! Connections under sweeps, and under a flush: what goes, what stays, and what is counted.

use lb_common::abi::{BACKEND_CLAIMED, Record};
use lb_common::connections::seen;

use super::*;
use crate::config::model::Timeouts;
use crate::reconcile::connections::Connections;
use crate::reconcile::pins::Pins;

const TIMEOUTS: Timeouts =
    Timeouts { syn: Duration::from_secs(30), fin: Duration::from_secs(120), reset: Duration::from_secs(10) };
const TCP: Duration = Duration::from_secs(900);
const UDP: Duration = Duration::from_secs(60);

/// Connections in places from the first on, with what was seen of them.
fn connections(all: &[(Pin, u64)]) -> Connections {
    let connections = Connections::in_memory(all.len().next_multiple_of(PINS_PER_BUCKET).max(16));
    for (place, (pin, seen)) in all.iter().enumerate() {
        connections.records()[place].0[Record::PORTS].store(*seen, Ordering::SeqCst);
        connections.words()[place].store(pin.bits(), Ordering::SeqCst);
    }
    connections
}

fn sweep(connections: &Connections, age: u16) -> Found {
    let (mut sweeper, now) = (Sweeper::default(), Instant::now());
    let rules = Rules { timeouts: TIMEOUTS, ..rules(TCP, UDP) };
    sweeper.begin(&image_of([Slot::clean(A); 2]), rules, now);
    let pins = Pins::default();
    sweeper.step(Places::of(&pins, connections), connections.len(), age, now).expect("a whole cycle")
}

#[test]
fn connections_expire_by_their_state_and_leftovers_of_openers_soon() {
    for (state, backend, seen, protected) in [
        (PinState::Syn, A, 0, TIMEOUTS.syn),
        (PinState::Established, A, 0, TCP),
        (PinState::Established, A, seen::RESET, TCP),
        (PinState::Finishing, A, 0, TIMEOUTS.fin),
        (PinState::Finishing, A, seen::ANSWER, TIMEOUTS.fin),
        (PinState::Finishing, A, seen::ANSWER | seen::RESET, TIMEOUTS.reset),
        (PinState::Datagram, A, 0, UDP),
        (PinState::Datagram, 9, 0, TCP),
        (PinState::Syn, BACKEND_CLAIMED, 0, Duration::from_secs(5)),
        (PinState::Established, BACKEND_CLAIMED, seen::RESET, Duration::from_secs(5)),
    ] {
        let expired = |idle: u16| {
            let all = connections(&[(Pin::new(7, backend, state, NOW - idle), seen)]);
            let found = sweep(&all, NOW);
            assert_eq!(all.words()[0].load(Ordering::SeqCst) == 0, found.expired == 1);
            found.expired
        };
        // At its last packet a unit may have begun, or be about to end; so may it now.
        let whole = (protected.as_nanos() / UNIT.as_nanos()) as u16;
        assert_eq!(expired(whole + 1), 0, "{state:?} of {backend}, {seen:x}");
        assert_eq!(expired(whole + 2), 1, "{state:?} of {backend}, {seen:x}");
    }
}

#[test]
fn a_sweep_counts_connections_by_backend_and_state_and_claimed_places_for_nobody() {
    let all = connections(&[
        (Pin::new(1, A, PinState::Syn, NOW), 0),
        (Pin::new(2, A, PinState::Established, NOW), 0),
        (Pin::new(3, A, PinState::Established, NOW), 0),
        (Pin::new(4, A, PinState::Finishing, NOW), 0),
        (Pin::new(5, B, PinState::Datagram, NOW), 0),
        (Pin::new(6, BACKEND_CLAIMED, PinState::Syn, NOW), 0),
    ]);
    let found = sweep(&all, NOW);
    assert_eq!((found.pins, found.connections, found.expired), (0, 6, 0));
    let of = |id| (found.of(id).connections, found.of(id).active, found.of(id).is_empty());
    assert_eq!(of(A), ([1, 2, 1, 0], 3, false));
    assert_eq!(of(B), ([0, 0, 0, 1], 1, false));
    assert_eq!((of(BACKEND_CLAIMED), of(3)), (([0; 4], 0, true), ([0; 4], 0, true)));
}

#[test]
fn a_cycle_goes_over_pins_then_connections_in_steps_of_the_same_size() {
    let pins = words_of(&[Pin::new(tag(false, 0), A, PinState::Established, NOW); 2 * PINS_PER_BUCKET]);
    let all = connections(&[(Pin::new(1, B, PinState::Established, NOW), 0); 24]);
    let places = Places { pins: &pins, connections: all.words(), records: all.records() };
    for buckets in 1..=6 {
        let (mut sweeper, now) = (Sweeper::default(), Instant::now());
        sweeper.begin(&image_of([Slot::clean(A); 2]), rules(TCP, UDP), now);
        let mut steps = 1;
        let found = loop {
            match sweeper.step(places, buckets, NOW, now) {
                Some(found) => break found,
                None => steps += 1,
            }
        };
        assert_eq!((steps, found.pins, found.connections), (5usize.div_ceil(buckets), 16, 24), "{buckets}");
        assert_eq!((found.of(A).active, found.of(B).active), (16, 24));
    }
}

#[test]
fn an_id_rests_while_a_connection_names_it_even_one_that_has_ended() {
    let mut tracked = Tracked::new();
    tracked.held.image.connections = connections(&[]);
    let connections = tracked.held.image.connections.clone();
    tracked.want(&[10], 10);
    let id = tracked.held.image.ids()[&10];
    let put = |tracked: &Tracked, state| {
        connections.words()[3].store(Pin::new(5, id, state, tracked.held.age()).bits(), Ordering::SeqCst);
    };
    put(&tracked, PinState::Established);
    tracked.want(&[11], 11);
    for _ in 0..5 {
        tracked.pass(T1 * 9 / 10, &[11], 11);
        put(&tracked, PinState::Established);
    }
    assert_eq!(tracked.tracking.found.of(id).active, 1, "a drain waits for it");
    put(&tracked, PinState::Finishing);
    tracked.pass(Duration::from_secs(3), &[11], 11);
    assert_eq!(tracked.tracking.found.of(id).active, 0, "no drain waits for it");
    assert_eq!(tracked.rows(), BTreeSet::from([10, 11]), "its last packets still go there");
    tracked.pass(TIMEOUTS.fin * 2, &[11], 11);
    assert_eq!(tracked.rows(), BTreeSet::from([11]));
    assert_eq!(connections.at(3), None);
}

#[test]
fn a_backend_of_least_connections_is_as_busy_as_its_connections_that_have_not_ended() {
    let mut tracked = Tracked::new();
    let states = [PinState::Syn, PinState::Established, PinState::Finishing, PinState::Datagram];
    let mut desired = wanted(&[10], 10);
    let table = Arc::make_mut(desired.tables.get_mut(&1).expect("its table"));
    (table.discipline, table.est) = (Discipline::Least, Some(vec![Target::Backend(10); 2].into()));
    tracked.tracking.reconcile(&mut tracked.held, desired).expect("within the limits");
    let id = tracked.held.image.ids()[&10];
    let pin = |(tag, state)| (Pin::new(tag, id, state, tracked.held.age()), 0);
    let all: Vec<_> = (1..).zip(states).map(pin).collect();
    tracked.held.image.connections = connections(&all);
    for _ in 0..4 {
        tracked.held.memory.pass(Duration::from_millis(500));
        tracked.tracking.look_after(&mut tracked.held).expect("within the limits");
    }
    let load = lb_common::tables::Tables::load(&*tracked.held.memory, id).expect("a load");
    assert_eq!(load.active.load(Ordering::SeqCst), 3);
}

/// Packets renew a connection as they do it: by exchanges.
fn renew(word: &AtomicU64, age: u16) -> bool {
    let pin = Pin::from_bits(word.load(Ordering::Acquire));
    let next = Pin::new(pin.tag(), pin.backend(), pin.state(), age);
    !pin.is_free()
        && word.compare_exchange(pin.bits(), next.bits(), Ordering::SeqCst, Ordering::SeqCst).is_ok()
}

#[test]
fn a_sweep_that_meets_packets_takes_out_none_that_was_just_renewed() {
    let old = Pin::new(1, A, PinState::Syn, NOW - 100);
    let all = connections(&[(old, 0); 64]);
    for _ in 0..200 {
        all.words().iter().for_each(|word| word.store(old.bits(), Ordering::SeqCst));
        let renewed: Vec<usize> = std::thread::scope(|scope| {
            let packets = scope.spawn(|| {
                let places = all.words().iter().enumerate().rev();
                places.filter(|(_, word)| renew(word, NOW)).map(|(place, _)| place).collect()
            });
            sweep(&all, NOW);
            packets.join().expect("packets")
        });
        for (place, word) in all.words().iter().enumerate() {
            assert_eq!(word.load(Ordering::SeqCst) != 0, renewed.contains(&place), "{place}");
        }
    }
}

#[test]
fn what_is_read_of_a_connection_is_of_one_moment() {
    let all = connections(&[]);
    let done = AtomicBool::new(false);
    // The client's low word and the tag belong together.
    let open = |number: u32| {
        let claim = Pin::new(number, BACKEND_CLAIMED, PinState::Syn, NOW);
        all.words()[0].store(claim.bits(), Ordering::SeqCst);
        for word in &all.records()[0].0 {
            word.store(u64::from(number), Ordering::SeqCst);
        }
        all.words()[0].store(Pin::new(number, A, PinState::Syn, NOW).bits(), Ordering::SeqCst);
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in (1..).take_while(|_| !done.load(Ordering::SeqCst)) {
                open(number);
                all.words()[0].store(0, Ordering::SeqCst);
            }
        });
        let mut read = 0;
        while read < 10_000 {
            if let Some((pin, words)) = all.at(0) {
                assert_eq!(words, [u64::from(pin.tag()); 8]);
                read += 1;
            }
        }
        done.store(true, Ordering::SeqCst);
    });
}
