//! What cannot work on a host: told by `xlb check` with its place, and by a running agent when it comes to be.

use anyhow::{Result, ensure};
use tests::balancer::{Balancer, Ended};
use tests::lab::{self, Host, Lab, wait_for};
use tests::stage::{self, Config, PATIENCE, Stage, URLS, VIP4};

/// A balancer without xlb on two links.
fn alone(name: &str) -> Result<Option<(Lab, Host)>> {
    if !lab::available()? {
        return Ok(None);
    }
    let lab = Lab::new(name)?;
    let inside = lab.switch("inside")?;
    let host = lab.host_on(
        "balancer",
        &[(lab.lan(), &["10.111.0.3/24", "fd00:111::3/64"]), (&inside, &["10.112.0.3/24", "fd00:112::3/64"])],
    )?;
    Ok(Some((lab, host)))
}

fn config(forward: &str, backend: &str) -> Config {
    Config { forward: forward.to_owned(), backends: vec![backend.to_owned()], ..Config::default() }
}

fn check(host: &Host, config: &Config, more: &[&str]) -> Result<Ended> {
    let file = host.new_file("checked.yaml");
    std::fs::write(&file, config.to_string())?;
    Ended::of_xlb(host, &[&["check", "-c", &*file.to_string_lossy()], more].concat())
}

/// Where the first backend stands in a file of [`config`].
const BACKEND: &str = "checked.yaml:10:9 pools.web.backends[0]: ";

#[test]
fn what_cannot_work_with_the_routes_of_this_host_is_refused_with_its_place() -> Result<()> {
    let Some((_lab, host)) = alone("refuses")? else { return Ok(()) };
    host.route("10.113.0.0/24 via 10.111.0.11")?;
    host.route("10.114.0.0/24 via 10.111.0.11 mtu 1299")?;
    host.route("10.115.0.0/24 via 10.111.0.11 mtu 595")?;
    host.route("fd00:114::/64 via fd00:111::11 mtu 1300")?;
    let only_v4 =
        |config: Config| Config { services: vec![stage::service("www", &[VIP4], "80", "tcp")], ..config };
    for (name, config, words) in [
        ("l2 behind a gateway", config("l2", "10.113.0.7"), ["behind a gateway", "use ipip or gue"]),
        ("IPv6 in 1299 bytes", config("ipip", "10.114.0.7"), ["IPv6 needs 1280 (RFC 8200", "1300 or more"]),
        (
            "IPv6 in IPv6",
            config("ipip", "\"fd00:114::7\""),
            ["takes 1300 bytes, 1260 without", "1320 or more"],
        ),
        ("IPv6 in UDP", config("gue", "10.114.0.7"), ["takes 1299 bytes, 1271 without", "1308 or more"]),
        ("IPv4 in 595 bytes", only_v4(config("ipip", "10.115.0.7")), ["IPv4 needs 576", "596 or more"]),
        ("an address of its own", config("ipip", "10.112.0.3"), ["an address of this host", "come back"]),
        ("a broadcast address", config("ipip", "10.111.0.255"), ["a broadcast address", "one host"]),
    ] {
        let ended = check(&host, &config, &[])?;
        let told = ended.expect(3, &[&[BACKEND, "--no-host"][..], &words].concat());
        ensure!(told.is_ok(), "{name}: {told:?}");
        let told = check(&host, &config, &["--no-host"])?.expect(0, &["valid", "not looked at: --no-host"]);
        ensure!(told.is_ok(), "{name}: {told:?}");
    }
    host.add_address(&format!("{VIP4}/32"), "lo")?;
    let words = ["services[0].vip[0]: the VIP 203.0.113.10 is an address of lo", "take it off lo"];
    check(&host, &config("ipip", "10.111.0.11"), &[])?.expect(3, &words)
}

#[test]
fn what_works_at_a_price_or_may_work_later_is_a_warning() -> Result<()> {
    let Some((_lab, host)) = alone("warns")? else { return Ok(()) };
    host.route("10.114.0.0/24 via 10.111.0.11 mtu 1400")?;
    let narrow = check(&host, &config("ipip", "10.114.0.7"), &[])?;
    let words = ["1380 bytes of a client's packet get to 10.114.0.7, and 1600 come in", "an MTU of 1620"];
    narrow.expect(0, &words)?;
    narrow.expect(
        0,
        &["warning: ", BACKEND, "advmss 1340 and advmss 1320 (IPv6)", "looked at: interfaces (eth0)"],
    )?;
    // One warning for a pool, with its narrowest way.
    let mut config = config("gue", "10.111.0.11");
    config.backends.push("10.114.0.7".to_owned());
    config.backends.push("10.111.0.12".to_owned());
    let ended = check(&host, &config, &[])?;
    ended.expect(0, &["backends[1]: 1372 bytes", "(and 2 more)", "an MTU of 1628"])?;
    ensure!(ended.stderr.lines().count() == 1, "{}", ended.stderr);
    check(&host, &self::config("l2", "10.111.0.11"), &[])?.expect(0, &["valid"])?;

    check(&host, &self::config("ipip", "192.0.2.7"), &[])?.expect(0, &["192.0.2.7: no route", "valid"])?;
    host.set_link("eth1", false)?;
    host.route("192.0.2.0/24 via 10.111.0.11")?;
    host.ip("route add unreachable 192.0.2.7/32")?;
    check(&host, &self::config("ipip", "192.0.2.7"), &[])?.expect(0, &["the route says unreachable"])?;
    let both = Config { interfaces: "[eth0, eth1]".to_owned(), ..self::config("l2", "10.111.0.11") };
    check(&host, &both, &[])?.expect(0, &["warning: ", "interfaces[1]: eth1 is down"])
}

