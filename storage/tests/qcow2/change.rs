//! New images, compressed clusters, snapshots, sizes, and checks, judged by QEMU.

use std::io;
use std::path::Path;
use std::sync::Arc;

use bantam_storage::qcow2::{
    BackingName, Compression, CreateOptions, Error, Header, Layer, Options, Preallocation, Qcow2,
    Repair, Report, open_chain,
};
use bantam_storage::{Direction, Extent, Image};

use crate::memory_file::MemoryFile;
use crate::support::{Folder, Numbers, host_file, qemu, raw_image, read_all, try_qemu};

fn create(folder: &Folder, name: &str, options: &CreateOptions) {
    std::fs::write(folder.path(name), [0xff; 3000]).unwrap();
    Qcow2::create(host_file(&folder.path(name), false), options).unwrap();
}

fn usual() -> CreateOptions {
    CreateOptions {
        size: 5 << 20,
        ..CreateOptions::default()
    }
}

#[test]
fn qemu_takes_images_that_are_made_here() {
    let mut cases = vec![usual()];
    for cluster_bits in 9..=21 {
        let refcount_bits = 1 << (cluster_bits % 7);
        cases.push(CreateOptions {
            cluster_size: 1 << cluster_bits,
            refcount_bits,
            ..usual()
        });
    }
    cases.extend([
        CreateOptions {
            version: 2,
            ..usual()
        },
        CreateOptions {
            lazy_refcounts: true,
            ..usual()
        },
        CreateOptions {
            extended_l2: true,
            cluster_size: 16384,
            ..usual()
        },
        CreateOptions {
            compression: Compression::Zstd,
            ..usual()
        },
        CreateOptions { size: 0, ..usual() },
        CreateOptions {
            size: 1 << 45,
            ..usual()
        },
    ]);
    for preallocation in [
        Preallocation::Metadata,
        Preallocation::Falloc,
        Preallocation::Full,
    ] {
        cases.push(CreateOptions {
            preallocation,
            ..usual()
        });
        cases.push(CreateOptions {
            preallocation,
            extended_l2: true,
            ..usual()
        });
        cases.push(CreateOptions {
            preallocation,
            cluster_size: 512,
            ..usual()
        });
    }
    for options in cases {
        let folder = Folder::new();
        create(&folder, "image", &options);
        folder.check("image");
        let report = Qcow2::check(host_file(&folder.path("image"), true), Repair::Nothing).unwrap();
        assert_eq!(report, Report::default(), "{options:?}");
        let says = qemu("qemu-img", &["info", "-f", "qcow2", &folder.name("image")]);
        let expect = |what: String| assert!(says.contains(&what), "{options:?}: no {what}: {says}");
        expect(format!("cluster_size: {}", options.cluster_size));
        expect(format!("({} bytes)", options.size));
        expect(format!(
            "compat: {}",
            if options.version == 2 { "0.10" } else { "1.1" }
        ));
        if options.version == 3 {
            expect(format!("refcount bits: {}", options.refcount_bits));
            expect(format!("lazy refcounts: {}", options.lazy_refcounts));
            expect(format!("extended l2: {}", options.extended_l2));
            let zstd = options.compression == Compression::Zstd;
            expect(format!(
                "compression type: {}",
                if zstd { "zstd" } else { "zlib" }
            ));
        }
        if options.size == 5 << 20 {
            folder.io("image", &["write -P 7 3000 500k".to_owned()]);
            folder.check("image");
            let image = folder.open("image", Options::default());
            image.write_at(&[9; 70000], 4 << 20).unwrap();
            if options.preallocation != Preallocation::Off {
                image.read_at(&mut [0], 100).unwrap();
                let extent = image.map(100..200, Direction::Write);
                assert!(matches!(
                    extent,
                    Extent::File {
                        file: 0,
                        len: 100,
                        ..
                    }
                ));
            }
            drop(image);
            folder.check("image");
            let bytes = folder.contents("image");
            assert!(
                bytes[3000..3000 + (500 << 10)]
                    .iter()
                    .all(|&byte| byte == 7)
            );
            assert!(bytes[4 << 20..][..70000].iter().all(|&byte| byte == 9));
            assert!(bytes[(4 << 20) + 70000..].iter().all(|&byte| byte == 0));
        }
    }
}

