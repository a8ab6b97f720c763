//! `Packet` on an XDP context. Owns the bounds checks in the form that the verifier understands.

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::{bpf_xdp_adjust_head, bpf_xdp_adjust_tail};
use aya_ebpf::programs::XdpContext;
use lb_common::packet::Packet;
use lb_common::wire::Header;

/// A frame with its bounds, which are read from the context once per move of the head.
pub struct Frame<'c> {
    context: &'c XdpContext,
    start: usize,
    end: usize,
}

impl<'c> Frame<'c> {
    #[inline(always)]
    pub fn new(context: &'c XdpContext) -> Self {
        Self { context, start: context.data(), end: context.data_end() }
    }

    /// The address of `size` bytes at `offset`. The verifier (6.18) wants exactly this comparison:
    /// packet pointer plus size against the end.
    #[inline(always)]
    fn at(&self, offset: usize, size: usize) -> Option<usize> {
        let at = self.start + offset;
        if at + size > self.end {
            core::hint::cold_path();
            return None;
        }
        // SAFETY: packet memory does not lie at address 0; saves the null test of `Option<&T>`.
        unsafe { core::hint::assert_unchecked(at != 0) };
        Some(at)
    }

    #[inline(always)]
    fn adjust(&mut self, delta: i32) -> Option<()> {
        // SAFETY: the context is the one that the kernel handed to the program.
        let error = unsafe { bpf_xdp_adjust_head(self.context.as_ptr().cast(), delta) };
        self.moved(error)
    }

    /// Reads the bounds again, also after a failure: to the verifier the old ones are void either way.
    #[inline(always)]
    fn moved(&mut self, error: i64) -> Option<()> {
        self.start = self.context.data();
        self.end = self.context.data_end();
        if error == 0 { Some(()) } else { None }
    }
}

impl Packet for Frame<'_> {
    #[inline(always)]
    fn header<T: Header>(&self, offset: usize) -> Option<&T> {
        let at = self.at(offset, size_of::<T>())?;
        // SAFETY: `at` checked the bounds; a Header has alignment 1 and any bit pattern; the packet
        // outlives the program run.
        Some(unsafe { &*(at as *const T) })
    }

    #[inline(always)]
    fn header_mut<T: Header>(&mut self, offset: usize) -> Option<&mut T> {
        let at = self.at(offset, size_of::<T>())?;
        // SAFETY: as in `header`, and the borrow of the frame is exclusive.
        Some(unsafe { &mut *(at as *mut T) })
    }

    #[inline(always)]
    fn length(&self) -> usize {
        // Loaded anew: from `end - start` the compiler would conclude that a later check of bounds holds
        // and leave it out, and the verifier, which takes no such difference for a bound, would refuse.
        let context = self.context.ctx;
        // SAFETY: the context is the one that the kernel handed to the program.
        let (start, end) = unsafe { ((&raw const (*context).data), (&raw const (*context).data_end)) };
        // SAFETY: as above.
        unsafe { end.read_volatile().wrapping_sub(start.read_volatile()) as usize }
    }

    #[inline(always)]
    fn grow_head(&mut self, bytes: usize) -> Option<()> {
        self.adjust(-(bytes as i32))
    }

    #[inline(always)]
    fn shrink_head(&mut self, bytes: usize) -> Option<()> {
        self.adjust(bytes as i32)
    }

    #[inline(always)]
    fn truncate(&mut self, bytes: usize) -> Option<()> {
        let length = self.length();
        if bytes > length {
            return None;
        }
        let delta = bytes as i32 - length as i32;
        // SAFETY: the context is the one that the kernel handed to the program.
        let error = unsafe { bpf_xdp_adjust_tail(self.context.as_ptr().cast(), delta) };
        self.moved(error)
    }

    #[inline(always)]
    fn forget(&mut self) {
        _ = self.moved(0);
    }

    #[inline(always)]
    fn context(&self) -> *mut core::ffi::c_void {
        self.context.as_ptr()
    }

    #[inline(always)]
    fn ingress_ifindex(&self) -> u32 {
        self.context.ingress_ifindex() as u32
    }
}
