//! The configuration file: YAML in, a valid [`model::Config`] or every mistake in the file out.
//! Knows neither the kernel, nor a clock, nor what becomes of a configuration.
//!
//! Two steps. `raw`: `serde_yaml` reads the document, every scalar as the text that was written,
//! so `seed: 5e10` is not a float and `mode: no` not a boolean. `model`: typed helpers walk the
//! raw tree, convert each leaf and collect what is wrong.
//!
//! Why the raw step yields a tree and not derived structs: a derived struct ends at its first
//! wrong leaf and forgets where the others stood. Holding every field in a wrapper that survives
//! any shape is more code than the helpers in `read`, and its errors are worse.
//!
//! Two readers must not disagree. `saphyr-parser` says where a value stands (`marks`) and guides
//! `serde_yaml` value by value (`raw`); both must see the same shape, keys and texts, otherwise the
//! file is refused. What YAML readers treat differently (anchors, aliases, tags, duplicate keys,
//! several documents) is refused with its place. This also bounds time and memory: without
//! aliases a document is never larger than its file.

mod access;
mod cross;
mod flows;
mod health;
mod leaf;
mod marks;
pub mod model;
mod nat;
mod network;
mod places;
mod pools;
mod problem;
mod quic;
mod raw;
mod read;
mod services;
mod tiers;
mod top;
mod vip;
mod vips;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::Read as _;
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

pub use places::{Places, Subject};
use problem::{Place, Report};
pub use problem::{Problem, Problems};
pub use read::did_you_mean;

/// A time that an operator gives.
///
/// # Errors
/// What is wrong with it, and the way out.
pub fn duration(text: &str, range: RangeInclusive<Duration>) -> Result<Duration, String> {
    leaf::duration(text, range).map_err(|wrong| format!("{}; {}", wrong.message, wrong.hint))
}

/// As [`duration`] reads it.
pub fn show_duration(duration: Duration) -> String {
    leaf::show_duration(duration)
}

/// Keys the flow hash where the file has no `seed`. Public, so it protects nobody: a warning says so.
pub const DEFAULT_SEED: u64 = 0x786c_625f_7365_6564;

/// A larger file is refused unread. 100,000 services fit.
pub const MAX_FILE_BYTES: u64 = 16 * 1024 * 1024;

/// A valid configuration and what is odd about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    pub config: model::Config,
    /// Sorted by place. None of them keeps the configuration from being used.
    pub warnings: Vec<Problem>,
    pub places: Places,
}

/// Reads and checks the file at `path`, which may be a pipe.
///
/// # Errors
/// All mistakes of the file, or the one that kept it from being read.
pub fn load(path: &Path) -> Result<Loaded, Problems> {
    load_with_text(path).map(|(loaded, _)| loaded)
}

/// As [`load`], with what is in the file.
///
/// # Errors
/// Those of [`load`].
pub fn load_with_text(path: &Path) -> Result<(Loaded, String), Problems> {
    let file = path.display().to_string();
    let bytes = read_file(path).map_err(|(message, hint)| {
        Problems(vec![Problem {
            file: file.clone(),
            line: None,
            column: None,
            path: String::new(),
            message,
            hint,
        }])
    })?;
    let text = match String::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            let (bytes, end) = (error.as_bytes(), error.utf8_error().valid_up_to());
            let good = String::from_utf8_lossy(&bytes[..end]);
            let mut report = Report::new(&file);
            report.error(
                Place::after(&good),
                "",
                format!("byte 0x{:02x} is not UTF-8", bytes[end]),
                "save the file as UTF-8",
            );
            return Err(report.into_problems());
        }
    };
    let loaded = parse(&file, &text)?;
    if !text.ends_with('\n') {
        // A file cut within its last line can still be YAML: 10.0.1.1 may have been 10.0.1.11.
        let mut report = Report::new(&file);
        report.error(
            Place::after(&text),
            "",
            "the last line has no line break, so the file may be cut off",
            "if it is whole, end it with a line break",
        );
        return Err(report.into_problems());
    }
    Ok((loaded, text))
}

type Unreadable = (String, Option<String>);

fn read_file(path: &Path) -> Result<Vec<u8>, Unreadable> {
    let cannot = |error: std::io::Error| {
        let hint = match error.kind() {
            std::io::ErrorKind::NotFound => Some("name the file with --config".to_owned()),
            std::io::ErrorKind::PermissionDenied => Some("xlb needs read access to it".to_owned()),
            _ => None,
        };
        (format!("cannot be read: {error}"), hint)
    };
    let file = File::open(path).map_err(cannot)?;
    if file.metadata().map_err(cannot)?.is_dir() {
        let hint = format!("name a file, such as {}", path.join("xlb.yaml").display());
        return Err(("is a directory".to_owned(), Some(hint)));
    }
    let mut bytes = Vec::new();
    // One byte beyond the cap tells a file of exactly the cap from a larger one.
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(cannot)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        let message = format!("is larger than {} MiB", MAX_FILE_BYTES / (1024 * 1024));
        return Err((message, Some("is this the right file?".to_owned())));
    }
    Ok(bytes)
}

/// Checks `text`; `file` is the name shown in problems.
///
/// # Errors
/// All mistakes, sorted by place. A text that is no YAML ends at its first mistake.
pub fn parse(file: &str, text: &str) -> Result<Loaded, Problems> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut report = Report::new(file);
    let config = marks::read(text, &mut report)
        .and_then(|marked| raw::read(text, &marked, &mut report))
        .and_then(|root| top::config(&root, &mut report));
    match config {
        Some((config, places)) if !report.has_errors() => {
            Ok(Loaded { config, warnings: report.into_warnings(), places })
        }
        _ => Err(report.into_problems()),
    }
}
