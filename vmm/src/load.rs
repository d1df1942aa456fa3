//! Loads what the guest finds in its memory at its start: kernel, initrd, command line and tables.

use bantam_arch::acpi::{self, AcpiDevices, VirtioMmioWindow};
use bantam_arch::memory_map::memory_map;
use bantam_arch::{layout, mptable, registers, smbios};
use bantam_boot::{
    BootProtocol, CommandLine, LoadedKernel, StartInformation, load_initrd, load_kernel,
    write_start_information,
};
use bantam_memory::GuestMemory;
use vm_memory::GuestAddress;

use crate::config::{BootProtocolOption, MachineConfig, SerialConfig};
use crate::error::Error;
use crate::exit_reason;
use crate::random::random;
use crate::resources::Images;
use crate::vcpu::BootEntry;
use crate::workarounds;

/// What is known about a guest that has been loaded into memory.
pub(crate) struct LoadedGuest {
    pub(crate) boot: BootEntry,
    /// Whether the guest marks a restart after a panic ([`exit_reason::has_told_panic`]).
    pub(crate) tells_panics: bool,
}

/// What the guest is told of its machine beside the configuration.
pub(crate) struct Surroundings<'a> {
    /// Where the virtio devices are.
    pub(crate) windows: &'a [VirtioMmioWindow],
    /// Frequency of the time stamp counter, if KVM knows it.
    pub(crate) tsc_khz: Option<u32>,
    /// The partition of the first disk with the root file system, if it has partitions.
    pub(crate) root_partition: Option<u32>,
}

/// Loads everything that the guest finds in memory at its start, with kernel and initrd from `images`.
pub(crate) fn load_guest(
    config: &MachineConfig,
    images: Images,
    memory: &GuestMemory,
    surroundings: &Surroundings<'_>,
) -> Result<LoadedGuest, Error> {
    let windows = surroundings.windows;
    let Images { mut kernel, initrd } = images;
    let path = &config.kernel;
    let wanted = match config.boot_protocol {
        BootProtocolOption::Auto => BootProtocol::Auto,
        BootProtocolOption::Pvh => BootProtocol::Pvh,
        BootProtocolOption::Linux64 => BootProtocol::Linux64,
    };
    let kernel = load_kernel(memory, &mut kernel, wanted).map_err(|source| Error::LoadKernel {
        path: path.clone(),
        source,
    })?;
    tracing::info!(
        "kernel '{}': {}, entered at {:#x} by {}",
        path.display(),
        kernel.format,
        kernel.entry.0,
        kernel.protocol
    );
    let initrd = match (&config.initrd, initrd) {
        (Some(path), Some(mut file)) => {
            let initrd = load_initrd(memory, &mut file, &kernel);
            Some(initrd.map_err(|source| Error::LoadInitrd {
                path: path.clone(),
                source,
            })?)
        }
        _ => None,
    };
    let command_line = command_line(config, &kernel, memory, surroundings)?;
    tracing::info!("kernel command line: {command_line}");
    let overflow = kernel.overflows_init(memory, &command_line);
    if let Some(overflow) = overflow.map_err(Error::ReadKernel)? {
        tracing::warn!("{overflow}");
    }

    let vcpu_count = config.cpus.get();
    let rsdp = acpi::write_acpi_tables(
        memory,
        &AcpiDevices {
            vcpu_count,
            virtio_mmio: windows,
            serial: true,
        },
    )?;
    let gsis: Vec<u32> = windows
        .iter()
        .map(|window| window.gsi)
        .chain([layout::KEYBOARD_GSI, layout::SERIAL_GSI])
        .collect();
    mptable::write_mp_table(memory, vcpu_count, &gsis)?;
    if let Some(config) = &config.smbios {
        smbios::write_smbios_tables(memory, &config.identity())?;
    }
    registers::write_boot_tables(memory, kernel.protocol)?;
    let information = StartInformation {
        memory_map: &memory_map(config.memory.bytes()),
        command_line: &command_line,
        initrd,
        rsdp: Some(rsdp),
        random_seed: random()?,
    };
    write_start_information(memory, &kernel, &information)?;
    Ok(LoadedGuest {
        boot: BootEntry {
            entry: kernel.entry,
            protocol: kernel.protocol,
        },
        tells_panics: exit_reason::tells_panics(&command_line),
    })
}

/// Builds the kernel command line: the user's or the default one, what the user adds, what the host needs,
/// and the places of devices that the kernel does not find by ACPI.
fn command_line(
    config: &MachineConfig,
    kernel: &LoadedKernel,
    memory: &GuestMemory,
    surroundings: &Surroundings<'_>,
) -> Result<CommandLine, Error> {
    let mut line = match &config.cmdline {
        Some(text) => CommandLine::new(text)?,
        None => default_command_line(config, surroundings.root_partition)?,
    };
    if let Some(text) = &config.append {
        line.append(text)?;
    }
    if config.host_workarounds {
        let has_serial_port = config.serial != SerialConfig::None;
        let tsc_khz = surroundings.tsc_khz;
        workarounds::add_guest_kernel_parameters(&mut line, has_serial_port, tsc_khz, |name| {
            kernel
                .passes_to_init(memory, name)
                .map_err(Error::ReadKernel)
        })?;
    }
    let finds_devices_by_acpi = !line.has_parameter("acpi=off")
        && kernel
            .finds_virtio_mmio_by_acpi(memory)
            .map_err(Error::ReadKernel)?;
    if !finds_devices_by_acpi {
        for window in surroundings.windows {
            line.add_virtio_mmio_device(GuestAddress(window.address), window.size, window.gsi);
        }
    }
    Ok(line)
}

/// Builds the default command line. It has the kernel end the machine when it reboots or panics, and tell
/// the two apart. It names the consoles that there are, the virtio console last so that init uses it, and
/// the first disk, or this partition of it, as the root file system if there is no initrd to find one.
fn default_command_line(
    config: &MachineConfig,
    root_partition: Option<u32>,
) -> Result<CommandLine, Error> {
    let parameters = format!("reboot={},k panic=-1", exit_reason::PANIC_PARAMETER);
    let mut line = CommandLine::new(&parameters)?;
    if config.serial != SerialConfig::None {
        line.append("console=ttyS0")?;
    }
    if config.console != SerialConfig::None {
        line.append("console=hvc0")?;
    }
    if let (Some(disk), None) = (config.disks.first(), &config.initrd) {
        let partition = root_partition.map_or(String::new(), |number| number.to_string());
        line.append(&format!("root=/dev/vda{partition}"))?;
        line.append(if disk.readonly { "ro" } else { "rw" })?;
    }
    Ok(line)
}
