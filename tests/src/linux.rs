//! Linux guests.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::artefacts::target_folder;

/// How many Linux guests run at the same time. Each keeps a processor busy, and more guests than
/// processors would make each other exceed their time.
const SLOTS: usize = 2;
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// The right to run a Linux guest, shared with other test processes.
pub struct LinuxSlot {
    _lock: Flock<File>,
}

/// Waits for the right to run a Linux guest.
///
/// # Panics
///
/// If the locks cannot be used.
pub fn linux_slot() -> LinuxSlot {
    loop {
        for number in 0..SLOTS {
            let path = target_folder().join(format!("linux-guest-{number}.lock"));
            let file = File::create(&path)
                .unwrap_or_else(|error| panic!("cannot create '{}': {error}", path.display()));
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return LinuxSlot { _lock: lock },
                Err((_, Errno::EWOULDBLOCK)) => {}
                Err((_, error)) => panic!("cannot lock '{}': {error}", path.display()),
            }
        }
        thread::sleep(RETRY_INTERVAL);
    }
}

/// Makes a root file system of busybox in `folder` with these scripts, each a name and its text, the way
/// docs/ci.md does.
///
/// # Panics
///
/// If it cannot be made.
pub fn scripted_root(folder: &Path, scripts: &[(&str, &str)]) -> PathBuf {
    let (tree, image) = (folder.join("tree"), folder.join("root"));
    for name in ["bin", "dev", "etc", "proc"] {
        fs::create_dir_all(tree.join(name)).expect("there is room for temporary files");
    }
    fs::copy("/bin/busybox", tree.join("bin/busybox")).expect("there is busybox-static");
    for applet in [
        "dd", "ifconfig", "md5sum", "mount", "nc", "nslookup", "ping", "printf", "route", "sh",
        "sleep", "sync", "udhcpc", "wget",
    ] {
        symlink("busybox", tree.join("bin").join(applet))
            .expect("there is room for temporary files");
    }
    for (name, text) in scripts {
        let path = tree.join(name);
        fs::write(&path, text).expect("there is room for temporary files");
        fs::set_permissions(&path, Permissions::from_mode(0o755))
            .expect("there is room for temporary files");
    }
    let made = Command::new("/sbin/mke2fs")
        .args(["-q", "-t", "ext4", "-d"])
        .args([&tree, &image])
        .arg("8M")
        .status();
    assert!(made.expect("there is e2fsprogs").success());
    image
}

/// Returns the answer of the guest's test agent to `command`: the details after `ok`.
///
/// # Panics
///
/// If it did not answer `ok`.
#[track_caller]
pub fn answer(output: &str, command: &str) -> String {
    let prefix = format!("bantam: {command} ok");
    output
        .lines()
        .find_map(|line| line.trim_end().strip_prefix(&prefix))
        .unwrap_or_else(|| panic!("'{command}' failed or was not carried out:\n{output}"))
        .trim()
        .to_owned()
}
