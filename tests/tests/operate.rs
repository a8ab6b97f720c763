//! The agent under an operator's hands while traffic flows: reload, kill, restart, stop, detach.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lb_userspace::bpf::BpfFs;
use tests::balancer::Balancer;
use tests::lab::{self, HttpLoad, RunningLoad, Signal};
use tests::stage::{self, Config, PATIENCE, Stage, URL4, URL6, URLS, VIP4, VIP6};

const CLIENTS: usize = 4;

/// 200 requests a second until it is stopped.
fn traffic(stage: &Stage) -> Result<RunningLoad> {
    let load = HttpLoad::new(URL4, 100_000).parallel(CLIENTS as u32).rate(50).start(&stage.client)?;
    sleep(Duration::from_millis(300));
    Ok(load)
}

#[test]
fn backends_come_and_go_by_reload_under_traffic() -> Result<()> {
    let Some(mut stage) = Stage::set("pools", 3)? else { return Ok(()) };
    let mut config = stage.config();
    let balancer = stage.start(&config)?;
    let load = traffic(&stage)?;

    stage.add_backend()?;
    config.backends.push(stage::backend(3, false));
    let mut changes = Vec::new();
    let mut change = |config: &Config| -> Result<()> {
        let begin = Instant::now();
        balancer.reload(&config.to_string())?;
        balancer.wait_for_backends(config.backends.len(), PATIENCE)?;
        changes.push([begin, Instant::now()]);
        sleep(Duration::from_millis(300));
        Ok(())
    };
    change(&config)?;
    ensure!(balancer.backends()?.iter().all(|backend| backend.slots > 0));
    // Its process lives: who is taken out of the file gets nothing more, dead or not.
    config.backends.remove(0);
    change(&config)?;
    config.backends[1] = stage::weighted(2, false, 20);
    change(&config)?;
    let requests = load.stop()?;

    let whole = [changes[0][0], changes[2][1]];
    stage::none_failed_but_in_flight(&requests, changes.len() * CLIENTS, whole)?;
    let late = changes[1][1] + Duration::from_millis(200);
    let after: Vec<_> = requests.into_iter().filter(|request| request.start > late).collect();
    let shares = lab::backends(&after);
    ensure!(!shares.contains_key("web1") && shares.contains_key("web4"), "{shares:?}");
    // 100, 20, 100.
    let slots: Vec<u64> = balancer.backends()?.iter().map(|backend| backend.slots).collect();
    let ratio = slots[1] as f64 / slots[0] as f64;
    ensure!((0.18..0.22).contains(&ratio), "{slots:?}");
    Ok(())
}

#[test]
fn ports_families_and_ways_to_backends_change_without_a_failed_request() -> Result<()> {
    let Some(stage) = Stage::set("services", 3)? else { return Ok(()) };
    let mut config = Config { services: vec![stage::service("www", &[VIP4], "80", "tcp")], ..stage.config() };
    let balancer = stage.start(&config)?;
    for backend in &stage.backends {
        lab::nginx(
            &backend.host,
            &format!("{}-second", backend.host.name()),
            lab::Nginx { ports: vec![8080], ..lab::Nginx::default() },
        )?;
    }
    // Of ports that no client here has: what those have may be pinned.
    let flows = || -> Result<Vec<String>> {
        (2000..2050)
            .map(|port| balancer.lookup(&format!("10.111.0.2:{port}"), &format!("{VIP4}:80")))
            .collect()
    };
    let (before, link) = (flows()?, balancer.link_id()?);
    let load = traffic(&stage)?;
    let change = |config: &Config| -> Result<()> {
        balancer.reload(&config.to_string())?;
        sleep(Duration::from_millis(200));
        ensure!(flows()? == before, "flows moved");
        Ok(())
    };

    config.services[0] = stage::service("www", &[VIP4], "[80, 8080]", "tcp");
    change(&config)?;
    let answer = lab::http_get(&stage.client, "http://203.0.113.10:8080/")?.1;
    ensure!(answer.ends_with("-second\n"), "{answer}");

    // IPv6 is not in the program until a service needs it.
    let program = balancer.program_id()?;
    config.services.push(stage::service("www6", &[VIP6], "80", "tcp"));
    change(&config)?;
    ensure!(lab::http_get(&stage.client, URL6)?.0 == 200);
    ensure!(balancer.program_id()? != program, "the program was not swapped");

    config.forward = "l2".to_owned();
    change(&config)?;
    let decapsulated = balancer.backends()?;
    ensure!(decapsulated.iter().all(|backend| backend.forward == "l2" && backend.state == "up"));
    config.forward = "ipip".to_owned();
    change(&config)?;
    config.services.pop();
    change(&config)?;
    ensure!(balancer.outcome("forward_transmit")? > 0);
    ensure!(balancer.link_id()? == link, "the interface was detached in between");
    stage::none_failed(&load.stop()?)
}

