//! Gives virtio devices their places in the machine.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use bantam_arch::acpi::VirtioMmioWindow;
use bantam_arch::layout;
use bantam_devices::bus::Bus;
use bantam_devices::device_log::DeviceLog;
use bantam_devices::virtio::block::ImageWork;
use bantam_devices::virtio::console::Console as ConsoleDevice;
use bantam_devices::virtio::owner::{DeviceHandle, DeviceMetrics};
use bantam_devices::virtio::transport::mmio::{MmioLink, MmioTransport};
use bantam_devices::virtio::{DriverLink, VirtioDevice};
use bantam_memory::GuestMemory;
use bantam_usernet::ForwardedPort;

use super::serial_end::{OpenSerial, SerialGuard};
use super::streams::{Stream, StreamPaths};
use super::table::Entry;
use super::turn::Turn;
use crate::config::DeviceName;
use crate::disk_threads::DiskThreads;
use crate::error::Error;
use crate::event_loop::DeviceLoop;
use crate::hooks::ThreadRole;
use crate::machine::MachineContext;
use crate::vm::Vm;

/// A device that is to get a place in the machine.
pub(super) struct NewDevice<D> {
    pub(super) name: DeviceName,
    /// Its name in the log.
    pub(super) log_name: String,
    /// Name of the device's own thread, if it gets one.
    pub(super) own_thread: Option<String>,
    pub(super) model: D,
}

/// Gives each virtio device its window, interrupt and doorbells, in the order in which they are attached.
pub(crate) struct Builder<'a> {
    pub(super) vm: &'a Vm,
    pub(super) memory: &'a Arc<GuestMemory>,
    mmio: &'a mut Bus,
    context: &'a MachineContext,
    event_loop: &'a DeviceLoop,
    windows: Vec<VirtioMmioWindow>,
    built: BuiltDevices,
}

/// The virtio devices of a machine, and what belongs to them.
#[derive(Default)]
pub(crate) struct BuiltDevices {
    pub(crate) entries: Vec<Entry>,
    pub(crate) metrics: BTreeMap<DeviceName, DeviceMetrics>,
    /// The event loops of devices that have a thread of their own.
    pub(crate) loops: Vec<DeviceLoop>,
    pub(crate) disk_threads: Vec<Arc<DiskThreads>>,
    pub(crate) stream_paths: StreamPaths,
    pub(crate) forwarded_ports: Vec<ForwardedPort>,
    /// Resources that must outlive the devices.
    pub(crate) guards: Vec<SerialGuard>,
}

impl<'a> Builder<'a> {
    /// Creates a builder of devices. `event_loop` serves those that do not get a thread of their own.
    pub(crate) fn new(
        vm: &'a Vm,
        memory: &'a Arc<GuestMemory>,
        mmio: &'a mut Bus,
        context: &'a MachineContext,
        event_loop: &'a DeviceLoop,
    ) -> Builder<'a> {
        Builder {
            vm,
            memory,
            mmio,
            context,
            event_loop,
            windows: Vec::new(),
            built: BuiltDevices::default(),
        }
    }

    /// Returns the windows taken so far, in ascending order.
    pub(crate) fn windows(&self) -> &[VirtioMmioWindow] {
        &self.windows
    }

    /// Returns everything that has been attached.
    pub(crate) fn finish(self) -> BuiltDevices {
        self.built
    }

    /// Returns the log for what is called `name`.
    pub(super) fn log(&self, name: &str) -> DeviceLog {
        self.context.log.device(name)
    }

    /// Attaches a device to the next free window and interrupt. `handle` makes the owner's handle from the
    /// device and the link to its driver.
    pub(super) fn attach<D: VirtioDevice + 'static>(
        &mut self,
        device: NewDevice<D>,
        handle: impl FnOnce(&D, Arc<DriverLink>) -> DeviceHandle,
    ) -> Result<(), Error> {
        let NewDevice {
            name,
            log_name,
            own_thread,
            model,
        } = device;
        let window = self.next_window();
        let log = self.context.log.device(&log_name);
        let log = log.observed_by(self.context.events.observer(&name));
        let line = self.vm.interrupt_event(window.gsi)?;
        let link = MmioLink::new(log, Box::new(line));
        let driver = link.driver();
        let handle = handle(&model, driver.clone());
        self.built.metrics.insert(name.clone(), handle.metrics());
        let event_loop = match own_thread {
            Some(thread_name) => {
                let event_loop = DeviceLoop::new(thread_name, ThreadRole::Device(name.clone()))?;
                let handle = event_loop.handle().clone();
                self.built.loops.push(event_loop);
                handle
            }
            None => self.event_loop.handle().clone(),
        };
        let transport = MmioTransport::new(Box::new(model), self.memory.clone(), event_loop, link)
            .map_err(Error::resource("the doorbells of a device"))?;
        for (queue, doorbell) in transport.doorbells().iter().enumerate() {
            self.vm
                .bind_doorbell(window.address, queue as u32, doorbell)?;
        }
        let device = Arc::new(Mutex::new(transport));
        self.mmio
            .insert(window.address, window.size, device.clone())?;
        self.windows.push(window);
        self.built.entries.push(Entry {
            name,
            device,
            handle,
            link: driver,
            turn: Arc::new(Turn::default()),
        });
        Ok(())
    }

    /// Prepares the threads of the disk `name` at place `index`. `work` is that of its first image, if that is not
    /// raw.
    pub(super) fn add_disk_threads(
        &mut self,
        index: usize,
        name: DeviceName,
        work: Option<Arc<ImageWork>>,
    ) -> Arc<DiskThreads> {
        let threads = Arc::new(DiskThreads::new(index, name, self.context, work));
        self.built.disk_threads.push(threads.clone());
        threads
    }

    /// Takes note of ports of the host that lead to the guest.
    pub(super) fn forward(&mut self, ports: Vec<ForwardedPort>) {
        self.built.forwarded_ports.extend(ports);
    }

    /// Connects `port` of a console device to the end that is open for `stream`.
    pub(super) fn connect(
        &mut self,
        stream: Stream,
        device: &ConsoleDevice,
        port: usize,
        open: OpenSerial,
    ) {
        if let Some(endpoint) = open.endpoint {
            device.connect(port, endpoint);
        }
        if let Some(path) = open.guard.path() {
            self.built.stream_paths.insert(stream, path.to_path_buf());
        }
        self.built.guards.push(open.guard);
    }

    fn next_window(&self) -> VirtioMmioWindow {
        let index = self.windows.len() as u32;
        VirtioMmioWindow {
            address: layout::VIRTIO_MMIO + u64::from(index) * layout::VIRTIO_MMIO_WINDOW_SIZE,
            size: layout::VIRTIO_MMIO_WINDOW_SIZE,
            gsi: layout::FIRST_VIRTIO_GSI + index,
        }
    }
}
