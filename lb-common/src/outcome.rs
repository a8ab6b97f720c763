//! Every verdict and every drop reason, in one table per program.
//!
//! Numbers are append-only: they index the counters in the kernel, which outlive the agent.

/// What happens to the frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// To the host's own stack.
    Pass,
    Drop,
    /// Out of the interface it came in on.
    Transmit,
    /// Out of another interface.
    Redirect,
}

impl Action {
    pub const fn name(self) -> &'static str {
        match self {
            Action::Pass => "pass",
            Action::Drop => "drop",
            Action::Transmit => "transmit",
            Action::Redirect => "redirect",
        }
    }
}

/// Defines an outcome enum with its number, action, counter name, one-line meaning, and what an operator
/// does about it (nothing, where it is empty).
macro_rules! outcomes {
    ($(#[$doc:meta])* $name:ident {
        $($number:literal $variant:ident $action:ident $counter:literal $meaning:literal $advice:literal;)*
    }) => {
        $(#[$doc])*
        #[repr(u32)]
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum $name { $(#[doc = $meaning] $variant = $number,)* }

        impl $name {
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Those with this action, a bit each.
            const fn with(action: Action) -> u64 {
                let mut bits = 0;
                $(if action as u32 == Action::$action as u32 { bits |= 1 << $number; })*
                bits
            }

            /// By bits: ranges of numbers would be a comparison each.
            #[inline(always)]
            pub const fn action(self) -> Action {
                const { assert!(Self::ALL.len() <= 64) };
                let bit = 1u64 << self as u32;
                if const { Self::with(Action::Transmit) } & bit != 0 {
                    Action::Transmit
                } else if const { Self::with(Action::Pass) } & bit != 0 {
                    Action::Pass
                } else if const { Self::with(Action::Drop) } & bit != 0 {
                    Action::Drop
                } else {
                    Action::Redirect
                }
            }

            /// The name in metrics, in `xlb status` and in logs.
            pub const fn counter(self) -> &'static str {
                match self { $(Self::$variant => $counter,)* }
            }

            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$variant => $meaning,)* }
            }

            /// What an operator does about many of them; empty where nothing is wrong.
            pub const fn advice(self) -> &'static str {
                match self { $(Self::$variant => $advice,)* }
            }
        }
    };
}

