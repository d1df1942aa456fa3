//! Disks of a machine in qcow2 format, opened by their names. QEMU's tools make them; the tests fail without
//! them.

use std::fs::{self, File};
use std::io;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::Command;

use bantam_storage::job::{CopyJob, CopyJobOptions, JobState};
use bantam_storage::{
    CacheMode, Direction, Disk, DiskError, DiskOptions, Extent, HostOpener, ImageFormat,
};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use tempfile::TempDir;

const SIZE: u64 = 8 << 20;
const PAGE: u64 = 4096;

fn qemu_img(folder: &Path, words: &str) {
    let mut command = Command::new("qemu-img");
    let command = command.args(words.split(' ')).current_dir(folder);
    let output = command.output().expect("qemu-img is installed");
    assert!(output.status.success(), "{output:?}");
}

fn options() -> DiskOptions {
    DiskOptions {
        backing: true,
        ..DiskOptions::default()
    }
}

fn open(path: &Path, options: &DiskOptions) -> Result<Disk, DiskError> {
    Disk::open_by(&HostOpener, path, options)
}

fn refusal(path: &Path, options: &DiskOptions) -> String {
    let refused = open(path, options).expect_err("it is refused").to_string();
    assert!(!refused.contains('\n'));
    refused
}

fn read(disk: &Disk, offset: u64) -> [u8; 512] {
    let Disk::Formatted(disk) = disk else {
        panic!("it is raw");
    };
    let mut bytes = [0; 512];
    disk.image()
        .read_at(&mut bytes, offset)
        .expect("it can be read");
    bytes
}

/// Makes a chain of two images over a raw file, and returns the path of the topmost.
fn chain() -> (TempDir, PathBuf) {
    let folder = TempDir::new().expect("it can be made");
    fs::write(folder.path().join("base.img"), vec![0x5a; SIZE as usize]).expect("there is room");
    for words in [
        "create -q -f qcow2 -F raw -b base.img middle.qcow2",
        "create -q -f qcow2 -F qcow2 -b middle.qcow2 top.qcow2",
    ] {
        qemu_img(folder.path(), words);
    }
    let top = folder.path().join("top.qcow2");
    (folder, top)
}

#[test]
fn a_chain_is_opened_by_its_topmost_image() {
    let (folder, top) = chain();
    let disk = open(&top, &options()).unwrap();
    assert_eq!(disk.size(), SIZE);
    assert!(!disk.is_read_only());
    assert_eq!(disk.options().format, Some(ImageFormat::Qcow2));
    assert_eq!(read(&disk, SIZE - 512), [0x5a; 512]);
    let Disk::Formatted(formatted) = &disk else {
        panic!("it is raw");
    };
    assert_eq!(formatted.files().len(), 3);
    formatted.image().write_at(&[7; 512], 512).unwrap();
    disk.flush().unwrap();
    assert_eq!(read(&disk, 512), [7; 512]);
    drop(disk);
    let base = fs::read(folder.path().join("base.img")).unwrap();
    assert!(base.iter().all(|&byte| byte == 0x5a));
    qemu_img(folder.path(), "check -q top.qcow2");
}

#[test]
fn each_file_of_a_chain_is_locked() {
    let (folder, top) = chain();
    let disk = open(&top, &options()).unwrap();
    let written = |name: &str| {
        let mut command = Command::new("qemu-io");
        let format = if name == "base.img" { "raw" } else { "qcow2" };
        let command = command.args(["-f", format, "-c", "write 0 512", name]);
        let status = command.current_dir(folder.path()).output().unwrap().status;
        status.success()
    };
    for name in ["base.img", "middle.qcow2", "top.qcow2"] {
        assert!(!written(name), "{name}");
    }
    // Others may read what this disk only reads.
    let middle = folder.path().join("middle.qcow2");
    let read_only = DiskOptions {
        read_only: true,
        ..options()
    };
    open(&middle, &read_only).unwrap();
    assert!(refusal(&middle, &options()).contains("in use"));
    assert!(refusal(&top, &read_only).contains("in use"));
    Disk::check(&top, &options()).unwrap();
    drop(disk);
    assert!(written("top.qcow2"));
}

/// Whether a byte of a file is in the page cache. A read that may not wait would tell, too, but begins to
/// read ahead where it finds nothing.
fn is_cached(path: &Path, offset: u64) -> bool {
    let file = File::open(path).expect("it is there");
    let page = offset / PAGE * PAGE;
    let len = NonZeroUsize::new(PAGE as usize).expect("a page has bytes");
    let flags = MapFlags::MAP_SHARED;
    // SAFETY: the kernel chooses a free place, and nobody reads or writes through this mapping.
    let mapping = unsafe { mmap(None, len, ProtFlags::PROT_READ, flags, &file, page as i64) };
    let mapping = mapping.expect("it can be mapped");
    let mut resident = 0;
    // SAFETY: the mapping has one page, for which the call writes one byte.
    let answer = unsafe { libc::mincore(mapping.as_ptr(), len.get(), &raw mut resident) };
    assert_eq!(answer, 0, "{}", io::Error::last_os_error());
    // SAFETY: it is the mapping of above, which nobody refers to.
    unsafe { munmap(mapping, len.get()) }.expect("it is mapped");
    resident & 1 != 0
}

