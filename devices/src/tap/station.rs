//! Taps beside another interface (macvtap): stations of their own on its network.

use std::ffi::c_int;
use std::fs::File;
use std::os::fd::AsRawFd;

use super::error::attach_error;
use super::interface::Interface;
use super::{
    PACKET_HEADER_SIZE, Tap, TapError, TapQueue, attach_queue, set_header_size, set_queue_in_use,
};

impl Tap {
    /// Uses the interface `name`, which was made beside another one and is up, by `devices`: descriptors of its device, each
    /// of them opened by itself and not blocking, of which each is a queue. The first is in use. If `mtu` is given, in
    /// bytes, it is set until this value is dropped.
    ///
    /// # Errors
    /// If there is no descriptor, the device is something else, or the MTU cannot be set.
    pub fn beside(devices: Vec<File>, name: &str, mtu: Option<u16>) -> Result<Tap, TapError> {
        let has_many = devices.len() > 1;
        for device in &devices {
            attach_queue(device, name, has_many).map_err(|errno| attach_error(name, errno))?;
        }
        let mut queues = devices.into_iter();
        let first = queues.next().ok_or_else(|| TapError::NoTap {
            name: name.to_string(),
        })?;
        let mut tap = Tap::of(first, name);
        tap.selects_frames = false;
        for queue in queues {
            // Each queue has been in use since it was opened.
            set_queue_in_use(&queue, false)
                .map_err(|errno| tap.io_error("set aside a queue of", errno))?;
            tap.queues.push(TapQueue(queue));
        }
        // Each queue has a size of its own.
        for queue in &tap.queues {
            set_header_size(queue.as_raw_fd(), PACKET_HEADER_SIZE as c_int)
                .map_err(|errno| tap.io_error("set the header size of", errno))?;
        }
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
