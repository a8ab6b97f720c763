//! The commands that ask an agent: what they print, their exit codes, and an agent that goes away meanwhile.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_userspace::agent::verify::Difference;
use lb_userspace::bpf::{BpfFs, Maps};
use lb_userspace::reconcile::op::MapOp;
use serde_json::Value;
use tests::balancer::Balancer;
use tests::lab::{Host, Process, Signal, wait_for};
use tests::stage::{self, Config, PATIENCE, Stage, VIP4};

/// Lines of a table by their first word.
fn line<'t>(table: &'t str, first: &str) -> Result<Vec<&'t str>> {
    let found = table.lines().find(|line| line.split_whitespace().next() == Some(first));
    Ok(found.with_context(|| format!("no {first} in:\n{table}"))?.split_whitespace().collect())
}

fn no_line_is_wider_than_120_columns(text: &str) -> Result<()> {
    let wide = text.lines().find(|line| line.chars().count() > 120);
    ensure!(wide.is_none(), "{}", wide.unwrap_or_default());
    Ok(())
}

#[test]
fn lists_are_sorted_aligned_and_no_wider_than_a_terminal() -> Result<()> {
    let Some(stage) = Stage::set("lists", 2)? else { return Ok(()) };
    let health = stage::PATIENT_CHECKS.replace("type: http", "type: http, port: 80");
    let mut config = Config { health, ..stage.config() };
    config.backends.reverse();
    config.backends.push("{address: 10.111.0.99, name: ghost}".to_owned());
    config.services =
        vec![stage::service("www", &[VIP4], "[443, 80]", "tcp"), stage::service("dns", &[VIP4], "53", "udp")];
    let balancer = Balancer::start(&stage.balancer, &stage.lab.dir().join("xlb"), &config.to_string())?;
    balancer.wait_for_backends(2, PATIENCE)?;

    let list = balancer.xlb(&["backend", "list"])?;
    println!("{list}");
    let names: Vec<_> = list.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1)).collect();
    ensure!(names[..3] == ["web1", "web2", "ghost"], "not by address: {names:?}");
    ensure!(list.contains("\nweb/ghost is unresolved: 10.111.0.99 "), "{list}");
    no_line_is_wider_than_120_columns(&list)?;
    let of_pool = balancer.xlb(&["backend", "list", "--pool", "web", "-o", "json"])?;
    ensure!(serde_json::from_str::<Value>(&of_pool)?.as_array().is_some_and(|all| all.len() == 3));
    balancer.command(&["backend", "list", "--pool", "wbe"])?.expect(1, &["no pool wbe", "there are web"])?;

    let list = balancer.xlb(&["service", "list"])?;
    println!("{list}");
    let vips: Vec<_> = list.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1)).collect();
    ensure!(vips == ["203.0.113.10:53", "203.0.113.10:80", "203.0.113.10:443"], "{vips:?}");
    ensure!(line(&list, "dns")?[5] == "2/3", "{list}");
    for command in [&["status"][..], &["stats"], &["service", "list"]] {
        no_line_is_wider_than_120_columns(&balancer.xlb(command)?)?;
    }
    Ok(())
}

#[test]
fn an_agent_without_services_says_so() -> Result<()> {
    let Some(stage) = Stage::set("nothing", 0)? else { return Ok(()) };
    let yaml = "interfaces: [eth0]\nseed: 5f1d0c3a9be24771\nservices: []\n";
    let balancer = Balancer::start(&stage.balancer, &stage.lab.dir().join("xlb"), yaml)?;
    ensure!(balancer.xlb(&["service", "list"])? == "no services are configured\n");
    ensure!(balancer.xlb(&["backend", "list"])? == "no backends are configured\n");
    let stats = balancer.xlb(&["stats"])?;
    ensure!(stats.starts_with("no services are configured\n\nno backends are configured\n"), "{stats}");
    balancer.command(&["backend", "list", "--pool", "web"])?.expect(1, &["there are none"])
}

