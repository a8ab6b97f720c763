//! What the agent knows of connections whose addresses are translated: lists, flushes, drains, failures and its own death.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lb_common::abi::{Pin, PinState, Record};
use lb_userspace::agent::connections::{Connection, ConnectionState};
use lb_userspace::reconcile::pins::coarse_ns;
use tests::balancer::Balancer;
use tests::between::{self, Between, CLIENTS, Config, Mode, SAME, SOURCES, backend};
use tests::held::SHORT_IDLE;
use tests::lab::{Connections, EchoServer, HttpLoad, Signal, wait_for};
use tests::stage::{self, PATIENCE};

const PORT: u16 = 7000;
const EVERY: Duration = Duration::from_millis(250);

/// Backends with echo servers, of which the agent knows some.
struct Scene {
    servers: Vec<EchoServer>,
    config: Config,
    balancer: Balancer,
    /// Last, so that a failed test's lab is removed after everything else of it.
    between: Between,
}

impl Scene {
    fn set(name: &str, mode: Mode, backends: usize, top: &str) -> Result<Option<Self>> {
        Self::with(name, mode, backends, |config| Config { top: format!("{top}\n"), ..config })
    }

    fn with(
        name: &str,
        mode: Mode,
        backends: usize,
        change: impl FnOnce(Config) -> Config,
    ) -> Result<Option<Self>> {
        let Some(between) = Between::set(name, mode, backends)? else { return Ok(None) };
        let servers = between.backends.iter().map(|backend| EchoServer::start(&backend.host, PORT));
        let servers = servers.collect::<Result<Vec<_>>>()?;
        let config = change(Config { ports: PORT.to_string(), ..between.config() });
        let balancer = between.start(&config)?;
        Ok(Some(Self { servers, config, balancer, between }))
    }

    fn open(&self, count: usize) -> Result<Connections> {
        let server = format!("{}:{PORT}", SAME[0]).parse()?;
        Connections::open(&self.between.client, &[CLIENTS[0].parse()?], server, count, EVERY)
    }

    fn listed(&self, words: &[&str]) -> Result<Vec<Connection>> {
        let told = self.balancer.xlb(&[&["conn", "list", "-o", "json"], words].concat())?;
        told.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
    }

    /// Those of the echo service that live, by the client's end; its other connections may be about to end.
    fn alive(&self) -> Result<BTreeMap<SocketAddr, Connection>> {
        let listed = self.listed(&["--service", "s0", "--state", "established"])?;
        Ok(listed.into_iter().map(|connection| (connection.client, connection)).collect())
    }

    fn on(&self, name: &str) -> Result<usize> {
        let on = |connection: &&Connection| connection.backend.as_deref() == Some(name);
        Ok(self.alive()?.values().filter(on).count())
    }
}

/// By the client's end: who answers.
fn served(connections: &Connections) -> BTreeMap<SocketAddr, String> {
    connections.all().into_iter().map(|connection| (connection.local, connection.server)).collect()
}