#[test]
fn data_go_past_the_page_cache_and_tables_through_it() {
    // Beside this program: the usual folder for temporary files may be in memory.
    let program = std::env::current_exe().unwrap();
    let folder = TempDir::new_in(program.parent().unwrap()).unwrap();
    let base = folder.path().join("base.img");
    fs::write(&base, vec![0x5a; SIZE as usize]).unwrap();
    let words = "create -q -f qcow2 -F raw -b base.img top.qcow2";
    qemu_img(folder.path(), words);
    let top = folder.path().join("top.qcow2");
    // What the tools have left there.
    for path in [&base, &top] {
        let file = File::open(path).expect("it is there");
        file.sync_all().unwrap();
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    }
    let direct = DiskOptions {
        cache: CacheMode::None,
        ..options()
    };
    let disk = open(&top, &direct).unwrap();
    let Disk::Formatted(formatted) = &disk else {
        panic!("it is raw");
    };
    let image = formatted.image();
    // Whole clusters, parts of some, and what no storage takes as it is.
    for (offset, len) in [(0, 3 << 16), (5 << 16, 5000), ((9 << 16) + 7, 3)] {
        image.write_at(&vec![7; len], offset).unwrap();
        let mut bytes = vec![0; len + 2];
        image.read_at(&mut bytes, offset).unwrap();
        assert_eq!(bytes, [&vec![7; len][..], &[0x5a; 2]].concat());
    }
    disk.flush().unwrap();
    for guest in [0, 1 << 16, 5 << 16, 9 << 16] {
        let Extent::File {
            file: 0, offset, ..
        } = image.map(guest..guest + 512, Direction::Read)
        else {
            panic!("it is not mapped");
        };
        assert!(!is_cached(&top, offset), "{guest}");
    }
    assert!(is_cached(&top, 0));
    for guest in [5 << 16, 9 << 16, 20 << 16] {
        assert_eq!(read(&disk, guest + 8192), [0x5a; 512]);
        assert!(!is_cached(&base, guest + 8192), "{guest}");
    }
    drop(disk);
    qemu_img(folder.path(), "check -q top.qcow2");
    assert_eq!(read(&open(&top, &options()).unwrap(), 5 << 16), [7; 512]);
}

#[test]
fn a_copy_has_the_size_of_the_disk_whatever_that_of_its_file_is() {
    for (format, name) in [(ImageFormat::Raw, "raw"), (ImageFormat::Qcow2, "qcow2")] {
        for cache in [CacheMode::Writeback, CacheMode::None] {
            let program = std::env::current_exe().unwrap();
            let folder = TempDir::new_in(program.parent().unwrap()).unwrap();
            let path = folder.path().join("disk.img");
            let bytes: Vec<u8> = (0..300_100).map(|index| (index % 251) as u8).collect();
            fs::write(&path, &bytes).unwrap();
            let options = DiskOptions {
                any_size: true,
                cache,
                ..options()
            };
            let disk = open(&path, &options).unwrap();
            assert_eq!(disk.size(), 586 * 512);
            let source = disk.to_formatted(&HostOpener).unwrap();
            assert_eq!(source.image().size(), disk.size());
            let copy = folder.path().join("copy");
            let target = disk.create_for_copy(&HostOpener, &copy, format).unwrap();
            let to = target.to_formatted(&HostOpener).unwrap();
            let options = CopyJobOptions {
                target_is_zero: true,
                layers: None,
            };
            let job = CopyJob::new(source.image().clone(), to.image().clone(), options).unwrap();
            assert_eq!(job.run(), JobState::Ready);
            job.begin_switch().unwrap();
            drop((job, to, target));
            let words = format!("convert -f {name} -O raw copy read.img");
            qemu_img(folder.path(), &words);
            let copied = fs::read(folder.path().join("read.img")).unwrap();
            assert!(copied == bytes[..586 * 512]);
            // An image that has it as its backing file reads all of it.
            let overlay = disk.overlay(&HostOpener, &folder.path().join("overlay"));
            assert_eq!(
                read(&overlay.unwrap(), 585 * 512)[..],
                bytes[585 * 512..586 * 512]
            );
        }
    }
}

#[test]
fn what_cannot_be_a_disk_is_refused_by_name() {
    let (folder, top) = chain();
    let path = |name: &str| folder.path().join(name);
    let no_backing = DiskOptions::default();
    assert!(refusal(&top, &no_backing).contains("it has the backing file"));
    let direct = DiskOptions {
        cache: CacheMode::None,
        ..options()
    };
    // Their data and tables would share blocks.
    let words = "create -q -f qcow2 -o cluster_size=512 small.qcow2 1M";
    qemu_img(folder.path(), words);
    let small = path("small.qcow2");
    assert!(refusal(&small, &direct).contains("'cache=none'"));
    fs::write(path("zeroes.qcow2"), [0; 4096]).unwrap();
    assert!(refusal(&path("zeroes.qcow2"), &options()).contains("not a qcow2 image"));
    let raw = DiskOptions {
        format: Some(ImageFormat::Raw),
        ..options()
    };
    assert!(matches!(
        open(&path("zeroes.qcow2"), &raw),
        Ok(Disk::Raw(_))
    ));
    let qcow2 = DiskOptions {
        format: Some(ImageFormat::Qcow2),
        ..options()
    };
    assert!(refusal(&path("base.img"), &qcow2).contains("not a qcow2 image"));
    fs::remove_file(path("base.img")).unwrap();
    let refused = refusal(&top, &options());
    assert!(
        refused.contains("base.img' for reading: No such file"),
        "{refused}"
    );
    for (name, words) in [
        (
            "loop.qcow2",
            "create -q -f qcow2 -u -F qcow2 -b ./loop.qcow2 loop.qcow2 1M",
        ),
        (
            "vmdk.qcow2",
            "create -q -f qcow2 -u -F vmdk -b a.vmdk vmdk.qcow2 1M",
        ),
    ] {
        qemu_img(folder.path(), words);
        let refused = refusal(&path(name), &options());
        let reason = if name == "loop.qcow2" {
            "form a loop"
        } else {
            "its format is 'vmdk'"
        };
        assert!(refused.contains(reason), "{refused}");
    }
}
