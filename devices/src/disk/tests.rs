use super::*;
use crate::GuestMemory;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempdir::TempDir;

fn directory() -> TempDir {
    TempDir::new().unwrap()
}

fn image(directory: &TempDir, size: usize) -> PathBuf {
    let path = directory.as_path().join("disk.img");
    fs::write(&path, vec![0x5a; size]).unwrap();
    path
}

fn message(path: &Path, read_only: bool) -> String {
    DiskFile::open(path, read_only, CacheMode::default())
        .unwrap_err()
        .to_string()
}

#[test]
fn what_is_no_disk_is_refused() {
    let directory = directory();
    let path = directory.as_path().join("disk.img");
    assert!(message(&path, false).contains("No such file"));
    assert!(message(directory.as_path(), false).contains("it is a directory"));
    assert!(message(directory.as_path(), true).contains("it is a directory"));
    assert!(message(Path::new("/dev/null"), false).contains("not a regular file"));
    assert!(message(&image(&directory, 0), false).contains("truncate"));
    assert!(message(&image(&directory, 1000), false).contains("no multiple of 512"));
}

#[test]
fn a_qcow2_image_and_a_pipe_are_refused() {
    let directory = directory();
    let path = image(&directory, 1024);
    fs::write(&path, [&QCOW2_MAGIC[..], &[0; 508]].concat()).unwrap();
    assert!(message(&path, true).contains("qemu-img convert"));
    let pipe = directory.as_path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for read_only in [true, false] {
        assert!(message(&pipe, read_only).contains("it is a pipe"));
    }
}

#[test]
fn a_writable_disk_is_used_once() {
    let directory = directory();
    let path = image(&directory, 1024);
    let writable = DiskFile::open(&path, false, CacheMode::default()).unwrap();
    assert!(message(&path, false).contains("in use"));
    assert!(message(&path, true).contains("in use"));
    drop(writable);
    let _reader = DiskFile::open(&path, true, CacheMode::default()).unwrap();
    let _second_reader = DiskFile::open(&path, true, CacheMode::default()).unwrap();
    assert!(message(&path, false).contains("in use"));
}

#[test]
fn bytes_go_both_ways_and_ranges_become_zero() {
    let directory = directory();
    let path = image(&directory, 64 << 10);
    let disk = DiskFile::open(&path, false, CacheMode::default()).unwrap();
    assert_eq!(disk.size(), 64 << 10);
    let memory = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 64 << 10)]).unwrap());
    let mut buffers = GuestBuffers::new(memory.clone());

    memory.write_slice(b"first", GuestAddress(0)).unwrap();
    buffers.push(GuestAddress(0), 512).unwrap();
    disk.write(&mut buffers, 4096, false).unwrap();
    disk.flush().unwrap();
    assert_eq!(&fs::read(&path).unwrap()[4096..4101], b"first");

    for (offset, deallocate) in [(8192, true), (16384, false)] {
        disk.write_zeroes(offset, 4096, deallocate).unwrap();
        let bytes = fs::read(&path).unwrap();
        let (start, end) = (offset as usize, offset as usize + 4096);
        assert!(bytes[start..end].iter().all(|&byte| byte == 0));
        assert_eq!((bytes[start - 1], bytes[end]), (0x5a, 0x5a));
    }
    disk.fill_with_zeroes(100, 70).unwrap();
    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes[99..171].iter().filter(|&&byte| byte == 0).count(), 70);
    disk.discard(0, 4096).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 64 << 10);
}

#[test]
fn a_truncated_file_is_an_error() {
    let directory = directory();
    let path = image(&directory, 4096);
    let disk = DiskFile::open(&path, false, CacheMode::default()).unwrap();
    OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(700)
        .unwrap();
    let memory = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 4096)]).unwrap());
    let mut buffers = GuestBuffers::new(memory);
    buffers.push(GuestAddress(0), 1024).unwrap();
    let error = disk.read(&mut buffers, 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}
