//! A program that serves the memory of a machine, in the protocol of Firecracker.
//!
//! A test file that uses it has a test of its own for the process, which [`PageServer::start`] starts:
//!
//! ```ignore
//! #[test]
//! #[ignore = "it is the process of a page server"]
//! fn page_server() {
//!     bantam_tests::page_server::serve();
//! }
//! ```

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::Pid;
use serde::Deserialize;

const SOCKET: &str = "PAGE_SERVER_SOCKET";
const MEMORY: &str = "PAGE_SERVER_MEMORY";
const CONDUCT: &str = "PAGE_SERVER_CONDUCT";

/// How a page server behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conduct {
    /// It serves all pages.
    Serves,
    /// The same, but it closes the connection when it has taken the request.
    HangsUp,
    /// The same, but it sends much that nobody has asked for.
    Talks,
    /// It takes the request, and fills no page.
    Takes,
    /// It accepts no connection.
    Ignores,
}

const CONDUCTS: [Conduct; 5] = [
    Conduct::Serves,
    Conduct::HangsUp,
    Conduct::Talks,
    Conduct::Takes,
    Conduct::Ignores,
];

/// A page server in a process of its own, which ends with this.
pub struct PageServer(Child);

impl PageServer {
    /// Starts a server that listens on `socket` and has the memory file at `memory`.
    ///
    /// # Panics
    /// If it does not listen in time.
    pub fn start(socket: &Path, memory: &Path, conduct: Conduct) -> PageServer {
        let program = std::env::current_exe().expect("this program has a name");
        let child = Command::new(program)
            .args(["--exact", "page_server", "--ignored", "--nocapture"])
            .env(SOCKET, socket)
            .env(MEMORY, memory)
            .env(CONDUCT, format!("{conduct:?}"))
            .stdout(Stdio::null())
            .spawn()
            .expect("this program can be started again");
        let server = PageServer(child);
        let deadline = Instant::now() + Duration::from_secs(20);
        while !socket.exists() {
            assert!(Instant::now() < deadline, "the page server does not listen");
            thread::sleep(Duration::from_millis(1));
        }
        server
    }

    /// Sends it a signal: `SIGSTOP` makes it stall, `SIGKILL` ends it.
    ///
    /// # Panics
    /// If it has been waited for.
    pub fn signal(&self, signal: Signal) {
        let process = Pid::from_raw(self.0.id() as i32);
        kill(process, signal).expect("it is a child of this process");
    }
}

impl Drop for PageServer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Region {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: u64,
    page_size_kib: u64,
}

/// Is a page server, as the environment says. Returns when its client has ended.
///
/// # Panics
/// If its client does not keep to the protocol.
pub fn serve() {
    let variable = |name| std::env::var_os(name);
    let (Some(socket), Some(memory), Some(conduct)) =
        (variable(SOCKET), variable(MEMORY), variable(CONDUCT))
    else {
        return;
    };
    // A test that is killed leaves nothing behind.
    // SAFETY: the call takes integers only.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let is_named = |it: &&Conduct| conduct == *format!("{it:?}");
    let conduct = *CONDUCTS.iter().find(is_named).expect("it is a conduct");
    // It has its name when it can be connected to, which is after its file is there.
    let bound = Path::new(&socket).with_extension("bound");
    let listener = UnixListener::bind(&bound).expect("the socket is free");
    fs::rename(bound, socket).expect("the socket has a place");
    if conduct == Conduct::Ignores {
        loop {
            thread::park();
        }
    }
    let memory = File::open(memory).expect("there is a memory file");
    let (mut connection, _) = listener.accept().expect("a client connects");
    let (regions, pages) = take_request(&connection);
    match conduct {
        Conduct::Takes => loop {
            thread::park();
        },
        Conduct::HangsUp => drop(connection),
        Conduct::Talks => {
            connection.set_nonblocking(true).expect("sockets can be");
            while connection.write(&[0xa5; 1 << 16]).is_ok() {}
            fill_pages(&regions, &pages, &memory, Some(&connection));
            return;
        }
        Conduct::Serves | Conduct::Ignores => {
            fill_pages(&regions, &pages, &memory, Some(&connection));
            return;
        }
    }
    fill_pages(&regions, &pages, &memory, None);
}

