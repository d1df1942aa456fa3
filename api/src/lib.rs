//! The HTTP API of the monitor: that of Firecracker, in its version 1.17, over one machine.
//!
//! An [`Instance`] is what the API speaks for: the configuration that clients put together, and the
//! [`Controller`](bantam_vmm::Controller) of the machine that is made of it. [`Request::parse`] turns what
//! HTTP carries into a [`Request`], and [`Instance::execute`] answers it; [`Server`] does both for the
//! clients of a Unix socket.

#![forbid(unsafe_code)]

mod clients;
mod configuration;
mod fault;
mod instance;
mod json;
mod metrics_file;
mod metrics_groups;
mod request;
mod request_counts;
pub mod resources;
mod server;
mod startup_times;
mod text;
mod version;

pub use configuration::Configuration;
pub use fault::Fault;
pub use instance::{Instance, InstanceOptions, ProgramLog, Reply, Status};
pub use json::{parse_json, parse_value};
pub use metrics_file::MetricsFile;
pub use request::Request;
pub use server::{Server, ServerError, ServerLimits};
pub use startup_times::StartupTimes;
pub use version::API_VERSION;
