//! The agent itself in a lab: one host that is its gateway, all its backends and its client, and a balancer.

use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ::tests::lab::{Host, Lab, Process, Signal};
use anyhow::{Context, Result, ensure};
use lb_userspace::bpf::{BpfFs, Maps};
use lb_userspace::config::model::Forward;
use lb_userspace::reconcile::desired::backend_identity;
use lb_userspace::reconcile::image::Image;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SocketType, ipproto, recv, socket};
use serde::{Deserialize, Serialize};

use super::shape::{CHECKED_PORT, Shape};
use super::tables::milliseconds;
use crate::bench::figures::percentile;
use crate::capacity::checks::connections;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Agent {
    /// From the start of the process to the first packet that it forwards; no checks.
    pub start_ms: f64,
    /// From the verdict that a backend is down until no slot leads new flows to it: the median, and the longest.
    pub change_ms: f64,
    pub change_most_ms: f64,
    /// From a verdict until the tables follow it, in an agent that checks all backends every two seconds: the median, the
    /// 99th of a hundred, and the longest.
    pub loaded_ms: f64,
    pub loaded_p99_ms: f64,
    pub loaded_most_ms: f64,
    /// Verdicts, or several at once, that these are of.
    pub loaded_count: usize,
    /// From the signal to the last slot of a backend that another takes the place of.
    pub reload_ms: f64,
    /// Without checks, after start and after the reload: the larger.
    pub rss_anon_bytes: u64,
    /// Of a core, with nothing to do and no checks.
    pub idle_percent: f64,
    /// The same with a TCP check of every backend in an interval, over whole intervals.
    pub checks_percent: f64,
    /// That were made meanwhile.
    pub checks_per_second: f64,
    pub check_interval_seconds: u64,
}

pub struct Measured<'s> {
    pub shape: &'s Shape,
    pub binary: PathBuf,
    /// Seconds.
    pub idle: u64,
    pub interval: u64,
}

const GATEWAY: &str = "10.200.0.1";
const BALANCER: &str = "10.200.0.2";
const PATIENCE: Duration = Duration::from_secs(60);

/// Backends that go down, each when its check is due.
const CHANGES: u32 = 5;

/// Backends that go down and come back in one round, each when its check is due, and how often.
const TOGETHER: u32 = 20;
const ROUNDS: u32 = 3;

/// Seconds between two checks of a backend while backends go down: that of a configuration which says nothing of it.
const INTERVAL: u64 = 2;
const FALL: u64 = 2;

/// What the agent does at a start or a reload is over when it has worked for no more than a part of so long a time. The pins of
/// a backend that has left are looked for once in a second, which goes on for longer.
const QUIET: Duration = Duration::from_secs(1);
const QUIET_PERCENT: f64 = 5.0;

/// Seconds that an agent is measured for, roughly, beside those in which it is watched.
pub const BESIDE: u64 = 35;

/// What the agent says after each verdict that the tables follow, and where it does.
const FOLLOWED: &str = "the tables follow verdicts";
const SAID_BY: &str = "lb_userspace::agent::tracking";

/// What it says of a verdict.
const DOWN: &str = "backend down";
const UP: &str = "backend up";

impl Measured<'_> {
    pub fn run(&self) -> Result<Agent> {
        let lab = Lab::new("scale")?;
        let gateway = lab.host("gateway", &[&format!("{GATEWAY}/24")])?;
        let balancer = lab.host("balancer", &[&format!("{BALANCER}/24")])?;
        balancer.route(&format!("{} via {GATEWAY}", Shape::BACKENDS))?;
        gateway.route(&format!("{} via {BALANCER}", Shape::VIPS))?;
        // It answers for every backend.
        gateway.ip(&format!("route add local {} dev lo", Shape::BACKENDS))?;
        // Which the neighbour needs to be known for.
        balancer.ip(&format!("neigh replace {GATEWAY} lladdr {} dev eth0", mac_text(&gateway)))?;
        let scene = Scene { of: self, lab: &lab, gateway: &gateway, balancer: &balancer };
        let (start_ms, reload_ms, rss_anon_bytes, idle_percent) = scene.without_checks()?;
        let (changes, loaded, checks) = scene.with_checks()?;
        let part = |sorted: &[f64], part| percentile(sorted, part).context("nothing was measured");
        Ok(Agent {
            start_ms,
            change_ms: part(&changes, 0.5)?,
            change_most_ms: part(&changes, 1.0)?,
            loaded_ms: part(&loaded, 0.5)?,
            loaded_p99_ms: part(&loaded, 0.99)?,
            loaded_most_ms: part(&loaded, 1.0)?,
            loaded_count: loaded.len(),
            reload_ms,
            rss_anon_bytes,
            idle_percent,
            checks_percent: checks.percent,
            checks_per_second: checks.per_second,
            check_interval_seconds: self.interval,
        })
    }
}

