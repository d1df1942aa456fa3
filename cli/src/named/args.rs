//! The command lines for named machines.

use std::os::fd::RawFd;
use std::path::PathBuf;

use bantam_manager::{MachineName, RestartPolicy};
use bantam_storage::parse_size;
use bantam_vmm::config::{
    DeviceName, DiskConfig, DiskFormatOption, MemorySize, NetConfig, ShutdownTimeout, VcpuCount,
};
use clap::{Args, Subcommand, ValueEnum};

use super::first_boot::FirstBootArgs;
use super::images::ImagesArgs;
use super::sysprep::{OperationArgs, SysprepArgs};
use crate::args::MachineArgs;

#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub enum NamedCommand {
    /// Defines a named machine from options, and starts it with --start
    ///
    /// The machine is kept under its name until it is undefined. Options are those of bantam run; the serial port, or what
    /// else leads to stdio, is the console of bantam console. A reboot starts the machine again unless --on-reboot exit is
    /// given. See docs/machines.md.
    Create(Box<CreateArgs>),
    /// Defines a named machine by a machine file, or changes one
    ///
    /// A machine that runs changes at its next start.
    Define(Box<DefineArgs>),
    /// Forgets a named machine that does not run
    Undefine(UndefineArgs),
    /// Gives a named machine that does not run another name
    Rename(RenameArgs),
    /// Makes a named machine that is like another, with disks of its own
    ///
    /// The other one must not run. Its disks are copied, or shared block by block if the file system can. Those of a template
    /// are the base of overlays, so that a clone takes no time and little room. The identity of the system on the disks of a
    /// template's clone is reset: host name, machine id, SSH host keys, UUIDs. See docs/identity.md.
    Clone(CloneArgs),
    /// Resets the identity of the system on the disks of a machine that does not run, or on a disk image
    ///
    /// Host name, machine id, SSH host keys, UUIDs and other things that two systems must not have in common are changed inside
    /// a small helper machine. If it fails, nothing is changed. See docs/identity.md.
    Sysprep(Box<SysprepArgs>),
    /// Makes a named machine a template, which is not started but cloned
    Template(TemplateArgs),
    /// Keeps images that machines are made of: adds, lists and removes them
    ///
    /// They are in a folder beside the machines, and bantam create --image finds them by their names. See
    /// docs/cloud-init.md. bantam image, another command, makes and examines disk images.
    Images(Box<ImagesArgs>),
    /// Lists named machines: those that run, or all
    List(ListArgs),
    /// Starts a named machine, and returns when its guest runs
    ///
    /// The machine goes on from its managed save, if it has one.
    Start(StartArgs),
    /// Asks the guest of a named machine to shut itself down
    ///
    /// The guest is asked by the power button or by Ctrl-Alt-Del, and takes its time. If it listens to neither, it goes on,
    /// unless there is a --timeout.
    Shutdown(ShutdownArgs),
    /// Asks the guest of a named machine to reboot
    ///
    /// By Ctrl-Alt-Del; a guest that does not listen to that is asked to shut down by the power button, and started again.
    Reboot(NameArgs),
    /// Cuts the power of a named machine, and starts it again
    Reset(NameArgs),
    /// Ends a named machine as if its power were cut
    Destroy(DestroyArgs),
    /// Has the guest of a named machine stand still
    Suspend(NameArgs),
    /// Lets the guest of a named machine go on after suspend
    Resume(NameArgs),
    /// Saves the state of a named machine in a directory, and ends it
    ///
    /// bantam restore DIRECTORY starts the machine again from there.
    Save(SaveArgs),
    /// Saves the state of a named machine, and ends it; its next start goes on from there
    Managedsave(ManagedsaveArgs),
    /// Shows what is known of a named machine
    Dominfo(OutputArgs),
    /// Shows the state of a named machine
    Domstate(DomstateArgs),
    /// Shows what named machines have used: processor time, memory, disks, networks
    Domstats(DomstatsArgs),
    /// Shows what the named machines that run use, in a table that renews itself
    ///
    /// At a terminal, q quits, and c, m, d, n and a sort by CPU, memory, disks, networks and name.
    Top(TopArgs),
    /// Lists the disks of a named machine
    Domblklist(OutputArgs),
    /// Lists the network devices of a named machine
    Domiflist(OutputArgs),
    /// Lists the addresses of a named machine that are known
    ///
    /// Those of user networks, leases of networks of the host, and neighbours of the host on bridges and taps.
    Domifaddr(OutputArgs),
    /// Logs in to a named machine by ssh, whose address is looked up
    Ssh(SshArgs),
    /// Prints the machine file of a named machine
    Dumpcfg(DumpcfgArgs),
    /// Prints a named machine as libvirt's domain XML
    ///
    /// It is what the machine is at its next start; of one that runs, the memory that its guest is to have now. See
    /// docs/libvirt-xml.md.
    Dumpxml(DumpxmlArgs),
    /// Attaches the terminal to the console of a named machine
    ///
    /// First comes the last output, up to 256 KiB. Ctrl-] and Ctrl-A d detach, and the machine goes on. Ctrl-A a sends
    /// Ctrl-A to the guest.
    Console(ConsoleArgs),
    /// Edits the machine file of a named machine in $VISUAL or $EDITOR
    ///
    /// The file is checked before it counts.
    Edit(NameArgs),
    /// Has the guest of a named machine give memory back, or take it back, by its balloon
    Setmem(SetmemArgs),
    /// Sets the number of vCPUs of a named machine from its next start on
    Setvcpus(SetvcpusArgs),
    /// Makes a disk of a named machine that runs larger
    Blockresize(BlockresizeArgs),
    /// Gives a named machine a disk from its next start on
    AttachDisk(Box<AttachDiskArgs>),
    /// Takes a disk from a named machine from its next start on; its image stays
    DetachDisk(DetachDiskArgs),
    /// Gives a named machine a network device from its next start on
    AttachInterface(Box<AttachInterfaceArgs>),
    /// Takes a network device from a named machine from its next start on
    DetachInterface(DetachInterfaceArgs),
    /// Has a disk of a named machine use another image, at once if the machine runs
    ChangeMedia(ChangeMediaArgs),
    /// Has systemd start a named machine with the host, or with your session
    Autostart(AutostartArgs),
    /// Prints what happens to named machines from now on
    Events(EventsArgs),
    /// The process of a named machine
    #[command(hide = true)]
    MachineProcess(ProcessArgs),
}

