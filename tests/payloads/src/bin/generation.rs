//! Finds the generation id and the VMClock page by the ACPI tables, and prints them at the start and
//! each time the generic event device says that they have changed: a line `generation` with the id, the
//! page's sequence number, and its markers of disruption and generation.
//!
//! Arguments: `changes=N` finishes after so many changes, 1 unless given.

#![no_std]
#![no_main]

use core::time::Duration;

use runtime::{BootInfo, acpi, arguments, interrupts, payload, println, report};

const RESTORED_GSI: u32 = 3;
const RESTORED_VECTOR: u8 = 0x43;
/// How long a change may take to arrive.
const TIMEOUT: Duration = Duration::from_secs(60);

/// "VCLK", little-endian.
const MAGIC: u32 = 0x4b4c_4356;
/// Offsets in `struct vmclock_abi`.
mod field {
    pub const MAGIC: u64 = 0;
    pub const SEQUENCE: u64 = 12;
    pub const DISRUPTION_MARKER: u64 = 16;
    pub const GENERATION_MARKER: u64 = 104;
}

payload!(follow_generations);

fn follow_generations() {
    let Some(Ok(acpi)) = BootInfo::get().rsdp.map(acpi::walk) else {
        return report::fail("ACPI", "the tables were not found or are wrong");
    };
    let (Some(id), Some(clock)) = (acpi.generation_id(), acpi.vm_clock()) else {
        return report::fail("ACPI", "the tables lack a device");
    };
    if read::<u32>(clock + field::MAGIC) != MAGIC {
        return report::fail("VMClock", "the page has another magic number");
    }
    interrupts::route(RESTORED_GSI, RESTORED_VECTOR);
    let changes = arguments::parsed("changes").unwrap_or(1);
    print_generation(id, clock);
    for seen in 0..changes {
        let is_new = || interrupts::count(RESTORED_VECTOR) > seen;
        if !interrupts::wait_until(TIMEOUT, is_new) {
            return report::fail("generation", "it did not change in time");
        }
        print_generation(id, clock);
    }
    report::ok("generation");
}

fn print_generation(id: u64, clock: u64) {
    println!(
        "generation {:016x}{:016x} {} {} {}",
        read::<u64>(id + 8),
        read::<u64>(id),
        read::<u32>(clock + field::SEQUENCE),
        read::<u64>(clock + field::DISRUPTION_MARKER),
        read::<u64>(clock + field::GENERATION_MARKER)
    );
}

fn read<T: Copy>(address: u64) -> T {
    // SAFETY: the monitor says that the place is here, below 1 MiB, which is mapped and is not memory of
    // this payload. All types that it is used with are integers, for which any bytes are valid.
    unsafe { (address as *const T).read_volatile() }
}
