//! What every thread may do: memory, waiting, transfers on open descriptors, its own end.

use super::Rule::{self, Among, Bits, Call, ToItself};

/// Nothing that is mapped from now on can be executed.
const EXECUTABLE: u64 = libc::PROT_EXEC as u64;

pub(super) const CALLS: &[Rule] = &[
    // Transfers on open descriptors.
    Call(libc::SYS_read),
    Call(libc::SYS_write),
    Call(libc::SYS_readv),
    Call(libc::SYS_writev),
    Call(libc::SYS_close),
    Call(libc::SYS_poll),
    Call(libc::SYS_ppoll),
    // A build with checks looks whether a descriptor is open before it is closed.
    Among(
        libc::SYS_fcntl,
        1,
        &[libc::F_GETFD as u64, libc::F_GETFL as u64],
    ),
    // Waiting.
    Call(libc::SYS_futex),
    Call(libc::SYS_clock_gettime),
    Call(libc::SYS_clock_nanosleep),
    Call(libc::SYS_nanosleep),
    Call(libc::SYS_restart_syscall),
    Call(libc::SYS_sched_yield),
    // Memory of the heap and of stacks.
    Call(libc::SYS_brk),
    Bits {
        call: libc::SYS_mmap,
        argument: 2,
        set: 0,
        clear: EXECUTABLE,
    },
    Bits {
        call: libc::SYS_mprotect,
        argument: 2,
        set: 0,
        clear: EXECUTABLE,
    },
    Call(libc::SYS_munmap),
    Call(libc::SYS_mremap),
    Call(libc::SYS_madvise),
    // Signals, of this process alone: a vCPU is kicked, a panic ends the process.
    Call(libc::SYS_rt_sigaction),
    Call(libc::SYS_rt_sigprocmask),
    Call(libc::SYS_rt_sigreturn),
    Call(libc::SYS_sigaltstack),
    ToItself(libc::SYS_tgkill),
    Call(libc::SYS_getpid),
    Call(libc::SYS_gettid),
    // Begin and end of a thread, and what it does once.
    Call(libc::SYS_exit),
    Call(libc::SYS_exit_group),
    Call(libc::SYS_rseq),
    Call(libc::SYS_set_robust_list),
    Call(libc::SYS_sched_getaffinity),
    Call(libc::SYS_getrandom),
    Among(
        libc::SYS_prctl,
        0,
        &[
            libc::PR_SET_NAME as u64,
            libc::PR_GET_NAME as u64,
            libc::PR_SET_VMA as u64,
        ],
    ),
];
