//! Images that QEMU's tools have made, whole and damaged.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use crc32c::crc32c;

use super::*;
use crate::{Content, HostFile};

/// Format, the name that qemu-img has for it, and options: everything that qemu-img can write.
const SUBFORMATS: [(ForeignFormat, &str, &str); 10] = [
    (ForeignFormat::Vmdk, "vmdk", "subformat=monolithicSparse"),
    (ForeignFormat::Vmdk, "vmdk", "subformat=monolithicFlat"),
    (
        ForeignFormat::Vmdk,
        "vmdk",
        "subformat=twoGbMaxExtentSparse",
    ),
    (ForeignFormat::Vmdk, "vmdk", "subformat=twoGbMaxExtentFlat"),
    (ForeignFormat::Vmdk, "vmdk", "subformat=streamOptimized"),
    (ForeignFormat::Vhd, "vpc", "subformat=fixed,force_size=on"),
    (ForeignFormat::Vhd, "vpc", "subformat=dynamic,force_size=on"),
    (ForeignFormat::Vhdx, "vhdx", "subformat=fixed,block_size=1M"),
    (
        ForeignFormat::Vhdx,
        "vhdx",
        "subformat=dynamic,block_size=1M",
    ),
    (ForeignFormat::Vdi, "vdi", "static=off"),
];
const STATIC_VDI: (ForeignFormat, &str, &str) = (ForeignFormat::Vdi, "vdi", "static=on");

fn qemu_img(arguments: &[&str]) {
    let output = Command::new("qemu-img").args(arguments).output();
    let output = output.expect("these tests need qemu-img");
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Numbers that are the same in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // xorshift64
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// A disk with data at some places: random bytes, repeated bytes and zeroes.
fn sparse_disk(size: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut disk = vec![0; size];
    for _ in 0..size / 400_000 + 1 {
        let start = random.below(size as u64 / 512) as usize * 512;
        let end = size.min(start + (random.below(200) as usize + 1) * 512);
        match random.below(3) {
            0 => disk[start..end].fill(random.next() as u8),
            _ => disk[start..end].fill_with(|| random.next() as u8),
        }
    }
    disk
}

/// Writes an image of `disk` in `folder` by qemu-img.
fn image_of(disk: &[u8], format: &str, options: &str, folder: &Path) -> PathBuf {
    let raw = folder.join("raw");
    fs::write(&raw, disk).unwrap();
    let image = folder.join(format!("image.{format}"));
    let (from, to) = (raw.to_str().unwrap(), image.to_str().unwrap());
    qemu_img(&[
        "convert", "-f", "raw", "-O", format, "-o", options, from, to,
    ]);
    image
}

fn host_file(path: &Path) -> io::Result<Arc<dyn ImageFile>> {
    Ok(Arc::new(HostFile::new(File::open(path)?)))
}

fn open(format: ForeignFormat, path: &Path) -> Result<Foreign, OpenError> {
    let folder = path.parent().unwrap();
    format.open(host_file(path)?, &mut |name| host_file(&folder.join(name)))
}

fn read(image: &dyn Image, range: Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0xa5; (range.end - range.start) as usize];
    image.read_at(&mut bytes, range.start).unwrap();
    bytes
}

/// Checks that the whole of an image reads as `disk`, in large and small pieces, and that its status fits.
fn assert_is(image: &dyn Image, disk: &[u8]) {
    let size = disk.len() as u64;
    assert_eq!(image.size(), size);
    assert!(image.is_read_only());
    assert!(read(image, 0..size) == disk);
    let mut random = Random(7);
    for _ in 0..300 {
        let start = random.below(size);
        let end = size.min(start + random.below(200_000));
        let part = &disk[start as usize..end as usize];
        assert!(read(image, start..end) == part, "{start}..{end}");
    }
    let mut position = 0;
    while position < size {
        let status = image.status(position..size).unwrap();
        assert!(status.len > 0 && position + status.len <= size);
        let part = &disk[position as usize..(position + status.len) as usize];
        match status.content {
            Content::Zeroes | Content::Hole { .. } => assert!(part.iter().all(|&byte| byte == 0)),
            Content::Data { .. } | Content::Compressed => assert_eq!(status.depth, Some(0)),
        }
        position += status.len;
    }
    assert!(image.read_at(&mut [0; 2], size - 1).is_err());
    assert!(image.status(0..size + 1).is_err());
    assert!(image.write_at(&[0], 0).is_err());
}

