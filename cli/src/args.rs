//! The command line: its options, their help, and the machine they describe.

mod machine;

use std::os::fd::RawFd;
use std::path::PathBuf;

use bantam_api::bodies::logger::LogLevel;
use bantam_vmm::config::{
    ChannelName, ConfigError, DiskConfig, GuestCid, MachineTable, NetConfig, Seccomp, SerialConfig,
    ShutdownTimeout,
};
use clap::{ArgAction, Parser, Subcommand};
use clap_complete::Shell;
use tracing::level_filters::LevelFilter;

use crate::control::ControlArgs;
use crate::ends::{self, Replacement};
use crate::fork::ForkArgs;
use crate::image::ImageArgs;
use crate::migrate::MigrateArgs;
use crate::named::NamedCommand;
use crate::network::NetworkArgs;
use crate::restore::{self, MemorySource};
use crate::snapshot::SnapshotArgs;
use crate::virsh::VirshArgs;
pub use machine::MachineArgs;
use machine::{choice, heading, switch};

/// Runs virtual machines on KVM.
#[derive(Debug, Parser)]
#[command(name = "bantam", version, max_term_width = 100)]
#[command(
    after_help = "Exit status: that of `run` tells what became of the guest, see `bantam run --help`. Of the \
                  others: 0 when all went well, 1 with a line of reason otherwise."
)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

// The options of one command only are built, as those of all take time and memory.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub enum Command {
    /// Boots a machine and stays until it ends
    ///
    /// Boots a Linux kernel, or another kernel that can be entered in the same way, in a machine of
    /// its own and stays until the machine ends. Options come from the command line, from a machine
    /// file (--config), or from both; the command line wins.
    Run(Box<RunArgs>),
    /// Serves an API by which clients put a machine together, start it and change it
    ///
    /// The API is that of Firecracker, version 1.17, on a Unix socket: programs that drive Firecracker
    /// drive Bantam. It stays until the machine ends. Started under the name firecracker, Bantam takes
    /// the same options without a command. See docs/api.md.
    Api(Box<ApiArgs>),
    /// Controls a machine that runs: pauses it, asks for its state, ends it
    ///
    /// Sends a command to the control socket of a machine, which it has if it was started with --control, and
    /// prints the answer. The exit status is 0 if the machine has done what it was asked for. See
    /// docs/control.md.
    Control(Box<ControlArgs>),
    /// Shows whether this host can run machines, and what to do if it cannot
    ///
    /// Looks for KVM and what Bantam needs of it, and for what disks and networks make use of.
    /// Each line of the table says what was found; if something is missing, a line below it
    /// says what to do. The exit status is 0 if machines can run here and 1 if they cannot.
    Check,
    /// Starts a machine from a snapshot, and stays until it ends
    ///
    /// The machine goes on from where another was when its snapshot was taken. What it uses of the host can be
    /// other than it was: images, taps, sockets. Exit status and keys are those of bantam run. See
    /// docs/snapshots.md. A directory that bantam save has written is that of a named machine: without options
    /// for another machine, that one is started from there, in the background.
    Restore(Box<RestoreArgs>),
    /// Starts machines that go on from where another is
    ///
    /// The machine goes on. Each child is a process in the background, with overlays of its own of the disks.
    /// They share the memory that none of them has written since. See docs/snapshots.md.
    Fork(Box<ForkArgs>),
    /// Moves a machine to another process or host while it runs
    ///
    /// Its guest stands still for some milliseconds. `bantam migrate --receive ADDRESS` waits for the machine at the other
    /// end, and then runs it as bantam restore would. See docs/migration.md.
    Migrate(Box<MigrateArgs>),
    /// Takes snapshots of machines, and examines and merges them
    Snapshot(Box<SnapshotArgs>),
    #[command(flatten)]
    Named(NamedCommand),
    /// Shows the CPUs and the memory of this host
    Nodeinfo,
    /// Takes command lines of virsh for named machines
    ///
    /// It has virsh's options, tables and messages, so that scripts for virsh go on working. Started under the name
    /// virsh, Bantam takes the same commands. `bantam virsh help` lists them. See docs/virsh.md.
    Virsh(VirshArgs),
    /// Defines, starts and stops networks of the host for machines
    ///
    /// Networks with addresses, names and a way out for machines on them (--net nat, hostonly, network=NAME). They
    /// take root. See docs/networks.md.
    Network(Box<NetworkArgs>),
    /// Creates, converts and examines disk images
    ///
    /// Takes the command lines of qemu-img, and gives its output and its exit status. Started under the
    /// name qemu-img, Bantam takes the same commands. Formats are raw, qcow2, vmdk, vpc (VHD), vhdx and
    /// vdi; the last four are read, and written by create and convert. See docs/images.md.
    Image(Box<ImageArgs>),
    /// Prints completions for a shell
    ///
    /// For example, for bash:
    ///
    ///   bantam completions bash > /usr/share/bash-completion/completions/bantam
    #[command(verbatim_doc_comment)]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Writes the manual pages into a folder
    Man {
        /// The folder, created if it does not exist
        folder: PathBuf,
    },
}

