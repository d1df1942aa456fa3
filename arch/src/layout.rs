//! Every guest-physical address, I/O port and interrupt line the machine uses, in ascending order.
//!
//! Low memory follows the PC: RAM up to 636 KiB, the firmware area up to 1 MiB, RAM from there to
//! the device hole that ends at 4 GiB, and the rest of RAM above 4 GiB.

// --- Guest-physical memory: below 1 MiB -------------------------------------------------------

/// Global descriptor table for the 64-bit Linux boot protocol and PVH.
pub const GDT: u64 = 0x500;
/// First conventional memory that a guest may use. The page below it is where a PC keeps its
/// interrupt vectors, and kernels do not use it as RAM even if the memory map says so.
pub const CONVENTIONAL_MEMORY: u64 = 0x1000;
/// `struct hvm_start_info` of the PVH boot protocol.
pub const PVH_START_INFO: u64 = 0x6000;
/// Module list that `hvm_start_info` points to: the initrd, if there is one.
pub const PVH_MODULE_LIST: u64 = 0x6040;
/// Memory map that `hvm_start_info` points to.
pub const PVH_MEMORY_MAP: u64 = 0x6080;
/// `struct boot_params` ("zero page") of the 64-bit Linux boot protocol.
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer of the boot vCPU (grows down).
pub const BOOT_STACK: u64 = 0x8ff0;
/// Level-4 page table of the identity map for the 64-bit Linux boot protocol.
pub const PML4: u64 = 0x9000;
/// Level-3 page table of that identity map.
pub const PDPT: u64 = 0xa000;
/// First of the level-2 page tables of that identity map, one for each GiB.
pub const PAGE_DIRECTORIES: u64 = 0xb000;
/// Size of that identity map, from address zero, in GiB.
pub const IDENTITY_MAP_GIB: u64 = 4;
/// The "warm boot" word, which tells a PC's firmware after a reset whether it may skip its memory
/// test.
pub const WARM_BOOT_WORD: u64 = 0x472;
/// Kernel command line, NUL-terminated.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Room for the command line including its NUL, in bytes.
pub const COMMAND_LINE_MAX_SIZE: usize = 0x1_0000;
/// End of conventional memory: from here to 1 MiB everything belongs to the firmware, as one
/// reserved range of the memory map.
pub const CONVENTIONAL_MEMORY_END: u64 = 0x9_f000;
/// `struct setup_data` of the 64-bit Linux boot protocol, with a seed for the kernel's random
/// numbers.
pub const RANDOM_SEED: u64 = CONVENTIONAL_MEMORY_END;
/// MP floating pointer structure and MP table, in the last KiB below 640 KiB: the first place where
/// a kernel looks for them.
pub const MP_TABLE: u64 = 0x9_fc00;
/// Size of that area in bytes.
pub const MP_TABLE_MAX_SIZE: usize = 0x400;
/// Generation id of the machine, in a page of its own. It is not at the start of 2 KiB, where kernels
/// look for the signature of an adapter's ROM, which a random id might equal.
pub const GENERATION_ID: u64 = 0xd_e040;
/// VMClock page.
pub const VM_CLOCK: u64 = 0xd_f000;
/// Size of that page in bytes.
pub const VM_CLOCK_SIZE: u32 = 0x1000;
/// ACPI root pointer, followed by the other tables.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// Room for the ACPI tables in bytes.
pub const ACPI_TABLES_MAX_SIZE: usize = 0x1_f000;
/// SMBIOS entry point, followed by the tables.
pub const SMBIOS: u64 = 0xf_f000;
/// Room for them in bytes.
pub const SMBIOS_MAX_SIZE: usize = 0x1000;

// --- Guest-physical memory: from 1 MiB --------------------------------------------------------

/// Start of extended memory: where kernels, and above them the initrd, are loaded.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// Start of the hole for devices: RAM that would be here is above 4 GiB instead.
pub const DEVICE_HOLE: u64 = 0xc000_0000;
/// Register by which a guest reports that it has booted, in machines that have one.
pub const BOOT_TIMER: u64 = 0xc000_0000;
/// Size of its window in bytes.
pub const BOOT_TIMER_SIZE: u64 = 0x1000;
/// First virtio-mmio register window.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Size of each virtio-mmio register window in bytes.
pub const VIRTIO_MMIO_WINDOW_SIZE: u64 = 0x1000;
/// I/O APIC registers (in the kernel's irqchip).
pub const IO_APIC: u64 = 0xfec0_0000;
/// Local APIC registers (in the kernel's irqchip).
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// One page that KVM needs on Intel hosts for its real-mode identity map.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM needs on Intel hosts for its real-mode task state segment.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// End of the device hole: the rest of RAM starts here.
pub const DEVICE_HOLE_END: u64 = 0x1_0000_0000;

