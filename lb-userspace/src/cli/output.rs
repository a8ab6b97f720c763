//! How things look on a terminal.

pub use crate::capacity::bytes;
use std::io::{self, BufWriter, StdoutLock, Write, stdout};
use std::time::{Duration, Instant};

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

/// Prints a line to standard output. A reader that has seen enough (`| head`) is no error.
pub fn say(text: std::fmt::Arguments<'_>) {
    print(format_args!("{text}\n"));
}

fn print(text: std::fmt::Arguments<'_>) {
    let mut out = stdout();
    done(out.write_fmt(text).and_then(|()| out.flush()));
}

fn done(written: io::Result<()>) {
    if let Err(error) = written {
        let enough = error.kind() == io::ErrorKind::BrokenPipe;
        std::process::exit(if enough { 0 } else { super::exit::FAILURE.into() });
    }
}

/// Standard output for many lines.
pub struct Lines(BufWriter<StdoutLock<'static>>);

impl Lines {
    pub fn new() -> Self {
        Self(BufWriter::with_capacity(1 << 16, stdout().lock()))
    }

    /// Bytes without the end of a line.
    pub fn say(&mut self, line: &[u8]) {
        done(self.0.write_all(line).and_then(|()| self.0.write_all(b"\n")));
    }

    pub fn end(mut self) {
        done(self.0.flush());
    }
}

/// `1 pool`, `2 pools`.
pub fn count(number: usize, one: &str) -> String {
    if number == 1 { format!("1 {one}") } else { format!("{number} {one}s") }
}

/// A plain table: no frame, so that it pastes well; numbers to the right.
pub fn table(header: &[&str], numbers: &[usize], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header);
    for row in rows {
        table.add_row(row);
    }
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if numbers.contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

/// A table, or a line that says why there is none.
pub fn table_or(header: &[&str], numbers: &[usize], rows: Vec<Vec<String>>, empty: &str) -> String {
    if rows.is_empty() { empty.to_owned() } else { table(header, numbers, rows) }
}

/// Columns of a terminal that does not say how many it has, and of what is no terminal.
const COLUMNS: usize = 120;

/// The least that is left of a column that is cut.
const LEAST: usize = 20;

/// Columns and lines of the terminal, if standard output is one.
fn terminal() -> Option<(usize, usize)> {
    let size = rustix::termios::tcgetwinsize(stdout()).ok()?;
    Some((usize::from(size.ws_col), usize::from(size.ws_row))).filter(|(columns, _)| *columns > 0)
}

/// Cuts the last column so that the table is no wider than the terminal. Rows that were cut, with the whole text.
pub fn cut_last(header: &[&str], rows: &mut [Vec<String>]) -> Vec<(usize, String)> {
    let last = header.len() - 1;
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        2 + cells.chain([header[column].len()]).max().unwrap_or(0)
    };
    let columns = terminal().map_or(COLUMNS, |(columns, _)| columns);
    let room = columns.saturating_sub((0..last).map(width).sum()).max(LEAST);
    let mut whole = Vec::new();
    for (index, row) in rows.iter_mut().enumerate() {
        if let Some(cut) = cut(&row[last], room) {
            whole.push((index, std::mem::replace(&mut row[last], cut)));
        }
    }
    whole
}

/// The text with an ellipsis, if it is too long.
fn cut(text: &str, room: usize) -> Option<String> {
    (text.chars().count() > room)
        .then(|| text.chars().take(room.saturating_sub(3)).collect::<String>().trim_end().to_owned() + "...")
}

/// The text in lines that fit the terminal, all but the first indented.
pub fn wrapped(text: &str) -> String {
    let columns = terminal().map_or(COLUMNS, |(columns, _)| columns).max(2 * LEAST);
    let (mut lines, mut width) = (String::new(), 0);
    for word in text.split_whitespace() {
        let length = word.chars().count();
        if width > 0 && width + 1 + length > columns {
            lines.push_str("\n  ");
            width = 2;
        } else if width > 0 {
            lines.push(' ');
            width += 1;
        }
        lines.push_str(word);
        width += length;
    }
    lines
}

/// Shows one line after another: in place on a terminal, now and then elsewhere.
#[derive(Debug)]
pub struct Line {
    every: Duration,
    last: Option<Instant>,
}

impl Line {
    /// `every`: how often where they are not shown in place.
    pub fn new(every: Duration) -> Self {
        Self { every, last: None }
    }

