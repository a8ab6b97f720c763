//! Path MTU, both ways: clients whose packets do not fit the way to a backend are told, and what routers say about a
//! backend's answers reaches that backend.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use anyhow::{Context, Result, ensure};
use rustix::net::sockopt::{
    Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover,
};
use tests::balancer::{Balancer, decap_on};
use tests::lab::{self, Capture, DatagramServer, Host, Lab, Nginx, Transport, learnt_mtu, wait_for};
use tests::routed::{CLIENT4, CLIENT6, Routed};
use tests::stage::{self, Backend, Config, PATIENCE, Stage, TUNNEL_SOURCES, URL4, URLS, VIP4, VIPS};

/// What the way to the backends takes.
const PATH: u32 = 1400;

/// What the link to far clients takes.
const LINK: u16 = 1300;

/// Ports of the echo server and of nginx.
const ECHO: u16 = 5000;

/// The content of nginx's `/big`.
fn big() -> Vec<u8> {
    (0..8_u64 << 17).flat_map(u64::to_le_bytes).collect()
}

/// Gets `/big`, within a time, with further arguments for curl; an error if a byte is missing or another.
fn download(client: &Host, url: &str, within: &str, arguments: &[&str]) -> Result<()> {
    let url = format!("{url}big");
    let words = ["curl", "-qsSg", "--max-time", within];
    let output = client.exec(words.iter().chain(arguments).chain([&&*url])).output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{url}: {text}");
    ensure!(output.stdout == big(), "{url}: {} bytes, or others", output.stdout.len());
    Ok(())
}

/// Puts the first bytes of `/big` to a backend; an error if it does not have the same.
fn upload(client: &Host, backend: &Backend, url: &str, bytes: usize, within: &str) -> Result<()> {
    let (file, url) = (client.new_file("upload"), format!("{url}up/file"));
    fs::write(&file, &big()[..bytes])?;
    let path = file.to_string_lossy();
    client.run(["curl", "-qsSgf", "--max-time", within, "--upload-file", &path, &url])?;
    let arrived = backend.nginx.uploads.join("file");
    ensure!(fs::read(&arrived)? == fs::read(&file)?, "{url}: another content");
    fs::remove_file(arrived)?;
    Ok(())
}

/// Makes a host forget what it has learnt of the paths along a route.
fn forget(host: &Host, to: &str, via: &str) -> Result<()> {
    let family = if via.contains(':') { "-6 " } else { "" };
    host.ip(&format!("{family}route del {to}"))?;
    host.ip(&format!("{family}route add {to} via {via}")).map(drop)
}

/// A datagram that may not be fragmented is refused by the client's own kernel once it was too long; the longest that
/// fits comes back.
fn datagrams(client: &Host, server: SocketAddr, mtu: u32) -> Result<()> {
    let (any, headers): (IpAddr, _) =
        if server.is_ipv6() { ("::".parse()?, 48) } else { ("0.0.0.0".parse()?, 28) };
    let fits = mtu as usize - headers;
    let socket = client.inside(|| -> Result<UdpSocket> {
        let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
        if server.is_ipv6() {
            set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::DO)?;
        } else {
            set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::DO)?;
        }
        socket.connect(server)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(socket)
    })??;
    let long = vec![7; fits + 1];
    socket.send(&long).context("the first that is too long")?;
    let refused = || socket.send(&long).is_err_and(|e| e.raw_os_error() == Some(libc::EMSGSIZE));
    wait_for("EMSGSIZE", PATIENCE, refused)?;
    ensure!(refused(), "one byte more than {mtu} goes out");
    // An error that was reported is gone from the socket.
    socket.take_error()?;
    socket.send(&long[..fits]).context("the longest that fits")?;
    let mut answer = [0; 100];
    let length = socket.recv(&mut answer)?;
    ensure!(answer[..length].starts_with(&[7; 64]), "{:?}", &answer[..length]);
    Ok(())
}

