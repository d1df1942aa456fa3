//! Drives a balloon, for a test that measures the monitor's memory meanwhile.
//!
//! By default it does this with as many pages as the device wants, and waits for a byte of input
//! after each step, which it prints: it fills them (`filled`), puts them into the balloon
//! (`inflated`), takes them out again, when they must be zero, and fills them again (`refilled`),
//! reports them as free (`reported`), after which they must be zero again.
//!
//! Arguments: `follow` makes it follow the device's target without end. It prints `actual PAGES`
//! when it has done so, `hinted` when it has named memory on request and `done` when it has the
//! memory again and found it zero, and gives statistics when it is asked for them: free memory,
//! which is the number of times that it gave any, and two that the device must overlook.

#![no_std]
#![no_main]

extern crate alloc;

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;
use core::time::Duration;
use runtime::mmio::{read_64, write_64};
use runtime::time::Deadline;
use runtime::virtio::balloon::{Balloon, PAGE_SIZE, Statistic};
use runtime::virtio::{Buffer, Error, MmioDevice, device_id};
use runtime::{arguments, heap, interrupts, payload, println, report, serial};

const QUEUE_SIZE: u16 = 64;
const VECTOR: u8 = 0x50;
/// Pages that Linux puts into one request.
const PAGES_PER_REQUEST: usize = 256;
/// Buffers of one report of Linux.
const BUFFERS_PER_REPORT: usize = 32;
const BUFFER_SIZE: u64 = 4 << 20;
/// 32 MiB, a multiple of the size of a buffer.
const HINTED_PAGES: u32 = 8192;
/// The device is done with the memory that was named.
const DONE: u32 = 1;
const INPUT_TIMEOUT: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_secs(1);
const FREE_MEMORY: u16 = 4;
/// Tags that no device knows.
const UNKNOWN: [u16; 2] = [0x100, u16::MAX];

payload!(use_balloon);

fn use_balloon() {
    let device = arguments::virtio_mmio_windows()
        .filter_map(|window| MmioDevice::probe(window).ok())
        .find(|device| device.device_id() == device_id::BALLOON);
    let Some(device) = device else {
        return report::fail("balloon", "there is none");
    };
    let balloon = match Balloon::open(device, QUEUE_SIZE) {
        Ok(balloon) => balloon,
        Err(reason) => return report::fail("balloon initialises", reason),
    };
    if arguments::flag("follow") {
        let error = follow(balloon).err();
        report::check("balloon follows", error.map_or(Ok(()), Err));
    } else {
        report::check("balloon gives memory back", give_back(balloon));
    }
}

/// Numbers of `count` pages that nothing else uses.
fn free_pages(count: u32) -> Result<Range<u32>, String> {
    let memory = heap::memory_after();
    let first = memory.start.div_ceil(PAGE_SIZE) as u32;
    let end = first + count;
    if u64::from(end) * PAGE_SIZE > memory.end {
        return Err(format!("there are no {count} pages of memory"));
    }
    Ok(first..end)
}

fn mark(page: u32) -> u64 {
    !u64::from(page)
}

/// The words of a page that are looked at.
fn words(page: u32) -> [u64; 3] {
    let address = u64::from(page) * PAGE_SIZE;
    [0, PAGE_SIZE / 2, PAGE_SIZE - 8].map(|offset| address + offset)
}

fn fill(pages: Range<u32>) {
    for page in pages {
        for address in words(page) {
            // SAFETY: a page of memory that nothing else uses.
            unsafe { write_64(address, mark(page)) }
        }
    }
}

fn expect(pages: Range<u32>, expected: fn(u32) -> u64) -> Result<(), String> {
    for page in pages {
        for address in words(page) {
            // SAFETY: a page of memory that nothing else uses.
            let found = unsafe { read_64(address) };
            let expected = expected(page);
            if found != expected {
                return Err(format!("{found:#x} at {address:#x}, not {expected:#x}"));
            }
        }
    }
    Ok(())
}

/// The pages in the order in which a guest may well find them, as many at a time as are put into a
/// request.
fn requests(pages: Range<u32>) -> impl Iterator<Item = Vec<u32>> {
    let pages: Vec<u32> = pages.rev().collect();
    let requests: Vec<Vec<u32>> = pages
        .chunks(PAGES_PER_REQUEST)
        .map(<[u32]>::to_vec)
        .collect();
    requests.into_iter()
}

/// Prints that a step is done, and waits for a byte of input.
fn step(name: &str) -> Result<(), String> {
    println!("{name}");
    let deadline = Deadline::after(INPUT_TIMEOUT);
    while serial::read().is_none() {
        if deadline.passed() {
            return Err(format!("no input came within {INPUT_TIMEOUT:?}"));
        }
    }
    Ok(())
}

