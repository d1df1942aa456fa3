//! Which pages of guest memory have changed since a snapshot.

use std::path::Path;

use bantam_memory::{GuestMemory, PageSet};
use bantam_snapshot::{Facts, MemoryFile, SnapshotError, SnapshotId, StateFile};
use vm_memory::{Bytes, GuestAddress};

use super::SnapshotBase;
use crate::error::Error;
use crate::vm::Vm;

/// What is known of changes of guest memory.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    /// The snapshot since which all changes are logged, or in `kept`.
    logged_since: Option<SnapshotId>,
    /// Pages that were taken from the logs, for a snapshot that failed or for a fork.
    kept: Option<PageSet>,
    /// The snapshot that guest memory is mapped from, which is complete. Its pages that have been written are not the
    /// file's any more.
    mapped_from: Option<StateFile>,
    /// The last snapshot, or the one that the machine goes on from, without the sections of the machine.
    last: Option<StateFile>,
}

impl Changes {
    /// Returns what a machine knows that goes on from the complete snapshot with these facts, whose state file is at
    /// `path`. If its memory `is_mapped` from there, the host knows which pages have been written since.
    pub(crate) fn of_restored(path: &Path, facts: &Facts, is_mapped: bool) -> Changes {
        let snapshot = StateFile::new(path, facts.clone(), None, Vec::new());
        Changes {
            logged_since: Some(facts.id),
            kept: None,
            mapped_from: is_mapped.then(|| snapshot.clone()),
            last: Some(snapshot),
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
        self.take_new(vm, memory)?;
        let is_since_base = base.is_some() && base == self.logged_since;
        Ok(self.kept.clone().filter(|_| is_since_base))
    }

    /// Takes the changes that have been logged since they were last taken. They are kept for the next snapshot.
    pub(crate) fn take_new(&mut self, vm: &Vm, memory: &GuestMemory) -> Result<PageSet, Error> {
        let written = vm.take_written().and_then(|mut pages| {
            let by_devices = memory.take_dirty();
            pages.add(&by_devices.map_err(Error::resource("the log of written pages"))?);
            Ok(pages)
        });
        let pages = match written {
            Ok(pages) => pages,
            Err(error) => {
                // What the logs have returned of some regions is lost.
                self.logged_since = None;
                return Err(error);
            }
        };
        match &mut self.kept {
            Some(kept) => kept.add(&pages),
            None => self.kept = Some(pages.clone()),
        }
        Ok(pages)
    }

    /// Notes that memory is not mapped from the snapshot any more that the machine goes on from.
    pub(crate) fn forget_mapping(&mut self) {
        self.mapped_from = None;
    }

    /// Notes that `snapshot` has all changes that were taken.
    pub(crate) fn note(&mut self, snapshot: &StateFile, is_logging: bool) {
        self.kept = None;
        self.logged_since = is_logging.then_some(snapshot.facts().id);
        self.last = Some(snapshot.without_sections());
    }

    /// Returns the memory file at `path` with the pages that it has, if it is that of snapshot `base` or of the last one.
    pub(crate) fn earlier(&self, path: &Path, base: SnapshotId) -> Result<Option<Earlier>, Error> {
        let known = [&self.last, &self.mapped_from].into_iter().flatten();
        // What was written since the base includes what was written since the last snapshot.
        let is_last =
            |it: &StateFile| self.last.as_ref().map(|last| last.facts().id) == Some(it.facts().id);
        let fitting = known.filter(|it| it.facts().id == base || is_last(it));
        for snapshot in fitting {
            let Ok(file) = MemoryFile::open(path, snapshot) else {
                continue;
            };
            let is_complete = file.is_complete(snapshot)?;
            return Ok(Some(Earlier {
                file,
                base: snapshot.facts().base.filter(|_| !is_complete),
                pages: snapshot.pages().filter(|_| !is_complete).cloned(),
            }));
        }
        Ok(None)
    }
}

/// The memory file of an earlier snapshot, for a new one to begin with.
pub(crate) struct Earlier {
    pub(crate) file: MemoryFile,
    /// What it is based on, unless it is complete.
    pub(crate) base: Option<SnapshotId>,
    /// The pages that it has, unless it is complete.
    pub(crate) pages: Option<PageSet>,
}

/// The pages that a snapshot is to have.
pub(crate) struct Selection {
    /// All that can differ from zero, or those that have changed since `base`.
    pub(crate) pages: PageSet,
    pub(crate) base: Option<SnapshotId>,
}

impl Selection {
    fn all(memory: &GuestMemory) -> std::io::Result<Selection> {
        let pages = memory.pages_with_content()?;
        Ok(Selection { pages, base: None })
    }
}

/// Returns the pages of a snapshot of a paused machine that is based on `base`.
///
/// # Errors
/// If `base` is not a snapshot of such a machine, or its changes are not known and it is no full snapshot.
pub(crate) fn changes_since(
    base: Option<&SnapshotBase>,
    changes: &mut Changes,
    is_logging: bool,
    vm: &Vm,
    memory: &GuestMemory,
) -> Result<Selection, Error> {
    let state = match base {
        Some(SnapshotBase::Files(files)) => Some(StateFile::open(&files.state)?),
        Some(SnapshotBase::Last) | None => None,
    };
    let base_id = match base {
        Some(SnapshotBase::Last) => changes.logged_since,
        Some(SnapshotBase::Files(_)) | None => state.as_ref().map(|state| state.facts().id),
    };
    if is_logging && let Some(pages) = changes.take(base_id, vm, memory)? {
        return Ok(Selection {
            pages,
            base: base_id,
        });
    }
    let failed = Error::resource("the list of pages of guest memory");
    let mapped_from = changes.mapped_from.as_ref();
    let mapped_from = mapped_from.map(|it| it.facts().id);
    let mapped_from = mapped_from.filter(|_| memory.knows_written_pages());
    let is_base = |id: SnapshotId| match base {
        Some(SnapshotBase::Last) => true,
        Some(SnapshotBase::Files(_)) | None => base_id == Some(id),
    };
    if let Some(id) = mapped_from.filter(|id| is_base(*id)) {
        return Ok(Selection {
            pages: memory.written_pages().map_err(failed)?,
            base: Some(id),
        });
    }
    let (Some(SnapshotBase::Files(base)), Some(state)) = (base, state) else {
        return Selection::all(memory).map_err(failed);
    };
    let file = MemoryFile::open(&base.memory, &state)?;
    if !file.is_complete(&state)? {
        let path = base.state.clone();
        return Err(SnapshotError::Differential { path }.into());
    }
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
    Ok(Selection {
        pages,
        base: base_id,
    })
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
