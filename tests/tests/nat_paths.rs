//! The way to backends whose addresses are translated, as clients and backends learn of it: hops, and path MTU in both
//! directions, within a family and from one to the other.

use std::fs;

use anyhow::{Context, Result, ensure};
use tests::balancer::Balancer;
use tests::between::{Between, CLIENTS, Config, HOPS, Mode, SOURCES, url};
use tests::lab::{Capture, Host, learnt_mtu, traceroute};

/// What every link but one takes.
const WIDE: u16 = 1500;
/// What that one takes.
const LINK: u16 = 1300;

/// Of nobody's listening.
const CLOSED: &str = "5000";

const WEB: [&str; 2] = ["10.114.0.11", "fd00:114::11"];

/// Services on TCP and UDP.
fn start(scene: &Between) -> Result<Balancer> {
    let backends = WEB.map(|address| vec![format!("{{address: \"{address}\", name: web1}}")]);
    let (ports, protocol) = (format!("[80, {CLOSED}]"), "[tcp, udp]".to_owned());
    scene.start(&Config { ports, protocol, backends, ..scene.config() })
}

/// Routers keep their names where the family stays the same; of another family, the VIP stands for them.
fn hops(name: &str, mode: Mode) -> Result<()> {
    let Some(scene) = Between::routed(name, mode, WIDE, WIDE)? else { return Ok(()) };
    let balancer = start(&scene)?;
    for (vip, ipv6) in mode.vips() {
        let own = usize::from(vip.contains(':'));
        let seen = |hop: usize| if ipv6 == (own == 1) { HOPS[hop][own] } else { vip };
        for words in [&["-T", "-p", "80"], &["-U", "-p", CLOSED]] {
            let hops = traceroute(&scene.client, vip, words)?;
            let wanted = [HOPS[0][own], HOPS[1][own], seen(2), seen(3), vip];
            ensure!(hops == wanted, "{vip} {words:?}: {hops:?}, not {wanted:?}");
        }
        // The balancer itself answers pings.
        let hops = traceroute(&scene.client, vip, &["-I"])?;
        ensure!(hops == [HOPS[0][own], HOPS[1][own], vip], "{vip}: {hops:?}");
    }
    // Two routers and, of datagrams, the backend, for each probe that came there.
    let told = balancer.outcome("forward_reply_error_redirect")?;
    ensure!(told >= 5 * mode.vips().len() as u64, "{told} errors");
    Ok(())
}

#[test]
fn traceroute_shows_the_routers_behind_nat() -> Result<()> {
    hops("hopsnat", Mode::Nat)
}

#[test]
fn traceroute_shows_the_routers_behind_fullnat_or_the_vip_in_their_place() -> Result<()> {
    hops("hopsfull", Mode::Fullnat)
}

/// Gets `/big`, byte by byte.
fn download(client: &Host, vip: &str) -> Result<()> {
    let big: Vec<u8> = (0..8_u64 << 17).flat_map(u64::to_le_bytes).collect();
    let output = client.exec(["curl", "-qsSgf", "--max-time", "30", &url(vip, 80, "big")]).output()?;
    ensure!(output.status.success(), "{vip}: {}", String::from_utf8_lossy(&output.stderr));
    ensure!(output.stdout == big, "{vip}: {} bytes, or others", output.stdout.len());
    Ok(())
}

/// Puts 8 MB to the backend, byte by byte.
fn upload(scene: &Between, vip: &str) -> Result<()> {
    let (file, put) = (scene.client.new_file("upload"), url(vip, 80, "up/file"));
    let bytes: Vec<u8> = (0..1_u64 << 20).flat_map(u64::to_le_bytes).collect();
    fs::write(&file, &bytes)?;
    let path = file.to_string_lossy();
    scene.client.run(["curl", "-qsSgf", "--max-time", "30", "--upload-file", &path, &put])?;
    let arrived = scene.backends[0].nginx.uploads.join("file");
    ensure!(fs::read(&arrived)? == bytes, "{vip}: another content");
    fs::remove_file(arrived)?;
    fs::remove_file(file).context("the upload")
}

/// What a sender of one family is told of a link on the other family's side: headers differ by 20 bytes.
fn as_seen(from_ipv6: bool, link_ipv6: bool) -> u32 {
    match (from_ipv6, link_ipv6) {
        (false, true) => u32::from(LINK) - 20,
        (true, false) => u32::from(LINK) + 20,
        _ => u32::from(LINK),
    }
}

/// A router between balancer and backend tells who sent the packet: the client, or the source that stands for it.
fn small_link_to_the_backend(name: &str, mode: Mode) -> Result<()> {
    let Some(scene) = Between::routed(name, mode, WIDE, LINK)? else { return Ok(()) };
    let balancer = start(&scene)?;
    let wire = Capture::at_host(&scene.client)?;
    for (vip, ipv6) in mode.vips() {
        let before = balancer.outcome("forward_reply_error_redirect")?;
        upload(&scene, vip)?;
        let (learnt, wanted) = (learnt_mtu(&scene.client, vip)?, as_seen(vip.contains(':'), ipv6));
        ensure!(learnt == Some(wanted), "{vip}: the client has learnt {learnt:?}, not {wanted}");
        ensure!(balancer.outcome("forward_reply_error_redirect")? > before, "{vip}");
        download(&scene.client, vip)?;
    }
    wire.end()?;
    wire.has_no_bad_checksum()
}

