//! Prints that the machine runs, how it was entered, and its command line.
//!
//! Arguments: `boot-timer` writes 123 to the register that tells the monitor that the guest has
//! booted; `msr=INDEX`, in decimal, prints the content of this model-specific register.

#![no_std]
#![no_main]

use runtime::{BootInfo, arguments, mmio, payload, println, system_call};

/// The register, and the value to write.
const BOOT_TIMER: u64 = 0xc000_0000;
const HAS_BOOTED: u8 = 123;

payload!(hello);

fn hello() {
    let info = BootInfo::get();
    println!("hello from ring 3 via {}", info.protocol);
    println!("command line: {}", info.command_line);
    if let Some(index) = arguments::parsed("msr") {
        println!("MSR {index:#x}: {:#x}", system_call::read_msr(index));
    }
    if arguments::flag("boot-timer") {
        // SAFETY: the address is mapped, and there is no memory.
        unsafe { mmio::write_8(BOOT_TIMER, HAS_BOOTED) };
    }
}
