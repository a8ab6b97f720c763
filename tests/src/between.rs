//! The scene of the modes that translate addresses: a balancer between the clients' network and that of backends which know
//! nothing of it. It knows no test.
//!
//! ```text
//! client --- outside --- balancer --- inside --- web1, web2, ...
//! ```
//!
//! Nobody routes between the two networks, so that whatever crosses was translated. With `nat` the backends' default route
//! leads to the balancer. With `fullnat` they have none at all, and the sources are further addresses of the balancer in
//! their own network.

use std::fmt;

use anyhow::{Result, ensure};

use crate::balancer::Balancer;
use crate::lab::{self, Host, Lab, Nginx, NginxServer, Switch};
use crate::stage::{PATIENCE, PATIENT_CHECKS, name};

/// The client's addresses.
pub const CLIENTS: [&str; 2] = ["10.120.0.2", "fd00:120::2"];
/// Where it finds the balancer.
const OUTSIDE: [&str; 2] = ["10.120.0.3", "fd00:120::3"];
/// Where backends find it.
pub const INSIDE: [&str; 2] = ["10.112.0.3", "fd00:112::3"];
/// The sources of `fullnat`.
pub const SOURCES: [&str; 2] = ["10.112.0.5", "fd00:112::5"];
/// Further ones, of which the configuration knows nothing yet.
pub const MORE_SOURCES: [&str; 2] = ["10.112.0.6", "fd00:112::6"];

/// VIPs whose backends are of their own family, IPv4 first.
pub const SAME: [&str; 2] = ["203.0.113.10", "2001:db8:113::10"];
/// VIPs whose backends are of the other family, IPv4 first.
pub const OTHER: [&str; 2] = ["203.0.113.46", "2001:db8:113::64"];

/// The routers of [`Between::routed`], by the addresses that they show to clients, and those that they show to backends.
pub const HOPS: [[&str; 2]; 4] = [
    ["10.120.0.1", "fd00:120::1"],
    ["10.121.0.2", "fd00:121::2"],
    ["10.112.0.1", "fd00:112::1"],
    ["10.113.0.2", "fd00:113::2"],
];

/// The ports of every backend's nginx.
pub const PORTS: [u16; 2] = [80, 8080];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Nat,
    Fullnat,
}

impl Mode {
    /// Each VIP, and whether its backends have IPv6 addresses.
    pub fn vips(self) -> Vec<(&'static str, bool)> {
        let same = SAME.into_iter().zip([false, true]);
        match self {
            Self::Nat => same.collect(),
            Self::Fullnat => same.chain(OTHER.into_iter().zip([true, false])).collect(),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nat => "nat",
            Self::Fullnat => "fullnat",
        })
    }
}

pub struct Between {
    pub mode: Mode,
    pub client: Host,
    pub balancer: Host,
    pub backends: Vec<Backend>,
    /// Last, so that a failed test's lab is removed after everything else of it.
    pub lab: Lab,
}

/// A host that knows nothing of VIPs.
pub struct Backend {
    pub host: Host,
    pub nginx: NginxServer,
}

impl Between {
    /// So many backends; nothing where skipping was asked for.
    pub fn set(name: &str, mode: Mode, backends: usize) -> Result<Option<Self>> {
        if !lab::available()? {
            return Ok(None);
        }
        let lab = Lab::new(name)?;
        let inside = lab.switch("inside")?;
        let [client, outer, inner] = [CLIENTS, OUTSIDE, INSIDE].map(with_lengths);
        let client = lab.host("client", &client.each_ref().map(String::as_str))?;
        client.set_mtu("eth0", 1500)?;
        client.route(&format!("203.0.113.0/24 via {}", OUTSIDE[0]))?;
        client.ip(&format!("-6 route add 2001:db8:113::/64 via {}", OUTSIDE[1]))?;
        let (outer, inner) = (outer.each_ref().map(String::as_str), inner.each_ref().map(String::as_str));
        let balancer = lab.host_on("balancer", &[(lab.lan(), &outer), (&inside, &inner)])?;
        if mode == Mode::Fullnat {
            for source in [SOURCES, MORE_SOURCES].into_iter().flat_map(with_lengths) {
                balancer.add_address(&source, "eth1")?;
            }
        }
        let mut this = Self { mode, client, balancer, backends: Vec::new(), lab };
        for index in 0..backends {
            let host = this.lab.host_on(
                &crate::stage::name(index),
                &[(
                    &inside,
                    &[&format!("{}/24", address(index, false)), &format!("{}/64", address(index, true))],
                )],
            )?;
            this.backends.push(this.backend(host)?);
        }
        Ok(Some(this))
    }

