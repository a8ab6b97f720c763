//! The follower's loop: owns the order of reading, asking and telling. What follows from what is the table's and the
//! agenda's.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{MissedTickBehavior, interval, sleep_until};
use tracing::{debug, warn};

use super::agenda::{Agenda, COALESCE};
use super::hold::Times;
use super::monitor::{Batch, Monitor, Notice};
use super::table::{Concerns, Request, Table};
use super::{Event, Known};
use crate::nexthop::decode::Neighbour;
use crate::nexthop::netlink::Error;
use crate::nexthop::resolver::{NeighbourKey, Resolver, not_asked};
use crate::nexthop::route::Path;
use crate::nexthop::{Link, Unresolved};

const TICK: Duration = Duration::from_secs(1);
/// Ticks between looks at interfaces: XDP programs that come and go are not always told.
const LINK_TICKS: u32 = 5;
/// Ticks between looks at everything: path MTUs that are learnt and forgotten are never told.
const FULL_TICKS: u32 = 30;
/// Of many addresses, as if so many were looked at in a tick.
const PATHS_A_TICK: usize = 100;
/// Reading all interfaces takes at most one part in this many of the time.
const LINK_SHARE: u32 = 50;
/// Between two readings of everything because of lost messages.
const RESYNC_REST: Duration = Duration::from_secs(1);
/// Between two readings of everything because of messages that are not understood.
const UNCLEAR_REST: Duration = Duration::from_secs(30);
const WARN_AGAIN: Duration = Duration::from_secs(10);
const IN_FLIGHT: usize = 32;

/// What a job has found out.
enum Done {
    Paths(Vec<(std::net::IpAddr, Result<Path, Unresolved>)>, Duration),
    Neighbours(Vec<(NeighbourKey, Result<Option<Neighbour>, Error>)>),
    Requests(Vec<(Request, Result<(), Error>)>),
    Links(Result<Vec<Link>, Error>, Duration),
    Released,
}

/// Losses that have not been made good yet.
#[derive(Default)]
struct Losses {
    resync_at: Option<Instant>,
    resynced: Option<Instant>,
    count: u64,
    warned: Option<Instant>,
}

pub(super) struct Task {
    resolver: Arc<Resolver>,
    monitor: Monitor,
    table: Table,
    agenda: Agenda,
    watched: watch::Receiver<Known>,
    /// At most one of each kind, besides releases.
    jobs: JoinSet<Done>,
    reading_neighbours: bool,
    requesting: bool,
    reading_links: bool,
    links_wanted: bool,
    /// Links are told even if they are as they were told.
    links_again: bool,
    /// When they may be read again without a reason.
    links_rested: Instant,
    losses: Losses,
    ticks: u32,
}

impl Task {
    pub(super) fn new(
        resolver: Arc<Resolver>,
        monitor: Monitor,
        times: Times,
        watched: watch::Receiver<Known>,
    ) -> Task {
        Task {
            resolver,
            monitor,
            table: Table::new(times),
            agenda: Agenda::default(),
            watched,
            jobs: JoinSet::new(),
            reading_neighbours: false,
            requesting: false,
            reading_links: false,
            links_wanted: true,
            links_again: true,
            links_rested: Instant::now(),
            losses: Losses::default(),
            ticks: 0,
        }
    }

