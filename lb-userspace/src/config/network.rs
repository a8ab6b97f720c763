//! `outer_source`: prefixes that tunnel packets take their source from. Knows no other key.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};

use super::model::{OuterSource, Vip};
use super::problem::{Report, Spot, show};
use super::read::{At, Fields, Wrong};

const WANT: &str = "a prefix such as 10.255.0.0/24, or a list with one for each family";

/// At most one prefix of each family, with its place.
#[derive(Default)]
pub(super) struct WrittenSource {
    v4: Option<(Ipv4Network, Spot)>,
    v6: Option<(Ipv6Network, Spot)>,
}

impl WrittenSource {
    pub fn model(&self) -> OuterSource {
        OuterSource { v4: self.v4.as_ref().map(|(net, _)| *net), v6: self.v6.as_ref().map(|(net, _)| *net) }
    }

    /// The prefix that has addresses in common with the VIP, and its place.
    pub fn overlapping(&self, vip: Vip) -> Option<(IpNetwork, &Spot)> {
        let v4 = self.v4.as_ref().map(|(net, spot)| (IpNetwork::V4(*net), spot));
        let v6 = self.v6.as_ref().map(|(net, spot)| (IpNetwork::V6(*net), spot));
        [v4, v6].into_iter().flatten().find(|(net, _)| vip.overlaps(*net))
    }
}

pub(super) fn outer_source(fields: &Fields<'_>, report: &mut Report) -> WrittenSource {
    let mut source = WrittenSource::default();
    let Some(list) = fields.get("outer_source") else {
        return source;
    };
    for at in list.one_or_more(WANT, report) {
        match at.value(WANT, prefix, report) {
            Some(IpNetwork::V4(net)) => put(&mut source.v4, net, "IPv4", &at, report),
            Some(IpNetwork::V6(net)) => put(&mut source.v6, net, "IPv6", &at, report),
            None => {}
        }
    }
    source
}

fn put<N>(slot: &mut Option<(N, Spot)>, net: N, family: &str, at: &At<'_>, report: &mut Report) {
    if let Some((_, first)) = slot {
        let message = format!("a second {family} prefix, the first is at {first}");
        at.wrong(Wrong { message, hint: "keep one for each family".into() }, report);
    } else {
        *slot = Some((net, at.spot()));
    }
}

fn prefix(text: &str) -> Result<IpNetwork, Wrong> {
    let wrong = |message: String, hint: String| Err(Wrong { message, hint });
    if let Ok(address) = text.parse::<IpAddr>() {
        // What is suggested must be valid itself, here and below.
        let one = prefix(&IpNetwork::from(address).to_string())?;
        return wrong(format!("{address} has no prefix length"), format!("write {one} for this one address"));
    }
    network(text, WANT, "a source")
}

/// A prefix with its length as a number, no bit set behind it, and only addresses that can be `role`.
pub(super) fn network(text: &str, want: &str, role: &str) -> Result<IpNetwork, Wrong> {
    let wrong = |message: String, hint: String| Err(Wrong { message, hint });
    let Ok(net) = text.parse::<IpNetwork>() else {
        return wrong(format!("{} is not a prefix", show(text)), format!("use {want}"));
    };
    if text.rsplit('/').next() != Some(net.prefix().to_string().as_str()) {
        let plain = network(&net.to_string(), want, role)?;
        return wrong(format!("{} has an unusual prefix length", show(text)), format!("write {plain}"));
    }
    if net.ip() != net.network() {
        let masked = network(&format!("{}/{}", net.network(), net.prefix()), want, role)?;
        return wrong(format!("{net} has bits set behind its prefix length"), format!("write {masked}"));
    }
    if let Some(what) = unusable(net) {
        return wrong(format!("{net} holds {what} addresses, which cannot be {role}"), format!("use {want}"));
    }
    Ok(net)
}

/// What kind of address within `net` no packet on the wire may come from, or go to as to one host.
fn unusable(net: IpNetwork) -> Option<&'static str> {
    let v4 = |a, b, c, d, prefix| IpNetwork::new(IpAddr::V4(Ipv4Addr::new(a, b, c, d)), prefix);
    let v6 = |bits: u128, prefix| IpNetwork::new(IpAddr::V6(Ipv6Addr::from_bits(bits)), prefix);
    let never = [
        (v4(0, 0, 0, 0, 8), "unspecified"),
        (v4(127, 0, 0, 0, 8), "loopback"),
        (v4(224, 0, 0, 0, 4), "multicast"),
        (v4(240, 0, 0, 0, 4), "reserved"),
        (v6(0, 127), "unspecified or loopback"),
        (v6(0xffff << 32, 96), "IPv4-mapped"),
        (v6(0xfe80 << 112, 10), "link-local"),
        (v6(0xff00 << 112, 8), "multicast"),
    ];
    // Of two prefixes that overlap, one holds the other's first address.
    let overlaps = |other: &IpNetwork| other.contains(net.network()) || net.contains(other.network());
    never.into_iter().find_map(|(other, what)| other.ok().filter(overlaps).map(|_| what))
}
