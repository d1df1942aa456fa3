//! Differentiated system description table: the devices a guest cannot find by probing
//! (ACPI 6.5 section 5.2.11.1).
//!
//! The guest interprets this table while it boots, so it contains only what the guest needs; in
//! particular, it leaves out objects that have a default (`_STA`, and on x86 `_CCA`).

use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package,
    Path, ResourceTemplate, Scope,
};
use acpi_tables::{Aml, AmlSink};

use super::{ACPI_SLEEP_TYPE_S5, AcpiDevices, VirtioMmioWindow};
use crate::error::{Error, Result};
use crate::layout::{
    DEVICE_HOLE, DEVICE_HOLE_END, GENERATION_ID, I8042_COMMAND_PORT, I8042_PORT, KEYBOARD_GSI,
    PANIC_PORT, POWER_BUTTON_GSI, RESTORED_GSI, RTC_PORT, RTC_PORT_COUNT, SERIAL_GSI, SERIAL_PORT,
    SERIAL_PORT_COUNT, VM_CLOCK, VM_CLOCK_SIZE,
};

/// Notification value for a press of the power button (ACPI 6.5 section 5.6.6).
const POWER_BUTTON_PRESSED: u8 = 0x80;
/// Notification value for a change of the generation id or of the VMClock page: the first value whose
/// meaning depends on the device.
const CHANGED: u8 = 0x80;

/// Returns the definition block, in ACPI machine language, of a machine with these devices.
pub(super) fn definition_block(devices: &AcpiDevices<'_>) -> Result<Vec<u8>> {
    let virtio = devices
        .virtio_mmio
        .iter()
        .enumerate()
        .map(|(index, window)| VirtioMmioDevice::new(index, window))
        .collect::<Result<Vec<_>>>()?;

    let mut system_bus: Vec<&dyn Aml> = vec![
        &PowerButton,
        &GenerationCounter,
        &VmClock,
        &GenericEventDevice,
        &Keyboard,
        &Rtc,
        &PanicDevice,
    ];
    if devices.serial {
        system_bus.push(&SerialPort);
    }
    system_bus.extend(virtio.iter().map(|device| device as &dyn Aml));

    let mut aml = Vec::new();
    Scope::new("_SB_".into(), system_bus).to_aml_bytes(&mut aml);
    // Section 7.4.2: the sleep type, and another one for a register that hardware-reduced platforms
    // lack.
    Name::new(
        "_S5_".into(),
        &Package::new(vec![&ACPI_SLEEP_TYPE_S5, &0_u8]),
    )
    .to_aml_bytes(&mut aml);
    Ok(aml)
}

/// An interrupt that only its device uses, edge-triggered, active high.
fn interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// The control method power button (ACPI 6.5 section 4.8.2.2.1.2).
struct PowerButton;

impl Aml for PowerButton {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Device::new(
            "PWRB".into(),
            vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C"))],
        )
        .to_aml_bytes(sink);
    }
}

/// The generation counter ("Virtual Machine Generation ID", Microsoft). Drivers know it by the compatible
/// id, and find the generation id at the address whose halves, the lower one first, are a package.
struct GenerationCounter;

impl Aml for GenerationCounter {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let halves = [GENERATION_ID as u32, (GENERATION_ID >> 32) as u32];
        Device::new(
            "VGEN".into(),
            vec![
                &Name::new("_HID".into(), &"BNTM0001"),
                &Name::new("_CID".into(), &"VM_Gen_Counter"),
                &Name::new("_DDN".into(), &"VM_Gen_Counter"),
                &Name::new("ADDR".into(), &Package::new(vec![&halves[0], &halves[1]])),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The VMClock page (Linux, `include/uapi/linux/vmclock-abi.h`).
struct VmClock;

impl Aml for VmClock {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Device::new(
            "VCLK".into(),
            vec![
                &Name::new("_HID".into(), &"AMZNC10C"),
                &Name::new("_CID".into(), &"VMCLOCK"),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&Memory32Fixed::new(
                        false,
                        VM_CLOCK as u32,
                        VM_CLOCK_SIZE,
                    )]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Turns interrupts into notifications of devices (ACPI 6.5 section 5.6.9).
struct GenericEventDevice;

impl Aml for GenericEventDevice {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Device::new(
            "GED_".into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0013"),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &interrupt(POWER_BUTTON_GSI),
                        &interrupt(RESTORED_GSI),
                    ]),
                ),
                &Method::new(
                    "_EVT".into(),
                    1,
                    false,
                    vec![
                        &If::new(
                            &Equal::new(&Arg(0), &POWER_BUTTON_GSI),
                            vec![&Notify::new(&Path::new("PWRB"), &POWER_BUTTON_PRESSED)],
                        ),
                        &If::new(
                            &Equal::new(&Arg(0), &RESTORED_GSI),
                            vec![
                                &Notify::new(&Path::new("VGEN"), &CHANGED),
                                &Notify::new(&Path::new("VCLK"), &CHANGED),
                            ],
                        ),
                    ],
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The keyboard controller with its keyboard.
struct Keyboard;

impl Aml for Keyboard {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Device::new(
            "KBD_".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0303")),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &IO::new(I8042_PORT, I8042_PORT, 1, 1),
                        &IO::new(I8042_COMMAND_PORT, I8042_COMMAND_PORT, 1, 1),
                        &interrupt(KEYBOARD_GSI),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The real-time clock, whose interrupt is not connected.
struct Rtc;

impl Aml for Rtc {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Device::new(
            "RTC_".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&IO::new(
                        RTC_PORT,
                        RTC_PORT,
                        1,
                        RTC_PORT_COUNT as u8,
                    )]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The panic device, with QEMU's name and id (QEMU, `docs/specs/pvpanic.rst`). Drivers use its port
/// directly, so it has none of the methods that QEMU adds.
struct PanicDevice;

impl Aml for PanicDevice {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Device::new(
            "PEVT".into(),
            vec![
                &Name::new("_HID".into(), &"QEMU0001"),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&IO::new(PANIC_PORT, PANIC_PORT, 1, 1)]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The first serial port, a 16550.
struct SerialPort;

impl Aml for SerialPort {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &1_u8),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &IO::new(SERIAL_PORT, SERIAL_PORT, 1, SERIAL_PORT_COUNT as u8),
                        &interrupt(SERIAL_GSI),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// A virtio-mmio device (virtio 1.3 section 4.2).
struct VirtioMmioDevice {
    index: usize,
    address: u32,
    size: u32,
    gsi: u32,
}

impl VirtioMmioDevice {
    fn new(index: usize, window: &VirtioMmioWindow) -> Result<Self> {
        let &VirtioMmioWindow { address, size, gsi } = window;
        let outside = || Error::DeviceWindow { address, size };
        let end = address.checked_add(size).ok_or_else(outside)?;
        if address < DEVICE_HOLE || end > DEVICE_HOLE_END || size == 0 {
            return Err(outside());
        }
        if index > MAX_INDEX {
            return Err(Error::AcpiTablesTooLarge);
        }
        Ok(Self {
            index,
            address: address as u32,
            size: size as u32,
            gsi,
        })
    }
}

/// A device's name has four characters: a letter and the index as three hexadecimal digits. The
/// area for the tables is full long before the indices run out.
const MAX_INDEX: usize = 0xfff;

impl Aml for VirtioMmioDevice {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Device::new(
            Path::new(&format!("V{:03X}", self.index)),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &self.index),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, self.address, self.size),
                        &interrupt(self.gsi),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}
