//! Two network namespaces joined by a veth pair, `near` (where the test runs) and `far` (which answers).

use std::fs::File;
use std::os::fd::AsFd;
use std::panic::resume_unwind;
use std::process::{Command, id};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::geteuid;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

pub const NEAR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const FAR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

const SKIP: &str = "XLB_SKIP_ROOT";

/// Runs a test inside of `near`, on a thread of its own: a netlink socket belongs to the namespace of the thread that
/// opens it, and threads of the test harness are used again.
pub fn in_lab<F>(test: F)
where
    F: AsyncFnOnce(&Lab) + Send + 'static,
{
    if !geteuid().is_root() {
        if std::env::var_os(SKIP).is_some() {
            println!("skipped: needs root for network namespaces, and {SKIP} is set");
            return;
        }
        panic!("needs root for network namespaces; run as root, or set {SKIP}=1 to skip");
    }
    let run = move || {
        let lab = Lab::new();
        let path = format!("/run/netns/{}", lab.near.0);
        let namespace = File::open(&path).expect(&path);
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test(&lab));
    };
    if let Err(panic) = thread::spawn(run).join() {
        resume_unwind(panic);
    }
}

/// Deleted with what is in it, also when a test panics.
struct Namespace(String);

impl Namespace {
    fn new(side: &str) -> Namespace {
        // The first `ip netns add` of a machine mounts /run/netns, which two at once spoil.
        static ADDING: Mutex<()> = Mutex::new(());
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("xlb-nh-{side}-{}-{number}", id());
        let _one_at_a_time = ADDING.lock().unwrap_or_else(|e| e.into_inner());
        run(&["ip", "netns", "add", &name]);
        let namespace = Namespace(name);
        // Neighbour solicitation needs a link-local address that has passed duplicate detection.
        for scope in ["all", "default"] {
            let write = format!("echo 0 > /proc/sys/net/ipv6/conf/{scope}/accept_dad");
            run(&["ip", "netns", "exec", &namespace.0, "sh", "-c", &write]);
        }
        namespace
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // No panic here: it would hide the test's own.
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

pub struct Lab {
    near: Namespace,
    far: Namespace,
}

impl Lab {
    fn new() -> Lab {
        let lab = Lab { near: Namespace::new("near"), far: Namespace::new("far") };
        let far = lab.far.0.clone();
        lab.near_ip(&format!(
            "link add near0 address 02:00:00:00:00:01 type veth \
             peer name far0 address 02:00:00:00:00:02 netns {far}"
        ));
        let sides = [(&lab.near, "near0", 1), (&lab.far, "far0", 2)];
        for (namespace, interface, host) in sides {
            for args in [
                "link set lo up".to_owned(),
                format!("address add 10.77.0.{host}/24 dev {interface}"),
                format!("address add fd77::{host}/64 dev {interface} nodad"),
                format!("link set {interface} up"),
            ] {
                ip(namespace, &args);
            }
        }
        for (namespace, interface, _) in sides {
            await_link_local(namespace, interface);
        }
        lab
    }

    /// `ip ARGS` in the test's own namespace.
    pub fn near_ip(&self, args: &str) {
        ip(&self.near, args);
    }

    /// `ip ARGS` in the answering namespace.
    pub fn far_ip(&self, args: &str) {
        ip(&self.far, args);
    }

    /// Gives the answering namespace another MAC address, which it announces as hosts do.
    pub fn far_moves_to(&self, mac: &str) {
        let file = "/proc/sys/net/ipv4/conf/far0/arp_notify";
        self.in_far(&["sh", "-c", &format!("echo 1 > {file}")]);
        self.far_ip(&format!("link set far0 address {mac}"));
    }

    /// With GRO, or an XDP program, a veth takes what is redirected to its peer.
    pub fn far_gro(&self, on: bool) {
        self.in_far(&["ethtool", "-K", "far0", "gro", if on { "on" } else { "off" }]);
    }

    fn in_far(&self, line: &[&str]) {
        let namespace = format!("--net=/run/netns/{}", self.far.0);
        run(&[&["nsenter", &namespace], line].concat());
    }

    /// The answering namespace's name.
    pub fn far(&self) -> &str {
        &self.far.0
    }

    /// What `ip ARGS` prints in the test's own namespace.
    pub fn near_shows(&self, args: &str) -> String {
        ip(&self.near, args)
    }

    /// Writes below /proc/sys/net of the test's own namespace.
    pub fn near_sysctl(&self, name: &str, value: &str) {
        // The thread is in that namespace, and /proc/sys/net follows the reader's.
        let path = format!("/proc/sys/net/{name}");
        std::fs::write(&path, value).expect(&path);
    }
}

/// The kernel looks at carriers at most once a second, and adds the address when it has seen one.
fn await_link_local(namespace: &Namespace, interface: &str) {
    let end = Instant::now() + Duration::from_secs(10);
    let query = format!("-6 address show dev {interface} up scope link -tentative");
    while ip(namespace, &query).is_empty() {
        assert!(Instant::now() < end, "{interface} has no link-local address");
        thread::sleep(Duration::from_millis(20));
    }
}

fn ip(namespace: &Namespace, args: &str) -> String {
    let mut line = vec!["ip", "-n", &namespace.0];
    line.extend(args.split_whitespace());
    run(&line)
}

fn run(line: &[&str]) -> String {
    let output =
        Command::new(line[0]).args(&line[1..]).output().unwrap_or_else(|e| panic!("{}: {e}", line[0]));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {errors}", line.join(" "));
    String::from_utf8(output.stdout).unwrap()
}
