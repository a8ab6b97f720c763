//! xlb's way: slots that remember flows only while they are on the move. The packet path's own rule over memory that the
//! agent's own engine changes.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::Result;
use lb_common::abi::{Backend, BackendKind, Discipline, Pin, PortKey};
use lb_common::flow::FlowHash;
use lb_common::pins::{PinEvent, Says};
use lb_common::wire::{PROTO_TCP, TcpFlags};
use lb_userspace::config::model::{Ports, Vip};
use lb_userspace::reconcile::desired::{Desired, DesiredBackend, DesiredTable, OldFlows, Target};
use lb_userspace::reconcile::entries::{DesiredVip, Lead, mark_key};
use lb_userspace::reconcile::moves::{Course, Moves, runs};
use lb_userspace::reconcile::plan::{Leave, Unpinned, plan};
use lb_userspace::reconcile::sweep::{Rules, Sweeper};

use super::memory::{Memory, TABLE};
use super::model::{self, Pool};
use super::steering::{Packet, State, Steering};

/// The protected idle time of TCP.
pub const PROTECTED: Duration = Duration::from_secs(15 * 60);

/// All pins are looked at this often.
const SWEEP: Duration = Duration::from_secs(30);

pub struct Slots {
    memory: Memory,
    begin: Instant,
    moves: Moves,
    swept: Duration,
    pins: u64,
}

impl Slots {
    pub fn new(pins: u32) -> Self {
        let begin = Instant::now();
        Self {
            memory: Memory::new(1 << model::log2_length(), pins),
            begin,
            moves: Moves::new(begin),
            swept: Duration::ZERO,
            pins: 0,
        }
    }

    fn sweep(&mut self, now: Duration) {
        let (at, age) = (self.begin + now, Pin::age_of(now.as_nanos() as u64));
        let mut sweeper = Sweeper::default();
        sweeper.begin(&self.memory.image, Rules { longest: PROTECTED, ..Rules::default() }, at);
        let found = self.memory.with_pins(|pins| sweeper.step(pins, pins.len(), age, at));
        if let Some(found) = found {
            self.memory.apply(&runs(found.clear));
            self.pins = found.pins;
        }
    }
}

/// How a backend is known to the plan; 0 is nobody.
fn identity(place: u16) -> u64 {
    u64::from(place) + 1
}

/// What should lie in the maps for a pool.
fn desired(pool: &Pool) -> Desired {
    const POOL: [u64; 3] = [1, 0, 0];
    let mut desired = Desired::default();
    for (place, backend) in (0..).zip(&pool.backends).filter(|(_, backend)| backend.configured) {
        let row = Backend {
            kind: BackendKind::Ipip4 as u8,
            flags: u8::from(backend.up) * Backend::ACCEPTING,
            identity: identity(place),
            ..Backend::default()
        };
        // A failed check alone would leave them there for a while; this one is dead.
        let old_flows = if backend.up { OldFlows::Stay } else { OldFlows::Fail };
        let wanted = DesiredBackend { row, next_hop: None, pool: POOL, old_flows, weight: backend.weight };
        desired.backends.insert(identity(place), wanted);
    }
    let table = DesiredTable {
        log2_length: model::log2_length(),
        cur: pool.table().into_iter().map(|place| Target::Backend(identity(place))).collect(),
        est: None,
        discipline: Discipline::Hash,
        pools: vec![0],
        pool_set: POOL,
        idle: PROTECTED,
        protocol: PROTO_TCP,
    };
    let table_identity = 1;
    desired.tables.insert(table_identity, table);
    // A table is there for a VIP.
    let (vip, ports) = (IpAddr::V4(Ipv4Addr::LOCALHOST), Ports::Port(80));
    let lead = Lead { table: table_identity, flags: 0, counted: (Vip::from(vip), ports, PROTO_TCP) };
    desired.vips.insert(mark_key(Vip::from(vip)), DesiredVip::Address { flags: 0, rules: Vec::new() });
    desired.vips.insert((vip, PortKey::new(80, PROTO_TCP).0), DesiredVip::Service(lead));
    desired
}

impl Steering for Slots {
    fn name(&self) -> String {
        "xlb: pins while a slot moves".to_owned()
    }

    /// All at once: an agent that spreads a change over seconds breaks no fewer flows.
    fn change(&mut self, now: Duration, pool: &Pool) -> Result<()> {
        self.memory.refresh();
        let leave = Leave { unpinned: Unpinned::Ids(HashSet::new()), moves: usize::MAX };
        let wanted = desired(pool);
        loop {
            let plan = plan(&self.memory.image, &wanted, &self.memory.capacity, &leave)?;
            self.memory.apply(&plan.ops);
            if !plan.again {
                break;
            }
        }
        self.moves.observe(&self.memory.image, self.begin + now);
        Ok(())
    }

    fn tick(&mut self, now: Duration) {
        let at = self.begin + now;
        self.memory.refresh();
        self.moves.observe(&self.memory.image, at);
        let course = Course { idle: PROTECTED, est: None };
        for (_, ops) in
            self.moves.due(&self.memory.image, at, |table| (table == TABLE).then(|| course.clone()))
        {
            self.memory.apply(&ops);
        }
        if now - self.swept >= SWEEP {
            self.swept = now;
            self.sweep(now);
        }
    }

    fn packet(&mut self, now: Duration, packet: Packet) -> u16 {
        self.memory.now_ns = now.as_nanos() as u64;
        let flags = match packet {
            Packet { begins: true, .. } => TcpFlags::SYN,
            Packet { ends: true, .. } => TcpFlags::FIN | TcpFlags::ACK,
            _ => TcpFlags::ACK,
        };
        let says = Says::tcp(TcpFlags { data_offset: 5 << 4, flags });
        let id = self.memory.steer(FlowHash::from_bits(packet.hash), says);
        // Ids begin at 1 as well, but are the plan's to give.
        (self.memory.image.backends[usize::from(id)].identity - 1) as u16
    }

    /// Of pins, what the last sweep found.
    fn state(&self) -> State {
        State {
            bytes: self.pins * size_of::<Pin>() as u64,
            reserved: self.memory.reserved(),
            looked: self.memory.count(PinEvent::Looked),
        }
    }
}
