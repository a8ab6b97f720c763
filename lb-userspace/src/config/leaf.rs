//! Texts to values: one function for each kind of leaf. Knows neither places nor keys.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::time::Duration;

use super::model::{AtLeast, Group, Ports, ServerId, Vip};
use super::network;
use super::problem::show;
use super::read::{Wrong, did_you_mean};

type Leaf<T> = Result<T, Wrong>;

fn wrong<T>(message: impl Into<String>, hint: impl Into<String>) -> Leaf<T> {
    Err(Wrong { message: message.into(), hint: hint.into() })
}

fn not_allowed<T>(text: &str, hint: impl Into<String>) -> Leaf<T> {
    wrong(format!("{} is not allowed", show(text)), hint)
}

pub(super) fn boolean(text: &str) -> Leaf<bool> {
    match text {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => {
            let hint = match text.to_ascii_lowercase().as_str() {
                "yes" | "on" | "y" | "true" | "1" => "use true",
                "no" | "off" | "n" | "false" | "0" => "use false",
                _ => "use true or false",
            };
            not_allowed(text, hint)
        }
    }
}

/// A decimal number; `note` follows the range in the hint.
pub(super) fn number(text: &str, range: RangeInclusive<u32>, note: &str) -> Leaf<u32> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    // 010 is 8 to a YAML 1.1 reader and 10 to a YAML 1.2 reader.
    let octal = text.len() > 1 && text.starts_with('0');
    match text.parse() {
        Ok(number) if digits && !octal && range.contains(&number) => Ok(number),
        _ => not_allowed(text, format!("use {}-{}{note}", range.start(), range.end())),
    }
}

fn is_port(text: &str) -> bool {
    number(text, 1..=65535, "").is_ok()
}

pub(super) fn port(text: &str) -> Leaf<u16> {
    number(text, 1..=65535, "").map(|n| u16::try_from(n).unwrap_or(u16::MAX))
}

/// A port of a service, a range of them, or all.
pub(super) fn ports(text: &str) -> Leaf<Ports> {
    if text == "any" {
        return Ok(Ports::Any);
    }
    let Some((low, high)) = text.split_once('-').filter(|(low, high)| is_port(low) && is_port(high)) else {
        return match number(text, 1..=65535, ", a range such as 8000-8100, or any") {
            Ok(n) => Ok(Ports::Port(u16::try_from(n).unwrap_or(u16::MAX))),
            Err(wrong) => Err(wrong),
        };
    };
    match (port(low)?, port(high)?) {
        (low, high) if low < high => Ok(Ports::Range(low, high)),
        (low, high) if low == high => wrong(format!("{text} is one port"), format!("write {low}")),
        (low, high) => wrong(format!("{text} is an empty range"), format!("write {high}-{low}")),
    }
}

/// What a service answers to: an address that packets can be sent to, or a prefix of such.
pub(super) fn vip(text: &str) -> Leaf<Vip> {
    let Some((bare, length)) = text.split_once('/') else {
        return address(text).map(Vip::from);
    };
    if bare.parse::<IpAddr>().is_err() {
        return no_address(text).map(Vip::from);
    }
    let network = network::network(text, "an address, or a prefix such as 203.0.113.0/24", "VIPs")?;
    Vip::new(network).ok_or_else(|| Wrong {
        message: format!("/{length} is no prefix length of a VIP"),
        hint: "use a prefix such as 203.0.113.0/24".into(),
    })
}

pub(super) fn weight(text: &str) -> Leaf<u8> {
    number(text, 0..=100, " (0 takes no flows)").map(|n| u8::try_from(n).unwrap_or(100))
}

/// A part of all: a whole number with a percent sign.
pub(super) fn percent(text: &str, range: RangeInclusive<u32>) -> Leaf<u8> {
    let hint = format!("use {}%-{}%", range.start(), range.end());
    let Some(digits) = text.strip_suffix('%') else {
        return match number(text, range, "") {
            Ok(n) => wrong(format!("{n} has no percent sign"), format!("write {n}%")),
            Err(_) => not_allowed(text, hint),
        };
    };
    match number(digits, range, "") {
        Ok(n) => Ok(u8::try_from(n).unwrap_or(100)),
        Err(_) => not_allowed(text, hint),
    }
}

/// A number of backends, or a part of them.
pub(super) fn at_least(text: &str, most: u32) -> Leaf<AtLeast> {
    let found = match text.contains('%') {
        true => percent(text, 1..=100).map(AtLeast::Percent),
        false => number(text, 1..=most, "").map(AtLeast::Count),
    };
    found.or_else(|_| not_allowed(text, format!("use 1-{most}, or 1%-100%")))
}

