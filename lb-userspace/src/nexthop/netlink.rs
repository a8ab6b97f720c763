//! Requests to the kernel and their answers, nothing more: owns the netlink socket and its traps, and must not
//! know what an answer is for.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures_util::{Stream, StreamExt, TryStreamExt};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::neighbour::{
    NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage,
};
use netlink_packet_route::route::{RouteAttribute, RouteMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::Handle;
use rustix::io::Errno;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::Link;
use super::decode::{self, Neighbour};
use super::features::Features;

/// The kernel answers within microseconds. An answer that the decoder rejects never arrives, so that every request
/// needs an end of its own.
const ANSWER_TIME: Duration = Duration::from_secs(2);
const DUMP_TIME: Duration = Duration::from_secs(10);
const BUSY_TRIES: u32 = 20;
const BUSY_PAUSE: Duration = Duration::from_millis(10);

/// Whether the kernel itself keeps a neighbour confirmed (NTF_EXT_MANAGED, 5.16).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Care {
    /// As it is.
    Keep,
    Set,
    TakeAway,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Error {
    /// The kernel's answer to a request.
    Kernel(Errno),
    Broken(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Kernel(errno) => io::Error::from(*errno).fmt(f),
            Error::Broken(what) => f.write_str(what),
        }
    }
}

impl From<rtnetlink::Error> for Error {
    fn from(error: rtnetlink::Error) -> Error {
        match error {
            rtnetlink::Error::NetlinkError(e) => match e.code {
                Some(code) => Error::Kernel(Errno::from_raw_os_error(code.get().abs())),
                None => Error::Broken("an acknowledgement in place of an answer".into()),
            },
            other => Error::Broken(other.to_string()),
        }
    }
}

/// A netlink socket of the network namespace of the thread that opened it.
#[derive(Debug)]
pub(super) struct Netlink {
    connection: Mutex<Connection>,
    /// A socket has room for one running dump; a second one gets EBUSY.
    dumping: tokio::sync::Mutex<()>,
    features: Features,
    #[cfg(test)]
    pub(super) route_questions: std::sync::atomic::AtomicUsize,
}

#[derive(Debug)]
struct Connection {
    handle: Handle,
    task: AbortHandle,
}

