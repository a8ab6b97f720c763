//! The stage with its client far away, behind two routers with a link of a chosen MTU between them. It knows no test.
//!
//! ```text
//! client --- edge --(link_mtu)-- core --- lan: balancer, web1, web2, ...
//! ```

use anyhow::Result;

use crate::lab::{self, Host, Lab};
use crate::stage::{BALANCER4, BALANCER6, Stage, VIP4, VIP6};

/// The client's addresses.
pub const CLIENT4: &str = "10.120.0.2";
pub const CLIENT6: &str = "fd00:120::2";

/// The routers, as the client sees them.
pub const EDGE: [&str; 2] = ["10.120.0.1", "fd00:120::1"];
pub const CORE: [&str; 2] = ["10.121.0.2", "fd00:121::2"];

/// The core router's addresses on `lan`.
const CORE_LAN: [&str; 2] = ["10.111.0.1", "fd00:111::1"];

pub struct Routed {
    pub edge: Host,
    /// Where the backends' answers meet the link to `edge`.
    pub core: Host,
    pub stage: Stage,
}

impl Routed {
    /// So many backends; nothing where skipping was asked for.
    pub fn set(name: &str, backends: usize, link_mtu: u16) -> Result<Option<Self>> {
        if !lab::available()? {
            return Ok(None);
        }
        let lab = Lab::new(name)?;
        let (outside, between) = (lab.switch("outside")?, lab.switch("between")?);
        let client = lab.host_on("client", &[(&outside, &["10.120.0.2/24", "fd00:120::2/64"])])?;
        client.set_mtu("eth0", 1500)?;
        route(&client, "default", EDGE)?;
        let edge = lab.host_on(
            "edge",
            &[
                (&outside, &["10.120.0.1/24", "fd00:120::1/64"]),
                (&between, &["10.121.0.1/24", "fd00:121::1/64"]),
            ],
        )?;
        edge.set_mtu("eth0", 1500)?;
        edge.set_mtu("eth1", link_mtu)?;
        forwards(&edge)?;
        route(&edge, "default", CORE)?;
        let core = lab.host_on(
            "core",
            &[
                (&between, &["10.121.0.2/24", "fd00:121::2/64"]),
                (lab.lan(), &["10.111.0.1/24", "fd00:111::1/64"]),
            ],
        )?;
        core.set_mtu("eth0", link_mtu)?;
        forwards(&core)?;
        route(&core, "default", ["10.121.0.1", "fd00:121::1"])?;
        core.route(&format!("{VIP4}/32 via {BALANCER4}"))?;
        core.route(&format!("{VIP6}/128 via {BALANCER6}"))?;
        let balancer = lab.host("balancer", &[&format!("{BALANCER4}/24"), &format!("{BALANCER6}/64")])?;
        route(&balancer, "default", CORE_LAN)?;
        let mut stage = Stage { client, balancer, backends: Vec::new(), lab };
        for _ in 0..backends {
            let host = stage.add_backend()?.host.clone();
            route(&host, "default", CORE_LAN)?;
        }
        Ok(Some(Self { edge, core, stage }))
    }
}

/// Makes a host a router.
fn forwards(host: &Host) -> Result<()> {
    host.sysctl("net.ipv4.ip_forward", "1")?;
    host.sysctl("net.ipv6.conf.all.forwarding", "1")
}

/// A route of both families.
fn route(host: &Host, to: &str, via: [&str; 2]) -> Result<()> {
    host.route(&format!("{to} via {}", via[0]))?;
    host.ip(&format!("-6 route replace {to} via {}", via[1])).map(drop)
}
