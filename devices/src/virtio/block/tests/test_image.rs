//! An image that is not raw, for tests: its parts are in a file, in memory or nowhere, and move.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bantam_storage::{Allocation, BlockStatus, Direction, Extent, FormattedDisk, Image};

use super::{CacheMode, DISK_SIZE, DiskOptions, DiskOwner, ImageWork, Random, byte_of_disk};
use crate::lock::lock;

const CLUSTER: usize = 4096;
/// What is left in a place of the file that is given up. No test writes it.
const GARBAGE: u8 = 0xee;

/// Where a cluster is.
enum Cluster {
    Nowhere,
    InFile(u64),
    InMemory(Box<[u8]>),
}

struct Clusters {
    clusters: Vec<Cluster>,
    /// Places in the file that are not in use.
    free: Vec<u64>,
    random: Random,
}

/// An image of [`DISK_SIZE`] bytes that answers in any of the ways that are allowed.
pub struct TestImage {
    file: File,
    clusters: Mutex<Clusters>,
    /// Longest time that a call takes, in microseconds.
    pub delay: AtomicU32,
    /// Whether some calls fail.
    pub fails: AtomicBool,
    /// Whether the next call panics.
    pub panics: AtomicBool,
    /// Whether all that is in the file is said to be there.
    pub is_steady: AtomicBool,
    pub flushes: AtomicUsize,
    /// How often it was prepared for writes.
    pub preparations: AtomicUsize,
    /// Whether calls wait.
    is_closed: Mutex<bool>,
    opened: Condvar,
}

impl std::fmt::Debug for TestImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TestImage")
    }
}

impl TestImage {
    /// Makes an image whose file is at `path`.
    pub fn new(path: &Path, seed: u64) -> Arc<TestImage> {
        let mut options = File::options();
        let options = options.read(true).write(true).create(true).truncate(true);
        let file = options.open(path).unwrap();
        let mut random = Random(seed);
        let count = DISK_SIZE / CLUSTER;
        let mut free: Vec<u64> = (0..count as u64 * 9 / 8).collect();
        let clusters = (0..count).map(|index| {
            let start = index * CLUSTER;
            let bytes: Vec<u8> = (start..start + CLUSTER).map(byte_of_disk).collect();
            if index % 3 == 0 {
                return Cluster::InMemory(bytes.into());
            }
            let chosen = random.below(free.len() as u64);
            let place = free.swap_remove(chosen as usize) * CLUSTER as u64;
            file.write_all_at(&bytes, place).unwrap();
            Cluster::InFile(place)
        });
        let clusters = clusters.collect();
        Arc::new(TestImage {
            clusters: Mutex::new(Clusters {
                clusters,
                free: free.iter().map(|place| place * CLUSTER as u64).collect(),
                random,
            }),
            file,
            delay: AtomicU32::new(0),
            fails: AtomicBool::new(false),
            panics: AtomicBool::new(false),
            is_steady: AtomicBool::new(false),
            flushes: AtomicUsize::new(0),
            preparations: AtomicUsize::new(0),
            is_closed: Mutex::new(false),
            opened: Condvar::new(),
        })
    }

    /// Makes a disk of the image.
    pub fn disk(self: &Arc<Self>, cache: CacheMode) -> FormattedDisk {
        let options = DiskOptions {
            cache,
            ..DiskOptions::default()
        };
        let files = vec![self.file.try_clone().unwrap().into()];
        FormattedDisk::new(Path::new("test.image"), self.clone(), files, &options).unwrap()
    }

    /// Returns the content of the disk.
    pub fn content(&self) -> Vec<u8> {
        let mut bytes = vec![0; DISK_SIZE];
        let clusters = &lock(&self.clusters).clusters;
        for (bytes, cluster) in bytes.chunks_mut(CLUSTER).zip(clusters) {
            self.read(cluster, bytes, 0);
        }
        bytes
    }

