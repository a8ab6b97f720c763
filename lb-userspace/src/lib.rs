#![deny(unsafe_code)]
pub mod bpf;
pub mod capacity;
pub mod config;
pub mod health;
pub mod nexthop;
pub mod reconcile;
pub mod tables;