#[test]
fn images_of_every_subformat_read_as_their_disk() {
    // The sizes end within a block, a grain, and a page of a bitmap.
    for (seed, size) in [
        (1, 5 << 20),
        (2, (9 << 20) + 512 * 3),
        (3, 512 * 129),
        (4, 40 << 20),
    ] {
        let disk = sparse_disk(size, seed);
        for (format, name, options) in SUBFORMATS.into_iter().chain([STATIC_VDI]) {
            let folder = tempfile::tempdir().unwrap();
            let path = image_of(&disk, name, options, folder.path());
            let foreign = open(format, &path).unwrap_or_else(|error| panic!("{options}: {error}"));
            // qemu-img rounds the disk up for VHDX.
            let mut disk = disk.clone();
            disk.resize(foreign.image.size() as usize, 0);
            assert_is(&*foreign.image, &disk);
            let start = fs::read(&path).unwrap();
            let probed = ForeignFormat::probe(&start[..start.len().min(4096)]);
            let expected = (options != "subformat=fixed,force_size=on").then_some(format);
            assert_eq!(probed, expected, "{options}");
        }
    }
}

#[test]
fn a_disk_of_several_extents_is_read_across_their_borders() {
    for subformat in ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.vmdk");
        let name = path.to_str().unwrap();
        let options = format!("subformat={subformat}");
        qemu_img(&["create", "-f", "vmdk", "-o", &options, name, "5G"]);
        let border = 2047 << 20;
        let write = format!("write -P 65 {} 4M", border - (2 << 20));
        let status = Command::new("qemu-io")
            .args(["-f", "vmdk", "-c", &write, name])
            .output();
        assert!(status.unwrap().status.success());
        let foreign = open(ForeignFormat::Vmdk, &path).unwrap();
        assert_eq!(foreign.image.size(), 5 << 30);
        assert!(foreign.siblings.len() >= 3, "{:?}", foreign.siblings);
        let bytes = read(
            &*foreign.image,
            border - (2 << 20) - 1..border + (2 << 20) + 1,
        );
        assert_eq!((bytes[0], *bytes.last().unwrap()), (0, 0));
        assert!(bytes[1..bytes.len() - 1].iter().all(|&byte| byte == 65));
        assert_eq!(read(&*foreign.image, (5 << 30) - 9..5 << 30), [0; 9]);
    }
}

#[test]
fn a_disk_without_forced_size_ends_where_its_geometry_does() {
    let folder = tempfile::tempdir().unwrap();
    let disk = sparse_disk(10 << 20, 3);
    for subformat in ["subformat=fixed", "subformat=dynamic"] {
        let path = image_of(&disk, "vpc", subformat, folder.path());
        let foreign = open(ForeignFormat::Vhd, &path).unwrap();
        let size = foreign.image.size();
        assert!((10 << 20..11 << 20).contains(&size) && size.is_multiple_of(512));
        assert!(read(&*foreign.image, 0..10 << 20) == disk);
    }
}

#[test]
fn an_image_that_depends_on_another_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base.vmdk");
    let over = folder.path().join("over.vmdk");
    let (base, over_name) = (base.to_str().unwrap(), over.to_str().unwrap());
    qemu_img(&["create", "-f", "vmdk", base, "1M"]);
    qemu_img(&["create", "-f", "vmdk", "-b", base, "-F", "vmdk", over_name]);
    let error = open(ForeignFormat::Vmdk, &over).unwrap_err().to_string();
    assert!(error.contains("differs from another"), "{error}");

    let mut vhd = Patched::new(ForeignFormat::Vhd, "subformat=dynamic");
    vhd.set(60, &4_u32.to_be_bytes());
    vhd.mend(ForeignFormat::Vhd);
    let error = vhd.open(ForeignFormat::Vhd).unwrap_err().to_string();
    assert!(error.contains("differencing VHD"), "{error}");

    let mut vdi = Patched::new(ForeignFormat::Vdi, "static=off");
    vdi.set(0x4c, &4_u32.to_le_bytes());
    let error = vdi.open(ForeignFormat::Vdi).unwrap_err().to_string();
    assert!(error.contains("differencing VDI"), "{error}");
}

