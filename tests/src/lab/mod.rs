//! Network laboratories: hosts in namespaces on bridges, with real servers and clients; it knows nothing of xlb but its pass program.
//!
//! A lab has one namespace `switch` with a bridge for every [`Switch`], and a namespace for every [`Host`]. What xlb
//! needs of veth is set up here: no checksum offload on hosts (XDP cannot see CHECKSUM_PARTIAL and XDP_TX loses it), a
//! pass program on every bridge port (frames that XDP sends reach a veth peer only if that has a program), links of
//! [`MTU`] bytes so that tunnels fit, and addresses that are usable at once.
//!
//! Whatever a lab made goes when it is dropped, panic or not. If its process is killed, the next [`Lab::new`] on the
//! machine removes it.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use tests::lab::{self, Lab};
//! let lab = Lab::new("example")?;
//! let client = lab.host("client", &["10.1.0.2/16", "fd00:1::2/64"])?;
//! let server = lab.host("web1", &["10.1.0.11/16", "fd00:1::11/64"])?;
//! lab::nginx(&server, "web1", lab::Nginx::default())?;
//! assert_eq!(lab::http_get(&client, "http://10.1.0.11/")?, (200, "web1\n".into()));
//! # Ok(())
//! # }
//! ```

mod capture;
mod command;
mod datagrams;
mod download;
mod echo;
mod flood;
mod host;
mod http;
mod incidents;
mod late;
mod live;
mod path;
mod process;
mod quic;
mod raw;
mod remains;
mod rush;
mod servers;
mod stalls;
mod visits;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use aya::programs::Xdp;
use rustix::mount::MountFlags;
pub use rustix::process::Signal;

pub use self::capture::Capture;
pub use self::datagrams::{DatagramFlows, DatagramServer, Flow};
pub use self::download::{Download, SlowServer};
pub use self::echo::{Connection, Connections, EchoServer};
pub use self::flood::SynFlood;
pub use self::host::{Host, Interface};
pub use self::http::{
    HttpLoad, Request, Response, RunningLoad, backends, failures, http_get, http_get_within, http_load,
};
pub use self::incidents::{Death, Incident, Kind, LONG_STALL, Tally};
pub use self::late::LateServer;
pub use self::live::{LiveConnections, LiveLoad, NamingServer, STALL};
pub use self::path::{learnt_mtu, traceroute};
pub use self::process::Process;
pub use self::quic::{QuicClients, QuicConnection, quic_server};
pub use self::raw::{IcmpSocket, Options, http_get_with_options, send_without_checksum};
pub use self::remains::{kept, remove_kept, sweep};
pub use self::rush::Rush;
pub use self::servers::{
    Nginx, NginxServer, Transport, backend_dsr, dns, dns_long, dns_who, iperf3_server, iperf3_server_at,
    nginx,
};
pub use self::visits::{VISIT_PATIENCE, Visit, Visits};

/// The MTU of every link, in bytes: a packet of 1500 with an outer IPv6 and UDP header fits.
pub const MTU: u16 = 1600;

/// Tests that need root are skipped, not failed, where this is set and something is missing.
pub const SKIP_ROOT: &str = "XLB_SKIP_ROOT";

/// Labs of this process that have not been removed, for [`clean_up_on_signals`].
static LIVE: Mutex<Vec<Weak<Shared>>> = Mutex::new(Vec::new());

/// A network of hosts; dropping it removes everything in it.
pub struct Lab {
    shared: Arc<Shared>,
    lan: Switch,
}

/// A bridge that hosts are connected to.
#[derive(Clone, Debug)]
pub struct Switch {
    name: String,
}

/// What the lab, its hosts and the signal handler know in common.
struct Shared {
    /// `<pid>-<counter>`: unique among live labs of the machine.
    id: String,
    name: String,
    dir: PathBuf,
    pass_pin: PathBuf,
    /// Held as long as the lab lives: a run directory whose lock is free has lost its owner.
    _lock: File,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    closed: bool,
    keep: bool,
    hosts: u8,
    files: u32,
    processes: Vec<Process>,
}

impl Lab {
    /// Makes a lab with one switch, `lan`, after removing what dead labs left behind.
    pub fn new(name: &str) -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(1);

