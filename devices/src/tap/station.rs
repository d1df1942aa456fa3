//! Taps beside another interface (macvtap): stations of their own on its network.

use std::ffi::c_int;
use std::fs::File;

use super::error::attach_error;
use super::interface::Interface;
use super::{PACKET_HEADER_SIZE, Tap, TapError, attach_queue};

impl Tap {
    /// Uses the interface `name`, which was made beside another one and is up, by its `device`, which does not block.
    /// If `mtu` is given, in bytes, it is set until this value is dropped.
    ///
    /// # Errors
    /// If the device is something else, or the MTU cannot be set.
    pub fn beside(device: File, name: &str, mtu: Option<u16>) -> Result<Tap, TapError> {
        attach_queue(&device, name, false).map_err(|errno| attach_error(name, errno))?;
        let mut tap = Tap::of(device, name);
        tap.selects_frames = false;
        tap.set_header_size(PACKET_HEADER_SIZE as c_int)
            .map_err(|errno| tap.io_error("set the header size of", errno))?;
        tap.offloads = tap.probe_offloads();
        tap.forget_driver().map_err(|source| TapError::Io {
            name: name.to_string(),
            action: "set the offloads of",
            source,
        })?;
        if let Some(mtu) = mtu {
            tap.temporary_mtu = Interface::new(name)?.set_mtu_temporarily(mtu)?;
        }
        Ok(tap)
    }
}