impl Connection {
    fn open() -> io::Result<Connection> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        let task = tokio::spawn(connection).abort_handle();
        Ok(Connection { handle, task })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Netlink {
    pub(super) fn open() -> io::Result<Netlink> {
        Ok(Netlink {
            connection: Mutex::new(Connection::open()?),
            dumping: tokio::sync::Mutex::new(()),
            features: Features::open()?,
            #[cfg(test)]
            route_questions: std::sync::atomic::AtomicUsize::new(0),
        })
    }

    /// The connection ends itself on a socket error; a later request opens another.
    pub(super) fn handle(&self) -> Result<Handle, Error> {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if connection.task.is_finished() {
            *connection = Connection::open().map_err(|e| Error::Broken(e.to_string()))?;
        }
        Ok(connection.handle.clone())
    }

    #[cfg(test)]
    pub(super) fn break_connection(&self) {
        self.connection.lock().unwrap().task.abort();
    }

    /// The route that a packet to `address` would take now, through cached exceptions such as a learnt path MTU.
    /// Of a multipath route the kernel answers with one leg.
    pub(super) async fn route(&self, address: IpAddr) -> Result<RouteMessage, Error> {
        #[cfg(test)]
        self.route_questions.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mut request = RouteMessage::default();
        request.header.address_family = family(address);
        request.header.destination_prefix_length = if address.is_ipv4() { 32 } else { 128 };
        request.attributes.push(RouteAttribute::Destination(address.into()));
        first(self.handle()?.route().get(request).execute()).await
    }

    pub(super) async fn link_of_index(&self, ifindex: u32) -> Result<Link, Error> {
        let request = self.handle()?.link().get().match_index(ifindex);
        first(request.execute()).await.map(|message| self.link(message))
    }

    pub(super) async fn link_of_name(&self, name: &str) -> Result<Link, Error> {
        let request = self.handle()?.link().get().match_name(name);
        first(request.execute()).await.map(|message| self.link(message))
    }

    pub(super) async fn links(&self) -> Result<Vec<Link>, Error> {
        let all = self.dump(|handle| handle.link().get().execute()).await?;
        let mut links: Vec<Link> = all.into_iter().map(decode::link).collect();
        match self.features.all() {
            Ok(Some(targets)) => {
                for link in &mut links {
                    link.redirect_target = targets.get(&link.ifindex).copied().unwrap_or_default();
                }
            }
            Ok(None) => {}
            Err(error) => debug!(%error, "XDP features not read"),
        }
        Ok(links)
    }

    /// What a message says of an interface, with what only a question tells.
    pub(super) fn link(&self, message: LinkMessage) -> Link {
        let mut link = decode::link(message);
        match self.features.redirect_target(link.ifindex, link.kind.as_deref()) {
            Ok(target) => link.redirect_target = target,
            // One that is gone already among others.
            Err(error) => debug!(interface = %link.name, %error, "XDP features not read"),
        }
        link
    }

    pub(super) fn takes_native_xdp(&self, ifindex: u32) -> Option<bool> {
        self.features.takes_native_xdp(ifindex).unwrap_or_else(|error| {
            debug!(ifindex, %error, "XDP features not read");
            None
        })
    }

    /// Local addresses with the index of their interface.
    pub(super) async fn addresses(&self) -> Result<Vec<(IpAddr, u32)>, Error> {
        let all = self.dump(|handle| handle.address().get().execute());
        Ok(all.await?.iter().filter_map(decode::local_address).collect())
    }

    pub(super) async fn neighbours(&self) -> Result<Vec<Neighbour>, Error> {
        let all = self.dump(|handle| handle.neighbours().get().execute());
        Ok(all.await?.into_iter().filter_map(decode::neighbour).collect())
    }

    /// One neighbour without a dump (kernel 5.0); `None` where the kernel has no entry.
    pub(super) async fn neighbour(&self, ifindex: u32, address: IpAddr) -> Result<Option<Neighbour>, Error> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(address);
        message.header.ifindex = ifindex;
        message.attributes.push(NeighbourAttribute::Destination(address.into()));
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetNeighbour(message));
        request.header.flags = NLM_F_REQUEST;
        let answers = self.handle()?.request(request)?.map(|answer| match answer.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(message)) => Ok(message),
            NetlinkPayload::Error(e) => Err(rtnetlink::Error::NetlinkError(e)),
            _ => Err(rtnetlink::Error::UnexpectedMessage(answer)),
        });
        match first(answers).await {
            Ok(message) => Ok(decode::neighbour(message)),
            Err(Error::Kernel(Errno::NOENT)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes the kernel ask for a neighbour as if a packet for it were queued, and creates the entry if need be.
    ///
    /// On a permanent entry this would clear the permanence: only for those that are not. It also replaces the
    /// entry's flags, so that it must be given `known`, and sets or takes away the kernel's own care as told. For
    /// IPv6 the kernel (6.18) sends nothing until the interface has a link-local address that has passed duplicate
    /// detection.
    pub(super) async fn use_neighbour(
        &self,
        (ifindex, address): (u32, IpAddr),
        known: Option<&Neighbour>,
        care: Care,
    ) -> Result<(), Error> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(address);
        message.header.ifindex = ifindex;
        message.header.flags = NeighbourFlags::Use;
        if known.is_some_and(|known| known.learnt) {
            message.header.flags |= NeighbourFlags::ExtLearned;
        }
        message.attributes.push(NeighbourAttribute::Destination(address.into()));
        // A kernel that does not know this attribute passes over it; `Use` keeps it from taking the request for one
        // that sets the state to "none".
        if care == Care::Set || care == Care::Keep && known.is_some_and(|known| known.managed) {
            message.attributes.push(NeighbourAttribute::ExtFlags(NeighbourExtFlags::Managed));
        }
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewNeighbour(message));
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_REPLACE;
        if care != Care::TakeAway {
            request.header.flags |= NLM_F_CREATE;
        }
        let mut answers = std::pin::pin!(self.handle()?.request(request)?);
        match timeout(ANSWER_TIME, answers.next()).await {
            Ok(Some(answer)) => match answer.payload {
                NetlinkPayload::Error(e) if e.code.is_some() => Err(rtnetlink::Error::NetlinkError(e).into()),
                _ => Ok(()),
            },
            // An acknowledgement ends the answers and is none itself.
            Ok(None) => Ok(()),
            Err(_) => Err(no_answer(ANSWER_TIME)),
        }
    }

    async fn dump<T, S>(&self, start: impl Fn(&Handle) -> S) -> Result<Vec<T>, Error>
    where
        S: Stream<Item = Result<T, rtnetlink::Error>>,
    {
        let _one_at_a_time = self.dumping.lock().await;
        let mut tries = 0;
        loop {
            let handle = self.handle()?;
            let all =
                timeout(DUMP_TIME, start(&handle).try_collect()).await.map_err(|_| no_answer(DUMP_TIME))?;
            match all.map_err(Error::from) {
                // A dump whose caller went away is still being read.
                Err(Error::Kernel(Errno::BUSY)) if tries < BUSY_TRIES => {
                    tries += 1;
                    sleep(BUSY_PAUSE).await;
                }
                result => return result,
            }
        }
    }
}

async fn first<T>(answers: impl Stream<Item = Result<T, rtnetlink::Error>>) -> Result<T, Error> {
    let mut answers = std::pin::pin!(answers);
    match timeout(ANSWER_TIME, answers.next()).await {
        Ok(Some(answer)) => answer.map_err(Error::from),
        Ok(None) => Err(Error::Broken("the connection has ended".into())),
        Err(_) => Err(no_answer(ANSWER_TIME)),
    }
}

fn no_answer(time: Duration) -> Error {
    Error::Broken(format!("no answer within {} s", time.as_secs()))
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}
