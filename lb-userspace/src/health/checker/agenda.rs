//! When targets are asked: each once in an interval, at an offset of its own. It knows nothing of outcomes.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::{Ask, Course, MAX_PHASE, Outcome, Shared};
use crate::health::probe::Probe;

/// What is due within this time is begun together: few turns for many probes take less of a core, and of the backends' hosts.
const GRAIN: Duration = Duration::from_millis(4);

#[derive(Debug)]
pub enum Entry<K, A> {
    Checked(Due<K, A>),
    /// Up by definition.
    Unchecked(K),
}

/// A target's next probe.
#[derive(Debug)]
pub struct Due<K, A> {
    at: Instant,
    /// That of the one after it.
    then: Instant,
    course: Arc<Course<K, A>>,
}

impl<K, A> Entry<K, A> {
    /// The first probe comes soon, and from the second on each has the same place in the interval. `turn`: that place, from
    /// 0 to below 1.
    pub fn first(now: Instant, turn: f64, course: Arc<Course<K, A>>) -> Self {
        let at = now + course.interval.min(MAX_PHASE).mul_f64(turn);
        let then = now + course.interval.mul_f64(turn);
        let then = if then > at { then } else { at + course.interval };
        Self::Checked(Due { at, then, course })
    }
}

impl<K, A> Due<K, A> {
    #[cfg(test)]
    pub fn at(&self) -> Instant {
        self.at
    }

    /// The next one. What was missed is not made up for.
    pub fn next(self, now: Instant) -> Self {
        let Self { then, course, .. } = self;
        let behind = now.checked_duration_since(then).map(|behind| behind.div_duration_f64(course.interval));
        let at = then + course.interval.mul_f64(behind.map_or(0.0, |intervals| intervals.floor() + 1.0));
        Self { at, then: at + course.interval, course }
    }
}

impl<K, A> PartialEq for Due<K, A> {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl<K, A> Eq for Due<K, A> {}

impl<K, A> PartialOrd for Due<K, A> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<K, A> Ord for Due<K, A> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.at.cmp(&other.at)
    }
}

/// Begins probes when they are due, until nobody can add entries any more.
pub async fn run<K: Clone + Send + Sync + 'static, A: Ask>(
    shared: Shared<K>,
    mut entries: mpsc::UnboundedReceiver<Vec<Entry<K, A>>>,
) {
    let mut agenda = BinaryHeap::new();
    let mut free = Instant::now();
    loop {
        let next = agenda.peek().map(|Reverse(due): &Reverse<Due<K, A>>| due.at.max(free));
        tokio::select! {
            added = entries.recv() => match added {
                Some(added) => {
                    // Those that ended would stay for as long as their interval.
                    agenda.retain(|Reverse(due)| !due.course.now().ended);
                    for entry in added {
                        match entry {
                            Entry::Checked(due) => agenda.push(Reverse(due)),
                            Entry::Unchecked(key) => is_up(&shared, key),
                        }
                    }
                }
                None => return,
            },
            () = until(next) => {
                let now = Instant::now();
                free = now + GRAIN;
                while agenda.peek().is_some_and(|Reverse(due)| due.at <= now)
                    && let Some(Reverse(due)) = agenda.pop()
                {
                    if due.course.begin(&shared) {
                        agenda.push(Reverse(due.next(now)));
                    }
                }
            }
        }
    }
}

async fn until(next: Option<Instant>) {
    match next {
        Some(next) => sleep_until(next).await,
        None => std::future::pending().await,
    }
}

fn is_up<K: Send + 'static>(shared: &Shared<K>, key: K) {
    let tx = shared.tx.clone();
    let probe = Probe { took: Duration::ZERO, result: Ok(()) };
    let outcome = Outcome { key, at: std::time::Instant::now(), probe };
    tokio::spawn(async move {
        // An error means that nobody listens any more.
        let _ = tx.send(outcome).await;
    });
}
