//! The i8042 keyboard controller of a PC with an AT keyboard: the parts of both that are needed for the
//! machine's owner to press Ctrl-Alt-Del, and for the guest to reset the machine.
//!
//! Both are described in IBM's "Personal System/2 Hardware Interface Technical Reference", sections "Keyboard
//! and Auxiliary Device Controller" and "Keyboards". There is no auxiliary device (mouse).

mod keyboard;

use std::io;
use std::sync::Arc;

use bantam_state::{RestoreError, SaveError, SavedState, Section};
use serde::{Deserialize, Serialize};

use crate::InterruptLine;
use crate::bus::BusDevice;
use crate::interrupt::PausableLine;
use crate::lifecycle::{Device, at_work, invalid};
use crate::power::PowerControl;
use keyboard::Keyboard;

const DATA_PORT: u64 = 0;
/// Offset of the command and status port from the data port.
const COMMAND_PORT: u64 = 4;

/// Bits of the status register. The bit that says that the controller is still busy with the last write is
/// never set.
mod status {
    /// The data port has a byte that has not been read yet.
    pub(super) const OUTPUT_BUFFER_FULL: u8 = 1 << 0;
    /// The system flag of the command byte.
    pub(super) const SYSTEM: u8 = 1 << 2;
    /// The last write was to the command port.
    pub(super) const COMMAND: u8 = 1 << 3;
    /// The keyboard is not locked by the key switch.
    pub(super) const NOT_LOCKED: u8 = 1 << 4;
}

/// Bits of the command byte.
mod command_byte {
    /// A byte at the data port raises the interrupt.
    pub(super) const INTERRUPT: u8 = 1 << 0;
    /// The controller has been tested.
    pub(super) const SYSTEM: u8 = 1 << 2;
    /// The keyboard's clock line is held low, so that it sends nothing.
    pub(super) const KEYBOARD_DISABLED: u8 = 1 << 4;
    /// The clock line of an auxiliary device is held low.
    pub(super) const AUXILIARY_DISABLED: u8 = 1 << 5;
    /// What the keyboard sends is translated from scan code set 2 to set 1.
    pub(super) const TRANSLATE: u8 = 1 << 6;
}

mod command {
    pub(super) const READ_COMMAND_BYTE: u8 = 0x20;
    pub(super) const WRITE_COMMAND_BYTE: u8 = 0x60;
    pub(super) const SELF_TEST: u8 = 0xaa;
    pub(super) const TEST_KEYBOARD_LINE: u8 = 0xab;
    pub(super) const DISABLE_KEYBOARD: u8 = 0xad;
    pub(super) const ENABLE_KEYBOARD: u8 = 0xae;
    pub(super) const READ_OUTPUT_PORT: u8 = 0xd0;
    pub(super) const WRITE_OUTPUT_PORT: u8 = 0xd1;
    /// First of the commands that pulse those of the output port's four low lines whose bits in the command
    /// are zero.
    pub(super) const PULSE_LINES: u8 = 0xf0;
}

const SELF_TEST_PASSED: u8 = 0x55;
const LINE_TEST_PASSED: u8 = 0x00;

/// Bits of the output port. The first line, when low, resets the processor.
mod output_port {
    pub(super) const NOT_RESET: u8 = 1 << 0;
    pub(super) const ADDRESS_LINE_20: u8 = 1 << 1;
    pub(super) const OUTPUT_BUFFER_FULL: u8 = 1 << 4;
}

/// Why keys cannot be pressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyboardError {
    /// No driver has enabled the keyboard, or one has disabled it.
    #[error("the guest does not listen to its keyboard")]
    Disabled,
    /// The keyboard's buffer has no room for more keys.
    #[error("the guest has not taken the keys that were pressed before")]
    Full,
}

/// What the next byte written to the data port is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Awaited {
    CommandByte,
    OutputPort,
}