    /// Ends when the handle or the receiver of events is dropped.
    pub(super) async fn run(mut self, events: mpsc::Sender<Event>) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let now = Instant::now();
            self.table.on_time(now);
            if self.losses.resync_at.is_some_and(|at| at <= now) {
                self.resync(now);
            }
            self.start_jobs(now);
            let wake = [self.agenda.due(now), self.table.wake(), self.losses.resync_at];
            let wake = wake.into_iter().flatten().min();
            let pause = sleep_until(wake.unwrap_or(now + TICK).into());
            // Of routes, only what could still change what is asked.
            let routes = !self.agenda.all_marked();
            tokio::select! {
                batch = self.monitor.receive(routes) => match batch {
                    Ok(batch) => self.on_batch(batch),
                    Err(error) => {
                        warn!(%error, "netlink notifications are not to be read; trying again");
                        self.lose(Instant::now(), RESYNC_REST);
                        tokio::time::sleep(TICK).await;
                    }
                },
                Some(done) = self.jobs.join_next(), if !self.jobs.is_empty() => self.on_done(done),
                changed = self.watched.changed() => match changed {
                    Ok(()) => self.watch(),
                    Err(_) => return,
                },
                place = events.reserve(), if self.table.has_news() => match place {
                    Ok(place) => self.tell(place),
                    Err(_) => return,
                },
                () = events.closed() => return,
                _ = ticks.tick() => self.tick(),
                () = pause => {}
            }
        }
    }

    fn tell(&mut self, place: mpsc::Permit<'_, Event>) {
        let links = self.table.take_link_news();
        if !links.is_empty() {
            place.send(Event::Links(links));
            return;
        }
        let news = self.table.take_news();
        if !news.is_empty() {
            place.send(Event::NextHops(news));
        }
    }

    fn watch(&mut self) {
        let addresses = self.watched.borrow_and_update().clone();
        let (new, released) = self.table.watch(addresses);
        self.agenda.watch(self.table.addresses());
        self.agenda.mark_urgent(new);
        self.release(released);
    }

    fn tick(&mut self) {
        self.ticks = self.ticks.wrapping_add(1);
        let now = Instant::now();
        self.links_wanted |= self.ticks.is_multiple_of(LINK_TICKS) && now >= self.links_rested;
        let full = FULL_TICKS.max((self.table.addresses().count() / PATHS_A_TICK) as u32);
        if self.ticks.is_multiple_of(full) {
            self.agenda.mark_all(now);
            self.table.forget_readings();
        }
    }

    // ---- What the kernel tells -----------------------------------------------------------------------

    fn on_batch(&mut self, batch: Batch) {
        let now = Instant::now();
        if batch.lost {
            self.losses.count += 1;
            self.lose(now, RESYNC_REST);
        }
        for notice in batch.notices {
            self.on_notice(now, notice);
        }
    }

    fn on_notice(&mut self, now: Instant, notice: Notice) {
        match notice {
            Notice::Route(prefix, length) => self.agenda.mark_covered(now, prefix, length),
            Notice::Rule => self.agenda.mark_all(now),
            Notice::Address(address, length, ifindex) => {
                self.agenda.mark_covered(now, address, length);
                self.agenda.mark(now, self.table.users(ifindex, Some(address)));
            }
            Notice::Neighbour(neighbour) => {
                let key = (neighbour.ifindex, neighbour.address);
                self.table.on_neighbour(now, key, Some(neighbour));
            }
            Notice::NeighbourGone(neighbour) => {
                self.table.on_neighbour(now, (neighbour.ifindex, neighbour.address), None);
            }
            Notice::Link(message) => {
                let link = self.resolver.netlink.link(message);
                let concerns = self.table.on_link(now, link);
                self.ask_concerned(now, concerns);
            }
            Notice::LinkGone(ifindex) => {
                let concerns = self.table.on_link_gone(ifindex);
                self.ask_concerned(now, concerns);
            }
            Notice::Unclear => {
                debug!("a netlink notification was not understood");
                self.lose(now, UNCLEAR_REST);
            }
        }
    }

    fn ask_concerned(&mut self, now: Instant, concerns: Concerns) {
        self.agenda.mark_urgent(concerns.users);
        if concerns.all {
            self.agenda.mark_all(now);
        }
    }

    /// Has everything read again: soon, and `rest` after the last time.
    fn lose(&mut self, now: Instant, rest: Duration) {
        let at = self.losses.resynced.map_or(now, |last| last + rest).max(now + COALESCE);
        let earlier = self.losses.resync_at.map_or(at, |before| before.min(at));
        self.losses.resync_at = Some(earlier);
    }

    fn resync(&mut self, now: Instant) {
        let losses = &mut self.losses;
        (losses.resync_at, losses.resynced) = (None, Some(now));
        if losses.count > 0 && losses.warned.is_none_or(|last| now >= last + WARN_AGAIN) {
            warn!(overruns = losses.count, "netlink notifications were lost; everything is read again");
            (losses.count, losses.warned) = (0, Some(now));
        }
        self.agenda.mark_all(now);
        self.table.forget_readings();
        (self.links_wanted, self.links_again) = (true, true);
    }

    // ---- What is asked -------------------------------------------------------------------------------

    fn start_jobs(&mut self, now: Instant) {
        if let Some(batch) = self.agenda.next_batch(now) {
            let resolver = Arc::clone(&self.resolver);
            self.jobs.spawn(async move {
                let start = Instant::now();
                let paths = resolver.paths(batch).await;
                Done::Paths(paths, start.elapsed())
            });
        }
        if self.links_wanted && !self.reading_links {
            (self.links_wanted, self.reading_links) = (false, true);
            self.table.begin_reading_links();
            let resolver = Arc::clone(&self.resolver);
            self.jobs.spawn(async move {
                let start = Instant::now();
                let links = resolver.netlink.links().await;
                Done::Links(links, start.elapsed())
            });
        }
        if !self.reading_neighbours {
            let unread = self.table.unread();
            if !unread.is_empty() {
                self.reading_neighbours = true;
                let resolver = Arc::clone(&self.resolver);
                self.jobs.spawn(async move { Done::Neighbours(resolver.look_up(unread).await) });
            }
        }
        if !self.requesting {
            let requests = self.table.requests(now);
            if !requests.is_empty() {
                self.requesting = true;
                let resolver = Arc::clone(&self.resolver);
                self.jobs.spawn(async move { Done::Requests(send(&resolver, requests).await) });
            }
        }
    }

    fn release(&mut self, neighbours: Vec<Request>) {
        if neighbours.is_empty() {
            return;
        }
        let resolver = Arc::clone(&self.resolver);
        self.jobs.spawn(async move {
            for neighbour in neighbours {
                resolver.release(neighbour.key, neighbour.known.as_ref()).await;
            }
            Done::Released
        });
    }

    fn on_done(&mut self, done: Result<Done, JoinError>) {
        let now = Instant::now();
        match done {
            Ok(Done::Paths(paths, took)) => {
                self.agenda.on_answers(now, took);
                for (address, path) in paths {
                    self.table.on_path(now, address, path);
                }
                let released = self.table.drop_unused();
                self.release(released);
            }
            Ok(Done::Neighbours(neighbours)) => {
                self.reading_neighbours = false;
                for (key, entry) in neighbours {
                    let entry = entry.map_err(|error| not_asked(key.1, &error));
                    self.table.on_reading(now, key, entry);
                }
            }
            Ok(Done::Requests(answers)) => {
                self.requesting = false;
                let mut undo = Vec::new();
                for (request, answer) in answers {
                    let refused = answer.err().map(|error| not_asked(request.key.1, &error));
                    undo.extend(self.table.on_request(now, request, refused));
                }
                self.release(undo);
            }
            Ok(Done::Links(links, took)) => {
                self.reading_links = false;
                self.links_rested = now + LINK_SHARE * took;
                match links {
                    Ok(links) => {
                        let again = std::mem::take(&mut self.links_again);
                        let concerns = self.table.on_links(now, links, again);
                        self.ask_concerned(now, concerns);
                    }
                    Err(error) => warn!(%error, "interfaces are not read; trying again"),
                }
            }
            Ok(Done::Released) => {}
            Err(error) => {
                // Which job it was is not to be known: all of them begin anew.
                warn!(%error, "a question was not asked; everything is read again");
                self.jobs = JoinSet::new();
                (self.reading_neighbours, self.requesting, self.reading_links) = (false, false, false);
                self.agenda.on_answers(now, Duration::ZERO);
                self.lose(now, RESYNC_REST);
            }
        }
    }
}

async fn send(resolver: &Resolver, requests: Vec<Request>) -> Vec<(Request, Result<(), Error>)> {
    let sent = requests.into_iter().map(async |request| {
        let Request { key, known, care } = &request;
        let answer = resolver.netlink.use_neighbour(*key, known.as_ref(), *care).await;
        if let Err(error) = &answer {
            debug!(neighbour = %key.1, ?care, %error, "the kernel does not look after a neighbour");
        }
        (request, answer)
    });
    stream::iter(sent).buffer_unordered(IN_FLIGHT).collect().await
}
