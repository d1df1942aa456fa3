//! The options of the command line that describe a machine.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::str::FromStr;

use bantam_vmm::config::{
    BalloonConfig, BootProtocolOption, ChannelConfig, ConfigError, DiskConfig, ExitStatus,
    GdbConfig, HugePages, MemorySize, NetConfig, OnHalt, OnReboot, Seccomp, SerialConfig,
    ShutdownTimeout, SmbiosConfig, VcpuCount, VsockConfig, path,
};
use clap::builder::{OsStringValueParser, PossibleValuesParser, TypedValueParser};
use serde::Serialize;

// A documentation comment would be the help of `bantam run`.
//
// The options of `bantam run` that a machine file has too. They serialize to its keys, without those that
// are not given.
#[derive(Debug, clap::Args, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MachineArgs {
    /// Kernel image: bzImage or ELF (vmlinux)
    ///
    /// Needed on the command line or in the machine file, unless Bantam's own kernel is installed: a machine with a
    /// disk or an initrd boots that by default. BANTAM_KERNEL in the environment names another one for this.
    #[arg(long, value_name = "FILE", help_heading = heading::BOOT)]
    #[serde(serialize_with = "path::option::serialize")]
    pub kernel: Option<PathBuf>,

    /// Initial RAM disk
    #[arg(long, value_name = "FILE", help_heading = heading::BOOT)]
    #[serde(serialize_with = "path::option::serialize")]
    pub initrd: Option<PathBuf>,

    /// Kernel command line, in place of the default one
    ///
    /// The default is "reboot=panic_warm,k panic=-1 console=ttyS0", with --console "console=hvc0" and, if
    /// there is a disk and no initrd, "root=/dev/vda rw" (ro for a read-only disk), or "root=/dev/vda1" and so on
    /// if the first disk has partitions. To only add to it, see --append.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, help_heading = heading::BOOT)]
    pub cmdline: Option<String>,

    /// Words to add to the kernel command line; can be given more than once
    ///
    /// Arguments for the guest's init follow a word "--": --append 'init=/bin/sh -- -c "ls /"'. All
    /// that Bantam adds, and kernel parameters of other --append options, is put before that word.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, help_heading = heading::BOOT)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
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

    /// Whether the pages that the guest and its devices write are logged [default: off]
    ///
    /// The log is for differential snapshots: bantam snapshot --diff.
    #[arg(long, value_name = "on|off", help_heading = heading::CPU, hide_short_help = true,
        value_parser = switch())]
    pub track_dirty_pages: Option<bool>,

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
    /// PATH is a raw image, a block device, or a qcow2 image if its name
    /// ends in .qcow2. A comma in PATH or in a value is written twice. The
    /// guest finds the disks in the order in which they are given: /dev/vda,
    /// /dev/vdb, ... KEY=VALUE is any of
    ///
    /// - ro: the guest cannot write to it.
    /// - id=NAME: its serial number in the guest, up to 20 characters.
    /// - name=NAME: what the host calls it; its id or disk0, disk1, ... by
    ///   default.
    /// - format=raw or qcow2: the format of the image, whatever its name.
    /// - backing=off: refuses a qcow2 image that has a backing file.
    /// - block-size=512 or 4096: the block size that the guest is told; by
    ///   default that of a block device, and 512 for a file.
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
    #[serde(rename = "disk", skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,

    /// Network device for the guest; can be given more than once
    ///
    /// Where it leads is one of
    ///
    /// - user: a network that needs no rights. The guest gets an address by
    ///   DHCP, and reaches what you reach.
    /// - nat, hostonly, network=NAME: a network of the host with addresses
    ///   and names, with a way out, without, or as bantam network defines.
    /// - bridge=NAME: a bridge of the host.
    /// - macvtap=NAME: what an interface of the host leads to.
    /// - tap=NAME: a tap interface of the host.
    ///
    /// - passt=SOCKET: the Unix socket of passt or gvproxy.
    /// - fd=N: a descriptor of a tap that was opened by the program that
    ///   starts this one.
    ///
    /// Networks of the host take root, or a group that may use them.
    /// KEY=VALUE is any of
    ///
    /// - mac=MAC: the address of the guest's end.
    /// - mtu=N: the largest packet in bytes.
    /// - name=NAME: what the host calls it; net0, net1, ... by default.
    /// - queues=N: how many pairs of queues the device has, 1 to 8; one for
    ///   each vCPU by default, if the tap has them.
    /// - iothread=on: gives the device a thread of its own.
    /// - rx-bytes-per-second=N, rx-packets-per-second=N: limit what the guest
    ///   receives, such as 10M or 500, and the same with tx what it
    ///   transmits; rx-burst-bytes=N, rx-burst-packets=N, tx-burst-bytes=N
    ///   and tx-burst-packets=N say how much may come at once after a rest.
    ///
    /// with nat, hostonly and network also of
    ///
    /// - hostname=NAME: what the guest is called on the network.
    /// - filter=off: lets the guest send under any address.
    ///
    /// with tap also of
    ///
    /// - netns=NAME: the network namespace that the tap is in; a name of
    ///   ip netns, or a path.
    ///
    /// and with user also of
    ///
    /// - forward=[tcp:|udp:][ADDRESS:]PORT:GUESTPORT: a port of the host that
    ///   leads to one of the guest; can be given more than once. ADDRESS is
    ///   127.0.0.1 by default, PORT and GUESTPORT can be ranges such as
    ///   80-89, and port 0 is a free one, which is printed.
    /// - restrict=on: the guest reaches nothing, and is only reached.
    /// - allow=TARGET[:PORT[-LAST]], deny=TARGET[:PORT[-LAST]]: what the guest
    ///   may and may not reach; can be given more than once. TARGET is an
    ///   address, a network such as 192.0.2.0/24 or [2001:db8::]/32, a name
    ///   such as example.org or *.example.org, or *. With an allow, all else
    ///   is denied; a deny is stronger than an allow.
    /// - host-loopback=on: the gateway's address, 10.0.2.2, leads to the
    ///   host's 127.0.0.1.
    /// - subnet=ADDRESS/BITS: the network's addresses; 10.0.2.0/24 by
    ///   default.
    /// - dns=ADDRESS: a name server in place of the host's; can be given more
    ///   than once.
    /// - domain=NAME, hostname=NAME: what DHCP tells the guest.
    #[arg(long = "net", value_name = "user|nat|tap=NAME[,...]", help_heading = heading::NETWORKS,
        verbatim_doc_comment, value_parser = os_text::<NetConfig>())]
    #[serde(rename = "net", skip_serializing_if = "Vec::is_empty")]
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
    /// - stdio: standard input and output. If standard input is a terminal,
    ///   every key goes to the guest except Ctrl-A, which starts a command:
    ///   Ctrl-A h lists them, Ctrl-A x quits.
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
    #[serde(rename = "channel", skip_serializing_if = "Vec::is_empty")]
    pub channels: Vec<ChannelConfig>,

    /// Whether the guest has an entropy device (virtio-rng) [default: on]
    #[arg(hide_possible_values = true, long, value_name = "on|off", help_heading = heading::OTHER, value_parser = switch())]
    pub rng: Option<bool>,

    /// Who the guest is told that its machine is, by SMBIOS tables [default: no tables]
    ///
    /// Keys are manufacturer, product, version, serial, uuid, sku, family and asset-tag, as in
    /// uuid=123e4567-e89b-12d3-a456-426614174000,serial=ds=nocloud. A comma in a value is written twice.
    #[arg(long, value_name = "KEY=VALUE,...", help_heading = heading::OTHER, hide_short_help = true,
        value_parser = os_text::<SmbiosConfig>())]
    pub smbios: Option<SmbiosConfig>,

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
    #[arg(long, value_name = "N", help_heading = heading::OTHER, hide_short_help = true,
        value_parser = restart_limit)]
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
    /// Ctrl-Alt-Del, and cut its power after this time. The power is cut at once if the guest listens
    /// to neither or TIME is 0, and on a second signal, SIGQUIT and Ctrl-A x. TIME is a number of
    /// seconds, or has a unit: 500ms, 10s, 2m.
    #[arg(long, value_name = "TIME", allow_hyphen_values = true, help_heading = heading::OTHER,
        hide_short_help = true)]
    pub shutdown_timeout: Option<ShutdownTimeout>,

    /// What the exit status is about: guest or monitor [default: guest]
    ///
    /// guest: how the guest ended, as listed below. monitor: 0 however the guest ended, 1 if there
    /// was an error.
    #[arg(long, value_name = "OF", help_heading = heading::OTHER, hide_short_help = true,
        value_parser = choice::<ExitStatus, _>(["guest", "monitor"]))]
    pub exit_status: Option<ExitStatus>,

    /// What happens at a system call that a thread of Bantam never makes [default: kill]
    ///
    /// kill: the process is killed, and a line on standard error names call and thread. log: the call is made, and
    /// the kernel's audit log has it (journalctl -k). off: there are no filters. See docs/threat-model.md.
    #[arg(long, value_name = "kill|log|off", help_heading = heading::OTHER, hide_short_help = true,
        hide_possible_values = true, value_parser = choice::<Seccomp, _>(["kill", "log", "off"]))]
    pub seccomp: Option<Seccomp>,

    /// Whether Bantam can reach those files only that the machine uses [default: on]
    ///
    /// With --control, it can open any file, as clients can name one, but execute none.
    #[arg(long, value_name = "on|off", help_heading = heading::OTHER, hide_short_help = true,
        value_parser = switch())]
    pub landlock: Option<bool>,

    /// Whether the host may write a core dump of the process [default: off]
    ///
    /// The guest's memory is not in it. With off, no other process of the user can trace this one either.
    #[arg(long, value_name = "on|off", help_heading = heading::OTHER, hide_short_help = true,
        value_parser = switch())]
    pub coredump: Option<bool>,

    /// Where gdb connects to debug the guest, which waits for it
    ///
    /// WHERE is tcp:ADDRESS:PORT, such as tcp:127.0.0.1:1234, or unix:PATH, a Unix domain socket. Before its
    /// first instruction the guest waits until gdb has connected (target remote) and lets it go on. Anyone who
    /// can connect there controls the guest.
    #[arg(long, value_name = "WHERE", help_heading = heading::OTHER, hide_short_help = true,
        value_parser = os_text::<GdbConfig>())]
    pub gdb: Option<GdbConfig>,
}

