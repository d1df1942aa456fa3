//! A machine: how it is put together, its threads, and their end.

use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bantam_arch::cpuid::Topology;
use bantam_arch::layout;
use bantam_devices::bus::Bus;
use bantam_devices::device_log::MachineLog;
use bantam_devices::disk::DiskFile;
use bantam_memory::GuestMemory;
use bantam_state::Section;

use crate::command::ShutDown;
use crate::config::MachineConfig;
use crate::console::Console;
use crate::device_table::DeviceTable;
use crate::devices::{
    VirtioDevices, attach_boot_timer, attach_interval_timer, attach_keyboard, attach_outcome_ports,
    attach_pci_bus, attach_power_control, attach_rtc, attach_serial,
};
use crate::error::Error;
use crate::event_loop::EventLoopThread;
use crate::exit_reason::{self, ExitReason};
use crate::host::{open_kvm, require_capabilities};
use crate::kvm::{SavedProcessors, StateSupport};
use crate::load::load_guest;
use crate::memory::{allocate_memory, check_layout};
use crate::metadata::MachineMetadata;
use crate::metrics::MachineMetrics;
use crate::run_control::{EndOnPanic, RunControl};
use crate::serial::SerialGuard;
use crate::streams::{StreamGuards, Streams};
use crate::vcpu::{Vcpu, VcpuEnvironment, VcpuModel};
use crate::vm::Vm;
use crate::watch::Watch;

/// A virtual machine with all its threads. One that is dropped is stopped first.
pub(crate) struct Machine {
    control: Arc<RunControl>,
    vcpus: Vec<Vcpu>,
    environment: Arc<VcpuEnvironment>,
    vcpu_threads: Vec<JoinHandle<()>>,
    event_loops: Vec<EventLoopThread>,
    devices: Arc<DeviceTable>,
    /// Whether a guest that restarts after a panic says so.
    tells_panics: bool,
    _serial: SerialGuard,
    _streams: StreamGuards,
    /// Kept until all vCPUs have ended.
    vm: Arc<Vm>,
}

/// What a machine starts from.
pub(crate) enum Origin<'a> {
    /// The kernel that the configuration names.
    Kernel,
    /// Where another machine was, as far as its memory and processors go. Devices are as after a reset, and
    /// whether the guest tells a restart after a panic from others is not known.
    Saved {
        memory: GuestMemory,
        processors: &'a [Section],
    },
}

