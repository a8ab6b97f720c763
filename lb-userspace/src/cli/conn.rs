//! `xlb conn`: connections whose addresses are translated, by the agent or, without one, by the pinned maps. A million of them
//! take no more memory here than one.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Subcommand, ValueEnum};
use ipnetwork::IpNetwork;

use super::output::{self, Lines};
use super::{Format, RunDir};
use crate::agent::connections::{Connection, ConnectionState, Filter, Listing, flush};
use crate::agent::snapshot::Index;
use crate::api::{Client, ClientError, ConnectionsAsked, FlushAsked, Flushed};
use crate::bpf::{BpfFs, Maps};
use crate::config::{self, model::Config};
use crate::reconcile::image::Image;

#[derive(Debug, Subcommand)]
pub enum Conn {
    /// Show connections of pools with `forward: nat` or `fullnat`, as they come
    #[command(after_help = LIST)]
    List {
        #[command(flatten)]
        which: Which,
        /// No more than so many
        #[arg(short = 'n', long, value_name = "N")]
        limit: Option<u64>,
        #[arg(short, long, value_enum, default_value = "table")]
        output: Shape,
        #[command(flatten)]
        place: Place,
    },
    /// Forget connections, without a word to their ends
    #[command(after_help = FLUSH)]
    Flush {
        #[command(flatten)]
        which: Which,
        /// All of them
        #[arg(
            long, conflicts_with_all = ["service", "backend", "client", "state"],
            required_unless_present_any = ["service", "backend", "client", "state"]
        )]
        all: bool,
        #[arg(short, long, value_enum, default_value = "table")]
        output: Format,
        #[command(flatten)]
        place: Place,
    },
}

const LIST: &str = "With -o json each line is an object of its own. IDLE is right to two seconds. \
    Flows of other pools are not connections: those that have a pin are counted by `xlb status`.";

const FLUSH: &str = "What it does to a connection that still has packets: with `forward: nat` the client's next one opens it \
    anew, at the backend that its slot names, which may be another and then resets it; with `forward: fullnat` \
    its packets are dropped (drop_no_connection) until the client connects again. A datagram opens a new one in both.";

/// Which connections: those that all of it holds for.
#[derive(Debug, clap::Args)]
pub struct Which {
    /// To this service
    #[arg(short, long, value_name = "SERVICE")]
    service: Option<String>,
    /// To this backend: its pool, and its name or address
    #[arg(short, long, value_name = "POOL/BACKEND", value_parser = super::backend::a_backend)]
    backend: Option<String>,
    /// From this address, or these
    #[arg(long, value_name = "ADDRESS|PREFIX", value_parser = clients)]
    client: Option<IpNetwork>,
    /// In this state: syn, established, finishing or udp
    #[arg(long, value_name = "STATE")]
    state: Option<ConnectionState>,
}

#[derive(Debug, clap::Args)]
pub struct Place {
    /// Where no agent answers: the configuration that has the names
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    run_dir: RunDir,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    /// For people
    Table,
    /// The same with services and addresses of backends
    Wide,
    /// For scripts: an object a line
    Json,
}

fn clients(text: &str) -> Result<IpNetwork, String> {
    text.parse().map_err(|_| "use an address or a prefix, such as 192.0.2.1 or 2001:db8::/32".to_owned())
}

impl Which {
    fn filter(&self) -> Filter {
        let Self { service, backend, client, state } = self;
        Filter { service: service.clone(), backend: backend.clone(), client: *client, state: *state }
    }
}

pub async fn run(command: &Conn) -> anyhow::Result<()> {
    match command {
        Conn::List { which, limit, output, place } => list(&which.filter(), *limit, *output, place).await,
        Conn::Flush { which, all, output, place } => {
            let flushed = flush_by(place, FlushAsked { filter: which.filter(), all: *all }).await?;
            match output {
                Format::Json => say!("{}", serde_json::to_string_pretty(&flushed)?),
                Format::Table => {
                    let count = usize::try_from(flushed.flushed).unwrap_or(usize::MAX);
                    say!("{} flushed", output::count(count, "connection"));
                }
            }
            Ok(())
        }
    }
}

