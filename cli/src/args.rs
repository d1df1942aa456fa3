//! The command line: its options, their help, and the machine they describe.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::str::FromStr;

use bantam_api::resources::logger::LogLevel;
use bantam_vmm::config::{
    BalloonConfig, BootProtocolOption, ChannelConfig, ConfigError, DiskConfig, ExitStatus,
    HugePages, MachineOptions, MemorySize, NetConfig, OnHalt, OnReboot, SerialConfig,
    ShutdownTimeout, VcpuCount, VsockConfig,
};
use clap::builder::{OsStringValueParser, PossibleValuesParser, TypedValueParser};
use clap::{ArgAction, Parser, Subcommand};
use clap_complete::Shell;
use tracing::level_filters::LevelFilter;

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

#[derive(Debug, Subcommand)]
pub enum Command {
    Run(Box<RunArgs>),
    Api(Box<ApiArgs>),
    /// Shows whether this host can run machines, and what to do if it cannot
    ///
    /// Looks for KVM and what Bantam needs of it, and for what disks and networks make use of.
    /// Each line of the table says what was found; where something is missing, a line below it
    /// says what to do. The exit status is 0 if machines can run here and 1 if they cannot.
    Check,
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

/// Boots a machine and stays until it ends
///
/// Boots a Linux kernel, or another kernel that can be entered in the same way, in a machine of
/// its own and stays until the machine ends. Options come from the command line, from a machine
/// file (--config), or from both; the command line wins.
#[derive(Debug, clap::Args)]
#[command(after_help = RUN_SHORT_HELP, after_long_help = RUN_HELP, disable_help_flag = true)]
pub struct RunArgs {
    /// Machine file with options for this command, in TOML
    ///
    /// Its keys are the names of the options below, but --log, without the dashes: kernel = "vmlinux",
    /// cpus = 2, memory = "512M", rng = false. A disk is a table [[disk]] with the keys path,
    /// readonly, id and so on; a network device is a table [[net]] with the keys tap, mac and so
    /// on; a channel is a table [[channel]], the socket device a table [vsock], and a balloon a table
    /// [balloon].
    /// Relative paths are relative to the folder of the file. An option on the command line
    /// replaces what the file says; a --disk replaces all its disks, a --net all its network
    /// devices, a --channel all its channels. FILE may be a pipe, such as /dev/stdin or the <(...) of a shell; relative paths
    /// in it are relative to the current folder.
    #[arg(long, value_name = "FILE", help_heading = heading::BOOT)]
    pub config: Option<PathBuf>,

    /// Kernel image: bzImage or ELF (vmlinux)
    ///
    /// Needed on the command line or in the machine file.
    #[arg(long, value_name = "FILE", help_heading = heading::BOOT)]
    pub kernel: Option<PathBuf>,

    /// Initial RAM disk
    #[arg(long, value_name = "FILE", help_heading = heading::BOOT)]
    pub initrd: Option<PathBuf>,

    /// Kernel command line, in place of the default one
    ///
    /// The default is "reboot=panic_warm,k panic=-1 console=ttyS0", with --console "console=hvc0" and, if
    /// there is a disk and no initrd, "root=/dev/vda rw" (ro for a read-only disk). To only add to it, see
    /// --append.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, help_heading = heading::BOOT)]
    pub cmdline: Option<String>,

    /// Words to add to the kernel command line; can be given more than once
    ///
    /// Arguments for the guest's init follow a word "--": --append 'init=/bin/sh -- -c "ls /"'. All
    /// that Bantam adds, and kernel parameters of other --append options, is put before that word.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, help_heading = heading::BOOT)]
    pub append: Vec<String>,