// A machine.
#[derive(Debug, Args)]
pub struct NameArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
}

/// How something is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people
    #[default]
    Text,
    /// For programs
    Json,
}

// A machine, and a form of the output.
#[derive(Debug, Args)]
pub struct OutputArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// Form of the output
    #[arg(long, value_enum, default_value_t)]
    pub output: Output,
}

#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Name of the machine
    ///
    /// Up to 64 letters, digits, dots, underscores and dashes. Names that differ only by case are the same.
    pub name: MachineName,

    /// Start the machine
    #[arg(long)]
    pub start: bool,

    /// When the machine is started again if it ends by itself: never, on-failure or always
    ///
    /// Restarts that follow one another are slowed down, up to 10 seconds each.
    #[arg(long, value_name = "POLICY", default_value_t)]
    pub restart: RestartPolicy,

    /// Machine file with options for this command, in TOML, as for bantam run
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    #[command(flatten)]
    pub machine: MachineArgs,

    #[command(flatten)]
    pub first_boot: FirstBootArgs,
}

#[derive(Debug, Args)]
pub struct DefineArgs {
    /// Machine file in TOML, or libvirt's domain XML
    pub file: PathBuf,
    /// Name of the machine; by default that of the file without .toml, or the one in the XML
    #[arg(long, value_name = "MACHINE")]
    pub name: Option<MachineName>,
    /// When the machine is started again if it ends by itself: never, on-failure or always
    #[arg(long, value_name = "POLICY")]
    pub restart: Option<RestartPolicy>,
    /// Kernel for XML that has none, or in place of the one that it has
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk to go with --kernel
    #[arg(long, value_name = "PATH", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// Words for the end of the kernel command line, to go with --kernel
    #[arg(
        long,
        value_name = "WORDS",
        requires = "kernel",
        allow_hyphen_values = true
    )]
    pub append: Option<String>,
}

#[derive(Debug, Args)]
pub struct UndefineArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// Remove the images of the disks that the machine writes to
    ///
    /// Images that other machines use, block devices and backing files are kept.
    #[arg(long)]
    pub remove_all_storage: bool,
    /// Remove its snapshots
    #[arg(long)]
    pub snapshots: bool,
    /// Remove its managed save
    #[arg(long)]
    pub managed_save: bool,
}