async fn list(filter: &Filter, limit: Option<u64>, shape: Shape, place: &Place) -> anyhow::Result<()> {
    let Filter { service, backend, client, state } = filter.clone();
    let asked = serde_urlencoded::to_string(ConnectionsAsked { service, backend, client, state, limit })?;
    let resource = format!("/v1/connections?{asked}");
    let mut shown = Shown::new(shape);
    let told = Client::new(&place.run_dir.run_dir).lines(&resource, |line| shown.line(line)).await;
    match told {
        Ok(()) => {}
        Err(error) => {
            let pinned = place.pinned(error)?;
            let listing = Listing::new(
                pinned.image.connections.clone(),
                &pinned.index(),
                pinned.config.as_ref(),
                filter,
                limit,
            );
            for connection in listing.map_err(anyhow::Error::msg)? {
                shown.line(&serde_json::to_vec(&connection)?)?;
            }
        }
    }
    shown.end();
    Ok(())
}

async fn flush_by(place: &Place, asked: FlushAsked) -> anyhow::Result<Flushed> {
    match Client::new(&place.run_dir.run_dir).post("/v1/connections/flush", &asked).await {
        Ok(flushed) => Ok(flushed),
        Err(error) => {
            let pinned = place.pinned(error.into())?;
            let (image, config) = (&pinned.image, pinned.config.as_ref());
            let flushed = flush(&image.connections, &pinned.index(), config, &asked.filter);
            Ok(Flushed { flushed: flushed.map_err(anyhow::Error::msg)? })
        }
    }
}

/// What a dead agent left, and the names for it.
struct Pinned {
    image: Image,
    config: Option<Config>,
}

impl Pinned {
    fn index(&self) -> Index {
        Index::new(&self.image)
    }
}

impl Place {
    /// Where no agent runs; any other error stays one.
    fn pinned(&self, error: anyhow::Error) -> anyhow::Result<Pinned> {
        let not_running = match error.downcast() {
            Ok(not_running @ ClientError::NotRunning { .. }) => not_running,
            Ok(other) => return Err(other.into()),
            Err(other) => return Err(other),
        };
        let maps = || {
            let fs = BpfFs::existing(&self.run_dir.run_dir)?.context("and nothing is pinned there")?;
            anyhow::Ok(Maps::from_pins(&fs)?.image()?)
        };
        let image = maps().context(not_running)?;
        let config =
            self.config.as_ref().map(|file| config::load(file)).transpose()?.map(|loaded| loaded.config);
        let names = if config.is_some() { "" } else { " (names are not known; -c FILE has them)" };
        eprintln!("no agent answers; reading the pinned maps{names}");
        Ok(Pinned { image, config })
    }
}

/// Lines before the widths of columns are chosen.
const FIRST: usize = 200;

/// What is shown, as it comes.
struct Shown {
    shape: Shape,
    out: Lines,
    widths: Vec<usize>,
    /// Rows that wait for the widths; nothing once these are chosen.
    first: Option<Vec<Vec<String>>>,
    count: u64,
}

impl Shown {
    fn new(shape: Shape) -> Self {
        let widths = header(shape).iter().map(|name| name.len()).collect();
        Self { shape, out: Lines::new(), widths, first: Some(Vec::new()), count: 0 }
    }

    /// A connection, as the agent tells it.
    fn line(&mut self, line: &[u8]) -> anyhow::Result<()> {
        self.count += 1;
        if self.shape == Shape::Json {
            self.out.say(line);
            return Ok(());
        }
        let connection: Connection = serde_json::from_slice(line).context("the agent's answer")?;
        let row = row(&connection, self.shape);
        match &mut self.first {
            Some(first) => {
                first.push(row);
                if first.len() == FIRST {
                    self.begin();
                }
            }
            None => self.row(&row),
        }
        Ok(())
    }

