//! xlb as a service: what it tells its manager, without root's power, its logs, and the units that start it.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::balancer::{Balancer, xlb};
use tests::lab::{self, HttpLoad, Lab, Signal, wait_for};
use tests::manager::Manager;
use tests::stage::{self, Config, PATIENCE, Stage, URL4, URLS};

/// After such a silence the manager takes the agent for hung.
const WATCHDOG: Duration = Duration::from_millis(600);

const ALIVE: &str = "WATCHDOG=1";

/// Starts an agent under a manager and waits until it says that it is ready.
fn start_under(manager: &Manager, stage: &Stage, config: &Path, run_dir: &Path) -> Result<Balancer> {
    let ready = manager.count("READY=1") + 1;
    let (xlb, config) = (xlb()?, config.to_owned());
    let mut command = stage.balancer.exec([&*xlb.to_string_lossy(), "run", "-c", &*config.to_string_lossy()]);
    command.arg("--run-dir").arg(run_dir);
    command.env("NOTIFY_SOCKET", manager.path()).env("WATCHDOG_USEC", WATCHDOG.as_micros().to_string());
    let process = stage.balancer.spawn_command(&mut command)?;
    manager.wait_for("READY=1", ready, PATIENCE)?;
    Ok(Balancer { host: stage.balancer.clone(), config, run_dir: run_dir.to_owned(), process, binary: xlb })
}

#[test]
fn fault_02_a_hung_agent_falls_silent_and_its_successor_takes_over_without_a_failed_request() -> Result<()> {
    let Some(stage) = Stage::set("hung", 2)? else { return Ok(()) };
    let manager = Manager::at(&stage.lab.dir().join("notify"))?;
    let (config, run_dir) = (stage.balancer.new_file("xlb.yaml"), stage.lab.dir().join("xlb"));
    fs::write(&config, stage.config().to_string())?;
    let balancer = start_under(&manager, &stage, &config, &run_dir)?;
    // Ready means that packets are forwarded.
    let load = HttpLoad::new(URL4, 100_000).parallel(4).rate(50).start(&stage.client)?;
    manager.wait_for("STATUS=services: 1, backends up: 2 of 2", 1, PATIENCE)?;
    manager.wait_for(ALIVE, 5, PATIENCE)?;

    balancer.process.signal(Signal::STOP)?;
    sleep(WATCHDOG);
    let last = manager.count(ALIVE);
    sleep(WATCHDOG);
    ensure!(manager.count(ALIVE) == last, "a stopped process gives signs of life");
    // What the manager does now.
    balancer.process.kill();
    let balancer = start_under(&manager, &stage, &config, &run_dir)?;
    manager.wait_for(ALIVE, last + 3, PATIENCE)?;
    balancer.wait_for_backends(2, PATIENCE)?;
    for url in URLS {
        stage.balances(url, 200, 2)?;
    }
    stage::none_failed(&load.stop()?)
}

#[test]
fn the_manager_is_told_of_changes_of_reloads_and_of_the_end() -> Result<()> {
    let Some(stage) = Stage::set("told", 2)? else { return Ok(()) };
    let manager = Manager::at(&stage.lab.dir().join("notify"))?;
    let (file, run_dir) = (stage.balancer.new_file("xlb.yaml"), stage.lab.dir().join("xlb"));
    let health = "{type: tcp, interval: 300ms, timeout: 300ms, rise: 1, fall: 2}".to_owned();
    let mut config = Config { health, ..stage.config() };
    fs::write(&file, config.to_string())?;
    let balancer = start_under(&manager, &stage, &file, &run_dir)?;
    stage.backends[1].nginx.process.kill();
    manager.wait_for("STATUS=services: 1, backends up: 1 of 2", 1, PATIENCE)?;

    config.backends.pop();
    balancer.reload(&config.to_string())?;
    manager.wait_for("RELOADING=1", 1, PATIENCE)?;
    manager.wait_for("READY=1", 2, PATIENCE)?;
    manager.wait_for("STATUS=services: 1, backends up: 1 of 1", 1, PATIENCE)?;
    // A file that is refused ends the reload as well.
    ensure!(balancer.reload("interfaces: [eth0\n").is_err());
    manager.wait_for("READY=1", 3, PATIENCE)?;
    let messages = manager.messages();
    let reloading: Vec<_> = messages.iter().filter(|message| message.contains("RELOADING=1")).collect();
    ensure!(reloading.len() == 2, "{messages:?}");
    ensure!(reloading.iter().all(|message| message.contains("MONOTONIC_USEC=")), "{messages:?}");

    balancer.process.signal(Signal::TERM)?;
    balancer.process.wait_exit(PATIENCE)?;
    manager.wait_for("STOPPING=1", 1, PATIENCE)?;
    ensure!(manager.messages().last().is_some_and(|last| last == "STOPPING=1\n"), "{:?}", manager.messages());
    Ok(())
}

