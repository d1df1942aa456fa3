//! The machine's virtio devices: windows, interrupts and doorbells.

use std::sync::{Arc, Mutex};

use bantam_arch::acpi::VirtioMmioWindow;
use bantam_arch::layout;
use bantam_devices::bus::Bus;
use bantam_devices::virtio::mmio::MmioTransport;
use bantam_devices::virtio::{VirtioDevice, VirtioInterrupt};
use bantam_devices::{EventLoop, GuestMemory};

use crate::error::Error;
use crate::vm::Vm;

/// Gives each virtio device its place in the machine.
pub(crate) struct VirtioDevices<'a> {
    pub(crate) vm: &'a Vm,
    pub(crate) memory: &'a Arc<GuestMemory>,
    pub(crate) event_loop: &'a EventLoop,
    pub(crate) mmio: &'a mut Bus,
    /// The windows taken so far, in ascending order.
    pub(crate) windows: Vec<VirtioMmioWindow>,
}

impl VirtioDevices<'_> {
    /// Puts `device`, called `name` in the log, behind the next free window and interrupt.
    pub(crate) fn attach(
        &mut self,
        name: String,
        device: Box<dyn VirtioDevice>,
    ) -> Result<(), Error> {
        let index = self.windows.len() as u32;
        let window = VirtioMmioWindow {
            address: layout::VIRTIO_MMIO + u64::from(index) * layout::VIRTIO_MMIO_WINDOW_SIZE,
            size: layout::VIRTIO_MMIO_WINDOW_SIZE,
            gsi: layout::FIRST_VIRTIO_GSI + index,
        };
        let line = self.vm.interrupt_event(window.gsi)?;
        let interrupt = VirtioInterrupt::new(name, Box::new(line));
        let transport = MmioTransport::new(
            device,
            self.memory.clone(),
            self.event_loop.clone(),
            interrupt,
        )
        .map_err(Error::resource("the doorbells of a device"))?;
        for (queue, doorbell) in transport.doorbells().iter().enumerate() {
            self.vm
                .bind_doorbell(window.address, queue as u32, doorbell)?;
        }
        self.mmio
            .insert(window.address, window.size, Arc::new(Mutex::new(transport)))?;
        self.windows.push(window);
        Ok(())
    }
}
