//! Reads the kernel's answer to a route lookup. Pure; must not ask the kernel.

use std::net::IpAddr;

use netlink_packet_route::neighbour::NeighbourAddress;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteType, RouteVia,
};
use rustix::io::Errno;

use super::Unresolved;
use super::netlink::Error;

/// What a route says about a destination, before its interface and neighbour are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Path {
    pub ifindex: u32,
    pub gateway: Option<IpAddr>,
    pub preferred_source: Option<IpAddr>,
    /// The `mtu` metric, or a learnt path MTU.
    pub mtu: Option<u32>,
    /// The route adds headers (RTA_ENCAP).
    pub encapsulates: bool,
}

pub(super) fn path(message: &RouteMessage) -> Result<Path, Unresolved> {
    match message.header.kind {
        RouteType::Unicast => {}
        RouteType::Local => return Err(Unresolved::Local),
        RouteType::BlackHole => return Err(Unresolved::Blackhole),
        RouteType::Unreachable => return Err(Unresolved::Unreachable),
        RouteType::Prohibit => return Err(Unresolved::Prohibit),
        RouteType::Throw => return Err(Unresolved::NoRoute),
        RouteType::Broadcast => return Err(Unresolved::NotUnicast("broadcast")),
        RouteType::Multicast => return Err(Unresolved::NotUnicast("multicast")),
        RouteType::Anycast => return Err(Unresolved::NotUnicast("subnet-router anycast")),
        kind => {
            let what = format!("a route of type {kind:?} is not supported");
            return Err(Unresolved::Netlink(what));
        }
    }
    let mut path = Path { ifindex: 0, gateway: None, preferred_source: None, mtu: None, encapsulates: false };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(ifindex) => path.ifindex = *ifindex,
            RouteAttribute::Gateway(address) => path.gateway = route_ip(address),
            RouteAttribute::Via(RouteVia::Inet(via)) => path.gateway = Some((*via).into()),
            RouteAttribute::Via(RouteVia::Inet6(via)) => path.gateway = Some((*via).into()),
            RouteAttribute::PrefSource(address) => path.preferred_source = route_ip(address),
            RouteAttribute::Metrics(metrics) => path.mtu = mtu(metrics),
            RouteAttribute::Encap(_) | RouteAttribute::EncapType(_) => path.encapsulates = true,
            _ => {}
        }
    }
    if path.ifindex == 0 {
        let what = "the route names no interface".into();
        return Err(Unresolved::Netlink(what));
    }
    Ok(path)
}

/// A route that sends no packets makes the lookup itself fail, with the error that a sender would get.
pub(super) fn refusal(error: &Error) -> Unresolved {
    match error {
        Error::Kernel(Errno::NETUNREACH | Errno::SRCH | Errno::AGAIN) => Unresolved::NoRoute,
        Error::Kernel(Errno::HOSTUNREACH) => Unresolved::Unreachable,
        Error::Kernel(Errno::INVAL) => Unresolved::Blackhole,
        Error::Kernel(Errno::ACCESS) => Unresolved::Prohibit,
        other => Unresolved::Netlink(format!("route lookup: {other}")),
    }
}

fn mtu(metrics: &[RouteMetric]) -> Option<u32> {
    metrics.iter().find_map(|metric| match metric {
        // 0 stands for none.
        RouteMetric::Mtu(mtu) if *mtu > 0 => Some(*mtu),
        _ => None,
    })
}

fn route_ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

pub(super) fn neighbour_ip(address: &NeighbourAddress) -> Option<IpAddr> {
    match address {
        NeighbourAddress::Inet(ip) => Some((*ip).into()),
        NeighbourAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::route::RouteLwEnCapType;

    use super::*;

    fn message(kind: RouteType, attributes: Vec<RouteAttribute>) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.kind = kind;
        message.attributes = attributes;
        message
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_unicast_route_gives_interface_gateway_source_and_mtu() {
        let message = message(
            RouteType::Unicast,
            vec![
                RouteAttribute::Oif(7),
                RouteAttribute::Gateway(ip("10.0.0.1").into()),
                RouteAttribute::PrefSource(ip("10.0.0.9").into()),
                RouteAttribute::Metrics(vec![RouteMetric::Lock(4), RouteMetric::Mtu(1400)]),
            ],
        );
        let expected = Path {
            ifindex: 7,
            gateway: Some(ip("10.0.0.1")),
            preferred_source: Some(ip("10.0.0.9")),
            mtu: Some(1400),
            encapsulates: false,
        };
        assert_eq!(path(&message), Ok(expected));
    }

    #[test]
    fn a_gateway_of_the_other_family_is_taken_from_via() {
        let via = RouteVia::from(ip("fe80::1"));
        let attributes = vec![RouteAttribute::Oif(7), RouteAttribute::Via(via)];
        let path = path(&message(RouteType::Unicast, attributes)).unwrap();
        assert_eq!(path.gateway, Some(ip("fe80::1")));
    }

    #[test]
    fn an_mtu_of_zero_is_none() {
        let metrics = vec![RouteMetric::Mtu(0)];
        let attributes = vec![RouteAttribute::Oif(7), RouteAttribute::Metrics(metrics)];
        assert_eq!(path(&message(RouteType::Unicast, attributes)).unwrap().mtu, None);
    }

    #[test]
    fn an_encapsulating_route_is_told_apart() {
        let encap = RouteAttribute::EncapType(RouteLwEnCapType::Mpls);
        let attributes = vec![RouteAttribute::Oif(7), encap];
        assert!(path(&message(RouteType::Unicast, attributes)).unwrap().encapsulates);
    }

    #[test]
    fn a_route_without_an_interface_is_an_error_and_not_interface_zero() {
        assert!(matches!(path(&message(RouteType::Unicast, vec![])), Err(Unresolved::Netlink(_))));
    }

    #[test]
    fn other_route_types_are_reasons() {
        let rows = [
            (RouteType::Local, Unresolved::Local),
            (RouteType::BlackHole, Unresolved::Blackhole),
            (RouteType::Unreachable, Unresolved::Unreachable),
            (RouteType::Prohibit, Unresolved::Prohibit),
            (RouteType::Throw, Unresolved::NoRoute),
            (RouteType::Broadcast, Unresolved::NotUnicast("broadcast")),
            (RouteType::Multicast, Unresolved::NotUnicast("multicast")),
        ];
        for (kind, reason) in rows {
            let attributes = vec![RouteAttribute::Oif(1)];
            assert_eq!(path(&message(kind, attributes)), Err(reason));
        }
    }
}
