//! Runs programs and code in network namespaces, each bounded in time; it knows nothing of labs.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Where `ip netns` keeps its namespaces.
pub(super) const NETNS: &str = "/run/netns";

/// How long a program may take whose end is waited for.
const RUN_TIMEOUT: Duration = Duration::from_secs(60);

/// The caller's PATH and the directories of system programs, which a user's PATH may lack.
fn search_path() -> OsString {
    let mut path = env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin");
    path
}

/// Where a program is found, if anywhere. One with a path of its own is taken from there.
pub(super) fn find(program: impl AsRef<Path>) -> Option<PathBuf> {
    env::split_paths(&search_path()).map(|dir| dir.join(&program)).find(|path| path.is_file())
}

/// A command with the PATH that [`find`] searches, in a process group of its own, with no input.
pub(super) fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("PATH", search_path()).process_group(0).stdin(Stdio::null());
    command
}

/// How many words [`command_in`] has before the program.
const ENTER_WORDS: usize = 3;

/// A command in a namespace. `ip netns exec` would give it a mount view of its own, in which a bpffs is lost; nsenter
/// enters the network only, and its process becomes the program's.
pub(super) fn command_in(namespace: &str) -> Command {
    let mut command = command("nsenter");
    command.arg(format!("--net={NETNS}/{namespace}")).arg("--");
    command
}

/// Starts a command; a missing program is named in the error.
pub(super) fn start(command: &mut Command) -> Result<Child> {
    let program = words(command).next().unwrap_or_default();
    // nsenter would start and only its log would tell.
    ensure!(
        find(program).is_some(),
        "{}: not found; scripts/setup installs what labs need",
        program.display()
    );
    command.spawn().with_context(|| describe(command))
}

/// Runs a command to its end, with `input` as its standard input, and kills it when it takes too long.
pub(super) fn output(command: &mut Command, input: Option<&str>) -> Result<Output> {
    if input.is_some() {
        command.stdin(Stdio::piped());
    }
    let mut child = start(command.stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    let group = Pid::from_child(&child);
    if let (Some(mut pipe), Some(text)) = (child.stdin.take(), input) {
        // A program that ends without reading all of it tells why on stderr.
        pipe.write_all(text.as_bytes()).ok();
    }
    let (sender, receiver) = mpsc::channel();
    let waiter = thread::spawn(move || sender.send(child.wait_with_output()));
    match receiver.recv_timeout(RUN_TIMEOUT) {
        Ok(output) => output.with_context(|| describe(command)),
        Err(_) => {
            kill_process_group(group, Signal::KILL).ok();
            waiter.join().ok();
            bail!("{}: killed, it took longer than {RUN_TIMEOUT:?}", describe(command))
        }
    }
}

/// Runs a command to its end and returns what it printed; a failure has its exit status and stderr.
pub(super) fn run(command: &mut Command, input: Option<&str>) -> Result<String> {
    let output = output(command, input)?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{}: {}: {}", describe(command), output.status, stderr.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs `ip` commands in one process, in a namespace or in the caller's; the first that fails is the error.
pub(super) fn ip_batch(namespace: Option<&str>, lines: &[String]) -> Result<()> {
    let mut ip = command("ip");
    if let Some(namespace) = namespace {
        ip.args(["-n", namespace]);
    }
    let script = lines.join("\n") + "\n";
    run(ip.args(["-batch", "-"]), Some(&script)).with_context(|| format!("ip commands:\n{script}"))?;
    Ok(())
}

/// Calls `work` on a thread that is in the namespace.
pub(super) fn inside<T: Send>(namespace: &str, work: impl FnOnce() -> T + Send) -> Result<T> {
    let path = Path::new(NETNS).join(namespace);
    let file = File::open(&path).with_context(|| path.display().to_string())?;
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                .with_context(|| format!("entering namespace {namespace}"))?;
            Ok(work())
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Writes a sysctl, named by its path (`net/ipv4/ip_forward`), of the calling thread's namespace.
pub(super) fn write_sysctl(key: &str, value: &str) -> Result<()> {
    let path = Path::new("/proc/sys").join(key);
    fs::write(&path, value).with_context(|| format!("writing {value} to {}", path.display()))
}

/// The command as a person would type it, without the part that enters the namespace.
fn describe(command: &Command) -> String {
    words(command).map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// The program and its arguments, without the part of [`command_in`].
pub(super) fn words(command: &Command) -> impl Iterator<Item = &OsStr> {
    let entering = if command.get_program() == "nsenter" { ENTER_WORDS } else { 0 };
    std::iter::once(command.get_program()).chain(command.get_args()).skip(entering)
}
