//! First writes over old bytes, whose mapping waits for a flush.

use std::fmt::{self, Debug, Formatter};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use bantam_storage::qcow2::{BackingName, CreateOptions, Options, Qcow2, Repair};
use bantam_storage::{Image, ImageFile};

use crate::memory_file::{Change, MemoryFile};
use crate::support::{image_of, read_all};

const SIZE: u64 = 1 << 20;
const CLUSTER: u64 = 16384;
const SUBCLUSTER: u64 = CLUSTER / 32;
/// What the backing file holds.
const OLD: u8 = 0xee;

fn create(extended_l2: bool) -> Arc<MemoryFile> {
    let file = Arc::new(MemoryFile::new(Vec::new()));
    let backing = BackingName {
        name: "base".to_owned(),
        format: Some("raw".to_owned()),
    };
    let options = CreateOptions {
        size: SIZE,
        cluster_size: CLUSTER,
        extended_l2,
        backing: Some(backing),
        ..CreateOptions::default()
    };
    Qcow2::create(Arc::clone(&file) as _, &options).unwrap();
    Arc::new(MemoryFile::new(file.bytes()))
}

fn open(file: Arc<dyn ImageFile>, max_pending: usize) -> Qcow2 {
    let options = Options {
        backing: Some(image_of(vec![OLD; SIZE as usize])),
        max_pending,
        ..Options::default()
    };
    Qcow2::open(file, options).unwrap()
}

/// Returns what the disk would hold if the process were killed now.
fn killed(file: &MemoryFile) -> Vec<u8> {
    opened_again(file.bytes())
}

/// Returns what the disk would hold if the host crashed now, and kept nothing since the last sync.
fn crashed(start: &[u8], file: &MemoryFile) -> Vec<u8> {
    let changes = file.changes();
    let is_sync = |change: &Change| matches!(change, Change::Sync);
    let synced = changes.iter().rposition(is_sync).unwrap_or(0);
    let mut bytes = start.to_vec();
    for change in &changes[..synced] {
        change.apply(&mut bytes);
    }
    opened_again(bytes)
}

fn opened_again(bytes: Vec<u8>) -> Vec<u8> {
    let file = Arc::new(MemoryFile::new(bytes));
    let report = Qcow2::check(Arc::clone(&file) as _, Repair::Nothing).unwrap();
    assert_eq!(report.corruptions, 0, "{report:?}");
    read_all(&open(file, 1024))
}

fn syncs(file: &MemoryFile) -> usize {
    let changes = file.changes();
    let syncs = changes
        .iter()
        .filter(|change| matches!(change, Change::Sync));
    syncs.count()
}

#[test]
fn first_writes_share_the_syncs_of_a_flush() {
    for (max_pending, expected) in [(1024, 2), (15, 6), (0, 65)] {
        let file = create(false);
        let image = open(Arc::clone(&file) as _, max_pending);
        // Fills the reserve of clusters, which syncs.
        image.write_at(&[1], 0).unwrap();
        image.flush().unwrap();
        let before = syncs(&file);
        for offset in (0..SIZE).step_by(CLUSTER as usize) {
            image.write_at(&[2; 512], offset + 512).unwrap();
        }
        image.flush().unwrap();
        assert!(
            syncs(&file) - before <= expected,
            "{}",
            syncs(&file) - before
        );
        let now = read_all(&image);
        assert!(killed(&file) == now);
        assert!(
            now[CLUSTER as usize..][..512]
                .iter()
                .all(|&byte| byte == OLD)
        );
        assert!(
            now[CLUSTER as usize + 512..][..512]
                .iter()
                .all(|&byte| byte == 2)
        );
    }
}

#[test]
fn a_killed_process_loses_only_first_writes_over_old_bytes() {
    let file = create(false);
    let image = open(Arc::clone(&file) as _, 1024);
    image.write_at(&[1; 512], 0).unwrap();
    image.flush().unwrap();
    image.write_zeroes(CLUSTER..2 * CLUSTER, true).unwrap();
    // In place, over zeroes, over the backing file, and in place in a cluster that is pending.
    image.write_at(&[2; 512], 0).unwrap();
    image.write_at(&[3; 512], CLUSTER).unwrap();
    image.write_at(&[4; 512], 2 * CLUSTER).unwrap();
    image.write_at(&[5; 512], 2 * CLUSTER + 512).unwrap();
    let disk = killed(&file);
    let bytes = [0, CLUSTER, 2 * CLUSTER, 2 * CLUSTER + 512].map(|offset| disk[offset as usize]);
    assert_eq!(bytes, [2, 3, OLD, OLD]);
    image.flush().unwrap();
    assert!(killed(&file) == read_all(&image));
}

