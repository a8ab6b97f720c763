//! Backends on this host itself (`forward: fullnat`): the veth pair by which packets get to them and their answers back.
//!
//! XDP sees what comes in, and a local server's answers do not. So packets for it go out of one end of a pair and into the
//! stack at the other, from a source that is routed there; the answer comes back by it, to where the program is.

use std::collections::HashMap;
use std::net::IpAddr;

use anyhow::{Context, bail};

use crate::bpf::ethtool;
use crate::config::model::{Config, Forward, Interface, Mode, Pool};
use crate::nexthop::{Link, LinkError, NextHop, Resolver};

/// The host's end of the pair.
pub const HOST_END: &str = "xlb-self";
/// The end that carries the program; among the interfaces of the configuration in force.
pub const PROGRAM_END: &str = "xlb-self-xdp";

/// Native XDP on the pair wants a frame and what the kernel keeps beside it in one page.
const MOST_MTU: u32 = 3498;

/// Makes the pair where a backend is on this host, and lists its end among the interfaces; returns the way to such
/// backends. Once made, the pair stays until `xlb detach`: flows may go by it.
pub async fn prepare(config: &mut Config, resolver: &Resolver) -> anyhow::Result<Option<NextHop>> {
    let needed = is_needed(config, &local(resolver).await?)?;
    if !needed {
        match resolver.link(PROGRAM_END).await {
            Ok(_) => {}
            Err(LinkError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
    let (host, program) = pair(config, resolver).await?;
    for source in config.sources.all() {
        // What nobody needs now may fail: an address of the other family, say.
        let routed = resolver.route_to(source, host.ifindex).await;
        if needed {
            routed?;
        }
    }
    config.interfaces.push(Interface { name: PROGRAM_END.to_owned(), mode: mode(config) });
    Ok(Some(hop(&host, &program)))
}

/// Whether a pool leads to this host.
fn is_needed(config: &Config, local: &HashMap<IpAddr, String>) -> anyhow::Result<bool> {
    let full = |pool: &&Pool| matches!(pool.forward, Forward::Fullnat { .. });
    let backends =
        config.pools.iter().filter(full).flat_map(|pool| pool.backends.iter().map(move |b| (pool, b)));
    let Some((pool, backend)) = backends.into_iter().find(|(_, b)| local.contains_key(&b.address)) else {
        return Ok(false);
    };
    let own = |source: &IpAddr| local.contains_key(source);
    if let Some(source) = config.sources.all().find(own) {
        bail!(
            "backend {} of pool {} is on this host, and so is the source {source} of `fullnat`: the answers would not leave the host; use sources that are routed to this host and no addresses of it",
            backend.name,
            pool.name
        );
    }
    Ok(true)
}

async fn local(resolver: &Resolver) -> anyhow::Result<HashMap<IpAddr, String>> {
    Ok(resolver.addresses().await?.into_iter().collect())
}

async fn pair(config: &Config, resolver: &Resolver) -> anyhow::Result<(Link, Link)> {
    let mut mtu = MOST_MTU;
    for interface in &config.interfaces {
        if let Ok(link) = resolver.link(&interface.name).await {
            mtu = mtu.min(link.mtu);
        }
    }
    resolver.veth_pair(HOST_END, PROGRAM_END, mtu).await?;
    // XDP cannot fill in a checksum that the stack leaves to the hardware; and a veth takes what native XDP sends to it
    // only where its other end collects packets.
    ethtool::set_transmit_checksums(HOST_END, false)
        .and_then(|()| ethtool::set_gro(HOST_END, true))
        .with_context(|| format!("{HOST_END}: its offloads cannot be set"))?;
    Ok((resolver.link(HOST_END).await?, resolver.link(PROGRAM_END).await?))
}

/// One interface in generic mode would see no difference; all in native mode must not wait for the stack.
fn mode(config: &Config) -> Mode {
    let generic = config.interfaces.iter().all(|interface| interface.mode == Mode::Generic);
    if generic { Mode::Generic } else { Mode::Auto }
}

fn hop(host: &Link, program: &Link) -> NextHop {
    NextHop {
        ifindex: program.ifindex,
        interface: program.name.clone(),
        source_mac: program.mac.unwrap_or_default(),
        mac: host.mac.unwrap_or_default(),
        mtu: program.mtu.try_into().unwrap_or(u16::MAX),
        preferred_source: None,
        gateway: None,
        kind: program.kind.clone(),
        redirect_target: program.redirect_target,
    }
}