    pub fn show(&mut self, text: &str) {
        if let Some((columns, _)) = terminal() {
            let text = cut(text, columns).unwrap_or_else(|| text.to_owned());
            print(format_args!("\r{text}\x1b[K"));
        } else if self.last.is_none_or(|last| last.elapsed() >= self.every) {
            say(format_args!("{text}"));
        } else {
            return;
        }
        self.last = Some(Instant::now());
    }

    /// What comes after it begins a line.
    pub fn end(&self) {
        if self.last.is_some() && terminal().is_some() {
            say(format_args!(""));
        }
    }
}

/// Shows one text after another: in place on a terminal, below each other elsewhere.
#[derive(Debug, Default)]
pub struct Screen {
    shown: bool,
}

impl Screen {
    pub fn show(&mut self, text: &str) {
        let Some((columns, lines)) = terminal() else {
            let gap = if self.shown { "\n" } else { "" };
            self.shown = true;
            return say(format_args!("{gap}{text}"));
        };
        // Home, each line to its end, then all below; what does not fit would scroll.
        let fits = lines.saturating_sub(2);
        let mut screen = String::from(if self.shown { "\x1b[H" } else { "\x1b[2J\x1b[H" });
        for line in text.lines().take(fits) {
            let line = cut(line, columns).unwrap_or_else(|| line.to_owned());
            screen.push_str(&format!("{line}\x1b[K\n"));
        }
        if let Some(more @ 1..) = text.lines().count().checked_sub(fits) {
            screen.push_str(&format!("{more} more lines do not fit\x1b[K"));
        }
        self.shown = true;
        say(format_args!("{screen}\x1b[J"));
    }

    /// Something that interrupts what is shown.
    pub fn note(&mut self, text: &str) {
        if terminal().is_some() {
            self.show(text);
        } else {
            eprintln!("{text}");
        }
    }
}

/// A duration to its two leading units.
pub fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, ..) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

/// An interval on the command line: `2`, `2s`, `500ms`.
pub fn interval(text: &str) -> Result<Duration, String> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let interval = digits.parse().ok().and_then(|count| match unit {
        "" | "s" => Some(Duration::from_secs(count)),
        "ms" => Some(Duration::from_millis(count)),
        _ => None,
    });
    let allowed = Duration::from_millis(100)..=Duration::from_secs(3600);
    interval
        .filter(|interval| allowed.contains(interval))
        .ok_or_else(|| "use 100ms to 3600s, such as 2s or 500ms".to_owned())
}

/// As [`interval`] takes it.
pub fn short(interval: Duration) -> String {
    match interval.subsec_millis() {
        0 => format!("{} s", interval.as_secs()),
        _ => format!("{} ms", interval.as_millis()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_have_a_unit_or_are_seconds() {
        assert_eq!(interval("2"), Ok(Duration::from_secs(2)));
        assert_eq!(interval("500ms"), Ok(Duration::from_millis(500)));
        for wrong in ["", "s", "0", "99ms", "3601", "1m", "-1", "1.5"] {
            assert!(interval(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_last_column_that_is_too_long_is_cut_and_told_whole() {
        let mut rows = vec![vec!["a".repeat(100), "b".repeat(30)], vec!["a".to_owned(), "short".to_owned()]];
        assert_eq!(cut_last(&["ONE", "TWO"], &mut rows), [(0, "b".repeat(30))]);
        assert_eq!(rows[0][1], "b".repeat(17) + "...");
        assert_eq!(rows[1][1], "short");
    }

    #[test]
    fn a_long_text_is_wrapped_and_keeps_its_words() {
        let text = "word ".repeat(60);
        let wrapped = wrapped(text.trim());
        assert!(
            wrapped.lines().count() > 1 && wrapped.lines().skip(1).all(|line| line.starts_with("  word"))
        );
        assert!(wrapped.lines().all(|line| line.len() <= COLUMNS), "{wrapped}");
        assert_eq!(wrapped.split_whitespace().count(), 60);
        assert_eq!(super::wrapped("short"), "short");
    }

    #[test]
    fn sizes_and_times_are_short() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(16_800_000), "16.0 MiB");
        assert_eq!(duration(59), "59 s");
        assert_eq!(duration(61), "1 min 1 s");
        assert_eq!(duration(90_000), "1 d 1 h");
    }
}
