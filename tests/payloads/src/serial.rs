//! The console: a 16550 at port 0x3f8, polled, and [`print!`](crate::print) on top of it.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use crate::port;
use crate::system_call::{read_port_8, write_port_8, write_serial};

const INTERRUPT_ENABLE: u16 = port::SERIAL + 1;
const FIFO_CONTROL: u16 = port::SERIAL + 2;
const MODEM_CONTROL: u16 = port::SERIAL + 4;
const LINE_STATUS: u16 = port::SERIAL + 5;

const FIFO_ENABLE: u8 = 1;
const FIFO_SIZE: usize = 16;
const RECEIVED_DATA_AVAILABLE: u8 = 1;
const DTR_RTS_OUT2: u8 = 0xb;
const DATA_READY: u8 = 1;

/// Sets the port up for output; the runtime has done it before the payload starts.
pub fn initialise() {
    write_port_8(FIFO_CONTROL, FIFO_ENABLE);
}

/// Writes bytes unchanged.
pub fn write(bytes: &[u8]) {
    for part in bytes.chunks(FIFO_SIZE) {
        write_serial(port::SERIAL, part);
    }
}

/// Returns a byte of input, if there is one.
pub fn read() -> Option<u8> {
    (read_port_8(LINE_STATUS) & DATA_READY != 0).then(|| read_port_8(port::SERIAL))
}

/// Makes the port raise its interrupt (GSI 4) while there is input, or stops it.
pub fn interrupt_on_input(wanted: bool) {
    write_port_8(MODEM_CONTROL, DTR_RTS_OUT2);
    write_port_8(
        INTERRUPT_ENABLE,
        if wanted { RECEIVED_DATA_AVAILABLE } else { 0 },
    );
}

/// Collects formatted text so that few system calls print it.
struct Line {
    bytes: [u8; 128],
    length: usize,
}

impl Line {
    fn flush(&mut self) {
        write(&self.bytes[..self.length]);
        self.length = 0;
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            if self.length == self.bytes.len() {
                self.flush();
            }
            self.bytes[self.length] = byte;
            self.length += 1;
        }
        Ok(())
    }
}

/// What [`print!`](crate::print) expands to. Processors take turns, for a whole text each.
pub fn print(arguments: fmt::Arguments<'_>) {
    static BUSY: AtomicBool = AtomicBool::new(false);
    // A panic while printing must be able to print: after a while the turn is taken anyway.
    for _ in 0..100_000_000 {
        if !BUSY.swap(true, Ordering::Acquire) {
            break;
        }
        core::hint::spin_loop();
    }
    let mut line = Line {
        bytes: [0; 128],
        length: 0,
    };
    let _ = line.write_fmt(arguments);
    line.flush();
    BUSY.store(false, Ordering::Release);
}

/// Prints formatted text on the serial console.
#[macro_export]
macro_rules! print {
    ($($arguments:tt)*) => {
        $crate::serial::print(::core::format_args!($($arguments)*))
    };
}

/// Prints formatted text and a line feed on the serial console.
#[macro_export]
macro_rules! println {
    () => { $crate::print!("\n") };
    ($format:literal $($arguments:tt)*) => {
        $crate::print!("{}\n", ::core::format_args!($format $($arguments)*))
    };
}
