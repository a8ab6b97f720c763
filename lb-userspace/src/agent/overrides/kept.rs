//! Overrides as a file in the run directory, with the backends that were configured last: who has left since is found
//! by them. Knows how it is written and read; what it says is not its business.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rustix::fs::{FileType, OFlags, fstat};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{Exit, Override, Overrides};
use crate::agent::core::BackendKey;
use crate::config::model::{
    Backend, Check, CheckKind, Config, Flows, Forward, IdleTimeout, OnDown, OnEmpty, OnRemove, Pool,
    ServerId, Tiers,
};
use crate::owned::{self, Whose};

const NAME: &str = "overrides.json";
const VERSION: u32 = 1;

/// 32,766 backends take some 4 MiB.
const MOST_BYTES: u64 = 64 << 20;

/// What an earlier agent has left.
#[derive(Debug, Default)]
pub struct Recovered {
    pub overrides: Overrides,
    /// As they were configured last, with those that were leaving.
    pub pools: Vec<Pool>,
}

impl Recovered {
    /// The configuration that these pools were in effect in, as far as leaving it goes.
    pub fn previous(&self, file: &Config) -> Config {
        Config { pools: self.pools.clone(), services: Vec::new(), ..file.clone() }
    }
}

/// Where overrides are kept.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    /// Names this life of the host: times since its start mean nothing in another.
    boot: String,
}

impl Store {
    pub fn new(run_dir: &Path) -> Self {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self { path: run_dir.join(NAME), boot: boot.trim().to_owned() }
    }

    /// What is kept. A file that cannot be read or says what no agent writes is put aside, and nothing is kept then.
    pub fn recover(&self) -> Recovered {
        match self.read() {
            Ok(recovered) => recovered,
            Err(error) => {
                let aside = self.path.with_extension("json.refused");
                let moved = std::fs::rename(&self.path, &aside);
                let moved = moved.map_or_else(|e| format!("; it stays: {e}"), |()| String::new());
                warn!(
                    error = %format!("{error:#}"), aside = %aside.display(),
                    "what was said of backends by commands is lost: they are as the file has them{moved}"
                );
                Recovered::default()
            }
        }
    }

    /// What is kept, for who only looks.
    pub fn read(&self) -> anyhow::Result<Recovered> {
        let context = || self.path.display().to_string();
        // A pipe in its place must not block.
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
        let file = match File::options().read(true).custom_flags(flags).open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Recovered::default()),
            opened => opened.with_context(context)?,
        };
        let stat = fstat(&file).with_context(context)?;
        owned::check(&self.path, &stat, Whose::OursOrAny, FileType::RegularFile)?;
        let mut text = Vec::new();
        file.take(MOST_BYTES + 1).read_to_end(&mut text).with_context(context)?;
        if text.len() as u64 > MOST_BYTES {
            bail!("{}: larger than {} MiB", self.path.display(), MOST_BYTES >> 20);
        }
        self.parse(&text).with_context(context)
    }

    fn parse(&self, text: &[u8]) -> anyhow::Result<Recovered> {
        let contents: Contents = serde_json::from_slice(text).context("no overrides of an agent")?;
        let version = contents.version;
        ensure!(version == VERSION, "version {version} of the format; this build reads {VERSION}");
        let same_boot = !self.boot.is_empty() && contents.boot == self.boot;
        contents.recovered(same_boot)
    }

    /// Keeps them, whole or not at all: the file before stays until the next is on its medium. `config` is the one in
    /// effect.
    pub fn save(&self, overrides: &Overrides, config: &Config) -> anyhow::Result<()> {
        let contents = Contents::new(&self.boot, overrides, config);
        let text = serde_json::to_vec(&contents)?;
        let new = self.path.with_extension("json.new");
        let write = || {
            // What a crash has left.
            match std::fs::remove_file(&new) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = File::options().write(true).create_new(true).mode(0o600).open(&new)?;
            file.write_all(&text)?;
            file.sync_all()?;
            std::fs::rename(&new, &self.path)?;
            File::open(self.path.parent().unwrap_or(Path::new("/")))?.sync_all()
        };
        write()
            .inspect_err(|_| _ = std::fs::remove_file(&new))
            .with_context(|| self.path.display().to_string())
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    version: u32,
    boot: String,
    overrides: Vec<Of<Override>>,
    leaving: Vec<Of<Exit>>,
    pools: Vec<PoolRecord>,
}

/// What is said of a backend.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Of<T> {
    pool: String,
    address: IpAddr,
    says: T,
}

impl<T> Of<T> {
    fn new((key, says): (&BackendKey, &T)) -> Self
    where
        T: Clone,
    {
        Self { pool: key.pool.clone(), address: key.address, says: says.clone() }
    }