/// The bytes of a server ID, in hex.
pub(super) fn server_id(text: &str) -> Leaf<ServerId> {
    let hint = "use 1-15 bytes in hex, such as \"0a01\"";
    if let Some(rest) = text.strip_prefix("0x").filter(|rest| server_id(rest).is_ok()) {
        return not_allowed(text, format!("leave out the 0x: {rest}"));
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let pair = |pair: &[u8]| match pair {
        [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
        _ => None,
    };
    let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(pair).collect();
    match bytes.and_then(ServerId::new) {
        Some(id) => Ok(id),
        None => not_allowed(text, hint),
    }
}

/// `slots:`, which tables take in units of the smallest of them.
pub(super) fn slots(text: &str) -> Leaf<u32> {
    const UNIT: u32 = 4096;
    let n = number(text, 8192..=134_217_728, " in steps of 4096")?;
    if n % UNIT == 0 {
        return Ok(n);
    }
    wrong(format!("{n} is not a multiple of {UNIT}"), format!("use {}", n.next_multiple_of(UNIT)))
}

/// One of the words of an enum.
pub(super) fn word<T: Copy>(text: &str, words: &[&'static str], all: &[T]) -> Leaf<T> {
    match words.iter().zip(all).find(|(word, _)| **word == text) {
        Some((_, value)) => Ok(*value),
        None => not_allowed(text, did_you_mean(text, words)),
    }
}

pub(super) fn seed(text: &str) -> Leaf<u64> {
    let hint = "use 1-16 hex digits, such as those of `openssl rand -hex 8`";
    let hex = (1..=16).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
    match u64::from_str_radix(text, 16) {
        Ok(seed) if hex => Ok(seed),
        _ => match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
            Some(rest) if seed(rest).is_ok() => not_allowed(text, format!("leave out the 0x: {rest}")),
            _ => not_allowed(text, hint),
        },
    }
}

/// What names a pool, a backend or a service.
pub(super) fn name(text: &str) -> Leaf<String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if (1..=63).contains(&text.len()) && text.chars().all(fits) {
        return Ok(text.to_owned());
    }
    not_allowed(text, "use 1-63 letters, digits, dots, dashes or underscores")
}

/// A group by name or number; the host knows whether there is one.
pub(super) fn group(text: &str) -> Leaf<Group> {
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        // The kernel takes the last number for "leave it".
        return number(text, 0..=u32::MAX - 1, "").map(Group::Id);
    }
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if (1..=32).contains(&text.len()) && text.chars().all(fits) && !text.starts_with('-') {
        return Ok(Group::Name(text.to_owned()));
    }
    not_allowed(text, "use the name or the number of a group that `getent group` shows")
}

/// Where a server listens.
pub(super) fn listen(text: &str) -> Leaf<SocketAddr> {
    let hint = "use an address with a port, such as 127.0.0.1:9465 or [::1]:9465";
    match text.parse::<SocketAddr>() {
        Ok(address) if address.port() == 0 => {
            wrong(format!("{text} has no port that others could know"), hint)
        }
        Ok(address) if address.ip().is_multicast() => wrong(format!("{text} is a multicast address"), hint),
        Ok(address) => Ok(address),
        Err(_) => match text.parse::<IpAddr>() {
            Ok(ip) => wrong(format!("{ip} has no port"), format!("write {}", SocketAddr::new(ip, 9465))),
            Err(_) => match text.strip_prefix("localhost:").map(|port| (port, is_port(port))) {
                Some((port, true)) => {
                    not_allowed(text, format!("names are not resolved: write 127.0.0.1:{port}"))
                }
                _ if is_port(text.trim_start_matches(':')) => {
                    let port = text.trim_start_matches(':');
                    not_allowed(text, format!("write the address too: 127.0.0.1:{port}"))
                }
                _ => not_allowed(text, hint),
            },
        },
    }
}

/// What the kernel takes for an interface's name (`dev_valid_name`, IFNAMSIZ is 16 with the NUL).
pub(super) fn interface_name(text: &str) -> Leaf<String> {
    let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    if text.is_empty() || text.len() > 15 || text.contains(bad) || text == "." || text == ".." {
        return not_allowed(text, "use a name that `ip link` shows (at most 15 bytes, no / : or space)");
    }
    Ok(text.to_owned())
}

/// An address that packets can be sent to.
pub(super) fn address(text: &str) -> Leaf<IpAddr> {
    match text.parse::<IpAddr>() {
        Ok(address) => usable(address),
        Err(_) => no_address(text),
    }
}

fn usable(address: IpAddr) -> Leaf<IpAddr> {
    let hint = "use an address that packets can be sent to";
    let is = |what: &str| wrong(format!("{address} is {what}"), hint);
    if let IpAddr::V6(v6) = address
        && let Some(v4) = v6.to_ipv4_mapped()
    {
        // What is suggested must be usable itself, here and below.
        usable(IpAddr::V4(v4))?;
        return wrong(format!("{address} is an IPv4-mapped address"), format!("write {v4}"));
    }
    match address {
        _ if address.is_unspecified() => is("the unspecified address"),
        _ if address.is_multicast() => is("a multicast address"),
        _ if address.is_loopback() => is("a loopback address"),
        IpAddr::V4(v4) if v4.is_broadcast() => is("the broadcast address"),
        IpAddr::V6(v6) if v6.is_unicast_link_local() => is("a link-local address"),
        IpAddr::V4(_) | IpAddr::V6(_) => Ok(address),
    }
}

