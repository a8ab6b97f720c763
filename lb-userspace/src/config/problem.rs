//! What is wrong with a configuration, where, and the way out. Knows nothing of YAML or of rules.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::model::Written;

/// Problems shown at most; the rest is counted. Bounds memory for a file that is wrong throughout.
const MAX_SHOWN: usize = 1000;

/// One mistake in a configuration, or one oddity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    pub file: String,
    /// From 1. Absent where the problem is not in a line (a missing file).
    pub line: Option<u32>,
    /// From 1, in characters.
    pub column: Option<u32>,
    /// `pools.web.backends[2].weight`; empty where the problem is with the whole file.
    pub path: String,
    pub message: String,
    /// The way out.
    pub hint: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
            if let Some(column) = self.column {
                write!(f, ":{column}")?;
            }
        }
        if !self.path.is_empty() {
            write!(f, " {}", self.path)?;
        }
        write!(f, ": {}", self.message)?;
        if let Some(hint) = &self.hint {
            write!(f, "; {hint}")?;
        }
        Ok(())
    }
}

/// Every mistake of one configuration, sorted by place; printed one per line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// A line and a column, both from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Place {
    pub line: u32,
    pub column: u32,
}

impl Place {
    pub const START: Place = Place { line: 1, column: 1 };

    /// The place right behind `text`.
    pub fn after(text: &str) -> Place {
        let last = text.rsplit('\n').next().unwrap_or_default();
        Place::new(text.matches('\n').count() + 1, last.chars().count() + 1)
    }

    /// Saturates; files are far smaller than either number can count.
    pub fn new(line: usize, column: usize) -> Place {
        let fit = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Place { line: fit(line), column: fit(column) }
    }
}

/// Where something stands: what a second mention of it is compared with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Spot {
    pub place: Place,
    pub path: String,
}

impl fmt::Display for Spot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {} ({})", self.place.line, self.path)
    }
}

/// Collects the problems of one file.
#[derive(Debug)]
pub(super) struct Report {
    file: String,
    errors: Vec<Problem>,
    warnings: Vec<Problem>,
    /// Errors and warnings beyond [`MAX_SHOWN`].
    more_errors: usize,
    more_warnings: usize,
}

impl Report {
    pub fn new(file: &str) -> Report {
        Report {
            file: file.to_owned(),
            errors: Vec::new(),
            warnings: Vec::new(),
            more_errors: 0,
            more_warnings: 0,
        }
    }

    pub fn file(&self) -> &str {
        &self.file
    }

    pub fn error(&mut self, place: Place, path: &str, message: impl Into<String>, hint: impl Into<String>) {
        if self.errors.len() >= MAX_SHOWN {
            self.more_errors += 1;
            return;
        }
        let problem = self.problem(place, path, message.into(), hint.into());
        self.errors.push(problem);
    }

    pub fn warn(&mut self, place: Place, path: &str, message: impl Into<String>, hint: impl Into<String>) {
        if self.warnings.len() >= MAX_SHOWN {
            self.more_warnings += 1;
            return;
        }
        let problem = self.problem(place, path, message.into(), hint.into());
        self.warnings.push(problem);
    }

    /// A value with its place, for faults that only the host can find.
    pub fn written<T>(&self, value: T, at: &Spot) -> Written<T> {
        Written {
            value,
            file: self.file.clone(),
            line: at.place.line,
            column: at.place.column,
            path: at.path.clone(),
        }
    }

    pub fn error_at<T>(&mut self, at: &Written<T>, message: impl Into<String>, hint: impl Into<String>) {
        self.error(Place { line: at.line, column: at.column }, &at.path, message, hint);
    }

    fn problem(&self, place: Place, path: &str, message: String, hint: String) -> Problem {
        Problem {
            file: self.file.clone(),
            line: Some(place.line),
            column: Some(place.column),
            path: path.to_owned(),
            message,
            hint: (!hint.is_empty()).then_some(hint),
        }
    }

    pub fn has_errors(&self) -> bool {
        !self.errors.is_empty()
    }

    /// Further errors are only counted, so their texts are not worth much work.
    pub fn is_full(&self) -> bool {
        self.errors.len() >= MAX_SHOWN
    }

    /// Grows with every error, shown or not.
    pub fn error_count(&self) -> usize {
        self.errors.len() + self.more_errors
    }

    pub fn into_problems(self) -> Problems {
        Problems(finish(&self.file, self.errors, self.more_errors))
    }

    pub fn into_warnings(self) -> Vec<Problem> {
        finish(&self.file, self.warnings, self.more_warnings)
    }
}

fn finish(file: &str, mut problems: Vec<Problem>, more: usize) -> Vec<Problem> {
    problems.sort_by(|a, b| (a.line, a.column, &a.path).cmp(&(b.line, b.column, &b.path)));
    if more > 0 {
        problems.push(Problem {
            file: file.to_owned(),
            line: None,
            column: None,
            path: String::new(),
            message: format!("{more} more are not shown"),
            hint: Some("start with those above".to_owned()),
        });
    }
    problems
}

/// Text from the file, fit for one line of a terminal: escaped, and cut where it is long.
pub(super) fn show(text: &str) -> String {
    const LONGEST: usize = 64;
    let mut shown: String = text.chars().take(LONGEST).collect();
    if shown.len() < text.len() {
        shown.push_str("...");
    }
    let bare = !shown.is_empty() && shown.chars().all(|c| c.is_ascii_graphic());
    // Debug also escapes what would redraw or reorder a terminal's line.
    if bare { shown } else { format!("{shown:?}") }
}

/// Another crate's words, which may hold text from the file, fit for a terminal.
pub(super) fn on_one_line(words: &str) -> String {
    if words.chars().any(char::is_control) { show(words) } else { words.to_owned() }
}