    /// Has all calls wait, or lets them go on.
    pub fn close(&self, is_closed: bool) {
        *lock(&self.is_closed) = is_closed;
        self.opened.notify_all();
    }

    pub fn is_closed(&self) -> bool {
        *lock(&self.is_closed)
    }

    fn read(&self, cluster: &Cluster, bytes: &mut [u8], skip: usize) {
        match cluster {
            Cluster::Nowhere => bytes.fill(0),
            Cluster::InFile(place) => {
                self.file.read_exact_at(bytes, place + skip as u64).unwrap();
            }
            Cluster::InMemory(content) => bytes.copy_from_slice(&content[skip..][..bytes.len()]),
        }
    }

    fn write(&self, clusters: &mut Clusters, index: usize, bytes: &[u8], skip: usize) {
        if let Cluster::Nowhere = clusters.clusters[index] {
            let free = clusters.free.len() as u64;
            clusters.clusters[index] = if free > 0 && clusters.random.below(2) > 0 {
                let chosen = clusters.random.below(free);
                let place = clusters.free.swap_remove(chosen as usize);
                self.file.write_all_at(&[0; CLUSTER], place).unwrap();
                Cluster::InFile(place)
            } else {
                Cluster::InMemory(vec![0; CLUSTER].into())
            };
        }
        match &mut clusters.clusters[index] {
            Cluster::InFile(place) => self.file.write_all_at(bytes, *place + skip as u64).unwrap(),
            Cluster::InMemory(content) => content[skip..][..bytes.len()].copy_from_slice(bytes),
            Cluster::Nowhere => unreachable!("it has a place"),
        }
    }

