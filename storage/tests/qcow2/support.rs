//! QEMU's tools, and what an image is kept in.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bantam_storage::qcow2::{Options, Qcow2};
use bantam_storage::{Direction, Extent, HostFile, Image, ImageFile, RawImage};
use tempfile::TempDir;

use crate::memory_file::MemoryFile;

/// How long a lock can stay that nobody holds on purpose.
const LOCK_LIMIT: Duration = Duration::from_secs(10);

/// Runs one of QEMU's tools and returns what it prints, or its status and what it says.
pub fn try_qemu(tool: &str, arguments: &[&str]) -> Result<String, (i32, String)> {
    let output = Command::new(tool)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("these tests need {tool} (Debian's qemu-utils): {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        let says = text(&output.stdout) + &text(&output.stderr);
        Err((output.status.code().unwrap_or(-1), says))
    }
}

/// Runs one of QEMU's tools, which has to succeed.
pub fn qemu(tool: &str, arguments: &[&str]) -> String {
    let deadline = Instant::now() + LOCK_LIMIT;
    loop {
        match try_qemu(tool, arguments) {
            Ok(text) => return text,
            // A process that another test is starting has the locks of all files until it executes its program.
            Err((_, says)) if says.contains("lock") && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(5));
            }
            Err((status, says)) => panic!("{tool} {arguments:?}: {status}: {says}"),
        }
    }
}

/// A folder with images.
pub struct Folder(TempDir);

impl Folder {
    pub fn new() -> Folder {
        Folder(TempDir::new().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn name(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Makes an image with `qemu-img`.
    pub fn create(&self, name: &str, options: &str, size: &str) {
        let path = self.name(name);
        let options = if options.is_empty() {
            "compat=1.1"
        } else {
            options
        };
        qemu(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-o", options, &path, size],
        );
    }

    /// Runs commands of `qemu-io` on an image.
    pub fn io(&self, name: &str, commands: &[String]) {
        let path = self.name(name);
        let mut arguments = vec!["-f", "qcow2"];
        for command in commands {
            arguments.extend(["-c", command]);
        }
        arguments.push(&path);
        let output = qemu("qemu-io", &arguments);
        assert!(
            !output.contains("error") && !output.contains("failed"),
            "{output}"
        );
    }

    /// Returns what QEMU says that the disk of an image holds.
    pub fn contents(&self, name: &str) -> Vec<u8> {
        let raw = self.name("contents.raw");
        qemu(
            "qemu-img",
            &[
                "convert",
                "-f",
                "qcow2",
                "-O",
                "raw",
                &self.name(name),
                &raw,
            ],
        );
        std::fs::read(raw).unwrap()
    }

    /// Checks an image by `qemu-img check`: neither damage nor leaks.
    pub fn check(&self, name: &str) {
        qemu(
            "qemu-img",
            &["check", "-q", "-f", "qcow2", &self.name(name)],
        );
    }

    pub fn open(&self, name: &str, options: Options) -> Qcow2 {
        Qcow2::open(host_file(&self.path(name), options.read_only), options).unwrap()
    }

    pub fn open_read_only(&self, name: &str) -> Qcow2 {
        self.open(
            name,
            Options {
                read_only: true,
                ..Options::default()
            },
        )
    }
}

/// Opens a file of the host.
pub fn host_file(path: &Path, read_only: bool) -> Arc<dyn ImageFile> {
    let file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .open(path)
        .unwrap();
    Arc::new(HostFile::new(file))
}

/// Reads a whole disk.
pub fn read_all(image: &dyn Image) -> Vec<u8> {
    let mut bytes = vec![0x5a; image.size() as usize];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Opens a raw image, for backing files.
pub fn raw_image(path: &Path) -> Arc<dyn Image> {
    let file = Arc::new(HostFile::new(File::open(path).unwrap()));
    Arc::new(RawImage::new(file, true).unwrap())
}

/// Numbers that look random, and are the same in each run.
pub struct Numbers(u64);

impl Numbers {
    pub fn new(seed: u64) -> Numbers {
        Numbers(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}

/// Returns a backing file in memory.
pub fn image_of(bytes: Vec<u8>) -> Arc<dyn Image> {
    let file = Arc::new(MemoryFile::new(bytes));
    Arc::new(RawImage::new(file, true).unwrap())
}

/// Writes as the device of a disk does: to the file where the image has or finds a place, and by the image elsewhere.
pub fn write_as_device(
    image: &Qcow2,
    file: &dyn ImageFile,
    mut bytes: &[u8],
    mut offset: u64,
) -> io::Result<()> {
    while !bytes.is_empty() {
        let range = offset..offset + bytes.len() as u64;
        let mut extent = image.map(range, Direction::Write);
        if let Extent::Slow { len } = extent
            && let Some(found) = image.allocate(offset..offset + len)
        {
            extent = found.extent;
            if found.should_prepare {
                // A failure shows again when a write finds no room.
                let _ = image.prepare();
            }
        }
        let (Extent::File { len, .. } | Extent::Zeroes { len } | Extent::Slow { len }) = extent;
        let (part, rest) = bytes.split_at(len as usize);
        match extent {
            Extent::File { offset, .. } => file.write_at(part, offset)?,
            Extent::Zeroes { .. } | Extent::Slow { .. } => image.write_at(part, offset)?,
        }
        bytes = rest;
        offset += len;
    }
    Ok(())
}
