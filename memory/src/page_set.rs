//! Sets of pages of guest memory.

use vm_memory::GuestAddress;

use crate::PAGE_SIZE;

/// Pages per word of a set.
const PAGES_PER_WORD: usize = u64::BITS as usize;

/// A set of pages of guest memory, with a bit for each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet {
    regions: Vec<RegionPages>,
}

/// The pages of one region.
#[derive(Debug, Clone, PartialEq, Eq)]
struct RegionPages {
    start: GuestAddress,
    page_count: usize,
    /// The lowest bit of the first word is the region's first page. Bits past the region's end are zero.
    words: Vec<u64>,
}

impl PageSet {
    /// Creates a set of pages of regions in ascending order, each given by its start, its length in bytes, and the bits
    /// of its pages: the lowest bit of the first word is the first page. Bits past the end of a region are ignored.
    pub fn from_words(regions: impl IntoIterator<Item = (GuestAddress, u64, Vec<u64>)>) -> PageSet {
        let regions = regions.into_iter().map(|(start, len, mut words)| {
            let page_count = len as usize / PAGE_SIZE;
            words.resize(page_count.div_ceil(PAGES_PER_WORD), 0);
            let bits = page_count % PAGES_PER_WORD;
            if let Some(last) = words.last_mut().filter(|_| bits > 0) {
                *last &= (1 << bits) - 1;
            }
            RegionPages {
                start,
                page_count,
                words,
            }
        });
        PageSet {
            regions: regions.collect(),
        }
    }

    /// Creates an empty set of pages of regions, given by their start and their length in bytes.
    pub fn empty(regions: impl IntoIterator<Item = (GuestAddress, u64)>) -> PageSet {
        let regions = regions.into_iter();
        PageSet::from_words(regions.map(|(start, len)| (start, len, Vec::new())))
    }

    /// Adds the page at `address`. An address outside all regions adds nothing.
    pub fn insert(&mut self, address: GuestAddress) {
        for region in &mut self.regions {
            let Some(offset) = address.0.checked_sub(region.start.0) else {
                continue;
            };
            let page = offset as usize / PAGE_SIZE;
            if page < region.page_count {
                region.words[page / PAGES_PER_WORD] |= 1 << (page % PAGES_PER_WORD);
                return;
            }
        }
    }

    /// Returns whether the page at `address` is in the set.
    pub fn contains(&self, address: GuestAddress) -> bool {
        self.regions.iter().any(|region| {
            let offset = address.0.checked_sub(region.start.0);
            let page = offset.map(|offset| offset as usize / PAGE_SIZE);
            let page = page.filter(|page| *page < region.page_count);
            page.is_some_and(|page| {
                region.words[page / PAGES_PER_WORD] >> (page % PAGES_PER_WORD) & 1 != 0
            })
        })
    }

    /// Removes the pages of `len` bytes from `address` on.
    pub(crate) fn remove(&mut self, address: GuestAddress, len: u64) {
        let removed = address.0..address.0 + len;
        for region in &mut self.regions {
            for (index, word) in region.words.iter_mut().enumerate().filter(|it| *it.1 != 0) {
                for bit in 0..PAGES_PER_WORD {
                    let page = index * PAGES_PER_WORD + bit;
                    if removed.contains(&(region.start.0 + (page * PAGE_SIZE) as u64)) {
                        *word &= !(1 << bit);
                    }
                }
            }
        }
    }

    /// Adds the pages of `other`, a set of the same regions.
    pub fn add(&mut self, other: &PageSet) {
        self.combine(other, |word, other| word | other);
    }

    /// Adds the pages of `len` bytes from `address` on, which are in one region.
    pub(crate) fn insert_range(&mut self, address: GuestAddress, len: usize) {
        for page in (address.0..address.0 + len as u64).step_by(PAGE_SIZE) {
            self.insert(GuestAddress(page));
        }
    }

    /// Removes the pages of `other`, a set of the same regions.
    pub fn subtract(&mut self, other: &PageSet) {
        self.combine(other, |word, other| word & !other);
    }

    /// Removes the pages that are not in `other`, a set of the same regions.
    pub(crate) fn retain(&mut self, other: &PageSet) {
        self.combine(other, |word, other| word & other);
    }

    fn combine(&mut self, other: &PageSet, operation: impl Fn(u64, u64) -> u64) {
        for (region, others) in self.regions.iter_mut().zip(&other.regions) {
            debug_assert_eq!(region.start, others.start);
            for (word, other) in region.words.iter_mut().zip(&others.words) {
                *word = operation(*word, *other);
            }
        }
    }

    /// Returns the start of each region and the bits of its pages; see [`PageSet::from_words`].
    pub fn words(&self) -> impl Iterator<Item = (GuestAddress, &[u64])> {
        self.regions
            .iter()
            .map(|region| (region.start, &*region.words))
    }

    /// Returns the number of pages.
    pub fn len(&self) -> usize {
        let words = self.regions.iter().flat_map(|region| &region.words);
        words.map(|word| word.count_ones() as usize).sum()
    }

    /// Returns whether it has no page.
    pub fn is_empty(&self) -> bool {
        let mut words = self.regions.iter().flat_map(|region| &region.words);
        words.all(|&word| word == 0)
    }

    /// Returns the addresses of the pages, ascending.
    pub fn iter(&self) -> impl Iterator<Item = GuestAddress> {
        self.regions.iter().flat_map(|region| {
            let pages = region.words.iter().enumerate().flat_map(|(index, &word)| {
                let is_set = move |bit: &usize| word >> bit & 1 != 0;
                let bits = (0..PAGES_PER_WORD).filter(is_set);
                bits.map(move |bit| index * PAGES_PER_WORD + bit)
            });
            pages.map(|page| GuestAddress(region.start.0 + (page * PAGE_SIZE) as u64))
        })
    }