    /// Chooses the widths, and shows what has waited for them.
    fn begin(&mut self) {
        let Some(first) = self.first.take() else { return };
        for row in &first {
            for (width, cell) in self.widths.iter_mut().zip(row) {
                *width = (*width).max(cell.len());
            }
        }
        let header: Vec<String> = header(self.shape).into_iter().map(str::to_owned).collect();
        self.row(&header);
        first.iter().for_each(|row| self.row(row));
    }

    fn row(&mut self, row: &[String]) {
        let cells = row.iter().zip(&self.widths).map(|(cell, width)| format!("{cell:width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        self.out.say(line.trim_end().as_bytes());
    }

    fn end(mut self) {
        if self.shape != Shape::Json && self.count == 0 {
            self.out.say(b"no connections");
        } else if self.shape != Shape::Json {
            self.begin();
        }
        self.out.end();
    }
}

const COLUMNS: [&str; 11] =
    ["PROTOCOL", "CLIENT", "VIP", "SOURCE", "BACKEND", "STATE", "AGE", "IDLE", "SEEN", "SERVICE", "ADDRESS"];
/// Those that only a wide table has are the last.
const NARROW: usize = 9;

fn header(shape: Shape) -> Vec<&'static str> {
    let columns = if shape == Shape::Wide { COLUMNS.len() } else { NARROW };
    COLUMNS[..columns].to_vec()
}

fn row(connection: &Connection, shape: Shape) -> Vec<String> {
    fn or_dash(cell: Option<impl ToString>) -> String {
        cell.map_or_else(|| "-".to_owned(), |cell| cell.to_string())
    }
    let named = connection.pool.as_ref().zip(connection.backend.as_ref());
    let backend = named.map(|(pool, name)| format!("{pool}/{name}"));
    let seen = [(connection.answered, "answer"), (connection.reset, "reset")];
    let seen: Vec<&str> = seen.iter().filter(|(was, _)| *was).map(|(_, word)| *word).collect();
    let mut row = vec![
        connection.protocol.clone(),
        connection.client.to_string(),
        connection.vip.to_string(),
        or_dash(connection.source),
        backend.unwrap_or_else(|| or_dash(connection.backend_address)),
        connection.state.to_string(),
        output::duration(connection.age_seconds as u64),
        output::duration(connection.idle_seconds),
        if seen.is_empty() { "-".to_owned() } else { seen.join(",") },
    ];
    if shape == Shape::Wide {
        row.extend([or_dash(connection.service.as_ref()), or_dash(connection.backend_address)]);
    }
    row
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(client: &str) -> Connection {
        Connection {
            protocol: "tcp".to_owned(),
            client: client.parse().unwrap(),
            vip: "203.0.113.10:80".parse().unwrap(),
            service: Some("www".to_owned()),
            source: None,
            pool: Some("web".to_owned()),
            backend: Some("web1".to_owned()),
            backend_id: 7,
            backend_address: "10.0.1.11:8080".parse().ok(),
            state: ConnectionState::Established,
            age_seconds: 61.5,
            idle_seconds: 2,
            answered: true,
            reset: false,
        }
    }

    #[test]
    fn a_row_has_a_cell_for_each_column() {
        for shape in [Shape::Table, Shape::Wide] {
            assert_eq!(row(&connection("192.0.2.1:5"), shape).len(), header(shape).len());
        }
        let of_no_name = Connection { pool: None, ..connection("[2001:db8::1]:5") };
        let row = row(&of_no_name, Shape::Table);
        assert_eq!(row[1..5], ["[2001:db8::1]:5", "203.0.113.10:80", "-", "10.0.1.11:8080"]);
        assert_eq!(row[6..], ["1 min 1 s", "2 s", "answer"]);
    }
}
