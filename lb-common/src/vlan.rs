//! VLAN tags are taken off before anything else is looked at and put back before the frame leaves,
//! whatever became of it in between: so one path serves frames with none, one and two tags, an answer
//! goes back in the VLAN of its question, and a frame without tags pays nothing but the look.

use crate::packet::Packet;
use crate::wire::{EtherType, Ethernet, Tagged, TaggedTwice};

const TAG: usize = 4;

/// The tags of a frame as they lie in it, each behind the EtherType that announces it. One that no tag's
/// EtherType announces is none, whatever it holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tags {
    outer: u32,
    inner: u32,
}

impl Tags {
    pub const NONE: Self = Self { outer: 0, inner: 0 };

    /// What stands where tags would: not a constant, or the verifier would follow the whole path for it
    /// once more.
    #[inline(always)]
    fn none(ethernet: &Ethernet) -> Self {
        Self { outer: fresh(ethernet), inner: fresh(ethernet) }
    }
}

#[inline(always)]
const fn announces(bits: u32) -> EtherType {
    EtherType::from_raw(bits as u16)
}

/// The EtherType, loaded once more: what the verifier learnt of the first load does not hold for it.
#[inline(always)]
fn fresh(ethernet: &Ethernet) -> u32 {
    // SAFETY: a reference is valid and initialised; the read is of a packed field.
    let ethertype = unsafe { (&raw const ethernet.ethertype).cast::<[u8; 2]>().read_volatile() };
    u16::from_ne_bytes(ethertype) as u32
}

/// Takes up to two tags off. What lies behind more of them, or behind one that is cut off, stays as it is.
#[inline(always)]
pub fn pop<P: Packet>(packet: &mut P) -> Tags {
    let Some(ethernet) = packet.header::<Ethernet>(0) else { return Tags::NONE };
    let none = Tags::none(ethernet);
    if !{ ethernet.ethertype }.is_vlan() {
        return none;
    }
    let (destination, source) = (ethernet.destination(), ethernet.source());
    let Some(once) = packet.header::<Tagged>(0) else { return Tags::NONE };
    let (tag, ethertype) = (once.tag, once.ethertype);
    if !ethertype.is_vlan() {
        if packet.shrink_head(TAG).is_none() {
            return Tags::NONE;
        }
        if let Some(ethernet) = packet.header_mut::<Ethernet>(0) {
            *ethernet = Ethernet::new(destination, source, ethertype);
            return Tags { outer: tag, inner: fresh(ethernet) };
        }
        return Tags::NONE;
    }
    let Some(twice) = packet.header::<TaggedTwice>(0) else { return Tags::NONE };
    let (inner, ethertype) = (twice.inner, twice.ethertype);
    if ethertype.is_vlan() || packet.shrink_head(2 * TAG).is_none() {
        return Tags::NONE;
    }
    let Some(ethernet) = packet.header_mut::<Ethernet>(0) else { return Tags::NONE };
    *ethernet = Ethernet::new(destination, source, ethertype);
    Tags { outer: tag, inner }
}

/// Puts the tags back in front of the frame's EtherType; `None` where there is no room.
#[inline(always)]
pub fn push<P: Packet>(packet: &mut P, tags: Tags) -> Option<()> {
    if !announces(tags.outer).is_vlan() {
        return Some(());
    }
    let ethernet = packet.header::<Ethernet>(0)?;
    let (destination, source, ethertype) = (ethernet.destination(), ethernet.source(), ethernet.ethertype);
    let tagged = Ethernet::new(destination, source, announces(tags.outer));
    if announces(tags.inner).is_vlan() {
        packet.grow_head(2 * TAG)?;
        *packet.header_mut::<Ethernet>(0)? = tagged;
        let twice = packet.header_mut::<TaggedTwice>(0)?;
        (twice.outer, twice.inner, twice.ethertype) = (tags.outer, tags.inner, ethertype);
    } else {
        packet.grow_head(TAG)?;
        *packet.header_mut::<Ethernet>(0)? = tagged;
        let once = packet.header_mut::<Tagged>(0)?;
        (once.tag, once.ethertype) = (tags.outer, ethertype);
    }
    Some(())
}
