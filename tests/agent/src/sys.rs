// SPDX-License-Identifier: Apache-2.0

//! System calls without a function in the standard library: all the unsafe code of the agent.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::Duration;

use crate::error::{Context, Result};

/// Linux's limit on the name of a network interface, with the terminating zero.
const INTERFACE_NAME_SIZE: usize = 16;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Mounts a file system that needs no device, unless it is mounted already.
pub fn mount(kind: &CStr, target: &CStr) -> io::Result<()> {
    // SAFETY: every pointer is to a string that outlives the call, or null where that is allowed.
    let result = unsafe {
        libc::mount(
            kind.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    match check(result) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(()),
        other => other.map(drop),
    }
}

/// Makes the root file system read-only, which leaves it marked as cleanly unmounted.
pub fn remount_root_read_only() -> io::Result<()> {
    let flags = libc::MS_REMOUNT | libc::MS_RDONLY;
    let none = std::ptr::null();
    // SAFETY: the target is a string constant; a remount reads no other string.
    check(unsafe { libc::mount(none, c"/".as_ptr(), none, flags, none.cast()) }).map(drop)
}

pub fn sync() {
    // SAFETY: takes no arguments and always succeeds.
    unsafe { libc::sync() };
}

#[derive(Clone, Copy)]
pub enum Reboot {
    PowerOff,
    Restart,
}

/// Returns only if the kernel refuses.
pub fn reboot(how: Reboot) -> io::Error {
    let command = match how {
        Reboot::PowerOff => libc::RB_POWER_OFF,
        Reboot::Restart => libc::RB_AUTOBOOT,
    };
    // SAFETY: takes a number. Nothing in memory is worth keeping at this point.
    unsafe { libc::reboot(command) };
    io::Error::last_os_error()
}

/// Makes Ctrl-Alt-Del send the first process SIGINT, instead of restarting the machine.
pub fn take_ctrl_alt_del() -> io::Result<()> {
    // SAFETY: takes a number.
    check(unsafe { libc::reboot(libc::RB_DISABLE_CAD) }).map(drop)
}

/// System name, node name, release, version and machine, as `uname -a` prints them.
pub fn uname() -> io::Result<String> {
    let mut name = MaybeUninit::<libc::utsname>::zeroed();
    // SAFETY: the pointer is to a buffer of the right type.
    check(unsafe { libc::uname(name.as_mut_ptr()) })?;
    // SAFETY: all bit patterns are valid, and the call has filled it in.
    let name = unsafe { name.assume_init() };
    let fields = [
        &name.sysname,
        &name.nodename,
        &name.release,
        &name.version,
        &name.machine,
    ];
    Ok(fields.map(|field| text(field)).join(" "))
}

fn text(field: &[libc::c_char]) -> String {
    let bytes = field
        .iter()
        .map(|&c| c as u8)
        .take_while(|&c| c != 0)
        .collect::<Vec<_>>();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Starts a program as the leader of a new session, with its standard input as the controlling
/// terminal.
pub fn spawn_on_terminal(command: &mut Command) -> io::Result<Child> {
    let become_session_leader = || {
        // SAFETY: both calls take numbers only, and may be made between fork and exec.
        unsafe {
            check(libc::setsid())?;
            check(libc::ioctl(libc::STDIN_FILENO, libc::TIOCSCTTY, 0))?;
        }
        Ok(())
    };
    // SAFETY: the function makes two system calls and does not allocate.
    unsafe { command.pre_exec(become_session_leader) };
    command.spawn()
}

/// Signals that are queued to be read, instead of having their usual effect.
pub struct Signals(libc::sigset_t);

impl Signals {
    pub fn hold_back(signals: &[libc::c_int]) -> io::Result<Self> {
        let mut set = MaybeUninit::zeroed();
        // SAFETY: the pointer is to a buffer of the right type, which the first call fills in.
        let set = unsafe {
            check(libc::sigemptyset(set.as_mut_ptr()))?;
            for &signal in signals {
                check(libc::sigaddset(set.as_mut_ptr(), signal))?;
            }
            check(libc::sigprocmask(
                libc::SIG_BLOCK,
                set.as_ptr(),
                std::ptr::null_mut(),
            ))?;
            set.assume_init()
        };
        Ok(Self(set))
    }

    /// Waits for the next one.
    pub fn next(&self) -> io::Result<libc::c_int> {
        // SAFETY: the pointers are to a set of signals, and null where that is allowed.
        check(unsafe { libc::sigwaitinfo(&self.0, std::ptr::null_mut()) })
    }
}

/// Returns the id of a child that has ended, if there is one: one of its own, or an orphan that the
/// first process has inherited.
pub fn ended_child() -> Option<u32> {
    // SAFETY: a null pointer says that the status is not wanted.
    let child = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) };
    u32::try_from(child).ok().filter(|&child| child != 0)
}

