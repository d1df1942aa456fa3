//! The cost of finding data in a qcow2 image, and of opening a large one.

#![allow(missing_docs, reason = "criterion's macros make functions")]
#![allow(clippy::unwrap_used, reason = "a benchmark fails where the host does")]

use std::hint::black_box;
use std::sync::Arc;

use bantam_storage::qcow2::{CreateOptions, Options, Preallocation, Qcow2};
use bantam_storage::{Direction, Extent, HostFile, Image, ImageFile};
use criterion::{Criterion, criterion_group, criterion_main};

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

criterion_group!(benches, find, open);
criterion_main!(benches);