/// Who runs xlb without being root.
const USER: u32 = 65534;

/// The words that run a program as that user, with these capabilities and no others.
fn as_user(capabilities: &str) -> Vec<String> {
    let capabilities = format!("-all,{capabilities}");
    let mut words: Vec<String> =
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"].map(str::to_owned).into();
    for set in ["inh-caps", "ambient-caps", "bounding-set"] {
        words.push(format!("--{set}={capabilities}"));
    }
    words
}

/// What docs/service.md lists.
const CAPABILITIES: &str = "+bpf,+net_admin,+perfmon";

/// A run directory of the user, with a bpffs that root mounted, as the packaged units make them.
fn user_run_dir(lab: &Lab, host: &lab::Host) -> Result<PathBuf> {
    let run_dir = lab.dir().join("xlb");
    let bpf = run_dir.join("bpf");
    fs::create_dir_all(&bpf)?;
    host.run(["mount", "-t", "bpf", "-o", "mode=0700", "bpf", &*bpf.to_string_lossy()])?;
    chown(&bpf, Some(USER), Some(USER))?;
    chown(&run_dir, Some(USER), Some(USER))?;
    Ok(run_dir)
}

/// The binary where that user can read it.
fn user_xlb(lab: &Lab) -> Result<String> {
    let copy = lab.dir().join("xlb-binary");
    if !copy.exists() {
        fs::copy(xlb()?, &copy)?;
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
    }
    Ok(copy.to_string_lossy().into_owned())
}

#[test]
fn xlb_needs_three_capabilities_and_not_root() -> Result<()> {
    let Some(stage) = Stage::set("unprivileged", 2)? else { return Ok(()) };
    let run_dir = user_run_dir(&stage.lab, &stage.balancer)?;
    let xlb = user_xlb(&stage.lab)?;
    let config = stage.balancer.new_file("xlb.yaml");
    // Generic mode changes GRO, too.
    stage.balancer.run(["ethtool", "-K", "eth0", "gro", "on"])?;
    fs::write(
        &config,
        Config { interfaces: "[{name: eth0, mode: generic}]".into(), ..stage.config() }.to_string(),
    )?;
    let words = |command: &[&str]| -> Vec<String> {
        let mut words = as_user(CAPABILITIES);
        words.push(xlb.clone());
        words.extend(command.iter().map(ToString::to_string));
        words.extend(["--run-dir".to_owned(), run_dir.to_string_lossy().into_owned()]);
        words
    };
    let run = words(&["run", "-c", &config.to_string_lossy()]);
    let start = || -> Result<Balancer> {
        let process = stage.balancer.spawn(&run)?;
        process.wait_for_log("running", PATIENCE)?;
        let (host, config, run_dir) = (stage.balancer.clone(), config.clone(), run_dir.clone());
        let balancer = Balancer { host, config, run_dir, process, binary: xlb.clone().into() };
        balancer.wait_for_backends(2, PATIENCE)?;
        Ok(balancer)
    };
    let balancer = start()?;
    let load = HttpLoad::new(URL4, 100_000).parallel(4).rate(50).start(&stage.client)?;
    for url in URLS {
        stage.balances(url, 200, 2)?;
    }
    balancer.process.kill();
    stage.balances(URL4, 200, 2)?;
    let balancer = start()?;
    ensure!(balancer.process.log().contains("maps of an earlier agent taken over"));
    stage::none_failed(&load.stop()?)?;

    balancer.process.signal(Signal::TERM)?;
    balancer.process.wait_exit(PATIENCE)?;
    let told = stage.balancer.run(words(&["detach"]))?;
    ensure!(told.contains("detached from eth0") && told.contains("stays mounted"), "{told}");
    ensure!(!stage.balancer.ip("link show eth0")?.contains("xdp"));
    let left: Vec<_> = fs::read_dir(run_dir.join("bpf"))?.flatten().map(|entry| entry.file_name()).collect();
    ensure!(left.iter().all(|name| name.to_string_lossy().ends_with(".debug")), "{left:?}");
    let features = stage.balancer.run(["ethtool", "-k", "eth0"])?;
    ensure!(features.contains("generic-receive-offload: on"), "GRO stays off");

    // Root may take away what another user's agent left, and may not run beside it.
    let balancer = start()?;
    balancer.process.kill();
    let refused = balancer.xlb(&["run", "-c", &config.to_string_lossy()]).expect_err("root runs on it");
    ensure!(format!("{refused:#}").contains("belongs to user 65534"), "{refused:#}");
    ensure!(balancer.xlb(&["detach"])?.contains("detached from eth0"));
    // What root did there is not in the user's way.
    start()?.process.kill();
    Ok(())
}

