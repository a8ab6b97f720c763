//! Real servers for labs: nginx, dnsmasq, iperf3, and the addresses of a backend that answers clients directly.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::command::write_sysctl;
use super::host::Host;
use super::process::Process;

/// How long a server may take from its start to its first connection.
const START_TIMEOUT: Duration = Duration::from_secs(5);

/// The name that every lab's DNS server answers for.
const WHO: &str = "who.xlb.test";

/// A name with an answer that fills a packet of 1500 bytes.
const LONG: &str = "long.xlb.test";
const LONG_STRINGS: usize = 6;
const LONG_STRING: &str = "0123456789abcdefghijklmnopqrstuvwxyz0123456789abcdefghijklmnopqrstuvwxyz\
    0123456789abcdefghijklmnopqrstuvwxyz0123456789abcdefghijklmnopqrstuvwxyz\
    0123456789abcdefghijklmnopqrstuvwxyz0123456789abcdefghijklmnopqrstuvwxyz";

/// Makes a host a direct-server-return backend: it has the VIPs (`203.0.113.10`, `2001:db8::10`) on `lo`, but neither
/// answers ARP for them nor shows them in its own, and no reverse path filter drops what comes out of a tunnel.
pub fn backend_dsr(host: &Host, vips: &[&str]) -> Result<()> {
    let interfaces = host.interfaces();
    host.inside(|| {
        write_sysctl("net/ipv4/conf/all/arp_ignore", "1")?;
        write_sysctl("net/ipv4/conf/all/arp_announce", "2")?;
        // The larger of `all` and the interface's counts.
        for name in ["all", "default", "lo"].into_iter().chain(interfaces.iter().map(|i| i.name.as_str())) {
            write_sysctl(&format!("net/ipv4/conf/{name}/rp_filter"), "0")?;
        }
        anyhow::Ok(())
    })??;
    for vip in vips {
        let length = if vip.contains(':') { 128 } else { 32 };
        host.add_address(&format!("{vip}/{length}"), "lo")?;
    }
    Ok(())
}

/// What an nginx of the lab serves.
#[derive(Clone, Debug)]
pub struct Nginx {
    pub ports: Vec<u16>,
    /// Size of `/big`. Its content is 64-bit little-endian words that count from 0, so that any part out of place shows.
    pub big_megabytes: u32,
    /// Whether a connection takes request after request.
    pub keepalive: bool,
}

impl Default for Nginx {
    fn default() -> Self {
        Self { ports: vec![80], big_megabytes: 8, keepalive: false }
    }
}

/// A running nginx.
#[derive(Clone)]
pub struct NginxServer {
    pub process: Process,
    /// Where `/up/NAME` is kept.
    pub uploads: PathBuf,
    healthy: PathBuf,
}

impl NginxServer {
    /// Makes `/healthz` answer 200, as at the start, or 503; everything else is served on.
    pub fn set_healthy(&self, healthy: bool) -> Result<()> {
        let path = &self.healthy;
        if healthy { fs::write(path, "") } else { fs::remove_file(path) }
            .with_context(|| path.display().to_string())
    }
}

/// Starts nginx on all addresses of a host and waits until it accepts connections. `/` returns `name` and a newline,
/// `/ends` address and port of the client and of the server as nginx sees them, `/healthz` 200 or 503, `/big` a large file; `/up/NAME` takes what is PUT there. Every request has a connection of its
/// own, unless `keepalive` is asked for. It is one process, so that a signal (SIGSTOP, say) meets all of it.
pub fn nginx(host: &Host, name: &str, options: Nginx) -> Result<NginxServer> {
    let dir = host.new_file("nginx");
    fs::create_dir(&dir).with_context(|| dir.display().to_string())?;
    let healthy = dir.join("healthy");
    fs::write(&healthy, "").with_context(|| healthy.display().to_string())?;
    let big = big_file(host.dir(), options.big_megabytes)?;
    let uploads = dir.join("up");
    fs::create_dir(&uploads).with_context(|| uploads.display().to_string())?;
    let listen: String =
        options.ports.iter().map(|port| format!("listen 0.0.0.0:{port}; listen [::]:{port};\n")).collect();
    let config = format!(
        r#"daemon off;
master_process off;
error_log stderr;
pid {dir}/pid;
events {{ worker_connections 1000; }}
http {{
    access_log off;
    default_type text/plain;
    keepalive_timeout {keepalive};
    keepalive_requests 1000000000;
    client_body_temp_path {dir}/body;
    proxy_temp_path {dir}/proxy;
    fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi;
    scgi_temp_path {dir}/scgi;
    server {{
        {listen}
        location = / {{ return 200 "{name}\n"; }}
        location = /ends {{ return 200 "$remote_addr $remote_port $server_addr $server_port\n"; }}
        location = /healthz {{
            if (!-f {healthy}) {{ return 503 "unhealthy\n"; }}
            return 200 "healthy\n";
        }}
        location = /big {{ alias {big}; }}
        location /up/ {{
            alias {uploads}/;
            dav_methods PUT;
            client_max_body_size 100m;
        }}
    }}
}}
"#,
        keepalive = if options.keepalive { 60 } else { 0 },
        dir = dir.display(),
        healthy = healthy.display(),
        big = big.display(),
        uploads = uploads.display(),
    );
    let file = dir.join("nginx.conf");
    fs::write(&file, config).with_context(|| file.display().to_string())?;
    let process = host.spawn([
        "nginx".as_ref(),
        "-e".as_ref(),
        "stderr".as_ref(),
        "-p".as_ref(),
        dir.as_os_str(),
        "-c".as_ref(),
        file.as_os_str(),
    ])?;
    for port in options.ports {
        wait_until_listening(host, &process, port)?;
    }
    Ok(NginxServer { process, uploads, healthy })
}

