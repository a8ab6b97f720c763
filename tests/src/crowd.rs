//! A stage with thousands of connections that must not break and a stream of new clients that must be served, whatever is
//! done to backends, configuration and agent. It knows no change; what it is told of deaths it takes into account.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lb_common::abi::{SLOTS_PER_ROW, TableWord};
use lb_userspace::reconcile::image::Image;

use crate::balancer::{Balancer, other_build};
use crate::lab::{self, VISIT_PATIENCE, wait_for};
use crate::lab::{
    Death, Host, Lab, LiveConnections, LiveLoad, NamingServer, Signal, SynFlood, Tally, Visit, Visits,
};
use crate::stage::{self, Config, PATIENCE, Stage, VIP4};

const PORT: u16 = 7000;

/// The protected idle time of the pool.
pub const IDLE: Duration = Duration::from_secs(6);
/// The pool's own lines.
pub const POOL: &str = "    idle_timeout: {tcp: 6s}\n";

/// A connection is silent for that long at most, and a moment on a loaded machine: less than [`IDLE`].
const GAP: std::ops::Range<Duration> = Duration::from_millis(500)..Duration::from_millis(4000);

/// Connections of the client come from these, 28,000 ports each.
const SOURCES: std::ops::Range<u8> = 200..206;

/// New clients: one in so long, and no more than that many.
const VISIT_EVERY: Duration = Duration::from_millis(20);
const MOST_VISITS: usize = 10_000;

/// How long the first look takes, in which nothing is done: every connection is used.
const CONTROL: Duration = Duration::from_secs(6);

/// Stalls that the machine makes now and then, of a thousand connections: those that the control run missed.
const STALLS_OF_A_THOUSAND: usize = 5;

/// So long nobody may be turned away.
const WHILE: Duration = Duration::from_secs(2);

/// The idle time, what the agent waits beyond it, and a loaded machine.
const SETTLES: Duration = Duration::from_secs(40);

/// Refused or silent: down after two seconds. A moment's pause of a loaded machine is not enough.
const CHECKS: &str = "{type: tcp, port: 7000, interval: 500ms, timeout: 500ms, rise: 1, fall: 4}";

pub struct Crowd {
    live: LiveConnections,
    visits: Visits,
    servers: Vec<Option<NamingServer>>,
    deaths: Vec<Death>,
    control: Look,
    /// When the control run ended.
    begin: Instant,
    /// How many backends the balancer should find up.
    up: usize,
    pub config: Config,
    pub balancer: Balancer,
    flooder: Host,
    /// Last, so that a failed test's lab is removed after everything else of it.
    pub stage: Stage,
}

/// How packets get to the backends of a crowd, and lines of its configuration.
#[derive(Clone, Copy, Debug)]
pub struct Way<'a> {
    pub forward: &'a str,
    pub top: &'a str,
    pub pool: &'a str,
}

/// In tunnels, with the crowd's idle time.
pub const TUNNELS: Way<'_> = Way { forward: "ipip", top: "", pool: POOL };

/// What stands for the clients with `fullnat`.
pub const SOURCE: &str = "10.111.0.5";

/// Backends are on the client's link, and would answer it directly.
fn answers_through_the_balancer(backend: &Host) -> Result<()> {
    let mut clients = vec![2];
    clients.extend(SOURCES);
    clients.iter().try_for_each(|last| backend.route(&format!("10.111.0.{last}/32 via {}", stage::BALANCER4)))
}

/// What happened in some time.
#[derive(Clone, Debug)]
struct Look {
    took: Duration,
    answers: u64,
    tally: Tally,
    visits: Vec<Visit>,
}

