//! The cost of taking a descriptor chain, and of a device's work on it before the host's kernel gets its
//! turn.

#![allow(missing_docs, reason = "criterion's macros make functions")]
#![allow(clippy::unwrap_used, reason = "a benchmark fails where the host does")]

use std::hint::black_box;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bantam_devices::InterruptLine;
use bantam_devices::tap::PACKET_HEADER_SIZE;
use bantam_devices::virtio::block::bench::SteppedWorker;
use bantam_devices::virtio::transport::mmio::MmioLink;
use bantam_devices::virtio::{Chain, VirtQueue};
use bantam_memory::GuestMemory;
use bantam_storage::{DiskFile, DiskOptions};
use criterion::{Criterion, criterion_group, criterion_main};
use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_T_IN;
use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::tempfile::TempFile;

const QUEUE_SIZE: u16 = 256;
/// Chains that are made available in turn: as many as there are descriptors for, and no more than a
/// submission queue takes at once.
const CHAINS: u16 = 64;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
/// Address of the indirect tables, one for each chain.
const TABLES: u64 = 0x4000;
const TABLE_STRIDE: u64 = 64;
/// Address of the headers and status bytes of each chain.
const HEADERS: u64 = 0x8000;
const HEADER_STRIDE: u64 = 32;
/// Address of the data of each chain.
const DATA: u64 = 0x1_0000;
const DATA_SIZE: u32 = 4096;
const MEMORY_SIZE: usize = 0x10_0000;

const WRITE: u16 = VRING_DESC_F_WRITE as u16;

/// Address, length in bytes and flags of a buffer.
type Buffer = (u64, u32, u16);

/// The driver's side of a queue whose chains are all written in advance.
struct Driver {
    memory: Arc<GuestMemory>,
    available: u16,
}

impl Driver {
    /// Makes a driver with [`CHAINS`] chains, each of the buffers that `buffers` returns for it.
    fn new<const N: usize>(indirect: bool, buffers: impl Fn(u64) -> [Buffer; N]) -> Driver {
        let regions = [(GuestAddress(0), MEMORY_SIZE)];
        let memory = Arc::new(GuestMemory::from_ranges(&regions).unwrap());
        let driver = Driver {
            memory,
            available: 0,
        };
        for index in 0..u64::from(CHAINS) {
            let head = if indirect {
                let table = TABLES + index * TABLE_STRIDE;
                driver.write_chain(table, 0, &buffers(index));
                let flags = VRING_DESC_F_INDIRECT as u16;
                driver.write_chain(DESCRIPTORS, index, &[(table, N as u32 * 16, flags)]);
                index
            } else {
                driver.write_chain(DESCRIPTORS, index * N as u64, &buffers(index));
                index * N as u64
            };
            for slot in (index..QUEUE_SIZE.into()).step_by(CHAINS.into()) {
                driver.write(AVAILABLE + 4 + slot * 2, head as u16);
            }
        }
        driver
    }

    fn write_chain(&self, table: u64, first: u64, buffers: &[Buffer]) {
        for (index, &(address, len, flags)) in (first..).zip(buffers) {
            let is_last = index + 1 == first + buffers.len() as u64;
            let next = if is_last { 0 } else { VRING_DESC_F_NEXT as u16 };
            let descriptor = table + index * 16;
            self.write(descriptor, address);
            self.write(descriptor + 8, len);
            self.write(descriptor + 12, flags | next);
            self.write(descriptor + 14, index as u16 + 1);
        }
    }

    fn write<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    fn queue(&self) -> VirtQueue {
        let mut queue = Queue::new(QUEUE_SIZE).unwrap();
        queue.set_desc_table_address(Some(DESCRIPTORS as u32), None);
        queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
        queue.set_used_ring_address(Some(USED as u32), None);
        queue.set_ready(true);
        let doorbell = EventFd::new(EFD_NONBLOCK).unwrap();
        VirtQueue::new(0, &queue, doorbell, self.memory.clone()).unwrap()
    }

