//! Storage that stops answering, like a server that is gone, or that refuses writes, like a disk that fails.

use std::collections::VecDeque;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tempfile::TempDir;

/// Size of the one file in bytes, until it is changed.
const FILE_SIZE: usize = 1 << 20;
/// Size to which it can grow.
const MAX_FILE_SIZE: usize = 256 << 20;
/// The bit of `valid` in `struct fuse_setattr_in` that says that there is a size.
const SETS_SIZE: u32 = 1 << 3;
/// Size of the largest request in bytes, with its header.
const REQUEST_SIZE: usize = 256 << 10;
/// Sizes of the headers of requests and answers.
const IN_HEADER: usize = 40;
/// Node of the root folder, and of the file.
const ROOT: u64 = 1;
const FILE: u64 = 2;
/// How long a guest may take to have the storage of a range changed.
const CHANGE_LIMIT: Duration = Duration::from_secs(30);
/// How often the server checks whether it has to answer again.
const INTERVAL: Duration = Duration::from_millis(10);

/// Operations of FUSE (`linux/fuse.h`).
mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const INIT: u32 = 26;
    pub const INTERRUPT: u32 = 36;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
}

/// A FUSE file system with one file of zeroes, which is never in the page cache. While it is stalled,
/// reads, writes and syncs get no answer; a signal that ends the process ends them. While it refuses
/// writes, they fail with an I/O error, and so do syncs. It changes the storage of no range: while it
/// holds such requests they get no answer, and otherwise they are not supported.
pub struct StallingStorage {
    folder: TempDir,
    stalled: Arc<AtomicBool>,
    holds_changes: Arc<AtomicBool>,
    held_changes: Arc<AtomicUsize>,
    refuses: Arc<AtomicBool>,
    ending: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
}

impl StallingStorage {
    /// Mounts the file system, which takes `CAP_SYS_ADMIN`.
    ///
    /// # Panics
    ///
    /// If it cannot be mounted.
    pub fn new() -> Self {
        Self::try_new().unwrap_or_else(|reason| panic!("no FUSE file system: {reason}"))
    }

    pub(crate) fn try_new() -> Result<Self, String> {
        let device = File::options().read(true).write(true).open("/dev/fuse");
        let device = device.map_err(|error| format!("cannot open /dev/fuse: {error}"))?;
        let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other",
            device.as_raw_fd()
        );
        mount(folder.path(), &options).map_err(|error| format!("cannot mount it: {error}"))?;
        let (stalled, ending) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let refuses = Arc::<AtomicBool>::default();
        let holds_changes = Arc::<AtomicBool>::default();
        let held_changes = Arc::<AtomicUsize>::default();
        let mut server = Server {
            device,
            data: vec![0; FILE_SIZE],
            stalled: stalled.clone(),
            refuses: refuses.clone(),
            holds_changes: holds_changes.clone(),
            held_changes: held_changes.clone(),
            ending: ending.clone(),
            held: VecDeque::new(),
            changes: VecDeque::new(),
        };
        Ok(Self {
            folder,
            stalled,
            holds_changes,
            held_changes,
            refuses,
            ending,
            server: Some(thread::spawn(move || server.run())),
        })
    }

    /// The path of the file.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("file")
    }

    /// Stops answering, or goes on with what has been asked meanwhile.
    pub fn stall(&self, stalls: bool) {
        self.stalled.store(stalls, Ordering::SeqCst);
    }

    /// Answers no request to change the storage of a range, or refuses those that were held and all others.
    pub fn hold_changes(&self, holds: bool) {
        self.holds_changes.store(holds, Ordering::SeqCst);
    }

    /// Waits until a request to change the storage of a range is held.
    ///
    /// # Panics
    ///
    /// If none comes in time.
    pub fn wait_for_change(&self) {
        let deadline = Instant::now() + CHANGE_LIMIT;
        while self.held_changes.load(Ordering::SeqCst) == 0 {
            assert!(Instant::now() < deadline, "nobody changes the file");
            thread::sleep(INTERVAL);
        }
    }

    /// Refuses writes and syncs, or takes them again.
    pub fn refuse_writes(&self, refuses: bool) {
        self.refuses.store(refuses, Ordering::SeqCst);
    }
}

