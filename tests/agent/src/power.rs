// SPDX-License-Identifier: Apache-2.0

//! The end of the guest, and the buttons and keys that request it.

use std::convert::Infallible;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process;
use std::time::{Duration, Instant};

use crate::console::say;
use crate::error::{Context, Error, Result};
use crate::sys::{self, Reboot, Signals};
use crate::system::names;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    PowerOff,
    Restart,
    /// The first process exits, at which every kernel panics.
    Panic,
    /// The guest gives the monitor a number.
    Number(u8),
}

impl Ending {
    pub fn happen(self) -> ! {
        sys::sync();
        // Fails while a file is open for writing, and if the root file system is in memory:
        // harmless in both cases.
        let _ = sys::remount_root_read_only();
        let how = match self {
            // Without ACPI a machine cannot be switched off: the kernel would stop the processors
            // for ever. A monitor can be told to treat a restart as the end.
            Self::PowerOff if Path::new("/sys/firmware/acpi").exists() => Reboot::PowerOff,
            Self::PowerOff | Self::Restart => Reboot::Restart,
            Self::Panic => process::exit(1),
            Self::Number(number) => {
                let Err(reason) = give_number(number);
                say(format_args!("bantam: exit failed {reason}"));
                Reboot::Restart
            }
        };
        say(format_args!("bantam: reboot: {}", sys::reboot(how)));
        process::exit(1)
    }
}

/// Ends the machine with a number. Returns only if it cannot.
fn give_number(number: u8) -> Result<Infallible> {
    const EXIT_PORT: u64 = 0x500;

    let ports = OpenOptions::new().write(true).open("/dev/port");
    let ports = ports.context("open /dev/port")?;
    ports
        .write_all_at(&[number], EXIT_PORT)
        .context("write to the port")?;
    Err(Error::new("the machine still runs"))
}

/// Waits until the power button is pressed. Calls `waiting` when it is ready.
pub fn button(waiting: impl FnOnce()) -> Result<()> {
    const TIMEOUT: Duration = Duration::from_secs(120);

    let mut devices = Vec::new();
    for name in names("/dev/input")?
        .iter()
        .filter(|name| name.starts_with("event"))
    {
        let path = format!("/dev/input/{name}");
        devices.push(File::open(&path).context(path)?);
    }
    if devices.is_empty() {
        return Err(Error::new("no input device"));
    }
    waiting();
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if !sys::wait_readable(&devices, left).context("wait for an event")? {
            return Err(Error::new(format!(
                "not pressed within {} s",
                TIMEOUT.as_secs()
            )));
        }
        for device in &mut devices {
            if sys::wait_readable(std::slice::from_ref(device), Duration::ZERO)
                .context("wait for an event")?
            {
                let mut event = [0; 24];
                device.read_exact(&mut event).context("read an event")?;
                if is_power_key_press(&event) {
                    return Ok(());
                }
            }
        }
    }
}

/// Waits until Ctrl-Alt-Del is pressed. Calls `waiting` when it is ready. The kernel notifies the
/// first process instead of restarting the machine.
pub fn ctrl_alt_del(waiting: impl FnOnce()) -> Result<()> {
    let interrupt = Signals::hold_back(&[libc::SIGINT]).context("hold back signals")?;
    sys::take_ctrl_alt_del().context("take Ctrl-Alt-Del from the kernel")?;
    waiting();
    interrupt.next().context("wait for a signal")?;
    Ok(())
}

/// `struct input_event`: a time of 16 bytes, type, code, value.
fn is_power_key_press(event: &[u8; 24]) -> bool {
    const KEY: u16 = 1;
    const POWER: u16 = 116;
    const PRESS: u32 = 1;
    event[16..18] == KEY.to_ne_bytes()
        && event[18..20] == POWER.to_ne_bytes()
        && event[20..] == PRESS.to_ne_bytes()
}
