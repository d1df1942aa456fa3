//! The metadata service: what the owner of a machine tells its guest, over HTTP on a link-local
//! address.
//!
//! [`Metadata`] is what the owner holds, and changes at any time. A [`MetadataService`] serves it to
//! the guest of one network device, by a [`MetadataNetwork`] that takes the frames for its address
//! before they reach the host. Nothing of that touches the host's own network.
//!
//! `answer.rs` has the protocol, `request.rs` and `response.rs` HTTP, `connection.rs` what of it a
//! connection keeps, `network.rs` TCP and what is below.

#![forbid(unsafe_code)]

mod answer;
mod connection;
mod error;
mod metadata;
mod metrics;
mod network;
mod request;
mod response;
mod service;
mod store;
mod token;

pub use error::MetadataError;
pub use metadata::{Metadata, MetadataOptions, MetadataVersion};
pub use metrics::MetadataMetrics;
pub use network::{CLAIM_SIZE, MAX_GUEST_FRAME_SIZE, MetadataNetwork};
pub use service::{MetadataAddress, MetadataService};
pub use store::{Format, LookupError, MetadataStore};
