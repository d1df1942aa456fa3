//! The cost of finding data in a qcow2 image, of opening a large one, and of first writes over a backing file.

#![allow(missing_docs, reason = "criterion's macros make functions")]
#![allow(clippy::unwrap_used, reason = "a benchmark fails where the host does")]

use std::fs::File;
use std::hint::black_box;
use std::sync::Arc;

use bantam_storage::qcow2::{BackingName, CreateOptions, Options, Preallocation, Qcow2};
use bantam_storage::{Direction, Extent, HostFile, Image, ImageFile};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const REQUEST: u64 = 4096;

/// Makes an image whose clusters all have a place.
fn allocated(size: u64) -> Arc<dyn ImageFile> {
    let file: Arc<dyn ImageFile> = Arc::new(HostFile::new(tempfile::tempfile().unwrap()));
    let options = CreateOptions {
        size,
        preallocation: Preallocation::Metadata,
        ..CreateOptions::default()
    };
    Qcow2::create(file.clone(), &options).unwrap();
    file
}

/// Finds the place of a small request, at a random place of a disk whose tables are all cached.
fn find(criterion: &mut Criterion) {
    let image = Qcow2::open(allocated(GIB), Options::default()).unwrap();
    for offset in (0..GIB).step_by(1 << 20) {
        let mut byte = [0];
        image.read_at(&mut byte, offset).unwrap();
    }
    for (name, direction) in [("read", Direction::Read), ("write", Direction::Write)] {
        criterion.bench_function(&format!("map/{name}"), |bencher| {
            let mut state = 1_u64;
            bencher.iter(|| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let offset = state % (GIB / REQUEST) * REQUEST;
                let extent = image.map(black_box(offset..offset + REQUEST), direction);
                debug_assert!(matches!(extent, Extent::File { .. }));
                extent
            });
        });
    }
}

fn open(criterion: &mut Criterion) {
    let file = allocated(TIB);
    criterion.bench_function("open/1 TiB, allocated", |bencher| {
        bencher.iter(|| Qcow2::open(file.clone(), Options::default()).unwrap());
    });
}

/// Number of clusters that are written for the first time.
const FIRST_WRITES: u64 = 256;

/// Makes an overlay, in the target folder, on an image that has bytes everywhere.
fn overlay(base: &Arc<dyn ImageFile>, max_pending: usize) -> Qcow2 {
    let options = CreateOptions {
        size: FIRST_WRITES << 16,
        backing: Some(BackingName {
            name: "base".to_owned(),
            format: Some("qcow2".to_owned()),
        }),
        ..CreateOptions::default()
    };
    let file = Arc::new(HostFile::new(disk_file()));
    Qcow2::create(file.clone(), &options).unwrap();
    let backing = Options {
        read_only: true,
        ..Options::default()
    };
    let options = Options {
        backing: Some(Arc::new(Qcow2::open(base.clone(), backing).unwrap())),
        max_pending,
        ..Options::default()
    };
    Qcow2::open(file, options).unwrap()
}

/// Makes a file on a disk, where a sync takes time, and not in memory.
fn disk_file() -> File {
    tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Writes to clusters of a backing file for the first time, and flushes at the end.
fn first_write(criterion: &mut Criterion) {
    let base: Arc<dyn ImageFile> = Arc::new(HostFile::new(disk_file()));
    let options = CreateOptions {
        size: FIRST_WRITES << 16,
        ..CreateOptions::default()
    };
    Qcow2::create(base.clone(), &options).unwrap();
    let image = Qcow2::open(base.clone(), Options::default()).unwrap();
    image
        .write_at(&vec![1; (FIRST_WRITES as usize) << 16], 0)
        .unwrap();
    drop(image);
    let mut group = criterion.benchmark_group("first write");
    group
        .throughput(Throughput::Elements(FIRST_WRITES))
        .sample_size(10);
    for (name, max_pending) in [("synced", 0), ("pending", Options::default().max_pending)] {
        group.bench_function(name, |bencher| {
            bencher.iter_batched(
                || overlay(&base, max_pending),
                |image| {
                    for cluster in 0..FIRST_WRITES {
                        image
                            .write_at(&[2; REQUEST as usize], cluster << 16)
                            .unwrap();
                    }
                    image.flush().unwrap();
                    image
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, find, open, first_write);
criterion_main!(benches);
