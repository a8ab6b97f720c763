//! The packet path's log records, with outcomes by name: the kernel tells numbers only. Knows no agent.

use aya_log::EbpfLogger;
use lb_common::outcome::Outcome;
use log::{Log, Metadata, Record};

use super::program::DatapathError;

/// Decisions of the packet path as log records (`trace: true`).
pub type Trace = EbpfLogger<Named<&'static dyn Log>>;

/// A reader of the log records of a program, by its id: the object gives its ring away once only.
pub(super) fn reader(program: u32) -> Result<Trace, DatapathError> {
    Ok(EbpfLogger::init_from_id_with_logger(program, Named(log::logger()))?)
}

/// Writes an outcome's name for its number, then lets another logger have the record.
#[derive(Debug)]
pub struct Named<L>(L);

impl<L: Log> Log for Named<L> {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.0.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        let text = named(&record.args().to_string());
        let mut same = Record::builder();
        same.metadata(record.metadata().clone()).module_path(record.module_path());
        same.file(record.file()).line(record.line());
        self.0.log(&same.args(format_args!("{text}")).build());
    }

    fn flush(&self) {
        self.0.flush();
    }
}

const KEY: &str = "outcome=";

/// A text without an outcome, or with one that this agent does not know, stays as it is.
fn named(text: &str) -> String {
    let known = || {
        let (before, after) = text.split_once(KEY)?;
        let digits = after.find(|c: char| !c.is_ascii_digit()).unwrap_or(after.len());
        let (number, rest) = after.split_at(digits);
        let outcome = Outcome::ALL.get(number.parse::<usize>().ok()?)?;
        Some(format!("{before}{KEY}{}{rest}", outcome.counter()))
    };
    known().unwrap_or_else(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Sink(Mutex<Vec<String>>);

    impl Log for &Sink {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }

        fn log(&self, record: &Record<'_>) {
            let line = format!("{} {} {}", record.level(), record.target(), record.args());
            self.0.lock().unwrap().push(line);
        }

        fn flush(&self) {}
    }

    #[test]
    fn a_record_has_the_name_of_its_outcome_and_is_otherwise_what_it_was() {
        let sink = Sink::default();
        let args = format_args!("outcome=5 in=2 out=0 backend=7 bytes=74");
        Named(&sink).log(&Record::builder().level(log::Level::Info).target("balancer").args(args).build());
        let expected = "INFO balancer outcome=forward_transmit in=2 out=0 backend=7 bytes=74";
        assert_eq!(*sink.0.lock().unwrap(), [expected]);
    }

    #[test]
    fn every_number_has_its_name_and_what_is_none_stays() {
        for outcome in Outcome::ALL {
            let text = format!("outcome={} in=1", *outcome as u32);
            assert_eq!(named(&text), format!("outcome={} in=1", outcome.counter()));
        }
        let unknown = format!("outcome={} in=1", Outcome::ALL.len());
        for text in [&unknown, "outcome= in=1", "outcome=99999999999999999999", "in=1", "", "outcome=x"] {
            assert_eq!(named(text), text);
        }
        assert_eq!(named("outcome=0"), "outcome=pass_not_ip");
    }
}
