//! Images that QEMU has made, read.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bantam_storage::qcow2::{Error, Header, Options, Qcow2};
use bantam_storage::{Content, Direction, Extent, Image};

use crate::support::{Folder, Numbers, host_file, qemu, raw_image, read_all};

/// Fills an image with all kinds of clusters by QEMU.
fn fill(folder: &Folder, name: &str, size: u64, seed: u64, compress: bool) {
    let mut numbers = Numbers::new(seed);
    let mut commands = Vec::new();
    if compress {
        // QEMU compresses clusters that are not allocated yet. Some of these bytes hardly get fewer.
        let mut bytes: Vec<u8> = (0..2 << 20)
            .map(|index| (index / 300 % 256) as u8)
            .collect();
        for byte in &mut bytes[600_000..] {
            *byte = (numbers.below(100)) as u8;
        }
        std::fs::write(folder.path("source"), bytes).unwrap();
        for offset in (0..size >> 21 << 21).step_by(4 << 20) {
            commands.push(format!("write -c -s {} {offset} 2M", folder.name("source")));
        }
    }
    for _ in 0..40 {
        let offset = numbers.below(size / 512) * 512;
        let len = (numbers.below(300) + 1).min((size - offset) / 512) * 512;
        let pattern = numbers.below(255) + 1;
        commands.push(match numbers.below(6) {
            0 => format!("write -z -u {offset} {len}"),
            1 => format!("write -z {offset} {len}"),
            2 => format!("discard {offset} {len}"),
            _ => format!("write -P {pattern} {offset} {len}"),
        });
    }
    folder.io(name, &commands);
}

/// Reads an image in pieces of odd sizes, and by `map`, and compares both with what QEMU reads.
fn compare(folder: &Folder, name: &str, image: &Qcow2) {
    let expected = folder.contents(name);
    assert_eq!(image.size(), expected.len() as u64);
    assert!(read_all(image) == expected, "{name}");
    let mut numbers = Numbers::new(7);
    for _ in 0..100 {
        let offset = numbers.below(image.size());
        let len = (numbers.below(200_000) + 1).min(image.size() - offset);
        let mut bytes = vec![0; len as usize];
        image.read_at(&mut bytes, offset).unwrap();
        assert!(bytes == expected[offset as usize..][..len as usize]);
    }
    let file = std::fs::File::open(folder.path(name)).unwrap();
    let mut offset = 0;
    while offset < image.size() {
        let wanted = (numbers.below(300_000) + 1).min(image.size() - offset);
        let len = match image.map(offset..offset + wanted, Direction::Read) {
            Extent::File {
                file: 0,
                offset: host,
                len,
            } => {
                let mut bytes = vec![0; len as usize];
                let whole = bytes.len();
                let read = file.read_at(&mut bytes, host).unwrap();
                bytes[read.min(whole)..].fill(0);
                assert!(bytes == expected[offset as usize..][..whole]);
                len
            }
            Extent::File { len, .. } | Extent::Slow { len } => len,
            Extent::Zeroes { len } => {
                assert!(
                    expected[offset as usize..][..len as usize]
                        .iter()
                        .all(|&byte| byte == 0)
                );
                len
            }
        };
        assert!(len > 0 && len <= wanted);
        offset += len;
    }
}

#[test]
fn images_of_all_cluster_sizes_and_refcount_widths_are_read() {
    for (case, cluster_bits) in (9..=21).enumerate() {
        let folder = Folder::new();
        let refcount_bits = 1 << (case % 7);
        let options = format!(
            "cluster_size={},refcount_bits={refcount_bits}",
            1 << cluster_bits
        );
        folder.create("image", &options, "6M");
        fill(&folder, "image", 6 << 20, cluster_bits, refcount_bits > 2);
        compare(&folder, "image", &folder.open_read_only("image"));
    }
}

#[test]
fn images_with_other_features_are_read() {
    for options in [
        "compat=0.10",
        "compat=0.10,cluster_size=512",
        "compression_type=zstd",
        "compression_type=zstd,cluster_size=4k",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k,compression_type=zstd",
        "extended_l2=on,cluster_size=2M",
        "lazy_refcounts=on",
        "preallocation=metadata",
        "preallocation=full",
    ] {
        let folder = Folder::new();
        folder.create("image", options, "10M");
        fill(
            &folder,
            "image",
            10 << 20,
            options.len() as u64,
            !options.contains("preallocation"),
        );
        compare(&folder, "image", &folder.open_read_only("image"));
    }
}

