//! What goes to standard error: logs and a command's last error, for people, for the journal or as JSON.

use std::fmt;
use std::io::IsTerminal;
use std::sync::OnceLock;

use clap::ValueEnum;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{self, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people; for the journal where that is what reads it
    Text,
    /// An object on each line, fields as keys
    Json,
}

/// Who reads standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reader {
    Person,
    Journal,
    Program,
}

/// Set once, at the start.
static READER: OnceLock<Reader> = OnceLock::new();

/// Sends logs to standard error; `RUST_LOG` filters them, `info` by default.
pub fn to_stderr(format: LogFormat) {
    let reader = match format {
        LogFormat::Json => Reader::Program,
        LogFormat::Text if is_journal() => Reader::Journal,
        LogFormat::Text => Reader::Person,
    };
    _ = READER.set(reader);
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let logs =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    match reader {
        Reader::Person => logs.with_ansi(std::io::stderr().is_terminal()).init(),
        Reader::Journal => logs.with_ansi(false).event_format(Journal).init(),
        Reader::Program => {
            logs.json().flatten_event(true).with_current_span(false).with_span_list(false).init();
        }
    }
}

/// The last error of a command.
pub fn fail(text: &str) {
    match READER.get() {
        Some(Reader::Program) => tracing::error!("{text}"),
        Some(Reader::Journal) => {
            text.lines().for_each(|line| eprintln!("<{}>{line}", priority(Level::ERROR)));
        }
        Some(Reader::Person) | None => eprintln!("{text}"),
    }
}

/// Whether standard error is the stream that systemd made for the journal (systemd.exec(5)), and not a file or a
/// pipe that came after it.
fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let Ok(stat) = rustix::fs::fstat(std::io::stderr()) else { return false };
    stream == format!("{}:{}", stat.st_dev, stat.st_ino)
}

/// Lines as the journal takes them (sd-daemon(3)): each with its priority, without the time that the journal notes.
struct Journal;

impl<S, N> FormatEvent<S, N> for Journal
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let plain =
            format::Format::default().without_time().with_level(false).with_target(false).with_ansi(false);
        let mut text = String::new();
        plain.format_event(context, Writer::new(&mut text), event)?;
        let priority = priority(*event.metadata().level());
        // Each line is an entry of its own.
        text.lines().try_for_each(|line| writeln!(writer, "<{priority}>{line}"))
    }
}

/// As syslog(3) counts them.
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn each_line_for_the_journal_has_its_priority_and_no_time_or_colour() {
        let sink = Sink::default();
        let writer = sink.clone();
        let logs = tracing_subscriber::fmt()
            .with_ansi(false)
            .event_format(Journal)
            .with_max_level(Level::TRACE)
            .with_writer(move || writer.clone());
        tracing::subscriber::with_default(logs.finish(), || {
            tracing::error!("one\ntwo");
            tracing::warn!(backend = "web1", fails = 3, "backend down");
            tracing::info!("running");
            tracing::debug!("seen");
        });
        let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text, "<3>one\n<3>two\n<4>backend down backend=\"web1\" fails=3\n<6>running\n<7>seen\n");
    }
}
