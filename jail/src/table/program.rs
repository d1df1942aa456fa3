//! What the program does besides its machine: it builds and ends machines, opens files, starts threads, and serves
//! clients.

use super::Rule::{self, Among, Bits, Call, ToItself};
use super::requests::*;

/// What makes a process, or a namespace, of a new thread.
const NAMESPACES: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u64;
/// What belongs to a thread.
const THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD) as u64;

/// Threads of the machine; no process.
pub(super) const THREADS: &[Rule] = &[
    Bits {
        call: libc::SYS_clone,
        argument: 0,
        set: THREAD,
        clear: NAMESPACES,
    },
    // Answered by an error.
    Call(libc::SYS_clone3),
    Call(libc::SYS_membarrier),
    // Filters of the threads that it starts.
    Call(libc::SYS_seccomp),
    Among(libc::SYS_prctl, 0, &[libc::PR_SET_NO_NEW_PRIVS as u64]),
];

/// Rings of devices; each is then restricted to its operations and files.
pub(super) const RINGS: &[Rule] = &[
    Call(libc::SYS_io_uring_setup),
    Call(libc::SYS_io_uring_register),
];

pub(super) const CALLS: &[Rule] = &[
    // Files.
    Call(libc::SYS_open),
    Call(libc::SYS_openat),
    Call(libc::SYS_stat),
    Call(libc::SYS_lstat),
    Call(libc::SYS_newfstatat),
    Call(libc::SYS_statx),
    Call(libc::SYS_statfs),
    Call(libc::SYS_fstatfs),
    Call(libc::SYS_access),
    Call(libc::SYS_faccessat),
    Call(libc::SYS_faccessat2),
    Call(libc::SYS_getcwd),
    Call(libc::SYS_readlink),
    Call(libc::SYS_readlinkat),
    Call(libc::SYS_getdents64),
    Call(libc::SYS_mkdir),
    Call(libc::SYS_mkdirat),
    Call(libc::SYS_rmdir),
    Call(libc::SYS_unlink),
    Call(libc::SYS_unlinkat),
    Call(libc::SYS_rename),
    Call(libc::SYS_renameat),
    Call(libc::SYS_renameat2),
    Call(libc::SYS_link),
    Call(libc::SYS_linkat),
    Call(libc::SYS_symlink),
    Call(libc::SYS_chmod),
    Call(libc::SYS_fchmod),
    Call(libc::SYS_fchmodat),
    Call(libc::SYS_umask),
    Call(libc::SYS_flock),
    Call(libc::SYS_sync_file_range),
    Call(libc::SYS_syncfs),
    Call(libc::SYS_sendfile),
    Call(libc::SYS_copy_file_range),
    Call(libc::SYS_splice),
    Call(libc::SYS_dup),
    Call(libc::SYS_dup2),
    Call(libc::SYS_dup3),
    Call(libc::SYS_pipe2),
    Call(libc::SYS_memfd_create),
    Among(
        libc::SYS_fcntl,
        1,
        &[
            libc::F_GETFD as u64,
            libc::F_SETFD as u64,
            libc::F_GETFL as u64,
            libc::F_SETFL as u64,
            libc::F_SETLK as u64,
            libc::F_GETLK as u64,
            libc::F_DUPFD_CLOEXEC as u64,
            libc::F_ADD_SEALS as u64,
            libc::F_GET_SEALS as u64,
            libc::F_GETPIPE_SZ as u64,
            libc::F_SETPIPE_SZ as u64,
        ],
    ),
    Among(
        libc::SYS_ioctl,
        1,
        &[
            TIOCGWINSZ,
            TIOCSWINSZ,
            TCGETS,
            TCSETS,
            TCSETSW,
            TCSETSF,
            TIOCGPTN,
            TIOCSPTLCK,
            TIOCGPTPEER,
            TIOCGPGRP,
            FIONBIO,
            FIONREAD,
            FICLONE,
            FICLONERANGE,
            BLKSSZGET,
            BLKPBSZGET,
            UFFDIO_API,
            UFFDIO_REGISTER,
            UFFDIO_WRITEPROTECT,
            USERFAULTFD_IOC_NEW,
        ],
    ),
    Call(libc::SYS_userfaultfd),
    // Clients.
    Call(libc::SYS_socketpair),
    Call(libc::SYS_bind),
    Call(libc::SYS_listen),
    Call(libc::SYS_accept),
    // To notice the end of a program that serves memory; nothing else can be done with the descriptor.
    Call(libc::SYS_pidfd_open),
    // Memory.
    Call(libc::SYS_msync),
    Call(libc::SYS_mincore),
    Call(libc::SYS_mlock),
    Call(libc::SYS_mbind),
    Call(libc::SYS_get_mempolicy),
    // Signals, time and limits.
    Call(libc::SYS_signalfd4),
    ToItself(libc::SYS_kill),
    Call(libc::SYS_getppid),
    Call(libc::SYS_getpgid),
    Call(libc::SYS_getpgrp),
    Call(libc::SYS_getuid),
    Call(libc::SYS_geteuid),
    Call(libc::SYS_getgid),
    Call(libc::SYS_getegid),
    Call(libc::SYS_getgroups),
    Call(libc::SYS_uname),
    Call(libc::SYS_sysinfo),
    Call(libc::SYS_times),
    Call(libc::SYS_getrusage),
    Call(libc::SYS_gettimeofday),
    Call(libc::SYS_clock_getres),
    Call(libc::SYS_sched_setaffinity),
    // Limits of this process, which are read and lowered.
    Among(libc::SYS_prlimit64, 0, &[0]),
];
