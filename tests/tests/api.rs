//! The admin API under every kind of client: who may use it, what it says, and what hostile ones cannot do.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::balancer::{Balancer, Ended, xlb};
use tests::lab::{Host, wait_for};
use tests::stage::{Config, PATIENCE, Stage};

fn socket(balancer: &Balancer) -> std::path::PathBuf {
    balancer.run_dir.join("xlb.sock")
}

/// Sends bytes and reads until the other end closes, or for too long.
fn raw(socket: &Path, bytes: &[u8]) -> Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // A server that has heard enough may close before it has read all.
    _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    _ = stream.read_to_end(&mut answer);
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// Status and JSON body of a request.
fn ask(socket: &Path, method: &str, resource: &str) -> Result<(u16, Value)> {
    let answer = raw(socket, format!("{method} {resource} HTTP/1.1\r\nhost: xlb\r\n\r\n").as_bytes())?;
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).context(answer.clone())?;
    let body = answer.split_once("\r\n\r\n").context(answer.clone())?.1;
    Ok((status, serde_json::from_str(body).with_context(|| answer.clone())?))
}

/// Status and JSON body of a request with a body.
fn post(socket: &Path, resource: &str, body: &str) -> Result<(u16, Value)> {
    let head = format!("POST {resource} HTTP/1.1\r\nhost: xlb\r\ncontent-length: {}\r\n\r\n", body.len());
    let answer = raw(socket, format!("{head}{body}").as_bytes())?;
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).context(answer.clone())?;
    let body = answer.split_once("\r\n\r\n").context(answer.clone())?.1;
    Ok((status, serde_json::from_str(body).with_context(|| answer.clone())?))
}

