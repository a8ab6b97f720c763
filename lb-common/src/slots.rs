//! The slot word and the rule that picks a backend from it.
//!
//! A slot that is at rest is *clean*: `cur == est`, neither `D` nor `P`. Every packet of it goes to `cur`, no
//! connection is looked up, no state is kept. A change gives the slot another `cur` and makes it dirty: from then
//! on every flow that speaks is pinned (`pins`), and once all that live are, `est` follows.

use crate::abi::{BACKEND_NOBODY, Backend, TableWord};
use crate::flow::FlowHash;
use crate::outcome::Outcome;
use crate::tables::Tables;

/// One slot, stored and loaded whole.
///
/// Bits 0-14 `cur` (takes new flows), 15-29 `est` (takes flows without a pin), 30 `D` (new flows
/// must be pinned), 31 `P` (pins may exist).
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Slot(u32);

impl Slot {
    const DIRTY: u32 = 1 << 30;
    const PINS: u32 = 1 << 31;

    /// A slot at rest.
    pub const fn clean(backend: u16) -> Self {
        Self::new(backend, backend, false, false)
    }

    pub const fn new(cur: u16, est: u16, dirty: bool, pins: bool) -> Self {
        Self(
            (cur & 0x7fff) as u32
                | ((est & 0x7fff) as u32) << 15
                | (dirty as u32) << 30
                | (pins as u32) << 31,
        )
    }

    #[inline(always)]
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    pub const fn bits(self) -> u32 {
        self.0
    }

    #[inline(always)]
    pub const fn cur(self) -> u16 {
        self.0 as u16 & 0x7fff
    }

    #[inline(always)]
    pub const fn est(self) -> u16 {
        (self.0 >> 15) as u16 & 0x7fff
    }

    #[inline(always)]
    pub const fn dirty(self) -> bool {
        self.0 & Self::DIRTY != 0
    }

    #[inline(always)]
    pub const fn pins(self) -> bool {
        self.0 & Self::PINS != 0
    }

    /// Neither `D` nor `P`: `cur` decides alone.
    #[inline(always)]
    pub const fn is_clean(self) -> bool {
        self.0 & (Self::DIRTY | Self::PINS) == 0
    }
}

/// The backend that a flow goes to, with its id.
#[derive(Clone, Copy)]
pub struct Steered<'t> {
    pub id: u16,
    pub backend: &'t Backend,
}

/// The slot of a flow, and the table that it lies in.
#[derive(Clone, Copy)]
pub struct Found {
    pub table: TableWord,
    pub slot: Slot,
}

/// One table word, one slot. Fields are read from this load and never again.
#[inline(always)]
pub fn find<T: Tables>(tables: &T, table: u16, hash: FlowHash) -> Result<Found, Outcome> {
    let table = Outcome::DropInconsistent.unless(tables.table_word(table))?;
    let slot = Outcome::DropInconsistent.unless(tables.slot(table.first_row(), table.slot(hash.slot())))?;
    Ok(Found { table, slot })
}

/// The row of a backend that a slot or a pin names.
#[inline(always)]
pub fn backend<T: Tables>(tables: &T, id: u16) -> Result<Steered<'_>, Outcome> {
    let backend = Outcome::DropInconsistent.unless(tables.backend(id))?;
    Ok(Steered { id, backend })
}

const _: () = assert!(Slot::clean(BACKEND_NOBODY).bits() == 0);

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_word_gives_back_what_was_put_in(cur in 0u16..0x8000, est in 0u16..0x8000, d: bool, p: bool) {
            let slot = Slot::new(cur, est, d, p);
            prop_assert_eq!((slot.cur(), slot.est(), slot.dirty(), slot.pins()), (cur, est, d, p));
            prop_assert_eq!(slot.is_clean(), !d && !p);
        }
    }
}