/// Some megabytes over TCP or UDP to a VIP; most of it must arrive.
fn iperf3(client: &Host, vip: &str, udp: bool) -> Result<()> {
    let words = ["timeout", "20", "iperf3", "--json", "--connect-timeout", "2000", "--client", vip];
    // UDP has no path MTU discovery of its own: it sends what fits.
    let udp_words: &[&str] = if udp {
        &["--udp", "--bitrate", "20M", "--length", "1200", "--bytes", "1M"]
    } else {
        &["--bytes", "20M"]
    };
    let report = client.run(words.iter().chain(udp_words))?;
    let report: serde_json::Value = serde_json::from_str(&report)?;
    let number =
        |name: &str| report["end"]["sum"][name].as_u64().with_context(|| format!("{name}: {report}"));
    if udp {
        let (packets, lost) = (number("packets")?, number("lost_packets")?);
        ensure!(packets > 100 && lost < packets / 2, "{vip}: {lost} of {packets} lost");
    } else {
        let bytes = report["end"]["sum_received"]["bytes"].as_u64();
        ensure!(bytes.is_some_and(|bytes| bytes > 1 << 20), "{vip}: {bytes:?}");
    }
    Ok(())
}

/// The servers of a backend beside nginx, which live as long as what is returned.
fn servers(backend: &Backend) -> Result<Vec<DatagramServer>> {
    lab::dns(&backend.host, backend.host.name())?;
    let mut all = Vec::new();
    for vip in VIPS {
        lab::iperf3_server_at(&backend.host, vip)?;
        all.push(DatagramServer::start(&backend.host, SocketAddr::new(vip.parse()?, ECHO))?);
    }
    Ok(all)
}

/// All services of these tests, HTTP checks on port 80.
fn with_services(config: Config) -> Config {
    Config {
        health: stage::PATIENT_CHECKS.replace("path:", "port: 80, path:"),
        services: vec![stage::service("all", &VIPS, "[53, 80, 5000, 5201]", "[tcp, udp]")],
        ..config
    }
}

/// Real clients over a way of 1400 bytes.
fn everything_arrives(stage: &Stage, balancer: &Balancer, overhead: u32) -> Result<()> {
    let mtu = PATH - overhead;
    let wire = Capture::at_switch(&stage.balancer)?;
    clients_learn(stage, balancer, mtu)?;
    wire.end()?;
    wire.has_no_bad_checksum()?;
    let (client, told) = (&stage.client, balancer.outcome("answer_too_big")?);
    ensure!(told_right(&wire, mtu)? == told);
    for (vip, url) in VIPS.into_iter().zip(URLS) {
        upload(client, &stage.backends[0], url, 8 << 20, "30")?;
        download(client, url, "30", &[])?;
        for udp in [false, true] {
            iperf3(client, vip, udp)?;
        }
    }
    ensure!(balancer.outcome("answer_too_big")? == told, "a client that knows is told again");
    for none in
        ["drop_oversize", "drop_super_frame", "drop_oversize_limit", "drop_vip_fragment", "drop_headroom"]
    {
        ensure!(balancer.outcome(none)? == 0, "{none}");
    }
    Ok(())
}

/// By UDP, and after forgetting it by TCP.
fn clients_learn(stage: &Stage, balancer: &Balancer, mtu: u32) -> Result<()> {
    let client = &stage.client;
    for (vip, url) in VIPS.into_iter().zip(URLS) {
        let before = balancer.outcome("answer_too_big")?;
        datagrams(client, SocketAddr::new(vip.parse()?, ECHO), mtu)?;
        ensure!(balancer.outcome("answer_too_big")? == before + 1, "{vip}: a datagram");
        forget(client, vip, if vip == VIP4 { stage::BALANCER4 } else { stage::BALANCER6 })?;
        upload(client, &stage.backends[0], url, 1 << 20, "20")?;
        ensure!(learnt_mtu(client, vip)? == Some(mtu), "{vip}: {:?}, not {mtu}", learnt_mtu(client, vip)?);
        ensure!(balancer.outcome("answer_too_big")? > before + 1, "{vip}: an upload");
        client.run([
            "curl",
            "-qsSg",
            "--range",
            "0-999999",
            "--output",
            "/dev/null",
            &format!("{url}big"),
        ])?;
        for transport in [Transport::Udp, Transport::Tcp] {
            ensure!(lab::dns_who(client, vip, transport)? == "web1", "{vip}");
        }
    }
    Ok(())
}

