//! Real clients through the balancer: HTTP and DNS over both families, every way to a backend, and balancers
//! that agree.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use tests::balancer::{Balancer, decap};
use tests::lab::{self, Lab, Nginx, Transport};
use tests::stage::{self, Config, PATIENCE, Stage, TUNNEL_SOURCES, URL4, URL6, URLS, VIP4, VIP6, VIPS};

const REQUESTS: u32 = 400;

/// Requests over both families with backends of one; what is inside and outside of the tunnel on the way.
fn tunnels(name: &str, ipv6_backends: bool) -> Result<()> {
    let Some(stage) = Stage::set(name, 3)? else { return Ok(()) };
    let config = if ipv6_backends { stage.config6() } else { stage.config() };
    let balancer = stage.start(&config)?;
    for url in URLS {
        stage.balances(url, REQUESTS, 3)?;
    }
    // SYN, ACK, request and FIN at the least, from every client to its backend.
    let forwarded = balancer.outcome("forward_transmit")?;
    ensure!(forwarded >= 4 * 2 * u64::from(REQUESTS), "{forwarded} packets forwarded");
    let mut decapsulated = 0;
    for backend in &stage.backends {
        decapsulated += backend.end_decap()?.get("decapsulated")?;
    }
    ensure!(decapsulated == forwarded, "{forwarded} packets forwarded, {decapsulated} decapsulated");
    Ok(())
}

#[test]
fn both_families_reach_ipv4_backends_through_tunnels() -> Result<()> {
    tunnels("ipip4", false)
}

#[test]
fn both_families_reach_ipv6_backends_through_tunnels() -> Result<()> {
    tunnels("ipip6", true)
}

/// Backends do not decapsulate here, so that a tunnel packet would reach nobody.
fn on_the_same_link(name: &str, ipv6_backends: bool) -> Result<()> {
    let Some(stage) = Stage::set(name, 3)? else { return Ok(()) };
    for backend in &stage.backends {
        backend.end_decap()?;
    }
    let config = if ipv6_backends { stage.config6() } else { stage.config() };
    let balancer = stage.start(&Config { forward: "l2".to_owned(), ..config })?;
    for url in URLS {
        stage.balances(url, REQUESTS, 3)?;
    }
    ensure!(balancer.outcome("forward_transmit")? >= 4 * 2 * u64::from(REQUESTS));
    Ok(())
}

#[test]
fn both_families_reach_ipv4_backends_on_the_same_link() -> Result<()> {
    on_the_same_link("l2v4", false)
}

#[test]
fn both_families_reach_ipv6_backends_on_the_same_link() -> Result<()> {
    on_the_same_link("l2v6", true)
}

#[test]
fn dns_is_balanced_over_udp_and_tcp() -> Result<()> {
    let Some(stage) = Stage::set("dns", 2)? else { return Ok(()) };
    for backend in &stage.backends {
        lab::dns(&backend.host, backend.host.name())?;
    }
    let health = "{type: tcp, port: 53, interval: 300ms, timeout: 300ms, rise: 1, fall: 20}";
    let balancer = stage.start(&Config {
        health: health.to_owned(),
        services: vec![stage::service("dns", &VIPS, "53", "[tcp, udp]")],
        ..stage.config()
    })?;
    for vip in VIPS {
        for transport in [Transport::Udp, Transport::Tcp] {
            // With two backends, one in 2^24 runs would find only one of them.
            let answers: BTreeSet<String> =
                (0..25).map(|_| lab::dns_who(&stage.client, vip, transport)).collect::<Result<_>>()?;
            ensure!(answers.iter().eq(["web1", "web2"].iter()), "{vip} {transport:?}: {answers:?}");
        }
    }
    for service in balancer.status()?.services {
        ensure!(service.packets >= 25, "{service:?}");
    }
    Ok(())
}

#[test]
fn a_port_without_a_service_is_dropped_and_counted() -> Result<()> {
    let Some(stage) = Stage::set("ports", 1)? else { return Ok(()) };
    let balancer = stage.start(&stage.config())?;
    let short = std::time::Duration::from_millis(300);
    for url in ["http://203.0.113.10:8080/", "http://[2001:db8:113::10]:8080/"] {
        let result = lab::http_get_within(&stage.client, url, short, short);
        ensure!(result.is_err(), "{url}: {result:?}");
    }
    ensure!(balancer.outcome("drop_vip_port")? >= 2);
    Ok(())
}

