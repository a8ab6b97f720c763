//! xlb itself in a lab: the agent on a balancer, decapsulation on backends, and questions to the agent.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_userspace::agent::status::{BackendStatus, Status};
use lb_userspace::bpf::{BpfFs, Maps};
use lb_userspace::config::model::Protocol;
use lb_userspace::lookup::{Query, explain, first_frame};
use lb_userspace::reconcile::image::Image;

use crate::lab::{Host, Lab, Process, Signal, wait_for};
use crate::stage::{VIP4, VIP6};

/// The binary beside this one. `cargo build` makes it.
pub fn xlb() -> Result<PathBuf> {
    beside_this("xlb")?.context("the xlb binary is not built; run `cargo build` first")
}

/// The build of xlb that dies where `FAILPOINTS` says so.
pub fn failing_build() -> Result<PathBuf> {
    let build = beside_this("xlb-failing")?;
    build.context(
        "xlb-failing is not built; `cargo build -p tests --features fail-points --bin xlb-failing` makes it",
    )
}

/// Another build of xlb: the one with fail points, of which none is set, where it is there, or a copy in another place.
///
/// What an upgrade changes is the program that is loaded and the process that adopts; a copy shows both.
pub fn other_build(lab: &Lab) -> Result<PathBuf> {
    if let Ok(build) = failing_build() {
        return Ok(build);
    }
    let copy = lab.dir().join("xlb-copy");
    std::fs::copy(xlb()?, &copy)?;
    Ok(copy)
}

fn beside_this(name: &str) -> Result<Option<PathBuf>> {
    let this = std::env::current_exe()?;
    Ok(this.ancestors().skip(1).find_map(|dir| Some(dir.join(name)).filter(|path| path.is_file())))
}

/// How a command ended.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    /// Runs a command that ends by itself.
    pub fn of(command: &mut Command) -> Result<Self> {
        let output = command.output()?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Self { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) })
    }

    /// Runs an xlb command that ends by itself.
    pub fn of_xlb(host: &Host, arguments: &[&str]) -> Result<Self> {
        let xlb = xlb()?;
        let words = ["timeout", "20", xlb.to_str().context("path")?];
        Self::of(&mut host.exec(words.iter().chain(arguments)))
    }

    /// Refuses another exit code, and a text that lacks one of the words.
    pub fn expect(&self, code: i32, words: &[&str]) -> Result<()> {
        let Self { stdout, stderr, .. } = self;
        ensure!(self.code == Some(code), "exit code {:?}\n{stdout}{stderr}", self.code);
        let text = format!("{stdout}{stderr}");
        words.iter().try_for_each(|word| {
            ensure!(text.contains(word), "{word:?} is not in:\n{text}");
            Ok(())
        })
    }
}

/// An agent on a host, with its configuration and run directory.
pub struct Balancer {
    pub host: Host,
    pub config: PathBuf,
    pub run_dir: PathBuf,
    pub process: Process,
    /// The build that the agent and the commands are of.
    pub binary: PathBuf,
}

impl Balancer {
    /// Starts `xlb run` on `yaml` and waits until it answers.
    pub fn start(host: &Host, run_dir: &Path, yaml: &str) -> Result<Self> {
        let config = host.new_file("xlb.yaml");
        std::fs::write(&config, yaml)?;
        let binary = xlb()?;
        let process = run(host, &binary, run_dir, &config)?;
        let this = Self { host: host.clone(), config, run_dir: run_dir.to_owned(), process, binary };
        this.wait_until_answers()?;
        Ok(this)
    }

    fn wait_until_answers(&self) -> Result<()> {
        wait_for("xlb answers", Duration::from_secs(15), || {
            self.process.exit().is_some() || self.status().is_ok()
        })?;
        ensure!(self.process.exit().is_none(), "xlb ended:\n{}", self.process.log());
        Ok(())
    }

    /// Starts the agent again, after it was ended.
    pub fn restart(&mut self) -> Result<()> {
        self.process = run(&self.host, &self.binary, &self.run_dir, &self.config)?;
        self.wait_until_answers()
    }

    /// Starts the agent again with other words in its environment; it may not live long enough to answer.
    pub fn restart_with(&mut self, variable: &str, value: &str) -> Result<()> {
        let mut command = run_command(&self.host, &self.binary, &self.run_dir, &self.config);
        self.process = self.host.spawn_command(command.env(variable, value))?;
        Ok(())
    }

    /// Stops the agent as a service manager does, and starts another build in its place.
    pub fn upgrade(&mut self, binary: &Path) -> Result<()> {
        self.process.signal(Signal::TERM)?;
        self.process.wait_exit(Duration::from_secs(10))?;
        self.binary = binary.to_owned();
        self.restart()
    }

    /// Runs an xlb command on the balancer; the error has what it printed.
    pub fn xlb(&self, arguments: &[&str]) -> Result<String> {
        let run_dir = self.run_dir.to_string_lossy();
        let mut words = vec![self.binary.to_str().context("path")?];
        words.extend(arguments);
        words.extend(["--run-dir", &*run_dir]);
        self.host.run(words)
    }

    /// Runs an xlb command on the balancer, however it ends.
    pub fn command(&self, arguments: &[&str]) -> Result<Ended> {
        let run_dir = self.run_dir.to_string_lossy();
        Ended::of_xlb(&self.host, &[arguments, &["--run-dir", &run_dir]].concat())
    }

    pub fn status(&self) -> Result<Status> {
        Ok(serde_json::from_str(&self.xlb(&["status", "-o", "json"])?)?)
    }

    pub fn backends(&self) -> Result<Vec<BackendStatus>> {
        Ok(self.status()?.backends)
    }

