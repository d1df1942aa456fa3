//! Files from which parts of guest memory are mapped privately.

use std::fs::File;
use std::sync::Arc;

use vm_memory::GuestAddress;

/// A part of guest memory whose pages are those of a file until they are written.
#[derive(Debug, Clone)]
pub struct Layer {
    /// First address.
    pub start: GuestAddress,
    /// Length in bytes, whole pages.
    pub len: u64,
    /// The file.
    pub file: Arc<File>,
    /// Where the part begins in the file.
    pub offset: u64,
}

impl Layer {
    fn end(&self) -> u64 {
        self.start.0 + self.len
    }

    /// Returns what of it is between two addresses.
    fn between(&self, start: u64, end: u64) -> Option<Layer> {
        let first = self.start.0.max(start);
        let last = self.end().min(end);
        (first < last).then(|| Layer {
            start: GuestAddress(first),
            len: last - first,
            file: self.file.clone(),
            offset: self.offset + (first - self.start.0),
        })
    }

    /// Returns whether `next` goes on where this one ends, in guest memory and in the file.
    fn is_continued_by(&self, next: &Layer) -> bool {
        self.end() == next.start.0
            && Arc::ptr_eq(&self.file, &next.file)
            && self.offset + self.len == next.offset
    }
}

/// Layers that do not overlap, in ascending order.
#[derive(Debug, Clone, Default)]
pub(crate) struct Layers(Vec<Layer>);

impl Layers {
    /// Puts `layers`, in ascending order, over what is there.
    pub(crate) fn put(&mut self, layers: &[Layer]) {
        let mut result: Vec<Layer> = Vec::with_capacity(self.0.len() + 2 * layers.len());
        let mut add = |layer: Layer| match result.last_mut() {
            Some(last) if last.is_continued_by(&layer) => last.len += layer.len,
            _ => result.push(layer),
        };
        let mut below = self.0.drain(..).peekable();
        let mut next = 0;
        for layer in layers.iter().map(Some).chain([None]) {
            let (start, end) = match layer {
                Some(layer) => (layer.start.0, layer.end()),
                None => (u64::MAX, u64::MAX),
            };
            // What is between the last layer and this one stays.
            while let Some(old) = below.peek() {
                if let Some(rest) = old.between(next, start) {
                    add(rest);
                }
                if old.end() > end {
                    break;
                }
                below.next();
            }
            if let Some(layer) = layer {
                add(layer.clone());
            }
            next = end;
        }
        drop(below);
        self.0 = result;
    }

    pub(crate) fn as_slice(&self) -> &[Layer] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn each_page_is_that_of_the_last_layer_put_there(
            rounds in prop::collection::vec(
                prop::collection::btree_map(0..40_u64, 1..9_u64, 0..6), 1..6),
        ) {
            let mut layers = Layers::default();
            let mut model = [None; 50];
            for (number, round) in rounds.iter().enumerate() {
                let file = Arc::new(File::open("/dev/null").unwrap());
                let mut put: Vec<Layer> = Vec::new();
                for (&start, &len) in round {
                    let free = put.last().map_or(0, Layer::end);
                    if start < free {
                        continue;
                    }
                    let offset = 100 * number as u64 + start;
                    put.push(Layer { start: GuestAddress(start), len, file: file.clone(), offset });
                    for page in start..start + len {
                        model[page as usize] = Some(100 * number as u64 + page);
                    }
                }
                layers.put(&put);
            }
            let mut found = [None; 50];
            let mut end = 0;
            for layer in layers.as_slice() {
                prop_assert!(layer.start.0 >= end && layer.len > 0);
                end = layer.end();
                for page in 0..layer.len {
                    found[(layer.start.0 + page) as usize] = Some(layer.offset + page);
                }
            }
            prop_assert_eq!(found, model);
        }
    }
}
