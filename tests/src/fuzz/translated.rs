//! Connections that lie in the tables before frames come, and what frames leave of them, in the kernel and on the host.

use std::collections::BTreeMap;

use lb_common::abi::{PINS_PER_BUCKET, Replies};
use lb_userspace::reconcile::image::{Image, Trail};

use crate::fixtures::{PLACES, Place, open_all};

/// Frames between two times that the table is as it was: else it fills up, and none is opened any more.
const RESET: u64 = 256;

/// The table of connections that frames meet.
pub struct Table {
    begin: Vec<Place>,
    frames: u64,
}

impl Table {
    /// Fills the image's connections.
    pub fn new(image: &Image) -> Self {
        open_all(image);
        let begin = (0..PLACES).map(|position| Place::at(&image.connections, position)).collect();
        Self { begin, frames: 0 }
    }

    /// Before a frame.
    pub fn refresh(&mut self, image: &Image) {
        if self.frames.is_multiple_of(RESET) {
            (0..).zip(&self.begin).for_each(|(position, place)| place.put(&image.connections, position));
        }
        self.frames += 1;
    }
}

/// Whether the places that a frame looked at are in the kernel as on the host, but for the time.
pub fn compared(image: &Image, trail: &Trail) -> Result<(), String> {
    let ways = |row: u32| (0..PINS_PER_BUCKET as u32).map(move |way| row * PINS_PER_BUCKET as u32 + way);
    for position in trail.buckets.keys().copied().flat_map(ways) {
        let found = Place::at(&image.connections, position).timeless();
        let expected = Place::left(&image.connections, trail, position).timeless();
        if found != expected {
            return Err(format!("place {position} is {found:x?} in the kernel, {expected:x?} on the host"));
        }
    }
    Ok(())
}

/// What comes back from backends, by id, but for the time that it took.
#[derive(Default)]
pub struct Heard(pub BTreeMap<u16, Replies>);

impl Heard {
    pub fn note(&mut self, trail: &Trail) {
        let Some((id, reply)) = trail.reply else { return };
        let replies = self.0.entry(id).or_default();
        replies.packets += 1;
        replies.bytes += reply.bytes;
        replies.resets += u64::from(reply.reset);
        replies.answered += u64::from(reply.waited != 0);
    }
}