fn lives_are_listed(mode: Mode) -> Result<()> {
    let Some(scene) = Scene::set(&format!("list{mode}"), mode, 2, "")? else { return Ok(()) };
    let connections = scene.open(24)?;
    connections.wait_until_answered(Instant::now(), PATIENCE)?;
    let (listed, served) = (scene.alive()?, served(&connections));
    ensure!(listed.keys().eq(served.keys()), "{listed:?} {served:?}");
    let mut sources = BTreeSet::new();
    for (client, connection) in &listed {
        ensure!(connection.backend.as_ref() == served.get(client), "{connection:?}");
        let vip = format!("{}:{PORT}", SAME[0]).parse()?;
        ensure!(connection.vip == vip && connection.service.as_deref() == Some("s0"), "{connection:?}");
        ensure!(connection.pool.as_deref() == Some("web4") && connection.protocol == "tcp", "{connection:?}");
        ensure!(connection.state == ConnectionState::Established && connection.answered, "{connection:?}");
        ensure!(!connection.reset && connection.idle_seconds < 20, "{connection:?}");
        ensure!(connection.backend_address.is_some_and(|at| at.port() == PORT), "{connection:?}");
        sources.extend(connection.source);
    }
    let of_mode = match mode {
        Mode::Nat => sources.is_empty(),
        Mode::Fullnat => {
            let from: IpAddr = SOURCES[0].parse()?;
            sources.len() == 24 && sources.iter().all(|source| source.ip() == from)
        }
    };
    ensure!(of_mode, "{sources:?}");

    let on_web1 = served.values().filter(|server| *server == "web1").count();
    ensure!(scene.listed(&["--backend", "web4/web1", "--state", "established"])?.len() == on_web1);
    let one = served.keys().next().context("a connection")?;
    ensure!(scene.listed(&["--client", CLIENTS[0], "-n", "5"])?.len() == 5);
    ensure!(scene.listed(&["--client", "198.51.100.0/24"])?.is_empty());
    ensure!(scene.listed(&["--service", "s1"])?.is_empty());
    let wide = scene.balancer.xlb(&["conn", "list", "-o", "wide"])?;
    let line = wide.lines().find(|line| line.contains(&one.to_string())).context(wide.clone())?;
    ensure!(wide.starts_with("PROTOCOL") && line.contains("established") && line.contains("s0"), "{wide}");
    for (words, code, said) in [
        (&["conn", "list", "--service", "s00"][..], 1, "no service s00; did you mean s0?"),
        (&["conn", "list", "--backend", "web4/web9"], 1, "pool web4 has no backend web9"),
        (&["conn", "list", "--state", "open"], 2, "syn, established, finishing or udp"),
        (&["conn", "list", "--client", "10.0.0.0/33"], 2, "an address or a prefix"),
        (&["conn", "flush"], 2, "--all"),
        (&["conn", "flush", "--all", "--service", "s0"], 2, "--all"),
        (&["conn", "flush", "--service", "nobody"], 1, "no service nobody"),
    ] {
        scene.balancer.command(words)?.expect(code, &[said]).with_context(|| words.join(" "))?;
    }

    // Counted by the next sweep.
    let counted = || {
        let status = scene.balancer.status().ok()?;
        let pool = status.pools.iter().find(|pool| pool.name == "web4")?.connections?;
        Some((status, pool.established))
    };
    wait_for("a sweep", PATIENCE, || counted().is_some_and(|(_, established)| established == 24))?;
    let (status, _) = counted().context("a status")?;
    let all = status.connections.context("a pool that translates")?;
    ensure!(all.connections >= 24 && all.room >= 24, "{all:?}");
    let web1 = status.backends.iter().find(|backend| backend.pool == "web4" && backend.name == "web1");
    let replies = web1.and_then(|backend| backend.replies).context("replies")?;
    ensure!(replies.answered >= on_web1 as u64 && replies.waited_ns > 0, "{replies:?}");
    ensure!(replies.packets >= replies.answered && replies.bytes > replies.packets * 40, "{replies:?}");
    let shown = scene.balancer.xlb(&["status"])?;
    ensure!(shown.contains("FIRST ANSWER") && shown.contains("24 established"), "{shown}");
    let stats = scene.balancer.xlb(&["stats", "--rate", "--interval", "500ms"])?;
    ensure!(stats.contains("REPLIES/S"), "{stats}");
    ensure!(connections.lost().is_empty(), "{:?}", connections.lost());
    Ok(())
}

#[test]
fn connections_of_nat_are_listed_with_what_is_known_of_them() -> Result<()> {
    lives_are_listed(Mode::Nat)
}

#[test]
fn connections_of_fullnat_are_listed_with_their_sources() -> Result<()> {
    lives_are_listed(Mode::Fullnat)
}

#[test]
fn what_a_flush_does_is_what_its_help_says() -> Result<()> {
    for mode in [Mode::Nat, Mode::Fullnat] {
        let Some(scene) = Scene::set(&format!("flush{mode}"), mode, 2, "")? else { return Ok(()) };
        let connections = scene.open(24)?;
        connections.wait_until_answered(Instant::now(), PATIENCE)?;
        let on_web1 = scene.on("web1")?;
        ensure!(on_web1 > 0, "everybody is on web2");
        let said =
            scene.balancer.xlb(&["conn", "flush", "--backend", "web4/web1", "--state", "established"])?;
        ensure!(said.trim() == format!("{on_web1} connections flushed"), "{said}");
        match mode {
            // Its slot still names the backend, which knows the connection.
            Mode::Nat => {
                connections.wait_until_answered(Instant::now(), PATIENCE)?;
                ensure!(connections.lost().is_empty(), "{:?}", connections.lost());
                ensure!(scene.on("web1")? == on_web1);
            }
            Mode::Fullnat => {
                wait_for("packets of no connection", PATIENCE, || {
                    scene.balancer.outcome("drop_no_connection").is_ok_and(|packets| packets > 0)
                })?;
                ensure!(scene.on("web1")? == 0 && scene.on("web2")? == 24 - on_web1);
            }
        }
        scene.open(8)?.wait_until_answered(Instant::now(), PATIENCE)?;
        scene.balancer.command(&["conn", "flush", "--all", "-o", "json"])?.expect(0, &["\"flushed\": "])?;
    }
    Ok(())
}