fn give_back(mut balloon: Balloon) -> Result<(), String> {
    let failed = |what| move |error: Error| format!("{what}: {error}");
    let count = balloon.target();
    let pages = free_pages(count)?;
    println!("{count} pages");
    // Pages beside them, which must not change.
    let neighbours = [pages.start - 1, pages.end];
    for page in neighbours {
        fill(page..page + 1);
    }
    fill(pages.clone());
    expect(pages.clone(), mark)?;
    step("filled")?;

    for request in requests(pages.clone()) {
        balloon.inflate(&request).map_err(failed("inflate"))?;
    }
    balloon.set_actual(count);
    if balloon.actual() != count || balloon.target() != count {
        return Err(String::from("the device does not know the balloon's size"));
    }
    step("inflated")?;

    for request in requests(pages.clone()) {
        balloon.deflate(&request).map_err(failed("deflate"))?;
    }
    balloon.set_actual(0);
    expect(pages.clone(), |_| 0)?;
    fill(pages.clone());
    step("refilled")?;

    let buffers: Vec<Buffer> = pages
        .clone()
        .step_by((BUFFER_SIZE / PAGE_SIZE) as usize)
        .map(|page| {
            let address = u64::from(page) * PAGE_SIZE;
            let end = (u64::from(pages.end) * PAGE_SIZE).min(address + BUFFER_SIZE);
            Buffer {
                address,
                length: (end - address) as u32,
                writable: true,
            }
        })
        .collect();
    for report in buffers.chunks(BUFFERS_PER_REPORT) {
        balloon.report(report).map_err(failed("report"))?;
    }
    step("reported")?;
    if balloon.reporting.is_some() {
        expect(pages.clone(), |_| 0)?;
    }
    for page in neighbours {
        expect(page..page + 1, mark)?;
    }
    Ok(())
}

/// The pages to be named: those behind a balloon of `size` pages.
fn hinted_pages(size: u32) -> Result<Range<u32>, String> {
    let pages = free_pages(size + HINTED_PAGES)?;
    Ok(pages.start + size..pages.end)
}

/// Fills memory and names it as free: an answer to request number `command`.
fn hint(balloon: &mut Balloon, command: u32, size: u32) -> Result<(), Error> {
    let Ok(pages) = hinted_pages(size) else {
        return Err(Error::QueueFull);
    };
    fill(pages.clone());
    balloon.send_hinting_command(command)?;
    for page in pages.step_by((BUFFER_SIZE / PAGE_SIZE) as usize) {
        balloon.hint(Buffer {
            address: u64::from(page) * PAGE_SIZE,
            length: BUFFER_SIZE as u32,
            writable: true,
        })?;
    }
    balloon.send_hinting_command(0)
}

/// Does what the device wants until it fails.
fn follow(mut balloon: Balloon) -> Result<(), Error> {
    balloon.device.acknowledge_interrupt();
    interrupts::route(balloon.device.window().gsi, VECTOR);
    let mut size = 0;
    let mut given = 0;
    let mut hinted = 0;
    loop {
        let seen = interrupts::count(VECTOR);
        if given == 0 || balloon.wants_statistics()? {
            given += 1;
            let statistics: [Statistic; 3] =
                [(UNKNOWN[0], 7), (FREE_MEMORY, given), (UNKNOWN[1], 8)];
            balloon.give_statistics(&statistics)?;
        }
        let target = balloon.target();
        if target != size {
            let Ok(pages) = free_pages(target.max(size)) else {
                return Err(Error::QueueFull);
            };
            let (first, end) = (pages.start + target.min(size), pages.end);
            if target > size {
                fill(first..end);
            }
            for request in requests(first..end) {
                if target > size {
                    balloon.inflate(&request)?;
                } else {
                    balloon.deflate(&request)?;
                }
            }
            size = target;
            balloon.set_actual(size);
            println!("actual {size}");
        }
        let command = balloon.hinting_command();
        if command > DONE && command != hinted {
            hinted = command;
            hint(&mut balloon, command, size)?;
            println!("hinted");
        } else if command == DONE && hinted > 0 {
            hinted = 0;
            let memory = hinted_pages(size).and_then(|pages| expect(pages, |_| 0));
            if let Err(reason) = memory {
                println!("lost: {reason}");
            }
            println!("done");
        }
        if balloon.device.needs_reset() {
            return Err(Error::NeedsReset);
        }
        interrupts::wait_until(POLL_INTERVAL, || interrupts::count(VECTOR) != seen);
        balloon.device.acknowledge_interrupt();
    }
}
