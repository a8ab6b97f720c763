//! What a bench leaves behind: its rows, in an envelope that says how, where and when they came about. Knows no bench.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::root;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report<R> {
    /// `xlb bench packet`.
    pub tool: String,
    /// The command line that makes another.
    pub command: String,
    /// UTC.
    pub date: String,
    /// As `git describe` has it; `-dirty` where the tree held something else.
    pub commit: String,
    pub machine: Machine,
    /// What else it depends on: versions of other programs, how often something was measured.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    pub rows: Vec<R>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    pub cpu: String,
    pub cores: usize,
    pub kernel: String,
    /// Whether it is one of several on its hardware.
    #[serde(rename = "virtual")]
    pub is_virtual: bool,
}

impl<R> Report<R> {
    /// Of `cargo xtask bench NAME`, as it was called.
    pub fn new(name: &str, rows: Vec<R>) -> Result<Self> {
        Ok(Self {
            tool: format!("xlb bench {name}"),
            command: command_line(),
            date: output("date", &["-u", "+%F"])?,
            commit: output("git", &["describe", "--always", "--tags", "--dirty"])?,
            machine: Machine::here()?,
            notes: Vec::new(),
            rows,
        })
    }
}

impl<R: Serialize> Report<R> {
    pub fn write(&self, path: &Path) -> Result<()> {
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
        }
        let text = serde_json::to_string_pretty(self)? + "\n";
        std::fs::write(path, text).with_context(|| path.display().to_string())
    }
}

impl<R: DeserializeOwned> Report<R> {
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        serde_json::from_str(&text).with_context(|| format!("{}: no report of this bench", path.display()))
    }
}

/// Where reports of a bench are kept, by their dates.
pub fn kept(name: &str, date: &str) -> PathBuf {
    root().join(RESULTS).join(format!("{name}-{date}.json"))
}

/// The report of a bench that was kept last.
pub fn newest(name: &str) -> Result<Option<PathBuf>> {
    let directory = root().join(RESULTS);
    if !directory.exists() {
        return Ok(None);
    }
    let entries = std::fs::read_dir(&directory).with_context(|| directory.display().to_string())?;
    let names = entries.map(|entry| Ok(entry?.file_name().into_string().unwrap_or_default()));
    let names = names.collect::<Result<Vec<String>>>()?;
    Ok(newest_of(name, &names).map(|file| directory.join(file)))
}

const RESULTS: &str = "docs/results";

/// Dates sort as text does. The names of other benches may begin like this one's.
fn newest_of<'n>(name: &str, files: &'n [String]) -> Option<&'n String> {
    let date = |file: &&String| {
        let date = file.strip_prefix(name)?.strip_prefix('-')?.strip_suffix(".json")?;
        date.starts_with(|c: char| c.is_ascii_digit()).then(|| date.to_owned())
    };
    files.iter().filter(|file| date(file).is_some()).max_by_key(date)
}

impl Machine {
    pub fn here() -> Result<Self> {
        let read = |path: &str| std::fs::read_to_string(path).with_context(|| path.to_owned());
        let cpuinfo = read("/proc/cpuinfo")?;
        let field = |name: &str| {
            let line =
                cpuinfo.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'));
            line.map(|value| value.trim().to_owned())
        };
        Ok(Self {
            cpu: field("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            // Not those that this thread may use.
            cores: cpuinfo.lines().filter(|line| line.starts_with("processor")).count(),
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            is_virtual: field("flags").is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor")),
        })
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { cpu, cores, kernel, is_virtual } = self;
        let what = if *is_virtual { ", a virtual machine" } else { "" };
        write!(f, "{cpu}, {cores} cores{what}, kernel {kernel}")
    }
}

/// What was typed, fit for a shell.
fn command_line() -> String {
    let arguments = std::env::args().skip(1).map(|argument| quoted(&argument));
    ["cargo".to_owned(), "xtask".to_owned()].into_iter().chain(arguments).collect::<Vec<_>>().join(" ")
}

fn quoted(argument: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./,:=+@%".contains(c);
    if !argument.is_empty() && argument.chars().all(plain) {
        argument.to_owned()
    } else {
        format!("'{}'", argument.replace('\'', r"'\''"))
    }
}

fn output(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).current_dir(root()).output();
    let output = output.with_context(|| format!("{program} does not start"))?;
    ensure!(output.status.success(), "{program} {}: {}", arguments.join(" "), output.status);
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_that_is_written_can_be_read() {
        let machine = Machine { cpu: "one".into(), cores: 2, kernel: "6.18".into(), is_virtual: true };
        let report = Report {
            tool: "xlb bench test".into(),
            command: "cargo xtask bench test".into(),
            date: "2026-11-23".into(),
            commit: "abc".into(),
            machine,
            notes: Vec::new(),
            rows: vec![1.5, 2.5],
        };
        let path = std::env::temp_dir().join(format!("xlb-report-{}.json", std::process::id()));
        report.write(&path).unwrap();
        let read = Report::<f64>::read(&path);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(read.unwrap(), report);
    }

    #[test]
    fn the_newest_report_is_the_one_of_the_last_date_of_its_own_bench() {
        let files = ["packet-2026-11-23.json", "packet-2027-01-02.json", "packet-2026-12-31.json"];
        let others = ["packet-pps-2028-01-01.json", "packet-2028-01-01.txt", "scale-2028-01-01.json"];
        let files: Vec<String> = files.iter().chain(&others).map(|&file| file.to_owned()).collect();
        assert_eq!(newest_of("packet", &files).unwrap(), "packet-2027-01-02.json");
        assert_eq!(newest_of("pack", &files), None);
    }

    #[test]
    fn arguments_that_a_shell_would_take_apart_are_quoted() {
        assert_eq!(quoted("--only"), "--only");
        assert_eq!(quoted("IPv4 TCP"), "'IPv4 TCP'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }
}