#[test]
fn connections_outlive_the_agent_and_are_listed_and_flushed_without_it() -> Result<()> {
    let Some(mut scene) = Scene::set("outlive", Mode::Fullnat, 2, "")? else { return Ok(()) };
    let connections = scene.open(24)?;
    let places = |scene: &Scene| -> Result<BTreeMap<_, _>> {
        Ok(scene.alive()?.into_iter().map(|(client, at)| (client, (at.source, at.backend_id))).collect())
    };
    let before = places(&scene)?;
    scene.balancer.reload(&scene.config.to_string())?;
    ensure!(places(&scene)? == before, "a reload that changes nothing");
    scene.balancer.process.signal(Signal::KILL)?;
    scene.balancer.process.wait_exit(PATIENCE)?;

    let nameless = scene.listed(&["--state", "established"])?;
    ensure!(nameless.iter().all(|connection| connection.backend.is_none()), "{nameless:?}");
    let known = nameless.iter().filter(|connection| before.contains_key(&connection.client));
    ensure!(known.count() == 24, "{nameless:?}");
    let config = scene.balancer.config.to_string_lossy().into_owned();
    ensure!(scene.listed(&["-c", &config, "--service", "s0", "--state", "established"])?.len() == 24);
    let by_address = format!("web4/{}", between::address(0, false));
    ensure!(!scene.listed(&["--backend", &by_address])?.is_empty());
    scene.balancer.command(&["conn", "list", "--service", "s0"])?.expect(1, &["-c"])?;
    let flushed = scene.balancer.command(&["conn", "flush", "--client", "198.51.100.7"])?;
    flushed.expect(0, &["0 connections flushed"])?;

    scene.balancer.restart()?;
    ensure!(places(&scene)? == before, "a restart");
    connections.wait_until_answered(Instant::now(), PATIENCE)?;
    ensure!(connections.lost().is_empty(), "{:?}", connections.lost());
    Ok(())
}

#[test]
fn a_drain_waits_for_connections_and_a_removed_backend_for_its_last_one() -> Result<()> {
    let soon = |config| Config {
        top: "timeouts: {fin: 1s, reset: 1s}\n".to_owned(),
        pool: SHORT_IDLE.to_owned(),
        ..config
    };
    let Some(mut scene) = Scene::with("drains", Mode::Nat, 2, soon)? else { return Ok(()) };
    let connections = scene.open(24)?;
    connections.wait_until_answered(Instant::now(), PATIENCE)?;
    let on_web1 = scene.on("web1")?;
    scene.config.backends[0] = vec![backend(1, false)];
    scene.balancer.reload(&scene.config.to_string())?;
    let left = |scene: &Scene| -> Result<Option<u64>> {
        let backends = scene.balancer.backends()?;
        Ok(backends.iter().find(|of| of.pool == "web4" && of.name == "web1").map(|backend| backend.pins))
    };
    wait_for("a sweep", PATIENCE, || left(&scene).is_ok_and(|left| left == Some(on_web1 as u64)))?;
    let more = scene.open(8)?;
    ensure!(served(&more).values().all(|server| server == "web2"), "{:?}", served(&more));
    connections.wait_until_answered(Instant::now(), PATIENCE)?;
    ensure!(connections.lost().is_empty(), "{:?}", connections.lost());
    ensure!(scene.on("web1")? == on_web1);
    drop(connections);
    wait_for("it is gone", PATIENCE, || left(&scene).is_ok_and(|left| left.is_none()))
        .with_context(|| scene.balancer.process.log())?;
    ensure!(more.lost().is_empty() && scene.servers.len() == 2);
    Ok(())
}

