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
    assert!(ended.status.success(), "{}", ended.status);
}
