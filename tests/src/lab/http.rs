//! HTTP clients: curl, with a connection for every request, and what became of each.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::process::{Pid, Signal, kill_process_group};

use super::command::{output, start};
use super::host::Host;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// What a server said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    pub status: u16,
    pub body: String,
}

/// One request of a load.
#[derive(Clone, Debug)]
pub struct Request {
    /// Computed from the end, which is when curl's report was read: late by a scheduling delay at worst.
    pub start: Instant,
    /// As curl measured it.
    pub duration: Duration,
    /// A response of any status, or curl's words for why there is none.
    pub result: Result<Response, String>,
}

impl Request {
    /// The body of a 200 response, trimmed: the name of the backend that answered.
    pub fn backend(&self) -> Option<&str> {
        match &self.result {
            Ok(response) if response.status == 200 => Some(response.body.trim_end()),
            _ => None,
        }
    }
}

/// Gets a URL once; connecting may take a second. The status and the body, or why there is none.
pub fn http_get(host: &Host, url: &str) -> Result<(u16, String)> {
    http_get_within(host, url, CONNECT_TIMEOUT, Duration::from_secs(10))
}

/// Gets a URL once, within the given times for connecting and for everything.
pub fn http_get_within(host: &Host, url: &str, connect: Duration, total: Duration) -> Result<(u16, String)> {
    let mut curl = host.exec(["curl", "-q"]);
    curl.args(["--silent", "--show-error", "--noproxy", "*", "--globoff", "--write-out", "\n%{http_code}"]);
    curl.args(["--connect-timeout", &seconds(connect), "--max-time", &seconds(total), url]);
    let output = output(&mut curl, None)?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("host {}: {url}: {}", host.name(), stderr.trim());
    }
    let stdout = String::from_utf8_lossy(&output.stdout);
    let (body, status) = stdout.rsplit_once('\n').context("curl printed no status")?;
    Ok((status.parse().with_context(|| format!("status {status:?}"))?, body.to_owned()))
}

/// Sends `requests` GETs from `parallel` clients that each have one connection at a time, and returns what became of
/// each, in the order of their starts.
pub fn http_load(host: &Host, url: &str, requests: u32, parallel: u32) -> Result<Vec<Request>> {
    HttpLoad::new(url, requests).parallel(parallel).start(host)?.finish()
}

/// A load of at most so many requests.
#[derive(Clone, Debug)]
pub struct HttpLoad {
    url: String,
    requests: u32,
    parallel: u32,
    rate: Option<u32>,
    connect_timeout: Duration,
    max_time: Duration,
}

impl HttpLoad {
    /// Requests for `url?1`, `url?2`, ...: the URL has no query of its own.
    pub fn new(url: &str, requests: u32) -> Self {
        Self {
            url: url.to_owned(),
            requests,
            parallel: 1,
            rate: None,
            connect_timeout: CONNECT_TIMEOUT,
            max_time: Duration::from_secs(10),
        }
    }

    /// Clients that send at the same time, each one request after the other.
    pub fn parallel(mut self, clients: u32) -> Self {
        self.parallel = clients;
        self
    }

    /// At most so many requests per second and client. Without it, a client sends as soon as it has its answer.
    pub fn rate(mut self, per_second_and_client: u32) -> Self {
        self.rate = Some(per_second_and_client);
        self
    }

    /// How long a request may take until it is connected, and altogether.
    pub fn timeouts(mut self, connect: Duration, total: Duration) -> Self {
        (self.connect_timeout, self.max_time) = (connect, total);
        self
    }

    /// Starts the clients in a host.
    pub fn start(&self, host: &Host) -> Result<RunningLoad> {
        ensure!(self.parallel > 0 && self.requests > 0, "a load of no requests");
        let (sender, results) = mpsc::channel();
        // Made first: dropping it kills the clients that run already when a later one cannot start.
        let stderr = host.new_file("curl.log");
        let mut load = RunningLoad { clients: Vec::new(), results, expected: self.requests, stderr };
        let clients = self.parallel.min(self.requests);
        for client in 0..clients {
            // As even as it gets: the first ones take one request more.
            let requests = self.requests / clients + u32::from(client < self.requests % clients);
            let mut child = self.start_client(host, requests, &load.stderr)?;
            let stdout = child.stdout.take().context("curl has no stdout")?;
            load.clients.push(child);
            let sender = sender.clone();
            thread::spawn(move || read_results(stdout, |request| sender.send(request).is_ok()));
        }
        Ok(load)
    }

    /// Runs the load for a time, or until its requests are used up.
    pub fn run_for(&self, host: &Host, duration: Duration) -> Result<Vec<Request>> {
        let load = self.start(host)?;
        thread::sleep(duration);
        load.stop()
    }

    fn start_client(&self, host: &Host, requests: u32, stderr: &Path) -> Result<Child> {
        // One curl takes one URL after the other, so body and report of a request stand together in its output; with
        // line buffering each report arrives when the request ends.
        let mut curl = host.exec(["stdbuf", "--output=L", "curl", "-q"]);
        curl.args(["--silent", "--noproxy", "*", "--header", "Connection: close", "--write-out", REPORT]);
        curl.args([
            "--connect-timeout",
            &seconds(self.connect_timeout),
            "--max-time",
            &seconds(self.max_time),
        ]);
        if let Some(rate) = self.rate {
            curl.args(["--rate", &format!("{rate}/s")]);
        }
        curl.arg(format!("{}?[1-{requests}]", self.url));
        let stderr = File::options().create(true).append(true).open(stderr);
        start(curl.stdout(Stdio::piped()).stderr(stderr.context("a log for curl")?))
    }
}

