use bantam_memory::GuestMemory;

use super::*;
use crate::LockMode;
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

fn open(path: &Path, read_only: bool) -> Result<DiskFile, DiskError> {
    let options = DiskOptions {
        read_only,
        ..DiskOptions::default()
    };
    DiskFile::open(path, &options)
}

fn message(path: &Path, read_only: bool) -> String {
    open(path, read_only).unwrap_err().to_string()
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
    assert!(
        message(&image(&directory, 1000), false)
            .contains("a multiple of 512 bytes; 'truncate --size=%512 FILE' rounds it up")
    );
}

#[test]
fn a_pipe_is_refused() {
    let directory = directory();
    let pipe = directory.as_path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for read_only in [true, false] {
        assert!(message(&pipe, read_only).contains("it is a pipe"));
    }
}

#[test]
fn a_raw_image_stays_raw_whatever_a_guest_writes() {
    let directory = directory();
    for (offset, mark) in [
        (0, &b"QFI\xfb\0\0\0\x03"[..]),
        (0, b"KDMV"),
        (64, &[0x7f, 0x10, 0xda, 0xbe]),
    ] {
        let path = image(&directory, 1024);
        let mut bytes = vec![0; 1024];
        bytes[offset..][..mark.len()].copy_from_slice(mark);
        fs::write(&path, &bytes).unwrap();
        for read_only in [true, false] {
            assert_eq!(open(&path, read_only).unwrap().size(), 1024);
        }
    }
}

#[test]
fn a_name_of_another_format_is_refused_unless_the_format_is_said() {
    let directory = directory();
    let path = directory.as_path().join("disk.qcow2");
    fs::write(&path, [0; 1024]).unwrap();
    let message = message(&path, false);
    assert!(
        message.contains("its name says that it is a qcow2 image"),
        "{message}"
    );
    assert!(
        message.contains("'format=raw'") && message.contains("-f qcow2 -O raw"),
        "{message}"
    );
    let options = DiskOptions {
        format: Some(ImageFormat::Raw),
        ..DiskOptions::default()
    };
    assert_eq!(DiskFile::open(&path, &options).unwrap().size(), 1024);
}

fn options_of(read_only: bool, any_size: bool, block_size: Option<u32>) -> DiskOptions {
    DiskOptions {
        read_only,
        any_size,
        block_size,
        ..DiskOptions::default()
    }
}

#[test]
fn an_image_of_any_length_is_a_disk_of_whole_blocks() {
    let directory = directory();
    for (len, read_only, any_size, block_size, size) in [
        (1000, true, false, None, Some(1024)),
        (1, true, false, None, Some(512)),
        (1000, true, false, Some(4096), Some(4096)),
        (1000, false, false, None, None),
        (1000, false, true, None, Some(512)),
        (1, false, true, None, Some(0)),
        (0, true, false, None, None),
        (0, true, true, None, Some(0)),
        (0, false, true, None, Some(0)),
        (5 * 512, false, false, None, Some(5 * 512)),
        (5 * 512, false, false, Some(4096), None),
        (8192, false, false, Some(4096), Some(8192)),
    ] {
        let path = image(&directory, len);
        let options = options_of(read_only, any_size, block_size);
        let opened = DiskFile::open(&path, &options).map(|disk| disk.size());
        assert_eq!(opened.ok(), size, "{len} {options:?}");
        assert_eq!(DiskFile::check(&path, &options).is_ok(), size.is_some());
        assert_eq!(fs::metadata(&path).unwrap().len(), len as u64);
    }
}

#[test]
fn a_read_only_image_ends_in_zeroes() {
    let directory = directory();
    let memory = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap());
    for (len, block_size) in [
        (1000, None),
        (1, None),
        (5000, Some(4096)),
        (0x2001, Some(4096)),
    ] {
        let path = image(&directory, len);
        for cache in [CacheMode::Writeback, CacheMode::None] {
            let options = DiskOptions {
                cache,
                ..options_of(true, false, block_size)
            };
            let disk = match DiskFile::open(&path, &options) {
                Err(DiskError::Direct { .. }) => continue,
                disk => disk.unwrap(),
            };
            let size = disk.size() as usize;
            memory
                .write_slice(&[0xff; 0x4000], GuestAddress(0))
                .unwrap();
            let mut buffers = GuestBuffers::new(memory.clone());
            // In two parts, the second of which may lie beyond the end of the image.
            buffers.push(GuestAddress(0), size as u32 / 2).unwrap();
            buffers
                .push(GuestAddress(0x8000), (size - size / 2) as u32)
                .unwrap();
            disk.fill_beyond_end(&mut buffers, 0);
            assert_eq!(buffers.len(), len);
            disk.read(&mut buffers, 0).unwrap();
            let mut bytes = vec![0; size];
            let (first, second) = bytes.split_at_mut(size / 2);
            memory.read_slice(first, GuestAddress(0)).unwrap();
            memory.read_slice(second, GuestAddress(0x8000)).unwrap();
            assert!(bytes[..len].iter().all(|&byte| byte == 0x5a));
            assert!(bytes[len..].iter().all(|&byte| byte == 0));
        }
    }
}