impl Default for StallingStorage {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for StallingStorage {
    fn drop(&mut self) {
        self.stall(false);
        self.hold_changes(false);
        let path = path_of(self.folder.path());
        // SAFETY: the path is a string that ends with a zero.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
        self.ending.store(true, Ordering::SeqCst);
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

fn path_of(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("paths have no zeroes")
}

fn mount(folder: &Path, options: &str) -> io::Result<()> {
    let (folder, options) = (path_of(folder), CString::new(options)?);
    // SAFETY: all of them are strings that end with a zero.
    let result = unsafe {
        libc::mount(
            c"stalling".as_ptr(),
            folder.as_ptr(),
            c"fuse.stalling".as_ptr(),
            libc::MS_NOSUID | libc::MS_NODEV,
            options.as_ptr().cast(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The thread that answers the kernel.
struct Server {
    device: File,
    data: Vec<u8>,
    stalled: Arc<AtomicBool>,
    refuses: Arc<AtomicBool>,
    holds_changes: Arc<AtomicBool>,
    /// How many changes of the storage of a range were held so far.
    held_changes: Arc<AtomicUsize>,
    ending: Arc<AtomicBool>,
    /// Requests that have no answer yet.
    held: VecDeque<Vec<u8>>,
    /// Changes of the storage of a range that have no answer yet.
    changes: VecDeque<Vec<u8>>,
}

impl Server {
    fn run(&mut self) {
        let mut request = vec![0; REQUEST_SIZE];
        while !self.ending.load(Ordering::SeqCst) {
            if !self.stalled.load(Ordering::SeqCst) {
                while let Some(held) = self.held.pop_front() {
                    self.answer(&held);
                }
            }
            if !self.holds_changes.load(Ordering::SeqCst) {
                while let Some(change) = self.changes.pop_front() {
                    self.answer(&change);
                }
            }
            let mut events = [PollFd::new(self.device.as_fd(), PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(INTERVAL).expect("it is short");
            if !poll(&mut events, timeout).is_ok_and(|ready| ready > 0) {
                continue;
            }
            match self.device.read(&mut request) {
                Ok(size) => self.take(&request[..size]),
                // The file system is no longer mounted.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return,
                Err(_) => {}
            }
        }
    }

    fn take(&mut self, request: &[u8]) {
        let opcode = u32_at(request, 4);
        let waits = matches!(opcode, opcode::READ | opcode::WRITE | opcode::FSYNC);
        if opcode == opcode::INTERRUPT {
            let unique = u64_at(request, IN_HEADER);
            let before = self.held.len();
            self.held.retain(|held| u64_at(held, 8) != unique);
            if self.held.len() < before {
                self.reply(unique, -libc::EINTR, &[]);
            }
        } else if opcode == opcode::FALLOCATE && self.holds_changes.load(Ordering::SeqCst) {
            self.changes.push_back(request.to_vec());
            self.held_changes.fetch_add(1, Ordering::SeqCst);
        } else if waits && self.stalled.load(Ordering::SeqCst) {
            self.held.push_back(request.to_vec());
        } else {
            self.answer(request);
        }
    }

    fn answer(&mut self, request: &[u8]) {
        let (opcode, unique, node) = (u32_at(request, 4), u64_at(request, 8), u64_at(request, 16));
        let body = &request[IN_HEADER..];
        match opcode {
            opcode::INIT => {
                // Version 7.31, no optional features, and the sizes of queues and of writes.
                let mut answer = Vec::new();
                for word in [7_u32, 31, 1 << 16, 0, 10 << 16 | 12, 128 << 10, 1] {
                    answer.extend(word.to_le_bytes());
                }
                answer.resize(64, 0);
                self.reply(unique, 0, &answer);
            }
            opcode::LOOKUP if node == ROOT && body.starts_with(b"file\0") => {
                let mut answer = FILE.to_le_bytes().to_vec();
                answer.resize(40, 0);
                answer.extend(self.attributes(FILE));
                self.reply(unique, 0, &answer);
            }
            opcode::LOOKUP => self.reply(unique, -libc::ENOENT, &[]),
            opcode::GETATTR | opcode::SETATTR => {
                if opcode == opcode::SETATTR && u32_at(body, 0) & SETS_SIZE != 0 {
                    let size = (u64_at(body, 16) as usize).min(MAX_FILE_SIZE);
                    self.data.resize(size, 0);
                }
                let mut answer = vec![0; 16];
                answer.extend(self.attributes(node));
                self.reply(unique, 0, &answer);
            }
            opcode::OPEN => {
                // A handle, and the flag FOPEN_DIRECT_IO.
                let mut answer = 1_u64.to_le_bytes().to_vec();
                answer.extend(1_u64.to_le_bytes());
                self.reply(unique, 0, &answer);
            }
            opcode::READ => {
                let start = (u64_at(body, 8) as usize).min(self.data.len());
                let end = (start + u32_at(body, 16) as usize).min(self.data.len());
                let bytes = self.data[start..end].to_vec();
                self.reply(unique, 0, &bytes);
            }
            opcode::WRITE | opcode::FSYNC if self.refuses.load(Ordering::SeqCst) => {
                self.reply(unique, -libc::EIO, &[]);
            }
            opcode::WRITE => {
                let (start, size) = (u64_at(body, 8) as usize, u32_at(body, 16) as usize);
                let end = start.saturating_add(size);
                if end > MAX_FILE_SIZE {
                    self.reply(unique, -libc::EFBIG, &[]);
                    return;
                }
                self.data.resize(self.data.len().max(end), 0);
                self.data[start..end].copy_from_slice(&body[40..40 + size]);
                self.reply(unique, 0, &(size as u64).to_le_bytes());
            }
            opcode::FSYNC | opcode::RELEASE => self.reply(unique, 0, &[]),
            opcode::FORGET | opcode::BATCH_FORGET => {}
            // That includes the flush of a file that is closed. It would hold up even a process that is
            // being killed.
            _ => self.reply(unique, -libc::ENOSYS, &[]),
        }
    }

    fn reply(&mut self, unique: u64, error: i32, body: &[u8]) {
        let mut answer = ((16 + body.len()) as u32).to_le_bytes().to_vec();
        answer.extend(error.to_le_bytes());
        answer.extend(unique.to_le_bytes());
        answer.extend(body);
        // It fails if the request has been interrupted.
        let _ = self.device.write(&answer);
    }

    /// The attributes of a node, as `struct fuse_attr`.
    fn attributes(&self, node: u64) -> Vec<u8> {
        let (mode, size) = match node {
            ROOT => (0o40755_u32, 0),
            _ => (0o100_644, self.data.len() as u64),
        };
        let mut bytes = Vec::new();
        for number in [node, size, size / 512, 0, 0, 0] {
            bytes.extend(number.to_le_bytes());
        }
        for number in [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0] {
            bytes.extend(number.to_le_bytes());
        }
        bytes
    }
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let bytes = bytes[offset..offset + 4].try_into();
    u32::from_le_bytes(bytes.expect("there are four"))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let bytes = bytes[offset..offset + 8].try_into();
    u64::from_le_bytes(bytes.expect("there are eight"))
}
