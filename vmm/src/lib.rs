//! The Bantam virtual machine monitor as a library.
//!
//! A [`MachineConfig`](config::MachineConfig) says what a machine is made of, and a [`Machine`] is
//! one that runs:
//!
//! ```no_run
//! use bantam_vmm::config::{MachineConfig, SerialConfig};
//! use bantam_vmm::{Console, Machine};
//!
//! # fn main() -> Result<(), bantam_vmm::Error> {
//! let mut config = MachineConfig::new("vmlinux");
//! config.serial = SerialConfig::File("console.log".into());
//! let mut machine = Machine::new(&config, Console::default())?;
//! machine.start()?;
//! let reason = machine.wait()?;
//! # Ok(())
//! # }
//! ```
//!
//! The library prints nothing, ends no process and touches no signal's disposition: everything that
//! goes wrong is an [`Error`], and its log goes to the `tracing` subscriber of the program.

pub mod config;
mod control;
mod devices;
mod error;
mod event_loop;
mod guest;
pub mod host;
mod machine;
mod metadata;
mod serial;
mod vcpu;
mod vm;
mod workarounds;

pub use bantam_devices::metadata::{Metadata, MetadataError, MetadataMetrics};
pub use control::ExitReason;
pub use error::Error;
pub use machine::Machine;
pub use serial::Console;