/// A service for datagrams that nobody has to answer.
fn datagrams(stage: &Stage) -> Config {
    Config {
        health: "{type: none}".to_owned(),
        services: vec![stage::service("dns", &[VIP4], "53", "udp")],
        ..stage.config()
    }
}

fn send(client: &Host, port: u16, datagrams: usize, payload: usize) -> Result<()> {
    client.inside(|| -> Result<()> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        let bytes = vec![0u8; payload];
        for _ in 0..datagrams {
            socket.send_to(&bytes, (VIP4, port))?;
        }
        Ok(())
    })?
}

#[test]
fn stats_count_what_a_client_sent_and_rates_are_over_the_interval() -> Result<()> {
    let Some(stage) = Stage::set("stats", 2)? else { return Ok(()) };
    let balancer = stage.start(&datagrams(&stage))?;
    let stats = || -> Result<Value> { Ok(serde_json::from_str(&balancer.xlb(&["stats", "-o", "json"])?)?) };
    send(&stage.client, 53, 137, 100)?;
    send(&stage.client, 54, 5, 100)?;
    wait_for("all are counted", PATIENCE, || {
        stats().is_ok_and(|stats| stats["services"][0]["packets"] == 137)
    })?;
    let all = stats()?;
    // IP and UDP headers are the client's, too.
    ensure!(all["services"][0]["bytes"] == 137 * (20 + 8 + 100), "{all}");
    let of_backends = all["backends"].as_array().context("backends")?;
    ensure!(
        of_backends.iter().filter_map(|backend| backend["packets"].as_u64()).sum::<u64>() == 137,
        "{all}"
    );
    let table = balancer.xlb(&["stats"])?;
    println!("{table}");
    ensure!(line(&table, "dns")?[3..] == ["137", "17.1", "KiB"], "{table}");
    ensure!(line(&table, "drop_vip_port")?[1..] == ["drop", "5"], "{table}");

    let done = AtomicBool::new(false);
    thread::scope(|scope| -> Result<()> {
        let sender = scope.spawn(|| -> Result<()> {
            while !done.load(Ordering::Relaxed) {
                send(&stage.client, 53, 10, 97)?;
                thread::sleep(Duration::from_millis(50));
            }
            Ok(())
        });
        let told = balancer.xlb(&["stats", "--rate", "--interval", "500ms", "-o", "json"]);
        let table = balancer.xlb(&["stats", "--rate"]);
        done.store(true, Ordering::Relaxed);
        sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        let told: Value = serde_json::from_str(&told?)?;
        let service = &told["services"][0];
        let rate = service["packets_per_second"].as_f64().context("a rate")?;
        // Some 200 a second, on a machine that may be busy with something else.
        ensure!(rate > 5.0 && rate < 1000.0, "{told}");
        let bits = service["bits_per_second"].as_f64().context("a rate")?;
        ensure!((bits / rate - 8.0 * 125.0).abs() < 0.001, "{told}");
        ensure!(told["interval_seconds"].as_f64().is_some_and(|seconds| seconds >= 0.5), "{told}");
        println!("{}", table?);
        Ok(())
    })?;
    balancer.command(&["stats", "--interval", "1s"])?.expect(2, &["--rate"])
}

fn watch(balancer: &Balancer, arguments: &[&str]) -> Result<Process> {
    let (xlb, run_dir) = (tests::balancer::xlb()?, balancer.run_dir.to_string_lossy());
    let words = [xlb.to_str().context("path")?, "status", "--watch", "200ms", "--run-dir", &run_dir];
    balancer.host.spawn(words.iter().chain(arguments))
}