impl Crowd {
    /// So many backends, all in the pool, so many connections, and a first look at them while nothing happens. Nothing where
    /// skipping was asked for.
    pub fn gather(name: &str, backends: usize, connections: usize, way: Way<'_>) -> Result<Option<Self>> {
        if !lab::available()? {
            return Ok(None);
        }
        let stage = Stage::set_in(Lab::new(name)?, backends)?;
        let flooder = stage.lab.host("flooder", &["10.111.0.99/24"])?;
        flooder.route(&format!("{VIP4}/32 via {}", stage::BALANCER4))?;
        let sources: Vec<IpAddr> =
            SOURCES.map(|last| IpAddr::from(Ipv4Addr::new(10, 111, 0, last))).collect();
        for source in &sources {
            stage.client.add_address(&format!("{source}/24"), "eth0")?;
        }
        if way.forward == "fullnat" {
            stage.balancer.add_address(&format!("{SOURCE}/24"), "eth0")?;
        }
        for backend in stage.backends.iter().filter(|_| way.forward == "nat") {
            answers_through_the_balancer(&backend.host)?;
        }
        let servers = stage.backends.iter().map(|backend| NamingServer::start(&backend.host, PORT).map(Some));
        let servers = servers.collect::<Result<Vec<_>>>()?;
        let config = Config {
            health: CHECKS.to_owned(),
            top: way.top.to_owned(),
            pool: way.pool.to_owned(),
            forward: way.forward.to_owned(),
            services: vec![stage::service("crowd", &[VIP4], &PORT.to_string(), "tcp")],
            ..stage.config()
        };
        let balancer = stage.start(&config)?;
        let (visitors, sources) = sources.split_last().context("no source")?;
        let load = LiveLoad { connections, sources: sources.to_vec(), server: vip().into(), gap: GAP };
        let live = LiveConnections::open(&stage.client, load)?;
        let visits = Visits::start(&stage.client, &[*visitors], vip().into(), VISIT_EVERY, MOST_VISITS)?;
        let begin = Instant::now();
        let nothing = Look {
            took: Duration::ZERO,
            answers: live.answers(),
            tally: Tally::default(),
            visits: Vec::new(),
        };
        let mut this = Self {
            live,
            visits,
            servers,
            deaths: Vec::new(),
            control: nothing,
            begin,
            up: backends,
            config,
            balancer,
            flooder,
            stage,
        };
        sleep(CONTROL);
        this.live.wait_until_all_answer(begin, PATIENCE)?;
        this.control = this.look();
        this.begin = Instant::now();
        println!("nothing done: {}", this.control);
        Ok(Some(this))
    }

    /// One more backend with its server, which no configuration knows yet.
    pub fn add_backend(&mut self) -> Result<usize> {
        let host = self.stage.add_backend()?.host.clone();
        if self.config.forward == "nat" {
            answers_through_the_balancer(&host)?;
        }
        self.servers.push(Some(NamingServer::start(&host, PORT)?));
        Ok(self.servers.len() - 1)
    }

    /// Gives the agent the configuration as it is now, with so many backends that should be up.
    pub fn reload(&mut self) -> Result<()> {
        self.balancer.reload(&self.config.to_string())?;
        self.up = self.config.backends.len();
        self.balancer.wait_for_backends(self.up, PATIENCE)
    }

    /// Ends a server with its connections, or takes its host off the network, until the balancer knows.
    pub fn dies(&mut self, backend: usize, how: Dies) -> Result<()> {
        let begin = Instant::now();
        match how {
            Dies::Process => self.servers[backend] = None,
            Dies::Link => self.stage.backends[backend].host.set_link("eth0", false)?,
        }
        self.up -= 1;
        self.balancer.wait_for_backends(self.up, PATIENCE)?;
        self.deaths.push(Death { server: stage::name(backend), begin, end: Instant::now() });
        Ok(())
    }

    /// Brings a dead server back, until the balancer knows.
    pub fn heals(&mut self, backend: usize) -> Result<()> {
        let host = &self.stage.backends[backend].host;
        if self.servers[backend].is_none() {
            self.servers[backend] = Some(NamingServer::start(host, PORT)?);
        }
        host.set_link("eth0", true)?;
        if self.config.forward == "nat" {
            // They went with the link.
            answers_through_the_balancer(host)?;
        }
        self.up += 1;
        self.balancer.wait_for_backends(self.up, PATIENCE)
    }

    /// The agent is killed and started again, then another build takes its place.
    pub fn lives_through_its_agent(&mut self) -> Result<()> {
        self.balancer.process.signal(Signal::KILL)?;
        self.balancer.process.wait_exit(PATIENCE)?;
        sleep(Duration::from_secs(1));
        self.balancer.restart()?;
        self.tell("agent killed");
        let build = other_build(&self.stage.lab)?;
        self.balancer.upgrade(&build)?;
        self.tell("agent replaced");
        Ok(())
    }

    /// SYNs from elsewhere, so many a second.
    pub fn flood(&self, per_second: u32, lasts: Duration) -> Result<SynFlood> {
        SynFlood::start(&self.flooder, vip(), per_second, lasts)
    }

    /// How many connections each server has.
    pub fn places(&self) -> BTreeMap<String, usize> {
        let mut places = BTreeMap::new();
        for (_, server) in self.live.alive() {
            *places.entry(server).or_default() += 1;
        }
        places
    }

    /// Waits until new clients are served by exactly these.
    pub fn wait_until_served_by(&self, backends: &[usize]) -> Result<()> {
        let mut wanted: Vec<String> = backends.iter().map(|index| stage::name(*index)).collect();
        wanted.sort();
        let mut last = Vec::new();
        wait_for("new clients are sent where they should be", PATIENCE, || {
            let now = Instant::now();
            let visits = self.visits.between(now.checked_sub(Duration::from_secs(1)).unwrap_or(now), now);
            last = Visits::shares(&visits).0.into_keys().map(str::to_owned).collect();
            last == wanted
        })
        .with_context(|| format!("they are served by {last:?}, not {wanted:?}"))
    }