#[test]
fn an_upload_over_a_small_link_behind_nat_completes_because_the_client_is_told() -> Result<()> {
    small_link_to_the_backend("upnat", Mode::Nat)
}

#[test]
fn an_upload_over_a_small_link_behind_fullnat_completes_because_the_client_is_told() -> Result<()> {
    small_link_to_the_backend("upfull", Mode::Fullnat)
}

/// A router between balancer and client tells the VIP.
fn small_link_to_the_client(name: &str, mode: Mode) -> Result<()> {
    let Some(scene) = Between::routed(name, mode, LINK, WIDE)? else { return Ok(()) };
    let balancer = start(&scene)?;
    let web = &scene.backends[0].host;
    let wire = Capture::at_host(web)?;
    let mut told: Vec<(&str, u32)> = Vec::new();
    for (vip, ipv6) in mode.vips() {
        let before = balancer.outcome("forward_error_redirect")?;
        download(&scene.client, vip)?;
        let peer = if mode == Mode::Nat { CLIENTS } else { SOURCES }[usize::from(ipv6)];
        let mtu = as_seen(ipv6, vip.contains(':'));
        // One source stands for clients of both families: the least counts, and more than that is not told.
        let known = told.iter().filter(|(to, _)| *to == peer).map(|(_, mtu)| *mtu).min();
        let news = known.is_none_or(|known| mtu < known);
        ensure!((balancer.outcome("forward_error_redirect")? > before) == news, "{vip}: told, or not");
        let (learnt, least) = (learnt_mtu(web, peer)?, known.map_or(mtu, |known| known.min(mtu)));
        ensure!(learnt == Some(least), "{vip}: the backend has learnt {learnt:?}, not {least}");
        told.push((peer, mtu));
        upload(&scene, vip)?;
    }
    wire.end()?;
    wire.has_no_bad_checksum()
}

#[test]
fn a_download_over_a_small_link_before_nat_completes_because_the_backend_is_told() -> Result<()> {
    small_link_to_the_client("downnat", Mode::Nat)
}

#[test]
fn a_download_over_a_small_link_before_fullnat_completes_because_the_backend_is_told() -> Result<()> {
    small_link_to_the_client("downfull", Mode::Fullnat)
}

/// Of its own routes the balancer tells clients itself.
fn small_route_to_the_backend(name: &str, mode: Mode) -> Result<()> {
    let Some(scene) = Between::routed(name, mode, WIDE, WIDE)? else { return Ok(()) };
    scene.balancer.ip(&format!("route change 10.114.0.0/24 via {} mtu {LINK}", HOPS[2][0]))?;
    scene.balancer.ip(&format!("-6 route change fd00:114::/64 via {} mtu {LINK}", HOPS[2][1]))?;
    let balancer = start(&scene)?;
    for (vip, ipv6) in mode.vips() {
        let before = balancer.outcome("answer_too_big")?;
        upload(&scene, vip)?;
        let (learnt, wanted) = (learnt_mtu(&scene.client, vip)?, as_seen(vip.contains(':'), ipv6));
        ensure!(learnt == Some(wanted), "{vip}: the client has learnt {learnt:?}, not {wanted}");
        ensure!(balancer.outcome("answer_too_big")? > before, "{vip}");
    }
    ensure!(balancer.outcome("forward_reply_error_redirect")? == 0, "a router had to tell");
    Ok(())
}

#[test]
fn the_mtu_of_a_route_to_nats_backends_is_told_to_clients() -> Result<()> {
    small_route_to_the_backend("routenat", Mode::Nat)
}

#[test]
fn the_mtu_of_a_route_to_fullnats_backends_is_told_to_clients() -> Result<()> {
    small_route_to_the_backend("routefull", Mode::Fullnat)
}

/// And backends of its own link to the clients.
fn small_interface_to_the_client(name: &str, mode: Mode) -> Result<()> {
    let Some(scene) = Between::routed(name, mode, WIDE, WIDE)? else { return Ok(()) };
    scene.balancer.set_mtu("eth0", LINK)?;
    let balancer = start(&scene)?;
    let web = &scene.backends[0].host;
    for (vip, ipv6) in mode.vips() {
        let before = balancer.outcome("answer_too_big")?;
        download(&scene.client, vip)?;
        let peer = if mode == Mode::Nat { CLIENTS } else { SOURCES }[usize::from(ipv6)];
        ensure!(learnt_mtu(web, peer)?.is_some_and(|mtu| mtu <= as_seen(ipv6, vip.contains(':'))), "{vip}");
        ensure!(balancer.outcome("answer_too_big")? > before || vip != mode.vips()[0].0, "{vip}");
    }
    Ok(())
}

#[test]
fn the_mtu_of_the_interface_to_nats_clients_is_told_to_backends() -> Result<()> {
    small_interface_to_the_client("facenat", Mode::Nat)
}

#[test]
fn the_mtu_of_the_interface_to_fullnats_clients_is_told_to_backends() -> Result<()> {
    small_interface_to_the_client("facefull", Mode::Fullnat)
}
