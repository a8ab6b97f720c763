//! The subscription to the kernel's notifications: owns its socket and what a message means in general; must not know
//! who is watched. What the kernel has queued is bounded by the socket's buffer, and a loss is told as one.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use netlink_packet_core::{NetlinkBuffer, NlasIterator, ParseableParametrized, parse_ip};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{RecvFlags, SocketFlags, SocketType, recv, socket_with, sockopt};
use tokio::io::unix::AsyncFd;

use crate::nexthop::decode::{self, Neighbour};

/// `enum rtnetlink_groups` of include/uapi/linux/rtnetlink.h: links, neighbours, IPv4 addresses, routes and rules, IPv6
/// addresses, routes and rules, next hop objects (5.3; an older kernel passes over it).
const GROUPS: [u32; 9] = [1, 3, 5, 7, 8, 9, 11, 19, 32];
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
const RTM_NEWNEXTHOP: u16 = 104;
const RTM_DELNEXTHOP: u16 = 105;
const ROUTE_HEADER: usize = 12;
const RTA_DST: u16 = 1;

/// Room for some thousand messages, so that a routing daemon's burst is read and not lost.
pub(super) const RECEIVE_BUFFER: usize = 4 << 20;
/// Messages are a few hundred bytes; a link with many virtual functions has some kilobytes.
const LARGEST_MESSAGE: usize = 64 * 1024;
/// Messages that are read before anything else has its turn.
const AT_ONCE: usize = 256;

/// Something that has changed.
#[derive(Debug)]
pub(super) enum Notice {
    Link(LinkMessage),
    LinkGone(u32),
    Neighbour(Neighbour),
    NeighbourGone(Neighbour),
    /// An address of this host, on an interface.
    Address(IpAddr, u8, u32),
    /// Routes to a prefix.
    Route(IpAddr, u8),
    /// What may change any route.
    Rule,
    /// A message that is not understood.
    Unclear,
}

#[derive(Debug, Default)]
pub(super) struct Batch {
    pub notices: Vec<Notice>,
    /// The kernel had no room for some messages.
    pub lost: bool,
}

#[derive(Debug)]
pub(super) struct Monitor {
    socket: AsyncFd<OwnedFd>,
    buffer: Vec<u8>,
}

impl Monitor {
    /// Follows in the network namespace of the calling thread.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub(super) fn open(receive_buffer: usize) -> io::Result<Monitor> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(rustix::net::AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        // Beyond net.core.rmem_max, which needs CAP_NET_ADMIN as attaching does.
        if sockopt::set_socket_recv_buffer_size_force(&socket, receive_buffer).is_err() {
            sockopt::set_socket_recv_buffer_size(&socket, receive_buffer)?;
        }
        let groups = GROUPS.iter().fold(0, |mask, group| mask | 1 << (group - 1));
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, groups))?;
        #[expect(
            deprecated,
            reason = "it is about types that give up their descriptor; an OwnedFd never does"
        )]
        let socket = AsyncFd::new(socket)?;
        Ok(Monitor { socket, buffer: vec![0; LARGEST_MESSAGE] })
    }

    /// Waits for messages, and takes those that are there. Nothing is lost if this is given up while it waits.
    /// Without `routes`, messages about single routes are passed over.
    pub(super) async fn receive(&mut self, routes: bool) -> io::Result<Batch> {
        let mut batch = Batch::default();
        loop {
            let mut ready = self.socket.readable().await?;
            for _ in 0..AT_ONCE {
                let read = ready.try_io(|socket| {
                    recv(socket.get_ref(), &mut self.buffer[..], RecvFlags::TRUNC).map_err(io::Error::from)
                });
                match read {
                    Ok(Ok((read, length))) if length <= read => {
                        read_messages(&self.buffer[..read], routes, &mut batch.notices);
                    }
                    Ok(Ok(_)) => batch.notices.push(Notice::Unclear),
                    Ok(Err(error)) if error.raw_os_error() == Some(Errno::NOBUFS.raw_os_error()) => {
                        batch.lost = true;
                    }
                    Ok(Err(error)) => return Err(error),
                    Err(_nothing_left) => break,
                }
            }
            if batch.lost || !batch.notices.is_empty() {
                return Ok(batch);
            }
        }
    }
}

fn read_messages(mut bytes: &[u8], routes: bool, notices: &mut Vec<Notice>) {
    while !bytes.is_empty() {
        let Ok(message) = NetlinkBuffer::new_checked(bytes) else {
            notices.push(Notice::Unclear);
            return;
        };
        notices.extend(notice(message.message_type(), message.payload(), routes));
        bytes = bytes.get((message.length() as usize).next_multiple_of(4)..).unwrap_or_default();
    }
}

