//! What a guest that has taken over a thread of the monitor tries, in every role. Each attempt is made in a process of its
//! own, which is confined as the monitor is.

#![allow(clippy::unwrap_used, reason = "a test fails where the host does")]

use std::env;
use std::ffi::c_long;
use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::ptr;
use std::thread;

use bantam_jail::{Files, Filter, Networks, Role, Violation, process, report_violations};
use io_uring::{IoUring, opcode, types};
use nix::errno::Errno;

/// What says to a process of this test what it is to try.
const ROLE: &str = "BANTAM_TEST_ROLE";
const ATTEMPT: &str = "BANTAM_TEST_ATTEMPT";
const FOLDER: &str = "BANTAM_TEST_FOLDER";
const PORT: &str = "BANTAM_TEST_PORT";
/// What it prints if it has come through.
const DONE: &str = "it has come through";
/// What it prints before the error if the kernel has refused it.
const REFUSED: &str = "it was refused: ";

/// What the test and its processes agree on.
struct Place {
    /// Has the image of the machine, and a neighbour of it.
    folder: PathBuf,
    /// Where somebody listens.
    port: u16,
}

type Attempt = fn(&Place) -> io::Result<()>;

const ATTEMPTS: [(&str, Attempt); 22] = [
    ("read a file of the host", |_| {
        File::open("/etc/passwd").map(drop)
    }),
    ("write to a neighbour of the image", |place| {
        File::options()
            .append(true)
            .open(place.folder.join("neighbour"))
            .map(drop)
    }),
    ("create a file beside the image", |place| {
        File::create(place.folder.join("new")).map(drop)
    }),
    ("remove a neighbour of the image", |place| {
        fs::remove_file(place.folder.join("neighbour"))
    }),
    ("execute a program", |_| {
        Command::new("/bin/true").status().map(drop)
    }),
    ("execute a program in its place", |_| {
        let arguments = [c"/bin/true".as_ptr(), ptr::null()];
        // SAFETY: the list has an end.
        result(unsafe { libc::execv(c"/bin/true".as_ptr(), arguments.as_ptr()) }.into())
    }),
    ("start a process", |_| {
        // SAFETY: the child ends at once.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: it does not return.
            unsafe { libc::_exit(0) };
        }
        result(child.into())
    }),
    ("connect to a server", |place| {
        TcpStream::connect((Ipv4Addr::LOCALHOST, place.port)).map(drop)
    }),
    ("receive all frames", |_| {
        call(
            libc::SYS_socket,
            [
                c_long::from(libc::AF_PACKET),
                c_long::from(libc::SOCK_RAW),
                0,
                0,
            ],
        )
    }),
    ("trace another process", |_| {
        call(
            libc::SYS_ptrace,
            [c_long::from(libc::PTRACE_ATTACH), parent(), 0, 0],
        )
    }),
    ("read memory of another process", |_| {
        call(libc::SYS_process_vm_readv, [parent(), 0, 0, 0])
    }),
    ("end another process", |_| {
        call(
            libc::SYS_kill,
            [parent(), c_long::from(libc::SIGCONT), 0, 0],
        )
    }),
    ("mount a file system", |_| {
        // SAFETY: all texts have an end.
        result(
            unsafe {
                libc::mount(
                    c"none".as_ptr(),
                    c"/tmp".as_ptr(),
                    c"tmpfs".as_ptr(),
                    0,
                    ptr::null(),
                )
            }
            .into(),
        )
    }),
    ("load a program into the kernel", |_| {
        call(libc::SYS_bpf, [0, 0, 0, 0])
    }),
    ("load a module", |_| {
        call(libc::SYS_finit_module, [0, 0, 0, 0])
    }),
    ("use the kernel's keys", |_| {
        call(libc::SYS_keyctl, [0, -4, 0, 0])
    }),
    ("make a user namespace", |_| {
        call(
            libc::SYS_unshare,
            [c_long::from(libc::CLONE_NEWUSER), 0, 0, 0],
        )
    }),
    ("enter a namespace", |_| {
        call(libc::SYS_setns, [0, c_long::from(libc::CLONE_NEWNS), 0, 0])
    }),
    ("count events of the processor", |_| {
        call(libc::SYS_perf_event_open, [0, 0, -1, -1])
    }),
    ("open a file by io_uring", |_| {
        let mut ring = IoUring::new(2)?;
        let current = types::Fd(libc::AT_FDCWD);
        let open = opcode::OpenAt::new(current, c"/etc/passwd".as_ptr()).build();
        // SAFETY: the path is constant.
        unsafe { ring.submission().push(&open) }.map_err(io::Error::other)?;
        ring.submit_and_wait(1)?;
        let opened = ring.completion().next().map_or(-1, |entry| entry.result());
        match opened {
            0.. => Ok(()),
            error => Err(io::Error::from_raw_os_error(-error)),
        }
    }),
    ("make memory executable", |_| {
        let size = 4096;
        let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: this is new memory.
        let memory = unsafe { libc::mmap(ptr::null_mut(), size, protection, flags, -1, 0) };
        match memory == libc::MAP_FAILED {
            true => Err(io::Error::last_os_error()),
            false => Ok(()),
        }
    }),
    ("change the root of the file system", |_| {
        // SAFETY: the path has an end.
        result(unsafe { libc::chroot(c"/tmp".as_ptr()) }.into())
    }),
];