    /// Calls `each` with every cluster of a range, the part of it and the part of the range.
    fn for_each(
        range: Range<u64>,
        mut each: impl FnMut(usize, Range<usize>, Range<usize>),
    ) -> io::Result<()> {
        let (start, end) = (range.start as usize, range.end as usize);
        if end > DISK_SIZE {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut position = start;
        while position < end {
            let skip = position % CLUSTER;
            let len = (CLUSTER - skip).min(end - position);
            let done = position - start;
            each(position / CLUSTER, skip..skip + len, done..done + len);
            position += len;
        }
        Ok(())
    }

    /// Takes some time, and fails if it is to fail.
    fn call(&self) -> io::Result<()> {
        let mut is_closed = lock(&self.is_closed);
        while *is_closed {
            is_closed = self.opened.wait(is_closed).unwrap();
        }
        drop(is_closed);
        assert!(
            !self.panics.swap(false, Ordering::SeqCst),
            "as the test asks"
        );
        let delay = u64::from(self.delay.load(Ordering::SeqCst));
        let (delay, fails) = {
            let random = &mut lock(&self.clusters).random;
            (random.below(delay + 1), random.below(8) == 0)
        };
        if delay > 0 {
            thread::sleep(Duration::from_micros(delay));
        }
        match fails && self.fails.load(Ordering::SeqCst) {
            true => Err(io::Error::from_raw_os_error(libc::EIO)),
            false => Ok(()),
        }
    }
}

impl Image for TestImage {
    fn size(&self) -> u64 {
        DISK_SIZE as u64
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn map(&self, range: Range<u64>, direction: Direction) -> Extent {
        assert!(range.start < range.end && range.end <= DISK_SIZE as u64);
        let skip = range.start % CLUSTER as u64;
        let wanted = range.end - range.start;
        let Ok(mut clusters) = self.clusters.try_lock() else {
            return Extent::Slow { len: wanted };
        };
        let mut len = wanted.min(CLUSTER as u64 - skip);
        let is_steady = self.is_steady.load(Ordering::SeqCst);
        if !is_steady && clusters.random.below(4) == 0 {
            len = clusters.random.below(len / 512) * 512 + 512;
        }
        let is_known = is_steady || clusters.random.below(4) > 0;
        match clusters.clusters[range.start as usize / CLUSTER] {
            Cluster::InFile(place) if is_known => Extent::File {
                file: 0,
                offset: place + skip,
                len,
            },
            Cluster::Nowhere if is_known && direction == Direction::Read => Extent::Zeroes { len },
            _ => Extent::Slow { len },
        }
    }

    fn allocate(&self, range: Range<u64>) -> Option<Allocation> {
        let mut clusters = self.clusters.try_lock().ok()?;
        let index = range.start as usize / CLUSTER;
        if !matches!(clusters.clusters[index], Cluster::Nowhere) || clusters.random.below(4) == 0 {
            return None;
        }
        let place = clusters.free.pop()?;
        self.file.write_all_at(&[0; CLUSTER], place).unwrap();
        clusters.clusters[index] = Cluster::InFile(place);
        let skip = range.start % CLUSTER as u64;
        Some(Allocation {
            extent: Extent::File {
                file: 0,
                offset: place + skip,
                len: (range.end - range.start).min(CLUSTER as u64 - skip),
            },
            should_prepare: clusters.random.below(4) == 0,
        })
    }

    fn prepare(&self) -> io::Result<()> {
        self.call()?;
        self.preparations.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.call()?;
        let clusters = &lock(&self.clusters).clusters;
        Self::for_each(offset..offset + bytes.len() as u64, |index, part, done| {
            self.read(&clusters[index], &mut bytes[done], part.start);
        })
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.call()?;
        let clusters = &mut *lock(&self.clusters);
        Self::for_each(offset..offset + bytes.len() as u64, |index, part, done| {
            self.write(clusters, index, &bytes[done], part.start);
        })
    }

    fn write_zeroes(&self, range: Range<u64>, _: bool) -> io::Result<()> {
        self.call()?;
        let clusters = &mut *lock(&self.clusters);
        Self::for_each(range, |index, part, _| {
            if part.len() < CLUSTER {
                self.write(clusters, index, &vec![0; part.len()], part.start);
                return;
            }
            let before = std::mem::replace(&mut clusters.clusters[index], Cluster::Nowhere);
            if let Cluster::InFile(place) = before {
                self.file.write_all_at(&[GARBAGE; CLUSTER], place).unwrap();
                clusters.free.push(place);
            }
        })
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.write_zeroes(range, true)
    }

    fn flush(&self) -> io::Result<()> {
        self.call()?;
        self.flushes.fetch_add(1, Ordering::SeqCst);
        self.file.sync_data()
    }

    fn status(&self, _: Range<u64>) -> io::Result<BlockStatus> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A thread that does the work of an image until this is dropped.
pub struct ImageThread {
    work: Arc<ImageWork>,
    thread: Option<JoinHandle<()>>,
}

impl ImageThread {
    pub fn start(work: Arc<ImageWork>) -> ImageThread {
        let thread = thread::spawn({
            let work = work.clone();
            move || work.run()
        });
        ImageThread {
            work,
            thread: Some(thread),
        }
    }
}

impl Drop for ImageThread {
    fn drop(&mut self) {
        self.work.end();
        if let Some(thread) = self.thread.take() {
            // A test has it panic.
            let _ = thread.join();
        }
    }
}

/// The threads of a disk.
#[derive(Clone, Default)]
pub struct ImageThreads(Arc<Mutex<Vec<ImageThread>>>);

impl ImageThreads {
    pub fn extend(&self, work: Option<Arc<ImageWork>>) {
        let threads = work.map(ImageThread::start);
        self.0.lock().unwrap().extend(threads);
    }

    /// Returns the owner of the machine, as the disk sees it.
    pub fn owner(&self) -> Arc<dyn DiskOwner> {
        Arc::new(self.clone())
    }

    pub fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

impl DiskOwner for ImageThreads {
    fn start_image_thread(&self, work: Arc<ImageWork>) -> io::Result<()> {
        self.extend(Some(work));
        Ok(())
    }

    fn start_job(&self, work: Box<dyn FnOnce() + Send>) -> io::Result<()> {
        thread::spawn(work);
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }
}