#[test]
fn impossible_options_are_refused() {
    let folder = Folder::new();
    let backing = Some(BackingName {
        name: "x".repeat(1024),
        format: Some("raw".to_owned()),
    });
    for options in [
        CreateOptions {
            size: 100,
            ..usual()
        },
        CreateOptions {
            version: 4,
            ..usual()
        },
        CreateOptions {
            cluster_size: 256,
            ..usual()
        },
        CreateOptions {
            cluster_size: 3000,
            ..usual()
        },
        CreateOptions {
            refcount_bits: 3,
            ..usual()
        },
        CreateOptions {
            version: 2,
            extended_l2: true,
            ..usual()
        },
        CreateOptions {
            extended_l2: true,
            cluster_size: 8192,
            ..usual()
        },
        CreateOptions {
            size: 1 << 40,
            cluster_size: 512,
            ..usual()
        },
        CreateOptions { backing, ..usual() },
    ] {
        std::fs::write(folder.path("image"), []).unwrap();
        let file = host_file(&folder.path("image"), false);
        assert!(
            Qcow2::create(Arc::clone(&file), &options).is_err(),
            "{options:?}"
        );
        assert_eq!(file.size().unwrap(), 0);
    }
}

#[test]
fn compressed_clusters_are_read_by_qemu() {
    for options in [
        usual(),
        CreateOptions {
            compression: Compression::Zstd,
            ..usual()
        },
        CreateOptions {
            cluster_size: 4096,
            refcount_bits: 1,
            ..usual()
        },
        CreateOptions {
            cluster_size: 512,
            ..usual()
        },
        CreateOptions {
            cluster_size: 2 << 20,
            size: (5 << 20) + 512,
            ..usual()
        },
        CreateOptions {
            extended_l2: true,
            ..usual()
        },
    ] {
        let folder = Folder::new();
        create(&folder, "image", &options);
        let mut numbers = Numbers::new(4);
        let mut model: Vec<u8> = (0..options.size).map(|index| (index / 100) as u8).collect();
        for byte in &mut model[1 << 20..3 << 20] {
            let bound = if numbers.below(8) == 0 { 256 } else { 16 };
            *byte = numbers.below(bound) as u8;
        }
        for byte in &mut model[3 << 20..7 << 19] {
            *byte = numbers.below(256) as u8;
        }
        let image = folder.open("image", Options::default());
        image.write_compressed(&model, 0).unwrap();
        assert!(read_all(&image) == model);
        // Over compressed clusters, in part and whole.
        image.write_at(&[1; 100_000], 5000).unwrap();
        model[5000..105_000].fill(1);
        image
            .write_zeroes(1 << 20..(1 << 20) + 300_000, true)
            .unwrap();
        model[1 << 20..(1 << 20) + 300_000].fill(0);
        image.write_compressed(&vec![5; 2 << 20], 0).unwrap();
        model[..2 << 20].fill(5);
        assert!(read_all(&image) == model);
        drop(image);
        folder.check("image");
        assert!(folder.contents("image") == model, "{options:?}");
        let image = folder.open("image", Options::default());
        assert!(image.write_compressed(&[0; 512], 1).is_err());
    }
}