fn no_address(text: &str) -> Leaf<IpAddr> {
    let bare = text.split(['/', '%']).next().unwrap_or_default();
    let bare = bare.strip_prefix('[').and_then(|b| b.strip_suffix(']')).unwrap_or(bare);
    let within = text.parse::<SocketAddr>().map(|with_port| with_port.ip());
    let hint = match within.or_else(|_| bare.parse::<IpAddr>()) {
        Ok(address) => format!("write the address alone: {}", usable(address)?),
        Err(_) => "use an address such as 192.0.2.10 or 2001:db8::10 (names are not resolved)".into(),
    };
    wrong(format!("{} is not an IP address", show(text)), hint)
}

/// A whole number and a unit.
pub(super) fn duration(text: &str, range: RangeInclusive<Duration>) -> Leaf<Duration> {
    let allowed = || format!("use {}-{}", show_duration(*range.start()), show_duration(*range.end()));
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    let Ok(count) = digits.parse::<u64>() else {
        return not_allowed(text, format!("{}, such as 500ms or 2s", allowed()));
    };
    let duration = match unit {
        "ms" => Some(Duration::from_millis(count)),
        "s" => Some(Duration::from_secs(count)),
        "m" => count.checked_mul(60).map(Duration::from_secs),
        "h" => count.checked_mul(3600).map(Duration::from_secs),
        "" => {
            let with = [(Duration::from_secs(count), "s"), (Duration::from_millis(count), "ms")];
            let fits = with.iter().filter(|(duration, _)| range.contains(duration));
            let forms: Vec<String> = fits.map(|(_, unit)| format!("{count}{unit}")).collect();
            let hint = match forms.as_slice() {
                [] => allowed(),
                forms => format!("write {}", forms.join(" or ")),
            };
            return wrong(format!("{} has no unit", show(text)), hint);
        }
        _ => return not_allowed(text, format!("{}, such as 500ms or 2s", allowed())),
    };
    match duration {
        Some(duration) if range.contains(&duration) => Ok(duration),
        _ => not_allowed(text, allowed()),
    }
}

/// A duration, or none.
pub(super) fn duration_or_never(text: &str, range: RangeInclusive<Duration>) -> Leaf<Option<Duration>> {
    if text == "never" {
        return Ok(None);
    }
    duration(text, range)
        .map(Some)
        .map_err(|Wrong { message, hint }| Wrong { message, hint: format!("{hint}; or use never") })
}

/// In the largest unit that divides it.
pub(super) fn show_duration(duration: Duration) -> String {
    match duration.as_millis() {
        ms if ms % 1000 != 0 || ms == 0 => format!("{ms}ms"),
        ms if ms % 60_000 != 0 => format!("{}s", ms / 1000),
        ms if ms % 3_600_000 != 0 => format!("{}m", ms / 60_000),
        ms => format!("{}h", ms / 3_600_000),
    }
}

/// The target of a GET: origin form, RFC 9112 section 3.2.1.
pub(super) fn http_path(text: &str) -> Leaf<String> {
    if !text.starts_with('/') {
        let word = text.bytes().all(|b| b.is_ascii_graphic()) && !text.contains(['/', '#']);
        let hint = if word { format!("begin with a slash: /{text}") } else { "begin with a slash".into() };
        return not_allowed(text, hint);
    }
    if !text.bytes().all(|b| b.is_ascii_graphic()) {
        return not_allowed(text, "percent-encode spaces and other special characters (%20 is a space)");
    }
    if text.contains('#') {
        return not_allowed(text, "a fragment (#) is never sent to a server, leave it out");
    }
    Ok(text.to_owned())
}

/// The Host header of a GET: a name or an address, with or without a port.
pub(super) fn http_host(text: &str) -> Leaf<String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '[' | ']');
    if (1..=255).contains(&text.len()) && text.chars().all(fits) {
        return Ok(text.to_owned());
    }
    not_allowed(text, "use a host name such as www.example.org")
}

/// A status code, or a range of them.
pub(super) fn statuses(text: &str) -> Leaf<RangeInclusive<u16>> {
    let code = |text: &str| number(text, 100..=599, "").ok().and_then(|n| u16::try_from(n).ok());
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (code(first), code(last)) {
        (Some(first), Some(last)) if first <= last => Ok(first..=last),
        (Some(first), Some(last)) => {
            wrong(format!("{first}-{last} is an empty range"), format!("write {last}-{first}"))
        }
        _ => not_allowed(text, "use a status (200) or a range (200-299) within 100-599"),
    }
}
