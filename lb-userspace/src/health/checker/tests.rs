//! Schedules are tested on tokio's paused clock, which jumps to the next timer; sockets on the real one.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Mutex;

use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};

use super::*;
use crate::config::model::CheckKind;
use crate::health::fsm::{Fsm, State};

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const MS: Duration = Duration::from_millis(1);

fn tcp(port: u16, interval: Duration) -> Check {
    Check { kind: CheckKind::Tcp, port, at_own_port: true, interval, timeout: 500 * MS, rise: 2, fall: 3 }
}

fn success() -> Probe {
    Probe { took: MS, result: Ok(()) }
}

/// Answers after times of its own, and notes when it is asked.
struct Fake {
    epoch: Instant,
    starts: Mutex<Vec<u128>>,
    durations: Vec<Duration>,
}

impl Fake {
    fn new(durations: &[u32]) -> Self {
        let durations = durations.iter().map(|ms| *ms * MS).collect();
        Self { epoch: Instant::now(), starts: Mutex::default(), durations }
    }
}

impl Ask for Arc<Fake> {
    async fn ask(&self) -> (Probe, Option<Closing>) {
        let asked = {
            let mut starts = self.starts.lock().unwrap();
            starts.push(self.epoch.elapsed().as_millis());
            starts.len() - 1
        };
        sleep(self.durations.get(asked).copied().unwrap_or(MS)).await;
        (success(), None)
    }
}

impl Checker<&'static str> {
    /// In the test's own runtime.
    fn new(tx: mpsc::Sender<Outcome<&'static str>>) -> Self {
        let (checker, work) = Checker::with_concurrency(tx, 512);
        tokio::spawn(work);
        checker
    }
}

fn target(check: Check) -> Target<&'static str> {
    Target { key: "a", address: HERE, check, timed: true }
}

/// Starts of the first probes, in milliseconds, with probes that take as long as told.
async fn starts(turn: f64, interval: Duration, durations: &[u32]) -> Vec<u128> {
    let (tx, mut rx) = mpsc::channel(1);
    let fake = Arc::new(Fake::new(durations));
    let filter = Filter::new(&tcp(1, interval), true);
    let course = Course::new("a", interval, Arc::clone(&fake), filter);
    let (agenda, entries) = mpsc::unbounded_channel();
    agenda.send(vec![Entry::first(Instant::now(), turn, course)]).unwrap();
    let work = tokio::spawn(agenda::run(Shared::new(tx, 1), entries));
    for _ in durations {
        rx.recv().await.unwrap();
    }
    work.abort();
    fake.starts.lock().unwrap().clone()
}

