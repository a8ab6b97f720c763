use super::*;
use crate::nexthop::netns::{FAR_MAC, Lab, NEAR_MAC, in_lab};

const SHORT: Duration = Duration::from_millis(150);

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn near0() -> String {
    "near0".to_owned()
}

fn on_link(source: &str) -> NextHop {
    NextHop {
        ifindex: 0,
        interface: near0(),
        source_mac: NEAR_MAC,
        mac: FAR_MAC,
        mtu: 1500,
        preferred_source: Some(ip(source)),
        gateway: None,
        kind: Some("veth".to_owned()),
        redirect_target: false,
    }
}

/// Compares all but the interface's index, which differs from run to run but is looked up here.
async fn assert_hop(resolver: &Resolver, address: &str, expected: NextHop) {
    let ifindex = resolver.link(&expected.interface).await.unwrap().ifindex;
    let expected = NextHop { ifindex, ..expected };
    assert_eq!(resolver.resolve(ip(address)).await, Ok(expected), "{address}");
}

async fn reason(resolver: &Resolver, address: &str) -> Unresolved {
    let result = resolver.resolve_within(ip(address), SHORT).await;
    result.expect_err(address)
}

#[test]
fn an_on_link_address_resolves_to_its_own_mac_in_both_families() {
    in_lab(async |_| {
        let resolver = Resolver::new().unwrap();
        assert_hop(&resolver, "10.77.0.2", on_link("10.77.0.1")).await;
        assert_hop(&resolver, "fd77::2", on_link("fd77::1")).await;
    });
}

#[test]
fn an_address_behind_a_gateway_resolves_to_the_gateways_mac() {
    in_lab(async |lab: &Lab| {
        lab.near_ip("route add 10.88.0.0/16 via 10.77.0.2");
        lab.near_ip("route add fd88::/32 via fd77::2");
        let resolver = Resolver::new().unwrap();
        let via = |source, gateway| NextHop { gateway: Some(ip(gateway)), ..on_link(source) };
        assert_hop(&resolver, "10.88.1.1", via("10.77.0.1", "10.77.0.2")).await;
        assert_hop(&resolver, "fd88::1", via("fd77::1", "fd77::2")).await;
    });
}

#[test]
fn an_ipv4_route_may_have_an_ipv6_gateway() {
    in_lab(async |lab: &Lab| {
        lab.near_ip("route add 10.99.0.0/16 via inet6 fd77::2 dev near0");
        let resolver = Resolver::new().unwrap();
        let expected = NextHop { gateway: Some(ip("fd77::2")), ..on_link("10.77.0.1") };
        assert_hop(&resolver, "10.99.1.1", expected).await;
    });
}

#[test]
fn a_multipath_route_resolves_to_one_of_its_legs() {
    in_lab(async |lab: &Lab| {
        lab.far_ip("address add 10.77.0.3/24 dev far0");
        lab.near_ip("route add 10.88.0.0/16 nexthop via 10.77.0.2 nexthop via 10.77.0.3");
        let resolver = Resolver::new().unwrap();
        let hop = resolver.resolve(ip("10.88.1.1")).await.unwrap();
        let gateway = hop.gateway.unwrap().to_string();
        assert!(["10.77.0.2", "10.77.0.3"].contains(&gateway.as_str()), "{gateway}");
        assert_eq!(hop.mac, FAR_MAC);
    });
}

#[test]
fn the_routes_source_is_the_preferred_one() {
    in_lab(async |lab: &Lab| {
        lab.near_ip("address add 10.1.2.3/32 dev lo");
        lab.near_ip("route add 10.88.0.0/16 via 10.77.0.2 src 10.1.2.3");
        let resolver = Resolver::new().unwrap();
        let expected = NextHop { gateway: Some(ip("10.77.0.2")), ..on_link("10.1.2.3") };
        assert_hop(&resolver, "10.88.1.1", expected).await;
    });
}

