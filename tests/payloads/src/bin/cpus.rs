//! Starts every processor that the firmware tables list.
//!
//! Arguments: `expect=N`, the machine's processors; `require=mp`, `require=acpi` or `require=both`,
//! the tables that have to be there.

#![no_std]
#![no_main]

extern crate alloc;

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::arch::x86_64::__cpuid;
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use core::time::Duration;
use runtime::processors::{self, MAX_PROCESSORS};
use runtime::time::Deadline;
use runtime::{BootInfo, acpi, arguments, interrupts, mp_table, payload, println, report};

const PING_TIMEOUT: Duration = Duration::from_secs(5);
const PING_VECTOR: u8 = 0x40;

/// Local APIC ids in the low half and CPUID's initial APIC ids in the high half, as each processor
/// saw them.
static IDS: [AtomicU32; MAX_PROCESSORS] = [const { AtomicU32::new(0) }; MAX_PROCESSORS];
static ARRIVED: AtomicUsize = AtomicUsize::new(0);

payload!(check_processors);

fn check_processors() {
    let mut listed = Vec::new();
    let require = arguments::value("require");
    match mp_table::find() {
        Ok(Some(table)) => {
            println!(
                "MP table by {:#x}: processors {:?}, boot processor {:?}, I/O APICs {:x?}",
                table.floating_pointer, table.processors, table.boot_processors, table.io_apics
            );
            report::check(
                "the MP table marks this processor",
                marks_this_processor(&table),
            );
            listed.push(("MP table", table.processors));
        }
        Ok(None) if matches!(require, Some("mp" | "both")) => {
            report::fail("MP table", "there is none");
        }
        Ok(None) => println!("no MP table"),
        Err(reason) => report::fail("MP table", reason),
    }
    match BootInfo::get().rsdp.map(acpi::walk) {
        Some(Ok(acpi)) => {
            let names: Vec<String> = acpi
                .tables
                .iter()
                .map(|name| format!("{}", name.escape_ascii()))
                .collect();
            println!(
                "ACPI tables {names:?}: processors {:?}, I/O APICs {:x?}",
                acpi.processors, acpi.io_apics
            );
            report::ok("ACPI checksums");
            listed.push(("MADT", acpi.processors.iter().map(|&id| id as u8).collect()));
        }
        Some(Err(reason)) => report::fail("ACPI", reason),
        None if matches!(require, Some("acpi" | "both")) => {
            report::fail("ACPI", "no root pointer was passed");
        }
        None => println!("no ACPI"),
    }
    if let [(_, first), (_, second)] = &listed[..] {
        let same = if first == second {
            Ok(())
        } else {
            Err("they list different processors")
        };
        report::check("the MP table and the MADT agree", same);
    }
    let Some((source, ids)) = listed.first() else {
        return report::fail("processors", "no table lists them");
    };
    if let Some(expected) = arguments::parsed::<usize>("expect") {
        let count = if ids.len() == expected {
            Ok(())
        } else {
            Err(format!("the {source} lists {}", ids.len()))
        };
        report::check(format!("{expected} processors are listed"), count);
    }
    start_all(ids);
}

fn marks_this_processor(table: &mp_table::MpTable) -> Result<(), String> {
    let own = interrupts::local_apic_id();
    if table.boot_processors == [own] {
        Ok(())
    } else {
        Err(format!(
            "this is processor {own}, marked is {:?}",
            table.boot_processors
        ))
    }
}

fn start_all(ids: &[u8]) {
    let own = interrupts::local_apic_id();
    let mut running = 1;
    for &id in ids.iter().filter(|&&id| id != own) {
        match processors::start(id, application_processor) {
            Ok(index) => {
                running += 1;
                report::check(
                    format!("processor {id} starts and takes an interrupt"),
                    ping(id, index),
                );
            }
            Err(reason) => report::fail(format!("processor {id}"), reason),
        }
    }
    println!("{running} processors run");
}

/// Waits until the processor has reported its ids, then wakes it from its halt.
fn ping(id: u8, index: usize) -> Result<(), String> {
    let deadline = Deadline::after(PING_TIMEOUT);
    while ARRIVED.load(Ordering::Acquire) < index {
        if deadline.passed() {
            return Err(String::from("it did not report"));
        }
        core::hint::spin_loop();
    }
    let ids = IDS[index].load(Ordering::Acquire);
    println!(
        "processor {index}: local APIC id {}, by CPUID {}",
        ids & 0xffff,
        ids >> 16
    );
    if ids & 0xffff != u32::from(id) {
        return Err(format!("its local APIC says {}", ids & 0xffff));
    }
    let before = interrupts::count(PING_VECTOR);
    interrupts::send(id, PING_VECTOR);
    let deadline = Deadline::after(PING_TIMEOUT);
    while interrupts::count(PING_VECTOR) == before {
        if deadline.passed() {
            return Err(String::from("it did not take the interrupt"));
        }
        core::hint::spin_loop();
    }
    Ok(())
}

fn application_processor(index: usize) {
    let local_apic_id = u32::from(interrupts::local_apic_id());
    let initial_apic_id = __cpuid(1).ebx >> 24;
    IDS[index].store(local_apic_id | initial_apic_id << 16, Ordering::Release);
    let seen = interrupts::total();
    ARRIVED.store(index, Ordering::Release);
    runtime::system_call::wait_for_interrupt(seen);
}
