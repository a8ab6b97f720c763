//! Where the agent can be asked: the unix socket and the addresses for metrics, as the configuration has them.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use nix::unistd::Gid;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::info;

use super::guard::Peer;
use super::{Socket, resources, serve, socket};
use crate::agent::Request;
use crate::config::Problem;
use crate::config::model::{Config, Written};

/// Why what the configuration asks for cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// It names what this host does not have.
    #[error("{0}")]
    Config(Problem),
    #[error("{0}")]
    Bind(Problem),
}

/// What answers now.
#[derive(Debug)]
pub struct Endpoints {
    socket: PathBuf,
    core: mpsc::Sender<Request>,
    metrics: HashMap<SocketAddr, JoinHandle<()>>,
}

/// The socket goes with the agent. What a killed one leaves is no harm: the next binds over it.
impl Drop for Endpoints {
    fn drop(&mut self) {
        _ = std::fs::remove_file(&self.socket);
    }
}

/// What a configuration asks for, to be had and not yet used. Dropping it leaves everything as it was.
#[derive(Debug)]
pub struct Prepared {
    group: Gid,
    /// All that are wanted; those that answer already have no listener.
    metrics: Vec<(SocketAddr, Option<TcpListener>)>,
}

impl Endpoints {
    /// Nothing answers yet.
    pub fn new(socket: &Socket, core: mpsc::Sender<Request>) -> Self {
        Self { socket: socket.path.clone(), core, metrics: HashMap::new() }
    }

    /// Looks the group up and binds what is new.
    pub fn prepare(&self, config: &Config) -> Result<Prepared, EndpointError> {
        let group = socket::group(&config.api).map_err(EndpointError::Config)?;
        let metrics = config.metrics.listen.iter().map(|listen| {
            let known = self.metrics.contains_key(&listen.value);
            Ok((listen.value, if known { None } else { Some(self.bind(listen)?) }))
        });
        Ok(Prepared { group, metrics: metrics.collect::<Result<_, _>>()? })
    }

    /// Uses what was prepared, and leaves what is no longer wanted.
    pub fn apply(&mut self, prepared: Prepared) -> anyhow::Result<()> {
        self.metrics.retain(|address, task| {
            let wanted = prepared.metrics.iter().any(|(wanted, _)| wanted == address);
            if !wanted {
                task.abort();
                info!(%address, "metrics are no longer served");
            }
            wanted
        });
        for (address, listener) in prepared.metrics {
            let Some(listener) = listener else { continue };
            let router = resources::public(self.core.clone());
            let task = tokio::spawn(serve::serve(listener, router, |_| Peer::Unknown));
            self.metrics.insert(address, task);
            info!(%address, "metrics are served");
        }
        socket::give(&self.socket, prepared.group)
    }

    fn bind(&self, listen: &Written<SocketAddr>) -> Result<TcpListener, EndpointError> {
        let address = listen.value;
        let bind = || {
            let listener = std::net::TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)
        };
        bind().map_err(|error| {
            let own = self.metrics.keys().find(|own| own.port() == address.port());
            let hint = match (error.kind(), own) {
                (io::ErrorKind::AddrInUse, Some(own)) => {
                    format!("this agent itself listens on {own}: take another port, or restart the agent")
                }
                (io::ErrorKind::AddrInUse, None) => {
                    format!("`ss -ltnp sport = :{}` shows who has it; choose another port", address.port())
                }
                (io::ErrorKind::AddrNotAvailable, _) => "use an address of this host".to_owned(),
                _ => "use an address and a port that xlb may listen on".to_owned(),
            };
            EndpointError::Bind(listen.problem(format!("cannot listen on {address}: {error}"), hint))
        })
    }
}
