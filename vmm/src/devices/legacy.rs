//! Devices at fixed ports and addresses, which every machine has.

use std::sync::{Arc, Mutex};

use bantam_arch::{acpi, layout};
use bantam_devices::acpi_power::{AcpiPower, PowerValues};
use bantam_devices::activity::Activity;
use bantam_devices::boot_timer::BootTimer;
use bantam_devices::bus::{Bus, BusDevice};
use bantam_devices::device_log::DeviceLog;
use bantam_devices::exit_port::ExitPort;
use bantam_devices::generation::{self, Generation, GenerationPlaces};
use bantam_devices::i8042::I8042;
use bantam_devices::lifecycle::Device;
use bantam_devices::panic_device::PanicDevice;
use bantam_devices::pci_bus::PciBus;
use bantam_devices::rate_limiter::RateLimit;
use bantam_devices::rtc::Rtc;
use bantam_devices::serial::{Serial, SerialMetrics};
use bantam_memory::GuestMemory;

use super::serial_end::{OpenSerial, SerialGuard};
use crate::error::Error;
use crate::event_loop::DeviceLoop;
use crate::interval_timer::{self, IntervalTimer};
use crate::run_control::RunControl;
use crate::vm::Vm;

// The tables give the size of the page.
const _: () = assert!(generation::CLOCK_SIZE == layout::VM_CLOCK_SIZE as usize);

/// A device at fixed ports or addresses, and its name in saved state.
pub(crate) type LegacyDevice = (&'static str, Arc<Mutex<dyn Device>>);

/// Attaches the devices that every machine has.
pub(crate) struct LegacyDevices<'a> {
    ports: &'a mut Bus,
    mmio: &'a mut Bus,
    vm: &'a Arc<Vm>,
    control: &'a Arc<RunControl>,
    attached: Vec<LegacyDevice>,
}