#[test]
fn snapshots_are_made_applied_and_deleted() {
    for options in [
        usual(),
        CreateOptions {
            cluster_size: 512,
            refcount_bits: 64,
            ..usual()
        },
        CreateOptions {
            version: 2,
            cluster_size: 4096,
            ..usual()
        },
        CreateOptions {
            extended_l2: true,
            cluster_size: 16384,
            refcount_bits: 8,
            ..usual()
        },
    ] {
        let folder = Folder::new();
        create(&folder, "image", &options);
        let mut numbers = Numbers::new(2);
        let mut states = vec![vec![0; options.size as usize]];
        let check = |image: Qcow2, state: &[u8]| {
            assert!(read_all(&image) == state);
            drop(image);
            folder.check("image");
            assert!(folder.contents("image") == state);
            folder.open("image", Options::default())
        };
        let mut image = folder.open("image", Options::default());
        for number in 1..=4u8 {
            let mut state = states.last().unwrap().clone();
            for _ in 0..6 {
                let offset = numbers.below(options.size - 200_000);
                let len = numbers.below(200_000) + 1;
                image.write_at(&vec![number; len as usize], offset).unwrap();
                state[offset as usize..(offset + len) as usize].fill(number);
            }
            let cluster = options.cluster_size as usize;
            image
                .write_compressed(&vec![number; cluster * 2], (cluster * 3) as u64)
                .unwrap();
            state[cluster * 3..cluster * 5].fill(number);
            image
                .discard(u64::from(number) * 100_000..u64::from(number) * 100_000 + 150_000)
                .unwrap();
            image.read_at(&mut state, 0).unwrap();
            states.push(state.clone());
            let id = image.create_snapshot(&format!("name {number}")).unwrap();
            assert_eq!(id, number.to_string());
            image = check(image, &state);
        }
        let says = qemu("qemu-img", &["snapshot", "-l", &folder.name("image")]);
        assert!(
            (1..=4).all(|number| says.contains(&format!("name {number}"))),
            "{says}"
        );
        image.apply_snapshot("2").unwrap();
        image = check(image, &states[2]);
        image.write_at(&[9; 100_000], 50_000).unwrap();
        image.apply_snapshot("name 4").unwrap();
        image = check(image, &states[4]);
        image.delete_snapshot("2").unwrap();
        image = check(image, &states[4]);
        image.apply_snapshot("3").unwrap();
        image = check(image, &states[3]);
        for id in ["3", "1", "4"] {
            image.delete_snapshot(id).unwrap();
            image = check(image, &states[3]);
        }
        let error = image.apply_snapshot("3").unwrap_err();
        assert!(matches!(error, Error::NoSnapshot(_)));
        assert_eq!(image.snapshots().unwrap(), []);

        // Snapshots that QEMU has made, and QEMU on those that are made here.
        drop(image);
        qemu(
            "qemu-img",
            &["snapshot", "-c", "theirs", &folder.name("image")],
        );
        let image = folder.open("image", Options::default());
        image.write_at(&[8; 300_000], 10_000).unwrap();
        image.create_snapshot("ours").unwrap();
        image.write_at(&[7; 300_000], 10_000).unwrap();
        image.apply_snapshot("theirs").unwrap();
        let image = check(image, &states[3]);
        drop(image);
        qemu(
            "qemu-img",
            &["snapshot", "-a", "ours", &folder.name("image")],
        );
        qemu(
            "qemu-img",
            &["snapshot", "-d", "theirs", &folder.name("image")],
        );
        let mut state = states[3].clone();
        state[10_000..310_000].fill(8);
        drop(check(folder.open("image", Options::default()), &state));
    }
}

#[test]
fn a_snapshot_needs_refcounts_that_can_count_it() {
    let folder = Folder::new();
    for (refcount_bits, most) in [(1, 0), (2, 2)] {
        create(
            &folder,
            "image",
            &CreateOptions {
                refcount_bits,
                ..usual()
            },
        );
        let image = folder.open("image", Options::default());
        image.write_at(&[1; 1000], 0).unwrap();
        for _ in 0..most {
            image.create_snapshot("s").unwrap();
        }
        assert!(image.create_snapshot("s").is_err());
        image.write_at(&[2; 1000], 100_000).unwrap();
        drop(image);
        folder.check("image");
        let image = folder.open_read_only("image");
        assert_eq!(image.snapshots().unwrap().len(), most);
        assert!(!image.header().is_dirty());
    }
}