#[test]
fn a_bad_file_changes_nothing_and_the_log_has_its_places() -> Result<()> {
    let Some(stage) = Stage::set("badfile", 2)? else { return Ok(()) };
    let config = stage.config();
    let balancer = stage.start(&config)?;
    let before = balancer.tables()?;
    let load = traffic(&stage)?;
    let bad = config.to_string().replace("weight: 100", "weight: 1000");
    let refused = balancer.reload(&bad).expect_err("a bad file was taken").to_string();
    ensure!(refused.contains("weight") && refused.contains("1000"), "{refused}");
    let log = balancer.process.log();
    let line = log.lines().find(|line| line.contains("backends[0].weight")).context("no line names it")?;
    let place = line.split("xlb.yaml:").nth(1).context("no place")?;
    let number = 1 + bad.lines().position(|line| line.contains("1000")).context("the mistake")?;
    ensure!(place.starts_with(&format!("{number}:")), "not line {number}: {line}");
    ensure!(log.contains("the last good configuration goes on"), "{log}");
    ensure!(balancer.xlb(&["status"])?.contains("The last reload was refused"));

    // Half a file, as an editor leaves it for a moment.
    let whole = config.to_string();
    let half = &whole[..whole.find("services:").context("services")? + 14];
    ensure!(balancer.reload(half).is_err());
    // What the file asks for cannot be had.
    let elsewhere = Config { interfaces: "[eth0, eth7]".to_owned(), ..config.clone() };
    let refused = balancer.reload(&elsewhere.to_string()).expect_err("no such interface").to_string();
    ensure!(refused.contains("eth7"), "{refused}");
    let limits = Config { top: "limits: {backends: 1}\n".to_owned(), ..config.clone() };
    let refused = balancer.reload(&limits.to_string()).expect_err("more than the limits").to_string();
    ensure!(refused.contains("limits.backends"), "{refused}");
    ensure!(balancer.tables()? == before, "a refused file changed the tables");

    balancer.reload(&config.to_string())?;
    ensure!(!balancer.xlb(&["status"])?.contains("refused"));
    ensure!(balancer.tables()? == before, "the same file changed the tables");
    ensure!(balancer.backends()?.iter().all(|backend| backend.state == "up"));
    stage::none_failed(&load.stop()?)
}

#[test]
fn fault_01_a_killed_agent_leaves_traffic_flowing_and_the_next_one_takes_over() -> Result<()> {
    let Some(stage) = Stage::set("killagent", 3)? else { return Ok(()) };
    let mut balancer = stage.start(&stage.config())?;
    let (before, flows, link) = (balancer.tables()?, balancer.places()?, balancer.link_id()?);
    let load = traffic(&stage)?;

    balancer.process.kill();
    ensure!(balancer.status().is_err());
    stage.balances(URL6, 200, 3)?;
    // The pinned maps tell, by address: names died with the agent.
    for (source, vip) in
        [("10.111.0.2:2000", "203.0.113.10:80"), ("[fd00:111::2]:2000", "[2001:db8:113::10]:80")]
    {
        let told = balancer.xlb(&["lookup", source, vip])?;
        let name = &flows[source];
        let index = name.strip_prefix("web").and_then(|n| n.parse::<usize>().ok()).context(name.clone())? - 1;
        ensure!(told.contains(&format!("at {} ", stage::address(index, false))), "{name} is not in {told}");
    }

    balancer.restart()?;
    balancer.process.wait_for_log("maps of an earlier agent taken over", PATIENCE)?;
    // At once: backends are up until their first verdict says otherwise.
    ensure!(balancer.places()? == flows, "flows moved");
    ensure!(balancer.tables()? == before, "the tables changed");
    ensure!(balancer.link_id()? == link, "attached anew");
    balancer.wait_for_backends(3, PATIENCE)?;
    ensure!(balancer.tables()? == before, "the tables changed with the first verdicts");
    stage::none_failed(&load.stop()?)
}

/// The file may have changed while no agent ran; packets go on by the old tables until there are new ones.
#[test]
fn an_agent_that_starts_with_another_file_takes_over_without_a_failed_request() -> Result<()> {
    let Some(stage) = Stage::set("otherfile", 2)? else { return Ok(()) };
    let mut config = stage.config();
    let mut balancer = stage.start(&config)?;
    // Keeps the first look at next hops waiting for all of its time.
    config.backends.push("{address: 10.111.0.99, name: ghost}".to_owned());
    let load = traffic(&stage)?;
    for forward in ["l2", "ipip"] {
        balancer.process.kill();
        config.forward = forward.to_owned();
        std::fs::write(&balancer.config, config.to_string())?;
        balancer.restart()?;
        let running = || balancer.process.log().contains("running");
        lab::wait_for("the agent runs", PATIENCE, running)?;
        ensure!(balancer.backends()?[0].forward == forward);
        sleep(Duration::from_millis(300));
    }
    ensure!(balancer.outcome("drop_inconsistent")? == 0, "the program met tables that it cannot read");
    stage::none_failed(&load.stop()?)
}

