//! The devices of the machine: buses, windows, interrupts and doorbells.

use std::num::NonZeroU32;
use std::sync::{Arc, Mutex};

use bantam_arch::acpi::{self, VirtioMmioWindow};
use bantam_arch::layout;
use bantam_devices::acpi_power::{AcpiPower, PowerValues};
use bantam_devices::boot_timer::BootTimer;
use bantam_devices::bus::Bus;
use bantam_devices::device_log::{DeviceLog, MachineLog};
use bantam_devices::disk::DiskFile;
use bantam_devices::exit_port::ExitPort;
use bantam_devices::i8042::I8042;
use bantam_devices::panic_device::PanicDevice;
use bantam_devices::pci_bus::PciBus;
use bantam_devices::rate_limiter::{Limits, RateLimit};
use bantam_devices::rtc::Rtc;
use bantam_devices::serial::{Serial, SerialMetrics};
use bantam_devices::tap::{QueueCount, Tap};
use bantam_devices::virtio::balloon::{Balloon, BalloonHandle, BalloonOptions};
use bantam_devices::virtio::block::{Block, BlockError, BlockHandle, BlockOptions, Engine};
use bantam_devices::virtio::console::{Console as ConsoleDevice, ConsoleHandle};
use bantam_devices::virtio::net::{Net, NetHandle};
use bantam_devices::virtio::rng::{EntropyMetrics, Rng};
use bantam_devices::virtio::transport::mmio::MmioTransport;
use bantam_devices::virtio::vsock::{Vsock, VsockMetrics};
use bantam_devices::virtio::{VirtioDevice, VirtioInterrupt};
use bantam_devices::{EventLoop, ListeningSocket};
use bantam_memory::GuestMemory;

use crate::config::{
    BalloonConfig, BlockEngineOption, DiskConfig, Mtu, NetConfig, QueuePairs, SerialConfig,
    VsockConfig,
};
use crate::console::Console;
use crate::disk::disk_options;
use crate::error::Error;
use crate::event_loop::EventLoopThread;
use crate::interval_timer::{self, IntervalTimer};
use crate::metadata::MachineMetadata;
use crate::run_control::RunControl;
use crate::serial::{self, SerialGuard};
use crate::vm::Vm;

/// The keyboard controller with its keyboard, by which a guest also ends the machine.
pub(crate) fn attach_keyboard(
    ports: &mut Bus,
    vm: &Vm,
    control: &Arc<RunControl>,
) -> Result<Arc<Mutex<I8042>>, Error> {
    let interrupt = vm.interrupt_event(layout::KEYBOARD_GSI)?;
    let i8042 = Arc::new(Mutex::new(I8042::new(control.clone(), Box::new(interrupt))));
    ports.insert(layout::I8042_PORT.into(), 1, i8042.clone())?;
    ports.insert_part(
        layout::I8042_COMMAND_PORT.into(),
        1,
        (layout::I8042_COMMAND_PORT - layout::I8042_PORT).into(),
        i8042.clone(),
    )?;
    Ok(i8042)
}

/// The interval timer, by which a kernel without a paravirtual clock measures the processor's.
pub(crate) fn attach_interval_timer(ports: &mut Bus, vm: &Arc<Vm>) -> Result<(), Error> {
    let timer = Arc::new(Mutex::new(IntervalTimer::new(vm.clone())));
    ports.insert(
        layout::INTERVAL_TIMER_PORT.into(),
        layout::INTERVAL_TIMER_PORT_COUNT.into(),
        timer.clone(),
    )?;
    ports.insert_part(
        layout::SYSTEM_CONTROL_PORT.into(),
        1,
        interval_timer::SYSTEM_CONTROL,
        timer,
    )?;
    Ok(())
}

