//! The network of `bench pps`: a sender whose veths lead to a host with xlb and to one without. It measures nothing.

use std::net::Ipv4Addr;

use ::tests::balancer::Balancer;
use ::tests::lab::{Host, Lab};
use anyhow::{Context, Result, anyhow};
use etherparse::PacketBuilder;
use lb_userspace::bpf::{AttachedEnd, End, FRAME_BYTES, Flow, Packets};

/// A packet, where it goes, and what has to become of it.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub name: &'static str,
    pub to: To,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    /// The host without xlb.
    Bare(End),
    Xlb {
        address: Ipv4Addr,
        port: u16,
        /// Of every packet.
        outcome: &'static str,
        /// What does as much without xlb.
        beside: Option<End>,
    },
}

impl To {
    /// The program without xlb that its cost is compared with.
    pub fn beside(self) -> Option<End> {
        match self {
            Self::Bare(_) => None,
            Self::Xlb { beside, .. } => beside,
        }
    }
}

const fn vip(number: u8) -> Ipv4Addr {
    // For benchmarks (RFC 2544).
    Ipv4Addr::new(198, 18, 0, number)
}

const fn forwards(number: u8) -> To {
    To::Xlb { address: vip(number), port: 80, outcome: "forward_transmit", beside: Some(End::Return) }
}

pub const CASES: [Case; 7] = [
    Case { name: "dropped by an empty program", to: To::Bare(End::Sink) },
    Case { name: "sent back by an empty program", to: To::Bare(End::Return) },
    Case {
        name: "xlb, port without service",
        to: To::Xlb { address: vip(1), port: 81, outcome: "drop_vip_port", beside: Some(End::Sink) },
    },
    Case { name: "xlb, l2", to: forwards(1) },
    Case { name: "xlb, ipip", to: forwards(2) },
    Case { name: "xlb, nat", to: forwards(3) },
    Case {
        name: "xlb, not a VIP, to the stack",
        to: To::Xlb {
            address: Ipv4Addr::new(198, 19, 0, 1),
            port: 80,
            outcome: "pass_not_vip",
            beside: None,
        },
    },
];

/// Clients, one flow each.
pub const FLOWS: u32 = 100_000;
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 0);
const SENDER_MAC: &str = "02:00:00:00:fe:01";
const RECEIVER_MAC: &str = "02:00:00:00:fe:02";

/// A veth whose ends have a queue for each core.
pub struct Wire {
    pub sender: Host,
    pub port: String,
    pub receiver: Host,
    _sink: AttachedEnd,
}

pub struct Scene {
    pub balancer: Balancer,
    pub to_xlb: Wire,
    pub to_bare: Wire,
    /// Last, so that it is removed after everything else.
    _lab: Lab,
}

impl Scene {
    pub fn set(cores: u32) -> Result<Self> {
        let lab = Lab::new("pps")?;
        let sender = lab.host_on("sender", &[])?;
        let host = lab.host_on("balancer", &[])?;
        let to_xlb = Wire::between(&sender, "port0", &host, cores)?;
        host.add_address("10.111.0.3/24", "eth0")?;
        // Nobody answers for backends.
        for number in 11..=13 {
            host.ip(&format!("neigh replace 10.111.0.{number} lladdr {SENDER_MAC} dev eth0 nud permanent"))?;
        }
        let to_bare = Wire::between(&sender, "port1", &lab.host_on("bare", &[])?, cores)?;
        let balancer = Balancer::start(&host, &lab.dir().join("xlb"), CONFIGURATION)?;
        balancer.wait_for_backends(9, std::time::Duration::from_secs(20))?;
        Ok(Self { balancer, to_xlb, to_bare, _lab: lab })
    }

    pub fn wire(&self, case: &Case) -> &Wire {
        match case.to {
            To::Bare(_) => &self.to_bare,
            To::Xlb { .. } => &self.to_xlb,
        }
    }
}

const CONFIGURATION: &str = "\
interfaces: [eth0]
seed: 5f1d0c3a9be24771
outer_source: 10.255.0.0/24
defaults: {health: {type: none}}
pools:
  l2: {forward: l2, backends: [10.111.0.11, 10.111.0.12, 10.111.0.13]}
  ipip: {forward: ipip, backends: [10.111.0.11, 10.111.0.12, 10.111.0.13]}
  nat: {forward: nat, backends: [10.111.0.11, 10.111.0.12, 10.111.0.13]}
services:
  - {name: l2, vip: 198.18.0.1, ports: 80, protocol: udp, pool: l2}
  - {name: ipip, vip: 198.18.0.2, ports: 80, protocol: udp, pool: ipip}
  - {name: nat, vip: 198.18.0.3, ports: 80, protocol: udp, pool: nat}