#[derive(Debug, clap::Args)]
#[command(after_help = RUN_SHORT_HELP, after_long_help = RUN_HELP, disable_help_flag = true)]
pub struct RunArgs {
    /// Machine file with options for this command, in TOML
    ///
    /// Its keys are the names of the options below, except --control and --log, without the dashes:
    /// kernel = "vmlinux", cpus = 2, memory = "512M". A disk is a table [[disk]] with the keys path,
    /// readonly, id and so on; a network device is a table [[net]] with the keys tap, mac and so on;
    /// a channel is a table [[channel]]. Other options with keys, such as --vsock, are a table each,
    /// such as [vsock]. What is on or off here is true or false in the file. Relative paths are
    /// relative to the folder of the file. An option on the command line replaces what the file
    /// says; a --disk replaces all its disks, a --net all its network devices, a --channel all its
    /// channels. FILE may be a pipe, such as /dev/stdin or the <(...) of a shell; relative paths in
    /// it are relative to the current folder.
    #[arg(long, value_name = "FILE", help_heading = heading::BOOT)]
    pub config: Option<PathBuf>,

    #[command(flatten)]
    pub machine: MachineArgs,

    /// Unix socket by which other programs control the machine
    ///
    /// Only the user who starts the machine, and root, can connect. `bantam control` is a client of it. It is
    /// removed in the end.
    #[arg(long, value_name = "PATH", help_heading = heading::OTHER, hide_short_help = true)]
    pub control: Option<PathBuf>,

    /// How much to log: off, error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "warn", help_heading = heading::OTHER,
        hide_possible_values = true,
        value_parser = choice::<LevelFilter, _>(["off", "error", "warn", "info", "debug", "trace"]))]
    pub log: LevelFilter,

    /// Print help: a summary with -h, all of it with --help
    #[arg(short, long, action = ArgAction::Help, help_heading = heading::OTHER)]
    help: Option<bool>,
}

#[derive(Clone, Debug, clap::Args)]
pub struct RestoreArgs {
    /// Directory of the snapshot
    pub directory: PathBuf,

    /// Folder for new overlays of the disks that the machine can write to
    ///
    /// Without it, the machine writes to the images of the snapshot, from which no other machine can go on
    /// then. With a folder for each, any number of machines go on from one snapshot, at the same time too.
    #[arg(long, value_name = "FOLDER")]
    pub overlays: Option<PathBuf>,

    #[command(flatten)]
    pub ends: EndArgs,

    /// How the guest gets its memory: lazy, prefetch, copy, copy-all or uffd=SOCKET
    ///
    /// lazy: the memory file is mapped, and read where the guest touches its memory. prefetch: the same, and all of it
    /// is read in the background. copy: what the guest touches is copied; if the file cannot be read, the machine
    /// ends with an error. copy-all: the same, and the rest is copied in the background; the file is not needed any
    /// more when that is done. uffd=SOCKET: the program that listens on SOCKET fills pages that are touched, in the
    /// protocol of Firecracker; the memory file is not used.
    #[arg(long, value_name = "HOW", default_value = "lazy", value_parser = restore::memory_source)]
    pub memory_load: MemorySource,

    /// Record which pages the guest needs first, for later restores
    ///
    /// They are those touched in the first ten seconds, or until the machine ends. From then on, each restore from
    /// the directory reads these pages ahead, in few large pieces. They are in the file working-set there.
    #[arg(long)]
    pub record_working_set: bool,

    /// Unix socket by which other programs control the machine, as for bantam run
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// Wait until a client of the control socket lets the machine go on
    #[arg(long, requires = "control")]
    pub paused: bool,

    /// What happens at a system call that a thread of Bantam never makes, as for bantam run
    #[arg(long, value_name = "kill|log|off", hide_possible_values = true,
        value_parser = choice::<Seccomp, _>(["kill", "log", "off"]))]
    pub seccomp: Option<Seccomp>,

    /// The descriptors of a fork, which are inherited; the directory is then only a name
    #[arg(long, hide = true, value_delimiter = ',')]
    pub descriptors: Vec<RawFd>,

    /// Take images that have been changed since the snapshot
    ///
    /// The guest knows nothing of the change: it may find a damaged file system, or damage it.
    #[arg(long)]
    pub force: bool,

    /// How much to log: off, error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "warn",
        hide_possible_values = true,
        value_parser = choice::<LevelFilter, _>(["off", "error", "warn", "info", "debug", "trace"]))]
    pub log: LevelFilter,
}

