//! Access to guest memory by words.

use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use vm_memory::GuestAddress;

use crate::GuestMemory;
use crate::copy::read_words;

/// Words of type `T` in guest memory, all in one region. `M` is a reference to the memory, which
/// the range keeps alive.
///
/// The guest may change them at any time, so they are read and written only by value.
pub struct GuestRange<T, M = Arc<GuestMemory>> {
    memory: M,
    /// Aligned.
    start: NonNull<T>,
    /// Number of words.
    len: usize,
}

// SAFETY: the pointer is into `memory`, which can be sent, as far as `M` can. It is shared between
// threads anyway.
unsafe impl<T, M: Send> Send for GuestRange<T, M> {}

impl<T: Word, M: Deref<Target = GuestMemory>> GuestRange<T, M> {
    /// Returns the `len` words at `address` if they are aligned and all in one region of `memory`.
    pub fn new(memory: M, address: GuestAddress, len: usize) -> Option<GuestRange<T, M>> {
        let size = len.checked_mul(size_of::<T>())?;
        let start = memory.host_range(address, size)?.cast::<T>();
        start
            .is_aligned()
            .then_some(GuestRange { memory, start, len })
    }

    /// Reads the `N` words from `index` on, each by an atomic access, in order; `None` if they are
    /// not all within the range.
    #[inline]
    pub fn get<const N: usize>(&self, index: usize, order: Ordering) -> Option<[T; N]> {
        let words = self.words::<N>(index)?;
        Some(std::array::from_fn(|index| {
            // SAFETY: `words` points to `N` aligned words of guest memory.
            unsafe { T::load(words.add(index), order) }
        }))
    }

    /// Reads the word at `index` by an atomic access.
    ///
    /// # Panics
    /// If it is not within the range.
    #[inline]
    pub fn load(&self, index: usize, order: Ordering) -> T {
        match self.get(index, order) {
            Some([word]) => word,
            None => out_of_range(index),
        }
    }

    /// Writes `values` from the word at `index` on, each by an atomic access, in order.
    ///
    /// # Panics
    /// If they are not all within the range.
    #[inline]
    pub fn store<const N: usize>(&self, index: usize, values: [T; N], order: Ordering) {
        let words = self.write(index, values, order);
        self.memory.mark_host(words.cast(), size_of::<[T; N]>());
    }

    /// Writes `values` like [`GuestRange::store`], but marks no page, so that several writes can be
    /// marked together. The caller then calls [`GuestRange::mark_all`] of a range that covers them.
    ///
    /// # Panics
    /// If the words are not all within the range.
    #[inline]
    pub fn store_unmarked<const N: usize>(&self, index: usize, values: [T; N], order: Ordering) {
        self.write(index, values, order);
    }

    /// Marks all pages of the range as written.
    #[inline]
    pub fn mark_all(&self) {
        let size = self.len * size_of::<T>();
        self.memory.mark_host(self.start.as_ptr().cast(), size);
    }

    /// Writes `values` from the word at `index` on, and returns their address in the host's memory.
    #[inline]
    fn write<const N: usize>(&self, index: usize, values: [T; N], order: Ordering) -> *const T {
        let Some(words) = self.words::<N>(index) else {
            out_of_range(index)
        };
        for (index, value) in values.into_iter().enumerate() {
            // SAFETY: `words` points to `N` aligned words of guest memory.
            unsafe { T::store(words.add(index), value, order) }
        }
        words
    }

    /// Returns a pointer to the `N` words from `index` on, if they are within the range.
    #[inline]
    fn words<const N: usize>(&self, index: usize) -> Option<*mut T> {
        if index >= self.len || N > self.len - index {
            return None;
        }
        // SAFETY: the index is within the range.
        Some(unsafe { self.start.as_ptr().add(index) })
    }
}

impl<M: Deref<Target = GuestMemory>> GuestRange<u8, M> {
    /// Reads `N` words of 64 bits, unaligned, from the byte at `index` on; `None` if they are not
    /// all within the range. Each byte is read once.
    #[inline]
    pub fn get_unaligned<const N: usize>(&self, index: usize) -> Option<[u64; N]> {
        if index >= self.len || size_of::<[u64; N]>() > self.len - index {
            return None;
        }
        // SAFETY: these bytes are within the range, so they are guest memory.
        Some(unsafe { read_words(self.start.as_ptr().add(index)) })
    }
}

#[cold]
fn out_of_range(index: usize) -> ! {
    panic!("word {index} is not within the range of guest memory")
}

/// An integer that is read and written by one atomic access.
pub trait Word: sealed::Access {}

mod sealed {
    use super::Ordering;

    pub trait Access: Copy {
        /// # Safety
        /// `word` must be aligned and point to mapped guest memory.
        unsafe fn load(word: *mut Self, order: Ordering) -> Self;

        /// # Safety
        /// As for `load`.
        unsafe fn store(word: *mut Self, value: Self, order: Ordering);
    }
}

macro_rules! words {
    ($($word:ty: $atomic:ty),*) => {$(
        impl Word for $word {}

        impl sealed::Access for $word {
            #[inline]
            unsafe fn load(word: *mut Self, order: Ordering) -> Self {
                // SAFETY: the caller promises a mapped, aligned word. All threads of the monitor
                // access it by atomic operations of this kind, and the guest's accesses are atomic
                // to the hardware.
                unsafe { <$atomic>::from_ptr(word) }.load(order)
            }

            #[inline]
            unsafe fn store(word: *mut Self, value: Self, order: Ordering) {
                // SAFETY: as for `load`.
                unsafe { <$atomic>::from_ptr(word) }.store(value, order);
            }
        }
    )*};
}

words!(u8: AtomicU8, u16: AtomicU16, u32: AtomicU32, u64: AtomicU64);
