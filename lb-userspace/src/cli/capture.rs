//! Frames out of a capture file, pcap or pcapng. Knows not what they are for.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, bail};
use pcap_parser::{Block, Linktype, PcapBlockOwned, PcapError, create_reader};

use crate::lookup::Given;

/// What a capture holds.
#[derive(Debug)]
pub struct Capture {
    /// Those up to the limit.
    pub frames: Vec<Given>,
    /// How many there are beyond it.
    pub left: usize,
    /// The file ends within a packet.
    pub cut: bool,
}

/// The longest block of a file that is taken, bytes.
const LONGEST_BLOCK: usize = 1 << 20;

const CURE: &str = "make it with `tcpdump -i eth0 -w FILE`";

/// Reads a file, or standard input where it is `-`.
pub fn read(path: &Path, limit: usize) -> anyhow::Result<Capture> {
    let name = path.display();
    let capture = if path.as_os_str() == "-" {
        read_from(std::io::stdin(), limit)
    } else {
        read_from(File::open(path).with_context(|| format!("{name} cannot be opened"))?, limit)
    };
    capture.with_context(|| name.to_string())
}

fn read_from(source: impl Read + Send, limit: usize) -> anyhow::Result<Capture> {
    let mut reader = match create_reader(LONGEST_BLOCK, source) {
        Ok(reader) => reader,
        Err(PcapError::Eof) => bail!("it is empty; {CURE}"),
        Err(PcapError::ReadError) => bail!("it cannot be read; name a file"),
        Err(PcapError::Incomplete(_)) => bail!("it ends within its header; {CURE}"),
        Err(_) => bail!("it is neither pcap nor pcapng; {CURE}"),
    };
    let mut packets = Packets { link_types: Vec::new(), limit, seen: 0, frames: Vec::new() };
    let mut cut = false;
    loop {
        let place = packets.seen + 1;
        match reader.next() {
            Ok((bytes, block)) => {
                packets.take(&block).with_context(|| format!("packet {place}"))?;
                reader.consume(bytes);
            }
            Err(PcapError::Eof) => break,
            Err(PcapError::Incomplete(_)) => {
                reader.refill().map_err(|_| anyhow::anyhow!("packet {place} cannot be read; try again"))?;
            }
            Err(PcapError::UnexpectedEof) => {
                cut = true;
                break;
            }
            Err(PcapError::BufferTooSmall) => {
                bail!("packet {place} is longer than {LONGEST_BLOCK} bytes; leave it out with editcap")
            }
            Err(_) => bail!("packet {place} is no packet: the file is damaged; {CURE}"),
        }
    }
    let Packets { frames, seen, .. } = packets;
    if frames.is_empty() {
        let why = if cut { "it ends within its first packet" } else { "there is no packet in it" };
        bail!("{why}; {CURE}");
    }
    Ok(Capture { left: seen - frames.len(), frames, cut })
}

/// The packets that were read.
struct Packets {
    /// Of the interfaces of a section, in their order; of a pcap file its one.
    link_types: Vec<Linktype>,
    limit: usize,
    seen: usize,
    frames: Vec<Given>,
}

impl Packets {
    fn take(&mut self, block: &PcapBlockOwned<'_>) -> anyhow::Result<()> {
        match block {
            PcapBlockOwned::LegacyHeader(header) => self.link_types = vec![header.network],
            PcapBlockOwned::Legacy(packet) => self.keep(0, packet.data, packet.origlen)?,
            PcapBlockOwned::NG(Block::SectionHeader(_)) => self.link_types.clear(),
            PcapBlockOwned::NG(Block::InterfaceDescription(interface)) => {
                self.link_types.push(interface.linktype);
            }
            PcapBlockOwned::NG(Block::EnhancedPacket(packet)) => {
                let bytes = packet.data.get(..packet.caplen as usize).unwrap_or(packet.data);
                self.keep(packet.if_id as usize, bytes, packet.origlen)?;
            }
            PcapBlockOwned::NG(Block::SimplePacket(packet)) => {
                let bytes = packet.data.get(..packet.origlen as usize).unwrap_or(packet.data);
                self.keep(0, bytes, packet.origlen)?;
            }
            // Statistics, names, comments.
            PcapBlockOwned::NG(_) => {}
        }
        Ok(())
    }

    fn keep(&mut self, interface: usize, bytes: &[u8], length: u32) -> anyhow::Result<()> {
        self.seen += 1;
        if self.frames.len() == self.limit {
            return Ok(());
        }
        let link_type =
            *self.link_types.get(interface).context("it names an interface that the file lacks")?;
        let mut frame = link_header(link_type, bytes)?;
        let length = frame.len() + length as usize;
        frame.extend_from_slice(bytes);
        self.frames.push(Given::new(frame, length)?);
        Ok(())
    }
}

