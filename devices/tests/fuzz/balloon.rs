//! The memory balloon, whose owner keeps changing its settings.

use std::io;
use std::num::NonZeroU32;

use bantam_devices::InterruptLine;
use bantam_devices::virtio::VirtioDevice;
use bantam_devices::virtio::balloon::{Balloon, BalloonHandle, BalloonOptions, HintingCommand};
use bantam_devices::virtio::transport::mmio::MmioLink;
use bantam_memory::GuestMemory;
use bolero::TypeGenerator;
use vm_memory::GuestAddress;

use crate::Target;
use crate::driver::{DATA, Driver, HEADERS, readable, writable};
use crate::machine::{Machine, SEAM};
use crate::operation::Operation;

const PAGE_SIZE: u64 = 4096;
/// The queues of a driver that accepts all features that are offered by default.
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATISTICS: u16 = 2;
const HINTING: u16 = 3;
const REPORTING: u16 = 4;
/// Address of the drivers' indirect tables.
const TABLE: u64 = HEADERS + 0x100;

#[derive(Debug, TypeGenerator)]
pub struct Options {
    deflate_on_oom: bool,
    statistics: bool,
    reporting: bool,
    hinting: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            deflate_on_oom: true,
            statistics: true,
            reporting: true,
            hinting: true,
        }
    }
}

/// An interrupt line that is not connected.
struct Unconnected;

impl InterruptLine for Unconnected {
    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Default)]
pub struct BalloonTarget {
    /// The handle of the device made last.
    handle: Option<BalloonHandle>,
}

/// Makes a request of page numbers, which are written to memory first.
fn page_numbers(numbers: impl IntoIterator<Item = u64>) -> (Operation, u32) {
    let bytes: Vec<u8> = numbers
        .into_iter()
        .flat_map(|number| (number as u32).to_le_bytes())
        .collect();
    let len = bytes.len() as u32;
    let address = HEADERS;
    (Operation::Store { address, bytes }, len)
}

impl Target for BalloonTarget {
    type Options = Options;

    const QUEUES: u16 = 5;

    fn device(&mut self, options: &Options) -> Box<dyn VirtioDevice> {
        // Only its size matters.
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let options = BalloonOptions {
            target_mib: 1,
            deflate_on_oom: options.deflate_on_oom,
            statistics_interval: NonZeroU32::new(if options.statistics { 3600 } else { 0 }),
            free_page_reporting: options.reporting,
            free_page_hinting: options.hinting,
        };
        let balloon = Balloon::new(&options, &memory).unwrap();
        let link = MmioLink::new("owner".to_string(), Box::new(Unconnected)).driver();
        self.handle = Some(balloon.handle(link));
        Box::new(balloon)
    }

    fn requests(driver: &mut Driver) -> Vec<Operation> {
        let mut operations = Vec::new();
        let data = DATA / PAGE_SIZE;
        for queue in [INFLATE, DEFLATE] {
            let (numbers, len) = page_numbers([data, data + 3, data + 1, SEAM / PAGE_SIZE]);
            operations.push(numbers);
            operations.extend(driver.request(queue, &[readable(HEADERS, len)]));
            let halves = [readable(HEADERS, 6), readable(HEADERS + 6, len - 6)];
            operations.extend(driver.indirect_request(queue, TABLE, &halves));
        }
        let statistics = Operation::Store {
            address: HEADERS,
            bytes: [4, 0, 1, 2, 3, 4, 5, 6, 7, 8, 99, 0, 0, 0, 0, 0, 0, 0, 0, 0].to_vec(),
        };
        operations.push(statistics.clone());
        operations.extend(driver.request(STATISTICS, &[readable(HEADERS, 20)]));
        operations.extend([
            Operation::HostSends { len: 61 },
            Operation::Turn,
            statistics,
        ]);
        operations.extend(driver.request(STATISTICS, &[readable(HEADERS, 20)]));
        let free = [writable(DATA, 0x3000), writable(SEAM - 0x1800, 0x3000)];
        // The owner has asked for hints above, with the first or second request.
        for command in [2_u32, 3, 0] {
            operations.push(Operation::Store {
                address: HEADERS,
                bytes: command.to_le_bytes().to_vec(),
            });
            operations.extend(driver.request(HINTING, &[readable(HEADERS, 4)]));
            operations.extend(driver.request(HINTING, &free));
        }
        operations.extend(driver.request(REPORTING, &free));
        operations
    }

    fn host_sends(&mut self, len: u16) {
        let Some(handle) = &self.handle else { return };
        // A target above the size of memory is refused, and so is an interval without statistics.
        let _ = handle.set_target(u32::from(len) / 500);
        if let Some(interval) = NonZeroU32::new(len.into()) {
            let _ = handle.set_statistics_interval(interval);
        }
        // This is refused without hinting.
        let _ = handle.hint(match len % 3 {
            0 => HintingCommand::Stop,
            rest => HintingCommand::Start {
                acknowledge_on_stop: rest == 1,
            },
        });
        let _ = handle.statistics();
    }

    fn check_service(&mut self, _options: &Options, machine: &mut Machine) {
        let mut driver = Driver::plain(2);
        machine.initialize(&mut driver);
        machine.store(DATA, &[0x5a; 0x2000]);
        let (numbers, len) = page_numbers([DATA / PAGE_SIZE]);
        machine.act(&numbers);
        for queue in [INFLATE, DEFLATE] {
            for operation in driver.request(queue, &[readable(HEADERS, len)]) {
                machine.act(&operation);
            }
            machine.await_used(queue, 1);
        }
        assert_eq!(machine.bytes(DATA, 0x1000), [0; 0x1000]);
        assert_eq!(machine.bytes(DATA + 0x1000, 0x1000), [0x5a; 0x1000]);
    }
}
