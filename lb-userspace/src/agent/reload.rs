//! A reload from the wish to its end: reads the file, asks new backends aside, has the core take it over, and tells the
//! log, `xlb status` and whoever asked how it went. How it is taken over is not its business.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tracing::{error, info, warn};

use super::changeover::capacity_for;
use super::core::{BackendKey, Core, NextHops};
use super::first_probes::first_probes;
use super::{FIRST_RESOLVE, has_room};
use crate::api::{EndpointError, Endpoints};
use crate::capacity::Capacity;
use crate::config::model::Config;
use crate::config::{self, Loaded, Problem, Problems};
use crate::health::Probe;
use crate::nexthop::Resolver;

/// Where the end of a reload is told; nowhere if a signal asked for it.
pub type Reply = Option<oneshot::Sender<Result<Summary, Refused>>>;

/// A configuration that is in force, and what it changed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Summary {
    pub file: String,
    pub services: usize,
    pub pools: usize,
    pub backends: usize,
    /// `service www`, `backend web/web1`.
    pub added: Vec<String>,
    pub removed: Vec<String>,
    pub warnings: Vec<String>,
}

/// Why the configuration before it goes on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Refused {
    /// One line for each reason.
    pub error: String,
    /// What is wrong with the file. Empty where the host does not let it be.
    #[serde(default)]
    pub problems: Vec<Problem>,
}

impl Summary {
    pub fn new(file: &Path, before: &Config, now: &Config, warnings: &[Problem]) -> Self {
        let (old, new) = (names(before), names(now));
        Self {
            file: file.display().to_string(),
            services: now.services.len(),
            pools: now.pools.len(),
            backends: now.pools.iter().map(|pool| pool.backends.len()).sum(),
            added: new.difference(&old).cloned().collect(),
            removed: old.difference(&new).cloned().collect(),
            warnings: warnings.iter().map(ToString::to_string).collect(),
        }
    }
}

impl From<Problems> for Refused {
    fn from(problems: Problems) -> Self {
        Self { error: problems.to_string(), problems: problems.0 }
    }
}

impl Refused {
    pub fn by_the_host(error: &anyhow::Error) -> Self {
        Self { error: format!("{error:#}"), problems: Vec::new() }
    }
}

/// A valid file, and what was asked of its backends.
#[derive(Debug)]
pub struct Read {
    loaded: Loaded,
    first: Vec<(BackendKey, Probe)>,
    found: NextHops,
    reply: Reply,
}

/// Carries reloads out, one at a time.
#[derive(Debug)]
pub struct Reloader {
    resolver: Arc<Resolver>,
    read: mpsc::Sender<Read>,
    asking: Option<JoinHandle<()>>,
}

impl Reloader {
    /// What comes out of the receiver is for [`Self::finish`].
    pub fn new(resolver: Arc<Resolver>) -> (Self, mpsc::Receiver<Read>) {
        let (read, reads) = mpsc::channel(1);
        (Self { resolver, read, asking: None }, reads)
    }

    /// Reads the file again and asks its new backends aside: health and requests do not wait for a reload. A later file
    /// overtakes one whose backends are still being asked. Returns whether there is anything to finish.
    pub fn begin(&mut self, core: &mut Core, reply: Reply) -> bool {
        if let Some(overtaken) = self.asking.take() {
            overtaken.abort();
        }
        let loaded = match config::load(core.config_path()) {
            Ok(loaded) => loaded,
            Err(problems) => {
                refuse(core, problems.into(), reply);
                return false;
            }
        };
        for warning in &loaded.warnings {
            warn!("{warning}");
        }
        // Other limits take new maps, beside those in use.
        let capacity = capacity_for(&loaded.config, core.config(), &core.image);
        if capacity != Capacity::new(&core.config().limits)
            && let Err(no_room) = has_room(&capacity, &loaded.places)
        {
            refuse(core, Refused::by_the_host(&no_room.into()), reply);
            return false;
        }
        let (unknown, missing) = (core.unknown(&loaded.config), core.to_resolve(&loaded.config, false));
        let (resolver, to) = (Arc::clone(&self.resolver), self.read.clone());
        self.asking = Some(tokio::spawn(async move {
            let found = resolver.resolve_all(&missing, FIRST_RESOLVE);
            let (found, first) = tokio::join!(found, first_probes(unknown));
            _ = to.send(Read { loaded, first, found, reply }).await;
        }));
        true
    }

    /// Takes over a configuration that is valid, or leaves everything as it is.
    pub async fn finish(&mut self, core: &mut Core, read: Read, endpoints: &mut Endpoints) {
        let Read { loaded: Loaded { config, warnings, .. }, first, found, reply } = read;
        let prepared = match endpoints.prepare(&config) {
            Ok(prepared) => prepared,
            Err(EndpointError::Config(problem)) => {
                return refuse(core, Problems(vec![problem]).into(), reply);
            }
            Err(error) => return refuse(core, Refused::by_the_host(&error.into()), reply),
        };
        let summary = Summary::new(core.config_path(), core.file(), &config, &warnings);
        if let Err(error) = core.reload(config, &first, found, &self.resolver).await {
            return refuse(core, Refused::by_the_host(&error), reply);
        }
        if let Err(error) = endpoints.apply(prepared) {
            error!(error = %format!("{error:#}"), "the API's group is as before");
        }
        info!(file = %core.config_path().display(), "reloaded");
        tell(reply, Ok(summary));
    }
}

/// Says why the configuration before goes on.
fn refuse(core: &mut Core, refused: Refused, reply: Reply) {
    for line in refused.error.lines() {
        error!("{line}");
    }
    error!(reasons = refused.error.lines().count(), "reload refused; the last good configuration goes on");
    core.note_reload(Err(refused.error.clone()));
    tell(reply, Err(refused));
}

/// Tells it to whoever waits; one who has gone away needs no answer.
fn tell(reply: Reply, end: Result<Summary, Refused>) {
    if let Some(reply) = reply {
        _ = reply.send(end);
    }
}

fn names(config: &Config) -> BTreeSet<String> {
    let backends = config.pools.iter().flat_map(|pool| {
        pool.backends.iter().map(|backend| format!("backend {}/{}", pool.name, backend.name))
    });
    let services = config.services.iter().map(|service| format!("service {}", service.name));
    let pools = config.pools.iter().map(|pool| format!("pool {}", pool.name));
    services.chain(pools).chain(backends).collect()
}