/// Every message about the MTU has the right one, a good checksum, and as much of the packet as the RFCs ask for; how
/// many there are.
fn told_right(wire: &Capture, mtu: u32) -> Result<u64> {
    let good = "(icmp.type == 3 && icmp.code == 4 && icmp.checksum.status == 1) \
                || (icmpv6.type == 2 && icmpv6.checksum.status == 1)";
    let messages = wire.fields(good, &["icmp.mtu", "ip.len", "icmpv6.mtu", "ipv6.plen"])?;
    let mtu = mtu.to_string();
    let (v4, v6) = ([&*mtu, "576", "", ""], ["", "", &*mtu, "1240"]);
    let count = |expected: [&str; 4]| messages.iter().filter(|message| **message == expected).count();
    let (v4, v6) = (count(v4), count(v6));
    ensure!(v4 > 0 && v6 > 0 && v4 + v6 == messages.len(), "{messages:?}");
    Ok(messages.len() as u64)
}

/// The route to the backends says 1400.
fn over_a_small_route(name: &str, forward: &str, ipv6_backends: bool, overhead: u32) -> Result<()> {
    let Some(stage) = Stage::set(name, 1)? else { return Ok(()) };
    let _servers = servers(&stage.backends[0])?;
    stage.balancer.ip(if ipv6_backends {
        "-6 route change fd00:111::/64 dev eth0 proto kernel metric 256 mtu 1400"
    } else {
        "route change 10.111.0.0/24 dev eth0 proto kernel scope link src 10.111.0.3 mtu 1400"
    })?;
    let config = if ipv6_backends { stage.config6() } else { stage.config() };
    let balancer = stage.start(&with_services(Config { forward: forward.to_owned(), ..config }))?;
    everything_arrives(&stage, &balancer, overhead)
}

#[test]
fn fault_18_everything_arrives_in_ipv4_tunnels_on_a_small_route() -> Result<()> {
    over_a_small_route("route4", "ipip", false, 20)
}

#[test]
fn fault_18_everything_arrives_in_ipv6_tunnels_on_a_small_route() -> Result<()> {
    over_a_small_route("route6", "ipip", true, 40)
}

#[test]
fn fault_18_everything_arrives_on_the_same_link_with_a_small_route() -> Result<()> {
    over_a_small_route("routel2", "l2", false, 0)
}

#[test]
fn fault_18_everything_arrives_in_gue_over_ipv4_on_a_small_route() -> Result<()> {
    over_a_small_route("routegue4", "gue", false, 28)
}

#[test]
fn fault_18_everything_arrives_in_gue_over_ipv6_on_a_small_route() -> Result<()> {
    over_a_small_route("routegue6", "gue", true, 48)
}

/// The balancer's interface to the backends takes 1400; they answer over another.
fn over_a_small_link(name: &str, ipv6_backends: bool, overhead: u32) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = Lab::new(name)?;
    let inside = lab.switch("inside")?;
    let mut stage = Stage::set_in(lab, 0)?;
    stage.balancer.add_interface(&inside, &["10.112.0.3/24", "fd00:112::3/64"])?;
    stage.balancer.set_mtu("eth1", PATH as u16)?;
    let web = stage.lab.host_on(
        "web1",
        &[
            (stage.lab.lan(), &["10.111.0.11/24", "fd00:111::11/64"]),
            (&inside, &["10.112.0.11/24", "fd00:112::11/64"]),
        ],
    )?;
    lab::backend_dsr(&web, &VIPS)?;
    let decap = decap_on(&web, "eth1", &VIPS, &TUNNEL_SOURCES)?;
    let nginx = lab::nginx(&web, "web1", Nginx::default())?;
    stage.backends.push(Backend { host: web, decap, nginx });
    let _servers = servers(&stage.backends[0])?;
    let address = if ipv6_backends { "fd00:112::11" } else { "10.112.0.11" };
    let balancer = stage.start(&with_services(Config {
        interfaces: "[eth0, eth1]".to_owned(),
        backends: vec![format!("{{address: \"{address}\", name: web1}}")],
        ..Config::default()
    }))?;
    everything_arrives(&stage, &balancer, overhead)
}

