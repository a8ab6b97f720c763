//! What happened to connections that were not to be harmed, and which of it counts: what befell those of a server that
//! died does not. Pure.

use std::fmt;
use std::io::{self, ErrorKind};
use std::time::{Duration, Instant};

/// Something went wrong with a connection.
#[derive(Clone, Debug)]
pub struct Incident {
    /// When; of a stall, when the question was asked.
    pub at: Instant,
    /// When it began to connect.
    pub opened: Instant,
    /// Who answered first; empty if nobody did.
    pub server: String,
    pub kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Reset,
    /// Closed in an orderly way, or by an error of another kind.
    Ended,
    /// Given up after a long time without an answer.
    Silent,
    /// Answered by somebody else than before.
    Stranger(String),
    /// It never came about; why.
    Unopened(String),
    /// The answer came, this late.
    Stalled(Duration),
}

impl Incident {
    /// The connection goes on.
    pub fn is_a_stall(&self) -> bool {
        matches!(self.kind, Kind::Stalled(_))
    }
}

impl Kind {
    pub(super) fn of(error: &io::Error) -> Self {
        match error.kind() {
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => Self::Reset,
            ErrorKind::InvalidData => Self::Stranger(error.to_string()),
            _ => Self::Ended,
        }
    }
}

/// A server was dead for a while.
#[derive(Clone, Debug)]
pub struct Death {
    pub server: String,
    pub begin: Instant,
    /// From here on nobody was sent to it any more, or it lived again.
    pub end: Instant,
}

impl Death {
    /// Whether it explains an incident: connections that were with the server when it died, and those that were opened
    /// while it was taken for living.
    fn explains(&self, incident: &Incident) -> bool {
        let fell_into_it = incident.server.is_empty() && incident.opened >= self.begin;
        let was_with_it = incident.server == self.server;
        incident.opened <= self.end
            && (fell_into_it || was_with_it)
            && incident.at + incident.kind.lasted() >= self.begin
    }
}

impl Kind {
    fn lasted(&self) -> Duration {
        match self {
            Self::Stalled(took) => *took,
            _ => Duration::ZERO,
        }
    }
}

/// How often what happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub resets: usize,
    pub ended: usize,
    pub silent: usize,
    pub strangers: usize,
    pub unopened: usize,
    /// Longer than one second, longer than three.
    pub stalls: usize,
    pub long_stalls: usize,
    /// What a death explains, all kinds together.
    pub explained: usize,
}

/// What counts as a long stall.
pub const LONG_STALL: Duration = Duration::from_secs(3);

impl Tally {
    /// Counts what happened from `begin` on.
    pub fn since(begin: Instant, incidents: &[Incident], deaths: &[Death]) -> Self {
        let mut tally = Self::default();
        for incident in incidents.iter().filter(|incident| incident.at >= begin) {
            if deaths.iter().any(|death| death.explains(incident)) {
                tally.explained += 1;
                continue;
            }
            match incident.kind {
                Kind::Reset => tally.resets += 1,
                Kind::Ended => tally.ended += 1,
                Kind::Silent => tally.silent += 1,
                Kind::Stranger(_) => tally.strangers += 1,
                Kind::Unopened(_) => tally.unopened += 1,
                Kind::Stalled(took) => {
                    tally.stalls += 1;
                    tally.long_stalls += usize::from(took >= LONG_STALL);
                }
            }
        }
        tally
    }

    /// Connections that are no more and had no reason to go.
    pub fn broken(&self) -> usize {
        self.resets + self.ended + self.silent + self.strangers
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { resets, ended, silent, strangers, unopened, stalls, long_stalls, explained } = self;
        write!(
            f,
            "{resets} reset, {ended} ended, {silent} silent, {strangers} answered by another, {unopened} not opened, \
             {stalls} stalls, {long_stalls} of them long; {explained} explained by a death"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_death_explains_what_was_with_the_dead_and_nothing_else() {
        let zero = Instant::now();
        let at = |seconds| zero + Duration::from_secs(seconds);
        let death = Death { server: "web1".to_owned(), begin: at(10), end: at(12) };
        let rows = [
            ("before it", "web1", 5, 9, Kind::Reset, false),
            ("with it", "web1", 5, 11, Kind::Reset, true),
            ("long after, of a flow that it had", "web1", 5, 40, Kind::Reset, true),
            ("opened after it was healed", "web1", 13, 40, Kind::Reset, false),
            ("another", "web2", 5, 11, Kind::Reset, false),
            ("opened into it", "", 11, 11, Kind::Unopened(String::new()), true),
            ("not opened later", "", 13, 13, Kind::Unopened(String::new()), false),
            ("not opened before", "", 9, 9, Kind::Unopened(String::new()), false),
            ("a stall that it cut", "web1", 5, 9, Kind::Stalled(Duration::from_secs(2)), true),
        ];
        for (name, server, opened, happened, kind, explained) in rows {
            let incident = Incident { at: at(happened), opened: at(opened), server: server.to_owned(), kind };
            let tally = Tally::since(zero, &[incident], std::slice::from_ref(&death));
            assert_eq!(tally.explained == 1, explained, "{name}");
        }
    }

    #[test]
    fn long_stalls_are_stalls_too() {
        let zero = Instant::now();
        let stall = |seconds| Incident {
            at: zero,
            opened: zero,
            server: "web1".to_owned(),
            kind: Kind::Stalled(Duration::from_secs(seconds)),
        };
        let tally = Tally::since(zero, &[stall(1), stall(4)], &[]);
        assert_eq!((tally.stalls, tally.long_stalls, tally.broken()), (2, 1, 0));
    }
}
