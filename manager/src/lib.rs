//! Named machines of the Bantam virtual machine monitor.
//!
//! A machine has a name, a folder in which it is kept ([`Folders`]), and, while it runs, one process. There is no daemon:
//! a command finds out what is there from the folders, and whether a machine runs from a lock that its process has for
//! life. It talks to that process over its control socket ([`bantam_control`]).
//!
//! [`Manager`] makes, lists and removes machines, [`Machine`] is one of them, and [`MachineProcess`] is what the program
//! uses within the process of a machine.
//!
//! ```no_run
//! use bantam_manager::{Error, MachineName, Manager, RestartPolicy, StartOptions};
//! use bantam_vmm::config::MachineConfig;
//!
//! # fn main() -> Result<(), Error> {
//! let manager = Manager::of_user()?;
//! let name: MachineName = "web".parse()?;
//! let config = MachineConfig::new("/boot/vmlinux");
//! let machine = manager.create(&name, &config, RestartPolicy::Never)?;
//! machine.start(&StartOptions::default())?;
//! machine.destroy(None)?;
//! # Ok(())
//! # }
//! ```
//!
//! [`Machine::start`] executes the running program again with the command [`PROCESS_COMMAND`], so only a program that has
//! this command can start machines.

#![forbid(unsafe_code)]

mod arrival;
mod autostart;
mod clone;
mod commands;
mod definition;
mod domain;
mod edit;
mod error;
mod files;
mod folders;
mod follow;
mod history;
mod images;
mod limits;
mod lock;
mod mac;
mod machine;
mod manager;
mod merge;
mod merge_at_rest;
mod name;
mod needed;
mod process;
mod provision;
mod saved;
mod snapshots;
mod start;
mod states;
mod store;
mod sysprep;
mod usage;

pub use arrival::{ArrivingMachine, Definition};
pub use clone::{CloneStorage, ClonedMachine};
pub use definition::{RestartPolicy, Settings, defaults, machine_file, parse_machine_file};
pub use domain::DocumentedMachine;
pub use error::Error;
pub use folders::Folders;
pub use history::{EndReason, Run, RunEnd, RunOrigin};
pub use machine::{Machine, MachineState};
pub use manager::{Entry, Manager, Removal};
pub use name::{MachineName, NameError};
pub use process::{MachineProcess, PROCESS_COMMAND, ProcessLog};
pub use provision::{BaseImage, Provision, SeedSource};
pub use saved::saved_machine;
pub use snapshots::{KeptDisk, MachineSnapshot, SnapshotPlan};
pub use start::StartOptions;
pub use store::{Checksum, StoredImage};
pub use sysprep::{Helper, IdentityReset, reset_identity_of_image};
pub use usage::{DiskUsage, NetworkUsage, Rates, Usage};