#[test]
fn fault_18_everything_arrives_in_ipv4_tunnels_over_a_small_link() -> Result<()> {
    over_a_small_link("link4", false, 20)
}

#[test]
fn fault_18_everything_arrives_in_ipv6_tunnels_over_a_small_link() -> Result<()> {
    over_a_small_link("link6", true, 40)
}

#[test]
fn advmss_on_a_backend_spares_its_clients_and_datagrams_without_df_end_as_fragments() -> Result<()> {
    let Some(stage) = Stage::set("advmss", 1)? else { return Ok(()) };
    let web = &stage.backends[0].host;
    let _servers = servers(&stage.backends[0])?;
    stage
        .balancer
        .ip("route change 10.111.0.0/24 dev eth0 proto kernel scope link src 10.111.0.3 mtu 1400")?;
    web.ip("route change 10.111.0.0/24 dev eth0 proto kernel scope link src 10.111.0.11 advmss 1340")?;
    web.ip("-6 route change fd00:111::/64 dev eth0 proto kernel metric 256 advmss 1320")?;
    let balancer = stage.start(&with_services(stage.config()))?;
    for url in URLS {
        upload(&stage.client, &stage.backends[0], url, 8 << 20, "30")?;
    }
    ensure!(balancer.outcome("answer_too_big")? == 0);

    // The first is answered; from then on the client's kernel makes two of one.
    let server = SocketAddr::new(VIP4.parse()?, ECHO);
    let socket = stage.client.inside(|| UdpSocket::bind(("0.0.0.0", 0)))??;
    wait_for("fragments", PATIENCE, || {
        socket.send_to(&[7; 1400], server).is_ok()
            && balancer.outcome("drop_vip_fragment").is_ok_and(|fragments| fragments >= 2)
    })?;
    ensure!(balancer.outcome("answer_too_big")? > 0 && learnt_mtu(&stage.client, VIP4)? == Some(1380));
    Ok(())
}

/// Backends send packets of 1500 bytes straight to the client, over a link of 1300: the router before it tells the VIP.
fn through_a_small_link_to_the_client(name: &str, ipv6: bool) -> Result<()> {
    let Some(routed) = Routed::set(name, 3, LINK)? else { return Ok(()) };
    let Routed { core, stage, .. } = &routed;
    for backend in &stage.backends {
        lab::dns(&backend.host, backend.host.name())?;
    }
    let balancer = stage.start(&with_services(stage.config()))?;
    let (family, url, vip) =
        (if ipv6 { "-6 " } else { "" }, URLS[usize::from(ipv6)], VIPS[usize::from(ipv6)]);
    let (client, vip_port) =
        if ipv6 { (CLIENT6, format!("[{vip}]:80")) } else { (CLIENT4, format!("{vip}:80")) };
    let [untold, resolver] = if ipv6 { ["fd00:120::4", "fd00:120::5"] } else { ["10.120.0.4", "10.120.0.5"] };
    for address in [untold, resolver] {
        stage.client.add_address(&format!("{address}/{}", if ipv6 { 64 } else { 24 }), "eth0")?;
    }
    let errors = || balancer.outcome("forward_error_transmit");

    // A port for each backend.
    let mut flows: BTreeMap<String, String> = BTreeMap::new();
    for port in 41000..41030 {
        let source = if ipv6 { format!("[{client}]:{port}") } else { format!("{client}:{port}") };
        flows.entry(balancer.lookup(&source, &vip_port)?).or_insert(port.to_string());
    }
    ensure!(flows.len() == 3, "{flows:?}");

    // What the router itself sends to the VIP goes nowhere. The client has another address for this: what is left of
    // the connection teaches its backend later.
    core.ip(&format!("{family}rule add iif lo to {vip} priority 100 blackhole"))?;
    let result = download(&stage.client, url, "3", &["--interface", untold]);
    ensure!(result.is_err() && errors()? == 0, "{} errors: {result:?}", errors()?);
    core.ip(&format!("{family}rule del iif lo to {vip} priority 100 blackhole"))?;

    let mut told: Vec<&str> = Vec::new();
    for (backend, port) in &flows {
        let before = errors()?;
        download(&stage.client, url, "30", &["--interface", client, "--local-port", port])?;
        ensure!(errors()? > before, "{backend} was not told");
        told.push(backend);
        ensure!(learnt(stage, client)? == told, "{:?} have learnt it, not {told:?}", learnt(stage, client)?);
    }

    // A long answer over UDP meets the same link.
    ensure!(learnt(stage, resolver)?.is_empty());
    ensure!(lab::dns_long(&stage.client, resolver, vip)? > 1200);
    ensure!(!learnt(stage, resolver)?.is_empty(), "the answer was not too long");
    Ok(())
}