        let id = format!("{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let (dir, lock) = remains::claim(&id).with_context(|| format!("lab {name}"))?;
        let shared = Arc::new(Shared {
            id,
            name: name.to_owned(),
            pass_pin: dir.join("bpf/pass"),
            dir,
            _lock: lock,
            state: Mutex::default(),
        });
        let mut live = lock_ignoring_poison(&LIVE);
        live.retain(|lab| lab.strong_count() > 0);
        live.push(Arc::downgrade(&shared));
        drop(live);
        // From here on, Drop removes what was made, however far this came.
        let lab = Self { shared, lan: Switch { name: "lan".to_owned() } };
        lab.begin().with_context(|| format!("lab {name}"))?;
        Ok(lab)
    }

    fn begin(&self) -> Result<()> {
        let bpf = self.bpf_dir();
        fs::create_dir(&bpf).with_context(|| bpf.display().to_string())?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        rustix::mount::mount("bpf", &bpf, "bpf", flags, Some(c"mode=0700"))
            .with_context(|| format!("mounting a bpffs at {}", bpf.display()))?;
        self.pin_pass().context("the pass program")?;
        command::ip_batch(None, &[format!("netns add {}", self.shared.namespace(SWITCH))])?;
        // The switch forwards frames; it has no address and sends nothing of its own.
        command::inside(&self.shared.namespace(SWITCH), || {
            command::write_sysctl("net/ipv6/conf/default/disable_ipv6", "1")
        })??;
        self.make_bridge(&self.lan)
    }

    /// Loaded by `ip`, it would be pinned in the first bpffs of the host, which may be that of a lab that ends.
    fn pin_pass(&self) -> Result<()> {
        let mut ebpf = aya::Ebpf::load(lb_userspace::bpf::PASS)?;
        let program: &mut Xdp = ebpf.program_mut("pass").context("not in its object")?.try_into()?;
        program.load()?;
        Ok(program.pin(&self.shared.pass_pin)?)
    }

    fn make_bridge(&self, switch: &Switch) -> Result<()> {
        let Switch { name } = switch;
        command::ip_batch(
            Some(&self.shared.namespace(SWITCH)),
            &[
                format!("link add {name} mtu {MTU} type bridge stp_state 0 mcast_snooping 0"),
                format!("link set {name} up"),
            ],
        )
    }

    /// The switch that every lab has.
    pub fn lan(&self) -> &Switch {
        &self.lan
    }

    /// Adds another switch, so that hosts can have interfaces on several.
    pub fn switch(&self, name: &str) -> Result<Switch> {
        check_name(name)?;
        let switch = Switch { name: name.to_owned() };
        self.make_bridge(&switch)?;
        Ok(switch)
    }

    /// Adds a host whose `eth0` is on the switch `lan` with these addresses (`10.1.0.2/16`, `fd00:1::2/64`).
    ///
    /// The MTU is [`MTU`]; clients of a tunnelled service want `set_mtu("eth0", 1500)`, or their full-sized packets leave
    /// the tunnel no room.
    pub fn host(&self, name: &str, addresses: &[&str]) -> Result<Host> {
        self.host_on(name, &[(&self.lan, addresses)])
    }

    /// Adds a host with an interface (`eth0`, `eth1`, ...) for each switch and its addresses.
    pub fn host_on(&self, name: &str, interfaces: &[(&Switch, &[&str])]) -> Result<Host> {
        check_name(name)?;
        ensure!(name != SWITCH, "host {name}: the lab's own namespace has this name");
        let host = Host::new(Arc::clone(&self.shared), name).with_context(|| format!("host {name}"))?;
        for (switch, addresses) in interfaces {
            host.add_interface(switch, addresses)?;
        }
        Ok(host)
    }

    /// The lab's directory, for files of any kind; it goes with the lab.
    pub fn dir(&self) -> &Path {
        &self.shared.dir
    }

    /// A bpffs of the lab's own, for pins; it goes with the lab, pins and all.
    pub fn bpf_dir(&self) -> PathBuf {
        self.shared.dir.join("bpf")
    }

