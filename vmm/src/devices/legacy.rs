//! Devices at fixed ports and addresses, which every machine has.

use std::sync::{Arc, Mutex};

use bantam_arch::{acpi, layout};
use bantam_devices::acpi_power::{AcpiPower, PowerValues};
use bantam_devices::boot_timer::BootTimer;
use bantam_devices::bus::Bus;
use bantam_devices::device_log::DeviceLog;
use bantam_devices::exit_port::ExitPort;
use bantam_devices::i8042::I8042;
use bantam_devices::panic_device::PanicDevice;
use bantam_devices::pci_bus::PciBus;
use bantam_devices::rate_limiter::RateLimit;
use bantam_devices::rtc::Rtc;
use bantam_devices::serial::{Serial, SerialMetrics};

use super::serial_end::{OpenSerial, SerialGuard};
use crate::error::Error;
use crate::event_loop::DeviceLoop;
use crate::interval_timer::{self, IntervalTimer};
use crate::run_control::RunControl;
use crate::vm::Vm;

/// The keyboard controller with its keyboard, by which a guest also ends the machine.
pub(crate) fn attach_keyboard(
    ports: &mut Bus,
    vm: &Vm,
    control: &Arc<RunControl>,
) -> Result<Arc<Mutex<I8042>>, Error> {
    let interrupt = vm.interrupt_event(layout::KEYBOARD_GSI)?;
    let i8042 = Arc::new(Mutex::new(I8042::new(control.clone(), Box::new(interrupt))));
    ports.insert(layout::I8042_PORT.into(), 1, i8042.clone())?;
    ports.insert_part(
        layout::I8042_COMMAND_PORT.into(),
        1,
        (layout::I8042_COMMAND_PORT - layout::I8042_PORT).into(),
        i8042.clone(),
    )?;
    Ok(i8042)
}

/// The interval timer, by which a kernel without a paravirtual clock measures the processor's.
pub(crate) fn attach_interval_timer(ports: &mut Bus, vm: &Arc<Vm>) -> Result<(), Error> {
    let timer = Arc::new(Mutex::new(IntervalTimer::new(vm.clone())));
    ports.insert(
        layout::INTERVAL_TIMER_PORT.into(),
        layout::INTERVAL_TIMER_PORT_COUNT.into(),
        timer.clone(),
    )?;
    ports.insert_part(
        layout::SYSTEM_CONTROL_PORT.into(),
        1,
        interval_timer::SYSTEM_CONTROL,
        timer,
    )?;
    Ok(())
}

/// The ACPI registers by which a guest ends the machine.
pub(crate) fn attach_power_control(
    ports: &mut Bus,
    control: &Arc<RunControl>,
) -> Result<(), Error> {
    let values = PowerValues {
        soft_off_sleep_type: acpi::ACPI_SLEEP_TYPE_S5,
        reset: acpi::ACPI_RESET_VALUE,
    };
    ports.insert(
        layout::ACPI_POWER_PORT.into(),
        layout::ACPI_POWER_PORT_COUNT.into(),
        Arc::new(Mutex::new(AcpiPower::new(values, control.clone()))),
    )?;
    Ok(())
}

/// The real-time clock, for guests without a paravirtual one.
pub(crate) fn attach_rtc(ports: &mut Bus) -> Result<(), Error> {
    ports.insert(
        layout::RTC_PORT.into(),
        layout::RTC_PORT_COUNT.into(),
        Arc::new(Mutex::new(Rtc::new())),
    )?;
    Ok(())
}

/// The PCI bus, which has nothing on it.
pub(crate) fn attach_pci_bus(ports: &mut Bus) -> Result<(), Error> {
    ports.insert(
        layout::PCI_CONFIG_PORT.into(),
        layout::PCI_CONFIG_PORT_COUNT.into(),
        Arc::new(Mutex::new(PciBus::default())),
    )?;
    Ok(())
}

/// The ports by which a guest says what has become of it: that it has panicked, or a number of its own.
pub(crate) fn attach_outcome_ports(
    ports: &mut Bus,
    control: &Arc<RunControl>,
) -> Result<(), Error> {
    let panic_device = PanicDevice::new(control.clone());
    let panic_device = Arc::new(Mutex::new(panic_device));
    ports.insert(layout::PANIC_PORT.into(), 1, panic_device)?;
    let exit_port = Arc::new(Mutex::new(ExitPort::new(control.clone())));
    ports.insert(layout::EXIT_PORT.into(), 1, exit_port)?;
    Ok(())
}

/// The register by which the guest says that it has booted.
pub(crate) fn attach_boot_timer(mmio: &mut Bus) -> Result<(), Error> {
    let timer = BootTimer::start().map_err(Error::resource("the boot timer"))?;
    mmio.insert(
        layout::BOOT_TIMER,
        layout::BOOT_TIMER_SIZE,
        Arc::new(Mutex::new(timer)),
    )?;
    Ok(())
}

/// The serial port, whose other end is `open`, and what it counts. Output beyond `limit` bytes is dropped.
pub(crate) fn attach_serial(
    ports: &mut Bus,
    vm: &Vm,
    event_loop: &mut DeviceLoop,
    open: OpenSerial,
    limit: Option<RateLimit>,
    log: DeviceLog,
) -> Result<(SerialGuard, Arc<SerialMetrics>), Error> {
    let interrupt = vm.interrupt_event(layout::SERIAL_GSI)?;
    let port = Serial::new(Box::new(interrupt), limit, log);
    let port = port.map_err(Error::resource("the serial port"))?;
    let metrics = port.metrics();
    let port = Arc::new(Mutex::new(port));
    if let Some(endpoint) = open.endpoint {
        let worker = endpoint.serve(port.clone());
        event_loop.add(worker.map_err(Error::resource("the serial port"))?);
    }
    ports.insert(
        layout::SERIAL_PORT.into(),
        layout::SERIAL_PORT_COUNT.into(),
        port,
    )?;
    Ok((open.guard, metrics))
}
