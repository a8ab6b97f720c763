//! The network of `bench lab`: one client, one router, three backends, and a balancer of every kind, all of them there at
//! the same time. It measures nothing.
//!
//! ```text
//! client --- out --- router --- lan: balancers, web1, web2, web3
//! ```
//!
//! Each side has a VIP, and an address of the client that its VIP is asked from. So the router knows by the destination
//! which balancer takes a packet, backends know by the client's address which one takes their answer, and nothing has to
//! be changed between two measurements.

use ::tests::balancer::{Balancer, decap_on};
use ::tests::lab::{self, Host, Lab, Nginx, Process};
use anyhow::{Context, Result};

/// How packets get from the router to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The router spreads flows over the backends itself (ECMP): what every other side is compared with.
    Direct,
    Nftables,
    Haproxy,
    /// By the `forward` of its pools.
    Xlb(&'static str),
}

pub const SIDES: [Side; 7] = [
    Side::Direct,
    Side::Nftables,
    Side::Haproxy,
    Side::Xlb("ipip"),
    Side::Xlb("l2"),
    Side::Xlb("nat"),
    Side::Xlb("fullnat"),
];

pub const BACKENDS: usize = 3;

impl Side {
    pub fn name(self) -> String {
        match self {
            Self::Direct => "direct".to_owned(),
            Self::Nftables => "nftables".to_owned(),
            Self::Haproxy => "haproxy".to_owned(),
            Self::Xlb(forward) => format!("xlb-{forward}"),
        }
    }

    fn number(self) -> usize {
        SIDES.iter().position(|side| *side == self).unwrap_or(SIDES.len())
    }

    pub fn vip(self) -> String {
        format!("203.0.113.{}", 10 + self.number())
    }

    /// Where an iperf3 server answers: its connections must meet the same one.
    pub fn bulk(self) -> String {
        if self == Self::Direct { backend(0) } else { self.vip() }
    }

    fn client(self) -> String {
        format!("10.120.0.{}", 10 + self.number())
    }

    fn balancer(self) -> String {
        format!("10.111.0.{}", 100 + self.number())
    }

    /// Whether backends answer for the VIP.
    fn answers_directly(self) -> bool {
        matches!(self, Self::Direct | Self::Xlb("ipip" | "l2"))
    }

    /// Whether answers have to come back through the balancer because backends see the client's address.
    fn is_the_way_back(self) -> bool {
        matches!(self, Self::Nftables | Self::Xlb("nat"))
    }
}

/// A backend's address.
fn backend(index: usize) -> String {
    format!("10.111.0.{}", 11 + index)
}

/// A backend's address for tunnels, on an interface of its own: the program that takes headers off burdens nobody else.
fn tunnel_end(index: usize) -> String {
    format!("10.112.0.{}", 11 + index)
}

/// The end of a link, as the offloads of both of its ends are set.
struct Link {
    host: Host,
    interface: String,
    port: String,
    /// Whether XDP takes the packets that leave the bridge here. It cannot see checksums that are left to a NIC.
    to_xdp: bool,
}

pub struct Scene {
    pub client: Host,
    pub balancers: Vec<(Side, Balancer)>,
    /// Of programs that take part, as they tell it.
    pub versions: Vec<String>,
    links: Vec<Link>,
    /// Kept: what runs is killed with the lab alone, but its logs are read through these.
    servers: Vec<Process>,
    /// Last, so that it is removed after everything else.
    _lab: Lab,
}

impl Scene {
    pub fn set(sides: &[Side]) -> Result<Self> {
        let lab = Lab::new("bench")?;
        let out = lab.switch("out")?;
        let client = lab.host_on("client", &[(&out, &["10.120.0.2/24"])])?;
        client.set_mtu("eth0", 1500)?;
        // Short connections: as many ports as there are, each again at once.
        client.sysctl("net.ipv4.ip_local_port_range", "1024 65535")?;
        client.sysctl("net.ipv4.tcp_tw_reuse", "1")?;
        let router = lab.host_on("router", &[(&out, &["10.120.0.1/24"]), (lab.lan(), &["10.111.0.1/24"])])?;
        router.set_mtu("eth0", 1500)?;
        routes(&router)?;
        router.sysctl("net.ipv4.fib_multipath_hash_policy", "1")?;
        let links = vec![Link::of(&client, "eth0", false), Link::of(&router, "eth0", false)];
        let mut scene = Self {
            client,
            balancers: Vec::new(),
            versions: Vec::new(),
            links,
            servers: Vec::new(),
            _lab: lab,
        };
        scene.links.push(Link::of(&router, "eth1", false));
        let backends = scene.backends(sides)?;
        for side in sides {
            scene.add(*side, &router, &backends)?;
        }
        scene.links.iter().try_for_each(Link::only_needed_programs)?;
        Ok(scene)
    }

