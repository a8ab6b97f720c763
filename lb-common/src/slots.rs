//! The slot word and the rule that picks a backend from it.
//!
//! A slot that is at rest is *clean*: `cur == est`, neither `D` nor `P`. Every packet of it goes to
//! `cur`, no connection is looked up, no state is kept. `est`, `D` and `P` are the room for moving a
//! slot without moving the flows that live on it; the agent of this version writes clean slots only,
//! and the packet path reads `cur` alone.

use crate::abi::{BACKEND_NOBODY, Backend};
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

    pub const fn is_clean(self) -> bool {
        self.0 & (Self::DIRTY | Self::PINS) == 0 && self.cur() == self.est()
    }
}

/// The backend that a flow goes to, with its id.
#[derive(Clone, Copy)]
pub struct Steered<'t> {
    pub id: u16,
    pub backend: &'t Backend,
}

/// Picks the backend of a flow: one table word, one slot, one backend row.
#[inline(always)]
pub fn steer<T: Tables>(tables: &T, table: u16, hash: u32) -> Result<Steered<'_>, Outcome> {
    let word = tables.table_word(table).ok_or(Outcome::DropInconsistent)?;
    let slot = tables.slot(word.first_row(), word.slot(hash)).ok_or(Outcome::DropInconsistent)?;
    let id = slot.cur();
    let backend = tables.backend(id).ok_or(Outcome::DropInconsistent)?;
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
            prop_assert_eq!(slot.is_clean(), cur == est && !d && !p);
        }
    }
}
