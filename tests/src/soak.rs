//! What a soak measures: an agent's footprint, in samples, and what of it grew between two quarters of the run. It knows
//! neither labs nor what is done to the agent.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

/// Fewer samples make no quarters to compare.
pub const FEWEST_SAMPLES: usize = 16;

/// Probes and requests that are under way at a sample.
const FDS_IN_FLIGHT: u64 = 2;

/// Memory may grow by the larger of these between the two quarters.
const RSS_SLACK_KIB: u64 = 1024;
const RSS_SLACK_PERCENT: u64 = 5;

/// Clock ticks of /proc, a second: USER_HZ, which is 100 on x86-64 and on arm64.
const TICKS: u64 = 100;

/// What a process holds.
///
/// Of BPF, everything that is there for its sake is either open in the process or pinned: what is neither is freed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    pub rss_anon_kib: u64,
    pub rss_kib: u64,
    pub threads: u64,
    pub fds: u64,
    /// Used since its start, in clock ticks.
    pub cpu_ticks: u64,
    /// Different ones that it has open.
    pub maps: u64,
    pub programs: u64,
    pub links: u64,
    /// Files below its bpffs.
    pub pins: u64,
}

impl Footprint {
    pub fn of(pid: u32, bpffs: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = format!("/proc/{pid}/{name}");
            fs::read_to_string(&path).context(path)
        };
        let status = read("status")?;
        let (maps, programs, links) = open_bpf(pid)?;
        Ok(Self {
            rss_anon_kib: field(&status, "RssAnon:")?,
            rss_kib: field(&status, "VmRSS:")?,
            threads: field(&status, "Threads:")?,
            fds: fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64,
            cpu_ticks: cpu_ticks(&read("stat")?).context("/proc/PID/stat")?,
            maps,
            programs,
            links,
            pins: files_below(bpffs).with_context(|| bpffs.display().to_string())?,
        })
    }

    /// Of one core, since an earlier sample that was taken so long before.
    pub fn cpu_percent(&self, earlier: &Self, after: Duration) -> f64 {
        let ticks = self.cpu_ticks.saturating_sub(earlier.cpu_ticks);
        ticks as f64 * 100.0 / TICKS as f64 / after.as_secs_f64().max(0.001)
    }
}

/// How many different maps, programs and links a process has open.
fn open_bpf(pid: u32) -> Result<(u64, u64, u64)> {
    let dir = format!("/proc/{pid}/fdinfo");
    let mut ids = [const { BTreeSet::<u64>::new() }; 3];
    for entry in fs::read_dir(&dir).context(dir)? {
        // Closed since the directory was listed.
        let Ok(text) = fs::read_to_string(entry?.path()) else { continue };
        // A link tells of its program too, a program of its maps: the first that is there says which it is.
        let told = ["link_id:", "map_id:", "prog_id:"].map(|key| field(&text, key).ok());
        if let Some((kind, id)) = told.iter().enumerate().find_map(|(kind, id)| Some((kind, (*id)?))) {
            ids[kind].insert(id);
        }
    }
    let [links, maps, programs] = ids.map(|ids| ids.len() as u64);
    Ok((maps, programs, links))
}

/// The number behind a key of a file of /proc.
fn field(text: &str, key: &str) -> Result<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(key));
    let word = value.and_then(|value| value.split_whitespace().next());
    word.with_context(|| format!("no {key}"))?.parse().with_context(|| key.to_owned())
}

/// User and system time of a line of /proc/PID/stat. The second field is the name, in brackets, with anything in it.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}

fn files_below(dir: &Path) -> std::io::Result<u64> {
    let mut count = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        count += if entry.file_type()?.is_dir() { files_below(&entry.path())? } else { 1 };
    }
    Ok(count)
}

/// How requests of the soak's load fared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub done: u64,
    /// Failed while something was broken on purpose.
    pub expected: u64,
    pub unexpected: u64,
}

/// One line of the table.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    pub at: Duration,
    pub footprint: Footprint,
    pub cpu_percent: f64,
    pub tally: Tally,
    pub backends_up: usize,
}

/// The table's head.
pub const HEAD: &str = "\
MINUTES  RSS ANON KIB  RSS KIB  FDS  THREADS  CPU %  REQUESTS  FAILED  UNEXPECTED  UP  MAPS  PROGRAMS  LINKS  PINS";

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Footprint { rss_anon_kib, rss_kib, threads, fds, maps, programs, links, pins, cpu_ticks: _ } =
            &self.footprint;
        let Tally { done, expected, unexpected } = self.tally;
        let minutes = self.at.as_secs_f64() / 60.0;
        write!(f, "{minutes:7.1}  {rss_anon_kib:12}  {rss_kib:7}  {fds:3}  {threads:7}  ")?;
        write!(f, "{:5.1}  {done:8}  {expected:6}  {unexpected:10}  ", self.cpu_percent)?;
        write!(f, "{:2}  {maps:4}  {programs:8}  {links:5}  {pins:4}", self.backends_up)
    }
}

