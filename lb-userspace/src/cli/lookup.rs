//! `xlb lookup`: asks the agent, or the pinned maps if there is none, what becomes of a flow or of given frames.

use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};

use super::{Format, RunDir, capture, exit, explained};
use crate::api::{Client, ClientError};
use crate::bpf::{BpfFs, Maps};
use crate::config::model::Protocol;
use crate::lookup::{Explanation, Given, Query, explain, first_frame, interfaces};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The client, as ADDRESS:PORT or [ADDRESS]:PORT
    #[arg(value_name = "SRC:PORT", requires = "vip", required_unless_present_any = ["hex", "pcap"])]
    source: Option<SocketAddr>,
    /// The service, as ADDRESS:PORT or [ADDRESS]:PORT
    #[arg(value_name = "VIP:PORT")]
    vip: Option<SocketAddr>,
    #[arg(short, long, value_parser = protocol, default_value = "tcp", value_name = "tcp|udp")]
    protocol: Protocol,
    /// Explain a frame: hex digits from the Ethernet header on; `-` reads them from standard input
    #[arg(long, value_name = "FRAME", conflicts_with_all = ["source", "vip", "protocol", "pcap"])]
    hex: Option<String>,
    /// Explain the packets of a capture, pcap or pcapng; `-` reads it from standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["source", "vip", "protocol"])]
    pcap: Option<PathBuf>,
    /// Packets of the capture that are explained
    #[arg(
        long, value_name = "N", default_value = "100", conflicts_with_all = ["hex", "source"],
        value_parser = clap::value_parser!(u32).range(1..=100_000)
    )]
    limit: u32,
    /// Where it comes in; by default the first interface that xlb is on
    #[arg(short, long, value_name = "NAME")]
    interface: Option<String>,
    /// Every step for each packet of a capture, not one line
    #[arg(short, long, conflicts_with_all = ["hex", "source"])]
    verbose: bool,
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
    #[command(flatten)]
    run_dir: RunDir,
}

fn protocol(text: &str) -> Result<Protocol, String> {
    Protocol::ALL.iter().find(|p| p.as_str() == text).copied().ok_or_else(|| "use tcp or udp".to_owned())
}

/// What is asked.
struct Asked {
    frames: Vec<Given>,
    /// One frame that stands for a flow.
    flow: bool,
    /// What is to be said of frames that are not explained.
    notes: Vec<String>,
    /// Frames are missing that should be there.
    cut: bool,
}

impl Asked {
    fn of(arguments: &Arguments) -> anyhow::Result<Self> {
        let (notes, cut) = (Vec::new(), false);
        if let Some(hex) = &arguments.hex {
            let frame = frame(hex).context("--hex")?;
            return Ok(Self { frames: vec![frame], flow: false, notes, cut });
        }
        if let Some(file) = &arguments.pcap {
            return Self::captured(file, arguments.limit as usize);
        }
        let (Some(source), Some(vip)) = (arguments.source, arguments.vip) else {
            bail!("name a flow (SRC:PORT VIP:PORT), --hex or --pcap");
        };
        let query = Query { source, vip, protocol: arguments.protocol };
        let frame = first_frame(&query).map_err(anyhow::Error::msg)?;
        Ok(Self { frames: vec![frame], flow: true, notes, cut })
    }

    fn captured(file: &Path, limit: usize) -> anyhow::Result<Self> {
        let capture::Capture { frames, left, cut } = capture::read(file, limit)?;
        let mut notes = Vec::new();
        if left > 0 {
            notes.push(format!("{left} more packets are in {}; --limit takes more", file.display()));
        }
        if cut {
            let whole = frames.len() + left;
            notes.push(format!(
                "{} ends within packet {}, as if it was copied while tcpdump wrote it; end tcpdump with Ctrl-C first",
                file.display(),
                whole + 1
            ));
        }
        Ok(Self { frames, flow: false, notes, cut })
    }
}

fn frame(hex: &str) -> anyhow::Result<Given> {
    if hex != "-" {
        return Ok(Given::from_hex(hex)?);
    }
    let mut text = String::new();
    // Three characters a byte, and some blanks.
    std::io::stdin().take(1 << 20).read_to_string(&mut text).context("standard input is no text")?;
    Ok(Given::from_hex(&text)?)
}

/// Ends with success if a backend takes each frame, or its sender gets an answer.
pub async fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let asked = Asked::of(arguments)?;
    let run_dir = &arguments.run_dir.run_dir;
    let interface = arguments.interface.as_deref();
    let told = match Client::new(run_dir).lookup(&asked.frames, interface).await {
        Ok(told) => told,
        Err(not_running @ ClientError::NotRunning { .. }) => {
            from_pins(run_dir, &asked.frames, interface).context(not_running)?
        }
        Err(error) => return Err(error.into()),
    };
    match (arguments.output, &told[..]) {
        (Format::Json, [told]) if asked.flow => say!("{}", serde_json::to_string_pretty(told)?),
        (Format::Json, told) => say!("{}", serde_json::to_string_pretty(told)?),
        (Format::Table, [told]) => say!("{}", explained::whole(told)),
        (Format::Table, told) => say!("{}", explained::list(told, arguments.verbose)),
    }
    for note in &asked.notes {
        eprintln!("{note}");
    }
    let taken = !asked.cut && told.iter().all(Explanation::is_taken);
    Ok(if taken { ExitCode::SUCCESS } else { ExitCode::from(exit::FAILURE) })
}

/// The maps that a dead agent left; what the configuration calls things died with it.
fn from_pins(run_dir: &Path, frames: &[Given], interface: Option<&str>) -> anyhow::Result<Vec<Explanation>> {
    let fs = BpfFs::existing(run_dir)?.context("and nothing is pinned there")?;
    let image = Maps::from_pins(&fs)?.image()?;
    let ingress = match interface {
        None => 0,
        Some(name) => {
            let known = interfaces::index(name).filter(|index| image.interfaces.contains_key(index));
            known.with_context(|| {
                let names = interfaces::names(image.interfaces.keys().copied());
                format!("xlb is not on an interface {name}; name one that it is on: {names}")
            })?
        }
    };
    eprintln!("no agent answers; reading the pinned maps (names are not known)");
    let mut told: Vec<_> = frames.iter().map(|given| explain(&image, given, ingress)).collect();
    interfaces::put_names(&mut told);
    Ok(told)
}
