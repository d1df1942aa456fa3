//! The runtime of bare-metal payloads: the way from the monitor to Rust, a serial console, memory,
//! interrupts, more processors, virtio devices, and a verdict.
//!
//! All Rust code runs in ring 3 on an identity map, because there it runs natively on any KVM;
//! ring 0 is a little assembly (`src/assembly/`) that ring 3 reaches by [`system_call`]. A payload
//! is a file in `src/bin/` that names its main function with [`payload!`]. See README.md.

#![no_std]

extern crate alloc;

use core::arch::global_asm;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

pub mod acpi;
pub mod arguments;
pub mod boot_info;
pub mod heap;
pub mod interrupts;
mod memory_functions;
pub mod mmio;
pub mod mp_table;
pub mod paging;
pub mod pci;
pub mod port;
pub mod processors;
pub mod random;
pub mod report;
pub mod serial;
pub mod system_call;
pub mod time;
pub mod virtio;

pub use boot_info::BootInfo;

global_asm!(
    include_str!("assembly/entry.s"),
    include_str!("assembly/traps.s"),
    processors = const processors::MAX_PROCESSORS,
    system_calls = const system_call::COUNT,
);

/// Names the main function of a payload: `fn()`, after which the verdict is printed and the
/// machine is finished as the `finish=` argument says.
#[macro_export]
macro_rules! payload {
    ($main:path) => {
        #[unsafe(no_mangle)]
        fn payload_main() {
            $main()
        }
    };
}

/// First Rust code, in ring 3: `protocol` and `information` are what `assembly/entry.s` found.
#[unsafe(no_mangle)]
extern "C" fn ring_3_start(protocol: u64, information: u64) -> ! {
    unsafe extern "Rust" {
        safe fn payload_main();
    }
    interrupts::fill_descriptor_table();
    serial::initialise();
    // SAFETY: these are the values that the boot protocol passed, and nothing has been written to
    // memory outside the payload's own image yet.
    unsafe { boot_info::read(protocol, information) };
    payload_main();
    report::finish()
}

/// Handles an exception of ring 3 or ring 0: prints what is known of it, and resets the machine.
#[unsafe(no_mangle)]
extern "C" fn ring_3_exception(
    vector: u64,
    error_code: u64,
    rip: u64,
    code_segment: u64,
    rsp: u64,
    cr2: u64,
) -> ! {
    println!(
        "FAIL: exception {vector} in ring {}: error code {error_code:#x}, RIP {rip:#x}, RSP \
         {rsp:#x}, CR2 {cr2:#x}",
        code_segment & 3
    );
    println!("FAIL");
    report::reset()
}

#[panic_handler]
fn panic(information: &PanicInfo<'_>) -> ! {
    static PANICKED: AtomicBool = AtomicBool::new(false);
    if PANICKED.swap(true, Ordering::Relaxed) {
        system_call::triple_fault();
    }
    match information.location() {
        Some(place) => println!("FAIL: panic at {place}: {}", information.message()),
        None => println!("FAIL: panic: {}", information.message()),
    }
    println!("FAIL");
    report::reset()
}
