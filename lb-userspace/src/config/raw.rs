//! The document as `serde_yaml` reads it, with the places of `marks`. Owns the promise that both
//! readers saw the same document. Knows no key of the configuration.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::marks::{Mark, Shape, is_null, report_tab};
use super::problem::{Place, Report, on_one_line};
use super::read::join;

pub(super) struct Node {
    pub at: Place,
    pub value: Value,
}

pub(super) enum Value {
    /// Nothing, `~` or `null`: the same as if the key were not there.
    Null,
    /// The text that was written, whatever YAML would make of it.
    Scalar(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

pub(super) struct Entry {
    pub key: String,
    pub key_at: Place,
    pub node: Node,
}

/// `None` after an error was reported. Duplicate keys are reported, and the first of them is kept,
/// so that the rest of the file is still checked.
pub(super) fn read(text: &str, marked: &Mark<'_>, report: &mut Report) -> Option<Node> {
    match Guided(marked).deserialize(serde_yaml::Deserializer::from_str(text)) {
        Ok(mut root) => {
            refuse_duplicates(&mut root, "", report);
            Some(root)
        }
        Err(error) => {
            let at = error.location().map_or(Place::START, |l| Place::new(l.line(), l.column()));
            if report_tab(text, at, report) {
                return None;
            }
            // serde_yaml puts the path before its message, and the place after it.
            let told = error.to_string();
            let message = if told.contains(DIFFER) || told.contains("invalid type") {
                DIFFER.to_owned()
            } else {
                let reason = told.split(" at line ").next().unwrap_or_default();
                format!("is not YAML for every reader: {}", on_one_line(reason))
            };
            let hint = "write it in another way, such as in quotes or in block style";
            report.error(at, "", message, hint);
            None
        }
    }
}

/// Reads the value that stands at a mark.
struct Guided<'m, 't>(&'m Mark<'t>);

impl<'de> DeserializeSeed<'de> for Guided<'_, '_> {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        // Asking for a string yields the text as written; asking for anything would yield a
        // number or a boolean where YAML knows one.
        let value = match &self.0.shape {
            Shape::Scalar { .. } => deserializer.deserialize_str(self.visitor()),
            Shape::List(_) => deserializer.deserialize_seq(self.visitor()),
            Shape::Map(_) => deserializer.deserialize_map(self.visitor()),
        }?;
        Ok(Node { at: self.0.at, value })
    }
}

impl<'m, 't> Guided<'m, 't> {
    fn visitor(&self) -> Same<'m, 't> {
        Same(self.0)
    }
}

/// Accepts what has the shape and the text of the mark.
struct Same<'m, 't>(&'m Mark<'t>);

const DIFFER: &str = "YAML readers differ in what they read here";

impl<'de> Visitor<'de> for Same<'_, '_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0.shape {
            Shape::Scalar { .. } => "a single value",
            Shape::List(_) => "a list",
            Shape::Map(_) => "a mapping",
        })
    }

    fn visit_str<E: serde::de::Error>(self, read: &str) -> Result<Value, E> {
        match &self.0.shape {
            Shape::Scalar { text, plain } if text == read => {
                let null = *plain && is_null(read);
                Ok(if null { Value::Null } else { Value::Scalar(read.to_owned()) })
            }
            _ => Err(E::custom(DIFFER)),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut read: A) -> Result<Value, A::Error> {
        let Shape::List(marks) = &self.0.shape else {
            return Err(A::Error::custom(DIFFER));
        };
        let mut items = Vec::with_capacity(marks.len());
        for mark in marks {
            let item = read.next_element_seed(Guided(mark))?;
            items.push(item.ok_or_else(|| A::Error::custom(DIFFER))?);
        }
        match read.next_element::<IgnoredAny>()? {
            None => Ok(Value::List(items)),
            Some(_) => Err(A::Error::custom(DIFFER)),
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut read: A) -> Result<Value, A::Error> {
        let Shape::Map(marks) = &self.0.shape else {
            return Err(A::Error::custom(DIFFER));
        };
        let mut entries = Vec::with_capacity(marks.len());
        for (key, value) in marks {
            let Some(Node { at, value: text }) = read.next_key_seed(Guided(key))? else {
                return Err(A::Error::custom(DIFFER));
            };
            let key = match text {
                Value::Scalar(text) => text,
                Value::Null => String::new(),
                Value::List(_) | Value::Map(_) => return Err(A::Error::custom(DIFFER)),
            };
            let node = read.next_value_seed(Guided(value))?;
            entries.push(Entry { key, key_at: at, node });
        }
        match read.next_key::<IgnoredAny>()? {
            None => Ok(Value::Map(entries)),
            Some(_) => Err(A::Error::custom(DIFFER)),
        }
    }
}

/// Recursion is bounded by the depth that `marks` allows.
fn refuse_duplicates(node: &mut Node, path: &str, report: &mut Report) {
    match &mut node.value {
        Value::Null | Value::Scalar(_) => {}
        Value::List(items) => {
            for (i, item) in items.iter_mut().enumerate() {
                refuse_duplicates(item, &format!("{path}[{i}]"), report);
            }
        }
        Value::Map(entries) => {
            let mut first = HashMap::new();
            entries.retain(|entry| match first.entry(entry.key.clone()) {
                Slot::Vacant(slot) => {
                    slot.insert(entry.key_at.line);
                    true
                }
                Slot::Occupied(slot) => {
                    let message = format!("is already set at line {}", slot.get());
                    let path = join(path, &entry.key);
                    report.error(entry.key_at, &path, message, "remove one of the two");
                    false
                }
            });
            for entry in entries {
                refuse_duplicates(&mut entry.node, &join(path, &entry.key), report);
            }
        }
    }
}
