//! A driver of the entropy device (section 5.4).

use super::{
    Buffer, Completion, Error, MmioDevice, SplitQueue, Transport, device_id, feature, wait_for_used,
};

/// An entropy device.
pub struct Rng {
    /// Its registers.
    pub device: MmioDevice,
    /// Its only queue.
    pub queue: SplitQueue,
}

impl Rng {
    /// Initialises the device with a queue of at most `queue_size` descriptors.
    ///
    /// # Errors
    ///
    /// If it is not such a device or cannot be initialised.
    pub fn open(device: MmioDevice, queue_size: u16) -> Result<Self, Error> {
        if device.device_id() != device_id::RNG {
            return Err(Error::WrongType(device.device_id()));
        }
        let features = device.initialise(feature::EVENT_INDEX | feature::INDIRECT_DESCRIPTORS)?;
        let queue = device.set_up_queue(0, queue_size, features)?;
        device.set_driver_ok();
        Ok(Self { device, queue })
    }

    /// Lets the device fill `bytes`, and returns how many it filled.
    ///
    /// # Errors
    ///
    /// If it does not answer, or claims more bytes than there are.
    pub fn read(&mut self, bytes: &mut [u8], completion: Completion) -> Result<usize, Error> {
        self.queue.add(&[Buffer::writable(bytes)])?;
        self.queue.kick(&self.device);
        let used = wait_for_used(&self.device, &mut self.queue, completion)?;
        if used.length as usize > bytes.len() {
            return Err(Error::WrongLength(used.length));
        }
        Ok(used.length as usize)
    }
}