#[test]
fn the_mtu_is_the_least_of_interface_and_route() {
    in_lab(async |lab: &Lab| {
        lab.near_ip("route add 10.88.0.0/16 via 10.77.0.2 mtu 1400");
        lab.near_ip("route add 10.89.0.0/16 via 10.77.0.2 mtu 9000");
        lab.near_ip("route add fd88::/32 via fd77::2 mtu 1300");
        let resolver = Resolver::new().unwrap();
        let mtu = async |address| resolver.resolve(ip(address)).await.unwrap().mtu;
        assert_eq!(mtu("10.88.1.1").await, 1400);
        assert_eq!(mtu("10.89.1.1").await, 1500);
        assert_eq!(mtu("fd88::1").await, 1300);
        lab.near_ip("link set near0 mtu 1350");
        assert_eq!(mtu("10.88.1.1").await, 1350);
        assert_eq!(mtu("fd77::2").await, 1350);
    });
}

#[test]
fn routes_that_send_nothing_say_why() {
    in_lab(async |lab: &Lab| {
        for kind in ["unreachable", "blackhole", "prohibit", "throw"] {
            let octet = kind.len();
            lab.near_ip(&format!("route add {kind} 10.{octet}.0.0/16"));
            lab.near_ip(&format!("route add {kind} fd{octet:02}::/32"));
        }
        let resolver = Resolver::new().unwrap();
        let rows = [
            ("192.0.2.1", Unresolved::NoRoute),
            ("2001:db8::1", Unresolved::NoRoute),
            ("10.11.0.1", Unresolved::Unreachable),
            ("fd11::1", Unresolved::Unreachable),
            ("10.9.0.1", Unresolved::Blackhole),
            ("fd09::1", Unresolved::Blackhole),
            ("10.8.0.1", Unresolved::Prohibit),
            ("fd08::1", Unresolved::Prohibit),
            ("10.5.0.1", Unresolved::NoRoute),
            ("fd05::1", Unresolved::NoRoute),
            ("10.77.0.1", Unresolved::Local),
            ("127.0.0.1", Unresolved::Local),
            ("fd77::1", Unresolved::Local),
            ("::1", Unresolved::Local),
            ("10.77.0.255", Unresolved::NotUnicast("broadcast")),
            ("224.0.0.1", Unresolved::NotUnicast("multicast")),
        ];
        for (address, expected) in rows {
            if address == "224.0.0.1" {
                lab.near_ip("route add 224.0.0.0/4 dev near0");
            }
            assert_eq!(reason(&resolver, address).await, expected, "{address}");
        }
    });
}

#[test]
fn an_interface_that_is_not_ethernet_has_no_mac() {
    in_lab(async |lab: &Lab| {
        lab.near_ip("route add 10.66.0.0/16 dev lo");
        let resolver = Resolver::new().unwrap();
        let interface = "lo".to_owned();
        assert_eq!(reason(&resolver, "10.66.0.1").await, Unresolved::NoMac { interface });
        assert_eq!(resolver.link("lo").await.unwrap().mac, None);
    });
}

#[test]
fn a_neighbour_that_does_not_answer_is_missing_and_later_failed() {
    in_lab(async |lab: &Lab| {
        let resolver = Resolver::new().unwrap();
        for (address, family) in [("10.77.0.99", "ipv4"), ("fd77::99", "ipv6")] {
            let (neighbour, interface) = (ip(address), near0());
            let start = Instant::now();
            assert_eq!(
                reason(&resolver, address).await,
                Unresolved::NeighbourMissing { neighbour, interface: interface.clone() }
            );
            assert!(start.elapsed() >= SHORT);
            // From here on the kernel gives up soon.
            lab.near_sysctl(&format!("{family}/neigh/near0/mcast_solicit"), "1");
            lab.near_sysctl(&format!("{family}/neigh/near0/retrans_time_ms"), "20");
            lab.near_ip(&format!("neigh flush to {address}"));
            let wait = Duration::from_secs(5);
            assert_eq!(
                resolver.resolve_within(neighbour, wait).await,
                Err(Unresolved::NeighbourFailed { neighbour, interface })
            );
        }
    });
}

