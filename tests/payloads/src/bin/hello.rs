//! Says that the machine runs: the way it was entered and its command line.

#![no_std]
#![no_main]

use runtime::{BootInfo, payload, println};

payload!(hello);

fn hello() {
    let info = BootInfo::get();
    println!("hello from ring 3 via {}", info.protocol);
    println!("command line: {}", info.command_line);
}
