//! A stub of the gdb remote protocol, by which gdb debugs the guest.
//!
//! The thread `bantam-gdb` ([`GdbServer`]) talks to gdb. What concerns a vCPU is done on the thread that runs it,
//! while it is out of the guest ([`RunControl::on_parked_vcpus`](crate::run_control::RunControl)). A [`Debugger`] is
//! what both have in common: the breakpoints, and why vCPUs have stopped. If any vCPU stops, all do. Devices go
//! on, and finish what the guest has asked of them.

mod breakpoints;
mod connection;
mod debugger;
mod delivery;
mod guest_memory;
mod registers;
mod server;
mod target;

pub(crate) use debugger::Debugger;
pub(crate) use server::{GdbListener, GdbServer};