    /// One backend, and two routers on either side of the balancer, with a link between them that takes so much.
    ///
    /// ```text
    /// client --- edge --(outside)-- mid --- balancer --- core --(inside)-- far --- web1
    /// ```
    pub fn routed(name: &str, mode: Mode, outside: u16, inside: u16) -> Result<Option<Self>> {
        if !lab::available()? {
            return Ok(None);
        }
        let lab = Lab::new(name)?;
        let [outer, entry, inner, between, last] =
            ["outer", "entry", "inner", "between", "last"].map(|name| lab.switch(name));
        let (outer, entry, inner, between, last) = (outer?, entry?, inner?, between?, last?);
        let client = on(&lab, "client", &[(lab.lan(), CLIENTS)])?;
        client.set_mtu("eth0", 1500)?;
        let edge = on(&lab, "edge", &[(lab.lan(), HOPS[0]), (&outer, ["10.121.0.1", "fd00:121::1"])])?;
        let mid = on(&lab, "mid", &[(&outer, HOPS[1]), (&entry, ["10.122.0.1", "fd00:122::1"])])?;
        let balancer = on(&lab, "balancer", &[(&entry, ["10.122.0.3", "fd00:122::3"]), (&inner, INSIDE)])?;
        let core = on(&lab, "core", &[(&inner, HOPS[2]), (&between, ["10.113.0.1", "fd00:113::1"])])?;
        let far = on(&lab, "far", &[(&between, HOPS[3]), (&last, ["10.114.0.1", "fd00:114::1"])])?;
        let web = on(&lab, "web1", &[(&last, ["10.114.0.11", "fd00:114::11"])])?;
        for (router, interface, mtu) in [
            (&edge, "eth1", outside),
            (&mid, "eth0", outside),
            (&core, "eth1", inside),
            (&far, "eth0", inside),
        ] {
            router.set_mtu(interface, mtu)?;
            router.sysctl("net.ipv4.ip_forward", "1")?;
            router.sysctl("net.ipv6.conf.all.forwarding", "1")?;
        }
        for (host, to, via) in [
            (&client, ["default", "default"], HOPS[0]),
            (&edge, ["default", "default"], HOPS[1]),
            (&mid, ["10.120.0.0/24", "fd00:120::/64"], ["10.121.0.1", "fd00:121::1"]),
            (&mid, ["default", "default"], ["10.122.0.3", "fd00:122::3"]),
            (&balancer, ["10.114.0.0/24", "fd00:114::/64"], HOPS[2]),
            (&core, ["10.114.0.0/24", "fd00:114::/64"], HOPS[3]),
            (&far, ["default", "default"], ["10.113.0.1", "fd00:113::1"]),
            (&web, ["default", "default"], ["10.114.0.1", "fd00:114::1"]),
        ] {
            host.route(&format!("{} via {}", to[0], via[0]))?;
            host.ip(&format!("-6 route replace {} via {}", to[1], via[1]))?;
        }
        if mode == Mode::Nat {
            core.route(&format!("default via {}", INSIDE[0]))?;
            core.ip(&format!("-6 route replace default via {}", INSIDE[1]))?;
        } else {
            for source in with_lengths(SOURCES) {
                balancer.add_address(&source, "eth1")?;
            }
        }
        let nginx = lab::nginx(&web, "web1", Nginx { ports: PORTS.to_vec(), ..Nginx::default() })?;
        let backends = vec![Backend { host: web, nginx }];
        Ok(Some(Self { mode, client, balancer, backends, lab }))
    }

    fn backend(&self, host: Host) -> Result<Backend> {
        if self.mode == Mode::Nat {
            host.route(&format!("default via {}", INSIDE[0]))?;
            host.ip(&format!("-6 route add default via {}", INSIDE[1]))?;
        } else {
            for client in CLIENTS {
                ensure!(host.ip(&format!("route get {client}")).is_err(), "{client} can be reached");
            }
        }
        let nginx = Nginx { ports: PORTS.to_vec(), ..Nginx::default() };
        Ok(Backend { nginx: lab::nginx(&host, host.name(), nginx)?, host })
    }

