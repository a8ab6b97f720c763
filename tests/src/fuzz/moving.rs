//! Tables that are not at rest: slots on the move, tables that close, are frozen or are no hash, and pins. It says what is
//! other than at rest, and compares pins; it runs no frames.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use lb_common::abi::{
    BACKEND_NOBODY, BACKEND_PASS, Discipline, PINS_PER_BUCKET, Pin, PinState, SLOTS_PER_ROW, TableState,
    TableWord,
};
use lb_common::slots::Slot;
use lb_userspace::reconcile::image::Image;
use lb_userspace::reconcile::op::MapOp;
use lb_userspace::reconcile::pins::{Pins, coarse_ns};

use super::balancer::HostWay;
use crate::fixtures::{HEADROOM, capacity, moving_rows, rows};

/// What a table is, by its number. Where chance decides, every slot has the same `cur`: both sides draw the same.
const KINDS: [(Discipline, u64); 7] = [
    (Discipline::Hash, 0),
    (Discipline::Hash, TableState::CLOSING),
    (Discipline::Hash, TableState::CLOSING),
    (Discipline::Hash, TableState::FROZEN),
    (Discipline::RoundRobin, 0),
    (Discipline::Random, 0),
    (Discipline::Least, 0),
];

/// Turns tables that are at rest into such that are not.
pub fn stirred(image: &Image) -> Vec<MapOp> {
    let words = (0u16..).zip(image.tables.iter().map(|&bits| TableWord::from_bits(bits)));
    let tables = words.filter(|(_, word)| *word != TableWord::default());
    let mut ops: Vec<MapOp> = tables.flat_map(|(table, word)| stirred_table(image, table, word)).collect();
    let rows = (0u16..).zip(&image.backends).filter(|(id, row)| id % 3 == 0 && row.identity != 0);
    ops.extend(rows.map(|(id, _)| MapOp::SetFlags { id, flags: 0 }));
    ops
}

fn stirred_table(image: &Image, table: u16, word: TableWord) -> [MapOp; 3] {
    let (discipline, closing) = KINDS[usize::from(table) % KINDS.len()];
    let first = word.first_row() * SLOTS_PER_ROW;
    let olds: Vec<u16> = (first..first + word.length()).map(|index| image.slot(index).cur()).collect();
    let mut ids = olds.clone();
    ids.sort_unstable();
    ids.dedup();
    let next = |id: u16| match ids.iter().position(|other| *other == id) {
        Some(place) if id != BACKEND_NOBODY && id != BACKEND_PASS => ids[(place + 1) % ids.len()],
        _ => id,
    };
    let drawn = matches!(discipline, Discipline::Random | Discipline::Least);
    let slot = |(index, &old): (usize, &u16)| match (discipline, index % 4) {
        _ if drawn => Slot::new(olds[0], old, true, true),
        (Discipline::Hash, 0) => Slot::clean(old),
        (Discipline::Hash, 1) => Slot::new(next(old), old, true, false),
        (Discipline::Hash, 2) => Slot::new(next(old), old, false, true),
        _ => Slot::new(next(old), old, true, true),
    };
    let words = olds.iter().enumerate().map(|entry| slot(entry).bits()).collect();
    let state = TableState { closing, ..image.table_states[usize::from(table)] };
    [
        MapOp::WriteSlots { first, words },
        MapOp::WriteTableState { table, state },
        MapOp::SetTableWord { table, word: TableWord::new(word.first_row(), word.log2_length(), discipline) },
    ]
}

/// Room for pins where there are no maps.
pub fn room() -> Pins {
    let words = capacity().pin_buckets as usize * PINS_PER_BUCKET;
    Pins::of(Arc::new((0..words).map(|_| AtomicU64::new(0)).collect::<Vec<_>>()))
}

/// Of so many buckets one has no room.
const CROWDED: usize = 4;

/// Fills some buckets, and pins the flows of all fixtures, as if their frames had come before.
pub fn pin_fixtures(image: &Image, way: HostWay) {
    let now = Pin::age_of(coarse_ns());
    for words in image.pins.words().chunks(PINS_PER_BUCKET).step_by(CROWDED) {
        for (word, tag) in words.iter().zip(0xffff_fff0..) {
            word.store(Pin::new(tag, 1, PinState::Established, now).bits(), Ordering::SeqCst);
        }
    }
    let frames = rows().into_iter().chain(moving_rows().into_iter().map(|moving| moving.row));
    for row in frames {
        let Some((spread, pins)) = way(image, &row.frame, HEADROOM).trail.bucket else { continue };
        for (word, bits) in bucket(image, spread).iter().zip(pins) {
            word.store(bits, Ordering::SeqCst);
        }
    }
}

fn bucket(image: &Image, spread: u32) -> &[AtomicU64] {
    let words = image.pins.words();
    let first = (spread as usize & (words.len() / PINS_PER_BUCKET - 1)) * PINS_PER_BUCKET;
    &words[first..first + PINS_PER_BUCKET]
}

/// Whether the bucket is in the kernel as on the host, but for the time.
pub fn compared(image: &Image, (spread, pins): (u32, [u64; PINS_PER_BUCKET])) -> Result<(), String> {
    let ageless = |bits: u64| {
        let pin = Pin::from_bits(bits);
        (pin.tag(), pin.backend(), pin.state())
    };
    let found: Vec<_> =
        bucket(image, spread).iter().map(|word| ageless(word.load(Ordering::SeqCst))).collect();
    let expected = pins.map(ageless);
    if found == expected {
        return Ok(());
    }
    Err(format!("pins {found:x?} in the kernel, {expected:x?} on the host"))
}

/// Waits where a pin would soon be a unit older: host and kernel are asked within the same one.
pub fn avoid_the_next_age() {
    const UNIT: u64 = 1 << 31;
    const MARGIN: u64 = 20_000_000;
    while coarse_ns() % UNIT > UNIT - MARGIN {
        std::thread::sleep(Duration::from_millis(4));
    }
}

/// What packets may change of tables' states.
pub fn settled(image: &Image) -> Image {
    let mut image = image.clone();
    for state in &mut image.table_states {
        (state.failed, state.turn) = (0, 0);
    }
    image
}
