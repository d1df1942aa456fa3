//! Disks of a machine in qcow2 format, opened by their names. QEMU's tools make them; the tests fail without
//! them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use bantam_storage::{CacheMode, Disk, DiskError, DiskOptions, HostOpener, ImageFormat};
use tempfile::TempDir;

const SIZE: u64 = 8 << 20;

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
    assert!(refusal(&top, &direct).contains("'cache=none'"));
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
