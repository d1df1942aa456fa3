//! Linux guests.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use bantam_vmm::config::{DiskConfig, MachineConfig};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::artefacts::{Kernel, RootFileSystem, target_folder};
use crate::{after_random_work, check_image, pattern, qemu_img};

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

/// A Linux guest that works on a disk with four processors and four queues, and whose work the host knows.
pub struct BusyLinux {
    folder: PathBuf,
    seed: u64,
    operations: u32,
    size: usize,
}

impl BusyLinux {
    /// How long the guest may take to boot, and then to do its work.
    pub const LIMIT: Duration = Duration::from_secs(400);

    /// Makes the image of its disk in `folder`, of `size` bytes, by `qemu-img convert` with these options. Each of the guest's
    /// threads takes a number of steps.
    ///
    /// # Panics
    /// If there is no room.
    pub fn new(
        folder: &Path,
        options: &[&str],
        size: usize,
        seed: u64,
        operations: u32,
    ) -> BusyLinux {
        let guest = BusyLinux {
            folder: folder.to_path_buf(),
            seed,
            operations,
            size,
        };
        let raw = folder.join("raw");
        fs::write(&raw, pattern(seed, 0, size)).expect("there is room");
        let convert = [&["convert", "-f", "raw", "-O", "qcow2"], options].concat();
        qemu_img(&convert, &[&raw, &guest.image()]);
        guest
    }

    /// Returns the path of its image.
    pub fn image(&self) -> PathBuf {
        self.folder.join("disk.qcow2")
    }

    /// Returns the command of its work.
    pub fn work(&self) -> String {
        format!("disk-verify-random:vda:{}:{}", self.seed, self.operations)
    }

    /// Returns the configuration of its machine. It executes `others` while it works, each after a `&`, and is there until the
    /// test ends it.
    ///
    /// # Panics
    /// If there is no kernel.
    pub fn config(&self, others: &str) -> MachineConfig {
        let mut config = MachineConfig::new(Kernel::Full.vmlinux());
        config.initrd = Some(RootFileSystem::new().initrd);
        config.cpus = 4.try_into().expect("it is not zero");
        let commands = format!("{}{others},sleep:600000", self.work());
        // Complaints of Linux are warnings at least.
        config.append = Some(format!(
            "loglevel=5 bantam.mode=test bantam.test={commands}"
        ));
        let option = format!("{},queues=4", self.image().display());
        config.disks = vec![option.parse::<DiskConfig>().expect("it is a disk")];
        config
    }

    /// Waits until what the guest has printed, which `text` returns, says that it has begun.
    ///
    /// # Panics
    /// If it does not.
    pub fn wait_until_it_works(text: impl Fn() -> String) {
        let started = Instant::now();
        while !text().contains("bantam: disks are open") {
            assert!(
                started.elapsed() < Self::LIMIT,
                "the guest does not begin: {}",
                text()
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Checks that the disk in `image`, which may have grown, is what the work leaves.
    ///
    /// # Panics
    /// If it is not.
    pub fn check_disk(&self, image: &Path) {
        check_image(image, false);
        let result = self.folder.join("result");
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw"], &[image, &result]);
        let found = fs::read(&result).expect("it was made");
        // The guest has seen blocks of 512 bytes.
        let expected = after_random_work(self.seed, self.operations, 512, self.size);
        let wrong = found.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "the byte there");
        assert!(found.len() >= self.size);
        assert!(found[self.size..].iter().all(|&byte| byte == 0));
    }
}

/// Makes a root file system of busybox in `folder` with these scripts, each a name and its text, the way
/// docs/ci.md does, and with the test agent as `agent`.
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
    fs::copy(RootFileSystem::new().agent, tree.join("bin/agent"))
        .expect("there is room for temporary files");
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

/// Makes a qcow2 image `disk.qcow2` in `folder` of this file system, with partitions like those of Debian's images for
/// clouds: the first one has the root file system and is the last on the disk.
///
/// # Panics
///
/// If it cannot be made.
pub fn partitioned_image(folder: &Path, file_system: &Path) -> PathBuf {
    const MIB: u64 = 1 << 20;
    const PARTITIONS: &str = "label: gpt\n\
        14: start=1MiB, size=1MiB, type=21686148-6449-6E6F-744E-656564454649\n\
        15: start=2MiB, size=2MiB, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B\n\
        1: start=4MiB, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709\n";
    let (raw, image) = (folder.join("disk.raw"), folder.join("disk.qcow2"));
    let content = File::open(file_system).expect("there is a file system");
    let size = content.metadata().expect("it is a file").len();
    let disk = File::create(&raw).expect("there is room for temporary files");
    // The second table is in the last MiB.
    disk.set_len(size + 5 * MIB).expect("there is room");
    let mut sfdisk = Command::new("/sbin/sfdisk")
        .args(["--quiet", "--no-reread", "--no-tell-kernel"])
        .arg(&raw)
        .stdin(Stdio::piped())
        .spawn()
        .expect("there is fdisk");
    let mut script = sfdisk.stdin.take().expect("it is piped");
    script
        .write_all(PARTITIONS.as_bytes())
        .expect("sfdisk reads it");
    drop(script);
    assert!(sfdisk.wait().expect("it is a child").success());
    // Keeps the holes.
    let copied = Command::new("dd")
        .args(["bs=1M", "seek=4", "conv=sparse,notrunc", "status=none"])
        .arg(format!("if={}", file_system.display()))
        .arg(format!("of={}", raw.display()))
        .status();
    assert!(copied.expect("there is dd").success());
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2"], &[&raw, &image]);
    fs::remove_file(raw).expect("it was made");
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