#[test]
fn a_failed_neighbour_that_comes_back_is_asked_again() {
    in_lab(async |lab: &Lab| {
        lab.near_sysctl("ipv4/neigh/near0/mcast_solicit", "1");
        lab.near_sysctl("ipv4/neigh/near0/retrans_time_ms", "20");
        let resolver = Resolver::new().unwrap();
        let wait = Duration::from_secs(5);
        let first = resolver.resolve_within(ip("10.77.0.5"), wait).await;
        assert!(matches!(first, Err(Unresolved::NeighbourFailed { .. })), "{first:?}");
        lab.far_ip("address add 10.77.0.5/24 dev far0");
        assert_hop(&resolver, "10.77.0.5", on_link("10.77.0.1")).await;
    });
}

#[test]
fn a_permanent_neighbour_is_used_and_stays_permanent() {
    in_lab(async |lab: &Lab| {
        lab.near_ip("neigh add 10.77.0.50 lladdr 02:00:00:00:00:50 dev near0 nud permanent");
        let resolver = Resolver::new().unwrap();
        let hop = resolver.resolve(ip("10.77.0.50")).await.unwrap();
        assert_eq!(hop.mac, [2, 0, 0, 0, 0, 0x50]);
        assert!(lab.near_shows("neigh show 10.77.0.50").contains("PERMANENT"));
    });
}

#[test]
fn a_stale_neighbour_is_used_at_once_and_confirmed_behind_the_scenes() {
    in_lab(async |lab: &Lab| {
        lab.near_ip("neigh add 10.77.0.50 lladdr 02:00:00:00:00:50 dev near0 nud stale");
        let resolver = Resolver::new().unwrap();
        let hop = resolver.resolve(ip("10.77.0.50")).await.unwrap();
        assert_eq!(hop.mac, [2, 0, 0, 0, 0, 0x50]);
        let shown = lab.near_shows("neigh show 10.77.0.50");
        assert!(!shown.contains("STALE"), "{shown}");
    });
}

#[test]
fn a_link_without_carrier_or_set_down_is_named() {
    in_lab(async |lab: &Lab| {
        let resolver = Resolver::new().unwrap();
        lab.near_ip("route add 10.88.0.0/16 via 10.77.0.2");
        lab.far_ip("link set far0 down");
        let down = Unresolved::InterfaceDown { interface: near0(), admin_up: true };
        for address in ["10.77.0.2", "10.88.1.1"] {
            assert_eq!(reason(&resolver, address).await, down, "{address}");
        }
        let link = resolver.link("near0").await.unwrap();
        assert!(link.admin_up && !link.up);
        // The kernel removes the routes of an interface that is set down.
        lab.near_ip("link set near0 down");
        assert_eq!(reason(&resolver, "10.77.0.2").await, Unresolved::NoRoute);
        let link = resolver.link("near0").await.unwrap();
        assert!(!link.admin_up && !link.up);
    });
}

#[test]
fn links_tell_name_mac_mtu_and_kind() {
    in_lab(async |lab: &Lab| {
        lab.near_ip("link add br0 address 02:00:00:00:00:0b mtu 1600 type bridge");
        let resolver = Resolver::new().unwrap();
        let veth = resolver.link("near0").await.unwrap();
        assert_eq!(veth.mac, Some(NEAR_MAC));
        assert_eq!((veth.mtu, veth.up, veth.kind.as_deref()), (1500, true, Some("veth")));
        let bridge = resolver.link("br0").await.unwrap();
        assert_eq!(bridge.mac, Some([2, 0, 0, 0, 0, 0xb]));
        assert_eq!((bridge.mtu, bridge.up, bridge.kind.as_deref()), (1600, false, Some("bridge")));
        assert_eq!(resolver.link("lo").await.unwrap().kind, None);
        for name in ["eth99", "a-name-that-is-longer-than-any-interface", ""] {
            let name = name.to_owned();
            assert_eq!(resolver.link(&name).await, Err(LinkError::NotFound { name }));
        }
    });
}

