//! What threads of a machine do besides what every thread does.

use super::Rule::{self, Among, Bits, Call};
use super::requests::*;

/// A vCPU: it raises interrupts and wakes event loops, by events that are there already.
pub(super) const VCPU: &[Rule] = &[
    Call(libc::SYS_epoll_ctl),
    Call(libc::SYS_timerfd_create),
    Call(libc::SYS_timerfd_settime),
    Call(libc::SYS_eventfd2),
    Call(libc::SYS_rt_sigtimedwait),
    Among(libc::SYS_prlimit64, 0, &[0]),
    Among(libc::SYS_fcntl, 1, &[libc::F_DUPFD_CLOEXEC as u64]),
    // A driver that sets up or resets its network card.
    Among(
        libc::SYS_ioctl,
        1,
        &[TUNSETOFFLOAD, TUNSETTXFILTER, TUNSETQUEUE],
    ),
];

/// Devices: an event loop, and transfers on descriptors that are open.
pub(super) const DEVICES: &[Rule] = &[
    Call(libc::SYS_epoll_create1),
    Call(libc::SYS_epoll_ctl),
    Call(libc::SYS_epoll_wait),
    Call(libc::SYS_epoll_pwait),
    Call(libc::SYS_eventfd2),
    Call(libc::SYS_timerfd_create),
    Call(libc::SYS_timerfd_settime),
    Call(libc::SYS_accept4),
    Call(libc::SYS_recvfrom),
    Call(libc::SYS_recvmsg),
    Call(libc::SYS_recvmmsg),
    Call(libc::SYS_sendto),
    Call(libc::SYS_sendmsg),
    Call(libc::SYS_sendmmsg),
    Call(libc::SYS_shutdown),
    Call(libc::SYS_getsockopt),
    Call(libc::SYS_setsockopt),
    Call(libc::SYS_getsockname),
    Call(libc::SYS_getpeername),
    Among(
        libc::SYS_ioctl,
        1,
        &[
            TUNSETOFFLOAD,
            TUNSETTXFILTER,
            TUNSETQUEUE,
            TIOCOUTQ,
            FIONBIO,
        ],
    ),
    Among(
        libc::SYS_fcntl,
        1,
        &[
            // The last output of a machine has room in the pipe of a reader that does not read.
            libc::F_GETPIPE_SZ as u64,
            libc::F_SETPIPE_SZ as u64,
            // The client of a channel has a descriptor for each direction.
            libc::F_DUPFD_CLOEXEC as u64,
        ],
    ),
];

/// Images of disks.
pub(super) const IMAGE: &[Rule] = &[
    Call(libc::SYS_pread64),
    Call(libc::SYS_pwrite64),
    Call(libc::SYS_preadv),
    Call(libc::SYS_pwritev),
    Call(libc::SYS_preadv2),
    Call(libc::SYS_pwritev2),
    Call(libc::SYS_lseek),
    Call(libc::SYS_fsync),
    Call(libc::SYS_fdatasync),
    Call(libc::SYS_fallocate),
    Call(libc::SYS_ftruncate),
    Call(libc::SYS_fstat),
    Call(libc::SYS_newfstatat),
    Call(libc::SYS_statx),
    Call(libc::SYS_io_uring_enter),
    Among(libc::SYS_io_uring_register, 1, &[UNREGISTER_FILES]),
    Call(libc::SYS_eventfd2),
    Among(libc::SYS_ioctl, 1, &[BLKGETSIZE64, BLKDISCARD, BLKZEROOUT]),
    Among(
        libc::SYS_fcntl,
        1,
        &[
            libc::F_GETFL as u64,
            libc::F_OFD_SETLK as u64,
            libc::F_OFD_GETLK as u64,
        ],
    ),
];

/// Files of images that a job reads, writes or has made in vain.
pub(super) const JOB: &[Rule] = &[
    Call(libc::SYS_openat),
    Call(libc::SYS_unlink),
    Call(libc::SYS_copy_file_range),
    Among(
        libc::SYS_fcntl,
        1,
        &[libc::F_SETFL as u64, libc::F_DUPFD_CLOEXEC as u64],
    ),
    Among(libc::SYS_ioctl, 1, &[BLKSSZGET, BLKPBSZGET]),
];

/// The memory of a snapshot, which userfaultfd asks for.
pub(super) const MEMORY: &[Rule] = &[
    Call(libc::SYS_pread64),
    Call(libc::SYS_preadv),
    Call(libc::SYS_lseek),
    Call(libc::SYS_fstat),
    Call(libc::SYS_statx),
    Call(libc::SYS_fadvise64),
    Call(libc::SYS_readahead),
    Call(libc::SYS_mincore),
    Call(libc::SYS_recvmsg),
    Call(libc::SYS_recvfrom),
    Among(
        libc::SYS_ioctl,
        1,
        &[
            UFFDIO_COPY,
            UFFDIO_ZEROPAGE,
            UFFDIO_WAKE,
            UFFDIO_CONTINUE,
            UFFDIO_UNREGISTER,
            // Whether the program that serves memory has read what it was sent.
            TIOCOUTQ,
        ],
    ),
];

/// The connection of gdb.
pub(super) const DEBUGGER: &[Rule] = &[
    Call(libc::SYS_accept4),
    Call(libc::SYS_recvfrom),
    Call(libc::SYS_sendto),
    Call(libc::SYS_getsockname),
    Call(libc::SYS_setsockopt),
    Call(libc::SYS_shutdown),
    Among(libc::SYS_ioctl, 1, &[FIONBIO]),
];

/// Unix sockets.
pub(super) const UNIX_SOCKETS: &[Rule] = &[
    Among(libc::SYS_socket, 0, &[libc::AF_UNIX as u64]),
    Call(libc::SYS_connect),
];

/// Sockets of IP.
pub(super) const IP_SOCKETS: &[Rule] = &[
    Among(
        libc::SYS_socket,
        0,
        &[libc::AF_INET as u64, libc::AF_INET6 as u64],
    ),
    Call(libc::SYS_bind),
    Call(libc::SYS_listen),
    Call(libc::SYS_connect),
];

/// The name servers of the host, whose file a user network reads again when it has changed.
pub(super) const NAME_SERVERS: &[Rule] = &[Bits {
    call: libc::SYS_openat,
    argument: 2,
    set: 0,
    clear: (libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC) as u64,
}];

/// The files of sockets, which are removed under a lock.
pub(super) const SOCKET_FILES: &[Rule] = &[
    Call(libc::SYS_openat),
    Call(libc::SYS_flock),
    Call(libc::SYS_statx),
    Call(libc::SYS_unlink),
];

/// Interfaces of the host: taps, and what netlink says about them.
pub(super) const INTERFACES: &[Rule] = &[
    Among(
        libc::SYS_socket,
        0,
        &[libc::AF_INET as u64, libc::AF_NETLINK as u64],
    ),
    Among(
        libc::SYS_ioctl,
        1,
        &[
            TUNSETIFF,
            TUNSETOWNER,
            TUNGETIFF,
            TUNGETVNETHDRSZ,
            TUNSETVNETHDRSZ,
            SIOCGIFINDEX,
            SIOCGIFFLAGS,
            SIOCSIFFLAGS,
            SIOCGIFMTU,
            SIOCSIFMTU,
        ],
    ),
    Call(libc::SYS_bind),
];

/// The network namespace of a tap.
pub(super) const NAMESPACE: &[Rule] = &[Among(libc::SYS_setns, 1, &[libc::CLONE_NEWNET as u64])];