#[test]
fn the_disk_changes_its_size() {
    let backing = || {
        Some(BackingName {
            name: "base".to_owned(),
            format: Some("raw".to_owned()),
        })
    };
    for options in [
        usual(),
        CreateOptions {
            cluster_size: 512,
            ..usual()
        },
        CreateOptions {
            version: 2,
            ..usual()
        },
        CreateOptions {
            extended_l2: true,
            ..usual()
        },
        CreateOptions {
            backing: backing(),
            ..usual()
        },
        CreateOptions {
            backing: backing(),
            version: 2,
            cluster_size: 4096,
            ..usual()
        },
    ] {
        let folder = Folder::new();
        std::fs::write(folder.path("base"), vec![0x77; 9 << 20]).unwrap();
        create(&folder, "image", &options);
        let open = || {
            let backing = options
                .backing
                .is_some()
                .then(|| raw_image(&folder.path("base")));
            folder.open(
                "image",
                Options {
                    backing,
                    ..Options::default()
                },
            )
        };
        let mut image = open();
        let mut model = read_all(&image);
        let mut numbers = Numbers::new(6);
        for _ in 0..8 {
            for _ in 0..4 {
                let offset = numbers.below(model.len() as u64);
                let len = (numbers.below(400_000) + 1).min(model.len() as u64 - offset);
                image.write_at(&vec![3; len as usize], offset).unwrap();
                model[offset as usize..(offset + len) as usize].fill(3);
            }
            let size = numbers.below(24 << 11) * 512;
            image.resize(size).unwrap();
            model.resize(size as usize, 0);
            assert!(read_all(&image) == model, "{options:?}");
            drop(image);
            folder.check("image");
            assert!(folder.contents("image") == model, "{options:?}");
            image = open();
        }
        assert!(image.resize(100).is_err());
    }
}

#[test]
fn dirty_images_are_repaired_when_they_are_opened() {
    let folder = Folder::new();
    folder.create("image", "lazy_refcounts=on", "5M");
    let path = folder.name("image");
    // Killed before it writes refcounts.
    let abort = [
        "-f",
        "qcow2",
        "-c",
        "write -P 5 0 300k",
        "-c",
        "flush",
        "-c",
        "abort",
        &path,
    ];
    try_qemu("qemu-io", &abort).unwrap_err();
    assert!(
        Header::read(&*host_file(&folder.path("image"), true))
            .unwrap()
            .is_dirty()
    );
    let image = folder.open("image", Options::default());
    assert!(!image.header().is_dirty());
    image.write_at(&[6; 100_000], 200 << 10).unwrap();
    drop(image);
    folder.check("image");
    let bytes = folder.contents("image");
    assert!(bytes[..200 << 10].iter().all(|&byte| byte == 5));
    assert!(bytes[200 << 10..][..100_000].iter().all(|&byte| byte == 6));
}

#[test]
fn damage_is_found_and_repaired_as_by_qemu() {
    let folder = Folder::new();
    let mut numbers = Numbers::new(11);
    for case in 0..40 {
        let cluster_size = 512 << numbers.below(4);
        create(
            &folder,
            "image",
            &CreateOptions {
                size: 1 << 20,
                cluster_size,
                ..usual()
            },
        );
        let image = folder.open("image", Options::default());
        image.write_at(&vec![1; 600_000], 1000).unwrap();
        if case % 3 == 0 {
            image.create_snapshot("s").unwrap();
            image.write_at(&vec![2; 100_000], 50_000).unwrap();
        }
        let header = image.header();
        drop(image);
        // Refcounts of a few clusters are changed.
        let mut bytes = std::fs::read(folder.path("image")).unwrap();
        let at = |bytes: &[u8], offset: usize| {
            u64::from_be_bytes(bytes[offset..offset + 8].try_into().unwrap()) as usize
        };
        let block = at(&bytes, at(&bytes, 48));
        let clusters =
            (bytes.len() / cluster_size as usize).min(header.cluster_size() as usize / 2);
        for _ in 0..5 {
            bytes[block + 1 + numbers.below(clusters as u64) as usize * 2] = numbers.below(3) as u8;
        }
        std::fs::write(folder.path("image"), &bytes).unwrap();
        std::fs::write(folder.path("theirs"), &bytes).unwrap();

        let (corruptions, leaks) = faults(&folder.name("theirs"));
        let report = Qcow2::check(host_file(&folder.path("image"), true), Repair::Nothing).unwrap();
        assert_eq!(report.leaks, leaks, "{report:?}");
        assert_eq!(report.corruptions, corruptions, "{report:?}");

        let file = host_file(&folder.path("image"), false);
        let repaired = Qcow2::check(Arc::clone(&file), Repair::Leaks).unwrap();
        assert_eq!((repaired.leaks, repaired.leaks_fixed), (0, report.leaks));
        let repaired = Qcow2::check(file, Repair::All).unwrap();
        assert_eq!(
            (repaired.corruptions, repaired.leaks),
            (0, 0),
            "{repaired:?}"
        );
        folder.check("image");
        let mut model = vec![0; 1 << 20];
        model[1000..601_000].fill(1);
        if case % 3 == 0 {
            model[50_000..150_000].fill(2);
        }
        assert!(folder.contents("image") == model);
    }
}