    /// Leaves everything in place when the lab is dropped and its process ends; [`remove_kept`] removes it.
    pub fn keep(&self) -> Result<()> {
        self.shared.state().keep = true;
        let marker = self.shared.dir.join(remains::KEEP);
        fs::write(&marker, "").with_context(|| marker.display().to_string())
    }

    /// Removes the lab and reports what could not be removed. Dropping does the same, with errors on stderr.
    pub fn close(self) -> Result<()> {
        self.shared.close()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if thread::panicking() {
            self.shared.print_logs();
        }
        if let Err(error) = self.shared.close() {
            // Not `eprintln!`, which panics where nobody reads: on the way out that would end the process, and the lab would stay.
            _ = writeln!(io::stderr(), "lab {}: {error:#}", self.shared.name);
        }
    }
}

/// The namespace of the bridges; no host can have this name.
const SWITCH: &str = "switch";

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        lock_ignoring_poison(&self.state)
    }

    fn namespace(&self, host: &str) -> String {
        format!("{}{host}", remains::namespace_prefix(&self.id))
    }

    /// A path for a new file in the lab's directory: `<host>-<counter>-<name>`.
    fn new_file(&self, host: &str, name: &str) -> PathBuf {
        let mut state = self.state();
        state.files += 1;
        self.dir.join(format!("{host}-{}-{name}", state.files))
    }

    fn close(&self) -> Result<()> {
        let mut state = self.state();
        if state.closed || state.keep {
            return Ok(());
        }
        state.closed = true;
        for process in state.processes.drain(..) {
            process.kill();
        }
        remains::remove(&self.id)
    }

    /// Shows the end of every process's log: a test that panicked is explained there more often than not.
    fn print_logs(&self) {
        const LINES: usize = 20;

        for process in &self.state().processes {
            let log = process.log();
            let lines: Vec<&str> = log.lines().collect();
            if !lines.is_empty() {
                _ = writeln!(io::stderr(), "--- {process}, last lines of its log:");
            }
            for line in &lines[lines.len().saturating_sub(LINES)..] {
                _ = writeln!(io::stderr(), "    {line}");
            }
        }
    }
}

/// Whether a lab can run here: an error says what is missing; where [`SKIP_ROOT`] is set it is `false` instead, after a
/// line on stderr.
pub fn available() -> Result<bool> {
    match check_requirements() {
        Ok(()) => Ok(true),
        Err(error) if std::env::var_os(SKIP_ROOT).is_some() => {
            eprintln!("skipped ({SKIP_ROOT} is set): {error:#}");
            Ok(false)
        }
        Err(error) => Err(error.context(format!("labs cannot run here; {SKIP_ROOT}=1 skips their tests"))),
    }
}

/// Whether a program can be started here.
pub fn has_program(name: &str) -> bool {
    command::find(name).is_some()
}

fn check_requirements() -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "not root");
    let missing: Vec<&str> =
        ["ip", "nsenter", "ethtool", "curl"].into_iter().filter(|name| !has_program(name)).collect();
    ensure!(missing.is_empty(), "missing programs: {} (scripts/setup installs them)", missing.join(", "));
    Ok(())
}

/// Removes the labs of this process on SIGINT and SIGTERM and then exits with 128 + the signal's number. For programs
/// such as the demo: call it once, before the first lab. Kept labs stay.
pub fn clean_up_on_signals() -> Result<()> {
    use signal_hook::consts::{SIGINT, SIGTERM};

    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM]).context("catching signals")?;
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            let labs: Vec<_> = lock_ignoring_poison(&LIVE).iter().filter_map(Weak::upgrade).collect();
            for lab in labs {
                if let Err(error) = lab.close() {
                    eprintln!("lab {}: {error:#}", lab.name);
                }
            }
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

/// Waits until `condition` holds; `what` names it in the error.
pub fn wait_for(what: &str, timeout: Duration, mut condition: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + timeout;
    while !condition() {
        if Instant::now() >= deadline {
            bail!("{what}: not within {timeout:?}");
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Names become parts of interface and namespace names, which are short and are told apart at dashes.
fn check_name(name: &str) -> Result<()> {
    let fits = (1..=11).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    ensure!(fits, "name {name:?}: use 1 to 11 lower-case letters and digits");
    Ok(())
}

/// A panicking test must still clean up.
fn lock_ignoring_poison<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
