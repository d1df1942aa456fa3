//! A driver of the memory balloon (section 5.5).
use alloc::vec::Vec;

use super::mmio::register;
use super::{
    Buffer, Completion, Error, MmioDevice, SplitQueue, Transport, device_id, feature, wait_for_used,
};

/// Size of a balloon's page in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Feature bits (section 5.5.3).
pub mod balloon_feature {
    /// `VIRTIO_BALLOON_F_STATS_VQ`: the driver gives statistics.
    pub const STATISTICS: u64 = 1 << 1;
    /// `VIRTIO_BALLOON_F_FREE_PAGE_HINT`: the driver names free pages on request.
    pub const HINTING: u64 = 1 << 3;
    /// `VIRTIO_BALLOON_F_PAGE_REPORTING`: the driver reports free pages.
    pub const REPORTING: u64 = 1 << 5;
}

/// Offsets in the configuration space (section 5.5.4).
mod config {
    pub const NUM_PAGES: u64 = 0;
    pub const ACTUAL: u64 = 4;
    pub const HINTING_COMMAND: u64 = 8;
}

/// A statistic, as a tag and a value (section 5.5.6.3).
pub type Statistic = (u16, u64);

/// A balloon.
pub struct Balloon {
    /// Its registers.
    pub device: MmioDevice,
    /// What was negotiated.
    pub features: u64,
    /// Queue for pages that are put into it.
    pub inflate: SplitQueue,
    /// Queue for pages that are taken out of it.
    pub deflate: SplitQueue,
    /// Queue for statistics, if negotiated.
    pub statistics: Option<SplitQueue>,
    /// Queue for free pages that are named on request, if negotiated.
    pub hinting: Option<SplitQueue>,
    /// Queue for free pages that are reported, if negotiated.
    pub reporting: Option<SplitQueue>,
    /// The buffer in `statistics`.
    entries: Vec<u8>,
}

impl Balloon {
    /// Initialises the device with all the features that it offers. Like Linux, it does not count
    /// the queues of features that are not offered.
    ///
    /// # Errors
    ///
    /// If it is not such a device or cannot be initialised.
    pub fn open(device: MmioDevice, queue_size: u16) -> Result<Self, Error> {
        if device.device_id() != device_id::BALLOON {
            return Err(Error::WrongType(device.device_id()));
        }
        let features = device.initialise(
            feature::EVENT_INDEX
                | feature::INDIRECT_DESCRIPTORS
                | balloon_feature::STATISTICS
                | balloon_feature::HINTING
                | balloon_feature::REPORTING,
        )?;
        let mut index = 0;
        let mut queue = || {
            index += 1;
            device.set_up_queue(index - 1, queue_size, features)
        };
        let (inflate, deflate) = (queue()?, queue()?);
        let has = |bit| features & bit != 0;
        let statistics = has(balloon_feature::STATISTICS).then(&mut queue);
        let hinting = has(balloon_feature::HINTING).then(&mut queue);
        let reporting = has(balloon_feature::REPORTING).then(&mut queue);
        let balloon = Self {
            device,
            features,
            inflate,
            deflate,
            statistics: statistics.transpose()?,
            hinting: hinting.transpose()?,
            reporting: reporting.transpose()?,
            entries: Vec::new(),
        };
        device.set_driver_ok();
        Ok(balloon)
    }

    /// How many pages the device wants.
    pub fn target(&self) -> u32 {
        self.device.config_32(config::NUM_PAGES)
    }

    /// How many pages the device believes to be in the balloon.
    pub fn actual(&self) -> u32 {
        self.device.config_32(config::ACTUAL)
    }

    /// Tells the device how many pages are in the balloon.
    pub fn set_actual(&self, pages: u32) {
        self.device.write(register::CONFIG + config::ACTUAL, pages);
    }

    /// Puts pages into the balloon, given by their numbers.
    ///
    /// # Errors
    ///
    /// If the device does not acknowledge it.
    pub fn inflate(&mut self, pages: &[u32]) -> Result<(), Error> {
        request(&self.device, &mut self.inflate, &[Buffer::readable(pages)])
    }

    /// Takes pages out of the balloon, given by their numbers.
    ///
    /// # Errors
    ///
    /// If the device does not acknowledge it.
    pub fn deflate(&mut self, pages: &[u32]) -> Result<(), Error> {
        request(&self.device, &mut self.deflate, &[Buffer::readable(pages)])
    }

    /// Reports free memory. Without reports it does nothing.
    ///
    /// # Errors
    ///
    /// If the device does not acknowledge it.
    pub fn report(&mut self, memory: &[Buffer]) -> Result<(), Error> {
        match &mut self.reporting {
            Some(queue) => request(&self.device, queue, memory),
            None => Ok(()),
        }
    }

    /// The device's hinting request: 0 for none yet, 1 for no more, or the number of a request.
    pub fn hinting_command(&self) -> u32 {
        match self.hinting {
            Some(_) => self.device.config_32(config::HINTING_COMMAND),
            None => 0,
        }
    }

    /// Sends the number of the request that hints answer from now on, or 0 at their end. Without hinting
    /// it does nothing.
    ///
    /// # Errors
    ///
    /// If the device does not acknowledge it.
    pub fn send_hinting_command(&mut self, command: u32) -> Result<(), Error> {
        match &mut self.hinting {
            Some(queue) => request(&self.device, queue, &[Buffer::readable(&[command])]),
            None => Ok(()),
        }
    }

    /// Names free memory. Without hinting it does nothing.
    ///
    /// # Errors
    ///
    /// If the device does not acknowledge it.
    pub fn hint(&mut self, memory: Buffer) -> Result<(), Error> {
        match &mut self.hinting {
            Some(queue) => request(&self.device, queue, &[memory]),
            None => Ok(()),
        }
    }

    /// Whether the device has returned the statistics given last; it wants new ones then.
    ///
    /// # Errors
    ///
    /// If it returned a buffer that it was not given.
    pub fn wants_statistics(&mut self) -> Result<bool, Error> {
        match &mut self.statistics {
            Some(queue) => Ok(queue.take_used()?.is_some()),
            None => Ok(false),
        }
    }

    /// Gives statistics. Without them it does nothing.
    ///
    /// # Errors
    ///
    /// If the queue has no room for them.
    pub fn give_statistics(&mut self, statistics: &[Statistic]) -> Result<(), Error> {
        let Some(queue) = &mut self.statistics else {
            return Ok(());
        };
        self.entries.clear();
        for (tag, value) in statistics {
            self.entries.extend(tag.to_le_bytes());
            self.entries.extend(value.to_le_bytes());
        }
        queue.add(&[Buffer::readable(&self.entries)])?;
        queue.kick(&self.device);
        Ok(())
    }
}

fn request(device: &MmioDevice, queue: &mut SplitQueue, chain: &[Buffer]) -> Result<(), Error> {
    queue.add(chain)?;
    queue.kick(device);
    match wait_for_used(device, queue, Completion::Polled)?.length {
        0 => Ok(()),
        length => Err(Error::WrongLength(length)),
    }
}