/// What is not in the last quarter of a run as it was in the second, by medians; nothing if there are too few samples to
/// tell. The first quarter is for what fills up once.
pub fn growth(samples: &[Sample]) -> Option<Vec<String>> {
    type Column = (&'static str, fn(&Footprint) -> u64, u64);
    const COLUMNS: [Column; 6] = [
        ("fds", |f| f.fds, FDS_IN_FLIGHT),
        ("threads", |f| f.threads, 0),
        ("open maps", |f| f.maps, 0),
        ("open programs", |f| f.programs, 0),
        ("open links", |f| f.links, 0),
        ("pins", |f| f.pins, 0),
    ];
    if samples.len() < FEWEST_SAMPLES {
        return None;
    }
    let quarter = samples.len() / 4;
    let (second, last) = (&samples[quarter..2 * quarter], &samples[samples.len() - quarter..]);
    let medians = |column: fn(&Footprint) -> u64| (median(second, column), median(last, column));
    let mut grown = Vec::new();
    for (name, column, slack) in COLUMNS {
        let (before, after) = medians(column);
        if before.abs_diff(after) > slack {
            grown.push(format!("{name}: {before} in the second quarter, {after} in the last"));
        }
    }
    // The allocator keeps what was large and free, or gives it back, as it likes: medians go up and down with that. What
    // leaks is in the smallest sample too.
    let (before, after) = medians(|f| f.rss_anon_kib);
    let larger =
        |before: u64, after: u64| after > before + RSS_SLACK_KIB.max(before * RSS_SLACK_PERCENT / 100);
    if larger(before, after) && larger(least_rss_anon_kib(second), least_rss_anon_kib(last)) {
        grown.push(format!("RssAnon: {before} KiB in the second quarter, {after} KiB in the last"));
    }
    Some(grown)
}

fn median(samples: &[Sample], column: fn(&Footprint) -> u64) -> u64 {
    let mut values: Vec<u64> = samples.iter().map(|sample| column(&sample.footprint)).collect();
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn least_rss_anon_kib(samples: &[Sample]) -> u64 {
    samples.iter().map(|sample| sample.footprint.rss_anon_kib).min().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(length: usize, footprint: impl Fn(u64) -> Footprint) -> Vec<Sample> {
        let sample = |number| Sample { footprint: footprint(number), ..Sample::default() };
        (0..length as u64).map(sample).collect()
    }

    #[test]
    fn a_run_that_fills_up_once_and_then_wavers_is_flat() {
        let flat = run(40, |number| Footprint {
            rss_anon_kib: 4000 + 100 * number.min(8) + number % 3 * 300,
            fds: 30 + number % 3,
            threads: 4,
            ..Footprint::default()
        });
        assert_eq!(growth(&flat), Some(Vec::new()));
    }

    #[test]
    fn whatever_grows_is_named() {
        let leaking = run(40, |number| Footprint {
            rss_anon_kib: 4000 + 100 * number,
            fds: 30 + number,
            threads: 4 + number / 20,
            maps: number / 8,
            pins: 13 + number / 10,
            ..Footprint::default()
        });
        let grown = growth(&leaking).unwrap();
        let names: Vec<&str> = grown.iter().filter_map(|line| Some(line.split_once(':')?.0)).collect();
        assert_eq!(names, ["fds", "threads", "open maps", "pins", "RssAnon"]);
        assert_eq!(grown[4], "RssAnon: 5500 KiB in the second quarter, 7500 KiB in the last");
    }

    #[test]
    fn memory_that_is_given_back_now_and_then_has_not_grown() {
        let seldom = |number: u64| number.is_multiple_of(5) || number < 20;
        let bimodal = run(40, |number| Footprint {
            rss_anon_kib: if seldom(number) { 36_000 } else { 60_000 },
            ..Footprint::default()
        });
        assert_eq!(growth(&bimodal), Some(Vec::new()));
        let leaking = run(40, |number| Footprint {
            rss_anon_kib: 150 * number + if seldom(number) { 36_000 } else { 60_000 },
            ..Footprint::default()
        });
        assert_eq!(growth(&leaking).unwrap().len(), 1);
    }

    #[test]
    fn one_outlier_is_no_growth_and_a_short_run_has_no_verdict() {
        let outlier =
            run(40, |number| Footprint { fds: if number == 39 { 300 } else { 30 }, ..Footprint::default() });
        assert_eq!(growth(&outlier), Some(Vec::new()));
        assert_eq!(growth(&outlier[..FEWEST_SAMPLES - 1]), None);
    }

    #[test]
    fn this_process_has_a_footprint() {
        let footprint = Footprint::of(std::process::id(), Path::new("/proc/self/attr")).unwrap();
        assert!(footprint.rss_anon_kib > 0 && footprint.rss_kib >= footprint.rss_anon_kib, "{footprint:?}");
        assert!(footprint.threads > 0 && footprint.fds > 2 && footprint.pins > 0, "{footprint:?}");
        assert_eq!((footprint.maps, footprint.programs, footprint.links), (0, 0, 0));
    }

    #[test]
    fn times_stand_behind_a_name_of_any_form() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194560 1 0 0 0 30 12 5 6 20 0 9 0 100";
        assert_eq!(cpu_ticks(stat), Some(42));
        assert_eq!(cpu_ticks("7 (a) S 1 2"), None);
    }

    #[test]
    fn rows_stand_below_their_head() {
        assert_eq!(Sample::default().to_string().len(), HEAD.len());
    }
}
