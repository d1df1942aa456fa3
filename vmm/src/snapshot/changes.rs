//! Which pages of guest memory have changed since a snapshot.

use bantam_memory::{Backing, GuestMemory, PageSet};
use bantam_snapshot::{MemoryFile, SnapshotError, SnapshotFiles, SnapshotId, StateFile};
use vm_memory::{Bytes, GuestAddress};

use crate::error::Error;
use crate::vm::Vm;

/// What is known of changes of guest memory.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    /// The snapshot since which all changes are logged, or in `kept`.
    logged_since: Option<SnapshotId>,
    /// Pages that were taken from the logs for a snapshot that failed.
    kept: Option<PageSet>,
    /// The snapshot that guest memory is mapped from. Its pages that have been written are not the file's any more.
    mapped_from: Option<SnapshotId>,
}

impl Changes {
    /// Returns what a machine that goes on from snapshot `id` knows. If its memory `is_mapped` from there, the host knows
    /// which pages have been written since.
    pub(crate) fn of_restored(id: SnapshotId, is_mapped: bool) -> Changes {
        Changes {
            logged_since: Some(id),
            kept: None,
            mapped_from: is_mapped.then_some(id),
        }
    }

    /// Takes the changes since snapshot `base`, or all logged ones for a full snapshot. Returns `None` if they have not
    /// been logged. Unless [`Changes::note`] follows, they are kept.
    fn take(
        &mut self,
        base: Option<SnapshotId>,
        vm: &Vm,
        memory: &GuestMemory,
    ) -> Result<Option<PageSet>, Error> {
        let mut pages = match vm.take_written() {
            Ok(pages) => pages,
            Err(error) => {
                // What KVM has returned of some regions is lost.
                self.logged_since = None;
                return Err(error);
            }
        };
        pages.add(&memory.take_dirty());
        if let Some(kept) = &self.kept {
            pages.add(kept);
        }
        self.kept = Some(pages.clone());
        Ok((base.is_some() && base == self.logged_since).then_some(pages))
    }

    /// Notes that memory is not mapped from the snapshot any more that the machine goes on from.
    pub(crate) fn forget_mapping(&mut self) {
        self.mapped_from = None;
    }

    /// Notes that snapshot `id` has all changes that were taken.
    pub(crate) fn note(&mut self, id: SnapshotId, is_logging: bool) {
        self.kept = None;
        self.logged_since = is_logging.then_some(id);
    }
}

/// Returns the pages of a snapshot of a paused machine: all that can differ from zero, or those that have changed since
/// `base`, with its id.
///
/// # Errors
/// If `base` is not a snapshot of such a machine, or its changes are not known and it is no full snapshot.
pub(crate) fn changes_since(
    base: Option<&SnapshotFiles>,
    changes: &mut Changes,
    is_logging: bool,
    vm: &Vm,
    memory: &GuestMemory,
) -> Result<(PageSet, Option<SnapshotId>), Error> {
    let state = base.map(|base| StateFile::open(&base.state)).transpose()?;
    let base_id = state.as_ref().map(|state| state.facts().id);
    let logged = match is_logging {
        true => changes.take(base_id, vm, memory)?,
        false => None,
    };
    if let Some(pages) = logged {
        return Ok((pages, base_id));
    }
    let failed = Error::resource("the list of pages of guest memory");
    let (Some(base), Some(state)) = (base, state) else {
        return Ok((memory.pages_with_content().map_err(failed)?, None));
    };
    if memory.backing() == Backing::PrivateFile && base_id == changes.mapped_from {
        return Ok((memory.written_pages().map_err(failed)?, base_id));
    }
    if state.pages().is_some() {
        let path = base.state.clone();
        return Err(SnapshotError::Differential { path }.into());
    }
    let file = MemoryFile::open(&base.memory, &state)?;
    let regions = memory.regions().map(|region| (region.start.0, region.len));
    if !regions.eq(state.facts().regions.iter().copied()) {
        return Err(Error::OtherMemory {
            path: base.state.clone(),
        });
    }
    let earlier = file.map().map_err(|error| Error::Memory {
        mib: memory.size() >> 20,
        reason: error.to_string(),
    })?;
    let pages = differing_pages(memory, &earlier).map_err(failed)?;
    Ok((pages, base_id))
}

/// Returns the pages in which two memories with the same regions differ.
fn differing_pages(one: &GuestMemory, other: &GuestMemory) -> std::io::Result<PageSet> {
    const PAGE_SIZE: usize = bantam_memory::PAGE_SIZE;
    let mut candidates = one.pages_with_content()?;
    candidates.add(&other.pages_with_content()?);
    let mut pages = PageSet::empty(one.regions().map(|region| (region.start, region.len)));
    let mut bytes = [[0; PAGE_SIZE]; 2];
    for (start, len) in candidates.runs(usize::MAX) {
        for address in (start.0..start.0 + len as u64).step_by(PAGE_SIZE) {
            let address = GuestAddress(address);
            for (memory, bytes) in [one, other].into_iter().zip(&mut bytes) {
                memory
                    .read_slice(bytes, address)
                    .map_err(std::io::Error::other)?;
            }
            if bytes[0] != bytes[1] {
                pages.insert(address);
            }
        }
    }
    Ok(pages)
}