#[test]
fn a_watched_status_shows_rates_outlives_the_agent_and_ends_with_ctrl_c() -> Result<()> {
    let Some(stage) = Stage::set("watch", 1)? else { return Ok(()) };
    let mut balancer = stage.start(&datagrams(&stage))?;
    let (watch, json) = (watch(&balancer, &[])?, watch(&balancer, &["-o", "json"])?);
    watch.wait_for_log("PACKETS/S", PATIENCE)?;
    let seen = |words: &str| watch.log().matches(words).count();
    send(&stage.client, 53, 100, 100)?;
    watch.wait_until("a rate", PATIENCE, || {
        let rate = |line: &str| line.starts_with("dns ") && !line.ends_with(" 0") && !line.ends_with(" -");
        watch.log().lines().any(rate)
    })?;

    balancer.process.kill();
    watch.wait_for_log("trying again every 200 ms", PATIENCE)?;
    let before = seen("PACKETS/S");
    balancer.restart()?;
    watch.wait_until("it goes on", PATIENCE, || seen("PACKETS/S") > before)?;
    for process in [&watch, &json] {
        process.signal(Signal::INT)?;
        ensure!(process.wait_exit(PATIENCE)?.success());
    }
    for line in json.log().lines().filter(|line| line.starts_with('{')) {
        ensure!(serde_json::from_str::<Value>(line)?["outcomes"].is_array());
    }
    Ok(())
}

#[test]
fn a_reload_is_answered_when_it_is_done_with_what_it_changed_or_what_is_wrong() -> Result<()> {
    let Some(stage) = Stage::set("reloadcmd", 2)? else { return Ok(()) };
    let mut config = stage.config();
    let balancer = stage.start(&config)?;
    let reload = |text: &str| {
        std::fs::write(&balancer.config, text)?;
        balancer.command(&["reload"])
    };
    let gone = config.backends.pop();
    config.services.push(stage::service("other", &[VIP4], "81", "tcp"));
    let words =
        ["reloaded: 2 services, 1 pool with 1 backend", "added: service other", "removed: backend web/web2"];
    reload(&config.to_string())?.expect(0, &words)?;
    ensure!(balancer.status()?.services.len() == 3, "it was answered before it was done");
    config.backends.extend(gone);

    let bad = config.to_string().replace("weight: 100", "weight: 101").replace("port: 81", "port: x");
    let ended = reload(&bad)?;
    ended.expect(
        3,
        &["backends[0].weight: 101", "backends[1].weight: 101", "the last good configuration goes on"],
    )?;
    let json = balancer.command(&["reload", "-o", "json"])?;
    json.expect(3, &[])?;
    let json: Value = serde_json::from_str(&json.stdout)?;
    ensure!(json["problems"][0]["path"] == "pools.web.backends[0].weight", "{json}");
    let elsewhere = Config { interfaces: "[eth0, eth7]".to_owned(), ..config.clone() };
    reload(&elsewhere.to_string())?
        .expect(1, &["no interface eth7", "the last good configuration goes on"])?;
    reload(&config.to_string())?.expect(0, &["added: backend web/web2"])
}

#[test]
fn of_two_reloads_the_earlier_is_told_that_it_was_overtaken() -> Result<()> {
    let Some(stage) = Stage::set("overtaken", 1)? else { return Ok(()) };
    let mut config = stage.config();
    let balancer = stage.start(&config)?;
    // Nobody has this address: its reload waits a second for an answer.
    config.backends.push("{address: 10.111.0.99, name: nobody}".to_owned());
    std::fs::write(&balancer.config, config.to_string())?;
    thread::scope(|scope| {
        let earlier = scope.spawn(|| balancer.command(&["reload"]));
        thread::sleep(Duration::from_millis(300));
        balancer.command(&["reload"])?.expect(0, &["added: backend web/nobody"])?;
        let earlier = earlier.join().map_err(|_| anyhow::anyhow!("the reload panicked"))??;
        earlier.expect(1, &["a later reload overtook this one"])
    })
}

/// What the running agent would not have.
fn tamper(balancer: &Balancer) -> Result<()> {
    let fs = BpfFs::existing(&balancer.run_dir)?.context("nothing is pinned")?;
    let mut maps = Maps::from_pins(&fs)?;
    let image = maps.image()?;
    let word = image.tables.iter().map(|&bits| lb_common::abi::TableWord::from_bits(bits));
    let first =
        word.filter(|word| word.length() > 1).map(|word| word.first_row()).next().context("a table")?;
    maps.apply(&MapOp::WriteSlots { first: first * lb_common::abi::SLOTS_PER_ROW, words: vec![0; 16] })?;
    Ok(())
}

