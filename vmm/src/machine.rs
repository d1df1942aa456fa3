//! Builds a machine, starts its threads, and ends them.

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use bantam_arch::cpuid::Topology;
use bantam_arch::layout;
use bantam_devices::activity::Activity;
use bantam_devices::bus::Bus;
use bantam_devices::device_log::MachineLog;
use bantam_devices::opener::Opener;
use bantam_memory::GuestMemory;
use bantam_network::PlaceKeeper;
use bantam_state::Section;

use crate::command::ShutDown;
use crate::config::{DeviceName, MachineConfig};
use crate::console::Console;
use crate::devices::{Builder, DeviceTable, LegacyDevices, SerialGuard, Stream};
use crate::disk_threads::DiskThreads;
use crate::error::Error;
use crate::event_loop::DeviceLoop;
use crate::events::EventSender;
use crate::exit_reason::{self, ExitReason};
use crate::gdb::GdbServer;
use crate::hooks::{ThreadHook, ThreadRole};
use crate::kvm::{SavedProcessors, StateSupport};
use crate::load::{Surroundings, load_guest};
use crate::lock::lock;
use crate::memory::{allocate_memory, check_layout};
use crate::memory_load::MemoryService;
use crate::metrics::MachineMetrics;
use crate::random::random;
use crate::resources::Resources;
use crate::run_control::{EndOnPanic, RunControl};
use crate::snapshot::{Changes, GuestFacts, Snapshot};
use crate::threads;
use crate::vcpu::{Vcpu, VcpuEnvironment, VcpuModel};
use crate::vm::Vm;
use crate::watch::Watch;

/// A virtual machine with all its threads. Dropping it stops it first.
pub(crate) struct Machine {
    control: Arc<RunControl>,
    thread_hook: Option<Arc<dyn ThreadHook>>,
    vcpus: Vec<Vcpu>,
    environment: Arc<VcpuEnvironment>,
    vcpu_threads: Vec<JoinHandle<()>>,
    event_loops: Vec<DeviceLoop>,
    /// Outlive the event loops, whose disks wait for them.
    disk_threads: Vec<Arc<DiskThreads>>,
    devices: Arc<DeviceTable>,
    /// Outlives all threads that touch memory.
    memory_service: Option<MemoryService>,
    /// Until it is started.
    gdb_server: Option<GdbServer>,
    gdb_thread: Option<JoinHandle<()>>,
    /// Whether subscribers were told of the devices.
    is_attached: bool,
    guest: GuestFacts,
    /// What is known of changes of guest memory, for the next snapshot.
    changes: Arc<Mutex<Changes>>,
    /// Whether vCPUs stay out of the guest when they have been started.
    starts_paused: bool,
    _stream_guards: Vec<SerialGuard>,
    /// Kept until all vCPUs have ended.
    vm: Arc<Vm>,
}

/// The surroundings that a machine is built for.
pub(crate) struct MachineContext {
    /// Starts, pauses and ends its vCPUs.
    pub(crate) control: Arc<RunControl>,
    pub(crate) log: MachineLog,
    pub(crate) events: EventSender,
    pub(crate) opener: Arc<dyn Opener>,
    pub(crate) place_keeper: Option<Arc<PlaceKeeper>>,
    pub(crate) thread_hook: Option<Arc<dyn ThreadHook>>,
}

/// What a machine starts from.
pub(crate) enum Origin<'a> {
    /// The kernel that the configuration names.
    Kernel,
    /// The saved memory and processors of another machine. Devices are as after a reset, and it is not known
    /// whether the guest marks a restart after a panic.
    Saved {
        memory: GuestMemory,
        processors: &'a [Section],
    },
    /// The snapshot of another machine. The machine is paused when it has started.
    Snapshot(&'a Snapshot),
}

impl Machine {
    /// Opens what the machine that `config` describes needs, and builds it to start from `origin`.
    ///
    /// No thread runs until [`Machine::start`].
    pub(crate) fn new(
        config: &MachineConfig,
        origin: Origin<'_>,
        console: Console,
        context: &MachineContext,
    ) -> Result<Machine, Error> {
        config.cpu.check_host()?;
        let boots = matches!(origin, Origin::Kernel);
        let resources = Resources::open(config, boots, context, console)?;
        Machine::build(config, origin, resources, context)
    }