    /// Three nginx, of which the first host has an iperf3 server too.
    fn backends(&mut self, sides: &[Side]) -> Result<Vec<Host>> {
        let lab = &self._lab;
        let vips: Vec<String> =
            sides.iter().filter(|side| side.answers_directly()).map(|side| side.vip()).collect();
        let mut hosts = Vec::new();
        for index in 0..BACKENDS {
            let host = lab.host(&format!("web{}", index + 1), &[&format!("{}/24", backend(index))])?;
            host.route("default via 10.111.0.1")?;
            self.links.push(Link::of(&host, "eth0", false));
            let tunnelled = Side::Xlb("ipip");
            if sides.contains(&tunnelled) {
                host.add_interface(lab.lan(), &[&format!("{}/24", tunnel_end(index))])?;
                self.links.push(Link::of(&host, "eth1", true));
                self.servers.push(decap_on(&host, "eth1", &[&tunnelled.vip()], &["10.255.0.0/24"])?);
            }
            lab::backend_dsr(&host, &vips.iter().map(String::as_str).collect::<Vec<_>>())?;
            let nginx = Nginx { keepalive: true, ..Nginx::default() };
            self.servers.push(lab::nginx(&host, host.name(), nginx)?.process);
            if index == 0 {
                self.servers.push(lab::iperf3_server(&host)?);
            }
            hosts.push(host);
        }
        Ok(hosts)
    }

    /// The balancer of a side, and the routes that lead to it.
    fn add(&mut self, side: Side, router: &Host, backends: &[Host]) -> Result<()> {
        let vip = side.vip();
        self.client.add_address(&format!("{}/24", side.client()), "eth0")?;
        self.client.route(&format!("{vip}/32 via 10.120.0.1 src {}", side.client()))?;
        if side == Side::Direct {
            self.client.route(&format!("10.111.0.0/24 via 10.120.0.1 src {}", side.client()))?;
            let hops: Vec<String> =
                (0..BACKENDS).map(|index| format!("nexthop via {}", backend(index))).collect();
            return router.route(&format!("{vip}/32 {}", hops.join(" ")));
        }
        router.route(&format!("{vip}/32 via {}", side.balancer()))?;
        if side.is_the_way_back() {
            for host in backends {
                host.route(&format!("{}/32 via {}", side.client(), side.balancer()))?;
            }
        }
        let name = format!("bal{}", side.name().replace("xlb-", ""));
        let host = self._lab.host(&name, &[&format!("{}/24", side.balancer())])?;
        host.route("default via 10.111.0.1")?;
        self.links.push(Link::of(&host, "eth0", matches!(side, Side::Xlb(_))));
        match side {
            Side::Direct => {}
            Side::Nftables => self.nftables(&host, &vip)?,
            Side::Haproxy => self.haproxy(&host, &vip)?,
            Side::Xlb(forward) => {
                let number = side.number();
                host.add_address(&format!("10.112.0.{}/24", 100 + number), "eth0")?;
                let run_dir = self._lab.dir().join(format!("xlb-{forward}"));
                let balancer = Balancer::start(&host, &run_dir, &configuration(forward, &vip))?;
                balancer.wait_for_backends(BACKENDS + 1, std::time::Duration::from_secs(20))?;
                self.balancers.push((side, balancer));
            }
        }
        Ok(())
    }

