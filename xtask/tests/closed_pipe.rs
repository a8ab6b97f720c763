//! Commands whose reader goes away.

use std::io;
use std::process::Command;

#[test]
fn a_command_whose_output_nobody_reads_ends_quietly() {
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    let ended = command.args(["bench", "capacity", "--ns", "60"]).stdout(writer).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&ended.stderr), "");
    assert_eq!(ended.status.code(), Some(141), "as a shell says of SIGPIPE");
}

#[test]
fn a_command_that_fails_says_so_by_its_exit_code_even_if_nobody_reads_why() {
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    let ended = command.args(["bench", "packet", "--only", "no such line"]).stderr(writer).output().unwrap();
    assert!(!ended.status.success(), "{}", ended.status);
}