    /// Waits until so many backends are up.
    pub fn wait_for_backends(&self, up: usize, timeout: Duration) -> Result<()> {
        wait_for(&format!("{up} backends up"), timeout, || {
            self.backends().is_ok_and(|backends| backends.iter().filter(|b| b.state == "up").count() == up)
        })
        .with_context(|| self.process.log())
    }

    /// Ends the agent and takes everything out of the kernel; what `xlb detach` says.
    pub fn process_ends(&self) -> Result<String> {
        self.process.signal(Signal::TERM)?;
        self.process.wait_exit(Duration::from_secs(10))?;
        self.xlb(&["detach"])
    }

    /// Packets of an outcome.
    pub fn outcome(&self, name: &str) -> Result<u64> {
        let status = self.status()?;
        let outcome = status.outcomes.iter().find(|outcome| outcome.name == name);
        Ok(outcome.with_context(|| format!("no outcome {name}"))?.packets)
    }

    /// The backend that takes a flow, by name.
    pub fn lookup(&self, source: &str, vip: &str) -> Result<String> {
        let answer = self.xlb(&["lookup", source, vip, "-o", "json"])?;
        let answer: serde_json::Value = serde_json::from_str(&answer)?;
        Ok(answer["backend"].as_str().with_context(|| format!("{answer}"))?.to_owned())
    }

    /// The kernel's tables, read from their pins.
    pub fn tables(&self) -> Result<Image> {
        let fs = BpfFs::existing(&self.run_dir)?.context("nothing is pinned")?;
        Ok(Maps::from_pins(&fs)?.image()?)
    }

    /// Which backends take 200 flows of both families to the stage's VIPs, by name. No client's own connections have these
    /// ports, and pins.
    pub fn places(&self) -> Result<BTreeMap<String, String>> {
        let names: HashMap<IpAddr, String> =
            self.backends()?.into_iter().map(|backend| (backend.address, backend.name)).collect();
        let tables = self.tables()?;
        let flows = (2000..2100).flat_map(|port| {
            [
                (format!("10.111.0.2:{port}"), format!("{VIP4}:80")),
                (format!("[fd00:111::2]:{port}"), format!("[{VIP6}]:80")),
            ]
        });
        let named = |(source, vip): (String, String)| {
            let query = Query { source: source.parse()?, vip: vip.parse()?, protocol: Protocol::Tcp };
            let address = place(&tables, &query)?.with_context(|| format!("nobody takes {source}"))?;
            Ok((source, names.get(&address).cloned().unwrap_or_else(|| address.to_string())))
        };
        flows.map(named).collect()
    }

    /// The id of the link that holds the program on the balancer's interface.
    pub fn link_id(&self) -> Result<String> {
        let pin = self.run_dir.join("bpf/link_eth0");
        let shown = self.host.run(["bpftool", "link", "show", "pinned", &pin.to_string_lossy()])?;
        Ok(shown.split(':').next().unwrap_or_default().to_owned())
    }

    pub fn program_id(&self) -> Result<String> {
        let shown = self.host.ip("link show eth0")?;
        let id = shown.split("prog/xdp id ").nth(1).and_then(|rest| rest.split(' ').next());
        Ok(id.with_context(|| shown.clone())?.to_owned())
    }

    /// Gives the agent another configuration. Waits until it has taken or refused it; an error if it refused.
    pub fn reload(&self, yaml: &str) -> Result<()> {
        let reloads = || self.process.log().matches("reload").count();
        let before = reloads();
        std::fs::write(&self.config, yaml)?;
        self.process.signal(Signal::HUP)?;
        wait_for("the reload ends", Duration::from_secs(15), || reloads() > before)?;
        let refused = self.status()?.last_reload.and_then(|reload| reload.error);
        ensure!(refused.is_none(), "reload refused: {}", refused.unwrap_or_default());
        Ok(())
    }
}

fn run(host: &Host, xlb: &Path, run_dir: &Path, config: &Path) -> Result<Process> {
    host.spawn_command(&mut run_command(host, xlb, run_dir, config))
}

fn run_command(host: &Host, xlb: &Path, run_dir: &Path, config: &Path) -> Command {
    let (run, file, place) = ("run".as_ref(), "-c".as_ref(), "--run-dir".as_ref());
    host.exec([xlb.as_os_str(), run, file, config.as_os_str(), place, run_dir.as_os_str()])
}

/// The address of the backend that takes a flow by these tables, if one does.
pub fn place(tables: &Image, query: &Query) -> Result<Option<IpAddr>> {
    let explanation = explain(tables, &first_frame(query).map_err(anyhow::Error::msg)?, 0);
    Ok(explanation.backend_address.filter(|_| explanation.outcome.starts_with("forward_")))
}

/// Starts `xlb decap` on a backend's `eth0` and waits until it is attached.
pub fn decap(host: &Host, vips: &[&str], from: &[&str]) -> Result<Process> {
    decap_on(host, "eth0", vips, from)
}

/// Like [`decap`], on another interface.
pub fn decap_on(host: &Host, interface: &str, vips: &[&str], from: &[&str]) -> Result<Process> {
    decap_with(host, interface, vips, from, &[])
}

/// Like [`decap_on`], with further words on the command line.
pub fn decap_with(
    host: &Host,
    interface: &str,
    vips: &[&str],
    from: &[&str],
    more: &[&str],
) -> Result<Process> {
    let xlb = xlb()?;
    let mut words = vec![xlb.to_str().context("path")?, "decap", "--interface", interface];
    words.extend(more);
    words.push("--vip");
    words.extend(vips);
    words.push("--from");
    words.extend(from);
    let process = host.spawn(words)?;
    process.wait_for_log("decapsulating", Duration::from_secs(10))?;
    Ok(process)
}
