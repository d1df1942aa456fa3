//! The devices of the machine: buses, windows, interrupts and doorbells.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use bantam_arch::acpi::{self, VirtioMmioWindow};
use bantam_arch::layout;
use bantam_devices::acpi_power::{AcpiPower, PowerValues};
use bantam_devices::boot_timer::BootTimer;
use bantam_devices::bus::Bus;
use bantam_devices::disk::{CacheMode, DiskFile};
use bantam_devices::i8042::I8042;
use bantam_devices::rate_limiter::RateLimit;
use bantam_devices::serial::{Serial, SerialMetrics, SerialWorker};
use bantam_devices::tap::{QueueCount, Tap};
use bantam_devices::virtio::block::{Block, BlockControl, BlockOptions, Engine};
use bantam_devices::virtio::mmio::MmioTransport;
use bantam_devices::virtio::net::Net;
use bantam_devices::virtio::rng::Rng;
use bantam_devices::virtio::{VirtioDevice, VirtioInterrupt};
use bantam_devices::{EventLoop, GuestMemory};

use crate::config::{
    BlockEngineOption, CacheModeOption, DiskConfig, Mtu, NetConfig, Quantity, QueuePairs,
    SerialConfig,
};
use crate::control::Control;
use crate::error::Error;
use crate::event_loop::EventLoopThread;
use crate::serial::{self, Console, SerialGuard};
use crate::vm::Vm;

/// The keyboard controller with its keyboard, by which a guest also ends the machine.
pub(crate) fn attach_keyboard(
    ports: &mut Bus,
    vm: &Vm,
    control: &Arc<Control>,
) -> Result<Arc<Mutex<I8042>>, Error> {
    let interrupt = vm.interrupt_event(layout::KEYBOARD_GSI)?;
    let i8042 = Arc::new(Mutex::new(I8042::new(control.clone(), Box::new(interrupt))));
    ports.insert(
        layout::I8042_PORT.into(),
        layout::I8042_PORT_COUNT.into(),
        i8042.clone(),
    )?;
    Ok(i8042)
}

/// The ACPI registers by which a guest ends the machine.
pub(crate) fn attach_power_control(ports: &mut Bus, control: &Arc<Control>) -> Result<(), Error> {
    let values = PowerValues {
        soft_off_sleep_type: acpi::ACPI_SLEEP_TYPE_S5,
        reset: acpi::ACPI_RESET_VALUE,
    };
    ports.insert(
        layout::ACPI_POWER_PORT.into(),
        layout::ACPI_POWER_PORT_COUNT.into(),
        Arc::new(Mutex::new(AcpiPower::new(values, control.clone()))),
    )?;
    Ok(())
}

/// The register by which the guest says that it has booted.
pub(crate) fn attach_boot_timer(mmio: &mut Bus) -> Result<(), Error> {
    let timer = BootTimer::start().map_err(Error::resource("the boot timer"))?;
    mmio.insert(
        layout::BOOT_TIMER,
        layout::BOOT_TIMER_SIZE,
        Arc::new(Mutex::new(timer)),
    )?;
    Ok(())
}

/// The serial port, with the host's end that `config` names, and what it counts. Output beyond `limit`
/// bytes is dropped.
pub(crate) fn attach_serial(
    ports: &mut Bus,
    vm: &Vm,
    event_loop: &EventLoop,
    config: &SerialConfig,
    limit: Option<RateLimit>,
    console: Console,
) -> Result<(SerialGuard, Arc<SerialMetrics>), Error> {
    let open = serial::open(config, console)?;
    let interrupt = vm.interrupt_event(layout::SERIAL_GSI)?;
    let port = Serial::new(Box::new(interrupt), limit);
    let port = port.map_err(Error::resource("the serial port"))?;
    let metrics = port.metrics();
    let port = Arc::new(Mutex::new(port));
    if let Some(endpoint) = open.endpoint {
        event_loop.add(Box::new(SerialWorker::new(port.clone(), endpoint)))?;
    }
    ports.insert(
        layout::SERIAL_PORT.into(),
        layout::SERIAL_PORT_COUNT.into(),
        port,
    )?;
    Ok((open.guard, metrics))
}

/// The disks of a machine.
#[derive(Default)]
pub(crate) struct AttachedDisks {
    /// The devices, with the paths by which their images were opened.
    pub(crate) disks: Vec<(PathBuf, BlockControl)>,
    /// The threads of those that have one of their own.
    pub(crate) threads: Vec<EventLoopThread>,
}

/// Gives each virtio device its place in the machine, in the order in which they are attached.
pub(crate) struct VirtioDevices<'a> {
    vm: &'a Vm,
    memory: &'a Arc<GuestMemory>,
    event_loop: &'a EventLoop,
    mmio: &'a mut Bus,
    windows: Vec<VirtioMmioWindow>,
}

