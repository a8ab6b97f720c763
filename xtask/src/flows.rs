//! What changes of a pool break: the same flows and the same changes over ways to choose a backend, with and without
//! memory. In user space alone, and the same for the same seed.

mod model;
mod slots;
mod steering;

use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;

use self::model::{Event, Flow, Model, Moment};
use self::slots::Slots;
use self::steering::{Lru, Maglev, Packet, State, Steering};

#[derive(Args)]
pub struct Flows {
    /// Flows that begin in the simulated hour
    #[arg(long, default_value_t = 200_000)]
    flows: u32,
    /// Changes of the pool: backends added, removed, drained, dead, healed, of another weight
    #[arg(long, default_value_t = 60)]
    changes: u32,
    /// Entries of the connection table of those that track every flow, over all CPUs
    #[arg(long, default_value_t = 100_000)]
    lru: usize,
    /// CPUs with a receive queue each
    #[arg(long, default_value_t = 8)]
    cpus: u32,
    /// How often in the hour the receive queues are dealt anew, as another number of them does
    #[arg(long, default_value_t = 2)]
    deals: u32,
    /// Room for pins
    #[arg(long, default_value_t = 100_000)]
    pins: u32,
    /// Spoofed SYNs a second
    #[arg(long, default_value_t = 0)]
    syns: u32,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

pub fn run(arguments: &Flows) -> Result<()> {
    let begun = Instant::now();
    let Simulated { ways, packets, model } = simulate(arguments, steerings(arguments))?;
    say!(
        "{} flows, {packets} packets, {} changes in an hour (seed {}): {}",
        arguments.flows,
        arguments.changes,
        arguments.seed,
        model.changes_made()
    );
    say!("At most {} flows were open at a time.\n", model.most_open());
    show(&ways);
    say!("\n{LEGEND}\nTook {:.1} s.", begun.elapsed().as_secs_f64());
    Ok(())
}

/// How it ended.
struct Simulated {
    ways: Vec<Way>,
    packets: u64,
    model: Model,
}

/// All ways meet the same packets and the same changes.
fn simulate(arguments: &Flows, steerings: Vec<Box<dyn Steering>>) -> Result<Simulated> {
    let mut ways: Vec<Way> = steerings.into_iter().map(Way::new).collect();
    let mut model = Model::new(arguments);
    for way in &mut ways {
        way.steering.change(Duration::ZERO, &model.pool)?;
    }
    let mut packets = 0;
    while let Some((now, event)) = model.next() {
        match event {
            Event::Packet { flow, moment } => {
                packets += 1;
                let (begins, ends) = (moment == Moment::First, moment == Moment::Last);
                let packet = Packet { hash: flow.hash, begins, ends, cpu: flow.cpu };
                for way in &mut ways {
                    way.meets(now, &flow, packet, moment);
                }
            }
            Event::Syn { hash, cpu } => {
                packets += 1;
                for way in &mut ways {
                    way.choose(now, Packet { hash, begins: true, ends: false, cpu });
                }
            }
            Event::Changed { died } => {
                for way in &mut ways {
                    way.steering.change(now, &model.pool)?;
                    way.lose(died);
                }
            }
            Event::Tick => ways.iter_mut().try_for_each(|way| way.tick(now))?,
        }
    }
    Ok(Simulated { ways, packets, model })
}

const LEGEND: &str = "\
broken: flows of which a packet went to another backend while their own lived
after silence: of these, flows that had been silent for longer than the 15 minutes that xlb protects
looked: packets that needed more than the table, of all
state: bytes of what is known of flows, at the end and at most; set aside: what there is room for
Connection tables are exact LRUs (the kernel's are not) of 120 bytes an entry; every SYN is taken in, and an entry of a
backend that died is void.";

fn steerings(arguments: &Flows) -> Vec<Box<dyn Steering>> {
    vec![
        Box::new(Maglev::default()),
        Box::new(Lru::shared(arguments.lru)),
        Box::new(Lru::per_cpu(arguments.lru, arguments.cpus)),
        Box::new(Slots::new(arguments.pins)),
    ]
}

/// A way to choose backends, and what it did to flows.
struct Way {
    steering: Box<dyn Steering>,
    /// Where each flow is, by its number.
    homes: Vec<Home>,
    /// A flow that broke sends no more: each way meets its own.
    packets: u64,
    broken: u64,
    /// Of these, after they had been silent for longer than xlb protects.
    after_silence: u64,
    most_bytes: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Home {
    /// It has none yet, or none any more: it ended, broke, or its backend died.
    None,
    At(u16),
}

impl Way {
    fn new(steering: Box<dyn Steering>) -> Self {
        Self { steering, homes: Vec::new(), packets: 0, broken: 0, after_silence: 0, most_bytes: 0 }
    }

    fn meets(&mut self, now: Duration, flow: &Flow, packet: Packet, moment: Moment) {
        let number = flow.number as usize;
        if self.homes.len() <= number {
            self.homes.resize(number + 1, Home::None);
        }
        if moment != Moment::First && self.homes[number] == Home::None {
            return;
        }
        let to = self.choose(now, packet);
        let home = &mut self.homes[number];
        match *home {
            Home::None => *home = Home::At(to),
            Home::At(backend) if backend != to => {
                self.broken += 1;
                self.after_silence += u64::from(flow.silent > slots::PROTECTED);
                *home = Home::None;
            }
            Home::At(_) => {}
        }
        if moment == Moment::Last {
            *home = Home::None;
        }
    }

    fn choose(&mut self, now: Duration, packet: Packet) -> u16 {
        self.packets += 1;
        self.steering.packet(now, packet)
    }

    /// Flows of a backend that died are nobody's fault.
    fn lose(&mut self, died: Option<u16>) {
        let Some(died) = died else { return };
        for home in &mut self.homes {
            if *home == Home::At(died) {
                *home = Home::None;
            }
        }
    }

    fn tick(&mut self, now: Duration) -> Result<()> {
        self.steering.tick(now)?;
        self.most_bytes = self.most_bytes.max(self.steering.state().bytes);
        Ok(())
    }
}

fn show(ways: &[Way]) {
    say!(
        "{:38} {:>7} {:>13} {:>8} {:>11} {:>11} {:>11}",
        "",
        "broken",
        "after silence",
        "looked",
        "state",
        "at most",
        "set aside"
    );
    for way in ways {
        let State { bytes, reserved, looked } = way.steering.state();
        say!(
            "{:38} {:7} {:13} {:7.2}% {bytes:11} {:11} {reserved:11}",
            way.steering.name(),
            way.broken,
            way.after_silence,
            looked as f64 * 100.0 / way.packets as f64,
            way.most_bytes
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: Flows =
        Flows { flows: 5000, changes: 40, lru: 100_000, cpus: 4, deals: 2, pins: 100_000, syns: 0, seed: 7 };

    fn broken(arguments: &Flows) -> Vec<u64> {
        let simulated = simulate(arguments, steerings(arguments)).unwrap();
        simulated.ways.iter().map(|way| way.broken).collect()
    }

    #[test]
    fn the_same_seed_breaks_the_same_flows() {
        assert_eq!(broken(&SMALL), broken(&SMALL));
        assert_ne!(broken(&SMALL)[0], broken(&Flows { seed: 8, ..SMALL })[0]);
    }

    #[test]
    fn a_table_alone_breaks_flows_and_a_connection_table_with_room_does_not() {
        let [maglev, shared, ..] = broken(&SMALL)[..] else { panic!("which ways?") };
        assert!(maglev > 100, "{maglev}");
        assert_eq!(shared, 0);
    }

    #[test]
    fn slots_break_no_flow_that_speaks_in_time_and_look_at_fewer_packets() {
        for (seed, syns) in [(1, 0), (2, 0), (3, 20), (4, 20)] {
            let arguments = Flows { seed, syns, pins: 2048, ..SMALL };
            let Simulated { ways, .. } =
                simulate(&arguments, vec![Box::new(Slots::new(arguments.pins))]).unwrap();
            assert_eq!(ways[0].broken, ways[0].after_silence, "seed {seed}, {syns} SYNs a second");
            assert!(ways[0].steering.state().looked < ways[0].packets);
        }
    }

    #[test]
    fn without_changes_nothing_breaks() {
        assert!(broken(&Flows { changes: 0, deals: 0, ..SMALL }).iter().all(|broken| *broken == 0));
    }

    #[test]
    fn a_connection_table_that_floods_fill_forgets_flows() {
        let [_, quiet, ..] = broken(&Flows { lru: 2000, ..SMALL })[..] else { panic!("which ways?") };
        let [_, flooded, ..] = broken(&Flows { lru: 2000, syns: 100, ..SMALL })[..] else {
            panic!("which ways?")
        };
        assert!(flooded > quiet, "{flooded} and {quiet}");
    }
}