#[test]
fn verify_finds_what_somebody_else_wrote_with_an_agent_and_without() -> Result<()> {
    let Some(stage) = Stage::set("verify", 2)? else { return Ok(()) };
    let mut config = stage.config();
    let mut balancer = stage.start(&config)?;
    let verify = |balancer: &Balancer| {
        let file = balancer.config.to_string_lossy().into_owned();
        balancer.command(&["verify", "-c", &file])
    };
    verify(&balancer)?.expect(0, &["no difference"])?;
    tamper(&balancer)?;
    let ended = verify(&balancer)?;
    println!("{}", ended.stdout);
    ended.expect(5, &["table of pool web, tcp: ", "web/web1", "nobody"])?;
    let json = balancer.command(&["verify", "-o", "json"])?;
    json.expect(5, &[])?;
    let differences: Vec<Difference> = serde_json::from_str(&json.stdout)?;
    ensure!(differences.iter().all(|difference| difference.found == "nobody"), "{differences:?}");
    balancer.command(&["reload"])?.expect(0, &[])?;
    verify(&balancer)?.expect(0, &["no difference"])?;
    std::fs::remove_file(balancer.run_dir.join("bpf/link_eth0"))?;
    verify(&balancer)?.expect(5, &["pin of the link on eth0"])?;

    // The next agent writes what differs.
    balancer.process.kill();
    balancer.command(&["verify"])?.expect(4, &["no agent answers at", "-c"])?;
    balancer.restart()?;
    balancer.wait_for_backends(2, PATIENCE)?;
    balancer.process.kill();
    verify(&balancer)?.expect(0, &["no difference"])?;
    tamper(&balancer)?;
    verify(&balancer)?.expect(5, &["table of pool web, tcp: ", "nobody"])?;

    // A file that is not what is in the kernel.
    config.services = vec![stage::service("www", &[VIP4], "[80, 443]", "tcp")];
    config.backends[0] = "{address: 10.111.0.50, name: new}".to_owned();
    config.interfaces = "[eth0, eth7]".to_owned();
    std::fs::write(&balancer.config, config.to_string())?;
    let ended = verify(&balancer)?;
    println!("{}", ended.stdout);
    let words = [
        "backend web/new",
        // It leaves, and is not forgotten.
        " web/web1",
        "service www, 203.0.113.10:443 tcp",
        "[2001:db8:113::10]:80 tcp (of no service)",
        "interface eth7",
        "features of the program",
    ];
    ended.expect(5, &words)?;
    std::fs::write(&balancer.config, config.to_string().replace("port", "prot"))?;
    verify(&balancer)?.expect(3, &["is not a known key"])?;
    stage.balancer.ip("link set eth0 xdp off").ok();
    Ok(())
}

#[test]
fn every_exit_code_is_what_the_docs_say() -> Result<()> {
    let Some(stage) = Stage::set("codes", 1)? else { return Ok(()) };
    let balancer = stage.start(&stage.config())?;
    for command in
        [&["status"][..], &["backend", "list"], &["service", "list"], &["stats"], &["reload"], &["verify"]]
    {
        balancer.command(command)?.expect(0, &[])?;
    }
    balancer.command(&["lookup", "10.111.0.2:1", "203.0.113.10:81"])?.expect(1, &["drop_vip_port"])?;
    balancer.command(&["stats", "--interval"])?.expect(2, &["--interval"])?;
    balancer.command(&["status", "--watch", "1h"])?.expect(2, &["100ms"])?;
    std::fs::write(&balancer.config, "interfaces: [eth0]\nservices: 1\n")?;
    balancer.command(&["reload"])?.expect(3, &["services: 1 is not allowed"])?;
    balancer.process.kill();
    for command in
        [&["status"][..], &["backend", "list"], &["service", "list"], &["stats"], &["reload"], &["verify"]]
    {
        balancer.command(command)?.expect(4, &["no agent answers at", "xlb run -c FILE"])?;
    }
    // 5 is in the test of verify.
    Ok(())
}
