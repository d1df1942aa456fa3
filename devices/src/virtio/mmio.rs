//! The virtio-mmio transport, version 2 (section 4.2.2): a device's registers in a window of
//! memory.

use std::io;
use std::sync::Arc;

use bantam_memory::GuestMemory;
use event_manager::SubscriberId;
use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Activation, F_EVENT_IDX, F_VERSION_1, VirtQueue, VirtioDevice, VirtioInterrupt};
use crate::EventLoop;
use crate::bus::BusDevice;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
/// Version of the register layout.
const VERSION: u32 = 2;
/// Identifies who made the device: "BNTM", little-endian.
const VENDOR: u32 = 0x4d54_4e42;

/// Offset of `QueueNotify`, the doorbell register that takes the index of a queue.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// Size of `QueueNotify` in bytes.
pub const QUEUE_NOTIFY_SIZE: u32 = 4;

/// Offsets of the other registers.
mod register {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x24;
    pub const QUEUE_SELECT: u64 = 0x30;
    pub const QUEUE_SIZE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESCRIPTORS_LOW: u64 = 0x80;
    pub const QUEUE_DESCRIPTORS_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub const SHARED_MEMORY_LENGTH_LOW: u64 = 0xb0;
    pub const SHARED_MEMORY_BASE_HIGH: u64 = 0xbc;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    /// Start of the device-specific configuration space.
    pub const CONFIG: u64 = 0x100;
}

/// What the driver wrote of one queue; judged when it sets `DRIVER_OK`.
#[derive(Debug, Clone, Copy, Default)]
struct QueueRegisters {
    size: u32,
    ready: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

impl QueueRegisters {
    /// The queue as set up, where it is one that a device can serve.
    fn to_queue(
        self,
        max_size: u16,
        event_index: bool,
        memory: &GuestMemory,
    ) -> Result<Queue, virtio_queue::Error> {
        let mut queue = Queue::new(max_size)?;
        if self.ready {
            let size = self.size.try_into();
            queue.try_set_size(size.map_err(|_| virtio_queue::Error::InvalidSize)?)?;
            queue.try_set_desc_table_address(GuestAddress(self.descriptors))?;
            queue.try_set_avail_ring_address(GuestAddress(self.driver))?;
            queue.try_set_used_ring_address(GuestAddress(self.device))?;
            queue.set_event_idx(event_index);
            queue.set_ready(true);
            if !queue.is_valid(memory) {
                return Err(virtio_queue::Error::FindMemoryRegion);
            }
        }
        Ok(queue)
    }
}

/// The registers of one virtio device, and the device behind them.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: Arc<GuestMemory>,
    event_loop: EventLoop,
    interrupt: Arc<VirtioInterrupt>,
    doorbells: Vec<EventFd>,
    /// The device's worker on the event loop, from `DRIVER_OK` to the next reset.
    worker: Option<SubscriberId>,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueRegisters>,
}

/// Why a device cannot be activated.
enum ActivateError {
    /// Its driver has set it up wrongly.
    Driver(String),
    /// The host lacks what it takes.
    Host(String),
}

