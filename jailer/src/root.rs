//! The folder that is the root of a jailed monitor.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::{Gid, Uid, chdir, pivot_root};

use crate::Error;

/// The device files of a jail and their numbers (Documentation/admin-guide/devices.txt of Linux).
const DEVICES: [(&str, u64, u64); 3] = [
    ("/dev/net/tun", MISCELLANEOUS, 200),
    ("/dev/kvm", MISCELLANEOUS, 232),
    ("/dev/urandom", 1, 9),
];
/// The device file that makes userfaultfds, for memory of a snapshot that another process serves.
const FAULT_DEVICE: &str = "/dev/userfaultfd";
/// The major number of devices whose minor numbers drivers ask for one by one.
const MISCELLANEOUS: u64 = 10;
/// The folders of a jail, which are the monitor's.
const FOLDERS: [&str; 4] = ["/", "/dev", "/dev/net", "/run"];

/// The folder, before it is the root.
#[derive(Debug)]
pub(crate) struct Root(PathBuf);

impl Root {
    pub(crate) fn new(folder: PathBuf) -> Root {
        Root(folder)
    }

    /// Makes the folder, if it does not exist.
    pub(crate) fn make(&self) -> Result<(), Error> {
        let made = fs::create_dir_all(&self.0);
        made.map_err(Error::file("make the folder", &self.0))
    }

    /// Copies the monitor, so that it shares no memory with others.
    pub(crate) fn copy_monitor(&self, monitor: &Path, name: &str) -> Result<(), Error> {
        let mut source = File::open(monitor).map_err(Error::file("open", monitor))?;
        let metadata = source.metadata().map_err(Error::file("open", monitor))?;
        if !metadata.is_file() {
            let reason = io::Error::other("it is not a file");
            return Err(Error::file("copy", monitor)(reason));
        }
        let copy = self.0.join(name);
        let written = new_file(&copy, 0o755).and_then(|mut file| io::copy(&mut source, &mut file));
        written.map(drop).map_err(Error::file("write", copy))
    }

    /// Makes the folder the root of this process, in a mount namespace that has nothing else.
    pub(crate) fn enter(&self) -> Result<(), Error> {
        let nothing = None::<&str>;
        unshare(CloneFlags::CLONE_NEWNS).map_err(Error::process("make a mount namespace"))?;
        // What is mounted here must not appear outside, and the root cannot be changed while mounts are shared.
        let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        mount(nothing, "/", nothing, private, nothing)
            .map_err(Error::process("make the mounts private"))?;
        let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(&self.0), &self.0, nothing, bind, nothing)
            .map_err(Error::file("mount", &self.0))?;
        chdir(&self.0).map_err(Error::file("enter", &self.0))?;
        // The former root is then mounted above the new one, in the same place (pivot_root(2)).
        pivot_root(".", ".").map_err(Error::process("change the root"))?;
        umount2(".", MntFlags::MNT_DETACH).map_err(Error::process("unmount the former root"))?;
        chdir("/").map_err(Error::process("enter the new root"))
    }
}

/// Makes a file that no other process has open, in place of one that there may be. A link of that name is not followed.
fn new_file(path: &Path, mode: u32) -> io::Result<File> {
    remove(path)?;
    let file = OpenOptions::new().write(true).create_new(true).open(path)?;
    file.set_permissions(Permissions::from_mode(mode))?;
    Ok(file)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Returns the minor number of the device that makes userfaultfds, if the host has it.
pub(crate) fn userfaultfd_number() -> Option<u64> {
    let devices = fs::read_to_string("/proc/misc").ok()?;
    let mut lines = devices.lines().map(str::split_whitespace);
    lines.find_map(|mut fields| {
        let number = fields.next()?.parse().ok()?;
        (fields.next()? == "userfaultfd").then_some(number)
    })
}

/// Makes the folders and device files that a monitor needs, in the root of this process, which is the jail's.
pub(crate) fn furnish(owner: (Uid, Gid), fault_device: Option<u64>) -> Result<(), Error> {
    for folder in FOLDERS.map(Path::new) {
        match DirBuilder::new().mode(0o700).create(folder) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                return Err(Error::file("make the folder", folder)(error));
            }
            _ => own(folder, owner)?,
        }
    }
    let fault_device = fault_device.map(|number| (FAULT_DEVICE, MISCELLANEOUS, number));
    for (path, major, minor) in DEVICES.into_iter().chain(fault_device) {
        let path = Path::new(path);
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        remove(path).map_err(Error::file("remove", path))?;
        mknod(path, SFlag::S_IFCHR, mode, makedev(major, minor))
            .map_err(Error::file("make the device file", path))?;
        own(path, owner)?;
    }
    Ok(())
}

fn own(path: &Path, (uid, gid): (Uid, Gid)) -> Result<(), Error> {
    lchown(path, Some(uid.as_raw()), Some(gid.as_raw()))
        .map_err(Error::file("change the owner of", path))
}

/// Writes the PID of the monitor into the jail.
pub(crate) fn write_pid(name: &str, pid: i32) -> Result<(), Error> {
    let path = Path::new("/").join(format!("{name}.pid"));
    let written = new_file(&path, 0o644).and_then(|mut file| write!(file, "{pid}"));
    written.map_err(Error::file("write", path))
}