fn mac_text(host: &Host) -> String {
    host.mac().map(|byte| format!("{byte:02x}")).join(":")
}

struct Scene<'s> {
    of: &'s Measured<'s>,
    lab: &'s Lab,
    gateway: &'s Host,
    balancer: &'s Host,
}

impl Scene<'_> {
    fn run_dir(&self, name: &str) -> PathBuf {
        self.lab.dir().join(name)
    }

    fn start(&self, name: &str, text: &str) -> Result<(Process, PathBuf)> {
        let (config, run_dir) = (self.balancer.new_file("xlb.yaml"), self.run_dir(name));
        std::fs::write(&config, text)?;
        let words = [
            self.of.binary.as_os_str(),
            "run".as_ref(),
            "-c".as_ref(),
            config.as_os_str(),
            "--run-dir".as_ref(),
            run_dir.as_os_str(),
        ];
        let mut command = self.balancer.exec(words);
        command.env("RUST_LOG", format!("info,{SAID_BY}=debug"));
        Ok((self.balancer.spawn_command(&mut command)?, config))
    }

    fn end(&self, process: &Process, name: &str) -> Result<()> {
        process.signal(Signal::TERM)?;
        process.wait_exit(PATIENCE)?;
        let run_dir = self.run_dir(name);
        let words =
            [self.of.binary.as_os_str(), "detach".as_ref(), "--run-dir".as_ref(), run_dir.as_os_str()];
        self.balancer.run(words).map(drop)
    }

    /// Milliseconds to the first packet, and of a reload; memory in bytes, and the part of a core that idling takes.
    fn without_checks(&self) -> Result<(f64, f64, u64, f64)> {
        let shape = self.of.shape;
        let forwarded =
            self.gateway.inside(|| socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::IPIP)))??;
        set_socket_timeout(&forwarded, Timeout::Recv, Some(PATIENCE))?;
        let client = self.gateway.inside(|| UdpSocket::bind((GATEWAY, 7001)))??;
        let waits = Arc::new(AtomicBool::new(true));
        let asks = Arc::clone(&waits);
        // All services, so that the first packet may be of any: the last that was written counts.
        let last = Shape::vip(shape.services - 1);
        let sender = std::thread::spawn(move || {
            while asks.load(Ordering::Relaxed) {
                // Refused until there is a way.
                _ = client.send_to(b"?", (last, 7000));
                std::thread::sleep(Duration::from_micros(500));
            }
        });
        let begin = Instant::now();
        let started = self.start("plain", &shape.text("{type: none}", false));
        let first = started.as_ref().ok().map(|_| recv(&forwarded, &mut [0; 256][..], RecvFlags::empty()));
        let start_ms = milliseconds(begin);
        waits.store(false, Ordering::Relaxed);
        _ = sender.join();
        let (process, config) = started?;
        first.context("nothing was forwarded")??;
        process.wait_for_log("running", PATIENCE)?;
        quiet(&process)?;
        let before = rss_anon(process.pid())?;
        self.watched("idle", self.of.idle);
        let idle_percent = busy(&process, Duration::from_secs(self.of.idle))?;
        let reload_ms = self.reload(&process, &config)?;
        quiet(&process)?;
        let after = rss_anon(process.pid())?;
        self.end(&process, "plain")?;
        Ok((start_ms, reload_ms, before.max(after), idle_percent))
    }

    /// Milliseconds until the maps have another backend in the place of the last.
    fn reload(&self, process: &Process, config: &std::path::Path) -> Result<f64> {
        let shape = self.of.shape;
        let maps = self.maps("plain")?;
        let image = maps.image()?;
        let number = shape.services * shape.backends - 1;
        let slot =
            last_slot(&image, id_of(&image, shape, number)?).context("the last backend has no slot")?;
        std::fs::write(config, shape.text("{type: none}", true))?;
        let word = maps.slot_word(slot);
        let begin = Instant::now();
        process.signal(Signal::HUP)?;
        while maps.slot_word(slot) == word {
            ensure!(begin.elapsed() < PATIENCE, "the reload ends never:\n{}", process.log());
            std::thread::sleep(Duration::from_micros(100));
        }
        let took = milliseconds(begin);
        process.wait_for_log("reloaded", PATIENCE)?;
        Ok(took)
    }

    /// Milliseconds of changes of health, from the verdict's line in the log and from the verdict itself, both sorted, and
    /// what checks take.
    fn with_checks(&self) -> Result<(Vec<f64>, Vec<f64>, Checks)> {
        let shape = self.of.shape;
        let listener = self.gateway.inside(|| TcpListener::bind(("0.0.0.0", CHECKED_PORT)))??;
        // It ends with the process.
        std::thread::spawn(move || listener.incoming().for_each(drop));
        let all = shape.services * shape.backends;
        let health = |interval: u64| {
            format!(
                "{{type: tcp, port: {CHECKED_PORT}, interval: {interval}s, timeout: 1s, rise: 1, fall: {FALL}}}"
            )
        };
        let (process, config) = self.start("checked", &shape.text(&health(self.of.interval), false))?;
        process.wait_for_log("running", PATIENCE)?;
        // First probes come within a second, and from the second on each has its place in the interval.
        std::thread::sleep(Duration::from_secs(self.of.interval.min(5) + 2));
        let checks = self.checks(&process)?;
        if self.of.interval != INTERVAL {
            // Every change is found by a check, so they come soon here.
            let reloads = process.log().matches("reloaded").count();
            std::fs::write(&config, shape.text(&health(INTERVAL), false))?;
            process.signal(Signal::HUP)?;
            process.wait_until("reload", PATIENCE, || process.log().matches("reloaded").count() > reloads)?;
            // Until those that were too slow at the start are back, too.
            std::thread::sleep(Duration::from_secs(INTERVAL + 1));
        }
        let maps = self.maps("checked")?;
        let count = CHANGES.min(all);
        let some: Vec<u32> = (0..count).map(|change| change * all / count).collect();
        let mut changes = Vec::new();
        crate::progress("backends go down");
        // Most of a pool stay up.
        for together in some.chunks(((shape.backends as usize).saturating_sub(1) / 2).max(1)) {
            changes.extend(self.down(&process, &maps, together)?);
        }
        changes.sort_by(f64::total_cmp);
        let loaded = self.loaded(&process)?;
        self.end(&process, "checked")?;
        Ok((changes, loaded, checks))
    }

    /// Milliseconds from verdicts until the tables follow, sorted, while all backends are checked.
    fn loaded(&self, process: &Process) -> Result<Vec<f64>> {
        let all = self.of.shape.services * self.of.shape.backends;
        let count = TOGETHER.min(all / 2);
        let before = process.log_length();
        for round in 0..ROUNDS {
            crate::progress(&format!("{count} backends go down and come back, {} of {ROUNDS}", round + 1));
            // In each round others.
            let place = |number: u32| (number * all / count + 1 + round) % all;
            let some: Vec<Ipv4Addr> = (0..count).map(|number| Shape::backend(place(number))).collect();
            let from = process.log_length();
            self.routes("add", &some)?;
            self.verdicts(process, from, DOWN, &some)?;
            self.routes("del", &some)?;
            self.verdicts(process, from, UP, &some)?;
        }
        process.wait_until(FOLLOWED, PATIENCE, || {
            let log = process.log_from(before);
            log.rfind(FOLLOWED) > log.rfind(UP)
        })?;
        let log = process.log_from(before);
        let lines = log.lines().filter(|line| line.contains(FOLLOWED));
        let mut times: Vec<f64> = lines.filter_map(after_ms).collect();
        ensure!(!times.is_empty(), "the agent tells no times:\n{log}");
        times.sort_by(f64::total_cmp);
        Ok(times)
    }

    /// What an agent takes that does nothing but check.
    fn checks(&self, process: &Process) -> Result<Checks> {
        let length = whole_intervals(self.of.idle, self.of.interval);
        let due = u64::from(self.of.shape.services * self.of.shape.backends) * length / self.of.interval;
        self.watched("checks", length);
        let before = connections(self.gateway)?;
        let percent = busy(process, Duration::from_secs(length))?;
        let made = connections(self.gateway)? - before;
        // Some of the first or the last may lie outside of the window.
        ensure!(
            made * 2 >= due.max(1),
            "{made} checks were made in {length} s where {due} were due: what they cost cannot be told; run it on a \
             quieter machine, or with a longer --check-interval"
        );
        Ok(Checks { percent, per_second: made as f64 / length as f64 })
    }

    /// Milliseconds from the verdict on each of these backends to the last slot that leaves it. They are back up then.
    fn down(&self, process: &Process, maps: &Maps, numbers: &[u32]) -> Result<Vec<f64>> {
        let image = maps.image()?;
        let all: Vec<Ipv4Addr> = numbers.iter().map(|number| Shape::backend(*number)).collect();
        let mut left = Vec::new();
        for (number, address) in numbers.iter().zip(&all) {
            let slot = last_slot(&image, id_of(&image, self.of.shape, *number)?);
            let slot = slot.with_context(|| format!("{address} has no slot; is it up?"))?;
            left.push((*address, slot, maps.slot_word(slot)));
        }
        let from = process.log_length();
        self.routes("add", &all)?;
        let begin = Instant::now();
        let mut seen = Vec::new();
        while let Some((address, ..)) = left.first() {
            ensure!(begin.elapsed() < PATIENCE, "{address} is not found to be down");
            std::thread::sleep(Duration::from_micros(50));
            let changed = left.extract_if(.., |(_, slot, word)| maps.slot_word(*slot) != *word);
            let changed: Vec<Ipv4Addr> = changed.map(|(address, ..)| address).collect();
            if !changed.is_empty() {
                let at = since_midnight(SystemTime::now())?;
                seen.extend(changed.into_iter().map(|address| (address, at)));
            }
        }
        self.verdicts(process, from, DOWN, &all)?;
        let log = process.log_from(from);
        let took = seen.into_iter().map(|(address, at)| {
            let line = log.lines().find(|line| is_verdict(line, DOWN, address));
            let said = line.and_then(time_of).context("no time in the verdict's line")?;
            let took = at.checked_sub(said).with_context(|| {
                format!("{address}: its slots were changed before the verdict, or midnight lay between; run it again")
            })?;
            Ok(took.as_secs_f64() * 1000.0)
        });
        let took = took.collect::<Result<_>>()?;
        self.routes("del", &all)?;
        self.verdicts(process, from, UP, &all)?;
        Ok(took)
    }

    /// Has the gateway refuse these backends, or answer for them again.
    fn routes(&self, verb: &str, some: &[Ipv4Addr]) -> Result<()> {
        some.iter().try_for_each(|address| {
            self.gateway.ip(&format!("route {verb} unreachable {address}/32 table local")).map(drop)
        })
    }

    /// Waits for a verdict on each of these, in what the agent says from there on.
    fn verdicts(&self, process: &Process, from: u64, verdict: &str, some: &[Ipv4Addr]) -> Result<()> {
        process.wait_until(verdict, PATIENCE, || {
            let log = process.log_from(from);
            let said = |address: &Ipv4Addr| log.lines().any(|line| is_verdict(line, verdict, *address));
            some.iter().all(said)
        })
    }

    fn watched(&self, what: &str, seconds: u64) {
        crate::progress(&format!("{}: {what}, for {seconds} s", self.of.shape));
    }

    fn maps(&self, name: &str) -> Result<Maps> {
        let fs = BpfFs::existing(&self.run_dir(name))?.context("nothing is pinned")?;
        Ok(Maps::from_pins(&fs)?)
    }
}