/// Returns the numbers of corruptions and leaks that `qemu-img check` finds in an image.
fn faults(path: &str) -> (u64, u64) {
    let words = ["check", "--output=json", "-f", "qcow2", path];
    let says = try_qemu("qemu-img", &words).unwrap_or_else(|(_, says)| says);
    let count = |field: &str| {
        let start = says.find(&format!("\"{field}\": "))?;
        let number = says[start..].split([' ', ',', '\n']).nth(1)?;
        number.parse::<u64>().ok()
    };
    (
        count("corruptions").unwrap_or(0),
        count("leaks").unwrap_or(0),
    )
}

#[test]
fn wrong_bits_of_entries_are_found_as_by_qemu() {
    let folder = Folder::new();
    for (extended_l2, has_snapshot) in [(false, false), (false, true), (true, false), (true, true)]
    {
        let cluster_size = 16384;
        create(
            &folder,
            "image",
            &CreateOptions {
                size: 1 << 20,
                cluster_size,
                extended_l2,
                ..usual()
            },
        );
        let image = folder.open("image", Options::default());
        image
            .write_at(&vec![1; 3 * cluster_size as usize], 0)
            .unwrap();
        image
            .write_compressed(&vec![2; cluster_size as usize], 4 * cluster_size)
            .unwrap();
        image.flush().unwrap();
        if has_snapshot {
            image.create_snapshot("s").unwrap();
        }
        drop(image);
        let whole = std::fs::read(folder.path("image")).unwrap();
        let at = |offset: u64| {
            let offset = offset as usize;
            u64::from_be_bytes(whole[offset..offset + 8].try_into().unwrap())
        };
        let l1 = at(40);
        let l2 = at(l1) & 0x00ff_ffff_ffff_fe00;
        let entry = |number: u64| l2 + number * if extended_l2 { 16 } else { 8 };
        let mut damages = vec![
            vec![(l1, 1)],
            vec![(l1, 1 << 56)],
            vec![(l1, 0x7f << 56)],
            vec![(entry(0), 2)],
            vec![(entry(1), 1 << 57), (entry(2), 1 << 8)],
            vec![(entry(10), 4)],
            vec![(entry(1), 0x200)],
            vec![(entry(4), 1 << 63)],
            vec![(entry(4), 1 << 63), (entry(0), 1 << 60), (l1, 2)],
        ];
        if extended_l2 {
            damages.push(vec![(entry(4) + 8, 1)]);
            damages.push(vec![(entry(4), 1 << 63), (entry(4) + 8, 1)]);
            damages.push(vec![(entry(0) + 8, 1 << 32)]);
        }
        for damage in damages {
            let mut bytes = whole.clone();
            for &(offset, bits) in &damage {
                let word = at(offset) ^ bits;
                bytes[offset as usize..][..8].copy_from_slice(&word.to_be_bytes());
            }
            std::fs::write(folder.path("image"), &bytes).unwrap();
            let (corruptions, leaks) = faults(&folder.name("image"));
            let file = host_file(&folder.path("image"), true);
            let report = Qcow2::check(file, Repair::Nothing).unwrap();
            assert_eq!(
                (report.corruptions, report.leaks),
                (corruptions, leaks),
                "{extended_l2} {has_snapshot} {damage:x?}: {report:?}"
            );
            assert!(corruptions > 0);
        }
    }
}