/// The lab's file for `/big`, one for each size.
fn big_file(dir: &Path, megabytes: u32) -> Result<PathBuf> {
    let path = dir.join(format!("big-{megabytes}"));
    if !path.exists() {
        // Under the temporary name until it is complete: hosts may be set up in parallel.
        let unfinished = dir.join(format!("big-{megabytes}-{:?}", std::thread::current().id()));
        write_big_file(&unfinished, megabytes).with_context(|| unfinished.display().to_string())?;
        fs::rename(&unfinished, &path).with_context(|| path.display().to_string())?;
    }
    Ok(path)
}

fn write_big_file(path: &Path, megabytes: u32) -> std::io::Result<()> {
    let mut file = BufWriter::with_capacity(1 << 16, File::create(path)?);
    for word in 0..u64::from(megabytes) << 17 {
        file.write_all(&word.to_le_bytes())?;
    }
    file.flush()
}

/// Starts dnsmasq on all addresses of a host, over UDP and TCP, and waits until it answers: `who.xlb.test` has `name` as
/// its TXT record and the host's own addresses as A and AAAA; `long.xlb.test` has a long TXT record. It replies from the address that was asked.
pub fn dns(host: &Host, name: &str) -> Result<Process> {
    let mut record = format!("--host-record={WHO}");
    for ipv6 in [false, true] {
        if let Ok(address) = host.address(ipv6) {
            record = format!("{record},{address}");
        }
    }
    let txt = format!("--txt-record={WHO},{name}");
    let long = format!("--txt-record={LONG},{}", [LONG_STRING; LONG_STRINGS].join(","));
    let process = host.spawn([
        "dnsmasq",
        "--keep-in-foreground",
        "--log-facility=-",
        "--conf-file=/dev/null",
        "--pid-file=",
        "--user=root",
        "--no-resolv",
        "--no-hosts",
        "--cache-size=0",
        "--edns-packet-max=4096",
        &txt,
        &long,
        &record,
    ])?;
    wait_until_listening(host, &process, 53)?;
    Ok(process)
}

/// Starts an iperf3 server on all addresses of a host and waits until it listens.
pub fn iperf3_server(host: &Host) -> Result<Process> {
    // A connection to try it would count as a client; it says that it listens, at once if it may not buffer.
    let process = host.spawn(["iperf3", "--server", "--forceflush"])?;
    process.wait_for_log("Server listening", START_TIMEOUT)?;
    Ok(process)
}

/// Starts an iperf3 server on one address of a host, the VIP say: over UDP one that listens on all answers from another.
pub fn iperf3_server_at(host: &Host, address: &str) -> Result<Process> {
    let process = host.spawn(["iperf3", "--server", "--forceflush", "--bind", address])?;
    process.wait_for_log("Server listening", START_TIMEOUT)?;
    Ok(process)
}

fn wait_until_listening(host: &Host, process: &Process, port: u16) -> Result<()> {
    process.wait_until(&format!("a listener on port {port}"), START_TIMEOUT, || {
        matches!(host.inside(|| TcpStream::connect(("127.0.0.1", port))), Ok(Ok(_)))
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Udp,
    Tcp,
}

/// Asks a lab's DNS server by dig who it is, once, for at most a second.
pub fn dns_who(client: &Host, server: &str, transport: Transport) -> Result<String> {
    let transport = match transport {
        Transport::Udp => "+notcp",
        Transport::Tcp => "+tcp",
    };
    let server = format!("@{server}");
    let answer = client.run(["dig", "+short", "+tries=1", "+time=1", transport, &server, WHO, "TXT"])?;
    Ok(answer.trim().trim_matches('"').to_owned())
}

/// Asks a lab's DNS server for its long answer over UDP from an address, again when there is none; how long it is, in
/// bytes.
pub fn dns_long(client: &Host, from: &str, server: &str) -> Result<usize> {
    let server = format!("@{server}");
    let answer = client.run([
        "dig",
        "-b",
        from,
        "+short",
        "+ignore",
        "+bufsize=4096",
        "+tries=6",
        "+time=1",
        &server,
        LONG,
        "TXT",
    ])?;
    // A try that was lost is told of on lines of its own.
    let strings = answer.split_whitespace().filter(|string| string.trim_matches('"') == LONG_STRING);
    Ok(strings.count() * LONG_STRING.len())
}
