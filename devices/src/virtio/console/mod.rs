//! The console device (section 5.3): byte streams between the guest and the host.
//!
//! A device is one of two kinds:
//!
//! - A *console* ([`Console::new`]) has one port, which a Linux guest sees as `/dev/hvc0`. Its size in
//!   characters is in the configuration space, and a guest that has no driver yet can write bytes to
//!   a field there (`VIRTIO_CONSOLE_F_EMERG_WRITE`).
//! - A device of *channels* ([`Console::with_channels`]) has a named port for each
//!   (`VIRTIO_CONSOLE_F_MULTIPORT`), which a Linux guest sees as `/dev/vport0p1` and, with udev, as
//!   `/dev/virtio-ports/NAME`. Each side is told when the other opens or closes a channel.
//!
//! They are devices of their own because a port of a multiport device learns its size by a control
//! message whose fields Linux has had in either order, while all versions agree on the configuration
//! space.
//!
//! The worker moves bytes between the driver's buffers and the host's descriptors without a copy. What
//! the host does not take stays in the driver's transmit queue, and what the guest does not take stays
//! with the host: nothing is dropped while there is somebody to take it, and nothing piles up.

mod control_queue;
mod error;
mod handle;
mod host;
mod message;
mod metrics;
mod port;
mod shared;
mod source;
mod state;
#[cfg(test)]
mod tests;
mod worker;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bantam_state::{RestoreError, SaveError, SavedState, Section};

use super::{Activation, COMMON_FEATURES, ConfigSpace, DriverLink, VirtioDevice, device_id};
use crate::notice::DeviceNotice;
use crate::serial::SerialEndpoint;
use crate::worker::VirtioWorker;
use error::DriverError;
use host::EMERGENCY_CAPACITY;
use shared::Shared;
use state::ConsoleState;
use worker::Worker;

pub use handle::ConsoleHandle;
pub use metrics::ConsoleMetrics;

/// Descriptors of a queue by which the driver receives. Linux fills it with buffers of 4 KiB.
const RECEIVE_QUEUE_SIZE: u16 = 64;
/// Descriptors of a queue by which the driver transmits. Linux makes a chain of as many as a pipe has
/// pages when a program splices one to a channel, 256 at most unless it is privileged.
const TRANSMIT_QUEUE_SIZE: u16 = 256;
/// Descriptors of either control queue.
const CONTROL_QUEUE_SIZE: u16 = 32;

/// Most channels of a device.
pub const MAX_CHANNELS: usize = 16;
/// Most bytes of a channel's name.
pub const MAX_CHANNEL_NAME_SIZE: usize = 128;

/// Feature bits (section 5.3.3).
mod feature {
    pub const SIZE: u64 = 1 << 0;
    pub const MULTIPORT: u64 = 1 << 1;
    pub const EMERGENCY_WRITE: u64 = 1 << 2;
}

/// Offsets in the configuration space (section 5.3.4).
mod config {
    pub const COLUMNS: usize = 0;
    pub const MAX_PORTS: usize = 4;
    pub const EMERGENCY_WRITE: usize = 8;
    pub const SIZE: usize = 12;
}

/// The device model of a console device.
pub struct Console {
    shared: Arc<Shared>,
    /// Of each channel; nothing for a console.
    names: Arc<[String]>,
    queue_sizes: Vec<u16>,
}

impl Console {
    /// A console. It leads nowhere until [`ConsoleHandle::connect`] says where.
    pub fn new() -> Console {
        Console::with_ports(Vec::new(), vec![RECEIVE_QUEUE_SIZE, TRANSMIT_QUEUE_SIZE])
    }

    /// A device of channels with these names, each of 1 to [`MAX_CHANNEL_NAME_SIZE`] bytes, no more than
    /// [`MAX_CHANNELS`]. They lead nowhere until [`ConsoleHandle::connect`] says where. Port 0 is none of
    /// them, as a driver that knows of one port only takes it for a console.
    pub fn with_channels(names: Vec<String>) -> Console {
        let pair = [RECEIVE_QUEUE_SIZE, TRANSMIT_QUEUE_SIZE];
        let mut queue_sizes = pair.to_vec();
        queue_sizes.extend([CONTROL_QUEUE_SIZE; 2]);
        for _ in &names {
            queue_sizes.extend(pair);
        }
        Console::with_ports(names, queue_sizes)
    }

