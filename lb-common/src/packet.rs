//! Checked access to a frame: the one way in which the packet path sees bytes.

use crate::wire::Header;

/// A frame with the interface it came in on. Offsets count from the first byte of the frame.
///
/// Moving the head voids every offset and, by the borrow checker, every reference: copy what is
/// needed, move, then write one struct through `header_mut`.
pub trait Packet {
    /// The header at `offset`, or `None` where the frame ends before it does.
    fn header<T: Header>(&self, offset: usize) -> Option<&T>;
    fn header_mut<T: Header>(&mut self, offset: usize) -> Option<&mut T>;
    /// Bytes of the frame.
    fn length(&self) -> usize;
    /// Puts `bytes` of unspecified content in front; `None` where there is no room.
    fn grow_head(&mut self, bytes: usize) -> Option<()>;
    /// Takes `bytes` off the front; `None` where the frame is shorter.
    fn shrink_head(&mut self, bytes: usize) -> Option<()>;
    /// Cuts the frame off after `bytes` bytes; `None` where it is shorter.
    fn truncate(&mut self, bytes: usize) -> Option<()>;
    /// Forgets which bytes were checked: what ways that joined knew of the frame is the same from here on.
    fn forget(&mut self) {}
    /// Where the kernel keeps the frame; null outside of it.
    fn context(&self) -> *mut core::ffi::c_void {
        core::ptr::null_mut()
    }
    /// The index of the interface that the frame came in on.
    fn ingress_ifindex(&self) -> u32;
}

/// A frame in a byte buffer with room in front, for tests, fuzzers and `xlb lookup`.
pub struct Buffer<'a> {
    bytes: &'a mut [u8],
    start: usize,
    end: usize,
    ingress_ifindex: u32,
}

impl<'a> Buffer<'a> {
    /// The frame is `bytes[start..]`; what lies before is the room to grow into.
    pub fn new(bytes: &'a mut [u8], start: usize, ingress_ifindex: u32) -> Self {
        assert!(start <= bytes.len());
        let end = bytes.len();
        Self { bytes, start, end, ingress_ifindex }
    }

    pub fn frame(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    fn range(&self, offset: usize, length: usize) -> Option<core::ops::Range<usize>> {
        let start = self.start.checked_add(offset)?;
        let end = start.checked_add(length)?;
        (end <= self.end).then_some(start..end)
    }
}

impl Packet for Buffer<'_> {
    fn header<T: Header>(&self, offset: usize) -> Option<&T> {
        let range = self.range(offset, T::LEN)?;
        let bytes = &self.bytes[range];
        // SAFETY: `bytes` is T::LEN long, and a Header has alignment 1 and any bit pattern.
        Some(unsafe { &*bytes.as_ptr().cast::<T>() })
    }

    fn header_mut<T: Header>(&mut self, offset: usize) -> Option<&mut T> {
        let range = self.range(offset, T::LEN)?;
        let bytes = &mut self.bytes[range];
        // SAFETY: as in `header`, and the borrow is exclusive.
        Some(unsafe { &mut *bytes.as_mut_ptr().cast::<T>() })
    }

    fn length(&self) -> usize {
        self.end - self.start
    }

    fn grow_head(&mut self, bytes: usize) -> Option<()> {
        self.start = self.start.checked_sub(bytes)?;
        Some(())
    }

    fn shrink_head(&mut self, bytes: usize) -> Option<()> {
        if bytes > self.length() {
            return None;
        }
        self.start += bytes;
        Some(())
    }

    fn truncate(&mut self, bytes: usize) -> Option<()> {
        if bytes > self.length() {
            return None;
        }
        self.end = self.start + bytes;
        Some(())
    }

    fn ingress_ifindex(&self) -> u32 {
        self.ingress_ifindex
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Ethernet;

    #[test]
    fn a_header_is_seen_only_when_it_is_whole() {
        let mut bytes = [0u8; 20];
        let packet = Buffer::new(&mut bytes, 6, 1);
        assert!(packet.header::<Ethernet>(0).is_some());
        assert!(packet.header::<Ethernet>(1).is_none());
        assert!(packet.header::<Ethernet>(usize::MAX).is_none());
    }

    #[test]
    fn the_head_moves_within_the_buffer_only() {
        let mut bytes = [0u8; 20];
        let mut packet = Buffer::new(&mut bytes, 6, 1);
        assert!(packet.grow_head(7).is_none());
        assert!(packet.grow_head(6).is_some());
        assert_eq!(packet.length(), 20);
        assert!(packet.shrink_head(21).is_none());
        assert!(packet.shrink_head(20).is_some());
        assert_eq!(packet.length(), 0);
    }

    #[test]
    fn a_frame_is_cut_but_never_lengthened() {
        let mut bytes = [0u8; 20];
        let mut packet = Buffer::new(&mut bytes, 2, 1);
        assert!(packet.truncate(19).is_none());
        assert!(packet.truncate(14).is_some());
        assert_eq!((packet.length(), packet.frame().len()), (14, 14));
        assert!(packet.header::<Ethernet>(0).is_some() && packet.header::<Ethernet>(1).is_none());
    }
}
