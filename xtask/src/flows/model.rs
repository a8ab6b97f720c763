//! Flows that come, speak and go, and a pool that changes meanwhile; it knows nothing of how backends are chosen.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use fastrand::Rng;
use lb_common::flow::fingerprint;
use lb_userspace::tables::maglev::{self, Member};
use lb_userspace::tables::overlay;

use super::Flows;

/// Flows begin in this time.
const LENGTH: Duration = Duration::from_secs(3600);
const TICK: Duration = Duration::from_secs(5);

const SEED: u64 = 0x5f1d_0c3a_9be2_4771;

/// Backends at the start, and fewest and most that are configured.
const BACKENDS: u16 = 20;
const FEWEST: usize = 12;
const MOST: usize = 36;
/// Dead ones at a time.
const MOST_DEAD: usize = 3;

/// From a SYN to what follows it.
const ROUND_TRIP: Duration = Duration::from_millis(50);

/// How flows live: of a thousand, mean life, mean gap between packets.
///
/// Lives and gaps are exponential. The last kind is silent for longer than a protected idle time now and then.
const KINDS: [(u32, Duration, Duration); 4] = [
    (800, Duration::from_secs(5), Duration::from_millis(500)),
    (150, Duration::from_secs(120), Duration::from_secs(5)),
    (49, Duration::from_secs(1800), Duration::from_secs(30)),
    (1, Duration::from_secs(7200), Duration::from_secs(300)),
];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Moment {
    First,
    Middle,
    Last,
}

/// A flow, for one packet of it.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    /// Numbers are used again.
    pub number: u32,
    pub hash: u64,
    /// Whose receive queue it comes in on just now.
    pub cpu: u32,
    /// Since its last packet.
    pub silent: Duration,
}

pub enum Event {
    Packet {
        flow: Flow,
        moment: Moment,
    },
    /// From nowhere, and nothing follows.
    Syn {
        hash: u64,
        cpu: u32,
    },
    Changed {
        died: Option<u16>,
    },
    Tick,
}

/// A backend of the pool; its place is its number and is never given to another.
#[derive(Clone, Debug)]
pub struct Backend {
    pub address: Ipv4Addr,
    pub weight: u8,
    pub configured: bool,
    pub drained: bool,
    pub up: bool,
}

#[derive(Clone, Debug)]
pub struct Pool {
    pub backends: Vec<Backend>,
}

impl Pool {
    fn new() -> Self {
        let mut pool = Self { backends: Vec::new() };
        (0..BACKENDS).for_each(|_| pool.add());
        pool
    }

    fn add(&mut self) {
        let address = Ipv4Addr::from(0x0a00_0100 + self.backends.len() as u32);
        self.backends.push(Backend { address, weight: 100, configured: true, drained: false, up: true });
    }

    /// The backend of every slot: Maglev over those that are configured, with those over it that are down or drained.
    pub fn table(&self) -> Vec<u16> {
        let places: Vec<usize> = (0..self.backends.len()).filter(|&i| self.backends[i].configured).collect();
        let member = |&place: &usize| {
            let Backend { address, weight, .. } = self.backends[place];
            Member::new(SEED, IpAddr::from(address), weight)
        };
        let members: Vec<Member> = places.iter().map(member).collect();
        let share = |&place: &usize| match &self.backends[place] {
            Backend { up: true, drained: false, .. } => overlay::FULL,
            _ => 0,
        };
        let shares: Vec<u16> = places.iter().map(share).collect();
        let log2 = log2_length();
        let base = maglev::build(log2, &members);
        let table = overlay::apply(&base, &members, &shares).unwrap_or_else(|| base.into());
        table.iter().map(|&index| places[usize::from(index)] as u16).collect()
    }
}

/// Tables have room for every backend that comes: none of them grows.
pub fn log2_length() -> u32 {
    maglev::log2_length(MOST)
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Change {
    Add,
    Remove,
    Drain,
    Enable,
    Die,
    Heal,
    Reweight,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Add => "added",
            Self::Remove => "removed",
            Self::Drain => "drained",
            Self::Enable => "enabled",
            Self::Die => "died",
            Self::Heal => "healed",
            Self::Reweight => "reweighted",
        })
    }
}

