//! Interfaces as the configuration wants them and as the kernel has them; keeps the second like the first.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use anyhow::bail;
use lb_common::abi::Interface;
use lb_common::wire::Mac;
use tracing::{info, warn};

use super::changed::Changed;
use super::core::Core;
use super::own;
use crate::bpf::{Attached, Links};
use crate::config::model::{Config, Mode};
use crate::host::local_of;
use crate::nexthop::{Link, Resolver};

/// A configured interface that is there.
#[derive(Debug, Clone)]
pub struct WantedLink {
    /// As the configuration calls it.
    pub name: String,
    pub link: Link,
    pub mode: Mode,
}

#[derive(Debug, Clone, Default)]
pub struct Wanted {
    pub links: Vec<WantedLink>,
    /// Carry the program and are not configured: the name of the pin, and the interface where there is one.
    pub unwanted: Vec<(String, Option<Link>)>,
}

impl Wanted {
    /// Looks for the configured interfaces. One that carried the program before may be missing: it is attached when it
    /// is back. Any other missing one is an error, and so is one that is listed by two names.
    pub async fn look_up(config: &Config, links: &mut Links, resolver: &Resolver) -> anyhow::Result<Self> {
        let mut this = Self::default();
        for interface in &config.interfaces {
            let Some(link) = find(&interface.name, links, resolver).await? else {
                warn!(interface = %interface.name, "not there now; it is attached when it is back");
                continue;
            };
            if let Some(known) = this.links.iter().find(|known| known.link.ifindex == link.ifindex) {
                bail!(
                    "{} is another name of {}, which is listed already; list an interface once",
                    interface.name,
                    known.name
                );
            }
            this.links.push(WantedLink { name: interface.name.clone(), link, mode: interface.mode });
        }
        for name in links.known()? {
            let configured = config.interfaces.iter().any(|interface| interface.name == name);
            let ifindex = links.ifindex(&name)?.unwrap_or(0);
            // The file may call an interface by another name than before.
            if configured || this.links.iter().any(|wanted| wanted.link.ifindex == ifindex) {
                continue;
            }
            let link = resolver.link_of_index(ifindex).await.ok();
            this.unwanted.push((name, link));
        }
        Ok(this)
    }
}

/// The interface of this name, or what has become of it; nothing where it carried the program before and is away.
async fn find(name: &str, links: &mut Links, resolver: &Resolver) -> anyhow::Result<Option<Link>> {
    let missing = match resolver.link(name).await {
        Ok(link) => return Ok(Some(link)),
        Err(error @ crate::nexthop::LinkError::NotFound { .. }) => error,
        Err(error) => return Err(error.into()),
    };
    let Some((ifindex, program)) = links.place(name)? else { return Err(missing.into()) };
    let renamed = resolver.link_of_index(ifindex).await.ok().filter(|link| link.xdp_program == Some(program));
    if let Some(link) = &renamed {
        warn!(interface = %link.name, configured = name, "renamed; change its name in the configuration");
    }
    Ok(renamed)
}

impl Core {
    /// The interfaces that carry the program, as they are now: a reload that fails puts it back there. They may have been
    /// made again, or changed otherwise, since they were attached.
    pub(super) async fn carrying(&self, resolver: &Resolver) -> Wanted {
        let mut wanted = Wanted::default();
        for attached in &self.attached {
            // One that is gone just now is looked after when that is noticed.
            if let Ok(link) = resolver.link_of_index(attached.ifindex).await {
                let mode = if attached.generic { Mode::Generic } else { Mode::Native };
                wanted.links.push(WantedLink { name: attached.name.clone(), link, mode });
            }
        }
        wanted
    }

