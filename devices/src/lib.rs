//! The hardware that a guest sees: buses, the serial port, power control, the virtio transport and devices.
//!
//! Nothing here knows about KVM. A device raises interrupts through [`InterruptLine`], reaches guest memory
//! through [`bantam_memory`], and does its work on an [`EventLoop`], so each can be tested without a virtual
//! machine.

pub mod acpi_power;
pub mod activity;
pub mod boot_timer;
pub mod bus;
pub mod device_log;
pub mod event_loop;
pub mod exit_port;
pub mod generation;
pub mod i8042;
pub mod interrupt;
mod io_uring_support;
pub mod lifecycle;
mod listening_socket;
mod lock;
pub mod notice;
pub mod opener;
pub mod panic_device;
pub mod pci_bus;
pub mod power;
pub mod rate_limiter;
pub mod rtc;
pub mod serial;
#[cfg(test)]
mod suspend_test;
pub mod tap;
pub mod virtio;
pub mod worker;

pub use event_loop::EventLoop;
pub use interrupt::InterruptLine;
pub use listening_socket::{ListenError, ListeningSocket};
pub use power::PowerControl;