#[test]
fn given_frames_are_explained_in_their_order_and_bounded() -> Result<()> {
    let Some(stage) = Stage::set("frames", 1)? else { return Ok(()) };
    let balancer = stage.start(&stage.config())?;
    let socket = socket(&balancer);
    let ask = |body: &str| post(&socket, "/v1/lookup", body);
    // An ARP header, and an IPv4 packet that ends before its addresses.
    let (arp, short) = (format!("{}0806", "02".repeat(12)), format!("{}080045", "02".repeat(12)));
    let (code, told) = ask(&format!(
        r#"{{"frames": [{{"hex": "{arp}"}}, {{"hex": "{short}", "length": 1000}}, {{"hex": "{short}"}}], "interface": "eth0"}}"#
    ))?;
    let outcomes: Vec<_> = (0..3).map(|index| told[index]["outcome"].as_str().unwrap_or_default()).collect();
    ensure!(code == 200 && outcomes == ["pass_not_ip", "pass_not_vip", "pass_truncated"], "{code}: {told}");
    ensure!(told[1]["frame"]["length"] == 1000 && told[0]["ingress"] == "eth0", "{told}");

    let many = vec![r#"{"hex": "00"}"#; 257].join(",");
    for (body, code, words) in [
        ("", 400, "frames"),
        ("{}", 400, "frames"),
        (r#"{"frames": [], "inteface": "eth0"}"#, 400, "inteface"),
        (r#"{"frames": []}"#, 400, "0 frames are not 1 to 256"),
        (&format!(r#"{{"frames": [{many}]}}"#), 400, "257 frames are not 1 to 256"),
        (r#"{"frames": [{"hex": "00"}, {"hex": "0g"}]}"#, 400, "frames[1]: character 2, `g`"),
        (r#"{"frames": [{"hex": ""}]}"#, 400, "frames[0]: the frame is empty"),
        (r#"{"frames": [{"hex": "00", "length": 65537}]}"#, 400, "65536 at the most"),
        (r#"{"frames": [{"hex": "00"}], "interface": "eth7"}"#, 400, "xlb is not on an interface eth7"),
        (&"0".repeat(70_000), 413, "64 KiB"),
    ] {
        let (found, error) = ask(body)?;
        let text = error["error"].as_str().unwrap_or_default();
        ensure!(found == code && text.contains(words), "{}: {found} {error}", &body[..body.len().min(60)]);
    }
    ensure!(!balancer.process.log().contains("/v1/lookup"), "a question is logged as a change");
    Ok(())
}

#[test]
fn every_resource_answers_and_every_error_is_json_with_a_way_out() -> Result<()> {
    let Some(stage) = Stage::set("resources", 2)? else { return Ok(()) };
    let balancer = stage.start(&stage.config())?;
    let socket = socket(&balancer);
    let get = |resource: &str| ask(&socket, "GET", resource);

    let (code, version) = get("/v1/version")?;
    ensure!(code == 200 && version["hash_version"] == 1, "{version}");
    let (_, backends) = get("/v1/backends")?;
    ensure!(backends.as_array().is_some_and(|all| all.len() == 2), "{backends}");
    let (_, services) = get("/v1/services")?;
    ensure!(services[0]["name"] == "www" && services[0]["backends_up"] == 2, "{services}");
    let (_, status) = get("/v1/status")?;
    ensure!(status["backends"][0]["slots"] == backends[0]["slots"], "{status}");
    let (_, first) = get("/v1/stats")?;
    let (_, second) = get("/v1/stats")?;
    ensure!(second["monotonic_ns"].as_u64() > first["monotonic_ns"].as_u64(), "{first} {second}");
    let (code, verify) = get("/v1/verify")?;
    ensure!(code == 200 && verify == Value::Array(Vec::new()), "{verify}");
    let (code, found) = get("/v1/lookup?source=192.0.2.1:1&vip=203.0.113.10:80&protocol=tcp")?;
    ensure!(code == 200 && found["service"] == "www", "{found}");
    let (code, summary) = ask(&socket, "POST", "/v1/reload")?;
    ensure!(code == 200 && summary["backends"] == 2, "{summary}");

    for (method, resource, code, words) in [
        ("GET", "/v1/nothing", 404, "/v1/status"),
        ("GET", "/", 404, "/v1/status"),
        ("POST", "/v1/status", 405, "takes GET"),
        ("DELETE", "/v1/backends", 405, "takes GET"),
        ("GET", "/v1/reload", 405, "takes POST"),
        ("DELETE", "/v1/lookup", 405, "takes GET or POST"),
        ("GET", "/v1/lookup?source=192.0.2.1:1&vip=203.0.113.10:80&protocol=tcp&interface=eth7", 400, "eth0"),
        ("GET", "/v1/lookup", 400, "source"),
        ("GET", "/v1/lookup?source=a&vip=b&protocol=c", 400, "source"),
        ("GET", "/v1/lookup?source=192.0.2.1:1&vip=203.0.113.10:80&protocol=icmp", 400, "tcp or udp"),
    ] {
        let (found, error) = ask(&socket, method, resource)?;
        let text = error["error"].as_str().unwrap_or_default();
        ensure!(found == code && text.contains(words), "{method} {resource}: {found} {error}");
    }
    Ok(())
}

/// Runs `xlb status` as somebody else, from a copy that everybody may run.
fn as_user(balancer: &Balancer, lab: &Path, ids: &[&str]) -> Result<Ended> {
    let copy = lab.join("xlb-for-all");
    if !copy.exists() {
        std::fs::copy(xlb()?, &copy)?;
    }
    let mut command = Command::new("setpriv");
    command.args(ids).arg(&copy).args(["status", "--run-dir"]).arg(&balancer.run_dir);
    Ended::of(&mut command)
}

#[test]
fn fault_30_only_the_owner_and_the_group_may_ask_and_who_changes_anything_is_logged() -> Result<()> {
    let Some(stage) = Stage::set("uids", 1)? else { return Ok(()) };
    let mut config = stage.config();
    let balancer = stage.start(&config)?;
    let lab = stage.lab.dir();
    let ask = |ids: &[&str]| as_user(&balancer, lab, ids);
    let nobody = ["--reuid", "65534", "--regid", "65534", "--clear-groups"];
    let member = ["--reuid", "65534", "--regid", "65534", "--groups", "54321"];
    let denied = ["may not be opened", "root", "group"];

    ask(&nobody)?.expect(1, &denied)?;
    ask(&member)?.expect(1, &denied)?;
    config.top = "api: {group: 54321}".to_owned();
    std::fs::write(&balancer.config, config.to_string())?;
    balancer.command(&["reload"])?.expect(0, &["reloaded"])?;
    ask(&nobody)?.expect(1, &denied)?;
    ask(&member)?.expect(0, &["web1"])?;
    config.top = String::new();
    std::fs::write(&balancer.config, config.to_string())?;
    balancer.command(&["reload"])?.expect(0, &["reloaded"])?;
    ask(&member)?.expect(1, &denied)?;

    let log = balancer.process.log();
    let line = log.lines().find(|line| line.contains("API request")).context("no line names the request")?;
    for words in ["uid=0", "pid=", "method=POST", "resource=\"/v1/reload\"", "result=200"] {
        ensure!(line.contains(words), "{words}: {line}");
    }
    ensure!(!log.contains("/v1/status"), "reads are logged:\n{log}");
    Ok(())
}

#[test]
fn a_group_that_the_host_does_not_have_is_refused_with_its_place_and_check_only_warns() -> Result<()> {
    let Some(stage) = Stage::set("nogroup", 1)? else { return Ok(()) };
    let config = Config { top: "api: {group: no-such-group}".to_owned(), ..stage.config() };
    let file = stage.balancer.new_file("refused.yaml");
    std::fs::write(&file, config.to_string())?;
    let (file, run_dir) = (file.to_string_lossy(), stage.balancer.new_file("run"));
    let run = ["run", "-c", &file, "--run-dir", &run_dir.to_string_lossy()];
    let words = ["refused.yaml:3:14 api.group: this host has no group no-such-group", "groupadd"];
    Ended::of_xlb(&stage.balancer, &run)?.expect(3, &words)?;
    ensure!(!run_dir.join("xlb.sock").exists() && !run_dir.join("bpf").exists(), "something is left");
    Ended::of_xlb(&stage.balancer, &["check", "-c", &file])?.expect(0, &["warning: ", words[0], "valid"])?;

    let balancer = stage.start(&stage.config())?;
    std::fs::write(&balancer.config, config.to_string())?;
    balancer.command(&["reload"])?.expect(3, &["api.group: this host has no group"])?;
    ensure!(balancer.status()?.last_reload.is_some_and(|reload| reload.error.is_some()));
    Ok(())
}

/// How long a resource takes to answer.
fn time_of_status(balancer: &Balancer) -> Result<Duration> {
    let begin = Instant::now();
    balancer.status()?;
    Ok(begin.elapsed())
}

#[test]
fn fault_31_slow_huge_idle_and_garbled_clients_disturb_nobody() -> Result<()> {
    let Some(stage) = Stage::set("hostile", 2)? else { return Ok(()) };
    let health = "{type: http, path: /healthz, interval: 300ms, timeout: 300ms, rise: 1, fall: 3}".to_owned();
    let balancer = stage.start(&Config { health, ..stage.config() })?;
    let socket = socket(&balancer);

    let idle = (0..500).map(|_| UnixStream::connect(&socket)).collect::<std::io::Result<Vec<_>>>()?;
    let took = time_of_status(&balancer)?;
    println!("with 500 idle connections before it, status took {took:?}");
    ensure!(took < Duration::from_secs(8), "{took:?}");

    thread::scope(|scope| -> Result<()> {
        let socket = &socket;
        let slow_header = scope.spawn(move || -> Result<Duration> {
            let mut stream = UnixStream::connect(socket)?;
            let begin = Instant::now();
            stream.write_all(b"GET /v1/status HTTP/1.1\r\nx: ")?;
            while begin.elapsed() < PATIENCE && stream.write_all(b"x").is_ok() {
                thread::sleep(Duration::from_millis(100));
            }
            Ok(begin.elapsed())
        });
        let slow_body = scope.spawn(move || {
            let head = b"POST /v1/reload HTTP/1.1\r\nhost: xlb\r\ncontent-length: 10\r\n\r\n12";
            raw(socket, head)
        });
        let mut huge_header = b"GET /v1/status HTTP/1.1\r\nhost: xlb\r\nx: ".to_vec();
        huge_header.resize(1 << 20, b'x');
        let answer = raw(socket, &huge_header)?;
        ensure!(answer.starts_with("HTTP/1.1 431"), "{answer}");
        let mut huge_body =
            b"POST /v1/reload HTTP/1.1\r\nhost: xlb\r\ncontent-length: 100000\r\n\r\n".to_vec();
        huge_body.resize(100_000, b'x');
        let answer = raw(socket, &huge_body)?;
        ensure!(answer.starts_with("HTTP/1.1 413") && answer.contains("64 KiB"), "{answer}");
        for garbage in [
            &b"\0\x01\x02\r\n\r\n"[..],
            b"GET\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"\r\n\r\n\r\n",
        ] {
            // What it says is of no account, but it ends.
            let begin = Instant::now();
            raw(socket, garbage)?;
            ensure!(begin.elapsed() < PATIENCE, "{garbage:?}");
        }
        time_of_status(&balancer)?;

        let slow = slow_header.join().map_err(|_| anyhow::anyhow!("the slow client panicked"))??;
        ensure!(slow >= Duration::from_secs(4) && slow < PATIENCE, "a slow header was borne for {slow:?}");
        let answer = slow_body.join().map_err(|_| anyhow::anyhow!("the slow client panicked"))??;
        ensure!(answer.starts_with("HTTP/1.1 408") && answer.contains("did not arrive"), "{answer}");
        Ok(())
    })?;
    // Checks went on meanwhile, and go on.
    stage.backends[1].nginx.process.kill();
    balancer.wait_for_backends(1, PATIENCE)?;
    drop(idle);
    ensure!(time_of_status(&balancer)? < Duration::from_secs(5));
    let log = balancer.process.log();
    ensure!(!log.contains("panicked") && !log.contains("backend down pool=web backend=web1"), "{log}");
    Ok(())
}

#[test]
fn fault_31_clients_that_come_and_go_leave_no_descriptor_behind() -> Result<()> {
    let Some(stage) = Stage::set("leak", 1)? else { return Ok(()) };
    let balancer = stage.start(&stage.config())?;
    let socket = socket(&balancer);
    let fds = || -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", balancer.process.pid()))?.count())
    };
    balancer.status()?;
    let before = fds()?;
    for round in 0..2000 {
        let mut stream = UnixStream::connect(&socket)?;
        if round % 2 == 0 {
            stream.write_all(b"GET /v1/status HTTP/1.1\r\nhost: xlb\r\n\r\n")?;
        }
    }
    balancer.status()?;
    // Checks open and close descriptors of their own.
    wait_for("descriptors are as before", PATIENCE, || fds().is_ok_and(|now| now <= before + 4))
}

fn listens(host: &Host, address: &str) -> Result<bool> {
    let listening = host.run(["ss", "-Hltn"])?;
    Ok(listening.contains(&format!("{address} ")))
}

#[test]
fn metrics_listen_where_the_file_says_and_a_reload_that_cannot_changes_nothing() -> Result<()> {
    let Some(stage) = Stage::set("listen", 1)? else { return Ok(()) };
    let mut config = Config { top: "metrics: {listen: '127.0.0.1:9465'}".to_owned(), ..stage.config() };
    let balancer = stage.start(&config)?;
    let curl = |url: &str| stage.balancer.run(["curl", "--fail", "--silent", "--globoff", url]);
    ensure!(curl("http://127.0.0.1:9465/metrics")?.contains("xlb_backend_up"));
    ensure!(curl("http://127.0.0.1:9465/")?.contains("/metrics"));
    for elsewhere in ["v1/status", "v1/reload", "nothing"] {
        ensure!(
            curl(&format!("http://127.0.0.1:9465/{elsewhere}")).is_err(),
            "{elsewhere} is served over TCP"
        );
    }
    let post = ["curl", "--fail", "--silent", "-X", "POST", "http://127.0.0.1:9465/v1/reload"];
    ensure!(stage.balancer.run(post).is_err());

    config.top = "metrics: {listen: ['[::1]:9466', '127.0.0.1:9467']}".to_owned();
    balancer.reload(&config.to_string())?;
    ensure!(curl("http://[::1]:9466/metrics")?.contains("xlb_backend_up"));
    wait_for("the old address is left", PATIENCE, || {
        listens(&stage.balancer, "127.0.0.1:9465").is_ok_and(|is| !is)
    })?;

    // Somebody else has it.
    let _other = stage.balancer.inside(|| std::net::TcpListener::bind("127.0.0.1:9468"))??;
    config.top = "metrics: {listen: ['127.0.0.1:9469', '127.0.0.1:9468']}\nvip_arp: true".to_owned();
    std::fs::write(&balancer.config, config.to_string())?;
    let words = ["xlb.yaml:3:38 metrics.listen[1]: cannot listen on 127.0.0.1:9468", "in use", "ss -ltnp"];
    balancer.command(&["reload"])?.expect(1, &words)?;
    ensure!(curl("http://[::1]:9466/metrics")?.contains("xlb_config_last_reload_successful 0"));
    ensure!(!listens(&stage.balancer, "127.0.0.1:9469")?, "half of a refused reload is in force");

    balancer.process.signal(tests::lab::Signal::TERM)?;
    balancer.process.wait_exit(PATIENCE)?;
    let (file, run_dir) = (balancer.config.to_string_lossy(), stage.lab.dir().join("other"));
    let run = ["run", "-c", &file, "--run-dir", &run_dir.to_string_lossy()];
    Ended::of_xlb(&stage.balancer, &run)?.expect(1, &words)?;
    ensure!(!run_dir.join("bpf").exists(), "a start that failed left a mount");
    Ok(())
}
