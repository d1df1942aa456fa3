//! A machine: how it is put together, started and ended.

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use bantam_arch::layout;
use bantam_arch::memory_map::ram_regions;
use bantam_devices::bus::Bus;
use bantam_devices::disk::DiskFile;
use bantam_devices::metadata::Metadata;
use bantam_devices::virtio::block::BlockControl;
use bantam_devices::{GuestMemory, InterruptLine};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::config::MachineConfig;
use crate::control::{Control, EndOnPanic, ExitReason};
use crate::devices::{VirtioDevices, attach_power_control, attach_serial};
use crate::error::Error;
use crate::event_loop::EventLoopThread;
use crate::guest::load_guest;
use crate::host::open_kvm;
use crate::metadata::MachineMetadata;
use crate::serial::{Console, SerialGuard};
use crate::vcpu::{Vcpu, VcpuEnvironment, VcpuModel};
use crate::vm::Vm;

/// A virtual machine.
///
/// [`Machine::new`] builds all of it, [`Machine::start`] lets its vCPUs run, and [`Machine::wait`]
/// gives the reason of its end. A machine that is dropped is stopped first.
pub struct Machine {
    control: Arc<Control>,
    vcpus: Vec<Vcpu>,
    environment: Arc<VcpuEnvironment>,
    vcpu_threads: Vec<JoinHandle<()>>,
    event_loops: Vec<EventLoopThread>,
    power_button: EventFd,
    disks: Vec<(PathBuf, BlockControl)>,
    metadata: Option<MachineMetadata>,
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
        let event_loop = EventLoopThread::start("bantam-devices", control.clone())?;

        let mut ports = Bus::default();
        let mut mmio = Bus::default();
        let power_button = vm.interrupt_event(layout::POWER_BUTTON_GSI)?;
        attach_power_control(&mut ports, &control)?;
        let mut virtio = VirtioDevices::new(&vm, &memory, &event_loop.handle, &mut mmio);
        let disks = virtio.attach_disks(&config.disks, config.cpus.get(), &control)?;
        let metadata = config.metadata.as_ref().map(MachineMetadata::new);
        let metadata = metadata.transpose()?;
        virtio.attach_networks(&config.nets, config.cpus.get(), metadata.as_ref())?;
        if config.rng {
            virtio.attach_entropy()?;
        }
        let boot = load_guest(config, &memory, virtio.windows())?;
        // Last, so that no output file is made for a machine that cannot be.
        let serial = attach_serial(&mut ports, &vm, &event_loop.handle, &config.serial, console)?;
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
            event_loops: disks.threads.into_iter().chain([event_loop]).collect(),
            power_button,
            disks: disks.disks,
            metadata,
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

    /// Looks how large the image of a disk is now, counted as in the configuration, and lets the guest
    /// know if that has changed. Gives the size in bytes.
    ///
    /// # Errors
    /// When there is no such disk, or the size cannot be a disk's; the disk then keeps the one it has.
    pub fn update_disk_size(&self, index: usize) -> Result<u64, Error> {
        let (path, disk) = self.disks.get(index).ok_or(Error::NoSuchDisk {
            index,
            count: self.disks.len(),
        })?;
        disk.update_size().map_err(|source| Error::DiskSize {
            path: path.clone(),
            source,
        })
    }

    /// What the guest is told over its network devices, if that was configured. It may be changed at
    /// any time.
    pub fn metadata(&self) -> Option<&Metadata> {
        self.metadata.as_ref().map(|metadata| &metadata.metadata)
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
        self.serial.remove_socket();
        for event_loop in &mut self.event_loops {
            event_loop.end();
        }
        let mut flushed = Ok(());
        for (path, disk) in self.disks.drain(..) {
            if let Err(source) = flush_at_end(disk.disk()) {
                let error = Error::Flush { path, source };
                tracing::error!("{error}");
                flushed = flushed.and(Err(error));
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
