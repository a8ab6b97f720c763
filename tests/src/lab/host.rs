//! One host of a lab: a namespace, its interfaces, and what runs in it.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};

use super::command::{command_in, inside, ip_batch, run, start, words, write_sysctl};
use super::process::Process;
use super::{MTU, SWITCH, Shared, Switch, lock_ignoring_poison};

/// A namespace of a lab. Clones are the same host; it goes with its lab.
#[derive(Clone)]
pub struct Host {
    shared: Arc<Shared>,
    name: String,
    namespace: String,
    number: u8,
    interfaces: Arc<Mutex<Vec<Interface>>>,
}

/// A host's end of a link to a switch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// `eth0`, `eth1`, ... in the order of adding.
    pub name: String,
    /// `02:00:00:00:<host>:<interface>`, counted from 1 and from 0.
    pub mac: [u8; 6],
    /// With prefix length, as they were given.
    pub addresses: Vec<String>,
}

impl Host {
    pub(super) fn new(shared: Arc<Shared>, name: &str) -> Result<Self> {
        let number = {
            let mut state = shared.state();
            ensure!(!state.closed, "the lab is closed");
            state.hosts = state.hosts.checked_add(1).context("a lab has at most 255 hosts")?;
            state.hosts
        };
        let namespace = shared.namespace(name);
        let host = Self { shared, name: name.to_owned(), namespace, number, interfaces: Arc::default() };
        ip_batch(None, &[format!("netns add {}", host.namespace)])?;
        // A new namespace inherits IPv4 settings from the machine's, where forwarding or rp_filter may be on; IPv6
        // addresses are usable at once only without duplicate detection. Forwarding resets others, so it is first.
        host.inside(|| {
            [
                ("net/ipv4/ip_forward", "0"),
                ("net/ipv4/conf/all/rp_filter", "0"),
                ("net/ipv4/conf/default/rp_filter", "0"),
                ("net/ipv6/conf/default/disable_ipv6", "0"),
                ("net/ipv6/conf/default/accept_dad", "0"),
                ("net/ipv6/conf/default/accept_ra", "0"),
                ("net/ipv6/conf/default/router_solicitations", "0"),
            ]
            .iter()
            .try_for_each(|(key, value)| write_sysctl(key, value))
        })??;
        ip_batch(Some(&host.namespace), &["link set lo up".to_owned()])?;
        Ok(host)
    }

    /// Connects the host to a switch with one more interface.
    pub fn add_interface(&self, switch: &Switch, addresses: &[&str]) -> Result<Interface> {
        let mut interfaces = lock_ignoring_poison(&self.interfaces);
        let index = u8::try_from(interfaces.len()).context("a host has at most 256 interfaces")?;
        let interface = Interface {
            name: format!("eth{index}"),
            mac: [2, 0, 0, 0, self.number, index],
            addresses: addresses.iter().map(ToString::to_string).collect(),
        };
        self.connect(switch, &interface, &format!("{}-{index}", self.name))
            .with_context(|| format!("host {}, interface {}", self.name, interface.name))?;
        interfaces.push(interface.clone());
        Ok(interface)
    }

    /// Deletes an interface, as if its card were pulled.
    pub fn delete_interface(&self, name: &str) -> Result<()> {
        self.ip(&format!("link delete {name}")).map(drop)
    }

    /// Makes a deleted interface again, with its name, MAC and addresses and another index; its routes are gone.
    pub fn remake_interface(&self, switch: &Switch, name: &str) -> Result<()> {
        let interfaces = self.interfaces();
        let index = interfaces.iter().position(|interface| interface.name == name);
        let index = index.with_context(|| format!("host {}: no interface {name}", self.name))?;
        self.connect(switch, &interfaces[index], &format!("{}-{index}", self.name))
            .with_context(|| format!("host {}, interface {name}", self.name))
    }

    /// Gives an interface another MAC address, which it announces on its link.
    pub fn change_mac(&self, name: &str, mac: [u8; 6]) -> Result<()> {
        self.sysctl(&format!("net/ipv4/conf/{name}/arp_notify"), "1")?;
        self.sysctl(&format!("net/ipv6/conf/{name}/ndisc_notify"), "1")?;
        self.ip(&format!("link set {name} address {}", mac_text(mac))).map(drop)
    }

