//! How large a configuration is, and what it says.

use std::fmt::{self, Write};
use std::net::Ipv4Addr;
use std::str::FromStr;

use anyhow::{Context, Result, anyhow, ensure};
use lb_userspace::config;
use lb_userspace::config::model::Config;
use lb_userspace::tables::maglev;

/// Services, each with a pool of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    pub services: u32,
    /// Of each.
    pub backends: u32,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} x {}", self.services, self.backends)
    }
}

impl FromStr for Shape {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (services, backends) = text.split_once('x').context("write it as 1000x10")?;
        let this = Self { services: services.parse()?, backends: backends.parse()? };
        ensure!((1..=2000).contains(&this.services), "{text}: 1 to 2000 services");
        // One of them goes down.
        ensure!(this.backends >= 2, "{text}: a service needs 2 backends");
        let all = this.services.checked_mul(this.backends);
        ensure!(all.is_some_and(|all| all <= 10_000), "{text}: at most 10000 backends in all");
        Ok(this)
    }
}

pub const CHECKED_PORT: u16 = 80;

impl Shape {
    /// The address of a service.
    pub fn vip(service: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(Ipv4Addr::new(203, 0, 112, 1)) + service)
    }

    /// All of them, and no other hosts.
    pub const VIPS: &str = "203.0.112.0/21";

    /// The address of a backend, counted over all services.
    pub fn backend(number: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 100, 0, 1)) + number)
    }

    pub const BACKENDS: &str = "10.100.0.0/16";

    pub fn slots(&self) -> u32 {
        self.services << maglev::log2_length(self.backends as usize)
    }

    /// The configuration as a file, with room for an eighth more slots. `swapped`: the last backend is another.
    pub fn text(&self, health: &str, swapped: bool) -> String {
        let mut text =
            String::from("interfaces: [eth0]\nseed: 5f1d0c3a9be24771\nouter_source: 10.255.0.0/24\n");
        let all = self.services * self.backends;
        // Steps of the shortest table.
        let slots = (self.slots() + (self.slots() / 8).next_multiple_of(4096)).max(1 << 20);
        // Nothing fails to be written to a string.
        let mut line = |line: fmt::Arguments<'_>| _ = writeln!(text, "{line}");
        line(format_args!("limits: {{slots: {slots}, backends: {}}}\npools:", all + 1));
        for service in 0..self.services {
            line(format_args!("  p{service}:\n    forward: ipip\n    health: {health}\n    backends:"));
            for number in (service * self.backends..).take(self.backends as usize) {
                let last = swapped && number + 1 == all;
                line(format_args!("      - {}", Self::backend(number + u32::from(last))));
            }
        }
        line(format_args!("services:"));
        for service in 0..self.services {
            let vip = Self::vip(service);
            line(format_args!(
                "  - {{name: s{service}, vip: {vip}, ports: 7000, protocol: udp, pool: p{service}}}"
            ));
        }
        text
    }

    pub fn config(&self) -> Result<Config> {
        let text = self.text("{type: none}", false);
        config::parse("scale.yaml", &text).map(|loaded| loaded.config).map_err(|wrong| anyhow!("{wrong}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_makes_a_valid_configuration_of_its_size() {
        for shape in [Shape { services: 1, backends: 700 }, Shape { services: 30, backends: 10 }] {
            let config = shape.config().unwrap();
            assert_eq!(config.services.len() as u32, shape.services);
            assert!(config.pools.iter().all(|pool| pool.backends.len() as u32 == shape.backends));
            let swapped = shape.text("{type: none}", true);
            let plain = shape.text("{type: none}", false);
            let differing = plain.lines().zip(swapped.lines()).filter(|(one, other)| one != other);
            assert_eq!(differing.count(), 1);
        }
        assert_eq!("100x10".parse::<Shape>().unwrap(), Shape { services: 100, backends: 10 });
        for wrong in ["3000x10", "x", "1x1", "0x10", "2000x6", "2000x2147484"] {
            assert!(wrong.parse::<Shape>().is_err(), "{wrong}");
        }
    }
}