impl MmioTransport {
    /// Registers for `device`, whose worker will run on `event_loop`.
    ///
    /// # Errors
    /// When the host gives no file descriptors for the doorbells.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
        event_loop: EventLoop,
        interrupt: Arc<VirtioInterrupt>,
    ) -> io::Result<MmioTransport> {
        let queue_count = device.queue_max_sizes().len();
        let doorbells = (0..queue_count)
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<io::Result<_>>()?;
        Ok(MmioTransport {
            device,
            memory,
            event_loop,
            interrupt,
            doorbells,
            worker: None,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: vec![QueueRegisters::default(); queue_count],
        })
    }

    /// One event for each queue, to be signalled when the driver writes the queue's index to
    /// [`QUEUE_NOTIFY`]. Bound to that register (as ioeventfds), the driver's doorbells reach the
    /// worker without passing through [`BusDevice::write`].
    pub fn doorbells(&self) -> &[EventFd] {
        &self.doorbells
    }

    fn read_register(&mut self, offset: u64) -> u32 {
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.device.device_id(),
            register::VENDOR => VENDOR,
            register::DEVICE_FEATURES => half(self.device.features(), self.device_features_select),
            register::QUEUE_SIZE_MAX => self
                .device
                .queue_max_sizes()
                .get(self.queue_select as usize)
                .map_or(0, |&size| u32::from(size)),
            register::QUEUE_READY => self
                .queues
                .get(self.queue_select as usize)
                .map_or(0, |queue| u32::from(queue.ready)),
            register::INTERRUPT_STATUS => self.interrupt.status(),
            register::STATUS => self.status(),
            register::CONFIG_GENERATION => self.device.config().generation(),
            // No device has shared memory, which reads as a length and a base of -1
            // (section 4.2.2).
            register::SHARED_MEMORY_LENGTH_LOW..=register::SHARED_MEMORY_BASE_HIGH => u32::MAX,
            _ => {
                self.interrupt.warn(format_args!(
                    "read of register {offset:#x}, which has no value"
                ));
                0
            }
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SELECT => self.device_features_select = value,
            register::DRIVER_FEATURES_SELECT => self.driver_features_select = value,
            register::DRIVER_FEATURES => self.set_driver_features(value),
            register::QUEUE_SELECT => self.queue_select = value,
            QUEUE_NOTIFY => self.ring_doorbell(value),
            register::INTERRUPT_ACKNOWLEDGE => self.interrupt.acknowledge(value),
            register::STATUS => self.set_status(value),
            register::QUEUE_SIZE => self.set_up_queue(|queue| queue.size = value),
            // A driver that lets go of a device that it has reset.
            register::QUEUE_READY if value == 0 && self.status == 0 => {}
            register::QUEUE_READY => self.set_up_queue(|queue| queue.ready = value == 1),
            register::QUEUE_DESCRIPTORS_LOW => {
                self.set_up_queue(|queue| set_low(&mut queue.descriptors, value));
            }
            register::QUEUE_DESCRIPTORS_HIGH => {
                self.set_up_queue(|queue| set_high(&mut queue.descriptors, value));
            }
            register::QUEUE_DRIVER_LOW => {
                self.set_up_queue(|queue| set_low(&mut queue.driver, value));
            }
            register::QUEUE_DRIVER_HIGH => {
                self.set_up_queue(|queue| set_high(&mut queue.driver, value));
            }
            register::QUEUE_DEVICE_LOW => {
                self.set_up_queue(|queue| set_low(&mut queue.device, value));
            }
            register::QUEUE_DEVICE_HIGH => {
                self.set_up_queue(|queue| set_high(&mut queue.device, value));
            }
            _ => self.interrupt.warn(format_args!(
                "write of {value:#x} to register {offset:#x}, which cannot be written"
            )),
        }
    }

    fn status(&self) -> u32 {
        if self.interrupt.needs_reset() {
            self.status | VIRTIO_CONFIG_S_NEEDS_RESET
        } else {
            self.status
        }
    }

    /// Device initialization (section 3.1.1): the driver only ever adds bits, or resets.
    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let value = value & !VIRTIO_CONFIG_S_NEEDS_RESET;
        let added = value & !self.status;
        if value & self.status != self.status {
            let status = self.status;
            self.interrupt.warn(format_args!(
                "write of {value:#x} to the status register, which was {status:#x}: bits are only \
                 cleared by a reset"
            ));
            return;
        }
        if added & VIRTIO_CONFIG_S_FAILED != 0 {
            self.interrupt.warn(format_args!("the driver has given up"));
        }
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !self.accepts_features() {
            // The driver sees that it was refused by reading the bit back as zero.
            self.status = value & !VIRTIO_CONFIG_S_FEATURES_OK & !VIRTIO_CONFIG_S_DRIVER_OK;
            return;
        }
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            if value & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
                self.interrupt
                    .warn(format_args!("DRIVER_OK without FEATURES_OK is ignored"));
                self.status = value & !VIRTIO_CONFIG_S_DRIVER_OK;
                return;
            }
            self.status = value;
            match self.activate() {
                Ok(()) => {}
                Err(ActivateError::Driver(reason)) => self.interrupt.need_reset(&reason),
                Err(ActivateError::Host(reason)) => self.interrupt.need_reset_by_host(&reason),
            }
            return;
        }
        self.status = value;
    }

    fn accepts_features(&mut self) -> bool {
        let offered = self.device.features();
        let accepted = self.driver_features;
        let valid = accepted & !offered == 0 && accepted & F_VERSION_1 != 0;
        if !valid {
            self.interrupt.warn(format_args!(
                "the driver accepts features {accepted:#x} of {offered:#x} offered: it must accept \
                 VERSION_1 and none that are not offered"
            ));
        }
        valid
    }

    fn set_driver_features(&mut self, value: u32) {
        let phase = VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;
        if self.status & phase != VIRTIO_CONFIG_S_DRIVER {
            self.interrupt.warn(format_args!(
                "driver features written out of turn are ignored"
            ));
            return;
        }
        match self.driver_features_select {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            _ if value == 0 => {}
            select => self
                .interrupt
                .warn(format_args!("driver features {select} do not exist")),
        }
    }

    fn set_up_queue(&mut self, change: impl FnOnce(&mut QueueRegisters)) {
        let phase = VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
        if self.status & phase != VIRTIO_CONFIG_S_FEATURES_OK {
            self.interrupt.warn(format_args!(
                "queue registers written out of turn are ignored"
            ));
            return;
        }
        match self.queues.get_mut(self.queue_select as usize) {
            Some(queue) => change(queue),
            None => {
                let index = self.queue_select;
                self.interrupt
                    .warn(format_args!("there is no queue {index}"));
            }
        }
    }

    /// A doorbell that did not arrive by its event: one written in a way that the driver should
    /// not, or under a hypervisor that was not told of the events.
    fn ring_doorbell(&mut self, queue: u32) {
        match self.doorbells.get(queue as usize) {
            // It fails only when the counter is full, and then it is readable as wanted.
            Some(doorbell) => drop(doorbell.write(1)),
            None => self
                .interrupt
                .warn(format_args!("the doorbell of queue {queue} does not exist")),
        }
    }

    fn activate(&mut self) -> Result<(), ActivateError> {
        let event_index = self.driver_features & F_EVENT_IDX != 0;
        let mut queues = Vec::with_capacity(self.queues.len());
        let max_sizes = self.device.queue_max_sizes();
        for (index, registers) in self.queues.iter().enumerate() {
            let max_size = max_sizes.get(index).copied().unwrap_or_default();
            let queue = registers
                .to_queue(max_size, event_index, &self.memory)
                .map_err(|error| {
                    let reason = format!("queue {index} was set up as {registers:x?}: {error}");
                    ActivateError::Driver(reason)
                })?;
            let doorbell = self.doorbells.get(index).map(EventFd::try_clone);
            let Some(Ok(doorbell)) = doorbell else {
                return Err(ActivateError::Host(format!(
                    "the doorbell of queue {index} cannot be duplicated"
                )));
            };
            let queue = VirtQueue::new(index as u16, &queue, doorbell, self.memory.clone());
            queues.push(queue.map_err(|error| ActivateError::Driver(error.to_string()))?);
        }
        // Buffers that the driver made available before this are served without a doorbell.
        for queue in &queues {
            queue.ring_doorbell();
        }
        let worker = self.device.activate(Activation {
            memory: self.memory.clone(),
            features: self.driver_features,
            queues,
            interrupt: self.interrupt.clone(),
        });
        let worker = self.event_loop.add(worker.map_err(ActivateError::Host)?);
        self.worker = Some(worker.map_err(|error| ActivateError::Host(error.to_string()))?);
        Ok(())
    }

    /// Takes the device back to its initial state (section 2.4). When this returns, its worker has
    /// ended and no more of guest memory is touched.
    fn reset(&mut self) {
        if let Some(worker) = self.worker.take()
            && let Err(error) = self.event_loop.remove(worker)
        {
            self.interrupt
                .warn_of_host(format_args!("cannot stop its worker: {error}"));
        }
        for doorbell in &self.doorbells {
            // It fails only where nobody has rung.
            let _ = doorbell.read();
        }
        self.interrupt.reset();
        self.device.config().reset_driver_field();
        self.status = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.queues.fill(QueueRegisters::default());
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(start) = offset.checked_sub(register::CONFIG) {
            self.device.config().read(start, data);
            return;
        }
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(bytes) if offset.is_multiple_of(4) => {
                *bytes = self.read_register(offset).to_le_bytes();
            }
            _ => {
                data.fill(0);
                self.interrupt.warn(format_args!(
                    "read of {} bytes at {offset:#x}: registers are 4 bytes wide",
                    data.len()
                ));
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(start) = offset.checked_sub(register::CONFIG) {
            if self.device.config().write_for_driver(start, data) {
                self.device.driver_wrote_config(start, data);
            } else {
                self.interrupt.warn(format_args!(
                    "write of {} bytes at {offset:#x} of the configuration space, which are not the \
                     driver's to write",
                    data.len()
                ));
            }
            return;
        }
        match <[u8; 4]>::try_from(data) {
            Ok(bytes) if offset.is_multiple_of(4) => {
                self.write_register(offset, u32::from_le_bytes(bytes));
            }
            _ => self.interrupt.warn(format_args!(
                "write of {} bytes at {offset:#x}: registers are 4 bytes wide",
                data.len()
            )),
        }
    }
}

/// The lower (0) or upper (1) half of `bits`; there are no others.
fn half(bits: u64, select: u32) -> u32 {
    match select {
        0 => bits as u32,
        1 => (bits >> 32) as u32,
        _ => 0,
    }
}

fn set_low(register: &mut u64, value: u32) {
    *register = *register & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(register: &mut u64, value: u32) {
    *register = *register & u64::from(u32::MAX) | u64::from(value) << 32;
}

#[cfg(test)]
mod tests;
