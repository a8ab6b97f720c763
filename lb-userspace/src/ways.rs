//! Whether packets can get to a backend by the way that the kernel names, in its pool's mode, and why not. Pure; knows
//! neither neighbours nor health.

use std::fmt;
use std::net::IpAddr;

use lb_common::nat;

use crate::config::model::{Config, Forward};
use crate::nexthop::Way;
use crate::reconcile::desired::kind;

/// A link that carries IPv6 takes packets of this many bytes (RFC 8200, section 5).
const LEAST_IPV6: u16 = 1280;
/// Every host takes datagrams of this many bytes (RFC 791, section 3.1), and sends them without asking.
const LEAST_IPV4: u16 = 576;

/// Why a backend cannot be used, and the way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    pub reason: String,
    pub remedy: String,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.reason, self.remedy)
    }
}

fn obstacle(reason: impl Into<String>, remedy: impl Into<String>) -> Result<(), Obstacle> {
    Err(Obstacle { reason: reason.into(), remedy: remedy.into() })
}

/// Families of the VIPs that a pool serves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Served {
    pub v4: bool,
    pub v6: bool,
}

/// What a configuration asks of ways.
#[derive(Debug)]
pub struct Judge<'c> {
    config: &'c Config,
    /// By pool.
    served: Vec<Served>,
    /// Interfaces with native XDP: index and name.
    native: Vec<(u32, &'c str)>,
}

impl<'c> Judge<'c> {
    pub fn new(config: &'c Config, native: impl IntoIterator<Item = (u32, &'c str)>) -> Self {
        let mut served = vec![Served::default(); config.pools.len()];
        for service in &config.services {
            let v4 = service.vips.iter().any(|vip| vip.is_ipv4());
            let v6 = service.vips.iter().any(|vip| !vip.is_ipv4());
            for pool in config.levels_of(service.pool) {
                served[pool].v4 |= v4;
                served[pool].v6 |= v6;
            }
        }
        Self { config, served, native: native.into_iter().collect() }
    }

    /// Whether packets of a pool can get to one of its backends.
    pub fn passes(&self, pool: usize, address: IpAddr, way: &Way<'_>) -> Result<(), Obstacle> {
        self.keeps_tags(way)?;
        self.can_be_redirected_to(way)?;
        match self.config.pools[pool].forward {
            Forward::L2 => on_link(way)?,
            Forward::Ipip | Forward::Gue { .. } => self.has_source(address, way)?,
            Forward::Nat { .. } | Forward::Fullnat { .. } => {}
        }
        self.has_room(pool, address, way)
    }

    pub fn served(&self, pool: usize) -> Served {
        self.served[pool]
    }

    /// Bytes of the longest packet of a client that gets to a backend, and what is put in front of it, or what the header of
    /// the backend's family takes more than that of the client's.
    pub fn room(&self, pool: usize, address: IpAddr, way: &Way<'_>) -> (u16, u16) {
        let kind = kind(self.config.pools[pool].forward, address);
        let widens = kind.translates_source() && address.is_ipv6() && self.served[pool].v4;
        let overhead = if widens { nat::FAMILY_STEP as u16 } else { kind.overhead() };
        (way.mtu.saturating_sub(overhead), overhead)
    }

    /// Frames leave with the tags that they came with; a VLAN device would add its own.
    fn keeps_tags(&self, way: &Way<'_>) -> Result<(), Obstacle> {
        if !self.config.vlan || way.kind != Some("vlan") {
            return Ok(());
        }
        obstacle(
            format!(
                "{} is a VLAN device: it adds its tag to frames that keep theirs (vlan: true)",
                way.interface
            ),
            "route the backend through the device below it",
        )
    }

    /// Native XDP needs the driver's help to send through an interface that a packet did not come in by.
    fn can_be_redirected_to(&self, way: &Way<'_>) -> Result<(), Obstacle> {
        let other = self.native.iter().find(|(ifindex, _)| *ifindex != way.ifindex);
        let Some((_, from)) = other.filter(|_| !way.redirect_target) else { return Ok(()) };
        let interface = way.interface;
        match way.kind {
            Some("veth") => obstacle(
                format!(
                    "{interface} is a veth whose other end has no XDP program, and takes nothing that native XDP on {from} redirects"
                ),
                "load one there, or use mode: generic",
            ),
            kind => obstacle(
                format!(
                    "{interface}{} cannot send what native XDP on {from} redirects",
                    kind.map_or_else(String::new, |kind| format!(" ({kind})"))
                ),
                "route the backend through the device below it, or use mode: generic",
            ),
        }
    }

    fn has_source(&self, address: IpAddr, way: &Way<'_>) -> Result<(), Obstacle> {
        let filled = match address {
            IpAddr::V4(_) => self.config.outer_source.v4.is_some(),
            IpAddr::V6(_) => self.config.outer_source.v6.is_some(),
        };
        match way.preferred_source {
            _ if filled => Ok(()),
            None => obstacle(
                format!("{} has no address to send tunnel packets from", way.interface),
                "set outer_source",
            ),
            Some(source) if self.config.has_vip(source) => {
                obstacle(format!("the route's source address {source} is a VIP"), "set outer_source")
            }
            Some(_) => Ok(()),
        }
    }

    /// A way may be too narrow for what clients may send without asking: they would be told of an MTU that no
    /// sender keeps to.
    fn has_room(&self, pool: usize, address: IpAddr, way: &Way<'_>) -> Result<(), Obstacle> {
        let (room, overhead) = self.room(pool, address, way);
        let served = self.served[pool];
        let (family, least, by) = if served.v6 && room < LEAST_IPV6 {
            ("IPv6", LEAST_IPV6, "RFC 8200, section 5")
        } else if served.v4 && room < LEAST_IPV4 {
            ("IPv4", LEAST_IPV4, "RFC 791, section 3.1")
        } else {
            return Ok(());
        };
        let (interface, mtu) = (way.interface, way.mtu);
        let of_it =
            if overhead > 0 { format!(", {room} without the tunnel's header") } else { String::new() };
        obstacle(
            format!(
                "the way to it through {interface} takes {mtu} bytes{of_it}: {family} needs {least} ({by})"
            ),
            format!("raise the MTU of the route, or of {interface}, to {} or more", least + overhead),
        )
    }
}