    /// How the kernel is entered [default: auto]
    ///
    /// auto takes the best way that the kernel image offers.
    #[arg(long, value_name = "PROTOCOL", help_heading = heading::BOOT, hide_short_help = true,
        value_parser = choice::<BootProtocolOption, _>(["auto", "pvh", "linux64"]))]
    pub boot_protocol: Option<BootProtocolOption>,

    /// Whether the kernel command line gets words that some hosts need [default: on]
    ///
    /// On a host without hardware virtualization a guest kernel must do without some processor
    /// features. Bantam notices such a host and tells the kernel so on its command line; off
    /// leaves the command line alone.
    #[arg(long, value_name = "on|off", help_heading = heading::BOOT, hide_short_help = true,
        value_parser = switch())]
    pub host_workarounds: Option<bool>,

    /// Number of vCPUs, 1 to 32 [default: 1]
    #[arg(long, value_name = "N", allow_hyphen_values = true, help_heading = heading::CPU)]
    pub cpus: Option<VcpuCount>,

    /// Guest memory, such as 512M or 2G [default: 256M]
    ///
    /// A number with a unit of K, M, G or T, each 1024 times the one before; a number alone
    /// counts MiB. From 16M to 1023G.
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true, help_heading = heading::CPU)]
    pub memory: Option<MemorySize>,

    /// Which pages guest memory is made of [default: none]
    ///
    /// - none: ordinary ones.
    /// - transparent: those that the host makes of ordinary ones when it can.
    /// - 2M: those that the host has set aside (sysctl vm.nr_hugepages=N);
    ///   guest memory must then be a multiple of 2M.
    #[arg(long, value_name = "PAGES", help_heading = heading::CPU, hide_short_help = true,
        verbatim_doc_comment,
        value_parser = choice::<HugePages, _>(["none", "transparent", "2M"]))]
    pub huge_pages: Option<HugePages>,

    /// Memory balloon: gives memory back to the host
    ///
    /// SIZE, such as 64M or 0, is how much the guest is to give up at the
    /// start; KEY=VALUE is any of
    ///
    /// - deflate-on-oom=on: lets the guest take memory back when it would
    ///   otherwise have to end processes.
    /// - reporting=on: has the guest say by itself which memory it does not
    ///   use.
    /// - statistics=SECONDS: has the guest asked that often how its memory is
    ///   used.
    #[arg(long, value_name = "size=SIZE[,KEY=VALUE]...", help_heading = heading::CPU,
        verbatim_doc_comment)]
    pub balloon: Option<BalloonConfig>,

    /// Disk for the guest; can be given more than once
    ///
    /// PATH is a raw image or a block device. A comma in PATH or in a value
    /// is written twice. The guest finds the disks in the order in which they
    /// are given: /dev/vda, /dev/vdb, ... KEY=VALUE is any of
    ///
    /// - ro: the guest cannot write to it.
    /// - id=NAME: its serial number in the guest, up to 20 characters.
    /// - format=raw: takes a file for a raw image though its name ends in
    ///   .qcow2 or the like.
    /// - block-size=512 or 4096: the size of the blocks that the guest is
    ///   told of; that of a block device and 512 for a file by default.
    /// - lock=on (the default): refuses an image that another program uses.
    ///   warn warns of it, and off does not look.
    /// - cache=writeback (the default): keeps what the guest writes in the
    ///   host's page cache until the guest flushes it. writethrough puts
    ///   every write on stable storage, none bypasses the page cache, and
    ///   unsafe ignores flushes.
    /// - engine=auto (the default): does each request in the way that is best
    ///   for it; io_uring and sync do all in one way.
    /// - queues=N: 1 to 8; one for each vCPU up to 4 by default.
    /// - iothread=on: gives the disk a thread of its own.
    /// - poll=on: lets that thread look for requests for longer before it
    ///   sleeps.
    /// - bytes-per-second=N, operations-per-second=N: limit what the guest
    ///   can do, such as 10M or 500; burst-bytes=N and burst-operations=N say
    ///   how much may come at once after a rest.
    #[arg(long = "disk", value_name = "PATH[,ro][,KEY=VALUE]...", help_heading = heading::DISKS,
        verbatim_doc_comment, value_parser = os_text::<DiskConfig>())]
    pub disks: Vec<DiskConfig>,

    /// Network device for the guest; can be given more than once
    ///
    /// NAME is a tap interface of the host. KEY=VALUE is any of
    ///
    /// - mac=MAC: the address of the guest's end.
    /// - mtu=N: the largest packet in bytes.
    /// - queues=N: how many pairs of queues the device has, 1 to 8; one for
    ///   each vCPU by default, where the tap has them.
    /// - iothread=on: gives the device a thread of its own.
    /// - rx-bytes-per-second=N, rx-packets-per-second=N: limit what the guest
    ///   receives, such as 10M or 500, and the same with tx what it
    ///   transmits; rx-burst-bytes=N, rx-burst-packets=N, tx-burst-bytes=N
    ///   and tx-burst-packets=N say how much may come at once after a rest.
    #[arg(long = "net", value_name = "tap=NAME[,KEY=VALUE]...", help_heading = heading::NETWORKS,
        verbatim_doc_comment)]
    pub nets: Vec<NetConfig>,

    /// Socket device (virtio-vsock) to the guest's programs
    ///
    /// N, 3 or more, is the guest's context identifier (CID). A program here that connects to the Unix
    /// domain socket PATH and writes "CONNECT 52" and a line feed is connected to port 52 of the guest.
    /// What the guest connects to, port 53 of CID 2, is the socket PATH_53. A comma in PATH is written
    /// twice.
    #[arg(long, value_name = "cid=N,socket=PATH", help_heading = heading::NETWORKS,
        value_parser = os_text::<VsockConfig>())]
    pub vsock: Option<VsockConfig>,

    /// Where the serial port leads: stdio, pty, file=PATH, socket=PATH or none [default: stdio]
    ///
    /// - stdio: standard input and output. Where standard input is a
    ///   terminal, every key goes to the guest but Ctrl-A, which starts a
    ///   command: Ctrl-A h lists them, Ctrl-A x quits.
    /// - pty: a new pseudoterminal, whose name is printed on standard error.
    /// - file=PATH: a file to which the guest's output is appended.
    /// - socket=PATH: a Unix domain socket that a client can connect to.
    /// - none: nowhere.
    #[arg(long, value_name = "WHERE", help_heading = heading::CONSOLE, verbatim_doc_comment,
        value_parser = os_text::<SerialConfig>())]
    pub serial: Option<SerialConfig>,

    /// Where a virtio console leads, /dev/hvc0: as --serial [default: none]
    ///
    /// Faster than the serial port, and the guest knows the size of the terminal. With none the guest
    /// has no such console. With stdio the serial port leads nowhere unless --serial says otherwise.
    #[arg(long, value_name = "WHERE", help_heading = heading::CONSOLE,
        value_parser = os_text::<SerialConfig>())]
    pub console: Option<SerialConfig>,

    /// Named channel to a program in the guest; can be given more than once
    ///
    /// The guest finds it by NAME, in Linux as /dev/virtio-ports/NAME. WHERE is socket=PATH, a Unix
    /// domain socket that a client can connect to, file=PATH, pty or stdio, as with --serial; a comma in
    /// PATH is written twice.
    #[arg(long = "channel", value_name = "name=NAME,WHERE", help_heading = heading::CONSOLE,
        value_parser = os_text::<ChannelConfig>())]
    pub channels: Vec<ChannelConfig>,

    /// Whether the guest has an entropy device (virtio-rng) [default: on]
    #[arg(hide_possible_values = true, long, value_name = "on|off", help_heading = heading::OTHER, value_parser = switch())]
    pub rng: Option<bool>,

    /// What a reboot or panic of the guest does to the machine [default: exit]
    ///
    /// - exit: it ends.
    /// - restart: it starts again. Restarts that follow one another are
    ///   slowed down, up to 10 seconds each, until the machine has run for
    ///   10 seconds.
    #[arg(long, value_name = "exit|restart", help_heading = heading::OTHER, verbatim_doc_comment,
        hide_possible_values = true,
        value_parser = choice::<OnReboot, _>(["exit", "restart"]))]
    pub on_reboot: Option<OnReboot>,

    /// How often --on-reboot restart starts it again [default: no limit]
    #[arg(long, value_name = "N", help_heading = heading::OTHER, hide_short_help = true)]
    pub restart_limit: Option<u32>,

    /// What happens when the guest has halted for good [default: wait]
    ///
    /// A guest has halted for good when all its vCPUs have halted with interrupts off, as after
    /// halt -f. It is noticed within 3 seconds. wait says so in the log, exit ends the machine.
    #[arg(long, value_name = "ACTION", help_heading = heading::OTHER, hide_short_help = true,
        value_parser = choice::<OnHalt, _>(["wait", "exit"]))]
    pub on_halt: Option<OnHalt>,

    /// How long a guest may take to shut down after a signal [default: 10s]
    ///
    /// SIGTERM, SIGINT and SIGHUP ask the guest to shut itself down, by the ACPI power button or by
    /// Ctrl-Alt-Del, and cut its power after this time. A guest that listens to neither has it cut
    /// at once, and so do a second signal, SIGQUIT and Ctrl-A x. 0 is not to ask. A number of
    /// seconds, or with a unit: 500ms, 10s, 2m.
    #[arg(long, value_name = "TIME", allow_hyphen_values = true, help_heading = heading::OTHER,
        hide_short_help = true)]
    pub shutdown_timeout: Option<ShutdownTimeout>,

    /// Of whom the exit status tells: guest or monitor [default: guest]
    ///
    /// guest: how the guest ended, as listed below. monitor: 0 however the guest ended, 1 if there
    /// was an error.
    #[arg(long, value_name = "OF", help_heading = heading::OTHER, hide_short_help = true,
        value_parser = choice::<ExitStatus, _>(["guest", "monitor"]))]
    pub exit_status: Option<ExitStatus>,

    /// How much to log: off, error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "warn", help_heading = heading::OTHER,
        hide_possible_values = true,
        value_parser = choice::<LevelFilter, _>(["off", "error", "warn", "info", "debug", "trace"]))]
    pub log: LevelFilter,

    /// Print help: a summary with -h, all of it with --help
    #[arg(short, long, action = ArgAction::Help, help_heading = heading::OTHER)]
    help: Option<bool>,
}