/// A load that is being sent; dropping it stops it.
pub struct RunningLoad {
    clients: Vec<Child>,
    results: Receiver<Request>,
    expected: u32,
    stderr: PathBuf,
}

impl RunningLoad {
    /// Waits until every request is done.
    pub fn finish(self) -> Result<Vec<Request>> {
        let requests = sorted(self.results.iter().collect());
        let (count, expected) = (requests.len(), self.expected);
        ensure!(
            count == expected as usize,
            "curl reported {count} of {expected} requests: {}",
            self.stderr()
        );
        Ok(requests)
    }

    /// Ends the load now. Requests without a result are given up and not among those returned; it is an error if there
    /// is none.
    pub fn stop(mut self) -> Result<Vec<Request>> {
        self.kill();
        let requests = sorted(self.results.iter().collect());
        ensure!(!requests.is_empty(), "curl reported no request: {}", self.stderr());
        Ok(requests)
    }

    /// What curl says of itself, not of requests: a wrong argument, say.
    fn stderr(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// Whether all clients have sent all they had to.
    pub fn is_done(&mut self) -> bool {
        self.clients.iter_mut().all(|client| matches!(client.try_wait(), Ok(Some(_))))
    }

    fn kill(&mut self) {
        for client in &mut self.clients {
            if let Ok(None) = client.try_wait() {
                kill_process_group(Pid::from_child(client), Signal::KILL).ok();
                client.wait().ok();
            }
        }
    }
}

impl Drop for RunningLoad {
    fn drop(&mut self) {
        self.kill();
    }
}

/// How many 200 responses each backend gave.
pub fn backends(requests: &[Request]) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    for backend in requests.iter().filter_map(Request::backend) {
        *counts.entry(backend).or_default() += 1;
    }
    counts
}

/// The requests that got no 200 response.
pub fn failures(requests: &[Request]) -> Vec<&Request> {
    requests.iter().filter(|request| request.backend().is_none()).collect()
}

fn sorted(mut requests: Vec<Request>) -> Vec<Request> {
    requests.sort_by_key(|request| request.start);
    requests
}

/// Begins the line that curl prints after each request; no body of a test has it.
const MARK: &str = "\u{1e}request ";

/// What curl prints after each request, on a line of its own: exit code, status, seconds, and its error if any.
const REPORT: &str = "\n\u{1e}request %{exitcode} %{http_code} %{time_total} %{errormsg}\n";

/// Reads what one client prints, until its end or until `take` wants no more.
fn read_results(output: ChildStdout, mut take: impl FnMut(Request) -> bool) {
    let mut reader = BufReader::new(output);
    let mut body = Vec::new();
    loop {
        let mut line = Vec::new();
        // Reading ends with the program; a report that it did not finish is no result.
        let Ok(1..) = reader.read_until(b'\n', &mut line) else { return };
        let end = Instant::now();
        let Some(report) = line.strip_prefix(MARK.as_bytes()) else {
            body.append(&mut line);
            continue;
        };
        // The report's own line break.
        body.pop();
        let text = String::from_utf8_lossy(&std::mem::take(&mut body)).into_owned();
        let request = parse_report(&String::from_utf8_lossy(report), text, end);
        if !take(request.unwrap_or_else(|error| panic!("curl's report: {error:#}"))) {
            // Nobody listens; the client goes on until it is killed, so its output is read on.
            std::io::copy(&mut reader.by_ref(), &mut std::io::sink()).ok();
            return;
        }
    }
}

fn parse_report(report: &str, body: String, end: Instant) -> Result<Request> {
    let mut words = report.trim_end().splitn(4, ' ');
    let mut word = || words.next().ok_or_else(|| anyhow!("{report:?} is too short"));
    let exit_code: u32 = word()?.parse().context("exit code")?;
    let status = word()?.parse().context("status")?;
    let duration = Duration::try_from_secs_f64(word()?.parse().context("seconds")?).context("seconds")?;
    let error = words.next().unwrap_or_default();
    let result = match exit_code {
        0 => Ok(Response { status, body }),
        _ => Err(format!("curl error {exit_code}: {error}")),
    };
    Ok(Request { start: end.checked_sub(duration).unwrap_or(end), duration, result })
}

/// As curl takes times: with a decimal point.
fn seconds(duration: Duration) -> String {
    format!("{:.3}", duration.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_of_success_has_status_and_body() {
        let end = Instant::now() + Duration::from_secs(60);
        let request = parse_report("0 200 0.001500 \n", "web1\n".into(), end).unwrap();
        assert_eq!(request.backend(), Some("web1"));
        assert_eq!(request.duration, Duration::from_micros(1500));
        assert_eq!(request.start, end - Duration::from_micros(1500));
    }

    #[test]
    fn a_report_of_failure_has_curls_words() {
        let report = "7 000 0.000200 Failed to connect to 10.1.0.9 port 80: Connection refused\n";
        let request = parse_report(report, String::new(), Instant::now()).unwrap();
        let expected = "curl error 7: Failed to connect to 10.1.0.9 port 80: Connection refused";
        assert_eq!(request.result, Err(expected.to_owned()));
        assert_eq!(request.backend(), None);
    }

    #[test]
    fn a_report_of_another_form_is_an_error() {
        for report in ["", "0", "0 200", "0 200 x", "0 200 -1.0 ", "zero 200 0.1 "] {
            assert!(parse_report(report, String::new(), Instant::now()).is_err(), "{report:?}");
        }
    }
}
