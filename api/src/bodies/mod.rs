//! The parts of a [`Configuration`](crate::Configuration), as clients put them and get them back.
//!
//! The bodies of requests and answers name their fields as Firecracker does. A field that is not listed is
//! refused. A client gets back what it has put: fields that it left out stay out if they have no default.

pub mod boot_source;
pub mod cpu_config;
pub mod drives;
pub mod logger;
pub mod machine_config;
pub mod metrics;
pub mod mmds;
pub mod network_interfaces;
pub mod rate_limiter;
