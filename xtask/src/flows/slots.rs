//! xlb's way: slots that remember flows only while they are on the move. The packet path's own rule over memory that the
//! agent's own engine changes, in the time of the simulation.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use lb_common::abi::{BACKEND_NOBODY, Backend, BackendKind, Discipline, Pin, PortKey};
use lb_common::flow::FlowHash;
use lb_common::pins::{PinEvent, Says};
use lb_common::wire::{PROTO_TCP, TcpFlags};
use lb_userspace::capacity::Capacity;
use lb_userspace::config::model::{Limits, Ports, Vip};
use lb_userspace::reconcile::desired::{Desired, DesiredBackend, DesiredTable, OldFlows, Target};
use lb_userspace::reconcile::entries::{DesiredVip, Lead, mark_key};
use lb_userspace::reconcile::memory::Held;
use lb_userspace::reconcile::tracking::{Hands, Tracking};

use super::model::{self, Pool};
use super::steering::{Packet, State, Steering};

/// The protected idle time of TCP.
pub const PROTECTED: Duration = Duration::from_secs(15 * 60);

/// The number of the one table.
const TABLE: u16 = 0;

/// Backend ids: more than are configured and have pins at a time.
const IDS: u16 = 512;

/// The agent looks after slots and pins this often in a tick of the simulation, which is longer than its own.
const LOOKS: usize = 2;

pub struct Slots {
    held: Held,
    tracking: Tracking,
    now: Duration,
}

impl Slots {
    /// Room for so many pins, rounded up to a power of two.
    pub fn new(pins: u32) -> Self {
        let limits = Limits { vips: 1, backends: 1, slots: 1 << model::log2_length(), pins, connections: 0 };
        let held = Held::new(Capacity::new(&limits), IDS);
        let tracking = Tracking::new(held.now());
        Self { held, tracking, now: Duration::ZERO }
    }

    fn set_clock(&mut self, now: Duration) {
        self.held.memory.pass(now.saturating_sub(self.now));
        self.now = now;
    }
}

/// How a backend is known to the plan; 0 is nobody.
fn identity(place: u16) -> u64 {
    u64::from(place) + 1
}

/// What should lie in the maps for a pool.
fn desired(pool: &Pool) -> Desired {
    const POOL: [u64; 3] = [1, 0, 0];
    let configured = (0..).zip(&pool.backends).filter(|(_, backend)| backend.configured);
    let wanted = |(place, backend): (u16, &model::Backend)| {
        let row = Backend {
            kind: BackendKind::Ipip4 as u8,
            flags: u8::from(backend.up) * Backend::ACCEPTING,
            identity: identity(place),
            ..Backend::default()
        };
        // A failed check alone would leave them there for a while; this one is dead.
        let old_flows = if backend.up { OldFlows::Stay } else { OldFlows::Fail };
        let wanted = DesiredBackend { row, next_hop: None, pool: POOL, old_flows, weight: backend.weight };
        (identity(place), wanted)
    };
    let mut desired = Desired { backends: configured.map(wanted).collect(), ..Desired::default() };
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
    desired.tables.insert(table_identity, table.into());
    // A table is there for a VIP.
    let (vip, ports) = (IpAddr::V4(Ipv4Addr::LOCALHOST), Ports::Port(80));
    let lead = Lead { table: table_identity, flags: 0, counted: (Vip::from(vip), ports, PROTO_TCP) };
    Arc::make_mut(&mut desired.vips)
        .insert(mark_key(Vip::from(vip)), DesiredVip::Address { flags: 0, rules: Vec::new() });
    Arc::make_mut(&mut desired.vips).insert((vip, PortKey::new(80, PROTO_TCP).0), DesiredVip::Service(lead));
    desired
}

impl Steering for Slots {
    fn name(&self) -> String {
        "xlb: pins while a slot moves".to_owned()
    }

    fn change(&mut self, now: Duration, pool: &Pool) -> Result<()> {
        self.set_clock(now);
        Ok(self.tracking.reconcile(&mut self.held, desired(pool))?)
    }

    fn tick(&mut self, now: Duration) -> Result<()> {
        self.set_clock(now);
        for _ in 0..LOOKS {
            let changed = self.tracking.look_after(&mut self.held)?;
            if changed || self.tracking.is_paced(self.held.now()) {
                let wanted = self.tracking.desired.clone();
                self.tracking.reconcile(&mut self.held, wanted)?;
            }
        }
        Ok(())
    }

    fn packet(&mut self, now: Duration, packet: Packet) -> u16 {
        self.set_clock(now);
        let flags = match packet {
            Packet { begins: true, .. } => TcpFlags::SYN,
            Packet { ends: true, .. } => TcpFlags::FIN | TcpFlags::ACK,
            _ => TcpFlags::ACK,
        };
        let says = Says::tcp(TcpFlags { data_offset: 5 << 4, flags });
        let steered = self.held.memory.steer(TABLE, FlowHash::from_bits(packet.hash), says);
        let id = steered.unwrap_or(BACKEND_NOBODY);
        // Ids begin at 1 as well, but are the plan's to give.
        (self.held.image.backends[usize::from(id)].identity.wrapping_sub(1)) as u16
    }

    /// Of pins, what the last sweep found.
    fn state(&self) -> State {
        State {
            bytes: self.tracking.found.pins * size_of::<Pin>() as u64,
            reserved: (self.held.image.pins.words().len() * size_of::<Pin>()) as u64,
            looked: self.held.memory.count(PinEvent::Looked),
        }
    }
}
