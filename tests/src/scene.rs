//! A stage with a thousand open connections and a long download, on which one thing after the other is done: what each
//! did to them goes into a table. It knows no fault.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use lb_userspace::config::model::Protocol;
use lb_userspace::lookup::Query;

use crate::balancer::{Balancer, place};
use crate::lab::{Connection, Connections, Download, EchoServer, SlowServer};
use crate::stage::{self, Config, Stage, VIP4};

const ECHO: u16 = 7000;
const SLOW: u16 = 8000;

/// Where the client's connections come from.
const SOURCES: [Ipv4Addr; 4] = [
    Ipv4Addr::new(10, 111, 0, 200),
    Ipv4Addr::new(10, 111, 0, 201),
    Ipv4Addr::new(10, 111, 0, 202),
    Ipv4Addr::new(10, 111, 0, 203),
];

/// How often every connection is used.
const INTERVAL: Duration = Duration::from_millis(250);

/// How long the first step watches without doing anything.
const CONTROL: Duration = Duration::from_secs(4);

/// For what a step did to show.
const SETTLE: Duration = Duration::from_secs(1);

/// How long a connection may be silent before it is given up.
const SILENCE: Duration = Duration::from_secs(25);

pub struct Scene {
    connections: Connections,
    download: Download,
    servers: Vec<(EchoServer, SlowServer)>,
    rows: Vec<Row>,
    broken: Vec<String>,
    pub config: Config,
    pub balancer: Balancer,
    /// Last, so that a failed test's lab is removed after everything else of it.
    pub stage: Stage,
}

struct Row {
    step: String,
    connections: Duration,
    download: Duration,
    lost: usize,
    moved: usize,
}

impl Scene {
    /// Three backends, so many connections, a download of such a length; and a first step in which nothing happens, to
    /// which the others are compared. Nothing where skipping was asked for.
    pub fn set(name: &str, connections: usize, download: Duration) -> Result<Option<Self>> {
        let Some(stage) = Stage::set(name, 3)? else { return Ok(None) };
        let mut servers = Vec::new();
        for backend in &stage.backends {
            let host = &backend.host;
            servers.push((EchoServer::start(host, ECHO)?, SlowServer::start(host, SLOW, download)?));
        }
        for source in SOURCES {
            stage.client.add_address(&format!("{source}/24"), "eth0")?;
        }
        let config = Config {
            health: stage::PATIENT_CHECKS.replace("path:", "port: 80, path:"),
            services: vec![stage::service("echo", &[VIP4], &format!("[80, {ECHO}, {SLOW}]"), "tcp")],
            ..stage.config()
        };
        let balancer = stage.start(&config)?;
        let sources = SOURCES.map(IpAddr::from);
        let held = Connections::open(&stage.client, &sources, vip(ECHO), connections, INTERVAL)?;
        let mut this = Self {
            connections: held,
            download: Download::start(&stage.client, vip(SLOW), download)?,
            servers,
            rows: Vec::new(),
            broken: Vec::new(),
            config,
            balancer,
            stage,
        };
        this.step("nothing", SILENCE, |_| {
            std::thread::sleep(CONTROL);
            Ok(())
        })?;
        Ok(Some(this))
    }

    /// Does something, waits until every connection has been heard of since, and writes down what became of them. No
    /// message and no byte may wait longer than it does when nothing happens, and `promise`.
    pub fn step(
        &mut self,
        name: &str,
        promise: Duration,
        work: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let lost_before = self.connections.lost().len();
        let begin = Instant::now();
        if let Err(error) = work(self) {
            self.show();
            return Err(error.context(name.to_owned()));
        }
        let done = Instant::now();
        std::thread::sleep(SETTLE);
        self.connections.wait_until_answered(done, SILENCE)?;
        let end = Instant::now();
        let lost = self.connections.lost();
        let row = Row {
            step: name.to_owned(),
            connections: self.connections.longest_stall(begin, end),
            download: self.download.longest_stall(begin, end),
            lost: lost.len() - lost_before,
            moved: self.moved()?,
        };
        for connection in &lost[lost_before.min(lost.len())..] {
            let Connection { local, server, .. } = connection;
            self.broken.push(format!(
                "{name}: {local} to {server}: {}",
                connection.lost.as_deref().unwrap_or_default()
            ));
        }
        let control = self.rows.first().map_or(Duration::ZERO, |row| row.connections.max(row.download));
        for (what, stall) in [("a connection", row.connections), ("the download", row.download)] {
            if stall > control + promise {
                self.broken
                    .push(format!("{name}: {what} waited {stall:?}; promised: {control:?} + {promise:?}"));
            }
        }
        if row.moved > 0 {
            self.broken.push(format!("{name}: {} connections lead to another backend", row.moved));
        }
        self.rows.push(row);
        Ok(())
    }

    /// How many living connections the tables lead to another backend than they are with.
    fn moved(&self) -> Result<usize> {
        let tables = self.balancer.tables()?;
        let mut moved = 0;
        for connection in self.connections.all().iter().filter(|connection| connection.lost.is_none()) {
            let query = Query { source: connection.local, vip: vip(ECHO), protocol: Protocol::Tcp };
            let home = (0..self.stage.backends.len())
                .find(|index| stage::name(*index) == connection.server)
                .map(|index| stage::address(index, false));
            moved += usize::from(place(&tables, &query)?.map(|place| place.to_string()) != home);
        }
        Ok(moved)
    }

    /// Has the rest of the download sent, waits for its end, shows the table, and tells everything that was not as promised.
    pub fn finish(self, download: Duration) -> Result<()> {
        self.show();
        ensure!(self.broken.is_empty(), "{}", self.broken.join("\n"));
        if self.download.is_over() {
            self.download.finish(Duration::ZERO)?;
            bail!("the download was over before that");
        }
        self.servers.iter().for_each(|(_, slow)| slow.hurry());
        self.download.finish(download * 2)
    }

    fn show(&self) {
        println!("{:50} {:>12} {:>12} {:>5} {:>5}", "STEP", "CONNECTIONS", "DOWNLOAD", "LOST", "MOVED");
        for row in &self.rows {
            let Row { step, connections, download, lost, moved } = row;
            let (connections, download) = (connections.as_millis(), download.as_millis());
            println!("{step:50} {connections:9} ms {download:9} ms {lost:5} {moved:5}");
        }
        let echoes: u64 = self.connections.all().iter().map(|connection| connection.echoes).sum();
        println!("{} connections, {echoes} messages", self.connections.all().len());
    }
}

fn vip(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::from(Ipv4Addr::new(203, 0, 113, 10)), port)
}
