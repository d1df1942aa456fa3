//! The process that becomes a jailed monitor.

use std::convert::Infallible;
use std::ffi::{CString, NulError, OsStr, OsString};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::sched::{CloneFlags, setns, unshare};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{
    ForkResult, Gid, Pid, Uid, dup2_stderr, dup2_stdin, dup2_stdout, execve, fork, getpid, setgid,
    setgroups, setsid, setuid,
};

use crate::{Error, Jailer, root};

/// When the jailer was started, from where the metrics of the monitor count.
#[derive(Debug)]
pub(crate) struct Times {
    monotonic: Duration,
    cpu: Duration,
}

impl Times {
    pub(crate) fn now() -> Times {
        Times {
            monotonic: read(ClockId::CLOCK_MONOTONIC),
            cpu: cpu_time(),
        }
    }
}

/// Returns the CPU time of this process.
fn cpu_time() -> Duration {
    read(ClockId::CLOCK_PROCESS_CPUTIME_ID)
}

/// Reads a clock that every kernel has.
fn read(clock: ClockId) -> Duration {
    clock_gettime(clock).map(Duration::from).unwrap_or_default()
}

/// Closes all descriptors except the standard ones.
pub(crate) fn close_descriptors() {
    // SAFETY: the call takes only integers. This process has just begun, and no object has such a descriptor.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
}

pub(crate) fn open_namespace(path: &Path) -> Result<File, Error> {
    File::open(path).map_err(Error::file("open the network namespace", path))
}

pub(crate) fn join(namespace: &File) -> Result<(), Error> {
    let joined = setns(namespace, CloneFlags::CLONE_NEWNET);
    joined.map_err(Error::process("join the network namespace"))
}

pub(crate) fn open_null() -> Result<File, Error> {
    let null = File::options().read(true).write(true).open("/dev/null");
    null.map_err(Error::file("open", "/dev/null"))
}

/// Goes on in a process with a session of its own and no terminal, and ends this one. Returns the CPU time of the processes
/// that have ended.
pub(crate) fn become_daemon(null: &File) -> Result<Duration, Error> {
    // The leader of a process group cannot begin a session, and the leader of a session can get a terminal.
    let first = go_on_in_child()?;
    setsid().map_err(Error::process("begin a session"))?;
    let second = go_on_in_child()?;
    for redirected in [dup2_stdin(null), dup2_stdout(null), dup2_stderr(null)] {
        redirected.map_err(Error::process("redirect the standard streams"))?;
    }
    Ok(first + second)
}

/// Goes on in a child of this process, which ends. Returns its CPU time.
fn go_on_in_child() -> Result<Duration, Error> {
    let spent = cpu_time();
    match start_child()? {
        Some(_) => end(),
        None => Ok(spent),
    }
}

/// Starts a child. Returns its PID, or nothing in the child.
fn start_child() -> Result<Option<Pid>, Error> {
    // SAFETY: this process has one thread, so no lock is held in the child by a thread that it lacks.
    match unsafe { fork() }.map_err(Error::process("start a process"))? {
        ForkResult::Parent { child } => Ok(Some(child)),
        ForkResult::Child => Ok(None),
    }
}

fn end() -> ! {
    // SAFETY: it does not return. Nothing of this process is to be dropped or written, as the child goes on with it.
    unsafe { libc::_exit(0) }
}

/// Becomes the monitor, or starts it and ends. `spent` is the CPU time of processes that have ended.
pub(crate) fn run(
    jailer: &Jailer,
    name: &str,
    (uid, gid): (Uid, Gid),
    times: &Times,
    mut spent: Duration,
) -> Result<Infallible, Error> {
    if jailer.new_pid_namespace {
        unshare(CloneFlags::CLONE_NEWPID).map_err(Error::process("make a PID namespace"))?;
        let own = cpu_time();
        if let Some(monitor) = start_child()? {
            root::write_pid(name, monitor.as_raw())?;
            end();
        }
        spent += own;
    } else {
        root::write_pid(name, getpid().as_raw())?;
    }
    setgroups(&[]).map_err(Error::process("leave the groups of root"))?;
    setgid(gid).map_err(Error::process("change the group"))?;
    setuid(uid).map_err(Error::process("change the user"))?;

    let path = Path::new("/").join(name);
    let arguments = arguments(jailer, &path, times, spent)
        .map_err(|_| Error::process("pass an argument that has a zero byte")(Errno::EINVAL))?;
    let no_environment: [CString; 0] = [];
    execve(&arguments[0], &arguments, &no_environment).map_err(Error::file("execute", path))
}

/// Returns the arguments of the monitor, which begin with its path.
fn arguments(
    jailer: &Jailer,
    path: &Path,
    times: &Times,
    spent: Duration,
) -> Result<Vec<CString>, NulError> {
    let own = [
        format!("--id={}", jailer.id),
        format!("--start-time-us={}", times.monotonic.as_micros()),
        format!("--start-time-cpu-us={}", times.cpu.as_micros()),
        format!("--parent-cpu-time-us={}", spent.as_micros()),
    ];
    let others = jailer.arguments.iter().map(OsString::as_os_str);
    let all = [path.as_os_str()]
        .into_iter()
        .chain(own.iter().map(OsStr::new))
        .chain(others);
    all.map(|it| CString::new(it.as_bytes())).collect()
}
