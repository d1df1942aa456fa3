//! The block device, over an image in memory.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use bantam_devices::rate_limiter::{Limits, RateLimit};
use bantam_devices::virtio::VirtioDevice;
use bantam_devices::virtio::block::{Block, BlockOptions, Engine};
use bantam_storage::{CacheMode, DiskError, DiskFile, DiskOptions, SECTOR_SIZE};
use bolero::TypeGenerator;
use bolero::generator::one_value_of;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::Target;
use crate::driver::{Buffer, DATA, Driver, HEADERS, readable, writable};
use crate::machine::Machine;
use crate::operation::Operation;

const DISK_SIZE: i64 = 0x1_0000;
const SECTORS: u64 = DISK_SIZE as u64 / SECTOR_SIZE;
const STATUS: u64 = HEADERS + 16;
/// Address of the drivers' indirect tables.
const TABLE: u64 = HEADERS + 0x100;

#[derive(Debug, TypeGenerator)]
pub struct Options {
    #[generator(one_value_of([Engine::Auto, Engine::IoUring, Engine::Sync]))]
    engine: Engine,
    #[generator(one_value_of([CacheMode::Writeback, CacheMode::Writethrough, CacheMode::None, CacheMode::Unsafe]))]
    cache: CacheMode,
    #[generator(1..=2u16)]
    queues: u16,
    polls: bool,
    read_only: bool,
    #[generator(one_value_of([None, None, None, Some(LIMIT)]))]
    operations: Option<RateLimit>,
}

/// A limit that the drivers here reach, and that delays them as little as possible.
const LIMIT: RateLimit = RateLimit {
    size: 4,
    refill_time: Duration::from_millis(2),
    one_time_burst: 0,
};

impl Default for Options {
    fn default() -> Options {
        Options {
            engine: Engine::Auto,
            cache: CacheMode::Writeback,
            queues: 1,
            polls: false,
            read_only: false,
            operations: None,
        }
    }
}

pub struct BlockTarget {
    image: OwnedFd,
}

impl BlockTarget {
    pub fn new() -> BlockTarget {
        let image = memfd_create("disk", MFdFlags::MFD_CLOEXEC).unwrap();
        ftruncate(&image, DISK_SIZE).unwrap();
        BlockTarget { image }
    }
}

/// Makes the parts of a request: a header, which is written to memory first, the data and the status.
fn request(kind: u32, sector: u64, data: &[Buffer]) -> (Operation, Vec<Buffer>) {
    let mut bytes = vec![0; 17];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&sector.to_le_bytes());
    bytes[16] = 0xff;
    let header = Operation::Store {
        address: HEADERS,
        bytes,
    };
    let mut buffers = vec![readable(HEADERS, 16)];
    buffers.extend(data);
    buffers.push(writable(STATUS, 1));
    (header, buffers)
}

impl Target for BlockTarget {
    type Options = Options;

    fn device(&mut self, options: &Options) -> Box<dyn VirtioDevice> {
        let path = format!("/proc/self/fd/{}", self.image.as_raw_fd());
        let disk_options = DiskOptions {
            read_only: options.read_only,
            cache: options.cache,
            ..DiskOptions::default()
        };
        let open = |options| DiskFile::open(Path::new(&path), options);
        let disk = match open(&disk_options) {
            // Files in memory support O_DIRECT since Linux 6.6.
            Err(DiskError::Direct { .. }) => open(&DiskOptions {
                cache: CacheMode::Writeback,
                ..disk_options
            }),
            disk => disk,
        };
        let disk = disk.unwrap();
        let options = BlockOptions {
            engine: options.engine,
            queues: options.queues,
            polls: options.polls,
            limits: Limits {
                operations: options.operations,
                bytes: None,
            },
        };
        Box::new(Block::new(disk, "fuzzed disk", &options).unwrap())
    }

    fn requests(driver: &mut Driver) -> Vec<Operation> {
        let mut operations = Vec::new();
        let range = Operation::Store {
            address: DATA,
            bytes: [8u64, 16].map(u64::to_le_bytes).concat(),
        };
        let requests = [
            (VIRTIO_BLK_T_GET_ID, 0, vec![writable(DATA, 20)]),
            (VIRTIO_BLK_T_IN, 0, vec![writable(DATA, 4096)]),
            (
                VIRTIO_BLK_T_OUT,
                SECTORS - 8,
                vec![readable(DATA, 512), readable(DATA + 0x2000, 3584)],
            ),
            (VIRTIO_BLK_T_FLUSH, 0, vec![]),
            (VIRTIO_BLK_T_DISCARD, 0, vec![readable(DATA, 16)]),
            (VIRTIO_BLK_T_WRITE_ZEROES, 0, vec![readable(DATA, 16)]),
        ];
        for (kind, sector, data) in requests {
            let (header, buffers) = request(kind, sector, &data);
            operations.extend([range.clone(), header]);
            operations.extend(driver.request(0, &buffers));
        }
        let (header, buffers) = request(VIRTIO_BLK_T_IN, 1, &[writable(DATA, 1024); 3]);
        operations.push(header);
        operations.extend(driver.indirect_request(0, TABLE, &buffers));
        // Several of the same kind at once.
        for _ in 0..8 {
            operations.extend(driver.offer(0, &[readable(HEADERS, 16), writable(DATA, 513)]));
        }
        operations.push(Operation::RingDoorbell { queue: 0 });
        operations
    }

    fn check_service(&mut self, options: &Options, machine: &mut Machine) {
        let mut driver = Driver::plain(1);
        machine.initialize(&mut driver);
        let mut done = 0;
        let mut status = |machine: &mut Machine, kind, data| {
            let (header, buffers) = request(kind, SECTORS - 1, &[data]);
            machine.act(&header);
            for operation in driver.request(0, &buffers) {
                machine.act(&operation);
            }
            done += 1;
            machine.await_used(0, done);
            machine.bytes(STATUS, 1)[0]
        };
        machine.store(DATA, &[0x5a; 512]);
        let written = status(machine, VIRTIO_BLK_T_OUT, readable(DATA, 512));
        assert_eq!(written, u8::from(options.read_only));
        let read = status(machine, VIRTIO_BLK_T_IN, writable(DATA + 512, 512));
        assert_eq!(read, 0);
        assert!(options.read_only || machine.bytes(DATA + 512, 512) == [0x5a; 512]);
    }
}
