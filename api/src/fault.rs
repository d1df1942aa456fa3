//! Why a request is refused.

use std::io;
use std::path::Path;

use bantam_vmm::MetadataError;
use bantam_vmm::config::ConfigError;
use bantam_vmm::text::without_error_numbers;

/// Why a request is refused: one line, which a client finds as `fault_message`.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// No resource has this path and method.
    #[error("Invalid request method and/or path: {method} {path}")]
    NoSuchResource {
        /// The method.
        method: String,
        /// The path.
        path: String,
    },
    /// The body is not JSON, or not that of the resource.
    #[error("Invalid JSON body: {field}{message}")]
    Body {
        /// The field that is wrong with a colon after it, or nothing.
        field: String,
        /// What is wrong with it, and where.
        message: String,
    },
    /// A request that needs a body has none.
    #[error("Empty {method} request: a JSON body is needed")]
    EmptyBody {
        /// The method.
        method: &'static str,
    },
    /// A request to read has a body.
    #[error("GET request cannot have a body")]
    BodyOfGet,
    /// The body names another resource than the path.
    #[error("The id from the path '{path}' does not match the id from the body '{body}'")]
    OtherId {
        /// In the path.
        path: String,
        /// In the body.
        body: String,
    },
    /// A name that a device cannot have.
    #[error("Invalid id '{id}': only letters, digits and underscores are allowed")]
    Id {
        /// The name.
        id: String,
    },
    /// The request is allowed only before the start.
    #[error("The requested operation is not supported after starting the microVM")]
    AfterStart,
    /// The request is allowed only after the start.
    #[error("The requested operation is not supported before starting the microVM")]
    BeforeStart,
    /// This version does not support it.
    #[error("{what}: not supported by this version of Bantam")]
    NotSupported {
        /// What was asked for.
        what: String,
    },
    /// The configuration has no device with this name.
    #[error("There is no {kind} '{id}'")]
    NoSuchDevice {
        /// What kind of device.
        kind: &'static str,
        /// Its name.
        id: String,
    },
    /// The configuration does not have the one device of a kind.
    #[error("There is no {kind}: it has not been configured")]
    NotConfigured {
        /// What kind of device.
        kind: &'static str,
    },
    /// The state of the machine or its guest does not allow it.
    #[error("{0}")]
    NotNow(&'static str),
    /// A value that cannot be used.
    #[error("Invalid {what}: {reason}")]
    Value {
        /// What the value is for.
        what: &'static str,
        /// Why not.
        reason: String,
    },
    /// A file that cannot be used.
    #[error("Cannot open {what} '{path}': {reason}")]
    File {
        /// What it is for.
        what: &'static str,
        /// The file.
        path: String,
        /// Why not.
        reason: String,
    },
    /// The program would write to a file that the machine uses.
    #[error(
        "Cannot use {what} '{path}': it is a disk, the kernel or the initrd; choose another file"
    )]
    MachineFile {
        /// What would be written there.
        what: &'static str,
        /// The file.
        path: String,
    },
    /// A snapshot can be taken of a paused machine only.
    #[error(
        "Create snapshot error: Cannot save the microVM state: Operation not allowed: save/restore \
         unavailable while running"
    )]
    NotPaused,
    /// A snapshot cannot be taken.
    #[error("Create snapshot error: {0}")]
    CreateSnapshot(#[source] bantam_vmm::Error),
    /// A snapshot brings all that it needs with it.
    #[error(
        "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific \
         resources."
    )]
    LoadAfterConfiguration,
    /// A snapshot cannot be used.
    #[error("Load snapshot error: Failed to restore from snapshot: {0}")]
    LoadSnapshot(#[source] Box<Fault>),
    /// A snapshot is to be loaded with another device in the place of one that it does not have.
    #[error(
        "Load snapshot error: Failed to restore from snapshot: Failed to get snapshot state from \
         file: Unknown {kind} Device: the snapshot has no {what}"
    )]
    NotInSnapshot {
        /// Firecracker's name for the kind of device.
        kind: &'static str,
        /// What was to be replaced.
        what: String,
    },
    /// The memory of a snapshot cannot be served by another program.
    #[error("Failed to load guest memory: Error creating guest memory from uffd: {0}")]
    ServedMemory(#[source] bantam_vmm::Error),
    /// The machine of a snapshot was restored, but does not go on.
    #[error("Load snapshot error: Failed to resume microVM: {0}")]
    ResumeSnapshot(#[source] bantam_vmm::Error),
    /// The owner of the machine of a snapshot was not the API.
    #[error("it was not taken by PUT /snapshot/create")]
    NotOfApi,
    /// There is no kernel to start.
    #[error("Cannot start the microVM without a kernel: PUT /boot-source first")]
    NoBootSource,
    /// A second root device.
    #[error("Drive '{id}' is the root device already; there can be one")]
    SecondRootDevice {
        /// The first.
        id: String,
    },
    /// It can be set only once.
    #[error("The {what} has been initialized already")]
    SetTwice {
        /// What.
        what: &'static str,
    },
    /// The machine's configuration is refused.
    #[error("Invalid configuration: {0}")]
    Configuration(#[from] ConfigError),
    /// The metadata cannot be stored.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// The machine cannot do what was asked.
    #[error(transparent)]
    Machine(#[from] bantam_vmm::Error),
}

impl Fault {
    /// Whether the request is refused for its size alone.
    pub(crate) fn is_too_large(&self) -> bool {
        matches!(
            self,
            Fault::Metadata(MetadataError::TooLarge { .. })
                | Fault::Machine(bantam_vmm::Error::Metadata(MetadataError::TooLarge { .. }))
        )
    }

    /// Returns the line that a client gets.
    pub fn message(&self) -> String {
        without_error_numbers(self.to_string().replace('\n', " "))
    }

    /// Makes the error of opening a file a fault.
    pub(crate) fn file(what: &'static str, path: &Path, error: &io::Error) -> Fault {
        Fault::File {
            what,
            path: path.display().to_string(),
            reason: error.to_string(),
        }
    }

    /// Returns a closure that makes the reason why a value cannot be used a fault.
    pub(crate) fn value(what: &'static str) -> impl Fn(ConfigError) -> Fault {
        move |error| Fault::Value {
            what,
            reason: error.to_string(),
        }
    }
}