/// The controller's two ports, data at offset 0 and command and status at offset 4, and its keyboard.
///
/// The keyboard is disabled until the guest enables it, so that keys are pressed only if the guest listens.
/// Translation is on, as firmware leaves it.
pub struct I8042 {
    power: Arc<dyn PowerControl>,
    interrupt: PausableLine,
    registers: Registers,
    interrupt_is_raised: bool,
    is_paused: bool,
    warned: bool,
}

/// All state that is visible to the guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Registers {
    keyboard: Keyboard,
    command_byte: u8,
    output_port: u8,
    /// The byte at the data port; a byte that has been read can be read again.
    output: u8,
    output_full: bool,
    /// An answer of the controller that waits for the output buffer to be free.
    answer: Option<u8>,
    awaited: Option<Awaited>,
    last_write_was_command: bool,
}

impl SavedState for Registers {
    const KIND: &'static str = "i8042";
    const VERSION: u16 = 1;
}

impl Default for Registers {
    /// As firmware leaves them.
    fn default() -> Registers {
        Registers {
            keyboard: Keyboard::default(),
            command_byte: command_byte::SYSTEM
                | command_byte::KEYBOARD_DISABLED
                | command_byte::AUXILIARY_DISABLED
                | command_byte::TRANSLATE,
            output_port: output_port::NOT_RESET | output_port::ADDRESS_LINE_20,
            output: 0,
            output_full: false,
            answer: None,
            awaited: None,
            last_write_was_command: false,
        }
    }
}

impl Registers {
    fn validate(&self) -> Result<(), String> {
        if self.answer.is_some() && !self.output_full {
            return Err("an answer waits for a buffer that is free".to_owned());
        }
        if self.keyboard_is_enabled() && self.keyboard.has_bytes() && !self.output_full {
            return Err("its keyboard waits for a buffer that is free".to_owned());
        }
        self.keyboard.validate()
    }

    fn keyboard_is_enabled(&self) -> bool {
        self.command_byte & command_byte::KEYBOARD_DISABLED == 0
    }
}

impl I8042 {
    /// Makes a controller that raises `interrupt` when there is something to read, and whose reset line asks
    /// `power` for a restart.
    pub fn new(power: Arc<dyn PowerControl>, interrupt: Box<dyn InterruptLine>) -> I8042 {
        I8042 {
            power,
            interrupt: PausableLine::new(interrupt),
            registers: Registers::default(),
            interrupt_is_raised: false,
            is_paused: false,
            warned: false,
        }
    }

    /// Presses Ctrl, Alt and Del, and releases them.
    ///
    /// # Errors
    /// If the guest does not listen to the keyboard, or has not taken the keys that were pressed before.
    /// Nothing is pressed then.
    pub fn press_ctrl_alt_del(&mut self) -> Result<(), KeyboardError> {
        if !self.registers.keyboard_is_enabled() {
            return Err(KeyboardError::Disabled);
        }
        self.registers.keyboard.press_ctrl_alt_del()?;
        self.update();
        Ok(())
    }

    /// Moves the next byte into the output buffer if that is free. Raises the interrupt for a byte that is
    /// new there, or whose interrupt the command byte has only now enabled.
    fn update(&mut self) {
        if !self.registers.output_full {
            let mut next = self.registers.answer.take();
            if next.is_none() && self.registers.keyboard_is_enabled() {
                let translate = self.registers.command_byte & command_byte::TRANSLATE != 0;
                next = self.registers.keyboard.next_byte(translate);
            }
            if let Some(byte) = next {
                self.registers.output = byte;
                self.registers.output_full = true;
            }
        }
        let raised = self.registers.output_full
            && self.registers.command_byte & command_byte::INTERRUPT != 0;
        if raised && !self.interrupt_is_raised {
            self.raise_interrupt();
        }
        self.interrupt_is_raised = raised;
    }

    fn raise_interrupt(&mut self) {
        if let Err(error) = self.interrupt.trigger()
            && !std::mem::replace(&mut self.warned, true)
        {
            tracing::warn!("keyboard controller: cannot raise its interrupt: {error}");
        }
    }

