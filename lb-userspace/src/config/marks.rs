//! The document as a tree of marks: where every value stands, its kind and its text. Owns what
//! is refused before anything is interpreted: depth, size, anchors, aliases, tags, documents.
//! Knows no key of the configuration.

use std::borrow::Cow;

use saphyr_parser::{Event, Parser, ScalarStyle, ScanError, Span};

use super::problem::{Place, Report, on_one_line};

/// The configuration needs 6.
const MAX_DEPTH: usize = 16;
/// Lists, mappings, keys and scalars. 150,000 services fit, and a hostile file takes less than 1 GB.
const MAX_VALUES: usize = 2_000_000;

pub(super) struct Mark<'t> {
    pub at: Place,
    pub shape: Shape<'t>,
}

pub(super) enum Shape<'t> {
    Scalar {
        text: Cow<'t, str>,
        /// Neither quoted nor a block, so that `null` means nothing is there.
        plain: bool,
    },
    List(Vec<Mark<'t>>),
    /// In the order of the file. Keys are scalars.
    Map(Vec<(Mark<'t>, Mark<'t>)>),
}

/// `None` after at least one error was reported.
pub(super) fn read<'t>(text: &'t str, report: &mut Report) -> Option<Mark<'t>> {
    refuse_control(text, report)?;
    let errors = report.error_count();
    let mut tree = Tree { open: Vec::new(), root: None, values: 0, documents: 0 };
    let mut parser = Parser::new_from_str(text);
    while let Some(event) = parser.next_event() {
        let step = match event {
            Ok((event, span)) => tree.take(event, span, report),
            Err(error) => {
                not_yaml(text, &error, tree.open.last(), report);
                None
            }
        };
        step?;
    }
    match tree.root {
        Some(Mark { shape: Shape::Scalar { text, plain: true }, .. }) if is_null(&text) => empty(report),
        None => empty(report),
        root => root.filter(|_| report.error_count() == errors),
    }
}

fn empty(report: &mut Report) -> Option<Mark<'static>> {
    let hint = "begin with the interfaces: interfaces: [eth0]";
    report.error(Place::START, "", "the file holds no configuration", hint);
    None
}

/// A list or a mapping whose end was not seen yet.
struct Open<'t> {
    at: Place,
    /// Written with brackets or braces.
    flow: bool,
    shape: Shape<'t>,
    /// A mapping's key that waits for its value.
    key: Option<Mark<'t>>,
}

struct Tree<'t> {
    open: Vec<Open<'t>>,
    root: Option<Mark<'t>>,
    values: usize,
    documents: usize,
}

impl<'t> Tree<'t> {
    /// `None` where reading on makes no sense.
    fn take(&mut self, event: Event<'t>, span: Span, report: &mut Report) -> Option<()> {
        let at = place(span);
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                refuse(at, anchor != 0, tag.is_some(), report);
                let plain = style == ScalarStyle::Plain;
                self.count(at, report)?;
                self.put(Mark { at, shape: Shape::Scalar { text, plain } }, report);
            }
            Event::SequenceStart(anchor, tag) => {
                refuse(at, anchor != 0, tag.is_some(), report);
                self.begin(span, Shape::List(Vec::new()), report)?;
            }
            Event::MappingStart(anchor, tag) => {
                refuse(at, anchor != 0, tag.is_some(), report);
                self.begin(span, Shape::Map(Vec::new()), report)?;
            }
            Event::SequenceEnd | Event::MappingEnd => {
                if let Some(Open { at, shape, .. }) = self.open.pop() {
                    self.put(Mark { at, shape }, report);
                }
            }
            Event::Alias(_) => {
                refuse(at, true, false, report);
                self.count(at, report)?;
                let shape = Shape::Scalar { text: Cow::Borrowed(""), plain: true };
                self.put(Mark { at, shape }, report);
            }
            Event::DocumentStart(_) => {
                self.documents += 1;
                if self.documents > 1 {
                    let message = "a second document begins here";
                    report.error(at, "", message, "keep one document in a file");
                    return None;
                }
            }
            Event::DocumentEnd | Event::StreamStart | Event::StreamEnd | Event::Nothing => {}
        }
        Some(())
    }

    fn begin(&mut self, span: Span, shape: Shape<'t>, report: &mut Report) -> Option<()> {
        let at = place(span);
        self.count(at, report)?;
        if self.open.len() >= MAX_DEPTH {
            too_deep(at, report);
            return None;
        }
        self.open.push(Open { at, flow: !span.is_empty(), shape, key: None });
        Some(())
    }

    fn count(&mut self, at: Place, report: &mut Report) -> Option<()> {
        self.values += 1;
        if self.values > MAX_VALUES {
            let message = format!("the file holds more than {MAX_VALUES} values");
            report.error(at, "", message, "is this the right file?");
            return None;
        }
        Some(())
    }

    fn put(&mut self, mark: Mark<'t>, report: &mut Report) {
        let Some(parent) = self.open.last_mut() else {
            self.root = Some(mark);
            return;
        };
        match (&mut parent.shape, parent.key.take()) {
            (Shape::List(items), _) => items.push(mark),
            (Shape::Map(entries), Some(key)) => entries.push((key, mark)),
            (Shape::Map(_), None) => {
                if !matches!(mark.shape, Shape::Scalar { .. }) {
                    let message = "a list or a mapping cannot be a key";
                    report.error(mark.at, "", message, "use a name");
                }
                parent.key = Some(mark);
            }
            (Shape::Scalar { .. }, _) => unreachable!("only lists and mappings are opened"),
        }
    }
}

