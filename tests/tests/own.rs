//! Backends on the balancer's own host (`fullnat`): real clients reach them, and their answers find the way back.

use anyhow::{Result, ensure};
use tests::balancer::Ended;
use tests::between::{Between, Mode, PORTS, SAME, url};
use tests::lab::{self, Nginx};
use tests::stage::PATIENT_CHECKS;

/// The balancer's addresses towards clients, where its own server listens.
const OWN: [&str; 2] = ["10.120.0.3", "fd00:120::3"];

fn config(sources: &str, mode: &str) -> String {
    let health = PATIENT_CHECKS.replace("path:", "port: 80, path:");
    format!(
        "interfaces: [eth0]\nmode: {mode}\nseed: 5f1d0c3a9be24771\nfullnat: {{sources: [{sources}]}}\npools:\n\
         \x20 own4: {{forward: fullnat, port: {port}, health: {health}, backends: [{v4}]}}\n\
         \x20 own6: {{forward: fullnat, port: {port}, health: {health}, backends: ['{v6}']}}\n\
         services:\n\
         \x20 - {{name: four, vip: {vip4}, ports: 80, protocol: tcp, pool: own4}}\n\
         \x20 - {{name: six, vip: '{vip6}', ports: 80, protocol: tcp, pool: own6}}\n",
        port = PORTS[1],
        v4 = OWN[0],
        v6 = OWN[1],
        vip4 = SAME[0],
        vip6 = SAME[1],
    )
}

fn served_by_the_host_itself(name: &str, mode: &str) -> Result<()> {
    let Some(scene) = Between::set(name, Mode::Fullnat, 0)? else { return Ok(()) };
    let host = &scene.balancer;
    let _server = lab::nginx(host, "own", Nginx { ports: PORTS.to_vec(), ..Nginx::default() })?;
    let file = host.new_file("refused.yaml");
    std::fs::write(&file, config("10.112.0.5, 'fd00:112::5'", mode))?;
    let refused = Ended::of_xlb(host, &["check", "-c", &file.display().to_string()])?;
    refused
        .expect(3, &["10.120.0.3 is on this host, and so is the source 10.112.0.5", "no addresses of it"])?;

    let balancer = tests::balancer::Balancer::start(
        host,
        &scene.lab.dir().join("xlb"),
        &config("10.99.0.6, 'fd00:99::6'", mode),
    )?;
    balancer.wait_for_backends(2, tests::stage::PATIENCE)?;
    for (vip, source) in SAME.iter().zip(["10.99.0.6", "fd00:99::6"]) {
        let requests = lab::http_load(&scene.client, &url(vip, 80, ""), 100, 4)?;
        tests::stage::none_failed(&requests)?;
        let seen = lab::http_get(&scene.client, &url(vip, 80, "ends"))?.1;
        ensure!(seen.starts_with(source) && seen.trim_end().ends_with(" 8080"), "{vip}: {seen}");
    }
    ensure!(balancer.outcome("forward_reply_redirect")? > 400, "answers went another way");

    // Another agent takes over, and nothing is left in the end.
    let mut balancer = balancer;
    balancer.upgrade(&tests::balancer::xlb()?)?;
    balancer.wait_for_backends(2, tests::stage::PATIENCE)?;
    ensure!(lab::http_get(&scene.client, &url(SAME[0], 80, ""))?.0 == 200, "after a restart");
    balancer.process.kill();
    balancer.process.wait_exit(tests::stage::PATIENCE)?;
    balancer.command(&["detach"])?.expect(0, &["detached from", "eth0", "xlb-self-xdp"])?;
    ensure!(host.ip("link show xlb-self").is_err(), "the pair is left");
    Ok(())
}

#[test]
fn a_server_on_the_balancers_own_host_is_a_backend_of_fullnat() -> Result<()> {
    served_by_the_host_itself("own", "auto")
}

#[test]
fn a_server_on_the_balancers_own_host_is_a_backend_in_generic_mode() -> Result<()> {
    served_by_the_host_itself("owngeneric", "generic")
}