    /// Makes the kernel's interfaces what the configuration wants, whatever has happened to them: gone, back, renamed,
    /// with another MAC or MTU, or without the program. Also pins again what somebody has removed.
    pub async fn check_interfaces(&mut self, resolver: &Resolver) -> anyhow::Result<()> {
        let ours = self.datapath.program_id()?;
        let wanted: Vec<(String, Mode)> =
            self.config().interfaces.iter().map(|i| (i.name.clone(), i.mode)).collect();
        for (name, mode) in wanted {
            let Some(attached) = self.attached.iter().find(|attached| attached.name == name).cloned() else {
                self.attach_if_there(&name, mode, resolver).await;
                continue;
            };
            match resolver.link_of_index(attached.ifindex).await {
                Ok(link) if link.xdp_program == Some(ours) => self.follow(&attached, &link)?,
                Ok(link) => {
                    warn!(interface = %link.name, "the program was taken off");
                    self.attached.retain(|entry| entry.name != name);
                    self.changed = Changed::All;
                    self.attach_one(&name, &link, mode, "attached again");
                }
                Err(crate::nexthop::LinkError::NotFound { .. }) => {
                    self.let_go(&attached)?;
                    // It may have been made again before the first event was read.
                    self.attach_if_there(&name, mode, resolver).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
        for attached in self.attached.clone() {
            if self.links.pin_again(&attached)? {
                warn!(interface = %attached.interface, "the pin of its link was removed; pinned again, the program was never off");
            }
        }
        for map in self.datapath.pin_again()? {
            warn!(map, "its pin was removed; pinned again");
        }
        Ok(())
    }

    async fn attach_if_there(&mut self, name: &str, mode: Mode, resolver: &Resolver) {
        let Ok(link) = resolver.link(name).await else { return };
        let was_refused = self.refused.contains_key(name);
        let what = if was_refused { "attached" } else { "attached: the interface is back" };
        self.attach_one(name, &link, mode, what);
    }

    /// An interface that carries the program, with what may have changed of it.
    fn follow(&mut self, attached: &Attached, link: &Link) -> anyhow::Result<()> {
        if link.name != attached.interface {
            warn!(interface = %link.name, before = %attached.interface, configured = %attached.name, "renamed; it carries the program as before");
            let entry = self.attached.iter_mut().find(|entry| entry.name == attached.name);
            entry.into_iter().for_each(|entry| entry.interface.clone_from(&link.name));
        }
        if let (Some(row), Some(mac)) = (self.datapath.maps.interface(link.ifindex), link.mac) {
            let now = Interface { mac: Mac::from_bytes(mac).bits(), mtu: link.mtu, ..row };
            if now != row {
                info!(interface = %link.name, mtu = link.mtu, "MAC address or MTU changed");
                self.datapath.maps.set_interface(link.ifindex, now)?;
                self.read_interfaces()?;
            }
        }
        Ok(())
    }

    fn let_go(&mut self, attached: &Attached) -> anyhow::Result<()> {
        if self.links.lose(&attached.name)? {
            warn!(interface = %attached.interface, "moved to another network namespace; the program is taken off it");
        } else {
            warn!(interface = %attached.interface, "deleted; it is attached again when it is back");
        }
        self.attached.retain(|entry| entry.name != attached.name);
        // Next hops through the others may be usable now, or no longer.
        self.changed = Changed::All;
        self.datapath.maps.remove_interface(attached.ifindex)?;
        self.read_interfaces()
    }

    /// An attempt that fails is repeated with the next look, and logged when its reason changes.
    fn attach_one(&mut self, name: &str, link: &Link, mode: Mode, what: &str) {
        match self.links.attach(&mut self.datapath, name, link, mode) {
            Ok(now) => {
                info!(interface = %now.interface, mode = now.mode(), "{what}");
                warn_of_veth(link);
                self.refused.remove(name);
                self.attached.retain(|entry| entry.name != name);
                self.attached.push(now);
                self.changed = Changed::All;
                if let Err(error) = self.read_interfaces() {
                    warn!(%error, "the table of interfaces cannot be read");
                }
            }
            Err(error) => {
                let reason = format!("{:#}", anyhow::Error::from(error));
                if self.refused.insert(name.to_owned(), reason.clone()).as_ref() != Some(&reason) {
                    warn!(interface = name, %reason, "not attached; trying again");
                }
            }
        }
    }
}

/// Why an interface could not be attached, by its name.
pub type Refused = BTreeMap<String, String>;

/// A VIP on an interface of this host would expose the host's own ports on it, and hide the VIP from its checks.
pub async fn refuse_local_vips(config: &Config, resolver: &Resolver) -> anyhow::Result<()> {
    let addresses: HashMap<IpAddr, String> = resolver.addresses().await?.into_iter().collect();
    let vips = config.services.iter().flat_map(|service| service.vips.iter().map(move |vip| (vip, service)));
    for (vip, service) in vips {
        let Some((address, interface)) = local_of(*vip, &addresses) else { continue };
        if !vip.is_address() {
            bail!(
                "the VIP {vip} of service {} holds {address} of {interface} on this host; give {interface} an address outside of it, or split the prefix",
                service.name
            );
        }
        bail!(
            "the VIP {vip} of service {} is an address of {interface} on this host; take it off {interface}, then route it to this host or set vip_arp: true",
            service.name
        );
    }
    Ok(())
}

/// XDP cannot see that a packet's checksum is still to be filled in, and XDP_TX loses the note.
pub fn warn_of_veth(link: &Link) {
    if link.kind.as_deref() == Some("veth") && link.name != own::PROGRAM_END {
        warn!(
            interface = %link.name,
            "a veth: senders behind it must have transmit checksums off (`ethtool -K IF tx off` in their namespace), or TCP and UDP arrive with bad checksums"
        );
    }
}