/// What checks take of a core, and how many were made.
struct Checks {
    percent: f64,
    per_second: f64,
}

/// Seconds: at least so many, and every backend is checked equally often in them.
pub fn whole_intervals(least: u64, interval: u64) -> u64 {
    least.max(interval).next_multiple_of(interval)
}

/// Waits until a process has nothing to do any more, and not for a moment only.
fn quiet(process: &Process) -> Result<()> {
    let begin = Instant::now();
    let mut times = 0;
    while times < 3 {
        times = if busy(process, QUIET)? > QUIET_PERCENT { 0 } else { times + 1 };
        ensure!(begin.elapsed() < PATIENCE, "the agent goes on working:\n{}", process.log());
    }
    Ok(())
}

/// Whether a line of the log tells a verdict on a backend.
fn is_verdict(line: &str, verdict: &str, address: Ipv4Addr) -> bool {
    line.contains(verdict) && line.contains(&format!("address={address} "))
}

/// Percent of a core that a process takes while it is watched.
fn busy(process: &Process, length: Duration) -> Result<f64> {
    let (begin, before) = (Instant::now(), cpu_time(process.pid())?);
    std::thread::sleep(length);
    // Threads may have ended, and took their time with them.
    let took = cpu_time(process.pid())?.saturating_sub(before);
    Ok(100.0 * took.as_secs_f64() / begin.elapsed().as_secs_f64())
}

