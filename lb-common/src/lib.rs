//! The contract between kernel and agent, and the whole packet path.
//!
//! The packet path (`forward`) is generic over [`packet::Packet`] and [`tables::Tables`]. The same
//! code therefore runs in the kernel, in tests on byte buffers, and inside `xlb lookup`.
//!
//! # Who writes what
//!
//! The agent is the only writer of every map but counters and pins, and holds a file lock while it runs.
//! The packet path writes counters, allowances, pins, and two words of `XLB_TABLE_STATE`.
//!
//! | map | key -> value | absent means | while it is being changed a packet sees |
//! |---|---|---|---|
//! | `XLB_META` | 0 -> [`abi::Meta`] | maps of another make | nothing: the packet path does not read it |
//! | `XLB_VIP_INDEX` | 0 -> [`abi::VipIndex`]: a [`abi::VipWord`] for each family | 0: no VIP of the family | the old set of VIPs or the new one |
//! | | [`abi::PrefixLengths`] for each family | 0: no prefix is a VIP | a length too many, which costs a lookup |
//! | | the filter, 65,536 bits ([`vips::FilterBit`]) | 0: no VIP | a bit too many, which costs a lookup |
//! | `XLB_VIPS4`, `XLB_VIPS6` | row -> bucket | all zero: no VIP | never a bucket that is being written |
//! | `XLB_PORT_RULES` | row -> 4 x [`abi::PortRule`] | number 0: no rule | never a rule that is being written |
//! | `XLB_TABLES` | table -> [`abi::TableWord`] | 0: nobody | the old place of the table or the new one |
//! | `XLB_TABLE_STATE` | table -> [`abi::TableState`] | identity 0: a free table | `closing` before or after |
//! | `XLB_PINS` | hash -> 8 x [`abi::Pin`] | 0: a free place | the old pin or the new one |
//! | `XLB_LOADS` | backend id -> [`abi::Load`] | 0: not busy | |
//! | `XLB_PIN_EVENTS` | [`pins::PinEvent`] -> number, per CPU | | |
//! | `XLB_SLOTS` | row -> 16 x [`slots::Slot`] | 0: nobody | the old backend or the new one, slot by slot |
//! | `XLB_BACKENDS` | id -> [`abi::Backend`] | kind 0: nobody | the old next hop or the new one; the rest is constant |
//! | `XLB_EGRESS` | row -> [`abi::Egress`] | interface 0: unresolved | rows in use are constant |
//! | `XLB_INTERFACES` | interface index -> [`abi::Interface`] | not attached | the old or the new value |
//! | `XLB_SERVERS` | [`quic::ServerKey`] -> backend id | no such server | the old backend or the new one |
//! | `XLB_OUTCOMES` | outcome -> packets, per CPU | | |
//! | `XLB_VIP_TRAFFIC` | VIP -> [`abi::Traffic`], per CPU | | |
//! | `XLB_BE_TRAFFIC` | backend id -> [`abi::Traffic`], per CPU | | |
//! | `XLB_ALLOWANCES` | [`allowance::Limited`] -> [`abi::Allowance`], per CPU | | |
//!
//! # Order of changes
//!
//! Egress rows before the paths that name them, backend rows before slots, slots before the table
//! word, the table word before the VIPs that lead to it, port rules, filter bits and prefix lengths before
//! the buckets that need them, VIP buckets before their word. Removals run
//! in reverse, and a row is given away again only after every program run that could have read its
//! number is over. So a packet meets a backend that is valid in the old or in the new state, and a
//! sequence that breaks off anywhere leaves the maps in a state like that.

#![no_std]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

pub mod abi;
pub mod allowance;
pub mod answer;
pub mod atomic;
pub mod checksum;
pub mod classify;
pub mod connections;
pub mod decap;
pub mod encap;
pub mod flow;
pub mod forward;
pub mod icmp;
pub mod icmp_errors;
pub mod nat;
pub mod outcome;
pub mod packet;
pub mod parse;
pub mod pins;
pub mod quic;
pub mod slots;
pub mod tables;
pub mod translate;
pub mod vips;
pub mod vlan;
pub mod wire;
