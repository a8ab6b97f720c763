//! Rows of an array map in this process's memory. Writing 65,536 slots takes some 50 us this way,
//! against 92 ms by single syscalls (kernel 6.18).

#![allow(unsafe_code, reason = "mapping a file descriptor and storing into memory that the kernel shares")]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use lb_common::abi::Record;

/// What may lie in a row.
///
/// # Safety
/// The size is a multiple of eight, there is no padding, and every bit pattern is valid.
pub unsafe trait Row: Copy {}

macro_rules! row {
    ($($name:ty),*) => {
        $(
            const _: () = assert!(size_of::<$name>() % 8 == 0);
            // SAFETY: integers only; the ABI asserts that sizes leave no padding.
            unsafe impl Row for $name {}
        )*
    };
}

row!(
    u64,
    lb_common::abi::Meta,
    lb_common::abi::VipIndex,
    lb_common::abi::Vip4Bucket,
    lb_common::abi::Vip6Bucket,
    lb_common::abi::RuleRow,
    lb_common::abi::TableState,
    lb_common::abi::SlotRow,
    lb_common::abi::Backend,
    lb_common::abi::Egress,
    lb_common::abi::Source,
    lb_common::abi::BenchState,
    PinRow,
    RecordRow,
    LoadRow
);

/// A row of `XLB_PINS` or `XLB_CONNECTIONS`, one of `XLB_RECORDS` and one of `XLB_LOADS`, as words.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct PinRow([u64; lb_common::abi::PINS_PER_BUCKET]);

#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct RecordRow([u64; 8]);

#[derive(Clone, Copy)]
#[repr(C)]
pub struct LoadRow([u64; 2]);

/// A shared, writable mapping of an array map made with BPF_F_MMAPABLE.
#[derive(Debug)]
pub struct Rows<T: Row> {
    base: NonNull<u8>,
    bytes: usize,
    rows: usize,
    row: PhantomData<T>,
}

// SAFETY: the memory is shared with the kernel anyway; every access is an atomic word.
unsafe impl<T: Row> Send for Rows<T> {}
// SAFETY: as for Send.
unsafe impl<T: Row> Sync for Rows<T> {}

impl<T: Row> Rows<T> {
    const WORDS: usize = size_of::<T>() / 8;

    /// Maps all `rows` rows. The mapping outlives the descriptor.
    pub fn map(fd: BorrowedFd<'_>, rows: u32) -> io::Result<Self> {
        let rows = rows as usize;
        let bytes = rows * size_of::<T>();
        // SAFETY: a fresh mapping, at no fixed address, of a descriptor that is open.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { base, bytes, rows, row: PhantomData })
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.rows * Self::WORDS, "word {index} is outside of the map");
        // SAFETY: inside the mapping, which is page-aligned and lives as long as self.
        unsafe { AtomicU64::from_ptr(self.base.cast::<u64>().add(index).as_ptr()) }
    }

    /// All words of all rows, which others change meanwhile.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the whole mapping, page-aligned, which lives as long as self; every access is an atomic word.
        unsafe { std::slice::from_raw_parts(self.base.cast::<AtomicU64>().as_ptr(), self.rows * Self::WORDS) }
    }

    /// One word of a row, as it is now.
    pub fn load_word(&self, row: usize, word: usize) -> u64 {
        assert!(word < Self::WORDS);
        self.word(row * Self::WORDS + word).load(Ordering::Acquire)
    }

    /// Stores one word of a row, whole, after everything that was stored before.
    pub fn store_word(&self, row: usize, word: usize, value: u64) {
        assert!(word < Self::WORDS);
        self.word(row * Self::WORDS + word).store(value, Ordering::Release);
    }

    /// Stores a half word, counted over the whole map, whole.
    pub fn store_half(&self, index: usize, value: u32) {
        assert!(index < self.rows * Self::WORDS * 2, "half word {index} is outside of the map");
        // SAFETY: inside the mapping, which is page-aligned and lives as long as self.
        let half = unsafe { AtomicU32::from_ptr(self.base.cast::<u32>().add(index).as_ptr()) };
        half.store(value, Ordering::Release);
    }

    /// Stores one byte of a row.
    pub fn store_byte(&self, row: usize, byte: usize, value: u8) {
        assert!(row < self.rows && byte < size_of::<T>());
        // SAFETY: inside the mapping, which lives as long as self.
        let place = unsafe { AtomicU8::from_ptr(self.base.add(row * size_of::<T>() + byte).as_ptr()) };
        place.store(value, Ordering::Release);
    }

    pub fn len(&self) -> usize {
        self.rows
    }

    /// Fills a row, word by word: for rows that no packet reads yet.
    pub fn store(&self, row: usize, value: &T) {
        for word in 0..Self::WORDS {
            // SAFETY: a Row is WORDS words without padding; `read_unaligned` asks for no alignment.
            let value = unsafe { std::ptr::from_ref(value).cast::<u64>().add(word).read_unaligned() };
            self.store_word(row, word, value);
        }
    }

    /// A copy of all rows. What is zero is not written: most maps are empty for the most part, and memory that nobody has
    /// written takes none.
    pub fn to_vec(&self) -> Vec<T> {
        let mut rows = Box::<[T]>::new_zeroed_slice(self.rows);
        for index in 0..self.rows * Self::WORDS {
            let word = self.word(index).load(Ordering::Acquire);
            if word != 0 {
                // SAFETY: there are so many rows, and index counts their words.
                unsafe { rows.as_mut_ptr().cast::<u64>().add(index).write(word) };
            }
        }
        // SAFETY: a Row takes any bit pattern, and so zeros.
        unsafe { rows.assume_init() }.into_vec()
    }
}

impl Rows<RecordRow> {
    /// All records, which packets fill meanwhile.
    pub fn records(&self) -> &[Record] {
        const { assert!(size_of::<Record>() == size_of::<RecordRow>()) };
        // SAFETY: the whole mapping, page-aligned, which lives as long as self; a record is atomic words.
        unsafe { std::slice::from_raw_parts(self.base.cast::<Record>().as_ptr(), self.rows) }
    }
}

impl<T: Row> Drop for Rows<T> {
    fn drop(&mut self) {
        // SAFETY: exactly what `map` mapped; nothing borrowed outlives self.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}
