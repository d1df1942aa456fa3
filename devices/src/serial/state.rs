//! Pausing, saving and restoring a serial port.
//!
//! Output that the host has taken belongs to the host: it is written even while the port is paused, and by
//! the worker of a machine that ends. All other bytes stay in the port, and belong to the saved machine.

use std::io;

use bantam_state::{RestoreError, SaveError, SavedState, Section};
use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialState;

use super::{Attention, INPUT_CHUNK, Line, OUTPUT_CAPACITY, Output, Serial, Uart, signal};
use crate::lifecycle::{Device, at_work, invalid};

/// Bytes that the receive FIFO holds.
const RECEIVE_FIFO_SIZE: usize = 64;
/// Bits of the interrupt enable register that exist.
const INTERRUPT_ENABLE_MASK: u8 = 0x0f;
/// Line status: there is a byte to receive.
const DATA_READY: u8 = 1 << 0;

/// Values of the interrupt identification register.
mod identification {
    pub(super) const NONE: u8 = 1 << 0;
    pub(super) const TRANSMITTER_EMPTY: u8 = 1 << 1;
    pub(super) const RECEIVED_DATA: u8 = 1 << 2;
}

/// The state of a port. Registers that always have the same value are not in it.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct PortState {
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    receive_fifo: Vec<u8>,
    pending_input: Vec<u8>,
    output: Vec<u8>,
    was_full: bool,
}

impl SavedState for PortState {
    const KIND: &'static str = "serial";
    const VERSION: u16 = 1;
}

impl PortState {
    fn validate(&self) -> Result<(), String> {
        for (what, len, capacity) in [
            ("received", self.receive_fifo.len(), RECEIVE_FIFO_SIZE),
            ("read", self.pending_input.len(), INPUT_CHUNK),
            ("sent", self.output.len(), OUTPUT_CAPACITY),
        ] {
            if len > capacity {
                return Err(format!(
                    "it has {len} bytes {what}, and room for {capacity}"
                ));
            }
        }
        if self.interrupt_enable & !INTERRUPT_ENABLE_MASK != 0 {
            let bits = self.interrupt_enable;
            return Err(format!("it enables interrupts {bits:#x}"));
        }
        let is_possible = match self.interrupt_identification {
            identification::NONE => true,
            cause => {
                let causes = identification::TRANSMITTER_EMPTY | identification::RECEIVED_DATA;
                let has_data = !self.receive_fifo.is_empty();
                cause != 0
                    && cause & !causes == 0
                    && (has_data || cause & identification::RECEIVED_DATA == 0)
            }
        };
        if !is_possible {
            let cause = self.interrupt_identification;
            return Err(format!("its interrupt cannot have the cause {cause:#x}"));
        }
        Ok(())
    }

    fn registers(&self) -> SerialState {
        let mut registers = SerialState {
            baud_divisor_low: self.baud_divisor[0],
            baud_divisor_high: self.baud_divisor[1],
            interrupt_enable: self.interrupt_enable,
            interrupt_identification: self.interrupt_identification,
            line_control: self.line_control,
            modem_control: self.modem_control,
            scratch: self.scratch,
            in_buffer: self.receive_fifo.clone(),
            ..SerialState::default()
        };
        if !self.receive_fifo.is_empty() {
            registers.line_status |= DATA_READY;
        }
        registers
    }
}

impl Serial {
    fn pause_line(&mut self) {
        self.is_paused = true;
        self.interrupt.pause();
    }

    /// Replaces the UART by one with these registers, which takes over the output.
    fn set_registers(&mut self, registers: &SerialState) -> Result<(), RestoreError> {
        let line = Line(self.interrupt.clone());
        let attention = Attention(self.attention.clone());
        let output = self.uart.writer_mut();
        let output = Output {
            bytes: std::mem::take(&mut output.bytes),
            attention: self.attention.clone(),
            connected: output.connected,
            was_full: output.was_full,
            limiter: output.limiter.take(),
            metrics: self.metrics.clone(),
            log: self.log.clone(),
        };
        self.uart = Uart::from_state(registers, line, attention, output).map_err(|error| {
            RestoreError::Host {
                part: PortState::KIND.to_owned(),
                source: io::Error::other(error.to_string()),
            }
        })?;
        Ok(())
    }
}

impl Device for Serial {
    fn pause(&mut self) -> io::Result<()> {
        if !self.is_paused {
            self.pause_line();
            self.is_saved.set(false);
        }
        Ok(())
    }

    fn resume(&mut self) -> io::Result<()> {
        self.is_paused = false;
        self.is_saved.set(false);
        // This makes the worker continue in both directions.
        signal(&self.attention);
        self.interrupt.resume()
    }

    /// Output of the guest is on its way already, and is not taken back.
    fn reset(&mut self) {
        self.pending_input.clear();
        self.uart.writer_mut().was_full = false;
        // The default state raises no interrupt, so this cannot fail.
        let _ = self.set_registers(&SerialState::default());
        self.interrupt.reset();
    }

    fn save(&self) -> Result<Section, SaveError> {
        if !self.is_paused {
            return Err(at_work::<PortState>());
        }
        let registers = self.uart.state();
        let output = self.uart.writer();
        let section = Section::of(&PortState {
            baud_divisor: [registers.baud_divisor_low, registers.baud_divisor_high],
            interrupt_enable: registers.interrupt_enable,
            interrupt_identification: registers.interrupt_identification,
            line_control: registers.line_control,
            modem_control: registers.modem_control,
            scratch: registers.scratch,
            receive_fifo: registers.in_buffer,
            pending_input: self.pending_input.iter().copied().collect(),
            output: output.bytes.iter().copied().collect(),
            was_full: output.was_full,
        })?;
        self.is_saved.set(true);
        Ok(section)
    }

    fn restore(&mut self, section: &Section) -> Result<(), RestoreError> {
        self.pause_line();
        self.is_saved.set(false);
        self.uart.writer_mut().bytes.clear();
        self.reset();
        let state: PortState = section.decode()?;
        state.validate().map_err(invalid::<PortState>)?;
        // The interrupt for what is there may not have reached the driver: the resume raises it again.
        self.set_registers(&state.registers())?;
        self.pending_input = state.pending_input.into();
        let output = self.uart.writer_mut();
        output.bytes = state.output.into();
        output.was_full = state.was_full;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