/// Headings of the help, in the order in which they are shown.
mod heading {
    /// What is started, and what it is told.
    pub const BOOT: &str = "Boot";
    /// Processors and memory.
    pub const CPU: &str = "CPU and memory";
    /// Disks.
    pub const DISKS: &str = "Disks";
    /// Ways to other machines and programs.
    pub const NETWORKS: &str = "Networks";
    /// Ways to see and type what a user would.
    pub const CONSOLE: &str = "Console";
    /// All else: the machine's end, other devices, the program itself.
    pub const OTHER: &str = "Other";
}

/// Serves an API by which clients put a machine together, start it and change it
///
/// The API is that of Firecracker, version 1.17, on a Unix socket: programs that drive Firecracker
/// drive Bantam. It stays until the machine ends. Started under the name firecracker, Bantam takes
/// the same options without a command. See docs/api.md.
#[derive(Debug, clap::Args)]
pub struct ApiArgs {
    /// Unix socket for the clients
    ///
    /// There must be no file of that name. It is removed in the end.
    #[arg(long, value_name = "PATH", default_value = "/run/firecracker.socket")]
    pub api_sock: PathBuf,

    /// Name of the instance: up to 64 letters, digits and dashes
    #[arg(long, value_name = "NAME", default_value = "anonymous-instance", value_parser = instance_id)]
    pub id: String,

