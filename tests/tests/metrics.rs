//! Metrics as a scraper meets them: the format by a reader of the test's own, the values by what a client sent.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::UdpSocket;

use anyhow::{Context, Result, bail, ensure};
use lb_userspace::api::metrics::{FAMILIES, Kind};
use tests::balancer::Balancer;
use tests::between::{self, Between, Mode, SAME};
use tests::lab::{self, wait_for};
use tests::stage::{self, Config, PATIENCE, Stage, VIP4};

type Labels = BTreeMap<String, String>;

/// What a scrape says: the kind of each family, and all samples.
#[derive(Default)]
struct Scrape {
    kinds: HashMap<String, String>,
    helps: HashMap<String, String>,
    samples: HashMap<(String, Labels), f64>,
}

impl Scrape {
    /// Reads OpenMetrics 1.0 text, and refuses what its grammar does not allow. Knows counters and gauges.
    fn read(text: &str) -> Result<Self> {
        let mut scrape = Self::default();
        let text = text.strip_suffix("# EOF\n").context("no `# EOF` at the end")?;
        let mut family = String::new();
        for line in text.lines() {
            scrape.line(line, &mut family).with_context(|| line.to_owned())?;
        }
        Ok(scrape)
    }

    fn line(&mut self, line: &str, family: &mut String) -> Result<()> {
        if let Some(rest) = line.strip_prefix("# ") {
            let mut words = rest.splitn(3, ' ');
            let (what, name) = (words.next().context("a word")?, words.next().context("a name")?);
            let said = words.next().context("what is said")?.to_owned();
            match what {
                "HELP" => {
                    ensure!(
                        self.helps.insert(name.to_owned(), said).is_none(),
                        "a family stands in two places"
                    );
                    *family = name.to_owned();
                }
                "TYPE" => ensure!(self.kinds.insert(name.to_owned(), said).is_none(), "two types"),
                "UNIT" => ensure!(name.ends_with(&format!("_{said}")), "the unit is no suffix of the name"),
                _ => bail!("neither HELP, TYPE nor UNIT"),
            }
            ensure!(name == family, "metadata of another family");
            return Ok(());
        }
        let (name, labels, value) = sample(line)?;
        let suffix = if self.kinds.get(family).is_some_and(|kind| kind == "counter") { "_total" } else { "" };
        ensure!(name == format!("{family}{suffix}"), "a sample of {name} within {family}");
        let value: f64 = value.parse().context("the value")?;
        ensure!(value.is_finite() && (suffix.is_empty() || value >= 0.0), "the value");
        ensure!(self.samples.insert((name, labels), value).is_none(), "a sample stands twice");
        Ok(())
    }

    fn get(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        let labels: Labels =
            labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let value = self.samples.get(&(name.to_owned(), labels.clone()));
        value.copied().with_context(|| format!("no sample {name}{labels:?}"))
    }

    fn sum(&self, name: &str) -> f64 {
        self.samples.iter().filter(|((of, _), _)| of == name).map(|(_, value)| value).sum()
    }
}

/// Name, labels and value. Escapes in label values are undone.
fn sample(line: &str) -> Result<(String, Labels, &str)> {
    let end = line.find(['{', ' ']).context("no value")?;
    let (name, mut rest) = line.split_at(end);
    let mut letters = name.bytes();
    let first = letters.next().context("no name")?;
    ensure!(
        first.is_ascii_lowercase()
            && letters.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
    );
    let mut labels = Labels::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            let (key, after) = rest.split_once("=\"").context("no label")?;
            ensure!(key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "the name of a label");
            let mut value = String::new();
            let mut bytes = after.char_indices();
            let end = loop {
                match bytes.next().context("the value of a label does not end")? {
                    (at, '"') => break at,
                    (_, '\\') => value.push(match bytes.next().context("an escape")?.1 {
                        'n' => '\n',
                        other @ ('\\' | '"') => other,
                        _ => bail!("an unknown escape"),
                    }),
                    (_, other) => value.push(other),
                }
            };
            ensure!(labels.insert(key.to_owned(), value).is_none(), "a label stands twice");
            rest = &after[end + 1..];
            match rest.as_bytes().first() {
                Some(b',') => rest = &rest[1..],
                Some(b'}') => break,
                _ => bail!("the labels do not end"),
            }
        }
        rest = &rest[1..];
    }
    Ok((name.to_owned(), labels, rest.strip_prefix(' ').context("no space before the value")?))
}