#[tokio::test(start_paused = true)]
async fn probes_start_one_interval_after_the_previous_start_however_long_they_take() {
    assert_eq!(starts(0.3, 100 * MS, &[1, 90, 10, 99, 1]).await, [30, 130, 230, 330, 430]);
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_outlasts_the_interval_is_followed_at_once_and_causes_no_burst() {
    assert_eq!(starts(0.0, 100 * MS, &[350, 1, 1, 1]).await, [0, 350, 400, 500]);
}

#[tokio::test(start_paused = true)]
async fn the_first_probe_comes_within_a_second_and_the_others_lie_over_the_whole_interval() {
    for (turn, expected) in [(0.5, [500, 15_000, 45_000]), (0.0, [0, 30_000, 60_000])] {
        assert_eq!(starts(turn, 30_000 * MS, &[1, 1, 1]).await, expected);
    }
}

#[tokio::test(start_paused = true)]
async fn an_agenda_that_was_held_up_begins_each_target_once() {
    let fake = Arc::new(Fake::new(&[]));
    let filter = Filter::new(&tcp(1, 100 * MS), true);
    let course = Course::new("a", 100 * MS, Arc::clone(&fake), filter);
    let Entry::Checked(due) = Entry::first(Instant::now(), 0.5, course) else { unreachable!() };
    let begin = Instant::now();
    let next = due.next(begin + 1049 * MS);
    assert_eq!(next.at(), begin + 1050 * MS);
    assert_eq!(next.next(begin + 1050 * MS).at(), begin + 1150 * MS);
}

#[test]
fn turns_lie_evenly_over_the_interval_however_many_there_are() {
    for count in [1, 10, 100, 10_000] {
        let mut turns = Turns::new();
        let mut taken: Vec<f64> = (0..count).map(|_| turns.next()).collect();
        assert!(taken.iter().all(|turn| (0.0..1.0).contains(turn)));
        taken.sort_by(f64::total_cmp);
        let gaps = taken.windows(2).map(|pair| pair[1] - pair[0]);
        let widest = gaps.fold(taken[0] + 1.0 - taken[count - 1], f64::max);
        assert!(widest * count as f64 <= 2.0, "{count}: {widest}");
    }
}

/// Accepts and notes when, until it is dropped.
struct Backend {
    port: u16,
    seen: Arc<Mutex<Vec<std::time::Instant>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Backend {
    async fn new() -> Backend {
        let listener = TcpListener::bind((HERE, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let notes = seen.clone();
        let task = tokio::spawn(async move {
            while listener.accept().await.is_ok() {
                notes.lock().unwrap().push(std::time::Instant::now());
            }
        });
        Backend { port, seen, task }
    }

    fn seen(&self) -> Vec<std::time::Instant> {
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[tokio::test]
async fn a_reload_keeps_task_and_phase_of_an_unchanged_target() {
    let backend = Backend::new().await;
    let (tx, mut rx) = mpsc::channel(64);
    let mut checker = Checker::new(tx);
    let interval = 400 * MS;
    let with_rise = |rise| target(Check { rise, ..tcp(backend.port, interval) });
    checker.set(vec![with_rise(1)]);
    rx.recv().await.unwrap();
    // Reloads far more often than the interval: each restart would draw a new phase. Thresholds do change.
    let until = Instant::now() + 3 * interval + interval / 2;
    let mut rise = 1;
    while Instant::now() < until {
        rise += 1;
        checker.set(vec![with_rise(rise)]);
        sleep(20 * MS).await;
    }
    let seen = backend.seen();
    assert!((4..=5).contains(&seen.len()), "{} probes", seen.len());
    for pair in seen.windows(2) {
        let gap = pair[1] - pair[0];
        assert!(gap > 300 * MS && gap < 500 * MS, "{gap:?}");
    }
}

#[tokio::test]
async fn a_changed_target_moves_and_a_removed_one_ends() {
    let (old, new) = (Backend::new().await, Backend::new().await);
    let (tx, mut rx) = mpsc::channel(64);
    let mut checker = Checker::new(tx);
    let interval = 50 * MS;
    checker.set(vec![target(tcp(old.port, interval))]);
    rx.recv().await.unwrap();
    checker.set(vec![target(tcp(new.port, interval))]);
    let at_change = old.seen().len();
    rx.recv().await.unwrap();
    sleep(3 * interval).await;
    // A connection may have been on its way into accept.
    assert!(old.seen().len() <= at_change + 1);
    assert!(!new.seen().is_empty());
    checker.set(vec![]);
    assert!(checker.is_empty());
    let at_end = new.seen().len();
    sleep(3 * interval).await;
    assert!(new.seen().len() <= at_end + 1);
}

#[tokio::test]
async fn a_check_that_ended_is_forgotten_at_once_however_long_its_interval() {
    let (tx, _rx) = mpsc::channel(64);
    let mut checker = Checker::new(tx);
    let mut of_an_hour = target(tcp(1, 3_600_000 * MS));
    checker.set(vec![of_an_hour.clone()]);
    sleep(50 * MS).await;
    let course = Arc::downgrade(checker.running["a"].course.as_ref().unwrap());
    of_an_hour.check.port = 2;
    checker.set(vec![of_an_hour]);
    sleep(50 * MS).await;
    assert!(course.upgrade().is_none());
}

#[tokio::test]
async fn dropping_the_checker_ends_all_tasks_and_closes_the_channel() {
    let (tx, mut rx) = mpsc::channel(64);
    let mut checker = Checker::new(tx);
    let hang = TcpListener::bind((HERE, 0)).await.unwrap();
    let port = hang.local_addr().unwrap().port();
    let names: [&str; 20] = std::array::from_fn(|n| &"abcdefghijklmnopqrst"[n..=n]);
    checker.set(names.map(|key| Target { key, ..target(tcp(port, 50 * MS)) }).into());
    assert_eq!(checker.len(), 20);
    rx.recv().await.unwrap();
    drop(checker);
    let rest = async { while rx.recv().await.is_some() {} };
    timeout(2000 * MS, rest).await.expect("tasks hold the sender");
}

#[tokio::test(start_paused = true)]
async fn a_target_without_a_check_is_reported_up_once() {
    let (tx, mut rx) = mpsc::channel(64);
    let mut checker = Checker::new(tx);
    let none = Check { kind: CheckKind::None, ..tcp(1, 10 * MS) };
    for _ in 0..3 {
        checker.set(vec![target(none.clone())]);
        sleep(100 * MS).await;
    }
    assert_eq!(rx.try_recv().map(|told| (told.key, told.probe.result)), Ok(("a", Ok(()))));
    assert!(rx.try_recv().is_err());
}

/// Takes a while, and counts those that do so at the same time.
struct Slow {
    /// Now, and at most.
    running: Arc<Mutex<(u32, u32)>>,
}

impl Ask for Slow {
    async fn ask(&self) -> (Probe, Option<Closing>) {
        {
            let mut running = self.running.lock().unwrap();
            running.0 += 1;
            running.1 = running.1.max(running.0);
        }
        sleep(80 * MS).await;
        self.running.lock().unwrap().0 -= 1;
        (success(), None)
    }
}

#[tokio::test(start_paused = true)]
async fn no_more_probes_than_the_cap_run_at_once_and_none_starves() {
    let (tx, mut rx) = mpsc::channel(64);
    let running = Arc::new(Mutex::new((0, 0)));
    let (agenda, entries) = mpsc::unbounded_channel();
    let first = |key: i32| {
        let filter = Filter::new(&tcp(1, 100 * MS), true);
        let course = Course::new(key, 100 * MS, Slow { running: Arc::clone(&running) }, filter);
        Entry::first(Instant::now(), 0.0, course)
    };
    agenda.send((0..10).map(first).collect()).unwrap();
    tokio::spawn(agenda::run(Shared::new(tx, 3), entries));
    let mut probes = BTreeMap::<i32, u32>::new();
    for _ in 0..50 {
        *probes.entry(rx.recv().await.unwrap().key).or_default() += 1;
    }
    assert_eq!(running.lock().unwrap().1, 3);
    assert_eq!(probes.len(), 10);
    assert!(probes.values().all(|n| (4..=6).contains(n)), "{probes:?}");
}

#[tokio::test]
async fn a_killed_backend_is_down_within_fall_intervals_and_a_timeout() {
    let backend = Backend::new().await;
    let (tx, mut rx) = mpsc::channel(64);
    let mut checker = Checker::new(tx);
    let check = tcp(backend.port, 100 * MS);
    let bound = check.fall * check.interval + check.timeout;
    let mut fsm = Fsm::new(check.rise, check.fall);
    checker.set(vec![Target { timed: false, ..target(check) }]);
    while fsm.state() != State::Up {
        let told = rx.recv().await.unwrap();
        fsm.on_probe(told.at, &told.probe);
    }
    drop(backend);
    let killed = std::time::Instant::now();
    while fsm.state() != State::Down {
        let told = rx.recv().await.unwrap();
        fsm.on_probe(told.at, &told.probe);
    }
    let slack = 200 * MS;
    assert!(killed.elapsed() <= bound + slack, "{:?}", killed.elapsed());
}

#[tokio::test]
async fn what_changes_nothing_is_not_told_but_its_time_can_be_asked_for() {
    let backend = Backend::new().await;
    let (tx, mut rx) = mpsc::channel(64);
    let mut checker = Checker::new(tx);
    let one = Target { timed: false, ..target(tcp(backend.port, 10 * MS)) };
    checker.set(vec![one.clone()]);
    while backend.seen().len() < 10 {
        sleep(10 * MS).await;
    }
    let told = |rx: &mut mpsc::Receiver<Outcome<&str>>| std::iter::from_fn(|| rx.try_recv().ok()).count();
    assert_eq!(told(&mut rx), one.check.rise as usize);
    assert!(checker.took(&"a").is_some());
    // Whoever sets targets may have changed its mind about them.
    checker.set(vec![one.clone()]);
    let seen = backend.seen().len();
    while backend.seen().len() < seen + 10 {
        sleep(10 * MS).await;
    }
    assert_eq!(told(&mut rx), one.check.rise as usize);
}

#[tokio::test]
async fn a_thread_of_its_own_checks_and_ends_with_the_checker() {
    let backend = Backend::new().await;
    let (tx, mut rx) = mpsc::channel(64);
    let mut checker = Checker::on_own_thread(tx).unwrap();
    checker.set(vec![target(tcp(backend.port, 10 * MS))]);
    assert_eq!(rx.recv().await.unwrap().probe.result, Ok(()));
    drop(checker);
    let rest = async { while rx.recv().await.is_some() {} };
    timeout(2000 * MS, rest).await.expect("the thread holds the sender");
}

#[test]
fn probes_take_a_third_of_the_descriptors_and_no_more_than_are_of_use() {
    let of = [0, 1024, 30_000, 65_536, usize::MAX].map(concurrency_of);
    assert_eq!(of, [1, 341, 10_000, MOST_CONCURRENCY, MOST_CONCURRENCY]);
}
