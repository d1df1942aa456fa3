//! The Bantam virtual machine monitor as a library.
//!
//! A [`MachineConfig`](config::MachineConfig) describes a machine, and a [`Controller`] owns one from its
//! configuration to its end:
//!
//! ```no_run
//! use bantam_vmm::config::{MachineConfig, SerialConfig};
//! use bantam_vmm::Controller;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut config = MachineConfig::new("vmlinux");
//! config.serial = SerialConfig::File("console.log".into());
//! let controller = Controller::new()?;
//! controller.configure(config)?;
//! controller.start()?;
//! let reason = controller.wait()?;
//! # Ok(())
//! # }
//! ```
//!
//! The library does not print, end the process or touch the disposition of any signal. Everything that
//! goes wrong is an [`Error`], and its log goes to the program's `tracing` subscriber.

#[cfg(doctest)]
#[doc = include_str!("../../docs/embedding.md")]
struct EmbeddingPage;

#[cfg(doctest)]
#[doc = include_str!("../../docs/snapshots.md")]
struct SnapshotsPage;

#[cfg(doctest)]
#[doc = include_str!("../../docs/migration.md")]
struct MigrationPage;

mod command;
pub mod config;
mod console;
mod controller;
mod device_access;
mod devices;
mod disk_threads;
mod error;
mod event_loop;
mod events;
mod exit_reason;
mod gdb;
mod hooks;
pub mod host;
mod interval_timer;
mod kvm;
mod load;
mod lock;
mod machine;
mod memory;
mod memory_load;
mod metadata;
mod metrics;
mod random;
mod resources;
mod run_control;
mod snapshot;
mod state;
pub mod text;
mod threads;
mod vcpu;
mod vcpu_statistics;
mod vm;
mod watch;
pub mod workarounds;

pub use bantam_devices::device_log::{BoundedLog, MachineLog};
pub use bantam_devices::i8042::KeyboardError;
pub use bantam_devices::opener::Opener;
pub use bantam_devices::rate_limiter::{Limits, RateLimit};
pub use bantam_devices::serial::SerialMetrics;
pub use bantam_devices::virtio::owner::*;
pub use bantam_devices::{ListenError, ListeningSocket};
pub use bantam_memory::GuestMemory;
pub use bantam_metadata::{MetadataError, MetadataMetrics, MetadataStore};
pub use bantam_migration::{
    Address as MigrationAddress, Compression as MigrationCompression,
    Connection as MigrationConnection, MigrationError,
};
pub use bantam_network::PlaceKeeper;
pub use bantam_snapshot::merge as merge_snapshots;
pub use bantam_state::{RestoreError, SaveError, Section};
pub use bantam_storage::{FileAccess, FileOpener, HostOpener, ImageFormat};
pub use bantam_usernet::{ForwardedPort, OpenError as UserNetworkError, Protocol};
pub use command::{
    Answer, Command, DiskSnapshot, ForkDescriptors, Forked, MigrationOrder, ShutDown,
};
pub use console::Console;
pub use controller::{
    Arrival, AtTimeout, Controller, Migrated, MigrationOptions, MigrationProgress,
};
pub use devices::{Stream, check_disk, disk_files, keep_network_places, serve_network_places};
pub use error::Error;
pub use events::{Event, Events};
pub use exit_reason::ExitReason;
pub use hooks::{ControllerOptions, ThreadHook, ThreadRole};
pub use memory_load::{MemoryLoad, MemoryServerError};
pub use metrics::{MachineMetrics, VcpuMetrics};
pub use snapshot::{
    FrozenDisk, HostFacts, Snapshot, SnapshotBase, SnapshotDescription, SnapshotDisks,
    SnapshotFacts, SnapshotFileError, SnapshotFiles, SnapshotId, SnapshotOptions, SnapshotTaken,
};
pub use state::State;