outcomes! {
    /// What became of a frame on the balancer.
    Outcome {
        0 PassNotIp Pass "pass_not_ip" "neither IPv4 nor IPv6 (ARP, LLDP, ...)"
            "";
        1 PassNotVip Pass "pass_not_vip" "the destination is no VIP"
            "";
        2 PassTruncated Pass "pass_truncated" "the frame ends before its destination address does"
            "";
        3 PassMalformed Pass "pass_malformed" "IP version or header length contradict the EtherType"
            "";
        4 PassFamilyOff Pass "pass_family_off" "an address family in which no service is configured"
            "";
        5 ForwardTransmit Transmit "forward_transmit" "sent to a backend through the interface it came from"
            "";
        6 ForwardRedirect Redirect "forward_redirect" "sent to a backend through another interface"
            "";
        7 AnswerArp Transmit "answer_arp" "an ARP request for a VIP, answered (`vip_arp`)"
            "";
        8 AnswerNeighbour Transmit "answer_neighbour" "a neighbour solicitation for a VIP, answered (`vip_arp`)"
            "";
        9 DropVipPort Drop "drop_vip_port" "a VIP, but a port that no service has (`unmapped: drop`)"
            "Scanners cause some. If clients should reach the port, add it to a service.";
        10 DropVipProtocol Drop "drop_vip_protocol" "a VIP, but neither TCP, UDP nor ICMP"
            "Such a protocol cannot be balanced; `unmapped: pass` gives it to the host.";
        11 DropVipFragment Drop "drop_vip_fragment" "a fragment to a VIP: only the first has ports"
            "Have the sender send less (DNS over UDP: 1232 bytes of EDNS), or hash by source (`scheduler: source-hash` with `fragments: balance`).";
        12 DropVipTruncated Drop "drop_vip_truncated" "to a VIP, but shorter than its headers say"
            "Somebody sends garbage, or a device on the way cuts frames: look at `xlb lookup --pcap`.";
        13 DropNoBackend Drop "drop_no_backend" "no backend of the pool is up (`on_empty: drop`)"
            "`xlb status` says why backends are down.";
        14 PassNoBackend Pass "pass_no_backend" "no backend of the pool is up (`on_empty: pass`)"
            "`xlb status` says why backends are down.";
        15 DropUnresolved Drop "drop_unresolved" "the backend has no next hop yet"
            "`xlb status` shows the backend and the reason.";
        16 DropOversize Drop "drop_oversize" "longer than the path to the backend takes, and no answer is allowed (an ICMP error, a later fragment, sent to many, or a path below 1280 bytes for IPv6)"
            "Raise the MTU on the way to the backends.";
        17 DropSuperFrame Drop "drop_super_frame" "longer than the MTU of the interface it came in on: merged by GRO or TSO before XDP saw it"
            "Turn GRO and LRO off on the interface; behind a veth, TSO and GSO at the other end.";
        18 DropHeadroom Drop "drop_headroom" "no room in front of the frame for a header"
            "The driver leaves too little headroom: use `mode: generic` on this interface.";
        19 DropInconsistent Drop "drop_inconsistent" "the kernel's tables contradict each other"
            "`xlb verify` says where; restart the agent, and report it.";
        20 ForwardErrorTransmit Transmit "forward_error_transmit" "an ICMP error about a flow, sent to the flow's backend through the interface it came from"
            "";
        21 ForwardErrorRedirect Redirect "forward_error_redirect" "an ICMP error about a flow, sent to the flow's backend through another interface"
            "";
        22 ForwardFragmentTransmit Transmit "forward_fragment_transmit" "a fragment, balanced by its source, through the interface it came from (`fragments: balance`)"
            "";
        23 ForwardFragmentRedirect Redirect "forward_fragment_redirect" "a fragment, balanced by its source, through another interface (`fragments: balance`)"
            "";
        24 AnswerEcho Transmit "answer_echo" "an echo request to a VIP, answered (`icmp.echo`)"
            "";
        25 AnswerTooBig Transmit "answer_too_big" "longer than the path to the backend takes: the sender was told how long it may be"
            "A few for each client are path MTU discovery at work. To have none, raise the MTU on the way to the backends, or lower the MSS there (`ip route ... advmss`).";
        26 AnswerUnreachable Transmit "answer_unreachable" "a port that no service has: the sender was told so (`unmapped: reject`)"
            "";
        27 PassVipUnmapped Pass "pass_vip_unmapped" "a VIP, but no service takes it (`unmapped: pass`)"
            "";
        28 PassVlan Pass "pass_vlan" "a VLAN tag (and `vlan` is off), or more than two"
            "If VIPs are reached through VLANs, set `vlan: true`.";
        29 DropVipHeaders Drop "drop_vip_headers" "to a VIP, with more than 6 IPv6 extension headers or a routing header that is not at its end"
            "";
        30 DropVipTunnel Drop "drop_vip_tunnel" "a tunnel packet whose outer destination is a VIP"
            "A backend's address is a VIP of this balancer, or another balancer sends its tunnels here.";
        31 DropLand Drop "drop_land" "source and destination are the same VIP"
            "Forged: filter VIPs as sources at the edge (BCP 38).";
        32 DropMartian Drop "drop_martian" "to a VIP from an address that no packet from afar has (loopback, multicast, link-local, ...)"
            "Forged, or a host without an address: filter such sources at the edge.";
        33 DropSourceVip Drop "drop_source_vip" "to a VIP from a VIP"
            "Forged, or a backend that binds to its VIP when it connects to another: let it use its own address.";
        34 DropTtl Drop "drop_ttl" "to a VIP with a TTL or hop limit of 0"
            "";
        35 DropIcmpType Drop "drop_icmp_type" "an ICMP message to a VIP that is neither an error nor an echo request without IP options to this host alone (or `icmp.echo` is off)"
            "";
        36 DropIcmpForged Drop "drop_icmp_forged" "an ICMP error to a VIP about a packet that the VIP did not send"
            "Forged, or a NAT on the way that does not translate what ICMP errors carry.";
        37 DropIcmpStranger Drop "drop_icmp_stranger" "an ICMP error to a VIP about a flow of no service, or (`nat`, `fullnat`) of a connection that is not known"
            "";
        38 DropIcmpLimit Drop "drop_icmp_limit" "an ICMP error about a flow, above `icmp.rate`"
            "Raise `icmp.rate` if path MTU discovery of many clients needs it.";
        39 DropEchoLimit Drop "drop_echo_limit" "an echo request to a VIP, above `icmp.rate`"
            "Somebody floods; raise `icmp.rate` if your own monitoring does.";
        40 DropOversizeLimit Drop "drop_oversize_limit" "longer than the path to the backend takes, above `icmp.rate`: the sender was not told"
            "As for `answer_too_big`, or raise `icmp.rate`.";
        41 DropVipPortLimit Drop "drop_vip_port_limit" "a port that no service has (`unmapped: reject`), above `icmp.rate`: the sender was not told"
            "";
        42 DropUnpinned Drop "drop_unpinned" "its slot was being closed, and there was no room for a pin (lasts milliseconds; TCP sends again)"
            "Many: the pins are full. Raise `limits.pins`.";
        43 ForwardQuicTransmit Transmit "forward_quic_transmit" "a QUIC packet, sent to the backend that its connection ID names through the interface it came from (`quic`)"
            "";
        44 ForwardQuicRedirect Redirect "forward_quic_redirect" "a QUIC packet, sent to the backend that its connection ID names through another interface (`quic`)"
            "";
        45 ForwardQuicStrayTransmit Transmit "forward_quic_stray_transmit" "a QUIC packet of an established connection whose connection ID names no backend that is up, balanced by its addresses, through the interface it came from (`quic`)"
            "If there are many, the servers do not put their `server_id` and the service's `config_id` into connection IDs, or backends have died.";
        46 ForwardQuicStrayRedirect Redirect "forward_quic_stray_redirect" "a QUIC packet of an established connection whose connection ID names no backend that is up, balanced by its addresses, through another interface (`quic`)"
            "As for `forward_quic_stray_transmit`.";
        47 ForwardReplyTransmit Transmit "forward_reply_transmit" "a backend's packet to a client, translated back, through the interface it came from (`nat`, `fullnat`)"
            "";
        48 ForwardReplyRedirect Redirect "forward_reply_redirect" "a backend's packet to a client, translated back, through another interface (`nat`, `fullnat`)"
            "";
        49 DropConnectionsFull Drop "drop_connections_full" "a new connection for which there is no place (`nat`), or no source port (`fullnat`)"
            "Raise `limits.connections`, or give `fullnat` more `sources`; `xlb conn list` shows who holds them.";
        50 DropNoConnection Drop "drop_no_connection" "in the middle of a TCP connection that is not known (`fullnat`)"
            "Its state is lost: it was silent for longer than its timeout, its backend failed or was disabled, it was flushed (`xlb conn flush`), or it began on another balancer.";
        51 DropNoChecksum Drop "drop_no_checksum" "a UDP packet of IPv4 without a checksum that would become one of IPv6 (RFC 7915, section 4.5)"
            "Let the sender compute checksums, or give the pool a backend of its clients' family.";
        52 DropUntranslatable Drop "drop_untranslatable" "a packet that cannot change its address family: IPv4 options, IPv6 extension headers, or an ICMP message without a counterpart"
            "";
        53 DropReplyClash Drop "drop_reply_clash" "a new connection of a client's port that is connected to the same backend and port through another VIP: replies could not be told apart (`nat`)"
            "The client tries another port; if it keeps to one (DNS, NTP), give one of the services another pool, or use `fullnat`.";
        54 ForwardReplyErrorTransmit Transmit "forward_reply_error_transmit" "an ICMP error about a packet to a backend, translated for the client, through the interface it came from (`nat`, `fullnat`)"
            "";
        55 ForwardReplyErrorRedirect Redirect "forward_reply_error_redirect" "an ICMP error about a packet to a backend, translated for the client, through another interface (`nat`, `fullnat`)"
            "";
    }
}

