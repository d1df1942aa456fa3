//! Hooks by which a program takes part in building a machine.

use std::fmt;
use std::io;
use std::sync::Arc;

use bantam_devices::device_log::MachineLog;
use bantam_devices::opener::Opener;
use bantam_network::PlaceKeeper;
use bantam_storage::HostOpener;

use crate::config::DeviceName;

/// What a thread of a machine does.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ThreadRole {
    /// Runs the vCPU with this index.
    Vcpu(u8),
    /// Serves all devices that have no thread of their own.
    Devices,
    /// Serves this device.
    Device(DeviceName),
    /// Serves the image of this disk, which is not raw: finds places for data, decompresses it, and changes the
    /// image's tables. It is started with the first such image, which a command can bring while the machine runs.
    Image(DeviceName),
    /// Talks to gdb.
    Debugger,
    /// Brings back the memory of a snapshot, or watches the program that does so.
    Memory,
    /// Notes which pages are touched after a restore, and writes them to a file in the end.
    Recorder,
    /// Does the job of this disk: copies its data while the guest uses it. A command starts it.
    Job(DeviceName),
}

/// A hook that is called on each thread of a machine, before the thread does anything else.
///
/// A program can name, pin or confine its threads here. All files of the machine are open by then, except
/// those that commands open later and the sockets that the guest connects to.
pub trait ThreadHook: Send + Sync {
    /// Prepares the calling thread.
    ///
    /// # Errors
    /// If the thread is not to run. The machine, or the command that needs the thread, then fails.
    fn enter(&self, role: &ThreadRole) -> io::Result<()>;
}

/// What a program gives a machine besides its configuration. By default the machine opens the host's files,
/// and there is no hook.
pub struct ControllerOptions {
    /// The log of the machine's devices. A machine that replaces another takes over its log, so that the
    /// limits on what a guest can have logged outlive a restart.
    pub log: MachineLog,
    /// Opens the machine's files.
    pub opener: Arc<dyn Opener>,
    /// The process that takes the machine's places on networks of the host, in place of this one: it executes programs,
    /// which a process that is confined cannot do ([`keep_network_places`](crate::keep_network_places)).
    pub place_keeper: Option<Arc<PlaceKeeper>>,
    /// The hook that is called on each thread of the machine.
    pub thread_hook: Option<Arc<dyn ThreadHook>>,
}

impl Default for ControllerOptions {
    fn default() -> ControllerOptions {
        ControllerOptions {
            log: MachineLog::default(),
            opener: Arc::new(HostOpener),
            place_keeper: None,
            thread_hook: None,
        }
    }
}

impl fmt::Debug for ControllerOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControllerOptions")
            .field("log", &self.log)
            .finish_non_exhaustive()
    }
}