// What a machine that goes on from another uses of the host, in the place of what the other has used.
#[derive(Clone, Debug, clap::Args)]
pub struct EndArgs {
    /// Another image for a disk, with the same content; can be given more than once
    ///
    /// NAME is that of the disk on the host, disk0, disk1, ... unless it was given another.
    #[arg(long = "disk", value_name = "NAME=PATH[,format=FORMAT]", value_parser = ends::disk)]
    pub disks: Vec<Replacement<DiskConfig>>,

    /// Another tap for a network device; can be given more than once
    ///
    /// The guest has another MAC address from when its driver starts again: when it reboots, for example.
    #[arg(long = "net", value_name = "NAME=TAP[,mac=MAC]", value_parser = ends::net)]
    pub nets: Vec<Replacement<NetConfig>>,

    /// Another socket for the socket device
    #[arg(long, value_name = "PATH")]
    pub vsock: Option<PathBuf>,

    /// Another context identifier of the guest for the socket device
    #[arg(long, value_name = "N", value_parser = ends::cid)]
    pub cid: Option<GuestCid>,

    /// Where the serial port leads now
    #[arg(long, value_name = "END")]
    pub serial: Option<SerialConfig>,

    /// Where the virtio console leads now
    #[arg(long, value_name = "END")]
    pub console: Option<SerialConfig>,

    /// Where a channel leads now; can be given more than once
    ///
    /// END is socket=PATH, file=PATH, pty or stdio, as for bantam run.
    #[arg(long = "channel", value_name = "NAME=END", value_parser = ends::channel)]
    pub channels: Vec<(ChannelName, SerialConfig)>,

    /// File with other metadata for the guest, in JSON
    #[arg(long, value_name = "FILE")]
    pub metadata: Option<PathBuf>,
}

#[derive(Clone, Debug, clap::Args)]
pub struct ApiArgs {
    /// Unix socket for the clients
    ///
    /// There must be no file of that name. It is removed in the end.
    #[arg(long, value_name = "PATH", default_value = "/run/firecracker.socket")]
    pub api_sock: PathBuf,

    /// Name of the instance: up to 64 letters, digits and dashes
    #[arg(long, value_name = "NAME", default_value = "anonymous-instance", value_parser = instance_id)]
    pub id: String,

    /// Unix socket by which other programs control the machine, as for bantam run
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// How long the guest may take to shut down when a signal asks the program to end
    ///
    /// As for bantam run; 0, the default, cuts its power at once.
    #[arg(
        long,
        value_name = "TIME",
        default_value = "0",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    pub shutdown_timeout: ShutdownTimeout,

    /// Configuration file in JSON; the machine is started at once
    #[arg(long, value_name = "FILE")]
    pub config_file: Option<PathBuf>,

    /// File with metadata for the guest, in JSON
    #[arg(long, value_name = "FILE")]
    pub metadata: Option<PathBuf>,

    /// Serve no API
    #[arg(long, requires = "config_file")]
    pub no_api: bool,

    /// File or named pipe for the log, in place of standard error
    #[arg(long, value_name = "FILE")]
    pub log_path: Option<PathBuf>,

    /// How much to log: Off, Error, Warning, Info, Debug or Trace [default: Info]
    #[arg(long, value_name = "LEVEL")]
    pub level: Option<LogLevel>,

    /// Show the level in the lines of the log
    #[arg(long)]
    pub show_level: bool,

    /// Show in the lines of the log where in the source they come from
    #[arg(long)]
    pub show_log_origin: bool,

    /// Log only lines from this module
    #[arg(long, value_name = "PATH")]
    pub module: Option<String>,

    /// File or named pipe for metrics: a line of JSON each minute
    #[arg(long, value_name = "FILE")]
    pub metrics_path: Option<PathBuf>,

    /// Log how long the guest takes from the start until it writes 123 to address 0xc0000000
    #[arg(long)]
    pub boot_timer: bool,

    /// When the process was started, in microseconds of the monotonic clock; for the metrics
    #[arg(long, value_name = "MICROSECONDS")]
    pub start_time_us: Option<u64>,

    /// The same by the clock of CPU time
    #[arg(long, value_name = "MICROSECONDS")]
    pub start_time_cpu_us: Option<u64>,

    /// CPU time that the parent process had used up by then; for the metrics
    #[arg(long, value_name = "MICROSECONDS")]
    pub parent_cpu_time_us: Option<u64>,

    /// Most bytes of a request's body
    #[arg(long, value_name = "BYTES", default_value_t = 51_200)]
    pub http_api_max_payload_size: usize,

