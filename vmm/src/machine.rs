//! A machine: how it is put together, started and ended.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use bantam_arch::acpi::{self, AcpiDevices, VirtioMmioWindow};
use bantam_arch::memory_map::{memory_map, ram_regions};
use bantam_arch::{layout, mptable, registers};
use bantam_boot::{
    BootProtocol, CommandLine, LoadedKernel, StartInformation, load_initrd, load_kernel,
    write_start_information,
};
use bantam_devices::acpi_power::{AcpiPower, PowerValues};
use bantam_devices::bus::Bus;
use bantam_devices::disk::DiskFile;
use bantam_devices::event_loop::Subscriber;
use bantam_devices::i8042::I8042;
use bantam_devices::serial::{Serial, SerialWorker};
use bantam_devices::tap::Tap;
use bantam_devices::virtio::block::Block;
use bantam_devices::virtio::net::Net;
use bantam_devices::virtio::rng::Rng;
use bantam_devices::{EventLoop, GuestMemory, InterruptLine};
use event_manager::EventManager;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::config::{BootProtocolOption, MachineConfig, Mtu, SerialConfig};
use crate::control::{Control, EndOnPanic, ExitReason};
use crate::error::Error;
use crate::host::open_kvm;
use crate::serial::{self, Console, SerialGuard};
use crate::vcpu::{BootEntry, Vcpu, VcpuEnvironment, VcpuModel};
use crate::virtio::VirtioDevices;
use crate::vm::Vm;
use crate::workarounds;

/// A virtual machine.
///
/// [`Machine::new`] builds all of it, [`Machine::start`] lets its vCPUs run, and [`Machine::wait`]
/// gives the reason of its end. A machine that is dropped is stopped first.
pub struct Machine {
    control: Arc<Control>,
    vcpus: Vec<Vcpu>,
    environment: Arc<VcpuEnvironment>,
    vcpu_threads: Vec<JoinHandle<()>>,
    event_loop: EventLoopThread,
    power_button: EventFd,
    disks: Vec<(PathBuf, Arc<DiskFile>)>,
    serial: SerialGuard,
    /// Kept until all vCPUs have ended.
    _vm: Vm,
}

impl Machine {
    /// Builds the machine that `config` describes. `console` is the program's end of its serial
    /// port, where that is configured as `stdio`.
    ///
    /// # Errors
    /// When the host cannot run machines, or a file or device that `config` names cannot be used.
    pub fn new(config: &MachineConfig, console: Console) -> Result<Machine, Error> {
        config.validate()?;
        let kvm = open_kvm()?;
        let memory = Arc::new(allocate_memory(config.memory.bytes())?);
        let vm = Vm::new(&kvm, memory.clone())?;
        let control =
            Arc::new(Control::new().map_err(Error::resource("the machine's exit event"))?);
        let event_loop = EventLoopThread::start(control.clone())?;

        let mut ports = Bus::default();
        let mut mmio = Bus::default();
        let power_button = vm.interrupt_event(layout::POWER_BUTTON_GSI)?;
        attach_power_control(&mut ports, &control)?;
        let serial = attach_serial(&mut ports, &vm, &event_loop.handle, &config.serial, console)?;
        let mut virtio = VirtioDevices {
            vm: &vm,
            memory: &memory,
            event_loop: &event_loop.handle,
            mmio: &mut mmio,
            windows: Vec::new(),
        };
        let disks = attach_disks(&mut virtio, config)?;
        attach_networks(&mut virtio, config)?;
        if config.rng {
            let rng = Rng::new().map_err(Error::resource("the entropy device"))?;
            virtio.attach("entropy device".to_string(), Box::new(rng))?;
        }
        let windows = virtio.windows;

        let boot = load_guest(config, &memory, &windows)?;
        let model = VcpuModel::new(&kvm, config.cpus.get())?;
        let vcpus = (0..config.cpus.get())
            .map(|index| Vcpu::new(&vm, &model, index, (index == 0).then_some(boot)))
            .collect::<Result<_, _>>()?;
        Ok(Machine {
            environment: Arc::new(VcpuEnvironment {
                ports,
                mmio,
                memory,
                control: control.clone(),
            }),
            control,
            vcpus,
            vcpu_threads: Vec::new(),
            event_loop,
            power_button,
            disks,
            serial,
            _vm: vm,
        })
    }