fn id_of(image: &Image, shape: &Shape, number: u32) -> Result<u16> {
    let pool = format!("p{}", number / shape.backends);
    let identity = backend_identity(&pool, Forward::Ipip, Shape::backend(number).into());
    image.ids().get(&identity).copied().with_context(|| format!("{pool} has no such backend"))
}

/// The last slot that leads new flows to a backend: slots are written in their order.
fn last_slot(image: &Image, id: u16) -> Option<u32> {
    let slots = lb_common::abi::SLOTS_PER_ROW * image.slots.len() as u32;
    (0..slots).rev().find(|&index| image.slot(index).cur() == id)
}

fn rss_anon(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib: u64 = line.and_then(|line| line.trim().strip_suffix(" kB")).context("no RssAnon")?.parse()?;
    Ok(kib * 1024)
}

/// Of all its threads, on behalf of itself and in the kernel.
fn cpu_time(pid: u32) -> Result<Duration> {
    // Nanoseconds on a CPU come first; times in `stat` are rounded to hundredths of a second.
    let mut all = Duration::ZERO;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
        let ran = text.split(' ').next().context("no schedstat")?;
        all += Duration::from_nanos(ran.parse()?);
    }
    Ok(all)
}

fn since_midnight(at: SystemTime) -> Result<Duration> {
    const DAY: u64 = 86_400;
    let since = at.duration_since(UNIX_EPOCH)?;
    Ok(since - Duration::from_secs(since.as_secs() / DAY * DAY))
}

