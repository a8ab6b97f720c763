//! An operator's hand on backends: drain, disable, enable, weight, and backends that leave the file.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lb_userspace::agent::status::BackendStatus;
use lb_userspace::api::Commanded;
use tests::balancer::Balancer;
use tests::lab::{self, Connections, EchoServer, HttpLoad, RunningLoad, wait_for};
use tests::stage::{self, Config, PATIENCE, Stage, URL4, VIP4};

fn backend(balancer: &Balancer, name: &str) -> Result<BackendStatus> {
    let found = balancer.backends()?.into_iter().find(|backend| backend.name == name);
    found.with_context(|| format!("no backend {name}"))
}

fn slots(balancer: &Balancer) -> Result<Vec<(String, u64)>> {
    Ok(balancer.backends()?.into_iter().map(|backend| (backend.name, backend.slots)).collect())
}

/// Slots that may take their time to move have moved.
fn settle(balancer: &Balancer) -> Result<()> {
    wait_for("nothing is left to move", PATIENCE, || balancer.xlb(&["verify"]).is_ok())
}

/// 100 new connections a second until it is stopped.
fn traffic(stage: &Stage) -> Result<RunningLoad> {
    HttpLoad::new(URL4, 100_000).parallel(2).rate(50).start(&stage.client)
}

#[test]
fn a_drained_backend_gets_no_new_connection_and_all_of_its_share_back() -> Result<()> {
    let Some(stage) = Stage::set("drain", 3)? else { return Ok(()) };
    let balancer = stage.start(&stage.config())?;
    let before = slots(&balancer)?;
    let load = traffic(&stage)?;
    std::thread::sleep(Duration::from_millis(500));

    let begin = Instant::now();
    balancer.command(&["backend", "drain", "web/web1"])?.expect(0, &["web/web1 drains: no new flows"])?;
    let drained = Instant::now();
    let told = backend(&balancer, "web1")?;
    ensure!(told.slots == 0 && told.state == "draining" && told.health == "up", "{told:?}");
    ensure!(told.exit.as_ref().is_some_and(|exit| exit.cause == "drain" && exit.seconds_left.is_none()));
    balancer.command(&["status"])?.expect(0, &["draining (drain)", "LEFT", "2/3", "up for"])?;
    std::thread::sleep(Duration::from_secs(1));

    let end = Instant::now();
    balancer.command(&["backend", "enable", "web/web1"])?.expect(0, &["web/web1 is as the file has it"])?;
    // In steps: it is but a better spread.
    wait_for("all slots are back", PATIENCE, || slots(&balancer).is_ok_and(|now| now == before))?;
    ensure!(backend(&balancer, "web1")?.exit.is_none());
    std::thread::sleep(Duration::from_millis(500));
    let requests = load.stop()?;
    stage::none_failed_but_in_flight(&requests, 4, [begin, Instant::now()])?;
    let meanwhile: Vec<_> = requests
        .into_iter()
        .filter(|request| request.start > drained && request.start + request.duration < end)
        .collect();
    let shares = lab::backends(&meanwhile);
    ensure!(!shares.contains_key("web1") && shares.contains_key("web2"), "{shares:?}");
    Ok(())
}

