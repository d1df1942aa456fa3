//! A bounded table of flows.

use std::collections::HashMap;
use std::net::SocketAddr;

/// The ends of a flow as the guest sees them. Flows without ports have a number of their own in place of the
/// guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Ends {
    pub(crate) guest: SocketAddr,
    pub(crate) remote: SocketAddr,
}

struct Slot<F> {
    ends: Ends,
    /// Whether the flow is in the list of those that may have frames.
    is_queued: bool,
    flow: F,
}

/// Flows by their ends, and by the index under which they are known elsewhere for as long as they exist.
pub(crate) struct Table<F> {
    slots: Vec<Option<Slot<F>>>,
    free: Vec<usize>,
    by_ends: HashMap<Ends, usize>,
    limit: usize,
}

impl<F> Table<F> {
    /// Makes a table for at most `limit` flows.
    pub(crate) fn new(limit: usize) -> Table<F> {
        Table {
            slots: Vec::new(),
            free: Vec::new(),
            by_ends: HashMap::new(),
            limit,
        }
    }

    /// The most flows that it takes.
    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    pub(crate) fn is_full(&self) -> bool {
        self.by_ends.len() >= self.limit
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_ends.is_empty()
    }

    pub(crate) fn find(&self, ends: &Ends) -> Option<usize> {
        self.by_ends.get(ends).copied()
    }

    pub(crate) fn get(&mut self, index: usize) -> Option<&mut F> {
        let slot = self.slots.get_mut(index)?.as_mut()?;
        Some(&mut slot.flow)
    }

    /// The index of the next flow that is inserted.
    pub(crate) fn next_index(&self) -> usize {
        self.free.last().copied().unwrap_or(self.slots.len())
    }

    /// Inserts a flow between ends that have none, and returns its index.
    pub(crate) fn insert(&mut self, ends: Ends, flow: F) -> usize {
        let slot = Some(Slot {
            ends,
            is_queued: false,
            flow,
        });
        let index = match self.free.pop() {
            Some(index) => {
                self.slots[index] = slot;
                index
            }
            None => {
                self.slots.push(slot);
                self.slots.len() - 1
            }
        };
        self.by_ends.insert(ends, index);
        index
    }

    pub(crate) fn remove(&mut self, index: usize) -> Option<F> {
        let slot = self.slots.get_mut(index)?.take()?;
        self.by_ends.remove(&slot.ends);
        self.free.push(index);
        Some(slot.flow)
    }

    /// Marks a flow as queued. `true` if it was not.
    pub(crate) fn queue(&mut self, index: usize) -> bool {
        match self.slots.get_mut(index) {
            Some(Some(slot)) => !std::mem::replace(&mut slot.is_queued, true),
            _ => false,
        }
    }

    /// Marks a flow as not queued.
    pub(crate) fn unqueue(&mut self, index: usize) {
        if let Some(Some(slot)) = self.slots.get_mut(index) {
            slot.is_queued = false;
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, &F)> {
        let slots = self.slots.iter().enumerate();
        slots.filter_map(|(index, slot)| Some((index, &slot.as_ref()?.flow)))
    }

    /// Returns the indices of all flows.
    pub(crate) fn indices(&self) -> Vec<usize> {
        self.by_ends.values().copied().collect()
    }
}