/// Reads random bytes from the kernel's generator; if it is not seeded yet, this is an error and
/// does not wait.
pub fn random(buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the pointer and the length are those of one buffer.
    let count = unsafe {
        libc::getrandom(
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            libc::GRND_NONBLOCK,
        )
    };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Waits until one of the files is readable. Returns `false` if the time is over first.
pub fn wait_readable(files: &[File], timeout: Duration) -> io::Result<bool> {
    let mut entries: Vec<_> = files
        .iter()
        .map(|file| libc::pollfd {
            fd: file.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    let milliseconds = timeout.as_millis().try_into().unwrap_or(libc::c_int::MAX);
    // SAFETY: the pointer and the count are those of one vector.
    let ready = check(unsafe {
        libc::poll(
            entries.as_mut_ptr(),
            entries.len() as libc::nfds_t,
            milliseconds,
        )
    })?;
    Ok(ready > 0)
}

/// A terminal that passes every byte on unchanged, until this is dropped.
pub struct RawTerminal<'a> {
    terminal: BorrowedFd<'a>,
    before: libc::termios,
}

impl<'a> RawTerminal<'a> {
    pub fn new(terminal: BorrowedFd<'a>) -> io::Result<Self> {
        let mut settings = MaybeUninit::<libc::termios>::zeroed();
        // SAFETY: the pointer is to a buffer of the right type.
        check(unsafe { libc::tcgetattr(terminal.as_raw_fd(), settings.as_mut_ptr()) })?;
        // SAFETY: all bit patterns are valid, and the call has filled it in.
        let before = unsafe { settings.assume_init() };
        let mut raw = before;
        // SAFETY: the pointer is to settings that the kernel has filled in.
        unsafe { libc::cfmakeraw(&mut raw) };
        set_terminal(terminal, &raw)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for RawTerminal<'_> {
    fn drop(&mut self) {
        // A terminal that is gone need not be restored.
        let _ = set_terminal(self.terminal, &self.before);
    }
}

fn set_terminal(terminal: BorrowedFd<'_>, settings: &libc::termios) -> io::Result<()> {
    // SAFETY: the pointer is to settings that outlive the call.
    check(unsafe { libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, settings) }).map(drop)
}

#[derive(Clone, Copy)]
pub enum BlockRange {
    Discard,
    ZeroOut,
}

/// Discards or zeroes part of a block device.
pub fn block_range(disk: &File, what: BlockRange, offset: u64, length: u64) -> io::Result<()> {
    let request = match what {
        BlockRange::Discard => libc::_IO(0x12, 119),
        BlockRange::ZeroOut => libc::_IO(0x12, 127),
    };
    let range = [offset, length];
    // SAFETY: both requests read two 64-bit numbers.
    check(unsafe { libc::ioctl(disk.as_raw_fd(), request, range.as_ptr()) }).map(drop)
}

/// Drops the kernel's cache of a block device, so that the next read asks the device.
pub fn forget_cached_blocks(disk: &File) -> io::Result<()> {
    // SAFETY: the request takes no argument.
    check(unsafe { libc::ioctl(disk.as_raw_fd(), libc::_IO(0x12, 97), 0) }).map(drop)
}

/// A socket for ICMP messages: sent without an IP header, received with one.
pub fn icmp_socket() -> io::Result<UdpSocket> {
    // The standard library's UDP socket works for any datagram socket.
    inet_socket(libc::SOCK_RAW, libc::IPPROTO_ICMP).map(UdpSocket::from)
}

/// A socket for requests about network interfaces.
pub fn control_socket() -> io::Result<OwnedFd> {
    inet_socket(libc::SOCK_DGRAM, 0)
}

fn inet_socket(kind: libc::c_int, protocol: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only.
    let socket =
        check(unsafe { libc::socket(libc::AF_INET, kind | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

/// Connects to a port of the host.
pub fn vsock_connect(port: u32) -> io::Result<OwnedFd> {
    let socket = vsock_socket()?;
    let address = vsock_address(libc::VMADDR_CID_HOST, port);
    // SAFETY: the address is readable for the given number of bytes.
    check(unsafe {
        libc::connect(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    })?;
    Ok(socket)
}

/// Listens to a port for connections of the host, with a backlog.
pub fn vsock_listen(port: u32, backlog: u32) -> io::Result<OwnedFd> {
    let socket = vsock_socket()?;
    let address = vsock_address(libc::VMADDR_CID_ANY, port);
    // SAFETY: as in `vsock_connect`.
    check(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    })?;
    // SAFETY: takes numbers only.
    check(unsafe { libc::listen(socket.as_raw_fd(), backlog as libc::c_int) })?;
    Ok(socket)
}

/// Accepts a connection of a listening socket.
pub fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    let none = std::ptr::null_mut();
    // SAFETY: no address is asked for.
    let socket = check(unsafe {
        libc::accept4(listener.as_raw_fd(), none, none.cast(), libc::SOCK_CLOEXEC)
    })?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

fn vsock_socket() -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only.
    let socket =
        check(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

fn vsock_address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: it consists of integers, all of which may be zero.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

/// `struct ifreq`: a name, and 24 bytes whose meaning depends on the request.
#[repr(C, align(8))]
struct InterfaceRequest {
    name: [u8; INTERFACE_NAME_SIZE],
    value: [u8; 24],
}

impl InterfaceRequest {
    fn new(interface: &str, value: &[u8]) -> io::Result<Self> {
        if interface.len() >= INTERFACE_NAME_SIZE {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut request = Self {
            name: [0; INTERFACE_NAME_SIZE],
            value: [0; 24],
        };
        request.name[..interface.len()].copy_from_slice(interface.as_bytes());
        request.value[..value.len()].copy_from_slice(value);
        Ok(request)
    }

    fn send(&mut self, socket: &OwnedFd, request: libc::c_ulong) -> io::Result<()> {
        // SAFETY: requests about interfaces read and write one `struct ifreq`.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw mut *self) }).map(drop)
    }
}

/// Gives an interface its IPv4 address and network mask.
pub fn set_interface_address(
    socket: &OwnedFd,
    interface: &str,
    address: [u8; 4],
    mask: [u8; 4],
) -> Result<()> {
    for (request, value, doing) in [
        (libc::SIOCSIFADDR, address, "set the address"),
        (libc::SIOCSIFNETMASK, mask, "set the network mask"),
    ] {
        // `struct sockaddr_in`: family, port, address.
        let mut name = [0; 8];
        name[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
        name[4..].copy_from_slice(&value);
        InterfaceRequest::new(interface, &name)
            .and_then(|mut interface| interface.send(socket, request))
            .context(format_args!("{doing} of {interface}"))?;
    }
    Ok(())
}

pub fn bring_interface_up(socket: &OwnedFd, interface: &str) -> Result<()> {
    let flags = (libc::IFF_UP | libc::IFF_RUNNING) as u16;
    InterfaceRequest::new(interface, &flags.to_ne_bytes())
        .and_then(|mut interface| interface.send(socket, libc::SIOCSIFFLAGS))
        .context(format_args!("bring {interface} up"))
}

/// Reads one of ethtool's values from the driver of an interface.
pub fn ethtool_value(socket: &OwnedFd, interface: &str, command: u32) -> io::Result<u32> {
    // `struct ethtool_value`: command, answer.
    let mut value = [command, 0];
    // The kernel finds the numbers by an address inside the request.
    let address = (&raw mut value).expose_provenance() as u64;
    InterfaceRequest::new(interface, &address.to_ne_bytes())?.send(socket, libc::SIOCETHTOOL)?;
    // SAFETY: the array still lives; the kernel may have changed it behind the compiler's back.
    Ok(unsafe { (&raw const value[1]).read_volatile() })
}

/// Returns standard input without the standard library's buffer.
pub fn standard_input() -> io::Result<File> {
    io::stdin().as_fd().try_clone_to_owned().map(File::from)
}