impl<'a> LegacyDevices<'a> {
    /// Starts with no device attached.
    pub(crate) fn new(
        ports: &'a mut Bus,
        mmio: &'a mut Bus,
        vm: &'a Arc<Vm>,
        control: &'a Arc<RunControl>,
    ) -> LegacyDevices<'a> {
        LegacyDevices {
            ports,
            mmio,
            vm,
            control,
            attached: Vec::new(),
        }
    }

    /// Returns all devices that have been attached.
    pub(crate) fn finish(self) -> Vec<LegacyDevice> {
        self.attached
    }

    /// Attaches `device`, which saved state calls `name`, to `count` ports, starting at `port`.
    fn attach_to_ports<D: BusDevice + Device + 'static>(
        &mut self,
        name: &'static str,
        device: D,
        port: u16,
        count: u16,
    ) -> Result<Arc<Mutex<D>>, Error> {
        let device = Arc::new(Mutex::new(device));
        self.ports
            .insert(port.into(), count.into(), device.clone())?;
        self.attached.push((name, device.clone()));
        Ok(device)
    }

    /// Attaches the keyboard controller with its keyboard, by which a guest can also end the machine.
    pub(crate) fn attach_keyboard(&mut self) -> Result<Arc<Mutex<I8042>>, Error> {
        let interrupt = self.vm.interrupt_event(layout::KEYBOARD_GSI)?;
        let i8042 = I8042::new(self.control.clone(), Box::new(interrupt));
        let i8042 = self.attach_to_ports("keyboard", i8042, layout::I8042_PORT, 1)?;
        self.ports.insert_part(
            layout::I8042_COMMAND_PORT.into(),
            1,
            (layout::I8042_COMMAND_PORT - layout::I8042_PORT).into(),
            i8042.clone(),
        )?;
        Ok(i8042)
    }

    /// Attaches the interval timer, by which a kernel without a paravirtual clock measures the time stamp
    /// counter. KVM keeps its state.
    pub(crate) fn attach_interval_timer(&mut self) -> Result<(), Error> {
        let timer = Arc::new(Mutex::new(IntervalTimer::new(self.vm.clone())));
        self.ports.insert(
            layout::INTERVAL_TIMER_PORT.into(),
            layout::INTERVAL_TIMER_PORT_COUNT.into(),
            timer.clone(),
        )?;
        self.ports.insert_part(
            layout::SYSTEM_CONTROL_PORT.into(),
            1,
            interval_timer::SYSTEM_CONTROL,
            timer,
        )?;
        Ok(())
    }

    /// Attaches the ACPI registers by which a guest ends the machine.
    pub(crate) fn attach_power_control(&mut self) -> Result<(), Error> {
        let values = PowerValues {
            soft_off_sleep_type: acpi::ACPI_SLEEP_TYPE_S5,
            reset: acpi::ACPI_RESET_VALUE,
        };
        let power = AcpiPower::new(values, self.control.clone());
        let (port, count) = (layout::ACPI_POWER_PORT, layout::ACPI_POWER_PORT_COUNT);
        self.attach_to_ports("power", power, port, count)?;
        Ok(())
    }

    /// Attaches the real-time clock, for guests without a paravirtual one.
    pub(crate) fn attach_rtc(&mut self) -> Result<(), Error> {
        let (port, count) = (layout::RTC_PORT, layout::RTC_PORT_COUNT);
        self.attach_to_ports("clock", Rtc::new(), port, count)?;
        Ok(())
    }

    /// Attaches the PCI bus, which has no devices.
    pub(crate) fn attach_pci_bus(&mut self) -> Result<(), Error> {
        let (port, count) = (layout::PCI_CONFIG_PORT, layout::PCI_CONFIG_PORT_COUNT);
        self.attach_to_ports("pci", PciBus::default(), port, count)?;
        Ok(())
    }

    /// Attaches the ports by which a guest reports its outcome: that it has panicked, or a number of its own.
    pub(crate) fn attach_outcome_ports(&mut self) -> Result<(), Error> {
        let panic_device = PanicDevice::new(self.control.clone());
        self.attach_to_ports("panic", panic_device, layout::PANIC_PORT, 1)?;
        let exit_port = ExitPort::new(self.control.clone());
        self.attach_to_ports("exit", exit_port, layout::EXIT_PORT, 1)?;
        Ok(())
    }

    /// Attaches what tells the guest that its machine has been restored. It has no registers: the guest finds it
    /// in `memory`.
    pub(crate) fn attach_generation(
        &mut self,
        memory: &Arc<GuestMemory>,
    ) -> Result<Arc<Mutex<Generation>>, Error> {
        let interrupt = self.vm.interrupt_event(layout::RESTORED_GSI)?;
        let places = GenerationPlaces {
            id: layout::GENERATION_ID,
            clock: layout::VM_CLOCK,
        };
        let generation = Generation::new(memory.clone(), places, Box::new(interrupt));
        let generation = Arc::new(Mutex::new(generation));
        self.attached.push(("generation", generation.clone()));
        Ok(generation)
    }

    /// Attaches the register by which the guest reports that it has booted.
    pub(crate) fn attach_boot_timer(&mut self) -> Result<(), Error> {
        let timer = BootTimer::start().map_err(Error::resource("the boot timer"))?;
        let device = Arc::new(Mutex::new(timer));
        self.mmio
            .insert(layout::BOOT_TIMER, layout::BOOT_TIMER_SIZE, device.clone())?;
        self.attached.push(("boot timer", device));
        Ok(())
    }

    /// Attaches the serial port, whose other end is `open`, and returns its counters, with a guard that must
    /// outlive it. Output beyond `limit` is dropped. `activity` shows when a thread works for it.
    pub(crate) fn attach_serial(
        &mut self,
        event_loop: &mut DeviceLoop,
        open: OpenSerial,
        limit: Option<RateLimit>,
        log: DeviceLog,
        activity: Activity,
        is_restored: bool,
    ) -> Result<(SerialGuard, Arc<SerialMetrics>), Error> {
        let interrupt = self.vm.interrupt_event(layout::SERIAL_GSI)?;
        let port = Serial::new(Box::new(interrupt), limit, log);
        let mut port = port.map_err(Error::resource("the serial port"))?;
        if is_restored {
            // Its state will replace what it had taken from the host until then.
            port.pause().map_err(Error::resource("the serial port"))?;
        }
        let metrics = port.metrics();
        let (first, count) = (layout::SERIAL_PORT, layout::SERIAL_PORT_COUNT);
        let port = self.attach_to_ports("serial", port, first, count)?;
        if let Some(endpoint) = open.endpoint {
            let worker = endpoint.serve(port);
            let worker = worker.map_err(Error::resource("the serial port"))?;
            event_loop.add(worker, activity);
        }
        Ok((open.guard, metrics))
    }
}