#[test]
fn a_log_with_changes_is_refused_with_the_remedy() {
    let mut vhdx = Patched::new(ForeignFormat::Vhdx, "subformat=dynamic,block_size=1M");
    for header in [64 << 10, 128 << 10] {
        vhdx.set(header + 48, &[7; 16]);
    }
    vhdx.mend(ForeignFormat::Vhdx);
    let error = vhdx.open(ForeignFormat::Vhdx).unwrap_err().to_string();
    assert!(error.contains("qemu-img check -r all -f vhdx"), "{error}");
}

#[test]
fn a_descriptor_cannot_name_files_elsewhere() {
    for name in ["/etc/passwd", "../a", "..", ".", "", "a/b"] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.vmdk");
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\nRW 1 FLAT \"{name}\" 0\n"
        );
        fs::write(&path, text).unwrap();
        let file = host_file(&path).unwrap();
        let opened = ForeignFormat::Vmdk.open(file, &mut |name| panic!("'{name}' is opened"));
        let error = opened.unwrap_err().to_string();
        assert!(error.contains("not in its folder"), "{error}");
    }
}

#[test]
fn an_image_that_is_cut_short_is_an_error_and_not_zeroes() {
    let disk = sparse_disk(20 << 20, 11);
    for (format, name, options) in SUBFORMATS.into_iter().chain([STATIC_VDI]) {
        let folder = tempfile::tempdir().unwrap();
        let path = image_of(&disk, name, options, folder.path());
        // The data are in the last file by name, if there are more.
        let mut files: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|file| file.unwrap().path())
            .collect();
        files.retain(|file| file.file_name() != Some("raw".as_ref()));
        let data = files
            .iter()
            .max_by_key(|file| fs::metadata(file).unwrap().len())
            .unwrap();
        let file = File::options().write(true).open(data).unwrap();
        file.set_len(file.metadata().unwrap().len() / 2).unwrap();
        let Ok(foreign) = open(format, &path) else {
            continue;
        };
        let mut bytes = vec![0; foreign.image.size() as usize];
        assert!(foreign.image.read_at(&mut bytes, 0).is_err(), "{options}");
    }
}

/// Everything that can be created.
const CREATED: [(ForeignFormat, &str, &str); 11] = [
    (ForeignFormat::Vmdk, "vmdk", ""),
    (ForeignFormat::Vmdk, "vmdk", "adapter_type=lsilogic"),
    (ForeignFormat::Vmdk, "vmdk", "subformat=streamOptimized"),
    (ForeignFormat::Vhd, "vpc", ""),
    (ForeignFormat::Vhd, "vpc", "force_size=on"),
    (ForeignFormat::Vhd, "vpc", "subformat=fixed,force_size=on"),
    (ForeignFormat::Vhdx, "vhdx", ""),
    (ForeignFormat::Vhdx, "vhdx", "block_size=1M"),
    (ForeignFormat::Vhdx, "vhdx", "subformat=fixed,block_size=2M"),
    (ForeignFormat::Vdi, "vdi", ""),
    (ForeignFormat::Vdi, "vdi", "static=on"),
];

/// Creates an image of `size` bytes with `parts` of data, which begin at these offsets.
fn create(path: &Path, format: ForeignFormat, options: &str, size: u64, parts: &[(u64, &[u8])]) {
    let mut given = crate::Options::default();
    given.add(options).unwrap();
    let options = ForeignOptions::parse(format, given).unwrap();
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path);
    let file = Arc::new(HostFile::new(file.unwrap()));
    let target = options.create(file, size, "image").unwrap();
    for (offset, part) in parts {
        assert!(offset.is_multiple_of(target.unit()));
        target.write(part, *offset).unwrap();
    }
    target.finish(true).unwrap();
}

#[test]
fn qemu_reads_what_is_created() {
    for (seed, size) in [(1, 5 << 20), (2, (37 << 20) + 512 * 3), (3, 512 * 129)] {
        let disk = sparse_disk(size, seed);
        let chunks = (0..).step_by(64 << 10).zip(disk.chunks(64 << 10));
        let parts: Vec<_> = chunks
            .filter(|(_, chunk)| chunk.iter().any(|&byte| byte != 0))
            .collect();
        for (format, name, options) in CREATED {
            let folder = tempfile::tempdir().unwrap();
            let (raw, image) = (folder.path().join("raw"), folder.path().join("image"));
            fs::write(&raw, &disk).unwrap();
            create(&image, format, options, size as u64, &parts);
            let (raw, image_name) = (raw.to_str().unwrap(), image.to_str().unwrap());
            qemu_img(&["compare", "-f", "raw", "-F", name, raw, image_name]);
            if name != "vpc" {
                qemu_img(&["check", "-f", name, image_name]);
            }
            let foreign = open(format, &image).unwrap();
            let mut disk = disk.clone();
            disk.resize(foreign.image.size() as usize, 0);
            assert_is(&*foreign.image, &disk);
            // Without force_size, a VHD has the size that its geometry gives.
            if name == "vpc" && options.is_empty() {
                let other = image_of(&disk[..size], name, "subformat=dynamic", folder.path());
                let other = open(format, &other).unwrap();
                assert_eq!(foreign.image.size(), other.image.size());
            } else {
                assert_eq!(foreign.image.size(), size as u64, "{options}");
            }
        }
    }
}

