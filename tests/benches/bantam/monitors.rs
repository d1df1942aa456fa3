//! The monitors that are compared, started on the same guest.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use bantam_vmm::host::{Virtualization, virtualization};
use bantam_vmm::workarounds::guest_kernel_parameters;

/// The monitor that Bantam is compared with.
pub const PEER: &str = "QEMU microvm";

const QEMU: &str = "qemu-system-x86_64";

/// Kernel parameters without which Linux does not get to its first process on a host without
/// hardware virtualization, under any monitor.
const NEEDED_WORDS: &str = "clearcpuid=popcnt,cx16,smap,fsgsbase,rdrand,rdseed,xsave \
     tsc=reliable no_timer_check";

/// One of the monitors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Monitor {
    /// Bantam.
    Bantam,
    /// The peer.
    Qemu,
    /// The peer, with all kernel parameters that Bantam adds on this host.
    QemuWithBantamsWords,
}

impl Monitor {
    /// The two that are compared, in the order in which they take turns.
    pub const BOTH: [Self; 2] = [Self::Bantam, Self::Qemu];
}

/// A guest with one vCPU and its serial port on standard output.
#[derive(Debug, Clone, Default)]
pub struct Guest {
    /// ELF image.
    pub kernel: PathBuf,
    /// Kernel command line, to which monitor and host add their words.
    pub command_line: String,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// A virtio-blk disk.
    pub disk: Option<Disk>,
    /// Disks that the guest does not use, read-only, for Bantam alone.
    pub idle_disks: Vec<PathBuf>,
    /// What a virtio-net device is connected to.
    pub network: Option<Network>,
    /// Whether the monitor logs which pages change, for Bantam alone.
    pub tracks_dirty_pages: bool,
}

/// What a virtio-net device is connected to.
#[derive(Debug, Clone)]
pub enum Network {
    /// The tap interface of this name; the peer takes only one that exists.
    Tap(String),
    /// The monitor's own network without rights: `user`, and slirp of the peer.
    User,
    /// The program that listens on this socket: passt.
    Passt(PathBuf),
    /// The host's own network by address translation, for Bantam alone.
    Nat,
}

/// A virtio-blk disk.
#[derive(Debug, Clone)]
pub struct Disk {
    /// The image.
    pub image: PathBuf,
    /// Its format.
    pub format: &'static str,
    /// How a monitor reads and writes it.
    pub access: DiskAccess,
    /// Further options, for Bantam alone.
    pub options: &'static str,
}

/// How a monitor reads and writes a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskAccess {
    /// By each monitor's defaults.
    Default,
    /// Through the page cache, as fast as each monitor can: the peer by io_uring in an I/O thread.
    Cached,
    /// Past the page cache (`O_DIRECT`), as fast as each monitor can.
    Direct,
}

/// The paths of the monitors.
pub struct Monitors {
    bantam: PathBuf,
    qemu_version: String,
    virtualization: Virtualization,
    folder: PathBuf,
}

impl Monitors {
    /// Finds the monitors: Bantam at the path in `BANTAM_BIN`, or else a release build in cargo's
    /// target folder, preferably that of `make build`. `folder` is for files of the benchmarks.
    ///
    /// # Panics
    ///
    /// If one of them is missing.
    pub fn find(target_folder: &Path, folder: &Path) -> Self {
        let bantam = env::var_os("BANTAM_BIN").map_or_else(
            || {
                let static_build = target_folder.join("x86_64-unknown-linux-gnu/release/bantam");
                if static_build.is_file() {
                    static_build
                } else {
                    target_folder.join("release/bantam")
                }
            },
            PathBuf::from,
        );
        assert!(
            bantam.is_file(),
            "there is no '{}': run 'make bench', or name the program in BANTAM_BIN",
            bantam.display()
        );
        Self {
            bantam,
            qemu_version: qemu_version(),
            virtualization: virtualization(),
            folder: folder.to_owned(),
        }
    }

    /// Returns the name of the peer with its version.
    pub fn peer_name(&self) -> String {
        format!("QEMU {} microvm", self.qemu_version)
    }

    /// Describes the programs that are compared, and the host.
    pub fn description(&self) -> String {
        let cpus = thread::available_parallelism().map_or(0, usize::from);
        let host = match self.virtualization {
            Virtualization::Vmx => "VT-x",
            Virtualization::Svm => "AMD-V",
            Virtualization::Pvm | Virtualization::None => "no hardware virtualization",
        };
        format!(
            "{} beside {}; host with {cpus} CPUs, {host}",
            self.bantam.display(),
            self.peer_name()
        )
    }

    /// Returns the path of the program `bantam`.
    pub fn bantam(&self) -> &Path {
        &self.bantam
    }

