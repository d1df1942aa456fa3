//! The metadata service, which passes data of the machine's owner to the guest, over HTTP on a
//! link-local address.
//!
//! The owner holds the [`Metadata`], and changes it at any time. A [`MetadataService`] serves it to
//! the guest of one network device, through a [`MetadataNetwork`] that takes the frames for its
//! address before they reach the host. None of this touches the host's own network.
//!
//! `answer.rs` has the protocol, `request.rs` and `response.rs` HTTP, `connection.rs` the HTTP
//! state of a connection, `network.rs` TCP and the layers below.

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