#[test]
fn what_was_said_of_backends_outlives_the_agent_and_a_reload_and_ends_with_its_entry() -> Result<()> {
    let Some(stage) = Stage::set("overrides", 4)? else { return Ok(()) };
    let mut config = stage.config();
    let mut balancer = stage.start(&config)?;
    let fresh = slots(&balancer)?;
    for (words, said) in [
        (&["backend", "drain", "web/web1", "--timeout", "2h"][..], "those it still has in 2h move then"),
        (&["backend", "disable", "web/10.111.0.12"], "web/web2 is disabled"),
        (&["backend", "weight", "web/web3", "20"], "web/web3 has weight 20 (in the file: 100)"),
    ] {
        balancer.command(words)?.expect(0, &[said])?;
    }
    let as_said = |balancer: &Balancer| -> Result<()> {
        let told = balancer.backends()?;
        let states: Vec<_> = told.iter().map(|b| (b.state.as_str(), b.weight, b.weight_in_file)).collect();
        let wanted =
            [("draining", 100, None), ("disabled", 100, None), ("up", 20, Some(100)), ("up", 100, None)];
        ensure!(states == wanted && told[0].slots == 0 && told[1].slots == 0, "{told:?}");
        Ok(())
    };
    as_said(&balancer)?;
    settle(&balancer)?;
    balancer.command(&["backend", "list"])?.expect(0, &["20 (yaml 100)", "disabled", "draining (drain)"])?;

    let before = slots(&balancer)?;
    balancer.process.kill();
    balancer.restart()?;
    wait_for("backends are as they were", PATIENCE, || as_said(&balancer).is_ok())?;
    ensure!(slots(&balancer)? == before, "slots moved");
    balancer.reload(&config.to_string())?;
    as_said(&balancer)?;
    let left = backend(&balancer, "web1")?.exit.and_then(|exit| exit.seconds_left);
    ensure!(left.is_some_and(|left| (7000..=7200).contains(&left)), "{left:?}");
    ensure!(balancer.xlb(&["verify"])?.contains("no difference"));

    // Without an agent, too.
    balancer.process.kill();
    let file = balancer.config.to_string_lossy().into_owned();
    ensure!(balancer.xlb(&["verify", "-c", &file])?.contains("no difference"));
    balancer.restart()?;
    wait_for("backends are as they were", PATIENCE, || as_said(&balancer).is_ok())?;

    config.backends[0] = stage::weighted(0, false, 99);
    balancer.reload(&config.to_string())?;
    ensure!(backend(&balancer, "web1")?.state == "up");
    ensure!(
        balancer.process.log().contains("what was said of it by command has ended: its entry in the file")
    );
    for name in ["web/web2", "web/web3"] {
        balancer.command(&["backend", "enable", name])?.expect(0, &["is as the file has it"])?;
        balancer.command(&["backend", "enable", name])?.expect(0, &["was as the file has it already"])?;
    }
    config.backends[0] = stage::backend(0, false);
    balancer.reload(&config.to_string())?;
    wait_for("all slots are back", PATIENCE, || slots(&balancer).is_ok_and(|now| now == fresh))
}

#[test]
fn a_file_of_overrides_that_says_nothing_is_put_aside_and_the_agent_runs() -> Result<()> {
    let Some(stage) = Stage::set("overgarbage", 2)? else { return Ok(()) };
    let mut balancer = stage.start(&stage.config())?;
    balancer.command(&["backend", "drain", "web/web1"])?.expect(0, &[])?;
    let kept = balancer.run_dir.join("overrides.json");
    balancer.process.kill();
    std::fs::write(&kept, "{\"version\":1,")?;
    balancer.restart()?;
    balancer.wait_for_backends(2, PATIENCE)?;
    settle(&balancer)?;
    let log = balancer.process.log();
    ensure!(log.contains("what was said of backends by commands is lost"), "{log}");
    ensure!(balancer.run_dir.join("overrides.json.refused").exists() && kept.exists());
    stage.balances(URL4, 200, 2)
}

#[test]
fn what_cannot_be_kept_is_not_done() -> Result<()> {
    let Some(stage) = Stage::set("unkept", 2)? else { return Ok(()) };
    let balancer = stage.start(&stage.config())?;
    // Where the next file would be written.
    let way = balancer.run_dir.join("overrides.json.new");
    std::fs::create_dir(&way)?;
    let words = ["nothing was changed", "overrides.json"];
    balancer.command(&["backend", "drain", "web/web1"])?.expect(1, &words)?;
    ensure!(balancer.backends()?.iter().all(|backend| backend.exit.is_none() && backend.slots > 0));
    std::fs::remove_dir(&way)?;
    balancer.command(&["backend", "drain", "web/web1"])?.expect(0, &[])
}