/// What is due; at the same time, in this order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    Tick,
    Change,
    Deal,
    Arrival,
    Syn,
    Packet(u32),
}

struct Open {
    hash: u64,
    gap: Duration,
    end: Duration,
    /// When it spoke last.
    spoke: Duration,
}

pub struct Model {
    pub pool: Pool,
    random: Rng,
    /// The changes' own, so that they are the same for any number of flows.
    hand: Rng,
    due: BinaryHeap<Reverse<(Duration, Due)>>,
    open: Vec<Open>,
    /// Numbers of flows that ended.
    free: Vec<u32>,
    most_open: usize,
    arrivals_left: u32,
    between_arrivals: Duration,
    between_syns: Option<Duration>,
    cpus: u32,
    deal: u64,
    made: BTreeMap<Change, u32>,
}

impl Model {
    pub fn new(arguments: &Flows) -> Self {
        let mut hand = Rng::with_seed(arguments.seed ^ 0xc0ff_ee00);
        let mut due = BinaryHeap::new();
        due.push(Reverse((Duration::ZERO, Due::Arrival)));
        due.push(Reverse((Duration::ZERO, Due::Tick)));
        // Flows are there before the first change, and after the last.
        for (count, kind) in [(arguments.changes, Due::Change), (arguments.deals, Due::Deal)] {
            for number in 0..count {
                let place = (f64::from(number) + hand.f64()) / f64::from(count);
                due.push(Reverse((LENGTH.mul_f64(0.1 + 0.8 * place), kind)));
            }
        }
        let between_syns = (arguments.syns > 0).then(|| Duration::from_secs(1) / arguments.syns);
        if between_syns.is_some() {
            due.push(Reverse((Duration::ZERO, Due::Syn)));
        }
        Self {
            pool: Pool::new(),
            random: Rng::with_seed(arguments.seed),
            hand,
            due,
            open: Vec::new(),
            free: Vec::new(),
            most_open: 0,
            arrivals_left: arguments.flows,
            between_arrivals: LENGTH / arguments.flows.max(1),
            between_syns,
            cpus: arguments.cpus.max(1),
            deal: 0,
            made: BTreeMap::new(),
        }
    }

    pub fn most_open(&self) -> usize {
        self.most_open
    }

    /// "3 added, 2 died"
    pub fn changes_made(&self) -> String {
        let words: Vec<String> =
            self.made.iter().map(|(change, count)| format!("{count} {change}")).collect();
        words.join(", ")
    }

    /// What happens next and when, until the hour is over.
    pub fn next(&mut self) -> Option<(Duration, Event)> {
        loop {
            let Reverse((now, due)) = self.due.pop()?;
            if now >= LENGTH {
                return None;
            }
            let event = match due {
                Due::Tick => {
                    self.plan(now + TICK, Due::Tick);
                    Event::Tick
                }
                Due::Change => Event::Changed { died: self.change() },
                Due::Deal => {
                    self.deal += 1;
                    continue;
                }
                Due::Arrival if self.arrivals_left == 0 => continue,
                Due::Arrival => self.arrive(now),
                Due::Syn => {
                    self.plan(now + self.between_syns.unwrap_or(LENGTH), Due::Syn);
                    let hash = self.random.u64(..);
                    Event::Syn { hash, cpu: self.cpu(hash) }
                }
                Due::Packet(number) => self.speak(now, number),
            };
            return Some((now, event));
        }
    }

    fn plan(&mut self, at: Duration, due: Due) {
        self.due.push(Reverse((at, due)));
    }