";

impl Wire {
    fn between(sender: &Host, port: &str, receiver: &Host, cores: u32) -> Result<Self> {
        let queues = format!("numrxqueues {cores} numtxqueues {cores}");
        sender.ip(&format!(
            "link add {port} address {SENDER_MAC} mtu 1600 {queues} type veth \
             peer name eth0 netns {} address {RECEIVER_MAC} mtu 1600 {queues}",
            receiver.namespace()
        ))?;
        sender.set_link(port, true)?;
        receiver.set_link("eth0", true)?;
        let index = ifindex(sender, port)?;
        // What sends live frames has to be able to receive.
        let sink = sender.inside(|| End::Sink.attach(index))??;
        Ok(Self { sender: sender.clone(), port: port.to_owned(), receiver: receiver.clone(), _sink: sink })
    }

    pub fn ifindex(&self) -> Result<u32> {
        ifindex(&self.sender, &self.port)
    }

    pub fn attach(&self, end: End) -> Result<AttachedEnd> {
        let index = ifindex(&self.receiver, "eth0")?;
        self.receiver.inside(|| end.attach(index))?
    }

    /// Frames that the sender's end has taken back, and those it could not hand over.
    pub fn sender_counts(&self) -> Result<(u64, u64)> {
        let told = self.sender.run(["ethtool", "-S", &self.port])?;
        Ok((sum(&told, "rx_queue_", "_xdp_packets"), sum(&told, "tx_queue_", "_xdp_xmit_errors")))
    }

    /// Frames that have arrived at the receiver's end.
    pub fn received(&self) -> Result<u64> {
        Ok(sum(&self.receiver.run(["ethtool", "-S", "eth0"])?, "rx_queue_", "_xdp_packets"))
    }
}

fn ifindex(host: &Host, interface: &str) -> Result<u32> {
    let shown = host.ip(&format!("-o link show {interface}"))?;
    let index = shown.split(':').next().and_then(|index| index.trim().parse().ok());
    index.with_context(|| format!("{interface} has no index: {shown}"))
}

/// Of what `ethtool -S` tells, over all queues.
fn sum(told: &str, begin: &str, end: &str) -> u64 {
    let of_line = |line: &str| {
        let (name, value) = line.trim().split_once(": ")?;
        let matches = name.starts_with(begin) && name.ends_with(end);
        matches.then(|| value.trim().parse::<u64>().ok())?
    };
    told.lines().filter_map(of_line).sum()
}

/// Frames of the generator's length, of many clients.
pub fn packets(case: &Case) -> Result<(Packets, Vec<Flow>)> {
    let (address, port) = match case.to {
        To::Bare(_) => (vip(1), 80),
        To::Xlb { address, port, .. } => (address, port),
    };
    let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0xfe, 1], [2, 0, 0, 0, 0xfe, 2])
        .ipv4(CLIENT.octets(), address.octets(), 64)
        .udp(40000, port);
    let payload = vec![0; FRAME_BYTES - builder.size(0)];
    let mut bytes = Vec::new();
    builder.write(&mut bytes, &payload)?;
    let frame = bytes.try_into().map_err(|_| anyhow!("the frame has another length"))?;
    let mut dice = fastrand::Rng::with_seed(0x786c_6221);
    let flows =
        (0..lb_common::abi::BENCH_PACKETS).map(|_| Flow { number: dice.u32(0..FLOWS), destination: 0 });
    let packets = Packets { frame, source_offset: 26, destination_offset: 26, growth: 0 };
    Ok((packets, flows.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_added_up_over_queues() {
        let told = "NIC statistics:\n     peer_ifindex: 5\n     rx_queue_0_xdp_packets: 7\n     \
                    rx_queue_0_xdp_bytes: 99\n     rx_queue_1_xdp_packets: 5\n";
        assert_eq!(sum(told, "rx_queue_", "_xdp_packets"), 12);
        assert_eq!(sum(told, "tx_queue_", "_xdp_xmit_errors"), 0);
    }

    #[test]
    fn frames_of_every_case_have_the_generators_length() {
        for case in CASES {
            let (packets, flows) = packets(&case).unwrap();
            assert!(flows.iter().all(|flow| flow.number < FLOWS), "{}", case.name);
            let sliced = etherparse::SlicedPacket::from_ethernet(&packets.frame).unwrap();
            assert!(matches!(sliced.transport, Some(etherparse::TransportSlice::Udp(_))), "{}", case.name);
        }
    }
}
