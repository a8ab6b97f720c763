//! How the allocator treats large blocks.

#![allow(unsafe_code, reason = "the allocator's settings have no safe wrapper")]

/// Copies of the kernel's tables are tens of MiB, made and dropped at reloads. From this size on, a block is a mapping of
/// its own and goes back to the kernel when it is dropped.
const MAPPED_FROM_BYTES: libc::c_int = 1 << 20;

/// Gives back what is free between blocks in use: reading a large file leaves many small holes. Takes milliseconds.
pub fn return_free_blocks() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the allocator takes its own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Before other threads run. glibc would otherwise raise the bound after the first large block that is dropped (mallopt(3)),
/// and large blocks would leave holes in its heap.
pub fn return_large_blocks() {
    #[cfg(target_env = "gnu")]
    // SAFETY: a setting of the allocator; nothing else is running yet.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM_BYTES);
    }
}