    /// Most bytes of metadata [default: that of a request's body]
    #[arg(long, value_name = "BYTES")]
    pub mmds_size_limit: Option<usize>,

    /// What happens at a system call that a thread of Bantam never makes, as for bantam run
    #[arg(long, value_name = "kill|log|off", default_value = "kill", hide_possible_values = true,
        value_parser = choice::<Seccomp, _>(["kill", "log", "off"]))]
    pub seccomp: Seccomp,

    /// Whether Bantam is kept from executing programs and making device files: on or off
    #[arg(long, value_name = "on|off", default_value = "on", hide_possible_values = true, action = ArgAction::Set,
        value_parser = switch())]
    pub landlock: bool,

    /// Whether the host may write a core dump of the process: on or off, as for bantam run
    #[arg(long, value_name = "on|off", default_value = "off", hide_possible_values = true, action = ArgAction::Set,
        value_parser = switch())]
    pub coredump: bool,

    /// Has no effect: Bantam has filters of its own
    #[arg(long, value_name = "FILE", conflicts_with = "no_seccomp")]
    pub seccomp_filter: Option<PathBuf>,

    /// The same as --seccomp off
    #[arg(long, conflicts_with = "seccomp")]
    pub no_seccomp: bool,
}

/// The options under the name firecracker.
#[derive(Debug, Parser)]
#[command(
    name = "firecracker",
    max_term_width = 100,
    disable_version_flag = true
)]
#[command(about = "Bantam in place of Firecracker: serves its API for one machine")]
pub struct FirecrackerArgs {
    #[command(flatten)]
    pub api: ApiArgs,

    /// Print the version of Firecracker whose API this is, and that of Bantam
    #[arg(long, short = 'V')]
    pub version: bool,
}

pub fn instance_id(text: &str) -> Result<String, String> {
    let valid = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if !(1..=64).contains(&text.len()) || !text.chars().all(valid) {
        return Err("it must be 1 to 64 letters, digits and dashes".to_string());
    }
    Ok(text.to_string())
}

const RUN_SHORT_HELP: &str = "\
Less common options and examples: bantam run --help";

const RUN_HELP: &str = "\
Examples:
  Boot a kernel with a root file system, and quit with Ctrl-A x:
    bantam run --kernel vmlinux --disk root.img

  Two vCPUs, a read-only root, a data disk and a network:
    bantam run --kernel bzImage --cpus 2 --memory 1G \\
        --disk root.img,ro --disk data.img,id=data \\
        --net tap=tap0,mac=52:54:00:12:34:56

  A test in CI, which fails if /test.sh of the image does (docs/ci.md):
    bantam run --kernel vmlinux --disk root.img --on-halt exit \\
        --append init=/test.sh </dev/null

  The machine that a file describes, but with more memory:
    bantam run --config web.toml --memory 4G

Keys, if standard input is a terminal:
  Ctrl-A x         quit
  Ctrl-A h         list these keys
  Ctrl-A a         send Ctrl-A to the guest (also Ctrl-A Ctrl-A)

Exit status:
  0    the guest powered off, or rebooted when a signal asked it to shut down
  N    the guest gave this number (printf '\\3' | dd of=/dev/port bs=1 seek=1280)
  120  the guest rebooted
  121  the guest panicked
  122  the guest halted for good, with --on-halt exit
  123  its power was cut by Ctrl-A x or a signal
  125  an error, with one line of reason on standard error

  A number of the guest that is one of the last five becomes 255.
  With --exit-status monitor: 1 for an error, and otherwise 0.";

impl RunArgs {
    /// Combines the options of the command line with those of the machine file.
    pub fn into_table(self) -> Result<MachineTable, ConfigError> {
        let options = MachineTable::from_options(&self.machine)?;
        Ok(match &self.config {
            Some(file) => options.over(MachineTable::from_file(file)?),
            None => options,
        })
    }
}

impl RestoreArgs {
    /// Whether the machine goes on with all that it had, and nothing is asked for beside that.
    pub fn is_plain(&self) -> bool {
        self.overlays.is_none()
            && self.ends.is_empty()
            && self.control.is_none()
            && self.descriptors.is_empty()
            && !self.record_working_set
            && !self.force
    }
}

impl EndArgs {
    /// Whether the machine goes on with all that it had.
    pub fn is_empty(&self) -> bool {
        self.disks.is_empty()
            && self.nets.is_empty()
            && self.vsock.is_none()
            && self.cid.is_none()
            && self.serial.is_none()
            && self.console.is_none()
            && self.channels.is_empty()
            && self.metadata.is_none()
    }
}

#[cfg(test)]
mod tests;