    /// Returns the runs of adjacent pages, ascending, each with its address and its length in bytes. A run is in one
    /// region, and longer ones are cut into runs of at most `max_len` bytes, whole pages.
    pub fn runs(&self, max_len: usize) -> impl Iterator<Item = (GuestAddress, usize)> {
        let max_len = (max_len & !(PAGE_SIZE - 1)).max(PAGE_SIZE);
        self.regions.iter().flat_map(move |region| {
            let mut page = 0;
            std::iter::from_fn(move || {
                let first = region.next(page, true)?;
                let last = first + max_len / PAGE_SIZE;
                let end = region.next(first, false).unwrap_or(last).min(last);
                page = end;
                let address = GuestAddress(region.start.0 + (first * PAGE_SIZE) as u64);
                Some((address, (end - first) * PAGE_SIZE))
            })
        })
    }
}

impl RegionPages {
    /// Returns the first page from `page` on that is in the set, or, if not `contained`, the first that is not.
    /// `None` if there is none.
    fn next(&self, page: usize, contained: bool) -> Option<usize> {
        let first = page / PAGES_PER_WORD;
        let words = self.words.iter().enumerate().skip(first);
        let mut mask = u64::MAX << (page % PAGES_PER_WORD);
        for (index, &word) in words {
            let bits = if contained { word } else { !word } & mask;
            if bits != 0 {
                return Some(index * PAGES_PER_WORD + bits.trailing_zeros() as usize);
            }
            mask = u64::MAX;
        }
        (!contained).then_some(self.words.len() * PAGES_PER_WORD)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = PAGE_SIZE as u64;

    proptest! {
        #[test]
        fn runs_are_the_pages_of_the_set(
            pages in prop::collection::btree_set(0..200_u64, 0..200),
            max_pages in 1..90_usize,
        ) {
            // A first region of 70 pages and a second one of 130.
            let address = |page: u64| match page {
                0..70 => GuestAddress(page * PAGE),
                _ => GuestAddress((1000 + page) * PAGE),
            };
            let regions = [(address(0), 70 * PAGE), (address(70), 130 * PAGE)];
            let mut set = PageSet::empty(regions);
            prop_assert!(set.is_empty());
            for &page in &pages {
                set.insert(address(page));
            }
            let expected: BTreeSet<_> = pages.iter().map(|&page| address(page)).collect();
            prop_assert_eq!(set.len(), expected.len());
            for page in 0..200 {
                prop_assert_eq!(set.contains(address(page)), pages.contains(&page));
            }
            prop_assert!(!set.contains(GuestAddress(70 * PAGE)) && !set.contains(GuestAddress(1200 * PAGE)));
            prop_assert_eq!(set.iter().collect::<BTreeSet<_>>(), expected.clone());
            let mut found = BTreeSet::new();
            for (start, len) in set.runs(max_pages * PAGE_SIZE) {
                prop_assert!(len > 0 && len <= max_pages * PAGE_SIZE);
                for offset in (0..len as u64).step_by(PAGE_SIZE) {
                    prop_assert!(found.insert(GuestAddress(start.0 + offset)));
                }
            }
            prop_assert_eq!(found, expected);
            let words = set.words().zip(regions);
            let words = words.map(|((start, words), (_, len))| (start, len, words.to_vec()));
            prop_assert_eq!(&PageSet::from_words(words), &set);
            let mut sum = PageSet::empty(regions);
            sum.insert(address(3));
            sum.add(&set);
            let mut rest = sum.clone();
            rest.subtract(&set);
            prop_assert_eq!(rest.contains(address(3)), !pages.contains(&3));
            prop_assert!(rest.len() <= 1);
            set.insert(address(3));
            prop_assert_eq!(sum, set);
        }

        #[test]
        fn sets_are_combined_page_by_page(
            one in prop::collection::btree_set(0..100_u64, 0..100),
            start in 0..90_u64,
            count in 0..10_usize,
        ) {
            let regions = [(GuestAddress(0), 100 * PAGE)];
            let mut set = PageSet::empty(regions);
            for page in &one {
                set.insert(GuestAddress(page * PAGE));
            }
            let mut range = PageSet::empty(regions);
            range.insert_range(GuestAddress(start * PAGE), count * PAGE_SIZE);
            prop_assert_eq!(range.len(), count);
            let (mut rest, mut common) = (set.clone(), set.clone());
            rest.subtract(&range);
            common.retain(&range);
            for page in 0..100 {
                let in_range = (start..start + count as u64).contains(&page);
                let address = GuestAddress(page * PAGE);
                prop_assert_eq!(rest.contains(address), one.contains(&page) && !in_range);
                prop_assert_eq!(common.contains(address), one.contains(&page) && in_range);
            }
        }
    }

    #[test]
    fn an_address_outside_all_regions_is_not_added() {
        // The second region begins after the first, within the pages of its last word.
        let mut set = PageSet::empty([
            (GuestAddress(PAGE), 2 * PAGE),
            (GuestAddress(3 * PAGE), PAGE),
        ]);
        set.insert(GuestAddress(0));
        set.insert(GuestAddress(4 * PAGE));
        assert!(set.is_empty());
        set.insert(GuestAddress(3 * PAGE));
        set.insert(GuestAddress(2 * PAGE));
        let pages: Vec<u64> = set.iter().map(|page| page.0 / PAGE).collect();
        assert_eq!(pages, [2, 3]);
        let words = [(GuestAddress(0), 2 * PAGE, vec![u64::MAX, 1])];
        assert_eq!(PageSet::from_words(words).len(), 2);
    }
}