#[derive(Debug, Args)]
pub struct RenameArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// The new name
    pub new_name: MachineName,
}

#[derive(Debug, Args)]
pub struct CloneArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// The name of the new one
    pub new_name: MachineName,
    /// Make overlays of the disks of a template; the default for templates
    #[arg(long, conflicts_with = "full")]
    pub linked: bool,
    /// Copy the disks; the default for other machines
    #[arg(long)]
    pub full: bool,
    /// Reset the identity of the system on the disks, as bantam sysprep does; the default for templates
    #[arg(long)]
    pub reset_identity: bool,
    /// Leave the identity that of the template
    #[arg(long, conflicts_with_all = ["reset_identity", "operations"])]
    pub keep_identity: bool,
    #[command(flatten)]
    pub chosen: OperationArgs,
    /// Start the new machine
    #[arg(long)]
    pub start: bool,
}

#[derive(Debug, Args)]
pub struct TemplateArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// Make it an ordinary machine again, if it has no linked clones
    #[arg(long)]
    pub off: bool,
}

#[derive(Debug, Args)]
pub struct AttachDiskArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// The disk, as for --disk of bantam run: PATH[,KEY=VALUE]...
    #[arg(value_name = "DISK")]
    pub disk: DiskConfig,
}

#[derive(Debug, Args)]
pub struct DetachDiskArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// The disk: its name on the host, as bantam domblklist prints it
    pub disk: DeviceName,
}

#[derive(Debug, Args)]
pub struct AttachInterfaceArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// The network device, as for --net of bantam run, such as user or nat
    #[arg(value_name = "NET")]
    pub net: NetConfig,
}

#[derive(Debug, Args)]
pub struct DetachInterfaceArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// The network device: its name on the host, as bantam domiflist prints it
    pub interface: DeviceName,
}

#[derive(Debug, Args)]
pub struct ChangeMediaArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// The disk: its name on the host, as bantam domblklist prints it
    pub disk: DeviceName,
    /// The image
    pub path: PathBuf,
    /// Format of the image; by default it follows from its name
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<DiskFormatOption>,
}

#[derive(Debug, Args)]
pub struct SshArgs {
    /// The machine, with the name of a user before it if that is another: admin@web
    #[arg(value_name = "[USER@]MACHINE")]
    pub target: String,
    /// Options of ssh, or a command for the machine
    #[arg(
        value_name = "ARGUMENT",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub arguments: Vec<String>,
}

#[derive(Debug, Args)]
pub struct ListArgs {
    /// List those that do not run too
    #[arg(long)]
    pub all: bool,
    /// Print names only
    #[arg(long)]
    pub name: bool,
    /// Form of the output
    #[arg(long, value_enum, default_value_t)]
    pub output: Output,
}

#[derive(Debug, Args)]
pub struct StartArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// Attach the terminal to the console
    #[arg(long)]
    pub console: bool,
    /// Boot the kernel, and throw a managed save away
    #[arg(long)]
    pub force_boot: bool,
    /// Give the guest another instance id, so that cloud-init sets it up anew
    #[arg(long)]
    pub new_instance: bool,
}

#[derive(Debug, Args)]
pub struct ShutdownArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// Return when the machine has ended
    #[arg(long)]
    pub wait: bool,
    /// Cut the power after this time; it may have a unit: 500ms, 10s, 2m [default: no limit]
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub timeout: Option<ShutdownTimeout>,
}

#[derive(Debug, Args)]
pub struct DestroyArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// Ask the guest to shut itself down first, and give it 10 seconds
    #[arg(long)]
    pub graceful: bool,
}

#[derive(Debug, Args)]
pub struct SaveArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// Directory for the state, in the place of an earlier one
    pub directory: PathBuf,
}

#[derive(Debug, Args)]
pub struct ManagedsaveArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// Throw the saved state away instead
    #[arg(long)]
    pub remove: bool,
}

#[derive(Debug, Args)]
pub struct DomstateArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// Show also what has led to it
    #[arg(long)]
    pub reason: bool,
    /// Form of the output
    #[arg(long, value_enum, default_value_t)]
    pub output: Output,
}

