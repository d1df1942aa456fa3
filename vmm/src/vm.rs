//! The KVM virtual machine: memory slots, interrupt controllers, irqfds and ioeventfds.

use std::sync::Arc;

use bantam_arch::layout;
use bantam_devices::virtio::transport::mmio;
use bantam_memory::{GuestMemory, PageSet, Region};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_PIT_SPEAKER_DUMMY, KVMIO, kvm_irqchip, kvm_pic_state, kvm_pit_config, kvm_pit_state2,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

use crate::error::Error;

ioctl_io_nr!(KVM_GET_TSC_KHZ, KVMIO, 0xa3);

/// Mask bit of an entry of the I/O APIC's redirection table.
const IO_APIC_MASKED: u64 = 1 << 16;

/// A virtual machine of KVM with its memory and interrupt controllers.
pub(crate) struct Vm {
    fd: VmFd,
    /// KVM uses this memory for as long as the machine exists.
    memory: Arc<GuestMemory>,
}

impl Vm {
    /// Creates a virtual machine. If it `logs_writes`, [`Vm::take_written`] returns the pages that vCPUs write.
    pub(crate) fn new(kvm: &Kvm, memory: Arc<GuestMemory>, logs_writes: bool) -> Result<Vm, Error> {
        let fd = loop {
            match kvm.create_vm() {
                // KVM gives up if anything is pending for the thread, such as work of an io_uring that the
                // thread has used, and has to be asked again.
                Err(error) if error.errno() == libc::EINTR => {}
                created => break created.map_err(Error::kvm("create a virtual machine"))?,
            }
        };
        let vm = Vm { fd, memory };
        // KVM changes its memory slots and its I/O buses only between grace periods. The interrupt
        // controllers and ioeventfds queue a grace period that takes milliseconds, and slots set after
        // them would have to wait for it.
        vm.set_memory_slots(|region| region.len, logs_writes)
            .map_err(Error::kvm("map guest memory"))?;
        let fd = &vm.fd;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(Error::kvm("place its identity map"))?;
        fd.set_tss_address(layout::KVM_TSS as usize)
            .map_err(Error::kvm("place its task state segment"))?;
        fd.create_irq_chip()
            .map_err(Error::kvm("create the interrupt controllers"))?;
        mask_legacy_interrupt_controllers(fd)?;
        Ok(vm)
    }

