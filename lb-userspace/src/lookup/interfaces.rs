//! Names of interfaces for indexes and back, as this process's network namespace has them.

use std::collections::HashMap;

use rustix::net::netdevice::{index_to_name, name_to_index};
use rustix::net::{AddressFamily, SocketType, socket};

use super::Explanation;

/// Interfaces that are gone have no name.
fn name(ifindex: u32) -> Option<String> {
    let socket = socket(AddressFamily::UNIX, SocketType::DGRAM, None).ok()?;
    index_to_name(socket, ifindex).ok()
}

pub fn index(name: &str) -> Option<u32> {
    let socket = socket(AddressFamily::UNIX, SocketType::DGRAM, None).ok()?;
    name_to_index(socket, name).ok()
}

/// Names of some interfaces for a message.
pub fn names(indexes: impl Iterator<Item = u32>) -> String {
    let mut names: Vec<String> = indexes.filter_map(name).collect();
    names.sort();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// Puts in what the interfaces are called.
pub fn put_names(told: &mut [Explanation]) {
    let mut known = HashMap::new();
    let mut find = |ifindex: u32| known.entry(ifindex).or_insert_with(|| name(ifindex)).clone();
    for told in told {
        told.ingress = find(told.ingress_ifindex);
        told.egress = told.egress_ifindex.and_then(&mut find);
    }
}