    /// Builds the machine that `config` describes from the open resources.
    fn build(
        config: &MachineConfig,
        origin: Origin<'_>,
        resources: Resources,
        context: &MachineContext,
    ) -> Result<Machine, Error> {
        let Resources {
            kvm,
            images,
            metadata,
            virtio,
            root_partition,
            serial,
            gdb,
        } = resources;
        let control = &context.control;
        let mut changes = Changes::default();
        let mut memory_service = None;
        let (memory, processors, snapshot) = match origin {
            Origin::Kernel => (Arc::new(allocate_memory(config)?), None, None),
            Origin::Saved { memory, processors } => (Arc::new(memory), Some(processors), None),
            Origin::Snapshot(snapshot) => {
                let memory;
                (memory, memory_service) = snapshot.guest_memory(config, context)?;
                changes = snapshot.changes(&memory);
                let state = snapshot.machine_state();
                (memory, Some(state.processors), Some(state))
            }
        };
        let mut saved = match processors {
            Some(processors) => {
                check_layout(&memory, config)?;
                Some(SavedProcessors::decode(processors, config.cpus.get())?)
            }
            None => None,
        };
        let starts_paused = snapshot.is_some();
        if config.track_dirty_pages {
            memory
                .start_dirty_log()
                .map_err(Error::resource("the log of written pages"))?;
        }
        let vm = Arc::new(Vm::new(&kvm, memory.clone(), config.track_dirty_pages)?);
        let mut event_loop = DeviceLoop::new("bantam-devices".to_owned(), ThreadRole::Devices)?;

        let mut ports = Bus::default();
        let mut mmio = Bus::default();
        let power_button = vm.interrupt_event(layout::POWER_BUTTON_GSI)?;
        let log = &context.log;
        let mut legacy = LegacyDevices::new(&mut ports, &mut mmio, &vm, control);
        let keyboard = legacy.attach_keyboard()?;
        legacy.attach_power_control()?;
        legacy.attach_interval_timer()?;
        legacy.attach_rtc()?;
        legacy.attach_pci_bus()?;
        legacy.attach_outcome_ports()?;
        let generation = legacy.attach_generation(&memory)?;
        if config.boot_timer {
            legacy.attach_boot_timer()?;
        }
        let serial_log = log.device("serial port");
        let serial_log = serial_log.observed_by(context.events.observer(&DeviceName::serial()));
        let limit = config.serial_limit.rate_limit();
        let serial_activity = Activity::default();
        let (serial_guard, uart) = legacy.attach_serial(
            &mut event_loop,
            serial,
            limit,
            serial_log,
            serial_activity.clone(),
            starts_paused,
        )?;
        let legacy = legacy.finish();
        let mut builder = Builder::new(&vm, &memory, &mut mmio, context, &event_loop);
        for build in virtio {
            build(&mut builder)?;
        }
        let guest = match images {
            Some(images) => {
                let begun = lock(&generation).begin(random()?);
                begun.map_err(Error::resource("the generation id"))?;
                let surroundings = Surroundings {
                    windows: builder.windows(),
                    tsc_khz: vm.tsc_khz(),
                    root_partition,
                };
                Some(load_guest(config, images, &memory, &surroundings)?)
            }
            None => None,
        };
        let mut virtio = builder.finish();
        if let Some(path) = serial_guard.path() {
            let path = path.to_path_buf();
            virtio.stream_paths.insert(Stream::Serial, path);
        }
        virtio.guards.push(serial_guard);

        let topology = Topology {
            vcpu_count: config.cpus.get(),
            smt: config.smt,
        };
        // The vCPUs of a fork take over CPUID as it is. Asking KVM for this host's takes as long as creating a machine. MSRs
        // that the configuration changes need not be among those that are saved.
        let takes_over_cpuid =
            snapshot.is_some_and(|it| it.is_of_fork) && config.cpu.msrs.is_empty();
        let model = match takes_over_cpuid {
            true => None,
            false => Some(VcpuModel::new(&kvm, topology, &config.cpu)?),
        };
        let vcpus = (0..config.cpus.get()).map(|index| match &model {
            Some(model) => {
                let guest = guest.as_ref().filter(|_| index == 0);
                Vcpu::new(&vm, model, index, guest.map(|guest| guest.boot))
            }
            None => Vcpu::without_model(&vm, index),
        });
        let vcpus = vcpus.collect::<Result<Vec<_>, _>>()?;
        let state_support = StateSupport::new(&kvm)?;
        if let Some(saved) = &mut saved {
            if model.is_some() {
                saved.check_features(&vcpus)?;
            }
            // As late as can be, as the time until the clock is set is lost.
            if let Some(saved_at) = snapshot.and_then(|it| it.clock_catches_up_from) {
                saved.catch_up_clock(saved_at);
            }
            saved.restore(&vm, &vcpus, &state_support)?;
        }
        let statistics = vcpus.iter().map(Vcpu::statistics).collect::<Result<_, _>>();
        let statistics = statistics.unwrap_or_else(|error| {
            tracing::debug!("cannot see whether vCPUs halt: {error}");
            Vec::new()
        });
        let watch = Watch::new(control.clone(), config.on_halt, statistics);
        event_loop.add(Box::new(watch), Activity::default());
        let metrics = MachineMetrics {
            vcpus: vcpus.iter().map(Vcpu::metrics).collect(),
            uart,
            devices: virtio.metrics,
            mmds: metadata.as_ref().map(|it| it.metadata.metrics().clone()),
        };
        let gdb_server = match gdb {
            Some(listener) => Some(GdbServer::new(
                listener,
                &kvm,
                control,
                &memory,
                config.cpus,
            )?),
            None => None,
        };
        let mut event_loops = virtio.loops;
        event_loops.push(event_loop);
        let devices = DeviceTable {
            power_button,
            keyboard,
            generation,
            legacy,
            serial_activity,
            virtio: virtio.entries,
            metadata: metadata.map(|metadata| metadata.metadata),
            metrics: Arc::new(metrics),
            stream_paths: virtio.stream_paths,
            forwarded_ports: virtio.forwarded_ports,
            opener: context.opener.clone(),
            events: context.events.clone(),
        };
        let guest_facts = match snapshot {
            Some(state) => {
                devices.restore(state.devices)?;
                state.guest
            }
            None => GuestFacts {
                tells_panics: guest.is_some_and(|guest| guest.tells_panics),
            },
        };
        if saved.is_some() {
            devices.tell_restored()?;
        }
        Ok(Machine {
            environment: Arc::new(VcpuEnvironment {
                ports,
                mmio,
                memory,
                control: control.clone(),
                state_support,
                debugger: gdb_server.as_ref().map(GdbServer::debugger),
            }),
            control: control.clone(),
            thread_hook: context.thread_hook.clone(),
            vcpus,
            vcpu_threads: Vec::new(),
            event_loops,
            disk_threads: virtio.disk_threads,
            devices: Arc::new(devices),
            memory_service,
            gdb_server,
            gdb_thread: None,
            is_attached: false,
            guest: guest_facts,
            changes: Arc::new(Mutex::new(changes)),
            starts_paused,
            _stream_guards: virtio.guards,
            vm,
        })
    }