impl Outcome {
    /// What is there; this outcome where nothing is.
    #[inline(always)]
    pub fn unless<T>(self, found: Option<T>) -> Result<T, Self> {
        match found {
            Some(found) => Ok(found),
            None => Err(self.apart()),
        }
    }

    /// The outcome, but not before it is decided. Else the compiler (LLVM 22) has every packet put aside the number of the
    /// outcome that it would have, ahead of each check: two instructions for each, 2 ns of a packet in all.
    #[inline(always)]
    pub fn apart(self) -> Self {
        core::hint::cold_path();
        #[cfg(target_arch = "bpf")]
        {
            let mut number = self as u32;
            // SAFETY: what goes in comes out.
            unsafe { core::arch::asm!("{0} = {0}", inout(reg) number, options(nomem, nostack)) };
            // SAFETY: the number of an outcome.
            unsafe { core::mem::transmute::<u32, Self>(number) }
        }
        #[cfg(not(target_arch = "bpf"))]
        self
    }

    /// Whether the sender gets an ICMP message back.
    #[inline(always)]
    pub const fn is_answer(self) -> bool {
        matches!(self, Self::AnswerEcho | Self::AnswerTooBig | Self::AnswerUnreachable)
    }
}

outcomes! {
    /// What became of a frame on a backend with `xlb decap`.
    DecapOutcome {
        0 PassNotTunnel Pass "pass_not_tunnel" "neither IP-in-IP nor GUE to `--gue-port`"
            "";
        1 Decapsulated Pass "decapsulated" "the tunnel header is off, the packet is with the stack"
            "";
        2 DropSource Drop "drop_source" "a tunnel packet from an address that is not in `--from`"
            "Name the balancer's address or its `outer_source` in `--from`.";
        3 DropNotVip Drop "drop_not_vip" "a tunnel packet whose inner destination is not a `--vip`"
            "Name the VIP in `--vip`.";
        4 DropTruncated Drop "drop_truncated" "a tunnel packet that is shorter than its headers say"
            "";
        5 DropFragment Drop "drop_fragment" "a fragment of a tunnel packet"
            "Balancers send none: something on the way fragments in spite of DF.";
        6 DropHead Drop "drop_head" "the kernel could not move the head of the frame"
            "";
        7 DropVariant Drop "drop_variant" "a GUE packet of a variant other than 1"
            "Balancers send variant 1: another sender uses this port.";
        8 DropCongestion Drop "drop_congestion" "a router marked congestion on the outer header, but the sender inside does not know ECN (RFC 6040)"
            "A way between balancer and backend is congested.";
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn numbers_are_dense_and_names_are_unique() {
        for (index, outcome) in Outcome::ALL.iter().enumerate() {
            assert_eq!(*outcome as usize, index);
        }
        let names: HashSet<_> = Outcome::ALL.iter().map(|o| o.counter()).collect();
        assert_eq!(names.len(), Outcome::ALL.len());
    }

    #[test]
    fn a_counter_is_named_after_its_action() {
        for outcome in Outcome::ALL {
            let prefix = outcome.counter().split('_').next().unwrap();
            let expected: &[_] = match outcome.action() {
                Action::Pass => &["pass"],
                Action::Drop => &["drop"],
                Action::Transmit => &["forward", "answer"],
                Action::Redirect => &["forward"],
            };
            assert!(expected.contains(&prefix), "{}", outcome.counter());
        }
    }
}
