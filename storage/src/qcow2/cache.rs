//! A bounded cache of L2 tables that is read without a lock.
//!
//! Tables are cached in slices of at most 4 KiB. The words of a slot are atomics under a sequence lock: a reader
//! that has met a writer notices it by the sequence number and takes the slow path, so it never waits. Writers hold
//! the lock of [`Tables`](super::tables::Tables). What a slot has and the file has not is among the pending entries, so
//! a slot can be reused at any time.

use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

/// Maximum size of a slice in bytes.
const SLICE_BYTES: u64 = 4096;
/// Number of slots that a slice can be in.
const WAYS: usize = 8;

#[derive(Debug)]
pub(super) struct SliceCache {
    sets: Box<[Set]>,
    words: usize,
}

/// The slots that a slice can be in.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Set {
    /// Number of the slice in each slot plus one, or 0. They are together because a look-up of a slice that is not cached
    /// reads them all, and an overlay that has nothing at an offset has no slice for it.
    tags: [AtomicU64; WAYS],
    slots: [Slot; WAYS],
}

#[derive(Debug, Default)]
struct Slot {
    /// Odd while a writer changes the slot or its tag.
    sequence: AtomicU64,
    /// Whether the slot was read since it was last considered for reuse.
    is_used: AtomicBool,
    words: OnceLock<Box<[AtomicU64]>>,
}

impl SliceCache {
    /// Makes a cache of at most about `bytes` bytes of slices.
    pub fn new(bytes: u64, cluster_size: u64) -> SliceCache {
        let slice_bytes = cluster_size.min(SLICE_BYTES);
        let sets = (bytes / slice_bytes / WAYS as u64)
            .clamp(1, 1 << 16)
            .next_power_of_two();
        SliceCache {
            sets: (0..sets).map(|_| Set::default()).collect(),
            words: slice_bytes as usize / 8,
        }
    }

    /// Number of 8-byte words of a slice.
    pub fn words(&self) -> u64 {
        self.words as u64
    }

    /// Calls `look` with the words of a slice if it is cached. It may see a mixture of old and new words, in
    /// which case its result is dropped.
    pub fn read<T>(&self, slice: u64, look: impl FnOnce(&[AtomicU64]) -> T) -> Option<T> {
        let (tag, slot) = self.set(slice).find(slice)?;
        let sequence = slot.sequence.load(Ordering::Acquire);
        if sequence & 1 != 0 || tag.load(Ordering::Relaxed) != slice + 1 {
            return None;
        }
        let result = look(slot.words.get()?);
        fence(Ordering::Acquire);
        if slot.sequence.load(Ordering::Relaxed) != sequence {
            return None;
        }
        if !slot.is_used.load(Ordering::Relaxed) {
            slot.is_used.store(true, Ordering::Relaxed);
        }
        Some(result)
    }

    /// Has the processor fetch a word of a slice, if that is cached. The tables of a disk are too large for the caches
    /// that are next to the processor, as data goes through these too.
    pub fn prefetch(&self, slice: u64, word: usize) {
        let found = self.set(slice).find(slice);
        let words = found.and_then(|(_, slot)| slot.words.get());
        if let Some(word) = words.and_then(|words| words.get(word)) {
            // SAFETY: a prefetch accesses nothing that a program could notice.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(ptr::from_ref(word).cast()) };
        }
    }

    /// Puts a slice into the cache. The caller holds the lock of the tables.
    pub fn insert(&self, slice: u64, words: &[u64]) {
        let set = self.set(slice);
        let (tag, slot) = set.find(slice).unwrap_or_else(|| set.choose());
        let empty = || (0..self.words).map(|_| AtomicU64::new(0)).collect();
        let place = slot.words.get_or_init(empty);
        slot.change(|| {
            tag.store(slice + 1, Ordering::Relaxed);
            for (word, &value) in place.iter().zip(words) {
                word.store(value, Ordering::Relaxed);
            }
        });
    }