#[test]
fn addresses_are_this_hosts_own_and_not_the_peers() {
    in_lab(async |lab: &Lab| {
        lab.near_ip("address add 10.5.0.1 peer 10.5.0.2 dev near0");
        let resolver = Resolver::new().unwrap();
        let mut addresses = resolver.addresses().await.unwrap();
        addresses.retain(|(ip, _)| !ip.to_string().starts_with("fe80:"));
        addresses.sort();
        let expected = [
            ("10.5.0.1", "near0"),
            ("10.77.0.1", "near0"),
            ("127.0.0.1", "lo"),
            ("::1", "lo"),
            ("fd77::1", "near0"),
        ];
        let expected = expected.map(|(a, interface)| (ip(a), interface.to_owned()));
        assert_eq!(addresses, expected);
    });
}

#[test]
fn many_addresses_share_one_wait_and_each_has_an_answer() {
    in_lab(async |lab: &Lab| {
        lab.far_ip("address add 10.78.0.1/32 dev lo");
        lab.near_ip("route add 10.88.0.0/16 via 10.77.0.2");
        let resolver = Resolver::new().unwrap();
        let mut addresses: Vec<IpAddr> = (1..=250u8).map(|i| IpAddr::from([10, 88, 0, i])).collect();
        addresses.extend((100..200u8).map(|i| IpAddr::from([10, 77, 0, i])));
        addresses.extend([ip("10.77.0.2"), ip("fd77::2"), ip("192.0.2.1"), ip("10.77.0.2")]);
        let start = Instant::now();
        let wait = Duration::from_millis(500);
        let all = resolver.resolve_all(&addresses, wait).await;
        let took = start.elapsed();
        assert!(took < 4 * wait, "{took:?}");
        assert_eq!(all.len(), 353);
        let count = |f: fn(&Result<NextHop, Unresolved>) -> bool| all.values().filter(|r| f(r)).count();
        assert_eq!(count(Result::is_ok), 252);
        assert_eq!(count(|r| matches!(r, Err(Unresolved::NeighbourMissing { .. }))), 100);
        assert_eq!(all[&ip("192.0.2.1")], Err(Unresolved::NoRoute));
    });
}

#[test]
fn dumps_at_the_same_time_do_not_disturb_each_other() {
    in_lab(async |_| {
        let resolver = Resolver::new().unwrap();
        // One that is given up halfway leaves the kernel with an unfinished dump.
        let _ = tokio::time::timeout(Duration::ZERO, resolver.addresses()).await;
        let (a, b, c) =
            tokio::join!(resolver.addresses(), resolver.addresses(), resolver.netlink.neighbours());
        assert!(c.is_ok());
        assert_eq!(a.unwrap(), b.unwrap());
    });
}

#[test]
fn a_broken_connection_is_opened_again() {
    in_lab(async |_| {
        let resolver = Resolver::new().unwrap();
        resolver.netlink.break_connection();
        tokio::task::yield_now().await;
        assert_hop(&resolver, "10.77.0.2", on_link("10.77.0.1")).await;
    });
}

#[test]
fn a_full_neighbour_table_is_told_apart() {
    let neighbour = ip("10.0.0.1");
    let full = not_asked(neighbour, &Error::Kernel(Errno::NOBUFS));
    assert_eq!(
        full.to_string(),
        "no room for neighbour 10.0.0.1; raise `sysctl net.ipv4.neigh.default.gc_thresh3`"
    );
}

