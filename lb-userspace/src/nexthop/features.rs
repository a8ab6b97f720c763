//! Which interfaces take XDP programs, and which XDP can redirect frames to, as the kernel's generic netlink family "netdev" tells (6.3). Owns that
//! protocol's few bytes; must not know what an answer is for.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NlasIterator, parse_u16, parse_u32};
use rustix::io::Errno;
use rustix::net::netlink::{GENERIC, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};

// include/uapi/linux/netlink.h
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const MESSAGE_HEADER: usize = 16;
// include/uapi/linux/genetlink.h
const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const GENERIC_HEADER: usize = 4;
// include/uapi/linux/netdev.h
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;
const NETDEV_XDP_ACT_BASIC: u64 = 1 << 0;
const NETDEV_XDP_ACT_NDO_XMIT: u64 = 1 << 2;

/// Kinds of devices with an `ndo_xdp_xmit` before kernels told: 5.15's drivers. Physical devices have no kind.
const KINDS_WITH_XMIT: [&str; 3] = ["bond", "tun", "veth"];

/// A dump's messages come in parts of at most this.
const LARGEST_ANSWER: usize = 32 * 1024;

/// Asks in the network namespace of the thread that opened it. The kernel answers within the system call, so that
/// nothing here waits.
#[derive(Debug)]
pub(super) struct Features {
    /// `None` where the kernel does not tell.
    family: Option<u16>,
    socket: Mutex<OwnedFd>,
}

impl Features {
    pub(super) fn open() -> io::Result<Features> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(GENERIC))?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        let mut features = Features { family: None, socket: Mutex::new(socket) };
        features.family = features.look_up_family()?;
        Ok(features)
    }

    /// Whether frames can be redirected to an interface. `kind` decides where the kernel does not tell. For some
    /// drivers, veth among them, the answer comes and goes with XDP programs.
    pub(super) fn redirect_target(&self, ifindex: u32, kind: Option<&str>) -> io::Result<bool> {
        let Some(family) = self.family else { return Ok(has_xmit(kind)) };
        Ok(self.of(family, ifindex)? & NETDEV_XDP_ACT_NDO_XMIT != 0)
    }

    /// Whether an interface's driver takes XDP programs; `None` where the kernel does not tell.
    pub(super) fn takes_native_xdp(&self, ifindex: u32) -> io::Result<Option<bool>> {
        let Some(family) = self.family else { return Ok(None) };
        Ok(Some(self.of(family, ifindex)? & NETDEV_XDP_ACT_BASIC != 0))
    }

    /// Features of an interface; none where there is no such interface.
    fn of(&self, family: u16, ifindex: u32) -> io::Result<u64> {
        let attribute = attribute(NETDEV_A_DEV_IFINDEX, &ifindex.to_ne_bytes());
        let mut found = 0;
        self.ask(family, NETDEV_CMD_DEV_GET, 0, &attribute, |attributes| {
            found = device(attributes).map_or(0, |(_, features)| features);
        })?;
        Ok(found)
    }

    /// The answer for every interface; `None` where the kernel does not tell.
    pub(super) fn all(&self) -> io::Result<Option<HashMap<u32, bool>>> {
        let Some(family) = self.family else { return Ok(None) };
        let mut all = HashMap::new();
        self.ask(family, NETDEV_CMD_DEV_GET, NLM_F_DUMP, &[], |attributes| {
            all.extend(
                device(attributes).map(|(ifindex, has)| (ifindex, has & NETDEV_XDP_ACT_NDO_XMIT != 0)),
            );
        })?;
        Ok(Some(all))
    }

    fn look_up_family(&self) -> io::Result<Option<u16>> {
        let attribute = attribute(CTRL_ATTR_FAMILY_NAME, b"netdev\0");
        let mut family = None;
        let asked = self.ask(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, 0, &attribute, |attributes| {
            family = find(attributes, CTRL_ATTR_FAMILY_ID).and_then(|value| parse_u16(value).ok());
        });
        match asked {
            Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => Ok(None),
            asked => asked.map(|()| family),
        }
    }

    /// One question. Answers of an earlier one that was not read to its end are thrown away first.
    fn ask(
        &self,
        family: u16,
        command: u8,
        flags: u16,
        attributes: &[u8],
        mut each: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = vec![0; LARGEST_ANSWER];
        while recv(&*socket, &mut buffer[..], RecvFlags::empty()).is_ok() {}
        send(&*socket, &request(family, command, flags, attributes), SendFlags::empty())?;
        loop {
            let (read, _) = recv(&*socket, &mut buffer[..], RecvFlags::empty())?;
            let mut rest = &buffer[..read];
            while let Ok(message) = NetlinkBuffer::new_checked(rest) {
                match message.message_type() {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => return error(message.payload()),
                    _ => each(message.payload().get(GENERIC_HEADER..).unwrap_or_default()),
                }
                rest = rest.get((message.length() as usize).next_multiple_of(4)..).unwrap_or_default();
            }
            if flags & NLM_F_DUMP != NLM_F_DUMP {
                return Ok(());
            }
        }
    }
}

pub(super) fn has_xmit(kind: Option<&str>) -> bool {
    kind.is_none_or(|kind| KINDS_WITH_XMIT.contains(&kind))
}

fn error(payload: &[u8]) -> io::Result<()> {
    let code = payload.get(..4).and_then(|code| parse_u32(code).ok()).unwrap_or_default() as i32;
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) }
}

/// An interface with its features.
fn device(attributes: &[u8]) -> Option<(u32, u64)> {
    let ifindex = parse_u32(find(attributes, NETDEV_A_DEV_IFINDEX)?).ok()?;
    let features = find(attributes, NETDEV_A_DEV_XDP_FEATURES)?.try_into().ok()?;
    Some((ifindex, u64::from_ne_bytes(features)))
}

fn find(attributes: &[u8], kind: u16) -> Option<&[u8]> {
    NlasIterator::new(attributes).filter_map(Result::ok).find(|attribute| attribute.kind() == kind).map(
        |attribute| {
            let range = 4..usize::from(attribute.length());
            &attribute.into_inner()[range]
        },
    )
}

fn request(family: u16, command: u8, flags: u16, attributes: &[u8]) -> Vec<u8> {
    let length = (MESSAGE_HEADER + GENERIC_HEADER + attributes.len()) as u32;
    let mut bytes = Vec::with_capacity(length as usize);
    bytes.extend(length.to_ne_bytes());
    bytes.extend(family.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([command, 1, 0, 0]);
    bytes.extend(attributes);
    bytes
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = (4 + value.len()) as u16;
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_the_kernels_word_the_kind_decides() {
        for kind in [None, Some("veth"), Some("bond"), Some("tun")] {
            assert!(has_xmit(kind), "{kind:?}");
        }
        for kind in ["bridge", "vlan", "macvlan", "ipvlan", "dummy", "vxlan", "gretap", "ip6gre", "wireguard"]
        {
            assert!(!has_xmit(Some(kind)), "{kind}");
        }
    }
}