    /// The configuration of this scene: services on all VIPs of the mode, port 80.
    pub fn config(&self) -> Config {
        let backends = |ipv6| (0..self.backends.len()).map(|index| backend(index, ipv6)).collect();
        Config {
            mode: self.mode,
            top: String::new(),
            sources: listed(&SOURCES),
            health: PATIENT_CHECKS.replace("path:", "port: 80, path:"),
            pool: String::new(),
            backends: [backends(false), backends(true)],
            ports: "80".to_owned(),
            protocol: "tcp".to_owned(),
        }
    }

    /// Starts xlb and waits until all backends of both families are up.
    pub fn start(&self, config: &Config) -> Result<Balancer> {
        let balancer = Balancer::start(&self.balancer, &self.lab.dir().join("xlb"), &config.to_string())?;
        balancer.wait_for_backends(config.backends.iter().map(Vec::len).sum(), PATIENCE)?;
        Ok(balancer)
    }
}

/// A configuration as text, in parts that tests change: a pool for each family of backends, and a service for each VIP.
#[derive(Clone, Debug)]
pub struct Config {
    pub mode: Mode,
    /// Lines at the top.
    pub top: String,
    pub sources: String,
    pub health: String,
    /// Further keys of both pools, each on a line with four spaces before it.
    pub pool: String,
    /// IPv4 first.
    pub backends: [Vec<String>; 2],
    pub ports: String,
    pub protocol: String,
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "interfaces: [eth0, eth1]\nseed: 5f1d0c3a9be24771\n{}", self.top)?;
        if self.mode == Mode::Fullnat {
            writeln!(f, "fullnat: {{sources: [{}]}}", self.sources)?;
        }
        writeln!(f, "pools:")?;
        for (pool, backends) in ["web4", "web6"].iter().zip(&self.backends) {
            writeln!(f, "  {pool}:\n    forward: {}\n    health: {}", self.mode, self.health)?;
            writeln!(f, "{}    backends:", self.pool)?;
            backends.iter().try_for_each(|backend| writeln!(f, "      - {backend}"))?;
        }
        writeln!(f, "services:")?;
        for (index, (vip, ipv6)) in self.mode.vips().into_iter().enumerate() {
            let (ports, protocol, pool) = (&self.ports, &self.protocol, if ipv6 { "web6" } else { "web4" });
            writeln!(
                f,
                "  - {{name: s{index}, vip: \"{vip}\", ports: {ports}, protocol: {protocol}, pool: {pool}}}"
            )?;
        }
        Ok(())
    }
}

/// A backend's address inside.
pub fn address(index: usize, ipv6: bool) -> String {
    let prefix = if ipv6 { "fd00:112::" } else { "10.112.0." };
    format!("{prefix}{}", 11 + index)
}

/// A backend as the configuration names it.
pub fn backend(index: usize, ipv6: bool) -> String {
    format!("{{address: \"{}\", name: {}}}", address(index, ipv6), name(index))
}

/// The URL of a path at a VIP.
pub fn url(vip: &str, port: u16, path: &str) -> String {
    match vip.contains(':') {
        true => format!("http://[{vip}]:{port}/{path}"),
        false => format!("http://{vip}:{port}/{path}"),
    }
}

/// A host with both addresses on each switch.
fn on(lab: &Lab, name: &str, links: &[(&Switch, [&str; 2])]) -> Result<Host> {
    let host = lab.host_on(name, &[])?;
    for (switch, addresses) in links {
        host.add_interface(switch, &with_lengths(*addresses).each_ref().map(String::as_str))?;
    }
    Ok(host)
}

/// Addresses as the configuration lists them.
pub fn listed(addresses: &[&str]) -> String {
    let quoted: Vec<String> = addresses.iter().map(|address| format!("\"{address}\"")).collect();
    quoted.join(", ")
}

/// Addresses as they are given to an interface.
fn with_lengths(addresses: [&str; 2]) -> [String; 2] {
    [format!("{}/24", addresses[0]), format!("{}/64", addresses[1])]
}
