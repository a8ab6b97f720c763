//! The run directory and the bpffs in it: refused where another user, or a mount namespace that ends, has a hand in it.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Output;

use anyhow::{Context, Result, ensure};
use tests::balancer::{Balancer, xlb};
use tests::lab::{self, Host, Lab};
use tests::stage::{Config, PATIENCE};

/// Who plants things.
const NOBODY: u32 = 65534;

/// A balancer that forwards to nobody, and a directory for run directories.
struct Scene {
    host: Host,
    config: PathBuf,
    dir: PathBuf,
    _lab: Lab,
}

impl Scene {
    fn set(name: &str) -> Result<Option<Self>> {
        if !lab::available()? {
            return Ok(None);
        }
        let lab = Lab::new(name)?;
        let host = lab.host("balancer", &["10.111.0.3/24", "fd00:111::3/64"])?;
        let config = host.new_file("xlb.yaml");
        fs::write(
            &config,
            Config { backends: vec!["10.111.0.11".to_owned()], ..Config::default() }.to_string(),
        )?;
        let dir = lab.dir().join("runs");
        fs::create_dir(&dir)?;
        Ok(Some(Self { host, config, dir, _lab: lab }))
    }

    /// The words of `xlb run` after those of `before`.
    fn words(&self, before: &[&str], run_dir: &Path) -> Result<Vec<String>> {
        let (xlb, config) = (xlb()?, self.config.to_string_lossy().into_owned());
        let words = before.iter().map(ToString::to_string);
        let run = [xlb.to_string_lossy().into_owned(), "run".into(), "-c".into(), config, "--run-dir".into()];
        Ok(words.chain(run).chain([run_dir.to_string_lossy().into_owned()]).collect())
    }

    /// Runs an agent that must end by itself with an error that has all the words; nothing is attached.
    fn refused_after(&self, before: &[&str], run_dir: &Path, words: &[&str]) -> Result<()> {
        let mut with_limit = vec!["timeout", "20"];
        with_limit.extend(before);
        let Output { status, stderr, .. } = self.host.exec(self.words(&with_limit, run_dir)?).output()?;
        let told = String::from_utf8_lossy(&stderr);
        ensure!(status.code() == Some(1), "{before:?}: {status}: {told}");
        for word in words {
            ensure!(told.contains(word), "{before:?}: {word:?} is not in: {told}");
        }
        ensure!(told.lines().count() == 1, "more than a line: {told}");
        ensure!(!self.host.ip("link show eth0")?.contains("xdp"), "{before:?}: attached");
        Ok(())
    }

    fn refused(&self, run_dir: &Path, words: &[&str]) -> Result<()> {
        self.refused_after(&[], run_dir, words)
    }

    /// Starts an agent that must run.
    fn runs_after(&self, before: &[&str], run_dir: &Path) -> Result<Balancer> {
        let process = self.host.spawn(self.words(before, run_dir)?)?;
        process.wait_for_log("running", PATIENCE)?;
        Ok(Balancer {
            host: self.host.clone(),
            config: self.config.clone(),
            run_dir: run_dir.to_owned(),
            process,
            binary: xlb()?,
        })
    }

    /// Runs a program as another user.
    fn as_nobody(&self, words: &[&str]) -> Result<()> {
        let user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
        self.host.run(user.iter().chain(words)).map(drop)
    }

