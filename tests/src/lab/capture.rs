//! What is on a wire: tcpdump, and tshark's questions to what it caught; it knows nothing of xlb.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::Signal;
use super::host::Host;
use super::process::Process;

/// How long tcpdump may take to begin and to end.
const PATIENCE: Duration = Duration::from_secs(20);

/// tcpdump that runs until it is ended.
pub struct Capture {
    process: Process,
    file: PathBuf,
    host: Host,
}

impl Capture {
    /// At a host's own end of its link: what its stack meets, after XDP.
    pub fn at_host(host: &Host) -> Result<Self> {
        Self::start(host, "eth0", Host::exec)
    }

    /// At the switch's end: what is on the wire.
    pub fn at_switch(host: &Host) -> Result<Self> {
        Self::start(host, &format!("{}-0", host.name()), Host::exec_at_switch)
    }

    fn start(host: &Host, interface: &str, exec: impl Fn(&Host, Vec<String>) -> Command) -> Result<Self> {
        let file = host.new_file("capture.pcap");
        let words = format!(
            "tcpdump -i {interface} --immediate-mode -U -s 2048 -B 32768 -Z root -w {}",
            file.display()
        );
        let words = words.split(' ').map(str::to_owned).collect();
        let process = host.spawn_command(&mut exec(host, words))?;
        process.wait_for_log("listening on", PATIENCE)?;
        Ok(Self { process, file, host: host.clone() })
    }

    pub fn end(&self) -> Result<()> {
        // The last packet may still be on its way.
        thread::sleep(Duration::from_millis(300));
        self.process.signal(Signal::INT)?;
        self.process.wait_exit(PATIENCE)?;
        ensure!(self.process.log().contains("0 packets dropped by kernel"), "{}", self.process.log());
        Ok(())
    }

    /// Writes the packets that a tshark filter takes to another file, in a format that tshark knows.
    pub fn write(&self, filter: &str, format: &str, file: &Path) -> Result<()> {
        let (from, to) = (self.file.to_string_lossy(), file.to_string_lossy());
        self.host.run(["tshark", "-n", "-r", &*from, "-Y", filter, "-F", format, "-w", &*to]).map(drop)
    }

    /// The fields of all packets that a tshark filter takes, the outermost of each kind.
    pub fn fields(&self, filter: &str, fields: &[&str]) -> Result<Vec<Vec<String>>> {
        let file = self.file.to_string_lossy();
        let mut words = vec!["tshark", "-n", "-r", &*file, "-Y", filter];
        for check in ["ip.check_checksum:TRUE", "tcp.check_checksum:TRUE", "udp.check_checksum:TRUE"] {
            words.extend(["-o", check]);
        }
        words.extend(["-T", "fields", "-E", "occurrence=f"]);
        fields.iter().for_each(|field| words.extend(["-e", field]));
        let output = self.host.exec(words).stderr(Stdio::piped()).output()?;
        ensure!(output.status.success(), "tshark: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(text.lines().map(|line| line.split('\t').map(str::to_owned).collect()).collect())
    }

    /// Refuses a wrong checksum in any layer of any packet.
    pub fn has_no_bad_checksum(&self) -> Result<()> {
        let fields = ["frame.number", "frame.protocols", "frame.len", "tcp.checksum", "ip.src", "ipv6.src"];
        // What an ICMP error carries of a packet is cut off, which tshark does not see. A sender that sums in software
        // writes 0xffff where the sum is 0 (seen on kernel 6.18), once in 65,536 packets: good to every receiver, bad
        // to tshark.
        let transport = "udp.checksum.status == 0 || (tcp.checksum.status == 0 && tcp.checksum != 0xffff)";
        let bad = format!(
            "ip.checksum.status == 0 || icmp.checksum.status == 0 || icmpv6.checksum.status == 0 \
             || (!icmp && !icmpv6 && ({transport}))"
        );
        let bad = self.fields(&bad, &fields)?;
        let who = self.process.to_string();
        ensure!(bad.is_empty(), "{who}: {} packets have a bad checksum: {:?}", bad.len(), bad.first());
        Ok(())
    }
}