/// Headings of the help, in the order in which they are shown.
pub(super) mod heading {
    /// What is started, and what it is told.
    pub const BOOT: &str = "Boot";
    /// Processors and memory.
    pub const CPU: &str = "CPU and memory";
    /// Disks.
    pub const DISKS: &str = "Disks";
    /// Connections to other machines and programs.
    pub const NETWORKS: &str = "Networks";
    /// What a user of the guest sees and types.
    pub const CONSOLE: &str = "Console";
    /// Everything else: the machine's end, other devices, the program itself.
    pub const OTHER: &str = "Other";
}

/// Returns a parser that accepts only `names`, and reads them as values.
pub(super) fn choice<T, const N: usize>(
    names: [&'static str; N],
) -> impl TypedValueParser<Value = T>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static> + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(names).try_map(|name| name.parse())
}

/// Returns a parser of values with a path in them, which need not be UTF-8.
fn os_text<T>() -> impl TypedValueParser<Value = T>
where
    T: for<'a> TryFrom<&'a OsStr, Error = ConfigError> + Clone + Send + Sync + 'static,
{
    OsStringValueParser::new().try_map(|text| T::try_from(&text))
}

pub(super) fn switch() -> impl TypedValueParser<Value = bool> {
    PossibleValuesParser::new(["on", "off"]).map(|name| name == "on")
}

fn restart_limit(text: &str) -> Result<u32, String> {
    let expected = || format!("expected a number from 0 to {}", u32::MAX);
    text.parse().map_err(|_| expected())
}
