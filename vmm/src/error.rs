//! What can go wrong with a machine.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use bantam_devices::ListenError;
use bantam_devices::disk::DiskError;
use bantam_devices::i8042::KeyboardError;
use bantam_devices::tap::TapError;
use bantam_devices::virtio::owner::DeviceError;
use bantam_metadata::MetadataError;
use bantam_state::{RestoreError, SaveError};

use crate::config::{ConfigError, DeviceName};
use crate::host::HostError;
use crate::state::State;

/// Why a machine cannot be built, or has ended otherwise than by its guest's wish. Each displays as
/// one line with cause and remedy.
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
    /// KVM does not have an MSR that is to be changed.
    #[error(
        "cannot change MSR {index:#x}: KVM does not have it on this host; leave out what changes it"
    )]
    NoMsr {
        /// Number of the register.
        index: u32,
    },
    /// KVM does not take what an MSR would become.
    #[error(
        "cannot set MSR {index:#x} to {value:#x}: KVM does not take this value on this host; change \
         fewer of its bits, or leave out what changes it"
    )]
    MsrValue {
        /// Number of the register.
        index: u32,
        /// What it would become.
        value: u64,
    },
    /// There is no memory for the guest.
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
    /// The host makes no huge pages of ordinary ones.
    #[error(
        "cannot make guest memory of transparent huge pages: {0}: the host's kernel has none \
         (CONFIG_TRANSPARENT_HUGEPAGE); use ordinary pages"
    )]
    TransparentHugePages(#[source] io::Error),
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
    /// What the kernel is told at its start cannot be written.
    #[error("cannot start the kernel: {0}")]
    StartInformation(#[from] bantam_boot::StartInformationError),
    /// The host gives no random bytes.
    #[error("cannot get random bytes from the host: {0}")]
    RandomSeed(#[source] io::Error),
    /// The tables that describe the machine cannot be made.
    #[error("cannot describe the machine to the guest: {0}")]
    Tables(#[from] bantam_arch::Error),
    /// Two devices of the machine are in each other's way.
    #[error(transparent)]
    Bus(#[from] bantam_devices::bus::BusError),
    /// A disk cannot be used.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The machine's state does not allow what was asked for.
    #[error("cannot {action}: it is {state}; {remedy}", remedy = .state.remedy())]
    WrongState {
        /// What was to be done.
        action: &'static str,
        /// The state that does not allow it.
        state: State,
    },
    /// A vCPU has not left the guest.
    #[error(
        "cannot pause the machine: a vCPU has not left the guest within {seconds} s; it goes on, and can \
         be paused when the host has more time for it"
    )]
    PauseTimeout {
        /// How long it was waited for.
        seconds: u64,
    },
    /// A device does not come to rest, or cannot go on.
    #[error("cannot {action}: {source}")]
    DeviceLife {
        /// What was to be done.
        action: &'static str,
        /// Which device, and what the host says.
        source: io::Error,
    },
    /// The machine has no such device.
    #[error("the machine has no device '{name}'")]
    NoSuchDevice {
        /// The name that was asked for.
        name: DeviceName,
    },
    /// A device cannot do what it was asked for.
    #[error("{name}: {source}")]
    Device {
        /// The device.
        name: DeviceName,
        /// Why not.
        source: DeviceError,
    },
    /// A thread cannot be started.
    #[error("cannot start thread '{name}': {source}")]
    Thread {
        /// Its name.
        name: String,
        /// What the host says, or the program's hook.
        source: io::Error,
    },
    /// The machine could not be started, and has ended for that reason.
    #[error(transparent)]
    Shared(Arc<Error>),
    /// The machine has no metadata.
    #[error("the machine has no metadata: give it some before it starts")]
    NoMetadata,
    /// A disk is to be served by io_uring, and the host has none.
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
    /// A socket of a device cannot be had.
    #[error("cannot listen on '{path}' for {purpose}: {source}", path = .path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// The device.
        purpose: String,
        /// Why not.
        source: ListenError,
    },
    /// Metadata cannot be kept.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// The host's end of the serial port, the console or a channel cannot be used.
    #[error("cannot {action}: {source}{remedy}")]
    Serial {
        /// What was being done, to what.
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
    /// The host is out of something small: file descriptors, threads.
    #[error("cannot create {what}: {source}")]
    Resource {
        /// What could not be had.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The guest takes no keys.
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
    /// The event loop cannot go on.
    #[error("the device event loop failed: {0}")]
    EventLoop(#[from] event_manager::Error),
    /// A thread of the machine panicked, which is a bug of the monitor.
    #[error("a thread of the machine panicked: this is a bug, please report it with the log")]
    Panic,
    /// What the guest wrote could not be brought to stable storage at the end.
    #[error("cannot flush disk '{path}' at the end: {source}", path = .path.display())]
    Flush {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The guest shut a vCPU down by faulting while it handled a fault that it could not handle.
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
    /// The guest ran an instruction that KVM cannot run for it.
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
    /// KVM stopped running a vCPU.
    #[error("KVM cannot run vCPU {vcpu}: {reason} (registers are in the log at level error)")]
    Vcpu {
        /// Index of the vCPU.
        vcpu: u8,
        /// What KVM said.
        reason: String,
    },
}

impl Error {
    /// For `map_err` on a request to KVM that was to `action`.
    pub(crate) fn kvm(action: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
        move |source| Error::Kvm { action, source }
    }

    /// For `map_err` on the creation of `what`.
    pub(crate) fn resource(what: &'static str) -> impl Fn(io::Error) -> Error {
        move |source| Error::Resource { what, source }
    }
}
