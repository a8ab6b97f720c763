//! What is told of one address: the last good answer is held for a time when a lookup fails, because a neighbour that is
//! silent may still forward, and a routing daemon deletes a route before it adds the next. Pure: is given the time.

use std::time::{Duration, Instant};

use crate::nexthop::{NextHop, Unresolved};

/// How packets are to reach an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// What packets should take.
    pub hop: Result<NextHop, Unresolved>,
    /// Why `hop` is only being held, where it is.
    pub doubt: Option<Unresolved>,
}

/// How long a good answer outlives the last lookup that gave one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    /// While the neighbour is silent, or the kernel could not be asked.
    pub silent: Duration,
    /// While there is no way: interface down or gone, no route.
    pub no_way: Duration,
    /// How long an address of which nothing is known may take to get its first answer.
    pub first: Duration,
}

pub(super) const TIMES: Times = Times {
    silent: Duration::from_secs(30),
    no_way: Duration::from_secs(2),
    first: super::super::DEFAULT_WAIT,
};

/// What a reason is worth against an answer that was good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Weight {
    Silent,
    NoWay,
    /// Somebody has decided so.
    Explicit,
}

fn weight(reason: &Unresolved) -> Weight {
    match reason {
        Unresolved::NeighbourMissing { .. }
        | Unresolved::NeighbourFailed { .. }
        | Unresolved::NeighbourTableFull { .. }
        | Unresolved::Netlink(_) => Weight::Silent,
        Unresolved::NoRoute | Unresolved::Unreachable | Unresolved::InterfaceDown { .. } => Weight::NoWay,
        Unresolved::Blackhole
        | Unresolved::Prohibit
        | Unresolved::Local
        | Unresolved::NotUnicast(_)
        | Unresolved::Encapsulated { .. }
        | Unresolved::NoMac { .. } => Weight::Explicit,
    }
}

/// The kernel asks in rounds, and calls a silent neighbour missing and failed by turns: failed stands.
fn is_news(known: &Unresolved, found: &Unresolved) -> bool {
    if let (
        Unresolved::NeighbourFailed { neighbour, interface },
        Unresolved::NeighbourMissing { neighbour: other, interface: on },
    ) = (known, found)
    {
        return neighbour != other || interface != on;
    }
    known != found
}

#[derive(Debug)]
struct Doubt {
    reason: Unresolved,
    weight: Weight,
    /// Since when there has been no good answer.
    since: Instant,
    /// Since when reasons have had this weight.
    weight_since: Instant,
}

/// What is known of one address.
#[derive(Debug)]
pub(super) struct Hold {
    hop: Option<Result<NextHop, Unresolved>>,
    /// Only beside a hop that is good, or where there is none yet.
    doubt: Option<Doubt>,
}

impl Hold {
    pub(super) fn new(known: Option<Result<NextHop, Unresolved>>) -> Hold {
        Hold { hop: known, doubt: None }
    }

    /// `None` while there is nothing to tell.
    pub(super) fn answer(&self) -> Option<Answer> {
        let doubt = self.doubt.as_ref().map(|doubt| doubt.reason.clone());
        self.hop.clone().map(|hop| Answer { hop, doubt })
    }

    /// When [`Hold::on_time`] has something to do.
    pub(super) fn deadline(&self, times: &Times) -> Option<Instant> {
        let doubt = self.doubt.as_ref()?;
        if self.hop.is_none() {
            return Some(doubt.since + times.first);
        }
        let silent = doubt.since + times.silent;
        Some(match doubt.weight {
            Weight::NoWay => silent.min(doubt.weight_since + times.no_way),
            Weight::Silent | Weight::Explicit => silent,
        })
    }

