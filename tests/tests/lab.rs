//! The lab itself: real clients meet real servers in it, and nothing of it stays.
//!
//! Needs root and the programs that scripts/setup installs.

use std::collections::HashSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tests::lab::{self, Host, HttpLoad, Lab, Nginx, Signal, Transport};

const SECOND: Duration = Duration::from_secs(1);

/// A lab, or nothing where skipping was asked for.
fn lab(name: &str) -> Result<Option<Lab>> {
    if !lab::available()? {
        return Ok(None);
    }
    Lab::new(name).map(Some)
}

fn client_and_server(lab: &Lab) -> Result<(Host, Host)> {
    let client = lab.host("client", &["10.1.0.2/16", "fd00:1::2/64"])?;
    let server = lab.host("web1", &["10.1.0.11/16", "fd00:1::11/64"])?;
    Ok((client, server))
}

/// What there is of a lab on the machine, given its directory.
fn remains(dir: &Path) -> Vec<String> {
    let id = dir.file_name().unwrap().to_str().unwrap();
    let mut found = Vec::new();
    if dir.exists() {
        found.push(format!("directory {}", dir.display()));
    }
    let list =
        |path: &str| fs::read_dir(path).into_iter().flatten().filter_map(Result::ok).collect::<Vec<_>>();
    for entry in list("/run/netns") {
        let name = entry.file_name().into_string().unwrap();
        if name.starts_with(&format!("xlb-{id}-")) {
            found.push(format!("namespace {name}"));
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    found.extend(
        mounts
            .lines()
            .filter(|line| line.contains(&format!("xlb-lab/{id}/")))
            .map(|line| format!("mount {line}")),
    );
    for entry in list("/proc") {
        let name = entry.file_name().into_string().unwrap();
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        if name.bytes().all(|byte| byte.is_ascii_digit()) && line.contains(&format!("xlb-lab/{id}/")) {
            found.push(format!("process {name} {line}"));
        }
    }
    found
}

#[test]
fn a_client_gets_pages_from_nginx_over_ipv4_and_ipv6() -> Result<()> {
    let Some(lab) = lab("pages")? else { return Ok(()) };
    let (client, server) = client_and_server(&lab)?;
    let options = Nginx { ports: vec![80, 8080], big_megabytes: 3, ..Nginx::default() };
    let nginx = lab::nginx(&server, "web1", options)?;

    for address in ["10.1.0.11", "[fd00:1::11]", "10.1.0.11:8080", "[fd00:1::11]:8080"] {
        assert_eq!(
            lab::http_get(&client, &format!("http://{address}/"))?,
            (200, "web1\n".into()),
            "{address}"
        );
    }
    assert_eq!(lab::http_get(&client, "http://10.1.0.11/healthz")?.0, 200);
    nginx.set_healthy(false)?;
    assert_eq!(lab::http_get(&client, "http://10.1.0.11/healthz")?.0, 503);
    nginx.set_healthy(true)?;
    assert_eq!(lab::http_get(&client, "http://10.1.0.11/healthz")?.0, 200);

    let big = client.exec(["curl", "-qsS", "http://10.1.0.11/big"]).output()?.stdout;
    let expected: Vec<u8> = (0..3_u64 << 17).flat_map(u64::to_le_bytes).collect();
    assert!(big == expected, "{} of {} bytes, or others", big.len(), expected.len());
    Ok(())
}

#[test]
fn servers_of_one_lab_do_not_meet() -> Result<()> {
    let Some(lab) = lab("several")? else { return Ok(()) };
    let client = lab.host("client", &["10.1.0.2/16"])?;
    for number in 1..=3 {
        let host = lab.host(&format!("web{number}"), &[&format!("10.1.0.1{number}/16")])?;
        lab::nginx(&host, host.name(), Nginx::default())?;
        lab::dns(&host, host.name())?;
    }
    for number in 1..=3 {
        let body = lab::http_get(&client, &format!("http://10.1.0.1{number}/"))?.1;
        assert_eq!(body, format!("web{number}\n"));
        let name = lab::dns_who(&client, &format!("10.1.0.1{number}"), Transport::Udp)?;
        assert_eq!(name, format!("web{number}"));
    }
    Ok(())
}

#[test]
fn dig_asks_dnsmasq_over_udp_and_tcp_and_ipv4_and_ipv6() -> Result<()> {
    let Some(lab) = lab("dns")? else { return Ok(()) };
    let (client, server) = client_and_server(&lab)?;
    lab::dns(&server, "web1")?;
    for address in ["10.1.0.11", "fd00:1::11"] {
        for transport in [Transport::Udp, Transport::Tcp] {
            assert_eq!(lab::dns_who(&client, address, transport)?, "web1", "{address} {transport:?}");
        }
    }
    let answer = client.run(["dig", "+short", "@10.1.0.11", "who.xlb.test", "A", "who.xlb.test", "AAAA"])?;
    assert_eq!(answer.lines().collect::<Vec<_>>(), ["10.1.0.11", "fd00:1::11"]);
    Ok(())
}

/// The backend is the next hop itself here, which is what direct return looks like from its side.
#[test]
fn a_direct_return_backend_serves_vips_but_does_not_claim_them() -> Result<()> {
    let Some(lab) = lab("dsr")? else { return Ok(()) };
    let (client, server) = client_and_server(&lab)?;
    lab::backend_dsr(&server, &["203.0.113.10", "10.1.99.10", "2001:db8::10", "fd00:1::99"])?;
    lab::nginx(&server, "web1", Nginx::default())?;
    lab::dns(&server, "web1")?;

    // On-link for the client, so it asks for them by ARP and neighbour solicitation, and nobody answers.
    for address in ["10.1.99.10", "[fd00:1::99]"] {
        let short = Duration::from_millis(300);
        let result = lab::http_get_within(&client, &format!("http://{address}/"), short, SECOND);
        assert!(result.is_err(), "{address}: {result:?}");
    }
    client.route("203.0.113.10 via 10.1.0.11")?;
    client.route("2001:db8::10 via fd00:1::11")?;
    for address in ["203.0.113.10", "[2001:db8::10]"] {
        assert_eq!(lab::http_get(&client, &format!("http://{address}/"))?.1, "web1\n", "{address}");
    }
    for address in ["203.0.113.10", "2001:db8::10"] {
        for transport in [Transport::Udp, Transport::Tcp] {
            assert_eq!(lab::dns_who(&client, address, transport)?, "web1", "{address} {transport:?}");
        }
    }
    Ok(())
}

#[test]
fn a_host_has_interfaces_on_several_switches() -> Result<()> {
    let Some(lab) = lab("switches")? else { return Ok(()) };
    let wan = lab.switch("wan")?;
    let client = lab.host_on("client", &[(&wan, &["192.0.2.2/24"])])?;
    let router = lab.host_on("router", &[(&wan, &["192.0.2.1/24"]), (lab.lan(), &["10.1.0.1/16"])])?;
    let server = lab.host("web1", &["10.1.0.11/16"])?;
    lab::nginx(&server, "web1", Nginx::default())?;
    client.route("default via 192.0.2.1")?;
    server.route("default via 10.1.0.1")?;

    let short = Duration::from_millis(300);
    assert!(
        lab::http_get_within(&client, "http://10.1.0.11/", short, SECOND).is_err(),
        "forwarded by default"
    );
    router.sysctl("net.ipv4.ip_forward", "1")?;
    assert_eq!(lab::http_get(&client, "http://10.1.0.11/")?.1, "web1\n");

    let names: Vec<_> = router.interfaces().into_iter().map(|interface| interface.name).collect();
    assert_eq!(names, ["eth0", "eth1"]);
    let link = router.ip("-o link show eth1")?;
    let mac = router.interfaces()[1].mac.map(|byte| format!("{byte:02x}")).join(":");
    assert!(link.contains(&mac) && link.contains("mtu 1600"), "{link}");
    Ok(())
}

#[test]
fn iperf3_measures_the_link() -> Result<()> {
    let Some(lab) = lab("iperf3")? else { return Ok(()) };
    let (client, server) = client_and_server(&lab)?;
    lab::iperf3_server(&server)?;
    let report = client.run(["iperf3", "--client", "fd00:1::11", "--bytes", "10M", "--format", "m"])?;
    assert!(report.contains("receiver"), "{report}");
    Ok(())
}

#[test]
fn a_load_reports_every_request() -> Result<()> {
    let Some(lab) = lab("load")? else { return Ok(()) };
    let (client, server) = client_and_server(&lab)?;
    lab::nginx(&server, "web1", Nginx::default())?;

    let begin = Instant::now();
    let requests = lab::http_load(&client, "http://[fd00:1::11]/", 2000, 4)?;
    let end = Instant::now();
    println!("2000 requests took {:?}", end - begin);
    assert_eq!(requests.len(), 2000);
    assert_eq!(lab::backends(&requests).into_iter().collect::<Vec<_>>(), [("web1", 2000)]);
    assert!(requests.iter().all(|request| begin <= request.start && request.start + request.duration <= end));
    assert!(requests.is_sorted_by_key(|request| request.start));
    Ok(())
}

#[test]
fn a_load_tells_refused_from_timed_out_and_goes_on_when_the_server_is_back() -> Result<()> {
    let Some(lab) = lab("outage")? else { return Ok(()) };
    let (client, server) = client_and_server(&lab)?;
    let refused = lab::http_load(&client, "http://10.1.0.11/", 3, 1)?;
    assert!(refused.iter().all(|r| r.result.as_ref().is_err_and(|e| e.contains("error 7:"))), "{refused:?}");

    let nginx = lab::nginx(&server, "web1", Nginx::default())?;
    let fifth = Duration::from_millis(200);
    let load = HttpLoad::new("http://10.1.0.11/", 10_000).rate(100).timeouts(fifth, fifth).start(&client)?;
    thread::sleep(fifth);
    nginx.process.signal(Signal::STOP)?;
    thread::sleep(3 * fifth);
    nginx.process.signal(Signal::CONT)?;
    thread::sleep(3 * fifth);
    let requests = load.stop()?;
    let answered: Vec<bool> = requests.iter().map(|request| request.backend().is_some()).collect();
    assert!(answered.first() == Some(&true) && answered.last() == Some(&true), "{answered:?}");
    let failures = lab::failures(&requests);
    assert!((1..=5).contains(&failures.len()), "{failures:?}");
    assert!(
        failures.iter().all(|r| r.result.as_ref().is_err_and(|e| e.contains("error 28:"))),
        "{failures:?}"
    );
    Ok(())
}

#[test]
fn a_process_has_a_log_and_an_end() -> Result<()> {
    let Some(lab) = lab("process")? else { return Ok(()) };
    let host = lab.host("one", &[])?;
    let process = host.spawn([
        "sh",
        "-c",
        "trap 'echo caught >&2; exit 3' TERM; echo ready; while :; do sleep 0.01; done",
    ])?;
    process.wait_for_log("ready", 5 * SECOND)?;
    assert!(process.exit().is_none());
    process.signal(Signal::TERM)?;
    assert_eq!(process.wait_exit(5 * SECOND)?.code(), Some(3));
    assert_eq!(process.log(), "ready\ncaught\n");
    assert!(process.signal(Signal::TERM).is_err());

    let error = host.run(["sh", "-c", "echo what went wrong >&2; exit 4"]).unwrap_err();
    assert!(format!("{error:#}").contains("what went wrong"), "{error:#}");
    let error = host.spawn(["no-such-program"]).err().context("started")?;
    assert!(format!("{error:#}").contains("no-such-program: not found"), "{error:#}");
    let ended = host.spawn(["sh", "-c", "echo last words"])?;
    let error = ended.wait_for_log("never", 5 * SECOND).unwrap_err();
    assert!(format!("{error:#}").contains("last words"), "{error:#}");
    Ok(())
}

/// Everything a lab can have, for the tests of its end.
fn populate(lab: &Lab) -> Result<()> {
    let (client, server) = client_and_server(lab)?;
    lab::nginx(&server, "web1", Nginx::default())?;
    lab::dns(&server, "web1")?;
    // A child that leaves its parent's process group, and a program that the lab was not told of.
    client.spawn(["setsid", "--fork", "sleep", "1000"])?;
    let _unknown = client.exec(["sleep", "1000"]).stdout(Stdio::null()).spawn()?;
    fs::create_dir(lab.bpf_dir().join("pins"))?;
    let sleeps =
        |pid: &String| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm == "sleep\n");
    lab::wait_for("two sleeping processes", 5 * SECOND, || {
        processes_of(lab).into_iter().filter(sleeps).count() == 2
    })?;
    assert!(remains(lab.dir()).len() >= 6, "{:?}", remains(lab.dir()));
    Ok(())
}

fn processes_of(lab: &Lab) -> Vec<String> {
    let id = lab.dir().file_name().unwrap().to_str().unwrap();
    let pids = |host| {
        let output =
            Command::new("ip").args(["netns", "pids", &format!("xlb-{id}-{host}")]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect::<Vec<_>>()
    };
    [pids("client"), pids("web1")].concat()
}

/// Running, as opposed to a zombie that its parent has not waited for.
fn runs(pid: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn dropping_leaves_nothing() -> Result<()> {
    let Some(lab) = lab("drop")? else { return Ok(()) };
    populate(&lab)?;
    let dir = lab.dir().to_owned();
    let pids = processes_of(&lab);
    // nginx, dnsmasq, and two that sleep; the setsid that forked may still be there.
    assert!(pids.len() >= 4, "{pids:?}");
    drop(lab);
    assert_eq!(remains(&dir), Vec::<String>::new());
    assert!(!pids.iter().any(|pid| runs(pid)));
    Ok(())
}

#[test]
fn a_panic_leaves_nothing() -> Result<()> {
    let Some(lab) = lab("panic")? else { return Ok(()) };
    let dir = lab.dir().to_owned();
    let panicked = catch_unwind(AssertUnwindSafe(move || {
        populate(&lab).unwrap();
        panic!("on purpose");
    }));
    assert!(panicked.is_err());
    assert_eq!(remains(&dir), Vec::<String>::new());
    Ok(())
}

#[test]
fn a_host_outlives_its_lab_as_a_handle_only() -> Result<()> {
    let Some(lab) = lab("handle")? else { return Ok(()) };
    let host = lab.host("one", &["10.1.0.2/16"])?;
    lab.close()?;
    assert!(host.run(["true"]).is_err());
    assert!(host.spawn(["true"]).is_err());
    Ok(())
}

#[test]
fn labs_in_parallel_have_the_same_addresses_and_do_not_meet() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let names = ["left", "right"].map(|name| {
        thread::spawn(move || -> Result<(PathBuf, String)> {
            let lab = lab(name)?.context("skipped")?;
            let (client, server) = client_and_server(&lab)?;
            lab::nginx(&server, name, Nginx::default())?;
            let requests = lab::http_load(&client, "http://10.1.0.11/", 50, 2)?;
            let backends =
                lab::backends(&requests).into_iter().map(|(name, count)| format!("{name}: {count}"));
            Ok((lab.dir().to_owned(), backends.collect()))
        })
    });
    let [left, right] = names.map(|thread| thread.join().unwrap());
    let ((left_dir, left), (right_dir, right)) = (left?, right?);
    assert_eq!([left.as_str(), right.as_str()], ["left: 50", "right: 50"]);
    assert_ne!(left_dir, right_dir);
    assert_eq!([remains(&left_dir), remains(&right_dir)].concat(), Vec::<String>::new());
    Ok(())
}

/// It takes a third of a second; the limit leaves room for a machine that is busy with other tests.
#[test]
fn a_lab_of_five_hosts_is_up_within_seconds() -> Result<()> {
    let Some(lab) = lab("speed")? else { return Ok(()) };
    let begin = Instant::now();
    for number in 1..=5 {
        lab.host(
            &format!("host{number}"),
            &[&format!("10.1.0.{number}/16"), &format!("fd00:1::{number}/64")],
        )?;
    }
    let up = begin.elapsed();
    drop(lab);
    println!("up after {up:?}, gone after another {:?}", begin.elapsed() - up);
    assert!(up < 3 * SECOND, "{up:?}");
    Ok(())
}

/// Tells a child of a test, which is the same program, what to do.
const CHILD: &str = "XLB_LAB_TEST_CHILD";

/// Runs in a process of its own for the tests below, which say how it ends.
#[test]
#[ignore = "a part of other tests"]
fn child() -> Result<()> {
    let Ok(task) = std::env::var(CHILD) else { return Ok(()) };
    lab::clean_up_on_signals()?;
    let lab = lab(&task)?.context("skipped")?;
    populate(&lab)?;
    if task == "keep" {
        lab.keep()?;
    }
    println!("\nlab {}", lab.dir().display());
    thread::sleep(60 * SECOND);
    Ok(())
}

/// Starts [`child`] and waits until its lab is there.
fn start_child(task: &str) -> Result<(lab_child::Child, PathBuf)> {
    let mut child = lab_child::Child::start(task)?;
    let dir = child.lab_dir()?;
    assert!(remains(&dir).len() >= 6, "{:?}", remains(&dir));
    Ok((child, dir))
}

mod lab_child {
    use super::*;
    use std::io::{BufRead, BufReader};

    pub struct Child(std::process::Child);

    impl Child {
        pub fn start(task: &str) -> Result<Self> {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["--ignored", "--exact", "child", "--nocapture"]).env(CHILD, task);
            Ok(Self(command.stdout(Stdio::piped()).spawn()?))
        }

        pub fn lab_dir(&mut self) -> Result<PathBuf> {
            let stdout = self.0.stdout.take().context("stdout")?;
            for line in BufReader::new(stdout).lines() {
                if let Some(dir) = line?.strip_prefix("lab ") {
                    return Ok(dir.into());
                }
            }
            anyhow::bail!("the child made no lab")
        }

        pub fn end(mut self, signal: Signal) -> Result<std::process::ExitStatus> {
            rustix::process::kill_process(rustix::process::Pid::from_child(&self.0), signal)?;
            Ok(self.0.wait()?)
        }
    }

    impl Drop for Child {
        fn drop(&mut self) {
            self.0.kill().ok();
            self.0.wait().ok();
        }
    }
}

#[test]
fn a_signal_removes_the_labs_of_its_process() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    for signal in [Signal::INT, Signal::TERM] {
        let (child, dir) = start_child("signal")?;
        let status = child.end(signal)?;
        assert_eq!(status.code(), Some(128 + signal.as_raw()));
        assert_eq!(remains(&dir), Vec::<String>::new());
    }
    Ok(())
}

#[test]
fn a_killed_process_leaves_a_lab_that_the_next_one_removes() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let (child, dir) = start_child("killed")?;
    child.end(Signal::KILL)?;
    // Labs of other tests may sweep before this one does; that it stays meanwhile is not promised.
    drop(lab("sweeper")?);
    assert_eq!(remains(&dir), Vec::<String>::new());
    Ok(())
}

#[test]
fn a_kept_lab_stays_until_it_is_removed_on_purpose() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let (child, dir) = start_child("keep")?;
    assert!(lab::remove_kept(&dir).is_err(), "its process runs");
    child.end(Signal::TERM)?;
    drop(lab("sweeper")?);
    assert!(lab::kept()?.contains(&dir));
    let kept: HashSet<String> = remains(&dir).into_iter().collect();
    assert!(kept.len() >= 6, "{kept:?}");
    lab::remove_kept(&dir)?;
    assert_eq!(remains(&dir), Vec::<String>::new());
    Ok(())
}