    /// Makes each region of guest memory a slot with the size in bytes that `size` returns: the size of the
    /// region, or zero to remove the slot. KVM logs the pages that vCPUs write if it `logs_writes`.
    fn set_memory_slots(
        &self,
        size: impl Fn(&Region) -> u64,
        logs_writes: bool,
    ) -> Result<(), kvm_ioctls::Error> {
        for (slot, region) in self.memory.regions().enumerate() {
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: match logs_writes {
                    true => KVM_MEM_LOG_DIRTY_PAGES,
                    false => 0,
                },
                guest_phys_addr: region.start.0,
                memory_size: size(&region),
                userspace_addr: region.host_address,
            };
            // SAFETY: the range is a mapping of at least that size, which lives as long as `memory` and so
            // as long as the virtual machine. Slots do not overlap, because regions do not.
            unsafe { self.fd.set_user_memory_region(slot) }?;
        }
        Ok(())
    }

    /// Has KVM log the pages that vCPUs write from now on, or stops that. vCPUs may run meanwhile.
    ///
    /// # Errors
    /// If KVM refuses.
    pub(crate) fn log_writes(&self, on: bool) -> Result<(), Error> {
        self.set_memory_slots(|region| region.len, on)
            .map_err(Error::kvm("log which pages the guest writes"))
    }

    /// Returns the pages that vCPUs have written since KVM began to log that, or since the last call.
    ///
    /// # Errors
    /// If KVM does not log writes. What it has returned of some regions before is lost.
    pub(crate) fn take_written(&self) -> Result<PageSet, Error> {
        let regions = self.memory.regions().enumerate().map(|(slot, region)| {
            let words = self.fd.get_dirty_log(slot as u32, region.len as usize);
            words.map(|words| (region.start, region.len, words))
        });
        let regions: Result<Vec<_>, _> = regions.collect();
        let regions = regions.map_err(Error::kvm("tell which pages the guest has written"))?;
        Ok(PageSet::from_words(regions))
    }

    /// Returns the frequency of the guest's time stamp counter in kHz; `None` if KVM does not say (KVM API,
    /// section 4.56; virtual machines have answered this request since Linux 5.18).
    pub(crate) fn tsc_khz(&self) -> Option<u32> {
        // SAFETY: the request takes no argument, so the kernel reads and writes no memory of this process.
        let khz = unsafe { ioctl(&self.fd, KVM_GET_TSC_KHZ()) };
        u32::try_from(khz).ok().filter(|&khz| khz > 0)
    }

    /// Adds the interval timer, which also serves the port that gates counter 2 and shows its output.
    pub(crate) fn create_interval_timer(&self) -> Result<(), Error> {
        let config = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        self.fd
            .create_pit2(config)
            .map_err(Error::kvm("create the interval timer"))
    }

    /// Returns the state of the interval timer, which must have been created.
    pub(crate) fn interval_timer(&self) -> Result<kvm_pit_state2, Error> {
        self.fd
            .get_pit2()
            .map_err(Error::kvm("read the interval timer"))
    }

    /// Sets the state of the interval timer, which must have been created. All counts start anew.
    pub(crate) fn set_interval_timer(&self, state: &kvm_pit_state2) -> Result<(), Error> {
        self.fd
            .set_pit2(state)
            .map_err(Error::kvm("set the interval timer"))
    }

    /// Returns KVM's descriptor of the virtual machine, by which its state is read and set.
    pub(crate) fn fd(&self) -> &VmFd {
        &self.fd
    }

    pub(crate) fn create_vcpu(&self, index: u8) -> Result<VcpuFd, Error> {
        self.fd
            .create_vcpu(index.into())
            .map_err(Error::kvm("create a vCPU"))
    }

    /// Creates an event that raises an edge of interrupt `gsi` when it is signalled (an irqfd).
    pub(crate) fn interrupt_event(&self, gsi: u32) -> Result<EventFd, Error> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(Error::resource("an event for an interrupt"))?;
        self.fd
            .register_irqfd(&event, gsi)
            .map_err(Error::kvm("bind an interrupt to an event"))?;
        Ok(event)
    }

    /// Whether the guest takes interrupt `gsi`, that is, has not masked it at the I/O APIC.
    pub(crate) fn takes_interrupt(&self, gsi: u32) -> bool {
        let mut irqchip = kvm_irqchip {
            chip_id: KVM_IRQCHIP_IOAPIC,
            ..Default::default()
        };
        if let Err(error) = self.fd.get_irqchip(&mut irqchip) {
            tracing::debug!("cannot read the I/O APIC: {error}");
            return false;
        }
        // SAFETY: KVM has filled in the I/O APIC, as asked; it consists of integers only.
        let table = unsafe { &irqchip.chip.ioapic.redirtbl };
        table.get(gsi as usize).is_some_and(|entry| {
            // SAFETY: both members of the union are 64 bits wide, and any bits are valid.
            let bits = unsafe { entry.bits };
            bits & IO_APIC_MASKED == 0
        })
    }

    /// Has KVM signal `doorbell` when the guest writes `queue` to the doorbell register of the virtio-mmio
    /// window at `window` (an ioeventfd).
    pub(crate) fn bind_doorbell(
        &self,
        window: u64,
        queue: u32,
        doorbell: &EventFd,
    ) -> Result<(), Error> {
        // The type of the value determines the width of the write.
        let _: [u8; mmio::QUEUE_NOTIFY_SIZE as usize] = queue.to_le_bytes();
        let address = IoEventAddress::Mmio(window + mmio::QUEUE_NOTIFY);
        self.fd
            .register_ioevent(doorbell, &address, queue)
            .map_err(Error::kvm("bind a doorbell to an event"))
    }
}

impl Drop for Vm {
    /// Removes the memory slots, which expedites the grace period if one is queued. The end of the virtual
    /// machine would otherwise wait milliseconds for it.
    fn drop(&mut self) {
        if let Err(error) = self.set_memory_slots(|_| 0, false) {
            tracing::debug!("cannot unmap guest memory: {error}");
        }
    }
}

/// Masks all inputs of the two 8259s, as firmware would leave them. A guest that assumes there are none
/// (hardware-reduced ACPI) never masks them, and interrupts would reach it twice.
fn mask_legacy_interrupt_controllers(fd: &VmFd) -> Result<(), Error> {
    for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
        let mut irqchip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        irqchip.chip.pic = kvm_pic_state {
            imr: u8::MAX,
            ..Default::default()
        };
        fd.set_irqchip(&irqchip)
            .map_err(Error::kvm("mask the legacy interrupt controllers"))?;
    }
    Ok(())
}
