//! Interfaces that go, come and change.

use super::*;

#[test]
fn a_link_that_loses_its_carrier_is_held_and_told_and_comes_back() {
    in_lab(async |lab: &Lab| {
        let mut told = Told::start(SHORT);
        told.watch(&["10.77.0.2", "fd77::2"]).await;
        lab.far_ip("link set far0 down");
        let down = Unresolved::InterfaceDown { interface: "near0".into(), admin_up: true };
        for address in ["10.77.0.2", "fd77::2"] {
            told.until("down", |told| told.reason(address) == Some(&down)).await;
        }
        assert!(!told.link("near0").unwrap().up);
        lab.far_ip("link set far0 up");
        lab.far_ip("address replace fd77::2/64 dev far0 nodad");
        told.until("up", |told| told.is_sure("10.77.0.2") && told.is_sure("fd77::2")).await;
        assert!(told.link("near0").unwrap().up);
    });
}

#[test]
fn a_link_that_flaps_is_only_doubted() {
    in_lab(async |lab: &Lab| {
        let mut told = Told::start(TIMES);
        told.watch(&["10.77.0.2"]).await;
        lab.near_ip("link set near0 down");
        lab.near_ip("link set near0 up");
        told.until("down or not", |told| told.link("near0").is_some_and(|link| link.up)).await;
        let end = Instant::now() + Duration::from_millis(300);
        told.until("time", |told| {
            assert_eq!(told.reason("10.77.0.2"), None);
            Instant::now() >= end || told.is_sure("10.77.0.2")
        })
        .await;
        told.until("sure", |told| told.is_sure("10.77.0.2")).await;
    });
}

#[test]
fn an_interface_that_is_set_down_and_up_loses_and_gets_its_routes() {
    in_lab(async |lab: &Lab| {
        let mut told = Told::start(SHORT);
        told.watch(&["10.77.0.2"]).await;
        lab.near_ip("link set near0 down");
        told.until("down", |told| told.reason("10.77.0.2") == Some(&Unresolved::NoRoute)).await;
        lab.near_ip("link set near0 up");
        told.until("up", |told| told.is_sure("10.77.0.2")).await;
    });
}

#[test]
fn mtu_and_mac_of_an_interface_are_followed() {
    in_lab(async |lab: &Lab| {
        lab.near_ip("route add 10.88.0.0/16 via 10.77.0.2 mtu 1450");
        let mut told = Told::start(TIMES);
        told.watch(&["10.77.0.2", "10.88.1.1"]).await;
        lab.near_ip("link set near0 mtu 1460");
        told.until("MTU", |told| told.hop("10.77.0.2").is_some_and(|hop| hop.mtu == 1460)).await;
        assert_eq!(told.hop("10.88.1.1").unwrap().mtu, 1450);
        lab.near_ip("link set near0 address 02:00:00:00:00:aa");
        let mac = [2, 0, 0, 0, 0, 0xaa];
        told.until("MAC", |told| told.hop("10.77.0.2").is_some_and(|hop| hop.source_mac == mac)).await;
        assert_eq!(told.link("near0").unwrap().mac, Some(mac));
    });
}

#[test]
fn an_interface_that_is_renamed_keeps_its_index() {
    in_lab(async |lab: &Lab| {
        let mut told = Told::start(SHORT);
        told.watch(&["10.77.0.2"]).await;
        let ifindex = told.hop("10.77.0.2").unwrap().ifindex;
        // Older kernels rename only what is down.
        lab.near_ip("link set near0 down");
        lab.near_ip("link set near0 name uplink");
        lab.near_ip("link set uplink up");
        told.until("its name", |told| told.link("uplink").is_some()).await;
        assert_eq!(told.link("uplink").unwrap().ifindex, ifindex);
        assert_eq!(told.link("near0"), None);
        assert_eq!(told.gone, Vec::<String>::new());
        told.until("a next hop", |told| {
            told.is_sure("10.77.0.2") && told.hop("10.77.0.2").is_some_and(|hop| hop.interface == "uplink")
        })
        .await;
    });
}

#[test]
fn an_interface_that_is_deleted_and_made_again_is_another() {
    in_lab(async |lab: &Lab| {
        let mut told = Told::start(SHORT);
        told.watch(&["10.77.0.2"]).await;
        let ifindex = told.hop("10.77.0.2").unwrap().ifindex;
        lab.near_ip("link del near0");
        told.until("gone", |told| told.gone == ["near0"]).await;
        told.until("no route", |told| told.reason("10.77.0.2") == Some(&Unresolved::NoRoute)).await;
        lab.near_ip(&format!("link add near0 index 99 type veth peer name far0 netns {}", lab.far()));
        lab.far_ip("address add 10.77.0.2/24 dev far0");
        lab.far_ip("link set far0 up");
        lab.near_ip("address add 10.77.0.1/24 dev near0");
        lab.near_ip("link set near0 up");
        told.until("again", |told| told.is_sure("10.77.0.2")).await;
        assert_eq!(told.hop("10.77.0.2").unwrap().ifindex, 99);
        assert_ne!(ifindex, 99);
        assert_eq!(told.link("near0").unwrap().ifindex, 99);
    });
}

#[test]
fn an_interface_that_moves_to_another_namespace_is_gone() {
    in_lab(async |lab: &Lab| {
        lab.near_ip("link add br0 type bridge");
        let mut told = Told::start(TIMES);
        told.until("a bridge", |told| told.link("br0").is_some()).await;
        lab.near_ip("link set near0 master br0");
        lab.near_ip("link set near0 nomaster");
        lab.near_ip(&format!("link set near0 netns {}", lab.far()));
        told.until("gone", |told| !told.gone.is_empty()).await;
        // A port that leaves its bridge was not gone.
        assert_eq!(told.gone, ["near0"]);
        assert_eq!(told.link("near0"), None);
    });
}

#[test]
fn a_redirect_target_is_followed_without_a_message_about_its_interface() {
    in_lab(async |lab: &Lab| {
        let mut told = Told::start(TIMES);
        told.watch(&["10.77.0.2"]).await;
        assert!(!told.hop("10.77.0.2").unwrap().redirect_target);
        assert_eq!(told.hop("10.77.0.2").unwrap().kind.as_deref(), Some("veth"));
        lab.far_gro(true);
        told.until("it", |told| told.hop("10.77.0.2").is_some_and(|hop| hop.redirect_target)).await;
        assert!(told.link("near0").unwrap().redirect_target);
    });
}
