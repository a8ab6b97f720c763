//! Whether packets find the VIPs that the configuration names, and those only. Knows no backend.

use std::collections::{BTreeSet, HashMap};

use lb_common::abi::{PortKey, PortRule, VipTarget};
use lb_common::wire::{PROTO_TCP, PROTO_UDP};

use super::{Difference, NONE, Names};
use crate::config::model::{Config, Ports, Protocol, Unmapped};
use crate::reconcile::desired::protocol_number;
use crate::reconcile::entries::{Counted, VipKey, marked};
use crate::reconcile::image::Image;
use crate::reconcile::plan::{VipEntry, ports, present_vips};

pub(super) fn compare(
    intended: &Image,
    found: &Image,
    names: &Names,
    config: &Config,
    differences: &mut Vec<Difference>,
) {
    let services: HashMap<Counted, &str> = config
        .services
        .iter()
        .flat_map(|service| service.triples().map(|triple| (triple, service.name.as_str())))
        .map(|((vip, ports, protocol), name)| ((vip, ports, protocol_number(protocol)), name))
        .collect();
    let (wanted, present) = (present_vips(intended), present_vips(found));
    let all: BTreeSet<VipKey> = wanted.keys().chain(present.keys()).copied().collect();
    for key in all {
        let (to, from) = (wanted.get(&key), present.get(&key));
        // An entry that only marks an address comes and goes with those of its ports.
        if let (Some(only), None) | (None, Some(only)) = (to, from)
            && *only == (VipEntry::Address { flags: 0, rules: Vec::new() })
        {
            continue;
        }
        let words = |entry: Option<&VipEntry>, image| {
            entry.map_or(NONE.to_owned(), |entry| words(entry, image, names))
        };
        let (to, from) = (words(to, intended), words(from, found));
        if to != from {
            differences.push(Difference::new(what(key, &services), to, from));
        }
    }
}

fn what(key: VipKey, services: &HashMap<Counted, &str>) -> String {
    if let Some(vip) = marked(key) {
        return format!("VIP {vip}");
    }
    let (address, port) = (key.0, PortKey(key.1));
    let protocol = protocol(port.protocol());
    if port.is_fragments() {
        return format!("fragments to {address} {protocol}");
    }
    let counted: Counted = (address.into(), Ports::Port(port.port()), port.protocol());
    let told = counted.0.with(counted.1);
    match services.get(&counted) {
        Some(name) => format!("service {name}, {told} {protocol}"),
        None => format!("{told} {protocol} (of no service)"),
    }
}

fn words(entry: &VipEntry, image: &Image, names: &Names) -> String {
    match entry {
        VipEntry::Service(target) => lead(*target, image, names),
        VipEntry::Source(_) => "a source of fullnat".to_owned(),
        VipEntry::Address { flags, rules } => {
            let rule = |rule: &PortRule| {
                let protocol = protocol(rule.protocol as u8);
                format!("{} {protocol}: {}", ports(rule), lead(rule.target, image, names))
            };
            let unmapped = match *flags {
                VipTarget::UNMAPPED_PASS => Unmapped::Pass,
                VipTarget::UNMAPPED_REJECT => Unmapped::Reject,
                _ => Unmapped::Drop,
            };
            let rules = rules.iter().map(rule);
            rules.chain([format!("others: {unmapped}")]).collect::<Vec<_>>().join("; ")
        }
    }
}

fn lead(target: VipTarget, image: &Image, names: &Names) -> String {
    let identity = image.table_states.get(usize::from(target.table())).map_or(0, |row| row.identity);
    let by_source = if target.has(VipTarget::SOURCE_HASH) { ", by source" } else { "" };
    let translated = if target.has(VipTarget::TRANSLATED) { ", translated" } else { "" };
    format!("{}{by_source}{translated}", names.table(identity))
}

fn protocol(number: u8) -> String {
    match number {
        PROTO_TCP => Protocol::Tcp.to_string(),
        PROTO_UDP => Protocol::Udp.to_string(),
        number => format!("protocol {number}"),
    }
}
