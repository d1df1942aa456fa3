// SPDX-License-Identifier: Apache-2.0

//! An interactive shell on the console.

use std::fs::{self, OpenOptions};
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::console::say;
use crate::error::{Context, Result};
use crate::power::Ending;
use crate::sys::{self, Signals};

/// Runs a shell, and returns how the guest has to end once the shell has exited or one of busybox's
/// commands `poweroff`, `halt` and `reboot` has sent the first process its signal.
pub fn run() -> Result<Ending> {
    for folder in [c"/tmp", c"/run"] {
        // A shell is useful without them.
        if let Err(error) = sys::mount(c"tmpfs", folder) {
            say(format_args!(
                "bantam: mount {}: {error}",
                folder.to_string_lossy()
            ));
        }
    }
    fs::write("/proc/sys/kernel/hostname", "bantam").context("set the host name")?;

    say(format_args!(
        "To leave the guest, type poweroff, or press Ctrl-A and then x."
    ));
    // The kernel gave the first process a file that no longer has a name.
    let console = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/console")
        .context("open the console")?;
    let copy = || console.try_clone().context("open the console");
    let mut shell = Command::new("/bin/busybox");
    shell
        .arg0("-sh")
        .stdin(copy()?)
        .stdout(copy()?)
        .stderr(copy()?)
        .envs([
            ("HOME", "/root"),
            ("PATH", "/sbin:/bin"),
            ("TERM", "vt102"),
            ("USER", "root"),
        ])
        .current_dir("/root");
    let signals = Signals::hold_back(&[libc::SIGCHLD, libc::SIGTERM, libc::SIGUSR1, libc::SIGUSR2])
        .context("hold back signals")?;
    let shell = sys::spawn_on_terminal(&mut shell).context("start /bin/busybox sh")?;
    loop {
        match signals.next().context("wait for a signal")? {
            libc::SIGTERM => return Ok(Ending::Restart),
            libc::SIGUSR1 | libc::SIGUSR2 => return Ok(Ending::PowerOff),
            _ => {
                while let Some(child) = sys::ended_child() {
                    if child == shell.id() {
                        return Ok(Ending::PowerOff);
                    }
                }
            }
        }
    }
}