fn notice(kind: u16, payload: &[u8], routes: bool) -> Option<Notice> {
    match kind {
        RTM_NEWROUTE | RTM_DELROUTE if !routes => return None,
        RTM_NEWROUTE | RTM_DELROUTE => return Some(route(payload).unwrap_or(Notice::Unclear)),
        RTM_NEWRULE | RTM_DELRULE | RTM_NEWNEXTHOP | RTM_DELNEXTHOP => return Some(Notice::Rule),
        _ => {}
    }
    let Ok(message) = RouteNetlinkMessage::parse_with_param(payload, kind) else {
        return Some(Notice::Unclear);
    };
    match message {
        RouteNetlinkMessage::NewLink(message) => is_whole(&message).then_some(Notice::Link(message)),
        RouteNetlinkMessage::DelLink(message) => {
            of_the_link(&message).then_some(Notice::LinkGone(message.header.index))
        }
        RouteNetlinkMessage::NewNeighbour(message) => decode::neighbour(message).map(Notice::Neighbour),
        RouteNetlinkMessage::DelNeighbour(message) => decode::neighbour(message).map(Notice::NeighbourGone),
        RouteNetlinkMessage::NewAddress(message) | RouteNetlinkMessage::DelAddress(message) => {
            let (address, ifindex) = decode::local_address(&message)?;
            Some(Notice::Address(address, message.header.prefix_len, ifindex))
        }
        _ => None,
    }
}

/// A port that leaves a bridge is told as a link of family "bridge" that goes.
fn of_the_link(message: &LinkMessage) -> bool {
    message.header.interface_family == AddressFamily::Unspec
}

/// Wireless drivers send events of their own as links with little more than a name.
fn is_whole(message: &LinkMessage) -> bool {
    of_the_link(message) && message.attributes.iter().any(|a| matches!(a, LinkAttribute::Mtu(_)))
}

/// Reads no more of a route than its prefix: a full table is hundreds of thousands, and some have attributes that no
/// decoder knows.
fn route(payload: &[u8]) -> Option<Notice> {
    let (family, length) = (*payload.first()?, *payload.get(1)?);
    let attributes = payload.get(ROUTE_HEADER..)?;
    let destination = NlasIterator::new(attributes)
        .filter_map(Result::ok)
        .find(|attribute| attribute.kind() == RTA_DST)
        .map(|attribute| parse_ip(attribute.value()));
    let prefix = match (destination, AddressFamily::from(family)) {
        (Some(destination), _) => destination.ok()?,
        (None, AddressFamily::Inet) => IpAddr::from([0; 4]),
        (None, AddressFamily::Inet6) => IpAddr::from([0; 16]),
        // Multicast and labels are no ways to an address.
        (None, _) => return None,
    };
    Some(Notice::Route(prefix, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, payload: &[u8]) -> Vec<u8> {
        let length = (16 + payload.len()) as u32;
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(payload);
        bytes
    }

    fn read(bytes: &[u8]) -> Vec<Notice> {
        let mut notices = Vec::new();
        read_messages(bytes, true, &mut notices);
        notices
    }

    const ROUTE: [u8; 20] = [2, 24, 0, 0, 254, 0, 0, 1, 0, 0, 0, 0, 8, 0, 1, 0, 10, 1, 2, 0];

    #[test]
    fn a_route_is_its_prefix() {
        let notices = read(&message(RTM_NEWROUTE, &ROUTE));
        let [Notice::Route(prefix, 24)] = notices[..] else { panic!("{notices:?}") };
        assert_eq!(prefix, IpAddr::from([10, 1, 2, 0]));
    }

    #[test]
    fn a_default_route_covers_its_family() {
        for (family, prefix) in [(2, IpAddr::from([0; 4])), (10, IpAddr::from([0; 16]))] {
            let mut header = [0; ROUTE_HEADER];
            header[0] = family;
            let notices = read(&message(RTM_DELROUTE, &header));
            let [Notice::Route(found, 0)] = notices[..] else { panic!("{notices:?}") };
            assert_eq!(found, prefix);
        }
    }

    #[test]
    fn messages_that_are_cut_short_or_garbage_are_unclear_and_never_a_panic() {
        let two = [message(RTM_NEWROUTE, &ROUTE), message(RTM_NEWRULE, &[0; 12])].concat();
        assert!(matches!(read(&two)[..], [Notice::Route(..), Notice::Rule]));
        for length in 1..two.len() {
            read(&two[..length]);
        }
        for kind in 0..128 {
            for length in 0..80 {
                read(&message(kind, &vec![0xa5; length]));
            }
        }
        assert!(matches!(read(&message(16, &[0xa5; 7]))[..], [Notice::Unclear]));
    }
}
