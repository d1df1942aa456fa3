//! Guest memory whose missing pages a program fills when they are touched (userfaultfd).

use std::fs::OpenOptions;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use vm_memory::GuestAddress;

use crate::{GuestMemory, Layer, PAGE_SIZE};

/// Gives descriptors to those who may open it, whatever [`SYSCTL`] says.
const DEVICE: &str = "/dev/userfaultfd";

// The interface of the kernel: include/uapi/linux/userfaultfd.h, userfaultfd(2), ioctl_userfaultfd(2).
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_aa01;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
const UFFD_EVENT_REMOVE: u8 = 0x15;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioCopy {
    destination: u64,
    source: u64,
    len: u64,
    mode: u64,
    /// Set by the kernel: bytes copied, or a negative error number.
    copied: i64,
}

#[repr(C)]
struct UffdioZeropage {
    range: UffdioRange,
    mode: u64,
    /// Set by the kernel: bytes made zero, or a negative error number.
    zeroed: i64,
}

/// `struct uffd_msg`, whose arguments depend on the event.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct UffdMessage {
    event: u8,
    reserved: [u8; 7],
    arguments: [u64; 3],
}

/// Messages that are read at once.
const MESSAGES: usize = 64;

/// Why missing pages of guest memory cannot be filled by a program.
#[derive(Debug, thiserror::Error)]
pub enum UserfaultError {
    /// The host lets this user have no userfaultfd.
    #[error(
        "this user may not create a userfaultfd: give it read and write access to {DEVICE}, or set sysctl \
         vm.unprivileged_userfaultfd=1"
    )]
    Forbidden,
    /// The host has no userfaultfd, or an older one than is needed.
    #[error(
        "cannot create a userfaultfd: {0}: the host's kernel must be Linux 4.14 or later with CONFIG_USERFAULTFD"
    )]
    Unavailable(#[source] io::Error),
    /// The host does not use it for this memory.
    #[error("cannot have page faults of guest memory reported: {0}")]
    Register(#[source] io::Error),
}

/// What has happened to memory whose missing pages a program fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryEvent {
    /// A thread, or a vCPU, waits for the page that has this byte.
    Missing(GuestAddress),
    /// The pages of `len` bytes from `start` on have been discarded. From now on they are zero, whatever they were.
    Discarded {
        /// First address.
        start: GuestAddress,
        /// Length in bytes.
        len: u64,
    },
}

/// What has become of an attempt to fill pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    /// So many bytes from the start on, whole pages, are there now.
    Bytes(usize),
    /// None: the first page was there already.
    Present,
    /// None: pages are being discarded. The events say which, and then it can be tried again.
    Discarding,
    /// None: the memory is not filled any more, as files were mapped in its place.
    Replaced,
}

/// The pages of guest memory that are still missing.
///
/// Whoever touches one waits until it is filled: with bytes, or with zeroes. The owner of this value, or another process that
/// has its descriptor, learns of that from events, and fills the page. If neither does, the thread waits without end, and only
/// [`MissingPages::give_up`] lets it go on. The owner itself must not touch pages that are missing.
#[derive(Debug)]
pub struct MissingPages {
    descriptor: OwnedFd,
    memory: Arc<GuestMemory>,
}