#[test]
fn backends_behind_another_interface_get_their_packets_redirected() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = Lab::new("redirect")?;
    let inside = lab.switch("inside")?;
    let client = lab.host("client", &["10.111.0.2/24", "fd00:111::2/64"])?;
    client.set_mtu("eth0", 1500)?;
    client.route(&format!("{VIP4}/32 via 10.111.0.3"))?;
    client.route(&format!("{VIP6}/128 via fd00:111::3"))?;
    let host = lab.host_on(
        "balancer",
        &[(lab.lan(), &["10.111.0.3/24", "fd00:111::3/64"]), (&inside, &["10.112.0.3/24", "fd00:112::3/64"])],
    )?;
    // Direct return needs a way of its own back to the client: backends are on `lan` too, without the balancer
    // knowing them there.
    for (index, number) in (11..13).enumerate() {
        let web = lab.host_on(
            &stage::name(index),
            &[
                (lab.lan(), &[&format!("10.111.0.{number}/24"), &format!("fd00:111::{number}/64")]),
                (&inside, &[&format!("10.112.0.{number}/24"), &format!("fd00:112::{number}/64")]),
            ],
        )?;
        lab::backend_dsr(&web, &VIPS)?;
        tests::balancer::decap_on(&web, "eth1", &VIPS, &TUNNEL_SOURCES)?;
        lab::nginx(&web, web.name(), Nginx::default())?;
    }
    for ipv6 in [false, true] {
        let prefix = if ipv6 { "fd00:112::" } else { "10.112.0." };
        let backends =
            [11, 12].map(|number| format!("{{address: \"{prefix}{number}\", name: web{}}}", number - 10));
        let config = Config {
            interfaces: "[eth0, eth1]".to_owned(),
            backends: backends.to_vec(),
            ..Config::default()
        };
        let run_dir = lab.dir().join(if ipv6 { "xlb6" } else { "xlb4" });
        let balancer = Balancer::start(&host, &run_dir, &config.to_string())?;
        balancer.wait_for_backends(2, PATIENCE)?;
        for url in URLS {
            let requests = lab::http_load(&client, url, 200, 4)?;
            stage::none_failed(&requests)?;
            ensure!(lab::backends(&requests).len() == 2, "{url}");
        }
        let redirected = balancer.outcome("forward_redirect")?;
        ensure!(redirected >= 4 * 400, "{redirected} packets redirected");
        ensure!(balancer.outcome("forward_transmit")? == 0);
        balancer.process_ends()?;
    }
    Ok(())
}

#[test]
fn a_weight_of_half_gets_half_a_share_and_a_weight_of_zero_nothing() -> Result<()> {
    let Some(stage) = Stage::set("weights", 3)? else { return Ok(()) };
    let weights = [100, 50, 0];
    let backends = weights.iter().enumerate().map(|(i, weight)| stage::weighted(i, false, *weight));
    let balancer = stage.start(&Config { backends: backends.collect(), ..stage.config() })?;
    let slots: Vec<u64> = balancer.backends()?.iter().map(|backend| backend.slots).collect();
    let ratio = slots[0] as f64 / slots[1] as f64;
    ensure!((1.95..2.05).contains(&ratio) && slots[2] == 0, "slots {slots:?}");
    let requests = lab::http_load(&stage.client, URL4, 900, 4)?;
    stage::none_failed(&requests)?;
    let shares = lab::backends(&requests);
    // 300 of 900 are expected, with a standard deviation of 14.
    let second = shares.get("web2").copied().unwrap_or(0);
    ensure!((215..385).contains(&second) && !shares.contains_key("web3"), "{shares:?}");
    Ok(())
}