#[test]
fn missing_refcount_blocks_are_made_again() {
    for lost in [0..1, 1..3, 0..16] {
        let folder = Folder::new();
        let options = CreateOptions {
            size: 1 << 20,
            cluster_size: 512,
            ..usual()
        };
        create(&folder, "image", &options);
        let image = folder.open("image", Options::default());
        image.write_at(&vec![1; 600_000], 1000).unwrap();
        drop(image);
        let mut bytes = std::fs::read(folder.path("image")).unwrap();
        let table = u64::from_be_bytes(bytes[48..56].try_into().unwrap()) as usize;
        bytes[table + lost.start * 8..table + lost.end * 8].fill(0);
        // The mark that makes a writer rebuild refcounts.
        bytes[79] = 1;
        std::fs::write(folder.path("image"), &bytes).unwrap();
        let image = folder.open("image", Options::default());
        image.write_at(&[2; 5000], 700_000).unwrap();
        drop(image);
        folder.check("image");
        let bytes = folder.contents("image");
        assert!(bytes[1000..601_000].iter().all(|&byte| byte == 1));
        assert!(bytes[700_000..705_000].iter().all(|&byte| byte == 2));
    }
}

#[test]
fn a_large_image_is_opened_without_reading_its_tables() {
    let file = Arc::new(MemoryFile::new(Vec::new()));
    let options = CreateOptions {
        size: 1 << 40,
        ..usual()
    };
    Qcow2::create(Arc::clone(&file) as _, &options).unwrap();
    let before = file.bytes_read();
    let image = Qcow2::open(Arc::clone(&file) as _, Options::default()).unwrap();
    assert!(file.bytes_read() - before < 200 << 10);
    assert_eq!(image.size(), 1 << 40);
}