#[test]
fn backing_files_are_read_and_flattened() {
    let folder = Folder::new();
    let mut numbers = Numbers::new(3);
    let base: Vec<u8> = (0..3 << 20).map(|_| numbers.below(256) as u8).collect();
    std::fs::write(folder.path("base"), &base).unwrap();
    let overlay = |name: &str, base: &str, format: &str, size: &str| {
        let (base, name) = (folder.name(base), folder.name(name));
        let arguments = [
            "create", "-q", "-f", "qcow2", "-F", format, "-b", &base, &name, size,
        ];
        qemu("qemu-img", &arguments);
    };
    overlay("middle", "base", "raw", "4M");
    fill(&folder, "middle", 4 << 20, 5, false);
    overlay("top", "middle", "qcow2", "5M");
    fill(&folder, "top", 5 << 20, 6, false);
    let backed = |name: &str, backing| {
        let options = Options {
            read_only: true,
            backing: Some(backing),
            ..Options::default()
        };
        Arc::new(folder.open(name, options))
    };
    let middle = backed("middle", raw_image(&folder.path("base")));
    let top = backed("top", Arc::clone(&middle) as Arc<dyn Image>);
    compare(&folder, "middle", &middle);
    compare(&folder, "top", &top);

    let mut deepest = None;
    let mut offset = 0;
    while offset < top.size() {
        let status = top.status(offset..top.size()).unwrap();
        if let Content::Data { file, .. } = status.content {
            assert_eq!(status.depth, Some(file));
        }
        deepest = deepest.max(status.depth);
        offset += status.len;
    }
    assert_eq!(deepest, Some(2));
}

#[test]
fn the_header_names_the_backing_file() {
    let folder = Folder::new();
    std::fs::write(folder.path("base"), [0; 512]).unwrap();
    let (base, name) = (folder.name("base"), folder.name("image"));
    qemu(
        "qemu-img",
        &[
            "create", "-q", "-f", "qcow2", "-F", "raw", "-b", &base, &name,
        ],
    );
    let file = host_file(&folder.path("image"), true);
    let header = Header::read(&*file).unwrap();
    let backing = header.backing().unwrap();
    assert_eq!(
        (backing.name.as_str(), backing.format.as_deref()),
        (base.as_str(), Some("raw"))
    );
    let error = Qcow2::open(file, Options::default()).unwrap_err();
    assert!(matches!(error, Error::BackingMissing(_)), "{error}");
}

#[test]
fn what_cannot_be_read_is_refused_by_its_name() {
    let folder = Folder::new();
    let refuse = |name: &str| {
        let error = Qcow2::open(host_file(&folder.path(name), true), Options::default());
        error.unwrap_err().to_string()
    };
    folder.create(
        "external",
        &format!("data_file={}", folder.name("data")),
        "1M",
    );
    assert!(refuse("external").contains("'external data file'"));
    // qemu-img times its key derivation and fails on busy hosts, so the header's encryption method is written here.
    folder.create("luks", "", "1M");
    std::fs::OpenOptions::new()
        .write(true)
        .open(folder.path("luks"))
        .unwrap()
        .write_all_at(&2u32.to_be_bytes(), 32)
        .unwrap();
    assert!(refuse("luks").contains("'LUKS encryption'"));

    folder.create("future", "", "1M");
    let file = std::fs::OpenOptions::new()
        .write(true)
        .read(true)
        .open(folder.path("future"))
        .unwrap();
    file.write_all_at(&[0x20], 79).unwrap();
    assert!(refuse("future").contains("'incompatible feature 5'"));
    // Entries of the table begin with kind and bit.
    let mut header = vec![0; 4096];
    file.read_at(&mut header, 0).unwrap();
    let place = header
        .windows(11)
        .position(|window| window == b"\x00\x04extended ")
        .unwrap();
    file.write_all_at(b"\x00\x05time travel\x00", place as u64)
        .unwrap();
    assert!(refuse("future").contains("'time travel'"));

    std::fs::write(folder.path("raw"), [0; 4096]).unwrap();
    assert!(refuse("raw").contains("not a qcow2 image"));
}