#[test]
fn two_balancers_with_the_same_configuration_agree_on_every_flow() -> Result<()> {
    let Some(stage) = Stage::set("agree", 4)? else { return Ok(()) };
    // Another name for its interface, another address, and the same backends in another order.
    let other = stage.lab.host("other", &["10.111.0.4/24", "fd00:111::4/64"])?;
    other.set_link("eth0", false)?;
    other.ip("link set eth0 name uplink7")?;
    other.set_link("uplink7", true)?;
    // IPv6 addresses went with the link.
    other.add_address("fd00:111::4/64", "uplink7")?;
    let config = stage.config();
    let first = stage.start(&config)?;
    let mut reordered = config.clone();
    reordered.backends.reverse();
    reordered.interfaces = "[uplink7]".to_owned();
    let second = Balancer::start(&other, &stage.lab.dir().join("xlb-other"), &reordered.to_string())?;
    second.wait_for_backends(4, PATIENCE)?;
    let mut met = BTreeSet::new();
    for port in 40000..40050 {
        for (source, vip) in [
            (format!("10.111.0.2:{port}"), format!("{VIP4}:80")),
            (format!("[fd00:111::2]:{port}"), format!("[{VIP6}]:80")),
        ] {
            let place = first.lookup(&source, &vip)?;
            ensure!(place == second.lookup(&source, &vip)?, "{source}: {place} on one of them only");
            met.insert(place);
        }
    }
    ensure!(met.len() == 4, "{met:?}");
    Ok(())
}

#[test]
fn tunnel_packets_from_elsewhere_or_for_other_addresses_do_not_get_through() -> Result<()> {
    let Some(stage) = Stage::set("rogue", 1)? else { return Ok(()) };
    let web = &stage.backends[0];
    // Addresses that the backend would answer for, if the packets got to it.
    const OTHER: [&str; 2] = ["203.0.113.99", "2001:db8:113::99"];
    lab::backend_dsr(&web.host, &OTHER)?;
    for (vip, via) in OTHER.iter().zip([stage::BALANCER4, stage::BALANCER6]) {
        stage.client.route(&format!("{vip} via {via}"))?;
    }
    let other_urls = ["http://203.0.113.99/", "http://[2001:db8:113::99]/"];
    let short = std::time::Duration::from_millis(300);
    let refused = |urls: &[&str]| -> Result<()> {
        for url in urls {
            let result = lab::http_get_within(&stage.client, url, short, short);
            ensure!(result.is_err(), "{url} got through: {result:?}");
        }
        Ok(())
    };
    let run_dir = |name: &str| stage.lab.dir().join(name);
    let mut services =
        vec![stage::service("www", &VIPS, "80", "tcp"), stage::service("other", &OTHER, "80", "tcp")];
    for (name, config) in [("inner4", stage.config()), ("inner6", stage.config6())] {
        let balancer = Balancer::start(
            &stage.balancer,
            &run_dir(name),
            &Config { services: services.clone(), ..config }.to_string(),
        )?;
        balancer.wait_for_backends(1, PATIENCE)?;
        for url in URLS {
            ensure!(lab::http_get(&stage.client, url)?.1 == "web1\n", "{url}");
        }
        refused(&other_urls)?;
        balancer.process_ends()?;
    }
    services.pop();
    for (name, config) in [("outer4", stage.config()), ("outer6", stage.config6())] {
        let outer_source = "[10.254.0.0/24, \"fd00:254::/64\"]".to_owned();
        let balancer = Balancer::start(
            &stage.balancer,
            &run_dir(name),
            &Config { services: services.clone(), outer_source, ..config }.to_string(),
        )?;
        balancer.wait_for_backends(1, PATIENCE)?;
        refused(&[URL4, URL6])?;
        balancer.process_ends()?;
    }
    let counts = web.end_decap()?;
    for name in ["drop_source", "drop_not_vip"] {
        // A SYN over both families inside of both families, and repeats of it.
        ensure!(counts.get(name)? >= 4, "{counts:?}");
    }
    ensure!(counts.get("decapsulated")? >= 4 * 4, "{counts:?}");
    // The tunnel's end is one of the two: with other sources allowed, the same packets arrive.
    decap(&web.host, &VIPS, &["10.254.0.0/24", "fd00:254::/64"])?;
    let outer_source = "[10.254.0.0/24, \"fd00:254::/64\"]".to_owned();
    let _balancer = stage.start(&Config { outer_source, ..stage.config() })?;
    ensure!(lab::http_get(&stage.client, URL4)?.1 == "web1\n");
    Ok(())
}