#[test]
fn one_request_has_pending_clusters_and_others() {
    let file = create(false);
    let image = open(Arc::clone(&file) as _, 1024);
    image.write_zeroes(CLUSTER..2 * CLUSTER, true).unwrap();
    image.write_zeroes(3 * CLUSTER..4 * CLUSTER, true).unwrap();
    image.write_at(&[1; 5 * CLUSTER as usize], 0).unwrap();
    let disk = killed(&file);
    let bytes = [0, 1, 2, 3, 4].map(|cluster| disk[(cluster * CLUSTER) as usize]);
    assert_eq!(bytes, [OLD, 1, OLD, 1, OLD]);
    // The clusters around it remain pending.
    image.write_zeroes(2 * CLUSTER..3 * CLUSTER, true).unwrap();
    let disk = killed(&file);
    let bytes = [0, 1, 2, 3, 4].map(|cluster| disk[(cluster * CLUSTER) as usize]);
    assert_eq!(bytes, [OLD, 1, 0, 1, OLD]);
    image.flush().unwrap();
    assert!(killed(&file) == read_all(&image));
    drop(image);
    let report = Qcow2::check(file, Repair::Nothing).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0));
}

#[test]
fn entries_stay_pending_if_they_cannot_be_written() {
    for extended_l2 in [false, true] {
        let file = create(extended_l2);
        let image = open(Arc::clone(&file) as _, 2);
        image.write_at(&[1], 0).unwrap();
        image.flush().unwrap();
        image.write_at(&[2], CLUSTER).unwrap();
        image.write_at(&[3], 3 * CLUSTER).unwrap();
        // The sync succeeds, and the write of the entries fails.
        file.fail_after(1, 1);
        image.flush().unwrap_err();
        assert!(file.heal());
        let disk = killed(&file);
        assert_eq!(disk[CLUSTER as usize], OLD);
        assert_eq!(read_all(&image)[CLUSTER as usize], 2);
        image.flush().unwrap();
        assert!(killed(&file) == read_all(&image));
    }
}

type Action = Box<dyn FnOnce() + Send>;

/// A file that does something while it is synced, after what was written before is on stable storage.
struct Interrupted {
    file: Arc<MemoryFile>,
    action: Mutex<Option<Action>>,
}

impl Debug for Interrupted {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        self.file.fmt(formatter)
    }
}

impl ImageFile for Interrupted {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(bytes, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_at(bytes, offset)
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.file.punch_hole(range)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()?;
        if let Some(action) = self.action.lock().unwrap().take() {
            action();
        }
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.file.set_size(size)
    }
}

/// Writes 1 to a sector and flushes, while the first sync of which `action` is done. Returns the disk, and what it
/// would hold after a crash at the moment when the flush has ended.
fn flush_during(action: fn(&Qcow2)) -> (Vec<u8>, Vec<u8>) {
    let memory = create(true);
    let start = memory.bytes();
    let file = Arc::new(Interrupted {
        file: Arc::clone(&memory),
        action: Mutex::new(None),
    });
    let image = Arc::new(open(Arc::clone(&file) as _, 1024));
    image.write_at(&[9], SIZE - 1).unwrap();
    image.flush().unwrap();
    image.write_at(&[1; 512], 0).unwrap();
    let interrupting = Arc::clone(&image);
    *file.action.lock().unwrap() = Some(Box::new(move || action(&interrupting)));
    image.flush().unwrap();
    let crashed = crashed(&start, &memory);
    let now = read_all(&*image);
    image.flush().unwrap();
    assert!(killed(&memory) == now);
    drop(image);
    let report = Qcow2::check(memory, Repair::Nothing).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
    (now, crashed)
}

#[test]
fn an_entry_that_changes_during_a_flush_is_written_as_it_was() {
    let (now, crashed) = flush_during(|image| {
        image.write_at(&[2; 512], SUBCLUSTER).unwrap();
    });
    let second = SUBCLUSTER as usize;
    assert_eq!((now[0], now[second]), (1, 2));
    assert_eq!((crashed[0], crashed[second]), (1, OLD));
}

#[test]
fn a_cluster_can_become_zeroes_during_a_flush() {
    for (unmap, zero) in [
        (
            false,
            (|image| image.write_zeroes(0..CLUSTER, false).unwrap()) as fn(&Qcow2),
        ),
        (true, |image| image.write_zeroes(0..CLUSTER, true).unwrap()),
    ] {
        let (now, crashed) = flush_during(zero);
        assert_eq!((now[0], now[600]), (0, 0), "{unmap}");
        // The flush has brought a later state of the sector to stable storage.
        assert_eq!((crashed[0], crashed[600]), (0, 0), "{unmap}");
    }
}

#[test]
fn snapshots_have_what_is_pending() {
    let file = create(false);
    let image = open(Arc::clone(&file) as _, 1024);
    image.write_at(&[1; 512], 0).unwrap();
    let id = image.create_snapshot("s").unwrap();
    image.write_at(&[2; 512], 0).unwrap();
    image.apply_snapshot(&id).unwrap();
    assert_eq!(read_all(&image)[0], 1);
    image.write_at(&[3; 512], 0).unwrap();
    assert_eq!(killed(&file)[0], 1);
    image.delete_snapshot(&id).unwrap();
    assert_eq!(read_all(&image)[0], 3);
    drop(image);
    let report = Qcow2::check(file, Repair::Nothing).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0));
}
