//! The HTTP API of the monitor: that of Firecracker, in its version 1.17, over one machine.
//!
//! An [`Instance`] is what the API speaks for: the configuration that clients put together, and the
//! [`Controller`](bantam_vmm::Controller) of the machine that is made of it. [`Request::parse`] turns what
//! HTTP carries into a [`Request`], and [`Instance::execute`] answers it; [`Server`] does both for the
//! clients of a Unix socket. What a request can ask for is in [`resources`], one file each: a resource is a
//! file there, a line of the table in it, and if clients configure it, a field of [`Configuration`].

#![forbid(unsafe_code)]

mod bounded;
mod clients;
mod device_names;
mod fault;
mod host_files;
mod instance;
mod json;
mod lock;
mod metrics_file;
mod metrics_groups;
mod reply;
mod request;
mod request_counts;
pub mod resources;
mod server;
mod startup_times;
mod text;
mod version;
mod view;

pub use fault::Fault;
pub use instance::{Instance, InstanceOptions, ProgramLog};
pub use json::{parse_json, parse_value};
pub use reply::Reply;
pub use request::Request;
pub use resources::Configuration;
pub use server::{Server, ServerError, ServerLimits};
pub use startup_times::StartupTimes;
pub use version::API_VERSION;
pub use view::View;