#[test]
fn the_reader_itself_refuses_what_is_wrong() {
    let good =
        "# HELP a_b x y\n# TYPE a_b counter\na_b_total{k=\"v\\\"\\\\\\n\",l=\"\"} 1\na_b_total 2.5\n# EOF\n";
    let scrape = Scrape::read(good).expect("this is good");
    assert_eq!(scrape.get("a_b_total", &[("k", "v\"\\\n"), ("l", "")]).ok(), Some(1.0));
    for (from, to) in [
        ("# EOF", ""),
        ("a_b_total 2.5", "a_b 2.5"),
        ("a_b_total 2.5", "a_b_total{k=\"v\\\"\\\\\\n\",l=\"\"} 1"),
        ("2.5", "-1"),
        ("2.5", "NaN"),
        (" 2.5", ""),
        ("\"v", "v"),
        ("TYPE a_b", "TYPE b"),
    ] {
        assert!(Scrape::read(&good.replacen(from, to, 1)).is_err(), "{from:?} to {to:?}");
    }
}

fn scrape(balancer: &Balancer, url: &[&str]) -> Result<Scrape> {
    let text = balancer.host.run(["curl", "--fail", "--silent"].iter().chain(url))?;
    Scrape::read(&text).with_context(|| text.clone())
}

fn over_tcp(balancer: &Balancer) -> Result<Scrape> {
    scrape(balancer, &["http://127.0.0.1:9465/metrics"])
}

/// Metrics of connections, which nobody has whose pools translate no addresses.
const OF_CONNECTIONS: [&str; 7] = [
    "xlb_connections",
    "xlb_connections_room",
    "xlb_backend_reply_packets_total",
    "xlb_backend_reply_bytes_total",
    "xlb_backend_resets_total",
    "xlb_backend_answered_total",
    "xlb_backend_answer_seconds_total",
];

/// The table that the docs are made of is what is served.
fn documented(scrape: &Scrape, translates: bool) -> Result<()> {
    let served: BTreeSet<_> = scrape.samples.keys().map(|(name, _)| name.clone()).collect();
    let all = FAMILIES.iter().map(|family| family.name());
    let all: BTreeSet<_> = all.filter(|name| translates || !OF_CONNECTIONS.contains(&&**name)).collect();
    ensure!(served == all, "{:?}", served.symmetric_difference(&all));
    for (name, labels) in scrape.samples.keys() {
        let family = FAMILIES.iter().find(|family| family.name() == *name).context("a family")?;
        ensure!(
            labels.len() == family.labels.len() && family.labels.iter().all(|key| labels.contains_key(*key))
        );
        let stem = name.strip_suffix("_total").filter(|_| family.kind == Kind::Counter).unwrap_or(name);
        ensure!(scrape.helps[stem] == family.help && scrape.kinds[stem] == family.kind.as_str());
    }
    Ok(())
}

#[test]
fn metrics_tell_of_connections_where_a_pool_translates_addresses() -> Result<()> {
    let Some(between) = Between::set("metricsnat", Mode::Nat, 1)? else { return Ok(()) };
    let balancer = between.start(&between.config())?;
    let requests = lab::http_load(&between.client, &between::url(SAME[0], 80, ""), 20, 1)?;
    stage::none_failed(&requests)?;
    let socket = balancer.run_dir.join("xlb.sock");
    let socket = ["--unix-socket", &socket.to_string_lossy(), "http://xlb/metrics"];
    let seen = |scrape: &Scrape| scrape.sum("xlb_connections");
    wait_for("a sweep", PATIENCE, || scrape(&balancer, &socket).is_ok_and(|scrape| seen(&scrape) >= 20.0))?;
    let scrape = scrape(&balancer, &socket)?;
    documented(&scrape, true)?;
    let web1 = [("pool", "web4"), ("backend", "web1"), ("address", &*between::address(0, false))];
    ensure!(scrape.get("xlb_backend_answered_total", &web1)? == 20.0);
    ensure!(scrape.get("xlb_backend_resets_total", &web1)? == 0.0);
    let (waited, packets) = ("xlb_backend_answer_seconds_total", "xlb_backend_reply_packets_total");
    ensure!((1e-6..20.0).contains(&scrape.get(waited, &web1)?), "{:?}", scrape.get(waited, &web1));
    ensure!(scrape.get(packets, &web1)? >= 80.0 && scrape.sum("xlb_connections_room") > 4096.0);
    let states = scrape.samples.keys().filter(|(name, _)| name == "xlb_connections");
    ensure!(states.count() == 8, "two pools of four states");
    Ok(())
}

