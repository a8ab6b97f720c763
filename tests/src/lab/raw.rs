//! Packets that no program sends by itself: ICMP messages byte by byte, and TCP with IP options; it knows nothing of what
//! becomes of them.

use std::ffi::c_int;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, ipproto, sendto, socket_with};

use super::host::Host;

/// How long a connection with options may take for anything.
const PATIENCE: Duration = Duration::from_secs(10);

/// A raw socket for ICMP messages of one family. The kernel puts the IP header in front.
pub struct IcmpSocket {
    socket: OwnedFd,
}

impl IcmpSocket {
    pub fn new(host: &Host, ipv6: bool) -> Result<Self> {
        let (family, protocol) =
            if ipv6 { (AddressFamily::INET6, ipproto::ICMPV6) } else { (AddressFamily::INET, ipproto::ICMP) };
        let socket =
            host.inside(|| socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(protocol)))?;
        Ok(Self { socket: socket.with_context(|| format!("host {}: a raw socket", host.name()))? })
    }

    /// Sends a message, its checksum in it; that of ICMPv6 is the kernel's work.
    pub fn send(&self, to: IpAddr, message: &[u8]) -> Result<()> {
        sendto(&self.socket, message, SendFlags::empty(), &SocketAddr::new(to, 0))
            .with_context(|| format!("an ICMP message to {to}"))?;
        Ok(())
    }
}

/// What stands between the IP header and the TCP header, as the kernel takes it.
#[derive(Clone, Copy, Debug)]
pub enum Options<'a> {
    /// For `IP_OPTIONS`.
    Ipv4(&'a [u8]),
    /// For `IPV6_DSTOPTS`, with the two bytes of the header.
    Destination(&'a [u8]),
}

/// Gets `/` over a connection whose every packet has these options; the whole answer.
pub fn http_get_with_options(host: &Host, server: SocketAddr, options: Options<'_>) -> Result<String> {
    let answer = host.inside(|| get(server, options))?;
    answer.with_context(|| format!("host {}: {server} with {options:?}", host.name()))
}

fn get(server: SocketAddr, options: Options<'_>) -> io::Result<String> {
    let family = if server.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    match options {
        Options::Ipv4(bytes) => set_option(&socket, libc::IPPROTO_IP, libc::IP_OPTIONS, bytes)?,
        Options::Destination(bytes) => set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_DSTOPTS, bytes)?,
    }
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    // Bounded by the write timeout as well (socket(7)).
    rustix::net::connect(&stream, &server)?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Makes a socket send IPv4 datagrams without a checksum.
pub fn send_without_checksum(socket: &UdpSocket) -> io::Result<()> {
    set_option(socket, libc::SOL_SOCKET, libc::SO_NO_CHECK, &1_i32.to_ne_bytes())
}

/// The options that neither `std` nor rustix know.
fn set_option(socket: &impl AsRawFd, level: c_int, name: c_int, value: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads `value.len()` bytes from a live slice and keeps no pointer.
    let code = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
