//! Schedules are tested on tokio's paused clock, which jumps to the next timer; sockets on the real one.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Mutex;

use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};

use super::*;
use crate::health::fsm::{Fsm, State};

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const MS: Duration = Duration::from_millis(1);

fn tcp(port: u16, interval: Duration) -> Check {
    Check { kind: CheckKind::Tcp, port, at_own_port: true, interval, timeout: 500 * MS, rise: 2, fall: 3 }
}

fn success() -> Probe {
    Probe { took: MS, result: Ok(()) }
}

/// Starts of the first probes of `run`, in milliseconds, with probes that take as long as told.
async fn starts<const N: usize>(phase: Duration, interval: Duration, durations: [Duration; N]) -> Vec<u128> {
    let (tx, mut rx) = mpsc::channel(1);
    let checker = Checker::<u8>::new(tx);
    let epoch = Instant::now();
    let starts = Arc::new(Mutex::new(Vec::new()));
    let mut left = durations.into_iter();
    let recorder = starts.clone();
    let prober = move || {
        recorder.lock().unwrap().push(epoch.elapsed().as_millis());
        let took = left.next().unwrap_or(MS);
        async move {
            sleep(took).await;
            success()
        }
    };
    let task = tokio::spawn(run(checker.shared.clone(), 0, phase, interval, prober));
    for _ in durations {
        rx.recv().await.unwrap();
    }
    task.abort();
    starts.lock().unwrap().clone()
}

#[tokio::test(start_paused = true)]
async fn probes_start_one_interval_after_the_previous_start_however_long_they_take() {
    let durations = [1, 90, 10, 99, 1].map(|ms| ms * MS);
    assert_eq!(starts(30 * MS, 100 * MS, durations).await, [30, 130, 230, 330, 430]);
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_outlasts_the_interval_causes_no_burst() {
    let durations = [350, 1, 1, 1].map(|ms| ms * MS);
    assert_eq!(starts(Duration::ZERO, 100 * MS, durations).await, [0, 350, 450, 550]);
}

#[test]
fn the_phase_is_below_the_interval_and_below_a_second_and_varies() {
    let spread = |interval: Duration, below: Duration| {
        let phases: Vec<Duration> = (0..1000).map(|_| random_phase(interval)).collect();
        assert!(phases.iter().all(|p| *p < below));
        assert!(phases.iter().any(|p| *p < below / 10));
        assert!(phases.iter().any(|p| *p > below * 9 / 10));
    };
    spread(200 * MS, 200 * MS);
    spread(30_000 * MS, 1000 * MS);
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
    let target = |rise| Check { rise, ..tcp(backend.port, interval) };
    checker.set(vec![("a", HERE, target(1))]);
    rx.recv().await.unwrap();
    // Reloads far more often than the interval: each restart would draw a new phase. Thresholds do change.
    let until = Instant::now() + 3 * interval + interval / 2;
    let mut rise = 1;
    while Instant::now() < until {
        rise += 1;
        checker.set(vec![("a", HERE, target(rise))]);
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
    checker.set(vec![("a", HERE, tcp(old.port, interval))]);
    rx.recv().await.unwrap();
    checker.set(vec![("a", HERE, tcp(new.port, interval))]);
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
async fn dropping_the_checker_ends_all_tasks_and_closes_the_channel() {
    let (tx, mut rx) = mpsc::channel(64);
    let mut checker = Checker::new(tx);
    let hang = TcpListener::bind((HERE, 0)).await.unwrap();
    let port = hang.local_addr().unwrap().port();
    checker.set((0..20).map(|k| (k, HERE, tcp(port, 50 * MS))).collect());
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
        checker.set(vec![("a", HERE, none.clone())]);
        sleep(100 * MS).await;
    }
    assert_eq!(rx.try_recv().map(|(k, p)| (k, p.result)), Ok(("a", Ok(()))));
    assert!(rx.try_recv().is_err());
}

#[tokio::test(start_paused = true)]
async fn no_more_probes_than_the_cap_run_at_once_and_none_starves() {
    let (tx, mut rx) = mpsc::channel(64);
    let checker = Checker::with_concurrency(tx, 3);
    let running = Arc::new(Mutex::new((0, 0)));
    for key in 0..10 {
        let count = running.clone();
        let prober = move || {
            let count = count.clone();
            async move {
                {
                    let mut c = count.lock().unwrap();
                    c.0 += 1;
                    c.1 = c.1.max(c.0);
                }
                sleep(80 * MS).await;
                count.lock().unwrap().0 -= 1;
                success()
            }
        };
        let task = run(checker.shared.clone(), key, Duration::ZERO, 100 * MS, prober);
        tokio::spawn(task);
    }
    let mut probes = BTreeMap::<i32, u32>::new();
    for _ in 0..50 {
        *probes.entry(rx.recv().await.unwrap().0).or_default() += 1;
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
    checker.set(vec![((), HERE, check)]);
    while fsm.state() != State::Up {
        let (_, probe) = rx.recv().await.unwrap();
        fsm.on_probe(std::time::Instant::now(), &probe);
    }
    drop(backend);
    let killed = std::time::Instant::now();
    while fsm.state() != State::Down {
        let (_, probe) = rx.recv().await.unwrap();
        fsm.on_probe(std::time::Instant::now(), &probe);
    }
    let slack = 200 * MS;
    assert!(killed.elapsed() <= bound + slack, "{:?}", killed.elapsed());
}
