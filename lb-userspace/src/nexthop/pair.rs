//! A veth pair whose one end is the host's and whose other end carries the program: by it packets get from XDP to this
//! host itself, and its answers back to XDP. Knows nothing of what they are.
//!
//! The host's end asks no neighbours (IFF_NOARP): what the host sends there has the end's own MAC address as its
//! destination, so that what the program lets pass at the other end is for another host to the stack, and does not go round in
//! circles.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rtnetlink::{LinkUnspec, LinkVeth, RouteMessageBuilder};
use rustix::io::Errno;

use super::netlink::Error;
use super::resolver::Resolver;
use super::{Link, LinkError};

impl Resolver {
    /// Makes the pair if it is not there, with both ends up, and returns its ends: the host's and the program's.
    pub async fn veth_pair(&self, host: &str, program: &str, mtu: u32) -> Result<(Link, Link), LinkError> {
        let failed = |error: Error| LinkError::Netlink(format!("the veth pair {host}: {error}"));
        let handle = self.netlink.handle().map_err(failed)?;
        match handle.link().add(LinkVeth::new(host, program).build()).execute().await.map_err(Error::from) {
            Ok(()) | Err(Error::Kernel(Errno::EXIST)) => {}
            Err(error) => return Err(failed(error)),
        }
        for (name, arp) in [(program, true), (host, false)] {
            let end = LinkUnspec::new_with_name(name).mtu(mtu).arp(arp).up().build();
            handle.link().set(end).execute().await.map_err(|error| failed(error.into()))?;
        }
        Ok((self.link(host).await?, self.link(program).await?))
    }

    /// Routes one address out of an interface.
    pub async fn route_to(&self, address: IpAddr, ifindex: u32) -> Result<(), LinkError> {
        let route = match address {
            IpAddr::V4(v4) => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(v4, 32)
                .output_interface(ifindex)
                .build(),
            IpAddr::V6(v6) => RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(v6, 128)
                .output_interface(ifindex)
                .build(),
        };
        let failed = |error: Error| LinkError::Netlink(format!("a route to {address}: {error}"));
        let handle = self.netlink.handle().map_err(failed)?;
        handle.route().add(route).replace().execute().await.map_err(|error| failed(error.into()))
    }

    /// Removes an interface, if it is there.
    pub async fn remove_link(&self, name: &str) -> Result<bool, LinkError> {
        let link = match self.link(name).await {
            Ok(link) => link,
            Err(LinkError::NotFound { .. }) => return Ok(false),
            Err(error) => return Err(error),
        };
        let failed = |error: Error| LinkError::Netlink(format!("{name} cannot be removed: {error}"));
        let handle = self.netlink.handle().map_err(failed)?;
        match handle.link().del(link.ifindex).execute().await.map_err(Error::from) {
            Ok(()) | Err(Error::Kernel(Errno::NODEV)) => Ok(true),
            Err(error) => Err(failed(error)),
        }
    }
}