#[test]
fn interfaces_that_are_not_here_say_that_the_file_is_for_another_host_unless_it_is_for_this_one() -> Result<()>
{
    let Some((_lab, host)) = alone("elsewhere")? else { return Ok(()) };
    let with = |interfaces: &str| Config { interfaces: interfaces.to_owned(), ..config("l2", "192.0.2.7") };
    let missing = "interfaces[1]: this host has no interface eth7";
    check(&host, &with("[eth0, eth7]"), &[])?.expect(0, &["warning: ", missing, "interfaces (eth0)"])?;
    check(&host, &with("[eth0, eth7]"), &["--host"])?.expect(3, &[missing])?;
    let elsewhere = check(&host, &with("[eth7, eth8]"), &[])?;
    elsewhere.expect(0, &["not looked at: it has none of the file's interfaces"])?;
    ensure!(elsewhere.stderr.is_empty(), "{}", elsewhere.stderr);
    check(&host, &with("[eth7]"), &["--host"])?.expect(3, &["this host has no interface eth7"])?;
    let json = check(&host, &with("[eth0, eth7]"), &["--host", "-o", "json"])?;
    let told: serde_json::Value = serde_json::from_str(&json.stdout)?;
    ensure!(told["valid"] == false && told["host"]["looked_at"] == true, "{told}");
    ensure!(told["problems"][0]["path"] == "interfaces[1]", "{told}");
    Ok(())
}

#[test]
fn modes_that_an_interface_does_not_have_are_refused() -> Result<()> {
    let Some((_lab, host)) = alone("modes")? else { return Ok(()) };
    host.ip("link add br0 type bridge")?;
    host.ip("link set br0 up")?;
    let with = |mode: &str, interfaces: &str, backend: &str| Config {
        top: format!("mode: {mode}\n"),
        interfaces: interfaces.to_owned(),
        ..config("ipip", backend)
    };
    let bridge = |mode: &str| check(&host, &with(mode, "[br0]", "10.111.0.11"), &[]);
    bridge("native")?.expect(3, &["interfaces[0]: the driver of br0 has no native XDP", "mode: generic"])?;
    bridge("auto")?.expect(0, &["warning: ", "the driver of br0 has no native XDP; generic mode will do"])?;
    bridge("generic")?.expect(0, &["valid"])?;
    // The other end of eth1 has the lab's program; without it nothing can be redirected there.
    let away = |mode: &str| check(&host, &with(mode, "[eth0]", "10.112.0.7"), &[]);
    away("native")?.expect(0, &["valid"])?;
    let mut unload = host.exec_at_switch(["ip", "link", "set", "balancer-1", "xdpdrv", "off"]);
    ensure!(unload.status()?.success());
    let words = ["pools.web.backends[0]: 10.112.0.7: eth1 is a veth whose other end has no XDP program"];
    away("native")?.expect(3, &words)?;
    away("auto")?.expect(3, &words)?;
    away("generic")?.expect(0, &["valid"])?;
    host.ip("link add wide mtu 9000 type veth peer name far")?;
    let wide = check(&host, &with("native", "[wide]", "10.111.0.11"), &[])?;
    wide.expect(0, &["warning: ", "wide has an MTU of 9000, and many drivers refuse native XDP"])
}

#[test]
fn fault_24_a_way_that_becomes_too_narrow_takes_its_backend_out_until_it_is_wide_again() -> Result<()> {
    let Some(stage) = Stage::set("narrow", 2)? else { return Ok(()) };
    let balancer = stage.start(&stage.config())?;
    let route =
        |mtu: u16| stage.balancer.route(&format!("{}/32 dev eth0 mtu {mtu}", stage::address(1, false)));
    let state = |balancer: &Balancer| balancer.backends().map(|backends| backends[1].state.clone());
    // With the tunnel's header 1280 bytes are left, and not one more.
    route(1300)?;
    wait_for("the route is followed", PATIENCE, || balancer.process.log().contains("mtu=1300"))?;
    ensure!(state(&balancer)? == "up");
    route(1299)?;
    wait_for("the backend is out", PATIENCE, || state(&balancer).is_ok_and(|state| state == "unresolved"))?;
    let why = balancer.backends()?.remove(1).check;
    ensure!(why.contains("IPv6 needs 1280 (RFC 8200") && why.contains("to 1300 or more"), "{why}");
    for url in URLS {
        stage.balances(url, 100, 1)?;
    }
    balancer.command(&["verify"])?.expect(0, &[])?;
    // What no IPv6 VIP asks of it, it can.
    let only_v4 = Config { services: vec![stage::service("www", &[VIP4], "80", "tcp")], ..stage.config() };
    balancer.reload(&only_v4.to_string())?;
    balancer.wait_for_backends(2, PATIENCE)?;
    balancer.reload(&stage.config().to_string())?;
    ensure!(state(&balancer)? == "unresolved");
    route(1300)?;
    balancer.wait_for_backends(2, PATIENCE)?;
    for url in URLS {
        stage.balances(url, 100, 2)?;
    }
    Ok(())
}
