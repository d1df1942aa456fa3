//! The I/O ports of this runtime.

/// First serial port (16550).
pub const SERIAL: u16 = 0x3f8;
/// Data port of the i8042 keyboard controller.
pub const I8042_DATA: u16 = 0x60;
/// Command and status port of the i8042 keyboard controller.
pub const I8042_COMMAND: u16 = 0x64;
/// i8042 command that pulses the processor's reset line.
pub const I8042_PULSE_RESET_LINE: u8 = 0xfe;
/// ACPI sleep control register of Bantam's machine (ACPI 6.5 section 4.8.3.7).
pub const ACPI_SLEEP_CONTROL: u16 = 0x600;
/// Sleep type 5 (soft off) with the sleep enable bit.
pub const ACPI_SOFT_OFF: u8 = (5 << 2) | 1 << 5;
/// Port that ends Bantam's machine with a number.
pub const EXIT: u16 = 0x500;
/// Port of the panic device.
pub const PANIC_DEVICE: u16 = 0x505;
/// The value that a panicked kernel writes there.
pub const PANICKED: u8 = 1 << 0;