#[derive(Debug, Args)]
pub struct TopArgs {
    /// Time between two tables
    #[arg(long, short, value_name = "SECONDS", default_value_t = 2,
        value_parser = clap::value_parser!(u16).range(1..))]
    pub delay: u16,
    /// Print so many tables, and end
    #[arg(long, short = 'n', value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub count: Option<u32>,
    /// What the machines are sorted by
    #[arg(long, value_enum, default_value_t)]
    pub sort: TopOrder,
    /// Form of the output
    #[arg(long, value_enum, default_value_t)]
    pub output: Output,
}

/// What the lines of `bantam top` are sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum TopOrder {
    /// Processor time
    #[default]
    Cpu,
    /// Memory of the process, that of the guest included
    Memory,
    /// Bytes read and written
    Disk,
    /// Bytes received and sent
    Network,
    /// Name
    Name,
}

#[derive(Debug, Args)]
pub struct DomstatsArgs {
    /// The machines; those that run by default
    #[arg(value_name = "MACHINE")]
    pub names: Vec<MachineName>,
    /// Print what is used in each interval of this many seconds, until interrupted
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1",
        value_parser = clap::value_parser!(u16).range(1..))]
    pub watch: Option<u16>,
    /// Form of the output
    #[arg(long, value_enum, default_value_t)]
    pub output: Output,
}

#[derive(Debug, Args)]
pub struct DumpcfgArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// Print what the machine that runs is, with all changes since its start
    #[arg(long)]
    pub live: bool,
}

#[derive(Debug, Args)]
pub struct DumpxmlArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// Print what it is at its next start, also in its memory
    #[arg(long)]
    pub inactive: bool,
}

#[derive(Debug, Args)]
pub struct ConsoleArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
}

#[derive(Debug, Args)]
pub struct SetmemArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// The memory that the guest is to have, such as 512M; a number alone counts MiB
    pub size: MemorySize,
}

#[derive(Debug, Args)]
pub struct SetvcpusArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// Number of vCPUs, 1 to 32
    #[arg(value_name = "N")]
    pub count: VcpuCount,
}

#[derive(Debug, Args)]
pub struct BlockresizeArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// The disk: its name on the host, as bantam domblklist prints it
    pub disk: DeviceName,
    /// The size, such as 20G; a number alone counts bytes
    #[arg(value_parser = parse_size)]
    pub size: u64,
}

#[derive(Debug, Args)]
pub struct AutostartArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// Do not start it any more
    #[arg(long)]
    pub disable: bool,
}

#[derive(Debug, Args)]
pub struct EventsArgs {
    /// The machine; all machines by default
    #[arg(value_name = "MACHINE")]
    pub name: Option<MachineName>,
    /// Form of the output
    #[arg(long, value_enum, default_value_t)]
    pub output: Output,
}

#[derive(Debug, Args)]
pub struct ProcessArgs {
    /// The machine
    pub name: MachineName,
    /// The folder of all machines
    #[arg(long)]
    pub machines: PathBuf,
    /// The folder of their sockets
    #[arg(long)]
    pub runtime: PathBuf,
    /// Directory of the state to go on from
    #[arg(long)]
    pub from: Option<PathBuf>,
    /// The state is that of a snapshot
    #[arg(long)]
    pub reverted: bool,
    /// Numbers of the descriptors of the connections by which the machine arrives
    #[arg(long)]
    pub connection: Vec<RawFd>,
}

#[derive(Debug, Args)]
pub struct SnapshotCreateArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// Name of the snapshot; the time in seconds since 1970 by default
    pub snapshot: Option<MachineName>,
    /// What you want to know of it later
    #[arg(long, value_name = "TEXT")]
    pub description: Option<String>,
    /// Leave out the memory of a machine that runs
    #[arg(long)]
    pub disk_only: bool,
}

#[derive(Debug, Args)]
pub struct SnapshotListArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// Print names only
    #[arg(long = "name")]
    pub only_names: bool,
    /// Form of the output
    #[arg(long, value_enum, default_value_t)]
    pub output: Output,
}

#[derive(Debug, Args)]
pub struct SnapshotNameArgs {
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub name: MachineName,
    /// The snapshot
    pub snapshot: MachineName,
}