    fn arrive(&mut self, now: Duration) -> Event {
        self.arrivals_left -= 1;
        let next = exponential(&mut self.random, self.between_arrivals);
        self.plan(now + next, Due::Arrival);
        let (life, gap) = kind(&mut self.random);
        let end = now + exponential(&mut self.random, life);
        let flow = Open { hash: self.random.u64(..), gap, end, spoke: now };
        let number = self.free.pop().unwrap_or(self.open.len() as u32);
        let event =
            Event::Packet { flow: self.flow(number, flow.hash, Duration::ZERO), moment: Moment::First };
        if number as usize == self.open.len() {
            self.open.push(flow);
        } else {
            self.open[number as usize] = flow;
        }
        self.most_open = self.most_open.max(self.open.len() - self.free.len());
        // The client's part of the handshake, and its first question.
        self.plan(now + ROUND_TRIP, Due::Packet(number));
        event
    }

    fn speak(&mut self, now: Duration, number: u32) -> Event {
        let Open { hash, end, spoke, .. } = self.open[number as usize];
        self.open[number as usize].spoke = now;
        let moment = if now >= end {
            self.free.push(number);
            Moment::Last
        } else {
            self.plan_packet(now, number);
            Moment::Middle
        };
        Event::Packet { flow: self.flow(number, hash, now - spoke), moment }
    }

    /// The next packet of a flow; its last one comes at its end.
    fn plan_packet(&mut self, now: Duration, number: u32) {
        let Open { gap, end, .. } = self.open[number as usize];
        let gap = exponential(&mut self.random, gap);
        self.plan((now + gap).min(end), Due::Packet(number));
    }

    fn flow(&self, number: u32, hash: u64, silent: Duration) -> Flow {
        Flow { number, hash, cpu: self.cpu(hash), silent }
    }

    fn cpu(&self, hash: u64) -> u32 {
        (fingerprint(self.deal, &hash.to_le_bytes()) % u64::from(self.cpus)) as u32
    }

    /// Changes the pool in a way that it can be changed now. Returns who died.
    fn change(&mut self) -> Option<u16> {
        use Change::{Add, Die, Drain, Enable, Heal, Remove, Reweight};
        loop {
            let change = self.hand.choice([Add, Remove, Drain, Enable, Die, Heal, Reweight])?;
            let backends = &mut self.pool.backends;
            let configured = backends.iter().filter(|backend| backend.configured).count();
            let serving = |backend: &Backend| backend.configured && backend.up && !backend.drained;
            let fits = |backend: &Backend| match change {
                Add => false,
                Remove => backend.configured && backend.up,
                Drain | Die | Reweight => serving(backend),
                Enable => backend.configured && backend.drained,
                Heal => backend.configured && !backend.up,
            };
            let candidates: Vec<usize> = (0..backends.len()).filter(|&i| fits(&backends[i])).collect();
            let dead = backends.iter().filter(|backend| backend.configured && !backend.up).count();
            let few = backends.iter().filter(|backend| serving(backend)).count() <= FEWEST;
            let possible = match change {
                Add => configured < MOST,
                Remove | Drain => !few,
                Die => !few && dead < MOST_DEAD,
                Enable | Heal | Reweight => true,
            };
            if !possible || (change != Add && candidates.is_empty()) {
                continue;
            }
            *self.made.entry(change).or_default() += 1;
            let place = self.hand.choice(candidates).unwrap_or(0);
            match change {
                Add => self.pool.add(),
                Remove => backends[place].configured = false,
                Drain => backends[place].drained = true,
                Enable => backends[place].drained = false,
                Die => backends[place].up = false,
                Heal => backends[place].up = true,
                Reweight => backends[place].weight = self.hand.u8(25..=100),
            }
            return (change == Die).then_some(place as u16);
        }
    }
}

/// Mean life and mean gap of a flow that begins.
fn kind(random: &mut Rng) -> (Duration, Duration) {
    let die = random.u32(..1000);
    let mut reached = 0;
    let kind = KINDS.iter().find(|kind| {
        reached += kind.0;
        die < reached
    });
    let (_, life, gap) = *kind.unwrap_or(&KINDS[0]);
    (life, gap)
}

fn exponential(random: &mut Rng, mean: Duration) -> Duration {
    mean.mul_f64(-(1.0 - random.f64()).ln())
}