fn on_link(way: &Way<'_>) -> Result<(), Obstacle> {
    if way.gateway.is_none() {
        return Ok(());
    }
    obstacle(
        format!("it is behind a gateway, and `forward: l2` needs it on {}'s link", way.interface),
        "use ipip or gue",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    const WAY: Way<'_> = Way {
        ifindex: 2,
        interface: "eth0",
        mtu: 1500,
        preferred_source: Some(IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1))),
        gateway: None,
        kind: None,
        redirect_target: true,
    };

    fn config(forward: &str, vips: &str, more: &str) -> Config {
        let text = format!(
            "interfaces: [eth0]\nseed: 1\n{more}\npools: {{web: {{forward: {forward}, backends: [10.0.0.2, '2001:db8::2']}}}}\n\
             services: [{{name: www, vip: {vips}, ports: 80, protocol: tcp, pool: web}}]\n"
        );
        config::parse("xlb.yaml", &text).map(|loaded| loaded.config).unwrap_or_else(|wrong| panic!("{wrong}"))
    }

    const BOTH: &str = "[203.0.113.1, '2001:db8:1::1']";

    #[test]
    fn a_way_that_cannot_carry_a_family_of_the_pools_vips_is_an_obstacle() {
        let (v4, v6): (IpAddr, IpAddr) = ("10.0.0.2".parse().unwrap(), "2001:db8::2".parse().unwrap());
        // The least MTU that will do.
        for (forward, vips, address, least) in [
            ("ipip", BOTH, v4, 1300),
            ("ipip", BOTH, v6, 1320),
            ("gue", BOTH, v4, 1308),
            ("gue", BOTH, v6, 1328),
            ("l2", BOTH, v4, 1280),
            ("ipip", "203.0.113.1", v4, 596),
            ("ipip", "203.0.113.1", v6, 616),
            ("gue", "203.0.113.1", v4, 604),
            ("gue", "203.0.113.1", v6, 624),
            ("l2", "203.0.113.1", v6, 576),
            ("ipip", "'2001:db8:1::1'", v4, 1300),
        ] {
            let name = format!("{forward} to {address} for {vips}");
            let config = config(forward, vips, "outer_source: [10.1.0.0/24, '2001:db8:2::/64']");
            let judge = Judge::new(&config, []);
            assert_eq!(judge.passes(0, address, &Way { mtu: least, ..WAY }), Ok(()), "{name}");
            let told = judge.passes(0, address, &Way { mtu: least - 1, ..WAY }).unwrap_err();
            assert!(told.remedy.contains(&format!("to {least} or more")), "{name}: {told}");
            assert!(judge.passes(0, address, &Way { mtu: 0, ..WAY }).is_err(), "{name}");
        }
    }

    #[test]
    fn what_is_told_of_a_narrow_way_names_the_family_and_the_rule() {
        let config = config("gue", BOTH, "");
        let narrow =
            Judge::new(&config, []).passes(0, "10.0.0.2".parse().unwrap(), &Way { mtu: 1300, ..WAY });
        assert_eq!(
            narrow.unwrap_err().to_string(),
            "the way to it through eth0 takes 1300 bytes, 1272 without the tunnel's header: IPv6 needs 1280 \
             (RFC 8200, section 5); raise the MTU of the route, or of eth0, to 1308 or more"
        );
    }

    #[test]
    fn a_tunnel_needs_a_source_that_is_no_vip_and_l2_needs_none() {
        let address = "10.0.0.2".parse().unwrap();
        let vip = Way { preferred_source: "203.0.113.1".parse().ok(), ..WAY };
        let none = Way { preferred_source: None, ..WAY };
        for (forward, more, way, good) in [
            ("ipip", "", WAY, true),
            ("ipip", "", none, false),
            ("gue", "", none, false),
            ("gue", "", vip, false),
            ("gue", "outer_source: 10.1.0.0/24", none, true),
            // For the other family.
            ("gue", "outer_source: '2001:db8:2::/64'", none, false),
            ("l2", "", none, true),
        ] {
            let config = config(forward, "203.0.113.1", more);
            let judged = Judge::new(&config, []).passes(0, address, &way);
            assert_eq!(judged.is_ok(), good, "{forward} {more} {way:?}: {judged:?}");
        }
    }

    #[test]
    fn a_gateway_is_an_obstacle_for_l2_alone() {
        let way = Way { gateway: "10.0.0.254".parse().ok(), ..WAY };
        for (forward, good) in [("ipip", true), ("gue", true), ("l2", false)] {
            let config = config(forward, "203.0.113.1", "");
            assert_eq!(Judge::new(&config, []).passes(0, "10.0.0.2".parse().unwrap(), &way).is_ok(), good);
        }
    }
}