/// What has to stand in front of a packet to make it an Ethernet frame.
fn link_header(link_type: Linktype, packet: &[u8]) -> anyhow::Result<Vec<u8>> {
    let ether_type = match (link_type, packet.first().map(|byte| byte >> 4)) {
        (Linktype::ETHERNET, _) => return Ok(Vec::new()),
        (Linktype::RAW | Linktype::IPV4, Some(4)) => [0x08, 0x00],
        (Linktype::RAW | Linktype::IPV6, Some(6)) => [0x86, 0xdd],
        (Linktype::RAW | Linktype::IPV4 | Linktype::IPV6, _) => {
            bail!("it is no IP packet; leave it out with editcap")
        }
        (Linktype::LINUX_SLL | Linktype::LINUX_SLL2, _) => {
            bail!(
                "`tcpdump -i any` keeps no Ethernet headers; capture on one interface: `tcpdump -i eth0 -w FILE`"
            )
        }
        (Linktype(other), _) => {
            bail!("link type {other} is neither Ethernet nor IP; capture on an Ethernet interface")
        }
    };
    let mut header = vec![0; 12];
    header.extend(ether_type);
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of some packets in one of the two formats.
    fn file(ng: bool, link_type: u32, packets: &[(&[u8], u32)]) -> Vec<u8> {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        let mut file = if ng {
            let mut start = words(&[0x0a0d_0d0a, 28, 0x1a2b_3c4d, 1, u32::MAX, u32::MAX, 28]);
            start.extend(words(&[1, 20, link_type, 0, 20]));
            start
        } else {
            words(&[0xa1b2_c3d4, 0x0004_0002, 0, 0, 65535, link_type])
        };
        for (bytes, length) in packets {
            let captured = bytes.len() as u32;
            if ng {
                let padded = bytes.len().next_multiple_of(4);
                let block = 32 + padded as u32;
                file.extend(words(&[6, block, 0, 0, 0, captured, *length]));
                file.extend_from_slice(bytes);
                file.resize(file.len() + padded - bytes.len(), 0);
                file.extend(words(&[block]));
            } else {
                file.extend(words(&[0, 0, captured, *length]));
                file.extend_from_slice(bytes);
            }
        }
        file
    }

    const PACKET: [u8; 21] = [0x45; 21];

    #[test]
    fn both_formats_give_the_frames_up_to_the_limit_and_count_the_rest() {
        for ng in [false, true] {
            let bytes = file(ng, 1, &[(&PACKET, 21), (&PACKET[..14], 1514), (&PACKET, 21)]);
            let capture = read_from(&bytes[..], 2).unwrap();
            let expected = [Given::new(PACKET.to_vec(), 21), Given::new(PACKET[..14].to_vec(), 1514)];
            assert_eq!(capture.frames, expected.map(Result::unwrap), "{ng}");
            assert_eq!((capture.left, capture.cut), (1, false), "{ng}");
        }
    }

    #[test]
    fn a_raw_packet_gets_an_ethernet_header() {
        for (link_type, first, ether_type) in
            [(101, 0x45, [8, 0]), (101, 0x60, [0x86, 0xdd]), (228, 0x45, [8, 0]), (229, 0x60, [0x86, 0xdd])]
        {
            let packet = [first; 20];
            let capture = read_from(&file(true, link_type, &[(&packet, 20)])[..], 9).unwrap();
            let mut expected = vec![0; 12];
            expected.extend(ether_type);
            expected.extend(packet);
            assert_eq!(capture.frames, [Given::new(expected, 34).unwrap()]);
        }
    }

    #[test]
    fn a_file_that_ends_within_a_packet_gives_those_before_it() {
        for ng in [false, true] {
            let whole = file(ng, 1, &[(&PACKET, 21), (&PACKET, 21)]);
            let capture = read_from(&whole[..whole.len() - 5], 9).unwrap();
            assert!(capture.frames.len() == 1 && capture.cut, "{ng}: {capture:?}");
        }
    }

    #[test]
    fn what_is_no_capture_is_refused_with_a_way_out() {
        let one = file(false, 1, &[(&PACKET, 21)]);
        let huge = file(true, 1, &[(&PACKET, 21), (&PACKET, 70_000)]);
        let rows: [(&str, Vec<u8>, &str); 9] = [
            ("nothing", Vec::new(), "it is empty; make it with"),
            ("text", b"GET / HTTP/1.1 and so on and so on".to_vec(), "neither pcap nor pcapng"),
            ("header only", file(true, 1, &[]), "no packet in it"),
            ("part of a header", one[..20].to_vec(), "ends within its header"),
            ("part of a packet", one[..30].to_vec(), "ends within its first packet"),
            ("any", file(false, 113, &[(&PACKET, 21)]), "packet 1: `tcpdump -i any` keeps no Ethernet"),
            ("802.11", file(true, 105, &[(&PACKET, 21)]), "packet 1: link type 105"),
            ("raw, but not IP", file(true, 101, &[(&[0; 20], 20)]), "packet 1: it is no IP packet"),
            ("huge", huge, "packet 2: the frame has 70000 bytes"),
        ];
        for (name, bytes, expected) in rows {
            let error = format!("{:#}", read_from(&bytes[..], 9).unwrap_err());
            assert!(error.contains(expected), "{name}: {error}");
        }
    }
}