#[test]
fn an_empty_disk_and_a_large_one_are_created() {
    let data = [0x41; 64 << 10];
    for (format, name, options) in CREATED {
        let is_full = options.contains("fixed") || options.contains("static");
        for size in [0_u64, 512, 9 << 30] {
            if name != "vdi" && size == 0 || is_full && size > 512 {
                continue;
            }
            let folder = tempfile::tempdir().unwrap();
            let image = folder.path().join("image");
            // Beyond the first entry of a VHDX bitmap and the first 4 GiB.
            let last = (size / (64 << 10)).saturating_sub(1) * (64 << 10);
            let parts: &[(u64, &[u8])] = if size > 512 { &[(last, &data)] } else { &[] };
            create(&image, format, options, size, parts);
            let foreign = open(format, &image).unwrap();
            assert!(foreign.image.size() >= size);
            if size > 512 {
                let read = format!("read -P 65 {last} 64k");
                let zeroes = format!("read -P 0 {} 64k", last - (64 << 10));
                let output = Command::new("qemu-io")
                    .args(["-r", "-f", name, "-c", &read, "-c", &zeroes])
                    .arg(&image)
                    .output()
                    .unwrap();
                let text = String::from_utf8_lossy(&output.stdout);
                assert!(
                    output.status.success() && !text.contains("failed"),
                    "{text}"
                );
                assert!(fs::metadata(&image).unwrap().len() < 64 << 20);
            }
            qemu_img(&["info", "-f", name, image.to_str().unwrap()]);
        }
    }
}

/// Format, options and bytes of an image.
type SmallImage = (ForeignFormat, &'static str, Arc<[u8]>);

/// The images that are damaged.
static SMALL_IMAGES: LazyLock<Vec<SmallImage>> = LazyLock::new(|| {
    let disk = sparse_disk(3 << 20, 5);
    let single_file = |&(_, _, options): &(ForeignFormat, &str, &str)| {
        !options.contains("twoGb") && !options.contains("Flat")
    };
    let subformats = SUBFORMATS
        .into_iter()
        .chain([STATIC_VDI])
        .filter(single_file);
    subformats
        .map(|(format, name, options)| {
            let folder = tempfile::tempdir().unwrap();
            let path = image_of(&disk, name, options, folder.path());
            (format, options, fs::read(path).unwrap().into())
        })
        .collect()
});

/// An image in memory with some bytes changed.
#[derive(Debug, Clone)]
struct Patched {
    bytes: Arc<[u8]>,
    size: u64,
    changes: BTreeMap<u64, u8>,
}

impl Patched {
    fn new(format: ForeignFormat, options: &str) -> Patched {
        let mut images = SMALL_IMAGES.iter();
        let image = images.find(|image| image.0 == format && image.1.starts_with(options));
        Patched::of(&image.unwrap().2)
    }

    fn of(bytes: &Arc<[u8]>) -> Patched {
        Patched {
            bytes: Arc::clone(bytes),
            size: bytes.len() as u64,
            changes: BTreeMap::new(),
        }
    }

    fn set(&mut self, offset: u64, bytes: &[u8]) {
        let changes = (offset..).zip(bytes.iter().copied());
        self.changes
            .extend(changes.filter(|&(offset, _)| offset < self.size));
    }

    fn get(&self, range: Range<u64>) -> Vec<u8> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.read_at(&mut bytes, range.start).unwrap();
        bytes
    }

    /// Sets the checksums, which would stop nearly all damage.
    fn mend(&mut self, format: ForeignFormat) {
        match format {
            ForeignFormat::Vhd => {
                for (offset, length, at) in
                    [(0, 512, 64), (512, 1024, 36), (self.size - 512, 512, 64)]
                {
                    let mut structure = self.get(offset..offset + length);
                    structure[at..at + 4].fill(0);
                    let sum: u32 = structure.iter().map(|&byte| u32::from(byte)).sum();
                    self.set(offset + at as u64, &(!sum).to_be_bytes());
                }
            }
            ForeignFormat::Vhdx => {
                for (offset, length) in
                    [(64, 4), (128, 4), (192, 64), (256, 64)].map(|(at, kib)| (at << 10, kib << 10))
                {
                    self.set(offset + 4, &[0; 4]);
                    let sum = crc32c(&self.get(offset..offset + length));
                    self.set(offset + 4, &sum.to_le_bytes());
                }
            }
            ForeignFormat::Vmdk | ForeignFormat::Vdi => {}
        }
    }

    fn open(&self, format: ForeignFormat) -> Result<Foreign, OpenError> {
        let refuse = &mut |_: &str| Err(io::ErrorKind::NotFound.into());
        format.open(Arc::new(self.clone()), refuse)
    }
}