/// The backends that know that the way to the client takes what the link takes, in their order.
fn learnt<'a>(stage: &'a Stage, client: &str) -> Result<Vec<&'a str>> {
    let mut names = Vec::new();
    for backend in &stage.backends {
        let mtu = learnt_mtu(&backend.host, client)?;
        ensure!(mtu.is_none_or(|mtu| mtu == u32::from(LINK)), "{mtu:?}");
        names.extend(mtu.map(|_| backend.host.name()));
    }
    Ok(names)
}

#[test]
fn fault_14_a_download_over_a_small_ipv4_link_completes_because_routers_errors_reach_its_backend()
-> Result<()> {
    through_a_small_link_to_the_client("delivery4", false)
}

#[test]
fn fault_14_a_download_over_a_small_ipv6_link_completes_because_routers_errors_reach_its_backend()
-> Result<()> {
    through_a_small_link_to_the_client("delivery6", true)
}

/// A router between the balancer and the backends, with a way of 1300 bytes behind it: what it says about tunnel packets
/// goes to the balancer's host and not on to the clients. The route's MTU is the cure.
#[test]
fn errors_of_routers_on_the_tunnels_way_are_not_translated_and_the_routes_mtu_is_the_cure() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = Lab::new("inner")?;
    let far = lab.switch("far")?;
    let mut stage = Stage::set_in(lab, 0)?;
    let inner =
        stage.lab.host_on("inner", &[(stage.lab.lan(), &["10.111.0.9/24"]), (&far, &["10.113.0.1/24"])])?;
    inner.sysctl("net.ipv4.ip_forward", "1")?;
    inner.route("10.113.0.11/32 dev eth1 mtu 1300")?;
    let web = stage.lab.host_on("web1", &[(&far, &["10.113.0.11/24"])])?;
    web.route("default via 10.113.0.1")?;
    stage.backends.push(Backend::on(&web, &[stage::BALANCER4])?);
    stage.balancer.route("10.113.0.0/24 via 10.111.0.9")?;
    let balancer = stage.start(&Config {
        outer_source: String::new(),
        backends: vec!["{address: 10.113.0.11, name: web1}".to_owned()],
        services: vec![stage::service("www", &[VIP4], "80", "tcp")],
        ..Config::default()
    })?;
    let (client, backend) = (&stage.client, &stage.backends[0]);
    ensure!(lab::http_get(client, URL4)?.1 == "web1\n");
    let wire = Capture::at_switch(&stage.balancer)?;
    let result = upload(client, backend, URL4, 1 << 20, "3");
    ensure!(result.is_err() && balancer.outcome("answer_too_big")? == 0, "{result:?}");
    wire.end()?;
    let told = wire.fields("icmp.type == 3 && icmp.code == 4", &["ip.src", "ip.dst", "icmp.mtu"])?;
    ensure!(told.iter().any(|m| *m == ["10.111.0.9", stage::BALANCER4, "1300"]), "{told:?}");

    stage.balancer.ip("route change 10.113.0.0/24 via 10.111.0.9 mtu 1300")?;
    wait_for("an upload", PATIENCE, || upload(client, backend, URL4, 1 << 20, "2").is_ok())?;
    ensure!(learnt_mtu(client, VIP4)? == Some(1280));
    Ok(())
}