    /// Takes what the kernel says now.
    pub(super) fn on_look(&mut self, now: Instant, found: Result<NextHop, Unresolved>) {
        let reason = match found {
            Ok(hop) => {
                *self = Hold::new(Some(Ok(hop)));
                return;
            }
            Err(reason) => reason,
        };
        let weight = weight(&reason);
        let counts_now = match (&self.hop, weight) {
            (Some(Ok(_)) | None, Weight::Silent) => false,
            (Some(Ok(_)), Weight::NoWay) => false,
            (Some(Err(known)), _) if !is_news(known, &reason) => return,
            _ => true,
        };
        if counts_now {
            *self = Hold::new(Some(Err(reason)));
            return;
        }
        match &mut self.doubt {
            None => self.doubt = Some(Doubt { reason, weight, since: now, weight_since: now }),
            Some(doubt) => {
                if doubt.weight != weight {
                    (doubt.weight, doubt.weight_since) = (weight, now);
                }
                if is_news(&doubt.reason, &reason) {
                    doubt.reason = reason;
                }
            }
        }
    }

    /// A hold that has run out becomes the answer.
    pub(super) fn on_time(&mut self, now: Instant, times: &Times) {
        if self.deadline(times).is_some_and(|deadline| deadline <= now)
            && let Some(doubt) = self.doubt.take()
        {
            self.hop = Some(Err(doubt.reason));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn hop(last: u8) -> NextHop {
        NextHop {
            ifindex: 3,
            interface: "eth0".into(),
            source_mac: [2, 0, 0, 0, 0, 1],
            mac: [2, 0, 0, 0, 0, last],
            mtu: 1500,
            preferred_source: None,
            gateway: None,
            kind: None,
            redirect_target: true,
        }
    }

    fn missing(last: u8) -> Unresolved {
        let neighbour = IpAddr::from([10, 0, 0, last]);
        Unresolved::NeighbourMissing { neighbour, interface: "eth0".into() }
    }

    fn failed(last: u8) -> Unresolved {
        let neighbour = IpAddr::from([10, 0, 0, last]);
        Unresolved::NeighbourFailed { neighbour, interface: "eth0".into() }
    }

    fn down() -> Unresolved {
        Unresolved::InterfaceDown { interface: "eth0".into(), admin_up: true }
    }

    fn sure(hop: Result<NextHop, Unresolved>) -> Option<Answer> {
        Some(Answer { hop, doubt: None })
    }

    fn held(doubt: Unresolved) -> Option<Answer> {
        Some(Answer { hop: Ok(hop(1)), doubt: Some(doubt) })
    }

    /// Rows: at this second, the kernel says this (or time passes), and this is told.
    #[expect(clippy::type_complexity, reason = "a table")]
    fn follow(
        known: Option<Result<NextHop, Unresolved>>,
        rows: &[(f64, Option<Result<NextHop, Unresolved>>, Option<Answer>)],
    ) {
        let start = Instant::now();
        let mut hold = Hold::new(known);
        for (number, (at, found, told)) in rows.iter().enumerate() {
            let now = start + Duration::from_secs_f64(*at);
            match found {
                Some(found) => hold.on_look(now, found.clone()),
                None => hold.on_time(now, &TIMES),
            }
            assert_eq!(hold.answer(), *told, "row {number}, at {at} s");
        }
    }

    #[test]
    fn a_good_answer_outlives_a_silent_neighbour_for_30_seconds() {
        follow(
            Some(Ok(hop(1))),
            &[
                (0.0, Some(Err(missing(1))), held(missing(1))),
                (3.0, Some(Err(failed(1))), held(failed(1))),
                (4.0, Some(Err(missing(1))), held(failed(1))),
                (29.9, None, held(failed(1))),
                (30.0, None, sure(Err(failed(1)))),
                (31.0, Some(Err(missing(1))), sure(Err(failed(1)))),
                (32.0, Some(Ok(hop(2))), sure(Ok(hop(2)))),
            ],
        );
    }

    #[test]
    fn a_good_answer_outlives_its_route_or_link_for_2_seconds() {
        for reason in [Unresolved::NoRoute, Unresolved::Unreachable, down()] {
            follow(
                Some(Ok(hop(1))),
                &[
                    (0.0, Some(Err(reason.clone())), held(reason.clone())),
                    (1.9, None, held(reason.clone())),
                    (2.0, None, sure(Err(reason))),
                ],
            );
        }
    }

    #[test]
    fn recovery_clears_the_doubt_at_once_and_the_next_one_starts_anew() {
        follow(
            Some(Ok(hop(1))),
            &[
                (0.0, Some(Err(down())), held(down())),
                (1.0, Some(Ok(hop(1))), sure(Ok(hop(1)))),
                (1.5, Some(Err(down())), held(down())),
                (3.4, None, held(down())),
                (3.5, None, sure(Err(down()))),
            ],
        );
    }

    #[test]
    fn a_link_that_is_back_gives_its_neighbour_the_longer_time() {
        follow(
            Some(Ok(hop(1))),
            &[
                (0.0, Some(Err(down())), held(down())),
                (1.0, Some(Err(missing(1))), held(missing(1))),
                (29.0, None, held(missing(1))),
                (30.0, None, sure(Err(missing(1)))),
            ],
        );
    }

    #[test]
    fn a_link_that_fails_under_a_silent_neighbour_gets_2_seconds_of_its_own() {
        follow(
            Some(Ok(hop(1))),
            &[
                (0.0, Some(Err(failed(1))), held(failed(1))),
                (10.0, Some(Err(down())), held(down())),
                (11.9, None, held(down())),
                (12.0, None, sure(Err(down()))),
            ],
        );
    }

    #[test]
    fn no_sequence_of_reasons_is_held_for_longer_than_30_seconds() {
        let start = Instant::now();
        let mut hold = Hold::new(Some(Ok(hop(1))));
        for second in 0..30 {
            let reason = if second % 2 == 0 { down() } else { missing(1) };
            hold.on_look(start + Duration::from_secs(second), Err(reason));
            hold.on_time(start + Duration::from_secs(second), &TIMES);
            assert!(hold.answer().unwrap().hop.is_ok(), "{second}");
        }
        hold.on_time(start + Duration::from_secs(30), &TIMES);
        assert!(hold.answer().unwrap().hop.is_err());
    }

    #[test]
    fn what_somebody_has_decided_counts_at_once() {
        let interface = || "eth0".to_owned();
        for reason in [
            Unresolved::Blackhole,
            Unresolved::Prohibit,
            Unresolved::Local,
            Unresolved::NotUnicast("broadcast"),
            Unresolved::Encapsulated { interface: interface() },
            Unresolved::NoMac { interface: interface() },
        ] {
            follow(Some(Ok(hop(1))), &[(0.0, Some(Err(reason.clone())), sure(Err(reason)))]);
        }
    }

    #[test]
    fn an_address_of_which_nothing_is_known_gets_a_second_to_answer() {
        follow(
            None,
            &[
                (0.0, Some(Err(missing(1))), None),
                (0.9, None, None),
                (1.0, None, sure(Err(missing(1)))),
                (3.0, Some(Err(failed(1))), sure(Err(failed(1)))),
                (3.1, Some(Err(missing(1))), sure(Err(failed(1)))),
                (3.2, Some(Err(missing(2))), sure(Err(missing(2)))),
            ],
        );
        follow(None, &[(0.0, Some(Err(missing(1))), None), (0.1, Some(Ok(hop(1))), sure(Ok(hop(1))))]);
        follow(None, &[(0.0, Some(Err(Unresolved::NoRoute)), sure(Err(Unresolved::NoRoute)))]);
    }

    #[test]
    fn another_good_answer_is_told_at_once() {
        follow(Some(Ok(hop(1))), &[(0.0, Some(Ok(hop(2))), sure(Ok(hop(2))))]);
    }

    #[test]
    fn another_reason_is_told_at_once_where_there_is_no_good_answer() {
        let reasons = [down(), Unresolved::NoRoute, missing(1), Unresolved::Blackhole];
        let rows: Vec<_> =
            reasons.iter().map(|r| (0.0, Some(Err(r.clone())), sure(Err(r.clone())))).collect();
        follow(Some(Err(Unresolved::Local)), &rows);
    }
}