impl<'a> VirtioDevices<'a> {
    /// None yet.
    pub(crate) fn new(
        vm: &'a Vm,
        memory: &'a Arc<GuestMemory>,
        event_loop: &'a EventLoop,
        mmio: &'a mut Bus,
    ) -> VirtioDevices<'a> {
        VirtioDevices {
            vm,
            memory,
            event_loop,
            mmio,
            windows: Vec::new(),
        }
    }

    /// The windows taken so far, in ascending order.
    pub(crate) fn windows(&self) -> &[VirtioMmioWindow] {
        &self.windows
    }

    /// Attaches the disks that `configs` name to a machine of `vcpus`.
    pub(crate) fn attach_disks(
        &mut self,
        configs: &[DiskConfig],
        vcpus: u8,
        control: &Arc<Control>,
    ) -> Result<AttachedDisks, Error> {
        let mut disks = AttachedDisks::default();
        for (index, config) in configs.iter().enumerate() {
            let cache = match config.cache {
                CacheModeOption::Writeback => CacheMode::Writeback,
                CacheModeOption::Writethrough => CacheMode::Writethrough,
                CacheModeOption::None => CacheMode::None,
                CacheModeOption::Unsafe => CacheMode::Unsafe,
            };
            let options = BlockOptions {
                engine: match config.engine {
                    BlockEngineOption::Auto => Engine::Auto,
                    BlockEngineOption::IoUring => Engine::IoUring,
                    BlockEngineOption::Sync => Engine::Sync,
                },
                queues: config.queue_count(vcpus),
                polls: config.poll,
                bytes: rate_limit(config.bytes_per_second, config.burst_bytes),
                operations: rate_limit(config.operations_per_second, config.burst_operations),
            };
            let file = DiskFile::open(&config.path, config.readonly, cache)?;
            let id = match &config.id {
                Some(id) => id.as_str().to_string(),
                None => format!("disk{index}"),
            };
            let block = Block::new(file, &id, &options).map_err(|source| Error::IoUring {
                path: config.path.clone(),
                source,
            })?;
            let interrupt = self.next_interrupt(format!("disk '{}'", config.path.display()))?;
            let block_control = block.control(interrupt.clone());
            disks.disks.push((config.path.clone(), block_control));
            let event_loop = if config.iothread {
                let thread_name = format!("bantam-io{index}");
                let thread = EventLoopThread::start(&thread_name, control.clone())?;
                let event_loop = thread.handle.clone();
                disks.threads.push(thread);
                event_loop
            } else {
                self.event_loop.clone()
            };
            self.attach_to(event_loop, interrupt, Box::new(block))?;
        }
        Ok(disks)
    }

    /// Attaches the network interfaces that `configs` name to a machine of `vcpu_count` vCPUs.
    pub(crate) fn attach_networks(
        &mut self,
        configs: &[NetConfig],
        vcpu_count: u8,
    ) -> Result<(), Error> {
        for config in configs {
            let mtu = config.mtu.map(Mtu::get);
            let useful = vcpu_count.min(QueuePairs::MAX);
            let queues = match config.queues {
                Some(queues) => QueueCount::Exactly(queues.get().into()),
                None => QueueCount::AtMost(useful.into()),
            };
            let tap = Tap::open(config.tap.as_str(), mtu, queues)?;
            if config.queues.is_none() && tap.queues().len() < useful.into() {
                tracing::info!(
                    "tap '{}' was made with a single queue, so {vcpu_count} vCPUs share one; made \
                     with 'multi_queue', it has one for each",
                    config.tap
                );
            }
            let device = Net::new(tap, config.mac_address().bytes(), mtu);
            self.attach(
                format!("network interface '{}'", config.tap),
                Box::new(device),
            )?;
        }
        Ok(())
    }

    /// Attaches an entropy device.
    pub(crate) fn attach_entropy(&mut self) -> Result<(), Error> {
        let rng = Rng::new().map_err(Error::resource("the entropy device"))?;
        self.attach("entropy device".to_string(), Box::new(rng))
    }

    /// Puts `device`, called `name` in the log, behind the next free window and interrupt.
    fn attach(&mut self, name: String, device: Box<dyn VirtioDevice>) -> Result<(), Error> {
        let interrupt = self.next_interrupt(name)?;
        self.attach_to(self.event_loop.clone(), interrupt, device)
    }

    /// The interrupt of the device that is attached next, called `name` in the log.
    fn next_interrupt(&self, name: String) -> Result<Arc<VirtioInterrupt>, Error> {
        let line = self.vm.interrupt_event(self.next_window().gsi)?;
        Ok(Arc::new(VirtioInterrupt::new(name, Box::new(line))))
    }

    fn next_window(&self) -> VirtioMmioWindow {
        let index = self.windows.len() as u32;
        VirtioMmioWindow {
            address: layout::VIRTIO_MMIO + u64::from(index) * layout::VIRTIO_MMIO_WINDOW_SIZE,
            size: layout::VIRTIO_MMIO_WINDOW_SIZE,
            gsi: layout::FIRST_VIRTIO_GSI + index,
        }
    }

    /// As [`VirtioDevices::attach`], where `event_loop` does the device's work and `interrupt` is
    /// [`VirtioDevices::next_interrupt`].
    fn attach_to(
        &mut self,
        event_loop: EventLoop,
        interrupt: Arc<VirtioInterrupt>,
        device: Box<dyn VirtioDevice>,
    ) -> Result<(), Error> {
        let window = self.next_window();
        let transport = MmioTransport::new(device, self.memory.clone(), event_loop, interrupt)
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

fn rate_limit(per_second: Option<Quantity>, burst: Option<Quantity>) -> Option<RateLimit> {
    let burst = burst.map(Quantity::get);
    per_second.map(|per_second| RateLimit::per_second(per_second.get(), burst))
}