    fn connect(&self, switch: &Switch, interface: &Interface, port: &str) -> Result<()> {
        let (name, mac, namespace) = (&interface.name, mac_text(interface.mac), &self.namespace);
        let (bridge, pass) = (&switch.name, self.shared.pass_pin.display());
        ip_batch(
            Some(&self.shared.namespace(SWITCH)),
            &[
                format!(
                    "link add {port} mtu {MTU} type veth peer name {name} netns {namespace} address {mac} mtu {MTU}"
                ),
                format!("link set {port} master {bridge}"),
                format!("link set {port} xdpdrv pinned {pass}"),
                format!("link set {port} up"),
            ],
        )?;
        self.run(["ethtool", "-K", name, "tx", "off"])?;
        let mut lines = vec![format!("link set {name} up")];
        lines.extend(interface.addresses.iter().map(|address| add_address(address, name)));
        ip_batch(Some(namespace), &lines)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The namespace's name, as `ip netns list` shows it.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// What a person types before a command to run it in this host.
    pub fn enter_command(&self) -> String {
        format!("nsenter --net={}/{}", super::command::NETNS, self.namespace)
    }

    /// The interfaces, `eth0` first.
    pub fn interfaces(&self) -> Vec<Interface> {
        lock_ignoring_poison(&self.interfaces).clone()
    }

    /// The MAC address of `eth0`.
    pub fn mac(&self) -> [u8; 6] {
        [2, 0, 0, 0, self.number, 0]
    }

    /// The first address of `eth0` of the family, without prefix length.
    pub fn address(&self, ipv6: bool) -> Result<String> {
        let interfaces = self.interfaces();
        let first = interfaces.first().with_context(|| format!("host {} has no interface", self.name))?;
        let found = first.addresses.iter().find(|address| address.contains(':') == ipv6);
        let found = found.with_context(|| format!("host {} has no such address", self.name))?;
        Ok(found.split('/').next().unwrap_or(found).to_owned())
    }

    /// The lab's directory.
    pub fn dir(&self) -> &Path {
        &self.shared.dir
    }

    /// A path in the lab's directory that nobody else was given, for a file whose name ends in `name`.
    pub fn new_file(&self, name: &str) -> PathBuf {
        self.shared.new_file(&self.name, name)
    }

    /// A command that runs in this host, for the caller to start and to end; the first of `args` is the program. What is
    /// left running in the host dies with the lab.
    pub fn exec<I>(&self, args: I) -> Command
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        let mut command = command_in(&self.namespace);
        command.args(args);
        command
    }

    /// A command at the other end of the host's links: in the switch's namespace, where `eth0` of this host is plugged
    /// into the port `<name>-0`.
    pub fn exec_at_switch<I>(&self, args: I) -> Command
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        let mut command = command_in(&self.shared.namespace(SWITCH));
        command.args(args);
        command
    }

    /// Runs a program to its end (within a minute) and returns its stdout; a failure is an error with its stderr.
    pub fn run<I>(&self, args: I) -> Result<String>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        run(&mut self.exec(args), None).with_context(|| format!("host {}", self.name))
    }

    /// Starts a program in the background, its stdout and stderr in one log; it is killed with the lab.
    pub fn spawn<I>(&self, args: I) -> Result<Process>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        self.spawn_command(&mut self.exec(args))
    }

    /// Like [`Host::spawn`], for a command of [`Host::exec`] that was given an environment, say.
    pub fn spawn_command(&self, command: &mut Command) -> Result<Process> {
        let program = words(command).next().unwrap_or_default();
        let name = Path::new(program).file_name().unwrap_or(program).to_string_lossy().into_owned();
        let log = self.new_file(&format!("{name}.log"));
        let open = |path: &Path| File::options().create(true).append(true).open(path);
        let file = open(&log).with_context(|| log.display().to_string())?;
        command.stdout(file.try_clone().context("duplicating a file")?).stderr(file);

        // Under the lock, so that no program is started behind the back of a lab that is being closed.
        let mut state = self.shared.state();
        ensure!(!state.closed, "host {}: the lab is closed", self.name);
        let child = start(command).with_context(|| format!("host {}", self.name))?;
        let process = Process::new(format!("{name} on {}", self.name), log, child);
        state.processes.push(process.clone());
        Ok(process)
    }

    /// Calls `work` on a thread in this host's network, for sockets of the test's own.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        inside(&self.namespace, work).with_context(|| format!("host {}", self.name))
    }

    /// Sets a sysctl, named with dots (`net.ipv4.ip_forward`) or slashes.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let key = if key.contains('/') { key.to_owned() } else { key.replace('.', "/") };
        self.inside(|| write_sysctl(&key, value))?.with_context(|| format!("host {}", self.name))
    }

    /// Runs one `ip` command, written as on a command line (`link set eth0 down`).
    pub fn ip(&self, words: &str) -> Result<String> {
        self.run(std::iter::once("ip").chain(words.split_whitespace()))
    }

    /// Adds or replaces a route, written as `ip route` takes it (`203.0.113.0/24 via 10.1.0.5`).
    pub fn route(&self, route: &str) -> Result<()> {
        self.ip(&format!("route replace {route}")).map(drop)
    }

    /// Adds an address (with prefix length) to an interface; an IPv6 one is usable at once.
    pub fn add_address(&self, address: &str, interface: &str) -> Result<()> {
        ip_batch(Some(&self.namespace), &[add_address(address, interface)])
            .with_context(|| format!("host {}", self.name))
    }

    pub fn set_mtu(&self, interface: &str, mtu_bytes: u16) -> Result<()> {
        self.ip(&format!("link set {interface} mtu {mtu_bytes}")).map(drop)
    }

    /// Puts a program on an interface that is not xlb's and passes everything.
    pub fn attach_pass(&self, interface: &str) -> Result<()> {
        self.ip(&format!("link set dev {interface} xdp pinned {}", self.shared.pass_pin.display())).map(drop)
    }

    /// Takes an interface down or up.
    pub fn set_link(&self, interface: &str, up: bool) -> Result<()> {
        self.ip(&format!("link set {interface} {}", if up { "up" } else { "down" })).map(drop)
    }
}

/// The `ip` command that adds an address, usable at once.
fn add_address(address: &str, interface: &str) -> String {
    let nodad = if address.contains(':') { " nodad" } else { "" };
    format!("address add {address} dev {interface}{nodad}")
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