#[test]
fn connections_of_a_backend_that_fails_go_and_no_others() -> Result<()> {
    let Some(scene) = Scene::set("fails", Mode::Nat, 2, "")? else { return Ok(()) };
    let connections = scene.open(24)?;
    connections.wait_until_answered(Instant::now(), PATIENCE)?;
    let on_web1: BTreeSet<SocketAddr> = served(&connections)
        .into_iter()
        .filter(|(_, server)| server == "web1")
        .map(|(local, _)| local)
        .collect();
    // Its checks are refused from now on.
    scene.between.backends[0].nginx.process.kill();
    // What comes to the other one, it has never heard of: it resets it.
    let lost = || connections.lost().iter().map(|lost| lost.local).collect::<BTreeSet<_>>();
    wait_for("they are reset", PATIENCE, || lost() == on_web1)
        .with_context(|| format!("{:?}\n{}", connections.lost(), scene.balancer.process.log()))?;
    connections.wait_until_answered(Instant::now(), PATIENCE)?;
    ensure!(lost() == on_web1 && scene.on("web1")? == 0);
    let resets = || {
        let backends = scene.balancer.backends().ok()?;
        backends
            .iter()
            .find(|of| of.pool == "web4" && of.name == "web2")?
            .replies
            .map(|replies| replies.resets)
    };
    ensure!(resets().is_some_and(|resets| resets >= on_web1.len() as u64), "{:?}", resets());
    Ok(())
}

const MANY: u32 = 1_000_000;

/// Anonymous memory of a process: what it has allocated, KiB.
fn heap(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    Ok(line.and_then(|line| line.split_whitespace().next()).context("RssAnon")?.parse()?)
}

#[test]
fn fault_39_lists_while_connections_come_and_go_end_and_tell_whole_connections() -> Result<()> {
    let Some(between) = Between::set("churn", Mode::Fullnat, 2)? else { return Ok(()) };
    let config = Config { top: "timeouts: {fin: 1s, reset: 1s}\n".to_owned(), ..between.config() };
    let balancer = between.start(&config)?;
    let load = HttpLoad::new(&between::url(SAME[0], 80, ""), 100_000).parallel(8).start(&between.client)?;
    let (vip, client, source) =
        (format!("{}:80", SAME[0]).parse()?, CLIENTS[0].parse::<IpAddr>()?, SOURCES[0].parse::<IpAddr>()?);
    let (mut told, mut lists, began) = (BTreeSet::new(), 0, Instant::now());
    while lists < 20 || told.len() < 500 {
        ensure!(began.elapsed() < PATIENCE * 3, "{} connections in {lists} lists", told.len());
        for line in balancer.xlb(&["conn", "list", "-o", "json"])?.lines() {
            let connection: Connection = serde_json::from_str(line).with_context(|| line.to_owned())?;
            let ends = connection.vip == vip && connection.client.ip() == client;
            let from = connection.source.is_some_and(|from| from.ip() == source);
            let to = connection.pool.as_deref() == Some("web4") && connection.protocol == "tcp";
            ensure!(ends && from && to && connection.service.as_deref() == Some("s0"), "{line}");
            told.insert(connection.client);
        }
        lists += 1;
    }
    let requests = load.stop()?;
    stage::none_failed(&requests)?;
    println!("{lists} lists, {} clients' ports in {} requests", told.len(), requests.len());
    Ok(())
}

/// Writes connections into the tables, past the program.
fn many(scene: &Scene, count: u32) -> Result<()> {
    let tables = scene.balancer.tables()?;
    let (id, _) = (0u16..).zip(&tables.backends).find(|(_, row)| row.identity != 0).context("a backend")?;
    let (words, records) = (tables.connections.words(), tables.connections.records());
    for place in 0..count {
        let record = &records[place as usize].0;
        record[0].store(u64::from(place), Ordering::Relaxed);
        record[Record::PORTS].store(6 << 32 | u64::from(place), Ordering::Relaxed);
        let pin = Pin::new(place + 1, id, PinState::Established, Pin::age_of(coarse_ns()));
        words[place as usize].store(pin.bits(), Ordering::Release);
    }
    Ok(())
}

