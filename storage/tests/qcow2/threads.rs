//! Requests of several threads at the same time.

use std::sync::Arc;

use bantam_storage::qcow2::{BackingName, CreateOptions, Options, Qcow2};
use bantam_storage::{Direction, Extent, Image};

use crate::support::{Folder, Numbers, host_file, raw_image, read_all, write_as_device};

const SIZE: u64 = 8 << 20;
const THREADS: u64 = 4;

#[test]
fn threads_share_clusters_and_tables() {
    for (cluster_size, extended_l2, has_backing, max_pending) in [
        (65536, false, false, 1024),
        (512, false, true, 1024),
        (512, false, true, 2),
        (16384, true, true, 1024),
        (16384, true, true, 2),
        (4096, false, true, 4),
    ] {
        let folder = Folder::new();
        std::fs::write(folder.path("base"), vec![0xee; SIZE as usize]).unwrap();
        let backing = BackingName {
            name: "base".to_owned(),
            format: Some("raw".to_owned()),
        };
        let options = CreateOptions {
            size: SIZE,
            cluster_size,
            extended_l2,
            backing: has_backing.then_some(backing),
            ..CreateOptions::default()
        };
        std::fs::write(folder.path("image"), []).unwrap();
        let file = host_file(&folder.path("image"), false);
        Qcow2::create(Arc::clone(&file), &options).unwrap();
        let backing = has_backing.then(|| raw_image(&folder.path("base")));
        let open = Options {
            backing,
            cache_bytes: 0,
            max_pending,
            ..Options::default()
        };
        let image = Qcow2::open(Arc::clone(&file), open).unwrap();
        let mut model = read_all(&image);
        // Sectors belong to one thread each, clusters to all. Odd ones find a place for what they write.
        let work = |thread: u64| {
            let mut numbers = Numbers::new(thread + 1);
            let mut written = Vec::new();
            for turn in 0..400 {
                let offset = (numbers.below(SIZE / 512 / THREADS) * THREADS + thread) * 512;
                let bytes = [turn as u8; 512];
                match image.map(offset..offset + 512, Direction::Write) {
                    _ if thread % 2 == 1 => {
                        write_as_device(&image, &*file, &bytes, offset).unwrap();
                    }
                    Extent::File {
                        offset, len: 512, ..
                    } if turn % 2 == 0 => {
                        file.write_at(&bytes, offset).unwrap();
                    }
                    _ => image.write_at(&bytes, offset).unwrap(),
                }
                let mut now = [0; 512];
                image.read_at(&mut now, offset).unwrap();
                assert_eq!(now, bytes);
                written.push((offset, bytes));
                if turn % 50 == 0 {
                    image.flush().unwrap();
                }
            }
            written
        };
        let written: Vec<_> = std::thread::scope(|scope| {
            let work = &work;
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| scope.spawn(move || work(thread)))
                .collect();
            threads
                .into_iter()
                .flat_map(|thread| thread.join().unwrap())
                .collect()
        });
        for (offset, bytes) in written {
            model[offset as usize..][..512].copy_from_slice(&bytes);
        }
        assert!(read_all(&image) == model);
        drop(image);
        folder.check("image");
        assert!(folder.contents("image") == model);
    }
}