/// The time of day at which a line was logged: `2026-11-23T07:15:19.719869Z`.
fn time_of(line: &str) -> Option<Duration> {
    let time = line.split('T').nth(1)?.split('Z').next()?;
    let mut parts = time.split(':');
    let (hours, minutes): (u64, u64) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    let seconds: f64 = parts.next()?.parse().ok()?;
    Some(Duration::from_secs(hours * 3600 + minutes * 60) + Duration::from_secs_f64(seconds))
}

/// Of a line that says how long the tables took.
fn after_ms(line: &str) -> Option<f64> {
    let (_, after) = line.split_once("after_us=")?;
    let digits = after.split(|other: char| !other.is_ascii_digit()).next()?;
    Some(digits.parse::<f64>().ok()? / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_verdicts_are_read() {
        let line = "2026-11-23T07:15:19.7Z DEBUG lb_userspace::agent::tracking: the tables follow verdicts after_us=1250";
        assert_eq!(after_ms(line), Some(1.25));
        assert_eq!(after_ms("after_us="), None);
    }

    #[test]
    fn checks_are_watched_for_whole_intervals() {
        for (least, interval, length) in [(10, 30, 30), (30, 30, 30), (31, 30, 60), (30, 7, 35)] {
            assert_eq!(whole_intervals(least, interval), length, "{least} s, {interval} s");
        }
    }

    #[test]
    fn the_time_of_a_line_is_read_to_the_microsecond() {
        let line = "2026-11-23T07:15:19.719869Z  WARN backend down pool=p0 address=10.100.0.1 check=\"x\"";
        assert_eq!(time_of(line), Some(Duration::from_micros(26_119_719_869)));
        assert_eq!(time_of("backend down"), None);
    }
}