#[test]
fn what_is_missing_of_roots_power_is_named_before_anything_is_changed() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = Lab::new("missing")?;
    let host = lab.host("balancer", &["10.111.0.3/24", "fd00:111::3/64"])?;
    let xlb = user_xlb(&lab)?;
    let config = host.new_file("xlb.yaml");
    fs::write(&config, Config { backends: vec!["10.111.0.11".into()], ..Config::default() }.to_string())?;
    let run_dir = user_run_dir(&lab, &host)?;
    let refused = |capabilities: &str, run_dir: &Path| -> Result<String> {
        let mut words = vec!["timeout".to_owned(), "20".to_owned()];
        words.extend(as_user(capabilities));
        words.extend([&xlb, "run", "-c", &*config.to_string_lossy(), "--run-dir"].map(str::to_owned));
        words.push(run_dir.to_string_lossy().into_owned());
        let output = host.exec(words).output()?;
        ensure!(output.status.code() == Some(1), "{output:?}");
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for (left, missing) in [
        ("+net_admin,+perfmon", "CAP_BPF"),
        ("+bpf,+perfmon", "CAP_NET_ADMIN"),
        ("+bpf,+net_admin", "CAP_PERFMON"),
    ] {
        let told = refused(left, &run_dir)?;
        ensure!(told.contains(&format!("{missing} (")) && told.matches("CAP_").count() == 1, "{told}");
        ensure!(told.contains("is missing") && told.contains("ambient"), "{told}");
    }
    ensure!(!run_dir.join("lock").exists(), "it came as far as the lock");

    // A bpffs that nobody mounted, and that this user may not mount.
    host.run(["umount", &*run_dir.join("bpf").to_string_lossy()])?;
    let told = refused(CAPABILITIES, &run_dir)?;
    ensure!(told.contains("CAP_SYS_ADMIN") && told.contains("mount -t bpf"), "{told}");
    // What it says helps.
    let command = told.split('`').nth(1).context("no command")?;
    host.run(["sh", "-c", command])?;
    let mut words = as_user(CAPABILITIES);
    words.extend([&xlb, "run", "-c", &*config.to_string_lossy(), "--run-dir"].map(str::to_owned));
    words.push(run_dir.to_string_lossy().into_owned());
    host.spawn(words)?.wait_for_log("running", PATIENCE)
}

#[test]
fn logs_are_objects_with_fields_as_keys_where_that_is_asked_for() -> Result<()> {
    let Some(stage) = Stage::set("jsonlogs", 1)? else { return Ok(()) };
    let (config, run_dir) = (stage.balancer.new_file("xlb.yaml"), stage.lab.dir().join("xlb"));
    fs::write(&config, stage.config().to_string())?;
    let (xlb, config, run_dir) = (xlb()?, config.to_string_lossy(), run_dir.to_string_lossy());
    let words =
        [&*xlb.to_string_lossy(), "run", "-c", &config, "--run-dir", &run_dir, "--log-format", "json"];
    let process = stage.balancer.spawn(words)?;
    process.wait_for_log("\"running\"", PATIENCE)?;
    // A second agent ends with an error, which is an object as well.
    let second = stage.balancer.exec(words).output()?;
    let text = process.log() + &String::from_utf8_lossy(&second.stderr);
    let objects: Vec<serde_json::Value> =
        text.lines().map(serde_json::from_str).collect::<Result<_, _>>().with_context(|| text.clone())?;
    let find = |message: &str| {
        let found = objects.iter().find(|object| object["message"] == message);
        found.with_context(|| format!("no {message:?} in {text}"))
    };
    let attached = find("attached")?;
    ensure!(attached["interface"] == "eth0" && attached["mode"] == "native", "{attached}");
    ensure!(attached["level"] == "INFO" && attached["timestamp"].is_string(), "{attached}");
    ensure!(find("running")?["services"] == 1);
    let last = objects.last().context("objects")?;
    ensure!(
        last["level"] == "ERROR" && last["message"].as_str().is_some_and(|text| text.contains("another xlb"))
    );
    Ok(())
}

