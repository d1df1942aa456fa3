//! Sends back what it receives on a virtio console and on channels.
//!
//! It writes `early` to a console without a driver, then `hello` by its queues, and prints `console
//! ready`. Then it sends back `bytes=N` bytes on the console and on each channel, and all further
//! input meanwhile. Arguments: `reset` makes it reset the console after that and write `again`;
//! `sizes=N` makes it print the size of the console, and wait until it has changed N - 1 times;
//! `close` makes it write `bye` to the first channel, close it, wait until the host's end is closed
//! and opened again, open it and write `back`. It prints when the host's end of a channel is opened
//! or closed.

#![no_std]
#![no_main]

extern crate alloc;

use alloc::string::String;
use alloc::vec;
use core::time::Duration;
use runtime::time::Deadline;
use runtime::virtio::console::{
    Channels, Console, Port, console_feature, event, write_emergency_byte,
};
use runtime::virtio::{Error, MmioDevice, device_id};
use runtime::{arguments, payload, println, report};

const QUEUE_SIZE: u16 = 16;
const LIMIT: Duration = Duration::from_secs(50);

payload!(use_consoles);

fn use_consoles() {
    let bytes = arguments::parsed("bytes").unwrap_or(0);
    let devices = arguments::virtio_mmio_windows()
        .filter_map(|window| MmioDevice::probe(window).ok())
        .filter(|device| device.device_id() == device_id::CONSOLE);
    let mut found = false;
    for device in devices {
        found = true;
        if device.offered_features() & console_feature::MULTIPORT == 0 {
            report::check("console", use_console(device, bytes));
        } else {
            report::check("channels", use_channels(device, bytes));
        }
    }
    if !found {
        report::fail("console", "there is none");
    }
}

fn use_console(device: MmioDevice, bytes: u64) -> Result<(), Error> {
    for &byte in b"early\n" {
        write_emergency_byte(&device, byte);
    }
    let mut console = Console::open(device, QUEUE_SIZE)?;
    console.port.send(&device, b"hello\n")?;
    println!("console ready");
    echo(&device, &mut console.port, bytes)?;
    println!("console done");
    if arguments::flag("reset") {
        console = Console::open(device, QUEUE_SIZE)?;
        console.port.send(&device, b"again\n")?;
    }
    let sizes = arguments::parsed("sizes").unwrap_or(0);
    let deadline = Deadline::after(LIMIT);
    let mut last = (0, 0);
    let mut seen = 0;
    while seen < sizes {
        let size = console.size();
        if size != last {
            println!("size {}x{}", size.0, size.1);
            last = size;
            seen += 1;
        }
        if deadline.passed() {
            return Err(Error::TimedOut);
        }
    }
    Ok(())
}

fn echo(device: &MmioDevice, port: &mut Port, bytes: u64) -> Result<(), Error> {
    let deadline = Deadline::after(LIMIT);
    let mut done = 0;
    while done < bytes || !port.is_idle() {
        done += port.echo(device)?;
        if deadline.passed() {
            return Err(Error::TimedOut);
        }
    }
    Ok(())
}

fn use_channels(device: MmioDevice, bytes: u64) -> Result<(), Error> {
    let mut channels = Channels::open(device, QUEUE_SIZE)?;
    let names = channels.open_all()?;
    println!("channels {}", names.join(" "));
    let deadline = Deadline::after(LIMIT);
    let mut done = vec![0; names.len()];
    loop {
        hear(&mut channels, &names)?;
        let mut is_idle = true;
        for (port, done) in channels.ports[1..].iter_mut().zip(&mut done) {
            *done += port.echo(&device)?;
            is_idle &= *done >= bytes && port.is_idle();
        }
        if is_idle {
            break;
        }
        if deadline.passed() {
            return Err(Error::TimedOut);
        }
    }
    println!("channels done");
    if arguments::flag("close") {
        channels.ports[1].send(&device, b"bye")?;
        channels.tell(1, event::PORT_OPEN, 0)?;
        for open in [false, true] {
            while channels.is_host_open[0] != open {
                hear(&mut channels, &names)?;
                if deadline.passed() {
                    return Err(Error::TimedOut);
                }
            }
        }
        channels.tell(1, event::PORT_OPEN, 1)?;
        channels.ports[1].send(&device, b"back")?;
    }
    Ok(())
}

/// Takes the next message, if one has arrived. It is about the host's end of a channel.
fn hear(channels: &mut Channels, names: &[String]) -> Result<(), Error> {
    if let Some(message) = channels.take_message()? {
        let name = names.get((message.port as usize).wrapping_sub(1));
        match name {
            Some(name) if message.event == event::PORT_OPEN => {
                let state = if message.value == 0 { "closed" } else { "open" };
                println!("{name} is {state}");
            }
            _ => return Err(Error::WrongLength(message.event.into())),
        }
    }
    Ok(())
}