impl Machine {
    /// Builds the machine that `config` describes and that `control` will end, to start from `origin`.
    /// `console` is the program's end of what is configured as `stdio`, if anything is; its devices log to
    /// `log`.
    pub(crate) fn new(
        config: &MachineConfig,
        origin: Origin<'_>,
        mut console: Console,
        control: &Arc<RunControl>,
        log: &MachineLog,
    ) -> Result<Machine, Error> {
        config.validate()?;
        config.cpu.check_host()?;
        let kvm = open_kvm()?;
        require_capabilities(&kvm, &config.cpu.required_capabilities)?;
        let (memory, saved) = match origin {
            Origin::Kernel => (allocate_memory(config)?, None),
            Origin::Saved { memory, processors } => {
                check_layout(&memory, config)?;
                let saved = SavedProcessors::decode(processors, config.cpus.get())?;
                (memory, Some(saved))
            }
        };
        let memory = Arc::new(memory);
        let vm = Arc::new(Vm::new(&kvm, memory.clone())?);
        let event_loop = EventLoopThread::start("bantam-devices", control.clone())?;

        let mut ports = Bus::default();
        let mut mmio = Bus::default();
        let power_button = vm.interrupt_event(layout::POWER_BUTTON_GSI)?;
        let keyboard = attach_keyboard(&mut ports, &vm, control)?;
        attach_power_control(&mut ports, control)?;
        attach_interval_timer(&mut ports, &vm)?;
        attach_rtc(&mut ports)?;
        attach_pci_bus(&mut ports)?;
        attach_outcome_ports(&mut ports, control)?;
        if config.boot_timer {
            attach_boot_timer(&mut mmio)?;
        }
        let mut virtio = VirtioDevices::new(&vm, &memory, &event_loop.handle, &mut mmio, log);
        let disks = virtio.attach_disks(&config.disks, config.cpus.get(), control)?;
        let metadata = config.metadata.as_ref().map(MachineMetadata::new);
        let metadata = metadata.transpose()?;
        let networks =
            virtio.attach_networks(&config.nets, config.cpus.get(), metadata.as_ref(), control)?;
        let vsock = match &config.vsock {
            Some(vsock) => Some(virtio.attach_vsock(vsock)?),
            None => None,
        };
        let streams = Streams::attach(config, &mut virtio)?;
        let entropy = match config.rng {
            Some(rng) => Some(virtio.attach_entropy(&rng.limits.into())?),
            None => None,
        };
        let balloon = match &config.balloon {
            Some(balloon) => Some(virtio.attach_balloon(balloon)?),
            None => None,
        };
        let guest = match &saved {
            None => Some(load_guest(config, &memory, virtio.windows(), vm.tsc_khz())?),
            Some(_) => None,
        };
        let virtio = virtio.into_transports();
        // Last, so that no output file is made for a machine that cannot be.
        let stream_guards = streams.connect(config, &mut console)?;
        let (serial, uart) = attach_serial(
            &mut ports,
            &vm,
            &event_loop.handle,
            &config.serial,
            config.serial_limit.rate_limit(),
            console,
            log.device("serial port"),
        )?;
        let topology = Topology {
            vcpu_count: config.cpus.get(),
            smt: config.smt,
        };
        let model = VcpuModel::new(&kvm, topology, &config.cpu)?;
        let vcpus = (0..config.cpus.get())
            .map(|index| {
                let guest = guest.as_ref().filter(|_| index == 0);
                Vcpu::new(&vm, &model, index, guest.map(|guest| guest.boot))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let state_support = StateSupport::new(&kvm)?;
        if let Some(saved) = &saved {
            saved.restore(&vm, &vcpus, &state_support)?;
        }
        let statistics = vcpus.iter().map(Vcpu::statistics).collect::<Result<_, _>>();
        let statistics = statistics.unwrap_or_else(|error| {
            tracing::debug!("cannot see whether vCPUs halt: {error}");
            Vec::new()
        });
        let watch = Watch::new(control.clone(), config.on_halt, statistics);
        event_loop.handle.add(Box::new(watch))?;
        let [console, channels] = streams.metrics();
        let metrics = MachineMetrics {
            vcpus: vcpus.iter().map(Vcpu::metrics).collect(),
            disks: disks
                .disks
                .iter()
                .map(|disk| disk.metrics().clone())
                .collect(),
            networks: networks
                .networks
                .iter()
                .map(|net| net.metrics().clone())
                .collect(),
            vsock,
            console,
            channels,
            entropy,
            balloon: balloon.as_ref().map(|balloon| balloon.metrics().clone()),
            mmds: metadata.as_ref().map(|it| it.metadata.metrics().clone()),
            uart,
        };
        Ok(Machine {
            environment: Arc::new(VcpuEnvironment {
                ports,
                mmio,
                memory,
                control: control.clone(),
                state_support,
            }),
            control: control.clone(),
            vcpus,
            vcpu_threads: Vec::new(),
            event_loops: disks
                .threads
                .into_iter()
                .chain(networks.threads)
                .chain([event_loop])
                .collect(),
            devices: Arc::new(DeviceTable {
                power_button,
                keyboard,
                virtio,
                disks: disks.disks,
                networks: networks.networks,
                balloon,
                metadata: metadata.map(|metadata| metadata.metadata),
                metrics: Arc::new(metrics),
                stream_paths: stream_guards.paths(),
                streams,
                serial_path: serial.path().map(Path::to_path_buf),
            }),
            tells_panics: guest.is_some_and(|guest| guest.tells_panics),
            _serial: serial,
            _streams: stream_guards,
            vm,
        })
    }

    /// Lets the vCPUs run.
    ///
    /// # Errors
    /// When the host gives no threads. The machine is of no more use then.
    pub(crate) fn start(&mut self) -> Result<(), Error> {
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

    /// Asks the guest to shut itself down, in a way that it listens to, and has its power cut after `time`
    /// or, if it listens to none, at once.
    pub(crate) fn shut_down(&self, time: Duration) -> ShutDown {
        let asked = if time.is_zero() {
            None
        } else if self.vm.takes_interrupt(layout::POWER_BUTTON_GSI) {
            let pressed = self.devices.press_power_button();
            pressed.ok().map(|()| ShutDown::PowerButton)
        } else {
            let pressed = self.devices.press_ctrl_alt_del();
            pressed.ok().map(|()| ShutDown::CtrlAltDel)
        };
        match asked {
            Some(asked) => {
                self.control.cut_power_after(time);
                asked
            }
            None => {
                self.control.finish(Ok(ExitReason::Stopped));
                ShutDown::PowerCut
            }
        }
    }

    /// How many vCPUs run.
    pub(crate) fn vcpu_count(&self) -> usize {
        self.vcpu_threads.len()
    }

    pub(crate) fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    pub(crate) fn memory(&self) -> &Arc<GuestMemory> {
        &self.environment.memory
    }

    pub(crate) fn devices(&self) -> &Arc<DeviceTable> {
        &self.devices
    }

    /// Ends all threads of a machine that is stopping, and gives the reason of its end. When this
    /// returns, what the guest wrote is on stable storage.
    pub(crate) fn end(&mut self) -> Result<ExitReason, Error> {
        self.vcpus.clear();
        for thread in self.vcpu_threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a vCPU thread panicked");
            }
        }
        // What the guest had asked for before a pause is done, as without one. A pause that is still under
        // way on another thread comes to its end first.
        if let Err(error) = self.devices.resume() {
            tracing::warn!("{error}");
        }
        for event_loop in &mut self.event_loops {
            event_loop.end();
        }
        let mut flushed = Ok(());
        for disk in &self.devices.disks {
            let disk = disk.disk();
            if let Err(source) = flush_at_end(&disk) {
                let path = disk.path().to_path_buf();
                let error = Error::Flush { path, source };
                tracing::error!("{error}");
                flushed = flushed.and(Err(error));
            }
        }
        let outcome = self.control.take_outcome();
        let mut reason = outcome.unwrap_or(Ok(ExitReason::Stopped))?;
        let memory = &self.environment.memory;
        if reason == ExitReason::Reboot && self.tells_panics && exit_reason::has_told_panic(memory)
        {
            reason = ExitReason::Panic;
        }
        flushed.map(|()| reason)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.vcpu_threads.is_empty() {
            return;
        }
        self.control.finish(Ok(ExitReason::Stopped));
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