#[test]
fn what_the_journal_reads_has_priorities_and_no_times() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = Lab::new("journal")?;
    let host = lab.host("balancer", &["10.111.0.3/24", "fd00:111::3/64"])?;
    let config = host.new_file("xlb.yaml");
    fs::write(&config, Config { backends: vec!["10.111.0.99".into()], ..Config::default() }.to_string())?;
    let run_dir = lab.dir().join("xlb");
    let log = |name: &str, of_another: bool| -> Result<String> {
        let path = lab.dir().join(name);
        let file = fs::File::create(&path)?;
        let metadata = file.metadata()?;
        let inode = metadata.ino() + u64::from(of_another);
        let mut command = host.exec(["timeout", "--preserve-status", "20"]);
        command.arg(xlb()?).arg("run").arg("-c").arg(&config).arg("--run-dir").arg(&run_dir);
        command.env("JOURNAL_STREAM", format!("{}:{inode}", metadata.dev())).stderr(file);
        let mut child = command.spawn()?;
        let read = || fs::read_to_string(&path).unwrap_or_default();
        let running = wait_for("the agent runs", PATIENCE, || read().contains("running"));
        rustix::process::kill_process(rustix::process::Pid::from_child(&child), Signal::TERM)?;
        child.wait()?;
        running.with_context(read)?;
        Ok(read())
    };
    let text = log("journal", false)?;
    ensure!(
        text.lines().all(|line| ["<4>", "<6>"].iter().any(|priority| line.starts_with(priority))),
        "{text}"
    );
    ensure!(text.contains("<6>attached interface=eth0 mode=\"native\"\n"), "{text}");
    ensure!(text.contains("<4>pool has no backend that is up pool=web"), "{text}");
    ensure!(!text.contains('\x1b'), "{text}");
    // Standard error has been led elsewhere since systemd set the variable.
    let text = log("file", true)?;
    ensure!(text.contains(" INFO attached") && !text.contains("<6>"), "{text}");
    Ok(())
}

#[test]
fn systemd_finds_no_mistake_in_the_units() -> Result<()> {
    let Ok(mut version) =
        Command::new("systemd-analyze").arg("--version").stdout(std::process::Stdio::piped()).spawn()
    else {
        eprintln!("skipped: there is no systemd-analyze here");
        return Ok(());
    };
    version.wait()?;
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/systemd");
    let copy = std::env::temp_dir().join(format!("xlb-units-{}", std::process::id()));
    fs::create_dir(&copy)?;
    let verified = (|| -> Result<String> {
        // What the unit starts must exist.
        let service = fs::read_to_string(units.join("xlb.service"))?;
        let xlb = xlb()?.canonicalize()?;
        fs::write(copy.join("xlb.service"), service.replace("/usr/bin/xlb", &xlb.to_string_lossy()))?;
        fs::copy(units.join("run-xlb-bpf.mount"), copy.join("run-xlb-bpf.mount"))?;
        let mut verify = Command::new("systemd-analyze");
        verify.args(["verify", "--man=no", "./xlb.service", "./run-xlb-bpf.mount"]).current_dir(&copy);
        let output = verify.output()?;
        let mut told = String::from_utf8_lossy(&output.stderr).into_owned();
        output.stdout.as_slice().read_to_string(&mut told)?;
        ensure!(output.status.success(), "{told}");
        Ok(told)
    })();
    fs::remove_dir_all(&copy)?;
    // Mistakes that systemd would ignore are no error to it.
    let told = verified?;
    ensure!(told.trim().is_empty(), "{told}");
    Ok(())
}
