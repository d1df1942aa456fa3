//! The process beside a confined machine of root that takes its places on networks of the host: it executes `nft` and
//! `dnsmasq`, which the machine's own process cannot do.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::Context;
use bantam_vmm::config::MachineConfig;
use bantam_vmm::{PlaceKeeper, keep_network_places};
use nix::libc;
use nix::sys::prctl;
use nix::sys::signal::SigSet;
use nix::unistd::{ForkResult, Pid, dup2_stdin, dup2_stdout, fork, getpid, setpgid};

use crate::close_others;

/// Starts the process. It ends, and gives up what it has taken, when this one ends or drops the result. No other thread
/// may run.
///
/// # Errors
/// If the host is out of processes or descriptors.
pub fn start(config: &MachineConfig) -> anyhow::Result<PlaceKeeper> {
    let (keeper, socket) =
        PlaceKeeper::pair().context("cannot make the sockets of the process that takes places")?;
    let machine = getpid().as_raw().unsigned_abs();
    // SAFETY: this process has one thread, so no lock is held in the child by a thread that it lacks.
    let forked = unsafe { fork() };
    match forked.context("cannot start the process that takes places on networks")? {
        ForkResult::Parent { .. } => Ok(keeper),
        ForkResult::Child => {
            // Nothing that the caller has on its stack may be dropped here, not even by a panic.
            let kept = catch_unwind(AssertUnwindSafe(|| keep(config, machine, &socket)));
            let status = match kept {
                Ok(Ok(())) => 0,
                Ok(Err(error)) => {
                    tracing::error!("places on networks of the host are not kept: {error}");
                    1
                }
                Err(_) => 1,
            };
            // SAFETY: it does not return, and runs nothing of this process.
            unsafe { libc::_exit(status) }
        }
    }
}

/// Takes places until the machine's process has ended, however it ends.
fn keep(config: &MachineConfig, machine: u32, socket: &OwnedFd) -> io::Result<()> {
    // They are for the machine, which then gives up its places. If its whole process group is killed, this is done here.
    SigSet::all().thread_block()?;
    setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
    prctl::set_name(c"bantam-networks")?;
    close_others(&[socket.as_raw_fd()]);
    let null = File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    keep_network_places(config, machine, socket)
}