    /// Lets the vCPUs run. A second call does nothing.
    ///
    /// # Errors
    /// When the host gives no threads.
    pub fn start(&mut self) -> Result<(), Error> {
        for (index, vcpu) in self.vcpus.drain(..).enumerate() {
            let environment = self.environment.clone();
            let thread = thread::Builder::new()
                .name(format!("bantam-vcpu{index}"))
                .spawn(move || {
                    let _end_on_panic = EndOnPanic(environment.control.clone());
                    vcpu.run(&environment);
                })
                .map_err(Error::resource("a vCPU thread"))?;
            self.vcpu_threads.push(thread);
        }
        Ok(())
    }

    /// Becomes readable when the machine has ended, whoever ended it.
    pub fn exit_event(&self) -> BorrowedFd<'_> {
        self.control.exit_event()
    }

    /// Where a user finds the serial port, if it is a pseudoterminal, file or socket.
    pub fn serial_path(&self) -> Option<&Path> {
        self.serial.path()
    }

    /// Presses the power button: a guest that listens to it shuts itself down, in its own time.
    ///
    /// # Errors
    /// When the host refuses to deliver the interrupt.
    pub fn press_power_button(&self) -> Result<(), Error> {
        self.power_button
            .trigger()
            .map_err(Error::resource("the interrupt of the power button"))
    }

    /// Ends the machine as if its power were cut: what the guest has not flushed is lost to it, but
    /// no request is left half done.
    pub fn stop(&self) {
        self.control.finish(Ok(ExitReason::Stopped));
    }

    /// Waits for the machine to end, and gives the reason. When it returns, all threads have ended,
    /// what the guest wrote is on stable storage, and nothing of the host is in use any more.
    ///
    /// # Errors
    /// When the machine ended for another reason than its guest's or its owner's wish, or its disks
    /// could not be flushed.
    pub fn wait(mut self) -> Result<ExitReason, Error> {
        if self.vcpu_threads.is_empty() {
            // Nobody else could ever end it.
            self.stop();
        }
        wait_readable(self.exit_event())?;
        self.end()
    }

    /// Ends all threads of a machine that is stopping.
    fn end(&mut self) -> Result<ExitReason, Error> {
        self.vcpus.clear();
        for thread in self.vcpu_threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a vCPU thread panicked");
            }
        }
        self.event_loop.end();
        let mut flushed = Ok(());
        for (path, disk) in self.disks.drain(..) {
            if let Err(source) = flush_at_end(&disk) {
                flushed = Err(Error::Flush { path, source });
            }
        }
        let outcome = self.control.take_outcome();
        let reason = outcome.unwrap_or(Ok(ExitReason::Stopped))?;
        flushed.map(|()| reason)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
        if let Err(error) = self.end() {
            tracing::error!("{error}");
        }
    }
}

fn flush_at_end(disk: &DiskFile) -> std::io::Result<()> {
    if disk.is_read_only() {
        return Ok(());
    }
    disk.flush()
}

fn wait_readable(event: BorrowedFd<'_>) -> Result<(), Error> {
    loop {
        let mut events = [PollFd::new(event, PollFlags::POLLIN)];
        match poll(&mut events, PollTimeout::NONE) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(Error::resource("a wait for the machine")(errno.into())),
        }
    }
}