/// Status and body of a request with a body.
fn post(balancer: &Balancer, resource: &str, body: &str) -> Result<(u16, String)> {
    let mut stream = UnixStream::connect(balancer.run_dir.join("xlb.sock"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let length = body.len();
    write!(stream, "POST {resource} HTTP/1.1\r\nhost: xlb\r\ncontent-length: {length}\r\n\r\n{body}")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).context(answer.clone())?;
    Ok((status, answer.split_once("\r\n\r\n").context(answer.clone())?.1.to_owned()))
}

#[test]
fn the_api_takes_commands_on_the_socket_only_and_refuses_nonsense_with_a_way_out() -> Result<()> {
    let Some(stage) = Stage::set("overapi", 2)? else { return Ok(()) };
    let top = "metrics: {listen: '127.0.0.1:9465'}".to_owned();
    let balancer = stage.start(&Config { top, ..stage.config() })?;
    for (resource, body, code, words) in [
        ("drain", r#"{"backend": "weeb/web1"}"#, 404, "no pool weeb; did you mean web?"),
        ("drain", r#"{"backend": "web/wbe1"}"#, 404, "pool web has no backend wbe1; did you mean web1?"),
        ("drain", r#"{"backend": "web1"}"#, 404, "POOL/BACKEND"),
        ("drain", r#"{"backend": "web/web1", "timeout": "5"}"#, 400, "timeout: 5 has no unit"),
        ("drain", r#"{"backend": "web/web1", "timeout": "soon"}"#, 400, "timeout: soon is not allowed"),
        ("drain", r#"{"backend": "web/web1", "timeot": "5m"}"#, 400, "timeot"),
        ("drain", "", 400, "the body is not like"),
        ("disable", r#"{"backend": "web/web1", "timeout": "5m"}"#, 400, "timeout"),
        ("enable", "[]", 400, "the body is not like"),
        ("weight", r#"{"backend": "web/web1"}"#, 400, "weight"),
        ("weight", r#"{"backend": "web/web1", "weight": 101}"#, 400, "weight: 101 is not allowed; use 0-100"),
        ("weight", r#"{"backend": "web/web1", "weight": 300}"#, 400, "weight: 300 is not allowed"),
        ("weight", r#"{"backend": "web/web1", "weight": -1}"#, 400, "weight"),
        ("remove", r#"{"backend": "web/web1"}"#, 404, "/v1/backends"),
    ] {
        let (found, error) = post(&balancer, &format!("/v1/backends/{resource}"), body)?;
        ensure!(found == code && error.contains(words), "{resource} {body}: {found} {error}");
    }
    for (words, said) in [
        (&["backend", "drain", "web1"][..], "write its pool"),
        (&["backend", "drain", "web/web1", "--timeout", "5"], "has no unit"),
        (&["backend", "weight", "web/web1", "101"], "101"),
    ] {
        balancer.command(words)?.expect(2, &[said])?;
    }
    balancer.command(&["backend", "enable", "web/web7"])?.expect(1, &["has no backend web7"])?;
    let over_tcp = "http://127.0.0.1:9465/v1/backends/drain";
    let curl = ["curl", "--fail", "--silent", "-d", r#"{"backend": "web/web1"}"#, over_tcp];
    ensure!(stage.balancer.run(curl).is_err(), "a command was taken over TCP");
    ensure!(balancer.backends()?.iter().all(|backend| backend.exit.is_none() && backend.slots > 0));

    let (code, told) = post(&balancer, "/v1/backends/drain", r#"{"backend": "web/web1", "timeout": "5m"}"#)?;
    let told: Commanded = serde_json::from_str(&told).with_context(|| told)?;
    ensure!(code == 200 && told.backend.state == "draining" && told.warnings.is_empty(), "{told:?}");
    let (_, told) = post(&balancer, "/v1/backends/disable", r#"{"backend": "web/web2"}"#)?;
    let told: Commanded = serde_json::from_str(&told).with_context(|| told)?;
    ensure!(told.backend.state == "disabled" && told.warnings[0].contains("dropped"), "{told:?}");
    let metrics = balancer.xlb(&["status", "-o", "json"]).and(stage.balancer.run([
        "curl",
        "--silent",
        "http://127.0.0.1:9465/metrics",
    ]))?;
    for line in [
        r#"xlb_backends{pool="web",state="draining"} 1"#,
        r#"xlb_backends{pool="web",state="disabled"} 1"#,
        r#"xlb_backend_in_use{pool="web",backend="web1",address="10.111.0.11"} 0"#,
        r#"xlb_backend_weight{pool="web",backend="web1",address="10.111.0.11"} 100"#,
    ] {
        ensure!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
    Ok(())
}

#[test]
fn waiting_for_a_drain_ends_when_nothing_is_left() -> Result<()> {
    let Some(stage) = Stage::set("drainwait", 2)? else { return Ok(()) };
    let config = Config { pool: SHORT_IDLE.to_owned(), ..stage.config() };
    let balancer = stage.start(&config)?;
    balancer
        .command(&["backend", "drain", "web/web1", "--wait"])?
        .expect(0, &["web/web1 drains", "web/web1 is drained: nothing is left of it"])?;
    let told = balancer.command(&["backend", "disable", "web/web1", "--wait", "-o", "json"])?;
    told.expect(0, &[])?;
    let told: Commanded = serde_json::from_str(&told.stdout).with_context(|| told.stdout)?;
    ensure!(told.backend.exit.is_some_and(|exit| exit.complete && exit.cause == "disable"));
    Ok(())
}

/// Echo servers behind the VIP, and connections to them that say something now and then.
fn crowd(stage: &Stage) -> Result<(Vec<EchoServer>, Connections)> {
    let servers = stage.backends.iter().map(|backend| EchoServer::start(&backend.host, 7000));
    let servers = servers.collect::<Result<Vec<_>>>()?;
    Ok((servers, connections(stage)?))
}

fn connections(stage: &Stage) -> Result<Connections> {
    let server = format!("{VIP4}:7000").parse()?;
    Connections::open(&stage.client, &["10.111.0.2".parse()?], server, 60, Duration::from_millis(200))
}

fn with_echo(stage: &Stage) -> Config {
    let services = vec![stage::service("echo", &[VIP4], "7000", "tcp")];
    let health = stage::PATIENT_CHECKS.replace("type: http,", "type: http, port: 80,");
    Config { pool: SHORT_IDLE.to_owned(), services, health, ..stage.config() }
}

#[test]
fn old_connections_stay_on_a_drained_backend_until_they_end_and_then_it_is_drained() -> Result<()> {
    let Some(stage) = Stage::set("drainold", 3)? else { return Ok(()) };
    let balancer = stage.start(&with_echo(&stage))?;
    let (_servers, old) = crowd(&stage)?;
    let on_web1 = |connections: &Connections| -> usize {
        connections.all().iter().filter(|connection| connection.server == "web1").count()
    };
    let held = on_web1(&old);
    ensure!(held > 5, "{held} connections");
    balancer.command(&["backend", "drain", "web/web1"])?.expect(0, &[])?;
    let new = connections(&stage)?;
    ensure!(on_web1(&new) == 0, "{} new connections", on_web1(&new));
    // Longer than silent flows are waited for: what is left are pins.
    let is_pinned = |backend: BackendStatus| backend.slots_old == 0 && backend.pins == held as u64;
    wait_for("flows are pinned", PATIENCE, || backend(&balancer, "web1").is_ok_and(is_pinned))?;
    balancer.command(&["status"])?.expect(0, &[&format!("{held} flows, 0 slots")])?;
    old.wait_until_answered(Instant::now(), PATIENCE)?;
    ensure!(old.lost().is_empty() && new.lost().is_empty(), "{:?} {:?}", old.lost(), new.lost());
    ensure!(!backend(&balancer, "web1")?.exit.is_some_and(|exit| exit.complete));

    drop(old);
    balancer.command(&["backend", "drain", "web/web1", "--wait"])?.expect(0, &["web/web1 is drained"])?;
    balancer.process.wait_for_log("backend drained", PATIENCE)?;
    ensure!(new.lost().is_empty(), "{:?}", new.lost());
    Ok(())
}

#[test]
fn what_is_left_at_a_deadline_moves_and_is_told() -> Result<()> {
    let Some(stage) = Stage::set("deadline", 3)? else { return Ok(()) };
    let balancer = stage.start(&with_echo(&stage))?;
    let (_servers, old) = crowd(&stage)?;
    let ended = balancer.command(&["backend", "drain", "web/web1", "--timeout", "2s", "--wait"])?;
    ended.expect(6, &["by its deadline", "were left then and have moved"])?;
    ensure!(balancer.process.log().contains("the drain's deadline has passed"));
    let on_web1 = old.all().iter().filter(|connection| connection.server == "web1").count();
    // Others have no such connection, and say so.
    wait_for("its connections break", PATIENCE, || old.lost().len() == on_web1)?;
    ensure!(old.lost().iter().all(|connection| connection.server == "web1"), "{:?}", old.lost());

    let again = connections(&stage)?;
    balancer.command(&["backend", "disable", "web/web2", "--wait"])?.expect(0, &["web/web2 is drained"])?;
    wait_for("its connections break", PATIENCE, || !again.lost().is_empty())?;
    ensure!(again.lost().iter().all(|connection| connection.server == "web2"), "{:?}", again.lost());
    Ok(())
}

/// Flows of moved slots are protected for a short time.
const SHORT_IDLE: &str = "    idle_timeout: {tcp: 2s, udp: 2s}\n";

#[test]
fn a_backend_that_leaves_the_file_is_gone_when_nothing_is_left_of_it() -> Result<()> {
    let Some(stage) = Stage::set("leave", 3)? else { return Ok(()) };
    let mut config = Config { pool: SHORT_IDLE.to_owned(), ..stage.config() };
    let mut balancer = stage.start(&config)?;
    config.backends.pop();
    let load = traffic(&stage)?;
    balancer.reload(&config.to_string())?;
    let is_gone = |balancer: &Balancer| balancer.backends().is_ok_and(|backends| backends.len() == 2);
    wait_for("web3 is gone", PATIENCE, || is_gone(&balancer))?;
    ensure!(balancer.process.log().contains("backend is gone"));
    ensure!(balancer.xlb(&["verify"])?.contains("no difference"));

    // While no agent runs.
    config.backends.push(stage::backend(2, false));
    balancer.reload(&config.to_string())?;
    balancer.wait_for_backends(3, PATIENCE)?;
    balancer.process.kill();
    config.backends.remove(0);
    std::fs::write(&balancer.config, config.to_string())?;
    balancer.restart()?;
    wait_for("web1 is gone", PATIENCE, || is_gone(&balancer))?;
    ensure!(backend(&balancer, "web3")?.slots > 0);
    let requests = load.stop()?;
    ensure!(lab::failures(&requests).len() <= 6, "{:?}", lab::failures(&requests));
    Ok(())
}

#[test]
fn an_agent_that_starts_lets_nobody_go_and_calls_nobody_drained_before_it_has_counted() -> Result<()> {
    let Some(stage) = Stage::set("recount", 3)? else { return Ok(()) };
    let mut config = with_echo(&stage);
    let mut balancer = stage.start(&config)?;
    let (_servers, old) = crowd(&stage)?;
    config.backends.pop();
    balancer.reload(&config.to_string())?;
    balancer.command(&["backend", "drain", "web/web1"])?.expect(0, &[])?;
    let is_pinned = |name| backend(&balancer, name).is_ok_and(|b| b.slots_old == 0 && b.pins > 0);
    wait_for("flows are pinned", PATIENCE, || is_pinned("web1") && is_pinned("web3"))?;

    balancer.process.kill();
    balancer.restart()?;
    wait_for("pins are counted", PATIENCE, || backend(&balancer, "web1").is_ok_and(|web1| web1.pins > 0))?;
    let log = balancer.process.log();
    let left = backend(&balancer, "web3").with_context(|| log.clone())?;
    ensure!(left.exit.is_some_and(|exit| exit.cause == "removed") && left.pins > 0, "{}", left.state);
    ensure!(!log.contains("backend is gone") && !log.contains("backend drained"), "{log}");
    old.wait_until_answered(Instant::now(), PATIENCE)?;
    ensure!(old.lost().is_empty(), "{:?}", old.lost());
    drop(old);
    wait_for("web3 is gone", PATIENCE, || backend(&balancer, "web3").is_err())?;
    balancer.process.wait_for_log("backend drained", PATIENCE)?;
    Ok(())
}