fn too_deep(at: Place, report: &mut Report) {
    let message = format!("is nested deeper than {MAX_DEPTH} levels");
    report.error(at, "", message, "no part of a configuration needs more than 6");
}

fn refuse(at: Place, anchor: bool, tag: bool, report: &mut Report) {
    if anchor {
        let hint = "write the value out; defaults.health is there to share health settings";
        report.error(at, "", "anchors (&) and aliases (*) are not supported", hint);
    }
    if tag {
        let hint = "leave the tag out; the key decides what kind of value it is";
        report.error(at, "", "tags (!) are not supported", hint);
    }
}

fn place(span: Span) -> Place {
    Place::new(span.start.line(), span.start.col() + 1)
}

/// One problem for a text that is no YAML: the most likely cause, at its place.
fn not_yaml(text: &str, error: &ScanError, open: Option<&Open<'_>>, report: &mut Report) {
    let at = Place::new(error.marker().line(), error.marker().col() + 1);
    let reason = on_one_line(error.info());
    let open = open.filter(|open| open.flow && (open.at.line < at.line || at_end(text, error)));
    if report_tab(text, at, report) {
        return;
    }
    // Two limits of the parser that are nearer than ours, told as ours.
    if reason.contains("recursion limit") {
        too_deep(at, report);
    } else if reason.contains("unknown anchor") {
        refuse(at, true, false, report);
    } else if let Some(Open { at: begin, shape, .. }) = open {
        let (kind, end) = match shape {
            Shape::Map(_) => ("mapping", '}'),
            Shape::List(_) | Shape::Scalar { .. } => ("list", ']'),
        };
        let hint = format!("is a {end} missing in the {kind} that begins at line {}?", begin.line);
        if at_end(text, error) {
            report.error(at, "", format!("the file ends within a {kind}"), hint);
        } else {
            report.error(at, "", format!("is not YAML: {reason}"), hint);
        }
    } else if at_end(text, error) {
        report.error(at, "", format!("the file ends too early: {reason}"), "is it cut off?");
    } else {
        let hint = "look at the indentation, and put texts with special characters in quotes";
        report.error(at, "", format!("is not YAML: {reason}"), hint);
    }
}

/// YAML allows no tab in an indentation, and its readers name many other things as the cause.
pub(super) fn report_tab(text: &str, error_at: Place, report: &mut Report) -> bool {
    let tab = (1..).zip(text.lines()).take(error_at.line as usize).find_map(|(line, content)| {
        let indent = content.len() - content.trim_start_matches([' ', '\t']).len();
        content[..indent].find('\t').map(|column| Place::new(line, column + 1))
    });
    let Some(at) = tab else { return false };
    report.error(at, "", "a tab indents this line", "indent with spaces");
    true
}

/// Characters that one YAML reader refuses or takes for a line break, and another does not.
fn refuse_control(text: &str, report: &mut Report) -> Option<()> {
    let odd = |c: char| {
        (c.is_control() && !matches!(c, '\t' | '\n' | '\r'))
            || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}')
    };
    let Some(found) = text.find(odd) else {
        return Some(());
    };
    let code = text[found..].chars().next().map_or(0, u32::from);
    let message = format!("the character U+{code:04X} is not allowed");
    report.error(Place::after(&text[..found]), "", message, "remove it");
    None
}

/// What YAML calls null, unless it is quoted.
pub(super) fn is_null(text: &str) -> bool {
    matches!(text, "" | "~" | "null" | "Null" | "NULL")
}

fn at_end(text: &str, error: &ScanError) -> bool {
    // The marker counts characters, and a text has at most as many of them as bytes.
    text.chars().skip(error.marker().index()).all(char::is_whitespace)
}