fn call(number: c_long, arguments: [c_long; 4]) -> io::Result<()> {
    let [a, b, c, d] = arguments;
    // SAFETY: pointers among the arguments are null, and all that a call could do is refused or harmless.
    result(unsafe { libc::syscall(number, a, b, c, d) })
}

fn result(result: c_long) -> io::Result<()> {
    Ok(Errno::result(result).map(drop)?)
}

fn parent() -> c_long {
    // SAFETY: it always succeeds.
    unsafe { libc::getppid() }.into()
}

/// Makes the attempt that the environment names, if this is a process of another test.
#[test]
fn an_attempt() {
    let (Ok(role), Ok(attempt)) = (env::var(ROLE), env::var(ATTEMPT)) else {
        return;
    };
    let role = Role::ALL.into_iter().find(|it| format!("{it:?}") == role);
    let attempts = ATTEMPTS.into_iter().chain(OTHER_ATTEMPTS);
    let (_, attempt) = { attempts }.find(|(name, _)| *name == attempt).unwrap();
    let place = Place {
        folder: env::var(FOLDER).unwrap().into(),
        port: env::var(PORT).unwrap().parse().unwrap(),
    };
    let confined = thread::Builder::new().name("taken-over".into());
    let confined = confined.spawn(move || {
        report_violations().unwrap();
        process::hide_memory().unwrap();
        let files = Files::none().write(place.folder.join("image"));
        files.confine().unwrap();
        let filter = |role| Filter::new(role, Networks::default(), Violation::Kill);
        filter(Role::Program).apply().unwrap();
        filter(role.unwrap()).apply().unwrap();
        match attempt(&place) {
            Ok(()) => println!("{DONE}"),
            Err(error) => println!("{REFUSED}{error}"),
        }
    });
    confined.unwrap().join().unwrap();
}

/// What the monitor does all the time.
const OTHER_ATTEMPTS: [(&str, Attempt); 1] = [("allocate memory and write", |_| {
    let bytes = vec![7_u8; 1 << 20];
    assert_eq!(
        bytes.iter().map(|&byte| u64::from(byte)).sum::<u64>(),
        7 << 20
    );
    Ok(())
})];

struct Setting {
    folder: tempfile::TempDir,
    listener: TcpListener,
}

impl Setting {
    fn new() -> Setting {
        let folder = tempfile::tempdir().unwrap();
        for name in ["image", "neighbour"] {
            fs::write(folder.path().join(name), "content").unwrap();
        }
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        Setting { folder, listener }
    }

    fn attempt(&self, role: Role, name: &str) -> Output {
        let port = self.listener.local_addr().unwrap().port();
        Command::new(env::current_exe().unwrap())
            .args(["an_attempt", "--exact", "--nocapture", "--test-threads=1"])
            .env(ROLE, format!("{role:?}"))
            .env(ATTEMPT, name)
            .env(FOLDER, self.folder.path())
            .env(PORT, port.to_string())
            .output()
            .unwrap()
    }
}

#[test]
fn a_thread_that_is_taken_over_comes_through_with_nothing() {
    let setting = Setting::new();
    for role in Role::ALL {
        for (name, _) in ATTEMPTS {
            let output = setting.attempt(role, name);
            let said = String::from_utf8_lossy(&output.stdout);
            let killed = output.status.signal() == Some(libc::SIGSYS);
            println!(
                "{role:?}: {name}: {}",
                if killed { "killed" } else { said.trim() }
            );
            assert!(
                killed || said.contains(REFUSED),
                "{role:?}: {name}: {output:?}"
            );
            assert!(!said.contains(DONE), "{role:?}: {name}: {said}");
        }
    }
}

#[test]
fn a_refused_call_is_reported_in_one_line() {
    let setting = Setting::new();
    let output = setting.attempt(Role::Vcpu, "execute a program in its place");
    let report = String::from_utf8_lossy(&output.stderr);
    assert!(
        report.contains("error: the thread 'taken-over' made the system call execve, which"),
        "{report}"
    );
    assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{output:?}");
}

#[test]
fn every_role_can_work() {
    let setting = Setting::new();
    for role in Role::ALL {
        let output = setting.attempt(role, "allocate memory and write");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains(DONE), "{role:?}: {output:?}");
        assert!(output.status.success(), "{role:?}: {output:?}");
    }
}