    /// What happened since the control run, or until now if there was none.
    fn look(&self) -> Look {
        let now = Instant::now();
        Look {
            took: now - self.begin,
            answers: self.live.answers() - self.control.answers,
            tally: Tally::since(self.begin, &self.live.incidents(), &self.deaths),
            visits: self.visits.between(self.begin, now),
        }
    }

    /// Waits until no slot waits for its old flows any more: those that live are pinned then, and silent ones would move.
    pub fn settles(&self) -> Result<()> {
        let dirty = || self.balancer.tables().map(|tables| dirty_slots(&tables));
        wait_for("the old flows of every slot are pinned", SETTLES, || dirty().is_ok_and(|dirty| dirty == 0))
            .with_context(|| format!("{:?} slots are dirty", dirty()))
    }

    /// Waits until all new clients of a while were served. Those that came before, since the last death, met the dead.
    pub fn wait_until_all_are_served(&mut self, within: Duration) -> Result<()> {
        let mut from = Instant::now();
        let waited = wait_for("all new clients are served", within + WHILE + VISIT_PATIENCE, || {
            // Later ones may not be over.
            let over = Instant::now().checked_sub(VISIT_PATIENCE).unwrap_or(from);
            let visits = self.visits.between(from, over);
            let turned_away = visits.iter().filter(|visit| visit.server.is_err());
            if let Some(last) = turned_away.map(|visit| visit.start).max() {
                from = last + Duration::from_nanos(1);
            }
            over > from + WHILE
        });
        if let Some(death) = self.deaths.last_mut() {
            death.end = from;
        }
        waited.with_context(|| self.look().to_string())
    }

    /// Waits until every connection has answered again.
    pub fn wait_until_all_answer(&self) -> Result<()> {
        self.live.wait_until_all_answer(Instant::now(), PATIENCE)
    }

    /// Says where it stands, for a person who looks on.
    pub fn tell(&self, what: &str) {
        println!("{what}: {}", self.look());
    }

    /// Waits until every connection has answered again, and refuses whatever was not promised.
    pub fn verdict(&self) -> Result<()> {
        self.wait_until_all_answer()?;
        let Look { took, tally, visits, .. } = self.look();
        self.tell("in the end");
        let connections = self.live.alive().len();
        ensure!(tally.broken() == 0 && tally.unopened == 0, "of {connections} connections: {tally}");
        // A burst of stalls in a short control run is no sign that there will be so many all the time.
        let times = took.div_duration_f64(self.control.took.max(Duration::from_secs(10)));
        let allowed = |control: usize, slack: usize| (control as f64 * times) as usize + slack;
        let slack = connections * STALLS_OF_A_THOUSAND / 1000;
        let stalls = allowed(self.control.tally.stalls, slack);
        let long_stalls = allowed(self.control.tally.long_stalls, slack / 5);
        ensure!(
            tally.stalls <= stalls && tally.long_stalls <= long_stalls,
            "{tally}; {stalls} stalls may be, {long_stalls} long ones"
        );
        let turned_away: Vec<&Visit> =
            visits.iter().filter(|visit| visit.server.is_err() && !self.met_a_death(visit)).collect();
        ensure!(turned_away.is_empty(), "{} new clients were not served: {turned_away:?}", turned_away.len());
        Ok(())
    }

    /// Whether somebody came who was taken for living.
    fn met_a_death(&self, visit: &Visit) -> bool {
        let met = |death: &Death| visit.start + visit.took >= death.begin && visit.start <= death.end;
        self.deaths.iter().any(met)
    }
}

/// How a backend dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dies {
    /// Its server ends: connections are refused.
    Process,
    /// Its cable is pulled: nothing comes back.
    Link,
}

impl std::fmt::Display for Look {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (shares, failed) = Visits::shares(&self.visits);
        write!(
            f,
            "{:.1} s, {} answers; {}; new clients {shares:?}, {} not served",
            self.took.as_secs_f64(),
            self.answers,
            self.tally,
            failed.len()
        )
    }
}

fn dirty_slots(tables: &Image) -> usize {
    let words = tables.tables.iter().map(|&bits| TableWord::from_bits(bits)).filter(|word| word.bits() != 0);
    let slots = words.flat_map(|word| {
        let first = word.first_row() * SLOTS_PER_ROW;
        first..first + word.length()
    });
    slots.filter(|&index| tables.slot(index).dirty()).count()
}

fn vip() -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 10), PORT)
}
