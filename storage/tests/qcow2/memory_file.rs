//! Files in memory: one that records what is done to it, and one that fails.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bantam_storage::ImageFile;

/// A change of a file.
#[derive(Debug, Clone)]
pub enum Change {
    Write {
        offset: u64,
        bytes: Vec<u8>,
    },
    /// A write that is on stable storage once it has ended.
    DurableWrite {
        offset: u64,
        bytes: Vec<u8>,
    },
    Hole(Range<u64>),
    Size(u64),
    /// All changes before are on stable storage.
    Sync,
}

impl Change {
    /// Applies the change to the bytes of a file.
    pub fn apply(&self, file: &mut Vec<u8>) {
        match self {
            Change::Write { offset, bytes } | Change::DurableWrite { offset, bytes } => {
                let end = *offset as usize + bytes.len();
                if file.len() < end {
                    file.resize(end, 0);
                }
                file[*offset as usize..end].copy_from_slice(bytes);
            }
            Change::Hole(range) => {
                let end = file.len().min(range.end as usize);
                if (range.start as usize) < end {
                    file[range.start as usize..end].fill(0);
                }
            }
            Change::Size(size) => file.resize(*size as usize, 0),
            Change::Sync => {}
        }
    }
}

/// The order of the changes of several files.
#[derive(Debug, Default)]
pub struct Journal(Mutex<Vec<usize>>);

impl Journal {
    /// Number of changes so far.
    pub fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    /// Returns the number of the file that each change was made to.
    pub fn files(&self) -> Vec<usize> {
        self.0.lock().unwrap().clone()
    }
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    changes: Vec<Change>,
}

/// A file in memory that records its changes, and whose calls begin to fail at some point.
#[derive(Debug)]
pub struct MemoryFile {
    state: Mutex<State>,
    calls: AtomicU64,
    /// Calls from this one on fail.
    failing: AtomicU64,
    /// How many of them.
    failures: AtomicU64,
    /// Largest size.
    limit: u64,
    /// Whether it always has its largest size, as a block device has, and no holes.
    is_fixed: bool,
    bytes_read: AtomicU64,
    /// Where its changes are noted together with those of others, and its number there.
    journal: Option<(Arc<Journal>, usize)>,
}

impl MemoryFile {
    pub fn new(bytes: Vec<u8>) -> MemoryFile {
        MemoryFile::with_limit(bytes, 1 << 30)
    }

    /// A file that cannot grow beyond `limit` bytes.
    pub fn with_limit(bytes: Vec<u8>, limit: u64) -> MemoryFile {
        MemoryFile {
            limit,
            is_fixed: false,
            bytes_read: AtomicU64::new(0),
            journal: None,
            state: Mutex::new(State {
                bytes,
                changes: Vec::new(),
            }),
            calls: AtomicU64::new(0),
            failing: AtomicU64::new(u64::MAX),
            failures: AtomicU64::new(0),
        }
    }

    /// A file that is like a block device: it keeps its size, and holds `bytes` until it is written.
    pub fn fixed(bytes: Vec<u8>) -> MemoryFile {
        let limit = bytes.len() as u64;
        MemoryFile {
            is_fixed: true,
            ..MemoryFile::with_limit(bytes, limit)
        }
    }

    fn check_size(&self, size: u64) -> io::Result<()> {
        match (size > self.limit, self.is_fixed) {
            (false, _) => Ok(()),
            (true, false) => Err(io::ErrorKind::FileTooLarge.into()),
            (true, true) => Err(io::ErrorKind::StorageFull.into()),
        }
    }

    /// Notes its changes in `journal` too, as those of file `number`.
    pub fn recorded_in(mut self, journal: &Arc<Journal>, number: usize) -> MemoryFile {
        self.journal = Some((Arc::clone(journal), number));
        self
    }

    /// Has `failures` calls fail, after `calls` more.
    pub fn fail_after(&self, calls: u64, failures: u64) {
        self.calls.store(0, Ordering::Relaxed);
        self.failing.store(calls, Ordering::Relaxed);
        self.failures.store(failures, Ordering::Relaxed);
    }

    /// Has no call fail any more. Returns whether one has failed.
    pub fn heal(&self) -> bool {
        let failing = self.failing.swap(u64::MAX, Ordering::Relaxed);
        self.calls.load(Ordering::Relaxed) > failing
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.state.lock().unwrap().bytes.clone()
    }

    /// Number of bytes that were read so far.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// Number of changes so far.
    pub fn len(&self) -> usize {
        self.state.lock().unwrap().changes.len()
    }

    pub fn changes(&self) -> Vec<Change> {
        self.state.lock().unwrap().changes.clone()
    }

    fn call(&self) -> io::Result<()> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let failing = self.failing.load(Ordering::Relaxed);
        if call >= failing && call - failing < self.failures.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    fn change(&self, change: Change) -> io::Result<()> {
        self.call()?;
        let mut state = self.state.lock().unwrap();
        change.apply(&mut state.bytes);
        state.changes.push(change);
        if let Some((journal, number)) = &self.journal {
            journal.0.lock().unwrap().push(*number);
        }
        Ok(())
    }
}

impl ImageFile for MemoryFile {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.call()?;
        self.bytes_read
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let state = self.state.lock().unwrap();
        let start = state.bytes.len().min(offset as usize);
        let len = bytes.len().min(state.bytes.len() - start);
        bytes[..len].copy_from_slice(&state.bytes[start..start + len]);
        bytes[len..].fill(0);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.check_size(offset.saturating_add(bytes.len() as u64))?;
        self.change(Change::Write {
            offset,
            bytes: bytes.to_vec(),
        })
    }

    fn write_durably(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.check_size(offset.saturating_add(bytes.len() as u64))?;
        self.change(Change::DurableWrite {
            offset,
            bytes: bytes.to_vec(),
        })
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        match self.is_fixed {
            true => Err(io::ErrorKind::Unsupported.into()),
            false => self.change(Change::Hole(range)),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.change(Change::Sync)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.state.lock().unwrap().bytes.len() as u64)
    }

    fn fixed_size(&self) -> io::Result<Option<u64>> {
        Ok(self.is_fixed.then_some(self.limit))
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.check_size(size)?;
        match self.is_fixed {
            true => Ok(()),
            false => self.change(Change::Size(size)),
        }
    }
}