    /// Makes `count` more chains available.
    fn offer(&mut self, count: u16) {
        self.available = self.available.wrapping_add(count);
        let index = GuestAddress(AVAILABLE + 2);
        self.memory
            .store(self.available, index, Ordering::Release)
            .unwrap();
    }
}

/// Makes a request to read [`DATA_SIZE`] bytes: header, data and status.
fn read_request(index: u64) -> [Buffer; 3] {
    let header = HEADERS + index * HEADER_STRIDE;
    [
        (header, 16, 0),
        (DATA + index % 8 * u64::from(DATA_SIZE), DATA_SIZE, WRITE),
        (header + 16, 1, WRITE),
    ]
}

/// Makes a packet of full size, in the two parts in which Linux sends it.
fn packet(index: u64) -> [Buffer; 2] {
    let header = HEADERS + index * HEADER_STRIDE;
    let frame = DATA + index % 8 * u64::from(DATA_SIZE);
    [(header, PACKET_HEADER_SIZE as u32, 0), (frame, 1514, 0)]
}

fn offer_pop_return(criterion: &mut Criterion, name: &str, mut driver: Driver) {
    let mut queue = driver.queue();
    let mut chain = Chain::new(&driver.memory);
    criterion.bench_function(name, |bencher| {
        bencher.iter(|| {
            driver.offer(1);
            assert!(queue.pop(&mut chain).unwrap());
            black_box((chain.readable.vectors(), chain.writable.vectors()));
            queue.add_used(chain.head, 1);
        });
    });
}

fn queue(criterion: &mut Criterion) {
    let direct = Driver::new(false, read_request);
    offer_pop_return(criterion, "queue: three direct descriptors", direct);
    let indirect = Driver::new(true, read_request);
    offer_pop_return(criterion, "queue: an indirect table of three", indirect);
}

/// Measures the transmitter's own work on a packet: taking its chain, whose vectors are given to the tap
/// unchanged.
fn net(criterion: &mut Criterion) {
    let driver = Driver::new(false, packet);
    offer_pop_return(criterion, "net: a transmit chain to its vectors", driver);
}

fn block(criterion: &mut Criterion) {
    struct Unconnected;
    impl InterruptLine for Unconnected {
        fn trigger(&self) -> io::Result<()> {
            Ok(())
        }
    }

    let image = TempFile::new().unwrap();
    image.as_file().set_len(MEMORY_SIZE as u64).unwrap();
    for (name, indirect) in [
        ("block: a read to its submission entry", false),
        ("block: an indirect read to its submission entry", true),
    ] {
        let mut driver = Driver::new(indirect, read_request);
        for index in 0..u64::from(CHAINS) {
            let header = HEADERS + index * HEADER_STRIDE;
            driver.write(header, VIRTIO_BLK_T_IN);
            driver.write(header + 8, index);
        }
        let options = DiskOptions {
            read_only: true,
            ..DiskOptions::default()
        };
        let disk = DiskFile::open(image.as_path(), &options).unwrap();
        let link = MmioLink::new("device".to_string(), Box::new(Unconnected)).driver();
        let (memory, queue) = (driver.memory.clone(), driver.queue());
        let mut worker = SteppedWorker::new(disk, memory, link, queue).unwrap();
        criterion.bench_function(name, |bencher| {
            bencher.iter_custom(|iterations| {
                let mut time = Duration::ZERO;
                let mut left = iterations;
                while left > 0 {
                    let count = left.min(CHAINS.into());
                    driver.offer(count as u16);
                    let start = Instant::now();
                    for _ in 0..count {
                        assert!(worker.begin());
                    }
                    time += start.elapsed();
                    // The kernel's part, which is not measured.
                    assert!(worker.finish());
                    left -= count;
                }
                time
            });
        });
    }
}

criterion_group!(benches, queue, net, block);
criterion_main!(benches);