/// The ACPI registers by which a guest ends the machine.
pub(crate) fn attach_power_control(
    ports: &mut Bus,
    control: &Arc<RunControl>,
) -> Result<(), Error> {
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

/// The real-time clock, for guests without a paravirtual one.
pub(crate) fn attach_rtc(ports: &mut Bus) -> Result<(), Error> {
    ports.insert(
        layout::RTC_PORT.into(),
        layout::RTC_PORT_COUNT.into(),
        Arc::new(Mutex::new(Rtc::new())),
    )?;
    Ok(())
}

/// The PCI bus, which has nothing on it.
pub(crate) fn attach_pci_bus(ports: &mut Bus) -> Result<(), Error> {
    ports.insert(
        layout::PCI_CONFIG_PORT.into(),
        layout::PCI_CONFIG_PORT_COUNT.into(),
        Arc::new(Mutex::new(PciBus::default())),
    )?;
    Ok(())
}

/// The ports by which a guest says what has become of it: that it has panicked, or a number of its own.
pub(crate) fn attach_outcome_ports(
    ports: &mut Bus,
    control: &Arc<RunControl>,
) -> Result<(), Error> {
    let panic_device = PanicDevice::new(control.clone());
    let panic_device = Arc::new(Mutex::new(panic_device));
    ports.insert(layout::PANIC_PORT.into(), 1, panic_device)?;
    let exit_port = Arc::new(Mutex::new(ExitPort::new(control.clone())));
    ports.insert(layout::EXIT_PORT.into(), 1, exit_port)?;
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
    log: DeviceLog,
) -> Result<(SerialGuard, Arc<SerialMetrics>), Error> {
    let open = serial::open("the serial port", config, console)?;
    let interrupt = vm.interrupt_event(layout::SERIAL_GSI)?;
    let port = Serial::new(Box::new(interrupt), limit, log);
    let port = port.map_err(Error::resource("the serial port"))?;
    let metrics = port.metrics();
    let port = Arc::new(Mutex::new(port));
    if let Some(endpoint) = open.endpoint {
        let worker = endpoint.serve(port.clone());
        event_loop.add(worker.map_err(Error::resource("the serial port"))?)?;
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
    /// The devices.
    pub(crate) disks: Vec<BlockHandle>,
    /// The threads of those that have one of their own.
    pub(crate) threads: Vec<EventLoopThread>,
}

/// The network devices of a machine.
#[derive(Default)]
pub(crate) struct AttachedNetworks {
    /// The devices.
    pub(crate) networks: Vec<NetHandle>,
    /// The threads of those that have one of their own.
    pub(crate) threads: Vec<EventLoopThread>,
}

/// Gives each virtio device its place in the machine, in the order in which they are attached.
pub(crate) struct VirtioDevices<'a> {
    vm: &'a Vm,
    memory: &'a Arc<GuestMemory>,
    event_loop: &'a EventLoop,
    mmio: &'a mut Bus,
    log: &'a MachineLog,
    windows: Vec<VirtioMmioWindow>,
    transports: Vec<Arc<Mutex<MmioTransport>>>,
}

impl<'a> VirtioDevices<'a> {
    /// None yet.
    pub(crate) fn new(
        vm: &'a Vm,
        memory: &'a Arc<GuestMemory>,
        event_loop: &'a EventLoop,
        mmio: &'a mut Bus,
        log: &'a MachineLog,
    ) -> VirtioDevices<'a> {
        VirtioDevices {
            vm,
            memory,
            event_loop,
            mmio,
            log,
            windows: Vec::new(),
            transports: Vec::new(),
        }
    }

    /// The windows taken so far, in ascending order.
    pub(crate) fn windows(&self) -> &[VirtioMmioWindow] {
        &self.windows
    }

    /// The devices attached, in that order.
    pub(crate) fn into_transports(self) -> Vec<Arc<Mutex<MmioTransport>>> {
        self.transports
    }

    /// Attaches the disks that `configs` name to a machine of `vcpus`.
    pub(crate) fn attach_disks(
        &mut self,
        configs: &[DiskConfig],
        vcpus: u8,
        control: &Arc<RunControl>,
    ) -> Result<AttachedDisks, Error> {
        let mut disks = AttachedDisks::default();
        for (index, config) in configs.iter().enumerate() {
            let options = BlockOptions {
                engine: match config.engine {
                    BlockEngineOption::Auto => Engine::Auto,
                    BlockEngineOption::IoUring => Engine::IoUring,
                    BlockEngineOption::Sync => Engine::Sync,
                },
                queues: config.queue_count(vcpus),
                polls: config.poll,
                limits: config.limits.into(),
            };
            let file = DiskFile::open(&config.path, &disk_options(config))?;
            let id = match &config.id {
                Some(id) => id.as_str().to_string(),
                None => format!("disk{index}"),
            };
            let block = Block::new(file, &id, &options).map_err(|error| match error {
                BlockError::Ring(source) => Error::IoUring {
                    path: config.path.clone(),
                    source,
                },
                BlockError::Resource(source) => Error::Resource {
                    what: "the timer and event of a disk",
                    source,
                },
            })?;
            let interrupt = self.next_interrupt(format!("disk '{}'", config.path.display()))?;
            disks.disks.push(block.handle(interrupt.clone()));
            let event_loop = self.event_loop_for(
                config.iothread,
                &format!("bantam-io{index}"),
                control,
                &mut disks.threads,
            )?;
            self.attach_to(event_loop, interrupt, Box::new(block))?;
        }
        Ok(disks)
    }

    /// Attaches the network interfaces that `configs` name to a machine of `vcpu_count` vCPUs. Some of
    /// them may serve `metadata`.
    pub(crate) fn attach_networks(
        &mut self,
        configs: &[NetConfig],
        vcpu_count: u8,
        metadata: Option<&MachineMetadata>,
        control: &Arc<RunControl>,
    ) -> Result<AttachedNetworks, Error> {
        let mut networks = AttachedNetworks::default();
        for (index, config) in configs.iter().enumerate() {
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
            let limits = config.limits.into();
            let name = config.device_name(index);
            let service = metadata.and_then(|metadata| metadata.service(&name));
            let net = Net::new(tap, config.mac_address().bytes(), mtu, &limits, service)
                .map_err(Error::resource("the timers of a network interface"))?;
            networks.networks.push(net.handle());
            let interrupt = self.next_interrupt(format!("network interface '{}'", config.tap))?;
            let event_loop = self.event_loop_for(
                config.iothread,
                &format!("bantam-net{index}"),
                control,
                &mut networks.threads,
            )?;
            self.attach_to(event_loop, interrupt, Box::new(net))?;
        }
        Ok(networks)
    }

    /// The event loop of a device: one on a thread of its own, which is added to `threads`, where it
    /// is to have one.
    fn event_loop_for(
        &self,
        has_own: bool,
        thread_name: &str,
        control: &Arc<RunControl>,
        threads: &mut Vec<EventLoopThread>,
    ) -> Result<EventLoop, Error> {
        if !has_own {
            return Ok(self.event_loop.clone());
        }
        let thread = EventLoopThread::start(thread_name, control.clone())?;
        let event_loop = thread.handle.clone();
        threads.push(thread);
        Ok(event_loop)
    }

    /// Attaches the socket device that `config` describes.
    pub(crate) fn attach_vsock(
        &mut self,
        config: &VsockConfig,
    ) -> Result<Arc<VsockMetrics>, Error> {
        let path = &config.socket;
        let listener = ListeningSocket::bind(path).map_err(|source| Error::Listen {
            path: path.clone(),
            purpose: "the socket device".to_string(),
            source,
        })?;
        let device = Vsock::new(config.cid.get(), listener);
        let metrics = device.metrics();
        let name = format!("socket device '{}'", path.display());
        self.attach(name, Box::new(device))?;
        Ok(metrics)
    }

    /// Attaches a console.
    pub(crate) fn attach_console(&mut self) -> Result<ConsoleHandle, Error> {
        self.attach_console_device("console".to_string(), ConsoleDevice::new())
    }

    /// Attaches a device of channels with these names.
    pub(crate) fn attach_channels(&mut self, names: Vec<String>) -> Result<ConsoleHandle, Error> {
        let device = ConsoleDevice::with_channels(names);
        self.attach_console_device("channels".to_string(), device)
    }

    fn attach_console_device(
        &mut self,
        name: String,
        device: ConsoleDevice,
    ) -> Result<ConsoleHandle, Error> {
        let interrupt = self.next_interrupt(name)?;
        let handle = device.handle(interrupt.clone());
        self.attach_to(self.event_loop.clone(), interrupt, Box::new(device))?;
        Ok(handle)
    }

    /// Attaches an entropy device.
    pub(crate) fn attach_entropy(&mut self, limits: &Limits) -> Result<Arc<EntropyMetrics>, Error> {
        let rng = Rng::new(limits).map_err(Error::resource("the entropy device"))?;
        let metrics = rng.metrics();
        self.attach("entropy device".to_string(), Box::new(rng))?;
        Ok(metrics)
    }

    /// Attaches the balloon that `config` describes.
    pub(crate) fn attach_balloon(
        &mut self,
        config: &BalloonConfig,
    ) -> Result<BalloonHandle, Error> {
        let options = BalloonOptions {
            target_mib: config.size.mib(),
            deflate_on_oom: config.deflate_on_oom,
            statistics_interval: NonZeroU32::new(config.statistics),
            free_page_reporting: config.reporting,
            free_page_hinting: config.hinting,
        };
        let balloon = Balloon::new(&options, self.memory)?;
        let interrupt = self.next_interrupt("balloon".to_string())?;
        let handle = balloon.handle(interrupt.clone());
        self.attach_to(self.event_loop.clone(), interrupt, Box::new(balloon))?;
        Ok(handle)
    }

    /// Puts `device`, called `name` in the log, behind the next free window and interrupt.
    fn attach(&mut self, name: String, device: Box<dyn VirtioDevice>) -> Result<(), Error> {
        let interrupt = self.next_interrupt(name)?;
        self.attach_to(self.event_loop.clone(), interrupt, device)
    }

    /// The interrupt of the device that is attached next, called `name` in the log.
    fn next_interrupt(&self, name: String) -> Result<Arc<VirtioInterrupt>, Error> {
        let line = self.vm.interrupt_event(self.next_window().gsi)?;
        let log = self.log.device(&name);
        Ok(Arc::new(VirtioInterrupt::new(log, Box::new(line))))
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
        let transport = Arc::new(Mutex::new(transport));
        self.mmio
            .insert(window.address, window.size, transport.clone())?;
        self.windows.push(window);
        self.transports.push(transport);
        Ok(())
    }
}