    /// How long the guest may take to shut down when a signal asks the program to end
    ///
    /// As of bantam run; 0, the default, cuts its power at once.
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

    /// Has no effect: there is no seccomp filter yet
    #[arg(long, value_name = "FILE", conflicts_with = "no_seccomp")]
    pub seccomp_filter: Option<PathBuf>,

    /// Has no effect: there is no seccomp filter yet
    #[arg(long)]
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

fn instance_id(text: &str) -> Result<String, String> {
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

Keys, where standard input is a terminal:
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
    /// What the command line and the machine file say together.
    pub fn into_options(self) -> Result<MachineOptions, ConfigError> {
        let options = MachineOptions {
            kernel: self.kernel,
            initrd: self.initrd,
            cmdline: self.cmdline,
            append: (!self.append.is_empty()).then_some(self.append),
            cpus: self.cpus,
            memory: self.memory,
            huge_pages: self.huge_pages,
            disks: (!self.disks.is_empty()).then_some(self.disks),
            nets: (!self.nets.is_empty()).then_some(self.nets),
            vsock: self.vsock,
            serial: self.serial,
            console: self.console,
            channels: (!self.channels.is_empty()).then_some(self.channels),
            rng: self.rng,
            balloon: self.balloon,
            boot_protocol: self.boot_protocol,
            on_reboot: self.on_reboot,
            restart_limit: self.restart_limit,
            shutdown_timeout: self.shutdown_timeout,
            exit_status: self.exit_status,
            on_halt: self.on_halt,
            host_workarounds: self.host_workarounds,
        };
        Ok(match &self.config {
            Some(file) => options.or(MachineOptions::from_file(file)?),
            None => options,
        })
    }
}

/// Accepts the names, and reads them as values.
fn choice<T, const N: usize>(names: [&'static str; N]) -> impl TypedValueParser<Value = T>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static> + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(names).try_map(|name| name.parse())
}

/// Reads a value with a path in it, which may be other than UTF-8.
fn os_text<T>() -> impl TypedValueParser<Value = T>
where
    T: for<'a> TryFrom<&'a OsStr, Error = ConfigError> + Clone + Send + Sync + 'static,
{
    OsStringValueParser::new().try_map(|text| T::try_from(&text))
}

fn switch() -> impl TypedValueParser<Value = bool> {
    PossibleValuesParser::new(["on", "off"]).map(|name| name == "on")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use bantam_vmm::config::MachineConfig;
    use clap::CommandFactory;

    use super::*;

    fn run_args(arguments: &[&str]) -> RunArgs {
        let arguments = ["bantam", "run"].iter().chain(arguments);
        match Args::try_parse_from(arguments).unwrap().command {
            Command::Run(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    fn config(arguments: &[&str]) -> MachineConfig {
        let options = run_args(arguments).into_options().unwrap();
        options.into_config().unwrap()
    }

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_kernel_is_enough() {
        assert_eq!(
            config(&["--kernel", "vmlinux"]),
            MachineConfig::new("vmlinux")
        );
        assert_eq!(run_args(&["--kernel", "vmlinux"]).log, LevelFilter::WARN);
    }

    #[test]
    fn every_option_reaches_the_machine() {
        let args = run_args(&[
            "--kernel=k",
            "--initrd=i",
            "--cmdline=-x",
            "--append",
            "-y z -- 1",
            "--append=x -- 2",
            "--cpus=3",
            "--memory=1G",
            "--huge-pages=transparent",
            "--disk=a.img,ro,id=root",
            "--disk=b.img",
            "--net=tap=t0,mtu=9000",
            "--vsock=cid=3,socket=v.sock",
            "--serial=socket=s.sock",
            "--console=pty",
            "--channel=name=a,socket=a.sock",
            "--channel=name=b,pty",
            "--rng=off",
            "--balloon=size=64M,reporting=on",
            "--boot-protocol=pvh",
            "--on-reboot=restart",
            "--restart-limit=5",
            "--on-halt=exit",
            "--shutdown-timeout=2m",
            "--exit-status=monitor",
            "--host-workarounds=off",
            "--log=off",
        ]);
        assert_eq!(args.log, LevelFilter::OFF);
        let expected = MachineConfig {
            initrd: Some("i".into()),
            cmdline: Some("-x".into()),
            append: Some("-y z x -- 1 2".into()),
            cpus: "3".parse().unwrap(),
            memory: "1G".parse().unwrap(),
            huge_pages: HugePages::Transparent,
            disks: vec![
                "a.img,ro,id=root".parse().unwrap(),
                DiskConfig::new("b.img"),
            ],
            nets: vec!["tap=t0,mtu=9000".parse().unwrap()],
            vsock: Some("cid=3,socket=v.sock".parse().unwrap()),
            serial: SerialConfig::Socket("s.sock".into()),
            console: SerialConfig::Pty,
            channels: vec![
                "name=a,socket=a.sock".parse().unwrap(),
                "name=b,pty".parse().unwrap(),
            ],
            rng: false,
            balloon: Some("size=64M,reporting=on".parse().unwrap()),
            boot_protocol: BootProtocolOption::Pvh,
            on_reboot: OnReboot::Restart,
            restart_limit: Some(5),
            on_halt: OnHalt::Exit,
            shutdown_timeout: "120s".parse().unwrap(),
            exit_status: ExitStatus::Monitor,
            host_workarounds: false,
            ..MachineConfig::new("k")
        };
        let config = args.into_options().unwrap().into_config();
        assert_eq!(config.unwrap(), expected);
    }

    #[test]
    fn the_command_line_wins_over_the_machine_file() {
        let folder = std::env::temp_dir().join(format!("bantam-args-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join("machine.toml");
        fs::write(
            &file,
            "kernel = 'k'\ncpus = 4\nmemory = '1G'\n[[disk]]\npath = 'a.img'\n",
        )
        .unwrap();
        let config = config(&[
            "--config",
            file.to_str().unwrap(),
            "--cpus=2",
            "--disk=b.img",
        ]);
        fs::remove_dir_all(&folder).unwrap();
        let expected = MachineConfig {
            cpus: "2".parse().unwrap(),
            memory: "1G".parse().unwrap(),
            disks: vec![DiskConfig::new("b.img")],
            ..MachineConfig::new(folder.join("k"))
        };
        assert_eq!(config, expected);
    }

    #[test]
    fn every_name_of_a_choice_is_read() {
        let command = Args::command();
        let run = command.find_subcommand("run").unwrap();
        let options = run.get_arguments();
        for argument in options.filter(|argument| argument.get_action().takes_values()) {
            for value in argument.get_possible_values() {
                let option = format!("--{}={}", argument.get_long().unwrap(), value.get_name());
                run_args(&[&option]);
            }
        }
    }

    #[test]
    fn wrong_values_are_refused() {
        for arguments in [
            ["--cpus", "1000"],
            ["--cpus", "-1"],
            ["--memory", "1M"],
            ["--memory", "lots"],
            ["--net", "tap0"],
            ["--vsock", "cid=2,socket=v"],
            ["--serial", "tty"],
            ["--console", "hvc0"],
            ["--channel", "socket=a.sock"],
            ["--rng", "yes"],
            ["--balloon", "64M"],
            ["--log", "loud"],
            ["--restart-limit", "-1"],
            ["--shutdown-timeout", "soon"],
        ] {
            let arguments = ["bantam", "run"].into_iter().chain(arguments);
            assert!(
                Args::try_parse_from(arguments.clone()).is_err(),
                "{arguments:?}"
            );
        }
    }

    #[test]
    fn every_option_has_help_and_the_long_help_has_examples() {
        let mut command = Args::command();
        for subcommand in command.get_subcommands() {
            assert!(
                subcommand.get_about().is_some(),
                "{}",
                subcommand.get_name()
            );
            for argument in subcommand.get_arguments() {
                assert!(argument.get_help().is_some(), "{}", argument.get_id());
            }
        }
        let run = command.find_subcommand_mut("run").unwrap();
        let help = run.render_long_help().to_string();
        for text in ["Examples:", "Ctrl-A x", "Exit status:"] {
            assert!(help.contains(text), "{text}");
        }
    }

    #[test]
    fn the_short_help_fits_a_screen_and_the_long_one_has_every_option() {
        let mut command = Args::command().term_width(100);
        command.build();
        let run = command.find_subcommand_mut("run").unwrap();
        let short = run.render_help().to_string();
        assert!(short.lines().count() <= 40, "{short}");
        assert!(short.lines().all(|line| line.len() <= 100), "{short}");
        let long = run.render_long_help().to_string();
        for argument in run.get_arguments() {
            let option = format!("--{}", argument.get_long().unwrap());
            assert!(long.contains(&option), "{option}");
        }
    }

    #[test]
    fn every_option_of_a_run_is_below_a_heading() {
        let mut command = Args::command();
        let run = command.find_subcommand_mut("run").unwrap();
        for argument in run.get_arguments() {
            let heading = argument.get_help_heading();
            assert!(heading.is_some(), "{}", argument.get_id());
        }
        let help = run.render_help().to_string();
        let places = [
            heading::BOOT,
            heading::CPU,
            heading::DISKS,
            heading::NETWORKS,
            heading::CONSOLE,
            heading::OTHER,
        ]
        .map(|heading| help.find(&format!("\n{heading}:\n")).unwrap());
        assert!(places.is_sorted(), "{help}");
    }

    #[test]
    fn lists_fit_beside_the_indentation_of_a_narrow_terminal() {
        for subcommand in Args::command().get_subcommands() {
            for argument in subcommand.get_arguments() {
                let help = argument.get_long_help().unwrap_or_default().to_string();
                let (_, rest) = help.split_once("\n\n").unwrap_or_default();
                if rest.lines().any(|line| line.starts_with("- ")) {
                    let fits = |line: &str| line.len() <= 70;
                    assert!(rest.lines().all(fits), "{}", argument.get_id());
                }
            }
        }
    }

    #[test]
    fn the_help_states_the_real_defaults_and_limits() {
        let defaults = MachineConfig::new("k");
        let mut command = Args::command();
        let help = command
            .find_subcommand_mut("run")
            .unwrap()
            .render_long_help()
            .to_string();
        for default in [
            defaults.cpus.to_string(),
            defaults.memory.to_string(),
            defaults.serial.to_string(),
            defaults.console.to_string(),
            defaults.boot_protocol.to_string(),
            defaults.on_reboot.to_string(),
            defaults.on_halt.to_string(),
            defaults.shutdown_timeout.to_string(),
            defaults.exit_status.to_string(),
        ] {
            assert!(help.contains(&format!("[default: {default}]")), "{default}");
        }
        assert!(defaults.rng && defaults.host_workarounds);
    }
}
