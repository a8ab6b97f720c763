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

/// Defines an outcome enum with its number, action, counter name and one-line meaning.
macro_rules! outcomes {
    ($(#[$doc:meta])* $name:ident { $($number:literal $variant:ident $action:ident $counter:literal $meaning:literal;)* }) => {
        $(#[$doc])*
        #[repr(u32)]
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum $name { $(#[doc = $meaning] $variant = $number,)* }

        impl $name {
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            #[inline(always)]
            pub const fn action(self) -> Action {
                match self { $(Self::$variant => Action::$action,)* }
            }

            /// The name in metrics, in `xlb status` and in logs.
            pub const fn counter(self) -> &'static str {
                match self { $(Self::$variant => $counter,)* }
            }

            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$variant => $meaning,)* }
            }
        }
    };
}

outcomes! {
    /// What became of a frame on the balancer.
    Outcome {
        0 PassNotIp Pass "pass_not_ip" "neither IPv4 nor IPv6 (ARP, VLAN-tagged, LLDP, ...)";
        1 PassNotVip Pass "pass_not_vip" "the destination is no VIP";
        2 PassTruncated Pass "pass_truncated" "the frame ends before its destination address does";
        3 PassMalformed Pass "pass_malformed" "IP version or header length contradict the EtherType";
        4 PassFamilyOff Pass "pass_family_off" "an address family in which no service is configured";
        5 ForwardTransmit Transmit "forward_transmit" "sent to a backend through the interface it came from";
        6 ForwardRedirect Redirect "forward_redirect" "sent to a backend through another interface";
        7 AnswerArp Transmit "answer_arp" "an ARP request for a VIP, answered (vip_arp)";
        8 AnswerNeighbour Transmit "answer_neighbour" "a neighbour solicitation for a VIP, answered (vip_arp)";
        9 DropVipPort Drop "drop_vip_port" "a VIP, but a port that no service has";
        10 DropVipProtocol Drop "drop_vip_protocol" "a VIP, but neither TCP nor UDP";
        11 DropVipFragment Drop "drop_vip_fragment" "a fragment to a VIP: only the first has ports";
        12 DropVipTruncated Drop "drop_vip_truncated" "to a VIP, but shorter than its headers say";
        13 DropNoBackend Drop "drop_no_backend" "no backend of the pool is up (on_empty: drop)";
        14 PassNoBackend Pass "pass_no_backend" "no backend of the pool is up (on_empty: pass)";
        15 DropUnresolved Drop "drop_unresolved" "the backend has no next hop yet";
        16 DropOversize Drop "drop_oversize" "longer than the path to the backend takes, tunnel header included";
        17 DropSuperFrame Drop "drop_super_frame" "longer than the MTU of the interface it came in on: merged by GRO or TSO before XDP saw it";
        18 DropHeadroom Drop "drop_headroom" "no room in front of the frame for a tunnel header";
        19 DropInconsistent Drop "drop_inconsistent" "the kernel's tables contradict each other";
    }
}

outcomes! {
    /// What became of a frame on a backend with `xlb decap`.
    DecapOutcome {
        0 PassNotTunnel Pass "pass_not_tunnel" "not an IP-in-IP packet";
        1 Decapsulated Pass "decapsulated" "the tunnel header is off, the packet is with the stack";
        2 DropSource Drop "drop_source" "a tunnel packet from an address that is not in --from";
        3 DropNotVip Drop "drop_not_vip" "a tunnel packet whose inner destination is not a --vip";
        4 DropTruncated Drop "drop_truncated" "a tunnel packet that is shorter than its headers say";
        5 DropFragment Drop "drop_fragment" "a fragment of a tunnel packet";
        6 DropHead Drop "drop_head" "the kernel could not move the head of the frame";
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