fn take_request(connection: &UnixStream) -> (Vec<Region>, OwnedFd) {
    let mut body = [0; 4096];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let mut vectors = [IoSliceMut::new(&mut body)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(
        connection.as_raw_fd(),
        &mut vectors,
        Some(&mut space),
        flags,
    );
    let message = message.expect("a request comes");
    let len = message.bytes;
    let rights = message.cmsgs().expect("the space is enough").next();
    let Some(ControlMessageOwned::ScmRights(descriptors)) = rights else {
        panic!("a descriptor comes with the request");
    };
    // SAFETY: the kernel has just made this descriptor, and nobody else has it.
    let pages = unsafe { OwnedFd::from_raw_fd(descriptors[0]) };
    let regions: Vec<Region> =
        serde_json::from_slice(&body[..len]).expect("the request is a list of regions");
    for region in &regions {
        assert_eq!(region.page_size, region.page_size_kib);
    }
    (regions, pages)
}

/// `struct uffd_msg` of the kernel.
#[repr(C)]
#[derive(Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    arguments: [u64; 3],
}

/// `struct uffdio_copy` and `struct uffdio_zeropage`, which is shorter.
#[repr(C)]
struct Fill {
    destination: u64,
    source_or_len: u64,
    len_or_mode: u64,
    mode_or_result: u64,
    result: u64,
}

const PAGE_FAULT: u8 = 0x12;
const REMOVE: u8 = 0x15;
const COPY: libc::c_ulong = 0xc028_aa03;
const ZEROPAGE: libc::c_ulong = 0xc020_aa04;

/// Fills pages until the client has closed `connection`, or, without, until its process has ended.
fn fill_pages(regions: &[Region], pages: &OwnedFd, memory: &File, connection: Option<&UnixStream>) {
    let mut removed = HashSet::new();
    loop {
        let mut fds = vec![PollFd::new(pages.as_fd(), PollFlags::POLLIN)];
        fds.extend(connection.map(|it| PollFd::new(it.as_fd(), PollFlags::empty())));
        poll(&mut fds, PollTimeout::from(1000_u16)).expect("descriptors can be waited for");
        if fds.get(1).is_some_and(|fd| fd.any() == Some(true)) {
            return;
        }
        let mut message = Message::default();
        // SAFETY: the buffer has the size that is passed, and any bytes are a message.
        let read = unsafe {
            let len = size_of::<Message>();
            libc::read(pages.as_raw_fd(), (&raw mut message).cast(), len)
        };
        if read <= 0 {
            continue;
        }
        match message.event {
            PAGE_FAULT => {
                let address = message.arguments[1];
                let region = regions.iter().find(|region| {
                    (region.base_host_virt_addr..region.base_host_virt_addr + region.size)
                        .contains(&address)
                });
                let region = region.expect("the fault is in a region");
                let page = address & !(region.page_size - 1);
                let offset = region.offset + (page - region.base_host_virt_addr);
                fill(pages, memory, page, offset, region.page_size, &removed);
            }
            REMOVE => {
                let [start, end, _] = message.arguments;
                removed.extend((start..end).step_by(4096));
            }
            other => panic!("event {other:#x}"),
        }
    }
}

fn fill(
    pages: &OwnedFd,
    memory: &File,
    page: u64,
    offset: u64,
    page_size: u64,
    removed: &HashSet<u64>,
) {
    let mut content = vec![0; page_size as usize];
    let is_removed = removed.contains(&page);
    if !is_removed {
        memory
            .read_exact_at(&mut content, offset)
            .expect("the memory file has the page");
    }
    let (request, mut fill) = match is_removed && page_size == 4096 {
        true => (
            ZEROPAGE,
            Fill {
                destination: page,
                source_or_len: page_size,
                len_or_mode: 0,
                mode_or_result: 0,
                result: 0,
            },
        ),
        false => (
            COPY,
            Fill {
                destination: page,
                source_or_len: content.as_ptr().addr() as u64,
                len_or_mode: page_size,
                mode_or_result: 0,
                result: 0,
            },
        ),
    };
    loop {
        // SAFETY: the structure begins with the one that the request takes, and the content outlives the call. It changes
        // memory of the client, which has asked for that.
        let result = unsafe { libc::ioctl(pages.as_raw_fd(), request as _, &raw mut fill) };
        if result == 0 {
            return;
        }
        match io::Error::last_os_error().raw_os_error() {
            // A discard is under way.
            Some(libc::EAGAIN) => thread::yield_now(),
            // It is there already, or the client has ended.
            _ => return,
        }
    }
}