#[test]
fn a_million_connections_are_listed_with_no_more_memory_than_a_few() -> Result<()> {
    let top = "limits: {connections: 1048576}";
    let Some(scene) = Scene::set("million", Mode::Nat, 1, top)? else { return Ok(()) };
    many(&scene, MANY)?;
    let agent = scene.balancer.process.pid();
    ensure!(scene.listed(&["-n", "1000"])?.len() == 1000);
    let before = heap(agent)?;

    // Somebody who reads page by page takes his time: the agent waits with the rest.
    let slow = Slow::begin(&scene, 200_000)?;
    let run_dir = scene.balancer.run_dir.to_string_lossy().into_owned();
    let xlb = scene.balancer.binary.to_string_lossy().into_owned();
    let words = [&xlb, "conn", "list", "-o", "json", "--run-dir", &run_dir];
    let mut list = scene.balancer.host.exec(words).stdout(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(list.stdout.take().context("standard output")?).lines();
    let (began, mut count, mut most) = (Instant::now(), 0, (0, 0));
    while let Some(line) = lines.next().transpose()? {
        count += 1;
        // Not at the end: then it may be over.
        if count % 100_000 == 50_000 {
            most = (most.0.max(heap(agent)?), most.1.max(heap(list.id())?));
            ensure!(line.starts_with('{') && line.ends_with('}'), "{line}");
        }
    }
    ensure!(list.wait()?.success());
    println!("{count} in {:?}; agent {before} -> {} KiB, list {} KiB", began.elapsed(), most.0, most.1);
    ensure!(count >= MANY as usize, "{count} lines");
    ensure!(most.0 < before + (16 << 10) && most.1 < 32 << 10, "the heap grows: {before} KiB, then {most:?}");
    ensure!(slow.end()? == 200_000);
    let flushed = scene.balancer.xlb(&["conn", "flush", "--client", "::/0"])?;
    ensure!(flushed.trim() == format!("{MANY} connections flushed"), "{flushed}");
    Ok(())
}

/// A client of the API that does not read on until it is told to.
struct Slow(BufReader<UnixStream>);

impl Slow {
    fn begin(scene: &Scene, limit: u32) -> Result<Self> {
        let mut stream = UnixStream::connect(scene.balancer.run_dir.join("xlb.sock"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(stream, "GET /v1/connections?limit={limit} HTTP/1.1\r\nhost: xlb\r\n\r\n")?;
        let mut this = Self(BufReader::new(stream));
        let mut head = String::new();
        this.0.read_line(&mut head)?;
        ensure!(head.starts_with("HTTP/1.1 200"), "{head}");
        Ok(this)
    }

    /// Reads to the end: how many lines there were.
    fn end(mut self) -> Result<usize> {
        let mut text = String::new();
        self.0.read_to_string(&mut text)?;
        ensure!(text.ends_with("\r\n0\r\n\r\n"), "it breaks off: {:?}", text.get(text.len() - 100..));
        Ok(text.matches("\"protocol\":").count())
    }
}

#[test]
fn the_api_says_what_is_wrong_with_a_request_and_no_more_than_eight_listings_are_under_way() -> Result<()> {
    let top = "limits: {connections: 65536}";
    let Some(scene) = Scene::set("listings", Mode::Nat, 1, top)? else { return Ok(()) };
    let socket = scene.balancer.run_dir.join("xlb.sock");
    let ask = |words: &[&str]| {
        let socket = ["curl", "--silent", "--unix-socket", &*socket.to_string_lossy()].map(str::to_owned);
        scene.balancer.host.run(socket.into_iter().chain(words.iter().map(|word| (*word).to_owned())))
    };
    for (words, said) in [
        (&["http://xlb/v1/connections?stat=syn"][..], "stat"),
        (&["http://xlb/v1/connections?state=open"], "open"),
        (&["http://xlb/v1/connections?client=nobody"], "client"),
        (&["http://xlb/v1/connections?limit=-1"], "limit"),
        (&["http://xlb/v1/connections?service=s9"], "no service s9"),
        (&["http://xlb/v1/connections/flush"], "takes POST"),
        (&["-d", "{}", "http://xlb/v1/connections/flush"], "say which connections go"),
        (
            &["-d", r#"{"all": true, "filter": {"state": "syn"}}"#, "http://xlb/v1/connections/flush"],
            "say which",
        ),
        (&["-d", r#"{"filter": {"clients": "::"}}"#, "http://xlb/v1/connections/flush"], "clients"),
        (&["-d", r#"{"filter": {"client": "::/0"}}"#, "http://xlb/v1/connections/flush"], r#"{"flushed":0}"#),
    ] {
        let told = ask(words)?;
        ensure!(told.contains(said), "{words:?}: {told}");
    }

    many(&scene, 60_000)?;
    let waiting = (0..8).map(|_| Slow::begin(&scene, 60_000)).collect::<Result<Vec<_>>>()?;
    let told = ask(&["http://xlb/v1/connections"])?;
    ensure!(told.contains("too many listings"), "{told}");
    scene.balancer.command(&["conn", "list"])?.expect(1, &["too many listings"])?;
    ensure!(scene.balancer.status().is_ok(), "there is room for others");
    for slow in waiting {
        ensure!(slow.end()? >= 60_000);
    }
    wait_for("room for one more", PATIENCE, || scene.listed(&["-n", "1"]).is_ok())
}