#[test]
fn a_write_to_metadata_is_refused_and_marks_the_image() {
    let folder = Folder::new();
    create(&folder, "image", &usual());
    let image = folder.open("image", Options::default());
    image.write_at(&[1; 65536], 0).unwrap();
    drop(image);
    let mut bytes = std::fs::read(folder.path("image")).unwrap();
    let at = |bytes: &[u8], offset: usize| {
        u64::from_be_bytes(bytes[offset..offset + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00
    };
    let l1 = at(&bytes, 40);
    let l2 = at(&bytes, l1 as usize);
    // The first cluster of the disk becomes the L1 table, and behind the end of the file.
    for target in [l1, 1 << 40] {
        bytes[l2 as usize..][..8].copy_from_slice(&(target | 1 << 63).to_be_bytes());
        std::fs::write(folder.path("image"), &bytes).unwrap();
        let image = folder.open("image", Options::default());
        assert!(matches!(
            image.map(0..512, Direction::Write),
            Extent::Slow { .. }
        ));
        assert!(image.write_at(&[2; 512], 0).is_err());
        assert!(image.write_at(&[2; 512], 1 << 20).is_err());
        assert!(matches!(
            image.map(0..512, Direction::Write),
            Extent::Slow { .. }
        ));
        drop(image);
        let mut now = std::fs::read(folder.path("image")).unwrap();
        assert_eq!(now[79], 2, "the image is not marked");
        now[79] = 0;
        assert!(now == bytes);
        std::fs::write(folder.path("image"), &now).unwrap();
    }
    bytes[79] = 2;
    std::fs::write(folder.path("image"), &bytes).unwrap();
    let error = Qcow2::open(host_file(&folder.path("image"), false), Options::default());
    assert!(matches!(error.unwrap_err(), Error::Corrupt));
    folder.open_read_only("image");
}

#[test]
fn chains_are_opened_by_the_names_and_formats_in_the_images() {
    let folder = Folder::new();
    std::fs::create_dir(folder.path("sub")).unwrap();
    std::fs::write(folder.path("base"), vec![4; 1 << 20]).unwrap();
    let name = |name: &str, format: &str| {
        Some(BackingName {
            name: name.to_owned(),
            format: Some(format.to_owned()),
        })
    };
    create(
        &folder,
        "sub/middle",
        &CreateOptions {
            backing: name("../base", "raw"),
            ..usual()
        },
    );
    create(
        &folder,
        "top",
        &CreateOptions {
            backing: name("sub/middle", "qcow2"),
            ..usual()
        },
    );
    let mut opened = Vec::new();
    let mut open = |path: &Path, format: &str, read_only: bool| {
        opened.push((format.to_owned(), read_only));
        Ok::<_, io::Error>(match format {
            "qcow2" => Layer::Qcow2(host_file(path, read_only)),
            _ => Layer::Other(raw_image(path)),
        })
    };
    let image = open_chain(&folder.path("top"), Options::default(), &mut open).unwrap();
    let bytes = read_all(&image);
    assert!(bytes[..1 << 20].iter().all(|&byte| byte == 4));
    assert!(bytes[1 << 20..].iter().all(|&byte| byte == 0));
    image.write_at(&[5; 100], 1000).unwrap();
    let extent = image.map(100..200, Direction::Read);
    assert!(matches!(
        extent,
        Extent::File {
            file: 0,
            len: 100,
            ..
        }
    ));
    image.read_at(&mut [0; 100], 1 << 18).unwrap();
    let place = Extent::File {
        file: 2,
        offset: 1 << 18,
        len: 100,
    };
    assert_eq!(image.map(1 << 18..(1 << 18) + 100, Direction::Read), place);
    drop(image);
    let expected = [("qcow2", false), ("qcow2", true), ("raw", true)];
    assert!(
        opened
            .iter()
            .map(|(format, ro)| (format.as_str(), *ro))
            .eq(expected)
    );

    let mut open = |path: &Path, _: &str, read_only: bool| {
        Ok::<_, io::Error>(Layer::Qcow2(host_file(path, read_only)))
    };
    create(
        &folder,
        "loop",
        &CreateOptions {
            backing: name("sub/../loop", "qcow2"),
            ..usual()
        },
    );
    let error = open_chain(&folder.path("loop"), Options::default(), &mut open).unwrap_err();
    assert!(
        matches!(error, Error::BackingLoop(_) | Error::ChainLength(_)),
        "{error}"
    );
    create(
        &folder,
        "self",
        &CreateOptions {
            backing: name("./self", "qcow2"),
            ..usual()
        },
    );
    let error = open_chain(&folder.path("self"), Options::default(), &mut open).unwrap_err();
    assert!(matches!(error, Error::BackingLoop(_)), "{error}");

    folder.create("bare", "", "1M");
    let path = folder.name("bare");
    let mut bytes = std::fs::read(folder.path("bare")).unwrap();
    bytes[8..20].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 4]);
    bytes[0x1000..0x1004].copy_from_slice(b"base");
    std::fs::write(&path, bytes).unwrap();
    let error = open_chain(Path::new(&path), Options::default(), &mut open).unwrap_err();
    assert!(error.to_string().contains("qemu-img rebase -u"), "{error}");
}

#[test]
fn bitmaps_are_given_up_at_the_first_write() {
    let folder = Folder::new();
    folder.create("image", "", "5M");
    qemu(
        "qemu-img",
        &["bitmap", "--add", "-f", "qcow2", &folder.name("image"), "b"],
    );
    let file = host_file(&folder.path("image"), true);
    assert_eq!(
        Qcow2::check(file, Repair::Nothing).unwrap(),
        Report::default()
    );
    let image = folder.open("image", Options::default());
    image.write_at(&[1; 512], 0).unwrap();
    drop(image);
    let says = try_qemu("qemu-img", &["check", "-f", "qcow2", &folder.name("image")]);
    // Their clusters are leaked, as they mean nothing now.
    assert!(matches!(says, Err((3, _))), "{says:?}");
    let file = host_file(&folder.path("image"), false);
    assert!(Qcow2::check(file, Repair::Leaks).unwrap().leaks_fixed > 0);
    folder.check("image");
}