    fn with_ports(names: Vec<String>, queue_sizes: Vec<u16>) -> Console {
        let port_count = 1 + names.len();
        let mut space = vec![0; config::SIZE];
        let max_ports = (port_count as u32).to_le_bytes();
        space[config::MAX_PORTS..][..4].copy_from_slice(&max_ports);
        let emergency_write = config::EMERGENCY_WRITE..config::SIZE;
        let config = match names.is_empty() {
            true => ConfigSpace::with_driver_field(space, emergency_write),
            false => ConfigSpace::new(space),
        };
        Console {
            shared: Arc::new(Shared {
                config,
                size: Mutex::default(),
                hosts: (0..port_count).map(|_| Mutex::default()).collect(),
                is_active: AtomicBool::new(false),
                metrics: Arc::default(),
            }),
            names: names.into(),
            queue_sizes,
        }
    }

    /// Says where a port leads, before the guest runs: port 0 of a console, port 1 for the first channel.
    pub fn connect(&self, port: usize, endpoint: SerialEndpoint) {
        if let Some(mut host) = self.shared.host(port) {
            host.connect(endpoint);
        }
    }

    /// A handle to the device for the owner of the machine. `link` is the device's.
    pub fn handle(&self, link: Arc<DriverLink>) -> ConsoleHandle {
        ConsoleHandle::new(self.shared.clone(), link)
    }
}

impl Default for Console {
    fn default() -> Console {
        Console::new()
    }
}

impl VirtioDevice for Console {
    fn device_id(&self) -> u32 {
        device_id::CONSOLE
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES
            | match self.names.is_empty() {
                true => feature::SIZE | feature::EMERGENCY_WRITE,
                false => feature::MULTIPORT,
            }
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> &ConfigSpace {
        &self.shared.config
    }

    /// Sends a byte of a driver that uses no queues, or not yet (section 5.3.4.1).
    fn driver_wrote_config(&mut self, offset: u64, data: &[u8]) -> Option<DeviceNotice<'static>> {
        if offset == config::EMERGENCY_WRITE as u64
            && let (Some(&byte), Some(mut host)) = (data.first(), self.shared.host(0))
        {
            host.write_emergency_byte(byte, &self.shared.metrics);
        }
        None
    }

    fn reset(&mut self) {
        if let Some(mut host) = self.shared.host(0) {
            host.set_emergency_bytes(Vec::new());
        }
    }

    fn save(&self) -> Result<Option<Section>, SaveError> {
        let host = self.shared.host(0);
        let emergency = host.map_or_else(Vec::new, |host| host.emergency_bytes());
        Section::of(&ConsoleState { emergency }).map(Some)
    }

    fn restore(&mut self, config: &[u8], state: Option<&Section>) -> Result<(), RestoreError> {
        let invalid = |reason: &str| RestoreError::Invalid {
            kind: ConsoleState::KIND.to_owned(),
            reason: reason.to_owned(),
        };
        let max_ports: [u8; 4] = self.shared.config.array(config::MAX_PORTS as u64);
        if config.get(config::MAX_PORTS..config::EMERGENCY_WRITE) != Some(&max_ports[..]) {
            return Err(invalid("it has another number of ports"));
        }
        let state = state.ok_or_else(|| invalid("it has none of a console device"))?;
        let ConsoleState { emergency } = state.decode()?;
        if emergency.len() > EMERGENCY_CAPACITY {
            return Err(invalid("it has more emergency writes than are kept"));
        }
        if let Some(mut host) = self.shared.host(0) {
            host.set_emergency_bytes(emergency);
        }
        Ok(())
    }

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn VirtioWorker>, String> {
        let has_size = activation.features & feature::SIZE != 0;
        let is_restored = activation.state.is_some();
        let link = activation.link.clone();
        match Worker::new(self.shared.clone(), &self.names, activation) {
            Ok(worker) => {
                self.shared.is_active.store(true, Ordering::Release);
                // A device that was restored has the size of the terminal that the saved one had.
                let has_changed = self.shared.rewrite_size();
                if has_size && (is_restored || has_changed) {
                    link.notify_configuration_change();
                }
                Ok(Box::new(worker))
            }
            Err(reason) => {
                self.shared.metrics.activate_fails.add(1);
                Err(reason)
            }
        }
    }
}