    /// Starts the threads of devices and vCPUs. The devices of a machine that goes on from a snapshot are at rest, and its
    /// vCPUs out of the guest.
    ///
    /// # Errors
    /// If the host is out of threads, or the program's hook refuses. The machine is then of no further use.
    pub(crate) fn start(&mut self) -> Result<(), Error> {
        let hook = self.thread_hook.as_ref();
        if let Some(service) = &self.memory_service {
            service.begin()?;
        }
        self.devices.tell_attached();
        self.is_attached = true;
        // The guest executes no instruction before every thread is ready. A single thread need not wait.
        let waits = hook.is_some() || self.vcpus.len() > 1 || self.starts_paused;
        if waits {
            self.control.hold_vcpus();
        }
        if self.gdb_server.is_some() {
            self.control.hold_all_vcpus();
        }
        for threads in &self.disk_threads {
            threads.start()?;
        }
        for event_loop in &mut self.event_loops {
            event_loop.start(&self.control, hook)?;
        }
        for (index, vcpu) in (0..).zip(self.vcpus.drain(..)) {
            let environment = self.environment.clone();
            let (name, role) = (format!("bantam-vcpu{index}"), ThreadRole::Vcpu(index));
            let thread = threads::spawn(&name, &role, hook, move || {
                let _end_on_panic = EndOnPanic(environment.control.clone());
                vcpu.run(&environment);
            })?;
            self.vcpu_threads.push(thread);
        }
        if let Some(server) = self.gdb_server.take() {
            self.gdb_thread = Some(server.start(hook)?);
        }
        if waits && !self.starts_paused {
            self.control.resume_vcpus();
        }
        Ok(())
    }