#[test]
fn metrics_are_openmetrics_and_say_what_a_client_sent() -> Result<()> {
    let Some(stage) = Stage::set("metrics", 2)? else { return Ok(()) };
    let mut config = Config {
        top: "metrics: {listen: '127.0.0.1:9465'}".to_owned(),
        services: vec![
            stage::service("www", &[VIP4], "80", "tcp"),
            stage::service("dns", &[VIP4], "53", "udp"),
        ],
        ..stage.config()
    };
    config.backends.push("{address: 10.111.0.99, name: ghost, weight: 0}".to_owned());
    let balancer = Balancer::start(&stage.balancer, &stage.lab.dir().join("xlb"), &config.to_string())?;
    balancer.wait_for_backends(2, PATIENCE)?;
    stage.client.inside(|| -> Result<()> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        for port in [53; 211].into_iter().chain([54; 7]) {
            socket.send_to(&[0; 100], (VIP4, port))?;
        }
        Ok(())
    })??;
    let dns = [("service", "dns"), ("vip", VIP4), ("port", "53"), ("protocol", "udp")];
    wait_for("all are counted", PATIENCE, || {
        over_tcp(&balancer).is_ok_and(|scrape| {
            scrape.get("xlb_service_packets_total", &dns).is_ok_and(|packets| packets == 211.0)
        })
    })?;
    let socket = balancer.run_dir.join("xlb.sock");
    let scrape = scrape(&balancer, &["--unix-socket", &socket.to_string_lossy(), "http://xlb/metrics"])?;
    let get = |name: &str, labels: &[(&str, &str)]| scrape.get(name, labels);

    ensure!(get("xlb_service_bytes_total", &dns)? == 211.0 * 128.0);
    ensure!(scrape.sum("xlb_backend_packets_total") == 211.0);
    ensure!(scrape.sum("xlb_backend_bytes_total") == 211.0 * 128.0);
    let forwarded = [("outcome", "forward_transmit"), ("action", "transmit")];
    ensure!(get("xlb_packets_total", &forwarded)? == 211.0);
    ensure!(get("xlb_drop_packets_total", &[("reason", "vip_port")])? == 7.0);
    let drops = scrape
        .samples
        .iter()
        .filter(|((name, labels), _)| name == "xlb_packets_total" && labels["action"] == "drop");
    ensure!(drops.map(|(_, value)| value).sum::<f64>() == scrape.sum("xlb_drop_packets_total"));
    ensure!(get("xlb_services", &[])? == 2.0);
    ensure!(get("xlb_backends", &[("pool", "web"), ("state", "up")])? == 2.0);
    ensure!(get("xlb_backends", &[("pool", "web"), ("state", "unresolved")])? == 1.0);
    ensure!(
        get("xlb_backend_up", &[("pool", "web"), ("backend", "web1"), ("address", "10.111.0.11")])? == 1.0
    );
    ensure!(
        get("xlb_backend_up", &[("pool", "web"), ("backend", "ghost"), ("address", "10.111.0.99")])? == 0.0
    );
    ensure!(scrape.sum("xlb_backend_slots") == 2.0 * 4096.0, "a table for TCP and one for UDP");
    ensure!(get("xlb_interface_attached", &[("interface", "eth0"), ("mode", "native")])? == 1.0);
    ensure!(get("xlb_config_last_reload_successful", &[])? == 1.0);

    documented(&scrape, false)?;
    Ok(())
}

