//! What can go wrong with a machine.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bantam_devices::ListenError;
use bantam_devices::i8042::KeyboardError;
use bantam_devices::tap::TapError;
use bantam_devices::virtio::owner::{DeviceError, SnapshotError};
use bantam_memory::UserfaultError;
use bantam_metadata::MetadataError;
use bantam_migration::MigrationError;
use bantam_snapshot::SnapshotError as SnapshotFileError;
use bantam_state::{RestoreError, SaveError};
use bantam_storage::DiskError;

use crate::config::{ConfigError, DeviceName};
use crate::host::HostError;
use crate::memory_load::MemoryServerError;
use crate::state::State;

/// Why a machine cannot do what it was asked to do, or why it has failed. Each error displays as one line
/// with cause and remedy.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration contradicts itself.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The host cannot run machines.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A request to KVM failed.
    #[error("KVM cannot {action}: {source}")]
    Kvm {
        /// What was asked of it.
        action: &'static str,
        /// Why not.
        source: kvm_ioctls::Error,
    },
    /// KVM does not have an MSR that the configuration changes.
    #[error(
        "cannot change MSR {index:#x}: KVM does not have it on this host; leave out what changes it"
    )]
    NoMsr {
        /// Number of the register.
        index: u32,
    },
    /// KVM does not accept the value that an MSR would get.
    #[error(
        "cannot set MSR {index:#x} to {value:#x}: KVM does not take this value on this host; change \
         fewer of its bits, or leave out what changes it"
    )]
    MsrValue {
        /// Number of the register.
        index: u32,
        /// The value.
        value: u64,
    },
    /// Guest memory cannot be reserved.
    #[error("cannot reserve {mib} MiB of guest memory: {reason}; give it less memory")]
    Memory {
        /// How much was asked for.
        mib: u64,
        /// Why not.
        reason: String,
    },
    /// The host has too few huge pages for the guest.
    #[error(
        "cannot reserve {mib} MiB of guest memory in pages of 2 MiB: {source}: {remedy}, or give it \
         less memory"
    )]
    HugePages {
        /// How much was asked for.
        mib: u64,
        /// Why not.
        source: io::Error,
        /// What to do about it, as a continuation of the line.
        remedy: String,
    },
    /// The host does not support transparent huge pages.
    #[error(
        "cannot make guest memory of transparent huge pages: {0}: the host's kernel has none \
         (CONFIG_TRANSPARENT_HUGEPAGE); use ordinary pages"
    )]
    TransparentHugePages(#[source] io::Error),
    /// Guest memory cannot be filled when it is touched.
    #[error("cannot bring guest memory back when it is touched: {0}")]
    Userfault(#[from] UserfaultError),
    /// Another program does not serve guest memory.
    #[error(transparent)]
    MemoryServer(#[from] MemoryServerError),
    /// The memory of a snapshot cannot be read any more.
    #[error(
        "the machine cannot go on without its memory: {0}; restore it again from files that stay as they are"
    )]
    MemoryFile(#[source] SnapshotFileError),
    /// The host cannot give the machine the memory of a snapshot.
    #[error("the machine cannot go on without its memory: {0}")]
    FillMemory(#[source] io::Error),
    /// The working set of a snapshot cannot be recorded.
    #[error("cannot record the working set: {0}")]
    WorkingSet(&'static str),
    /// The kernel image cannot be opened.
    #[error("cannot open kernel '{path}': {source}", path = .path.display())]
    OpenKernel {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The kernel image cannot be loaded.
    #[error("cannot load kernel '{path}': {source}", path = .path.display())]
    LoadKernel {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: bantam_boot::KernelError,
    },
    /// The loaded kernel cannot be read back from guest memory.
    #[error("cannot examine the loaded kernel: {0}")]
    ReadKernel(vm_memory::GuestMemoryError),
    /// The initrd cannot be opened.
    #[error("cannot open initrd '{path}': {source}", path = .path.display())]
    OpenInitrd {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The initrd cannot be loaded.
    #[error("cannot load initrd '{path}': {source}", path = .path.display())]
    LoadInitrd {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: bantam_boot::InitrdError,
    },
    /// The kernel command line is not valid.
    #[error("invalid kernel command line: {0}")]
    CommandLine(#[from] bantam_boot::CommandLineError),
    /// The boot information for the kernel cannot be written.
    #[error("cannot start the kernel: {0}")]
    StartInformation(#[from] bantam_boot::StartInformationError),
    /// The host does not provide random bytes.
    #[error("cannot get random bytes from the host: {0}")]
    RandomSeed(#[source] io::Error),
    /// The tables that describe the machine cannot be built.
    #[error("cannot describe the machine to the guest: {0}")]
    Tables(#[from] bantam_arch::Error),
    /// Two devices of the machine claim the same ports or addresses.
    #[error(transparent)]
    Bus(#[from] bantam_devices::bus::BusError),
    /// A disk cannot be used.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The machine's state does not allow the action.
    #[error("cannot {action}: it is {state}; {remedy}", remedy = .state.remedy())]
    WrongState {
        /// What was to be done.
        action: &'static str,
        /// The state that does not allow it.
        state: State,
    },
    /// A vCPU has not left the guest in time.
    #[error(
        "cannot pause the machine: a vCPU has not left the guest within {seconds} s; it goes on, and can \
         be paused when the host has more time for it"
    )]
    PauseTimeout {
        /// How many seconds it was waited for.
        seconds: u64,
    },
    /// A device does not come to rest, cannot go on, or cannot tell the guest of a restore.
    #[error("cannot {action}: {source}")]
    DeviceLife {
        /// What was to be done.
        action: &'static str,
        /// The device, and the host's error.
        source: io::Error,
    },
    /// The machine has no such device.
    #[error("the machine has no device '{name}'")]
    NoSuchDevice {
        /// The name that was asked for.
        name: DeviceName,
    },
    /// A device cannot do what it was asked to do.
    #[error("{name}: {source}")]
    Device {
        /// The device.
        name: DeviceName,
        /// Why not.
        source: DeviceError,
    },
    /// No snapshot of disks was taken. All keep the images that they have.
    #[error("no snapshot is taken: {0}")]
    Snapshot(#[from] SnapshotError),
    /// A snapshot of the machine cannot be written or read.
    #[error(transparent)]
    SnapshotFile(#[from] SnapshotFileError),
    /// The image of a disk cannot be examined after a snapshot.
    #[error("cannot examine disk '{path}' after the snapshot: {source}", path = .path.display())]
    FrozenDisk {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The image of a disk is not as it was at the snapshot.
    #[error(
        "disk '{path}' has been changed since the snapshot: use the image that it was then, or take this one by \
         force",
        path = .path.display()
    )]
    ChangedDisk {
        /// The image.
        path: PathBuf,
    },
    /// A snapshot in files has no descriptors for other processes.
    #[error("the snapshot is in files: have the other process open them by their names")]
    NotFork,
    /// A differential snapshot was to be based on one of another machine.
    #[error(
        "snapshot '{path}' cannot be the base: its machine has other memory",
        path = .path.display()
    )]
    OtherMemory {
        /// The state file of the base.
        path: PathBuf,
    },
    /// The host does not answer, so a command for several devices is given up.
    #[error("the host does not answer within {seconds} s: try again when it does")]
    NoAnswer {
        /// How many seconds it was waited for.
        seconds: u64,
    },
    /// The machine cannot be moved.
    #[error("cannot move the machine: {0}")]
    Migration(#[from] MigrationError),
    /// A destination has the name of a host, which the process of a machine does not look up.
    #[error(
        "the machine was not moved: '{destination}' has the name of a host, which its process does not look up; give the \
         address of the host"
    )]
    NamedDestination {
        /// The destination.
        destination: bantam_migration::Address,
    },
    /// The memory of a machine would cross a network for others to read.
    #[error(
        "the machine was not moved: its memory would cross a network unencrypted, for others to read and change; use \
         tls:// or ssh://, or allow it (--insecure)"
    )]
    InsecureMigration,
    /// More connections are wanted than a migration can have.
    #[error("the machine was not moved: a migration has at most {limit} connections")]
    TooManyConnections {
        /// How many it can have.
        limit: u8,
    },
    /// The machine writes to its memory faster than that can be copied.
    #[error(
        "the machine was not moved: it writes to its memory so fast that {mib} MiB are left, too much for the {} ms for \
         which it may stand still; allow more, or have it stand still when the time is over",
        downtime.as_millis()
    )]
    Converge {
        /// How much is left.
        mib: u64,
        /// For how long it may stand still.
        downtime: Duration,
    },
    /// The image of a disk of a machine that is offered is not there.
    #[error(
        "cannot find disk '{path}' here: {source}; both ends need the same images, by shared storage for example, or name \
         another path at this end",
        path = .path.display()
    )]
    ArrivingDisk {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Nobody knows whether the machine was moved.
    #[error(
        "it is not known whether the machine runs at the other end: {0}; it stands still here: look there, and if it does not \
         run, take it back"
    )]
    HandOver(#[source] MigrationError),
    /// The machine may run elsewhere.
    #[error(
        "cannot {action}: the machine was moved, and may run elsewhere; if it does not, take it back"
    )]
    HandedOver {
        /// What was to be done.
        action: &'static str,
    },
    /// The machine was not handed over.
    #[error("the machine was not moved: there is nothing to take back")]
    NotHandedOver,
    /// A thread cannot be started.
    #[error("cannot start thread '{name}': {source}")]
    Thread {
        /// Its name.
        name: String,
        /// The error of the host, or of the program's hook.
        source: io::Error,
    },
    /// The machine could not be started, and this error ended it.
    #[error(transparent)]
    Shared(Arc<Error>),
    /// The machine has no metadata.
    #[error("the machine has no metadata: give it some before it starts")]
    NoMetadata,
    /// A disk is to be served by io_uring, which the host does not offer.
    #[error(
        "cannot serve disk '{path}' by io_uring: {source}; leave out 'engine=io_uring', or see \
         'bantam check'",
        path = .path.display()
    )]
    IoUring {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A network interface cannot be used.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A user network cannot be opened.
    #[error(transparent)]
    UserNetwork(#[from] bantam_usernet::OpenError),
    /// A network of the host cannot be used.
    #[error(transparent)]
    Network(#[from] bantam_network::NetworkError),
    /// The device of a tap beside another interface cannot be opened.
    #[error(
        "cannot open '{path}' for a tap beside another interface: {source}; /dev has to show the host's devices",
        path = .path.display()
    )]
    OpenTapDevice {
        /// The device.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A network namespace cannot be entered.
    #[error("cannot enter network namespace '{path}': {source}{remedy}", path = .path.display())]
    Namespace {
        /// The namespace.
        path: PathBuf,
        /// Why not.
        source: io::Error,
        /// What may help, as a continuation of the line.
        remedy: &'static str,
    },
    /// The program that is a device's network cannot be reached.
    #[error(
        "cannot connect to '{}' for a network device: {source}{}",
        path.display(),
        socket_remedy(source)
    )]
    NetSocket {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A socket of a device cannot be opened.
    #[error("cannot listen on '{path}' for {purpose}: {source}", path = .path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// The device.
        purpose: String,
        /// Why not.
        source: ListenError,
    },
    /// A TCP port cannot be listened on for gdb.
    #[error("cannot listen on {address} for gdb: {source}; choose another address")]
    ListenTcp {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// Metadata cannot be stored.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// The host's end of the serial port, the console or a channel cannot be used.
    #[error("cannot {action}: {source}{remedy}")]
    Serial {
        /// What was being done.
        action: String,
        /// Why it failed.
        source: io::Error,
        /// What to do about it, as a continuation of the line.
        remedy: &'static str,
    },
    /// One end of the program's [`Console`](crate::Console) would hold up all devices.
    #[error(
        "cannot use the console's {end}: it is a blocking descriptor, which would hold up all devices: set \
         O_NONBLOCK on it, or pass a pipe of your own"
    )]
    BlockingConsole {
        /// Which.
        end: &'static str,
    },
    /// The host is out of a resource such as file descriptors or threads.
    #[error("cannot create {what}: {source}")]
    Resource {
        /// What could not be created.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The guest does not take keys.
    #[error(
        "cannot press Ctrl-Alt-Del: {0}: wait until its driver for AT keyboards has started, or press \
         the power button"
    )]
    Keyboard(#[source] KeyboardError),
    /// State cannot be saved.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// State that was saved cannot be used.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// The event loop failed.
    #[error("the device event loop failed: {0}")]
    EventLoop(#[from] event_manager::Error),
    /// A thread of the machine panicked, which is a bug in the monitor.
    #[error("a thread of the machine panicked: this is a bug, please report it with the log")]
    Panic,
    /// What the guest wrote could not be flushed to stable storage.
    #[error("cannot flush disk '{path}': {source}", path = .path.display())]
    Flush {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The guest shut a vCPU down by a triple fault.
    #[error(
        "the guest crashed: triple fault of vCPU {vcpu} at {rip:#x} (registers are in the log at \
         level error)"
    )]
    TripleFault {
        /// Index of the vCPU.
        vcpu: u8,
        /// Its instruction pointer.
        rip: u64,
    },
    /// The guest ran an instruction that KVM cannot emulate.
    #[error(
        "KVM cannot emulate the instruction at {rip:#x} of vCPU {vcpu}, bytes {bytes}: {remedy}"
    )]
    Emulation {
        /// Index of the vCPU.
        vcpu: u8,
        /// Its instruction pointer.
        rip: u64,
        /// The instruction bytes in hexadecimal, as far as they are known.
        bytes: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// KVM cannot run a vCPU any further.
    #[error("KVM cannot run vCPU {vcpu}: {reason} (registers are in the log at level error)")]
    Vcpu {
        /// Index of the vCPU.
        vcpu: u8,
        /// What KVM said.
        reason: String,
    },
}

impl Error {
    /// Returns a closure for `map_err` on a request to KVM that was to `action`.
    pub(crate) fn kvm(action: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
        move |source| Error::Kvm { action, source }
    }

    /// Returns a closure for `map_err` on the creation of `what`.
    pub(crate) fn resource(what: &'static str) -> impl Fn(io::Error) -> Error {
        move |source| Error::Resource { what, source }
    }
}

/// Says what helps if a program cannot be reached by its socket.
fn socket_remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            "; nobody listens there, so start passt, gvproxy or the like before"
        }
        _ => "",
    }
}
