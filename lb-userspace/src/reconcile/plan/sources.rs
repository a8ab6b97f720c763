//! The sources part of a plan: which address stands in which row of `XLB_SOURCES`. Knows connections by their places
//! only.
//!
//! An address stays in its row as long as it is configured, for connections name the row. Rows are used up to a number
//! that limits decide; an address beyond that is not used.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use lb_common::abi::Source;
use lb_common::connections::Rooms;
use lb_common::wire::Address6;

use crate::reconcile::desired::Desired;
use crate::reconcile::image::Image;
use crate::reconcile::op::MapOp;

/// The rows as they should be; those that are not used are zero.
pub fn place(image: &Image, desired: &Desired) -> Vec<Source> {
    let mut rows = vec![Source::default(); image.sources.len()];
    let used = (desired.sources.rows as usize).min(rows.len());
    let v4: Vec<_> = desired.sources.v4.iter().map(|v4| u32::from_ne_bytes(v4.octets())).collect();
    let v6: Vec<_> = desired.sources.v6.iter().map(|v6| words(*v6)).collect();
    let before = || image.sources.iter().take(used);
    for (row, address) in rows.iter_mut().zip(kept(before().map(|row| row.v4), &v4)) {
        row.v4 = address;
    }
    for (row, address) in rows.iter_mut().zip(kept(before().map(|row| row.v6), &v6)) {
        row.v6 = address;
    }
    rows
}

/// The row of each address.
pub fn row_of(rows: &[Source], address: IpAddr) -> Option<u32> {
    let row = match address {
        IpAddr::V4(v4) => rows.iter().position(|row| row.v4 == u32::from_ne_bytes(v4.octets())),
        IpAddr::V6(v6) => rows.iter().position(|row| row.v6 == words(v6)),
    };
    row.map(|row| row as u32)
}

/// The address of a row; nothing where it has none of the family.
pub fn address_of(rows: &[Source], row: u32, ipv4: bool) -> Option<IpAddr> {
    let Source { v4, v6: [high, low], spare: _ } = *rows.get(row as usize)?;
    let v6 = Address6 { high, low };
    match ipv4 {
        true => (v4 != 0).then(|| Ipv4Addr::from(v4.to_ne_bytes()).into()),
        false => (v6 != Address6::default()).then(|| Ipv6Addr::from(v6.bytes()).into()),
    }
}

/// The writes that bring the rows in line. Connections that used an address which leaves a row end: their backend knows
/// them by it.
pub fn writes(image: &Image, rows: &[Source]) -> Vec<MapOp> {
    let ports = Rooms::new(0, image.meta.source_ports).ports;
    let mut ops = Vec::new();
    let mut ended = Vec::new();
    for (row, (before, now)) in (0u16..).zip(image.sources.iter().zip(rows)) {
        if before == now {
            continue;
        }
        ops.push(MapOp::WriteSource { row, source: *now });
        let leaves = (before.v4 != 0 && before.v4 != now.v4) || (before.v6 != [0; 2] && before.v6 != now.v6);
        if leaves && ports > 0 {
            let first = u32::from(row) * ports;
            ended.push(MapOp::DropConnections { first, last: first + ports - 1 });
        }
    }
    if !ended.is_empty() {
        // Those that packets open until then with the address of before end, too.
        ops.push(MapOp::Grace);
        ops.extend(ended);
    }
    ops
}

/// Addresses in the rows where they were, the others in what is free.
fn kept<A: Copy + Default + PartialEq>(before: impl Iterator<Item = A>, wanted: &[A]) -> Vec<A> {
    let stays = |address: A| if wanted.contains(&address) { address } else { A::default() };
    let mut rows: Vec<A> = before.map(stays).collect();
    let mut others: Vec<A> = wanted.iter().filter(|address| !rows.contains(address)).copied().collect();
    others.reverse();
    for row in &mut rows {
        if *row == A::default()
            && let Some(address) = others.pop()
        {
            *row = address;
        }
    }
    rows
}

fn words(address: Ipv6Addr) -> [u64; 2] {
    let Address6 { high, low } = Address6::from_bytes(address.octets());
    [high, low]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_stays_in_its_row_and_others_fill_what_is_free() {
        assert_eq!(kept([0, 0, 0].into_iter(), &[1, 2, 3]), [1, 2, 3]);
        assert_eq!(kept([1, 2, 3].into_iter(), &[3, 4, 1]), [1, 4, 3]);
        assert_eq!(kept([1, 2, 0].into_iter(), &[2, 5, 6]), [5, 2, 6]);
        // One row less: its address takes the free row.
        assert_eq!(kept([1, 2].into_iter(), &[2, 3]), [3, 2]);
        // More than there are rows.
        assert_eq!(kept([0, 0].into_iter(), &[1, 2, 3]), [1, 2]);
    }
}