impl ImageFile for Patched {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        bytes.fill(0);
        let start = self.size.min(offset);
        let end = self.size.min(offset.saturating_add(bytes.len() as u64));
        let held = &self.bytes[start as usize..end as usize];
        bytes[..held.len()].copy_from_slice(held);
        for (&at, &byte) in self.changes.range(start..end) {
            bytes[(at - offset) as usize] = byte;
        }
        Ok(())
    }

    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        unreachable!("the image is only read")
    }

    fn punch_hole(&self, _: Range<u64>) -> io::Result<()> {
        unreachable!("the image is only read")
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.size)
    }

    fn set_size(&self, _: u64) -> io::Result<()> {
        unreachable!("the image is only read")
    }
}

/// Uses an image as hostile bytes allow, which must end, and without a panic.
fn exercise(foreign: &Foreign, places: &[u64]) {
    let image = &foreign.image;
    let size = image.size();
    assert!(size <= MAX_DISK_SIZE);
    let mut bytes = vec![0; 100_000];
    for &place in places.iter().chain(&[0, size / 2, size.saturating_sub(1)]) {
        let start = place % size.max(1);
        let end = size.min(start + bytes.len() as u64);
        let _ = image.read_at(&mut bytes[..(end - start) as usize], start);
        if let Ok(status) = image.status(start..size) {
            assert!(status.len <= size - start && (status.len > 0) == (start < size));
        }
    }
}

#[test]
fn damaged_images_are_read_or_refused() {
    // Where the structures of the formats are, so that damage meets them more often than data.
    const STRUCTURES: [u64; 12] = [
        0,
        0x140,
        512,
        1024,
        0x600,
        64 << 10,
        192 << 10,
        1 << 20,
        2 << 20,
        3 << 20,
        0x200,
        0x2a00,
    ];
    type Change = (u8, u16, u8, u64);
    bolero::check!()
        .with_type::<(u8, Vec<Change>, Option<u32>, [u64; 4])>()
        .for_each(|(which, changes, cut, places)| {
            let images = &*SMALL_IMAGES;
            let (format, _, bytes) = &images[usize::from(*which) % images.len()];
            let mut image = Patched::of(bytes);
            if let Some(cut) = cut {
                image.size = image.size.saturating_sub(u64::from(*cut)).max(2048);
            }
            for &(structure, offset, length, value) in changes.iter().take(20) {
                let start = STRUCTURES[usize::from(structure) % STRUCTURES.len()];
                // A number of 1 to 8 bytes, often an extreme one.
                let value = match value % 4 {
                    0 => u64::MAX,
                    1 => 1 << (value % 64),
                    _ => value,
                };
                let length = usize::from(length % 8) + 1;
                let offset = start + u64::from(offset % 1024) / 2 * 2;
                image.set(offset, &value.to_le_bytes()[..length]);
            }
            image.mend(*format);
            if let Ok(foreign) = image.open(*format) {
                exercise(&foreign, places);
            }
        });
}

#[test]
fn any_bytes_are_opened_or_refused() {
    bolero::check!().for_each(|bytes| {
        let _ = ForeignFormat::probe(bytes);
        let image = Patched::of(&bytes.into());
        for format in [
            ForeignFormat::Vmdk,
            ForeignFormat::Vhd,
            ForeignFormat::Vhdx,
            ForeignFormat::Vdi,
        ] {
            if let Ok(foreign) = image.open(format) {
                exercise(&foreign, &[]);
            }
        }
    });
}
