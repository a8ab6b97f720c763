//! Keeps next hops and interfaces current by what the kernel notifies. Owns the task that does so; must not know what
//! next hops are for.

mod agenda;
mod hold;
mod monitor;
mod table;
mod task;

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;

use super::{Link, NextHop, Resolver, Unresolved};
pub use hold::Answer;
use hold::{TIMES, Times};
use monitor::{Monitor, RECEIVE_BUFFER};
use task::Task;

/// Addresses, with what is known of each: from a first look, or taken over. `None`: nothing.
pub type Known = HashMap<IpAddr, Option<Result<NextHop, Unresolved>>>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Answers that differ from what was known or told last.
    NextHops(HashMap<IpAddr, Answer>),
    /// Interfaces that appeared, changed or went. All of them at first, and again after messages were lost.
    Links(Vec<LinkEvent>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkEvent {
    /// New, or different in anything that [`Link`] says. A renamed interface keeps its index.
    Changed(Link),
    /// Deleted, or moved to another network namespace.
    Gone { ifindex: u32, name: String },
}

/// A next hop that was good is told as good for this long without an answer from its neighbour.
pub const HOLD_SILENT: Duration = TIMES.silent;
/// A next hop that was good is told as good for this long without a route, or with its interface down.
pub const HOLD_NO_WAY: Duration = TIMES.no_way;

/// Follows next hops and interfaces until it is dropped. Neighbours stay in the kernel's care then.
#[derive(Debug)]
pub struct Follower {
    addresses: watch::Sender<Known>,
    task: AbortHandle,
}

/// What tests turn down.
#[derive(Debug, Clone, Copy)]
struct Settings {
    times: Times,
    receive_buffer: usize,
}

impl Follower {
    /// Follows in the network namespace of the calling thread, which should be the resolver's.
    ///
    /// Neighbours of watched addresses are put into the kernel's care (NTF_EXT_MANAGED, 5.16), which confirms them
    /// without traffic. Older kernels are asked to confirm them whenever they have become stale.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn start(resolver: Arc<Resolver>) -> io::Result<(Follower, mpsc::Receiver<Event>)> {
        Follower::start_with(resolver, Settings { times: TIMES, receive_buffer: RECEIVE_BUFFER })
    }

    fn start_with(
        resolver: Arc<Resolver>,
        settings: Settings,
    ) -> io::Result<(Follower, mpsc::Receiver<Event>)> {
        let monitor = Monitor::open(settings.receive_buffer)?;
        let (addresses, watched) = watch::channel(Known::new());
        // What is not taken yet is merged with what comes later, so that one place is enough.
        let (events, receiver) = mpsc::channel(1);
        let task = Task::new(resolver, monitor, settings.times, watched);
        let task = tokio::spawn(task.run(events)).abort_handle();
        Ok((Follower { addresses, task }, receiver))
    }

    /// Replaces the set of addresses. An answer that differs from what is known will be told; of addresses that were
    /// watched before, any answer is told again.
    pub fn watch(&self, addresses: Known) {
        self.addresses.send_replace(addresses);
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[cfg(test)]
mod tests;
