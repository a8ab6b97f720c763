//! Lines on standard output and standard error, whose reader may have seen enough (`| head`). Knows nothing of what is said.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// `println!` that ends the command quietly when nobody reads.
macro_rules! say {
    ($($text:tt)*) => { $crate::say::line(&mut std::io::stdout(), format_args!($($text)*)) };
}

/// The same for `eprintln!`.
macro_rules! note {
    ($($text:tt)*) => { $crate::say::line(&mut std::io::stderr(), format_args!($($text)*)) };
}

/// What is thrown then. Labs have to be removed on the way out, which leaving at once would not do.
struct Unread;

pub fn line(out: &mut impl Write, text: Arguments<'_>) {
    let written = out.write_fmt(format_args!("{text}\n")).and_then(|()| out.flush());
    let unread = written.is_err_and(|error| error.kind() == ErrorKind::BrokenPipe);
    // What is on its way out goes on, and other errors cannot be told anywhere.
    if unread && !std::thread::panicking() {
        resume_unwind(Box::new(Unread));
    }
}

/// What a command comes to; nothing where it ended because nobody reads.
pub fn while_read<T>(command: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(command)) {
        Ok(result) => Some(result),
        Err(thrown) if thrown.is::<Unread>() => None,
        Err(thrown) => resume_unwind(thrown),
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::rc::Rc;

    use super::*;

    #[test]
    fn a_command_that_nobody_reads_ends_at_once_and_drops_what_it_holds() {
        let (reader, mut writer) = io::pipe().unwrap();
        drop(reader);
        let held = Rc::new(());
        let holds = Rc::clone(&held);
        let ended = while_read(|| {
            let _holds = holds;
            line(&mut writer, format_args!("a table"));
            panic!("it goes on");
        });
        assert!(ended.is_none_or(|()| false));
        assert_eq!(Rc::strong_count(&held), 1);
        assert_eq!(while_read(|| 7), Some(7));
    }
}