    fn nftables(&mut self, host: &Host, vip: &str) -> Result<()> {
        routes(host)?;
        let chosen: Vec<String> =
            (0..BACKENDS).map(|index| format!("{index} : {}", backend(index))).collect();
        let rules = format!(
            "table ip balance {{
    chain prerouting {{
        type nat hook prerouting priority dstnat;
        ip daddr {vip} tcp dport 80 dnat to jhash ip saddr . tcp sport mod {BACKENDS} map {{ {} }}
        ip daddr {vip} tcp dport 5201 dnat to {}
    }}
}}
",
            chosen.join(", "),
            backend(0)
        );
        let file = host.new_file("rules.nft");
        std::fs::write(&file, rules)?;
        host.run(["nft".as_ref(), "-f".as_ref(), file.as_os_str()])?;
        self.versions.push(host.run(["nft", "--version"])?.trim().to_owned());
        Ok(())
    }

    fn haproxy(&mut self, host: &Host, vip: &str) -> Result<()> {
        host.add_address(&format!("{vip}/32"), "lo")?;
        let servers: String =
            (0..BACKENDS).map(|index| format!("    server web{index} {}:80\n", backend(index))).collect();
        let config = format!(
            "global
    maxconn 4000
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen web
    bind {vip}:80
    balance roundrobin
{servers}listen bulk
    bind {vip}:5201
    server web0 {}:5201
",
            backend(0)
        );
        host.sysctl("net.ipv4.ip_local_port_range", "1024 65535")?;
        let file = host.new_file("haproxy.cfg");
        std::fs::write(&file, config)?;
        let process = host.spawn(["haproxy".as_ref(), "-db".as_ref(), "-f".as_ref(), file.as_os_str()])?;
        process.wait_until("a listener on port 80", std::time::Duration::from_secs(10), || {
            let vip = vip.to_owned();
            matches!(host.inside(move || std::net::TcpStream::connect((vip.as_str(), 80))), Ok(Ok(_)))
        })?;
        self.servers.push(process);
        let version = host.run(["haproxy", "-v"])?;
        self.versions.push(version.lines().next().unwrap_or_default().to_owned());
        Ok(())
    }

    /// Sets what a NIC would do for its host, on every link: segments put together and taken apart, checksums.
    pub fn set_offloads(&self, on: bool) -> Result<()> {
        self.links.iter().try_for_each(|link| link.set_offloads(on))
    }

    /// The mode of XDP on the balancers' interfaces.
    pub fn modes(&self) -> Result<Vec<String>> {
        let mut modes = Vec::new();
        for (_, balancer) in &self.balancers {
            modes.extend(balancer.status()?.interfaces.into_iter().map(|interface| interface.mode));
        }
        modes.sort();
        modes.dedup();
        Ok(modes)
    }

    /// What xlb dropped, by side and outcome.
    pub fn drops(&self) -> Result<Vec<(String, String, u64)>> {
        let mut drops = Vec::new();
        for (side, balancer) in &self.balancers {
            let outcomes = balancer.status().with_context(|| side.name())?.outcomes;
            let dropped = outcomes.into_iter().filter(|one| one.name.starts_with("drop_") && one.packets > 0);
            drops.extend(dropped.map(|one| (side.name(), one.name.to_string(), one.packets)));
        }
        Ok(drops)
    }
}

impl Link {
    fn of(host: &Host, interface: &str, to_xdp: bool) -> Self {
        let port = format!("{}-{}", host.name(), interface.trim_start_matches("eth"));
        Self { host: host.clone(), interface: interface.to_owned(), port, to_xdp }
    }

    /// Labs put a program on every port of a bridge, which makes each packet a copy. Only what xlb sends needs it.
    fn only_needed_programs(&self) -> Result<()> {
        if self.to_xdp {
            return Ok(());
        }
        self.at_port(&["ip", "link", "set", &self.port, "xdpdrv", "off"])
    }

    fn set_offloads(&self, on: bool) -> Result<()> {
        let (own, segments) = if on { ("on", "on") } else { ("off", "off") };
        let at_host =
            ["ethtool", "-K", &self.interface, "tx", own, "tso", segments, "gso", segments, "gro", segments];
        self.host.run(at_host)?;
        let tx = if self.to_xdp { "off" } else { own };
        self.at_port(&[
            "ethtool", "-K", &self.port, "tx", tx, "tso", segments, "gso", segments, "gro", segments,
        ])
    }

    fn at_port(&self, words: &[&str]) -> Result<()> {
        let output = self.host.exec_at_switch(words).output().with_context(|| words.join(" "))?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        anyhow::ensure!(output.status.success(), "{}: {}", words.join(" "), stderr.trim());
        Ok(())
    }
}

/// Makes a host a router that sends nobody another way.
fn routes(host: &Host) -> Result<()> {
    host.sysctl("net.ipv4.ip_forward", "1")?;
    for name in ["all", "eth0"] {
        host.sysctl(&format!("net/ipv4/conf/{name}/send_redirects"), "0")?;
    }
    Ok(())
}

/// One pool for requests, one of a single backend for iperf3.
fn configuration(forward: &str, vip: &str) -> String {
    let address = if forward == "ipip" { tunnel_end } else { backend };
    let list: Vec<String> = (0..BACKENDS).map(address).collect();
    let sources = match forward {
        "ipip" => "outer_source: 10.255.0.0/24\n",
        "fullnat" => "fullnat: {sources: [10.111.0.128/30]}\nvip_arp: true\n",
        _ => "",
    };
    format!(
        "interfaces: [eth0]
seed: 5f1d0c3a9be24771
{sources}defaults: {{health: {{type: none}}}}
pools:
  web: {{forward: {forward}, backends: [{}]}}
  bulk: {{forward: {forward}, backends: [{}]}}
services:
  - {{name: web, vip: {vip}, ports: 80, protocol: tcp, pool: web}}
  - {{name: bulk, vip: {vip}, ports: 5201, protocol: tcp, pool: bulk}}
",
        list.join(", "),
        list[0]
    )
}
