//! Offloads of an interface. Generic receive offload is off while a program runs in generic mode, which would see
//! merged super-frames that no path takes; transmit checksums are off where XDP gets what the stack sends.

#![allow(unsafe_code, reason = "the ethtool ioctl has no safe wrapper")]

use std::io;
use std::os::fd::AsRawFd;

const SIOCETHTOOL: libc::Ioctl = 0x8946;
const ETHTOOL_STXCSUM: u32 = 0x17;
const ETHTOOL_GGRO: u32 = 0x2b;
const ETHTOOL_SGRO: u32 = 0x2c;

/// `struct ethtool_value` of the kernel's uapi.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// Whether GRO is on.
pub fn gro(interface: &str) -> io::Result<bool> {
    call(interface, ETHTOOL_GGRO, 0).map(|data| data != 0)
}

pub fn set_gro(interface: &str, on: bool) -> io::Result<()> {
    call(interface, ETHTOOL_SGRO, u32::from(on)).map(drop)
}

pub fn set_transmit_checksums(interface: &str, on: bool) -> io::Result<()> {
    call(interface, ETHTOOL_STXCSUM, u32::from(on)).map(drop)
}

fn call(interface: &str, command: u32, data: u32) -> io::Result<u32> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    // SAFETY: all zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if interface.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    let mut value = Value { command, data };
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the request names a null-terminated interface and points to a Value that outlives the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(value.data) }
}
