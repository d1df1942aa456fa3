//! Accesses to the ports of the serial port, the keyboard controller and ACPI, in random order.

use runtime::random::Random;
use runtime::system_call::{
    read_port_8, read_port_16, read_port_32, write_port_8, write_port_16, write_port_32,
};
use runtime::{port, report, serial};

const ACPI_PORTS: u16 = 3;
const SERIAL_PORTS: u16 = 8;
const SERIAL_LINE_CONTROL: u16 = port::SERIAL + 3;
const EIGHT_BITS_NO_PARITY: u8 = 3;

/// Bits that neither begin sleep (bit 5), nor are a reset value (1).
const ACPI_HARMLESS: u32 = 0x1e1e_1e1e;
/// First of the commands that pulse lines, the reset line among them.
const I8042_FIRST_PULSE: u8 = 0xf0;
/// The command after which a data byte sets the lines.
const I8042_WRITE_OUTPUT_PORT: u8 = 0xd1;

pub fn attack(random: &mut Random, rounds: u64) {
    for _ in 0..rounds {
        match random.below(3) {
            0 => attack_serial(random),
            1 => attack_keyboard_controller(random),
            _ => attack_acpi(random),
        }
    }
    // The console must work again.
    write_port_8(SERIAL_LINE_CONTROL, EIGHT_BITS_NO_PARITY);
    serial::interrupt_on_input(false);
    serial::initialise();
    runtime::println!();
    report::ok(format_args!("{rounds} random accesses to ports"));
}

fn attack_serial(random: &mut Random) {
    let register = port::SERIAL + random.below(u64::from(SERIAL_PORTS)) as u16;
    match random.below(6) {
        0 => drop(read_port_8(register)),
        1 => drop(read_port_16(register)),
        2 => drop(read_port_32(register)),
        // The output should not disturb a terminal.
        _ if register == port::SERIAL => write_port_8(register, b'.'),
        3 if register != port::SERIAL + 7 => write_port_16(register, random.next_u64() as u16),
        4 if register != port::SERIAL + 7 => write_port_32(register, random.next_u64() as u32),
        _ => write_port_8(register, random.next_u64() as u8),
    }
}

fn attack_keyboard_controller(random: &mut Random) {
    let register = port::I8042_DATA + random.below(5) as u16;
    let command = random.next_u64() as u8;
    match random.below(6) {
        0 => drop(read_port_8(register)),
        1 => drop(read_port_16(register)),
        2 => drop(read_port_32(register)),
        _ if register != port::I8042_COMMAND => write_port_8(register, command),
        _ if command < I8042_FIRST_PULSE && command != I8042_WRITE_OUTPUT_PORT => {
            write_port_8(register, command);
        }
        _ => {}
    }
}

fn attack_acpi(random: &mut Random) {
    let register = port::ACPI_SLEEP_CONTROL + random.below(u64::from(ACPI_PORTS)) as u16;
    let value = random.next_u64() as u32 & ACPI_HARMLESS;
    match random.below(6) {
        0 => drop(read_port_8(register)),
        1 => drop(read_port_16(register)),
        2 => drop(read_port_32(register)),
        3 => write_port_8(register, value as u8),
        4 => write_port_16(register, value as u16),
        _ => write_port_32(register, value),
    }
}