    fn status(&self) -> u8 {
        let mut status = status::NOT_LOCKED;
        for (bit, is_set) in [
            (status::OUTPUT_BUFFER_FULL, self.registers.output_full),
            (
                status::SYSTEM,
                self.registers.command_byte & command_byte::SYSTEM != 0,
            ),
            (status::COMMAND, self.registers.last_write_was_command),
        ] {
            if is_set {
                status |= bit;
            }
        }
        status
    }

    fn execute(&mut self, command: u8) {
        self.registers.awaited = None;
        match command {
            command::READ_COMMAND_BYTE => self.registers.answer = Some(self.registers.command_byte),
            command::WRITE_COMMAND_BYTE => self.registers.awaited = Some(Awaited::CommandByte),
            command::SELF_TEST => {
                self.registers.command_byte |= command_byte::SYSTEM;
                self.registers.answer = Some(SELF_TEST_PASSED);
            }
            command::TEST_KEYBOARD_LINE => self.registers.answer = Some(LINE_TEST_PASSED),
            command::DISABLE_KEYBOARD => {
                self.registers.command_byte |= command_byte::KEYBOARD_DISABLED;
            }
            command::ENABLE_KEYBOARD => {
                self.registers.command_byte &= !command_byte::KEYBOARD_DISABLED;
            }
            command::READ_OUTPUT_PORT => {
                let mut lines = self.registers.output_port & !output_port::OUTPUT_BUFFER_FULL;
                if self.registers.output_full {
                    lines |= output_port::OUTPUT_BUFFER_FULL;
                }
                self.registers.answer = Some(lines);
            }
            command::WRITE_OUTPUT_PORT => self.registers.awaited = Some(Awaited::OutputPort),
            command::PULSE_LINES.. if command & output_port::NOT_RESET == 0 => self.power.reset(),
            _ => {}
        }
    }

    fn take_data(&mut self, value: u8) {
        match self.registers.awaited.take() {
            Some(Awaited::CommandByte) => self.registers.command_byte = value,
            Some(Awaited::OutputPort) => {
                self.registers.output_port = value;
                if value & output_port::NOT_RESET == 0 {
                    self.power.reset();
                }
            }
            None => {
                // To send to the keyboard, the controller releases the line.
                self.registers.command_byte &= !command_byte::KEYBOARD_DISABLED;
                self.registers.keyboard.command(value);
            }
        }
    }
}

impl Device for I8042 {
    fn pause(&mut self) -> io::Result<()> {
        self.is_paused = true;
        self.interrupt.pause();
        Ok(())
    }

    fn resume(&mut self) -> io::Result<()> {
        self.is_paused = false;
        self.interrupt.resume()
    }

    fn reset(&mut self) {
        self.registers = Registers::default();
        self.interrupt_is_raised = false;
        self.interrupt.reset();
    }

    fn save(&self) -> Result<Section, SaveError> {
        if !self.is_paused {
            return Err(at_work::<Registers>());
        }
        Section::of(&self.registers)
    }

    fn restore(&mut self, section: &Section) -> Result<(), RestoreError> {
        self.is_paused = true;
        self.interrupt.pause();
        self.reset();
        let registers: Registers = section.decode()?;
        registers.validate().map_err(invalid::<Registers>)?;
        self.registers = registers;
        // The interrupt of a byte that is there may not have reached the driver, so the resume raises it.
        self.update();
        Ok(())
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let &mut [ref mut value] = data else {
            data.fill(0xff);
            return;
        };
        *value = match offset {
            DATA_PORT => {
                let byte = self.registers.output;
                self.registers.output_full = false;
                self.interrupt_is_raised = false;
                self.update();
                byte
            }
            COMMAND_PORT => self.status(),
            // The ports between the two, such as the speaker's on a PC, read as off.
            _ => 0,
        };
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let &[value] = data else {
            return;
        };
        match offset {
            DATA_PORT => self.take_data(value),
            COMMAND_PORT => self.execute(value),
            _ => return,
        }
        self.registers.last_write_was_command = offset == COMMAND_PORT;
        self.update();
    }
}

#[cfg(test)]
mod tests;