/// The thread that does the work of all devices.
struct EventLoopThread {
    handle: EventLoop,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl EventLoopThread {
    fn start(control: Arc<Control>) -> Result<EventLoopThread, Error> {
        let mut manager: EventManager<Subscriber> = EventManager::new()?;
        let handle = EventLoop::of(&manager);
        let ending = Arc::new(AtomicBool::new(false));
        let thread = thread::Builder::new()
            .name("bantam-devices".to_string())
            .spawn({
                let ending = ending.clone();
                move || {
                    let _end_on_panic = EndOnPanic(control.clone());
                    while !ending.load(Ordering::SeqCst) {
                        if let Err(error) = manager.run() {
                            control.finish(Err(error.into()));
                            return;
                        }
                    }
                }
            })
            .map_err(Error::resource("the thread of the devices"))?;
        Ok(EventLoopThread {
            handle,
            ending,
            thread: Some(thread),
        })
    }

    /// Ends the loop. All workers are dropped, and finish what they have begun as they are.
    fn end(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        self.ending.store(true, Ordering::SeqCst);
        if let Err(error) = self.handle.wake() {
            tracing::error!("cannot end the device event loop: {error}");
            return;
        }
        if thread.join().is_err() {
            tracing::error!("the thread of the devices panicked");
        }
    }
}

impl Drop for EventLoopThread {
    fn drop(&mut self) {
        self.end();
    }
}

fn allocate_memory(size: u64) -> Result<GuestMemory, Error> {
    let regions: Vec<(GuestAddress, usize)> = ram_regions(size)
        .into_iter()
        .map(|(start, size)| (GuestAddress(start), size as usize))
        .collect();
    GuestMemory::from_ranges(&regions).map_err(|error| Error::Memory {
        mib: size >> 20,
        reason: error.to_string(),
    })
}

/// The ways by which a guest ends the machine: the keyboard controller and the ACPI registers.
fn attach_power_control(ports: &mut Bus, control: &Arc<Control>) -> Result<(), Error> {
    ports.insert(
        layout::I8042_PORT.into(),
        layout::I8042_PORT_COUNT.into(),
        Arc::new(Mutex::new(I8042::new(control.clone()))),
    )?;
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

fn attach_serial(
    ports: &mut Bus,
    vm: &Vm,
    event_loop: &EventLoop,
    config: &SerialConfig,
    console: Console,
) -> Result<SerialGuard, Error> {
    let open = serial::open(config, console)?;
    let interrupt = vm.interrupt_event(layout::SERIAL_GSI)?;
    let port = Serial::new(Box::new(interrupt)).map_err(Error::resource("the serial port"))?;
    let port = Arc::new(Mutex::new(port));
    if let Some(endpoint) = open.endpoint {
        event_loop.add(Box::new(SerialWorker::new(port.clone(), endpoint)))?;
    }
    ports.insert(
        layout::SERIAL_PORT.into(),
        layout::SERIAL_PORT_COUNT.into(),
        port,
    )?;
    Ok(open.guard)
}

fn attach_disks(
    virtio: &mut VirtioDevices<'_>,
    config: &MachineConfig,
) -> Result<Vec<(PathBuf, Arc<DiskFile>)>, Error> {
    let mut disks = Vec::with_capacity(config.disks.len());
    for (index, disk) in config.disks.iter().enumerate() {
        let file = DiskFile::open(&disk.path, disk.readonly)?;
        let id = match &disk.id {
            Some(id) => id.as_str().to_string(),
            None => format!("disk{index}"),
        };
        let block = Block::new(file, &id);
        disks.push((disk.path.clone(), block.disk()));
        let name = format!("disk '{}'", disk.path.display());
        virtio.attach(name, Box::new(block))?;
    }
    Ok(disks)
}

fn attach_networks(virtio: &mut VirtioDevices<'_>, config: &MachineConfig) -> Result<(), Error> {
    for net in &config.nets {
        let mtu = net.mtu.map(Mtu::get);
        let tap = Tap::open(net.tap.as_str(), mtu)?;
        let device = Net::new(tap, net.mac_address().bytes(), mtu);
        virtio.attach(format!("network interface '{}'", net.tap), Box::new(device))?;
    }
    Ok(())
}

/// Puts all that the guest finds at its start into memory.
fn load_guest(
    config: &MachineConfig,
    memory: &GuestMemory,
    windows: &[VirtioMmioWindow],
) -> Result<BootEntry, Error> {
    let path = &config.kernel;
    let mut file = File::open(path).map_err(|source| Error::OpenKernel {
        path: path.clone(),
        source,
    })?;
    let wanted = match config.boot_protocol {
        BootProtocolOption::Auto => BootProtocol::Auto,
        BootProtocolOption::Pvh => BootProtocol::Pvh,
        BootProtocolOption::Linux64 => BootProtocol::Linux64,
    };
    let kernel = load_kernel(memory, &mut file, wanted).map_err(|source| Error::LoadKernel {
        path: path.clone(),
        source,
    })?;
    tracing::info!(
        "kernel '{}' is an {}, entered at {:#x} by {:?}",
        path.display(),
        kernel.format,
        kernel.entry.0,
        kernel.protocol
    );
    let initrd = match &config.initrd {
        Some(path) => {
            let mut file = File::open(path).map_err(|source| Error::OpenInitrd {
                path: path.clone(),
                source,
            })?;
            let initrd = load_initrd(memory, &mut file, &kernel);
            Some(initrd.map_err(|source| Error::LoadInitrd {
                path: path.clone(),
                source,
            })?)
        }
        None => None,
    };
    let command_line = if finds_devices_by_acpi(config, &kernel, memory)? {
        command_line(config, &[])?
    } else {
        command_line(config, windows)?
    };
    tracing::info!("kernel command line: {command_line}");

    let vcpu_count = config.cpus.get();
    let rsdp = acpi::write_acpi_tables(
        memory,
        &AcpiDevices {
            vcpu_count,
            virtio_mmio: windows,
            serial: true,
        },
    )?;
    mptable::write_mp_table(memory, vcpu_count)?;
    registers::write_boot_tables(memory, kernel.protocol)?;
    let information = StartInformation {
        memory_map: &memory_map(config.memory.bytes()),
        command_line: &command_line,
        initrd,
        rsdp: Some(rsdp),
    };
    write_start_information(memory, &kernel, &information)?;
    Ok(BootEntry {
        entry: kernel.entry,
        protocol: kernel.protocol,
    })
}

/// Whether the kernel finds its virtio devices without being told of them on its command line.
fn finds_devices_by_acpi(
    config: &MachineConfig,
    kernel: &LoadedKernel,
    memory: &GuestMemory,
) -> Result<bool, Error> {
    let switched_off = [&config.cmdline, &config.append]
        .into_iter()
        .flatten()
        .flat_map(|text| text.split_whitespace())
        .any(|word| word == "acpi=off");
    if switched_off {
        return Ok(false);
    }
    kernel
        .finds_virtio_mmio_by_acpi(memory)
        .map_err(Error::ReadKernel)
}

/// What the kernel is told in words: the user's or the default command line, what the user adds,
/// what the host needs, and where devices are that it does not find otherwise.
fn command_line(
    config: &MachineConfig,
    windows: &[VirtioMmioWindow],
) -> Result<CommandLine, Error> {
    let mut line = match &config.cmdline {
        Some(text) => CommandLine::new(text)?,
        None => default_command_line(config)?,
    };
    if let Some(text) = &config.append {
        line.append(text)?;
    }
    if config.host_workarounds
        && let Some(parameters) = workarounds::kernel_parameters()
    {
        tracing::info!("this host has no hardware virtualization: the kernel is told {parameters}");
        line.append(parameters)?;
        if config.serial != SerialConfig::None {
            line.append(workarounds::EARLY_CONSOLE)?;
        }
    }
    for window in windows {
        line.add_virtio_mmio_device(GuestAddress(window.address), window.size, window.gsi);
    }
    Ok(line)
}

/// A console where there is a serial port, an end of the machine where the kernel has no more to
/// do, and the first disk as the root file system where no initrd finds one.
fn default_command_line(config: &MachineConfig) -> Result<CommandLine, Error> {
    let mut line = CommandLine::new("reboot=k panic=-1")?;
    if config.serial != SerialConfig::None {
        line.append("console=ttyS0")?;
    }
    if let (Some(disk), None) = (config.disks.first(), &config.initrd) {
        line.append("root=/dev/vda")?;
        line.append(if disk.readonly { "ro" } else { "rw" })?;
    }
    Ok(line)
}
