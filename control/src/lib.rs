//! The control socket of a running machine: the commands of its [`Controller`](bantam_vmm::Controller), for other
//! processes.
//!
//! [`ControlServer`] serves a [`PresentMachine`] on a Unix socket, and [`ControlClient`] is a client of it. What
//! they exchange is in [`protocol`]: a JSON object in each line.

#![deny(unsafe_code)]

mod client;
mod error;
mod line_buffer;
mod present_machine;
pub mod protocol;
mod server;

pub use client::ControlClient;
pub use error::ControlError;
pub use present_machine::PresentMachine;
pub use server::ControlServer;