    /// Returns a folder for files of the benchmarks.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns the command that runs `guest` under `monitor`.
    pub fn command(&self, monitor: Monitor, guest: &Guest) -> Command {
        match monitor {
            Monitor::Bantam => self.bantam_command(guest),
            Monitor::Qemu => self.qemu_command(guest, NEEDED_WORDS),
            Monitor::QemuWithBantamsWords => {
                self.qemu_command(guest, &guest_kernel_parameters().unwrap_or_default())
            }
        }
    }

    fn bantam_command(&self, guest: &Guest) -> Command {
        let mut command = Command::new(&self.bantam);
        command.arg("run").arg("--kernel").arg(&guest.kernel);
        command.args(["--cmdline", &guest.command_line]);
        command.args(["--memory", &format!("{}M", guest.memory_mib)]);
        // The peer's machine has none.
        command.args(["--rng", "off"]);
        if let Some(disk) = &guest.disk {
            let mut value = disk.image.clone().into_os_string();
            if disk.access == DiskAccess::Direct {
                value.push(",cache=none");
            }
            value.push(format!(",format={}", disk.format));
            value.push(disk.options);
            command.arg("--disk").arg(value);
        }
        for image in &guest.idle_disks {
            let mut value = image.clone().into_os_string();
            value.push(",ro");
            command.arg("--disk").arg(value);
        }
        if let Some(network) = &guest.network {
            command.arg("--net").arg(match network {
                Network::Tap(tap) => format!("tap={tap}"),
                Network::User => "user".to_owned(),
                Network::Passt(socket) => format!("passt={}", socket.display()),
                Network::Nat => "nat".to_owned(),
            });
        }
        if guest.tracks_dirty_pages {
            command.args(["--track-dirty-pages", "on"]);
        }
        command
    }

    /// Returns the command of the leanest machine that runs the guest, with `words` for its kernel
    /// if the host requires any.
    fn qemu_command(&self, guest: &Guest, words: &str) -> Command {
        let mut command_line = guest.command_line.clone();
        let mut cpu = "host";
        if guest_kernel_parameters().is_some() {
            command_line = format!("{command_line} {words}");
            // QEMU 7.2 ends when it cannot set the MSR of this feature.
            cpu = "host,-arch-capabilities";
        }
        let mut command = Command::new(QEMU);
        command.args([
            "-machine",
            "microvm,x-option-roms=off,isa-serial=on,rtc=off,acpi=off,pit=off,pic=off",
            "-enable-kvm",
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
        ]);
        command.args(["-display", "none", "-serial", "stdio", "-cpu", cpu]);
        command.args(["-m", &guest.memory_mib.to_string()]);
        command.arg("-kernel").arg(&guest.kernel);
        command.args(["-append", &command_line]);
        // Its threads have names only on request.
        command.args(["-name", "guest,debug-threads=on"]);
        command.args(["-global", "virtio-mmio.force-legacy=false"]);
        if let Some(disk) = &guest.disk {
            let path = disk.image.to_str().expect("the benchmarks chose the name");
            let format = disk.format;
            let drive = format!("id=disk,file={path},format={format},if=none");
            let (drive, device) = match disk.access {
                DiskAccess::Default => (drive, "virtio-blk-device,drive=disk"),
                DiskAccess::Cached | DiskAccess::Direct => {
                    command.args(["-object", "iothread,id=io"]);
                    let cache = if disk.access == DiskAccess::Direct {
                        "cache=writeback,cache.direct=on"
                    } else {
                        "cache=writeback"
                    };
                    (
                        format!("{drive},aio=io_uring,{cache}"),
                        "virtio-blk-device,drive=disk,iothread=io",
                    )
                }
            };
            command.args(["-drive", &drive, "-device", device]);
        }
        if let Some(network) = &guest.network {
            let netdev = match network {
                Network::Tap(tap) => {
                    format!("tap,id=net,ifname={tap},script=no,downscript=no,vhost=off")
                }
                Network::User => "user,id=net".to_owned(),
                Network::Passt(socket) => {
                    let path = socket.display();
                    format!("stream,id=net,server=off,addr.type=unix,addr.path={path}")
                }
                Network::Nat => panic!("the peer has no such network"),
            };
            command.args(["-netdev", &netdev]);
            command.args(["-device", "virtio-net-device,netdev=net"]);
        }
        command
    }
}

fn qemu_version() -> String {
    let output = Command::new(QEMU)
        .arg("--version")
        .output()
        .unwrap_or_else(|error| {
            panic!("cannot run {QEMU}: {error}; try: apt-get install qemu-system-x86")
        });
    let text = String::from_utf8_lossy(&output.stdout);
    // "QEMU emulator version 7.2.22 (Debian ...)".
    let version = text.split_whitespace().nth(3);
    version.unwrap_or("of unknown version").to_owned()
}