#[test]
fn regular_files_have_sectors_of_512_bytes_in_every_cache_mode() {
    for directory in [
        TempDir::new().unwrap(),
        TempDir::new_in(Path::new("/dev/shm")).unwrap(),
    ] {
        let path = image(&directory, 67 * 512);
        for cache in [
            CacheMode::Writeback,
            CacheMode::Writethrough,
            CacheMode::None,
            CacheMode::Unsafe,
        ] {
            let options = DiskOptions {
                cache,
                ..DiskOptions::default()
            };
            match DiskFile::open(&path, &options) {
                // tmpfs supports O_DIRECT since Linux 6.6.
                Err(DiskError::Direct { .. }) => assert_eq!(cache, CacheMode::None),
                disk => {
                    let disk = disk.unwrap();
                    assert_eq!((disk.size(), disk.logical_block_size()), (67 * 512, 512));
                }
            }
        }
    }
}

#[test]
fn what_direct_access_does_not_take_is_done_in_order() {
    let directory = TempDir::new_in(Path::new("/dev/shm")).unwrap();
    // The last sectors are in a tail.
    let size = 3 * 4096 + 1024;
    let path = image(&directory, size);
    let options = DiskOptions {
        cache: CacheMode::None,
        ..DiskOptions::default()
    };
    let Ok(disk) = DiskFile::open(&path, &options) else {
        return;
    };
    let memory = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap());
    let mut model = vec![0x5a; size];
    for (round, (offset, len)) in [
        (0, 512),
        (512, 1024),
        (4096 - 512, 1024),
        (4096, 8192),
        (512, size - 512),
        (size - 512, 512),
        (size - 1024, 1024),
        (0, size),
    ]
    .into_iter()
    .enumerate()
    {
        let bytes: Vec<u8> = (0..len).map(|at| (at * 7 + round) as u8).collect();
        memory.write_slice(&bytes, GuestAddress(3)).unwrap();
        let mut buffers = GuestBuffers::new(memory.clone());
        buffers.push(GuestAddress(3), len as u32).unwrap();
        disk.write(&mut buffers, offset as u64, round % 2 == 0)
            .unwrap();
        assert!(buffers.is_empty());
        model[offset..offset + len].copy_from_slice(&bytes);
        assert!(fs::read(&path).unwrap() == model, "{offset} {len}");
        buffers.push(GuestAddress(0x8001), len as u32).unwrap();
        disk.read(&mut buffers, offset as u64).unwrap();
        let mut read = vec![0; len];
        memory.read_slice(&mut read, GuestAddress(0x8001)).unwrap();
        assert!(read == bytes, "{offset} {len}");
    }
    disk.fill_with_zeroes(512, size as u64 - 1024).unwrap();
    model[512..size - 512].fill(0);
    assert!(fs::read(&path).unwrap() == model);
    // A truncated image becomes longer again, with zeroes in between.
    fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(100)
        .unwrap();
    let mut buffers = GuestBuffers::new(memory.clone());
    buffers.push(GuestAddress(0), 512).unwrap();
    assert!(disk.read(&mut buffers, 4096).is_err());
    disk.write(&mut buffers, 4096 + 512, false).unwrap();
    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes.len(), 8192);
    assert!(bytes[100..4096 + 512].iter().all(|&byte| byte == 0));
}

#[test]
fn an_image_without_a_lock_is_used_only_if_that_is_wanted() {
    let directory = directory();
    let path = image(&directory, 1024);
    let _writer = open(&path, false).unwrap();
    for (lock, is_used) in [
        (LockMode::On, false),
        (LockMode::WherePossible, false),
        (LockMode::Warn, true),
        (LockMode::Off, true),
    ] {
        let options = DiskOptions {
            lock,
            ..DiskOptions::default()
        };
        let opened = DiskFile::open(&path, &options);
        assert_eq!(opened.is_ok(), is_used, "{lock:?}");
    }
    // The opens without a lock have not disturbed the first one's lock.
    assert!(message(&path, false).contains("in use"));
}

#[test]
fn a_writable_disk_is_used_once() {
    let directory = directory();
    let path = image(&directory, 1024);
    let writable = open(&path, false).unwrap();
    assert!(message(&path, false).contains("in use"));
    assert!(message(&path, true).contains("in use"));
    drop(writable);
    let _reader = open(&path, true).unwrap();
    let _second_reader = open(&path, true).unwrap();
    assert!(message(&path, false).contains("in use"));
}

#[test]
fn bytes_go_both_ways_and_ranges_become_zero() {
    let directory = directory();
    let path = image(&directory, 64 << 10);
    let disk = open(&path, false).unwrap();
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
    let disk = open(&path, false).unwrap();
    fs::OpenOptions::new()
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