    /// Asks the guest to shut itself down, and cuts its power after `time`, if that is given. If the guest does not listen
    /// or a debugger has stopped it, its power is cut at once; without a time, nothing is done.
    pub(crate) fn shut_down(&self, time: Option<Duration>) -> ShutDown {
        let asked = if time.is_some_and(|time| time.is_zero()) || self.control.is_held_by_debugger()
        {
            None
        } else if self.vm.takes_interrupt(layout::POWER_BUTTON_GSI) {
            let pressed = self.devices.press_power_button();
            pressed.ok().map(|()| ShutDown::PowerButton)
        } else {
            let pressed = self.devices.press_ctrl_alt_del();
            pressed.ok().map(|()| ShutDown::CtrlAltDel)
        };
        match (asked, time) {
            (Some(asked), Some(time)) => {
                self.control.cut_power_after(time);
                asked
            }
            (Some(asked), None) => asked,
            (None, Some(_)) => {
                self.control.finish(Ok(ExitReason::Stopped));
                ShutDown::PowerCut
            }
            (None, None) => ShutDown::Unheard,
        }
    }

    /// Returns the number of vCPUs that run.
    pub(crate) fn vcpu_count(&self) -> usize {
        self.vcpu_threads.len()
    }

    /// Returns whether the machine is paused when it has been started.
    pub(crate) fn starts_paused(&self) -> bool {
        self.starts_paused
    }

    /// Returns what the monitor knows of the guest.
    pub(crate) fn guest(&self) -> GuestFacts {
        self.guest
    }

    /// Returns what is known of changes of guest memory.
    pub(crate) fn changes(&self) -> &Arc<Mutex<Changes>> {
        &self.changes
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

    /// Ends all threads of a machine that is stopping, and returns why it ended. When this returns, what the
    /// guest wrote is on stable storage.
    pub(crate) fn end(&mut self) -> Result<ExitReason, Error> {
        self.vcpus.clear();
        for thread in self.vcpu_threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a vCPU thread panicked");
            }
        }
        if let Some(thread) = self.gdb_thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that talks to gdb panicked");
        }
        let has_moved = self.control.exit_reason() == Some(Some(ExitReason::Moved));
        // This finishes what the guest asked for before a pause, as if there had been none. It waits for a
        // pause that is still under way on another thread. What a machine has moved with is finished elsewhere.
        if !has_moved && let Err(error) = self.devices.resume() {
            tracing::warn!("{error}");
        }
        for threads in &self.disk_threads {
            threads.refuse_jobs();
        }
        self.devices.cancel_jobs();
        for event_loop in &mut self.event_loops {
            event_loop.end();
        }
        for threads in &self.disk_threads {
            threads.end();
        }
        let flushed = self.devices.flush_disks();
        let outcome = self.control.take_outcome();
        let mut outcome = outcome.unwrap_or(Ok(ExitReason::Stopped));
        let memory = &self.environment.memory;
        if matches!(outcome, Ok(ExitReason::Reboot))
            && self.guest.tells_panics
            && exit_reason::has_told_panic(memory)
        {
            outcome = Ok(ExitReason::Panic);
        }
        if let Some(service) = &mut self.memory_service {
            service.end();
        }
        let reason = outcome?;
        flushed.map(|()| reason)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if !self.vcpu_threads.is_empty() {
            self.control.finish(Ok(ExitReason::Stopped));
            if let Err(error) = self.end() {
                tracing::error!("{error}");
            }
        }
        if self.is_attached {
            self.devices.tell_detached();
        }
    }
}
