// SPDX-License-Identifier: Apache-2.0

//! A human-readable description of the machine.

use crate::console::say;
use crate::error::{Context, Result};
use crate::{disk, net, sys, system};

pub fn print() -> Result<()> {
    say(format_args!("{}", sys::uname().context("uname")?));
    say(format_args!("cpus: {}", system::online_cpus()?.len()));
    say(format_args!("memory: {} MiB", system::memory()? / 1024));
    for disk in system::names("/sys/block")? {
        let size = disk::size(&disk)?;
        let access = if disk::is_read_only(&disk)? {
            "read-only"
        } else {
            "read-write"
        };
        say(format_args!("disk: {disk}, {size} bytes, {access}"));
    }
    let mut interfaces = system::names("/sys/class/net")?;
    interfaces.retain(|name| name != "lo");
    if interfaces.is_empty() {
        say(format_args!("network: none"));
    }
    for interface in &interfaces {
        let mac = net::mac(interface)?;
        let mtu = net::mtu(interface)?;
        say(format_args!("network: {interface}, {mac}, mtu {mtu}"));
    }
    Ok(())
}
