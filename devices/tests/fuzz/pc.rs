//! The devices of a PC, with a guest that does what it likes and state that anyone may have written.

use std::io;
use std::sync::{Arc, Mutex};

use bantam_devices::InterruptLine;
use bantam_devices::acpi_power::{AcpiPower, PowerValues};
use bantam_devices::boot_timer::BootTimer;
use bantam_devices::bus::BusDevice;
use bantam_devices::device_log::DeviceLog;
use bantam_devices::exit_port::ExitPort;
use bantam_devices::i8042::I8042;
use bantam_devices::lifecycle::Device;
use bantam_devices::panic_device::PanicDevice;
use bantam_devices::pci_bus::PciBus;
use bantam_devices::power::PowerControl;
use bantam_devices::rtc::Rtc;
use bantam_devices::serial::{Serial, SerialEndpoint};
use bolero::TypeGenerator;
use bolero::generator::produce;
use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};

use crate::damage::Damage;

/// An operation on a device.
#[derive(Debug, TypeGenerator)]
pub enum Step {
    Read {
        #[generator(0..9u64)]
        offset: u64,
        #[generator(0..9usize)]
        width: usize,
    },
    Write {
        #[generator(0..9u64)]
        offset: u64,
        #[generator(produce::<Vec<u8>>().with().len(0..9usize))]
        bytes: Vec<u8>,
    },
    /// The owner presses keys.
    PressKeys,
    /// The worker gets a turn.
    Turn,
    /// The device is paused and resumed.
    Pause,
    /// The device is paused, reset and resumed.
    Reset,
    /// Another device takes its place, from its state or from a damaged copy of it.
    Replace { damage: Damage },
}

/// A kind of device, and the operations on it.
#[derive(Debug, TypeGenerator)]
pub struct Input {
    kind: u8,
    #[generator(produce::<Vec<Step>>().with().len(0..60usize))]
    steps: Vec<Step>,
}

/// An interrupt line that is not connected, and a machine that cannot be ended.
struct Unconnected;

impl InterruptLine for Unconnected {
    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

impl PowerControl for Unconnected {
    fn power_off(&self) {}
    fn reset(&self) {}
    fn exit(&self, _number: u8) {}
    fn panicked(&self, _handled_by_guest: bool) {}
}

trait PcDevice: BusDevice + Device {
    fn press_keys(&mut self) {}
}

impl PcDevice for AcpiPower {}
impl PcDevice for BootTimer {}
impl PcDevice for ExitPort {}
impl PcDevice for PanicDevice {}
impl PcDevice for PciBus {}
impl PcDevice for Rtc {}
impl PcDevice for Serial {}

impl PcDevice for I8042 {
    fn press_keys(&mut self) {
        // The keyboard may be disabled, or its buffer full.
        let _ = self.press_ctrl_alt_del();
    }
}

type Worker = Box<dyn MutEventSubscriber + Send>;

/// Makes a device, and its worker if it has one.
fn device(kind: u8) -> (Arc<Mutex<dyn PcDevice>>, Option<Worker>) {
    let power = Arc::new(Unconnected);
    let values = PowerValues {
        soft_off_sleep_type: 5,
        reset: 1,
    };
    let device: Arc<Mutex<dyn PcDevice>> = match kind % 9 {
        0 => Arc::new(Mutex::new(AcpiPower::new(values, power))),
        1 => Arc::new(Mutex::new(BootTimer::start().unwrap())),
        2 => Arc::new(Mutex::new(ExitPort::new(power))),
        3 => Arc::new(Mutex::new(PanicDevice::new(power))),
        4 => Arc::new(Mutex::new(PciBus::default())),
        5 => Arc::new(Mutex::new(Rtc::new())),
        6 => Arc::new(Mutex::new(I8042::new(power, Box::new(Unconnected)))),
        _ => {
            let log = DeviceLog::new("fuzzed port");
            let port = Serial::new(Box::new(Unconnected), None, log).unwrap();
            let port = Arc::new(Mutex::new(port));
            let endpoint = SerialEndpoint::Descriptors {
                input: Some(std::fs::File::open("/dev/zero").unwrap().into()),
                output: Some(std::fs::File::create("/dev/null").unwrap().into()),
            };
            let worker = endpoint.serve(port.clone()).unwrap();
            return (port, Some(worker));
        }
    };
    (device, None)
}

/// A device and its worker's event loop.
struct Machine {
    device: Arc<Mutex<dyn PcDevice>>,
    manager: EventManager<Worker>,
}

impl Machine {
    fn new(kind: u8) -> Machine {
        let (device, worker) = device(kind);
        let mut manager = EventManager::new().unwrap();
        if let Some(worker) = worker {
            manager.add_subscriber(worker);
        }
        Machine { device, manager }
    }

    fn act<R>(&self, act: impl FnOnce(&mut dyn PcDevice) -> R) -> R {
        act(&mut *self.device.lock().unwrap())
    }

    /// Replaces the device by a new one, which goes on with the state that `damage` leaves.
    fn replace(&mut self, kind: u8, damage: &Damage) {
        let section = self.act(|device| {
            device.pause().unwrap();
            device.save().unwrap()
        });
        let other = Machine::new(kind);
        if let Some(found) = damage.done_to(&section) {
            let restored = other.act(|device| device.restore(&found));
            if found == section {
                restored.unwrap();
                assert_eq!(other.act(|device| device.save().unwrap()), section);
            }
        }
        other.act(|device| device.resume().unwrap());
        *self = other;
    }
}

/// Checks that whatever is done to a device, it does not panic and can be saved, and another device can go on
/// with its state.
pub fn test(input: &Input) {
    let mut machine = Machine::new(input.kind);
    for step in &input.steps {
        match step {
            &Step::Read { offset, width } => {
                machine.act(|device| device.read(offset, &mut vec![0; width]));
            }
            Step::Write { offset, bytes } => {
                machine.act(|device| device.write(*offset, bytes));
            }
            Step::PressKeys => machine.act(|device| device.press_keys()),
            Step::Turn => {
                machine.manager.run_with_timeout(0).unwrap();
            }
            Step::Pause => machine.act(|device| {
                device.pause().unwrap();
                device.resume().unwrap();
            }),
            Step::Reset => machine.act(|device| {
                device.pause().unwrap();
                device.reset();
                device.resume().unwrap();
            }),
            Step::Replace { damage } => machine.replace(input.kind, damage),
        }
    }
    machine.replace(input.kind, &Damage::default());
}