#[test]
fn an_interface_that_left_the_file_while_no_agent_ran_is_given_back() -> Result<()> {
    let Some(stage) = Stage::set("leftfile", 1)? else { return Ok(()) };
    let inside = stage.lab.switch("inside")?;
    stage.balancer.add_interface(&inside, &["10.112.0.3/24"])?;
    stage.balancer.run(["ethtool", "-K", "eth1", "gro", "on"])?;
    let gro = || -> Result<bool> {
        let list = stage.balancer.run(["ethtool", "-k", "eth1"])?;
        Ok(list.contains("generic-receive-offload: on"))
    };
    let mut config =
        Config { interfaces: "[eth0, {name: eth1, mode: generic}]".to_owned(), ..stage.config() };
    let mut balancer = stage.start(&config)?;
    ensure!(!gro()?);
    balancer.process.kill();
    config.interfaces = "[eth0]".to_owned();
    std::fs::write(&balancer.config, config.to_string())?;
    balancer.restart()?;
    ensure!(!stage.balancer.ip("link show eth1")?.contains("xdp"));
    ensure!(balancer.tables()?.interfaces.len() == 1);
    ensure!(gro()?, "GRO stays off");
    Ok(())
}

#[test]
fn a_backend_that_dies_while_no_agent_runs_is_found_by_the_next_one() -> Result<()> {
    let Some(stage) = Stage::set("deadmeanwhile", 3)? else { return Ok(()) };
    let health = "{type: tcp, interval: 300ms, timeout: 300ms, rise: 1, fall: 2}".to_owned();
    let mut balancer = stage.start(&Config { health, ..stage.config() })?;
    let flows = balancer.places()?;
    balancer.process.kill();
    stage.backends[2].nginx.process.kill();
    balancer.restart()?;
    balancer.wait_for_backends(2, PATIENCE)?;
    let now = balancer.places()?;
    for (source, place) in &flows {
        let right = if place == "web3" { now[source] != "web3" } else { now[source] == *place };
        ensure!(right, "{source}: {place} to {}", now[source]);
    }
    stage.balances(URL4, 200, 2)
}

#[test]
fn stopping_leaves_traffic_flowing_and_detach_removes_everything() -> Result<()> {
    let Some(stage) = Stage::set("stop", 2)? else { return Ok(()) };
    let balancer = stage.start(&stage.config())?;
    let load = traffic(&stage)?;
    let refused = format!("{:#}", balancer.xlb(&["detach"]).expect_err("detached under a running agent"));
    ensure!(refused.contains("an agent that runs would attach again"), "{refused}");

    balancer.process.signal(Signal::TERM)?;
    let status = balancer.process.wait_exit(PATIENCE)?;
    ensure!(status.success(), "{status}");
    ensure!(balancer.process.log().contains("forwarding goes on"));
    for url in URLS {
        stage.balances(url, 200, 2)?;
    }
    stage::none_failed(&load.stop()?)?;

    let told = balancer.xlb(&["detach"])?;
    ensure!(told.contains("detached from eth0"), "{told}");
    let link = stage.balancer.ip("link show eth0")?;
    ensure!(!link.contains("xdp"), "{link}");
    ensure!(BpfFs::existing(&balancer.run_dir)?.is_none());
    ensure!(!balancer.run_dir.join("bpf").exists());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let run_dir = balancer.run_dir.to_string_lossy();
    ensure!(!mounts.contains(&*run_dir), "still mounted");
    let short = Duration::from_millis(300);
    ensure!(lab::http_get_within(&stage.client, URL4, short, short).is_err(), "who forwards?");
    ensure!(balancer.xlb(&["detach"])?.contains("nothing is pinned"));
    Ok(())
}

/// How often the threads of a process have gone to sleep by themselves.
fn sleeps(pid: u32) -> Result<u64> {
    let mut all = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = std::fs::read_to_string(task?.path().join("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        all += line.context("no count of switches")?.trim().parse::<u64>()?;
    }
    Ok(all)
}

#[test]
fn an_agent_with_nothing_to_do_sleeps_also_while_a_backend_is_down() -> Result<()> {
    const WATCHED: Duration = Duration::from_secs(5);
    let Some(stage) = Stage::set("idle", 2)? else { return Ok(()) };
    stage.backends[0].nginx.process.kill();
    let health = "{type: tcp, interval: 60s, timeout: 300ms, rise: 1, fall: 1}".to_owned();
    let config = Config { health, ..stage.config() };
    let balancer = Balancer::start(&stage.balancer, &stage.lab.dir().join("xlb"), &config.to_string())?;
    balancer.wait_for_backends(1, PATIENCE)?;
    let is_down = || balancer.backends().is_ok_and(|all| all.iter().any(|one| one.health == "down"));
    lab::wait_for("a backend is down", PATIENCE, is_down)?;
    // What a start leaves to be done takes a second or two.
    sleep(Duration::from_secs(3));
    let before = sleeps(balancer.process.pid())?;
    sleep(WATCHED);
    let rate = (sleeps(balancer.process.pid())? - before) as f64 / WATCHED.as_secs_f64();
    ensure!(rate < 30.0, "it sleeps {rate} times a second, and so it wakes up");
    Ok(())
}
