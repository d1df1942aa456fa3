//! A thread as a jail may leave it to a vCPU, for tests.

use std::mem::offset_of;
use std::{ptr, thread};

use libc::{
    BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP,
    SECCOMP_MODE_FILTER, SECCOMP_RET_ALLOW, SECCOMP_RET_KILL_PROCESS, SYS_io_uring_setup,
    seccomp_data, sock_filter, sock_fprog,
};

/// Runs `act` on a thread that may not make an io_uring. If it does all the same, the kernel kills the
/// process by `SIGSYS`.
pub fn without_io_uring_setup<R: Send>(act: impl FnOnce() -> R + Send) -> R {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            forbid_io_uring_setup();
            act()
        });
        thread.join().unwrap()
    })
}

fn forbid_io_uring_setup() {
    let instruction = |code: u32, jt, jf, k| sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let call = offset_of!(seccomp_data, nr) as u32;
    let mut filter = [
        instruction(BPF_LD | BPF_W | BPF_ABS, 0, 0, call),
        instruction(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, SYS_io_uring_setup as u32),
        instruction(BPF_RET | BPF_K, 0, 0, SECCOMP_RET_KILL_PROCESS),
        instruction(BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW),
    ];
    let program = sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: both calls change what this thread alone may do. The second copies the program, which is
    // alive, and the instructions that it points to.
    let results = unsafe {
        [
            libc::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
            libc::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ptr::from_ref(&program)),
        ]
    };
    assert_eq!(results, [0; 2], "{}", std::io::Error::last_os_error());
}