// --- I/O ports --------------------------------------------------------------------------------

/// Interval timer: first port of its counters, which precede its control port.
pub const INTERVAL_TIMER_PORT: u16 = 0x40;
/// Number of ports from [`INTERVAL_TIMER_PORT`] to the control port.
pub const INTERVAL_TIMER_PORT_COUNT: u16 = 4;
/// System control port B, which starts and shows counter 2 of the interval timer.
pub const SYSTEM_CONTROL_PORT: u16 = 0x61;
/// i8042 keyboard controller: data port.
pub const I8042_PORT: u16 = 0x60;
/// Command and status port of the i8042.
pub const I8042_COMMAND_PORT: u16 = I8042_PORT + 4;
/// Real-time clock: index port.
pub const RTC_PORT: u16 = 0x70;
/// Number of ports of the real-time clock: index and data.
pub const RTC_PORT_COUNT: u16 = 2;
/// First serial port (16550).
pub const SERIAL_PORT: u16 = 0x3f8;
/// Number of registers of a 16550.
pub const SERIAL_PORT_COUNT: u16 = 8;
/// Port by which a guest ends the machine with a number of its own.
pub const EXIT_PORT: u16 = 0x500;
/// Port of the panic device (pvpanic), the same as in QEMU.
pub const PANIC_PORT: u16 = 0x505;
/// First ACPI power register: sleep control.
pub const ACPI_POWER_PORT: u16 = 0x600;
/// ACPI sleep status register.
pub const ACPI_SLEEP_STATUS_PORT: u16 = ACPI_POWER_PORT + 1;
/// ACPI reset register.
pub const ACPI_RESET_PORT: u16 = ACPI_POWER_PORT + 2;
/// Number of ACPI power registers.
pub const ACPI_POWER_PORT_COUNT: u16 = 3;
/// First port of the PCI bus: the address register of configuration mechanism 1, followed by its
/// data register.
pub const PCI_CONFIG_PORT: u16 = 0xcf8;
/// Number of ports of the PCI bus.
pub const PCI_CONFIG_PORT_COUNT: u16 = 8;

// --- Global system interrupts -----------------------------------------------------------------

/// Interrupt of channel 0 of the interval timer (in the kernel's irqchip), edge-triggered.
pub const TIMER_GSI: u32 = 0;
/// Interrupt of the keyboard controller, edge-triggered.
pub const KEYBOARD_GSI: u32 = 1;
/// Interrupt of the ACPI generic event device, raised when the machine has been restored from saved
/// state.
pub const RESTORED_GSI: u32 = 3;
/// Interrupt of the first serial port, edge-triggered.
pub const SERIAL_GSI: u32 = 4;
/// Interrupt of the ACPI generic event device, raised when the power button is pressed.
pub const POWER_BUTTON_GSI: u32 = 5;
/// First interrupt for virtio devices, each of which has its own.
pub const FIRST_VIRTIO_GSI: u32 = 6;
/// Inputs of the I/O APIC: one more than the last interrupt.
pub const IO_APIC_PIN_COUNT: u32 = 24;
/// Most virtio devices of a machine: one for each interrupt left.
pub const MAX_VIRTIO_DEVICES: usize = (IO_APIC_PIN_COUNT - FIRST_VIRTIO_GSI) as usize;

// --- Limits -----------------------------------------------------------------------------------

/// Least guest memory in bytes: 16 MiB.
pub const MIN_MEMORY_SIZE: u64 = 16 << 20;
/// Most guest memory in bytes: what fits under 40 bits of physical address, 1 TiB less the hole.
pub const MAX_MEMORY_SIZE: u64 = (1 << 40) - (DEVICE_HOLE_END - DEVICE_HOLE);
/// Most vCPUs of one machine: what an MP table of one KiB describes.
pub const MAX_VCPUS: u8 = 32;