    /// Replaces the words of a slice from `first` on, if it is cached. The caller holds the lock of the
    /// tables.
    pub fn update(&self, slice: u64, first: usize, words: &[u64]) {
        let found = self.set(slice).find(slice);
        if let Some((slot, place)) = found.and_then(|(_, slot)| Some((slot, slot.words.get()?))) {
            slot.change(|| {
                for (word, &value) in place.iter().skip(first).zip(words) {
                    word.store(value, Ordering::Relaxed);
                }
            });
        }
    }

    /// Forgets a slice. The caller holds the lock of the tables.
    pub fn remove(&self, slice: u64) {
        if let Some((tag, slot)) = self.set(slice).find(slice) {
            slot.change(|| tag.store(0, Ordering::Relaxed));
        }
    }

    /// Forgets all slices. The caller holds the lock of the tables.
    pub fn clear(&self) {
        for (tag, slot) in self.sets.iter().flat_map(Set::iter) {
            slot.change(|| tag.store(0, Ordering::Relaxed));
        }
    }

    fn set(&self, slice: u64) -> &Set {
        // The number of sets is a power of two.
        &self.sets[slice as usize & (self.sets.len() - 1)]
    }
}

impl Set {
    /// Returns the slots with their tags.
    fn iter(&self) -> impl Iterator<Item = (&AtomicU64, &Slot)> {
        self.tags.iter().zip(&self.slots)
    }

    /// Returns the slot of a slice.
    fn find(&self, slice: u64) -> Option<(&AtomicU64, &Slot)> {
        self.iter()
            .find(|(tag, _)| tag.load(Ordering::Relaxed) == slice + 1)
    }

    /// Returns the slot for another slice: an empty one if there is one, otherwise one that was not used lately.
    fn choose(&self) -> (&AtomicU64, &Slot) {
        let is_unused = |(_, slot): &(_, &Slot)| !slot.is_used.swap(false, Ordering::Relaxed);
        self.iter()
            .find(|(tag, _)| tag.load(Ordering::Relaxed) == 0)
            .or_else(|| self.iter().find(is_unused))
            .unwrap_or((&self.tags[0], &self.slots[0]))
    }
}

impl Slot {
    /// Changes the slot so that readers notice it.
    fn change(&self, change: impl FnOnce()) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.sequence.store(sequence + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        change();
        self.sequence.store(sequence + 2, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_was_inserted_and_updated() {
        let cache = SliceCache::new(1 << 20, 65536);
        assert!(cache.read(5, |_| ()).is_none());
        cache.insert(5, &vec![7; 512]);
        cache.update(5, 3, &[8, 9]);
        let words = cache.read(5, |words| {
            words[2..6]
                .iter()
                .map(|word| word.load(Ordering::Relaxed))
                .collect::<Vec<_>>()
        });
        assert_eq!(words, Some(vec![7, 8, 9, 7]));
        cache.remove(5);
        assert!(cache.read(5, |_| ()).is_none());
    }

    #[test]
    fn keeps_slices_that_are_in_use() {
        let cache = SliceCache::new(0, 512);
        for slice in 0..WAYS as u64 {
            cache.insert(slice, &[slice; 64]);
        }
        cache.read(0, |_| ()).unwrap();
        cache.insert(100, &[1; 64]);
        assert!(cache.read(0, |_| ()).is_some());
        assert!(cache.read(1, |_| ()).is_none());
    }

    #[test]
    fn readers_never_see_a_mixture() {
        let cache = SliceCache::new(0, 512);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for value in 0..100_000 {
                    cache.insert(value % 20, &[value; 64]);
                }
            });
            for slice in (0..100_000).map(|turn| turn % 20) {
                let words = cache.read(slice, |words| {
                    words
                        .iter()
                        .map(|word| word.load(Ordering::Relaxed))
                        .collect::<Vec<_>>()
                });
                if let Some(words) = words {
                    assert!(
                        words
                            .iter()
                            .all(|&word| word == words[0] && word % 20 == slice)
                    );
                }
            }
        });
    }
}
