//! What servers on Unix sockets have in common: how clients are accepted, how many there can be, and the
//! threads that serve them.
//!
//! [`accept_clients`] accepts clients and gives each a [`Place`], of which [`Clients`] has a bounded number.
//! [`runtime`] makes the runtime on which all of this runs.

#![forbid(unsafe_code)]

mod accept;
mod clients;
mod lock;
mod runtime;

pub use accept::accept_clients;
pub use clients::{Clients, Place};
pub use lock::lock;
pub use runtime::runtime;