#[test]
fn metrics_tell_of_reloads_and_of_backends_that_come_and_go() -> Result<()> {
    let Some(mut stage) = Stage::set("tell", 2)? else { return Ok(()) };
    let config = Config {
        top: "metrics: {listen: '127.0.0.1:9465'}".to_owned(),
        health: "{type: http, path: /healthz, interval: 200ms, timeout: 200ms, rise: 1, fall: 2}".to_owned(),
        ..stage.config()
    };
    let balancer = stage.start(&config)?;
    let transitions = |to: &str| -> Result<f64> {
        let labels = [("pool", "web"), ("backend", "web2"), ("to", to)];
        over_tcp(&balancer)?.get("xlb_health_transitions_total", &labels)
    };
    let (up, down) = (transitions("up")?, transitions("down")?);
    stage.backends[1].nginx.process.kill();
    wait_for("it went down", PATIENCE, || transitions("down").is_ok_and(|now| now >= down + 1.0))?;
    stage.backends[1].heal()?;
    wait_for("it came up", PATIENCE, || transitions("up").is_ok_and(|now| now >= up + 1.0))?;

    let before = over_tcp(&balancer)?;
    std::fs::write(&balancer.config, "interfaces: 1 2\n")?;
    balancer.command(&["reload"])?.expect(3, &[])?;
    let refused = over_tcp(&balancer)?;
    let since = "xlb_config_last_reload_success_timestamp_seconds";
    ensure!(refused.get("xlb_config_last_reload_successful", &[])? == 0.0);
    ensure!(refused.get("xlb_reloads_total", &[("result", "refused")])? == 1.0);
    ensure!(refused.get(since, &[])? == before.get(since, &[])?);
    balancer.reload(&config.to_string())?;
    let taken = over_tcp(&balancer)?;
    ensure!(taken.get("xlb_config_last_reload_successful", &[])? == 1.0);
    ensure!(taken.get("xlb_reloads_total", &[("result", "succeeded")])? == 1.0);
    ensure!(taken.get(since, &[])? > before.get(since, &[])?);
    Ok(())
}

#[test]
fn metrics_tell_of_pools_in_use_and_of_backends_that_start_slowly() -> Result<()> {
    let Some(stage) = Stage::set("levels", 3)? else { return Ok(()) };
    let far =
        "  far: {forward: ipip, health: {type: none}, backends: [{address: 10.111.0.13, name: web3}]}\n";
    let mut config = Config {
        top: "metrics: {listen: '127.0.0.1:9465'}".to_owned(),
        health: "{type: http, path: /healthz, interval: 500ms, timeout: 500ms, rise: 1, fall: 2}".to_owned(),
        pool: "    fallback: far\n    failback_hold: 0s\n    panic: 60%\n    slow_start: 1h\n".to_owned(),
        ..stage.config()
    };
    config.backends.pop();
    let yaml = config.to_string().replace("services:\n", &format!("{far}services:\n"));
    let balancer = Balancer::start(&stage.balancer, &stage.lab.dir().join("xlb"), &yaml)?;
    balancer.wait_for_backends(3, PATIENCE)?;
    let is = |level: f64, panic: f64, starting: [f64; 2]| -> Result<bool> {
        let scrape = over_tcp(&balancer)?;
        let percent = |name: &str, address: &str| {
            let labels = [("pool", "web"), ("backend", name), ("address", address)];
            scrape.get("xlb_backend_starting_percent", &labels)
        };
        // One that begins has little of its share, and more from minute to minute.
        let alike = |is: f64, wanted: f64| (is - wanted).abs() < 15.0;
        Ok(scrape.get("xlb_pool_level", &[("pool", "web")])? == level
            && scrape.get("xlb_pool_level", &[("pool", "far")])? == 0.0
            && scrape.get("xlb_pool_panic", &[("pool", "web")])? == panic
            && alike(percent("web1", "10.111.0.11")?, starting[0])
            && alike(percent("web2", "10.111.0.12")?, starting[1]))
    };
    let wait = |what: &str, level, panic, starting| {
        wait_for(what, PATIENCE, || is(level, panic, starting).is_ok_and(|is| is))
            .with_context(|| format!("{:?}", over_tcp(&balancer).map(|scrape| scrape.samples)))
    };
    wait("the pool itself", 0.0, 0.0, [100.0; 2])?;
    stage.backends[0].nginx.set_healthy(false)?;
    wait("panic", 0.0, 1.0, [100.0; 2])?;
    stage.backends[1].nginx.set_healthy(false)?;
    wait("the fallback", 1.0, 0.0, [100.0; 2])?;
    for backend in &stage.backends[..2] {
        backend.nginx.set_healthy(true)?;
    }
    wait("the pool itself, in the beginning", 0.0, 0.0, [0.0; 2])
}
