//! The HTTP API of the monitor: that of Firecracker, in its version 1.17, over one machine.
//!
//! An [`Instance`] is what the API speaks for: the configuration that clients put together, and the
//! [`Controller`](bantam_vmm::Controller) of the machine that is made of it. [`parse_request`] turns what
//! HTTP carries into a [`Request`], and [`Request::execute`] does what it asks for; [`Server`] does both for
//! the clients of a Unix socket.
//!
//! Each of these knows only what comes after it: the server; the table of resources, which says what can be
//! asked for at which path; requests; the instance; its [`Configuration`]; the [`bodies`] that make it up.

#![forbid(unsafe_code)]

pub mod bodies;
mod bounded;
pub mod configuration;
mod device_ids;
mod device_names;
mod fault;
mod host_files;
mod instance;
mod json;
mod latencies;
mod method;
mod metrics_file;
mod metrics_groups;
mod reply;
mod request;
mod request_counts;
mod resources;
mod server;
mod startup_times;
mod text;
mod version;
mod view;

pub use configuration::Configuration;
pub use fault::Fault;
pub use instance::{Instance, InstanceOptions, ProgramLog};
pub use json::{parse_json, parse_value};
pub use reply::Reply;
pub use request::Request;
pub use resources::{new_instance, parse_request};
pub use server::{Server, ServerError, ServerLimits};
pub use startup_times::StartupTimes;
pub use version::API_VERSION;
pub use view::View;
