//! The kernel's messages as what they say of interfaces, neighbours and local addresses. Pure; must not ask the kernel.

use std::net::IpAddr;

use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{
    LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, LinkXdp, XdpAttached,
};
use netlink_packet_route::neighbour::{
    NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage, NeighbourState,
};

use super::{Link, features, route};

/// A neighbour as the kernel has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Neighbour {
    pub ifindex: u32,
    pub address: IpAddr,
    pub mac: Option<Vec<u8>>,
    pub state: NeighbourState,
    /// The kernel itself keeps it confirmed (5.16).
    pub managed: bool,
    /// A control plane has put it in: it confirms the entry, and nobody else should.
    pub learnt: bool,
    /// As `learnt`, and the kernel would not accept a request that keeps this mark (6.17).
    pub validated: bool,
}

/// `redirect_target` is by kind; the caller puts in what the kernel says where it does.
pub(super) fn link(message: LinkMessage) -> Link {
    let mut link = Link {
        ifindex: message.header.index,
        name: String::new(),
        mac: None,
        mtu: 0,
        // IFF_RUNNING is IFF_LOWER_UP less interfaces that are dormant (802.1X, a bond without members).
        up: message.header.flags.contains(LinkFlags::Up | LinkFlags::Running),
        admin_up: message.header.flags.contains(LinkFlags::Up),
        kind: None,
        xdp_program: None,
        xdp_generic: false,
        lower: None,
        redirect_target: false,
    };
    let ethernet = message.header.link_layer_type == LinkLayerType::Ether;
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Address(bytes) if ethernet => link.mac = bytes.try_into().ok(),
            LinkAttribute::Link(lower) if lower != 0 => link.lower = Some(lower),
            LinkAttribute::LinkInfo(infos) => {
                link.kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            LinkAttribute::Xdp(attributes) => {
                link.xdp_program = attributes.iter().find_map(|attribute| match attribute {
                    LinkXdp::ProgId(id) if *id != 0 => Some(*id),
                    _ => None,
                });
                let generic = LinkXdp::Attached(XdpAttached::SocketBuffer);
                link.xdp_generic = attributes.contains(&generic);
            }
            _ => {}
        }
    }
    link.redirect_target = features::has_xmit(link.kind.as_deref());
    link
}

/// `None` for what is no neighbour of this host: entries of bridges (which name an IP address where VXLAN is below),
/// and addresses that this host answers for.
pub(super) fn neighbour(message: NeighbourMessage) -> Option<Neighbour> {
    let family = message.header.family;
    let ip = matches!(family, AddressFamily::Inet | AddressFamily::Inet6);
    if !ip || message.header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    let mut address = None;
    let mut mac = None;
    let mut extended = NeighbourExtFlags::empty();
    for attribute in message.attributes {
        match attribute {
            NeighbourAttribute::Destination(a) => address = route::neighbour_ip(&a),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = Some(bytes),
            NeighbourAttribute::ExtFlags(flags) => extended = flags,
            _ => {}
        }
    }
    Some(Neighbour {
        ifindex: message.header.ifindex,
        address: address?,
        mac,
        state: message.header.state,
        managed: extended.contains(NeighbourExtFlags::Managed),
        learnt: message.header.flags.contains(NeighbourFlags::ExtLearned),
        validated: extended.contains(NeighbourExtFlags::ExtValidated),
    })
}

/// On a point-to-point interface IFA_ADDRESS is the peer's, and IFA_LOCAL this host's. IPv6 without a peer has
/// IFA_ADDRESS alone.
pub(super) fn local_address(message: &AddressMessage) -> Option<(IpAddr, u32)> {
    let attributes = &message.attributes;
    let local = attributes.iter().find_map(|a| match a {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    let address = attributes.iter().find_map(|a| match a {
        AddressAttribute::Address(ip) => Some(*ip),
        _ => None,
    });
    Some((local.or(address)?, message.header.index))
}