    fn new_dir(&self, name: &str, mode: u32) -> Result<PathBuf> {
        let path = self.dir.join(name);
        fs::create_dir(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        Ok(path)
    }

    fn mount(&self, words: &[&str]) -> Result<()> {
        self.host.run(["mount"].iter().chain(words)).map(drop)
    }
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("path")
}

/// Whether something is mounted there as process 1 sees it.
fn mounted(path: &Path) -> Result<bool> {
    let mounts = fs::read_to_string("/proc/1/mountinfo")?;
    Ok(mounts.lines().any(|line| line.split(' ').nth(4).is_some_and(|point| Path::new(point) == path)))
}

fn unshare(propagation: &'static str) -> [&'static str; 4] {
    ["unshare", "--mount", "--propagation", propagation]
}

#[test]
fn a_bpffs_that_would_end_with_the_agents_mount_namespace_is_refused_with_the_way_out() -> Result<()> {
    let Some(scene) = Scene::set("privatefs")? else { return Ok(()) };
    let run_dir = scene.dir.join("xlb");
    let words = ["mounts of its own", "nsenter --net=", "mount -t bpf", "xlb/bpf"];
    // A peer group of the namespace's own is as good as none.
    for propagation in ["private", "slave", "shared", "unchanged"] {
        scene.refused_after(&unshare(propagation), &run_dir, &words)?;
    }
    let namespace = scene.host.namespace().to_owned();
    scene.refused_after(&["ip", "netns", "exec", &namespace], &run_dir, &words)?;
    ensure!(!mounted(&run_dir.join("bpf"))?);
    ensure!(!run_dir.join("bpf").exists(), "its mount point stays behind");
    Ok(())
}

#[test]
fn a_bpffs_that_the_machine_sees_outlives_an_agent_with_mounts_of_its_own() -> Result<()> {
    let Some(scene) = Scene::set("sharedfs")? else { return Ok(()) };
    // As most machines have `/`: what a namespace mounts below appears in all that did not opt out.
    scene.mount(&["--bind", text(&scene.dir)?, text(&scene.dir)?])?;
    scene.mount(&["--make-shared", text(&scene.dir)?])?;
    let run_dir = scene.dir.join("xlb");
    for propagation in ["private", "slave"] {
        scene.refused_after(&unshare(propagation), &run_dir, &["mounts of its own"])?;
    }
    let survives = |balancer: &Balancer| -> Result<()> {
        balancer.process.kill();
        ensure!(mounted(&run_dir.join("bpf"))?);
        ensure!(balancer.host.ip("link show eth0")?.contains("xdp"), "detached with its agent");
        balancer.xlb(&["lookup", "10.111.0.2:40000", "203.0.113.10:80"]).expect_err("nobody is up");
        ensure!(balancer.xlb(&["detach"])?.contains("detached from eth0"));
        Ok(())
    };
    survives(&scene.runs_after(&unshare("unchanged"), &run_dir)?)?;

    // Mounted outside before, it is the machine's whatever the agent's namespace is.
    let bpf = run_dir.join("bpf");
    fs::create_dir_all(&bpf)?;
    scene.mount(&["-t", "bpf", "-o", "mode=0700", "bpf", text(&bpf)?])?;
    for propagation in ["private", "slave"] {
        survives(&scene.runs_after(&unshare(propagation), &run_dir)?)?;
        ensure!(mounted(&bpf)?, "detach unmounted what xlb did not mount");
    }
    Ok(())
}

#[test]
fn fault_32_a_run_directory_of_another_user_or_open_to_others_is_refused() -> Result<()> {
    let Some(scene) = Scene::set("planteddir")? else { return Ok(()) };
    let tmp = scene.new_dir("tmp", 0o1777)?;
    let run_dir = tmp.join("xlb");
    scene.as_nobody(&["ln", "-s", "/nonexistent", text(&run_dir)?])?;
    scene.refused(&run_dir, &["xlb is a symbolic link", "remove it"])?;
    // A slash at the end would follow it.
    scene.refused(&run_dir.join(""), &["xlb is a symbolic link"])?;
    fs::remove_file(&run_dir)?;
    scene.as_nobody(&["mkdir", text(&run_dir)?])?;
    scene.refused(&run_dir, &["xlb belongs to user 65534", "this is user 0"])?;
    scene.refused(&run_dir.join("below"), &["xlb belongs to user 65534"])?;
    fs::remove_dir_all(&run_dir)?;

    let open = scene.new_dir("open", 0o777)?;
    scene.refused(&open, &["open can be changed by others", "mode 0777", "chmod go-w"])?;
    scene.refused(&open.join("xlb"), &["open can be changed by others"])?;
    // In a directory like /tmp nobody can put another directory in its place.
    scene.runs_after(&[], &run_dir)?.process_ends().map(drop)
}

#[test]
fn fault_32_a_planted_lock_socket_or_bpf_directory_is_refused_and_not_touched() -> Result<()> {
    let Some(scene) = Scene::set("planted")? else { return Ok(()) };
    let run_dir = scene.new_dir("xlb", 0o777)?;
    let victim = scene.dir.join("victim");
    fs::write(&victim, "precious")?;
    let plant = |words: &[&str], name: &str, told: &[&str]| -> Result<()> {
        let planted = run_dir.join(name);
        fs::set_permissions(&run_dir, fs::Permissions::from_mode(0o777))?;
        scene.as_nobody(&[words, &[text(&planted)?]].concat())?;
        // The hole is closed, what came through is still there.
        fs::set_permissions(&run_dir, fs::Permissions::from_mode(0o755))?;
        scene.refused(&run_dir, told)?;
        ensure!(planted.symlink_metadata().is_ok(), "{name} was removed");
        ensure!(fs::read_to_string(&victim)? == "precious");
        scene.host.run(["rm", "-r", text(&planted)?]).map(drop)
    };
    let victim = text(&victim)?;
    plant(&["ln", "-s", victim], "lock", &["lock is a symbolic link"])?;
    plant(&["touch"], "lock", &["lock belongs to user 65534"])?;
    plant(&["mkfifo"], "lock", &["lock is a pipe"])?;
    plant(&["ln", "-s", victim], "xlb.sock", &["xlb.sock is in the way"])?;
    plant(&["touch"], "xlb.sock", &["xlb.sock is in the way"])?;
    plant(&["ln", "-s", victim], "bpf", &["bpf is a symbolic link"])?;
    plant(&["ln", "-s", text(&scene.new_dir("elsewhere", 0o700)?)?], "bpf", &["bpf is a symbolic link"])?;
    plant(&["mkdir"], "bpf", &["bpf belongs to user 65534"])?;
    plant(&["touch"], "bpf", &["bpf is a file"])?;

    let socket = run_dir.join("xlb.sock");
    drop(std::os::unix::net::UnixListener::bind(&socket)?);
    chown(&socket, Some(NOBODY), None)?;
    scene.refused(&run_dir, &["xlb.sock is in the way"])?;
    fs::remove_file(&socket)?;
    fs::write(run_dir.join("lock"), "")?;
    fs::hard_link(run_dir.join("lock"), scene.dir.join("second"))?;
    scene.refused(&run_dir, &["lock has 2 names"])?;
    fs::remove_file(scene.dir.join("second"))?;
    scene.runs_after(&[], &run_dir)?.process_ends().map(drop)
}

#[test]
fn fault_32_a_planted_pin_is_refused_before_it_is_opened() -> Result<()> {
    let Some(scene) = Scene::set("plantedpin")? else { return Ok(()) };
    let run_dir = scene.new_dir("xlb", 0o755)?;
    let bpf = run_dir.join("bpf");
    fs::create_dir(&bpf)?;
    // As `mount -t bpf` leaves it: open to everybody.
    scene.mount(&["-t", "bpf", "xlb", text(&bpf)?])?;
    scene.refused(&run_dir, &["bpf can be changed by others", "mode 1777"])?;
    let maps = bpf.join("maps_1");
    scene.as_nobody(&["mkdir", text(&maps)?])?;
    fs::set_permissions(&bpf, fs::Permissions::from_mode(0o700))?;
    scene.refused(&run_dir, &["maps_1 belongs to user 65534", "this is user 0"])?;

    chown(&maps, Some(0), None)?;
    fs::set_permissions(&maps, fs::Permissions::from_mode(0o777))?;
    scene.refused(&run_dir, &["maps_1 can be changed by others"])?;
    fs::set_permissions(&maps, fs::Permissions::from_mode(0o700))?;
    for planted in [maps.join("XLB_META"), bpf.join("link_eth0")] {
        let name = planted.file_name().and_then(|name| name.to_str()).context("name")?;
        symlink("/sys/fs/bpf/elsewhere", &planted)?;
        scene.refused(&run_dir, &[name, "is a symbolic link"])?;
        fs::remove_file(&planted)?;
        let map = ["bpftool", "map", "create", text(&planted)?, "type", "array", "key", "4", "value", "8"];
        scene.host.run(map.iter().chain(&["entries", "1", "name", "planted"]))?;
        chown(&planted, Some(NOBODY), None)?;
        scene.refused(&run_dir, &[name, "belongs to user 65534"])?;
        // A file of elsewhere, mounted over a pin of ours.
        chown(&planted, Some(0), None)?;
        let file = scene.dir.join("file");
        fs::write(&file, "")?;
        scene.mount(&["--bind", text(&file)?, text(&planted)?])?;
        scene.refused(&run_dir, &[name, "is of another file system"])?;
        scene.host.run(["umount", text(&planted)?])?;
        fs::remove_file(&planted)?;
    }
    fs::remove_dir(&maps)?;
    scene.runs_after(&[], &run_dir)?.process_ends().map(drop)
}
