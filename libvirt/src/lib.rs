//! libvirt's domain XML for the named machines of the Bantam virtual machine monitor
//! (<https://libvirt.org/formatdomain.html>).
//!
//! [`Definition::parse`] reads a domain as the definition of a machine, and [`write_domain`] writes a machine as a domain.
//! What a domain has and a machine does not is one of two things (the table is `rules.rs`): it changes nothing that a guest
//! relies on, so it is kept and reported; or the guest would not be what the domain says, so the domain is refused. What
//! a machine has and libvirt has no words for is text in `<metadata>`, so that a machine is the same after a way through
//! XML.

#![forbid(unsafe_code)]

mod devices;
mod disk;
mod domain;
mod error;
mod interface;
mod keep;
mod limits;
mod options;
mod platform;
mod rules;
mod small;
mod streams;
mod values;
mod xml;

pub use domain::{Boot, Definition, Machine, is_xml, write_domain};
pub use error::Error;
pub use values::unit_factor;

#[cfg(test)]
mod tests;