impl AsFd for MissingPages {
    /// Returns the userfaultfd, which is readable while there are events.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl MissingPages {
    /// Makes all pages of `memory`, which nothing has touched yet, missing. `content` has the files that they are to be filled
    /// from, in ascending order of addresses, with zeroes in between; it is empty if that is not known.
    ///
    /// # Errors
    /// If the host does not offer that, or not to this user.
    pub fn of(memory: Arc<GuestMemory>, content: &[Layer]) -> Result<Self, UserfaultError> {
        let pages = MissingPages {
            descriptor: open()?,
            memory,
        };
        // For each request of the kernel, the structure is the one that the request is defined with.
        let mut api = UffdioApi {
            api: UFFD_API,
            features: UFFD_FEATURE_EVENT_REMOVE,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes this structure only.
        unsafe { pages.request(UFFDIO_API, &raw mut api) }.map_err(UserfaultError::Unavailable)?;
        for region in pages.memory.regions() {
            let mut register = UffdioRegister {
                range: UffdioRange {
                    start: region.host_address,
                    len: region.len,
                },
                mode: UFFDIO_REGISTER_MODE_MISSING,
                ioctls: 0,
            };
            // SAFETY: the kernel reads and writes this structure. Nothing has touched the memory, so it does not matter to
            // anyone that its pages are not zero but missing.
            unsafe { pages.request(UFFDIO_REGISTER, &raw mut register) }
                .map_err(UserfaultError::Register)?;
        }
        pages.memory.note_missing(content);
        Ok(pages)
    }

    /// Returns the memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Takes events, a limited number, in the order in which they have happened. Empty if there is none.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn take_events(&self) -> io::Result<Vec<MemoryEvent>> {
        let mut messages = [UffdMessage::default(); MESSAGES];
        // SAFETY: the buffer has the size that is passed, and any bytes are valid messages.
        let result = unsafe {
            libc::read(
                self.descriptor.as_raw_fd(),
                messages.as_mut_ptr().cast(),
                size_of_val(&messages),
            )
        };
        let Ok(bytes) = usize::try_from(result) else {
            return match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(Vec::new()),
                error if error.kind() == io::ErrorKind::Interrupted => Ok(Vec::new()),
                error => Err(error),
            };
        };
        let messages = messages.iter().take(bytes / size_of::<UffdMessage>());
        Ok(messages.filter_map(|it| self.event(it)).collect())
    }

    fn event(&self, message: &UffdMessage) -> Option<MemoryEvent> {
        let [first, second, _] = message.arguments;
        match message.event {
            // The flags are first, which say nothing new.
            UFFD_EVENT_PAGEFAULT => self.guest_address(second).map(MemoryEvent::Missing),
            UFFD_EVENT_REMOVE => Some(MemoryEvent::Discarded {
                start: self.guest_address(first)?,
                len: second.checked_sub(first)?,
            }),
            _ => None,
        }
    }

    fn guest_address(&self, host_address: u64) -> Option<GuestAddress> {
        self.memory.regions().find_map(|region| {
            let offset = host_address.checked_sub(region.host_address)?;
            (offset < region.len).then(|| GuestAddress(region.start.0 + offset))
        })
    }

    /// Returns the host addresses of `len` bytes of one region.
    fn host_range(&self, start: GuestAddress, len: usize) -> io::Result<Range<u64>> {
        let pointer = self.memory.host_range(start, len);
        let pointer = pointer.ok_or(io::ErrorKind::InvalidInput)?;
        let first = pointer.as_ptr().addr() as u64;
        Ok(first..first + len as u64)
    }

    /// Fills missing pages from `start` on with `bytes`, whole pages of one region, and lets those go on who wait for them. A
    /// page that is not missing any more is left as it is.
    ///
    /// # Errors
    /// If the host has no memory, or the pages are not guest memory.
    pub fn fill(&self, start: GuestAddress, bytes: &[u8]) -> io::Result<Filled> {
        let pages = self.host_range(start, bytes.len())?;
        let mut copy = UffdioCopy {
            destination: pages.start,
            source: bytes.as_ptr().addr() as u64,
            len: bytes.len() as u64,
            mode: 0,
            copied: 0,
        };
        // SAFETY: the kernel reads `bytes`, and writes to pages of guest memory that nobody has seen yet, and to this
        // structure.
        let result = unsafe { self.request(UFFDIO_COPY, &raw mut copy) };
        self.filled(result, copy.copied, pages)
    }

    /// Makes `len` bytes of missing pages zero, in the same way.
    ///
    /// # Errors
    /// Those of [`MissingPages::fill`], or if the memory consists of huge pages, for which the host does not offer it.
    pub fn fill_with_zeroes(&self, start: GuestAddress, len: usize) -> io::Result<Filled> {
        let pages = self.host_range(start, len)?;
        let mut zeropage = UffdioZeropage {
            range: UffdioRange {
                start: pages.start,
                len: len as u64,
            },
            mode: 0,
            zeroed: 0,
        };
        // SAFETY: the kernel changes pages of guest memory that nobody has seen yet, and this structure.
        let result = unsafe { self.request(UFFDIO_ZEROPAGE, &raw mut zeropage) };
        self.filled(result, zeropage.zeroed, pages)
    }

    /// Tells what has become of an attempt to fill `pages`, given what the kernel has put into its structure.
    fn filled(&self, result: io::Result<()>, done: i64, pages: Range<u64>) -> io::Result<Filled> {
        if let Ok(bytes) = usize::try_from(done)
            && bytes > 0
        {
            return Ok(Filled::Bytes(bytes));
        }
        match result.err().and_then(|error| error.raw_os_error()) {
            Some(libc::EAGAIN) => Ok(Filled::Discarding),
            Some(libc::EEXIST) => {
                // Someone may wait for it who has seen that it was missing.
                self.wake(pages)?;
                Ok(Filled::Present)
            }
            Some(libc::ENOENT) => Ok(Filled::Replaced),
            Some(number) => Err(io::Error::from_raw_os_error(number)),
            None => Ok(Filled::Bytes((pages.end - pages.start) as usize)),
        }
    }

    /// Lets those go on who wait for the page at `address`, which is not missing any more.
    ///
    /// # Errors
    /// If it is not in guest memory.
    pub fn wake_at(&self, address: GuestAddress) -> io::Result<()> {
        self.wake(self.host_range(address, PAGE_SIZE)?)
    }

    fn wake(&self, pages: Range<u64>) -> io::Result<()> {
        let mut range = UffdioRange {
            start: pages.start,
            len: pages.end - pages.start,
        };
        // SAFETY: the kernel reads this structure only.
        unsafe { self.request(UFFDIO_WAKE, &raw mut range) }
    }

    /// Makes the pages that are still missing zero, as they are to be: all others have been filled.
    pub fn complete(&self) {
        self.memory.note_complete();
        self.unregister();
    }

    /// Gives up: their content cannot be had, so those who wait for missing pages find zeroes and go on. From now on,
    /// [`GuestMemory::is_lost`] is true.
    pub fn give_up(&self) {
        self.memory.note_lost();
        self.unregister();
        // Someone who discards pages waits until the event is taken.
        while self.take_events().is_ok_and(|events| !events.is_empty()) {}
    }

    fn unregister(&self) {
        for region in self.memory.regions() {
            let mut range = UffdioRange {
                start: region.host_address,
                len: region.len,
            };
            // SAFETY: the kernel reads this structure only. It fails for a region that files were mapped over, where no page
            // is missing.
            let _ = unsafe { self.request(UFFDIO_UNREGISTER, &raw mut range) };
        }
    }

    /// Makes a request of the kernel.
    ///
    /// # Safety
    /// `argument` must be the structure that the request takes, and the caller answers for what the kernel does with it.
    unsafe fn request<T>(&self, request: libc::c_ulong, argument: *mut T) -> io::Result<()> {
        let descriptor = self.descriptor.as_raw_fd();
        // SAFETY: the caller promises that the argument is that of the request.
        match unsafe { libc::ioctl(descriptor, request as _, argument) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }
}

/// Returns a new userfaultfd, which reports the faults of the kernel as well: those of KVM are.
fn open() -> Result<OwnedFd, UserfaultError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let of_device = OpenOptions::new().read(true).write(true).open(DEVICE);
    let result = match of_device {
        // SAFETY: the request takes flags, and returns a new descriptor.
        Ok(device) => unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW as _, flags) },
        // SAFETY: the call takes flags, and returns a new descriptor.
        Err(_) => unsafe { libc::syscall(libc::SYS_userfaultfd, flags) as libc::c_int },
    };
    if result >= 0 {
        // SAFETY: the descriptor is new, and nobody else has it.
        return Ok(unsafe { OwnedFd::from_raw_fd(result) });
    }
    Err(match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::PermissionDenied => UserfaultError::Forbidden,
        error => UserfaultError::Unavailable(error),
    })
}

#[cfg(test)]
mod tests;
