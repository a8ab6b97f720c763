//! Interfaces as the configuration wants them and as the kernel has them.

use std::collections::HashMap;
use std::net::IpAddr;

use anyhow::bail;
use tracing::warn;

use crate::bpf::BpfFs;
use crate::config::model::{Config, Mode};
use crate::nexthop::{Link, Resolver};

#[derive(Debug, Clone, Default)]
pub struct Wanted {
    pub links: Vec<(Link, Mode)>,
    /// Carry the program and are not configured: name and index, 0 where the interface is gone.
    pub unwanted: Vec<(String, u32)>,
}

impl Wanted {
    /// An error where the file names one interface by two names.
    pub async fn look_up(config: &Config, fs: &BpfFs, resolver: &Resolver) -> anyhow::Result<Self> {
        let mut links = Vec::new();
        for interface in &config.interfaces {
            let link = resolver.link(&interface.name).await?;
            if links.iter().any(|(known, _): &(Link, Mode)| known.ifindex == link.ifindex) {
                bail!(
                    "{} is another name of {}, which is listed already; list an interface once",
                    interface.name,
                    link.name
                );
            }
            links.push((link, interface.mode));
        }
        let mut unwanted = Vec::new();
        for name in fs.linked_interfaces()? {
            // By the kernel's name: the file may use an alternative one.
            if !links.iter().any(|(link, _)| link.name == name) {
                let ifindex = resolver.link(&name).await.map_or(0, |link| link.ifindex);
                unwanted.push((name, ifindex));
            }
        }
        Ok(Self { links, unwanted })
    }
}

/// A VIP on an interface of this host would expose the host's own ports on it, and hide the VIP from its checks.
pub async fn refuse_local_vips(config: &Config, resolver: &Resolver) -> anyhow::Result<()> {
    let addresses: HashMap<IpAddr, String> = resolver.addresses().await?.into_iter().collect();
    for service in &config.services {
        for vip in &service.vips {
            if let Some(interface) = addresses.get(vip) {
                bail!(
                    "the VIP {vip} of service {} is an address of {interface} on this host; take it off {interface}, then route it to this host or set vip_arp: true",
                    service.name
                );
            }
        }
    }
    Ok(())
}

/// XDP cannot see that a packet's checksum is still to be filled in, and XDP_TX loses the note.
pub fn warn_of_veth(link: &Link) {
    if link.kind.as_deref() == Some("veth") {
        warn!(
            interface = %link.name,
            "a veth: senders behind it must have transmit checksums off (`ethtool -K IF tx off` in their namespace), or TCP and UDP arrive with bad checksums"
        );
    }
}
