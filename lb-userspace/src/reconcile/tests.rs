//! What holds for every sequence of configurations, health and next hops: the plan leads to what is
//! desired, once the flows of before are silent, a second one is empty, and no packet is lost or misled midway.

mod changes;
mod connecting;
mod flows;
mod interleavings;
mod many;
mod midway;
mod moves;
mod packets;
mod precedence;
mod promises;
mod read_back;
mod repin;
mod room;
mod scale;
mod servers;
mod state;
mod sweeps;
mod turns;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lb_common::abi::{
    ABI_VERSION, BACKEND_NOBODY, BACKEND_PASS, Backend as BackendRow, BackendKind, Egress, MOST_BACKENDS,
    Meta, Path, PortKey, PrefixLengths, RULES_PER_ROW, SLOTS_PER_ROW, Source, TableWord, VipTarget, VipWord,
};
use lb_common::forward::forward;
use lb_common::outcome::{Action, Outcome};
use lb_common::packet::Buffer;
use lb_common::slots::Slot;
use lb_common::wire;
use proptest::prelude::*;

use super::connections::Connections;
use super::desired::{
    Desired, DesiredBackend, DesiredTable, Target, World, backend_identity, desired, features, forward_of,
};
use super::entries::{Counted, DesiredRule, DesiredVip, Lead, entries};
use super::image::{Ids, Image, Traced};
use super::moves::{Course, Due, MOST_AT_ONCE, Moves, SLACK, finish, runs};
use super::op::MapOp;
use super::plan::{
    Leave, PlanError, Unpinned, VipEntry, counter_rows, plan, plan_at_once, ports, present_vips, sources,
};
use super::targets::Targets;
use crate::capacity::Capacity;
use crate::config::model::{
    Api, Backend, Check, CheckKind, Config, Flows, Forward, Fragments, Icmp, Limits, Metrics, OnEmpty,
    OuterSource, Pool, Ports, Protocol, Scheduler, Service, SourcePrefix, Sources, Tiers, Timeouts, Unmapped,
    Vip,
};
use crate::nexthop::NextHop;

use self::changes::*;
use self::midway::*;
use self::packets::*;
use self::promises::*;
use self::read_back::*;
use self::state::*;

const LIMITS: Limits = Limits { vips: 256, backends: 512, slots: 48 << 12, pins: 4096, connections: 4096 };
const INGRESS: u32 = 1;
