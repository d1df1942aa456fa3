//! What tests ask of the devices of a machine that they own.

use bantam_vmm::config::{DeviceName, MachineConfig};
use bantam_vmm::{BalloonStatistics, Console, Controller, DeviceAnswer, DeviceCommand};
use bantam_vmm::{DeviceMetrics, Error, GuestMemory};
use vm_memory::Bytes;

/// A machine of `config` that has not been started, with `console` as its standard input and output.
///
/// # Panics
/// If the host is out of descriptors, or the configuration contradicts itself.
#[must_use]
pub fn configured(config: MachineConfig, console: Console) -> Controller {
    let machine = Controller::new().expect("there are descriptors");
    machine.set_console(console).expect("it is not started");
    let configured = machine.configure(config);
    configured.unwrap_or_else(|error| panic!("{error}"));
    machine
}

/// Has the device called `name` do what `command` says.
///
/// # Errors
/// As [`Controller::device`].
///
/// # Panics
/// If no device can have that name.
pub fn device(
    machine: &Controller,
    name: &str,
    command: DeviceCommand,
) -> Result<DeviceAnswer, Error> {
    let name: DeviceName = name.parse().expect("it is a name");
    machine.device(&name, command)
}

/// What the machine's balloon says of itself.
///
/// # Panics
/// If the machine does not run or has no balloon.
#[must_use]
pub fn balloon_statistics(machine: &Controller) -> BalloonStatistics {
    match device(machine, "balloon", DeviceCommand::BalloonStatistics) {
        Ok(DeviceAnswer::Balloon(statistics)) => *statistics,
        other => panic!("{other:?}"),
    }
}

/// The counters of the device called `name`.
///
/// # Panics
/// If the machine was not started or has no such device.
#[must_use]
pub fn device_metrics(machine: &Controller, name: &str) -> DeviceMetrics {
    let metrics = machine.metrics().expect("it was started");
    metrics.devices.get(name).expect("there is one").clone()
}

/// Returns a copy of guest memory.
///
/// # Panics
/// If the host has too little memory.
#[must_use]
pub fn copy_memory(memory: &GuestMemory) -> GuestMemory {
    let ranges: Vec<_> = memory
        .regions()
        .map(|region| (region.start, region.len as usize))
        .collect();
    let copy = GuestMemory::from_ranges(&ranges).expect("there is memory");
    for (address, len) in ranges {
        let mut bytes = vec![0; len];
        memory
            .read_slice(&mut bytes, address)
            .expect("it is memory");
        copy.write_slice(&bytes, address).expect("it is memory");
    }
    copy
}