    fn entry(self) -> (BackendKey, T) {
        (BackendKey { pool: self.pool, address: self.address }, self.says)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PoolRecord {
    name: String,
    forward: String,
    /// That packets are sent to; 0 where the way has none.
    #[serde(alias = "gue_port", default)]
    port: u16,
    check: CheckRecord,
    flows: FlowsRecord,
    backends: Vec<BackendRecord>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BackendRecord {
    name: String,
    address: IpAddr,
    weight: u8,
    #[serde(default)]
    port: Option<u16>,
    server_id: Option<Vec<u8>>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FlowsRecord {
    idle_tcp: Duration,
    idle_udp: Duration,
    on_down: String,
    down_grace: Duration,
    on_remove: String,
    drain_timeout: Option<Duration>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CheckRecord {
    kind: KindRecord,
    port: u16,
    #[serde(default)]
    at_own_port: bool,
    interval: Duration,
    timeout: Duration,
    rise: u32,
    fall: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum KindRecord {
    None,
    Tcp,
    Http { path: String, host: Option<String>, expect: Vec<RangeInclusive<u16>> },
}

impl Contents {
    fn new(boot: &str, overrides: &Overrides, config: &Config) -> Self {
        Self {
            version: VERSION,
            boot: boot.to_owned(),
            overrides: overrides.set.iter().map(Of::new).collect(),
            leaving: overrides.leaving.iter().map(Of::new).collect(),
            pools: config.pools.iter().map(PoolRecord::of).collect(),
        }
    }

    /// In another life of the host no flow is left of before, so nobody is leaving and every deadline has passed.
    fn recovered(self, same_boot: bool) -> anyhow::Result<Recovered> {
        let mut set: Vec<_> = self.overrides.into_iter().map(Of::entry).collect();
        if !same_boot {
            for exit in set.iter_mut().filter_map(|(_, over)| over.exit.as_mut()) {
                exit.since = Duration::ZERO;
                exit.deadline = exit.deadline.map(|_| Duration::ZERO);
            }
            let overrides = Overrides { set: set.into_iter().collect(), ..Overrides::default() };
            return Ok(Recovered { overrides, pools: Vec::new() });
        }
        let leaving = self.leaving.into_iter().map(Of::entry).collect();
        let pools = self.pools.into_iter().map(PoolRecord::pool).collect::<Result<_, _>>()?;
        Ok(Recovered { overrides: Overrides { set: set.into_iter().collect(), leaving }, pools })
    }
}

impl PoolRecord {
    fn of(pool: &Pool) -> Self {
        Self {
            name: pool.name.clone(),
            forward: pool.forward.to_string(),
            port: pool.forward.port(),
            check: CheckRecord::of(&pool.check),
            flows: FlowsRecord::of(&pool.flows),
            backends: pool.backends.iter().map(BackendRecord::of).collect(),
        }
    }

    fn pool(self) -> anyhow::Result<Pool> {
        let Self { name, forward, port, check, flows, backends } = self;
        let forward = word(&forward, Forward::WORDS, Forward::ALL)?.to_port(port);
        let backends = backends.into_iter().map(BackendRecord::backend).collect();
        let (check, flows) = (check.check(), flows.flows()?);
        let (on_empty, tiers) = (OnEmpty::Drop, Tiers::default());
        Ok(Pool { name, forward, check, on_empty, flows, slow_start: None, tiers, backends })
    }
}

fn word<T: Copy>(word: &str, words: &[&str], all: &[T]) -> anyhow::Result<T> {
    let found = words.iter().position(|known| *known == word).and_then(|place| all.get(place));
    found.copied().with_context(|| format!("{word} is not one of {}", words.join(", ")))
}

impl BackendRecord {
    fn of(backend: &Backend) -> Self {
        Self {
            name: backend.name.clone(),
            address: backend.address,
            weight: backend.weight,
            port: backend.port,
            server_id: backend.server_id.as_ref().map(|id| id.bytes().to_vec()),
        }
    }

    fn backend(self) -> Backend {
        let Self { name, address, weight, port, server_id } = self;
        Backend { name, address, weight, port, server_id: server_id.and_then(ServerId::new), leaving: false }
    }
}

impl FlowsRecord {
    fn of(flows: &Flows) -> Self {
        let Flows { idle_timeout: IdleTimeout { tcp, udp }, on_down, down_grace, on_remove, drain_timeout } =
            *flows;
        let (on_down, on_remove) = (on_down.to_string(), on_remove.to_string());
        Self { idle_tcp: tcp, idle_udp: udp, on_down, down_grace, on_remove, drain_timeout }
    }

    fn flows(self) -> anyhow::Result<Flows> {
        let Self { idle_tcp: tcp, idle_udp: udp, on_down, down_grace, on_remove, drain_timeout } = self;
        Ok(Flows {
            idle_timeout: IdleTimeout { tcp, udp },
            on_down: word(&on_down, OnDown::WORDS, OnDown::ALL)?,
            down_grace,
            on_remove: word(&on_remove, OnRemove::WORDS, OnRemove::ALL)?,
            drain_timeout,
        })
    }
}

impl CheckRecord {
    fn of(check: &Check) -> Self {
        let Check { kind, port, at_own_port, interval, timeout, rise, fall } = check.clone();
        let kind = match kind {
            CheckKind::None => KindRecord::None,
            CheckKind::Tcp => KindRecord::Tcp,
            CheckKind::Http { path, host, expect } => KindRecord::Http { path, host, expect },
        };
        Self { kind, port, at_own_port, interval, timeout, rise, fall }
    }

    fn check(self) -> Check {
        let Self { kind, port, at_own_port, interval, timeout, rise, fall } = self;
        let kind = match kind {
            KindRecord::None => CheckKind::None,
            KindRecord::Tcp => CheckKind::Tcp,
            KindRecord::Http { path, host, expect } => CheckKind::Http { path, host, expect },
        };
        Check { kind, port, at_own_port, interval, timeout, rise, fall }
    }
}
