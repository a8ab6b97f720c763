//! Typed helpers to walk the raw tree: each reports what has the wrong shape and carries on.
//! Owns places and paths of values, unknown keys, and the `did you mean`. Knows no rule.

use super::problem::{Place, Report, Spot, show};
use super::raw::{Entry, Node, Value};

/// Why a text is not the value it should be, and the way out.
pub(super) struct Wrong {
    pub message: String,
    pub hint: String,
}

/// A value in the tree, with where it stands and what it is called.
#[derive(Clone)]
pub(super) struct At<'n> {
    node: &'n Node,
    /// The key's place; for an item of a list, the item's.
    key_at: Place,
    pub path: String,
}

impl<'n> At<'n> {
    pub fn root(node: &'n Node) -> At<'n> {
        At { node, key_at: Place::START, path: String::new() }
    }

    fn child(&self, entry: &'n Entry) -> At<'n> {
        At { node: &entry.node, key_at: entry.key_at, path: join(&self.path, &entry.key) }
    }

    /// The value's own place. What is not there has the place of its key.
    pub fn place(&self) -> Place {
        match self.node.value {
            Value::Null => self.key_at,
            Value::Scalar(_) | Value::List(_) | Value::Map(_) => self.node.at,
        }
    }

    pub fn key_place(&self) -> Place {
        self.key_at
    }

    pub fn spot(&self) -> Spot {
        Spot { place: self.place(), path: self.path.clone() }
    }

    pub fn is_scalar(&self) -> bool {
        matches!(self.node.value, Value::Scalar(_))
    }

    pub fn wrong(&self, wrong: Wrong, report: &mut Report) {
        report.error(self.place(), &self.path, wrong.message, wrong.hint);
    }

    fn misshapen(&self, want: &str, report: &mut Report) {
        let message = match &self.node.value {
            Value::Null => "has no value".to_owned(),
            Value::Scalar(text) => format!("{} is not allowed here", show(text)),
            Value::List(_) => "a list is not allowed here".to_owned(),
            Value::Map(_) => "a mapping is not allowed here".to_owned(),
        };
        report.error(self.place(), &self.path, message, format!("use {want}"));
    }

    /// The one value that stands here, converted.
    pub fn value<T>(
        &self,
        want: &str,
        convert: impl FnOnce(&'n str) -> Result<T, Wrong>,
        report: &mut Report,
    ) -> Option<T> {
        let Value::Scalar(text) = &self.node.value else {
            self.misshapen(want, report);
            return None;
        };
        match convert(text) {
            Ok(value) => Some(value),
            Err(wrong) => {
                self.wrong(wrong, report);
                None
            }
        }
    }

    pub fn items(&self, want: &str, report: &mut Report) -> Vec<At<'n>> {
        let Value::List(items) = &self.node.value else {
            self.misshapen(want, report);
            return Vec::new();
        };
        let path = &self.path;
        let item = |(i, node): (usize, &'n Node)| At { node, key_at: node.at, path: format!("{path}[{i}]") };
        items.iter().enumerate().map(item).collect()
    }

    /// The items of a list, or the one value that stands in its place. Reports an empty list.
    pub fn one_or_more(&self, want: &str, report: &mut Report) -> Vec<At<'n>> {
        match &self.node.value {
            Value::Scalar(_) => vec![self.clone()],
            Value::List(items) if items.is_empty() => {
                report.error(self.place(), &self.path, "the list is empty", format!("use {want}"));
                Vec::new()
            }
            Value::Null | Value::List(_) | Value::Map(_) => self.items(want, report),
        }
    }

    /// The entries of a mapping whose keys are names the operator chose.
    pub fn entries(&self, want: &str, report: &mut Report) -> Vec<(&'n str, At<'n>)> {
        let Value::Map(entries) = &self.node.value else {
            self.misshapen(want, report);
            return Vec::new();
        };
        entries.iter().map(|entry| (entry.key.as_str(), self.child(entry))).collect()
    }

    /// The entries of a mapping with fixed keys; every other key is reported.
    pub fn fields(&self, known: &[&'static str], want: &str, report: &mut Report) -> Option<Fields<'n>> {
        let Value::Map(entries) = &self.node.value else {
            self.misshapen(want, report);
            return None;
        };
        for entry in entries.iter().filter(|entry| !known.contains(&entry.key.as_str())) {
            let path = join(&self.path, &entry.key);
            let hint = match entry.key.split_once(':') {
                _ if report.is_full() => String::new(),
                Some((key, _)) if known.contains(&key) => "put a space behind the colon".to_owned(),
                _ => did_you_mean(&entry.key, known),
            };
            report.error(entry.key_at, &path, "is not a known key", hint);
        }
        Some(Fields { of: self.clone(), entries })
    }
}

pub(super) struct Fields<'n> {
    of: At<'n>,
    entries: &'n [Entry],
}

impl<'n> Fields<'n> {
    /// `None` where the key is absent or has no value.
    pub fn get(&self, key: &str) -> Option<At<'n>> {
        self.entries
            .iter()
            .find(|entry| entry.key == key && !matches!(entry.node.value, Value::Null))
            .map(|entry| self.of.child(entry))
    }

    /// Reports an absent key at the place of the mapping it is missing from.
    pub fn need(&self, key: &str, want: &str, report: &mut Report) -> Option<At<'n>> {
        let found = self.get(key);
        if found.is_none() {
            let empty = self.entries.iter().find(|entry| entry.key == key);
            let at = empty.map_or(self.of.key_at, |entry| entry.key_at);
            let message = if empty.is_some() { "has no value" } else { "is missing" };
            report.error(at, &join(&self.of.path, key), message, format!("use {want}"));
        }
        found
    }

    /// Converts the value of an optional key.
    pub fn value<T>(
        &self,
        key: &str,
        want: &str,
        convert: impl FnOnce(&'n str) -> Result<T, Wrong>,
        report: &mut Report,
    ) -> Option<T> {
        self.get(key)?.value(want, convert, report)
    }
}

pub(super) fn join(path: &str, key: &str) -> String {
    let key = show(key);
    if path.is_empty() { key } else { format!("{path}.{key}") }
}

/// The nearest of `known`, or all of them where none is near.
pub fn did_you_mean(word: &str, known: &[&str]) -> String {
    // A long word is nobody's typing error, and comparing it costs its length times the other's.
    if word.len() <= 100 {
        let lower = word.to_ascii_lowercase();
        let near = known
            .iter()
            .map(|k| (strsim::damerau_levenshtein(&lower, &k.to_ascii_lowercase()), k))
            .min_by_key(|(distance, _)| *distance)
            .filter(|(distance, k)| {
                let shorter = word.len().min(k.len());
                *distance < shorter && *distance <= 1.max(shorter / 3)
            });
        if let Some((_, near)) = near {
            return format!("did you mean {near}?");
        }
    }
    one_of(known)
}

/// Words that a message lists.
const MOST_NAMED: usize = 16;

pub(super) fn one_of(known: &[&str]) -> String {
    match known {
        [] => String::new(),
        [only] => format!("use {only}"),
        // A list too long to read helps nobody.
        [some @ .., last] if known.len() <= MOST_NAMED => format!("use {} or {last}", some.join(", ")),
        some => format!("use one of {}, ...", some[..MOST_NAMED].join(", ")),
    }
}