#[test]
fn a_resolution_can_run_on_any_worker_thread() {
    fn is_send<T: Send>(_: T) {}
    is_send(async || {
        let resolver = Resolver::new().unwrap();
        let _ = resolver.resolve_all(&[], SHORT).await;
        let _ = resolver.addresses().await;
    });
    fn check(resolver: &Resolver) {
        is_send(resolver.resolve(IpAddr::from([0, 0, 0, 0])));
        is_send(resolver.addresses());
        is_send(resolver.link("lo"));
    }
    let _ = check;
}

#[test]
fn neighbours_are_taken_out_of_the_kernels_care_by_interface_and_mac() {
    in_lab(async |lab: &Lab| {
        for host in [50, 51] {
            lab.near_ip(&format!(
                "neigh add 10.77.0.{host} lladdr 02:00:00:00:00:{host} dev near0 nud stale"
            ));
            lab.near_ip(&format!("neigh replace 10.77.0.{host} dev near0 managed"));
        }
        let resolver = Resolver::new().unwrap();
        let ifindex = resolver.link("near0").await.unwrap().ifindex;
        let neighbours = [(ifindex, [2, 0, 0, 0, 0, 0x50]), (ifindex + 1, [2, 0, 0, 0, 0, 0x51])];
        resolver.unmanage(&neighbours.into(), &HashSet::new()).await;
        let shown = |address| lab.near_shows(&format!("neigh show {address}"));
        let released = shown("10.77.0.50");
        assert!(!released.contains("managed") && released.contains("02:00:00:00:00:50"), "{released}");
        assert!(shown("10.77.0.51").contains("managed"));
    });
}

/// A silent one has no MAC by which to know it.
#[test]
fn a_silent_neighbour_is_taken_out_of_the_kernels_care_by_its_address() {
    in_lab(async |lab: &Lab| {
        for host in [50, 51] {
            lab.near_ip(&format!("neigh add 10.77.0.{host} dev near0 managed"));
        }
        let shown = |host: u8| lab.near_shows(&format!("neigh show 10.77.0.{host}"));
        assert!(shown(50).contains("managed") && !shown(50).contains("lladdr"), "{}", shown(50));
        let address = IpAddr::from([10, 77, 0, 50]);
        Resolver::new().unwrap().unmanage(&HashSet::new(), &[address].into()).await;
        assert!(!shown(50).contains("managed"), "{}", shown(50));
        assert!(shown(51).contains("managed"), "{}", shown(51));
    });
}

#[test]
fn asking_for_a_neighbour_leaves_the_marks_that_others_have_put_on_it() {
    in_lab(async |lab: &Lab| {
        // A managed one does not stay stale, but is asked for when it is missing.
        lab.near_ip("neigh add 10.77.0.2 dev near0 managed");
        lab.near_ip("neigh add 10.77.0.51 lladdr 02:00:00:00:00:51 dev near0 nud stale extern_learn");
        for (address, mark) in [("10.77.0.2", "managed"), ("10.77.0.51", "extern_learn")] {
            let resolver = Resolver::new().unwrap();
            resolver.resolve(ip(address)).await.unwrap();
            let shown = lab.near_shows(&format!("neigh show {address}"));
            assert!(shown.contains(mark), "{shown}");
        }
    });
}

#[test]
fn a_redirect_goes_to_a_veth_whose_peer_takes_it_and_to_no_bridge() {
    in_lab(async |lab: &Lab| {
        lab.near_ip("link add br0 type bridge");
        let resolver = Resolver::new().unwrap();
        let target = async |name| resolver.link(name).await.unwrap().redirect_target;
        assert!(!target("near0").await);
        assert!(!target("br0").await);
        lab.far_gro(true);
        assert!(target("near0").await);
        assert!(resolver.resolve(ip("10.77.0.2")).await.unwrap().redirect_target);
        let all = resolver.netlink.links().await.unwrap();
        let names: Vec<&str> =
            all.iter().filter(|link| link.redirect_target).map(|link| link.name.as_str()).collect();
        assert_eq!(names, ["near0"]);
    });
}
